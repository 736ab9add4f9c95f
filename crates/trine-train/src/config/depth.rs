//! `model.depth`: one number from which the others follow.
//!
//! As in nanochat, a model of depth N has N layers, a width of 64 N and heads of 64. The rest
//! follows what ternary models were trained with:
//!
//! | key | value | from |
//! | --- | --- | --- |
//! | `model.num_key_value_heads` | half the heads, all of them where N is odd | grouped queries |
//! | `model.intermediate_size` | 2.7 times the width, to the nearest 64 | BitNet 2B4T (2560, 6912) |
//! | `optimizer.learning_rate` | 1.5e-3 sqrt(1536 / width), at most 3e-3 | below |
//! | `schedule.second_learning_rate` | two thirds of it | below |
//! | `train.batch_size` | 1024 N tokens, at least one sequence | ours |
//!
//! The published pairs of rates ("The Era of 1-bit LLMs: Training Tips, Code and FAQ"; BitNet v2)
//! are 1.5e-3 and 1e-3 at 700M (width 1536), 1.2e-3 and 8e-4 at 1.3B and 3B, 1e-3 and 6e-4 at 7B
//! (width 4096): about the root of the width. Below a width of 384 that law is not tested, so the
//! rate grows no further. Published batches are those of clusters; ours is a choice for a few cores
//! and makes depth 4 what the character models of `configs/train` have.
//!
//! A key that the file or the command line names has the value it names.

use toml::{Table, Value};

use super::{DataConfig, set};
use crate::TrainError;

/// Largest depth: a width of 65,536.
pub(super) const MAX_DEPTH: usize = 1024;

/// Writes what follows from `model.depth` into a table, wherever it names nothing itself.
///
/// Types are not judged here: whatever is wrong is found when the table is read.
pub(super) fn resolve(table: &mut Table) -> Result<(), TrainError> {
    let section = |table: &Table, key: &str| table.get(key).and_then(Value::as_table).cloned();
    let number = |section: &Option<Table>, key: &str| section.as_ref()?.get(key)?.as_integer();
    let (model, data) = (section(table, "model"), section(table, "data"));
    let positive = |n: i64| usize::try_from(n).ok().filter(|n| *n > 0);
    let Some(depth) = number(&model, "depth").and_then(positive).filter(|n| *n <= MAX_DEPTH) else {
        return Ok(());
    };
    let positive_of = |key: &str| number(&model, key).and_then(positive);
    let width = positive_of("hidden_size").unwrap_or(64 * depth);
    let heads = positive_of("num_attention_heads").unwrap_or((width / 64).max(1));
    let key_value_heads = if heads % 2 == 0 { heads / 2 } else { heads };
    let intermediate = ((width * 27 + 320) / 640 * 64).max(64);
    let seq_len = number(&data, "seq_len").and_then(positive);
    let seq_len = seq_len.unwrap_or_else(|| DataConfig::default().seq_len);
    let optimizer = section(table, "optimizer");
    let rate = optimizer.as_ref().and_then(|section| section.get("learning_rate"));
    let rate = rate.and_then(|rate| rate.as_float().or(rate.as_integer().map(|n| n as f64)));
    // Three digits, so that the resolved configuration reads like one that a person wrote.
    let three = |x: f64| format!("{x:.2e}").parse::<f64>().unwrap_or(x);
    let rate = rate.unwrap_or_else(|| three((1.5e-3 * (1536.0 / width as f64).sqrt()).min(3e-3)));
    for (key, value) in [
        ("model.num_hidden_layers", whole(depth)),
        ("model.hidden_size", whole(width)),
        ("model.num_attention_heads", whole(heads)),
        ("model.num_key_value_heads", whole(key_value_heads)),
        ("model.intermediate_size", whole(intermediate)),
        ("optimizer.learning_rate", Value::Float(rate)),
        ("schedule.second_learning_rate", Value::Float(three(rate * 2.0 / 3.0))),
        ("train.batch_size", whole((1024 * depth / seq_len).max(1))),
    ] {
        let named = key.split_once('.').and_then(|(section, key)| table.get(section)?.get(key));
        if named.is_none() {
            set(table, key, value)?;
        }
    }
    Ok(())
}

fn whole(n: usize) -> Value {
    Value::Integer(n as i64)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::RunConfig;

    fn parse(text: &str, overrides: &[&str]) -> RunConfig {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        RunConfig::parse(text, Path::new("run.toml"), &overrides).unwrap()
    }

    #[test]
    fn depth_sets_everything_that_is_not_named() {
        let config = parse("[model]\ndepth = 6", &[]);
        let m = &config.model;
        assert_eq!((m.num_hidden_layers, m.hidden_size, m.intermediate_size), (6, 384, 1024));
        assert_eq!((m.num_attention_heads, m.num_key_value_heads), (6, 3));
        assert_eq!(config.train.batch_size, 24);
        assert_eq!(config.optimizer.learning_rate, 3e-3);
        assert_eq!(config.schedule.second_learning_rate, 2e-3);
        // The width and rates of the published 700M model, and 2B4T's feed-forward layer.
        let config = parse("", &["model.depth=24"]);
        assert_eq!(config.optimizer.learning_rate, 1.5e-3);
        assert_eq!(config.schedule.second_learning_rate, 1e-3);
        assert_eq!(parse("", &["model.depth=40"]).model.intermediate_size, 6912);
    }

    #[test]
    fn a_named_key_wins_over_depth_and_the_rest_follows_it() {
        let text = "[model]\ndepth = 6\nhidden_size = 256\n[train]\nbatch_size = 3";
        let config = parse(text, &["optimizer.learning_rate=9e-4", "model.num_key_value_heads=4"]);
        let m = &config.model;
        assert_eq!((m.num_hidden_layers, m.hidden_size, m.intermediate_size), (6, 256, 704));
        assert_eq!((m.num_attention_heads, m.num_key_value_heads), (4, 4));
        assert_eq!(config.train.batch_size, 3);
        assert_eq!(config.optimizer.learning_rate, 9e-4);
        assert_eq!(config.schedule.second_learning_rate, 6e-4);
    }

    #[test]
    fn a_resolved_configuration_of_a_depth_is_resolved_to_itself() {
        let config = parse("[model]\ndepth = 5", &["data.seq_len=100000"]);
        assert_eq!(config.train.batch_size, 1);
        assert_eq!(parse(&config.to_toml(), &[]), config);
    }
}
