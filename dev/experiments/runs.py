"""What the experiments share: many training runs, a few at a time, and their logs in one file.

A run is (name, place, words): place is "cpu" or "gpu", words are the command without --out. Its log.tsv is read when it
has ended; OUT/logs.tsv receives the columns run, step, tokens, loss, tok_s, val_loss, of every validation and of 100
other steps. Runs that are in this file already are not made again."""
import collections, concurrent.futures, csv, os, shutil, subprocess, sys, time

COLUMNS = "run", "step", "tokens", "loss", "tok_s", "val_loss"


def read_logs(path):
    """{run: rows of OUT/logs.tsv or of a copy}"""
    logs = collections.defaultdict(list)
    if os.path.exists(path):
        with open(path, newline="") as f:
            for row in csv.DictReader(f, delimiter="\t"):
                logs[row["run"]].append(row)
    return logs


def losses(logs, run):
    """The validation losses of a run, in their order."""
    return [float(row["val_loss"]) for row in logs.get(run, []) if row["val_loss"]]


def run_all(runs, out, cpu=1, gpu=1):
    """Makes the runs, `cpu` and `gpu` of them at a time on CPUs (two cores each) and on the GPU. Returns all logs."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "logs.tsv")
    if not os.path.exists(path):
        with open(path, "w") as f:
            f.write("\t".join(COLUMNS) + "\n")
    done = read_logs(path)

    def make(name, words):
        folder = os.path.join(out, "run_" + name)
        shutil.rmtree(folder, ignore_errors=True)
        started = time.time()
        ended = subprocess.run(words + ["--out", folder], env=dict(os.environ, OMP_NUM_THREADS="2"),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ended.returncode:
            return f"{name}: failed: {' '.join(ended.stdout.split()[-40:])}", []
        with open(os.path.join(folder, "log.tsv"), newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
        every = max(1, len(rows) // 100)
        rows = [dict(row, run=name) for i, row in enumerate(rows) if row["val_loss"] or i % every == 0]
        return f"{name}: {rows[-1]['val_loss']}, {time.time() - started:.0f} s", rows

    pools = {"cpu": concurrent.futures.ThreadPoolExecutor(cpu), "gpu": concurrent.futures.ThreadPoolExecutor(gpu)}
    work = [pools[place].submit(make, name, words) for name, place, words in runs if name not in done]
    for ended in concurrent.futures.as_completed(work):
        said, rows = ended.result()
        print(said, file=sys.stderr, flush=True)
        with open(path, "a", newline="") as f:
            csv.DictWriter(f, COLUMNS, delimiter="\t", extrasaction="ignore", lineterminator="\n").writerows(rows)
    return read_logs(path)
