"""What the experiments share: many training runs, a few at a time, and their results in two files.

A run is Run(name, place, command, evals). place is "cpu" or "gpu"; the command is a list of words without --out. evals
are commands that follow it, {name: words}, in which {out} stands for the run's folder. OUT/results.tsv receives a line
for each run: its time, speed, memory and losses. OUT/logs.tsv receives what a curve needs: a row of every validation
and of 100 other steps. A run that is in results.tsv is not made again."""
import argparse, collections, concurrent.futures, csv, os, queue, re, shutil, subprocess, sys, time

Run = collections.namedtuple("Run", "name place command evals", defaults=({},))
LOG = "run", "step", "tokens", "loss", "tok_s", "val_loss"
RESULT = ("run", "card", "seconds", "parameters", "memory_mb", "tok_s", "val_last", "val_best", "evals", "command")
PER_WORD = r"words \d+: perplexity per word ([\d.e+]+)"
PER_WORD_AND_LINE = r"words \+ lines \d+: perplexity per word ([\d.e+]+)"


def parse_options(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="the text, or the folder with train.bin, valid.bin and test.bin")
    parser.add_argument("--out", help="folder for the runs, results.tsv and logs.tsv")
    parser.add_argument("--table", metavar="RESULTS", help="only print the table of this results.tsv")
    options = parser.parse_args()
    if not options.table and not (options.data and options.out):
        parser.error("expected DATA and --out DIR, or --table RESULTS")
    return options


def read_table(path):
    """The rows of a .tsv: {run: [row, ...]}"""
    table = collections.defaultdict(list)
    if os.path.exists(path):
        with open(path, newline="") as f:
            for row in csv.DictReader(f, delimiter="\t"):
                table[row["run"]].append(row)
    return table


def read_results(path):
    """{run: its row of results.tsv}"""
    return {name: rows[-1] for name, rows in read_table(path).items()}


def evals_of(model, steps, data, more=""):
    """Commands that evaluate a trained model, "megalodon", "gecko" or "transformer", on valid.bin and test.bin."""
    command = {"megalodon": f"./train_megalodon_cuda --load {{out}}/step_{steps:08d}.safetensors",
               "gecko": f"dev/gecko/train_gecko_cuda --load {{out}}/step_{steps:08d}.safetensors",
               "transformer": "dev/transformer.py --load {out}/model.safetensors"}[model]
    return {split: f"{command} --eval {data}/{split}.bin {more}".split() for split in ("valid", "test")}


def append_table(path, columns, rows):
    new = not os.path.exists(path)
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, columns, delimiter="\t", extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def cards():
    """Names of the GPUs that can be used."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], stdout=subprocess.PIPE,
                               text=True).stdout.split("\n")
    except FileNotFoundError:
        found = []
    return [name.strip() for name in found if name.strip()]


def found(pattern, text, default=""):
    matches = re.findall(pattern, text)
    return matches[-1] if matches else default


def execute(words, out, env):
    words = [word.replace("{out}", out) for word in words]
    python = [sys.executable] * words[0].endswith(".py")
    ended = subprocess.run(python + words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           errors="replace")
    if ended.returncode:
        raise RuntimeError(" ".join(ended.stdout.split()[-40:]))
    return ended.stdout


def make(run, out, slots):
    """Makes a run and its evaluations. Returns its result and the rows of its log."""
    card, index = slots.get()
    folder = os.path.join(out, "run_" + run.name)
    env = dict(os.environ, OMP_NUM_THREADS="2", CUDA_VISIBLE_DEVICES=str(index))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        started = time.time()
        text = execute(list(run.command) + ["--out", folder], folder, env)
        seconds = time.time() - started
        evals = {name: execute(words, folder, env) for name, words in run.evals.items()}
    finally:
        slots.put((card, index))
    with open(os.path.join(folder, "log.tsv"), newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    speeds = sorted(float(row["tok_s"]) for row in rows[len(rows) // 10:])
    result = {"run": run.name, "card": card, "seconds": f"{seconds:.0f}", "tok_s": speeds[len(speeds) // 2],
              "parameters": found(r"num_parameters: (\d+)", text), "memory_mb": found(r"memory: ([\d.]+) MB", text),
              "val_last": losses[-1], "val_best": min(losses), "command": " ".join(run.command),
              "evals": " ".join(f"{name} {found(PER_WORD, said)} {found(PER_WORD_AND_LINE, said)}"
                                for name, said in evals.items())}
    every = max(1, len(rows) // 100)
    return result, [dict(row, run=run.name) for i, row in enumerate(rows) if row["val_loss"] or i % every == 0]


def run_all(runs, out, cpu=1, gpu=1):
    """Makes the runs: `cpu` at a time on CPUs, `gpu` at a time on each GPU. Returns {run: result} of all."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "results.tsv")
    done = read_results(path)
    places = {"cpu": [("CPU", "")] * cpu, "gpu": [(name, i) for i, name in enumerate(cards())] * gpu}
    pools, slots = {}, {}
    for place, free in places.items():
        pools[place] = concurrent.futures.ThreadPoolExecutor(max(1, len(free)))
        slots[place] = queue.Queue()
        for slot in free or [("no GPU", "")]:
            slots[place].put(slot)
    work = {pools[run.place].submit(make, run, out, slots[run.place]): run.name for run in runs if run.name not in done}
    for ended in concurrent.futures.as_completed(work):
        try:
            result, rows = ended.result()
        except RuntimeError as e:
            print(f"{work[ended]}: failed: {e}", flush=True)
            continue
        print(f"{result['run']}: {result['val_last']}, best {result['val_best']}, {result['evals']}, "
              f"{result['seconds']} s, {result['tok_s']} tok/s, {result['memory_mb']} MB", flush=True)
        append_table(path, RESULT, [result])
        append_table(os.path.join(out, "logs.tsv"), LOG, rows)
    return read_results(path)


def best_of(results, names):
    """The run of the lowest last validation loss."""
    return min((name for name in names if name in results), key=lambda name: float(results[name]["val_last"]))
