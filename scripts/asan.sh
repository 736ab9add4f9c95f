#!/usr/bin/env bash
# Tests of the kernels on every instruction set of this CPU under AddressSanitizer, and those of the thread pool
# under ThreadSanitizer. Needs a nightly Rust with the component rust-src.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(rustc -vV | sed -n 's/^host: //p')

# A build with another sanitizer shares nothing with one without.
RUSTFLAGS=-Zsanitizer=address cargo +nightly test --target "$target" --target-dir "${CARGO_TARGET_DIR-target}/asan" \
    -p trine-kernels --lib -- "$@"

# The standard library too must be built for it, or its locks would look like races.
RUSTFLAGS=-Zsanitizer=thread cargo +nightly test --target "$target" --target-dir "${CARGO_TARGET_DIR-target}/tsan" \
    -Zbuild-std -p trine-kernels --lib -- parallel:: results_do_not_depend_on_threads
