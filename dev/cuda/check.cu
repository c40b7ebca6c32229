/*
Compares train_megalodon.cu with train_megalodon.c in one process: every activation, gradient and new weight of small
models of awkward shapes; and times it. How to look into the GPU's memory is test_megalodon.c's.

    check             models of random shapes, GPU against CPU, in fp32 and bf16; --quick: of one, and single layers
    check --bench     tokens/s of models; --kernels: times of the main kernels; --decode: of one token more
*/
#ifndef GPU
#define GPU
#endif
#define main test_main
#include "../../test_megalodon.c"
#undef main
#include <algorithm>
#include <cuda_profiler_api.h>
#include <vector>

static bool profile;
static const bool other = strcmp(ARCHITECTURE, "megalodon"); // built with -DPROGRAM: dev/gecko/gecko.cu

// c, whose fields after rescale_nffn, which Megalodon does not have, become the defaults.
static Config filled(Config c) {
    size_t from = offsetof(Config, rescale_nffn) + sizeof(c.rescale_nffn);
    memcpy((char*)&c + from, (const char*)&default_options.model + from, sizeof(c) - from);
    return c;
}

// Prints errors above the bound. kind: max|a-b| / max|b| (over at least floor), or 1 - cosine.
static void compare(const char* name, const float* got, const float* expected, size_t n, double floor, double bound,
        bool cosine) {
    double worst = -1, largest = floor, ab = 0, aa = 0, bb = 0;
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        double e = fabs((double)got[i] - expected[i]);
        if (fabs(expected[i]) > largest) { largest = fabs(expected[i]); }
        if (!(e <= worst) && !isnan(worst)) { worst = e; at = i; }
        ab += (double)got[i] * expected[i];
        aa += (double)got[i] * got[i];
        bb += (double)expected[i] * expected[i];
    }
    double error = cosine ? (aa == bb && aa == 0 ? 0 : 1 - ab / sqrt(aa * bb)) : worst / (largest > 0 ? largest : 1);
    if (cosine && sqrt(bb / (n ? n : 1)) < floor) { error = 0; } // rounding only
    num_checked++;
    num_failed += !(error <= bound);
    if (!(error <= bound)) {
        printf("FAILED %-40s %s %.2e (bound %.0e) at %zu of %zu: %.7g, expected %.7g\n", name,
               cosine ? "1-cos" : "error", error, bound, at, n, got[at], expected[at]);
    }
}

static void compare_acts(const char* what, const Config* c, const Spec* specs, Acts got, Acts expected, double floor,
        double bound, bool cosine) {
    const char* fields[] = {
#define ACT_NAME(field, ...) #field,
        ACTIVATIONS(ACT_NAME)
    };
    char name[160];
    for (int i = 0; i < NUM_ACTS; i++) {
        if (other && (i == A_q || i == A_k)) { continue; } // turned by other angles
        for (int l = 0; specs[i].size && l < specs[i].slots; l++) {
            snprintf(name, sizeof(name), "%s %s %d", what, fields[i], l);
            compare(name, ((float**)&got)[i] + l * specs[i].size, ((float**)&expected)[i] + l * specs[i].size,
                    specs[i].size, floor, bound, cosine);
        }
    }
}
static void compare_params(const char* what, const Model* m, Params got, Params expected, double floor, double bound,
        bool cosine) {
    char name[160], full[128];
    for (int i = 0; i < NUM_PARAMS; i++) {
        const Spec* s = &m->specs[i];
        for (int l = 0; s->size && l < s->slots; l++) {
            snprintf(name, sizeof(name), "%s %s", what, layer_name(full, "", s->name, l));
            compare(name, ((float**)&got)[i] + l * s->size, ((float**)&expected)[i] + l * s->size, s->size, floor,
                    bound, cosine);
        }
    }
}
static const Masks no_masks = {{0, 0, 0}, 0, 0}, some_masks = {{0.2, 0.1, 0.3}, 1, 1234567};
static double largest(const float* x, size_t n) {
    double m = 0;
    for (size_t i = 0; i < n; i++) { m = fabs(x[i]) > m ? fabs(x[i]) : m; }
    return m;
}
static float round_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    u = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
    memcpy(&x, &u, 4);
    return x;
}

