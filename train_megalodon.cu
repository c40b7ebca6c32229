/*
Megalodon (arXiv 2404.08801) on a GPU: train_megalodon.c again, layer by layer and under the same names, in CUDA.

    make train_megalodon_cuda && ./train_megalodon_cuda

    --precision bf16   (the default) weights, activations, scores, probabilities and logits are stored in bfloat16.
                       Arithmetic is in fp32 or better. So are master weights, Adam's moments, weight gradients,
                       statistics of norms, CEMA's coefficients and states, log-sum-exps (lse), and losses
    --precision fp32   everything in fp32, no tf32: the CPU's numbers up to rounding

Read train_megalodon.c first. It has the equations; the comments here say how a GPU computes them fast. What is not GPU
work (options, tables, files, data, random numbers, the training loop) is that file's. It is included here without its
main.

READING ORDER. The first half is all that trains a model on one GPU, in the order of train_megalodon.c:

    The device                errors, launches
    What kernels share        16-byte accesses, sums over a row, sums over many rows
    Layers                    from the embedding to the cross-entropy, forward and backward
    The block                 one layer of the model, Figure 3 of the paper: the layers above in their order
    The model                 all layers, forward and backward
    The optimizer             AdamW
    Use                       one training step; the loop around it is the C file's

The second half is machinery. Each of its sections can be skipped:

    Matrix products           cuBLASLt
    Memory                    where parameters, activations and states lie
    Dropout                   masks
    Odd sizes                 kernels for sizes that the fast ones do not take
    Several GPUs              NCCL: slices of a sequence, sums of gradients, shards of the optimizer's state
    Generation                kernels for one timestep, as one CUDA graph; drawing tokens
    The program               what it hands to the C file, and main

SYMBOLS. B T D H Z V F N G L c and x n e m z q k v r o y u are those of train_megalodon.c. In a layer's kernels letters
are those of the CPU's equations of that layer; what a GPU needs more is named where the layer begins. gemm has sizes
M N K of its own. A kernel's template has E, the number of neighbouring elements of a thread, and types X, Y and Z. In
CEMA on tensor cores E, K, C and S are matrices. In attention S is the scores, K the timesteps of k and v. WORDS:

    X                   a template's type of weights and activations, bf16 or float
    CUDA block          threads that share memory and barriers. In names and code `block` alone means this, too. Only
                        "The block", names that begin with block_, and KEEP_BLOCKS are the model's
    row                 of activations: one timestep of one sequence, or one head of it; the features are its columns.
                        Matrices and weights have rows as usual
    pitch, ld           elements from one row to the next, where rows of several tensors stand side by side
    head-major          (B,H,T,.): the layout of what attention reads and writes. One product then covers many heads
    lane                a thread's number in its warp, 0 to 31
    team                neighbouring lanes that share one thing: a group of the norm, a feature's oscillators
    segment, line       timestep norm: 32 timesteps of one group of one sequence; all of these segments
    tile, span          CEMA on tensor cores: 16 timesteps; 256 timesteps
    carry, carries      CEMA: the state between two spans; those before all spans. state_carry is for --carry
    step                a training step; in Generation, one token; a `step` in the code is a distance in memory
    query tile, pair    attention: 512 queries; one head of one chunk of one sequence
    partial sum         what one CUDA block adds up of a gradient; reduce_columns adds these in a fixed order
    arena               one allocation that holds many tensors
    part, shard         a part of the arena of parameters; what one GPU of several updates of a part
    slice               the timesteps of a sequence that one GPU of several has
    descending          from the last timestep to the first. Forward and backward are the passes of training

CONVENTIONS, where they differ from the CPU's:

  - A function with the CPU's name does its work; what it does more or less stands above it. Its first argument is the
    Gpu. It is the launcher, and stands below the kernels it launches.
  - Tensors that one product makes or takes stand side by side in each row: z|r (of Wz and Wr), m|o*r (what Wh1 and Wh2
    multiply) and fc1|fc3. Of their weights, Wh1|Wh2 stand side by side in each row; Wr's rows follow Wz's, and fc3's
    follow fc1's. So one product does the work of two. (The r of z|r is before its silu, which gate_forward applies.)
  - Gradients of parameters are fp32. They are added to, or assigned where gpu.accumulate is off (in the first
    micro-step of a step). So only the embedding's is ever zeroed, of which not every row receives something.
  - There are no atomic additions, and the algorithms of cuBLASLt depend only on shapes, alignment, card and version. So
    on the same kind and number of GPUs every run gives the same bits.
  - WIDE: a thread has 8 neighbouring elements, which bf16 reads in one access of 16 bytes. This needs dimensions that
    are multiples of 8. Without it, a thread has single elements, or two neighbours ("Odd sizes"), and takes any size.
  - DROP: with dropout. Without it, the calls of drop_row and drop_elements do nothing and can be read over.
*/
// train_megalodon.c puts ON_GPU_TOO before functions that kernels call, too. It adds GPU_OPTIONS to its options, and
// leaves out its main with TESTING.
#define ON_GPU_TOO __host__ __device__
#define GPU_OPTIONS(X) X(TEXT, precision, "bf16", 0, 0, "of weights and activations: bf16 or fp32")
#ifndef TESTING // test_megalodon.c and check.cu define it and include this file. Without it, main is below
#define TESTING
#define GPU_MAIN
#endif
#ifndef ARCHITECTURE_C // dev/gecko/gecko.cu has another; see data/megalodon.h
#define ARCHITECTURE_C "train_megalodon.c"
#endif
#include ARCHITECTURE_C
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

// Every call of CUDA and every launch is checked; an error names the call and the line here.
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
// The form of a kernel<X, WIDE>, or of a kernel<X, WIDE, DROP>, for these dimensions and this dropout.
#define FORM(kernel, is_wide) (is_wide ? kernel<X, true> : kernel<X, false>)
#define FORM_DROP(kernel, is_wide, dropout) \
    ((dropout).drop ? is_wide ? kernel<X, true, true> : kernel<X, false, true> \
                    : is_wide ? kernel<X, true, false> : kernel<X, false, false>)
template <typename... N> static bool wide(N... dims) { // may the wide form of a kernel be used?
    return (... && ((size_t)dims % 8 == 0));
}

// Scratch memory by use. It belongs to one launcher at a time. But SEGMENTS, with several GPUs also COEFFICIENTS and
// SLICES, go from the launcher that fills them to the next one that is named after the same layer (begin, then start).
enum { PARTIALS,     // partial sums of gradients, by CUDA block
       SEGMENTS, NORM_TOTALS, // timestep norm: statistics or sums of segments, and of lines
       COEFFICIENTS, // CEMA: p, q, c and powers of q
       CEMA_SUMS,    // CEMA: sums over time that its gradients are made of
       SCORES,       // attention: scores, in the backward pass also their gradients
       SLICES, SLICE_NORMS, // several GPUs: what slices tell each other, by copy engines or by kernels
       MORE_SCRATCH
       NUM_SCRATCH };

struct Gpu;
template <typename E> static E* gpu_scratch(Gpu& gpu, int which, size_t n); // at least n of E; see Memory
static void* gpu_alloc(Gpu* gpu, size_t bytes);                             // zeroed
struct GemmPlan { cublasLtMatmulDescOpaque_t desc; cublasLtMatrixLayoutOpaque_t l[4]; cublasLtMatmulAlgo_t algo; };
typedef std::map<std::array<int64_t, 20>, GemmPlan> GemmPlans; // by all that the choice of an algorithm depends on

struct Gpu {
    cudaStream_t stream;   // where launches go; slices_beside puts another in its place for a while
    cudaDeviceProp card;
    bool accumulate;       // add to the gradients of parameters, or assign them

    // Matrix products
    cublasLtHandle_t lt;
    GemmPlans* plans;
    void* workspace;
    // Memory
    void* scratch[NUM_SCRATCH];
    size_t scratch_size[NUM_SCRATCH];
    size_t allocated;      // bytes
    bool dry;              // only count them
    // Several GPUs
    bool reduce;           // the backward pass adds up gradients over all GPUs as it goes
    cudaStream_t slice_stream, exchange_stream; // for slices' states; for exchanges of gradients and weights
    cudaEvent_t event;
#ifdef USE_NCCL
    ncclComm_t group, world;
    std::map<void*, ncclWindow_t>* windows; // of exchange_alloc
#endif
};

static void device_open(Gpu* gpu) {
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
    CUDA(cudaStreamCreate(&gpu->stream)); // a stream that waits for plain copies, and they for it
    CUBLAS(cublasLtCreate(&gpu->lt));
    gpu->plans = new GemmPlans;
}

static void gpu_sync(Gpu* gpu) { CUDA(cudaStreamSynchronize(gpu->stream)); }

