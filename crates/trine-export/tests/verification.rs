//! What a conversion promises: everything survives, or is told, or nothing is kept.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use half::{bf16, f16};
use tempfile::tempdir;
use trine_export::{
    Progress, Stage, Target, convert, convert_watched, embedding_dtype, master_dtype, verify,
};
use trine_format::gguf::{TernaryType, WriteOptions, write_model};
use trine_format::{
    BoxError, DenseTensor, Dtype, HiddenAct, ModelConfig, ModelFile, Projection, Quantization,
    TensorSource, names, write_hf,
};
use trine_ternary::TernaryMatrix;

/// Wide enough for blocks of 256.
fn config() -> ModelConfig {
    ModelConfig {
        hidden_size: 256,
        intermediate_size: 256,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 128,
        vocab_size: 8,
        max_position_embeddings: 32,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        hidden_act: HiddenAct::Relu2,
        sub_norms: true,
        projection_norm_eps: None,
        tie_word_embeddings: false,
        bos_token_id: Some(6),
        eos_token_ids: vec![7, 5],
        quantization: Quantization::Online,
    }
}

/// Numbers of every tensor; the trits of a projection have a scale of their own where one is set.
struct Source {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    scale: Option<f32>,
}

impl Source {
    fn new(config: &ModelConfig) -> Self {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let tensors = config.tensor_ids().into_iter().map(|id| {
            let shape = config.tensor_shape(id);
            let values = (0..shape.iter().product()).map(|_| next()).collect();
            (id.canonical(), (shape, values))
        });
        Self { tensors: tensors.collect(), scale: None }
    }

    fn set(mut self, name: &str, index: usize, value: f32) -> Self {
        self.tensors.get_mut(name).unwrap().1[index] = value;
        self
    }

    /// A checkpoint of f32 masters.
    fn checkpoint(&self, config: &ModelConfig, path: &Path) -> ModelFile {
        write_hf(path, config, Dtype::F32, self, None).unwrap();
        ModelFile::open(path).unwrap()
    }

    /// A GGUF file.
    fn gguf(&self, config: &ModelConfig, path: &Path, options: WriteOptions) -> ModelFile {
        write_model(path, config, self, None, options).unwrap();
        ModelFile::open(path).unwrap()
    }
}

impl TensorSource for Source {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let (shape, values) = self.tensors.get(name).ok_or("no such tensor")?;
        Ok(DenseTensor::from_f32(name, shape, values))
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        let (shape, values) = &self.tensors[&names::projection(layer, p)];
        let matrix = TernaryMatrix::from_weights(values, shape[0], shape[1])?;
        let scale = self.scale.unwrap_or(matrix.scale());
        Ok(TernaryMatrix::from_trits(&matrix.trits(), shape[0], shape[1], scale)?)
    }
}

const EXACT: WriteOptions = WriteOptions { ternary: TernaryType::I2S, embedding: Dtype::F32 };

fn targets() -> [Target; 7] {
    let gguf = |ternary, embedding| Target::Gguf(WriteOptions { ternary, embedding });
    [
        Target::Gguf(EXACT),
        gguf(TernaryType::Tq1_0, Dtype::F16),
        gguf(TernaryType::Tq2_0, Dtype::BF16),
        Target::HfPacked,
        Target::Hf(Dtype::BF16),
        Target::Hf(Dtype::F32),
        gguf(TernaryType::Trn2, Dtype::F16),
    ]
}

fn refused(source: &ModelFile, written: &ModelFile) -> String {
    verify(source, written).unwrap_err().to_string()
}

/// Every configuration is held by every format, eos ids and all.
#[test]
fn every_format_holds_every_configuration() {
    let configs: [fn(&mut ModelConfig); 7] = [
        |_| {},
        |c| (c.bos_token_id, c.eos_token_ids) = (None, vec![]),
        |c| (c.eos_token_ids, c.tie_word_embeddings) = (vec![3], true),
        |c| c.eos_token_ids = vec![1, 2, 3, 4, 1],
        |c| (c.sub_norms, c.hidden_act, c.head_dim) = (false, HiddenAct::Silu, 256),
        |c| (c.sub_norms, c.projection_norm_eps) = (false, Some(1e-6)),
        |c| (c.rope_theta, c.rms_norm_eps) = (123_456.79, f32::MIN_POSITIVE),
    ];
    for change in configs {
        let mut config = config();
        change(&mut config);
        let dir = tempdir().unwrap();
        let source = Source::new(&config).checkpoint(&config, &dir.path().join("source"));
        for (i, target) in targets().into_iter().enumerate() {
            let path = dir.path().join(format!("{i}"));
            let report = convert(&source, &path, target).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(report.ternary_tensors, 7);
            assert_eq!(report.ternary_tensors + report.dense_tensors, config.tensor_ids().len());
            // And from there into every other.
            let again = ModelFile::open(&path).unwrap();
            for (j, target) in targets().into_iter().enumerate() {
                let path = dir.path().join(format!("{i}-{j}"));
                convert(&again, &path, target).unwrap_or_else(|e| panic!("{i} {j}: {e}"));
            }
        }
    }
}

