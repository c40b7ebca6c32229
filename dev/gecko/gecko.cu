/*
Gecko on a GPU: gecko.c again, section by section and under the same names, in CUDA.

    make gecko && dev/gecko/train_gecko_cuda

Read gecko.c first. It has the equations; the comments here say how a GPU computes them. What Gecko does not change is
train_megalodon.cu's, which this file includes. Its WORDS and CONVENTIONS hold here, too.

    1. Timestep decay norm     statistics of each timestep; a scan in time; the normalized values
    2. CEMA                    Megalodon's, with other weights
    3. Positions               one table of angles for all timesteps of a call
    4. Sliding attention       Megalodon's products and softmax, with a chunk more of keys
    5. Memory                  products over all chunks at once; only M goes from chunk to chunk
    The block, the model

SYMBOLS. Those of gecko.c: S = Z/H and E = V/H are the widths of a head; but in section 4, S are scores, as in
train_megalodon.cu. n is the number of chunks of a call, of which the last may be short.
*/
#define ARCHITECTURE_C "dev/gecko/gecko.c"
#define CHUNKS_CACHED (c->sliding ? 2 : 1) // of keys and values in streams: the chunk before, then the own one
#define MORE_SCRATCH \
    NORM_STEPS,       /* sums of each timestep of each group */ \
    ANGLES,           /* cosines and sines of all positions of a call */ \
    CEMA_EITHER,      /* see cema_either */ \
    AFFINE_GRADIENTS, /* of z through aq and ak */ \
    BORDER,           /* the chunk before and the first one, side by side */ \
    MERGES,           /* the memory: see Merges */ \
    SLICE_CHUNKS,     /* several GPUs: gradients of the chunk before */
#define MORE_MEMORY(T, of_element) gecko_memory(&o->model, o->batch, T, of_element)
#define MORE_GPU_DECLARATIONS \
    template <typename X> static void gecko_block_forward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l, \
            const StateOf<X>* start, const StateOf<X>* end); \
    template <typename X> static void gecko_block_backward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l, \
            const StateOf<X>* start, const StateOf<X>* dstart); \
    template <typename X> static void gecko_final_norm_forward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, \
            const StateOf<X>* start, const StateOf<X>* end); \
    template <typename X> static void gecko_final_norm_backward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, \
            const StateOf<X>* start, const StateOf<X>* dstart); \
    template <typename X> static void gecko_model_step(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens, \
            StateOf<X>* state); \
    static size_t gecko_memory(const Config* c, size_t B, size_t T, size_t of_element);
#include "../../train_megalodon.cu"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Timestep decay norm

// There are three steps, forward and backward:
//   1. sums over the features of each timestep and group. As a group is `width` neighbours of a row, all groups of all
//      timesteps are one row of small vectors, and a team of lanes takes one;
//   2. the recurrences in time, one for each sequence and group, on these sums alone;
//   3. a row kernel, which reads the big tensors once more and writes the result.
//
// Step 1. mean and var (B,T,G) of each timestep alone. With dout: sum_f, sum_fx, and mu for the backward pass.
template <typename X, int E> __global__ void group_statistics_kernel(float* mean, float* var, const X* inp,
        size_t groups, int width, int team) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / team, group = i < groups ? i : groups - 1;
    int member = threadIdx.x % team;
    float x[E], s = 0;
    for (int f = member * E; f < width; f += team * E) { load(x, inp + group * width + f); EACH(e, E) { s += x[e]; } }
    float m = warp_sum_of(s, team) / width;
    s = 0;
    for (int f = member * E; f < width; f += team * E) {
        load(x, inp + group * width + f);
        EACH(e, E) { s += (x[e] - m) * (x[e] - m); }
    }
    s = warp_sum_of(s, team) / width;
    if (member == 0 && i < groups) { mean[i] = m; var[i] = s; }
}
template <typename X, int E> __global__ void group_sums_kernel(float* sum_f, float* sum_fx, float* mu, NormInputs<X> in,
        size_t groups, int width, int team) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / team, group = i < groups ? i : groups - 1;
    int member = threadIdx.x % team, column = group % in.G * width;
    float x[E], dy[E], w[E], s[3] = {0}, mean = in.mean[group];
    for (int f = member * E; f < width; f += team * E) {
        load(x, in.inp + group * width + f); load(dy, in.dout + group * width + f); load(w, in.w + column + f);
        EACH(e, E) { float v = dy[e] * (w[e] + 1); s[0] += v; s[1] += v * (x[e] - mean); s[2] += x[e]; }
    }
    EACH(k, 3) { s[k] = warp_sum_of(s[k], team); }
    if (member == 0 && i < groups) { sum_f[i] = s[0]; sum_fx[i] = s[1]; mu[i] = s[2] / width; }
}
// Lanes of a team, a power of two: as many as take a group, with 8 features each or one.
static int team_of(int width) {
    int team = 1;
    while (team < 32 && team * (wide(width) ? 8 : 1) < width) { team *= 2; }
    return team;
}

// Step 2. A CUDA block has SCAN_GROUPS groups of one sequence, and SCAN_LANES threads share the timesteps of each: so
// many in a row, in the order of the scan. A thread runs the recurrence over its own, from 0. Then one thread carries
// from one to the next what comes before each, and all run it again from there. In double; the corrections 1 - b^count
// in float, where -expm1 is as exact as floats can show.
//
//     forward, BACK = false: first, second (B,T,G) are mu_t and var_t, and become mean_t and rstd_t
//     backward, descending: first, second are sum_f and sum_fx, and become (1 - b1) U_t/width and 2 (1 - b2) W_t/width
//
// start (B,G): the state before, for the backward pass its count. after (B,G): U and W of the timestep behind the last
// one. end (B,G): forward, the state at the end; backward, the gradients of the state before, added to. Each may be
// NULL. apply false: only end is made, in the backward pass as U and W of the first timestep.
enum { SCAN_GROUPS = 8, SCAN_LANES = 128, AT_ONCE = 8 };
struct Decays { double b1, b2, log1, log2; float eps; int T, G, width; };
template <bool BACK> __global__ void __launch_bounds__(SCAN_GROUPS * SCAN_LANES) decay_scan_kernel(float* first,
        float* second, const float* rstd, NormState* end, const NormState* start, const NormState* after, Decays d,
        bool apply) {
    __shared__ double2 sums[SCAN_LANES][SCAN_GROUPS];
    int own = threadIdx.x, lane = threadIdx.y, g = blockIdx.x * SCAN_GROUPS + own;
    int n = (d.T + SCAN_LANES - 1) / SCAN_LANES; // timesteps of a lane
    bool active = g < d.G;
    int from = min(lane * n, d.T), to = active ? min(from + n, d.T) : from;
    size_t line = (size_t)blockIdx.y * d.G + (active ? g : 0), at = (size_t)blockIdx.y * d.T * d.G + g;
    double count0 = start ? start[line].count : 0;
    float log1 = d.log1, log2 = d.log2, rate1 = 1 - d.b1, rate2 = 1 - d.b2;
    double2 sum = {0, 0};
    auto walk = [&](bool write) {
        for (int i0 = from; i0 < to; i0 += AT_ONCE) {
            float x[AT_ONCE], y[AT_ONCE], r[AT_ONCE];
            EACH(k, AT_ONCE) {
                size_t j = at + (size_t)(BACK ? d.T - 1 - (i0 + k) : i0 + k) * d.G;
                if (i0 + k < to) { x[k] = first[j]; y[k] = second[j]; r[k] = BACK ? rstd[j] : 0; }
            }
            EACH(k, AT_ONCE) {
                if (i0 + k >= to) { break; }
                int t = BACK ? d.T - 1 - (i0 + k) : i0 + k;
                size_t j = at + (size_t)t * d.G;
                float count = count0 + t + 1, c1 = -expm1f(count * log1), c2 = -expm1f(count * log2);
                if (BACK) { x[k] *= -r[k] / c1; y[k] *= -0.5f * r[k] * r[k] * r[k] / c2; }
                sum.x = d.b1 * sum.x + (BACK ? x[k] : (1 - d.b1) * x[k]);
                sum.y = d.b2 * sum.y + (BACK ? y[k] : (1 - d.b2) * y[k]);
                if (!write) { continue; }
                first[j] = BACK ? rate1 * (float)sum.x / d.width : (float)sum.x / c1;
                second[j] = BACK ? 2 * rate2 * (float)sum.y / d.width : 1 / sqrtf((float)sum.y / c2 + d.eps);
            }
        }
    };
    walk(false);
    sums[lane][own] = sum;
    __syncthreads(); // the sums of all lanes are there
    if (lane == 0 && active) {
        double2 now = {0, 0};
        const NormState* past = BACK ? after : start;
        if (past) { now = {past[line].mean, past[line].var}; }
        for (int i = 0; i < SCAN_LANES; i++) {
            int length = min(n, d.T - min(i * n, d.T));
            double2 mine = sums[i][own];
            sums[i][own] = now;
            if (length) { now = {exp(length * d.log1) * now.x + mine.x, exp(length * d.log2) * now.y + mine.y}; }
        }
        if (BACK && apply) { now = {d.b1 * now.x, d.b2 * now.y}; } // else as it is for the timestep before
        if (end && !BACK) { end[line] = {count0 + d.T, now.x, now.y}; }
        if (end && BACK) { end[line].mean += now.x; end[line].var += now.y; }
    }
    __syncthreads(); // what comes before each lane is there
    sum = sums[lane][own];
    if (apply) { walk(true); }
}
template <bool BACK> static void decay_scan(Gpu& gpu, float* first, float* second, const float* rstd, NormState* end,
        const NormState* start, const NormState* after, int B, int T, const Config* config, bool apply = true) {
    double b1 = config->timenorm_beta1, b2 = config->timenorm_beta2;
    int G = config->norm_num_groups;
    Decays d = {b1, b2, log(b1), log(b2), (float)config->norm_eps, T, G, config->model_dim / G};
    LAUNCH(decay_scan_kernel<BACK>, dim3(ceil_div(G, SCAN_GROUPS), B), dim3(SCAN_GROUPS, SCAN_LANES), first, second,
           rstd, end, start, after, d, apply);
}

// Several GPUs; see the last section.
template <bool BACK> static const NormState* slice_decay(Gpu& gpu, NormState* before, float* first, float* second,
        const float* rstd, const NormState* start, int B, int T, const Config* config);

// Step 3 of the backward pass, a row kernel. add1 and add2 are other gradients of inp, or NULL; add1 may be dinp.
template <typename X, bool WIDE> __global__ void decaynorm_backward_kernel(X* dinp, float* partials, const float* mu,
        const float* constant, const float* slope, const X* add1, const X* add2, NormInputs<X> in) {
    float scale[8], dw[8] = {0}, db[8] = {0}, x[8], dy[8], a[8];
    int width = in.D / in.G;
    load_row<WIDE>(scale, in.w, in.D);
    for (size_t r = row_first(); r < (size_t)in.B * in.T; r += row_step()) {
        load_row<WIDE>(x, in.inp + r * in.D, in.D); load_row<WIDE>(dy, in.dout + r * in.D, in.D);
        float dx[8] = {0};
        EACH(k, 2) {
            const X* add = k ? add2 : add1;
            if (!add) { continue; }
            load_row<WIDE>(a, add + r * in.D, in.D);
            EACH(e, 8) { dx[e] += a[e]; }
        }
        EACH(e, 8) { // wide: 8 features of one group
            size_t k = r * in.G + min(column<WIDE>(WIDE ? 0 : e) / width, in.G - 1);
            dx[e] += dy[e] * (scale[e] + 1) * in.rstd[k] + (constant[k] + slope[k] * (x[e] - mu[k]));
            dw[e] += dy[e] * (x[e] - in.mean[k]) * in.rstd[k]; db[e] += dy[e];
        }
        store_row<WIDE>(dinp + r * in.D, dx, in.D);
    }
    store_partial<WIDE>(partials, 2, in.D, 0, dw, in.D);
    store_partial<WIDE>(partials, 2, in.D, 1, db, in.D);
}

