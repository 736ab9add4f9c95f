//! The configuration of a run: one TOML file, every key known, every default in one place.
//!
//! The resolved configuration is written into the run directory, so a run can be repeated from its
//! own folder.

mod depth;
mod device;
mod finetune;
mod optimizer;
mod schedule;
mod train;

use std::path::Path;

pub use device::DeviceConfig;
pub use finetune::{
    DistillConfig, FinetuneConfig, LoraConfig, Method, Objective, Reduction, RelationsConfig,
};
pub use optimizer::{MasterPrecision, MomentStorage, OptimizerConfig, OptimizerKind};
pub use schedule::{DecayShape, ScheduleConfig, ScheduleKind};
pub use train::{SpikePolicy, TrainConfig};

use serde::{Deserialize, Serialize};
use trine_format::{HiddenAct, ModelConfig, Quantization};

use crate::TrainError;
use crate::diagnostics::DiagnosticsConfig;
use crate::quantizers::QuantizerConfig;
use crate::samples::SamplesConfig;

/// One training run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Name of the run; its directory is `runs/<name>` unless told otherwise.
    pub name: String,
    /// Seeds initialization and the order of the data.
    pub seed: u64,
    /// The network, of a run that begins with fresh weights.
    pub model: ModelSection,
    /// The model that the run begins with, if it does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finetune: Option<FinetuneConfig>,
    /// How its projections are quantized.
    pub quantizer: QuantizerConfig,
    /// What it is trained on.
    pub data: DataConfig,
    /// How parameters are updated.
    pub optimizer: OptimizerConfig,
    /// Learning rate and weight decay over time.
    pub schedule: ScheduleConfig,
    /// Length of the run, batches, evaluation, checkpoints, what to do about spikes.
    pub train: TrainConfig,
    /// What is watched beside the loss.
    pub diagnostics: DiagnosticsConfig,
    /// Texts written during training.
    pub samples: SamplesConfig,
}

/// The network; names are those of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [model]")]
pub struct ModelSection {
    /// Where above 0, what is not named follows from it when a configuration is read: so many layers,
    /// a width of 64 for each, heads of 64, half as many key/value heads, a feed-forward layer 2.7
    /// times as wide, `optimizer.learning_rate` 1.5e-3 √(1536 / width) but at most 3e-3,
    /// `schedule.second_learning_rate` two thirds of it, and 1024 tokens a layer in
    /// `train.batch_size`. The source of `config/depth.rs` says where each is from.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key/value heads; divides the number of query heads.
    pub num_key_value_heads: usize,
    /// Longest sequence; 0 takes `data.seq_len`.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Activation of the gate: `relu2` or `silu`.
    pub hidden_act: Activation,
    /// RMSNorm before the output and down projections.
    pub sub_norms: bool,
    /// RMSNorm of its own before every projection; ternary models only.
    pub projection_norms: bool,
    /// The head shares the embedding's weights.
    pub tie_word_embeddings: bool,
    /// `ternary`, as `[quantizer]` says, or `none` for a full-precision baseline.
    pub quantization: Quantizer,
    /// Standard deviation of freshly initialized matrices.
    pub init_std: f32,
}

/// Activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// Squared ReLU (arXiv 2109.08668), as the 2B4T model has it.
    Relu2,
    /// SiLU, as LLaMA has it.
    Silu,
}

/// What the projections compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantizer {
    /// As the section `[quantizer]` says: by default ternary weights by absmean, int8 activations
    /// by absmax.
    Ternary,
    /// f32 weights and activations.
    None,
}

/// Where tokens come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [data]")]
pub struct DataConfig {
    /// A file of text, a directory made by `trine data prepare`, or `synth` for the built-in
    /// corpus. Files are what [`trine_data::Corpus`] reads.
    pub path: String,
    /// `char`, `byte`, `bpe:<vocabulary size>`, or the path of a tokenizer.json.
    pub tokenizer: String,
    /// Key of the text in a JSON line, column of the text in a parquet file.
    pub text_key: String,
    /// What separates the documents of a text file; empty where it is one text.
    pub split_on: String,
    /// Size of the built-in corpus for `synth`.
    pub synth_bytes: usize,
    /// Share that is held out for validation: the end of one text, or documents.
    pub val_fraction: f64,
    /// Tokens of a training sequence.
    pub seq_len: usize,
    /// Attention does not look beyond the document a token is of.
    pub document_mask: bool,
    /// Instead of `path`: several directories made by `trine data prepare` with one tokenizer, each
    /// a table `[[data.sources]]`.
    pub sources: Vec<SourceConfig>,
}

