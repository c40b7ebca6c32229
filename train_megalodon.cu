/*
Megalodon (arXiv 2404.08801) on a GPU: train_megalodon.c again, layer by layer and under the same names, in CUDA.

    --precision bf16   weights and activations in bfloat16; master weights, Adam's moments, weight gradients, statistics
                       of norms, the coefficients and states of CEMA, softmax and loss in fp32 or better   (the default)
    --precision fp32   everything in fp32, no tf32: the CPU's numbers up to the order of sums

X stands for the type of weights and activations. What is not GPU work - options, tables, files, data, random numbers -
is train_megalodon.c's, included here without its main. Read that file first: it has the equations; here the comments
say how they are computed fast. Matrix products are cuBLASLt's; each kernel is above the function that launches it.

    make train_megalodon_cuda && ./train_megalodon_cuda

Conventions, where they differ from the CPU's:
  - A launcher's name and arguments are its CPU twin's, after the Gpu; but CEMA's parameters are one.
  - What attention reads and writes is head-major, (B,H,T,.): one product then covers many heads and chunks.
  - Tensors that are multiplied by one product stand side by side: wz|wr, fc1|fc3, and wh1|wh2 with their inputs m|u. So
    rows have a pitch, the distance from one timestep to the next.
  - Gradients of parameters are added up in fp32, or assigned where gpu.accumulate is off (the first micro-step of a
    step), so that nothing has to be zeroed.
  - No atomic adds: sums over timesteps are partial sums that a second kernel adds in a fixed order. With algorithms of
    cuBLASLt that depend on shapes alone, every run gives the same bits.
  - Kernels come in a wide form (8 neighbouring elements a thread, 16-byte accesses in bf16) where all dimensions are
    multiples of 8, and one that takes any size.
*/
#define ON_GPU_TOO __host__ __device__
#define GPU_OPTIONS(X) X(TEXT, precision, "bf16", 0, 0, "of weights and activations: bf16 or fp32")
#ifndef TESTING // test_megalodon.c and check.cu include this file without its main
#define TESTING
#define GPU_MAIN
#endif
#include "train_megalodon.c"
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <array>
#include <map>
#include <type_traits>
#include <utility>
#ifdef USE_NCCL
#include <nccl.h>
#endif

typedef __nv_bfloat16 bf16;

// ---------------------------------------------------------------------------------------------------------------------
// The device

static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
template <typename E> static void check_call(E e, const char* (*text)(E), const char* of, const char* what, int line) {
    if (e) { die("%s: %s (%s, train_megalodon.cu:%d)", of, text(e), what, line); }
}
#define CUDA(call) check_call(call, cudaGetErrorString, "CUDA", #call, __LINE__)
#define CUBLAS(call) check_call(call, cublasLtGetStatusString, "cuBLAS", #call, __LINE__)
#define LAUNCH(kernel, grid, block, ...) do { \
        auto chosen = kernel; \
        chosen<<<grid, block, 0, gpu.stream>>>(__VA_ARGS__); \
        check_call(cudaGetLastError(), cudaGetErrorString, "CUDA", #kernel, __LINE__); \
    } while (0)
// In its wide form or in the one that takes any size, see the conventions above; and with dropout or without.
#define LAUNCH_WIDE(kernel, is_wide, ...) LAUNCH((is_wide ? kernel<X, true> : kernel<X, false>), __VA_ARGS__)
#define LAUNCH_DROP(kernel, is_wide, site, ...) \
    LAUNCH(((site).drop ? is_wide ? kernel<X, true, true> : kernel<X, false, true> \
                        : is_wide ? kernel<X, true, false> : kernel<X, false, false>), __VA_ARGS__, site)
// A loop over a fixed number of registers.
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

struct GemmPlan { cublasLtMatmulDescOpaque_t desc; cublasLtMatrixLayoutOpaque_t l[4]; cublasLtMatmulAlgo_t algo; };
typedef std::map<std::array<int64_t, 20>, GemmPlan> GemmPlans; // by all that the choice of an algorithm depends on
enum { NUM_PLANS = 4096, WORKSPACE = 64 << 20 };
// Scratch memory: partial sums by block, which reduce_columns adds up; what segments of time hand on; coefficients of
// CEMA; scores of attention and their gradients; what ranks with slices of a sequence exchange, by copy engines or not.
enum { PARTIALS, CARRIES, COEFFICIENTS, SCORES, SLICES, SLICE_NORMS, NUM_SCRATCH };

struct Gpu {
    cudaStream_t stream;
    cublasLtHandle_t lt;
    cudaDeviceProp card;
    GemmPlans* plans;
    void* workspace;       // of cuBLASLt
    void* scratch[NUM_SCRATCH];
    size_t scratch_size[NUM_SCRATCH];
    bool accumulate;       // add to the gradients of parameters, or assign them
    size_t allocated;      // bytes
    bool dry;              // only count them
    bool reduce;           // the backward pass adds up gradients over the ranks as it goes
    cudaStream_t states, blocks; // of what ranks exchange: slices' states; gradients and weights
    cudaEvent_t event;
#ifdef USE_NCCL
    ncclComm_t group, world;
    std::map<void*, ncclWindow_t>* windows; // of exchange_alloc
#endif
};

static void gpu_open(Gpu* gpu) {
    int count = 0;
    memset(gpu, 0, sizeof(*gpu));
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count) {
        die("no GPU found (%s); ./train_megalodon runs on the CPU", cudaGetErrorString(cudaGetLastError()));
    }
    int device = count == 1 ? 0 : ranks_local();
    if (device >= count) { die("rank %d is number %d on its machine, which shows %d GPUs", ranks.rank, device, count); }
    CUDA(cudaSetDevice(device));
    CUDA(cudaGetDeviceProperties(&gpu->card, device));
    if (gpu->card.major < 8) {
        die("%s has compute capability %d.%d, at least 8.0 is needed", gpu->card.name, gpu->card.major,
            gpu->card.minor);
    }
    CUDA(cudaStreamCreate(&gpu->stream)); // plain copies and this stream wait for each other
    CUBLAS(cublasLtCreate(&gpu->lt));
    gpu->plans = new GemmPlans;
}

static void out_of_memory(const Gpu* gpu, size_t bytes) {
    size_t free = 0, total = 0;
    cudaGetLastError(); cudaMemGetInfo(&free, &total);
    die("out of GPU memory: %.1f MB asked for, %.1f MB of %.1f MB are free, this program holds %.1f MB", bytes / 1e6,
        free / 1e6, total / 1e6, gpu->allocated / 1e6);
}
static size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256 + 256; }
// Memory on the device, zeroed.
static void* gpu_alloc(Gpu* gpu, size_t bytes) {
    void* p = NULL;
    bytes = padded(bytes);
    if (!gpu->dry && cudaMalloc(&p, bytes) != cudaSuccess) { out_of_memory(gpu, bytes); }
    if (p) { CUDA(cudaMemsetAsync(p, 0, bytes, gpu->stream)); }
    gpu->allocated += bytes;
    return p;
}

static void gpu_sync(Gpu* gpu) { CUDA(cudaStreamSynchronize(gpu->stream)); }

