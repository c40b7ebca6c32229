/*
Megalodon (arXiv 2404.08801) in plain C: the reference implementation, fp32, on the CPU.

Megalodon is a language model with unlimited context in linear time. A transformer block mixes positions by attention
alone, over everything seen so far. A Megalodon block mixes them by three things, cheap and exact in any length:

    timestep norm    each group of features normalized by its mean and variance over all timesteps so far
                     (carries 3 numbers per group to the next chunk)
    CEMA             a moving average with complex decay, 16 damped oscillators per feature
                     (carries 16 complex numbers per feature)
    chunk attention  softmax attention inside chunks of fixed size (carries nothing)

What happened in earlier chunks reaches the present only through the first two. From top to bottom:

    options and tables    every flag, parameter and activation is declared once, in a table; all else derives from them
    layers                each forward followed by its backward, with its equation and its shapes
    model                 one block as in Figure 3 of the paper, the forward and backward pass, AdamW
    files                 data/safetensors.h: weights and checkpoints; data/tokens.h: text, tokens, documents
    use                   streaming evaluation and generation, the training loop, the command line

Conventions. Arrays are row-major, (B,T,D) means batch, time, features. Weights are (out, in): y = x W^T + b. The names
of gradients are those of the values with a d in front. d<weight> is always added to, so that micro-steps accumulate;
d<activation> is assigned, except where the comment of the function says that it is added to. No sum depends on the
number of threads: reductions over rows are split by columns, so every run of one binary gives the same bits.
Equation numbers are the paper's. Where the released code (XuezheMax/megalodon) differs from the paper, this file does
what the code does, because that is what checkpoints mean, and says so.
*/
#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#define OMP(...) _Pragma(#__VA_ARGS__)
#else
#define OMP(...)
#endif
#ifdef USE_MPI
#include <mpi.h>
#define MPI(...) __VA_ARGS__
#else
#define MPI(...)
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Errors and memory

// The processes of a job, see "Ranks". The `chunks` ranks of a group hold consecutive slices of the same sequences,
// other groups hold other sequences: rank = group * chunks + chunk.
static struct { int rank, count, chunk, chunks, group, groups; } ranks = {0, 1, 0, 1, 0, 1};

// Every error ends here: one line that names the file, flag or tensor and says what was expected; exit status 1. What
// all ranks find wrong, rank 0 says alone: it ends the job before the others speak.
__attribute__((noreturn, format(printf, 1, 2))) void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fflush(NULL);
    if (ranks.rank) { signal(SIGTERM, SIG_DFL); sleep(3); }
    fputs("error: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    MPI(if (ranks.count > 1) { MPI_Abort(MPI_COMM_WORLD, 1); }) // no rank may go on, or wait, when one has failed
    _exit(1); // not exit: other threads may be at work, and what is still held is not a leak
}

// Zeroed memory for n elements of `size` bytes, aligned to cache lines.
void* xcalloc(size_t n, size_t size) {
    enum { HUGE_PAGE = 1 << 21 };
    void* p = NULL;
    bool fits = !size || n <= SIZE_MAX / 2 / size;
    if (!fits || posix_memalign(&p, n * size < HUGE_PAGE ? 64 : HUGE_PAGE, n * size + 1)) {
        die("out of memory: %.1f MB asked for", 1e-6 * n * size);
    }
#ifdef MADV_HUGEPAGE
    if (n * size >= HUGE_PAGE) { madvise(p, n * size, MADV_HUGEPAGE); } // fewer page faults and address translations
#endif
    return memset(p, 0, n * size);
}

// printf into one of 32 buffers, taken in turn: what it returns stands until 32 calls later.
__attribute__((format(printf, 1, 2))) char* text_of(const char* format, ...) {
    static char buffers[32][PATH_MAX + 64];
    static unsigned turn;
    va_list args;
    va_start(args, format);
    char* text = buffers[turn++ % 32];
    vsnprintf(text, sizeof(buffers[0]), format, args);
    va_end(args);
    return text;
}

size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
int min_int(int a, int b) { return a < b ? a : b; }

// ---------------------------------------------------------------------------------------------------------------------
// Ranks: the processes that mpirun or srun started; one, without them. What is MPI stands here, and in die.

MPI(static MPI_Comm rank_group;) // the ranks with slices of the same sequences
MPI(void ranks_close(void) { MPI_Finalize(); })

// Starts MPI, if there are several processes. What ranks other than 0 print is not seen.
void ranks_open(void) {
    static const char* counts[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    int started = 1;
    for (int i = 0; i < 3; i++) { started = getenv(counts[i]) ? atoi(getenv(counts[i])) : started; }
    if (started <= 1) { return; }
    MPI(int level;
        MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks.count);
        MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
        atexit(ranks_close);)
    if (ranks.count != started) {
        die("%d processes were started, this one knows of %d: built without MPI (make says), or for another mpirun; "
            "srun: --mpi=pmix", started, ranks.count);
    }
    if (ranks.rank && !freopen("/dev/null", "w", stdout)) { die("/dev/null: %s", strerror(errno)); }
}

// Puts the ranks into groups of `chunks`.
void ranks_group(int chunks) {
    if (ranks.count % chunks) {
        die("--chunk-parallel %d: expected a number that divides that of the processes, %d", chunks, ranks.count);
    }
    ranks.chunks = chunks; ranks.chunk = ranks.rank % chunks;
    ranks.groups = ranks.count / chunks; ranks.group = ranks.rank / chunks;
    MPI(if (ranks.count > 1) { MPI_Comm_split(MPI_COMM_WORLD, ranks.group, ranks.rank, &rank_group); })
}

int ranks_local(void) { // this rank's number on its machine
    int local = 0;
    if (ranks.count == 1) { return local; }
    MPI(MPI_Comm machine;
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
        MPI_Comm_rank(machine, &local);)
    return local;
}

// T timesteps of a sequence in slices of whole chunks
int slice_length(int T, int c) {
    if (ranks.chunks > 1 && (T % ranks.chunks || T / ranks.chunks % c)) {
        die("sequences of %d tokens over --chunk-parallel %d: %.9g each, expected a multiple of chunk_size %d", T,
            ranks.chunks, (double)T / ranks.chunks, c);
    }
    return T / ranks.chunks;
}

// all = the `bytes` bytes of each rank of the group, in their order
void all_gather(void* all, const void* mine, size_t bytes) {
    if (ranks.chunks == 1) { memcpy(all, mine, bytes); return; }
    MPI(MPI_Allgather(mine, bytes, MPI_BYTE, all, bytes, MPI_BYTE, rank_group);)
}

// x = the last rank's of the group: what a state is after the last slice is what the next step goes on from
void share_last(void* x, size_t bytes) {
    MPI(if (ranks.chunks > 1) { MPI_Bcast(x, bytes, MPI_BYTE, ranks.chunks - 1, rank_group); })
    (void)x; (void)bytes;
}

// x (n) = its sum over all ranks. Every rank returns when all are here.
void all_sum(double* x, int n) {
    MPI(if (ranks.count > 1) { MPI_Allreduce(MPI_IN_PLACE, x, n, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD); })
    (void)x; (void)n;
}

// Rank r's shard of n numbers is [shard_start(n, r), shard_start(n, r + 1)). Of a block of them, every rank receives
// either all shards from their owners, or the sums over the ranks in its own shard (the rest is then scratch).
size_t shard_start(size_t n, int rank) { return n * rank / ranks.count; }
enum { GATHER_SHARDS, SUM_SHARD };
void shards_exchange(float* x, size_t n, int what) {
    for (int r = 0; r < (ranks.count > 1 ? ranks.count : 0); r++) {
        size_t end = shard_start(n, r + 1);
        for (size_t at = shard_start(n, r), size; at < end; at += size) {
            size = min_size(end - at, 1 << 28); // MPI counts in ints
            MPI(if (what == GATHER_SHARDS) { MPI_Bcast(x + at, size, MPI_FLOAT, r, MPI_COMM_WORLD); }
                void* mine = r == ranks.rank ? MPI_IN_PLACE : x + at;
                if (what == SUM_SHARD) { MPI_Reduce(mine, x + at, size, MPI_FLOAT, MPI_SUM, r, MPI_COMM_WORLD); })
        }
    }
    (void)x; (void)what;
}

// ---------------------------------------------------------------------------------------------------------------------
// Options: one table. The struct, the parser, --help, the printed configuration and what a checkpoint records all come
// from it. A row is: kind, name (with dashes on the command line), default, smallest and largest value, help.

// The model. The defaults are the preset `tiny`. Symbols in brackets are those of the comments below and of the paper.
#define MODEL_OPTIONS(X) \
    X(INT,  num_layers,         4, 1, 10000,      "blocks [L]") \
    X(INT,  model_dim,        128, 2, 1 << 20,    "features of the residual stream [D]") \
    X(INT,  num_heads,          1, 1, 1 << 16,    "attention heads [H]") \
    X(INT,  z_dim,             64, 2, 1 << 20,    "what queries and keys are made of, all heads [Z]") \
    X(INT,  value_dim,        192, 1, 1 << 20,    "attention values, all heads [V]") \
    X(INT,  ffn_hidden_dim,   216, 1, 1 << 20,    "hidden features of the feed-forward layer [F]") \
    X(INT,  chunk_size,       128, 1, 1 << 24,    "timesteps that attend to each other [c]") \
    X(INT,  norm_num_groups,    4, 1, 1 << 20,    "groups of the timestep norm [G]") \
    X(INT,  cema_ndim,         16, 1, CEMA_MAX_NDIM, "complex oscillators per feature [N]") \
    X(INT,  vocab_size,       256, 2, MAX_VOCAB,  "tokens; 256 for bytes, else by default the tokenizer's") \
    X(REAL, rope_base,      10000, 1, 1e12,       "wavelengths of the rotary embedding") \
    X(REAL, norm_eps,        1e-5, 0, 1,          "added to every variance [eps]") \
    X(BOOL, swiglu,             1, 0, 1,          "gate the feed-forward layer") \
    X(BOOL, scale_emb,          1, 0, 1,          "multiply embeddings by sqrt(model_dim)") \
    X(BOOL, share_emb,          1, 0, 1,          "use the embedding as the output layer too") \
    X(BOOL, rescale_nffn,       0, 0, 1,          "multiply the feed-forward output by a learned vector")

// What a token is; recorded with the weights.
#define TOKEN_OPTIONS(X) \
    X(TEXT, tokenizer,         "", 0, 0,          "a .tok file, to encode text with; without one a byte is a token") \
    X(INT,  eod,               -1, -1, MAX_VOCAB, "token that ends documents (bytes: 0); -1: data is one long text")

#ifndef GPU_OPTIONS // train_megalodon.cu has more
#define GPU_OPTIONS(X)
#define ON_GPU_TOO
#endif
#define TRAINING_OPTIONS(X) \
    X(TEXT, train, "train_megalodon.c,test_megalodon.c,data/*.h,dev/*.py,dev/*.c,README.md", 0, 0, \
        "training data: .txt or other text, or llm.c's .bin; commas and * for several files") \
    X(TEXT, val,               "", 0, 0,          "validation data; without it the last 10% of each training file") \
    X(TEXT, out,               "", 0, 0,          "folder for checkpoints and log.tsv") \
    X(INT,  batch,              4, 1, 1 << 24,    "sequences in a micro-step, of each group of processes") \
    X(INT,  seq,              256, 1, INT_MAX,    "tokens in a sequence") \
    X(INT,  accum,              1, 1, 1 << 24,    "micro-steps in a step") \
    X(BOOL, carry,              0, 0, 1,          "go on from the last step's state inside a document (with --eod)") \
    X(INT,  steps,           1000, 1, INT_MAX,    "steps, and the length of the learning rate schedule") \
    X(REAL, lr,              4e-3, 0, 1e3,        "peak learning rate (paper: 3.5e-4)") \
    X(REAL, lr_end_ratio,    0.05, 0, 1,          "the last learning rate over the peak") \
    X(INT,  warmup,           100, 0, INT_MAX,    "steps of linear warmup (paper: 2500)") \
    X(TEXT, schedule,    "cosine", 0, 0,          "after the warmup: cosine, linear or constant") \
    X(REAL, weight_decay,     0.1, 0, 1e3,        "decoupled, on every parameter") \
    X(REAL, beta1,            0.9, 0, 1,          "AdamW: decay of the first moment") \
    X(REAL, beta2,           0.95, 0, 1,          "AdamW: decay of the second moment") \
    X(REAL, adam_eps,        1e-8, 0, 1,          "AdamW: added to the root of the second moment") \
    X(REAL, clip,             1.0, 0, 1e12,       "largest global norm of the gradient; 0 for no limit") \
    X(REAL, dropout,            0, 0, 0.99,       "drop this share of the embedding and of what blocks add to x") \
    X(REAL, hidden_dropout,     0, 0, 0.99,       "of what goes into the products inside blocks") \
    X(REAL, attention_dropout,  0, 0, 0.99,       "of the keys of each query") \
    X(INT,  seed,            1337, 0, INT_MAX,    "initialization, data order, dropout and sampling") \
    X(INT,  threads,            0, 0, 1024,       "OpenMP threads; 0 for its own default") \
    X(BOOL, recompute,          0, 0, 1,          "keep only the inputs of blocks for the backward pass") \
    X(INT,  val_every,        250, 0, INT_MAX,    "validate every so many steps; always after the last") \
    X(INT,  checkpoint_every,   0, 0, INT_MAX,    "save every so many steps; always after the last, given --out") \
    X(INT,  sample_every,       0, 0, INT_MAX,    "print a sample every so many steps") \
    GPU_OPTIONS(X)

// Where to start and what to do; not recorded in checkpoints.
#define MODE_OPTIONS(X) \
    X(TEXT, preset,        "tiny", 0, 0,          "start from these model options: " PRESET_NAMES) \
    X(TEXT, load,              "", 0, 0,          "start from the weights of this safetensors file") \
    X(TEXT, resume,            "", 0, 0,          "go on from the newest checkpoint in this folder, with its flags") \
    X(INT,  generate,           0, 1, INT_MAX,    "print so many tokens") \
    X(INT,  samples,            1, 1, 65535,      "continuations to print, made together") \
    X(TEXT, prompt,            "", 0, 0,          "text to go on from; empty: a newline, with --eod a new document") \
    X(REAL, temperature,      1.0, 0, 1e6,        "0 takes the likeliest token") \
    X(INT,  top_k,              0, 0, INT_MAX,    "sample from the k likeliest tokens; 0 for all") \
    X(REAL, top_p,            1.0, 0, 1,          "sample from the likeliest tokens that hold this probability") \
    X(TEXT, eval,              "", 0, 0,          "print the loss on this file, streamed from its start to its end") \
    X(INT,  chunk_parallel,     1, 1, 1 << 20,    "processes that share a sequence, a slice of whole chunks each") \
    X(TEXT, losses,            "", 0, 0,          "with --eval: write each token's loss here, as float32") \
    X(FLAG, dry_run,            0, 0, 1,          "print configuration, parameters and memory, and stop") \
    X(FLAG, help,               0, 0, 1,          "print this")

#define PRESET_NAMES "tiny mega200M mega1.3B mega1.3B_pg19 mega7.1B mega7.3B paper7B"
#define C_TYPE_INT int
#define C_TYPE_REAL double
#define C_TYPE_BOOL int
#define C_TYPE_FLAG int
#define C_TYPE_TEXT const char*
#define STRUCT_FIELD(kind, name, ...) C_TYPE_##kind name;
#define DEFAULT_VALUE(kind, name, value, ...) value,

enum { CEMA_MAX_NDIM = 64, MAX_VOCAB = 1 << 24 };
typedef struct { MODEL_OPTIONS(STRUCT_FIELD) } Config;
#define OTHER_OPTIONS(X) TOKEN_OPTIONS(X) TRAINING_OPTIONS(X) MODE_OPTIONS(X)
typedef struct { Config model; OTHER_OPTIONS(STRUCT_FIELD) } Options;
static const Options default_options = { { MODEL_OPTIONS(DEFAULT_VALUE) }, OTHER_OPTIONS(DEFAULT_VALUE) };

// The released configurations, with their exact numbers of parameters: 220,627,968; 1,342,832,640; 1,327,628,288;
// 7,117,381,632; 7,385,817,088 (twice, the last one as in the paper).
static const struct { const char* name; Config config; } presets[] = {
    {"tiny",          { MODEL_OPTIONS(DEFAULT_VALUE) }},
    //                  L    D   H    Z     V      F     c   G   N  vocab   base   eps  swiglu scale share rescale
    {"mega200M",      {12, 1024, 1,  256, 2048,  2560, 2048, 32, 16, 32000, 10000,  1e-5, 0, 0, 0, 0}},
    {"mega1.3B",      {24, 2048, 2,  512, 4096,  4864, 2048, 64, 16, 32000, 10000,  1e-5, 0, 0, 0, 0}},
    {"mega1.3B_pg19", {24, 2048, 2,  512, 4096,  3584, 2048, 64, 16, 32000, 10000,  1e-5, 1, 1, 1, 0}},
    {"mega7.1B",      {32, 4096, 4, 1024, 8192, 11264, 2048, 64, 16, 32000, 10000,  1e-5, 0, 0, 0, 0}},
    {"mega7.3B",      {32, 4096, 4, 1024, 8192,  8192, 2048, 64, 16, 32000, 10000,  1e-5, 1, 0, 0, 0}},
    {"paper7B",       {32, 4096, 4, 1024, 8192,  8192, 4096, 64, 16, 32000, 100000, 1e-5, 1, 0, 0, 0}},
};
enum { NUM_PRESETS = sizeof(presets) / sizeof(presets[0]) };

