#!/usr/bin/env python3
"""Which choices in initialization and recipe are worth changing: one at a time, on tiny Shakespeare, with two seeds.

    dev/experiments/search.py input.txt --out out/search             both rows; --rows cpu or --rows gpu for one

Row `cpu` is the README's command for CPUs with half the steps. Row `gpu` is the one for GPUs with a quarter of the
steps and a learning rate of 2e-3. --full takes all steps. A variant is a set of flags, or a change of tensors of the
initial weights. OUT/results.tsv has row, variant, seed, and the lowest validation loss. A second call goes on where the
last one stopped, and prints the table."""
import argparse, concurrent.futures, json, os, re, subprocess, sys

import numpy

SEEDS = 1337, 1
TINY = "--batch 3 --seq 256 --steps 1000 --lr 3e-3 --beta2 0.99"
LARGER = ("--num-layers 6 --model-dim 384 --z-dim 192 --value-dim 768 --ffn-hidden-dim 512 --norm-num-groups 8 "
          "--chunk-size 256 --seq 256 --batch 64 --steps 625 --lr 2e-3 --beta2 0.99 --dropout 0.2 "
          "--hidden-dropout 0.2 --attention-dropout 0.2")
ROWS = {"cpu": ("./train_megalodon", TINY), "gpu": ("./train_megalodon_cuda", LARGER)}
LAST = r"(wh2|wh1|fc2)\.weight"  # the last products of the two branches of a block
VARIANTS = {  # name: flags; or (which tensors of the initial weights, what becomes of them)
    "base": "",
    "scale-emb": "--scale-emb 1",
    "lr x 0.5": {"--lr": 0.5},
    "lr x 0.71": {"--lr": 0.71},
    "lr x 1.41": {"--lr": 1.41},
    "lr x 2": {"--lr": 2},
    "warmup 50": "--warmup 50",
    "warmup 200": "--warmup 200",
    "beta2 0.95": "--beta2 0.95",
    "beta2 0.98": "--beta2 0.98",
    "decay 0.03": "--weight-decay 0.03",
    "decay 0.3": "--weight-decay 0.3",
    "lr-end 0": "--lr-end-ratio 0",
    "untied": "--share-emb 0",
    "rescale": "--rescale-nffn 1",
    "embedding x 0.25": (r"embed", lambda x: 0.25 * x),
    "embedding x 0.5": (r"embed", lambda x: 0.5 * x),
    "embedding x 2": (r"embed", lambda x: 2 * x),
    "last products x 0.35": (LAST, lambda x: 0.35 * x),
    "last products x 0": (LAST, lambda x: 0 * x),
    "gamma x 0.25": (r"cema\.gamma", lambda x: 0.25 * x),
    "gamma x 0.5": (r"cema\.gamma", lambda x: 0.5 * x),
    "gamma x 2": (r"cema\.gamma", lambda x: 2 * x),
    "omega x 0": (r"cema\.omega", lambda x: 0 * x),
    "omega x 2": (r"cema\.omega", lambda x: 2 * x),
    "delta - 2": (r"cema\.delta", lambda x: x - 2),  # slower decay: longer memory
    "delta - 0 to 7.5": (r"cema\.delta", lambda x: x - 0.5 * numpy.arange(x.shape[1])),  # half-lives up to 2,500 tokens
    "alpha - 0 to 3.75": (r"cema\.alpha", lambda x: x - 0.25 * numpy.arange(x.shape[1])),  # half-lives up to 60 tokens
}


def flags_of(text, changes):
    """The row's flags with those of a variant in their place; a number multiplies the row's own."""
    flags = dict(zip(text.split()[::2], text.split()[1::2]))
    if isinstance(changes, dict):
        changes = " ".join(f"{flag} {float(flags[flag]) * factor:.4g}" for flag, factor in changes.items())
    flags.update(zip(changes.split()[::2], changes.split()[1::2]))
    return [word for pair in flags.items() for word in pair]


def change_tensors(path, pattern, change):
    """Changes the weights of a float32 safetensors file whose names the pattern finds."""
    with open(path, "r+b") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
        for name, tensor in header.items():
            if name == "__metadata__" or name.startswith("adam_") or not re.search(pattern, name):
                continue
            begin, end = tensor["data_offsets"]
            f.seek(8 + size + begin)
            x = numpy.frombuffer(f.read(end - begin), "<f4").reshape(tensor["shape"])
            f.seek(8 + size + begin)
            f.write(change(x).astype("<f4").tobytes())


def run(row, name, seed, options):
    program, text = ROWS[row]
    variant = VARIANTS[name]
    flags = flags_of(text, "" if isinstance(variant, tuple) else variant)
    flags += ["--seed", str(seed), "--train", options.text]
    folder = os.path.join(options.out, "runs", re.sub(r"\W+", "_", f"{row} {name} {seed}"))
    env = dict(os.environ, OMP_NUM_THREADS="2")
    if isinstance(variant, tuple):
        first = flags_of(" ".join(flags), f"--steps 1 --lr 0 --val-every 0 --out {folder}_initial")
        subprocess.run([program] + first, check=True, env=env, stdout=subprocess.DEVNULL)
        path = folder + "_initial/step_00000001.safetensors"
        change_tensors(path, *variant)
        flags += ["--load", path]
    if options.full:
        flags = flags_of(" ".join(flags), f"--steps {2000 if row == 'cpu' else 2500} --val-every 125")
    out = subprocess.run([program] + flags + ["--out", "none"], check=True, env=env, stdout=subprocess.PIPE, text=True)
    return row, name, seed, min(re.findall(r"val loss ([\d.]+)", out.stdout))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--at-a-time", type=int, default=max(1, (os.cpu_count() - 2) // 2), help="runs on CPUs")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    results = os.path.join(options.out, "results.tsv")
    lines = open(results).read().splitlines() if os.path.exists(results) else []
    known = {tuple(line.split("\t")[:3]): float(line.split("\t")[3]) for line in lines}
    todo = [(row, name, seed) for name in options.only for seed in SEEDS for row in options.rows
            if (row, name, str(seed)) not in known]
    pools = {"cpu": concurrent.futures.ThreadPoolExecutor(options.at_a_time),
             "gpu": concurrent.futures.ThreadPoolExecutor(1)}
    for done in concurrent.futures.as_completed([pools[work[0]].submit(run, *work, options) for work in todo]):
        row, name, seed, loss = done.result()
        known[row, name, str(seed)] = float(loss)
        with open(results, "a") as f:
            f.write(f"{row}\t{name}\t{seed}\t{loss}\n")
    print(f"{'variant':24}" + "".join(f"{row + ' ' + str(seed):>12}" for row in options.rows for seed in SEEDS))
    for name in options.only:
        print(f"{name:24}" + "".join(f"{known.get((row, name, str(seed)), float('nan')):12.4f}"
                                     for row in options.rows for seed in SEEDS))


if __name__ == "__main__":
    main()
