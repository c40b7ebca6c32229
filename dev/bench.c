// Speed on this machine, as ratios taken in one run: matrix products against OpenBLAS, a training step against PyTorch,
// and the cost of a token in short and long sequences. `make bench` builds it (with -DOPENBLAS if that links), runs it:
//     dev/bin/bench PYTHON
#define TESTING
#include "../train_megalodon.c"
#ifdef OPENBLAS
#include <cblas.h>
#endif

double median(double* x, int n) {
    for (int i = 0; i < n; i++) {
        for (int j = i + 1; j < n; j++) {
            if (x[j] < x[i]) { double t = x[i]; x[i] = x[j]; x[j] = t; }
        }
    }
    return x[n / 2];
}

// The three products of a linear layer, [512x1024] x [1024x2048]: out, dinp, dweight. Rounds of ours, then theirs,
// with a pause between, because each library's threads spin for a while after its last product.
void bench_matmul(void) {
    enum { M = 512, K = 1024, N = 2048, ROUNDS = 5, RUNS = 6, WARM = 2 };
    const char* names[3] = {"forward", "dinp", "dweight"};
    float *inp = (float*)xcalloc(M * K, 4), *weight = (float*)xcalloc(N * K, 4), *out = (float*)xcalloc(M * N, 4);
    float *dinp = (float*)xcalloc(M * K, 4), *dweight = (float*)xcalloc(N * K, 4);
    for (int i = 0; i < M * K; i++) { inp[i] = random_normal(1, 0, i, INFINITY); }
    for (int i = 0; i < N * K; i++) { weight[i] = random_normal(1, 1, i, INFINITY); }
    for (int form = 0; form < 3; form++) {
        double times[2][ROUNDS * (RUNS - WARM)], rate[2];
        int n[2] = {0, 0}, contestants = 1;
#ifdef OPENBLAS
        contestants = 2;
#endif
        for (int i = 0; i < M * N; i++) { out[i] = random_normal(1, 2, i, INFINITY); }
        for (int r = 0; r < ROUNDS * contestants * RUNS; r++) {
            int who = r / RUNS % contestants;
            if (r % RUNS == 0) { usleep(200000); }
            double t0 = seconds();
            if (who == 0 && form == 0) { gemm(out, N, inp, K, 1, weight, 1, K, M, N, K, NULL, NULL); }
            if (who == 0 && form == 1) { gemm(dinp, K, out, N, 1, weight, K, 1, M, K, N, NULL, NULL); }
            if (who == 0 && form == 2) { gemm(dweight, K, out, 1, N, inp, K, 1, N, K, M, dweight, NULL); }
#ifdef OPENBLAS
            const enum CBLAS_ORDER R = CblasRowMajor;
            const enum CBLAS_TRANSPOSE T = CblasTrans, F = CblasNoTrans;
            if (who == 1 && form == 0) { cblas_sgemm(R, F, T, M, N, K, 1, inp, K, weight, K, 0, out, N); }
            if (who == 1 && form == 1) { cblas_sgemm(R, F, F, M, K, N, 1, out, N, weight, K, 0, dinp, K); }
            if (who == 1 && form == 2) { cblas_sgemm(R, T, F, N, K, M, 1, out, N, inp, K, 1, dweight, K); }
#endif
            if (r % RUNS >= WARM) { times[who][n[who]++] = seconds() - t0; }
        }
        for (int who = 0; who < contestants; who++) { rate[who] = 2e-9 * M * N * K / median(times[who], n[who]); }
        printf("matmul %-8s %6.1f GFLOP/s", names[form], rate[0]);
        if (contestants == 2) { printf("   OpenBLAS %6.1f   ratio %.2f (wanted: 0.70)\n", rate[1], rate[0] / rate[1]); }
        else { printf("   (OpenBLAS not found: nothing to compare with)\n"); }
    }
    float* blocks[5] = {inp, weight, out, dinp, dweight};
    for (int i = 0; i < 5; i++) { free(blocks[i]); }
}

