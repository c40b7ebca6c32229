#!/usr/bin/env python3
"""WikiText-2: the perplexity per word of Megalodon and of a Transformer of the same size, trained on it alone.

    data/wikitext.py 2 --vocab-size 16000 --out out/wikitext2
    dev/experiments/wikitext2.py out/wikitext2 --out out/wikitext2-runs
    dev/experiments/wikitext2.py --table dev/experiments/logs/wikitext2_results.tsv

Each model has as many trials: five learning rates at a quarter of the length, then at full length four rates of
dropout with the best of them. Both see the same tokens, at random places. The Transformer is evaluated with windows of
1024 tokens that start every 256, Megalodon in one stream. Perplexity is per word or line end, over the whole text:
what a model gives to all the pieces of a word, its spaces included, is what it gives to the word. Needs a GPU, for 21
minutes."""
from runs import Run, best_of, evals_of, parse_options, read_results, run_all

STEPS = 4400
RATES = {"megalodon": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "transformer": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)}
FIRST_DROPOUT, DROPOUTS = 0.3, (0.2, 0.35, 0.5, 0.65)  # while rates are tried, and after
MODELS = {
    "megalodon": "./train_megalodon_cuda --num-layers 6 --model-dim 512 --z-dim 256 --value-dim 1024 "
                 "--ffn-hidden-dim 1024 --norm-num-groups 8 --chunk-size 512 --checkpoint-minutes 0 "
                 "--hidden-dropout {dropout} --attention-dropout {dropout}",
    "transformer": "dev/transformer.py --num-layers 7 --model-dim 512 --num-heads 8 --ffn-hidden-dim 1344",
}
WINDOWS = {"megalodon": "", "transformer": "--seq 1024 --val-stride 256"}


def run_of(data, model, rate, dropout, steps):
    command = f"{MODELS[model]} --train {data}/train.bin --val {data}/valid.bin --seq 1024 --batch 16 --beta2 0.99 " \
              f"--vocab-size 16000 --steps {steps} --warmup {steps // 10} --lr {rate:g} --dropout {{dropout}} " \
              f"--val-every {steps // 8} --val-tokens 0"
    evals = evals_of(model, steps, data, WINDOWS[model])
    return Run(f"{model}_{steps}_{rate:g}_{dropout:g}", "gpu", command.format(dropout=dropout).split(),
               evals if steps == STEPS else {})


def main():
    options = parse_options(__doc__)
    if options.table:
        results = read_results(options.table)
    else:
        search = {model: [run_of(options.data, model, rate, FIRST_DROPOUT, STEPS // 4) for rate in RATES[model]]
                  for model in MODELS}
        results = run_all(sum(search.values(), []), options.out)
        full = []
        for model, runs in search.items():
            rate = float(best_of(results, [run.name for run in runs]).split("_")[2])
            full += [run_of(options.data, model, rate, dropout, STEPS) for dropout in DROPOUTS]
        results = run_all(full, options.out)
    print("| model | parameters | steps | learning rate | dropout | validation loss per token | perplexity per word or "
          "line end: validation | test | tokens/s | time |\n" + "|---" * 10 + "|")
    for name, row in results.items():
        model, steps, rate, dropout = name.split("_")
        evals = row["evals"].split()
        valid, test = (evals[2], evals[5]) if evals else ("", "")
        print(f"| {model} | {float(row['parameters']) / 1e6:.1f} M | {steps} | {rate} | {dropout} | "
              f"{float(row['val_last']):.4f} | {valid} | {test} | {float(row['tok_s']):.0f} | {row['seconds']} s |")


if __name__ == "__main__":
    main()