// The shapes and what is saved: as in timestepnorm_forward and timestepnorm_backward.
template <typename X> static void decaynorm_forward(Gpu& gpu, bool sliced, int B, int T, X* out, float* mean,
        float* rstd, NormState* end, NormState* start, const X* inp, const float* w, const float* b,
        const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups, width = D / G, team = team_of(width);
    size_t groups = (size_t)B * T * G;
    LAUNCH((wide(width) ? group_statistics_kernel<X, 8> : group_statistics_kernel<X, 1>), ceil_div(groups * team, 256),
           256, mean, rstd, inp, groups, width, team);
    if (sliced) { slice_decay<false>(gpu, start, mean, rstd, NULL, NULL, B, T, config); } // several GPUs
    decay_scan<false>(gpu, mean, rstd, NULL, end, start, NULL, B, T, config);
    timestepnorm_again(gpu, out, mean, rstd, inp, w, b, (size_t)B * T, D, G);
}
template <typename X> static void decaynorm_backward(Gpu& gpu, bool sliced, int B, int T, X* dinp, float* dw,
        float* db, NormState* dstart, const X* add1, const X* add2, const X* dout, const float* mean, const float* rstd,
        const NormState* start, const X* inp, const float* w, const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups, width = D / G, team = team_of(width);
    size_t groups = (size_t)B * T * G;
    float* constant = gpu_scratch<float>(gpu, NORM_STEPS, 3 * groups), *slope = constant + groups, *mu = slope + groups;
    NormInputs<X> in = {dout, mean, rstd, start, inp, w, B, T, D, G};
    LAUNCH((wide(width) ? group_sums_kernel<X, 8> : group_sums_kernel<X, 1>), ceil_div(groups * team, 256), 256,
           constant, slope, mu, in, groups, width, team);
    const NormState* after = sliced ? slice_decay<true>(gpu, NULL, constant, slope, rstd, start, B, T, config) : NULL;
    decay_scan<true>(gpu, constant, slope, rstd, dstart, start, after, B, T, config);
    RowGrid r = row_grid(gpu, (size_t)B * T, D, 1, 4, 2 * D);
    LAUNCH(FORM(decaynorm_backward_kernel, wide(width)), r.grid, r.block, dinp, r.partials, mu, constant, slope, add1,
           add2, in);
    reduce_columns(gpu, r.partials, r.blocks, {{dw, db}, 2, D});
}

// The norm that --norm-decay asks for. In several GPUs start becomes the state before this one's slice.
template <typename X> static void gecko_norm_forward(Gpu& gpu, bool sliced, int B, int T, X* out, float* mean,
        float* rstd, NormState* end, NormState* start, const X* inp, const float* w, const float* b,
        const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups;
    if (config->norm_decay) {
        decaynorm_forward(gpu, sliced, B, T, out, mean, rstd, end, start, inp, w, b, config);
        return;
    }
    timestepnorm_statistics(gpu, inp, B, T, D, G);
    if (sliced) { slice_norm_start(gpu, start, B, T, G); }
    timestepnorm_forward(gpu, out, mean, rstd, end, start, inp, w, b, B, T, D, G, config->norm_eps);
}
template <typename X> static void gecko_norm_backward(Gpu& gpu, bool sliced, int B, int T, X* dinp, float* dw,
        float* db, NormState* dstart, const X* add1, const X* add2, const X* dout, const float* mean, const float* rstd,
        const NormState* start, const X* inp, const float* w, const Config* config) {
    int D = config->model_dim, G = config->norm_num_groups;
    if (config->norm_decay) {
        decaynorm_backward(gpu, sliced, B, T, dinp, dw, db, dstart, add1, add2, dout, mean, rstd, start, inp, w,
                           config);
        return;
    }
    timestepnorm_backward_sums(gpu, dw, db, dout, mean, rstd, start, inp, w, B, T, D, G);
    if (sliced) { slice_norm_begin(gpu, B, T, G); }
    const NormSums* after = sliced ? slice_norm_after(gpu, B, G) : NULL;
    timestepnorm_backward<X>(gpu, dinp, dstart, after, add1, add2, dout, mean, rstd, start, inp, w, B, T, D, G);
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. CEMA

// gamma (D,N,2) sqrt(N) and omega = 1; `gradients` of gamma and omega start at 0.
__global__ void cema_either_kernel(float* gamma, float* omega, float* gradients, const float* from, int D, int N) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, size = 2 * D * N;
    if (i < size) { gamma[i] = from[i] * sqrtf(N); }
    if (i < D) { omega[i] = 1; }
    if (i < size + D) { gradients[i] = 0; }
}
__global__ void cema_gamma_kernel(float* dgamma, const float* from, bool accumulate, int D, int N) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < 2 * D * N) { dgamma[i] = (accumulate ? dgamma[i] : 0) + from[i] * sqrtf(N); }
}
// The CPU's: what cema_forward and cema_backward are called with, in scratch memory. dcema may be NULL.
template <typename X> static CemaParams cema_either(Gpu& gpu, const ParamsOf<X>* w, const Config* config,
        CemaParams* dcema) {
    CemaParams p = cema_params(w);
    int D = config->model_dim, N = config->cema_ndim;
    if (config->cema_omega) { return p; }
    float *gamma = gpu_scratch<float>(gpu, CEMA_EITHER, (size_t)2 * D * (2 * N + 1)), *omega = gamma + 2 * D * N;
    float* gradients = omega + D;
    LAUNCH(cema_either_kernel, ceil_div(D * (2 * N + 1), 256), 256, gamma, omega, gradients, p.gamma, D, N);
    p.gamma = gamma; p.omega = omega;
    if (dcema) { dcema->gamma = gradients; dcema->omega = gradients + 2 * D * N; }
    return p;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Positions

// On the CPU, queries have a second form for the keys of the chunk before. Here one product makes the scores with both
// chunks, so positions must go on from chunk to chunk. They are counted from the chunk before the call, whose keys
// stand at 0 .. c-1, as they are kept between calls; the call's own begin at c. The table has them all. It is made in
// double and so precise for any length, but for the frequencies, which are the CPU's.
//
// angles (rows,width): cosine and sine for each pair of features. Row 0, no angle, is also what aq and ak take.
__global__ void angles_kernel(float* angles, size_t rows, int width, double base) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, row = i / (width / 2);
    int j = i % (width / 2) * 2;
    if (row >= rows) { return; }
    double angle = (double)row * (1.0f / (float)pow(base, (double)j / width)), sine, cosine;
    sincos(angle, &sine, &cosine);
    angles[row * width + j] = cosine; angles[row * width + j + 1] = sine;
}
static float* angles_of(Gpu& gpu, const Config* config, int T) {
    static size_t there; // rows that have been made
    size_t width = config->z_dim / config->num_heads, rows = (size_t)config->chunk_size + T + 1;
    static Config of;
    if (memcmp(&of, config, sizeof(of))) { of = *config; there = 0; }
    size_t before = gpu.scratch_size[ANGLES];
    float* angles = gpu_scratch<float>(gpu, ANGLES, rows * width);
    if (there < rows || before != gpu.scratch_size[ANGLES]) {
        LAUNCH(angles_kernel, ceil_div(rows * width / 2, 256), 256, angles, rows, (int)width, config->rope_base);
        there = rows;
    }
    return angles;
}

// --num-rope-heads: takes the rotation back from the heads of x (B,H,K,width) that are to have none, of T timesteps
// from at_k on, the first of which stands at `pos` of the table. `gradient`: see the CPU's. A thread has two features.
template <typename X> __global__ void heads_unturn_kernel(X* x, const float* angles, int heads, int T, int K, int at_k,
        int pos, int width, int turned, bool gradient) {
    int h = blockIdx.y % heads, t = (blockIdx.x * blockDim.x + threadIdx.x) / (width / 2);
    int j = (blockIdx.x * blockDim.x + threadIdx.x) % (width / 2) * 2;
    if (h < turned || t >= T) { return; }
    X* pair = x + ((size_t)blockIdx.y * K + at_k + t) * width + j;
    const float* angle = angles + (size_t)(pos + t) * width + j;
    float re = to_float(pair[0]), im = to_float(pair[1]), sine = gradient ? angle[1] : -angle[1];
    pair[0] = from_float<X>(re * angle[0] - im * sine); pair[1] = from_float<X>(re * sine + im * angle[0]);
}
template <typename X> static void heads_unturn(Gpu& gpu, X* x, const float* angles, int B, int T, int K, int at_k,
        int pos, const Config* config, bool gradient) {
    int H = config->num_heads, width = config->z_dim / H;
    if (!config->num_rope_heads || config->num_rope_heads >= H) { return; }
    LAUNCH(heads_unturn_kernel<X>, dim3(ceil_div((size_t)T * (width / 2), 256), B * H), 256, x, angles, H, T, K, at_k,
           pos, width, config->num_rope_heads, gradient);
}

// inp (rows,columns), rows ld apart, += add (rows,columns), rows ld_add apart.
template <typename X> __global__ void add_kernel(X* inp, int ld, const X* add, int ld_add, size_t rows, int columns) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, r = i / columns;
    if (r >= rows) { return; }
    X* at = inp + r * ld + i % columns;
    *at = from_float<X>(to_float(*at) + to_float(add[r * ld_add + i % columns]));
}
template <typename X> static void add_rows(Gpu& gpu, X* inp, int ld, const X* add, int ld_add, size_t rows,
        int columns) {
    LAUNCH(add_kernel<X>, ceil_div(rows * columns, 256), 256, inp, ld, add, ld_add, rows, columns);
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Sliding chunk attention

// Chunks of all B*H sequences of heads, taken together: a batch of products has one distance from each to the next. So
// either it goes through the chunks of one sequence, or through the sequences for one chunk, whichever is longer.
// visit(batch) is called for chunks first .. first + count - 1.
struct Batch {
    size_t row, chunk; // the first one: its first timestep among (B,H,T), its number among (B,H,n)
    int size;
    int64_t rows, chunks; // from each to the next
};
template <typename Visit> static void each_batch(int sequences, int T, int c, int first, int count, Visit visit) {
    size_t n = ceil_div(T, c);
    if (count > sequences) {
        for (int i = 0; i < sequences; i++) {
            visit(Batch{(size_t)i * T + (size_t)first * c, i * n + first, count, c, 1});
        }
    } else {
        for (int i = first; i < first + count; i++) {
            visit(Batch{(size_t)i * c, (size_t)i, sequences, T, (int64_t)n});
        }
    }
}

// What a batch of attention works on: `pairs` pairs of `length` queries each, which stand at pos in their chunk and see
// all of `before` keys, then those of their own chunk up to themselves. q, out and their gradients are at the first
// query of the first pair; k, v and theirs at its first key; rows_q, rows_k: timesteps from one pair to the next. at:
// number of the first query in (B,H,T). chunks (B), if not NULL: sequences with no chunk so far do not see the keys
// before.
template <typename X> struct Window {
    int pairs, length, pos, before; int64_t rows_q, rows_k; size_t at;
    const X *q, *k, *v; const float* chunks;
    int H, zd, vd; Dropout drop; bool cached;
};
// Scores of keys that do not exist become -infinity. The kernels of softmax ask for that only in their form for
// dropout.
template <typename X> __global__ void no_keys_kernel(X* S, int ld, size_t step, int before, const float* chunks, int p,
        int H) {
    int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j < before && chunks[(p + blockIdx.z) / H] == 0) {
        S[blockIdx.z * step + (size_t)blockIdx.y * ld + j] = from_float<X>(-INFINITY);
    }
}
struct Masked { bool drop; };
// (In these batches pairs are heads in turn, of one chunk; p: the first one.)
template <typename X> static void no_keys(Gpu& gpu, X* S, int ld, int64_t step, int rows, int p, int batch,
        const Window<X>& w) {
    if (!w.chunks || !w.before) { return; }
    LAUNCH(no_keys_kernel<X>, dim3(ceil_div(w.before, 256), rows, batch), 256, S, ld, (size_t)step, w.before, w.chunks,
           p, w.H);
}

// As in attention_forward.
template <typename X> static void window_forward(Gpu& gpu, X* out, float* lse, const Window<X>& w) {
    int zd = w.zd, vd = w.vd, most_rows = min_int(w.length, QUERY_TILE);
    int ld = ceil_div(w.before + w.pos + w.length, 128) * 128;
    int most = pairs_at_once<X>(w.pairs, (size_t)most_rows * ld);
    X* S = gpu_scratch<X>(gpu, SCORES, (size_t)most * most_rows * ld);
    for (int p = 0; p < w.pairs; p += most) {
        int batch = min_int(most, w.pairs - p);
        for (int i = 0; i < w.length; i += QUERY_TILE) {
            int m = min_int(QUERY_TILE, w.length - i), past = w.before + w.pos + i, keys = past + m;
            if (w.cached) { keys = min_size(w.rows_k, ceil_div(keys, 128) * 128); } // few different shapes
            size_t at_q = p * w.rows_q + i, at_k = p * w.rows_k;
            int64_t step = (int64_t)m * ld;
            gemm<X, X>(gpu, {S, ld, step}, {w.q + at_q * zd, zd, w.rows_q * zd},
                       {w.k + at_k * zd, zd, w.rows_k * zd, true}, m, keys, zd, batch);
            no_keys(gpu, S, ld, step, m, p, batch, w);
            Masked masked = {w.chunks || w.drop.drop};
            LAUNCH(FORM_DROP(softmax_forward_kernel, wide(keys, w.before), masked), dim3(ceil_div(m, 8), batch), 256, S,
                   ld, (size_t)step, lse + at_q, (size_t)w.rows_q, m, keys, past, w.before, w.at + at_q, w.H, w.drop);
            gemm<X, X>(gpu, {out + at_q * vd, vd, w.rows_q * vd}, {S, ld, step},
                       {w.v + at_k * vd, vd, w.rows_k * vd}, m, vd, keys, batch);
        }
    }
}

