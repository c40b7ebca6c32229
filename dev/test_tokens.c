// Tests data/tokens.h by itself: tokens against SentencePiece's, in data/reference/tokens; the order in which training
// reads documents, against the plainest way to say it; names of files; what losses say. From the project folder:
// dev/bin/test_tokens
#include "../data/tokens.h"
#include "expect.h"

enum { IGNORE = -100 }; // a target that is not scored

// Writes a file in the folder. Returns its path.
static const char* file_of(const char* name, const void* contents, size_t size) {
    const char* path = text_of("%s/%s", folder, name);
    FILE* f = fopen(path, "wb");
    if (!f || fwrite(contents, 1, size, f) != size || fclose(f)) { die("%s: cannot be written", path); }
    return path;
}

static void dataset_free(Dataset* d) { // what dataset_open took
    for (int i = 0; i < d->count; i++) { free((char*)d->segments[i].path); }
    free(d->segments); free(d->documents);
    memset(d, 0, sizeof(*d));
}

// The text becomes the tokens that SentencePiece gave, and the tokens the text.
static void test_kind(const char* kind, const char* folder) {
    const char *tok = text_of("%s/%s.tok", folder, kind), *bin = text_of("%s/%s.bin", folder, kind);
    Tokenizer* t = tokenizer_open(tok);
    Dataset theirs = {0};
    Tokens ours = {NULL, 0};
    Segment segment = token_file(bin, NULL);
    dataset_add(&theirs, segment, 0, segment.end);
    size_t size, n;
    unsigned char* text = file_read(text_of("%s/text.txt", folder), &size);
    encode(t, text, size, &ours);
    bool same = ours.count + 1 == theirs.size; // an end of document follows the text
    int* ids = (int*)xcalloc(theirs.size, sizeof(int));
    dataset_read(&theirs, 0, theirs.size, ids, t->pieces);
    same = same && !memcmp(ids, ours.ids, ours.count * sizeof(int)) && ids[ours.count] == t->eod;
    expect(same, "tokens");

    char* decoded = NULL;
    int left = 0;
    FILE* out = open_memstream(&decoded, &n);
    for (size_t i = 0; i < ours.count; i++) { token_print(out, t, t->pieces, ours.ids[i], &left); }
    fclose(out);
    bool back = n == size && !memcmp(text, decoded, n);
    expect(back == t->lossless, "text and back, or not where the tokenizer says so");
    group(text_of("tokens of %s.tok are SentencePiece's", kind));
    free(theirs.segments); free(ours.ids); free(ids); free(decoded); free(text);
    tokenizer_close(t);
}

// Documents over two files, some of them empty, in rows of T: what dataset_stretch gives for each step and row must be
// a walk through the list of all (input, target), EOD t0 .. to t0 .. EOD, each document's padded to a multiple of T.
static void test_stretches(int T, int rows) {
    enum { EOD = 0, MOST = 200 };
    int ids[] = {1, 2, 3, 0, 4, 0, 0, 5, 6, 7, 8, 9, 0, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19}, cut = 10;
    int n = sizeof(ids) / sizeof(int), inputs[MOST], targets[MOST], count = 0, before = EOD;
    bool first[MOST] = {0};
    Segment s[2] = {{"", ids, 1, 0, 0, (size_t)cut}, {"", ids, 1, 0, (size_t)cut, (size_t)n}};
    Dataset d = {0};
    d.segments = s; d.count = 2; d.size = n; d.eod = EOD;
    dataset_index(&d, T, 20);
    for (int i = 0, start = 0; i <= n; i++) {
        bool file_ends = (i == cut || i == n) && i > start, ends = file_ends || (i < n && ids[i] == EOD);
        if (ends && i > start) { // one more document: [start,i)
            first[count] = true;
            for (int k = start; k <= i; k++, count++) {
                inputs[count] = k == start ? EOD : before;
                before = targets[count] = k == i ? EOD : ids[k];
            }
            while (count % T) { inputs[count] = EOD; targets[count++] = IGNORE; }
        }
        if (ends) { start = i + !file_ends; }
    }
    bool good = d.stretches == (size_t)count / T, all_counted = true;
    for (int step = 0; step < 3 * count; step++) {
        for (int r = 0; r < rows; r++) {
            int row[MOST], at = ((size_t)r * d.stretches / rows + step) % d.stretches * T, predictions = 0;
            bool fresh;
            int has = dataset_stretch(&d, step, r, rows, T, 20, row, &fresh);
            for (int t = 0; t < T; t++) {
                good = good && row[t] == inputs[at + t] && (t >= has || row[t + 1] == targets[at + t]);
                predictions += targets[at + t] != IGNORE;
            }
            good = good && fresh == first[at];
            all_counted = all_counted && has == predictions;
        }
    }
    expect(good && all_counted, text_of("stretches of %d, %d rows", T, rows));
    free(d.documents);
}