double step_tokens(const Options* o) { return (double)o->accum * ranks.groups * o->batch * o->seq; } // of all ranks

// ---------------------------------------------------------------------------------------------------------------------
// Parameters and activations: one table each

// How a parameter starts. The released code's initialization "he"; n is the row's last dimension (fan_in).
enum { INIT_ZERO, INIT_EMBED, INIT_LINEAR, INIT_NORMAL, INIT_THETA, INIT_GAMMA, INIT_OMEGA, INIT_RESCALE };

// A row is: field, name in files (one tensor per layer where it holds %d), shape (0 ends it; 0 first: absent), start.
#define PARAMETERS(X) \
    X(embed,       "embed.weight",                   vocab, D, 0, INIT_EMBED) \
    X(timenorm_w,  "layers.%d.mega.timenorm.weight", D, 0, 0, INIT_ZERO) \
    X(timenorm_b,  "layers.%d.mega.timenorm.bias",   D, 0, 0, INIT_ZERO) \
    X(cema_alpha,  "layers.%d.mega.cema.alpha",      D, N, 1, INIT_NORMAL) \
    X(cema_delta,  "layers.%d.mega.cema.delta",      D, N, 1, INIT_NORMAL) \
    X(cema_theta,  "layers.%d.mega.cema.theta",      D, 1, 1, INIT_THETA) \
    X(cema_gamma,  "layers.%d.mega.cema.gamma",      D, N, 2, INIT_GAMMA) \
    X(cema_omega,  "layers.%d.mega.cema.omega",      D, 1, 0, INIT_OMEGA) \
    X(rmsnorm_w,   "layers.%d.mega.rmsnorm.weight",  D, 0, 0, INIT_ZERO) \
    X(wv,          "layers.%d.mega.wv.weight",       V, D, 0, INIT_LINEAR) \
    X(wv_b,        "layers.%d.mega.wv.bias",         V, 0, 0, INIT_ZERO) \
    X(wz,          "layers.%d.mega.wz.weight",       Z, D, 0, INIT_LINEAR) \
    X(wz_b,        "layers.%d.mega.wz.bias",         Z, 0, 0, INIT_ZERO) \
    X(wr,          "layers.%d.mega.wr.weight",       V, D, 0, INIT_LINEAR) \
    X(wr_b,        "layers.%d.mega.wr.bias",         V, 0, 0, INIT_ZERO) \
    X(wh1,         "layers.%d.mega.wh1.weight",      D, D, 0, INIT_LINEAR) \
    X(wh1_b,       "layers.%d.mega.wh1.bias",        D, 0, 0, INIT_ZERO) \
    X(wh2,         "layers.%d.mega.wh2.weight",      D, V, 0, INIT_LINEAR) \
    X(gamma,       "layers.%d.mega.gamma",           2, Z, 0, INIT_ZERO) \
    X(beta,        "layers.%d.mega.beta",            2, Z, 0, INIT_ZERO) \
    X(norm_w,      "layers.%d.nffn.norm.weight",     D, 0, 0, INIT_ZERO) \
    X(norm_b,      "layers.%d.nffn.norm.bias",       D, 0, 0, INIT_ZERO) \
    X(fc1,         "layers.%d.nffn.fc1.weight",      F, D, 0, INIT_LINEAR) \
    X(fc3,         "layers.%d.nffn.fc3.weight",      swiglu ? F : 0, D, 0, INIT_LINEAR) \
    X(fc2,         "layers.%d.nffn.fc2.weight",      D, F, 0, INIT_LINEAR) \
    X(rescale,     "layers.%d.nffn.alpha",           rescale_nffn ? D : 0, 0, 0, INIT_RESCALE) \
    X(final_w,     "output.final_norm.weight",       D, 0, 0, INIT_ZERO) \
    X(final_b,     "output.final_norm.bias",         D, 0, 0, INIT_ZERO) \
    X(output,      "output.output.weight",           share_emb ? 0 : vocab, D, 0, INIT_EMBED)

// Which layers have a slot of their own. The rest share one: for inference and with --recompute, LAYER rows too.
enum { ONCE, LAYER, BLOCK_OUTPUT };

// A row is: field, name in test dumps ("" where it is not in them), slots, shape after (B,T), 0 ends it. The same table
// lays out the gradients of activations. All rows are kept for the backward pass, and nothing else: what is cheap it
// computes again (normalized values from mean and rstd, sigmoids, attention probabilities from lse); CEMA's states it
// does not need. With --recompute only the outputs of blocks are kept, and each block is run forward again first.
#define ACTIVATIONS(X) \
    X(embed,         "embed",                         ONCE,  D, 0) \
    X(timenorm,      "layers.%d.mega.timenorm",       LAYER, D, 0)    /* n */ \
    X(timenorm_mean, "",                              LAYER, G, 0) \
    X(timenorm_rstd, "",                              LAYER, G, 0) \
    X(cema,          "layers.%d.mega.cema",           LAYER, D, 0)    /* e */ \
    X(rmsnorm,       "layers.%d.mega.rmsnorm",        LAYER, D, 0)    /* m */ \
    X(rmsnorm_rstd,  "",                              LAYER, 1, 0) \
    X(wz,            "layers.%d.mega.wz",             LAYER, Z, 0)    /* z */ \
    X(znorm,         "layers.%d.mega.znorm",          LAYER, H, Z/H) \
    X(znorm_rstd,    "",                              LAYER, H, 0) \
    X(q,             "",                              LAYER, H, Z/H) \
    X(k,             "",                              LAYER, H, Z/H) \
    X(wv,            "layers.%d.mega.wv",             LAYER, V, 0) \
    X(v,             "",                              LAYER, H, V/H) \
    X(wr,            "layers.%d.mega.wr",             LAYER, V, 0) \
    X(attention,     "layers.%d.mega.inner_attention", LAYER, V, 0)   /* o */ \
    X(attention_lse, "",                              LAYER, H, 0) \
    X(gated,         "",                              LAYER, V, 0)    /* o*r */ \
    X(mega,          "layers.%d.mega",                LAYER, D, 0)    /* y */ \
    X(norm,          "layers.%d.nffn.norm",           LAYER, D, 0)    /* u */ \
    X(norm_mean,     "",                              LAYER, 1, 0) \
    X(norm_rstd,     "",                              LAYER, 1, 0) \
    X(fc1,           "layers.%d.nffn.fc1",            LAYER, F, 0) \
    X(fc3,           "",                              LAYER, swiglu ? F : 0, 0) \
    X(hidden,        "",                              LAYER, F, 0) \
    X(fc2,           "",                              LAYER, rescale_nffn ? D : 0, 0) \
    X(out,           "layers.%d",                     BLOCK_OUTPUT, D, 0) \
    X(final,         "output.final_norm",             ONCE,  D, 0) \
    X(final_mean,    "",                              ONCE,  G, 0) \
    X(final_rstd,    "",                              ONCE,  G, 0) \
    X(logits,        "",                              ONCE,  vocab, 0) /* the backward pass turns it into dlogits */ \
    X(losses,        "",                              ONCE,  1, 0)

#define POINTER_FIELD(field, ...) float* field;
typedef struct { PARAMETERS(POINTER_FIELD) } Params;   // weights, their gradients, both Adam moments
typedef struct { ACTIVATIONS(POINTER_FIELD) } Acts;    // activations or their gradients
enum { NUM_PARAMS = sizeof(Params) / sizeof(float*), NUM_ACTS = sizeof(Acts) / sizeof(float*) };

typedef struct {
    const char* name;  // in files, with %d for the layer; for activations possibly ""
    int slots;         // layers with their own memory, 1 where it is shared or stands once
    size_t dims[4];    // shape of a slot (activations: of one timestep), then zeros
    size_t size;       // elements of a slot
    int init;
} Spec;

// The tables with the numbers of configuration c put in. B*T counts the timesteps, keep says which activations stay:
// KEEP_ALL for the backward pass, KEEP_BLOCKS for the one that recomputes, KEEP_NONE for inference.
enum { KEEP_NONE, KEEP_BLOCKS, KEEP_ALL };

void param_specs(Spec specs[NUM_PARAMS], const Config* c) {
    size_t D = c->model_dim, Z = c->z_dim, V = c->value_dim, F = c->ffn_hidden_dim, N = c->cema_ndim;
    size_t vocab = c->vocab_size;
    bool swiglu = c->swiglu, share_emb = c->share_emb, rescale_nffn = c->rescale_nffn;
#define PARAM_ROW(field, name, d0, d1, d2, init) { name, 1, {d0, d1, d2, 0}, 0, init },
    const Spec rows[] = { PARAMETERS(PARAM_ROW) };
    for (int i = 0; i < NUM_PARAMS; i++) {
        const size_t* dims = rows[i].dims;
        specs[i] = rows[i];
        specs[i].slots = strstr(rows[i].name, "%d") ? c->num_layers : 1;
        specs[i].size = dims[0] * (dims[1] ? dims[1] : 1) * (dims[2] ? dims[2] : 1);
    }
}

void act_specs(Spec specs[NUM_ACTS], const Config* c, size_t BT, int keep) {
    size_t D = c->model_dim, Z = c->z_dim, V = c->value_dim, F = c->ffn_hidden_dim, G = c->norm_num_groups;
    size_t H = c->num_heads, vocab = c->vocab_size;
    bool swiglu = c->swiglu, rescale_nffn = c->rescale_nffn;
#define ACT_ROW(field, name, slots, d0, d1) { name, slots, {d0, d1, 0, 0}, 0, 0 },
    const Spec rows[] = { ACTIVATIONS(ACT_ROW) };
    for (int i = 0; i < NUM_ACTS; i++) {
        bool own = (rows[i].slots == LAYER && keep == KEEP_ALL) || (rows[i].slots == BLOCK_OUTPUT && keep != KEEP_NONE);
        specs[i] = rows[i];
        specs[i].slots = own ? c->num_layers : 1;
        specs[i].size = BT * rows[i].dims[0] * (rows[i].dims[1] ? rows[i].dims[1] : 1);
    }
}

// Number of floats that n specs describe.
size_t specs_size(const Spec* specs, int n) {
    size_t total = 0;
    for (int i = 0; i < n; i++) { total += specs[i].slots * specs[i].size; }
    return total;
}

// Points the n fields of a Params or Acts struct into `memory`, one tensor after the other.
void specs_place(void* fields, float* memory, const Spec* specs, int n) {
    for (int i = 0; i < n; i++) { ((float**)fields)[i] = memory; memory += specs[i].slots * specs[i].size; }
}

// Moves the n fields on to layer l.
void specs_layer(void* fields, const Spec* specs, int n, int l) {
    for (int i = 0; i < n; i++) { ((float**)fields)[i] += specs[i].slots > 1 ? l * specs[i].size : 0; }
}

