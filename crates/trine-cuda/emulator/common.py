"""What the checks of kernels have in common: the emulator, and arrays that it cannot leave unnoticed.

Every check is called as `python check_....py [library] [words...]`: emulate.cpp is built unless a library is named (a
word that ends in .so); other words choose what is checked."""

import ctypes
import os
import shlex
import subprocess
import sys
import tempfile

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
GUARD = 64  # elements before and after every array, which no kernel may write


def build(directory):
    library = os.path.join(directory, "libemulate.so")
    command = [os.environ.get("CXX", "c++"), *shlex.split("-O2 -std=c++17 -DEMULATED -shared -fPIC -pthread")]
    subprocess.run([*command, os.path.join(HERE, "emulate.cpp"), "-o", library], check=True)
    return library


def arguments():
    """The emulator, and the other words of the command line."""
    words = sys.argv[1:]
    library = next((w for w in words if w.endswith(".so")), None)
    if library:
        return Emulator(library), [w for w in words if w != library]
    with tempfile.TemporaryDirectory() as directory:  # a library that is loaded needs no file
        return Emulator(build(directory)), words


class Array:
    """An array for kernels, full of NaN where nothing is given, with guards around it; 16-byte aligned."""

    def __init__(self, values=None, shape=None, dtype=np.float32):
        shape = np.shape(values) if shape is None else shape
        size = int(np.prod(shape))
        self.all = np.zeros((size + 2 * GUARD) * dtype().itemsize + 16, np.uint8)
        self.all[:] = 0xFF
        start = -self.all.ctypes.data % 16
        self.all = self.all[start : start + (size + 2 * GUARD) * dtype().itemsize].view(dtype)
        self.data = self.all[GUARD : GUARD + size].reshape(shape)
        if values is not None:
            self.data[...] = values

    def guarded(self):
        for guard in (self.all[:GUARD], self.all[-GUARD:]):
            assert (guard.view(np.uint8) == 0xFF).all(), "written beside an array"


def to_bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Emulator:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)

    def launch(self, name, grid, block, shared, *args):
        """Arguments: Array (or Array and an offset in elements), None, int (u32), float (f32), or a ctypes value."""
        values, arrays = [], []
        for a in args:
            offset = 0
            if isinstance(a, tuple):
                a, offset = a
            if a is None:
                values.append(ctypes.c_void_p(None))
            elif isinstance(a, Array):
                arrays.append(a)
                values.append(ctypes.c_void_p(a.data.ctypes.data + offset * a.data.itemsize))
            elif isinstance(a, float):
                values.append(ctypes.c_float(a))
            elif isinstance(a, int):
                values.append(ctypes.c_uint32(a))
            else:
                values.append(a)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        grid, block = (tuple(x) + (1,) * (3 - len(x)) for x in (grid, block))
        rc = self.library.emulate_launch(name.encode(), *grid, *block, shared, pointers)
        assert rc == 0, f"no kernel {name}"
        for a in arrays:
            a.guarded()


def ceil(x, y):
    return -(-x // y)
