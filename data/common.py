"""What the scripts of this folder share: downloads, tokenizers, and the files that train_megalodon reads.

From each split's texts (a file is a document) OUT/train.bin, valid.bin and test.bin are made, each with a sidecar:

NAME.bin   llm.c's format: 256 int32 (magic 20240520, version 1, number of tokens, zeros), then uint16 tokens; for
           ids of 65,536 and more magic 20240801, version 7 and uint32. Every document is followed by the
           end-of-document token. What passes 2^30 tokens goes on in NAME_1.bin, NAME_2.bin, ..., at a document's start.
NAME.info  lines "key value": words (separated by ASCII whitespace), lines (newlines) and bytes (UTF-8), all of the
           original text; documents; tokens (end-of-document tokens included); eod, its id; vocab_size; tokenizer,
           the .tok file's name in the same folder, and tokenizer_crc32, its CRC-32 in 8 hexadecimal digits, both absent
           for bytes; lossless, 0 where decoding changes the text.
           WikiText is reported per word and line end (perplexity = exp(nats / (words + lines))), PG19 per word.

Tokenizers: bytes (256 ids, the end of document is byte 0, which text does not hold), or a SentencePiece model, of which
OUT/tokenizer.tok holds all that encoding and decoding need. It is a text file; every line ends in a newline:

    megalodon.c tokenizer 1
    kind unigram                 or bpe
    pieces 32000                 number of ids
    eod 1                        id of the end of a document
    unknown 0                    id of what cannot be encoded; not used where there are byte pieces
    unknown_score -24.5          unigram: what a character that is no piece scores
    whitespace keep              or collapse: see below
    lossless 1
    rules 225276                 in version 2 only: the number of normalization rules
    n -3.7163 " the"             then one line per id: type, score, bytes
    "\\x0c" " "                   then one line per rule: bytes, what they become

Version 1 is written for a model without rules that keeps whitespace, version 2 for any other.

Types: n normal, u user-defined, b byte (one byte; all 256 or none), c control or unknown (no bytes; never found in
text), x unused (never found in text, but decoded). Scores are floats. In the bytes \\xHH is a byte below 0x20, ", \\,
0x7f, or one of a byte piece from 0x80 on; every other byte stands for itself. Decoding joins the bytes of the pieces.

Rules are the model's Unicode normalization. Each has at least one byte to replace, and may replace it by nothing. They
are sorted by these bytes, compared as unsigned numbers, and no two rules replace the same bytes.

Encoding. The text is cut after each newline, and lines are encoded one by one (a line's newline belongs to it): scores
are summed in float32, which a whole book would wear out. A character is 1 byte if its first is below 0xc0, 2 below
0xe0, 3 below 0xf0, else 4. With rules or `whitespace collapse` (T5's model has both), a line is first normalized:

1. With `collapse` the newline at the end of the line is dropped, and the result starts as one space, else as nothing.
2. The line is read part by part, from left to right. A part is the longest u piece that the rest of the line begins
   with; else the longest rule; else one byte. What a rule replaces it by, or else the part as it is, is appended to
   the result. With `collapse` the spaces that this begins with are left out if the result ends with a space.
3. With `collapse` the spaces at the end of the result are dropped.

In version 1 with `collapse`, tabs and carriage returns are spaces, and u pieces are no parts. So files that were
written before there was a version 2 mean what they did.

unigram: the best path over positions; all scores are floats and each sum is rounded to one. best[0] = 0, the others are
    unset. From each character's start s on, in order: for each n or u piece that the text from s begins with, shortest
    first, candidate = best[s] + score; if best[end] is unset or less than candidate, it becomes that, reached from s by
    this piece. If none of them was exactly the one character, the same for `unknown`, the character's length and
    unknown_score. Before that, if best[s] < -100000, best[s] is subtracted from it and all later ones that are set.
bpe: the symbols are characters; but the longest u piece at a position is one symbol, which never merges. As long as two
    neighbours joined are an n or u piece, those of the highest score are joined, the leftmost first. What is no piece
    in the end is `unknown`.
Last: an `unknown` becomes its bytes' byte pieces; without these, neighbouring ones become a single `unknown`.
"""
import contextlib, functools, glob, hashlib, http.client, io, os, random, re, shlex, sys, time, urllib.error
import urllib.request, zlib

