"""How fast does PyTorch train the models that we train, on one CUDA device?

    pip install torch
    python scripts/peers/pytorch_cuda.py --runs 125m:bit,125m:full,2b4t:bit:batch=4
    python scripts/peers/pytorch_cuda.py --device cpu --runs tiny:bit,tiny:full --batch 2 --seq 32 --steps 3

A LLaMA-style BitNet b1.58 (RMSNorm with sub-norms, RoPE over half rotations, grouped-query attention,
squared-ReLU gate, tied head) or the same in full precision, as one would write it to be fast: f32
masters and bf16 products, one product for q, k, v and one for gate, up, torch.compile, fused attention,
fused AdamW, gradients clipped to 1.0, TF32 for what is left in f32, synthetic ids made beforehand.

A run is SHAPE:bit or SHAPE:full, with :KEY=VALUE for whatever differs from the options of the same name:

    variant   detach     x + (quant(x) - x).detach(), left to the compiler
              function   an autograd.Function that keeps the quantised x and w in bf16
              int8       the same with an int8 product forward (backward in bf16)
    mode      default | max-autotune-no-cudagraphs | eager
    scope     block      one block is compiled and used for all (seconds to compile)
              model      the whole model is one graph (minutes, for deep ones)
    graph     1          the whole step, optimizer included, is one CUDA graph: nothing waits for Python
    attn      auto       cudnn and flash, with grouped heads or repeated ones, are timed; the fastest is used
              cudnn | flash | cudnn-repeat | flash-repeat
    ce        torch      cross_entropy of all logits (bf16, widened inside the compiled kernel)
              chunked    the head's gradients chunk by chunk in the forward pass
              auto       both are timed at the run's shape, the faster is used
    residual  bf16 | f32
    batch, seq, steps, warmup, ce-chunks, and the shape's hidden, layers, heads, kv-heads, head-dim, ffn, vocab

Each run prints a line when it is done (with --json an object). One that runs out of memory or fails
says so, and the next begins. --isolate gives each run a process, --run-timeout bounds it there;
--budget begins no run after so many seconds. Exits with 1 when a run failed.

tokens/s and ms/step are of the median step between CUDA events; wall_ms is the mean by the clock of the
host over all timed steps, so that a gap between the two shows. The time to compile is that of the first
step above the median, stated apart. The peak of memory is of the steps after the first.

Operations a token, T ids a sequence, H heads of d, counted with or without sub-norms and quantisers alike:

    6 x (parameters of all matrices, the head once) + 6 x layers x T x H x d

the latter being causal attention: 2 x T x H x d a layer forward (half of the square), twice that backward.
Nothing is counted for what is recomputed. Utilisation is against --peak-tflops (dense bf16), for int8 too.
"""

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F

SHAPES = {  # hidden, layers, heads, kv_heads, head_dim, ffn, vocab
    "tiny": (64, 2, 4, 2, 16, 160, 512),
    "125m": (768, 12, 12, 12, 64, 2048, 32000),
    "350m": (1024, 24, 16, 16, 64, 2816, 32000),
    "1b": (2048, 24, 16, 16, 128, 5632, 32000),
    "2b4t": (2560, 30, 20, 5, 128, 6912, 128256),
}
SHAPE_KEYS = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocab")
CHOICES = {
    "linear": ("bit", "full"),
    "variant": ("detach", "function", "int8"),
    "mode": ("default", "max-autotune-no-cudagraphs", "eager"),
    "scope": ("block", "model"),
    "attn": ("auto", "cudnn", "flash", "cudnn-repeat", "flash-repeat"),
    "ce": ("torch", "chunked", "auto"),
    "residual": ("bf16", "f32"),
}
NUMBERS = ("batch", "seq", "steps", "warmup", "graph", "ce_chunks") + SHAPE_KEYS
EPS = 1e-5
BF16 = torch.bfloat16


# --- the quantisers ---


