/*
The part of CUDA, cuBLASLt and NCCL that train_megalodon.cu uses, on a CPU: its kernels are tested, and can be stepped
through in a debugger and checked by sanitizers, where there is no GPU. `make test-emulated` builds and runs them;
dev/cuda/emulate.sh makes kernel<<<...>>>(...) and the instructions in assembler calls of what stands here.

Threads of a block are fibers of one process. One runs until it waits for others (barriers, shuffles) or ends, and which
one is first changes from block to block, so that a missing barrier gives wrong numbers. Operations on streams are put
off until something waits for them, and every other one of a side stream runs as early as it may, so that a missing wait
gives wrong numbers, too. It dies where threads wait at different barriers, or for one that has ended. Kernels' speed,
caches and memory order are not modelled.
*/
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <tuple>
#include <type_traits>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Types

struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((unsigned)b.bits << 16); }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return {u}; }
static inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return {(uint16_t)(f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
#define __expf expf
static inline float __fdividef(float a, float b) { return a / b; }
static inline void sincospi(double x, double* sine, double* cosine) { sincos(x * M_PI, sine, cosine); }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
template <typename V> static V __ldcg(const V* p) { return *p; }

// ---------------------------------------------------------------------------------------------------------------------
// Threads

static dim3 threadIdx, blockIdx, blockDim, gridDim;
alignas(16) static uint4 memory[(227 << 10) / 16]; // extern __shared__, under the name that the kernels give it

enum { RUNS, AT_WARP, AT_BLOCK, ENDED };
struct Fiber { jmp_buf place; int state; unsigned turn; bool begun; };
struct Exchange { uint32_t a[2][32][8]; }; // what the lanes of a warp show each other; two buffers that take turns
static Fiber fibers[1024];
static Exchange exchanges[32];
static int fiber;
static jmp_buf scheduler;
static const std::function<void()>* kernel_body;

static void fiber_main(void) {
    for (;;) {
        (*kernel_body)();
        fibers[fiber].state = ENDED;
        if (!_setjmp(fibers[fiber].place)) { _longjmp(scheduler, 1); }
    }
}
static __attribute__((noipa)) void fiber_wait(int state) {
    fibers[fiber].state = state;
    if (!_setjmp(fibers[fiber].place)) { _longjmp(scheduler, 1); }
}
static __attribute__((noipa)) void fiber_run(int f) {
    Fiber* it = &fibers[f];
    fiber = f;
    threadIdx = dim3(f % blockDim.x, f / blockDim.x % blockDim.y, f / blockDim.x / blockDim.y);
    if (_setjmp(scheduler)) { return; }
    if (it->begun) { _longjmp(it->place, 1); }
    static ucontext_t here;
    enum { STACK = 1 << 18 };
    getcontext(&here);
    here.uc_stack.ss_size = STACK;
    here.uc_stack.ss_sp = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    it->begun = true;
    makecontext(&here, fiber_main, 0);
    setcontext(&here);
}
static void fail(const char* what) {
    fprintf(stderr, "block (%u,%u,%u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, what);
    abort();
}
// Lanes of a warp run until they wait; when all wait for each other, on they go.
static void warp_run(int first, int count, bool back) {
    for (;;) {
        int waiting = 0, ended = 0;
        for (int i = 0; i < count; i++) {
            int f = first + (back ? count - 1 - i : i);
            if (fibers[f].state == RUNS) { fiber_run(f); }
            waiting += fibers[f].state == AT_WARP;
            ended += fibers[f].state == ENDED;
        }
        if (!waiting) { return; }
        if (waiting < count) { fail(ended ? "a warp waits for an ended thread" : "a warp waits at two places"); }
        for (int f = first; f < first + count; f++) { fibers[f].state = RUNS; }
    }
}
static void block_run(bool back) {
    int threads = blockDim.x * blockDim.y * blockDim.z, warps = (threads + 31) / 32, left = threads;
    for (int f = 0; f < threads; f++) { fibers[f].state = RUNS; fibers[f].turn = 0; }
    while (left) {
        left = 0;
        for (int i = 0; i < warps; i++) {
            int first = 32 * (back ? warps - 1 - i : i);
            warp_run(first, threads - first < 32 ? threads - first : 32, back);
        }
        for (int f = 0; f < threads; f++) {
            if (fibers[f].state == AT_BLOCK) { fibers[f].state = RUNS; left++; }
        }
    }
}

static inline void __syncthreads(void) { fiber_wait(AT_BLOCK); }
static inline void __syncwarp(void) { fiber_wait(AT_WARP); }
// Shows n words to the other lanes; returns what all lanes show.
static uint32_t (*warp_show(const void* words, int n))[8] {
    Exchange* e = &exchanges[fiber / 32];
    uint32_t (*all)[8] = e->a[fibers[fiber].turn++ & 1];
    memcpy(all[fiber % 32], words, n * sizeof(uint32_t));
    fiber_wait(AT_WARP);
    return all;
}
template <typename V> static V shuffle(V v, int from) {
    int me = fiber % 32;
    uint32_t (*all)[8] = warp_show(&v, sizeof(V) / 4);
    memcpy(&v, all[from >= 0 && from < 32 ? from : me], sizeof(V));
    return v;
}
template <typename V> static V __shfl_sync(unsigned, V v, int from) { return shuffle(v, from & 31); }
template <typename V> static V __shfl_xor_sync(unsigned, V v, int mask) { return shuffle(v, fiber % 32 ^ mask); }
template <typename V> static V __shfl_up_sync(unsigned, V v, int n) { return shuffle(v, fiber % 32 - n); }
static unsigned __ballot_sync(unsigned, bool yes) {
    uint32_t mine = yes, (*all)[8] = warp_show(&mine, 1);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) { bits |= all[i][0] << i; }
    return bits;
}
static int __ffs(unsigned bits) { return __builtin_ffs(bits); }
static int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }

static float bf16_half(uint32_t word, int upper) { return __uint_as_float(upper ? word & 0xffff0000u : word << 16); }
// mma.sync.m16n8k16, ldmatrix.x4.trans: PTX ISA, matrix fragments
static void emulated_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    int g = fiber % 32 / 4, i = fiber % 4;
    uint32_t (*all)[8] = warp_show(mine, 6);
    for (int j = 0; j < 4; j++) {
        int row = g + j / 2 * 8, column = 2 * i + j % 2;
        for (int k = 0; k < 16; k++) {
            c[j] += bf16_half(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2)
                    * bf16_half(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
        }
    }
}
static unsigned __cvta_generic_to_shared(const void* p) { return (unsigned)((const char*)p - (const char*)memory); }
static void emulated_ldmatrix(uint32_t (&a)[4], unsigned from) {
    int g = fiber % 32 / 4, i = fiber % 4;
    uint32_t (*all)[8] = warp_show(&from, 1);
    for (int j = 0; j < 4; j++) {
        uint16_t pair[2];
        for (int k = 0; k < 2; k++) {
            memcpy(&pair[k], (char*)memory + (int)all[8 * j + 2 * i + k][0] + 2 * g, 2);
        }
        memcpy(&a[j], pair, 4);
    }
}

// Bulk copies. They arrive when a thread waits for them, in memory that until then holds NaN. barrier: an mbarrier for
// one copy at a time, here the number of its phases that are over.
static std::map<uint64_t*, std::function<void()>> copies;
static void emulated_copy_init(uint64_t* barrier) { *barrier = 0; }
static void emulated_copy_begin(void* to, const void* from, size_t bytes, uint64_t* barrier) {
    if (((size_t)to | (size_t)from | bytes) % 16) { fail("a copy that is not of 16 bytes each"); }
    if (copies.count(barrier)) { fail("two copies with one barrier"); }
    memset(to, 0xff, bytes);
    copies[barrier] = [=] { memcpy(to, from, bytes); ++*barrier; };
}
static bool emulated_copy_there(uint64_t* barrier, int parity) { // is the phase of this parity over?
    if ((*barrier & 1) != parity) { return true; }
    if (!copies.count(barrier)) { fail("a wait for a copy that nobody has begun"); }
    copies[barrier]();
    copies.erase(barrier);
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams, memory, launches

typedef enum { cudaSuccess, cudaErrorMemoryAllocation } cudaError_t;
struct Stream { std::deque<std::function<void()>> later; size_t done; bool blocking, captures; };
struct Event { Stream* stream; size_t place; double time; };
typedef Stream* cudaStream_t;
typedef Event* cudaEvent_t;
typedef std::deque<std::function<void()>>* cudaGraph_t;
typedef cudaGraph_t cudaGraphExec_t;
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDefault };
enum { cudaEventDisableTiming, cudaStreamNonBlocking, cudaStreamCaptureModeThreadLocal };
struct cudaDeviceProp {
    char name[256]; int major, minor, multiProcessorCount, pciDomainID, pciBusID, pciDeviceID;
    size_t totalGlobalMem, sharedMemPerBlockOptin;
};
enum { CARDS = 64 };
static Stream* streams[64];
static int num_streams, card;

static void stream_run(Stream* s, size_t until) {
    while (s->done < until && !s->later.empty()) {
        std::function<void()> next = std::move(s->later.front());
        s->later.pop_front(); s->done++; next();
    }
}
static void stream_add(Stream* s, std::function<void()> what) {
    static unsigned count;
    s->later.push_back(std::move(what));
    if (!s->blocking && count++ & 1) { stream_run(s, SIZE_MAX); }
}
static void streams_run(bool all) {
    for (int i = 0; i < num_streams; i++) { if (all || streams[i]->blocking) { stream_run(streams[i], SIZE_MAX); } }
}
static const char* cudaGetErrorString(cudaError_t e) { return e ? "out of memory" : "no error"; }
static cudaError_t cudaGetLastError(void) { return cudaSuccess; }
static cudaError_t cudaGetDeviceCount(int* n) { *n = CARDS; return cudaSuccess; }
static cudaError_t cudaSetDevice(int n) { card = n; return cudaSuccess; }
static cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int n) {
    *p = {"a CPU in place of a GPU", 9, 0, 3, 0, n, 0, (size_t)8 << 30, sizeof(memory)};
    return cudaSuccess;
}
static cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
    *left = *total = (size_t)8 << 30;
    return cudaSuccess;
}
static cudaError_t cudaMalloc(void** p, size_t n) {
    if (!(*p = aligned_alloc(256, (n + 255) / 256 * 256))) { return cudaErrorMemoryAllocation; }
    memset(*p, 0xff, n); // NaN
    return cudaSuccess;
}
static cudaError_t cudaFree(void* p) { streams_run(true); free(p); return cudaSuccess; }
template <typename P> static cudaError_t cudaMallocHost(P** p, size_t n) { return cudaMalloc((void**)p, n); }
static cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }

