//! `[finetune]`: a run that begins with a trained model.

use serde::{Deserialize, Serialize};
use trine_data::chats::TooLong;
use trine_format::{ModelConfig, Projection, names};

use super::{RunConfig, require, set};
use crate::TrainError;
use crate::fused::Relations;
use crate::quantizers::QuantizerConfig;

/// A run that begins with a trained model instead of fresh weights. Then there is no section `[model]`
/// and no `data.tokenizer`: both are the model's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [finetune]")]
pub struct FinetuneConfig {
    /// The model: a path, or `hf://owner/name`, in any form that `trine convert` reads.
    pub base: String,
    /// `lora` trains adapters beside the packed model, `full` its masters.
    pub method: Method,
    /// What is learned: `sft` the answers of conversations, `text` all of a text, `dpo` which of two answers
    /// is the better.
    pub objective: Objective,
    /// Whether the gradient is that of the `mean` loss of a batch's tokens, or of their `sum`, as the
    /// 2B4T model was fine-tuned (arXiv 2504.12285, section 3.2). Reported losses are means.
    pub loss: Reduction,
    /// How strongly `dpo` holds to the model that the run began with.
    pub beta: f64,
    /// What happens to conversations of more than `data.seq_len` + 1 tokens: `truncate`, `drop` or
    /// `refuse`.
    pub too_long: TooLong,
    /// A Jinja file to render conversations with, and to save with the model; empty for the model's own.
    pub chat_template: String,
    /// Makes the projections of a full-precision model ternary; `quantizer.lambda_steps` does it little by
    /// little. For `method = "full"`.
    pub ternarize: bool,
    /// Adds RMSNorms before the output and down projections, where the model has none (BitDistill, arXiv
    /// 2510.13998). For `method = "full"`.
    pub add_sub_norms: bool,
    /// An adapter to begin with, a directory or a run, for `method = "lora"`; with `dpo` it is a part of what
    /// preferences are compared with. `[finetune.lora]` then says what the adapter is.
    pub adapter: String,
    /// Adapters, for `method = "lora"`.
    pub lora: LoraConfig,
    /// A teacher, to learn from what it says of every token besides the tokens themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillConfig>,
}

/// Learning from a teacher (arXiv 1503.02531; for ternary models BitDistill, arXiv 2510.13998).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [finetune.distill]")]
pub struct DistillConfig {
    /// A model with the same tokenizer: a path, or `hf://owner/name`; empty for `finetune.base` as it is.
    pub teacher: String,
    /// Divides the logits of both before they are compared.
    pub temperature: f64,
    /// Factor of the cross entropy of the tokens.
    pub cross_entropy: f64,
    /// Factor of the divergence from the teacher, times the square of the temperature.
    pub divergence: f64,
    /// A file for what the teacher says of each token: what is there already, of an earlier epoch or of
    /// another run, is not asked again. Empty to ask every time.
    pub cache: String,
    /// With a cache, how many of the likeliest ids of a token are told apart; all others are one.
    pub top_k: usize,
    /// Also learns how the teacher relates tokens to each other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relations: Option<RelationsConfig>,
}

impl Default for DistillConfig {
    fn default() -> Self {
        Self {
            teacher: String::new(),
            temperature: 2.0,
            cross_entropy: 0.5,
            divergence: 0.5,
            cache: String::new(),
            top_k: 64,
            relations: None,
        }
    }
}

/// Attention relations (MiniLMv2, arXiv 2012.15828): of the queries, keys and values of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [finetune.distill.relations]")]
pub struct RelationsConfig {
    /// Factor of their divergence: the sum of those of queries, keys and values, each the mean over heads and
    /// tokens.
    pub factor: f64,
    /// The layer that learns, from 0; negative numbers count from the last, -1.
    pub layer: i64,
    /// The teacher's layer that it learns from.
    pub teacher_layer: i64,
    /// Relation heads; 0 for as many as the student has key heads.
    pub heads: usize,
}

impl Default for RelationsConfig {
    fn default() -> Self {
        Self { factor: 1.0, layer: -1, teacher_layer: -1, heads: 0 }
    }
}

