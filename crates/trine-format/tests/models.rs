//! Whole models, between formats and against files that transformers wrote.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Masters, data, tiny_config, tiny_tokenizer};
use half::bf16;
use tempfile::tempdir;
use trine_format::gguf::i2_s::{self, Order};
use trine_format::gguf::{self, GgmlType, Gguf, TensorSpec, TernaryType, Value, WriteOptions};
use trine_format::names::TensorId;
use trine_format::{
    BoxError, DenseTensor, Dtype, Format, HiddenAct, ModelConfig, ModelFile, Projection,
    Quantization, TensorSource, TokenizerFiles, Weight, names, write_hf, write_hf_packed,
};
use trine_ternary::TernaryMatrix;

fn trits(file: &ModelFile, layer: usize, p: Projection) -> TernaryMatrix {
    match file.projection(layer, p).unwrap() {
        Weight::Ternary(matrix) => matrix,
        Weight::Dense(_) => panic!("{p:?} of layer {layer} is not ternary"),
    }
}

fn for_each_projection(config: &ModelConfig, check: impl Fn(usize, Projection)) {
    for layer in 0..config.num_hidden_layers {
        Projection::ALL.into_iter().for_each(|p| check(layer, p));
    }
}

/// Both models hold the same trits and scales.
fn assert_same_trits(a: &ModelFile, b: &ModelFile) {
    for_each_projection(a.config(), |layer, p| {
        assert_eq!(trits(a, layer, p), trits(b, layer, p), "layer {layer}, {p:?}");
    });
}

#[test]
fn our_trits_of_the_masters_are_those_that_torch_packed() {
    for name in ["tied-h64", "untied-h192"] {
        let masters = ModelFile::open(&data(&format!("fixtures/{name}/bf16"))).unwrap();
        let packed = ModelFile::open(&data(&format!("fixtures/{name}/packed"))).unwrap();
        assert_eq!(masters.config().quantization, Quantization::Online);
        assert_eq!(packed.config().quantization, Quantization::Offline);
        for_each_projection(masters.config(), |layer, p| {
            let (ours, theirs) = (trits(&masters, layer, p), trits(&packed, layer, p));
            assert_eq!(ours.trits(), theirs.trits(), "{name}, layer {layer}, {p:?}");
            assert_eq!(bf16::from_f32(ours.scale()).to_f32(), theirs.scale());
        });
    }
}

#[test]
fn a_model_of_transformers_survives_every_format() {
    let dir = tempdir().unwrap();
    for name in ["tied-h64", "untied-h192"] {
        let source = ModelFile::open(&data(&format!("fixtures/{name}/bf16"))).unwrap();
        let gguf = dir.path().join(format!("{name}.gguf"));
        let options = WriteOptions { embedding: Dtype::BF16, ..WriteOptions::default() };
        gguf::write_model(&gguf, source.config(), &source, source.tokenizer(), options).unwrap();
        let native = ModelFile::open(&gguf).unwrap();
        assert_eq!(native.format(), Format::Gguf);
        assert_same_trits(&source, &native);
        let offline =
            ModelConfig { quantization: Quantization::Offline, ..source.config().clone() };
        assert_eq!(native.config(), &offline);
        assert_eq!(native.tokenizer(), source.tokenizer());
        let mut plain = vec![names::EMBED.to_owned(), names::FINAL_NORM.to_owned()];
        plain.extend([names::attn_sub_norm(1), names::ffn_sub_norm(1), names::input_norm(0)]);
        for name in plain {
            let (a, b) = (source.dense(&name).unwrap(), native.dense(&name).unwrap());
            assert_eq!(a.to_f32(), b.to_f32(), "{name}");
        }

        // Back to the packed form of transformers, which rounds scales to bf16 but keeps trits.
        let packed_dir = dir.path().join(format!("{name}-packed"));
        write_hf_packed(&packed_dir, native.config(), &native, native.tokenizer()).unwrap();
        let ours = ModelFile::open(&packed_dir).unwrap();
        let theirs = ModelFile::open(&data(&format!("fixtures/{name}/packed"))).unwrap();
        assert_same_trits(&ours, &theirs);
        assert_eq!(ours.config(), theirs.config());
        assert_eq!(ours.tokenizer(), theirs.tokenizer());
    }
}

