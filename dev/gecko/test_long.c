// A million timesteps of Gecko's norm and memory, in pieces, against float64. From the project folder:
//     gcc -O3 -fno-trapping-math -I. dev/gecko/test_long.c -o dev/bin/test_gecko_long -lm && dev/bin/test_gecko_long
#define TESTING
#include "gecko.c"

enum { STEPS = 1000000, D = 16, G = 2, C = 16, S = 8, E = 8, PIECE = 1000 };

static double worst(const float* got, const double* expected, int n) { // max|got - expected| / max|expected|
    double error = 0, largest = 0;
    for (int i = 0; i < n; i++) {
        error = fmax(error, fabs(got[i] - expected[i]));
        largest = fmax(largest, fabs(expected[i]));
    }
    return error / largest;
}

static double norm_error(void) {
    static float x[PIECE * D], out[PIECE * D], mean[PIECE * G], rstd[PIECE * G], zero[D];
    static double expected[PIECE * D], m[G], s[G];
    NormState state[G] = {{0, 0, 0}};
    Config config = default_options.model;
    config.model_dim = D; config.norm_num_groups = G;
    for (int t = 0; t < STEPS; t++) {
        for (int g = 0; g < G; g++) {
            float* now = x + t % PIECE * D + g * D / G;
            double mu = 0, var = 0;
            for (int i = 0; i < D / G; i++) {
                now[i] = 10 + 5 * sin(1e-4 * t) + random_normal(1, t, g * D + i, INFINITY);
                mu += now[i] / (double)(D / G);
            }
            for (int i = 0; i < D / G; i++) { var += (now[i] - mu) * (now[i] - mu) / (D / G); }
            m[g] = 0.999 * m[g] + (1 - 0.999) * mu;
            s[g] = 0.9999 * s[g] + (1 - 0.9999) * var;
            for (int i = 0; i < D / G; i++) {
                double mh = m[g] / (1 - pow(0.999, t + 1.0)), vh = s[g] / (1 - pow(0.9999, t + 1.0));
                expected[t % PIECE * D + g * D / G + i] = (now[i] - mh) / sqrt(vh + config.norm_eps);
            }
        }
        if ((t + 1) % PIECE) { continue; }
        decaynorm_forward(out, mean, rstd, state, state, x, zero, zero, 1, PIECE, &config);
    }
    return worst(out, expected, PIECE * D);
}

static double memory_error(double* lam_error) { // keys at random, values that drift slowly
    static float ak[C * S], v[C * E], M[S * E], memory[8 * C * (S + E) + 4 * S * E];
    static double M64[S * E], lam[S], lam64[S], Fk[C][S], K[C][S], U[C][E], rho[S];
    Merge m = merge_place(memory, C, S, E, E, S, E);
    for (int s = 0; s < S; s++) { lam[s] = lam64[s] = -INFINITY; }
    for (int chunk = 0; chunk < STEPS / C; chunk++) {
        for (int i = 0; i < C * S; i++) { ak[i] = 2 * random_normal(2, chunk, i, INFINITY); }
        for (int i = 0; i < C * E; i++) { v[i] = sin(1e-4 * chunk + i % E) + random_normal(3, chunk, i, INFINITY); }
        memory_merge(&m, M, lam, ak, v);
        for (int t = 0; t < C; t++) {
            double sum = 0;
            for (int s = 0; s < S; s++) { sum += exp((double)ak[t * S + s]); }
            for (int s = 0; s < S; s++) { Fk[t][s] = exp((double)ak[t * S + s]) / sum; }
            for (int e = 0; e < E; e++) {
                U[t][e] = v[t * E + e];
                for (int s = 0; s < S; s++) { U[t][e] -= Fk[t][s] * M64[s * E + e]; }
            }
        }
        for (int s = 0; s < S; s++) {
            double sum = 0;
            for (int t = 0; t < C; t++) { sum += exp((double)ak[t * S + s]); }
            for (int t = 0; t < C; t++) { K[t][s] = exp((double)ak[t * S + s]) / sum; }
            lam64[s] = log(exp(lam64[s]) + sum);
            rho[s] = sum / exp(lam64[s]);
            for (int e = 0; e < E; e++) {
                double W = 0;
                for (int t = 0; t < C; t++) { W += K[t][s] * U[t][e]; }
                M64[s * E + e] += rho[s] * (W - M64[s * E + e]);
            }
        }
    }
    *lam_error = 0;
    for (int s = 0; s < S; s++) { *lam_error = fmax(*lam_error, fabs(lam[s] / lam64[s] - 1)); }
    return worst(M, M64, S * E);
}

int main(void) {
    double lam, norm = norm_error(), memory = memory_error(&lam);
    bool good = norm <= 1e-5 && memory <= 1e-5 && lam <= 1e-5;
    printf("after %d timesteps: norm %.1e, memory %.1e, lam %.1e (bound 1e-5)\noverall okay: %d\n", STEPS, norm, memory,
           lam, good);
    return !good;
}
