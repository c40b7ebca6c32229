// Tests data/safetensors.h by itself: what is written comes back, whatever the safetensors library opens is opened, and
// what is broken is refused with a message. From the project folder: dev/bin/test_safetensors
#include "../data/safetensors.h"
#include "expect.h"

// A file of this header and `bytes` bytes of data. Returns its path.
static const char* file_of(const char* header, size_t header_bytes, const void* data, size_t bytes) {
    const char* path = text_of("%s/file", folder);
    uint64_t n = header_bytes;
    FILE* f = fopen(path, "wb");
    bool good = f && fwrite(&n, 8, 1, f) == 1 && fwrite(header, 1, n, f) == n && fwrite(data, 1, bytes, f) == bytes;
    if (!good || fclose(f)) { die("%s: cannot be written", path); }
    return path;
}
static const char* file_of_text(const char* header, size_t bytes) {
    static const char zeros[256];
    return file_of(header, strlen(header), zeros, bytes);
}

static void test_writing(void) {
    const size_t shapes[4][4] = {{2, 3, 0, 0}, {0, 0, 0, 0}, {1, 2, 1, 2}, {4, 0, 0, 0}}, begins[4] = {0, 24, 28, 44};
    const char* names[4] = {"weights", "a scalar", "with \"quotes\" and \\", "last"};
    float data[15], out[6];
    Header h;
    SafeTensors st;
    for (int i = 0; i < 15; i++) { data[i] = i - 7.5f; }
    header_begin(&h);
    header_meta(&h, "format", "test");
    header_meta(&h, "empty", "");
    for (int i = 0; i < 4; i++) { expect(header_tensor(&h, names[i], shapes[i]) == begins[i], "begin of a tensor"); }
    header_end(&h);
    expect(h.length % 8 == 0 && h.data == 60, "sizes of header and data");
    safetensors_open(&st, file_of(h.bytes + 8, h.length - 8, data, h.data));
    expect(st.num_tensors == 4 && st.num_meta == 2 && st.data == h.length, "numbers of tensors and of metadata");
    expect(!strcmp(safetensors_meta(&st, "format"), "test") && !*safetensors_meta(&st, "empty"), "metadata");
    expect(!safetensors_meta(&st, "none"), "metadata that is not there");
    for (int i = 0; i < 4; i++) {
        const Tensor* t = safetensors_find(&st, names[i]);
        expect(t && t->dtype == F32 && t->begin == begins[i] && !strcmp(t->name, names[i]), names[i]);
        safetensors_read(&st, names[i], shapes[i], NULL);
        safetensors_read(&st, names[i], shapes[i], out);
        expect(!memcmp(out, data + begins[i] / 4, t->end - t->begin), text_of("values of %s", names[i]));
    }
    expect(!safetensors_find(&st, "none") && !safetensors_find(&st, ""), "a tensor that is not there");
    group("what is written is read back");

    if (child()) { safetensors_read(&st, "none", shapes[0], out); _exit(0); }
    refused("/file: tensor 'none' is missing");
    if (child()) { safetensors_read(&st, "weights", shapes[3], NULL); _exit(0); }
    refused("/file: tensor 'weights' has shape [ 2 3 ], expected [ 4 ]");
    if (child()) { safetensors_read(&st, "a scalar", shapes[2], NULL); _exit(0); }
    refused("tensor 'a scalar' has shape [ ], expected [ 1 2 1 2 ]");
    safetensors_close(&st);
    free(h.bytes);
    static float large[5000]; // more than stdio has read ahead
    const size_t large_shape[4] = {5000, 0};
    header_begin(&h);
    header_tensor(&h, "large", large_shape);
    header_end(&h);
    safetensors_open(&st, file_of(h.bytes + 8, h.length - 8, large, h.data));
    safetensors_read(&st, "large", large_shape, large);
    if (truncate(st.path, h.length + h.data - 1)) { abort(); }
    if (child()) { safetensors_read(&st, "large", large_shape, large); _exit(0); }
    refused("/file: tensor 'large' cannot be read");
    safetensors_close(&st);
    free(h.bytes);
    group("a tensor that is missing, has another shape or was cut off is refused");

    header_begin(&h);
    header_end(&h);
    safetensors_open(&st, file_of(h.bytes + 8, h.length - 8, data, 0));
    expect(st.num_tensors == 0 && st.num_meta == 0 && h.data == 0, "nothing in it");
    safetensors_close(&st);
    free(h.bytes);
    header_begin(&h);
    header_tensor(&h, "only", shapes[1]);
    header_end(&h);
    safetensors_open(&st, file_of(h.bytes + 8, h.length - 8, data, 4));
    expect(st.num_tensors == 1 && st.num_meta == 0, "one tensor");
    safetensors_close(&st);
    free(h.bytes);
    group("a file of nothing, and one without metadata");
}