#[test]
fn what_is_given_back_is_read_again() {
    let dir = tempdir().unwrap();
    let source = ModelFile::open(&data("fixtures/tied-h64/bf16")).unwrap();
    let gguf = dir.path().join("model.gguf");
    let options = WriteOptions { embedding: Dtype::BF16, ..WriteOptions::default() };
    gguf::write_model(&gguf, source.config(), &source, source.tokenizer(), options).unwrap();
    for file in [&source, &ModelFile::open(&gguf).unwrap()] {
        let embedding = file.dense(names::EMBED).unwrap();
        let before = embedding.data.to_vec();
        for bytes in [0..1, 100..9000, 5000..usize::MAX, usize::MAX..usize::MAX] {
            file.release_part(names::EMBED, bytes);
            assert!(*embedding.data == before[..]);
        }
        file.release_part("no.such.tensor", 0..1);
    }
}

#[test]
fn a_checkpoint_keeps_every_bit_of_its_masters() {
    let dir = tempdir().unwrap();
    let mut config = tiny_config();
    for quantization in [Quantization::Online, Quantization::None] {
        config.quantization = quantization;
        let masters = Masters::new(&config);
        let path = dir.path().join(format!("{quantization:?}"));
        write_hf(&path, &config, Dtype::F32, &masters, Some(&tiny_tokenizer())).unwrap();
        let file = ModelFile::open(&path).unwrap();
        assert_eq!(file.config(), &config);
        assert_eq!(file.tokenizer(), Some(&tiny_tokenizer()));
        for id in config.tensor_ids() {
            let name = id.canonical();
            let stored = TensorSource::dense(&file, &name).unwrap().to_f32();
            assert_eq!(stored, masters.dense(&name).unwrap().to_f32(), "{name}");
        }
        for_each_projection(&config, |layer, p| match file.projection(layer, p).unwrap() {
            Weight::Ternary(matrix) => {
                assert_eq!(quantization, Quantization::Online);
                assert_eq!(matrix, masters.projection(layer, p).unwrap());
            }
            Weight::Dense(_) => assert_eq!(quantization, Quantization::None),
        });
    }
}

#[test]
fn every_ternary_layout_keeps_the_trits() {
    let dir = tempdir().unwrap();
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 512,
        head_dim: 128,
        tie_word_embeddings: true,
        ..tiny_config()
    };
    let masters = Masters::new(&config);
    for ternary in [TernaryType::I2S, TernaryType::Tq1_0, TernaryType::Tq2_0, TernaryType::Trn2] {
        let path = dir.path().join("model.gguf");
        let options = WriteOptions { ternary, embedding: Dtype::F32 };
        gguf::write_model(&path, &config, &masters, None, options).unwrap();
        let file = ModelFile::open(&path).unwrap();
        assert_eq!((file.tokenizer(), file.config().tie_word_embeddings), (None, true));
        for_each_projection(&config, |layer, p| {
            let (stored, ours) = (trits(&file, layer, p), masters.projection(layer, p).unwrap());
            assert_eq!(stored.trits(), ours.trits(), "{ternary:?}");
            if matches!(ternary, TernaryType::I2S | TernaryType::Trn2) {
                assert_eq!(stored.scale(), ours.scale());
            }
        });
    }
}

