"""Checks the products of int8 against sums in float64, which are exact.

python check_product_int8.py [library] [names of kernels...]"""

import ctypes

import numpy as np

from common import Array, arguments, to_bf16

THREADS, SHARED = 288, 230528


def tensor_map(x, rows, columns, stride):
    """What the emulator has for a map, and the memory that holds it, aligned as a map is."""
    memory = np.zeros(64, np.uint64)
    start = -memory.ctypes.data % 64 // 8
    words = memory[start : start + 16]
    words[:6] = [x.data.ctypes.data, columns, rows, stride, 128, 128]
    return (ctypes.c_uint64 * 16).from_buffer(memory, start * 8)


def check(emulator, rng, name, M, N, K, blocks, spare=(0, 0, 0), extreme=False):
    lda, ldb, ldc = K + 16 * spare[0], K + 16 * spare[1], N + spare[2]
    codes = rng.integers(-128, 128, (M, lda)).astype(np.int8)
    trits = rng.integers(-1, 2, (N, ldb)).astype(np.int8)
    if extreme:  # the largest sums there are, and bytes that are no trits
        codes[:] = rng.choice([-128, 127], (M, 1))
        trits[:] = rng.choice([-128, 127], (N, 1))
        codes[:, :5] = rng.integers(-128, 128, (M, 5))
    a, b = Array(codes, dtype=np.int8), Array(trits, dtype=np.int8)
    wide = "f32" in name
    y = Array(shape=(M, ldc), dtype=np.float32 if wide else np.uint16)
    maps = tensor_map(a, M, K, lda), tensor_map(b, N, K, ldb)
    emulator.launch(name, (blocks,), (THREADS,), SHARED, *maps, y, M, N, K, ldc)
    y.guarded()
    sums = (codes[:, :K].astype(np.float64) @ trits[:, :K].astype(np.float64).T).astype(np.float32)
    right = sums if wide else to_bf16(sums)
    wrong = np.argwhere(y.data[:, :N] != right)
    assert len(wrong) == 0, f"{name} {M} x {N} x {K}: {len(wrong)} are wrong, first {wrong[0]}, last {wrong[-1]}"
    assert (y.data[:, N:].view(np.uint8) == 0xFF).all(), "written beside a row"
    print(name, M, N, K, "blocks", blocks, "strides", lda, ldb, ldc, "largest", np.abs(sums).max(), flush=True)


def main():
    emulator, words = arguments()
    rng = np.random.default_rng(0)
    for kind in ("bf16", "f32"):
        name = f"product_int8_{kind}"
        if words and name not in words:
            continue
        for M, N, K, blocks, spare in (
            (1, 1, 16, 2, (0, 0, 0)),
            (128, 256, 128, 2, (0, 0, 0)),
            (257, 513, 48, 2, (1, 0, 7)),
            (64, 100, 64, 4, (0, 2, 4)),
            (300, 520, 768, 4, (0, 0, 0)),
            (513, 264, 656, 2, (3, 1, 8)),
            (130, 777, 2576, 6, (0, 0, 3)),
            (2500, 600, 144, 4, (0, 0, 0)),
        ):
            check(emulator, rng, name, M, N, K, blocks, spare)
        check(emulator, rng, name, 200, 300, 1040, 2, extreme=True)
        check(emulator, rng, name, 129, 257, 1024, 4, extreme=True)


if __name__ == "__main__":
    main()