def row_scales(w, sections):
    """1 / mean|w| of each of the matrices stacked in w, as a column with a number a row."""
    parts = w.split(sections)
    return torch.cat([p.abs().mean().clamp(min=EPS).reciprocal().expand(p.shape[0]) for p in parts]).unsqueeze(1)


def trits(w, scale):
    return (w * scale).round().clamp(-1, 1)


def token_scales(x):
    return 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=EPS)


def levels(x, scale):
    return (x * scale).round().clamp(-128, 127)


class Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, w_scale):
        x_scale = token_scales(x)
        xq = (levels(x, x_scale) / x_scale).to(BF16)
        wq = (trits(w, w_scale) / w_scale).to(BF16)
        ctx.save_for_backward(xq, wq)
        return xq @ wq.t()

    @staticmethod
    def backward(ctx, dy):
        xq, wq = ctx.saved_tensors
        dy = dy.to(BF16)
        return (dy @ wq).float(), (dy.t() @ xq).float(), None


class TernaryInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, w_scale):
        x_scale = token_scales(x)
        xi = levels(x, x_scale).to(torch.int8)
        wt = trits(w, w_scale).to(torch.int8)
        ctx.save_for_backward(xi, wt, x_scale, w_scale)
        return (torch._int_mm(xi, wt.t()).float() / (x_scale * w_scale.t())).to(BF16)

    @staticmethod
    def backward(ctx, dy):
        xi, wt, x_scale, w_scale = ctx.saved_tensors
        dy = dy.to(BF16)
        dx = dy @ (wt.float() / w_scale).to(BF16)
        dw = dy.t() @ (xi.float() / x_scale).to(BF16)
        return dx.float(), dw.float(), None


def product(run, x, w, sections):
    """x (tokens, in), in f32, times the matrices stacked in w: (tokens, out) in bf16."""
    if run["linear"] == "full":
        return F.linear(x.to(BF16), w.to(BF16))
    if run["variant"] == "detach":
        xs, ws = token_scales(x), row_scales(w, sections)
        xq = x + (levels(x, xs) / xs - x).detach()
        wq = w + (trits(w, ws) / ws - w).detach()
        return F.linear(xq.to(BF16), wq.to(BF16))
    kind = Ternary if run["variant"] == "function" else TernaryInt8
    return kind.apply(x, w, row_scales(w.detach(), sections))


# --- the model ---


def rms_norm(x, weight):
    x = x.float()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def make_embed(run):
    dtype = BF16 if run["residual"] == "bf16" else torch.float32
    return lambda ids, table: F.embedding(ids, table).to(dtype)


def make_block(run):
    heads, kv, dim, ffn = run["heads"], run["kv_heads"], run["head_dim"], run["ffn"]
    repeat = heads // kv if run["attn"].endswith("-repeat") else 1
    grouped = {"enable_gqa": True} if heads != kv and repeat == 1 else {}

    def block(x, cos, sin, norm1, qkv, sub1, out, norm2, gate_up, sub2, down):
        b, t, hidden = x.shape
        x = x.view(b * t, hidden)
        h = product(run, rms_norm(x, norm1), qkv, [heads * dim, kv * dim, kv * dim])
        h = h.view(b, t, heads + 2 * kv, dim)
        lo, hi = h[:, :, : heads + kv].float().chunk(2, -1)
        turned = torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1).to(BF16).transpose(1, 2)
        q, k, v = turned[:, :heads], turned[:, heads:], h[:, :, heads + kv :].transpose(1, 2)
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        a = a.transpose(1, 2).reshape(b * t, heads * dim)
        x = x + product(run, rms_norm(a, sub1), out, [hidden])
        h = product(run, rms_norm(x, norm2), gate_up, [ffn, ffn])
        gate = F.relu(h[:, :ffn].float())
        x = x + product(run, rms_norm(gate * gate * h[:, ffn:], sub2), down, [hidden])
        return x.view(b, t, hidden)

    return block


class ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, table, targets, chunks):
        w = table.to(BF16)
        total = torch.zeros((), device=h.device)
        dw = torch.zeros_like(table)
        dh = []
        for part, wanted in zip(h.chunk(chunks), targets.chunk(chunks)):
            logits = (part @ w.t()).float()
            lse = logits.logsumexp(-1, keepdim=True)
            wanted = wanted.unsqueeze(1)
            total = total + (lse - logits.gather(1, wanted)).sum()
            hit = torch.arange(w.shape[0], device=h.device) == wanted
            d = (((logits - lse).exp() - hit.float()) / h.shape[0]).to(BF16)
            dh.append(d @ w)
            dw = dw + (d.t() @ part)
        ctx.save_for_backward(torch.cat(dh), dw)
        return total / h.shape[0]

    @staticmethod
    def backward(ctx, g):
        dh, dw = ctx.saved_tensors
        return (dh * g).to(BF16), dw * g, None, None


def make_head(run):
    def head(x, norm, table, targets):
        h = rms_norm(x, norm).to(BF16).view(-1, x.shape[-1])
        if run["ce"] == "chunked":
            return ChunkedLoss.apply(h, table, targets.view(-1), run["ce_chunks"])
        return F.cross_entropy(F.linear(h, table.to(BF16)).float(), targets.view(-1))

    return head


def compiled(run, f):
    return f if run["mode"] == "eager" else torch.compile(f, mode=run["mode"], dynamic=False)


class Model:
    def __init__(self, run, device):
        hidden, ffn, dim = run["hidden"], run["ffn"], run["head_dim"]
        attention, kv = run["heads"] * dim, run["kv_heads"] * dim
        g = torch.Generator(device).manual_seed(0)

        def matrix(rows, columns):
            w = torch.empty(rows, columns, device=device).normal_(0, 0.02, generator=g)
            return w.requires_grad_()

        def ones(n):
            return torch.ones(n, device=device, requires_grad=True)

        self.table = matrix(run["vocab"], hidden)
        self.blocks = [
            [ones(hidden), matrix(attention + 2 * kv, hidden), ones(attention), matrix(hidden, attention),
             ones(hidden), matrix(2 * ffn, hidden), ones(ffn), matrix(hidden, ffn)]
            for _ in range(run["layers"])
        ]
        self.norm = ones(hidden)
        rates = 500000.0 ** (-torch.arange(0, dim, 2, device=device).float() / dim)
        angles = torch.outer(torch.arange(run["seq"], device=device).float(), rates).unsqueeze(1)
        self.cos, self.sin = angles.cos(), angles.sin()
        parts = make_embed(run), make_block(run), make_head(run)
        if run["scope"] == "block":
            self.embed, self.block, self.head = (compiled(run, f) for f in parts)
            self.loss = self.forward
        else:
            self.embed, self.block, self.head = parts
            self.loss = compiled(run, self.forward)

    def forward(self, ids, targets):
        x = self.embed(ids, self.table)
        for parameters in self.blocks:
            x = self.block(x, self.cos, self.sin, *parameters)
        return self.head(x, self.norm, self.table, targets)

    def parameters(self):
        return [self.table, self.norm] + [p for block in self.blocks for p in block]


def flops_per_token(run):
    attention, kv = run["heads"] * run["head_dim"], run["kv_heads"] * run["head_dim"]
    layer = run["hidden"] * (2 * attention + 2 * kv + 3 * run["ffn"])
    matrices = run["layers"] * layer + run["vocab"] * run["hidden"]
    return 6 * matrices + 6 * run["layers"] * run["seq"] * attention


# --- what is chosen by timing ---


def use_attention(name):
    """Allows one implementation only; the name without its -repeat, or auto for PyTorch's own choice."""
    name = name.removesuffix("-repeat")
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp(name in ("flash", "auto"))
    cuda.enable_cudnn_sdp(name in ("cudnn", "auto"))
    cuda.enable_mem_efficient_sdp(name == "auto")
    cuda.enable_math_sdp(name == "auto")