static void test_dtypes(void) {
    static const char* header =
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
        "\"b\":{\"dtype\":\"F16\",\"shape\":[8],\"data_offsets\":[8,24]},"
        "\"c\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[24,28]},"
        "\"d\":{\"dtype\":\"I32\",\"shape\":[3],\"data_offsets\":[28,40]},"
        "\"e\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[40,56]}}";
    static const float expected[5][8] = {
        {1.5f, -0.0f}, {1, -2, 65504, 0x1p-14f, 0x1p-24f, -0x1.ff8p-15f, INFINITY, -INFINITY}, {3.140625f, -INFINITY},
        {-1, 100, -2147483648.0f}, {-7, 0x1p62f}
    };
    struct { float a[2]; uint16_t b[8], c[2]; int32_t d[3]; int64_t e[2]; } __attribute__((packed)) data = {
        {1.5f, -0.0f}, {0x3c00, 0xc000, 0x7bff, 0x0400, 0x0001, 0x83ff, 0x7c00, 0xfc00}, {0x4049, 0xff80},
        {-1, 100, INT_MIN}, {-7, (int64_t)1 << 62}
    };
    SafeTensors st;
    float out[8];
    safetensors_open(&st, file_of(header, strlen(header), &data, sizeof(data)));
    for (int i = 0; i < NUM_READABLE; i++) {
        const Tensor* t = safetensors_find(&st, text_of("%c", 'a' + i));
        tensor_read(&st, t, out);
        expect(t->dtype == i && !memcmp(out, expected[i], t->size * sizeof(float)), dtypes[i].name);
    }
    safetensors_close(&st);
    expect(isnan(half_to_float(0x7e00)) && isnan(half_to_float(0xfc01)), "NaN in F16");
    group("dtypes that can be read");

    for (int i = NUM_READABLE; i < NUM_DTYPES; i++) { // 8 elements have as many bytes as one has bits
        const size_t eight[4] = {8, 0};
        const char* other = text_of("{\"other\":{\"dtype\":\"%s\",\"shape\":[8],\"data_offsets\":[0,%d]},"
                                    "\"wanted\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[%d,%d]}}",
                                    dtypes[i].name, dtypes[i].bits, dtypes[i].bits, dtypes[i].bits + 4);
        safetensors_open(&st, file_of_text(other, dtypes[i].bits + 4));
        tensor_read(&st, safetensors_find(&st, "wanted"), out);
        if (child()) { tensor_read(&st, safetensors_find(&st, "other"), out); _exit(0); }
        refused(text_of("tensor 'other' has dtype %s; F32, F16, BF16, I32 and I64 can be read", dtypes[i].name));
        if (child()) { safetensors_read(&st, "other", eight, NULL); _exit(0); }
        refused("tensor 'other' has dtype");
        safetensors_close(&st);
    }
    group("other dtypes do not matter until they are read");
}

