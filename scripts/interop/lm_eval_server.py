"""Does lm-evaluation-harness score a model behind `trine serve`, and as `trine logits` does?

    pip install lm_eval[api] transformers safetensors numpy
    cargo build --release
    python scripts/interop/lm_eval_server.py MODEL [--trine target/release/trine]

MODEL is a Hugging Face directory with a tokenizer. A task of multiple choice is written to a
temporary directory and run through the harness's local-completions, with token ids, echo and
log-probabilities, several requests at a time. Every log-likelihood that the harness logs must be
the sum over the logits of `trine logits` (f32; the server is run with --kv f32), and the largest
logits must be where the harness says that greedy decoding would go. Exits with 1 otherwise.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file
from transformers import AutoTokenizer

QUESTIONS = [
    ("The sun rises in the", ["east", "west", "soup"]),
    ("Two and two make", ["four", "five", "a very long song about rivers"]),
    ("To be or not to", ["be", "bee"]),
    ("A cat says", ["meow", "woof", "nothing at all"]),
] * 3

TASK = """\
task: trine_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
metadata:
  version: 1
"""


def start(trine, model):
    command = [trine, "serve", model, "--port", "0", "--name", "served", "--kv", "f32"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TRINE_LOG": "warn"})
    for line in server.stderr:
        found = re.match(r"listening at (\S+)", line)
        if found:
            return server, found[1]
    sys.exit("the server did not start")


def evaluate(address, model, directory):
    """What the harness logged: (context, continuation, log-likelihood, greedy)."""
    data = os.path.join(directory, "data.jsonl")
    with open(data, "w") as file:
        for question, choices in QUESTIONS:
            file.write(json.dumps({"question": question, "choices": choices}) + "\n")
    with open(os.path.join(directory, "task.yaml"), "w") as file:
        file.write(TASK.format(data=data))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="local-completions",
        model_args={
            "model": "served",
            "base_url": f"{address}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": model,
            "num_concurrent": 4,
            "max_retries": 1,
            "max_length": 256,
        },
        tasks=["trine_local"],
        task_manager=TaskManager(include_path=directory, include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    print("accuracy:", results["results"]["trine_local"]["acc,none"])
    for sample in results["samples"]["trine_local"]:
        pairs = zip(sample["arguments"], sample["filtered_resps"])
        for (context, continuation), (likelihood, greedy) in pairs:
            yield context, continuation, float(likelihood), greedy in (True, "True")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--trine", default="target/release/trine")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    server, address = start(args.trine, args.model)
    worst, differ, count = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as directory:
        try:
            logged = list(evaluate(address, args.model, directory))
        finally:
            server.kill()
        out = os.path.join(directory, "logits.safetensors")
        for context, continuation, likelihood, greedy in logged:
            # As the harness divides a text into tokens.
            whole = tokenizer.encode(context + continuation, add_special_tokens=False)
            begin = len(tokenizer.encode(context, add_special_tokens=False))
            ids = ",".join(map(str, whole))
            subprocess.run([args.trine, "logits", args.model, "--ids", ids, "--out", out], check=True, capture_output=True)
            logits = next(iter(load_file(out).values())).astype(np.float64).reshape(len(whole), -1)
            os.remove(out)
            rows, targets = logits[begin - 1 : -1], whole[begin:]
            logprobs = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) - rows.max(1, keepdims=True)
            expected = logprobs[np.arange(len(targets)), targets].sum()
            worst = max(worst, abs(expected - likelihood))
            differ += greedy != bool((rows.argmax(1) == targets).all())
            count += 1
    print(f"{count} log-likelihoods, largest difference {worst:.2e}, greedy otherwise: {differ}")
    sys.exit(0 if count and worst < 1e-3 and differ == 0 else 1)


if __name__ == "__main__":
    main()
