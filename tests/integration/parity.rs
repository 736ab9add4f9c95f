//! The runtime against transformers' goldens, from every format a model can be converted to.
//!
//! Two exact implementations agree to 1e-6 unless an activation lands within rounding noise of
//! k + 1/2: then one int8 code flips, which moves logits by up to some percent. PyTorch differs from
//! itself in this way: between two forms of the same weights (`packed_f32scale_f32_vs_online_f32` in
//! ref.json), by 7e-3 and 1.5e-2 on two prompts of 14. So: at most 1e-6 on the exact prompts (the
//! largest seen is 4.7e-7), whose number is fixed; 3e-2 on the others (2.3e-2). Of the two others in
//! this repository, moving one code (untied-h192, prompt 5: 74.500023 to 74) or two (tied-h64, prompt
//! 2) to the other side of their boundary brings the error down to 3e-7: nothing else differs.

use std::path::Path;

use trine_export::{Target, convert};
use trine_format::gguf::{TernaryType, WriteOptions};
use trine_format::{Dtype, ModelFile, Projection, TensorSource};
use trine_runtime::{Model, Sampler, SamplerConfig, Session};

use crate::fixtures::{self, ids, relative_error, tensors};

/// The relative error of each prompt: over all positions where the golden has them, else at the last.
fn errors(file: &ModelFile, dir: &Path, kind: &str) -> Vec<f64> {
    let reference = tensors(&dir.join("ref.safetensors"));
    let model = Model::load(file).unwrap();
    let mut errors = Vec::new();
    for prompt in 0..7 {
        let input = ids(&reference[&format!("p{prompt}.input_ids")]);
        let logits = Session::new(&model).logits_of_all(&input).unwrap();
        let all = reference.get(&format!("p{prompt}.{kind}_f32.logits"));
        let last = &reference[&format!("p{prompt}.{kind}_f32.last_logits")];
        let found = if all.is_some() { &logits[..] } else { &logits[logits.len() - last.len()..] };
        errors.push(relative_error(found, all.unwrap_or(last)));
    }
    errors
}

/// Rounding noise of f32 sums, and what a flipped code may move.
const EXACT: f64 = 1e-6;
const FLIPPED: f64 = 3e-2;

/// How many of the seven prompts are exact: model, form, count. Our bits are the same on every
/// machine, so the counts are too.
const EXACT_PROMPTS: [(&str, &str, usize); 4] = [
    ("tied-h64", "bf16", 7),
    ("tied-h64", "packed", 6),
    ("untied-h192", "bf16", 7),
    ("untied-h192", "packed", 6),
];

fn check_parity(dir: &Path, form: &str) -> usize {
    let file = ModelFile::open(&dir.join(form)).unwrap();
    let errors = errors(&file, dir, if form == "bf16" { "online" } else { form });
    println!("{} {form}: {errors:?}", dir.display());
    assert!(errors.iter().all(|e| *e <= FLIPPED), "{} {form}: {errors:?}", dir.display());
    errors.iter().filter(|e| **e <= EXACT).count()
}

#[test]
fn runtime_logits_match_transformers() {
    for (name, form, exact) in EXACT_PROMPTS {
        assert_eq!(check_parity(&fixtures::model(name), form), exact, "{name} {form}");
    }
}

#[test]
fn runtime_logits_match_transformers_on_further_models_too() {
    for dir in fixtures::models() {
        for form in ["bf16", "packed"] {
            let exact = check_parity(&dir, form);
            assert!(exact * 2 > 7, "{} {form}: {exact} of 7 are exact", dir.display());
        }
    }
}

/// LLaMA-style ternary models: SiLU, no sub-norms; dividing scales; a norm before every projection.
/// Each from its own directory and from the GGUF that is made of it.
#[test]
fn logits_of_llama_style_models_match_transformers() {
    let temp = tempfile::tempdir().unwrap();
    for (name, form) in
        [("llama-h64", "online"), ("llama-h64", "bitlinear"), ("llama-norms-h64", "online")]
    {
        let dir = fixtures::model(name);
        let reference = tensors(&dir.join("ref.safetensors"));
        let input = ids(&reference["input_ids"]);
        let expected = &reference[&format!("{form}.logits")];
        let path = temp.path().join(format!("{name}-{form}.gguf"));
        let source = ModelFile::open(&dir.join(form)).unwrap();
        let options = WriteOptions { ternary: TernaryType::Trn2, embedding: Dtype::BF16 };
        convert(&source, &path, Target::Gguf(options)).unwrap();
        for file in [source, ModelFile::open(&path).unwrap()] {
            let model = Model::load(&file).unwrap();
            let logits = Session::new(&model).logits_of_all(&input).unwrap();
            let error = relative_error(&logits, expected);
            println!("{}: {error:.1e}", file.path().display());
            assert!(error <= EXACT, "{}: {error:.1e}", file.path().display());
        }
    }
}

