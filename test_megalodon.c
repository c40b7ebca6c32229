/*
Compares train_megalodon.c, or built with -DGPU train_megalodon.cu, with tensors dumped from PyTorch.

    ./test_megalodon                     the dumps in data/reference, and the masks of dropout
    ./test_megalodon FILE...             any dumps: safetensors files with weights and what was recorded of a run, under
                                         the names that dev/reference.py uses; every known name in a file is checked
    ./test_megalodon --break NAME FILE   must fail: first changes the signs of NAME if it is a param.*, else moves its
                                         largest entry by 1%
    ./test_megalodon --compare A B       two checkpoints of a first step: their gradients, by AdamW's first moments
    ./test_megalodon --compare A B START two checkpoints of runs that both began from START: their weights
    mpirun -np P ./test_megalodon --chunk-parallel P FILE...
    ./test_megalodon_cuda [--precision bf16|fp32] [FILE]...

--help lists all flags.
For the FILEs that are named, and with -v: one line per tensor with name, error, bound, and where it is largest. For the
project's own dumps only what fails has a line. Then a line per file, and last "overall okay: 1" and exit status 0, or 0
and 1.
*/
#define TESTING
#ifdef PROGRAM
#include PROGRAM // dev/gecko/gecko.c
#elif defined(GPU)
#include "train_megalodon.cu"
#else
#include "train_megalodon.c"
#endif

// Error of an activation: max|a-b| / max|b|. Of a gradient: the same over max(max|b|, 1e-4 of the largest of its kind).
// Two correct fp32 programs differ by about 1e-6, 3e-6 and 3e-7; an epsilon of 1e-6 for 1e-5, or tf32, is above these.
// In bf16 gradients are judged by their direction, 1 - cosine, and final weights not at all.
static double act_bound = 1e-5, grad_bound = 2e-5, train_bound = 2e-6;
static const double final_bound = 1e-3, final_all_bound = 1e-4;
static bool bf16_run;

static int num_checked, num_failed;
static bool verbose; // print also what is good

// Prints a verdict; NaN fails. where: what else there is to say.
void verdict(const char* name, double error, double bound, const char* where) {
    bool good = error <= bound;
    num_checked++;
    num_failed += !good;
    if (!verbose && good) { return; }
    printf("%-6s %-44s error %.2e (bound %.0e)%s\n", good ? "ok" : "FAILED", name, error, bound, where);
}

// Prints a line about what was checked since `checked` and `failed` were counted.
void summary(const char* name, int checked, int failed, int skipped) {
    checked = num_checked - checked; failed = num_failed - failed;
    printf("%-6s %s: %d checked, %d failed", failed ? "FAILED" : "ok", name, checked, failed);
    printf(skipped ? ", %d tensors of the file skipped\n" : "\n", skipped);
}

// max|got - expected| over max(max|expected|, floor); for gradients of a bf16 run 1 - cosine, unless both are nearly 0.
// Ranks compare their slices, of which some may be empty, and all come to the same verdict.
typedef struct { double worst, largest, dot, norm, norm_expected, got, expected; size_t at; } Comparison;
void compare(const char* name, const float* got, const double* expected, size_t n, double floor, double bound) {
    Comparison c = {-1, floor, 0, 0, 0, 0, 0, 0}, *all = (Comparison*)xcalloc(ranks.slices, sizeof(Comparison));
    int rank = 0;
    for (size_t i = 0; i < n; i++) {
        double e = fabs(got[i] - expected[i]);
        if (fabs(expected[i]) > c.largest) { c.largest = fabs(expected[i]); }
        if (!(e <= c.worst) && !isnan(c.worst)) { // a NaN stays
            c.worst = e; c.at = i; c.got = got[i]; c.expected = expected[i];
        }
        c.dot += got[i] * expected[i];
        c.norm += (double)got[i] * got[i];
        c.norm_expected += expected[i] * expected[i];
    }
    all_gather(all, &c, sizeof(c));
    c = all[0];
    for (int r = 1; r < ranks.slices; r++) {
        if (!(all[r].worst <= c.worst) && !isnan(c.worst)) {
            rank = r; c.worst = all[r].worst; c.at = all[r].at; c.got = all[r].got; c.expected = all[r].expected;
        }
        c.largest = all[r].largest > c.largest ? all[r].largest : c.largest;
        c.dot += all[r].dot; c.norm += all[r].norm; c.norm_expected += all[r].norm_expected;
    }
    double error = c.worst < 0 ? 0 : c.worst / (c.largest > 0 ? c.largest : 1);
    if (bf16_run && bound == grad_bound && !(error <= bound)) { error = 1 - c.dot / sqrt(c.norm * c.norm_expected); }
    const char* of_rank = ranks.slices > 1 ? text_of(" of rank %d's", rank) : "";
    verdict(name, error, bound, text_of(" at %zu%s: %.9g, expected %.9g", c.at, of_rank, c.got, c.expected));
    free(all);
}

// Weights by L2: norm(got - expected) / norm(expected - start), of a tensor; adds both squares to those of all. Single
// entries are not judged: Adam turns a gradient of rounding size into a step of lr.
void compare_moved(const char* name, const float* got, const double* expected, const double* start, size_t n,
                   double all[2]) {
    double error = 0, moved = 0;
    for (size_t k = 0; k < n; k++) {
        error += (got[k] - expected[k]) * (got[k] - expected[k]);
        moved += (expected[k] - start[k]) * (expected[k] - start[k]);
    }
    verdict(name, sqrt(error / moved), final_bound, "");
    all[0] += error;
    all[1] += moved;
}

// ---------------------------------------------------------------------------------------------------------------------
// A dump and the run that it is compared with

typedef struct {
    SafeTensors st;
    bool* used;             // by tensor
    const char* broken;     // name given with --break, or NULL
    int B;                  // rows
} Dump;

const Tensor* dump_find(Dump* d, const char* name) {
    const Tensor* t = safetensors_find(&d->st, name);
    if (t) { d->used[t - d->st.tensors] = true; }
    return t;
}

