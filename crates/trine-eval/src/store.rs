//! What is known of each item, kept in a file as it comes.
//!
//! A file of results is named after its task and a hash of all that scores depend on, which its first
//! line says: model, tokenizer, data, task, settings. So an interrupted evaluation goes on where it
//! ended, a larger limit adds items, and no result is ever taken for another's.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::EvalError;

/// What is known of an item.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its number in the file, from 0.
    pub item: usize,
    /// The group it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Why it was not scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// Tokens that were cut from the beginning of its context.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cut: usize,
    /// Of every option, in nats, to nine decimals.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log_likelihoods: Vec<f64>,
    /// Of every option: whether each of its tokens is the likeliest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub greedy: Vec<bool>,
    /// Numbers of the right options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gold: Vec<usize>,
    /// What the model wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// What was found in it, by the name of the extraction.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub extracted: BTreeMap<String, String>,
    /// What became of the program with the text in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution: Option<String>,
    /// Of metrics that are means over instructions: which of the item's were followed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub followed: BTreeMap<String, Vec<bool>>,
    /// Of metrics that are a loss for each unit of all items together: how many units this item has. Its
    /// score is the logarithm of its probability.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub units: BTreeMap<String, usize>,
    /// What a model that knows nothing scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chance: Option<f64>,
    /// By metric.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scores: BTreeMap<String, f64>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// A number as records hold it: with decimals so few that reading gives back what was written.
pub(crate) fn rounded(number: f64) -> f64 {
    (number * 1e9).round() / 1e9
}

/// Records of a task by item, and the file that they are added to.
#[derive(Debug)]
pub struct Store {
    records: BTreeMap<usize, Record>,
    file: Option<(PathBuf, File)>,
}

impl Store {
    /// Records that are kept in memory only.
    pub fn in_memory() -> Self {
        Self { records: BTreeMap::new(), file: None }
    }

    /// The records in `dir` of the task `name` under exactly these `conditions`.
    ///
    /// A last line that is not whole, of a process that was killed, is dropped.
    ///
    /// # Errors
    /// A file that cannot be read or written; a line in its middle that is no record.
    pub fn open(dir: &Path, name: &str, conditions: &Value) -> Result<Self, EvalError> {
        fs::create_dir_all(dir).map_err(EvalError::io(dir, "create the folder of results"))?;
        let header = conditions.to_string();
        let hash = blake3::hash(header.as_bytes()).to_hex();
        let path = dir.join(format!("{name}-{}.jsonl", &hash[..12]));
        let text = match path.exists() {
            true => fs::read_to_string(&path).map_err(EvalError::io(&path, "read"))?,
            false => String::new(),
        };
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let mut records = BTreeMap::new();
        for (index, line) in text[..whole].lines().enumerate().skip(1) {
            let record: Record = serde_json::from_str(line).map_err(|error| EvalError::Data {
                path: path.clone(),
                line: index + 1,
                cause: format!("expected the record of an item: {error}; delete it to begin anew"),
            })?;
            records.insert(record.item, record);
        }
        let mut options = OpenOptions::new();
        let mut file =
            options.append(true).create(true).open(&path).map_err(EvalError::io(&path, "write"))?;
        file.set_len(whole as u64).map_err(EvalError::io(&path, "write"))?;
        if whole == 0 {
            writeln!(file, "{header}").map_err(EvalError::io(&path, "write"))?;
        }
        Ok(Self { records, file: Some((path, file)) })
    }

    /// Where they are kept.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }

    /// Whether an item is known.
    pub fn has(&self, item: usize) -> bool {
        self.records.contains_key(&item)
    }

    /// The records of the first `items`, in their order.
    pub fn first(&self, items: usize) -> Vec<&Record> {
        self.records.range(..items).map(|(_, record)| record).collect()
    }

    /// Adds records, in the file before anything else.
    ///
    /// # Errors
    /// A disk that is full or gone.
    pub fn add(&mut self, records: Vec<Record>) -> Result<(), EvalError> {
        if let Some((path, file)) = &mut self.file {
            let lines: String = records
                .iter()
                .filter_map(|record| serde_json::to_string(record).ok())
                .map(|line| line + "\n")
                .collect();
            file.write_all(lines.as_bytes()).map_err(EvalError::io(path, "write"))?;
        }
        self.records.extend(records.into_iter().map(|record| (record.item, record)));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(item: usize) -> Record {
        let log_likelihoods =
            vec![rounded(-123.456_789_012_345), rounded(-1.0 / 3.0 - item as f64)];
        Record { item, log_likelihoods, ..Record::default() }
    }

    #[test]
    fn a_killed_process_loses_no_more_than_the_line_it_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let conditions = serde_json::json!({ "model": "a" });
        let mut store = Store::open(dir.path(), "t", &conditions).unwrap();
        store.add(vec![record(0), record(2)]).unwrap();
        let path = store.path().unwrap().to_owned();
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"item\":3,\"log_l");
        fs::write(&path, text).unwrap();
        let mut store = Store::open(dir.path(), "t", &conditions).unwrap();
        assert_eq!(store.first(9), [&record(0), &record(2)]);
        store.add(vec![record(3)]).unwrap();
        let store = Store::open(dir.path(), "t", &conditions).unwrap();
        assert_eq!(store.first(3), [&record(0), &record(2)]);
        assert!(store.has(3) && !store.has(1));
    }

    #[test]
    fn other_conditions_are_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let open = |model: &str| {
            Store::open(dir.path(), "t", &serde_json::json!({ "model": model })).unwrap()
        };
        open("a").add(vec![record(0)]).unwrap();
        assert!(open("a").has(0) && !open("b").has(0));
    }

    #[test]
    fn numbers_are_read_back_to_the_bit() {
        for i in 1..20_000 {
            let number = rounded(-f64::from(i).sqrt() * 31.7);
            let text = serde_json::to_string(&number).unwrap();
            assert_eq!(serde_json::from_str::<f64>(&text).unwrap().to_bits(), number.to_bits());
        }
    }
}
