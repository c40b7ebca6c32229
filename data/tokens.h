/*
Texts and tokens: tokenizers, files of tokens, the documents in them, and what losses say about a text. This header
needs nothing but base.h. Without a tokenizer, a byte is a token.

A tokenizer is a text file, NAME.tok, written by the scripts of this folder. It has nine lines, then one for each id,
then one for each rule:

    megalodon.c tokenizer 2
    kind unigram              or bpe
    pieces 32000              the number of ids, which are 0 to pieces - 1
    eod 1                     the id that follows each document (end of document); no text is encoded with it
    unknown 0                 the id of what cannot be encoded; not used if there are byte pieces
    unknown_score -24.81      unigram: the score of a character that is no piece
    whitespace keep           collapse: spaces become single ones, and each line starts with one and has no newline
    lossless 1                0: decoding may give a text that differs from the original
    rules 225276              the number of rules, by which a text is normalized before it is cut into pieces
    n -3.7163 " the"          type, score, bytes; \xHH is a byte that does not stand for itself in a line
    "\x0c" " "                a rule: bytes, and what they become

The types are n normal, u user-defined, b a byte (256 of them or none), c control, and x unused. Pieces of the types c
and x are never found in a text. A text is encoded line by line, so encoding needs memory for one line only. A line
includes the newline that ends it.

Rules are sorted by their bytes. At each place of a text the longest rule applies, unless a user-defined piece stands
there. Version 1 of the format has no line "rules" and no rules. Where it collapses white space, tabs and carriage
returns are spaces too. The top of common.py specifies all of this in detail.

A file of tokens, NAME.bin, has llm.c's format: 256 int32 (magic, version, number of tokens, zeros), then the tokens.
They are uint16 (magic 20240520, version 1) or uint32 (magic 20240801, version 7). The scripts write NAME.info beside
it: lines "KEY VALUE" that say what the original text had.

Files come from strangers. Nothing in them is believed before it was checked.
*/
#ifndef MEGALODON_TOKENS_H
#define MEGALODON_TOKENS_H
#include "base.h"
#include <ctype.h>
#include <glob.h>
#include <math.h>

// ---------------------------------------------------------------------------------------------------------------------
// Interface: tokenizers

// Limits: the pieces and rules of a tokenizer, and the bytes of a piece and of each side of a rule.
enum { MAX_PIECES = 1 << 24, MAX_RULES = 1 << 22, MAX_PIECE_SIZE = 1024 };

typedef struct { const unsigned char* bytes; int size, id; char type; float score; } TokenPiece;
typedef struct {
    TokenPiece* sorted;          // by their bytes
    int count, first[257];       // sorted[first[c]..first[c+1]) begin with byte c
} TokenIndex;
typedef struct {
    const char* path;
    int version, pieces, eod, unknown;
    bool bpe, collapse, lossless;
    float unknown_score;
    TokenPiece* piece;           // by id
    TokenIndex found;            // the pieces that may be found in a text (n and u)
    TokenIndex user;             // the user-defined ones of them
    TokenIndex rules;            // what the rules replace; the id of a rule is its number
    TokenPiece* replacement;     // by the number of the rule
    int byte_piece[256];         // the id of each byte; -1 if there are no byte pieces
    unsigned char* text;         // the contents of the file, which the bytes of pieces and rules point into
    char crc32[9];               // the CRC-32 of the file, as 8 hexadecimal digits: tells tokenizers apart
} Tokenizer;

typedef struct { int* ids; size_t count; } Tokens; // a list that grows; it starts as {NULL, 0}

// Reads a tokenizer. `path` must stay valid. Dies with file and line where the file is not as described above.
Tokenizer* tokenizer_open(const char* path);

// Frees a tokenizer. NULL is allowed.
void tokenizer_close(Tokenizer* t);

// Adds the tokens of a text of n bytes to a list. Without a tokenizer (NULL) these are its bytes. The text need not be
// UTF-8.
void encode(const Tokenizer* t, const unsigned char* text, size_t n, Tokens* out);

// Returns the tokens that a sample continues: the end-of-document token, if documents have one (eod is not -1), and
// then the prompt. If both are missing, the sample starts a new line. Dies if a token is not below vocab.
Tokens prompt_tokens(const Tokenizer* t, int eod, const char* prompt, int vocab);

// Prints the text of a token. Without a tokenizer a token is a byte, or a number if vocab is greater than 256. *left
// starts as 0; it counts the bytes that the last UTF-8 character still lacks. out is flushed whenever none is missing.
void token_print(FILE* out, const Tokenizer* t, int vocab, int id, int* left);

// ---------------------------------------------------------------------------------------------------------------------
// Interface: data, which is the tokens of several files, one after the other

typedef struct {
    const char* path;
    const int* ids;            // the tokens of a text, if a tokenizer made them; NULL: they are read from the file
    int width;                 // bytes of a token in the file
    size_t offset, begin, end; // the byte where the file's tokens start; the tokens [begin,end) belong to the data
} Segment;

typedef struct { size_t at, size, stretches; } Document; // its first token, its tokens, the stretches before it

typedef struct {
    Tokenizer* tokenizer;       // NULL: a byte is a token
    Segment* segments;
    int count;                  // of the segments
    size_t size;                // tokens in all
    int eod;                    // the token that ends documents; -1: all tokens are one document, which has no end
    Document* documents;
    size_t num_documents, stretches;
} Dataset;

// Checks a file and returns it as a segment of all its tokens. A name that ends in .bin is a file of tokens. Any other
// is a text, which the tokenizer encodes at once. Dies if the file is not a regular one, is empty, is no valid .bin, or
// is a text in UTF-16. `path` must stay valid.
Segment token_file(const char* path, const Tokenizer* tokenizer);

// Adds the tokens [begin,end) of a segment to the data. Does nothing if there are none.
void dataset_add(Dataset* d, Segment s, size_t begin, size_t end);

typedef struct { char** names; size_t count; } Paths; // a list that grows; it starts as {NULL, 0}