// The names that dataset_open is given, and what it finds: files hold their own number of letters, so sizes tell.
static void test_names(void) {
    static const char* names[] = {"a", "b", "c", "a,b", "d[1]", "d1", "e*", "ee", "f\\", "sub/g", "h,*"};
    static const struct { const char* patterns; size_t count, size; } rows[] = {
        {"a", 1, 1}, {"a,c", 2, 1 + 4}, {"a,b", 1, 8}, {"b,a", 2, 2 + 1}, {"a,b,c", 2, 8 + 4}, {"c,a,b", 2, 4 + 8},
        {"d[1]", 1, 16}, {"d[1-1]", 1, 32}, {"d[1],d1", 2, 16 + 32}, {"e*", 1, 64}, {"e[*]", 1, 64},
        {"e?", 2, 64 + 128}, {"f\\", 1, 256}, {"sub/*", 1, 512}, {"sub/g,a", 2, 512 + 1}, {"h,*", 1, 1024},
        {",a,,c,", 2, 1 + 4}, {"[abc]", 3, 1 + 2 + 4}
    };
    static char letters[1024];
    memset(letters, 'x', sizeof(letters));
    char odd[64]; // a folder whose own name looks like a pattern
    snprintf(odd, sizeof(odd), "%s/[odd] *,?\\", folder);
    if (mkdir(odd, 0777) || mkdir(text_of("%s/sub", odd), 0777)) { die("%s: %s", odd, strerror(errno)); }
    for (int i = 0; i < 11; i++) {
        file_of(text_of("%s/%s", strrchr(odd, '/') + 1, names[i]), letters, (size_t)1 << i);
    }
    Dataset d = {0}, held_out = {0};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        dataset_open(&d, NULL, "--train", rows[i].patterns, odd);
        expect(d.count == (int)rows[i].count && d.size == rows[i].size, rows[i].patterns);
        dataset_free(&d);
    }
    dataset_open(&d, NULL, "--train", text_of("%s/a", odd), "nowhere");
    expect(d.size == 1, "an absolute path needs no folder");
    dataset_free(&d);
    dataset_open(&d, NULL, "--train", text_of("data/*.h"), "");
    expect(d.count == 4, "patterns in the current folder");
    dataset_free(&d);
    dataset_open(&d, &held_out, "--train", "h,*", odd);
    expect(d.size == 921 && held_out.size == 103 && held_out.segments[0].begin == 921, "the last 10% are held out");
    free(held_out.segments);
    dataset_free(&d);
    group("what exists is the file, whatever its name");

    if (child()) { dataset_open(&d, NULL, "--train", "a,none", odd); _exit(0); }
    refused("--train: no file is named ");
    if (child()) { dataset_open(&d, NULL, "--val", "none*", ""); _exit(0); }
    refused("--val: no file is named none*\n");
    if (child()) { dataset_open(&d, NULL, "--train", "", ""); _exit(0); }
    refused("--train '': expected names of files");
    if (child()) { dataset_open(&d, NULL, "--train", ",,", ""); _exit(0); }
    refused("--train ',,': expected names of files");
    if (child()) { dataset_open(&d, NULL, "--train", "sub", odd); _exit(0); }
    refused("sub: not a regular file but a folder");
    if (child()) { dataset_open(&d, NULL, "--train", "a/b", odd); _exit(0); }
    refused("no file is named");
    group("names that are nothing, or a folder, are refused");
}

