#!/usr/bin/env python3
"""Books as bytes: Megalodon and a Transformer of the same size read the same 49 M bytes, without a tokenizer.

    data/text.py books --tokenizer bytes --out out/bytes
    dev/experiments/bytes.py out/bytes --out out/bytes-runs
    dev/experiments/bytes.py --table dev/experiments/logs/bytes_results.tsv

Each model is tried with three learning rates; Megalodon then also with carried states. Books are read in order, in
sequences of 4,096 bytes, and none twice. Losses are over the first 4 MiB of the validation books: Megalodon reads each
book in one stream, the Transformer in windows of 4,096 bytes that start every 2,048. Needs a GPU,
for 6.5 minutes."""
from runs import Run, best_of, parse_options, read_results, run_all

STEPS = 750
MODELS = {
    "megalodon": "./train_megalodon_cuda --num-layers 6 --model-dim 512 --z-dim 256 --value-dim 1024 "
                 "--ffn-hidden-dim 1024 --norm-num-groups 8 --chunk-size 1024 --checkpoint-minutes 0",
    "transformer": "dev/transformer.py --num-layers 7 --model-dim 512 --num-heads 8 --ffn-hidden-dim 1344 "
                   "--val-stride 2048",
}
RATES = {"megalodon": (1e-3, 2e-3, 4e-3), "transformer": (5e-4, 1e-3, 2e-3)}


def run_of(data, model, rate, variant="plain", more=""):
    command = f"{MODELS[model]} --train {data}/train.bin --val {data}/valid.bin --eod 0 --seq 4096 --batch 16 " \
              f"--lr {rate:g} --steps {STEPS} --warmup {STEPS // 10} --val-every {STEPS} --val-tokens {1 << 22} {more}"
    return Run(f"{model}_{variant}_{rate:g}", "gpu", command.split())


def main():
    options = parse_options(__doc__)
    if options.table:
        results = read_results(options.table)
    else:
        search = {model: [run_of(options.data, model, rate) for rate in rates]
                  for model, rates in reversed(RATES.items())} # compiling the Transformer takes longest
        results = run_all(sum(search.values(), []), options.out)
        rate = float(best_of(results, [run.name for run in search["megalodon"]]).split("_")[-1])
        results = run_all([run_of(options.data, "megalodon", rate, "carry", "--carry 1")], options.out)
    print("| model | parameters | learning rate | validation loss per byte | bytes/s | time |\n" + "|---" * 6 + "|")
    for name, row in results.items():
        model, variant, rate = name.split("_")
        name = model if variant == "plain" else f"{model}, {variant}"
        print(f"| {name} | {float(row['parameters']) / 1e6:.1f} M | {rate} | "
              f"{float(row['val_last']):.4f} | {float(row['tok_s']):.0f} | {row['seconds']} s |")


if __name__ == "__main__":
    main()
