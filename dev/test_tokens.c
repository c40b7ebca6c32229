// Tokens against SentencePiece's, in data/reference/tokens; and the order in which training reads documents, against
// the plainest way to say it. From the project folder: dev/bin/test_tokens
#define TESTING
#include "../train_megalodon.c"

static bool okay = true;

static void check(bool good, const char* what) {
    printf("%s %s\n", good ? "ok" : "FAILED", what);
    okay = okay && good;
}

// The text becomes the tokens that SentencePiece gave, and the tokens the text.
static void check_kind(const char* kind, const char* folder) {
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
    check(same, text_of("%s: tokens", kind));

    char* decoded = NULL;
    int left = 0;
    FILE *out = open_memstream(&decoded, &n), *terminal = stdout;
    stdout = out;
    for (size_t i = 0; i < ours.count; i++) { token_print(t, t->pieces, ours.ids[i], &left); }
    stdout = terminal;
    fclose(out);
    bool back = n == size && !memcmp(text, decoded, n);
    check(back == t->lossless, text_of("%s: text and back%s", kind, t->lossless ? "" : ", as little as it says"));
    free(theirs.segments); free(ours.ids); free(ids); free(decoded); free(text);
    tokenizer_close(t);
}

// Documents over two files, one of them empty, in rows of T: what dataset_stretch gives for each step and row must be
// a walk through the list of all (input, target), EOD t0 .. to t0 .. EOD, each document's padded to a multiple of T.
static void check_stretches(int T, int rows) {
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
    check(good && all_counted, text_of("documents in stretches of %d, %d rows", T, rows));
    free(d.documents);
}

// WikiText-2's published numbers, words and ends of lines, where the texts are.
static void check_words(const char* path, size_t words, size_t published) {
    Counts c = {0, 0, 0, true, true};
    if (access(path, R_OK)) { return; }
    counts_add_text(&c, path);
    check(c.words == words && c.words + c.lines == published, text_of("%s: %zu, %zu", path, words, published));
}

int main(void) {
    static const char* kinds[] = {"own", "fold", "bpe"};
    for (int i = 0; i < 3; i++) { check_kind(kinds[i], "data/reference/tokens"); }
    for (int T = 1; T < 12; T++) { check_stretches(T, 1 + T % 4); }
    check_words("../shared/data/wikitext2/valid.txt", 213886, 217646);
    check_words("../shared/data/wikitext2/test.txt", 241211, 245569);
    return okay ? 0 : 1;
}