// As in attention_backward. dk and dv of the own chunk are assigned, those of the keys before added to.
template <typename X> static void window_backward(Gpu& gpu, X* dq, X* dk, X* dv, const X* dout, const float* dot,
        const float* lse, const Window<X>& w) {
    int zd = w.zd, vd = w.vd, rows = w.length, before = w.before, ld = ceil_div(before + rows, 8) * 8;
    int64_t step = (int64_t)rows * ld;
    int most = pairs_at_once<X>(w.pairs, step);
    X *S = gpu_scratch<X>(gpu, SCORES, most * step * 2), *dS = S + most * step;
    for (int p = 0; p < w.pairs; p += most) {
        int batch = min_int(most, w.pairs - p);
        auto of_q = [&](auto* x, int d, int row) { return Matrix(x + (p * w.rows_q + row) * d, d, w.rows_q * d); };
        auto of_k = [&](auto* x, int d, int row) { return Matrix(x + (p * w.rows_k + row) * d, d, w.rows_k * d); };
        auto of_scores = [&](X* x, int row, int column) { return Matrix(x + (size_t)row * ld + column, ld, step); };
        for (int i = 0; i < rows; i += QUERY_TILE) {
            int m = min_int(QUERY_TILE, rows - i), keys = before + i + m;
            gemm<X, X>(gpu, of_scores(S, i, 0), of_q(w.q, zd, i), transposed(of_k(w.k, zd, 0)), m, keys, zd, batch);
            gemm<X, X>(gpu, of_scores(dS, i, 0), of_q(dout, vd, i), transposed(of_k(w.v, vd, 0)), m, keys, vd, batch);
        }
        no_keys(gpu, S, ld, step, rows, p, batch, w);
        size_t at = p * w.rows_q;
        LAUNCH(FORM_DROP(softmax_backward_kernel, wide(before, before + rows), w.drop), dim3(ceil_div(rows, 8), batch),
               256, S, dS, ld, (size_t)step, lse + at, dot + at, (size_t)w.rows_q, rows, before, w.at + at, w.H,
               w.drop);
        for (int i = 0; i < rows; i += QUERY_TILE) {
            int m = min_int(QUERY_TILE, rows - i), left = rows - i, keys = before + i + m;
            gemm<X, X>(gpu, of_q(dq, zd, i), of_scores(dS, i, 0), of_k(w.k, zd, 0), m, zd, keys, batch);
            gemm<X, X>(gpu, of_k(dk, zd, before + i), transposed(of_scores(dS, i, before + i)), of_q(w.q, zd, i), m, zd,
                       left, batch);
            gemm<X, X>(gpu, of_k(dv, vd, before + i), transposed(of_scores(S, i, before + i)), of_q(dout, vd, i), m, vd,
                       left, batch);
        }
        if (!before) { continue; }
        Matrix<X> dk_before = of_k(dk, zd, 0), dv_before = of_k(dv, vd, 0);
        gemm<X, X>(gpu, dk_before, transposed(of_scores(dS, 0, 0)), of_q(w.q, zd, 0), before, zd, rows, batch,
                   dk_before.at, zd);
        gemm<X, X>(gpu, dv_before, transposed(of_scores(S, 0, 0)), of_q(dout, vd, 0), before, vd, rows, batch,
                   dv_before.at, vd);
    }
}

// The first chunk of a call and the chunk before it, side by side (B,H,2c,..), where one comes before: keys and values,
// their gradients, and keys of the memory, of the chunk before only (B,H,c,S). In a stream, these are the cache.
template <typename X> struct Border { X *k, *v, *ak, *dk, *dv, *dak; };
template <typename X> static Border<X> border_place(Gpu& gpu, int B, const Config* c) {
    size_t Z = (size_t)B * c->chunk_size * c->z_dim, V = (size_t)B * c->chunk_size * c->value_dim;
    X* at = gpu_scratch<X>(gpu, BORDER, 6 * Z + 4 * V);
    return {at, at + 6 * Z, at + 4 * Z, at + 2 * Z, at + 6 * Z + 2 * V, at + 5 * Z};
}
// Between floats (B,c,H,width), as a state has them, and timesteps first .. first + c - 1 of x (B,H,K,width): to x, or
// from it. With `add` it is added to what is there. With `turn`, angles of one position, pairs of features are turned
// on their way to x, and turned back on their way from it, in the first `turned` heads (0: in all). A thread has two
// features.
template <typename X> __global__ void carry_kernel(float* state, X* x, bool to_x, bool add, const float* turn,
        int turned, int H, int c, int K, int first, int width) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x), pairs = (width + 1) / 2, t = i / pairs, j = i % pairs * 2;
    if (t >= c) { return; }
    bool two = j + 1 < width, turns = turn && !(turned && blockIdx.y % H >= turned);
    float* there = state + (((size_t)blockIdx.y / H * c + t) * H + blockIdx.y % H) * width + j;
    X* here = x + ((size_t)blockIdx.y * K + first + t) * width + j;
    float re = to_x ? there[0] : to_float(here[0]), im = !two ? 0 : to_x ? there[1] : to_float(here[1]);
    float cosine = turns ? turn[j] : 1, sine = !turns ? 0 : to_x ? turn[j + 1] : -turn[j + 1];
    float out[2] = {re * cosine - im * sine, re * sine + im * cosine};
    EACH(k, 2) {
        if (k && !two) { return; }
        if (to_x) { here[k] = from_float<X>((add ? to_float(here[k]) : 0) + out[k]); }
        else { there[k] = (add ? there[k] : 0) + out[k]; }
    }
}
enum { TO_X = 1, ADD = 2 };
template <typename X> static void carry_copy(Gpu& gpu, float* state, X* x, int how, const float* turn, int B, int c,
        int K, int first, int width, const Config* config) {
    int H = config->num_heads;
    LAUNCH(carry_kernel<X>, dim3(ceil_div((size_t)c * ((width + 1) / 2), 256), B * H), 256, state, x, how & TO_X,
           how & ADD, turn, config->num_rope_heads, H, c, K, first, width);
}
// `length` timesteps of `sequences` heads, from one head-major tensor to another.
template <typename X> static void rows_copy(Gpu& gpu, X* to, int K_to, const X* from, int K_from, int length, int width,
        int sequences) {
    size_t bytes = width * sizeof(X);
    CUDA(cudaMemcpy2DAsync(to, K_to * bytes, from, K_from * bytes, length * bytes, sequences, cudaMemcpyDefault,
                           gpu.stream));
}

