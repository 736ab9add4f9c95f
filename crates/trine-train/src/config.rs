//! The configuration of a run: one TOML file, every key known, every default in one place.
//!
//! The resolved configuration is written into the run directory, so a run can be repeated from its
//! own folder.

use std::path::Path;

use serde::{Deserialize, Serialize};
use trine_format::{HiddenAct, ModelConfig, Quantization};

use crate::TrainError;
use crate::diagnostics::DiagnosticsConfig;
use crate::samples::SamplesConfig;

/// One training run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// Name of the run; its directory is `runs/<name>` unless told otherwise.
    pub name: String,
    /// Seeds initialization and the order of the data.
    pub seed: u64,
    /// The network.
    pub model: ModelSection,
    /// What it is trained on.
    pub data: DataConfig,
    /// How parameters are updated.
    pub optimizer: OptimizerConfig,
    /// Learning rate and weight decay over time.
    pub schedule: ScheduleConfig,
    /// Length of the run, evaluation, checkpoints.
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
    /// `ternary`, or `none` for a full-precision baseline.
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
    /// Ternary weights by absmean, int8 activations by absmax.
    Ternary,
    /// f32 weights and activations.
    None,
}

/// Where tokens come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [data]")]
pub struct DataConfig {
    /// A text file, a directory made by `trine data prepare`, or `synth` for the built-in corpus.
    pub path: String,
    /// `char`, `byte`, `bpe:<vocabulary size>`, or the path of a tokenizer.json.
    pub tokenizer: String,
    /// Size of the built-in corpus for `synth`.
    pub synth_bytes: usize,
    /// Share of a text file's end that is held out for validation.
    pub val_fraction: f64,
    /// Tokens of a training sequence.
    pub seq_len: usize,
}

/// AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [optimizer]")]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay of matrices at its peak.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip_grad_norm: f64,
}

/// Learning rate and weight decay over time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [schedule]")]
pub struct ScheduleConfig {
    /// Shape of the schedule.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up.
    pub warmup_steps: usize,
    /// Learning rate at the end.
    pub min_learning_rate: f64,
    /// `two-stage`: where the second stage begins, as a share of all steps.
    pub switch_at: f64,
    /// `two-stage`: peak of the cosine that the second stage follows; at most the first peak.
    pub second_learning_rate: f64,
}

/// Shape of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// The peak throughout.
    Constant,
    /// From the peak to the minimum on a cosine.
    Cosine,
    /// From the peak to the minimum on a line.
    Linear,
    /// The BitNet recipe: two cosines, weight decay off in the second.
    TwoStage,
}

/// Length of the run, evaluation, checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [train]")]
pub struct TrainConfig {
    /// Number of updates.
    pub steps: usize,
    /// Sequences of an update.
    pub batch_size: usize,
    /// Updates between validations; the end is always validated.
    pub eval_every: usize,
    /// Most tokens of a validation, but at least one batch; 0 takes all of the held-out text.
    pub eval_tokens: usize,
    /// Updates between checkpoints; the end always has one.
    pub checkpoint_every: usize,
}

impl Default for ModelSection {
    fn default() -> Self {
        Self {
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
            synth_bytes: 8_000_000,
            val_fraction: 0.1,
            seq_len: 256,
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip_grad_norm: 1.0,
        }
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self {
            kind: ScheduleKind::TwoStage,
            warmup_steps: 100,
            min_learning_rate: 0.0,
            switch_at: 0.5,
            second_learning_rate: 7e-4,
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self { steps: 1000, batch_size: 16, eval_every: 250, eval_tokens: 0, checkpoint_every: 500 }
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
        if !overrides.is_empty() {
            let mut table: toml::Table = toml::from_str(text).map_err(in_file)?;
            for setting in overrides {
                set(&mut table, setting)?;
            }
            let place = format!("with --set {}", overrides.join(" --set "));
            config = table.try_into().map_err(|e| syntax(&place, &e))?;
        }
        config.check()?;
        Ok(config)
    }

    /// The configuration as TOML, every key written out.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).expect("plain data serializes")
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
            ("train.steps", self.train.steps),
            ("train.batch_size", self.train.batch_size),
            ("train.eval_every", self.train.eval_every),
            ("train.checkpoint_every", self.train.checkpoint_every),
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
        let rates = [
            ("model.init_std", f64::from(m.init_std)),
            ("optimizer.learning_rate", self.optimizer.learning_rate),
            ("optimizer.eps", self.optimizer.eps),
        ];
        for (key, value) in rates {
            require(value > 0.0 && value.is_finite(), key, "a positive number", value)?;
        }
        let not_negative = [
            ("optimizer.weight_decay", self.optimizer.weight_decay),
            ("optimizer.clip_grad_norm", self.optimizer.clip_grad_norm),
            ("schedule.min_learning_rate", self.schedule.min_learning_rate),
            ("schedule.second_learning_rate", self.schedule.second_learning_rate),
        ];
        for (key, value) in not_negative {
            require(value >= 0.0 && value.is_finite(), key, "a number of at least 0", value)?;
        }
        for beta in self.optimizer.betas {
            require((0.0..1.0).contains(&beta), "optimizer.betas", "numbers in [0, 1)", beta)?;
        }
        self.check_schedule()?;
        self.samples.check()?;
        let val = self.data.val_fraction;
        let share = "a share above 0 and below 1";
        require(val > 0.0 && val < 1.0, "data.val_fraction", share, val)
    }
}

impl RunConfig {
    /// The second stage of a schedule is the lower one.
    fn check_schedule(&self) -> Result<(), TrainError> {
        let s = &self.schedule;
        let share = s.switch_at;
        require((0.0..=1.0).contains(&share), "schedule.switch_at", "a share in [0, 1]", share)?;
        let (first, second) = (self.optimizer.learning_rate, s.second_learning_rate);
        require(
            s.kind != ScheduleKind::TwoStage || second <= first,
            "schedule.second_learning_rate",
            &format!("at most optimizer.learning_rate {first}"),
            second,
        )
    }

    /// The dotted keys in which a run may not change when it is resumed, of those that differ.
    ///
    /// A run may be made longer and watched in another way; everything else decides what its steps
    /// do, and a change would make it a different run.
    pub(crate) fn changed_keys(&self, other: &Self) -> Vec<String> {
        const MAY_CHANGE: [&str; 11] = [
            "name",
            "train.steps",
            "train.eval_every",
            "train.eval_tokens",
            "train.checkpoint_every",
            "diagnostics.every",
            "diagnostics.tensorboard",
            "samples.every",
            "samples.prompts",
            "samples.max_tokens",
            "samples.temperature",
        ];
        let mut keys = Vec::new();
        let table = |config: &Self| toml::Table::try_from(config).expect("plain data serializes");
        differing(&table(self), &table(other), "", &mut keys);
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
fn set(table: &mut toml::Table, setting: &str) -> Result<(), TrainError> {
    let bad = |expected| TrainError::Setting { setting: setting.to_owned(), expected };
    let (key, value) = setting.split_once('=').ok_or_else(|| bad("key=value"))?;
    let value = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
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
    fn a_resumed_run_may_only_be_made_longer() {
        let config = |overrides: &[&str]| parse("", overrides).unwrap();
        let longer = config(&[
            "train.steps=2000",
            "train.eval_every=5",
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