try:
    import numpy
    from tqdm import tqdm
except ImportError as e:
    sys.exit(f"error: {' '.join(str(e).split())}: pip install -r data/requirements.txt")
# The scripts take some of these from here.
from base import Failure, Parser, contents_of, identity, main_of, naming, text_bytes, texts_in

SHARD = 1 << 30             # tokens in a .bin; its header counts in int32
TRAINING_TEXT = 100_000_000 # bytes that a tokenizer is trained on, at most
MAX_RULES, MAX_RULE_SIZE = 1 << 22, 1024 # of normalization, as in tokens.h


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

def open_url(url, start=0):
    headers = {"User-Agent": "megalodon.c (python-urllib)"} # some servers refuse urllib's own
    if start:
        headers["Range"] = f"bytes={start}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)


def retry(url, attempt, tries=6):
    """attempt() until it succeeds; what cannot get better fails at once."""
    for left in reversed(range(tries)):
        try:
            return attempt()
        except urllib.error.HTTPError as e:
            if left == 0 or (e.code < 500 and e.code not in (408, 429)):
                raise Failure(f"{url}: HTTP {e.code} {e.reason}") from None
        except (ValueError, http.client.InvalidURL) as e:
            raise Failure(f"{url}: not the address of a file: {e}") from None
        except (OSError, http.client.HTTPException) as e:
            if getattr(e, "filename", None) is not None: # a file here
                raise
            if left == 0:
                raise Failure(f"{url}: {getattr(e, 'reason', e)}") from None
        time.sleep(2 ** (tries - 1 - left))


def fetch(url):
    """The bytes at url: for short answers."""
    def attempt():
        with open_url(url) as answer:
            return answer.read()
    return retry(url, attempt)


