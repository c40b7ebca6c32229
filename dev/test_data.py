#!/usr/bin/env python3
"""What the scripts of data/ and dev/ must do. Offline: downloads come from a server in here.

    dev/test_data.py                        all tests, on the project's own sources as text; under a minute
    dev/test_data.py FILE.model TEXT...     only: the .tok made of this SentencePiece model encodes these texts just as
                                            SentencePiece does, and decoding gives them back

Needs what data/requirements.txt and dev/requirements.txt list, and gcc for the comparison with train_megalodon.c.
"""
import array, base64, contextlib, functools, glob, hashlib, http.server, io, json, os, random, re, shlex, subprocess
import sys, tempfile, threading, time, urllib.parse, zipfile, zlib

import numpy

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "data"))
import common
import enwik8


# ---------------------------------------------------------------------------------------------------------------------
# A tokenizer from nothing but the .tok file, as data/common.py describes it

class Tok:
    def __init__(self, path):
        with open(path, "rb") as f:
            lines = f.read().split(b"\n")
        self.version = {b"megalodon.c tokenizer 1": 1, b"megalodon.c tokenizer 2": 2}[lines[0]]
        keys = "kind pieces eod unknown unknown_score whitespace lossless rules".split()[:6 + self.version]
        head = [line.decode().split(" ") for line in lines[1:1 + len(keys)]]
        assert [key for key, _ in head] == keys and lines[-1] == b""
        self.__dict__.update(head)
        first, rules = 1 + len(keys), int(self.rules) if self.version == 2 else 0
        assert len(lines) == first + int(self.pieces) + rules + 1
        self.types, self.scores, self.bytes = [], [], []
        self.replacements, self.longest_rule = rules_from(tuple(lines[-1 - rules:-1]))
        for line in lines[first:first + int(self.pieces)]:
            kind, score, quoted = line.split(b" ", 2)
            assert len(kind) == 1
            data = unquoted(quoted)
            self.types.append(kind.decode())
            self.scores.append(float(score))
            self.bytes.append(data)
        ids = range(len(self.types))
        self.byte_ids = {self.bytes[i][0]: i for i in ids if self.types[i] == "b"}
        assert len(self.byte_ids) in (0, 256)
        self.ids = {self.bytes[i]: i for i in ids if self.types[i] in "nu"}
        assert len(self.ids) == sum(t in "nu" for t in self.types) and b"" not in self.ids
        self.prefixes = {piece[:n] for piece in self.ids for n in range(1, len(piece) + 1)}
        self.users = [piece for piece in self.ids if self.types[self.ids[piece]] == "u"]

    def encode(self, text):
        lines = text.split(b"\n")
        return [i for line in [line + b"\n" for line in lines[:-1]] + lines[-1:] for i in self.encode_line(line)]

    def encode_line(self, line):
        if self.whitespace == "collapse" or self.replacements:
            line = self.normalize(line)
        parts = self.viterbi(line) if self.kind == "unigram" else self.merge(line)
        out, unknown, last = [], int(self.unknown), None
        for i, piece in parts:
            if i != unknown:
                out.append(i)
            elif self.byte_ids:
                out += [self.byte_ids[c] for c in piece]
            elif last != unknown:
                out.append(i)
            last = i
        return out

    def normalize(self, line):
        collapse = self.whitespace == "collapse"
        line, out = (line.removesuffix(b"\n"), b" ") if collapse else (line, b"")
        if self.version == 1:
            line = line.translate(bytes.maketrans(b"\t\r", b"  "))
        while line:
            users = [piece for piece in self.users if line.startswith(piece) and self.version > 1]
            rules = [line[:n] for n in range(1, self.longest_rule + 1) if line[:n] in self.replacements]
            part = max(users, key=len) if users else rules[-1] if rules else line[:1]
            new = part if users else self.replacements.get(part, part)
            out += new.lstrip(b" ") if collapse and out.endswith(b" ") else new
            line = line[len(part):]
        return out.rstrip(b" ") if collapse else out

    def viterbi(self, text):
        size, unknown_score, rounded = len(text), float(self.unknown_score), array.array("f", [0])
        best, start, piece = array.array("f", bytes(4 * size + 4)), [-1] * (size + 1), [0] * (size + 1)
        s = 0
        while s < size:
            if best[s] < -100000:
                ends = [s] + [e for e in range(s + 1, size + 1) if start[e] >= 0]
                for e in reversed(ends):
                    best[e] -= best[s]
            char, single = min(char_length(text[s]), size - s), False
            for e in range(s + 1, size + 1):
                part = text[s:e]
                if part not in self.prefixes:
                    break
                i = self.ids.get(part)
                if i is not None:
                    rounded[0] = best[s] + self.scores[i]
                    if start[e] < 0 or rounded[0] > best[e]:
                        best[e], start[e], piece[e] = rounded[0], s, i
                    single = single or e - s == char
            if not single:
                e, rounded[0] = s + char, best[s] + unknown_score
                if start[e] < 0 or rounded[0] > best[e]:
                    best[e], start[e], piece[e] = rounded[0], s, int(self.unknown)
            s += char
        path, e = [], size
        while e > 0:
            path.append((piece[e], text[start[e]:e]))
            e = start[e]
        return path[::-1]

    def merge(self, text):
        symbols, s = [], 0 # (bytes, frozen)
        while s < len(text):
            users = [len(piece) for piece in self.users if text.startswith(piece, s)]
            n = max(users, default=char_length(text[s]))
            symbols.append((text[s:s + n], bool(users)))
            s += n
        while True:
            best = None
            for k in range(len(symbols) - 1):
                (a, frozen_a), (b, frozen_b) = symbols[k:k + 2]
                i = self.ids.get(a + b)
                if i is not None and not frozen_a and not frozen_b and (best is None or self.scores[i] > best[0]):
                    best = self.scores[i], k
            if best is None:
                return [(self.ids.get(symbol, int(self.unknown)), symbol) for symbol, _ in symbols]
            k = best[1]
            symbols[k:k + 2] = [(symbols[k][0] + symbols[k + 1][0], False)]

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids)


def unquoted(quoted):
    assert re.fullmatch(rb'"([^\x00-\x1f"\\\x7f]|\\x[0-9a-f]{2})*"', quoted)
    data = quoted[1:-1]
    return re.sub(rb"\\x(..)", lambda found: bytes([int(found[1], 16)]), data) if b"\\" in data else data


@functools.cache # several models have the same 225,000 rules
def rules_from(lines):
    pairs = [[unquoted(text) for text in re.findall(b'"[^"]*"', line)] for line in lines]
    rules = dict(pairs)
    assert list(rules) == sorted(rules) and len(rules) == len(lines) and b"" not in rules
    assert all(line.count(b'"') == 4 and b'" "' in line for line in lines)
    return rules, max(map(len, rules), default=0)


