#!/usr/bin/env python3
"""A Llama-style Transformer in PyTorch to compare train_megalodon with: RMS norm, rotary embedding, SwiGLU, full causal
attention, no biases. Weights start as GPT-2's: normal with standard deviation 0.02, and 0.02 / sqrt(2 x layers) for the
last product of each residual branch.

    dev/transformer.py --train out/books/train.bin --val out/books/valid.bin --out runs/transformer
    dev/transformer.py --load runs/transformer/model.safetensors --eval out/books/test.bin --seq 256

Data files, batches (the same tokens for the same --seed, --seq, --eod, --batch x --accum), AdamW, schedule, clipping,
printed lines and DIR/log.tsv are those of train_megalodon, and so are the flags that mean the same. On a GPU it trains
in bf16 (weights, moments and norms fp32), compiled. Needs torch >= 1.13, numpy and safetensors.

Validation and --eval score each token once (not the first one of a text without --eod), in windows of --seq tokens that
do not overlap. So the first tokens of a window see little. With --val-stride S a window starts every S tokens, and only
the tokens that the window before has not scored count. Each token then sees at least seq - S others, at seq / S times
the cost.
"""
import functools, glob, math, os, signal, sys, time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data"))
from base import Failure, Parser, main_of, regular

try:
    import numpy
    import torch
    import torch.nn.functional as F
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file
except ImportError as e:
    sys.exit(f"error: {e}: pip install -r dev/requirements.txt")

OPTIONS = [  # name, default, smallest value (text: the choices), help
    ("num-layers", 4, 1, "blocks"),
    ("model-dim", 128, 2, "features of the residual stream"),
    ("num-heads", 4, 1, "attention heads"),
    ("ffn-hidden-dim", 344, 1, "hidden features of the feed-forward layer"),
    ("vocab-size", 0, 0, "tokens; 0: what the .info beside a .bin says, else 256"),
    ("rope-base", 10000.0, 1, "wavelengths of the rotary embedding"),
    ("norm-eps", 1e-5, 0, "added to every variance"),
    ("share-emb", 1, 0, "use the embedding as the output layer too"),
    ("dropout", 0.0, 0, "on embeddings, attention and both residual branches"),
    ("train", "", None, "training data: text (a byte is a token) or .bin; commas and * for several files"),
    ("val", "", None, "validation data; without it the last 10%% of each training file"),
    ("val-stride", 0, 0, "tokens between the starts of validation windows; 0 for --seq"),
    ("eod", -1, -1, "token that ends a document; -1: all is one text"),
    ("out", "", None, "folder for log.tsv, and for the trained weights, model.safetensors"),
    ("load", "", None, "a model.safetensors, to --eval"),
    ("eval", "", None, "print the loss of these weights on this file, and do not train"),
    ("losses", "", None, "with --eval: write each token's loss here, as train_megalodon does"),
    ("batch", 4, 1, "sequences in a micro-step"),
    ("seq", 256, 1, "tokens in a sequence"),
    ("accum", 1, 1, "micro-steps in a step"),
    ("steps", 1000, 1, "steps, and the length of the learning rate schedule"),
    ("lr", 1e-3, 0, "peak learning rate"),
    ("lr-end-ratio", 0.05, 0, "the last learning rate over the peak"),
    ("warmup", 100, 0, "steps of linear warmup"),
    ("schedule", "cosine", ("cosine", "linear", "constant"), "after the warmup: cosine, linear or constant"),
    ("weight-decay", 0.1, 0, "decoupled, on every parameter"),
    ("beta1", 0.9, 0, "AdamW: decay of the first moment"),
    ("beta2", 0.95, 0, "AdamW: decay of the second moment"),
    ("adam-eps", 1e-8, 0, "AdamW: added to the root of the second moment"),
    ("clip", 1.0, 0, "largest global norm of the gradient; 0 for no limit"),
    ("seed", 1337, 0, "initialization, data order and dropout"),
    ("val-every", 250, 0, "validate every so many steps; always after the last"),
    ("val-tokens", 262144, 0, "validate on so many tokens, the first ones; 0 for all"),
    ("precision", "bf16", ("bf16", "fp32"), "on a GPU: bf16 or fp32"),
    ("compile", 1, 0, "on a GPU: torch.compile, 0 or 1"),
]
MODEL_OPTIONS = ("num_layers", "model_dim", "num_heads", "ffn_hidden_dim", "vocab_size", "rope_base", "norm_eps",
                 "share_emb")