def download(url, path, size=None, checksum=None, bar=True):
    """url to path, unless it is there. A part of it, left by an interrupted call as path.part, is continued.

    size in bytes and checksum, a pair ("sha256", hexadecimal digits), where they are known."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = path + ".part"

    def attempt():
        start = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            answer = open_url(url, start)
        except urllib.error.HTTPError as e:
            if e.code == 416: # nothing after `start`: the whole file, or more than that
                return
            raise
        with answer:
            resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            start = start if resumed else 0
            length = answer.headers.get("Content-Length")
            total = start + int(length) if length else size
            with open(part, "ab" if start else "wb") as f, \
                    tqdm(desc=os.path.basename(path), total=total, initial=start, unit="B", unit_scale=True,
                         disable=None if bar else True) as progress:
                while piece := answer.read(1 << 20):
                    with naming(part):
                        f.write(piece)
                        f.flush()
                    progress.update(len(piece))
                if total is not None and f.tell() < total:
                    raise OSError(f"the connection broke after {f.tell():,} of {total:,} bytes")

    retry(url, attempt)
    error = file_error(part, size, checksum)
    if error:
        os.remove(part)
        raise Failure(f"{url}: {error}; removed")
    os.replace(part, path)


def file_error(path, size, checksum):
    """What is wrong with a downloaded file, or None."""
    found = os.path.getsize(path)
    if size is not None and found != size:
        return f"{found:,} bytes, expected {size:,}"
    if checksum:
        digest = hashlib.new(checksum[0])
        with open(path, "rb") as f:
            while piece := f.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != checksum[1]:
            return f"{checksum[0]} is {digest.hexdigest()}, expected {checksum[1]}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

class Bytes:
    eod, vocab_size, tok, lossless = 0, 256, None, True

    def encode(self, data, path):
        if b"\0" in data:
            raise Failure(f"{path}: byte {data.index(0):,} is 0, which stands for the end of a document")
        return numpy.frombuffer(data, numpy.uint8)


def rules_of(charsmap):
    """The rules of a model's normalizer_spec.precompiled_charsmap: sorted pairs (bytes, what they become).

    The field holds the size of a trie, the trie, and texts that end with a zero byte. The trie is a Darts double array:
    units of 32 bits. A node has a base; its child for byte c is the unit at base ^ c, if the low byte of this unit is c
    and its highest bit is 0. The child's own base is this place ^ an offset: the bits from 10 on, times 256 if bit 9 is
    set. If bit 8 is set, the bytes up to here have a rule, and the unit at the child's base says where its text starts.
    Raises ValueError or IndexError if the field is damaged."""
    size, every_byte = int.from_bytes(charsmap[:4], "little"), numpy.arange(1, 256)
    units, texts = numpy.frombuffer(charsmap[4:4 + size], "<u4").astype(int), charsmap[4 + size:]

    def offset(unit):
        return unit >> 10 << (8 if unit & 1 << 9 else 0)

    @functools.cache # most nodes are reached in several ways
    def children(base):
        found = []
        for c in every_byte[units[base ^ every_byte] & 0x800000ff == every_byte].tolist():
            unit = int(units[base ^ c])
            child, text = base ^ c ^ offset(unit), None
            if unit & 1 << 8:
                start = int(units[child]) & 0x7fffffff
                text = texts[start:texts.index(b"\0", start)]
            found.append((bytes([c]), child, text))
        return found

    rules, nodes, visited = [], [(b"", offset(int(units[0])))] if charsmap else [], 0
    while nodes:
        before, base = nodes.pop()
        for byte, child, text in children(base):
            nodes.append((before + byte, child))
            if text is not None:
                rules.append((before + byte, text))
        visited += 1
        if len(before) >= MAX_RULE_SIZE or visited > MAX_RULES:
            raise ValueError # not a tree: a node may be its own descendant
    for rule in rules:
        rule[0].decode(), rule[1].decode() # raises a ValueError if one is not UTF-8
    return sorted(rules)


class SentencePiece:
    """A SentencePiece model, from its file's contents."""
    tok = "tokenizer.tok"

    def __init__(self, contents, source):
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(contents)
            known = any(piece.type == 1 for piece in model.pieces) and model.trainer_spec.model_type in (1, 2)
        except Exception:
            known = False
        if not known:
            raise Failure(f"{source}: not a SentencePiece model of kind unigram or bpe")
        normalizer, trainer = model.normalizer_spec, model.trainer_spec
        try:
            self.rules = rules_of(normalizer.precompiled_charsmap)
        except (IndexError, ValueError):
            raise Failure(f"{source}: precompiled_charsmap, the normalization rules, is damaged") from None
        self.bpe, self.collapse = trainer.model_type == 2, normalizer.remove_extra_whitespaces
        self.escaped = normalizer.escape_whitespaces
        user = [piece.piece for piece in model.pieces if piece.type == 4]
        if trainer.treat_whitespace_as_suffix:
            raise Failure(f"{source}: treat_whitespace_as_suffix, which a .tok cannot hold")
        if self.bpe and any(piece.type == 5 for piece in model.pieces):
            raise Failure(f"{source}: a bpe model with unused pieces, which a .tok cannot hold")
        # SentencePiece looks for user-defined pieces before it normalizes, when spaces in the text are not U+2581 yet,
        # so it does not find these pieces there. Where spaces are spaces it would.
        if any("\u2581" in piece or " " in piece for piece in user) and (self.rules or self.collapse):
            raise Failure(f"{source}: a user-defined piece with a space in a model that normalizes text")
        if self.escaped and any(" " in piece.piece for piece in model.pieces):
            raise Failure(f"{source}: a piece with a space that is not U+2581, which SentencePiece finds in no text")
        # Spaces are spaces, not U+2581, so that text which holds U+2581 comes back. What has whitespace of its own
        # needs no space added in front; where a line's is folded, words must not grow together across lines.
        if normalizer.add_dummy_prefix != self.collapse:
            print(f"note: {source}: no line gets a space in front, which SentencePiece adds" if not self.collapse else
                  f"note: {source}: each line gets a space in front, which SentencePiece does not add")
        if model.denormalizer_spec.precompiled_charsmap:
            print(f"note: {source}: denormalizer_spec is not used: samples are not changed as SentencePiece does")
        normalizer.escape_whitespaces = False
        normalizer.add_dummy_prefix = self.collapse
        for piece in model.pieces:
            if self.escaped and piece.type not in (2, 3, 6): # unknown, control, byte
                piece.piece = piece.piece.replace("\u2581", " ")
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(model.SerializeToString())
        except RuntimeError as e:
            raise Failure(f"{source}: {e}") from None
        self.vocab_size = len(model.pieces)
        ends = [self.processor.eos_id(), self.processor.bos_id(), self.processor.pad_id()]
        self.eod = next((i for i in ends if i >= 0), None)
        if self.eod is None:
            raise Failure(f"{source}: no end-of-sentence piece to end documents with")
        self.lost = ["line ends and runs of spaces"] * self.collapse \
            + ["what its normalization replaces"] * bool(self.rules) \
            + ["characters that are no piece"] * (not trainer.byte_fallback)
        self.lossless = not self.lost

    def encode(self, data, path):
        try:
            lines = data.decode("utf-8").split("\n")
        except UnicodeDecodeError as e:
            raise Failure(f"{path}: byte {e.start:,} is not UTF-8; only --tokenizer bytes takes that") from None
        if self.escaped and any("\u2581" in line for line in lines):
            print(f"note: {path}: U+2581 is a character of its own, not a space as SentencePiece has it")
            self.escaped = False # this is said once
        if not self.collapse:
            lines = [line + "\n" for line in lines[:-1]] + lines[-1:]
        ids = self.processor.encode(lines)
        return numpy.fromiter((i for line in ids for i in line), numpy.uint32, sum(map(len, ids)))

    def bytes_of(self, piece):
        if piece.type in (2, 3):
            return b""
        return bytes([int(piece.piece[3:5], 16)]) if piece.type == 6 else piece.piece.encode()

    def write(self, folder):
        """tokenizer.tok and tokenizer.model, from which it is made."""
        normal = [piece.score for piece in self.model.pieces if piece.type == 1]
        unknown = float(numpy.float32(min(normal)) - numpy.float32(10))
        head = {"kind": "bpe" if self.bpe else "unigram", "pieces": self.vocab_size, "eod": self.eod,
                "unknown": self.processor.unk_id(), "unknown_score": repr(unknown),
                "whitespace": "collapse" if self.collapse else "keep", "lossless": int(self.lossless)}
        version = 2 if self.rules or self.collapse else 1
        if version == 2:
            head["rules"] = len(self.rules)
        lines = [f"megalodon.c tokenizer {version}"] + [f"{key} {value}" for key, value in head.items()]
        text = [line.encode() for line in lines]

        def quoted(data, odd=rb'[\x00-\x1f"\\\x7f]'):
            return b'"%s"' % re.sub(odd, lambda found: b"\\x%02x" % ord(found[0]), data)

        for piece in self.model.pieces:
            data = self.bytes_of(piece)
            score = piece.score
            if piece.type == 4: # as SentencePiece has it: user-defined pieces always win
                score = score if self.bpe else float(numpy.float32(0.1 * (len(data) - 1)))
            text.append(b"%s %s %s" % (b"?nccuxb"[piece.type:piece.type + 1], repr(score).encode(),
                                       quoted(data, rb'[^ !#-\[\]-~]') if piece.type == 6 else quoted(data)))
        text += [quoted(before) + b" " + quoted(after) for before, after in self.rules]
        contents, path = b"\n".join(text) + b"\n", os.path.join(folder, self.tok)
        if os.path.exists(path) and file_crc32(path) != zlib.crc32(contents):
            print(f"note: {path} was another tokenizer: checkpoints that were trained with it need the old one")
        with replacing(path) as f:
            f.write(contents)
        with replacing(os.path.join(folder, "tokenizer.model")) as f:
            f.write(self.model.SerializeToString())


