/*
Megalodon (arXiv 2404.08801) in plain C: a language model with unlimited context in linear time.

This is the reference implementation: fp32, on the CPU, forward and backward pass, training and use. The first half of
the file is the model and its use; it can be read from top to bottom. The second half is machinery, and a learner may
skip it.

The model. Tokens are embedded, go through L equal blocks, through one last timestep norm, and through a matrix product
that gives the logits of the next token. A block turns x (B,T,D) into out (B,T,D): B sequences, T timesteps, D features.
With W for weights, b for biases and * for the product of elements, it is eight lines:

                                                                      cost for T timesteps    carried to the next chunk
    n   = timestep_norm(x)             (x - mean) / deviation over time    T D                3 numbers for each group
    e   = cema(n)                      moving averages over time           T D N              N complex for each feature
    m   = rms_norm(e)                                                      T D
    z   = m Wz^T + bz;  q, k = rotary(affine(rms_norm(z)))                 T D Z
    v   = silu(n Wv^T + bv);  r = silu(m Wr^T + br)                        T D V
    o   = softmax(q k^T) v             causal, in chunks of c timesteps    T c (Z + V)        nothing
    y   = m Wh1^T + bh1 + (o * r) Wh2^T + x                                T D (D + V)
    u   = layer_norm(y);  out = ffn(u) + x                                 T D F

where ffn(u) = silu(u W1^T) W2^T, or with swiglu (silu(u W1^T) * (u W3^T)) W2^T. The tensors have longer names in the
code: n timenorm, e cema, m rmsnorm, z wz, o attention, o * r gated, y mega, u norm.

A Transformer has one way to look back, attention over everything seen so far: its cost grows with T^2 and its memory
with T. Megalodon splits the work. Attention looks back exactly, but not far: to the start of its chunk. What lies
further back comes through two recurrences that are cheap and reach any distance: the timestep norm, which normalizes
each group of features by its mean and variance over all timesteps so far, and CEMA, the complex exponential moving
average, in which every feature runs N damped oscillators. Both are linear in T, and all that they carry from one chunk
to the next is a state of fixed size. (In the middle of a chunk, its keys and values so far are kept too.) So one call
on a whole text, calls on its chunks, and a call for each token give the same logits, up to rounding. And a token never
costs more time or memory than the last token of a chunk, however long the text before it is.

The reasons stand with the code: at qk_forward, what bounds a score; at timestepnorm_forward, why a norm's weight is an
offset from 1; at block_forward, why values are made from n, and why x is added twice (the "two hops").

The backward pass. Every layer's backward function stands under its forward function and opens with its equations; those
of the two recurrences are derived. block_backward calls them from the last line of the block to the first,
model_backward from the last block to the first.

Reading order, by the headings of the sections:

    Configuration                   the sizes of a model
    Parameters and activations      two tables: every weight, and every value that is kept for the backward pass
    Layers                          forward and backward, each with its equation
    Models, states and passes       what the block works on; to be skimmed, but for State
    The block                       the eight lines above as code, and their gradients
    The model                       from tokens to logits and losses, and back
    The optimizer                   the norm of the gradient, clipping, AdamW
    Flags and devices               declarations that the next section needs; to be skimmed
    Use                             evaluation, generation, training, main

and then machinery: Matrix products, Dropout, Random numbers and initial weights, Memory, Sequences that are spread over
several processes, Processes, Options as text, Data, Checkpoints, The CPU backend.

Conventions. Arrays are row-major: (B,T,D) is indexed [(b*T + t)*D + d]. Weights are (out, in): y = x W^T + b. A layer's
arguments are outputs, inputs, sizes. In the block, the names of four variables tell its tensors apart:

    w.wz    a weight                       a.wz    an activation: here the output of the product with the weight wz
    dw.wz   the gradient of the weight     da.wz   the gradient of the activation

Gradients of weights are always added to, so that several passes can share them. Gradients of activations are assigned,
unless the function's comment says "added to". Equation numbers are the paper's. Where the released code
(XuezheMax/megalodon) differs from the paper, this file does what the code does, because that is what released weights
mean, and says so. No result depends on the number of threads: each sum is made by one thread, in a fixed order.

The letters in brackets under Configuration, and B and T, mean the same everywhere in the model. So do the names of
tensors above where a comment speaks of the block. Inside the equations of a layer, small letters are that layer's own:
for CEMA they are the paper's. In loops, b t d h number sequences, timesteps, features and heads, and r = b*T + t
numbers the rows of a tensor. gemm has matrices A B C and sizes M N K of its own.

To check an implementation of your own against this one, write its tensors to a safetensors file: the tokens x and the
targets y, the weights as param.NAME, and whatever you want compared as act.NAME, dact.NAME, grad.NAME, logits or
losses. NAME is the second column of the two tables below. ./test_megalodon FILE then says for each tensor whether and
how far you agree; its opening comment has the details.
*/
#include "data/megalodon.h"   // presets, and Megalodon's values of what another architecture (dev/gecko) replaces
#include "data/base.h"        // die, which ends the program with a message; xcalloc, zeroed memory; text_of; min_int
#include "data/safetensors.h" // files of tensors
#include "data/tokens.h"      // tokenizers, files of tokens, documents
#include <ctype.h>
#include <dirent.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <time.h>
#ifdef _OPENMP
#include <omp.h>
#define OMP(...) _Pragma(#__VA_ARGS__) // before a loop: its iterations are shared among the threads
#else
#define OMP(...)
#define omp_set_num_threads(n) ((void)(n))
#define omp_get_max_threads() 1
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Configuration

enum { CEMA_MAX_NDIM = 64, MAX_VOCAB = 1 << 24 };

// One row for each number: kind, name, default, smallest and largest value, help. From this table come the struct
// Config, the flags of the command line (--num-layers), --help, and what is recorded with weights. The presets in
// data/megalodon.h have a value for each row, in this order. The symbol that comments use stands in brackets. The
// defaults are the preset `tiny`, which learns visibly in a minute on two cores.
#define MODEL_OPTIONS(X) \
    X(INT,  num_layers,         4, 1, 10000,      "blocks [L]") \
    X(INT,  model_dim,        128, 2, 1 << 20,    "features of the residual stream [D]") \
    X(INT,  num_heads,          1, 1, 1 << 16,    "attention heads [H]") \
    X(INT,  z_dim,             64, 2, 1 << 20,    "features of queries and keys, all heads together [Z]") \
    X(INT,  value_dim,        192, 1, 1 << 20,    "features of values, all heads together [V]") \
    X(INT,  ffn_hidden_dim,   216, 1, 1 << 20,    "hidden features of the feed-forward layer [F]") \
    X(INT,  chunk_size,       128, 1, 1 << 24,    "timesteps that attend to each other [c]") \
    X(INT,  norm_num_groups,    4, 1, 1 << 20,    "groups of features in the timestep norm [G]") \
    X(INT,  cema_ndim,         16, 1, CEMA_MAX_NDIM, "complex oscillators of each feature in CEMA [N]") \
    X(INT,  vocab_size,       256, 2, MAX_VOCAB,  "tokens: 256 for bytes, else the tokenizer's number") \
    X(REAL, rope_base,  ROPE_BASE, 1, 1e12,       "base of the rotary embedding's wavelengths") \
    X(REAL, norm_eps,        1e-5, 0, 1,          "added to every variance [eps]") \
    X(BOOL, swiglu,             1, 0, 1,          "gate the feed-forward layer") \
    X(BOOL, scale_emb,          0, 0, 1,          "multiply embeddings by sqrt(model_dim), as some presets do") \
    X(BOOL, share_emb,          1, 0, 1,          "use the embedding as the output layer too") \
    X(BOOL, rescale_nffn,       0, 0, 1,          "multiply the feed-forward output by a learned vector") \
    MORE_MODEL_OPTIONS(X)

#define C_TYPE_INT int
#define C_TYPE_REAL double
#define C_TYPE_BOOL int
#define C_TYPE_FLAG int
#define C_TYPE_TEXT const char*
#define STRUCT_FIELD(kind, name, ...) C_TYPE_##kind name;
typedef struct { MODEL_OPTIONS(STRUCT_FIELD) } Config;

// ---------------------------------------------------------------------------------------------------------------------
// Parameters and activations

// How a parameter starts: see param_init.
enum { INIT_ZERO, INIT_EMBED, INIT_LINEAR, INIT_NORMAL, INIT_THETA, INIT_GAMMA, INIT_OMEGA, INIT_RESCALE };

// One row for each parameter: field of Params, name in files (one tensor for each layer where it holds %d), shape (ends
// at a 0; a leading 0 means that this model has none; a 1 is in the released shape), start. A row's number in the table
// seeds its random values: inserting a row changes the initial values of all rows after it.
#define PARAMETERS(X) \
    X(embed,       "embed.weight",                   vocab, D, 0, INIT_EMBED) \
    X(timenorm_w,  "layers.%d.mega.timenorm.weight", D, 0, 0, INIT_ZERO) \
    X(timenorm_b,  "layers.%d.mega.timenorm.bias",   D, 0, 0, INIT_ZERO) \
    X(cema_alpha,  "layers.%d.mega.cema.alpha",      D, N, ONE, INIT_NORMAL) \
    X(cema_delta,  "layers.%d.mega.cema.delta",      D, N, ONE, INIT_NORMAL) \
    X(cema_theta,  "layers.%d.mega.cema.theta",      D, ONE, ONE, INIT_THETA) \
    X(cema_gamma,  "layers.%d.mega.cema.gamma",      D, N, 2, INIT_GAMMA) \
    X(cema_omega,  "layers.%d.mega.cema.omega",      OMEGA_SIZE, 1, 0, INIT_OMEGA) \
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
    X(gamma,       "layers.%d.mega.gamma",           AFFINES, Z, 0, INIT_ZERO) \
    X(beta,        "layers.%d.mega.beta",            AFFINES, Z, 0, INIT_ZERO) \
    X(norm_w,      "layers.%d.nffn.norm.weight",     D, 0, 0, INIT_ZERO) \
    X(norm_b,      "layers.%d.nffn.norm.bias",       D, 0, 0, INIT_ZERO) \
    X(fc1,         "layers.%d.nffn.fc1.weight",      F, D, 0, INIT_LINEAR) \
    X(fc3,         "layers.%d.nffn.fc3.weight",      swiglu ? F : 0, D, 0, INIT_LINEAR) \
    X(fc2,         "layers.%d.nffn.fc2.weight",      D, F, 0, INIT_LINEAR) \
    X(rescale,     "layers.%d.nffn.alpha",           rescale_nffn ? D : 0, 0, 0, INIT_RESCALE) \
    X(final_w,     "output.final_norm.weight",       D, 0, 0, INIT_ZERO) \
    X(final_b,     "output.final_norm.bias",         D, 0, 0, INIT_ZERO) \
    X(output,      "output.output.weight",           share_emb ? 0 : vocab, D, 0, INIT_EMBED)

// One row for each activation: field of Acts, name in test dumps ("" if dumps do not have it), how many copies there
// are, shape of one timestep (ends at a 0). The number of copies depends on the use:
//
//                  training: KEEP_ALL    training with --recompute: KEEP_BLOCKS    inference: KEEP_NONE
//    ONCE          one                   one                                       one
//    LAYER         one for each layer    one for all layers together               one for all layers together
//    BLOCK_OUTPUT  one for each layer    one for each layer                        one for all layers together
//
// The same table lays out the gradients of activations, of which there is one copy for all layers together (tests may
// ask for more). So the gradient of a block's output has the same memory as that of its input (but for the first block,
// whose input is embed).
//
// The backward pass needs these, the weights, and the state before the first timestep. What is cheap it computes again:
// normalized values from mean and rstd (1/deviation), sigmoids, attention probabilities from lse. It does not need the
// states of CEMA in between.
enum { ONCE, LAYER, BLOCK_OUTPUT };
enum { KEEP_NONE, KEEP_BLOCKS, KEEP_ALL };
#define ACTIVATIONS(X) \
    X(embed,         "embed",                         ONCE,  D, 0) \
    X(timenorm,      "layers.%d.mega.timenorm",       LAYER, D, 0)    /* n */ \
    X(timenorm_mean, "",                              LAYER, G, 0) \
    X(timenorm_rstd, "",                              LAYER, G, 0) \
    X(cema,          "layers.%d.mega.cema",           LAYER, D, 0)    /* e */ \
    X(rmsnorm,       "layers.%d.mega.rmsnorm",        LAYER, D, 0)    /* m */ \
    X(rmsnorm_rstd,  "",                              LAYER, 1, 0) \
    X(wz,            "layers.%d.mega.wz",             LAYER, Z, 0)    /* z */ \
    X(znorm,         "layers.%d.mega.znorm",          LAYER, H, Z/H)  /* rms_norm(z) */ \
    X(znorm_rstd,    "",                              LAYER, H, 0) \
    X(q,             "",                              LAYER, H, Z/H) \
    X(k,             "",                              LAYER, H, Z/H) \
    X(wv,            "layers.%d.mega.wv",             LAYER, V, 0)    /* n Wv^T + bv */ \
    X(v,             "",                              LAYER, H, V/H) \
    X(wr,            "layers.%d.mega.wr",             LAYER, V, 0)    /* m Wr^T + br */ \
    X(attention,     "layers.%d.mega.inner_attention", LAYER, V, 0)   /* o */ \
    X(attention_lse, "",                              LAYER, H, 0) \
    X(gated,         "",                              LAYER, V, 0)    /* o * r */ \
    X(mega,          "layers.%d.mega",                LAYER, D, 0)    /* y */ \
    X(norm,          "layers.%d.nffn.norm",           LAYER, D, 0)    /* u */ \
    X(norm_mean,     "",                              LAYER, 1, 0) \
    X(norm_rstd,     "",                              LAYER, 1, 0) \
    X(fc1,           "layers.%d.nffn.fc1",            LAYER, F, 0)    /* u W1^T */ \
    X(fc3,           "",                              LAYER, swiglu ? F : 0, 0) \
    X(hidden,        "",                              LAYER, F, 0)    /* silu(u W1^T), with swiglu times u W3^T */ \
    X(fc2,           "",                              LAYER, rescale_nffn ? D : 0, 0) \
    X(out,           "layers.%d",                     BLOCK_OUTPUT, D, 0) \
    X(final,         "output.final_norm",             ONCE,  D, 0) \
    X(final_mean,    "",                              ONCE,  G, 0) \
    X(final_rstd,    "",                              ONCE,  G, 0) \
    X(logits,        "",                              ONCE,  vocab, 0) /* the backward pass turns it into dlogits */ \
    X(losses,        "",                              ONCE,  1, 0) \
    MORE_ACTIVATIONS(X)

#define POINTER_FIELD(field, ...) float* field;
typedef struct { PARAMETERS(POINTER_FIELD) } Params;   // weights, or their gradients, or AdamW's moments
typedef struct { ACTIVATIONS(POINTER_FIELD) } Acts;    // activations, or their gradients
enum { NUM_PARAMS = sizeof(Params) / sizeof(float*), NUM_ACTS = sizeof(Acts) / sizeof(float*) };

// ---------------------------------------------------------------------------------------------------------------------
// Layers

// Embedding: out (rows,D) = scale * weight (vocab,D)[tokens], rows = B*T.
void embedding_forward(float* out, const int* tokens, const float* weight, float scale, size_t rows, int D) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        for (int d = 0; d < D; d++) { out[r * D + d] = scale * weight[(size_t)tokens[r] * D + d]; }
    }
}

// dweight[token] += scale * dout. Two rows may hold the same token, so each thread has columns of its own, not rows.
void embedding_backward(float* dweight, const float* dout, const int* tokens, float scale, size_t rows, int D) {
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += 16) {
        for (size_t r = 0; r < rows; r++) {
            float* row = dweight + (size_t)tokens[r] * D;
            for (int d = d0; d < min_int(d0 + 16, D); d++) { row[d] += scale * dout[r * D + d]; }
        }
    }
}

// Running statistics of one group of features in one sequence: how many timesteps were seen, and the mean and
// population variance of all features of the group over them.
typedef struct { double count, mean, var; } NormState;
static const NormState no_past = {0, 0, 0};

// Timestep norm, eq. 4: group normalization in which the statistics run over time. The D features are split into G
// groups of D/G neighbours. For each sequence, each group and t = 1..T,
//     mean_t, var_t = mean and population variance of the group's features over the timesteps 1..t
//     out_t = (inp_t - mean_t) rstd_t (weight + 1) + bias,    rstd_t = 1/sqrt(var_t + eps)
// Plus-1 (eq. 23, in every norm of the model): the weight is stored as its offset from 1 and starts at 0. Weight decay
// pulls every parameter towards 0. Here that is a scale of 1; a scale stored as such would be pulled to 0, where it
// shuts the layer off (appendix B.2).
//
// Timestep t alone has the mean one_mean and the variance one_var over its group. `count` timesteps stand before it.
// Chan's formula merges it into the statistics so far; `squares` is count times var:
//     delta = one_mean - mean                         squares += one_var + delta^2 count/(count+1)
//     mean += delta/(count+1)                         var = squares/(count+1)
// This is done in double: rounded to floats at every timestep, the statistics of a stream of 10^7 timesteps would
// drift.
// out, inp (B,T,D) | weight, bias (D) | mean, rstd (B,T,G): saved for the backward pass | start, end (B,G): the state
// before and after these T timesteps; start NULL is an empty past, end may be NULL or start.
void timestepnorm_forward(float* out, float* mean, float* rstd, NormState* end, const NormState* start,
                          const float* inp, const float* weight, const float* bias, int B, int T,
                          const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups, width = D / G;
    float eps = config->norm_eps;
    OMP(omp parallel for collapse(2) schedule(static))
    for (int b = 0; b < B; b++) {
        for (int g = 0; g < G; g++) {
            NormState stats = start ? start[b * G + g] : no_past; // before the timestep, then after it
            double squares = stats.count * stats.var; // see above
            const float *w_group = weight + g * width, *b_group = bias + g * width;
            for (int t = 0; t < T; t++) {
                size_t at = ((size_t)b * T + t) * G + g; // of mean and rstd; inp and out have `width` elements each
                const float* x = inp + at * width;
                double one_mean = 0, one_var = 0;
                OMP(omp simd reduction(+:one_mean))
                for (int i = 0; i < width; i++) { one_mean += x[i]; }
                one_mean /= width;
                OMP(omp simd reduction(+:one_var))
                for (int i = 0; i < width; i++) { one_var += (x[i] - one_mean) * (x[i] - one_mean); }
                one_var /= width;
                double delta = one_mean - stats.mean;
                squares += one_var + delta * delta * stats.count / (stats.count + 1);
                stats.count += 1;
                stats.mean += delta / stats.count;
                stats.var = squares / stats.count;
                mean[at] = stats.mean;
                rstd[at] = 1.0 / sqrt(stats.var + eps);
                float mean_t = mean[at], rstd_t = rstd[at];
                OMP(omp simd)
                for (int i = 0; i < width; i++) {
                    out[at * width + i] = (x[i] - mean_t) * rstd_t * (w_group[i] + 1) + b_group[i];
                }
            }
            if (end) { end[b * G + g] = stats; }
        }
    }
}

// Backward. Let f = dout (weight + 1) be the gradient of the normalized value, let width = D/G, and let
// count_t = start.count + t be the number of timesteps up to t. The formula of out gives the gradients of the
// statistics at t:
//     dmean_t = -rstd_t sum_i f_ti                    dvar_t = -1/2 rstd_t^3 sum_i f_ti (x_ti - mean_t)
// mean_t and var_t are taken over count_t width values. Each x_s with s <= t is one of them:
//     d mean_t / d x_s = 1/(count_t width)            d var_t / d x_s = 2 (x_s - mean_t)/(count_t width)
// So x_s receives the gradient of its own output, and that of the statistics at all t >= s:
//     dx_s = f_s rstd_s + sum_{t>=s} (dmean_t + 2 (x_s - mean_t) dvar_t) / (count_t width)
// To make all these sums in one sweep from the last timestep to the first, x_s must be taken out of them. With any
// constant `center`, 2 (x_s - mean_t) = 2 (x_s - center) - 2 (mean_t - center), so
//     U_s = sum_{t>=s} (dmean_t - 2 (mean_t - center) dvar_t) / count_t       S_s = sum_{t>=s} dvar_t / count_t
//     dx_s = f_s rstd_s + (U_s + 2 (x_s - center) S_s) / width
//
// The end. If later calls start from the state after timestep T, then that state has a gradient, dend. It acts like one
// more term (dmean, dvar) at t = T. So the sweep begins with
//     U = (dend.mean - 2 (mean_T - center) dend.var) / count_T                S = dend.var / count_T
// The code takes center = mean_T. Then the second term of U vanishes, and the differences stay small. (Any center is
// exact, but with 0 large numbers would cancel where the mean is large.)
//
// The start. The state before timestep 1 enters mean_t and var_t with the weight of its start.count timesteps:
//     d mean_t / d start.mean = start.count/count_t
//     d var_t / d start.mean = 2 start.count (start.mean - mean_t)/count_t
//     d var_t / d start.var = start.count/count_t
// With start.mean - mean_t = (start.mean - center) - (mean_t - center), the sums over t are those above:
//     dstart.mean = start.count (U_1 + 2 (start.mean - center) S_1)           dstart.var = start.count S_1
// (count is a number of timesteps, and has no gradient.)
//
// dinp (B,T,D), dstart (B,G), dweight and dbias are added to. dend (B,G) NULL is zero; dstart may be NULL. start is
// what the forward pass had. With dinp NULL only dstart is made.
void timestepnorm_backward(float* dinp, float* dweight, float* dbias, NormState* dstart, const NormState* dend,
                           const float* dout, const float* mean, const float* rstd, const NormState* start,
                           const float* inp, const float* weight, int B, int T, const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups, width = D / G;
    OMP(omp parallel for schedule(static))
    for (int g = 0; g < G; g++) { // the sequences in turn, because they share dweight
        for (int b = 0; b < B; b++) {
            NormState before = start ? start[b * G + g] : no_past;
            double count = before.count + T, U = 0, S = 0;
            float center = mean[((size_t)b * T + T - 1) * G + g];
            if (dend) { U = dend[b * G + g].mean / count; S = dend[b * G + g].var / count; }
            for (int t = T - 1; t >= 0; t--, count--) {
                size_t at = ((size_t)b * T + t) * G + g;
                const float *x = inp + at * width, *dy = dout + at * width, *w_group = weight + g * width;
                float mean_t = mean[at], rstd_t = rstd[at];
                double sum_f = 0, sum_fx = 0;
                OMP(omp simd reduction(+:sum_f,sum_fx))
                for (int i = 0; i < width; i++) {
                    float f = dy[i] * (w_group[i] + 1);
                    sum_f += f;
                    sum_fx += f * (x[i] - mean_t);
                }
                double dmean = -rstd_t * sum_f, dvar = -0.5 * rstd_t * rstd_t * rstd_t * sum_fx;
                U += (dmean - 2 * (mean_t - center) * dvar) / count;
                S += dvar / count;
                if (!dinp) { continue; }
                float constant = U / width, slope = 2 * S / width;
                OMP(omp simd)
                for (int i = 0; i < width; i++) {
                    dinp[at * width + i] += dy[i] * (w_group[i] + 1) * rstd_t + (constant + slope * (x[i] - center));
                    dweight[g * width + i] += dy[i] * (x[i] - mean_t) * rstd_t;
                    dbias[g * width + i] += dy[i];
                }
            }
            if (dstart) {
                dstart[b * G + g].mean += before.count * (U + 2 * (before.mean - center) * S);
                dstart[b * G + g].var += before.count * S;
            }
        }
    }
}

