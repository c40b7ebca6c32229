/*
Fuzzes the readers of files that come from strangers. libFuzzer's mutations are guided by coverage:

    S="-g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined"
    clang $S dev/fuzz.c -lm -o fuzz_safetensors && clang $S -DTOKENS dev/fuzz.c -lm -o fuzz_tokens
    clang $S -DTOKENIZER dev/fuzz.c -lm -o fuzz_tokenizer
    mkdir corpus
    ./fuzz_safetensors -max_total_time=600 -rss_limit_mb=2048 corpus

The first folder on the command line receives small valid files to start from. A reader that dies does not end the
program: the hook of die() jumps back to the loop before anything is printed, and the memory of the reader is freed.
Without clang, gcc -DPLAIN mutates the first of the valid files blindly: ./fuzz_plain ROUNDS
*/
#define _GNU_SOURCE // memmem
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

// All memory that the headers take is in this list, so that it can be freed after a reader has died.
static void* taken[1 << 12];
static int num_taken;
static void* take(void* p) {
    if (p && num_taken == sizeof(taken) / sizeof(taken[0])) { abort(); }
    if (p) { taken[num_taken++] = p; }
    return p;
}
static void forget(const void* p) {
    for (int i = num_taken - 1; p && i >= 0; i--) {
        if (taken[i] == p) { taken[i] = taken[--num_taken]; return; }
    }
}
static int counted_memalign(void** p, size_t align, size_t size) {
    int error = posix_memalign(p, align, size);
    if (!error) { take(*p); }
    return error;
}
static void* counted_realloc(void* p, size_t size) {
    forget(p);
    return take(realloc(p, size));
}
static void counted_free(void* p) {
    forget(p);
    free(p);
}
#define posix_memalign counted_memalign
#define realloc counted_realloc
#define free counted_free
#include "../data/safetensors.h"
#include "../data/tokens.h"

static jmp_buf after_death;
static void jump_back(bool said) {
    if (!said) { longjmp(after_death, 1); }
}