def time_cuda(f, warmup=2, repeats=5):
    times = []
    for i in range(warmup + repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        b.synchronize()
        if i >= warmup:
            times.append(a.elapsed_time(b))
    return statistics.median(times)


def attention_times(run):
    """ms of attention forward and backward at the run's shape by what works, the fastest first."""
    heads, kv, dim = run["heads"], run["kv_heads"], run["head_dim"]
    times = {}
    for name in ("cudnn", "flash") + (("cudnn-repeat", "flash-repeat") if heads != kv else ()):
        repeat = heads // kv if name.endswith("-repeat") else 1
        grouped = {"enable_gqa": True} if heads != kv and repeat == 1 else {}

        def make(n):
            x = torch.randn(run["batch"], run["seq"], n, dim, device="cuda", dtype=BF16)
            return x.transpose(1, 2).requires_grad_()

        def once():
            wide = [x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (k, v)]
            y = F.scaled_dot_product_attention(q, *wide, is_causal=True, **grouped)
            torch.autograd.grad(y, (q, k, v), dy)

        use_attention(name)
        try:
            q, k, v = make(heads), make(kv), make(kv)
            dy = torch.randn_like(q)
            times[name] = round(time_cuda(once), 3)
        except Exception as e:
            print(f"  attention by {name}: {first_line(e)}", file=sys.stderr, flush=True)
    return dict(sorted(times.items(), key=lambda x: x[1]))


def head_times(run):
    """ms of the head and its loss, forward and backward, each way."""
    times = {}
    for name in ("torch", "chunked"):
        try:
            f = compiled(run, make_head({**run, "ce": name}))
            x = torch.randn(run["batch"], run["seq"], run["hidden"], device="cuda", dtype=BF16, requires_grad=True)
            norm = torch.ones(run["hidden"], device="cuda", requires_grad=True)
            table = torch.randn(run["vocab"], run["hidden"], device="cuda").mul_(0.02).requires_grad_()
            y = torch.randint(run["vocab"], (run["batch"], run["seq"]), device="cuda")

            def once():
                with torch.autocast("cuda", dtype=BF16):
                    loss = f(x, norm, table, y)
                torch.autograd.grad(loss, (x, norm, table))

            times[name] = round(time_cuda(once), 3)
        except Exception as e:
            print(f"  loss by {name}: {first_line(e)}", file=sys.stderr, flush=True)
        f = x = norm = table = y = None
    return dict(sorted(times.items(), key=lambda x: x[1]))


# --- a run ---


def first_line(e):
    return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:300]


def is_out_of_memory(e):
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(e, torch.OutOfMemoryError) or any(sign in str(e) for sign in signs)