// CEMA, the complex exponential moving average, eq. 2, 3 and 5. In its equations x is the input (the block's n) and y
// the output (the block's e); p q g h k are not attention's. Every feature runs N damped oscillators k = 1..N:
//     p = sigmoid(alpha)                      how much of the input enters
//     q = (1 - p sigmoid(delta)) exp(i phi)   what is left of the state a timestep later: damped, turned by the angle
//                                             phi = 2 pi k/N sigmoid(theta) (above pi it turns the other way)
//     g = (gamma_re + i gamma_im)/sqrt(N)     the oscillator's weight in the output
//     h_t = q h_{t-1} + p x_t                 y_t = sum_k Re(g h_t) + omega x_t
// Unrolled, y is a convolution of x with the kernel sum_k Re(g p q^s), s = 0, 1, ...: a learned sum of damped waves, as
// long as the text is. omega is a skip connection for each feature. Without it, how much of x_t itself passes would be
// tied to how the past is weighed: both come from g p. alpha, delta and gamma are different for each oscillator, theta
// and omega for each feature. (Eq. 2 also rotates the input, and the paper has no omega. The released code computes
// what stands here.) As plain loops:
//
//     for (int d = 0; d < D; d++) {
//         for (int t = 0; t < T; t++) { out[t][d] = omega[d] * inp[t][d]; }
//         for (int k = 0; k < N; k++) {
//             complex float h = start[d][k];
//             for (int t = 0; t < T; t++) {
//                 h = q[d][k] * h + p[d][k] * inp[t][d];
//                 out[t][d] += crealf(g[d][k] * h);
//             }
//             end[d][k] = h;
//         }
//     }
//
// The code differs in two ways. LANES neighbouring features run side by side, in the lanes of vector registers; lanes
// past the last feature hold zeros. And time is cut into tiles of TIMES timesteps, which stay in the first cache while
// all N oscillators go over them.
enum { LANES = 16, TIMES = 16 };
typedef struct { float re[LANES], im[LANES]; } ComplexLanes;     // one complex number for each of the features
typedef struct { float p[LANES]; ComplexLanes q, g; } Oscillator; // oscillator k of each of the features
typedef struct { float *alpha, *delta, *theta, *gamma, *omega; } CemaParams; // weights, or their gradients
CemaParams cema_params(const Params* w) {
    CemaParams p = {w->cema_alpha, w->cema_delta, w->cema_theta, w->cema_gamma, w->cema_omega};
    return p;
}

double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// p, q and g of the N oscillators of the features from d0 on.
void cema_coefficients(Oscillator oscillators[CEMA_MAX_NDIM], CemaParams w, int d0, int D, int N) {
    memset(oscillators, 0, N * sizeof(Oscillator));
    for (int j = 0; j < min_int(LANES, D - d0); j++) {
        for (int k = 0; k < N; k++) { // number k + 1 of the equations
            size_t at = (size_t)(d0 + j) * N + k;
            double phi = 2.0 * M_PI / N * sigmoid(w.theta[d0 + j]) * (k + 1);
            double p = sigmoid(w.alpha[at]), radius = 1.0 - p * sigmoid(w.delta[at]);
            Oscillator* o = &oscillators[k];
            o->p[j] = p;
            o->q.re[j] = radius * cos(phi); o->q.im[j] = radius * sin(phi);
            o->g.re[j] = w.gamma[2 * at] / sqrt(N); o->g.im[j] = w.gamma[2 * at + 1] / sqrt(N);
        }
    }
}

// One oscillator of each feature over the timesteps of a tile: the inner loop above. y is added to.
static inline void oscillator_forward(float y[TIMES][LANES], ComplexLanes* state, const Oscillator* oscillator,
                                      const float x[TIMES][LANES], int times) {
    Oscillator o = *oscillator;
    ComplexLanes h = *state;
    for (int t = 0; t < times; t++) {
        for (int j = 0; j < LANES; j++) {
            float re = o.q.re[j] * h.re[j] - o.q.im[j] * h.im[j] + o.p[j] * x[t][j];
            float im = o.q.re[j] * h.im[j] + o.q.im[j] * h.re[j];
            h.re[j] = re; h.im[j] = im;
            y[t][j] += o.g.re[j] * re - o.g.im[j] * im;
        }
    }
    *state = h;
}

// Copies a tile of `times` timesteps and `lanes` features from rows that lie D apart.
static inline void tile_load(float tile[TIMES][LANES], const float* from, int times, int lanes, int D) {
    if (lanes < LANES) { memset(tile, 0, sizeof(float) * TIMES * LANES); }
    for (int t = 0; t < times; t++) { memcpy(tile[t], from + (size_t)t * D, lanes * sizeof(float)); }
}

// out, inp (B,T,D) | alpha, delta (D,N), theta, omega (D), gamma (D,N,2) | start, end (B,D,N,2): h before and after
// these T timesteps; start NULL is zero, end may be NULL or start. Nothing is saved for the backward pass.
void cema_forward(float* out, float* end, const float* start, const float* inp, CemaParams w,
                  int B, int T, int D, int N) {
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += LANES) {
        int lanes = min_int(LANES, D - d0);
        Oscillator oscillators[CEMA_MAX_NDIM];
        cema_coefficients(oscillators, w, d0, D, N);
        for (int b = 0; b < B; b++) {
            // The states of these features start at `offset`. Number i = j*N + k is oscillator k of feature d0 + j.
            size_t offset = ((size_t)b * D + d0) * N * 2;
            ComplexLanes h[CEMA_MAX_NDIM] = {{{0}, {0}}};
            if (start) {
                for (int i = 0; i < lanes * N; i++) {
                    h[i % N].re[i / N] = start[offset + 2 * i]; h[i % N].im[i / N] = start[offset + 2 * i + 1];
                }
            }
            for (int t0 = 0; t0 < T; t0 += TIMES) {
                float x[TIMES][LANES], y[TIMES][LANES] = {{0}};
                int times = min_int(TIMES, T - t0);
                size_t at = ((size_t)b * T + t0) * D + d0;
                tile_load(x, inp + at, times, lanes, D);
                for (int k = 0; k < N; k++) { oscillator_forward(y, &h[k], &oscillators[k], x, times); }
                for (int t = 0; t < times; t++) {
                    float* row = out + at + (size_t)t * D;
                    for (int j = 0; j < lanes; j++) { row[j] = y[t][j] + w.omega[d0 + j] * x[t][j]; }
                }
            }
            if (end) {
                for (int i = 0; i < lanes * N; i++) {
                    end[offset + 2 * i] = h[i % N].re[i / N]; end[offset + 2 * i + 1] = h[i % N].im[i / N];
                }
            }
        }
    }
}

// Backward, in one sweep from the last timestep to the first, without the states h, which are not kept. The gradient of
// a complex number z is the complex number dz = dL/dRe(z) + i dL/dIm(z). Write ~ for the conjugate. If u = f s for
// complex f and s, then ds = ~f du; if y = Re(f s), then ds = ~f dy. For one oscillator of one feature:
//
//  1. The state h_t acts on y_t and on h_{t+1}: dh_t = ~g dy_t + ~q dh_{t+1}. Both terms have the factor ~g, so
//         dh_t = ~g a_t        a_t = dy_t + ~q a_{t+1}
//     The sweep begins with a_{T+1} = 0. But if later timesteps start from h_T, it begins with their a at
//     their first timestep.
//  2. The input enters h_t with the factor p and y_t with omega:
//         dx_t = omega dy_t + sum_k Re(p ~g a_t)        domega = sum_t dy_t x_t
//  3. The factor p: dp = sum_t x_t Re(dh_t), so
//         dp = Re(~g Q)        Q = sum_t x_t a_t
//  4. The weight g: dg = sum_t dy_t ~h_t. Put in dy_t = a_t - ~q a_{t+1} from step 1. Let the sum of the second part
//     start one step later, which leaves two terms over at its ends:
//         sum_t ~q a_{t+1} ~h_t = sum_t ~q a_t ~h_{t-1} - ~q a_1 ~h_0 + ~q a_{T+1} ~h_T
//         dg = sum_t a_t (~h_t - ~q ~h_{t-1}) + ~q a_1 ~h_0 - ~q a_{T+1} ~h_T
//     Since h_t - q h_{t-1} = p x_t, the sum is p Q:
//         dg = p Q + ~h_0 ~q a_1 - ~h_T ~q a_{T+1}
//  5. The factor q: dq = sum_t dh_t ~h_{t-1}. Put in dh_t = ~g a_t and
//     h_{t-1} = q^(t-1) h_0 + p sum_{s<t} q^(t-1-s) x_s, and exchange the sums:
//         dq = ~g (~h_0 sum_t ~q^(t-1) a_t + p sum_s x_s sum_{t>s} ~q^(t-1-s) a_t)
//     Here t stops at T, because only the q of timesteps 1..T is meant. (What comes back from later timesteps is
//     already in a_T, through a_{T+1}.) Define, for s = 0..T, a'_s = sum_{s<t<=T} ~q^(t-1-s) a_t. Then
//         dq = ~g (~h_0 a'_0 + p R)        R = sum_s x_s a'_s
//     and a' is a second recurrence that runs along with a: a'_{s-1} = a_s + ~q a'_s, from a'_T = 0.
//  6. The first state: dh_0 = ~q dh_1 = ~g ~q a_1.
//  7. Down to the parameters (cema_coefficients_backward): q = radius exp(i phi) gives
//         dradius = Re(~exp(i phi) dq)        dphi = Im(~q dq)
//     and then radius = 1 - p sigmoid(delta), phi = 2 pi k/N sigmoid(theta), p = sigmoid(alpha). The derivative of
//     a sigmoid is sigmoid (1 - sigmoid).
// The sweep carries a_t and not dh_t = ~g a_t, because step 4 needs Q, which is a sum without g, and g may be 0.
typedef struct { double re, im; } Complex;
Complex complex_of(double re, double im) { Complex z = {re, im}; return z; }
Complex complex_add(Complex a, Complex b) { return complex_of(a.re + b.re, a.im + b.im); }
Complex complex_mul(Complex a, Complex b) { return complex_of(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re); }
// conj_mul(a, b) = ~a b
Complex conj_mul(Complex a, Complex b) { return complex_of(a.re * b.re + a.im * b.im, a.re * b.im - a.im * b.re); }
Complex lane_of(const ComplexLanes* z, int j) { return complex_of(z->re[j], z->im[j]); }

// What the sweep carries for oscillator k of the features: a_t, a'_t, and the sums Q and R over the timesteps done so
// far.
typedef struct { double re[LANES], im[LANES]; } ComplexSums;
typedef struct { ComplexLanes a, a_prime; ComplexSums Q, R; } Sweep;

// One oscillator of each feature, back over the timesteps of a tile. dx is added to.
static inline void oscillator_backward(float dx[TIMES][LANES], Sweep* sweep, const Oscillator* oscillator,
                                       const float x[TIMES][LANES], const float dy[TIMES][LANES], int times) {
    Oscillator o = *oscillator;
    ComplexLanes a = sweep->a, a_prime = sweep->a_prime, Q = {{0}, {0}}, R = {{0}, {0}};
    for (int t = times - 1; t >= 0; t--) {
        for (int j = 0; j < LANES; j++) {
            float re = o.q.re[j] * a.re[j] + o.q.im[j] * a.im[j] + dy[t][j]; // a_t
            float im = o.q.re[j] * a.im[j] - o.q.im[j] * a.re[j];
            float prime_re = a_prime.re[j], prime_im = a_prime.im[j];        // a'_t
            Q.re[j] += x[t][j] * re; Q.im[j] += x[t][j] * im;
            R.re[j] += x[t][j] * prime_re; R.im[j] += x[t][j] * prime_im;
            dx[t][j] += o.p[j] * (o.g.re[j] * re + o.g.im[j] * im);
            a_prime.re[j] = o.q.re[j] * prime_re + o.q.im[j] * prime_im + re; // a'_{t-1}
            a_prime.im[j] = o.q.re[j] * prime_im - o.q.im[j] * prime_re + im;
            a.re[j] = re; a.im[j] = im;
        }
    }
    sweep->a = a; sweep->a_prime = a_prime;
    for (int j = 0; j < LANES; j++) {
        sweep->Q.re[j] += Q.re[j]; sweep->Q.im[j] += Q.im[j];
        sweep->R.re[j] += R.re[j]; sweep->R.im[j] += R.im[j];
    }
}

// Step 7 for oscillator k (from 0) of feature d.
static void cema_coefficients_backward(CemaParams dw, double dp, Complex dq, CemaParams w, int d, int k, int N) {
    size_t at = (size_t)d * N + k;
    double p = sigmoid(w.alpha[at]), s_delta = sigmoid(w.delta[at]), s_theta = sigmoid(w.theta[d]);
    double full = 2.0 * M_PI / N * (k + 1), phi = full * s_theta, radius = 1.0 - p * s_delta;
    double dradius = cos(phi) * dq.re + sin(phi) * dq.im, dphi = radius * (cos(phi) * dq.im - sin(phi) * dq.re);
    dw.alpha[at] += p * (1 - p) * (dp - s_delta * dradius);
    dw.delta[at] -= p * s_delta * (1 - s_delta) * dradius;
    dw.theta[d] += full * s_theta * (1 - s_theta) * dphi;
}

// dinp (B,T,D) is assigned. dw and dstart (B,D,N,2) are added to; dstart may be NULL. start is what the forward pass
// had. a_end (B,D,N,2): a_{T+1}, NULL for zero. end (B,D,N,2): h_T, which is read only if there is an a_end. dstart is
// the true gradient dh_0. It cannot be the a_end of an earlier call: that is this call's a_1.
void cema_backward(float* dinp, CemaParams dw, float* dstart, const float* dout, const float* start, const float* end,
                   const float* a_end, const float* inp, CemaParams w, int B, int T, int D, int N) {
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += LANES) {
        int lanes = min_int(LANES, D - d0);
        Oscillator oscillators[CEMA_MAX_NDIM];
        double dp[CEMA_MAX_NDIM][LANES] = {{0}}; // summed over the sequences, like dq
        Complex dq[CEMA_MAX_NDIM][LANES] = {{{0, 0}}};
        cema_coefficients(oscillators, w, d0, D, N);
        for (int b = 0; b < B; b++) {
            Sweep sweeps[CEMA_MAX_NDIM];
            size_t offset = ((size_t)b * D + d0) * N * 2; // as in cema_forward
            double domega[LANES] = {0};
            memset(sweeps, 0, sizeof(sweeps));
            if (a_end) {
                for (int i = 0; i < lanes * N; i++) {
                    sweeps[i % N].a.re[i / N] = a_end[offset + 2 * i];
                    sweeps[i % N].a.im[i / N] = a_end[offset + 2 * i + 1];
                }
            }
            for (int t0 = (T - 1) / TIMES * TIMES; t0 >= 0; t0 -= TIMES) {
                float x[TIMES][LANES], dy[TIMES][LANES], dx[TIMES][LANES] = {{0}};
                int times = min_int(TIMES, T - t0);
                size_t at = ((size_t)b * T + t0) * D + d0;
                tile_load(x, inp + at, times, lanes, D);
                tile_load(dy, dout + at, times, lanes, D);
                for (int k = 0; k < N; k++) { oscillator_backward(dx, &sweeps[k], &oscillators[k], x, dy, times); }
                for (int t = 0; t < times; t++) {
                    for (int j = 0; j < lanes; j++) {
                        dinp[at + (size_t)t * D + j] = dx[t][j] + w.omega[d0 + j] * dy[t][j];
                        domega[j] += dy[t][j] * x[t][j];
                    }
                }
            }
            for (int j = 0; j < lanes; j++) { dw.omega[d0 + j] += domega[j]; }
            for (int i = 0; i < lanes * N; i++) { // steps 3 to 6 from the sums of this sequence
                int k = i % N, j = i / N;
                size_t at = offset + 2 * i, at_gamma = 2 * ((size_t)d0 * N + i);
                double p = oscillators[k].p[j];
                Complex q = lane_of(&oscillators[k].q, j), g = lane_of(&oscillators[k].g, j);
                Complex qa = conj_mul(q, lane_of(&sweeps[k].a, j)); // ~q a_1
                Complex dg = complex_of(p * sweeps[k].Q.re[j], p * sweeps[k].Q.im[j]);
                Complex sum = complex_of(p * sweeps[k].R.re[j], p * sweeps[k].R.im[j]); // p R + ~h_0 a'_0
                if (start) {
                    Complex h_0 = complex_of(start[at], start[at + 1]);
                    dg = complex_add(dg, conj_mul(h_0, qa));
                    sum = complex_add(sum, conj_mul(h_0, lane_of(&sweeps[k].a_prime, j)));
                }
                if (a_end) {
                    Complex h_T = complex_of(end[at], end[at + 1]), a_T1 = complex_of(a_end[at], a_end[at + 1]);
                    Complex later = conj_mul(h_T, conj_mul(q, a_T1)); // ~h_T ~q a_{T+1}
                    dg = complex_of(dg.re - later.re, dg.im - later.im);
                }
                dw.gamma[at_gamma] += dg.re / sqrt(N); dw.gamma[at_gamma + 1] += dg.im / sqrt(N);
                dp[k][j] += g.re * sweeps[k].Q.re[j] + g.im * sweeps[k].Q.im[j]; // Re(~g Q)
                dq[k][j] = complex_add(dq[k][j], conj_mul(g, sum));
                if (dstart) {
                    Complex dh_0 = conj_mul(g, qa);
                    dstart[at] += dh_0.re; dstart[at + 1] += dh_0.im;
                }
            }
        }
        for (int i = 0; i < lanes * N; i++) {
            cema_coefficients_backward(dw, dp[i % N][i / N], dq[i % N][i / N], w, d0 + i / N, i % N, N);
        }
    }
}

// Layer norm and RMS norm over the D features of a row.
//     layer norm:  out = (inp - mean) rstd (weight + 1) + bias        rstd = 1/sqrt(variance + eps)
//     RMS norm:    out = inp rstd (weight + 1)                        rstd = 1/sqrt(mean of squares + eps)
// It is an RMS norm if mean and bias are NULL. Without a weight (NULL) there is no scale (eq. 6).
// out, inp (rows,D) | weight, bias (D) | mean, rstd (rows): saved for the backward pass
void norm_forward(float* out, float* mean, float* rstd, const float* inp, const float* weight, const float* bias,
                  size_t rows, int D, float eps) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        const float* x = inp + r * D;
        double mu = 0, squares = 0;
        if (mean) {
            OMP(omp simd reduction(+:mu))
            for (int d = 0; d < D; d++) { mu += x[d]; }
            mean[r] = mu /= D;
        }
        OMP(omp simd reduction(+:squares))
        for (int d = 0; d < D; d++) { squares += (x[d] - mu) * (x[d] - mu); }
        float mean_r = mu, rstd_r = rstd[r] = 1.0 / sqrt(squares / D + eps);
        for (int d = 0; d < D; d++) { out[r * D + d] = (x[d] - mean_r) * rstd_r; }
        if (!weight) { continue; }
        for (int d = 0; d < D; d++) {
            out[r * D + d] = out[r * D + d] * (weight[d] + 1.0f) + (bias ? bias[d] : 0.0f);
        }
    }
}

// Backward. With the normalized value xhat = (inp - mean) rstd and its gradient f = dout (weight + 1),
//     dinp = rstd (f - xhat mean(f xhat) - mean(f))        the last term for layer norm only
//     dweight += sum over rows of dout xhat                dbias += sum over rows of dout
// dinp is assigned; it must not be dout. dweight and dbias are NULL where weight and bias are.
void norm_backward(float* dinp, float* dweight, float* dbias, const float* dout, const float* mean, const float* rstd,
                   const float* inp, const float* weight, size_t rows, int D) {
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        const float *x = inp + r * D, *dy = dout + r * D;
        float mu = mean ? mean[r] : 0;
        float* f = dinp + r * D; // until it is overwritten by dinp
        double sum_f = 0, sum_fx = 0;
        for (int d = 0; d < D; d++) { f[d] = weight ? dy[d] * (weight[d] + 1.0f) : dy[d]; }
        OMP(omp simd reduction(+:sum_f,sum_fx))
        for (int d = 0; d < D; d++) { sum_f += f[d]; sum_fx += (double)f[d] * (x[d] - mu); }
        float mean_f = mean ? sum_f / D : 0, mean_fxhat_rstd = sum_fx * rstd[r] * rstd[r] / D;
        for (int d = 0; d < D; d++) { f[d] = rstd[r] * (f[d] - mean_f - (x[d] - mu) * mean_fxhat_rstd); }
    }
    if (!dweight) { return; }
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += 16) { // each thread has columns of its own
        for (size_t r = 0; r < rows; r++) {
            const float *x = inp + r * D, *dy = dout + r * D, mu = mean ? mean[r] : 0;
            for (int d = d0; d < min_int(d0 + 16, D); d++) { dweight[d] += dy[d] * (x[d] - mu) * rstd[r]; }
            for (int d = d0; dbias && d < min_int(d0 + 16, D); d++) { dbias[d] += dy[d]; }
        }
    }
}

// Queries and keys, eq. 7 and 8, from one shared representation: znorm = rms_norm(z), separately for each of H heads of
// width Z/H (eq. 6). Two affine maps make q and k of it:
//     q = znorm (gamma_0 + 1)/sqrt(Z/H) + beta_0        k = znorm (gamma_1 + 1)/sqrt(Z/H) + beta_1
// This bounds a score, whatever Wz and the activations do. A head of znorm has at most the length sqrt(Z/H). So at
// first, with gamma and beta 0, q and k have at most length 1, and their product is a cosine: between -1 and 1.
// Attention starts almost uniform: a query's score with its own key is 1, with unlike ones about 0. It becomes sharp as
// gamma grows. At any time the length of q is at most the largest |gamma_0 + 1| plus the length of beta_0, both taken
// over one head; likewise for k; and weight decay pulls gamma and beta to 0. (In a Transformer q and k grow with their
// weights, and nothing bounds the product. It is divided by sqrt(Z/H) once, to start with scores of size 1. This model
// has that factor both in q and in k, and no other.)
//
// Then the rotary embedding tells q and k their positions: each pair of features (2i, 2i+1) of a head is turned by the
// angle pos * base^(-2i/(Z/H)), where pos counts from the start of the chunk. The length stays the same, and a score
// depends on the two positions only through their distance.
// q, k, znorm (B,T,Z) | gamma, beta (2,Z) | rotations (c,Z/H/2,2): cosine and sine of each angle | the first timestep
// has the position `pos` in its chunk of c timesteps
void qk_forward(float* q, float* k, const float* znorm, const float* gamma, const float* beta, const float* rotations,
                int B, int T, int pos, int c, int Z, int H) {
    int width = Z / H; // of a head
    float scale = 1.0 / sqrt(width);
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < (size_t)B * T; r++) {
        const float *x = znorm + r * Z, *turn = rotations + (size_t)((pos + r % T) % c) * width;
        for (int which = 0; which < 2; which++) {
            const float *gain = gamma + which * Z, *shift = beta + which * Z;
            float* out = (which ? k : q) + r * Z;
            for (int i = 0, j = 0; i < Z; i += 2, j = j + 2 < width ? j + 2 : 0) { // j is i % width
                float re = x[i] * (gain[i] + 1.0f) * scale + shift[i];
                float im = x[i + 1] * (gain[i + 1] + 1.0f) * scale + shift[i + 1];
                out[i] = re * turn[j] - im * turn[j + 1];
                out[i + 1] = re * turn[j + 1] + im * turn[j];
            }
        }
    }
}