static void gpu_close(Gpu* gpu) {
    delete gpu->plans;
    cublasLtDestroy(gpu->lt); cudaStreamDestroy(gpu->stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// Ranks, each with a GPU of its own: NCCL, started through MPI. Most exchanges run in streams of their own.

#ifdef USE_NCCL
static void check_nccl(ncclResult_t e, const char* what, int line) {
    if (e != ncclSuccess) { die("NCCL: %s (%s, train_megalodon.cu:%d)", ncclGetErrorString(e), what, line); }
}
#define NCCL(call) check_nccl(call, #call, __LINE__)
#else
#define NCCL(call)
#endif

// After ranks_group, and before a model is trained.
static void ranks_connect(Gpu* gpu) {
    if (ranks.count == 1) { return; }
#ifdef USE_NCCL
    char name[256] = ""; uint32_t machine = 2166136261u;
    gethostname(name, sizeof(name) - 1);
    for (const char* c = name; *c; c++) { machine = (machine ^ *c) * 16777619u; }
    double* cards = (double*)xcalloc(ranks.count, sizeof(double)); // NCCL may hang if two ranks use one
    int slot = (gpu->card.pciDomainID * 256 + gpu->card.pciBusID) * 32 + gpu->card.pciDeviceID;
    cards[ranks.rank] = slot * 4294967296.0 + machine;
    all_sum(cards, ranks.count);
    for (int r = 0; r < ranks.rank; r++) {
        if (cards[r] == cards[ranks.rank]) { die("ranks %d and %d are on the same GPU", r, ranks.rank); }
    }
    free(cards);
    ncclUniqueId id;
    double bytes[sizeof(id)];
    if (ranks.rank == 0) { NCCL(ncclGetUniqueId(&id)); }
    for (size_t i = 0; i < sizeof(id); i++) { bytes[i] = ranks.rank ? 0 : ((unsigned char*)&id)[i]; }
    all_sum(bytes, sizeof(id));
    for (size_t i = 0; i < sizeof(id); i++) { ((unsigned char*)&id)[i] = bytes[i]; }
    gpu->windows = new std::map<void*, ncclWindow_t>;
    // What runs beside matrix products takes no multiprocessor from them, or few where copy engines do not reach: 16
    // for gradients and weights, 2 for states.
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.CTAPolicy = NCCL_CTA_POLICY_ZERO; config.maxCTAs = 16;
    NCCL(ncclCommInitRankConfig(&gpu->world, ranks.count, id, ranks.rank, &config));
    config.maxCTAs = 2;
    NCCL(ncclCommSplit(gpu->world, ranks.group, ranks.chunk, &gpu->group, &config));
    int low, high;
    CUDA(cudaDeviceGetStreamPriorityRange(&low, &high));
    CUDA(cudaStreamCreateWithPriority(&gpu->states, cudaStreamNonBlocking, high));
    CUDA(cudaStreamCreateWithPriority(&gpu->blocks, cudaStreamNonBlocking, high));
    CUDA(cudaEventCreateWithFlags(&gpu->event, cudaEventDisableTiming));
#else
    die("%d processes, but built without NCCL (make says)", ranks.count);
#endif
}

// What follows in one stream begins when the other has come to where it is now.
static void stream_after(Gpu& gpu, cudaStream_t stream, cudaStream_t other) {
    CUDA(cudaEventRecord(gpu.event, other));
    CUDA(cudaStreamWaitEvent(stream, gpu.event, 0));
}

// Zeroed memory that all ranks take and register together: copy engines exchange what is in it, beside kernels.
// It is for states, within the group, or for gradients or weights, between all ranks.
static void* exchange_alloc(Gpu* gpu, size_t bytes, bool states) {
    void* p = NULL;
    if (ranks.count == 1 || gpu->dry) { return gpu_alloc(gpu, bytes); }
    bytes = padded(bytes);
#ifdef USE_NCCL
    if (ncclMemAlloc(&p, bytes) != ncclSuccess) { out_of_memory(gpu, bytes); }
#endif
    NCCL(ncclCommWindowRegister(states ? gpu->group : gpu->world, p, bytes, &(*gpu->windows)[p],
                                NCCL_WIN_COLL_SYMMETRIC));
    CUDA(cudaMemsetAsync(p, 0, bytes, gpu->stream));
    gpu->allocated += bytes;
    return p;
}
static void exchange_free(Gpu* gpu, void* p, bool states) {
    if (ranks.count == 1 || !p) { cudaFree(p); return; }
    NCCL(ncclCommWindowDeregister(states ? gpu->group : gpu->world, (*gpu->windows)[p]));
    NCCL(ncclMemFree(p));
}

// Scratch memory for at least n of E. Grows when a larger need comes up, which is in the first step.
template <typename E> static E* gpu_scratch(Gpu& gpu, int which, size_t n) {
    size_t bytes = ceil_div(n * sizeof(E), 256) * 256, *size = &gpu.scratch_size[which];
    if (bytes > *size) {
        gpu_sync(&gpu);
        if (which == SLICES) { exchange_free(&gpu, gpu.scratch[which], true); }
        else { CUDA(cudaFree(gpu.scratch[which])); }
        gpu.allocated -= *size ? *size + 256 : 0;
        *size = bytes;
        gpu.scratch[which] = which == SLICES ? exchange_alloc(&gpu, bytes, true) : gpu_alloc(&gpu, bytes);
    }
    return (E*)gpu.scratch[which];
}

// all = the `bytes` bytes of each rank of the group, in their order.
static void slices_gather(Gpu& gpu, void* all, const void* mine, size_t bytes) {
    NCCL(ncclAllGather(mine, all, bytes, ncclUint8, gpu.group, gpu.stream));
}
// What work launches runs beside all that follows, until slices_wait.
template <typename F> static void slices_beside(Gpu& gpu, F work) {
    stream_after(gpu, gpu.states, gpu.stream);
    std::swap(gpu.stream, gpu.states);
    work();
    std::swap(gpu.stream, gpu.states);
}
static void slices_wait(Gpu& gpu) { stream_after(gpu, gpu.stream, gpu.states); }

template <typename... N> static bool wide(N... dims) { // may the wide form of a kernel be used?
    bool all = true;
    for (size_t d : {(size_t)dims...}) { all = all && d % 8 == 0; }
    return all;
}

// ---------------------------------------------------------------------------------------------------------------------
// What kernels share

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <typename X> __device__ inline X from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
__device__ inline uint32_t pack(float a, float b) {
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *(uint32_t*)&v;
}

// E neighbours, 8, 4 or one, as they are in memory.
template <typename X, int E> struct Piece {
    typedef std::conditional_t<E == 1, X, std::conditional_t<E * sizeof(X) == 8, uint2, uint4>> Part;
    enum { PARTS = E * sizeof(X) / sizeof(Part) };
    Part part[PARTS];
    __device__ void clear() { EACH(i, PARTS) { part[i] = Part(); } }
    __device__ void load(const X* p) { EACH(i, PARTS) { part[i] = ((const Part*)p)[i]; } }
    __device__ void get(float* v) const {
        const uint32_t* w = (const uint32_t*)part; // bf16 is the upper half of a float
        if constexpr (sizeof(X) == 4) { memcpy(v, part, sizeof(part)); }
        else if constexpr (E == 1) { v[0] = to_float(part[0]); }
        else {
            EACH(i, E / 2) {
                v[2 * i] = __uint_as_float(w[i] << 16);
                v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
            }
        }
    }
    __device__ void set(const float* v) {
        if constexpr (sizeof(X) == 4) { memcpy(part, v, sizeof(part)); }
        else if constexpr (E == 1) { part[0] = from_float<X>(v[0]); }
        else { EACH(i, E / 2) { ((uint32_t*)part)[i] = pack(v[2 * i], v[2 * i + 1]); } }
    }
};
template <int E, typename X> __device__ inline void load(float (&v)[E], const X* p) {
    Piece<X, E> piece;
    piece.load(p); piece.get(v);
}
template <int E, typename X> __device__ inline void store(X* p, const float (&v)[E]) {
    Piece<X, E> piece;
    piece.set(v);
    EACH(i, piece.PARTS) { ((typename Piece<X, E>::Part*)p)[i] = piece.part[i]; }
}

// Over the threads of a warp, or each LANES neighbours of them (0: `lanes`).
template <int LANES = 32> __device__ inline float warp_sum(float v, int lanes = LANES) {
#pragma unroll
    for (int o = (LANES ? LANES : lanes) / 2; o; o /= 2) { v += __shfl_xor_sync(~0u, v, o); }
    return v;
}
__device__ inline float warp_max(float v) {
    EACH(i, 5) { v = fmaxf(v, __shfl_xor_sync(~0u, v, 16 >> i)); }
    return v;
}

// Row kernels: threads x of a block own 8 columns each, neighbours or (not WIDE) pairs of neighbours, while threads y
// and blocks walk over the rows: sums over columns go through row_sum, sums over rows stay in registers.
enum { MAX_ROW = 8192 };
__device__ inline unsigned row_first() { return blockIdx.x * blockDim.y + threadIdx.y; }
__device__ inline unsigned row_step() { return gridDim.x * blockDim.y; }
template <typename F> __device__ inline unsigned row_first(F fetch) { // for kernels that fetch the next row ahead
    fetch(row_first());
    return row_first();
}
template <bool WIDE> __device__ inline int column(int e) {
    return WIDE ? 8 * threadIdx.x + e : 2 * ((e / 2) * blockDim.x + threadIdx.x) + (e & 1);
}
// A thread's part of a row as it is in memory; zeros past the last column. Kernels load the next row ahead.
template <typename X, bool WIDE> struct RowPiece : Piece<X, 8> {
    __device__ void load(const X* row, int columns) {
        this->clear();
        if (8 * threadIdx.x < columns) { Piece<X, 8>::load(row + 8 * threadIdx.x); }
    }
};
template <typename X> struct RowPiece<X, false> {
    X x[8];
    __device__ void load(const X* row, int columns) {
        EACH(e, 8) { x[e] = column<false>(e) < columns ? row[column<false>(e)] : from_float<X>(0); }
    }
    __device__ void get(float* v) const { EACH(e, 8) { v[e] = to_float(x[e]); } }
};
template <bool WIDE, typename X> __device__ inline void load_row(float (&v)[8], const X* row, int columns) {
    RowPiece<X, WIDE> piece;
    piece.load(row, columns); piece.get(v);
}
template <bool WIDE, typename X> __device__ inline void store_row(X* row, const float (&v)[8], int columns) {
    if (WIDE) {
        if (8 * threadIdx.x < columns) { store(row + 8 * threadIdx.x, v); }
    } else {
        EACH(e, 8) { if (column<WIDE>(e) < columns) { row[column<WIDE>(e)] = from_float<X>(v[e]); } }
    }
}

// Which of E (1, or 8 and i % 4 = 0) neighbours from i on dropout keeps: as bits. bits: of the row, see dropout_bits.
template <int E> __device__ inline unsigned dropout_kept(const Dropout& d, uint64_t bits, int i) {
    unsigned kept = 0;
    EACH(k, (E + 3) / 4) {
        uint64_t four = mix_bits(bits + i / 4 + k) >> (E == 1 ? i % 4 * 16 : 0);
        EACH(e, E == 1 ? 1 : 4) { kept |= (unsigned)((four >> 16 * e & 0xffff) >= d.drop) << (4 * k + e); }
    }
    return kept;
}
// The same of a thread's part of row r, whose first column is number `first`; drop then drops the others.
template <bool WIDE, bool DROP> __device__ inline unsigned dropout_kept_row(const Dropout& d, unsigned r,
        int first = 0) {
    unsigned kept = 0;
    if (!DROP) { return 0; }
    uint64_t bits = dropout_bits(d, r / d.T, r % d.T, 0);
    if (WIDE) { return dropout_kept<8>(d, bits, first + 8 * threadIdx.x); }
    EACH(e, 8) { kept |= dropout_kept<1>(d, bits, first + column<WIDE>(e)) << e; }
    return kept;
}
template <bool DROP, int E> __device__ inline void drop(float (&v)[E], unsigned kept, const Dropout& d) {
    if (DROP) { EACH(e, E) { v[e] = kept >> e & 1 ? v[e] * d.scale : d.dropped; } }
}

// Sums each of N numbers over the threads of a row; all of them get the results. Calls take turns with two buffers,
// told apart by `turn`, so one barrier a call is enough: nobody writes a buffer before all have passed the next one.
template <int N> __device__ inline void row_sum(float (&v)[N], int& turn) {
    __shared__ float sums[2][32][N];
    EACH(i, N) { v[i] = warp_sum(v[i]); }
    if (blockDim.x == 32) { return; }
    int warps = blockDim.x / 32, first = threadIdx.y * warps, warp = first + threadIdx.x / 32;
    EACH(i, N) { if (threadIdx.x % 32 == 0) { sums[turn][warp][i] = v[i]; } }
    __syncthreads();
    int lanes = 2 << (31 - __clz(warps - 1)), lane = threadIdx.x % lanes; // the next power of two
    EACH(i, N) { v[i] = warp_sum<0>(lane < warps ? sums[turn][first + lane][i] : 0, lanes); }
    turn ^= 1;
}

// Geometry of a row kernel, and memory for its partial sums: a row of them for each block, of `sums` columns.
struct RowGrid { dim3 grid, block; int parts; float* partials; };
static RowGrid row_grid(Gpu& gpu, size_t rows, int columns, int heads, int per_sm, size_t sums = 0) {
    if (columns > MAX_ROW) { die("the GPU program takes rows of at most %d features, not %d", MAX_ROW, columns); }
    int x = ceil_div(ceil_div(columns, 8), 32) * 32, y = x < 256 ? 256 / x : 1;
    size_t blocks = (size_t)gpu.card.multiProcessorCount * (x > 512 ? 2 : per_sm);
    blocks = min_size(ceil_div(blocks, heads), ceil_div(rows, y));
    float* partials = sums ? gpu_scratch<float>(gpu, PARTIALS, blocks * sums) : NULL;
    return {dim3(blocks, heads), dim3(x, y), (int)blocks, partials};
}

// Where sums over rows go: up to 5 gradients of `width` columns each, side by side in the partial sums.
struct Sums { float* to[5]; int count, width; };
__global__ void reduce_columns_kernel(Sums sums, const float* partials, int parts, bool accumulate) {
    __shared__ float lines[32][33];
    size_t columns = (size_t)sums.count * sums.width, c = (size_t)blockIdx.x * 32 + threadIdx.x;
    float s = 0;
    for (int p = threadIdx.y; c < columns && p < parts; p += 32) { s += partials[p * columns + c]; }
    lines[threadIdx.y][threadIdx.x] = s;
    __syncthreads();
    s = lines[threadIdx.x][threadIdx.y]; // transposed, so that a warp adds the 32 sums of one column
    s = warp_sum(s); c = (size_t)blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x == 0 && c < columns) {
        float* to = NULL;
        EACH(i, 5) { if (c / sums.width == i) { to = sums.to[i]; } } // not by an index: they stay in registers
        if (to) { to[c % sums.width] = (accumulate ? to[c % sums.width] : 0.0f) + s; }
    }
}
// Adds up `parts` rows of the partial sums into gradients.
static void reduce_columns(Gpu& gpu, int parts, Sums sums) {
    size_t columns = (size_t)sums.count * sums.width;
    LAUNCH(reduce_columns_kernel, ceil_div(columns, 32), dim3(32, 32), sums, (float*)gpu.scratch[PARTIALS], parts,
           gpu.accumulate);
}
// Adds v over the threads y of the block and writes it as row number i (of count) of the block's partial sums; columns
// of this head start at `first`. All threads of the block take part.
template <bool WIDE> __device__ inline void store_partial(float* partials, int count, int width, int i,
        const float (&v)[8], int columns, int first = 0) {
    __shared__ float lines[8][256];
    float sum[8];
    EACH(e, 8) {
        sum[e] = v[e];
        if (threadIdx.y) { lines[e][threadIdx.y * blockDim.x + threadIdx.x] = v[e]; }
    }
    __syncthreads();
    for (int y = 1; threadIdx.y == 0 && y < blockDim.y; y++) {
        EACH(e, 8) { sum[e] += lines[e][y * blockDim.x + threadIdx.x]; }
    }
    __syncthreads();
    if (threadIdx.y) { return; }
    store_row<WIDE>(partials + ((size_t)blockIdx.x * count + i) * width + first, sum, columns);
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

static uint32_t alignment(const void* p) { return p ? min_size(256, (size_t)p & -(size_t)p) : 256; }

// D (M,N) = A (M,K) B (K,N), plus C if given, plus bias (N) on every row if given: row-major with the row pitches ld*.
// ta: A is stored as (K,M), tb: B as (N,K). A batch repeats this with steps stride_*. Sums are in fp32 (for fp32
// operands in full fp32). The algorithm is the first one that cuBLASLt's heuristics name without a split sum in no
// fixed order: a function of shape, card and library version.
template <typename X, typename Y> static void gemm(Gpu& gpu, Y* d, int64_t ldd, const X* a, int64_t lda, bool ta,
        const X* b, int64_t ldb, bool tb, int64_t M, int64_t N, int64_t K, int batch = 1, int64_t stride_a = 0,
        int64_t stride_b = 0, int64_t stride_d = 0, const Y* c = NULL, int64_t ldc = 0, const X* bias = NULL) {
    cudaDataType type = std::is_same<X, float>::value ? CUDA_R_32F : CUDA_R_16BF;
    cudaDataType type_out = std::is_same<Y, float>::value ? CUDA_R_32F : CUDA_R_16BF;
    const uint32_t align[4] = {alignment(b), alignment(a), alignment(c ? c : d), alignment(d)};
    if (gpu.plans->size() == NUM_PLANS) { gpu.plans->clear(); }
    auto [at, is_new] = gpu.plans->try_emplace({M, N, K, lda, ldb, c ? ldc : 0, ldd, stride_a, stride_b, stride_d, ta,
            tb, type, type_out, batch, bias != NULL, align[0], align[1], align[2], align[3]});
    auto& [desc, l, algo] = at->second;
    auto describe = [desc = &desc](cublasLtMatmulDescAttributes_t name, const auto& value) {
        CUBLAS(cublasLtMatmulDescSetAttribute(desc, name, &value, sizeof(value)));
    };
    if (is_new) { // cuBLASLt is column-major: a row-major (M,N) is its (N,M), so it computes D^T = B^T A^T
        if (!gpu.workspace) { gpu.workspace = gpu_alloc(&gpu, WORKSPACE); }
        CUBLAS(cublasLtMatmulDescInit(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        describe(CUBLASLT_MATMUL_DESC_TRANSA, tb ? CUBLAS_OP_T : CUBLAS_OP_N);
        describe(CUBLASLT_MATMUL_DESC_TRANSB, ta ? CUBLAS_OP_T : CUBLAS_OP_N);
        if (bias) {
            describe(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
            describe(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
        }
        const struct { cudaDataType type; int64_t rows, columns, pitch, stride; } of[4] = {
            {type, tb ? K : N, tb ? N : K, ldb, stride_b}, {type, ta ? M : K, ta ? K : M, lda, stride_a},
            {type_out, N, M, c ? ldc : ldd, stride_d}, {type_out, N, M, ldd, stride_d}};
        for (int i = 0; i < 4; i++) {
            CUBLAS(cublasLtMatrixLayoutInit(&l[i], of[i].type, of[i].rows, of[i].columns, of[i].pitch));
            if (batch == 1) { continue; }
            CUBLAS(cublasLtMatrixLayoutSetAttribute(&l[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof(batch)));
            CUBLAS(cublasLtMatrixLayoutSetAttribute(&l[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &of[i].stride,
                                                    sizeof(of[i].stride)));
        }
        cublasLtMatmulPreferenceOpaque_t wish; cublasLtMatmulHeuristicResult_t found;
        int count = 0;
        CUBLAS(cublasLtMatmulPreferenceInit(&wish));
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
            CUBLAS(cublasLtMatmulPreferenceSetAttribute(&wish, name, &value, sizeof(value)));
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (size_t)WORKSPACE);
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
               (uint32_t)(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, align[0]);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, align[1]);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, align[2]);
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, align[3]);
        CUBLAS(cublasLtMatmulAlgoGetHeuristic(gpu.lt, &desc, &l[0], &l[1], &l[2], &l[3], &wish, 1, &found, &count));
        if (!count) { die("cuBLASLt has no algorithm for a product of %ld x %ld x %ld", (long)M, (long)N, (long)K); }
        algo = found.algo;
    }
    float alpha = 1, beta = c ? 1 : 0;
    if (bias) { describe(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias); }
    CUBLAS(cublasLtMatmul(gpu.lt, &desc, &alpha, b, &l[0], a, &l[1], &beta, c ? c : d, &l[2], d, &l[3], &algo,
                          gpu.workspace, WORKSPACE, gpu.stream));
}

// out (rows,O) = inp (rows,I) weight (O,I)^T + bias (O) + add (rows,O); bias and add may be NULL, add may be out.
template <typename X> static void matmul_forward(Gpu& gpu, X* out, int ldo, const X* inp, int ldi, const X* weight,
        const X* bias, const X* add, int lda, size_t rows, int I, int O) {
    gemm<X, X>(gpu, out, ldo, inp, ldi, false, weight, I, true, rows, O, I, 1, 0, 0, 0, add, lda, bias);
}

// dinp (rows,I) = dout (rows,O) weight (O,I), added to what dinp holds if accumulate.
template <typename X> static void matmul_backward(Gpu& gpu, X* dinp, int ldi, const X* dout, int ldo, const X* weight,
        size_t rows, int I, int O, bool accumulate) {
    gemm<X, X>(gpu, dinp, ldi, dout, ldo, false, weight, I, false, rows, I, O, 1, 0, 0, 0,
               accumulate ? dinp : NULL, ldi);
}

// dweight (O,I) = dout^T inp in fp32, added to it if gpu.accumulate. Kernels that make dout sum up the bias's gradient.
template <typename X> static void matmul_backward_weight(Gpu& gpu, float* dweight, const X* dout, int ldo,
        const X* inp, int ldi, size_t rows, int I, int O) {
    gemm<X, float>(gpu, dweight, I, dout, ldo, true, inp, ldi, false, O, I, rows, 1, 0, 0, 0,
                   gpu.accumulate ? dweight : NULL, I);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers

// Where a launcher takes a Dropout, its output is what dropout leaves; without it, all.
static const Dropout no_dropout = {0, 0, 1, 0, 0, 1, 0};

// out (rows,D) = scale * weight (vocab,D)[tokens]
template <typename X, bool WIDE, bool DROP> __global__ void embedding_forward_kernel(X* out, const int* tokens,
        const X* weight, float scale, size_t rows, int D, Dropout d) {
    for (size_t r = row_first(); r < rows; r += row_step()) {
        float v[8];
        load_row<WIDE>(v, weight + (size_t)tokens[r] * D, D);
        EACH(e, 8) { v[e] *= scale; }
        drop<DROP>(v, dropout_kept_row<WIDE, DROP>(d, r), d);
        store_row<WIDE>(out + r * D, v, D);
    }
}
template <typename X> static void embedding_forward(Gpu& gpu, X* out, const int* tokens, const X* weight, float scale,
        size_t rows, int D, Dropout drop) {
    RowGrid r = row_grid(gpu, rows, D, 1, 4);
    LAUNCH_DROP(embedding_forward_kernel, wide(D), drop, r.grid, r.block, out, tokens, weight, scale, rows, D);
}

// Rows of dout that hold the same token are added by one block, in the order of their positions. order (rows):
// positions sorted by token; begin (runs+1): where each distinct token's run starts in it.
template <typename X, bool WIDE, bool DROP> __global__ void embedding_backward_kernel(float* dweight, const X* dout,
        const int* tokens, const int* order, const int* begin, float scale, int D, Dropout d) {
    int first = begin[blockIdx.x], last = begin[blockIdx.x + 1];
    float sum[8] = {0}, v[4][8];
    float* to = dweight + (size_t)tokens[order[first]] * D;
    for (int i = first; i < last; i += 4) {
        EACH(k, 4) { load_row<WIDE>(v[k], dout + (size_t)order[min(i + k, last - 1)] * D, i + k < last ? D : 0); }
        EACH(k, 4) {
            drop<DROP>(v[k], dropout_kept_row<WIDE, DROP>(d, order[min(i + k, last - 1)]), d);
            EACH(e, 8) { sum[e] += v[k][e]; }
        }
    }
    load_row<WIDE>(v[0], to, D);
    EACH(e, 8) { v[0][e] += scale * sum[e]; }
    store_row<WIDE>(to, v[0], D);
}
// Adds to dweight always: there may be the output layer's gradient already.
template <typename X> static void embedding_backward(Gpu& gpu, float* dweight, const X* dout, const int* tokens,
        const int* order, const int* begin, int runs, float scale, int D, Dropout drop) {
    dim3 block = row_grid(gpu, runs, D, 1, 4).block.x;
    LAUNCH_DROP(embedding_backward_kernel, wide(D), drop, runs, block, dweight, dout, tokens, order, begin, scale, D);
}

// out (rows,D) = dropout(inp) + add, what else a product adds; add may be NULL. sum: column sums of out, or NULL.
template <typename X, bool WIDE> __global__ void dropout_kernel(X* out, float* partials, const X* inp, const X* add,
        size_t rows, int D, Dropout d) {
    float sum[8] = {0}, x[8], y[8] = {0};
    for (size_t r = row_first(); r < rows; r += row_step()) {
        load_row<WIDE>(x, inp + r * D, D);
        if (add) { load_row<WIDE>(y, add + r * D, D); }
        drop<true>(x, dropout_kept_row<WIDE, true>(d, r), d);
        EACH(e, 8) { x[e] += y[e]; sum[e] += x[e]; }
        store_row<WIDE>(out + r * D, x, D);
    }
    if (partials) { store_partial<WIDE>(partials, 1, D, 0, sum, D); }
}
// Returns out, or with rate 0 does nothing and returns inp.
template <typename X> static const X* dropout(Gpu& gpu, X* out, float* sum, const X* inp, const X* add, Dropout drop,
        size_t rows, int D) {
    if (!drop.drop) { return inp; }
    RowGrid r = row_grid(gpu, rows, D, 1, 4, sum ? D : 0);
    LAUNCH_WIDE(dropout_kernel, wide(D), r.grid, r.block, out, r.partials, inp, add, rows, D, drop);
    if (sum) { reduce_columns(gpu, r.parts, {{sum}, 1, D}); }
    return out;
}

// Timestep norm as a scan over time, see timestepnorm_forward of the CPU. Segments of 32 timesteps are reduced to their
// statistics (first pass over the input), a warp per group scans those, and a second pass scans inside the segments and
// writes the output: input twice, output once. A block has one segment and as many groups as its warps are wide: a warp
// has 4 timesteps, and in it `lanes` threads have the F = D/G features of a group, 8 or 1 neighbours (VEC) each. For
// the usual groups of 32 and 64 features (LANES = 4 and 8) a thread keeps its features in registers; for all others
// (LANES = 0) it reads them as often as they are needed.
enum { STEPS = 4, WARPS = 8, SEGMENT = STEPS * WARPS };

// Where a thread of the timestep norm's kernels stands. The second pass goes backwards: what was read last is cached.
struct NormPlace {
    // g0: the block's first group; steps: of this warp, up to STEPS
    int warp, sub, team, g0, g, segment, steps, F, width;
    size_t row, t0, at, line;                         // at: first element; line: index of (row, g, segment)
    float share;                                      // 1/F
    bool active;
    __device__ NormPlace(int T, int D, int G, int lanes, int VEC, bool back) {
        int lane = threadIdx.x % 32, teams = 32 / lanes, tiles = (G + teams - 1) / teams,
                count = (T + SEGMENT - 1) / SEGMENT;
        size_t block = back ? gridDim.x - 1 - blockIdx.x : blockIdx.x, b = block / tiles;
        warp = threadIdx.x / 32; sub = lane % lanes * VEC; team = lane / lanes;
        g0 = block % tiles * teams; g = g0 + team; segment = b % count; row = b / count;
        t0 = (size_t)segment * SEGMENT + warp * STEPS;
        steps = t0 < T ? (int)(T - t0 < STEPS ? T - t0 : STEPS) : 0; active = g < G;
        if (!active) { g = G - 1; steps = 0; }
        F = D / G; share = 1.0f / F; width = lanes * VEC; at = (row * T + t0) * D + (size_t)g * F;
        line = (row * G + g) * count + segment;
    }
};

// Statistics of n timesteps and of k more become those of n + k (Chan). The same for floats inside a segment.
__device__ inline float quotient(float a, float b) { return __fdividef(a, b); } // to 2 units in the last place
__device__ inline double quotient(double a, double b) { return a / b; }
template <typename R> __device__ inline void merge(R& n, R& mean, R& var, R k, R m, R v) {
    if (k == 0) { return; }
    R w = quotient(k, n + k), d = m - mean;
    n += k; mean += d * w; var += (v - var) * w + d * d * w * (1 - w);
}

// segments (B,G,segments) holds (count, mean, var): without APPLY of each segment, written; with it, of all before.
template <typename X, int VEC, int LANES, bool APPLY>
        __global__ void __launch_bounds__(32 * WARPS) timestepnorm_forward_kernel(X* out, float* mean, float* rstd,
        float4* segments, const X* inp, const float* w, const float* b, int T, int D, int G, int lanes, float eps) {
    __shared__ float3 totals[WARPS][32];
    NormPlace p(T, D, G, lanes, VEC, APPLY); Piece<X, VEC> kept[STEPS];
    float m[STEPS], v[STEPS], a[VEC], n = 0, run_mean = 0, run_var = 0;
    if (LANES) {
        EACH(i, STEPS) {
            kept[i].clear();
            if (i < p.steps && p.sub < p.F) { kept[i].load(inp + p.at + (size_t)i * D + p.sub); }
        }
    }
    auto get = [&](int i, int f) { // features f.. of timestep i
        if (LANES) { kept[i].get(a); return; }
        Piece<X, VEC> piece;
        piece.clear();
        if (i < p.steps) { piece.load(inp + p.at + (size_t)i * D + f); }
        piece.get(a);
    };
    EACH(i, STEPS) { // mean and variance of each timestep alone
        float s = 0;
        for (int f = p.sub; f < p.F; f += p.width) {
            get(i, f);
            EACH(e, VEC) { s += a[e]; }
            if (LANES) { break; }
        }
        m[i] = warp_sum<LANES>(s, lanes) * p.share;
        s = 0;
        for (int f = p.sub; f < p.F; f += p.width) {
            get(i, f);
            EACH(e, VEC) { s += (a[e] - m[i]) * (a[e] - m[i]); }
            if (LANES) { break; }
        }
        v[i] = warp_sum<LANES>(s, lanes) * p.share;
    }
    EACH(i, STEPS) { // of the warp's timesteps up to i
        if (i < p.steps) { // merge(), with weights known when compiling
            const float w = 1.0f / (i + 1), d = m[i] - run_mean;
            n = i + 1;
            run_mean += d * w; run_var += (v[i] - run_var) * w + d * d * (w * (1 - w));
        }
        m[i] = run_mean; v[i] = run_var;
    }
    if (p.sub == 0) { totals[p.warp][p.team] = make_float3(n, run_mean, run_var); }
    __syncthreads();
    float4 past = make_float4(0, 0, 0, 0);
    if (APPLY) { past = segments[p.line]; }
    for (int k = 0; k < (APPLY ? p.warp : WARPS); k++) {
        float3 s = totals[k][p.team];
        merge(past.x, past.y, past.z, s.x, s.y, s.z);
    }
    if (!APPLY) {
        if (p.warp == 0 && p.sub == 0 && p.active) { segments[p.line] = past; }
        return;
    }
    float scale[VEC], shift[VEC];
    auto get_weights = [&](int f) {
        EACH(e, VEC) { scale[e] = w[p.g * p.F + f + e] + 1; shift[e] = b[p.g * p.F + f + e]; }
    };
    if (LANES && p.sub < p.F) { get_weights(p.sub); }
    EACH(i, STEPS) {
        if (i >= p.steps) { break; }
        float count = past.x, mu = past.y, var = past.z;
        merge(count, mu, var, i + 1.0f, m[i], v[i]);
        float r = rsqrtf(var + eps);
        for (int f = p.sub; f < p.F; f += p.width) {
            get(i, f);
            if (!LANES) { get_weights(f); }
            EACH(e, VEC) { a[e] = (a[e] - mu) * r * scale[e] + shift[e]; }
            store(out + p.at + (size_t)i * D + f, a);
            if (LANES) { break; }
        }
        if (p.sub == 0) { size_t k = (p.row * T + p.t0 + i) * G + p.g; mean[k] = mu; rstd[k] = r; }
    }
}

// A segment's statistics, or in the backward pass sums, in double: those of `more`, next in the scan, are added.
__device__ inline void add(NormState& s, const NormState& more) {
    merge(s.count, s.mean, s.var, more.count, more.mean, more.var);
}
__device__ inline void add(NormSums& s, const NormSums& more) {
    s.U += more.U + 2 * (s.c - more.c) * more.V; s.V += more.V;
}
template <typename S> __device__ inline S shuffle_up(S s, int n) {
    EACH(i, 3) { ((double*)&s)[i] = __shfl_up_sync(~0u, ((double*)&s)[i], n); }
    return s;
}
// Statistics of segments become those of everything before each; sums, those of everything after each. A warp has one
// (row, group); its threads take neighbouring runs of segments, scan them by shuffles, and then walk through them.
// Next to them are start and the slices before this one (after it) in all, which before receives. end: with all
// segments. dstart (B,G): the gradient of start. alone: only end is wanted, of these segments alone.
template <typename S> __global__ void timestepnorm_scan_kernel(float4* segments, S* end, S* before, NormState* dstart,
        const NormState* start, const S* all, int chunk, int chunks, bool alone, int count, size_t lines) {
    constexpr bool back = std::is_same<S, NormSums>::value;
    size_t line = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32, each = (count + 31) / 32, first = lane * each, last = min(first + each, count);
    if (line >= lines) { return; }
    auto segment = [&](int i) { return segments + line * count + (back ? count - 1 - i : i); };
    auto walk = [&](auto visit) { // this lane's segments; four are read at a time
        for (int i = first; i < last; i += 4) {
            float4 own[4];
            EACH(k, 4) { if (i + k < last) { own[k] = *segment(i + k); } }
            EACH(k, 4) { if (i + k < last) { visit(segment(i + k), S{own[k].x, own[k].y, own[k].z}); } }
        }
    };
    S sum = {0, 0, back ? segment(0)->z : 0}, past = sum;
    if constexpr (!back) { if (start && !alone) { past = start[line]; } }
    int from = back ? chunk + 1 : 0, to = !all || alone ? 0 : back ? chunks : chunk;
    for (int r = from; r < to; r++) { add(past, all[r * lines + line]); }
    if (lane == 0) { sum = past; }
    walk([&](float4*, S own) { add(sum, own); });
    for (int o = 1; o < 32; o *= 2) {
        S other = shuffle_up(sum, o);
        if (lane >= o) { add(other, sum); sum = other; }
    }
    S now = shuffle_up(sum, 1);
    __syncwarp(); // all have read start before end, which may be the same, is written
    if (lane == 31 && end) { end[line] = sum; }
    if (alone) { return; }
    if (lane == 0) { now = past; }
    if (lane == 0 && before) { before[line] = past; }
    if constexpr (back) {
        if (lane == 31 && dstart && start) {
            double n0 = start[line].count;
            dstart[line].mean += n0 * (sum.U + 2 * (start[line].mean - sum.c) * sum.V); dstart[line].var += n0 * sum.V;
        }
    }
    walk([&](float4* at, S own) {
        auto [a, b, c] = now;
        *at = make_float4(a, b, c, 0);
        add(now, own);
    });
}
// Where ranks hold slices (sliced), they first tell each other those of their own: in the backward pass beside what
// meanwhile launches. In the forward pass there is nothing such, and NCCL's kernel in this stream, from memory that is
// not for copy engines, is the fastest.
template <typename S, typename F> static void timestepnorm_scan(Gpu& gpu, float4* segments, S* end, S* before,
        NormState* dstart, const NormState* start, bool sliced, int count, size_t lines, F meanwhile) {
    bool back = !std::is_same<S, NormState>::value;
    S* all = sliced ? gpu_scratch<S>(gpu, back ? SLICES : SLICE_NORMS, lines * (ranks.chunks + 1)) : NULL;
    auto scan = [&](S* end, bool alone) {
        LAUNCH(timestepnorm_scan_kernel<S>, ceil_div(lines, 4), 128, segments, end, before, dstart, start, all,
               ranks.chunk, ranks.chunks, alone, count, lines);
    };
    auto exchange = [&] {
        S* mine = all + lines * ranks.chunks;
        scan(mine, true);
        slices_gather(gpu, all, mine, sizeof(S) * lines);
    };
    if (sliced && back) { slices_beside(gpu, exchange); } else if (sliced) { exchange(); }
    meanwhile();
    if (sliced && back) { slices_wait(gpu); }
    scan(end, false);
}

// Geometry of the timestep norm's kernels: threads of a group, blocks, segments of time.
struct NormGrid { int lanes, fixed, count; bool wide; size_t blocks; }; // fixed: LANES
static NormGrid norm_grid(int B, int T, int D, int G) {
    NormGrid r; int F = D / G;
    r.wide = wide(F); r.lanes = 1;
    while (r.lanes < 32 && r.lanes * (r.wide ? 8 : 1) < F) { r.lanes *= 2; }
    r.fixed = r.wide && r.lanes * 8 >= F && (r.lanes == 4 || r.lanes == 8) ? r.lanes : 0;
    r.count = ceil_div(T, SEGMENT); r.blocks = (size_t)B * r.count * ceil_div(G, 32 / r.lanes);
    return r;
}
#define NORM_KERNEL(kernel, APPLY) (r.fixed == 4 ? kernel<X, 8, 4, APPLY> : r.fixed == 8 ? kernel<X, 8, 8, APPLY> \
                                    : r.wide ? kernel<X, 8, 0, APPLY> : kernel<X, 1, 0, APPLY>)

template <typename X> static void timestepnorm_forward(Gpu& gpu, X* out, float* mean, float* rstd, NormState* end,
        NormState* before, const NormState* start, const X* inp, const float* w, const float* b, int B, int T, int D,
        int G, float eps) {
    NormGrid r = norm_grid(B, T, D, G);
    float4* segments = gpu_scratch<float4>(gpu, CARRIES, (size_t)B * G * r.count);
    auto pass = [&](auto kernel) {
        LAUNCH(kernel, r.blocks, 32 * WARPS, out, mean, rstd, segments, inp, w, b, T, D, G, r.lanes, eps);
    };
    pass(NORM_KERNEL(timestepnorm_forward_kernel, false));
    timestepnorm_scan<NormState>(gpu, segments, end, before, NULL, start, before, r.count, (size_t)B * G, [] {});
    pass(NORM_KERNEL(timestepnorm_forward_kernel, true));
}

// The output again, from the saved statistics.
template <typename X, bool WIDE> __global__ void timestepnorm_again_kernel(X* out, const float* mean,
        const float* rstd, const X* inp, const float* w, const float* b, size_t rows, int D, int G) {
    float scale[8], shift[8], x[8];
    load_row<WIDE>(scale, w, D); load_row<WIDE>(shift, b, D);
    RowPiece<X, WIDE> next;
    auto fetch = [&](size_t r) { next.load(inp + r * D, r < rows ? D : 0); };
    for (size_t r = row_first(fetch); r < rows; r += row_step()) {
        int F = D / G;
        next.get(x); fetch(r + row_step());
        EACH(e, 8) {
            size_t k = r * G + min(column<WIDE>(WIDE ? 0 : e) / F, G - 1); // wide: 8 features of one group
            x[e] = (x[e] - mean[k]) * rstd[k] * (scale[e] + 1) + shift[e];
        }
        store_row<WIDE>(out + r * D, x, D);
    }
}
template <typename X> static void timestepnorm_again(Gpu& gpu, X* out, const float* mean, const float* rstd,
        const X* inp, const float* w, const float* b, size_t rows, int D, int G) {
    RowGrid r = row_grid(gpu, rows, D, 1, 8);
    LAUNCH_WIDE(timestepnorm_again_kernel, wide(D / G), r.grid, r.block, out, mean, rstd, inp, w, b, rows, D, G);
}

// With u and v the terms of the CPU's sums U and V, which run from the end: a first pass over dout and inp leaves (U,
// V, c) of segments and the partial sums of dw and db; these are scanned; a second pass adds up inside the segments and
// writes dinp = dout (w+1) rstd + (U + 2 (inp - c) V)/F + add1 + add2. add1 and add2 may be NULL, and add1 may be dinp.
template <typename X, int VEC, int LANES, bool APPLY>
        __global__ void __launch_bounds__(32 * WARPS) timestepnorm_backward_kernel(X* dinp, float* partials,
        float4* segments, const X* add1, const X* add2, const X* dout, const float* mean, const float* rstd,
        const NormState* start, const X* inp, const float* w, int T, int D, int G, int lanes) {
    __shared__ float2 totals[WARPS][32];
    alignas(16) __shared__ float lines[2][APPLY ? 1 : WARPS][32 * VEC];
    NormPlace p(T, D, G, lanes, VEC, APPLY);
    Piece<X, VEC> kept_x[STEPS], kept_dy[STEPS];
    float x[VEC], dy[VEC], mu[STEPS], r[STEPS], u[STEPS], v[STEPS];
    float n0 = start ? start[p.row * G + p.g].count : 0, c = mean[(p.row * T + T - 1) * G + p.g];
    EACH(i, STEPS) {
        size_t k = (p.row * T + p.t0 + i) * G + p.g;
        mu[i] = i < p.steps ? mean[k] : 0; r[i] = i < p.steps ? rstd[k] : 0;
        if (!LANES) { continue; }
        kept_x[i].clear(); kept_dy[i].clear();
        if (i < p.steps && p.sub < p.F) {
            kept_x[i].load(inp + p.at + (size_t)i * D + p.sub); kept_dy[i].load(dout + p.at + (size_t)i * D + p.sub);
        }
    }
    auto get = [&](int i, int f) {
        if (LANES) { kept_x[i].get(x); kept_dy[i].get(dy); return; }
        Piece<X, VEC> px, pdy;
        px.clear(); pdy.clear();
        if (i < p.steps) { px.load(inp + p.at + (size_t)i * D + f); pdy.load(dout + p.at + (size_t)i * D + f); }
        px.get(x); pdy.get(dy);
    };
    float scale[VEC];
    auto get_weights = [&](int f) { EACH(e, VEC) { scale[e] = w[p.g * p.F + f + e] + 1; } };
    if (LANES && p.sub < p.F) { get_weights(p.sub); }
    EACH(i, STEPS) {
        float A = 0, E = 0;
        for (int f = p.sub; f < p.F; f += p.width) {
            get(i, f);
            if (!LANES) { get_weights(f); }
            EACH(e, VEC) { float d = dy[e] * scale[e]; A += d * (x[e] - mu[i]); E += d; }
            if (LANES) { break; }
        }
        float share = quotient(1.0f, n0 + (float)(p.t0 + i + 1)), da = -r[i] * warp_sum<LANES>(E, lanes);
        float dv = -0.5f * r[i] * r[i] * r[i] * warp_sum<LANES>(A, lanes);
        u[i] = (da - 2 * (mu[i] - c) * dv) * share; v[i] = dv * share;
    }
#pragma unroll
    for (int i = STEPS - 2; i >= 0; i--) { u[i] += u[i + 1]; v[i] += v[i + 1]; }
    if (p.sub == 0) { totals[p.warp][p.team] = make_float2(u[0], v[0]); }
    __syncthreads();
    float4 later = make_float4(0, 0, c, 0);
    if (APPLY) { later = segments[p.line]; }
    for (int k = WARPS - 1; k > (APPLY ? p.warp : -1); k--) {
        later.x += totals[k][p.team].x; later.y += totals[k][p.team].y;
    }
    if (!APPLY) {
        if (p.warp == 0 && p.sub == 0 && p.active) { segments[p.line] = later; }
        int count = (T + SEGMENT - 1) / SEGMENT;
        float* part = partials + ((size_t)p.row * count + p.segment) * 2 * D;
        for (int f0 = 0; f0 < p.F; f0 += p.width) { // dw and db of one piece of each group
            float dw[VEC] = {0}, db[VEC] = {0}; int f = f0 + p.sub;
            EACH(i, STEPS) {
                if (f >= p.F) { break; }
                get(i, f);
                EACH(e, VEC) { dw[e] += dy[e] * (x[e] - mu[i]) * r[i]; db[e] += dy[e]; }
            }
            store(&lines[0][p.warp][threadIdx.x % 32 * VEC], dw);
            store(&lines[1][p.warp][threadIdx.x % 32 * VEC], db);
            __syncthreads();
            for (int i = threadIdx.x; i < 2 * 32 * VEC; i += 32 * WARPS) {
                int which = i / (32 * VEC), j = i % (32 * VEC), g = p.g0 + j / p.width, k = f0 + j % p.width;
                if (g >= G || k >= p.F) { continue; }
                float s = 0;
                EACH(q, WARPS) { s += lines[which][q][j]; }
                part[(size_t)which * D + (size_t)g * p.F + k] = s;
            }
            __syncthreads();
        }
        return;
    }
    Piece<X, VEC> added[STEPS][2]; // read before anything is written
    float a[VEC];
    auto get_added = [&](int i, int f) {
        EACH(k, 2) {
            const X* add = k ? add2 : add1;
            added[i][k].clear();
            if (add && i < p.steps) { added[i][k].load(add + p.at + (size_t)i * D + f); }
        }
    };
    EACH(i, STEPS) { if (LANES && p.sub < p.F) { get_added(i, p.sub); } }
    EACH(i, STEPS) {
        if (i >= p.steps) { break; }
        float U = (u[i] + later.x) * p.share, V = 2 * (v[i] + later.y) * p.share;
        for (int f = p.sub; f < p.F; f += p.width) {
            if (!LANES) { get_added(i, f); get_weights(f); }
            get(i, f);
            EACH(e, VEC) { dy[e] = dy[e] * scale[e] * r[i] + U + (x[e] - c) * V; }
            EACH(k, 2) {
                added[i][k].get(a);
                EACH(e, VEC) { dy[e] += a[e]; }
            }
            store(dinp + p.at + (size_t)i * D + f, dy);
            if (LANES) { break; }
        }
    }
}

// meanwhile: see timestepnorm_scan
template <typename X, typename F = void (*)()> static void timestepnorm_backward(Gpu& gpu, X* dinp, float* dw,
        float* db, NormState* dstart, const X* add1, const X* add2, const X* dout, const float* mean, const float* rstd,
        const NormState* start, const X* inp, const float* w, int B, int T, int D, int G, F meanwhile = [] {}) {
    NormGrid r = norm_grid(B, T, D, G);
    float4* segments = gpu_scratch<float4>(gpu, CARRIES, (size_t)B * G * r.count);
    float* partials = gpu_scratch<float>(gpu, PARTIALS, (size_t)B * r.count * 2 * D);
    auto pass = [&](auto kernel) {
        LAUNCH(kernel, r.blocks, 32 * WARPS, dinp, partials, segments, add1, add2, dout, mean, rstd, start, inp, w, T,
               D, G, r.lanes);
    };
    pass(NORM_KERNEL(timestepnorm_backward_kernel, false));
    timestepnorm_scan<NormSums>(gpu, segments, NULL, NULL, dstart, start, ranks.chunks > 1, r.count, (size_t)B * G,
                                meanwhile);
    pass(NORM_KERNEL(timestepnorm_backward_kernel, true));
    reduce_columns(gpu, B * r.count, {{dw, db}, 2, D});
}

// CEMA. With c = p g and s = h/p: s_t = q s_{t-1} + x_t, y_t = Re(sum_k c s_t) + omega x_t; p and g stay out of the
// scan. Two forms: one that follows the CPU's loops, for any size and type, and one for tensor cores, for bf16. Either
// runs through time from end to end; what is parallel is batch rows, features, and modes or blocks of timesteps.
enum { CEMA_LANES = 16, AHEAD = 8, SPAN = 16, UNIT = 16 * SPAN, CHANNELS = 8, POWERS = SPAN + 4,
       MANY = CEMA_MAX_NDIM / CEMA_LANES };
struct CemaCoef { float2 q, c; float p; };
struct CemaParams { float *alpha, *delta, *theta, *gamma, *omega; }; // or their gradients
static CemaParams cema_params(const Params& p) {
    return {p.cema_alpha, p.cema_delta, p.cema_theta, p.cema_gamma, p.cema_omega};
}

template <typename C> __device__ inline C mul_add(C a, C b, C c) { // of complex numbers: a b + c
    return {fma(a.x, b.x, fma(-a.y, b.y, c.x)), fma(a.x, b.y, fma(a.y, b.x, c.y))};
}
__device__ inline double sigmoid_double(double x) { return 1 / (1 + exp(-x)); }

// coef (D,K), K = N rounded up to whole threads, zero for k >= N, and where asked for powers (D,POWERS,K) of the
// rounded q: q^0 .. q^16, q^32, q^64, q^128. In double, rounded once.
__global__ void cema_coefficients_kernel(CemaCoef* coef, float2* powers, CemaParams w, int D, int N, int K) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, d = i / K, k = i % K;
    if (d >= D) { return; }
    CemaCoef m = {};
    if (k < N) {
        size_t at = (size_t)d * N + k;
        double p = sigmoid_double(w.alpha[at]), radius = 1 - p * sigmoid_double(w.delta[at]);
        double scale = p / sqrt((double)N); double2 turn;
        sincospi(2.0 / N * (k + 1) * sigmoid_double(w.theta[d]), &turn.y, &turn.x);
        m.p = p; m.q = make_float2(radius * turn.x, radius * turn.y);
        m.c = make_float2(scale * w.gamma[2 * at], scale * w.gamma[2 * at + 1]);
    }
    coef[i] = m;
    double2 q = {m.q.x, m.q.y}, power = {1, 0};
    for (int n = 0; powers && n < POWERS; n++) {
        powers[((size_t)d * POWERS + n) * K + k] = make_float2(power.x, power.y);
        power = mul_add(power, n < SPAN ? q : power, double2{0, 0});
    }
}
__device__ inline float2 cema_start(const float* start, size_t bd, int k, int N, float p) { // s_0
    return start && k < N ? make_float2(start[2 * (bd * N + k)] / p, start[2 * (bd * N + k) + 1] / p) : float2{0, 0};
}

// The form for any size: CEMA_LANES threads share a feature of a batch row and have M modes each.
struct CemaPlace {
    int d, lane; bool active;
    size_t bd, at; // of (b,d) | of (b,0,d) among (B,T,D)
    __device__ CemaPlace(int T, int D) {
        d = (blockIdx.x * blockDim.x + threadIdx.x) / CEMA_LANES; lane = threadIdx.x % CEMA_LANES;
        active = d < D;
        if (!active) { d = D - 1; }
        bd = (size_t)blockIdx.y * D + d; at = (size_t)blockIdx.y * T * D + d;
    }
};
template <typename X, int M> __global__ void cema_forward_kernel(X* out, float* end, const float* start, const X* inp,
        const CemaCoef* coef, const float* omega, int T, int D, int N) {
    CemaPlace f(T, D); CemaCoef m[M];
    float2 s[M];
    EACH(j, M) {
        m[j] = coef[(size_t)f.d * CEMA_LANES * M + j * CEMA_LANES + f.lane];
        s[j] = cema_start(start, f.bd, j * CEMA_LANES + f.lane, N, m[j].p);
    }
    for (int t0 = 0; t0 < T; t0 += AHEAD) {
        float x[AHEAD];
        EACH(i, AHEAD) { x[i] = t0 + i < T ? to_float(inp[f.at + (size_t)(t0 + i) * D]) : 0; }
        EACH(i, AHEAD) {
            float y = 0;
            if (t0 + i >= T) { break; }
            EACH(j, M) { s[j] = mul_add(m[j].q, s[j], float2{x[i], 0}); y += m[j].c.x * s[j].x - m[j].c.y * s[j].y; }
            y = warp_sum<CEMA_LANES>(y) + omega[f.d] * x[i];
            if (f.active && f.lane == 0) { out[f.at + (size_t)(t0 + i) * D] = from_float<X>(y); }
        }
    }
    EACH(j, M) {
        int k = j * CEMA_LANES + f.lane;
        if (end && f.active && k < N) { ((float2*)end)[f.bd * N + k] = {m[j].p * s[j].x, m[j].p * s[j].y}; }
    }
}

// The CPU's reverse sweep. after (B,D,N,2): a after the last timestep, NULL for zero. sums (B,D,K,4): Q and R; first
// (B,D,K): a at the first timestep; domega (B,D).
template <typename X, int M> __global__ void cema_backward_kernel(X* dinp, float4* sums, float2* first, float* domega,
        const X* dout, const float* start, const float* after, const X* inp, const CemaCoef* coef, const float* omega,
        int T, int D, int N) {
    CemaPlace f(T, D); CemaCoef m[M];
    float2 a[M] = {}, b[M] = {}, Q[M] = {}, R[M] = {}; // b is a'
    float dw = 0;
    EACH(j, M) {
        int k = j * CEMA_LANES + f.lane;
        m[j] = coef[(size_t)f.d * CEMA_LANES * M + k];
        if (after && k < N) { a[j] = ((const float2*)after)[f.bd * N + k]; }
    }
    for (int t0 = T - 1; t0 >= 0; t0 -= AHEAD) {
        float x[AHEAD], dy[AHEAD];
        EACH(i, AHEAD) {
            x[i] = t0 >= i ? to_float(inp[f.at + (size_t)(t0 - i) * D]) : 0;
            dy[i] = t0 >= i ? to_float(dout[f.at + (size_t)(t0 - i) * D]) : 0;
        }
        EACH(i, AHEAD) {
            float dx = 0;
            if (t0 < i) { break; }
            EACH(j, M) {
                float2 q = {m[j].q.x, -m[j].q.y};
                a[j] = mul_add(q, a[j], float2{dy[i], 0});
                Q[j] = {fmaf(x[i], a[j].x, Q[j].x), fmaf(x[i], a[j].y, Q[j].y)};
                R[j] = {fmaf(x[i], b[j].x, R[j].x), fmaf(x[i], b[j].y, R[j].y)};
                b[j] = mul_add(q, b[j], a[j]);
                dx += m[j].c.x * a[j].x + m[j].c.y * a[j].y;
            }
            dw = fmaf(x[i], dy[i], dw); dx = warp_sum<CEMA_LANES>(dx) + omega[f.d] * dy[i];
            if (f.active && f.lane == 0) { dinp[f.at + (size_t)(t0 - i) * D] = from_float<X>(dx); }
        }
    }
    if (!f.active) { return; }
    if (f.lane == 0) { domega[f.bd] = dw; }
    EACH(j, M) {
        int k = j * CEMA_LANES + f.lane;
        float2 s = cema_start(start, f.bd, k, N, m[j].p), r = mul_add(float2{s.x, -s.y}, b[j], R[j]);
        sums[f.bd * CEMA_LANES * M + k] = make_float4(Q[j].x, Q[j].y, r.x, r.y);
        first[f.bd * CEMA_LANES * M + k] = a[j];
    }
}

// The form for tensor cores, for N <= 16. Time is cut into blocks of SPAN timesteps, j = 0, 1, ...: block j begins with
// state s_j, and in it
//     y_t = sum_{i<=t} k[t-i] x_i + Re(sum c q^(t+1) s_j)       k[i] = Re(sum c q^i), k[0] with omega
//     s_{j+1} = q^SPAN s_j + e_j                                e_j = sum_t q^(SPAN-1-t) x_t
// For each feature these are products of 16 blocks (rows; a UNIT of time) with matrices of coefficients, which stay in
// registers of the feature's warp. x is exact in bf16; coefficients and states are split in two bf16, which leaves y a
// relative error of 1e-5 before it is rounded.
//
// Of a product, lane 4g+i has rows g and g+8, and columns 8n+2i and 8n+2i+1 of each tile n. Row g is block 2g, row g+8
// block 2g+1; columns are timesteps, or real and imaginary part of mode 4n+i. So a thread has of one product just what
// it needs of the next one's left factor.
__device__ inline void split(uint32_t& high, uint32_t& low, float a, float b) {
    high = pack(a, b);
    low = pack(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u));
}
struct Factor { // 16 x 8 of a right factor: rows 2i, 2i+1 | 2i+8, 2i+9 of column g
    uint32_t high[2], low[2];
    template <typename F> __device__ void set(int i, F value) {
        EACH(j, 2) { split(high[j], low[j], value(2 * i + 8 * j), value(2 * i + 8 * j + 1)); }
    }
};
struct Tile { float v[4]; }; // 16 x 8 of a product
__device__ inline Tile mma(const uint32_t (&a)[4], const uint32_t (&b)[2], Tile c) { // a b + c
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
        "r"(b[0]), "r"(b[1]));
    return c;
}
__device__ inline Tile mma(const uint32_t (&a)[4], const Factor& b, Tile c = {}) {
    return mma(a, b.low, mma(a, b.high, c));
}

// A unit of time of CHANNELS features in shared memory, transposed. The gaps keep a warp's accesses on different banks.
template <typename E> struct CemaUnit {
    enum { PAIR = 2 * SPAN + 8, PITCH = UNIT / (2 * SPAN) * PAIR + 16 / sizeof(E) };
    alignas(16) E x[CHANNELS][PITCH];
    static __device__ int place(int t) { return t / (2 * SPAN) * PAIR + t % (2 * SPAN); }
    // Timesteps 2i, 2i+1 (or j/2 * 8 later) of block 2g or 2g+1, which are those of register j of a left factor.
    __device__ E* at(int j) {
        int g = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
        return &x[threadIdx.x / 32][g * PAIR + j % 2 * SPAN + j / 2 * 8 + 2 * i];
    }
    // A row of all features, zeros past the end.
    static __device__ uint4 load_row(const bf16* from, int t, int T, int D) {
        return t < T ? *(const uint4*)(from + (size_t)t * D) : make_uint4(0, 0, 0, 0);
    }
    __device__ void put(int t, uint4 row) {
        const uint32_t w[4] = {row.x, row.y, row.z, row.w};
        EACH(c, CHANNELS) { x[c][place(t)] = __ushort_as_bfloat16(w[c / 2] >> c % 2 * 16); }
    }
    __device__ void write(bf16* to, int t) const {
        float row[CHANNELS];
        EACH(c, CHANNELS) { row[c] = x[c][place(t)]; }
        store(to, row);
    }
    __device__ void load(uint32_t (&a)[4]) { EACH(j, 4) { a[j] = *(uint32_t*)at(j); } }
    __device__ void load_transposed(uint32_t (&a)[4]) { // rows are timesteps, columns blocks
        int l = threadIdx.x % 32;
        unsigned from = __cvta_generic_to_shared(&x[threadIdx.x / 32][l % 8 * PAIR + l / 16 * SPAN + l / 8 % 2 * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from) : "memory");
    }
};

// What a thread knows of its feature.
struct CemaBlocks {
    int d, g, i;   // feature | lane 4g+i; its modes are 4m+i, m < 4
    size_t bd, at; // of (b,d) | of the block's features at (b,0) among (B,T,D)
    const CemaCoef* coef;
    const float2* powers;
    Factor e[4], k[2], c[2][2]; // of x to e; of x to y; of s to y
    float2 q[4][4];             // q^16, q^32, q^64, q^128

    __device__ CemaBlocks(const CemaCoef* coefs, const float2* all_powers, const float* omega, int T, int D) {
        __shared__ float taps[CHANNELS][2 * SPAN + 1];
        float *tap = taps[threadIdx.x / 32] + SPAN, sums[3] = {0};
        d = blockIdx.x * CHANNELS + threadIdx.x / 32; g = threadIdx.x % 32 / 4; i = threadIdx.x % 4;
        bd = (size_t)blockIdx.y * D + d; at = (size_t)blockIdx.y * T * D + blockIdx.x * CHANNELS;
        coef = coefs + (size_t)d * CEMA_LANES; powers = all_powers + (size_t)d * POWERS * CEMA_LANES;
        EACH(m, 4) {
            float2 c0 = coef[4 * m + i].c;
            sums[2] += c0.x;
            EACH(n, 2) {
                float2 v = mul_add(c0, powers[(8 * n + g + 1) * CEMA_LANES + 4 * m + i], float2{0, 0});
                split(c[m / 2][n].high[m % 2], c[m / 2][n].low[m % 2], v.x, -v.y);
                sums[n] += v.x;
            }
            e[m].set(i, [&](int t) { return component(SPAN - 1 - t, m); });
            EACH(j, 4) { q[m][j] = powers[(SPAN + j) * CEMA_LANES + 4 * m + i]; }
        }
        EACH(n, 3) { EACH(o, 2) { sums[n] += __shfl_xor_sync(~0u, sums[n], 1 << o); } }
        if (i < 2) { tap[g + 8 * i - SPAN] = 0; tap[g + 8 * i + 1] = i ? sums[1] : sums[0]; }
        if (threadIdx.x % 32 == 0) { tap[0] = sums[2] + omega[d]; }
        __syncwarp();
        EACH(n, 2) { k[n].set(i, [&](int t) { return tap[8 * n + g - t]; }); }
    }
    __device__ float component(int n, int m) const { // of q^n in column g of e[m]
        float2 v = powers[n * CEMA_LANES + 4 * m + g / 2];
        return g & 1 ? v.y : v.x;
    }
    // From e_j to s_j. h is the state before the unit and becomes the one after it, in the threads of the first block.
    // BACK: from the last block to the first.
    template <bool BACK> __device__ Tile scan(Tile e, float2& h, int m) const {
        enum { FIRST = BACK ? 2 : 0, SECOND = 2 - FIRST };
        int turn = BACK ? 7 - g : g, lane = threadIdx.x % 32;
        auto before = [&](float2 s, int n) {
            int from = (BACK ? lane + 4 * n : lane - 4 * n) & 31;
            return make_float2(__shfl_sync(~0u, s.x, from), __shfl_sync(~0u, s.y, from));
        };
        float2 first = {e.v[FIRST], e.v[FIRST + 1]}, s = mul_add(q[m][0], first, float2{e.v[SECOND], e.v[SECOND + 1]});
        if (turn == 0) { s = mul_add(q[m][1], h, s); }
        EACH(n, 3) {
            float2 other = before(s, 1 << n);
            if (turn >= 1 << n) { s = mul_add(q[m][n + 1], other, s); }
        }
        s = before(s, 1);
        float2 start = turn ? s : h;
        h = s; s = mul_add(q[m][0], start, first);
        return BACK ? Tile{s.x, s.y, start.x, start.y} : Tile{start.x, start.y, s.x, s.y};
    }
    __device__ void output(CemaUnit<float>& to, const uint32_t (&x)[4], const Tile (&s)[4]) const {
        Tile y[2] = {mma(x, k[0]), mma(x, k[1])};
        EACH(m, 2) {
            uint32_t high[4], low[4];
            EACH(j, 4) { split(high[j], low[j], s[2 * m + j / 2].v[j % 2 * 2], s[2 * m + j / 2].v[j % 2 * 2 + 1]); }
            EACH(n, 2) { y[n] = mma(low, c[m][n].high, mma(high, c[m][n], y[n])); }
        }
        EACH(j, 4) { *(float2*)to.at(j) = {y[j / 2].v[j % 2 * 2], y[j / 2].v[j % 2 * 2 + 1]}; }
    }
};

// carries (units,B,D,16): the states before each unit.
__global__ void __launch_bounds__(32 * CHANNELS, 2) cema_forward_blocks_kernel(bf16* out, float* end, float2* carries,
        const float* start, const bf16* inp, const CemaCoef* coef, const float2* powers, const float* omega, int T,
        int D, int N) {
    __shared__ CemaUnit<bf16> given;
    __shared__ CemaUnit<float> made;
    CemaBlocks f(coef, powers, omega, T, D); float2 h[4];
    EACH(m, 4) { int k = 4 * m + f.i; h[m] = cema_start(start, f.bd, k, N, f.coef[k].p); }
    uint4 next = given.load_row(inp + f.at, threadIdx.x, T, D);
    for (int t0 = 0; t0 < T; t0 += UNIT, carries += (size_t)gridDim.y * D * CEMA_LANES) {
        uint32_t x[4]; Tile s[4];
        given.put(threadIdx.x, next);
        next = given.load_row(inp + f.at, t0 + UNIT + threadIdx.x, T, D);
        __syncthreads();
        given.load(x);
        EACH(m, 4) {
            if (f.g == 0) { carries[f.bd * CEMA_LANES + 4 * m + f.i] = h[m]; }
            s[m] = f.scan<false>(mma(x, f.e[m]), h[m], m);
        }
        f.output(made, x, s);
        int left = T - t0, block = left / SPAN; // the end lies in this block
        EACH(m, 4) {
            int k = 4 * m + f.i;
            if (!end || left > UNIT || k >= N || f.g != block / 2 % 8) { continue; }
            int j = block % 2;
            float2 last = left == UNIT ? h[m] : float2{j ? s[m].v[2] : s[m].v[0], j ? s[m].v[3] : s[m].v[1]};
            for (int t = block * SPAN; t < left; t++) {
                last = mul_add(f.coef[k].q, last, float2{to_float(given.x[threadIdx.x / 32][given.place(t)]), 0});
            }
            ((float2*)end)[f.bd * N + k] = {f.coef[k].p * last.x, f.coef[k].p * last.y};
        }
        __syncthreads();
        int t = t0 + threadIdx.x;
        if (t < T) { made.write(out + f.at + (size_t)t * D, threadIdx.x); }
    }
}

// With dy reversed in time, dx is what y is for x. So blocks of dy are put down reversed, and give z_j = sum_t q^t dy_t
// in place of e_j; the scan from the last block to the first gives f_j, the conjugate of the adjoint a where block j
// ends. The sums are conjugates of a polynomial in q, P = sum_{t<=u} x_t dy_u q^(u-t), and of its derivative:
//     ~Q = P  = sum_i l_i q^i + q sum_j s_j z_j
//     ~R = P' = sum_i i l_i q^(i-1) + sum_j (s_j z_j + q (s_j z'_j + (SPAN q^(SPAN-1) s_j + e'_j) f_j))
// where l_i = sum of x_t dy_{t+i} inside blocks (from one more product, 16 x 16), and ' is d/dq. But s_j also has what
// came from s_0, which Q must not: P has q s_0 ~a_0 too much. And if there is an adjoint after the last block (then T
// is a multiple of UNIT), q s_end ~after too little.
__global__ void __launch_bounds__(32 * CHANNELS) cema_backward_blocks_kernel(bf16* dinp, float4* sums, float2* first,
        float* domega, const float2* carries, const float* after, const bf16* dout, const bf16* inp,
        const CemaCoef* coef, const float2* powers, const float* omega, int T, int D, int N) {
    __shared__ CemaUnit<bf16> given_x, given_dy;
    __shared__ float2 ends[CHANNELS][CEMA_LANES]; // the states after the last block
    __shared__ CemaUnit<float> made;
    CemaBlocks f(coef, powers, omega, T, D);
    Factor derivative[4]; // of x to e'
    Tile lag[2] = {};
    float2 sz[4] = {}, sf[4] = {}, rest[4] = {}, a[4] = {}, next_s[4];
    uint4 next_x, next_dy;
    const int time = threadIdx.x, reversed = time ^ (SPAN - 1);
    auto fetch = [&](int t0) {
        next_x = given_x.load_row(inp + f.at, t0 + time, T, D);
        next_dy = given_x.load_row(dout + f.at, t0 + time, T, D);
        EACH(m, 4) { next_s[m] = carries[((size_t)(t0 / UNIT) * gridDim.y * D + f.bd) * CEMA_LANES + 4 * m + f.i]; }
    };
    auto add = [](float2& sum, Tile u, Tile v) {
        EACH(j, 2) { sum = mul_add(float2{u.v[2 * j], u.v[2 * j + 1]}, float2{v.v[2 * j], v.v[2 * j + 1]}, sum); }
    };
    auto later = [&](int k) { // conjugate
        float2 v = after && k < N ? ((const float2*)after)[f.bd * N + k] : float2{0, 0};
        return make_float2(v.x, -v.y);
    };
    EACH(m, 4) {
        a[m] = later(4 * m + f.i);
        derivative[m].set(f.i, [&](int t) { return (SPAN - 1 - t) * f.component(max(SPAN - 2 - t, 0), m); });
    }
    int t0 = (T - 1) / UNIT * UNIT;
    for (fetch(t0); t0 >= 0; t0 -= UNIT) {
        uint32_t x[4], dy[4];
        float2 s0[4] = {next_s[0], next_s[1], next_s[2], next_s[3]};
        Tile z[4];
        given_x.put(time, next_x); given_dy.put(reversed, next_dy);
        if (t0 >= UNIT) { fetch(t0 - UNIT); }
        __syncthreads();
        given_x.load_transposed(x); given_dy.load_transposed(dy);
        EACH(n, 2) { lag[n] = mma(dy, {x[n], x[n + 2]}, lag[n]); }
        given_x.load(x); given_dy.load(dy);
        EACH(m, 4) {
            Tile s = f.scan<false>(mma(x, f.e[m]), s0[m], m);
            if (f.g == 0 && t0 + UNIT >= T) { ends[threadIdx.x / 32][4 * m + f.i] = s0[m]; }
            z[m] = mma(dy, f.e[m]);
            add(sz[m], s, z[m]); add(rest[m], s, mma(dy, derivative[m]));
            z[m] = f.scan<true>(z[m], a[m], m); // f
            add(sf[m], s, z[m]); add(rest[m], mma(x, derivative[m]), z[m]);
        }
        f.output(made, dy, z);
        __syncthreads();
        if (t0 + time < T) { made.write(dinp + f.at + (size_t)(t0 + time) * D, reversed); }
    }

    // The rest is among the threads of a warp: lane k becomes mode k.
    __shared__ float2 totals[CHANNELS][CEMA_LANES][4];
    __shared__ float lags[CHANNELS][SPAN][SPAN + 1];
    int w = threadIdx.x / 32, lane = threadIdx.x % 32;
    EACH(m, 4) {
        float2 all[4] = {sz[m], sf[m], rest[m], a[m]};
        EACH(j, 4) {
            EACH(o, 3) {
                if (j == 3) { continue; }
                all[j].x += __shfl_xor_sync(~0u, all[j].x, 4 << o);
                all[j].y += __shfl_xor_sync(~0u, all[j].y, 4 << o);
            }
            if (f.g == 7) { totals[w][4 * m + f.i][j] = all[j]; }
        }
    }
    EACH(n, 2) { EACH(j, 4) { lags[w][f.g + j / 2 * 8][8 * n + 2 * f.i + j % 2] = lag[n].v[j]; } }
    __syncwarp();
    float l = 0; // of lane i: l_i. Row 15-u, column t: x_t dy_u
    for (int t = 0; t < SPAN - lane; t++) { l += lags[w][SPAN - 1 - lane - t][t]; }
    size_t k = lane % CEMA_LANES, at = f.bd * CEMA_LANES + k;
    float2 q = f.coef[k].q, top = f.powers[(SPAN - 1) * CEMA_LANES + k], P = {0, 0}, dP = {0, 0}, *total = totals[w][k];
    for (int n = SPAN - 1; n >= 0; n--) {
        dP = mul_add(q, dP, P); P = mul_add(q, P, float2{__shfl_sync(~0u, l, n), 0});
    }
    float2 s0 = carries[at], u = mul_add(float2{SPAN * top.x, SPAN * top.y}, total[1], total[2]);
    P = mul_add(q, mul_add(ends[w][k], later(k), mul_add(float2{-s0.x, -s0.y}, total[3], total[0])), P);
    u = mul_add(q, u, total[0]);
    if (lane == 0) { domega[f.bd] = l; }
    if (lane >= CEMA_LANES) { return; }
    sums[at] = make_float4(P.x, -P.y, dP.x + u.x, -dP.y - u.y); first[at] = {total[3].x, -total[3].y};
}

// From the sums to gradients of parameters, as at the end of the CPU's cema_backward. Threads x: modes.
__global__ void cema_gradients_kernel(CemaParams grads, float* dstart, const float4* sums, const float2* first,
        const float* domega, const float* start, const CemaCoef* coef, CemaParams w, bool accumulate, int B, int D,
        int N, int K) {
    __shared__ double turns[256];
    int k = threadIdx.x, d = blockIdx.x * blockDim.y + threadIdx.y;
    double dangle = 0, s_theta = d < D ? sigmoid_double(w.theta[d]) : 0;
    if (d < D && k < N) {
        size_t i = (size_t)d * N + k; CemaCoef m = coef[(size_t)d * K + k];
        double p = sigmoid_double(w.alpha[i]), root = sqrt((double)N), dp = 0;
        double2 q = {m.q.x, m.q.y}, g = {w.gamma[2 * i] / root, w.gamma[2 * i + 1] / root}, dq = {0, 0}, dg = {0, 0};
        for (int b = 0; b < B; b++) {
            size_t bd = (size_t)b * D + d, at_h = 2 * (bd * N + k);
            float4 s = sums[bd * K + k]; float2 a = first[bd * K + k];
            dp += g.x * s.x + g.y * s.y;
            dq = mul_add(double2{p * g.x, -p * g.y}, double2{s.z, s.w}, dq);
            dg = {dg.x + p * s.x, dg.y + p * s.y};
            if (!start) { continue; }
            double2 qa = mul_add(double2{q.x, -q.y}, double2{a.x, a.y}, double2{0, 0});
            dg = mul_add(double2{start[at_h], -start[at_h + 1]}, qa, dg);
            if (!dstart) { continue; }
            qa = mul_add(double2{g.x, -g.y}, qa, double2{dstart[at_h], dstart[at_h + 1]});
            dstart[at_h] = qa.x; dstart[at_h + 1] = qa.y;
        }
        double s_delta = sigmoid_double(w.delta[i]), sine, cosine;
        sincospi(2.0 / N * (k + 1) * s_theta, &sine, &cosine);
        double dradius = cosine * dq.x + sine * dq.y;
        dangle = (k + 1) * (q.x * dq.y - q.y * dq.x);
        grads.gamma[2 * i] = (accumulate ? grads.gamma[2 * i] : 0) + dg.x / root;
        grads.gamma[2 * i + 1] = (accumulate ? grads.gamma[2 * i + 1] : 0) + dg.y / root;
        grads.alpha[i] = (accumulate ? grads.alpha[i] : 0) + p * (1 - p) * (dp - s_delta * dradius);
        grads.delta[i] = (accumulate ? grads.delta[i] : 0) - p * s_delta * (1 - s_delta) * dradius;
    }
    turns[threadIdx.y * K + k] = dangle;
    __syncthreads();
    if (k || d >= D) { return; }
    double dturn = 0, direct = 0;
    for (int j = 0; j < N; j++) { dturn += turns[threadIdx.y * K + j]; }
    for (int b = 0; b < B; b++) { direct += domega[(size_t)b * D + d]; }
    grads.theta[d] = (accumulate ? grads.theta[d] : 0) + 2 * M_PI / N * s_theta * (1 - s_theta) * dturn;
    grads.omega[d] = (accumulate ? grads.omega[d] : 0) + direct;
}

// How a launch goes about it.
struct Cema { int K; bool blocks; CemaCoef* coef; float2* powers; dim3 grid; }; // blocks: on tensor cores
ON_GPU_TOO static int cema_width(int N) { return CEMA_LANES * (N <= CEMA_LANES ? 1 : MANY); }
// made: the coefficients are there, of cema_slice, which comes first where there are slices.
static Cema cema_prepare(Gpu& gpu, bool is_bf16, const CemaParams& w, int B, int T, int D, int N, bool made) {
    Cema r;
    bool whole = ranks.chunks == 1 || T % UNIT == 0; // what slices hand on enters and leaves between units
    r.K = cema_width(N);
    r.blocks = is_bf16 && N <= CEMA_LANES && D % CHANNELS == 0 && T >= 4 * SPAN && whole;
    size_t size = (size_t)D * r.K;
    r.coef = (CemaCoef*)gpu_scratch<char>(gpu, COEFFICIENTS, size * (sizeof(CemaCoef) + POWERS * sizeof(float2)));
    r.powers = r.blocks ? (float2*)(r.coef + size) : NULL; r.grid = dim3(ceil_div(D, CHANNELS), B);
    if (!made) { LAUNCH(cema_coefficients_kernel, ceil_div(size, 128), 128, r.coef, r.powers, w, D, N, r.K); }
    return r;
}

// Floats that a layer keeps for the backward pass: the states before each unit of time.
static size_t cema_carries_size(Gpu*, int B, int T, int D, int) { return ceil_div(T, UNIT) * B * D * CEMA_LANES * 2; }

template <typename X> static void cema_forward(Gpu& gpu, X* out, float* end, float* carries, const float* start,
        const X* inp, const CemaParams& w, int B, int T, int D, int N, bool made = false) {
    Cema r = cema_prepare(gpu, std::is_same<X, bf16>::value, w, B, T, D, N, made);
    if (r.blocks) {
        LAUNCH(cema_forward_blocks_kernel, r.grid, 32 * CHANNELS, (bf16*)out, end, (float2*)carries, start,
               (const bf16*)inp, r.coef, r.powers, w.omega, T, D, N);
    } else {
        LAUNCH((N <= CEMA_LANES ? cema_forward_kernel<X, 1> : cema_forward_kernel<X, MANY>), r.grid,
               CEMA_LANES * CHANNELS, out, end, start, inp, r.coef, w.omega, T, D, N);
    }
}

template <typename X> static void cema_backward(Gpu& gpu, X* dinp, const CemaParams& grads, float* dstart,
        const X* dout, const float* carries, const float* start, const float* after, const X* inp, const CemaParams& w,
        int B, int T, int D, int N, bool made = false) {
    Cema r = cema_prepare(gpu, std::is_same<X, bf16>::value, w, B, T, D, N, made);
    size_t states = (size_t)B * D * r.K;
    float4* sums = (float4*)gpu_scratch<float>(gpu, CARRIES, states * 6 + (size_t)B * D);
    float2* first = (float2*)(sums + states); float* domega = (float*)(first + states);
    if (r.blocks) {
        LAUNCH(cema_backward_blocks_kernel, r.grid, 32 * CHANNELS, (bf16*)dinp, sums, first, domega,
               (const float2*)carries, after, (const bf16*)dout, (const bf16*)inp, r.coef, r.powers, w.omega, T, D, N);
    } else {
        LAUNCH((N <= CEMA_LANES ? cema_backward_kernel<X, 1> : cema_backward_kernel<X, MANY>), r.grid,
               CEMA_LANES * CHANNELS, dinp, sums, first, domega, dout, start, after, inp, r.coef, w.omega, T, D, N);
    }
    LAUNCH(cema_gradients_kernel, ceil_div(D, 256 / r.K), dim3(r.K, 256 / r.K), grads, dstart, sums, first, domega,
           ranks.chunk ? NULL : start, r.coef, w, gpu.accumulate, B, D, N, r.K);
}

// Where ranks hold slices of T timesteps: first what a slice alone makes of zero, for the others to know. out (B,D,N)
// is h at its end or, back in time, a at its first timestep. A block runs SLICE_MODES oscillators of 32 features; each
// warp has a segment of time, the nearest to that end first. What fades to 2^-80 of itself on the way there is left
// out: most modes forget in some hundred timesteps.
enum { SLICE_MODES = 8, SLICE_WARPS = 16, SLICE_LENGTH = 32 };
__device__ inline float square(float2 q) { return q.x * q.x + q.y * q.y; }
template <typename X> __global__ void __launch_bounds__(32 * SLICE_WARPS) cema_slice_kernel(float2* out, const X* inp,
        const CemaCoef* coef, bool back, int T, int D, int N, int K) {
    __shared__ float2 parts[SLICE_WARPS][SLICE_MODES][32];
    int lane = threadIdx.x, warp = threadIdx.y, d = blockIdx.x * 32 + lane, k0 = blockIdx.z * SLICE_MODES;
    const X* x = inp + (size_t)blockIdx.y * T * D + d;
    coef += (size_t)min(d, D - 1) * K + k0;
    float2 q[SLICE_MODES]; float longest = 0;
    EACH(k, SLICE_MODES) {
        q[k] = coef[k].q; longest = fmaxf(longest, square(q[k]));
        if (back) { q[k].y = -q[k].y; }
    }
    longest = log2f(warp_max(longest)); // the same in all warps
    float2 own = warp < SLICE_MODES ? coef[warp].q : float2{0, 0};
    double2 step = {own.x, back ? -own.y : own.y}, power = {1, 0}, sum = {0, 0};
    for (int n = 1; n < SLICE_LENGTH; n *= 2) { step = mul_add(step, step, double2{0, 0}); }
    for (int near = 0; near < T && !(longest * near < -2 * 80); near += SLICE_WARPS * SLICE_LENGTH) {
        int far = near + (warp + 1) * SLICE_LENGTH - 1; float v[SLICE_LENGTH]; float2 s[SLICE_MODES] = {};
        EACH(i, SLICE_LENGTH) {
            int from = far - i; // timesteps from that end
            v[i] = from < T && d < D ? to_float(x[(size_t)(back ? from : T - 1 - from) * D]) : 0;
        }
        EACH(i, SLICE_LENGTH) { EACH(k, SLICE_MODES) { s[k] = mul_add(q[k], s[k], float2{v[i], 0}); } }
        EACH(k, SLICE_MODES) { parts[warp][k][lane] = s[k]; }
        __syncthreads();
        for (int w = 0; warp < SLICE_MODES && w < SLICE_WARPS; w++) {
            float2 part = parts[w][warp][lane];
            sum = mul_add(power, double2{part.x, part.y}, sum); power = mul_add(power, step, double2{0, 0});
        }
        __syncthreads();
    }
    if (warp >= SLICE_MODES || d >= D || k0 + warp >= N) { return; }
    float p = back ? 1 : coef[warp].p;
    out[((size_t)blockIdx.y * D + d) * N + k0 + warp] = make_float2(p * sum.x, p * sum.y);
}
// state (B,D,N) = what `count` slices make of start (NULL: zero), if of zero they make what lies at ends, ends + step,
// ...: those before this one, or those after it; see the CPU's cema_carry.
__global__ void cema_slice_carry_kernel(float2* state, const float2* start, const float2* ends, const CemaCoef* coef,
        bool back, int count, int64_t step, int T, size_t size, int D, int N, int K) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) { return; }
    float2 rounded = coef[i / N % D * K + i % N].q, s0 = start ? start[i] : float2{0, 0};
    double2 q = {rounded.x, back ? -rounded.y : rounded.y}, power = {1, 0}, s = {s0.x, s0.y};
    for (int n = T; n; n /= 2) { // q^T by squaring in double: through logarithms it would lose its phase
        if (n & 1) { power = mul_add(power, q, double2{0, 0}); }
        q = mul_add(q, q, double2{0, 0});
    }
    for (int n = 0; n < count; n++) {
        float2 end = ends[n * step + i];
        s = mul_add(power, s, double2{end.x, end.y});
    }
    state[i] = make_float2(s.x, s.y);
}
// Begins the exchange, beside the products that follow in gpu.stream; cema_slice_carry ends it.
template <typename X> static void cema_slice(Gpu& gpu, const X* inp, bool back, const CemaParams& w, int B, int T,
        int D, int N) {
    size_t size = (size_t)B * D * N;
    float2 *all = gpu_scratch<float2>(gpu, SLICES, size * (ranks.chunks + 2)), *mine = all + size * ranks.chunks;
    slices_beside(gpu, [&] {
        Cema r = cema_prepare(gpu, std::is_same<X, bf16>::value, w, B, T, D, N, false);
        LAUNCH(cema_slice_kernel<X>, dim3(ceil_div(D, 32), B, ceil_div(N, SLICE_MODES)), dim3(32, SLICE_WARPS), mine,
               inp, r.coef, back, T, D, N, r.K);
        slices_gather(gpu, all, mine, sizeof(float2) * size);
    });
}
// state (B,D,N,2): h before this slice, start being that before the first; or a after it. NULL: in scratch memory.
static float* cema_slice_carry(Gpu& gpu, float* state, const float* start, bool back, int B, int T, int D, int N) {
    size_t size = (size_t)B * D * N; float2* all = (float2*)gpu.scratch[SLICES];
    if (!state) { state = (float*)(all + size * (ranks.chunks + 1)); }
    slices_wait(gpu);
    int first = back ? ranks.chunks - 1 : 0, count = back ? first - ranks.chunk : ranks.chunk;
    LAUNCH(cema_slice_carry_kernel, ceil_div(size, 128), 128, (float2*)state, (const float2*)start, all + first * size,
           (const CemaCoef*)gpu.scratch[COEFFICIENTS], back, count, (back ? -1 : 1) * (int64_t)size, T, size, D, N,
           cema_width(N));
    return state;
}