def file_crc32(path):
    return zlib.crc32(contents_of(path))


def train_sentencepiece(paths, kind, vocab_size):
    """A model of the texts that can write any text: nothing normalized, unknown characters as bytes. kind: "unigram" or
    "bpe".

    The trainer for unigram models draws its candidates from the different words, not from the text. In WikiText, which
    has few different words, it splits even frequent ones: " been" becomes " be" "en", 24% more tokens than with bpe."""
    import sentencepiece
    sizes, texts = sum(os.path.getsize(path) for path in paths), f"{paths[0]}{', ...' * (len(paths) > 1)}"
    if not any(text_bytes(path).strip() for path in paths):
        raise Failure(f"{texts}: nothing but spaces and ends of lines, on which no tokenizer can be trained")
    share, draw = TRAINING_TEXT / max(sizes, 1), random.Random(0)
    print(f"training a {kind} model of {vocab_size:,} pieces on {min(sizes, TRAINING_TEXT):,} bytes of text")

    def lines():
        for path in paths:
            try:
                text = text_bytes(path).decode()
            except UnicodeDecodeError as e:
                raise Failure(f"{path}: byte {e.start:,} is not UTF-8; only --tokenizer bytes takes that") from None
            for line in text.split("\n"):
                if share >= 1 or draw.random() < share:
                    line = line.replace("\0", " ")
                    for i in range(0, len(line), 8000): # the trainer leaves out what is too long
                        yield line[i:i + 8000]

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type=kind,
            vocab_size=max(vocab_size, 2), # for 1 it names no bound
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, byte_fallback=True, character_coverage=0.9999, split_digits=True,
            user_defined_symbols=["\n"], max_sentence_length=1 << 16, minloglevel=2,
            unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, unk_piece="<|unknown|>", eos_piece="<|endofdocument|>")
    except RuntimeError as e:
        said = " ".join(str(e).split("] ")[-1].split()) # without the place in SentencePiece's sources
        bound = re.search(r"(<=|required_chars\. \d+ vs) (\d+)", said)
        why = f"expected at {'most' if bound[1] == '<=' else 'least'} {int(bound[2]):,}" if bound else said
        raise Failure(f"--vocab-size {vocab_size:,}, trained on {texts}: {why}") from None
    return model.getvalue()


