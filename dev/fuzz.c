/*
Fuzzes the readers that take files from strangers. libFuzzer's mutations are guided by coverage:

    S="-g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined"
    clang $S dev/fuzz.c -lm -o fuzz_safetensors && clang $S -DTOKENS dev/fuzz.c -lm -o fuzz_tokens
    clang $S -DTOKENIZER dev/fuzz.c -lm -o fuzz_tokenizer
    mkdir corpus
    ./fuzz_safetensors -detect_leaks=0 -close_fd_mask=2 -max_total_time=600 -rss_limit_mb=2048 corpus

The first folder on the command line receives small valid files to start from. (No leak detection: die() ends the
program, so nothing is freed on the way; no stderr: its messages.) Without clang, gcc -DPLAIN mutates the first of them
blindly: ./fuzz_plain ROUNDS 2>/dev/null
*/
#define _GNU_SOURCE // memmem
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
static jmp_buf after_exit; // die() comes back here
static __attribute__((noreturn)) void exit_to_fuzzer(int status) { longjmp(after_exit, status); }
#define exit exit_to_fuzzer
#define strdup(s) ((char*)(s)) // the options live no longer than the file they came from
static void* opened[16]; // what a reader that may die() has taken
static int num_opened = -1; // -1: not counting
static int counted_memalign(void** p, size_t align, size_t size) {
    int error = posix_memalign(p, align, size);
    if (num_opened >= 0 && !error) { opened[num_opened++] = *p; }
    return error;
}
#define posix_memalign counted_memalign
#define TESTING
#include "../train_megalodon.c"
#undef exit

#ifdef TOKENS
// Every token of an accepted file, in two pieces, and a training sequence; errors end in die().
static void read_file(const char* path) {
    Segment s = token_file(path, NULL);
    Dataset d = {NULL, &s, 1, s.end - s.begin, 7, NULL, 0, 0};
    int vocab = 50257, row[4];
    bool fresh;
    size_t half = d.size / 2;
    int* tokens = (int*)malloc((d.size + 1) * sizeof(int)); // exact, so that AddressSanitizer sees one too many
    if (setjmp(after_exit) == 0) {
        if (d.size > 1) { dataset_sample(&d, 1, 2, 3, half, vocab, tokens); }
        dataset_read(&d, half, d.size - half, tokens, vocab);
        dataset_read(&d, 0, half, tokens, vocab);
        dataset_index(&d, 3, vocab);
        for (size_t k = 0; k < d.stretches; k++) { dataset_stretch(&d, k, 1, 2, 3, vocab, row, &fresh); }
    }
    free(tokens); free(d.documents);
}

// Seed k: tokens 7 and 300 as uint16, 7 alone as uint32.
static size_t seed_file(unsigned char* out, int k) {
    const int32_t header[2][256] = {{20240520, 1, 2}, {20240801, 7, 1}};
    memcpy(out, header[k], 1024);
    memcpy(out + 1024, k ? "\x07\x00\x00\x00" : "\x07\x00\x2c\x01", 4);
    return 1028;
}
#elif defined TOKENIZER
// A tokenizer, and with it the encoding of what follows it in the file (after a line "text"), which must be all of the
// text again where that is promised.
static void read_file(const char* path) {
    size_t size;
    unsigned char* file = file_read(path, &size);
    const char* mark = (const char*)memmem(file, size, "\ntext\n", 6);
    size_t head = mark ? (size_t)(mark + 1 - (const char*)file) : size, at = 0;
    if (truncate(path, head)) { abort(); }
    num_opened = 0;
    Tokenizer* t = setjmp(after_exit) == 0 ? tokenizer_open(path) : NULL;
    for (int i = 0; !t && i < num_opened; i++) { free(opened[i]); }
    num_opened = -1;
    Tokens out = {NULL, 0};
    const unsigned char* text = file + min_size(head + 5, size);
    size_t n = file + size - text;
    if (t) { encode(t, text, n, &out); }
    for (size_t i = 0; i < out.count; i++) {
        const TokenPiece* p = &t->piece[out.ids[i]];
        bool exact = !t->collapse && t->byte_piece[0] >= 0;
        if (p->type == 'x' || out.ids[i] == t->eod) { abort(); }
        if (exact && (n - at < (size_t)p->size || memcmp(text + at, p->bytes, p->size))) { abort(); }
        at += p->size;
    }
    if (t && !t->collapse && t->byte_piece[0] >= 0 && at != n) { abort(); }
    free(out.ids); free(file);
    tokenizer_close(t);
}