/// What of a model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Low-rank adapters (arXiv 2106.09685) beside weights that stay as they are, packed.
    Lora,
    /// Every parameter: masters move, and trits flip.
    Full,
}

/// What is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// The answers of conversations: supervised fine-tuning.
    Sft,
    /// Every token of a text: continued pre-training.
    Text,
    /// Preferences (arXiv 2305.18290). A sequence of the batch is a pair of answers then.
    Dpo,
}

/// How the losses of tokens become that of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reduction {
    /// Divided by their number.
    Mean,
    /// Added up: the gradient grows with the number of tokens, and with it what
    /// `optimizer.clip_grad_norm` cuts off.
    Sum,
}

/// Adapters beside projections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "the section [finetune.lora]")]
pub struct LoraConfig {
    /// Rows of `A`, columns of `B`.
    pub rank: usize,
    /// The product of both is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Share of an adapter's inputs that are left out of a step, at random.
    pub dropout: f64,
    /// The projections of every layer that have adapters, as PEFT names them.
    pub targets: Vec<String>,
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        Self {
            base: String::new(),
            method: Method::Lora,
            objective: Objective::Sft,
            loss: Reduction::Mean,
            beta: 0.1,
            too_long: TooLong::Truncate,
            chat_template: String::new(),
            ternarize: false,
            add_sub_norms: false,
            adapter: String::new(),
            lora: LoraConfig::default(),
            distill: None,
        }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: Projection::ALL.map(|p| names::module(p).to_owned()).into(),
        }
    }
}

impl LoraConfig {
    /// The projections that have adapters, in the order of a forward pass.
    ///
    /// # Errors
    /// A name that is none, or no name.
    pub fn projections(&self) -> Result<Vec<Projection>, TrainError> {
        let key = "finetune.lora.targets";
        let all = Projection::ALL.map(names::module);
        let expected = format!("some of {}", all.join(", "));
        if let Some(other) = self.targets.iter().find(|name| !all.contains(&name.as_str())) {
            return require(false, key, &expected, other).map(|()| Vec::new());
        }
        require(!self.targets.is_empty(), key, &expected, "nothing")?;
        let named = |p: &Projection| self.targets.iter().any(|name| name == names::module(*p));
        Ok(Projection::ALL.into_iter().filter(named).collect())
    }
}

impl RelationsConfig {
    /// Layers and heads of a student and its teacher.
    ///
    /// # Errors
    /// Ones that there are not.
    pub(crate) fn resolved(
        &self,
        student: &ModelConfig,
        teacher: &ModelConfig,
    ) -> Result<Relations, TrainError> {
        let layer = |key: &str, layer: i64, model: &ModelConfig| {
            let layers = model.num_hidden_layers as i64;
            let at = if layer < 0 { layer + layers } else { layer };
            let expected = format!("a layer from {} to {}", -layers, layers - 1);
            let key = format!("finetune.distill.relations.{key}");
            require((0..layers).contains(&at), &key, &expected, layer).map(|()| at as usize)
        };
        let heads = if self.heads == 0 { student.num_key_value_heads } else { self.heads };
        let widths = [student, teacher].map(|model| {
            let heads = [model.num_attention_heads, model.num_key_value_heads];
            heads.map(|heads| heads * model.head_dim)
        });
        let divides = widths.iter().flatten().all(|width| width.is_multiple_of(heads));
        let [[q, k], [teacher_q, teacher_k]] = widths;
        let expected = format!(
            "a divisor of the widths of queries and keys, {q} and {k}, of the teacher {teacher_q} and \
             {teacher_k}"
        );
        require(divides, "finetune.distill.relations.heads", &expected, heads)?;
        Ok(Relations {
            factor: self.factor as f32,
            layer: layer("layer", self.layer, student)?,
            teacher_layer: layer("teacher_layer", self.teacher_layer, teacher)?,
            heads,
        })
    }
}