/// FNV-1a over the bits of the logits of prompt 0, at all positions.
fn hash_of_logits(name: &str) -> u64 {
    let dir = fixtures::model(name);
    let reference = tensors(&dir.join("ref.safetensors"));
    let model = Model::load(&ModelFile::open(&dir.join("bf16")).unwrap()).unwrap();
    let logits = Session::new(&model).logits_of_all(&ids(&reference["p0.input_ids"])).unwrap();
    let bytes = logits.iter().flat_map(|l| l.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Whatever the machine, its C library, the number of threads and `TRINE_ISA`: CI runs this with
/// every instruction set that it has.
#[test]
fn logits_are_the_same_bits_on_every_machine() {
    for (name, expected) in
        [("tied-h64", 0x0b87_d4d8_3acc_ffad), ("untied-h192", 0x0df3_bf41_2dae_46de)]
    {
        let found = hash_of_logits(name);
        assert_eq!(found, expected, "{name}: {found:#018x}");
    }
}

/// The same weights give the same bits, whatever file they came from.
#[test]
fn converted_models_compute_the_same_bits() {
    let temp = tempfile::tempdir().unwrap();
    for dir in fixtures::models() {
        for form in ["bf16", "packed"] {
            let source = ModelFile::open(&dir.join(form)).unwrap();
            let path = temp.path().join("model.gguf");
            let options = WriteOptions { ternary: TernaryType::I2S, embedding: Dtype::BF16 };
            let whole_blocks = Projection::ALL.iter().all(|&p| {
                let (rows, cols) = source.config().projection_shape(p);
                (rows * cols).is_multiple_of(128)
            });
            if !whole_blocks {
                eprintln!("skipped: I2_S cannot hold the shapes of {}", dir.display());
                continue;
            }
            let report = convert(&source, &path, Target::Gguf(options)).unwrap();
            assert_eq!(report.largest_scale_change, 0.0);
            let converted = ModelFile::open(&path).unwrap();
            assert_eq!(converted.tokenizer(), source.tokenizer(), "{}", dir.display());
            let reference = tensors(&dir.join("ref.safetensors"));
            let input = ids(&reference["p0.input_ids"]);
            let logits = |file: &ModelFile| {
                let model = Model::load(file).unwrap();
                Session::new(&model).logits_of_all(&input).unwrap()
            };
            assert_eq!(logits(&converted), logits(&source), "{} {form}", dir.display());
        }
    }
}

#[test]
fn packing_a_model_keeps_trits_and_loses_only_scale_bits() {
    let temp = tempfile::tempdir().unwrap();
    let dir = fixtures::model("untied-h192");
    let source = ModelFile::open(&dir.join("bf16")).unwrap();
    let path = temp.path().join("packed");
    let report = convert(&source, &path, Target::HfPacked).unwrap();
    assert!(report.largest_scale_change > 0.0 && report.largest_scale_change <= 1.0 / 256.0);
    // transformers packed the same masters: same trits, same rounded scales.
    let (ours, theirs) =
        (ModelFile::open(&path).unwrap(), ModelFile::open(&dir.join("packed")).unwrap());
    for layer in 0..source.config().num_hidden_layers {
        for p in Projection::ALL {
            let matrix = |file: &ModelFile| TensorSource::projection(file, layer, p).unwrap();
            assert_eq!(matrix(&ours), matrix(&theirs), "layer {layer} {p:?}");
        }
    }
}

/// Greedy continuations of the prompts that were picked for wide margins.
#[test]
fn greedy_text_matches_golden() {
    for dir in fixtures::models() {
        let text = std::fs::read_to_string(dir.join("ref.json")).unwrap();
        let meta: serde_json::Value = serde_json::from_str(&text).unwrap();
        let reference = tensors(&dir.join("ref.safetensors"));
        let mut compared = 0;
        for (prompt, meta) in meta["prompts"].as_array().unwrap().iter().enumerate() {
            if meta["greedy_min_margin"].as_f64().unwrap() < 0.15 {
                continue;
            }
            let file = ModelFile::open(&dir.join("bf16")).unwrap();
            let model = Model::load(&file).unwrap();
            let expected = ids(&reference[&format!("p{prompt}.greedy_online_f32")]);
            let input = ids(&reference[&format!("p{prompt}.input_ids")]);
            let mut sampler = Sampler::new(SamplerConfig::default()).unwrap();
            let mut session = Session::new(&model);
            let mut logits = session.prefill(&input).unwrap();
            let mut found = Vec::new();
            for _ in 0..expected.len() {
                let id = sampler.sample(&logits, &found).unwrap();
                found.push(id);
                logits = session.decode(id).unwrap();
            }
            assert_eq!(found, expected, "{} prompt {prompt}", dir.display());
            compared += 1;
        }
        assert!(compared >= 2, "{}: no prompt with wide margins", dir.display());
    }
}

#[test]
fn bad_ids_leave_a_session_as_it_was() {
    let dir = fixtures::model("tied-h64");
    let model = Model::load(&ModelFile::open(&dir.join("packed")).unwrap()).unwrap();
    let mut session = Session::new(&model);
    session.prefill(&[1, 2, 3]).unwrap();
    let error = session.prefill(&[4, 512]).unwrap_err().to_string();
    assert!(error.contains("512"), "{error}");
    assert!(session.prefill(&[]).is_err());
    let error = session.prefill(&vec![0; 510]).unwrap_err().to_string();
    assert!(error.contains("513") && error.contains("512"), "{error}");
    assert_eq!(session.position(), 3);
}
