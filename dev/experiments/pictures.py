#!/usr/bin/env python3
"""The pictures of the READMEs, from the logs of books.py and the tables of context.py: dev/experiments/pictures.py"""
import csv, os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from runs import read_table

HERE = os.path.dirname(os.path.abspath(__file__))
LOGS, PICTURES = os.path.join(HERE, "logs"), os.path.join(HERE, "..", "pictures")
CURVES = [("megalodon_plain", "Megalodon", "#1f5fa8"), ("megalodon_carry", "Megalodon, states carried", "#2a9d63"),
          ("gecko_plain", "Gecko", "#b5651d"), ("transformer_plain", "Transformer", "#d1495b")]
CONTEXTS = [("megalodon_plain", "Megalodon", "#1f5fa8"), ("megalodon_carry", "Megalodon, states carried", "#2a9d63"),
            ("megalodon_32k-carry", "Megalodon, sequences of 32K, carried", "#7a4fa3"),
            ("gecko_plain", "Gecko", "#b5651d"), ("gecko_carry", "Gecko, states carried", "#e0a458"),
            ("transformer", "Transformer", "#d1495b")]
BOUNDARIES = [("plain", "Megalodon, chunks of 1,024", "#1f5fa8", "-"), ("chunk256", "Megalodon, 256", "#1f5fa8", "--"),
              ("gecko_plain", "Gecko, 1,024", "#b5651d", "-"), ("gecko_chunk256", "Gecko, 256", "#b5651d", "--")]


def figure(name, draw):
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
                         "legend.frameon": False})
    drawing, axes = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    draw(axes)
    axes.legend(fontsize=9)
    drawing.savefig(os.path.join(PICTURES, name), dpi=140)


def draw_books(axes):
    logs = read_table(os.path.join(LOGS, "books_logs.tsv"))
    for name, label, color in CURVES:
        run = next(run for run in logs if run.startswith(name) and float(logs[run][-1]["tokens"]) > 3e7)
        axes.plot([float(row["tokens"]) / 1e6 for row in logs[run]], [float(row["loss"]) for row in logs[run]],
                  color=color, linewidth=0.8, alpha=0.5)
        points = [row for row in logs[run] if row["val_loss"]]
        axes.plot([float(row["tokens"]) / 1e6 for row in points], [float(row["val_loss"]) for row in points], "o--",
                  color=color, markersize=4, label=f"{label}: {float(points[-1]['val_loss']):.3f}")
    axes.set_ylim(3.6, 6)
    axes.set_xlabel("million tokens of books, each read once")
    axes.set_ylabel("nats per token; points: validation")


def draw_contexts(axes):
    for name, label, color in CONTEXTS:
        with open(os.path.join(LOGS, f"context_{name}.tsv"), newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
        axes.errorbar([int(row["context"]) for row in rows], [float(row["loss"]) for row in rows],
                      [float(row["error"]) for row in rows], fmt="o-", color=color, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K")
    axes.set_ylim(3.9, 5.0)
    axes.set_xlabel("tokens of the book before the 1,024 targets")
    axes.set_ylabel("nats per token")


def draw_boundaries(axes):
    for name, label, color, line in BOUNDARIES:
        with open(os.path.join(LOGS, f"boundary_{name}.tsv"), newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
        axes.errorbar([int(row["position"]) + 1 for row in rows], [float(row["loss"]) for row in rows],
                      [float(row["error"]) for row in rows], fmt="o" + line, color=color, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("token of the chunk (each point: up to the next one)")
    axes.set_ylabel("nats per token, test books")


figure("books.png", draw_books)
figure("context.png", draw_contexts)
figure("boundary.png", draw_boundaries)