static cudaError_t cudaStreamCreate(cudaStream_t* s) {
    *s = streams[num_streams++] = new Stream();
    (*s)->blocking = true;
    return cudaSuccess;
}
static cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, int, int) {
    cudaStreamCreate(s);
    (*s)->blocking = false;
    return cudaSuccess;
}
static cudaError_t cudaDeviceGetStreamPriorityRange(int* low, int* high) { *low = *high = 0; return cudaSuccess; }
static cudaError_t cudaStreamDestroy(cudaStream_t s) { stream_run(s, SIZE_MAX); return cudaSuccess; }
static cudaError_t cudaStreamSynchronize(cudaStream_t s) { stream_run(s, SIZE_MAX); return cudaSuccess; }
static cudaError_t cudaEventCreate(cudaEvent_t* e) { *e = new Event(); return cudaSuccess; }
static cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, int) { return cudaEventCreate(e); }
static cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
static cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    e->stream = s; e->place = s->done + s->later.size();
    return cudaSuccess;
}
static cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, int) {
    Event at = *e;
    if (at.stream) { stream_add(s, [at] { stream_run(at.stream, at.place); }); }
    return cudaSuccess;
}
static cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (e->stream) { stream_run(e->stream, e->place); }
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    e->time = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
    return cudaSuccess;
}
static cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = b->time - a->time;
    return cudaSuccess;
}

