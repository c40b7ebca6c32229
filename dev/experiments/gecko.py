#!/usr/bin/env python3
"""From Megalodon to Gecko, one change at a time: what is each worth? On tiny Shakespeare, or on books.

    make gecko && dev/experiments/gecko.py input.txt --out out/gecko          all runs, then the table
    dev/experiments/gecko.py --table dev/experiments/logs/gecko_results.tsv
    dev/experiments/gecko.py out/books --out out/gecko-books                  with the tokens of books.py, on GPUs
    dev/experiments/gecko.py --table dev/experiments/logs/gecko-books_results.tsv

The README's command for CPUs (797,696 parameters, 2,000 steps of 3 x 256 bytes), with chunks of 64, so that a sequence
has four. With Gecko's window and memory the last one sees all of it. The loss is the last one over the held-out 10%,
in one stream. Both ends have three learning rates and two more sizes of chunks; each row has two seeds. An hour of two
cores.

On books: 15.1 M parameters, all 412 books once, 16 x 4,096 tokens a step, chunks of 256, so that a sequence has 16. The
loss is that of the validation books. Two seeds each, at one learning rate; seven minutes of an H100."""
import os

from runs import Run, parse_options, read_results, run_all

COMMAND = "dev/gecko/train_gecko --steps 2000 --batch 3 --seq 256 --beta2 0.99"
OFF = dict(norm_decay=0, cema_omega=1, sliding=0, memory=0, two_hop_residual=1, rope_base=10000)  # Megalodon
STEPS = [  # name; what changes, and stays so for the next
    ("Megalodon", {}), ("norm that forgets", dict(norm_decay=1)), ("CEMA without omega", dict(cema_omega=0)),
    ("window of two chunks", dict(sliding=1, rope_base=500000)), ("memory", dict(memory=1)),
    ("one hop: Gecko", dict(two_hop_residual=0))]
RATES, CHUNKS, SEEDS = (2e-3, 3e-3, 4e-3), (128, 64, 32), (1337, 1)
BOOKS = "dev/gecko/train_gecko_cuda --num-layers 4 --model-dim 384 --z-dim 192 --value-dim 768 --ffn-hidden-dim 960 " \
        "--norm-num-groups 6 --vocab-size 16000 --seq 4096 --batch 16 --eod 1 --steps 747 --warmup 74 " \
        "--val-every 747 --checkpoint-minutes 0"
BOOKS_RATE, BOOKS_CHUNK = 2e-3, 256


def runs_of(data, books):
    """[(name, chunk size, learning rate, a run for each seed)]"""
    flags, rows = dict(OFF), []
    for i, (name, changes) in enumerate(STEPS):
        flags.update(changes)
        if books:
            words = f"{BOOKS} --train {data}/train.bin --val {data}/valid.bin --chunk-size {BOOKS_CHUNK} " \
                    f"--lr {BOOKS_RATE:g}".split()
            words += [word for flag, value in flags.items() for word in ("--" + flag.replace("_", "-"), str(value))]
            runs = [Run(f"{i}_{BOOKS_CHUNK}_{BOOKS_RATE:g}_{seed}", "gpu", words + ["--seed", str(seed)])
                    for seed in SEEDS]
            rows.append((name, BOOKS_CHUNK, BOOKS_RATE, runs))
            continue
        ends = i in (0, len(STEPS) - 1)
        for chunk, rate in [(64, rate) for rate in RATES] + [(chunk, 3e-3) for chunk in CHUNKS if chunk != 64]:
            if ends or (chunk, rate) == (64, 3e-3):
                words = f"{COMMAND} --train {data} --chunk-size {chunk} --lr {rate:g}".split()
                words += [word for flag, value in flags.items() for word in ("--" + flag.replace("_", "-"), str(value))]
                runs = [Run(f"{i}_{chunk}_{rate:g}_{seed}", "cpu", words + ["--seed", str(seed)]) for seed in SEEDS]
                rows.append((name, chunk, rate, runs))
    return rows


def main():
    options = parse_options(__doc__)
    books = os.path.isdir(options.data) if options.data else "books" in options.table
    rows = runs_of(options.data, books)
    if options.table:
        results = read_results(options.table)
    else:
        results = run_all([run for row in rows for run in row[3]], options.out)
    print("| step | chunks | learning rate | seed 1337 | seed 1 |\n|---|---|---|---|---|")
    for name, chunk, rate, runs in rows:
        losses = [results.get(run.name, {}).get("val_last", "nan") for run in runs]
        print(f"| {name} | {chunk} | {rate:g} | " + " | ".join(f"{float(loss):.4f}" for loss in losses) + " |")


if __name__ == "__main__":
    main()
