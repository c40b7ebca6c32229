/*
Part of train_megalodon.c: what turns text into tokens and back, the files that tokens come from, the order in which
training reads them, and what a loss per token means for the text. Without a tokenizer a byte is a token.

A tokenizer is a text file, NAME.tok, written by the scripts of this folder. Eight lines, then one for each id:

    megalodon.c tokenizer 1
    kind unigram              or bpe
    pieces 32000              ids, 0 to pieces - 1
    eod 1                     the id that follows each document; no text is ever encoded with it
    unknown 0                 the id of what cannot be encoded; not used where there are byte pieces
    unknown_score -24.81      unigram: what a character that is no piece scores
    whitespace keep           collapse: runs of it become one space, line ends too, and each line starts with one
    lossless 1                0: what is decoded may differ from the text
    n -3.7163 " the"          type, score, bytes; \xHH is a byte that would not stand well in a line

Types: n normal, u user-defined; b a byte (256 of them or none), c control, x unused: these are never found in text.
Every line of a text, with its newline, is encoded alone: its memory is that of a line.
*/
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// A regular file's contents, with a zero byte after them.
unsigned char* file_read(const char* path, size_t* size) {
    struct stat info;
    FILE* f = fopen(path, "rb");
    if (!f || fstat(fileno(f), &info)) { die("%s: %s", path, strerror(errno)); }
    if (!S_ISREG(info.st_mode)) { die("%s: not a regular file", path); }
    unsigned char* text = (unsigned char*)xcalloc(info.st_size + 1, 1);
    *size = info.st_size;
    if (fread(text, 1, *size, f) != *size) { die("%s: cannot be read", path); }
    fclose(f);
    return text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokenizer files. They come from strangers: nothing is believed before it is checked.

enum { MAX_PIECES = 1 << 24, MAX_PIECE_SIZE = 1024 };

typedef struct { const unsigned char* bytes; int size, id; char type; float score; } TokenPiece;
typedef struct {
    const char* path;
    int pieces, eod, unknown;
    bool bpe, collapse, lossless;
    float unknown_score;
    TokenPiece* piece;           // by id
    TokenPiece* sorted;          // those that may be found in text (n and u), in the order of their bytes
    int num_sorted, first[257];  // sorted[first[c]..first[c+1]) begin with byte c
    int byte_piece[256];         // ids; -1 where there are none
    unsigned char* text;         // the file, which the bytes of pieces point into
} Tokenizer;

typedef struct { const char* path; unsigned char *p, *end; int line; } TokReader;

// The next line, ended by a zero byte.
char* tok_line(TokReader* r) {
    char* line = (char*)r->p;
    unsigned char* newline = (unsigned char*)memchr(r->p, '\n', r->end - r->p);
    r->line++;
    if (!newline) { die("%s: truncated: line %d does not end or is missing", r->path, r->line); }
    *newline = 0;
    r->p = newline + 1;
    return line;
}

// The value of the next line of the head, which must be "key value".
char* tok_value(TokReader* r, const char* key) {
    char* line = tok_line(r);
    size_t n = strlen(key);
    if (strncmp(line, key, n) || line[n] != ' ') { die("%s: line %d: expected \"%s ...\"", r->path, r->line, key); }
    return line + n + 1;
}

int tok_choice(TokReader* r, const char* key, const char* no, const char* yes) {
    const char* value = tok_value(r, key);
    bool is = !strcmp(value, yes);
    if (!is && strcmp(value, no)) { die("%s: line %d: expected \"%s %s\" or %s", r->path, r->line, key, no, yes); }
    return is;
}

int tok_int(TokReader* r, const char* key, int low, int high) {
    char *value = tok_value(r, key), *end = value;
    long n = isdigit((unsigned char)*value) && strlen(value) < 10 ? strtol(value, &end, 10) : 0;
    if (end == value || *end || n < low || n > high) {
        die("%s: line %d: expected \"%s\" and a whole number from %d to %d", r->path, r->line, key, low, high);
    }
    return n;
}

float tok_score(TokReader* r, char* text, char** end) {
    double x = isspace((unsigned char)*text) ? (*end = text, 0) : strtod(text, end);
    if (*end == text || !(fabs(x) <= 1e30)) { die("%s: line %d: expected a score", r->path, r->line); }
    return x;
}

// One piece: TYPE SCORE "BYTES". The bytes are decoded in place.
TokenPiece tok_piece(TokReader* r, int id) {
    char *line = tok_line(r), *p = line;
    TokenPiece piece = {NULL, 0, id, *line, 0};
    bool good = *line && strchr("nubcx", *line) && line[1] == ' ';
    if (good) { piece.score = tok_score(r, line + 2, &p); }
    good = good && p[0] == ' ' && p[1] == '"';
    unsigned char *from = (unsigned char*)p + 2, *to = from;
    piece.bytes = to;
    for (; good && *from != '"'; from++) {
        unsigned c = *from;
        good = c >= 0x20 && c != 0x7f; // the zero byte at the end of the line is one of them
        if (c == '\\') {
            static const char digits[] = "0123456789abcdef";
            const char* high = from[1] == 'x' && from[2] ? strchr(digits, from[2]) : NULL;
            const char* low = high && from[3] ? strchr(digits, from[3]) : NULL;
            good = low;
            if (good) { c = (high - digits) << 4 | (low - digits); from += 3; }
        }
        *to++ = c;
    }
    good = good && from + 2 == r->p && to - piece.bytes <= MAX_PIECE_SIZE;
    if (!good) { die("%s: line %d: expected a piece: n, u, b, c or x, score, \"bytes\"", r->path, r->line); }
    piece.size = to - piece.bytes;
    bool fits = piece.type == 'b' ? piece.size == 1 : (piece.type == 'c') == (piece.size == 0);
    if (!fits) { die("%s: line %d: %d bytes in a piece of type %c", r->path, r->line, piece.size, piece.type); }
    return piece;
}

int piece_by_bytes(const void* a, const void* b) {
    const TokenPiece *x = (const TokenPiece*)a, *y = (const TokenPiece*)b;
    int order = memcmp(x->bytes, y->bytes, x->size < y->size ? x->size : y->size);
    return order ? order : x->size - y->size;
}

// Of sorted[low..high), which begin with the same k bytes, the first that has one from c on next.
int tokenizer_bound(const Tokenizer* t, int low, int high, int k, int c) {
    while (low < high) {
        int middle = (low + high) / 2;
        const TokenPiece* p = &t->sorted[middle];
        if (p->size > k && p->bytes[k] >= c) { high = middle; } else { low = middle + 1; }
    }
    return low;
}

Tokenizer* tokenizer_open(const char* path) {
    Tokenizer* t = (Tokenizer*)xcalloc(1, sizeof(Tokenizer));
    size_t size;
    int num_bytes = 0;
    t->path = path;
    t->text = file_read(path, &size);
    TokReader r = {path, t->text, t->text + size, 0};
    static const char magic[] = "megalodon.c tokenizer 1\n";
    if (size < strlen(magic) || memcmp(r.p, magic, strlen(magic))) { die("%s: not a tokenizer file (.tok)", path); }
    tok_line(&r);
    t->bpe = tok_choice(&r, "kind", "unigram", "bpe");
    t->pieces = tok_int(&r, "pieces", 2, MAX_PIECES);
    t->eod = tok_int(&r, "eod", 0, t->pieces - 1);
    t->unknown = tok_int(&r, "unknown", 0, t->pieces - 1);
    char* end = tok_value(&r, "unknown_score");
    t->unknown_score = tok_score(&r, end, &end);
    if (*end) { die("%s: line %d: expected \"unknown_score\" and a number", path, r.line); }
    t->collapse = tok_choice(&r, "whitespace", "keep", "collapse");
    t->lossless = tok_choice(&r, "lossless", "0", "1");
    size_t most = (r.end - r.p) / strlen("c 0 \"\"\n");
    if ((size_t)t->pieces > most) { die("%s: truncated: no room for %d pieces", path, t->pieces); }
    t->piece = (TokenPiece*)xcalloc(t->pieces, sizeof(TokenPiece));
    t->sorted = (TokenPiece*)xcalloc(t->pieces, sizeof(TokenPiece));
    memset(t->byte_piece, -1, sizeof(t->byte_piece));
    for (int i = 0; i < t->pieces; i++) {
        TokenPiece p = t->piece[i] = tok_piece(&r, i);
        if (p.type == 'n' || p.type == 'u') { t->sorted[t->num_sorted++] = p; }
        if (p.type != 'b') { continue; }
        if (t->byte_piece[*p.bytes] >= 0) { die("%s: line %d: this byte has a piece already", path, r.line); }
        t->byte_piece[*p.bytes] = i;
        num_bytes++;
    }
    if (r.p < r.end) { die("%s: something follows the last of %d pieces", path, t->pieces); }
    if (num_bytes % 256) { die("%s: %d byte pieces: expected all 256 or none", path, num_bytes); }
    if (t->piece[t->eod].type != 'c' || t->piece[t->unknown].type != 'c' || t->eod == t->unknown) {
        die("%s: eod %d and unknown %d must be two pieces of type c", path, t->eod, t->unknown);
    }
    qsort(t->sorted, t->num_sorted, sizeof(TokenPiece), piece_by_bytes);
    for (int i = 1; i < t->num_sorted; i++) {
        const TokenPiece* p = &t->sorted[i];
        if (!piece_by_bytes(p - 1, p)) { die("%s: pieces %d and %d have the same bytes", path, p[-1].id, p->id); }
    }
    for (int c = 0; c <= 256; c++) { t->first[c] = tokenizer_bound(t, 0, t->num_sorted, 0, c); }
    return t;
}

void tokenizer_close(Tokenizer* t) {
    if (!t) { return; }
    free(t->text); free(t->piece); free(t->sorted); free(t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding and decoding

typedef struct { int* ids; size_t count; } Tokens; // a list that grows

void tokens_add(Tokens* out, int id) {
    out->ids = (int*)list_grow(out->ids, out->count, sizeof(int));
    out->ids[out->count++] = id;
}

// What lies between two places in a line. A segment is [start,end) of one piece, or unknown.
typedef struct {
    size_t start, end; // of the segment that ends here; of the one that starts here
    int id;            // of the one that ends here
    float best;        // unigram: the score of the best segments up to here
    bool frozen;       // bpe: the segment that starts here does not merge
} Place;

// The walk from the empty word over longer and longer prefixes of text: those pieces that still fit.
typedef struct { int low, high, size; } Match;

// One byte further; false where nothing fits any more.
bool match_next(const Tokenizer* t, Match* m, int c) {
    int low = m->low, high = m->high, k = m->size++;
    m->low = k ? tokenizer_bound(t, low, high, k, c) : t->first[c];
    m->high = k ? tokenizer_bound(t, m->low, high, k, c + 1) : t->first[c + 1];
    return m->low < m->high;
}

// The piece that is exactly the bytes of the walk so far: the first of those that begin with them. NULL if none is.
const TokenPiece* match_piece(const Tokenizer* t, const Match* m) {
    return t->sorted[m->low].size == m->size ? &t->sorted[m->low] : NULL;
}

const TokenPiece* piece_find(const Tokenizer* t, const unsigned char* bytes, size_t n) {
    Match m = {0, 0, 0};
    for (size_t k = 0; k < n; k++) {
        if (!match_next(t, &m, bytes[k])) { return NULL; }
    }
    return match_piece(t, &m);
}

// Bytes of the character at s, by its first one.
size_t character_size(const unsigned char* text, size_t s, size_t n) {
    size_t size = text[s] < 0xc0 ? 1 : text[s] < 0xe0 ? 2 : text[s] < 0xf0 ? 3 : 4;
    return min_size(size, n - s);
}

// The segment [start,end) is taken if it scores more than what is there, or is the first to end there.
void place_offer(Place* end, size_t start, int id, float best) {
    if (end->id >= 0 && best <= end->best) { return; }
    end->start = start; end->id = id; end->best = best;
}

// The most probable segments (Viterbi). Sums are floats, and the first of equals stays, as in SentencePiece: the tokens
// are the same. In a very long line its sums start again from 0, before they are too large to tell candidates apart.
void encode_unigram(const Tokenizer* t, const unsigned char* text, size_t n, Place* at) {
    for (size_t e = 1; e <= n; e++) { at[e].id = -1; }
    for (size_t s = 0, size; s < n; s += size) {
        float past = at[s].best;
        for (size_t e = s; past < -100000 && e <= min_size(n, s + MAX_PIECE_SIZE); e++) { at[e].best -= past; }
        size = character_size(text, s, n);
        bool single = false; // a piece is just this character
        Match m = {0, 0, 0};
        for (size_t e = s; e < n && match_next(t, &m, text[e]);) {
            const TokenPiece* p = match_piece(t, &m);
            if (e++, !p) { continue; }
            place_offer(&at[e], s, p->id, at[s].best + p->score);
            single = single || e == s + size;
        }
        if (!single) { place_offer(&at[s + size], s, t->unknown, at[s].best + t->unknown_score); }
    }
    for (size_t e = n; e > 0; e = at[e].start) { at[at[e].start].end = e; }
}

// A pair of neighbouring segments that joined are a piece, in a heap: best score first, then the leftmost.
typedef struct { float score; size_t start, middle, end; } Pair;
typedef struct { Pair* pairs; size_t count; } Heap;

bool pair_before(const Pair* a, const Pair* b) {
    return a->score != b->score ? a->score > b->score : a->start < b->start;
}

void heap_push(Heap* h, Pair x) {
    h->pairs = (Pair*)list_grow(h->pairs, h->count, sizeof(Pair));
    size_t i = h->count++;
    for (; i > 0 && pair_before(&x, &h->pairs[(i - 1) / 2]); i = (i - 1) / 2) { h->pairs[i] = h->pairs[(i - 1) / 2]; }
    h->pairs[i] = x;
}

Pair heap_pop(Heap* h) {
    Pair top = h->pairs[0], x = h->pairs[--h->count];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < h->count) {
        child += child + 1 < h->count && pair_before(&h->pairs[child + 1], &h->pairs[child]);
        if (!pair_before(&h->pairs[child], &x)) { break; }
        h->pairs[i] = h->pairs[child];
        i = child;
    }
    h->pairs[i] = x;
    return top;
}

// The segment that starts at s and the one after it, if they may be joined.
void heap_push_at(Heap* h, const Tokenizer* t, const unsigned char* text, size_t n, const Place* at, size_t s) {
    size_t middle = at[s].end, end = middle < n ? at[middle].end : 0;
    const TokenPiece* p = end && !at[s].frozen && !at[middle].frozen ? piece_find(t, text + s, end - s) : NULL;
    if (p) { Pair pair = {p->score, s, middle, end}; heap_push(h, pair); }
}

// Byte pair encoding: from characters up, always the pair with the best score is joined.
void encode_bpe(const Tokenizer* t, const unsigned char* text, size_t n, Place* at) {
    Heap heap = {NULL, 0};
    for (size_t s = 0, size; s < n; s += size) { // what the user defined, the longest of it, is one segment for good
        size = character_size(text, s, n);
        Match m = {0, 0, 0};
        for (size_t e = s; e < n && match_next(t, &m, text[e]);) {
            const TokenPiece* p = match_piece(t, &m);
            if (e++, p && p->type == 'u') { size = e - s; at[s].frozen = true; }
        }
        at[s].end = s + size;
        at[s + size].start = s;
    }
    for (size_t s = 0; s < n; s = at[s].end) { heap_push_at(&heap, t, text, n, at, s); }
    while (heap.count > 0) {
        Pair p = heap_pop(&heap);
        if (at[p.start].end != p.middle || at[p.middle].end != p.end) { continue; } // one of the two is no more
        at[p.start].end = p.end;
        at[p.end].start = p.start;
        at[p.middle].end = 0;
        heap_push_at(&heap, t, text, n, at, p.start);
        if (p.start > 0) { heap_push_at(&heap, t, text, n, at, at[p.start].start); }
    }
    for (size_t s = 0; s < n; s = at[s].end) {
        const TokenPiece* p = piece_find(t, text + s, at[s].end - s);
        at[at[s].end].id = p ? p->id : t->unknown;
    }
    free(heap.pairs);
}

// One line, its newline with it.
void encode_line(const Tokenizer* t, const unsigned char* text, size_t n, Tokens* out) {
    unsigned char* folded = NULL;
    if (t->collapse) {
        folded = (unsigned char*)xcalloc(n + 1, 1);
        size_t to = 0;
        bool space = true;
        for (size_t k = 0; k < n; k++) {
            bool after = space;
            space = text[k] && strchr(" \t\n\r", text[k]);
            if (after && !space) { folded[to++] = ' '; }
            if (!space) { folded[to++] = text[k]; }
        }
        text = folded; n = to;
    }
    Place* at = (Place*)xcalloc(n + 1, sizeof(Place));
    (t->bpe ? encode_bpe : encode_unigram)(t, text, n, at);
    for (size_t s = 0, e; s < n; s = e) { // what is unknown is written in bytes, or a run of it as one token
        e = at[s].end;
        bool unknown = at[e].id == t->unknown, in_bytes = unknown && t->byte_piece[0] >= 0;
        bool again = unknown && s > 0 && at[s].id == t->unknown;
        for (size_t k = s; in_bytes && k < e; k++) { tokens_add(out, t->byte_piece[text[k]]); }
        if (!in_bytes && !again) { tokens_add(out, at[e].id); }
    }
    free(at); free(folded);
}

// Adds the tokens of a text; without a tokenizer its bytes.
void encode(const Tokenizer* t, const unsigned char* text, size_t n, Tokens* out) {
    for (size_t s = 0, e; s < n; s = e) {
        const unsigned char* newline = (const unsigned char*)memchr(text + s, '\n', n - s);
        e = newline ? (size_t)(newline + 1 - text) : n;
        if (t) { encode_line(t, text + s, e - s, out); }
        for (; !t && s < e; s++) { tokens_add(out, text[s]); }
    }
}

// What a sample goes on from: the prompt; where that is empty a new document, or without documents a line.
Tokens prompt_tokens(const Options* o, const Tokenizer* t) {
    const char* prompt = *o->prompt || o->eod >= 0 ? o->prompt : "\n";
    Tokens out = {NULL, 0};
    if (o->eod >= 0) { tokens_add(&out, o->eod); }
    encode(t, (const unsigned char*)prompt, strlen(prompt), &out);
    if (!out.count) { tokens_add(&out, t->eod); } // a prompt of spaces that the tokenizer drops
    for (size_t i = 0; i < out.count; i++) {
        bool known = out.ids[i] < o->model.vocab_size;
        if (!known) { die("--prompt: byte %d is not below vocab_size %d", out.ids[i], o->model.vocab_size); }
    }
    return out;
}

// Prints a token as the text it stands for, or as a number where that is not known. What it prints is flushed when no
// character is cut; *left counts the bytes it still lacks.
void token_print(const Tokenizer* t, int vocab, int id, int* left) {
    unsigned char byte = id;
    TokenPiece p = {&byte, vocab <= 256, 0, 'b', 0};
    if (t) { p = id < t->pieces ? t->piece[id] : t->piece[t->eod]; }
    else if (vocab > 256) { printf("%d ", id); }
    for (int i = 0; i < p.size; i++) {
        unsigned char c = p.bytes[i];
        *left = *left && (c & 0xc0) == 0x80 ? *left - 1 : c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : c >= 0xc0 ? 1 : 0;
        putchar(c);
    }
    if (!*left) { fflush(stdout); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Data: files of tokens laid end to end, and the documents in them

typedef struct {
    const char* path;
    const int* ids;            // a text as a tokenizer has it; NULL: the file is read
    int width;                 // bytes of a token in the file
    size_t offset, begin, end; // where they start; tokens [begin,end) are meant
} Segment;

typedef struct { size_t at, size, stretches; } Document; // its first token, tokens, stretches before it (see below)

typedef struct {
    Tokenizer* tokenizer;       // NULL: a byte is a token
    Segment* segments;
    int count;
    size_t size;                // tokens
    int eod;                    // the token that ends documents; -1: all is one document, without an end
    Document* documents;
    size_t num_documents, stretches;
} Dataset;

void dataset_add(Dataset* d, Segment s, size_t begin, size_t end) {
    if (begin == end) { return; }
    d->segments = (Segment*)list_grow(d->segments, d->count, sizeof(Segment));
    s.begin = begin; s.end = end;
    d->segments[d->count++] = s;
    d->size += end - begin;
}

bool is_token_file(const char* path) {
    const char* dot = strrchr(path, '.');
    return dot && !strcmp(dot, ".bin");
}

// A text: bytes are tokens, or what the tokenizer makes of them. A file that ends in .bin: llm.c's format, 256 int32
// (magic, version, count), then uint16 tokens (magic 20240520, version 1) or uint32 tokens (20240801, 7).
Segment token_file(const char* path, const Tokenizer* tokenizer) {
    Segment s = {path, NULL, 1, 0, 0, 0};
    struct stat info;
    int32_t header[256];
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &info)) { die("%s: %s", path, strerror(errno)); }
    if (!S_ISREG(info.st_mode)) { die("%s: not a regular file", path); }
    size_t bytes = s.end = info.st_size;
    if (is_token_file(path)) {
        if (read(fd, header, sizeof(header)) != sizeof(header)) { die("%s: truncated: no header of 1024 bytes", path); }
        s.offset = sizeof(header);
        int magic = header[0], version = header[1], count = header[2];
        s.width = magic == 20240520 && version == 1 ? 2 : magic == 20240801 && version == 7 ? 4 : 0;
        if (!s.width) {
            die("%s: magic %d version %d: llm.c's token files have 20240520/1 or 20240801/7", path, magic, version);
        }
        s.end = count;
        bool fits = count >= 0 && bytes == s.offset + s.end * s.width;
        if (!fits) { die("%s: %d tokens do not make a file of %zu bytes", path, count, bytes); }
    } else if (tokenizer) {
        unsigned char* text = file_read(path, &bytes);
        Tokens tokens = {NULL, 0};
        encode(tokenizer, text, bytes, &tokens);
        free(text);
        s.ids = tokens.ids; s.end = tokens.count;
    }
    close(fd);
    if (s.end == 0) { die("%s: empty", path); }
    return s;
}

// Adds the files that a list of patterns names; the last 10% of each go to held_out if not NULL.
void dataset_open(Dataset* d, Dataset* held_out, const char* flag, const char* patterns) {
    char* list = strdup(patterns);
    for (char *save = NULL, *pattern = strtok_r(list, ",", &save); pattern; pattern = strtok_r(NULL, ",", &save)) {
        glob_t found;
        if (glob(pattern, 0, NULL, &found)) { die("%s: no file is named %s", flag, pattern); }
        for (size_t i = 0; i < found.gl_pathc; i++) {
            Segment s = token_file(strdup(found.gl_pathv[i]), d->tokenizer);
            size_t cut = held_out ? (size_t)(0.9 * s.end) : s.end;
            dataset_add(d, s, 0, cut);
            if (held_out) { dataset_add(held_out, s, cut, s.end); }
        }
        globfree(&found);
    }
    free(list);
}

// out = tokens [at, at+n) of the files laid end to end; every id must be below vocab.
void dataset_read(const Dataset* d, size_t at, size_t n, int* out, int vocab) {
    for (const Segment* s = d->segments; n > 0; at -= min_size(at, s->end - s->begin), s++) {
        if (at >= s->end - s->begin) { continue; }
        size_t take = min_size(n, s->end - s->begin - at), bytes = take * s->width, done = 0;
        unsigned char* p = (unsigned char*)out + take * (sizeof(int) - s->width); // widened in place, from the front
        int fd = s->ids ? -1 : open(s->path, O_RDONLY);
        for (ssize_t got = 1; fd >= 0 && done < bytes && got > 0; done += got > 0 ? got : 0) {
            got = pread(fd, p + done, bytes - done, s->offset + (s->begin + at) * s->width + done);
        }
        if (s->ids) { memcpy(out, s->ids + s->begin + at, take * sizeof(int)); }
        else if (done < bytes) { die("%s: cannot be read any more", s->path); }
        if (fd >= 0) { close(fd); }
        for (size_t k = 0; k < take; k++, p += s->width) {
            uint32_t id = s->ids ? out[k] : 0;
            for (int b = 0; !s->ids && b < s->width; b++) { id |= (uint32_t)p[b] << 8 * b; }
            out[k] = id;
            if (id < (uint32_t)vocab) { continue; }
            die("%s: token %zu is %u, vocab_size is %d", s->path, s->begin + at + k, id, vocab);
        }
        out += take; n -= take; at += take;
    }
}

// Sequence `row` of a step and the token that follows it, T + 1 in all, from a uniformly random place: a pure function
// of (seed, step, row), whoever asks.
void dataset_sample(const Dataset* d, int seed, uint64_t step, uint64_t row, int T, int vocab, int* out) {
    dataset_read(d, random_bits(seed, ((uint64_t)1 << 56) + step, row) % (d->size - T), T + 1, out, vocab);
}

// A document ends at an end-of-document token or at the end of its file. The model reads it as EOD t0 t1 .. EOD: every
// token is predicted, the first one from EOD, and the end is. Training reads it in stretches of T of these predictions,
// the last one as long as it is; the stretches of all documents, in order, are numbered through.
void document_add(Dataset* d, size_t at, size_t end, int T) {
    if (at == end) { return; }
    d->documents = (Document*)list_grow(d->documents, d->num_documents, sizeof(Document));
    Document document = {at, end - at, d->stretches};
    d->documents[d->num_documents++] = document;
    d->stretches += document.size / T + 1;
}

// Finds the documents. Reads everything once: a bad token shows at the start, not when a run has done its work.
void dataset_index(Dataset* d, int T, int vocab) {
    enum { BUFFER = 1 << 16 };
    int* ids = (int*)xcalloc(BUFFER, sizeof(int));
    size_t start = 0, at = 0, end = 0;
    for (int i = 0; i < d->count; i++) {
        end += d->segments[i].end - d->segments[i].begin;
        for (size_t n; at < end; at += n) {
            n = min_size(BUFFER, end - at);
            dataset_read(d, at, n, ids, vocab);
            for (size_t k = 0; k < n && d->eod >= 0; k++) {
                if (ids[k] == d->eod) { document_add(d, start, at + k, T); start = at + k + 1; }
            }
        }
        if (d->eod >= 0) { document_add(d, start, end, T); start = end; }
    }
    if (d->eod < 0) { document_add(d, 0, end, T); }
    free(ids);
}

// Inputs that a document has: each but the last token, and EOD before the first if there are EODs.
size_t document_inputs(const Dataset* d, const Document* k) { return k->size - (d->eod < 0); }

// out = n + 1 tokens from place `from` on of EOD t0 t1 .. EOD, or of t0 t1 .. without EODs: n inputs and targets.
void document_read(const Dataset* d, const Document* k, size_t from, size_t n, int* out, int vocab) {
    bool lead = d->eod >= 0, starts = lead && from == 0, ends = lead && from + n == k->size + 1;
    if (starts) { out[0] = d->eod; }
    if (ends) { out[n] = d->eod; }
    dataset_read(d, k->at + from - (lead && from > 0), n + 1 - starts - ends, out + starts, vocab);
}

// What global row `row` of `rows` reads in a step: rows start at equal distances and go on by a stretch in each step,
// around and around. A pure function of (step, row). Returns the stretch's predictions; out (T+1) receives its tokens,
// EODs after the end, if not NULL, and *fresh whether a document starts with it.
int dataset_stretch(const Dataset* d, uint64_t step, uint64_t row, uint64_t rows, int T, int vocab, int* out,
                    bool* fresh) {
    size_t number = (row * d->stretches / rows + step) % d->stretches, low = 0, high = d->num_documents;
    while (high - low > 1) { // the last document with no more stretches before it
        size_t middle = (low + high) / 2;
        if (d->documents[middle].stretches <= number) { low = middle; } else { high = middle; }
    }
    const Document* k = &d->documents[low];
    size_t from = (number - k->stretches) * T;
    int n = min_size(T, k->size + 1 - from);
    if (!out) { return n; }
    document_read(d, k, from, n, out, vocab);
    for (int t = n + 1; t <= T; t++) { out[t] = d->eod; }
    *fresh = from == 0;
    return n;
}

// The tokens and targets of all micro-steps of a step, and which rows start afresh: this rank's slice of its group's
// sequences. They are counted micro-step by micro-step over all groups, so that a step has the same ones however the
// work is split. Returns the number of predictions in the whole step.
size_t read_step(const Options* o, const Dataset* data, int step, int* tokens, int* targets, bool* fresh) {
    size_t B = o->batch, G = ranks.groups, T = o->seq, slice = T / ranks.chunks, R = o->accum * G * B, sum = 0, n = T;
    int vocab = o->model.vocab_size, *row = (int*)xcalloc(T + 1, sizeof(int));
    for (size_t r = 0; r < R; r++, sum += n) {
        bool mine = r / B % G == (size_t)ranks.group;
        if (o->eod >= 0) { n = dataset_stretch(data, step, r, R, T, vocab, mine ? row : NULL, fresh); }
        else if (mine) { dataset_sample(data, o->seed, step, r, T, vocab, row); }
        for (size_t t = 0, from = ranks.chunk * slice; mine && t < slice; t++) {
            *tokens++ = row[from + t];
            *targets++ = from + t < n ? row[from + t + 1] : IGNORE;
        }
        fresh += mine;
    }
    free(row);
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// What the options ask for

// Opens the tokenizer and the data, and refuses what could not be used, before any work is done.
void data_open(const Options* o, bool training, Dataset* data, Dataset* held_out) {
    int vocab = o->model.vocab_size, T = o->seq;
    size_t rows = (size_t)o->batch * o->accum * ranks.groups;
    Tokenizer* t = data->tokenizer = held_out->tokenizer = *o->tokenizer ? tokenizer_open(o->tokenizer) : NULL;
    bool fits = !t || t->pieces <= vocab, ends = !t || o->eod < 0 || o->eod == t->eod;
    if (!fits) { die("--tokenizer %s has %d tokens, vocab_size is %d", t->path, t->pieces, vocab); }
    if (!ends) { die("--eod %d: in --tokenizer %s documents end with token %d", o->eod, t->path, t->eod); }
    data->eod = held_out->eod = o->eod;
    if (*o->eval) { dataset_open(data, NULL, "--eval", o->eval); dataset_index(data, T, vocab); }
    if (data->size == 1 && o->eod < 0) { die("--eval %s: at least 2 tokens are needed", o->eval); }
    if (!training) { return; }
    dataset_open(data, *o->val ? NULL : held_out, "--train", o->train);
    if (*o->val) { dataset_open(held_out, NULL, "--val", o->val); }
    printf("tokens: %zu to train on, %zu held out\n", data->size, held_out->size);
    if (o->eod < 0 && data->size <= (size_t)T) {
        die("--train %s: %zu tokens to train on, --seq %d needs one more than that", o->train, data->size, T);
    }
    if (o->eod >= 0) {
        dataset_index(data, T, vocab);
        double steps = (double)data->stretches / rows;
        printf("documents: %zu to train on, read once in %.1f steps\n", data->num_documents, steps);
        if (data->stretches < rows) {
            die("--train %s: %zu pieces of --seq %d tokens, a step takes %zu", o->train, data->stretches, T, rows);
        }
    }
    bool used = strcmp(o->out, o->resume) && checkpoint_newest(o->out, INT_MAX) >= 0;
    if (used) { die("--out %s holds checkpoints: --resume it, or name another folder", o->out); }
    dataset_index(held_out, T, vocab);
    if (*o->out && mkdir(o->out, 0777) && errno != EEXIST) { die("--out %s: %s", o->out, strerror(errno)); }
}

// ---------------------------------------------------------------------------------------------------------------------
// What losses say about the text

typedef struct { size_t words, lines, bytes; bool known, lossless; } Counts;

// Adds what a text has: words between whitespace, newlines, bytes.
void counts_add_text(Counts* c, const char* path) {
    unsigned char buffer[1 << 16];
    bool space = true;
    FILE* f = fopen(path, "rb");
    if (!f) { die("%s: %s", path, strerror(errno)); }
    for (size_t n; (n = fread(buffer, 1, sizeof(buffer), f)) > 0; c->bytes += n) {
        for (size_t i = 0; i < n; i++) {
            bool before = space;
            space = isspace(buffer[i]);
            c->words += before && !space;
            c->lines += buffer[i] == '\n';
        }
    }
    fclose(f);
}

// The same for the text that NAME.bin was made of, from the lines "key value" of NAME.info; unknown if there is none.
void counts_add_info(Counts* c, const char* path) {
    const char* info = text_of("%.*s.info", (int)(strlen(path) - strlen(".bin")), path);
    static const char* keys[] = {"words", "lines", "bytes", "lossless"};
    size_t values[4] = {0, 0, 0, 1};
    int found = 0;
    FILE* f = fopen(info, "r");
    for (char line[PATH_MAX]; f && fgets(line, sizeof(line), f);) {
        for (int k = 0; k < 4; k++) {
            size_t n = strlen(keys[k]);
            if (strncmp(line, keys[k], n) || line[n] != ' ') { continue; }
            char *value = line + n + 1, *end = value;
            if (isdigit((unsigned char)*value)) { values[k] = strtoull(value, &end, 10); }
            if (end == value || *end != '\n') { die("%s: expected \"%s\" and a whole number", info, keys[k]); }
            found |= 1 << k;
        }
    }
    if (f) { fclose(f); }
    c->words += values[0]; c->lines += values[1]; c->bytes += values[2];
    c->lossless = c->lossless && values[3];
    c->known = c->known && (found & 7) == 7;
}

Counts dataset_counts(const Dataset* d) {
    Counts c = {0, 0, 0, true, !d->tokenizer || d->tokenizer->lossless};
    for (const Segment* s = d->segments; s < d->segments + d->count; s++) {
        if (is_token_file(s->path)) { counts_add_info(&c, s->path); } else { counts_add_text(&c, s->path); }
    }
    return c;
}

// Losses by position in the document: 0-1K, 1K-2K, 2K-4K, and so on.
enum { NUM_SPANS = 56 };
typedef struct { size_t tokens; double nats; } Span;

void spans_add(Span spans[NUM_SPANS], size_t position, const float* losses, size_t n) {
    for (size_t i = 0; i < n; i++) {
        int k = 0;
        for (size_t p = (position + i) / 1024; p > 0; p /= 2) { k++; }
        spans[k].tokens++;
        spans[k].nats += losses[i];
    }
}

Span spans_sum(const Span spans[NUM_SPANS]) {
    Span sum = {0, 0};
    for (int k = 0; k < NUM_SPANS; k++) { sum.tokens += spans[k].tokens; sum.nats += spans[k].nats; }
    return sum;
}

const char* size_text(size_t n) { // 1024 is 1K
    int unit = n >> 30 ? 3 : n >> 20 ? 2 : n >> 10 ? 1 : 0;
    return text_of("%zu%.*s", n >> 10 * unit, unit > 0, &"-KMG"[unit]);
}

void spans_print(const Span spans[NUM_SPANS], const Dataset* d) {
    Counts c = dataset_counts(d);
    Span sum = spans_sum(spans);
    bool bytes = !d->tokenizer;
    for (int i = 0; i < d->count; i++) { bytes = bytes && d->segments[i].width == 1; }
    double mean = sum.nats / sum.tokens, bits = (bytes ? mean : sum.nats / c.bytes) / log(2);
    printf("eval: tokens %zu nats/token %.6f perplexity %.4f bits/byte %s\n", sum.tokens, mean, exp(mean),
           c.known ? text_of("%.4f%s", bits, c.lossless ? "" : " (the tokenizer drops characters)") : "unknown");
    if (c.known) {
        printf("nats %.2f, bytes %zu, documents %zu\n"
               "words %zu: perplexity per word %.4f (separated by whitespace, as PG19 is reported)\n"
               "words + lines %zu: perplexity per word %.4f (and the end of each line, as WikiText is)\n",
               sum.nats, c.bytes, d->num_documents, c.words, exp(sum.nats / c.words), c.words + c.lines,
               exp(sum.nats / (c.words + c.lines)));
    } else { printf("words unknown: a .bin has them in its .info, which data/*.py write\n"); }
    printf("%14s %12s %12s %12s\n", "position", "tokens", "nats/token", "perplexity");
    for (int k = 0; k < NUM_SPANS; k++) {
        if (!spans[k].tokens) { continue; }
        const char* range = text_of("%s-%s", size_text(k ? (size_t)512 << k : 0), size_text((size_t)1024 << k));
        mean = spans[k].nats / spans[k].tokens;
        printf("%14s %12zu %12.6f %12.4f\n", range, spans[k].tokens, mean, exp(mean));
    }
}