impl DistillConfig {
    fn check(&self) -> Result<(), TrainError> {
        let factor = self.relations.as_ref().map_or(1.0, |relations| relations.factor);
        for (key, value, least) in [
            ("temperature", self.temperature, 1e-3),
            ("cross_entropy", self.cross_entropy, 0.0),
            ("divergence", self.divergence, 1e-9),
            ("relations.factor", factor, 1e-9),
        ] {
            let holds = value >= least && value.is_finite();
            let expected = format!("a number of at least {least}");
            require(holds, &format!("finetune.distill.{key}"), &expected, value)?;
        }
        require(self.top_k > 0, "finetune.distill.top_k", "at least 1", self.top_k)?;
        let asked = self.relations.is_none() || self.cache.is_empty();
        let expected = "nothing, as relations are learned from the teacher itself";
        require(asked, "finetune.distill.cache", expected, &self.cache)
    }
}

impl FinetuneConfig {
    /// Whether there is something to learn from beside the data's own tokens: a teacher, or which of two
    /// answers is the better.
    pub(crate) fn is_taught(&self) -> bool {
        self.distill.is_some() || self.objective == Objective::Dpo
    }

    pub(super) fn check(&self, run: &RunConfig) -> Result<(), TrainError> {
        let model = "a path or hf://owner/name";
        require(!self.base.is_empty(), "finetune.base", model, "nothing")?;
        let LoraConfig { rank, alpha, dropout, .. } = self.lora;
        require(rank > 0, "finetune.lora.rank", "at least 1", rank)?;
        let positive = alpha > 0.0 && alpha.is_finite();
        require(positive, "finetune.lora.alpha", "a positive number", alpha)?;
        let strong = self.beta > 0.0 && self.beta.is_finite();
        require(strong, "finetune.beta", "a positive number", self.beta)?;
        let mean = self.loss == Reduction::Mean || self.objective != Objective::Dpo;
        require(mean, "finetune.loss", "\"mean\", with objective = \"dpo\"", "\"sum\"")?;
        if let Some(distill) = &self.distill {
            distill.check()?;
            let no_dpo = self.objective != Objective::Dpo;
            let expected = "sft or text, as there is a section [finetune.distill]";
            require(no_dpo, "finetune.objective", expected, "dpo")?;
        }
        let default = run.quantizer == QuantizerConfig::default();
        let plain =
            "lambda_steps alone, as only the default is learned from a teacher or from preferences";
        let taught = self.is_taught();
        let lambda_steps = run.quantizer.lambda_steps;
        let warming = QuantizerConfig { lambda_steps, ..QuantizerConfig::default() };
        let is_default = run.quantizer == warming;
        require(is_default || !taught, "quantizer", plain, "others")?;
        if run.train.update_in_backward {
            let masters = self.method == Method::Full && !taught;
            let expected = "false, as adapters, preferences and teachers are not learned so";
            require(masters, "train.update_in_backward", expected, true)?;
        }
        let share = "a share from 0 to below 1";
        require((0.0..1.0).contains(&dropout), "finetune.lora.dropout", share, dropout)?;
        self.lora.projections()?;
        let sources = &run.data.sources;
        let one = "nothing, as a fine-tuning has one source, data.path";
        require(sources.is_empty(), "data.sources", one, sources.len())?;
        let lora = self.method == Method::Lora;
        let only = "nothing, as method = \"full\" trains no adapter";
        require(lora || self.adapter.is_empty(), "finetune.adapter", only, &self.adapter)?;
        let frozen = "nothing, as method = \"lora\" leaves the model as it is";
        for (holds, key) in [
            (default, "quantizer"),
            (!self.ternarize, "finetune.ternarize"),
            (!self.add_sub_norms, "finetune.add_sub_norms"),
        ] {
            require(holds || !lora, key, frozen, "a value")?;
        }
        Ok(())
    }
}