def tokenizer_of(name, vocab_size, train_paths):
    """What --tokenizer and --vocab-size ask for."""
    if vocab_size is not None and not 1 <= vocab_size < 1 << 31:
        raise Failure(f"--vocab-size {vocab_size}: expected a number from 1 to 2147483647")
    if name == "bytes":
        tokenizer = Bytes()
    elif name in ("unigram", "bpe"):
        tokenizer = SentencePiece(train_sentencepiece(train_paths, name, vocab_size or 32000), "the new model")
    else:
        tokenizer = SentencePiece(contents_of(name), name)
    if vocab_size and vocab_size != tokenizer.vocab_size:
        raise Failure(f"--vocab-size {vocab_size}: {name} has {tokenizer.vocab_size:,} tokens")
    if not tokenizer.lossless:
        print(f"note: {name} loses {', '.join(tokenizer.lost)}: perplexity per word is comparable, bits per byte are "
              "not those of the text")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Token files

@contextlib.contextmanager
def replacing(path):
    """A file to write that appears under its name once it is whole."""
    temporary = path + ".tmp"
    try:
        with naming(path), open(temporary, "wb") as f:
            yield f
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_split(out, name, paths, tokenizer):
    """Tokenizes the texts into OUT/NAME.bin and its .info (and NAME_1.bin, ...); the sums of their counts."""
    wide = tokenizer.vocab_size > 1 << 16
    sums, queue, shard = {}, list(reversed(paths)), 0
    progress = tqdm(desc=name, total=sum(map(os.path.getsize, paths)), unit="B", unit_scale=True, disable=None)
    pending = None # a document that did not fit
    while queue or pending:
        info = dict.fromkeys(("words", "lines", "bytes", "documents", "tokens"), 0)
        file = os.path.join(out, f"{name}_{shard}" if shard else name)
        with replacing(file + ".bin") as f:
            f.write(bytes(1024))
            while queue or pending:
                if not pending:
                    path = queue.pop()
                    data = text_bytes(path)
                    pending = data, tokenizer.encode(data, path)
                data, ids = pending
                if len(ids) >= 2 ** 31 - 1:
                    raise Failure(f"{path}: {len(ids):,} tokens in one document")
                if info["tokens"] and info["tokens"] + len(ids) + 1 > SHARD:
                    break
                f.write(numpy.append(ids, tokenizer.eod).astype("<u4" if wide else "<u2"))
                for key, value in (("words", len(data.split())), ("lines", data.count(b"\n")), ("bytes", len(data)),
                                   ("documents", 1), ("tokens", len(ids) + 1)):
                    info[key] += value
                progress.update(len(data))
                pending = None
            header = numpy.zeros(256, "<i4")
            header[:3] = (20240801, 7, info["tokens"]) if wide else (20240520, 1, info["tokens"])
            f.seek(0)
            f.write(header)
        for key, value in info.items():
            sums[key] = sums.get(key, 0) + value
        crc32 = f"{file_crc32(os.path.join(out, tokenizer.tok)):08x}" if tokenizer.tok else None
        info.update({"eod": tokenizer.eod, "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.tok,
                     "tokenizer_crc32": crc32, "lossless": int(tokenizer.lossless)})
        with replacing(file + ".info") as f:
            f.write("".join(f"{key} {value}\n" for key, value in info.items() if value is not None).encode())
        shard += 1
    progress.close()
    old = [path for path in glob.glob(os.path.join(glob.escape(out), f"{name}_*.bin"))
           if re.fullmatch(r"[1-9]\d*", os.path.basename(path)[len(name) + 1:-4])
           and int(os.path.basename(path)[len(name) + 1:-4]) >= shard]
    for path in sorted(old): # of a larger text, by an earlier call
        print(f"note: {path} is removed: it belonged to a larger {name} split")
        os.remove(path)
        with contextlib.suppress(FileNotFoundError):
            os.remove(path[:-4] + ".info")
    return sums