// "layers.%d.x" and 3 to "layers.3.x". Names are the tables', never a file's.
const char* layer_name(char buffer[128], const char* prefix, const char* name, int l) {
    int n = snprintf(buffer, 128, "%s", prefix);
    snprintf(buffer + n, 128 - n, name, l);
    return buffer;
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers: pure functions of (seed, stream, index), so that nothing but these has to be saved or agreed on

ON_GPU_TOO static inline uint64_t mix_bits(uint64_t x) { // splitmix64's finalizer
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

ON_GPU_TOO uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t x = seed;
    const uint64_t add[3] = {0x9E3779B97F4A7C15u, stream, index};
    for (int i = 0; i < 3; i++) { x = mix_bits(x + add[i] * 0x9E3779B97F4A7C15u + 0x9E3779B97F4A7C15u); }
    return x;
}

ON_GPU_TOO double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) { // in [0, 1)
    return (random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

// Box-Muller; what lies further out than limit is drawn again.
double random_normal(uint64_t seed, uint64_t stream, uint64_t index, double limit) {
    for (uint64_t again = 0;; again += (uint64_t)1 << 48) {
        double u = 1.0 - random_uniform(seed, stream + again, 2 * index);
        double z = sqrt(-2.0 * log(u)) * cos(2.0 * M_PI * random_uniform(seed, stream + again, 2 * index + 1));
        if (fabs(z) <= limit) { return z; }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

// The register tile (rows x columns of C): 12 x 32 sums fill 24 of AVX-512's registers. A panel of 512 x 32 operands
// (64 KB) stays in the second cache, with the 16 strips of A that pass over it.
enum { TILE_M = 12, TILE_N = 32, PANEL_K = 512, BLOCK_M = 16 };

// acc = A B for one tile: A[i][k] is a[i*a_i + k*a_k], B is packed as b (K,TILE_N). Not inlined: alone, gcc and clang
// hold the sums in vector registers.
__attribute__((noinline)) void gemm_tile(float acc[TILE_M][TILE_N], const float* __restrict a, size_t a_i, size_t a_k,
                                         const float* __restrict b, int K) {
    float c[TILE_M][TILE_N];
    memset(c, 0, sizeof(c));
    for (int k = 0; k < K; k++) {
        for (int i = 0; i < TILE_M; i++) {
            for (int j = 0; j < TILE_N; j++) { c[i][j] += a[i * a_i + k * a_k] * b[k * TILE_N + j]; }
        }
    }
    memcpy(acc, c, sizeof(c));
}

// Copies n rows (or columns) of an operand to packed[k*width + i], zeros for those missing up to `width`.
static inline void gemm_pack(float* packed, const float* x, size_t stride_i, size_t stride_k, int n, int K, int width) {
    if (n < width) { memset(packed, 0, sizeof(float) * width * K); }
    if (stride_i == 1 && n == width) {
        for (int k = 0; k < K; k++) { memcpy(packed + (size_t)k * width, x + k * stride_k, width * sizeof(float)); }
        return;
    }
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < K; k++) { packed[(size_t)k * width + i] = x[i * stride_i + k * stride_k]; }
    }
}

// At least n floats of the calling thread's, kept from call to call: fresh pages would cost more than the packing.
enum { OF_PRODUCTS, OF_ATTENTION, NUM_USES };
float* scratch(int use, size_t n) {
    static __thread float* memory[NUM_USES];
    static __thread size_t sizes[NUM_USES];
    if (n > sizes[use]) { free(memory[use]); memory[use] = (float*)xcalloc(n, sizeof(float)); sizes[use] = n; }
    return memory[use];
}

// C (M,N) = A (M,K) B (K,N) + add (M,N; may be C itself) + bias (N) on every row; both may be NULL. Row i of C and add
// starts at i*ldc; A[i][k] is a[i*a_i + k*a_k], B[k][j] is b[k*b_k + j*b_j]: to transpose is to choose strides. B is
// packed, A only where its rows are not contiguous or run out. One thread sums an element, in the order of k. Called
// from a parallel region it runs on the calling thread alone.
void gemm(float* c, size_t ldc, const float* a, size_t a_i, size_t a_k, const float* b, size_t b_k, size_t b_j,
          int M, int N, int K, const float* add, const float* bias) {
    int strips_m = (M + TILE_M - 1) / TILE_M, strips_n = (N + TILE_N - 1) / TILE_N, depth = min_int(K, PANEL_K);
    int direct = a_k == 1 ? M / TILE_M : 0; // strips of A that are read where they are
    float* packed_b = scratch(OF_PRODUCTS, ((size_t)(strips_m - direct) * TILE_M + (size_t)strips_n * TILE_N) * depth);
    float* packed_a = packed_b + (size_t)strips_n * TILE_N * depth;
    OMP(omp parallel if ((double)M * N * K > 1e5))
    for (int k0 = 0; k0 < K; k0 += PANEL_K) {
        int kn = min_int(PANEL_K, K - k0);
        OMP(omp for schedule(static) nowait)
        for (int s = direct; s < strips_m; s++) {
            gemm_pack(packed_a + (size_t)(s - direct) * TILE_M * kn, a + (size_t)s * TILE_M * a_i + k0 * a_k, a_i, a_k,
                      min_int(TILE_M, M - s * TILE_M), kn, TILE_M);
        }
        OMP(omp for schedule(static))
        for (int s = 0; s < strips_n; s++) {
            gemm_pack(packed_b + (size_t)s * TILE_N * kn, b + (size_t)s * TILE_N * b_j + k0 * b_k, b_j, b_k,
                      min_int(TILE_N, N - s * TILE_N), kn, TILE_N);
        }
        OMP(omp for schedule(dynamic) collapse(2))
        for (int block = 0; block < strips_m; block += BLOCK_M) { // BLOCK_M strips of A stay in the second cache
            for (int sn = 0; sn < strips_n; sn++) {
                for (int sm = block; sm < min_int(block + BLOCK_M, strips_m); sm++) {
                    int i0 = sm * TILE_M, j0 = sn * TILE_N;
                    int rows = min_int(TILE_M, M - i0), columns = min_int(TILE_N, N - j0);
                    const float* panel_b = packed_b + (size_t)sn * TILE_N * kn;
                    float acc[TILE_M][TILE_N];
                    for (int i = 0; i < rows; i++) { // C is fetched while the tile is computed
                        __builtin_prefetch(c + (i0 + i) * ldc + j0, 1);
                        __builtin_prefetch(c + (i0 + i) * ldc + j0 + columns - 1, 1);
                    }
                    if (sm < direct) { gemm_tile(acc, a + i0 * a_i + k0, a_i, 1, panel_b, kn); }
                    else { gemm_tile(acc, packed_a + (size_t)(sm - direct) * TILE_M * kn, 1, TILE_M, panel_b, kn); }
                    for (int i = 0; i < rows; i++) {
                        const float* base = k0 > 0 ? c : add;
                        size_t at = (i0 + i) * ldc + j0;
                        for (int j = 0; k0 == 0 && bias && j < columns; j++) { acc[i][j] += bias[j0 + j]; }
                        for (int j = 0; j < columns; j++) { c[at + j] = base ? acc[i][j] + base[at + j] : acc[i][j]; }
                    }
                }
            }
        }
    }
}

// out (rows,O) = inp (rows,I) weight (O,I)^T + bias (O) + add (rows,O); bias and add may be NULL, add may be out.
void matmul_forward(float* out, const float* inp, const float* weight, const float* bias, const float* add,
                    size_t rows, int I, int O) {
    gemm(out, O, inp, I, 1, weight, 1, I, rows, O, I, add, bias);
}

// dinp = dout weight + add; add (rows,I) may be NULL or dinp. dbias may be NULL.
void matmul_backward(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                     const float* weight, const float* add, size_t rows, int I, int O) {
    gemm(dinp, I, dout, O, 1, weight, I, 1, rows, I, O, add, NULL);
    gemm(dweight, I, dout, 1, O, inp, I, 1, O, I, rows, dweight, NULL); // dweight += dout^T inp
    if (!dbias) { return; }
    OMP(omp parallel for schedule(static))
    for (int o0 = 0; o0 < O; o0 += 16) {
        for (size_t r = 0; r < rows; r++) {
            for (int o = o0; o < min_int(o0 + 16, O); o++) { dbias[o] += dout[r * O + o]; }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers

// out (rows,D) = scale * weight (vocab,D)[tokens]
void embedding_forward(float* out, const int* tokens, const float* weight, float scale, size_t rows, int D) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        for (int d = 0; d < D; d++) { out[r * D + d] = scale * weight[(size_t)tokens[r] * D + d]; }
    }
}

void embedding_backward(float* dweight, const float* dout, const int* tokens, float scale, size_t rows, int D) {
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += 16) { // by columns: two rows may hold the same token
        for (size_t r = 0; r < rows; r++) {
            float* dw = dweight + (size_t)tokens[r] * D;
            for (int d = d0; d < min_int(d0 + 16, D); d++) { dw[d] += scale * dout[r * D + d]; }
        }
    }
}

// Dropout, in training passes only: an element becomes 0 with probability p, else inp/(1 - p); its gradient likewise.
// Keys are dropped before the softmax (DropKey, appendix B.1): a query's score of any key, its own too, becomes -inf
// with probability p; nothing is scaled. Masks are not stored: each is a pure function of seed, sequence, timestep,
// layer, site and element, so the backward pass makes it again, however the work is split.
typedef struct {
    double rates[3];    // --dropout, --hidden-dropout, --attention-dropout
    uint64_t seed, row; // row: number of the pass's first sequence, counted from the start of training
} Masks;
typedef struct { uint64_t key, row; int T, time; uint32_t drop; float scale, dropped; } Dropout; // of one site
typedef struct { Dropout embed, mega, fc2, rmsnorm, gated, hidden, keys; } Dropouts; // named as the activations

Masks masks_of(const Options* o) {
    Masks m = {{o->dropout, o->hidden_dropout, o->attention_dropout}, (uint64_t)o->seed, 0};
    return m;
}

Dropouts dropouts_at(Masks m, int T, int l) { // in layer l
    Dropouts d;
    for (int i = 0; i < 7; i++) { // three sites by each of the first two rates, the keys by the third
        uint32_t drop = m.rates[i / 3] * 65536 + 0.5;
        uint64_t key = random_bits(m.seed, ((uint64_t)3 << 56) + l, i);
        Dropout site = {key, m.row, T, ranks.chunk * T, drop, 65536.0f / (65536 - drop), 0.0f};
        ((Dropout*)&d)[i] = site;
    }
    d.keys.scale = 1; d.keys.dropped = -INFINITY;
    return d;
}

// Element i of timestep t in batch row b is dropped if the 16 bits from i % 4 * 16 on of mix_bits(dropout_bits + i / 4)
// are below d.drop: p is a multiple of 1/65536. For keys, i counts from the start of the chunk; else head is 0.
ON_GPU_TOO static inline uint64_t dropout_bits(Dropout d, uint64_t b, uint64_t t, uint64_t head) {
    return mix_bits(d.key + ((d.row + b) << 32) + d.time + t) + (head << 32);
}

void dropout_row(float* out, const float* inp, const float* add, Dropout d, int b, int t, int head, int n) {
    uint64_t bits = dropout_bits(d, b, t, head), four;
    uint16_t draws[256];
    for (int i0 = 0; i0 < n; i0 += 256, bits += 64) {
        for (int k = 0; k < 64; k++) { four = mix_bits(bits + k); memcpy(draws + 4 * k, &four, sizeof(four)); }
        for (int i = i0; i < min_int(i0 + 256, n); i++) {
            out[i] = (draws[i - i0] < d.drop ? d.dropped : inp[i] * d.scale) + (add ? add[i] : 0.0f);
        }
    }
}

// out (rows,n) = dropout(inp) + add; add may be NULL. Returns out, or with rate 0 does nothing and returns inp.
const float* dropout(float* out, const float* inp, const float* add, Dropout d, size_t rows, int n) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < (d.drop ? rows : 0); r++) {
        dropout_row(out + r * n, inp + r * n, add ? add + r * n : NULL, d, r / d.T, r % d.T, 0, n);
    }
    return d.drop ? out : inp;
}

// Running statistics of one batch row and group: timesteps seen, mean and population variance of all their features.
typedef struct { double count, mean, var; } NormState;
static const NormState no_past = {0, 0, 0};
NormState norm_merge(NormState a, NormState b) { // Chan's formula; one of them may be empty, not both
    double n = a.count + b.count, delta = b.mean - a.mean;
    NormState s = {n, a.mean + delta * b.count / n,
                   (a.count * a.var + b.count * b.var + delta * delta * a.count * b.count / n) / n};
    return s;
}

// Timestep normalization, eq. 4: group norm over time, past only. For each batch row and group of D/G features,
//     mean_t, var_t = mean and population variance of all features of the group in timesteps 1..t
//     out = (inp - mean_t) / sqrt(var_t + eps) * (w + 1) + b        (plus-1, eq. 23: in every norm the scale is w + 1)
// out, inp (B,T,D) | w, b (D) | mean, rstd (B,T,G): saved for the backward pass | start, end (B,G): statistics before
// and after these T timesteps, all that is carried; start NULL is an empty past, end may be NULL or start. They merge
// by Chan's formula, a timestep at a time, in double: summed in floats, a stream of 10^7 timesteps would drift.
// Where ranks hold slices of the sequences, all of T timesteps, `before` (B,G) receives the statistics before this one,
// start being those before the first; else it is NULL.
void timestepnorm_forward(float* out, float* mean, float* rstd, NormState* end, NormState* before,
                          const NormState* start, const float* inp, const float* w, const float* b,
                          int B, int T, int D, int G, float eps) {
    int F = D / G;
    if (before) { // of this slice alone; then those of the slices before it, merged
        timestepnorm_forward(out, mean, rstd, before, NULL, NULL, inp, w, b, B, T, D, G, eps);
        NormState* all = (NormState*)xcalloc((size_t)ranks.chunks * B * G, sizeof(NormState));
        all_gather(all, before, sizeof(NormState) * B * G);
        for (int i = 0; i < B * G; i++) {
            NormState s = start ? start[i] : no_past;
            for (int r = 0; r < ranks.chunk; r++) { s = norm_merge(s, all[(size_t)r * B * G + i]); }
            before[i] = s;
        }
        free(all);
        start = before;
    }
    OMP(omp parallel for collapse(2) schedule(static))
    for (int row = 0; row < B; row++) {
        for (int g = 0; g < G; g++) {
            NormState s = start ? start[row * G + g] : no_past;
            double m2 = s.count * s.var; // sum of squared deviations, over F
            const float *wg = w + g * F, *bg = b + g * F;
            for (int t = 0; t < T; t++) {
                size_t k = ((size_t)row * T + t) * G + g; // statistics at [k], features at [k*F]
                const float* x = inp + k * F;
                double m = 0, v = 0; // mean and variance of this timestep alone
                OMP(omp simd reduction(+:m))
                for (int i = 0; i < F; i++) { m += x[i]; }
                m /= F;
                OMP(omp simd reduction(+:v))
                for (int i = 0; i < F; i++) { v += (x[i] - m) * (x[i] - m); }
                double delta = m - s.mean;
                m2 += v / F + delta * delta * s.count / (s.count + 1);
                s.count += 1;
                s.mean += delta / s.count;
                float mu = s.mean, r = 1.0 / sqrt(m2 / s.count + eps);
                OMP(omp simd)
                for (int i = 0; i < F; i++) { out[k * F + i] = (x[i] - mu) * r * (wg[i] + 1.0f) + bg[i]; }
                mean[k] = mu;
                rstd[k] = r;
            }
            s.var = s.count > 0 ? m2 / s.count : 0;
            if (end) { end[row * G + g] = s; }
        }
    }
}

// Added to dinp. mean_t pulls on every x_s with s <= t by 1/(n_t F), var_t by 2 (x_s - mean_t)/(n_t F); n_t counts the
// timesteps up to t. So with a_t = dL/dmean_t and b_t = dL/dvar_t,
//     dinp_s = dout (w+1) rstd + (U_s + 2 (x_s - c) V_s) / F,   U_s = sum_{t>=s} (a_t - 2 (mean_t - c) b_t) / n_t,
//                                                               V_s = sum_{t>=s} b_t / n_t
// for any constant c (the last mean, so that little cancels): one sweep from the end. The statistics before the first
// timestep count start.count timesteps; dstart (B,G) receives their gradients if not NULL. Where ranks hold slices,
// start is what comes before this one, and U and V begin with what the later ranks found in a sweep of their own:
// with `alone` (B,G) not NULL, these sums of this slice alone are all that is computed.
typedef struct { double U, V, c; } NormSums;
void timestepnorm_backward(float* dinp, float* dw, float* db, NormState* dstart, const float* dout, const float* mean,
                           const float* rstd, const NormState* start, const float* inp, const float* w,
                           int B, int T, int D, int G, NormSums* alone) {
    int F = D / G, later = alone ? 0 : ranks.chunks - ranks.chunk - 1;
    NormSums* all = NULL;
    if (!alone && ranks.chunks > 1) {
        all = (NormSums*)xcalloc((size_t)(ranks.chunks + 1) * B * G, sizeof(NormSums));
        timestepnorm_backward(dinp, dw, db, NULL, dout, mean, rstd, start, inp, w, B, T, D, G, all);
        all_gather(all + B * G, all, sizeof(NormSums) * B * G);
    }
    OMP(omp parallel for schedule(static))
    for (int g = 0; g < G; g++) {
        for (int row = 0; row < B; row++) {
            NormState s = start ? start[row * G + g] : no_past;
            double U = 0, V = 0, c = mean[((size_t)row * T + T - 1) * G + g];
            for (int r = ranks.chunks - later; r < ranks.chunks; r++) {
                NormSums sums = all[((r + 1) * B + row) * G + g];
                U += sums.U + 2 * (c - sums.c) * sums.V; // about this c
                V += sums.V;
            }
            for (int t = T - 1; t >= 0; t--) {
                size_t k = ((size_t)row * T + t) * G + g;
                const float *x = inp + k * F, *dy = dout + k * F, *wg = w + g * F;
                float mu = mean[k], r = rstd[k];
                double A = 0, E = 0; // sums of dout (w+1) (x - mean) and of dout (w+1)
                OMP(omp simd reduction(+:A,E))
                for (int i = 0; i < F; i++) {
                    float dnorm = dy[i] * (wg[i] + 1.0f);
                    A += dnorm * (x[i] - mu);
                    E += dnorm;
                }
                double n = s.count + t + 1, da = -r * E, dv = -0.5 * r * r * r * A;
                U += (da - 2 * (mu - c) * dv) / n;
                V += dv / n;
                float u = (U - 2 * c * V) / F, v = 2 * V / F;
                OMP(omp simd)
                for (int i = 0; i < (alone ? 0 : F); i++) {
                    dinp[k * F + i] += dy[i] * (wg[i] + 1.0f) * r + (u + v * x[i]);
                    dw[g * F + i] += dy[i] * (x[i] - mu) * r;
                    db[g * F + i] += dy[i];
                }
            }
            if (dstart) {
                dstart[row * G + g].mean += s.count * (U + 2 * (s.mean - c) * V);
                dstart[row * G + g].var += s.count * V;
            }
            if (alone) { NormSums sums = {U, V, c}; alone[row * G + g] = sums; }
        }
    }
    free(all);
}

// Complex exponential moving average, eq. 2, 3 and 5. Feature d runs N damped oscillators k = 1..N:
//     p = sigmoid(alpha)  q = (1 - p sigmoid(delta)) exp(i 2pi k/N sigmoid(theta))  g = (gamma_re + i gamma_im)/sqrt(N)
//     h_t = q h_{t-1} + p x_t       y_t = Re(sum_k g h_t) + omega x_t
// The state h is complex, the output real: of g h only the real part is summed. (Eq. 2 rotates the input too and has no
// omega; the released code is as here.) A strip's features stand side by side in vector lanes, each with its N states,
// which stay in registers for TIMES timesteps; lanes past the last feature hold zeros.
enum { LANES = 16, TIMES = 16 };
typedef struct { float re[LANES], im[LANES]; } ComplexLanes;
typedef struct { float p[LANES]; ComplexLanes q, g; } CemaMode; // the k-th oscillators of a strip
typedef struct { double re, im; } Complex;
double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
Complex lane(const ComplexLanes* z, int j) { Complex c = {z->re[j], z->im[j]}; return c; }
// conj(a) b
Complex conj_mul(Complex a, Complex b) { Complex c = {a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re}; return c; }
Complex mul(Complex a, Complex b) { Complex c = {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; return c; }

// Coefficients of the strip of features that starts at d0.
void cema_modes(CemaMode m[CEMA_MAX_NDIM], const float* alpha, const float* delta, const float* theta,
                const float* gamma, int d0, int D, int N) {
    memset(m, 0, N * sizeof(*m));
    for (int j = 0; j < min_int(LANES, D - d0); j++) {
        double turn = 2.0 * M_PI / N * sigmoid(theta[d0 + j]);
        for (int k = 0; k < N; k++) {
            size_t i = (size_t)(d0 + j) * N + k;
            double p = sigmoid(alpha[i]), radius = 1.0 - p * sigmoid(delta[i]);
            m[k].p[j] = p;
            m[k].q.re[j] = radius * cos(turn * (k + 1)); m[k].q.im[j] = radius * sin(turn * (k + 1));
            m[k].g.re[j] = gamma[2 * i] / sqrt(N); m[k].g.im[j] = gamma[2 * i + 1] / sqrt(N);
        }
    }
}

// Where ranks hold slices of T timesteps: what the state s is after those from rank `first` up, or down, to this one.
// A slice turns it into q^T s + e, where e is what it makes of 0: 2 numbers at i of the `size` of each rank.
Complex cema_carry(Complex s, Complex q, int T, int first, const float* all, size_t size, size_t i) {
    Complex power = {1, 0};
    for (int n = T; n; n /= 2, q = mul(q, q)) { power = n % 2 ? mul(power, q) : power; } // q^T
    for (int r = first; r != ranks.chunk; r += first ? -1 : 1) {
        s = mul(power, s);
        s.re += all[r * size + i]; s.im += all[r * size + i + 1];
    }
    return s;
}

// out, inp (B,T,D) | alpha, delta (D,N), theta, omega (D), gamma (D,N,2) | start, end (B,D,N,2): h before and after
// these timesteps; start NULL is zero, end may be NULL or start. Nothing is saved for the backward pass. `before`: as
// for the timestep norm.
void cema_forward(float* out, float* end, float* before, const float* start, const float* inp, const float* alpha,
                  const float* delta, const float* theta, const float* gamma, const float* omega,
                  int B, int T, int D, int N) {
    size_t size = (size_t)B * D * N * 2;
    float* all = NULL;
    if (before) { // this slice alone, before the others are known
        all = (float*)xcalloc(ranks.chunks * size, sizeof(float));
        cema_forward(out, before, NULL, NULL, inp, alpha, delta, theta, gamma, omega, B, T, D, N);
        all_gather(all, before, size * sizeof(float));
    }
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += LANES) {
        int lanes = min_int(LANES, D - d0);
        CemaMode modes[CEMA_MAX_NDIM];
        cema_modes(modes, alpha, delta, theta, gamma, d0, D, N);
        for (int b = 0; b < B; b++) {
            size_t state = ((size_t)b * D + d0) * N * 2;
            ComplexLanes h[CEMA_MAX_NDIM] = {{{0}, {0}}};
            for (int i = 0; (start || before) && i < lanes * N; i++) {
                size_t at = state + 2 * i;
                Complex s = {start ? start[at] : 0, start ? start[at + 1] : 0};
                if (before) {
                    s = cema_carry(s, lane(&modes[i % N].q, i / N), T, 0, all, size, at);
                    before[at] = s.re; before[at + 1] = s.im;
                }
                h[i % N].re[i / N] = s.re; h[i % N].im[i / N] = s.im;
            }
            for (int t0 = 0; t0 < T; t0 += TIMES) {
                float x[TIMES][LANES] = {{0}}, y[TIMES][LANES] = {{0}};
                int times = min_int(TIMES, T - t0);
                size_t at = ((size_t)b * T + t0) * D + d0;
                for (int t = 0; t < times; t++) { memcpy(x[t], inp + at + (size_t)t * D, lanes * sizeof(float)); }
                for (int k = 0; k < N; k++) {
                    CemaMode m = modes[k];
                    ComplexLanes s = h[k];
                    for (int t = 0; t < times; t++) {
                        for (int j = 0; j < LANES; j++) {
                            float re = m.q.re[j] * s.re[j] - m.q.im[j] * s.im[j] + m.p[j] * x[t][j];
                            float im = m.q.re[j] * s.im[j] + m.q.im[j] * s.re[j];
                            s.re[j] = re; s.im[j] = im;
                            y[t][j] += m.g.re[j] * re - m.g.im[j] * im;
                        }
                    }
                    h[k] = s;
                }
                for (int t = 0; t < times; t++) {
                    for (int j = 0; j < lanes; j++) { out[at + (size_t)t * D + j] = y[t][j] + omega[d0 + j] * x[t][j]; }
                }
            }
            for (int i = 0; end && i < lanes * N; i++) {
                end[state + 2 * i] = h[i % N].re[i / N]; end[state + 2 * i + 1] = h[i % N].im[i / N];
            }
        }
    }
    free(all);
}