/// Refuses what is the model's to say, and sets rates that suit a trained model, wherever a table
/// names none: what suits fresh weights would destroy it.
///
/// # Errors
/// A section `[model]`, or `data.tokenizer`.
pub(super) fn resolve(table: &mut toml::Table) -> Result<(), TrainError> {
    let Some(section) = table.get("finetune") else { return Ok(()) };
    let lora = section.get("method").and_then(toml::Value::as_str) != Some("full");
    for (section, key) in [("model", ""), ("data", "tokenizer")] {
        let found = match (table.get(section), key) {
            (found, "") => found,
            (found, key) => found.and_then(|section| section.get(key)),
        };
        let key = [section, key].join(".");
        let expected = "nothing, as it is that of finetune.base";
        require(found.is_none(), key.trim_end_matches('.'), expected, "a value")?;
    }
    let defaults = [
        // For LoRA the value of most recipes; for masters one at which trits flip.
        ("optimizer.learning_rate", toml::Value::Float(if lora { 2e-4 } else { 1e-4 })),
        ("optimizer.weight_decay", toml::Value::Float(0.0)),
        ("schedule.kind", toml::Value::String("cosine".to_owned())),
    ];
    for (key, value) in defaults {
        let named = key.split_once('.').and_then(|(section, key)| table.get(section)?.get(key));
        if named.is_none() {
            set(table, key, value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str, overrides: &[&str]) -> Result<RunConfig, String> {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        RunConfig::parse(text, Path::new("run.toml"), &overrides).map_err(|e| e.to_string())
    }

    const TEXT: &str = "[finetune]\nbase = 'model'\n[data]\npath = 'chats.jsonl'\n";

    #[test]
    fn a_resolved_configuration_reads_back_the_same() {
        let config = parse(TEXT, &["finetune.lora.rank=4"]).unwrap();
        let finetune = config.finetune.as_ref().unwrap();
        assert_eq!((finetune.lora.rank, finetune.method), (4, Method::Lora));
        assert_eq!(finetune.lora.projections().unwrap(), Projection::ALL);
        assert_eq!((config.optimizer.learning_rate, config.optimizer.weight_decay), (2e-4, 0.0));
        assert_eq!(parse(&config.to_toml(), &[]).unwrap(), config);
        let full = parse(TEXT, &["finetune.method=full"]).unwrap();
        assert_eq!(full.optimizer.learning_rate, 1e-4);
        let named = parse(TEXT, &["optimizer.learning_rate=3e-5"]).unwrap();
        assert_eq!(named.optimizer.learning_rate, 3e-5);
        // A run from fresh weights has no such section.
        assert!(!parse("", &[]).unwrap().to_toml().contains("finetune"));
    }

    #[test]
    fn what_does_not_go_with_a_base_is_refused_by_key() {
        for (setting, key) in [
            ("finetune.base=''", "`finetune.base`"),
            ("finetune.lora.rank=0", "`finetune.lora.rank`"),
            ("finetune.lora.alpha=nan", "`finetune.lora.alpha`"),
            ("finetune.lora.dropout=1.0", "`finetune.lora.dropout`"),
            ("finetune.lora.targets=['lm_head']", "found lm_head"),
            ("finetune.beta=0", "`finetune.beta`"),
            ("finetune.distill.temperature=0", "`finetune.distill.temperature`"),
            ("finetune.distill={divergence=0.0}", "`finetune.distill.divergence`"),
            ("finetune.distill={top_k=0}", "`finetune.distill.top_k`"),
            ("finetune.distill={relations={factor=0}}", "`finetune.distill.relations.factor`"),
            ("finetune.distill={relations={head=2}}", "unknown field `head`"),
            ("finetune.distill={relations={},cache='a'}", "`finetune.distill.cache`"),
            ("finetune.lora.targets=[]", "`finetune.lora.targets`"),
            ("finetune.method=qlora", "qlora"),
            ("finetune.rank=3", "unknown field `rank`"),
            ("model.hidden_size=64", "`model`"),
            ("data.tokenizer=char", "`data.tokenizer`"),
            ("data.sources=[{path='a'}]", "`data.sources`"),
            ("quantizer.weights=absmedian", "`quantizer`"),
            ("finetune.ternarize=true", "`finetune.ternarize`"),
            ("finetune={base='a',method='full',adapter='b'}", "`finetune.adapter`"),
        ] {
            let text = if key == "`data.sources`" { "[finetune]\nbase = 'model'\n" } else { TEXT };
            let error = parse(text, &[setting]).unwrap_err();
            assert!(error.contains(key), "{setting}: {error}");
        }
    }
}