// Finds files. `patterns` is a list of paths and shell patterns, separated by commas. Relative ones are looked for in
// `folder`; "" is the current folder. A name that exists is that file, even if it holds commas or the characters of
// patterns; among names that differ in where they end, the longest one counts. Dies if a pattern finds nothing, and
// names `flag`, the option that the list comes from. The caller frees the list; the names in it stay.
Paths paths_find(const char* flag, const char* patterns, const char* folder);

// Adds the files that paths_find finds to the data, whose tokenizer and eod must be set. If held_out is not NULL, it
// gets the last 10% of each file. Dies if the .info beside a .bin names another number of tokens than the .bin holds,
// another tokenizer than this one, or another token that ends documents.
void dataset_open(Dataset* d, Dataset* held_out, const char* flag, const char* patterns, const char* folder);

// Returns the path of the tokenizer that the .info of the first .bin among the files names, or "". The arguments are
// those of paths_find.
const char* paths_tokenizer(const char* flag, const char* patterns, const char* folder);

// Reads the tokens [at, at+n) of the data into out. Dies if one is not below vocab.
void dataset_read(const Dataset* d, size_t at, size_t n, int* out, int vocab);

// ---------------------------------------------------------------------------------------------------------------------
// Interface: documents. A document ends at an end-of-document token (EOD) or at the end of its file. A document of the
// tokens t0 t1 .. is read as EOD t0 t1 .. EOD: the model predicts every token, the first one from EOD, and then the
// end. Training reads it in stretches of T predictions, of which the last may be shorter. The stretches of all
// documents are numbered in the order of the data.

// Finds the documents of the data. This reads everything once, so a token that is not below vocab is found at the
// start, not after hours of work.
void dataset_index(Dataset* d, int T, int vocab);

// Returns how many inputs a document has. It has as many predictions. With EODs, each token and the end is predicted;
// without them, the first token is not predicted and the last one is no input.
size_t document_inputs(const Dataset* d, const Document* k);

// Reads n + 1 tokens of EOD t0 t1 .. EOD (without EODs: of t0 t1 ..) into out, starting at place `from` of this list.
// They make n inputs and n targets.
void document_read(const Dataset* d, const Document* k, size_t from, size_t n, int* out, int vocab);

// Says what row `row` of `rows` reads in a step. The rows start at equal distances in the list of stretches, and each
// goes on by one stretch in a step, around and around. The result depends on (step, row) alone. Returns the number of
// predictions of the stretch. If out is not NULL, it receives T + 1 tokens (EODs after the end of the document), and
// *fresh whether a document starts here.
int dataset_stretch(const Dataset* d, uint64_t step, uint64_t row, uint64_t rows, int T, int vocab, int* out,
                    bool* fresh);

// ---------------------------------------------------------------------------------------------------------------------
// Interface: what losses say about a text

// What a text has. `known` is false if a .bin has no .info. `lossless` is false if the tokenizer drops characters; bits
// per byte are then not those of the text.
typedef struct { size_t words, lines, bytes; bool known, lossless; } Counts;

// Adds the counts of a text file. Words are separated by white space; lines are counted by their newlines.
void counts_add_text(Counts* c, const char* path);

// Adds the counts of the text that a .bin was made of, which stand in its .info. Dies with file and key if a number is
// missing after its key, is no whole number, or is out of range.
void counts_add_info(Counts* c, const char* path);

// Returns the counts of all files of the data. Dies as counts_add_info does.
Counts dataset_counts(const Dataset* d);

// Losses in nats, summed by position in the document. spans[0] has the positions below 1024, and spans[k] those from
// 1024 * 2^(k-1) to below 1024 * 2^k.
enum { NUM_SPANS = 56 };
typedef struct { size_t tokens; double nats; } Span;

// Adds the losses of n tokens, the first of which is at `position` of its document.
void spans_add(Span spans[NUM_SPANS], size_t position, const float* losses, size_t n);

// Returns the sum over all positions.
Span spans_sum(const Span spans[NUM_SPANS]);

// Prints the losses of the data: in nats per token, in bits per byte, as perplexities per token and per word, and by
// position. Dies if no token was scored.
void spans_print(FILE* out, const Span spans[NUM_SPANS], const Dataset* d);

// ---------------------------------------------------------------------------------------------------------------------
// Files

// Reads up to n bytes of an open file, starting at byte `at`. Returns how many there were.
size_t file_part(int fd, size_t at, void* out, size_t n) {
    size_t done = 0;
    for (ssize_t got = 1; done < n && got > 0; done += got > 0 ? got : 0) {
        got = pread(fd, (char*)out + done, n - done, at + done);
    }
    return done;
}

// Opens a regular file to read, or dies.
int file_must_open(const char* path, size_t* size) {
    const char* error;
    int fd = file_open(path, size, &error);
    if (fd < 0) { die("%s: %s", path, error); }
    return fd;
}

// Returns the CRC-32 of n bytes, the one of gzip, zlib and PNG.
uint32_t crc32_of(const unsigned char* bytes, size_t n) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++) { crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0); }
    }
    return ~crc;
}

// Returns the contents of a regular file, followed by a zero byte. The caller frees them.
unsigned char* file_read(const char* path, size_t* size) {
    int fd = file_must_open(path, size);
    unsigned char* text = (unsigned char*)xcalloc(*size + 1, 1);
    if (file_part(fd, 0, text, *size) != *size) { die("%s: cannot be read", path); }
    close(fd);
    return text;
}

// Is there something under this name? If not, errno says why.
bool path_exists(const char* path) {
    struct stat info;
    return !stat(path, &info);
}

// ---------------------------------------------------------------------------------------------------------------------
// Tokenizer files

// The text [p,end) of a tokenizer that is left to read; `line` counts the lines that were read.
typedef struct { const char* path; unsigned char *p, *end; int line; } TokReader;

// Returns the next line, ended by a zero byte.
char* tok_line(TokReader* r) {
    char* line = (char*)r->p;
    unsigned char* newline = (unsigned char*)memchr(r->p, '\n', r->end - r->p);
    r->line++;
    if (!newline) { die("%s: truncated: line %d does not end or is missing", r->path, r->line); }
    *newline = 0;
    r->p = newline + 1;
    return line;
}