/// One of several corpora that are trained on together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table [[data.sources]]")]
pub struct SourceConfig {
    /// A directory made by `trine data prepare`.
    pub path: String,
    /// Share of the training sequences, relative to the weights of the others.
    pub weight: f64,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
            depth: 0,
            hidden_size: 128,
            intermediate_size: 344,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 4,
            max_position_embeddings: 0,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            hidden_act: Activation::Relu2,
            sub_norms: true,
            projection_norms: false,
            tie_word_embeddings: true,
            quantization: Quantizer::Ternary,
            init_std: 0.02,
        }
    }
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            path: String::new(),
            tokenizer: "bpe:4096".to_owned(),
            text_key: "text".to_owned(),
            split_on: String::new(),
            synth_bytes: 8_000_000,
            val_fraction: 0.1,
            seq_len: 256,
            document_mask: false,
            sources: Vec::new(),
        }
    }
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self { path: String::new(), weight: 1.0 }
    }
}

impl RunConfig {
    /// Reads a TOML file and applies `key=value` overrides, e.g. `optimizer.learning_rate=3e-3`.
    ///
    /// # Errors
    /// An unreadable file, TOML that does not parse, an unknown key, a value of the wrong type or
    /// out of range. The message names file and key.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, TrainError> {
        let read = |source| TrainError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, path, overrides)
    }

    /// As [`Self::load`], from text; `path` is for messages.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Self, TrainError> {
        let syntax = |place: &str, e: &toml::de::Error| TrainError::ConfigSyntax {
            path: path.to_owned(),
            message: format!("{place}: {}", in_words(e)),
        };
        let in_file = |e| syntax(&position(text, &e), &e);
        // Parsed on its own first, so that errors in the file point at its lines.
        let mut config: Self = toml::from_str(text).map_err(in_file)?;
        if !overrides.is_empty() || config.model.depth > 0 || config.finetune.is_some() {
            let mut table: toml::Table = toml::from_str(text).map_err(in_file)?;
            for setting in overrides {
                apply(&mut table, setting)?;
            }
            depth::resolve(&mut table)?;
            finetune::resolve(&mut table)?;
            let place = format!("with --set {}", overrides.join(" --set "));
            config = table.try_into().map_err(|e| syntax(&place, &e))?;
        }
        config.check()?;
        Ok(config)
    }

    /// The configuration as TOML, every key written out that the run has.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(&self.table()).expect("plain data serializes")
    }

    fn table(&self) -> toml::Table {
        let mut table = toml::Table::try_from(self).expect("plain data serializes");
        if self.finetune.is_some() {
            table.remove("model");
            if let Some(data) = table.get_mut("data").and_then(toml::Value::as_table_mut) {
                data.remove("tokenizer");
            }
        }
        table
    }

    /// The model for a vocabulary.
    ///
    /// # Errors
    /// Sizes that do not fit together.
    pub fn model_config(
        &self,
        vocab_size: usize,
        bos_token_id: Option<u32>,
        eos_token_id: Option<u32>,
    ) -> Result<ModelConfig, TrainError> {
        let m = &self.model;
        let max_position_embeddings = match m.max_position_embeddings {
            0 => self.data.seq_len,
            n => n,
        };
        let config = ModelConfig {
            hidden_size: m.hidden_size,
            intermediate_size: m.intermediate_size,
            num_hidden_layers: m.num_hidden_layers,
            num_attention_heads: m.num_attention_heads,
            num_key_value_heads: m.num_key_value_heads,
            head_dim: m.hidden_size / m.num_attention_heads,
            vocab_size,
            max_position_embeddings,
            rope_theta: m.rope_theta,
            rms_norm_eps: m.rms_norm_eps,
            hidden_act: match m.hidden_act {
                Activation::Relu2 => HiddenAct::Relu2,
                Activation::Silu => HiddenAct::Silu,
            },
            sub_norms: m.sub_norms,
            projection_norm_eps: m.projection_norms.then_some(m.rms_norm_eps),
            tie_word_embeddings: m.tie_word_embeddings,
            bos_token_id,
            eos_token_ids: eos_token_id.into_iter().collect(),
            quantization: match m.quantization {
                Quantizer::Ternary => Quantization::Online,
                Quantizer::None => Quantization::None,
            },
        };
        config.validate()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), TrainError> {
        let m = &self.model;
        let positive = [
            ("model.hidden_size", m.hidden_size),
            ("model.intermediate_size", m.intermediate_size),
            ("model.num_hidden_layers", m.num_hidden_layers),
            ("model.num_attention_heads", m.num_attention_heads),
            ("model.num_key_value_heads", m.num_key_value_heads),
            ("data.synth_bytes", self.data.synth_bytes),
            ("data.seq_len", self.data.seq_len),
        ];
        for (key, value) in positive {
            require(value > 0, key, "at least 1", value)?;
        }
        require(
            m.hidden_size.is_multiple_of(m.num_attention_heads),
            "model.num_attention_heads",
            &format!("a divisor of hidden_size {}", m.hidden_size),
            m.num_attention_heads,
        )?;
        require(
            m.max_position_embeddings == 0 || m.max_position_embeddings >= self.data.seq_len,
            "model.max_position_embeddings",
            &format!("0, or at least data.seq_len {}", self.data.seq_len),
            m.max_position_embeddings,
        )?;
        require(
            m.quantization == Quantizer::Ternary || !m.projection_norms,
            "model.projection_norms",
            "false, as model.quantization is \"none\" and only ternary projections have norms",
            m.projection_norms,
        )?;
        let init_std = f64::from(m.init_std);
        let positive = init_std > 0.0 && init_std.is_finite();
        require(positive, "model.init_std", "a positive number", init_std)?;
        let deepest = format!("at most {}", depth::MAX_DEPTH);
        require(m.depth <= depth::MAX_DEPTH, "model.depth", &deepest, m.depth)?;
        self.optimizer.check()?;
        self.schedule.check(&self.optimizer)?;
        self.train.check()?;
        self.quantizer.check(m)?;
        self.check_sources()?;
        self.samples.check()?;
        let clip = self.optimizer.clip_grad_norm;
        let zero = "0, as train.update_in_backward is true";
        let clips = self.train.update_in_backward && clip != 0.0;
        require(!clips, "optimizer.clip_grad_norm", zero, clip)?;
        if let Some(finetune) = &self.finetune {
            finetune.check(self)?;
        }
        let val = self.data.val_fraction;
        let share = "a share above 0 and below 1";
        require(val > 0.0 && val < 1.0, "data.val_fraction", share, val)
    }
}

