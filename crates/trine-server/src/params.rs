//! Parameters that chat and completions share, in OpenAI's and vLLM's names, checked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;
use serde_json::Value;
use trine_runtime::{Adapter, Request, SamplerConfig, Sampling};
use trine_tokenizer::ChatTemplate;

use crate::error::ApiError;
use crate::response_format::ResponseFormat;
use crate::{App, body};

/// Most stop strings, and their length in bytes.
const STOPS: usize = 16;
const STOP_BYTES: usize = 512;

/// Most of the likeliest tokens whose log-probabilities can be asked for.
pub(crate) const TOP_LOGPROBS: usize = 20;

/// Parameters of a request, as they were sent. What is not named here is ignored, as servers do.
#[derive(Clone, Debug, Default, Deserialize)]
pub(crate) struct Params {
    /// Who asks.
    #[serde(skip)]
    client: Option<u64>,
    pub(crate) model: Option<String>,
    n: Option<usize>,
    #[serde(default)]
    pub(crate) stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    pub(crate) response_format: Option<ResponseFormat>,
    /// Go on after the ids that end an answer.
    ignore_eos: Option<bool>,
    // What would change the answer and is not there is refused and not ignored.
    functions: Option<Vec<Value>>,
    best_of: Option<usize>,
    suffix: Option<String>,
    use_beam_search: Option<bool>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// A string or several.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Params {
    /// Reads them from a body that `client` sent.
    pub(crate) fn read(body: &[u8], client: Option<u64>) -> Result<Self, ApiError> {
        Ok(Self { client, ..body::parse(body)? })
    }

    /// Number of choices.
    pub(crate) fn n(&self) -> usize {
        self.n.unwrap_or(1)
    }

    pub(crate) fn streams(&self) -> bool {
        self.stream == Some(true)
    }

    pub(crate) fn wants_usage(&self) -> bool {
        self.stream_options.unwrap_or_default().include_usage == Some(true)
    }

    /// What is to answer. Refuses what another model or server would have to do.
    pub(crate) fn check(&self, app: &App) -> Result<Served, ApiError> {
        let served = Served::find(app, self.model.as_deref())?;
        let some = |list: &Option<Vec<Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
        for (name, is_asked_for) in [
            ("functions", some(&self.functions)),
            ("best_of", self.best_of.is_some_and(|best| best != self.n())),
            ("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
            ("use_beam_search", self.use_beam_search == Some(true)),
        ] {
            if is_asked_for {
                return Err(ApiError::param(name, "this server cannot do it"));
            }
        }
        let (n, limit) = (self.n(), app.config.max_choices);
        if !(1..=limit).contains(&n) {
            return Err(ApiError::param("n", format!("expected 1 to {limit}, found {n}")));
        }
        Ok(served)
    }

    /// The stop strings.
    pub(crate) fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop.clone()],
            Some(OneOrMany::Many(stops)) => stops.clone(),
        };
        if stops.len() > STOPS {
            let message = format!("expected at most {STOPS} strings, found {}", stops.len());
            return Err(ApiError::param("stop", message));
        }
        let wrong = |stop: &&String| stop.is_empty() || stop.len() > STOP_BYTES;
        if let Some(stop) = stops.iter().find(wrong) {
            let message = format!("expected 1 to {STOP_BYTES} bytes, found {}", stop.len());
            return Err(ApiError::param("stop", message));
        }
        Ok(stops)
    }

    /// The request of a choice, one of [`Self::n`].
    pub(crate) fn request(
        &self,
        app: &App,
        prompt: Vec<u32>,
        max_tokens: usize,
        seed: u64,
    ) -> Result<Request, ApiError> {
        let sampler = SamplerConfig {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: match self.top_k.unwrap_or(0) {
                -1 => 0,
                top_k => usize::try_from(top_k).map_err(|_| {
                    ApiError::param("top_k", format!("expected -1 or more, found {top_k}"))
                })?,
            },
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            seed,
        };
        let penalty = |name, value: Option<f32>| match value.unwrap_or(0.0) {
            value if (-2.0..=2.0).contains(&value) => Ok(value),
            value => Err(ApiError::param(name, format!("expected -2 to 2, found {value}"))),
        };
        let sampling = Sampling {
            sampler,
            presence_penalty: penalty("presence_penalty", self.presence_penalty)?,
            frequency_penalty: penalty("frequency_penalty", self.frequency_penalty)?,
            logit_bias: self.biases(app)?,
        };
        let stop = match self.ignore_eos {
            Some(true) => Vec::new(),
            _ => app.stop.clone(),
        };
        let max_tokens = max_tokens.min(app.config.max_tokens);
        let deadline = Instant::now().checked_add(app.config.request_timeout);
        let client = self.client;
        Ok(Request { prompt, max_tokens, stop, sampling, deadline, client, ..Request::default() })
    }

    /// The seed of the first choice; those of the others follow it.
    pub(crate) fn seed(&self, app: &App) -> u64 {
        self.seed.map_or_else(|| app.unique(), |seed| seed as u64)
    }

    fn biases(&self, app: &App) -> Result<Vec<(u32, f32)>, ApiError> {
        let vocab = app.engine.model().config().vocab_size;
        let bias = |(id, &bias): (&String, &f32)| {
            let param = || format!("logit_bias[{id:?}]");
            if !(-100.0..=100.0).contains(&bias) {
                return Err(ApiError::param(
                    param(),
                    format!("expected -100 to 100, found {bias}"),
                ));
            }
            match id.parse::<u32>() {
                Ok(id) if (id as usize) < vocab => Ok((id, bias)),
                _ => Err(ApiError::param(param(), format!("expected a token id below {vocab}"))),
            }
        };
        self.logit_bias.iter().flatten().map(bias).collect()
    }
}

/// The model, or one of its adapters.
#[derive(Clone, Debug)]
pub(crate) struct Served {
    /// What it is called.
    pub(crate) name: String,
    /// Beside the model.
    pub(crate) adapter: Option<Arc<Adapter>>,
    /// Of conversations with it.
    pub(crate) template: Option<Arc<ChatTemplate>>,
}

impl Served {
    /// What a request names; the model itself when it names nothing.
    pub(crate) fn find(app: &App, name: Option<&str>) -> Result<Self, ApiError> {
        let base = &app.config.model;
        let name = name.unwrap_or(base);
        if name == base {
            let template = app.template.clone();
            return Ok(Self { name: base.clone(), adapter: None, template });
        }
        if let Some(served) = app.adapters.iter().find(|served| served.name == name) {
            let adapter = Some(served.adapter.clone());
            let template = served.template.clone().or_else(|| app.template.clone());
            return Ok(Self { name: served.name.clone(), adapter, template });
        }
        let adapters = app.adapters.iter().map(|served| format!(" or {:?}", served.name));
        let others: String = adapters.collect();
        let message = format!("model {name:?} is not served here: expected {base:?}{others}");
        let error = ApiError::new(axum::http::StatusCode::NOT_FOUND, message);
        Err(error.with_code("model_not_found"))
    }
}
