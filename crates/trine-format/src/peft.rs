//! Adapters as the package `peft` stores them (LoRA, arXiv 2106.09685): a directory with
//! `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Of what that package can do, what changes the formula is refused by its key: then the numbers would
//! mean something else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use safetensors::{Dtype as StDtype, tensor::TensorView};
use serde_json::{Map, Value, json};

use crate::hf::header::header;
use crate::hf::read::plain;
use crate::names::{self, adapter};
use crate::{AtomicDir, FormatError, ModelConfig, Projection, map_file};

/// Name of the configuration.
pub const CONFIG: &str = "adapter_config.json";
/// Name of the matrices' file.
pub const MATRICES: &str = "adapter_model.safetensors";

/// `A` `(rank, in)` and `B` `(out, rank)` by layer and projection.
pub type Matrices = BTreeMap<(usize, Projection), [Vec<f32>; 2]>;

/// Adapters of one rank for some projections of every layer of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rows of `A`, columns of `B`.
    pub rank: usize,
    /// Outputs are scaled by `alpha / rank`.
    pub alpha: f64,
    /// The projections of a layer that are adapted.
    pub targets: Vec<Projection>,
    /// The model that they belong to, as its user named it.
    pub base: Option<String>,
    /// The numbers.
    pub matrices: Matrices,
}

/// Keys that must be as they are here, or missing: everything else would be another formula.
fn settled() -> [(&'static str, Value); 12] {
    [
        ("peft_type", json!("LORA")),
        ("bias", json!("none")),
        ("fan_in_fan_out", json!(false)),
        ("use_rslora", json!(false)),
        ("use_dora", json!(false)),
        ("lora_bias", json!(false)),
        ("rank_pattern", json!({})),
        ("alpha_pattern", json!({})),
        ("modules_to_save", Value::Null),
        ("layers_to_transform", Value::Null),
        ("layer_replication", Value::Null),
        ("exclude_modules", Value::Null),
    ]
}

/// Keys of other methods that came with later versions: they must be missing, null, false or empty.
const UNSET: [&str; 8] = [
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
];

/// Ways to begin `A` and `B` that take something out of the model's own weights, which an adapter is then
/// to be added to.
const TAKES_FROM_WEIGHTS: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

impl Lora {
    /// Reads the adapters in `dir`, for a model of that shape.
    ///
    /// # Errors
    /// A file that is missing or broken, a key that asks for another kind of adapter, a matrix that is
    /// missing, superfluous, or of another shape; file, key or tensor are named.
    pub fn read(dir: &Path, config: &ModelConfig) -> Result<Self, FormatError> {
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(FormatError::io(&path, "read"))?;
        let keys: Map<String, Value> = serde_json::from_str(&text)
            .map_err(|e| FormatError::malformed(&path, "adapter configuration", "an object", e))?;
        let found = |key: &str| keys.get(key).unwrap_or(&Value::Null);
        for (key, expected) in settled() {
            let value = found(key);
            if *value != expected && !value.is_null() {
                return Err(FormatError::key(&path, key, expected, value));
            }
        }
        let unset = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(keys) => keys.is_empty(),
            _ => false,
        };
        if let Some(key) = UNSET.into_iter().find(|key| !unset(found(key))) {
            return Err(FormatError::key(&path, key, "nothing", found(key)));
        }
        let begun = found("init_lora_weights");
        let takes = |name: &str| TAKES_FROM_WEIGHTS.iter().any(|other| name.starts_with(other));
        if begun.as_str().is_some_and(takes) {
            let expected = "a beginning beside the model's own weights";
            return Err(FormatError::key(&path, "init_lora_weights", expected, begun));
        }
        let rank = match found("r").as_u64() {
            Some(rank @ 1..=65_536) => rank as usize,
            _ => return Err(FormatError::key(&path, "r", "a rank from 1 on", found("r"))),
        };
        let alpha = match found("lora_alpha").as_f64() {
            Some(alpha) if alpha.is_finite() => alpha,
            _ => {
                let found = found("lora_alpha");
                return Err(FormatError::key(&path, "lora_alpha", "a number", found));
            }
        };
        let targets = targets(found("target_modules")).ok_or_else(|| {
            let all = Projection::ALL.map(names::module).join(", ");
            let expected = format!("a list of some of {all}");
            FormatError::key(&path, "target_modules", expected, found("target_modules"))
        })?;
        let base = found("base_model_name_or_path").as_str().map(str::to_owned);
        let path = dir.join(MATRICES);
        let matrices = read_matrices(&path, config, rank, &targets)?;
        Ok(Self { rank, alpha, targets, base, matrices })
    }

    /// Writes the adapters to `dir`, in the place of what is there: as a whole, or not at all.
    ///
    /// # Errors
    /// What the disk refuses.
    ///
    /// # Panics
    /// When a matrix is not of its shape in a model of `config`.
    pub fn write(&self, dir: &Path, config: &ModelConfig) -> Result<(), FormatError> {
        let staged = AtomicDir::create(dir)?;
        self.write_files(staged.path(), config).map_err(|e| e.moved(staged.path(), dir))?;
        staged.commit_replacing()
    }

    /// As [`Self::write`], into an existing directory: for a caller that stages more files of its own in
    /// an [`AtomicDir`].
    ///
    /// # Errors
    /// What the disk refuses.
    ///
    /// # Panics
    /// As [`Self::write`].
    pub fn write_files(&self, dir: &Path, config: &ModelConfig) -> Result<(), FormatError> {
        let mut keys: Map<String, Value> =
            settled().into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let whole = self.alpha.fract() == 0.0 && self.alpha.abs() < 1e15;
        let alpha = if whole { json!(self.alpha as i64) } else { json!(self.alpha) };
        for (key, value) in [
            ("task_type", json!("CAUSAL_LM")),
            ("base_model_name_or_path", json!(self.base)),
            ("r", json!(self.rank)),
            ("lora_alpha", alpha),
            ("lora_dropout", json!(0.0)),
            (
                "target_modules",
                json!(self.targets.iter().map(|p| names::module(*p)).collect::<Vec<_>>()),
            ),
            ("inference_mode", json!(true)),
            ("init_lora_weights", json!(true)),
        ] {
            keys.insert(key.to_owned(), value);
        }
        let path = dir.join(CONFIG);
        let text = serde_json::to_string_pretty(&keys).expect("plain data serializes") + "\n";
        std::fs::write(&path, text).map_err(FormatError::io(&path, "write"))?;
        let mut tensors = Vec::new();
        for ((layer, p), matrices) in &self.matrices {
            let shapes = shapes(config, self.rank, *p);
            for ((name, shape), matrix) in adapter(*layer, *p).into_iter().zip(shapes).zip(matrices)
            {
                let bytes: &[u8] = bytemuck::cast_slice(matrix);
                let view = TensorView::new(StDtype::F32, shape.to_vec(), bytes);
                tensors.push((name, view.expect("a matrix of its shape")));
            }
        }
        let path = dir.join(MATRICES);
        let refused = |e: safetensors::SafeTensorError| {
            FormatError::io(&path, "write")(std::io::Error::other(e.to_string()))
        };
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        safetensors::serialize_to_file(tensors, metadata, &path).map_err(refused)
    }
}