#[test]
fn rounding_is_reported() {
    let (dir, config) = (tempdir().unwrap(), config());
    let source = Source::new(&config).checkpoint(&config, &dir.path().join("source"));
    let report = |i: usize| {
        let path = dir.path().join(format!("{i}"));
        convert(&source, &path, targets()[i]).unwrap()
    };
    let exact = report(0);
    assert_eq!((exact.largest_scale_change, exact.largest_dense_change), (0.0, 0.0));
    for (i, scale, dense) in [(1, 11, 11), (2, 11, 8), (3, 8, 8)] {
        let report = report(i);
        let within = |change: f32, bits: i32| change > 0.0 && change <= 0.5f32.powi(bits);
        assert!(within(report.largest_scale_change, scale), "{report:?}");
        assert!(within(report.largest_dense_change, dense), "{report:?}");
        assert!(report.largest_dense_change > 0.5f32.powi(dense + 3), "{report:?}");
    }
}

#[test]
fn the_type_of_the_embedding_is_the_sources_where_it_has_16_bits() {
    let (dir, config) = (tempdir().unwrap(), config());
    let source = Source::new(&config);
    for (dtype, kept) in
        [(Dtype::F32, Dtype::F16), (Dtype::F16, Dtype::F16), (Dtype::BF16, Dtype::BF16)]
    {
        let path = dir.path().join(dtype.name());
        write_hf(&path, &config, dtype, &source, None).unwrap();
        let file = ModelFile::open(&path).unwrap();
        assert_eq!(embedding_dtype(&file).unwrap(), kept);
        let options = WriteOptions { embedding: kept, ..WriteOptions::default() };
        let report = convert(&file, &dir.path().join("m.gguf"), Target::Gguf(options)).unwrap();
        assert_eq!(report.largest_dense_change > 0.0, dtype == Dtype::F32);
    }
}

#[test]
fn verification_bounds_the_change_of_scales() {
    let (dir, config) = (tempdir().unwrap(), config());
    let path = |name: &str| dir.path().join(name);
    let mut source = Source::new(&config);
    source.scale = Some(0.7);
    let original = source.gguf(&config, &path("original.gguf"), EXACT);
    for (ternary, steps) in
        [(TernaryType::I2S, 0), (TernaryType::Tq1_0, 11), (TernaryType::Tq2_0, 11)]
    {
        let options = WriteOptions { ternary, ..EXACT };
        for (factor, accepted) in [(1.0, true), (1.0 + 2.0 * 0.5f32.powi(steps.max(20)), steps > 0)]
        {
            source.scale = Some(0.7 * factor);
            let changed = source.gguf(&config, &path("changed.gguf"), options);
            assert_eq!(verify(&original, &changed).is_ok(), accepted, "{ternary:?} {factor}");
        }
        source.scale = Some(0.7 * (1.0 + 2.0 * 0.5f32.powi(steps.max(1))));
        let changed = source.gguf(&config, &path("changed.gguf"), options);
        let error = refused(&original, &changed);
        assert!(error.contains("q_proj") && error.contains("scale 0.7 became"), "{error}");
    }
    for (factor, accepted) in [(1.0, true), (1.0 + 1.0 / 64.0, false), (1.0 - 1.0 / 64.0, false)] {
        source.scale = Some(0.7 * factor);
        let changed = source.gguf(&config, &path("changed.gguf"), EXACT);
        let packed = path(&format!("packed-{factor}"));
        convert(&changed, &packed, Target::HfPacked).unwrap();
        let verified = verify(&original, &ModelFile::open(&packed).unwrap());
        assert_eq!(verified.is_ok(), accepted, "{factor}");
    }
}

