//! Published scores, to stand beside one's own.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A table of a report.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    /// Where the figures are from.
    pub title: String,
    /// Names of the columns.
    pub models: Vec<String>,
    /// Rows, by the names of our tasks.
    pub scores: BTreeMap<String, ReferenceRow>,
}

/// A row of such a table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceRow {
    /// Examples before each question.
    pub shots: usize,
    /// In percent, one for each model.
    pub values: Vec<f64>,
}

impl Reference {
    /// The table of the report on BitNet b1.58 2B4T.
    pub fn bitnet_2b4t() -> Self {
        let text = include_str!("../reference/2b4t.toml");
        toml::from_str(text).expect("a table of ours, which a test reads")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_a_task_with_a_figure_for_each_model() {
        let reference = Reference::bitnet_2b4t();
        assert_eq!(reference.models.last().unwrap(), "BitNet 2B4T");
        for (task, row) in &reference.scores {
            assert!(crate::task::names().any(|name| name == task), "{task}");
            assert_eq!(row.values.len(), reference.models.len(), "{task}");
        }
    }
}
