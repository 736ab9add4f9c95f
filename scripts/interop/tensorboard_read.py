"""Does TensorBoard read our event files as metrics.jsonl says it?

    pip install tensorboard
    trine train configs/train/demo.toml --out RUN --set train.steps=200 \\
        --set diagnostics.tensorboard=true --set samples.every=100
    python scripts/interop/tensorboard_read.py RUN

Loads RUN/tensorboard with the package's own accumulator, which checks every checksum and forgets
what a resumed run made again, and compares with RUN/metrics.jsonl: every loss, validation loss and
learning rate, every measure of every projection, every sample.
Exits with 1 where something differs.
"""

import json
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator
from tensorboard.util import tensor_util

TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
}


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def expected(run):
    scalars, texts = {}, {}
    for line in open(f"{run}/metrics.jsonl"):
        line = json.loads(line)
        step = line["step"]
        for key, tag in TAGS.items():
            if key in line:
                scalars.setdefault(tag, {})[step] = f32(line[key])
        found = line.get("diagnostics")
        if found:
            for name, layer in [("all", found["all"]), *found["layers"].items()]:
                for measure, value in layer.items():
                    scalars.setdefault(f"{measure}/{name}", {})[step] = f32(value)
        for i, sample in enumerate(line.get("samples", [])):
            texts.setdefault(f"samples/{i}", {})[step] = f"**{sample['prompt']}**{sample['text']}"
    return scalars, texts


def main():
    run = sys.argv[1]
    events = EventAccumulator(f"{run}/tensorboard", size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE)
    events.Reload()
    scalars, texts = expected(run)
    different = 0
    for tag, steps in scalars.items():
        found = {e.step: f32(e.value) for e in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
        if found != steps:
            different += 1
            print(f"{tag}: {len(found)} values instead of {len(steps)}, or other ones")
    for tag, steps in texts.items():
        found = {e.step: tensor_util.make_ndarray(e.tensor_proto)[0].decode() for e in events.Tensors(tag)}
        if found != steps:
            different += 1
            print(f"{tag}: {found} instead of {steps}")
    values = sum(map(len, scalars.values()))
    print(f"{len(scalars)} scalars with {values} values, {len(texts)} texts: {different} differ")
    return 1 if different or not values else 0


if __name__ == "__main__":
    sys.exit(main())