#[test]
fn a_silu_model_without_sub_norms_is_written_as_llama_cpp_computes_it() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let config = ModelConfig { hidden_act: HiddenAct::Silu, sub_norms: false, ..tiny_config() };
    let masters = Masters::new(&config);
    gguf::write_model(&path, &config, &masters, None, WriteOptions::default()).unwrap();
    let file = ModelFile::open(&path).unwrap();
    let arch = file.as_gguf().unwrap().get("general.architecture").unwrap();
    assert_eq!(arch.as_str(), Some("llama"));
    let expected = ModelConfig { quantization: Quantization::Offline, ..config.clone() };
    assert_eq!(file.config(), &expected);
    for_each_projection(&config, |layer, p| {
        assert_eq!(trits(&file, layer, p), masters.projection(layer, p).unwrap(), "{p:?}");
    });
    // In the file, rows of both halves of a head alternate in Q and K, and only there.
    let gguf = file.as_gguf().unwrap();
    for (name, p) in
        [("attn_q", Projection::Q), ("attn_k", Projection::K), ("attn_v", Projection::V)]
    {
        let info = gguf.tensor(&format!("blk.0.{name}.weight")).unwrap();
        let stored = i2_s::decode(gguf.bytes(info), info.shape[0], info.shape[1]).unwrap();
        let plain = masters.projection(0, p).unwrap();
        let interleaved = plain.select_rows(|r| r / 8 * 8 + [0, 4, 1, 5, 2, 6, 3, 7][r % 8]);
        assert_eq!(stored, if p == Projection::V { plain } else { interleaved }, "{name}");
    }
}

#[test]
fn norms_of_projections_survive_every_format() {
    let dir = tempdir().unwrap();
    for hidden_act in [HiddenAct::Silu, HiddenAct::Relu2] {
        let config = ModelConfig {
            hidden_act,
            sub_norms: false,
            projection_norm_eps: Some(1e-6),
            ..tiny_config()
        };
        let masters = Masters::new(&config);
        let (gguf, packed) = (dir.path().join("m.gguf"), dir.path().join(hidden_act.name()));
        let options = WriteOptions { embedding: Dtype::F32, ..WriteOptions::default() };
        gguf::write_model(&gguf, &config, &masters, None, options).unwrap();
        write_hf_packed(&packed, &config, &ModelFile::open(&gguf).unwrap(), None).unwrap();
        for path in [gguf, packed] {
            let file = ModelFile::open(&path).unwrap();
            let expected = ModelConfig { quantization: Quantization::Offline, ..config.clone() };
            assert_eq!(file.config(), &expected);
            for_each_projection(&config, |layer, p| {
                let name = names::projection_norm(layer, p);
                let (a, b) = (file.dense(&name).unwrap(), masters.dense(&name).unwrap());
                let close = a.to_f32().iter().zip(b.to_f32()).all(|(a, b)| (a - b).abs() < 2e-3);
                assert!(close && a.shape == b.shape, "{name}");
            });
        }
    }
}

#[test]
fn the_first_bitnet_models_are_read_under_their_own_names() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m");
    let config = ModelConfig { hidden_act: HiddenAct::Silu, ..tiny_config() };
    let masters = Masters::new(&config);
    write_hf(&path, &config, Dtype::F32, &masters, None).unwrap();
    let weights = std::fs::read(path.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let text = std::str::from_utf8(&weights[8..header]).unwrap();
    let renamed = text
        .replace("self_attn.attn_sub_norm.", "self_attn.inner_attn_ln.")
        .replace("mlp.ffn_sub_norm.", "mlp.ffn_layernorm.");
    assert_ne!(renamed, text);
    let mut bytes = (renamed.len() as u64).to_le_bytes().to_vec();
    bytes.extend(renamed.as_bytes());
    bytes.extend(&weights[header..]);
    std::fs::write(path.join("model.safetensors"), bytes).unwrap();
    let mut json = config.to_hf_json("float32");
    json.as_object_mut().unwrap().remove("quantization_config");
    json["architectures"] = serde_json::json!(["BitnetForCausalLM"]);
    json["model_type"] = "llama".into();
    json["weight_bits"] = 1.into();
    json["input_bits"] = 8.into();
    std::fs::write(path.join("config.json"), json.to_string()).unwrap();
    let file = ModelFile::open(&path).unwrap();
    assert_eq!(file.config(), &config);
    let sub_norm = names::ffn_sub_norm(0);
    let expected = masters.dense(&sub_norm).unwrap().to_f32();
    assert_eq!(file.dense(&sub_norm).unwrap().to_f32(), expected);
}

/// Masters whose intermediate and value channels differ in how many zeros they hold, in the rows
/// that write a channel as in the columns that read it: what training does to a model.
struct Trained(ModelConfig);

