#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets that are not text: small valid files, and one of each trick.

    python3 tests/fuzz/seeds.py

Independent of the Rust code on purpose: the layouts here are those of crates/trine-format/README.md.
"""

import json
import struct
from pathlib import Path

SEEDS = Path(__file__).parent / "seeds"
HIDDEN, FFN, VOCAB = 16, 32, 8


def put(target: str, name: str, data: bytes) -> None:
    folder = SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(v) -> bytes:
    """A metadata value with its type in front."""
    match v:
        case bool():
            return struct.pack("<IB", 7, v)
        case int():
            return struct.pack("<II", 4, v)
        case float():
            return struct.pack("<If", 6, v)
        case str():
            return struct.pack("<I", 8) + string(v)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
        case [float(), *_]:
            return struct.pack(f"<IIQ{len(v)}f", 9, 6, len(v), *v)
        case [list(), *_]:
            return struct.pack("<IIQ", 9, 9, len(v)) + b"".join(value(x)[4:] for x in v)
        case list():
            return struct.pack(f"<IIQ{len(v)}i", 9, 5, len(v), *v)


def gguf(metadata: dict, tensors: list) -> bytes:
    """A container; tensors are (name, sizes with the fastest first, type id, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, v in metadata.items():
        out += string(key) + value(v)
    data = b""
    for name, sizes, kind, payload in tensors:
        out += string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, len(data))
        data += payload + bytes(-len(payload) % 32)
    return out + bytes(-len(out) % 32) + data


def codes(n: int) -> bytes:
    """n trits, four in a byte, no code 3."""
    return bytes([0b01_00_10_01, 0b10_10_00_01, 0b00_01_01_10][i % 3] for i in range(n // 4))


def trn2(cols: int, rows: int) -> bytes:
    return codes(cols * rows) + struct.pack("<f", 0.5)


def i2_s(cols: int, rows: int) -> bytes:
    return codes(cols * rows) + struct.pack("<f", 0.5) + bytes(28)


def model(arch: str, ternary, kind: int, vocabulary: dict, more=(), tied=True) -> bytes:
    sub = arch != "llama"
    metadata = {
        "general.architecture": arch,
        f"{arch}.vocab_size": VOCAB,
        f"{arch}.context_length": 32,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": 1,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.rope.dimension_count": 8,
        f"{arch}.attention.head_count": 2,
        f"{arch}.attention.head_count_kv": 1,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        **vocabulary,
    }
    f32 = lambda n: struct.pack(f"<{n}f", *[1.0] * n)
    norm = lambda name, n: (name, [n], 0, f32(n))
    table = struct.pack(f"<{VOCAB * HIDDEN}e", *[0.25] * (VOCAB * HIDDEN))
    tensors = [("token_embd.weight", [HIDDEN, VOCAB], 1, table), norm("blk.0.attn_norm.weight", HIDDEN)]
    shapes = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, 8), "attn_v": (HIDDEN, 8),
        "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (HIDDEN, FFN), "ffn_up": (HIDDEN, FFN),
        "ffn_down": (FFN, HIDDEN),
    }
    for name, (cols, rows) in shapes.items():
        tensors.append((f"blk.0.{name}.weight", [cols, rows], kind, ternary(cols, rows)))
    tensors.append(norm("blk.0.ffn_norm.weight", HIDDEN))
    if sub:
        tensors += [norm("blk.0.attn_sub_norm.weight", HIDDEN), norm("blk.0.ffn_sub_norm.weight", FFN)]
    tensors.append(norm("output_norm.weight", HIDDEN))
    if not tied:
        tensors.append(("output.weight", [HIDDEN, VOCAB], 1, table))
    return gguf(metadata, tensors + list(more))


BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc", "Ġ", "<s>", "</s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 1, 1, 3, 3],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.bos_token_id": 6,
    "tokenizer.ggml.eos_token_id": 7,
    "tokenizer.ggml.add_bos_token": True,
}
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -3.0, -1.0, -2.0, -1.5],
    "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
TERNARY = lambda cols, rows: struct.pack(f"<{cols * rows}f", *[(i % 3 - 1) / 2 for i in range(cols * rows)])