impl RunConfig {
    /// A mixture has directories and positive weights, and nothing beside it.
    fn check_sources(&self) -> Result<(), TrainError> {
        let DataConfig { path, sources, .. } = &self.data;
        for (i, source) in sources.iter().enumerate() {
            let key = |name| format!("data.sources[{i}].{name}");
            let weight = source.weight;
            let positive = weight > 0.0 && weight.is_finite();
            require(positive, &key("weight"), "a positive number", weight)?;
            let directory = "a directory made by `trine data prepare`";
            require(!source.path.is_empty(), &key("path"), directory, "nothing")?;
        }
        let alone = sources.is_empty() || path.is_empty();
        require(alone, "data.path", "nothing, as data.sources says what is trained on", path)
    }

    /// The dotted keys in which a run may not change when it is resumed, of those that differ.
    ///
    /// A run may be made longer, be watched and saved in another way, and be helped over a spike that
    /// stopped it; everything else decides what its steps do, and a change would make it a different
    /// run.
    pub(crate) fn changed_keys(&self, other: &Self) -> Vec<String> {
        const MAY_CHANGE: [&str; 20] = [
            "name",
            "train.device",
            "train.steps",
            "train.recompute_activations",
            "train.eval_every",
            "train.eval_tokens",
            "train.checkpoint_every",
            "train.keep_last",
            "train.keep_best",
            "train.milestone_every",
            "train.on_spike",
            "train.spike_window",
            "train.spike_sigmas",
            "train.spike_limit",
            "diagnostics.every",
            "diagnostics.tensorboard",
            "samples.every",
            "samples.prompts",
            "samples.max_tokens",
            "samples.temperature",
        ];
        let mut keys = Vec::new();
        differing(&self.table(), &other.table(), "", &mut keys);
        keys.retain(|key| !MAY_CHANGE.contains(&key.as_str()));
        keys
    }
}

