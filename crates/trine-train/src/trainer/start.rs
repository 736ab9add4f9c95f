//! What a run begins with, and what it takes up: a function of its configuration, of the model that it
//! fine-tunes, and of a checkpoint.

use std::collections::BTreeSet;
use std::path::Path;

use candle_core::Device;
use trine_format::ModelConfig;
use trine_format::peft::Lora;
use trine_tokenizer::Tokenizer;

use super::preferences;
use crate::adapters::Adapters;
use crate::base::Base;
use crate::checkpoint::{self, TrainerState};
use crate::config::Method;
use crate::optimizer::Optimizer;
use crate::quantizers::{QuantizerConfig, Scheme, stored};
use crate::{Bitnet, Params, RunConfig, TrainError};

/// The network of a run, and the model that it begins with.
pub(super) struct Start {
    expected: ModelConfig,
    base: Option<Base>,
}

impl Start {
    /// Of a run over the vocabulary of `tokenizer`, or with the model that `[finetune]` names.
    ///
    /// # Errors
    /// Sizes that do not fit together, a section `[finetune]` without a model, or the tokens of another
    /// tokenizer than the model's.
    pub(super) fn new(
        config: &RunConfig,
        tokenizer: &Tokenizer,
        base: Option<Base>,
    ) -> Result<Self, TrainError> {
        let expected = match (&base, &config.finetune) {
            (Some(base), Some(_)) => {
                if base.tokenizer()?.hash() != tokenizer.hash() {
                    let path = base.path().to_owned();
                    let message = "the data was made with another tokenizer than the model's";
                    return Err(TrainError::Checkpoint { path, message: message.to_owned() });
                }
                base.config().clone()
            }
            (None, None) => {
                let (vocab, bos) = (tokenizer.vocab_size(), tokenizer.bos_id());
                config.model_config(vocab, bos, tokenizer.eos_id())?
            }
            (Some(_), None) => {
                return Err(no_section("the section, for a run with a model", "none"));
            }
            (None, Some(_)) => return Err(no_section("none, for a run without a model", "one")),
        };
        Ok(Self { expected, base })
    }

    /// The network.
    pub(super) fn config(&self) -> &ModelConfig {
        &self.expected
    }

    /// The model that the run begins with, if it does not begin anew.
    pub(super) fn base(&self) -> Option<&Base> {
        self.base.as_ref()
    }

    /// What preferences are compared with, unless that is the model in training without its adapters.
    pub(super) fn reference(
        &self,
        config: &RunConfig,
        model: &Bitnet,
    ) -> Result<Option<Bitnet>, TrainError> {
        match &self.base {
            Some(base) if preferences::beta(config.finetune.as_ref()).is_some() => {
                base.reference(model)
            }
            _ => Ok(None),
        }
    }

    /// The model and optimizer that the run begins with.
    pub(super) fn fresh(&self, config: &RunConfig) -> Result<(Bitnet, Optimizer), TrainError> {
        let mut model = match &self.base {
            Some(base) => base.model(config)?,
            None => {
                let (std, seed) = (config.model.init_std, config.seed);
                let params = Params::init(&self.expected, std, seed, &Device::Cpu)?;
                Bitnet::new(self.expected.clone(), params)?
            }
        };
        if let Some(scheme) = scheme(config)? {
            model = model.with_scheme(scheme)?;
        }
        let optimizer = Optimizer::new(config.optimizer.clone(), config.seed, model.trained());
        optimizer.prepare(model.trained_mut())?;
        Ok((model, optimizer))
    }

    /// What a checkpoint of the run holds.
    pub(super) fn load(
        &self,
        config: &RunConfig,
        path: &Path,
    ) -> Result<(Bitnet, Optimizer, TrainerState), TrainError> {
        let lora = config.finetune.as_ref().is_some_and(|f| f.method == Method::Lora);
        let mut model = match &self.base {
            Some(base) if lora => {
                let lora = Lora::read(path, &self.expected)?;
                base.adapted(config, Adapters::from_lora(&lora, &self.expected)?)?
            }
            _ => self.masters(config, path)?,
        };
        let mut optimizer = Optimizer::new(config.optimizer.clone(), config.seed, model.trained());
        optimizer.prepare(model.trained_mut())?;
        let state = checkpoint::restore(path, &mut optimizer)?;
        model.set_step(state.step);
        Ok((model, optimizer, state))
    }

    fn masters(&self, config: &RunConfig, path: &Path) -> Result<Bitnet, TrainError> {
        let file = stored::open_masters(path)?;
        if *file.config() != self.expected {
            let message = differences(&self.expected, file.config());
            return Err(TrainError::Checkpoint { path: path.to_owned(), message });
        }
        let mut params = Params::load_as(&file, &Device::Cpu, config.optimizer.masters)?;
        let scheme = scheme(config)?;
        if let Some(scheme) = &scheme {
            stored::load_scales(path, scheme, &self.expected, &mut params)?;
        }
        let model = Bitnet::new(self.expected.clone(), params)?;
        match scheme {
            Some(scheme) => model.with_scheme(scheme),
            None => Ok(model),
        }
    }
}

fn no_section(expected: &str, found: &str) -> TrainError {
    let (expected, found) = (expected.to_owned(), found.to_owned());
    TrainError::ConfigValue { key: "finetune".to_owned(), expected, found }
}

/// How the projections of a run are quantized, where it is not the default.
fn scheme(config: &RunConfig) -> Result<Option<Scheme>, TrainError> {
    match config.quantizer == QuantizerConfig::default() {
        true => Ok(None),
        false => Scheme::new(config.quantizer.clone()).map(Some),
    }
}

/// Where the model of a checkpoint differs from the run's, as keys of `config.json`.
fn differences(expected: &ModelConfig, found: &ModelConfig) -> String {
    let (expected, found) = (expected.to_hf_json("float32"), found.to_hf_json("float32"));
    let keys = [&expected, &found].into_iter().filter_map(|json| json.as_object());
    let keys: BTreeSet<&String> = keys.flat_map(|map| map.keys()).collect();
    let show = |value: Option<&serde_json::Value>| value.map_or("none".into(), |v| v.to_string());
    let differing = keys.into_iter().filter(|key| expected.get(key) != found.get(key)).map(|key| {
        format!("`{key}`: expected {}, found {}", show(expected.get(key)), show(found.get(key)))
    });
    format!("not this run's model: {}", differing.collect::<Vec<_>>().join("; "))
}