// Layer norm, or with mean and b NULL RMS norm, of rows; see the CPU's. Rows of out lie ldo apart.
template <typename X, bool WIDE, bool DROP> __global__ void norm_forward_kernel(X* out, int ldo, float* mean,
        float* rstd, const X* inp, const float* w, const float* b, size_t rows, int D, float eps, Dropout d) {
    float scale[8], shift[8] = {0}, x[8], s[2], share = 1.0f / D;
    int turn = 0;
    load_row<WIDE>(scale, w, D);
    if (b) { load_row<WIDE>(shift, b, D); }
    RowPiece<X, WIDE> next; X next_near;
    auto fetch = [&](size_t r) {
        next.load(inp + r * D, r < rows ? D : 0);
        if (mean) { next_near = inp[r < rows ? r * D : 0]; }
    };
    for (size_t r = row_first(fetch); r - threadIdx.y < rows; r += row_step()) { // all of a block in the last round
        next.get(x);
        float near = mean ? to_float(next_near) : 0; // sums about one of the values: the variance does not cancel
        fetch(r + row_step());
        s[0] = s[1] = 0;
        EACH(e, 8) { float y = column<WIDE>(e) < D ? x[e] - near : 0; s[0] += y; s[1] += y * y; }
        row_sum(s, turn);
        float off = mean ? s[0] * share : 0, m = near + off, k = rsqrtf(fmaxf(s[1] * share - off * off, 0) + eps);
        EACH(e, 8) { x[e] = (x[e] - m) * k * (scale[e] + 1) + shift[e]; }
        drop<DROP>(x, dropout_kept_row<WIDE, DROP>(d, r), d);
        store_row<WIDE>(out + r * ldo, x, r < rows ? D : 0);
        if (threadIdx.x == 0 && r < rows) {
            rstd[r] = k;
            if (mean) { mean[r] = m; }
        }
    }
}
template <typename X> static void norm_forward(Gpu& gpu, X* out, int ldo, float* mean, float* rstd, const X* inp,
        const float* w, const float* b, size_t rows, int D, float eps, Dropout drop = no_dropout) {
    RowGrid r = row_grid(gpu, rows, D, 1, 8);
    LAUNCH_DROP(norm_forward_kernel, wide(D, ldo), drop, r.grid, r.block, out, ldo, mean, rstd, inp, w, b, rows, D,
                eps);
}