// The tensor's values, n of them, or NULL if the dump has none of this name. To be freed.
double* dump_read(Dump* d, const char* name, size_t n) {
    const Tensor* t = dump_find(d, name);
    if (!t) { return NULL; }
    if (t->size != n) { die("%s: tensor '%s' has %zu elements, expected %zu", d->st.path, name, t->size, n); }
    double* x = (double*)xcalloc(n, sizeof(double));
    float* raw = (float*)xcalloc(n, sizeof(float));
    size_t largest = 0;
    tensor_read(&d->st, t, raw);
    for (size_t i = 0; i < n; i++) { x[i] = raw[i]; }
    free(raw);
    if (d->broken && !strcmp(name, d->broken)) {
        for (size_t i = 0; i < n; i++) {
            if (!strncmp(name, "param.", 6)) { x[i] = -x[i]; }
            if (fabs(x[i]) > fabs(x[largest])) { largest = i; }
        }
        if (strncmp(name, "param.", 6)) { x[largest] *= 1.01; }
    }
    return x;
}

// Which part of a tensor a rank compares: all; its slice of (B,T,...); all, but rank 0 alone.
enum { WHOLE, SLICE, FIRST_RANK };

// This rank's part, n values, of a tensor.
double* dump_part(Dump* d, const char* name, int part, size_t n) {
    double* x = dump_read(d, name, part == SLICE ? n * ranks.slices : n);
    size_t row = n / d->B;
    for (int b = 0; x && part == SLICE && b < d->B; b++) {
        memmove(x + b * row, x + ((size_t)b * ranks.slices + ranks.slice) * row, row * sizeof(double));
    }
    return x;
}

int* dump_tokens(Dump* d, const char* name, int B, int T, int vocab) { // this rank's (B,T)
    double* x = dump_part(d, name, SLICE, (size_t)B * T);
    int* tokens = (int*)xcalloc((size_t)B * T, sizeof(int));
    if (!x) { die("%s: tensor '%s' is missing", d->st.path, name); }
    for (int i = 0; i < B * T; i++) {
        tokens[i] = x[i];
        if ((tokens[i] < 0 || tokens[i] >= vocab) && !(*name == 'y' && tokens[i] == IGNORE)) {
            die("%s: %s[%d] is %d, vocab_size is %d", d->st.path, name, i, tokens[i], vocab);
        }
    }
    free(x);
    return tokens;
}

// Compares n floats, times `scale`, with the tensor of this name if the dump has it.
void check(Dump* d, const char* name, const float* got, float scale, int part, size_t n, double floor, double bound) {
    double* expected = dump_part(d, name, part, n);
    if (!expected) { return; }
    if (part == FIRST_RANK && ranks.slice) { n = 0; }
    float* scaled = (float*)xcalloc(n, sizeof(float));
    for (size_t i = 0; i < n; i++) { scaled[i] = got[i] * scale; }
    compare(name, scaled, expected, n, floor, bound);
    free(scaled);
    free(expected);
}

// 1e-4 of the largest entry of all tensors whose names start with prefix.
double gradient_floor(Dump* d, const char* prefix) {
    double largest = 0;
    for (int i = 0; i < d->st.num_tensors; i++) {
        const Tensor* t = &d->st.tensors[i];
        if (strncmp(t->name, prefix, strlen(prefix))) { continue; }
        float* x = (float*)xcalloc(t->size, sizeof(float));
        tensor_read(&d->st, t, x);
        for (size_t k = 0; k < t->size; k++) { largest = fabs(x[k]) > largest ? fabs(x[k]) : largest; }
        free(x);
    }
    return 1e-4 * largest;
}

// Every activation, or gradient of one, that the table gives a name. The embedding is dumped before scaling.
void check_acts(Dump* d, const char* prefix, const Config* c, const Spec* specs, const Acts* acts, double embed_scale,
                       double floor, double bound) {
    char name[128];
    for (int i = 0; i < NUM_ACTS; i++) {
        const float* x = ((float* const*)acts)[i];
        bool per_layer = strstr(specs[i].name, "%d");
        for (int l = 0; *specs[i].name && l < (per_layer ? c->num_layers : 1); l++) {
            double scale = x == acts->embed ? embed_scale : 1;
            layer_name(name, prefix, specs[i].name, l);
            check(d, name, x + l * specs[i].size, scale, SLICE, specs[i].size, floor, bound);
        }
    }
}

void check_params(Dump* d, const char* prefix, const Model* m, const Params* block, double floor, double bound) {
    char name[128];
    for (int i = 0; i < NUM_PARAMS; i++) {
        const Spec* s = &m->specs[i];
        for (int l = 0; s->size && l < s->slots; l++) {
            layer_name(name, prefix, s->name, l);
            check(d, name, ((float* const*)block)[i] + l * s->size, 1, WHOLE, s->size, floor, bound);
        }
    }
}

void check_final(Dump* d, const Model* m, const Params* block) {
    char name[128], start_name[128];
    double all[2] = {0, 0};
    bool found = false;
    for (int i = 0; i < NUM_PARAMS; i++) {
        const Spec* s = &m->specs[i];
        for (int l = 0; s->size && l < s->slots; l++) {
            double* expected = dump_read(d, layer_name(name, "final.", s->name, l), s->size);
            if (!expected) { continue; }
            double* start = dump_read(d, layer_name(start_name, "param.", s->name, l), s->size);
            compare_moved(name, ((float* const*)block)[i] + l * s->size, expected, start, s->size, all);
            found = true;
            free(expected);
            free(start);
        }
    }
    if (found) { verdict("final, all together", sqrt(all[0] / all[1]), final_all_bound, ""); }
}

