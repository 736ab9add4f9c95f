#!/usr/bin/env bash
# Interprets the tests of the definition, of the scalar kernels and of the thread pool under Miri, which reports
# undefined behaviour, data races and leaks. Needs a nightly Rust with the component miri. About ten minutes.
#
# Miri's CPU has no SIMD: scripts/asan.sh is for that code. Tests shrink themselves under `cfg!(miri)`, and
# those are left out that are exhaustive.
set -euo pipefail
cd "$(dirname "$0")/.."

# The pool asks the system for the number of CPUs, and property tests for the working directory. rayon's queues are
# not within the rules of Stacked Borrows, only within those of Tree Borrows, and its threads never end.
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-tree-borrows -Zmiri-ignore-leaks"
export PROPTEST_CASES=3 RAYON_NUM_THREADS=3

cargo +nightly miri test -p trine-ternary -- \
    --skip counts_are_those_of --skip masters_of_packed --skip masters_stay --skip rounding_is_that_of
cargo +nightly miri test -p trine-kernels --lib -- \
    parallel:: aligned:: packed:: activations:: tests::generic::matmul tests::generic::lines \
    tests::generic::dense tests::generic::dot tests::generic::sixteen products_with_nothing "$@"
