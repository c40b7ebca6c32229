/*
Gecko (arXiv 2601.06463), written as what it changes in Megalodon. It is by the same authors. Read train_megalodon.c
first: this file includes it, and everything that does not stand here is the same. Where the paper and the released code
(XuezheMax/gecko-llm) differ, this file does what the code does, apart from slips in its numerics, which are named.

With the symbols of train_megalodon.c, a block is

    n   = timestep_decay_norm(x)                       1. the norm's statistics forget
    e   = cema(n)                                      2. CEMA passes its input on as it is
    m   = rms_norm(e)
    z   = m Wz^T + bz;  q, k = rotary(affine(rms_norm(z)))   3. positions go on across chunks
    aq, ak = affine(rms_norm(z))
    v   = silu(n Wv^T + bv);  r = silu(m Wr^T + br)
    s   = softmax(q k^T) v                             4. attention reaches through the chunk before
    a   = working_memory(aq, ak, v)                    5. and what is older is in a memory of fixed size
    y   = m Wh1^T + bh1 + (s * r + a) Wh2^T + x
    u   = layer_norm(y);  out = ffn(u) + y             6. y is added, not x

Why. In Megalodon a token at the start of a chunk can attend to nothing but itself: the chunk before is gone, but for
what CEMA and the norm carry. Here, from the second chunk on, attention sees at least c tokens back (4). What leaves
this window does not vanish: it is merged, chunk by chunk, into a matrix for each head, which later tokens read by
content (5). And the norm of a long stream follows it (1), where a mean over all timesteps hardly moves any more.

Each change is an option, with Gecko's value as its default:

    1  --norm-decay 1  --timenorm-beta1 0.999  --timenorm-beta2 0.9999
    2  --cema-omega 0            omega is not learned, but 1
    3  --num-rope-heads 0 (all)  --rope-base 500000; that positions go on comes with --sliding
    4  --sliding 1
    5  --memory 1
    6  --two-hop-residual 0

With --norm-decay 0 --cema-omega 1 --sliding 0 --memory 0 --two-hop-residual 1 --rope-base 10000 it is Megalodon.

The sections have the order of the block: first the tables, then 1 to 5 with forward and backward pass, then the block,
where 6 is, and at the end what several processes exchange when they share a sequence.
*/

// ---------------------------------------------------------------------------------------------------------------------
// The tables: rows that Gecko adds to those of Megalodon, and other values that data/megalodon.h has for Megalodon

#define OTHER_ARCHITECTURE
#define ARCHITECTURE "gecko"
#define TITLE "Gecko"
#define HOME "/../.."
#define ROPE_BASE 500000
#define MORE_MODEL_OPTIONS(X) \
    X(BOOL, norm_decay,         1, 0, 1,          "let the statistics of the timestep norm forget") \
    X(REAL, timenorm_beta1, 0.999, 0, 0.99999999, "decay of its mean") \
    X(REAL, timenorm_beta2, 0.9999, 0, 0.99999999, "decay of its variance") \
    X(BOOL, cema_omega,         0, 0, 1,          "weigh the input in CEMA's output, as Megalodon does") \
    X(INT,  num_rope_heads,     0, 0, 1 << 16,    "heads with rotary positions, the first ones; 0 for all") \
    X(BOOL, sliding,            1, 0, 1,          "attend to the chunk before too") \
    X(BOOL, memory,             1, 0, 1,          "keep what is older in a working memory") \
    X(BOOL, two_hop_residual,   0, 0, 1,          "add x after the feed-forward layer, as Megalodon does, not y")
#define MORE_ACTIVATIONS(X) \
    X(aq,            "",                              LAYER, c->memory ? Z : 0, 0)   /* queries of the memory */ \
    X(ak,            "",                              LAYER, c->memory ? Z : 0, 0)   /* its keys */ \
    X(memory,        "layers.%d.mega.memory",         LAYER, c->memory ? V : 0, 0)   /* a */

// (In the tables of parameters and activations, c is the Config. In that of states it is the chunk size.)
//
// What goes from one call to the next: besides the statistics of the norms (here count and both averages) and CEMA's
// states, the chunk before, which attention still sees and the memory has not absorbed, and the memory. A state of
// zeros is the empty past: `chunks`, which is a float because files of states hold floats, says whether the rest
// counts.
#define WINDOW (config->sliding ? c : 0)                          // timesteps of the chunk before, for attention
#define WAITING (config->sliding && config->memory ? c : 0)       // and for the memory
#define MEMORY (config->memory ? Z : 0)
#define MORE_CARRIED(X) \
    X(chunks,    "layers.%d.mega.chunks",                   (size_t)1, 0, 0)     /* (L,B): whole chunks so far */ \
    X(k_before,  "layers.%d.mega.inner_attention.k_before", WINDOW, Z, 0)        /* (L,B,c,Z): rotated keys */ \
    X(v_before,  "layers.%d.mega.inner_attention.v_before", WINDOW, V, 0)        /* (L,B,c,V) */ \
    X(ak_before, "layers.%d.mega.memory.ak_before",         WAITING, Z, 0)       /* (L,B,c,Z): the memory's keys */ \
    X(memory,    "layers.%d.mega.memory.m",                 MEMORY, V / config->num_heads, 0) /* M (L,B,H,S,E) */ \
    X(lam,       "layers.%d.mega.memory.lam",               MEMORY, 0, 0)        /* (L,B,H,S) */ \
    X(lam_rest,  "layers.%d.mega.memory.lam_rest",          MEMORY, 0, 0)        /* what rounding cut off lam */
#define MORE_CACHED(X) X(ak, "", config->memory ? c : 0, Z, 0)

// FLOPs of a token that Megalodon has not: the second half of the window, and the memory's read and merge.
#define MORE_FLOPS(c) ((c)->num_layers * ((c)->sliding * 6.0 * (c)->chunk_size * ((c)->z_dim + (c)->value_dim) + \
                       (c)->memory * 18.0 * (c)->z_dim * (c)->value_dim / (c)->num_heads))
#define AFFINES (size_t)(c->memory ? 4 : 2)      // q, k, aq, ak
#define OMEGA_SIZE (c->cema_omega ? D : 0)
#define GAMMA_STD (c->cema_omega ? 1 : 1 / sqrt(c->cema_ndim))
#define ONE (size_t)(c->cema_omega ? 1 : 0) // 0 ends a shape: alpha is (D,N), without the 1 of Megalodon's

// The first two have the shapes of Megalodon's presets. Only gecko7B is that of the released code. Numbers of
// parameters: 220,627,968; 1,327,628,288; 7,385,817,088.
#define PRESET_NAMES "tiny gecko200M gecko1.3B_pg19 gecko7B"
#define GECKO 1, 0.999, 0.9999, 0, 0, 1, 1, 0
#define PRESETS \
    /*                  L    D   H    Z     V      F     c   G   N  vocab   base   eps  swiglu scale share rescale */ \
    {"gecko200M",      {12, 1024, 1,  256, 2048,  2560, 2048, 32, 16, 32000, 500000, 1e-5, 0, 0, 0, 0, GECKO}}, \
    {"gecko1.3B_pg19", {24, 2048, 2,  512, 4096,  3584, 2048, 64, 16, 32000, 500000, 1e-5, 1, 1, 1, 0, GECKO}}, \
    {"gecko7B",        {32, 4096, 4, 1024, 8192,  8192, 2048, 64, 16, 32000, 500000, 1e-5, 1, 0, 0, 0, GECKO}},

#define OF_MODEL(function) gecko_##function
#define OTHER_WEIGHTS(o, architecture) megalodon_weights(&(o)->model, architecture)
#define LIKE(function) __typeof__(function) gecko_##function; // declares a function of the same type
#define MORE_DECLARATIONS \
    LIKE(timestepnorm_forward) LIKE(timestepnorm_backward) LIKE(slice_norm_start) LIKE(slice_norm_dend) \
    LIKE(block_forward) LIKE(block_backward) \
    bool megalodon_weights(Config* c, const char* architecture);

#include "../../train_megalodon.c"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Timestep decay norm

// Megalodon: mean and variance of all timesteps so far, each with the same weight. Gecko: two averages that forget.
// With mu_t and var_t the mean and population variance of a group's features in timestep t alone, and count the number
// of timesteps so far, this one included,
//     m_t = b1 m_{t-1} + (1 - b1) mu_t              s_t = b2 s_{t-1} + (1 - b2) var_t            from 0
//     mean_t = m_t / (1 - b1^count)                 variance_t = s_t / (1 - b2^count)            as in Adam
//     out_t = (inp_t - mean_t) rstd_t (weight + 1) + bias,    rstd_t = 1/sqrt(variance_t + eps)
// The variance is the average of the variances inside timesteps, each about its own mean. How the mean moves from one
// timestep to the next is not in it, as it is in Megalodon's.
//
// A NormState holds count, and as its mean and var the averages m and s, before correction. The corrections are
// computed as -expm1(count log b), in double: by a product of powers in fp32, as in the release, 1 - b2^count is off by
// 1e-4 of its size in the first timesteps. Shapes and what is saved: as in timestepnorm_forward. mean is mean_t.
void decaynorm_forward(float* out, float* mean, float* rstd, NormState* end, const NormState* start, const float* inp,
                       const float* weight, const float* bias, int B, int T, const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups, width = D / G;
    double b1 = config->timenorm_beta1, b2 = config->timenorm_beta2, log_b1 = log(b1), log_b2 = log(b2);
    float eps = config->norm_eps;
    OMP(omp parallel for collapse(2) schedule(static))
    for (int b = 0; b < B; b++) {
        for (int g = 0; g < G; g++) {
            NormState stats = start ? start[b * G + g] : no_past;
            for (int t = 0; t < T; t++) {
                size_t at = ((size_t)b * T + t) * G + g;
                const float* x = inp + at * width;
                double mu = 0, var = 0;
                OMP(omp simd reduction(+:mu))
                for (int i = 0; i < width; i++) { mu += x[i]; }
                mu /= width;
                OMP(omp simd reduction(+:var))
                for (int i = 0; i < width; i++) { var += (x[i] - mu) * (x[i] - mu); }
                stats.count += 1;
                stats.mean = b1 * stats.mean + (1 - b1) * mu;
                stats.var = b2 * stats.var + (1 - b2) * (var / width);
                float mean_t = mean[at] = stats.mean / -expm1(stats.count * log_b1);
                float rstd_t = rstd[at] = 1.0 / sqrt(stats.var / -expm1(stats.count * log_b2) + eps);
                OMP(omp simd)
                for (int i = 0; i < width; i++) {
                    out[at * width + i] = (x[i] - mean_t) * rstd_t * (weight[g * width + i] + 1) + bias[g * width + i];
                }
            }
            if (end) { end[b * G + g] = stats; }
        }
    }
}