// Fills s from the dump's state.*, if there: the past before the first token. Returns whether it was.
bool read_state(Dump* d, const Config* c, State* s) {
    size_t B = s->B, G = c->norm_num_groups;
    Spec specs[NUM_ARRAYS];
    int named = state_specs(specs, c, B);
    char name[128];
    bool any = false;
    for (int l = 0; l <= c->num_layers; l++) {
        State at = state_layer(s, c, l);
        const char* norm = l < c->num_layers ? "layers.%d.mega.timenorm" : "output.final_norm";
        for (int k = 0; k < 3; k++) {
            const char* part[] = {"count", "mean", "var"};
            char full[64];
            snprintf(full, sizeof(full), "%s.%s", norm, part[k]);
            double* x = dump_read(d, layer_name(name, "state.", full, l), k == 0 ? B : B * G);
            for (size_t i = 0; x && i < B * G; i++) { (&at.norm[i].count)[k] = k == 0 ? x[i / G] : x[i]; }
            any = any || x;
            free(x);
        }
        for (int k = 0; k < named && l < c->num_layers; k++) {
            size_t n = specs[k].size;
            double* x = n ? dump_read(d, layer_name(name, "state.", specs[k].name, l), n) : NULL;
            for (size_t i = 0; x && i < n; i++) { (&at.h)[k][i] = x[i]; }
            any = any || x;
            free(x);
        }
    }
    return any;
}

void check_dstate(Dump* d, const Config* c, const State* s) {
    size_t B = s->B, G = c->norm_num_groups;
    Spec specs[NUM_ARRAYS];
    int named = state_specs(specs, c, B);
    float* x = (float*)xcalloc(B * G, sizeof(float));
    char name[128];
    double floor = gradient_floor(d, "dstate.");
    for (int l = 0; l <= c->num_layers; l++) {
        State at = state_layer(s, c, l);
        for (int var = 0; var < 2; var++) {
            const char* norm[2][2] = {{"layers.%d.mega.timenorm.mean", "layers.%d.mega.timenorm.var"},
                                      {"output.final_norm.mean", "output.final_norm.var"}};
            for (size_t i = 0; i < B * G; i++) { x[i] = var ? at.norm[i].var : at.norm[i].mean; }
            check(d, layer_name(name, "dstate.", norm[l == c->num_layers][var], l), x, 1, FIRST_RANK, B * G, floor,
                  grad_bound);
        }
        if (l == c->num_layers) { break; }
        for (int k = 0; k < named; k++) {
            check(d, layer_name(name, "dstate.", specs[k].name, l), (&at.h)[k], 1, FIRST_RANK, specs[k].size, floor,
                  grad_bound);
        }
    }
    free(x);
}

// ---------------------------------------------------------------------------------------------------------------------
// What runs the model. The test reads host memory: on a GPU, the calls below copy what they make to the same arrays.

typedef struct { Model m; Pass s; State start, dstart; const State* past; } Host; // past: &start or NULL

#ifdef GPU
static Gpu gpu;
// Copies tensors between an arena of the device and a Model of the CPU.
template <typename X> void model_copy(const ModelOf<X>* m, float* arena, Params host, bool to_host) {
    for (int i = 0; i < NUM_PARAMS; i++) {
        for (int l = 0; m->specs[i].size && l < m->specs[i].slots; l++) {
            tensor_copy(m, arena, i, l, ((float**)&host)[i] + l * m->specs[i].size, to_host);
        }
    }
}
// Copies what is carried between a State of the CPU and one of the GPU.
template <typename X> void state_copy(Gpu& gpu, StateOf<X>* s, State* host, bool to_host) {
    gpu_sync(&gpu);
    CUDA(cudaMemcpy(to_host ? host->norm : s->norm, to_host ? s->norm : host->norm, s->bytes, cudaMemcpyDefault));
    if (to_host) { host->pos = s->pos; } else { s->pos = host->pos; }
}
// Activation i of layer l, or with grads its gradient, in the CPU's layout: (B,T,...) floats. False if it is not there.
template <typename X> bool pass_fetch(Gpu& gpu, const PassOf<X>* s, const Config* c, int i, int l, bool grads,
        float* out) {
    const ActPlace* p = grads ? &s->dplaces[i] : &s->places[i];
    Spec specs[NUM_ACTS];
    if (!p->pitch) { return false; }
    act_specs(specs, c, 1, KEEP_ALL);
    size_t BT = (size_t)s->B * s->T, n = specs[i].size, bytes = act_is_float(i) ? sizeof(float) : sizeof(X);
    bool head_major = i == A_q || i == A_k || i == A_v || i == A_attention || i == A_attention_lse || i > A_losses;
    int H = head_major ? c->num_heads : 1;
    void* raw = xcalloc(BT * n, bytes);
    gpu_sync(&gpu);
    CUDA(cudaMemcpy2D(raw, n * bytes, (grads ? s->grads : s->acts) + p->offset + l * p->step, p->pitch * bytes,
                      n * bytes, BT, cudaMemcpyDeviceToHost));
    for (size_t k = 0; k < BT * n; k++) { // from head-major, or with H = 1 as it is
        size_t d = n / H, b = k / (s->T * n), t = k / n % s->T, h = k % n / d;
        size_t at = ((b * H + h) * s->T + t) * d + k % d;
        out[k] = act_is_float(i) ? ((float*)raw)[at] : to_float(((X*)raw)[at]);
    }
    free(raw);
    return true;
}
// The same for all activations or gradients of a Pass of the CPU, as far as they are there.
template <typename X> void pass_copy(Gpu& gpu, const PassOf<X>* s, const Config* c, Acts host, const Spec* specs,
        bool grads) {
    for (int i = 0; i < NUM_ACTS; i++) {
        for (int l = 0; specs[i].size && l < specs[i].slots; l++) {
            pass_fetch(gpu, s, c, i, l, grads, ((float**)&host)[i] + l * specs[i].size);
        }
    }
}
// Sum of the losses in nats, see the CPU's; waits for the GPU.
template <typename X> double model_loss(Gpu& gpu, const ModelOf<X>* m, PassOf<X>* s, const int* targets,
        size_t* scored, float dloss = 0) {
    model_losses(gpu, m, s, targets, dloss, m->sums);
    for (size_t r = 0; r < (size_t)s->B * s->T; r++) { *scored += targets[r] != IGNORE; }
    gpu_sync(&gpu);
    return m->sums[0];
}

