/*
Part of train_megalodon.c: files of tensors, and those of them that are checkpoints. A safetensors file is

    8 bytes       the length of the header, little-endian
    the header    JSON, an object: "NAME": {"dtype": "F32", "shape": [2,3], "data_offsets": [begin,end]} for each tensor
                  and, if there is any, "__metadata__": {"key": "value", ...}
    the data      little-endian and row-major; the offsets count from its start, and the tensors tile it

The reader takes files from strangers: what is not just as the format says is refused, and nothing is believed before it
is checked against the size of the file.
*/
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// Room for one more element: the list doubles whenever its count is a power of two.
void* list_grow(void* list, size_t count, size_t size) {
    if (count & (count - 1)) { return list; }
    list = realloc(list, (count ? 2 * count : 1) * size);
    if (!list) { die("out of memory: a list of %zu bytes asked for", 2 * count * size); }
    return list;
}

enum { MAX_DIMS = 8, HEADER_LIMIT = 100000000 };
enum { F32, F16, BF16, I32, I64, NUM_DTYPES };
static const struct { const char* name; int bytes; } dtypes[NUM_DTYPES] = {
    {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I32", 4}, {"I64", 8}
};

typedef struct { const char* name; int dtype, num_dims; size_t dims[MAX_DIMS], size, begin, end; } Tensor;
typedef struct {
    char path[PATH_MAX], error[512];
    FILE* file;
    char* header;      // names and metadata point into it
    Tensor* tensors;   // sorted by name
    const char** meta; // key, value, key, value, ...
    int num_tensors, num_meta;
    size_t data;       // where the data starts in the file
} SafeTensors;

// A parser of the JSON that headers are made of. After the first error it reads as the end of the text.
typedef struct { char *p, *end; const char *error, *name; } Json; // name: of the tensor that an error is about, or ""

bool json_check(Json* j, bool good, const char* error) {
    if (!good && !j->error) { j->error = error; j->p = j->end; }
    return good;
}
char json_peek(Json* j) { // the next character that is not space; 0 at the end
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\t' || *j->p == '\n' || *j->p == '\r')) { j->p++; }
    return j->p < j->end ? *j->p : 0;
}
bool json_take(Json* j, char c) {
    bool there = json_peek(j) == c;
    j->p += there;
    return there;
}
void json_expect(Json* j, char c) {
    if (!json_take(j, c) && !j->error) { json_check(j, false, text_of("'%c' was expected in the header", c)); }
}

// A string, decoded in place and ended by a zero byte. "" after an error.
const char* json_string(Json* j) {
    static const char escapes[] = "\"\\/bfnrtu", meanings[] = "\"\\/\b\f\n\r\t?"; // \u.... becomes a question mark
    json_expect(j, '"');
    char *start = j->p, *to = j->p;
    for (; j->p < j->end && *j->p != '"'; j->p++) {
        if (!json_check(j, (unsigned char)*j->p >= 0x20, "a control character in a string")) { return ""; }
        if (*j->p != '\\') { *to++ = *j->p; continue; }
        const char* known = ++j->p < j->end && *j->p ? strchr(escapes, *j->p) : NULL;
        bool whole = known && (*known != 'u' || j->end - j->p >= 5);
        if (!json_check(j, whole, "a bad escape in a string")) { return ""; }
        *to++ = meanings[known - escapes];
        j->p += *known == 'u' ? 4 : 0;
    }
    if (!json_check(j, j->p < j->end, "a string does not end") || j->error) { return ""; }
    j->p++;
    *to = 0;
    return start;
}

// [n, n, ...] of at most `most` whole numbers; returns how many.
int json_counts(Json* j, size_t* numbers, int most) {
    int n = 0;
    json_expect(j, '[');
    for (bool more = json_peek(j) != ']'; more && !j->error; more = json_take(j, ',')) {
        json_check(j, n < most, "a list is too long");
        if (!json_check(j, isdigit((unsigned char)json_peek(j)), "a whole number was expected")) { return 0; }
        numbers[n] = strtoull(j->p, &j->p, 10); // a zero byte follows the header
        json_check(j, numbers[n++] <= SIZE_MAX / 100, "a number is too large");
    }
    json_expect(j, ']');
    return n;
}

// One tensor's {"dtype":...,"shape":[...],"data_offsets":[begin,end]}, its size checked against its shape.
void json_tensor(Json* j, Tensor* t) {
    size_t offsets[2] = {0, 0};
    int num_offsets = -1;
    t->dtype = t->num_dims = -1;
    json_expect(j, '{');
    do {
        const char* key = json_string(j);
        json_expect(j, ':');
        if (!strcmp(key, "dtype") && t->dtype < 0) {
            const char* name = json_string(j);
            do { t->dtype++; } while (t->dtype < NUM_DTYPES && strcmp(name, dtypes[t->dtype].name));
        } else if (!strcmp(key, "shape") && t->num_dims < 0) { t->num_dims = json_counts(j, t->dims, MAX_DIMS); }
        else if (!strcmp(key, "data_offsets") && num_offsets < 0) { num_offsets = json_counts(j, offsets, 2); }
        else { json_check(j, false, "its entry has an unknown or repeated field"); }
    } while (json_take(j, ','));
    json_expect(j, '}');
    json_check(j, t->dtype >= 0 && t->num_dims >= 0 && num_offsets >= 0, "dtype, shape or data_offsets is missing");
    json_check(j, num_offsets == 2, "data_offsets are not two numbers");
    json_check(j, t->dtype < NUM_DTYPES, "its dtype is none of F32 F16 BF16 I32 I64");
    t->size = 1;
    for (int i = 0; i < t->num_dims; i++) {
        json_check(j, !t->dims[i] || t->size <= SIZE_MAX / 16 / t->dims[i], "its shape overflows");
        t->size *= t->dims[i];
    }
    t->begin = offsets[0]; t->end = offsets[1];
    if (j->error) { return; }
    json_check(j, t->begin <= t->end && t->end - t->begin == t->size * dtypes[t->dtype].bytes,
               "its data_offsets do not fit its shape and dtype");
}

int tensor_by_offset(const void* a, const void* b) { // empty tensors first
    const Tensor *x = (const Tensor*)a, *y = (const Tensor*)b;
    return x->begin != y->begin ? (x->begin > y->begin) - (x->begin < y->begin) : (x->end > y->end) - (x->end < y->end);
}
int tensor_by_name(const void* a, const void* b) { return strcmp(((const Tensor*)a)->name, ((const Tensor*)b)->name); }

// The whole header, for a file with `bytes` of data.
void header_parse(SafeTensors* st, Json* j, size_t bytes) {
    size_t at = 0;
    bool had_meta = false;
    st->tensors = (Tensor*)list_grow(NULL, 0, sizeof(Tensor)); // a file may have none
    json_check(j, j->p < j->end && *j->p == '{', "the header does not start with '{'");
    json_take(j, '{');
    for (bool more = json_peek(j) != '}'; more && !j->error; more = json_take(j, ',')) {
        j->name = json_string(j);
        json_expect(j, ':');
        if (strcmp(j->name, "__metadata__")) {
            st->tensors = (Tensor*)list_grow(st->tensors, st->num_tensors, sizeof(Tensor));
            Tensor* t = &st->tensors[st->num_tensors++];
            memset(t, 0, sizeof(*t));
            t->name = j->name;
            json_tensor(j, t);
            continue;
        }
        json_check(j, !had_meta, "stands twice");
        had_meta = true;
        json_expect(j, '{');
        for (bool pair = json_peek(j) != '}'; pair && !j->error; pair = json_take(j, ',')) {
            st->meta = (const char**)list_grow(st->meta, st->num_meta, 2 * sizeof(char*));
            st->meta[2 * st->num_meta] = json_string(j);
            json_expect(j, ':');
            st->meta[2 * st->num_meta++ + 1] = json_string(j);
        }
        json_expect(j, '}');
    }
    if (j->error) { return; }
    j->name = "";
    json_expect(j, '}');
    json_check(j, !json_peek(j) && j->p == j->end, "something follows the header's object");
    qsort(st->tensors, st->num_tensors, sizeof(Tensor), tensor_by_offset);
    for (int i = 0; i < st->num_tensors && !j->error; at = st->tensors[i++].end) { // they must tile the data exactly
        j->name = st->tensors[i].name;
        json_check(j, st->tensors[i].begin == at, "its data overlaps another's or leaves a hole");
    }
    if (j->error) { return; }
    j->name = "";
    json_check(j, at <= bytes, "truncated: the data is shorter than the header says");
    json_check(j, at >= bytes, "bytes follow the last tensor's data");
    qsort(st->tensors, st->num_tensors, sizeof(Tensor), tensor_by_name);
    for (int i = 1; i < st->num_tensors && !j->error; i++) {
        j->name = st->tensors[i].name;
        json_check(j, strcmp(j->name, st->tensors[i - 1].name), "stands twice");
    }
}

void safetensors_close(SafeTensors* st) {
    if (st->file) { fclose(st->file); }
    free(st->header);
    free(st->tensors);
    free(st->meta);
}

// Opens a file and checks its header. Returns NULL, or what is wrong with it; then nothing stays open.
const char* safetensors_try(SafeTensors* st, const char* path) {
    unsigned char length[8] = {0};
    struct stat info;
    uint64_t n = 0;
    Json json = {NULL, NULL, NULL, ""};
    memset(st, 0, sizeof(*st));
    snprintf(st->path, sizeof(st->path), "%s", path);
    if (!(st->file = fopen(path, "rb")) || fstat(fileno(st->file), &info)) { return strerror(errno); }
    size_t got = fread(length, 1, 8, st->file), bytes = S_ISREG(info.st_mode) ? info.st_size : 0;
    for (int i = 0; i < 8; i++) { n |= (uint64_t)length[i] << 8 * i; }
    if (got < 8 || bytes < 8 || n > HEADER_LIMIT || n > bytes - 8) {
        json.error = "not a safetensors file, or a truncated one";
    } else {
        st->data = 8 + n;
        json.p = st->header = (char*)xcalloc(n + 1, 1);
        json.end = json.p + n;
        if (fread(st->header, 1, n, st->file) != n) { json.error = strerror(errno); }
        else { header_parse(st, &json, bytes - st->data); }
    }
    if (!json.error) { return NULL; }
    const char* where = *json.name ? text_of("tensor '%.200s': ", json.name) : "";
    snprintf(st->error, sizeof(st->error), "%s%s", where, json.error);
    safetensors_close(st);
    return st->error;
}

void safetensors_open(SafeTensors* st, const char* path) {
    const char* error = safetensors_try(st, path);
    if (error) { die("%s: %s", path, error); }
}

const Tensor* safetensors_find(const SafeTensors* st, const char* name) {
    Tensor key;
    key.name = name;
    return (const Tensor*)bsearch(&key, st->tensors, st->num_tensors, sizeof(Tensor), tensor_by_name);
}

const char* safetensors_meta(const SafeTensors* st, const char* key) {
    for (int i = 0; i < st->num_meta; i++) {
        if (!strcmp(st->meta[2 * i], key)) { return st->meta[2 * i + 1]; }
    }
    return NULL;
}

float half_to_float(uint16_t h) {
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent ? ldexpf(mantissa + 1024, exponent - 25) : ldexpf(mantissa, -24);
    return h >> 15 ? -x : x;
}

// Reads a tensor, turned into floats; I64 and I32 beyond 2^24 are rounded.
void tensor_read(const SafeTensors* st, const Tensor* t, float* out) {
    unsigned char buffer[8192];
    int width = dtypes[t->dtype].bytes;
    bool good = !fseeko(st->file, st->data + t->begin, SEEK_SET);
    for (size_t i = 0; i < t->size;) {
        size_t n = min_size(t->size - i, sizeof(buffer) / width);
        good = good && fread(buffer, width, n, st->file) == n;
        if (!good) { die("%s: tensor '%s' cannot be read", st->path, t->name); }
        for (const unsigned char* p = buffer; n > 0; n--, p += width) {
            uint64_t bits = 0;
            for (int b = 0; b < width; b++) { bits |= (uint64_t)p[b] << 8 * b; }
            uint32_t word = t->dtype == BF16 ? bits << 16 : bits;
            float f;
            memcpy(&f, &word, 4);
            out[i++] = t->dtype == F16 ? half_to_float(bits) : t->dtype == I32 ? (int32_t)word
                     : t->dtype == I64 ? (int64_t)bits : f;
        }
    }
}

const char* shape_text(const size_t* dims, int n) { // "[ 2 3 4 ]"
    const char* text = "[ ";
    for (int i = 0; i < n; i++) { text = text_of("%s%zu ", text, dims[i]); }
    return text_of("%s]", text);
}

// Reads the tensor `name` into out, or only checks it if out is NULL; it must have the shape that the spec says.
void safetensors_read(const SafeTensors* st, const char* name, const Spec* spec, float* out) {
    const Tensor* t = safetensors_find(st, name);
    int n = 0;
    if (!t) { die("%s: tensor '%s' is missing", st->path, name); }
    while (n < 4 && spec->dims[n]) { n++; }
    if (t->num_dims != n || memcmp(t->dims, spec->dims, n * sizeof(size_t))) {
        die("%s: tensor '%s' has shape %s, expected %s", st->path, name, shape_text(t->dims, t->num_dims),
            shape_text(spec->dims, n));
    }
    if (out) { tensor_read(st, t, out); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Checkpoints: weights, both Adam moments, all flags and the step, from which data order and sampling follow; with
// --carry also the carried states

// The tensors of block STATES, of all rows of a step; rows of a table like param_specs's, which stand after those.
enum { NUM_CARRIED = 7 };
void carried_specs(Spec specs[NUM_CARRIED], const Options* o) {
    const Config* c = &o->model;
    size_t R = (size_t)o->batch * o->accum * ranks.groups, D = c->model_dim, N = c->cema_ndim, G = c->norm_num_groups;
    int L = o->carry ? c->num_layers : 0, once = o->carry;
    const Spec rows[NUM_CARRIED] = {
        {"layers.%d.mega.timenorm.count", L,    {R, 0, 0, 0}, R, 0},
        {"layers.%d.mega.timenorm.mean",  L,    {R, G, 0, 0}, R * G, 0},
        {"layers.%d.mega.timenorm.var",   L,    {R, G, 0, 0}, R * G, 0},
        {"output.final_norm.count",       once, {R, 0, 0, 0}, R, 0},
        {"output.final_norm.mean",        once, {R, G, 0, 0}, R * G, 0},
        {"output.final_norm.var",         once, {R, G, 0, 0}, R * G, 0},
        {"layers.%d.mega.cema.h",         L,    {R, D, N, 2}, R * D * N * 2, 0},
    };
    memcpy(specs, rows, sizeof(rows));
}

// A walk over the tensors of a checkpoint, in the order of the file: for (Saved s = before_saved; saved_next(...);)
// begin and end: of its data, in bytes.
typedef struct { int block, row, layer; const Spec* spec; size_t begin, end; char name[128]; } Saved;
static const Saved before_saved = {WEIGHTS, 0, -1, NULL, 0, 0, ""};
bool saved_next(Saved* s, const Spec* specs, int blocks) { // false after the last one of the first `blocks` blocks
    s->layer++;
    while (s->layer >= specs[s->row].slots || !specs[s->row].size) {
        s->layer = 0;
        if (++s->row < (s->block == STATES ? NUM_PARAMS + NUM_CARRIED : NUM_PARAMS)) { continue; }
        s->row = ++s->block == STATES ? NUM_PARAMS : 0;
        if (s->block == blocks) { return false; }
    }
    s->spec = &specs[s->row];
    s->begin = s->end; s->end += s->spec->size * sizeof(float);
    layer_name(s->name, block_prefixes[s->block], s->spec->name, s->layer);
    return true;
}

// Copies a tensor between `tensor` and the backend; of STATES, the rows of a micro-step. part receives what of the
// tensor is this rank's.
void saved_copy(const Backend* b, const Options* o, const Saved* s, int micro, float* tensor, bool to_host,
                size_t part[2]) {
    if (s->block < STATES) { b->copy(b->self, s->block, s->row, s->layer, tensor, to_host, part); return; }
    size_t n = (size_t)o->batch * o->model.norm_num_groups, each = s->spec->size / o->accum / ranks.groups;
    int i = s->row - NUM_PARAMS, layer = i < 3 ? s->layer : o->model.num_layers;
    part[0] = ((size_t)micro * ranks.groups + ranks.group) * each;
    part[1] = part[0] + each;
    tensor += part[0];
    if (i == 6) { b->copy(b->self, CARRIED_H, micro, s->layer, tensor, to_host, part); return; }
    NormState* norms = (NormState*)xcalloc(n, sizeof(NormState));
    b->copy(b->self, CARRIED_NORM, micro, layer, norms, true, part);
    for (size_t k = 0; k < n; k++) { // the groups of a row hold its count each
        double* field = i % 3 == 0 ? &norms[k].count : i % 3 == 1 ? &norms[k].mean : &norms[k].var;
        if (to_host) { tensor[k * each / n] = *field; } else { *field = tensor[k * each / n]; }
    }
    if (!to_host) { b->copy(b->self, CARRIED_NORM, micro, layer, norms, false, part); }
    free(norms);
}

// A key of the metadata and its value; control characters become question marks.
void header_add_meta(FILE* header, const char* key, const char* value) {
    fprintf(header, ",\"%s\":\"", key);
    for (const char* s = value; *s; s++) {
        if (*s == '"' || *s == '\\') { fputc('\\', header); }
        fputc((unsigned char)*s < 0x20 ? '?' : *s, header);
    }
    fputc('"', header);
}

// A tensor of floats whose data begins at byte `begin`.
void header_add_tensor(FILE* header, const char* name, const Spec* s, size_t begin) {
    fprintf(header, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", name);
    for (int d = 0; d < 4 && s->dims[d]; d++) { fprintf(header, "%s%zu", d ? "," : "", s->dims[d]); }
    fprintf(header, "],\"data_offsets\":[%zu,%zu]}", begin, begin + s->size * sizeof(float));
}

// Writes DIR/step_%08d.safetensors under another name, flushes it to the disk, and only then gives it its name. Rank 0
// writes the header, then every rank what is in its shard.
void checkpoint_save(const Backend* b, const Spec* specs, const Options* o, int step) {
    char* header = NULL;
    size_t length = 0, bytes = 0, mine[2];
    FILE* h = open_memstream(&header, &length);
    if (!h) { die("out of memory"); }
    fprintf(h, "%8s{\"__metadata__\":{\"format\":\"megalodon\",\"step\":\"%d\",\"tokens\":\"%.0f\"", "", step,
            step * step_tokens(o));
    for (int i = 0; option_rows[i].group != MODE_GROUP; i++) { header_add_meta(h, option_key(i), option_text(o, i)); }
    fputc('}', h);
    for (Saved s = before_saved; saved_next(&s, specs, NUM_BLOCKS); bytes = s.end) {
        header_add_tensor(h, s.name, s.spec, s.begin);
    }
    fputc('}', h);
    while (ftell(h) % 8) { fputc(' ', h); }
    fclose(h);
    for (int i = 0; i < 8; i++) { header[i] = (length - 8) >> 8 * i & 255; } // how much follows

    const char *path = text_of("%s/step_%08d.safetensors", o->out, step), *part = text_of("%s.part", path);
    double at = ranks.rank ? 0 : length; // the same on all ranks, though their headers may differ in --threads
    all_sum(&at, 1);
    int fd = open(part, O_CREAT | O_WRONLY, 0666);
    FILE* f = fd < 0 ? NULL : fdopen(fd, "wb");
    bool good = f && !ftruncate(fd, at + bytes) && (ranks.rank || fwrite(header, 1, length, f) == length);
    for (Saved s = before_saved; good && saved_next(&s, specs, NUM_BLOCKS);) {
        float* tensor = (float*)xcalloc(s.spec->size, sizeof(float));
        for (int k = 0; good && k < (s.block == STATES ? o->accum : 1); k++) {
            saved_copy(b, o, &s, k, tensor, true, mine);
            good = !fseeko(f, at + s.begin + mine[0] * sizeof(float), SEEK_SET) &&
                   fwrite(tensor + mine[0], sizeof(float), mine[1] - mine[0], f) == mine[1] - mine[0];
        }
        free(tensor);
    }
    good = good && !fflush(f) && !fsync(fd) && !fclose(f);
    if (good) { all_sum(&at, 1); } // waits for all
    if (!good || (ranks.rank == 0 && rename(part, path))) {
        const char* error = strerror(errno);
        unlink(part);
        die("cannot write %s: %s (earlier checkpoints are untouched)", path, error);
    }
    int folder = open(o->out, O_RDONLY | O_DIRECTORY); // the new name must survive a power cut too
    if (folder >= 0) { fsync(folder); close(folder); }
    free(header);
}

// The newest step below `below` that has a checkpoint in a folder; -1 if none has.
int checkpoint_newest(const char* folder, int below) {
    int newest = -1, step;
    DIR* d = opendir(folder);
    for (struct dirent* entry; d && (entry = readdir(d));) {
        int n = 0;
        bool named = sscanf(entry->d_name, "step_%8d.safetensors%n", &step, &n) == 1 && n && !entry->d_name[n];
        if (named && step > newest && step < below) { newest = step; }
    }
    if (d) { closedir(d); }
    return newest;
}

// Opens the newest valid checkpoint in a folder.
void checkpoint_open(SafeTensors* st, const char* folder) {
    for (int step = INT_MAX; (step = checkpoint_newest(folder, step)) >= 0;) {
        const char* path = text_of("%s/step_%08d.safetensors", folder, step);
        const char* error = safetensors_try(st, path);
        if (!error && safetensors_meta(st, "step")) { return; }
        fprintf(stderr, "skipping %s: %s\n", path, error ? error : "not a checkpoint");
    }
    die("--resume %s: no valid step_*.safetensors there", folder);
}

// What a file records, over o, only the model and its tokens unless `all`; flags that contradict a model are refused.
void options_from_file(Options* o, const SafeTensors* st, const bool* given, bool all) {
    for (int i = 0; i < NUM_OPTIONS && option_rows[i].group <= (all ? TRAINING_GROUP : TOKEN_GROUP); i++) {
        const char* text = safetensors_meta(st, option_key(i));
        Options file = *o;
        if (!text) { continue; }
        option_set(&file, i, text, st->path);
        const char *theirs = option_text(&file, i), *ours = option_text(o, i);
        if (!given[i]) { *o = file; }
        else if (option_rows[i].group == MODEL_GROUP && strcmp(theirs, ours)) {
            die("%s has %s %s, the flags say %s", st->path, option_rows[i].name, theirs, ours);
        }
    }
}

// Refuses files that hold more than this model has. A released state dict also holds buffers, which mean nothing here,
// and the embedding again as the output layer where they are tied.
void weights_check(const Spec* specs, const SafeTensors* st, bool share_emb) {
    for (int t = 0; t < st->num_tensors; t++) {
        const char *has = st->tensors[t].name, *dot = strrchr(has, '.');
        bool known = !strncmp(has, "adam_", 5) || !strncmp(has, "state.", 6) || !strcmp(has, "rope.freqs")
                     || (dot && !strncmp(dot, ".prior_", 7));
        for (Saved s = before_saved; !known && saved_next(&s, specs, WEIGHTS + 1);) { known = !strcmp(has, s.name); }
        if (!known && share_emb && !strcmp(has, "output.output.weight")) {
            float *output = (float*)xcalloc(specs[0].size, sizeof(float)), *embed = (float*)xcalloc(specs[0].size, 4);
            safetensors_read(st, has, &specs[0], output);
            safetensors_read(st, specs[0].name, &specs[0], embed);
            known = !memcmp(output, embed, specs[0].size * sizeof(float));
            if (!known) { die("%s: share_emb is 1, but '%s' differs from '%s'", st->path, has, specs[0].name); }
            free(output); free(embed);
        }
        if (!known) { die("%s: unexpected tensor '%s': a model of this configuration has none", st->path, has); }
    }
}