// Backward. With f = dout (weight + 1), the formula of out gives the gradients of mean_t and variance_t, as in
// timestepnorm_backward, and the corrections those of m_t and s_t. m_t also acts on m_{t+1}, with the factor b1. So the
// whole gradients U_t of m_t and W_t of s_t are two recurrences, from the last timestep to the first:
//     U_t = b1 U_{t+1} - rstd_t sum_i f_ti / (1 - b1^count)
//     W_t = b2 W_{t+1} - 1/2 rstd_t^3 sum_i f_ti (x_ti - mean_t) / (1 - b2^count)
// At t = T the gradient of the state after timestep T, dend, takes the place of b1 U_{T+1} and b2 W_{T+1}. x_ti enters
// m_t through mu_t, with the factor (1 - b1)/width, and s_t through var_t, with (1 - b2) 2 (x_ti - mu_t)/width:
//     dx_ti = f_ti rstd_t + ((1 - b1) U_t + 2 (1 - b2) W_t (x_ti - mu_t)) / width
//     dstart.mean = b1 U_1           dstart.var = b2 W_1
// Arguments as in timestepnorm_backward.
void decaynorm_backward(float* dinp, float* dweight, float* dbias, NormState* dstart, const NormState* dend,
                        const float* dout, const float* mean, const float* rstd, const NormState* start,
                        const float* inp, const float* weight, int B, int T, const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups, width = D / G;
    double b1 = config->timenorm_beta1, b2 = config->timenorm_beta2, log_b1 = log(b1), log_b2 = log(b2);
    OMP(omp parallel for schedule(static))
    for (int g = 0; g < G; g++) { // the sequences in turn, because they share dweight
        for (int b = 0; b < B; b++) {
            double count = (start ? start[b * G + g].count : 0) + T;
            double U = dend ? dend[b * G + g].mean : 0, W = dend ? dend[b * G + g].var : 0;
            for (int t = T - 1; t >= 0; t--, count--, U *= b1, W *= b2) {
                size_t at = ((size_t)b * T + t) * G + g;
                const float *x = inp + at * width, *dy = dout + at * width, *w_group = weight + g * width;
                float mean_t = mean[at], rstd_t = rstd[at];
                double sum_f = 0, sum_fx = 0, mu = 0;
                OMP(omp simd reduction(+:sum_f,sum_fx,mu))
                for (int i = 0; i < width; i++) {
                    float f = dy[i] * (w_group[i] + 1);
                    sum_f += f;
                    sum_fx += f * (x[i] - mean_t);
                    mu += x[i];
                }
                mu /= width;
                U -= rstd_t * sum_f / -expm1(count * log_b1);
                W -= 0.5 * rstd_t * rstd_t * rstd_t * sum_fx / -expm1(count * log_b2);
                if (!dinp) { continue; }
                float center = mu, constant = (1 - b1) * U / width, slope = 2 * (1 - b2) * W / width;
                OMP(omp simd)
                for (int i = 0; i < width; i++) {
                    dinp[at * width + i] += dy[i] * (w_group[i] + 1) * rstd_t + (constant + slope * (x[i] - center));
                    dweight[g * width + i] += dy[i] * (x[i] - mean_t) * rstd_t;
                    dbias[g * width + i] += dy[i];
                }
            }
            if (dstart) { dstart[b * G + g].mean += U; dstart[b * G + g].var += W; }
        }
    }
}