static void device_close(Gpu* gpu) {
    delete gpu->plans; cublasLtDestroy(gpu->lt); cudaStreamDestroy(gpu->stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// What kernels share

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <typename X> __device__ inline X from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
__device__ inline uint32_t pack(float a, float b) { // two bf16
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *(uint32_t*)&v;
}

// A loop over a fixed number of registers. It must be unrolled: registers have no index.
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

// E neighbours, 8, 4 or one, as in memory: in bf16 they take half the registers until get() turns them into floats.
template <typename X, int E> struct Piece {
    typedef std::conditional_t<E == 1, X, std::conditional_t<E * sizeof(X) == 8, uint2, uint4>> Access;
    enum { ACCESSES = E * sizeof(X) / sizeof(Access) }; Access a[ACCESSES];
    __device__ void clear() { EACH(i, ACCESSES) { a[i] = Access(); } }
    __device__ void load(const X* p) { EACH(i, ACCESSES) { a[i] = ((const Access*)p)[i]; } }
    __device__ void store(X* p) const { EACH(i, ACCESSES) { ((Access*)p)[i] = a[i]; } }
    __device__ void get(float* v) const {
        const uint32_t* w = (const uint32_t*)a; // bf16 is the upper half of a float
        if constexpr (sizeof(X) == 4) { memcpy(v, a, sizeof(a)); }
        else if constexpr (E == 1) { v[0] = to_float(a[0]); }
        else {
            EACH(i, E / 2) {
                v[2 * i] = __uint_as_float(w[i] << 16);
                v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
            }
        }
    }
    __device__ void set(const float* v) {
        if constexpr (sizeof(X) == 4) { memcpy(a, v, sizeof(a)); }
        else if constexpr (E == 1) { a[0] = from_float<X>(v[0]); }
        else { EACH(i, E / 2) { ((uint32_t*)a)[i] = pack(v[2 * i], v[2 * i + 1]); } }
    }
};
template <int E, typename X> __device__ inline void load(float (&v)[E], const X* p) {
    Piece<X, E> piece; piece.load(p); piece.get(v);
}
template <int E, typename X> __device__ inline void store(X* p, const float (&v)[E]) {
    Piece<X, E> piece; piece.set(v); piece.store(p);
}

// The sum over a warp, or over each team of TEAM lanes. Lanes whose numbers differ in bit o exchange their sums.
template <int TEAM = 32> __device__ inline float warp_sum(float v) {
#pragma unroll
    for (int o = TEAM / 2; o; o /= 2) { v += __shfl_xor_sync(~0u, v, o); }
    return v;
}
__device__ inline float warp_sum_of(float v, int team) { // the same where the number is not known when compiling
    for (int o = team / 2; o; o /= 2) { v += __shfl_xor_sync(~0u, v, o); }
    return v;
}
__device__ inline float warp_max(float v) {
    EACH(i, 5) { v = fmaxf(v, __shfl_xor_sync(~0u, v, 16 >> i)); }
    return v;
}

// ROW KERNELS. Most layers but the scans and attention work row by row. In their kernels
//   - the threads of a CUDA block with the same threadIdx.y share a row, and each has 8 of its columns;
//   - the CUDA blocks walk over all rows: row_first(), then row_step() further, and so on. A thread keeps its columns.
// So weights of the columns and sums over rows stay in registers, and a sum over columns is row_sum's. Most load rows
// one ahead (fetch, the first one by row_first): the next row is on its way while this one is computed.
enum { MAX_ROW = 8192 };
__device__ inline unsigned row_first() { return blockIdx.x * blockDim.y + threadIdx.y; }
__device__ inline unsigned row_step() { return gridDim.x * blockDim.y; }
template <typename Fetch> __device__ inline unsigned row_first(Fetch fetch) { fetch(row_first()); return row_first(); }
// A loop with row_sum, whose barrier all threads must reach, goes on as long as one row of the CUDA block is left.
template <typename I> __device__ inline bool any_row(I r, I rows) { return r - threadIdx.y < rows; }
template <bool WIDE> __device__ inline int column(int e) { // of a thread's element e
    return WIDE ? 8 * threadIdx.x + e : 2 * ((e / 2) * blockDim.x + threadIdx.x) + (e & 1);
}
// A thread's columns of a row, as they are in memory; zeros past the last column.
template <typename X, bool WIDE> struct RowPiece : Piece<X, 8> {
    __device__ void load(const X* row, int columns) {
        this->clear();
        if (8 * threadIdx.x < columns) { Piece<X, 8>::load(row + 8 * threadIdx.x); }
    }
    static __device__ void write(X* row, const float (&v)[8], int columns) {
        if (8 * threadIdx.x < columns) { store(row + 8 * threadIdx.x, v); }
    }
};
template <typename X> struct RowPiece<X, false>; // see Odd sizes
template <bool WIDE, typename X> __device__ inline void load_row(float (&v)[8], const X* row, int columns) {
    RowPiece<X, WIDE> piece; piece.load(row, columns); piece.get(v);
}
template <bool WIDE, typename X> __device__ inline void store_row(X* row, const float (&v)[8], int columns) {
    RowPiece<X, WIDE>::write(row, v, columns);
}

// Dropout, see there: of a thread's columns of row r, whose column 0 is number `first` in the full row (h * vd for head
// h); and of E elements from number i on of a row with these bits.
template <bool WIDE, bool DROP> __device__ inline void drop_row(float (&v)[8], const Dropout& drop, unsigned r,
        int first = 0);
template <bool DROP, int E> __device__ inline void drop_elements(float (&v)[E], const Dropout& drop, uint64_t bits,
        int i);
static const Dropout no_dropout = {0, 0, 1, 0, 0, 1, 0};

// Sums each of COUNT numbers over the threads of a row. Each warp writes its sum to shared memory. After a barrier all
// warps of the row add up all these sums again; so no second barrier is needed to hand out the result. Calls take turns
// with two buffers, told apart by `turn`; so none is needed before the next call writes. Whoever writes a buffer again
// has passed the barrier of the call between, and before that barrier all had read it. All threads of the CUDA block
// must take part.
template <int COUNT> __device__ inline void row_sum(float (&v)[COUNT], int& turn) {
    __shared__ float sums[2][32][COUNT];
    EACH(i, COUNT) { v[i] = warp_sum(v[i]); }
    if (blockDim.x == 32) { return; }
    int warps = blockDim.x / 32, first = threadIdx.y * warps, warp = first + threadIdx.x / 32;
    EACH(i, COUNT) { if (threadIdx.x % 32 == 0) { sums[turn][warp][i] = v[i]; } }
    __syncthreads();
    int team = 2 << (31 - __clz(warps - 1)), from = threadIdx.x % team; // warps, rounded up to a power of two
    EACH(i, COUNT) { v[i] = warp_sum_of(from < warps ? sums[turn][first + from][i] : 0, team); }
    turn ^= 1;
}

// The grid of a row kernel: `per_sm` CUDA blocks for each multiprocessor (2 if rows are longer than 4096). Backward
// kernels have fewer: they hold more registers and leave partial sums. Kernels of attention's tensors share them among
// the heads, blockIdx.y. partials: memory for `partial_sums` floats for each of the `blocks` of a head.
struct RowGrid { dim3 grid, block; int blocks; float* partials; };
static RowGrid row_grid(Gpu& gpu, size_t rows, int columns, int heads, int per_sm, size_t partial_sums = 0) {
    if (columns > MAX_ROW) { die("the GPU program takes rows of at most %d features, not %d", MAX_ROW, columns); }
    int x = ceil_div(ceil_div(columns, 8), 32) * 32, y = x < 256 ? 256 / x : 1;
    size_t blocks = (size_t)gpu.card.multiProcessorCount * (x > 512 ? 2 : per_sm);
    blocks = min_size(ceil_div(blocks, heads), ceil_div(rows, y));
    float* partials = partial_sums ? gpu_scratch<float>(gpu, PARTIALS, blocks * partial_sums) : NULL;
    return {dim3(blocks, heads), dim3(x, y), (int)blocks, partials};
}

// SUMS OVER ALL ROWS, for gradients of weights. A thread adds up its columns over the rows it sees; store_partial
// writes those of a CUDA block; reduce_columns adds these up. partials (blocks,count,width): of `count` gradients.
struct Sums { float* to[5]; int count, width; };

// Adds v over the rows of the CUDA block and writes it as number i (of count) of its partial sums; columns of this head
// start at `first`. All threads of the CUDA block take part.
template <bool WIDE> __device__ inline void store_partial(float* partials, int count, int width, int i,
        const float (&v)[8], int columns, int first = 0) {
    __shared__ float others[8][256];
    float sum[8];
    EACH(e, 8) {
        sum[e] = v[e];
        if (threadIdx.y) { others[e][threadIdx.y * blockDim.x + threadIdx.x] = v[e]; }
    }
    __syncthreads(); // all have written
    for (int y = 1; threadIdx.y == 0 && y < blockDim.y; y++) {
        EACH(e, 8) { sum[e] += others[e][y * blockDim.x + threadIdx.x]; }
    }
    __syncthreads(); // all have been read, and the next call may write
    if (threadIdx.y) { return; }
    store_row<WIDE>(partials + ((size_t)blockIdx.x * count + i) * width + first, sum, columns);
}

// A CUDA block adds up 32 columns. Warp y reads them in the rows y, y + 32, ... of partials, 128 bytes at a time. Then
// the 32 warps' sums of a column are added by one warp, for which they change places in shared memory.
__global__ void reduce_columns_kernel(Sums sums, const float* partials, int blocks, bool accumulate) {
    __shared__ float transposed[32][33]; // 33: rows and columns lie in different banks
    size_t columns = (size_t)sums.count * sums.width, c = (size_t)blockIdx.x * 32 + threadIdx.x;
    float s = 0;
    for (int p = threadIdx.y; c < columns && p < blocks; p += 32) { s += partials[p * columns + c]; }
    transposed[threadIdx.y][threadIdx.x] = s;
    __syncthreads();
    s = transposed[threadIdx.x][threadIdx.y];
    s = warp_sum(s); c = (size_t)blockIdx.x * 32 + threadIdx.y;
    if (threadIdx.x == 0 && c < columns) {
        float* to = NULL;
        EACH(i, 5) { if (c / sums.width == i) { to = sums.to[i]; } } // not by an index: they stay in registers
        if (to) { to[c % sums.width] = (accumulate ? to[c % sums.width] : 0.0f) + s; }
    }
}
static void reduce_columns(Gpu& gpu, const float* partials, int blocks, Sums sums) {
    size_t columns = (size_t)sums.count * sums.width;
    LAUNCH(reduce_columns_kernel, ceil_div(columns, 32), dim3(32, 32), sums, partials, blocks, gpu.accumulate);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers

// The products with weights; see Matrix products. Rows of out, inp, add and dout lie ldo, ldi, lda and ldo apart.
// out (rows,O) = inp (rows,I) weight (O,I)^T + bias (O) + add (rows,O); bias and add may be NULL, add may be out.
template <typename X> static void matmul_forward(Gpu& gpu, X* out, int ldo, const X* inp, int ldi, const X* weight,
        const X* bias, const X* add, int lda, size_t rows, int I, int O);
// dinp (rows,I) = dout (rows,O) weight (O,I), added to what dinp holds if accumulate.
template <typename X> static void matmul_backward(Gpu& gpu, X* dinp, int ldi, const X* dout, int ldo, const X* weight,
        size_t rows, int I, int O, bool accumulate);
// dweight (O,I) = dout^T inp, added to it if gpu.accumulate. The kernels that make dout make the bias's gradient.
template <typename X> static void matmul_backward_weight(Gpu& gpu, float* dweight, const X* dout, int ldo,
        const X* inp, int ldi, size_t rows, int I, int O);

// EMBEDDING. A row kernel: of each row it reads a row of the weights and writes one of out.
template <typename X, bool WIDE, bool DROP> __global__ void embedding_forward_kernel(X* out, const int* tokens,
        const X* weight, float scale, size_t rows, int D, Dropout drop) {
    for (size_t r = row_first(); r < rows; r += row_step()) {
        float v[8];
        load_row<WIDE>(v, weight + (size_t)tokens[r] * D, D);
        EACH(e, 8) { v[e] *= scale; }
        drop_row<WIDE, DROP>(v, drop, r);
        store_row<WIDE>(out + r * D, v, D);
    }
}
// out (rows,D) = dropout(scale * weight (vocab,D)[tokens])
template <typename X> static void embedding_forward(Gpu& gpu, X* out, const int* tokens, const X* weight, float scale,
        size_t rows, int D, Dropout drop) {
    RowGrid r = row_grid(gpu, rows, D, 1, 4);
    LAUNCH(FORM_DROP(embedding_forward_kernel, wide(D), drop), r.grid, r.block, out, tokens, weight, scale, rows, D,
           drop);
}

// A CUDA block has one token: it adds up all rows of dout that hold this token, in the order of their positions, and
// adds the sum to the token's row of dweight, once. Four rows are on their way at a time. order (rows): positions
// sorted by token; begin (runs+1): where the run of each distinct token starts in it.
template <typename X, bool WIDE, bool DROP> __global__ void embedding_backward_kernel(float* dweight, const X* dout,
        const int* tokens, const int* order, const int* begin, float scale, int D, Dropout drop) {
    int first = begin[blockIdx.x], last = begin[blockIdx.x + 1];
    float sum[8] = {0}, v[4][8];
    float* to = dweight + (size_t)tokens[order[first]] * D;
    for (int i = first; i < last; i += 4) {
        EACH(k, 4) { load_row<WIDE>(v[k], dout + (size_t)order[min(i + k, last - 1)] * D, i + k < last ? D : 0); }
        EACH(k, 4) {
            drop_row<WIDE, DROP>(v[k], drop, order[min(i + k, last - 1)]);
            EACH(e, 8) { sum[e] += v[k][e]; }
        }
    }
    load_row<WIDE>(v[0], to, D);
    EACH(e, 8) { v[0][e] += scale * sum[e]; }
    store_row<WIDE>(to, v[0], D);
}
// dweight (vocab,D) += scale * dout, row by row. It is always added to: the output layer's gradient may be there.
template <typename X> static void embedding_backward(Gpu& gpu, float* dweight, const X* dout, const int* tokens,
        const int* order, const int* begin, int runs, float scale, int D, Dropout drop) {
    dim3 block = row_grid(gpu, runs, D, 1, 4).block.x;
    LAUNCH(FORM_DROP(embedding_backward_kernel, wide(D), drop), runs, block, dweight, dout, tokens, order, begin, scale,
           D, drop);
}

// TIMESTEP NORM. The CPU walks through time and merges one timestep after the other into the statistics so far. That is
// a scan, and merging is associative (Chan), so time can be cut into segments of 32 timesteps:
//   1. timestepnorm_statistics reads inp and leaves (count, mean, var) of each segment alone;
//   2. timestepnorm_scan_kernel turns these into the statistics of everything before each segment;
//   3. timestepnorm_forward_kernel reads inp again, merges inside the segment, and writes out.
// So inp is read twice and out written once. The backward pass has the same three steps. In 1 and 3 a CUDA block has 32
// timesteps of 32/TEAM groups (8 or 4), which are as many segments; each of its 8 warps has 4 of these timesteps. In a
// warp, a team of TEAM lanes shares a group:
//
//     lane         0   1   2   3 |  4   5   6   7 | ... | 28  29  30  31       TEAM = 4: groups of 32 features
//     group              0       |        1       |     |        7
//     each lane: 8 features of 4 timesteps in registers
//
// TEAM is 4 for groups of 32 features and 8 for groups of 64; all presets have one of these. For other groups there is
// a plain form of the kernels of steps 1 and 3 in Odd sizes. The CUDA blocks of step 3 take the segments in the other
// order than those of step 1 (`from_end`): what step 1 read last is still in the L2 cache.
enum { STEPS = 4, WARPS = 8, SEGMENT = STEPS * WARPS };
static int norm_team(int D, int G) { return D / G == 32 ? 4 : D / G == 64 ? 8 : 0; }
static size_t norm_segments(int T) { return ceil_div(T, SEGMENT); }
static size_t norm_blocks(int B, int T, int G, int team) { return B * norm_segments(T) * ceil_div(G, 32 / team); }

// Where a thread stands. It has 8 features of up to STEPS timesteps.
template <int TEAM> struct NormPlace {
    enum { WIDTH = 8 * TEAM, GROUPS = 32 / TEAM }; // features of a group, groups of a warp
    int warp, member;           // member: of the team; 0 writes what the group has once
    int first_group, group, g;  // the CUDA block's first group; this thread's, counted from there, and in all
    int steps;                  // the warp's timesteps, up to STEPS
    size_t b, t0, at;           // sequence, first timestep, and first element of inp
    size_t segment;             // index of (b, g, segment) in segments
    bool active;
    __device__ NormPlace(int T, int D, int G, bool from_end) {
        // across: CUDA blocks that have the same timesteps, and other groups. length: segments of a line
        int lane = threadIdx.x % 32, across = (G + GROUPS - 1) / GROUPS, length = (T + SEGMENT - 1) / SEGMENT;
        size_t block = from_end ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        int in_time = block / across % length;
        warp = threadIdx.x / 32; member = lane % TEAM; group = lane / TEAM;
        first_group = block % across * GROUPS; g = first_group + group; b = block / across / length;
        t0 = (size_t)in_time * SEGMENT + warp * STEPS;
        steps = t0 < T ? (int)(T - t0 < STEPS ? T - t0 : STEPS) : 0; active = g < G;
        if (!active) { g = G - 1; steps = 0; } // past the last group: takes part in shuffles and barriers only
        at = (b * T + t0) * D + (size_t)g * WIDTH + 8 * member; segment = (b * G + g) * length + in_time;
    }
};

// Statistics of n timesteps and of k more become those of n + k (Chan), in double, or in float inside a segment.
__device__ inline float quotient(float a, float b) { return __fdividef(a, b); } // to 2 units in the last place
__device__ inline double quotient(double a, double b) { return a / b; }
template <typename R> __device__ inline void merge(R& n, R& mean, R& var, R k, R m, R v) {
    if (k == 0) { return; }
    R w = quotient(k, n + k), d = m - mean;
    n += k; mean += d * w; var += (v - var) * w + d * d * w * (1 - w);
}

// The warp's timesteps alone: x receives them, and m[i], v[i] mean and variance of timesteps 0..i of the 4. totals:
// (count, mean, var) of all 4, for the other warps to see; of [32], a warp uses as many as it has groups.
template <typename X, int TEAM> __device__ inline void norm_statistics(Piece<X, 8> (&x)[STEPS], float (&m)[STEPS],
        float (&v)[STEPS], float3 (&totals)[WARPS][32], const NormPlace<TEAM>& p, const X* inp, int D) {
    const float share = 1.0f / p.WIDTH;
    float a[8], n = 0, mean = 0, var = 0;
    EACH(i, STEPS) {
        x[i].clear();
        if (i < p.steps) { x[i].load(inp + p.at + (size_t)i * D); }
    }
    EACH(i, STEPS) { // at first m[i] and v[i] are of timestep i alone
        float s = 0; x[i].get(a);
        EACH(e, 8) { s += a[e]; }
        m[i] = warp_sum<TEAM>(s) * share;
        s = 0;
        EACH(e, 8) { s += (a[e] - m[i]) * (a[e] - m[i]); }
        v[i] = warp_sum<TEAM>(s) * share;
    }
    EACH(i, STEPS) {
        if (i < p.steps) { // merge(), with weights known when compiling
            const float w = 1.0f / (i + 1), d = m[i] - mean;
            n = i + 1;
            mean += d * w; var += (v[i] - var) * w + d * d * (w * (1 - w));
        }
        m[i] = mean; v[i] = var;
    }
    if (p.member == 0) { totals[p.warp][p.group] = make_float3(n, mean, var); }
    __syncthreads(); // the totals of all warps are there
}

// Step 1. segments (B,G,segments) receives (count, mean, var).
template <typename X, int TEAM> __global__ void __launch_bounds__(32 * WARPS, 8) timestepnorm_statistics_kernel(
        float4* segments, const X* inp, int T, int D, int G) {
    __shared__ float3 totals[WARPS][32]; NormPlace<TEAM> p(T, D, G, false);
    Piece<X, 8> x[STEPS];
    float m[STEPS], v[STEPS]; norm_statistics(x, m, v, totals, p, inp, D);
    float4 all = make_float4(0, 0, 0, 0);
    EACH(k, WARPS) {
        float3 s = totals[k][p.group];
        merge(all.x, all.y, all.z, s.x, s.y, s.z);
    }
    if (p.warp == 0 && p.member == 0 && p.active) { segments[p.segment] = all; }
}

// Step 3. segments holds what comes before each. mean and rstd (B,T,G) are saved for the backward pass.
template <typename X, int TEAM> __global__ void __launch_bounds__(32 * WARPS) timestepnorm_forward_kernel(X* out,
        float* mean, float* rstd, const float4* segments, const X* inp, const float* w, const float* b, int T, int D,
        int G, float eps) {
    __shared__ float3 totals[WARPS][32]; NormPlace<TEAM> p(T, D, G, true);
    Piece<X, 8> x[STEPS];
    float m[STEPS], v[STEPS], a[8], scale[8], shift[8];
    norm_statistics(x, m, v, totals, p, inp, D);
    float4 past = segments[p.segment];
    for (int k = 0; k < p.warp; k++) {
        float3 s = totals[k][p.group];
        merge(past.x, past.y, past.z, s.x, s.y, s.z);
    }
    EACH(e, 8) { int d = p.g * p.WIDTH + 8 * p.member + e; scale[e] = w[d] + 1; shift[e] = b[d]; }
    EACH(i, STEPS) {
        if (i >= p.steps) { break; }
        float count = past.x, mu = past.y, var = past.z;
        merge(count, mu, var, i + 1.0f, m[i], v[i]);
        float r = rsqrtf(var + eps); x[i].get(a);
        EACH(e, 8) { a[e] = (a[e] - mu) * r * scale[e] + shift[e]; }
        store(out + p.at + (size_t)i * D, a);
        if (p.member == 0) { size_t k = (p.b * T + p.t0 + i) * G + p.g; mean[k] = mu; rstd[k] = r; }
    }
}

// Step 2, forward and backward. What is scanned, Stats, is either statistics (NormState), ascending, or the sums of the
// backward pass (NormSums), descending; three doubles. append: stats of some timesteps become those of these and more.
struct NormSums { double U, S, center; };
__device__ inline void append(NormState& s, const NormState& more) {
    merge(s.count, s.mean, s.var, more.count, more.mean, more.var);
}
__device__ inline void append(NormSums& s, const NormSums& more) { // about the center of s
    s.U += more.U + 2 * (s.center - more.center) * more.S; s.S += more.S;
}
template <typename Stats> __device__ inline Stats shuffle_up(Stats s, int n) {
    static_assert(sizeof(s) == 3 * sizeof(double));
    EACH(i, 3) { ((double*)&s)[i] = __shfl_up_sync(~0u, ((double*)&s)[i], n); }
    return s;
}

// A warp has one line, whose `length` segments its lanes share: lane i has `each` segments in a row, from i * each on,
// in the order of the scan. For T = 4096, which are 128 segments, with `past`, what comes before the line:
//
//     lane                                            0            1            2       ...     31
//     its segments                                  0 .. 3       4 .. 7       8 .. 11         124 .. 127
//     walk: they are added up               past and 0 .. 3      4 .. 7       8 .. 11         124 .. 127
//     scan: and those of all lanes before   past and 0 .. 3      0 .. 7       0 .. 11           0 .. 127 = total
//     shuffle_up: the lane before hands on its sum   past        0 .. 3       0 .. 7            0 .. 123
//     walk: each segment takes what comes before it, and is then appended to that for the next one
template <typename Stats> struct NormLine {
    static constexpr bool descending = std::is_same<Stats, NormSums>::value;
    float4* segments;
    int length, first, last;
    __device__ NormLine(float4* all, size_t line, int length) : segments(all + line * length), length(length) {
        int each = (length + 31) / 32;
        first = threadIdx.x % 32 * each; last = min(first + each, length);
    }
    __device__ float4* segment(int i) const { return segments + (descending ? length - 1 - i : i); }
    // Nothing yet. All segments of a line and its past have one center, so it does not matter which one append keeps.
    __device__ Stats none() const { return Stats{0, 0, descending ? segment(0)->z : 0}; }
    template <typename Visit> __device__ void walk(Visit visit) const { // this lane's segments; four are read at a time
        for (int i = first; i < last; i += 4) {
            float4 own[4];
            EACH(k, 4) { if (i + k < last) { own[k] = *segment(i + k); } }
            EACH(k, 4) { if (i + k < last) { visit(segment(i + k), Stats{own[k].x, own[k].y, own[k].z}); } }
        }
    }
    // sum: of this lane's segments. It becomes the sum of those of lanes 0 up to this one, by five shuffles.
    static __device__ void scan(Stats& sum) {
        for (int o = 1; o < 32; o *= 2) {
            Stats other = shuffle_up(sum, o);
            if (threadIdx.x % 32 >= o) { append(other, sum); sum = other; }
        }
    }
};
// Segments become what comes before each in the order of the scan. past (lines): what comes before the first segment,
// NULL for nothing. total (lines): past and all segments, may be NULL or past.
template <typename Stats> __global__ void timestepnorm_scan_kernel(float4* segments, Stats* total, const Stats* past,
        int length, size_t lines) {
    size_t line = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (line >= lines) { return; }
    NormLine<Stats> p(segments, line, length);
    Stats before = past ? past[line] : p.none(), sum = lane == 0 ? before : p.none();
    p.walk([&](float4*, const Stats& own) { append(sum, own); }); p.scan(sum);
    Stats now = shuffle_up(sum, 1); // what comes before this lane's segments
    if (lane == 0) { now = before; }
    __syncwarp(); // past has been read before total, which may be the same, is written
    if (lane == 31 && total) { total[line] = sum; }
    p.walk([&](float4* at, const Stats& own) {
        auto [first, second, third] = now;
        *at = make_float4(first, second, third, 0); append(now, own);
    });
}
template <typename Stats> static void timestepnorm_scan(Gpu& gpu, float4* segments, Stats* total, const Stats* past,
        int B, int T, int G) {
    LAUNCH(timestepnorm_scan_kernel<Stats>, ceil_div(B * G, 4), 128, segments, total, past, (int)norm_segments(T),
           (size_t)B * G);
}

// See Odd sizes.
template <typename X> static void timestepnorm_forward_any(Gpu& gpu, bool apply, X* out, float* mean, float* rstd,
        float4* segments, const X* inp, const float* w, const float* b, int B, int T, int D, int G, float eps);

// Step 1, a launcher of its own: with several GPUs slices exchange statistics next. They stay in scratch memory.
template <typename X> static void timestepnorm_statistics(Gpu& gpu, const X* inp, int B, int T, int D, int G) {
    float4* segments = gpu_scratch<float4>(gpu, SEGMENTS, B * G * norm_segments(T));
    int team = norm_team(D, G);
    if (!team) {
        timestepnorm_forward_any<X>(gpu, false, NULL, NULL, NULL, segments, inp, NULL, NULL, B, T, D, G, 0);
        return;
    }
    LAUNCH((team == 4 ? timestepnorm_statistics_kernel<X, 4> : timestepnorm_statistics_kernel<X, 8>),
           norm_blocks(B, T, G, team), 32 * WARPS, segments, inp, T, D, G);
}
// Steps 2 and 3. out, inp (B,T,D) | mean, rstd (B,T,G): saved for the backward pass | start, end (B,G): as the CPU's
template <typename X> static void timestepnorm_forward(Gpu& gpu, X* out, float* mean, float* rstd, NormState* end,
        const NormState* start, const X* inp, const float* w, const float* b, int B, int T, int D, int G, float eps) {
    float4* segments = gpu_scratch<float4>(gpu, SEGMENTS, B * G * norm_segments(T));
    int team = norm_team(D, G);
    timestepnorm_scan<NormState>(gpu, segments, end, start, B, T, G);
    if (!team) {
        timestepnorm_forward_any(gpu, true, out, mean, rstd, segments, inp, w, b, B, T, D, G, eps);
        return;
    }
    LAUNCH((team == 4 ? timestepnorm_forward_kernel<X, 4> : timestepnorm_forward_kernel<X, 8>),
           norm_blocks(B, T, G, team), 32 * WARPS, out, mean, rstd, segments, inp, w, b, T, D, G, eps);
}

// A row kernel: out once more, from the saved statistics. The backward pass calls it where out was not kept.
template <typename X, bool WIDE> __global__ void timestepnorm_again_kernel(X* out, const float* mean,
        const float* rstd, const X* inp, const float* w, const float* b, size_t rows, int D, int G) {
    float scale[8], shift[8], x[8];
    load_row<WIDE>(scale, w, D); load_row<WIDE>(shift, b, D);
    RowPiece<X, WIDE> next;
    auto fetch = [&](size_t r) { next.load(inp + r * D, r < rows ? D : 0); };
    for (size_t r = row_first(fetch); r < rows; r += row_step()) {
        int width = D / G; next.get(x); fetch(r + row_step());
        EACH(e, 8) {
            size_t k = r * G + min(column<WIDE>(WIDE ? 0 : e) / width, G - 1); // wide: 8 features of one group
            x[e] = (x[e] - mean[k]) * rstd[k] * (scale[e] + 1) + shift[e];
        }
        store_row<WIDE>(out + r * D, x, D);
    }
}
template <typename X> static void timestepnorm_again(Gpu& gpu, X* out, const float* mean, const float* rstd,
        const X* inp, const float* w, const float* b, size_t rows, int D, int G) {
    RowGrid r = row_grid(gpu, rows, D, 1, 8);
    LAUNCH(FORM(timestepnorm_again_kernel, wide(D / G)), r.grid, r.block, out, mean, rstd, inp, w, b, rows, D, G);
}

// Backward. The CPU's equations, with center the last mean:
//     dinp_s = f_s rstd_s + (U_s + 2 (inp_s - center) S_s) / width        f = dout (w + 1)
// U and S are sums from the end: again a scan, in the same three steps and by threads that stand at the same places.
//   1. reads dout and inp, and leaves (U, S, center) of each segment and the partial sums of dw and db;
//   2. turns the segments into what comes after each;
//   3. reads dout and inp again, adds up inside the segment, and writes dinp.

// What the kernels read.
template <typename X> struct NormInputs {
    const X* dout; const float *mean, *rstd; const NormState* start; const X* inp; const float* w;
    int B, T, D, G;
};
// The warp's timesteps alone: x, dy receive them, and U[i], S[i] the sums over timesteps i..3 of the 4; totals: over
// all 4, for the other warps to see. visit(x, dy, mean, rstd) is called for each timestep.
template <typename X, int TEAM> struct NormBackward {
    Piece<X, 8> x[STEPS], dy[STEPS];
    float mu[STEPS], r[STEPS], U[STEPS], S[STEPS], scale[8], center;
    template <typename Visit> __device__ NormBackward(float2 (&totals)[WARPS][32], const NormPlace<TEAM>& p,
            const NormInputs<X>& in, Visit visit) {
        auto [dout, mean, rstd, start, inp, w, B, T, D, G] = in;
        float count0 = start ? start[p.b * G + p.g].count : 0, a[8], d[8];
        center = mean[(p.b * T + T - 1) * G + p.g];
        EACH(i, STEPS) {
            size_t k = (p.b * T + p.t0 + i) * G + p.g;
            mu[i] = i < p.steps ? mean[k] : 0; r[i] = i < p.steps ? rstd[k] : 0;
            x[i].clear(); dy[i].clear();
            if (i < p.steps) { x[i].load(inp + p.at + (size_t)i * D); dy[i].load(dout + p.at + (size_t)i * D); }
        }
        EACH(e, 8) { scale[e] = w[p.g * p.WIDTH + 8 * p.member + e] + 1; }
        EACH(i, STEPS) {
            float sum_f = 0, sum_fx = 0;
            x[i].get(a); dy[i].get(d);
            EACH(e, 8) { float f = d[e] * scale[e]; sum_fx += f * (a[e] - mu[i]); sum_f += f; }
            visit(a, d, mu[i], r[i]);
            float inverse = quotient(1.0f, count0 + (float)(p.t0 + i + 1)), dmean = -r[i] * warp_sum<TEAM>(sum_f);
            float dvar = -0.5f * r[i] * r[i] * r[i] * warp_sum<TEAM>(sum_fx);
            U[i] = (dmean - 2 * (mu[i] - center) * dvar) * inverse; S[i] = dvar * inverse;
        }
#pragma unroll
        for (int i = STEPS - 2; i >= 0; i--) { U[i] += U[i + 1]; S[i] += S[i + 1]; }
        if (p.member == 0) { totals[p.warp][p.group] = make_float2(U[0], S[0]); }
        __syncthreads(); // the totals of all warps are there
    }
};
// Step 1. Each warp leaves dw and db of its timesteps in shared memory; then the CUDA block's threads add up the 8
// warps', a column each. partials (B, segments of a line, 2, D).
template <typename X, int TEAM> __global__ void __launch_bounds__(32 * WARPS) timestepnorm_backward_sums_kernel(
        float4* segments, float* partials, NormInputs<X> in) {
    __shared__ float2 totals[WARPS][32];
    alignas(16) __shared__ float sums[2][WARPS][32 * 8];
    float dw[8] = {0}, db[8] = {0};
    NormPlace<TEAM> p(in.T, in.D, in.G, false);
    NormBackward<X, TEAM> back(totals, p, in, [&](const float (&x)[8], const float (&dy)[8], float mu, float r) {
        EACH(e, 8) { dw[e] += dy[e] * (x[e] - mu) * r; db[e] += dy[e]; }
    });
    float4 all = make_float4(0, 0, back.center, 0);
    for (int k = WARPS - 1; k >= 0; k--) { all.x += totals[k][p.group].x; all.y += totals[k][p.group].y; }
    if (p.warp == 0 && p.member == 0 && p.active) { segments[p.segment] = all; }
    store(&sums[0][p.warp][threadIdx.x % 32 * 8], dw);
    store(&sums[1][p.warp][threadIdx.x % 32 * 8], db);
    __syncthreads(); // the sums of all warps are there
    partials += (p.b * ((in.T + SEGMENT - 1) / SEGMENT) + p.t0 / SEGMENT) * 2 * in.D;
    for (int i = threadIdx.x; i < 2 * 32 * 8; i += 32 * WARPS) {
        int which = i / (32 * 8), j = i % (32 * 8), column = p.first_group * p.WIDTH + j;
        if (column >= in.D) { continue; }
        float sum = 0;
        EACH(k, WARPS) { sum += sums[which][k][j]; }
        partials[(size_t)which * in.D + column] = sum;
    }
}
// Step 3. The other gradients of inp are added here, so that they are read once: add1, add2 (B,T,D) may be NULL, and
// add1 may be dinp. They are loaded before anything is written.
template <typename X, int TEAM> __global__ void __launch_bounds__(32 * WARPS) timestepnorm_backward_kernel(X* dinp,
        const float4* segments, const X* add1, const X* add2, NormInputs<X> in) {
    __shared__ float2 totals[WARPS][32]; NormPlace<TEAM> p(in.T, in.D, in.G, true);
    NormBackward<X, TEAM> back(totals, p, in, [](auto&&...) {});
    const float share = 1.0f / p.WIDTH;
    Piece<X, 8> added[STEPS][2]; float x[8], dy[8], a[8];
    float4 later = segments[p.segment];
    for (int k = WARPS - 1; k > p.warp; k--) { later.x += totals[k][p.group].x; later.y += totals[k][p.group].y; }
    EACH(i, STEPS) {
        EACH(k, 2) {
            const X* add = k ? add2 : add1;
            added[i][k].clear();
            if (add && i < p.steps) { added[i][k].load(add + p.at + (size_t)i * in.D); }
        }
    }
    EACH(i, STEPS) {
        if (i >= p.steps) { break; }
        float constant = (back.U[i] + later.x) * share, slope = 2 * (back.S[i] + later.y) * share;
        back.x[i].get(x); back.dy[i].get(dy);
        EACH(e, 8) { dy[e] = dy[e] * back.scale[e] * back.r[i] + constant + (x[e] - back.center) * slope; }
        EACH(k, 2) {
            added[i][k].get(a);
            EACH(e, 8) { dy[e] += a[e]; }
        }
        store(dinp + p.at + (size_t)i * in.D, dy);
    }
}
// The CPU's dstart, from the sums over all timesteps. A thread has one line.
__global__ void timestepnorm_dstart_kernel(NormState* dstart, const NormState* start, const NormSums* total,
        int lines) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= lines) { return; }
    double U = total[i].U + 2 * (start[i].mean - total[i].center) * total[i].S, count = start[i].count;
    dstart[i].mean += count * U; dstart[i].var += count * total[i].S;
}

template <typename X> static void timestepnorm_backward_any(Gpu& gpu, bool apply, X* dinp, float4* segments,
        float* partials, const X* add1, const X* add2, NormInputs<X> in); // see Odd sizes

// Step 1: the sums of segments, which stay in scratch memory; dw, db (D).
template <typename X> static void timestepnorm_backward_sums(Gpu& gpu, float* dw, float* db, const X* dout,
        const float* mean, const float* rstd, const NormState* start, const X* inp, const float* w, int B, int T,
        int D, int G) {
    float4* segments = gpu_scratch<float4>(gpu, SEGMENTS, B * G * norm_segments(T));
    float* partials = gpu_scratch<float>(gpu, PARTIALS, B * norm_segments(T) * 2 * D);
    NormInputs<X> in = {dout, mean, rstd, start, inp, w, B, T, D, G};
    int team = norm_team(D, G);
    if (!team) {
        timestepnorm_backward_any<X>(gpu, false, NULL, segments, partials, NULL, NULL, in);
    } else {
        LAUNCH((team == 4 ? timestepnorm_backward_sums_kernel<X, 4> : timestepnorm_backward_sums_kernel<X, 8>),
               norm_blocks(B, T, G, team), 32 * WARPS, segments, partials, in);
    }
    reduce_columns(gpu, partials, B * norm_segments(T), {{dw, db}, 2, D});
}
// Steps 2 and 3: dinp (B,T,D) is assigned, with add1 and add2. after (B,G): the sums of the timesteps that follow
// these, about the center; NULL for zero. (The CPU's start from dend.) dstart (B,G) is added to; NULL if not wanted.
template <typename X> static void timestepnorm_backward(Gpu& gpu, X* dinp, NormState* dstart, const NormSums* after,
        const X* add1, const X* add2, const X* dout, const float* mean, const float* rstd, const NormState* start,
        const X* inp, const float* w, int B, int T, int D, int G) {
    size_t lines = (size_t)B * G, count = norm_segments(T);
    float4* segments = gpu_scratch<float4>(gpu, SEGMENTS, lines * count);
    NormSums* total = dstart && start ? gpu_scratch<NormSums>(gpu, NORM_TOTALS, lines) : NULL;
    int team = norm_team(D, G);
    timestepnorm_scan<NormSums>(gpu, segments, total, after, B, T, G);
    if (total) { LAUNCH(timestepnorm_dstart_kernel, ceil_div(lines, 128), 128, dstart, start, total, (int)lines); }
    NormInputs<X> in = {dout, mean, rstd, start, inp, w, B, T, D, G};
    if (!team) { timestepnorm_backward_any<X>(gpu, true, dinp, segments, NULL, add1, add2, in); return; }
    LAUNCH((team == 4 ? timestepnorm_backward_kernel<X, 4> : timestepnorm_backward_kernel<X, 8>),
           norm_blocks(B, T, G, team), 32 * WARPS, dinp, segments, add1, add2, in);
}

// CEMA. With c = p g and s = h/p the CPU's recurrence becomes
//     s_t = q s_{t-1} + x_t         y_t = Re(sum_k c s_t) + omega x_t        sum_k: over a feature's N oscillators
// so that p and g stay out of the scan over time. There are two forms. The plain one (Odd sizes) follows the CPU's
// loops and takes any size and type. The one here runs on tensor cores, for the sizes of cema_on_tiles, in bf16. It
// is bound by memory. In both, sequences and features are parallel, and time is walked through.
enum { OSCILLATORS = 16,           // of a feature in the arrays below: 16, and MANY times as many (64) for N > 16
       MANY = CEMA_MAX_NDIM / OSCILLATORS,
       TILE = 16,                  // timesteps of a tile
       SPAN = 16 * TILE,           // timesteps of a span: a warp works on one at a time
       FEATURES = 8,               // of a CUDA block, one for each of its warps
       PRODUCTS = OSCILLATORS / 4, // a product, 16 x 8, has real and imaginary parts of 4 oscillators
       POWERS = TILE + 4 };        // powers of q that are made in advance
struct CemaCoef { float2 q, c; float p; };
ON_GPU_TOO static int cema_width(int N) { return OSCILLATORS * (N <= OSCILLATORS ? 1 : (int)MANY); } // NK below

template <typename Z> __device__ inline Z mul_add(Z a, Z b, Z c) { // of complex numbers: a b + c
    return {fma(a.x, b.x, fma(-a.y, b.y, c.x)), fma(a.x, b.y, fma(a.y, b.x, c.y))};
}
__device__ inline double sigmoid_double(double x) { return 1 / (1 + exp(-x)); }

// Where an oscillator begins: s_0 = h_0/p.
__device__ inline float2 cema_start(const float* start, size_t bd, int k, int N, float p) {
    return start && k < N ? make_float2(start[2 * (bd * N + k)] / p, start[2 * (bd * N + k) + 1] / p) : float2{0, 0};
}

// A thread has one oscillator. coef (D,NK), zero for k >= N; powers (D,POWERS,NK), NULL if not wanted: q^0 .. q^16,
// q^32, q^64, q^128, of the rounded q. In double, rounded once.
__global__ void cema_coefficients_kernel(CemaCoef* coef, float2* powers, CemaParams w, int D, int N, int NK) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, d = i / NK, k = i % NK;
    if (d >= D) { return; }
    CemaCoef o = {};
    if (k < N) {
        size_t at = (size_t)d * N + k;
        double p = sigmoid_double(w.alpha[at]), radius = 1 - p * sigmoid_double(w.delta[at]);
        double scale = p / sqrt((double)N); double2 unit; // exp(i phi)
        sincospi(2.0 / N * (k + 1) * sigmoid_double(w.theta[d]), &unit.y, &unit.x);
        o.p = p; o.q = make_float2(radius * unit.x, radius * unit.y);
        o.c = make_float2(scale * w.gamma[2 * at], scale * w.gamma[2 * at + 1]);
    }
    coef[i] = o;
    double2 q = {o.q.x, o.q.y}, power = {1, 0};
    for (int n = 0; powers && n < POWERS; n++) {
        powers[((size_t)d * POWERS + n) * NK + k] = make_float2(power.x, power.y);
        power = mul_add(power, n < TILE ? q : power, double2{0, 0}); // after q^16 by squaring
    }
}

// ON TENSOR CORES. Time is cut into tiles of 16 timesteps. Tile j begins with the state S_j. In it, t counts from 0:
//     y_t = sum_{u<=t} tap[t-u] x_u + Re(sum_k c q^(t+1) S_j)    tap[n] = Re(sum_k c q^n), and omega is added to tap[0]
//     S_{j+1} = q^16 S_j + e_j                                   e_j = sum_t q^(15-t) x_t: what the tile makes of 0
// A warp has one feature. It takes a span at a time, 16 tiles, as the 16 rows of a matrix x (tiles x timesteps):
//     e = x E        E (16 x 32): column (re or im of oscillator k), row t: q^(15-t)
//     S              from e by a scan over the 16 tiles; S (16 x 32): a row for each tile: re and im of S_j
//     y = x K + S C  K (16 x 16): tap[t-u]; C (32 x 16): re and -im of c q^(t+1)
// E, K and C are the same for all spans and stay in registers. x is exact in bf16; E, K, C and S are split in two bf16,
// high and low, which leaves y a relative error of 1e-5 before it is rounded. (Of S C, low times low is left out.)
// K has row u and column t, C row k and column t. In the code, m is the number of a product (16 x 8), in C[m] of a pair
// of products; n means columns 8n .. 8n+7; and j, in v[j] and at(j), is a register of a lane.
//
// THE SCAN. The instruction mma.m16n8k16 deals a product (16 x 8) to the lanes like this: lane 4g+i has of row g the
// columns 2i, 2i+1 in v[0], v[1], and of row g+8 the same columns in v[2], v[3]. Columns 2i, 2i+1 of product m are the
// real and imaginary part of oscillator 4m+i. Rows need not be tiles in their order. We make row g tile 2g and row g+8
// tile 2g+1, so that a lane has two tiles that follow each other:
//
//     g (lanes 4g .. 4g+3)    0        1        2        3        4        5        6        7
//     v[0..1], v[2..3]      e0 e1    e2 e3    e4 e5    e6 e7    e8 e9   e10 e11  e12 e13  e14 e15
//     in registers          q^16 e_2g + e_2g+1, and in g = 0 + q^32 S_0: what a lane's two tiles make of 0, or of S_0
//     shuffle from g-1        .     + q^32 ..  ...        (where g >= 1)
//     shuffle from g-2        .        .     + q^64 ..    (where g >= 2)
//     shuffle from g-4        .        .        .        .     + q^128 ..   (where g >= 4)
//                           S_2      S_4      S_6      S_8     S_10     S_12     S_14     S_16
//     shuffle from g-1      S_16     S_2      S_4      S_6     S_8      S_10     S_12     S_14     (g = 0 from g = 7)
//
// The last shuffle goes round: it brings each lane the state before its first tile, and lanes 0 to 3 the state after
// the span, which is S_0 of the next one. (With tiles in the order of the rows a lane would have tiles g and g+8, and
// it would take two scans over all lanes, one after the other.)
//
// What a lane has of S is also just what the instruction wants of it as a left factor: columns 2i, 2i+1 and 2i+8, 2i+9
// of rows g and g+8. The left factor's columns 0-7 are product 2m, 8-15 product 2m+1. So nothing has to move.
__device__ inline void split(uint32_t& high, uint32_t& low, float a, float b) {
    high = pack(a, b);
    low = pack(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xffff0000u));
}
struct Factor { // 16 x 8 of a right factor: rows 2i, 2i+1 | 2i+8, 2i+9 of column g
    uint32_t high[2], low[2];
    template <typename Value> __device__ void set(int i, Value value) {
        EACH(j, 2) { split(high[j], low[j], value(2 * i + 8 * j), value(2 * i + 8 * j + 1)); }
    }
};
struct Fragment { float v[4]; }; // 16 x 8 of a product, or of S
__device__ inline Fragment mma(const uint32_t (&a)[4], const uint32_t (&b)[2], Fragment c) { // a b + c
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c.v[0]), "+f"(c.v[1]), "+f"(c.v[2]), "+f"(c.v[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
        "r"(b[0]), "r"(b[1]));
    return c;
}
__device__ inline Fragment mma(const uint32_t (&a)[4], const Factor& b, Fragment c = {}) { // both halves of b
    return mma(a, b.low, mma(a, b.high, c));
}

// A span of 8 features in shared memory, transposed: time is the inner dimension. Gaps keep banks from conflicting.
template <typename Y> struct CemaSpan {
    enum { TWO_TILES = 2 * TILE + 8, PITCH = SPAN / (2 * TILE) * TWO_TILES + 16 / sizeof(Y) };
    alignas(16) Y x[FEATURES][PITCH];
    static __device__ int place(int t) { return t / (2 * TILE) * TWO_TILES + t % (2 * TILE); }
    // This lane's timesteps in register j of a left factor: 2i, 2i+1 (j < 2) or 8 later, of tile 2g (j even) or 2g+1.
    __device__ Y* at(int j) {
        int g = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
        return &x[threadIdx.x / 32][g * TWO_TILES + j % 2 * TILE + j / 2 * 8 + 2 * i];
    }
    // Timestep t of all 8 features, 16 bytes; zeros past the end. put and write: to and from its place in the span.
    static __device__ uint4 read(const bf16* from, int t, int T, int D) {
        return t < T ? *(const uint4*)(from + (size_t)t * D) : make_uint4(0, 0, 0, 0);
    }
    __device__ void put(int t, uint4 row) {
        const uint32_t w[4] = {row.x, row.y, row.z, row.w};
        EACH(c, FEATURES) { x[c][place(t)] = __ushort_as_bfloat16(w[c / 2] >> c % 2 * 16); }
    }
    __device__ void write(bf16* to, int t) const {
        float row[FEATURES];
        EACH(c, FEATURES) { row[c] = x[c][place(t)]; }
        store(to, row);
    }
    __device__ void load(uint32_t (&a)[4]) { EACH(j, 4) { a[j] = *(uint32_t*)at(j); } }
    __device__ void load_transposed(uint32_t (&a)[4]) { // rows are timesteps, columns tiles
        int lane = threadIdx.x % 32, at = lane % 8 * TWO_TILES + lane / 16 * TILE + lane / 8 % 2 * 8;
        unsigned from = __cvta_generic_to_shared(&x[threadIdx.x / 32][at]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(from) : "memory");
    }
};

// What a thread knows of its feature, and the two steps that forward and backward share.
struct CemaWarp {
    int d, g, i;   // feature | lane 4g+i; its oscillators are 4m+i, m < PRODUCTS
    size_t bd, at; // of (b,d) | of the CUDA block's features at (b,0) among (B,T,D)
    const CemaCoef* coef; const float2* powers;
    Factor E[PRODUCTS];    // E[m]: columns 8m .. of E
    Factor K[2], C[2][2];  // K[n]: columns 8n .. of K; C[m][n]: rows 16m .., columns 8n .. of C
    float2 q[PRODUCTS][4]; // q^16, q^32, q^64, q^128 of oscillator 4m+i