impl TensorSource for Trained {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let id = TensorId::from_canonical(name).ok_or("no such tensor")?;
        let shape = self.0.tensor_shape(id);
        let values: Vec<f32> = vec![1.0; shape.iter().product()];
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>().into();
        Ok(DenseTensor { name: name.to_owned(), dtype: Dtype::F32, shape, data })
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        let (rows, cols) = self.0.projection_shape(p);
        let mut state = (layer * 7 + p as usize) as u32 + 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let share = |channel: usize| 20_000 + ((channel * 2_654_435_761) >> 7) as u32 % 20_000;
        let trits: Vec<i8> = (0..rows * cols)
            .map(|i| {
                let zeros = match p {
                    Projection::Gate | Projection::Up | Projection::V => share(i / cols),
                    Projection::Down | Projection::O => share(i % cols),
                    _ => 30_000,
                };
                let sign = if next() & 1 == 0 { 1 } else { -1 };
                if next() < zeros { 0 } else { sign }
            })
            .collect();
        Ok(TernaryMatrix::from_trits(&trits, rows, cols, 0.02)?)
    }
}

#[test]
fn the_order_of_i2_s_is_recognized_by_trained_weights() {
    let dir = tempdir().unwrap();
    let config = ModelConfig {
        hidden_size: 256,
        intermediate_size: 512,
        head_dim: 32,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        num_hidden_layers: 2,
        tie_word_embeddings: true,
        ..tiny_config()
    };
    let source = Trained(config.clone());
    let path = dir.path().join("model.gguf");
    gguf::write_model(&path, &config, &source, None, WriteOptions::default()).unwrap();
    let original = std::fs::read(&path).unwrap();
    let file = Gguf::open(&path).unwrap();
    let places: Vec<_> = file.tensors().to_vec();
    drop(file);
    for order in Order::ALL {
        let mut bytes = original.clone();
        // Our own keys say that the file is ours; another program does not write them.
        while let Some(at) = bytes.windows(6).position(|w| w == b"trine.") {
            bytes[at] = b'x';
        }
        for info in places.iter().filter(|info| info.kind == GgmlType::I2_S) {
            let (rows, cols) = (info.shape[0], info.shape[1]);
            let matrix = i2_s::decode(&original[info.range.clone()], rows, cols).unwrap();
            let trits = matrix.trits();
            let data = &mut bytes[info.range.clone()];
            data[..rows * cols / 4].fill(0);
            let shifts = [6, 4, 2, 0];
            for (i, trit) in trits.iter().enumerate() {
                let code = (trit + 1) as u8;
                let (byte, shift) = match order {
                    Order::Blocks128 => (i / 128 * 32 + i % 32, shifts[i % 128 / 32]),
                    Order::Blocks64 => (i / 64 * 16 + i % 16, shifts[i % 64 / 16]),
                    Order::Rows4 => (i / cols / 4 * cols + i % cols, shifts[i / cols % 4]),
                };
                data[byte] |= code << shift;
            }
        }
        std::fs::write(&path, bytes).unwrap();
        let mut file = ModelFile::open(&path).unwrap();
        assert_eq!(file.i2_s_order(), Some(order));
        for_each_projection(&config, |layer, p| {
            assert_eq!(trits(&file, layer, p), source.projection(layer, p).unwrap(), "{order:?}");
        });
        file.set_i2_s_order(Order::Blocks128);
        let same = trits(&file, 0, Projection::Q) == source.projection(0, Projection::Q).unwrap();
        assert_eq!(same, order == Order::Blocks128);
    }
}

