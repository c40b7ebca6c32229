#!/usr/bin/env python3
"""Pictures of what train_megalodon and dev/transformer.py measure. Needs matplotlib.

    dev/plot.py loss runs/megalodon runs/transformer -o loss.png             folders with log.tsv; --by time for minutes
    dev/plot.py context books.f32 -o context.png                             what --eval F --losses books.f32 wrote
    dev/plot.py boundary books.f32 --chunk 2048 -o boundary.png
"""
import csv, math, os, sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data"))
from base import Failure, Parser, main_of, regular

try:
    import matplotlib
    import numpy
except ImportError as e:
    sys.exit(f"error: {e}: pip install -r dev/requirements.txt")

COLORS = ["#1f5fa8", "#d1495b", "#2a9d63", "#e08e1b", "#7a4fa3", "#4d4d4d"]


def read_log(folder):
    """Columns of DIR/log.tsv as arrays; nan where a field is empty."""
    path = os.path.join(folder, "log.tsv") if os.path.isdir(folder) else folder
    with open(regular(path), newline="", errors="replace") as f:
        lines = f.read().split("\n")
    rows = list(csv.DictReader(lines[:-1], delimiter="\t")) # a line without an end is still being written
    try:
        log = {key: numpy.array([float(row[key] or "nan") for row in rows])
               for key in ("step", "tokens", "loss", "ms", "val_loss")}
    except (KeyError, ValueError, TypeError):
        raise Failure(f"{path}: not a log.tsv of train_megalodon or dev/transformer.py") from None
    if not rows:
        raise Failure(f"{path}: no steps in it")
    return log


def read_losses(path):
    """The losses of each document: what `--losses path` wrote, cut where path.documents says."""
    if os.path.getsize(regular(path)) % 4:
        raise Failure(f"{path}: not a file of float32 numbers")
    losses, borders = numpy.fromfile(path, "<f4").astype(float), path + ".documents"
    if not numpy.isfinite(losses).all():
        raise Failure(f"{path}: loss {numpy.flatnonzero(~numpy.isfinite(losses))[0]:,} is not finite")
    if not os.path.exists(borders):
        print(f"note: there is no {borders}: all losses count as one document")
        return [losses]
    with open(regular(borders), errors="replace") as f:
        words = f.read().split()
    sizes = [int(word) if word.isdecimal() else -1 for word in words]
    if min(sizes, default=-1) < 0 or sum(sizes) != len(losses):
        raise Failure(f"{borders}: expected numbers whose sum is {len(losses):,}, the number of losses in {path}")
    return numpy.split(losses, numpy.cumsum(sizes)[:-1])


