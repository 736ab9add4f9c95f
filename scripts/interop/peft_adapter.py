"""Does PEFT compute the same logits as Trine with one of our adapters?

    pip install torch transformers accelerate peft
    cargo build --release
    python scripts/interop/peft_adapter.py BASE ADAPTER [--trine target/release/trine]

BASE is a Hugging Face directory (a checkpoint of a run, or what `trine convert --type hf` wrote), ADAPTER
a checkpoint of `trine finetune` with `finetune.method = "lora"`. PEFT loads the adapter onto the model that
transformers loads; both are widened to f32 and compared with `trine logits BASE --adapter ADAPTER`.
Exits with 1 when the relative error is above the tolerance: 1e-5, unless an activation lies on a
rounding boundary and one int8 code flips, which moves logits by up to 3e-2.
"""

import argparse
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("adapter")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--text", default="Once upon a time, there was a brave rabbit.\n17 + 25 = 42")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()

    ids = AutoTokenizer.from_pretrained(args.adapter)(args.text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    tokens = torch.tensor([ids])
    with torch.no_grad():
        plain = model(tokens).logits[0]
        adapted = PeftModel.from_pretrained(model, args.adapter).eval()
        theirs = adapted(tokens).logits[0]

    with tempfile.TemporaryDirectory() as temp:
        out = f"{temp}/logits.safetensors"
        listed = ",".join(map(str, ids))
        command = [args.trine, "logits", args.base, "--adapter", args.adapter, "--ids", listed]
        subprocess.run([*command, "--out", out], check=True)
        ours = load_file(out)["logits"]

    error = ((ours - theirs).norm() / theirs.norm()).item()
    change = ((theirs - plain).norm() / plain.norm()).item()
    print(f"{len(ids)} ids: relative error {error:.2e}; the adapter itself changes logits by {change:.2e}")
    sys.exit(0 if error <= args.tolerance and change > 10 * error else 1)


if __name__ == "__main__":
    main()