// Backward, for sequences that start where a chunk starts. dq and dk are turned back by the angle of their position.
// Call the result dturn. Then
//     dgamma += dturn znorm/sqrt(Z/H)        dbeta += dturn        with index 0 from dq and index 1 from dk
//     dznorm = sum over both of dturn (gamma + 1)/sqrt(Z/H)
void qk_backward(float* dznorm, float* dgamma, float* dbeta, const float* dq, const float* dk, const float* znorm,
                 const float* gamma, const float* rotations, int B, int T, int c, int Z, int H) {
    int width = Z / H; // of a head
    float scale = 1.0 / sqrt(width);
    OMP(omp parallel for schedule(static))
    for (int i0 = 0; i0 < Z; i0 += 16) { // each thread has columns of its own
        for (size_t r = 0; r < (size_t)B * T; r++) {
            const float* turn = rotations + (size_t)(r % T % c) * width;
            for (int i = i0; i < min_int(i0 + 16, Z); i += 2) {
                size_t at = r * Z + i;
                float cosine = turn[i % width], sine = turn[i % width + 1], sum_re = 0, sum_im = 0;
                for (int which = 0; which < 2; which++) {
                    const float* turned = (which ? dk : dq) + at;
                    float re = turned[0] * cosine + turned[1] * sine, im = turned[1] * cosine - turned[0] * sine;
                    int j = which * Z + i;
                    dgamma[j] += re * znorm[at] * scale; dgamma[j + 1] += im * znorm[at + 1] * scale;
                    dbeta[j] += re; dbeta[j + 1] += im;
                    sum_re += re * (gamma[j] + 1.0f) * scale;
                    sum_im += im * (gamma[j + 1] + 1.0f) * scale;
                }
                dznorm[at] = sum_re; dznorm[at + 1] = sum_im;
            }
        }
    }
}

static inline float exp_fast(float x); // exp, made for vector registers; see "Matrix products"

// SiLU with a factor, for each of n numbers: out = silu(inp) * mul, silu(a) = a sigmoid(a) (eq. 16 and 18). mul NULL
// stands for ones.
void silu_forward(float* out, const float* inp, const float* mul, size_t n) {
    OMP(omp parallel for simd schedule(static))
    for (size_t i = 0; i < n; i++) { out[i] = inp[i] / (1.0f + exp_fast(-inp[i])) * (mul ? mul[i] : 1.0f); }
}

// Backward, with s = sigmoid(inp): dinp = dout mul s (1 + inp (1 - s)) and dmul = dout inp s. Both are assigned. dmul
// is NULL where mul is. dinp may be dout, so dmul is computed first.
void silu_backward(float* dinp, float* dmul, const float* dout, const float* inp, const float* mul, size_t n) {
    if (mul) {
        OMP(omp parallel for simd schedule(static))
        for (size_t i = 0; i < n; i++) {
            float s = 1.0f / (1.0f + exp_fast(-inp[i]));
            dmul[i] = dout[i] * inp[i] * s;
            dinp[i] = dout[i] * mul[i] * s * (1.0f + inp[i] * (1.0f - s));
        }
    } else {
        OMP(omp parallel for simd schedule(static))
        for (size_t i = 0; i < n; i++) {
            float s = 1.0f / (1.0f + exp_fast(-inp[i]));
            dinp[i] = dout[i] * s * (1.0f + inp[i] * (1.0f - s));
        }
    }
}

// Declarations for attention: dropout's parameters, and three functions. These are written under "Matrix products"
// (gemm and scratch) and "Dropout" (attention_scores); gemm speaks of matrices A, B and C of its own.
typedef struct {
    uint64_t key, first;  // of the layer and site; number of the pass's first sequence since training began
    int T, time;          // timesteps of the pass, and number of the first of them in its sequence
    uint32_t drop;        // an element is dropped with probability drop/65536; 0: no dropout
    float scale, dropped; // what elements that stay are multiplied by, and what the others become
} Dropout;
// C (M,N) = A (M,K) B (K,N) + add (M,N) + bias (N). A[i][k] is a[i*a_i + k*a_k], B[k][j] is b[k*b_k + j*b_j], and the
// rows of C and add lie ldc apart. So other strides transpose an operand or take a part of it. add and bias may be
// NULL, and add may be C.
void gemm(float* c, size_t ldc, const float* a, size_t a_i, size_t a_k, const float* b, size_t b_k, size_t b_j,
          int M, int N, int K, const float* add, const float* bias);
// scores (rows,keys) = q k^T for one head, of width `width`, of `rows` queries and the first `keys` keys of their
// chunk. b, t0 and h (sequence, first timestep, head) only serve DropKey, which in training may set some scores to
// -infinity. Nothing else in the attention layer is changed by dropout.
void attention_scores(float* scores, const float* q, const float* k, int rows, int keys, int Z, int width,
                      Dropout drop, int b, int t0, int h);
float* scratch(int use, size_t n); // memory of the calling thread, for at least n floats
enum { OF_PRODUCTS, OF_ATTENTION, NUM_USES };

// Chunk attention, eq. 9: query t sees the keys s <= t of its own chunk of c timesteps, and out_t is the mean of their
// values, weighted with the softmax of the scores:
//     out_t = sum_s P_ts v_s        P_ts = exp(q_t k_s - lse_t)        lse_t = log sum_s exp(q_t k_s)
// The last chunk may be short. Chunks know nothing of each other; with c >= T this is full attention.
// out (B,T,H,V/H), q (B,T,H,Z/H) | k (B,K,H,Z/H), v (B,K,H,V/H): K keys and values | lse (B,T,H): saved for backward
// For whole sequences pos = 0 and K = T. For a stream K = c: k and v hold the current chunk from its start, and the
// queries stand at pos, pos+1, ... in it, pos + T <= c; then there is one chunk.
//
// The queries of a chunk go in tiles of ROWS, so there is never a c x c matrix, and a tile computes scores only with
// the keys up to its last query. With c = 4, T = 7 and tiles of two, the first chunk has the tiles of queries 0 1 (keys
// 0..1) and 2 3 (keys 0..3), the second 4 5 (keys 4..5) and 6 (keys 4..6). In the first row of a full tile the last
// score is masked.
enum { ROWS = 96 };
void attention_forward(float* out, float* lse, const float* q, const float* k, const float* v,
                       int B, int T, int K, int pos, int c, int H, int Z, int V, Dropout drop) {
    int zd = Z / H, vd = V / H, chunks = pos ? 1 : (T + c - 1) / c, tiles = (min_int(c, T) + ROWS - 1) / ROWS;
    OMP(omp parallel for schedule(static) collapse(4))
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                for (int tile = 0; tile < tiles; tile++) {
                    int first = chunk * c, t0 = first + tile * ROWS; // first key of the chunk, first query of the tile
                    int rows = min_int(ROWS, min_int(first + c, T) - t0), keys = pos + t0 - first + rows;
                    if (rows <= 0) { continue; } // a last chunk that is short has fewer tiles
                    float* P = scratch(OF_ATTENTION, (size_t)ROWS * min_int(c, pos + T)); // scores, then probabilities
                    size_t at = (size_t)b * T + t0, at_k = (size_t)b * K + first;
                    attention_scores(P, q + at * Z + h * zd, k + at_k * Z + h * zd, rows, keys, Z, zd, drop, b, t0, h);
                    for (int i = 0; i < rows; i++) {
                        float *p = P + (size_t)i * keys, top = -INFINITY, sum = 0;
                        int seen = keys - rows + i + 1; // keys that query i of the tile sees
                        for (int j = 0; j < seen; j++) { top = p[j] > top ? p[j] : top; }
                        OMP(omp simd reduction(+:sum))
                        for (int j = 0; j < seen; j++) {
                            p[j] = p[j] == -INFINITY ? 0.0f : exp_fast(p[j] - top); // exp_fast is never quite 0
                            sum += p[j];
                        }
                        if (sum == 0) { top = 0; sum = 1; } // no key is left: out becomes 0
                        for (int j = 0; j < keys; j++) { p[j] = j < seen ? p[j] / sum : 0.0f; }
                        lse[(at + i) * H + h] = top + logf(sum);
                    }
                    gemm(out + at * V + h * vd, V, P, keys, 1, v + at_k * V + h * vd, V, 1, rows, vd, keys, NULL, NULL);
                }
            }
        }
    }
}

// Backward. The probabilities are made again from q, k and lse. With S the scores,
//     dv_s = sum_t P_ts dout_t        dP_ts = dout_t v_s        dS_ts = P_ts (dP_ts - sum_j P_tj dP_tj)
//     dq_t = sum_s dS_ts k_s          dk_s = sum_t dS_ts q_t
// The tiles of a chunk go from its last to its first: the last tile reaches all keys, so it can assign dk and dv, to
// which the others add. dq, dk (B,T,H,Z/H) and dv (B,T,H,V/H) are assigned.
void attention_backward(float* dq, float* dk, float* dv, const float* dout, const float* lse, const float* q,
                        const float* k, const float* v, int B, int T, int c, int H, int Z, int V, Dropout drop) {
    int zd = Z / H, vd = V / H, chunks = (T + c - 1) / c;
    OMP(omp parallel for schedule(static) collapse(3))
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                int first = chunk * c, length = min_int(c, T - first), last_tile = (length - 1) / ROWS * ROWS;
                size_t at_k = (size_t)b * T + first;
                float* P = scratch(OF_ATTENTION, (size_t)2 * ROWS * min_int(c, T));
                const float *k_chunk = k + at_k * Z + h * zd, *v_chunk = v + at_k * V + h * vd;
                float *dk_chunk = dk + at_k * Z + h * zd, *dv_chunk = dv + at_k * V + h * vd;
                for (int tile = last_tile; tile >= 0; tile -= ROWS) { // its first query, counted in the chunk
                    int rows = min_int(ROWS, length - tile), keys = tile + rows, t0 = first + tile;
                    size_t at = (size_t)b * T + t0;
                    const float *q_tile = q + at * Z + h * zd, *dout_tile = dout + at * V + h * vd;
                    float* dS = P + (size_t)rows * keys; // first dP
                    bool adds = tile < last_tile;
                    attention_scores(P, q_tile, k_chunk, rows, keys, Z, zd, drop, b, t0, h);
                    gemm(dS, keys, dout_tile, V, 1, v_chunk, 1, V, rows, keys, vd, NULL, NULL);
                    for (int i = 0; i < rows; i++) {
                        float *p = P + (size_t)i * keys, *ds = dS + (size_t)i * keys, lse_i = lse[(at + i) * H + h];
                        int seen = keys - rows + i + 1;
                        float dot = 0; // sum_j P_tj dP_tj
                        OMP(omp simd reduction(+:dot))
                        for (int j = 0; j < seen; j++) {
                            p[j] = p[j] == -INFINITY ? 0.0f : exp_fast(p[j] - lse_i);
                            dot += p[j] * ds[j];
                        }
                        for (int j = 0; j < seen; j++) { ds[j] = p[j] * (ds[j] - dot); }
                        for (int j = seen; j < keys; j++) { p[j] = ds[j] = 0; }
                    }
                    gemm(dq + at * Z + h * zd, Z, dS, keys, 1, k_chunk, Z, 1, rows, zd, keys, NULL, NULL);
                    gemm(dk_chunk, Z, dS, 1, keys, q_tile, Z, 1, keys, zd, rows, adds ? dk_chunk : NULL, NULL);
                    gemm(dv_chunk, V, P, 1, keys, dout_tile, V, 1, keys, vd, rows, adds ? dv_chunk : NULL, NULL);
                }
            }
        }
    }
}

// Cross-entropy in nats: losses = log sum_i exp(logits_i) - logits_target; 0 where the target is IGNORE.
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

// Backward, in place: logits become dlogits = (softmax(logits) - onehot(target)) dloss; 0 where the target is IGNORE.
// dloss is the gradient of each single loss: 1 over the number of targets, for their mean.
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
// Models, states and passes: what the block works on

// A row of one of the two tables, with the numbers of a configuration put in. Its functions are under "Memory".
typedef struct {
    const char* name;  // in files and dumps, with %d for the layer; may be ""
    int slots;         // how many layers have memory of their own; 1 where it is shared or there is only one
    size_t dims[4];    // shape of one slot (of an activation: of one timestep), then zeros
    size_t size;       // elements of one slot
    int init;
} Spec;

// All that a model remembers of its past: what one call hands to the next. There are two kinds.
//   Without k and v, for training: pos is 0, so a call that another one follows must end where a chunk ends.
//   With k and v, for streams (evaluation, generation): any number of timesteps a call, if they belong to one chunk,
//   pos + T <= c. Each call has the same State as `start` and `end`. There is no backward pass.
// Either way the result is that of one call on all tokens, up to rounding.
//
// Its arrays have a row each: field, shape for one layer and sequence (ends at a 0), and the name in checkpoints of
// those that go from a training step to the next with --carry; "" if only streams have them.
#define STATE_ARRAYS(X) \
    X(h, "layers.%d.mega.cema.h", D, N, 2) /* CEMA: (L,B,D,N,2) */ \
    MORE_CARRIED(X) \
    X(k, "", c, Z, 0) /* keys and values of the current chunk: (L,B,c,Z) and (L,B,c,V); NULL in training */ \
    X(v, "", c, V, 0) \
    MORE_CACHED(X)
typedef struct {
    int B, pos;      // sequences; timesteps so far in the current chunk
    size_t bytes;    // of norm and the arrays with a name; all arrays are one piece of memory
    NormState* norm; // (L+1,B,G): the timestep norms of all layers, then the model's last norm
    STATE_ARRAYS(POINTER_FIELD)
} State;
enum { NUM_ARRAYS = (sizeof(State) - offsetof(State, h)) / sizeof(float*) };

typedef struct {
    Config config;
    Spec specs[NUM_PARAMS];
    size_t num_parameters;
    Params params, grads;    // each one array of num_parameters floats that starts at .embed
    size_t first, last;      // the part of this array that this process updates; one process alone updates all
    float *adam_m, *adam_v;  // (last - first): AdamW's moments of that part
    float* rotations;        // (c,Z/H/2,2): cosine and sine of the rotary angles
} Model;

// --dropout, --hidden-dropout, --attention-dropout, and what the masks are drawn from.
typedef struct { double rates[3]; uint64_t seed, first; } Masks; // first: number of the first sequence, see Dropout
typedef struct { Dropout embed, mega, fc2, rmsnorm, gated, hidden, keys; } Dropouts; // named as what is dropped

// The memory of a forward pass over (B,T) tokens, and of its backward pass unless keep is KEEP_NONE.
typedef struct {
    int B, T, keep;
    Spec specs[NUM_ACTS], dspecs[NUM_ACTS];
    Acts acts, grads;
    Masks masks;
    // Only where a sequence is spread over several processes; else empty:
    State before; // the state before this process's slice of the sequence
    State after;  // the state after it: only h
    State dafter; // norm: the gradient of the statistics after the slice; h: a_{T+1} of CEMA, see cema_backward
} Pass;

// More machinery, in the order in which the block uses it. These views point to one layer's part of each array. The
// view of a state that does not exist has no arrays: all NULL.
Params params_layer(const Model* m, Params p, int l);
Acts acts_layer(const Spec* specs, Acts a, int l);
State state_layer(const State* s, const Config* config, int l);
Dropouts dropouts_at(Masks m, int T, int l);
// out (rows,n) = dropout(inp) + add; add may be NULL. Returns out; without dropout does nothing and returns inp.
const float* dropout(float* out, const float* inp, const float* add, Dropout d, size_t rows, int n);
// Functions for sequences that are spread over several processes. In one process they do nothing: the first three
// return `start`, the last two return NULL.
const State* pass_start(const Pass* s, const State* start);
NormState* slice_norm_start(const Pass* s, int l, NormState* start, const float* inp, const float* weight,
                            const Config* config);
float* slice_cema_start(const Pass* s, int l, float* start, const float* inp, CemaParams w, const Config* config);
const NormState* slice_norm_dend(const Pass* s, int l, const float* dout, const float* mean, const float* rstd,
                                 const float* inp, const float* weight, const Config* config);
const float* slice_cema_a_end(const Pass* s, int l, const float* dout, CemaParams w, const Config* config);

// ---------------------------------------------------------------------------------------------------------------------
// The block

// out (rows,O) = inp (rows,I) weight (O,I)^T + bias (O) + add (rows,O). bias and add may be NULL, add may be out.
void matmul_forward(float* out, const float* inp, const float* weight, const float* bias, const float* add,
                    size_t rows, int I, int O) {
    gemm(out, O, inp, I, 1, weight, 1, I, rows, O, I, add, bias);
}

// dinp = dout weight + add, dweight += dout^T inp, dbias += column sums of dout. add (rows,I) may be NULL or dinp;
// dbias may be NULL.
void matmul_backward(float* dinp, float* dweight, float* dbias, const float* dout, const float* inp,
                     const float* weight, const float* add, size_t rows, int I, int O) {
    gemm(dinp, I, dout, O, 1, weight, I, 1, rows, I, O, add, NULL);
    gemm(dweight, I, dout, 1, O, inp, I, 1, O, I, rows, dweight, NULL);
    if (!dbias) { return; }
    OMP(omp parallel for schedule(static))
    for (int o0 = 0; o0 < O; o0 += 16) { // each thread has columns of its own
        for (size_t r = 0; r < rows; r++) {
            for (int o = o0; o < min_int(o0 + 16, O); o++) { dbias[o] += dout[r * O + o]; }
        }
    }
}

// What goes into block l: the output of block l - 1, or the embedding.
float* block_input(const Spec* specs, Acts a, int l) { return l ? acts_layer(specs, a, l - 1).out : a.embed; }

// One block, Figure 3 of the paper: x (B,T,D) to out (B,T,D), from the state `start` to the state `end` (of all layers;
// `past` and `next` are this layer's part of them). start NULL is an empty past. end NULL does not keep the state. end
// may be start if no backward pass follows, which needs start again.
void block_forward(const Model* model, const Pass* s, int l, const State* start, State* end) {
    const Config* config = &model->config;
    int B = s->B, T = s->T, D = config->model_dim, H = config->num_heads, Z = config->z_dim, V = config->value_dim;
    int F = config->ffn_hidden_dim, c = config->chunk_size;
    int pos = start ? start->pos : 0;
    float eps = config->norm_eps;
    size_t rows = (size_t)B * T;
    const float* x = block_input(s->specs, s->acts, l);
    Params w = params_layer(model, model->params, l);
    Acts a = acts_layer(s->specs, s->acts, l);
    State past = state_layer(start, config, l), next = state_layer(end, config, l);
    Dropouts sites = dropouts_at(s->masks, T, l);

    // Long memory: n = timestep_norm(x), e = cema(n), m = rms_norm(e).
    past.norm = slice_norm_start(s, l, past.norm, x, w.timenorm_w, config); // several processes only
    timestepnorm_forward(a.timenorm, a.timenorm_mean, a.timenorm_rstd, next.norm, past.norm, x, w.timenorm_w,
                         w.timenorm_b, B, T, config);
    past.h = slice_cema_start(s, l, past.h, a.timenorm, cema_params(&w), config); // several processes only
    cema_forward(a.cema, next.h, past.h, a.timenorm, cema_params(&w), B, T, D, config->cema_ndim);
    norm_forward(a.rmsnorm, NULL, a.rmsnorm_rstd, a.cema, w.rmsnorm_w, NULL, rows, D, eps);
    dropout(a.rmsnorm, a.rmsnorm, NULL, sites.rmsnorm, rows, D);

    // Short memory: attention inside the chunk. Queries and keys are made from m, into which CEMA has mixed the past:
    // so a timestep can be found by what came before it. Values are made from n (eq. 16), into which this block has
    // mixed nothing of other timesteps but the statistics of the norm: what is found is the timestep itself, not an
    // average.
    matmul_forward(a.wz, a.rmsnorm, w.wz, w.wz_b, NULL, rows, D, Z);
    norm_forward(a.znorm, NULL, a.znorm_rstd, a.wz, NULL, NULL, rows * H, Z / H, eps);
    qk_forward(a.q, a.k, a.znorm, w.gamma, w.beta, model->rotations, B, T, pos, c, Z, H);
    matmul_forward(a.wv, a.timenorm, w.wv, w.wv_b, NULL, rows, D, V);
    silu_forward(a.v, a.wv, NULL, rows * V);
    const float *k = a.k, *v = a.v;
    int K = T;
    if (next.k) { // a stream: append these timesteps to the cache of the chunk, and attend to the cache
        K = c; k = next.k; v = next.v;
        for (int b = 0; b < B; b++) {
            memcpy(next.k + ((size_t)b * K + pos) * Z, a.k + (size_t)b * T * Z, sizeof(float) * T * Z);
            memcpy(next.v + ((size_t)b * K + pos) * V, a.v + (size_t)b * T * V, sizeof(float) * T * V);
        }
    }
    attention_forward(a.attention, a.attention_lse, a.q, k, v, B, T, K, pos, c, H, Z, V, sites.keys);

    // The gate r = silu(m Wr^T + br), and the first hop: y = m Wh1^T + bh1 + (o * r) Wh2^T + x. The product adds x.
    // With dropout on, x must not be dropped with the rest, so then dropout() adds it afterwards. With dropout off,
    // dropout() does nothing, not even the addition.
    matmul_forward(a.wr, a.rmsnorm, w.wr, w.wr_b, NULL, rows, D, V);
    silu_forward(a.gated, a.wr, a.attention, rows * V);
    dropout(a.gated, a.gated, NULL, sites.gated, rows, V);
    matmul_forward(a.mega, a.rmsnorm, w.wh1, w.wh1_b, sites.mega.drop ? NULL : x, rows, D, D);
    matmul_forward(a.mega, a.gated, w.wh2, NULL, a.mega, rows, V, D);
    dropout(a.mega, a.mega, x, sites.mega, rows, D);

    // Feed-forward, and the second hop: out = ffn(layer_norm(y)) + x. It is x that is added, not y (eq. 11). An
    // ordinary block adds two terms to the residual stream, that of attention and that of the feed-forward layer. Here
    // attention's term ends in y, which only the feed-forward layer reads, and the stream grows by one term a block.
    // The paper found this more stable in large models.
    norm_forward(a.norm, a.norm_mean, a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D, eps);
    matmul_forward(a.fc1, a.norm, w.fc1, NULL, NULL, rows, D, F);
    if (config->swiglu) { matmul_forward(a.fc3, a.norm, w.fc3, NULL, NULL, rows, D, F); }
    silu_forward(a.hidden, a.fc1, config->swiglu ? a.fc3 : NULL, rows * F);
    dropout(a.hidden, a.hidden, NULL, sites.hidden, rows, F);
    if (!config->rescale_nffn) {
        matmul_forward(a.out, a.hidden, w.fc2, NULL, sites.fc2.drop ? NULL : x, rows, F, D);
        dropout(a.out, a.out, x, sites.fc2, rows, D);
        return;
    }
    matmul_forward(a.fc2, a.hidden, w.fc2, NULL, NULL, rows, F, D);
    dropout(a.fc2, a.fc2, NULL, sites.fc2, rows, D);
    for (size_t i = 0; i < rows * D; i++) { a.out[i] = x[i] + a.fc2[i] * w.rescale[i % D]; }
}