template <typename X> struct Run { Host host; ModelOf<X> m; PassOf<X> s; StateOf<X> start, dstart, *past; };

// After host's weights and past are set. KEEP_BLOCKS: of a copy of a run that is open, whose model it shares.
template <typename X> void run_open(Run<X>* r, int keep) {
    const Config* c = &r->host.m.config;
    size_t range[2];
    if (keep == KEEP_ALL) {
        model_alloc(gpu, &r->m, c, true);
        for (int i = 0; i < NUM_PARAMS; i++) {
            for (int l = 0; r->m.specs[i].size && l < r->m.specs[i].slots; l++) {
                float* w = ((float**)&r->host.m.params)[i] + l * r->m.specs[i].size;
                model_copy_row(gpu, &r->m, WEIGHTS, i, l, w, false, range);
            }
        }
    }
    pass_alloc(gpu, &r->s, c, r->host.s.B, r->host.s.T, keep, keep == KEEP_ALL ? KEEP_ALL : KEEP_NONE);
    state_alloc(gpu, &r->start, c, r->host.s.B, false);
    state_alloc(gpu, &r->dstart, c, r->host.s.B, false);
    state_copy(gpu, &r->start, &r->host.start, false);
    r->past = r->host.past ? &r->start : NULL;
}
template <typename X> void run_close(Run<X>* r) {
    if (r->s.keep == KEEP_ALL) { model_free(gpu, &r->m); }
    pass_free(gpu, &r->s);
    state_free(gpu, &r->start);
    state_free(gpu, &r->dstart);
}
// Forward, losses and, where dloss is not 0, the backward pass from dlogits.
template <typename X> double run_pass(Run<X>* r, const int* x, const int* y, float dloss) {
    Host* h = &r->host;
    size_t scored = 0;
    r->s.masks = h->s.masks;
    model_forward<X>(gpu, &r->m, &r->s, x, r->past, NULL);
    double loss = model_loss(gpu, &r->m, &r->s, y, &scored);
    all_sum(&loss, 1);
    if (r->s.keep == KEEP_ALL) { pass_copy(gpu, &r->s, &h->m.config, h->s.acts, h->s.specs, false); }
    if (dloss == 0) { return loss; }
    gpu.accumulate = false;
    model_loss(gpu, &r->m, &r->s, y, &scored, dloss);
    state_reset(gpu, &r->dstart);
    model_backward<X>(gpu, &r->m, &r->s, x, r->past, r->past ? &r->dstart : NULL);
    if (r->s.keep == KEEP_ALL) { pass_copy(gpu, &r->s, &h->m.config, h->s.grads, h->s.dspecs, true); }
    model_copy(&r->m, r->m.grads, h->m.grads, true);
    state_copy(gpu, &r->dstart, &h->dstart, true);
    return loss;
}
template <typename X> double run_update(Run<X>* r, const Options* o, double lr, int step) {
    for (int part = r->m.parts - 1; ranks.count > 1 && part >= 0; part--) { part_reduce(gpu, &r->m, part); }
    double norm = model_grad_norm(gpu, &r->m);
    AdamW adamw = adamw_of(o, lr);
    model_update(gpu, &r->m, &adamw, step, clip_scale(norm, o->clip));
    if (ranks.count == 1) { model_copy(&r->m, r->m.params, r->host.m.params, true); return norm; }
    stream_after(gpu, gpu.stream, gpu.exchange_stream);
    for (int i = 0; sizeof(X) == 4 && i < NUM_PARAMS; i++) {
        float* arena = param_is_float(i) ? r->m.params : (float*)r->m.weights;
        for (int l = 0; r->m.specs[i].size && l < r->m.specs[i].slots; l++) {
            float* w = ((float**)&r->host.m.params)[i] + l * r->m.specs[i].size;
            tensor_copy(&r->m, arena, i, l, w, true);
        }
    }
    return norm;
}
template <typename X> struct RunStream { PassOf<X> pass; StateOf<X> state; };
template <typename X> void run_stream_open(Run<X>* r, RunStream<X>* s, int B) {
    const Config* c = &r->host.m.config;
    pass_alloc(gpu, &s->pass, c, B, c->chunk_size, KEEP_NONE, KEEP_NONE);
    state_alloc(gpu, &s->state, c, B, true);
    if (r->past) { state_copy(gpu, &s->state, &r->host.start, false); }
}
template <typename X> void run_stream_close(RunStream<X>* s) {
    pass_free(gpu, &s->pass);
    state_free(gpu, &s->state);
}
// Logits (B,T,vocab) of a piece of T tokens.
template <typename X> void run_stream(Run<X>* r, RunStream<X>* s, const int* tokens, int T, float* logits) {
    s->pass.T = T;
    model_forward<X>(gpu, &r->m, &s->pass, tokens, &s->state, &s->state);
    pass_fetch(gpu, &s->pass, &r->host.m.config, A_logits, 0, false, logits);
}
#define RUN Run<X>
#define RUN_STREAM RunStream<X>
#define FOR_EITHER_TYPE template <typename X>
#else
typedef struct { Host host; Pass* s; } Run;
void run_open(Run* r, int keep) {
    Host* h = &r->host;
    r->s = &h->s;
    if (keep == KEEP_ALL) { return; }
    r->s = (Pass*)xcalloc(1, sizeof(Pass));
    pass_alloc(r->s, &h->m.config, h->s.B, h->s.T, keep, KEEP_NONE);
}
void run_close(Run* r) {
    if (r->s == &r->host.s) { return; }
    pass_free(r->s);
    free(r->s);
}
double run_pass(Run* r, const int* x, const int* y, float dloss) {
    Host* h = &r->host;
    size_t scored = 0;
    r->s->masks = h->s.masks;
    model_forward(&h->m, r->s, x, h->past, NULL);
    double loss = model_loss(&h->m, r->s, y, &scored);
    all_sum(&loss, 1);
    memset(h->m.grads.embed, 0, h->m.num_parameters * sizeof(float));
    if (dloss != 0) { model_backward(&h->m, r->s, x, y, dloss, h->past, &h->dstart); }
    return loss;
}
double run_update(Run* r, const Options* o, double lr, int step) {
    double norm = model_grad_norm(&r->host.m);
    AdamW adamw = adamw_of(o, lr);
    model_update(&r->host.m, &adamw, step, clip_scale(norm, o->clip));
    return norm;
}
typedef struct { Pass pass; State state; } RunStream;
void run_stream_open(Run* r, RunStream* s, int B) {
    const Config* c = &r->host.m.config;
    const State* past = r->host.past;
    pass_alloc(&s->pass, c, B, c->chunk_size, KEEP_NONE, KEEP_NONE);
    state_alloc(&s->state, c, B, true);
    if (past) { memcpy(s->state.norm, past->norm, past->bytes); }
}
void run_stream_close(RunStream* s) { pass_free(&s->pass); state_free(&s->state); }
void run_stream(Run* r, RunStream* s, const int* tokens, int T, float* logits) {
    s->pass.T = T;
    model_forward(&r->host.m, &s->pass, tokens, &s->state, &s->state);
    memcpy(logits, s->pass.acts.logits, sizeof(float) * s->pass.B * T * r->host.m.config.vocab_size);
}
#define RUN Run
#define RUN_STREAM RunStream
#define FOR_EITHER_TYPE
#endif

