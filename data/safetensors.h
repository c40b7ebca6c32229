/*
Files of tensors in the safetensors format: reading and writing. This header needs nothing but base.h.

A safetensors file consists of

    8 bytes       the length of the header in bytes, little-endian
    the header    a JSON object. It has an entry for each tensor,
                      "NAME": {"dtype": "F32", "shape": [2,3], "data_offsets": [begin,end]}
                  and may have one for text, "__metadata__": {"KEY": "VALUE", ...}
    the data      the tensors, row-major and little-endian. data_offsets are bytes, counted from where the data starts.
                  The tensors fill the data without holes, overlaps, or bytes after the last one.

Files come from strangers. Nothing in a header is believed before it was checked against the size of the file, and what
the format does not allow is refused with a message. Whatever the safetensors library for Python opens, opens here:
unknown fields are ignored, and if a name or a key stands twice, its last entry counts. Whatever is written here, that
library opens.

Text in a header is UTF-8. In memory, names, keys and values are C strings; the character U+0000 is stored as the two
bytes C0 80. A value of the metadata may be any bytes, for example the name of a file in an old encoding. Each byte that
is not part of valid UTF-8 is written as one character of Unicode's private use area, byte 80 as U+EF80 to byte FF as
U+EFFF, and is that byte again when it is read here. Where a value itself holds such a character, its three bytes are
written in this way. So every value comes back as it was.
*/
#ifndef MEGALODON_SAFETENSORS_H
#define MEGALODON_SAFETENSORS_H
#include "base.h"
#include <ctype.h>
#include <math.h>

// ---------------------------------------------------------------------------------------------------------------------
// Interface

enum { MAX_DIMS = 8, HEADER_LIMIT = 100000000 }; // HEADER_LIMIT: bytes of a header, the library's limit

// dtypes: all that the format has. Tensors of the first NUM_READABLE can be read.
enum { F32, F16, BF16, I32, I64, NUM_READABLE, NUM_DTYPES = 22 };
static const struct { const char* name; int bits; } dtypes[NUM_DTYPES] = {
    {"F32", 32}, {"F16", 16}, {"BF16", 16}, {"I32", 32}, {"I64", 64},
    {"F64", 64}, {"C64", 64}, {"U64", 64}, {"U32", 32}, {"U16", 16}, {"I16", 16}, {"U8", 8}, {"I8", 8}, {"BOOL", 8},
    {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8},
    {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4}
};

typedef struct {
    const char* name;
    int dtype, num_dims;     // a scalar has no dimensions
    size_t dims[MAX_DIMS];   // the first MAX_DIMS of them
    size_t size, begin, end; // elements; the bytes [begin,end) of the data
} Tensor;

typedef struct {
    char path[PATH_MAX], error[512];
    FILE* file;
    char* header;      // names, keys and values point into it
    Tensor* tensors;   // sorted by name
    const char** meta; // key, value, key, value, ...
    int num_tensors, num_meta;
    size_t data;       // the byte of the file where the data starts
} SafeTensors;

// Opens the file at `path` and checks its header. Returns NULL, or a message (without the path) that says what is
// wrong; then nothing stays open. The message is valid as long as *st. A FIFO or a folder is refused.
const char* safetensors_try(SafeTensors* st, const char* path);

// The same, but dies with "PATH: MESSAGE" when something is wrong.
void safetensors_open(SafeTensors* st, const char* path);

// Closes a file that was opened, and frees all that belongs to it: the names, keys and values are gone.
void safetensors_close(SafeTensors* st);

// Returns the tensor `name`, or NULL if the file has none.
const Tensor* safetensors_find(const SafeTensors* st, const char* name);

// Returns the metadata's value of `key`, or NULL if there is none.
const char* safetensors_meta(const SafeTensors* st, const char* key);

// Reads all elements of a tensor into out (t->size) and converts them to floats. I32 and I64 beyond 2^24 are rounded.
// Dies if the dtype is none of the readable ones or the file cannot be read.
void tensor_read(const SafeTensors* st, const Tensor* t, float* out);

// Finds the tensor `name`, which must have the shape dims, and reads it into out. The shape ends with a 0 or after four
// dimensions; dims[0] = 0 is a scalar. Where out is NULL, only name, shape and dtype are checked. Dies if the tensor is
// missing, has another shape, or cannot be read.
void safetensors_read(const SafeTensors* st, const char* name, const size_t dims[4], float* out);