/// Down to where f16 has few bits left; what vanishes altogether is refused.
#[test]
fn tiny_scales_are_rounded_to_the_steps_there_are() {
    let (dir, config) = (tempdir().unwrap(), config());
    let mut source = Source::new(&config);
    for (i, scale) in [1e-4f32, 1e-5, 3e-6, 1e-7, 7e-8].into_iter().enumerate() {
        source.scale = Some(scale);
        let from = source.gguf(&config, &dir.path().join(format!("{i}.gguf")), EXACT);
        for (j, target) in targets().into_iter().take(4).enumerate() {
            let report = convert(&from, &dir.path().join(format!("{i}-{j}")), target).unwrap();
            let stored = [scale, f16::from_f32(scale).to_f32(), bf16::from_f32(scale).to_f32()];
            let stored = stored[[0, 1, 1, 2][j]];
            let change = ((stored - scale) / scale).abs();
            assert!((report.largest_scale_change - change).abs() < 1e-6, "{scale} {target:?}");
        }
    }
    source.scale = Some(1e-42);
    let from = source.gguf(&config, &dir.path().join("vanishing.gguf"), EXACT);
    for target in &targets()[1..6] {
        let to = dir.path().join("vanished");
        let error = convert(&from, &to, *target).unwrap_err().to_string();
        assert!(error.contains("q"), "{error}");
        assert!(!to.exists());
    }
}

#[test]
fn a_matrix_of_zeros_may_lose_its_scale() {
    let (dir, config) = (tempdir().unwrap(), config());
    let mut source = Source::new(&config);
    source.tensors.get_mut(&names::projection(0, Projection::Up)).unwrap().1.fill(0.0);
    let source = source.checkpoint(&config, &dir.path().join("source"));
    for (i, target) in targets().into_iter().enumerate() {
        convert(&source, &dir.path().join(format!("{i}")), target).unwrap();
    }
}

#[test]
fn verification_finds_a_single_plain_number() {
    let (dir, config) = (tempdir().unwrap(), config());
    let source = Source::new(&config).checkpoint(&config, &dir.path().join("source"));
    let one = [names::EMBED, names::HEAD, names::FINAL_NORM, &names::ffn_sub_norm(0)];
    for (i, name) in one.into_iter().enumerate() {
        let changed = Source::new(&config).set(name, 100, 0.25);
        for (dtype, j) in [(Dtype::F32, 0), (Dtype::F16, 1), (Dtype::BF16, 2)] {
            let options = WriteOptions { embedding: dtype, ..EXACT };
            let changed = changed.gguf(&config, &dir.path().join(format!("{i}-{j}.gguf")), options);
            let error = refused(&source, &changed);
            assert!(error.contains(name) && error.contains("1 of"), "{error}");
        }
    }
}

#[test]
fn verification_finds_another_configuration() {
    let (dir, config) = (tempdir().unwrap(), config());
    let source = Source::new(&config);
    let file = source.checkpoint(&config, &dir.path().join("source"));
    type Change = (&'static str, fn(&mut ModelConfig));
    let changes: [Change; 7] = [
        ("rope_theta", |c| c.rope_theta = 500_000.0),
        ("rms_norm_eps", |c| c.rms_norm_eps = 1e-6),
        ("hidden_act", |c| c.hidden_act = HiddenAct::Silu),
        ("bos_token_id", |c| c.bos_token_id = None),
        ("eos_token_ids", |c| c.eos_token_ids = vec![7]),
        ("max_position_embeddings", |c| c.max_position_embeddings = 64),
        ("tie_word_embeddings", |c| c.tie_word_embeddings = true),
    ];
    for (field, change) in changes {
        let mut other = config.clone();
        change(&mut other);
        let path = dir.path().join("changed.gguf");
        let error = refused(&file, &source.gguf(&other, &path, EXACT));
        assert!(error.contains(field), "{field}: {error}");
    }
}

#[test]
fn plain_numbers_that_are_not_finite_are_refused_by_name() {
    let (dir, config) = (tempdir().unwrap(), config());
    let norm = names::input_norm(0);
    for (i, (name, value)) in
        [(names::EMBED, f32::NAN), (&norm, f32::INFINITY)].into_iter().enumerate()
    {
        let source = Source::new(&config).set(name, 3, value);
        let source = source.checkpoint(&config, &dir.path().join(format!("source-{i}")));
        for target in targets() {
            let to = dir.path().join("model");
            let error = convert(&source, &to, target).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("at 3"), "{error}");
            assert!(error.contains(&format!("source-{i}")), "{error}");
            assert!(!to.exists());
        }
    }
}