// Files that are refused, in one line and without waiting.
static void test_files(void) {
    int32_t header[257] = {20240520, 1, 2};
    const char *path = file_of("16.txt", "\xff\xfe" "a\0b\0", 6), *fifo = text_of("%s/fifo", folder);
    if (child()) { token_file(path, NULL); _exit(0); }
    refused("16.txt: this text is UTF-16, expected UTF-8");
    path = file_of("16.txt", "\xfe\xff\0a\0b", 6);
    if (child()) { token_file(path, NULL); _exit(0); }
    refused("16.txt: this text is UTF-16, expected UTF-8");
    path = file_of("one.txt", "\xff", 1);
    expect(token_file(path, NULL).end == 1, "one byte is no mark");
    path = file_of("empty.txt", "", 0);
    if (child()) { token_file(path, NULL); _exit(0); }
    refused("empty.txt: empty");
    if (mkfifo(fifo, 0600)) { abort(); }
    if (child()) { token_file(fifo, NULL); _exit(0); }
    refused("fifo: not a regular file\n");
    if (child()) { tokenizer_open(fifo); _exit(0); }
    refused("fifo: not a regular file\n");
    group("UTF-16, FIFOs and empty files are refused");

    const char* bin = file_of("a.bin", header, sizeof(header));
    Segment s = token_file(bin, NULL);
    expect(s.end == 2 && s.width == 2 && s.offset == 1024, "a good one");
    if (child()) { token_file(file_of("a.bin", header, 1023), NULL); _exit(0); }
    refused("a.bin: truncated: no header of 1024 bytes");
    if (child()) { token_file(file_of("a.bin", header, 1027), NULL); _exit(0); }
    refused("a.bin: 2 tokens do not make a file of 1027 bytes");
    header[2] = -1;
    if (child()) { token_file(file_of("a.bin", header, sizeof(header)), NULL); _exit(0); }
    refused("a.bin: -1 tokens do not make");
    header[2] = 0;
    if (child()) { token_file(file_of("a.bin", header, 1024), NULL); _exit(0); }
    refused("a.bin: empty");
    header[1] = 2;
    if (child()) { token_file(file_of("a.bin", header, sizeof(header)), NULL); _exit(0); }
    refused("a.bin: magic 20240520 version 2");
    Dataset d = {0};
    int ids[2];
    header[1] = 1; header[2] = 2; header[256] = 7 | 300 << 16;
    bin = file_of("a.bin", header, sizeof(header));
    dataset_open(&d, NULL, "--train", bin, "");
    dataset_read(&d, 0, 2, ids, 301);
    expect(ids[0] == 7 && ids[1] == 300, "its tokens");
    if (child()) { dataset_read(&d, 0, 2, ids, 300); _exit(0); }
    refused("a.bin: token 1 is 300, vocab_size is 300");
    dataset_free(&d);
    group("broken .bin files are refused");
}

// The numbers of .info files.
static void test_info(void) {
    static const char* bad[] = {
        "words", "words ", "words x", "words -1", "words +1", "words 1.5", "words 1e3", "words 1 ", "words  1",
        "words 0x1", "words 1000000000000000001", "words 18446744073709551617", "words 1\r", "lines -1", "bytes 0",
        "bytes", "lossless 2", "documents -3", "tokens ?", "eod -1", "eod 2147483648", "vocab_size 0"
    };
    const char* good = "words 5\nlines 2\nbytes 30\neod 1\ntokenizer t.tok\nlossless 0";
    char bin[64];
    snprintf(bin, sizeof(bin), "%s/b.bin", folder);
    Counts c = {0, 0, 0, true, true};
    counts_add_info(&c, bin);
    expect(!c.known && !c.words, "no .info");
    c.known = true;
    file_of("b.info", good, strlen(good));
    counts_add_info(&c, bin);
    expect(c.known && c.words == 5 && c.lines == 2 && c.bytes == 30 && !c.lossless, "a good one");
    file_of("b.info", "words 5\nlines 2\nworded x\n", 25);
    counts_add_info(&c, bin);
    expect(!c.known, "a count is missing");
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        const char* text = text_of("lines 2\n%s\nbytes 3\n", bad[i]);
        file_of("b.info", text, strlen(text));
        if (child()) { counts_add_info(&c, bin); _exit(0); }
        refused(text_of("/b.info: expected \"%.*s\" and a whole number from ", (int)strcspn(bad[i], " "), bad[i]));
    }
    group("numbers in .info files: what is none or out of range is refused with file and key");
}