/// `(rank, in)` and `(out, rank)`.
fn shapes(config: &ModelConfig, rank: usize, p: Projection) -> [[usize; 2]; 2] {
    let (out, inp) = config.projection_shape(p);
    [[rank, inp], [out, rank]]
}

/// The projections that a list of modules names.
fn targets(modules: &Value) -> Option<Vec<Projection>> {
    let modules = modules.as_array()?;
    let find = |module: &Value| {
        let module = module.as_str()?;
        Projection::ALL.into_iter().find(|p| names::module(*p) == module)
    };
    let found = modules.iter().map(find).collect::<Option<BTreeSet<_>>>()?;
    // In the order of a forward pass, whatever that of the file.
    (!found.is_empty()).then(|| Projection::ALL.into_iter().filter(|p| found.contains(p)).collect())
}

fn read_matrices(
    path: &Path,
    config: &ModelConfig,
    rank: usize,
    targets: &[Projection],
) -> Result<Matrices, FormatError> {
    let file = map_file(path)?;
    let (start, metadata) = header(path, &file)?;
    let stored = metadata.tensors();
    let mut left: BTreeSet<&str> = stored.keys().map(String::as_str).collect();
    let mut matrices = BTreeMap::new();
    for layer in 0..config.num_hidden_layers {
        for p in targets {
            let [a, b] = adapter(layer, *p);
            let read = |name: &str, shape: [usize; 2]| {
                let expected = format!("{} x {} numbers", shape[0], shape[1]);
                let refuse = |found: String| FormatError::tensor(path, name, &expected, found);
                let info = stored.get(name).ok_or_else(|| refuse("nothing".to_owned()))?;
                if info.shape != shape {
                    return Err(refuse(format!("the shape {:?}", info.shape)));
                }
                let (from, to) = info.data_offsets;
                let bytes = &file[start + from..start + to];
                let count = shape[0] * shape[1];
                widen(info.dtype, bytes, count).ok_or_else(|| refuse(format!("{:?}", info.dtype)))
            };
            let [a_shape, b_shape] = shapes(config, rank, *p);
            matrices.insert((layer, *p), [read(&a, a_shape)?, read(&b, b_shape)?]);
            left.remove(&a[..]);
            left.remove(&b[..]);
        }
    }
    match left.first() {
        None => Ok(matrices),
        Some(name) => Err(FormatError::tensor(path, name, "nothing of this name", "a tensor")),
    }
}