put("gguf", "trn2", model("bitnet-b1.58", trn2, 0x324E5254, BPE))
put("gguf", "i2_s", model("bitnet", i2_s, 36, SPM))
scale = ("blk.0.attn_q.scale", [1], 0, struct.pack("<f", 2.0))
put("gguf", "llama", model("llama", trn2, 0x324E5254, {}, [scale], tied=False))
put("gguf", "ternary_f32", model("bitnet-25", TERNARY, 0, {}))
nested = {"a": [[1, 2], [3]], "b": [[["x"]]], "c": 0.5, "general.alignment": 64}
put("gguf", "values", gguf(nested, []))

put("gguf_model", "patch", bytes([0, 0, 40, 0, 0, 4]) + bytes([255] * 4))
put("gguf_model", "splices", bytes([2, 1, 9, 1, 0, 3, 1, 2, 3, 2, 5, 0, 0, 9, 3, 7, 1, 0, 40, 9, 2, 0]))
put("gguf_model", "numbers", bytes([254, 4, 24, 0, 0, 1, 3, 4, 16, 0, 0, 255, 5, 0, 32, 0, 4]))
put("gguf_model", "intact", bytes([1]))
put("gguf_model", "intact_tq", bytes([255]))

for pick in range(16):
    put("codecs", f"decoder_{pick:02}", bytes([128 | pick, 4, 128]) + codes(64) + struct.pack("<f", 0.5))


def lines(vocabulary: dict) -> str:
    out = []
    for key, v in vocabulary.items():
        match v:
            case bool():
                text = f"b:{int(v)}"
            case int():
                text = f"u:{v}"
            case str():
                text = f"s:{v}"
            case [str(), *_]:
                text = "S:" + "\t".join(v)
            case [float(), *_]:
                text = "F:" + "\t".join(map(str, v))
            case _:
                text = "I:" + "\t".join(map(str, v))
        out.append(key.removeprefix("tokenizer.") + "=" + text)
    return "\n".join(out)


put("gguf_vocab", "bpe", (lines(BPE) + "\nggml.pre=s:gpt-2\nchat_template=s:{{ messages }}\n%%\nab abc").encode())
put("gguf_vocab", "spm", (lines(SPM) + "\nggml.add_space_prefix=b:1\n%%\nab a\nb").encode())
own = json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
put("gguf_vocab", "own", f"huggingface.json=s:{own}\neos_ids=U:1\t2\n%%\na".encode())


def tokenizer(kind: str, **parts) -> dict:
    models = {
        "BPE": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<0x0A>": 3}, "merges": [["a", "b"]],
                "unk_token": None, "byte_fallback": True, "ignore_merges": True},
        "Unigram": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                    "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -1.5]]},
        "WordPiece": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "a": 1, "##b": 2}},
        "WordLevel": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1}},
    }
    added = {"id": 4, "content": "<s>", "special": True, "single_word": False, "lstrip": True,
             "rstrip": False, "normalized": False}
    return {"version": "1.0", "added_tokens": [added], "model": models[kind], **parts}