// One sweep from the end, without the states h. A complex gradient dz stands for dL/dRe z + i dL/dIm z. With ~ for the
// conjugate, the adjoint of h_t is ~g a_t where a_t = ~q a_{t+1} + dy_t, so
//     dx_t = omega dy_t + sum_k Re(p ~g a_t)              dp = Re(~g Q), Q = sum_t x_t a_t
//     dg = sum_t dy_t ~h_t = p Q + ~h_0 ~q a_1            dh_0 = ~g ~q a_1
// and dq = sum_t ~g a_t ~h_{t-1}, where h_{t-1} = q^{t-1} h_0 + p sum_{s<t} q^{t-1-s} x_s. Summed over t first:
//     dq = ~g (p R + ~h_0 a'_0), R = sum_s x_s a'_s       a'_s = sum_{t>s} ~q^{t-1-s} a_t, or a'_{s-1} = ~q a'_s + a_s
// dinp (B,T,D) is assigned; dstart (B,D,N,2) is added to and may be NULL. Where ranks hold slices, start is what comes
// before this one, and a goes on from the later ones, as they found it alone: with `alone` (B,D,N,2) not NULL, a_1 of
// this slice alone is all that is computed. a' is of this slice, so that dq over the slices has each term once; dg's Q
// has all that comes of x_t, in later slices too, so ~h_0 counts for the first slice only.
void cema_backward(float* dinp, float* dalpha, float* ddelta, float* dtheta, float* dgamma, float* domega,
                   float* dstart, const float* dout, const float* start, const float* inp, const float* alpha,
                   const float* delta, const float* theta, const float* gamma, const float* omega,
                   int B, int T, int D, int N, float* alone) {
    size_t size = (size_t)B * D * N * 2;
    float* all = NULL;
    if (!alone && ranks.chunks > 1) {
        all = (float*)xcalloc((ranks.chunks + 1) * size, sizeof(float));
        cema_backward(dinp, NULL, NULL, NULL, NULL, NULL, NULL, dout, start, inp, alpha, delta, theta, gamma, omega,
                      B, T, D, N, all + ranks.chunks * size);
        all_gather(all, all + ranks.chunks * size, size * sizeof(float));
    }
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += LANES) {
        int lanes = min_int(LANES, D - d0);
        CemaMode modes[CEMA_MAX_NDIM];
        cema_modes(modes, alpha, delta, theta, gamma, d0, D, N);
        double dp[CEMA_MAX_NDIM][LANES] = {{0}};
        Complex dq[CEMA_MAX_NDIM][LANES] = {{{0, 0}}};
        for (int b = 0; b < B; b++) {
            struct { ComplexLanes a, a1; Complex Q[LANES], R[LANES]; } s[CEMA_MAX_NDIM]; // a1 is a'
            memset(s, 0, sizeof(s));
            for (int i = 0; all && i < lanes * N; i++) {
                size_t h = 2 * (((size_t)b * D + d0) * N + i);
                Complex a = {0, 0}, q = lane(&modes[i % N].q, i / N), q_ = {q.re, -q.im};
                a = cema_carry(a, q_, T, ranks.chunks - 1, all, size, h);
                s[i % N].a.re[i / N] = a.re; s[i % N].a.im[i / N] = a.im;
            }
            double dw[LANES] = {0};
            for (int t0 = (T - 1) / TIMES * TIMES; t0 >= 0; t0 -= TIMES) {
                float x[TIMES][LANES] = {{0}}, dy[TIMES][LANES] = {{0}}, dx[TIMES][LANES] = {{0}};
                int times = min_int(TIMES, T - t0);
                size_t at = ((size_t)b * T + t0) * D + d0;
                for (int t = 0; t < times; t++) {
                    memcpy(x[t], inp + at + (size_t)t * D, lanes * sizeof(float));
                    memcpy(dy[t], dout + at + (size_t)t * D, lanes * sizeof(float));
                }
                for (int k = 0; k < N; k++) {
                    CemaMode m = modes[k];
                    ComplexLanes a = s[k].a, a1 = s[k].a1, Qt = {{0}, {0}}, Rt = {{0}, {0}};
                    for (int t = times - 1; t >= 0; t--) {
                        for (int j = 0; j < LANES; j++) {
                            // a_t = ~q a_{t+1} + dy_t; x_t meets a_t and a'_t; a'_{t-1} = ~q a'_t + a_t
                            float re1 = a1.re[j], im1 = a1.im[j];
                            float re = m.q.re[j] * a.re[j] + m.q.im[j] * a.im[j] + dy[t][j];
                            float im = m.q.re[j] * a.im[j] - m.q.im[j] * a.re[j];
                            Qt.re[j] += x[t][j] * re; Qt.im[j] += x[t][j] * im;
                            Rt.re[j] += x[t][j] * re1; Rt.im[j] += x[t][j] * im1;
                            dx[t][j] += m.p[j] * (m.g.re[j] * re + m.g.im[j] * im);
                            a1.re[j] = m.q.re[j] * re1 + m.q.im[j] * im1 + re;
                            a1.im[j] = m.q.re[j] * im1 - m.q.im[j] * re1 + im;
                            a.re[j] = re; a.im[j] = im;
                        }
                    }
                    s[k].a = a; s[k].a1 = a1;
                    for (int j = 0; j < LANES; j++) {
                        s[k].Q[j].re += Qt.re[j]; s[k].Q[j].im += Qt.im[j];
                        s[k].R[j].re += Rt.re[j]; s[k].R[j].im += Rt.im[j];
                    }
                }
                for (int t = 0; t < times; t++) {
                    for (int j = 0; j < lanes; j++) {
                        dinp[at + (size_t)t * D + j] = dx[t][j] + omega[d0 + j] * dy[t][j];
                        dw[j] += dy[t][j] * x[t][j];
                    }
                }
            }
            for (int i = 0; i < lanes * N; i++) {
                int k = i % N, j = i / N;
                size_t w = 2 * ((size_t)d0 * N + i), h = 2 * (((size_t)b * D + d0) * N + i); // in dgamma, in the state
                double p = modes[k].p[j];
                if (alone) { alone[h] = s[k].a.re[j]; alone[h + 1] = s[k].a.im[j]; continue; }
                Complex q = lane(&modes[k].q, j), g = lane(&modes[k].g, j), h0 = {0, 0};
                if (start) { h0.re = start[h]; h0.im = start[h + 1]; }
                Complex qa = conj_mul(q, lane(&s[k].a, j)), ha = conj_mul(h0, lane(&s[k].a1, j)); // ~q a_1, ~h_0 a'_0
                Complex hqa = conj_mul(h0, qa), dh0 = conj_mul(g, qa);
                Complex r = {p * s[k].R[j].re + ha.re, p * s[k].R[j].im + ha.im}, gr = conj_mul(g, r); // dq = ~g r
                if (ranks.chunk > 0) { hqa.re = hqa.im = 0; }
                dgamma[w] += (p * s[k].Q[j].re + hqa.re) / sqrt(N);
                dgamma[w + 1] += (p * s[k].Q[j].im + hqa.im) / sqrt(N);
                dp[k][j] += conj_mul(g, s[k].Q[j]).re;
                dq[k][j].re += gr.re; dq[k][j].im += gr.im;
                if (dstart) { dstart[h] += dh0.re; dstart[h + 1] += dh0.im; }
                if (k == 0) { domega[d0 + j] += dw[j]; }
            }
        }
        for (int i = 0; !alone && i < lanes * N; i++) { // to what p and q are made of: q = radius exp(i angle)
            int k = i % N, j = i / N;
            size_t w = (size_t)d0 * N + i;
            double p = sigmoid(alpha[w]), s_delta = sigmoid(delta[w]), s_theta = sigmoid(theta[d0 + j]);
            double turn = 2.0 * M_PI / N * (k + 1), dangle = conj_mul(lane(&modes[k].q, j), dq[k][j]).im;
            double dradius = cos(turn * s_theta) * dq[k][j].re + sin(turn * s_theta) * dq[k][j].im;
            dalpha[w] += p * (1 - p) * (dp[k][j] - s_delta * dradius);
            ddelta[w] -= p * s_delta * (1 - s_delta) * dradius;
            dtheta[d0 + j] += turn * s_theta * (1 - s_theta) * dangle;
        }
    }
    free(all);
}

// Layer normalization over the D features of a row: out = (inp - mean) rstd (w + 1) + b. With mean and b NULL, RMS
// normalization: out = inp rstd (w + 1), rstd = 1/sqrt(mean(inp^2) + eps); without a scale if w is NULL too (eq. 6).
// out, inp (rows,D) | w, b (D) | mean, rstd (rows): saved
void norm_forward(float* out, float* mean, float* rstd, const float* inp, const float* w, const float* b,
                  size_t rows, int D, float eps) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        const float* x = inp + r * D;
        double m = 0, v = 0;
        if (mean) {
            OMP(omp simd reduction(+:m))
            for (int d = 0; d < D; d++) { m += x[d]; }
            mean[r] = m /= D;
        }
        OMP(omp simd reduction(+:v))
        for (int d = 0; d < D; d++) { v += (x[d] - m) * (x[d] - m); }
        float mu = m, scale = rstd[r] = 1.0 / sqrt(v / D + eps);
        for (int d = 0; d < D; d++) { out[r * D + d] = (x[d] - mu) * scale; }
        for (int d = 0; w && d < D; d++) { out[r * D + d] = out[r * D + d] * (w[d] + 1.0f) + (b ? b[d] : 0.0f); }
    }
}

// dinp = rstd (f - n mean(f n) - mean(f)), the last term only for layer normalization; n = (inp - mean) rstd and
// f = dout (w + 1). dw and db are NULL where w and b are.
void norm_backward(float* dinp, float* dw, float* db, const float* dout, const float* mean, const float* rstd,
                   const float* inp, const float* w, size_t rows, int D) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        const float *x = inp + r * D, *dy = dout + r * D;
        float* dx = dinp + r * D;
        double s = 0, sn = 0;
        float mu = mean ? mean[r] : 0;
        for (int d = 0; d < D; d++) { dx[d] = w ? dy[d] * (w[d] + 1.0f) : dy[d]; } // f
        OMP(omp simd reduction(+:s,sn))
        for (int d = 0; d < D; d++) { s += dx[d]; sn += (double)dx[d] * (x[d] - mu); }
        float m = mean ? s / D : 0, mn = sn * rstd[r] * rstd[r] / D;
        for (int d = 0; d < D; d++) { dx[d] = rstd[r] * (dx[d] - m - (x[d] - mu) * mn); }
    }
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < (dw ? D : 0); d0 += 16) {
        for (size_t r = 0; r < rows; r++) {
            const float *x = inp + r * D, *dy = dout + r * D, mu = mean ? mean[r] : 0;
            for (int d = d0; d < min_int(d0 + 16, D); d++) { dw[d] += dy[d] * (x[d] - mu) * rstd[r]; }
            for (int d = d0; db && d < min_int(d0 + 16, D); d++) { db[d] += dy[d]; }
        }
    }
}

// Queries and keys from the normalized shared representation, eq. 7 and 8, then rotary embedding:
//     q = znorm (gamma_0 + 1)/sqrt(Z/H) + beta_0       k = znorm (gamma_1 + 1)/sqrt(Z/H) + beta_1
// and pair (2j, 2j+1) of each head is turned by the angle pos * base^(-2j/(Z/H)), pos counted from the chunk's start.
// q, k, znorm (B,T,Z) | gamma, beta (2,Z) | rotations (c,Z/H/2,2): cos and sin | the first timestep stands at `pos`
void qk_forward(float* q, float* k, const float* znorm, const float* gamma, const float* beta, const float* rotations,
                int B, int T, int pos, int c, int Z, int H) {
    int zd = Z / H;
    float scale = 1.0 / sqrt(zd);
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < (size_t)B * T; r++) {
        const float* turn = rotations + (size_t)((pos + r % T) % c) * zd;
        for (int s = 0; s < 2; s++) {
            const float *x = znorm + r * Z, *ga = gamma + s * Z, *be = beta + s * Z;
            float* out = (s ? k : q) + r * Z;
            for (int i = 0, j = 0; i < Z; i += 2, j = j + 2 < zd ? j + 2 : 0) {
                float re = x[i] * (ga[i] + 1.0f) * scale + be[i];
                float im = x[i + 1] * (ga[i + 1] + 1.0f) * scale + be[i + 1];
                out[i] = re * turn[j] - im * turn[j + 1];
                out[i + 1] = re * turn[j + 1] + im * turn[j];
            }
        }
    }
}

// dznorm is assigned. Turned back by the same angle, then through the affine map.
void qk_backward(float* dznorm, float* dgamma, float* dbeta, const float* dq, const float* dk, const float* znorm,
                 const float* gamma, const float* rotations, int B, int T, int c, int Z, int H) {
    int zd = Z / H;
    float scale = 1.0 / sqrt(zd);
    OMP(omp parallel for schedule(static))
    for (int i0 = 0; i0 < Z; i0 += 16) { // by columns, for the sums over rows
        for (size_t r = 0; r < (size_t)B * T; r++) {
            const float* turn = rotations + (size_t)(r % T % c) * zd;
            for (int i = i0; i < min_int(i0 + 16, Z); i += 2) {
                size_t at = r * Z + i;
                float cosine = turn[i % zd], sine = turn[i % zd + 1], dx0 = 0, dx1 = 0;
                for (int s = 0; s < 2; s++) {
                    const float* d = (s ? dk : dq) + at;
                    float re = d[0] * cosine + d[1] * sine, im = d[1] * cosine - d[0] * sine;
                    dgamma[s * Z + i] += re * znorm[at] * scale;
                    dgamma[s * Z + i + 1] += im * znorm[at + 1] * scale;
                    dbeta[s * Z + i] += re; dbeta[s * Z + i + 1] += im;
                    dx0 += re * (gamma[s * Z + i] + 1.0f) * scale;
                    dx1 += im * (gamma[s * Z + i + 1] + 1.0f) * scale;
                }
                dznorm[at] = dx0; dznorm[at + 1] = dx1;
            }
        }
    }
}

// exp(x) to 1.5 units in the last place, in operations that compilers vectorize (calls of libm's expf they do only with
// fast-math, which would delete the checks for NaN): x = n ln 2 + r, exp(x) = 2^n exp(r).
static inline float exp_fast(float x) {
    const float round = 12582912.0f; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    x = x > 88.0f ? 88.0f : x;       // written so that NaN stays NaN
    x = x < -87.0f ? -87.0f : x;
    float n = x * 1.44269504f + round - round;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float e = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666657f + r * (0.0416666546f + r * (0.00833336078f
              + r * (0.00139304355f + r * 0.000198743f))))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof(power));
    return e * power;
}

