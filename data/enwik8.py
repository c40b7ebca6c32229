#!/usr/bin/env python3
"""enwik8: the first 10^8 bytes of the English Wikipedia's XML of March 2006, split as is usual into the first 90, the
next 5 and the last 5 million. Results are bits per byte ("per character" in papers). 36 MB to download.

    data/enwik8.py
    ./train_megalodon --train out/enwik8/train.bin --val out/enwik8/valid.bin
"""
import os, zipfile, zlib

from common import Failure, download, main_of, parser_of, prepare, replacing

ZIP_SIZE = 36_445_475
ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
SPLITS = {"train": 90_000_000, "valid": 5_000_000, "test": 5_000_000}


def main():
    parser = parser_of(__doc__, "out/enwik8", "bytes")
    parser.add_argument("--base", default="http://mattmahoney.net/dc", metavar="URL", help="where enwik8.zip is")
    options = parser.parse_args()
    raw = os.path.join(options.out, "raw")
    path = os.path.join(raw, "enwik8.zip")
    download(options.base + "/enwik8.zip", path, ZIP_SIZE, ("sha256", ZIP_SHA256))
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("enwik8")
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error):
        raise Failure(f"{path}: damaged: remove it, and the same command downloads it again") from None
    if len(text) != sum(SPLITS.values()):
        raise Failure(f"{path}: {len(text):,} bytes of text, expected {sum(SPLITS.values()):,}")
    paths, start = {}, 0
    for name, size in SPLITS.items():
        paths[name] = [os.path.join(raw, name + ".txt")]
        with replacing(paths[name][0]) as f:
            f.write(text[start:start + size])
        start += size
    prepare(options.out, paths, options, {name: ("bytes", size) for name, size in SPLITS.items()})


if __name__ == "__main__":
    main_of(main)
