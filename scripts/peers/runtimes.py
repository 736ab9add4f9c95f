"""How fast are Trine, ik_llama.cpp and bitnet.cpp on the same shape, in turn on the same machine?

    cargo build --release
    target/release/trine synth-model --shape 2b4t masters.gguf
    target/release/trine convert masters.gguf model.gguf --type i2_s --embed q6_k
    python scripts/peers/runtimes.py model.gguf --ik IK_SOURCE --bitnet BITNET_SOURCE [--threads 2] [--rounds 3]

SOURCE is the source tree of the program, a clone of its repository or what a Rust package of bindings
carries of it (ik-llama-cpp-sys, bitnet-cpp-sys). Its library is built here, with CMake and Ninja and the
compilers of `CC` and `CXX` (which matter: time both; Clang's OpenMP library is a package of its own), and
llama_bench.cpp beside this file is linked to it. A program that is in `--work` is not built again.

ik_llama.cpp gets the model in IQ2_BN_R4, its fastest form, made by its own quantizer. A bitnet.cpp that does
not know the architecture `bitnet-b1.58` takes the same shape with SiLU, given by `--bitnet-model`:

    target/release/trine synth-model --shape 2b4t --type hf-packed silu      then `"hidden_act": "silu"` in
    target/release/trine convert silu silu.gguf --type i2_s --embed q6_k     silu/config.json

Every round runs each program once: a prompt of 512 tokens, 64 tokens one by one at three depths, 8 and 16
sequences together. What is printed is the median of each program, and that of Trine's times theirs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
PROMPT, TOKENS, DEPTHS = 512, 64, "0,2048,3968"
STEPS, BATCHES = 24, "8,16"
# Of llama_ftype and ggml_type.
IQ2_BN_R4, Q6_K = 337, 14
OFF = ["BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER", "LLAMA_CURL"]
# Attention to keys and values that are not f16 takes longest to compile.
OFF.append("GGML_IQK_FA_ALL_QUANTS")


def run(*command, **options):
    return subprocess.run([str(part) for part in command], check=True, **options)


def build(name, source, work):
    """The path of llama_bench, linked to the library of `source`."""
    program, objects = work / f"{name}_bench", work / name
    if program.exists():
        return program
    llama = source
    if name == "bitnet":
        # It is built out of a copy, to which what its set-up script would write is added.
        source = shutil.copytree(source, work / "bitnet_source", dirs_exist_ok=True)
        llama = source / "3rdparty/llama.cpp"
        examples = llama / "examples/CMakeLists.txt"
        if not examples.exists():
            examples.parent.mkdir(exist_ok=True)
            examples.touch()
        kernels = source / "include/bitnet-lut-kernels.h"
        if not kernels.exists():
            # Of its table formats, which are not used here.
            shutil.copy(next(source.glob("preset_kernels/*/bitnet-lut-kernels-tl2.h")), kernels)
    options = [f"-D{option}=OFF" for option in OFF] + ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"]
    run("cmake", "-S", source, "-B", objects, "-G", "Ninja", *options)
    run("cmake", "--build", objects, "--target", "llama")
    libraries = [next(objects.rglob(library)) for library in ("libllama.a", "libggml.a")]
    flags = ["-O2", "-fopenmp", f"-I{llama / 'include'}", f"-I{llama / 'ggml/include'}"]
    flags += ["-DPEER_IK"] if name == "ik" else []
    run(os.environ.get("CXX", "c++"), *flags, HERE / "llama_bench.cpp", *libraries, "-lpthread", "-ldl", "-o", program)
    return program


def trine(binary, model, threads):
    """What llama_bench measures, by `trine bench`."""
    common = ["-t", threads, "-r", 1, "--json"]
    sweeps = [["-p", PROMPT, "-n", TOKENS, "-d", DEPTHS], ["-p", 0, "-n", STEPS, "-b", BATCHES]]
    found = {}
    for sweep in sweeps:
        out = run(binary, "bench", model, *sweep, *common, capture_output=True, text=True).stdout
        out = json.loads(out)
        for result in out["prefill"]:
            found["prefill_tok_s"] = result["tok_s"]
        for result in out["decode"]:
            batch, depth = result["batch"], result["depth"]
            name = f"decode_{depth}" if batch == 1 else f"batch_{batch}"
            found[f"{name}_tok_s"] = result["tok_s"]
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--ik", type=Path, help="source tree of ik_llama.cpp")
    parser.add_argument("--bitnet", type=Path, help="source tree of bitnet.cpp")
    parser.add_argument("--bitnet-model", type=Path, help="another file for bitnet.cpp")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--work", type=Path, default=Path("target/peers"), help="where peers are built")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    peers = {}
    if args.ik:
        program, model = build("ik", args.ik, args.work), args.work / "iq2_bn_r4.gguf"
        run(program, "quantize", args.model, model, IQ2_BN_R4, Q6_K)
        peers["ik_llama.cpp"] = (program, model)
    if args.bitnet:
        peers["bitnet.cpp"] = (build("bitnet", args.bitnet, args.work), args.bitnet_model or args.model)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    rounds = []
    for _ in range(args.rounds):
        rounds.append({"Trine": trine(args.trine, args.model, args.threads)})
        for name, (program, model) in peers.items():
            command = [program, "bench", model, args.threads, PROMPT, TOKENS, DEPTHS, STEPS, BATCHES]
            out = run(*command, capture_output=True, text=True, env=environment)
            # The library may have written there before.
            rounds[-1][name] = json.loads(out.stdout.splitlines()[-1])
    names = ["Trine", *peers]
    print(f"| {args.threads} threads, {args.rounds} rounds, tok/s | " + " | ".join(names) + " |")
    print("| --- " * (len(names) + 1) + "|")
    for what in rounds[0]["Trine"]:
        cells = []
        for name in names:
            cell = f"{statistics.median(round[name][what] for round in rounds):.1f}"
            times = statistics.median(round["Trine"][what] / round[name][what] for round in rounds)
            cells.append(cell if name == "Trine" else f"{cell}; {times:.2f} times")
        print(f"| {what.removesuffix('_tok_s')} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