    __device__ CemaWarp(const CemaCoef* coefs, const float2* all_powers, const float* omega, int T, int D) {
        __shared__ float taps[FEATURES][2 * TILE + 1];
        float* tap = taps[threadIdx.x / 32] + TILE; // of this warp's feature; 0 for negative indices
        float sums[3] = {0}; // over this lane's oscillators: its share of tap[g+1], tap[g+9], tap[0]
        d = blockIdx.x * FEATURES + threadIdx.x / 32; g = threadIdx.x % 32 / 4; i = threadIdx.x % 4;
        bd = (size_t)blockIdx.y * D + d; at = (size_t)blockIdx.y * T * D + blockIdx.x * FEATURES;
        coef = coefs + (size_t)d * OSCILLATORS; powers = all_powers + (size_t)d * POWERS * OSCILLATORS;
        EACH(m, PRODUCTS) {
            float2 c0 = coef[4 * m + i].c;
            sums[2] += c0.x;
            // C[m/2][n]: column g is timestep 8n+g; rows 2i, 2i+1 (m even) or 2i+8, 2i+9 (m odd) are oscillator 4m+i
            EACH(n, 2) {
                float2 v = mul_add(c0, powers[(8 * n + g + 1) * OSCILLATORS + 4 * m + i], float2{0, 0});
                split(C[m / 2][n].high[m % 2], C[m / 2][n].low[m % 2], v.x, -v.y);
                sums[n] += v.x;
            }
            E[m].set(i, [&](int t) { return component(TILE - 1 - t, m); });
            EACH(j, 4) { q[m][j] = powers[(TILE + j) * OSCILLATORS + 4 * m + i]; }
        }
        EACH(n, 3) { EACH(o, 2) { sums[n] += __shfl_xor_sync(~0u, sums[n], 1 << o); } } // over i: all 16
        if (i < 2) { tap[g + 8 * i - TILE] = 0; tap[g + 8 * i + 1] = i ? sums[1] : sums[0]; }
        if (threadIdx.x % 32 == 0) { tap[0] = sums[2] + omega[d]; }
        __syncwarp(); // the taps are there
        EACH(n, 2) { K[n].set(i, [&](int u) { return tap[8 * n + g - u]; }); } // t = 8n+g
    }
    __device__ float component(int n, int m) const { // of q^n in column g of E[m]: re or im of oscillator 4m + g/2
        float2 v = powers[n * OSCILLATORS + 4 * m + g / 2];
        return g & 1 ? v.y : v.x;
    }
    // THE SCAN above: e_j of the span's tiles, product m, to S_j. carry is the state before the span and becomes the
    // one after it, in lanes 0 to 3. Descending: from the last tile to the first, carry in lanes 28 to 31.
    template <bool DESCENDING> __device__ Fragment scan(Fragment e, float2& carry, int m) const {
        enum { FIRST = DESCENDING ? 2 : 0, SECOND = 2 - FIRST }; // registers of the first and second tile in this order
        int order = DESCENDING ? 7 - g : g, lane = threadIdx.x % 32;
        auto before = [&](float2 s, int n) { // that of g-n, going round
            int from = (DESCENDING ? lane + 4 * n : lane - 4 * n) & 31;
            return make_float2(__shfl_sync(~0u, s.x, from), __shfl_sync(~0u, s.y, from));
        };
        float2 first = {e.v[FIRST], e.v[FIRST + 1]}, s = mul_add(q[m][0], first, float2{e.v[SECOND], e.v[SECOND + 1]});
        if (order == 0) { s = mul_add(q[m][1], carry, s); }
        EACH(n, 3) {
            float2 other = before(s, 1 << n);
            if (order >= 1 << n) { s = mul_add(q[m][n + 1], other, s); }
        }
        s = before(s, 1);
        float2 start = order ? s : carry; // before the lane's first tile
        carry = s;                        // read where order is 0: there it has gone round
        s = mul_add(q[m][0], start, first);
        return DESCENDING ? Fragment{s.x, s.y, start.x, start.y} : Fragment{start.x, start.y, s.x, s.y};
    }
    // y = x K + S C, to shared memory.
    __device__ void output(CemaSpan<float>& to, const uint32_t (&x)[4], const Fragment (&S)[PRODUCTS]) const {
        Fragment y[2] = {mma(x, K[0]), mma(x, K[1])};
        EACH(m, 2) {
            uint32_t high[4], low[4];
            EACH(j, 4) { split(high[j], low[j], S[2 * m + j / 2].v[j % 2 * 2], S[2 * m + j / 2].v[j % 2 * 2 + 1]); }
            EACH(n, 2) { y[n] = mma(low, C[m][n].high, mma(high, C[m][n], y[n])); }
        }
        EACH(j, 4) { *(float2*)to.at(j) = {y[j / 2].v[j % 2 * 2], y[j / 2].v[j % 2 * 2 + 1]}; }
    }
};

// A CUDA block walks through one sequence, 8 features, a span at a time: its 256 threads read 16 bytes of one timestep
// each, and write them transposed to shared memory; the next span is on its way meanwhile; each warp computes its
// feature; the threads write the result as they read. inp is read once and out written once. carries (spans,B,D,16)
// receives the states before each span, all that the backward pass needs. Two CUDA blocks share a multiprocessor (the
// 2 in __launch_bounds__): one computes while the other waits. The backward kernel needs too many registers for this.
__global__ void __launch_bounds__(32 * FEATURES, 2) cema_forward_tiles_kernel(bf16* out, float* end, float2* carries,
        const float* start, const bf16* inp, const CemaCoef* coef, const float2* powers, const float* omega, int T,
        int D, int N) {
    __shared__ CemaSpan<bf16> given; __shared__ CemaSpan<float> made;
    CemaWarp warp(coef, powers, omega, T, D); float2 carry[PRODUCTS];
    EACH(m, PRODUCTS) { int k = 4 * m + warp.i; carry[m] = cema_start(start, warp.bd, k, N, warp.coef[k].p); }
    uint4 next = given.read(inp + warp.at, threadIdx.x, T, D);
    for (int t0 = 0; t0 < T; t0 += SPAN, carries += (size_t)gridDim.y * D * OSCILLATORS) {
        uint32_t x[4]; Fragment S[PRODUCTS];
        given.put(threadIdx.x, next);
        next = given.read(inp + warp.at, t0 + SPAN + threadIdx.x, T, D);
        __syncthreads(); // given is there, and made of the span before has been read
        given.load(x);
        EACH(m, PRODUCTS) {
            if (warp.g == 0) { carries[warp.bd * OSCILLATORS + 4 * m + warp.i] = carry[m]; }
            S[m] = warp.scan<false>(mma(x, warp.E[m]), carry[m], m);
        }
        warp.output(made, x, S);
        // In the last span, the state after T: timestep by timestep from S of the tile in which T lies, which zeros
        // past T do not reach. If T ends the span, the tile would be number 16, in g = 8, that is 0 after the last
        // shuffle. Its state is the carry, which is valid only in g = 0.
        int left = T - t0, tile = left / TILE;
        EACH(m, PRODUCTS) {
            int k = 4 * m + warp.i;
            if (!end || left > SPAN || k >= N || warp.g != tile / 2 % 8) { continue; }
            int odd = tile % 2;
            float2 last = left == SPAN ? carry[m] : float2{odd ? S[m].v[2] : S[m].v[0], odd ? S[m].v[3] : S[m].v[1]};
            for (int t = tile * TILE; t < left; t++) {
                last = mul_add(warp.coef[k].q, last, float2{to_float(given.x[threadIdx.x / 32][given.place(t)]), 0});
            }
            ((float2*)end)[warp.bd * N + k] = {warp.coef[k].p * last.x, warp.coef[k].p * last.y};
        }
        __syncthreads(); // made is there, and given has been read
        int t = t0 + threadIdx.x;
        if (t < T) { made.write(out + warp.at + (size_t)t * D, threadIdx.x); }
    }
}

// BACKWARD. As on the CPU, a_t = dy_t + ~q a_{t+1} is carried through time, descending. With h = p s its sums become
//     dp = Re(~g Q)      Q = sum_t x_t a_t
//     dg = p Dg          Dg = sum_t dy_t ~s_t = Q + ~q (~s_0 a_1 - ~s_T a_{T+1})
//     dq = p ~g Dq       Dq = sum_t a_t ~s_{t-1}: p Dq is the CPU's p R + ~h_0 a'_0, in another order
// To have no conjugates, write A_t for ~a_t. In tile j, t counts from 0, and f_j is A at the first timestep after it:
//     A_t = sum_{u>=t} q^(u-t) dy_u + q^(16-t) f_j        f_{j-1} = q^16 f_j + z_j,    z_j = sum_t q^t dy_t
//     dx_t = sum_{u>=t} tap[u-t] dy_u + Re(sum_k c q^(16-t) f_j)
// These are the forward pass's formulas for dy reversed in time inside the tile: z_j is e_j, f_j is S_j, dx is y. So dy
// is put into shared memory reversed, and E, K, C, the scan (descending) and output() serve again.
//
// THE SUMS. In tile j:
//     s_{t-1} = q^t S_j + sum_{u<t} q^(t-1-u) x_u        A_t = q^(16-t) f_j + sum_{v>=t} q^(v-t) dy_v
//     ~Dg = sum_t dy_t s_t = sum_n l_n q^n + q sum_j S_j z_j      l_n = sum of x_t dy_{t+n}, t and t+n in one tile
// l_0 is also domega. (A_{T+1} is f of the last tile.) ~Dq = sum_t A_t s_{t-1} has, in each tile, two terms times two:
//     S_j with f_j:  16 q^16 S_j f_j              S_j with dy:  sum_v (v+1) q^v dy_v S_j = S_j z_j + q S_j z'_j
//     x with dy:     sum_n n l_n q^(n-1)          x with f_j:   sum_u (15-u) q^(15-u) x_u f_j = q f_j e'_j
//     e'_j = sum_t (15-t) q^(14-t) x_t        z'_j = sum_t t q^(t-1) dy_t, which is e'_j of dy reversed
// In the code, sz = sum_j S_j z_j, sf = sum_j S_j f_j, rest = sum_j (S_j z'_j + f_j e'_j), and the l_n are sums along
// the diagonals of `lag`, the products of all x_t and dy_u, summed over tiles.
struct CemaSums { float2 Dg, Q, Dq, a; }; // of an oscillator, over time; a: a_1

// As forward, but the spans are descending. A warp has the states of its span's tiles from carries, by the forward
// pass's scan. inp and dout are read once and dinp written once. sums (B,D,16), domega (B,D) | a_end, end (B,D,N,2):
// a_{T+1} and h_T, or NULL; if they are given, T is a multiple of a span
__global__ void __launch_bounds__(32 * FEATURES) cema_backward_tiles_kernel(bf16* dinp, CemaSums* sums,
        float* domega, const float2* carries, const float* end, const float* a_end, const bf16* dout, const bf16* inp,
        const CemaCoef* coef, const float2* powers, const float* omega, int T, int D, int N) {
    __shared__ CemaSpan<bf16> given_x, given_dy; __shared__ CemaSpan<float> made;
    CemaWarp warp(coef, powers, omega, T, D);
    Factor derivative[PRODUCTS]; // of E by q: makes e' of x and z' of dy
    Fragment lag[2] = {};
    float2 sz[PRODUCTS] = {}, sf[PRODUCTS] = {}, rest[PRODUCTS] = {}, next_S[PRODUCTS];
    float2 later[PRODUCTS] = {}; // the carry: A at the first timestep after the span; in the end A_1
    uint4 next_x, next_dy;
    const int time = threadIdx.x, reversed = time ^ (TILE - 1);
    auto fetch = [&](int t0) {
        next_x = given_x.read(inp + warp.at, t0 + time, T, D);
        next_dy = given_dy.read(dout + warp.at, t0 + time, T, D);
        size_t at = ((size_t)(t0 / SPAN) * gridDim.y * D + warp.bd) * OSCILLATORS + warp.i;
        EACH(m, PRODUCTS) { next_S[m] = carries[at + 4 * m]; }
    };
    auto add_product = [](float2& sum, Fragment u, Fragment v) { // of this lane's two tiles
        EACH(j, 2) { sum = mul_add(float2{u.v[2 * j], u.v[2 * j + 1]}, float2{v.v[2 * j], v.v[2 * j + 1]}, sum); }
    };
    auto A_end = [&](int k) {
        float2 v = a_end && k < N ? ((const float2*)a_end)[warp.bd * N + k] : float2{0, 0};
        return make_float2(v.x, -v.y);
    };
    EACH(m, PRODUCTS) {
        later[m] = A_end(4 * m + warp.i);
        derivative[m].set(warp.i, [&](int t) { return (TILE - 1 - t) * warp.component(max(TILE - 2 - t, 0), m); });
    }
    int t0 = (T - 1) / SPAN * SPAN;
    for (fetch(t0); t0 >= 0; t0 -= SPAN) {
        uint32_t x[4], dy[4];
        float2 carry[PRODUCTS] = {next_S[0], next_S[1], next_S[2], next_S[3]};
        Fragment f[PRODUCTS];
        given_x.put(time, next_x); given_dy.put(reversed, next_dy);
        if (t0 >= SPAN) { fetch(t0 - SPAN); }
        __syncthreads(); // given is there, and made of the span before has been read
        given_x.load_transposed(x); given_dy.load_transposed(dy);
        // lag[n]: row 15-u, column t-8n: the sum over tiles of dy_u x_t. load_transposed (ldmatrix.trans) gives
        // rows = timesteps, columns = tiles. Registers n, n+2 of that left factor (16 x 16) are a right factor (16 x 8)
        // whose columns are timesteps 8n .. 8n+7. The permuted order of tiles does not matter: they are summed.
        EACH(n, 2) { lag[n] = mma(dy, {x[n], x[n + 2]}, lag[n]); }
        given_x.load(x); given_dy.load(dy);
        EACH(m, PRODUCTS) {
            Fragment S = warp.scan<false>(mma(x, warp.E[m]), carry[m], m), z = mma(dy, warp.E[m]);
            add_product(sz[m], S, z); add_product(rest[m], S, mma(dy, derivative[m]));
            f[m] = warp.scan<true>(z, later[m], m);
            add_product(sf[m], S, f[m]); add_product(rest[m], mma(x, derivative[m]), f[m]);
        }
        warp.output(made, dy, f);
        __syncthreads(); // made is there, and given has been read
        if (t0 + time < T) { made.write(dinp + warp.at + (size_t)(t0 + time) * D, reversed); }
    }

    // The sums are spread over the lanes. They are added up over g, and lane k becomes oscillator k. `later` is A_1, in
    // lanes 28 to 31 (g = 7), where the descending scan has left it.
    __shared__ float2 totals[FEATURES][OSCILLATORS][4];
    __shared__ float lags[FEATURES][TILE][TILE + 1];
    int w = threadIdx.x / 32, lane = threadIdx.x % 32;
    EACH(m, PRODUCTS) {
        float2 all[4] = {sz[m], sf[m], rest[m], later[m]};
        EACH(j, 4) {
            EACH(o, 3) { // g is bits 2 to 4 of the lane
                if (j == 3) { continue; }
                all[j].x += __shfl_xor_sync(~0u, all[j].x, 4 << o);
                all[j].y += __shfl_xor_sync(~0u, all[j].y, 4 << o);
            }
            if (warp.g == 7) { totals[w][4 * m + warp.i][j] = all[j]; }
        }
    }
    EACH(n, 2) { EACH(j, 4) { lags[w][warp.g + j / 2 * 8][8 * n + 2 * warp.i + j % 2] = lag[n].v[j]; } }
    __syncwarp(); // the warp's totals and lags are there
    float l = 0; // of lane n: l_n
    for (int t = 0; t < TILE - lane; t++) { l += lags[w][TILE - 1 - lane - t][t]; }
    int k = lane % OSCILLATORS;
    float2 q = warp.coef[k].q, top = warp.powers[(TILE - 1) * OSCILLATORS + k];
    float2 Dg = {0, 0}, Dq = {0, 0}; // ~Dg and ~Dq, as Q below is ~Q: `sums` receives their conjugates
    auto [all_sz, all_sf, all_rest, A_1] = totals[w][k];
    for (int n = TILE - 1; n >= 0; n--) { // Horner's rule for Dg = sum_n l_n q^n and for its derivative by q, Dq
        Dq = mul_add(q, Dq, Dg); Dg = mul_add(q, Dg, float2{__shfl_sync(~0u, l, n), 0});
    }
    float2 of_tiles = mul_add(float2{TILE * top.x, TILE * top.y}, all_sf, all_rest);
    Dg = mul_add(q, all_sz, Dg); of_tiles = mul_add(q, of_tiles, all_sz);
    if (lane == 0) { domega[warp.bd] = l; }
    if (lane >= OSCILLATORS) { return; }
    float2 s_0 = carries[warp.bd * OSCILLATORS + k], s_T = cema_start(end, warp.bd, k, N, warp.coef[k].p);
    float2 border = mul_add(s_T, A_end(k), mul_add(float2{-s_0.x, -s_0.y}, A_1, float2{0, 0})); // A_{T+1} s_T - A_1 s_0
    float2 Q = mul_add(q, border, Dg);
    sums[warp.bd * OSCILLATORS + k] = {{Dg.x, -Dg.y}, {Q.x, -Q.y}, {Dq.x + of_tiles.x, -Dq.y - of_tiles.y},
                                       {A_1.x, -A_1.y}};
}

// From the sums to gradients of parameters, as in steps 3 to 7 of the CPU's. A thread has one oscillator and adds up
// the sequences. The threads with one threadIdx.y have one feature; the first does what the oscillators share.
__global__ void cema_gradients_kernel(CemaParams dw, float* dstart, const CemaSums* sums, const float* domega,
        const CemaCoef* coef, CemaParams w, bool accumulate, int B, int D, int N, int NK) {
    __shared__ double dphis[256];
    int k = threadIdx.x, d = blockIdx.x * blockDim.y + threadIdx.y;
    double dphi = 0, s_theta = d < D ? sigmoid_double(w.theta[d]) : 0;
    auto set = [&](float* gradient, size_t i, double v) { gradient[i] = (accumulate ? gradient[i] : 0) + v; };
    if (d < D && k < N) {
        size_t i = (size_t)d * N + k; CemaCoef o = coef[(size_t)d * NK + k];
        double p = sigmoid_double(w.alpha[i]), root = sqrt((double)N), dp = 0;
        double2 q = {o.q.x, o.q.y}, g = {w.gamma[2 * i] / root, w.gamma[2 * i + 1] / root}, dq = {0, 0}, dg = {0, 0};
        for (int b = 0; b < B; b++) {
            size_t bd = (size_t)b * D + d, at_h = 2 * (bd * N + k);
            CemaSums s = sums[bd * NK + k];
            dp += g.x * s.Q.x + g.y * s.Q.y;
            dq = mul_add(double2{p * g.x, -p * g.y}, double2{s.Dq.x, s.Dq.y}, dq);
            dg = {dg.x + p * s.Dg.x, dg.y + p * s.Dg.y};
            if (!dstart) { continue; }
            double2 qa = mul_add(double2{q.x, -q.y}, double2{s.a.x, s.a.y}, double2{0, 0}); // ~q a_1
            qa = mul_add(double2{g.x, -g.y}, qa, double2{dstart[at_h], dstart[at_h + 1]});
            dstart[at_h] = qa.x; dstart[at_h + 1] = qa.y;
        }
        double s_delta = sigmoid_double(w.delta[i]), sine, cosine;
        sincospi(2.0 / N * (k + 1) * s_theta, &sine, &cosine);
        double dradius = cosine * dq.x + sine * dq.y;
        dphi = (k + 1) * (q.x * dq.y - q.y * dq.x); // the CPU's dphi times k+1, for dtheta
        set(dw.gamma, 2 * i, dg.x / root); set(dw.gamma, 2 * i + 1, dg.y / root);
        set(dw.alpha, i, p * (1 - p) * (dp - s_delta * dradius));
        set(dw.delta, i, -p * s_delta * (1 - s_delta) * dradius);
    }
    dphis[threadIdx.y * NK + k] = dphi;
    __syncthreads(); // all oscillators' are there
    if (k || d >= D) { return; }
    double dtheta = 0, direct = 0;
    for (int j = 0; j < N; j++) { dtheta += dphis[threadIdx.y * NK + j]; }
    for (int b = 0; b < B; b++) { direct += domega[(size_t)b * D + d]; }
    set(dw.theta, d, 2 * M_PI / N * s_theta * (1 - s_theta) * dtheta);
    set(dw.omega, d, direct);
}

// May a launch run on tensor cores? If so, coefficients come with powers. Fewer than 4 tiles would leave most of a span
// empty. (See cema_backward for one more condition.)
template <typename X> static bool cema_on_tiles(int T, int D, int N) {
    return std::is_same<X, bf16>::value && N <= OSCILLATORS && D % FEATURES == 0 && T >= 4 * TILE;
}
struct Coefficients { CemaCoef* coef; float2* powers; int NK; };
static Coefficients cema_coefficients(Gpu& gpu, const CemaParams& w, int D, int N, bool powers) {
    size_t NK = cema_width(N), size = D * NK;
    size_t bytes = size * (sizeof(CemaCoef) + POWERS * sizeof(float2));
    CemaCoef* coef = (CemaCoef*)gpu_scratch<char>(gpu, COEFFICIENTS, bytes);
    Coefficients r = {coef, powers ? (float2*)(coef + size) : NULL, (int)NK};
    LAUNCH(cema_coefficients_kernel, ceil_div(size, 128), 128, r.coef, r.powers, w, D, N, r.NK);
    return r;
}
static dim3 cema_grid(int B, int D) { return dim3(ceil_div(D, FEATURES), B); }
// Floats that a layer keeps for the backward pass: the states before each span.
static size_t cema_carries_size(int B, int T, int D) { return ceil_div(T, SPAN) * B * D * OSCILLATORS * 2; }

// out, inp (B,T,D) | start, end (B,D,N,2), w: as the CPU's | carries: saved for the backward pass
template <typename X> static void cema_forward(Gpu& gpu, X* out, float* end, float* carries, const float* start,
        const X* inp, const CemaParams& w, int B, int T, int D, int N) {
    bool tiles = cema_on_tiles<X>(T, D, N);
    Coefficients r = cema_coefficients(gpu, w, D, N, tiles);
    if (!tiles) { cema_forward_any(gpu, out, end, start, inp, r, w.omega, B, T, D, N); return; } // see Odd sizes
    LAUNCH(cema_forward_tiles_kernel, cema_grid(B, D), 32 * FEATURES, (bf16*)out, end, (float2*)carries, start,
           (const bf16*)inp, r.coef, r.powers, w.omega, T, D, N);
}

// dinp (B,T,D) and, unless gpu.accumulate, dw are assigned | dstart, start, end, a_end (B,D,N,2): as the CPU's, dstart
// is added to. If an a_end enters inside a span, the plain form takes it, which does not need carries.
template <typename X> static void cema_backward(Gpu& gpu, X* dinp, const CemaParams& dw, float* dstart,
        const X* dout, const float* carries, const float* start, const float* end, const float* a_end, const X* inp,
        const CemaParams& w, int B, int T, int D, int N) {
    bool tiles = cema_on_tiles<X>(T, D, N) && !(a_end && T % SPAN);
    Coefficients r = cema_coefficients(gpu, w, D, N, tiles);
    size_t states = (size_t)B * D * r.NK;
    CemaSums* sums = (CemaSums*)gpu_scratch<float>(gpu, CEMA_SUMS, states * 8 + (size_t)B * D);
    float* domega = (float*)(sums + states);
    if (tiles) {
        LAUNCH(cema_backward_tiles_kernel, cema_grid(B, D), 32 * FEATURES, (bf16*)dinp, sums, domega, (float2*)carries,
               end, a_end, (const bf16*)dout, (const bf16*)inp, r.coef, r.powers, w.omega, T, D, N);
    } else { // see Odd sizes
        cema_backward_any(gpu, dinp, sums, domega, dout, start, end, a_end, inp, r, w.omega, B, T, D, N);
    }
    LAUNCH(cema_gradients_kernel, ceil_div(D, 256 / r.NK), dim3(r.NK, 256 / r.NK), dw, dstart, sums, domega, r.coef, w,
           gpu.accumulate, B, D, N, r.NK);
}

// LAYER NORM AND RMS NORM. A row kernel: it reads inp once and writes out once. With mean and b NULL it is RMS norm.
template <typename X, bool WIDE, bool DROP> __global__ void norm_forward_kernel(X* out, int ldo, float* mean,
        float* rstd, const X* inp, const float* w, const float* b, size_t rows, int D, float eps, Dropout drop) {
    float scale[8], shift[8] = {0}, x[8], s[2], share = 1.0f / D;
    int turn = 0; load_row<WIDE>(scale, w, D);
    if (b) { load_row<WIDE>(shift, b, D); }
    RowPiece<X, WIDE> next; X next_near;
    auto fetch = [&](size_t r) {
        next.load(inp + r * D, r < rows ? D : 0);
        if (mean) { next_near = inp[r < rows ? r * D : 0]; }
    };
    for (size_t r = row_first(fetch); any_row(r, rows); r += row_step()) {
        next.get(x);
        float near = mean ? to_float(next_near) : 0; // sums about one of the values: the variance does not cancel
        fetch(r + row_step());
        s[0] = s[1] = 0;
        EACH(e, 8) { float y = column<WIDE>(e) < D ? x[e] - near : 0; s[0] += y; s[1] += y * y; }
        row_sum(s, turn);
        float off = mean ? s[0] * share : 0, m = near + off, k = rsqrtf(fmaxf(s[1] * share - off * off, 0) + eps);
        EACH(e, 8) { x[e] = (x[e] - m) * k * (scale[e] + 1) + shift[e]; }
        drop_row<WIDE, DROP>(x, drop, r);
        store_row<WIDE>(out + r * ldo, x, r < rows ? D : 0);
        if (threadIdx.x == 0 && r < rows) {
            rstd[r] = k;
            if (mean) { mean[r] = m; }
        }
    }
}
// out (rows,D), rows ldo apart = dropout((inp - mean) rstd (w + 1) + b) | mean, rstd (rows): saved
template <typename X> static void norm_forward(Gpu& gpu, X* out, int ldo, float* mean, float* rstd, const X* inp,
        const float* w, const float* b, size_t rows, int D, float eps, Dropout drop = no_dropout) {
    RowGrid r = row_grid(gpu, rows, D, 1, 8);
    LAUNCH(FORM_DROP(norm_forward_kernel, wide(D, ldo), drop), r.grid, r.block, out, ldo, mean, rstd, inp, w, b, rows,
           D, eps, drop);
}

// A row kernel: it reads inp and dout once and writes dinp, and again if wanted, once. Column sums stay in registers.
template <typename X, bool WIDE, bool DROP> __global__ void norm_backward_kernel(X* dinp, float* partials, X* again,
        const X* dout, int ld, const float* mean, const float* rstd, const X* inp, const float* w, const float* b,
        size_t rows, int D, Dropout drop) {
    float scale[8], shift[8] = {0}, dw[8] = {0}, db[8] = {0}, dx[8] = {0}, x[8], dy[8], s[2], share = 1.0f / D;
    int turn = 0, gradients = mean ? 3 : 1;
    load_row<WIDE>(scale, w, D);
    if (b) { load_row<WIDE>(shift, b, D); }
    RowPiece<X, WIDE> next_x, next_dy;
    auto fetch = [&](size_t r) {
        next_x.load(inp + r * D, r < rows ? D : 0); next_dy.load(dout + r * ld, r < rows ? D : 0);
    };
    for (size_t r = row_first(fetch); any_row(r, rows); r += row_step()) {
        int columns = r < rows ? D : 0;
        float m = columns && mean ? mean[r] : 0, k = columns ? rstd[r] : 0;
        next_x.get(x); next_dy.get(dy); fetch(r + row_step());
        drop_row<WIDE, DROP>(dy, drop, r);
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
        drop_row<WIDE, DROP>(x, drop, r);
        if (again) { store_row<WIDE>(again + r * ld, x, columns); }
    }
    store_partial<WIDE>(partials, gradients, D, 0, dw, D);
    if (!mean) { return; }
    store_partial<WIDE>(partials, gradients, D, 1, db, D);
    store_partial<WIDE>(partials, gradients, D, 2, dx, D);
}
// dinp = rstd (f - n mean(f n) - mean(f)) with f = dout (w+1), n = (inp - mean) rstd; mean(f) only for layer norm.
// again receives the forward pass's output if not NULL; its rows and those of dout lie ld apart. dw, db, dinp_sum (D):
// dinp_sum is the column sum of dinp, the gradient of wh1's bias. db, dinp_sum and b are NULL where mean is.
template <typename X> static void norm_backward(Gpu& gpu, X* dinp, float* dw, float* db, float* dinp_sum, X* again,
        const X* dout, int ld, const float* mean, const float* rstd, const X* inp, const float* w, const float* b,
        size_t rows, int D, Dropout drop = no_dropout) {
    RowGrid r = row_grid(gpu, rows, D, 1, 2, 3 * D);
    LAUNCH(FORM_DROP(norm_backward_kernel, wide(D, ld), drop), r.grid, r.block, dinp, r.partials, again, dout, ld, mean,
           rstd, inp, w, b, rows, D, drop);
    reduce_columns(gpu, r.partials, r.blocks, {{dw, db, dinp_sum}, mean ? 3 : 1, D});
}