// again receives the forward pass's output if not NULL; its rows and those of dout lie ld apart. dinp_sum: column sums
// of dinp, the gradient of wh1's bias. db, dinp_sum and b are NULL where mean is.
template <typename X, bool WIDE, bool DROP> __global__ void norm_backward_kernel(X* dinp, float* partials, X* again,
        const X* dout, int ld, const float* mean, const float* rstd, const X* inp, const float* w, const float* b,
        size_t rows, int D, Dropout d) {
    float scale[8], shift[8] = {0}, dw[8] = {0}, db[8] = {0}, dx[8] = {0}, x[8], dy[8], s[2], share = 1.0f / D;
    int turn = 0, sums = mean ? 3 : 1;
    load_row<WIDE>(scale, w, D);
    if (b) { load_row<WIDE>(shift, b, D); }
    RowPiece<X, WIDE> next_x, next_dy;
    auto fetch = [&](size_t r) {
        next_x.load(inp + r * D, r < rows ? D : 0); next_dy.load(dout + r * ld, r < rows ? D : 0);
    };
    for (size_t r = row_first(fetch); r - threadIdx.y < rows; r += row_step()) {
        int columns = r < rows ? D : 0;
        float m = columns && mean ? mean[r] : 0, k = columns ? rstd[r] : 0;
        next_x.get(x); next_dy.get(dy);
        fetch(r + row_step());
        unsigned kept = dropout_kept_row<WIDE, DROP>(d, r);
        drop<DROP>(dy, kept, d);
        s[0] = s[1] = 0;
        EACH(e, 8) {
            x[e] = (x[e] - m) * k;
            dw[e] += dy[e] * x[e]; db[e] += dy[e];
            dy[e] *= scale[e] + 1;
            s[0] += dy[e]; s[1] += dy[e] * x[e];
        }
        row_sum(s, turn);
        float f = mean ? s[0] * share : 0, fn = s[1] * share;
        EACH(e, 8) { dy[e] = k * (dy[e] - f - x[e] * fn); dx[e] += dy[e]; x[e] = x[e] * (scale[e] + 1) + shift[e]; }
        store_row<WIDE>(dinp + r * D, dy, columns);
        drop<DROP>(x, kept, d);
        if (again) { store_row<WIDE>(again + r * ld, x, columns); }
    }
    store_partial<WIDE>(partials, sums, D, 0, dw, D);
    if (!mean) { return; }
    store_partial<WIDE>(partials, sums, D, 1, db, D);
    store_partial<WIDE>(partials, sums, D, 2, dx, D);
}
template <typename X> static void norm_backward(Gpu& gpu, X* dinp, float* dw, float* db, float* dinp_sum, X* again,
        const X* dout, int ld, const float* mean, const float* rstd, const X* inp, const float* w, const float* b,
        size_t rows, int D, Dropout drop = no_dropout) {
    RowGrid r = row_grid(gpu, rows, D, 1, 2, 3 * D);
    LAUNCH_DROP(norm_backward_kernel, wide(D, ld), drop, r.grid, r.block, dinp, r.partials, again, dout, ld, mean, rstd,
                inp, w, b, rows, D);
    reduce_columns(gpu, r.parts, {{dw, db, dinp_sum}, mean ? 3 : 1, D});
}

// The first element of (timestep r, this block's head) in a head-major tensor (B,H,K,d) whose timesteps start at pos.
__device__ inline size_t head_major(unsigned r, int T, int K, int pos, int d) {
    return (((size_t)(r / T) * gridDim.y + blockIdx.y) * K + pos + r % T) * d;
}

// Affine map of a normalized row x, scaled, and its rotation: a query or a key.
__device__ inline void turned(float (&y)[8], const float (&x)[8], const float (&gamma)[8], const float (&beta)[8],
        const float (&angle)[8], float scale) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
        float re = x[e] * ((gamma[e] + 1) * scale) + beta[e];
        float im = x[e + 1] * ((gamma[e + 1] + 1) * scale) + beta[e + 1];
        y[e] = re * angle[e] - im * angle[e + 1];
        y[e + 1] = re * angle[e + 1] + im * angle[e];
    }
}

// Queries and keys of one head from the shared representation: RMS norm of the head (eq. 6), affine maps, rotary
// embedding, in one pass. z (B,T,Z) with rows ldz apart; q (B,H,T,Z/H); k (B,H,K,Z/H), written from timestep at_k on.
// znorm (B,T,H,Z/H) and its rstd are only written if not NULL, for tests.
template <typename X, bool WIDE> __global__ void qk_forward_kernel(X* q, X* k, X* znorm, float* znorm_rstd, const X* z,
        int ldz, const float* gamma, const float* beta, const float* rotations, unsigned rows, int T, int K, int pos,
        int at_k, int c, int Z, int zd, float eps) {
    float ga[2][8], be[2][8], x[8], turn8[8], y[8], s[1], share = 1.0f / zd, scale = sqrtf(share);
    int turn = 0, h = blockIdx.y;
    for (int i = 0; i < 2; i++) {
        load_row<WIDE>(ga[i], gamma + i * Z + h * zd, zd); load_row<WIDE>(be[i], beta + i * Z + h * zd, zd);
    }
    RowPiece<X, WIDE> next;
    auto fetch = [&](unsigned r) { next.load(z + (size_t)r * ldz + h * zd, r < rows ? zd : 0); };
    for (unsigned r = row_first(fetch); r - threadIdx.y < rows; r += row_step()) {
        int columns = r < rows ? zd : 0;
        next.get(x); fetch(r + row_step());
        load_row<WIDE>(turn8, rotations + (size_t)((pos + r % T) % c) * zd, columns);
        s[0] = 0;
        EACH(e, 8) { s[0] += x[e] * x[e]; }
        row_sum(s, turn);
        float rstd = rsqrtf(s[0] * share + eps);
        EACH(e, 8) { x[e] *= rstd; }
        if (znorm) {
            store_row<WIDE>(znorm + (size_t)r * Z + h * zd, x, columns);
            if (threadIdx.x == 0 && columns) { znorm_rstd[(size_t)r * gridDim.y + h] = rstd; }
        }
        EACH(i, 2) {
            turned(y, x, ga[i], be[i], turn8, scale);
            store_row<WIDE>(i ? k + head_major(r, T, K, at_k, zd) : q + head_major(r, T, T, 0, zd), y, columns);
        }
    }
}
template <typename X> static void qk_forward(Gpu& gpu, X* q, X* k, X* znorm, float* znorm_rstd, const X* z, int ldz,
        const float* gamma, const float* beta, const float* rotations, int B, int T, int K, int pos, int at_k, int c,
        int Z, int H, float eps) {
    RowGrid r = row_grid(gpu, (size_t)B * T, Z / H, H, 8);
    LAUNCH_WIDE(qk_forward_kernel, wide(Z / H, ldz), r.grid, r.block, q, k, znorm, znorm_rstd, z, ldz, gamma, beta,
                rotations, B * T, T, K, pos, at_k, c, Z, Z / H, eps);
}

// dz (B,T,Z), rows ldz apart, from dq and dk (B,H,T,Z/H); dz_sum (Z): the gradient of wz's bias. dznorm may be NULL.
template <typename X, bool WIDE> __global__ void qk_backward_kernel(X* dz, float* partials, X* dznorm, const X* dq,
        const X* dk, const X* z, int ldz, const float* gamma, const float* rotations, unsigned rows, int T, int c,
        int Z, int zd, float eps) {
    float ga[2][8], sums[5][8] = {{0}}, x[8], turn8[8], d[8], dx[8], s[1], share = 1.0f / zd, scale = sqrtf(share);
    int turn = 0, h = blockIdx.y;
    for (int i = 0; i < 2; i++) { load_row<WIDE>(ga[i], gamma + i * Z + h * zd, zd); }
    RowPiece<X, WIDE> next_z, next_d[2];
    auto fetch = [&](unsigned r) {
        next_z.load(z + (size_t)r * ldz + h * zd, r < rows ? zd : 0);
        for (int i = 0; i < 2; i++) { next_d[i].load((i ? dk : dq) + head_major(r, T, T, 0, zd), r < rows ? zd : 0); }
    };
    for (unsigned r = row_first(fetch); r - threadIdx.y < rows; r += row_step()) {
        int columns = r < rows ? zd : 0;
        RowPiece<X, WIDE> d_now[2] = {next_d[0], next_d[1]};
        next_z.get(x); fetch(r + row_step());
        load_row<WIDE>(turn8, rotations + (size_t)(r % T % c) * zd, columns);
        s[0] = 0;
        EACH(e, 8) { s[0] += x[e] * x[e]; dx[e] = 0; }
        row_sum(s, turn);
        float rstd = rsqrtf(s[0] * share + eps);
        EACH(e, 8) { x[e] *= rstd; }
        EACH(i, 2) {
            d_now[i].get(d);
            EACH(e, 8) { // turned back by the same angle
                float v = e & 1 ? d[e] * turn8[e - 1] - d[e - 1] * turn8[e] : d[e] * turn8[e]
                        + d[e + 1 & 7] * turn8[e + 1 & 7];
                sums[i][e] += v * x[e] * scale; sums[2 + i][e] += v;
                dx[e] += v * ((ga[i][e] + 1) * scale);
            }
        }
        if (dznorm) { store_row<WIDE>(dznorm + (size_t)r * Z + h * zd, dx, columns); }
        s[0] = 0;
        EACH(e, 8) { s[0] += dx[e] * x[e]; }
        row_sum(s, turn);
        EACH(e, 8) { dx[e] = rstd * (dx[e] - x[e] * (s[0] * share)); sums[4][e] += columns ? dx[e] : 0; }
        store_row<WIDE>(dz + (size_t)r * ldz + h * zd, dx, columns);
    }
    EACH(i, 5) { store_partial<WIDE>(partials, 5, Z, i, sums[i], zd, h * zd); }
}
template <typename X> static void qk_backward(Gpu& gpu, X* dz, float* dgamma, float* dbeta, float* dz_sum, X* dznorm,
        const X* dq, const X* dk, const X* z, int ldz, const float* gamma, const float* rotations, int B, int T, int c,
        int Z, int H, float eps) {
    RowGrid r = row_grid(gpu, (size_t)B * T, Z / H, H, 2, 5 * Z);
    LAUNCH_WIDE(qk_backward_kernel, wide(Z / H, ldz), r.grid, r.block, dz, r.partials, dznorm, dq, dk, z, ldz, gamma,
                rotations, B * T, T, c, Z, Z / H, eps);
    reduce_columns(gpu, r.parts, {{dgamma, dgamma + Z, dbeta, dbeta + Z, dz_sum}, 5, Z});
}

// exp and the sigmoid as exactly as X deserves: the fast exp is off by 1e-7 |x|.
template <typename X> __device__ inline float exp_of(float x) {
    return std::is_same<X, float>::value ? expf(x) : __expf(x);
}
template <typename X> __device__ inline float sigmoid_of(float x) { return __fdividef(1, 1 + exp_of<X>(-x)); }