// What spans_print says.
static void print_losses(const Span spans[NUM_SPANS], const Dataset* d, char* said, size_t size) {
    memset(said, 0, size);
    FILE* out = fmemopen(said, size - 1, "w");
    spans_print(out, spans, d);
    fclose(out);
}
static void test_losses(void) {
    char said[4096];
    Span spans[NUM_SPANS] = {{0, 0}};
    Dataset d = {0};
    float losses[3] = {1, 2, 3};
    d.eod = -1;
    dataset_open(&d, NULL, "--eval", file_of("l.txt", "a bc\nd\n", 7), "");
    dataset_index(&d, 4, 256);
    spans_add(spans, 1023, losses, 3);
    print_losses(spans, &d, said, sizeof(said));
    expect(strstr(said, "eval: tokens 3 nats/token 2.000000 perplexity 7.3891 bits/byte 2.8854\n"), said);
    expect(strstr(said, "nats 6.00, bytes 7, documents 1\nwords 3: perplexity per word 7.3891 ("), said);
    expect(strstr(said, "words + lines 5: perplexity per word 3.3201 ("), said);
    expect(strstr(said, "          0-1K            1     1.000000       2.7183\n"
                        "         1K-2K            2     2.500000      12.1825\n"), said);
    group("losses per token, byte, word and position");

    spans[0].nats = 100;
    print_losses(spans, &d, said, sizeof(said));
    expect(strstr(said, "2.6881e+43") && strstr(said, "perplexity per word 1.586e+15"), said);
    for (const char* line = said; *line; line += strcspn(line, "\n") + 1) {
        expect(strcspn(line, "\n") < 120, "lines are short");
    }
    spans[0].nats = 1e6;
    print_losses(spans, &d, said, sizeof(said));
    expect(strstr(said, " inf") && !strstr(said, "nan"), said);
    dataset_free(&d);
    d.eod = -1;
    dataset_open(&d, NULL, "--eval", file_of("space.txt", "    ", 4), "");
    print_losses(spans, &d, said, sizeof(said));
    expect(strstr(said, "words 0: perplexity per word unknown"), said);
    group("perplexities that are large or have no words");

    memset(spans, 0, sizeof(spans));
    if (child()) { spans_print(stdout, spans, &d); _exit(0); }
    refused("space.txt: no token to score: a document without an end needs two tokens");
    d.eod = ' ';
    if (child()) { spans_print(stdout, spans, &d); _exit(0); }
    refused("space.txt: no token to score: there are only ends of documents");
    dataset_free(&d);
    group("scoring no token is an error");
}

// Prompts and samples without a tokenizer, and prompts that a tokenizer drops.
static void test_prompt(void) {
    static const struct { int eod; const char* prompt; int count, ids[4]; } rows[] = {
        {-1, "ab", 2, {'a', 'b'}}, {-1, "", 1, {'\n'}}, {0, "", 1, {0}}, {0, "a", 2, {0, 'a'}}
    };
    for (int i = 0; i < 4; i++) {
        Tokens t = prompt_tokens(NULL, rows[i].eod, rows[i].prompt, 256);
        expect((int)t.count == rows[i].count && !memcmp(t.ids, rows[i].ids, t.count * sizeof(int)), rows[i].prompt);
        free(t.ids);
    }
    Tokenizer* fold = tokenizer_open("data/reference/tokens/fold.tok");
    Tokens t = prompt_tokens(fold, -1, "   ", fold->pieces);
    expect(t.count == 1 && t.ids[0] == fold->eod, "spaces that are dropped");
    free(t.ids);
    if (child()) { prompt_tokens(NULL, -1, "az", 'b'); _exit(0); }
    refused("--prompt: byte 122 is not below vocab_size 98");

    static const int ids[] = {'a', 0xe2, 0x82, 0xac, 0xc3, 'b'};
    static const int lacks[] = {0, 2, 1, 0, 1, 0};
    char said[64] = {0};
    FILE* out = fmemopen(said, sizeof(said) - 1, "w");
    int left = 0;
    for (int i = 0; i < 6; i++) {
        token_print(out, NULL, 256, ids[i], &left);
        expect(left == lacks[i], text_of("bytes that lack after byte %d", i));
    }
    token_print(out, NULL, 257, 256, &left);
    token_print(out, fold, 1 << 20, 1 << 19, &left); // an id that the tokenizer does not have
    fclose(out);
    expect(!strcmp(said, "a\xe2\x82\xac\xc3" "b256 "), said);
    tokenizer_close(fold);
    group("prompts and samples");
}