REGEX = r"\p{L}+|\s+(?!\S)|\d{1,3}"
split = {"type": "Split", "pattern": {"Regex": REGEX}, "behavior": "Isolated", "invert": False}
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
template = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}},
}
metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
TOKENIZERS = {
    "bpe": tokenizer("BPE", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
                     post_processor=template, decoder=byte_level),
    "spm": tokenizer("BPE", decoder={"type": "Sequence", "decoders": [
        {**replace, "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}),
    "unigram": tokenizer("Unigram", pre_tokenizer=metaspace, decoder=metaspace,
                         normalizer={"type": "NFKC"}),
    "wordpiece": tokenizer("WordPiece", normalizer={"type": "BertNormalizer", "clean_text": True,
        "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"}, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "wordlevel": tokenizer("WordLevel", pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Whitespace"}, {"type": "Digits", "individual_digits": True},
        {"type": "Punctuation", "behavior": "Isolated"}, {"type": "FixedLength", "length": 2}]},
        decoder={"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}),
}
for name, t in TOKENIZERS.items():
    put("tokenizer", name, (json.dumps(t, ensure_ascii=False) + "\n%%\nab a <s> b\n12").encode())


def hf(quantization, dtype: str, bitnet: bool):
    """The parts of a directory: configuration, header and size of its data."""
    config = {
        "model_type": "bitnet" if bitnet else "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "max_position_embeddings": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": VOCAB, "tie_word_embeddings": True,
        "eos_token_id": 7,
    }
    if quantization:
        config["quantization_config"] = {"quant_method": "bitnet", **quantization}
    packed = quantization and quantization.get("quantization_mode") != "online"
    size = {"F32": 4, "BF16": 2, "U8": 1}
    header, offset = {"__metadata__": {"format": "pt"}}, 0

    def add(name, kind, shape):
        nonlocal offset
        n = size[kind]
        for dim in shape:
            n *= dim
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, offset + n]}
        offset += n

    layer = "model.layers.0."
    add("model.embed_tokens.weight", dtype, [VOCAB, HIDDEN])
    add(layer + "input_layernorm.weight", dtype, [HIDDEN])
    shapes = {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
        "self_attn.o_proj": (16, 16), "mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16),
        "mlp.down_proj": (16, 32),
    }
    for name, (rows, cols) in shapes.items():
        if packed:
            add(layer + name + ".weight", "U8", [rows // 4, cols])
            add(layer + name + ".weight_scale", dtype, [1])
        else:
            add(layer + name + ".weight", dtype, [rows, cols])
    add(layer + "post_attention_layernorm.weight", dtype, [HIDDEN])
    if bitnet:
        add(layer + "self_attn.attn_sub_norm.weight", dtype, [HIDDEN])
        add(layer + "mlp.ffn_sub_norm.weight", dtype, [FFN])
    add("model.norm.weight", dtype, [HIDDEN])
    return json.dumps(config), json.dumps(header, separators=(",", ":")), offset


def directory(name: str, model, *rest: str) -> None:
    config, header, size = model
    put("hf_dir", name, "\n%%\n".join([config, header, str(size), *rest]).encode())


auto = {"linear_class": "autobitlinear"}
tokens = json.dumps({"model": {"type": "BPE"}})
directory("packed", hf({**auto, "quantization_mode": "offline"}, "BF16", True), "", tokens, "{}", '{"eos_token_id": [5]}')
directory("masters", hf({**auto, "quantization_mode": "online"}, "F32", True))
directory("divided", hf({"linear_class": "bitlinear"}, "F32", False))
index = json.dumps({"weight_map": {"a": "a.safetensors"}})
directory("indexed", hf(None, "BF16", False), index, "", "", "")

ids = struct.pack("<16H", *range(16))
put("shard", "two_bytes", b"TRINETOK" + struct.pack("<III", 1, 2, 16) + bytes(44) + ids + struct.pack("<Q", 16) + b"KOTENIRT")
ids = struct.pack("<4I", 0, 70_000, 3, 65_536)
put("shard", "four_bytes", b"TRINETOK" + struct.pack("<III", 1, 4, 70_001) + bytes(44) + ids + struct.pack("<Q", 4) + b"KOTENIRT")
put("shard", "empty", b"TRINETOK" + struct.pack("<III", 1, 2, 16) + bytes(44) + struct.pack("<Q", 0) + b"KOTENIRT")

dim, hidden, layers, heads, kv, vocab, sequence = sizes = (8, 16, 1, 2, 1, 8, 32)
packed = lambda n: struct.pack("<f", 0.5) + bytes([0b01_00_11_01, 0b11_11_00_01][i % 2] for i in range(n // 4))
matrices = [(dim, dim), (4, dim), (4, dim), (dim, dim), (hidden, dim), (dim, hidden), (hidden, dim)]
own = b"24ka" + struct.pack("<I7i", 1, *sizes)
own += bytes(256 - len(own)) + struct.pack(f"<{dim + vocab * dim}f", *[1.0] * (dim + vocab * dim))
own += b"".join(packed(a * b) for a, b in matrices)
put("import", "msb", b"\0" + own)
put("import", "lsb", b"\1" + own)
pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + [" ", "a", "b", " a", " ab"]
entry = lambda i, p: struct.pack("<fi", -float(i), len(p)) + p.encode()
put("import", "tokenizer", b"\2" + struct.pack("<I", 6) + b"".join(entry(i, p) for i, p in enumerate(pieces)))