// QUERIES AND KEYS. In kernels of tensors with heads, blockIdx.y is the head; a row is then one head of a timestep.
// head_major: where row r begins in a head-major tensor (B,H,K,d) that has a sequence's T timesteps from pos on.
__device__ inline size_t head_major(unsigned r, int T, int K, int pos, int d) {
    return (((size_t)(r / T) * gridDim.y + blockIdx.y) * K + pos + r % T) * d;
}

// A query or a key: the affine map of a normalized row x, scaled, and turned by the angles.
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

// A row kernel: the RMS norm of the head (eq. 6), both affine maps (eq. 7, 8) and the rotary embedding. z is read once.
template <typename X, bool WIDE> __global__ void qk_forward_kernel(X* q, X* k, X* znorm, float* znorm_rstd, const X* z,
        int ldz, const float* gamma, const float* beta, const float* rotations, unsigned rows, int T, int K, int pos,
        int at_k, int c, int Z, int zd, float eps) {
    float ga[2][8], be[2][8], x[8], angle[8], y[8], s[1], share = 1.0f / zd, scale = sqrtf(share);
    int turn = 0, h = blockIdx.y;
    for (int i = 0; i < 2; i++) {
        load_row<WIDE>(ga[i], gamma + i * Z + h * zd, zd); load_row<WIDE>(be[i], beta + i * Z + h * zd, zd);
    }
    RowPiece<X, WIDE> next;
    auto fetch = [&](unsigned r) { next.load(z + (size_t)r * ldz + h * zd, r < rows ? zd : 0); };
    for (unsigned r = row_first(fetch); any_row(r, rows); r += row_step()) {
        int columns = r < rows ? zd : 0;
        next.get(x); fetch(r + row_step());
        load_row<WIDE>(angle, rotations + (size_t)((pos + r % T) % c) * zd, columns);
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
            turned(y, x, ga[i], be[i], angle, scale);
            store_row<WIDE>(i ? k + head_major(r, T, K, at_k, zd) : q + head_major(r, T, T, 0, zd), y, columns);
        }
    }
}
// z (B,T,Z), rows ldz apart | q (B,H,T,Z/H) | k (B,H,K,Z/H), written from timestep at_k on | the first timestep stands
// at pos in its chunk | rotations (c,Z/H/2,2) | znorm (B,T,H,Z/H) and its rstd are only for tests, else NULL
template <typename X> static void qk_forward(Gpu& gpu, X* q, X* k, X* znorm, float* znorm_rstd, const X* z, int ldz,
        const float* gamma, const float* beta, const float* rotations, int B, int T, int K, int pos, int at_k, int c,
        int Z, int H, float eps) {
    RowGrid r = row_grid(gpu, (size_t)B * T, Z / H, H, 8);
    LAUNCH(FORM(qk_forward_kernel, wide(Z / H, ldz)), r.grid, r.block, q, k, znorm, znorm_rstd, z, ldz, gamma, beta,
           rotations, B * T, T, K, pos, at_k, c, Z, Z / H, eps);
}

// A row kernel: it reads z, dq and dk once and writes dz, and dznorm if wanted, once; it computes the norm of z again.
template <typename X, bool WIDE> __global__ void qk_backward_kernel(X* dz, float* partials, X* dznorm, const X* dq,
        const X* dk, const X* z, int ldz, const float* gamma, const float* rotations, unsigned rows, int T, int c,
        int Z, int zd, float eps) {
    float ga[2][8], sums[5][8] = {{0}}, x[8], angle[8], d[8], dx[8], s[1], share = 1.0f / zd, scale = sqrtf(share);
    int turn = 0, h = blockIdx.y;
    for (int i = 0; i < 2; i++) { load_row<WIDE>(ga[i], gamma + i * Z + h * zd, zd); }
    RowPiece<X, WIDE> next_z, next_d[2];
    auto fetch = [&](unsigned r) {
        next_z.load(z + (size_t)r * ldz + h * zd, r < rows ? zd : 0);
        for (int i = 0; i < 2; i++) { next_d[i].load((i ? dk : dq) + head_major(r, T, T, 0, zd), r < rows ? zd : 0); }
    };
    for (unsigned r = row_first(fetch); any_row(r, rows); r += row_step()) {
        int columns = r < rows ? zd : 0;
        RowPiece<X, WIDE> d_now[2] = {next_d[0], next_d[1]};
        next_z.get(x); fetch(r + row_step());
        load_row<WIDE>(angle, rotations + (size_t)(r % T % c) * zd, columns);
        s[0] = 0;
        EACH(e, 8) { s[0] += x[e] * x[e]; dx[e] = 0; }
        row_sum(s, turn);
        float rstd = rsqrtf(s[0] * share + eps);
        EACH(e, 8) { x[e] *= rstd; }
        EACH(i, 2) {
            d_now[i].get(d);
            EACH(e, 8) { // turned back by the same angle. (& 7: only for the branch that is not taken)
                float v = e & 1 ? d[e] * angle[e - 1] - d[e - 1] * angle[e] : d[e] * angle[e]
                        + d[e + 1 & 7] * angle[e + 1 & 7];
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
// dz (B,T,Z), rows ldz apart | dgamma, dbeta (2,Z) | dz_sum (Z): of wz's bias | dznorm (B,T,Z): for tests, else NULL
template <typename X> static void qk_backward(Gpu& gpu, X* dz, float* dgamma, float* dbeta, float* dz_sum, X* dznorm,
        const X* dq, const X* dk, const X* z, int ldz, const float* gamma, const float* rotations, int B, int T, int c,
        int Z, int H, float eps) {
    RowGrid r = row_grid(gpu, (size_t)B * T, Z / H, H, 2, 5 * Z);
    LAUNCH(FORM(qk_backward_kernel, wide(Z / H, ldz)), r.grid, r.block, dz, r.partials, dznorm, dq, dk, z, ldz, gamma,
           rotations, B * T, T, c, Z, Z / H, eps);
    reduce_columns(gpu, r.partials, r.blocks, {{dgamma, dgamma + Z, dbeta, dbeta + Z, dz_sum}, 5, Z});
}

// SILU. exp and the sigmoid are as exact as X deserves: the fast exp is off by 1e-7 |x|.
template <typename X> __device__ inline float exp_of(float x) {
    return std::is_same<X, float>::value ? expf(x) : __expf(x);
}
template <typename X> __device__ inline float sigmoid_of(float x) { return __fdividef(1, 1 + exp_of<X>(-x)); }

// Values and the gate, a row kernel that reads each input once and writes out once: out = dropout(silu(inp) attention).
// For values attention is NULL, which stands for ones, and out is head-major. For the gate out is (B,T,V).
template <typename X, bool WIDE, bool DROP> __global__ void gate_forward_kernel(X* out, int ldo, const X* attention,
        const X* inp, int ldi, unsigned rows, int T, int K, int at_k, int vd, Dropout drop) {
    RowPiece<X, WIDE> next_x, next_o;
    auto fetch = [&](unsigned r) {
        next_x.load(inp + (size_t)r * ldi + blockIdx.y * vd, r < rows ? vd : 0);
        if (attention) { next_o.load(attention + head_major(r, T, T, 0, vd), r < rows ? vd : 0); }
    };
    for (unsigned r = row_first(fetch); r < rows; r += row_step()) {
        float x[8], o[8];
        next_x.get(x); next_o.get(o); fetch(r + row_step());
        EACH(e, 8) { x[e] *= sigmoid_of<X>(x[e]) * (attention ? o[e] : 1); }
        drop_row<WIDE, DROP>(x, drop, r, blockIdx.y * vd);
        store_row<WIDE>(out + (attention ? (size_t)r * ldo + blockIdx.y * vd : head_major(r, T, K, at_k, vd)), x, vd);
    }
}
// gated (B,T,V), rows ldg apart = dropout(silu(inp) attention): inp (B,T,V), rows ldi apart, attention (B,H,T,V/H)
template <typename X> static void gate_forward(Gpu& gpu, X* gated, int ldg, const X* attention, const X* inp, int ldi,
        int B, int T, int V, int H, Dropout drop = no_dropout) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 8);
    LAUNCH(FORM_DROP(gate_forward_kernel, wide(V / H, ldg, ldi), drop), r.grid, r.block, gated, ldg, attention, inp,
           ldi, B * T, T, 0, 0, V / H, drop);
}
// v (B,H,K,V/H), from timestep at_k on = silu(inp (B,T,V))
template <typename X> static void value_forward(Gpu& gpu, X* v, const X* inp, int B, int T, int K, int at_k, int V,
        int H) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 8);
    LAUNCH(FORM_DROP(gate_forward_kernel, wide(V / H), no_dropout), r.grid, r.block, v, V, (const X*)NULL, inp, V,
           B * T, T, K, at_k, V / H, no_dropout);
}

// A row kernel: it reads dv and inp once and writes dinp once.
template <typename X, bool WIDE> __global__ void value_backward_kernel(X* dinp, float* partials, const X* dv,
        const X* inp, unsigned rows, int T, int V, int vd) {
    float sum[8] = {0}, x[8], d[8]; RowPiece<X, WIDE> next_x, next_d;
    auto fetch = [&](unsigned r) {
        next_x.load(inp + (size_t)r * V + blockIdx.y * vd, r < rows ? vd : 0);
        next_d.load(dv + head_major(r, T, T, 0, vd), r < rows ? vd : 0);
    };
    for (unsigned r = row_first(fetch); r < rows; r += row_step()) {
        size_t at = (size_t)r * V + blockIdx.y * vd;
        next_x.get(x); next_d.get(d); fetch(r + row_step());
        EACH(e, 8) { float s = sigmoid_of<X>(x[e]); d[e] *= s * (1 + x[e] * (1 - s)); sum[e] += d[e]; }
        store_row<WIDE>(dinp + at, d, vd);
    }
    store_partial<WIDE>(partials, 1, V, 0, sum, vd, blockIdx.y * vd);
}
// dinp (B,T,V) = dv silu'(inp) with dv (B,H,T,V/H); dinp_sum (V): the gradient of wv's bias
template <typename X> static void value_backward(Gpu& gpu, X* dinp, float* dinp_sum, const X* dv, const X* inp, int B,
        int T, int V, int H) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 4, V);
    LAUNCH(FORM(value_backward_kernel, wide(V / H)), r.grid, r.block, dinp, r.partials, dv, inp, B * T, T, V, V / H);
    reduce_columns(gpu, r.partials, r.blocks, {{dinp_sum}, 1, V});
}

// A row kernel: it reads dgated, attention and inp once, and writes dattention, dinp, dot, and again if wanted, once.
// It fetches no rows ahead: with three inputs these would take too many registers.
template <typename X, bool WIDE, bool DROP> __global__ void gate_backward_kernel(X* dattention, X* dinp,
        float* partials, float* dot, X* again, const X* dgated, int ldg, const X* attention, const X* inp, int ldi,
        unsigned rows, int T, int V, int vd, Dropout drop) {
    float sum[8] = {0}, x[8], o[8], d[8], y[8], s[1]; int turn = 0;
    for (unsigned r0 = blockIdx.x * blockDim.y; r0 < rows; r0 += gridDim.x * blockDim.y) {
        unsigned r = r0 + threadIdx.y; int columns = r < rows ? vd : 0;
        size_t at = head_major(r, T, T, 0, vd), at_g = (size_t)r * ldg + blockIdx.y * vd,
                at_i = (size_t)r * ldi + blockIdx.y * vd;
        load_row<WIDE>(x, inp + at_i, columns); load_row<WIDE>(o, attention + at, columns);
        load_row<WIDE>(d, dgated + at_g, columns);
        drop_row<WIDE, DROP>(d, drop, r, blockIdx.y * vd);
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
        drop_row<WIDE, DROP>(y, drop, r, blockIdx.y * vd);
        if (again) { store_row<WIDE>(again + at_g, y, columns); }
        if (threadIdx.x == 0 && columns) { dot[at / vd] = s[0]; }
    }
    store_partial<WIDE>(partials, 1, V, 0, sum, vd, blockIdx.y * vd);
}
// dattention (B,H,T,V/H) = dgated silu(inp), dinp (rows ldi apart) = dgated attention silu'(inp) | again receives the
// forward pass's output if not NULL, rows ldg apart | dot (B,H,T): sum of dattention attention over a head, which the
// backward pass of the softmax needs | dinp_sum (V): the gradient of wr's bias
template <typename X> static void gate_backward(Gpu& gpu, X* dattention, X* dinp, float* dinp_sum, float* dot, X* again,
        const X* dgated, int ldg, const X* attention, const X* inp, int ldi, int B, int T, int V, int H,
        Dropout drop = no_dropout) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 4, V);
    LAUNCH(FORM_DROP(gate_backward_kernel, wide(V / H, ldg, ldi), drop), r.grid, r.block, dattention, dinp, r.partials,
           dot, again, dgated, ldg, attention, inp, ldi, B * T, T, V, V / H, drop);
    reduce_columns(gpu, r.partials, r.blocks, {{dinp_sum}, 1, V});
}

// The feed-forward layer's silu: elementwise. A thread has E neighbours of one row and steps by gridDim.y rows.
template <typename X, bool WIDE, bool DROP> __global__ void silu_forward_kernel(X* out, const X* inp, const X* mul,
        int ld, unsigned rows, int F, Dropout drop) {
    enum { E = WIDE ? 8 : 1 };
    int f = (blockIdx.x * blockDim.x + threadIdx.x) * E;
    if (f >= F) { return; }
    for (unsigned r = blockIdx.y; r < rows; r += gridDim.y) {
        Piece<X, E> a, b; float x[E], y[E];
        a.load(inp + (size_t)r * ld + f);
        if (mul) { b.load(mul + (size_t)r * ld + f); b.get(y); }
        a.get(x);
        EACH(e, E) { x[e] *= sigmoid_of<X>(x[e]) * (mul ? y[e] : 1); }
        drop_elements<DROP>(x, drop, DROP ? dropout_bits(drop, r / drop.T, r % drop.T, 0) : 0, f);
        store(out + (size_t)r * F + f, x);
    }
}
static dim3 flat_grid(size_t rows, int columns) { return dim3(ceil_div(columns, 256), min_size(rows, 65535)); }

// out (rows,F) = dropout(silu(inp) mul); mul NULL stands for ones. Rows of inp and mul lie ld apart.
template <typename X> static void silu_forward(Gpu& gpu, X* out, const X* inp, const X* mul, int ld, size_t rows,
        int F, Dropout drop = no_dropout) {
    LAUNCH(FORM_DROP(silu_forward_kernel, wide(F, ld), drop), flat_grid(rows, wide(F, ld) ? F / 8 : F), 256, out, inp,
           mul, ld, rows, F, drop);
}

// The same way: it reads each input once and writes each output once.
template <typename X, bool WIDE, bool DROP> __global__ void silu_backward_kernel(X* dinp, X* dmul, X* again,
        const X* dout, const X* inp, const X* mul, int ld, unsigned rows, int F, Dropout drop) {
    enum { E = WIDE ? 8 : 1 };
    int f = (blockIdx.x * blockDim.x + threadIdx.x) * E;
    if (f >= F) { return; }
    for (unsigned r = blockIdx.y; r < rows; r += gridDim.y) {
        Piece<X, E> a, b, c; float x[E], y[E], d[E], o[E];
        size_t at = (size_t)r * ld + f, at_out = (size_t)r * F + f;
        a.load(inp + at); c.load(dout + at_out);
        if (mul) { b.load(mul + at); b.get(y); }
        a.get(x); c.get(d);
        uint64_t bits = DROP ? dropout_bits(drop, r / drop.T, r % drop.T, 0) : 0;
        drop_elements<DROP>(d, drop, bits, f);
        EACH(e, E) {
            float s = sigmoid_of<X>(x[e]), silu = x[e] * s, m = mul ? y[e] : 1;
            o[e] = silu * m; x[e] = d[e] * m * (s * (1 + x[e] * (1 - s))); y[e] = d[e] * silu;
        }
        drop_elements<DROP>(o, drop, bits, f);
        store(dinp + at, x);
        if (mul) { store(dmul + at, y); }
        if (again) { store(again + at_out, o); }
    }
}
// dinp = dout mul silu'(inp), dmul = dout silu(inp), rows ld apart as those of inp and mul | again (rows,F) receives
// the forward pass's output if not NULL; it may be where dout is
template <typename X> static void silu_backward(Gpu& gpu, X* dinp, X* dmul, X* again, const X* dout, const X* inp,
        const X* mul, int ld, size_t rows, int F, Dropout drop = no_dropout) {
    LAUNCH(FORM_DROP(silu_backward_kernel, wide(F, ld), drop), flat_grid(rows, wide(F, ld) ? F / 8 : F), 256, dinp,
           dmul, again, dout, inp, mul, ld, rows, F, drop);
}

// CHUNK ATTENTION. A pair is one head of one chunk of one sequence. Attention works on pairs. The queries of a pair are
// cut into query tiles of 512. The forward pass takes one query tile of many pairs at once:
//   1. one product makes the scores S against the keys up to its last query: those right of that are not computed;
//   2. a kernel turns them into probabilities in place;
//   3. one product with the values makes the output.
// The backward pass holds all scores of a pair. Either pass takes as many pairs at once as have room for their scores
// in SCORES_BYTES, at least one; the backward pass takes the same again for the scores' gradients. If c divides T,
// there is one round, with the pairs of all chunks; else each chunk is a round.
enum { QUERY_TILE = 512, SCORES_BYTES = 1 << 27 };

// A matrix of a batch: rows `pitch` elements apart, the next product's `step`. transposed: stored as its transpose.
template <typename X> struct Matrix {
    X* at; int64_t pitch, step; bool transposed;
    Matrix(X* at, int64_t pitch, int64_t step = 0, bool transposed = false) :
        at(at), pitch(pitch), step(step), transposed(transposed) {}
    template <typename Y> Matrix(const Matrix<Y>& m) : Matrix(m.at, m.pitch, m.step, m.transposed) {} // to const
};
template <typename X> static Matrix<X> transposed(Matrix<X> m) { return {m.at, m.pitch, m.step, true}; }
// d (M,N) = a (M,K) b (K,N), `batch` times; plus add, plus bias (N) on every row, if given. See Matrix products.
template <typename X, typename Y> static void gemm(Gpu& gpu, Matrix<Y> d, Matrix<const X> a, Matrix<const X> b,
        int64_t M, int64_t N, int64_t K, int batch = 1, const Y* add = NULL, int64_t add_pitch = 0,
        const X* bias = NULL);