static void test_text(void) {
    SafeTensors st;
    const size_t one[4] = {1, 0};
    const char* header = "{\"\\u0061\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\u20AC\\ud83d\\uDE00\":"
        "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
        "\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[4,8]},"
        "\"__metadata__\":{\"\\u006bey\":\"\\ud83d\\ude00\\uffff\\u0000\\u0080\",\"twice\":\"1\",\"twice\":\"2\"}}";
    safetensors_open(&st, file_of_text(header, 8));
    safetensors_read(&st, "a\"\\/\b\f\n\r\t\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", one, NULL);
    expect(safetensors_find(&st, "a\xc0\x80" "b") != NULL, "U+0000 in a name");
    const char* value = safetensors_meta(&st, "key");
    expect(value && !strcmp(value, "\xf0\x9f\x98\x80\xef\xbf\xbf\xc0\x80\xc2\x80"), "a value");
    expect(!strcmp(safetensors_meta(&st, "twice"), "2"), "the last value of a key counts");
    safetensors_close(&st);
    group("escapes in names and metadata");

    // Every byte but zero, alone and between letters; characters that stand for bytes; UTF-8 that is too long, cut off,
    // a surrogate, or beyond the last character.
    char bytes[4 * 255 + 1], *to = bytes;
    for (int c = 1; c < 256; c++) { *to++ = c; *to++ = 'x'; *to++ = c; *to++ = c; }
    *to = 0;
    const char* values[] = {
        bytes, "caf\xe9.txt", "\xee\xbe\x80\xee\xbf\xbf", "\xee\xbd\xbf\xef\x80\x80", "\xee\xbe", "\xee\xee\xbe\x80",
        "\xc0\x80\xe0\x9f\xbf\xf0\x8f\xbf\xbf", "\xc3", "\xe2\x82", "\xf0\x9f\x98", "\xed\xa0\x80\xed\xbf\xbf",
        "\xf4\x90\x80\x80\xf5\xff", "\xf4\x8f\xbf\xbf", "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80 \"quoted\" \\ \n\t\x7f"
    };
    int count = sizeof(values) / sizeof(values[0]);
    Header h;
    header_begin(&h);
    for (int i = 0; i < count; i++) { header_meta(&h, text_of("%d", i), values[i]); }
    header_end(&h);
    for (size_t i = 8; i < h.length; i++) { expect(h.bytes[i] >= 0x20 || h.bytes[i] < 0, "a control character"); }
    for (size_t i = 8; i < h.length;) { // file_of wrote the header; bytes ends with a zero byte, as utf8_size needs
        int n = utf8_size((unsigned char*)h.bytes + i);
        expect(n > 0, "a header that is not UTF-8");
        i += n ? n : 1;
    }
    safetensors_open(&st, file_of(h.bytes + 8, h.length - 8, "", 0));
    for (int i = 0; i < count; i++) {
        expect(!strcmp(safetensors_meta(&st, text_of("%d", i)), values[i]), text_of("value %d comes back", i));
    }
    safetensors_close(&st);
    free(h.bytes);
    group("metadata that is not UTF-8 is written as UTF-8 and comes back");

    safetensors_open(&st, file_of_text("{\"__metadata__\":{\"old\":\"caf\xe9\"}}", 0));
    expect(!strcmp(safetensors_meta(&st, "old"), "caf\xe9"), "kept");
    safetensors_close(&st);
    group("metadata of older versions, which is not UTF-8, is kept");
}

#define ENTRY(shape, begin, end) "{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end "]}"

