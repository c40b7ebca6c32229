#!/usr/bin/env python3
"""Megalodon (arXiv 2404.08801) in PyTorch, to compare with: the mathematics of train_megalodon.c, left to autograd.

    dev/reference.py dump                             write the tensors the tests read: data/reference/*.safetensors
    dev/reference.py check FILE...                    recompute every tensor of a dump and compare
    dev/reference.py convert IN.pth OUT.safetensors   turn released weights into safetensors
    dev/reference.py init OUT.safetensors             write a freshly initialised model
    dev/reference.py eval FILE.safetensors TEXT       mean loss of a checkpoint on a text, a byte being a token
    dev/reference.py bench                            time a training step

It does what the released implementation (XuezheMax/megalodon) does; where the paper differs, a comment says so.
B batch, T time, D model_dim, Z z_dim, V value_dim, F ffn_hidden_dim, H num_heads, N cema_ndim, G norm_num_groups,
c chunk_size. Needs torch >= 1.13 and safetensors.

It knows Gecko too (arXiv 2601.06463), as differences from Megalodon: `architecture` gecko in the metadata of a file, or
`dump --architecture gecko`. The equations stand in dev/gecko/gecko.c.
"""
import argparse, json, math, os, pickle, statistics, sys, time

# PyTorch's OpenMP threads and OpenBLAS's own, where that is its BLAS, else spin while the others work: twice the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "data"))
from base import Failure, Parser, main_of, regular

try:
    import numpy
    import torch
    import torch.nn.functional as F
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save
except ImportError as e:
    sys.exit(f"error: {e}: pip install -r dev/requirements.txt")

# ---------------------------------------------------------------------------------------------------------------------
# Configuration and parameters: one table each

def bit(text):
    return ("0", "1").index(str(int(text)))

CONFIG = [  # name, other flag, type, default (those of the benchmark), help
    ("num_layers", "layers", int, 12, "blocks"),
    ("model_dim", "dim", int, 256, "D, width of the residual stream"),
    ("num_heads", "heads", int, 1, "H, attention heads"),
    ("z_dim", None, int, 128, "Z, width of queries and keys, all heads together"),
    ("value_dim", None, int, 512, "V, width of values, all heads together"),
    ("ffn_hidden_dim", None, int, 512, "F, hidden width of the feed-forward layer"),
    ("chunk_size", "chunk", int, 256, "c, timesteps that attend to each other"),
    ("norm_num_groups", "groups", int, 8, "G, feature groups of the timestep norm"),
    ("cema_ndim", None, int, 16, "N, complex moving averages per channel"),
    ("vocab_size", "vocab", int, 256, "tokens"),
    ("rope_base", None, float, 10000.0, "base of the rotary frequencies"),
    ("norm_eps", None, float, 1e-5, "added to every variance"),
    ("swiglu", None, bit, 1, "1: gated feed-forward layer, with fc3"),
    ("scale_emb", None, bit, 0, "1: embeddings times sqrt(D)"),
    ("share_emb", None, bit, 0, "1: output layer tied to the embedding"),
    ("rescale_nffn", None, bit, 0, "1: learned scale on the feed-forward branch"),
]
GECKO_CONFIG = [  # name, type, Megalodon's value, Gecko's
    ("norm_decay", bit, 0, 1), ("timenorm_beta1", float, 0.999, 0.999), ("timenorm_beta2", float, 0.9999, 0.9999),
    ("cema_omega", bit, 1, 0), ("num_rope_heads", int, 0, 0), ("sliding", bit, 0, 1), ("memory", bit, 0, 1),
    ("two_hop_residual", bit, 1, 0),
]

class Config(argparse.Namespace):
    def __init__(self, architecture="megalodon", **fields):
        if architecture not in ("megalodon", "gecko"):
            raise Failure(f"architecture is {architecture!r}, expected megalodon or gecko")
        gecko = architecture == "gecko"
        super().__init__(**{name: kind(fields.get(name, 500000.0 if gecko and name == "rope_base" else default))
                            for name, _, kind, default, _ in CONFIG},
                         **{name: kind(fields.get(name, theirs) if gecko else ours)
                            for name, kind, ours, theirs in GECKO_CONFIG}, architecture=architecture)
        H, G = self.num_heads, self.norm_num_groups
        for name, multiple in ("z_dim", 2 * H), ("value_dim", H), ("model_dim", G):
            value = getattr(self, name)
            if multiple < 1 or value % multiple:
                raise Failure(f"{name} is {value}, but should be a multiple of {multiple}")

    def strings(self):
        more = GECKO_CONFIG + [("architecture",)] if self.architecture == "gecko" else []
        return {name: str(getattr(self, name)) for name, *_ in CONFIG + more}

def parameters(c):
    """name -> (shape, initialisation), the released names; a linear map is (out, in)"""
    D, Z, V, Fh, N = c.model_dim, c.z_dim, c.value_dim, c.ffn_hidden_dim, c.cema_ndim
    table = {"embed.weight": ((c.vocab_size, D), "embed")}
    one, affines = (1,) * c.cema_omega, 4 if c.memory else 2
    for l in range(c.num_layers):
        mega, nffn = f"layers.{l}.mega.", f"layers.{l}.nffn."
        table.update({
            mega + "timenorm.weight": ((D,), "zero"),    mega + "timenorm.bias": ((D,), "zero"),
            mega + "cema.alpha": ((D, N, *one), "normal"), mega + "cema.delta": ((D, N, *one), "normal"),
            mega + "cema.theta": ((D, *one, *one), "theta"), mega + "cema.gamma": ((D, N, 2), "gamma"),
            mega + "cema.omega": ((D, 1), "omega"),      mega + "rmsnorm.weight": ((D,), "zero"),
            mega + "wv.weight": ((V, D), "linear"),      mega + "wv.bias": ((V,), "zero"),
            mega + "wz.weight": ((Z, D), "linear"),      mega + "wz.bias": ((Z,), "zero"),
            mega + "wr.weight": ((V, D), "linear"),      mega + "wr.bias": ((V,), "zero"),
            mega + "wh1.weight": ((D, D), "linear"),     mega + "wh1.bias": ((D,), "zero"),
            mega + "wh2.weight": ((D, V), "linear"),
            mega + "gamma": ((affines, Z), "zero"),      mega + "beta": ((affines, Z), "zero"),
            nffn + "norm.weight": ((D,), "zero"),        nffn + "norm.bias": ((D,), "zero"),
            nffn + "fc1.weight": ((Fh, D), "linear"),    nffn + "fc2.weight": ((D, Fh), "linear"),
        })
        if not c.cema_omega: del table[mega + "cema.omega"]
        if c.swiglu: table[nffn + "fc3.weight"] = ((Fh, D), "linear")
        if c.rescale_nffn: table[nffn + "alpha"] = ((D,), 0.1 * 0.5**l)
    table.update({"output.final_norm.weight": ((D,), "zero"), "output.final_norm.bias": ((D,), "zero")})
    if not c.share_emb: table["output.output.weight"] = ((c.vocab_size, D), "embed")
    return table