template <typename X> static void check_model(Gpu& gpu, const char* what, Config c, int B, int T, bool past,
        Masks masks = no_masks) {
    const bool fp32 = std::is_same<X, float>::value;
    c = filled(c);
    double act_bound = fp32 ? 1e-5 : 3e-2, grad_bound = fp32 ? 2e-5 : 2e-3;
    int failed = num_failed, checked = num_checked;
    Model m, got;
    Pass s, copy;
    State start, dstart, gdstart;
    size_t rows = (size_t)B * T, scored = 0, gscored = 0, bytes;
    model_alloc(&m, &c, true);
    model_alloc(&got, &c, true);
    model_init(&m, 7);
    bytes = m.num_parameters * sizeof(float);
    for (size_t i = 0; i < m.num_parameters; i++) { // so that norms and biases take part; bf16 sees the same weights
        m.params.embed[i] += 0.1 * random_normal(11, 0, i, INFINITY);
        if (!fp32) { m.params.embed[i] = round_bf16(m.params.embed[i]); }
    }
    pass_alloc(&s, &c, B, T, KEEP_ALL, KEEP_ALL);
    pass_alloc(&copy, &c, B, T, KEEP_ALL, KEEP_ALL);
    s.masks = masks;
    bool drops = masks.rates[0] > 0;
    state_alloc(&start, &c, B, false);
    state_alloc(&dstart, &c, B, false);
    state_alloc(&gdstart, &c, B, false);
    Spec arrays[NUM_ARRAYS];
    int named = state_specs(arrays, &c, B);
    size_t norms = (size_t)(c.num_layers + 1) * B * c.norm_num_groups, hs = c.num_layers * arrays[0].size;
    for (size_t i = 0; i < norms; i++) {
        start.norm[i].count = 5;
        start.norm[i].mean = 0.3 * random_normal(12, 0, i, INFINITY);
        start.norm[i].var = 1 + 0.5 * random_uniform(12, 1, i);
    }
    for (int k = 0; k < named; k++) {
        for (size_t i = 0; i < arrays[k].size * c.num_layers; i++) {
            float v = 0.3 * random_normal(12, 2 + k, i, INFINITY);
            (&start.h)[k][i] = strstr(arrays[k].name, "chunks") ? i % 4 : v; // some have no past yet
        }
    }
    int *x = (int*)xcalloc(rows, sizeof(int)), *y = (int*)xcalloc(rows, sizeof(int));
    for (size_t i = 0; i < rows; i++) {
        x[i] = random_bits(13, 0, i) % c.vocab_size;
        y[i] = i % 7 == 3 ? IGNORE : (int)(random_bits(13, 1, i) % c.vocab_size);
    }
    const State* p = past ? &start : NULL;
    model_forward(&m, &s, x, p, NULL);
    double loss = model_loss(&m, &s, y, &scored);

    ModelOf<X> gm;
    PassOf<X> gp, plain;
    StateOf<X> gs, gd;
    model_alloc(gpu, &gm, &c, true);
    model_copy(&gm, gm.params, m.params, false);
    model_round(gpu, &gm, gm.params, 0, gm.size);
    pass_alloc(gpu, &gp, &c, B, T, KEEP_ALL, KEEP_ALL);
    gp.masks = masks;
    CUDA(cudaMemset(gp.acts, 0xff, gp.acts_size)); // NaN
    CUDA(cudaMemset(gp.grads, 0xff, gp.grads_size));
    for (size_t i = 0; i < m.num_parameters; i++) { got.params.embed[i] = NAN; }
    model_copy(&gm, gm.grads, got.params, false);
    state_alloc(gpu, &gs, &c, B, false);
    state_alloc(gpu, &gd, &c, B, false);
    state_copy(gpu, &gs, &start, false);
    const StateOf<X>* gpast = past ? &gs : NULL;
    float dloss = 1.0 / scored;
    model_forward<X>(gpu, &gm, &gp, x, gpast, NULL);
    float gloss = model_loss(gpu, &gm, &gp, y, &gscored) / gscored, closs = loss / scored;
    pass_copy(gpu, &gp, &c, copy.acts, copy.specs, false);
    compare_acts("act", &c, s.specs, copy.acts, s.acts, 0, act_bound, false);
    compare("loss", &gloss, &closs, 1, 0, fp32 ? 1e-6 : 2e-3, false);

    // Streaming, in pieces and one by one.
    float *one_shot = (float*)xcalloc(rows * c.vocab_size, sizeof(float));
    memcpy(one_shot, s.acts.logits, rows * c.vocab_size * sizeof(float));
    for (int piece = 1; piece <= T && T <= 400 && !drops; piece = piece == 1 && T > 1 ? T : T + 1) {
        PassOf<X> pass;
        StateOf<X> state;
        pass_alloc(gpu, &pass, &c, B, c.chunk_size, KEEP_NONE, KEEP_NONE);
        state_alloc(gpu, &state, &c, B, true);
        if (past) { state_copy(gpu, &state, &start, false); }
        int* tokens = (int*)xcalloc(rows, sizeof(int));
        float *logits = (float*)xcalloc(rows * c.vocab_size, sizeof(float)),
                *part = (float*)xcalloc(rows * c.vocab_size, sizeof(float));
        for (int t = 0; t < T; t += pass.T) {
            int n = min_int(min_int(piece, T - t), c.chunk_size - state.pos);
            for (int b = 0; b < B; b++) { memcpy(tokens + b * n, x + (size_t)b * T + t, n * sizeof(int)); }
            pass.T = n;
            model_forward(gpu, &gm, &pass, tokens, &state, &state);
            pass_fetch(gpu, &pass, &c, A_logits, 0, false, part);
            for (int b = 0; b < B; b++) {
                memcpy(logits + ((size_t)b * T + t) * c.vocab_size, part + (size_t)b * n * c.vocab_size,
                       sizeof(float) * n * c.vocab_size);
            }
        }
        compare(piece == 1 ? "logits, token by token" : "logits, in pieces", logits, one_shot, rows * c.vocab_size, 0,
                act_bound, false);
        pass_free(gpu, &pass);
        state_free(gpu, &state);
        free(tokens);
        free(logits);
        free(part);
    }

    // Backward, then the same as training does it (little kept), and with blocks recomputed.
    model_backward(&m, &s, x, y, dloss, p, &dstart);
    gpu.accumulate = false;
    model_loss(gpu, &gm, &gp, y, &gscored, dloss);
    model_backward<X>(gpu, &gm, &gp, x, gpast, &gd);
    Acts none = copy.grads;
    for (int i = 0; i < NUM_ACTS; i++) { // rows that the GPU has no gradient of
        if (!gp.dplaces[i].pitch || i == A_attention_lse) { s.dspecs[i].size = 0; }
    }
    pass_copy(gpu, &gp, &c, copy.grads, s.dspecs, true);
    double floor = 0;
    for (int i = 0; i < NUM_ACTS; i++) {
        double v = largest(((float**)&s.grads)[i], s.dspecs[i].size * s.dspecs[i].slots);
        floor = v > floor ? v : floor;
    }
    (void)none;
    compare_acts("dact", &c, s.dspecs, copy.grads, s.grads, 1e-4 * floor, grad_bound, !fp32);
    double grad_floor = (fp32 ? 1e-4 : 1e-3) * largest(m.grads.embed, m.num_parameters);
    model_copy(&gm, gm.grads, got.params, true);
    compare_params("grad", &m, got.params, m.grads, grad_floor, grad_bound, !fp32);
    if (past) {
        state_copy(gpu, &gd, &gdstart, true);
        float *a = (float*)xcalloc(2 * norms, sizeof(float)), *b = (float*)xcalloc(2 * norms, sizeof(float));
        for (size_t i = 0; i < norms; i++) {
            a[2 * i] = gdstart.norm[i].mean; a[2 * i + 1] = gdstart.norm[i].var;
            b[2 * i] = dstart.norm[i].mean; b[2 * i + 1] = dstart.norm[i].var;
        }
        compare("dstate norm", a, b, 2 * norms, 0, grad_bound, !fp32);
        for (int k = 0; k < named; k++) {
            compare(text_of("dstate %s", arrays[k].name), (&gdstart.h)[k], (&dstart.h)[k],
                    arrays[k].size * c.num_layers, 0, grad_bound, !fp32);
        }
    }
    for (int keep = KEEP_BLOCKS; keep <= KEEP_CHEAPLY; keep += KEEP_CHEAPLY - KEEP_BLOCKS) {
        pass_alloc(gpu, &plain, &c, B, T, keep, KEEP_NONE);
        plain.masks = masks;
        CUDA(cudaMemset(plain.acts, 0xff, plain.acts_size));
        CUDA(cudaMemset(plain.grads, 0xff, plain.grads_size));
        float* again = (float*)xcalloc(m.num_parameters, sizeof(float));
        Params at;
        specs_place(&at, again, m.specs, NUM_PARAMS);
        for (size_t i = 0; i < m.num_parameters; i++) { again[i] = NAN; }
        model_copy(&gm, gm.grads, at, false);
        model_forward<X>(gpu, &gm, &plain, x, gpast, NULL);
        model_loss(gpu, &gm, &plain, y, &gscored, dloss);
        model_backward<X>(gpu, &gm, &plain, x, gpast, NULL);
        model_copy(&gm, gm.grads, at, true);
        compare(keep == KEEP_BLOCKS ? "grad, recomputed" : "grad, kept cheaply", again, got.params.embed,
                m.num_parameters, 0, fp32 ? 1e-6 : 1e-4, false);
        if (keep == KEEP_CHEAPLY) { // twice with accumulation, and the same bits again
            gpu.accumulate = true;
            model_forward<X>(gpu, &gm, &plain, x, gpast, NULL);
            model_loss(gpu, &gm, &plain, y, &gscored, dloss);
            model_backward<X>(gpu, &gm, &plain, x, gpast, NULL);
            Model twice;
            model_alloc(&twice, &c, false);
            model_copy(&gm, gm.grads, twice.params, true);
            for (size_t i = 0; i < m.num_parameters; i++) { again[i] *= 2; }
            compare("grad, added", twice.params.embed, again, m.num_parameters, 0, 1e-6, false);
            gpu.accumulate = false;
            model_forward<X>(gpu, &gm, &plain, x, gpast, NULL);
            model_loss(gpu, &gm, &plain, y, &gscored, dloss);
            model_backward<X>(gpu, &gm, &plain, x, gpast, NULL);
            model_copy(&gm, gm.grads, twice.params, true);
            for (size_t i = 0; i < m.num_parameters; i++) { again[i] /= 2; }
            compare("grad, same bits", twice.params.embed, again, m.num_parameters, 0, 0, false);
            model_free(&twice);
        }
        free(again);
        pass_free(gpu, &plain);
    }

    // The optimizer, from the CPU's gradients.
    Options o = default_options;
    o.model = c;
    model_copy(&gm, gm.grads, m.grads, false);
    float norm = model_grad_norm(gpu, &gm), cnorm = model_grad_norm(&m);
    compare("gradient norm", &norm, &cnorm, 1, 0, 1e-6, false);
    for (int step = 1; step <= 2; step++) {
        AdamW adamw = adamw_of(&o, 1e-3);
        model_update(gpu, &gm, &adamw, step, 0.7);
        model_update(&m, &adamw, step, 0.7);
    }
    model_copy(&gm, gm.params, got.params, true);
    compare("updated", got.params.embed, m.params.embed, m.num_parameters, 0, 1e-6, false);
    memset(got.params.embed, 0, bytes);
    printf("%s, %s, (B,T) = (%d,%d)%s%s: %d checked, %d failed\n", what, fp32 ? "fp32" : "bf16", B, T,
           past ? ", past" : "", drops ? ", dropout" : "", num_checked - checked, num_failed - failed);
    fflush(stdout);
    model_free(gpu, &gm);
    pass_free(gpu, &gp);
    state_free(gpu, &gs);
    state_free(gpu, &gd);
    model_free(&m);
    model_free(&got);
    pass_free(&s);
    pass_free(&copy);
    state_free(&start);
    state_free(&dstart);
    state_free(&gdstart);
    free(one_shot);
    free(x);
    free(y);
}