// out = silu(inp) * attention, where inp (B,T,V) has rows ldi apart. Values (attention NULL stands for ones): out
// (B,H,K,V/H), from timestep at_k on. Gate: out (B,T,V), rows ldo apart, and attention (B,H,T,V/H).
template <typename X, bool WIDE, bool DROP> __global__ void gate_forward_kernel(X* out, int ldo, const X* attention,
        const X* inp, int ldi, unsigned rows, int T, int K, int at_k, int vd, Dropout d) {
    RowPiece<X, WIDE> next_x, next_o;
    auto fetch = [&](unsigned r) {
        next_x.load(inp + (size_t)r * ldi + blockIdx.y * vd, r < rows ? vd : 0);
        if (attention) { next_o.load(attention + head_major(r, T, T, 0, vd), r < rows ? vd : 0); }
    };
    for (unsigned r = row_first(fetch); r < rows; r += row_step()) {
        float x[8], o[8];
        next_x.get(x); next_o.get(o);
        fetch(r + row_step());
        EACH(e, 8) { x[e] *= sigmoid_of<X>(x[e]) * (attention ? o[e] : 1); }
        drop<DROP>(x, dropout_kept_row<WIDE, DROP>(d, r, blockIdx.y * vd), d);
        store_row<WIDE>(out + (attention ? (size_t)r * ldo + blockIdx.y * vd : head_major(r, T, K, at_k, vd)), x, vd);
    }
}
template <typename X> static void gate_forward(Gpu& gpu, X* gated, int ldg, const X* attention, const X* inp, int ldi,
        int B, int T, int V, int H, Dropout drop = no_dropout, int K = 0, int at_k = 0) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 8);
    LAUNCH_DROP(gate_forward_kernel, wide(V / H, ldg, ldi), drop, r.grid, r.block, gated, ldg, attention, inp, ldi,
                B * T, T, K, at_k, V / H);
}
template <typename X> static void value_forward(Gpu& gpu, X* v, const X* inp, int B, int T, int K, int at_k, int V,
        int H) {
    gate_forward<X>(gpu, v, V, NULL, inp, V, B, T, V, H, no_dropout, K, at_k);
}

// dinp = dv silu'(inp); dinp_sum (V): the gradient of wv's bias.
template <typename X, bool WIDE> __global__ void value_backward_kernel(X* dinp, float* partials, const X* dv,
        const X* inp, unsigned rows, int T, int V, int vd) {
    float sum[8] = {0}, x[8], d[8]; RowPiece<X, WIDE> next_x, next_d;
    auto fetch = [&](unsigned r) {
        next_x.load(inp + (size_t)r * V + blockIdx.y * vd, r < rows ? vd : 0);
        next_d.load(dv + head_major(r, T, T, 0, vd), r < rows ? vd : 0);
    };
    for (unsigned r = row_first(fetch); r < rows; r += row_step()) {
        size_t at = (size_t)r * V + blockIdx.y * vd;
        next_x.get(x); next_d.get(d);
        fetch(r + row_step());
        EACH(e, 8) { float s = sigmoid_of<X>(x[e]); d[e] *= s * (1 + x[e] * (1 - s)); sum[e] += d[e]; }
        store_row<WIDE>(dinp + at, d, vd);
    }
    store_partial<WIDE>(partials, 1, V, 0, sum, vd, blockIdx.y * vd);
}
template <typename X> static void value_backward(Gpu& gpu, X* dinp, float* dinp_sum, const X* dv, const X* inp, int B,
        int T, int V, int H) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 4, V);
    LAUNCH_WIDE(value_backward_kernel, wide(V / H), r.grid, r.block, dinp, r.partials, dv, inp, B * T, T, V, V / H);
    reduce_columns(gpu, r.parts, {{dinp_sum}, 1, V});
}

// Also leaves again, the forward pass's output, if not NULL; dot (B,H,T) = sum of dattention * attention over a head,
// which the backward pass of the softmax needs; dinp_sum (V): the gradient of wr's bias.
template <typename X, bool WIDE, bool DROP> __global__ void gate_backward_kernel(X* dattention, X* dinp,
        float* partials, float* dot, X* again, const X* dgated, int ldg, const X* attention, const X* inp, int ldi,
        unsigned rows, int T, int V, int vd, Dropout dropped) {
    float sum[8] = {0}, x[8], o[8], d[8], y[8], s[1]; int turn = 0;
    for (unsigned r0 = blockIdx.x * blockDim.y; r0 < rows; r0 += gridDim.x * blockDim.y) {
        unsigned r = r0 + threadIdx.y; int columns = r < rows ? vd : 0;
        size_t at = head_major(r, T, T, 0, vd), at_g = (size_t)r * ldg + blockIdx.y * vd,
                at_i = (size_t)r * ldi + blockIdx.y * vd;
        load_row<WIDE>(x, inp + at_i, columns); load_row<WIDE>(o, attention + at, columns);
        load_row<WIDE>(d, dgated + at_g, columns);
        unsigned kept = dropout_kept_row<WIDE, DROP>(dropped, r, blockIdx.y * vd);
        drop<DROP>(d, kept, dropped);
        s[0] = 0;
        EACH(e, 8) {
            float g = sigmoid_of<X>(x[e]), silu = x[e] * g;
            y[e] = o[e] * silu; s[0] += d[e] * y[e];
            x[e] = d[e] * o[e] * (g * (1 + x[e] * (1 - g))); sum[e] += x[e];
            d[e] *= silu;
        }
        row_sum(s, turn);
        store_row<WIDE>(dattention + at, d, columns);
        store_row<WIDE>(dinp + at_i, x, columns);
        drop<DROP>(y, kept, dropped);
        if (again) { store_row<WIDE>(again + at_g, y, columns); }
        if (threadIdx.x == 0 && columns) { dot[at / vd] = s[0]; }
    }
    store_partial<WIDE>(partials, 1, V, 0, sum, vd, blockIdx.y * vd);
}
template <typename X> static void gate_backward(Gpu& gpu, X* dattention, X* dinp, float* dinp_sum, float* dot, X* again,
        const X* dgated, int ldg, const X* attention, const X* inp, int ldi, int B, int T, int V, int H,
        Dropout drop = no_dropout) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 4, V);
    LAUNCH_DROP(gate_backward_kernel, wide(V / H, ldg, ldi), drop, r.grid, r.block, dattention, dinp, r.partials, dot,
                again, dgated, ldg, attention, inp, ldi, B * T, T, V, V / H);
    reduce_columns(gpu, r.parts, {{dinp_sum}, 1, V});
}

// out (rows,F) = silu(inp) * mul; mul NULL stands for ones. Rows of inp and mul, and of their gradients, lie ld apart.
template <typename X, bool WIDE, bool DROP> __global__ void silu_forward_kernel(X* out, const X* inp, const X* mul,
        int ld, unsigned rows, int F, Dropout d) {
    enum { E = WIDE ? 8 : 1 };
    int f = (blockIdx.x * blockDim.x + threadIdx.x) * E;
    if (f >= F) { return; }
    for (unsigned r = blockIdx.y; r < rows; r += gridDim.y) {
        Piece<X, E> a, b; float x[E], y[E];
        a.load(inp + (size_t)r * ld + f);
        if (mul) { b.load(mul + (size_t)r * ld + f); b.get(y); }
        a.get(x);
        EACH(e, E) { x[e] *= sigmoid_of<X>(x[e]) * (mul ? y[e] : 1); }
        drop<DROP>(x, DROP ? dropout_kept<E>(d, dropout_bits(d, r / d.T, r % d.T, 0), f) : 0, d);
        store(out + (size_t)r * F + f, x);
    }
}
static dim3 flat_grid(size_t rows, int columns) { return dim3(ceil_div(columns, 256), min_size(rows, 65535)); }

template <typename X> static void silu_forward(Gpu& gpu, X* out, const X* inp, const X* mul, int ld, size_t rows,
        int F, Dropout drop = no_dropout) {
    LAUNCH_DROP(silu_forward_kernel, wide(F, ld), drop, flat_grid(rows, wide(F, ld) ? F / 8 : F), 256, out, inp, mul,
                ld, rows, F);
}

// again receives the forward pass's output if not NULL; it may be where dout is.
template <typename X, bool WIDE, bool DROP> __global__ void silu_backward_kernel(X* dinp, X* dmul, X* again,
        const X* dout, const X* inp, const X* mul, int ld, unsigned rows, int F, Dropout dropped) {
    enum { E = WIDE ? 8 : 1 };
    int f = (blockIdx.x * blockDim.x + threadIdx.x) * E;
    if (f >= F) { return; }
    for (unsigned r = blockIdx.y; r < rows; r += gridDim.y) {
        Piece<X, E> a, b, c; float x[E], y[E], d[E], o[E];
        size_t at = (size_t)r * ld + f, at_out = (size_t)r * F + f;
        a.load(inp + at); c.load(dout + at_out);
        if (mul) { b.load(mul + at); b.get(y); }
        a.get(x); c.get(d);
        unsigned kept = DROP ? dropout_kept<E>(dropped, dropout_bits(dropped, r / dropped.T, r % dropped.T, 0), f) : 0;
        drop<DROP>(d, kept, dropped);
        EACH(e, E) {
            float s = sigmoid_of<X>(x[e]), silu = x[e] * s, m = mul ? y[e] : 1;
            o[e] = silu * m; x[e] = d[e] * m * (s * (1 + x[e] * (1 - s))); y[e] = d[e] * silu;
        }
        drop<DROP>(o, kept, dropped);
        store(dinp + at, x);
        if (mul) { store(dmul + at, y); }
        if (again) { store(again + at_out, o); }
    }
}
template <typename X> static void silu_backward(Gpu& gpu, X* dinp, X* dmul, X* again, const X* dout, const X* inp,
        const X* mul, int ld, size_t rows, int F, Dropout drop = no_dropout) {
    LAUNCH_DROP(silu_backward_kernel, wide(F, ld), drop, flat_grid(rows, wide(F, ld) ? F / 8 : F), 256, dinp, dmul,
                again, dout, inp, mul, ld, rows, F);
}

// With rescale_nffn: out (rows,D) = inp * w + other (may be out), or where dw receives the column sums of inp * other,
// as backward, out = inp * w.
template <typename X, bool WIDE> __global__ void rescale_kernel(X* out, float* partials, const X* inp, const X* other,
        const float* w, size_t rows, int D) {
    float scale[8], sum[8] = {0}, x[8], y[8];
    load_row<WIDE>(scale, w, D);
    for (size_t r = row_first(); r < rows; r += row_step()) {
        load_row<WIDE>(x, inp + r * D, D); load_row<WIDE>(y, other + r * D, D);
        EACH(e, 8) { sum[e] += x[e] * y[e]; x[e] = x[e] * scale[e] + (partials ? 0 : y[e]); }
        store_row<WIDE>(out + r * D, x, D);
    }
    if (partials) { store_partial<WIDE>(partials, 1, D, 0, sum, D); }
}
template <typename X> static void ffn_rescale(Gpu& gpu, X* out, float* dw, const X* inp, const X* other, const float* w,
        size_t rows, int D) {
    RowGrid r = row_grid(gpu, rows, D, 1, 4, dw ? D : 0);
    LAUNCH_WIDE(rescale_kernel, wide(D), r.grid, r.block, out, r.partials, inp, other, w, rows, D);
    if (dw) { reduce_columns(gpu, r.parts, {{dw}, 1, D}); }
}

// Chunk attention. A pair is one head of one chunk (of one batch row). For blocks of BLOCK queries of all pairs at
// once, one product makes the scores against the keys up to the block's last one (those right of it are never
// computed), a kernel turns them into probabilities in place, and a second product makes the output: a block's scores
// stay in the L2 cache. S (pairs, rows, ld): scores of queries first.. of each pair against keys 0..; query i sees keys
// up to `seen` + i. lse: of query i of a pair at pair * stride + first + i; at: where that stands in (B,H,T).
enum { BLOCK = 512, SCORES_BYTES = 1 << 27 };
__device__ inline uint64_t dropout_bits_of_query(const Dropout& d, size_t at, int H) {
    unsigned head = (unsigned)at / d.T;
    return dropout_bits(d, head / H, (unsigned)at % d.T, head % H);
}
template <typename X, bool WIDE, bool DROP> __global__ void __launch_bounds__(256) softmax_forward_kernel(X* S, int ld,
        size_t step, float* lse, size_t stride, int rows, int keys, int seen, size_t at, int H, Dropout d) {
    enum { E = WIDE ? 8 : 1, KEPT = 8 }; // a warp has a row, a thread keeps KEPT pieces of it in registers
    int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, n = seen + i + 1;
    if (i >= rows) { return; }
    X* s = S + blockIdx.y * step + (size_t)i * ld; Piece<X, E> kept[KEPT];
    float x[E], top = -INFINITY, sum = 0;
    uint64_t bits = DROP ? dropout_bits_of_query(d, at + blockIdx.y * stride + i, H) : 0;
    auto fetch = [&](Piece<X, E>& piece, int j) { // dropped scores become -infinity
        piece.load(s + j);
        if (!DROP) { return; }
        piece.get(x);
        drop<DROP>(x, dropout_kept<E>(d, bits, j), d);
        piece.set(x);
    };
    for (int j0 = lane * E; j0 < n; j0 += 32 * E * KEPT) { // running maximum and sum, piece by piece
        EACH(k, KEPT) {
            int j = j0 + k * 32 * E;
            if (j >= n) { break; }
            fetch(kept[k], j);
        }
        float before = top;
        EACH(k, KEPT) {
            int j = j0 + k * 32 * E;
            if (j >= n) { break; }
            kept[k].get(x);
            EACH(e, E) { if (j + e < n) { top = fmaxf(top, x[e]); } }
        }
        sum *= before == top ? 1 : exp_of<X>(before - top);
        EACH(k, KEPT) {
            int j = j0 + k * 32 * E;
            if (j >= n) { break; }
            kept[k].get(x);
            EACH(e, E) { sum += j + e < n && !(DROP && x[e] == -INFINITY) ? exp_of<X>(x[e] - top) : 0; }
        }
    }
    float all = warp_max(top);
    sum = warp_sum(sum * (top == -INFINITY ? 0 : exp_of<X>(top - all)));
    if (DROP && all == -INFINITY) { all = 0; sum = 1; } // no key is left: then all probabilities are 0
    float share = 1 / sum;
    bool whole = n <= 32 * E * KEPT; // is all of the row in registers?
    for (int j0 = lane * E; j0 < keys; j0 += 32 * E * KEPT) {
        EACH(k, KEPT) {
            int j = j0 + k * 32 * E;
            if (j >= keys) { break; }
            if (j < n) {
                if (!whole) { fetch(kept[k], j); }
                kept[k].get(x);
            }
            EACH(e, E) { x[e] = j + e < n ? exp_of<X>(x[e] - all) * share : 0; }
            store(s + j, x);
        }
    }
    if (lane == 0) { lse[blockIdx.y * stride + i] = all + logf(sum); }
}

// In place: S becomes P = exp(S - lse) and dP becomes dS = P (dP - dot). Columns up to the end of the row's block. In
// bf16 dot is the sum of dout * out, which is more exact than that of the rounded P dP.
template <typename X, bool WIDE, bool DROP> __global__ void __launch_bounds__(256) softmax_backward_kernel(X* S, X* dP,
        int ld, size_t step, const float* lse, const float* dot, size_t stride, int rows, size_t at_q, int H,
        Dropout dropped) {
    enum { E = WIDE ? 8 : 1 };
    int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (i >= rows) { return; }
    size_t at = blockIdx.y * step + (size_t)i * ld;
    int keys = min((i / BLOCK + 1) * BLOCK, rows);
    float norm = lse[blockIdx.y * stride + i], d = dot[blockIdx.y * stride + i];
    uint64_t bits = DROP ? dropout_bits_of_query(dropped, at_q + blockIdx.y * stride + i, H) : 0;
    // sum_s P dP of the numbers that it is taken from: a lone key gives 0
    if (std::is_same<X, float>::value || i == 0) {
        d = 0;
        for (int j = lane; j <= i; j += 32) {
            if (DROP && !dropout_kept<1>(dropped, bits, j)) { continue; }
            d += exp_of<X>(to_float(S[at + j]) - norm) * to_float(dP[at + j]);
        }
        d = warp_sum(d);
    }
#pragma unroll 4
    for (int j = lane * E; j < keys; j += 32 * E) {
        float x[E], y[E];
        load(x, S + at + j); load(y, dP + at + j);
        drop<DROP>(x, DROP ? dropout_kept<E>(dropped, bits, j) : 0, dropped);
        EACH(e, E) { x[e] = j + e <= i ? exp_of<X>(x[e] - norm) : 0; y[e] = j + e <= i ? x[e] * (y[e] - d) : 0; }
        store(S + at + j, x); store(dP + at + j, y);
    }
}

// Which chunks one round of products covers: `pairs` of them, `rows` queries each, `step_q` timesteps apart among
// queries and `step_k` among keys, from timestep `first` on. If c divides T, all of them at once; else chunk by chunk.
struct Spans { int count, pairs, rows; size_t step_q, step_k; };
static Spans attention_spans(int B, int T, int K, int c, int H) {
    if (T % c == 0 && K == T) { return {1, B * H * (T / c), c, (size_t)c, (size_t)c}; }
    return {(int)ceil_div(T, c), B * H, min_int(c, T), (size_t)T, (size_t)K};
}
// Pairs whose scores fit the scratch memory, at least one.
template <typename X> static int pairs_at_once(int pairs, size_t elements) {
    size_t n = SCORES_BYTES / (elements * sizeof(X));
    return n < 1 ? 1 : min_size(n, pairs);
}

// out (B,H,T,V/H), q (B,H,T,Z/H), k (B,H,K,Z/H), v (B,H,K,V/H), lse (B,H,T)
template <typename X> static void attention_forward(Gpu& gpu, X* out, float* lse, const X* q, const X* k, const X* v,
        int B, int T, int K, int pos, int c, int H, int Z, int V, Dropout drop = no_dropout) {
    int zd = Z / H, vd = V / H; Spans a = attention_spans(B, T, K, c, H);
    for (int n = 0, first = 0; n < a.count; n++, first += c) {
        int rows = min_int(a.rows, T - first), block = min_int(rows, BLOCK), ld = ceil_div(pos + rows, 128) * 128;
        int most = pairs_at_once<X>(a.pairs, (size_t)block * ld);
        X* S = gpu_scratch<X>(gpu, SCORES, (size_t)most * block * ld);
        for (int p = 0; p < a.pairs; p += most) {
            int batch = min_int(most, a.pairs - p);
            for (int i = 0; i < rows; i += BLOCK) {
                int m = min_int(BLOCK, rows - i), keys = pos + i + m;
                if (K > T) { keys = min_int(K, ceil_div(keys, 128) * 128); } // from a cache: few different shapes
                size_t at_q = p * a.step_q + first + i, at_k = p * a.step_k + first, step = (size_t)m * ld;
                gemm<X, X>(gpu, S, ld, q + at_q * zd, zd, false, k + at_k * zd, zd, true, m, keys, zd, batch,
                           a.step_q * zd, a.step_k * zd, step);
                LAUNCH_DROP(softmax_forward_kernel, wide(keys), drop, dim3(ceil_div(m, 8), batch), 256, S, ld, step,
                            lse + at_q, a.step_q, m, keys, pos + i, at_q, H);
                gemm<X, X>(gpu, out + at_q * vd, vd, S, ld, false, v + at_k * vd, vd, false, m, vd, keys, batch, step,
                           a.step_k * vd, a.step_q * vd);
            }
        }
    }
}

// Scores and dP = dout v^T by blocks of rows, then dq by rows, dk and dv by columns: so every sum is one product, in
// fp32. dot (B,H,T): row sums of dout * out.
template <typename X> static void attention_backward(Gpu& gpu, X* dq, X* dk, X* dv, const X* dout, const float* dot,
        const float* lse, const X* q, const X* k, const X* v, int B, int T, int c, int H, int Z, int V,
        Dropout drop = no_dropout) {
    int zd = Z / H, vd = V / H; Spans a = attention_spans(B, T, T, c, H);
    for (int n = 0, first = 0; n < a.count; n++, first += c) {
        int rows = min_int(a.rows, T - first), ld = ceil_div(rows, 8) * 8;
        size_t step = (size_t)rows * ld, step_q = a.step_q * zd, step_v = a.step_q * vd;
        int most = pairs_at_once<X>(a.pairs, step);
        X *S = gpu_scratch<X>(gpu, SCORES, most * step * 2), *dS = S + most * step;
        for (int p = 0; p < a.pairs; p += most) {
            int batch = min_int(most, a.pairs - p);
            size_t at = p * a.step_q + first;
            const X *qp = q + at * zd, *kp = k + at * zd, *vp = v + at * vd, *dp = dout + at * vd;
            for (int i = 0; i < rows; i += BLOCK) {
                int m = min_int(BLOCK, rows - i);
                gemm<X, X>(gpu, S + (size_t)i * ld, ld, qp + (size_t)i * zd, zd, false, kp, zd, true, m, i + m, zd,
                           batch, step_q, step_q, step);
                gemm<X, X>(gpu, dS + (size_t)i * ld, ld, dp + (size_t)i * vd, vd, false, vp, vd, true, m, i + m, vd,
                           batch, step_v, step_v, step);
            }
            LAUNCH_DROP(softmax_backward_kernel, wide(rows), drop, dim3(ceil_div(rows, 8), batch), 256, S, dS, ld, step,
                        lse + at, dot + at, a.step_q, rows, at, H);
            for (int i = 0; i < rows; i += BLOCK) {
                int m = min_int(BLOCK, rows - i);
                // queries from i on, keys of this block
                const X *Sc = S + (size_t)i * ld + i, *dSc = dS + (size_t)i * ld + i;
                gemm<X, X>(gpu, dq + (at + i) * zd, zd, dS + (size_t)i * ld, ld, false, kp, zd, false, m, zd, i + m,
                           batch, step, step_q, step_q);
                gemm<X, X>(gpu, dk + (at + i) * zd, zd, dSc, ld, true, qp + (size_t)i * zd, zd, false, m, zd, rows - i,
                           batch, step, step_q, step_q);
                gemm<X, X>(gpu, dv + (at + i) * vd, vd, Sc, ld, true, dp + (size_t)i * vd, vd, false, m, vd, rows - i,
                           batch, step, step_v, step_v);
            }
        }
    }
}

// Cross-entropy, a block per row. Losses, and with `gradient` logits become dlogits in place: a row is read from memory
// once and, the second time, from the cache.
template <typename X, bool WIDE> __global__ void __launch_bounds__(1024) crossentropy_kernel(float* losses, X* logits,
        const int* targets, float dloss, bool gradient, int vocab) {
    enum { E = WIDE ? 8 : 1 };
    __shared__ float tops[32], sums[32];
    X* row = logits + (size_t)blockIdx.x * vocab;
    int target = targets[blockIdx.x], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float x[E], top = -INFINITY, sum = 0, at_target = target == IGNORE ? 0 : to_float(row[target]);
    for (int i = threadIdx.x * E; target != IGNORE && i < vocab; i += blockDim.x * E) {
        load(x, row + i);
        float most = top;
        EACH(e, E) { most = fmaxf(most, x[e]); }
        sum *= exp_of<X>(top - most); top = most;
        EACH(e, E) { sum += exp_of<X>(x[e] - top); }
    }
    float all = warp_max(top);
    if (lane == 0) { tops[warp] = all; }
    __syncthreads(); // also: all have read the target's logit before it is overwritten
    all = warp_max(lane < blockDim.x / 32 ? tops[lane] : -INFINITY);
    sum = warp_sum(top == -INFINITY ? 0 : sum * exp_of<X>(top - all));
    if (lane == 0) { sums[warp] = sum; }
    __syncthreads();
    sum = warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0);
    if (threadIdx.x == 0) { losses[blockIdx.x] = target == IGNORE ? 0 : logf(sum) + (all - at_target); }
    if (!gradient) { return; }
    float scale = dloss / sum;
    for (int i = threadIdx.x * E; i < vocab; i += blockDim.x * E) {
        load(x, row + i);
        EACH(e, E) { x[e] = target == IGNORE ? 0 : exp_of<X>(x[e] - all) * scale - (i + e == target ? dloss : 0); }
        store(row + i, x);
    }
}
template <typename X> static void crossentropy(Gpu& gpu, float* losses, X* logits, const int* targets, float dloss,
        size_t rows, int vocab) {
    int threads = min_size(1024, ceil_div(ceil_div(vocab, 8), 32) * 32);
    LAUNCH_WIDE(crossentropy_kernel, wide(vocab), rows, threads, losses, logits, targets, dloss, dloss != 0,
                vocab);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers at a single timestep, for generation. What limits them is reading the weights and the cache, once, and next to
// that the gaps between launches. So there are few, and each starts before the last one has ended, with the part of its
// work that does not depend on it. Positions are read from the device: all tokens are the same launches, one graph.

// Lets the next launch start.
__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits for all earlier ones.
__device__ inline void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// n neighbouring elements into the L2 cache, by `threads` threads. That may be done before inputs are there.
template <typename X> __device__ inline void prefetch(const X* p, int n, int thread, int threads) {
    enum { LINE = 128 / sizeof(X) };
    for (int i = thread * LINE; i < n; i += threads * LINE) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p + i)); }
}
__device__ inline unsigned shared_at(const void* p) { return __cvta_generic_to_shared(p); }
// A warp copies n neighbouring elements to shared memory; copy_wait returns when they are there. In wide forms (E = 8;
// addresses and sizes are multiples of 16 bytes), from sm_90 on, these are bulk copies: they go on beside what follows,
// take no registers, and loads do not queue up behind them. barrier: an mbarrier for one such copy at a time, after
// copy_init; parity: of the number of its copies before.
__device__ inline void copy_init(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared.b64 [%0], 1; fence.proxy.async.shared::cta;"
                 ::"r"(shared_at(barrier)) : "memory");
#endif
}
template <int E, typename X> __device__ inline void copy_begin(X* to, const X* from, int n, uint64_t* barrier) {
    int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    if (E > 1 && lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%3], %2;"
                     "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                     ::"r"(shared_at(to)), "l"(from), "r"(n * (int)sizeof(X)), "r"(shared_at(barrier)) : "memory");
    }
    if (E > 1) { return; }
#endif
    for (int i = lane * E; i < n; i += 32 * E) { *(Piece<X, E>*)(to + i) = *(const Piece<X, E>*)(from + i); }
}
template <int E> __device__ inline void copy_wait(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
    for (int there = E == 1; !there;) {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.s32 %0, 1, 0, p;}"
                     : "=r"(there) : "r"(shared_at(barrier)), "r"(parity) : "memory");
    }
#endif
    __syncwarp();
}
template <typename... P, typename... A> static void launch_early(Gpu& gpu, void (*kernel)(P...), dim3 grid, dim3 block,
        size_t shared, A... args) {
    cudaLaunchAttribute early;
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {grid, block, shared, gpu.stream, &early, gpu.card.major >= 9};
    CUDA(cudaLaunchKernelEx(&config, kernel, P(args)...));
}

