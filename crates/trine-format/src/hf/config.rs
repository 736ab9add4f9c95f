//! `config.json`, as transformers writes it for `bitnet` and `llama` models.
//!
//! Real files hold many keys that do not matter to the computation, so unknown ones are ignored;
//! a known key that asks for a computation which is not implemented is refused by name.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{FormatError, HiddenAct, ModelConfig, Quantization};

/// What a directory's `config.json` says.
pub(crate) struct HfConfig {
    pub(crate) config: ModelConfig,
    /// Whether a stored `weight_scale` divides (`linear_class: bitlinear`) instead of multiplying.
    pub(crate) scale_divides: bool,
    /// Whether sub-norms have the names of the first BitNet models.
    pub(crate) first_names: bool,
}

impl ModelConfig {
    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// `model_type: bitnet` has sub-norms, `llama` has none. The architecture `BitnetForCausalLM`, of
    /// the first reproductions of BitNet b1.58 (1bitLLM), is LLaMA with sub-norms and masters. The
    /// rotary base is read from its own key or, as newer files have it, from `rope_parameters`.
    ///
    /// # Errors
    /// [`FormatError::Key`] for a key that is missing, of the wrong type, or asks for something
    /// that is not implemented, or for a size that fits no model.
    pub fn from_hf_json(text: &str, path: &Path) -> Result<Self, FormatError> {
        Ok(parse(text, path)?.config)
    }

