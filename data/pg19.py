#!/usr/bin/env python3
"""PG19: 28,752 books of Project Gutenberg published before 1919, from Google Cloud Storage. A book is a document.
Published perplexities are per word: 6,966,499 in the test split. 11 GB to download; --books 500 takes the first 500
books to train on, and the validation and test splits whole.

Papers on PG19 use T5's SentencePiece model (32,000 pieces): --tokenizer spiece.model, from google-t5/t5-small on
Hugging Face. It drops line ends and knows no braces, so it does not give the text back.

    data/pg19.py --books 500
    ./train_megalodon --train 'out/pg19/train*.bin' --val out/pg19/valid.bin
"""
import base64, concurrent.futures, json, os, urllib.parse

from common import Failure, download, fetch, main_of, parser_of, prepare, tqdm

BOOKS = {"train": 28_602, "valid": 50, "test": 100}
WORDS = {"train": 1_973_136_207, "valid": 3_007_061, "test": 6_966_499}
BUCKET = "deepmind-gutenberg"


def listing(base, prefix):
    """(name, size, md5) of the bucket's texts under prefix, in the order of their numbers."""
    found, token = [], None
    while token != "":
        query = {"prefix": prefix, "fields": "items(name,size,md5Hash),nextPageToken", "maxResults": 1000}
        query.update({"pageToken": token} if token else {})
        url = f"{base}/storage/v1/b/{BUCKET}/o?{urllib.parse.urlencode(query)}"
        try:
            page = json.loads(fetch(url))
            found += [(item["name"], int(item["size"]), base64.b64decode(item["md5Hash"]).hex())
                      for item in page.get("items", []) if item["name"].endswith(".txt")]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Failure(f"{url}: not a list of files") from None
        token = page.get("nextPageToken", "")
    return sorted(found, key=lambda file: (len(file[0]), file[0]))


def main():
    parser = parser_of(__doc__, "out/pg19", "unigram")
    parser.add_argument("--books", type=int, metavar="N", help="take only the first N books to train on (default all)")
    parser.add_argument("--connections", type=int, default=8, metavar="N", help="downloads at a time (default 8)")
    parser.add_argument("--base", default="https://storage.googleapis.com", metavar="URL",
                        help="where Cloud Storage is")
    options = parser.parse_args()
    if (options.books is not None and options.books < 1) or options.connections < 1:
        raise Failure("--books and --connections: expected a number of 1 or more")
    raw, paths = os.path.join(options.out, "raw"), {}
    for name, theirs in (("train", "train/"), ("valid", "validation/"), ("test", "test/")):
        files = listing(options.base, theirs)
        if len(files) != BOOKS[name]:
            print(f"note: {len(files):,} books in {theirs}, expected {BOOKS[name]:,}")
        if name == "train":
            files = files[:options.books]
        if not files:
            raise Failure(f"{options.base}: no books in {theirs}")
        paths[name] = [os.path.join(raw, path) for path, _, _ in files]
        total = sum(size for _, size, _ in files)
        pool = concurrent.futures.ThreadPoolExecutor(options.connections)
        with tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=None) as progress:
            work = {pool.submit(download, f"{options.base}/{BUCKET}/{path}", os.path.join(raw, path), size,
                                ("md5", md5), False): size for path, size, md5 in files}
            try:
                for done in concurrent.futures.as_completed(work):
                    done.result()
                    progress.update(work[done])
            finally: # an error or Ctrl-C does not wait for the other downloads; their parts are kept
                pool.shutdown(wait=False, cancel_futures=True)
    prepare(options.out, paths, options, {name: ("words", n) for name, n in WORDS.items()
                                          if name != "train" or options.books is None})


if __name__ == "__main__":
    main_of(main)