// Dropout bits of the query that stands at `at` in (B,H,T).
__device__ inline uint64_t dropout_bits_of_query(const Dropout& d, size_t at, int H) {
    unsigned head = (unsigned)at / d.T;
    return dropout_bits(d, head / H, (unsigned)at % d.T, head % H);
}
// Dropout of E scores from key j on, of a query with these bits. The first `before` keys (in Megalodon none) are of the
// chunk before, which has masks of its own: those of heads H, H + 1, ...
template <bool DROP, int E> __device__ inline void drop_keys(float (&v)[E], const Dropout& drop, uint64_t bits, int j,
        int before, int H) {
    if (j < before) { bits += (uint64_t)H << 32; } else { j -= before; }
    drop_elements<DROP>(v, drop, bits, j);
}
// A warp has one query: i of `rows` in the query tile, which sees keys 0 .. past + i of `keys`. It walks through the
// row of scores, 8 pieces of each lane at a time, which stay in registers, with a running maximum and sum. Rows that
// fit (2048 keys, 256 in the plain form) are read once, others twice. Pair p (blockIdx.y) has its scores at S[p*step],
// rows ld apart, and query i's lse at lse[p*stride + i]. at, for dropout: the number in (B,H,T) of pair 0's query 0.
template <typename X, bool WIDE, bool DROP> __global__ void __launch_bounds__(256) softmax_forward_kernel(X* S, int ld,
        size_t step, float* lse, size_t stride, int rows, int keys, int past, int before, size_t at, int H,
        Dropout drop) {
    enum { E = WIDE ? 8 : 1, KEPT = 8 };
    int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, n = past + i + 1;
    if (i >= rows) { return; }
    X* s = S + blockIdx.y * step + (size_t)i * ld; Piece<X, E> kept[KEPT];
    float x[E], top = -INFINITY, sum = 0;
    uint64_t bits = DROP ? dropout_bits_of_query(drop, at + blockIdx.y * stride + i, H) : 0;
    auto fetch = [&](Piece<X, E>& piece, int j) { // dropped scores become -infinity
        piece.load(s + j);
        if (!DROP) { return; }
        piece.get(x); drop_keys<DROP>(x, drop, bits, j, before, H); piece.set(x);
    };
    for (int j0 = lane * E; j0 < n; j0 += 32 * E * KEPT) {
        EACH(k, KEPT) {
            int j = j0 + k * 32 * E;
            if (j >= n) { break; }
            fetch(kept[k], j);
        }
        float last_top = top;
        EACH(k, KEPT) {
            int j = j0 + k * 32 * E;
            if (j >= n) { break; }
            kept[k].get(x);
            EACH(e, E) { if (j + e < n) { top = fmaxf(top, x[e]); } }
        }
        sum *= last_top == top ? 1 : exp_of<X>(last_top - top);
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

// A warp has one query. Here i and `rows` count all queries of the pair, not those of a query tile, and query i sees
// keys 0 .. before + i. The other arguments are as above; dP lies as S. In place S becomes P = exp(S - lse), and dP
// becomes dS = P (dP - dot), up to the end of the query's tile. dot is the sum of P dP. In bf16 it comes as the sum of
// dout out, which is more exact than that of the rounded P dP. But with one key, P = 1, so dS = dP - dot must be
// exactly 0; a dot from other roundings would leave noise. So for such a query, and in fp32 for all, the kernel makes
// the sum.
template <typename X, bool WIDE, bool DROP> __global__ void __launch_bounds__(256) softmax_backward_kernel(X* S, X* dP,
        int ld, size_t step, const float* lse, const float* dot, size_t stride, int rows, int before, size_t at, int H,
        Dropout drop) {
    enum { E = WIDE ? 8 : 1 };
    int i = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, last = before + i;
    if (i >= rows) { return; }
    size_t own = blockIdx.y * step + (size_t)i * ld;
    int keys = before + min((i / QUERY_TILE + 1) * QUERY_TILE, rows);
    float lse_i = lse[blockIdx.y * stride + i], d = dot[blockIdx.y * stride + i];
    uint64_t bits = DROP ? dropout_bits_of_query(drop, at + blockIdx.y * stride + i, H) : 0;
    if (std::is_same<X, float>::value || last == 0) {
        d = 0;
        for (int j = lane; j <= last; j += 32) {
            float x[1] = {to_float(S[own + j])};
            drop_keys<DROP>(x, drop, bits, j, before, H);
            d += exp_of<X>(x[0] - lse_i) * to_float(dP[own + j]);
        }
        d = warp_sum(d);
    }
#pragma unroll 4
    for (int j = lane * E; j < keys; j += 32 * E) {
        float x[E], y[E]; load(x, S + own + j); load(y, dP + own + j);
        drop_keys<DROP>(x, drop, bits, j, before, H);
        EACH(e, E) { x[e] = j + e <= last ? exp_of<X>(x[e] - lse_i) : 0; y[e] = j + e <= last ? x[e] * (y[e] - d) : 0; }
        store(S + own + j, x); store(dP + own + j, y);
    }
}

// A round has `pairs` pairs of `rows` queries. From one pair to the next are step_q timesteps in q, step_k in k and v.
struct Rounds { int count, pairs, rows; int64_t step_q, step_k; };
static Rounds attention_rounds(int B, int T, int K, int c, int H) {
    if (T % c == 0 && K == T) { return {1, B * H * (T / c), c, c, c}; }
    return {(int)ceil_div(T, c), B * H, min_int(c, T), T, K};
}
template <typename X> static int pairs_at_once(int pairs, size_t elements) { // of scores; at least one
    size_t n = SCORES_BYTES / (elements * sizeof(X));
    return n < 1 ? 1 : min_size(n, pairs);
}

// out (B,H,T,V/H), q (B,H,T,Z/H) | k (B,H,K,Z/H), v (B,H,K,V/H): K = T, or when streaming K = c and the queries stand
// at pos | lse (B,H,T): saved
template <typename X> static void attention_forward(Gpu& gpu, X* out, float* lse, const X* q, const X* k, const X* v,
        int B, int T, int K, int pos, int c, int H, int Z, int V, Dropout drop = no_dropout) {
    int zd = Z / H, vd = V / H;
    Rounds a = attention_rounds(B, T, K, c, H);
    for (int n = 0, first = 0; n < a.count; n++, first += c) {
        int rows = min_int(a.rows, T - first), most_rows = min_int(rows, QUERY_TILE);
        int ld = ceil_div(pos + rows, 128) * 128;
        int most = pairs_at_once<X>(a.pairs, (size_t)most_rows * ld);
        X* S = gpu_scratch<X>(gpu, SCORES, (size_t)most * most_rows * ld);
        for (int p = 0; p < a.pairs; p += most) {
            int batch = min_int(most, a.pairs - p);
            for (int i = 0; i < rows; i += QUERY_TILE) {
                int m = min_int(QUERY_TILE, rows - i), keys = pos + i + m;
                if (K > T) { keys = min_int(K, ceil_div(keys, 128) * 128); } // from a cache: few different shapes
                size_t at_q = p * a.step_q + first + i, at_k = p * a.step_k + first;
                int64_t step = (int64_t)m * ld;
                Matrix scores(S, ld, step), result(out + at_q * vd, vd, a.step_q * vd);
                Matrix queries(q + at_q * zd, zd, a.step_q * zd), values(v + at_k * vd, vd, a.step_k * vd);
                Matrix keys_transposed(k + at_k * zd, zd, a.step_k * zd, true);
                gemm<X, X>(gpu, scores, queries, keys_transposed, m, keys, zd, batch);
                LAUNCH(FORM_DROP(softmax_forward_kernel, wide(keys), drop), dim3(ceil_div(m, 8), batch), 256, S, ld,
                       (size_t)step, lse + at_q, (size_t)a.step_q, m, keys, pos + i, 0, at_q, H, drop);
                gemm<X, X>(gpu, result, scores, values, m, vd, keys, batch);
            }
        }
    }
}

// dq, dk, dv as q, k, v with K = T | dout (B,H,T,V/H) | dot (B,H,T): row sums of dout out. With all scores S and
// dP = dout v^T of a pair, dq is a product for each query tile, and dk and dv are products for 512 keys each, with the
// queries from there on: so every sum is one product, in fp32.
template <typename X> static void attention_backward(Gpu& gpu, X* dq, X* dk, X* dv, const X* dout, const float* dot,
        const float* lse, const X* q, const X* k, const X* v, int B, int T, int c, int H, int Z, int V,
        Dropout drop = no_dropout) {
    int zd = Z / H, vd = V / H;
    Rounds a = attention_rounds(B, T, T, c, H);
    for (int n = 0, first = 0; n < a.count; n++, first += c) {
        int rows = min_int(a.rows, T - first), ld = ceil_div(rows, 8) * 8;
        int64_t step = (int64_t)rows * ld, step_z = a.step_q * zd, step_v = a.step_q * vd;
        int most = pairs_at_once<X>(a.pairs, step);
        X *S = gpu_scratch<X>(gpu, SCORES, most * step * 2), *dS = S + most * step;
        for (int p = 0; p < a.pairs; p += most) {
            int batch = min_int(most, a.pairs - p);
            size_t at = p * a.step_q + first;
            auto of_z = [&](auto* x, int row) { return Matrix(x + (at + row) * zd, zd, step_z); };
            auto of_v = [&](auto* x, int row) { return Matrix(x + (at + row) * vd, vd, step_v); };
            auto of_scores = [&](X* x, int row, int column) { return Matrix(x + (size_t)row * ld + column, ld, step); };
            for (int i = 0; i < rows; i += QUERY_TILE) {
                int m = min_int(QUERY_TILE, rows - i);
                gemm<X, X>(gpu, of_scores(S, i, 0), of_z(q, i), transposed(of_z(k, 0)), m, i + m, zd, batch);
                gemm<X, X>(gpu, of_scores(dS, i, 0), of_v(dout, i), transposed(of_v(v, 0)), m, i + m, vd, batch);
            }
            LAUNCH(FORM_DROP(softmax_backward_kernel, wide(rows), drop), dim3(ceil_div(rows, 8), batch), 256, S, dS, ld,
                   (size_t)step, lse + at, dot + at, (size_t)a.step_q, rows, 0, at, H, drop);
            for (int i = 0; i < rows; i += QUERY_TILE) {
                int m = min_int(QUERY_TILE, rows - i);
                gemm<X, X>(gpu, of_z(dq, i), of_scores(dS, i, 0), of_z(k, 0), m, zd, i + m, batch);
                gemm<X, X>(gpu, of_z(dk, i), transposed(of_scores(dS, i, i)), of_z(q, i), m, zd, rows - i, batch);
                gemm<X, X>(gpu, of_v(dv, i), transposed(of_scores(S, i, i)), of_v(dout, i), m, vd, rows - i, batch);
            }
        }
    }
}

// CROSS-ENTROPY. A CUDA block has one row of logits. Each thread keeps a running maximum and sum of its elements; warps
// and then the CUDA block bring these together. A row is read from memory once and, the second time, from the cache.
template <typename X, bool WIDE> __global__ void __launch_bounds__(1024) crossentropy_kernel(float* losses, X* logits,
        const int* targets, float dloss, bool gradient, int vocab) {
    enum { E = WIDE ? 8 : 1 }; __shared__ float tops[32], sums[32];
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
    __syncthreads(); // the sums of all warps are there
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
// losses (rows); with dloss != 0 logits (rows,vocab) become dlogits in place, as in the CPU's crossentropy_backward.
template <typename X> static void crossentropy(Gpu& gpu, float* losses, X* logits, const int* targets, float dloss,
        size_t rows, int vocab) {
    int threads = min_size(1024, ceil_div(ceil_div(vocab, 8), 32) * 32);
    LAUNCH(FORM(crossentropy_kernel, wide(vocab)), rows, threads, losses, logits, targets, dloss, dloss != 0, vocab);
}

// ---------------------------------------------------------------------------------------------------------------------
// The block

// Parameters and activations are those of the tables in train_megalodon.c, in other places and of other types. These
// rows are floats whatever X is: weights that kernels read in fp32; statistics and losses.
#define ROW_INDEX_P(field, ...) P_##field,
#define ROW_INDEX_A(field, ...) A_##field,
enum { PARAMETERS(ROW_INDEX_P) };
enum { ACTIVATIONS(ROW_INDEX_A) };
constexpr bool param_is_float(int i) {
    return (i >= P_timenorm_w && i <= P_rmsnorm_w) || (i >= P_gamma && i <= P_norm_b)
           || (i >= P_rescale && i <= P_final_b);
}
constexpr bool act_is_float(int i) {
    return i == A_timenorm_mean || i == A_timenorm_rstd || i == A_rmsnorm_rstd || i == A_znorm_rstd
            || i == A_attention_lse || i == A_norm_mean || i == A_norm_rstd || i == A_final_mean || i == A_final_rstd
            || i == A_losses;
}
#define FIELD_OF_PARAM(field, ...) std::conditional_t<param_is_float(P_##field), float, X>* field;
#define FIELD_OF_ACT(field, ...) std::conditional_t<act_is_float(A_##field), float, X>* field;
template <typename X> struct ParamsOf { PARAMETERS(FIELD_OF_PARAM) };
template <typename X> struct ActsOf { ACTIVATIONS(FIELD_OF_ACT) };
template <typename X> static CemaParams cema_params(const ParamsOf<X>* w) {
    return {w->cema_alpha, w->cema_delta, w->cema_theta, w->cema_gamma, w->cema_omega};
}

// Where a tensor lies in its arena. A parameter: elements from the start of the arena to layer 0's, and between layers.
// An activation: bytes from the start and between layers (0: they share one). pitch 0: it is absent.
struct ParamPlace { size_t offset, step, rows, columns, pitch; int part; }; // part: of layer 0, see param_part
struct ActPlace { size_t offset, step, pitch; };

template <typename X> struct ModelOf {
    Config config; Spec specs[NUM_PARAMS];
    ParamPlace places[NUM_PARAMS];
    size_t size;                   // elements of an arena below, with padding (always zero)
    float* params;                 // in fp32; on several GPUs only the rows that kernels read in fp32
    X* weights;                    // params rounded to X; for X = float on one GPU the same memory
    float* grads;
    float *masters, *adam_m, *adam_v; // of what this GPU updates: all (then masters is params), or its shards
    float* rotations;              // (c,Z/H/2,2)
    double* sums;                  // partial sums of the gradient's norm; pinned
    int shards, parts;             // several GPUs: how many, and of how many parts an arena is made; else 1 and 1
    float* received[2];            // several GPUs: shards of a part's gradients, from all of them; parts take turns
    cudaEvent_t* came;             // several GPUs, by part: its gradients, or later its weights, have come
};

#define POINTER_FIELD_X(field, ...) X* field;
template <typename X> struct StateOf { // as the CPU's State
    int B, pos;
    size_t bytes;    // of norm, h and what other architectures carry, which are one arena
    NormState* norm; // (L+1,B,G)
    float* h;        // (L,B,D,N,2)
    MORE_CARRIED(POINTER_FIELD)
    X *k, *v;        // (L,B,H,c,Z/H), (L,B,H,c,V/H); NULL if calls end where chunks do
    MORE_CACHED(POINTER_FIELD_X)
    // Generation
    float* scores;   // of one layer: (B,H,c)
    CemaCoef* coef;  // (L,D,N rounded up), made of the weights by the first step of one token
    int steps;       // of one token, since the last reset
    cudaGraphExec_t graph; // such a step
};

enum { KEEP_CHEAPLY = KEEP_ALL + 1 }; // like KEEP_ALL, but what is cheap is computed again in the backward pass
template <typename X> struct PassOf { // as the CPU's Pass
    int B, T, keep;
    char *acts, *grads;                 // arenas
    size_t acts_size, grads_size;       // bytes
    ActPlace places[NUM_ACTS], dplaces[NUM_ACTS];
    float* carries;                     // CEMA's states before spans, by layer
    size_t carries_step;
    int *tokens, *targets;              // (B*T), on the device
    int *order, *begin, runs;           // see embedding_backward
    int* host;                          // pinned, of these four's sizes
    cudaEvent_t copied;                 // host is free again
    Masks masks;
    StateOf<X> before, after;           // several GPUs, where this one has a slice: the states around it; else empty
};

// Pointers to layer l's tensors; those that stand once are the same of any layer. See Memory.
template <typename X> static ParamsOf<X> params_layer(const ModelOf<X>* m, int l);
template <typename X> static Params gradients_layer(const ModelOf<X>* m, int l);
template <typename X> static ActsOf<X> acts_layer(const ActPlace* places, char* arena, int l);
template <typename X> static StateOf<X> state_layer(const StateOf<X>* s, const Config* c, int l);
template <typename X> static X* block_input(const ActPlace* places, char* arena, int l); // output of l-1, or embedding

// Dropout, and slices of sequences (several GPUs), which block_forward and block_backward mention in passing.
template <typename X> static const X* dropout(Gpu& gpu, X* out, float* sum, const X* inp, const X* add, Dropout drop,
        size_t rows, int D);
static void slice_norm_start(Gpu& gpu, NormState* before, int B, int T, int G);
static void slice_norm_begin(Gpu& gpu, int B, int T, int G);
static const NormSums* slice_norm_after(Gpu& gpu, int B, int G);
template <typename X> static void slice_cema_begin(Gpu& gpu, const X* inp, bool descending, const CemaParams& w, int B,
        int T, int D, int N);
static void slice_cema_start(Gpu& gpu, float* h, int B, int T, int D, int N);
static const float* slice_cema_a_end(Gpu& gpu, int B, int T, int D, int N);

// What every function below needs of layer l, under the names of the CPU's block_forward: config, the symbols B .. c of
// the equations and vocab; rows = B*T; the sites of dropout, input x, weights w and activations a. And the pitches of
// tensors that stand side by side: a.wz and a.wr (z|r), a.rmsnorm and a.gated (m|o*r), a.fc1 and a.fc3.
#define OF_LAYER(m, s, l) \
    const Config* config = &(m)->config; \
    int B = (s)->B, T = (s)->T, L = config->num_layers, D = config->model_dim, H = config->num_heads; \
    int Z = config->z_dim, V = config->value_dim, F = config->ffn_hidden_dim, N = config->cema_ndim; \
    int G = config->norm_num_groups, c = config->chunk_size, vocab = config->vocab_size; \
    int pitch_z = Z + V, pitch_m = D + V, pitch_f = config->swiglu ? 2 * F : F; \
    size_t rows = (size_t)B * T; \
    float eps = config->norm_eps; \
    Dropouts sites = dropouts_at((s)->masks, T, l); \
    const X* x = block_input<X>((s)->places, (s)->acts, l); \
    ParamsOf<X> w = params_layer(m, l); \
    ActsOf<X> a = acts_layer<X>((s)->places, (s)->acts, l)

// One layer of the model, Figure 3 of the paper: x (B,T,D) to out (B,T,D). start and end: see State; either may be
// NULL. These are its launches, without dropout and slices:
//     timestepnorm_statistics, timestepnorm_forward (2 kernels)                x to n
//     matmul_forward, value_forward                                            n to v
//     cema_forward (2 kernels), norm_forward                                   n to e to m
//     matmul_forward, qk_forward                                               m to z|r to q and k
//     attention_forward (3 launches for a query tile of as many pairs as fit)  q, k, v to o
//     gate_forward, matmul_forward                                             r, o, x to m|o*r to y
//     norm_forward, matmul_forward                                             y to u to fc1|fc3
//     silu_forward, matmul_forward                                             fc1|fc3, x to hidden to out
template <typename X> static void block_forward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* start, const StateOf<X>* end) {
    OF_LAYER(m, s, l);
    StateOf<X> past = state_layer(start, config, l), next = state_layer(end, config, l);
    bool sliced = s->before.h && next.h; // several GPUs, else skip its lines; not where the backward pass runs this

    // Long memory: n = timestep_norm(x), e = cema(n), m = rms_norm(e). (Several GPUs: v is made while slices wait.)
    timestepnorm_statistics(gpu, x, B, T, D, G);
    if (sliced) { slice_norm_start(gpu, past.norm, B, T, G); }
    timestepnorm_forward(gpu, a.timenorm, a.timenorm_mean, a.timenorm_rstd, next.norm, past.norm, x, w.timenorm_w,
                         w.timenorm_b, B, T, D, G, eps);
    if (sliced) { slice_cema_begin(gpu, a.timenorm, false, cema_params(&w), B, T, D, N); }
    int pos = start ? start->pos : 0, K = next.k ? c : T, at_k = next.k ? pos : 0;
    X *k = next.k ? next.k : a.k, *v = next.k ? next.v : a.v; // streaming: into the cache
    matmul_forward<X>(gpu, a.wv, V, a.timenorm, D, w.wv, w.wv_b, NULL, 0, rows, D, V);
    value_forward(gpu, v, a.wv, B, T, K, at_k, V, H);
    if (sliced) { slice_cema_start(gpu, past.h, B, T, D, N); }
    cema_forward(gpu, a.cema, next.h, s->carries + l * s->carries_step, past.h, a.timenorm, cema_params(&w), B, T, D,
                 N);
    norm_forward<X>(gpu, a.rmsnorm, pitch_m, NULL, a.rmsnorm_rstd, a.cema, w.rmsnorm_w, NULL, rows, D, eps,
                    sites.rmsnorm);

    // Short memory: attention inside the chunk. One product makes z and the gate's r.
    matmul_forward<X>(gpu, a.wz, pitch_z, a.rmsnorm, pitch_m, w.wz, w.wz_b, NULL, 0, rows, D, pitch_z);
    qk_forward<X>(gpu, a.q, k, a.znorm, a.znorm_rstd, a.wz, pitch_z, w.gamma, w.beta, m->rotations, B, T, K, pos,
                  at_k, c, Z, H, eps);
    attention_forward(gpu, a.attention, a.attention_lse, a.q, k, v, B, T, K, at_k, c, H, Z, V, sites.keys);

    // The gate, and the first hop: y = [m | o*r] [Wh1 | Wh2]^T + bh1 + x.
    gate_forward(gpu, a.gated, pitch_m, a.attention, a.wr, pitch_z, B, T, V, H, sites.gated);
    matmul_forward<X>(gpu, a.mega, D, a.rmsnorm, pitch_m, w.wh1, w.wh1_b, sites.mega.drop ? NULL : x, D, rows, pitch_m,
                      D);
    dropout<X>(gpu, a.mega, NULL, a.mega, x, sites.mega, rows, D); // if there is any; then this adds x

    // Feed-forward, and the second hop: out = ffn(layer_norm(y)) + x.
    norm_forward<X>(gpu, a.norm, D, a.norm_mean, a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D, eps);
    matmul_forward<X>(gpu, a.fc1, pitch_f, a.norm, D, w.fc1, NULL, NULL, 0, rows, D, pitch_f);
    silu_forward(gpu, a.hidden, a.fc1, a.fc3, pitch_f, rows, F, sites.hidden);
    const X* add = config->rescale_nffn ? NULL : x;
    X* ffn = config->rescale_nffn ? a.fc2 : a.out;
    matmul_forward<X>(gpu, ffn, D, a.hidden, F, w.fc2, NULL, sites.fc2.drop ? NULL : add, D, rows, F, D);
    dropout<X>(gpu, ffn, NULL, ffn, add, sites.fc2, rows, D);
    if (config->rescale_nffn) { ffn_rescale(gpu, a.out, NULL, a.fc2, x, w.rescale, rows, D); } // see Odd sizes
}

// From dout to dx. With KEEP_CHEAPLY, cheap activations were not kept. Launches of their own make n, q, k and v again;
// the others are made again by kernels that read what they are made of, and the gradient of a weight comes after the
// kernel that makes its input. dropout() returns the gradient behind the mask, or without dropout its input; until
// CEMA's backward pass da.timenorm is free to hold it. The gradient of wh1_b, the column sum of dmega, comes from
// dropout(), or without dropout from norm_backward.
template <typename X> static void block_backward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* start, const StateOf<X>* dstart) {
    OF_LAYER(m, s, l);
    X* dx = block_input<X>(s->dplaces, s->grads, l); Params dw = gradients_layer(m, l);
    ActsOf<X> da = acts_layer<X>(s->dplaces, s->grads, l);
    StateOf<X> past = state_layer(start, config, l), dpast = state_layer(dstart, config, l);
    StateOf<X> after = state_layer(&s->after, config, l);
    bool sliced = s->before.h, again = s->keep == KEEP_CHEAPLY;
    X *hidden = again ? a.hidden : NULL, *norm = again ? a.norm : NULL, *gated = again ? a.gated : NULL;
    X *rmsnorm = again ? a.rmsnorm : NULL;

    // Feed-forward
    const X* dfc2 = config->rescale_nffn ? da.fc2 : da.out;
    if (config->rescale_nffn) { ffn_rescale(gpu, da.fc2, dw.rescale, da.out, a.fc2, w.rescale, rows, D); }
    dfc2 = dropout<X>(gpu, da.timenorm, NULL, dfc2, NULL, sites.fc2, rows, D);
    matmul_backward(gpu, da.hidden, F, dfc2, D, w.fc2, rows, F, D, false);
    silu_backward(gpu, da.fc1, da.fc3, hidden, da.hidden, a.fc1, a.fc3, pitch_f, rows, F, sites.hidden);
    matmul_backward_weight(gpu, dw.fc2, dfc2, D, a.hidden, F, rows, F, D);
    matmul_backward(gpu, da.norm, D, da.fc1, pitch_f, w.fc1, rows, D, pitch_f, false);
    norm_backward<X>(gpu, da.mega, dw.norm_w, dw.norm_b, sites.mega.drop ? NULL : dw.wh1_b, norm, da.norm, D,
                     a.norm_mean, a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D);
    matmul_backward_weight(gpu, dw.fc1, da.fc1, pitch_f, a.norm, D, rows, D, pitch_f);

    // The gate
    const X* dmega = dropout<X>(gpu, da.timenorm, dw.wh1_b, da.mega, NULL, sites.mega, rows, D);
    matmul_backward(gpu, da.rmsnorm, pitch_m, dmega, D, w.wh1, rows, pitch_m, D, false); // dm | d(o*r)
    float* dot = da.attention_lse; // (B,H,T): a row of the table that has no gradient
    gate_backward(gpu, da.attention, da.wr, dw.wr_b, dot, gated, da.gated, pitch_m, a.attention, a.wr, pitch_z, B, T, V,
                  H, sites.gated);
    if (again) {
        qk_forward<X>(gpu, a.q, a.k, NULL, NULL, a.wz, pitch_z, w.gamma, w.beta, m->rotations, B, T, T, 0, 0, c,
                      Z, H, eps);
        value_forward(gpu, a.v, a.wv, B, T, T, 0, V, H);
        timestepnorm_again(gpu, a.timenorm, a.timenorm_mean, a.timenorm_rstd, x, w.timenorm_w, w.timenorm_b, rows, D,
                           G);
    }

    // Attention, queries and keys
    attention_backward(gpu, da.q, da.k, da.v, da.attention, dot, a.attention_lse, a.q, a.k, a.v, B, T, c, H, Z, V,
                       sites.keys);
    qk_backward(gpu, da.wz, dw.gamma, dw.beta, dw.wz_b, da.znorm, da.q, da.k, a.wz, pitch_z, w.gamma, m->rotations, B,
                T, c, Z, H, eps);
    matmul_backward(gpu, da.rmsnorm, pitch_m, da.wz, pitch_z, w.wz, rows, D, pitch_z, true);

    // RMS norm, CEMA, values. (Several GPUs: the gradients of weights are made while slices wait for each other.)
    norm_backward<X>(gpu, da.cema, dw.rmsnorm_w, NULL, NULL, rmsnorm, da.rmsnorm, pitch_m, NULL, a.rmsnorm_rstd, a.cema,
                     w.rmsnorm_w, NULL, rows, D, sites.rmsnorm);
    if (sliced) { slice_cema_begin(gpu, da.cema, true, cema_params(&w), B, T, D, N); }
    matmul_backward_weight(gpu, dw.wh1, dmega, D, a.rmsnorm, pitch_m, rows, pitch_m, D);
    matmul_backward_weight(gpu, dw.wz, da.wz, pitch_z, a.rmsnorm, pitch_m, rows, D, pitch_z);
    value_backward(gpu, da.wv, dw.wv_b, da.v, a.wv, B, T, V, H);
    const float* a_end = sliced ? slice_cema_a_end(gpu, B, T, D, N) : NULL;
    cema_backward(gpu, da.timenorm, cema_params(&dw), dpast.h, da.cema, s->carries + l * s->carries_step, past.h,
                  after.h, a_end, a.timenorm, cema_params(&w), B, T, D, N);
    matmul_backward(gpu, da.timenorm, D, da.wv, V, w.wv, rows, D, V, true);

    // x has three readers: the second hop, the first hop and the timestep norm. (dx may be da.out itself.)
    timestepnorm_backward_sums(gpu, dw.timenorm_w, dw.timenorm_b, da.timenorm, a.timenorm_mean, a.timenorm_rstd,
                               past.norm, x, w.timenorm_w, B, T, D, G);
    if (sliced) { slice_norm_begin(gpu, B, T, G); }
    matmul_backward_weight(gpu, dw.wv, da.wv, V, a.timenorm, D, rows, D, V);
    const NormSums* norm_after = sliced ? slice_norm_after(gpu, B, G) : NULL;
    timestepnorm_backward<X>(gpu, dx, dpast.norm, norm_after, da.out, da.mega, da.timenorm, a.timenorm_mean,
                             a.timenorm_rstd, past.norm, x, w.timenorm_w, B, T, D, G);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// Copies n ints from pinned memory to the device; the pinned memory is free again when `copied` has come.
template <typename X> static void pass_upload(Gpu& gpu, const PassOf<X>* s, int* to, size_t n) {
    CUDA(cudaMemcpyAsync(to, s->host + (to - s->tokens), n * sizeof(int), cudaMemcpyHostToDevice, gpu.stream));
    CUDA(cudaEventRecord(s->copied, gpu.stream));
}

MORE_GPU_DECLARATIONS // OF_MODEL stands before what another architecture may replace

// Several GPUs, and generation
template <typename X> static void part_wait(Gpu& gpu, const ModelOf<X>* m, int part); // its weights have come
template <typename X> static void part_reduce(Gpu& gpu, const ModelOf<X>* m, int part);
template <typename X> static void slices_start(Gpu& gpu, PassOf<X>* s, const StateOf<X>* start);
template <typename X> static void slices_finish(Gpu& gpu, PassOf<X>* s, const StateOf<X>* end);
template <typename X> static void model_step(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens,
        StateOf<X>* state);

// The norm after the last layer, forward and backward.
template <typename X> static void final_norm_forward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s,
        const StateOf<X>* start, const StateOf<X>* end) {
    OF_LAYER(m, s, 0); const X* inp = block_input<X>(s->places, s->acts, L);
    NormState *past = state_layer(start, config, L).norm, *next = state_layer(end, config, L).norm;
    timestepnorm_statistics(gpu, inp, B, T, D, G);
    if (s->before.h) { slice_norm_start(gpu, past, B, T, G); }
    timestepnorm_forward(gpu, a.final, a.final_mean, a.final_rstd, next, past, inp, w.final_w, w.final_b, B, T, D, G,
                         eps);
}
template <typename X> static void final_norm_backward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s,
        const StateOf<X>* start, const StateOf<X>* dstart) {
    OF_LAYER(m, s, 0); const X* inp = block_input<X>(s->places, s->acts, L);
    Params dw = gradients_layer(m, 0); ActsOf<X> da = acts_layer<X>(s->dplaces, s->grads, 0);
    NormState *past = state_layer(start, config, L).norm, *dpast = state_layer(dstart, config, L).norm;
    timestepnorm_backward_sums(gpu, dw.final_w, dw.final_b, da.final, a.final_mean, a.final_rstd, past, inp, w.final_w,
                               B, T, D, G);
    if (s->before.h) { slice_norm_begin(gpu, B, T, G); }
    const NormSums* after = s->before.h ? slice_norm_after(gpu, B, G) : NULL;
    timestepnorm_backward<X>(gpu, block_input<X>(s->dplaces, s->grads, L), dpast, after, NULL, NULL, da.final,
                             a.final_mean, a.final_rstd, past, inp, w.final_w, B, T, D, G);
}

// tokens (B,T), on the host, to logits (B,T,vocab) on the device; see the CPU's. Returns at once, the GPU goes on
// working. One token more of each stream is model_step's; for it tokens may be NULL, see there.
template <typename X> static void model_forward(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens,
        const StateOf<X>* start, StateOf<X>* end) {
    if (s->T == 1 && end && end->k && start == end) { OF_MODEL(model_step)(gpu, m, s, tokens, end); return; }
    OF_LAYER(m, s, 0);
    const StateOf<X> *past = start, *next = end;
    if (s->before.h) { slices_start(gpu, s, start); past = &s->before; next = &s->after; }
    CUDA(cudaEventSynchronize(s->copied));
    memcpy(s->host, tokens, rows * sizeof(int));
    pass_upload(gpu, s, s->tokens, rows);
    part_wait(gpu, m, 0); part_wait(gpu, m, 1);
    embedding_forward(gpu, a.embed, s->tokens, w.embed, embedding_scale(config), rows, D, sites.embed);
    for (int l = 0; l < L; l++) { part_wait(gpu, m, 2 + l); OF_MODEL(block_forward)(gpu, m, s, l, past, next); }
    OF_MODEL(final_norm_forward)(gpu, m, s, past, next);
    part_wait(gpu, m, m->parts - 1);
    matmul_forward<X>(gpu, a.logits, vocab, a.final, D, config->share_emb ? w.embed : w.output, NULL, NULL, 0, rows, D,
                      vocab);
    if (s->before.h) { slices_finish(gpu, s, end); }
    if (end) { end->pos = ((start ? start->pos : 0) + T) % c; }
}

// Sums in double, by CUDA blocks: sums[block] receives the sum of its share of n floats, or of the squares of n float4.
// With out, the input is first the sum of `count` arrays, added in order, which out receives. A thread adds up elements
// that lie gridDim.x * 256 apart; then the CUDA block halves the number of its sums until one is left.
enum { SUM_BLOCKS = 1024 }; // 8 for each of 128 multiprocessors
__device__ inline float plus(float x, float y) { return x + y; }
__device__ inline float4 plus(float4 v, float4 w) { return {v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w}; }
template <typename Number> __global__ void __launch_bounds__(256, 8) sum_kernel(double* sums, const Number* inp,
        size_t n, Number* out, int count) {
    __shared__ double partial[256]; double s = 0;
    for (size_t i = blockIdx.x * (size_t)256 + threadIdx.x; i < n; i += (size_t)gridDim.x * 256) {
        Number v = inp[i];
        for (int r = 1; r < count; r++) { v = plus(v, inp[r * n + i]); }
        if (out) { out[i] = v; }
        if constexpr (sizeof(Number) == 4) { s += v; }
        else { s += (double)v.x * v.x + (double)v.y * v.y + ((double)v.z * v.z + (double)v.w * v.w); }
    }
    partial[threadIdx.x] = s;
    __syncthreads(); // here, and in each step below: what the next step reads is there
    for (int o = 128; o; o /= 2) {
        if (threadIdx.x < o) { partial[threadIdx.x] += partial[threadIdx.x + o]; }
        __syncthreads();
    }
    if (threadIdx.x == 0) { sums[blockIdx.x] = partial[0]; }
}
// Losses of the last forward pass, and their sum to *sum, in pinned memory; with dloss != 0 logits become dlogits.
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

// begin and order, for embedding_backward: positions sorted by token, by counting, during the cross-entropy.
template <typename X> static void pass_sort(Gpu& gpu, PassOf<X>* s, const int* tokens, size_t rows, int vocab) {
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
    free(count); pass_upload(gpu, s, s->order, 2 * rows + 1);
}

// Adds to the gradients, or with gpu.accumulate off assigns them, from dlogits, which model_losses has left in logits.
template <typename X> static void model_backward(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens,
        const StateOf<X>* start, const StateOf<X>* dstart) {
    OF_LAYER(m, s, 0);
    Params dw = gradients_layer(m, 0);
    ActsOf<X> da = acts_layer<X>(s->dplaces, s->grads, 0);
    if (s->before.h) { start = &s->before; }
    pass_sort(gpu, s, tokens, rows, vocab);
    matmul_backward(gpu, da.final, D, a.logits, vocab, config->share_emb ? w.embed : w.output, rows, D, vocab, false);
    matmul_backward_weight(gpu, config->share_emb ? dw.embed : dw.output, a.logits, vocab, a.final, D, rows, D, vocab);
    if (gpu.reduce) { part_reduce(gpu, m, m->parts - 1); }
    OF_MODEL(final_norm_backward)(gpu, m, s, start, dstart);
    for (int l = L - 1; l >= 0; l--) { // with --recompute, only the last layer's activations are still there
        if (s->keep == KEEP_BLOCKS && l < L - 1) { OF_MODEL(block_forward)<X>(gpu, m, s, l, start, NULL); }
        OF_MODEL(block_backward)(gpu, m, s, l, start, dstart);
        if (gpu.reduce) { part_reduce(gpu, m, 2 + l); }
    }
    if (!config->share_emb && !gpu.accumulate) { // tokens that do not occur have no gradient
        CUDA(cudaMemsetAsync(dw.embed, 0, (size_t)vocab * D * sizeof(float), gpu.stream));
    }
    embedding_backward(gpu, dw.embed, da.embed, s->tokens, s->order, s->begin, s->runs, embedding_scale(config), D,
                       sites.embed);
    for (int part = 1; gpu.reduce && part >= 0; part--) { part_reduce(gpu, m, part); }
}

// ---------------------------------------------------------------------------------------------------------------------
// The optimizer. On one GPU the arena of parameters is one part, and this GPU's shard is all of it

struct Shard { // this GPU's, of a part
    size_t begin, at;   // where the part begins in an arena | where the shard does
    size_t size, place; // elements of the shard | where it begins in masters, adam_m and adam_v, which have only shards
};
template <typename X> static Shard model_shard(const ModelOf<X>* m, int part);
template <typename X, typename Y> static void part_gather(Gpu& gpu, const ModelOf<X>* m, int part, Y* arena);

// Global L2 norm of the gradient, on several GPUs after part_reduce of all parts; waits for the GPU.
template <typename X> static double model_grad_norm(Gpu& gpu, const ModelOf<X>* m) {
    double sum = 0;
    if (m->shards == 1) {
        LAUNCH(sum_kernel<float4>, SUM_BLOCKS, 256, m->sums, (const float4*)m->grads, m->size / 4, NULL, 1);
    }
    gpu_sync(&gpu);
    for (int part = 0; part < m->parts; part++) {
        if (!model_shard(m, part).size) { continue; }
        for (int i = 0; i < SUM_BLOCKS; i++) { sum += m->sums[part * SUM_BLOCKS + i]; }
    }
    all_sum(&sum, 1);
    return sqrt(sum);
}