// Returns the value of the next line, which must be "key value".
char* tok_value(TokReader* r, const char* key) {
    char* line = tok_line(r);
    size_t n = strlen(key);
    if (strncmp(line, key, n) || line[n] != ' ') { die("%s: line %d: expected \"%s ...\"", r->path, r->line, key); }
    return line + n + 1;
}

// Reads a line whose value is `no` or `yes`. Returns whether it is `yes`.
int tok_choice(TokReader* r, const char* key, const char* no, const char* yes) {
    const char* value = tok_value(r, key);
    bool is = !strcmp(value, yes);
    if (!is && strcmp(value, no)) { die("%s: line %d: expected \"%s %s\" or %s", r->path, r->line, key, no, yes); }
    return is;
}

// Reads a line whose value is a whole number from low to high.
int tok_int(TokReader* r, const char* key, int low, int high) {
    char *value = tok_value(r, key), *end = value;
    long n = isdigit((unsigned char)*value) && strlen(value) < 10 ? strtol(value, &end, 10) : 0;
    if (end == value || *end || n < low || n > high) {
        die("%s: line %d: expected \"%s\" and a whole number from %d to %d", r->path, r->line, key, low, high);
    }
    return n;
}

// Parses a number at `text`; *end receives where it ends.
float tok_score(TokReader* r, char* text, char** end) {
    double x = isspace((unsigned char)*text) ? (*end = text, 0) : strtod(text, end);
    if (*end == text || !(fabs(x) <= 1e30)) { die("%s: line %d: expected a score", r->path, r->line); }
    return x;
}

// Parses "BYTES" at *text, and moves *text to what follows. Returns the bytes, which are decoded in place, or NULL if
// something is wrong. *size receives their number.
const unsigned char* tok_bytes(unsigned char** text, int* size) {
    unsigned char *from = *text + 1, *to = from, *bytes = from;
    bool good = **text == '"';
    for (; good && *from != '"'; from++) {
        unsigned c = *from;
        good = c >= 0x20 && c != 0x7f; // this also refuses the zero byte at the end of the line
        if (c == '\\') {
            static const char digits[] = "0123456789abcdef";
            const char* high = from[1] == 'x' && from[2] ? strchr(digits, from[2]) : NULL;
            const char* low = high && from[3] ? strchr(digits, from[3]) : NULL;
            good = low;
            if (good) { c = (high - digits) << 4 | (low - digits); from += 3; }
        }
        *to++ = c;
    }
    good = good && to - bytes <= MAX_PIECE_SIZE;
    *text = from + 1;
    *size = to - bytes;
    return good ? bytes : NULL;
}

// Reads a line that is a piece: TYPE SCORE "BYTES".
TokenPiece tok_piece(TokReader* r, int id) {
    char *line = tok_line(r), *p = line;
    TokenPiece piece = {NULL, 0, id, *line, 0};
    bool good = *line && strchr("nubcx", *line) && line[1] == ' ';
    if (good) { piece.score = tok_score(r, line + 2, &p); }
    unsigned char* rest = (unsigned char*)p + 1;
    good = good && *p == ' ' && (piece.bytes = tok_bytes(&rest, &piece.size)) && rest + 1 == r->p;
    if (!good) { die("%s: line %d: expected a piece: n, u, b, c or x, score, \"bytes\"", r->path, r->line); }
    bool fits = piece.type == 'b' ? piece.size == 1 : (piece.type == 'c') == (piece.size == 0);
    if (!fits) { die("%s: line %d: %d bytes in a piece of type %c", r->path, r->line, piece.size, piece.type); }
    return piece;
}

// Reads a line that is a rule: "BYTES" "BYTES". Returns what it replaces; *replacement receives what by.
TokenPiece tok_rule(TokReader* r, int id, TokenPiece* replacement) {
    unsigned char* p = (unsigned char*)tok_line(r);
    TokenPiece rule = {NULL, 0, id, 'r', 0};
    *replacement = rule;
    bool good = (rule.bytes = tok_bytes(&p, &rule.size)) && rule.size > 0 && *p++ == ' ' &&
                (replacement->bytes = tok_bytes(&p, &replacement->size)) && p + 1 == r->p;
    if (!good) { die("%s: line %d: expected a rule: \"bytes\" \"bytes\"", r->path, r->line); }
    return rule;
}

int piece_by_bytes(const void* a, const void* b) {
    const TokenPiece *x = (const TokenPiece*)a, *y = (const TokenPiece*)b;
    int order = memcmp(x->bytes, y->bytes, x->size < y->size ? x->size : y->size);
    return order ? order : x->size - y->size;
}

// All of sorted[low..high) begin with the same k bytes. Returns the first of them whose next byte is c or more, or high
// if there is none.
int index_bound(const TokenIndex* x, int low, int high, int k, int c) {
    while (low < high) {
        int middle = (low + high) / 2;
        const TokenPiece* p = &x->sorted[middle];
        if (p->size > k && p->bytes[k] >= c) { high = middle; } else { low = middle + 1; }
    }
    return low;
}

// Finds where each byte starts in a sorted index.
void index_finish(TokenIndex* x) {
    for (int c = 0; c <= 256; c++) { x->first[c] = index_bound(x, 0, x->count, 0, c); }
}