// out (B,H,T,V/H) and lse (B,H,T) of a whole call in training. border: NULL if nothing comes before; chunks: see
// Window.
template <typename X, typename Visit> static void each_window(Gpu& gpu, const X* q, const X* k, const X* v,
        const Border<X>* border, const float* chunks, int B, int T, const Config* config, Dropout drop, Visit visit) {
    int c = config->chunk_size, H = config->num_heads, zd = config->z_dim / H, vd = config->value_dim / H;
    int full = T / c, first = min_int(c, T);
    Window<X> w = {B * H, first, 0, border ? c : 0, T, border ? 2 * c : T, 0, q, border ? border->k : k,
                   border ? border->v : v, border ? chunks : NULL, H, zd, vd, drop, false};
    visit(w, border != NULL);
    w.before = c; w.chunks = NULL;
    auto others = [&](int from, int count, int length) {
        each_batch(B * H, T, c, from, count, [&](const Batch& batch) {
            w.pairs = batch.size; w.length = length; w.rows_q = w.rows_k = batch.rows; w.at = batch.row;
            w.q = q + batch.row * zd; w.k = k + (batch.row - c) * zd; w.v = v + (batch.row - c) * vd;
            visit(w, false);
        });
    };
    others(1, full - 1, c);
    if (full && T % c) { others(full, 1, T % c); }
}
template <typename X> static void sliding_attention_forward(Gpu& gpu, X* out, float* lse, const X* q, const X* k,
        const X* v, const Border<X>* border, const float* chunks, int B, int T, const Config* config, Dropout drop) {
    each_window(gpu, q, k, v, border, chunks, B, T, config, drop, [&](const Window<X>& w, bool) {
        window_forward(gpu, out + w.at * w.vd, lse + w.at, w);
    });
}
// dq, dk, dv are assigned; with a border, its dk and dv receive the gradients of the chunk before.
template <typename X> static void sliding_attention_backward(Gpu& gpu, X* dq, X* dk, X* dv, const X* dout,
        const float* dot, const float* lse, const X* q, const X* k, const X* v, const Border<X>* border,
        const float* chunks, int B, int T, const Config* config, Dropout drop) {
    int c = config->chunk_size, first = min_int(c, T);
    each_window(gpu, q, k, v, border, chunks, B, T, config, drop, [&](const Window<X>& w, bool at_border) {
        size_t at_k = w.at - (at_border ? 0 : w.before);
        X *dk_to = at_border ? border->dk : dk + at_k * w.zd, *dv_to = at_border ? border->dv : dv + at_k * w.vd;
        if (at_border) {
            CUDA(cudaMemsetAsync(dk_to, 0, w.pairs * w.rows_k * w.zd * sizeof(X), gpu.stream));
            CUDA(cudaMemsetAsync(dv_to, 0, w.pairs * w.rows_k * w.vd * sizeof(X), gpu.stream));
        }
        window_backward(gpu, dq + w.at * w.zd, dk_to, dv_to, dout + w.at * w.vd, dot + w.at, lse + w.at, w);
        if (!at_border) { return; }
        rows_copy(gpu, dk, T, border->dk + c * w.zd, 2 * c, first, w.zd, B * w.H);
        rows_copy(gpu, dv, T, border->dv + c * w.vd, 2 * c, first, w.vd, B * w.H);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Adaptive working memory

// A merge is affine in M. With N = -Fk, G = K^T N (S,S) and Y = K^T v (S,E), where K (c,S) is not transposed as it is
// in the CPU's equations,
//     W = K^T (v - Fk M) = Y + G M            M' = M + rho (W - M)
// G and Y need only keys and values, so they are products over all chunks at once. So are the reads Fq M, when all M
// are known. What goes from chunk to chunk is one small product, G M, and one kernel, which adds rho (W - M) to M in
// fp32. Backward, where D_i = Fq_i^T dO_i is the gradient of M through its reader, for all chunks at once; then from
// the last chunk to the first
//     dW = rho dM'          dM = (1 - rho) dM' + G^T dW + D_i          drho rho = rho sum_e dM' (W - M)
// and with all dW, again for all chunks at once,
//     dv = K dW        dG = dW M^T        dK = v dW^T + N dG^T        dN = K dG        dFq = dO M^T
// What the rows of M have in common makes no difference in dG and dFq: softmaxes take it out again. But it may be much
// larger than the rest. So there M is first reduced by the mean of its rows, in fp32; rounded to bf16 as it is, it would
// lose what matters.
//
// Merge i stands between chunks i and i+1. It makes M_{i+1} of M_i, and absorbs chunk i + 1 - lag (see memory_lag). In
// a call of n chunks, merges first .. last-1 are made: without a past, merge 0 has nothing to absorb where lag is 2;
// and the last one is only made where somebody reads it. Chunk i reads M_i, which is 0 for i < reads.
template <typename X> struct Merges {
    int BH, H, n, S, E, c, lag, first, last, reads;
    X *Fq, *N, *K;       // (B,H,T,S): softmaxes of aq and ak over features, and of ak over the timesteps of a chunk
    X *N0, *K0;          // (B,H,c,S): of the chunk before the call
    X *G, *dG;           // (B,H,n,S,S)
    X *M, *dW;           // (B,H,n,S,E), rounded: M_i, and dW of merge i
    float *Y, *delta, *D; // (B,H,n,S,E): Y; W, then W - M; and D
    float *now, *dnow;   // (B,H,S,E): M and dM, in fp32
    float* dlam;         // (2,B,H,S): of lam at the start; what others of several GPUs tell of that at the end
    float *l, *rho, *drho, *dl; // (B,H,n,S); drho is drho rho
    float* dK;           // (B,H,T,S), then of the chunk before (B,H,c,S)
    X* dF;               // the same: dFq, then dN
};
// Lays these out; returns their size in bytes. backward: also those that only the backward pass needs.
template <typename X> static size_t merges_place(Merges<X>* m, char* memory, const Config* config, size_t B, size_t T,
        bool backward) {
    size_t at = 0, c = config->chunk_size, H = config->num_heads, n = ceil_div(T, c), BH = B * H;
    size_t S = config->z_dim / H, E = config->value_dim / H;
    auto take = [&](auto*& p, size_t count) {
        p = (std::remove_reference_t<decltype(p)>)(memory + at); at += ceil_div(count * sizeof(*p), 256) * 256;
    };
    m->BH = BH; m->H = H; m->n = n; m->S = S; m->E = E; m->c = c; m->lag = memory_lag(config);
    take(m->Fq, BH * T * S); take(m->N, BH * T * S); take(m->K, BH * T * S);
    take(m->N0, BH * c * S); take(m->K0, BH * c * S);
    take(m->G, BH * n * S * S); take(m->M, BH * n * S * E); take(m->Y, BH * n * S * E);
    take(m->delta, BH * n * S * E); take(m->now, BH * S * E);
    take(m->l, BH * n * S); take(m->rho, BH * n * S);
    if (!backward) { return at; }
    take(m->dG, BH * n * S * S); take(m->dW, BH * n * S * E); take(m->D, BH * n * S * E); take(m->dnow, BH * S * E);
    take(m->dlam, 2 * BH * S); take(m->drho, BH * n * S); take(m->dl, BH * n * S);
    take(m->dK, BH * (T + c) * S); take(m->dF, BH * (T + c) * S);
    return at;
}
static size_t gecko_memory(const Config* c, size_t B, size_t T, size_t of_element) {
    Merges<float> m; Merges<bf16> m16;
    size_t groups = B * T * c->norm_num_groups, Z = c->z_dim, V = c->value_dim, chunk = B * c->chunk_size;
    size_t merges = !c->memory ? 0 : of_element == 4 ? merges_place(&m, (char*)0, c, B, T, true)
                                                     : merges_place(&m16, (char*)0, c, B, T, true);
    return 3 * groups * sizeof(float) + (c->chunk_size + T) * Z / c->num_heads * sizeof(float)
           + B * T * Z * of_element + chunk * (6 * Z + 4 * V) * of_element + merges;
}

// F (rows,S) = sign softmax(inp) over each row. A warp has a row.
template <typename X, int EACH_LANE> __global__ void softmax_rows_kernel(X* F, const X* inp, float sign, size_t rows,
        int S) {
    enum { E = EACH_LANE };
    size_t r = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    float x[E], top = -INFINITY, sum = 0;
    if (r >= rows) { return; }
    inp += r * S; F += r * S;
    for (int s = lane * E; s < S; s += 32 * E) { load(x, inp + s); EACH(e, E) { top = fmaxf(top, x[e]); } }
    top = warp_max(top);
    for (int s = lane * E; s < S; s += 32 * E) { load(x, inp + s); EACH(e, E) { sum += exp_of<X>(x[e] - top); } }
    sum = sign / warp_sum(sum);
    for (int s = lane * E; s < S; s += 32 * E) {
        load(x, inp + s);
        EACH(e, E) { x[e] = exp_of<X>(x[e] - top) * sum; }
        store(F + s, x);
    }
}
template <typename X> static void softmax_rows(Gpu& gpu, X* F, const X* inp, float sign, size_t rows, int S) {
    LAUNCH((wide(S) ? softmax_rows_kernel<X, 8> : softmax_rows_kernel<X, 1>), ceil_div(rows, 8), 256, F, inp, sign,
           rows, S);
}
// out (rows,S) = F (dF - sign sum_s F dF) + add, backward of softmax_rows; add may be NULL.
template <typename X, int EACH_LANE> __global__ void softmax_rows_backward_kernel(X* out, const X* F, const X* dF,
        float sign, const float* add, size_t rows, int S) {
    enum { E = EACH_LANE };
    size_t r = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    float f[E], d[E], a[E] = {0}, sum = 0;
    if (r >= rows) { return; }
    for (int s = lane * E; s < S; s += 32 * E) {
        load(f, F + r * S + s); load(d, dF + r * S + s);
        EACH(e, E) { sum += f[e] * d[e]; }
    }
    sum = sign * warp_sum(sum);
    for (int s = lane * E; s < S; s += 32 * E) {
        load(f, F + r * S + s); load(d, dF + r * S + s);
        if (add) { load(a, add + r * S + s); }
        EACH(e, E) { f[e] = f[e] * (d[e] - sum) + a[e]; }
        store(out + r * S + s, f);
    }
}
template <typename X> static void softmax_rows_backward(Gpu& gpu, X* out, const X* F, const X* dF, float sign,
        const float* add, size_t rows, int S) {
    LAUNCH((wide(S) ? softmax_rows_backward_kernel<X, 8> : softmax_rows_backward_kernel<X, 1>), ceil_div(rows, 8), 256,
           out, F, dF, sign, add, rows, S);
}

// Softmax over the c timesteps of a chunk. A CUDA block has 32 features of one chunk of one head (blockIdx.y); a warp
// has every 32nd timestep. Chunk i of sequence p begins at row p * T + i * c of `count` chunks, and l has n for a
// sequence.
struct Columns {
    int s, y, c, S; bool active; size_t at, at_l;
    __device__ Columns(int T, int count, int n, int c, int S) : c(c), S(S) {
        int p = blockIdx.y / count, i = blockIdx.y % count;
        s = blockIdx.x * 32 + threadIdx.x; y = threadIdx.y; active = s < S;
        if (!active) { s = S - 1; }
        at = ((size_t)p * T + (size_t)i * c) * S + s; at_l = ((size_t)p * n + i) * S + s;
    }
    template <typename Visit> __device__ void walk(Visit visit) const {
        for (int t = y; t < c; t += 32) { visit(at + (size_t)t * S); }
    }
    // Over the warps; each thread is told its column's.
    __device__ float all(float v, float (&memory)[32][33], bool max) const {
        __syncthreads(); // what was there has been read
        memory[threadIdx.x][y] = v;
        __syncthreads(); // all have written
        float one = memory[y][threadIdx.x]; // warp y: those of column y
        one = max ? warp_max(one) : warp_sum(one);
        __syncthreads(); // all have been read
        if (threadIdx.x == 0) { memory[0][y] = one; }
        __syncthreads(); // all have written
        return memory[0][threadIdx.x];
    }
};
// K = softmax(ak) over time, l = log of the sums of exp(ak).
template <typename X> __global__ void __launch_bounds__(1024) softmax_columns_kernel(X* K, float* l, const X* ak,
        int T, int count, int n, int c, int S) {
    __shared__ float memory[32][33];
    Columns p(T, count, n, c, S);
    float top = -INFINITY, sum = 0;
    p.walk([&](size_t at) { top = fmaxf(top, to_float(ak[at])); });
    top = p.all(top, memory, true);
    p.walk([&](size_t at) { sum += exp_of<X>(to_float(ak[at]) - top); });
    sum = p.all(sum, memory, false);
    if (!p.active) { return; }
    p.walk([&](size_t at) { K[at] = from_float<X>(exp_of<X>(to_float(ak[at]) - top) / sum); });
    if (p.y == 0) { l[p.at_l] = top + logf(sum); }
}
template <typename X> static void softmax_columns(Gpu& gpu, X* K, float* l, const X* ak, int sequences, int T,
        int count, int n, int c, int S) {
    LAUNCH(softmax_columns_kernel<X>, dim3(ceil_div(S, 32), sequences * count), dim3(32, 32), K, l, ak, T, count, n, c,
           S);
}
// dK becomes K (dK - sum over time of dK K + dl).
template <typename X> __global__ void __launch_bounds__(1024) softmax_columns_backward_kernel(float* dK, const X* K,
        const float* dl, int T, int count, int n, int c, int S) {
    __shared__ float memory[32][33];
    Columns p(T, count, n, c, S);
    float sum = 0;
    p.walk([&](size_t at) { sum += dK[at] * to_float(K[at]); });
    sum = p.all(sum, memory, false) - dl[p.at_l];
    if (p.active) { p.walk([&](size_t at) { dK[at] = to_float(K[at]) * (dK[at] - sum); }); }
}
template <typename X> static void softmax_columns_backward(Gpu& gpu, float* dK, const X* K, const float* dl,
        int sequences, int T, int count, int n, int c, int S) {
    LAUNCH(softmax_columns_backward_kernel<X>, dim3(ceil_div(S, 32), sequences * count), dim3(32, 32), dK, K, dl, T,
           count, n, c, S);
}

// What a memory starts from. chunks, M (B,H,S,E), lam and lam_rest (B,H,S): those of a state; NULL for nothing.
struct Past { const float *chunks, *M, *lam, *lam_rest; };
__device__ inline bool memory_filled(const Past& past, int b, int lag) { return past.chunks && past.chunks[b] >= lag; }

// M before the merge `first`, and rounded. A thread has an element of one head (blockIdx.y).
template <typename X> __global__ void memory_start_kernel(float* now, X* M, float* exact, Past past, int H, int n,
        int first, int lag, int size, bool from_nothing) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, p = blockIdx.y;
    if (i >= size) { return; }
    size_t at = ((size_t)p * n + first) * size + i;
    float v = !from_nothing && memory_filled(past, p / H, lag) ? past.M[(size_t)p * size + i] : 0;
    now[(size_t)p * size + i] = v; M[at] = from_float<X>(v);
    if (exact) { exact[at] = v; }
}
// rho of all merges from l. A thread has one feature of one head and walks through the merges. Where merge 0 finds no
// chunk before, it changes nothing. lam_to, rest_to (B,H,S): lam after the last merge, or NULL.
__global__ void memory_shares_kernel(float* rho, float* lam_to, float* rest_to, const float* l, Past past, int BH,
        int H, int n, int first, int last, int lag, int S, bool from_nothing) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, p = i / S, s = i % S;
    if (p >= BH) { return; }
    bool filled = !from_nothing && memory_filled(past, p / H, lag);
    double lam = filled ? (double)past.lam[i] + past.lam_rest[i] : -INFINITY;
    for (int j = first; j < last; j++) {
        size_t at = ((size_t)p * n + j) * S + s;
        bool absorbs = j > 0 || lag == 1 || past.chunks[p / H] > 0;
        double top = fmax(lam, (double)l[at]), sum = top + log(exp(lam - top) + exp(l[at] - top));
        rho[at] = absorbs ? exp(l[at] - sum) : 0;
        lam = absorbs ? sum : lam;
    }
    if (!lam_to) { return; }
    lam_to[i] = lam;
    rest_to[i] = lam > -INFINITY ? lam - lam_to[i] : 0;
}
// Merge i: delta = W - M, where delta may be W; and M, `now`, moves on. Rounded it is M_{i+1}, if somebody reads that.
template <typename X> __global__ void memory_merge_kernel(float* now, X* M, float* exact, float* delta, const float* W,
        const float* rho, int n, int i, int S, int E) {
    int k = blockIdx.x * blockDim.x + threadIdx.x, size = S * E;
    if (k >= size) { return; }
    size_t p = blockIdx.y, at = p * size + k, merge = p * n + i;
    float d = W[merge * size + k] - now[at], v = now[at] + rho[merge * S + k / E] * d;
    delta[merge * size + k] = d; now[at] = v;
    if (i + 1 < n) { M[(merge + 1) * size + k] = from_float<X>(v); }
    if (i + 1 < n && exact) { exact[(merge + 1) * size + k] = v; }
}
// For the backward pass, M becomes M minus the mean of its rows. A thread has one column of one M.
template <typename X> __global__ void memory_center_kernel(X* M, const float* exact, int S, int E) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= E) { return; }
    size_t at = (size_t)blockIdx.y * S * E + e;
    float sum = 0;
    for (int s = 0; s < S; s++) { sum += exact[at + (size_t)s * E]; }
    for (int s = 0; s < S; s++) { M[at + (size_t)s * E] = from_float<X>(exact[at + (size_t)s * E] - sum / S); }
}
// Merge i backward, without its product: dW = rho dM', drho rho, and in dM (1 - rho) dM' + D. A CUDA block has a row.
// merges: whether there is a merge i; reads: whether chunk i reads.
template <typename X> __global__ void memory_merge_backward_kernel(float* dnow, X* dW, float* drho, const float* delta,
        const float* D, const float* rho, int n, int i, int S, int E, bool merges, bool reads) {
    __shared__ float sums[32];
    int s = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    size_t p = blockIdx.y, at = (p * S + s) * E, merge = p * n + i, at_merge = (merge * S + s) * E;
    float r = merges ? rho[merge * S + s] : 0, sum = 0;
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        float d = dnow[at + e];
        if (merges) { sum += d * delta[at_merge + e]; dW[at_merge + e] = from_float<X>(r * d); }
        dnow[at + e] = (1 - r) * d + (reads ? D[at_merge + e] : 0);
    }
    sum = warp_sum(sum);
    if (lane == 0) { sums[warp] = sum; }
    __syncthreads(); // the sums of all warps are there
    sum = warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0);
    if (merges && threadIdx.x == 0) { drho[merge * S + s] = r * sum; }
}
// From drho rho to dl, through the chain of lam. dlam (B,H,S): of lam at the end, NULL for 0. to (B,H,S): that of lam
// at the start; share: by what factor it depends on that at the end. Both may be NULL.
__global__ void memory_shares_backward_kernel(float* dl, float* to, float* share, const float* dlam, const float* drho,
        const float* rho, int BH, int n, int first, int last, int S) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, p = i / S, s = i % S;
    if (p >= BH) { return; }
    float d = dlam ? dlam[i] : 0, factor = 1;
    for (int j = last - 1; j >= first; j--) {
        size_t at = ((size_t)p * n + j) * S + s;
        float rest = d - drho[at];
        dl[at] = drho[at] + rest * rho[at]; d = rest * (1 - rho[at]);
        factor *= 1 - rho[at];
    }
    if (to) { to[i] = d; }
    if (share) { share[i] = factor; }
}