def clean(cuda):
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def measure(run, o):
    cuda = o.device == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    began = time.perf_counter()
    model = Model(run, o.device)
    parameters = model.parameters()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    graphed = bool(run["graph"]) and cuda
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True, capturable=graphed)
    g = torch.Generator(o.device).manual_seed(1)
    pool = torch.randint(run["vocab"], (4, run["batch"], run["seq"] + 1), generator=g, device=o.device)
    ids, targets = pool[0, :, :-1].contiguous(), pool[0, :, 1:].contiguous()

    def eager_step():
        with torch.autocast(o.device, dtype=BF16):
            loss = model.loss(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def refill(i):
        ids.copy_(pool[i % len(pool), :, :-1])
        targets.copy_(pool[i % len(pool), :, 1:])

    sync()
    setup_s = time.perf_counter() - began
    began = time.perf_counter()
    first_loss = eager_step().item()
    first_s = time.perf_counter() - began
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for i in range(1, run["warmup"] + 1):
        refill(i)
        eager_step()
    step = eager_step
    if graphed:
        sync()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = eager_step()

        def replay():
            graph.replay()
            return captured

        step = replay
        step()
    sync()

    marks = []
    began = time.perf_counter()
    for i in range(run["steps"]):
        if cuda:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
        else:
            a = time.perf_counter()
        refill(i)
        loss = step()
        if cuda:
            b.record()
            # A few steps ahead, no more: the device never waits, and the limit of time holds.
            if i >= 2:
                marks[i - 2][1].synchronize()
        else:
            b = time.perf_counter()
        marks.append((a, b))
        if time.perf_counter() - began > o.max_seconds and i >= 4:
            break
    sync()
    wall_ms = (time.perf_counter() - began) * 1e3 / len(marks)
    times = [a.elapsed_time(b) if cuda else (b - a) * 1e3 for a, b in marks]
    ms = statistics.median(times)
    tokens = run["batch"] * run["seq"]
    tflops = flops_per_token(run) * tokens / ms / 1e9
    last_loss = loss.item()
    return {
        "tokens_per_s": round(tokens / ms * 1e3, 1),
        "ms_per_step": round(ms, 3),
        "ms_min": round(min(times), 3),
        "ms_max": round(max(times), 3),
        "wall_ms": round(wall_ms, 3),
        "timed_steps": len(marks),
        "tflops": round(tflops, 2),
        "utilisation": round(tflops / o.peak_tflops, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "compile_s": round(max(first_s - ms / 1e3, 0), 1),
        "setup_s": round(setup_s, 1),
        "parameters": sum(p.numel() for p in parameters),
        "flops_per_token": flops_per_token(run),
        "loss_first": round(first_loss, 4),
        "loss_last": round(last_loss, 4) if math.isfinite(last_loss) else None,
        "error": None if math.isfinite(last_loss) else "the loss is not finite",
    }


def carry_out(run, o):
    cuda = o.device == "cuda"
    kept = ("linear", "variant", "mode", "scope", "graph", "residual", "batch", "seq") + SHAPE_KEYS
    device = torch.cuda.get_device_name() if cuda else "CPU"
    result = {"run": run["name"], "torch": torch.__version__, "device": device, **{k: run[k] for k in kept}}
    ways = [run["attn"]]
    if not cuda:
        run["attn"] = "auto"
        run["ce"] = "torch" if run["ce"] == "auto" else run["ce"]
        ways = ["auto"]
    else:
        if run["attn"] == "auto":
            result["attn_ms"] = attention_times(run)
            ways = list(result["attn_ms"])[:2] or ["auto"]
        if run["ce"] == "auto":
            result["ce_ms"] = head_times(run)
            run["ce"] = next(iter(result["ce_ms"]), "torch")
    stream = torch.cuda.Stream() if cuda and run["graph"] else None
    for way in ways:
        clean(cuda)
        use_attention(way)
        result.update(attn=way, ce=run["ce"])
        try:
            # One stream for everything before a capture too: gradients are summed where they were first.
            with torch.cuda.stream(stream):
                result.update(measure({**run, "attn": way}, o))
        except KeyboardInterrupt:
            raise
        except Exception as e:
            result["error"] = "out of memory" if is_out_of_memory(e) else first_line(e)
            if o.trace:
                import traceback

                traceback.print_exc()
        if result["error"] in (None, "out of memory"):
            break
        if way != ways[-1]:
            print(f"  {run['name']} with attention by {way}: {result['error']}", file=sys.stderr, flush=True)
    clean(cuda)
    return result


def report(result, o):
    if o.json:
        line = json.dumps(result)
    else:
        how = [result["mode"], result["scope"], f"attn={result['attn']}", f"ce={result['ce']}", f"residual={result['residual']}"]
        if result["linear"] == "bit":
            how.insert(0, result["variant"])
        if result["graph"]:
            how.append("graph")
        line = f"{result['run']} [{' '.join(how)} {result['batch']}x{result['seq']}]: "
        if result["error"]:
            line += result["error"]
        else:
            peak = "" if result["peak_gib"] is None else f"{result['peak_gib']} GiB, "
            line += (
                f"{result['tokens_per_s']:,.0f} tok/s, {result['ms_per_step']:.2f} ms/step "
                f"(wall {result['wall_ms']:.2f}), {result['tflops']:.1f} TFLOP/s = {100 * result['utilisation']:.1f} %, "
                f"{peak}compile {result['compile_s']} s, loss {result['loss_first']} -> {result['loss_last']}"
            )
        for key in ("attn_ms", "ce_ms"):
            if key in result:
                line += f", {key} {result[key]}"
    print(line, flush=True)


def parse_run(text, o, fail):
    shape, *fields = text.split(":")
    if shape not in SHAPES:
        fail(f"no shape {shape!r}: {', '.join(SHAPES)}")
    run = {k: getattr(o, k) for k in ("linear", "variant", "mode", "scope", "attn", "ce", "residual") + NUMBERS}
    for key, value in zip(SHAPE_KEYS, SHAPES[shape]):
        run[key] = value if run[key] is None else run[key]
    for field in fields:
        key, _, value = field.rpartition("=")
        key = (key or "linear").replace("-", "_")
        if key in NUMBERS and value.isdigit():
            run[key] = int(value)
        elif value in CHOICES.get(key, ()):
            run[key] = value
        else:
            fail(f"{text}: {field!r} is nothing that a run has")
    if run["heads"] % run["kv_heads"]:
        fail(f"{text}: {run['heads']} heads are no multiple of {run['kv_heads']}")
    run["name"] = text if len(fields) else f"{shape}:{run['linear']}"
    return run


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--runs", help="runs, separated by commas; without it, one of --shape")
    ap.add_argument("--shape", default="125m", choices=SHAPES)
    words = {"linear": "bit", "mode": "default", "scope": "block", "attn": "auto", "ce": "torch", "residual": "bf16"}
    for key, default in words.items():
        ap.add_argument("--" + key, default=default, choices=CHOICES[key])
    ap.add_argument("--bit-variant", dest="variant", default="detach", choices=CHOICES["variant"])
    for key, default in (("batch", 8), ("seq", 2048), ("steps", 20), ("warmup", 3), ("graph", 0), ("ce-chunks", 4)):
        ap.add_argument("--" + key, type=int, default=default)
    for key in SHAPE_KEYS:
        ap.add_argument("--" + key.replace("_", "-"), type=int)
    ap.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    ap.add_argument("--peak-tflops", type=float, default=989.0)
    ap.add_argument("--max-seconds", type=float, default=30.0, help="of timed steps a run (at least 5 are timed)")
    ap.add_argument("--budget", type=float, help="seconds after which no run begins")
    ap.add_argument("--isolate", action="store_true", help="a process for each run")
    ap.add_argument("--run-timeout", type=float, help="seconds for a run, with --isolate")
    ap.add_argument("--json", action="store_true")
    ap.add_argument("--trace", action="store_true", help="where a run fails, all of the error")
    o = ap.parse_args()
    texts = (o.runs or f"{o.shape}:{o.linear}").split(",")
    runs = [parse_run(text, o, ap.error) for text in texts]
    if o.device == "cuda" and not torch.cuda.is_available():
        ap.error("there is no CUDA device: --device cpu runs the tiny shape")

    torch.set_float32_matmul_precision("high")
    began = time.perf_counter()
    failed = False
    if not o.isolate:
        name = torch.cuda.get_device_name() if o.device == "cuda" else "CPU"
        print(f"torch {torch.__version__}, {name}", file=sys.stderr, flush=True)
    for text, run in zip(texts, runs):
        if o.budget and time.perf_counter() - began > o.budget:
            print(f"{text}: not begun, the budget of {o.budget:g} s is spent", flush=True)
            failed = True
            continue
        if o.isolate:
            rest = [a for a in sys.argv[1:] if a != "--isolate"]
            try:
                done = subprocess.run([sys.executable, __file__, *rest, "--runs", text], timeout=o.run_timeout)
                failed |= done.returncode != 0
            except subprocess.TimeoutExpired:
                print(f"{text}: stopped after {o.run_timeout:g} s", flush=True)
                failed = True
            continue
        result = carry_out(run, o)
        report(result, o)
        failed |= result["error"] is not None
        if result["error"] and o.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as e:
                print(f"the device is lost ({first_line(e)}): the runs that remain need --isolate", flush=True)
                break
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
