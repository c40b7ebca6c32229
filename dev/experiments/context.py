#!/usr/bin/env python3
"""What a longer past is worth, as in the paper's Figure 5: the same target tokens, predicted after contexts of
different lengths. And the loss by position in a chunk.

    dev/experiments/context.py make out/context.bin out/books/test.bin out/books/valid.bin --longest 131072
    ./train_megalodon_cuda --load W --eval out/context.bin --eod 1 --losses out/megalodon.f32
    dev/experiments/context.py means megalodon.tsv out/megalodon.f32
    dev/experiments/context.py table megalodon.tsv ...
    dev/experiments/context.py memory W          half-lives of CEMA's oscillators
    dev/experiments/context.py boundary boundary.tsv test.f32 --chunk 1024       from --eval test.bin --losses test.f32

`make` draws places in the books that have `longest` tokens before them. For each place and each context c (at most
--up-to) it writes a document: the c tokens before the place, and the 1,024 targets. So the model reads the targets
after c to c + 1,023 tokens. The error is the standard error of the difference from a context of 1,024. For it a place
counts as one observation: the losses of one place are not independent."""
import argparse, csv, os, sys

import numpy

TARGETS, SHORTEST = 1024, 256


def read_tokens(path):
    head = numpy.fromfile(path, "<i4", 256)
    return numpy.fromfile(path, "<u2" if head[0] == 20240520 else "<u4", offset=1024)


def contexts_of(last):
    """0.25K, 1K, 2K, 4K, ... last"""
    return [SHORTEST] + [1 << i for i in range(10, last.bit_length())]


def make(options):
    """Documents in the order of places, and of contexts in each."""
    contexts, places = contexts_of(min(options.up_to or options.longest, options.longest)), []
    for path in options.tokens:
        tokens = read_tokens(path)
        starts = numpy.concatenate(([0], numpy.flatnonzero(tokens == options.eod) + 1))
        for begin, end in zip(starts, starts[1:]):
            book = tokens[begin:end - 1]
            places += [(book, at) for at in range(options.longest, len(book) - TARGETS, TARGETS)]
    if not places:
        sys.exit(f"error: no book has {options.longest + TARGETS:,} tokens")
    chosen = numpy.linspace(0, len(places) - 1, min(options.places, len(places))).round().astype(int)
    parts = [part for i in chosen for c in contexts
             for part in (places[i][0][places[i][1] - c:places[i][1] + TARGETS], [options.eod])]
    tokens = numpy.concatenate(parts).astype(places[0][0].dtype)
    header = numpy.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(tokens)) if tokens.itemsize == 2 else (20240801, 7, len(tokens))
    with open(options.out, "wb") as f:
        f.write(header.tobytes() + tokens.tobytes())
    print(f"{len(chosen)} places of {len(places)}, {len(contexts)} contexts, {len(tokens):,} tokens")


def means(options):
    """Mean loss of the targets after each context, from the losses of the documents that make() wrote."""
    losses = numpy.fromfile(options.losses, "<f4")
    sizes = numpy.loadtxt(options.losses + ".documents", dtype=int)
    contexts = contexts_of(int(sizes.max()) - TARGETS)
    if losses.size != sizes.sum() or sizes.size % len(contexts):
        sys.exit(f"error: {options.losses} is not of a file that `make` wrote")
    ends = numpy.cumsum(sizes).reshape(-1, len(contexts))
    table = numpy.array([[losses[end - TARGETS:end].mean() for end in row] for row in ends], float)
    difference = table - table[:, 1:2]
    error = difference.std(0, ddof=1) / len(table) ** 0.5
    with open(options.out, "w", newline="") as f:
        writer = csv.writer(f, delimiter="\t", lineterminator="\n")
        writer.writerow(["context", "loss", "error", "places"])
        for row in zip(contexts, table.mean(0), error):
            writer.writerow([row[0], f"{row[1]:.5f}", f"{row[2]:.5f}", len(table)])


def table(options):
    columns = []
    for path in options.means:
        with open(path, newline="") as f:
            columns.append({int(row["context"]): row for row in csv.DictReader(f, delimiter="\t")})
    names = [os.path.splitext(os.path.basename(path))[0].replace("context_", "") for path in options.means]
    print("| context | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for c in sorted(set().union(*columns)):
        cells = (f"{float(x[c]['loss']):.4f} ± {float(x[c]['error']):.4f}" if c in x else "" for x in columns)
        print(f"| {c:,} | " + " | ".join(cells) + " |")


def memory(options):
    """Tokens after which half of what entered an oscillator is left: radius^n = 1/2, where the radius is
    1 - sigmoid(alpha) sigmoid(delta)."""
    from safetensors.numpy import load_file
    for path in options.weights:
        tensors, lives = load_file(path), []
        for name in tensors:
            if name.endswith("cema.alpha") and not name.startswith("adam"):
                p, d = (1 / (1 + numpy.exp(-tensors[name[:-5] + part].astype(float))) for part in ("alpha", "delta"))
                lives.append(numpy.log(0.5) / numpy.log1p(-p * d))
        lives = numpy.concatenate([x.ravel() for x in lives])
        print(f"{path}: half-lives of {lives.size:,} oscillators in tokens: " + ", ".join(
            f"{q:g}%: {numpy.percentile(lives, q):.1f}" for q in (50, 90, 99, 99.9, 100)))


def boundary(options):
    """Mean loss by position in the chunk, in ranges that double, over all chunks but the first of each document."""
    losses = numpy.fromfile(options.losses, "<f4")
    sizes = numpy.loadtxt(options.losses + ".documents", dtype=int, ndmin=1)
    chunks = []
    for document in numpy.split(losses, numpy.cumsum(sizes)[:-1]):
        whole = len(document) // options.chunk
        chunks.append(document[:whole * options.chunk].reshape(whole, options.chunk)[1:])
    chunks = numpy.concatenate(chunks).astype(float)
    edges = [0] + [1 << i for i in range(options.chunk.bit_length())]
    with open(options.out, "w", newline="") as f:
        writer = csv.writer(f, delimiter="\t", lineterminator="\n")
        writer.writerow(["position", "loss", "error", "chunks"])
        for a, b in zip(edges, edges[1:]):
            part = chunks[:, a:b].mean(1)
            writer.writerow([a, f"{part.mean():.5f}", f"{part.std(ddof=1) / len(part) ** 0.5:.5f}", len(part)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("make")
    one.set_defaults(call=make)
    one.add_argument("out")
    one.add_argument("tokens", nargs="+")
    one.add_argument("--longest", type=int, default=131072)
    one.add_argument("--up-to", type=int, default=0, help="the longest context in the file; 0 for --longest")
    one.add_argument("--places", type=int, default=100)
    one.add_argument("--eod", type=int, default=1)
    one = commands.add_parser("means")
    one.set_defaults(call=means)
    one.add_argument("out")
    one.add_argument("losses")
    one = commands.add_parser("table")
    one.set_defaults(call=table)
    one.add_argument("means", nargs="+")
    one = commands.add_parser("memory")
    one.set_defaults(call=memory)
    one.add_argument("weights", nargs="+")
    one = commands.add_parser("boundary")
    one.set_defaults(call=boundary)
    one.add_argument("out")
    one.add_argument("losses")
    one.add_argument("--chunk", type=int, required=True)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