// out (rows,O) = inp (rows,I) weight (O,I)^T + bias + add; rows of inp lie ldi apart. With `from`, inp is made first:
// as from's norm by w (and b, see norm_forward), or without w, as silu(from) * mul.
template <typename X> struct Product {
    X *out, *inp;
    int ldi, I, O;
    const X *weight, *bias, *add, *from, *mul;
    const float *w, *b;
    float *mean, *rstd;
};
// One row of a product, or with blocks left over, of two: a warp for each output. Weights come through shared memory,
// where each warp has SLOTS pieces of its rows; EARLY of them before inputs are there: more would hold these up.
template <typename X> struct Products { Product<X> of[2]; int blocks; float eps; };
enum { PRODUCT_WARPS = 12, PRODUCT_THREADS = 32 * PRODUCT_WARPS, PRODUCT_BLOCKS = 2, // of a block; a multiprocessor's
       SLOTS = 3, EARLY = 2, SLOT_BYTES = 2048 };
template <typename X, bool WIDE> __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) product_kernel(
        const __grid_constant__ Products<X> products) {
    enum { E = WIDE ? 8 : 1, STRIDE = 32 * E, UNROLL = SLOT_BYTES / (256 * sizeof(X)), SLOT = UNROLL * STRIDE };
    extern __shared__ uint4 memory[];
    __shared__ uint64_t all_barriers[PRODUCT_WARPS][SLOTS];
    bool second = blockIdx.x >= products.blocks;
    const Product<X>& p = products.of[second];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = threadIdx.x * E, turn = 0, I = p.I, O = p.O;
    int block = blockIdx.x - (second ? products.blocks : 0), o = block * PRODUCT_WARPS + warp;
    int step = PRODUCT_WARPS * (second ? gridDim.x - products.blocks : products.blocks);
    X *slots = (X*)memory + warp * SLOTS * SLOT, *x = (X*)memory + PRODUCT_WARPS * SLOTS * SLOT;
    uint64_t* barriers = all_barriers[warp];
    int next_o = o, next_i = 0, slot = 0, parity = 0;
    auto fetch = [&](int slot) {
        const X* from = p.weight + (size_t)next_o * I + next_i;
        if (next_o < O) { copy_begin<E>(slots + slot * SLOT, from, min(SLOT, I - next_i), &barriers[slot]); }
        next_i += SLOT;
        if (next_i >= I) { next_i = 0; next_o += step; }
    };
    if (lane < SLOTS) { copy_init(&barriers[lane]); }
    __syncwarp();
    EACH(k, EARLY) { fetch(k); }
    if (o < O && p.bias) { prefetch(p.bias + o, 1, lane, 32); }
    Piece<float, E> w, shift; Piece<X, E> given, mul;
    auto fetch_norm = [&](int i) {
        if (p.w && i < I) { w.load(p.w + i); }
        if (p.b && i < I) { shift.load(p.b + i); }
    };
    shift.clear();
    fetch_norm(first);
    start_next();
    wait_for_inputs();
    const X* from = p.from ? p.from : p.inp;
    auto fetch_inputs = [&](int i) {
        if (i < I) { given.load(from + i); }
        if (i < I && p.mul) { mul.load(p.mul + i); }
    };
    fetch_inputs(first);
    EACH(k, SLOTS - EARLY) { fetch(EARLY + k); }
    float a[E], b[E], near = p.mean ? to_float(from[0]) : 0, s[2] = {0, 0}, mean = 0, rstd = 1;
    if (p.w) {
        for (int i = first; i < I; i += PRODUCT_THREADS * E) {
            load(a, from + i);
            EACH(e, E) { s[0] += a[e] - near; s[1] += (a[e] - near) * (a[e] - near); }
        }
        row_sum(s, turn);
        float off = p.mean ? s[0] / I : 0;
        mean = near + off; rstd = rsqrtf(fmaxf(s[1] / I - off * off, 0) + products.eps);
        if (block == 0 && p.mean) { *p.mean = mean; }
        if (block == 0) { *p.rstd = rstd; }
    }
    for (int i = first; i < I; i += PRODUCT_THREADS * E) {
        given.get(a);
        if (p.w) {
            w.get(b);
            EACH(e, E) { a[e] = (a[e] - mean) * rstd * (b[e] + 1); }
            shift.get(b);
            EACH(e, E) { a[e] += b[e]; }
        } else if (p.from) {
            if (p.mul) { mul.get(b); }
            EACH(e, E) { a[e] *= sigmoid_of<X>(a[e]) * (p.mul ? b[e] : 1); }
        }
        fetch_inputs(i + PRODUCT_THREADS * E); fetch_norm(i + PRODUCT_THREADS * E);
        store(x + i, a);
        if (p.from && block == 0) { store(p.inp + i, a); }
    }
    __syncthreads();
    for (; o < O; o += step) {
        X zero = from_float<X>(0), bias = p.bias ? p.bias[o] : zero, add = p.add ? p.add[o] : zero;
        float sum[2] = {0, 0};
        for (int i = 0; i < I; i += SLOT) {
            copy_wait<E>(&barriers[slot], parity);
            EACH(k, UNROLL) {
                int j = k * STRIDE + lane * E;
                if (i + j >= I) { continue; }
                load(a, slots + slot * SLOT + j); load(b, x + i + j);
                EACH(e, E) { sum[e & 1] = fmaf(a[e], b[e], sum[e & 1]); }
            }
            __syncwarp(); // all have read it
            fetch(slot);
            slot = (slot + 1) % SLOTS; parity ^= slot == 0;
        }
        float y = warp_sum(sum[0] + sum[1]);
        if (lane == 0) { p.out[o] = from_float<X>(y + to_float(bias) + to_float(add)); }
    }
}

// One product or two that do not depend on each other.
template <typename X> static void product_forward(Gpu& gpu, size_t rows, float eps, const Product<X>& first,
        const Product<X>& second = {}) {
    Products<X> all = {{first, second}, 0, eps};
    size_t shared = PRODUCT_WARPS * SLOTS * SLOT_BYTES + sizeof(X) * (first.I > second.I ? first.I : second.I);
    if (rows == 1 && shared + 2048 <= gpu.card.sharedMemPerBlockOptin) { // 2048: for its static shared memory
        // no more blocks than the card takes at a time, and the same number of rows for all warps
        int most = PRODUCT_WARPS * PRODUCT_BLOCKS * gpu.card.multiProcessorCount;
        int rows_of_block = PRODUCT_WARPS * ceil_div(first.O + second.O, most);
        all.blocks = ceil_div(first.O, rows_of_block);
        bool is_wide = wide(first.I, second.I); static size_t allowed[2]; // never less than what a graph has
        auto kernel = is_wide ? product_kernel<X, true> : product_kernel<X, false>;
        if (shared > allowed[is_wide]) {
            CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed[is_wide] = shared));
        }
        launch_early(gpu, kernel, all.blocks + ceil_div(second.O, rows_of_block), PRODUCT_THREADS, shared, all);
        return;
    }
    for (int i = 0; i < (second.O ? 2 : 1); i++) {
        const Product<X>& p = all.of[i];
        if (p.w) { norm_forward(gpu, p.inp, p.ldi, p.mean, p.rstd, p.from, p.w, p.b, rows, p.I, eps); }
        else if (p.from) { silu_forward(gpu, p.inp, p.from, p.mul, p.mul ? 2 * p.I : p.I, rows, p.I); }
        matmul_forward(gpu, p.out, p.O, p.inp, p.ldi, p.weight, p.bias, p.add, p.O, rows, p.I, p.O);
    }
}

// Timestep norm and, with h, CEMA: inp (B,D) to normed and out; norm (B,G) and h (B,D,N) move on. A block has a group
// of features, `lanes` threads share the oscillators of one.
template <typename X> __global__ void __launch_bounds__(512) memory_step_kernel(X* normed, X* out, NormState* norm,
        float2* h, const X* inp, const float* w, const float* b, const CemaCoef* coef, const float* omega, int B, int D,
        int G, int N, float eps) {
    enum { K = CEMA_MAX_NDIM / 32 };
    int F = D / G, g = blockIdx.x, lane = threadIdx.x % 32, lanes = N <= 16 ? 16 : 32, k0 = threadIdx.x % lanes;
    NormState old; float2 v[K];
    auto statistics = [&](int row) { // up to this timestep; each warp for itself
        const X* x = inp + (size_t)row * D + g * F; float mean = 0, var = 0;
        NormState s = old;
        for (int f = lane; f < F; f += 32) { mean += to_float(x[f]); }
        mean = warp_sum(mean) / F;
        for (int f = lane; f < F; f += 32) { var += (to_float(x[f]) - mean) * (to_float(x[f]) - mean); }
        merge(s.count, s.mean, s.var, 1.0, (double)mean, (double)(warp_sum(var) / F));
        return s;
    };
    for (int f0 = 0; f0 < F; f0 += 512 / lanes) {
        int f = f0 + threadIdx.x / lanes, d = g * F + min(f, F - 1);
        float scale = w[d] + 1, shift = b[d], direct = h ? omega[d] : 0;
        CemaCoef m[K];
        EACH(j, K) {
            int k = k0 + j * lanes;
            if (!h || k >= N) { continue; }
            m[j] = coef[d * cema_width(N) + k];
        }
        auto fetch = [&](int row) { // what the token before has left; past the L1 cache, which only the wait clears
            const NormState* s = norm + row * G + g; const float2* from = h + ((size_t)row * D + d) * N + k0;
            old = {__ldcg(&s->count), __ldcg(&s->mean), __ldcg(&s->var)};
            EACH(j, K) { if (h && k0 + j * lanes < N) { v[j] = __ldcg(from + j * lanes); } }
        };
        fetch(blockIdx.y);
        if (f0 == 0) { start_next(); wait_for_inputs(); }
        for (int row = blockIdx.y; row < B; row += gridDim.y) {
            size_t at = (size_t)row * D + d;
            if (row != blockIdx.y) { fetch(row); }
            X given = inp[at];
            NormState s = statistics(row);
            X stored = from_float<X>((to_float(given) - (float)s.mean) * rsqrtf((float)s.var + eps) * scale + shift);
            float x = to_float(stored), y = 0;
            EACH(j, K) {
                int k = k0 + j * lanes;
                if (!h || k >= N || f >= F) { continue; }
                v[j] = mul_add(m[j].q, v[j], float2{m[j].p * x, 0});
                h[at * N + k] = v[j]; y += __fdividef(m[j].c.x * v[j].x - m[j].c.y * v[j].y, m[j].p);
            }
            y = warp_sum<0>(y, lanes);
            if (k0 == 0 && f < F) {
                normed[at] = stored;
                if (h) { out[at] = from_float<X>(y + direct * x); }
            }
            if (f0 + 512 / lanes < F) { continue; }
            __syncthreads(); // all have read the statistics
            if (threadIdx.x == 0) { norm[row * G + g] = s; }
        }
    }
}
template <typename X> static void memory_step(Gpu& gpu, X* normed, X* out, NormState* norm, float* h, const X* inp,
        const float* w, const float* b, const CemaCoef* coef, const float* omega, int B, int D, int G, int N,
        float eps) {
    launch_early(gpu, memory_step_kernel<X>, dim3(G, min_int(B, 8)), 512, 0, normed, out, norm, (float2*)h, inp, w, b,
                 coef, omega, B, D, G, N, eps);
}

// Attention of one query a head to the keys 0..*position of its chunk, in two steps: first all scores (B,H,c). Keys are
// dealt out to the warps of the blocks x. The cache, K (B,H,c,zd) and V (B,H,c,vd), gets the new key and value, made
// from z and v as by qk_forward and value_forward.
template <typename X, bool WIDE> __global__ void __launch_bounds__(1024) scores_step_kernel(float* scores, X* K, X* V,
        const int* position, const X* z, int ldz, const X* v, const float* gamma, const float* beta,
        const float* rotations, int c, int Z, int zd, int vd, float eps) {
    enum { E = WIDE ? 8 : 1, KEYS = 2 };
    extern __shared__ uint4 memory[];
    float* q = (float*)memory;
    int pos = *position, h = blockIdx.y, H = gridDim.y, lane = threadIdx.x % 32, warps = blockDim.x / 32, turn = 0;
    int first = blockIdx.x * warps + threadIdx.x / 32, step = gridDim.x * warps;
    size_t pair = (size_t)blockIdx.z * H + h;
    float x[8], y[8], ga[2][8], be[2][8], angle[8], s[1] = {0};
    RowPiece<X, WIDE> value;
    bool owner = pos / warps % gridDim.x == blockIdx.x; // of this timestep
    scores += pair * c; K += pair * c * zd; V += pair * c * vd;
    for (int j = first; j < pos && j < first + KEYS * step; j += step) { prefetch(K + (size_t)j * zd, zd, lane, 32); }
    load_row<WIDE>(angle, rotations + (size_t)pos * zd, zd);
    EACH(i, 2) { load_row<WIDE>(ga[i], gamma + i * Z + h * zd, zd); load_row<WIDE>(be[i], beta + i * Z + h * zd, zd); }
    start_next();
    wait_for_inputs();
    load_row<WIDE>(x, z + (size_t)blockIdx.z * ldz + h * zd, zd);
    if (owner) { value.load(v + pair * vd, vd); }
    EACH(e, 8) { s[0] += x[e] * x[e]; }
    row_sum(s, turn);
    EACH(e, 8) { x[e] *= rsqrtf(s[0] / zd + eps); }
    EACH(i, 2) {
        turned(y, x, ga[i], be[i], angle, rsqrtf(zd));
        if (i == 0) { store_row<WIDE>(q, y, zd); } else if (owner) { store_row<WIDE>(K + (size_t)pos * zd, y, zd); }
    }
    if (owner) {
        value.get(y);
        EACH(e, 8) { y[e] *= sigmoid_of<X>(y[e]); }
        store_row<WIDE>(V + (size_t)pos * vd, y, vd);
    }
    __syncthreads();
    for (int j = first; j <= pos; j += KEYS * step) {
        float dot[KEYS] = {0}, k[E];
        for (int i = lane * E; i < zd; i += 32 * E) {
            Piece<X, E> piece[KEYS];
            EACH(u, KEYS) { piece[u].load(K + (size_t)(j + u * step <= pos ? j + u * step : j) * zd + i); }
            EACH(u, KEYS) {
                piece[u].get(k);
                EACH(e, E) { dot[u] = fmaf(k[e], q[i + e], dot[u]); }
            }
        }
        EACH(u, KEYS) {
            dot[u] = warp_sum(dot[u]);
            if (lane == 0 && j + u * step <= pos) { scores[j + u * step] = dot[u]; }
        }
    }
}
// Then gated (B,V) = silu(inp) * values weighted with the softmax of the scores. `lanes` threads have E neighbouring
// columns each, others other keys.
template <typename X, bool WIDE> __global__ void __launch_bounds__(1024) values_step_kernel(X* gated, int ldg,
        const float* scores, const X* V, const int* position, const X* inp, int ldi, int lanes, int c, int vd) {
    enum { E = WIDE ? 8 : 1, AHEAD = 16 / sizeof(X), KEYS = 4096 };
    __shared__ float lines[256][E], exps[KEYS], parts[32];
    int t = threadIdx.x, lane = t % 32, warps = blockDim.x / 32, groups = blockDim.x / lanes, group = t / lanes;
    int pos = *position, first = blockIdx.x * lanes * E, at = first + t % lanes * E, end = at < vd ? pos : -1;
    size_t pair = (size_t)blockIdx.z * gridDim.y + blockIdx.y;
    scores += pair * c; V += pair * c * vd + at; inp += (size_t)blockIdx.z * ldi + blockIdx.y * vd + first;
    Piece<X, E> piece[AHEAD];
    EACH(u, AHEAD) { // those of earlier tokens may be read early
        piece[u].clear();
        if (group + u * groups < end) { piece[u].load(V + (size_t)(group + u * groups) * vd); }
    }
    wait_for_inputs();
    float top = -INFINITY, sum = 0, acc[E] = {0}, v[E];
    X gate = t < lanes * E && first + t < vd ? inp[t] : from_float<X>(0);
    for (int k = t; k <= pos; k += blockDim.x) { top = fmaxf(top, scores[k]); }
    top = warp_max(top);
    if (lane == 0) { parts[t / 32] = top; }
    __syncthreads();
    top = warp_max(lane < warps ? parts[lane] : -INFINITY);
    start_next(); // not before: its weights would be read before the scores
    for (int from = 0; from <= pos; from += KEYS) {
        __syncthreads(); // all have read the parts, or the exps before
        for (int k = from + t; k <= pos && k < from + KEYS; k += blockDim.x) {
            sum += exps[k - from] = exp_of<X>(scores[k] - top);
        }
        __syncthreads();
        for (int k0 = from + group; k0 <= pos && k0 < from + KEYS; k0 += AHEAD * groups) {
            EACH(u, AHEAD) {
                int k = k0 + u * groups;
                if (k <= end && (k0 > group || k == pos)) { piece[u].load(V + (size_t)k * vd); }
            }
            EACH(u, AHEAD) {
                float p = k0 + u * groups <= pos ? exps[k0 + u * groups - from] : 0;
                piece[u].get(v);
                EACH(e, E) { acc[e] = fmaf(p, v[e], acc[e]); }
            }
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) { parts[t / 32] = sum; }
    for (int o = lanes; o < 32; o *= 2) { EACH(e, E) { acc[e] += __shfl_xor_sync(~0u, acc[e], o); } }
    if (lane < lanes) { EACH(e, E) { lines[t / 32 * lanes + lane][e] = acc[e]; } }
    __syncthreads();
    sum = warp_sum(lane < warps ? parts[lane] : 0);
    if (t >= lanes * E || first + t >= vd) { return; }
    float out = 0, x = to_float(gate);
#pragma unroll 8
    for (int k = t / E; k < warps * lanes; k += lanes) { out += lines[k][t % E]; }
    gated[(size_t)blockIdx.z * ldg + blockIdx.y * vd + first + t] = from_float<X>(x * sigmoid_of<X>(x) * out / sum);
}
template <typename X> static void attention_step(Gpu& gpu, X* gated, int ldg, float* scores, X* K, X* V,
        const int* position, const X* z, const X* inp, int ldz, const X* v, const float* gamma, const float* beta,
        const float* rotations, int B, int c, int Z, int V_dim, int H, float eps) {
    int zd = Z / H, vd = V_dim / H, most = zd > vd ? zd : vd;
    // Of one row, some 64 large blocks that read 64 or 128 bytes of a value: fewer are slower, narrower ones too.
    int lanes = B == 1 && V_dim < 4096 ? 4 : B == 1 ? 8 : 16, threads = B == 1 ? 1024 : 256;
    int count = gpu.card.multiProcessorCount * (B > 1 ? 4 : 2) / (B * H); bool is_wide = wide(zd, vd, ldz, ldg);
    launch_early(gpu, is_wide ? scores_step_kernel<X, true> : scores_step_kernel<X, false>,
                 dim3(count > 1 ? count : 1, H, B), row_grid(gpu, 1, most, 1, 1).block.x, sizeof(float) * zd, scores,
                 K, V, position, z, ldz, v, gamma, beta, rotations, c, Z, zd, vd, eps);
    launch_early(gpu, is_wide ? values_step_kernel<X, true> : values_step_kernel<X, false>,
                 dim3(ceil_div(vd, lanes * (is_wide ? 8 : 1)), H, B), threads, 0, gated, ldg, scores, V, position, inp,
                 ldz, lanes, c, vd);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model: the CPU's, with memory laid out for the GPU

#define ROW_INDEX_P(field, ...) P_##field,
#define ROW_INDEX_A(field, ...) A_##field,
enum { PARAMETERS(ROW_INDEX_P) }; enum { ACTIVATIONS(ROW_INDEX_A) };

// Statistics and losses are floats, all other activations of type X.
constexpr bool act_is_float(int i) {
    return i == A_timenorm_mean || i == A_timenorm_rstd || i == A_rmsnorm_rstd || i == A_znorm_rstd
            || i == A_attention_lse || i == A_norm_mean || i == A_norm_rstd || i == A_final_mean || i == A_final_rstd
            || i == A_losses;
}
// Cheap to compute again in the backward pass: not kept for every layer.
static bool act_is_cheap(int i) {
    return i == A_timenorm || i == A_rmsnorm || i == A_q || i == A_k || i == A_v || i == A_gated || i == A_norm
            || i == A_hidden;
}
// The row of the table that stands beside row i, as one product makes or takes both; -1 for none.
static int act_beside(int i) { return i == A_rmsnorm ? A_gated : i == A_wz ? A_wr : i == A_fc1 ? A_fc3 : -1; }
static int param_beside(int i) {
    return i == P_wz ? P_wr : i == P_wz_b ? P_wr_b : i == P_fc1 ? P_fc3 : i == P_wh1 ? P_wh2 : -1;
}

#define FIELD_OF_X(field, ...) X* field;
#define FIELD_OF_ACT(field, ...) std::conditional_t<act_is_float(A_##field), float, X>* field;
template <typename X> struct ParamsOf { PARAMETERS(FIELD_OF_X) };
template <typename X> struct ActsOf { ACTIVATIONS(FIELD_OF_ACT) };

// A tensor on the device: elements from the start of the block to layer 0's, between layers, between rows (wh1|wh2).
struct ParamPlace { size_t offset, step, rows, columns, pitch; };

// Rows that kernels read in fp32 whatever X is.
static bool param_is_float(int i) {
    return (i >= P_timenorm_w && i <= P_rmsnorm_w) || (i >= P_gamma && i <= P_norm_b)
           || (i >= P_rescale && i <= P_final_b);
}
// A block of parameters is a row of units: what is read in fp32, the embedding, each layer, the output. Of each unit
// every rank has an equal share, and of masters and moments no more (ZeRO-1). On one rank, all is one unit.
static int param_unit(int i, int l, int L) {
    return param_is_float(i) ? 0 : i == P_embed ? 1 : i == P_output ? L + 2 : 2 + l;
}

template <typename X> struct ModelOf {
    Config config;
    Spec specs[NUM_PARAMS];
    ParamPlace places[NUM_PARAMS];
    size_t size;                   // of a block below, with padding (always zero)
    int shards, units;
    float* params;                 // in fp32; if sharded, the first unit only
    float *masters, *adam_m, *adam_v; // this rank's shares; masters not sharded are params
    float* grads;
    float* received[2];            // if sharded, of a unit, in turn: its shares from all ranks
    X* weights;                    // params rounded to X; for X = float not sharded the same memory
    float* rotations;              // (c,Z/H/2,2)
    double* sums;                  // partial sums of the gradient's norm; pinned
    cudaEvent_t* came;             // if sharded, by unit: its gradients, or later its weights, from all ranks
};

// A unit in a block, and this rank's share: where in the block, where among its shares.
struct Share { size_t begin, at, size, shard; };
template <typename X> static Share model_share(const ModelOf<X>* m, int u) {
    auto start = [&](int u) {
        return u == 0 ? 0 : u == m->units ? m->size : u == 1 ? m->places[P_embed].offset
               : m->places[P_wv].offset + (u - 2) * m->places[P_wv].step;
    };
    size_t begin = start(u), size = (start(u + 1) - begin) / m->shards;
    return {begin, begin + (m->shards > 1 ? ranks.rank * size : 0), size, begin / m->shards};
}

// Lays out the tensors, unit by unit, each at a multiple of 64 elements. wh2 follows wh1 row by row, the other tensors
// that stand beside one follow it as a whole.
template <typename X> static void params_place(ModelOf<X>* m, const Config* c) {
    size_t at = 0, D = c->model_dim, V = c->value_dim; int L = c->num_layers;
    for (int u : {0, 1, 2, L + 2}) { // of the layers' units the first
        size_t first = at;
        for (int i = 0; i < NUM_PARAMS; i++) {
            int other = param_beside(i); const Spec* specs = m->specs;
            size_t more = other < 0 ? 0 : specs[other].size, step = ceil_div(specs[i].size + more, 64) * 64;
            if (param_unit(i, 0, L) != u || !specs[i].size || m->places[i].step) { continue; }
            auto place = [&](int k, size_t after) {
                size_t rows = specs[k].dims[1] ? specs[k].dims[0] : 1, columns = specs[k].size / rows;
                m->places[k] = {at + after, step, rows, columns, i == P_wh1 ? D + V : columns};
            };
            place(i, 0);
            if (more) { place(other, i == P_wh1 ? D : specs[i].size); }
            at += u == 0 ? specs[i].slots * step : step;
        }
        at = first + ceil_div(at - first, 64 * m->shards) * 64 * m->shards;
        if (u != 2) { continue; }
        for (int i = 0; i < NUM_PARAMS; i++) { if (param_unit(i, 0, L) == u) { m->places[i].step = at - first; } }
        at += (L - 1) * (at - first);
    }
    m->size = at;
}

// Pointers to layer l's tensors in a block.
template <typename P, typename Y> static P params_layer(const ParamPlace* places, Y* block, int l) {
    P p;
    for (int i = 0; i < NUM_PARAMS; i++) { ((Y**)&p)[i] = block + places[i].offset + l * places[i].step; }
    return p;
}

enum { NORM_BLOCKS = 1024 };
template <typename X> static void model_alloc(Gpu& gpu, ModelOf<X>* m, const Config* c, bool training) {
    config_check(c);
    memset(m, 0, sizeof(*m));
    m->config = *c;
    param_specs(m->specs, c);
    m->shards = training ? ranks.count : 1; // one rank alone evaluates and generates
    bool sharded = m->shards > 1, same = !sharded && std::is_same<X, float>::value;
    m->units = sharded ? c->num_layers + 3 : 1;
    params_place(m, c);
    auto floats = [&](size_t n) { return (float*)gpu_alloc(&gpu, n * sizeof(float)); };
    size_t share = m->size / m->shards;
    m->params = floats(sharded ? m->places[P_embed].offset : m->size);
    m->masters = sharded ? floats(share) : m->params;
    if (training) {
        size_t unit = 0; // the largest
        for (int u = 0; sharded && u < m->units; u++) {
            size_t n = model_share(m, u).size * m->shards;
            unit = n > unit ? n : unit;
        }
        m->grads = (float*)exchange_alloc(&gpu, (m->size + 2 * unit) * sizeof(float), false);
        m->received[0] = m->grads + m->size; m->received[1] = m->received[0] + unit;
        m->adam_m = floats(share); m->adam_v = floats(share);
    }
    size_t bytes = m->size * sizeof(X);
    m->weights = (X*)(same ? m->params : sharded ? exchange_alloc(&gpu, bytes, false) : gpu_alloc(&gpu, bytes));
    bytes = sizeof(float) * c->chunk_size * (c->z_dim / c->num_heads);
    m->rotations = (float*)gpu_alloc(&gpu, bytes);
    if (gpu.dry) { return; }
    CUDA(cudaMallocHost((void**)&m->sums, m->units * NORM_BLOCKS * sizeof(double)));
    if (sharded) { m->came = (cudaEvent_t*)xcalloc(m->units, sizeof(cudaEvent_t)); }
    for (int u = 0; sharded && u < m->units; u++) {
        CUDA(cudaEventCreateWithFlags(&m->came[u], cudaEventDisableTiming));
    }
    Model host; Config small = *c;
    small.num_layers = small.vocab_size = small.model_dim = small.norm_num_groups = small.ffn_hidden_dim = 2;
    small.value_dim = small.num_heads;
    model_alloc(&host, &small, false); // for its table of rotations
    CUDA(cudaMemcpy(m->rotations, host.rotations, bytes, cudaMemcpyHostToDevice));
    model_free(&host);
}

template <typename X> static void model_free(Gpu& gpu, ModelOf<X>* m) {
    if (m->came) { stream_after(gpu, gpu.stream, gpu.blocks); } // weights may be on their way
    gpu_sync(&gpu);
    if (m->shards > 1) { exchange_free(&gpu, m->weights, false); }
    else if ((void*)m->weights != m->params) { cudaFree(m->weights); }
    if (m->masters != m->params) { cudaFree(m->masters); }
    for (int u = 0; m->came && u < m->units; u++) { cudaEventDestroy(m->came[u]); }
    free(m->came); cudaFreeHost(m->sums);
    exchange_free(&gpu, m->grads, false);
    cudaFree(m->params); cudaFree(m->adam_m); cudaFree(m->adam_v); cudaFree(m->rotations);
}

template <typename X> __global__ void round_kernel(X* out, const float* inp, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        out[i] = from_float<X>(inp[i]);
    }
}
// After n parameters from `at` on have changed otherwise than by model_update; they stand in block.
template <typename X> static void model_round(Gpu& gpu, ModelOf<X>* m, const float* block, size_t at, size_t n) {
    if ((void*)m->weights == block) { return; }
    LAUNCH(round_kernel<X>, NORM_BLOCKS, 256, m->weights + at, block + at, n);
}

// Copies tensor i of layer l between a block on the device (params, grads, adam_m or adam_v) and the host.
template <typename X> static void tensor_copy(const ModelOf<X>* m, float* block, int i, int l, float* host,
        bool to_host) {
    const ParamPlace* p = &m->places[i];
    float* there = block + p->offset + l * p->step;
    size_t width = p->columns * sizeof(float), pitch = p->pitch * sizeof(float);
    if (to_host) { CUDA(cudaMemcpy2D(host, width, there, pitch, width, p->rows, cudaMemcpyDeviceToHost)); }
    else { CUDA(cudaMemcpy2D(there, pitch, host, width, width, p->rows, cudaMemcpyHostToDevice)); }
}
// The Backend's copy. Tensors of which a rank has a share only pass through the gradients' block, free between steps.
template <typename X> static void model_part_copy(Gpu& gpu, ModelOf<X>* m, int block, int i, int l, float* host,
        bool to_host, size_t part[2]) {
    const ParamPlace* p = &m->places[i];
    bool sharded = m->shards > 1;
    int unit = sharded ? param_unit(i, l, m->config.num_layers) : 0;
    Share s = model_share(m, unit);
    size_t first = p->offset + l * p->step, span = (p->rows - 1) * p->pitch + p->columns;
    size_t mine[2] = {s.at, s.at + s.size}; // from `first` on
    for (int k = 0; k < 2; k++) {
        mine[k] = mine[k] > first ? min_size(mine[k] - first, span) : 0;
        part[k] = mine[k] / p->pitch * p->columns + min_size(mine[k] % p->pitch, p->columns);
    }
    float *shares = block == WEIGHTS ? m->masters : block == ADAM_M ? m->adam_m : m->adam_v;
    float *whole = sharded ? m->grads : shares, *there = whole + first + mine[0];
    float* here = shares + s.shard + (first + mine[0] - s.at);
    auto copy = [&](float* to, const float* from, size_t n) {
        if (to != from && n) { CUDA(cudaMemcpyAsync(to, from, n * sizeof(float), cudaMemcpyDefault, gpu.stream)); }
    };
    if (to_host) { copy(there, here, mine[1] - mine[0]); }
    tensor_copy(m, whole, i, l, host, to_host);
    if (to_host) { return; }
    copy(here, there, mine[1] - mine[0]);
    if (block != WEIGHTS) { return; }
    if (unit == 0) { copy(m->params + first, whole + first, span); }
    model_round(gpu, m, whole, first, span);
}

template <typename X> struct StateOf {
    int B, pos;
    size_t bytes;    // of h and norm, which are one block
    float* h;        // (L,B,D,N,2)
    NormState* norm; // (L+1,B,G)
    X *k, *v;        // (L,B,H,c,Z/H), (L,B,H,c,V/H); NULL if calls end where chunks do
    float* scores;   // of one layer: (B,H,c)
    CemaCoef* coef;  // (L,D,N rounded up), made of the weights by the first step of one token
    int steps;       // of one token, since the last reset
    cudaGraphExec_t graph; // such a step
};

template <typename X> static void state_alloc(Gpu& gpu, StateOf<X>* s, const Config* c, int B, bool cache) {
    size_t layers = c->num_layers, chunk = (size_t)B * c->chunk_size, h = layers * B * c->model_dim * c->cema_ndim * 2;
    memset(s, 0, sizeof(*s));
    s->B = B; s->bytes = h * sizeof(float) + (layers + 1) * B * c->norm_num_groups * sizeof(NormState);
    s->h = (float*)gpu_alloc(&gpu, s->bytes); s->norm = (NormState*)(s->h + h);
    if (!cache) { return; }
    s->k = (X*)gpu_alloc(&gpu, layers * chunk * c->z_dim * sizeof(X));
    s->v = (X*)gpu_alloc(&gpu, layers * chunk * c->value_dim * sizeof(X));
    s->scores = (float*)gpu_alloc(&gpu, chunk * c->num_heads * sizeof(float));
    s->coef = (CemaCoef*)gpu_alloc(&gpu, layers * c->model_dim * cema_width(c->cema_ndim) * sizeof(CemaCoef));
}
template <typename X> static void state_free(Gpu& gpu, StateOf<X>* s) {
    gpu_sync(&gpu);
    cudaFree(s->h); cudaFree(s->k); cudaFree(s->v); cudaFree(s->scores); cudaFree(s->coef);
    if (s->graph) { CUDA(cudaGraphExecDestroy(s->graph)); }
}

// A tensor of activations on the device: bytes from the start of the block and between layers (0: they share one),
// elements between timesteps (0: absent).
struct ActPlace { size_t offset, step, pitch; };
enum { KEEP_CHEAPLY = KEEP_ALL + 1 }; // like KEEP_ALL, but what is cheap is computed again

template <typename X> struct PassOf {
    int B, T, keep;
    ActPlace places[NUM_ACTS], dplaces[NUM_ACTS];
    char *acts, *grads;                // the blocks
    size_t acts_size, grads_size;
    float* carries;                    // CEMA's states between segments, by layer
    size_t carries_step;
    StateOf<X> before;          // see the CPU's
    // host: pinned, of the 4 others' sizes; order, begin: see embedding_backward
    int *host, *tokens, *targets, *order, *begin;
    int runs;
    cudaEvent_t copied;
    Masks masks;
};

// Lays out activations (or their gradients) and returns their size in bytes. everything: also what only tests look at.
template <typename X> static size_t acts_place(ActPlace* places, const Config* c, size_t BT, int keep, bool grads,
        bool everything) {
    Spec specs[NUM_ACTS]; size_t at = 0;
    act_specs(specs, c, BT, keep == KEEP_CHEAPLY ? KEEP_ALL : keep);
    for (int i = 0; i < NUM_ACTS; i++) {
        int other = act_beside(i); bool own = specs[i].slots > 1 && !(keep == KEEP_CHEAPLY && act_is_cheap(i));
        size_t width = specs[i].size / BT, more = other < 0 ? 0 : specs[other].size / BT, pitch = width + more;
        size_t bytes = act_is_float(i) ? sizeof(float) : sizeof(X), slot = ceil_div(BT * pitch * bytes, 256) * 256;
        if (!width || places[i].pitch || ((i == A_znorm || i == A_znorm_rstd) && !everything)) { continue; }
        // lse's place: see attention_backward
        if (grads && ((act_is_float(i) && i != A_attention_lse) || i == A_logits)) { continue; }
        if (grads && i == A_embed && keep != KEEP_ALL) { continue; } // it is .out's, below
        places[i] = {at, own ? slot : 0, pitch};
        if (more) { places[other] = {at + width * bytes, own ? slot : 0, pitch}; }
        at += own ? c->num_layers * slot : slot;
    }
    if (grads && keep != KEEP_ALL) { places[A_embed] = places[A_out]; }
    return at;
}

template <typename X> static void pass_alloc(Gpu& gpu, PassOf<X>* s, const Config* c, int B, int T, int keep,
        int keep_grads) {
    size_t BT = (size_t)B * T, carries = cema_carries_size(&gpu, B, T, c->model_dim, c->cema_ndim);
    if (BT > INT_MAX / 2) { die("%d x %d tokens in one pass are too many for the GPU program", B, T); }
    memset(s, 0, sizeof(*s));
    s->B = B; s->T = T; s->keep = keep;
    s->acts_size = acts_place<X>(s->places, c, BT, keep, false, keep_grads == KEEP_ALL);
    s->acts = (char*)gpu_alloc(&gpu, s->acts_size);
    if (keep != KEEP_NONE) {
        s->grads_size = acts_place<X>(s->dplaces, c, BT, keep_grads, true, keep_grads == KEEP_ALL);
        s->grads = (char*)gpu_alloc(&gpu, s->grads_size);
        s->carries_step = carries;
        if (ranks.chunks > 1) { state_alloc(gpu, &s->before, c, B, false); }
    }
    s->carries = (float*)gpu_alloc(&gpu, sizeof(float) * carries * (keep == KEEP_NONE ? 1 : c->num_layers));
    s->tokens = (int*)gpu_alloc(&gpu, sizeof(int) * (4 * BT + 1));
    if (gpu.dry) { return; }
    s->targets = s->tokens + BT; s->order = s->targets + BT; s->begin = s->order + BT;
    CUDA(cudaMallocHost((void**)&s->host, sizeof(int) * (4 * BT + 1)));
    CUDA(cudaEventCreateWithFlags(&s->copied, cudaEventDisableTiming));
}

template <typename X> static void pass_free(Gpu& gpu, PassOf<X>* s) {
    gpu_sync(&gpu);
    cudaFree(s->acts); cudaFree(s->grads); cudaFree(s->carries); cudaFree(s->tokens);
    cudaFreeHost(s->host);
    state_free(gpu, &s->before);
    cudaEventDestroy(s->copied);
}

template <typename X> static ActsOf<X> acts_layer(const ActPlace* places, char* block, int l) {
    ActsOf<X> a;
    for (int i = 0; i < NUM_ACTS; i++) { // fields are of different types, hence memcpy
        char* p = places[i].pitch ? block + places[i].offset + l * places[i].step : NULL;
        memcpy((char*)&a + i * sizeof(p), &p, sizeof(p));
    }
    return a;
}

// The output of layer l - 1, or of the embedding.
template <typename X> static X* block_input(const ActPlace* places, char* block, int l) {
    return l ? acts_layer<X>(places, block, l - 1).out : acts_layer<X>(places, block, 0).embed;
}

template <typename X> static void state_reset(Gpu& gpu, StateOf<X>* s) {
    CUDA(cudaMemsetAsync(s->h, 0, s->bytes, gpu.stream));
    s->pos = s->steps = 0;
}
// See the CPU's. A row has a piece of each layer's slot.
__global__ void norm_round_kernel(double* norm, size_t n) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < n) { norm[i] = float_rounded(norm[i]); }
}
template <typename X> static void state_carry(Gpu& gpu, StateOf<X>* s, const Config* c, const bool* fresh) {
    size_t norm = sizeof(NormState) * c->norm_num_groups, h = sizeof(float) * c->model_dim * c->cema_ndim * 2;
    size_t L = c->num_layers, B = s->B, n = (L + 1) * B * c->norm_num_groups * 3;
    LAUNCH(norm_round_kernel, ceil_div(n, 256), 256, (double*)s->norm, n);
    for (size_t b = 0; b < B; b++) {
        if (!fresh[b]) { continue; }
        CUDA(cudaMemset2DAsync((char*)s->norm + b * norm, B * norm, 0, norm, L + 1, gpu.stream));
        CUDA(cudaMemset2DAsync((char*)s->h + b * h, B * h, 0, h, L, gpu.stream));
    }
}
template <typename X> static StateOf<X> state_layer(const StateOf<X>* s, const Config* c, int l) {
    StateOf<X> r = {};
    if (!s || !s->h) { return r; }
    size_t chunk = (size_t)s->B * c->chunk_size;
    r = *s; r.norm += (size_t)l * s->B * c->norm_num_groups;
    r.h += (size_t)l * s->B * c->model_dim * c->cema_ndim * 2;
    if (s->k && l < c->num_layers) {
        r.k += l * chunk * c->z_dim; r.v += l * chunk * c->value_dim;
        r.coef += (size_t)l * c->model_dim * cema_width(c->cema_ndim);
    }
    return r;
}