// Backward: from da.out to the gradient of x, dx, and to those of the weights, dw. start: as in the forward pass.
// dstart: the gradient of that state is added to it; may be NULL, as in training, where no gradient goes from one call
// to another. The keys and values of a cache get no gradient: training starts where chunks start.
//
// Each line undoes the line of block_forward that has the same tensors. The calls of dropout() turn the gradient of a
// dropped tensor into that of the tensor before dropping, in memory that is not needed yet: `spare`, and da.fc1 and
// da.wr, which silu_backward assigns. Without dropout they return their input.
void block_backward(const Model* model, const Pass* s, int l, const State* start, State* dstart) {
    const Config* config = &model->config;
    int B = s->B, T = s->T, D = config->model_dim, H = config->num_heads, Z = config->z_dim, V = config->value_dim;
    int F = config->ffn_hidden_dim, c = config->chunk_size;
    size_t rows = (size_t)B * T;
    const float* x = block_input(s->specs, s->acts, l);
    float* dx = block_input(s->dspecs, s->grads, l);
    Params w = params_layer(model, model->params, l), dw = params_layer(model, model->grads, l);
    Acts a = acts_layer(s->specs, s->acts, l), da = acts_layer(s->dspecs, s->grads, l);
    State past = state_layer(pass_start(s, start), config, l), dpast = state_layer(dstart, config, l);
    State after = state_layer(&s->after, config, l);
    Dropouts sites = dropouts_at(s->masks, T, l);

    float* spare = da.timenorm; // until cema_backward assigns it

    // The second hop and the feed-forward layer.
    if (config->rescale_nffn) {
        for (size_t i = 0; i < rows * D; i++) {
            dw.rescale[i % D] += da.out[i] * a.fc2[i];
            da.fc2[i] = da.out[i] * w.rescale[i % D];
        }
    }
    const float* dfc2 = dropout(spare, config->rescale_nffn ? da.fc2 : da.out, NULL, sites.fc2, rows, D);
    matmul_backward(da.hidden, dw.fc2, NULL, dfc2, a.hidden, w.fc2, NULL, rows, F, D);
    const float* dhidden = dropout(da.fc1, da.hidden, NULL, sites.hidden, rows, F);
    silu_backward(da.fc1, config->swiglu ? da.fc3 : NULL, dhidden, a.fc1, config->swiglu ? a.fc3 : NULL, rows * F);
    matmul_backward(da.norm, dw.fc1, NULL, da.fc1, a.norm, w.fc1, NULL, rows, D, F);
    if (config->swiglu) { matmul_backward(da.norm, dw.fc3, NULL, da.fc3, a.norm, w.fc3, da.norm, rows, D, F); }
    norm_backward(da.mega, dw.norm_w, dw.norm_b, da.norm, a.norm_mean, a.norm_rstd, a.mega, w.norm_w, rows, D);

    // The first hop and the gate. m has three readers: Wh1, Wr and Wz. Their gradients add up in da.rmsnorm.
    const float* dmega = dropout(spare, da.mega, NULL, sites.mega, rows, D);
    matmul_backward(da.gated, dw.wh2, NULL, dmega, a.gated, w.wh2, NULL, rows, V, D);
    matmul_backward(da.rmsnorm, dw.wh1, dw.wh1_b, dmega, a.rmsnorm, w.wh1, NULL, rows, D, D);
    const float* dgated = dropout(da.wr, da.gated, NULL, sites.gated, rows, V);
    silu_backward(da.wr, da.attention, dgated, a.wr, a.attention, rows * V);
    matmul_backward(da.rmsnorm, dw.wr, dw.wr_b, da.wr, a.rmsnorm, w.wr, da.rmsnorm, rows, D, V);

    // Attention.
    attention_backward(da.q, da.k, da.v, da.attention, a.attention_lse, a.q, a.k, a.v, B, T, c, H, Z, V,
                       sites.keys);
    qk_backward(da.znorm, dw.gamma, dw.beta, da.q, da.k, a.znorm, w.gamma, model->rotations, B, T, c, Z, H);
    norm_backward(da.wz, NULL, NULL, da.znorm, NULL, a.znorm_rstd, a.wz, NULL, rows * H, Z / H);
    matmul_backward(da.rmsnorm, dw.wz, dw.wz_b, da.wz, a.rmsnorm, w.wz, da.rmsnorm, rows, D, Z);

    // CEMA and the values. n has two readers: CEMA, whose backward pass assigns da.timenorm, and Wv, whose adds to it.
    const float* dm = dropout(spare, da.rmsnorm, NULL, sites.rmsnorm, rows, D);
    norm_backward(da.cema, dw.rmsnorm_w, NULL, dm, NULL, a.rmsnorm_rstd, a.cema, w.rmsnorm_w, rows, D);
    const float* a_end = slice_cema_a_end(s, l, da.cema, cema_params(&w), config); // several processes only
    cema_backward(da.timenorm, cema_params(&dw), dpast.h, da.cema, past.h, after.h, a_end, a.timenorm, cema_params(&w),
                  B, T, D, config->cema_ndim);
    silu_backward(da.wv, NULL, da.v, a.wv, NULL, rows * V);
    matmul_backward(da.timenorm, dw.wv, dw.wv_b, da.wv, a.timenorm, w.wv, da.timenorm, rows, D, V);

    // x has three readers: the second hop, the first hop and the timestep norm. dx may be the same memory as da.out.
    OMP(omp parallel for schedule(static))
    for (size_t i = 0; i < rows * D; i++) { dx[i] = da.out[i] + da.mega[i]; }
    const NormState* dend = slice_norm_dend(s, l, da.timenorm, a.timenorm_mean, a.timenorm_rstd, x, w.timenorm_w,
                                            config); // several processes only
    timestepnorm_backward(dx, dw.timenorm_w, dw.timenorm_b, dpast.norm, dend, da.timenorm, a.timenorm_mean,
                          a.timenorm_rstd, past.norm, x, w.timenorm_w, B, T, config);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model. OF_MODEL stands before what another architecture may replace.
MORE_DECLARATIONS

// The output layer's weight, or with share_emb the embedding's.
float* output_weight(const Model* model, Params w) { return model->config.share_emb ? w.embed : w.output; }

// The release scales the embeddings of tied models. At first the blocks change them little and the final norm restores
// their length, so the logit of the token that was just read is about sqrt(D) above the others. Such a model starts
// with a loss of about sqrt(D) instead of ln(vocab), and has to unlearn this first. So the default is 1.
float embedding_scale(const Config* config) { return config->scale_emb ? sqrt(config->model_dim) : 1.0; }

// tokens (B,T) to s->acts.logits (B,T,vocab). start and end: as in block_forward; with a cache start->pos + T <= c.
void model_forward(const Model* model, const Pass* s, const int* tokens, const State* start, State* end) {
    const Config* config = &model->config;
    int D = config->model_dim, L = config->num_layers;
    size_t rows = (size_t)s->B * s->T;
    Acts a = s->acts;
    embedding_forward(a.embed, tokens, model->params.embed, embedding_scale(config), rows, D);
    dropout(a.embed, a.embed, NULL, dropouts_at(s->masks, s->T, 0).embed, rows, D);
    for (int l = 0; l < L; l++) { OF_MODEL(block_forward)(model, s, l, start, end); }
    const float* x = block_input(s->specs, a, L);
    State past = state_layer(start, config, L);
    past.norm = OF_MODEL(slice_norm_start)(s, L, past.norm, x, model->params.final_w, config); // several processes
    OF_MODEL(timestepnorm_forward)(a.final, a.final_mean, a.final_rstd, state_layer(end, config, L).norm, past.norm, x,
                                   model->params.final_w, model->params.final_b, s->B, s->T, config);
    matmul_forward(a.logits, a.final, output_weight(model, model->params), NULL, NULL, rows, D, config->vocab_size);
    if (end) { end->pos = ((start ? start->pos : 0) + s->T) % config->chunk_size; }
}

// Losses of the last forward pass, each in s->acts.losses (B,T). Returns their sum in nats; *scored grows by the number
// of targets that are not IGNORE.
double model_loss(const Model* model, const Pass* s, const int* targets, size_t* scored) {
    size_t rows = (size_t)s->B * s->T;
    double sum = 0;
    crossentropy_forward(s->acts.losses, s->acts.logits, targets, rows, model->config.vocab_size);
    for (size_t r = 0; r < rows; r++) { sum += s->acts.losses[r]; *scored += targets[r] != IGNORE; }
    return sum;
}

// Adds the gradient of dloss * (sum of losses) to model->grads, after model_forward and model_loss. dstart may be NULL,
// and training passes NULL: with --carry a sequence goes on from the state of the last step, but no gradient crosses
// steps (truncated backpropagation through time).
void model_backward(const Model* model, const Pass* s, const int* tokens, const int* targets, float dloss,
                    const State* start, State* dstart) {
    const Config* config = &model->config;
    int D = config->model_dim, L = config->num_layers;
    size_t rows = (size_t)s->B * s->T;
    Params w = model->params, dw = model->grads;
    Acts a = s->acts, da = s->grads;
    State past = state_layer(pass_start(s, start), config, L), dpast = state_layer(dstart, config, L);
    const float* x = block_input(s->specs, a, L);
    float* dx = block_input(s->dspecs, da, L);
    crossentropy_backward(a.logits, a.losses, targets, dloss, rows, config->vocab_size);
    matmul_backward(da.final, output_weight(model, dw), NULL, a.logits, a.final, output_weight(model, w), NULL, rows, D,
                    config->vocab_size);
    memset(dx, 0, sizeof(float) * rows * D);
    const NormState* dend = OF_MODEL(slice_norm_dend)(s, L, da.final, a.final_mean, a.final_rstd, x, w.final_w,
                                                      config); // several processes
    OF_MODEL(timestepnorm_backward)(dx, dw.final_w, dw.final_b, dpast.norm, dend, da.final, a.final_mean, a.final_rstd,
                                    past.norm, x, w.final_w, s->B, s->T, config);
    for (int l = L - 1; l >= 0; l--) { // with --recompute, only the last block's activations are still there
        if (s->keep == KEEP_BLOCKS && l < L - 1) { OF_MODEL(block_forward)(model, s, l, start, NULL); }
        OF_MODEL(block_backward)(model, s, l, start, dstart);
    }
    // The embedding itself is not needed any more: with dropout, its memory takes the gradient before dropping.
    const float* dembed = dropout(a.embed, da.embed, NULL, dropouts_at(s->masks, s->T, 0).embed, rows, D);
    embedding_backward(dw.embed, dembed, tokens, embedding_scale(config), rows, D);
}

// ---------------------------------------------------------------------------------------------------------------------
// The optimizer

// Where there are several processes, each updates a part of the parameters (see "Processes"). With one process these
// two do nothing.
void grads_sum_part(const Model* m);     // m->grads: this process's part becomes the sum over all processes
void params_gather_parts(const Model* m); // m->params: all parts come from the processes that updated them
void all_sum(double* x, int n);          // x (n) = its sum over all processes

// Adds up the gradients of all processes, and returns the global L2 norm of the sum.
double model_grad_norm(const Model* m) {
    enum { PIECE = 1 << 16 }; // sums over fixed pieces, added in order: the same bits with any number of threads
    size_t n = m->last - m->first, pieces = (n + PIECE - 1) / PIECE;
    double *partial = (double*)xcalloc(pieces, sizeof(double)), sum = 0;
    const float* g = m->grads.embed + m->first;
    grads_sum_part(m);
    OMP(omp parallel for schedule(static))
    for (size_t i = 0; i < pieces; i++) {
        double s = 0;
        for (size_t k = i * PIECE; k < min_size(n, (i + 1) * PIECE); k++) { s += (double)g[k] * g[k]; }
        partial[i] = s;
    }
    for (size_t i = 0; i < pieces; i++) { sum += partial[i]; }
    all_sum(&sum, 1);
    free(partial);
    return sqrt(sum);
}

// PyTorch's clip_grad_norm_: the factor for gradients whose norm is `norm`. limit 0 is no limit.
double clip_scale(double norm, double limit) { return limit > 0 && norm + 1e-6 > limit ? limit / (norm + 1e-6) : 1; }

typedef struct { double lr, beta1, beta2, eps, weight_decay; } AdamW;

// AdamW as in PyTorch, `step` counted from 1; gradients are multiplied by grad_scale first:
//     m = beta1 m + (1 - beta1) grad        v = beta2 v + (1 - beta2) grad^2
//     weight -= lr weight_decay weight + lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
// Every parameter decays, the norms' weights too: see plus-1 at the timestep norm.
void model_update(Model* model, const AdamW* o, int step, double grad_scale) {
    float *w = model->params.embed + model->first, *g = model->grads.embed + model->first;
    float *m = model->adam_m, *v = model->adam_v;
    float beta1 = o->beta1, beta2 = o->beta2, eps = o->eps, scale = grad_scale;
    float keep = 1.0 - o->lr * o->weight_decay, size = o->lr / (1.0 - pow(o->beta1, step));
    float correction = 1.0 / sqrt(1.0 - pow(o->beta2, step)), beta1_rest = 1.0 - o->beta1, beta2_rest = 1.0 - o->beta2;
    OMP(omp parallel for schedule(static))
    for (size_t i = 0; i < model->last - model->first; i++) {
        float grad = g[i] * scale;
        m[i] = beta1 * m[i] + beta1_rest * grad;
        v[i] = beta2 * v[i] + beta2_rest * grad * grad;
        w[i] = w[i] * keep - size * m[i] / (sqrtf(v[i]) * correction + eps);
    }
    params_gather_parts(model);
}

// ---------------------------------------------------------------------------------------------------------------------
// Flags and devices

// Rows as in MODEL_OPTIONS: kind, name (a flag, with dashes), default, smallest and largest value, help.
#define TOKEN_OPTIONS(X) \
    X(TEXT, tokenizer,         "", 0, 0,          "a .tok file (that of a .bin's .info); else a byte is a token") \
    X(TEXT, tokenizer_crc32,   "", 0, 0,          "what its CRC-32 must be (that of the first run)") \
    X(INT,  eod,               -1, -1, MAX_VOCAB, "token that ends a document (bytes: 0); -1: all is one text")

#ifndef GPU_OPTIONS // train_megalodon.cu has one more
#define GPU_OPTIONS(X)
#define ON_GPU_TOO
#endif
#define NEW_FOLDER "runs/N" // N: 1, or the next number that is free
#define OWN_SOURCES "train_megalodon.c,test_megalodon.c,data/*.h,dev/*.py,dev/*.c,README.md"
#define TRAINING_OPTIONS(X) \
    X(TEXT, train,    OWN_SOURCES, 0, 0,          "training data: text, or llm.c's .bin; several with commas and *") \
    X(TEXT, val,               "", 0, 0,          "validation data; without it the last 10% of each training file") \
    X(TEXT, out,       NEW_FOLDER, 0, 0,          "folder for checkpoints and log.tsv; none: save nothing") \
    X(INT,  batch,              4, 1, 1 << 24,    "sequences in a micro-step, of each group of processes") \
    X(INT,  seq,              256, 1, INT_MAX,    "tokens in a sequence") \
    X(INT,  accum,              1, 1, 1 << 24,    "micro-steps in a step") \
    X(BOOL, carry,              0, 0, 1,          "inside a document, start from the last step's state (with --eod)") \
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
    X(REAL, hidden_dropout,     0, 0, 0.99,       "of m, of o * r and of the hidden features of the ffn") \
    X(REAL, attention_dropout,  0, 0, 0.99,       "of the keys of each query") \
    X(INT,  seed,            1337, 0, INT_MAX,    "of initial weights, data order, dropout and sampling") \
    X(INT,  threads,            0, 0, 1024,       "OpenMP threads; 0 for its own default") \
    X(BOOL, recompute,          0, 0, 1,          "keep only the outputs of blocks, and compute the rest again") \
    X(INT,  val_every,        250, 0, INT_MAX,    "validate every so many steps; always after the last") \
    X(INT,  val_tokens,   1 << 18, 0, INT_MAX,    "validate on so many tokens, the first ones; 0 for all") \
    X(INT,  checkpoint_every,   0, 0, INT_MAX,    "save every so many steps, and keep all; always after the last") \
    X(REAL, checkpoint_minutes, 5, 0, 1e6,        "also save every so many minutes, and keep the newest; 0: do not") \
    X(INT,  sample_every,       0, 0, INT_MAX,    "print a sample every so many steps") \
    GPU_OPTIONS(X)

// These are not recorded in checkpoints.
#define MODE_OPTIONS(X) \
    X(TEXT, preset,        "tiny", 0, 0,          "sizes: " PRESET_NAMES) \
    X(TEXT, load,              "", 0, 0,          "start from the weights in this safetensors file") \
    X(TEXT, resume,            "", 0, 0,          "go on from the newest checkpoint in this folder, with its flags") \
    X(INT,  generate,           0, 1, INT_MAX,    "print so many tokens instead of training") \
    X(INT,  samples,            1, 1, 65535,      "continuations to print, made together") \
    X(TEXT, prompt,            "", 0, 0,          "text to go on from, also by pipe; else a newline or new document") \
    X(REAL, temperature,      1.0, 0, 1e6,        "0 takes the likeliest token") \
    X(INT,  top_k,              0, 0, INT_MAX,    "sample from the k likeliest tokens; 0 for all") \
    X(REAL, top_p,            1.0, 0, 1,          "sample from the likeliest tokens that hold this probability") \
    X(TEXT, eval,              "", 0, 0,          "print the loss on this file instead of training") \
    X(INT,  chunk_parallel,     1, 1, 1 << 20,    "processes that share a sequence, a slice of whole chunks each") \
    X(TEXT, losses,            "", 0, 0,          "with --eval: write each token's loss here, as float32") \
    X(FLAG, dry_run,            0, 0, 1,          "print configuration, parameters and memory, and stop") \
    X(FLAG, help,               0, 0, 1,          "print this; also -h")

#define DEFAULT_VALUE(kind, name, value, ...) value,
#define OTHER_OPTIONS(X) TOKEN_OPTIONS(X) TRAINING_OPTIONS(X) MODE_OPTIONS(X)
typedef struct { Config model; OTHER_OPTIONS(STRUCT_FIELD) } Options;
static const Options default_options = { { MODEL_OPTIONS(DEFAULT_VALUE) }, OTHER_OPTIONS(DEFAULT_VALUE) };

// The processes of a job. Each group of `slices` processes holds consecutive slices of the same sequences; other groups
// hold other sequences. rank = group * slices + slice. In one process all is as initialized here.
static struct { int rank, count, slice, slices, group, groups; } ranks = {0, 1, 0, 1, 0, 1};

// What a checkpoint holds, apart from the flags: four kinds of tensors.
enum { WEIGHTS, ADAM_M, ADAM_V, STATES, NUM_KINDS };

// What evaluation, generation and training ask of a device. The CPU's functions are under "The CPU backend", the GPU's
// in train_megalodon.cu. `self` is handed to all of them.
typedef struct {
    void* self;
    const char* name;  // of the device
    double peak;       // FLOP/s that it could do at most; 0 where unknown
    int stream_tokens; // most tokens that one call of stream may take
    double (*memory_needed)(void* self, const Options* o); // bytes that training takes
    void (*open)(void* self, const Options* o, bool training); // takes all memory, or refuses
    void (*close)(void* self);
    // Copies row `row` of the parameter table, layer `layer`, between `host` and the device. A copy into WEIGHTS is
    // whole. All others are of the elements [range[0],range[1]), those that this process updates. For STATES see
    // state_copy.
    void (*copy)(void* self, int kind, int row, int layer, void* host, bool to_host, size_t range[2]);
    // Forward and backward pass over --batch x --seq tokens: adds the gradient of dloss * (sum of losses). The first
    // micro-step of a step starts a new sum. first_sequence: its number since training began. fresh: with
    // --carry, which sequences start from an empty past; the others go on from the state that the same micro-step of
    // the last step left. NULL without --carry. May return before the work is done.
    void (*micro_step)(void* self, const int* tokens, const int* targets, double dloss, bool first,
                       uint64_t first_sequence, const bool* fresh);
    double (*finish_step)(void* self, double* loss); // gradient's norm; *loss: sum of dloss * losses of the step
    void (*update)(void* self, const Options* o, double lr, int step, double grad_scale); // AdamW; waits for its end
    // T tokens of one chunk, which follow those streamed since the last reset; their losses if targets is not NULL. To
    // generate there are --samples streams and T is 1; tokens NULL means those that were drawn.
    void (*stream)(void* self, const int* tokens, int T, const int* targets, float* losses);
    // Draws the next token of each stream, with the random number (key + (number of the stream << 32), index).
    void (*draw)(void* self, const Options* o, uint64_t key, int index);
    const int* (*drawn)(void* self); // (samples); waits for them
    void (*reset)(void* self);       // streams start from an empty past
} Backend;
Backend cpu_backend(void);

// Machinery that the next section uses: see "Memory", "Processes", "Options as text", "Data" and "Checkpoints".
enum { NUM_CARRIED = 6 + NUM_ARRAYS }; // rows of the table that carried_specs makes
void param_specs(Spec specs[NUM_PARAMS], const Config* c);
size_t specs_size(const Spec* specs, int n);
void ranks_open(void);
void ranks_group(int slices);
int slice_length(int T, int c);
void options_parse(Options* o, int argc, char** argv, SafeTensors* st);
void options_print(const Options* o, bool training, FILE* f);
void data_open(Options* o, bool training, Dataset* data, Dataset* held_out);
int checkpoint_newest(const char* folder, int below);
void carried_specs(Spec specs[NUM_CARRIED], const Options* o);
void weights_check(const Spec* specs, const SafeTensors* st, bool share_emb);
void tensors_load(const Backend* b, const Options* o, const Spec* specs, const SafeTensors* st, int kinds);
static const char* program; // the name that this program was started by
const char* piped_text(void);
void program_start(char** argv);
void restart_with_short_spin(char** argv);
size_t read_step(const Options* o, const Dataset* data, int step, int* tokens, int* targets, bool* fresh);
void out_open(Options* o);
const char* checkpoint_path(const Options* o, int step);
void checkpoint_save(const Backend* b, const Spec* specs, const Options* o, int step, double tokens);
double checkpoint_number(const SafeTensors* st, const char* key, double most);
void schedule_compare(const Options* o, const SafeTensors* st, int step);
// FLOPs of a token, forward and backward: 2 forward and 4 backward for each weight in a matrix product, and causal
// attention, where a query meets c/2 keys on average.
double flops_per_token(const Config* c);

// ---------------------------------------------------------------------------------------------------------------------
// Use: evaluation, generation, training, main

double seconds(void) { // since some fixed moment
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// A signal asks a run to finish its step, save and exit. A second Ctrl-C exits at once.
static volatile sig_atomic_t stop_asked;
void on_signal(int number) {
    if (number == SIGINT && stop_asked == SIGINT) { _exit(128 + number); }
    stop_asked = number;
}

// Shows on a terminal how much of a long work is done; the line is erased at the end.
void show_progress(const char* work, size_t done, size_t all) {
    static double shown;
    if (!isatty(STDERR_FILENO) || (done < all && seconds() - shown < 0.2)) { return; }
    shown = seconds();
    fprintf(stderr, done < all ? "\r%s: %.0f%%\033[K" : "\r\033[K", work, 100.0 * done / all);
}

// Evaluation. Adds the losses of the documents of d to `spans`, by position. If `path` is not "", it also writes them
// to this file, and to PATH.documents how many each document has. Each document is streamed from an empty past on, and
// every token is scored once (the first one only if an end-of-document token stands before it), but at most `most`
// tokens in all (0: no limit). Returns the mean loss in nats, or NAN if a signal came.
double evaluate(const Backend* b, const Config* config, const Dataset* d, size_t most, Span spans[NUM_SPANS],
                const char* path) {
    int *tokens = (int*)xcalloc(b->stream_tokens + 1, sizeof(int)), T;
    float* losses = (float*)xcalloc(b->stream_tokens, sizeof(float));
    size_t all = most ? min_size(most, d->size) : d->size, scored = 0;
    const char* borders_path = text_of("%s.documents", path);
    FILE *file = *path ? fopen(path, "wb") : NULL, *borders = file ? fopen(borders_path, "w") : NULL;
    if (*path && !borders) { die("--losses %s: %s", file ? borders_path : path, strerror(errno)); }
    for (const Document* k = d->documents; k < d->documents + d->num_documents && scored < all; k++) {
        size_t inputs = document_inputs(d, k), end = most ? min_size(inputs, most - scored) : inputs;
        b->reset(b->self);
        for (size_t at = 0; at < end && !stop_asked; at += T, scored += T) {
            T = min_size(end - at, min_size(b->stream_tokens, config->chunk_size - at % config->chunk_size));
            document_read(d, k, at, T, tokens, config->vocab_size);
            b->stream(b->self, tokens, T, tokens + 1, losses);
            spans_add(spans, k->size - inputs + at, losses, T);
            if (file) { fwrite(losses, sizeof(float), T, file); } // errors show when it is closed
            show_progress("evaluation", scored, all);
        }
        if (borders) { fprintf(borders, "%zu\n", end); }
    }
    show_progress("evaluation", all, all);
    if (file && (ferror(file) | fclose(file) | ferror(borders) | fclose(borders))) {
        die("--losses %s: %s", path, strerror(errno));
    }
    free(tokens); free(losses);
    Span sum = spans_sum(spans);
    if (!isfinite(sum.nats)) { die("evaluation: the sum of the losses is %g", sum.nats); }
    return stop_asked ? NAN : sum.nats / sum.tokens;
}

int larger_first(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return (x < y) - (x > y);
}

// Draws a token from softmax(logits / temperature), logits (vocab). --top-k keeps the k likeliest tokens, --top-p then
// those of the likeliest that together hold this probability; tokens as likely as the last one kept stay too. u is
// uniform in [0,1). NaN is never drawn.
int sample(const float* logits, int vocab, const Options* o, double u) {
    enum { PART = 256 }; // tokens; sums of parts find the token faster
    int parts = (vocab + PART - 1) / PART, id = 0;
    float top = -INFINITY, scale = fmin(1 / o->temperature, 1e30);
    OMP(omp simd reduction(max : top))
    for (int v = 0; v < vocab; v++) { top = logits[v] > top ? logits[v] : top; }
    if (o->temperature == 0) {
        while (id < vocab - 1 && logits[id] != top) { id++; }
        return id;
    }
    float *p = (float*)xcalloc(vocab, sizeof(float)), *sorted = (float*)xcalloc(vocab, sizeof(float));
    double *sums = (double*)xcalloc(parts, sizeof(double)), sum = 0;
    OMP(omp simd reduction(+ : sum))
    for (int v = 0; v < vocab; v++) {
        float x = exp_fast((logits[v] - top) * scale);
        p[v] = x >= 0 ? x : 0; sum += p[v];
    }
    if (o->top_k || o->top_p < 1) { // find the smallest p to keep
        double kept = 0;
        double least = o->top_k ? 0 : (1 - o->top_p) * sum / vocab; // all that are smaller hold less than 1 - top_p
        int n = 0, i = 0;
        for (int v = 0; v < vocab; v++) { if (p[v] >= least) { sorted[n++] = p[v]; } }
        qsort(sorted, n, sizeof(float), larger_first);
        if (o->top_k) {
            int k = 0;
            for (; k < n && (k < o->top_k || sorted[k] == sorted[k - 1]); k++) { kept += sorted[k]; }
            n = k; sum = kept; kept = 0;
        }
        for (; i < n && (i == 0 || kept < o->top_p * sum); i++) { kept += sorted[i]; }
        for (int v = 0; v < vocab; v++) { p[v] = p[v] >= sorted[i - 1] ? p[v] : 0; }
    }
    sum = 0;
    for (int i = 0; i < parts; i++) {
        double part = 0;
        OMP(omp simd reduction(+ : part))
        for (int v = i * PART; v < min_int(vocab, (i + 1) * PART); v++) { part += p[v]; }
        sums[i] = part; sum += part;
    }
    int i = 0;
    for (u *= sum; i < parts - 1 && u >= sums[i]; i++) { u -= sums[i]; }
    for (id = i * PART; id < vocab - 1 && u >= p[id]; id++) { u -= p[id]; }
    free(p); free(sorted); free(sums);
    return id;
}

// Generation. Prints the prompt and n tokens that follow it, or fewer if the document ends. The first sample is printed
// as it comes; the others are made at the same time and printed after it. `stream` numbers the random numbers.
void generate(const Backend* b, const Options* o, const Tokenizer* t, int n, uint64_t stream) {
    int vocab = o->model.vocab_size, B = o->generate ? o->samples : 1, left = 0, going = B;
    int *tokens = (int*)xcalloc((size_t)B * (n + 1), sizeof(int)), *next = (int*)xcalloc(B, sizeof(int));
    int* ends = (int*)xcalloc(B, sizeof(int)); // how many tokens each sample has; n until its document ends
    Tokens prompt = prompt_tokens(t, o->eod, o->prompt, vocab);
    b->reset(b->self);
    for (int s = 0; s < B; s++) { ends[s] = n; }
    for (size_t i = 0; i < prompt.count; i++) {
        for (int s = 0; s < B; s++) { next[s] = prompt.ids[i]; }
        b->stream(b->self, next, 1, NULL, NULL);
    }
    double started = seconds();
    int i = 0;
    if (o->generate) { fputs(o->prompt, stdout); }
    for (; i < n && going; i++) {
        b->draw(b->self, o, ((uint64_t)2 << 56) + stream, i);
        if (i + 1 < n) { b->stream(b->self, NULL, 1, NULL, NULL); } // a GPU works on while the CPU looks at these
        const int* drawn = b->drawn(b->self);
        for (int s = 0; s < B; s++) {
            tokens[(size_t)s * n + i] = drawn[s];
            if (ends[s] == n && drawn[s] == o->eod) { ends[s] = i; going--; }
        }
        if (i < ends[0]) { token_print(stdout, t, vocab, drawn[0], &left); }
    }
    for (int s = 1; s < B; s++) {
        printf("\n----------------\n%s", o->prompt);
        for (int k = 0; k < ends[s]; k++) { token_print(stdout, t, vocab, tokens[(size_t)s * n + k], &left); }
    }
    fflush(stdout);
    double speed = (double)B * i / (seconds() - started);
    if (o->generate) { fprintf(stderr, "\n%d x %d tokens, %.1f tok/s\n", B, i, speed); }
    free(prompt.ids); free(tokens); free(next); free(ends);
}

// The learning rate of a step, counted from 0: linear warmup to lr, then by the schedule down to lr * lr_end_ratio.
double learning_rate(const Options* o, int step) {
    if (step < o->warmup) { return o->lr * (step + 1) / o->warmup; }
    double left = 1.0 - (step - o->warmup) / fmax(1, o->steps - o->warmup);
    double f = !strcmp(o->schedule, "cosine") ? 0.5 * (1.0 - cos(M_PI * left))
             : !strcmp(o->schedule, "linear") ? left : 1.0;
    return o->lr * (o->lr_end_ratio + (1.0 - o->lr_end_ratio) * f);
}

// Opens DIR/log.tsv to go on after `step`. Rows of later steps, which a killed run may have left, are cut off. The lock
// ends with the process, however that ends.
FILE* log_open(const Options* o, int step) {
    const char* path = text_of("%s/log.tsv", o->out);
    char line[1024];
    long end = 0;
    FILE* f = fopen(path, "a+"); // "a" writes at the end, wherever that is by then
    if (f && flock(fileno(f), LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
        die("--out %s: another run is writing there", o->out);
    }
    while (f && step && fgets(line, sizeof(line), f) && strchr(line, '\n') && (!end || atoi(line) <= step)) {
        end = ftell(f);
    }
    bool good = f && !ftruncate(fileno(f), end) && !fseek(f, end, SEEK_SET);
    if (good && !end) { fprintf(f, "step\ttokens\tloss\tgrad_norm\tlr\ttok_s\tms\tval_loss\n"); }
    if (!good || fflush(f)) { die("cannot write %s: %s", path, strerror(errno)); }
    return f;
}

// A finished step. tokens: predicted since training began; speed: predicted per second; left: seconds to the end; val:
// the validation loss, NAN without a validation.
typedef struct { int step; double loss, norm, lr, ms, tokens, speed, left, val; } StepInfo;

// Adds a step to log.tsv.
void log_step(const Options* o, FILE* log, const StepInfo* i) {
    fprintf(log, "%d\t%.0f\t%.9g\t%.9g\t%.9g\t%.1f\t%.3f\t", i->step, i->tokens, i->loss, i->norm, i->lr, i->speed,
            i->ms);
    fprintf(log, isnan(i->val) ? "\n" : "%.9g\n", i->val);
    if (fflush(log)) { die("cannot write %s/log.tsv: %s", o->out, strerror(errno)); }
}

// Ends the line of a step that the next one was to replace.
static bool line_open;
void line_close(void) {
    if (line_open) { fputc('\n', stdout); fflush(stdout); }
    line_open = false;
}

// Prints a step. On a terminal it takes the place of the line before, unless that was to be kept. Elsewhere the steps
// are printed that are to be kept, every tenth, and those that took long. peak: tokens/s that the device could do at
// most, or 0.
void step_print(const Options* o, const StepInfo* i, bool keep, double peak) {
    static double printed;
    struct winsize window = {0, 0, 0, 0};
    bool terminal = isatty(STDOUT_FILENO) && !ioctl(STDOUT_FILENO, TIOCGWINSZ, &window);
    const char* line = text_of("step %d/%d | loss %.4f | norm %.3f | lr %.2e | %.0f tok/s | %.1f ms | %s%d:%02d left",
                               i->step, o->steps, i->loss, i->norm, i->lr, i->speed, i->ms,
                               peak > 0 ? text_of("%.1f%% of peak | ", 100 * i->speed / peak) : "",
                               (int)i->left / 60, (int)i->left % 60);
    if (!terminal && !keep && i->step % 10 && seconds() - printed < 10) { return; }
    printed = seconds();
    if (!terminal) { printf("%s\n", line); }
    else { printf("\r%.*s\033[K%s", window.ws_col ? window.ws_col - 1 : INT_MAX, line, keep ? "\n" : ""); }
    line_open = terminal && !keep;
    fflush(stdout);
}

// Says where a run that ended after `step` was saved, and what can be done with it.
void run_end(const Options* o, int step, FILE* out) {
    if (ranks.rank) { return; }
    if (!*o->out) { fprintf(out, "not saved: --out none\n"); return; }
    fprintf(out, "saved: %s, %s/log.tsv\n", checkpoint_path(o, step), o->out);
    if (step < o->steps) { fprintf(out, "go on: %s --resume '%s'\n", program, o->out); }
    fprintf(out, "sample: %s --load '%s' --generate 500\n", program, checkpoint_path(o, step));
}

// Training, from first_step on. tokens_seen: those that were predicted before it.
void train(const Backend* b, const Options* o, const Spec* specs, int first_step, double tokens_seen,
           const Dataset* data, const Dataset* held_out) {
    size_t rows = (size_t)o->batch * o->seq / ranks.slices; // tokens of a micro-step in this process
    int *tokens = (int*)xcalloc(rows * o->accum, sizeof(int)), *targets = (int*)xcalloc(rows * o->accum, sizeof(int));
    bool* fresh = (bool*)xcalloc((size_t)o->batch * o->accum, sizeof(bool));
    FILE* log = *o->out && ranks.rank == 0 ? log_open(o, first_step) : NULL;
    const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
    for (int i = 0; i < 4; i++) { signal(signals[i], on_signal); }
    signal(SIGPIPE, SIG_IGN); // if the reader of stdout goes away, the run is saved: see `stop`
    double peak = ranks.count * b->peak / flops_per_token(&o->model), training = 0, validating = 0, saved = seconds();
    int validations = 0, timed = 0; // timed: the step of the last checkpoint that only its time asked for
    size_t predictions = read_step(o, data, first_step, tokens, targets, fresh);
    for (int step = first_step; step < o->steps; step++) {
        double started = seconds(), predicted = predictions, dloss = 1 / predicted;
        StepInfo info = {step + 1, 0, 0, learning_rate(o, step), 0, tokens_seen += predicted, 0, 0, NAN};
        for (int micro = 0; micro < o->accum; micro++) {
            uint64_t first = (((uint64_t)step * o->accum + micro) * ranks.groups + ranks.group) * o->batch;
            b->micro_step(b->self, tokens + micro * rows, targets + micro * rows, dloss, micro == 0, first,
                          o->carry ? fresh + micro * o->batch : NULL);
        }
        int done = step + 1, remaining = o->steps - done;
        if (remaining) { predictions = read_step(o, data, done, tokens, targets, fresh); } // while a GPU works
        info.norm = b->finish_step(b->self, &info.loss);
        if (!isfinite(info.loss) || !isfinite(info.norm)) {
            die("step %d: loss %g, gradient norm %g: stopped before the weights change; checkpoints stay as they are",
                done, info.loss, info.norm);
        }
        b->update(b->self, o, info.lr, done, clip_scale(info.norm, o->clip));
        info.ms = 1e3 * (seconds() - started);
        info.speed = 1e3 * predicted / info.ms;
        training += seconds() - started;
        info.left = training / (done - first_step) * remaining;
        int validations_left = 1 + (o->val_every ? remaining / o->val_every : 0);
        if (validations) { info.left += validating / validations * validations_left; }
        bool validates = held_out->size > (o->eod < 0) && (!remaining || (o->val_every && done % o->val_every == 0));
        bool samples = o->sample_every && (!remaining || done % o->sample_every == 0);
        step_print(o, &info, validates || samples || !remaining || step == first_step, peak);
        if (validates && ranks.rank == 0) {
            Span spans[NUM_SPANS] = {{0, 0}};
            started = seconds();
            info.val = evaluate(b, &o->model, held_out, o->val_tokens, spans, "");
            validating += seconds() - started; validations++;
            if (!isnan(info.val)) { printf("step %d: val loss %.4f\n", done, info.val); }
        }
        if (log) { log_step(o, log, &info); }
        if (samples && ranks.rank == 0) {
            printf("---- sample ----\n");
            generate(b, o, data->tokenizer, 400, done);
            printf("\n----------------\n");
        }
        // Both are read once, and all processes do what one of them must: a signal may come at any moment, to one only.
        double asked[2] = {0, 0}, minutes = (seconds() - saved) / 60;
        asked[0] = stop_asked || ferror(stdout);
        asked[1] = ranks.rank == 0 && o->checkpoint_minutes > 0 && minutes >= o->checkpoint_minutes;
        all_sum(asked, 2);
        bool stop = asked[0] > 0, by_time = asked[1] > 0;
        bool due = !remaining || stop || (o->checkpoint_every && done % o->checkpoint_every == 0);
        if (*o->out && (due || by_time)) {
            checkpoint_save(b, specs, o, done, tokens_seen);
            if (timed && ranks.rank == 0) { unlink(checkpoint_path(o, timed)); }
            timed = due ? 0 : done;
            saved = seconds();
        }
        if (!stop && remaining) { continue; }
        FILE* out = ferror(stdout) ? stderr : stdout;
        const char* why = out == stderr ? "a closed output" : "a signal";
        line_close();
        if (stop) { fprintf(out, "stopped by %s after step %d\n", why, done); }
        run_end(o, done, out);
        break;
    }
    if (log) { fclose(log); }
    free(tokens); free(targets); free(fresh);
}

// Does what the options ask for. With --load or --resume st is open.
void run(const Backend* b, Options* o, SafeTensors* st) {
    bool loaded = *o->load || *o->resume, training = !o->generate && !*o->eval;
    FILE* info = o->generate ? stderr : stdout; // a sample has stdout for itself
    int kinds = *o->resume && training ? NUM_KINDS : WEIGHTS + 1;
    Spec specs[NUM_PARAMS + NUM_CARRIED];
    static Dataset data, held_out;
    Span spans[NUM_SPANS] = {{0, 0}};
    ranks_group(o->chunk_parallel);
    slice_length(o->seq, o->model.chunk_size);
    if (!training && ranks.rank) { return; } // these take one process
    param_specs(specs, &o->model);
    carried_specs(specs + NUM_PARAMS, o);
    options_print(o, training, info);
    if (ranks.count > 1) {
        fprintf(info, "processes: %d = %d groups x %d slices, %d threads each\n", ranks.count, ranks.groups,
                ranks.slices, omp_get_max_threads());
    }
    fprintf(info, "device: %s\nnum_parameters: %zu\n", b->name, specs_size(specs, NUM_PARAMS));
    double needed = b->memory_needed(b->self, o);
    if (training) { fprintf(info, "memory: %.1f MB\n", needed / 1e6); }
    if (training && !loaded && o->model.scale_emb && o->model.share_emb) {
        fprintf(info, "note: with scale_emb and share_emb the first loss is about sqrt(model_dim): see README.md\n");
    }
    if (needed > 1e15) { die("--batch %d --seq %d: more than any machine has", o->batch, o->seq); }
    data_open(o, training, &data, &held_out);
    if (loaded) { tensors_load(NULL, o, specs, st, kinds); } // check the file before taking the memory that it asks for
    if (o->dry_run) { return; }
    if (training) { out_open(o); }
    b->open(b->self, o, training);
    if (loaded) { weights_check(specs, st, o->model.share_emb); fprintf(info, "weights: %s\n", st->path); }
    tensors_load(b, o, specs, loaded ? st : NULL, kinds);
    int step = *o->resume ? checkpoint_number(st, "step", INT_MAX) : 0;
    if (*o->resume && training) { schedule_compare(o, st, step); }
    if (o->generate) {
        if (!*o->prompt) { o->prompt = piped_text(); }
        generate(b, o, data.tokenizer, o->generate, 0);
    } else if (*o->eval) { evaluate(b, &o->model, &data, 0, spans, o->losses); spans_print(stdout, spans, &data); }
    else if (step < o->steps) {
        train(b, o, specs, step, step ? checkpoint_number(st, "tokens", 1e18) : 0, &data, &held_out);
    } else { printf("step %d of %d: nothing left to do\n", step, o->steps); run_end(o, step, stdout); }
    tokenizer_close(data.tokenizer);
    b->close(b->self);
    if (loaded) { safetensors_close(st); }
    if (fflush(stdout) || ferror(stdout)) { die("stdout: the output could not be written"); }
}

#ifndef TESTING
int main(int argc, char** argv) {
    Options o;
    SafeTensors st;
    Backend backend = cpu_backend();
    program_start(argv);
    restart_with_short_spin(argv);
    ranks_open();
    options_parse(&o, argc, argv, &st);
    run(&backend, &o, &st);
    return 0;
}
#endif

// #####################################################################################################################
// Machinery: what a learner may skip
// #####################################################################################################################

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

// A tile of C (TILE_M x TILE_N) is summed in registers of VECTOR_WIDTH floats, and leaves some free for the operands:
// with AVX-512 and NEON the sums fill 24 of 32 registers, elsewhere 12 of 16. A panel of PANEL_K x TILE_N operands of B
// stays in the first or second cache, with the STRIPS_M strips of A that pass over it.
#if defined(__AVX512F__)
enum { VECTOR_WIDTH = 16, TILE_M = 12, TILE_N = 2 * VECTOR_WIDTH };
#elif defined(__AVX__)
enum { VECTOR_WIDTH = 8, TILE_M = 6, TILE_N = 2 * VECTOR_WIDTH };
#elif defined(__ARM_NEON)
enum { VECTOR_WIDTH = 4, TILE_M = 6, TILE_N = 4 * VECTOR_WIDTH };
#else
enum { VECTOR_WIDTH = 4, TILE_M = 6, TILE_N = 2 * VECTOR_WIDTH };
#endif
enum { PANEL_K = 512, STRIPS_M = 192 / TILE_M };
typedef float Vector __attribute__((vector_size(VECTOR_WIDTH * sizeof(float)), aligned(sizeof(float)), may_alias));

// sums = A B for one tile: A[i][k] is a[i*a_i + k*a_k], B is packed as b (K,TILE_N). Two things keep the sums in
// registers with gcc and clang: they are declared as vectors, and this function is not inlined.
__attribute__((noinline)) void gemm_tile(float sums[TILE_M][TILE_N], const float* __restrict a, size_t a_i, size_t a_k,
                                         const float* __restrict b, int K) {
    Vector s[TILE_M][TILE_N / VECTOR_WIDTH] = {{{0}}};
    for (int k = 0; k < K; k++) {
        const Vector* row = (const Vector*)(b + k * TILE_N);
        for (int i = 0; i < TILE_M; i++) {
            for (int j = 0; j < TILE_N / VECTOR_WIDTH; j++) { s[i][j] += a[i * a_i + k * a_k] * row[j]; }
        }
    }
    memcpy(sums, s, sizeof(s));
}

// Copies n rows (or columns) of an operand to packed[k*width + i], with zeros for those missing up to `width`. It is
// inlined, so that width is a constant. What it copies lies far apart: the processor is told what comes 16 steps later.
__attribute__((always_inline)) static inline void gemm_pack(float* packed, const float* x, size_t stride_i,
                                                            size_t stride_k, int n, int K, int width) {
    if (n < width) { memset(packed, 0, sizeof(float) * width * K); }
    if (stride_i == 1 && n == width) {
        for (int k = 0; k < K; k++) {
            __builtin_prefetch(x + (k + 16) * stride_k);
            memcpy(packed + (size_t)k * width, x + k * stride_k, width * sizeof(float));
        }
        return;
    }
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < K; k++) { packed[(size_t)k * width + i] = x[i * stride_i + k * stride_k]; }
    }
}

// Memory that is kept from call to call: fresh pages would cost more than the packing.
float* scratch(int use, size_t n) {
    static __thread float* memory[NUM_USES];
    static __thread size_t sizes[NUM_USES];
    if (n > sizes[use]) { free(memory[use]); memory[use] = (float*)xcalloc(n, sizeof(float)); sizes[use] = n; }
    return memory[use];
}

// B is packed. So is A if its rows are not contiguous, and in its last, incomplete strip. One thread sums an element,
// in the order of k. Called from a parallel region, gemm runs on the calling thread alone.
void gemm(float* c, size_t ldc, const float* a, size_t a_i, size_t a_k, const float* b, size_t b_k, size_t b_j,
          int M, int N, int K, const float* add, const float* bias) {
    int strips_m = (M + TILE_M - 1) / TILE_M, strips_n = (N + TILE_N - 1) / TILE_N, depth = min_int(K, PANEL_K);
    int direct = a_k == 1 ? M / TILE_M : 0; // strips of A that are read where they are
    float* packed_b = scratch(OF_PRODUCTS, ((size_t)(strips_m - direct) * TILE_M + (size_t)strips_n * TILE_N) * depth);
    float* packed_a = packed_b + (size_t)strips_n * TILE_N * depth;
    static const float zeros[TILE_N] = {0};
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
        for (int m0 = 0; m0 < strips_m; m0 += STRIPS_M) { // these strips of A stay in the second cache
            for (int sn = 0; sn < strips_n; sn++) {
                for (int sm = m0; sm < min_int(m0 + STRIPS_M, strips_m); sm++) {
                    int i0 = sm * TILE_M, j0 = sn * TILE_N;
                    int rows = min_int(TILE_M, M - i0), columns = min_int(TILE_N, N - j0);
                    const float* panel_b = packed_b + (size_t)sn * TILE_N * kn;
                    float sums[TILE_M][TILE_N];
                    for (int i = 0; i < rows; i++) { // C is fetched while the tile is computed
                        __builtin_prefetch(c + (i0 + i) * ldc + j0, 1);
                        __builtin_prefetch(c + (i0 + i) * ldc + j0 + columns - 1, 1);
                    }
                    if (sm < direct) { gemm_tile(sums, a + i0 * a_i + k0, a_i, 1, panel_b, kn); }
                    else { gemm_tile(sums, packed_a + (size_t)(sm - direct) * TILE_M * kn, 1, TILE_M, panel_b, kn); }
                    for (int i = 0; i < rows; i++) {
                        size_t at = (i0 + i) * ldc + j0;
                        const float* before = k0 > 0 ? c + at : add ? add + at : zeros;
                        const float* shift = k0 == 0 && bias ? bias + j0 : zeros;
                        for (int j = 0; j < columns; j++) { c[at + j] = sums[i][j] + shift[j] + before[j]; }
                    }
                }
            }
        }
    }
}