// out = silu(inp) * mul, elementwise over n numbers; mul NULL stands for ones. silu(a) = a sigmoid(a), eq. 16 and 18.
void silu_forward(float* out, const float* inp, const float* mul, size_t n) {
    OMP(omp parallel for simd schedule(static))
    for (size_t i = 0; i < n; i++) { out[i] = inp[i] / (1.0f + exp_fast(-inp[i])) * (mul ? mul[i] : 1.0f); }
}

// silu'(a) = s (1 + a (1 - s)) with s = sigmoid(a). dmul is assigned like dinp, and NULL where mul is.
void silu_backward(float* dinp, float* dmul, const float* dout, const float* inp, const float* mul, size_t n) {
    OMP(omp parallel for simd schedule(static))
    for (size_t i = 0; i < (mul ? n : 0); i++) {
        float s = 1.0f / (1.0f + exp_fast(-inp[i]));
        dmul[i] = dout[i] * inp[i] * s;
        dinp[i] = dout[i] * mul[i] * s * (1.0f + inp[i] * (1.0f - s));
    }
    OMP(omp parallel for simd schedule(static))
    for (size_t i = 0; i < (mul ? 0 : n); i++) {
        float s = 1.0f / (1.0f + exp_fast(-inp[i]));
        dinp[i] = dout[i] * s * (1.0f + inp[i] * (1.0f - s));
    }
}

// Chunk attention, eq. 9: out_t = sum_s softmax_s(q_t k_s) v_s over the s <= t in t's chunk of c timesteps. (The last
// chunk may be short. The scale of the scores is in q and k already.)
// out (B,T,H,V/H), q (B,T,H,Z/H) | k (B,K,H,Z/H), v (B,K,H,V/H) | lse (B,T,H): log sum exp of the scores, saved
// In a whole sequence pos = 0 and K = T. When streaming, K = c, k and v hold the current chunk from its start, and the
// queries stand at pos, pos+1, ... in it (pos + T <= c). Queries go in blocks of ROWS: no c x c matrix is ever there,
// and the scores right of a block's last query are not computed. A query that dropout leaves no key gets 0.
enum { ROWS = 96 };
void attention_forward(float* out, float* lse, const float* q, const float* k, const float* v,
                       int B, int T, int K, int pos, int c, int H, int Z, int V, Dropout drop) {
    int zd = Z / H, vd = V / H, chunks = pos ? 1 : (T + c - 1) / c, blocks = (min_int(c, T) + ROWS - 1) / ROWS;
    OMP(omp parallel for schedule(static) collapse(3))
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            for (int cb = 0; cb < chunks * blocks; cb++) {
                int first = cb / blocks * c, t0 = first + cb % blocks * ROWS; // of the chunk, of the block
                int rows = min_int(ROWS, min_int(first + c, T) - t0), keys = pos + t0 - first + rows;
                if (rows <= 0) { continue; }
                float* S = scratch(OF_ATTENTION, (size_t)ROWS * min_int(c, pos + T));
                size_t at = (size_t)b * T + t0, at_k = (size_t)b * K + first;
                gemm(S, keys, q + at * Z + h * zd, Z, 1, k + at_k * Z + h * zd, 1, Z, rows, keys, zd, NULL, NULL);
                for (int i = 0; i < rows; i++) { // query i of the block sees the first n keys of its chunk
                    float *s = S + (size_t)i * keys, top = -INFINITY, sum = 0;
                    int n = keys - rows + i + 1;
                    if (drop.drop) { dropout_row(s, s, NULL, drop, b, t0 + i, h, n); }
                    for (int j = 0; j < n; j++) { top = s[j] > top ? s[j] : top; }
                    OMP(omp simd reduction(+:sum))
                    for (int j = 0; j < n; j++) {
                        s[j] = s[j] == -INFINITY ? 0.0f : exp_fast(s[j] - top);
                        sum += s[j];
                    }
                    if (sum == 0) { top = 0; sum = 1; } // all keys dropped
                    for (int j = 0; j < keys; j++) { s[j] = j < n ? s[j] / sum : 0.0f; }
                    lse[(at + i) * H + h] = top + logf(sum);
                }
                gemm(out + at * V + h * vd, V, S, keys, 1, v + at_k * V + h * vd, V, 1, rows, vd, keys, NULL, NULL);
            }
        }
    }
}

// The probabilities P = exp(S - lse) are computed again. With dP = dout v^T,
//     dS = P (dP - sum_s P dP)       dq = dS k       dk = dS^T q       dv = P^T dout
// dq, dk (B,T,H,Z/H), dv (B,T,H,V/H) are assigned.
void attention_backward(float* dq, float* dk, float* dv, const float* dout, const float* lse, const float* q,
                        const float* k, const float* v, int B, int T, int c, int H, int Z, int V, Dropout drop) {
    int zd = Z / H, vd = V / H, chunks = (T + c - 1) / c;
    OMP(omp parallel for schedule(static) collapse(3))
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                int first = chunk * c, last = min_int(first + c, T), t0 = last - (last - first - 1) % ROWS - 1;
                size_t at_k = (size_t)b * T + first;
                float* P = scratch(OF_ATTENTION, (size_t)2 * ROWS * min_int(c, T));
                const float *kc = k + at_k * Z + h * zd, *vc = v + at_k * V + h * vd;
                float *dkc = dk + at_k * Z + h * zd, *dvc = dv + at_k * V + h * vd;
                for (bool added = false; t0 >= first; t0 -= ROWS, added = true) { // the last block reaches all keys
                    int rows = min_int(ROWS, last - t0), keys = t0 - first + rows;
                    size_t at = (size_t)b * T + t0;
                    const float *qb = q + at * Z + h * zd, *db = dout + at * V + h * vd;
                    float* dS = P + (size_t)rows * keys;
                    gemm(P, keys, qb, Z, 1, kc, 1, Z, rows, keys, zd, NULL, NULL);
                    gemm(dS, keys, db, V, 1, vc, 1, V, rows, keys, vd, NULL, NULL);
                    for (int i = 0; i < rows; i++) {
                        float *p = P + (size_t)i * keys, *ds = dS + (size_t)i * keys, norm = lse[(at + i) * H + h];
                        int n = keys - rows + i + 1;
                        float dot = 0;
                        if (drop.drop) { dropout_row(p, p, NULL, drop, b, t0 + i, h, n); }
                        OMP(omp simd reduction(+:dot))
                        for (int j = 0; j < n; j++) {
                            p[j] = p[j] == -INFINITY ? 0.0f : exp_fast(p[j] - norm);
                            dot += p[j] * ds[j];
                        }
                        for (int j = 0; j < n; j++) { ds[j] = p[j] * (ds[j] - dot); }
                        for (int j = n; j < keys; j++) { p[j] = ds[j] = 0; }
                    }
                    gemm(dq + at * Z + h * zd, Z, dS, keys, 1, kc, Z, 1, rows, zd, keys, NULL, NULL);
                    gemm(dkc, Z, dS, 1, keys, qb, Z, 1, keys, zd, rows, added ? dkc : NULL, NULL);
                    gemm(dvc, V, P, 1, keys, db, V, 1, keys, vd, rows, added ? dvc : NULL, NULL);
                }
            }
        }
    }
}

// Cross-entropy in nats: losses = log sum exp(logits) - logits[target], 0 where the target is IGNORE.
// losses (rows) | logits (rows,vocab) | targets (rows)
enum { IGNORE = -100 };
void crossentropy_forward(float* losses, const float* logits, const int* targets, size_t rows, int vocab) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        const float* x = logits + r * vocab;
        float top = -INFINITY;
        double sum = 0;
        if (targets[r] == IGNORE) { losses[r] = 0; continue; }
        for (int i = 0; i < vocab; i++) { top = x[i] > top ? x[i] : top; }
        OMP(omp simd reduction(+:sum))
        for (int i = 0; i < vocab; i++) { sum += exp_fast(x[i] - top); }
        losses[r] = log(sum) + ((double)top - x[targets[r]]);
    }
}

// In place: logits become dlogits = (softmax(logits) - onehot(target)) * dloss, 0 where the target is IGNORE.
void crossentropy_backward(float* logits, const float* losses, const int* targets, float dloss,
                           size_t rows, int vocab) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        float* x = logits + r * vocab;
        if (targets[r] == IGNORE) { memset(x, 0, vocab * sizeof(float)); continue; }
        float lse = losses[r] + x[targets[r]];
        for (int i = 0; i < vocab; i++) { x[i] = exp_fast(x[i] - lse) * dloss; }
        x[targets[r]] -= dloss;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

// What one call hands to the next: all that is left of the past. With it, any number of tokens is processed in constant
// memory, with the result of one call on all of them. Slot l of each array belongs to layer l.
typedef struct {
    int B, pos;      // batch rows; timesteps in the current chunk so far
    size_t bytes;    // of norm and h; all four arrays are one block
    NormState* norm; // (L+1,B,G) timestep norms; slot L is output.final_norm's
    float* h;        // (L,B,D,N,2) CEMA
    float *k, *v;    // (L,B,c,Z) and (L,B,c,V): keys and values of the current chunk; NULL if calls end where chunks do
} State;

typedef struct {
    Config config;
    Spec specs[NUM_PARAMS];
    size_t num_parameters;
    Params params, grads;    // each one block of num_parameters floats that starts at .embed
    size_t first, last;      // this rank's shard of the parameters
    float *adam_m, *adam_v;  // (last - first): their moments (ZeRO-1: no rank has those of other shards)
    float* rotations;        // (c,Z/H/2,2): cos and sin of the rotary angles
} Model;

// The memory of a forward pass over (B,T) tokens, and of its backward pass if keep is not KEEP_NONE.
typedef struct {
    int B, T, keep;
    Spec specs[NUM_ACTS], dspecs[NUM_ACTS];
    Acts acts, grads;
    State before; // training where ranks hold slices of T timesteps: what comes before this one's; else empty
    Masks masks;
} Pass;

// Refuses what no model can be.
void config_check(const Config* c) {
    int D = c->model_dim, G = c->norm_num_groups, H = c->num_heads, Z = c->z_dim, V = c->value_dim;
    if (D % G) { die("model_dim %d must be divisible by norm_num_groups %d", D, G); }
    if (Z % (2 * H)) { die("z_dim %d must be divisible by 2 num_heads = %d (rotary pairs)", Z, 2 * H); }
    if (V % H) { die("value_dim %d must be divisible by num_heads %d", V, H); }
}

void model_alloc(Model* m, const Config* c, bool training) {
    config_check(c);
    memset(m, 0, sizeof(*m));
    m->config = *c;
    param_specs(m->specs, c);
    m->num_parameters = specs_size(m->specs, NUM_PARAMS);
    m->first = shard_start(m->num_parameters, ranks.rank); m->last = shard_start(m->num_parameters, ranks.rank + 1);
    specs_place(&m->params, (float*)xcalloc(m->num_parameters, sizeof(float)), m->specs, NUM_PARAMS);
    if (training) {
        specs_place(&m->grads, (float*)xcalloc(m->num_parameters, sizeof(float)), m->specs, NUM_PARAMS);
        m->adam_m = (float*)xcalloc(m->last - m->first, sizeof(float));
        m->adam_v = (float*)xcalloc(m->last - m->first, sizeof(float));
    }
    int zd = c->z_dim / c->num_heads;
    m->rotations = (float*)xcalloc((size_t)c->chunk_size * zd, sizeof(float));
    for (int t = 0; t < c->chunk_size; t++) {
        for (int j = 0; j < zd; j += 2) { // frequency and angle are formed in fp32, as the released code does
            float frequency = 1.0f / (float)pow(c->rope_base, (double)j / zd), angle = t * frequency;
            m->rotations[(size_t)t * zd + j] = cos(angle);
            m->rotations[(size_t)t * zd + j + 1] = sin(angle);
        }
    }
}

void model_free(Model* m) {
    free(m->params.embed); free(m->grads.embed); free(m->adam_m); free(m->adam_v); free(m->rotations);
}

void state_alloc(State* s, const Config* c, int B, bool cache) {
    size_t layers = c->num_layers, norms = (layers + 1) * B * c->norm_num_groups;
    size_t h = layers * B * c->model_dim * c->cema_ndim * 2, chunks = cache ? layers * B * c->chunk_size : 0;
    s->B = B; s->pos = 0; s->bytes = norms * sizeof(NormState) + h * sizeof(float);
    s->norm = (NormState*)xcalloc(s->bytes / sizeof(float) + chunks * (c->z_dim + c->value_dim), sizeof(float));
    s->h = (float*)(s->norm + norms);
    s->k = cache ? s->h + h : NULL;
    s->v = cache ? s->k + chunks * c->z_dim : NULL;
}

void state_free(State* s) { free(s->norm); }
void state_reset(State* s) { memset(s->norm, 0, s->bytes); s->pos = 0; } // back to the empty past

// keep_grads: KEEP_NONE, or KEEP_ALL where a test wants to see the gradients of every layer's activations.
void pass_alloc(Pass* s, const Config* c, int B, int T, int keep, int keep_grads) {
    memset(s, 0, sizeof(*s));
    s->B = B; s->T = T; s->keep = keep;
    act_specs(s->specs, c, (size_t)B * T, keep);
    act_specs(s->dspecs, c, (size_t)B * T, keep_grads);
    specs_place(&s->acts, (float*)xcalloc(specs_size(s->specs, NUM_ACTS), sizeof(float)), s->specs, NUM_ACTS);
    if (keep == KEEP_NONE) { return; }
    specs_place(&s->grads, (float*)xcalloc(specs_size(s->dspecs, NUM_ACTS), sizeof(float)), s->dspecs, NUM_ACTS);
    if (ranks.chunks > 1) { state_alloc(&s->before, c, B, false); }
}

void pass_free(Pass* s) { free(s->acts.embed); free(s->grads.embed); state_free(&s->before); }

// volatile: gcc 12 vectorizes the rounding away.
ON_GPU_TOO double float_rounded(double x) { volatile float f = x; return f; }

// Rows that start afresh forget the past. The others' statistics become what checkpoints hold of them, floats, so that
// a resumed run goes on with the same bits.
void state_carry(State* s, const Config* c, const bool* fresh) {
    size_t lines = (c->num_layers + (size_t)1) * s->B, G = c->norm_num_groups, h = 2 * c->model_dim * c->cema_ndim;
    for (size_t i = 0; i < lines; i++) {
        bool forget = fresh[i % s->B];
        for (NormState* n = s->norm + i * G; n < s->norm + (i + 1) * G; n++) {
            NormState kept = {float_rounded(n->count), float_rounded(n->mean), float_rounded(n->var)};
            *n = forget ? no_past : kept;
        }
        if (forget && i < lines - s->B) { memset(s->h + i * h, 0, h * sizeof(float)); }
    }
}

State state_layer(const State* s, const Config* c, int l) { // layer l's part of s; all NULL where s is NULL or empty
    State r = {0, 0, 0, NULL, NULL, NULL, NULL};
    if (!s || !s->norm) { return r; }
    size_t slot = (size_t)l * s->B;
    r = *s;
    r.norm += slot * c->norm_num_groups;
    r.h += slot * c->model_dim * c->cema_ndim * 2;
    if (s->k) { r.k += slot * c->chunk_size * c->z_dim; r.v += slot * c->chunk_size * c->value_dim; }
    return r;
}

// Row i of the parameter table, of layer l, as it starts in the released code; a pure function of the seed.
void param_init(float* w, const Spec* s, int i, int l, const Config* c, int seed) {
    int D = c->model_dim;
    double std = s->init == INIT_LINEAR ? 1 / sqrt(3.0 * s->dims[1]) : s->init == INIT_EMBED ? 1 / sqrt(D)
               : s->init == INIT_OMEGA ? 0.25 : s->init == INIT_NORMAL ? 0.2 : s->init == INIT_GAMMA ? 1 : 0;
    double limit = s->init == INIT_EMBED ? 3 : s->init == INIT_OMEGA ? 4 : INFINITY; // in standard deviations
    uint64_t stream = (uint64_t)i << 32 | l;
    OMP(omp parallel for schedule(static))
    for (size_t j = 0; j < s->size; j++) {
        bool drawn = std > 0 && !(s->init == INIT_GAMMA && j % 2); // the imaginary part of gamma is 0
        w[j] = drawn ? std * random_normal(seed, stream, j, limit) : s->init == INIT_RESCALE ? 0.1 * pow(0.5, l) : 0;
    }
    for (int j = 0; s->init == INIT_THETA && j < D; j++) { // sigmoid(theta) = D^(-i/D), i in random order
        int other = random_bits(seed, stream, j) % (j + 1);
        double turn = exp(-(j + 1) * log(D) / D);
        w[j] = w[other];
        w[other] = log(turn / (1.0 - turn));
    }
}

void model_init(Model* m, int seed) {
    for (int i = 0; i < NUM_PARAMS; i++) {
        const Spec* s = &m->specs[i];
        for (int l = 0; s->size && l < s->slots; l++) {
            param_init(((float**)&m->params)[i] + l * s->size, s, i, l, &m->config, seed);
        }
    }
}

