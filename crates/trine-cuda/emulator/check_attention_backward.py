"""Checks the gradients of attention in bf16 against plain sums in float64.

python check_attention_backward.py [library] [hopper] [widths of heads...]"""

import itertools
import sys

import numpy as np

from common import Array, arguments, ceil, from_bf16, to_bf16

# By the width of the heads: of the kernel for K and V, and of that for Q, the name, rows of a tile, threads and bytes of
# shared memory.
SHAPES = {
    32: (("kv_bf16_d32", 128, 128, 34304), ("q_bf16_d32", 128, 128, 26112)),
    64: (("kv_bf16_d64", 128, 128, 67072), ("q_bf16_d64", 128, 128, 50688)),
    128: (("kv_bf16_d128", 128, 256, 165376), ("q_bf16_d128", 128, 128, 99840)),
}
HOPPER = {
    64: (("kv_hopper_d64", 64, 128, 68864), ("q_hopper_d64", 128, 256, 85248)),
    128: (("kv_hopper_d128", 128, 256, 167168), ("q_hopper_d128", 128, 256, 167168)),
}
NARROW = ("kv_bf16_d128_narrow", 64, 128, 99840)


def reference(q, k, v, dout, start, scale):
    """Of one head: lse, delta, dq, dk, dv, in float64."""
    rows = np.arange(len(q))
    seen = (rows[None, :] <= rows[:, None]) & (rows[None, :] >= start[:, None])
    s = np.where(seen, scale * (q @ k.T), -np.inf)
    lse = np.log(np.exp(s - s.max(1, keepdims=True)).sum(1)) + s.max(1)
    p = np.exp(s - lse[:, None])
    dp = dout @ v.T
    delta = (dout * (p @ v)).sum(1)
    ds = p * (dp - delta[:, None])
    return lse, delta, scale * (ds @ k), scale * (ds.T @ q), p.T @ dout


def check(emulator, rng, B, T, H, K, d, documents, size=1.5, narrow=False, shapes=SHAPES):
    D = min(x for x in shapes if x >= d)
    ld, ldo, scale = (H + 2 * K) * d, H * d, float(np.float32(1 / np.sqrt(d)))
    qkv = Array(to_bf16(rng.standard_normal((B * T, ld)) * size), dtype=np.uint16)
    dout = Array(to_bf16(rng.standard_normal((B * T, ldo))), dtype=np.uint16)
    starts = np.zeros((B, T), np.uint32)
    if documents:
        for b in range(B):
            cuts = np.where(rng.random(T) < documents, np.arange(T), 0)
            starts[b] = np.maximum.accumulate(cuts)
    lse, delta = Array(shape=(B, H, T)), Array(shape=(B, H, T))
    right = np.zeros((B, T, H + 2 * K, d))
    x = from_bf16(qkv.data).astype(np.float64).reshape(B, T, H + 2 * K, d)
    y = from_bf16(dout.data).astype(np.float64).reshape(B, T, H, d)
    for b, h in itertools.product(range(B), range(H)):
        kv = h // (H // K)
        lse.data[b, h], delta.data[b, h], dq, dk, dv = reference(
            x[b, :, h], x[b, :, H + kv], x[b, :, H + K + kv], y[b, :, h], starts[b], scale
        )
        right[b, :, h] = dq
        right[b, :, H + kv] += dk
        right[b, :, H + K + kv] += dv

    out = Array(shape=(B * T, ld), dtype=np.uint16)
    q, k, v = ((qkv, part * d) for part in (0, H, H + K))
    dq, dk, dv = ((out, part * d) for part in (0, H, H + K))
    inputs = q, k, v, dout, lse, delta, Array(starts, dtype=np.uint32) if documents else None
    of_keys, of_queries = shapes[D]
    for (name, tile, threads, shared), heads, results in (
        (NARROW if narrow else of_keys, K, (dk, dv)),
        (of_queries, H, (dq,)),
    ):
        emulator.launch(f"attention_backward_{name}", (ceil(T, tile), heads, B), (threads,), shared,
                        *inputs, *results, T, H, K, d, ld, ldo, scale)  # fmt: skip
    got = from_bf16(out.data).astype(np.float64).reshape(right.shape)
    assert not np.isnan(got).any(), "not all was written"
    errors, rows = [], []
    for part in (slice(0, H), slice(H, H + K), slice(H + K, None)):
        x, wrong = right[:, :, part], got[:, :, part] - right[:, :, part]
        # A row that sees one key has dS = 0: what remains is rounding, of what is as large as dout.
        least = 0.05 * np.sqrt(x.size)
        errors.append(np.linalg.norm(wrong) / max(np.linalg.norm(x), least))
        # The worst row, against itself or what rows are on average: one that is wrong cannot hide behind many.
        average = max(np.linalg.norm(x), least) / np.sqrt(x.size / d)
        rows.append((np.linalg.norm(wrong, axis=-1) / np.maximum(np.linalg.norm(x, axis=-1), average)).max())
    ok = max(errors) < 1e-2 and max(rows) < 2e-2
    kind = f"{of_queries[0][2:]}{', narrow' * narrow}"
    print(f"{kind}: B {B} T {T:3} H {H} K {K} d {d:3} documents {documents}: dq {errors[0]:.5f} dk {errors[1]:.5f} "
          f"dv {errors[2]:.5f}, worst row {max(rows):.4f}" + ("" if ok else "  WRONG"), flush=True)
    return ok


def main():
    emulator, words = arguments()
    dims = [int(x) for x in words if x.isdigit()] or [16, 32, 64, 80, 128]
    rng = np.random.default_rng(1)
    ok = True
    for d, shapes in itertools.product(dims, [HOPPER] if "hopper" in words else [SHAPES, HOPPER]):
        for T, (H, K), documents in itertools.product(
            (1, 7, 64, 130, 257), ((2, 2), (2, 1), (4, 1), (4, 2)), (0, 0.02, 0.3)
        ):
            if T == 257 and (H, K) == (4, 2):
                continue
            ok &= check(emulator, rng, 2 if T < 200 else 1, T, H, K, d, documents, shapes=shapes)
            if d > 64 and shapes is SHAPES:
                ok &= check(emulator, rng, 1, T, H, K, d, documents, narrow=True)
        # Whole tiles out of sight; more heads than a section of part_of_block; scores as large as hundreds, of
        # which those not seen are beyond what e^x can hold.
        ok &= check(emulator, rng, 1, 523, 1, 1, d, 0.01, shapes=shapes)
        ok &= check(emulator, rng, 1, 400, 2, 1, d, 0.02, shapes=shapes)
        ok &= check(emulator, rng, 7, 130, 10, 10, d, 0, shapes=shapes)
        ok &= check(emulator, rng, 1, 200, 2, 1, d, 0.02, 12.0, shapes=shapes)
    print("all right" if ok else "errors")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