Tokenizer* tokenizer_open(const char* path) {
    Tokenizer* t = (Tokenizer*)xcalloc(1, sizeof(Tokenizer));
    size_t size;
    int num_bytes = 0;
    t->path = path;
    t->text = file_read(path, &size);
    snprintf(t->crc32, sizeof(t->crc32), "%08x", crc32_of(t->text, size));
    TokReader r = {path, t->text, t->text + size, 0};
    static const char magic[] = "megalodon.c tokenizer ";
    bool known = size > strlen(magic) && !memcmp(r.p, magic, strlen(magic));
    const char* version = known ? tok_line(&r) + strlen(magic) : "";
    t->version = !strcmp(version, "1") ? 1 : 2;
    if (t->version == 2 && strcmp(version, "2")) { die("%s: not a tokenizer file (.tok) of version 1 or 2", path); }
    t->bpe = tok_choice(&r, "kind", "unigram", "bpe");
    t->pieces = tok_int(&r, "pieces", 2, MAX_PIECES);
    t->eod = tok_int(&r, "eod", 0, t->pieces - 1);
    t->unknown = tok_int(&r, "unknown", 0, t->pieces - 1);
    char* end = tok_value(&r, "unknown_score");
    t->unknown_score = tok_score(&r, end, &end);
    if (*end) { die("%s: line %d: expected \"unknown_score\" and a number", path, r.line); }
    t->collapse = tok_choice(&r, "whitespace", "keep", "collapse");
    t->lossless = tok_choice(&r, "lossless", "0", "1");
    int rules = t->version > 1 ? tok_int(&r, "rules", 0, MAX_RULES) : 0;
    size_t most = (r.end - r.p) / strlen("c 0 \"\"\n"); // the shortest line of a piece; that of a rule is as long
    bool room = (size_t)t->pieces + rules <= most;
    if (!room) { die("%s: truncated: no room for %d pieces and %d rules", path, t->pieces, rules); }
    t->piece = (TokenPiece*)xcalloc(t->pieces, sizeof(TokenPiece));
    t->found.sorted = (TokenPiece*)xcalloc(t->pieces, sizeof(TokenPiece));
    t->rules.sorted = (TokenPiece*)xcalloc(rules, sizeof(TokenPiece));
    t->replacement = (TokenPiece*)xcalloc(rules, sizeof(TokenPiece));
    memset(t->byte_piece, -1, sizeof(t->byte_piece));
    for (int i = 0; i < t->pieces; i++) {
        TokenPiece p = t->piece[i] = tok_piece(&r, i);
        if (p.type == 'n' || p.type == 'u') { t->found.sorted[t->found.count++] = p; }
        if (p.type != 'b') { continue; }
        if (t->byte_piece[*p.bytes] >= 0) { die("%s: line %d: this byte has a piece already", path, r.line); }
        t->byte_piece[*p.bytes] = i;
        num_bytes++;
    }
    for (int i = 0; i < rules; i++) {
        TokenPiece* p = &t->rules.sorted[t->rules.count++];
        *p = tok_rule(&r, i, &t->replacement[i]);
        if (i && piece_by_bytes(p - 1, p) >= 0) {
            die("%s: line %d: rules must be sorted by the bytes that they replace", path, r.line);
        }
    }
    if (r.p < r.end) { die("%s: something follows the last of %d pieces and %d rules", path, t->pieces, rules); }
    if (num_bytes % 256) { die("%s: %d byte pieces: expected all 256 or none", path, num_bytes); }
    if (t->piece[t->eod].type != 'c' || t->piece[t->unknown].type != 'c' || t->eod == t->unknown) {
        die("%s: eod %d and unknown %d must be two pieces of type c", path, t->eod, t->unknown);
    }
    qsort(t->found.sorted, t->found.count, sizeof(TokenPiece), piece_by_bytes);
    for (int i = 0; i < t->found.count; i++) {
        const TokenPiece* p = &t->found.sorted[i];
        if (i && !piece_by_bytes(p - 1, p)) { die("%s: pieces %d and %d have the same bytes", path, p[-1].id, p->id); }
        if (p->type != 'u') { continue; }
        t->user.sorted = (TokenPiece*)list_grow(t->user.sorted, t->user.count, sizeof(TokenPiece));
        t->user.sorted[t->user.count++] = *p;
    }
    index_finish(&t->found); index_finish(&t->user); index_finish(&t->rules);
    return t;
}

