"""Compares the kernels of attention_backward.cu and attention_backward_hopper.cu, emulated, with plain float64 attention.

    g++ -O2 -std=c++17 -DEMULATED -shared -fPIC emulate.cpp -o libemulate.so -pthread
    python check_attention_backward.py libemulate.so [hopper] [head_dim ...]
"""
import ctypes
import itertools
import sys

import numpy as np

# By D: of the kernel for K and V, and of that for Q, the name, rows of a tile, threads and bytes of shared memory.
SHAPES = {
    32: (("kv_bf16_d32", 128, 128, 34304), ("q_bf16_d32", 128, 128, 26112)),
    64: (("kv_bf16_d64", 128, 128, 67072), ("q_bf16_d64", 128, 128, 50688)),
    128: (("kv_bf16_d128", 128, 256, 165376), ("q_bf16_d128", 128, 128, 99840)),
}
HOPPER = {
    64: (("kv_hopper_d64", 128, 256, 85248), ("q_hopper_d64", 128, 256, 85248)),
    128: (("kv_hopper_d128", 128, 256, 167168), ("q_hopper_d128", 128, 256, 167168)),
}
NARROW = ("kv_bf16_d128_narrow", 64, 128, 99840)


def to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def aligned(shape, dtype, fill=0):
    """An array that begins at a multiple of 16 bytes."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(count + 16, np.uint8)
    skip = -raw.ctypes.data % 16
    out = raw[skip : skip + count].view(dtype).reshape(shape)
    out[...] = fill
    return out


def launch(library, kernel, T, heads, B, args):
    name, rows, threads, shared = kernel
    pointers = (ctypes.c_void_p * len(args))(*[ctypes.addressof(x) for x in args])
    name = f"attention_backward_{name}"
    if library.emulate_launch(name.encode(), -(-T // rows), heads, B, threads, 1, 1, shared, pointers):
        raise SystemExit(f"no kernel {name}")


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


def check(library, rng, B, T, H, K, d, documents, size=1.5, narrow=False, shapes=SHAPES):
    D = min(x for x in shapes if x >= d)
    ld, ldo, scale = (H + 2 * K) * d, H * d, float(np.float32(1 / np.sqrt(d)))
    qkv, dout = aligned((B * T, ld), np.uint16), aligned((B * T, ldo), np.uint16)
    qkv[...] = to_bf16(rng.standard_normal(qkv.shape) * size)
    dout[...] = to_bf16(rng.standard_normal(dout.shape))
    starts = aligned((B, T), np.uint32)
    if documents:
        for b in range(B):
            cuts = np.where(rng.random(T) < documents, np.arange(T), 0)
            starts[b] = np.maximum.accumulate(cuts)
    lse, delta = aligned((B, H, T), np.float32), aligned((B, H, T), np.float32)
    right = np.zeros((B, T, H + 2 * K, d))
    x = to_float(qkv).reshape(B, T, H + 2 * K, d)
    y = to_float(dout).reshape(B, T, H, d)
    for b, h in itertools.product(range(B), range(H)):
        kv = h // (H // K)
        lse[b, h], delta[b, h], dq, dk, dv = reference(
            x[b, :, h], x[b, :, H + kv], x[b, :, H + K + kv], y[b, :, h], starts[b], scale
        )
        right[b, :, h] = dq
        right[b, :, H + kv] += dk
        right[b, :, H + K + kv] += dv

    out = aligned((B * T + 1, ld), np.uint16, 0x7FC1)  # NaN; a row more than is to be written
    base, to = qkv.ctypes.data, out.ctypes.data
    key, value = 2 * H * d, 2 * (H + K) * d
    inputs = [base, base + key, base + value, dout.ctypes.data, lse.ctypes.data, delta.ctypes.data,
              starts.ctypes.data if documents else 0]
    pointers = lambda list: [ctypes.c_void_p(p) for p in list]
    sizes = [ctypes.c_uint32(n) for n in (T, H, K, d, ld, ldo)] + [ctypes.c_float(scale)]
    kv, q = shapes[D]
    if narrow:
        kv = NARROW
    launch(library, kv, T, K, B, pointers(inputs + [to + key, to + value]) + sizes)
    launch(library, q, T, H, B, pointers(inputs + [to]) + sizes)
    assert (out[B * T] == 0x7FC1).all(), "a row past the end was written"
    got = to_float(out[: B * T]).reshape(right.shape)
    assert not np.isnan(got).any(), "not all was written"
    errors, rows = [], []
    for part in (slice(0, H), slice(H, H + K), slice(H + K, None)):
        x, wrong = right[:, :, part], got[:, :, part] - right[:, :, part]
        # A row that sees one key has dS = 0: what remains is rounding, of what is as large as dout.
        least = 0.05 * np.sqrt(x.size)
        errors.append(np.linalg.norm(wrong) / max(np.linalg.norm(x), least))
        # The worst row, against what rows are on average: one that is wrong cannot hide behind many.
        rows.append(np.linalg.norm(wrong, axis=-1).max() / (max(np.linalg.norm(x), least) / np.sqrt(x.size / d)))
    ok = max(errors) < 1e-2 and max(rows) < 5e-2
    print(f"B {B} T {T:3} H {H} K {K} d {d:3} documents {documents}: dq {errors[0]:.5f} dk {errors[1]:.5f} "
          f"dv {errors[2]:.5f}, worst row {max(rows):.4f}" + ("" if ok else "  WRONG"), flush=True)
    return ok


def main():
    library = ctypes.CDLL(sys.argv[1])
    words = sys.argv[2:]
    dims = [int(x) for x in words if x.isdigit()] or [16, 32, 64, 80, 128]
    rng = np.random.default_rng(1)
    ok = True
    for d, shapes in itertools.product(dims, [HOPPER] if "hopper" in words else [SHAPES, HOPPER]):
        for T, (H, K), documents in itertools.product(
            (1, 7, 64, 130, 257), ((2, 2), (2, 1), (4, 1), (4, 2)), (0, 0.02, 0.3)
        ):
            if T == 257 and (H, K) == (4, 2):
                continue
            ok &= check(library, rng, 2 if T < 200 else 1, T, H, K, d, documents, shapes=shapes)
            if d > 64 and shapes is SHAPES:
                ok &= check(library, rng, 1, T, H, K, d, documents, narrow=True)
        # Whole tiles out of sight; more heads than a section of part_of_block; scores as large as hundreds, of
        # which those not seen are beyond what e^x can hold.
        ok &= check(library, rng, 1, 523, 1, 1, d, 0.01, shapes=shapes)
        ok &= check(library, rng, 1, 400, 2, 1, d, 0.02, shapes=shapes)
        ok &= check(library, rng, 7, 130, 10, 10, d, 0, shapes=shapes)
        ok &= check(library, rng, 1, 200, 2, 1, d, 0.02, 12.0, shapes=shapes)
    print("all right" if ok else "errors")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