// Seed k: 0 unigram, 1 bpe, with a text.
static size_t seed_file(unsigned char* out, int k) {
    int n = sprintf((char*)out, "megalodon.c tokenizer 1\nkind %s\npieces 9\neod 1\nunknown 0\nunknown_score -13.5\n"
                    "whitespace %s\nlossless 0\nc 0.0 \"\"\nc 0.0 \"\"\nu 0.0 \"\\x0a\"\nn -1.5 \" a\"\nn -2.5 \"a\"\n"
                    "n -2.25 \"ab\"\nn -3.5 \"b\"\nn -1e1 \"\xc3\xa9\"\nx 0.0 \"cc\"\ntext\n a abba \xc3\xa9\na",
                    k ? "bpe" : "unigram", k ? "collapse" : "keep");
    return n;
}
#else
// The header, the configuration in its metadata, and every value of every tensor of an accepted file.
static void read_file(const char* path) {
    SafeTensors st;
    if (safetensors_try(&st, path)) { return; }
    size_t total = 0;
    for (int i = 0; i < st.num_tensors; i++) {
        const Tensor* t = safetensors_find(&st, st.tensors[i].name);
        if (t != &st.tensors[i]) { abort(); }
        float* values = (float*)malloc(t->size * sizeof(float));
        tensor_read(&st, t, values);
        free(values);
        total += t->end - t->begin;
    }
    if (st.data + total != (size_t)lseek(fileno(st.file), 0, SEEK_END)) { abort(); }
    if (setjmp(after_exit) == 0) {
        Options o = default_options;
        bool given[NUM_OPTIONS] = {0};
        options_from_file(&o, &st, given, true);
        config_check(&o.model);
        Spec spec = {"a", 1, {2, 3, 0}, 6, 0};
        float six[6];
        safetensors_read(&st, "a", &spec, six);
    }
    safetensors_close(&st);
}

// Seed k: one tensor of each dtype, 24 + 2 + 4 + 4 + 8 bytes of data; none at all.
static size_t seed_file(unsigned char* out, int k) {
    const char* header = k ? "{}" :
        "{\"__metadata__\":{\"num_layers\":\"2\",\"norm_eps\":\"1e-5\",\"flag.train\":\"a\\\\b\\\"\"},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
        "\"b\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[24,26]},"
        "\"c\":{\"shape\":[2,1],\"dtype\":\"BF16\",\"data_offsets\":[26,30]},"
        "\"d\":{\"dtype\":\"I32\",\"shape\":[1],\"data_offsets\":[30,34]},"
        "\"e\":{\"dtype\":\"I64\",\"shape\":[1,1,1],\"data_offsets\":[34,42]} }";
    size_t n = strlen(header), data = k ? 0 : 42;
    memset(out, 0, 8 + n + data);
    out[0] = n & 255;
    out[1] = n >> 8;
    memcpy(out + 8, header, n);
    return 8 + n + data;
}
#endif

// The readers take paths, so the input goes through a file, made once. What die() left open is closed.
int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
    static char path[] = "/dev/shm/fuzz-XXXXXX.bin";
    static int file = -1;
    if (file < 0 && (file = mkstemps(path, 4)) < 0) { abort(); }
    if (ftruncate(file, 0) || pwrite(file, data, size, 0) != (ssize_t)size) { abort(); }
    if (setjmp(after_exit) == 0) { read_file(path); }
    for (int fd = file + 1; fd < file + 8; fd++) { close(fd); }
    return 0;
}

#ifdef PLAIN
int main(int argc, char** argv) {
    static unsigned char seed[4096], input[4096];
    size_t size = seed_file(seed, 0);
    for (long round = argc > 1 ? atol(argv[1]) : 100000; round >= 0; round--) {
        memcpy(input, seed, size);
        for (long k = round % 5; k > 0; k--) {
            input[random() % size] = random() % 3 ? "{}[]\",:0189"[random() % 11] : random();
        }
        LLVMFuzzerTestOneInput(input, round % 7 ? size : random() % size);
    }
    return 0;
}
#else
int LLVMFuzzerInitialize(int* argc, char*** argv) {
    unsigned char seed[4096];
    char path[PATH_MAX];
    for (int i = 1; i < *argc; i++) {
        struct stat info;
        if ((*argv)[i][0] == '-' || stat((*argv)[i], &info) || !S_ISDIR(info.st_mode)) { continue; }
        for (int k = 0; k < 2; k++) {
            snprintf(path, sizeof(path), "%s/seed%d", (*argv)[i], k);
            FILE* f = fopen(path, "wb");
            if (f) { fwrite(seed, 1, seed_file(seed, k), f); fclose(f); }
        }
        break;
    }
    return 0;
}
#endif