// Headers that the library opens, with the bytes of their data and the number of their tensors.
static void test_library(void) {
    static const struct { const char* header; int bytes, tensors; } rows[] = {
        {"{}", 0, 0}, {" { } \t\r\n", 0, 0}, {"{\"__metadata__\":{}}", 0, 0}, {"{\"__metadata__\":null}", 0, 0},
        {"{\"__metadata__\":{\"a\":\"b\"}}", 0, 0}, {"{\"\":" ENTRY("[1]", 0, 4) "}", 4, 1},
        {"{\"a\":" ENTRY("[]", 0, 4) "}", 4, 1}, {"{\"a\":" ENTRY("[0]", 0, 0) "}", 0, 1},
        {"{\"a\":" ENTRY("[3,0,2]", 4, 4) ",\"b\":" ENTRY("[1]", 0, 4) ",\"c\":" ENTRY("[0]", 0, 0) "}", 4, 3},
        {"{\"a\":" ENTRY("[18446744073709551615,0]", 0, 0) "}", 0, 1},
        {"{\"a\":" ENTRY("[1,1,1,1,1,1,1,1,1,1,2]", 0, 8) "}", 8, 1},
        {"{\"a\":" ENTRY("[1]", 4, 8) ",\"b\":" ENTRY("[1]", 0, 4) "}", 8, 2},
        {"{\"a\":{\"x\":[1,-2.5e3,{\"y\":null,\"z\":[true,false,\"]\"]}],\"shape\":[1],\"dtype\":\"F32\",\"x\":{},"
         "\"data_offsets\":[0,4]}}", 4, 1},
        {"{\"a\":{\"dtype\":\"BOOL\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3, 1},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[2,3],\"data_offsets\":[0,3]}}", 3, 1},
        {"{\"a\":" ENTRY("[9]", 4, 8) ",\"a\":" ENTRY("[1]", 0, 4) "}", 4, 1} // the last entry counts
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        SafeTensors st;
        const char* error = safetensors_try(&st, file_of_text(rows[i].header, rows[i].bytes));
        expect(!error && st.num_tensors == rows[i].tensors, text_of("%s: %s", rows[i].header, error ? error : ""));
        if (!error) { safetensors_close(&st); }
    }
    group("headers that the safetensors library opens");
}

