#!/usr/bin/env python3
"""Books, as in the paper's Figure 1 and Table 5, but small: Megalodon, Gecko and a Transformer of the same size read
the same books once.

    data/text.py books --tokenizer bpe --vocab-size 16000 --out out/books
    dev/experiments/books.py out/books --out out/books-runs
    dev/experiments/books.py --table dev/experiments/logs/books_results.tsv

Each model is tried with five learning rates on the first quarter of every row's text, and then reads all of it with
the best. Books are read in order, in sequences of 4,096 tokens; no book is read twice. Further Megalodons and Geckos
take this rate too: with carried states, with sequences of 32,768 tokens, and with chunks of 256. The Transformer is
evaluated with windows of 4,096 tokens that start every 2,048, the others in one stream a book. Needs `make`, `make
gecko` and a GPU, for 25 minutes. To compare another model, add a line to MODELS, RATES and WINDOWS, and its command to
evals_of in runs.py."""
from runs import Run, best_of, evals_of, parse_options, read_results, run_all

TOKENS = 65536 # of a step
MODELS = {
    "megalodon": "./train_megalodon_cuda --num-layers 8 --model-dim 640 --z-dim 320 --value-dim 1280 "
                 "--ffn-hidden-dim 1600 --norm-num-groups 8 --chunk-size 1024 --checkpoint-minutes 0",
    "gecko": "dev/gecko/train_gecko_cuda --num-layers 8 --model-dim 640 --z-dim 320 --value-dim 1280 "
             "--ffn-hidden-dim 1600 --norm-num-groups 8 --chunk-size 1024 --checkpoint-minutes 0",
    "transformer": "dev/transformer.py --num-layers 10 --model-dim 640 --num-heads 10 --ffn-hidden-dim 1728",
}
RATES = {"megalodon": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), "gecko": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
         "transformer": (1.75e-4, 3.5e-4, 7e-4, 1.4e-3, 2.8e-3)}
VARIANTS = {"": "", "32k-carry": "--seq 32768 --batch 2 --carry 1", "carry": "--carry 1",
            "chunk256": "--chunk-size 256", "32k": "--seq 32768 --batch 2"}
WINDOWS = {"megalodon": "", "gecko": "", "transformer": "--seq 4096 --val-stride 2048"}


def flags_of(text, changes):
    """The text's flags, with those of the changes in their place."""
    words = text.split()
    flags = dict(zip(words[1::2], words[2::2]), **dict(zip(changes.split()[::2], changes.split()[1::2])))
    return words[:1] + [word for pair in flags.items() for word in pair]


def run_of(data, model, rate, steps, whole, variant=""):
    command = f"{MODELS[model]} --train {data}/train.bin --val {data}/valid.bin --eod 1 --seq 4096 --batch 16 " \
              f"--vocab-size 16000 --lr {rate:g} --steps {steps} --warmup {steps // 10} --val-every {steps // 4}"
    evals = evals_of(model, steps, data, "--eod 1 " + WINDOWS[model])
    return Run(f"{model}_{variant or 'plain'}_{steps}_{rate:g}", "gpu", flags_of(command, VARIANTS[variant]),
               evals if whole else {})


def main():
    options = parse_options(__doc__)
    if options.table:
        results = read_results(options.table)
    else:
        with open(f"{options.data}/train.info") as f:
            info = dict(line.split(" ", 1) for line in f.read().splitlines())
        steps = int(info["tokens"]) // TOKENS
        search = {model: [run_of(options.data, model, rate, steps // 4, False) for rate in rates]
                  for model, rates in reversed(RATES.items())} # compiling the Transformer takes longest
        results = run_all(sum(search.values(), []), options.out)
        rate = {model: float(best_of(results, [run.name for run in runs]).split("_")[-1])
                for model, runs in search.items()}
        full = [run_of(options.data, model, rate[model], steps, True) for model in reversed(MODELS)]
        full += [run_of(options.data, model, rate[model], steps, True, variant)
                 for model in ("megalodon", "gecko") for variant in VARIANTS if variant]
        results = run_all(full, options.out)
    print("| model | parameters | steps | learning rate | validation loss per token | perplexity per word: validation "
          "| test | tokens/s | memory | time |\n" + "|---" * 10 + "|")
    for name, row in results.items():
        model, variant, steps, rate = name.split("_")
        evals = row["evals"].split()
        valid, test = (evals[1], evals[4]) if evals else ("", "")
        name = model if variant == "plain" else f"{model}, {variant}"
        print(f"| {name} | {float(row['parameters']) / 1e6:.1f} M | {steps} | {rate} | {float(row['val_last']):.4f} | "
              f"{valid} | {test} | {float(row['tok_s']):.0f} | "
              f"{float(row['memory_mb'] or 'nan') / 1e3:.1f} GB | {row['seconds']} s |")


if __name__ == "__main__":
    main()