void tokenizer_close(Tokenizer* t) {
    if (!t) { return; }
    free(t->text); free(t->piece); free(t->found.sorted); free(t->user.sorted); free(t->rules.sorted);
    free(t->replacement); free(t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding and decoding

// Adds one token to a list.
void tokens_add(Tokens* out, int id) {
    out->ids = (int*)list_grow(out->ids, out->count, sizeof(int));
    out->ids[out->count++] = id;
}

// A line is cut into segments [start,end), each of which is a piece or unknown. A Place is a byte position in the line:
// one segment may end there and another may start.
typedef struct {
    size_t start;      // where the segment that ends here starts
    size_t end;        // where the segment that starts here ends
    int id;            // the piece of the segment that ends here
    float best;        // unigram: the sum of the scores of the best segments up to here
    bool frozen;       // bpe: the segment that starts here is not joined with others
} Place;

// A search in an index for what a text begins with, byte by byte: sorted[low..high) begin with the first `size` bytes.
typedef struct { int low, high, size; } Match;

// Goes on with the next byte, c. Returns false if nothing begins with the bytes so far.
bool match_next(const TokenIndex* x, Match* m, int c) {
    int low = m->low, high = m->high, k = m->size++;
    m->low = k ? index_bound(x, low, high, k, c) : x->first[c];
    m->high = k ? index_bound(x, m->low, high, k, c + 1) : x->first[c + 1];
    return m->low < m->high;
}

// Returns what is exactly the bytes so far, or NULL. It is the first of those that begin with them.
const TokenPiece* match_exact(const TokenIndex* x, const Match* m) {
    return x->sorted[m->low].size == m->size ? &x->sorted[m->low] : NULL;
}

// Returns the longest piece or rule of an index that the text [s,n) begins with, or NULL.
const TokenPiece* index_longest(const TokenIndex* x, const unsigned char* text, size_t s, size_t n) {
    const TokenPiece* longest = NULL;
    Match m = {0, 0, 0};
    for (size_t e = s; e < n && match_next(x, &m, text[e]); e++) {
        const TokenPiece* p = match_exact(x, &m);
        if (p) { longest = p; }
    }
    return longest;
}

// Returns the piece that is exactly these n bytes, or NULL.
const TokenPiece* piece_find(const Tokenizer* t, const unsigned char* bytes, size_t n) {
    Match m = {0, 0, 0};
    for (size_t k = 0; k < n; k++) {
        if (!match_next(&t->found, &m, bytes[k])) { return NULL; }
    }
    return match_exact(&t->found, &m);
}

// Returns the size in bytes of the character at s, which its first byte tells.
size_t character_size(const unsigned char* text, size_t s, size_t n) {
    size_t size = text[s] < 0xc0 ? 1 : text[s] < 0xe0 ? 2 : text[s] < 0xf0 ? 3 : 4;
    return min_size(size, n - s);
}

// Offers a segment from `start` that ends at this place. It is taken if it is the first one, or if it scores more than
// the one that was taken before.
void place_offer(Place* end, size_t start, int id, float best) {
    if (end->id >= 0 && best <= end->best) { return; }
    end->start = start; end->id = id; end->best = best;
}

// Finds the most probable segments (the Viterbi algorithm). Sums are floats and the first of two equal candidates
// stays, as in SentencePiece, so the tokens are the same. In a very long line the sums start again from 0 before they
// become so large that a float cannot tell two candidates apart.
void encode_unigram(const Tokenizer* t, const unsigned char* text, size_t n, Place* at) {
    for (size_t e = 1; e <= n; e++) { at[e].id = -1; }
    for (size_t s = 0, size; s < n; s += size) {
        float past = at[s].best;
        for (size_t e = s; past < -100000 && e <= min_size(n, s + MAX_PIECE_SIZE); e++) { at[e].best -= past; }
        size = character_size(text, s, n);
        bool single = false; // is there a piece that is exactly this character?
        Match m = {0, 0, 0};
        for (size_t e = s; e < n && match_next(&t->found, &m, text[e]);) {
            const TokenPiece* p = match_exact(&t->found, &m);
            if (e++, !p) { continue; }
            place_offer(&at[e], s, p->id, at[s].best + p->score);
            single = single || e == s + size;
        }
        if (!single) { place_offer(&at[s + size], s, t->unknown, at[s].best + t->unknown_score); }
    }
    for (size_t e = n; e > 0; e = at[e].start) { at[at[e].start].end = e; }
}

// Two neighbouring segments, [start,middle) and [middle,end), which joined are a piece. The pairs are kept in a heap,
// which gives the one with the highest score first, and of equal ones the leftmost.
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

// Adds the pair of the segment that starts at s and the one after it, if they may be joined.
void heap_push_at(Heap* h, const Tokenizer* t, const unsigned char* text, size_t n, const Place* at, size_t s) {
    size_t middle = at[s].end, end = middle < n ? at[middle].end : 0;
    const TokenPiece* p = end && !at[s].frozen && !at[middle].frozen ? piece_find(t, text + s, end - s) : NULL;
    if (p) { Pair pair = {p->score, s, middle, end}; heap_push(h, pair); }
}

// Byte pair encoding. The segments start as single characters. As long as there are pairs, the one with the highest
// score is joined.
void encode_bpe(const Tokenizer* t, const unsigned char* text, size_t n, Place* at) {
    Heap heap = {NULL, 0};
    for (size_t s = 0, size; s < n; s += size) { // the longest user-defined piece is a segment that stays as it is
        const TokenPiece* user = index_longest(&t->user, text, s, n);
        size = user ? (size_t)user->size : character_size(text, s, n);
        at[s].frozen = user;
        at[s].end = s + size;
        at[s + size].start = s;
    }
    for (size_t s = 0; s < n; s = at[s].end) { heap_push_at(&heap, t, text, n, at, s); }
    while (heap.count > 0) {
        Pair p = heap_pop(&heap);
        if (at[p.start].end != p.middle || at[p.middle].end != p.end) { continue; } // one of the two was joined since
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

// Normalizes one line: applies the rules, and collapses white space if the tokenizer says so. Returns a text of *size
// bytes, which the caller frees; NULL may stand for an empty one.
unsigned char* normalize_line(const Tokenizer* t, const unsigned char* text, size_t n, size_t* size) {
    unsigned char* out = NULL;
    size_t count = 0;
    if (t->collapse) {
        out = (unsigned char*)list_grow(out, count, 1);
        out[count++] = ' ';
        n -= text[n - 1] == '\n';
    }
    for (size_t s = 0, taken; s < n; s += taken) {
        const TokenPiece* user = t->version > 1 ? index_longest(&t->user, text, s, n) : NULL;
        const TokenPiece* rule = user ? NULL : index_longest(&t->rules, text, s, n);
        taken = user ? (size_t)user->size : rule ? (size_t)rule->size : 1;
        const unsigned char* part = rule ? t->replacement[rule->id].bytes : text + s;
        size_t part_size = rule ? (size_t)t->replacement[rule->id].size : taken;
        bool starts = true; // nothing of this part was added yet
        for (size_t k = 0; k < part_size; k++) {
            unsigned char c = part[k];
            if (t->version == 1 && (c == '\t' || c == '\r')) { c = ' '; }
            if (t->collapse && starts && c == ' ' && out[count - 1] == ' ') { continue; }
            out = (unsigned char*)list_grow(out, count, 1);
            out[count++] = c;
            starts = false;
        }
    }
    while (t->collapse && count > 0 && out[count - 1] == ' ') { count--; }
    *size = count;
    return out;
}

// Adds the tokens of one line.
void encode_line(const Tokenizer* t, const unsigned char* text, size_t n, Tokens* out) {
    unsigned char* normalized = NULL;
    if (t->collapse || t->rules.count) { text = normalized = normalize_line(t, text, n, &n); }
    Place* at = (Place*)xcalloc(n + 1, sizeof(Place));
    (t->bpe ? encode_bpe : encode_unigram)(t, text, n, at);
    for (size_t s = 0, e; s < n; s = e) { // unknown segments become bytes, or one token for neighbouring ones
        e = at[s].end;
        bool unknown = at[e].id == t->unknown, in_bytes = unknown && t->byte_piece[0] >= 0;
        bool again = unknown && s > 0 && at[s].id == t->unknown;
        for (size_t k = s; in_bytes && k < e; k++) { tokens_add(out, t->byte_piece[text[k]]); }
        if (!in_bytes && !again) { tokens_add(out, at[e].id); }
    }
    free(at); free(normalized);
}

void encode(const Tokenizer* t, const unsigned char* text, size_t n, Tokens* out) {
    for (size_t s = 0, e; s < n; s = e) {
        const unsigned char* newline = (const unsigned char*)memchr(text + s, '\n', n - s);
        e = newline ? (size_t)(newline + 1 - text) : n;
        if (t) { encode_line(t, text + s, e - s, out); }
        for (; !t && s < e; s++) { tokens_add(out, text[s]); }
    }
}

Tokens prompt_tokens(const Tokenizer* t, int eod, const char* prompt, int vocab) {
    Tokens out = {NULL, 0};
    if (eod >= 0) { tokens_add(&out, eod); }
    else if (!*prompt) { prompt = "\n"; }
    encode(t, (const unsigned char*)prompt, strlen(prompt), &out);
    if (!out.count) { tokens_add(&out, t->eod); } // the tokenizer drops everything that this prompt has
    for (size_t i = 0; i < out.count; i++) {
        if (out.ids[i] < vocab) { continue; }
        die("--prompt: %s %d is not below vocab_size %d", t ? "token" : "byte", out.ids[i], vocab);
    }
    return out;
}

void token_print(FILE* out, const Tokenizer* t, int vocab, int id, int* left) {
    unsigned char byte = id;
    TokenPiece p = {&byte, vocab <= 256, 0, 'b', 0};
    if (t) { p = id < t->pieces ? t->piece[id] : t->piece[t->eod]; } // a model may have more ids than its tokenizer
    else if (vocab > 256) { fprintf(out, "%d ", id); }
    for (int i = 0; i < p.size; i++) {
        unsigned char c = p.bytes[i];
        *left = *left && (c & 0xc0) == 0x80 ? *left - 1 : c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : c >= 0xc0 ? 1 : 0;
        fputc(c, out);
    }
    if (!*left) { fflush(out); }
}

// ---------------------------------------------------------------------------------------------------------------------
// Data

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

// Reads the header of a .bin of `bytes` bytes into a segment.
void token_header(Segment* s, int fd, size_t bytes) {
    int32_t header[256];
    s->offset = sizeof(header);
    if (file_part(fd, 0, header, sizeof(header)) != sizeof(header)) {
        die("%s: truncated: no header of 1024 bytes", s->path);
    }
    int magic = header[0], version = header[1], count = header[2];
    s->width = magic == 20240520 && version == 1 ? 2 : magic == 20240801 && version == 7 ? 4 : 0;
    if (!s->width) {
        die("%s: magic %d version %d: llm.c's token files have 20240520/1 or 20240801/7", s->path, magic, version);
    }
    s->end = count;
    bool fits = count >= 0 && bytes == s->offset + s->end * s->width;
    if (!fits) { die("%s: %d tokens do not make a file of %zu bytes", s->path, count, bytes); }
}

Segment token_file(const char* path, const Tokenizer* tokenizer) {
    Segment s = {path, NULL, 1, 0, 0, 0};
    unsigned char mark[2] = {0, 0}; // a text in UTF-16 begins with U+FEFF, in one byte order or the other
    size_t bytes;
    int fd = file_must_open(path, &bytes);
    if (is_token_file(path)) {
        token_header(&s, fd, bytes);
    } else {
        file_part(fd, 0, mark, sizeof(mark));
        s.end = bytes;
    }
    close(fd);
    if ((mark[0] == 0xff && mark[1] == 0xfe) || (mark[0] == 0xfe && mark[1] == 0xff)) {
        die("%s: this text is UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 converts it", path);
    }
    if (tokenizer && !is_token_file(path)) {
        unsigned char* text = file_read(path, &bytes);
        Tokens tokens = {NULL, 0};
        encode(tokenizer, text, bytes, &tokens);
        free(text);
        s.ids = tokens.ids; s.end = tokens.count;
    }
    if (s.end == 0) { die("%s: empty", path); }
    return s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Names of files

// Returns the path of a name in a folder. With `quoted` it is a pattern, in which no character of the folder's name has
// a special meaning.
const char* path_in(const char* folder, const char* name, bool quoted) {
    char before[2 * PATH_MAX], *to = before;
    if (!*folder || *name == '/') { return name; }
    for (const char* c = folder; *c && to < before + sizeof(before) - 3; c++) {
        if (quoted && strchr("*?[]\\", *c)) { *to++ = '\\'; }
        *to++ = *c;
    }
    *to = 0;
    return text_of("%s/%s", before, name);
}

// Returns the end of the longest name at the start of a list that exists in a folder, or NULL if none does. A name ends
// at a comma or with the list.
char* name_end(char* list, const char* folder) {
    for (char* end = list + strlen(list); end > list; end--) {
        char after = *end;
        if (after && after != ',') { continue; }
        *end = 0;
        bool exists = path_exists(path_in(folder, list, false));
        *end = after;
        if (exists) { return end; }
    }
    return NULL;
}

void paths_add(Paths* p, const char* name) {
    p->names = (char**)list_grow(p->names, p->count, sizeof(char*));
    p->names[p->count++] = text_keep(name);
}

Paths paths_find(const char* flag, const char* patterns, const char* folder) {
    Paths found = {NULL, 0};
    char *list = text_keep(patterns), *next;
    for (char* part = list; part; part = next) {
        char* end = name_end(part, folder);
        bool exists = end;
        if (!exists) { end = part + strcspn(part, ","); }
        next = *end ? end + 1 : NULL;
        *end = 0;
        const char* path = path_in(folder, part, false);
        int error = path_exists(path) ? 0 : errno;
        if (exists) { paths_add(&found, path); }
        if (exists || !*part) { continue; }
        glob_t matches;
        if (!glob(path_in(folder, part, true), 0, NULL, &matches)) {
            for (size_t i = 0; i < matches.gl_pathc; i++) { paths_add(&found, matches.gl_pathv[i]); }
            globfree(&matches);
        } else if (error != ENOENT && error != ENOTDIR) { die("%s %s: %s", flag, path, strerror(error)); }
        else { die("%s: no file is named %s", flag, path); }
    }
    if (!found.count) { die("%s '%s': expected names of files", flag, patterns); }
    return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// Sidecars of token files

// What the .info beside a .bin says. found: which keys it has; without an .info none.
enum { WORDS, LINES, BYTES, LOSSLESS, DOCUMENTS, TOKENS, END_TOKEN, VOCAB_SIZE, NUM_INFO };
typedef struct {
    const char* path;
    size_t values[NUM_INFO];
    bool found[NUM_INFO];
    char tokenizer[NAME_MAX + 1], crc32[9];
} TokenInfo;

// Reads the .info beside the .bin `path`. Dies with file and key if a number is missing after its key, is no whole
// number, or is out of range.
TokenInfo info_read(const char* path) {
    static const struct { const char* key; size_t low, high; } rows[NUM_INFO] = {
        {"words", 0, (size_t)1e18}, {"lines", 0, (size_t)1e18}, {"bytes", 1, (size_t)1e18}, {"lossless", 0, 1},
        {"documents", 0, (size_t)1e18}, {"tokens", 0, (size_t)1e18}, {"eod", 0, INT_MAX}, {"vocab_size", 1, INT_MAX}
    };
    TokenInfo info = {text_of("%.*s.info", (int)(strlen(path) - strlen(".bin")), path), {0}, {0}, "", ""};
    size_t size;
    if (!path_exists(info.path)) { return info; }
    char* text = (char*)file_read(info.path, &size);
    for (char *line = text, *next; *line; line = next) {
        size_t length = strcspn(line, "\n");
        next = line + length + (line[length] != 0);
        line[length] = 0;
        if (!strncmp(line, "tokenizer ", 10)) { snprintf(info.tokenizer, sizeof(info.tokenizer), "%s", line + 10); }
        if (!strncmp(line, "tokenizer_crc32 ", 16)) { snprintf(info.crc32, sizeof(info.crc32), "%s", line + 16); }
        for (int k = 0; k < NUM_INFO; k++) {
            size_t n = strlen(rows[k].key);
            if (strncmp(line, rows[k].key, n) || (line[n] && line[n] != ' ')) { continue; }
            char *value = line + n + (line[n] != 0), *end = value;
            errno = 0;
            if (isdigit((unsigned char)*value)) { info.values[k] = strtoull(value, &end, 10); }
            if (end == value || *end || errno || info.values[k] < rows[k].low || info.values[k] > rows[k].high) {
                die("%s: expected \"%s\" and a whole number from %zu to %zu, found \"%.40s\"", info.path, rows[k].key,
                    rows[k].low, rows[k].high, value);
            }
            info.found[k] = true;
        }
    }
    free(text);
    return info;
}

// Dies if the .info beside a .bin says other things than the .bin itself, the tokenizer, or the program's flags.
void info_check(const Segment* s, const Tokenizer* t, int eod) {
    TokenInfo i = info_read(s->path);
    if (i.found[TOKENS] && i.values[TOKENS] != s->end) {
        die("%s holds %zu tokens, %s says %zu", s->path, s->end, i.path, i.values[TOKENS]);
    }
    if (eod >= 0 && i.found[END_TOKEN] && i.values[END_TOKEN] != (size_t)eod) {
        die("--eod %d: by %s documents end with token %zu", eod, i.path, i.values[END_TOKEN]);
    }
    if (t && i.found[VOCAB_SIZE] && i.values[VOCAB_SIZE] != (size_t)t->pieces) {
        die("%s was made with %zu tokens, --tokenizer %s has %d", s->path, i.values[VOCAB_SIZE], t->path, t->pieces);
    }
    if (t && *i.crc32 && strcmp(i.crc32, t->crc32)) {
        die("%s was made with another tokenizer: CRC-32 %s by %s, but %s is %s", s->path, i.crc32, i.path, t->path,
            t->crc32);
    }
}

const char* paths_tokenizer(const char* flag, const char* patterns, const char* folder) {
    const char* tokenizer = "";
    Paths paths = paths_find(flag, patterns, folder);
    for (size_t i = 0; i < paths.count && !*tokenizer; i++) {
        const char *path = paths.names[i], *slash = strrchr(path, '/');
        if (!is_token_file(path)) { continue; }
        TokenInfo info = info_read(path);
        const char* beside = slash ? text_of("%.*s", (int)(slash - path), path) : "";
        if (*info.tokenizer) { tokenizer = text_keep(path_in(beside, info.tokenizer, false)); }
    }
    free(paths.names);
    return tokenizer;
}

void dataset_open(Dataset* d, Dataset* held_out, const char* flag, const char* patterns, const char* folder) {
    Paths paths = paths_find(flag, patterns, folder);
    for (size_t i = 0; i < paths.count; i++) {
        Segment s = token_file(paths.names[i], d->tokenizer);
        size_t cut = held_out ? (size_t)(0.9 * s.end) : s.end;
        if (is_token_file(s.path)) { info_check(&s, d->tokenizer, d->eod); }
        dataset_add(d, s, 0, cut);
        if (held_out) { dataset_add(held_out, s, cut, s.end); }
    }
    free(paths.names);
}

// ---------------------------------------------------------------------------------------------------------------------
// Reading the data

void dataset_read(const Dataset* d, size_t at, size_t n, int* out, int vocab) {
    for (const Segment* s = d->segments; n > 0; at -= min_size(at, s->end - s->begin), s++) {
        if (at >= s->end - s->begin) { continue; }
        size_t take = min_size(n, s->end - s->begin - at), bytes = take * s->width;
        // Tokens of the file stand at the end of their part of out, and are widened in place, from the front.
        unsigned char* p = (unsigned char*)out + take * (sizeof(int) - s->width);
        if (s->ids) {
            memcpy(out, s->ids + s->begin + at, take * sizeof(int));
        } else {
            int fd = open(s->path, O_RDONLY | O_NONBLOCK);
            bool whole = fd >= 0 && file_part(fd, s->offset + (s->begin + at) * s->width, p, bytes) == bytes;
            if (!whole) { die("%s: cannot be read any more", s->path); }
            close(fd);
        }
        for (size_t k = 0; k < take; k++, p += s->width) {
            uint32_t id = 0;
            if (s->ids) { id = out[k]; } else { memcpy(&id, p, s->width); }
            out[k] = id;
            if (id < (uint32_t)vocab) { continue; }
            die("%s: token %zu is %u, vocab_size is %d", s->path, s->begin + at + k, id, vocab);
        }
        out += take; n -= take; at += take;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Documents

// Adds the document of the tokens [at,end). Does nothing if there are none.
void document_add(Dataset* d, size_t at, size_t end, int T) {
    if (at == end) { return; }
    d->documents = (Document*)list_grow(d->documents, d->num_documents, sizeof(Document));
    Document document = {at, end - at, d->stretches};
    d->documents[d->num_documents++] = document;
    d->stretches += document.size / T + 1;
}

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

size_t document_inputs(const Dataset* d, const Document* k) { return k->size - (d->eod < 0); }

void document_read(const Dataset* d, const Document* k, size_t from, size_t n, int* out, int vocab) {
    bool lead = d->eod >= 0, starts = lead && from == 0, ends = lead && from + n == k->size + 1;
    if (starts) { out[0] = d->eod; }
    if (ends) { out[n] = d->eod; }
    dataset_read(d, k->at + from - (lead && from > 0), n + 1 - starts - ends, out + starts, vocab);
}

int dataset_stretch(const Dataset* d, uint64_t step, uint64_t row, uint64_t rows, int T, int vocab, int* out,
                    bool* fresh) {
    size_t number = (row * d->stretches / rows + step) % d->stretches, low = 0, high = d->num_documents;
    while (high - low > 1) { // search for the last document with at most `number` stretches before it
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

// ---------------------------------------------------------------------------------------------------------------------
// What losses say about a text

void counts_add_text(Counts* c, const char* path) {
    unsigned char buffer[1 << 16];
    bool space = true;
    size_t size;
    int fd = file_must_open(path, &size);
    for (size_t n, at = 0; (n = file_part(fd, at, buffer, sizeof(buffer))) > 0; at += n) {
        for (size_t i = 0; i < n; i++) {
            bool before = space;
            space = isspace(buffer[i]);
            c->words += before && !space;
            c->lines += buffer[i] == '\n';
        }
        c->bytes += n;
    }
    close(fd);
}

void counts_add_info(Counts* c, const char* path) {
    TokenInfo i = info_read(path);
    c->words += i.values[WORDS]; c->lines += i.values[LINES]; c->bytes += i.values[BYTES];
    c->lossless = c->lossless && (i.values[LOSSLESS] || !i.found[LOSSLESS]);
    c->known = c->known && i.found[WORDS] && i.found[LINES] && i.found[BYTES];
}

Counts dataset_counts(const Dataset* d) {
    Counts c = {0, 0, 0, true, !d->tokenizer || d->tokenizer->lossless};
    for (const Segment* s = d->segments; s < d->segments + d->count; s++) {
        if (is_token_file(s->path)) { counts_add_info(&c, s->path); } else { counts_add_text(&c, s->path); }
    }
    return c;
}

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

// Returns the perplexity exp(nats / count) as text, short enough for a table however large it is.
const char* perplexity_text(double nats, size_t count) {
    double perplexity = exp(nats / count);
    if (!count) { return "unknown"; }
    return perplexity < 1e6 ? text_of("%.4f", perplexity) : text_of("%.5g", perplexity);
}

void spans_print(FILE* out, const Span spans[NUM_SPANS], const Dataset* d) {
    Span sum = spans_sum(spans);
    if (!sum.tokens) {
        die("%s: no token to score: %s", d->count ? d->segments[0].path : "the data",
            d->eod >= 0 ? "there are only ends of documents" : "a document without an end needs two tokens");
    }
    Counts c = dataset_counts(d);
    bool tokens_are_bytes = !d->tokenizer;
    for (int i = 0; i < d->count; i++) { tokens_are_bytes = tokens_are_bytes && d->segments[i].width == 1; }
    double mean = sum.nats / sum.tokens, bits = (tokens_are_bytes ? mean : sum.nats / c.bytes) / log(2);
    fprintf(out, "eval: tokens %zu nats/token %.6f perplexity %s bits/byte %s\n", sum.tokens, mean,
            perplexity_text(sum.nats, sum.tokens),
            c.known ? text_of("%.4f%s", bits, c.lossless ? "" : " (the tokenizer drops characters)") : "unknown");
    if (c.known) {
        fprintf(out, "nats %.2f, bytes %zu, documents %zu\n", sum.nats, c.bytes, d->num_documents);
        fprintf(out, "words %zu: perplexity per word %s (separated by white space, as PG19 is reported)\n",
                c.words, perplexity_text(sum.nats, c.words));
        fprintf(out, "words + lines %zu: perplexity per word %s (with the ends of lines, as WikiText is reported)\n",
                c.words + c.lines, perplexity_text(sum.nats, c.words + c.lines));
    } else {
        fprintf(out, "words unknown: a .bin needs the .info that the scripts in data/ write beside it\n");
    }
    fprintf(out, "%14s %12s %12s %12s\n", "position", "tokens", "nats/token", "perplexity");
    for (int k = 0; k < NUM_SPANS; k++) {
        if (!spans[k].tokens) { continue; }
        const char* range = text_of("%s-%s", size_text(k ? (size_t)512 << k : 0), size_text((size_t)1024 << k));
        fprintf(out, "%14s %12zu %12.6f %12s\n", range, spans[k].tokens, spans[k].nats / spans[k].tokens,
                perplexity_text(spans[k].nats, spans[k].tokens));
    }
}

#endif
