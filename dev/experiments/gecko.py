#!/usr/bin/env python3
"""From Megalodon to Gecko, one change at a time, on tiny Shakespeare: what is each worth?

    make gecko && dev/experiments/gecko.py input.txt --out out/gecko          all runs, then the table
    dev/experiments/gecko.py --table dev/experiments/logs/gecko_results.tsv

The README's command for CPUs (797,696 parameters, 2,000 steps of 3 x 256 bytes) with chunks of 64, so that a sequence
has four: with Gecko's window and memory the last of them see all of it. The loss is the last one over the held-out 10%,
in one stream. Both ends have three learning rates, every step two seeds. 40 minutes of two cores."""
from runs import Run, parse_options, read_results, run_all

COMMAND = "dev/gecko/train_gecko --steps 2000 --batch 3 --seq 256 --beta2 0.99 --chunk-size 64"
OFF = dict(norm_decay=0, cema_omega=1, sliding=0, memory=0, two_hop_residual=1, rope_base=10000)  # Megalodon
STEPS = [  # name; what changes, and stays so for the next
    ("Megalodon", {}), ("norm that forgets", dict(norm_decay=1)), ("CEMA without omega", dict(cema_omega=0)),
    ("window of two chunks", dict(sliding=1, rope_base=500000)), ("memory", dict(memory=1)),
    ("one hop: Gecko", dict(two_hop_residual=0))]
RATES, SEEDS = (2e-3, 3e-3, 4e-3), (1337, 1)


def runs_of(data):
    flags, runs = dict(OFF), []
    for i, (name, changes) in enumerate(STEPS):
        flags.update(changes)
        for rate in RATES if i in (0, len(STEPS) - 1) else RATES[1:2]:
            for seed in SEEDS:
                words = COMMAND.split() + ["--train", str(data), "--lr", f"{rate:g}", "--seed", str(seed)]
                for flag, value in flags.items():
                    words += ["--" + flag.replace("_", "-"), str(value)]
                runs.append((name, rate, Run(f"{i}_{rate:g}_{seed}", "cpu", words)))
    return runs


def main():
    options = parse_options(__doc__)
    runs = runs_of(options.data)
    middle_first = sorted((run for _, _, run in runs), key=lambda run: f"_{RATES[1]:g}_" not in run.name)
    results = read_results(options.table) if options.table else run_all(middle_first, options.out)
    print("| step | learning rate | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |\n" + "|---" * 4 + "|")
    for name, rate, run in runs[::len(SEEDS)]:
        losses = [results.get(f"{run.name.rsplit('_', 1)[0]}_{seed}", {}).get("val_last", "nan") for seed in SEEDS]
        print(f"| {name} | {rate:g} | " + " | ".join(f"{float(loss):.4f}" for loss in losses) + " |")


if __name__ == "__main__":
    main()
