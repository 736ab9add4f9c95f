"""All runs of this experiment, in a directory with `demo` (the run of `trine demo`), `2b4t.jinja`
(configs/chat), and train.jsonl, test.jsonl (questions.py). What results.jsonl has is left alone."""
import argparse, json, pathlib, subprocess

WAYS = {
    "lora 1e-3": ["finetune.method=lora", "optimizer.learning_rate=1e-3"],
    "lora 1e-2": ["finetune.method=lora", "optimizer.learning_rate=1e-2"],
    "full 1e-6": ["finetune.method=full", "optimizer.learning_rate=1e-6"],
    "full 1e-5": ["finetune.method=full", "optimizer.learning_rate=1e-5"],
    "full 1e-4": ["finetune.method=full", "optimizer.learning_rate=1e-4"],
    "full 1e-3": ["finetune.method=full", "optimizer.learning_rate=1e-3"],
    "full 1e-3 sum": ["finetune.method=full", "optimizer.learning_rate=1e-3", "finetune.loss=sum"],
    "full 1e-3 sum, no clipping": ["finetune.method=full", "optimizer.learning_rate=1e-3",
                                   "finetune.loss=sum", "optimizer.clip_grad_norm=0"],
}


def accuracy(trine, model):
    """Share of the test questions whose answer is written to the letter, greedily."""
    lines = [json.loads(line)["messages"] for line in open("test.jsonl")]
    right = 0
    for question, answer in lines:
        prompt = f"<|begin_of_text|>User: {question['content']}<|eot_id|>Assistant: "
        said = subprocess.run([*model, "-p", prompt, "-n", "16", "--temperature", "0", "--json"],
                              check=True, capture_output=True, text=True).stdout
        right += json.loads(said)["text"].strip() == answer["content"]
    return right / len(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trine", default="trine")
    parser.add_argument("--only", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all runs")
    args = parser.parse_args()
    trine = args.trine
    here, results = pathlib.Path(__file__).parent, pathlib.Path("results.jsonl")
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed in (1, 2, 3):
        for way, settings in ((way, WAYS[way]) for way in args.only):
            if any((run["way"], run["seed"]) == (way, seed) for run in done):
                continue
            out = f"runs/{way.replace(' ', '-').replace(',', '')}-{seed}"
            command = [trine, "finetune", str(here / "base.toml"), "--out", out, "--set", f"seed={seed}"]
            for setting in settings + args.set:
                command += ["--set", setting]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
            lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
            losses = {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line}
            run = {"way": way, "seed": seed, "val_loss": losses}
            model = [trine, "run", out]
            if "lora" in way:
                model = [trine, "run", "demo", "--adapter", out]
            else:
                verify = subprocess.run([trine, "verify", "demo", out, "--json"], capture_output=True, text=True)
                found = json.loads(verify.stdout)
                run["flipped"] = round(found["trits_differ"] / found["trits"], 5)
            run["accuracy"] = accuracy(trine, model)
            with open(results, "a") as file:
                file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
