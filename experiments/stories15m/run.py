"""All runs of this experiment, in a directory with `teacher` (teacher.py) and stories.jsonl (sample.py). What
results.jsonl has is left alone."""
import argparse, json, pathlib, subprocess

# A step of next to nothing: what is measured is the model that the run begins with.
BEFORE = ["train.steps=1", "optimizer.learning_rate=1e-12", "schedule.warmup_steps=0"]
DISTILL = ["finetune.distill.cross_entropy=0.1", "finetune.distill.divergence=0.9",
           "finetune.distill.temperature=1.0"]
ONCE = {
    "teacher": [*BEFORE, "finetune.ternarize=false"],
    "ternarized": BEFORE,
    "ternarized, sub-norms": [*BEFORE, "finetune.add_sub_norms=true"],
}
WAYS = {
    "continued": [],
    "continued, lambda": ["quantizer.lambda_steps=150"],
    "distilled": DISTILL,
    "distilled, top 64": [*DISTILL, "finetune.distill.cache=said", "finetune.distill.top_k=64"],
    "distilled, relations": [*DISTILL, "finetune.distill.relations.factor=1.0"],
    "distilled, sub-norms": [*DISTILL, "finetune.add_sub_norms=true"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trine", default="trine")
    trine = parser.parse_args().trine
    here, results = pathlib.Path(__file__).parent, pathlib.Path("results.jsonl")
    runs = [(way, 1, settings) for way, settings in ONCE.items()]
    runs += [(way, seed, settings) for seed in (1, 2, 3) for way, settings in WAYS.items()]
    for way, seed, settings in runs:
        done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        if any((run["way"], run["seed"]) == (way, seed) for run in done):
            continue
        out = f"runs/{way.replace(' ', '-').replace(',', '')}-{seed}"
        try:
            pathlib.Path(f"{out}.begun").open("x")
        except FileExistsError:
            continue  # another process is at it
        command = [trine, "finetune", str(here / "base.toml"), "--out", out, "--set", f"seed={seed}"]
        for setting in settings:
            command += ["--set", setting]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
        losses = {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line}
        run = {"way": way, "seed": seed, "val_loss": losses}
        far = [line["divergence"] for line in lines[-50:] if "divergence" in line]
        if far:
            run["divergence"] = round(sum(far) / len(far), 4)
        with open(results, "a") as file:
            file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