static void rows_copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows) {
    for (size_t i = 0; i < rows; i++) { memmove((char*)to + i * to_pitch, (char*)from + i * from_pitch, width); }
}
static cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
        size_t rows, int, cudaStream_t s) {
    stream_add(s, [=] { rows_copy(to, to_pitch, from, from_pitch, width, rows); });
    return cudaSuccess;
}
static cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
        size_t rows, int) {
    streams_run(false);
    rows_copy(to, to_pitch, from, from_pitch, width, rows);
    return cudaSuccess;
}
static cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, int kind, cudaStream_t s) {
    return cudaMemcpy2DAsync(to, n, from, n, n, 1, kind, s);
}
static cudaError_t cudaMemcpy(void* to, const void* from, size_t n, int kind) {
    return cudaMemcpy2D(to, n, from, n, n, 1, kind);
}
static cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int v, size_t width, size_t rows, cudaStream_t s) {
    stream_add(s, [=] { for (size_t i = 0; i < rows; i++) { memset((char*)to + i * pitch, v, width); } });
    return cudaSuccess;
}
static cudaError_t cudaMemsetAsync(void* to, int v, size_t n, cudaStream_t s) {
    return cudaMemset2DAsync(to, n, v, n, 1, s);
}
static cudaError_t cudaMemset(void* to, int v, size_t n) {
    streams_run(false);
    memset(to, v, n);
    return cudaSuccess;
}

