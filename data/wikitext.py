#!/usr/bin/env python3
"""WikiText-2 or WikiText-103 from Hugging Face: words apart, rare ones <unk>. A split is one document. Published
perplexities count words and line ends: 217,646 in the validation split, 245,569 in the test split, the same articles in
both sizes. Needs pyarrow. 5 or 300 MB to download.

    data/wikitext.py 2
    ./train_megalodon --train out/wikitext2/train.bin --val out/wikitext2/valid.bin
"""
import json, os

from common import Failure, download, fetch, main_of, parser_of, prepare, replacing

REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
COUNTS = {"2": {"train": 2_088_628, "valid": 217_646, "test": 245_569},
          "103": {"train": 103_227_021, "valid": 217_646, "test": 245_569}} # words + lines


def texts_of(parquet):
    """The original text, in parts: a row is a line; blank lines, one space in the original, are stored empty."""
    import pyarrow.parquet
    try:
        for batch in pyarrow.parquet.ParquetFile(parquet).iter_batches(columns=["text"]):
            yield "".join(line or " \n" for line in batch.column(0).to_pylist()).encode()
    except (pyarrow.ArrowException, OSError, IndexError):
        raise Failure(f"{parquet}: damaged: remove it, and the same command downloads it again") from None


def main():
    parser = parser_of(__doc__, None, "bpe")
    parser.add_argument("size", choices=sorted(COUNTS), help="which of the two")
    parser.add_argument("--raw", action="store_true", help="without <unk>: not what results are published for")
    parser.add_argument("--base", default="https://huggingface.co", metavar="URL", help="where Hugging Face is")
    for action in parser._actions: # one folder per size
        if action.dest == "out":
            action.required, action.help = False, "folder to write to (default out/wikitext2 or out/wikitext103)"
    options = parser.parse_args()
    options.out = options.out or f"out/wikitext{options.size}{'raw' if options.raw else ''}"
    folder = f"wikitext-{options.size}{'-raw' if options.raw else ''}-v1"
    listing = f"{options.base}/api/datasets/Salesforce/wikitext/tree/{REVISION}/{folder}"
    try:
        files = [(f["path"], f["lfs"]["size"], f["lfs"]["oid"]) for f in json.loads(fetch(listing)) if "lfs" in f]
    except (ValueError, KeyError, TypeError):
        raise Failure(f"{listing}: not a list of files") from None
    raw, paths = os.path.join(options.out, "raw"), {}
    for name, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        parquets = []
        for path, size, sha256 in sorted(f for f in files if os.path.basename(f[0]).startswith(theirs + "-")):
            parquets.append(os.path.join(raw, os.path.basename(path)))
            download(f"{options.base}/datasets/Salesforce/wikitext/resolve/{REVISION}/{path}", parquets[-1], size,
                     ("sha256", sha256))
        if not parquets:
            raise Failure(f"{listing}: no file of the {theirs} split")
        paths[name] = [os.path.join(raw, name + ".txt")]
        with replacing(paths[name][0]) as f:
            for parquet in parquets:
                f.writelines(texts_of(parquet))
    prepare(options.out, paths, options, {name: ("words + lines", n) for name, n in COUNTS[options.size].items()})


if __name__ == "__main__":
    main_of(main)