// A header that is being written, by calls in this order: header_begin, header_meta for each key, header_tensor for
// each tensor, header_end. Then a file consists of bytes[0..length), which the caller frees, and of `data` bytes: the
// tensors.
typedef struct { FILE* out; char* bytes; size_t length, data; int num_meta, num_tensors; } Header;

// Starts an empty header. All these functions die when there is not enough memory.
void header_begin(Header* h);

// Adds a key of the metadata and its value. The value may hold any bytes but zero (see above). A key stands once.
void header_meta(Header* h, const char* key, const char* value);

// Adds a tensor of floats (F32) whose shape is given as for safetensors_read. Returns the byte where it begins, counted
// from the start of the data. A name stands once, and is not "__metadata__".
size_t header_tensor(Header* h, const char* name, const size_t dims[4]);

// Ends the header. It is padded to a multiple of 8 bytes, so the data is aligned in the file.
void header_end(Header* h);

// ---------------------------------------------------------------------------------------------------------------------
// Text in headers

// Stores the character `code` as UTF-8 and returns where the next one goes.
char* utf8_put(char* to, int code) {
    int more = code >= 0x10000 ? 3 : code >= 0x800 ? 2 : code >= 0x80 || code == 0 ? 1 : 0; // bytes after the first one
    static const int first[4] = {0, 0xc0, 0xe0, 0xf0};
    *to++ = first[more] | code >> 6 * more;
    while (more--) { *to++ = 0x80 | (code >> 6 * more & 0x3f); }
    return to;
}

// Returns how many bytes the valid UTF-8 character at s has; 0 if there is none. A zero byte follows the text.
int utf8_size(const unsigned char* s) {
    int n = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    for (int k = 1; k < n; k++) {
        if ((s[k] & 0xc0) != 0x80) { return 0; }
    }
    bool too_long = (s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xf0 && s[1] < 0x90); // a shorter form exists
    bool surrogate = s[0] == 0xed && s[1] >= 0xa0, too_large = s[0] == 0xf4 && s[1] >= 0x90;
    return too_long || surrogate || too_large ? 0 : n;
}

// Is the character at s one of U+EF80 to U+EFFF, which stand for bytes? They are EE BE 80 to EE BF BF.
bool utf8_is_byte(const unsigned char* s) {
    return s[0] == 0xee && (s[1] == 0xbe || s[1] == 0xbf) && (s[2] & 0xc0) == 0x80;
}

// Replaces, in place, the characters that stand for bytes by these bytes.
void text_restore(char* text) {
    unsigned char *from = (unsigned char*)text, *to = from;
    while (*from) {
        if (!utf8_is_byte(from)) { *to++ = *from++; continue; }
        *to++ = 0x80 | (from[1] & 1) << 6 | (from[2] & 0x3f);
        from += 3;
    }
    *to = 0;
}

// Writes a JSON string.
void text_write(FILE* out, const char* text) {
    fputc('"', out);
    for (const unsigned char* s = (const unsigned char*)text; *s;) {
        int n = utf8_is_byte(s) ? 0 : utf8_size(s);
        if (n == 0) { fprintf(out, "\\uef%02x", *s); }
        else if (*s < 0x20) { fprintf(out, "\\u%04x", *s); }
        else { fprintf(out, "%s%.*s", *s == '"' || *s == '\\' ? "\\" : "", n, (const char*)s); }
        s += n ? n : 1;
    }
    fputc('"', out);
}

// ---------------------------------------------------------------------------------------------------------------------
// A parser of JSON, as far as headers need it

// The text [p,end) that is left to parse. After the first error all of it counts as parsed, so callers need not test
// for errors at every step.
typedef struct {
    char *p, *end;
    const char* error; // NULL as long as all is well
    const char* name;  // the tensor that is being parsed, "" if there is none
} Json;

// Records `error` unless `good` is true or another error came first. Returns good.
bool json_check(Json* j, bool good, const char* error) {
    if (!good && !j->error) { j->error = error; j->p = j->end; }
    return good;
}

// Skips white space and returns the next character, or 0 at the end.
char json_peek(Json* j) {
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\t' || *j->p == '\n' || *j->p == '\r')) { j->p++; }
    return j->p < j->end ? *j->p : 0;
}