// What is launched while a stream is captured is put aside, and added again by every launch of the graph.
static cudaError_t cudaStreamBeginCapture(cudaStream_t s, int) {
    stream_run(s, SIZE_MAX);
    s->captures = true;
    return cudaSuccess;
}
static cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
    if (!s->captures) { fail("a captured stream was waited for"); }
    *g = new std::deque<std::function<void()>>(std::move(s->later));
    s->later.clear(); s->captures = false;
    return cudaSuccess;
}
static cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, int) {
    *e = new std::deque<std::function<void()>>(*g);
    return cudaSuccess;
}
static cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) {
    for (auto& what : *e) { stream_add(s, what); }
    return cudaSuccess;
}
static cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
static cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { delete e; return cudaSuccess; }

template <typename P, typename A> static P argument(A a) { // NULL has passed as an integer
    if constexpr (std::is_pointer_v<P> && std::is_integral_v<A>) { return nullptr; } else { return a; }
}
template <typename... P, typename... A> static void emulated_launch(void (*kernel)(P...), dim3 grid, dim3 block,
        size_t shared, cudaStream_t stream, A... args) {
    std::tuple<std::decay_t<P>...> given(argument<std::decay_t<P>>(args)...);
    if (block.x * block.y * block.z > 1024 || !block.x || !grid.x || grid.y > 65535 || grid.z > 65535) {
        fail("launched with a grid or block that no card takes");
    }
    if (shared > sizeof(memory)) { fail("launched with too much shared memory"); }
    stream_add(stream, [=] {
        static unsigned count;
        std::function<void()> body = [&] { std::apply(kernel, given); };
        kernel_body = &body; gridDim = grid; blockDim = block;
        for (size_t i = 0; i < (size_t)grid.x * grid.y * grid.z; i++) {
            blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
            block_run(count++ & 1);
            if (!copies.empty()) { fail("nobody has waited for a copy"); }
        }
    });
}
enum { cudaLaunchAttributeProgrammaticStreamSerialization, cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename K> static cudaError_t cudaFuncSetAttribute(K, int, size_t) { return cudaSuccess; }
struct cudaLaunchAttribute { int id; struct { int programmaticStreamSerializationAllowed; } val; };
struct cudaLaunchConfig_t {
    dim3 grid, block; size_t shared; cudaStream_t stream; cudaLaunchAttribute* attributes; unsigned count;
};
template <typename... P, typename... A> static cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c,
        void (*kernel)(P...), A... args) {
    emulated_launch(kernel, c->grid, c->block, c->shared, c->stream, args...);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products: column-major, as cuBLASLt's

typedef int cublasStatus_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulPreferenceOpaque_t,
        cublasLtMatmulPreferenceAttributes_t;
typedef enum { CUDA_R_32F, CUDA_R_16BF } cudaDataType;
typedef enum { CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_EPILOGUE,
               CUBLASLT_MATMUL_DESC_BIAS_POINTER } cublasLtMatmulDescAttributes_t;
typedef enum { CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET }
        cublasLtMatrixLayoutAttribute_t;
enum { CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_COMPUTE_32F, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
       CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
       CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
       CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
       CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES };
struct ProductLayout { cudaDataType type; int64_t rows, columns, pitch, stride; int batch; };
struct ProductDesc { int ta, tb, epilogue; const void* bias; };
typedef ProductLayout cublasLtMatrixLayoutOpaque_t, *cublasLtMatrixLayout_t;
typedef ProductDesc cublasLtMatmulDescOpaque_t, *cublasLtMatmulDesc_t;
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; };