class TokInC:
    """The same by data/tokens.h."""

    def __init__(self, folder):
        self.path, self.program = folder + "/tokenizer.tok", folder + "/encode"
        write(self.program + ".c", b'''#include "data/tokens.h"
int main(int argc, char** argv) {
    size_t size;
    Tokens out = {NULL, 0};
    Tokenizer* t = tokenizer_open(argv[argc - 2]);
    unsigned char* text = file_read(argv[argc - 1], &size);
    encode(t, text, size, &out);
    fwrite(out.ids, sizeof(int), out.count, stdout);
}
''')
        subprocess.run(["gcc", "-std=gnu11", "-O1", "-w", "-I", ROOT, self.program + ".c", "-o", self.program, "-lm"],
                       check=True)

    def encode(self, text):
        command = [self.program, self.path, write(self.program + ".txt", text)]
        return numpy.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<i4").tolist()

    def decode(self, ids):
        return Tok(self.path).decode(ids)


def char_length(first):
    return 1 if first < 0xc0 else 2 if first < 0xe0 else 3 if first < 0xf0 else 4


def compare(tokenizer, tok, paths):
    """What differs between tok and SentencePiece on the files, or ""."""
    for path in paths:
        with open(path, "rb") as f:
            text = f.read()
        ids, expected = tok.encode(text), tokenizer.encode(text, path).tolist()
        if ids != expected:
            k = next((k for k, (a, b) in enumerate(zip(ids, expected)) if a != b), min(len(ids), len(expected)))
            return f"{path}: token {k} is {ids[k:k + 3]}, SentencePiece has {expected[k:k + 3]}"
        if tokenizer.lossless and tok.decode(ids) != text:
            return f"{path}: decoding does not give the text back"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Running things

failures = passes = 0


def result(name, why=""):
    global failures, passes
    print(f"FAILED {name}: {why}" if why else f"ok {name}", flush=True)
    failures, passes = failures + bool(why), passes + (not why)


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "LC_ALL": "C.UTF-8"})
    return done.returncode, done.stdout, done.stderr


def works(name, *command, expects=()):
    code, out, err = run(*command)
    missing = [text for text in expects if text not in out]
    result(name, f"exit status {code}: {err[-500:]}" if code else f"no {missing} in: {out[-500:]}" if missing else "")
    return out


def refuses(text, *command):
    """Exit status 1, and one line on stderr, with this in it."""
    code, out, err = run(*command)
    good = code == 1 and err.startswith("error: ") and text in err and err.count("\n") == 1
    name = " ".join(map(os.path.basename, command))[:90]
    result(f"refuses {name}", "" if good else f"exit status {code}: {err[-500:]}")


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(data)
    return path


def tokens_of(path):
    """A .bin's tokens, its .info checked against it and the texts it is made of."""
    head = numpy.fromfile(path, "<i4", 256)
    kind = {(20240520, 1): "<u2", (20240801, 7): "<u4"}[tuple(head[:2].tolist())]
    tokens = numpy.fromfile(path, kind, offset=1024)
    assert len(tokens) == head[2] and not head[3:].any(), "header"
    return tokens.tolist()


def info_of(path):
    with open(path) as f:
        return dict(line.rstrip("\n").split(" ") for line in f)


def check_files(out, name, texts, lossless=True):
    """Why OUT/NAME.bin and .info are not those of the texts, or ""."""
    tokens, info = tokens_of(f"{out}/{name}.bin"), info_of(f"{out}/{name}.info")
    eod = int(info["eod"])
    counts = {"words": sum(len(t.split()) for t in texts), "lines": sum(t.count(b"\n") for t in texts),
              "bytes": sum(map(len, texts)), "documents": len(texts), "tokens": len(tokens)}
    for key, value in counts.items():
        if int(info[key]) != value:
            return f"{name}.info: {key} {info[key]}, expected {value}"
    tok = Tok(f"{out}/{info['tokenizer']}") if "tokenizer" in info else None
    if int(info["vocab_size"]) != (int(tok.pieces) if tok else 256) or (tok and int(tok.eod) != eod):
        return f"{name}.info: {info} does not fit the .tok"
    documents, piece = [], []
    for token in tokens:
        if token == eod:
            documents.append(tok.decode(piece) if tok else bytes(piece))
            piece = []
        else:
            piece.append(token)
    if piece or len(documents) != len(texts):
        return f"{name}.bin: {len(documents)} documents, {len(piece)} tokens after the last"
    if int(info["lossless"]) != lossless or (lossless and documents != texts):
        return f"{name}.bin: the texts do not come back"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# A server

class Server(http.server.ThreadingHTTPServer):
    """Serves self.files, {path: bytes}. Paths in self.breaks are cut off after so many bytes, once; what was asked for
    is in self.log: (path, Range or None). In self.no_range are paths for which Range is not understood."""

    def __init__(self):
        self.files, self.breaks, self.busy, self.no_range, self.log = {}, {}, {}, set(), []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        path, asked, server = urllib.parse.unquote(self.path), self.headers.get("Range"), self.server
        server.log.append((path, asked))
        data = server.files.get(path)
        if callable(data):
            data = data()
        if data is None or server.busy.get(path):
            server.busy[path] = server.busy.get(path, 1) - 1
            self.send_error(404 if data is None else 503)
            return
        start = int(asked[len("bytes="):-1]) if asked and path not in server.no_range else 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:server.breaks.pop(path, len(data))])