def init_parameters(c, seed):
    torch.manual_seed(seed)
    params = {}
    for name, (shape, init) in parameters(c).items():
        w = torch.zeros(shape)
        if init == "embed":
            std = shape[1]**-0.5
            torch.nn.init.trunc_normal_(w, 0.0, std, -3 * std, 3 * std)
        elif init == "linear": w.normal_(0.0, (3 * shape[1])**-0.5)
        elif init == "normal": w.normal_(0.0, 0.2)
        elif init == "theta":  # sigmoid(theta) = exp(-i ln(D)/D), i = 1..D in random order over the channels
            w.view(-1)[:] = torch.logit(torch.exp(-(torch.randperm(shape[0]) + 1) * math.log(shape[0]) / shape[0]))
        elif init == "gamma": w[:, :, 0].normal_(0.0, 1.0 if c.cema_omega else c.cema_ndim**-0.5)
        elif init == "omega": torch.nn.init.trunc_normal_(w, 0.0, 0.25, -1.0, 1.0)
        elif init != "zero": w.fill_(init)
        params[name] = w
    return params

# ---------------------------------------------------------------------------------------------------------------------
# The model. Every norm stores its scale as an offset from one (eq. 23).

def timestep_norm(x, weight, bias, groups, eps, state=None):
    """eq. 4: norm over all features of a group and all timesteps so far; x (B,T,D)

    mu_t, var_t = mean, population variance over steps 1..t;  out = (x - mu_t)/sqrt(var_t + eps) * (weight + 1) + bias
    state: count (B), mean, var (B,G) of the steps before these. The moments of single steps are pooled by cumulative
    sums, in float64 and about a shift rho near the mean (any constant gives the same function): nothing cancels."""
    B, T, D = x.shape
    x = x.reshape(B, T, groups, D // groups)
    m = x.mean(-1)
    s = (x - m[..., None]).square().mean(-1).double()
    m = m.double()
    count, mean, var = state or (torch.zeros(B), m.new_zeros(B, groups), m.new_zeros(B, groups))
    rho = m.detach().mean(1, keepdim=True)
    before = count.double().view(B, 1, 1)
    n = before + torch.arange(1, T + 1).view(1, T, 1)
    shift = mean.double()[:, None] - rho
    s1 = (before * shift + (m - rho).cumsum(1)) / n
    s2 = (before * (var.double()[:, None] + shift**2) + (s + (m - rho)**2).cumsum(1)) / n
    mu, var = rho + s1, s2 - s1**2
    out = (x - mu.to(x.dtype)[..., None]) * (var + eps).rsqrt().to(x.dtype)[..., None]
    return torch.addcmul(bias, out.view(B, T, D), weight + 1), (count + T, mu[:, -1], var[:, -1])

def decay_norm(x, weight, bias, groups, eps, decays, state=None):
    """Gecko's norm: averages, which forget, of the means and variances of single timesteps; arguments as above. state:
    count, and both averages before their correction. In blocks of 256 timesteps: a product with powers of decay."""
    B, T, D = x.shape
    x = x.reshape(B, T, groups, D // groups)
    count, *before = state or (torch.zeros(B), *x.new_zeros(2, B, groups).double())
    n = count.double().view(B, 1, 1) + torch.arange(1, T + 1).view(1, T, 1)
    averages = []
    for decay, average, now in zip(decays, before, (x.mean(-1), x.var(-1, unbiased=False))):
        average, rows = average.double(), []
        for block in now.double().split(256, 1):
            j = torch.arange(block.shape[1])
            powers = (decay ** (j[:, None] - j).double()).tril() * (1 - decay)
            old = decay ** (j + 1).double()[:, None] * average[:, None]
            rows.append(torch.einsum("ts,bsg->btg", powers, block) + old)
            average = rows[-1][:, -1]
        averages.append(torch.cat(rows, 1))
    mu, var = (a / -torch.expm1(n * math.log(decay)) for a, decay in zip(averages, decays))
    out = (x - mu.to(x.dtype)[..., None]) * (var + eps).rsqrt().to(x.dtype)[..., None]
    return torch.addcmul(bias, out.view(B, T, D), weight + 1), (count + T, averages[0][:, -1], averages[1][:, -1])

def cema(x, alpha, delta, theta, gamma, omega, h=None):
    """eq. 2, 3, 5: complex exponential moving averages, N per channel; x (B,T,D)

    p = sigmoid(alpha), q = (1 - p sigmoid(delta)) exp(i theta_k), theta_k = sigmoid(theta) 2 pi k/N, g = gamma/sqrt(N)
    h_t = q h_{t-1} + p x_t;  out_t = Re(sum_k g h_t) + omega x_t     (eq. 2 also rotates x; omega is not in the paper)
    Computed as a convolution of x with Re(sum_k g p q^j), j = 0..T-1. state: h (B,D,N,2).
    omega None is Gecko's: out_t = Re(sum_k gamma h_t) + x_t."""
    B, T, D = x.shape
    N = alpha.shape[1]
    alpha, delta, theta = alpha.view(D, N, 1), delta.view(D, N, 1), theta.view(D, 1, 1)
    if omega is None: gamma, omega = gamma * math.sqrt(N), torch.ones(D, 1)
    # The coefficients are few, so float64 costs nothing, and it keeps the phase of q^j right for large j
    p, k = torch.sigmoid(alpha.double()[..., 0]), torch.arange(1, N + 1)
    log_radius = torch.log1p(-p * torch.sigmoid(delta.double()[..., 0]))
    angle = torch.sigmoid(theta.double()[..., 0]) * (2 * math.pi / N) * k
    g = torch.view_as_complex(gamma.double()) / math.sqrt(N)
    power = lambda j: torch.polar(torch.exp(log_radius[..., None] * j), angle[..., None] * j)  # q^j (D,N,len(j))
    # q^(a*S + b) = q^(a*S) q^b: two short tables, multiplied as real matrices (D, T/S, 2N) x (D, 2N, S)
    S = math.isqrt(T - 1) + 1
    high, low = (g * p)[..., None] * power(torch.arange(0, T, S)), power(torch.arange(S))
    high, low = torch.cat([high.real, -high.imag], 1).to(x.dtype), torch.cat([low.real, low.imag], 1).to(x.dtype)
    kernel = torch.bmm(high.transpose(1, 2), low).view(D, -1)[:, :T]
    n = 2 << (T - 1).bit_length() # padded to a power of two so that nothing wraps around
    out = torch.fft.irfft(torch.fft.rfft(x.transpose(1, 2), n) * torch.fft.rfft(kernel, n), n)[..., :T].transpose(1, 2)
    out = out + omega[:, 0] * x
    if h is not None:
        h = torch.view_as_complex(h.to(x.dtype))
        decay, inflow = power(torch.arange(1, T + 1)), p[..., None] * power(torch.arange(T - 1, -1, -1))
        out = out + torch.einsum("dkt,bdk->btd", (g[..., None] * decay).to(h.dtype), h).real
        h = decay[..., -1].to(h.dtype) * h + torch.einsum("dkt,btd->bdk", inflow.to(h.dtype), x.to(h.dtype))
        h = torch.view_as_real(h)
    return out, h

def rms_norm(x, eps):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

def rotations(start, T, c, d, base, dtype, turned=0, heads=1, more=0):
    """RoPE: complex numbers (T,1,d/2) that turn pairs (2j, 2j+1) by pos * base^(-2j/d), pos counted from the start of
    the chunk. The release forms these angles in float32, so every precision does: they are part of the function.
    turned: how many of the heads are turned, the first ones; 0 for all. more: added to the positions."""
    freqs = 1.0 / torch.tensor([base**(j / d) for j in range(0, d, 2)], dtype=torch.float32)
    pos = torch.arange(start, start + T) % c + more
    angle = (pos.float()[:, None] * freqs).to(dtype)[:, None]
    if turned: angle = angle * (torch.arange(heads) < turned)[:, None]
    return torch.polar(torch.ones_like(angle), angle)

def rotate(x, turn):  # x (B,T,H,d)
    x = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x * turn).flatten(-2)

class Dropout:
    """The masks of train_megalodon.c: pure functions of seed, row (the first sequence's number in training), timestep,
    layer, site and element. Rates are quantised to 1/65536."""
    SITES = "embed", "mega", "fc2", "rmsnorm", "gated", "hidden", "keys"

    def __init__(self, dropout=0, hidden_dropout=0, attention_dropout=0, seed=1337):
        self.drop = [round(float(rate) * 65536) for rate in (dropout, hidden_dropout, attention_dropout)]
        self.seed, self.row = int(seed), 0

    @staticmethod
    def mix(x):  # splitmix64's finalizer; uint64 arrays wrap around
        x = (x ^ (x >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        return x ^ (x >> numpy.uint64(31))

    def kept(self, l, site, B, T, heads, n):
        """which of n elements stay: booleans (B,T,heads,n)"""
        whole = lambda x: numpy.array([x & (1 << 64) - 1], dtype=numpy.uint64)
        site, golden, key = self.SITES.index(site), 0x9E3779B97F4A7C15, whole(self.seed)
        for add in golden, (3 << 56) + l, site: key = self.mix(key + whole(add * golden + golden))
        b, t, h, i = numpy.ogrid[self.row:self.row + B, :T, :heads, :n]
        b, t, h, i = (x.astype(numpy.uint64) for x in (b, t, h, i))
        bits = self.mix(self.mix(key + (b << numpy.uint64(32)) + t) + (h << numpy.uint64(32)) + i // numpy.uint64(4))
        bits = bits >> i % numpy.uint64(4) * numpy.uint64(16) & numpy.uint64(0xffff)
        return torch.from_numpy(bits >= self.drop[site // 3])

    def __call__(self, l, site, x):  # x (B,T,n)
        p = self.drop[self.SITES.index(site) // 3] / 65536
        return x * self.kept(l, site, x.shape[0], x.shape[1], 1, x.shape[2])[:, :, 0] / (1 - p) if p else x

def inner_attention(q, k, v, turn, c, cache=None, kept=None):
    """eq. 9: o = softmax(q k^T, causal) v within each chunk of c timesteps; q, k (B,T,H,Z/H), v (B,T,H,V/H)
    cache: rotated keys, and values, of the chunk that the first timestep continues. kept (B,T,H,c): keys that dropout
    leaves each query; where it leaves none, o is 0."""
    B, T, H, _ = q.shape
    q, k, past = rotate(q, turn), rotate(k, turn), 0
    if cache:
        past = cache[0].shape[1]
        k, v = (torch.cat([before.to(now.dtype), now], 1) for before, now in zip(cache, (k, v)))
    full = (past + T) // c * c
    cache = k[:, full:], v[:, full:]
    n = min(c, past + T)  # timesteps of a chunk; queries of the past, and what the last chunk lacks, are padding
    tail = -(past + T) % n
    pad = lambda a, front: F.pad(a, (0, 0, 0, 0, front, tail)) if front or tail else a
    chunks = lambda a, front=0: pad(a, front).reshape(-1, n, H, a.shape[-1]).transpose(1, 2)
    scores = chunks(q, past) @ chunks(k).transpose(2, 3) + torch.full((n, n), -math.inf, dtype=q.dtype).triu(1)
    if kept is None: p = torch.softmax(scores, -1)
    else: p = torch.softmax(scores.masked_fill(~chunks(kept[..., :n]), -1e9), -1) * chunks(kept[..., :n])
    o = p @ chunks(v)
    return o.transpose(1, 2).reshape(B, past + T + tail, -1)[:, past:past + T], cache

def two_chunk_attention(q, k, v, turn, turn_before, c, before, cache=None, kept=None):
    """Gecko's: softmax over the keys of the chunk before and those of the own chunk so far, in chunks of c timesteps.
    Keys are turned by their position in the chunk; queries by theirs, and for the chunk before by theirs + c.
    before: keys, values (B,c,H,.) of the chunk before the current one, chunks (B) so far. kept (B,T,2H,c): for the own
    chunk, then for the chunk before."""
    B, T, H, _ = q.shape
    q, q_before, k, past, out = rotate(q, turn), rotate(q, turn_before), rotate(k, turn), 0, []
    k_before, v_before, chunks = before
    if cache:
        past = cache[0].shape[1]
        k, v = (torch.cat([old.to(new.dtype), new], 1) for old, new in zip(cache, (k, v)))
    for first in range(0, past + T, c):
        last, start = min(first + c, past + T), max(first, past)
        now, t = slice(start - past, last - past), torch.arange(start, last)
        own = torch.einsum("bthd,bshd->bhts", q[:, now], k[:, first:last])
        own = own.masked_fill(t[:, None] < torch.arange(first, last), -math.inf)
        if first: k_before, v_before = k[:, first - c:first], v[:, first - c:first]
        old = torch.einsum("bthd,bshd->bhts", q_before[:, now], k_before.to(q.dtype))
        seen = (chunks + first // c > 0).view(B, 1, 1, 1)
        old = old.masked_fill(~seen, -math.inf)
        scores = torch.cat([old, own], -1)
        if kept is not None:
            mask = kept[:, now].transpose(1, 2)
            mask = torch.cat([mask[:, H:], mask[:, :H, :, :last - first]], -1)
            p = torch.softmax(scores.masked_fill(~mask, -1e9), -1) * mask
        else: p = torch.softmax(scores, -1)
        values = torch.cat([v_before.to(v.dtype), v[:, first:last]], 1)
        out.append(torch.einsum("bhts,bshe->bthe", p, values).flatten(2))
    return torch.cat(out, 1), (k, v)

def working_memory(aq, ak, v, c, lag, chunks, M, lam, before=None, past=0):
    """Gecko's memory of the chunks that attention does not see; aq (B,T,H,S), ak (B,past+T,H,S), v (B,past+T,H,E)
    before: ak and v of the chunk before; lag 2: it is not absorbed yet. Returns a (B,T,H*E), M and lam (B,H,S)"""
    B, T, out = len(aq), aq.shape[1], []
    filled = lambda i: (chunks + i >= lag).view(B, 1, 1)
    M, lam = torch.where(filled(0)[..., None], M, torch.zeros(())), torch.where(filled(0), lam, torch.tensor(-math.inf))
    M, lam = M.to(aq.dtype), lam.to(aq.dtype)
    for i, first in enumerate(range(0, past + T, c)):
        last, start = min(first + c, past + T), max(first, past)
        out.append(torch.einsum("bths,bhse->bthe", torch.softmax(aq[:, start - past:last - past], -1), M).flatten(2))
        j = (i + 1 - lag) * c
        if last < first + c: break
        keys, values = (ak[:, j:j + c], v[:, j:j + c]) if j >= 0 else (x.to(aq.dtype) for x in before)
        new = torch.logaddexp(lam, torch.logsumexp(keys, 1))
        rho = torch.exp(torch.logsumexp(keys, 1) - new)[..., None]
        answer = torch.einsum("bths,bhse->bthe", torch.softmax(keys, -1), M)
        W = torch.einsum("bths,bthe->bhse", torch.softmax(keys, 1), values - answer)
        there = filled(i + 1)
        M, lam = torch.where(there[..., None], M + rho * (W - M), M), torch.where(there, new, lam)
    return torch.cat(out, 1), M, lam

class Megalodon:
    """p: parameters by their released names. record: a dict that takes the activations, by their modules' names.
    dropout: a Dropout, in training."""
    def __init__(self, config, params):
        self.c, self.p, self.record, self.dropout = config, params, None, None

    def note(self, name, x):
        if self.record is not None:
            self.record[name] = x
            if x.requires_grad: x.retain_grad()
        return x

    def norm(self, name, x, state, new):  # timestep norm with its parameters and state
        keys, c = [f"{name}.{key}" for key in ("count", "mean", "var")], self.c
        args = x, self.p[name + ".weight"], self.p[name + ".bias"], c.norm_num_groups, c.norm_eps
        moments = state and [state[key] for key in keys]
        if c.norm_decay: x, moments = decay_norm(*args, (c.timenorm_beta1, c.timenorm_beta2), moments)
        else: x, moments = timestep_norm(*args, moments)
        new.update(zip(keys, moments))
        return self.note(name, x)

    def block(self, l, x, turn, state, new):
        """Figure 3"""
        c, mega = self.c, f"layers.{l}.mega"
        w = lambda name: self.p[f"layers.{l}.{name}"]
        note = lambda name, a: self.note(f"layers.{l}.{name}", a)
        linear = lambda name, a: F.linear(a, w(name + ".weight"), w(name + ".bias"))
        heads = lambda a: a.reshape(*a.shape[:-1], c.num_heads, -1)
        drop = lambda site, a: self.dropout(l, site, a) if self.dropout else a

        n = self.norm(f"{mega}.timenorm", x, state, new)
        coefficients = [w("mega.cema." + key) for key in ("alpha", "delta", "theta", "gamma")]
        coefficients += [w("mega.cema.omega") if c.cema_omega else None]
        e, new[f"{mega}.cema.h"] = cema(n, *coefficients, state and state[f"{mega}.cema.h"])
        e = note("mega.cema", e)
        m = rms_norm(e, c.norm_eps) * (w("mega.rmsnorm.weight") + 1)  # not in the paper's eqs.
        m = note("mega.rmsnorm", drop("rmsnorm", m))
        z = note("mega.znorm", rms_norm(heads(note("mega.wz", linear("mega.wz", m))), c.norm_eps))  # eq. 6
        gamma, beta = heads(w("mega.gamma") + 1) / math.sqrt(z.shape[-1]), heads(w("mega.beta"))
        q, k = torch.addcmul(beta[0], z, gamma[0]), torch.addcmul(beta[1], z, gamma[1])  # eq. 7, 8
        v = F.silu(note("mega.wv", linear("mega.wv", n)))  # eq. 16: of n, not m
        r = F.silu(note("mega.wr", linear("mega.wr", m)))  # eq. 18
        keys = f"{mega}.inner_attention.k", f"{mega}.inner_attention.v"
        key_heads = c.num_heads * (1 + c.sliding)
        kept = self.dropout and self.dropout.kept(l, "keys", *x.shape[:2], key_heads, c.chunk_size)
        cache, a = state and [state[key] for key in keys], 0
        if c.sliding or c.memory:
            o, a = self.window_and_memory(mega, l, q, k, heads(v), z, gamma, beta, turn, cache, kept, state, new)
        else:
            o, cache = inner_attention(q, k, heads(v), turn[0], c.chunk_size, cache, kept)
            new.update(zip(keys, cache))
            o = note("mega.inner_attention", o)
        # eq. 20 without its silu, and the first line of eq. 11
        y = linear("mega.wh1", m) + F.linear(drop("gated", o * r + a), w("mega.wh2.weight"))
        y = note("mega", drop("mega", y) + x)

        u = F.layer_norm(y, y.shape[-1:], w("nffn.norm.weight") + 1, w("nffn.norm.bias"), c.norm_eps)
        u = note("nffn.norm", u)
        f = F.silu(note("nffn.fc1", F.linear(u, w("nffn.fc1.weight"))))
        if c.swiglu: f = f * F.linear(u, w("nffn.fc3.weight"))
        f = drop("fc2", F.linear(drop("hidden", f), w("nffn.fc2.weight")))
        if c.rescale_nffn: f = w("nffn.alpha") * f
        return self.note(f"layers.{l}", f + (x if c.two_hop_residual else y))  # eq. 11, two-hop residual: x, not y

    def window_and_memory(self, mega, l, q, k, v, z, gamma, beta, turn, cache, kept, state, new):
        """Gecko's attention, and what its memory answers"""
        c, C, B, H = self.c, self.c.chunk_size, len(q), self.c.num_heads
        state = state or self.fresh_state(B)
        get = lambda name: state[f"{mega}.{name}"]
        put = lambda **tensors: new.update({f"{mega}.{name.replace('__', '.')}": t for name, t in tensors.items()})
        chunks, cache = get("chunks"), (get("inner_attention.k"), get("inner_attention.v"))
        past = cache[0].shape[1]
        if c.sliding:
            before = [get("inner_attention." + name).view(B, C, H, -1) for name in ("k_before", "v_before")]
            o, (k, v) = two_chunk_attention(q, k, v, *turn, C, (*before, chunks), cache, kept)
        else:
            o, _ = inner_attention(q, k, v, turn[0], C, cache, kept)
            k, v = (torch.cat([old.to(now.dtype), now], 1) for old, now in zip(cache, (rotate(k, turn[0]), v)))
        o = self.note(f"{mega}.inner_attention", o)
        a, whole = 0, (past + q.shape[1]) // C
        tail = lambda t: t[:, whole * C:]
        last = lambda t, name: t[:, (whole - 1) * C:whole * C].flatten(2) if whole else get(name)
        if c.memory:
            aq, ak = (torch.addcmul(beta[i], z, gamma[i]) for i in (2, 3))
            ak = torch.cat([get("memory.ak").to(ak.dtype), ak], 1)
            absorbed = (get("memory.ak_before").view(B, C, H, -1), before[1]) if c.sliding else None
            M, lam = get("memory.m").view(B, H, -1, c.value_dim // H), get("memory.lam").view(B, H, -1)
            a, M, lam = working_memory(aq, ak, v, C, 1 + c.sliding, chunks, M, lam, absorbed, past)
            a = self.note(f"{mega}.memory", a)
            put(memory__m=M.flatten(1, 2), memory__lam=lam.flatten(1), memory__ak=tail(ak))
            if c.sliding: put(memory__ak_before=last(ak, "memory.ak_before"))
        if c.sliding:
            put(inner_attention__k_before=last(k, "inner_attention.k_before"),
                inner_attention__v_before=last(v, "inner_attention.v_before"))
        put(chunks=chunks + whole, inner_attention__k=tail(k), inner_attention__v=tail(v))
        return o, a

    def __call__(self, tokens, state=None):
        """tokens (B,T) -> logits (B,T,vocab), new state. Without a state nothing is carried, neither in nor out."""
        c, new = self.c, {}
        start = state["layers.0.mega.inner_attention.k"].shape[1] if state else 0
        x = F.embedding(tokens, self.p["embed.weight"])
        x = self.note("embed", self.dropout(0, "embed", x) if self.dropout else x)
        args = x.shape[1], c.chunk_size, c.z_dim // c.num_heads, c.rope_base, x.dtype, c.num_rope_heads, c.num_heads
        turn = rotations(start, *args), rotations(start, *args, c.chunk_size)
        if c.scale_emb: x = x * math.sqrt(c.model_dim)
        for l in range(c.num_layers): x = self.block(l, x, turn, state, new)
        x = self.norm("output.final_norm", x, state, new)
        logits = F.linear(x, self.p["embed.weight" if c.share_emb else "output.output.weight"])
        return logits, new if state else None

    def fresh_state(self, B):
        """the state before the first token; the one __call__ returns has the same names"""
        c, state, zeros = self.c, {}, torch.zeros
        for name in [f"layers.{l}.mega.timenorm" for l in range(c.num_layers)] + ["output.final_norm"]:
            state[name + ".count"] = zeros(B, dtype=torch.int64)
            state[name + ".mean"], state[name + ".var"] = zeros(2, B, c.norm_num_groups)
        for l in range(c.num_layers):
            mega, H = f"layers.{l}.mega.", c.num_heads
            state[mega + "cema.h"] = zeros(B, c.model_dim, c.cema_ndim, 2)
            state[mega + "inner_attention.k"], state[mega + "inner_attention.v"] = \
                zeros(B, 0, H, c.z_dim // H), zeros(B, 0, H, c.value_dim // H)
            if c.architecture == "gecko": state[mega + "chunks"] = zeros(B, dtype=torch.int64)
            for name, width in ("k_before", c.z_dim), ("v_before", c.value_dim):
                if c.sliding: state[mega + "inner_attention." + name] = zeros(B, c.chunk_size, width)
            if c.memory:
                state[mega + "memory.ak"] = zeros(B, 0, H, c.z_dim // H)
                state[mega + "memory.m"] = zeros(B, c.z_dim, c.value_dim // H)
                state[mega + "memory.lam"] = zeros(B, c.z_dim)
                if c.sliding: state[mega + "memory.ak_before"] = zeros(B, c.chunk_size, c.z_dim)
        return state

def cross_entropy(logits, y):
    """losses (B,T) in nats, 0 where the target is -100, and their mean over the other targets"""
    losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none", ignore_index=-100)
    return losses, losses.sum() / (y != -100).sum()

def train_step(model, optimizer, x, y, clip, state=None):
    optimizer.zero_grad(set_to_none=True)
    loss = cross_entropy(model(x, state)[0], y)[1]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(list(model.p.values()), clip)
    optimizer.step()
    return loss.item(), norm.item()

def adamw(model, lr, weight_decay, betas, eps):  # one group: every parameter decays, norms too
    return torch.optim.AdamW(list(model.p.values()), lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)

# ---------------------------------------------------------------------------------------------------------------------
# Files

def read(path):
    try:
        with safe_open(regular(path), "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except SafetensorError as e:
        raise Failure(f"{path}: not a safetensors file: {e}") from None

def write(path, tensors, metadata):
    data = save({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}, metadata)
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header["__metadata__"] = dict(sorted(metadata.items()))  # safetensors writes it in any order; we, the same bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + data[size:])
    print(f"{path}: {len(tensors)} tensors, {os.path.getsize(path):,} bytes")

def config_of(metadata):
    fields = {"architecture": metadata.get("architecture", "megalodon")}
    for name, kind in [(name, kind) for name, _, kind, *_ in CONFIG] + [row[:2] for row in GECKO_CONFIG]:
        try:
            fields.update({name: kind(metadata[name])} if name in metadata else {})
        except ValueError:
            raise Failure(f"{name} is {metadata[name]!r}, expected a number") from None
    return Config(**fields)

def matching(path, config, tensors):
    """the parameters of a config out of a file's tensors, or a line about the first that is not as it should be"""
    for name, (shape, _) in parameters(config).items():
        if name not in tensors: raise Failure(f"{path}: no tensor {name}")
        if tensors[name].shape != shape:
            raise Failure(f"{path}: {name} is {tuple(tensors[name].shape)}, but the config asks for {shape}")
    return {name: tensors[name].float() for name in parameters(config)}

# ---------------------------------------------------------------------------------------------------------------------
# Dumps

def compute(given, meta, dtype, stream):
    """everything a dump holds, by its names, from its x, y, param.* and state.*; the first `stream` tokens streamed"""
    c = config_of(meta)
    part = lambda prefix: {name[len(prefix):]: t.to(dtype).clone().requires_grad_() if t.is_floating_point() else t
                           for name, t in given.items() if name.startswith(prefix)}
    x, y, model, state, out = given["x"].long(), given["y"].long(), Megalodon(c, part("param.")), part("state."), {}
    state = {**model.fresh_state(len(x)), **state} if state else None
    model.record = {}
    dropout = {name[5:]: meta[name] for name in meta if name.endswith("dropout") or name == "flag.seed"}
    model.dropout = Dropout(**dropout) if dropout else None
    out["logits"], _ = model(x, state)
    out["losses"], loss = cross_entropy(out["logits"], y)
    out["loss"] = loss.view(1)
    loss.backward()
    out.update({"act." + name: t for name, t in model.record.items()})
    out.update({"dact." + name: t.grad for name, t in model.record.items()})
    out.update({"grad." + name: t.grad for name, t in model.p.items()})
    unused = lambda t: torch.zeros_like(t) if t.grad is None else t.grad
    out.update({"dstate." + name: unused(t) for name, t in (state or {}).items() if t.requires_grad})
    model.record, state = None, state and {name: t.detach() for name, t in state.items()}
    if stream:  # the first chunk at once, then token by token
        with torch.no_grad():
            carried, pieces = model.fresh_state(len(x)), []
            for piece in x[:, :stream].tensor_split(tuple(range(min(c.chunk_size, stream), stream)), 1):
                logits, carried = model(piece, carried)
                pieces.append(logits)
        out["stream_logits"] = torch.cat(pieces, 1)
    if "train_steps" in meta:
        lr, decay, beta1, beta2, eps, clip = (float(meta[name]) for name in TRAINING)
        optimizer = adamw(model, lr, decay, (beta1, beta2), eps)
        steps = []
        for step in range(int(meta["train_steps"])):
            if dropout: model.dropout.row = step * len(x)
            steps.append(train_step(model, optimizer, x, y, clip, state))
        out["train_losses"], out["train_gnorms"] = torch.tensor(steps, dtype=torch.float64).T
        out.update({"final." + name: t for name, t in model.p.items()})
    return {name: t.detach() for name, t in out.items()}

TRAINING = dict(learning_rate="0.001", weight_decay="0.1", beta1="0.9", beta2="0.95", adam_eps="1e-08", grad_clip="0.5")
SMALL = dict(num_layers=2, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=24, chunk_size=16, norm_num_groups=4,
             vocab_size=40)
DUMPS = {  # B, T, training steps, whether a state is carried in, config
    # several chunks, the last one short; one head; trains; streams
    "chunks": (2, 37, 5, False, dict(SMALL, value_dim=48, ffn_hidden_dim=40, swiglu=0)),
    # less than a chunk; swiglu, tied and scaled embeddings; two heads; trains
    "tied": (3, 13, 4, False, dict(SMALL, num_heads=2, norm_num_groups=2, cema_ndim=8, vocab_size=48, share_emb=1,
                                   scale_emb=1)),
    # odd sizes; chunks; three heads; N = 5; rescaled feed-forward; other rope_base and norm_eps; trains; streams
    "odd": (2, 29, 3, False, dict(SMALL, model_dim=33, num_heads=3, z_dim=18, value_dim=27, ffn_hidden_dim=21,
                                  chunk_size=7, norm_num_groups=3, cema_ndim=5, vocab_size=53, rescale_nffn=1,
                                  rope_base=1e5, norm_eps=1e-4)),
    # a state carried in, rows with different counts (one of them 0), over several chunks
    "state": (3, 19, 0, True, dict(SMALL, num_heads=2, chunk_size=8, swiglu=0, scale_emb=1)),
    # one timestep: from nothing, and with a state carried in
    "one": (2, 1, 0, False, dict(SMALL, value_dim=48, rescale_nffn=1)),
    "one_state": (3, 1, 0, True, dict(SMALL, num_layers=1, model_dim=36, num_heads=2, z_dim=12, value_dim=20,
                                      chunk_size=4, norm_num_groups=3, cema_ndim=5, share_emb=1)),
    # to be cut into 2, 3 or 4 slices of whole chunks; a state carried in; trains
    "slices": (3, 24, 4, True, dict(SMALL, model_dim=24, z_dim=8, value_dim=20, ffn_hidden_dim=16, chunk_size=2,
                                    norm_num_groups=3, cema_ndim=6, vocab_size=32)),
    # all dropouts, of odd sizes, several chunks, two heads; some queries lose all keys; trains
    "dropout": (2, 23, 3, False, dict(SMALL, model_dim=30, num_heads=2, value_dim=26, ffn_hidden_dim=27, chunk_size=9,
                                      norm_num_groups=3, cema_ndim=4, rescale_nffn=1, scale_emb=1)),
}
# Where a pair of features hardly turns, a shift of all keys hardly changes anything. Its gradient is all rounding, and
# AdamW makes steps of it. So those that train have a small rope_base, and positions in all heads.
GECKO = dict(SMALL, architecture="gecko", chunk_size=8, rope_base=30)
GECKO_DUMPS = {
    # one head, more than five chunks, the last one short; trains; streams
    "window": (2, 43, 5, False, dict(GECKO, value_dim=48, ffn_hidden_dim=40, swiglu=0, cema_ndim=8)),
    # odd sizes; three heads; faster decays; rescaled feed-forward; trains; streams
    "heads": (2, 40, 3, False, dict(GECKO, model_dim=33, num_heads=3, z_dim=18, value_dim=27, ffn_hidden_dim=21,
                                    chunk_size=7, norm_num_groups=3, cema_ndim=5, vocab_size=53, rescale_nffn=1,
                                    timenorm_beta1=0.9, timenorm_beta2=0.95, norm_eps=1e-4)),
    # less than two chunks; swiglu, tied and scaled embeddings; trains; streams
    "short": (2, 13, 4, False, dict(GECKO, num_layers=1, num_heads=2, norm_num_groups=2, vocab_size=48, share_emb=1,
                                    scale_emb=1)),
    # a state carried in, rows with different counts (one of them 0, one of a single chunk), several chunks; one head of
    # two has positions
    "state": (3, 27, 0, True, dict(GECKO, num_layers=1, num_heads=2, swiglu=0, num_rope_heads=1, rope_base=500000)),
    # one timestep: from nothing, and with a state carried in
    "one": (2, 1, 0, False, dict(GECKO, value_dim=48)),
    "one_state": (3, 1, 0, True, dict(GECKO, num_layers=1, model_dim=36, num_heads=2, z_dim=12, value_dim=20,
                                      chunk_size=4, norm_num_groups=3, cema_ndim=5, share_emb=1)),
    # to be cut into 2, 3 or 4 slices of whole chunks; a state carried in; trains
    "slices": (3, 24, 4, True, dict(GECKO, model_dim=24, z_dim=8, value_dim=20, ffn_hidden_dim=16, chunk_size=2,
                                    norm_num_groups=3, cema_ndim=6, vocab_size=32)),
    # all dropouts; some queries lose all keys; trains
    "dropout": (2, 29, 3, False, dict(GECKO, model_dim=30, num_heads=2, value_dim=26, ffn_hidden_dim=27, chunk_size=9,
                                      norm_num_groups=3, cema_ndim=4, rescale_nffn=1)),
    # half of the way from Megalodon: a window without a memory, and a memory without a window
    "no_memory": (2, 29, 0, True, dict(GECKO, num_layers=1, norm_decay=0, cema_omega=1, memory=0)),
    "no_window": (3, 28, 0, True, dict(GECKO, num_layers=1, num_heads=2, sliding=0, two_hop_residual=1)),
}
DROPOUT = {"flag.dropout": "0.2", "flag.hidden_dropout": "0.1", "flag.attention_dropout": "0.3", "flag.seed": "5"}

def dump(args):
    gecko = args.architecture == "gecko"
    dumps, folder = (GECKO_DUMPS, "dev/gecko/reference") if gecko else (DUMPS, "data/reference")
    args.out = args.out or folder
    os.makedirs(args.out, exist_ok=True)
    # Seeds from 6: with some, a training step meets a gradient so near zero that rounding alone moves `final` by 3e-4.
    for seed, (name, (B, T, steps, carried, fields)) in enumerate(dumps.items(), 6):
        c, given = Config(**fields), {}
        meta = {"format": "megalodon-dump", **c.strings(), **(dict(TRAINING, train_steps=str(steps)) if steps else {}),
                **(DROPOUT if name == "dropout" else {})}
        for key, w in init_parameters(c, seed).items():  # nothing stays at zero, or the same throughout
            given["param." + key] = w * (1 + 0.1 * torch.randn(w.shape)) + (w == 0) * 0.2 * torch.randn(w.shape)
        tokens = torch.randint(c.vocab_size, (B, T + 1), dtype=torch.int32)
        given["x"], given["y"] = tokens[:, :-1], tokens[:, 1:]
        if name in ("tied", "odd", "state", "slices"): given["y"] = given["y"].masked_fill(torch.rand(B, T) < 0.2, -100)
        for key, t in Megalodon(c, {}).fresh_state(B).items() if carried else ():
            if not t.numel(): continue  # of the current chunk; at its start there are none
            # row 0: as the release starts, count 0, mean 0, variance 1, h 0
            many = 1 if c.architecture == "gecko" else 3
            if key.endswith("count"): t = torch.tensor([0, many, 1000])[:B] * c.chunk_size
            elif key.endswith("chunks"): t = torch.tensor([0, many, 1000])[:B]
            elif key.endswith("var"): t = torch.cat([torch.ones(1, t.shape[1]), 0.5 + torch.rand(t.shape)[1:]])
            else:  # a memory of a single chunk holds nothing
                t = 0.3 * torch.randn(t.shape) * (torch.arange(B) > ("memory.m" in key or "lam" in key)).view(
                    -1, *[1] * (t.dim() - 1))
            given["state." + key] = t
        # Computed in float64, stored in float32: who compares sees his own rounding and no one else's. Training too:
        # Adam divides by the gradient's size, so a gradient that is all rounding would become a step of lr either way.
        out = compute(given, meta, torch.float64,
                      T if T > c.chunk_size and not carried and name != "dropout" else 0)
        write(os.path.join(args.out, name + ".safetensors"), {**given, **{k: t.float() for k, t in out.items()}}, meta)

BOUNDS = dict(dact=2e-5, grad=2e-5, dstate=2e-5, train_losses=2e-6, train_gnorms=2e-6, final=1e-3)  # any other: 1e-5

def check(args):
    okay = True

    def judge(name, error, bound, where=""):
        nonlocal okay
        good = error <= bound  # which a NaN is not
        okay &= good
        if not (good and args.quiet):
            print(f"{'okay' if good else 'FAIL'}  {name:40} error {error:.1e} of {bound:.0e}  {where}")

    for path in args.files:
        given, meta = read(path)
        matching(path, config_of(meta), {name[6:]: t for name, t in given.items() if name.startswith("param.")})
        stream = given["stream_logits"].shape[1] if "stream_logits" in given else 0
        ours = compute(given, meta, getattr(torch, args.dtype), stream)
        bound_of = lambda name: BOUNDS.get(name.split(".")[0], 1e-5)
        largest = max((t.abs().max().item() for name, t in given.items() if bound_of(name) == 2e-5), default=0.0)
        worst, skipped, moved = {}, 0, [0.0, 0.0]
        for name, b in given.items():
            kind, a, bound = name.split(".")[0], ours.get(name), bound_of(name)
            if kind in ("x", "y", "param", "state"): continue
            if a is None: skipped += 1; continue
            if a.shape != b.shape: raise Failure(f"{path}: {name} is {tuple(b.shape)}, not {tuple(a.shape)}")
            diff, b, where = (a.double() - b.double()).abs(), b.double(), ""
            if kind == "final":  # no single entries: Adam turns a gradient of rounding size into a step of lr
                squares = diff.square().sum().item(), (b - given["param." + name[6:]]).square().sum().item()
                moved = [moved[0] + squares[0], moved[1] + squares[1]]
                error = math.sqrt(squares[0] / max(squares[1], 1e-60))
            else:
                error = diff.max().item() / max(b.abs().max().item(), 1e-4 * largest if bound == 2e-5 else 0.0, 1e-30)
                where = f"at {tuple(map(int, numpy.unravel_index(diff.argmax().item(), b.shape)))}"
            judge(name, error, bound, where)
            worst[kind] = max(error, worst.get(kind, 0.0))  # in this order a NaN stays
        if moved[1]:
            worst["final, all"] = math.sqrt(moved[0] / moved[1])
            judge("final, all together", worst["final, all"], 1e-4)
        print(f"{path}: {args.dtype}, skipped {skipped}; worst " + ", ".join(f"{k} {e:.1e}" for k, e in worst.items()))
    print(f"overall okay: {int(okay)}")
    sys.exit(not okay)

# ---------------------------------------------------------------------------------------------------------------------
# Weights in and out, timing

def given_fields(args):
    return {name: getattr(args, name) for name, *_ in CONFIG if getattr(args, name) is not None}

def convert(args):
    try:  # weights_only: a file of strangers must not run code
        weights = torch.load(regular(args.input), map_location="cpu", weights_only=True)
        weights = {name: t for name, t in weights.items() if torch.is_tensor(t)}
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, KeyError):
        raise Failure(f"{args.input}: not a .pth file that holds tensors by name, and nothing else") from None
    buffers = "rope.freqs", ".prior_count", ".prior_mean", ".prior_logv"
    weights = {name: t for name, t in weights.items() if not name.endswith(buffers)}
    mega, nffn, head, fields = "layers.0.mega.", "layers.0.nffn.", weights.get("output.output.weight"), {}
    for field, name, i in (("vocab_size", "embed.weight", 0), ("model_dim", "embed.weight", 1),
                           ("z_dim", mega + "wz.weight", 0), ("value_dim", mega + "wv.weight", 0),
                           ("ffn_hidden_dim", nffn + "fc1.weight", 0), ("cema_ndim", mega + "cema.alpha", 1)):
        if name not in weights: raise Failure(f"{args.input}: no tensor {name}, so not a released state_dict")
        fields[field] = weights[name].shape[i]
    fields["num_layers"] = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    fields["swiglu"], fields["rescale_nffn"] = int(nffn + "fc3.weight" in weights), int(nffn + "alpha" in weights)
    fields["share_emb"] = int(head is None or torch.equal(head, weights["embed.weight"]))
    for field, value in given_fields(args).items():
        if fields.setdefault(field, value) != value:
            raise Failure(f"{args.input}: {field} is {fields[field]} by its tensors, but {value} was asked for")
    for field in "num_heads", "chunk_size", "norm_num_groups":  # a wrong one would load, and compute something else
        if field not in fields: raise Failure(f"{args.input}: no tensor shows {field}, so give it")
    c = Config(**fields)
    if c.share_emb: weights.pop("output.output.weight", None)
    for name in weights.keys() - parameters(c).keys(): raise Failure(f"{args.input}: unknown tensor {name}")
    write(args.output, matching(args.input, c, weights), c.strings())
    print(" ".join(f"{name}={value}" for name, value in c.strings().items()))

def init(args):
    c = Config(**given_fields(args))
    params = init_parameters(c, args.seed)
    write(args.output, params, c.strings())
    print(f"num_parameters: {sum(w.numel() for w in params.values())}")

def evaluate(args):
    weights, meta = read(args.file)
    c = config_of({**meta, **given_fields(args)})
    with open(regular(args.text), "rb") as f:
        text = torch.tensor(list(f.read(args.seq + 1 if args.seq else -1)))
    if len(text) < 2: raise Failure(f"{args.text}: {len(text)} bytes, but at least 2 are needed")
    if text.max() >= c.vocab_size: raise Failure(f"{args.text}: byte {text.max()}, vocab_size {c.vocab_size}")
    dtype, params = getattr(torch, args.dtype), matching(args.file, c, weights)
    model = Megalodon(c, {name: w.to(dtype) for name, w in params.items()})
    with torch.no_grad():
        loss = cross_entropy(model(text[None, :-1])[0], text[None, 1:])[1].item()
    print(f"eval: tokens {len(text) - 1} nats/token {loss:.6f} perplexity {math.exp(loss):.4f} "
          f"bits/byte {loss / math.log(2):.6f}")

def bench(args):
    if args.threads: torch.set_num_threads(args.threads)
    c = Config(**given_fields(args))
    model = Megalodon(c, {name: w.requires_grad_() for name, w in init_parameters(c, 1).items()})
    optimizer, times = adamw(model, 1e-3, 0.1, (0.9, 0.95), 1e-8), []
    for _ in range(args.warmup + args.steps):
        tokens, start = torch.randint(c.vocab_size, (args.batch, args.seq + 1)), time.perf_counter()
        train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], 1.0)
        times.append(1e3 * (time.perf_counter() - start))
    print(f"reference.py: step {statistics.median(times[args.warmup:]):.1f} ms")

def main():
    parser = Parser(__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(function, help, config=None):
        name = function.__name__.replace("evaluate", "eval")
        p = commands.add_parser(name, help=help, description=help)
        p.set_defaults(function=function)
        group = config and p.add_argument_group("config", config)
        for field, other, kind, default, text in CONFIG if config else ():
            flags = ["--" + name.replace("_", "-") for name in (field, other) if name]
            metavar = "0|1" if kind is bit else kind.__name__.upper()
            group.add_argument(*flags, dest=field, type=kind, metavar=metavar, help=f"{text} ({default})")
        return p

    p = command(dump, "write the dumps that the tests read")
    p.add_argument("--architecture", choices=("megalodon", "gecko"), default="megalodon", help="(megalodon)")
    p.add_argument("--out", help="folder (data/reference, of Gecko dev/gecko/reference)")
    p = command(check, "recompute every tensor of dumps and compare; exit 1 if one is out of bounds")
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--quiet", action="store_true", help="print failures and summaries only")
    p.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="to compute in (float32)")
    p = command(convert, "turn a released .pth state_dict into safetensors",
                "most are read off the tensors; give heads, chunk, groups; scale_emb, rope_base, norm_eps (default)")
    p.add_argument("input", metavar="IN.pth")
    p.add_argument("output", metavar="OUT.safetensors")
    p = command(init, "write a freshly initialised model", "(default)")
    p.add_argument("output", metavar="OUT.safetensors")
    p.add_argument("--seed", type=int, default=1, help="of the random numbers (1)")
    p = command(evaluate, "mean loss of a checkpoint over a text in one pass, a byte being a token",
                "(default); from the file's metadata unless given")
    p.add_argument("file", metavar="FILE.safetensors")
    p.add_argument("text", metavar="TEXT")
    p.add_argument("--seq", type=int, default=0, metavar="N", help="tokens to score, from the start of the text (all)")
    p.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="to compute in (float32)")
    p = command(bench, "time a training step (forward, backward, clip, AdamW) in float32 on random tokens", "(default)")
    for name, default, text in (("batch", 4, "sequences"), ("seq", 1024, "tokens of each"), ("threads", 0, "0: any"),
                                ("warmup", 2, "steps not timed"), ("steps", 5, "steps timed; prints the median")):
        p.add_argument("--" + name, type=int, default=default, metavar="N", help=f"{text} ({default})")
    args = parser.parse_args()
    args.function(args)

if __name__ == "__main__":
    main_of(main, "dev")