static const char* cublasLtGetStatusString(cublasStatus_t) { return ""; }
static size_t cublasLtGetVersion(void) { return 0; }
static int cublasLtCreate(cublasLtHandle_t*) { return 0; }
static int cublasLtDestroy(cublasLtHandle_t) { return 0; }
static int cublasLtMatmulDescInit(cublasLtMatmulDesc_t d, int, int) { *d = ProductDesc(); return 0; }
static int cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void* v,
        size_t n) {
    void* to[] = {&d->ta, &d->tb, &d->epilogue, &d->bias};
    memcpy(to[a], v, n);
    return 0;
}
static int cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t l, cudaDataType type, int64_t rows, int64_t columns,
        int64_t pitch) {
    if (pitch < rows) { fail("a matrix with a pitch below its height"); }
    *l = {type, rows, columns, pitch, 0, 1};
    return 0;
}
static int cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a, const void* v,
        size_t n) {
    memcpy(a == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT ? (void*)&l->batch : &l->stride, v, n);
    return 0;
}
static int cublasLtMatmulPreferenceInit(cublasLtMatmulPreferenceOpaque_t*) { return 0; }
static int cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreferenceOpaque_t*, int, const void*, size_t) {
    return 0;
}
static int cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
        cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreferenceOpaque_t*, int,
        cublasLtMatmulHeuristicResult_t*, int* count) {
    *count = 1;
    return 0;
}
static float product_get(const void* p, cudaDataType type, int64_t i) {
    return type == CUDA_R_32F ? ((const float*)p)[i] : __bfloat162float(((const __nv_bfloat16*)p)[i]);
}
// Row i of op(X), or column i of it if `columns`, as K floats.
static void product_line(float* to, const void* x, const ProductLayout& l, bool columns, int op, int64_t batch,
        int64_t i, int64_t K) {
    bool along = columns != (op == CUBLAS_OP_T); // a column as it is stored: neighbours
    for (int64_t k = 0; k < K; k++) {
        to[k] = product_get(x, l.type, batch * l.stride + (along ? i * l.pitch + k : k * l.pitch + i));
    }
}
static int cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const float* alpha, const void* a,
        cublasLtMatrixLayout_t la, const void* b, cublasLtMatrixLayout_t lb, const float* beta, const void* c,
        cublasLtMatrixLayout_t lc, void* d, cublasLtMatrixLayout_t ld, const cublasLtMatmulAlgo_t*, void*, size_t,
        cudaStream_t stream) {
    ProductDesc p = *desc;
    ProductLayout A = *la, B = *lb, C = *lc, D = *ld;
    float scale = *alpha, keep = *beta;
    stream_add(stream, [=] {
        int64_t M = D.rows, N = D.columns, K = p.ta == CUBLAS_OP_T ? A.rows : A.columns;
        float *rows = (float*)malloc((M + 1) * K * sizeof(float)), *column = rows + M * K;
        for (int64_t n = 0; n < D.batch; n++) {
            for (int64_t m = 0; m < M; m++) { product_line(rows + m * K, a, A, false, p.ta, n, m, K); }
            for (int64_t j = 0; j < N; j++) {
                product_line(column, b, B, true, p.tb, n, j, K);
                for (int64_t m = 0; m < M; m++) {
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t k = 0; k < K; k++) { sum += rows[m * K + k] * column[k]; }
                    sum *= scale;
                    if (p.epilogue == CUBLASLT_EPILOGUE_BIAS) { sum += product_get(p.bias, D.type, m); }
                    if (keep != 0) { sum += keep * product_get(c, C.type, n * C.stride + j * C.pitch + m); }
                    int64_t at = n * D.stride + j * D.pitch + m;
                    if (D.type == CUDA_R_32F) { ((float*)d)[at] = sum; }
                    else { ((__nv_bfloat16*)d)[at] = __float2bfloat16_rn(sum); }
                }
            }
        }
        free(rows);
    });
    return 0;
}

static int cudaProfilerStart(void) { return 0; }
static int cudaProfilerStop(void) { return 0; }

// ---------------------------------------------------------------------------------------------------------------------
// NCCL, by MPI

