"""Checks the kernels of attention, forward in bf16 and both ways in f32, against plain sums in float64.

python check_attention.py [library] [words...]: words choose the checks whose name holds one of them."""

import ctypes

import numpy as np

from common import Array, arguments, ceil, from_bf16, to_bf16

# In bf16, by the end of the name: width of the heads, queries of a block, threads, bytes of shared memory.
FORWARD = {
    "bf16_d32": (32, 128, 128, 25088),
    "bf16_d64": (64, 128, 128, 49664),
    "bf16_d128": (128, 128, 128, 98816),
    "hopper_d64": (64, 64, 128, 42240),
    "hopper_d128": (128, 192, 384, 116480),
}


class Case:
    """Random queries, keys, values and gradient of the outputs, and what attention makes of them."""

    def __init__(self, B, T, H, K, d, documents, rounded, seed=0):
        self.__dict__.update(B=B, T=T, H=H, K=K, d=d)
        rng = np.random.default_rng([seed, B, T, H, K, d, documents])
        self.ld, self.ldo = (H + 2 * K) * d, H * d
        self.scale = float(np.float32(1 / np.sqrt(d)))
        qkv = rng.normal(size=(B * T, self.ld)).astype(np.float32)
        qkv[:, : H * d] *= 2  # sharp enough that the maxima matter
        dout = rng.normal(size=(B * T, self.ldo)).astype(np.float32)
        if rounded:
            qkv, dout = from_bf16(to_bf16(qkv)), from_bf16(to_bf16(dout))
        self.qkv, self.dout = qkv, dout
        self.starts = None
        if documents:
            fresh = rng.random((B, T)) < min(1, 4 / T)
            fresh[:, 0] = True
            self.starts = np.maximum.accumulate(np.where(fresh, np.arange(T), 0), 1).astype(np.uint32)
        self.reference()

    def heads(self):
        B, T, H, K, d = self.B, self.T, self.H, self.K, self.d
        x = self.qkv.astype(np.float64).reshape(B, T, H + 2 * K, d).transpose(0, 2, 1, 3)
        return x[:, :H], x[:, H : H + K], x[:, H + K :]

    def reference(self):
        B, T, H, K, d = self.B, self.T, self.H, self.K, self.d
        q, k, v = self.heads()
        k, v = np.repeat(k, H // K, 1), np.repeat(v, H // K, 1)
        s = np.einsum("bhtd,bhsd->bhts", q, k) * self.scale
        t = np.arange(T)
        seen = t[None, :, None] >= t[None, None, :]
        if self.starts is not None:
            seen = seen & (self.starts[:, :, None] <= t[None, None, :])
        s = np.where(seen[:, None], s, -np.inf)
        most = s.max(-1, keepdims=True)
        p = np.exp(s - most)
        total = p.sum(-1, keepdims=True)
        p /= total
        self.lse = (most + np.log(total))[..., 0]
        out = np.einsum("bhts,bhsd->bhtd", p, v)
        dout = self.dout.astype(np.float64).reshape(B, T, H, d).transpose(0, 2, 1, 3)
        self.delta = (out * dout).sum(-1)
        dp = np.einsum("bhtd,bhsd->bhts", dout, v)
        ds = p * (dp - self.delta[..., None]) * self.scale
        dq = np.einsum("bhts,bhsd->bhtd", ds, k)
        dk = np.einsum("bhts,bhtd->bhsd", ds, q).reshape(B, K, H // K, T, d).sum(2)
        dv = np.einsum("bhts,bhtd->bhsd", p, dout).reshape(B, K, H // K, T, d).sum(2)
        self.out = out.transpose(0, 2, 1, 3).reshape(B * T, self.ldo)
        self.dqkv = np.concatenate([dq, dk, dv], 1).transpose(0, 2, 1, 3).reshape(B * T, self.ld)


def compare(name, got, right, tolerance, rounding=0.0):
    """The largest error beyond that of rounding, against the root of the mean square of what is right."""
    size = np.sqrt(np.mean(np.square(right))) + 1e-30
    errors = (np.abs(got.astype(np.float64) - right) - rounding * np.abs(right)) / size
    if not (errors <= tolerance).all():  # NaN is wrong too
        where = np.unravel_index(np.argmax(~(errors <= tolerance)), right.shape)
        raise AssertionError(f"{name}: error {errors.max():.3g} > {tolerance:g}, first at {where}: {got[where]} for {right[where]}")
    return max(errors.max(), 0.0)


def cases(rounded):
    for d, T, H, K, documents in [
        (16, 1, 1, 1, False), (16, 7, 4, 1, True), (16, 257, 2, 2, True), (32, 64, 4, 2, False), (32, 130, 2, 1, True),
        (64, 1, 2, 1, True), (64, 7, 1, 1, False), (64, 257, 4, 1, False), (64, 300, 2, 1, True), (80, 130, 2, 1, True),
        (80, 64, 1, 1, False), (128, 7, 2, 2, True), (128, 64, 4, 1, False), (128, 130, 1, 1, False),
        (128, 257, 2, 1, True), (128, 400, 1, 1, True),
        (128, 1000, 2, 1, True), (64, 777, 1, 1, False), (128, 640, 1, 1, False),
    ]:  # fmt: skip
        yield Case(2 if T < 200 else 1, T, H, K, d, documents, rounded)


def check_f32(e):
    worst = {}
    others = [Case(1, 45, 2, 1, 7, True, False), Case(2, 70, 1, 1, 256, True, False), Case(1, 33, 3, 1, 100, False, False)]
    for c in list(cases(False)) + others:
        B, T, H, K, d = c.B, c.T, c.H, c.K, c.d
        pitch = 4 * (ceil(d, 4) | 1)
        qkv = Array(c.qkv)
        starts = None if c.starts is None else Array(c.starts, dtype=np.uint32)
        q, k, v = (qkv, 0), (qkv, H * d), (qkv, (H + K) * d)
        tail = (T, H, K, d, c.ld, c.ldo, c.scale)
        results = []
        for _ in range(2):
            out, lse = Array(shape=c.out.shape), Array(shape=c.lse.shape)
            e.launch("attention_forward_f32", (ceil(T, 32), B * H), (256,), 128 * (2 * pitch + 36), q, k, v, out, lse, starts, *tail)
            dout, delta, dqkv = Array(c.dout), Array(shape=c.lse.shape), Array(shape=c.qkv.shape)
            count = B * H * T
            e.launch("attention_delta_f32", (ceil(count, 16),), (256,), 0, out, dout, delta, ctypes.c_uint64(count), T, H, d, c.ldo)
            e.launch("attention_backward_queries_f32", (ceil(T, 32), B * H), (256,), 128 * (4 * pitch + 36),
                     q, k, v, dout, lse, delta, dqkv, starts, *tail)  # fmt: skip
            e.launch("attention_backward_keys_f32", (ceil(T, 32), B * K), (256,), 128 * (4 * pitch + 72),
                     q, k, v, dout, lse, delta, (dqkv, H * d), (dqkv, (H + K) * d), starts, *tail)  # fmt: skip
            results.append([x.data for x in (out, lse, delta, dqkv)])
        for name, x, y, right in zip(("out", "lse", "delta", "dqkv"), *results, (c.out, c.lse, c.delta, c.dqkv)):
            assert (x.view(np.uint32) == y.view(np.uint32)).all(), f"{name} of two runs differ"
            label = f"f32 {name} of B {B}, T {T}, H {H}, K {K}, d {d}"
            worst[name] = max(worst.get(name, 0), compare(label, x, right, 5e-5))
    print("f32:", ", ".join(f"{k} {v:.2g}" for k, v in worst.items()))


def check_bf16(e):
    worst = {}
    for c in cases(True):
        B, T, H, K, d = c.B, c.T, c.H, c.K, c.d
        qkv = Array(to_bf16(c.qkv), dtype=np.uint16)
        starts = None if c.starts is None else Array(c.starts, dtype=np.uint32)
        q, k, v = (qkv, 0), (qkv, H * d), (qkv, (H + K) * d)
        for kernel, (D, tile, threads, shared) in FORWARD.items():
            if D < d:
                continue
            results = []
            for _ in range(2):
                out, lse = Array(shape=c.out.shape, dtype=np.uint16), Array(shape=c.lse.shape)
                e.launch(f"attention_forward_{kernel}", (ceil(T, tile), B * H), (threads,), shared,
                         q, k, v, out, lse, starts, T, H, K, d, c.ld, c.ldo, c.scale)  # fmt: skip
                results.append([out.data, lse.data])
            label = f"of B {B}, T {T}, H {H}, K {K}, d {d}, {kernel}"
            for x, y in zip(*results):
                assert x.tobytes() == y.tobytes(), f"two runs differ: {label}"
            for name, x, right, tolerance, rounding in (
                ("out", from_bf16(out.data), c.out, 0.02, 2**-8), ("lse", lse.data, c.lse, 1e-5, 0.0)
            ):  # fmt: skip
                worst[name] = max(worst.get(name, 0), compare(f"bf16 {name} {label}", x, right, tolerance, rounding))
            mean = np.abs(from_bf16(out.data) - c.out).mean() / np.sqrt(np.mean(np.square(c.out)))
            worst["out, mean"] = max(worst.get("out, mean", 0), mean)
            assert mean < 0.0025, f"out {label}: mean error {mean:.3g}"
        dout, delta = Array(to_bf16(c.dout), dtype=np.uint16), Array(shape=c.lse.shape)
        count = B * H * T
        e.launch("attention_delta_bf16", (ceil(count, 16),), (256,), 0, out, dout, delta, ctypes.c_uint64(count), T, H, d, c.ldo)
        right = (from_bf16(out.data) * c.dout).astype(np.float64).reshape(B, T, H, d).sum(-1).transpose(0, 2, 1)
        worst["delta"] = max(worst.get("delta", 0), compare(f"bf16 delta d {d}", delta.data, right, 1e-5))
    print("bf16:", ", ".join(f"{k} {v:.2g}" for k, v in worst.items()))


CHECKS = {"f32": check_f32, "bf16": check_bf16}

if __name__ == "__main__":
    emulator, words = arguments()
    for name, check in CHECKS.items():
        if not words or any(w in name for w in words):
            check(emulator)