/// Collects the dotted keys whose values differ.
fn differing(a: &toml::Table, b: &toml::Table, prefix: &str, keys: &mut Vec<String>) {
    for (key, value) in a {
        let path = format!("{prefix}{key}");
        match (value, b.get(key)) {
            (toml::Value::Table(a), Some(toml::Value::Table(b))) => {
                differing(a, b, &format!("{path}."), keys);
            }
            (a, b) if Some(a) != b => keys.push(path),
            _ => {}
        }
    }
}

pub(crate) fn require(
    holds: bool,
    key: &str,
    expected: &str,
    found: impl std::fmt::Display,
) -> Result<(), TrainError> {
    if holds {
        return Ok(());
    }
    let (key, expected, found) = (key.to_owned(), expected.to_owned(), found.to_string());
    Err(TrainError::ConfigValue { key, expected, found })
}

/// Where in the file an error is; the parser's own rendering shows it over several lines.
fn position(text: &str, e: &toml::de::Error) -> String {
    let start = e.span().map_or(0, |span| span.start);
    let before = text.get(..start).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = before.matches('\n').count() + 1;
    format!("line {line}, column {}", before[line_start..].chars().count() + 1)
}

/// The cause of an error without its place, in words rather than in Rust's types. The key is added
/// where an override is refused, since no line can be named there.
fn in_words(e: &toml::de::Error) -> String {
    let rendered = e.to_string();
    let in_key = rendered.lines().last().filter(|line| line.starts_with("in `"));
    let message = e
        .message()
        .replace("expected usize", "expected a whole number of at least 0")
        .replace("expected u64", "expected a whole number of at least 0")
        .replace("expected f64", "expected a number")
        .replace("expected f32", "expected a number");
    in_key.map_or(message.clone(), |key| format!("{message} {key}"))
}

/// Applies one `a.b=value` to a table. A value that is not TOML is taken as a string.
fn apply(table: &mut toml::Table, setting: &str) -> Result<(), TrainError> {
    let bad = |expected| TrainError::Setting { setting: setting.to_owned(), expected };
    let (key, value) = setting.split_once('=').ok_or_else(|| bad("key=value"))?;
    let value = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    set(table, key, value).map_err(|e| match e {
        TrainError::Setting { expected, .. } => bad(expected),
        other => other,
    })
}

