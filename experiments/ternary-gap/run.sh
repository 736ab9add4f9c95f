#!/bin/bash
# All runs of this experiment: bash run.sh dickens.txt sotu.txt (10.0 and 10.8 MB of text, UTF-8; Dickens
# comes in ISO 8859-1: iconv -f latin1 -t utf8).
# Results go to runs/, one line each to results.jsonl. What is there already is left alone.
set -euo pipefail
trine=${TRINE:-trine}
here=$(cd "$(dirname "$0")" && pwd)
[ -d corpus ] || "$trine" data prepare "$@" --tokenizer bpe:4096 --split-on $'\n\n' --val-fraction 0.01 --out corpus
declare -A size=(
  [1m]=""
  [4m]="--set model.hidden_size=256 --set model.intermediate_size=704 --set model.num_attention_heads=4"
  [12m]="--set model.hidden_size=384 --set model.intermediate_size=1024 --set model.num_hidden_layers=7 --set model.num_attention_heads=6 --set model.num_key_value_heads=3"
)
run() { # name, seed, options
  local name=$1 seed=$2 out="runs/$1-$2"; shift 2
  [ -d "$out" ] && "$trine" train "$out" --resume >/dev/null || "$trine" train "$here/base.toml" --set seed="$seed" --out "$out" "$@" >/dev/null
  python3 - "$name" "$seed" "$out" <<'P' >> results.jsonl
import json, sys
name, seed, out = sys.argv[1:]
lines = [json.loads(line) for line in open(f"{out}/metrics.jsonl")]
loss = {line["step"]: round(line["val_loss"], 4) for line in lines if "val_loss" in line}
speed = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
print(json.dumps({"run": name, "seed": int(seed), "val_loss": loss, "tok_s": speed[len(speed) // 2]}))
P
}
done_already() { [ -f results.jsonl ] && grep -q "\"run\": \"$1\", \"seed\": $2," results.jsonl; }
for seed in 1 2 3; do
  for s in 1m 4m 12m; do
    for kind in ternary none; do
      done_already "$s $kind" $seed || run "$s $kind" $seed ${size[$s]} --set model.quantization=$kind
    done
  done
done
# The price of each choice of architecture and schedule at 1m, against "1m ternary" and "1m none".
for seed in 1 2 3; do
  for kind in ternary none; do
    done_already "two-stage $kind" $seed || run "two-stage $kind" $seed --set model.quantization=$kind --set schedule.kind=two-stage --set schedule.second_learning_rate=1.2e-3
    done_already "silu $kind" $seed || run "silu $kind" $seed --set model.quantization=$kind --set model.hidden_act=silu
    done_already "no-sub-norms $kind" $seed || run "no-sub-norms $kind" $seed --set model.quantization=$kind --set model.sub_norms=false
  done
done