/// A scale that overflows bf16 is found when the written directory is read.
#[test]
fn errors_of_verification_name_the_target_and_no_temporary() {
    let (dir, config) = (tempdir().unwrap(), config());
    let mut source = Source::new(&config);
    source.scale = Some(f32::MAX);
    let source = source.gguf(&config, &dir.path().join("source.gguf"), EXACT);
    let to = dir.path().join("packed");
    let error = convert(&source, &to, Target::HfPacked).unwrap_err().to_string();
    assert!(error.contains(to.to_str().unwrap()) && error.contains("q_proj"), "{error}");
    assert!(!error.contains(".trine-"), "{error}");
    assert!(!to.exists());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Trits and scales come back from masters made of them, whatever the number type of the masters.
#[test]
fn masters_quantize_to_what_was_stored() {
    let dir = tempdir().unwrap();
    let config = config();
    let checkpoint = Source::new(&config).checkpoint(&config, &dir.path().join("checkpoint"));
    assert_eq!(master_dtype(&checkpoint).unwrap(), Dtype::F32);
    // A scale that no bf16 number is, and masters that rounding to bf16 would turn into other trits.
    let stored = Source { scale: Some(0.123_456_79), ..Source::new(&config) };
    let stored = stored.gguf(&config, &dir.path().join("stored.gguf"), EXACT);
    assert_eq!(master_dtype(&stored).unwrap(), Dtype::BF16);
    let trits = |file: &ModelFile, p| TensorSource::projection(file, 0, p).unwrap();
    for (name, source) in [("checkpoint", &checkpoint), ("stored", &stored)] {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let path = dir.path().join(format!("{name}-{dtype:?}"));
            let report = convert(source, &path, Target::Hf(dtype)).unwrap();
            assert_eq!(report.largest_scale_change, 0.0);
            let masters = ModelFile::open(&path).unwrap();
            assert_eq!(masters.config().quantization, Quantization::Online);
            for p in Projection::ALL {
                assert_eq!(trits(&masters, p), trits(source, p), "{name} {dtype:?} {p:?}");
                assert_eq!(masters.dense(&names::projection(0, p)).unwrap().dtype, dtype);
            }
        }
    }
    // f32 masters as f32 are the masters themselves.
    let same = ModelFile::open(&dir.path().join("checkpoint-F32")).unwrap();
    let q = names::projection(0, Projection::Q);
    assert_eq!(same.dense(&q).unwrap().data, checkpoint.dense(&q).unwrap().data);
}

/// Where I2_S cannot hold a shape, our own layout is chosen, and somebody else's refused by name.
#[test]
fn shapes_of_any_size_have_a_layout() {
    let dir = tempdir().unwrap();
    let odd = ModelConfig {
        hidden_size: 30,
        intermediate_size: 50,
        head_dim: 10,
        num_attention_heads: 3,
        ..config()
    };
    assert_eq!(TernaryType::exact_for(&config()), TernaryType::I2S);
    assert_eq!(TernaryType::exact_for(&odd), TernaryType::Trn2);
    let source = Source::new(&odd).checkpoint(&odd, &dir.path().join("source"));
    let to = dir.path().join("to.gguf");
    for ternary in [TernaryType::I2S, TernaryType::Tq1_0, TernaryType::Tq2_0] {
        let error = convert(&source, &to, Target::Gguf(WriteOptions { ternary, ..EXACT }));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("blk.0.attn_q.weight") && error.contains("in multiples of"),
            "{error}"
        );
        assert!(!to.exists());
    }
    let own = WriteOptions { ternary: TernaryType::Trn2, ..EXACT };
    let report = convert(&source, &to, Target::Gguf(own)).unwrap();
    assert_eq!(report.largest_scale_change, 0.0);
    // And back, losslessly.
    let back = dir.path().join("back");
    convert(&ModelFile::open(&to).unwrap(), &back, Target::Hf(Dtype::F32)).unwrap();
    assert_eq!(
        verify(&source, &ModelFile::open(&back).unwrap()).unwrap().largest_scale_change,
        0.0
    );
}