def parse_options():
    parser = Parser(__doc__)
    for name, default, least, text in OPTIONS:
        parser.add_argument("--" + name, type=type(default), default=default,
                            choices=least if isinstance(least, tuple) else None, metavar="X",
                            help=text + (f" (default {default})" if default != "" else ""))
    parser.add_argument("--dry-run", action="store_true", help="print the number of parameters and stop")
    o = parser.parse_args()
    o.vocab_size = o.vocab_size or info_of(o.train).get("vocab_size", 256)
    for name, default, least, _ in OPTIONS:
        value = getattr(o, name.replace("-", "_"))
        if isinstance(least, (int, float)) and not least <= value < math.inf:
            raise Failure(f"--{name} {value}: expected a number of {least} or more")
    if o.model_dim % o.num_heads or o.model_dim // o.num_heads % 2:
        raise Failure(f"--model-dim {o.model_dim}: expected an even multiple of --num-heads {o.num_heads}")
    if max(o.beta1, o.beta2, o.dropout) >= 1:
        raise Failure("--beta1, --beta2, --dropout: expected numbers below 1")
    if bool(o.load) != bool(o.eval) or bool(o.train) == bool(o.eval):
        raise Failure("expected --train FILE to train, or --load FILE --eval FILE to evaluate")
    if o.val_stride > o.seq:
        raise Failure(f"--val-stride {o.val_stride}: expected at most --seq {o.seq}")
    return o


def info_of(path):
    """What the .info beside a .bin says, {} where there is none."""
    info = path[:-4] + ".info"
    if not (path.endswith(".bin") and os.path.isfile(info)):
        return {}
    with open(info, errors="replace") as f:
        found = dict(line.split(" ", 1) for line in f.read().splitlines() if " " in line)
    for key in "vocab_size", "words", "lines", "bytes":
        if not found.get(key, "").isdecimal():
            raise Failure(f"{info}: expected \"{key}\" and a number")
        found[key] = int(found[key])
    return found


