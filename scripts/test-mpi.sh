#!/usr/bin/env bash
# Trains one tiny run by 1, 2 and 4 processes under mpirun and compares losses and checkpoints, also where each has
# an emulated GPU; stops one and takes it up with another number of processes; lets one process fail, and sees that
# none is left waiting.
#
# Needs Open MPI and libclang (Debian: libopenmpi-dev openmpi-bin libclang-dev) and python3. Where something
# is missing, exits with 3 and says what.
#
#   scripts/test-mpi.sh [--check]
#
# --check only says whether something is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

missing() { echo "$1"; exit 3; }
for program in mpicc mpirun python3; do
    command -v "$program" >/dev/null || missing "no $program (Debian: libopenmpi-dev openmpi-bin python3)"
done
mpirun --version 2>/dev/null | grep -q "Open MPI" || missing "mpirun is not Open MPI's"
clang=
for file in "${LIBCLANG_PATH:-/nowhere}"/libclang*.so* /usr/lib/llvm*/lib/libclang*.so* /usr/lib/*/libclang*.so* \
    /usr/lib{,64}/libclang*.so*; do
    [[ ! -e $file ]] || clang=$file
done
[[ -n $clang ]] || missing "no libclang (Debian: libclang-dev)"
[[ ${1-} != --check ]] || exit 0

# With a test beside it dependencies have the features that they have in `cargo test --workspace`: built once.
cargo build --workspace --profile test --features trine/mpi --bin trine --test parallel
trine=${CARGO_TARGET_DIR:-target}/debug/trine
trine=$(realpath "$trine")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
step() { printf '\n== %s\n' "$*" >&2; }

# More processes than cores; in a container, memory of another process may not be read.
export OMPI_MCA_btl_vader_single_copy_mechanism=none
mpi=(mpirun --oversubscribe)
[[ $(id -u) != 0 ]] || mpi+=(--allow-run-as-root)

cat >tiny.toml <<'TOML'
seed = 5
[model]
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 3
num_attention_heads = 2
num_key_value_heads = 1
[data]
path = "data"
seq_len = 32
[schedule]
warmup_steps = 2
[train]
steps = 40
batch_size = 8
batch_warmup_steps = 6
batch_start = 1
eval_every = 10
checkpoint_every = 20
keep_last = 0
TOML
"$trine" data synth corpus.txt --bytes 200000 2>/dev/null
"$trine" data prepare corpus.txt --out data --tokenizer bpe:300 2>/dev/null

# Without trits, which flip over float noise, so that losses can be compared closely.
exact=(--set model.quantization=none --set train.precision=f32)

# compare A B TOLERANCE [STEPS]: losses of every step and validation, and the masters of the last checkpoint.
compare() {
    python3 - "$@" <<'PY'
import array, json, os, sys
a, b, tolerance = sys.argv[1], sys.argv[2], float(sys.argv[3])
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 40

def lines(run):
    return [json.loads(line) for line in open(f"{run}/metrics.jsonl")]

def losses(run, key):
    return [(line["step"], line[key]) for line in lines(run) if key in line]

def masters(run):
    data = open(f"{run}/checkpoints/step-{steps:06}/model.safetensors", "rb").read()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + n])
    read = lambda t: array.array("f", data[8 + n + t["data_offsets"][0]:8 + n + t["data_offsets"][1]])
    return {name: read(t) for name, t in header.items() if name != "__metadata__"}

worst = 0.0
for key, count in [("loss", steps), ("val_loss", steps // 10)]:
    found, expected = losses(a, key), losses(b, key)
    assert len(found) == count, f"{a}: {len(found)} lines with {key}, not {count}"
    assert [s for s, _ in found] == [s for s, _ in expected], f"{a}, {b}: other steps"
    worst = max([worst] + [abs(x - y) / y for (_, x), (_, y) in zip(found, expected)])
for key in ["tokens", "batch_size", "learning_rate"]:
    assert losses(a, key) == losses(b, key), f"{a}, {b}: other {key}"
assert sorted(os.listdir(f"{a}/checkpoints")) == sorted(os.listdir(f"{b}/checkpoints"))
moved = size = 0.0
other = masters(b)
for name, values in masters(a).items():
    moved += sum((x - y) ** 2 for x, y in zip(values, other[name]))
    size += sum(y * y for y in other[name])
print(f"{a} and {b}: losses {worst:.1e} apart, masters {(moved / size) ** 0.5:.1e}", file=sys.stderr)
assert worst < tolerance and (moved / size) ** 0.5 < 100 * tolerance, "too far apart"
PY
}

step "one process, without mpirun and with it"
"$trine" train tiny.toml --out one "${exact[@]}" 2>/dev/null
"${mpi[@]}" -n 1 "$trine" train tiny.toml --out of-1 "${exact[@]}" 2>log-1
compare of-1 one 1e-12

for n in 2 4; do
    step "$n processes"
    "${mpi[@]}" -n "$n" "$trine" train tiny.toml --out "of-$n" "${exact[@]}" 2>"log-$n"
    grep "$n processes" "log-$n" >&2
    [[ $(grep -c "^saved " "log-$n") == $(grep -c "^saved " log-1) ]]
    compare "of-$n" one 1e-5
done

step "4 processes, ternary"
"$trine" train tiny.toml --out ternary 2>/dev/null
"${mpi[@]}" -n 4 "$trine" train tiny.toml --out ternary-4 2>/dev/null
compare ternary-4 ternary 3e-2

step "2 processes, each with an emulated GPU"
emulated=("${exact[@]}" --device emulator --set train.steps=10 --set train.accumulate=2)
"$trine" train tiny.toml --out emulated "${emulated[@]}" 2>/dev/null
"${mpi[@]}" -n 2 "$trine" train tiny.toml --out emulated-2 "${emulated[@]}" 2>/dev/null
compare emulated-2 emulated 1e-5 10

# start RUN STEP ARGUMENT...: two processes in the background, until they have made that step.
start() {
    local run=$1 at=$2
    shift 2
    "${mpi[@]}" --mca odls_base_sigkill_timeout 3 -n 2 "$trine" train tiny.toml --out "$run" "$@" 2>"log-$run" &
    pid=$!
    until grep -qs "\"step\":$at," "$run/metrics.jsonl"; do
        kill -0 "$pid" || { cat "log-$run" >&2; exit 1; }
        sleep 0.01
    done
}

# stopped RUN: they have said so, and end with a status that is not 0.
stopped() {
    local status=0
    wait "$pid" || status=$?
    grep "^interrupted at step" "log-$1" >&2
    [[ $status != 0 ]]
}

step "stopped by a signal with 2 processes, taken up by 3"
start stopped 12 "${exact[@]}"
kill -USR1 "$pid"
stopped stopped
[[ ! -e stopped/checkpoints/step-000040 ]] || { echo "it was over before it was stopped" >&2; exit 1; }
"${mpi[@]}" -n 3 "$trine" train stopped --resume 2>log-resumed
# Saved when it was stopped, as one that was not is not.
for checkpoint in stopped/checkpoints/*; do
    [[ -e one/checkpoints/${checkpoint##*/} ]] || rm -r "$checkpoint"
done
compare stopped one 1e-5

step "stopped by ctrl-C"
start interrupted 5 --set train.steps=100000 --set train.eval_every=100000 --set train.checkpoint_every=100000
kill -INT "$pid"
stopped interrupted
[[ $(ls interrupted/checkpoints | wc -l) == 1 ]]

step "an error of one process"
status=0
timeout 60 "${mpi[@]}" -n 1 "$trine" train tiny.toml --out failed : \
    -n 1 "$trine" train tiny.toml --out failed --set seed=6 2>log-failed || status=$?
grep "^error: process 1 of 2: .*seed" log-failed >&2
[[ $status != 0 && $status != 124 ]]

step "an error of all processes is told once"
status=0
timeout 60 "${mpi[@]}" -n 2 "$trine" train tiny.toml --out one 2>log-all || status=$?
[[ $(grep -c "^error: " log-all) == 1 && $status != 0 && $status != 124 ]]
grep "^error: " log-all >&2