// Seconds of a training step, the median of `runs` after one to warm up.
double time_step(Options* o, int runs) {
    Model m;
    Pass pass;
    size_t rows = (size_t)o->batch * o->seq, scored = 0;
    int* tokens = (int*)xcalloc(rows + 1, sizeof(int));
    double times[16] = {0};
    model_alloc(&m, &o->model, true);
    model_init(&m, 1);
    pass_alloc(&pass, &o->model, o->batch, o->seq, KEEP_ALL, KEEP_NONE);
    for (size_t i = 0; i <= rows; i++) { tokens[i] = random_bits(1, 3, i) % o->model.vocab_size; }
    for (int r = -1; r < runs; r++) {
        double t0 = seconds();
        memset(m.grads.embed, 0, m.num_parameters * sizeof(float));
        model_forward(&m, &pass, tokens, NULL, NULL);
        model_loss(&m, &pass, tokens + 1, &scored);
        model_backward(&m, &pass, tokens, tokens + 1, 1.0 / rows, NULL, NULL);
        AdamW adamw = adamw_of(o, 1e-3);
        model_update(&m, &adamw, r + 2, clip_scale(model_grad_norm(&m), 1.0));
        if (r >= 0) { times[r] = seconds() - t0; }
    }
    free(tokens);
    pass_free(&pass);
    model_free(&m);
    return median(times, runs);
}

// 12 layers of width 256, B=4, T=1024, chunk 256: this program and dev/reference.py in turn on the same threads.
void bench_step(const char* python, int threads) {
    Options o = default_options;
    Config c = {12, 256, 1, 128, 512, 512, 256, 8, 16, 256, 10000, 1e-5, 1, 0, 1, 0};
    char command[1024], line[256];
    double ours[3], theirs[3] = {0, 0, 0};
    o.model = c;
    o.batch = 4;
    o.seq = 1024;
    snprintf(command, sizeof(command),
             "%s dev/reference.py bench --layers 12 --dim 256 --num-heads 1 --z-dim 128 --value-dim 512 "
             "--ffn-hidden-dim 512 --chunk-size 256 --norm-num-groups 8 --cema-ndim 16 --vocab-size 256 --swiglu 1 "
             "--share-emb 1 --batch 4 --seq 1024 --warmup 1 --steps 3 --threads %d 2>/dev/null", python, threads);
    for (int r = 0; r < 3; r++) {
        FILE* f = popen(command, "r");
        while (f && fgets(line, sizeof(line), f)) { sscanf(line, "reference.py: step %lf ms", &theirs[r]); }
        if (f) { pclose(f); }
        ours[r] = 1e3 * time_step(&o, 3);
    }
    double a = median(ours, 3), b = median(theirs, 3);
    printf("training step, 12 layers, D=256, 4 x 1024: %.0f ms", a);
    if (b > 0) { printf("   PyTorch %.0f ms   %.2f times as fast (wanted: 1.5)\n", b, b / a); }
    else { printf("   (%s has no torch and safetensors: nothing to compare with)\n", python); }
}

// The same tokens as 16 sequences of 1024 and as one of 16384: the cost of a token must not grow.
void bench_length(void) {
    Options shorter = default_options, longer = default_options;
    double a[3], b[3];
    shorter.batch = 16;
    shorter.seq = 1024;
    longer.batch = 1;
    longer.seq = 16384;
    for (int r = 0; r < 3; r++) {
        a[r] = time_step(&shorter, 1);
        b[r] = time_step(&longer, 1);
    }
    printf("time per token, tiny: T=1024 %.2f us, T=16384 %.2f us   ratio %.2f (wanted: at most 1.10)\n",
           1e6 * median(a, 3) / 16384, 1e6 * median(b, 3) / 16384, median(b, 3) / median(a, 3));
}

int main(int argc, char** argv) {
    int threads = 1;
#ifdef _OPENMP
    threads = omp_get_max_threads();
#endif
    printf("%d threads\n", threads);
    bench_matmul();
    bench_step(argc > 1 ? argv[1] : "python3", threads);
    bench_length();
    return 0;
}
