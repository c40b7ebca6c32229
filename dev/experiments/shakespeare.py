#!/usr/bin/env python3
"""Tiny Shakespeare: Megalodon by the README's two commands, and Transformers of the same size that see as many bytes.

    dev/experiments/shakespeare.py input.txt --out out/shakespeare          all runs, then the table
    dev/experiments/shakespeare.py --table dev/experiments/logs/shakespeare_results.tsv

Each model has two seeds and three to five learning rates. A loss is over the last 10% of the text, in nats per byte:
the last one of a run, or with "best" the lowest of its validations. A Transformer is evaluated with windows that
start every 64 bytes, so that each byte has at least 192 before it, but for the first 192. Needs both programs,
PyTorch and a GPU."""
from runs import Run, parse_options, read_results, run_all

SEEDS = 1337, 1
SMALL = "--steps 2000 --batch 3 --seq 256 --beta2 0.99"
LARGE = "--steps 2500 --batch 64 --seq 256 --beta2 0.99 --val-every 125"
DROPOUT = "--dropout 0.2 --hidden-dropout 0.2 --attention-dropout 0.2"
MODELS = [  # name, place, which loss, learning rates, command
    ("megalodon-0.8M", "cpu", "last", (2e-3, 3e-3, 4e-3), f"./train_megalodon {SMALL}"),
    ("transformer-0.8M", "gpu", "last", (1e-3, 2e-3, 4e-3),
     f"dev/transformer.py {SMALL} --num-layers 4 --model-dim 128 --num-heads 4 --ffn-hidden-dim 344 --val-stride 64"),
    ("megalodon-10M", "gpu", "best", (1e-3, 2e-3, 3e-3, 4.5e-3),
     f"./train_megalodon_cuda {LARGE} {DROPOUT} --num-layers 6 --model-dim 384 --z-dim 192 --value-dim 768 "
     "--ffn-hidden-dim 512 --norm-num-groups 8 --chunk-size 256"),
    ("transformer-10M", "gpu", "best", (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3),
     f"dev/transformer.py {LARGE} --num-layers 6 --model-dim 384 --num-heads 6 --ffn-hidden-dim 1024 --dropout 0.2 "
     "--val-stride 64"),
]


def main():
    options = parse_options(__doc__)
    if options.table:
        results = read_results(options.table)
    else:
        results = run_all([Run(f"{name}_{rate:g}_{seed}", place, command.split()
                               + ["--lr", f"{rate:g}", "--seed", str(seed), "--train", options.data])
                           for name, place, _, rates, command in MODELS for seed in SEEDS for rate in rates],
                          options.out, cpu=6, gpu=4)
    print("| model | loss | learning rate | seed 1337 | seed 1 |\n|---|---|---|---|---|")
    for name, _, which, rates, _ in MODELS:
        for rate in rates:
            losses = [results.get(f"{name}_{rate:g}_{seed}", {}).get(f"val_{which}", "nan") for seed in SEEDS]
            print(f"| {name} | {which} | {rate:g} | " + " | ".join(f"{float(loss):.4f}" for loss in losses) + " |")


if __name__ == "__main__":
    main()
