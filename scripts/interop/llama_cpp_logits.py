"""Does llama.cpp compute the same logits as Trine from one of our GGUF files?

    pip install llama-cpp-python numpy
    cargo build --release
    python scripts/interop/llama_cpp_logits.py MODEL [--trine target/release/trine]

MODEL is anything that `trine convert` reads, with SiLU and rows that are multiples of 256: what
llama.cpp computes under the architectures `llama` and `bitnet` (it has no squared ReLU). The model
is converted to TQ1_0 and TQ2_0; both programs tokenize a text, compute the logits after each token
of it and continue it greedily.

llama.cpp quantizes activations in blocks of 256 (Q8_K), which BitNet does for a whole token at a
time. So with ternary weights the two differ by the rounding of activations, some percent; where
llama.cpp is given the same weights as F32 it rounds no activations at all, which tells how much of
the difference that is. The check is that tokens are equal, that the error is at most 10 %, and that
the likeliest tokens agree where the difference between the best two is not within that error.
"""

import argparse
import subprocess
import sys
import tempfile

import numpy as np
from gguf import GGUFReader, GGUFWriter, GGMLQuantizationType
from gguf.quants import dequantize
from llama_cpp import Llama


def plain(path, to):
    """The same file with all tensors dequantized to F32."""
    reader = GGUFReader(path)
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    writer = GGUFWriter(to, arch)
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "trine.")) or field.name in ("general.architecture", "general.alignment"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--text", default="Once upon a time, there was a brave rabbit. 17 + 25 = 42, and the fox ran")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    trine = lambda *a: subprocess.run([args.trine, *a], check=True, capture_output=True, text=True).stdout
    failed = False
    with tempfile.TemporaryDirectory() as temp:
        for kind in ("tq1_0", "tq2_0"):
            path = f"{temp}/{kind}.gguf"
            trine("convert", args.model, path, "--type", kind, "--embed", "f32")
            llama = Llama(path, n_ctx=256, logits_all=True, verbose=False, n_threads=2)
            ids = llama.tokenize(args.text.encode(), add_bos=True, special=False)
            trine("logits", path, "--text", args.text, "--out", f"{temp}/logits.safetensors")
            data = open(f"{temp}/logits.safetensors", "rb").read()
            ours = np.frombuffer(data, "<f4", offset=8 + int.from_bytes(data[:8], "little"))
            vocab = llama.n_vocab()
            ours = ours.reshape(-1, vocab)
            if len(ours) != len(ids):
                print(f"{kind}: {len(ids)} tokens there, {len(ours)} here: DIFFERENT")
                failed = True
                continue
            llama.eval(ids)
            theirs = np.array(llama.scores[: len(ids)])
            error = np.linalg.norm(theirs - ours) / np.linalg.norm(ours)
            top = np.sort(ours, axis=-1)
            clear = top[:, -1] - top[:, -2] > 2 * np.abs(theirs - ours).max()
            agree = theirs.argmax(-1) == ours.argmax(-1)
            print(f"{kind}: {len(ids)} tokens, relative error {error:.2e}, same likeliest token {agree.mean():.3f} (clear ones: {agree[clear].mean() if clear.any() else 1:.3f} of {clear.sum()})")
            failed |= error > 0.1 or not agree[clear].all()
            out = llama(args.text, max_tokens=args.tokens, temperature=0, echo=False)["choices"][0]["text"]
            text = trine("run", path, "-p", args.text, "-t", "0", "-n", str(args.tokens)).removeprefix(args.text).removesuffix("\n")
            print(f"  llama.cpp: {out!r}\n  Trine:     {text!r}")
        plain(f"{temp}/tq2_0.gguf", f"{temp}/f32.gguf")
        llama = Llama(f"{temp}/f32.gguf", n_ctx=256, logits_all=True, verbose=False, n_threads=2)
        llama.eval(ids)
        unrounded = np.array(llama.scores[: len(ids)])
        distance = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
        print(f"without rounding activations: llama.cpp's own TQ2_0 is off by {distance(theirs, unrounded):.2e}, Trine by {distance(ours, unrounded):.2e}")
    print("DIFFERENT" if failed else "the same but for the rounding of activations")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
