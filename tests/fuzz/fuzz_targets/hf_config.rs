//! Any text as a `config.json`; what is accepted must say the same after writing and reading.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use trine_format::ModelConfig;
use trine_fuzz::check_message;

fuzz_target!(|text: &str| {
    let path = Path::new("model/config.json");
    let config = match ModelConfig::from_hf_json(text, path) {
        Ok(config) => config,
        Err(error) => return check_message(&error, path),
    };
    config.validate().unwrap();
    assert!(config.parameter_count() > 0);
    let written = config.to_hf_json("bfloat16").to_string();
    match ModelConfig::from_hf_json(&written, path) {
        Ok(again) => assert_eq!(again, config, "{written}"),
        Err(error) => panic!("{error}: {written}"),
    }
});