// Where a merge finds keys and values: those of the call, ak (B,H,T,S) and v (B,H,T,E); and ak0, v0, with rows_ak and
// rows_v timesteps for a sequence, of the chunk that merge 0 absorbs if it is not one of these. NULL for none.
template <typename X> struct Absorbed { const X *ak, *v, *ak0, *v0; int rows_ak, rows_v; };
template <typename X> static int first_own(const Merges<X>& m, const Absorbed<X>& from) {
    return m.first > 0 || !from.ak0 ? m.first : 1; // the first merge that absorbs one of the call's own chunks
}

// N, K, l, G and Y of all merges.
template <typename X> static void memory_prepare(Gpu& gpu, const Merges<X>& m, const Absorbed<X>& from, int T) {
    int BH = m.BH, n = m.n, S = m.S, E = m.E, c = m.c, shift = m.lag - 1, own = first_own(m, from);
    auto affine = [&](const X* N, const X* K, int64_t step, const X* v, int64_t step_v, size_t merge, int64_t merges,
            int batch) {
        gemm<X, X>(gpu, {m.G + merge * S * S, S, merges * S * S}, {K, S, step * S, true}, {N, S, step * S}, S, S, c,
                   batch);
        gemm<X, float>(gpu, {m.Y + merge * S * E, E, merges * S * E}, {K, S, step * S, true}, {v, E, step_v * E}, S, E,
                       c, batch);
    };
    if (from.ak0 && m.last > 0) {
        rows_copy(gpu, m.N0, c, from.ak0, from.rows_ak, c, S, BH); // side by side, like the others
        softmax_columns(gpu, m.K0, m.l, m.N0, BH, c, 1, n, c, S);
        softmax_rows(gpu, m.N0, m.N0, -1, (size_t)BH * c, S);
        affine(m.N0, m.K0, c, from.v0, from.rows_v, 0, n, BH);
    }
    if (own >= m.last) { return; }
    int count = m.last - own;
    size_t begin = (size_t)(own - shift) * c * S;
    softmax_columns(gpu, m.K + begin, m.l + (size_t)own * S, from.ak + begin, BH, T, count, n, c, S);
    softmax_rows(gpu, m.N, from.ak, -1, (size_t)BH * T, S);
    each_batch(BH, T, c, own, count, [&](const Batch& b) {
        size_t row = b.row - (size_t)shift * c;
        affine(m.N + row * S, m.K + row * S, b.rows, from.v + row * E, b.rows, b.chunk, b.chunks, b.size);
    });
}
// rho of all merges. lam_to, rest_to (B,H,S): lam at the end, or NULL.
template <typename X> static void memory_shares(Gpu& gpu, const Merges<X>& m, Past past, float* lam_to, float* rest_to,
        bool from_nothing = false) {
    LAUNCH(memory_shares_kernel, ceil_div(m.BH * m.S, 128), 128, m.rho, lam_to, rest_to, m.l, past, m.BH, m.H, m.n,
           m.first, m.last, m.lag, m.S, from_nothing);
}
// All M_i. With a past M is that at the start; else it is 0. exact (B,H,n,S,E) receives them in fp32, or is NULL.
template <typename X> static void memory_chain(Gpu& gpu, const Merges<X>& m, Past past, float* exact,
        bool from_nothing = false) {
    int BH = m.BH, n = m.n, S = m.S, E = m.E, size = S * E;
    LAUNCH(memory_start_kernel<X>, dim3(ceil_div(size, 256), BH), 256, m.now, m.M, exact, past, m.H, n,
           min_int(m.first, n - 1), m.lag, size, from_nothing);
    for (int i = m.first; i < m.last; i++) {
        bool empty = i == m.first && (!past.chunks || from_nothing); // then M is 0, and W is Y
        if (!empty) {
            gemm<X, float>(gpu, {m.delta + (size_t)i * size, E, (int64_t)n * size},
                           {m.G + (size_t)i * S * S, S, (int64_t)n * S * S},
                           {m.M + (size_t)i * size, E, (int64_t)n * size}, S, E, S, BH, m.Y + (size_t)i * size, E);
        }
        LAUNCH(memory_merge_kernel<X>, dim3(ceil_div(size, 256), BH), 256, m.now, m.M, exact, m.delta,
               empty ? m.Y : m.delta, m.rho, n, i, S, E);
    }
    if (exact) { LAUNCH(memory_center_kernel<X>, dim3(ceil_div(E, 256), BH * n), 256, m.M, exact, S, E); }
}
// Which merges a call makes. to_end: those after its last whole chunk, too.
template <typename X> static Merges<X> merges_of(Gpu& gpu, const Config* config, int B, int T, bool whole, bool past,
        bool to_end, bool backward) {
    Merges<X> m = {};
    size_t bytes = merges_place<X>(&m, NULL, config, B, T, backward);
    merges_place<X>(&m, gpu_scratch<char>(gpu, MERGES, bytes), config, B, T, backward);
    m.first = past ? 0 : m.lag - 1;
    m.last = whole && to_end ? m.n : m.n - 1;
    m.reads = past ? 0 : m.lag;
    return m;
}

// out (B,H,T,E) = what the memory answers to aq (B,H,T,S)
template <typename X> static void memory_read(Gpu& gpu, X* out, Merges<X>& m, const X* aq, int T) {
    int S = m.S, E = m.E, c = m.c, none = min_int(m.reads * c, T), full = T / c;
    if (none) { // the first chunks
        CUDA(cudaMemset2DAsync(out, (size_t)T * E * sizeof(X), 0, (size_t)none * E * sizeof(X), m.BH, gpu.stream));
    }
    if (none == T) { return; }
    softmax_rows(gpu, m.Fq, aq, 1, (size_t)m.BH * T, S);
    auto read = [&](int first, int count, int rows) {
        each_batch(m.BH, T, c, first, count, [&](const Batch& b) {
            gemm<X, X>(gpu, {out + b.row * E, E, b.rows * E}, {m.Fq + b.row * S, S, b.rows * S},
                       {m.M + b.chunk * S * E, E, b.chunks * S * E}, rows, E, S, b.size);
        });
    };
    read(m.reads, full - m.reads, c);
    if (T % c && full >= m.reads) { read(full, 1, T % c); }
}

// Backward of memory_read, from dO (B,H,T,E): D, and daq (B,H,T,S).
template <typename X> static void memory_read_backward(Gpu& gpu, X* daq, const Merges<X>& m, const X* aq, const X* dO,
        int T) {
    int BH = m.BH, S = m.S, E = m.E, c = m.c, size = S * E, full = T / c;
    size_t rows = (size_t)BH * T;
    if (m.reads) { CUDA(cudaMemsetAsync(m.dF, 0, rows * S * sizeof(X), gpu.stream)); } // of the first chunks
    auto read = [&](int first, int count, int rows) {
        each_batch(BH, T, c, first, count, [&](const Batch& b) {
            gemm<X, float>(gpu, {m.D + b.chunk * size, E, b.chunks * size}, {m.Fq + b.row * S, S, b.rows * S, true},
                           {dO + b.row * E, E, b.rows * E}, S, E, rows, b.size);
            gemm<X, X>(gpu, {m.dF + b.row * S, S, b.rows * S}, {dO + b.row * E, E, b.rows * E},
                       {m.M + b.chunk * size, E, b.chunks * size, true}, rows, S, E, b.size);
        });
    };
    softmax_rows(gpu, m.Fq, aq, 1, rows, S);
    read(m.reads, full - m.reads, c);
    if (T % c && full >= m.reads) { read(full, 1, T % c); }
    softmax_rows_backward(gpu, daq, m.Fq, m.dF, 1, NULL, rows, S);
}
// dW and drho of all merges. dnow, the gradient of the memory at the end, becomes that of the memory at the start.
template <typename X> static void memory_chain_backward(Gpu& gpu, const Merges<X>& m) {
    int n = m.n, S = m.S, E = m.E, size = S * E;
    for (int i = n - 1; i >= m.first; i--) {
        bool merges = i < m.last, reads = i >= m.reads;
        LAUNCH(memory_merge_backward_kernel<X>, dim3(S, m.BH), 256, m.dnow, m.dW, m.drho, m.delta, m.D, m.rho, n, i, S,
               E, merges, reads);
        if (!merges || (i == m.first && m.reads)) { continue; } // before the first merge M is 0, without a gradient
        gemm<X, float>(gpu, {m.dnow, E, size}, {m.G + (size_t)i * S * S, S, (int64_t)n * S * S, true},
                       {m.dW + (size_t)i * size, E, (int64_t)n * size}, S, E, S, m.BH, m.dnow, E);
    }
}
// See memory_shares_backward_kernel.
template <typename X> static void memory_shares_backward(Gpu& gpu, const Merges<X>& m, float* to, float* share,
        const float* dlam) {
    LAUNCH(memory_shares_backward_kernel, ceil_div(m.BH * m.S, 128), 128, m.dl, to, share, dlam, m.drho, m.rho, m.BH,
           m.n, m.first, m.last, m.S);
}
// Backward of memory_prepare, from dW and dl: dak (B,H,T,S) is assigned, dv (B,H,T,E) is added to. dak0 (B,H,c,S) and
// dv0 (from.rows_v timesteps for a sequence): of the chunk that merge 0 absorbs; dak0 is assigned, dv0 added to.
template <typename X> static void memory_prepare_backward(Gpu& gpu, X* dak, X* dv, X* dak0, X* dv0, const Merges<X>& m,
        const Absorbed<X>& from, int T) {
    int BH = m.BH, n = m.n, S = m.S, E = m.E, c = m.c, size = S * E, shift = m.lag - 1, own = first_own(m, from);
    CUDA(cudaMemsetAsync(dak, 0, (size_t)BH * T * S * sizeof(X), gpu.stream));
    if (dak0) { CUDA(cudaMemsetAsync(dak0, 0, (size_t)BH * c * S * sizeof(X), gpu.stream)); }
    if (m.first >= m.last) { return; }
    each_batch(BH, n * c, c, m.first, m.last - m.first, [&](const Batch& b) {
        gemm<X, X>(gpu, {m.dG + b.chunk * S * S, S, b.chunks * S * S}, {m.dW + b.chunk * size, E, b.chunks * size},
                   {m.M + b.chunk * size, E, b.chunks * size, true}, S, S, E, b.size);
    });
    // Of a batch of merges, whose keys lie `step` timesteps apart, and values step_v.
    auto absorbed = [&](const X* N, const X* K, float* dK, X* dN, int64_t step, const X* v, X* dv, int64_t step_v,
            size_t merge, int64_t merges, int batch) {
        Matrix<const X> dW(m.dW + merge * size, E, merges * size), dG(m.dG + merge * S * S, S, merges * S * S);
        gemm<X, X>(gpu, {dv, E, step_v * E}, {K, S, step * S}, dW, c, E, S, batch, dv, E);
        gemm<X, float>(gpu, {dK, S, step * S}, {v, E, step_v * E}, transposed(dW), c, S, E, batch);
        gemm<X, float>(gpu, {dK, S, step * S}, {N, S, step * S}, transposed(dG), c, S, S, batch, dK, S);
        gemm<X, X>(gpu, {dN, S, step * S}, {K, S, step * S}, dG, c, S, S, batch);
    };
    if (own < m.last) {
        int count = m.last - own;
        size_t begin = (size_t)(own - shift) * c;
        each_batch(BH, T, c, own, count, [&](const Batch& b) {
            size_t row = b.row - (size_t)shift * c;
            absorbed(m.N + row * S, m.K + row * S, m.dK + row * S, m.dF + row * S, b.rows, from.v + row * E,
                     dv + row * E, b.rows, b.chunk, b.chunks, b.size);
        });
        softmax_columns_backward(gpu, m.dK + begin * S, m.K + begin * S, m.dl + (size_t)own * S, BH, T, count, n, c, S);
        for (int p = 0; p < BH; p++) {
            size_t row = ((size_t)p * T + begin) * S;
            softmax_rows_backward(gpu, dak + row, m.N + row, m.dF + row, -1, m.dK + row, (size_t)count * c, S);
        }
    }
    if (own == m.first || !dak0) { return; }
    float* dK0 = m.dK + (size_t)BH * T * S; X* dN0 = m.dF + (size_t)BH * T * S;
    absorbed(m.N0, m.K0, dK0, dN0, c, from.v0, dv0, from.rows_v, 0, n, BH);
    softmax_columns_backward(gpu, dK0, m.K0, m.dl, BH, c, 1, n, c, S);
    softmax_rows_backward(gpu, dak0, m.N0, dN0, -1, dK0, (size_t)BH * c, S);
}