Params params_layer(const Model* m, Params p, int l) { specs_layer(&p, m->specs, NUM_PARAMS, l); return p; }
Acts acts_layer(const Spec* specs, Acts a, int l) { specs_layer(&a, specs, NUM_ACTS, l); return a; }

// The output of layer l - 1, or of the embedding.
float* block_input(const Spec* specs, Acts a, int l) { return l ? acts_layer(specs, a, l - 1).out : a.embed; }

// One block, Figure 3 of the paper: x (B,T,D) to out (B,T,D). start and end: see State; either may be NULL.
void block_forward(const Model* m, const Pass* s, int l, const State* start, State* end) {
    const Config* c = &m->config;
    int B = s->B, T = s->T, D = c->model_dim, H = c->num_heads, Z = c->z_dim, V = c->value_dim, F = c->ffn_hidden_dim;
    int pos = start ? start->pos : 0;
    float eps = c->norm_eps;
    size_t rows = (size_t)B * T;
    const float* x = block_input(s->specs, s->acts, l);
    Params p = params_layer(m, m->params, l);
    Acts a = acts_layer(s->specs, s->acts, l);
    Dropouts drop = dropouts_at(s->masks, T, l);
    State in = state_layer(start, c, l), next = state_layer(end, c, l), before = state_layer(&s->before, c, l);

    // Long memory: n = timestep_norm(x), e = cema(n), m = rms_norm(e).
    timestepnorm_forward(a.timenorm, a.timenorm_mean, a.timenorm_rstd, next.norm, before.norm, in.norm, x, p.timenorm_w,
                         p.timenorm_b, B, T, D, c->norm_num_groups, eps);
    cema_forward(a.cema, next.h, before.h, in.h, a.timenorm, p.cema_alpha, p.cema_delta, p.cema_theta, p.cema_gamma,
                 p.cema_omega, B, T, D, c->cema_ndim);
    norm_forward(a.rmsnorm, NULL, a.rmsnorm_rstd, a.cema, p.rmsnorm_w, NULL, rows, D, eps);
    dropout(a.rmsnorm, a.rmsnorm, NULL, drop.rmsnorm, rows, D);

    // Short memory: attention inside the chunk. Queries and keys see the past through m; values are made from n, what
    // is new at this timestep (eq. 16): the moving average says where to look, but does not blur what is found there.
    matmul_forward(a.wz, a.rmsnorm, p.wz, p.wz_b, NULL, rows, D, Z);
    norm_forward(a.znorm, NULL, a.znorm_rstd, a.wz, NULL, NULL, rows * H, Z / H, eps);
    qk_forward(a.q, a.k, a.znorm, p.gamma, p.beta, m->rotations, B, T, pos, c->chunk_size, Z, H);
    matmul_forward(a.wv, a.timenorm, p.wv, p.wv_b, NULL, rows, D, V);
    silu_forward(a.v, a.wv, NULL, rows * V);
    int keys = next.k ? c->chunk_size : T;
    for (int b = 0; next.k && b < B; b++) { // streaming: attend to the cache, after adding these timesteps to it
        memcpy(next.k + ((size_t)b * keys + pos) * Z, a.k + (size_t)b * T * Z, sizeof(float) * T * Z);
        memcpy(next.v + ((size_t)b * keys + pos) * V, a.v + (size_t)b * T * V, sizeof(float) * T * V);
    }
    attention_forward(a.attention, a.attention_lse, a.q, next.k ? next.k : a.k, next.k ? next.v : a.v, B, T, keys, pos,
                      c->chunk_size, H, Z, V, drop.keys);

    // The gate r = silu(m Wr^T + br), and the first hop: y = m Wh1^T + bh1 + (o*r) Wh2^T + x. What dropout leaves of a
    // sum, it adds to x; without dropout the product does.
    matmul_forward(a.wr, a.rmsnorm, p.wr, p.wr_b, NULL, rows, D, V);
    silu_forward(a.gated, a.wr, a.attention, rows * V);
    dropout(a.gated, a.gated, NULL, drop.gated, rows, V);
    matmul_forward(a.mega, a.rmsnorm, p.wh1, p.wh1_b, drop.mega.drop ? NULL : x, rows, D, D);
    matmul_forward(a.mega, a.gated, p.wh2, NULL, a.mega, rows, V, D);
    dropout(a.mega, a.mega, x, drop.mega, rows, D);

    // Feed-forward, and the second hop: out = ffn(layer_norm(y)) + x. It is x that is added, not y (eq. 11).
    norm_forward(a.norm, a.norm_mean, a.norm_rstd, a.mega, p.norm_w, p.norm_b, rows, D, eps);
    matmul_forward(a.fc1, a.norm, p.fc1, NULL, NULL, rows, D, F);
    if (c->swiglu) { matmul_forward(a.fc3, a.norm, p.fc3, NULL, NULL, rows, D, F); }
    silu_forward(a.hidden, a.fc1, c->swiglu ? a.fc3 : NULL, rows * F);
    dropout(a.hidden, a.hidden, NULL, drop.hidden, rows, F);
    const float* add = c->rescale_nffn ? NULL : x;
    float* ffn = c->rescale_nffn ? a.fc2 : a.out;
    matmul_forward(ffn, a.hidden, p.fc2, NULL, drop.fc2.drop ? NULL : add, rows, F, D);
    dropout(ffn, ffn, add, drop.fc2, rows, D);
    for (size_t i = 0; !add && i < rows * D; i++) { a.out[i] = x[i] + a.fc2[i] * p.rescale[i % D]; }
}

// From dout to dx. dstart receives the gradient of the state before these timesteps if not NULL. Until CEMA's backward
// pass d.timenorm is free to hold gradients behind dropout; d.fc1 and d.wr hold theirs where their own will stand.
void block_backward(const Model* m, const Pass* s, int l, const State* start, State* dstart) {
    const Config* c = &m->config;
    int B = s->B, T = s->T, D = c->model_dim, H = c->num_heads, Z = c->z_dim, V = c->value_dim, F = c->ffn_hidden_dim;
    size_t rows = (size_t)B * T;
    const float* x = block_input(s->specs, s->acts, l);
    float* dx = block_input(s->dspecs, s->grads, l);
    Params p = params_layer(m, m->params, l), g = params_layer(m, m->grads, l);
    Acts a = acts_layer(s->specs, s->acts, l), d = acts_layer(s->dspecs, s->grads, l);
    Dropouts drop = dropouts_at(s->masks, T, l);
    State in = state_layer(s->before.norm ? &s->before : start, c, l), din = state_layer(dstart, c, l);

    for (size_t i = 0; c->rescale_nffn && i < rows * D; i++) {
        g.rescale[i % D] += d.out[i] * a.fc2[i];
        d.fc2[i] = d.out[i] * p.rescale[i % D];
    }
    const float* dffn = dropout(d.timenorm, c->rescale_nffn ? d.fc2 : d.out, NULL, drop.fc2, rows, D);
    matmul_backward(d.hidden, g.fc2, NULL, dffn, a.hidden, p.fc2, NULL, rows, F, D);
    const float* dhidden = dropout(d.fc1, d.hidden, NULL, drop.hidden, rows, F);
    silu_backward(d.fc1, c->swiglu ? d.fc3 : NULL, dhidden, a.fc1, c->swiglu ? a.fc3 : NULL, rows * F);
    matmul_backward(d.norm, g.fc1, NULL, d.fc1, a.norm, p.fc1, NULL, rows, D, F);
    if (c->swiglu) { matmul_backward(d.norm, g.fc3, NULL, d.fc3, a.norm, p.fc3, d.norm, rows, D, F); }
    norm_backward(d.mega, g.norm_w, g.norm_b, d.norm, a.norm_mean, a.norm_rstd, a.mega, p.norm_w, rows, D);

    const float* dsum = dropout(d.timenorm, d.mega, NULL, drop.mega, rows, D);
    matmul_backward(d.gated, g.wh2, NULL, dsum, a.gated, p.wh2, NULL, rows, V, D);
    matmul_backward(d.rmsnorm, g.wh1, g.wh1_b, dsum, a.rmsnorm, p.wh1, NULL, rows, D, D);
    const float* dgated = dropout(d.wr, d.gated, NULL, drop.gated, rows, V);
    silu_backward(d.wr, d.attention, dgated, a.wr, a.attention, rows * V);
    matmul_backward(d.rmsnorm, g.wr, g.wr_b, d.wr, a.rmsnorm, p.wr, d.rmsnorm, rows, D, V);

    attention_backward(d.q, d.k, d.v, d.attention, a.attention_lse, a.q, a.k, a.v, B, T, c->chunk_size, H, Z, V,
                       drop.keys);
    qk_backward(d.znorm, g.gamma, g.beta, d.q, d.k, a.znorm, p.gamma, m->rotations, B, T, c->chunk_size, Z, H);
    norm_backward(d.wz, NULL, NULL, d.znorm, NULL, a.znorm_rstd, a.wz, NULL, rows * H, Z / H);
    matmul_backward(d.rmsnorm, g.wz, g.wz_b, d.wz, a.rmsnorm, p.wz, d.rmsnorm, rows, D, Z);

    const float* dm = dropout(d.timenorm, d.rmsnorm, NULL, drop.rmsnorm, rows, D);
    norm_backward(d.cema, g.rmsnorm_w, NULL, dm, NULL, a.rmsnorm_rstd, a.cema, p.rmsnorm_w, rows, D);
    cema_backward(d.timenorm, g.cema_alpha, g.cema_delta, g.cema_theta, g.cema_gamma, g.cema_omega, din.h, d.cema, in.h,
                  a.timenorm, p.cema_alpha, p.cema_delta, p.cema_theta, p.cema_gamma, p.cema_omega, B, T, D,
                  c->cema_ndim, NULL);
    silu_backward(d.wv, NULL, d.v, a.wv, NULL, rows * V);
    matmul_backward(d.timenorm, g.wv, g.wv_b, d.wv, a.timenorm, p.wv, d.timenorm, rows, D, V);

    // x has three readers: the second hop, the first hop and the timestep norm. (dx may be d.out itself.)
    OMP(omp parallel for schedule(static))
    for (size_t i = 0; i < rows * D; i++) { dx[i] = d.out[i] + d.mega[i]; }
    timestepnorm_backward(dx, g.timenorm_w, g.timenorm_b, din.norm, d.timenorm, a.timenorm_mean, a.timenorm_rstd,
                          in.norm, x, p.timenorm_w, B, T, D, c->norm_num_groups, NULL);
}

const float* output_weight(const Model* m, Params p) { return m->config.share_emb ? p.embed : p.output; }
float embedding_scale(const Config* c) { return c->scale_emb ? sqrt(c->model_dim) : 1.0; }

// tokens (B,T) to s->acts.logits (B,T,vocab). start: the past, NULL for none; end: receives the state after the tokens,
// may be NULL or start. When end has a cache for attention, all tokens must belong to one chunk: start->pos + T <= c.
void model_forward(const Model* m, const Pass* s, const int* tokens, const State* start, State* end) {
    const Config* c = &m->config;
    int B = s->B, T = s->T, D = c->model_dim, L = c->num_layers;
    size_t rows = (size_t)B * T;
    Acts a = s->acts;
    embedding_forward(a.embed, tokens, m->params.embed, embedding_scale(c), rows, D);
    dropout(a.embed, a.embed, NULL, dropouts_at(s->masks, T, 0).embed, rows, D);
    for (int l = 0; l < L; l++) { block_forward(m, s, l, start, end); }
    timestepnorm_forward(a.final, a.final_mean, a.final_rstd, state_layer(end, c, L).norm,
                         state_layer(&s->before, c, L).norm, state_layer(start, c, L).norm, block_input(s->specs, a, L),
                         m->params.final_w, m->params.final_b, B, T, D, c->norm_num_groups, c->norm_eps);
    matmul_forward(a.logits, a.final, output_weight(m, m->params), NULL, NULL, rows, D, c->vocab_size);
    if (end) { end->pos = ((start ? start->pos : 0) + T) % c->chunk_size; }
}

// Sum of the losses of the last forward pass in nats; *scored grows by the number of targets that are not IGNORE.
double model_loss(const Model* m, const Pass* s, const int* targets, size_t* scored) {
    size_t rows = (size_t)s->B * s->T;
    double sum = 0;
    crossentropy_forward(s->acts.losses, s->acts.logits, targets, rows, m->config.vocab_size);
    for (size_t r = 0; r < rows; r++) { sum += s->acts.losses[r]; *scored += targets[r] != IGNORE; }
    return sum;
}

// Adds to m->grads the gradient of dloss * (sum of losses), after model_forward and model_loss.
void model_backward(const Model* m, const Pass* s, const int* tokens, const int* targets, float dloss,
                    const State* start, State* dstart) {
    const Config* c = &m->config;
    int B = s->B, T = s->T, D = c->model_dim, L = c->num_layers;
    size_t rows = (size_t)B * T;
    Acts a = s->acts, d = s->grads;
    float* dx = block_input(s->dspecs, d, L);
    crossentropy_backward(a.logits, a.losses, targets, dloss, rows, c->vocab_size);
    matmul_backward(d.final, (float*)output_weight(m, m->grads), NULL, a.logits, a.final, output_weight(m, m->params),
                    NULL, rows, D, c->vocab_size);
    memset(dx, 0, sizeof(float) * rows * D);
    timestepnorm_backward(dx, m->grads.final_w, m->grads.final_b, state_layer(dstart, c, L).norm, d.final, a.final_mean,
                          a.final_rstd, state_layer(s->before.norm ? &s->before : start, c, L).norm,
                          block_input(s->specs, a, L), m->params.final_w, B, T, D, c->norm_num_groups, NULL);
    for (int l = L - 1; l >= 0; l--) { // with --recompute, only the last layer's activations are still there
        if (s->keep == KEEP_BLOCKS && l < L - 1) { block_forward(m, s, l, start, NULL); }
        block_backward(m, s, l, start, dstart);
    }
    const float* dembed = dropout(a.embed, d.embed, NULL, dropouts_at(s->masks, T, 0).embed, rows, D);
    embedding_backward(m->grads.embed, dembed, tokens, embedding_scale(c), rows, D);
}

// Adds up the gradients of all ranks, each in its shard, and returns their global L2 norm. Partial sums over fixed
// blocks, added in order.
double model_grad_norm(const Model* m) {
    enum { BLOCK = 1 << 16 };
    size_t n = m->last - m->first, blocks = (n + BLOCK - 1) / BLOCK;
    double *partial = (double*)xcalloc(blocks, sizeof(double)), sum = 0;
    const float* g = m->grads.embed + m->first;
    shards_exchange(m->grads.embed, m->num_parameters, SUM_SHARD);
    OMP(omp parallel for schedule(static))
    for (size_t b = 0; b < blocks; b++) {
        double s = 0;
        for (size_t i = b * BLOCK; i < min_size(n, (b + 1) * BLOCK); i++) { s += (double)g[i] * g[i]; }
        partial[b] = s;
    }
    for (size_t b = 0; b < blocks; b++) { sum += partial[b]; }
    all_sum(&sum, 1);
    free(partial);
    return sqrt(sum);
}

// AdamW as in PyTorch: w -= lr decay w, then w -= lr m_hat / (sqrt(v_hat) + eps); gradients are times grad_scale, steps
// count from 1. Every parameter decays, the norms' too. Plus-1 (eq. 23) makes that right and needs no line here: scales
// are stored as offsets from 1, so decay draws them to 1, not to 0, where they would shut the layer off (appendix B.2).
void model_update(Model* m, const Options* o, double lr, int step, double grad_scale) {
    float *w = m->params.embed + m->first, *g = m->grads.embed + m->first, *m1 = m->adam_m, *m2 = m->adam_v;
    float beta1 = o->beta1, beta2 = o->beta2, eps = o->adam_eps, scale = grad_scale;
    float keep = 1.0 - lr * o->weight_decay, size = lr / (1.0 - pow(o->beta1, step));
    float correction = 1.0 / sqrt(1.0 - pow(o->beta2, step)), beta1c = 1.0 - o->beta1, beta2c = 1.0 - o->beta2;
    OMP(omp parallel for schedule(static))
    for (size_t i = 0; i < m->last - m->first; i++) {
        float grad = g[i] * scale;
        m1[i] = beta1 * m1[i] + beta1c * grad;
        m2[i] = beta2 * m2[i] + beta2c * grad * grad;
        w[i] = w[i] * keep - size * m1[i] / (sqrtf(m2[i]) * correction + eps);
    }
    shards_exchange(m->params.embed, m->num_parameters, GATHER_SHARDS);
}

// PyTorch's clip_grad_norm_: what to multiply gradients of this norm by. limit 0 is none.
double clip_scale(double norm, double limit) { return limit > 0 && norm + 1e-6 > limit ? limit / (norm + 1e-6) : 1; }

// ---------------------------------------------------------------------------------------------------------------------
// Backends: what training, evaluation and generation ask of a device. Here the CPU's, in train_megalodon.cu the GPU's