// The loop of the CPU's model_update. A thread has 4 parameters; it also writes the weight rounded to X.
template <typename X> __global__ void update_kernel(float* w, X* rounded, const float* g, float* m1, float* m2,
        size_t n, float decay, float rate, float correction, float beta1, float beta2, float beta1c, float beta2c,
        float eps, float scale) {
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * 4;
    if (i >= n) { return; }
    float wv[4], gv[4], mv[4], vv[4];
    load(wv, w + i); load(gv, g + i); load(mv, m1 + i); load(vv, m2 + i);
    EACH(k, 4) {
        float grad = gv[k] * scale;
        mv[k] = beta1 * mv[k] + beta1c * grad; vv[k] = beta2 * vv[k] + beta2c * grad * grad;
        wv[k] = wv[k] * decay - rate * mv[k] / (sqrtf(vv[k]) * correction + eps);
    }
    store(w + i, wv); store(m1 + i, mv); store(m2 + i, vv);
    if ((void*)rounded != w) { store(rounded + i, wv); }
}
// AdamW, see the CPU's. On several GPUs, the weights of a part go to all while the next is updated, until part_wait.
template <typename X> static void model_update(Gpu& gpu, ModelOf<X>* m, const AdamW* o, int step, double grad_scale) {
    float decay = 1.0 - o->lr * o->weight_decay, rate = o->lr / (1.0 - pow(o->beta1, step)),
          correction = 1.0 / sqrt(1.0 - pow(o->beta2, step));
    for (int part = 0; part < m->parts; part++) {
        Shard s = model_shard(m, part);
        auto update = [&](auto* arena) {
            typedef std::remove_pointer_t<decltype(arena)> Y;
            LAUNCH(update_kernel<Y>, ceil_div(s.size, 1024), 256, m->masters + s.place, arena + s.at, m->grads + s.at,
                   m->adam_m + s.place, m->adam_v + s.place, s.size, decay, rate, correction, o->beta1, o->beta2,
                   1.0 - o->beta1, 1.0 - o->beta2, o->eps, grad_scale);
            if (m->shards > 1) { part_gather(gpu, m, part, arena); }
        };
        if (!s.size) { continue; }
        if (m->shards > 1 && part == 0) { update(m->params); } else { update(m->weights); } // part 0: read in fp32
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Use: one training step. What calls it, step by step, is the training loop of train_megalodon.c; see Backend there

template <typename X> struct GpuBackend {
    Gpu gpu; ModelOf<X> m;
    PassOf<X> pass;         // of a micro-step
    PassOf<X> streamed;     // of at most a chunk, to evaluate and generate
    StateOf<X> state;       // what `streamed` carries from call to call
    StateOf<X>* carried;    // with --carry: what comes before each micro-step, and at [accum] what comes after one
    double* sums;           // of the losses of each micro-step; pinned
    double dloss;
    int micro, accum;       // micro-steps since the last update, and of a step
    int* drawn;             // tokens; pinned
    cudaEvent_t draw_done;
};
template <typename X> static GpuBackend<X>* of(void* self) { return (GpuBackend<X>*)self; }
template <typename X> static void state_carry(Gpu& gpu, StateOf<X>* s, const Config* c, const bool* fresh);
template <typename X> static void slices_share_last(Gpu& gpu, const StateOf<X>* s);

// A training step is --accum times this, then finish_step and update.
template <typename X> static void backend_micro_step(void* self, const int* tokens, const int* targets, double dloss,
        bool first, uint64_t first_sequence, const bool* fresh) {
    GpuBackend<X>* r = of<X>(self);
    r->pass.masks.first = first_sequence;
    r->micro = first ? 0 : r->micro + 1;
    r->dloss = dloss; r->gpu.accumulate = !first;
    r->gpu.reduce = ranks.count > 1 && r->micro == r->accum - 1; // in the last micro-step
    StateOf<X> *past = fresh ? &r->carried[r->micro] : NULL, *next = fresh ? &r->carried[r->accum] : NULL;
    if (fresh) { state_carry(r->gpu, past, &r->m.config, fresh); }
    model_forward<X>(r->gpu, &r->m, &r->pass, tokens, past, next);
    model_losses(r->gpu, &r->m, &r->pass, targets, dloss, r->sums + r->micro);
    model_backward<X>(r->gpu, &r->m, &r->pass, tokens, past, NULL);
    if (!fresh) { return; }
    std::swap(*past, *next);
    if (ranks.slices > 1) { slices_share_last(r->gpu, past); }
}

template <typename X> static double backend_finish_step(void* self, double* loss) {
    GpuBackend<X>* r = of<X>(self);
    double norm = model_grad_norm(r->gpu, &r->m);
    *loss = 0;
    for (int i = 0; i <= r->micro; i++) { *loss += r->sums[i] * r->dloss; }
    all_sum(loss, 1);
    return norm;
}

template <typename X> static void backend_update(void* self, const Options* o, double lr, int step, double grad_scale) {
    AdamW adamw = adamw_of(o, lr);
    model_update(of<X>(self)->gpu, &of<X>(self)->m, &adamw, step, grad_scale);
    gpu_sync(&of<X>(self)->gpu);
}

// =====================================================================================================================
// Machinery: the rest of this file can be skipped by those who want to know how a model is trained on one GPU
// =====================================================================================================================

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

enum { NUM_PLANS = 4096, WORKSPACE = 64 << 20 };
static uint32_t alignment(const void* p) { return p ? min_size(256, (size_t)p & -(size_t)p) : 256; }

// Sums are in fp32, for fp32 operands in full fp32. The algorithm is the first one that cuBLASLt's heuristics name of
// those that add up in a fixed order. It is a function of shapes, alignment, card and version, and is asked for once
// for each product that differs in these (a plan).
template <typename X, typename Y> static void gemm(Gpu& gpu, Matrix<Y> d, Matrix<const X> a, Matrix<const X> b,
        int64_t M, int64_t N, int64_t K, int batch, const Y* add, int64_t add_pitch, const X* bias) {
    cudaDataType type = std::is_same<X, float>::value ? CUDA_R_32F : CUDA_R_16BF;
    cudaDataType type_out = std::is_same<Y, float>::value ? CUDA_R_32F : CUDA_R_16BF;
    const Y* c = add ? add : d.at;
    int64_t pitch_c = add ? add_pitch : d.pitch;
    const uint32_t align[4] = {alignment(b.at), alignment(a.at), alignment(c), alignment(d.at)};
    if (gpu.plans->size() == NUM_PLANS) { gpu.plans->clear(); }
    auto [at, is_new] = gpu.plans->try_emplace({M, N, K, a.pitch, b.pitch, add ? pitch_c : 0, d.pitch, a.step, b.step,
            d.step, a.transposed, b.transposed, type, type_out, batch, bias != NULL, align[0], align[1], align[2],
            align[3]});
    auto& [desc, l, algo] = at->second;
    auto describe = [desc = &desc](cublasLtMatmulDescAttributes_t name, const auto& value) {
        CUBLAS(cublasLtMatmulDescSetAttribute(desc, name, &value, sizeof(value)));
    };
    if (is_new) { // cuBLASLt is column-major: a row-major (M,N) is its (N,M), so it computes d^T = b^T a^T
        if (!gpu.workspace) { gpu.workspace = gpu_alloc(&gpu, WORKSPACE); }
        CUBLAS(cublasLtMatmulDescInit(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        describe(CUBLASLT_MATMUL_DESC_TRANSA, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        describe(CUBLASLT_MATMUL_DESC_TRANSB, a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        if (bias) {
            describe(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
            describe(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
        }
        const struct { cudaDataType type; int64_t rows, columns, pitch, step; } of[4] = {
            {type, b.transposed ? K : N, b.transposed ? N : K, b.pitch, b.step},
            {type, a.transposed ? M : K, a.transposed ? K : M, a.pitch, a.step},
            {type_out, N, M, pitch_c, d.step}, {type_out, N, M, d.pitch, d.step}};
        for (int i = 0; i < 4; i++) {
            CUBLAS(cublasLtMatrixLayoutInit(&l[i], of[i].type, of[i].rows, of[i].columns, of[i].pitch));
            if (batch == 1) { continue; }
            CUBLAS(cublasLtMatrixLayoutSetAttribute(&l[i], CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof(batch)));
            CUBLAS(cublasLtMatrixLayoutSetAttribute(&l[i], CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &of[i].step,
                                                    sizeof(of[i].step)));
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
    float alpha = 1, beta = add ? 1 : 0;
    if (bias) { describe(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias); }
    CUBLAS(cublasLtMatmul(gpu.lt, &desc, &alpha, b.at, &l[0], a.at, &l[1], &beta, c, &l[2], d.at, &l[3], &algo,
                          gpu.workspace, WORKSPACE, gpu.stream));
}

template <typename X> static void matmul_forward(Gpu& gpu, X* out, int ldo, const X* inp, int ldi, const X* weight,
        const X* bias, const X* add, int lda, size_t rows, int I, int O) {
    gemm<X, X>(gpu, {out, ldo}, {inp, ldi}, {weight, I, 0, true}, rows, O, I, 1, add, lda, bias);
}
template <typename X> static void matmul_backward(Gpu& gpu, X* dinp, int ldi, const X* dout, int ldo, const X* weight,
        size_t rows, int I, int O, bool accumulate) {
    gemm<X, X>(gpu, {dinp, ldi}, {dout, ldo}, {weight, I}, rows, I, O, 1, accumulate ? dinp : NULL, ldi);
}
template <typename X> static void matmul_backward_weight(Gpu& gpu, float* dweight, const X* dout, int ldo,
        const X* inp, int ldi, size_t rows, int I, int O) {
    gemm<X, float>(gpu, {dweight, I}, {dout, ldo, 0, true}, {inp, ldi}, O, I, rows, 1, gpu.accumulate ? dweight : NULL,
                   I);
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory: the arenas of parameters, states and activations, and how much of it training takes

static void out_of_memory(const Gpu* gpu, size_t bytes) {
    size_t free = 0, total = 0;
    cudaGetLastError(); cudaMemGetInfo(&free, &total);
    die("out of GPU memory: %.1f MB asked for, %.1f MB of %.1f MB are free, this program holds %.1f MB", bytes / 1e6,
        free / 1e6, total / 1e6, gpu->allocated / 1e6);
}
static size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256 + 256; }
static void* gpu_alloc(Gpu* gpu, size_t bytes) {
    void* p = NULL;
    bytes = padded(bytes);
    if (!gpu->dry && cudaMalloc(&p, bytes) != cudaSuccess) { out_of_memory(gpu, bytes); }
    if (p) { CUDA(cudaMemsetAsync(p, 0, bytes, gpu->stream)); }
    gpu->allocated += bytes;
    return p;
}
static void* exchange_alloc(Gpu* gpu, size_t bytes, bool states); // see Several GPUs
static void exchange_free(Gpu* gpu, void* p, bool states);

// Scratch memory grows when a larger need comes up, which is in the first step.
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

// Rows of the tables that stand beside row i, as one product makes or takes both; -1 for none.
static int act_beside(int i) { return i == A_rmsnorm ? A_gated : i == A_wz ? A_wr : i == A_fc1 ? A_fc3 : -1; }
static int param_beside(int i) {
    return i == P_wz ? P_wr : i == P_wz_b ? P_wr_b : i == P_fc1 ? P_fc3 : i == P_wh1 ? P_wh2 : -1;
}
// Activations that are cheap to compute again in the backward pass, which KEEP_CHEAPLY does not keep for every layer.
static bool act_is_cheap(int i) {
    return i == A_timenorm || i == A_rmsnorm || i == A_q || i == A_k || i == A_v || i == A_gated || i == A_norm
            || i == A_hidden;
}

// On one GPU an arena of parameters is one part. On several it is a row of parts: what kernels read in fp32, the
// embedding, each layer, the output. Of each part every GPU has a shard of the same size. This is the part of tensor i;
// 2 is layer 0's, so that layer l's is 2 + l. ParamPlace keeps the number: g++ 13.3 at -O3, which inlines this function
// into a loop over i, returns a wrong one for the embedding.
static int param_part(int i, int L) {
    return param_is_float(i) ? 0 : i == P_embed ? 1 : i == P_output ? L + 2 : 2;
}
template <typename X> static Shard model_shard(const ModelOf<X>* m, int part) {
    auto start = [&](int part) {
        return part == 0 ? 0 : part == m->parts ? m->size : part == 1 ? m->places[P_embed].offset
               : m->places[P_wv].offset + (part - 2) * m->places[P_wv].step;
    };
    size_t begin = start(part), size = (start(part + 1) - begin) / m->shards;
    return {begin, begin + (m->shards > 1 ? ranks.rank * size : 0), size, begin / m->shards};
}

// Lays out the tensors, part by part, each at a multiple of 64 elements. See CONVENTIONS for those that stand together.
//     parts        0: fp32, all layers | 1: embed | 2: layer 0, from wv on | 3: layer 1 | ... | L+2: output
// A step is the distance from one layer to the next: in part 0 a tensor's own size, in part 2 the size of the part. A
// tensor whose step is not 0 has its place.
template <typename X> static void params_place(ModelOf<X>* m, const Config* c) {
    size_t at = 0, D = c->model_dim, V = c->value_dim;
    int L = c->num_layers;
    for (int part : {0, 1, 2, L + 2}) { // of the layers' parts the first
        size_t first = at;
        for (int i = 0; i < NUM_PARAMS; i++) {
            int other = param_beside(i);
            const Spec* specs = m->specs;
            size_t more = other < 0 ? 0 : specs[other].size, step = ceil_div(specs[i].size + more, 64) * 64;
            if (param_part(i, L) != part || !specs[i].size || m->places[i].step) { continue; }
            auto place = [&](int k, size_t after) {
                size_t rows = specs[k].dims[1] ? specs[k].dims[0] : 1, columns = specs[k].size / rows;
                m->places[k] = {at + after, step, rows, columns, i == P_wh1 ? D + V : columns, part};
            };
            place(i, 0);
            if (more) { place(other, i == P_wh1 ? D : specs[i].size); }
            at += part == 0 ? specs[i].slots * step : step;
        }
        at = first + ceil_div(at - first, 64 * m->shards) * 64 * m->shards;
        if (part != 2) { continue; }
        for (int i = 0; i < NUM_PARAMS; i++) { if (m->places[i].part == part) { m->places[i].step = at - first; } }
        at += (L - 1) * (at - first);
    }
    m->size = at;
}

// Fields are of different types, hence memcpy.
template <typename X> static ParamsOf<X> params_layer(const ModelOf<X>* m, int l) {
    ParamsOf<X> w;
    for (int i = 0; i < NUM_PARAMS; i++) {
        size_t at = m->places[i].offset + l * m->places[i].step;
        void* p = param_is_float(i) ? (void*)(m->params + at) : m->weights + at;
        memcpy((char*)&w + i * sizeof(p), &p, sizeof(p));
    }
    return w;
}
template <typename X> static Params gradients_layer(const ModelOf<X>* m, int l) {
    Params dw;
    for (int i = 0; i < NUM_PARAMS; i++) { ((float**)&dw)[i] = m->grads + m->places[i].offset + l * m->places[i].step; }
    return dw;
}
template <typename X> static ActsOf<X> acts_layer(const ActPlace* places, char* arena, int l) {
    ActsOf<X> a;
    for (int i = 0; i < NUM_ACTS; i++) {
        char* p = places[i].pitch ? arena + places[i].offset + l * places[i].step : NULL;
        memcpy((char*)&a + i * sizeof(p), &p, sizeof(p));
    }
    return a;
}
template <typename X> static X* block_input(const ActPlace* places, char* arena, int l) {
    return l ? acts_layer<X>(places, arena, l - 1).out : acts_layer<X>(places, arena, 0).embed;
}

template <typename X> static void model_alloc(Gpu& gpu, ModelOf<X>* m, const Config* c, bool training) {
    config_check(c);
    memset(m, 0, sizeof(*m));
    m->config = *c; param_specs(m->specs, c);
    m->shards = training ? ranks.count : 1; // one rank alone evaluates and generates
    bool sharded = m->shards > 1, same = !sharded && std::is_same<X, float>::value;
    m->parts = sharded ? c->num_layers + 3 : 1;
    params_place(m, c);
    auto floats = [&](size_t n) { return (float*)gpu_alloc(&gpu, n * sizeof(float)); };
    size_t shard = m->size / m->shards;
    m->params = floats(sharded ? m->places[P_embed].offset : m->size);
    m->masters = sharded ? floats(shard) : m->params;
    if (training) {
        size_t largest = 0; // part
        for (int part = 0; sharded && part < m->parts; part++) {
            size_t n = model_shard(m, part).size * m->shards;
            largest = n > largest ? n : largest;
        }
        m->grads = (float*)exchange_alloc(&gpu, (m->size + 2 * largest) * sizeof(float), false);
        m->received[0] = m->grads + m->size; m->received[1] = m->received[0] + largest;
        m->adam_m = floats(shard); m->adam_v = floats(shard);
    }
    size_t bytes = m->size * sizeof(X);
    m->weights = (X*)(same ? m->params : sharded ? exchange_alloc(&gpu, bytes, false) : gpu_alloc(&gpu, bytes));
    bytes = sizeof(float) * c->chunk_size * (c->z_dim / c->num_heads);
    m->rotations = (float*)gpu_alloc(&gpu, bytes);
    if (gpu.dry) { return; }
    CUDA(cudaMallocHost((void**)&m->sums, m->parts * SUM_BLOCKS * sizeof(double)));
    if (sharded) { m->came = (cudaEvent_t*)xcalloc(m->parts, sizeof(cudaEvent_t)); }
    for (int part = 0; sharded && part < m->parts; part++) {
        CUDA(cudaEventCreateWithFlags(&m->came[part], cudaEventDisableTiming));
    }
    Model host; Config small = *c;
    small.num_layers = small.vocab_size = small.model_dim = small.norm_num_groups = small.ffn_hidden_dim = 2;
    small.value_dim = small.num_heads;
    model_alloc(&host, &small, false); // for its table of rotations
    CUDA(cudaMemcpy(m->rotations, host.rotations, bytes, cudaMemcpyHostToDevice));
    model_free(&host);
}

static void stream_after(Gpu& gpu, cudaStream_t stream, cudaStream_t other);
template <typename X> static void model_free(Gpu& gpu, ModelOf<X>* m) {
    if (m->came) { stream_after(gpu, gpu.stream, gpu.exchange_stream); } // weights may be on their way
    gpu_sync(&gpu);
    if (m->shards > 1) { exchange_free(&gpu, m->weights, false); }
    else if ((void*)m->weights != m->params) { cudaFree(m->weights); }
    if (m->masters != m->params) { cudaFree(m->masters); }
    for (int part = 0; m->came && part < m->parts; part++) { cudaEventDestroy(m->came[part]); }
    free(m->came); cudaFreeHost(m->sums);
    exchange_free(&gpu, m->grads, false);
    cudaFree(m->params); cudaFree(m->adam_m); cudaFree(m->adam_v); cudaFree(m->rotations);
}

// A thread rounds floats that lie gridDim.x * blockDim.x apart.
template <typename X> __global__ void round_kernel(X* out, const float* inp, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        out[i] = from_float<X>(inp[i]);
    }
}
// Makes the weights again after n parameters from `at` on have been set by the host.
template <typename X> static void model_round(Gpu& gpu, ModelOf<X>* m, const float* params, size_t at, size_t n) {
    if ((void*)m->weights == params) { return; }
    LAUNCH(round_kernel<X>, SUM_BLOCKS, 256, m->weights + at, params + at, n);
}

// Copies tensor i of layer l between an arena (params, grads, adam_m or adam_v) and the host.
template <typename X> static void tensor_copy(const ModelOf<X>* m, float* arena, int i, int l, float* host,
        bool to_host) {
    const ParamPlace* p = &m->places[i];
    float* there = arena + p->offset + l * p->step;
    size_t width = p->columns * sizeof(float), pitch = p->pitch * sizeof(float);
    if (to_host) { CUDA(cudaMemcpy2D(host, width, there, pitch, width, p->rows, cudaMemcpyDeviceToHost)); }
    else { CUDA(cudaMemcpy2D(there, pitch, host, width, width, p->rows, cudaMemcpyHostToDevice)); }
}
// The Backend's copy. `extent` counts from the tensor's first element to its last, with what stands between its rows;
// `elements`, of these, those of the tensor. Tensors of which a GPU has a shard only pass through the gradients' arena,
// which is free between steps.
template <typename X> static void model_copy_row(Gpu& gpu, ModelOf<X>* m, int kind, int i, int l, float* host,
        bool to_host, size_t range[2]) {
    const ParamPlace* p = &m->places[i];
    bool sharded = m->shards > 1;
    int part = !sharded ? 0 : p->part == 2 ? 2 + l : p->part;
    Shard s = model_shard(m, part);
    size_t first = p->offset + l * p->step, extent = (p->rows - 1) * p->pitch + p->columns;
    auto clip = [&](size_t at) { return at > first ? min_size(at - first, extent) : 0; }; // from `first` on
    auto elements = [&](size_t at) { return at / p->pitch * p->columns + min_size(at % p->pitch, p->columns); };
    size_t begin = clip(s.at), end = clip(s.at + s.size); // what of the tensor is this GPU's
    range[0] = elements(begin); range[1] = elements(end);
    float *shards = kind == WEIGHTS ? m->masters : kind == ADAM_M ? m->adam_m : m->adam_v;
    float* whole = sharded ? m->grads : shards;
    auto copy = [&](float* to, const float* from, size_t n) {
        CUDA(cudaMemcpyAsync(to, from, n * sizeof(float), cudaMemcpyDefault, gpu.stream));
    };
    bool passes = sharded && begin < end;
    float *here = passes ? shards + (s.place + first + begin - s.at) : NULL, *there = whole + first + begin;
    if (passes && to_host) { copy(there, here, end - begin); }
    tensor_copy(m, whole, i, l, host, to_host);
    if (to_host) { return; }
    if (passes) { copy(here, there, end - begin); }
    if (kind != WEIGHTS) { return; }
    if (sharded && part == 0) { copy(m->params + first, whole + first, extent); }
    model_round(gpu, m, whole, first, extent);
}

template <typename X> static void state_alloc(Gpu& gpu, StateOf<X>* s, const Config* c, int B, bool cache) {
    Spec specs[NUM_ARRAYS]; int named = state_specs(specs, c, B);
    size_t layers = c->num_layers, norms = (layers + 1) * B * c->norm_num_groups;
    memset(s, 0, sizeof(*s));
    s->B = B; s->bytes = norms * sizeof(NormState) + specs_size(specs, named) * sizeof(float);
    s->norm = (NormState*)gpu_alloc(&gpu, s->bytes);
    specs_place(&s->h, (float*)(s->norm + norms), specs, named);
    if (!cache) { return; }
    for (int i = named; i < NUM_ARRAYS; i++) {
        (&s->k)[i - named] = (X*)gpu_alloc(&gpu, layers * specs[i].size * CHUNKS_CACHED * sizeof(X));
    }
    s->scores = (float*)gpu_alloc(&gpu, (size_t)B * c->chunk_size * c->num_heads * sizeof(float));
    s->coef = (CemaCoef*)gpu_alloc(&gpu, layers * c->model_dim * cema_width(c->cema_ndim) * sizeof(CemaCoef));
}
template <typename X> static void state_free(Gpu& gpu, StateOf<X>* s) {
    gpu_sync(&gpu);
    cudaFree(s->norm); cudaFree(s->scores); cudaFree(s->coef);
    for (X** cached = &s->k; cached < (X**)&s->scores; cached++) { cudaFree(*cached); }
    if (s->graph) { CUDA(cudaGraphExecDestroy(s->graph)); }
}

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
        if (grads && ((act_is_float(i) && i != A_attention_lse) || i == A_logits)) { continue; } // lse: see `dot`
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
    size_t BT = (size_t)B * T, carries = cema_carries_size(B, T, c->model_dim);
    if (BT > INT_MAX / 2) { die("%d x %d tokens in one pass are too many for the GPU program", B, T); }
    memset(s, 0, sizeof(*s));
    s->B = B; s->T = T; s->keep = keep;
    s->acts_size = acts_place<X>(s->places, c, BT, keep, false, keep_grads == KEEP_ALL);
    s->acts = (char*)gpu_alloc(&gpu, s->acts_size);
    if (keep != KEEP_NONE) {
        s->grads_size = acts_place<X>(s->dplaces, c, BT, keep_grads, true, keep_grads == KEEP_ALL);
        s->grads = (char*)gpu_alloc(&gpu, s->grads_size);
        s->carries_step = carries;
    }
    if (keep != KEEP_NONE && ranks.slices > 1) {
        state_alloc(gpu, &s->before, c, B, false); state_alloc(gpu, &s->after, c, B, false);
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
    cudaFreeHost(s->host); state_free(gpu, &s->before); state_free(gpu, &s->after);
    cudaEventDestroy(s->copied);
}

template <typename X> static void state_reset(Gpu& gpu, StateOf<X>* s) {
    CUDA(cudaMemsetAsync(s->norm, 0, s->bytes, gpu.stream));
    s->pos = s->steps = 0;
}
// A thread rounds one number of a state to float, as files have it.
__global__ void norm_round_kernel(double* norm, size_t n) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < n) { norm[i] = float_rounded(norm[i]); }
}
// See the CPU's. In each layer, norm and the other arrays have a piece for each sequence.
template <typename X> static void state_carry(Gpu& gpu, StateOf<X>* s, const Config* c, const bool* fresh) {
    Spec specs[NUM_ARRAYS]; int named = state_specs(specs, c, 1);
    size_t norm = sizeof(NormState) * c->norm_num_groups;
    size_t L = c->num_layers, B = s->B, n = (L + 1) * B * c->norm_num_groups * 3;
    LAUNCH(norm_round_kernel, ceil_div(n, 256), 256, (double*)s->norm, n);
    for (size_t b = 0; b < B; b++) {
        if (!fresh[b]) { continue; }
        CUDA(cudaMemset2DAsync((char*)s->norm + b * norm, B * norm, 0, norm, L + 1, gpu.stream));
        for (int i = 0; i < named; i++) {
            size_t n = sizeof(float) * specs[i].size;
            if (n) { CUDA(cudaMemset2DAsync((char*)(&s->h)[i] + b * n, B * n, 0, n, L, gpu.stream)); }
        }
    }
}
template <typename X> static StateOf<X> state_layer(const StateOf<X>* s, const Config* c, int l) {
    StateOf<X> r = {};
    if (!s || !s->norm) { return r; }
    Spec specs[NUM_ARRAYS]; int named = state_specs(specs, c, s->B);
    r = *s; r.norm += (size_t)l * s->B * c->norm_num_groups;
    for (int i = 0; i < named; i++) { (&r.h)[i] += l * specs[i].size; }
    if (s->k && l < c->num_layers) {
        for (int i = named; i < NUM_ARRAYS; i++) { (&r.k)[i - named] += l * specs[i].size * CHUNKS_CACHED; }
        r.coef += (size_t)l * c->model_dim * cema_width(c->cema_ndim);
    }
    return r;
}

// All that is on the device.
template <typename X> static void backend_alloc(GpuBackend<X>* r, const Options* o, bool training, int keep) {
    const Config* c = &o->model;
    int B = o->generate ? o->samples : 1, T = o->generate ? 1 : c->chunk_size;
    r->accum = o->accum;
    model_alloc(r->gpu, &r->m, c, training);
    if (training) { pass_alloc(r->gpu, &r->pass, c, o->batch, o->seq / ranks.slices, keep, KEEP_NONE); }
    r->pass.masks = masks_of(o);
    pass_alloc(r->gpu, &r->streamed, c, B, T, KEEP_NONE, KEEP_NONE);
    state_alloc(r->gpu, &r->state, c, B, true);
    if (!training || !o->carry) { return; }
    r->carried = (StateOf<X>*)xcalloc(o->accum + 1, sizeof(StateOf<X>));
    for (int i = 0; i <= o->accum; i++) { state_alloc(r->gpu, &r->carried[i], c, o->batch, false); }
}

// Counted by asking for all of it without taking it; and scratch memory at its largest: SCORES; PARTIALS of the norm,
// 2 D floats for 32 timesteps, and of row kernels, at most 160 bytes for a feature and multiprocessor; CEMA_SUMS.
template <typename X> static size_t memory_needed(const Gpu& gpu, const Options* o, int keep) {
    size_t T = o->seq / ranks.slices, chunk = min_size(o->model.chunk_size, T), scores = sizeof(X) * 2 * chunk * chunk;
    size_t least = 2 * (size_t)SCORES_BYTES, D = o->model.model_dim, V = o->model.value_dim;
    GpuBackend<X> count = {gpu};
    count.gpu.dry = true;
    count.gpu.allocated = WORKSPACE + (scores > least ? scores : least) + o->batch * T * D / 4
                          + (D + V) * gpu.card.multiProcessorCount * 160
                          + o->batch * D * cema_width(o->model.cema_ndim) * sizeof(CemaSums)
                          + MORE_MEMORY(T, sizeof(X));
    if (ranks.slices > 1) { // SLICES
        count.gpu.allocated += sizeof(float2) * o->batch * D * o->model.cema_ndim * (ranks.slices + 2);
    }
    backend_alloc(&count, o, true, keep); free(count.carried);
    return count.gpu.allocated;
}

// What to keep for the backward pass: all, if training then takes at most half of the card.
template <typename X> static int what_to_keep(const Gpu& gpu, const Options* o) {
    if (o->recompute) { return KEEP_BLOCKS; }
    return memory_needed<X>(gpu, o, KEEP_ALL) <= gpu.card.totalGlobalMem / 2 ? (int)KEEP_ALL : (int)KEEP_CHEAPLY;
}

template <typename X> static double backend_memory_needed(void* self, const Options* o) {
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

static void ranks_connect(Gpu* gpu); // see Several GPUs
template <typename X> static void backend_open(void* self, const Options* o, bool training) {
    GpuBackend<X>* r = of<X>(self);
    if (training) { ranks_connect(&r->gpu); memory_check<X>(r->gpu, o); }
    backend_alloc(r, o, training, what_to_keep<X>(r->gpu, o));
    CUDA(cudaMallocHost((void**)&r->sums, o->accum * sizeof(double)));
    CUDA(cudaMallocHost((void**)&r->drawn, r->streamed.B * sizeof(int)));
    CUDA(cudaEventCreateWithFlags(&r->draw_done, cudaEventDisableTiming));
}

template <typename X> static void backend_close(void* self) {
    GpuBackend<X>* r = of<X>(self);
    model_free(r->gpu, &r->m);
    if (r->pass.B) { pass_free(r->gpu, &r->pass); }
    pass_free(r->gpu, &r->streamed); state_free(r->gpu, &r->state);
    for (int i = 0; r->carried && i <= r->accum; i++) { state_free(r->gpu, &r->carried[i]); }
    free(r->carried); cudaFreeHost(r->sums); cudaFreeHost(r->drawn); cudaEventDestroy(r->draw_done);
    device_close(&r->gpu);
}

template <typename X> static void backend_copy(void* self, int kind, int row, int layer, void* host, bool to_host,
        size_t range[2]) {
    ModelOf<X>* m = &of<X>(self)->m;
    if (kind < STATES) {
        model_copy_row(of<X>(self)->gpu, m, kind, row, layer, (float*)host, to_host, range);
        return;
    }
    const Config* c = &m->config;
    StateOf<X> s = state_layer(&of<X>(self)->carried[row], c, layer); // for these, row is the micro-step
    Spec specs[NUM_ARRAYS]; state_specs(specs, c, s.B);
    void* here = kind == CARRIED_NORM ? (void*)s.norm : (&s.h)[kind - CARRIED_H];
    size_t bytes = kind == CARRIED_NORM ? sizeof(NormState) * s.B * c->norm_num_groups
                                        : sizeof(float) * specs[kind - CARRIED_H].size;
    CUDA(cudaMemcpy(to_host ? host : here, to_host ? here : host, bytes, cudaMemcpyDefault));
}

// ---------------------------------------------------------------------------------------------------------------------
// Dropout. Masks are the CPU's: element i of a row is kept if 16 bits of a hash of (row, i / 4) are not below drop

// E neighbours from i on: 1, or 8 and i a multiple of 4. bits: of the row, see dropout_bits. A hash serves 4 elements.
template <bool DROP, int E> __device__ inline void drop_elements(float (&v)[E], const Dropout& drop, uint64_t bits,
        int i) {
    if (!DROP) { return; }
    EACH(k, (E + 3) / 4) {
        uint64_t four = mix_bits(bits + i / 4 + k) >> (E == 1 ? i % 4 * 16 : 0);
        EACH(e, E == 1 ? 1 : 4) {
            float& x = v[4 * k + e];
            x = (four >> 16 * e & 0xffff) >= drop.drop ? x * drop.scale : drop.dropped;
        }
    }
}
template <bool WIDE, bool DROP> __device__ inline void drop_row(float (&v)[8], const Dropout& drop, unsigned r,
        int first) {
    if (!DROP) { return; }
    uint64_t bits = dropout_bits(drop, r / drop.T, r % drop.T, 0);
    if (WIDE) { drop_elements<DROP>(v, drop, bits, first + 8 * threadIdx.x); return; }
    EACH(e, 8) {
        float one[1] = {v[e]};
        drop_elements<DROP>(one, drop, bits, first + column<WIDE>(e));
        v[e] = one[0];
    }
}

// A row kernel: out (rows,D) = dropout(inp) + add; add may be NULL. It reads inp and add once and writes out once.
template <typename X, bool WIDE> __global__ void dropout_kernel(X* out, float* partials, const X* inp, const X* add,
        size_t rows, int D, Dropout drop) {
    float sum[8] = {0}, x[8], y[8] = {0};
    for (size_t r = row_first(); r < rows; r += row_step()) {
        load_row<WIDE>(x, inp + r * D, D);
        if (add) { load_row<WIDE>(y, add + r * D, D); }
        drop_row<WIDE, true>(x, drop, r);
        EACH(e, 8) { x[e] += y[e]; sum[e] += x[e]; }
        store_row<WIDE>(out + r * D, x, D);
    }
    if (partials) { store_partial<WIDE>(partials, 1, D, 0, sum, D); }
}
// Returns out, or with rate 0 does nothing and returns inp. sum (D): column sums of out, or NULL.
template <typename X> static const X* dropout(Gpu& gpu, X* out, float* sum, const X* inp, const X* add, Dropout drop,
        size_t rows, int D) {
    if (!drop.drop) { return inp; }
    RowGrid r = row_grid(gpu, rows, D, 1, 4, sum ? D : 0);
    LAUNCH(FORM(dropout_kernel, wide(D)), r.grid, r.block, out, r.partials, inp, add, rows, D, drop);
    if (sum) { reduce_columns(gpu, r.partials, r.blocks, {{sum}, 1, D}); }
    return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Odd sizes: forms of kernels for sizes that the fast ones do not take. They are simple, and slower

// A row whose size is not a multiple of 8. A thread has four times two neighbours, because the rotary embedding turns
// two features together; the next two lie 2 blockDim.x columns further.
template <typename X> struct RowPiece<X, false> {
    X x[8];
    __device__ void load(const X* row, int columns) {
        EACH(e, 8) { x[e] = column<false>(e) < columns ? row[column<false>(e)] : from_float<X>(0); }
    }
    __device__ void get(float* v) const { EACH(e, 8) { v[e] = to_float(x[e]); } }
    static __device__ void write(X* row, const float (&v)[8], int columns) {
        EACH(e, 8) { if (column<false>(e) < columns) { row[column<false>(e)] = from_float<X>(v[e]); } }
    }
};

// The timestep norm for groups of any width. The segments and the scan over them are the fast form's. A warp has one
// segment and walks through its timesteps; its lanes share the features and read them as often as they are needed.
struct NormPlaceAny {
    int lane, g, width, in_time, begin, end; // number of the segment in its line; its timesteps
    size_t b, segment;                       // as in NormPlace
    bool active;
    __device__ NormPlaceAny(int B, int T, int D, int G) {
        int length = (T + SEGMENT - 1) / SEGMENT;
        segment = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
        active = segment < (size_t)B * G * length;
        lane = threadIdx.x % 32; width = D / G;
        in_time = segment % length; g = segment / length % G; b = segment / length / G;
        begin = in_time * SEGMENT; end = min(begin + SEGMENT, T);
    }
    __device__ size_t statistics(int t, int T, int G) const { return (b * T + t) * G + g; } // features: times width
};
static size_t norm_blocks_any(int B, int T, int G) { return ceil_div(B * G * norm_segments(T), WARPS); }
template <typename X> __device__ inline float2 timestep_statistics(const X* x, int width, int lane) { // mean, var
    float s = 0;
    for (int f = lane; f < width; f += 32) { s += to_float(x[f]); }
    float m = warp_sum(s) / width;
    s = 0;
    for (int f = lane; f < width; f += 32) { s += (to_float(x[f]) - m) * (to_float(x[f]) - m); }
    return make_float2(m, warp_sum(s) / width);
}
// Step 1, or with APPLY step 3.
template <typename X, bool APPLY> __global__ void timestepnorm_forward_any_kernel(X* out, float* mean, float* rstd,
        float4* segments, const X* inp, const float* w, const float* b, int B, int T, int D, int G, float eps) {
    NormPlaceAny p(B, T, D, G);
    if (!p.active) { return; }
    float4 past = APPLY ? segments[p.segment] : make_float4(0, 0, 0, 0);
    float n = 0, mean_here = 0, var_here = 0; // of the segment's timesteps so far
    for (int t = p.begin; t < p.end; t++) {
        size_t k = p.statistics(t, T, G);
        float2 one = timestep_statistics(inp + k * p.width, p.width, p.lane);
        merge(n, mean_here, var_here, 1.0f, one.x, one.y);
        if (!APPLY) { continue; }
        float count = past.x, mu = past.y, var = past.z;
        merge(count, mu, var, n, mean_here, var_here);
        float r = rsqrtf(var + eps);
        for (int f = p.lane; f < p.width; f += 32) {
            float x = to_float(inp[k * p.width + f]);
            out[k * p.width + f] = from_float<X>((x - mu) * r * (w[p.g * p.width + f] + 1) + b[p.g * p.width + f]);
        }
        if (p.lane == 0) { mean[k] = mu; rstd[k] = r; }
    }
    if (!APPLY && p.lane == 0) { segments[p.segment] = make_float4(n, mean_here, var_here, 0); }
}
template <typename X> static void timestepnorm_forward_any(Gpu& gpu, bool apply, X* out, float* mean, float* rstd,
        float4* segments, const X* inp, const float* w, const float* b, int B, int T, int D, int G, float eps) {
    LAUNCH((apply ? timestepnorm_forward_any_kernel<X, true> : timestepnorm_forward_any_kernel<X, false>),
           norm_blocks_any(B, T, G), 32 * WARPS, out, mean, rstd, segments, inp, w, b, B, T, D, G, eps);
}

// Step 1, or with APPLY step 3.
template <typename X, bool APPLY> __global__ void timestepnorm_backward_any_kernel(X* dinp, float4* segments,
        float* partials, const X* add1, const X* add2, NormInputs<X> in) {
    auto [dout, mean, rstd, start, inp, w, B, T, D, G] = in;
    NormPlaceAny p(B, T, D, G);
    if (!p.active) { return; }
    float count0 = start ? start[p.b * G + p.g].count : 0, center = mean[p.statistics(T - 1, T, G)];
    float4 sums = APPLY ? segments[p.segment] : make_float4(0, 0, center, 0); // U, S, center
    for (int t = p.end - 1; t >= p.begin; t--) {
        size_t k = p.statistics(t, T, G);
        float sum_fx = 0, sum_f = 0, mu = mean[k], r = rstd[k], n = count0 + (float)(t + 1);
        for (int f = p.lane; f < p.width; f += 32) {
            float d = to_float(dout[k * p.width + f]) * (w[p.g * p.width + f] + 1);
            sum_fx += d * (to_float(inp[k * p.width + f]) - mu); sum_f += d;
        }
        float dmean = -r * warp_sum(sum_f), dvar = -0.5f * r * r * r * warp_sum(sum_fx);
        sums.x += (dmean - 2 * (mu - center) * dvar) / n; sums.y += dvar / n;
        for (int f = p.lane; APPLY && f < p.width; f += 32) {
            size_t at = k * p.width + f;
            float dx = to_float(dout[at]) * (w[p.g * p.width + f] + 1) * r;
            dx += (sums.x + 2 * (to_float(inp[at]) - center) * sums.y) / p.width;
            dinp[at] = from_float<X>(dx + (add1 ? to_float(add1[at]) : 0) + (add2 ? to_float(add2[at]) : 0));
        }
    }
    if (APPLY) { return; }
    if (p.lane == 0) { segments[p.segment] = sums; }
    partials += (p.b * ((T + SEGMENT - 1) / SEGMENT) + p.in_time) * 2 * D + p.g * p.width;
    for (int f = p.lane; f < p.width; f += 32) { // dw and db
        float dw = 0, db = 0;
        for (int t = p.begin; t < p.end; t++) {
            size_t k = p.statistics(t, T, G);
            float dy = to_float(dout[k * p.width + f]);
            dw += dy * (to_float(inp[k * p.width + f]) - mean[k]) * rstd[k]; db += dy;
        }
        partials[f] = dw; partials[D + f] = db;
    }
}
template <typename X> static void timestepnorm_backward_any(Gpu& gpu, bool apply, X* dinp, float4* segments,
        float* partials, const X* add1, const X* add2, NormInputs<X> in) {
    LAUNCH((apply ? timestepnorm_backward_any_kernel<X, true> : timestepnorm_backward_any_kernel<X, false>),
           norm_blocks_any(in.B, in.T, in.G), 32 * WARPS, dinp, segments, partials, add1, add2, in);
}

// CEMA for any size and type. A team of OSCILLATORS lanes has a feature of a sequence, and each lane COUNT oscillators.
// It walks through time from end to end, with the CPU's loops, and reads AHEAD timesteps at once.
enum { AHEAD = 8 };
struct CemaPlace {
    int d, k0; bool active; // the lane's oscillators: k0, k0 + OSCILLATORS, ...
    size_t bd, at; // of (b,d) | of (b,0,d) among (B,T,D)
    __device__ CemaPlace(int T, int D) {
        d = (blockIdx.x * blockDim.x + threadIdx.x) / OSCILLATORS; k0 = threadIdx.x % OSCILLATORS;
        active = d < D;
        if (!active) { d = D - 1; }
        bd = (size_t)blockIdx.y * D + d; at = (size_t)blockIdx.y * T * D + d;
    }
};
template <typename X, int COUNT> __global__ void cema_forward_any_kernel(X* out, float* end, const float* start,
        const X* inp, const CemaCoef* coef, const float* omega, int T, int D, int N) {
    CemaPlace place(T, D); CemaCoef own[COUNT];
    float2 s[COUNT];
    EACH(j, COUNT) {
        own[j] = coef[(size_t)place.d * OSCILLATORS * COUNT + j * OSCILLATORS + place.k0];
        s[j] = cema_start(start, place.bd, j * OSCILLATORS + place.k0, N, own[j].p);
    }
    for (int t0 = 0; t0 < T; t0 += AHEAD) {
        float x[AHEAD];
        EACH(i, AHEAD) { x[i] = t0 + i < T ? to_float(inp[place.at + (size_t)(t0 + i) * D]) : 0; }
        EACH(i, AHEAD) {
            float y = 0;
            if (t0 + i >= T) { break; }
            EACH(j, COUNT) {
                s[j] = mul_add(own[j].q, s[j], float2{x[i], 0}); y += own[j].c.x * s[j].x - own[j].c.y * s[j].y;
            }
            y = warp_sum<OSCILLATORS>(y) + omega[place.d] * x[i];
            if (place.active && place.k0 == 0) { out[place.at + (size_t)(t0 + i) * D] = from_float<X>(y); }
        }
    }
    EACH(j, COUNT) {
        int k = j * OSCILLATORS + place.k0;
        if (end && place.active && k < N) { ((float2*)end)[place.bd * N + k] = {own[j].p * s[j].x, own[j].p * s[j].y}; }
    }
}

// sums (B,D,NK), domega (B,D): see the form on tensor cores. Q, R and a' are the CPU's.
template <typename X, int COUNT> __global__ void cema_backward_any_kernel(X* dinp, CemaSums* sums, float* domega,
        const X* dout, const float* start, const float* end, const float* a_end, const X* inp, const CemaCoef* coef,
        const float* omega, int T, int D, int N) {
    CemaPlace place(T, D); CemaCoef own[COUNT];
    float2 a[COUNT] = {}, a_prime[COUNT] = {}, Q[COUNT] = {}, R[COUNT] = {}, after[COUNT] = {};
    float dw = 0;
    EACH(j, COUNT) {
        int k = j * OSCILLATORS + place.k0;
        own[j] = coef[(size_t)place.d * OSCILLATORS * COUNT + k];
        if (a_end && k < N) { a[j] = after[j] = ((const float2*)a_end)[place.bd * N + k]; }
    }
    for (int t0 = T - 1; t0 >= 0; t0 -= AHEAD) {
        float x[AHEAD], dy[AHEAD];
        EACH(i, AHEAD) {
            x[i] = t0 >= i ? to_float(inp[place.at + (size_t)(t0 - i) * D]) : 0;
            dy[i] = t0 >= i ? to_float(dout[place.at + (size_t)(t0 - i) * D]) : 0;
        }
        EACH(i, AHEAD) {
            float dx = 0;
            if (t0 < i) { break; }
            EACH(j, COUNT) {
                float2 q = {own[j].q.x, -own[j].q.y};
                a[j] = mul_add(q, a[j], float2{dy[i], 0});
                Q[j] = {fmaf(x[i], a[j].x, Q[j].x), fmaf(x[i], a[j].y, Q[j].y)};
                R[j] = {fmaf(x[i], a_prime[j].x, R[j].x), fmaf(x[i], a_prime[j].y, R[j].y)};
                a_prime[j] = mul_add(q, a_prime[j], a[j]);
                dx += own[j].c.x * a[j].x + own[j].c.y * a[j].y;
            }
            dw = fmaf(x[i], dy[i], dw); dx = warp_sum<OSCILLATORS>(dx) + omega[place.d] * dy[i];
            if (place.active && place.k0 == 0) { dinp[place.at + (size_t)(t0 - i) * D] = from_float<X>(dx); }
        }
    }
    if (!place.active) { return; }
    if (place.k0 == 0) { domega[place.bd] = dw; }
    EACH(j, COUNT) {
        int k = j * OSCILLATORS + place.k0;
        float2 s = cema_start(start, place.bd, k, N, own[j].p), s_T = cema_start(end, place.bd, k, N, own[j].p);
        float2 border = mul_add(float2{s.x, -s.y}, a[j], float2{0, 0}); // ~s_0 a_1 - ~s_T a_{T+1}
        border = mul_add(float2{-s_T.x, s_T.y}, after[j], border);
        float2 Dg = mul_add(float2{own[j].q.x, -own[j].q.y}, border, Q[j]);
        sums[place.bd * OSCILLATORS * COUNT + k] = {Dg, Q[j], mul_add(float2{s.x, -s.y}, a_prime[j], R[j]), a[j]};
    }
}
template <typename X> static void cema_forward_any(Gpu& gpu, X* out, float* end, const float* start, const X* inp,
        Coefficients r, const float* omega, int B, int T, int D, int N) {
    LAUNCH((N <= OSCILLATORS ? cema_forward_any_kernel<X, 1> : cema_forward_any_kernel<X, MANY>), cema_grid(B, D),
           OSCILLATORS * FEATURES, out, end, start, inp, r.coef, omega, T, D, N);
}
template <typename X> static void cema_backward_any(Gpu& gpu, X* dinp, CemaSums* sums, float* domega, const X* dout,
        const float* start, const float* end, const float* a_end, const X* inp, Coefficients r, const float* omega,
        int B, int T, int D, int N) {
    LAUNCH((N <= OSCILLATORS ? cema_backward_any_kernel<X, 1> : cema_backward_any_kernel<X, MANY>), cema_grid(B, D),
           OSCILLATORS * FEATURES, dinp, sums, domega, dout, start, end, a_end, inp, r.coef, omega, T, D, N);
}

// With rescale_nffn, which no preset has, a row kernel. Forward, out (rows,D) = inp w + other. Backward, out = inp w,
// and dw receives the column sums of inp other.
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
    LAUNCH(FORM(rescale_kernel, wide(D)), r.grid, r.block, out, r.partials, inp, other, w, rows, D);
    if (dw) { reduce_columns(gpu, r.partials, r.blocks, {{dw}, 1, D}); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Several GPUs: one process for each, started by mpirun; NCCL does the exchanges, in streams of their own

#ifdef USE_NCCL
static void check_nccl(ncclResult_t e, const char* what, int line) {
    if (e != ncclSuccess) { die("NCCL: %s (%s, train_megalodon.cu:%d)", ncclGetErrorString(e), what, line); }
}
#define NCCL(call) check_nccl(call, #call, __LINE__)
#else
#define NCCL(call)
#endif

// NCCL's communicators and the exchange streams, after ranks_group and before a model is trained.
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
    ncclUniqueId id; double bytes[sizeof(id)];
    if (ranks.rank == 0) { NCCL(ncclGetUniqueId(&id)); }
    for (size_t i = 0; i < sizeof(id); i++) { bytes[i] = ranks.rank ? 0 : ((unsigned char*)&id)[i]; }
    all_sum(bytes, sizeof(id));
    for (size_t i = 0; i < sizeof(id); i++) { ((unsigned char*)&id)[i] = bytes[i]; }
    gpu->windows = new std::map<void*, ncclWindow_t>;
    // Exchanges run beside matrix products on copy engines; where these do not reach, on few multiprocessors.
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.CTAPolicy = NCCL_CTA_POLICY_ZERO; config.maxCTAs = 16;
    NCCL(ncclCommInitRankConfig(&gpu->world, ranks.count, id, ranks.rank, &config));
    config.maxCTAs = 2;
    NCCL(ncclCommSplit(gpu->world, ranks.group, ranks.slice, &gpu->group, &config));
    int low, high; CUDA(cudaDeviceGetStreamPriorityRange(&low, &high));
    CUDA(cudaStreamCreateWithPriority(&gpu->slice_stream, cudaStreamNonBlocking, high));
    CUDA(cudaStreamCreateWithPriority(&gpu->exchange_stream, cudaStreamNonBlocking, high));
    CUDA(cudaEventCreateWithFlags(&gpu->event, cudaEventDisableTiming));
#else
    die("%d processes, but built without NCCL (make says)", ranks.count);
#endif
}

// What follows in `stream` begins when `other` has come to where it is now.
static void stream_after(Gpu& gpu, cudaStream_t stream, cudaStream_t other) {
    CUDA(cudaEventRecord(gpu.event, other));
    CUDA(cudaStreamWaitEvent(stream, gpu.event, 0));
}

// Zeroed memory that all GPUs take and register together, so that copy engines can exchange what is in it, beside
// kernels. It is for states of slices, within the group, or for gradients or weights, between all.
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

// SHARDS (ZeRO-1). Each GPU updates its shard of each part, and only has the masters and moments of these. In the last
// micro-step's backward pass, gradients go out part by part, as they get ready; after the update the weights come back
// part by part, while the next parts are updated.

// What follows in gpu.stream may read what has come of a part.
template <typename X> static void part_wait(Gpu& gpu, const ModelOf<X>* m, int part) {
    if (m->came) { CUDA(cudaStreamWaitEvent(gpu.stream, m->came[part], 0)); }
}
// Begins to add up a part's gradients over all GPUs: each shard goes to its GPU, beside what follows in gpu.stream.
// (NCCL's own reduce-scatter would take multiprocessors from the matrix products.) Parts come from the last to the
// first. Each call ends the part of the call before; that for part 0 ends its own, too.
template <typename X> static void part_reduced(Gpu& gpu, const ModelOf<X>* m, int part);
template <typename X> static void part_reduce(Gpu& gpu, const ModelOf<X>* m, int part) {
    Shard s = model_shard(m, part);
    if (s.size) {
        stream_after(gpu, gpu.exchange_stream, gpu.stream);
        NCCL(ncclAlltoAll(m->grads + s.begin, m->received[part & 1], s.size, ncclFloat, gpu.world,
                          gpu.exchange_stream));
        CUDA(cudaEventRecord(m->came[part], gpu.exchange_stream));
    }
    if (part + 1 < m->parts) { part_reduced(gpu, m, part + 1); }
    if (part == 0) { part_reduced(gpu, m, 0); }
}
// Ends what part_reduce has begun for a part: this GPU's shard of it becomes the sum of all GPUs' gradients, added in
// their order; the sums of squares are left for model_grad_norm.
template <typename X> static void part_reduced(Gpu& gpu, const ModelOf<X>* m, int part) {
    Shard s = model_shard(m, part);
    if (!s.size) { return; }
    part_wait(gpu, m, part);
    LAUNCH(sum_kernel<float4>, SUM_BLOCKS, 256, m->sums + part * SUM_BLOCKS, (const float4*)m->received[part & 1],
           s.size / 4, (float4*)(m->grads + s.at), m->shards);
}
// All GPUs' shards of a part's weights, updated, to all; arena is params or weights.
template <typename X, typename Y> static void part_gather(Gpu& gpu, const ModelOf<X>* m, int part, Y* arena) {
    Shard s = model_shard(m, part);
    stream_after(gpu, gpu.exchange_stream, gpu.stream);
    NCCL(ncclAllGather(arena + s.at, arena + s.begin, s.size * sizeof(Y), ncclUint8, gpu.world, gpu.exchange_stream));
    CUDA(cudaEventRecord(m->came[part], gpu.exchange_stream));
}

// SLICES (--chunk-parallel): see the CPU's "Sequences that are spread over several processes". Here most
// exchanges are two calls, with work in between that does not need the result. PassOf.before becomes the
// states before this slice, layer by layer; PassOf.after receives those at its end.

// all = the `bytes` bytes of each GPU of the group, in their order.
static void slices_gather(Gpu& gpu, void* all, const void* mine, size_t bytes) {
    NCCL(ncclAllGather(mine, all, bytes, ncclUint8, gpu.group, gpu.stream));
}
// Runs what work() launches beside all that follows, until slices_wait.
template <typename F> static void slices_beside(Gpu& gpu, F work) {
    stream_after(gpu, gpu.slice_stream, gpu.stream);
    std::swap(gpu.stream, gpu.slice_stream); work(); std::swap(gpu.stream, gpu.slice_stream);
}
static void slices_wait(Gpu& gpu) { stream_after(gpu, gpu.stream, gpu.slice_stream); }

// before: what comes before the first slice, until the layers' exchanges add the slices before this one.
template <typename X> static void slices_start(Gpu& gpu, PassOf<X>* s, const StateOf<X>* start) {
    if (start) { CUDA(cudaMemcpyAsync(s->before.norm, start->norm, s->before.bytes, cudaMemcpyDefault, gpu.stream)); }
    else { CUDA(cudaMemsetAsync(s->before.norm, 0, s->before.bytes, gpu.stream)); }
}
template <typename X> static void slices_finish(Gpu& gpu, PassOf<X>* s, const StateOf<X>* end) {
    if (end) { CUDA(cudaMemcpyAsync(end->norm, s->after.norm, end->bytes, cudaMemcpyDefault, gpu.stream)); }
}
// The last slice's state to all: what the next step goes on from.
template <typename X> static void slices_share_last(Gpu& gpu, const StateOf<X>* s) {
    stream_after(gpu, gpu.slice_stream, gpu.stream);
    NCCL(ncclBroadcast(s->norm, s->norm, s->bytes, ncclUint8, ranks.slices - 1, gpu.group, gpu.slice_stream));
    slices_wait(gpu);
}

// The timestep norm. A slice tells the others the totals of its lines; each GPU appends those of the slices before it
// (in the backward pass those after it). A warp has one line, as in the scan, and leaves its total.
template <typename Stats> __global__ void slice_total_kernel(Stats* total, float4* segments, int length, size_t lines) {
    size_t line = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (line >= lines) { return; }
    NormLine<Stats> p(segments, line, length);
    Stats sum = p.none();
    p.walk([&](float4*, const Stats& own) { append(sum, own); }); p.scan(sum);
    if (threadIdx.x % 32 == 31) { total[line] = sum; }
}
// A thread has one line. all (slices,lines): the totals of all slices.
template <typename Stats> __global__ void slice_merge_kernel(Stats* state, const Stats* all, int slice, int slices,
        size_t lines) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= lines) { return; }
    bool descending = NormLine<Stats>::descending;
    Stats s = descending ? Stats{0, 0, ((const double*)&all[slice * lines + i])[2]} : state[i]; // about its center
    for (int r = descending ? slice + 1 : 0; r < (descending ? slices : slice); r++) { append(s, all[r * lines + i]); }
    state[i] = s;
}
template <typename Stats> static void slice_norm_tell(Gpu& gpu, Stats* all, int B, int T, int G) {
    size_t lines = (size_t)B * G;
    Stats* mine = all + lines * ranks.slices;
    LAUNCH(slice_total_kernel<Stats>, ceil_div(lines, 4), 128, mine, (float4*)gpu.scratch[SEGMENTS],
           (int)norm_segments(T), lines);
    slices_gather(gpu, all, mine, sizeof(Stats) * lines);
}
// Forward. There is nothing to do meanwhile, so this exchange runs as NCCL's kernel, which is faster here than copy
// engines. To get the kernel, the memory is not of the kind that copy engines take.
static void slice_norm_start(Gpu& gpu, NormState* before, int B, int T, int G) {
    size_t lines = (size_t)B * G;
    NormState* all = gpu_scratch<NormState>(gpu, SLICE_NORMS, lines * (ranks.slices + 1));
    slice_norm_tell(gpu, all, B, T, G);
    LAUNCH(slice_merge_kernel<NormState>, ceil_div(lines, 128), 128, before, all, ranks.slice, ranks.slices, lines);
}
// Backward
static void slice_norm_begin(Gpu& gpu, int B, int T, int G) {
    NormSums* all = gpu_scratch<NormSums>(gpu, SLICES, (size_t)B * G * (ranks.slices + 1));
    slices_beside(gpu, [&] { slice_norm_tell(gpu, all, B, T, G); });
}
static const NormSums* slice_norm_after(Gpu& gpu, int B, int G) {
    size_t lines = (size_t)B * G;
    NormSums *all = (NormSums*)gpu.scratch[SLICES], *after = all + lines * ranks.slices; // where its own total was
    slices_wait(gpu);
    LAUNCH(slice_merge_kernel<NormSums>, ceil_div(lines, 128), 128, after, all, ranks.slice, ranks.slices, lines);
    return after;
}

// CEMA. A slice tells the others what it makes of zero: h at its end or, descending, a at its first timestep; call this
// the near end. out (B,D,N). A CUDA block has SLICE_K oscillators of 32 features, and takes SLICE_WARPS stretches of
// SLICE_LENGTH timesteps at a time, the nearest first. A warp makes the states after one stretch, of a feature in each
// lane; then warp k < SLICE_K adds up the stretches for oscillator k. It stops where what comes fades to 2^-80 on the
// way to the near end: most oscillators forget in some hundred timesteps.
enum { SLICE_K = 8, SLICE_WARPS = 16, SLICE_LENGTH = 32 };
__device__ inline float square(float2 q) { return q.x * q.x + q.y * q.y; }
template <typename X> __global__ void __launch_bounds__(32 * SLICE_WARPS) cema_slice_kernel(float2* out, const X* inp,
        const CemaCoef* coef, bool descending, int T, int D, int N, int NK) {
    __shared__ float2 made[SLICE_WARPS][SLICE_K][32];
    int lane = threadIdx.x, warp = threadIdx.y, d = blockIdx.x * 32 + lane, k0 = blockIdx.z * SLICE_K;
    const X* x = inp + (size_t)blockIdx.y * T * D + d;
    coef += (size_t)min(d, D - 1) * NK + k0;
    float2 q[SLICE_K]; float longest = 0;
    EACH(k, SLICE_K) {
        q[k] = coef[k].q; longest = fmaxf(longest, square(q[k]));
        if (descending) { q[k].y = -q[k].y; }
    }
    longest = log2f(warp_max(longest)); // the same in all warps
    float2 own = warp < SLICE_K ? coef[warp].q : float2{0, 0};
    double2 jump = {own.x, descending ? -own.y : own.y}, power = {1, 0}, sum = {0, 0};
    for (int n = 1; n < SLICE_LENGTH; n *= 2) { jump = mul_add(jump, jump, double2{0, 0}); } // q^SLICE_LENGTH
    for (int near = 0; near < T && !(longest * near < -2 * 80); near += SLICE_WARPS * SLICE_LENGTH) {
        int far = near + (warp + 1) * SLICE_LENGTH - 1; float v[SLICE_LENGTH]; float2 s[SLICE_K] = {};
        EACH(i, SLICE_LENGTH) {
            int from = far - i; // timesteps from the near end
            v[i] = from < T && d < D ? to_float(x[(size_t)(descending ? from : T - 1 - from) * D]) : 0;
        }
        EACH(i, SLICE_LENGTH) { EACH(k, SLICE_K) { s[k] = mul_add(q[k], s[k], float2{v[i], 0}); } }
        EACH(k, SLICE_K) { made[warp][k][lane] = s[k]; }
        __syncthreads(); // the states of all stretches are there
        for (int w = 0; warp < SLICE_K && w < SLICE_WARPS; w++) {
            float2 one = made[w][warp][lane];
            sum = mul_add(power, double2{one.x, one.y}, sum); power = mul_add(power, jump, double2{0, 0});
        }
        __syncthreads(); // they have been read
    }
    if (warp >= SLICE_K || d >= D || k0 + warp >= N) { return; }
    float p = descending ? 1 : coef[warp].p;
    out[((size_t)blockIdx.y * D + d) * N + k0 + warp] = make_float2(p * sum.x, p * sum.y);
}
// state (B,D,N) = what `count` slices make of start (NULL: zero). Slice n turns s into q^T s + end, where end, what it
// makes of zero, lies at ends + n * step. A thread has one oscillator.
__global__ void cema_slice_carry_kernel(float2* state, const float2* start, const float2* ends, const CemaCoef* coef,
        bool descending, int count, int64_t step, int T, size_t size, int D, int N, int NK) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) { return; }
    float2 rounded = coef[i / N % D * NK + i % N].q, s0 = start ? start[i] : float2{0, 0};
    double2 q = {rounded.x, descending ? -rounded.y : rounded.y}, power = {1, 0}, s = {s0.x, s0.y};
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
// Begins the exchange, beside the products that follow in gpu.stream.
template <typename X> static void slice_cema_begin(Gpu& gpu, const X* inp, bool descending, const CemaParams& w, int B,
        int T, int D, int N) {
    size_t size = (size_t)B * D * N;
    float2 *all = gpu_scratch<float2>(gpu, SLICES, size * (ranks.slices + 2)), *mine = all + size * ranks.slices;
    slices_beside(gpu, [&] {
        Coefficients r = cema_coefficients(gpu, w, D, N, false);
        LAUNCH(cema_slice_kernel<X>, dim3(ceil_div(D, 32), B, ceil_div(N, SLICE_K)), dim3(32, SLICE_WARPS), mine,
               inp, r.coef, descending, T, D, N, r.NK);
        slices_gather(gpu, all, mine, sizeof(float2) * size);
    });
}
static void slice_cema_merge(Gpu& gpu, float2* state, const float2* start, bool descending, int B, int T, int D,
        int N) {
    size_t size = (size_t)B * D * N;
    const float2* all = (const float2*)gpu.scratch[SLICES];
    int first = descending ? ranks.slices - 1 : 0, count = descending ? first - ranks.slice : ranks.slice;
    slices_wait(gpu);
    LAUNCH(cema_slice_carry_kernel, ceil_div(size, 128), 128, state, start, all + first * size,
           (const CemaCoef*)gpu.scratch[COEFFICIENTS], descending, count, (descending ? -1 : 1) * (int64_t)size, T,
           size, D, N, cema_width(N));
}
// h (B,D,N,2), the state before the first slice, becomes that before this one.
static void slice_cema_start(Gpu& gpu, float* h, int B, int T, int D, int N) {
    slice_cema_merge(gpu, (float2*)h, (const float2*)h, false, B, T, D, N);
}
// a (B,D,N,2) at the first timestep after this slice, in scratch memory.
static const float* slice_cema_a_end(Gpu& gpu, int B, int T, int D, int N) {
    float2* a_end = (float2*)gpu.scratch[SLICES] + (size_t)B * D * N * (ranks.slices + 1);
    slice_cema_merge(gpu, a_end, NULL, true, B, T, D, N);
    return (const float*)a_end;
}

// ---------------------------------------------------------------------------------------------------------------------
// Generation: one timestep of each stream. What limits it is reading the weights and the cache, once, and next to that
// the gaps between launches. So there are few launches, and each starts before the last one has ended, with that work
// which does not depend on it. Positions are read from the device: so all tokens are the same launches, one graph.

// Lets the next launch start.
__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until all earlier launches have ended and what they wrote can be read.
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
    __syncwarp(); // without bulk copies: all lanes have copied
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
// as from's norm by w (and b, see norm_forward), or without w, as silu(from) * mul. What is not given is NULL.
template <typename X> struct Product {
    X *out, *inp; int ldi, I, O;
    const X *weight, *bias, *add, *from, *mul;
    const float *w, *b; float *mean, *rstd;
};
// One row of a product, or of two that do not depend on each other: CUDA blocks from number `blocks` on have the
// second. Every CUDA block makes the whole input for itself, into shared memory; the first one also writes it out. A
// warp makes outputs that lie `step` apart, one at a time. The rows of weights that these take come through SLOTS slots
// of SLOT_BYTES in shared memory, piece after piece:
//
//     time        before inputs are there     while they are made    then, in turn
//     slot 0      fetch piece 0                                      use 0, fetch 3      ...
//     slot 1      fetch piece 1                                      use 1, fetch 4      ...
//     slot 2                                  fetch piece 2          use 2, fetch 5      ...
//
// EARLY pieces are fetched before inputs are there: more would hold these up.
template <typename X> struct Products { Product<X> of[2]; int blocks; float eps; };
enum { PRODUCT_WARPS = 12, PRODUCT_THREADS = 32 * PRODUCT_WARPS, // of a CUDA block
       PRODUCT_BLOCKS = 2,                                       // CUDA blocks of a multiprocessor
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
    __syncwarp(); // the warp's mbarriers are ready
    EACH(k, EARLY) { fetch(k); }
    if (o < O && p.bias) { prefetch(p.bias + o, 1, lane, 32); }
    Piece<float, E> w, shift; Piece<X, E> given, mul;
    auto fetch_norm = [&](int i) {
        if (p.w && i < I) { w.load(p.w + i); }
        if (p.b && i < I) { shift.load(p.b + i); }
    };
    shift.clear(); fetch_norm(first);
    start_next(); wait_for_inputs();
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
    __syncthreads(); // the whole input is in x
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

// Timestep norm and, with h, CEMA, of one timestep: inp (B,D) to normed and out; norm (B,G) and h (B,D,N) move on. A
// CUDA block has a group of features and walks through streams; a team has a feature's oscillators. norm and h may be
// read before the wait: this kernel wrote them for the token before, and that launch has ended:
// values_step lets its successor start only after its own wait, and embedding_forward is an ordinary launch, which
// waits for all before it.
template <typename X> __global__ void __launch_bounds__(512) memory_step_kernel(X* normed, X* out, NormState* norm,
        float2* h, const X* inp, const float* w, const float* b, const CemaCoef* coef, const float* omega, int B, int D,
        int G, int N, float eps) {
    enum { COUNT = CEMA_MAX_NDIM / 32 };
    int width = D / G, g = blockIdx.x, lane = threadIdx.x % 32, team = N <= 16 ? 16 : 32, k0 = threadIdx.x % team;
    NormState old; float2 v[COUNT];
    auto statistics = [&](int row) { // up to this timestep; each warp for itself
        const X* x = inp + (size_t)row * D + g * width; float mean = 0, var = 0;
        NormState s = old;
        for (int f = lane; f < width; f += 32) { mean += to_float(x[f]); }
        mean = warp_sum(mean) / width;
        for (int f = lane; f < width; f += 32) { var += (to_float(x[f]) - mean) * (to_float(x[f]) - mean); }
        merge(s.count, s.mean, s.var, 1.0, (double)mean, (double)(warp_sum(var) / width));
        return s;
    };
    for (int f0 = 0; f0 < width; f0 += 512 / team) {
        int f = f0 + threadIdx.x / team, d = g * width + min(f, width - 1);
        float scale = w[d] + 1, shift = b[d], direct = h ? omega[d] : 0;
        CemaCoef own[COUNT];
        EACH(j, COUNT) {
            int k = k0 + j * team;
            if (!h || k >= N) { continue; }
            own[j] = coef[d * cema_width(N) + k];
        }
        auto fetch = [&](int row) { // past the L1 cache, which only the wait clears
            const NormState* s = norm + row * G + g; const float2* from = h + ((size_t)row * D + d) * N + k0;
            old = {__ldcg(&s->count), __ldcg(&s->mean), __ldcg(&s->var)};
            EACH(j, COUNT) { if (h && k0 + j * team < N) { v[j] = __ldcg(from + j * team); } }
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
            EACH(j, COUNT) {
                int k = k0 + j * team;
                if (!h || k >= N || f >= width) { continue; }
                v[j] = mul_add(own[j].q, v[j], float2{own[j].p * x, 0});
                h[at * N + k] = v[j]; y += __fdividef(own[j].c.x * v[j].x - own[j].c.y * v[j].y, own[j].p);
            }
            y = warp_sum_of(y, team);
            if (k0 == 0 && f < width) {
                normed[at] = stored;
                if (h) { out[at] = from_float<X>(y + direct * x); }
            }
            if (f0 + 512 / team < width) { continue; }
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

// Attention of one query a head to the keys 0..*position of its chunk, in two steps. First all scores (B,H,c): a warp
// has keys that lie `step` apart, two at a time. The caches keys (B,H,c,zd) and values (B,H,c,vd) get the new key and
// value, made from z and v as by qk_forward and value_forward, by the CUDA block that owns this timestep.
template <typename X, bool WIDE> __global__ void __launch_bounds__(1024) scores_step_kernel(float* scores, X* keys,
        X* values, const int* position, const X* z, int ldz, const X* v, const float* gamma, const float* beta,
        const float* rotations, int c, int Z, int zd, int vd, float eps) {
    enum { E = WIDE ? 8 : 1, KEYS = 2 };
    extern __shared__ uint4 memory[]; float* q = (float*)memory;
    int pos = *position, h = blockIdx.y, H = gridDim.y, lane = threadIdx.x % 32, warps = blockDim.x / 32, turn = 0;
    int first = blockIdx.x * warps + threadIdx.x / 32, step = gridDim.x * warps;
    size_t pair = (size_t)blockIdx.z * H + h;
    float x[8], y[8], ga[2][8], be[2][8], angle[8], s[1] = {0};
    RowPiece<X, WIDE> value;
    bool owner = pos / warps % gridDim.x == blockIdx.x; // of this timestep
    scores += pair * c; keys += pair * c * zd; values += pair * c * vd;
    for (int j = first; j < pos && j < first + KEYS * step; j += step) {
        prefetch(keys + (size_t)j * zd, zd, lane, 32);
    }
    load_row<WIDE>(angle, rotations + (size_t)pos * zd, zd);
    EACH(i, 2) { load_row<WIDE>(ga[i], gamma + i * Z + h * zd, zd); load_row<WIDE>(be[i], beta + i * Z + h * zd, zd); }
    start_next(); wait_for_inputs();
    load_row<WIDE>(x, z + (size_t)blockIdx.z * ldz + h * zd, zd);
    if (owner) { value.load(v + pair * vd, vd); }
    EACH(e, 8) { s[0] += x[e] * x[e]; }
    row_sum(s, turn);
    EACH(e, 8) { x[e] *= rsqrtf(s[0] / zd + eps); }
    EACH(i, 2) {
        turned(y, x, ga[i], be[i], angle, rsqrtf(zd));
        if (i == 0) { store_row<WIDE>(q, y, zd); } else if (owner) { store_row<WIDE>(keys + (size_t)pos * zd, y, zd); }
    }
    if (owner) {
        value.get(y);
        EACH(e, 8) { y[e] *= sigmoid_of<X>(y[e]); }
        store_row<WIDE>(values + (size_t)pos * vd, y, vd);
    }
    __syncthreads(); // q is there, and the new key
    for (int j = first; j <= pos; j += KEYS * step) {
        float dot[KEYS] = {0}, k[E];
        for (int i = lane * E; i < zd; i += 32 * E) {
            Piece<X, E> piece[KEYS];
            EACH(u, KEYS) { piece[u].load(keys + (size_t)(j + u * step <= pos ? j + u * step : j) * zd + i); }
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
// Then gated (B,V) = silu(inp) * values weighted with the softmax of the scores. A CUDA block has team * E columns of
// the output. Each of its teams has all of them, E in each lane, and the keys number, number + teams, and so on. The
// first FLIGHT values of a team are read before the wait, except this token's, which the launch before this one writes.
template <typename X, bool WIDE> __global__ void __launch_bounds__(1024) values_step_kernel(X* gated, int ldg,
        const float* scores, const X* values, const int* position, const X* inp, int ldi, int team, int c, int vd) {
    enum { E = WIDE ? 8 : 1, FLIGHT = 16 / sizeof(X), KEYS = 4096 };
    __shared__ float outs[256][E], exps[KEYS], by_warp[32];
    int t = threadIdx.x, lane = t % 32, warps = blockDim.x / 32, teams = blockDim.x / team, number = t / team;
    int pos = *position, first = blockIdx.x * team * E, at = first + t % team * E, end = at < vd ? pos : -1;
    size_t pair = (size_t)blockIdx.z * gridDim.y + blockIdx.y;
    scores += pair * c; values += pair * c * vd + at; inp += (size_t)blockIdx.z * ldi + blockIdx.y * vd + first;
    Piece<X, E> piece[FLIGHT];
    EACH(u, FLIGHT) { // those of earlier tokens may be read early
        piece[u].clear();
        if (number + u * teams < end) { piece[u].load(values + (size_t)(number + u * teams) * vd); }
    }
    wait_for_inputs();
    float top = -INFINITY, sum = 0, acc[E] = {0}, v[E];
    X gate = t < team * E && first + t < vd ? inp[t] : from_float<X>(0);
    for (int k = t; k <= pos; k += blockDim.x) { top = fmaxf(top, scores[k]); }
    top = warp_max(top);
    if (lane == 0) { by_warp[t / 32] = top; }
    __syncthreads(); // the maxima of all warps are there
    top = warp_max(lane < warps ? by_warp[lane] : -INFINITY);
    start_next(); // not before: the next product's weights would be read before these scores
    for (int from = 0; from <= pos; from += KEYS) {
        __syncthreads(); // all have read by_warp, or the exps before
        for (int k = from + t; k <= pos && k < from + KEYS; k += blockDim.x) {
            sum += exps[k - from] = exp_of<X>(scores[k] - top);
        }
        __syncthreads(); // the exps are there
        for (int k0 = from + number; k0 <= pos && k0 < from + KEYS; k0 += FLIGHT * teams) {
            EACH(u, FLIGHT) {
                int k = k0 + u * teams;
                if (k <= end && (k0 > number || k == pos)) { piece[u].load(values + (size_t)k * vd); }
            }
            EACH(u, FLIGHT) {
                float p = k0 + u * teams <= pos ? exps[k0 + u * teams - from] : 0;
                piece[u].get(v);
                EACH(e, E) { acc[e] = fmaf(p, v[e], acc[e]); }
            }
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) { by_warp[t / 32] = sum; }
    for (int o = team; o < 32; o *= 2) { EACH(e, E) { acc[e] += __shfl_xor_sync(~0u, acc[e], o); } }
    if (lane < team) { EACH(e, E) { outs[t / 32 * team + lane][e] = acc[e]; } }
    __syncthreads(); // the sums of all warps are there
    sum = warp_sum(lane < warps ? by_warp[lane] : 0);
    if (t >= team * E || first + t >= vd) { return; }
    float out = 0, x = to_float(gate);
#pragma unroll 8
    for (int k = t / E; k < warps * team; k += team) { out += outs[k][t % E]; }
    gated[(size_t)blockIdx.z * ldg + blockIdx.y * vd + first + t] = from_float<X>(x * sigmoid_of<X>(x) * out / sum);
}
template <typename X> static void attention_step(Gpu& gpu, X* gated, int ldg, float* scores, X* keys, X* values,
        const int* position, const X* z, const X* inp, int ldz, const X* v, const float* gamma, const float* beta,
        const float* rotations, int B, int c, int Z, int V, int H, float eps) {
    int zd = Z / H, vd = V / H, most = zd > vd ? zd : vd;
    // Of one row, some 64 large blocks that read 64 or 128 bytes of a value: fewer are slower, narrower ones too.
    int team = B == 1 && V < 4096 ? 4 : B == 1 ? 8 : 16, threads = B == 1 ? 1024 : 256;
    int count = gpu.card.multiProcessorCount * (B > 1 ? 4 : 2) / (B * H); bool is_wide = wide(zd, vd, ldz, ldg);
    launch_early(gpu, is_wide ? scores_step_kernel<X, true> : scores_step_kernel<X, false>,
                 dim3(count > 1 ? count : 1, H, B), row_grid(gpu, 1, most, 1, 1).block.x, sizeof(float) * zd, scores,
                 keys, values, position, z, ldz, v, gamma, beta, rotations, c, Z, zd, vd, eps);
    launch_early(gpu, is_wide ? values_step_kernel<X, true> : values_step_kernel<X, false>,
                 dim3(ceil_div(vd, team * (is_wide ? 8 : 1)), H, B), threads, 0, gated, ldg, scores, values, position,
                 inp, ldz, team, c, vd);
}

// One layer for one token more of each stream; state moves on.
template <typename X> static void block_step(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* state) {
    OF_LAYER(m, s, l); bool rescale = config->rescale_nffn;
    StateOf<X> past = state_layer(state, config, l);
    memory_step(gpu, a.timenorm, a.cema, past.norm, past.h, x, w.timenorm_w, w.timenorm_b, past.coef, w.cema_omega, B,
                D, G, N, eps);
    product_forward<X>(gpu, B, eps, {.out = a.wz, .inp = a.rmsnorm, .ldi = pitch_m, .I = D, .O = pitch_z,
                                     .weight = w.wz, .bias = w.wz_b, .from = a.cema, .w = w.rmsnorm_w,
                                     .rstd = a.rmsnorm_rstd},
                       {.out = a.wv, .inp = a.timenorm, .ldi = D, .I = D, .O = V, .weight = w.wv, .bias = w.wv_b});
    attention_step(gpu, a.gated, pitch_m, past.scores, past.k, past.v, s->tokens + B, a.wz, a.wr, pitch_z, a.wv,
                   w.gamma, w.beta, m->rotations, B, c, Z, V, H, eps);
    product_forward<X>(gpu, B, eps, {.out = a.mega, .inp = a.rmsnorm, .ldi = pitch_m, .I = pitch_m, .O = D,
                                     .weight = w.wh1, .bias = w.wh1_b, .add = x});
    product_forward<X>(gpu, B, eps, {.out = a.fc1, .inp = a.norm, .ldi = D, .I = D, .O = pitch_f, .weight = w.fc1,
                                     .from = a.mega, .w = w.norm_w, .b = w.norm_b, .mean = a.norm_mean,
                                     .rstd = a.norm_rstd});
    product_forward<X>(gpu, B, eps, {.out = rescale ? a.fc2 : a.out, .inp = a.hidden, .ldi = F, .I = F, .O = D,
                                     .weight = w.fc2, .add = rescale ? NULL : x, .from = a.fc1, .mul = a.fc3});
    if (rescale) { ffn_rescale(gpu, a.out, NULL, a.fc2, x, w.rescale, B, D); }
}

// model_forward for one token of each stream; tokens NULL means those that model_draw has left on the device. The very
// first step makes plans and takes memory. The second one is captured as a graph, which all later ones launch, even
// after a reset.
template <typename X> static void model_step(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens,
        StateOf<X>* state) {
    OF_LAYER(m, s, 0);
    if (tokens) {
        CUDA(cudaEventSynchronize(s->copied));
        memcpy(s->host, tokens, B * sizeof(int));
        s->host[B] = state->pos;
        pass_upload(gpu, s, s->tokens, B + 1);
    }
    for (int part = 0; part < m->parts; part++) { part_wait(gpu, m, part); }
    auto work = [&] {
        embedding_forward(gpu, a.embed, s->tokens, w.embed, embedding_scale(config), rows, D, sites.embed);
        for (int l = 0; l < L; l++) { block_step(gpu, m, s, l, state); }
        memory_step(gpu, a.final, (X*)NULL, state_layer(state, config, L).norm, NULL,
                    block_input<X>(s->places, s->acts, L), w.final_w, w.final_b, NULL, NULL, B, D, G, 1, eps);
        product_forward<X>(gpu, B, 0, {.out = a.logits, .inp = a.final, .ldi = D, .I = D, .O = vocab,
                                       .weight = config->share_emb ? w.embed : w.output});
    };
    for (int l = 0; !state->steps && l < L; l++) {
        ParamsOf<X> of_layer = params_layer(m, l);
        int NK = cema_width(N);
        LAUNCH(cema_coefficients_kernel, ceil_div(D * NK, 128), 128, state_layer(state, config, l).coef, NULL,
               cema_params(&of_layer), D, N, NK);
    }
    if (state->steps++ && !state->graph) {
        cudaGraph_t graph;
        CUDA(cudaStreamBeginCapture(gpu.stream, cudaStreamCaptureModeThreadLocal));
        work();
        CUDA(cudaStreamEndCapture(gpu.stream, &graph));
        CUDA(cudaGraphInstantiate(&state->graph, graph, 0));
        CUDA(cudaGraphDestroy(graph));
    }
    if (state->graph) { CUDA(cudaGraphLaunch(state->graph, gpu.stream)); } else { work(); }
    state->pos = (state->pos + 1) % c;
}

// Draws the next token of each stream from the last logits (B,vocab), as the CPU's sample does: to drawn (B) and, with
// their position, to tokens (B+1) for the next model_step. A CUDA block draws one token; each of its 32 warps has a
// range of the vocabulary, and reads it from the cache as often as it takes.
template <typename X> __global__ void __launch_bounds__(1024) sample_kernel(int* tokens, int* drawn, const X* logits,
        int vocab, int pos, double temperature, int top_k, float top_p, uint64_t seed, uint64_t key, int index) {
    enum { TRIED = 7 }; // candidates for 3 bits of the threshold
    __shared__ float by_warp[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = (vocab + 1023) / 1024 * 32, turn = 0;
    int begin = warp * size, end = min(begin + size, vocab), at = 0, last = 0;
    logits += (size_t)blockIdx.x * vocab;
    float top = -INFINITY, least = 0, own = 0, before = 0, sum = 0, scale = fmin(1 / temperature, 1e30);
    auto each = [&](auto f) { // of this lane's logits
        for (int v = begin + lane; v < end; v += 8 * 32) { EACH(i, 8) { f(v + 32 * i); } }
    };
    each([&](int v) { top = fmaxf(top, v < end ? to_float(logits[v]) : -INFINITY); });
    top = warp_max(top);
    if (lane == 0) { by_warp[warp] = top; }
    __syncthreads(); // the maxima of all warps are there
    top = warp_max(by_warp[lane]);
    auto p = [&](int v) {
        float x = v < end ? exp_of<X>((to_float(logits[v]) - top) * scale) : 0;
        return x >= least ? x : 0;
    };
    // The threshold, the least p to keep: first by top_k, then by top_p. Positive floats are ordered as their bits are.
    // For 3 bits at a time, count what each of 7 candidates would keep, and take the largest that still keeps enough.
    for (int cut = 0; cut < 2; cut++) {
        if (cut ? top_p >= 1 : !top_k) { continue; }
        float all[1] = {0}; uint32_t bits = 0;
        each([&](int v) { all[0] += p(v); }); row_sum(all, turn);
        for (int shift = 27; shift >= 0; shift -= 3) { // p <= 1, so its bits are below 2^30
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
    each([&](int v) { own += p(v); }); own = warp_sum(own);
    __syncthreads(); // all have read the maxima
    if (lane == 0) { by_warp[warp] = own; }
    __syncthreads(); // the sums of all warps are there
    float u = temperature > 0 ? random_uniform(seed, key + ((uint64_t)blockIdx.x << 32), index) : 0; // or the first
    u *= warp_sum(by_warp[lane]);
    for (int w = 0; w < 32; w++) { // the last range that begins at u or before
        if (by_warp[w] > 0 && sum <= u) { at = w; before = sum; }
        sum += by_warp[w];
    }
    if (warp != at) { return; }
    for (int v = begin + lane; v - lane < end; v += 32) {
        float x = p(v), upto = x;
        for (int o = 1; o < 32; o *= 2) {
            float y = __shfl_up_sync(~0u, upto, o); upto += lane >= o ? y : 0;
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

// The Backend's functions to evaluate and to generate.
template <typename X> static void backend_stream(void* self, const int* tokens, int T, const int* targets,
        float* losses) {
    GpuBackend<X>* r = of<X>(self);
    r->streamed.T = T;
    model_forward(r->gpu, &r->m, &r->streamed, tokens, &r->state, &r->state);
    if (!targets) { return; }
    model_losses(r->gpu, &r->m, &r->streamed, targets, 0, r->m.sums); // their sum is not wanted
    const float* from = acts_layer<X>(r->streamed.places, r->streamed.acts, 0).losses;
    CUDA(cudaMemcpy(losses, from, T * sizeof(float), cudaMemcpyDeviceToHost));
}

template <typename X> static void backend_draw(void* self, const Options* o, uint64_t key, int index) {
    GpuBackend<X>* r = of<X>(self);
    model_draw(r->gpu, &r->streamed, o, r->drawn, r->state.pos, key, index);
    CUDA(cudaEventRecord(r->draw_done, r->gpu.stream));
}
template <typename X> static const int* backend_drawn(void* self) {
    CUDA(cudaEventSynchronize(of<X>(self)->draw_done));
    return of<X>(self)->drawn;
}
template <typename X> static void backend_reset(void* self) { state_reset(of<X>(self)->gpu, &of<X>(self)->state); }

// ---------------------------------------------------------------------------------------------------------------------
// The program

// Dense peak in bf16 of the cards whose data sheets we know; 0 for the others.
static double peak_flops(const cudaDeviceProp* card) {
    static const struct { const char* name; double peak; } cards[] = {{"A100", 312e12}, {"H100 PCIe", 756e12},
            {"H100 NVL", 835e12}, {"H100", 989e12}, {"H200 NVL", 835e12}, {"H200", 989e12}, {"GH200", 989e12},
            {"L40S", 362e12}, {"RTX 4090", 165e12}, {"RTX 3090", 71e12}};
    for (auto& c : cards) { if (strstr(card->name, c.name)) { return c.peak; } }
    return 0;
}

#ifdef GPU_MAIN
template <typename X> static void backend_run(Options* o, SafeTensors* st) {
    GpuBackend<X>* r = (GpuBackend<X>*)xcalloc(1, sizeof(GpuBackend<X>));
    device_open(&r->gpu);
    bool fast = sizeof(X) == 2;
    char name[sizeof(r->gpu.card.name) + 8];
    snprintf(name, sizeof(name), "%s, %s", r->gpu.card.name, fast ? "bf16" : "fp32");
    Backend b = {r, name, fast ? peak_flops(&r->gpu.card) : 0, o->model.chunk_size, backend_memory_needed<X>,
                 backend_open<X>, backend_close<X>, backend_copy<X>, backend_micro_step<X>, backend_finish_step<X>,
                 backend_update<X>, backend_stream<X>, backend_draw<X>, backend_drawn<X>, backend_reset<X>};
    run(&b, o, st); free(r);
}

int main(int argc, char** argv) {
    Options o; SafeTensors st;
    program_start(argv);
    ranks_open();
    options_parse(&o, argc, argv, &st);
    bool fp32 = !strcmp(o.precision, "fp32");
    if (!fp32 && strcmp(o.precision, "bf16")) { die("--precision %s: expected bf16 or fp32", o.precision); }
    if (fp32) { backend_run<float>(&o, &st); } else { backend_run<bf16>(&o, &st); }
    return 0;
}
#endif