// Skips the character c if it is the next one. Returns whether it was.
bool json_take(Json* j, char c) {
    bool there = json_peek(j) == c;
    j->p += there;
    return there;
}

// Skips the character c, which must be the next one.
void json_expect(Json* j, char c) {
    if (!json_take(j, c) && !j->error) { json_check(j, false, text_of("'%c' was expected in the header", c)); }
}

// Parses four hexadecimal digits; -1 if they are not there.
int json_hex(Json* j) {
    static const char digits[] = "0123456789abcdef";
    int code = 0;
    for (int k = 0; k < 4; k++) {
        int c = j->p < j->end ? tolower((unsigned char)*j->p++) : 0;
        const char* digit = c ? strchr(digits, c) : NULL;
        if (!digit) { return -1; }
        code = code << 4 | (int)(digit - digits);
    }
    return code;
}

// Parses what follows "\u": a character, or the first half of a surrogate pair, whose second half must follow. Returns
// the character, or -1 if there is none.
int json_unicode(Json* j) {
    int code = json_hex(j);
    if (code < 0xd800 || code > 0xdfff) { return code; }
    if (code > 0xdbff || j->end - j->p < 2 || j->p[0] != '\\' || j->p[1] != 'u') { return -1; }
    j->p += 2;
    int low = json_hex(j);
    return low < 0xdc00 || low > 0xdfff ? -1 : 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
}

// Parses a string. It is decoded in place and ended by a zero byte; no escape is shorter than what it stands for. "" in
// case of an error. Bytes that are not UTF-8 are kept: older versions of this program wrote them.
char* json_string(Json* j) {
    static char nothing[1];
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    json_expect(j, '"');
    char *start = j->p, *to = j->p;
    while (j->p < j->end && *j->p != '"') {
        unsigned char c = *j->p++;
        if (!json_check(j, c >= 0x20, "a control character in a string")) { return nothing; }
        if (c != '\\') { *to++ = c; continue; }
        c = j->p < j->end ? *j->p++ : 0;
        const char* escape = c ? strchr(escapes, c) : NULL;
        int code = escape ? meanings[escape - escapes] : c == 'u' ? json_unicode(j) : -1;
        if (!json_check(j, code >= 0, "a bad escape in a string")) { return nothing; }
        to = utf8_put(to, code);
    }
    if (!json_check(j, j->p < j->end, "a string does not end") || j->error) { return nothing; }
    j->p++;
    *to = 0;
    return start;
}

// Parses [n, n, ...], stores the first `most` of these whole numbers, and returns how many there are. *product receives
// the product of all of them, at most SIZE_MAX, if it is not NULL.
int json_counts(Json* j, size_t* numbers, int most, size_t* product) {
    int count = 0;
    if (product) { *product = 1; }
    json_expect(j, '[');
    for (bool more = json_peek(j) != ']'; more && !j->error; more = json_take(j, ',')) {
        json_peek(j);
        char* start = j->p;
        size_t n = 0;
        for (; j->p < j->end && isdigit((unsigned char)*j->p); j->p++) {
            size_t digit = *j->p - '0';
            if (!json_check(j, n <= (SIZE_MAX - digit) / 10, "a number is too large")) { return 0; }
            n = 10 * n + digit;
        }
        bool whole = j->p > start && (*start != '0' || j->p == start + 1);
        if (!json_check(j, whole, "a whole number was expected")) { return 0; }
        if (count < most) { numbers[count] = n; }
        count++;
        if (product) { *product = !n || *product <= SIZE_MAX / n ? *product * n : SIZE_MAX; }
    }
    json_expect(j, ']');
    return count;
}