// What every function below needs: sizes; layer l's input, weights, those in fp32, activations, dropout. Tensors that
// stand once are the same of any layer.
#define OF_LAYER(m, s, l) \
    const Config* c = &(m)->config; \
    int B = (s)->B, T = (s)->T, L = c->num_layers, D = c->model_dim, H = c->num_heads, Z = c->z_dim, V = c->value_dim; \
    int F = c->ffn_hidden_dim, N = c->cema_ndim, G = c->norm_num_groups, vocab = c->vocab_size; \
    int FF = c->swiglu ? 2 * F : F, ZR = Z + V, MU = D + V; /* of fc1|fc3, wz|wr, m|u */ \
    size_t rows = (size_t)B * T; float eps = c->norm_eps; \
    Dropouts drop = dropouts_at((s)->masks, T, l); \
    const X* x = block_input<X>((s)->places, (s)->acts, l); \
    ParamsOf<X> p = params_layer<ParamsOf<X>>((m)->places, (m)->weights, l); \
    Params w = params_layer<Params>((m)->places, (m)->params, l); \
    ActsOf<X> a = acts_layer<X>((s)->places, (s)->acts, l)

// One block, Figure 3 of the paper: x (B,T,D) to out (B,T,D). start and end: see State; either may be NULL. again: in
// the backward pass; what comes before a slice is known then.
template <typename X> static void block_forward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* start, const StateOf<X>* end, bool again = false) {
    OF_LAYER(m, s, l);
    int pos = start ? start->pos : 0;
    StateOf<X> in = state_layer(again && s->before.h ? &s->before : start, c, l), next = state_layer(end, c, l);
    StateOf<X> before = state_layer(again ? NULL : &s->before, c, l);

    // Long memory: n = timestep_norm(x), e = cema(n), m = rms_norm(e).
    timestepnorm_forward(gpu, a.timenorm, a.timenorm_mean, a.timenorm_rstd, next.norm, before.norm, in.norm, x,
                         w.timenorm_w, w.timenorm_b, B, T, D, G, eps);
    int keys = next.k ? c->chunk_size : T, at_k = next.k ? pos : 0;
    X *k = next.k ? next.k : a.k, *v = next.k ? next.v : a.v;
    if (before.h) { cema_slice(gpu, a.timenorm, false, cema_params(w), B, T, D, N); }
    matmul_forward<X>(gpu, a.wv, V, a.timenorm, D, p.wv, p.wv_b, NULL, 0, rows, D, V);
    value_forward(gpu, v, a.wv, B, T, keys, at_k, V, H);
    if (before.h) { in.h = cema_slice_carry(gpu, before.h, in.h, false, B, T, D, N); }
    cema_forward(gpu, a.cema, next.h, s->carries + l * s->carries_step, in.h, a.timenorm, cema_params(w),
                 B, T, D, N, before.h != NULL);
    norm_forward<X>(gpu, a.rmsnorm, MU, NULL, a.rmsnorm_rstd, a.cema, w.rmsnorm_w, NULL, rows, D, eps, drop.rmsnorm);

    // Short memory: attention inside the chunk, to the cache where there is one. One product makes z and the gate's r.
    matmul_forward<X>(gpu, a.wz, ZR, a.rmsnorm, MU, p.wz, p.wz_b, NULL, 0, rows, D, ZR);
    qk_forward<X>(gpu, a.q, k, a.znorm, a.znorm_rstd, a.wz, ZR, w.gamma, w.beta, m->rotations, B, T, keys, pos, at_k,
                  c->chunk_size, Z, H, eps);
    attention_forward(gpu, a.attention, a.attention_lse, a.q, k, v, B, T, keys, at_k, c->chunk_size, H, Z, V,
                      drop.keys);

    // The gate, and the first hop: y = [m | o*r] [Wh1 | Wh2]^T + bh1 + x.
    gate_forward(gpu, a.gated, MU, a.attention, a.wr, ZR, B, T, V, H, drop.gated);
    matmul_forward<X>(gpu, a.mega, D, a.rmsnorm, MU, p.wh1, p.wh1_b, drop.mega.drop ? NULL : x, D, rows, MU, D);
    dropout<X>(gpu, a.mega, NULL, a.mega, x, drop.mega, rows, D);

    // Feed-forward, and the second hop: out = ffn(layer_norm(y)) + x.
    norm_forward<X>(gpu, a.norm, D, a.norm_mean, a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D, eps);
    matmul_forward<X>(gpu, a.fc1, FF, a.norm, D, p.fc1, NULL, NULL, 0, rows, D, FF);
    silu_forward(gpu, a.hidden, a.fc1, a.fc3, FF, rows, F, drop.hidden);
    const X* add = c->rescale_nffn ? NULL : x;
    X* ffn = c->rescale_nffn ? a.fc2 : a.out;
    matmul_forward<X>(gpu, ffn, D, a.hidden, F, p.fc2, NULL, drop.fc2.drop ? NULL : add, D, rows, F, D);
    dropout<X>(gpu, ffn, NULL, ffn, add, drop.fc2, rows, D);
    if (c->rescale_nffn) { ffn_rescale(gpu, a.out, NULL, a.fc2, x, w.rescale, rows, D); }
}

// The same for one token more of each stream.
template <typename X> static void block_step(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* state) {
    OF_LAYER(m, s, l); bool rescale = c->rescale_nffn;
    StateOf<X> past = state_layer(state, c, l);
    memory_step(gpu, a.timenorm, a.cema, past.norm, past.h, x, w.timenorm_w, w.timenorm_b, past.coef, w.cema_omega, B,
                D, G, N, eps);
    product_forward<X>(gpu, B, eps, {a.wz, a.rmsnorm, MU, D, ZR, p.wz, p.wz_b, NULL, a.cema, NULL, w.rmsnorm_w, NULL,
                       NULL, a.rmsnorm_rstd}, {a.wv, a.timenorm, D, D, V, p.wv, p.wv_b});
    attention_step(gpu, a.gated, MU, past.scores, past.k, past.v, s->tokens + B, a.wz, a.wr, ZR, a.wv, w.gamma, w.beta,
                   m->rotations, B, c->chunk_size, Z, V, H, eps);
    product_forward<X>(gpu, B, eps, {a.mega, a.rmsnorm, MU, MU, D, p.wh1, p.wh1_b, x});
    product_forward<X>(gpu, B, eps, {a.fc1, a.norm, D, D, FF, p.fc1, NULL, NULL, a.mega, NULL, w.norm_w, w.norm_b,
                       a.norm_mean, a.norm_rstd});
    product_forward<X>(gpu, B, eps, {rescale ? a.fc2 : a.out, a.hidden, F, F, D, p.fc2, NULL, rescale ? NULL : x,
                       a.fc1, a.fc3});
    if (rescale) { ffn_rescale(gpu, a.out, NULL, a.fc2, x, w.rescale, B, D); }
}

// From dout to dx. Gradients of weights come after the backward kernels, which make again what was not kept.
template <typename X> static void block_backward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* start, const StateOf<X>* dstart) {
    OF_LAYER(m, s, l); int C = c->chunk_size;
    X* dx = block_input<X>(s->dplaces, s->grads, l);
    Params g = params_layer<Params>(m->places, m->grads, l);
    ActsOf<X> d = acts_layer<X>(s->dplaces, s->grads, l);
    StateOf<X> in = state_layer(s->before.h ? &s->before : start, c, l), din = state_layer(dstart, c, l);

    bool again = s->keep == KEEP_CHEAPLY;
    X *hidden = again ? a.hidden : NULL, *norm = again ? a.norm : NULL, *gated = again ? a.gated : NULL;
    X *rmsnorm = again ? a.rmsnorm : NULL;
    const X* dffn = d.out;
    if (c->rescale_nffn) { ffn_rescale(gpu, d.fc2, g.rescale, d.out, a.fc2, w.rescale, rows, D); dffn = d.fc2; }
    dffn = dropout<X>(gpu, d.timenorm, NULL, dffn, NULL, drop.fc2, rows, D);
    matmul_backward(gpu, d.hidden, F, dffn, D, p.fc2, rows, F, D, false);
    silu_backward(gpu, d.fc1, d.fc3, hidden, d.hidden, a.fc1, a.fc3, FF, rows, F, drop.hidden);
    matmul_backward_weight(gpu, g.fc2, dffn, D, a.hidden, F, rows, F, D);
    matmul_backward(gpu, d.norm, D, d.fc1, FF, p.fc1, rows, D, FF, false);
    norm_backward<X>(gpu, d.mega, g.norm_w, g.norm_b, drop.mega.drop ? NULL : g.wh1_b, norm, d.norm, D, a.norm_mean,
                     a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D);
    matmul_backward_weight(gpu, g.fc1, d.fc1, FF, a.norm, D, rows, D, FF);

    const X* dsum = dropout<X>(gpu, d.timenorm, g.wh1_b, d.mega, NULL, drop.mega, rows, D);
    matmul_backward(gpu, d.rmsnorm, MU, dsum, D, p.wh1, rows, MU, D, false); // dm | d(o*r)
    gate_backward(gpu, d.attention, d.wr, g.wr_b, d.attention_lse, gated, d.gated, MU, a.attention, a.wr, ZR, B, T, V,
                  H, drop.gated);
    if (again) {
        qk_forward<X>(gpu, a.q, a.k, NULL, NULL, a.wz, ZR, w.gamma, w.beta, m->rotations, B, T, T, 0, 0, C, Z, H, eps);
        value_forward(gpu, a.v, a.wv, B, T, T, 0, V, H);
        timestepnorm_again(gpu, a.timenorm, a.timenorm_mean, a.timenorm_rstd, x, w.timenorm_w, w.timenorm_b, rows, D,
                           G);
    }
    attention_backward(gpu, d.q, d.k, d.v, d.attention, d.attention_lse, a.attention_lse, a.q, a.k, a.v, B, T, C, H, Z,
                       V, drop.keys);
    qk_backward(gpu, d.wz, g.gamma, g.beta, g.wz_b, d.znorm, d.q, d.k, a.wz, ZR, w.gamma, m->rotations, B, T, C, Z, H,
                eps);
    matmul_backward(gpu, d.rmsnorm, MU, d.wz, ZR, p.wz, rows, D, ZR, true);
    norm_backward<X>(gpu, d.cema, g.rmsnorm_w, NULL, NULL, rmsnorm, d.rmsnorm, MU, NULL, a.rmsnorm_rstd, a.cema,
                     w.rmsnorm_w, NULL, rows, D, drop.rmsnorm);
    if (s->before.h) { cema_slice(gpu, d.cema, true, cema_params(w), B, T, D, N); }
    matmul_backward_weight(gpu, g.wh1, dsum, D, a.rmsnorm, MU, rows, MU, D);
    matmul_backward_weight(gpu, g.wz, d.wz, ZR, a.rmsnorm, MU, rows, D, ZR);

    value_backward(gpu, d.wv, g.wv_b, d.v, a.wv, B, T, V, H);
    const float* after = s->before.h ? cema_slice_carry(gpu, NULL, NULL, true, B, T, D, N) : NULL;
    cema_backward(gpu, d.timenorm, cema_params(g), din.h, d.cema, s->carries + l * s->carries_step, in.h, after,
                  a.timenorm, cema_params(w), B, T, D, N, after != NULL);
    matmul_backward(gpu, d.timenorm, D, d.wv, V, p.wv, rows, D, V, true);

    // x has three readers: the second hop, the first hop and the timestep norm. (dx may be d.out itself.)
    timestepnorm_backward<X>(gpu, dx, g.timenorm_w, g.timenorm_b, din.norm, d.out, d.mega, d.timenorm, a.timenorm_mean,
                             a.timenorm_rstd, in.norm, x, w.timenorm_w, B, T, D, G, [&] { matmul_backward_weight(gpu,
                             g.wv, d.wv, V, a.timenorm, D, rows, D, V); });
}

// Copies n ints to the device from pinned memory, which is free again when the last copies are done.
template <typename X> static void pass_upload(Gpu& gpu, const PassOf<X>* s, int* to, size_t n) {
    CUDA(cudaMemcpyAsync(to, s->host + (to - s->tokens), n * sizeof(int), cudaMemcpyHostToDevice, gpu.stream));
    CUDA(cudaEventRecord(s->copied, gpu.stream));
}

// Before what has come of a unit is read.
template <typename X> static void model_wait(Gpu& gpu, const ModelOf<X>* m, int u) {
    if (m->came) { CUDA(cudaStreamWaitEvent(gpu.stream, m->came[u], 0)); }
}

