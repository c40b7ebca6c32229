#!/usr/bin/env python3
"""Turns texts of your own into the token files that train_megalodon reads. A file is a document.

    data/text.py books --out out/books                     a folder with train/, valid/ and test/ in it
    data/text.py 'novels/*.txt' --val late.txt --out out/novels --vocab-size 8192
    ./train_megalodon --train out/books/train.bin --val out/books/valid.bin
"""
import os

from common import Failure, identity, main_of, parser_of, prepare, texts_in


def main():
    parser = parser_of(__doc__, None, "unigram")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="training texts: files, patterns, folders of *.txt; "
                        "or one folder that holds the folders train, valid and test")
    parser.add_argument("--val", nargs="+", metavar="TEXT", help="validation texts (without them the training program "
                        "holds out the last 10%%)")
    parser.add_argument("--test", nargs="+", metavar="TEXT", help="test texts")
    options = parser.parse_args()
    names = {"train": options.texts, "valid": options.val, "test": options.test}
    top = options.texts[0]
    if os.path.isdir(os.path.join(top, "train")):
        if len(options.texts) > 1:
            raise Failure(f"{top} holds train/: give no other training texts")
        for name, given in (("train", None), ("valid", options.val), ("test", options.test)):
            inside = os.path.join(top, name)
            names[name] = given or ([inside] if os.path.isdir(inside) else None)
    splits = {name: texts_in(given) for name, given in names.items() if given}
    train = set(map(identity, splits["train"]))
    for name in ("valid", "test"):
        for path in splits.get(name, []):
            if identity(path) in train:
                print(f"note: {path} is in train and in {name}: its loss will be too good")
    prepare(options.out, splits, options)


if __name__ == "__main__":
    main_of(main)