// Logits (B,S,vocab) of x (B,T) fed through a cache: `first` tokens in pieces of a chunk, then one by one. To be freed.
FOR_EITHER_TYPE float* stream_logits(RUN* r, const int* x, int B, int T, int S, int first) {
    const Config* c = &r->host.m.config;
    size_t vocab = c->vocab_size;
    float* logits = (float*)xcalloc(B * S * vocab, sizeof(float));
    float* out = (float*)xcalloc(B * c->chunk_size * vocab, sizeof(float));
    int* piece = (int*)xcalloc((size_t)B * c->chunk_size, sizeof(int));
    RUN_STREAM s;
    run_stream_open(r, &s, B);
    for (int t = 0, n; t < S; t += n) {
        n = t < first ? min_int(c->chunk_size, first - t) : 1;
        for (int b = 0; b < B; b++) { memcpy(piece + b * n, x + (size_t)b * T + t, n * sizeof(int)); }
        run_stream(r, &s, piece, n, out);
        for (int b = 0; b < B; b++) {
            memcpy(logits + (b * S + t) * vocab, out + b * n * vocab, sizeof(float) * n * vocab);
        }
    }
    run_stream_close(&s);
    free(piece);
    free(out);
    return logits;
}

// Over all ranks, for every rank.
void sum_gradients(Model* m) {
    parts_exchange(m->grads.embed, m->num_parameters, true);
    parts_exchange(m->grads.embed, m->num_parameters, false);
}

double meta_number(const SafeTensors* st, const char* key, double missing) {
    const char* text = safetensors_meta(st, key);
    char* end;
    double x = text ? strtod(text, &end) : missing;
    if (text && (end == text || *end || !isfinite(x))) { die("%s: %s \"%s\": expected a number", st->path, key, text); }
    return x;
}