/// Every file of a directory, or a file, with its bytes.
fn contents(path: &Path) -> BTreeMap<String, Vec<u8>> {
    if path.is_file() {
        return [(String::new(), std::fs::read(path).unwrap())].into();
    }
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    let read = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    entries.map(read).collect()
}

#[test]
fn the_same_model_makes_the_same_bytes_on_any_number_of_threads() {
    let dir = tempdir().unwrap();
    let config = ModelConfig { num_hidden_layers: 3, ..config() };
    let source = Source::new(&config).checkpoint(&config, &dir.path().join("source"));
    for (i, target) in targets().into_iter().enumerate() {
        let bytes = |threads: usize| {
            let path = dir.path().join(format!("{i}-{threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| convert(&source, &path, target)).unwrap();
            contents(&path)
        };
        let one = bytes(1);
        assert!(!one.is_empty());
        assert!(bytes(2) == one, "{target:?}");
        assert!(bytes(5) == one, "{target:?}");
    }
}

#[test]
fn progress_ends_with_the_whole_model_written_and_verified() {
    let (dir, config) = (tempdir().unwrap(), config());
    let source = Source::new(&config).checkpoint(&config, &dir.path().join("source"));
    for (i, target) in targets().into_iter().enumerate() {
        let told = Mutex::new(Vec::new());
        let watch = |progress| told.lock().unwrap().push(progress);
        convert_watched(&source, &dir.path().join(format!("{i}")), target, &watch).unwrap();
        let total = config.parameter_count();
        let told = told.into_inner().unwrap();
        for stage in [Stage::Writing, Stage::Verifying] {
            let last = Progress { stage, done: total, total };
            assert!(told.contains(&last), "{target:?}: {told:?}");
            let tensors = told.iter().filter(|progress| progress.stage == stage).count();
            assert_eq!(tensors, config.tensor_ids().len());
        }
        assert!(told.iter().all(|progress| progress.total == total && progress.done <= total));
    }
}

/// In a matrix that is compared in several parts.
#[test]
fn numbers_that_differ_are_counted_over_all_parts_of_a_tensor() {
    let (dir, mut config) = (tempdir().unwrap(), config());
    config.vocab_size = 10_000;
    let last = config.vocab_size * config.hidden_size - 1;
    let source = Source::new(&config).checkpoint(&config, &dir.path().join("source"));
    let changed = Source::new(&config).set(names::EMBED, 0, 0.25).set(names::EMBED, last, 0.75);
    let error = refused(&source, &changed.gguf(&config, &dir.path().join("two.gguf"), EXACT));
    assert!(error.contains(names::EMBED) && error.contains("2 of 2560000"), "{error}");
    let source = Source::new(&config).set(names::EMBED, last, f32::NAN);
    let source = source.checkpoint(&config, &dir.path().join("nan"));
    let error = convert(&source, &dir.path().join("nan.gguf"), Target::Gguf(EXACT));
    let error = error.unwrap_err().to_string();
    assert!(error.contains(&format!("NaN at {last}")), "{error}");
}

/// Weights at the boundary of 0 and 1, where implementations round differently, are counted.
#[test]
fn weights_that_round_two_ways_are_counted() {
    let dir = tempdir().unwrap();
    let config = config();
    let up = names::projection(0, Projection::Up);
    let mut source = Source::new(&config);
    // Magnitudes of 1 and 3 by halves, so that the mean is 2 and every second weight a tie.
    let weights = &mut source.tensors.get_mut(&up).unwrap().1;
    for (i, w) in weights.iter_mut().enumerate() {
        *w = [1.0, -3.0, 3.0, -1.0][i % 4];
    }
    let ties = weights.len() as u64 / 2;
    let checkpoint = source.checkpoint(&config, &dir.path().join("checkpoint"));
    let to = dir.path().join("to.gguf");
    let report = convert(&checkpoint, &to, Target::Gguf(EXACT)).unwrap();
    assert_eq!(report.ambiguity.ties, ties);
    // bf16 holds the scale 2; the random scales of the other matrices it rounds.
    assert!((1..2000).contains(&report.ambiguity.bf16_scale), "{report:?}");
    // Stored trits are taken as they are: nothing is rounded.
    let again =
        convert(&ModelFile::open(&to).unwrap(), &dir.path().join("again"), Target::HfPacked);
    assert_eq!(again.unwrap().ambiguity, Default::default());
}