#ifdef USE_MPI
#define OMPI_SKIP_MPICXX
#define MPICH_SKIP_MPICXX
#include <mpi.h>
typedef MPI_Comm ncclComm_t;
typedef enum { ncclSuccess } ncclResult_t;
enum { ncclFloat, ncclUint8, NCCL_CTA_POLICY_ZERO, NCCL_WIN_COLL_SYMMETRIC };
struct ncclUniqueId { char bytes[128]; };
struct ncclConfig_t { int maxCTAs, CTAPolicy; };
typedef void* ncclWindow_t;
#define NCCL_CONFIG_INITIALIZER {0}
static const char* ncclGetErrorString(ncclResult_t) { return ""; }
static ncclResult_t ncclGetUniqueId(ncclUniqueId* id) { memset(id, 7, sizeof(*id)); return ncclSuccess; }
static ncclResult_t ncclCommInitRankConfig(ncclComm_t* c, int, ncclUniqueId id, int, ncclConfig_t*) {
    if (id.bytes[127] != 7) { fail("an id that rank 0 has not made"); }
    MPI_Comm_dup(MPI_COMM_WORLD, c);
    return ncclSuccess;
}
static ncclResult_t ncclCommSplit(ncclComm_t from, int color, int key, ncclComm_t* to, ncclConfig_t*) {
    MPI_Comm_split(from, color, key, to);
    return ncclSuccess;
}
static ncclResult_t ncclAllGather(const void* mine, void* all, size_t n, int type, ncclComm_t c, cudaStream_t s) {
    size_t bytes = n * (type == ncclFloat ? 4 : 1);
    stream_add(s, [=] {
        int rank;
        MPI_Comm_rank(c, &rank);
        bool in_place = mine == (char*)all + rank * bytes;
        MPI_Allgather(in_place ? MPI_IN_PLACE : mine, bytes, MPI_BYTE, all, bytes, MPI_BYTE, c);
    });
    return ncclSuccess;
}
static ncclResult_t ncclBroadcast(const void* from, void* to, size_t n, int, int root, ncclComm_t c, cudaStream_t s) {
    stream_add(s, [=] {
        if (from != to) { fail("a broadcast that is not in place"); }
        MPI_Bcast(to, n, MPI_BYTE, root, c);
    });
    return ncclSuccess;
}
static ncclResult_t ncclAlltoAll(const void* from, void* to, size_t n, int, ncclComm_t c, cudaStream_t s) {
    stream_add(s, [=] { MPI_Alltoall(from, n, MPI_FLOAT, to, n, MPI_FLOAT, c); });
    return ncclSuccess;
}
static ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
static ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }
static ncclResult_t ncclSend(const void* from, size_t n, int, int to, ncclComm_t c, cudaStream_t s) {
    stream_add(s, [=] { MPI_Send(from, n, MPI_FLOAT, to, 0, c); });
    return ncclSuccess;
}
static ncclResult_t ncclRecv(void* to, size_t n, int, int from, ncclComm_t c, cudaStream_t s) {
    stream_add(s, [=] { MPI_Recv(to, n, MPI_FLOAT, from, 0, c, MPI_STATUS_IGNORE); });
    return ncclSuccess;
}
static ncclResult_t ncclMemAlloc(void** p, size_t bytes) { cudaMalloc(p, bytes); return ncclSuccess; }
static ncclResult_t ncclMemFree(void* p) { cudaFree(p); return ncclSuccess; }
static std::set<ncclWindow_t> windows;
static ncclResult_t ncclCommWindowRegister(ncclComm_t, void* p, size_t, ncclWindow_t* window, int) {
    *window = p;
    windows.insert(p);
    return ncclSuccess;
}
static ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t window) {
    if (!windows.erase(window)) { fail("no such window"); }
    return ncclSuccess;
}
// While a rank waits for the others, its card goes on with what they may be waiting for.
#define MPI_Allgather(...) (streams_run(true), MPI_Allgather(__VA_ARGS__))
#define MPI_Bcast(...) (streams_run(true), MPI_Bcast(__VA_ARGS__))
#define MPI_Sendrecv(...) (streams_run(true), MPI_Sendrecv(__VA_ARGS__))
#define MPI_Finalize() (streams_run(true), MPI_Finalize())
#endif
