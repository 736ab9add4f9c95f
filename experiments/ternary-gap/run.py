"""All runs of this experiment. Usage: run.py CORPUS_TEXT...

Takes runs one after the other from one list and skips what another process has begun or results.jsonl has,
so that it can be stopped and started again, and started once for each processor (`RAYON_NUM_THREADS=1 taskset -c 0`).
"""
import argparse, fcntl, json, os, pathlib, statistics, subprocess

SIZES = {
    "1m": [],
    "4m": ["model.hidden_size=256", "model.intermediate_size=704"],
    "12m": ["model.hidden_size=384", "model.intermediate_size=1024", "model.num_hidden_layers=7",
            "model.num_attention_heads=6", "model.num_key_value_heads=3"],
}
CHOICES = {
    "two-stage": ["schedule.kind=two-stage", "schedule.second_learning_rate=1.2e-3"],
    "silu": ["model.hidden_act=silu"],
    "no-sub-norms": ["model.sub_norms=false"],
}
KINDS = ["ternary", "none"]


def runs():
    for seed in (1, 2, 3):
        for size in ("1m", "4m"):
            for kind in KINDS:
                yield f"{size} {kind}", seed, SIZES[size] + [f"model.quantization={kind}"]
    for seed in (1, 2, 3):
        for choice, options in CHOICES.items():
            for kind in KINDS:
                yield f"{choice} {kind}", seed, options + [f"model.quantization={kind}"]
    for seed in (1, 2, 3):
        for kind in KINDS:
            yield f"12m {kind}", seed, SIZES["12m"] + [f"model.quantization={kind}"]


def train(trine, config, name, seed, options):
    out = pathlib.Path("runs") / f"{name.replace(' ', '-')}-{seed}"
    if (out / "checkpoints").exists():
        command = [trine, "train", str(out), "--resume"]
    else:
        command = [trine, "train", str(config), "--out", str(out), "--set", f"seed={seed}"]
        command += [part for option in options for part in ("--set", option)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return {
        "run": name,
        "seed": seed,
        "val_loss": {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line},
        "tok_s": round(statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="*")
    parser.add_argument("--trine", default="trine")
    arguments = parser.parse_args()
    here = pathlib.Path(__file__).parent
    if not pathlib.Path("corpus").exists():
        subprocess.run([arguments.trine, "data", "prepare", *arguments.text, "--tokenizer", "bpe:4096",
                        "--split-on", "\n\n", "--val-fraction", "0.01", "--out", "corpus"], check=True)
    os.makedirs("runs", exist_ok=True)
    for name, seed, options in runs():
        with open(f"runs/{name.replace(' ', '-')}-{seed}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            done = pathlib.Path("results.jsonl")
            if done.exists() and any((line["run"], line["seed"]) == (name, seed)
                                     for line in map(json.loads, done.read_text().splitlines())):
                continue
            result = train(arguments.trine, here / "base.toml", name, seed, options)
            with open(done, "a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
