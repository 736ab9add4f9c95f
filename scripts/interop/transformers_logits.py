"""Does transformers compute the same logits as Trine from one of our directories?

    pip install torch transformers accelerate
    cargo build --release
    python scripts/interop/transformers_logits.py DIR [--trine target/release/trine]

DIR is a checkpoint of a run (runs/NAME/checkpoints/step-000500) or what `trine convert --type
hf-packed` wrote. The model is loaded by transformers, widened to f32, and compared with
`trine logits` on a sequence of ids; tokenizers are compared on a text. Exits with 1 when the
relative error is above the tolerance: 1e-5, unless an activation lies on a rounding boundary and
one int8 code flips, which moves logits by up to 3e-2 (see tests/integration/parity.rs).
"""

import argparse
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--text", default="Once upon a time, there was a brave rabbit.\n17 + 25 = 42")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.dir)
    ids = tokenizer(args.text)["input_ids"]
    encode = [args.trine, "tokenizer", "encode", f"{args.dir}/tokenizer.json", args.text, "--json"]
    ours = subprocess.run(encode, check=True, capture_output=True, text=True).stdout
    same_ids = ours.strip() == str(ids).replace(" ", "")
    print(f"tokenizer: {len(ids)} ids, {'equal' if same_ids else 'DIFFERENT: ' + ours.strip()}")

    # transformers leaves norms of packed models in bf16 when asked for f32; widening is exact.
    model = AutoModelForCausalLM.from_pretrained(args.dir, dtype="auto").eval()
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and tensor.is_floating_point():
                    store[name] = (
                        torch.nn.Parameter(tensor.float(), requires_grad=False)
                        if store is module._parameters
                        else tensor.float()
                    )
    model.tie_weights()
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].float()

    with tempfile.TemporaryDirectory() as temp:
        out = f"{temp}/logits.safetensors"
        listed = ",".join(map(str, ids))
        subprocess.run([args.trine, "logits", args.dir, "--ids", listed, "--out", out], check=True)
        found = load_file(out)["logits"]

    error = float((found - theirs).norm() / theirs.norm())
    agree = float((found.argmax(-1) == theirs.argmax(-1)).float().mean())
    print(f"logits: {tuple(theirs.shape)}, relative error {error:.2e}, same likeliest token {agree:.3f}")
    return 0 if same_ids and error <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
