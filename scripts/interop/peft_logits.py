"""Does Trine compute the same logits as peft with an adapter that peft made?

    pip install torch transformers accelerate peft
    cargo build --release
    python scripts/interop/peft_logits.py DIR [--trine target/release/trine]

DIR is a checkpoint with master weights (runs/NAME/checkpoints/step-000500, or what `trine convert
--type hf` wrote), which transformers opens and peft wraps. peft makes an adapter of random numbers beside
all projections and saves it; both compute logits after a sequence of ids. Exits with 1 when the relative
error is above the tolerance: 1e-5, unless an activation lies on a rounding boundary and one int8 code
flips, which moves logits by up to 3e-2 (see tests/integration/parity.rs). The other way round, adapters
that Trine trained are judged by peft_adapter.py.
"""

import argparse
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made(model, rank, directory):
    """The model with an adapter that changes it, as peft saves one."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wrapped.save_pretrained(directory)
    return wrapped


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temp:
        model = AutoModelForCausalLM.from_pretrained(args.dir, dtype=torch.float32).eval()
        ids = [i * i * 31 % model.config.vocab_size for i in range(1, args.length + 1)]
        with torch.no_grad():
            plain = model(torch.tensor([ids])).logits[0]
            adapter = f"{temp}/adapter"
            wrapped = made(model, args.rank, adapter)
            theirs = wrapped.eval()(torch.tensor([ids])).logits[0]
        out = f"{temp}/logits.safetensors"
        command = [args.trine, "logits", args.dir, "--adapter", adapter, "--out", out]
        subprocess.run([*command, "--ids", ",".join(map(str, ids))], check=True)
        ours = load_file(out)["logits"]

    effect = float((plain - theirs).norm() / theirs.norm())
    error = float((ours - theirs).norm() / theirs.norm())
    print(f"logits: {tuple(theirs.shape)}, changed by the adapter by {effect:.2e}, relative error {error:.2e}")
    return 0 if error <= args.tolerance and effect > 100 * error else 1


if __name__ == "__main__":
    sys.exit(main())
