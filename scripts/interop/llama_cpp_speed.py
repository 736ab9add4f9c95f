"""How fast are Trine and llama.cpp on the same weights, in turn on the same machine?

    pip install llama-cpp-python gguf
    cargo build --release
    target/release/trine synth-model --shape 2b4t 2b4t.gguf
    target/release/trine convert 2b4t.gguf tq2.gguf --type tq2_0 --embed q6_k
    python scripts/interop/llama_cpp_speed.py tq2.gguf [--threads 2] [--rounds 5]

MODEL is a GGUF in TQ1_0 or TQ2_0. llama.cpp is given a copy under its architecture `bitnet`, which has
SiLU where the model may have squared ReLU: the logits are of another function, the work is the same. Both
programs time a prompt of 512 tokens in an empty context, and then 64 tokens one by one. Rounds alternate,
and what is printed is the median of each and the median of their ratios.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time

import llama_cpp
from gguf import GGUFReader, GGUFWriter
from llama_cpp import Llama

PROMPT, TOKENS = 512, 64


def as_bitnet(path, to):
    """The same file under the architecture `bitnet`."""
    reader = GGUFReader(path)
    arch = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    writer = GGUFWriter(to, "bitnet")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "trine.")) or field.name in ("general.architecture", "general.alignment"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name.replace(f"{arch}.", "bitnet."), field.contents(), kind, sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def theirs(llama, vocab):
    """Prompt and generated tokens a second in llama.cpp."""
    ids = [(i * 7919) % vocab for i in range(PROMPT + TOKENS)]
    llama.reset()
    llama._ctx.kv_cache_clear()
    begin = time.perf_counter()
    llama.eval(ids[:PROMPT])
    prefill = PROMPT / (time.perf_counter() - begin)
    llama.reset()
    llama._ctx.kv_cache_clear()
    llama.eval(ids[:8])
    begin = time.perf_counter()
    for token in ids[PROMPT:]:
        llama.eval([token])
    return prefill, TOKENS / (time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    command = [args.trine, "bench", args.model, "-t", args.threads, "-p", PROMPT, "-n", TOKENS, "-r", 1, "--json"]
    rounds = []
    with tempfile.TemporaryDirectory() as temp:
        as_bitnet(args.model, f"{temp}/model.gguf")
        llama = Llama(
            f"{temp}/model.gguf", n_ctx=1024, n_batch=PROMPT, n_ubatch=PROMPT, verbose=False,
            n_threads=args.threads, n_threads_batch=args.threads,
        )
        for _ in range(args.rounds):
            found = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
            found = json.loads(found)
            rounds.append(((found["prefill_tok_s"], found["decode_tok_s"]), theirs(llama, llama.n_vocab())))
    print(f"llama-cpp-python {llama_cpp.__version__}, {args.threads} threads, {args.rounds} rounds")
    for i, name in enumerate((f"prompt of {PROMPT}", f"{TOKENS} tokens")):
        ours, other = ([round[who][i] for round in rounds] for who in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(ours, other))
        print(f"{name:>14}: Trine {statistics.median(ours):6.1f} tok/s, llama.cpp {statistics.median(other):6.1f} tok/s, {ratio:.2f} x")


if __name__ == "__main__":
    main()