/// Gives the dotted `key` of a table a value.
fn set(table: &mut toml::Table, key: &str, value: toml::Value) -> Result<(), TrainError> {
    let bad = |expected| TrainError::Setting { setting: key.to_owned(), expected };
    let mut path: Vec<&str> = key.trim().split('.').collect();
    let last = path.pop().filter(|k| !k.is_empty()).ok_or_else(|| bad("key=value"))?;
    let mut at = table;
    for part in path {
        at = at
            .entry(part)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| bad("section.key=value with the name of a section"))?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, overrides: &[&str]) -> Result<RunConfig, String> {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        RunConfig::parse(text, Path::new("run.toml"), &overrides).map_err(|e| e.to_string())
    }

    #[test]
    fn resolved_config_reads_back_the_same() {
        let config = parse("name = 'x'\n[train]\nsteps = 7", &["model.hidden_size=64"]).unwrap();
        assert_eq!((config.train.steps, config.model.hidden_size), (7, 64));
        assert_eq!(parse(&config.to_toml(), &[]).unwrap(), config);
    }

    #[test]
    fn unknown_keys_are_named() {
        for (text, overrides) in
            [("[model]\nhiden_size = 3", &[][..]), ("", &["model.hiden_size=3"][..])]
        {
            let error = parse(text, overrides).unwrap_err();
            assert!(error.contains("run.toml") && error.contains("hiden_size"), "{error}");
        }
    }

    #[test]
    fn senseless_values_are_named() {
        for (setting, key) in [
            ("train.steps=0", "train.steps"),
            ("model.num_attention_heads=3", "model.num_attention_heads"),
            ("optimizer.learning_rate=-1.0", "optimizer.learning_rate"),
            ("optimizer.betas=[0.9, 1.5]", "optimizer.betas"),
            ("optimizer.muon_momentum=1.0", "optimizer.muon_momentum"),
            ("train.accumulate=17", "train.accumulate"),
            ("train.spike_window=1", "train.spike_window"),
            ("schedule.decay_fraction=2.0", "schedule.decay_fraction"),
            ("model.depth=2000", "model.depth"),
            ("data.val_fraction=1.5", "data.val_fraction"),
            ("samples.temperature=-0.5", "samples.temperature"),
            ("schedule.second_learning_rate=2e-3", "schedule.second_learning_rate"),
            ("steps", "key=value"),
        ] {
            let error = parse("", &[setting]).unwrap_err();
            assert!(error.contains(key), "{setting}: {error}");
        }
        let norms = "model.projection_norms=true";
        assert!(parse("", &[norms]).is_ok());
        let error = parse("", &[norms, "model.quantization=none"]).unwrap_err();
        assert!(error.contains("model.projection_norms"), "{error}");
    }

    #[test]
    fn sources_of_a_mixture_are_read_and_checked_by_key() {
        let text = "[[data.sources]]\npath = 'a'\nweight = 3\n[[data.sources]]\npath = 'b'";
        let config = parse(text, &[]).unwrap();
        let source = |path: &str, weight| SourceConfig { path: path.to_owned(), weight };
        assert_eq!(config.data.sources, [source("a", 3.0), source("b", 1.0)]);
        assert_eq!(parse(&config.to_toml(), &[]).unwrap(), config);
        let inline = parse("", &["data.sources=[{path='a', weight=3.0}, {path='b'}]"]);
        assert_eq!(inline.unwrap(), config);
        for (from, to, names) in [
            ("3", "-3", ["`data.sources[0].weight`", "found -3"]),
            ("3", "0", ["`data.sources[0].weight`", "a positive number"]),
            ("3", "nan", ["`data.sources[0].weight`", "found NaN"]),
            ("'b'", "''", ["`data.sources[1].path`", "trine data prepare"]),
            ("weight", "wait", ["unknown field `wait`", "line 3"]),
        ] {
            let error = parse(&text.replace(from, to), &[]).unwrap_err();
            assert!(names.iter().all(|name| error.contains(name)), "{error}");
        }
        let error = parse(text, &["data.path=synth"]).unwrap_err();
        assert!(error.contains("`data.path`") && error.contains("data.sources"), "{error}");
        let other = parse(text, &["data.sources=[{path='a'}]"]).unwrap();
        assert_eq!(config.changed_keys(&other), ["data.sources"]);
    }

    #[test]
    fn a_resumed_run_may_only_be_made_longer() {
        let config = |overrides: &[&str]| parse("", overrides).unwrap();
        let longer = config(&[
            "train.steps=2000",
            "train.on_spike=rewind",
            "name=other",
            "diagnostics.every=9",
        ]);
        assert!(config(&[]).changed_keys(&longer).is_empty());
        let other = config(&["seed=9", "train.batch_size=3", "schedule.kind=cosine"]);
        assert_eq!(config(&[]).changed_keys(&other), ["schedule.kind", "seed", "train.batch_size"]);
    }

    #[test]
    fn overrides_take_bare_strings() {
        let config = parse("", &["data.tokenizer=char", "model.hidden_act=silu"]).unwrap();
        assert_eq!(config.data.tokenizer, "char");
        assert_eq!(config.model.hidden_act, Activation::Silu);
    }
}