FOR_EITHER_TYPE void test_dump(const char* path, const char* broken) {
    Dump dump, *d = &dump;
    Options o = default_options;
    bool given[NUM_OPTIONS] = {0};
    char name[128];
    int checked = num_checked, failed = num_failed;
    safetensors_open(&d->st, path);
    d->broken = broken;
    d->used = (bool*)xcalloc(d->st.num_tensors + 1, sizeof(bool));
    options_from_file(&o, &d->st, given, true); // all: rates of dropout and its seed too
    config_check(&o.model);
    const Config* c = &o.model;
    const Tensor* shape = safetensors_find(&d->st, "x");
    if (!shape || shape->num_dims != 2) { die("%s: no tensor 'x' (B,T)", path); }
    int B = d->B = shape->dims[0], T = slice_length(shape->dims[1], c->chunk_size), vocab = c->vocab_size;
    int *x = dump_tokens(d, "x", B, T, vocab), *y = dump_tokens(d, "y", B, T, vocab);
    size_t rows = (size_t)B * T;
    double scored = 0;
    for (size_t i = 0; i < rows; i++) { scored += y[i] != IGNORE; }
    all_sum(&scored, 1);
    if (verbose) { printf("%s: %d layers, (B,T) = (%d,%zu)\n", path, c->num_layers, B, shape->dims[1]); }

    RUN run, again;
    Model* m = &run.host.m;
    Pass* s = &run.host.s;
    State *start = &run.host.start, *dstart = &run.host.dstart;
    model_alloc(m, c, true);
    pass_alloc(s, c, B, T, KEEP_ALL, KEEP_ALL);
    state_alloc(start, c, B, false);
    state_alloc(dstart, c, B, false);
    for (int i = 0; i < NUM_PARAMS; i++) {
        for (int l = 0; m->specs[i].size && l < m->specs[i].slots; l++) {
            double* w = dump_read(d, layer_name(name, "param.", m->specs[i].name, l), m->specs[i].size);
            if (!w) { die("%s: tensor '%s' is missing", path, name); }
            float* to = ((float**)&m->params)[i] + l * m->specs[i].size;
            for (size_t k = 0; k < m->specs[i].size; k++) { to[k] = w[k]; }
            free(w);
        }
    }
    run.host.past = read_state(d, c, start) ? start : NULL;
    s->masks = masks_of(&o);
    bool drops = o.dropout > 0 || o.hidden_dropout > 0 || o.attention_dropout > 0; // streams never do
    run_open(&run, KEEP_ALL);

    // Forward, then streaming: from the dump, and against the one-shot logits in chunks and token by token.
    float loss = run_pass(&run, x, y, 0) / scored;
    check_acts(d, "act.", c, s->specs, &s->acts, 1 / embedding_scale(c), 0, act_bound);
    check(d, "logits", s->acts.logits, 1, SLICE, rows * vocab, 0, act_bound);
    check(d, "losses", s->acts.losses, 1, SLICE, rows, 0, act_bound);
    check(d, "loss", &loss, 1, WHOLE, 1, 0, act_bound);
    double* one_shot = (double*)xcalloc(rows * vocab, sizeof(double));
    for (size_t i = 0; i < rows * vocab; i++) { one_shot[i] = s->acts.logits[i]; }
    // One rank alone holds the whole past, so ranks with slices do not stream; and a stream never drops.
    int skipped = ranks.slices > 1 || drops ? 2 : 0;
    const char* ways[3] = {"logits, token by token", "logits, chunk by chunk", "logits, token by token, one row alone"};
    for (int way = 0; !skipped && way < (run.host.past ? 2 : 3); way++) {
        int alone = way == 2 ? 1 : B;
        float* got = stream_logits(&run, x, alone, T, T, way == 1 ? T : 0);
        compare(ways[way], got, one_shot, alone * T * vocab, 0, act_bound);
        free(got);
    }
    free(one_shot);
    const Tensor* stream = safetensors_find(&d->st, "stream_logits");
    if (stream && !skipped && stream->num_dims == 3 && stream->dims[1] <= (size_t)T) {
        int S = stream->dims[1];
        float* got = stream_logits(&run, x, B, T, S, min_int(S, c->chunk_size));
        check(d, "stream_logits", got, 1, WHOLE, (size_t)B * S * vocab, 0, act_bound);
        free(got);
    }

    // Backward, and the same with blocks computed again: to the bit.
    run_pass(&run, x, y, 1.0 / scored);
    sum_gradients(m);
    check_acts(d, "dact.", c, s->dspecs, &s->grads, embedding_scale(c), gradient_floor(d, "dact."), grad_bound);
    check_params(d, "grad.", m, &m->grads, gradient_floor(d, "grad."), grad_bound);
    check_dstate(d, c, dstart);
    size_t bytes = m->num_parameters * sizeof(float);
    float* kept = (float*)memcpy(xcalloc(m->num_parameters, sizeof(float)), m->grads.embed, bytes);
    again = run;
    run_open(&again, KEEP_BLOCKS);
    run_pass(&again, x, y, 1.0 / scored);
    sum_gradients(m);
    verdict("grad, recomputed", memcmp(kept, m->grads.embed, bytes) ? 1 : 0, 0, "");
    run_close(&again);
    free(kept);

    // Training on the same batch.
    int steps = meta_number(&d->st, "train_steps", 0);
    o.weight_decay = meta_number(&d->st, "weight_decay", 0);
    o.beta1 = meta_number(&d->st, "beta1", o.beta1);
    o.beta2 = meta_number(&d->st, "beta2", o.beta2);
    o.adam_eps = meta_number(&d->st, "adam_eps", o.adam_eps);
    o.clip = meta_number(&d->st, "grad_clip", 0);
    float *losses = (float*)xcalloc(steps, sizeof(float)), *norms = (float*)xcalloc(steps, sizeof(float));
    for (int i = 0; i < steps; i++) {
        s->masks.first = (uint64_t)i * B;
        losses[i] = run_pass(&run, x, y, 1.0 / scored) / scored;
        norms[i] = run_update(&run, &o, meta_number(&d->st, "learning_rate", 0), i + 1);
    }
    check(d, "train_losses", losses, 1, WHOLE, steps, 0, train_bound);
    if (!bf16_run) { check(d, "train_gnorms", norms, 1, WHOLE, steps, 0, train_bound); }
    if (steps && !bf16_run) { check_final(d, m, &m->params); }

    const Tensor* target = broken ? safetensors_find(&d->st, broken) : NULL;
    if (broken && (!target || !d->used[target - d->st.tensors])) { die("--break %s: it is not checked", broken); }
    for (int i = 0; i < d->st.num_tensors; i++) { skipped += !d->used[i]; }
    summary(path, checked, failed, skipped);
    free(losses);
    free(norms);
    free(x);
    free(y);
    free(d->used);
    run_close(&run);
    model_free(m);
    pass_free(s);
    state_free(start);
    state_free(dstart);
    safetensors_close(&d->st);
}

void test_file(const char* path, const char* broken) {
#ifdef GPU
    if (bf16_run) { test_dump<bf16>(path, broken); } else { test_dump<float>(path, broken); }
#else
    test_dump(path, broken);
#endif
}

// Gradients of two runs by their first moments after the first step, or, given where both began, their weights.
void test_checkpoints(const char* paths[3]) {
    Dump dumps[3];
    double all[2] = {0, 0};
    int files = paths[2] ? 3 : 2;
    for (int f = 0; f < files; f++) {
        memset(&dumps[f], 0, sizeof(dumps[f]));
        safetensors_open(&dumps[f].st, paths[f]);
        dumps[f].used = (bool*)xcalloc(dumps[f].st.num_tensors, sizeof(bool));
    }
    double floor = gradient_floor(&dumps[1], "adam_m.");
    for (int i = 0; i < dumps[1].st.num_tensors; i++) {
        const Tensor* t = &dumps[1].st.tensors[i];
        if (files == 2 ? strncmp(t->name, "adam_m.", 7) : !strncmp(t->name, "adam_", 5)) { continue; }
        const Tensor* other = safetensors_find(&dumps[0].st, t->name);
        if (!other || other->size != t->size) { die("%s has no tensor '%s' of this size", paths[0], t->name); }
        float* got = (float*)xcalloc(t->size, sizeof(float));
        double* expected = dump_read(&dumps[1], t->name, t->size);
        double* start = files == 3 ? dump_read(&dumps[2], t->name, t->size) : NULL;
        tensor_read(&dumps[0].st, other, got);
        if (start) { compare_moved(t->name, got, expected, start, t->size, all); }
        else { compare(t->name, got, expected, t->size, floor, grad_bound); }
        free(got); free(expected); free(start);
    }
    if (files == 3) { verdict("all together", sqrt(all[0] / all[1]), final_all_bound, ""); }
    for (int f = 0; f < files; f++) { safetensors_close(&dumps[f].st); free(dumps[f].used); }
}