def prepare(out, splits, options, published=None):
    """splits, {name: paths of texts}, to token files in `out`. published: {name: (what is counted, the number)}, the
    counting being "words" or "words + lines"."""
    for name, paths in splits.items():
        for path in paths:
            if os.path.getsize(path) == 0:
                raise Failure(f"{path}: empty")
    os.makedirs(out, exist_ok=True)
    tokenizer = tokenizer_of(options.tokenizer, options.vocab_size, splits["train"])
    if tokenizer.tok:
        tokenizer.write(out)
    for name, paths in splits.items():
        n = write_split(out, name, paths, tokenizer)
        print(f"{name}: {n['documents']:,} documents, {n['lines']:,} lines, {n['words']:,} words, {n['bytes']:,} bytes:"
              f" {n['tokens']:,} tokens of {n['bytes'] / n['tokens']:.2f} bytes, {n['words'] / n['tokens']:.3f} words")
        if published and name in published:
            key, number = published[name]
            found = n["words"] + n["lines"] if key == "words + lines" else n[key]
            print(f"{name}: {key} {found:,}, published {number:,}" + ("" if found == number else ": NOT THE SAME"))
    for name in {"valid", "test"} - set(splits):
        if os.path.exists(os.path.join(out, name + ".bin")):
            print(f"note: {os.path.join(out, name)}.bin is of an earlier call")
    train = os.path.join(out, "train.bin")
    if os.path.exists(os.path.join(out, "train_1.bin")): # a pattern, in which the folder's name stands for itself
        train = os.path.join(glob.escape(out.replace("\\", "\\\\")).replace(",", "?"), "train*.bin")
    command = ["./train_megalodon", "--train", train]
    if "valid" in splits:
        command += ["--val", os.path.join(out, "valid.bin")]
    print(f"written to {out}; to train on it: {shlex.join(command)}")


def parser_of(description, out, tokenizer):
    """The flags all scripts have."""
    parser = Parser(description)
    parser.add_argument("--out", default=out, required=out is None, metavar="DIR",
                        help="folder to write to" + (f" (default {out})" if out else ""))
    parser.add_argument("--tokenizer", default=tokenizer, metavar="bytes|unigram|bpe|FILE.model",
                        help="bytes; the kind of a SentencePiece model to be trained on the training texts; or the "
                             f"file of a model (default {tokenizer})")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="pieces of a model to be trained (default 32000)")
    return parser