static void test_broken(void) {
    static const struct { const char *header; int bytes; const char* error; } rows[] = {
        {"", 0, "the header does not start with '{'"},
        {"[]", 0, "the header does not start with '{'"},
        {"{", 0, "'\"' was expected"},
        {"{}}", 0, "something follows the header's object"},
        {"{} x", 0, "something follows the header's object"},
        {"{\"a\":1}", 0, "tensor 'a': '{' was expected"},
        {"{\"a\" " ENTRY("[1]", 0, 4) "}", 4, "tensor 'a': ':' was expected"},
        {"{\"a\":" ENTRY("[1]", 0, 4) ",}", 4, "'\"' was expected"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],}}", 4, "tensor 'a': '\"' was expected"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor 'a': dtype, shape or data_offsets is missing"},
        {"{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4,
         "tensor 'a': its dtype, shape or data_offsets stand twice"},
        {"{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "tensor 'a': its dtype is unknown"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,4]}}", 4, "its data_offsets are not two"},
        {"{\"a\":" ENTRY("[1.0]", 0, 4) "}", 4, "']' was expected"},
        {"{\"a\":" ENTRY("[01]", 0, 4) "}", 4, "a whole number was expected"},
        {"{\"a\":" ENTRY("[-1]", 0, 4) "}", 4, "a whole number was expected"},
        {"{\"a\":" ENTRY("[1,]", 0, 4) "}", 4, "a whole number was expected"},
        {"{\"a\":" ENTRY("[18446744073709551616]", 0, 4) "}", 4, "a number is too large"},
        {"{\"a\":" ENTRY("[4294967296,4294967297]", 0, 4) "}", 4, "tensor 'a': its shape is too large"},
        {"{\"a\":" ENTRY("[4611686018427387905]", 0, 4) "}", 4, "tensor 'a': its shape is too large"},
        {"{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1, "do not fill whole bytes"},
        {"{\"a\":" ENTRY("[2]", 0, 4) "}", 4, "tensor 'a': its data_offsets do not fit its shape and dtype"},
        {"{\"a\":" ENTRY("[1]", 4, 0) "}", 4, "tensor 'a': its data_offsets do not fit its shape and dtype"},
        {"{\"a\":" ENTRY("[1]", 4, 8) "}", 8, "tensor 'a': its data overlaps another's or leaves a hole"},
        {"{\"a\":" ENTRY("[2]", 0, 8) ",\"b\":" ENTRY("[1]", 4, 8) "}", 8, "tensor 'b': its data overlaps"},
        {"{\"a\":" ENTRY("[1]", 0, 4) ",\"a\":" ENTRY("[1]", 4, 8) "}", 8, "tensor 'a': its data overlaps"},
        {"{\"a\":" ENTRY("[2]", 0, 8) "}", 4, "truncated: the data is shorter than the header says"},
        {"{\"a\":" ENTRY("[1]", 0, 4) "}", 5, "bytes follow the last tensor's data"},
        {"{\"a\n\":" ENTRY("[1]", 0, 4) "}", 4, "a control character in a string"},
        {"{\"a\\x\":" ENTRY("[1]", 0, 4) "}", 4, "a bad escape in a string"},
        {"{\"\\u12\":" ENTRY("[1]", 0, 4) "}", 4, "a bad escape in a string"},
        {"{\"\\ud83d\":" ENTRY("[1]", 0, 4) "}", 4, "a bad escape in a string"},
        {"{\"\\ud83d\\u0041\":" ENTRY("[1]", 0, 4) "}", 4, "a bad escape in a string"},
        {"{\"\\ude00\":" ENTRY("[1]", 0, 4) "}", 4, "a bad escape in a string"},
        {"{\"a", 0, "a string does not end"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "tensor '__metadata__': '\"' was expected"},
        {"{\"__metadata__\":[]}", 0, "tensor '__metadata__': '{' was expected"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "tensor '__metadata__': stands twice"},
        {"{\"a\":{\"x\":nil,\"dtype\":\"F32\"}}", 0, "tensor 'a': a value was expected"},
        {"{\"a\":{\"x\":[1 2],\"dtype\":\"F32\"}}", 0, "tensor 'a': ']' was expected"},
        {"{\"\\u001b\\n\":1}", 0, "tensor '?\?': "}
    };
    SafeTensors st;
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        const char* error = safetensors_try(&st, file_of_text(rows[i].header, rows[i].bytes));
        expect(error && strstr(error, rows[i].error), text_of("%s: expected \"%s\", got: %s", rows[i].header,
                                                              rows[i].error, error ? error : "no error"));
        if (!error) { safetensors_close(&st); }
    }
    for (int depth = 125; depth <= 126; depth++) { // as deep as the library goes, and one deeper
        char lists[512] = {0};
        memset(lists, '[', depth);
        memset(lists + depth, ']', depth);
        static const char header[] = "{\"a\":{\"x\":%s,\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}";
        const char* error = safetensors_try(&st, file_of_text(text_of(header, lists), 0));
        bool deep = error && strstr(error, "nested too deeply");
        expect(depth == 125 ? !error : deep, text_of("lists that are nested %d deep", depth));
        if (!error) { safetensors_close(&st); }
    }
    group("broken headers are refused, each with its message");

    const char *path = text_of("%s/file", folder), *fifo = text_of("%s/fifo", folder);
    const uint64_t lengths[4] = {3, HEADER_LIMIT + 1, UINT64_MAX, UINT64_MAX - 7};
    for (int i = 0; i < 4; i++) {
        FILE* f = fopen(path, "wb");
        if (!f || fwrite(&lengths[i], 8, 1, f) != 1 || fputs("{}", f) < 0 || fclose(f)) { abort(); }
        const char* error = safetensors_try(&st, path);
        expect(error && strstr(error, "not a safetensors file, or a truncated one"), text_of("length %d", i));
    }
    if (truncate(path, 7)) { abort(); }
    expect(!strcmp(safetensors_try(&st, path), "not a safetensors file, or a truncated one"), "7 bytes");
    if (truncate(path, 0)) { abort(); }
    expect(!strcmp(safetensors_try(&st, path), "not a safetensors file, or a truncated one"), "no bytes");
    if (mkfifo(fifo, 0600)) { abort(); }
    expect(!strcmp(safetensors_try(&st, fifo), "not a regular file"), "a FIFO");
    expect(strstr(safetensors_try(&st, folder), "a folder"), "a folder");
    if (child()) { safetensors_open(&st, text_of("%s/none\n\x1b", folder)); _exit(0); }
    refused("/none?\?: No such file");
    unlink(fifo); unlink(path);
    group("files that are none, in one line");
}

int main(void) {
    if (!mkdtemp(folder)) { die("%s: %s", folder, strerror(errno)); }
    test_writing();
    test_dtypes();
    test_text();
    test_library();
    test_broken();
    rmdir(folder);
    return summary("dev/test_safetensors.c");
}