#[test]
fn random_weights_are_taken_for_the_order_of_x86() {
    let dir = tempdir().unwrap();
    let config =
        ModelConfig { hidden_size: 256, intermediate_size: 512, head_dim: 128, ..tiny_config() };
    let path = dir.path().join("model.gguf");
    let masters = Masters::new(&config);
    gguf::write_model(&path, &config, &masters, None, WriteOptions::default()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    while let Some(at) = bytes.windows(6).position(|w| w == b"trine.") {
        bytes[at] = b'x';
    }
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(ModelFile::open(&path).unwrap().i2_s_order(), Some(Order::Blocks128));
    // A file without a tensor of that type has no order of it.
    let options = WriteOptions { ternary: TernaryType::Tq2_0, ..WriteOptions::default() };
    gguf::write_model(&path, &config, &masters, None, options).unwrap();
    assert_eq!(ModelFile::open(&path).unwrap().i2_s_order(), None);
}

#[test]
fn a_scale_beside_a_tensor_multiplies_it() {
    // llama.cpp's own `bitnet` files may have one: the same container, written by hand.
    let dir = tempdir().unwrap();
    let (plain, scaled) = (dir.path().join("plain.gguf"), dir.path().join("scaled.gguf"));
    let config = tiny_config();
    let masters = Masters::new(&config);
    gguf::write_model(&plain, &config, &masters, None, WriteOptions::default()).unwrap();
    let source = Gguf::open(&plain).unwrap();
    let copy = |kind, shape: &[usize], scale: &[u8]| {
        let mut specs: Vec<_> = source
            .tensors()
            .iter()
            .map(|t| TensorSpec { name: t.name.clone(), kind: t.kind, shape: t.shape.clone() })
            .collect();
        let name = "blk.0.attn_q.scale".to_owned();
        specs.push(TensorSpec { name, kind, shape: shape.to_vec() });
        let metadata: Vec<_> =
            source.metadata().iter().filter(|(k, _)| k != "general.alignment").cloned().collect();
        let mut writer = gguf::Writer::create(&scaled, &metadata, &specs).unwrap();
        for info in source.tensors() {
            writer.tensor(source.bytes(info)).unwrap();
        }
        writer.tensor(scale).unwrap();
        writer.finish().unwrap();
        ModelFile::open(&scaled).unwrap()
    };
    let file = copy(GgmlType::F32, &[1], &0.3f32.to_le_bytes());
    let before = masters.projection(0, Projection::Q).unwrap();
    let scale = before.scale() * 0.3;
    assert_eq!(trits(&file, 0, Projection::Q), before.with_scale(scale).unwrap());
    assert_eq!(trits(&file, 0, Projection::K), masters.projection(0, Projection::K).unwrap());
    for file in [
        copy(GgmlType::F32, &[2], &[0; 8]),
        copy(GgmlType::F16, &[1], &[0; 2]),
        copy(GgmlType::F32, &[1], &f32::NAN.to_le_bytes()),
    ] {
        let error = file.projection(0, Projection::Q).unwrap_err().to_string();
        assert!(error.contains("blk.0.attn_q.scale"), "{error}");
    }
}

#[test]
fn tokenizer_keys_are_those_that_llama_cpp_reads() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let config = tiny_config();
    let masters = Masters::new(&config);
    let options = WriteOptions::default();
    gguf::write_model(&path, &config, &masters, Some(&tiny_tokenizer()), options).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let strings = |list: &[&str]| {
        Value::Array(gguf::Array::String(list.iter().map(|&s| s.to_owned()).collect()))
    };
    for (key, value) in [
        ("model", "gpt2".into()),
        ("pre", "gpt-2".into()),
        ("tokens", strings(&["a", "b", "c", "ab", "abc", "[PAD5]", "<s>", "</s>"])),
        ("token_type", Value::Array(gguf::Array::I32(vec![1, 1, 1, 1, 1, 5, 3, 3]))),
        ("merges", strings(&["a b", "ab c"])),
        ("bos_token_id", 6u32.into()),
        ("eos_token_id", 7u32.into()),
        ("eot_token_id", 5u32.into()),
        ("add_bos_token", true.into()),
    ] {
        assert_eq!(gguf.get(&format!("tokenizer.ggml.{key}")), Some(&value), "{key}");
    }
    assert_eq!(gguf.get("tokenizer.chat_template"), Some(&"{{ messages }}".into()));
}