// tokens (B,T), on the host, or NULL for those that model_draw left on the device, to logits (B,T,vocab) there; see the
// CPU's. Returns at once, the GPU goes on working. One token more for a cache is always the same work: from the third
// one on, a graph's.
template <typename X> static void model_forward(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens,
        const StateOf<X>* start, StateOf<X>* end) {
    OF_LAYER(m, s, 0);
    bool step = T == 1 && end && end->k && start == end; // one token more of each stream
    if (tokens) {
        CUDA(cudaEventSynchronize(s->copied));
        memcpy(s->host, tokens, rows * sizeof(int));
        if (step) { s->host[rows] = end->pos; }
        pass_upload(gpu, s, s->tokens, rows + step);
    }
    for (int u = 0; u < (step ? m->units : min_int(m->units, 2)); u++) { model_wait(gpu, m, u); }
    auto work = [&] {
        embedding_forward(gpu, a.embed, s->tokens, p.embed, embedding_scale(c), rows, D, drop.embed);
        for (int l = 0; l < L; l++) {
            if (step) { block_step(gpu, m, s, l, end); continue; }
            model_wait(gpu, m, 2 + l); block_forward(gpu, m, s, l, start, end);
        }
        const X* x = block_input<X>(s->places, s->acts, L);
        NormState *before = state_layer(start, c, L).norm, *after = state_layer(end, c, L).norm;
        if (step) {
            memory_step(gpu, a.final, (X*)NULL, after, NULL, x, w.final_w, w.final_b, NULL, NULL, B, D, G, 1, eps);
        } else {
            timestepnorm_forward(gpu, a.final, a.final_mean, a.final_rstd, after, state_layer(&s->before, c, L).norm,
                                 before, x, w.final_w, w.final_b, B, T, D, G, eps);
            model_wait(gpu, m, m->units - 1);
        }
        product_forward<X>(gpu, rows, 0, {a.logits, a.final, D, D, vocab, c->share_emb ? p.embed : p.output});
    };
    for (int l = 0; step && !end->steps && l < L; l++) {
        int K = cema_width(N);
        LAUNCH(cema_coefficients_kernel, ceil_div(D * K, 128), 128, state_layer(end, c, l).coef, NULL,
               cema_params(params_layer<Params>(m->places, m->params, l)), D, N, K);
    }
    if (step && end->steps++ && !end->graph) { // the first time, plans were made and memory taken
        cudaGraph_t graph;
        CUDA(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
        work();
        CUDA(cudaStreamEndCapture(gpu.stream, &graph));
        CUDA(cudaGraphInstantiate(&end->graph, graph, 0));
        CUDA(cudaGraphDestroy(graph));
    }
    if (step && end->graph) { CUDA(cudaGraphLaunch(end->graph, gpu.stream)); } else { work(); }
    if (end) { end->pos = ((start ? start->pos : 0) + T) % c->chunk_size; }
}

// Draws the next token of each stream from the last logits (B,vocab), as the CPU's sample does: to drawn (B) and, with
// their position, to tokens (B+1) for the next model_forward. A block draws one token, each of its 32 warps has a part
// of the vocabulary.
template <typename X> __global__ void __launch_bounds__(1024) sample_kernel(int* tokens, int* drawn, const X* logits,
        int vocab, int pos, double temperature, int top_k, float top_p, uint64_t seed, uint64_t key, int index) {
    enum { TRIED = 7 }; // values of three bits but zero
    __shared__ float parts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = (vocab + 1023) / 1024 * 32, turn = 0;
    int begin = warp * size, end = min(begin + size, vocab), at = 0, last = 0;
    logits += (size_t)blockIdx.x * vocab;
    float top = -INFINITY, least = 0, part = 0, before = 0, sum = 0, scale = fmin(1 / temperature, 1e30);
    auto each = [&](auto f) { // of this lane's logits
        for (int v = begin + lane; v < end; v += 8 * 32) { EACH(i, 8) { f(v + 32 * i); } }
    };
    each([&](int v) { top = fmaxf(top, v < end ? to_float(logits[v]) : -INFINITY); });
    top = warp_max(top);
    if (lane == 0) { parts[warp] = top; }
    __syncthreads();
    top = warp_max(parts[lane]);
    auto p = [&](int v) {
        float x = v < end ? exp_of<X>((to_float(logits[v]) - top) * scale) : 0;
        return x >= least ? x : 0;
    };
    for (int cut = 0; cut < 2; cut++) { // the least p to keep, by top_k and by top_p: three of its bits at a time
        if (cut ? top_p >= 1 : !top_k) { continue; }
        float all[1] = {0}; uint32_t bits = 0;
        each([&](int v) { all[0] += p(v); });
        row_sum(all, turn);
        for (int shift = 27; shift >= 0; shift -= 3) {
            float kept[TRIED] = {0}; int k = 0;
            each([&](int v) {
                float x = p(v);
                EACH(j, TRIED) { kept[j] += __float_as_uint(x) < bits + ((j + 1u) << shift) ? 0 : cut ? x : 1; }
            });
            row_sum(kept, turn);
            EACH(j, TRIED) { k += kept[j] >= (cut ? top_p * all[0] : top_k); }
            bits += (uint32_t)k << shift;
        }
        least = fminf(__uint_as_float(bits), 1); // the likeliest stays
    }
    each([&](int v) { part += p(v); });
    part = warp_sum(part);
    __syncthreads(); // all have read the tops
    if (lane == 0) { parts[warp] = part; }
    __syncthreads();
    float u = temperature > 0 ? random_uniform(seed, key + ((uint64_t)blockIdx.x << 32), index) : 0; // or the first
    u *= warp_sum(parts[lane]);
    for (int w = 0; w < 32; w++) { // the last part that begins at u or before
        if (parts[w] > 0 && sum <= u) { at = w; before = sum; }
        sum += parts[w];
    }
    if (warp != at) { return; }
    for (int v = begin + lane; v - lane < end; v += 32) {
        float x = p(v), upto = x;
        for (int o = 1; o < 32; o *= 2) {
            float y = __shfl_up_sync(~0u, upto, o);
            upto += lane >= o ? y : 0;
        }
        unsigned some = __ballot_sync(~0u, x > 0), there = __ballot_sync(~0u, x > 0 && u < before + upto);
        if (some) { last = v - lane + (there ? __ffs(there) - 1 : 31 - __clz(some)); }
        if (there) { break; }
        before += __shfl_sync(~0u, upto, 31);
    }
    if (lane == 0) { tokens[blockIdx.x] = drawn[blockIdx.x] = last; }
    if (lane == 0 && blockIdx.x == 0) { tokens[gridDim.x] = pos; }
}
template <typename X> static void model_draw(Gpu& gpu, const PassOf<X>* s, const Options* o, int* drawn, int pos,
        uint64_t key, int index) {
    int vocab = o->model.vocab_size;
    const X* logits = acts_layer<X>(s->places, s->acts, 0).logits;
    LAUNCH(sample_kernel<X>, s->B, 1024, s->tokens, drawn, logits, vocab, pos, o->temperature, o->top_k, o->top_p,
           o->seed, key, index);
}

__device__ inline float add(float x, float y) { return x + y; }
__device__ inline float4 add(float4 v, float4 w) { return {v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w}; }
// Each block's part of the sum of n floats, or of the squares of n float4, in double. With out these are sums, in
// order, of `count` parts. 8 blocks to a multiprocessor: NORM_BLOCKS of them run at a time.
template <typename V> __global__ void __launch_bounds__(256, 8) sum_kernel(double* sums, const V* inp, size_t n, V* out,
        int count) {
    __shared__ double part[256];
    double s = 0;
    for (size_t i = blockIdx.x * (size_t)256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) {
        V v = inp[i];
        for (int r = 1; r < count; r++) { v = add(v, inp[r * n + i]); }
        if (out) { out[i] = v; }
        if constexpr (sizeof(V) == 4) { s += v; }
        else { s += (double)v.x * v.x + (double)v.y * v.y + ((double)v.z * v.z + (double)v.w * v.w); }
    }
    part[threadIdx.x] = s;
    __syncthreads();
    for (int o = 128; o; o /= 2) {
        if (threadIdx.x < o) { part[threadIdx.x] += part[threadIdx.x + o]; }
        __syncthreads();
    }
    if (threadIdx.x == 0) { sums[blockIdx.x] = part[0]; }
}
// Losses of the last forward pass and their sum, on the device; with dloss != 0 logits become dlogits.
template <typename X> static void model_losses(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* targets,
        float dloss, double* sum) {
    ActsOf<X> a = acts_layer<X>(s->places, s->acts, 0);
    size_t rows = (size_t)s->B * s->T;
    CUDA(cudaEventSynchronize(s->copied));
    memcpy(s->host + (s->targets - s->tokens), targets, rows * sizeof(int));
    pass_upload(gpu, s, s->targets, rows);
    crossentropy(gpu, a.losses, a.logits, s->targets, dloss, rows, m->config.vocab_size);
    LAUNCH(sum_kernel<float>, 1, 256, sum, a.losses, rows, NULL, 1);
}

// Ends what unit_reduce has begun for a unit: this rank's share of it becomes the sum of all ranks' gradients; the sums
// of squares are left for model_grad_norm.
template <typename X> static void unit_reduced(Gpu& gpu, const ModelOf<X>* m, int u) {
    Share s = model_share(m, u);
    if (!s.size) { return; }
    model_wait(gpu, m, u);
    LAUNCH(sum_kernel<float4>, NORM_BLOCKS, 256, m->sums + u * NORM_BLOCKS, (const float4*)m->received[u & 1],
           s.size / 4, (float4*)(m->grads + s.at), m->shards);
}
// Begins to add up a unit's gradients over all ranks, in their order: each share goes to its rank, beside what follows
// in gpu.stream. NCCL's own reduce-scatter would take multiprocessors from the matrix products. Units come in falling
// order: each call ends the unit of the call before, that for unit 0 its own too.
template <typename X> static void unit_reduce(Gpu& gpu, const ModelOf<X>* m, int u) {
    Share s = model_share(m, u);
    if (s.size) {
        stream_after(gpu, gpu.blocks, gpu.stream);
        NCCL(ncclAlltoAll(m->grads + s.begin, m->received[u & 1], s.size, ncclFloat, gpu.world, gpu.blocks));
        CUDA(cudaEventRecord(m->came[u], gpu.blocks));
    }
    if (u + 1 < m->units) { unit_reduced(gpu, m, u + 1); }
    if (u == 0) { unit_reduced(gpu, m, 0); }
}

// Adds to the gradients, or with gpu.accumulate off assigns them, from dlogits, which model_loss has left in logits.
template <typename X> static void model_backward(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens,
        const StateOf<X>* start, const StateOf<X>* dstart) {
    OF_LAYER(m, s, 0);
    Params g = params_layer<Params>(m->places, m->grads, 0);
    ActsOf<X> d = acts_layer<X>(s->dplaces, s->grads, 0);
    StateOf<X> in = state_layer(s->before.h ? &s->before : start, c, L), din = state_layer(dstart, c, L);

    // Positions sorted by token, for the embedding at the end; the GPU is still busy with the forward pass.
    CUDA(cudaEventSynchronize(s->copied));
    int *order = s->host + (s->order - s->tokens), *begin = s->host + (s->begin - s->tokens);
    int* count = (int*)xcalloc(vocab + 1, sizeof(int));
    for (size_t r = 0; r < rows; r++) { count[tokens[r] + 1]++; }
    s->runs = 0;
    for (int v = 0; v < vocab; v++) {
        if (count[v + 1]) { begin[s->runs++] = count[v]; }
        count[v + 1] += count[v];
    }
    begin[s->runs] = rows;
    for (size_t r = 0; r < rows; r++) { order[count[tokens[r]]++] = r; }
    free(count);
    pass_upload(gpu, s, s->order, 2 * rows + 1);

    matmul_backward(gpu, d.final, D, a.logits, vocab, c->share_emb ? p.embed : p.output, rows, D, vocab, false);
    matmul_backward_weight(gpu, c->share_emb ? g.embed : g.output, a.logits, vocab, a.final, D, rows, D, vocab);
    if (gpu.reduce) { unit_reduce(gpu, m, m->units - 1); }
    timestepnorm_backward<X>(gpu, block_input<X>(s->dplaces, s->grads, L), g.final_w, g.final_b, din.norm, NULL, NULL,
                             d.final, a.final_mean, a.final_rstd, in.norm, block_input<X>(s->places, s->acts, L),
                             w.final_w, B, T, D, G);
    for (int l = L - 1; l >= 0; l--) { // with --recompute, only the last layer's activations are still there
        if (s->keep == KEEP_BLOCKS && l < L - 1) { block_forward<X>(gpu, m, s, l, start, NULL, true); }
        block_backward(gpu, m, s, l, start, dstart);
        if (gpu.reduce) { unit_reduce(gpu, m, 2 + l); }
    }
    if (!c->share_emb && !gpu.accumulate) {
        CUDA(cudaMemsetAsync(g.embed, 0, (size_t)vocab * D * sizeof(float), gpu.stream));
    }
    embedding_backward(gpu, g.embed, d.embed, s->tokens, s->order, s->begin, s->runs, embedding_scale(c), D,
                       drop.embed);
    for (int u = 1; gpu.reduce && u >= 0; u--) { unit_reduce(gpu, m, u); }
}

// Global L2 norm of the gradient, which unit_reduced has added up over the ranks; waits for the GPU.
template <typename X> static double model_grad_norm(Gpu& gpu, const ModelOf<X>* m) {
    double sum = 0;
    if (m->shards == 1) {
        LAUNCH(sum_kernel<float4>, NORM_BLOCKS, 256, m->sums, (const float4*)m->grads, m->size / 4, NULL, 1);
    }
    gpu_sync(&gpu);
    for (int u = 0; u < m->units; u++) {
        if (!model_share(m, u).size) { continue; }
        for (int i = 0; i < NORM_BLOCKS; i++) { sum += m->sums[u * NORM_BLOCKS + i]; }
    }
    all_sum(&sum, 1);
    return sqrt(sum);
}

// AdamW, see the CPU's; the new weights are rounded to X in the same pass.
template <typename X> __global__ void update_kernel(float* w, X* rounded, const float* g, float* m1, float* m2,
        size_t n, float keep, float size, float correction, float beta1, float beta2, float beta1c, float beta2c,
        float eps, float scale) {
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * 4;
    if (i >= n) { return; }
    float wv[4], gv[4], mv[4], vv[4];
    load(wv, w + i); load(gv, g + i); load(mv, m1 + i); load(vv, m2 + i);
    EACH(k, 4) {
        float grad = gv[k] * scale;
        mv[k] = beta1 * mv[k] + beta1c * grad; vv[k] = beta2 * vv[k] + beta2c * grad * grad;
        wv[k] = wv[k] * keep - size * mv[k] / (sqrtf(vv[k]) * correction + eps);
    }
    store(w + i, wv); store(m1 + i, mv); store(m2 + i, vv);
    if ((void*)rounded != w) { store(rounded + i, wv); }
}
template <typename X> static void model_update(Gpu& gpu, ModelOf<X>* m, const Options* o, double lr, int step,
        double grad_scale) {
    float keep = 1.0 - lr * o->weight_decay, size = lr / (1.0 - pow(o->beta1, step)),
            correction = 1.0 / sqrt(1.0 - pow(o->beta2, step));
    for (int u = 0; u < m->units; u++) { // while one is updated, those before it go to all ranks, as model_wait knows
        Share s = model_share(m, u); bool floats = m->shards > 1 && u == 0;
        auto launch = [&](auto* to) {
            typedef std::remove_pointer_t<decltype(to)> Y;
            LAUNCH(update_kernel<Y>, ceil_div(s.size, 1024), 256, m->masters + s.shard, to + s.at, m->grads + s.at,
                   m->adam_m + s.shard, m->adam_v + s.shard, s.size, keep, size, correction, o->beta1, o->beta2,
                   1.0 - o->beta1, 1.0 - o->beta2, o->adam_eps, grad_scale);
            if (m->shards == 1) { return; }
            stream_after(gpu, gpu.blocks, gpu.stream);
            NCCL(ncclAllGather(to + s.at, to + s.begin, s.size * sizeof(*to), ncclUint8, gpu.world, gpu.blocks));
            CUDA(cudaEventRecord(m->came[u], gpu.blocks));
        };
        if (!s.size) { continue; }
        if (floats) { launch(m->params); } else { launch(m->weights); }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The backend: what the loops of train_megalodon.c ask of a GPU

template <typename X> struct GpuBackend {
    Gpu gpu;
    ModelOf<X> m;
    PassOf<X> pass, stream; // of a micro-step, of at most a chunk
    StateOf<X> state;       // what the stream carries
    StateOf<X>* carried;    // with --carry: what comes before each micro-step, and at [accum] what comes after one
    double* sums;           // of the losses of each micro-step; pinned
    double dloss;
    int micro, accum;       // micro-steps since the last update, and of a step
    int* drawn;             // tokens; pinned
    cudaEvent_t draw_done;
};
template <typename X> static GpuBackend<X>* of(void* self) { return (GpuBackend<X>*)self; }

// All that is on the device.
template <typename X> static void backend_alloc(GpuBackend<X>* r, const Options* o, bool training, int keep) {
    const Config* c = &o->model;
    int B = o->generate ? o->samples : 1, T = o->generate ? 1 : c->chunk_size;
    r->accum = o->accum;
    model_alloc(r->gpu, &r->m, c, training);
    if (training) { pass_alloc(r->gpu, &r->pass, c, o->batch, o->seq / ranks.chunks, keep, KEEP_NONE); }
    r->pass.masks = masks_of(o);
    pass_alloc(r->gpu, &r->stream, c, B, T, KEEP_NONE, KEEP_NONE);
    state_alloc(r->gpu, &r->state, c, B, true);
    if (!training || !o->carry) { return; }
    r->carried = (StateOf<X>*)xcalloc(o->accum + 1, sizeof(StateOf<X>));
    for (int i = 0; i <= o->accum; i++) { state_alloc(r->gpu, &r->carried[i], c, o->batch, false); }
}

// Counted by asking for all of it without taking it; scratch memory as it will be at its largest.
template <typename X> static size_t memory_needed(const Gpu& gpu, const Options* o, int keep) {
    size_t T = o->seq / ranks.chunks, chunk = min_size(o->model.chunk_size, T), scores = sizeof(X) * 2 * chunk * chunk;
    size_t least = 2 * (size_t)SCORES_BYTES, D = o->model.model_dim, V = o->model.value_dim;
    GpuBackend<X> count = {gpu};
    count.gpu.dry = true;
    count.gpu.allocated = WORKSPACE + (scores > least ? scores : least) + o->batch * T * D / 4
                          + (D + V) * gpu.card.multiProcessorCount * 160;
    if (ranks.chunks > 1) { // SLICES
        count.gpu.allocated += sizeof(float2) * o->batch * D * o->model.cema_ndim * (ranks.chunks + 2);
    }
    backend_alloc(&count, o, true, keep);
    free(count.carried);
    return count.gpu.allocated;
}

// What to keep for the backward pass: all, if training then takes at most half of the card.
template <typename X> static int what_to_keep(const Gpu& gpu, const Options* o) {
    if (o->recompute) { return KEEP_BLOCKS; }
    return memory_needed<X>(gpu, o, KEEP_ALL) <= gpu.card.totalGlobalMem / 2 ? (int)KEEP_ALL : (int)KEEP_CHEAPLY;
}

template <typename X> static double gpu_memory_needed(void* self, const Options* o) {
    return memory_needed<X>(of<X>(self)->gpu, o, what_to_keep<X>(of<X>(self)->gpu, o));
}

// Refuses what does not fit the card, with the numbers and what would fit.
template <typename X> static void memory_check(Gpu& gpu, const Options* o) {
    size_t free, total, needed = memory_needed<X>(gpu, o, what_to_keep<X>(gpu, o));
    const char* advice = "; not even --batch 1 --seq 1 --recompute 1 would fit";
    CUDA(cudaMemGetInfo(&free, &total));
    if (needed <= free) { return; }
    Options less = *o;
    auto fits = [&] { return memory_needed<X>(gpu, &less, KEEP_BLOCKS) <= free; };
    less.recompute = 1;
    while (!fits() && less.batch > 1) { less.batch--; }
    while (!fits() && less.seq > 1) { less.seq /= 2; }
    if (fits()) { advice = text_of("; --batch %d --seq %d --recompute 1 would fit", less.batch, less.seq); }
    die("training needs %.1f MB of GPU memory, %.1f MB of %.1f MB are free%s", needed / 1e6, free / 1e6, total / 1e6,
        advice);
}

template <typename X> static void gpu_open(void* self, const Options* o, bool training) {
    GpuBackend<X>* r = of<X>(self);
    if (training) { ranks_connect(&r->gpu); memory_check<X>(r->gpu, o); }
    backend_alloc(r, o, training, what_to_keep<X>(r->gpu, o));
    CUDA(cudaMallocHost((void**)&r->sums, o->accum * sizeof(double)));
    CUDA(cudaMallocHost((void**)&r->drawn, r->stream.B * sizeof(int)));
    CUDA(cudaEventCreateWithFlags(&r->draw_done, cudaEventDisableTiming));
}

template <typename X> static void gpu_close(void* self) {
    GpuBackend<X>* r = of<X>(self);
    model_free(r->gpu, &r->m);
    if (r->pass.B) { pass_free(r->gpu, &r->pass); }
    pass_free(r->gpu, &r->stream); state_free(r->gpu, &r->state);
    for (int i = 0; r->carried && i <= r->accum; i++) { state_free(r->gpu, &r->carried[i]); }
    free(r->carried); cudaFreeHost(r->sums); cudaFreeHost(r->drawn); cudaEventDestroy(r->draw_done);
    gpu_close(&r->gpu);
}

template <typename X> static void gpu_copy(void* self, int block, int i, int l, void* host, bool to_host,
        size_t part[2]) {
    ModelOf<X>* m = &of<X>(self)->m;
    if (block < STATES) { model_part_copy(of<X>(self)->gpu, m, block, i, l, (float*)host, to_host, part); return; }
    const Config* c = &m->config;
    StateOf<X> s = state_layer(&of<X>(self)->carried[i], c, l);
    void* here = block == CARRIED_NORM ? (void*)s.norm : s.h;
    size_t bytes = block == CARRIED_NORM ? sizeof(NormState) * s.B * c->norm_num_groups
                                         : sizeof(float) * s.B * c->model_dim * c->cema_ndim * 2;
    CUDA(cudaMemcpy(to_host ? host : here, to_host ? here : host, bytes, cudaMemcpyDefault));
}

template <typename X> static void gpu_micro_step(void* self, const int* tokens, const int* targets, double dloss,
        bool first, uint64_t row, const bool* fresh) {
    GpuBackend<X>* r = of<X>(self);
    r->pass.masks.row = row; r->micro = first ? 0 : r->micro + 1; r->gpu.accumulate = !first;
    r->gpu.reduce = ranks.count > 1 && r->micro == r->accum - 1; r->dloss = dloss;
    StateOf<X> *past = fresh ? &r->carried[r->micro] : NULL, *next = fresh ? &r->carried[r->accum] : NULL;
    if (fresh) { state_carry(r->gpu, past, &r->m.config, fresh); }
    model_forward<X>(r->gpu, &r->m, &r->pass, tokens, past, next);
    model_losses(r->gpu, &r->m, &r->pass, targets, dloss, r->sums + r->micro);
    model_backward<X>(r->gpu, &r->m, &r->pass, tokens, past, NULL);
    if (!fresh) { return; }
    std::swap(*past, *next);
    if (ranks.chunks == 1) { return; }
    stream_after(r->gpu, r->gpu.states, r->gpu.stream); // the last slice's is everyone's
    NCCL(ncclBroadcast(past->h, past->h, past->bytes, ncclUint8, ranks.chunks - 1, r->gpu.group, r->gpu.states));
    slices_wait(r->gpu);
}

template <typename X> static double gpu_finish_step(void* self, double* loss) {
    GpuBackend<X>* r = of<X>(self); double norm = model_grad_norm(r->gpu, &r->m);
    *loss = 0;
    for (int i = 0; i <= r->micro; i++) { *loss += r->sums[i] * r->dloss; }
    all_sum(loss, 1);
    return norm;
}

template <typename X> static void gpu_update(void* self, const Options* o, double lr, int step, double grad_scale) {
    model_update(of<X>(self)->gpu, &of<X>(self)->m, o, lr, step, grad_scale);
    gpu_sync(&of<X>(self)->gpu);
}

template <typename X> static void gpu_stream(void* self, const int* tokens, int T, const int* targets, float* losses) {
    GpuBackend<X>* r = of<X>(self);
    r->stream.T = T;
    model_forward(r->gpu, &r->m, &r->stream, tokens, &r->state, &r->state);
    if (!targets) { return; }
    model_losses(r->gpu, &r->m, &r->stream, targets, 0, r->m.sums);
    const float* from = acts_layer<X>(r->stream.places, r->stream.acts, 0).losses;
    CUDA(cudaMemcpy(losses, from, T * sizeof(float), cudaMemcpyDeviceToHost));
}

template <typename X> static void gpu_draw(void* self, const Options* o, uint64_t key, int index) {
    GpuBackend<X>* r = of<X>(self);
    model_draw(r->gpu, &r->stream, o, r->drawn, r->state.pos, key, index);
    CUDA(cudaEventRecord(r->draw_done, r->gpu.stream));
}
template <typename X> static const int* gpu_drawn(void* self) {
    CUDA(cudaEventSynchronize(of<X>(self)->draw_done));
    return of<X>(self)->drawn;
}

template <typename X> static void gpu_reset(void* self) {
    state_reset(of<X>(self)->gpu, &of<X>(self)->state);
}

// Dense peak in bf16 of the cards whose data sheets we know; 0 for the others.
static double peak_flops(const cudaDeviceProp* card) {
    static const struct { const char* name; double peak; } cards[] = {{"A100", 312e12}, {"H100 PCIe", 756e12},
            {"H100 NVL", 835e12}, {"H100", 989e12}, {"H200 NVL", 835e12}, {"H200", 989e12}, {"GH200", 989e12},
            {"L40S", 362e12}, {"RTX 4090", 165e12}, {"RTX 3090", 71e12}};
    for (size_t i = 0; i < sizeof(cards) / sizeof(cards[0]); i++) {
        if (strstr(card->name, cards[i].name)) { return cards[i].peak; }
    }
    return 0;
}

#ifdef GPU_MAIN
template <typename X> static void gpu_run(const Options* o, SafeTensors* st) {
    GpuBackend<X>* r = (GpuBackend<X>*)xcalloc(1, sizeof(GpuBackend<X>));
    gpu_open(&r->gpu);
    bool fast = sizeof(X) == 2; char name[sizeof(r->gpu.card.name) + 8];
    snprintf(name, sizeof(name), "%s, %s", r->gpu.card.name, fast ? "bf16" : "fp32");
    Backend b = {r, name, fast ? peak_flops(&r->gpu.card) : 0, o->model.chunk_size, gpu_memory_needed<X>, gpu_open<X>,
                 gpu_close<X>, gpu_copy<X>, gpu_micro_step<X>, gpu_finish_step<X>, gpu_update<X>, gpu_stream<X>,
                 gpu_draw<X>, gpu_drawn<X>, gpu_reset<X>};
    run(&b, o, st); free(r);
}

int main(int argc, char** argv) {
    Options o; SafeTensors st;
    ranks_open();
    options_parse(&o, argc, argv, &st);
    bool fp32 = !strcmp(o.precision, "fp32");
    if (!fp32 && strcmp(o.precision, "bf16")) { die("--precision %s: expected bf16 or fp32", o.precision); }
    if (fp32) { gpu_run<float>(&o, &st); } else { gpu_run<bf16>(&o, &st); }
    return 0;
}
#endif