template <typename X> static X from_host(float x);
template <> float from_host<float>(float x) { return x; }
template <> bf16 from_host<bf16>(float x) { return __float2bfloat16_rn(x); }
static float to_host(float x) { return x; }
static float to_host(bf16 x) { return __bfloat162float(x); }

// CEMA alone, at sizes of its tensor-core form. Of outputs, what rounding them to bf16 does not explain must be small.
// slices: in so many, one after the other, as ranks would; then B is 1.
template <typename X> static void check_cema(Gpu& gpu, int B, int T, int D, int N, bool past, int slices = 1) {
    const bool fp32 = std::is_same<X, float>::value;
    int failed = num_failed, checked = num_checked;
    size_t n = (size_t)B * T * D, oscillators = (size_t)D * N, states = (size_t)B * oscillators * 2;
    auto randoms = [](size_t n, uint64_t seed, float mean, float scale) {
        float* v = (float*)xcalloc(n, sizeof(float));
        for (size_t i = 0; i < n; i++) { v[i] = mean + scale * random_normal(21, seed, i, INFINITY); }
        return v;
    };
    auto to_gpu = [&](const float* v, size_t n) {
        float* p = (float*)gpu_alloc(&gpu, n * sizeof(float));
        CUDA(cudaMemcpy(p, v, n * sizeof(float), cudaMemcpyHostToDevice));
        return p;
    };
    auto values = [&](float* v) { // as X; v becomes what they are
        X *raw = (X*)xcalloc(n, sizeof(X)), *p = (X*)gpu_alloc(&gpu, n * sizeof(X));
        for (size_t i = 0; i < n; i++) { raw[i] = from_host<X>(v[i]); v[i] = to_host(raw[i]); }
        CUDA(cudaMemcpy(p, raw, n * sizeof(X), cudaMemcpyHostToDevice));
        free(raw);
        return p;
    };
    auto fetch = [](const auto* p, size_t n) {
        auto* raw = (std::remove_const_t<std::remove_pointer_t<decltype(p)>>*)xcalloc(n, sizeof(*p));
        float* v = (float*)xcalloc(n, sizeof(float));
        CUDA(cudaMemcpy(raw, p, n * sizeof(*p), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < n; i++) { v[i] = to_host(raw[i]); }
        free(raw);
        return v;
    };
    // slow decay is what is hard: p sigmoid(delta) is anything from 1e-4 to 0.9
    const size_t sizes[] = {oscillators, oscillators, (size_t)D, 2 * oscillators, (size_t)D};
    const float means[] = {0, -3, 0, 0, 0};
    float *w[5], *gw[5], *dw[5], *gdw[5];
    for (int i = 0; i < 5; i++) {
        w[i] = randoms(sizes[i], i, means[i], i == 1 ? 2 : 1);
        gw[i] = to_gpu(w[i], sizes[i]);
        dw[i] = randoms(sizes[i], 0, 0, 0);
        gdw[i] = to_gpu(w[i], sizes[i]); // to be overwritten
    }
    float *x = randoms(n, 5, 0, 1), *dy = randoms(n, 6, 0, 1), *y = randoms(n, 0, 0, 0), *dx = randoms(n, 0, 0, 0);
    float *start = past ? randoms(states, 7, 0, 0.3) : NULL, *end = randoms(states, 0, 0, 0),
            *dstart = randoms(states, 0, 0, 0);
    X *gx = values(x), *gdy = values(dy), *gy = values(y), *gdx = values(dx);
    float *gstart = past ? to_gpu(start, states) : NULL, *gend = to_gpu(dstart, states),
            *gdstart = to_gpu(dstart, states);
    CemaParams gparams = {gw[0], gw[1], gw[2], gw[3], gw[4]};
    int L = T / slices;
    size_t carries_size = cema_carries_size(B, L, D), step = (size_t)L * D;
    float* carries = (float*)gpu_alloc(&gpu, sizeof(float) * slices * carries_size);
    float* before = (float*)gpu_alloc(&gpu, sizeof(float) * slices * states); // states around the slices
    float* after = (float*)gpu_alloc(&gpu, sizeof(float) * slices * states);
    float* ends = (float*)gpu_alloc(&gpu, sizeof(float) * slices * states);
    auto exchange = [&](const X* given, bool descending) { // what each slice alone makes of zero, to all
        for (int r = 0; r < slices; r++) {
            ranks.slice = r;
            slice_cema_begin(gpu, given + r * step, descending, gparams, B, L, D, N);
            CUDA(cudaMemcpyAsync(ends + r * states, (float*)gpu.scratch[SLICES] + slices * states,
                                 states * sizeof(float), cudaMemcpyDefault, gpu.stream));
        }
        CUDA(cudaMemcpyAsync(gpu.scratch[SLICES], ends, slices * states * sizeof(float), cudaMemcpyDefault,
                             gpu.stream));
    };
    CUDA(cudaMemset(gy, 0xff, n * sizeof(X)));
    CUDA(cudaMemset(gdx, 0xff, n * sizeof(X)));
    gpu.accumulate = false;
    CemaParams params = {w[0], w[1], w[2], w[3], w[4]}, dparams = {dw[0], dw[1], dw[2], dw[3], dw[4]};
    cema_forward(y, end, start, x, params, B, T, D, N);
    cema_backward(dx, dparams, dstart, dy, start, NULL, NULL, x, params, B, T, D, N);
    ranks.slices = slices;
    gpu.slice_stream = gpu.stream;
    if (slices > 1) { exchange(gx, false); }
    for (int r = 0; r < slices; r++) {
        ranks.slice = r;
        float *h = slices > 1 ? before + r * states : gstart, *last = slices > 1 ? after + r * states : gend;
        if (slices > 1) {
            if (past) { CUDA(cudaMemcpyAsync(h, gstart, states * sizeof(float), cudaMemcpyDefault, gpu.stream)); }
            else { CUDA(cudaMemsetAsync(h, 0, states * sizeof(float), gpu.stream)); }
            slice_cema_start(gpu, h, B, L, D, N);
        }
        cema_forward<X>(gpu, gy + r * step, last, carries + r * carries_size, h, gx + r * step, gparams, B, L, D, N);
    }
    if (slices > 1) {
        CUDA(cudaMemcpyAsync(gend, after + (slices - 1) * states, states * sizeof(float), cudaMemcpyDefault,
                             gpu.stream));
        exchange(gdy, true);
    }
    for (int r = 0; r < slices; r++) {
        ranks.slice = r;
        gpu.accumulate = r > 0;
        const float* a_end = slices > 1 ? slice_cema_a_end(gpu, B, L, D, N) : NULL;
        cema_backward<X>(gpu, gdx + r * step, {gdw[0], gdw[1], gdw[2], gdw[3], gdw[4]}, past && r == 0 ? gdstart : NULL,
                         gdy + r * step, carries + r * carries_size, slices > 1 ? before + r * states : gstart,
                         after + r * states, a_end, gx + r * step, gparams, B, L, D, N);
    }
    ranks.slices = 1; ranks.slice = 0;
    gpu.accumulate = false;
    auto judge = [&](const char* name, float* got, float* expected, size_t n, bool rounded, double bound) {
        for (size_t i = 0; rounded && i < n; i++) { // to at most half a unit in the last of 8 bits
            float slack = fabsf(expected[i]) / 256, e = got[i] - expected[i];
            got[i] = expected[i] + (fabsf(e) <= slack ? 0 : e - copysignf(slack, e));
        }
        compare(name, got, expected, n, 0, bound, false);
        free(got);
        free(expected);
    };
    const char* names[] = {"cema dalpha", "cema ddelta", "cema dtheta", "cema dgamma", "cema domega"};
    judge("cema", fetch(gy, n), y, n, !fp32, fp32 ? 1e-5 : 1e-4);
    judge("cema end", fetch(gend, states), end, states, false, fp32 ? 1e-5 : 1e-4);
    judge("cema dx", fetch(gdx, n), dx, n, !fp32, fp32 ? 2e-5 : 1e-4);
    for (int i = 0; i < 5; i++) {
        judge(names[i], fetch(gdw[i], sizes[i]), dw[i], sizes[i], false, fp32 ? 2e-5 : 1e-4);
        cudaFree(gw[i]);
        cudaFree(gdw[i]);
        free(w[i]);
    }
    if (past) { judge("cema dstart", fetch(gdstart, states), dstart, states, false, fp32 ? 2e-5 : 1e-4); }
    else { free(dstart); }
    printf("cema, %s, (B,T,D,N) = (%d,%d,%d,%d)%s, slices: %d: %d checked, %d failed\n", fp32 ? "fp32" : "bf16", B, T,
           D, N, past ? ", past" : "", slices, num_checked - checked, num_failed - failed);
    for (void* p : {(void*)gx, (void*)gdy, (void*)gy, (void*)gdx, (void*)gstart, (void*)gend, (void*)gdstart,
                    (void*)carries, (void*)before, (void*)after, (void*)ends}) { cudaFree(p); }
    for (float* p : {x, dy, start}) { free(p); }
}

// Tokens drawn from the same logits, in several ways of cutting what is unlikely.
template <typename X> static void check_sample(Gpu& gpu, int B, int vocab) {
    struct { double temperature, top_p; int top_k; } ways[] = {{0, 1, 0}, {1, 1, 0}, {3, 1, 0}, {1e-300, 1, 0},
            {2, 1, 40}, {2, 0.9, 0}, {3, 0.5, 100}, {1, 1e-9, 0}, {1, 1, 1}, {1, 1, 1 << 20}};
    int failed = num_failed, checked = num_checked, *next = (int*)gpu_alloc(&gpu, (B + 1) * sizeof(int));
    std::vector<float> logits((size_t)B * vocab);
    std::vector<X> rounded(logits.size());
    X* there = (X*)gpu_alloc(&gpu, logits.size() * sizeof(X));
    std::vector<int> tokens(B + 1);
    for (size_t i = 0; i < logits.size(); i++) {
        rounded[i] = from_host<X>(random_normal(1, 0, i, 1e9));
        logits[i] = to_float(rounded[i]);
    }
    rounded[5] = from_host<X>(logits[5] = NAN);
    CUDA(cudaMemcpy(there, rounded.data(), logits.size() * sizeof(X), cudaMemcpyHostToDevice));
    for (auto way : ways) {
        Options o = default_options;
        o.temperature = way.temperature; o.top_p = way.top_p; o.top_k = way.top_k;
        std::vector<float> got(B + 1), expected(B + 1);
        for (int index = 0; index < 20; index++) {
            LAUNCH(sample_kernel<X>, B, 1024, next, next, there, vocab, 7, o.temperature, o.top_k, o.top_p, o.seed, 5,
                   index);
            gpu_sync(&gpu);
            CUDA(cudaMemcpy(tokens.data(), next, tokens.size() * sizeof(int), cudaMemcpyDeviceToHost));
            for (int b = 0; b < B; b++) {
                double u = random_uniform(o.seed, 5 + ((uint64_t)b << 32), index);
                expected[b] = sample(logits.data() + (size_t)b * vocab, vocab, &o, u); got[b] = tokens[b];
            }
            expected[B] = 7; got[B] = tokens[B]; // the position
            compare("drawn tokens, and the position", got.data(), expected.data(), B + 1, 0, 0, false);
        }
    }
    printf("sample, %s, (B,vocab) = (%d,%d): %d checked, %d failed\n", sizeof(X) == 4 ? "fp32" : "bf16", B, vocab,
           num_checked - checked, num_failed - failed);
    cudaFree(next); cudaFree(there);
}

// What generation does for one token: two products at once, the first of a layer norm of its input, the second of
// silu(from) * mul; and, of B streams, values weighted with the softmax of `keys` scores.
template <typename X> static void check_step(Gpu& gpu, int I, int O, int keys, int B, int V) {
    int failed = num_failed, checked = num_checked, O2 = O / 3 + 1, Z = 8, pitch = Z + V;
    double bound = sizeof(X) == 4 ? 1e-5 : 6e-3;
    std::vector<void*> taken;
    auto fill = [&](auto** p, size_t n, double scale) { // on the GPU; returns what is there
        typedef std::remove_pointer_t<std::remove_pointer_t<decltype(p)>> Y;
        std::vector<float> v(n); std::vector<Y> raw(n);
        for (size_t i = 0; i < n; i++) {
            raw[i] = from_host<Y>(scale * random_normal(31, taken.size(), i, INFINITY));
            v[i] = to_host(raw[i]);
        }
        taken.push_back(*p = (Y*)gpu_alloc(&gpu, n * sizeof(Y)));
        CUDA(cudaMemcpy(*p, raw.data(), n * sizeof(Y), cudaMemcpyHostToDevice));
        return v;
    };
    auto fetch = [](const auto* there, size_t n) {
        std::vector<std::remove_const_t<std::remove_pointer_t<decltype(there)>>> raw(n);
        std::vector<float> v(n);
        CUDA(cudaMemcpy(raw.data(), there, n * sizeof(raw[0]), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < n; i++) { v[i] = to_host(raw[i]); }
        return v;
    };
    auto check = [&](const char* name, const auto* there, const std::vector<float>& expected) {
        compare(name, fetch(there, expected.size()).data(), expected.data(), expected.size(), 0, bound, false);
    };
    auto rounded = [](std::vector<float>& v) { for (float& x : v) { x = to_host(from_host<X>(x)); } };
    Product<X> p = {}, q = {}; X *bias, *add, *from, *mul, *weight; float *w, *b;
    p.I = p.ldi = q.I = q.ldi = I; p.O = O; q.O = O2;
    auto product = [&](Product<X>& p, const std::vector<float>& x) {
        fill(&p.out, p.O, 1); fill(&p.inp, I, 1); fill(&p.mean, 1, 1); fill(&p.rstd, 1, 1);
        auto hweight = fill(&weight, (size_t)p.O * I, 1), hbias = fill(&bias, p.O, 9), hadd = fill(&add, p.O, 9);
        p.weight = weight; p.bias = bias; p.add = add;
        std::vector<float> out(p.O);
        matmul_forward(out.data(), x.data(), hweight.data(), hbias.data(), hadd.data(), 1, I, p.O);
        return out;
    };
    std::vector<float> x(I), y(I), mean(1), rstd(1);
    auto hfrom = fill(&from, I, 3), hw = fill(&w, I, 0.3), hb = fill(&b, I, 1);
    p.from = from; p.w = w; p.b = b;
    norm_forward(x.data(), mean.data(), rstd.data(), hfrom.data(), hw.data(), hb.data(), 1, I, 1e-5);
    rounded(x);
    auto out = product(p, x);
    hfrom = fill(&from, I, 3);
    auto hmul = fill(&mul, I, 1);
    q.from = from; q.mul = mul;
    silu_forward(y.data(), hfrom.data(), hmul.data(), I);
    rounded(y);
    auto out2 = product(q, y);
    q.mean = q.rstd = NULL;
    product_forward<X>(gpu, 1, 1e-5, p, q);
    gpu_sync(&gpu);
    check("first input", p.inp, x); check("first product", p.out, out);
    check("mean", p.mean, mean); check("rstd", p.rstd, rstd);
    check("second input", q.inp, y); check("second product", q.out, out2);

    X *gated, *K, *values, *z, *v; float *scores, *gamma, *beta, *turns; int* position;
    fill(&gated, B * V, 1); fill(&scores, B * keys, 1); fill(&K, (size_t)B * keys * Z, 0.3);
    fill(&values, (size_t)B * keys * V, 1); fill(&v, B * V, 1); fill(&gamma, 2 * Z, 1); fill(&beta, 2 * Z, 1);
    fill(&turns, (size_t)keys * Z, 1);
    auto inp = fill(&z, B * pitch, 1);
    taken.push_back(position = (int*)gpu_alloc(&gpu, sizeof(int)));
    int last = keys - 1;
    CUDA(cudaMemcpy(position, &last, sizeof(int), cudaMemcpyHostToDevice));
    attention_step<X>(gpu, gated, V, scores, K, values, position, z, z + Z, pitch, v, gamma, beta, turns, B, keys, Z, V,
                      1, 1e-5);
    gpu_sync(&gpu);
    auto hscores = fetch(scores, B * keys), hvalues = fetch(values, (size_t)B * keys * V);
    std::vector<float> expected(B * V);
    for (int b = 0; b < B; b++) {
        const float* s = hscores.data() + b * keys;
        double all = 0;
        for (int k = 0; k < keys; k++) { all += exp(s[k] - s[0]); }
        silu_forward(expected.data() + b * V, inp.data() + b * pitch + Z, NULL, V);
        for (int i = 0; i < V; i++) {
            double sum = 0;
            for (int k = 0; k < keys; k++) {
                sum += exp(s[k] - s[0]) / all * hvalues[((size_t)b * keys + k) * V + i];
            }
            expected[b * V + i] *= sum;
        }
    }
    check("gated values", gated, expected);
    printf("step, %s, %d to %d and %d, %d x %d keys of %d: %d checked, %d failed\n", sizeof(X) == 4 ? "fp32" : "bf16",
           I, O, O2, B, keys, V, num_checked - checked, num_failed - failed);
    for (void* t : taken) { cudaFree(t); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Times

template <typename Body> static double median_ms(Gpu& gpu, int times, Body body) {
    cudaEvent_t a, b;
    float all[64];
    CUDA(cudaEventCreate(&a));
    CUDA(cudaEventCreate(&b));
    for (int i = 0; i < 2; i++) { body(); }
    for (int i = 0; i < times; i++) {
        CUDA(cudaEventRecord(a, gpu.stream));
        for (int k = 0; k < 5; k++) { body(); }
        CUDA(cudaEventRecord(b, gpu.stream));
        CUDA(cudaEventSynchronize(b));
        CUDA(cudaEventElapsedTime(&all[i], a, b));
        all[i] /= 5;
    }
    for (int i = 0; i < times; i++) {
        for (int k = i + 1; k < times; k++) { if (all[k] < all[i]) { float t = all[i]; all[i] = all[k]; all[k] = t; } }
    }
    return all[times / 2];
}

// Pseudo-random numbers with mean 0 and variance scale^2 (a sum of 4 uniform ones), good enough to time with.
template <typename X> __global__ void noise_kernel(X* x, size_t n, float scale, uint64_t seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        uint64_t z = (i + (seed << 40)) * 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
        float sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48);
        x[i] = from_float<X>(scale * (sum / 65536.0f - 2.0f) * 1.7320508f);
    }
}
// Random weights without the time that the exact initialization takes for billions of them.
template <typename X> static void model_noise(Gpu& gpu, ModelOf<X>* m) {
    for (int i = 0; i < NUM_PARAMS; i++) {
        for (int l = 0; m->specs[i].size && l < m->specs[i].slots; l++) {
            int init = m->specs[i].init;
            float scale = init == INIT_EMBED ? 1 / sqrt(m->config.model_dim) : init == INIT_LINEAR
                    ? 1 / sqrt(3.0 * m->specs[i].dims[1]) : init == INIT_ZERO ? 0 : 0.25;
            if (i == P_wh2) { continue; } // wh1 covers both
            size_t n = i == P_wh1 ? m->places[i].rows * m->places[i].pitch : m->specs[i].size;
            if (init == INIT_THETA) { scale = 2; }
            float* at = m->params + m->places[i].offset + l * m->places[i].step;
            noise_kernel<float><<<1024, 256, 0, gpu.stream>>>(at, n, scale, i * 1000 + l);
        }
    }
    model_round(gpu, m, m->params, 0, m->size);
}

static Config preset_of(const char* name) { // Megalodon's name
    if (other) { name = text_of("gecko%s", name + strlen("mega")); }
    for (int i = 0; i < NUM_PRESETS; i++) { if (!strcmp(presets[i].name, name)) { return presets[i].config; } }
    die("no preset %s", name);
    return {};
}
template <typename X> static double bench_model(Gpu& gpu, const char* name, const Config& c, int B, int T, int keep,
        double target) {
    Options o = default_options;
    o.model = c;
    o.batch = B;
    o.seq = T;
    o.recompute = keep == KEEP_BLOCKS;
    if (keep != KEEP_BLOCKS) { keep = what_to_keep<X>(gpu, &o); }
    ModelOf<X> m;
    PassOf<X> s;
    size_t rows = (size_t)B * T, before = gpu.allocated, free, total;
    model_alloc(gpu, &m, &o.model, true);
    model_noise(gpu, &m);
    pass_alloc(gpu, &s, &o.model, B, T, keep, KEEP_NONE);
    int *x = (int*)xcalloc(rows, sizeof(int)), *y = (int*)xcalloc(rows, sizeof(int));
    for (size_t i = 0; i < rows; i++) {
        x[i] = random_bits(1, 0, i) % o.model.vocab_size; y[i] = random_bits(1, 1, i) % o.model.vocab_size;
    }
    enum { WARM = 2, STEPS_TIMED = 10 };
    double passes[STEPS_TIMED], times[STEPS_TIMED], norm = 0; // forward and backward alone, whole steps
    float dloss = 1.0 / rows;
    for (int i = 0; i < WARM + STEPS_TIMED; i++) {
        double t0 = seconds();
        if (profile && i == 1) { cudaProfilerStart(); }
        if (profile && i == 2) { cudaProfilerStop(); exit(0); }
        model_forward<X>(gpu, &m, &s, x, NULL, NULL);
        model_losses(gpu, &m, &s, y, dloss, m.sums);
        model_backward<X>(gpu, &m, &s, x, NULL, NULL);
        gpu_sync(&gpu);
        double t1 = seconds();
        norm = model_grad_norm(gpu, &m);
        AdamW adamw = adamw_of(&o, 1e-4);
        model_update(gpu, &m, &adamw, i + 1, clip_scale(norm, 1));
        gpu_sync(&gpu);
        if (i >= WARM) { passes[i - WARM] = t1 - t0; times[i - WARM] = seconds() - t0; }
    }
    auto median = [](double* v) {
        std::sort(v, v + STEPS_TIMED);
        return v[STEPS_TIMED / 2];
    };
    double t = median(times), pass = median(passes);
    cudaMemGetInfo(&free, &total);
    printf("%-14s %d x %-6d %8.1f ms  %9.0f tok/s (target %.0f: %.0f%%)  %.1f%% of 790T  forward + backward %.4f us/tok"
           "  used %.1f GB (forecast %.1f)  norm %.3g\n", name, B, T, 1e3 * t, rows / t, target,
           100 * rows / t / target, 100 * rows / t * flops_per_token(&o.model) / 790e12, 1e6 * pass / rows,
           (total - free) / 1e9, memory_needed<X>(gpu, &o, keep) / 1e9, norm);
    fflush(stdout);
    model_free(gpu, &m);
    pass_free(gpu, &s);
    ::free(x);
    ::free(y);
    gpu.allocated = before;
    return rows / t;
}

// Tokens/s over one whole chunk, from timestep `at` on: what came before is streamed, for one row, and copied to the
// others.
static void bench_decode(Gpu& gpu, const char* preset, int B, int at) {
    Options o = default_options;
    o.model = preset_of(preset);
    const Config* c = &o.model;
    ModelOf<bf16> m;
    PassOf<bf16> pass, past;
    StateOf<bf16> state, one;
    size_t free0, free1, free2, total;
    int n = c->chunk_size, L = c->num_layers, *tokens = (int*)xcalloc(n + B, sizeof(int));
    cudaMemGetInfo(&free0, &total);
    model_alloc(gpu, &m, c, false);
    model_noise(gpu, &m);
    pass_alloc(gpu, &pass, c, B, 1, KEEP_NONE, KEEP_NONE);
    pass_alloc(gpu, &past, c, 1, n, KEEP_NONE, KEEP_NONE);
    state_alloc(gpu, &state, c, B, true);
    state_alloc(gpu, &one, c, 1, true);
    for (int i = 0; i < n + B; i++) { tokens[i] = random_bits(1, 0, i) % c->vocab_size; }
    for (int t = 0; t < at; t += past.T) {
        past.T = min_int(n, at - t);
        model_forward(gpu, &m, &past, tokens, &one, &one);
    }
    auto repeat = [&](void* to, const void* from, size_t slots, size_t bytes) { // (slots,bytes) to (slots,B,bytes)
        for (int b = 0; b < B; b++) {
            CUDA(cudaMemcpy2D((char*)to + b * bytes, B * bytes, from, bytes, bytes, slots, cudaMemcpyDefault));
        }
    };
    gpu_sync(&gpu);
    repeat(state.norm, one.norm, L + 1, c->norm_num_groups * sizeof(NormState));
    repeat(state.h, one.h, L, (size_t)c->model_dim * c->cema_ndim * 2 * sizeof(float));
    repeat(state.k, one.k, L, (size_t)n * c->z_dim * sizeof(bf16));
    repeat(state.v, one.v, L, (size_t)n * c->value_dim * sizeof(bf16));
    state.pos = one.pos;
    double t0 = 0, D = c->model_dim, V = c->value_dim, Z = c->z_dim;
    for (int i = 0; i < n + 4; i++) {
        if (i == 4) { state.pos = one.pos; cudaMemGetInfo(&free1, &total); t0 = seconds(); }
        model_forward(gpu, &m, &pass, tokens + i % n, &state, &state);
        gpu_sync(&gpu);
    }
    double t = (seconds() - t0) / n;
    cudaMemGetInfo(&free2, &total);
    double bytes = 2.0 * specs_size(m.specs, NUM_PARAMS) - (c->share_emb ? 0 : 2 * D * c->vocab_size)
                   + (double)B * L * n * (V + Z);
    printf("decode %-9s batch %-2d from timestep %-7d: %7.0f tok/s, %.3f ms a step, %.0f%% of reading weights and "
           "cache at 4.3 TB/s (%.3f ms); %.1f MB, at the end %+.1f\n", preset, B, at, B / t, 1e3 * t,
           100 * bytes / 4.3e12 / t, bytes / 4.3e9, (free0 - free1) / 1e6, ((double)free1 - free2) / 1e6);
    fflush(stdout);
    model_free(gpu, &m);
    pass_free(gpu, &pass);
    pass_free(gpu, &past);
    state_free(gpu, &state);
    state_free(gpu, &one);
    free(tokens);
}

static void bench_kernels(Gpu& gpu) {
    int B = 4, T = 4096, D = 2048, N = 16, G = 64, H = 2, Z = 512, V = 4096, c = 2048;
    size_t n = (size_t)B * T * D;
    auto fill = [&](size_t n, float scale, uint64_t seed) {
        bf16* p = (bf16*)gpu_alloc(&gpu, n * sizeof(bf16));
        noise_kernel<bf16><<<4096, 256, 0, gpu.stream>>>(p, n, scale, seed);
        return p;
    };
    auto floats = [&](size_t n, float scale, uint64_t seed) {
        float *p = (float*)gpu_alloc(&gpu, n * sizeof(float)), *h = (float*)xcalloc(n, sizeof(float));
        for (size_t i = 0; i < n; i++) { h[i] = scale * random_normal(seed, 0, i, INFINITY); }
        CUDA(cudaMemcpy(p, h, n * sizeof(float), cudaMemcpyHostToDevice));
        free(h);
        return p;
    };
    bf16 *x = fill(n, 1, 1), *y = fill(n, 1, 2), *dy = fill(n, 1, 3), *dx = fill(n, 1, 4), *r1 = fill(n, 1, 5);
    float *mean = floats((size_t)B * T * G, 0, 1), *rstd = floats((size_t)B * T * G, 0, 1), *w = floats(D, 0.1, 1),
            *b = floats(D, 0.1, 2);
    float *alpha = floats(D * N, 0.2, 3), *delta = floats(D * N, 0.2, 4), *theta = floats(D, 1, 5),
            *gamma = floats(D * N * 2, 1, 6), *omega = floats(D, 0.25, 7);
    float *g1 = floats(D * N * 2, 0, 8), *g2 = floats(D * N, 0, 8), *g3 = floats(D * N, 0, 8), *g4 = floats(D, 0, 8),
            *g5 = floats(D, 0, 8);
    for (int long_one = 0; long_one < 2; long_one++) {
        if (long_one) { T = 16384; B = 1; }
        float* carries = (float*)gpu_alloc(&gpu, sizeof(float) * cema_carries_size(B, T, D));
        double f = median_ms(gpu, 10, [&] { timestepnorm_statistics<bf16>(gpu, x, B, T, D, G);
                timestepnorm_forward<bf16>(gpu, y, mean, rstd, NULL, NULL, x, w, b, B, T, D, G, 1e-5); });
        auto backward = [&](const bf16* add1, const bf16* add2) {
            timestepnorm_backward_sums<bf16>(gpu, g4, g5, dy, mean, rstd, NULL, x, w, B, T, D, G);
            timestepnorm_backward<bf16>(gpu, dx, NULL, NULL, add1, add2, dy, mean, rstd, NULL, x, w, B, T, D, G);
        };
        double k = median_ms(gpu, 10, [&] { backward(NULL, NULL); });
        double k2 = median_ms(gpu, 10, [&] { backward(dx, r1); });
        printf("[%d,%d,%d] timestep norm: forward %.3f ms, backward %.3f (%.3f with residuals), %.3f (target 0.25)\n",
               B, T, D, f, k, k2, f + k);
        f = median_ms(gpu, 10, [&] { cema_forward<bf16>(gpu, y, NULL, carries, NULL, x,
                                                        {alpha, delta, theta, gamma, omega}, B, T, D, N); });
        k = median_ms(gpu, 10, [&] { cema_backward<bf16>(gpu, dx, {g2, g3, g4, g1, g5}, NULL, dy, carries, NULL,
                NULL, NULL, x, {alpha, delta, theta, gamma, omega}, B, T, D, N); });
        printf("[%d,%d,%d] cema: forward %.3f ms, backward %.3f, sum %.3f (target 0.60)\n", B, T, D, f, k, f + k);
        fflush(stdout);
    }
    B = 4, T = 4096;
    size_t nz = (size_t)B * T * Z, nv = (size_t)B * T * V;
    bf16 *q = fill(nz, 0.2, 1), *kk = fill(nz, 0.2, 2), *v = fill(nv, 1, 3), *o = fill(nv, 1, 4),
            *dout = fill(nv, 1, 5), *dq = fill(nz, 1, 1), *dk = fill(nz, 1, 1), *dv = fill(nv, 1, 1);
    bf16 *zr = fill((size_t)B * T * (Z + V), 1, 7), *dzr = fill((size_t)B * T * (Z + V), 1, 8),
            *mu = fill((size_t)B * T * (D + V), 1, 9), *dmu = fill((size_t)B * T * (D + V), 1, 9);
    float *lse = floats((size_t)B * H * T, 0, 1), *dot = floats((size_t)B * H * T, 0, 1),
            *rot = floats((size_t)c * Z / H, 1, 1), *gz = floats(2 * Z, 0.1, 1), *bz = floats(2 * Z, 0.1, 2);
    float *s1 = floats(V, 0, 1), *s2 = floats(2 * Z, 0, 1), *s3 = floats(2 * Z, 0, 1), *s4 = floats(Z, 0, 1);
    double f = median_ms(gpu, 10, [&] { attention_forward<bf16>(gpu, o, lse, q, kk, v, B, T, T, 0, c, H, Z, V); });
    double k = median_ms(gpu, 10, [&] { attention_backward<bf16>(gpu, dq, dk, dv, dout, dot, lse, q, kk, v, B, T, c, H,
            Z, V); });
    printf("attention, 8 chunks of 2048, H=2: forward %.3f ms, backward %.3f, sum %.3f (target 1.25)\n", f, k, f + k);
    size_t rows = (size_t)B * T;
    auto show = [&](const char* name, double units, double ms) { printf("  %-22s %.3f ms  %5.2f U  %.2f TB/s\n", name,
            ms, units, units * 67.1e6 / ms / 1e9); };
    show("rmsnorm_forward", 2, median_ms(gpu, 10, [&] { norm_forward<bf16>(gpu, mu, D + V, NULL, mean, x, w, NULL,
            rows, D, 1e-5); }));
    show("rmsnorm_backward", 4, median_ms(gpu, 10, [&] { norm_backward<bf16>(gpu, dx, g4, NULL, NULL, mu, dmu, D + V,
            NULL, mean, x, w, NULL, rows, D); }));
    show("layernorm_forward", 2, median_ms(gpu, 10, [&] { norm_forward<bf16>(gpu, y, D, mean, rstd, x, w, b, rows, D,
            1e-5); }));
    show("layernorm_backward", 4, median_ms(gpu, 10, [&] { norm_backward<bf16>(gpu, dx, g4, g5, b, y, dy, D, mean,
            rstd, x, w, b, rows, D); }));
    show("timestepnorm_again", 2, median_ms(gpu, 10, [&] { timestepnorm_again<bf16>(gpu, y, mean, rstd, x, w, b, rows,
            D, G); }));
    show("qk_forward", 0.75, median_ms(gpu, 10, [&] { qk_forward<bf16>(gpu, q, kk, NULL, NULL, zr, Z + V, gz, bz, rot,
            B, T, T, 0, 0, c, Z, H, 1e-5); }));
    show("qk_backward", 1, median_ms(gpu, 10, [&] { qk_backward<bf16>(gpu, dzr, s2, s3, s4, NULL, dq, dk, zr, Z + V,
            gz, rot, B, T, c, Z, H, 1e-5); }));
    show("value_forward", 4, median_ms(gpu, 10, [&] { value_forward<bf16>(gpu, v, o, B, T, T, 0, V, H); }));
    show("value_backward", 6, median_ms(gpu, 10, [&] { value_backward<bf16>(gpu, dout, s1, dv, v, B, T, V, H); }));
    show("gate_forward", 6, median_ms(gpu, 10, [&] { gate_forward<bf16>(gpu, mu + D, D + V, o, zr + Z, Z + V, B, T, V,
            H); }));
    show("gate_backward", 12, median_ms(gpu, 10, [&] { gate_backward<bf16>(gpu, dout, dzr + Z, s1, dot, mu + D,
            dmu + D, D + V, o, zr + Z, Z + V, B, T, V, H); }));
    int F = 3584;
    bf16 *f13 = fill(rows * 2 * F, 1, 1), *df13 = fill(rows * 2 * F, 1, 1), *hid = fill(rows * F, 1, 1),
            *dhid = fill(rows * F, 1, 2);
    show("silu_forward", 5.25, median_ms(gpu, 10, [&] { silu_forward<bf16>(gpu, hid, f13, f13 + F, 2 * F, rows, F); }));
    show("silu_backward", 10.5, median_ms(gpu, 10, [&] { silu_backward<bf16>(gpu, df13, df13 + F, hid, dhid, f13,
            f13 + F, 2 * F, rows, F); }));
    bf16* weights = fill((size_t)8192 * 8192, 0.02, 3);
    float* wgrad = floats(1, 0, 1);
    wgrad = (float*)gpu_alloc(&gpu, sizeof(float) * 32000 * 4096);
    bf16* logits = fill(rows * 32000, 1, 5);
    struct { const char* name; int O, I; bf16 *out, *inp; } products[] = {{"wv", V, D, v, x},
            {"wz|wr", Z + V, D, zr, x}, {"wh1|wh2", D, D + V, y, mu},
        {"fc1|fc3", 2 * F, D, f13, x}, {"fc2", D, F, y, hid}, {"head", 32000, D, logits, x}};
    for (auto& p : products) {
        double fl = 2.0 * rows * p.O * p.I / 1e9;
        f = median_ms(gpu, 10, [&] { matmul_forward<bf16>(gpu, p.out, p.O, p.inp, p.I, weights, NULL, NULL, 0, rows,
                                                          p.I, p.O); });
        k = median_ms(gpu, 10, [&] { matmul_backward<bf16>(gpu, p.inp, p.I, p.out, p.O, weights, rows, p.I, p.O,
                                                           false); });
        double k2 = median_ms(gpu, 10, [&] { matmul_backward_weight<bf16>(gpu, wgrad, p.out, p.O, p.inp, p.I, rows,
                p.I, p.O); });
        printf("  %-8s forward %.3f ms %4.0f TFLOP/s, dgrad %.3f %4.0f, wgrad %.3f %4.0f\n", p.name, f, fl / f, k,
               fl / k, k2, fl / k2);
    }
    int* targets = (int*)gpu_alloc(&gpu, rows * sizeof(int));
    show("crossentropy 16k x 32k", 2 * 15.6, median_ms(gpu, 10, [&] { crossentropy<bf16>(gpu, lse, logits, targets,
            1e-4, rows, 32000); }));
}

int main(int argc, char** argv) {
    Gpu gpu;
    device_open(&gpu);
    CUDA(cudaEventCreateWithFlags(&gpu.event, cudaEventDisableTiming));
    printf("%s, cuBLASLt %zu\n", gpu.card.name, cublasLtGetVersion());
    if (argc > 1 && !strcmp(argv[1], "--kernels")) { bench_kernels(gpu); return 0; }
    if (argc > 1 && !strcmp(argv[1], "--decode")) {
        for (int i = argc > 2 ? atoi(argv[2]) : 0; i < (argc > 3 ? atoi(argv[3]) : 8); i++) {
            int at = argc > 4 ? atoi(argv[4]) : i & 1 ? 1000000 : 0;
            bench_decode(gpu, i & 2 ? "mega1.3B" : "mega200M", i & 4 ? 64 : 1, at);
        }
        return 0;
    }
    if (argc > 1 && !strcmp(argv[1], "--profile")) { // one step of two layers, for ncu --profile-from-start off
        profile = true;
        Config c = preset_of("mega1.3B_pg19");
        c.num_layers = 2;
        bench_model<bf16>(gpu, "mega1.3B_pg19", c, 4, 4096, KEEP_CHEAPLY, 0);
    }
    if (argc > 1 && !strcmp(argv[1], "--bench")) {
        int from = argc > 2 ? atoi(argv[2]) : 0, to = argc > 3 ? atoi(argv[3]) : 5;
        struct { const char* preset; int layers, B, T; double target; } r[] = {
            {"mega200M", 0, 8, 4096, 330000}, {"mega200M", 0, 1, 32768, 315000}, {"mega1.3B_pg19", 0, 4, 4096, 57000},
            {"mega1.3B_pg19", 0, 1, 32768, 56000}, {"mega7.3B", 8, 2, 4096, 45500}, {"mega200M", 0, 1, 8192, 0},
            {"mega200M", 0, 1, 131072, 0}, {"mega7.3B", 32, 1, 4096, 0}};
        for (int i = from; i < to; i++) {
            int keep = i == 7 ? (int)KEEP_BLOCKS : (int)KEEP_CHEAPLY;
            Config c = preset_of(r[i].preset);
            if (r[i].layers) { c.num_layers = r[i].layers; }
            bench_model<bf16>(gpu, other ? "Gecko" : r[i].preset, c, r[i].B, r[i].T, keep, r[i].target);
#ifdef PROGRAM // the same with Gecko's changes one by one, from none on
            c.norm_decay = c.sliding = c.memory = 0;
            c.cema_omega = c.two_hop_residual = 1;
            bench_model<bf16>(gpu, " none of it", c, r[i].B, r[i].T, keep, 0);
            c.norm_decay = 1; c.cema_omega = 0;
            bench_model<bf16>(gpu, " + norm, CEMA", c, r[i].B, r[i].T, keep, 0);
            c.sliding = 1;
            bench_model<bf16>(gpu, " + window", c, r[i].B, r[i].T, keep, 0);
            c.memory = 1;
            bench_model<bf16>(gpu, " + memory", c, r[i].B, r[i].T, keep, 0);
#endif
        }
        return 0;
    }
    //                  L   D   H   Z   V    F    c   G  N  vocab  base  eps  swiglu scale share rescale
    const Config even = {2, 128, 1, 64, 192, 216, 128, 4, 16, 256, 10000, 1e-5, 1, 1, 1, 0};
    const Config odd =  {3, 33, 1, 6, 21, 17, 7, 3, 5, 37, 10000, 1e-5, 0, 0, 0, 1};
    const Config heads = {2, 64, 4, 32, 48, 40, 16, 2, 20, 53, 10000, 1e-5, 1, 0, 0, 0};
    const Config wider = {1, 1024, 2, 128, 512, 264, 1024, 1, 16, 64, 10000, 1e-5, 1, 1, 1, 0};
    bool quick = argc > 1 && !strcmp(argv[1], "--quick");
    for (int past = 0; other && past < 2; past++) { // more chunks; then what an architecture does alone
        check_model<float>(gpu, "even", even, 2, 700, past);
        check_model<bf16>(gpu, "even", even, 2, 700, past);
        check_model<float>(gpu, "heads", heads, 1, 128, past);
        check_model<bf16>(gpu, "even", even, 1, 1280, past, some_masks);
    }
    for (int past = 0; past < 2; past++) {
        check_cema<bf16>(gpu, 2, 64, 16, 16, past);
        check_cema<bf16>(gpu, 1, 777, 8, 5, past);
        check_cema<bf16>(gpu, 2, 4096, 24, 16, past);
        check_cema<bf16>(gpu, 3, 33, 15, 16, past);
        check_cema<float>(gpu, 2, 333, 21, 33, past);
        check_cema<bf16>(gpu, 1, 3840, 24, 16, past, 3); // more than cema_slice_kernel's warps take at once
        check_cema<bf16>(gpu, 1, 300, 24, 16, past, 3); // slices end inside units: the other form
        check_cema<float>(gpu, 1, 4 * 1131, 21, 33, past, 4);
        check_model<bf16>(gpu, "even", even, 2, 300, past);
        if (quick) { continue; }
        check_model<float>(gpu, "even", even, 2, 300, past);
        check_model<float>(gpu, "odd", odd, 3, 20, past);
        check_model<float>(gpu, "heads", heads, 2, 64, past);
        check_model<float>(gpu, "even", even, 2, 1, past);
        check_model<float>(gpu, "even", even, 1, 300, past);
        check_model<float>(gpu, "odd", odd, 1, 20, past);
        check_model<bf16>(gpu, "even", even, 1, 300, past);
        check_model<bf16>(gpu, "odd", odd, 1, 20, past);
        check_model<bf16>(gpu, "odd", odd, 3, 20, past);
        check_model<bf16>(gpu, "heads", heads, 2, 64, past);
        check_model<float>(gpu, "even", even, 2, 300, past, some_masks);
        check_model<float>(gpu, "odd", odd, 3, 20, past, some_masks);
        check_model<bf16>(gpu, "even", even, 2, 300, past, some_masks);
        check_model<bf16>(gpu, "odd", odd, 3, 20, past, some_masks);
    }
    for (int drops = 0; !quick && drops < 2; drops++) {
        check_model<float>(gpu, "wider", wider, 1, 2048, false, drops ? some_masks : no_masks);
        check_model<bf16>(gpu, "wider", wider, 1, 2048, false, drops ? some_masks : no_masks);
    }
    check_step<bf16>(gpu, 6152, 700, 4500, 1, 24); // rows longer than all slots, and their last piece is short
    check_step<float>(gpu, 2568, 700, 9000, 2, 24);
    check_step<bf16>(gpu, 1024, 20000 / (quick ? 20 : 1), 129, 1, 4096); // several rows a warp
    check_step<bf16>(gpu, 1023, 333, 4100, 3, 21);
    check_step<float>(gpu, 517, 100, 1, 1, 21);
    check_sample<float>(gpu, 2, 32000);
    check_sample<bf16>(gpu, 3, 4999);
    check_sample<bf16>(gpu, 1, 37);
    printf("%d checked, %d failed\n", num_checked, num_failed);
    device_close(&gpu);
    return num_failed != 0;
}