// Adds the gradients of the memory before the call, where there was one: dnow to dM (B,H,S,E), own to dlam (B,H,S). A
// thread has one element of dM.
__global__ void memory_dstart_kernel(float* dM, float* dlam, const float* dnow, const float* own, Past past, int H,
        int lag, int S, int E) {
    int i = blockIdx.x * blockDim.x + threadIdx.x, p = blockIdx.y;
    if (i >= S * E || !memory_filled(past, p / H, lag)) { return; }
    dM[(size_t)p * S * E + i] += dnow[(size_t)p * S * E + i];
    if (i < S) { dlam[p * S + i] += own[p * S + i]; }
}

// ---------------------------------------------------------------------------------------------------------------------
// The block

// Several GPUs; see the last section.
template <typename X> static void slice_chunks_start(Gpu& gpu, const StateOf<X>& past, const StateOf<X>& next, int B,
        int n, const Config* config);
template <typename X> static void slice_chunks_end(Gpu& gpu, const ActsOf<X>& da, const Border<X>* border,
        const float* angles, int B, int T, const Config* config);
template <typename X> static void slice_memory_start(Gpu& gpu, const Merges<X>& m, const StateOf<X>& past);
template <typename X> static float* slice_memory_end(Gpu& gpu, const Merges<X>& m);

// The gate with the memory's answer, a row kernel like gate_forward_kernel: out = dropout(silu(inp) attention +
// memory).
template <typename X, bool WIDE, bool DROP> __global__ void answer_forward_kernel(X* out, int ldo, const X* attention,
        const X* memory, const X* inp, int ldi, unsigned rows, int T, int vd, Dropout drop) {
    RowPiece<X, WIDE> next_x, next_o, next_m;
    auto fetch = [&](unsigned r) {
        size_t at = head_major(r, T, T, 0, vd);
        next_x.load(inp + (size_t)r * ldi + blockIdx.y * vd, r < rows ? vd : 0);
        next_o.load(attention + at, r < rows ? vd : 0); next_m.load(memory + at, r < rows ? vd : 0);
    };
    for (unsigned r = row_first(fetch); r < rows; r += row_step()) {
        float x[8], o[8], m[8];
        next_x.get(x); next_o.get(o); next_m.get(m); fetch(r + row_step());
        EACH(e, 8) { x[e] = x[e] * sigmoid_of<X>(x[e]) * o[e] + m[e]; }
        drop_row<WIDE, DROP>(x, drop, r, blockIdx.y * vd);
        store_row<WIDE>(out + (size_t)r * ldo + blockIdx.y * vd, x, vd);
    }
}
template <typename X> static void answer_forward(Gpu& gpu, X* gated, int ldg, const X* attention, const X* memory,
        const X* inp, int ldi, int B, int T, int V, int H, Dropout drop) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 8);
    LAUNCH(FORM_DROP(answer_forward_kernel, wide(V / H, ldg, ldi), drop), r.grid, r.block, gated, ldg, attention,
           memory, inp, ldi, B * T, T, V / H, drop);
}
// The other part of its backward pass, beside gate_backward: dmemory (B,H,T,V/H) = dropout(dgated), rows ldg apart.
template <typename X, bool WIDE, bool DROP> __global__ void answer_backward_kernel(X* dmemory, const X* dgated, int ldg,
        unsigned rows, int T, int vd, Dropout drop) {
    RowPiece<X, WIDE> next;
    auto fetch = [&](unsigned r) { next.load(dgated + (size_t)r * ldg + blockIdx.y * vd, r < rows ? vd : 0); };
    for (unsigned r = row_first(fetch); r < rows; r += row_step()) {
        float d[8];
        next.get(d); fetch(r + row_step());
        drop_row<WIDE, DROP>(d, drop, r, blockIdx.y * vd);
        store_row<WIDE>(dmemory + head_major(r, T, T, 0, vd), d, vd);
    }
}
template <typename X> static void answer_backward(Gpu& gpu, X* dmemory, const X* dgated, int ldg, int B, int T, int V,
        int H, Dropout drop) {
    RowGrid r = row_grid(gpu, (size_t)B * T, V / H, H, 8);
    LAUNCH(FORM_DROP(answer_backward_kernel, wide(V / H, ldg), drop), r.grid, r.block, dmemory, dgated, ldg, B * T, T,
           V / H, drop);
}

// A thread has one sequence.
__global__ void chunks_kernel(float* chunks, const float* before, int whole, int B) {
    int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b < B) { chunks[b] = (before ? before[b] : 0) + whole; }
}

// What the passes share: where a call's keys and values are. In training, K = T and they are activations. In a stream
// they are the cache, K timesteps for a sequence, of which the call's own begin at at_k.
#define OF_GECKO(m, s, l, start, end) \
    OF_LAYER(m, s, l); \
    StateOf<X> past = state_layer(start, config, l), next = state_layer(end, config, l); \
    bool streams = next.k; \
    int pos = (start) ? (start)->pos : 0, own = config->sliding ? c : 0; \
    int K = streams ? own + c : T, at_k = streams ? own + pos : 0, S = Z / H, E = V / H; \
    const float* angles = angles_of(gpu, config, streams ? c : T); \
    Past of_memory = {past.chunks, past.memory, past.lam, past.lam_rest}; \
    Border<X> at_border, *border = NULL

// The chunk before a call in training, and its first chunk.
template <typename X> static Border<X> border_of(Gpu& gpu, const StateOf<X>& past, const ActsOf<X>& a, int B, int T,
        const Config* config) {
    Border<X> border = border_place<X>(gpu, B, config);
    int c = config->chunk_size, H = config->num_heads, S = config->z_dim / H, E = config->value_dim / H;
    int first = min_int(c, T);
    carry_copy(gpu, past.k_before, border.k, TO_X, NULL, B, c, 2 * c, 0, S, config);
    carry_copy(gpu, past.v_before, border.v, TO_X, NULL, B, c, 2 * c, 0, E, config);
    if (config->memory) { carry_copy(gpu, past.ak_before, border.ak, TO_X, NULL, B, c, c, 0, S, config); }
    rows_copy(gpu, border.k + (size_t)c * S, 2 * c, a.k, T, first, S, B * H);
    rows_copy(gpu, border.v + (size_t)c * E, 2 * c, a.v, T, first, E, B * H);
    return border;
}

template <typename X> static void gecko_block_forward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* start, const StateOf<X>* end) {
    OF_GECKO(m, s, l, start, end);
    bool sliced = s->before.h && next.h; // several GPUs, else skip its lines; not where the backward pass runs this

    // 1, 2: n = timestep_decay_norm(x), e = cema(n), m = rms_norm(e)
    gecko_norm_forward(gpu, sliced, B, T, a.timenorm, a.timenorm_mean, a.timenorm_rstd, next.norm, past.norm, x,
                       w.timenorm_w, w.timenorm_b, config);
    CemaParams cema = cema_either(gpu, &w, config, NULL);
    if (sliced) { slice_cema_begin(gpu, a.timenorm, false, cema, B, T, D, N); }
    X *k = streams ? next.k : a.k, *v = streams ? next.v : a.v, *ak = streams ? next.ak : a.ak;
    matmul_forward<X>(gpu, a.wv, V, a.timenorm, D, w.wv, w.wv_b, NULL, 0, rows, D, V);
    value_forward(gpu, v, a.wv, B, T, K, at_k, V, H);
    if (sliced) { slice_cema_start(gpu, past.h, B, T, D, N); }
    cema_forward(gpu, a.cema, next.h, s->carries + l * s->carries_step, past.h, a.timenorm, cema, B, T, D, N);
    norm_forward<X>(gpu, a.rmsnorm, pitch_m, NULL, a.rmsnorm_rstd, a.cema, w.rmsnorm_w, NULL, rows, D, eps,
                    sites.rmsnorm);

    // 3: q, k with angles; aq, ak without
    matmul_forward<X>(gpu, a.wz, pitch_z, a.rmsnorm, pitch_m, w.wz, w.wz_b, NULL, 0, rows, D, pitch_z);
    qk_forward<X>(gpu, a.q, k, a.znorm, a.znorm_rstd, a.wz, pitch_z, w.gamma, w.beta, angles, B, T, K, c + pos, at_k,
                  INT_MAX, Z, H, eps);
    heads_unturn(gpu, a.q, angles, B, T, T, 0, c + pos, config, false);
    heads_unturn(gpu, k, angles, B, T, K, at_k, c + pos, config, false);
    if (config->memory) {
        qk_forward<X>(gpu, a.aq, ak, NULL, NULL, a.wz, pitch_z, w.gamma + 2 * Z, w.beta + 2 * Z, angles, B, T, K, 0,
                      at_k, 1, Z, H, eps);
    }

    // The chunk before: for this call, and for the next one
    if (streams && pos == 0 && config->sliding) { // a new chunk: the last one is now the one before
        carry_copy(gpu, past.k_before, k, TO_X, NULL, B, c, K, 0, S, config);
        carry_copy(gpu, past.v_before, v, TO_X, NULL, B, c, K, 0, E, config);
        if (config->memory) { carry_copy(gpu, past.ak_before, ak, TO_X, NULL, B, c, K, 0, S, config); }
    }
    int whole = (pos + T) / c, last = streams ? own : (whole - 1) * c; // whole chunks; where the last one begins
    if (next.chunks && whole && config->sliding) {
        const float* turn = angles + (size_t)(streams ? c : whole * c) * S; // of this chunk's first position
        carry_copy(gpu, next.k_before, k, 0, turn, B, c, K, last, S, config);
        carry_copy(gpu, next.v_before, v, 0, NULL, B, c, K, last, E, config);
        if (config->memory) { carry_copy(gpu, next.ak_before, ak, 0, NULL, B, c, K, last, S, config); }
    }
    if (sliced) { slice_chunks_start(gpu, past, next, B, whole, config); }

    // 4, 5: attention over two chunks, and the memory of what is older
    if (!config->sliding) {
        attention_forward(gpu, a.attention, a.attention_lse, a.q, k, v, B, T, K, at_k, c, H, Z, V, sites.keys);
    } else if (streams) {
        window_forward(gpu, a.attention, a.attention_lse, {B * H, T, pos, c, T, K, 0, a.q, k, v, past.chunks, H, S, E,
                                                           sites.keys, true});
    } else {
        if (past.chunks) { at_border = border_of(gpu, past, a, B, T, config); border = &at_border; }
        sliding_attention_forward(gpu, a.attention, a.attention_lse, a.q, k, v, border, past.chunks, B, T, config,
                                  sites.keys);
    }
    if (config->memory) {
        Merges<X> merges = merges_of<X>(gpu, config, B, T, (pos + T) % c == 0, past.chunks, next.chunks, false);
        Absorbed<X> from = {ak, v, streams ? ak : border ? border->ak : NULL, streams ? v : border ? border->v : NULL,
                            streams ? K : c, streams ? K : 2 * c};
        memory_prepare(gpu, merges, from, T);
        if (sliced) { slice_memory_start(gpu, merges, past); }
        memory_shares(gpu, merges, of_memory, next.lam, next.lam_rest);
        memory_chain(gpu, merges, of_memory, (float*)NULL);
        if (next.memory) {
            CUDA(cudaMemcpyAsync(next.memory, merges.now, (size_t)B * Z * E * sizeof(float), cudaMemcpyDefault,
                                 gpu.stream));
        }
        memory_read(gpu, a.memory, merges, a.aq, T);
    }
    if (next.chunks) { LAUNCH(chunks_kernel, ceil_div(B, 128), 128, next.chunks, past.chunks, whole, B); }

    // The gate, for attention alone, and the first hop
    if (config->memory) {
        answer_forward(gpu, a.gated, pitch_m, a.attention, a.memory, a.wr, pitch_z, B, T, V, H, sites.gated);
    } else { gate_forward(gpu, a.gated, pitch_m, a.attention, a.wr, pitch_z, B, T, V, H, sites.gated); }
    matmul_forward<X>(gpu, a.mega, D, a.rmsnorm, pitch_m, w.wh1, w.wh1_b, sites.mega.drop ? NULL : x, D, rows, pitch_m,
                      D);
    dropout<X>(gpu, a.mega, NULL, a.mega, x, sites.mega, rows, D);

    // 6: the feed-forward layer's output is added to y
    const X* base = config->two_hop_residual ? x : a.mega;
    norm_forward<X>(gpu, a.norm, D, a.norm_mean, a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D, eps);
    matmul_forward<X>(gpu, a.fc1, pitch_f, a.norm, D, w.fc1, NULL, NULL, 0, rows, D, pitch_f);
    silu_forward(gpu, a.hidden, a.fc1, a.fc3, pitch_f, rows, F, sites.hidden);
    const X* add = config->rescale_nffn ? NULL : base;
    X* ffn = config->rescale_nffn ? a.fc2 : a.out;
    matmul_forward<X>(gpu, ffn, D, a.hidden, F, w.fc2, NULL, sites.fc2.drop ? NULL : add, D, rows, F, D);
    dropout<X>(gpu, ffn, NULL, ffn, add, sites.fc2, rows, D);
    if (config->rescale_nffn) { ffn_rescale(gpu, a.out, NULL, a.fc2, base, w.rescale, rows, D); }
}