class Dataset:
    """Parts of token files laid end to end, as train_megalodon reads them."""

    def __init__(self, parts, eod, T):
        """documents: the first token and the size of each. stretches: how many sequences of T stand before each."""
        self.parts, self.size, self.eod, self.documents, begin = parts, sum(map(len, parts)), eod, [], 0
        for part in parts if eod >= 0 else []:
            ends = numpy.append(numpy.flatnonzero(part == eod), len(part))
            for start, end in zip(numpy.append(0, ends[:-1] + 1), ends):
                if end > start:
                    self.documents.append((begin + int(start), int(end - start)))
            begin += len(part)
        if eod < 0 and self.size > 1:
            self.documents = [(0, self.size)]
        self.stretches = numpy.cumsum([0] + [size // T + 1 for _, size in self.documents])

    def read(self, at, n):
        found = []
        for part in self.parts:
            if n > 0 and at < len(part):
                found.append(part[at:at + n].astype(numpy.int64))
                n -= len(found[-1])
            at = max(at - len(part), 0)
        return numpy.concatenate(found)

    def read_document(self, k, start, n):
        """Inputs [start,start+n) of a document and the token after them. With EOD it is read as EOD t0 t1 .. EOD."""
        at, size = self.documents[k]
        if self.eod < 0:
            return self.read(at + start, n + 1)
        first, last = [self.eod] * (start == 0), [self.eod] * (start + n == size + 1)
        return numpy.concatenate((first, self.read(at + start - (start > 0), n + 1 - len(first) - len(last)), last))

    def sample(self, seed, step, row, rows, T):
        """Sequence `row` of a step, and the token after it: from a random place. With EOD it is the next of the
        sequences that the documents are cut into; the rows of a step are at equal distances in this list."""
        if self.eod < 0:
            return self.read(random_bits(seed, (1 << 56) + step, row) % (self.size - T), T + 1)
        number = (row * int(self.stretches[-1]) // rows + step) % int(self.stretches[-1])
        k = int(numpy.searchsorted(self.stretches, number, "right")) - 1
        start = (number - int(self.stretches[k])) * T
        return self.read_document(k, start, min(T, self.documents[k][1] + 1 - start))


def batch_of(pieces, rows, T):
    """Inputs and targets (rows,T) from pieces of at most T + 1 tokens. Where there is no token the target is -100."""
    x, y = numpy.zeros((rows, T), numpy.int64), numpy.full((rows, T), -100, numpy.int64)
    for row, piece in enumerate(pieces):
        x[row, :len(piece) - 1], y[row, :len(piece) - 1] = piece[:-1], piece[1:]
    return x, y


def random_bits(seed, stream, index):
    x, mask = seed, (1 << 64) - 1
    for add in (0x9E3779B97F4A7C15, stream, index): # splitmix64's finalizer, three times
        x = (x + (add + 1) * 0x9E3779B97F4A7C15) & mask
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        x ^= x >> 31
    return x


def open_tokens(path):
    try:
        if not regular(path).endswith(".bin"):
            return numpy.memmap(path, numpy.uint8, "r")
        magic, version, count = numpy.fromfile(path, "<i4", 256)[:3]
        return numpy.memmap(path, {(20240520, 1): "<u2", (20240801, 7): "<u4"}[magic, version], "r", 1024, (count,))
    except (ValueError, KeyError):
        raise Failure(f"{path}: not a text or a token file of llm.c's") from None


def open_data(flag, patterns, held_out, o):
    """The files that the patterns name, and the last 10% of each as another Dataset if held_out."""
    first, last = [], []
    for pattern in [patterns] if os.path.exists(patterns) else filter(None, patterns.split(",")):
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not paths:
            raise Failure(f"{flag}: no file is named {pattern}")
        for tokens in map(open_tokens, paths):
            top = max((int(tokens[i:i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24)), default=0)
            if top >= o.vocab_size:
                raise Failure(f"{flag} {pattern}: token {top}, but vocab_size is {o.vocab_size}")
            cut = int(0.9 * len(tokens)) if held_out else len(tokens)
            first.append(tokens[:cut])
            last.append(tokens[cut:])
    return Dataset(first, o.eod, o.seq), Dataset(last, o.eod, o.seq)


class RMSNorm(torch.nn.Module):
    def __init__(self, dim, eps): # the scale is stored as an offset from 1, so that decay draws it to 1
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def attention(q, k, v, dropout):
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) # torch 1.13
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return F.dropout(scores.masked_fill(future, -math.inf).softmax(-1), dropout) @ v


def rotate(x, angles): # (B,H,T,D): pairs of neighbours are complex numbers
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


class Block(torch.nn.Module):
    def __init__(self, o):
        super().__init__()
        D, hidden, linear = o.model_dim, o.ffn_hidden_dim, functools.partial(torch.nn.Linear, bias=False)
        self.norm1, self.norm2 = RMSNorm(D, o.norm_eps), RMSNorm(D, o.norm_eps)
        self.qkv, self.out = linear(D, 3 * D), linear(D, D)
        self.gate, self.up, self.down = linear(D, hidden), linear(D, hidden), linear(hidden, D)
        self.heads, self.dropout = o.num_heads, o.dropout

    def forward(self, x, angles):
        rate = self.dropout if self.training else 0.0
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attention(rotate(q, angles), rotate(k, angles), v, rate).transpose(1, 2).flatten(-2)
        x = x + F.dropout(self.out(mixed), rate)
        n = self.norm2(x)
        return x + F.dropout(self.down(F.silu(self.gate(n)) * self.up(n)), rate)


class Transformer(torch.nn.Module):
    def __init__(self, o):
        super().__init__()
        self.embed = torch.nn.Embedding(o.vocab_size, o.model_dim)
        self.blocks = torch.nn.ModuleList([Block(o) for _ in range(o.num_layers)])
        self.norm = RMSNorm(o.model_dim, o.norm_eps)
        self.output = torch.nn.Linear(o.model_dim, o.vocab_size, bias=False)
        if o.share_emb:
            self.output.weight = self.embed.weight
        self.dropout = o.dropout
        head = o.model_dim // o.num_heads
        speeds = o.rope_base ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
        angles = torch.arange(o.seq, dtype=torch.float64)[:, None] * speeds
        self.register_buffer("angles", angles.float(), persistent=False)
        for name, p in self.named_parameters(): # GPT-2's: what ends a residual branch starts smaller
            if p.dim() > 1:
                small = name.endswith(("out.weight", "down.weight"))
                torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * o.num_layers) if small else 0.02)

    def forward(self, tokens, targets):
        """The loss in nats of each target, 0 for a target of -100."""
        x = F.dropout(self.embed(tokens), self.dropout if self.training else 0.0)
        for block in self.blocks:
            x = block(x, self.angles[:tokens.shape[1]])
        logits = self.output(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def learning_rate(o, step):
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    left = 1 - (step - o.warmup) / max(o.steps - o.warmup, 1)
    f = {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[o.schedule]
    return o.lr * (o.lr_end_ratio + (1 - o.lr_end_ratio) * f)


def evaluate(loss_of, data, o, device, most=0, fixed=True):
    """Mean loss over the first `most` tokens of data (0: over all), and each token's loss, one array a document; see
    the top of the file. fixed: all windows have o.seq tokens, as a compiled model wants it."""
    T, stride, windows = o.seq, o.val_stride or o.seq, []
    sizes = [size - (o.eod < 0) for _, size in data.documents] # tokens that are scored
    if most:
        before = numpy.cumsum([0] + sizes[:-1])
        sizes = [min(n, most - int(b)) for n, b in zip(sizes, before) if b < most]
    for k, n in enumerate(sizes):
        seen = 0
        while seen < n:
            start = 0 if seen == 0 else seen + stride - T
            windows.append((k, start, seen, min(T, n - start))) # seen: the first target that counts
            seen = min(start + T, n)
    losses = [[] for _ in sizes]
    for i in range(0, len(windows), o.batch):
        some = windows[i:i + o.batch]
        x, y = batch_of([data.read_document(k, start, n) for k, start, _, n in some], o.batch if fixed else len(some),
                        T if fixed else max(n for _, _, _, n in some))
        with torch.no_grad():
            found = loss_of(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)).cpu().numpy()
        for row, (k, start, seen, n) in zip(found, some):
            losses[k].append(row[seen - start:n])
    losses = [numpy.concatenate(parts) for parts in losses]
    return sum(float(part.sum(dtype=float)) for part in losses) / sum(sizes), losses


def report(val, scored, path):
    """The loss on a file as it is published, if the file's counts are there: data/common.py writes them."""
    nats, counts = val * scored, info_of(path)
    print(f"eval: tokens {scored} nats/token {val:.6f} perplexity {math.exp(val):.4f}")
    if counts:
        words, lines, size = counts["words"], counts["lines"], counts["bytes"]
        print(f"words {words}: perplexity per word {math.exp(nats / words):.6g}\n"
              f"words + lines {words + lines}: perplexity per word {math.exp(nats / (words + lines)):.6g}\n"
              f"bytes {size}: bits/byte {nats / math.log(2) / size:.4f}")


def evaluate_file(model, o, device):
    """--eval. With --losses also writes each token's loss, and to FILE.documents how many each document has."""
    data, _ = open_data("--eval", o.eval, False, o)
    if data.size < 2:
        raise Failure(f"--eval {o.eval}: at least 2 tokens are needed")

    def loss_of(x, y):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and o.precision == "bf16"):
            return model(x, y)

    val, losses = evaluate(loss_of, data, o, device, fixed=False)
    report(val, sum(map(len, losses)), o.eval)
    if o.losses:
        numpy.concatenate(losses).astype("<f4").tofile(o.losses)
        numpy.savetxt(o.losses + ".documents", [len(part) for part in losses], "%d")


def main():
    o = parse_options()
    torch.manual_seed(o.seed)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if o.load:
        try:
            with safe_open(regular(o.load), "pt") as f:
                vars(o).update({name: type(getattr(o, name))(f.metadata()[name]) for name in MODEL_OPTIONS})
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise Failure(f"{o.load}: not a model.safetensors that dev/transformer.py wrote") from None
    model = Transformer(o).to(device)
    print(f"num_parameters: {sum(p.numel() for p in model.parameters())}")
    if o.dry_run:
        return
    if o.load:
        model.load_state_dict(load_file(o.load), strict=False) # a shared output layer stands in it once
        model.eval()
        return evaluate_file(model, o, device)
    data, held_out = open_data("--train", o.train, not o.val, o)
    if o.val:
        held_out, _ = open_data("--val", o.val, False, o)
    print(f"tokens: {data.size} to train on, {held_out.size} held out")
    if not data.documents or (o.eod < 0 and data.size <= o.seq):
        raise Failure(f"--train {o.train}: {data.size} tokens to train on, --seq {o.seq} needs one more than that")
    log = None
    if o.out:
        os.makedirs(o.out, exist_ok=True)
        log = open(os.path.join(o.out, "log.tsv"), "w")
        log.write("step\ttokens\tloss\tgrad_norm\tlr\ttok_s\tms\tval_loss\n")

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, o.lr, (o.beta1, o.beta2), o.adam_eps, o.weight_decay,
                                  **({"fused": True} if gpu else {}))
    run = torch.compile(model) if gpu and o.compile else model

    def loss_of(x, y):
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu and o.precision == "bf16"):
            return run(x, y)

    stopped = [] # signals: the step is finished, and the weights are saved; a second Ctrl-C ends at once

    def on_signal(number, _):
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1:
        signal.signal(number, on_signal)
    started, tokens, rows, terminal = time.time(), 0, o.accum * o.batch, sys.stdout.isatty()
    for step in range(o.steps):
        step_started, lr, loss = time.time(), learning_rate(o, step), 0.0
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        pieces = [data.sample(o.seed, step, row, rows, o.seq) for row in range(rows)]
        predictions = sum(len(piece) - 1 for piece in pieces)
        for first in range(0, rows, o.batch):
            x, y = batch_of(pieces[first:first + o.batch], o.batch, o.seq)
            part = loss_of(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)).sum() / predictions
            part.backward()
            loss += part.detach()
        loss = float(loss)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, o.clip or math.inf))
        done = step + 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Failure(f"step {done}: loss {loss:g}, gradient norm {norm:g}: stopped")
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        tokens += predictions
        ms, val = 1e3 * (time.time() - step_started), None
        left = int((time.time() - started) / done * (o.steps - done))
        validates = held_out.size > 1 and (done == o.steps or (o.val_every and done % o.val_every == 0))
        last = bool(validates or stopped or done == o.steps)
        if terminal or last or done == 1 or done % 10 == 0:
            line = f"step {done}/{o.steps} | loss {loss:.4f} | norm {norm:.3f} | lr {lr:.2e} | " \
                   f"{1e3 * predictions / ms:.0f} tok/s | {ms:.1f} ms | {left // 60}:{left % 60:02d} left"
            if terminal: # a line replaces the one before
                print(f"\r{line}\033[K", end="\n" * last, flush=True)
            else:
                print(line, flush=True)
        if validates:
            model.eval()
            val, _ = evaluate(loss_of, held_out, o, device, o.val_tokens)
            model.train()
            print(f"step {done}: val loss {val:.4f}", flush=True)
        if log:
            log.write(f"{done}\t{tokens}\t{loss:.9g}\t{norm:.9g}\t{lr:.9g}\t{1e3 * predictions / ms:.1f}\t{ms:.3f}\t"
                      + ("\n" if val is None else f"{val:.9g}\n"))
            log.flush()
        if stopped:
            print(f"stopped by signal {stopped[0]}")
            break
    if gpu:
        print(f"memory: {torch.cuda.max_memory_allocated() / 1e6:.1f} MB")
    if o.out: # named_parameters() has a shared output layer once, as safetensors wants it
        save_file({name: p.detach().cpu() for name, p in model.named_parameters()},
                  os.path.join(o.out, "model.safetensors"), {name: str(getattr(o, name)) for name in MODEL_OPTIONS})


if __name__ == "__main__":
    main_of(main, "dev")