fn widen(dtype: StDtype, bytes: &[u8], count: usize) -> Option<Vec<f32>> {
    let mut numbers = vec![0.0; count];
    plain(dtype)?.decode(bytes, &mut numbers);
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{HiddenAct, Quantization};

    fn config() -> ModelConfig {
        ModelConfig {
            hidden_size: 8,
            intermediate_size: 12,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            vocab_size: 11,
            max_position_embeddings: 16,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            hidden_act: HiddenAct::Relu2,
            sub_norms: true,
            projection_norm_eps: None,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            quantization: Quantization::Online,
        }
    }

    fn lora() -> Lora {
        let targets = vec![Projection::Q, Projection::Down];
        let mut matrices = BTreeMap::new();
        for layer in 0..2 {
            for p in &targets {
                let numbers = |[rows, cols]: [usize; 2]| {
                    (0..rows * cols).map(|i| i as f32 / 7.0 - layer as f32).collect()
                };
                matrices.insert((layer, *p), shapes(&config(), 3, *p).map(numbers));
            }
        }
        Lora { rank: 3, alpha: 6.0, targets, base: Some("a/model".to_owned()), matrices }
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("adapter");
        for lora in [lora(), Lora { alpha: 1.5, base: None, ..lora() }] {
            lora.write(&dir, &config()).unwrap();
            assert_eq!(Lora::read(&dir, &config()).unwrap(), lora);
        }
    }

    #[test]
    fn what_is_another_adapter_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("adapter");
        lora().write(&dir, &config()).unwrap();
        let text = std::fs::read_to_string(dir.join(CONFIG)).unwrap();
        let refused = |key: &str, value: Value| {
            let mut keys: Map<String, Value> = serde_json::from_str(&text).unwrap();
            keys.insert(key.to_owned(), value);
            std::fs::write(dir.join(CONFIG), serde_json::to_string(&keys).unwrap()).unwrap();
            Lora::read(&dir, &config()).unwrap_err().to_string()
        };
        for (key, value) in [
            ("use_dora", json!(true)),
            ("rank_pattern", json!({"q_proj": 2})),
            ("use_qalora", json!(true)),
            ("target_parameters", json!(["q_proj.weight"])),
            ("alora_invocation_tokens", json!([1, 2])),
            ("init_lora_weights", json!("pissa_niter_16")),
            ("r", json!(0)),
            ("lora_alpha", json!("much")),
            ("target_modules", json!("all-linear")),
            ("target_modules", json!(["q_proj", "lm_head"])),
        ] {
            let error = refused(key, value);
            assert!(error.contains(CONFIG) && error.contains(key), "{error}");
        }
        let error = refused("target_modules", json!(["q_proj", "k_proj", "down_proj"]));
        assert!(error.contains("k_proj.lora_A.weight") && error.contains("nothing"), "{error}");
        let error = refused("target_modules", json!(["q_proj"]));
        assert!(error.contains("down_proj") && error.contains("expected nothing"), "{error}");
        let error = refused("r", json!(4));
        assert!(error.contains("4 x 8") && error.contains("[3, 8]"), "{error}");
        std::fs::write(dir.join(CONFIG), &text).unwrap();
        let bytes = std::fs::read(dir.join(MATRICES)).unwrap();
        std::fs::write(dir.join(MATRICES), &bytes[..bytes.len() - 5]).unwrap();
        let error = Lora::read(&dir, &config()).unwrap_err().to_string();
        assert!(error.contains(MATRICES), "{error}");
    }
}