template <typename X> static void gecko_block_backward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s, int l,
        const StateOf<X>* start, const StateOf<X>* dstart) {
    OF_GECKO(m, s, l, start, (const StateOf<X>*)NULL);
    X* dx = block_input<X>(s->dplaces, s->grads, l); Params dw = gradients_layer(m, l);
    ActsOf<X> da = acts_layer<X>(s->dplaces, s->grads, l);
    StateOf<X> dpast = state_layer(dstart, config, l), after = state_layer(&s->after, config, l);
    bool sliced = s->before.h, again = s->keep == KEEP_CHEAPLY, one_hop = !config->two_hop_residual;
    X *hidden = again ? a.hidden : NULL, *norm = again ? a.norm : NULL;
    X *gated = again && !config->memory ? a.gated : NULL, *rmsnorm = again ? a.rmsnorm : NULL;

    // Feed-forward
    const X* dfc2 = config->rescale_nffn ? da.fc2 : da.out;
    if (config->rescale_nffn) { ffn_rescale(gpu, da.fc2, dw.rescale, da.out, a.fc2, w.rescale, rows, D); }
    dfc2 = dropout<X>(gpu, da.timenorm, NULL, dfc2, NULL, sites.fc2, rows, D);
    matmul_backward(gpu, da.hidden, F, dfc2, D, w.fc2, rows, F, D, false);
    silu_backward(gpu, da.fc1, da.fc3, hidden, da.hidden, a.fc1, a.fc3, pitch_f, rows, F, sites.hidden);
    matmul_backward_weight(gpu, dw.fc2, dfc2, D, a.hidden, F, rows, F, D);
    matmul_backward(gpu, da.norm, D, da.fc1, pitch_f, w.fc1, rows, D, pitch_f, false);
    norm_backward<X>(gpu, da.mega, dw.norm_w, dw.norm_b, sites.mega.drop || one_hop ? NULL : dw.wh1_b, norm, da.norm, D,
                     a.norm_mean, a.norm_rstd, a.mega, w.norm_w, w.norm_b, rows, D);
    matmul_backward_weight(gpu, dw.fc1, da.fc1, pitch_f, a.norm, D, rows, D, pitch_f);
    if (one_hop) { // y's second reader; dropout_kernel drops nothing here
        RowGrid r = row_grid(gpu, rows, D, 1, 4, sites.mega.drop ? 0 : D);
        LAUNCH(FORM(dropout_kernel, wide(D)), r.grid, r.block, da.mega, r.partials, da.out, da.mega, rows, D,
               no_dropout);
        if (r.partials) { reduce_columns(gpu, r.partials, r.blocks, {{dw.wh1_b}, 1, D}); }
    }

    // The gate
    const X* dmega = dropout<X>(gpu, da.timenorm, dw.wh1_b, da.mega, NULL, sites.mega, rows, D);
    matmul_backward(gpu, da.rmsnorm, pitch_m, dmega, D, w.wh1, rows, pitch_m, D, false);
    float* dot = da.attention_lse;
    gate_backward(gpu, da.attention, da.wr, dw.wr_b, dot, gated, da.gated, pitch_m, a.attention, a.wr, pitch_z, B, T, V,
                  H, sites.gated);
    if (config->memory) { answer_backward(gpu, da.memory, da.gated, pitch_m, B, T, V, H, sites.gated); }
    if (again) {
        qk_forward<X>(gpu, a.q, a.k, NULL, NULL, a.wz, pitch_z, w.gamma, w.beta, angles, B, T, T, c, 0, INT_MAX, Z, H,
                      eps);
        heads_unturn(gpu, a.q, angles, B, T, T, 0, c, config, false);
        heads_unturn(gpu, a.k, angles, B, T, T, 0, c, config, false);
        value_forward(gpu, a.v, a.wv, B, T, T, 0, V, H);
        timestepnorm_again(gpu, a.timenorm, a.timenorm_mean, a.timenorm_rstd, x, w.timenorm_w, w.timenorm_b, rows, D,
                           G);
        if (config->memory) {
            answer_forward(gpu, a.gated, pitch_m, a.attention, a.memory, a.wr, pitch_z, B, T, V, H, sites.gated);
        }
    }

    // Attention and the memory. What comes before the call has a gradient where somebody asks for it.
    if (config->sliding && past.chunks) { at_border = border_of(gpu, past, a, B, T, config); border = &at_border; }
    if (config->sliding) {
        sliding_attention_backward(gpu, da.q, da.k, da.v, da.attention, dot, a.attention_lse, a.q, a.k, a.v, border,
                                   past.chunks, B, T, config, sites.keys);
    } else {
        attention_backward(gpu, da.q, da.k, da.v, da.attention, dot, a.attention_lse, a.q, a.k, a.v, B, T, c, H, Z, V,
                           sites.keys);
    }
    if (config->memory) {
        Merges<X> merges = merges_of<X>(gpu, config, B, T, T % c == 0, past.chunks, sliced, true);
        Absorbed<X> from = {a.ak, a.v, border ? border->ak : NULL, border ? border->v : NULL, c, 2 * c};
        float* dlam_end = NULL;
        if (merges.reads < merges.n) {
            memory_prepare(gpu, merges, from, T);
            memory_shares(gpu, merges, of_memory, (float*)NULL, (float*)NULL);
            memory_chain(gpu, merges, of_memory, merges.D);
            memory_read_backward(gpu, da.aq, merges, a.aq, da.memory, T);
            CUDA(cudaMemsetAsync(merges.dnow, 0, (size_t)B * Z * E * sizeof(float), gpu.stream));
            if (sliced) { dlam_end = slice_memory_end(gpu, merges); } else { memory_chain_backward(gpu, merges); }
            memory_shares_backward(gpu, merges, merges.dlam, (float*)NULL, dlam_end);
        } else { CUDA(cudaMemsetAsync(da.aq, 0, rows * Z * sizeof(X), gpu.stream)); } // nobody reads
        memory_prepare_backward(gpu, da.ak, da.v, border ? border->dak : NULL, border ? border->dv : NULL, merges, from,
                                T);
        if (dpast.memory) {
            LAUNCH(memory_dstart_kernel, dim3(ceil_div(S * E, 256), B * H), 256, dpast.memory, dpast.lam, merges.dnow,
                   merges.dlam, of_memory, H, merges.lag, S, E);
        }
    }
    if (border && dpast.chunks && ranks.slice == 0) {
        carry_copy(gpu, dpast.k_before, border->dk, ADD, NULL, B, c, 2 * c, 0, S, config);
        carry_copy(gpu, dpast.v_before, border->dv, ADD, NULL, B, c, 2 * c, 0, E, config);
        if (config->memory) { carry_copy(gpu, dpast.ak_before, border->dak, ADD, NULL, B, c, c, 0, S, config); }
    }
    if (sliced) { slice_chunks_end(gpu, da, border, angles, B, T, config); }

    // Queries and keys
    heads_unturn(gpu, da.q, angles, B, T, T, 0, c, config, true);
    heads_unturn(gpu, da.k, angles, B, T, T, 0, c, config, true);
    qk_backward(gpu, da.wz, dw.gamma, dw.beta, dw.wz_b, da.znorm, da.q, da.k, a.wz, pitch_z, w.gamma,
                angles + (size_t)c * S, B, T, INT_MAX, Z, H, eps);
    if (config->memory) { // the same for aq and ak, beside; the gradient of the bias is added
        bool accumulate = gpu.accumulate;
        X* dz = gpu_scratch<X>(gpu, AFFINE_GRADIENTS, rows * (pitch_z + Z)), *dznorm = dz + rows * pitch_z;
        if (!accumulate) {
            CUDA(cudaMemsetAsync(dw.gamma + 2 * Z, 0, 2 * Z * sizeof(float), gpu.stream));
            CUDA(cudaMemsetAsync(dw.beta + 2 * Z, 0, 2 * Z * sizeof(float), gpu.stream));
        }
        gpu.accumulate = true;
        qk_backward(gpu, dz, dw.gamma + 2 * Z, dw.beta + 2 * Z, dw.wz_b, da.znorm ? dznorm : NULL, da.aq, da.ak, a.wz,
                    pitch_z, w.gamma + 2 * Z, angles, B, T, 1, Z, H, eps);
        gpu.accumulate = accumulate;
        add_rows(gpu, da.wz, pitch_z, dz, pitch_z, rows, Z);
        if (da.znorm) { add_rows(gpu, da.znorm, Z, dznorm, Z, rows, Z); }
    }
    matmul_backward(gpu, da.rmsnorm, pitch_m, da.wz, pitch_z, w.wz, rows, D, pitch_z, true);

    // RMS norm, CEMA, values
    norm_backward<X>(gpu, da.cema, dw.rmsnorm_w, NULL, NULL, rmsnorm, da.rmsnorm, pitch_m, NULL, a.rmsnorm_rstd, a.cema,
                     w.rmsnorm_w, NULL, rows, D, sites.rmsnorm);
    CemaParams dcema = cema_params(&dw), cema = cema_either(gpu, &w, config, &dcema);
    if (sliced) { slice_cema_begin(gpu, da.cema, true, cema, B, T, D, N); }
    matmul_backward_weight(gpu, dw.wh1, dmega, D, a.rmsnorm, pitch_m, rows, pitch_m, D);
    matmul_backward_weight(gpu, dw.wz, da.wz, pitch_z, a.rmsnorm, pitch_m, rows, D, pitch_z);
    value_backward(gpu, da.wv, dw.wv_b, da.v, a.wv, B, T, V, H);
    const float* a_end = sliced ? slice_cema_a_end(gpu, B, T, D, N) : NULL;
    cema_backward(gpu, da.timenorm, dcema, dpast.h, da.cema, s->carries + l * s->carries_step, past.h, after.h, a_end,
                  a.timenorm, cema, B, T, D, N);
    if (!config->cema_omega) {
        LAUNCH(cema_gamma_kernel, ceil_div(2 * D * N, 256), 256, dw.cema_gamma, dcema.gamma, gpu.accumulate, D, N);
    }
    matmul_backward(gpu, da.timenorm, D, da.wv, V, w.wv, rows, D, V, true);

    // x has two readers, or three with two hops
    matmul_backward_weight(gpu, dw.wv, da.wv, V, a.timenorm, D, rows, D, V);
    gecko_norm_backward(gpu, sliced, B, T, dx, dw.timenorm_w, dw.timenorm_b, dpast.norm, one_hop ? NULL : da.out,
                        da.mega, da.timenorm, a.timenorm_mean, a.timenorm_rstd, past.norm, x, w.timenorm_w, config);
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

template <typename X> static void gecko_final_norm_forward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s,
        const StateOf<X>* start, const StateOf<X>* end) {
    OF_LAYER(m, s, 0);
    gecko_norm_forward(gpu, (bool)s->before.h, B, T, a.final, a.final_mean, a.final_rstd,
                       state_layer(end, config, L).norm, state_layer(start, config, L).norm,
                       block_input<X>(s->places, s->acts, L), w.final_w, w.final_b, config);
}
template <typename X> static void gecko_final_norm_backward(Gpu& gpu, const ModelOf<X>* m, const PassOf<X>* s,
        const StateOf<X>* start, const StateOf<X>* dstart) {
    OF_LAYER(m, s, 0);
    Params dw = gradients_layer(m, 0); ActsOf<X> da = acts_layer<X>(s->dplaces, s->grads, 0);
    gecko_norm_backward<X>(gpu, s->before.h, B, T, block_input<X>(s->dplaces, s->grads, L), dw.final_w, dw.final_b,
                           state_layer(dstart, config, L).norm, NULL, NULL, da.final, a.final_mean, a.final_rstd,
                           state_layer(start, config, L).norm, block_input<X>(s->places, s->acts, L), w.final_w,
                           config);
}

// One token more of each stream, as in a longer call. (Megalodon has kernels of its own for this.) tokens NULL: those
// that model_draw has left on the device.
template <typename X> static void gecko_model_step(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* tokens,
        StateOf<X>* state) {
    OF_LAYER(m, s, 0);
    if (tokens) {
        CUDA(cudaEventSynchronize(s->copied));
        memcpy(s->host, tokens, rows * sizeof(int));
        pass_upload(gpu, s, s->tokens, rows);
    }
    for (int part = 0; part < m->parts; part++) { part_wait(gpu, m, part); }
    embedding_forward(gpu, a.embed, s->tokens, w.embed, embedding_scale(config), rows, D, sites.embed);
    for (int l = 0; l < L; l++) { gecko_block_forward<X>(gpu, m, s, l, state, state); }
    gecko_final_norm_forward<X>(gpu, m, s, state, state);
    matmul_forward<X>(gpu, a.logits, vocab, a.final, D, config->share_emb ? w.embed : w.output, NULL, NULL, 0, rows, D,
                      vocab);
    state->pos = (state->pos + 1) % c;
}

