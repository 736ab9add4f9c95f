#!/usr/bin/env bash
# Tests the NEON instruction sets on any machine: built for AArch64, run by qemu's user mode.
#
# Needs the Rust target aarch64-unknown-linux-gnu (`rustup target add`), a linker and C library for it
# (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross) and qemu-aarch64 (qemu-user-static). On an AArch64 machine
# `cargo test` does the same. Where something is missing, exits with 3 and says what.
#
#   scripts/test-aarch64.sh [--check] [arguments of cargo test]
#
# --check only says whether something is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
missing() { echo "$1"; exit 3; }

libdir=$(rustc --print target-libdir --target "$target")
[[ -d $libdir ]] || missing "Rust has no standard library for $target (rustup target add $target)"
linker=aarch64-linux-gnu-gcc
command -v "$linker" >/dev/null || missing "no $linker (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross)"
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || missing "no qemu-aarch64 (Debian: qemu-user-static)"
root=$(dirname "$(dirname "$("$linker" -print-file-name=libc.so.6)")")
[[ -e $root/lib/ld-linux-aarch64.so.1 ]] || missing "no C library for AArch64 (Debian: libc6-dev-arm64-cross)"

[[ ${1-} != --check ]] || exit 0

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$linker
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$qemu -L $root -cpu max"

# The kernels' tests compare all instruction sets; the models run on the best.
TRINE_REQUIRE_ISA=generic,neon,neondot \
    cargo test --target "$target" -p trine-ternary -p trine-kernels -p trine-runtime "$@"