// Skips a value of any kind. Objects and lists in it may be nested `depth` deep.
void json_skip(Json* j, int depth) {
    static const char* words[] = {"true", "false", "null"};
    char open = json_peek(j), close = open == '{' ? '}' : ']';
    if (open == '"') { json_string(j); return; }
    if (open == '{' || open == '[') {
        if (!json_check(j, depth > 0, "lists or objects are nested too deeply")) { return; }
        j->p++;
        for (bool more = json_peek(j) != close; more && !j->error; more = json_take(j, ',')) {
            if (open == '{') { json_string(j); json_expect(j, ':'); }
            json_skip(j, depth - 1);
        }
        json_expect(j, close);
        return;
    }
    char *start = j->p, *number_end = start; // both loops end at the zero byte after the header at the latest
    while (isalnum((unsigned char)*j->p) || *j->p == '+' || *j->p == '-' || *j->p == '.') { j->p++; }
    size_t n = j->p - start;
    bool known = false;
    for (int i = 0; i < 3; i++) { known = known || (n == strlen(words[i]) && !memcmp(start, words[i], n)); }
    if (isdigit((unsigned char)open) || open == '-') { strtod(start, &number_end); }
    json_check(j, known || (n > 0 && number_end == j->p), "a value was expected in the header");
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading

// Parses one tensor's {"dtype": ..., "shape": [...], "data_offsets": [begin,end]}.
void header_parse_tensor(Json* j, Tensor* t) {
    enum { DEEPEST = 125 }; // of an unknown field's value; together with the two objects around it, the library's limit
    size_t offsets[2] = {0, 0};
    int num_offsets = -1;
    t->dtype = t->num_dims = -1;
    json_expect(j, '{');
    for (bool more = json_peek(j) != '}'; more && !j->error; more = json_take(j, ',')) {
        const char* key = json_string(j);
        bool is_dtype = !strcmp(key, "dtype"), is_shape = !strcmp(key, "shape");
        bool is_place = !strcmp(key, "data_offsets");
        bool again = (is_dtype && t->dtype >= 0) || (is_shape && t->num_dims >= 0) || (is_place && num_offsets >= 0);
        json_expect(j, ':');
        json_check(j, !again, "its dtype, shape or data_offsets stand twice");
        if (is_dtype) {
            const char* name = json_string(j);
            do { t->dtype++; } while (t->dtype < NUM_DTYPES && strcmp(name, dtypes[t->dtype].name));
        } else if (is_shape) {
            t->num_dims = json_counts(j, t->dims, MAX_DIMS, &t->size);
        } else if (is_place) {
            num_offsets = json_counts(j, offsets, 2, NULL);
        } else {
            json_skip(j, DEEPEST);
        }
    }
    json_expect(j, '}');
    json_check(j, t->dtype >= 0 && t->num_dims >= 0 && num_offsets >= 0, "dtype, shape or data_offsets is missing");
    json_check(j, num_offsets == 2, "its data_offsets are not two numbers");
    json_check(j, t->dtype < NUM_DTYPES, "its dtype is unknown");
    t->begin = offsets[0]; t->end = offsets[1];
}


// Parses "__metadata__": an object of strings, or null.
void header_parse_meta(SafeTensors* st, Json* j) {
    if (json_peek(j) == 'n') { json_skip(j, 0); return; }
    json_expect(j, '{');
    for (bool more = json_peek(j) != '}'; more && !j->error; more = json_take(j, ',')) {
        st->meta = (const char**)list_grow(st->meta, st->num_meta, 2 * sizeof(char*));
        const char** pair = &st->meta[2 * st->num_meta++];
        pair[0] = json_string(j);
        json_expect(j, ':');
        char* value = json_string(j);
        text_restore(value);
        pair[1] = value;
    }
    json_expect(j, '}');
}

int tensor_by_offset(const void* a, const void* b) { // empty tensors first
    const Tensor *x = (const Tensor*)a, *y = (const Tensor*)b;
    return x->begin != y->begin ? (x->begin > y->begin) - (x->begin < y->begin) : (x->end > y->end) - (x->end < y->end);
}
int tensor_by_name(const void* a, const void* b) { return strcmp(((const Tensor*)a)->name, ((const Tensor*)b)->name); }
int tensor_by_name_and_place(const void* a, const void* b) { // of one name, the first in the header first
    const char *x = ((const Tensor*)a)->name, *y = ((const Tensor*)b)->name;
    return strcmp(x, y) ? strcmp(x, y) : (x > y) - (x < y);
}

// Parses the whole header of a file with `bytes` of data.
void header_parse(SafeTensors* st, Json* j, size_t bytes) {
    bool had_meta = false;
    st->tensors = (Tensor*)list_grow(NULL, 0, sizeof(Tensor)); // so that it is not NULL in a file without tensors
    json_check(j, json_peek(j) == '{', "the header does not start with '{'");
    json_take(j, '{');
    for (bool more = json_peek(j) != '}'; more && !j->error; more = json_take(j, ',')) {
        j->name = json_string(j);
        json_expect(j, ':');
        if (!strcmp(j->name, "__metadata__")) {
            json_check(j, !had_meta, "stands twice");
            had_meta = true;
            header_parse_meta(st, j);
            continue;
        }
        st->tensors = (Tensor*)list_grow(st->tensors, st->num_tensors, sizeof(Tensor));
        Tensor* t = &st->tensors[st->num_tensors++];
        memset(t, 0, sizeof(*t));
        t->name = j->name;
        header_parse_tensor(j, t);
    }
    if (j->error) { return; }
    j->name = "";
    json_expect(j, '}');
    json_check(j, !json_peek(j) && j->p == j->end, "something follows the header's object");

    int count = 0; // of different names
    qsort(st->tensors, st->num_tensors, sizeof(Tensor), tensor_by_name_and_place);
    for (int i = 0; i < st->num_tensors; i++) {
        bool last = i + 1 == st->num_tensors || strcmp(st->tensors[i].name, st->tensors[i + 1].name);
        if (last) { st->tensors[count++] = st->tensors[i]; }
    }
    st->num_tensors = count;

    size_t at = 0; // the tensors must fill the data exactly
    qsort(st->tensors, count, sizeof(Tensor), tensor_by_offset);
    for (int i = 0; i < count && !j->error; at = st->tensors[i++].end) {
        const Tensor* t = &st->tensors[i];
        size_t bits = dtypes[t->dtype].bits;
        j->name = t->name;
        json_check(j, t->size <= SIZE_MAX / bits, "its shape is too large");
        json_check(j, t->size * bits % 8 == 0, "its elements do not fill whole bytes");
        json_check(j, t->begin <= t->end && t->end - t->begin == t->size * bits / 8,
                   "its data_offsets do not fit its shape and dtype");
        json_check(j, t->begin == at, "its data overlaps another's or leaves a hole");
    }
    if (j->error) { return; }
    j->name = "";
    json_check(j, at <= bytes, "truncated: the data is shorter than the header says");
    json_check(j, at >= bytes, "bytes follow the last tensor's data");
    qsort(st->tensors, count, sizeof(Tensor), tensor_by_name);
}

const char* safetensors_try(SafeTensors* st, const char* path) {
    uint64_t n = 0; // length of the header
    size_t bytes = 0;
    const char* error;
    memset(st, 0, sizeof(*st));
    snprintf(st->path, sizeof(st->path), "%s", path);
    int fd = file_open(path, &bytes, &error);
    if (fd < 0) { return error; }
    st->file = fdopen(fd, "rb");
    if (!st->file) { die("out of memory"); }
    bool good = fread(&n, 1, 8, st->file) == 8;
    if (!good || bytes < 8 || n > HEADER_LIMIT || n > bytes - 8) {
        safetensors_close(st);
        return "not a safetensors file, or a truncated one";
    }
    st->data = 8 + n;
    st->header = (char*)xcalloc(n + 1, 1);
    Json json = {st->header, st->header + n, NULL, ""};
    if (fread(st->header, 1, n, st->file) != n) { json.error = "the header cannot be read"; }
    else { header_parse(st, &json, bytes - st->data); }
    if (!json.error) { return NULL; }
    const char* where = *json.name ? text_of("tensor '%.200s': ", json.name) : "";
    snprintf(st->error, sizeof(st->error), "%s%s", where, json.error);
    text_clean(st->error);
    safetensors_close(st);
    return st->error;
}

void safetensors_open(SafeTensors* st, const char* path) {
    const char* error = safetensors_try(st, path);
    if (error) { die("%s: %s", path, error); }
}

void safetensors_close(SafeTensors* st) {
    if (st->file) { fclose(st->file); }
    free(st->header);
    free(st->tensors);
    free(st->meta);
}

const Tensor* safetensors_find(const SafeTensors* st, const char* name) {
    Tensor key;
    key.name = name;
    return (const Tensor*)bsearch(&key, st->tensors, st->num_tensors, sizeof(Tensor), tensor_by_name);
}

const char* safetensors_meta(const SafeTensors* st, const char* key) {
    for (int i = st->num_meta - 1; i >= 0; i--) {
        if (!strcmp(st->meta[2 * i], key)) { return st->meta[2 * i + 1]; }
    }
    return NULL;
}

float half_to_float(uint16_t h) { // sign, 5 bits of exponent, 10 of mantissa
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent ? ldexpf(mantissa + 1024, exponent - 25) : ldexpf(mantissa, -24);
    return h >> 15 ? -x : x;
}

void tensor_check_dtype(const SafeTensors* st, const Tensor* t) {
    if (t->dtype < NUM_READABLE) { return; }
    die("%s: tensor '%s' has dtype %s; F32, F16, BF16, I32 and I64 can be read", st->path, t->name,
        dtypes[t->dtype].name);
}

void tensor_read(const SafeTensors* st, const Tensor* t, float* out) {
    unsigned char buffer[8192];
    tensor_check_dtype(st, t);
    size_t width = dtypes[t->dtype].bits / 8;
    bool good = !fseeko(st->file, st->data + t->begin, SEEK_SET);
    for (size_t i = 0, n; good && i < t->size; i += n) {
        if (t->dtype == F32) { // no conversion: all at once
            n = t->size;
            good = fread(out, width, n, st->file) == n;
            continue;
        }
        n = min_size(t->size - i, sizeof(buffer) / width);
        good = fread(buffer, width, n, st->file) == n;
        for (size_t k = 0; good && k < n; k++) {
            int64_t bits = 0;
            memcpy(&bits, buffer + k * width, width);
            uint32_t upper = (uint32_t)bits << 16; // a BF16 is the upper half of a float
            if (t->dtype == BF16) { memcpy(&out[i + k], &upper, sizeof(float)); }
            else { out[i + k] = t->dtype == F16 ? half_to_float(bits) : t->dtype == I32 ? (int32_t)bits : bits; }
        }
    }
    if (!good) { die("%s: tensor '%s' cannot be read", st->path, t->name); }
}

const char* shape_text(const size_t* dims, int n) { // "[ 2 3 4 ]"
    const char* text = "[ ";
    for (int i = 0; i < min_int(n, MAX_DIMS); i++) { text = text_of("%s%zu ", text, dims[i]); }
    return text_of("%s%s]", text, n > MAX_DIMS ? "... " : "");
}

int shape_dims(const size_t dims[4]) { // how many dimensions there are before the 0
    int n = 0;
    while (n < 4 && dims[n]) { n++; }
    return n;
}

void safetensors_read(const SafeTensors* st, const char* name, const size_t dims[4], float* out) {
    const Tensor* t = safetensors_find(st, name);
    int n = shape_dims(dims);
    if (!t) { die("%s: tensor '%s' is missing", st->path, name); }
    if (t->num_dims != n || memcmp(t->dims, dims, n * sizeof(size_t))) {
        die("%s: tensor '%s' has shape %s, expected %s", st->path, name, shape_text(t->dims, t->num_dims),
            shape_text(dims, n));
    }
    tensor_check_dtype(st, t);
    if (out) { tensor_read(st, t, out); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Writing

void header_begin(Header* h) {
    memset(h, 0, sizeof(*h));
    h->out = open_memstream(&h->bytes, &h->length);
    if (!h->out) { die("out of memory"); }
    fprintf(h->out, "%8s{\"__metadata__\":{", ""); // room for the length
}

void header_meta(Header* h, const char* key, const char* value) {
    if (h->num_meta++) { fputc(',', h->out); }
    text_write(h->out, key);
    fputc(':', h->out);
    text_write(h->out, value);
}

size_t header_tensor(Header* h, const char* name, const size_t dims[4]) {
    size_t begin = h->data, bytes = sizeof(float);
    fputs(h->num_tensors++ ? "," : "},", h->out);
    text_write(h->out, name);
    fputs(":{\"dtype\":\"F32\",\"shape\":[", h->out);
    for (int d = 0; d < shape_dims(dims); d++) {
        fprintf(h->out, "%s%zu", d ? "," : "", dims[d]);
        bytes *= dims[d];
    }
    h->data += bytes;
    fprintf(h->out, "],\"data_offsets\":[%zu,%zu]}", begin, h->data);
    return begin;
}

void header_end(Header* h) {
    fputs(h->num_tensors ? "}" : "}}", h->out);
    while (ftell(h->out) % 8) { fputc(' ', h->out); }
    bool good = !ferror(h->out);
    if (fclose(h->out) || !good) { die("out of memory"); }
    uint64_t n = h->length - 8;
    if (n > HEADER_LIMIT) { die("a header of %zu bytes is longer than the format allows", (size_t)n); }
    memcpy(h->bytes, &n, 8);
}

#endif
