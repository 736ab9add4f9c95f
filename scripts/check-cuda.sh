#!/usr/bin/env bash
# Checks the CUDA kernels on a machine without a card: emulated on the CPU against plain sums, and compiled for the cards
# that are supported. About three minutes, and Rust's compilation.
#
# Needs a C++ compiler ($CXX, or c++) and a Python ($PYTHON, or python3) with numpy; for compilation also NVRTC, CUDA's
# run-time compiler (libnvrtc of CUDA 13 or 12.8 on), which is looked for where libraries are, in CUDA's directory and
# in Python's package nvidia-cuda-nvrtc. What is missing is skipped, and the script says so and exits with 3.
#
#   scripts/check-cuda.sh [--fetch]
#
# --fetch installs the Python packages that are missing into a temporary virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."

fetch=
case ${1-} in
--fetch) fetch=1 ;;
"") ;;
*) echo "usage: scripts/check-cuda.sh [--fetch]" >&2; exit 2 ;;
esac

step() { printf '\n=== %s\n' "$*"; }
skipped=0
skip() { step "skipped: $*"; skipped=3; }

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python=${PYTHON-python3}
cxx=${CXX-c++}
emulator=crates/trine-cuda/emulator

# Installs a package, where that is wanted.
install() {
    [[ -n $fetch ]] || return 1
    [[ -d $out/venv ]] || "$python" -m venv --system-site-packages "$out/venv" || return 1
    "$out/venv/bin/pip" install --quiet --disable-pip-version-check "$1" || return 1
    python=$out/venv/bin/python
}

# The directory of libnvrtc; nothing where the loader finds it by itself. Fails where there is none.
nvrtc() {
    ! "$python" -c 'import ctypes.util, sys; sys.exit(not ctypes.util.find_library("nvrtc"))' || return 0
    local roots=("${CUDA_HOME-/usr/local/cuda}/lib64") packages root
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    roots+=("$packages"/nvidia/*/lib)
    for root in "${roots[@]}"; do
        if compgen -G "$root/libnvrtc.so.*" >/dev/null; then
            echo "$root"
            return 0
        fi
    done
    return 1
}

if ! command -v "$cxx" >/dev/null; then
    skip "emulation: no C++ compiler ($cxx)"
elif ! command -v "$python" >/dev/null; then
    skip "emulation: no $python"
else
    # Warnings are errors; pragmas are for the other compiler, and a changed calling convention is nobody's concern.
    build=("$cxx" -O2 -std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-psabi -DEMULATED -pthread)

    step "the emulator itself"
    "${build[@]}" "$emulator/check_emulator.cpp" -o "$out/check_emulator"
    "$out/check_emulator"
    for wrong in barrier lanes kinds align; do
        # It aborts; a shell of its own keeps that to itself.
        if (ulimit -c 0; "$out/check_emulator" "$wrong" || exit 1) >"$out/log" 2>&1; then
            echo "what must be refused was not: $wrong"
            exit 1
        fi
    done

    if "$python" -c 'import numpy' 2>/dev/null || install numpy; then
        "${build[@]}" -shared -fPIC "$emulator/emulate.cpp" -o "$out/libemulate.so"
        for check in attention attention_backward product_int8; do
            step "emulated: $check"
            # There may be hundreds of lines: where something is wrong, all of them matter.
            "$python" "$emulator/check_$check.py" "$out/libemulate.so" >"$out/log" || { cat "$out/log"; exit 1; }
            tail -n 2 "$out/log"
        done
    else
        skip "emulated kernels: no numpy for $python (or --fetch)"
    fi
fi

if libraries=$(nvrtc) || { install nvidia-cuda-nvrtc && libraries=$(nvrtc); }; then
    step "compiled for cards"
    export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    cargo test -p trine-cuda --test compile -- --nocapture 2>&1 | tee "$out/log"
    if grep -q '^skipped' "$out/log"; then skip "compilation: libnvrtc was found, but does not load"; fi
else
    skip "compilation: no libnvrtc (or --fetch)"
fi
exit "$skipped"