enum { WEIGHTS, ADAM_M, ADAM_V, STATES, NUM_BLOCKS }; // blocks of tensors in a checkpoint
enum { CARRIED_NORM = STATES, CARRIED_H };            // of these, with --carry, a backend knows two
static const char* block_prefixes[NUM_BLOCKS] = {"", "adam_m.", "adam_v.", "state."};

typedef struct {
    void* self;        // handed to all functions below
    const char* name;  // of the device
    double peak;       // FLOP/s it could do at most, dense; 0 where unknown
    int stream_tokens; // most that one call of stream may take
    double (*memory_needed)(void* self, const Options* o); // bytes that training takes
    void (*open)(void* self, const Options* o, bool training); // takes all memory, or refuses
    void (*close)(void* self);
    // Copies row i of the parameter table, layer l, between `host` and a block: into the weights all of it, else only
    // the elements [part[0],part[1]) that are in this rank's shard. Of CARRIED_*: layer l of micro-step i, whole.
    void (*copy)(void* self, int block, int i, int l, void* host, bool to_host, size_t part[2]);
    // Adds the gradient of dloss * (sum of losses) of --batch x --seq tokens; the first of a step starts a new sum.
    // row: number of the first sequence, counted from the start of training; for dropout. With fresh, rows go on from
    // what this micro-step left in the last step, unless they start afresh. May return before the work is done.
    void (*micro_step)(void* self, const int* tokens, const int* targets, double dloss, bool first, uint64_t row,
                       const bool* fresh);
    double (*finish_step)(void* self, double* loss); // norm of the gradient; sum of dloss * losses over the micro-steps
    void (*update)(void* self, const Options* o, double lr, int step, double grad_scale); // AdamW; waits for its end
    // T tokens, all in one chunk, that follow those streamed since the last reset; their losses, if targets is not
    // NULL. To generate, there are --samples streams: tokens (samples,T), with T = 1; NULL for those drawn.
    void (*stream)(void* self, const int* tokens, int T, const int* targets, float* losses);
    // Draws what follows the last token of each stream, with random numbers `index` of key + the stream's number << 32.
    void (*draw)(void* self, const Options* o, uint64_t key, int index);
    const int* (*drawn)(void* self); // (samples); waits for them
    void (*reset)(void* self);
} Backend;

enum { STREAM_TOKENS = 512 };
typedef struct { Model m; Pass pass, stream; State state, next, *carried; int micro, accum, *drawn; double loss; } Cpu;

// Weights, gradients, a shard of both moments; activations and their gradients; the stream's.
double cpu_memory_needed(void* self, const Options* o) {
    Spec params[NUM_PARAMS], acts[NUM_ACTS], shared[NUM_ACTS]; // of one timestep
    (void)self;
    param_specs(params, &o->model);
    act_specs(acts, &o->model, 1, o->recompute ? KEEP_BLOCKS : KEEP_ALL);
    act_specs(shared, &o->model, 1, KEEP_NONE);
    double rows = (double)o->batch * o->seq / ranks.chunks, streamed = min_int(o->model.chunk_size, STREAM_TOKENS);
    double each = specs_size(acts, NUM_ACTS), once = specs_size(shared, NUM_ACTS), blocks = 2 + 2.0 / ranks.count;
    double carried = o->carry ? 2.0 * o->model.num_layers * o->model.model_dim * o->model.cema_ndim * o->batch : 0;
    return sizeof(float) * (blocks * specs_size(params, NUM_PARAMS) + rows * (each + once) + streamed * once
                            + (o->accum + 1) * carried);
}

void cpu_open(void* self, const Options* o, bool training) {
    Cpu* r = (Cpu*)self;
    const Config* c = &o->model;
    model_alloc(&r->m, c, training);
    int keep = o->recompute ? KEEP_BLOCKS : KEEP_ALL;
    if (training) { pass_alloc(&r->pass, c, o->batch, o->seq / ranks.chunks, keep, KEEP_NONE); }
    r->pass.masks = masks_of(o);
    int B = o->generate ? o->samples : 1, T = o->generate ? 1 : min_int(c->chunk_size, STREAM_TOKENS);
    pass_alloc(&r->stream, c, B, T, KEEP_NONE, KEEP_NONE);
    state_alloc(&r->state, c, B, true);
    r->drawn = (int*)xcalloc(B, sizeof(int));
    if (!training || !o->carry) { return; }
    r->carried = (State*)xcalloc(r->accum = o->accum, sizeof(State));
    state_alloc(&r->next, c, o->batch, false);
    for (int i = 0; i < o->accum; i++) { state_alloc(&r->carried[i], c, o->batch, false); }
}

void cpu_close(void* self) {
    Cpu* r = (Cpu*)self;
    model_free(&r->m); pass_free(&r->pass); pass_free(&r->stream); state_free(&r->state); state_free(&r->next);
    for (int i = 0; i < r->accum; i++) { state_free(&r->carried[i]); }
    free(r->carried); free(r->drawn);
}

void cpu_copy(void* self, int block, int i, int l, void* host, bool to_host, size_t part[2]) {
    Cpu* r = (Cpu*)self;
    Model* m = &r->m;
    if (block >= STATES) {
        State s = state_layer(&r->carried[i], &m->config, l);
        void* here = block == CARRIED_NORM ? (void*)s.norm : s.h;
        size_t bytes = block == CARRIED_NORM ? sizeof(NormState) * s.B * m->config.norm_num_groups
                                             : sizeof(float) * s.B * m->config.model_dim * m->config.cema_ndim * 2;
        memcpy(to_host ? host : here, to_host ? here : host, bytes);
        return;
    }
    float *here = ((float**)&m->params)[i] + l * m->specs[i].size, *there = (float*)host;
    size_t size = m->specs[i].size, at = here - m->params.embed;
    bool all = block == WEIGHTS && !to_host;
    part[0] = !all && m->first > at ? min_size(m->first - at, size) : 0;
    part[1] = all ? size : m->last > at ? min_size(m->last - at, size) : 0;
    if (block != WEIGHTS) { here = (block == ADAM_M ? m->adam_m : m->adam_v) + at - m->first; }
    float *to = to_host ? there : here, *from = to_host ? here : there;
    memcpy(to + part[0], from + part[0], (part[1] - part[0]) * sizeof(float));
}

void cpu_micro_step(void* self, const int* tokens, const int* targets, double dloss, bool first, uint64_t row,
                    const bool* fresh) {
    Cpu* r = (Cpu*)self;
    size_t scored = 0;
    r->pass.masks.row = row;
    if (first) { memset(r->m.grads.embed, 0, r->m.num_parameters * sizeof(float)); r->loss = 0; }
    r->micro = first ? 0 : r->micro + 1;
    State *past = fresh ? &r->carried[r->micro] : NULL, *next = fresh ? &r->next : NULL;
    if (fresh) { state_carry(past, &r->m.config, fresh); }
    model_forward(&r->m, &r->pass, tokens, past, next);
    r->loss += model_loss(&r->m, &r->pass, targets, &scored) * dloss;
    model_backward(&r->m, &r->pass, tokens, targets, dloss, past, NULL);
    if (!fresh) { return; }
    State s = *past; *past = *next; *next = s;
    share_last(past->norm, past->bytes);
}

double cpu_finish_step(void* self, double* loss) {
    *loss = ((Cpu*)self)->loss;
    all_sum(loss, 1);
    return model_grad_norm(&((Cpu*)self)->m);
}

void cpu_update(void* self, const Options* o, double lr, int step, double grad_scale) {
    model_update(&((Cpu*)self)->m, o, lr, step, grad_scale);
}

void cpu_stream(void* self, const int* tokens, int T, const int* targets, float* losses) {
    Cpu* r = (Cpu*)self;
    r->stream.T = T;
    model_forward(&r->m, &r->stream, tokens ? tokens : r->drawn, &r->state, &r->state);
    if (targets) { crossentropy_forward(losses, r->stream.acts.logits, targets, T, r->m.config.vocab_size); }
}

int larger_first(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return (x < y) - (x > y);
}
// Draws a token from softmax(logits / temperature), logits (vocab), cut to the top_k likeliest ones and then to the
// likeliest that hold top_p together, those as likely as the last included; u is uniform in [0,1). NaN is never drawn.
int sample(const float* logits, int vocab, const Options* o, double u) {
    enum { PART = 256 }; // of the vocabulary: sums of parts find the token
    int n = 0, i = 0, k = 0, id, parts = (vocab + PART - 1) / PART;
    float top = -INFINITY, scale = fmin(1 / o->temperature, 1e30);
    OMP(omp simd reduction(max : top))
    for (int v = 0; v < vocab; v++) { top = logits[v] > top ? logits[v] : top; }
    for (; o->temperature == 0 && i < vocab - 1 && logits[i] != top; i++) { }
    if (o->temperature == 0) { return i; }
    float *p = (float*)xcalloc(vocab, sizeof(float)), *sorted = (float*)xcalloc(vocab, sizeof(float));
    double *sums = (double*)xcalloc(parts, sizeof(double)), sum = 0, kept = 0;
    OMP(omp simd reduction(+ : sum))
    for (int v = 0; v < vocab; v++) {
        float x = exp_fast((logits[v] - top) * scale);
        p[v] = x >= 0 ? x : 0; sum += p[v];
    }
    if (o->top_k || o->top_p < 1) {
        double least = o->top_k ? 0 : (1 - o->top_p) * sum / vocab; // what is below, all together, is more than enough
        for (int v = 0; v < vocab; v++) { if (p[v] >= least) { sorted[n++] = p[v]; } }
        qsort(sorted, n, sizeof(float), larger_first);
        for (k = 0; o->top_k && k < n && (k < o->top_k || sorted[k] == sorted[k - 1]); k++) { kept += sorted[k]; }
        if (o->top_k) { n = k; sum = kept; kept = 0; }
        for (i = 0; i < n && (i == 0 || kept < o->top_p * sum); i++) { kept += sorted[i]; }
        for (int v = 0; v < vocab; v++) { p[v] = p[v] >= sorted[i - 1] ? p[v] : 0; }
    }
    for (k = 0, sum = 0; k < parts; k++) {
        double part = 0;
        OMP(omp simd reduction(+ : part))
        for (int v = k * PART; v < min_int(vocab, (k + 1) * PART); v++) { part += p[v]; }
        sums[k] = part; sum += part;
    }
    for (k = 0, u *= sum; k < parts - 1 && u >= sums[k]; k++) { u -= sums[k]; }
    for (id = k * PART; id < vocab - 1 && u >= p[id]; id++) { u -= p[id]; }
    free(p); free(sorted); free(sums);
    return id;
}
void cpu_draw(void* self, const Options* o, uint64_t key, int index) {
    Cpu* r = (Cpu*)self;
    int vocab = o->model.vocab_size;
    OMP(omp parallel for schedule(dynamic) if (r->stream.B > 1))
    for (int b = 0; b < r->stream.B; b++) {
        double u = random_uniform(o->seed, key + ((uint64_t)b << 32), index);
        r->drawn[b] = sample(r->stream.acts.logits + (size_t)b * vocab, vocab, o, u);
    }
}
const int* cpu_drawn(void* self) { return ((Cpu*)self)->drawn; }

void cpu_reset(void* self) { state_reset(&((Cpu*)self)->state); }

Backend cpu_backend(Cpu* r) {
    Backend b = {r, "CPU", 0, STREAM_TOKENS, cpu_memory_needed, cpu_open, cpu_close, cpu_copy, cpu_micro_step,
                 cpu_finish_step, cpu_update, cpu_stream, cpu_draw, cpu_drawn, cpu_reset};
    memset(r, 0, sizeof(*r));
    return b;
}

// ---------------------------------------------------------------------------------------------------------------------
// Options as text: the command line, the metadata of files, the printed configuration

enum { INT, REAL, BOOL, TEXT, FLAG };
enum { MODEL_GROUP, TOKEN_GROUP, TRAINING_GROUP, MODE_GROUP };
#define MODEL_ROW(kind, name, value, ...)    {#name, kind, MODEL_GROUP, offsetof(Options, model.name), __VA_ARGS__},
#define TOKEN_ROW(kind, name, value, ...)    {#name, kind, TOKEN_GROUP, offsetof(Options, name), __VA_ARGS__},
#define TRAINING_ROW(kind, name, value, ...) {#name, kind, TRAINING_GROUP, offsetof(Options, name), __VA_ARGS__},
#define MODE_ROW(kind, name, value, ...)     {#name, kind, MODE_GROUP, offsetof(Options, name), __VA_ARGS__},
typedef struct { const char* name; int kind, group; size_t offset; double low, high; const char* help; } OptionRow;
static const OptionRow option_rows[] = {
    MODEL_OPTIONS(MODEL_ROW) TOKEN_OPTIONS(TOKEN_ROW) TRAINING_OPTIONS(TRAINING_ROW) MODE_OPTIONS(MODE_ROW)
};
enum { NUM_OPTIONS = sizeof(option_rows) / sizeof(option_rows[0]) };

// The value of option i as text that option_set reads back exactly.
const char* option_text(const Options* o, int i) {
    const char* at = (const char*)o + option_rows[i].offset;
    if (option_rows[i].kind == TEXT) { return *(const char**)at; }
    if (option_rows[i].kind != REAL) { return text_of("%d", *(int*)at); }
    char text[32];
    int digits = 5; // or as many as it takes
    do { snprintf(text, sizeof(text), "%.*g", ++digits, *(double*)at); } while (strtod(text, NULL) != *(double*)at);
    return text_of("%s", text);
}

const char* option_flag(int i) { // --with-dashes
    char* flag = text_of("--%s", option_rows[i].name);
    for (char* s = flag; *s; s++) { *s = *s == '_' ? '-' : *s; }
    return flag;
}

// In files the model's options have their own names, the others a prefix.
const char* option_key(int i) {
    return text_of("%s%s", option_rows[i].group == MODEL_GROUP ? "" : "flag.", option_rows[i].name);
}

// Sets option i from text, which must outlive o. `source`: for the message, the file that the text is from, or "".
void option_set(Options* o, int i, const char* text, const char* source) {
    const OptionRow* row = &option_rows[i];
    char *at = (char*)o + row->offset, *end;
    if (row->kind == TEXT) { *(const char**)at = text; return; }
    errno = 0;
    double x = row->kind == REAL ? strtod(text, &end) : strtol(text, &end, 10);
    if (errno || end == text || *end || isspace((unsigned char)*text) || !(x >= row->low && x <= row->high)) {
        die("%s%s%s \"%s\": expected a %s from %.9g to %.9g", source, *source ? ": " : "", option_flag(i), text,
            row->kind == REAL ? "number" : "whole number", row->low, row->high);
    }
    if (row->kind == REAL) { *(double*)at = x; } else { *(int*)at = x; }
}

void print_help(void) {
    static const char* titles[] = {"The model (a preset first, then any of these):",
                                   "Tokens and documents (--load and --resume remember them):", "Data and training:",
                                   "Where to start, and what to do instead of training:"};
    printf("Trains a Megalodon language model, or evaluates it (--eval), or samples from it (--generate).\n"
           "usage: train_megalodon [--flag value]...\n");
    for (int i = 0, group = -1; i < NUM_OPTIONS; i++) {
        const char* value = option_text(&default_options, i);
        if (option_rows[i].group != group) { printf("\n%s\n", titles[group = option_rows[i].group]); }
        printf("  %-20s %s", option_flag(i), option_rows[i].help);
        bool none = option_rows[i].kind == FLAG || !*value;
        printf(none ? "\n" : strlen(value) > 12 ? "\n%23s(%s)\n" : "%s (%s)\n", "", value);
    }
}

int option_find(const char* word) {
    for (int i = 0; i < NUM_OPTIONS; i++) {
        if (!strcmp(word, option_flag(i))) { return i; }
    }
    die("unknown option \"%s\": --help lists all of them", word);
}

void options_print(const Options* o, bool training, FILE* f) {
    for (int i = 0, column = 0; option_rows[i].group < (training ? MODE_GROUP : TRAINING_GROUP); i++) {
        const char* value = option_text(o, i);
        if (*value) { column += fprintf(f, "%s%s %s", column ? " | " : "", option_rows[i].name, value); }
        bool full = column + strlen(option_rows[i + 1].name) > 96;
        if (full || option_rows[i + 1].group != option_rows[i].group) { column = 0; fputc('\n', f); }
    }
}

#include "data/safetensors.h" // weights and checkpoints: the format, and what of a file is refused
#include "data/tokens.h"      // tokenizers, files of tokens, documents, what losses say about a text

// ---------------------------------------------------------------------------------------------------------------------
// Use: evaluation, generation, training; on any backend