// ---------------------------------------------------------------------------------------------------------------------
// 10 million timesteps of data with mean 10 and variance 1, in pieces; the last outputs against float64 recurrences.
void test_long(void) {
    enum { D = 16, G = 2, N = 16, PIECE = 1000, PIECES = 10000 };
    static float x[PIECE * D], out[PIECE * D], mean[PIECE * G], rstd[PIECE * G], h[D * N * 2];
    static float w[D], b[D], alpha[D * N], delta[D * N], theta[D], gamma[D * N * 2], omega[D];
    static double expected[2][PIECE * D], h64[D][N][2], q[D][N][2], p[D][N], sum[G], sum2[G];
    NormState state[G] = {{0, 0, 0}};
    CemaParams cema = {alpha, delta, theta, gamma, omega};
    Config config = default_options.model;
    config.model_dim = D; config.norm_num_groups = G;
    for (int d = 0; d < D; d++) {
        w[d] = random_normal(1, 0, d, INFINITY);
        b[d] = random_normal(1, 1, d, INFINITY);
        theta[d] = random_normal(1, 2, d, INFINITY);
        omega[d] = random_normal(1, 3, d, INFINITY);
        for (int k = 0; k < N; k++) {
            int i = d * N + k;
            alpha[i] = random_normal(1, 4, i, INFINITY);
            delta[i] = random_normal(1, 5, i, INFINITY) - 2; // slow decay: long memory
            gamma[2 * i] = random_normal(1, 6, i, INFINITY);
            gamma[2 * i + 1] = random_normal(1, 7, i, INFINITY);
            double angle = 2 * M_PI * (k + 1) / N * sigmoid(theta[d]);
            p[d][k] = sigmoid(alpha[i]);
            q[d][k][0] = (1 - p[d][k] * sigmoid(delta[i])) * cos(angle);
            q[d][k][1] = (1 - p[d][k] * sigmoid(delta[i])) * sin(angle);
        }
    }
    for (int piece = 0; piece < PIECES; piece++) {
        for (int i = 0; i < PIECE * D; i++) { x[i] = 10 + random_normal(2, piece, i, INFINITY); }
        timestepnorm_forward(out, mean, rstd, state, piece ? state : NULL, x, w, b, 1, PIECE, &config);
        for (int t = 0; t < PIECE; t++) {
            for (int g = 0; g < G; g++) { // sums about 10, where nothing cancels
                for (int i = g * D / G; i < (g + 1) * D / G; i++) {
                    sum[g] += x[t * D + i] - 10.0;
                    sum2[g] += (x[t * D + i] - 10.0) * (x[t * D + i] - 10.0);
                }
                double n = ((double)piece * PIECE + t + 1) * (D / G), m = sum[g] / n, v = sum2[g] / n - m * m;
                for (int i = g * D / G; i < (g + 1) * D / G; i++) {
                    expected[0][t * D + i] = (x[t * D + i] - 10.0 - m) / sqrt(v + 1e-5) * (w[i] + 1.0) + b[i];
                }
            }
            for (int d = 0; d < D; d++) {
                double y = omega[d] * (double)x[t * D + d];
                for (int k = 0; k < N; k++) {
                    double re = h64[d][k][0], im = h64[d][k][1];
                    h64[d][k][0] = q[d][k][0] * re - q[d][k][1] * im + p[d][k] * x[t * D + d];
                    h64[d][k][1] = q[d][k][0] * im + q[d][k][1] * re;
                    const float* g = gamma + 2 * (d * N + k);
                    y += (g[0] * h64[d][k][0] - g[1] * h64[d][k][1]) / sqrt((double)N);
                }
                expected[1][t * D + d] = y;
            }
        }
        if (piece == PIECES - 1) { compare("timestepnorm after 10^7 timesteps", out, expected[0], PIECE * D, 0, 1e-5); }
        cema_forward(out, h, h, x, cema, 1, PIECE, D, N);
    }
    compare("cema after 10^7 timesteps", out, expected[1], PIECE * D, 0, 1e-5);
}

// ---------------------------------------------------------------------------------------------------------------------
// Masks of dropout: the right share of ones is dropped, the rest grows, no mask knows of another or of its own elements
// elsewhere (correlations, in standard deviations), and the mask of a part is that part of the whole's.
enum { DROP_B = 4, DROP_T = 300, DROP_N = 130, DROP_ROW = DROP_T * DROP_N, DROP_SIZE = DROP_B * DROP_ROW };

float* dropped_ones(Masks m, int l, int site, int B, int T, int time) { // (B,T,DROP_N)
    Dropouts d = dropouts_at(m, T, l);
    float* x = (float*)xcalloc((size_t)B * T * DROP_N, sizeof(float));
    for (int i = 0; i < B * T * DROP_N; i++) { x[i] = 1; }
    ((Dropout*)&d)[site].time = time;
    dropout(x, x, NULL, ((Dropout*)&d)[site], (size_t)B * T, DROP_N);
    return x;
}