def hugging_face(server, folder, splits):
    """WikiText's layout: rows are lines, blank ones empty."""
    import pyarrow, pyarrow.parquet
    listing = [{"type": "file", "path": folder + "/notes.md", "size": 1}]
    for name, text in splits.items():
        lines = text.decode().split("\n")[:-1]
        rows = ["" if line == " " else line + "\n" for line in lines]
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), buffer, row_group_size=40)
        path, data = f"{folder}/{name}-00000-of-00001.parquet", buffer.getvalue()
        server.files[f"/datasets/Salesforce/wikitext/resolve/{REVISION}/{path}"] = data
        listing.append({"type": "file", "path": path, "size": len(data), "oid": "0",
                        "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}})
    server.files[f"/api/datasets/Salesforce/wikitext/tree/{REVISION}/{folder}"] = json.dumps(listing).encode()
    return listing


def cloud_storage(server, books):
    """PG19's layout: the listing comes in pages of two."""
    for split in ("train", "validation", "test"):
        names = sorted(name for name in books if name.startswith(split + "/")) # "train/10.txt" before "train/2.txt"
        items = [{"name": split + "/"[:1], "size": "0", "md5Hash": ""}] + [
            {"name": name, "size": str(len(books[name])),
             "md5Hash": base64.b64encode(hashlib.md5(books[name]).digest()).decode()} for name in names]
        for k in range(0, len(items), 2):
            query = {"prefix": split + "/", "fields": "items(name,size,md5Hash),nextPageToken", "maxResults": 1000}
            query.update({"pageToken": f"page{k}"} if k else {})
            page = {"items": items[k:k + 2], **({"nextPageToken": f"page{k + 2}"} if k + 2 < len(items) else {})}
            url = "/storage/v1/b/deepmind-gutenberg/o?" + urllib.parse.unquote(urllib.parse.urlencode(query))
            server.files[url] = json.dumps(page).encode()
    for name, text in books.items():
        server.files["/deepmind-gutenberg/" + name] = text


REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


# ---------------------------------------------------------------------------------------------------------------------
# The tests

STRANGE = ("a  b\u2581c \u2581 d\n\n \t x\ty\r\n\x01\x7f \"quoted\\ \u00e9\u00df\u6f22\u5b57 \U0001f600 </s> <unk> "
           "<0x41> \u200b\ufeff\u0301 12345 tail without newline ").encode()


# What odd lines are made of: parts, with | between them.
ODD = r"""the| of|int|for (|static|THE|Parameter|CamelCase|x1234|<s2>|<b|1/2|abc|\t|\r|\v|\f| |  |     |\x00|\x01|\x7f|"
e\u0301|E\u0301\u0323|\u00e9|a\u0308\u0301|\u0130|\u1e9e|\u00df|\u01c6|\ufb01|\ufb03x|\uff21\uff22|\uff11\uff12|\u3000
\\|\u201cq\u201d|\u2019s|\u2026|\u00bd|\u00b4|\u2460|\u2126|\ufdfa|\ufdfb\u0651|\u0627\u0644\u0651|\u06cc|\u0958
\u30ab\u3099|\uff76\uff9e|\u1112\u1161\u11ab|\ud55c\uae00|\uae00\u11a8|\uffbe\uffc2\uffa4|\u0345\u03b1|\u03a3\u03c2
\U0001f600\ufe0f|\U0001f1e9\U0001f1ea|\U0001d400|\U0001d7d8|\u0301|\u0300\u0345|\u200b|\u200d|\u00ad|\u2028|\u0085
\u00a0|\u202f|\ufeff|\ufffd|\uffff|\x9f|\u6f22\u5b57|\u2581|\u2581 """
ODD = ODD.encode().decode("unicode_escape").replace("\n", "|").split("|")


def odd_lines(count):
    draw = random.Random(5)
    lines = ["".join(draw.choice(ODD) * draw.choice((1, 1, 1, 1, 2, 5)) for _ in range(draw.randrange(12)))
             for _ in range(count)]
    lines += ["".join(chr(draw.randrange(1, high)).replace("\n", "") for _ in range(20))
              for high in (128, 0x250, 0x3000, 0xd800) for _ in range(20)]
    return "\n".join(lines + [" ", "\r", "Ab\ufb01" * 150, "\u1112\u1161" * 150 + "end"])


# Rules with spaces in what they give, one that gives nothing, and one that is the start of another.
OWN_RULES = b"""61 62\t78 20 20 79
61\t41
62 63\t20
64\t
65\t20 20 7A 20 20
74 68 65\t54 48 45
20 6F\t6F
"""


def trained(text, **arguments):
    """The contents of the file of a new SentencePiece model."""
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(input=text, model_writer=model, vocab_size=700, minloglevel=2, **arguments)
    return model.getvalue()


def test_tokenizers(folder, text, strange, long):
    """Kinds of models: our own; like those of T5, ALBERT and Llama; and others, so that settings occur together."""
    import sentencepiece
    unigram, bpe = dict(model_type="unigram"), dict(model_type="bpe")
    keep, users = dict(remove_extra_whitespaces=False, add_dummy_prefix=False), ["static", "<s2>", "\ufb01", "THE"]
    kinds = {
        "own": None,
        "t5-like": dict(unigram, normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
        "unigram nmt_nfkc_cf": dict(unigram, normalization_rule_name="nmt_nfkc_cf",
                                    user_defined_symbols=users + ["\t"]),
        "unigram nfkc kept": dict(unigram, normalization_rule_name="nfkc", **keep, byte_fallback=True,
                                  user_defined_symbols=users),
        "unigram nfkc_cf bytes": dict(unigram, normalization_rule_name="nfkc_cf", byte_fallback=True),
        "unigram identity": dict(unigram, normalization_rule_name="identity", user_defined_symbols=users + ["\r"]),
        "bpe": dict(bpe, byte_fallback=True, normalization_rule_name="identity", split_digits=True, **keep,
                    user_defined_symbols=["static", "<s2>", "\u2581\u2581\u2581"]),
        "bpe without bytes": dict(bpe, normalization_rule_name="identity", **keep),
        "bpe nmt_nfkc bytes": dict(bpe, normalization_rule_name="nmt_nfkc", byte_fallback=True,
                                   user_defined_symbols=users),
        "bpe nmt_nfkc_cf kept": dict(bpe, normalization_rule_name="nmt_nfkc_cf", **keep),
        "bpe nfkc_cf kept": dict(bpe, normalization_rule_name="nfkc_cf", **keep, byte_fallback=True,
                                 user_defined_symbols=users),
        "bpe nfkc": dict(bpe, normalization_rule_name="nfkc"),
        "rules of its own": dict(unigram, normalization_rule_tsv=write(folder + "/rules.tsv", OWN_RULES)),
    }
    common.rules_of = functools.cache(common.rules_of)
    tok_in_c = TokInC(folder)
    odd = write(folder + "/odd.txt", odd_lines(300).encode())
    plain = write(folder + "/plain.txt", odd_lines(300).replace("\u2581", "_").encode())
    for name, arguments in kinds.items():
        own = arguments is None
        contents = common.train_sentencepiece([text], "unigram", 800) if own else trained(text, **arguments)
        tokenizer = common.SentencePiece(contents, name)
        tokenizer.write(folder)
        tok = Tok(folder + "/tokenizer.tok")
        paths = [text, strange, odd]
        if name == "own": # one long line: scores are set back
            paths.append(long)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            why, why_in_c = compare(tokenizer, tok, paths), compare(tokenizer, tok_in_c, paths)
        result(f"tokenizer {name}: the .tok alone encodes as SentencePiece does", why)
        result(f"tokenizer {name}: so does C", why_in_c)
        note = f"note: {strange}: U+2581 is a character of its own, not a space as SentencePiece has it\n"
        result(f"tokenizer {name}: U+2581 is noted once", "" if said.getvalue() == note else said.getvalue())
        expected = name in ("own", "bpe")
        result(f"tokenizer {name}: lossless is {int(expected)}", "" if tokenizer.lossless == expected
               and int(tok.lossless) == expected else "it is not")
        if name in ("own", "t5-like"):
            common.SentencePiece(open(folder + "/tokenizer.model", "rb").read(), name).write(folder + "/..")
            same = open(folder + "/../tokenizer.tok", "rb").read() == open(folder + "/tokenizer.tok", "rb").read()
            result(f"tokenizer {name}: tokenizer.model makes the same .tok again", "" if same else "it differs")
        # What we change in a model changes nothing for lines without U+2581. Where whitespace is kept, a line's newline
        # is text; where it is folded, SentencePiece is given lines without.
        original = sentencepiece.SentencePieceProcessor(model_proto=contents)
        for path in (text, plain):
            data = open(path, "rb").read()
            lines = data.decode().split("\n")
            lines = lines if tokenizer.collapse else [line + "\n" for line in lines[:-1]] + lines[-1:]
            wrong = [line for line in lines if original.encode(line) != tokenizer.processor.encode(line)]
            same = tokenizer.encode(data, path).tolist() == [i for line in lines for i in original.encode(line)]
            result(f"tokenizer {name}: {os.path.basename(path)} has the ids of the model as it was",
                   "" if same else repr(wrong[:1])[:300] or "they differ")


def test_settings(folder, text):
    """What a .tok cannot hold is refused, and what we change is noted, both by name."""
    from sentencepiece import sentencepiece_model_pb2

    def said_of(contents):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                common.SentencePiece(contents, "a.model")
            except common.Failure as e:
                print(e)
        return said.getvalue()

    def changed(contents, change):
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(contents)
        change(model.normalizer_spec, model)
        return model.SerializeToString()

    rules = dict(normalization_rule_tsv=write(folder + "/rules.tsv", OWN_RULES))
    keep = dict(remove_extra_whitespaces=False, normalization_rule_name="identity")
    spaces = dict(user_defined_symbols=["\u2581\u2581"])
    for contents, expected in (
            (trained(text, **rules), ""),
            (trained(text, **rules, treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
            (trained(text, model_type="char", hard_vocab_limit=False), "not a SentencePiece model of kind"),
            (trained(text, model_type="word", hard_vocab_limit=False), "not a SentencePiece model of kind"),
            (trained(text, **rules, **spaces), "a user-defined piece with a space in a model that normalizes"),
            (trained(text, **keep, **spaces), "note: a.model: no line gets a space in front, which SentencePiece adds"),
            (trained(text, **keep, user_defined_symbols=["a b"]), "a piece with a space that is not U+2581"),
            (trained(text, **rules, add_dummy_prefix=False), "note: a.model: each line gets a space in front"),
            (trained(text, **rules, denormalization_rule_tsv=folder + "/rules.tsv"),
             "note: a.model: denormalizer_spec"),
            (changed(trained(text, **rules, model_type="bpe"), lambda _, model: setattr(model.pieces[300], "type", 5)),
             "a bpe model with unused pieces")):
        said = said_of(contents)
        result(f"a model: {expected or 'nothing to say'}", "" if expected in said and bool(expected) == bool(said) and
               said.count("\n") <= 1 else said)

    whole, draw, refused = trained(text, **rules), random.Random(0), 0
    for size in (1, 4, 5, 1000):

        def cut(normalizer, _):
            normalizer.precompiled_charsmap = normalizer.precompiled_charsmap[:size]
        said = said_of(changed(whole, cut))
        result(f"a model whose rules are cut to {size} bytes", "" if "is damaged" in said else f"said: {said}")
    for _ in range(100): # nothing but a Failure may be raised

        def flip(normalizer, _):
            rules = bytearray(normalizer.precompiled_charsmap)
            rules[draw.choice((draw.randrange(8), draw.randrange(len(rules))))] ^= 1 << draw.randrange(8)
            normalizer.precompiled_charsmap = bytes(rules)
        refused += "is damaged" in said_of(changed(whole, flip))
    result("models whose rules have a wrong bit", "" if 5 < refused < 95 else f"{refused} of 100 are refused")


def test_files(folder, text):
    """Splits, sidecars, shards, wide tokens."""
    class Wide(common.Bytes):
        eod, vocab_size = 70000, 70001

    documents = [text[:5000], text[5000:5003], text[6000:9000]]
    paths = [write(f"{folder}/in/{k}.txt", t) for k, t in enumerate(documents)]
    os.makedirs(folder + "/out")
    common.write_split(folder + "/out", "wide", paths, Wide())
    head = numpy.fromfile(folder + "/out/wide.bin", "<i4", 3).tolist()
    expected = [i for t in documents for i in [*t, 70000]]
    result("ids above 65,535 are uint32", "" if head == [20240801, 7, len(expected)] and
           tokens_of(folder + "/out/wide.bin") == expected else f"header {head}")
    whole, common.SHARD = common.SHARD, 5010
    sums = common.write_split(folder + "/out", "cut", paths, common.Bytes())
    common.SHARD = whole
    why = check_files(folder + "/out", "cut", documents[:2]) or check_files(folder + "/out", "cut_1", documents[2:])
    result("what passes the limit goes on in another file", why or ("" if sums["documents"] == 3 else str(sums)))


def test_text(folder, text):
    books = {"train/a.txt": text[:60000], "train/sub/b.txt": text[60000:90000], "valid/c.txt": text[90000:95000],
             "test/d.txt": STRANGE}
    for name, data in books.items():
        write(f"{folder}/books/{name}", data)
    splits = {name: [data for path, data in books.items() if path.startswith(name)]
              for name in ("train", "valid", "test")}
    out, script = folder + "/out", "data/text.py"
    for kind, more in (("bytes", ("--tokenizer", "bytes")), ("train", ("--vocab-size", "600")),
                       ("bpe", ("--vocab-size", "600", "--tokenizer", "bpe")),
                       ("FILE.model", ("--tokenizer", folder + "/train/tokenizer.model"))):
        out = f"{folder}/{kind}"
        works(f"text.py --tokenizer {kind}", script, folder + "/books", "--out", out, *more)
        result(f"text.py --tokenizer {kind}: files",
               "".join(check_files(out, name, texts) for name, texts in splits.items()))
    same = open(folder + "/train/test.bin", "rb").read() == open(folder + "/FILE.model/test.bin", "rb").read()
    result("text.py: tokenizer.model gives the same tokens", "" if same else "they differ")
    works("text.py with patterns", script, folder + "/books/train/*.txt", "--val", folder + "/books/valid/c.txt",
          "--out", folder + "/patterns", "--tokenizer", "bytes")
    result("text.py with patterns: files", check_files(folder + "/patterns", "train", splits["train"][:1])
           + check_files(folder + "/patterns", "valid", splits["valid"])
           + ("test.bin" if os.path.exists(folder + "/patterns/test.bin") else ""))
    out = ("--out", folder + "/bad")
    os.makedirs(folder + "/none")
    refuses("nowhere.txt: No such file or directory", script, folder + "/nowhere.txt", *out)
    refuses("error: '': No such file", script, "", *out)
    refuses("** is not known; name the folder", script, folder + "/books/**/*.txt", *out)
    refuses("error: '': No such file", script, folder + "/books", "--out", "", "--tokenizer", "bytes")
    refuses("/proc/self/mem: Input/output error", script, folder + "/books", *out, "--tokenizer", "/proc/self/mem")
    ends = write(folder + "/ends.txt", b"\r\n\r \n")
    refuses(f"{ends}: nothing but spaces and ends of lines", script, ends, *out)
    for name in "UTF-16", "UTF-16LE", "UTF-16BE", "UTF-32", "UTF-32LE", "UTF-32BE":
        wide = write(folder + "/wide text.txt", text[:4000].decode().encode(name))
        refuses(f"this text is {name}, expected UTF-8: iconv -f {name} -t UTF-8 '{wide}' > NEW.txt", script, wide, *out,
                *("--tokenizer", "bytes") * (len(name) == 6))
    os.mkfifo(folder + "/fifo.txt")
    refuses("fifo.txt: not a regular file", script, folder + "/fifo.txt", *out)
    os.remove(folder + "/fifo.txt")
    refuses("/dev/full", script, folder + "/books", "--out", "/dev/full")
    program = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); sys.path.insert(" \
              "0, 'data'); del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    refuses("/bad/train.bin: File too large", "-c", program, script, folder + "/books", *out, "--tokenizer", "bytes")
    left = os.listdir(folder + "/bad")
    result("text.py leaves no half of a file", str(left) if left else "")
    if os.getuid() == 0: # nobody may read this folder; a superuser becomes nobody for it
        nobody = "import os; os.setuid(65534); " + program
        os.makedirs(folder + "/locked/inner", 0o755)
        write(folder + "/locked/a.txt", b"text")
        os.chmod(folder, 0o755)
        os.chmod(folder + "/..", 0o755)
        os.chmod(folder + "/locked/inner", 0)
        for name in "/locked", "/locked/inner", "/locked/inner/b.txt":
            refuses("/inner" + name[13:] + ": Permission denied", "-c", nobody, script, folder + name, *out)

    # Names that look like patterns, lists or no text at all, a loop of links, and locales without their characters.
    odd = os.fsencode(folder + "/a[1]*,b")
    os.makedirs(odd)
    os.symlink(b".", odd + b"/loop")
    os.symlink(b".", odd + b"/loop too")
    for name in b"x?.txt", b"\xff\xe9.txt", "\u00e9,.txt".encode():
        write(odd + b"/" + name, text[:100])
    os.symlink(odd + b"/x?.txt", odd + b"/soft.txt")
    os.link(odd + b"/x?.txt", odd + b"/hard.txt")
    for names in [odd], [odd + b"/\xff\xe9.txt", odd + b"/x?.txt", odd + b"/\xc3\xa9,.txt", odd]:
        for settings in {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}:
            done = subprocess.run([sys.executable, script, *names, "--out", odd + b"/out", "--tokenizer", "bytes"],
                                  cwd=ROOT, capture_output=True, env={**os.environ, **settings})
            why = done.stderr.decode() if done.returncode else b"train: 3 documents" not in done.stdout and "not 3"
            result(f"text.py with odd names, {len(names)}, {settings}", why or "")
    done = subprocess.run([sys.executable, script, odd + b"/\xfe.txt", "--out", folder + "/bad"], cwd=ROOT,
                          capture_output=True, env={**os.environ, "LC_ALL": "C"})
    good = done.returncode == 1 and done.stderr.endswith(b".txt: No such file or directory\n") and \
        done.stderr.count(b"\n") == 1
    result("text.py names a file whose name is not UTF-8", "" if good else str(done.stderr))

    # Closed standard files, a reader that goes away, and a full disk.
    one = f"{sys.executable} {script} {folder}/books/train/a.txt --out {folder}/closed --tokenizer bytes"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for redirection, code in (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), ("> /dev/full", 1), ("| true", 0):
        done = subprocess.run(["bash", "-c", f"{one} {redirection}"], cwd=ROOT, capture_output=True, text=True,
                              env=buffered)
        why = check_files(folder + "/closed", "train", splits["train"][:1])
        result(f"text.py {redirection}", why or ("" if done.returncode == code and "Traceback" not in done.stderr
                                                 and done.stderr.count("error: ") <= 1 else done.stderr))
    for redirection in "> /dev/full", "| true":
        done = subprocess.run(["bash", "-c", f"{sys.executable} {script} --help {redirection}"], cwd=ROOT,
                              capture_output=True, text=True, env=buffered)
        result(f"text.py --help {redirection}", "" if done.stderr.count("\n") <= 1 and "Exception" not in done.stderr
               else done.stderr)

    # What belongs together: the tokenizer's fingerprint, and files that an earlier call left.
    again = (script, folder + "/books/train/a.txt", "--out", folder + "/again", "--vocab-size")
    works("text.py", *again, "500")
    info = dict(line.split(" ", 1) for line in open(folder + "/again/train.info").read().splitlines())
    crc32 = f"{zlib.crc32(open(folder + '/again/tokenizer.tok', 'rb').read()):08x}"
    result("text.py writes tokenizer_crc32", "" if info["tokenizer_crc32"] == crc32 else str(info))
    for name in "train_1.bin", "train_1.info", "train_x.bin", "valid.bin":
        write(f"{folder}/again/{name}", b"")
    out_again = works("text.py again, another tokenizer", *again, "400", expects=[
        "tokenizer.tok was another tokenizer", "train_1.bin is removed", "valid.bin is of an earlier call"])
    left = sorted(os.listdir(folder + "/again"))
    result("text.py again: its files", "" if left == ["tokenizer.model", "tokenizer.tok", "train.bin", "train.info",
                                                      "train_x.bin", "valid.bin"] else str(left))
    command = shlex.split(out_again.split("to train on it: ")[-1])
    done = subprocess.run(command + ["--dry-run"], cwd=ROOT, capture_output=True, text=True)
    result("text.py: the command that it prints", done.stderr if done.returncode else
           "" if "vocab_size 400" in done.stdout else done.stdout)
    small = "import common, types; common.SHARD = 50000; common.prepare(sys.argv[1], {'train': sys.argv[2:]}, " \
            "types.SimpleNamespace(tokenizer='bytes', vocab_size=None))"
    said = works("text.py makes shards in a folder with an odd name", "-c", "import sys; sys.path.insert(0, 'data'); " +
                 small, folder + "/a[1]*,b\\s q?'", folder + "/books/train/a.txt", folder + "/books/train/sub/b.txt")
    done = subprocess.run(shlex.split(said.split("to train on it: ")[-1]) + ["--dry-run"], cwd=ROOT,
                          capture_output=True, text=True)
    counts = re.search(r"tokens: (\d+) to train on, (\d+) held out", done.stdout)
    result("text.py: the command for shards", "" if counts and sum(map(int, counts.groups())) == 90002 else
           done.stdout[-100:] + done.stderr)
    refuses("no .txt files", script, folder + "/none", *out)
    refuses("empty", script, write(folder + "/empty.txt", b""), *out)
    refuses("byte 3 is not UTF-8", script, write(folder + "/latin.txt", b"abc\xe9t\xe9"), *out, "--tokenizer",
            folder + "/train/tokenizer.model")
    refuses("not UTF-8", script, folder + "/latin.txt", *out)
    refuses("byte 4 is 0", script, write(folder + "/nul.txt", b"text\0"), *out, "--tokenizer", "bytes")
    refuses("not a SentencePiece model", script, folder + "/books", *out, "--tokenizer", __file__)
    refuses("No such file", script, folder + "/books", *out, "--tokenizer", "nowhere.model")
    for size, bound in ("1", "at least "), ("270", "at least "), ("1000000", "at most "):
        refuses(f"a.txt, ...: expected {bound}", script, folder + "/books", *out, "--vocab-size", size)
    for size in "0", "99999999999999999999":
        refuses(f"--vocab-size {size}: expected", script, folder + "/books", *out, "--vocab-size", size)
    refuses("has 600 tokens", script, folder + "/books", *out, "--vocab-size", "601", "--tokenizer",
            folder + "/train/tokenizer.model")
    refuses("--out", script, folder + "/books")
    refuses("unrecognized", script, folder + "/books", *out, "--vocab", "300")


def test_downloads(folder, text):
    server = Server()
    books = {f"train/{n}.txt": text[n * 700:n * 700 + 20000] for n in (2, 10, 33, 4)}
    books.update({"validation/7.txt": text[:3000], "test/8.txt": text[5000:9000], "test/9.txt": text[9000:9500]})
    cloud_storage(server, books)
    pg19 = ("data/pg19.py", "--tokenizer", "bytes", "--base", server.url, "--out")
    # The connection breaks once, a server is busy once; a part of one book is there, of another one all and more.
    server.breaks["/deepmind-gutenberg/train/2.txt"] = 12345
    server.busy["/deepmind-gutenberg/train/4.txt"] = 1
    write(folder + "/pg19/raw/train/10.txt.part", books["train/10.txt"][:7000])
    write(folder + "/pg19/raw/test/9.txt.part", books["test/9.txt"])
    write(folder + "/pg19/raw/test/8.txt.part", books["test/8.txt"][:10])
    server.no_range.add("/deepmind-gutenberg/test/8.txt")
    works("pg19.py", *pg19, folder + "/pg19", expects=["words", "published 6,966,499: NOT THE SAME"])
    in_order = [books[f"train/{n}.txt"] for n in (2, 4, 10, 33)]
    result("pg19.py: files", check_files(folder + "/pg19", "train", in_order) + check_files(
        folder + "/pg19", "valid", [books["validation/7.txt"]]) + check_files(
        folder + "/pg19", "test", [books["test/8.txt"], books["test/9.txt"]]))
    ranges = {(path[len("/deepmind-gutenberg/"):], asked) for path, asked in server.log if asked}
    expected = {("train/2.txt", "bytes=12345-"), ("train/10.txt", "bytes=7000-"), ("test/9.txt", "bytes=500-"),
                ("test/8.txt", "bytes=10-")}
    result("pg19.py: goes on where a download broke", "" if ranges == expected else str(ranges))
    server.log.clear()
    works("pg19.py again", *pg19, folder + "/pg19")
    again = [path for path, _ in server.log if path.endswith(".txt")]
    result("pg19.py again: nothing is downloaded twice", str(again) if again else "")
    works("pg19.py --books", *pg19, folder + "/pg19few", "--books", "2")
    result("pg19.py --books: files", check_files(folder + "/pg19few", "train", in_order[:2]))
    server.files["/deepmind-gutenberg/test/8.txt"] = bytes(reversed(books["test/8.txt"]))
    refuses("md5 is", *pg19, folder + "/pg19bad")
    del server.files["/deepmind-gutenberg/test/8.txt"]
    refuses("HTTP 404", *pg19, folder + "/pg19bad")
    server.files["/deepmind-gutenberg/train/2.txt"] = threading.Event().wait # for ever
    del server.files["/deepmind-gutenberg/train/10.txt"]
    start = time.time()
    refuses("train/10.txt: HTTP 404", *pg19, folder + "/pg19slow")
    result("pg19.py: an error does not wait for other downloads", "" if time.time() - start < 30 else "it does")
    server.files = {path: b"<html>" if path.startswith("/storage") else data for path, data in server.files.items()}
    refuses("not a list of files", *pg19, folder + "/pg19bad")
    for base in "foo", "http://[x", "http://a b":
        refuses("not the address of a file", *pg19, folder + "/pg19bad", "--base", base)
    refuses("--books", *pg19, folder + "/pg19bad", "--books", "0")

    article = b" \n = Title = \n \n A <unk> word @-@ like this . \n \n"
    splits = {"train": article * 300, "validation": article * 20, "test": article * 30}
    listing = hugging_face(server, "wikitext-2-v1", splits)
    wikitext = ("data/wikitext.py", "2", "--tokenizer", "bytes", "--base", server.url, "--out")
    works("wikitext.py 2", *wikitext, folder + "/wikitext", expects=["words + lines 300, published 217,646"])
    result("wikitext.py 2: files", "".join(check_files(folder + "/wikitext", name, [splits[theirs]]) for name, theirs in
                                            (("train", "train"), ("valid", "validation"), ("test", "test"))))
    refuses("pip install", "-c", "import sys; sys.modules['pyarrow'] = None; sys.path.insert(0, 'data'); import "
            f"wikitext; sys.argv[1:] = {wikitext[1:] + (folder + '/nopyarrow',)}; wikitext.main_of(wikitext.main)")
    damaged = write(folder + "/wikitext/raw/train-00000-of-00001.parquet", b"PAR1")
    refuses(f"{damaged}: damaged: remove it", *wikitext, folder + "/wikitext")
    listing[-1]["lfs"]["oid"] = "0" * 64
    server.files[f"/api/datasets/Salesforce/wikitext/tree/{REVISION}/wikitext-2-v1"] = json.dumps(listing).encode()
    refuses("sha256 is", *wikitext, folder + "/wikitextbad")
    listing[-1]["lfs"]["size"] += 1
    server.files[f"/api/datasets/Salesforce/wikitext/tree/{REVISION}/wikitext-2-v1"] = json.dumps(listing).encode()
    refuses("expected", *wikitext, folder + "/wikitextbad")
    refuses("HTTP 404", "data/wikitext.py", "103", "--base", server.url, "--out", folder + "/wikitext103")

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", text[:100000])
    server.files["/enwik8.zip"] = buffer.getvalue()
    refuses("expected 36,445,475", "data/enwik8.py", "--base", server.url, "--out", folder + "/enwik8")
    damaged = write(folder + "/enwik8bad/raw/enwik8.zip", b"PK")
    refuses(f"{damaged}: damaged: remove it", "data/enwik8.py", "--out", folder + "/enwik8bad")
    enwik8.ZIP_SIZE, enwik8.ZIP_SHA256 = len(buffer.getvalue()), hashlib.sha256(buffer.getvalue()).hexdigest()
    enwik8.SPLITS = {"train": 90000, "valid": 5000, "test": 5000}
    sys.argv = ["enwik8.py", "--base", server.url, "--out", folder + "/enwik8"]
    enwik8.main()
    result("enwik8.py: files", check_files(folder + "/enwik8", "train", [text[:90000]]) + check_files(
        folder + "/enwik8", "valid", [text[90000:95000]]) + check_files(
        folder + "/enwik8", "test", [text[95000:100000]]))
    server.shutdown()
    refuses("interrupted; the same command goes on", "-c", "import sys; sys.path.insert(0, 'data'); import common, os, "
            "signal; signal.signal(signal.SIGINT, signal.default_int_handler); " # a shell's background ignores it
            "common.main_of(lambda: os.kill(os.getpid(), signal.SIGINT))")
    refuses("Connection refused", "-c", f"import sys; sys.path.insert(0, 'data'); import common; common.time.sleep = "
            f"lambda s: None; common.main_of(lambda: common.fetch('http://127.0.0.1:9/x'))")


def test_transformer(folder, text):
    script = "dev/transformer.py"
    small = ("--num-layers", "1", "--model-dim", "32", "--num-heads", "2", "--ffn-hidden-dim", "48", "--batch", "3",
             "--seq", "40", "--lr", "0.01", "--warmup", "5", "--val-every", "25")
    train = write(folder + "/a.txt", text[:30000]) + "," + write(folder + "/b1.txt", text[30000:34321])
    out = works("transformer.py", script, "--train", train, "--steps", "50", "--out", folder + "/run", *small,
                expects=["num_parameters: 16992", "tokens: 30888 to train on, 3433 held out", "step 50: val loss"])
    with open(folder + "/run/log.tsv") as f:
        rows = [line.rstrip("\n").split("\t") for line in f]
    head = "step tokens loss grad_norm lr tok_s ms val_loss".split()
    good = rows[0] == head and len(rows) == 51 and all(len(row) == 8 for row in rows) and \
        rows[50][:2] == ["50", "6000"] and [row[0] for row in rows[1:] if row[7]] == ["25", "50"]
    result("transformer.py: log.tsv", "" if good else str(rows[:2] + rows[-1:]))
    losses = [float(row[2]) for row in rows[1:]]
    result("transformer.py: learns", "" if 5 < losses[0] < 6 and losses[-1] < losses[0] - 1.5 else str(losses[::10]))

    # The same tokens as train_megalodon's: its read_step on two files of which a tenth is held out, with --eod argv[2].
    write(folder + "/sample.c", b'''#define TESTING
#include "train_megalodon.c"
int main(int argc, char** argv) {
    static Dataset d, held_out;
    Options o = default_options;
    int tokens[120], targets[120];
    bool fresh[3];
    o.batch = 3; o.seq = 40; o.eod = d.eod = atoi(argv[2]);
    dataset_open(&d, &held_out, "--train", argv[1], "");
    if (o.eod >= 0) { dataset_index(&d, 40, 256); }
    for (int step = 0; argc == 3 && step < 40; step++) {
        read_step(&o, &d, step, tokens, targets, fresh);
        for (int i = 0; i < 120; i++) { if (targets[i] != IGNORE) { printf("%d %d ", tokens[i], targets[i]); } }
    }
}
''')
    subprocess.run(["gcc", "-std=gnu11", "-w", "-I", ROOT, folder + "/sample.c", "-o", folder + "/sample", "-lm"],
                   check=True)
    program = ("import sys, types; sys.path.insert(0, 'dev'); import transformer as t\n"
               "o = types.SimpleNamespace(eod=int(sys.argv[2]), seq=40, vocab_size=256)\n"
               "d, h = t.open_data('', sys.argv[1], True, o)\n"
               "for step in range(40):\n"
               "    x, y = t.batch_of([d.sample(1337, step, row, 3, 40) for row in range(3)], 3, 40)\n"
               "    for pair in zip(x[y != -100], y[y != -100]): print(*pair, end=' ')\n")
    for eod in "-1", "10":
        theirs = subprocess.run([folder + "/sample", train, eod], capture_output=True, text=True, check=True).stdout
        ours = run("-c", program, train, eod)[1]
        result(f"transformer.py: batches are train_megalodon's, --eod {eod}", "" if ours == theirs and
               len(ours) > 10000 else f"{ours[:60]} but {theirs[:60]}")

    # Validation: every token but the first once, whatever the stride; a window of everything gives full context.
    check = """
import sys, types; sys.path.insert(0, 'dev')
import numpy, torch, transformer as t
o = types.SimpleNamespace(vocab_size=50, model_dim=16, num_heads=2, num_layers=1, ffn_hidden_dim=16, share_emb=0,
                          dropout=0.0, rope_base=1e4, norm_eps=1e-5, seq=8, batch=3, val_stride=0, eod=-1)
data = t.Dataset([numpy.random.default_rng(0).integers(0, 50, 30), numpy.arange(13)], -1, 8)
def targets(x, y): # in place of losses
    assert x.shape == y.shape == (3, 8)
    return y.float()
def places(x, y): # from how many tokens a target is predicted
    return torch.arange(1.0, 9.0).expand(3, 8)
tokens = data.read(0, 43).tolist()
for stride in (0, 1, 3, 8):
    o.val_stride = stride
    mean, losses = t.evaluate(targets, data, o, torch.device('cpu'))
    assert abs(mean - numpy.mean(tokens[1:])) < 1e-6 and losses[0].tolist() == tokens[1:], stride
    for at, n in enumerate(t.evaluate(places, data, o, torch.device('cpu'))[1][0]):
        assert n >= min(at + 1, 8 - (stride or 8) + 1)
o.val_stride = o.eod = 0 # each document from its start on; 30 tokens in all
documents = t.Dataset([numpy.array([3, 0, 4, 5, 0, 0] + [7] * 20), numpy.arange(13)], 0, 8)
assert [len(x) for x in t.evaluate(targets, documents, o, torch.device('cpu'))[1]] == [1, 2, 20, 12]
assert [len(x) for x in t.evaluate(targets, documents, o, torch.device('cpu'), 9)[1]] == [1, 2, 6]
torch.manual_seed(0)
model = t.Transformer(o).eval()
x = torch.randint(50, (2, 8))
y = x.roll(-1, 1)
y[:, 5:] = -100
z = x.clone()
z[:, 5:] = 7
assert abs(model(x, y) - model(z, y)).max() < 1e-5, 'the future is seen'
z[:, 2] = (z[:, 2] + 1) % 50
assert abs(model(x, y) - model(z, y)).max() > 1e-4
print('fine')
"""
    works("transformer.py: validation and causality", "-c", check, expects=["fine"])
    bins = folder + "/bin"
    works("text.py for the transformer", "data/text.py", folder + "/a.txt", "--val", folder + "/b1.txt", "--out", bins,
          "--tokenizer", "bytes")
    works("transformer.py on .bin", script, "--train", bins + "/train.bin", "--val", bins + "/valid.bin", "--eod", "0",
          "--vocab-size", "257", "--steps", "1", "--val-stride", "20", "--dropout", "0.1", *small, "--share-emb", "0",
          "--out", folder + "/bins")
    losses = folder + "/losses"
    works("transformer.py --eval, per word", script, "--load", folder + "/bins/model.safetensors", "--eval",
          bins + "/valid.bin", "--eod", "0", "--seq", "40", "--losses", losses,
          expects=["eval: tokens 4321", "perplexity per word", "words + lines"])
    found = os.path.getsize(losses), open(losses + ".documents").read()
    result("transformer.py --losses", "" if found == (4 * 4321, "4321\n") else str(found))
    refuses("expected --train FILE to train, or --load", script, "--eval", bins + "/valid.bin")
    refuses("no file is named", script, "--train", folder + "/none*.txt")
    refuses("vocab_size is 64", script, "--train", folder + "/a.txt", "--vocab-size", "64")
    refuses("at least 2 tokens", script, "--load", folder + "/bins/model.safetensors", "--eval",
            write(folder + "/one.txt", b"a"))
    write(folder + "/few.info", b"words x\n")
    write(folder + "/few.bin", open(bins + "/valid.bin", "rb").read())
    refuses('few.info: expected "vocab_size" and a number', script, "--train", folder + "/few.bin")
    refuses("not a text or a token file", script, "--train", write(folder + "/x.bin", b"nothing"))
    refuses("needs one more", script, "--train", folder + "/b1.txt", "--seq", "5000")
    refuses("--train", script)
    refuses("--steps 0", script, "--train", folder + "/a.txt", "--steps", "0")
    refuses("--model-dim 128", script, "--train", folder + "/a.txt", "--num-heads", "5")
    return folder + "/run"


def test_plots(folder, log):
    script, png = "dev/plot.py", folder + "/p.png"
    losses = folder + "/books.f32"
    numpy.random.default_rng(0).exponential(1, 70000).astype("<f4").tofile(losses)
    for name, more in (("loss", (log, log, "--names", "one", "other", "--title", "A title")),
                       ("loss", (log, "--by", "time")), ("context", (losses,)),
                       ("boundary", (losses, "--chunk", "300"))):
        works(f"plot.py {name} {' '.join(more[1:])[:20]}", script, name, *more, "-o", png)
        with open(png, "rb") as f:
            data = f.read()
        good = data[:4] == b"\x89PNG" and len(data) > 10000
        result(f"plot.py {name}: a picture", "" if good else f"{len(data)} bytes")
        os.remove(png)
    refuses("No such file", script, "loss", folder + "/nowhere", "-o", png)
    refuses("a folder, expected a file", script, "context", folder, "-o", png)
    refuses("not a log", script, "loss", log + "/../sample.c", "-o", png)
    refuses("no document has 80,000 losses", script, "boundary", losses, "--chunk", "40000", "-o", png)
    # With the borders of documents, positions count from each document's start, and no chunk crosses a border.
    program = ("import sys; sys.path.insert(0, 'dev'); import plot, numpy\n"
               "d = plot.read_losses(sys.argv[1]); print(list(map(len, d)), plot.bucket_means(d, [0, 2, 5])[0])")
    numpy.array([1, 2, 3, 5, 5, 7], "<f4").tofile(folder + "/few")
    write(folder + "/few.documents", b"2\n4\n")
    works("plot.py reads FILE.documents", "-c", program, folder + "/few", expects=["[2, 4] [2.75 6.  ]"])
    write(folder + "/few.documents", b"2\n5\n")
    refuses("expected numbers whose sum is 6", script, "context", folder + "/few", "-o", png)
    refuses("not a file of float32", script, "context", write(folder + "/odd", b"12345"), "-o", png)
    refuses("1 files, 2 names", script, "context", losses, "--names", "a", "b", "-o", png)
    refuses("p.what", script, "context", losses, "-o", folder + "/p.what")


def test_reference(folder):
    script, damaged = "dev/reference.py", write(folder + "/damaged", b"12345678901")
    with open(os.path.join(ROOT, "data/reference/one.safetensors"), "rb") as f:
        dump = write(folder + "/cut.safetensors", f.read()[:-1])
    refuses("No such file", script, "check", folder + "/nowhere")
    refuses("not a safetensors file", script, "check", damaged)
    refuses("not a safetensors file", script, "check", dump)
    refuses("not a .pth file", script, "convert", damaged, folder + "/out")
    refuses("a folder, expected a file", script, "convert", folder, folder + "/out")
    refuses("not a regular file", script, "eval", "/dev/null", damaged)
    refuses("invalid int value", script, "init", folder + "/out", "--num-layers", "x")
    refuses("pip install -r dev/requirements.txt", "-c", "import sys; sys.modules['safetensors'] = None; "
            "sys.path.insert(0, 'dev'); import reference")


def test_experiments():
    """The tables of the experiments, from the results that are kept."""
    for name, expected in (("wikitext2", "106.5516 | 100.7638"), ("books", "280.0049 | 258.7253"),
                           ("bytes", "0.002 | 1.1373"), ("gecko", "1.5388 | 1.5286"),
                           ("shakespeare", "1.5412 | 1.5462")):
        works(f"{name}.py --table", f"dev/experiments/{name}.py", "--table", f"dev/experiments/logs/{name}_results.tsv",
              expects=[expected])
    works("context.py table", "dev/experiments/context.py", "table", "dev/experiments/logs/context_transformer.tsv",
          expects=["| 16,384 | 4.8787"])
    works("search.py --help", "dev/experiments/search.py", "--help", expects=["--rows"])


def main():
    if len(sys.argv) > 1:
        if not sys.argv[1].endswith(".model") or len(sys.argv) == 2:
            sys.exit(__doc__)
        with open(sys.argv[1], "rb") as f:
            tokenizer = common.SentencePiece(f.read(), sys.argv[1])
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.write(folder)
            tok = Tok(folder + "/tokenizer.tok")
        for path in sys.argv[2:]:
            result(path, compare(tokenizer, tok, [path]))
    else:
        text = b""
        for path in ("train_megalodon.c", "README.md", "test_megalodon.c"):
            with open(os.path.join(ROOT, path), "rb") as f:
                text += f.read()
        for script in ("data/text.py", "data/pg19.py", "data/wikitext.py", "data/enwik8.py", "dev/transformer.py",
                       "dev/plot.py", "dev/block.py", "dev/reference.py"):
            works(f"{script} --help", script, "--help", expects=["usage: ", "options:"])
        with tempfile.TemporaryDirectory() as folder:
            new = lambda name: os.makedirs(f"{folder}/{name}") or f"{folder}/{name}"
            test_tokenizers(new("tokenizers/x"), write(folder + "/t.txt", text[:40000]),
                            write(folder + "/s.txt", STRANGE),
                            write(folder + "/long.txt", (2 * text).replace(b"\n", b" ")))
            test_settings(new("settings"), folder + "/t.txt")
            test_files(new("files"), text)
            test_text(new("text"), text)
            test_downloads(new("downloads"), text)
            test_plots(new("plots"), test_transformer(new("transformer"), text))
            test_reference(new("reference"))
            test_experiments()
    print(f"{passes} passed, {failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