// Adds to `spans` the losses of the documents of d in order, each from an empty past on, every token scored once (the
// first one only after an EOD); and writes them to the file `path` if that is not "". Returns the mean of all in nats.
double evaluate(const Backend* b, const Config* c, const Dataset* d, Span spans[NUM_SPANS], const char* path) {
    int *tokens = (int*)xcalloc(b->stream_tokens + 1, sizeof(int)), T;
    float* losses = (float*)xcalloc(b->stream_tokens, sizeof(float));
    FILE* file = *path ? fopen(path, "wb") : NULL;
    if (*path && !file) { die("--losses %s: %s", path, strerror(errno)); }
    for (const Document* k = d->documents; k < d->documents + d->num_documents; k++) {
        size_t inputs = document_inputs(d, k);
        b->reset(b->self);
        for (size_t at = 0; at < inputs; at += T) {
            T = min_size(inputs - at, min_size(b->stream_tokens, c->chunk_size - at % c->chunk_size));
            document_read(d, k, at, T, tokens, c->vocab_size);
            b->stream(b->self, tokens, T, tokens + 1, losses);
            spans_add(spans, k->size - inputs + at, losses, T);
            if (file) { fwrite(losses, sizeof(float), T, file); } // errors show when it is closed
        }
    }
    if (file && (ferror(file) || fclose(file))) { die("--losses %s: %s", path, strerror(errno)); }
    free(tokens); free(losses);
    Span sum = spans_sum(spans);
    return sum.nats / sum.tokens;
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Prints n tokens that follow the prompt, or up to the end of the document: the first sample as it comes, the others,
// made together with it, after it.
void generate(const Backend* b, const Options* o, const Tokenizer* t, int n, uint64_t stream) {
    int vocab = o->model.vocab_size, B = o->generate ? o->samples : 1, left = 0, going = B;
    int *tokens = (int*)xcalloc((size_t)B * (n + 1), sizeof(int)), *next = (int*)xcalloc(B, sizeof(int));
    int* ends = (int*)xcalloc(B, sizeof(int)); // tokens of each sample, once it is done
    Tokens past = prompt_tokens(o, t);
    b->reset(b->self);
    for (int s = 0; s < B; s++) { ends[s] = n; }
    for (size_t i = 0; i < past.count; i++) {
        for (int s = 0; s < B; s++) { next[s] = past.ids[i]; }
        b->stream(b->self, next, 1, NULL, NULL);
    }
    double started = seconds();
    int i = 0;
    for (; i < n && going; i++) {
        b->draw(b->self, o, ((uint64_t)2 << 56) + stream, i);
        if (i + 1 < n) { b->stream(b->self, NULL, 1, NULL, NULL); } // a GPU goes on while they are looked at
        const int* drawn = b->drawn(b->self);
        for (int s = 0; s < B; s++) {
            tokens[(size_t)s * n + i] = drawn[s];
            if (ends[s] == n && drawn[s] == o->eod) { ends[s] = i; going--; }
        }
        if (i < ends[0]) { token_print(t, vocab, drawn[0], &left); }
    }
    for (int s = 1; s < B; s++) {
        printf("\n----------------\n");
        for (int i = 0; i < ends[s]; i++) { token_print(t, vocab, tokens[(size_t)s * n + i], &left); }
    }
    fflush(stdout);
    double speed = (double)B * i / (seconds() - started);
    if (o->generate) { fprintf(stderr, "\n%d x %d tokens, %.1f tok/s\n", B, i, speed); }
    free(past.ids); free(tokens); free(next); free(ends);
}

// Learning rate of a step counted from 0: linear warmup, then from lr to lr * lr_end_ratio over the rest of the steps.
double learning_rate(const Options* o, int step) {
    if (step < o->warmup) { return o->lr * (step + 1) / o->warmup; }
    double left = 1.0 - (double)(step - o->warmup) / (o->steps - o->warmup);
    double f = !strcmp(o->schedule, "cosine") ? 0.5 * (1.0 - cos(M_PI * left))
             : !strcmp(o->schedule, "linear") ? left : 1.0;
    return o->lr * (o->lr_end_ratio + (1.0 - o->lr_end_ratio) * f);
}

// Set by SIGINT and SIGTERM: finish the step, save, exit 0. A second signal exits at once.
static volatile sig_atomic_t stop_asked;
void on_signal(int number) {
    if (stop_asked) { _exit(128 + number); }
    stop_asked = 1;
}

// Opens DIR/log.tsv to go on after `step`: rows past it, which a killed run may have left, are cut off.
FILE* log_open(const Options* o, int step) {
    const char* path = text_of("%s/log.tsv", o->out);
    char line[1024];
    long end = 0;
    FILE* f = fopen(path, step > 0 ? "a+" : "w+"); // "a" writes at the end, wherever that is by then
    while (f && fgets(line, sizeof(line), f) && strchr(line, '\n') && (!end || atoi(line) <= step)) { end = ftell(f); }
    bool good = f && !ftruncate(fileno(f), end) && !fseek(f, end, SEEK_SET);
    if (good && !end) { fprintf(f, "step\ttokens\tloss\tgrad_norm\tlr\ttok_s\tms\tval_loss\n"); }
    if (!good || fflush(f)) { die("cannot write %s: %s", path, strerror(errno)); }
    return f;
}

// Prints the line of a finished step, and adds it to log.tsv. val is NAN where the step has no validation. peak: of the
// device, in tokens/s, or 0.
void log_step(const Options* o, FILE* log, int step, double loss, double norm, double lr, double ms, double left,
              double val, double peak) {
    double tokens = step_tokens(o), speed = 1e3 * tokens / ms;
    printf("step %d/%d | loss %.4f | norm %.3f | lr %.2e | %.0f tok/s | %.1f ms | %s%d:%02d left\n", step, o->steps,
           loss, norm, lr, speed, ms, peak > 0 ? text_of("%.1f%% of peak | ", 100 * speed / peak) : "", (int)left / 60,
           (int)left % 60);
    if (!isnan(val)) { printf("step %d: val loss %.4f\n", step, val); }
    fflush(stdout);
    if (!log) { return; }
    fprintf(log, "%d\t%.0f\t%.9g\t%.9g\t%.9g\t%.1f\t%.3f\t", step, step * tokens, loss, norm, lr, speed, ms);
    fprintf(log, isnan(val) ? "\n" : "%.9g\n", val);
    if (fflush(log)) { die("cannot write %s/log.tsv: %s", o->out, strerror(errno)); }
}

// FLOPs of a token, forward and backward: 2 + 4 for each weight in a matrix product, and attention's, causal (a chunk's
// mean length is c/2).
double flops_per_token(const Config* c) {
    Spec specs[NUM_PARAMS];
    double weights = (double)c->vocab_size * c->model_dim; // the output layer
    param_specs(specs, c);
    for (int i = 0; i < NUM_PARAMS; i++) {
        if (specs[i].init == INIT_LINEAR && specs[i].dims[1]) { weights += (double)specs[i].slots * specs[i].size; }
    }
    return 6 * weights + 3.0 * c->num_layers * c->chunk_size * (c->z_dim + c->value_dim);
}

void train(const Backend* b, const Options* o, const Spec* specs, int first_step, const Dataset* data,
           const Dataset* held_out) {
    size_t rows = (size_t)o->batch * o->seq / ranks.chunks;
    int *tokens = (int*)xcalloc(rows * o->accum, sizeof(int)), *targets = (int*)xcalloc(rows * o->accum, sizeof(int));
    bool* fresh = (bool*)xcalloc((size_t)o->batch * o->accum, sizeof(bool));
    FILE* log = *o->out && ranks.rank == 0 ? log_open(o, first_step) : NULL;
    signal(SIGINT, on_signal); signal(SIGTERM, on_signal);
    double started = seconds(), peak = ranks.count * b->peak / flops_per_token(&o->model);
    size_t predictions = read_step(o, data, first_step, tokens, targets, fresh);
    for (int step = first_step; step < o->steps; step++) {
        double step_started = seconds(), loss = 0, val = NAN, lr = learning_rate(o, step), dloss = 1.0 / predictions;
        for (int micro = 0; micro < o->accum; micro++) {
            uint64_t row = (((uint64_t)step * o->accum + micro) * ranks.groups + ranks.group) * o->batch;
            b->micro_step(b->self, tokens + micro * rows, targets + micro * rows, dloss, micro == 0, row,
                          o->carry ? fresh + micro * o->batch : NULL);
        }
        int done = step + 1;
        bool last = done == o->steps;
        if (!last) { predictions = read_step(o, data, done, tokens, targets, fresh); } // while a GPU works
        double norm = b->finish_step(b->self, &loss);
        if (!isfinite(loss) || !isfinite(norm)) {
            die("step %d: loss %g, gradient norm %g: stopped before the weights change; checkpoints stay as they are",
                done, loss, norm);
        }
        b->update(b->self, o, lr, done, clip_scale(norm, o->clip));
        double ms = 1e3 * (seconds() - step_started);
        bool validates = held_out->size > (o->eod < 0) && (last || (o->val_every && done % o->val_every == 0));
        Span spans[NUM_SPANS] = {{0, 0}};
        if (validates && ranks.rank == 0) { val = evaluate(b, &o->model, held_out, spans, ""); }
        double left = (seconds() - started) / (done - first_step) * (o->steps - done);
        log_step(o, log, done, loss, norm, lr, ms, left, val, peak);
        if (o->sample_every && (last || done % o->sample_every == 0) && ranks.rank == 0) {
            printf("---- sample ----\n");
            generate(b, o, data->tokenizer, 400, done);
            printf("\n----------------\n");
        }
        double stop = stop_asked; // read once: a signal may come at any moment, and to some ranks only
        all_sum(&stop, 1);
        bool due = last || stop > 0 || (o->checkpoint_every && done % o->checkpoint_every == 0);
        if (*o->out && due) { checkpoint_save(b, specs, o, done); }
        if (stop == 0) { continue; }
        printf("stopped by a signal after step %d, %s\n", done, *o->out ? "saved" : "not saved: no --out");
        break;
    }
    if (log) { fclose(log); }
    free(tokens); free(targets); free(fresh);
}

// A preset first, then what a file says, then the flags, whatever their order. With --load or --resume st is left open.
void options_parse(Options* o, int argc, char** argv, SafeTensors* st) {
    const char* values[NUM_OPTIONS] = {NULL};
    bool given[NUM_OPTIONS] = {0};
    int preset = 0, preset_row = option_find("--preset"), vocab_row = option_find("--vocab-size");
    *o = default_options;
    for (int a = 1; a < argc; a++) {
        int i = option_find(argv[a]);
        bool flag = option_rows[i].kind == FLAG;
        if (values[i]) { die("%s stands twice", argv[a]); }
        if (!flag && a + 1 == argc) { die("%s needs a value", argv[a]); }
        values[i] = flag ? "1" : argv[++a];
        option_set(o, i, values[i], "");
        if (!*values[i] && strcmp(argv[a - 1], "--prompt")) { die("%s \"\": expected a name", argv[a - 1]); }
    }
    if (o->help) { print_help(); exit(0); }
    while (preset < NUM_PRESETS && strcmp(presets[preset].name, o->preset)) { preset++; }
    if (preset == NUM_PRESETS) { die("--preset %s: expected one of " PRESET_NAMES, o->preset); }
    o->model = presets[preset].config;
    for (int i = 0; i < NUM_OPTIONS; i++) {
        given[i] = values[i] || (values[preset_row] && option_rows[i].group == MODEL_GROUP);
        if (values[i]) { option_set(o, i, values[i], ""); }
    }
    bool loaded = *o->load || *o->resume;
    if (*o->load && *o->resume) { die("--load takes weights, --resume a whole run: give one of them"); }
    if (*o->load) { safetensors_open(st, o->load); }
    if (*o->resume) { checkpoint_open(st, o->resume); }
    if (loaded) { options_from_file(o, st, given, *o->resume); }
    if (*o->resume && !values[option_find("--out")]) { o->out = o->resume; }
    if (*o->tokenizer && !given[vocab_row] && !(loaded && safetensors_meta(st, "vocab_size"))) {
        Tokenizer* t = tokenizer_open(o->tokenizer);
        o->model.vocab_size = t->pieces;
        tokenizer_close(t);
    }
    config_check(&o->model);
    int vocab = o->model.vocab_size;
    if (o->eod >= vocab) { die("--eod %d: expected a token below vocab_size %d", o->eod, vocab); }
    if (o->carry && o->eod < 0) { die("--carry needs documents: --eod, the token that ends them"); }
    if (o->carry && o->seq % o->model.chunk_size) {
        die("--carry needs --seq %d to be a multiple of --chunk-size %d", o->seq, o->model.chunk_size);
    }
    bool known = !strcmp(o->schedule, "cosine") || !strcmp(o->schedule, "linear") || !strcmp(o->schedule, "constant");
    if (!known) { die("--schedule %s: expected cosine, linear or constant", o->schedule); }
    if (o->beta1 >= 1 || o->beta2 >= 1) { die("--beta1 %g --beta2 %g: expected numbers below 1", o->beta1, o->beta2); }
    if (o->top_p == 0) { die("--top-p 0: expected a number above 0, up to 1"); }
    if (o->checkpoint_every && !*o->out) { die("--checkpoint-every needs --out, the folder to save to"); }
    if (*o->losses && !*o->eval) { die("--losses needs --eval, the file whose losses are written"); }
    if (o->generate && *o->eval) { die("--generate and --eval: give one of them"); }
    bool trains = !o->generate && !*o->eval;
    if (!trains && !loaded) { die("--generate and --eval need weights: --load FILE or --resume DIR"); }
    if (strlen(o->out) > PATH_MAX - 64) { die("--out: the name is too long"); }
#ifdef _OPENMP
    if (o->threads) { omp_set_num_threads(o->threads); }
    o->threads = omp_get_max_threads();
#endif
}

// Brings the tensors of the first blocks to b: a file's, or without one the weights as they start. Without b it only
// checks that the file has them.
void blocks_load(const Backend* b, const Options* o, const Spec* specs, const SafeTensors* st, int blocks) {
    size_t part[2];
    for (Saved s = before_saved; saved_next(&s, specs, blocks);) {
        float* tensor = b ? (float*)xcalloc(s.spec->size, sizeof(float)) : NULL;
        if (st) { safetensors_read(st, s.name, s.spec, tensor); }
        else { param_init(tensor, s.spec, s.row, s.layer, &o->model, o->seed); }
        for (int k = 0; b && k < (s.block == STATES ? o->accum : 1); k++) {
            saved_copy(b, o, &s, k, tensor, false, part);
        }
        free(tensor);
    }
}

// What the options ask for. With --load or --resume st is open.
void run(const Backend* b, const Options* o, SafeTensors* st) {
    bool loaded = *o->load || *o->resume, training = !o->generate && !*o->eval;
    FILE* info = o->generate ? stderr : stdout; // a sample has stdout for itself
    int blocks = *o->resume && training ? NUM_BLOCKS : WEIGHTS + 1;
    Spec specs[NUM_PARAMS + NUM_CARRIED];
    static Dataset data, held_out;
    Span spans[NUM_SPANS] = {{0, 0}};
    ranks_group(o->chunk_parallel);
    slice_length(o->seq, o->model.chunk_size);
    if (!training && ranks.rank) { return; } // these take one
    param_specs(specs, &o->model);
    carried_specs(specs + NUM_PARAMS, o);
    options_print(o, training, info);
    if (ranks.count > 1) {
        fprintf(info, "ranks: %d = %d groups x %d slices, %d threads each\n", ranks.count, ranks.groups, ranks.chunks,
                o->threads);
    }
    fprintf(info, "device: %s\nnum_parameters: %zu\n", b->name, specs_size(specs, NUM_PARAMS));
    double needed = b->memory_needed(b->self, o);
    if (training) { fprintf(info, "memory: %.1f MB\n", needed / 1e6); }
    if (needed > 1e15) { die("--batch %d --seq %d: more than any machine has", o->batch, o->seq); }
    if (o->dry_run) { return; }
    data_open(o, training, &data, &held_out);
    if (loaded) { blocks_load(NULL, o, specs, st, blocks); } // before the memory is taken that the file says it needs
    b->open(b->self, o, training);
    if (loaded) { weights_check(specs, st, o->model.share_emb); fprintf(info, "weights: %s\n", st->path); }
    blocks_load(b, o, specs, loaded ? st : NULL, blocks);
    int step = *o->resume ? atoi(safetensors_meta(st, "step")) : 0;
    if (o->generate) { generate(b, o, data.tokenizer, o->generate, 0); }
    else if (*o->eval) { evaluate(b, &o->model, &data, spans, o->losses); spans_print(spans, &data); }
    else if (step < o->steps) { train(b, o, specs, step, &data, &held_out); }
    else { printf("step %d of %d: nothing left to do\n", step, o->steps); }
    tokenizer_close(data.tokenizer);
    b->close(b->self);
    if (loaded) { safetensors_close(st); }
    if (fflush(stdout) || ferror(stdout)) { die("stdout: %s", strerror(errno)); }
}

#ifndef TESTING
int main(int argc, char** argv) {
    Options o;
    SafeTensors st;
    Cpu cpu;
    Backend backend = cpu_backend(&cpu);
#ifdef _OPENMP
    // libgomp's threads spin at barriers, which is ruinous as soon as another process wants a core; a short spin costs
    // nothing. It reads this before main, hence the second start.
    if (!getenv("GOMP_SPINCOUNT") && !setenv("GOMP_SPINCOUNT", "3000", 0)) { execv("/proc/self/exe", argv); }
#endif
    ranks_open();
    options_parse(&o, argc, argv, &st);
    run(&backend, &o, &st);
    return 0;
}
#endif