void test_dropout(void) {
    const double p = 0.25;
    const int shifts[] = {1, 2, 3, 4, DROP_N - 1, DROP_N, DROP_ROW};
    Masks m = {{p, p, p}, 1337, 1000}, other[5] = {m, m, m, m, m}, part = m;
    other[0].seed++; other[1].first += DROP_B; // another run, later sequences
    part.first += 2;
    for (int site = 0; site < 7; site++) {
        float *x = dropped_ones(m, 0, site, DROP_B, DROP_T, 0), *y = dropped_ones(part, 0, site, 1, 50, 100);
        float kept = site < 6 ? 1 / (1 - p) : 1, dropped = site < 6 ? 0 : -INFINITY;
        int count = 0, wrong = 0;
        for (int i = 0; i < DROP_SIZE; i++) { count += x[i] == dropped; wrong += x[i] != dropped && x[i] != kept; }
        for (int i = 0; i < 50 * DROP_N; i++) { wrong += y[i] != x[2 * DROP_ROW + 100 * DROP_N + i]; }
        free(y);
        double share = fabs(count - p * DROP_SIZE) / sqrt(p * (1 - p) * DROP_SIZE), worst = 0;
        for (int k = 0; k < 12; k++) { // itself, shifted; the others; a later slice; another layer; another site
            int shift = k < 7 ? shifts[k] : 0, time = k == 9 ? DROP_T : 0;
            y = k < 7 ? x : dropped_ones(other[k - 7], k == 10, (site + (k == 11)) % 7, DROP_B, DROP_T, time);
            double sum = 0;
            for (int i = 0; i + shift < DROP_SIZE; i++) { sum += ((x[i] <= 0) - p) * ((y[i + shift] <= 0) - p); }
            worst = fmax(worst, fabs(sum) / (p * (1 - p) * sqrt(DROP_SIZE - shift)));
            if (k >= 7) { free(y); }
        }
        verdict(text_of("dropout: site %d, values and the mask of a part", site), wrong, 0, "");
        verdict(text_of("dropout: site %d, share", site), share, 4, "");
        verdict(text_of("dropout: site %d, correlations", site), worst, 4, "");
        free(x);
    }
}

// The flags, in any order, as "--flag value" or "--flag=value"; all other words are files.
enum { PRECISION, CHUNK_PARALLEL, BREAK, LONG, COMPARE, VERBOSE, HELP, NUM_FLAGS };
static const struct { const char *name, *value, *help; } flags[NUM_FLAGS] = {
    {"--precision", "bf16|fp32", "of the GPU program (bf16)"},
    {"--chunk-parallel", "P", "under mpirun: each of P processes runs and checks a slice of the sequences"},
    {"--break", "NAME", "change this tensor of the dump first: the test must fail"},
    {"--long", NULL, "timestep norm and CEMA streamed over 10 million timesteps, against float64"},
    {"--compare", NULL, "the files are checkpoints A and B, and maybe the one that both began from"},
    {"-v", NULL, "a line for each tensor also of the dumps in data/reference"},
    {"--help", NULL, "print this; also -h"},
};

void flags_parse(const char* values[NUM_FLAGS], const char** files, int* num_files, int argc, char** argv) {
    for (int a = 1; a < argc; a++) {
        const char* word = strcmp(argv[a], "-h") ? argv[a] : "--help";
        size_t n = strcspn(word, "=");
        int f = 0;
        if (*word != '-') { files[(*num_files)++] = word; continue; }
        while (f < NUM_FLAGS && (strlen(flags[f].name) != n || strncmp(flags[f].name, word, n))) { f++; }
        if (f == NUM_FLAGS) { die("unknown option \"%s\": --help lists all of them", word); }
        if (values[f]) { die("%s stands twice", flags[f].name); }
        if (!flags[f].value && word[n]) { die("%s takes no value", flags[f].name); }
        if (flags[f].value && !word[n] && a + 1 == argc) { die("%s needs a value", flags[f].name); }
        values[f] = !flags[f].value ? "1" : word[n] ? word + n + 1 : argv[++a];
    }
    if (!values[HELP]) { return; }
    printf("usage: test_megalodon [--flag value]... [FILE]...\n"
           "Compares with dumps; without a FILE, with those in data/reference, and tests the masks of dropout.\n\n");
    for (int f = 0; f < NUM_FLAGS; f++) {
        printf("  %-30s %s\n", text_of("%s %s", flags[f].name, flags[f].value ? flags[f].value : ""), flags[f].help);
    }
    exit(0);
}

int main(int argc, char** argv) {
    const char *values[NUM_FLAGS] = {NULL}, **files = (const char**)xcalloc(argc, sizeof(char*)), *paths[3] = {NULL};
    int num_files = 0;
    ranks_open();
    flags_parse(values, files, &num_files, argc, argv);
    verbose = values[VERBOSE] || num_files || values[LONG];
    int slices = values[CHUNK_PARALLEL] ? atoi(values[CHUNK_PARALLEL]) : 1;
    const char* precision = values[PRECISION] ? values[PRECISION] : "bf16";
    bf16_run = !strcmp(precision, "bf16");
    if (!bf16_run && strcmp(precision, "fp32")) { die("--precision %s: expected bf16 or fp32", precision); }
    if (slices != ranks.count) { die("--chunk-parallel %d: %d processes were started", slices, ranks.count); }
    ranks_group(slices);
#ifdef GPU
    if (bf16_run) { act_bound = 3e-2; grad_bound = train_bound = 2e-3; }
    device_open(&gpu);
    ranks_connect(&gpu);
#else
    if (values[PRECISION]) { die("--precision: the CPU program computes in fp32"); }
    bf16_run = false;
#endif
    if (values[LONG]) { test_long(); }
    else if (values[COMPARE]) {
        if (num_files < 2 || num_files > 3) { die("--compare needs two or three files, not %d", num_files); }
        for (int i = 0; i < num_files; i++) { paths[i] = files[i]; }
        test_checkpoints(paths);
    } else if (num_files == 0) {
        glob_t found;
        if (values[BREAK]) { die("--break needs a file"); }
        test_dropout();
        summary("masks of dropout", 0, 0, 0);
        if (glob("data/reference/*.safetensors", 0, NULL, &found)) { die("data/reference holds no dumps"); }
#ifdef PROGRAM
        if (glob("dev/gecko/reference/*.safetensors", GLOB_APPEND, NULL, &found)) { die("no dumps of Gecko"); }
#endif
        for (size_t i = 0; i < found.gl_pathc; i++) { test_file(found.gl_pathv[i], NULL); }
        globfree(&found);
    } else {
        for (int i = 0; i < num_files; i++) { test_file(files[i], values[BREAK]); }
    }
    free(files);
    printf("%d tensors checked, %d failed\n", num_checked, num_failed);
    printf("overall okay: %d\n", num_failed == 0 && num_checked > 0);
    return num_failed || !num_checked;
}