// ---------------------------------------------------------------------------------------------------------------------
// Several GPUs: what slices of a sequence exchange (--chunk-parallel), see the last section of gecko.c. All of it goes
// in the stream of the kernels, which wait for it.

// Norm. all (slices,lines): what each slice makes of nothing. Forward, state becomes what comes before this slice, from
// what comes before the first one. Backward, it is assigned the gradients U, W that come from the slices after it.
template <bool BACK> __global__ void decay_slices_kernel(NormState* state, const NormState* all, int slice, int slices,
        int lines, double decay1, double decay2, int T) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= lines) { return; }
    NormState s = BACK ? NormState{0, 0, 0} : state[i];
    for (int r = BACK ? slices - 1 : 0; BACK ? r > slice : r < slice; r += BACK ? -1 : 1) {
        const NormState& one = all[(size_t)r * lines + i];
        s = {s.count + T, decay1 * s.mean + one.mean, decay2 * s.var + one.var};
    }
    state[i] = s;
}
template <bool BACK> static const NormState* slice_decay(Gpu& gpu, NormState* before, float* first, float* second,
        const float* rstd, const NormState* start, int B, int T, const Config* config) {
    int lines = B * config->norm_num_groups;
    NormState* all = gpu_scratch<NormState>(gpu, SLICE_NORMS, (size_t)lines * (ranks.slices + 1));
    NormState *mine = all + (size_t)lines * ranks.slices, *state = BACK ? mine : before;
    CUDA(cudaMemsetAsync(mine, 0, lines * sizeof(NormState), gpu.stream));
    decay_scan<BACK>(gpu, first, second, rstd, mine, BACK ? start : NULL, NULL, B, T, config, false);
    slices_gather(gpu, all, mine, lines * sizeof(NormState));
    LAUNCH(decay_slices_kernel<BACK>, ceil_div(lines, 128), 128, state, all, ranks.slice, ranks.slices, lines,
           pow(config->timenorm_beta1, T), pow(config->timenorm_beta2, T), T);
    return state;
}

// n floats to the slice after this one (forward) or before it, and from the other side. Where there is no slice,
// nothing.
static void slice_pass_on(Gpu& gpu, float* received, const float* sent, size_t n, bool forward) {
    int to = ranks.slice + (forward ? 1 : -1), from = ranks.slice - (forward ? 1 : -1);
    NCCL(ncclGroupStart());
    if (to >= 0 && to < ranks.slices) { NCCL(ncclSend(sent, n, ncclFloat, to, gpu.group, gpu.stream)); }
    if (from >= 0 && from < ranks.slices) { NCCL(ncclRecv(received, n, ncclFloat, from, gpu.group, gpu.stream)); }
    NCCL(ncclGroupEnd());
}
// The last chunk of the slice before becomes the chunk before this one, in past. n: chunks of a slice.
template <typename X> static void slice_chunks_start(Gpu& gpu, const StateOf<X>& past, const StateOf<X>& next, int B,
        int n, const Config* config) {
    size_t chunk = (size_t)B * config->chunk_size;
    if (config->sliding) {
        slice_pass_on(gpu, past.k_before, next.k_before, chunk * config->z_dim, true);
        slice_pass_on(gpu, past.v_before, next.v_before, chunk * config->value_dim, true);
        if (config->memory) { slice_pass_on(gpu, past.ak_before, next.ak_before, chunk * config->z_dim, true); }
    }
    LAUNCH(chunks_kernel, ceil_div(B, 128), 128, past.chunks, past.chunks, ranks.slice * n, B);
}
// The gradient of the chunk before goes back to the slice that it came from, where it is added to that of the last
// chunk.
template <typename X> static void slice_chunks_end(Gpu& gpu, const ActsOf<X>& da, const Border<X>* border,
        const float* angles, int B, int T, const Config* config) {
    int c = config->chunk_size, S = config->z_dim / config->num_heads, E = config->value_dim / config->num_heads;
    if (!config->sliding) { return; }
    size_t Z = (size_t)B * c * config->z_dim, V = (size_t)B * c * config->value_dim;
    float* sent = gpu_scratch<float>(gpu, SLICE_CHUNKS, 2 * (2 * Z + V)), *received = sent + 2 * Z + V;
    bool has_next = ranks.slice + 1 < ranks.slices;
    carry_copy(gpu, sent, border->dk, 0, NULL, B, c, 2 * c, 0, S, config);
    carry_copy(gpu, sent + Z, border->dv, 0, NULL, B, c, 2 * c, 0, E, config);
    if (config->memory) { carry_copy(gpu, sent + Z + V, border->dak, 0, NULL, B, c, c, 0, S, config); }
    slice_pass_on(gpu, received, sent, (config->memory ? 2 * Z : Z) + V, false);
    if (!has_next) { return; }
    carry_copy(gpu, received, da.k, TO_X | ADD, angles + (size_t)T * S, B, c, T, T - c, S, config);
    carry_copy(gpu, received + Z, da.v, TO_X | ADD, NULL, B, c, T, T - c, E, config);
    if (config->memory) { carry_copy(gpu, received + Z + V, da.ak, TO_X | ADD, NULL, B, c, T, T - c, S, config); }
}

// lam before this slice, from lam before the first one and what each slice makes of nothing: all (slices,2,B,H,S), two
// floats each. own: chunks of a slice.
__global__ void lam_slices_kernel(float* lam, float* rest, const float* all, const float* chunks, int slice, int own,
        int lag, int Z, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) { return; }
    double sum = chunks[i / Z] - slice * own >= lag ? (double)lam[i] + rest[i] : -INFINITY;
    for (int r = 0; r < slice; r++) {
        const float* one = all + (size_t)r * 2 * size + i;
        double other = (double)one[0] + one[size], top = fmax(sum, other);
        if (top > -INFINITY) { sum = top + log(exp(sum - top) + exp(other - top)); }
    }
    lam[i] = sum;
    rest[i] = sum > -INFINITY ? sum - lam[i] : 0;
}
// M (B,H,S,E) before the first slice: 0 where there is none.
__global__ void memory_clear_kernel(float* M, const float* chunks, int slice, int own, int lag, int H, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size && chunks[blockIdx.y / H] - slice * own < lag) { M[(size_t)blockIdx.y * size + i] = 0; }
}
// A (B,H,S,S) of a slice, step by step: the identity, then A' = A + rho (W - A), W = G A; rounded too.
template <typename X> __global__ void memory_factor_kernel(float* A, X* rounded, const float* W, const float* rho,
        int n, int i, int S) {
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= S * S) { return; }
    size_t p = blockIdx.y, at = p * S * S + k;
    float v = W ? A[at] + rho[(p * n + i) * S + k / S] * (W[at] - A[at]) : k / S == k % S;
    A[at] = v; rounded[at] = from_float<X>(v);
}
template <typename X> static void memory_factor(Gpu& gpu, float* A, X* rounded, float* W, const Merges<X>& m) {
    int S = m.S;
    dim3 grid(ceil_div(S * S, 256), m.BH);
    LAUNCH(memory_factor_kernel<X>, grid, 256, A, rounded, (const float*)NULL, m.rho, m.n, 0, S);
    for (int i = m.first; i < m.last; i++) {
        gemm<X, float>(gpu, {W, S, S * S}, {m.G + (size_t)i * S * S, S, (int64_t)m.n * S * S}, {rounded, S, S * S}, S,
                       S, S, m.BH);
        LAUNCH(memory_factor_kernel<X>, grid, 256, A, rounded, W, m.rho, m.n, i, S);
    }
}
// What each slice tells: C or dM (B,H,S,E), A (B,H,S,S), and two arrays (B,H,S).
template <typename X> struct SliceMemory {
    size_t M, A, lam, each; float *all, *mine; X* rounded; float* W;
};
template <typename X> static SliceMemory<X> slice_memory_place(Gpu& gpu, const Merges<X>& m) {
    size_t M = (size_t)m.BH * m.S * m.E, A = (size_t)m.BH * m.S * m.S, lam = (size_t)m.BH * m.S, each = M + A + 2 * lam;
    float* all = gpu_scratch<float>(gpu, SLICES, each * (ranks.slices + 1) + 2 * A);
    float* mine = all + each * ranks.slices, *W = mine + each;
    return {M, A, lam, each, all, mine, (X*)(W + A), W};
}

// M and lam before this slice, in past, from those before the first one.
template <typename X> static void slice_memory_start(Gpu& gpu, const Merges<X>& m, const StateOf<X>& past) {
    SliceMemory<X> t = slice_memory_place(gpu, m);
    Past before = {past.chunks, past.memory, past.lam, past.lam_rest};
    memory_shares(gpu, m, before, t.mine, t.mine + t.lam, true);
    slices_gather(gpu, t.all, t.mine, 2 * t.lam * sizeof(float));
    LAUNCH(lam_slices_kernel, ceil_div(t.lam, 128), 128, past.lam, past.lam_rest, t.all, past.chunks, ranks.slice, m.n,
           m.lag, m.H * m.S, (int)t.lam);
    memory_shares(gpu, m, before, (float*)NULL, (float*)NULL);
    memory_chain(gpu, m, before, (float*)NULL, true);
    CUDA(cudaMemcpyAsync(t.mine, m.now, t.M * sizeof(float), cudaMemcpyDefault, gpu.stream));
    memory_factor(gpu, t.mine + t.M, t.rounded, t.W, m);
    slices_gather(gpu, t.all, t.mine, t.each * sizeof(float));
    LAUNCH(memory_clear_kernel, dim3(ceil_div(m.S * m.E, 256), m.BH), 256, past.memory, past.chunks, ranks.slice, m.n,
           m.lag, m.H, m.S * m.E);
    for (int r = 0; r < ranks.slice; r++) { // M = A M + C
        const float* C = t.all + r * t.each;
        gemm<float, float>(gpu, {m.now, m.E, m.S * m.E}, {C + t.M, m.S, m.S * m.S}, {past.memory, m.E, m.S * m.E}, m.S,
                           m.E, m.S, m.BH, C, m.E);
        CUDA(cudaMemcpyAsync(past.memory, m.now, t.M * sizeof(float), cudaMemcpyDefault, gpu.stream));
    }
}

// dlam at the end of this slice, from those of the slices after it: all (slices,2,B,H,S) has the factor of each and its
// own.
__global__ void dlam_slices_kernel(float* dlam, const float* all, int slice, int slices, int size) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) { return; }
    float d = 0;
    for (int r = slices - 1; r > slice; r--) {
        const float* one = all + (size_t)r * 2 * size + i;
        d = one[0] * d + one[size];
    }
    dlam[i] = d;
}
// memory_chain_backward of slices. Returns dlam (B,H,S) at the end of this slice.
template <typename X> static float* slice_memory_end(Gpu& gpu, const Merges<X>& m) {
    SliceMemory<X> t = slice_memory_place(gpu, m);
    float *share = t.mine + t.M + t.A, *dlam_end = m.dlam + t.lam;
    memory_chain_backward(gpu, m); // from 0: what this slice tells
    CUDA(cudaMemcpyAsync(t.mine, m.dnow, t.M * sizeof(float), cudaMemcpyDefault, gpu.stream));
    memory_factor(gpu, t.mine + t.M, t.rounded, t.W, m);
    slices_gather(gpu, t.all, t.mine, t.each * sizeof(float));
    CUDA(cudaMemsetAsync(m.dnow, 0, t.M * sizeof(float), gpu.stream));
    float *d = m.dnow, *other = t.mine;
    for (int r = ranks.slices - 1; r > ranks.slice; r--) { // dM = A^T dM + its own
        const float* own = t.all + r * t.each;
        gemm<float, float>(gpu, {other, m.E, m.S * m.E}, {own + t.M, m.S, m.S * m.S, true}, {d, m.E, m.S * m.E}, m.S,
                           m.E, m.S, m.BH, own, m.E);
        CUDA(cudaMemcpyAsync(d, other, t.M * sizeof(float), cudaMemcpyDefault, gpu.stream));
    }
    memory_chain_backward(gpu, m); // now drho is right, and so is what this slice tells of lam
    memory_shares_backward(gpu, m, share + t.lam, share, (const float*)NULL);
    slices_gather(gpu, t.all, share, 2 * t.lam * sizeof(float));
    LAUNCH(dlam_slices_kernel, ceil_div(t.lam, 128), 128, dlam_end, t.all, ranks.slice, ranks.slices, (int)t.lam);
    return dlam_end;
}