def smooth(y):
    """Mean over the nearest 2% of the steps, fewer at the ends."""
    half = len(y) // 100
    sums = numpy.concatenate(([0.0], numpy.cumsum(y)))
    i = numpy.arange(len(y))
    low, high = numpy.maximum(i - half, 0), numpy.minimum(i + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def bucket_means(documents, edges):
    """Mean loss at positions between neighbouring edges, and its standard error as if tokens were independent."""
    parts = [numpy.concatenate([losses[a:b] for losses in documents]) for a, b in zip(edges, edges[1:])]
    return numpy.array([p.mean() for p in parts]), numpy.array([p.std() / math.sqrt(len(p)) for p in parts])


def plot_loss(axes, options, names):
    top = 0
    for path, name, color in zip(options.files, names, COLORS):
        log = read_log(path)
        x = log["tokens"] / 1e6 if options.by == "tokens" else numpy.cumsum(log["ms"]) / 6e4
        line = smooth(log["loss"])
        measured = numpy.isfinite(log["val_loss"])
        last = f" (validation {log['val_loss'][measured][-1]:.4f})" if measured.any() else ""
        axes.plot(x, log["loss"], color=color, alpha=0.15, linewidth=0.6)
        axes.plot(x, line, color=color, linewidth=1.6, label=name + last)
        axes.plot(x[measured], log["val_loss"][measured], "o--", color=color, markersize=4, linewidth=1)
        top = max(top, line[len(line) // 20])
    low = min(line.get_ydata().min() for line in axes.lines if len(line.get_ydata()))
    axes.set_ylim(low - 0.05 * (top - low), top + 0.15 * (top - low) or None) # the first steps stand out of the picture
    axes.set_xlabel("million tokens" if options.by == "tokens" else "minutes of training")
    axes.set_ylabel("loss (nats per token): line training, points validation")


def plot_context(axes, options, names):
    for path, name, color in zip(options.files, names, COLORS):
        documents = read_losses(path)
        longest = max(map(len, documents))
        if longest < 2048:
            raise Failure(f"{path}: the longest document has {longest:,} losses, 2,048 are needed")
        edges = [0] + [1024 << i for i in range(64) if 1024 << i < longest * 2 // 3] + [longest]
        mean, error = bucket_means(documents, edges)
        axes.fill_between(edges[1:], mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        axes.plot(edges[1:], mean, "o-", color=color, markersize=5, linewidth=1.6, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 2 ** 20:g}M" if x >= 2 ** 20 else f"{x / 1024:g}K")
    axes.set_xlabel("position in the document: mean from the point to the left up to this one")
    axes.set_ylabel("loss (nats per token)")
    right = axes.secondary_yaxis("right", functions=(numpy.exp, lambda y: numpy.log(numpy.maximum(y, 1e-9))))
    right.set_ylabel("perplexity per token")


def plot_boundary(axes, options, names):
    c = options.chunk
    edges = numpy.unique(numpy.geomspace(1, c + 1, 48).round().astype(int)) - 1 # single positions first, then wider
    for path, name, color in zip(options.files, names, COLORS):
        # Whole chunks of each document; the first one has no past.
        chunks = numpy.concatenate([losses[c:len(losses) // c * c].reshape(-1, c) for losses in read_losses(path)
                                    if len(losses) >= 2 * c] or [numpy.empty((0, c))])
        if not len(chunks):
            raise Failure(f"{path}: no document has {2 * c:,} losses, two chunks of --chunk {c}")
        by_position = chunks.mean(0)
        mean = [by_position[a:b].mean() for a, b in zip(edges, edges[1:])]
        axes.plot([(a + 1 + b) / 2 for a, b in zip(edges, edges[1:])], mean, "o-", color=color, markersize=3,
                  linewidth=1.4, label=name)
        axes.axhline(by_position.mean(), color=color, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel(f"position in the chunk of {c:,} tokens, from 1")
    axes.set_ylabel("loss (nats per token); dotted: mean")


def main():
    parser = Parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, draw, text in (("loss", plot_loss, "loss of runs against tokens or time"),
                             ("context", plot_context, "mean loss against the position in a long text"),
                             ("boundary", plot_boundary, "mean loss against the position in a chunk")):
        sub = kinds.add_parser(kind, help=text, description=text)
        sub.add_argument("files", nargs="+", metavar="RUN" if kind == "loss" else "LOSSES")
        sub.add_argument("-o", "--out", required=True, help="picture to write: .png, .svg or .pdf")
        sub.add_argument("--names", nargs="+", help="what to call them (default: their file names)")
        sub.add_argument("--title")
        if kind == "loss":
            sub.add_argument("--by", choices=("tokens", "time"), default="tokens")
        if kind == "boundary":
            sub.add_argument("--chunk", type=int, required=True, help="tokens in a chunk")
        sub.set_defaults(draw=draw)
    options = parser.parse_args()
    names = options.names or [os.path.splitext(os.path.basename(os.path.normpath(path)))[0] for path in options.files]
    if len(names) != len(options.files) or len(names) > len(COLORS):
        raise Failure(f"{len(options.files)} files, {len(names)} names: expected as many, and at most {len(COLORS)}")
    if getattr(options, "chunk", 1) < 1:
        raise Failure(f"--chunk {options.chunk}: expected a number of 1 or more")
    if not options.out.endswith((".png", ".svg", ".pdf")):
        raise Failure(f"--out {options.out}: expected a name that ends in .png, .svg or .pdf")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
                         "legend.frameon": False})
    figure, axes = plt.subplots(figsize=(7.2, 4.2), constrained_layout=True)
    options.draw(axes, options, names)
    axes.legend()
    if options.title:
        axes.set_title(options.title, loc="left", fontweight="bold")
    figure.savefig(options.out, dpi=160)


if __name__ == "__main__":
    main_of(main, "dev")