#[test]
fn a_tokenizer_is_put_together_where_only_llama_cpps_keys_are() {
    let dir = tempdir().unwrap();
    let source = ModelFile::open(&data("fixtures/tied-h64/bf16")).unwrap();
    let path = dir.path().join("model.gguf");
    let options = WriteOptions::default();
    gguf::write_model(&path, source.config(), &source, source.tokenizer(), options).unwrap();
    // Renaming the keys hides them without moving a byte.
    let mut bytes = std::fs::read(&path).unwrap();
    for key in ["tokenizer.huggingface.json", "trine.tokenizer_config"] {
        let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap();
        bytes[at] = b'x';
    }
    std::fs::write(&path, bytes).unwrap();
    let file = ModelFile::open(&path).unwrap();
    let rebuilt = file.tokenizer().unwrap();
    let original = source.tokenizer().unwrap();
    assert_eq!(rebuilt.chat_template(), original.chat_template());
    assert_eq!(rebuilt.bos_token(), Some("<|begin_of_text|>"));
    let json = |files: &TokenizerFiles| -> serde_json::Value {
        serde_json::from_str(&files.tokenizer_json).unwrap()
    };
    let (mut rebuilt, original) = (json(rebuilt), json(original));
    // Special tokens are in the vocabulary too, so that their ids are those of the file.
    let vocab = rebuilt["model"]["vocab"].as_object_mut().unwrap();
    for added in original["added_tokens"].as_array().unwrap() {
        let id = vocab.remove(added["content"].as_str().unwrap());
        assert_eq!(id.as_ref(), Some(&added["id"]));
    }
    assert_eq!(rebuilt["model"]["vocab"], original["model"]["vocab"]);
    assert_eq!(rebuilt["added_tokens"], original["added_tokens"]);
    assert_eq!(rebuilt["pre_tokenizer"], original["pre_tokenizer"]);
    let merges = original["model"]["merges"].as_array().unwrap();
    assert_eq!(rebuilt["model"]["merges"].as_array().unwrap().len(), merges.len());
}

#[test]
fn a_dividing_scale_is_inverted() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model");
    let config = tiny_config();
    write_hf_packed(&path, &config, &Masters::new(&config), None).unwrap();
    let multiplied = ModelFile::open(&path).unwrap();
    let text = std::fs::read_to_string(path.join("config.json")).unwrap();
    let text = text.replace("autobitlinear", "bitlinear");
    std::fs::write(path.join("config.json"), text).unwrap();
    let divided = ModelFile::open(&path).unwrap();
    for_each_projection(&config, |layer, p| {
        let (m, d) = (trits(&multiplied, layer, p), trits(&divided, layer, p));
        assert_eq!((m.trits(), 1.0 / m.scale()), (d.trits(), d.scale()));
    });
}

#[test]
fn sharded_directories_are_read() {
    let source = data("fixtures/tied-h64/bf16");
    let dir = tempdir().unwrap();
    std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    let shard = dir.path().join("model-00001-of-00001.safetensors");
    std::fs::copy(source.join("model.safetensors"), shard).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let weight_map = r#"{"weight_map": {"any": "model-00001-of-00001.safetensors"}}"#;
    std::fs::write(&index, weight_map).unwrap();
    let (a, b) = (ModelFile::open(dir.path()).unwrap(), ModelFile::open(&source).unwrap());
    assert_same_trits(&a, &b);

    std::fs::write(&index, weight_map.replace("model-", "../model-")).unwrap();
    let error = ModelFile::open(dir.path()).err().unwrap().to_string();
    assert!(error.contains("weight_map"), "{error}");
}

/// Nothing in safetensors holds blocks.
#[test]
fn directories_are_of_plain_types() {
    let dir = tempdir().unwrap();
    let config = tiny_config();
    for dtype in Dtype::ALL.into_iter().filter(|dtype| dtype.is_block()) {
        let path = dir.path().join("model");
        let error = write_hf(&path, &config, dtype, &Masters::new(&config), None).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("dtype") && error.contains(dtype.name()), "{error}");
        assert!(!path.exists());
    }
}

#[test]
fn values_that_overflow_a_type_are_refused() {
    struct Huge;
    impl TensorSource for Huge {
        fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
            Ok(DenseTensor::from_f32(name, &[8, 16], &[1e5; 128]))
        }
    }
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let error =
        gguf::write_model(&path, &tiny_config(), &Huge, None, WriteOptions::default()).unwrap_err();
    assert!(error.to_string().contains("100000"), "{error}");
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
}