#ifdef TOKENS
// Every token of an accepted file, in two parts; its documents and what training would read.
static void read_file(const char* path) {
    Segment s = token_file(path, NULL);
    Dataset d = {NULL, &s, 1, s.end - s.begin, 7, NULL, 0, 0};
    enum { VOCAB = 50257, T = 3 };
    size_t half = d.size / 2;
    int row[T + 1], *tokens = (int*)xcalloc(d.size - half, sizeof(int));
    bool fresh;
    dataset_read(&d, half, d.size - half, tokens, VOCAB);
    dataset_read(&d, 0, half, tokens, VOCAB);
    dataset_index(&d, T, VOCAB);
    for (size_t k = 0; k < d.stretches; k++) { dataset_stretch(&d, k, 1, 2, T, VOCAB, row, &fresh); }
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
// A tokenizer, and with it the encoding of what follows it in the file after a line "text". Where every byte can be
// encoded, the tokens must be that text.
static void read_file(const char* path) {
    size_t size;
    unsigned char* file = file_read(path, &size);
    const char* mark = (const char*)memmem(file, size, "\ntext\n", 6);
    size_t head = mark ? (size_t)(mark + 1 - (const char*)file) : size, at = 0;
    if (truncate(path, head)) { abort(); }
    Tokenizer* t = tokenizer_open(path);
    Tokens out = {NULL, 0};
    const unsigned char* text = file + min_size(head + 5, size);
    size_t n = file + size - text;
    bool exact = !t->rules.count && !t->collapse && t->byte_piece[0] >= 0;
    encode(t, text, n, &out);
    for (size_t i = 0; i < out.count; i++) {
        const TokenPiece* p = &t->piece[out.ids[i]];
        if (p->type == 'x' || out.ids[i] == t->eod) { abort(); }
        if (exact && (n - at < (size_t)p->size || memcmp(text + at, p->bytes, p->size))) { abort(); }
        at += p->size;
    }
    if (exact && at != n) { abort(); }
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
// The header of an accepted file, with its metadata, and every value of every tensor. All metadata is written and read
// again, and must be the same; the new header must be UTF-8 if the names are.
static void read_file(const char* path) {
    static SafeTensors st, again;
    if (safetensors_try(&st, path)) { return; }
    size_t total = 0;
    Header h;
    header_begin(&h);
    for (int i = 0; i < st.num_meta; i++) { header_meta(&h, text_of("%d", i), st.meta[2 * i + 1]); }
    header_end(&h);
    for (size_t i = 8; i < h.length;) {
        int n = utf8_size((unsigned char*)h.bytes + i);
        if (n == 0) { abort(); }
        i += n;
    }
    for (int i = 0; i < st.num_tensors; i++) {
        const Tensor* t = safetensors_find(&st, st.tensors[i].name);
        if (t != &st.tensors[i]) { abort(); }
        total += t->end - t->begin;
        if (t->dtype >= NUM_READABLE) { continue; }
        float* values = (float*)xcalloc(t->size, sizeof(float));
        tensor_read(&st, t, values);
        free(values);
    }
    if (st.data + total != (size_t)lseek(fileno(st.file), 0, SEEK_END)) { abort(); }
    int fd = open(path, O_WRONLY | O_TRUNC);
    if (fd < 0 || write(fd, h.bytes, h.length) != (ssize_t)h.length) { abort(); }
    close(fd);
    if (safetensors_try(&again, path) || again.num_meta != st.num_meta) { abort(); }
    for (int i = 0; i < st.num_meta; i++) {
        if (strcmp(st.meta[2 * i + 1], again.meta[2 * i + 1])) { abort(); }
    }
    safetensors_close(&again);
    free(h.bytes);
    const size_t dims[4] = {2, 3, 0, 0};
    float six[6];
    if (setjmp(after_death) == 0) { safetensors_read(&st, "a", dims, six); }
    safetensors_close(&st);
}

// Seed k: one tensor of each dtype that can be read and of one that cannot, 24 + 2 + 4 + 4 + 8 + 3 bytes of data; none
// at all.
static size_t seed_file(unsigned char* out, int k) {
    const char* header = k ? "{}" :
        "{\"__metadata__\":{\"num_layers\":\"2\",\"norm_eps\":\"1e-5\",\"flag.train\":\"a\\\\b\\\"\\ud83d\\ude00\"},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
        "\"b\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[24,26]},"
        "\"c\":{\"shape\":[2,1],\"dtype\":\"BF16\",\"data_offsets\":[26,30]},"
        "\"d\":{\"dtype\":\"I32\",\"shape\":[1],\"x\":[{\"y\":-1.5e3},null],\"data_offsets\":[30,34]},"
        "\"e\":{\"dtype\":\"I64\",\"shape\":[1,1,1],\"data_offsets\":[34,42]},"
        "\"f\":{\"dtype\":\"F4\",\"shape\":[6],\"data_offsets\":[42,45]} }";
    size_t n = strlen(header), data = k ? 0 : 45;
    memset(out, 0, 8 + n + data);
    out[0] = n & 255;
    out[1] = n >> 8;
    memcpy(out + 8, header, n);
    return 8 + n + data;
}
#endif

// The readers take paths, so the input goes through a file, which is made once. What a reader that died left open is
// closed, and what it had taken is freed.
int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
    static char path[] = "/dev/shm/fuzz-XXXXXX.bin";
    static int file = -1;
    on_die = jump_back;
    if (file < 0 && (file = mkstemps(path, 4)) < 0) { abort(); }
    if (ftruncate(file, 0) || pwrite(file, data, size, 0) != (ssize_t)size) { abort(); }
    if (setjmp(after_death) == 0) { read_file(path); }
    for (int fd = file + 1; fd < file + 8; fd++) { close(fd); }
    while (num_taken > 0) { free(taken[num_taken - 1]); }
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