// exp(x) to 1.5 units in the last place, in operations that compilers vectorize. (They do not vectorize calls of expf,
// unless with fast-math, which would also delete the checks for NaN.) x = n ln 2 + r, so exp(x) = 2^n exp(r).
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

// ---------------------------------------------------------------------------------------------------------------------
// Dropout: in training passes only. An element becomes 0 with probability p, and otherwise inp/(1 - p); so does its
// gradient. Keys are dropped before the softmax (DropKey, appendix B.1): for each query, the score of each key, its own
// too, becomes -infinity with probability p, and nothing is scaled.
//
// Masks are not stored. Each is a pure function of seed, sequence, timestep, layer, site and element. So the backward
// pass makes it again, and it does not depend on how the work is split among processes or devices.

ON_GPU_TOO static inline uint64_t mix_bits(uint64_t x) { // the last step of the generator splitmix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
ON_GPU_TOO uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index); // see "Random numbers"

Masks masks_of(const Options* o) {
    Masks m = {{o->dropout, o->hidden_dropout, o->attention_dropout}, (uint64_t)o->seed, 0};
    return m;
}

// The dropout of each site of layer l in a pass over T timesteps of each sequence.
Dropouts dropouts_at(Masks m, int T, int l) {
    Dropout sites[7]; // in the order of the fields: three with each of the first two rates, then the keys
    for (int i = 0; i < 7; i++) {
        uint32_t drop = m.rates[i / 3] * 65536 + 0.5;
        uint64_t key = random_bits(m.seed, ((uint64_t)3 << 56) + l, i);
        Dropout site = {key, m.first, T, ranks.slice * T, drop, 65536.0f / (65536 - drop), 0.0f};
        sites[i] = site;
    }
    sites[6].scale = 1; sites[6].dropped = -INFINITY;
    Dropouts d = {sites[0], sites[1], sites[2], sites[3], sites[4], sites[5], sites[6]};
    return d;
}

