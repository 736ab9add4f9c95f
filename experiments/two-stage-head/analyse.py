"""How many rows of a head must be read exactly when a sketch of few bits has been read.

    python analyse.py [llama2.c model ...]      needs NumPy

Always a Gaussian head with Gaussian inputs; for each model its head with the inputs that it makes
while it samples text. A sketch has one scale for every 32 columns of a row. Bounds on
|exact logit - sketch logit|, for a row with residual e and the input x:

    cauchy   sum over blocks of |e_b| |x_b|            certain
    dither   c * sqrt(sum over blocks of step_b^2 / 12 * |x_b|^2)
             the sketch rounds w / step + u with u uniform, one for each column, and u is subtracted
             again: errors of a row are then independent, uniform and free of the weights, so
             sub-Gaussian with the variance proxy step^2 / 12; c makes it fail for any row of a token
             with a probability of 1e-15 at most

A row must be read when its sketch logit plus its bound reaches the k-th largest exact logit: rows are
read in the order of that sum until it falls below.
"""

import math
import struct
import sys

import numpy as np

BLOCK = 32
FAILURE = 1e-15


def sketch(w, bits, dither):
    """Widened sketch and its steps (rows, blocks)."""
    rows, cols = w.shape
    blocks = w.reshape(rows, cols // BLOCK, BLOCK)
    top = 2 ** (bits - 1) - 1
    largest = np.abs(blocks).max(2, keepdims=True)
    step = (largest / top * (1 + 2**-10)).astype(np.float16).astype(np.float32)
    step = np.maximum(step, 1e-7)
    u = np.random.default_rng(1).uniform(-0.5, 0.5, (1, cols // BLOCK, BLOCK)).astype(np.float32)
    u = u if dither else 0 * u
    return (step * (np.rint(blocks / step + u) - u)).reshape(rows, cols), step[:, :, 0]


def shares(w, xs, name):
    norms = lambda a: np.sqrt((a.reshape(len(a), -1, BLOCK) ** 2).sum(2))
    exact, x_norms = xs @ w.T, norms(xs)
    deviation = exact.std(1)
    ordered = -np.sort(-exact, 1)
    tops = [1, 10, 40]
    print(f"\n{name}: {w.shape}, {len(xs)} inputs; largest logit "
          f"{((ordered[:, 0] - exact.mean(1)) / deviation).mean():.1f} deviations above the mean")
    print("| bits | bound | error rms | bound rms | rows for top 1 | top 10 | top 40 | worst token, top 1 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    c = math.sqrt(2 * math.log(2 * len(w) / FAILURE))
    for bits in [3, 4, 5, 6]:
        for bound in ["cauchy", "dither"]:
            v, step = sketch(w, bits, bound == "dither")
            logits = xs @ v.T
            if bound == "cauchy":
                t = x_norms @ norms(w - v).T
            else:
                t = c * np.sqrt(x_norms**2 @ (step**2 / 12).T)
            errors = np.abs(exact - logits)
            assert (errors <= t * 1.001 + 1e-4).all()
            read = [(logits + t >= ordered[:, k - 1 : k]).mean(1) for k in tops]
            relative = lambda a: (np.sqrt((a**2).mean(1)) / deviation).mean()
            row = [f"{100 * r.mean():.2f} %" for r in read] + [f"{100 * read[0].max():.2f} %"]
            print(f"| {bits} | {bound} | {relative(errors):.3f} | {relative(t):.2f} | " + " | ".join(row) + " |")


def llama2c(path, steps=192, runs=2):
    """Head and final inputs of a llama2.c float model that samples from its own distribution."""
    data = open(path, "rb").read()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    shared, vocab = vocab > 0, abs(vocab)
    size, at = dim // heads, 28

    def take(*shape):
        nonlocal at
        count = math.prod(shape)
        at += 4 * count
        return np.frombuffer(data, "<f4", count, at - 4 * count).reshape(shape)

    embed, norm1 = take(vocab, dim), take(layers, dim)
    q, k, v = take(layers, dim, dim), take(layers, kv_heads * size, dim), take(layers, kv_heads * size, dim)
    o, norm2 = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    final, _ = take(dim), take(length, size)
    head = embed if shared else take(vocab, dim)
    rms = lambda x, w: x / np.sqrt((x * x).mean() + 1e-5) * w
    frequencies = 10000.0 ** -(np.arange(0, size, 2) / size)

    def rope(x, position):
        z = x.reshape(-1, size // 2, 2)
        z = (z[..., 0] + 1j * z[..., 1]) * np.exp(1j * position * frequencies)
        return np.stack([z.real, z.imag], 2).reshape(-1, size).astype(np.float32)

    rng, inputs = np.random.default_rng(2), []
    for _ in range(runs):
        token, cache = 1, [([], []) for _ in range(layers)]
        for position in range(min(steps, length)):
            x = embed[token]
            for l, (keys, values) in enumerate(cache):
                h = rms(x, norm1[l])
                queries = rope(q[l] @ h, position)
                keys.append(rope(k[l] @ h, position))
                values.append((v[l] @ h).reshape(-1, size))
                spread = np.arange(heads) // (heads // kv_heads)
                scores = np.einsum("hd,thd->ht", queries, np.array(keys)[:, spread]) / math.sqrt(size)
                scores = np.exp(scores - scores.max(1, keepdims=True))
                scores /= scores.sum(1, keepdims=True)
                x = x + o[l] @ np.einsum("ht,thd->hd", scores, np.array(values)[:, spread]).ravel()
                h = rms(x, norm2[l])
                gate = w1[l] @ h
                x = x + w2[l] @ (gate / (1 + np.exp(-gate)) * (w3[l] @ h))
            x = rms(x, final).astype(np.float32)
            inputs.append(x)
            p = head @ x
            p = np.exp(p - p.max(), dtype=np.float64)
            token = rng.choice(vocab, p=p / p.sum())
    return head, np.array(inputs)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    shares(normal(32064, 2560), normal(16, 2560), "Gaussian, a quarter of 2B4T's rows")
    for path in sys.argv[1:]:
        shares(*llama2c(path), path.rsplit("/", 1)[-1])