// The norm that --norm-decay asks for.
void gecko_timestepnorm_forward(float* out, float* mean, float* rstd, NormState* end, const NormState* start,
                                const float* inp, const float* weight, const float* bias, int B, int T,
                                const Config* config) {
    (config->norm_decay ? decaynorm_forward : timestepnorm_forward)(out, mean, rstd, end, start, inp, weight, bias, B,
                                                                    T, config);
}
void gecko_timestepnorm_backward(float* dinp, float* dweight, float* dbias, NormState* dstart, const NormState* dend,
                                 const float* dout, const float* mean, const float* rstd, const NormState* start,
                                 const float* inp, const float* weight, int B, int T, const Config* config) {
    (config->norm_decay ? decaynorm_backward : timestepnorm_backward)(dinp, dweight, dbias, dstart, dend, dout, mean,
                                                                      rstd, start, inp, weight, B, T, config);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. CEMA

// Megalodon: y_t = sum_k Re(g h_t) + omega x_t with g = gamma/sqrt(N). Gecko: omega is 1, so the input passes as in a
// residual connection, and g = gamma, whose start has the standard deviation 1/sqrt(N) instead. Both are one function,
// called with omega = 1 and gamma sqrt(N). The CemaParams of a layer, or of its gradients; `memory` for D(2N + 1)
// floats receives what Gecko changes.
CemaParams cema_either(const Params* w, const Config* config, float* memory) {
    CemaParams p = cema_params(w);
    int D = config->model_dim, N = config->cema_ndim;
    if (config->cema_omega) { return p; }
    for (int i = 0; i < 2 * D * N; i++) { memory[i] = p.gamma[i] * sqrtf(N); }
    for (int d = 0; d < D; d++) { memory[2 * D * N + d] = 1; }
    p.gamma = memory; p.omega = memory + 2 * D * N;
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Queries, keys and their positions

// Two more affine maps, for the memory: out (rows,Z) = znorm (gain + 1)/sqrt(Z/H) + shift. They have no positions: the
// memory is read by content alone.
void affine_forward(float* out, const float* znorm, const float* gain, const float* shift, size_t rows, int Z, int H) {
    float scale = 1.0 / sqrt(Z / H);
    OMP(omp parallel for schedule(static))
    for (size_t r = 0; r < rows; r++) {
        for (int i = 0; i < Z; i++) { out[r * Z + i] = znorm[r * Z + i] * (gain[i] + 1.0f) * scale + shift[i]; }
    }
}

// Backward. dznorm is added to, and so are dgain and dshift.
void affine_backward(float* dznorm, float* dgain, float* dshift, const float* dout, const float* znorm,
                     const float* gain, size_t rows, int Z, int H) {
    float scale = 1.0 / sqrt(Z / H);
    OMP(omp parallel for schedule(static))
    for (int i0 = 0; i0 < Z; i0 += 16) { // each thread has columns of its own
        for (size_t r = 0; r < rows; r++) {
            for (int i = i0; i < min_int(i0 + 16, Z); i++) {
                dgain[i] += dout[r * Z + i] * znorm[r * Z + i] * scale;
                dshift[i] += dout[r * Z + i];
                dznorm[r * Z + i] += dout[r * Z + i] * (gain[i] + 1.0f) * scale;
            }
        }
    }
}

// out (width) = inp (width), each pair of features turned by an angle, forwards or back. turn: cosines and sines.
static inline void pairs_turn(float* out, const float* inp, const float* turn, int width, bool back) {
    for (int j = 0; j < width; j += 2) {
        float re = inp[j], im = inp[j + 1], cosine = turn[j], sine = back ? -turn[j + 1] : turn[j + 1];
        out[j] = re * cosine - im * sine;
        out[j + 1] = re * sine + im * cosine;
    }
}

// Positions. Attention crosses the border of a chunk, so positions must go on there. In the release they count from the
// start of the sequence, and in fp32 that loses precision with every timestep. But only differences matter. So keys
// keep the position in their chunk, as in Megalodon, and a query has two forms: as it is for its own chunk, and turned
// on by c for the chunk before. This is exact for streams of any length.
//
// Returns cosines and sines (2,width), width = Z/H: of the angles of c timesteps, and of no angle. To be freed.
float* turns_of(const Config* config) {
    int width = config->z_dim / config->num_heads;
    float* turns = (float*)xcalloc(2 * width, sizeof(float));
    for (int j = 0; j < width; j += 2) { // in fp32, like the other positions
        float frequency = 1.0f / (float)pow(config->rope_base, (double)j / width);
        float angle = config->chunk_size * frequency;
        turns[j] = cos(angle); turns[j + 1] = sin(angle); turns[width + j] = 1;
    }
    return turns;
}
// Which of the two are those of head h: the heads from num_rope_heads on have no positions.
static int turn_at(const Config* config, int h) {
    return config->num_rope_heads && h >= config->num_rope_heads ? config->z_dim / config->num_heads : 0;
}

// --num-rope-heads: qk_forward rotates all heads of q and k (B,T,Z). This takes the rotation back from those that are
// to have none. Of a gradient it does the opposite, because qk_backward then takes the rotation back from all heads.
void heads_unturn(float* x, const float* rotations, int B, int T, int pos, const Config* config, bool gradient) {
    int H = config->num_heads, Z = config->z_dim, width = Z / H, turned = config->num_rope_heads;
    if (!turned) { return; }
    for (size_t r = 0; r < (size_t)B * T; r++) {
        const float* turn = rotations + (size_t)((pos + r % T) % config->chunk_size) * width;
        for (int h = turned; h < H; h++) {
            pairs_turn(x + r * Z + h * width, x + r * Z + h * width, turn, width, !gradient);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Sliding chunk attention

// Megalodon: a query sees the keys of its own chunk, up to itself. Gecko: and all keys of the chunk before. So it sees
// c + 1 to 2c keys (in a first chunk 1 to c), in one softmax. (The left edge moves a chunk at a time. It is not a
// window of fixed length.) Scores of both chunks stand side by side in a tile's rows of P: first the chunk before, then
// its own.

// The chunk before the first timestep: keys and values of attention, and keys of the memory (B,c,..). chunks (B): how
// many whole chunks each sequence has had. With none, there is no chunk before. All are NULL where nothing is carried.
typedef struct { const float *k, *v, *ak, *chunks; } Before;
static bool has_before(const Before* before, int b, int chunk) {
    return chunk > 0 || (before->chunks && before->chunks[b] > 0);
}

// The scores (rows,ld) of queries with the keys of one chunk, for one head; also drops keys, see attention_scores.
// earlier: it is the chunk before. Then the queries are turned on by `turn`, and `turned` (rows,width) receives them.
static void scores_of(float* scores, size_t ld, const float* q, const float* k, float* turned, const float* turn,
                      bool earlier, int rows, int keys, int Z, int H, int width, Dropout drop, int b, int t0, int h) {
    for (int i = 0; earlier && i < rows; i++) { pairs_turn(turned + i * width, q + (size_t)i * Z, turn, width, false); }
    gemm(scores, ld, earlier ? turned : q, earlier ? width : Z, 1, k, 1, Z, rows, keys, width, NULL, NULL);
    for (int i = 0; drop.drop && i < rows; i++) { // the chunk before has masks of its own: those of heads H, H + 1, ...
        float* s = scores + i * ld;
        dropout_row(s, s, NULL, drop, b, t0 + i, earlier ? H + h : h, earlier ? keys : keys - rows + i + 1);
    }
}

//     out_t = sum_s P_ts v_s        P_ts = exp(q_t k_s - lse_t)        s: the chunk before, and the own one up to t
// where q_t is turned on by c for the keys of the chunk before. Shapes and what is saved: as in attention_forward.
void sliding_attention_forward(float* out, float* lse, const float* q, const float* k, const float* v, Before before,
                               int B, int T, int K, int pos, const Config* config, Dropout drop) {
    int c = config->chunk_size, H = config->num_heads, Z = config->z_dim, V = config->value_dim, zd = Z / H, vd = V / H;
    int chunks = pos ? 1 : (T + c - 1) / c, tiles = (min_int(c, T) + ROWS - 1) / ROWS;
    float* turns = turns_of(config);
    OMP(omp parallel for schedule(static) collapse(4))
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                for (int tile = 0; tile < tiles; tile++) {
                    int first = chunk * c, t0 = first + tile * ROWS;
                    int rows = min_int(ROWS, min_int(first + c, T) - t0), keys = pos + t0 - first + rows;
                    if (rows <= 0) { continue; }
                    int earlier = has_before(&before, b, chunk) ? c : 0, all = earlier + keys;
                    float* P = scratch(OF_ATTENTION, (size_t)ROWS * (c + min_int(c, pos + T) + zd));
                    float* turned = P + (size_t)ROWS * (c + min_int(c, pos + T));
                    size_t at = (size_t)b * T + t0, at_k = (size_t)b * K + first;
                    const float* k_earlier = chunk ? k + (at_k - c) * Z : before.k + (size_t)b * c * Z;
                    const float* v_earlier = chunk ? v + (at_k - c) * V : before.v + (size_t)b * c * V;
                    if (earlier) {
                        scores_of(P, all, q + at * Z + h * zd, k_earlier + h * zd, turned, turns + turn_at(config, h),
                                  true, rows, c, Z, H, zd, drop, b, t0, h);
                    }
                    scores_of(P + earlier, all, q + at * Z + h * zd, k + at_k * Z + h * zd, NULL, NULL, false, rows,
                              keys, Z, H, zd, drop, b, t0, h);
                    for (int i = 0; i < rows; i++) {
                        float *p = P + (size_t)i * all, top = -INFINITY, sum = 0;
                        int seen = all - rows + i + 1;
                        for (int j = 0; j < seen; j++) { top = p[j] > top ? p[j] : top; }
                        OMP(omp simd reduction(+:sum))
                        for (int j = 0; j < seen; j++) {
                            p[j] = p[j] == -INFINITY ? 0.0f : exp_fast(p[j] - top);
                            sum += p[j];
                        }
                        if (sum == 0) { top = 0; sum = 1; } // no key is left: out becomes 0
                        for (int j = 0; j < all; j++) { p[j] = j < seen ? p[j] / sum : 0.0f; }
                        lse[(at + i) * H + h] = top + logf(sum);
                    }
                    float* o = out + at * V + h * vd;
                    gemm(o, V, P + earlier, all, 1, v + at_k * V + h * vd, V, 1, rows, vd, keys, NULL, NULL);
                    if (earlier) { gemm(o, V, P, all, 1, v_earlier + h * vd, V, 1, rows, vd, c, o, NULL); }
                }
            }
        }
    }
    free(turns);
}

// Backward: the equations of attention_backward, over the keys of both chunks. The keys and values of a chunk get
// gradients from its own queries and from those of the chunk after it. So first the even chunks are done, all at the
// same time, and then the odd ones. dq is assigned; dk and dv are zeroed and added to; dk_before, dv_before (B,c,..):
// the gradients of the chunk before the first timestep, added to, or NULL.
void sliding_attention_backward(float* dq, float* dk, float* dv, float* dk_before, float* dv_before, const float* dout,
                                const float* lse, const float* q, const float* k, const float* v, Before before, int B,
                                int T, const Config* config, Dropout drop) {
    int c = config->chunk_size, H = config->num_heads, Z = config->z_dim, V = config->value_dim, zd = Z / H, vd = V / H;
    int chunks = (T + c - 1) / c;
    float* turns = turns_of(config);
    memset(dk, 0, sizeof(float) * B * T * Z);
    memset(dv, 0, sizeof(float) * B * T * V);
    for (int odd = 0; odd < 2; odd++) {
        OMP(omp parallel for schedule(static) collapse(3))
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < H; h++) {
                for (int chunk = odd; chunk < chunks; chunk += 2) {
                    int first = chunk * c, length = min_int(c, T - first);
                    int earlier = has_before(&before, b, chunk) ? c : 0;
                    size_t at_own = (size_t)b * T + first, at_earlier = chunk ? at_own - c : (size_t)b * c;
                    const float* turn = turns + turn_at(config, h);
                    const float *k_own = k + at_own * Z + h * zd, *v_own = v + at_own * V + h * vd;
                    const float* k_earlier = (chunk ? k : before.k) + at_earlier * Z + h * zd;
                    const float* v_earlier = (chunk ? v : before.v) + at_earlier * V + h * vd;
                    float *dk_own = dk + at_own * Z + h * zd, *dv_own = dv + at_own * V + h * vd;
                    float *dk_to = chunk ? dk : dk_before, *dv_to = chunk ? dv : dv_before;
                    float* P = scratch(OF_ATTENTION, (size_t)2 * ROWS * (2 * c + zd));
                    float *dS = P + (size_t)ROWS * 2 * c, *turned = dS + (size_t)ROWS * 2 * c;
                    float* dturned = turned + ROWS * zd;
                    for (int tile = 0; tile < length; tile += ROWS) {
                        int rows = min_int(ROWS, length - tile), keys = tile + rows, all = earlier + keys;
                        int t0 = first + tile;
                        size_t at = (size_t)b * T + t0;
                        const float *q_tile = q + at * Z + h * zd, *dout_tile = dout + at * V + h * vd;
                        float *dq_tile = dq + at * Z + h * zd, *P_own = P + earlier, *dS_own = dS + earlier;
                        scores_of(P_own, all, q_tile, k_own, NULL, NULL, false, rows, keys, Z, H, zd, drop, b, t0, h);
                        gemm(dS_own, all, dout_tile, V, 1, v_own, 1, V, rows, keys, vd, NULL, NULL);
                        if (earlier) {
                            scores_of(P, all, q_tile, k_earlier, turned, turn, true, rows, c, Z, H, zd, drop, b, t0, h);
                            gemm(dS, all, dout_tile, V, 1, v_earlier, 1, V, rows, c, vd, NULL, NULL);
                        }
                        for (int i = 0; i < rows; i++) {
                            float *p = P + (size_t)i * all, *ds = dS + (size_t)i * all, lse_i = lse[(at + i) * H + h];
                            int seen = all - rows + i + 1;
                            float dot = 0; // sum_j P_tj dP_tj
                            OMP(omp simd reduction(+:dot))
                            for (int j = 0; j < seen; j++) {
                                p[j] = p[j] == -INFINITY ? 0.0f : exp_fast(p[j] - lse_i);
                                dot += p[j] * ds[j];
                            }
                            for (int j = 0; j < seen; j++) { ds[j] = p[j] * (ds[j] - dot); }
                            for (int j = seen; j < all; j++) { p[j] = ds[j] = 0; }
                        }
                        gemm(dq_tile, Z, dS_own, all, 1, k_own, Z, 1, rows, zd, keys, NULL, NULL);
                        gemm(dk_own, Z, dS_own, 1, all, q_tile, Z, 1, keys, zd, rows, dk_own, NULL);
                        gemm(dv_own, V, P_own, 1, all, dout_tile, V, 1, keys, vd, rows, dv_own, NULL);
                        if (!earlier) { continue; }
                        gemm(dturned, zd, dS, all, 1, k_earlier, Z, 1, rows, zd, c, NULL, NULL);
                        for (int i = 0; i < rows; i++) {
                            pairs_turn(dturned + i * zd, dturned + i * zd, turn, zd, true);
                            for (int j = 0; j < zd; j++) { dq_tile[(size_t)i * Z + j] += dturned[i * zd + j]; }
                        }
                        if (!dk_to) { continue; }
                        float* dk_earlier = dk_to + at_earlier * Z + h * zd;
                        float* dv_earlier = dv_to + at_earlier * V + h * vd;
                        gemm(dk_earlier, Z, dS, 1, all, turned, zd, 1, c, zd, rows, dk_earlier, NULL);
                        gemm(dv_earlier, V, P, 1, all, dout_tile, V, 1, c, vd, rows, dv_earlier, NULL);
                    }
                }
            }
        }
    }
    free(turns);
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Adaptive working memory

// What no query sees any more is kept in a matrix M (S,E) for each head, S = Z/H, E = V/H, and a vector lam (S). A row
// of M is the answer to one feature of a query: a query picks rows by a softmax over its features,
//     Fq = softmax over features of aq_t (S)                a_t = Fq M
// Chunk i reads M as it is after chunks 0..i-2 were absorbed: those that its attention does not see (with --sliding 0,
// 0..i-1). So the first two chunks read zeros (with --sliding 0, the first). A chunk, with keys ak (c,S) and values v
// (c,E), is absorbed by
//     Fk = softmax over features of ak (c,S)             K = softmax over the chunk's timesteps of ak, transposed (S,c)
//     W  = K (v - Fk M)                                  rho = share of the chunk in all that was absorbed (S)
//     M' = M + rho (W - M)                               by rows
// rho comes from the keys: with l (S) the log of the sum of exp(ak) over the chunk, and lam the same over all before,
//     lam' = log(exp(lam) + exp(l))                         rho = exp(l - lam')
// Before the first chunk lam is -infinity, so then rho is 1 and M' = W.
// Without the term Fk M, row s of M would be the mean of all values so far, weighed by the softmax over all time of
// feature s of the keys, as an online softmax computes it. With it, a chunk's values are first reduced by what the
// memory would answer to their keys: the delta rule. What M knows already is not added again.
//
// M is kept in fp32 everywhere. In bf16, as in the release, an update gets lost when it is small beside M. lam grows
// like the logarithm of time, by less and less: it is kept in double, in a state as two floats.
//
// M and lam go from chunk to chunk, in T/c steps. Here sequences and heads are parallel, and a thread walks through the
// chunks of its own. The backward pass makes all M again; T/c of them for each layer would take much memory.

// Chunk i reads the memory as it is after chunks 0..i-lag. So at the end of chunk i, chunk i+1-lag is absorbed. With
// --sliding: at the end of chunk 0 the one before this call, if there is one; at the end of chunk 1 chunk 0, and so on.
static int memory_lag(const Config* config) { return config->sliding ? 2 : 1; }

// F (n,S) = softmax over the features of each row of x, whose rows lie ld apart.
static void softmax_rows(float* F, const float* x, size_t ld, int n, int S) {
    for (int t = 0; t < n; t++) {
        float *f = F + (size_t)t * S, top = -INFINITY, sum = 0;
        for (int s = 0; s < S; s++) { top = x[t * ld + s] > top ? x[t * ld + s] : top; }
        OMP(omp simd reduction(+:sum))
        for (int s = 0; s < S; s++) { f[s] = exp_fast(x[t * ld + s] - top); sum += f[s]; }
        for (int s = 0; s < S; s++) { f[s] /= sum; }
    }
}

// K (n,S) = softmax over the n rows of each feature, l (S) = log of the sums of exp(x).
static void softmax_columns(float* K, float* l, const float* x, size_t ld, int n, int S) {
    float* top = l; // until the end
    for (int s = 0; s < S; s++) { top[s] = -INFINITY; }
    for (int t = 0; t < n; t++) {
        for (int s = 0; s < S; s++) { top[s] = x[t * ld + s] > top[s] ? x[t * ld + s] : top[s]; }
    }
    for (int s = 0; s < S; s++) {
        double sum = 0;
        for (int t = 0; t < n; t++) {
            float e = K[(size_t)t * S + s] = exp_fast(x[t * ld + s] - top[s]);
            sum += e;
        }
        for (int t = 0; t < n; t++) { K[(size_t)t * S + s] /= sum; }
        l[s] = top[s] + log(sum);
    }
}

// One head's chunk on its way into the memory. E: columns of M, of which `values` belong to v; the others, which only
// slices use, take values of zero.
typedef struct {
    int c, S, E, values;
    size_t Z, V;                  // distance of rows of ak and v
    float *Fk, *K, *U, *W;        // (c,S), (c,S) not transposed, (c,E): v - Fk M, (S,E)
    float *l, *rho;               // (S)
    float *dU, *dF, *dK, *dM_new; // (c,E), (c,S), (c,S), (S,E): for the backward pass
} Merge;
static size_t merge_size(int c, int S, int E) {
    return (size_t)4 * c * S + (size_t)2 * c * E + (size_t)2 * S * E + 2 * S;
}
static Merge merge_place(float* memory, int c, int S, int E, int values, size_t Z, size_t V) {
    Merge m = {c, S, E, values, Z, V, memory, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    m.K = m.Fk + (size_t)c * S; m.dF = m.K + (size_t)c * S; m.dK = m.dF + (size_t)c * S; m.U = m.dK + (size_t)c * S;
    m.dU = m.U + (size_t)c * E; m.W = m.dU + (size_t)c * E; m.dM_new = m.W + (size_t)S * E;
    m.l = m.dM_new + (size_t)S * E; m.rho = m.l + S;
    return m;
}

// For gradients of Fq and Fk, which are products with M: what the rows of M have in common makes no difference there,
// because the softmax takes it out again. But it may be much larger than the rest, and then the rest would be lost in
// rounding. So M is first reduced by the mean of its rows. M and centered: (S,E).
static void memory_center(float* centered, const float* M, int S, int E) {
    for (int e = 0; e < E; e++) {
        double sum = 0;
        for (int s = 0; s < S; s++) { sum += M[(size_t)s * E + e]; }
        for (int s = 0; s < S; s++) { centered[(size_t)s * E + e] = M[(size_t)s * E + e] - sum / S; }
    }
}

// Absorbs a chunk: M (S,E) and lam (S) become M' and lam'. lam is -infinity before the first chunk.
static void memory_merge(Merge* m, float* M, double* lam, const float* ak, const float* v) {
    softmax_rows(m->Fk, ak, m->Z, m->c, m->S);
    softmax_columns(m->K, m->l, ak, m->Z, m->c, m->S);
    gemm(m->U, m->E, m->Fk, m->S, 1, M, m->E, 1, m->c, m->E, m->S, NULL, NULL);
    for (int t = 0; t < m->c; t++) {
        for (int e = 0; e < m->E; e++) {
            float* u = m->U + (size_t)t * m->E + e;
            *u = (e < m->values ? v[t * m->V + e] : 0.0f) - *u;
        }
    }
    gemm(m->W, m->E, m->K, 1, m->S, m->U, m->E, 1, m->S, m->E, m->c, NULL, NULL);
    for (int s = 0; s < m->S; s++) {
        double top = fmax(lam[s], m->l[s]), sum = top + log(exp(lam[s] - top) + exp(m->l[s] - top));
        m->rho[s] = exp(m->l[s] - sum);
        lam[s] = sum;
        for (int e = 0; e < m->E; e++) {
            float* at = M + (size_t)s * m->E + e;
            *at += m->rho[s] * (m->W[(size_t)s * m->E + e] - *at);
        }
    }
}

// Backward. dM (S,E) and dlam (S) hold the gradients of M' and lam' and become those of M and lam. dak (c,S) and
// dv (c,E) are added to, and may be NULL. M and lam are those before the merge; they are overwritten.
//     drho = sum_e dM' (W - M)                      dW = rho dM'
//     dU   = K^T dW  is the gradient of v           dK = dW U^T                 dFk = -dU M^T
//     dM   = (1 - rho) dM' - Fk^T dU
//     dl   = drho rho + (dlam' - drho rho) rho      dlam = (dlam' - drho rho) (1 - rho)
// and dak has three parts: through K, a softmax over time, through Fk, a softmax over features, and through l.
static void memory_merge_backward(Merge* m, float* dM, float* dlam, float* dak, float* dv, float* M, double* lam,
                                  const float* ak, const float* v) {
    int c = m->c, S = m->S, E = m->E;
    float* before = m->dM_new; // a copy of M, until it holds the new dM
    memcpy(before, M, sizeof(float) * S * E);
    memory_merge(m, M, lam, ak, v); // for Fk, K, U, W and rho
    for (int s = 0; s < S; s++) { // W becomes dW, and l becomes dl
        double drho = 0, rho = m->rho[s];
        for (int e = 0; e < E; e++) {
            size_t at = (size_t)s * E + e;
            drho += (double)dM[at] * (m->W[at] - before[at]);
            m->W[at] = rho * dM[at];
        }
        double rest = dlam[s] - drho * rho;
        m->l[s] = drho * rho + rest * rho;
        dlam[s] = rest * (1 - rho);
    }
    gemm(m->dU, E, m->K, S, 1, m->W, E, 1, c, E, S, NULL, NULL);
    gemm(m->dK, S, m->U, E, 1, m->W, 1, E, c, S, E, NULL, NULL);
    memory_center(before, before, S, E);
    gemm(m->dF, S, m->dU, E, 1, before, 1, E, c, S, E, NULL, NULL);
    for (int i = 0; i < c * S; i++) { m->dF[i] = -m->dF[i]; }
    gemm(m->dM_new, E, m->Fk, 1, S, m->dU, E, 1, S, E, c, NULL, NULL);
    for (int i = 0; i < S * E; i++) { dM[i] = (1 - m->rho[i / E]) * dM[i] - m->dM_new[i]; }
    for (int t = 0; dv && t < c; t++) {
        for (int e = 0; e < m->values; e++) { dv[t * m->V + e] += m->dU[(size_t)t * E + e]; }
    }
    for (int s = 0; dak && s < S; s++) {
        double sum = 0;
        for (int t = 0; t < c; t++) { sum += (double)m->dK[(size_t)t * S + s] * m->K[(size_t)t * S + s]; }
        for (int t = 0; t < c; t++) {
            size_t at = (size_t)t * S + s;
            dak[t * m->Z + s] += m->K[at] * (m->dK[at] - sum + m->l[s]);
        }
    }
    for (int t = 0; dak && t < c; t++) {
        float dot = 0, *f = m->Fk + (size_t)t * S, *df = m->dF + (size_t)t * S;
        for (int s = 0; s < S; s++) { dot += df[s] * f[s]; }
        for (int s = 0; s < S; s++) { dak[t * m->Z + s] += f[s] * (df[s] - dot); }
    }
}

// What the functions below need to know of a pass: shapes, and where the keys and values of a chunk are. K: timesteps
// of ak and v for each sequence, see attention_forward.
typedef struct { const float *ak, *v; Before before; int B, T, K, pos; const Config* config; } MemoryPass;

// Which chunk of sequence b is absorbed at the end of chunk i; false if none is. Its keys and values begin at timestep
// `at` of p->ak and p->v, or if `before` is true, of those of the chunk before this pass.
static bool absorbed_chunk(const MemoryPass* p, int b, int i, size_t* at, bool* before) {
    int c = p->config->chunk_size, j = i + 1 - memory_lag(p->config);
    *before = j < 0;
    *at = j < 0 ? (size_t)b * c : (size_t)b * p->K + (size_t)j * c;
    return j >= 0 || (p->before.chunks && p->before.chunks[b] > 0);
}
// Whether anything was absorbed before chunk i of sequence b reads.
static bool memory_filled(const MemoryPass* p, int b, int i) {
    return i + (p->before.chunks ? p->before.chunks[b] : 0) >= memory_lag(p->config);
}
// M (S,E) and lam (S) before the first timestep.
static void memory_begin(const MemoryPass* p, float* M, double* lam, const State* past, int b, int h) {
    int H = p->config->num_heads, S = p->config->z_dim / H, E = p->config->value_dim / H;
    bool filled = memory_filled(p, b, 0);
    size_t at = (size_t)b * p->config->z_dim + h * S;
    for (int i = 0; i < S * E; i++) { M[i] = filled ? past->memory[at * E + i] : 0.0f; }
    for (int s = 0; s < S; s++) { lam[s] = filled ? (double)past->lam[at + s] + past->lam_rest[at + s] : -INFINITY; }
}

// out (B,T,V) = what the memory answers to aq (B,T,Z). past: M and lam before; next: receives them after the last whole
// chunk, if it has arrays.
void memory_forward(float* out, const float* aq, const MemoryPass* p, const State* past, State* next) {
    const Config* config = p->config;
    int c = config->chunk_size, H = config->num_heads, Z = config->z_dim, V = config->value_dim, S = Z / H, E = V / H;
    int chunks = p->pos ? 1 : (p->T + c - 1) / c;
    OMP(omp parallel for schedule(static) collapse(2))
    for (int b = 0; b < p->B; b++) {
        for (int h = 0; h < H; h++) {
            double* lam = (double*)scratch(OF_ATTENTION, 2 * S + (size_t)c * S + (size_t)S * E + merge_size(c, S, E));
            float *Fq = (float*)(lam + S), *M = Fq + (size_t)c * S;
            Merge m = merge_place(M + (size_t)S * E, c, S, E, E, Z, V);
            memory_begin(p, M, lam, past, b, h);
            for (int i = 0; i < chunks; i++) {
                int rows = min_int(c, p->T - i * c);
                size_t at = (size_t)b * p->T + i * c, at_chunk;
                bool before;
                softmax_rows(Fq, aq + at * Z + h * S, Z, rows, S);
                gemm(out + at * V + h * E, V, Fq, S, 1, M, E, 1, rows, E, S, NULL, NULL);
                bool whole = p->pos + rows == c, used = i + 1 < chunks || next->memory;
                if (!whole || !used || !absorbed_chunk(p, b, i, &at_chunk, &before)) { continue; }
                memory_merge(&m, M, lam, (before ? p->before.ak : p->ak) + at_chunk * Z + h * S,
                             (before ? p->before.v : p->v) + at_chunk * V + h * E);
            }
            size_t at = (size_t)b * Z + h * S;
            if (next->memory) {
                memcpy(next->memory + at * E, M, sizeof(float) * S * E);
                for (int s = 0; s < S; s++) {
                    next->lam[at + s] = lam[s];
                    next->lam_rest[at + s] = lam[s] > -INFINITY ? lam[s] - next->lam[at + s] : 0;
                }
            }
        }
    }
}

// Backward of a reader: daq = Fq (dFq - sum of dFq Fq) with dFq = dout M^T, and dM += Fq^T dout.
//
// daq and dak (B,T,Z) are assigned, dv (B,T,V) is added to. dM (B,Z,E) and dlam (B,Z) hold the gradients of the memory
// after the last timestep and become those of the memory before the first. dak_before and dv_before (B,c,..): those of
// the chunk before, added to; may be NULL. With daq NULL only dM and dlam are made.
void memory_backward(float* daq, float* dak, float* dv, float* dak_before, float* dv_before, float* dM, float* dlam,
                     const float* dout, const float* aq, const MemoryPass* p, const State* past) {
    const Config* config = p->config;
    int c = config->chunk_size, H = config->num_heads, Z = config->z_dim, V = config->value_dim, S = Z / H, E = V / H;
    int chunks = (p->T + c - 1) / c;
    if (daq) { memset(dak, 0, sizeof(float) * p->B * p->T * Z); }
    OMP(omp parallel for schedule(static) collapse(2))
    for (int b = 0; b < p->B; b++) {
        for (int h = 0; h < H; h++) {
            size_t size = 2 * S + (size_t)S * E; // before each chunk: lam, in double (S is even: aligned), and M
            float* all = scratch(OF_ATTENTION, size * (chunks + 1) + (size_t)2 * c * S + merge_size(c, S, E));
            float *Fq = all + size * (chunks + 1), *dFq = Fq + (size_t)c * S;
            float *dM_h = dM + ((size_t)b * Z + h * S) * E, *dlam_h = dlam + (size_t)b * Z + h * S;
            Merge m = merge_place(dFq + (size_t)c * S, c, S, E, E, Z, V);
            size_t at_chunk;
            bool before;
            memory_begin(p, all + 2 * S, (double*)all, past, b, h);
            for (int i = 0; i < chunks; i++) {
                float* after = all + size * (i + 1);
                memcpy(after, after - size, sizeof(float) * size);
                if ((i + 1) * c > p->T || !absorbed_chunk(p, b, i, &at_chunk, &before)) { continue; }
                memory_merge(&m, after + 2 * S, (double*)after, (before ? p->before.ak : p->ak) + at_chunk * Z + h * S,
                             (before ? p->before.v : p->v) + at_chunk * V + h * E);
            }
            for (int i = chunks - 1; i >= 0; i--) {
                int rows = min_int(c, p->T - i * c);
                float* M = all + size * i + 2 * S;
                size_t at = (size_t)b * p->T + i * c;
                if ((i + 1) * c <= p->T && absorbed_chunk(p, b, i, &at_chunk, &before)) {
                    float* lost = all + size * (i + 1); // is done with: the merge is run once more in its place
                    float *dak_to = before ? dak_before : dak, *dv_to = before ? dv_before : dv;
                    memcpy(lost, all + size * i, sizeof(float) * size);
                    memory_merge_backward(&m, dM_h, dlam_h, daq && dak_to ? dak_to + at_chunk * Z + h * S : NULL,
                                          daq && dv_to ? dv_to + at_chunk * V + h * E : NULL, lost + 2 * S,
                                          (double*)lost, (before ? p->before.ak : p->ak) + at_chunk * Z + h * S,
                                          (before ? p->before.v : p->v) + at_chunk * V + h * E);
                }
                const float* dO = dout + at * V + h * E;
                softmax_rows(Fq, aq + at * Z + h * S, Z, rows, S);
                memory_center(m.dM_new, M, S, E);
                gemm(dFq, S, dO, V, 1, m.dM_new, 1, E, rows, S, E, NULL, NULL);
                if (memory_filled(p, b, i)) { gemm(dM_h, E, Fq, 1, S, dO, V, 1, S, E, rows, dM_h, NULL); }
                for (int t = 0; daq && t < rows; t++) {
                    float dot = 0, *f = Fq + (size_t)t * S, *df = dFq + (size_t)t * S;
                    for (int s = 0; s < S; s++) { dot += df[s] * f[s]; }
                    for (int s = 0; s < S; s++) { daq[(at + t) * Z + h * S + s] = f[s] * (df[s] - dot); }
                }
            }
            bool filled = memory_filled(p, b, 0); // else no M came in, so none has a gradient
            for (int i = 0; i < S * E && !filled; i++) { dM_h[i] = 0; }
            for (int i = 0; i < S && !filled; i++) { dlam_h[i] = 0; }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The block. What is not commented is as in Megalodon's.

// Functions for sequences that are spread over several processes, see the last section. In one process they do nothing.
void slice_chunks_start(const Pass* s, int l, State* past, const Acts* a, const Config* config);
void slice_memory_start(const Pass* s, int l, State* past, const MemoryPass* p);
void slice_memory_end(const Pass* s, float* dM, float* dlam, const float* dout, const float* aq, const MemoryPass* p,
                      const State* past);
void slice_chunks_end(const Pass* s, const float* dk_before, const float* dv_before, const float* dak_before,
                      const Acts* da, const Config* config);

static Before before_of(const State* past) {
    Before before = {past->k_before, past->v_before, past->ak_before, past->chunks};
    return before;
}

void gecko_block_forward(const Model* model, const Pass* s, int l, const State* start, State* end) {
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

    past.norm = gecko_slice_norm_start(s, l, past.norm, x, w.timenorm_w, config); // several processes only
    gecko_timestepnorm_forward(a.timenorm, a.timenorm_mean, a.timenorm_rstd, next.norm, past.norm, x, w.timenorm_w,
                               w.timenorm_b, B, T, config);
    CemaParams cema = cema_either(&w, config, scratch(OF_ATTENTION, (size_t)D * (2 * config->cema_ndim + 1)));
    past.h = slice_cema_start(s, l, past.h, a.timenorm, cema, config); // several processes only
    cema_forward(a.cema, next.h, past.h, a.timenorm, cema, B, T, D, config->cema_ndim);
    norm_forward(a.rmsnorm, NULL, a.rmsnorm_rstd, a.cema, w.rmsnorm_w, NULL, rows, D, eps);
    dropout(a.rmsnorm, a.rmsnorm, NULL, sites.rmsnorm, rows, D);

    matmul_forward(a.wz, a.rmsnorm, w.wz, w.wz_b, NULL, rows, D, Z);
    norm_forward(a.znorm, NULL, a.znorm_rstd, a.wz, NULL, NULL, rows * H, Z / H, eps);
    qk_forward(a.q, a.k, a.znorm, w.gamma, w.beta, model->rotations, B, T, pos, c, Z, H);
    heads_unturn(a.q, model->rotations, B, T, pos, config, false);
    heads_unturn(a.k, model->rotations, B, T, pos, config, false);
    if (config->memory) {
        affine_forward(a.aq, a.znorm, w.gamma + 2 * Z, w.beta + 2 * Z, rows, Z, H);
        affine_forward(a.ak, a.znorm, w.gamma + 3 * Z, w.beta + 3 * Z, rows, Z, H);
    }
    matmul_forward(a.wv, a.timenorm, w.wv, w.wv_b, NULL, rows, D, V);
    silu_forward(a.v, a.wv, NULL, rows * V);
    const float *k = a.k, *v = a.v, *ak = a.ak;
    int K = T;
    if (next.k) { // a stream
        K = c; k = next.k; v = next.v; ak = next.ak;
        for (int b = 0; b < B; b++) {
            size_t to = (size_t)b * K + pos, from = (size_t)b * T;
            memcpy(next.k + to * Z, a.k + from * Z, sizeof(float) * T * Z);
            memcpy(next.v + to * V, a.v + from * V, sizeof(float) * T * V);
            if (config->memory) { memcpy(next.ak + to * Z, a.ak + from * Z, sizeof(float) * T * Z); }
        }
    }

    // Attention over two chunks, and the memory of what is older. Then what the next call needs of whole chunks.
    slice_chunks_start(s, l, &past, &a, config); // several processes only
    MemoryPass p = {ak, v, before_of(&past), B, T, K, pos, config};
    if (config->sliding) {
        sliding_attention_forward(a.attention, a.attention_lse, a.q, k, v, p.before, B, T, K, pos, config, sites.keys);
    } else { attention_forward(a.attention, a.attention_lse, a.q, k, v, B, T, K, pos, c, H, Z, V, sites.keys); }
    if (config->memory) {
        slice_memory_start(s, l, &past, &p); // several processes only
        memory_forward(a.memory, a.aq, &p, &past, &next);
    }
    for (int b = 0; next.chunks && b < B; b++) {
        int whole = (pos + T) / c;
        size_t from = (size_t)b * K + (whole - 1) * c, to = (size_t)b * c;
        next.chunks[b] = (past.chunks ? past.chunks[b] : 0) + whole;
        if (!whole || !config->sliding) { continue; }
        memcpy(next.k_before + to * Z, k + from * Z, sizeof(float) * c * Z);
        memcpy(next.v_before + to * V, v + from * V, sizeof(float) * c * V);
        if (config->memory) { memcpy(next.ak_before + to * Z, ak + from * Z, sizeof(float) * c * Z); }
    }

    // The gate is for attention alone; the memory's answer is added as it is.
    matmul_forward(a.wr, a.rmsnorm, w.wr, w.wr_b, NULL, rows, D, V);
    silu_forward(a.gated, a.wr, a.attention, rows * V);
    for (size_t i = 0; config->memory && i < rows * V; i++) { a.gated[i] += a.memory[i]; }
    dropout(a.gated, a.gated, NULL, sites.gated, rows, V);
    matmul_forward(a.mega, a.rmsnorm, w.wh1, w.wh1_b, sites.mega.drop ? NULL : x, rows, D, D);
    matmul_forward(a.mega, a.gated, w.wh2, NULL, a.mega, rows, V, D);
    dropout(a.mega, a.mega, x, sites.mega, rows, D);

    // 6. One hop: the feed-forward layer's output is added to y, as in an ordinary block. Megalodon adds it to x.
    const float* base = config->two_hop_residual ? x : a.mega;
    norm_forward(a.norm, a.norm_mean, a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D, eps);
    matmul_forward(a.fc1, a.norm, w.fc1, NULL, NULL, rows, D, F);
    if (config->swiglu) { matmul_forward(a.fc3, a.norm, w.fc3, NULL, NULL, rows, D, F); }
    silu_forward(a.hidden, a.fc1, config->swiglu ? a.fc3 : NULL, rows * F);
    dropout(a.hidden, a.hidden, NULL, sites.hidden, rows, F);
    if (!config->rescale_nffn) {
        matmul_forward(a.out, a.hidden, w.fc2, NULL, sites.fc2.drop ? NULL : base, rows, F, D);
        dropout(a.out, a.out, base, sites.fc2, rows, D);
        return;
    }
    matmul_forward(a.fc2, a.hidden, w.fc2, NULL, NULL, rows, F, D);
    dropout(a.fc2, a.fc2, NULL, sites.fc2, rows, D);
    for (size_t i = 0; i < rows * D; i++) { a.out[i] = base[i] + a.fc2[i] * w.rescale[i % D]; }
}

void gecko_block_backward(const Model* model, const Pass* s, int l, const State* start, State* dstart) {
    const Config* config = &model->config;
    int B = s->B, T = s->T, D = config->model_dim, H = config->num_heads, Z = config->z_dim, V = config->value_dim;
    int F = config->ffn_hidden_dim, c = config->chunk_size, N = config->cema_ndim;
    size_t rows = (size_t)B * T;
    const float* x = block_input(s->specs, s->acts, l);
    float* dx = block_input(s->dspecs, s->grads, l);
    Params w = params_layer(model, model->params, l), dw = params_layer(model, model->grads, l);
    Acts a = acts_layer(s->specs, s->acts, l), da = acts_layer(s->dspecs, s->grads, l);
    State past = state_layer(pass_start(s, start), config, l), dpast = state_layer(dstart, config, l);
    State after = state_layer(&s->after, config, l);
    Dropouts sites = dropouts_at(s->masks, T, l);
    float* spare = da.timenorm;

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
    for (size_t i = 0; !config->two_hop_residual && i < rows * D; i++) { da.mega[i] += da.out[i]; } // y's second reader

    const float* dmega = dropout(spare, da.mega, NULL, sites.mega, rows, D);
    matmul_backward(da.gated, dw.wh2, NULL, dmega, a.gated, w.wh2, NULL, rows, V, D);
    matmul_backward(da.rmsnorm, dw.wh1, dw.wh1_b, dmega, a.rmsnorm, w.wh1, NULL, rows, D, D);
    const float* dgated = dropout(da.wr, da.gated, NULL, sites.gated, rows, V);
    if (config->memory) { memcpy(da.memory, dgated, sizeof(float) * rows * V); } // dgated may stand in da.wr
    silu_backward(da.wr, da.attention, dgated, a.wr, a.attention, rows * V);
    matmul_backward(da.rmsnorm, dw.wr, dw.wr_b, da.wr, a.rmsnorm, w.wr, da.rmsnorm, rows, D, V);

    // Attention and the memory. With slices, the chunk before belongs to the process before, which receives its
    // gradient.
    bool slices = ranks.slices > 1;
    MemoryPass p = {a.ak, a.v, before_of(&past), B, T, T, 0, config};
    size_t window = (size_t)B * c, state = (size_t)B * Z * (V / H + 1);
    float* own = (float*)xcalloc(slices ? window * (2 * Z + V) : 0, sizeof(float));
    float* dk_before = slices ? own : dpast.k_before;
    float* dv_before = slices ? own + window * Z : dpast.v_before;
    float* dak_before = slices ? own + window * (Z + V) : dpast.ak_before;
    if (config->sliding) {
        sliding_attention_backward(da.q, da.k, da.v, dk_before, dv_before, da.attention, a.attention_lse, a.q, a.k, a.v,
                                   p.before, B, T, config, sites.keys);
    } else {
        attention_backward(da.q, da.k, da.v, da.attention, a.attention_lse, a.q, a.k, a.v, B, T, c, H, Z, V,
                           sites.keys);
    }
    if (config->memory) {
        float *dM = (float*)xcalloc(state, sizeof(float)), *dlam = dM + (size_t)B * Z * (V / H);
        slice_memory_end(s, dM, dlam, da.memory, a.aq, &p, &past); // several processes only
        memory_backward(da.aq, da.ak, da.v, dak_before, dv_before, dM, dlam, da.memory, a.aq, &p, &past);
        for (size_t i = 0; dpast.memory && i < (size_t)B * Z * (V / H); i++) { dpast.memory[i] += dM[i]; }
        for (size_t i = 0; dpast.lam && i < (size_t)B * Z; i++) { dpast.lam[i] += dlam[i]; }
        free(dM);
    }
    slice_chunks_end(s, dk_before, dv_before, dak_before, &da, config); // several processes only
    for (size_t i = 0; slices && dpast.k_before && ranks.slice == 0 && i < window * (config->sliding ? Z : 0); i++) {
        dpast.k_before[i] += dk_before[i];
        if (config->memory) { dpast.ak_before[i] += dak_before[i]; }
    }
    for (size_t i = 0; slices && dpast.v_before && ranks.slice == 0 && i < window * (config->sliding ? V : 0); i++) {
        dpast.v_before[i] += dv_before[i];
    }
    free(own);
    heads_unturn(da.q, model->rotations, B, T, 0, config, true);
    heads_unturn(da.k, model->rotations, B, T, 0, config, true);
    qk_backward(da.znorm, dw.gamma, dw.beta, da.q, da.k, a.znorm, w.gamma, model->rotations, B, T, c, Z, H);
    if (config->memory) {
        affine_backward(da.znorm, dw.gamma + 2 * Z, dw.beta + 2 * Z, da.aq, a.znorm, w.gamma + 2 * Z, rows, Z, H);
        affine_backward(da.znorm, dw.gamma + 3 * Z, dw.beta + 3 * Z, da.ak, a.znorm, w.gamma + 3 * Z, rows, Z, H);
    }
    norm_backward(da.wz, NULL, NULL, da.znorm, NULL, a.znorm_rstd, a.wz, NULL, rows * H, Z / H);
    matmul_backward(da.rmsnorm, dw.wz, dw.wz_b, da.wz, a.rmsnorm, w.wz, da.rmsnorm, rows, D, Z);

    const float* dm = dropout(spare, da.rmsnorm, NULL, sites.rmsnorm, rows, D);
    norm_backward(da.cema, dw.rmsnorm_w, NULL, dm, NULL, a.rmsnorm_rstd, a.cema, w.rmsnorm_w, rows, D);
    size_t numbers = (size_t)D * (2 * N + 1);
    float* memory = scratch(OF_ATTENTION, 2 * numbers); // of gamma and omega, then of their gradients
    CemaParams cema = cema_either(&w, config, memory), dcema = cema_params(&dw);
    if (!config->cema_omega) {
        memset(memory + numbers, 0, numbers * sizeof(float));
        dcema.gamma = memory + numbers; dcema.omega = dcema.gamma + 2 * D * N;
    }
    const float* a_end = slice_cema_a_end(s, l, da.cema, cema, config); // several processes only
    cema_backward(da.timenorm, dcema, dpast.h, da.cema, past.h, after.h, a_end, a.timenorm, cema, B, T, D, N);
    for (int i = 0; !config->cema_omega && i < 2 * D * N; i++) { dw.cema_gamma[i] += dcema.gamma[i] * sqrtf(N); }
    silu_backward(da.wv, NULL, da.v, a.wv, NULL, rows * V);
    matmul_backward(da.timenorm, dw.wv, dw.wv_b, da.wv, a.timenorm, w.wv, da.timenorm, rows, D, V);

    OMP(omp parallel for schedule(static))
    for (size_t i = 0; i < rows * D; i++) { dx[i] = config->two_hop_residual ? da.out[i] + da.mega[i] : da.mega[i]; }
    const NormState* dend = gecko_slice_norm_dend(s, l, da.timenorm, a.timenorm_mean, a.timenorm_rstd, x, w.timenorm_w,
                                                    config); // several processes only
    gecko_timestepnorm_backward(dx, dw.timenorm_w, dw.timenorm_b, dpast.norm, dend, da.timenorm, a.timenorm_mean,
                                a.timenorm_rstd, past.norm, x, w.timenorm_w, B, T, config);
}

// Weights of Megalodon: all that Gecko changes is turned off. False for other names.
bool megalodon_weights(Config* c, const char* architecture) {
    if (strcmp(architecture, "megalodon")) { return false; }
    c->norm_decay = c->sliding = c->memory = c->num_rope_heads = 0;
    c->cema_omega = c->two_hop_residual = 1;
    c->rope_base = 10000; // unless the file records another
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sequences that are spread over several processes (--chunk-parallel), see the section of this name in
// train_megalodon.c. CEMA is as there. For what Gecko adds, each slice needs of those before it: the two averages of
// the norm, the last chunk of the process before, and the memory.

NormState* gecko_slice_norm_start(const Pass* s, int l, NormState* start, const float* inp, const float* weight,
                                  const Config* c) {
    if (!c->norm_decay || !s->before.norm) { return slice_norm_start(s, l, start, inp, weight, c); }
    int n = s->B * c->norm_num_groups;
    NormState *all = (NormState*)xcalloc((size_t)n * ranks.slices, sizeof(NormState)), *mine = all + n * ranks.slice;
    NormState* before = state_layer(&s->before, c, l).norm;
    Acts a = acts_layer(s->specs, s->acts, l);
    bool last = l == c->num_layers; // what the layer writes here is scratch: only the state at the end is wanted
    decaynorm_forward(last ? a.final : a.timenorm, last ? a.final_mean : a.timenorm_mean,
                      last ? a.final_rstd : a.timenorm_rstd, mine, NULL, inp, weight, weight, s->B, s->T, c);
    all_gather(all, mine, sizeof(NormState) * n);
    double decay1 = pow(c->timenorm_beta1, s->T), decay2 = pow(c->timenorm_beta2, s->T);
    for (int i = 0; i < n; i++) {
        before[i] = start ? start[i] : no_past;
        for (int r = 0; r < ranks.slice; r++) {
            before[i].count += s->T;
            before[i].mean = decay1 * before[i].mean + all[r * n + i].mean;
            before[i].var = decay2 * before[i].var + all[r * n + i].var;
        }
    }
    free(all);
    return before;
}

const NormState* gecko_slice_norm_dend(const Pass* s, int l, const float* dout, const float* mean, const float* rstd,
                                       const float* inp, const float* weight, const Config* c) {
    if (!c->norm_decay || !s->before.norm) { return slice_norm_dend(s, l, dout, mean, rstd, inp, weight, c); }
    int n = s->B * c->norm_num_groups;
    NormState *all = (NormState*)xcalloc((size_t)n * ranks.slices, sizeof(NormState)), *mine = all + n * ranks.slice;
    NormState* dend = state_layer(&s->dafter, c, l).norm;
    decaynorm_backward(NULL, NULL, NULL, mine, NULL, dout, mean, rstd, state_layer(&s->before, c, l).norm, inp, weight,
                       s->B, s->T, c);
    all_gather(all, mine, sizeof(NormState) * n);
    double decay1 = pow(c->timenorm_beta1, s->T), decay2 = pow(c->timenorm_beta2, s->T);
    for (int i = 0; i < n; i++) {
        dend[i] = no_past;
        for (int r = ranks.slices - 1; r > ranks.slice; r--) {
            dend[i].mean = decay1 * dend[i].mean + all[r * n + i].mean;
            dend[i].var = decay2 * dend[i].var + all[r * n + i].var;
        }
    }
    free(all);
    return dend;
}

// Each slice has whole chunks, at least one. The last chunk of the process before: keys, values and keys of the memory,
// in s->before. Each process sends its own.
void slice_chunks_start(const Pass* s, int l, State* past, const Acts* a, const Config* config) {
    if (!s->before.norm) { return; }
    int B = s->B, T = s->T, c = config->chunk_size, Z = config->z_dim, V = config->value_dim;
    State before = state_layer(&s->before, config, l);
    size_t each = (size_t)B * c * (2 * Z + V);
    float *all = (float*)xcalloc(each * ranks.slices, sizeof(float)), *mine = all + each * ranks.slice;
    for (int b = 0; b < B; b++) {
        size_t from = (size_t)b * T + T - c, to = (size_t)b * c, block = (size_t)B * c;
        memcpy(mine + to * Z, a->k + from * Z, sizeof(float) * c * Z);
        memcpy(mine + block * Z + to * V, a->v + from * V, sizeof(float) * c * V);
        if (config->memory) { memcpy(mine + block * (Z + V) + to * Z, a->ak + from * Z, sizeof(float) * c * Z); }
        before.chunks[b] = (past->chunks ? past->chunks[b] : 0) + (float)ranks.slice * (T / c);
    }
    if (config->sliding) { all_gather(all, mine, each * sizeof(float)); }
    if (config->sliding && ranks.slice) {
        const float* from = all + each * (ranks.slice - 1);
        memcpy(before.k_before, from, sizeof(float) * B * c * Z);
        memcpy(before.v_before, from + (size_t)B * c * Z, sizeof(float) * B * c * V);
        if (config->memory) { memcpy(before.ak_before, from + (size_t)B * c * (Z + V), sizeof(float) * B * c * Z); }
    } else if (config->sliding && past->chunks) { // the first slice: what stands before the whole sequences
        memcpy(before.k_before, past->k_before, sizeof(float) * B * c * Z);
        memcpy(before.v_before, past->v_before, sizeof(float) * B * c * V);
        if (config->memory) { memcpy(before.ak_before, past->ak_before, sizeof(float) * B * c * Z); }
    }
    past->k_before = before.k_before; past->v_before = before.v_before; past->ak_before = before.ak_before;
    past->chunks = before.chunks;
    free(all);
}

// The gradient of the chunk before goes back to the process that it came from, which adds it to that of its last chunk.
void slice_chunks_end(const Pass* s, const float* dk_before, const float* dv_before, const float* dak_before,
                      const Acts* da, const Config* config) {
    if (!s->before.norm || !config->sliding) { return; }
    int B = s->B, T = s->T, c = config->chunk_size, Z = config->z_dim, V = config->value_dim;
    size_t each = (size_t)B * c * (2 * Z + V), block = (size_t)B * c;
    float *all = (float*)xcalloc(each * ranks.slices, sizeof(float)), *mine = all + each * ranks.slice;
    memcpy(mine, dk_before, sizeof(float) * block * Z);
    memcpy(mine + block * Z, dv_before, sizeof(float) * block * V);
    if (config->memory) { memcpy(mine + block * (Z + V), dak_before, sizeof(float) * block * Z); }
    all_gather(all, mine, each * sizeof(float));
    const float* from = all + each * (ranks.slice + 1);
    for (size_t i = 0; ranks.slice + 1 < ranks.slices && i < block; i++) {
        size_t to = i / c * T + T - c + i % c;
        for (int j = 0; j < Z; j++) { da->k[to * Z + j] += from[i * Z + j]; }
        for (int j = 0; j < V; j++) { da->v[to * V + j] += from[block * Z + i * V + j]; }
        for (int j = 0; config->memory && j < Z; j++) { da->ak[to * Z + j] += from[block * (Z + V) + i * Z + j]; }
    }
    free(all);
}

// A merge is affine in M:
//     M' = X M + Y        X = diag(1 - rho) - diag(rho) K Fk        Y = diag(rho) K v
// So all merges of a slice together are too: M_after = A M_before + C. Both come from running the memory on the columns
// [C | A]. They start as zeros and the identity, and the columns of A take values of zero. rho needs lam before the
// slice, so there are two exchanges: first of each slice's own lam, then of C and A. Each slice then composes those
// before it.
//
// The pair of this slice, (B,H,S,E+S), from lam (B,Z) before it. With pair NULL only lam is run on.
static void memory_affine(float* pair, double* lam, const MemoryPass* p) {
    const Config* config = p->config;
    int c = config->chunk_size, H = config->num_heads, Z = config->z_dim, V = config->value_dim, S = Z / H, E = V / H;
    int wide = pair ? E + S : 0;
    OMP(omp parallel for schedule(static) collapse(2))
    for (int b = 0; b < p->B; b++) {
        for (int h = 0; h < H; h++) {
            Merge m = merge_place(scratch(OF_ATTENTION, merge_size(c, S, wide)), c, S, wide, E, Z, V);
            float* M = pair ? pair + ((size_t)b * H + h) * S * wide : NULL;
            for (int i = 0; i < S * wide; i++) { M[i] = i % wide == E + i / wide; }
            for (int i = 0; i < p->T / c; i++) {
                size_t at;
                bool before;
                if (!absorbed_chunk(p, b, i, &at, &before)) { continue; }
                memory_merge(&m, M, lam + (size_t)b * Z + h * S, (before ? p->before.ak : p->ak) + at * Z + h * S,
                             (before ? p->before.v : p->v) + at * V + h * E);
            }
        }
    }
}

// M and lam before this slice, in s->before. past: those before the whole sequences.
void slice_memory_start(const Pass* s, int l, State* past, const MemoryPass* p) {
    if (!s->before.norm) { return; }
    const Config* config = p->config;
    int B = p->B, H = config->num_heads, Z = config->z_dim, S = Z / H, E = config->value_dim / H, wide = E + S;
    State before = state_layer(&s->before, config, l);
    size_t lams = (size_t)B * Z, pairs = (size_t)B * Z * wide;
    double *all_lam = (double*)xcalloc(lams * ranks.slices, sizeof(double)), *mine = all_lam + lams * ranks.slice;
    float *all = (float*)xcalloc(pairs * ranks.slices, sizeof(float)), *product = (float*)xcalloc(S * E, sizeof(float));
    for (size_t i = 0; i < lams; i++) { mine[i] = -INFINITY; }
    memory_affine(NULL, mine, p);
    all_gather(all_lam, mine, lams * sizeof(double));
    int own_chunks = p->T / config->chunk_size, lag = memory_lag(config);
    for (size_t i = 0; i < lams; i++) {
        bool filled = past->lam && p->before.chunks[i / Z] - ranks.slice * own_chunks >= lag;
        double sum = filled ? (double)past->lam[i] + past->lam_rest[i] : -INFINITY;
        for (int r = 0; r < ranks.slice; r++) {
            double other = all_lam[r * lams + i], top = fmax(sum, other);
            if (top > -INFINITY) { sum = top + log(exp(sum - top) + exp(other - top)); }
        }
        mine[i] = sum; // nobody reads this row any more
        before.lam[i] = sum;
        before.lam_rest[i] = sum > -INFINITY ? sum - before.lam[i] : 0;
    }
    memory_affine(all + pairs * ranks.slice, mine, p);
    all_gather(all, all + pairs * ranks.slice, pairs * sizeof(float));
    for (int i = 0; i < B * H; i++) {
        float* M = before.memory + (size_t)i * S * E;
        bool filled = past->memory && p->before.chunks[i / H] - ranks.slice * own_chunks >= lag;
        for (int k = 0; k < S * E; k++) { M[k] = filled ? past->memory[(size_t)i * S * E + k] : 0.0f; }
        for (int r = 0; r < ranks.slice; r++) { // M = A M + C
            const float* C = all + r * pairs + (size_t)i * S * wide;
            for (int k = 0; k < S * E; k++) { product[k] = C[k / E * wide + k % E]; }
            gemm(product, E, C + E, wide, 1, M, E, 1, S, E, S, product, NULL);
            memcpy(M, product, sizeof(float) * S * E);
        }
    }
    past->memory = before.memory; past->lam = before.lam; past->lam_rest = before.lam_rest;
    free(all_lam); free(all); free(product);
}

// Backward: dM (B,Z,E) and dlam (B,Z) receive the gradients of the memory after this slice, which the later slices
// send. Each finds by itself what it would send if nothing came after it. For dM this composes from the right,
// dM_before = A^T dM_after + its own. With dM known it does for dlam, whose factor is the product of (1 - rho) over the
// slice's merges, exp(lam before - lam after).
void slice_memory_end(const Pass* s, float* dM, float* dlam, const float* dout, const float* aq, const MemoryPass* p,
                      const State* past) {
    if (!s->before.norm) { return; }
    const Config* config = p->config;
    int B = p->B, H = config->num_heads, Z = config->z_dim, S = Z / H, E = config->value_dim / H, wide = E + S;
    size_t n = (size_t)B * Z * E, lams = (size_t)B * Z, pairs = (size_t)B * Z * wide, each = n + pairs + 2 * lams;
    float *all = (float*)xcalloc(each * ranks.slices, sizeof(float)), *mine = all + each * ranks.slice;
    float *pair = mine + n, *factor = pair + pairs, *own_dlam = factor + lams;
    double* lam = (double*)xcalloc(lams, sizeof(double));
    for (size_t i = 0; i < lams; i++) {
        lam[i] = memory_filled(p, i / Z, 0) ? (double)past->lam[i] + past->lam_rest[i] : -INFINITY;
    }
    memory_affine(pair, lam, p);
    for (size_t i = 0; i < lams; i++) {
        factor[i] = memory_filled(p, i / Z, 0) ? exp((double)past->lam[i] + past->lam_rest[i] - lam[i]) : 0;
    }
    free(lam);
    memory_backward(NULL, NULL, NULL, NULL, NULL, mine, own_dlam, dout, aq, p, past);
    all_gather(all, mine, each * sizeof(float));
    float* product = (float*)xcalloc(S * E, sizeof(float));
    for (int i = 0; i < B * H; i++) {
        float* d = dM + (size_t)i * S * E;
        for (int r = ranks.slices - 1; r > ranks.slice; r--) {
            const float* theirs = all + r * each + (size_t)i * S * E;
            const float* A = all + r * each + n + (size_t)i * S * wide + E;
            gemm(product, E, A, 1, wide, d, E, 1, S, E, S, theirs, NULL);
            memcpy(d, product, sizeof(float) * S * E);
        }
    }
    memset(own_dlam, 0, lams * sizeof(float));
    memcpy(mine, dM, n * sizeof(float)); // nobody reads this part any more
    memory_backward(NULL, NULL, NULL, NULL, NULL, mine, own_dlam, dout, aq, p, past);
    all_gather(all, mine, each * sizeof(float));
    for (size_t i = 0; i < lams; i++) {
        for (int r = ranks.slices - 1; r > ranks.slice; r--) {
            const float* theirs = all + r * each + n + pairs; // factor, and their own dlam
            dlam[i] = theirs[i] * dlam[i] + theirs[lams + i];
        }
    }
    free(all); free(product);
}