// Element i of timestep t of sequence b is dropped if 16 bits of mix_bits(dropout_bits + i/4), those from i%4 * 16 on,
// are less than d.drop. So p is a multiple of 1/65536. For keys i counts from the chunk's start; for other sites head
// is 0.
ON_GPU_TOO static inline uint64_t dropout_bits(Dropout d, uint64_t b, uint64_t t, uint64_t head) {
    return mix_bits(d.key + ((d.first + b) << 32) + d.time + t) + (head << 32);
}

// One row of n elements: out = dropout(inp) + add; add may be NULL.
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

const float* dropout(float* out, const float* inp, const float* add, Dropout d, size_t rows, int n) {
    if (!d.drop) { return inp; }
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        dropout_row(out + r * n, inp + r * n, add ? add + r * n : NULL, d, r / d.T, r % d.T, 0, n);
    }
    return out;
}

void attention_scores(float* scores, const float* q, const float* k, int rows, int keys, int Z, int width,
                      Dropout drop, int b, int t0, int h) {
    gemm(scores, keys, q, Z, 1, k, 1, Z, rows, keys, width, NULL, NULL);
    if (!drop.drop) { return; }
    for (int i = 0; i < rows; i++) {
        float* s = scores + (size_t)i * keys;
        dropout_row(s, s, NULL, drop, b, t0 + i, h, keys - rows + i + 1);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Random numbers and initial weights. Random numbers are pure functions of (seed, stream, index): no generator's state
// has to be saved, or agreed on by several processes.

ON_GPU_TOO uint64_t random_bits(uint64_t seed, uint64_t stream, uint64_t index) {
    uint64_t x = seed;
    const uint64_t add[3] = {0x9E3779B97F4A7C15u, stream, index};
    for (int i = 0; i < 3; i++) { x = mix_bits(x + add[i] * 0x9E3779B97F4A7C15u + 0x9E3779B97F4A7C15u); }
    return x;
}

ON_GPU_TOO double random_uniform(uint64_t seed, uint64_t stream, uint64_t index) { // in [0, 1)
    return (random_bits(seed, stream, index) >> 11) * 0x1p-53;
}

// Box-Muller. Numbers beyond +-limit are drawn again.
double random_normal(uint64_t seed, uint64_t stream, uint64_t index, double limit) {
    for (uint64_t again = 0;; again += (uint64_t)1 << 48) {
        double u = 1.0 - random_uniform(seed, stream + again, 2 * index);
        double z = sqrt(-2.0 * log(u)) * cos(2.0 * M_PI * random_uniform(seed, stream + again, 2 * index + 1));
        if (fabs(z) <= limit) { return z; }
    }
}

// Row i of the parameter table, for layer l, as the released code starts it (its initialization "he"): normal, with the
// standard deviation and limit below; INIT_ZERO 0; INIT_RESCALE 0.1 * 0.5^l; the imaginary part of gamma 0; and theta
// so that sigmoid(theta) takes the values D^(-j/D), j = 1..D, in random order over the features: waves from short to
// very long.
void param_init(float* w, const Spec* s, int i, int l, const Config* c, int seed) {
    int D = c->model_dim;
    double std = s->init == INIT_LINEAR ? 1 / sqrt(3.0 * s->dims[1]) : s->init == INIT_EMBED ? 1 / sqrt(D)
               : s->init == INIT_OMEGA ? 0.25 : s->init == INIT_NORMAL ? 0.2 : s->init == INIT_GAMMA ? GAMMA_STD : 0;
    double limit = s->init == INIT_EMBED ? 3 : s->init == INIT_OMEGA ? 4 : INFINITY; // in standard deviations
    uint64_t stream = (uint64_t)i << 32 | l;
    OMP(omp parallel for schedule(static))
    for (size_t j = 0; j < s->size; j++) {
        bool drawn = std > 0 && !(s->init == INIT_GAMMA && j % 2);
        w[j] = drawn ? std * random_normal(seed, stream, j, limit) : s->init == INIT_RESCALE ? 0.1 * pow(0.5, l) : 0;
    }
    for (int j = 0; s->init == INIT_THETA && j < D; j++) { // each new value changes places with an earlier one
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

// ---------------------------------------------------------------------------------------------------------------------
// Memory: the two tables with numbers put in, and the arrays that they describe

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

// BT: timesteps of the pass, B*T. keep: KEEP_*, see the table of activations.
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

size_t specs_size(const Spec* specs, int n) { // elements that n specs describe
    size_t total = 0;
    for (int i = 0; i < n; i++) { total += specs[i].slots * specs[i].size; }
    return total;
}

// Points the n fields of a Params or Acts into `memory`, one tensor after the other.
void specs_place(void* fields, float* memory, const Spec* specs, int n) {
    for (int i = 0; i < n; i++) { ((float**)fields)[i] = memory; memory += specs[i].slots * specs[i].size; }
}

// Moves the n fields on to layer l.
void specs_layer(void* fields, const Spec* specs, int n, int l) {
    for (int i = 0; i < n; i++) { ((float**)fields)[i] += specs[i].slots > 1 ? l * specs[i].size : 0; }
}
Params params_layer(const Model* m, Params p, int l) { specs_layer(&p, m->specs, NUM_PARAMS, l); return p; }
Acts acts_layer(const Spec* specs, Acts a, int l) { specs_layer(&a, specs, NUM_ACTS, l); return a; }

// "layers.%d.x" and 3 to "layers.3.x", after a prefix. Names are the tables', never a file's.
const char* layer_name(char buffer[128], const char* prefix, const char* name, int l) {
    int n = snprintf(buffer, 128, "%s", prefix);
    snprintf(buffer + n, 128 - n, name, l);
    return buffer;
}

double flops_per_token(const Config* c) {
    Spec specs[NUM_PARAMS];
    double weights = (double)c->vocab_size * c->model_dim; // the output layer
    param_specs(specs, c);
    for (int i = 0; i < NUM_PARAMS; i++) {
        if (specs[i].init == INIT_LINEAR && specs[i].dims[1]) { weights += (double)specs[i].slots * specs[i].size; }
    }
    return 6 * weights + 3.0 * c->num_layers * c->chunk_size * (c->z_dim + c->value_dim) + MORE_FLOPS(c);
}

void config_check(const Config* c) {
    int D = c->model_dim, G = c->norm_num_groups, H = c->num_heads, Z = c->z_dim, V = c->value_dim;
    if (D % G) { die("model_dim %d must be divisible by norm_num_groups %d", D, G); }
    if (Z % (2 * H)) { die("z_dim %d must be divisible by 2 num_heads = %d (rotary pairs)", Z, 2 * H); }
    if (V % H) { die("value_dim %d must be divisible by num_heads %d", V, H); }
}

// Of an array of n elements, process r updates those in [part_start(n, r), part_start(n, r + 1)).
size_t part_start(size_t n, int rank) { return n * rank / ranks.count; }

void model_alloc(Model* m, const Config* c, bool training) {
    config_check(c);
    memset(m, 0, sizeof(*m));
    m->config = *c;
    param_specs(m->specs, c);
    m->num_parameters = specs_size(m->specs, NUM_PARAMS);
    m->first = part_start(m->num_parameters, ranks.rank); m->last = part_start(m->num_parameters, ranks.rank + 1);
    specs_place(&m->params, (float*)xcalloc(m->num_parameters, sizeof(float)), m->specs, NUM_PARAMS);
    if (training) {
        specs_place(&m->grads, (float*)xcalloc(m->num_parameters, sizeof(float)), m->specs, NUM_PARAMS);
        m->adam_m = (float*)xcalloc(m->last - m->first, sizeof(float));
        m->adam_v = (float*)xcalloc(m->last - m->first, sizeof(float));
    }
    int head = c->z_dim / c->num_heads;
    m->rotations = (float*)xcalloc((size_t)c->chunk_size * head, sizeof(float));
    for (int t = 0; t < c->chunk_size; t++) {
        for (int j = 0; j < head; j += 2) { // frequency and angle are formed in fp32, as the released code does
            float frequency = 1.0f / (float)pow(c->rope_base, (double)j / head), angle = t * frequency;
            m->rotations[(size_t)t * head + j] = cos(angle);
            m->rotations[(size_t)t * head + j + 1] = sin(angle);
        }
    }
}

void model_free(Model* m) {
    free(m->params.embed); free(m->grads.embed); free(m->adam_m); free(m->adam_v); free(m->rotations);
}

// The rows of STATE_ARRAYS, for R sequences. Returns how many have a name; they stand first.
int state_specs(Spec specs[NUM_ARRAYS], const Config* config, size_t R) {
    size_t D = config->model_dim, N = config->cema_ndim, Z = config->z_dim, V = config->value_dim;
    size_t c = config->chunk_size;
    int named = 0;
#define STATE_ROW(field, name, d0, d1, d2) { name, config->num_layers, {R, d0, d1, d2}, 0, 0 },
    const Spec rows[] = { STATE_ARRAYS(STATE_ROW) };
    for (int i = 0; i < NUM_ARRAYS; named += *specs[i++].name != 0) {
        const size_t* dims = rows[i].dims;
        specs[i] = rows[i];
        specs[i].size = R * dims[1] * (dims[2] ? dims[2] : 1) * (dims[3] ? dims[3] : 1);
    }
    return named;
}

// cache: with the arrays that only streams have.
void state_alloc(State* s, const Config* c, int B, bool cache) {
    Spec specs[NUM_ARRAYS];
    int named = state_specs(specs, c, B), all = cache ? NUM_ARRAYS : named;
    size_t norms = (c->num_layers + (size_t)1) * B * c->norm_num_groups;
    memset(s, 0, sizeof(*s));
    s->B = B; s->bytes = norms * sizeof(NormState) + specs_size(specs, named) * sizeof(float);
    s->norm = (NormState*)xcalloc(norms * sizeof(NormState) + specs_size(specs, all) * sizeof(float), 1);
    specs_place(&s->h, (float*)(s->norm + norms), specs, all);
}

void state_free(State* s) { free(s->norm); }
void state_reset(State* s) { memset(s->norm, 0, s->bytes); s->pos = 0; } // back to the empty past

State state_layer(const State* s, const Config* c, int l) {
    State r;
    Spec specs[NUM_ARRAYS];
    memset(&r, 0, sizeof(r));
    if (!s || !s->norm) { return r; }
    int named = state_specs(specs, c, s->B);
    r = *s;
    r.norm += (size_t)l * s->B * c->norm_num_groups;
    for (int i = 0; i < (s->k ? NUM_ARRAYS : named); i++) { (&r.h)[i] += l * specs[i].size; }
    return r;
}

// volatile: gcc 12 would vectorize the rounding away.
ON_GPU_TOO double float_rounded(double x) { volatile float f = x; return f; }

// Before a step with --carry: sequences that start afresh forget their past. The others' statistics are rounded to what
// checkpoints hold, floats, so that a resumed run goes on with the same bits. (A count above 2^24 is then off by a few
// timesteps, which changes a mean or variance by less than floats can show.)
void state_carry(State* s, const Config* c, const bool* fresh) {
    size_t lines = (c->num_layers + (size_t)1) * s->B, G = c->norm_num_groups;
    Spec specs[NUM_ARRAYS];
    int named = state_specs(specs, c, 1);
    for (size_t i = 0; i < lines; i++) {
        bool forget = fresh[i % s->B];
        for (NormState* n = s->norm + i * G; n < s->norm + (i + 1) * G; n++) {
            NormState kept = {float_rounded(n->count), float_rounded(n->mean), float_rounded(n->var)};
            *n = forget ? no_past : kept;
        }
        for (int k = 0; forget && k < named && i < lines - s->B; k++) {
            memset((&s->h)[k] + i * specs[k].size, 0, specs[k].size * sizeof(float));
        }
    }
}

// keep_grads: KEEP_NONE, or KEEP_ALL where a test wants to see the gradients of every layer's activations.
void pass_alloc(Pass* s, const Config* c, int B, int T, int keep, int keep_grads) {
    memset(s, 0, sizeof(*s));
    s->B = B; s->T = T; s->keep = keep;
    act_specs(s->specs, c, (size_t)B * T, keep);
    act_specs(s->dspecs, c, (size_t)B * T, keep_grads);
    specs_place(&s->acts, (float*)xcalloc(specs_size(s->specs, NUM_ACTS), sizeof(float)), s->specs, NUM_ACTS);
    if (keep == KEEP_NONE) { return; }
    specs_place(&s->grads, (float*)xcalloc(specs_size(s->dspecs, NUM_ACTS), sizeof(float)), s->dspecs, NUM_ACTS);
    if (ranks.slices == 1) { return; }
    state_alloc(&s->before, c, B, false); state_alloc(&s->after, c, B, false); state_alloc(&s->dafter, c, B, false);
}

void pass_free(Pass* s) {
    free(s->acts.embed); free(s->grads.embed);
    state_free(&s->before); state_free(&s->after); state_free(&s->dafter);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sequences that are spread over several processes (--chunk-parallel). Each process holds a slice of T timesteps, whole
// chunks, of the same sequences. Attention stays inside chunks, so the slices only need each other's states: before the
// timestep norm and before CEMA, each slice must know the state that the slices before it leave, and in the backward
// pass the gradient that the slices after it send back to its last state. Both layers are made so that this takes one
// exchange of small states for each, not a chain from slice to slice: every slice first finds what it does by itself,
// all tell all, and each then merges those before it (or after it). The layers themselves then run as always, from one
// state to another. Pass.before, Pass.after and Pass.dafter hold the results.

// all = the `bytes` bytes of each process of the group, in their order.
void all_gather(void* all, const void* mine, size_t bytes);

const State* pass_start(const Pass* s, const State* start) { return s->before.norm ? &s->before : start; }

// The statistics of two stretches of time, one of which may be empty, taken together (Chan's formula).
NormState norm_merge(NormState a, NormState b) {
    double n = a.count + b.count, delta = b.mean - a.mean;
    NormState s = {n, a.mean + delta * b.count / n,
                   (a.count * a.var + b.count * b.var + delta * delta * a.count * b.count / n) / n};
    return s;
}

// Timestep norm of layer l: the statistics before this slice. start (B,G): those before the whole sequences. inp
// (B,T,D).
NormState* slice_norm_start(const Pass* s, int l, NormState* start, const float* inp, const float* weight,
                            const Config* c) {
    if (!s->before.norm) { return start; }
    int n = s->B * c->norm_num_groups;
    NormState *all = (NormState*)xcalloc((size_t)n * ranks.slices, sizeof(NormState)), *mine = all + n * ranks.slice;
    NormState* before = state_layer(&s->before, c, l).norm;
    Acts a = acts_layer(s->specs, s->acts, l);
    bool last = l == c->num_layers; // what the layer writes here is scratch: only the state at the end is wanted
    timestepnorm_forward(last ? a.final : a.timenorm, last ? a.final_mean : a.timenorm_mean,
                         last ? a.final_rstd : a.timenorm_rstd, mine, NULL, inp, weight, weight, s->B, s->T, c);
    all_gather(all, mine, sizeof(NormState) * n);
    for (int i = 0; i < n; i++) {
        before[i] = start ? start[i] : no_past;
        for (int r = 0; r < ranks.slice; r++) { before[i] = norm_merge(before[i], all[r * n + i]); }
    }
    free(all);
    return before;
}

// Timestep norm of layer l, backward: the gradient (B,G) of the statistics after this slice; NULL if it is the last.
// Every slice r finds by itself the gradient dstart_r of the statistics start_r before it. By the equations of
// timestepnorm_backward, with center = start_r.mean, its sums are U_r = dstart_r.mean/start_r.count and
// S_r = dstart_r.var/start_r.count. Moved to the center of this slice, mean_T, the first is U_r + 2 (mean_T -
// start_r.mean) S_r. Then the sums of the later slices can be added up to U and S. This slice's sweep begins with them,
// and dend = count_T (U, S) makes it do so.
const NormState* slice_norm_dend(const Pass* s, int l, const float* dout, const float* mean, const float* rstd,
                                 const float* inp, const float* weight, const Config* c) {
    if (!s->before.norm) { return NULL; }
    typedef struct { NormState start, dstart; } Ends;
    int n = s->B * c->norm_num_groups;
    Ends *all = (Ends*)xcalloc((size_t)n * (ranks.slices + 1), sizeof(Ends)), *mine = all + n * ranks.slices;
    const NormState* start = state_layer(&s->before, c, l).norm;
    NormState *dstart = (NormState*)xcalloc(n, sizeof(NormState)), *dend = state_layer(&s->dafter, c, l).norm;
    timestepnorm_backward(NULL, NULL, NULL, dstart, NULL, dout, mean, rstd, start, inp, weight, s->B, s->T, c);
    for (int i = 0; i < n; i++) { mine[i].start = start[i]; mine[i].dstart = dstart[i]; }
    all_gather(all, mine, sizeof(Ends) * n);
    for (int i = 0; i < n; i++) {
        double U = 0, S = 0, center = 0, count = 0;
        for (int r = ranks.slice + 1; r < ranks.slices; r++) {
            Ends later = all[r * n + i];
            if (r == ranks.slice + 1) { center = later.start.mean; count = later.start.count; } // this slice's end
            double S_r = later.dstart.var / later.start.count;
            U += later.dstart.mean / later.start.count + 2 * (center - later.start.mean) * S_r;
            S += S_r;
        }
        dend[i].mean = count * U; dend[i].var = count * S;
    }
    free(all); free(dstart);
    return ranks.slice + 1 < ranks.slices ? dend : NULL;
}

// state (B,D,N,2) = state times q to the power T, plus what slice number r left in `all`; backwards with ~q for q.
static void slice_cema_merge(float* state, const float* all, int r, bool backwards, CemaParams w, int B, int T, int D,
                             int N) {
    size_t size = (size_t)B * D * N * 2;
    OMP(omp parallel for schedule(static))
    for (int d0 = 0; d0 < D; d0 += LANES) {
        Oscillator oscillators[CEMA_MAX_NDIM];
        cema_coefficients(oscillators, w, d0, D, N);
        for (int i = 0; i < N * min_int(LANES, D - d0); i++) {
            Complex square = lane_of(&oscillators[i % N].q, i / N), power = {1, 0};
            if (backwards) { square.im = -square.im; }
            for (int n = T; n; n /= 2, square = complex_mul(square, square)) {
                power = n % 2 ? complex_mul(power, square) : power;
            }
            for (int b = 0; b < B; b++) {
                size_t at = 2 * (((size_t)b * D + d0) * N + i);
                Complex s = complex_mul(power, complex_of(state[at], state[at + 1]));
                state[at] = s.re + all[r * size + at]; state[at + 1] = s.im + all[r * size + at + 1];
            }
        }
    }
}

// CEMA of layer l: the state before this slice; start (B,D,N,2) is that before the whole sequences. Pass.after receives
// the state after the slice, for the backward pass. inp (B,T,D).
float* slice_cema_start(const Pass* s, int l, float* start, const float* inp, CemaParams w, const Config* c) {
    if (!s->before.norm) { return start; }
    int B = s->B, T = s->T, D = c->model_dim, N = c->cema_ndim;
    size_t size = (size_t)B * D * N * 2;
    float *all = (float*)xcalloc(size * (ranks.slices + 1), sizeof(float)), *mine = all + size * ranks.slices;
    float *before = state_layer(&s->before, c, l).h, *after = state_layer(&s->after, c, l).h;
    cema_forward(acts_layer(s->specs, s->acts, l).cema, mine, NULL, inp, w, B, T, D, N); // its output is scratch
    all_gather(all, mine, size * sizeof(float));
    if (start) { memcpy(before, start, size * sizeof(float)); } else { memset(before, 0, size * sizeof(float)); }
    for (int r = 0; r < ranks.slice; r++) { slice_cema_merge(before, all, r, false, w, B, T, D, N); }
    memcpy(after, before, size * sizeof(float));
    slice_cema_merge(after, all, ranks.slice, false, w, B, T, D, N);
    free(all);
    return before;
}

// CEMA of layer l, backward: a_{T+1} (B,D,N,2), the a of the slice that follows at its first timestep; NULL for the
// last slice. dout (B,T,D).
const float* slice_cema_a_end(const Pass* s, int l, const float* dout, CemaParams w, const Config* c) {
    if (!s->before.norm) { return NULL; }
    int B = s->B, T = s->T, D = c->model_dim, N = c->cema_ndim;
    size_t size = (size_t)B * D * N * 2;
    float *all = (float*)xcalloc(size * (ranks.slices + 1), sizeof(float)), *mine = all + size * ranks.slices;
    float* a_end = state_layer(&s->dafter, c, l).h;
    OMP(omp parallel for schedule(static))
    for (int d = 0; d < D; d++) { // a_1 of this slice, from a_{T+1} = 0
        Oscillator oscillators[CEMA_MAX_NDIM];
        cema_coefficients(oscillators, w, d, d + 1, N);
        for (int i = 0; i < B * N; i++) {
            int b = i / N, k = i % N;
            Complex a = {0, 0}, q = lane_of(&oscillators[k].q, 0);
            for (int t = T - 1; t >= 0; t--) {
                a = conj_mul(q, a);
                a.re += dout[((size_t)b * T + t) * D + d];
            }
            size_t at = 2 * (((size_t)b * D + d) * N + k);
            mine[at] = a.re; mine[at + 1] = a.im;
        }
    }
    all_gather(all, mine, size * sizeof(float));
    memset(a_end, 0, size * sizeof(float));
    for (int r = ranks.slices - 1; r > ranks.slice; r--) { slice_cema_merge(a_end, all, r, true, w, B, T, D, N); }
    free(all);
    return ranks.slice + 1 < ranks.slices ? a_end : NULL;
}

// T timesteps of a sequence in slices of whole chunks.
int slice_length(int T, int c) {
    if (ranks.slices > 1 && (T % ranks.slices || T / ranks.slices % c)) {
        die("sequences of %d tokens over --chunk-parallel %d: %.9g each, expected a multiple of chunk_size %d", T,
            ranks.slices, (double)T / ranks.slices, c);
    }
    return T / ranks.slices;
}

// ---------------------------------------------------------------------------------------------------------------------
// Processes: those that mpirun or srun started, or one. All calls of MPI stand in this section.

#ifdef USE_MPI
#include <mpi.h>
#define MPI(...) __VA_ARGS__
#else
#define MPI(...)
#endif

MPI(static MPI_Comm slice_group;) // the processes with slices of the same sequences
MPI(void ranks_close(void) { MPI_Finalize(); })

// If all processes find the same error, only rank 0 should print it: the others wait, and rank 0 ends the job
// meanwhile. They cannot go on without it. MPICH's mpirun may end before it has read the message, so it gets time.
void ranks_on_die(bool said) {
    if (!said) { line_close(); }
    if (!said && ranks.rank) { signal(SIGTERM, SIG_DFL); sleep(3); }
    MPI(if (said && ranks.count > 1) { usleep(200000); MPI_Abort(MPI_COMM_WORLD, 1); })
}

int env_int(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }

// Starts MPI if the nearest launcher started several processes: launchers can start launchers, whose variables are
// inherited. srun is the nearest if this process is its task; if not, an mpirun; if there is none, srun, by a script.
// Then MPI says how many they are. What processes other than rank 0 print is not seen.
void ranks_open(void) {
    int open_mpi = env_int("OMPI_COMM_WORLD_SIZE"), mpich = env_int("PMI_SIZE"); // and what descends from MPICH
    int started = open_mpi > mpich ? open_mpi : mpich;
    on_die = ranks_on_die;
    if (!started || env_int("SLURM_TASK_PID") == getpid()) { started = env_int("SLURM_STEP_NUM_TASKS"); }
    if (started <= 1) { return; }
    MPI(int level;
        MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &level);
        MPI_Comm_size(MPI_COMM_WORLD, &ranks.count);
        MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
        atexit(ranks_close);)
    if (ranks.count == 1) {
        die("%d processes were started, this one knows of 1: built without MPI (see what make prints), or for another "
            "mpirun; srun: --mpi=pmix", started);
    }
    if (ranks.rank && !freopen("/dev/null", "w", stdout)) { die("/dev/null: %s", strerror(errno)); }
}

// Puts the processes into groups of `slices`.
void ranks_group(int slices) {
    if (ranks.count % slices) {
        die("--chunk-parallel %d: expected a number that divides that of the processes, %d", slices, ranks.count);
    }
    ranks.slices = slices; ranks.slice = ranks.rank % slices;
    ranks.groups = ranks.count / slices; ranks.group = ranks.rank / slices;
    MPI(if (ranks.count > 1) { MPI_Comm_split(MPI_COMM_WORLD, ranks.group, ranks.rank, &slice_group); })
}

int ranks_local(void) { // this process's number on its machine
    int local = 0;
    if (ranks.count == 1) { return local; }
    MPI(MPI_Comm machine;
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
        MPI_Comm_rank(machine, &local);)
    return local;
}

void all_gather(void* all, const void* mine, size_t bytes) {
    if (ranks.slices == 1) { memcpy(all, mine, bytes); return; }
    if (mine == (char*)all + ranks.slice * bytes) { mine = NULL; } // already in its place
    MPI(MPI_Allgather(mine ? mine : MPI_IN_PLACE, bytes, MPI_BYTE, all, bytes, MPI_BYTE, slice_group);)
    (void)mine;
}

// Copies x from the last slice's process to all of the group: with --carry, the state after the last slice is the one
// that all go on from in the next step.
void share_last(void* x, size_t bytes) {
    MPI(if (ranks.slices > 1) { MPI_Bcast(x, bytes, MPI_BYTE, ranks.slices - 1, slice_group); })
    (void)x; (void)bytes;
}

// Sums. MPI may add in another order from call to call, and the last bits depend on the order. So MPI only moves
// numbers, and they are added here, in the order of ranks: a resumed run goes on with the same bits.

void all_sum(double* x, int n) { // nobody returns before all are here
    if (ranks.count == 1) { return; }
    double* all = (double*)xcalloc((size_t)ranks.count * n, sizeof(double));
    MPI(MPI_Allgather(x, n, MPI_DOUBLE, all, n, MPI_DOUBLE, MPI_COMM_WORLD);)
    for (int i = 0; i < n; i++) {
        x[i] = all[i];
        for (int r = 1; r < ranks.count; r++) { x[i] += all[(size_t)r * n + i]; }
    }
    free(all);
}

// For each process r, the elements [part_start(n, r), part_start(n, r + 1)) of x (n) become the sum over all processes,
// in process r. The rest of its x is scratch afterwards. To keep memory small, a block of each part is sent at a time.
void parts_sum(float* x, size_t n) {
    size_t longest = n / ranks.count + 1, block = min_size(longest, (1 << 20) / ranks.count + 1);
    float *received = (float*)xcalloc(block * ranks.count, sizeof(float)), *mine = x + part_start(n, ranks.rank);
    size_t size = part_start(n, ranks.rank + 1) - part_start(n, ranks.rank);
    for (size_t at = 0; at < longest; at += block) {
        for (int i = 0; i < ranks.count; i++) { // to the i-th process after this one, from the i-th before it
            int to = (ranks.rank + i) % ranks.count, from = (ranks.rank + ranks.count - i) % ranks.count;
            float *block_to = x + part_start(n, to) + at, *block_from = received + from * block;
            size_t sent = min_size(block, x + n - block_to); // what it has after the end of the part, nobody reads
            MPI(MPI_Sendrecv(block_to, sent, MPI_FLOAT, to, 0, block_from, block, MPI_FLOAT, from, 0, MPI_COMM_WORLD,
                             MPI_STATUS_IGNORE);)
            (void)block_from; (void)sent;
        }
        for (int r = 0; r < ranks.count; r++) {
            float *sum = mine + at, *term = received + r * block;
            for (size_t i = 0; i < block && at + i < size; i++) { sum[i] = r ? sum[i] + term[i] : term[i]; }
        }
    }
    free(received);
}

// With `sum`, each process receives its part of x (n) as above; without, all receive all parts.
void parts_exchange(float* x, size_t n, bool sum) {
    if (ranks.count == 1) { return; }
    if (sum) { parts_sum(x, n); return; }
    for (int r = 0; r < ranks.count; r++) {
        size_t end = part_start(n, r + 1);
        for (size_t at = part_start(n, r), size; at < end; at += size) {
            size = min_size(end - at, 1 << 28); // MPI counts in ints
            MPI(MPI_Bcast(x + at, size, MPI_FLOAT, r, MPI_COMM_WORLD);)
        }
    }
    (void)x;
}
void grads_sum_part(const Model* m) { parts_exchange(m->grads.embed, m->num_parameters, true); }
void params_gather_parts(const Model* m) { parts_exchange(m->params.embed, m->num_parameters, false); }

// ---------------------------------------------------------------------------------------------------------------------
// Options as text: the command line, what files record, and the printed configuration

// Names and sizes of models: the defaults, and those in data/megalodon.h.
static const struct { const char* name; Config config; } presets[] = {
    {"tiny", { MODEL_OPTIONS(DEFAULT_VALUE) }}, PRESETS
};
enum { NUM_PRESETS = sizeof(presets) / sizeof(presets[0]) };

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

// The key of option i in files: the model's options have their own names, the others a prefix.
const char* option_key(int i) {
    return text_of("%s%s", option_rows[i].group == MODEL_GROUP ? "" : "flag.", option_rows[i].name);
}

// Sets option i from text, which must outlive o. `source` is for the message: the file that the text is from, or "".
void option_set(Options* o, int i, const char* text, const char* source) {
    const OptionRow* row = &option_rows[i];
    char *at = (char*)o + row->offset, *end;
    if (row->kind == TEXT) { *(const char**)at = text; return; }
    errno = 0;
    double x = row->kind == REAL ? strtod(text, &end) : strtol(text, &end, 10);
    if (errno || end == text || *end || isspace((unsigned char)*text) || !(x >= row->low && x <= row->high)) {
        die("%s%s%s \"%s\": expected a %s from %.10g to %.10g", source, *source ? ": " : "", option_flag(i), text,
            row->kind == REAL ? "number" : "whole number", row->low, row->high);
    }
    if (row->kind == REAL) { *(double*)at = x; } else { *(int*)at = x; }
}

// Prints --help, in lines of at most 100 columns: first the flags that people need first, then the others by group.
void print_help(void) {
    static const char* first[] = {"train", "val", "out", "steps", "batch", "seq", "lr", "preset", "load", "resume",
                                  "generate", "prompt", "temperature", "eval", "help"};
    static const char* titles[] = {"What most runs need:", "The model, if no preset fits:",
                                   "Tokens and documents (recorded with the weights):", "Training:", "The rest:"};
    enum { NUM_FIRST = sizeof(first) / sizeof(first[0]), COLUMNS = 100, INDENT = 23 };
    printf("Trains a " TITLE " language model, or samples from it (--generate), or evaluates it (--eval).\n"
           "usage: train_" ARCHITECTURE " [--flag value | --flag=value]...\n");
    for (int group = -1; group <= MODE_GROUP; group++) {
        printf("\n%s\n", titles[group + 1]);
        for (int k = 0; k < (group < 0 ? (int)NUM_FIRST : (int)NUM_OPTIONS); k++) {
            int i = k;
            bool needed = false;
            for (int f = 0; f < NUM_FIRST; f++) { needed = needed || !strcmp(first[f], option_rows[k].name); }
            if (group >= 0 && (needed || option_rows[k].group != group)) { continue; }
            if (group < 0) { for (i = 0; strcmp(first[k], option_rows[i].name);) { i++; } }
            const char* value = option_text(&default_options, i);
            if (!strcmp(value, OWN_SOURCES)) { value = "this project's own sources"; }
            if (option_rows[i].kind == FLAG) { value = ""; }
            int column = printf("  %-20s %s", option_flag(i), option_rows[i].help);
            if (*value && column + strlen(value) + 3 > COLUMNS) { printf("\n%*s", INDENT - 1, ""); }
            printf(*value ? " (%s)\n" : "\n", value);
        }
    }
}

// The row of a flag, as it stands on the command line: "--flag" or "--flag=value".
int option_find(const char* word) {
    size_t n = strcspn(word, "=");
    for (int i = 0; i < NUM_OPTIONS; i++) {
        const char* flag = option_flag(i);
        if (strlen(flag) == n && !strncmp(word, flag, n)) { return i; }
    }
    if (*word == '-') { die("unknown option \"%s\": --help lists all of them", word); }
    die("unknown option \"%s\": a flag takes one value; quote a pattern, so that the shell does not expand it", word);
}

void options_print(const Options* o, bool training, FILE* f) {
    for (int i = 0, column = 0; option_rows[i].group < (training ? MODE_GROUP : TRAINING_GROUP); i++) {
        const char* value = option_text(o, i);
        if (*value) { column += fprintf(f, "%s%s %s", column ? " | " : "", option_rows[i].name, value); }
        bool full = column + strlen(option_rows[i + 1].name) > 96;
        if (full || option_rows[i + 1].group != option_rows[i].group) { column = 0; fputc('\n', f); }
    }
}

// The name of a flag for messages about its files. A resumed run has it from its checkpoint.
const char* data_flag(const Options* o, const char* flag) {
    if (!*o->resume) { return flag; }
    return text_keep(text_of("%s (start in the folder where the run began, or give it again)", flag));
}

// The tokenizer that the .info of the data names, or "".
const char* data_tokenizer(const Options* o) {
    const char* found = "";
    if (o->generate) { return found; }
    if (*o->eval) { return paths_tokenizer("--eval", o->eval, ""); }
    if (strcmp(o->train, OWN_SOURCES)) { found = paths_tokenizer(data_flag(o, "--train"), o->train, ""); }
    return *found || !*o->val ? found : paths_tokenizer(data_flag(o, "--val"), o->val, "");
}

void checkpoint_open(SafeTensors* st, const char* folder);
void options_from_file(Options* o, const SafeTensors* st, const bool* given, bool all);

// Sets o from the command line: a preset first, then what a file records, then the flags, in whatever order they stand.
// With --load or --resume st is left open. Wrong or contradicting flags end in die().
void options_parse(Options* o, int argc, char** argv, SafeTensors* st) {
    const char* values[NUM_OPTIONS] = {NULL};
    bool given[NUM_OPTIONS] = {0};
    int preset = 0, preset_row = option_find("--preset"), vocab_row = option_find("--vocab-size");
    *o = default_options;
    for (int a = 1; a < argc; a++) {
        const char* word = strcmp(argv[a], "-h") ? argv[a] : "--help";
        int i = option_find(word);
        const char *flag = option_flag(i), *equals = strchr(word, '=');
        bool alone = option_rows[i].kind == FLAG;
        if (values[i]) { die("%s stands twice", flag); }
        if (alone && equals) { die("%s takes no value", flag); }
        if (!alone && !equals && a + 1 == argc) { die("%s needs a value", flag); }
        values[i] = alone ? "1" : equals ? equals + 1 : argv[++a];
        option_set(o, i, values[i], "");
        if (!*values[i] && strcmp(flag, "--prompt")) { die("%s \"\": expected a name", flag); }
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
    struct stat info;
    if (*o->load && !stat(o->load, &info) && S_ISDIR(info.st_mode)) {
        die("--load %s: a folder: name a file in it; or --resume it, which takes its newest checkpoint", o->load);
    }
    if (*o->load) { safetensors_open(st, o->load); }
    if (*o->resume) { checkpoint_open(st, o->resume); }
    if (loaded) { options_from_file(o, st, given, *o->resume); }
    if (*o->resume && !values[option_find("--out")]) { o->out = o->resume; }
    if (!strcmp(o->out, "none")) { o->out = ""; }
    if (!*o->tokenizer) { o->tokenizer = data_tokenizer(o); }
    if (*o->tokenizer && !path_exists(o->tokenizer)) {
        die("--tokenizer %s: %s%s", o->tokenizer, strerror(errno),
            loaded ? "; the weights were trained with it: --tokenizer FILE says where it is now" : "");
    }
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
    if (o->checkpoint_every && !*o->out) { die("--checkpoint-every needs a folder: --out none has none"); }
    if (*o->losses && !*o->eval) { die("--losses needs --eval, the file whose losses are written"); }
    if (o->generate && *o->eval) { die("--generate and --eval: give one of them"); }
    if ((o->generate || *o->eval) && !loaded) {
        die("--generate and --eval need weights: --load FILE or --resume DIR");
    }
    if (*o->prompt && !o->generate && !o->sample_every) {
        die("--prompt needs --generate N, the number of tokens to print");
    }
    if (strlen(o->out) > PATH_MAX - 64) { die("--out: the name is too long"); }
    if (o->threads) { omp_set_num_threads(o->threads); }
}

// The text that comes by pipe or from a file as stdin, "" without one. A pipe in which nothing comes for half a second
// counts as none: many programs start others with a pipe that stays open and empty.
const char* piped_text(void) {
    struct stat info;
    struct pollfd in = {STDIN_FILENO, POLLIN, 0};
    bool piped = !fstat(STDIN_FILENO, &info) && (S_ISFIFO(info.st_mode) || S_ISREG(info.st_mode));
    if (!piped || poll(&in, 1, 500) <= 0) { return ""; }
    char* text = NULL;
    size_t n = 0;
    for (int c; (c = getchar()) != EOF;) { text = (char*)list_grow(text, n, 1); text[n++] = c; }
    text = (char*)list_grow(text, n, 1);
    text[n] = 0;
    return text;
}

// Keeps the program's name. Opens what the shell left closed of stdin, stdout and stderr, because the next file that is
// opened would take its place.
void program_start(char** argv) {
    program = argv[0];
    while (true) {
        int fd = open("/dev/null", O_RDWR);
        if (fd > STDERR_FILENO || fd < 0) { close(fd); return; }
    }
}

// Where this program is, symbolic links resolved: by its name, if that holds a slash, else in the folders of PATH. ""
// where it cannot be found.
const char* program_path(void) {
    static char path[PATH_MAX];
    if (*path || !program) { return path; }
    const char* folders = strchr(program, '/') || !getenv("PATH") ? "" : getenv("PATH");
    do {
        int n = strcspn(folders, ":");
        const char* name = n ? text_of("%.*s/%s", n, folders, program) : program;
        if (!access(name, X_OK) && realpath(name, path)) { return path; }
        folders += n + (folders[n] == ':');
    } while (*folders);
    *path = 0;
    return path;
}

// The folder of this project, to find its own sources in whatever the current folder is: that of the program if they
// are there, else "", the current one.
const char* project_folder(void) {
    const char *path = program_path(), *slash = strrchr(path, '/');
    const char* folder = slash ? text_of("%.*s" HOME, (int)(slash - path), path) : "";
    return !access(text_of("%s/train_megalodon.c", folder), R_OK) ? folder : "";
}

// The threads of libgomp spin at barriers. A short spin costs nothing; a long one is ruinous as soon as another process
// wants a core. libgomp reads this variable before main, so the program starts itself a second time.
void restart_with_short_spin(char** argv) {
#ifdef _OPENMP
    char self[PATH_MAX];
    bool found = realpath("/proc/self/exe", self) && !strcmp(self, program_path()); // not a debugger's or a loader's
    if (found && !getenv("GOMP_SPINCOUNT") && !setenv("GOMP_SPINCOUNT", "3000", 0)) { execv(self, argv); }
#endif
    (void)argv;
}

// ---------------------------------------------------------------------------------------------------------------------
// Data: which tokens a step reads

// Opens the tokenizer and the data, and refuses what could not be used, before any work is done.
void data_open(Options* o, bool training, Dataset* data, Dataset* held_out) {
    int vocab = o->model.vocab_size, T = o->seq;
    size_t rows = (size_t)o->batch * o->accum * ranks.groups;
    Tokenizer* t = data->tokenizer = held_out->tokenizer = *o->tokenizer ? tokenizer_open(o->tokenizer) : NULL;
    bool fits = !t || t->pieces <= vocab, ends = !t || o->eod < 0 || o->eod == t->eod;
    if (!fits) { die("--tokenizer %s has %d tokens, vocab_size is %d", t->path, t->pieces, vocab); }
    if (!ends) { die("--eod %d: in --tokenizer %s documents end with token %d", o->eod, t->path, t->eod); }
    if (t && *o->tokenizer_crc32 && strcmp(o->tokenizer_crc32, t->crc32)) {
        die("--tokenizer %s is another one than the weights were trained with: its CRC-32 is %s, expected %s", t->path,
            t->crc32, o->tokenizer_crc32);
    }
    if (t) { o->tokenizer_crc32 = t->crc32; }
    data->eod = held_out->eod = o->eod;
    if (*o->eval) {
        dataset_open(data, NULL, "--eval", o->eval, "");
        dataset_index(data, T, vocab);
        dataset_counts(data); // what a .info says is checked before the work
    }
    if (data->size == 1 && o->eod < 0) { die("--eval %s: at least 2 tokens are needed", o->eval); }
    bool own = !strcmp(o->train, OWN_SOURCES);
    if (training && own && o->dry_run) { return; } // this asks for the memory of a run, whose data are not named yet
    if (training) {
        dataset_open(data, *o->val ? NULL : held_out, data_flag(o, "--train"), o->train, own ? project_folder() : "");
        if (*o->val) { dataset_open(held_out, NULL, data_flag(o, "--val"), o->val, ""); }
        printf("tokens: %zu to train on, %zu held out\n", data->size, held_out->size);
    }
    const Segment* text = data->segments;
    while (text < data->segments + data->count && is_token_file(text->path)) { text++; }
    if (text < data->segments + data->count && !t && vocab > 256) {
        printf("note: %s is read as bytes, although vocab_size is %d; --tokenizer encodes it\n", text->path, vocab);
    }
    if (!training) { return; }
    if (o->eod < 0 && data->size <= (size_t)T) {
        die("--train %s: %zu tokens to train on, --seq %d needs one more than that", o->train, data->size, T);
    }
    if (o->eod >= 0) {
        dataset_index(data, T, vocab);
        double steps = (double)data->stretches / rows;
        printf("documents: %zu to train on, read once in %.1f steps\n", data->num_documents, steps);
        if (data->stretches < rows) {
            die("--train %s: %zu pieces of --seq %d tokens, a step takes %zu", o->train, data->stretches, T, rows);
        }
    }
    bool used = strcmp(o->out, o->resume) && checkpoint_newest(o->out, INT_MAX) >= 0;
    if (used) { die("--out %s holds checkpoints: --resume it, or name another folder", o->out); }
    dataset_index(held_out, T, vocab);
}

// Makes the folder --out, and those above it. All processes take the name that rank 0 finds.
void out_open(Options* o) {
    bool named = strcmp(o->out, NEW_FOLDER);
    double number = 0;
    while (*o->out && ranks.rank == 0) {
        if (!named) { o->out = text_keep(text_of("runs/%.0f", ++number)); }
        for (const char* slash = strchr(o->out + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
            mkdir(text_of("%.*s", (int)(slash - o->out), o->out), 0777); // errors show below
        }
        if (!mkdir(o->out, 0777) || (named && errno == EEXIST)) { break; }
        if (errno != EEXIST) { die("--out %s: %s", o->out, strerror(errno)); }
    }
    all_sum(&number, 1);
    if (number) { o->out = text_keep(text_of("runs/%.0f", number)); }
    if (number) { printf("folder: %s\n", o->out); }
}

// The tokens and targets of all micro-steps of a step, this process's slice of its group's sequences, and which
// sequences start afresh. Sequences are numbered micro-step by micro-step over all groups, so a step has the same ones
// however the work is split. Without documents, sequence r starts at a uniformly random place, a pure function of
// (seed, step, r). Returns the number of predictions in the whole step.
size_t read_step(const Options* o, const Dataset* data, int step, int* tokens, int* targets, bool* fresh) {
    size_t B = o->batch, T = o->seq, slice = T / ranks.slices, sequences = o->accum * ranks.groups * B, sum = 0, n = T;
    int vocab = o->model.vocab_size, *sequence = (int*)xcalloc(T + 1, sizeof(int));
    for (size_t r = 0; r < sequences; r++, sum += n) {
        bool mine = r / B % ranks.groups == (size_t)ranks.group;
        if (o->eod >= 0) { n = dataset_stretch(data, step, r, sequences, T, vocab, mine ? sequence : NULL, fresh); }
        else if (mine) {
            size_t place = random_bits(o->seed, ((uint64_t)1 << 56) + step, r) % (data->size - T);
            dataset_read(data, place, T + 1, sequence, vocab);
        }
        for (size_t t = 0, from = ranks.slice * slice; mine && t < slice; t++) {
            *tokens++ = sequence[from + t];
            *targets++ = from + t < n ? sequence[from + t + 1] : IGNORE;
        }
        fresh += mine;
    }
    free(sequence);
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints: safetensors files with the weights, AdamW's moments, all flags, and the step. Data order, dropout and
// sampling follow from these. With --carry there are also the carried states.

static const char* kind_prefixes[NUM_KINDS] = {"", "adam_m.", "adam_v.", "state."};
enum { CARRIED_NORM = STATES, CARRIED_H }; // `kind` of Backend.copy: the norms, the first array of states

// The tensors of kind STATES, which hold the states of all sequences of a step. They have rows like those of
// param_specs. In an array of specs they follow them.
void carried_specs(Spec specs[NUM_CARRIED], const Options* o) {
    const Config* c = &o->model;
    size_t R = (size_t)o->batch * o->accum * ranks.groups, G = c->norm_num_groups;
    int L = o->carry ? c->num_layers : 0, once = o->carry;
    Spec arrays[NUM_ARRAYS];
    const Spec rows[6] = {
        {"layers.%d.mega.timenorm.count", L,    {R, 0, 0, 0}, R, 0},
        {"layers.%d.mega.timenorm.mean",  L,    {R, G, 0, 0}, R * G, 0},
        {"layers.%d.mega.timenorm.var",   L,    {R, G, 0, 0}, R * G, 0},
        {"output.final_norm.count",       once, {R, 0, 0, 0}, R, 0},
        {"output.final_norm.mean",        once, {R, G, 0, 0}, R * G, 0},
        {"output.final_norm.var",         once, {R, G, 0, 0}, R * G, 0},
    };
    int named = state_specs(arrays, c, R);
    memset(specs, 0, NUM_CARRIED * sizeof(Spec));
    memcpy(specs, rows, sizeof(rows));
    for (int i = 0; i < named; i++) { specs[6 + i] = arrays[i]; specs[6 + i].slots = L; }
}

// A walk over the tensors of the first `kinds` kinds, in the order of the file: for (Saved s = before_saved;
// saved_next(&s, specs, kinds);)
typedef struct { int kind, row, layer; const Spec* spec; char name[128]; } Saved;
static const Saved before_saved = {WEIGHTS, 0, -1, NULL, ""};
bool saved_next(Saved* s, const Spec* specs, int kinds) {
    s->layer++;
    while (s->layer >= specs[s->row].slots || !specs[s->row].size) {
        s->layer = 0;
        if (++s->row < (s->kind == STATES ? NUM_PARAMS + NUM_CARRIED : NUM_PARAMS)) { continue; }
        s->row = ++s->kind == STATES ? NUM_PARAMS : 0;
        if (s->kind == kinds) { return false; }
    }
    s->spec = &specs[s->row];
    layer_name(s->name, kind_prefixes[s->kind], s->spec->name, s->layer);
    return true;
}

// Copies a tensor between `tensor` and the backend; of STATES, the sequences of one micro-step. range receives which
// elements are this process's.
void saved_copy(const Backend* b, const Options* o, const Saved* s, int micro, float* tensor, bool to_host,
                size_t range[2]) {
    if (s->kind < STATES) { b->copy(b->self, s->kind, s->row, s->layer, tensor, to_host, range); return; }
    size_t n = (size_t)o->batch * o->model.norm_num_groups, each = s->spec->size / o->accum / ranks.groups;
    int row = s->row - NUM_PARAMS, layer = row < 3 ? s->layer : o->model.num_layers;
    range[0] = ((size_t)micro * ranks.groups + ranks.group) * each;
    range[1] = range[0] + each;
    tensor += range[0];
    if (row >= 6) { b->copy(b->self, CARRIED_H + row - 6, micro, s->layer, tensor, to_host, range); return; }
    NormState* norms = (NormState*)xcalloc(n, sizeof(NormState));
    b->copy(b->self, CARRIED_NORM, micro, layer, norms, true, range);
    for (size_t k = 0; k < n; k++) { // a file has one count for all groups of a sequence
        double* field = row % 3 == 0 ? &norms[k].count : row % 3 == 1 ? &norms[k].mean : &norms[k].var;
        if (to_host) { tensor[k * each / n] = *field; } else { *field = tensor[k * each / n]; }
    }
    if (!to_host) { b->copy(b->self, CARRIED_NORM, micro, layer, norms, false, range); }
    free(norms);
}

const char* checkpoint_path(const Options* o, int step) { return text_of("%s/step_%08d.safetensors", o->out, step); }

// Writes a checkpoint under another name, flushes it to the disk, and only then gives it its name: a kill
// at any moment leaves the older checkpoints and no broken one. Rank 0 writes the header, each process what it updates.
void checkpoint_save(const Backend* b, const Spec* specs, const Options* o, int step, double tokens) {
    Header h;
    header_begin(&h);
    header_meta(&h, "format", "megalodon");
    header_meta(&h, "architecture", ARCHITECTURE);
    header_meta(&h, "step", text_of("%d", step));
    header_meta(&h, "tokens", text_of("%.0f", tokens));
    for (int i = 0; option_rows[i].group != MODE_GROUP; i++) { header_meta(&h, option_key(i), option_text(o, i)); }
    for (Saved s = before_saved; saved_next(&s, specs, NUM_KINDS);) { header_tensor(&h, s.name, s.spec->dims); }
    header_end(&h);

    const char *path = checkpoint_path(o, step), *part = text_of("%s.part", path);
    double at = ranks.rank ? 0 : h.length; // where the data begins: the headers of processes may differ in --threads
    all_sum(&at, 1);
    int fd = open(part, O_CREAT | O_WRONLY, 0666);
    FILE* f = fd < 0 ? NULL : fdopen(fd, "wb");
    bool good = f && !ftruncate(fd, at + h.data) && (ranks.rank || fwrite(h.bytes, 1, h.length, f) == h.length);
    size_t begin = at, mine[2];
    for (Saved s = before_saved; good && saved_next(&s, specs, NUM_KINDS); begin += s.spec->size * sizeof(float)) {
        float* tensor = (float*)xcalloc(s.spec->size, sizeof(float));
        for (int micro = 0; good && micro < (s.kind == STATES ? o->accum : 1); micro++) {
            saved_copy(b, o, &s, micro, tensor, true, mine);
            good = !fseeko(f, begin + mine[0] * sizeof(float), SEEK_SET) &&
                   fwrite(tensor + mine[0], sizeof(float), mine[1] - mine[0], f) == mine[1] - mine[0];
        }
        free(tensor);
    }
    good = good && !fflush(f) && !fsync(fd) && !fclose(f);
    if (good) { all_sum(&at, 1); } // waits for all
    if (!good || (ranks.rank == 0 && rename(part, path))) {
        const char* error = strerror(errno);
        unlink(part);
        die("cannot write %s: %s (earlier checkpoints are untouched)", path, error);
    }
    int folder = open(o->out, O_RDONLY | O_DIRECTORY); // the new name must survive a power cut too
    if (folder >= 0) { fsync(folder); close(folder); }
    free(h.bytes);
}

// The newest step below `below` that has a checkpoint in a folder; -1 if none has.
int checkpoint_newest(const char* folder, int below) {
    int newest = -1, step;
    DIR* d = opendir(folder);
    for (struct dirent* entry; d && (entry = readdir(d));) {
        int n = 0;
        bool named = sscanf(entry->d_name, "step_%8d.safetensors%n", &step, &n) == 1 && n && !entry->d_name[n];
        if (named && step > newest && step < below) { newest = step; }
    }
    if (d) { closedir(d); }
    return newest;
}

// Opens the newest valid checkpoint in a folder.
void checkpoint_open(SafeTensors* st, const char* folder) {
    for (int step = INT_MAX; (step = checkpoint_newest(folder, step)) >= 0;) {
        const char* path = text_of("%s/step_%08d.safetensors", folder, step);
        const char* error = safetensors_try(st, path);
        if (!error && safetensors_meta(st, "step")) { return; }
        fprintf(stderr, "skipping %s: %s\n", path, error ? error : "not a checkpoint");
    }
    die("--resume %s: no valid step_*.safetensors there", folder);
}

// A whole number that a checkpoint records.
double checkpoint_number(const SafeTensors* st, const char* key, double most) {
    const char* text = safetensors_meta(st, key);
    char* end;
    double x = text && isdigit((unsigned char)*text) ? strtod(text, &end) : -1;
    if (!(x >= 0 && x <= most && x == floor(x)) || *end) {
        die("%s: %s \"%s\": expected a whole number up to %.10g", st->path, key, text ? text : "", most);
    }
    return x;
}

// Sets o to what a file records: of the model and its tokens, or with `all` of training too. Where flags are given they
// stay; given flags of the model must agree with the file.
void options_from_file(Options* o, const SafeTensors* st, const bool* given, bool all) {
    const char* found = safetensors_meta(st, "architecture"), *architecture = found ? found : "megalodon";
    if (strcmp(architecture, ARCHITECTURE) && !OTHER_WEIGHTS(o, architecture)) {
        die("%s: its architecture is %s, expected %s", st->path, architecture, ARCHITECTURE);
    }
    for (int i = 0; i < NUM_OPTIONS && option_rows[i].group <= (all ? TRAINING_GROUP : TOKEN_GROUP); i++) {
        const char* text = safetensors_meta(st, option_key(i));
        Options file = *o;
        if (!text) { continue; }
        option_set(&file, i, text, st->path);
        const char *theirs = option_text(&file, i), *ours = option_text(o, i);
        if (!given[i]) { *o = file; }
        else if (option_rows[i].group == MODEL_GROUP && strcmp(theirs, ours)) {
            die("%s has %s %s, the flags say %s", st->path, option_rows[i].name, theirs, ours);
        }
    }
}

// Says if the flags of a resumed run change the learning rate that its own schedule has after `step`.
void schedule_compare(const Options* o, const SafeTensors* st, int step) {
    const bool none_given[NUM_OPTIONS] = {false};
    Options old = *o;
    options_from_file(&old, st, none_given, true);
    double rate = learning_rate(o, step), old_rate = learning_rate(&old, min_int(step, old.steps));
    if (step < o->steps && rate != old_rate) {
        printf("note: with these flags the learning rate goes on at %.3g; the run's own schedule has %.3g here\n", rate,
               old_rate);
    }
}

// Brings the tensors of the first `kinds` kinds to the backend: those of a file, or without one the initial weights.
// With b NULL it only checks that the file has them.
void tensors_load(const Backend* b, const Options* o, const Spec* specs, const SafeTensors* st, int kinds) {
    size_t range[2];
    for (Saved s = before_saved; saved_next(&s, specs, kinds);) {
        float* tensor = b ? (float*)xcalloc(s.spec->size, sizeof(float)) : NULL;
        if (st) {
            safetensors_read(st, s.name, s.spec->dims, tensor);
            for (size_t i = 0; tensor && i < s.spec->size; i++) {
                if (!isfinite(tensor[i])) { die("%s: tensor '%s' holds %g at %zu", st->path, s.name, tensor[i], i); }
            }
        } else { param_init(tensor, s.spec, s.row, s.layer, &o->model, o->seed); }
        for (int micro = 0; b && micro < (s.kind == STATES ? o->accum : 1); micro++) {
            saved_copy(b, o, &s, micro, tensor, false, range);
        }
        free(tensor);
    }
}

// Refuses files that hold more than this model has. A released state dict may also hold buffers, which mean nothing
// here, and with tied embeddings a copy of the embedding under the name of the output layer.
void weights_check(const Spec* specs, const SafeTensors* st, bool share_emb) {
    for (int t = 0; t < st->num_tensors; t++) {
        const char *has = st->tensors[t].name, *dot = strrchr(has, '.');
        bool known = !strncmp(has, "adam_", 5) || !strncmp(has, "state.", 6) || !strcmp(has, "rope.freqs")
                     || (dot && !strncmp(dot, ".prior_", 7));
        for (Saved s = before_saved; !known && saved_next(&s, specs, WEIGHTS + 1);) { known = !strcmp(has, s.name); }
        if (!known && share_emb && !strcmp(has, "output.output.weight")) {
            float *output = (float*)xcalloc(specs[0].size, sizeof(float)), *embed = (float*)xcalloc(specs[0].size, 4);
            safetensors_read(st, has, specs[0].dims, output);
            safetensors_read(st, specs[0].name, specs[0].dims, embed);
            known = !memcmp(output, embed, specs[0].size * sizeof(float));
            if (!known) { die("%s: share_emb is 1, but '%s' differs from '%s'", st->path, has, specs[0].name); }
            free(output); free(embed);
        }
        if (!known) { die("%s: unexpected tensor '%s': a model of this configuration has none", st->path, has); }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The CPU backend

// How many threads work. A parallel loop takes as long as its slowest thread. So where another program keeps a core
// busy, fewer threads are faster, and too many can be slower than one. Now and then a piece of the work is therefore
// done with fewer threads, or with more again, and a number that is 5% faster stays. No result depends on it.
typedef struct {
    int most, now, trial;   // threads: at most, in use, and in this piece of the work
    bool down;              // the next trial is with fewer
    double started, spent, tokens, pace; // of this piece; pace: seconds for a token in the piece before
    int wait, pause;        // pieces until the next trial; and the time between trials, longer after each that failed
} Team;

void team_start(Team* t) {
    if (!t->most) { t->most = t->now = t->trial = omp_get_max_threads(); t->wait = t->pause = 4; t->down = true; }
    omp_set_num_threads(t->trial);
    t->started = seconds();
}

void team_end(Team* t, int tokens) {
    const double PIECE = 0.02; // seconds, at least
    t->spent += seconds() - t->started; t->tokens += tokens;
    omp_set_num_threads(t->most);
    if (t->most == 1 || t->spent < PIECE) { return; }
    double pace = t->spent / t->tokens, before = t->pace;
    t->spent = t->tokens = 0;
    if (t->trial != t->now) { // this was a trial
        bool better = pace < 0.95 * before;
        t->wait = t->pause = better ? 4 : min_int(2 * t->pause, 256);
        if (better) { t->now = t->trial; t->pace = pace; } else { t->down = !t->down; }
        t->trial = t->now;
        return;
    }
    bool slower = before > 0 && pace > 1.3 * before;
    if (slower) { t->wait = 0; t->pause = 4; t->down = true; }
    t->pace = pace;
    if (t->wait-- > 0) { return; }
    bool down = t->now == t->most || (t->down && t->now > 1);
    t->trial = down ? t->now - (t->now + 3) / 4 : min_int(t->now + (t->now + 2) / 3, t->most);
}

enum { STREAM_TOKENS = 512 };
typedef struct {
    Model m;
    Team training, streaming;
    Pass pass, stream;      // of a micro-step, and of streams
    State state;            // what the streams carry
    State *carried, next;   // with --carry: what comes before each micro-step of a step, and what comes after one
    int micro, accum, *drawn;
    double loss;
} Cpu;

// Counts weights, gradients and a part of both moments; activations and their gradients; the stream's activations; the
// carried states. What is left out is small.
double cpu_memory_needed(void* self, const Options* o) {
    Spec params[NUM_PARAMS], acts[NUM_ACTS], shared[NUM_ACTS]; // of one timestep
    (void)self;
    param_specs(params, &o->model);
    act_specs(acts, &o->model, 1, o->recompute ? KEEP_BLOCKS : KEEP_ALL);
    act_specs(shared, &o->model, 1, KEEP_NONE);
    double rows = (double)o->batch * o->seq / ranks.slices, streamed = min_int(o->model.chunk_size, STREAM_TOKENS);
    double each = specs_size(acts, NUM_ACTS), once = specs_size(shared, NUM_ACTS), arrays = 2 + 2.0 / ranks.count;
    double carried = o->carry ? 2.0 * o->model.num_layers * o->model.model_dim * o->model.cema_ndim * o->batch : 0;
    return sizeof(float) * (arrays * specs_size(params, NUM_PARAMS) + rows * (each + once) + streamed * once
                            + (o->accum + 1) * carried);
}

void cpu_open(void* self, const Options* o, bool training) {
    Cpu* r = (Cpu*)self;
    const Config* c = &o->model;
    model_alloc(&r->m, c, training);
    int keep = o->recompute ? KEEP_BLOCKS : KEEP_ALL;
    if (training) { pass_alloc(&r->pass, c, o->batch, o->seq / ranks.slices, keep, KEEP_NONE); }
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

// For CARRIED_NORM and those that follow, `row` is the number of the micro-step.
void cpu_copy(void* self, int kind, int row, int layer, void* host, bool to_host, size_t range[2]) {
    Cpu* r = (Cpu*)self;
    Model* m = &r->m;
    if (kind >= STATES) {
        State s = state_layer(&r->carried[row], &m->config, layer);
        Spec specs[NUM_ARRAYS];
        state_specs(specs, &m->config, s.B);
        void* here = kind == CARRIED_NORM ? (void*)s.norm : (&s.h)[kind - CARRIED_H];
        size_t bytes = kind == CARRIED_NORM ? sizeof(NormState) * s.B * m->config.norm_num_groups
                                            : sizeof(float) * specs[kind - CARRIED_H].size;
        memcpy(to_host ? host : here, to_host ? here : host, bytes);
        return;
    }
    float *here = ((float**)&m->params)[row] + layer * m->specs[row].size, *there = (float*)host;
    size_t size = m->specs[row].size, at = here - m->params.embed;
    bool all = kind == WEIGHTS && !to_host;
    range[0] = !all && m->first > at ? min_size(m->first - at, size) : 0;
    range[1] = all ? size : m->last > at ? min_size(m->last - at, size) : 0;
    if (kind != WEIGHTS) { here = (kind == ADAM_M ? m->adam_m : m->adam_v) + at - m->first; }
    float *to = to_host ? there : here, *from = to_host ? here : there;
    memcpy(to + range[0], from + range[0], (range[1] - range[0]) * sizeof(float));
}

void cpu_micro_step(void* self, const int* tokens, const int* targets, double dloss, bool first,
                    uint64_t first_sequence, const bool* fresh) {
    Cpu* r = (Cpu*)self;
    size_t scored = 0;
    r->pass.masks.first = first_sequence;
    if (first) { memset(r->m.grads.embed, 0, r->m.num_parameters * sizeof(float)); r->loss = 0; }
    r->micro = first ? 0 : r->micro + 1;
    State *past = fresh ? &r->carried[r->micro] : NULL, *next = fresh ? &r->next : NULL;
    team_start(&r->training);
    if (fresh) { state_carry(past, &r->m.config, fresh); }
    model_forward(&r->m, &r->pass, tokens, past, next);
    r->loss += model_loss(&r->m, &r->pass, targets, &scored) * dloss;
    model_backward(&r->m, &r->pass, tokens, targets, dloss, past, NULL);
    team_end(&r->training, r->pass.B * r->pass.T);
    if (!fresh) { return; }
    State s = *past; *past = *next; *next = s;
    share_last(past->norm, past->bytes);
}

double cpu_finish_step(void* self, double* loss) {
    *loss = ((Cpu*)self)->loss;
    all_sum(loss, 1);
    return model_grad_norm(&((Cpu*)self)->m);
}

AdamW adamw_of(const Options* o, double lr) {
    AdamW a = {lr, o->beta1, o->beta2, o->adam_eps, o->weight_decay};
    return a;
}
void cpu_update(void* self, const Options* o, double lr, int step, double grad_scale) {
    AdamW a = adamw_of(o, lr);
    model_update(&((Cpu*)self)->m, &a, step, grad_scale);
}

void cpu_stream(void* self, const int* tokens, int T, const int* targets, float* losses) {
    Cpu* r = (Cpu*)self;
    r->stream.T = T;
    team_start(&r->streaming);
    model_forward(&r->m, &r->stream, tokens ? tokens : r->drawn, &r->state, &r->state);
    if (targets) { crossentropy_forward(losses, r->stream.acts.logits, targets, T, r->m.config.vocab_size); }
    team_end(&r->streaming, T);
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

Backend cpu_backend(void) {
    static Cpu cpu;
    Backend b = {&cpu, "CPU", 0, STREAM_TOKENS, cpu_memory_needed, cpu_open, cpu_close, cpu_copy, cpu_micro_step,
                 cpu_finish_step, cpu_update, cpu_stream, cpu_draw, cpu_drawn, cpu_reset};
    return b;
}
