"""Does the gguf package (llama.cpp's own Python code) read our GGUF files as we do?

    pip install gguf numpy
    cargo build --release
    python scripts/interop/gguf_weights.py MODEL [--trine target/release/trine]

MODEL is anything that `trine convert` reads whose rows are multiples of 256. It is converted to
TQ1_0, TQ2_0 and packed Hugging Face tensors. gguf dequantizes the former; the latter are unpacked
here, as transformers does it. Every weight must be the trit times the f16 of the scale that
`trine inspect` reports; an embedding in blocks must be what it was made of but for the
rounding of these types. Exits with 1 when anything differs. (gguf knows no I2_S.)
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def safetensors(path):
    data = open(path, "rb").read()
    header = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, info in json.loads(data[8 : 8 + header]).items():
        if name != "__metadata__":
            start, end = info["data_offsets"]
            tensors[name] = (info["dtype"], info["shape"], data[8 + header + start : 8 + header + end])
    return tensors


def unpack(packed, rows):
    """Trits (rows, cols) of uint8 (ceil(rows / 4), cols)."""
    planes = [((packed >> 2 * i) & 3).astype(np.int8) - 1 for i in range(4)]
    return np.concatenate(planes)[:rows]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--trine", default="target/release/trine")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as temp:
        trine = lambda *a: subprocess.run([args.trine, *a], check=True, capture_output=True, text=True).stdout
        shown = json.loads(trine("inspect", args.model, "--json"))
        scales = {t["name"]: (t["scale"], t["shape"][0]) for t in shown["ternary"]}
        heads = shown["config"]["num_attention_heads"], shown["config"]["num_key_value_heads"]
        trine("convert", args.model, f"{temp}/packed", "--type", "hf-packed")
        packed = safetensors(f"{temp}/packed/model.safetensors")
        for kind in ("tq1_0", "tq2_0"):
            path = f"{temp}/{kind}.gguf"
            trine("convert", args.model, path, "--type", kind, "--embed", "f16")
            reader = GGUFReader(path)
            tensors = {t.name: t for t in reader.tensors}
            llama = bytes(reader.fields["general.architecture"].parts[-1]) == b"llama"
            compared = 0
            for name, (scale, rows) in scales.items():
                layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
                _, shape, data = packed[name]
                trits = unpack(np.frombuffer(data, np.uint8).reshape(shape), rows)
                if llama and part in ("self_attn.q_proj", "self_attn.k_proj"):
                    n = heads[part == "self_attn.k_proj"]  # llama.cpp's order of rows for its rotary embedding
                    trits = trits.reshape(n, 2, rows // n // 2, -1).swapaxes(1, 2).reshape(trits.shape)
                found = tensors[f"blk.{layer}.{NAMES[part]}.weight"]
                values = dequantize(found.data, found.tensor_type).reshape(trits.shape)
                if not np.array_equal(values, trits * np.float32(np.float16(scale))):
                    print(f"{kind}: {name} DIFFERS")
                    failed = True
                compared += trits.size
            keys = [k for k in reader.fields if k.startswith("tokenizer.")]
            print(f"{kind}: {compared} weights of {len(scales)} tensors compared, {len(keys)} tokenizer keys")
        for kind, limit in (("q8_0", 0.01), ("q6_k", 0.03), ("q4_0", 0.15), ("q3_k", 0.2)):
            path = f"{temp}/{kind}.gguf"
            trine("convert", args.model, path, "--type", "tq2_0", "--embed", kind)
            found = next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
            values = dequantize(found.data, found.tensor_type)
            original = next(t for t in GGUFReader(f"{temp}/tq2_0.gguf").tensors if t.name == "token_embd.weight")
            original = original.data.astype(np.float32).reshape(values.shape)
            error = np.linalg.norm(values - original) / np.linalg.norm(original)
            print(f"{kind}: embedding {values.shape}, relative error {error:.1e}")
            failed |= error > limit
    print("DIFFERENT" if failed else "all equal")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