// Normalization by rules, also of texts that are not UTF-8. All pieces are bytes, so the tokens show what it gives.
static void test_rules(void) {
    static const char head[] =
        "megalodon.c tokenizer 2\nkind unigram\npieces 258\neod 0\nunknown 1\nunknown_score -9.5\n";
    // The rules: "b" is removed, "bc" becomes "  x  y  ", two bytes of U+FB01 become "f", and U+FB01 becomes "fi".
    static const char rules[] =
        "\"b\" \"\"\n\"bc\" \"  x  y  \"\n\"\xef\xac\" \"f\"\n\"\xef\xac\x81\" \"fi\"\n";
    static const struct { const char *text, *kept, *folded; } rows[] = {
        {"abcd\n", "a  x  y  d\n", " a  x  y  d"}, {"b\n", "\n", ""}, {"bb", "", ""},
        {" bc \n", "   x  y   \n", " x  y"},
        {"\xef\xac\x81", "fi", " fi"}, {"\xef\xac", "f", " f"}, {"\xef", "\xef", " \xef"},
        {"\xef" "bc", "\xef  x  y  ", " \xef  x  y"}, {" b  a b\n", "   a \n", " a"}, {"a\n\n b", "a\n\n ", " a"},
        {"\t a\r\n", "\t a\r\n", " \t a\r"}, {"\n", "\n", ""}
    };
    for (int fold = 0; fold < 2; fold++) {
        FILE* f = fopen(text_of("%s/rules.tok", folder), "w");
        fprintf(f, "%swhitespace %s\nlossless 0\nrules 4\nc 0 \"\"\nc 0 \"\"\n", head, fold ? "collapse" : "keep");
        for (int c = 0; c < 256; c++) { fprintf(f, "b 0 \"\\x%02x\"\n", c); }
        fputs(rules, f);
        fclose(f);
        Tokenizer* t = tokenizer_open(text_of("%s/rules.tok", folder));
        for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
            const char* expected = fold ? rows[i].folded : rows[i].kept;
            Tokens out = {NULL, 0};
            encode(t, (const unsigned char*)rows[i].text, strlen(rows[i].text), &out);
            bool same = out.count == strlen(expected);
            for (size_t k = 0; same && k < out.count; k++) { same = out.ids[k] == 2 + (unsigned char)expected[k]; }
            expect(same, rows[i].text);
            free(out.ids);
        }
        tokenizer_close(t);
    }
    group("normalization by rules");
}

// WikiText-2's published numbers, words and ends of lines, where the texts are.
static void test_words(const char* path, size_t words, size_t published) {
    Counts c = {0, 0, 0, true, true};
    if (access(path, R_OK)) { return; }
    counts_add_text(&c, path);
    expect(c.words == words && c.words + c.lines == published, "published numbers");
    group(text_of("%s: %zu words, %zu with ends of lines", path, words, published));
}

int main(void) {
    static const char* kinds[] = {"own", "fold", "bpe", "rules"};
    if (!mkdtemp(folder)) { die("%s: %s", folder, strerror(errno)); }
    for (int i = 0; i < 4; i++) { test_kind(kinds[i], "data/reference/tokens"); }
    for (int T = 1; T < 12; T++) { test_stretches(T, 1 + T % 4); }
    group("documents in stretches of 1 to 11 tokens");
    test_names();
    test_files();
    test_info();
    test_losses();
    test_prompt();
    test_rules();
    test_words("../shared/data/wikitext2/valid.txt", 213886, 217646);
    test_words("../shared/data/wikitext2/test.txt", 241211, 245569);
    if (system(text_of("rm -r '%s'", folder))) { printf("%s: not removed\n", folder); }
    return summary("dev/test_tokens.c");
}