    /// The `config.json` of this model with its plain tensors stored as `dtype` (`bfloat16`, …).
    pub fn to_hf_json(&self, dtype: &str) -> Value {
        let (architecture, model_type) = match self.sub_norms {
            true => ("BitNetForCausalLM", "bitnet"),
            false => ("LlamaForCausalLM", "llama"),
        };
        let mut json = json!({
            "architectures": [architecture],
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_json(),
            "hidden_act": self.hidden_act.name(),
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": model_type,
            "rms_norm_eps": decimal(self.rms_norm_eps),
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rope_theta": decimal(self.rope_theta),
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        if self.attention_width() != self.hidden_size {
            json["head_dim"] = self.head_dim.into();
        }
        let mode = match self.quantization {
            Quantization::None => return json,
            Quantization::Online => "online",
            Quantization::Offline => "offline",
        };
        json["quantization_config"] = json!({
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": mode,
        });
        if let Some(eps) = self.projection_norm_eps {
            json["quantization_config"]["use_rms_norm"] = true.into();
            json["quantization_config"]["rms_norm_eps"] = decimal(eps).into();
        }
        json
    }

    /// One id as a number, several as a list, as transformers expects.
    pub(crate) fn eos_json(&self) -> Value {
        match self.eos_token_ids[..] {
            [] => Value::Null,
            [id] => id.into(),
            _ => json!(self.eos_token_ids),
        }
    }
}

/// The f64 of the shortest decimal that names this f32, so that 1e-5 is written as 1e-5.
fn decimal(v: f32) -> f64 {
    v.to_string().parse().unwrap_or(f64::from(v))
}

/// Architecture of the first reproductions of BitNet b1.58, spelled with a small n.
const FIRST_ARCHITECTURE: &str = "BitnetForCausalLM";

/// How a file says that projections are stored.
struct Storage {
    quantization: Quantization,
    scale_divides: bool,
    projection_norm_eps: Option<f32>,
}

pub(crate) fn parse(text: &str, path: &Path) -> Result<HfConfig, FormatError> {
    let json: Value = serde_json::from_str(text)
        .map_err(|e| FormatError::malformed(path, "content", "JSON", e))?;
    let Value::Object(map) = json else {
        return Err(FormatError::malformed(path, "content", "a JSON object", "another value"));
    };
    let keys = Keys { path, prefix: "", map: &map };

    let model_type = keys.text("model_type")?.unwrap_or("");
    let architecture = keys.architecture()?;
    // The code of the first reproductions calls itself LLaMA in some files and bitnet in others.
    let first = architecture == Some(FIRST_ARCHITECTURE);
    let (sub_norms, expected) = match model_type {
        "llama" | "bitnet" if first => (true, FIRST_ARCHITECTURE),
        "bitnet" => (true, "BitNetForCausalLM"),
        "llama" => (false, "LlamaForCausalLM"),
        other => return Err(keys.refuse("model_type", "`bitnet` or `llama`", other)),
    };
    if let Some(found) = architecture.filter(|found| *found != expected) {
        return Err(keys.refuse("architectures", format_args!("[\"{expected}\"]"), found));
    }
    for key in ["attention_bias", "mlp_bias", "use_sliding_window"] {
        if keys.flag(key)? == Some(true) {
            return Err(keys.refuse(key, "false", true));
        }
    }
    keys.refuse_unless_null("sliding_window")?;
    let bitnet = sub_norms && !first;
    let rope_theta = keys.rope_theta()?.unwrap_or(if bitnet { 500_000.0 } else { 10_000.0 });
    let Storage { quantization, scale_divides, projection_norm_eps } =
        if first { keys.first_storage()? } else { keys.storage()? };

    let default_act = if bitnet { "relu2" } else { "silu" };
    let act = keys.text("hidden_act")?.unwrap_or(default_act);
    let hidden_act = HiddenAct::from_name(act)
        .ok_or_else(|| keys.refuse("hidden_act", "`relu2` or `silu`", act))?;

    let hidden_size = keys.size("hidden_size")?;
    let heads = keys.size("num_attention_heads")?;
    let head_dim = match keys.opt_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => return Err(keys.refuse("num_attention_heads", "a divisor of hidden_size", heads)),
    };
    let kv_heads = match keys.opt_size("num_key_value_heads")? {
        Some(kv_heads) => kv_heads,
        None if bitnet => keys.size("num_key_value_heads")?,
        None => heads,
    };
    let config = ModelConfig {
        hidden_size,
        intermediate_size: keys.size("intermediate_size")?,
        num_hidden_layers: keys.size("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        vocab_size: keys.size("vocab_size")?,
        max_position_embeddings: keys.size("max_position_embeddings")?,
        rope_theta,
        rms_norm_eps: keys.float("rms_norm_eps")?.unwrap_or(if bitnet { 1e-5 } else { 1e-6 }),
        hidden_act,
        sub_norms,
        projection_norm_eps,
        tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        bos_token_id: keys.ids("bos_token_id")?.first().copied(),
        eos_token_ids: keys.ids("eos_token_id")?,
        quantization,
    };
    config.validate().map_err(|e| e.in_file(path))?;
    Ok(HfConfig { config, scale_divides, first_names: first })
}

/// Token ids that `generation_config.json` ends a text with; chat models name their turn end here.
pub(crate) fn generation_eos(text: &str, path: &Path) -> Result<Vec<u32>, FormatError> {
    let map: Map<String, Value> = serde_json::from_str(text)
        .map_err(|e| FormatError::malformed(path, "content", "a JSON object", e))?;
    Keys { path, prefix: "", map: &map }.ids("eos_token_id")
}

/// An object of the file, with the path to it for messages. A null is the same as no key.
struct Keys<'a> {
    path: &'a Path,
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn refuse(
        &self,
        key: &str,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> FormatError {
        let key = format_args!("{}{key}", self.prefix).to_string();
        FormatError::key(self.path, key, expected, found)
    }

    fn opt<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, FormatError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.refuse(key, expected, brief(value)))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, FormatError> {
        self.opt(key, "a string", Value::as_str)
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, FormatError> {
        self.opt(key, "true or false", Value::as_bool)
    }

    fn float(&self, key: &str) -> Result<Option<f32>, FormatError> {
        self.opt(key, "a number", |v| v.as_f64().map(|v| v as f32))
    }

    fn opt_size(&self, key: &str) -> Result<Option<usize>, FormatError> {
        self.opt(key, "a size", |v| v.as_u64().and_then(|v| v.try_into().ok()))
    }

    fn size(&self, key: &str) -> Result<usize, FormatError> {
        self.opt_size(key)?.ok_or_else(|| self.refuse(key, "a size", "nothing"))
    }

    /// A number, a list of numbers, or nothing.
    fn ids(&self, key: &str) -> Result<Vec<u32>, FormatError> {
        let id = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
        let ids = self.opt(key, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    fn object(&self, key: &str, prefix: &'static str) -> Result<Option<Keys<'a>>, FormatError> {
        let map = self.opt(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Keys { path: self.path, prefix, map }))
    }

    fn refuse_unless_null(&self, key: &str) -> Result<(), FormatError> {
        match self.get(key) {
            None => Ok(()),
            Some(value) => Err(self.refuse(key, "null", brief(value))),
        }
    }

    /// The one architecture of the list, when there is a list: models share types and names of
    /// tensors, but not the computation.
    fn architecture(&self) -> Result<Option<&'a str>, FormatError> {
        self.opt("architectures", "a list of one name", |v| match v.as_array()?.as_slice() {
            [one] => one.as_str(),
            _ => None,
        })
    }

    /// The rotary base, when it is given; scaled or partial rotary embeddings are refused.
    fn rope_theta(&self) -> Result<Option<f32>, FormatError> {
        let mut theta = self.float("rope_theta")?;
        for (key, prefix) in
            [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
        {
            let Some(rope) = self.object(key, prefix)? else { continue };
            for key in ["rope_type", "type"] {
                match rope.text(key)? {
                    None | Some("default") => {}
                    Some(other) => return Err(rope.refuse(key, "`default`", other)),
                }
            }
            if let Some(inner) = rope.float("rope_theta")? {
                if theta.is_some_and(|outer| outer != inner) {
                    return Err(rope.refuse("rope_theta", "the outer rope_theta", inner));
                }
                theta = Some(inner);
            }
            rope.check_partial_rotary()?;
        }
        self.check_partial_rotary()?;
        Ok(theta)
    }

    fn check_partial_rotary(&self) -> Result<(), FormatError> {
        match self.float("partial_rotary_factor")? {
            None | Some(1.0) => Ok(()),
            Some(factor) => Err(self.refuse("partial_rotary_factor", "1", factor)),
        }
    }

    /// How the first BitNet models are stored: as masters, whose widths have keys of their own.
    fn first_storage(&self) -> Result<Storage, FormatError> {
        self.refuse_unless_null("quantization_config")?;
        for (key, expected) in [("weight_bits", 1), ("input_bits", 8)] {
            let found = self.opt_size(key)?;
            if found != Some(expected) {
                let found = found.map_or("nothing".to_owned(), |n| n.to_string());
                return Err(self.refuse(key, expected, found));
            }
        }
        let quantization = Quantization::Online;
        Ok(Storage { quantization, scale_divides: false, projection_norm_eps: None })
    }

    /// How projections are stored, whether their scale divides, and whether they have norms.
    ///
    /// Defaults are those of transformers' `BitNetQuantConfig`: linear class `bitlinear`, whose
    /// weights are always packed, and mode `offline`.
    fn storage(&self) -> Result<Storage, FormatError> {
        let Some(q) = self.object("quantization_config", "quantization_config.")? else {
            let quantization = Quantization::None;
            return Ok(Storage { quantization, scale_divides: false, projection_norm_eps: None });
        };
        match q.text("quant_method")? {
            Some("bitnet") => {}
            other => return Err(q.refuse("quant_method", "`bitnet`", other.unwrap_or("nothing"))),
        }
        let projection_norm_eps = match q.flag("use_rms_norm")? {
            Some(true) => Some(q.float("rms_norm_eps")?.unwrap_or(1e-6)),
            _ => None,
        };
        if let Some(kept) = q.get("modules_to_not_convert")
            && *kept != json!([])
            && *kept != json!(["lm_head"])
        {
            return Err(q.refuse("modules_to_not_convert", "null or [\"lm_head\"]", brief(kept)));
        }
        let class = q.text("linear_class")?.unwrap_or("bitlinear");
        let mode = "quantization_mode";
        let (quantization, scale_divides) = match (class, q.text(mode)?.unwrap_or("offline")) {
            ("autobitlinear", "online") => (Quantization::Online, false),
            ("autobitlinear", "offline") => (Quantization::Offline, false),
            ("bitlinear", "offline") => (Quantization::Offline, true),
            ("autobitlinear", other) => {
                return Err(q.refuse(mode, "`online` or `offline`", other));
            }
            ("bitlinear", other) => {
                return Err(q.refuse(mode, "`offline`, as linear_class is bitlinear", other));
            }
            (other, _) => {
                let expected = "`autobitlinear` or `bitlinear`";
                return Err(q.refuse("linear_class", expected, other));
            }
        };
        Ok(Storage { quantization, scale_divides, projection_norm_eps })
    }
}

/// A value for a message, cut where a hostile file would fill the screen.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config_2b4t;

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut json = config_2b4t().to_hf_json("bfloat16");
        change(&mut json);
        let error = ModelConfig::from_hf_json(&json.to_string(), Path::new("config.json"));
        error.unwrap_err().to_string()
    }

    #[test]
    fn configuration_survives_the_way_there_and_back() {
        let mut config = config_2b4t();
        for (quantization, eps) in [
            (Quantization::None, None),
            (Quantization::Online, Some(1e-6)),
            (Quantization::Offline, None),
        ] {
            config.quantization = quantization;
            config.projection_norm_eps = eps;
            let text = config.to_hf_json("bfloat16").to_string();
            assert_eq!(ModelConfig::from_hf_json(&text, Path::new("c")).unwrap(), config);
        }
        config.sub_norms = false;
        config.hidden_act = HiddenAct::Silu;
        config.head_dim = 64;
        config.bos_token_id = None;
        config.eos_token_ids = vec![1, 2];
        config.rms_norm_eps = 1.1754944e-38;
        let text = config.to_hf_json("float32").to_string();
        assert_eq!(ModelConfig::from_hf_json(&text, Path::new("c")).unwrap(), config);
    }

    #[test]
    fn the_first_bitnet_models_are_llama_with_sub_norms_and_masters() {
        let mut json = json!({
            "architectures": ["BitnetForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "weight_bits": 1, "input_bits": 8,
        });
        let path = Path::new("config.json");
        let read = parse(&json.to_string(), path).unwrap();
        assert!(read.first_names && read.config.sub_norms);
        assert_eq!(read.config.hidden_act, HiddenAct::Silu);
        assert_eq!(read.config.quantization, Quantization::Online);
        json["weight_bits"] = 2.into();
        let error = parse(&json.to_string(), path).err().unwrap().to_string();
        assert!(error.contains("`weight_bits`: expected 1, found 2"), "{error}");
    }

    #[test]
    fn keys_that_change_the_computation_are_refused_by_name() {
        type Change = (&'static str, Value);
        let cases: [Change; 13] = [
            ("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0})),
            ("rope_parameters", json!({"rope_type": "yarn"})),
            ("rope_parameters", json!({"rope_theta": 1.0})),
            ("partial_rotary_factor", json!(0.5)),
            ("attention_bias", json!(true)),
            ("mlp_bias", json!(true)),
            ("sliding_window", json!(4096)),
            ("hidden_act", json!("gelu")),
            ("model_type", json!("qwen2")),
            ("architectures", json!(["LlamaForCausalLM"])),
            ("architectures", json!(["BitNetForCausalLM", "LlamaForCausalLM"])),
            ("quantization_config", json!({"quant_method": "gptq"})),
            ("quantization_config", json!({"quant_method": "bitnet", "use_rms_norm": 1})),
        ];
        for (key, value) in cases {
            let error = refused(|json| json[key] = value);
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn wrong_types_and_missing_keys_are_refused_by_name() {
        for (key, value) in [
            ("hidden_size", json!("64")),
            ("hidden_size", json!(-64)),
            ("hidden_size", json!(1e300)),
            ("vocab_size", Value::Null),
            ("num_attention_heads", json!(0)),
            ("eos_token_id", json!([1, "2"])),
            ("eos_token_id", json!(1u64 << 40)),
            ("tie_word_embeddings", json!(1)),
        ] {
            let error = refused(|json| json[key] = value);
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn deeply_nested_json_is_refused() {
        let text = format!("{{\"a\":{}", "[".repeat(1_000_000));
        assert!(ModelConfig::from_hf_json(&text, Path::new("c")).is_err());
    }

    #[test]
    fn newer_files_hold_the_rotary_base_in_rope_parameters() {
        let mut json = config_2b4t().to_hf_json("bfloat16");
        json["rope_theta"] = Value::Null;
        json["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 123.0});
        let config = ModelConfig::from_hf_json(&json.to_string(), Path::new("c")).unwrap();
        assert_eq!(config.rope_theta, 123.0);
    }
}
