"""Do tokenizers keep their ids on the way through Trine?

    pip install sentencepiece gguf tokenizers numpy llama-cpp-python
    cargo build --release
    python scripts/interop/tokenizer_ids.py TOKENIZER... [--trine target/release/trine]

A TOKENIZER is a SentencePiece model (*.model), a GGUF file (*.gguf, of any architecture), or a
tokenizer.json. Around each a model of a few thousand weights is made, and four programs tokenize a
few hundred texts:

  original    sentencepiece; llama.cpp on the GGUF; tokenizers on the tokenizer.json
  read        the tokenizer.json that Trine puts together from llama.cpp's keys
  written     llama.cpp on the keys that Trine writes (convert --type tq2_0)
  trine       `trine tokenizer encode`, for a tenth of the texts

llama-cpp-python has to be compiled; xllamacpp, which comes as a wheel, serves as well.
Exits with 1 where ids differ.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import tokenizers

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../fixtures"))
from make_sentencepiece import texts as varied

HIDDEN, FFN, HEADS = 256, 256, 2
ENGLISH = "The quick brown fox jumps over the lazy dog. It's 10:45, isn't it? I'd've said 1234567 or 3.14; WE'LL see\tthat\n\n    def f(x):\n        return x**2  # ok\nnaïve café, Straße, Ελλάδα, Việt Nam, 你好世界 👍🏽".split(" ")


def many_texts():
    rng = random.Random(7)
    found = list(varied(rng))
    for _ in range(150):
        found.append("".join(rng.choice(ENGLISH) + rng.choice([" ", " ", " ", "  ", "", "\n"]) for _ in range(rng.randint(1, 20))))
    return found


def llama_cpp(path, texts):
    """Ids by llama.cpp, names of special tokens being text, nothing added."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return llama_server(path, texts)
    model = Llama(path, vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]


def llama_server(path, texts):
    import urllib.request

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = path, 64, 0, False
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def ids(text):
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))["tokens"]

    return [ids(text) for text in texts]


def tokenizer_json(path, texts):
    hf = tokenizers.Tokenizer.from_file(path)
    special = [str(token) for token in hf.get_added_tokens_decoder().values()]
    # Special tokens are found in any text by this library: such texts are left out.
    return [None if any(s in text for s in special) else hf.encode(text, add_special_tokens=False).ids for text in texts]


def tiny_gguf(path, vocab_size, keys):
    """A ternary model without sense around the tokenizer keys (name, value, value type, array type)."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "bitnet")
    for name, value in dict(
        vocab_size=vocab_size, context_length=64, embedding_length=HIDDEN, block_count=1, feed_forward_length=FFN,
    ).items():
        writer.add_uint32(f"bitnet.{name}", value)
    writer.add_uint32("bitnet.rope.dimension_count", HIDDEN // HEADS)
    writer.add_uint32("bitnet.attention.head_count", HEADS)
    writer.add_float32("bitnet.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value, kind, sub in keys:
        writer.add_key_value(name, value, kind, sub)
    writer.add_tensor("token_embd.weight", rng.standard_normal((vocab_size, HIDDEN)).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name, n in dict(attn_norm=HIDDEN, attn_sub_norm=HIDDEN, ffn_norm=HIDDEN, ffn_sub_norm=FFN).items():
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(n, np.float32))
    shapes = dict(attn_q=(HIDDEN, HIDDEN), attn_k=(HIDDEN, HIDDEN), attn_v=(HIDDEN, HIDDEN), attn_output=(HIDDEN, HIDDEN))
    shapes |= dict(ffn_gate=(FFN, HIDDEN), ffn_up=(FFN, HIDDEN), ffn_down=(HIDDEN, FFN))
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", rng.integers(-1, 2, shape).astype(np.float32) * np.float32(0.5))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


V = gguf.GGUFValueType


def keys_of_sentencepiece(path):
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(open(path, "rb").read())
    array = lambda name, values, sub: (f"tokenizer.ggml.{name}", list(values), V.ARRAY, sub)
    number = lambda name, value: (f"tokenizer.ggml.{name}", value, V.UINT32, None)
    pieces = model.pieces
    return len(pieces), [
        ("tokenizer.ggml.model", "llama", V.STRING, None),
        array("tokens", [p.piece for p in pieces], V.STRING),
        array("scores", [p.score for p in pieces], V.FLOAT32),
        array("token_type", [p.type for p in pieces], V.INT32),
        number("bos_token_id", model.trainer_spec.bos_id),
        number("eos_token_id", model.trainer_spec.eos_id),
        number("unknown_token_id", model.trainer_spec.unk_id),
    ]


def sentencepiece_ids(path, texts):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(open(path, "rb").read())
    # GGUF's `llama` has no way to say that spaces are to be removed, and LLaMA's keep them.
    model.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return [processor.encode(text) for text in texts]


def keys_of_gguf(path):
    fields = gguf.GGUFReader(path).fields
    found = []
    for name, field in fields.items():
        if name.startswith("tokenizer.ggml."):
            found.append((name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None))
    return len(fields["tokenizer.ggml.tokens"].contents()), found


def compare(name, found, expected, texts):
    pairs = [(t, f, e) for t, f, e in zip(texts, found, expected) if f is not None and e is not None]
    different = [(t, f, e) for t, f, e in pairs if list(f) != list(e)]
    print(f"  {name}: {len(pairs)} texts, {len(different)} differ")
    for text, f, e in different[:3]:
        print(f"    {text!r}: {f} instead of {e}")
    return len(different)


def check(path, trine, texts, temp):
    print(path)
    run = lambda *args: subprocess.run([trine, *args], check=True, capture_output=True, text=True).stdout
    tiny, directory, written = (os.path.join(temp, name) for name in ("tiny.gguf", "hf", "written.gguf"))
    if path.endswith(".json"):
        expected = tokenizer_json(path, texts)
        tiny_gguf(tiny, tokenizers.Tokenizer.from_file(path).get_vocab_size(), [])
        run("convert", tiny, written, "--type", "tq2_0", "--tokenizer", path)
    else:
        size, keys = keys_of_gguf(path) if path.endswith(".gguf") else keys_of_sentencepiece(path)
        expected = llama_cpp(path, texts) if path.endswith(".gguf") else sentencepiece_ids(path, texts)
        tiny_gguf(tiny, size, keys)
        run("convert", tiny, written, "--type", "tq2_0")
    run("convert", written, directory, "--type", "hf-packed")
    read = tokenizer_json(f"{directory}/tokenizer.json", texts)
    different = compare("read", read, expected, texts)
    some = [(t, e) for t, e, r in zip(texts, expected, read) if r is not None and "\0" not in t][::10]
    ids = [json.loads(run("tokenizer", "encode", written, "--no-special", "--json", "--", t)) for t, _ in some]
    different += compare("trine", ids, [e for _, e in some], [t for t, _ in some])
    keys = {name: value for name, value, *_ in keys_of_gguf(written)[1]}
    print(f"  written as {keys['tokenizer.ggml.model']}, {keys.get('tokenizer.ggml.pre')}")
    return different + compare("written", llama_cpp(written, texts), expected, texts)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", nargs="+")
    parser.add_argument("--trine", default="target/release/trine")
    args = parser.parse_args()
    texts = many_texts()
    different = 0
    for path in args.tokenizer:
        with tempfile.TemporaryDirectory() as temp:
            different += check(path, args.trine, texts, temp)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
