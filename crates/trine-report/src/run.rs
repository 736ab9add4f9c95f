//! Reading a run directory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{Evaluation, ReportError, evaluations};

/// A run as far as it has come.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Its name: that of the configuration, or of the directory.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
    /// The resolved configuration: dotted keys, and values as TOML writes them.
    pub config: BTreeMap<String, String>,
    /// What `run.json` says: versions, sizes, machine.
    pub about: Value,
    /// One for every update that was logged, steps ascending.
    pub updates: Vec<Update>,
    /// Step and loss of every validation.
    pub validations: Vec<(u64, f64)>,
    /// One for every collection of diagnostics.
    pub collections: Vec<Collection>,
    /// The projections at the last collection, by name.
    pub layers: BTreeMap<String, Measures>,
    /// Texts written on the way.
    pub samples: Vec<Samples>,
    /// Whatever else happened: spikes, skipped updates, rewinds.
    pub events: Vec<Event>,
    /// Tasks on its checkpoints, by step.
    pub evaluations: Vec<Evaluation>,
    /// Lines of `metrics.jsonl` that say nothing; the last line, which may be half written, is not
    /// among them.
    pub damaged_lines: usize,
}

/// One update; a number that is missing or not finite is none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Update {
    /// Its number, from 1.
    pub step: u64,
    /// Mean cross entropy in nats.
    pub loss: Option<f64>,
    /// Learning rate.
    pub learning_rate: Option<f64>,
    /// Gradient norm before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens since the run began.
    pub tokens: Option<f64>,
    /// Tokens per second.
    pub tokens_per_second: Option<f64>,
}

/// Measures by name, as diagnostics give them.
pub type Measures = BTreeMap<String, f64>;

/// Diagnostics of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Collection {
    /// After this update.
    pub step: u64,
    /// Means over all projections.
    pub all: Measures,
    /// Mean of `flips_by_update` over the projections of each layer, by its number.
    pub flips_by_layer: Vec<Option<f64>>,
}

/// Texts of a step: prompt and continuation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples {
    /// After this update.
    pub step: u64,
    /// Prompt and what came after it.
    pub texts: Vec<(String, String)>,
}

/// Something that happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// At this update.
    pub step: u64,
    /// What, e.g. `spike`.
    pub kind: String,
}

impl Run {
    /// Reads a run directory.
    ///
    /// # Errors
    /// A file that is missing or cannot be read; a damaged `config.toml` or `run.json`. Damaged
    /// lines of `metrics.jsonl` are counted instead: a run that was killed leaves half a line.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let (file, text) = read(path, "config.toml")?;
        let table: toml::Table = toml::from_str(&text).map_err(|e| ReportError::Damaged {
            path: file,
            expected: "TOML",
            found: e.message().to_owned(),
        })?;
        let (file, text) = read(path, "run.json")?;
        let about = serde_json::from_str(&text).map_err(|e| ReportError::Damaged {
            path: file,
            expected: "JSON",
            found: e.to_string(),
        })?;
        let named = table.get("name").and_then(|name| name.as_str()).unwrap_or_default();
        let name = match named {
            "" => path.file_name().map_or(path.display().to_string(), |n| n.display().to_string()),
            name => name.to_owned(),
        };
        let mut run = Self { name, path: path.to_owned(), about, ..Self::default() };
        flatten(&table, "", &mut run.config);
        run.read_metrics()?;
        run.evaluations = evaluations::read(path)?;
        Ok(run)
    }

    /// Reads several runs. Where names are not unique, all are called by their paths.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_all<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<Self>, ReportError> {
        let mut runs =
            paths.iter().map(|path| Self::read(path.as_ref())).collect::<Result<Vec<_>, _>>()?;
        let names: std::collections::BTreeSet<_> = runs.iter().map(|run| &run.name).collect();
        if names.len() < runs.len() {
            runs.iter_mut().for_each(|run| run.name = run.path.display().to_string());
        }
        Ok(runs)
    }

    /// The number of updates made.
    pub fn step(&self) -> u64 {
        self.updates.last().map_or(0, |update| update.step)
    }

    /// The number of updates of the whole run, where the configuration says it.
    pub fn steps(&self) -> Option<u64> {
        self.config.get("train.steps")?.parse().ok()
    }

    fn read_metrics(&mut self) -> Result<(), ReportError> {
        let path = self.path.join("metrics.jsonl");
        let failed = |source| ReportError::Read { path: path.clone(), source };
        let file = fs::File::open(&path).map_err(missing(&self.path, "metrics.jsonl"))?;
        let mut lines = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            if lines.read_until(b'\n', &mut line).map_err(failed)? == 0 {
                return Ok(());
            }
            let whole = line.ends_with(b"\n");
            if line.trim_ascii().is_empty() {
                continue;
            }
            let value = serde_json::from_slice::<Value>(&line).ok();
            let understood = value.is_some_and(|value| self.take(&value).is_some());
            self.damaged_lines += usize::from(!understood && whole);
        }
    }

    /// Takes up a line; none where it is not one of a run.
    fn take(&mut self, line: &Value) -> Option<()> {
        let step = line.get("step")?.as_u64()?;
        let number = |key: &str| line.get(key).and_then(Value::as_f64);
        if line.get("loss").is_some() {
            self.go_back_to(step);
            self.updates.push(Update {
                step,
                loss: number("loss"),
                learning_rate: number("learning_rate"),
                grad_norm: number("grad_norm"),
                tokens: number("tokens"),
                tokens_per_second: number("tokens_per_second"),
            });
        }
        self.validations.extend(number("val_loss").map(|loss| (step, loss)));
        if let Some(found) = line.get("diagnostics") {
            self.take_diagnostics(step, found);
        }
        if let Some(written) = line.get("samples").and_then(Value::as_array) {
            let text = |sample: &Value, key: &str| {
                sample.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
            };
            let texts = written.iter().map(|s| (text(s, "prompt"), text(s, "text"))).collect();
            self.samples.push(Samples { step, texts });
        }
        if let Some(kind) = line.get("event").and_then(Value::as_str) {
            self.events.push(Event { step, kind: kind.to_owned() });
        }
        Some(())
    }

    /// A run that went back makes steps again: the later ones count.
    fn go_back_to(&mut self, step: u64) {
        if self.updates.last().is_some_and(|last| last.step >= step) {
            self.updates.retain(|update| update.step < step);
            self.validations.retain(|(at, _)| *at < step);
            self.collections.retain(|collection| collection.step < step);
            self.samples.retain(|samples| samples.step < step);
        }
    }

    fn take_diagnostics(&mut self, step: u64, found: &Value) {
        let measures = |value: &Value| -> Measures {
            let fields = value.as_object().into_iter().flatten();
            fields.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect()
        };
        let layers = found.get("layers").and_then(Value::as_object).into_iter().flatten();
        self.layers = layers.map(|(name, value)| (name.clone(), measures(value))).collect();
        let mut sums: Vec<(f64, f64)> = Vec::new();
        for (name, measures) in &self.layers {
            if let (Some((layer, _)), Some(flips)) =
                (layer_and_part(name), measures.get("flips_by_update"))
            {
                // A number that no file of this size can mean is not believed.
                let layer = layer.min(4095);
                sums.resize(sums.len().max(layer + 1), (0.0, 0.0));
                sums[layer] = (sums[layer].0 + flips, sums[layer].1 + 1.0);
            }
        }
        let mean = |(sum, n): (f64, f64)| (n > 0.0).then(|| sum / n);
        let flips_by_layer = sums.into_iter().map(mean).collect();
        let all = found.get("all").map(measures).unwrap_or_default();
        self.collections.push(Collection { step, all, flips_by_layer });
    }
}

/// Layer and part of a projection's name: `model.layers.3.self_attn.q_proj` is 3 and `q`.
pub(crate) fn layer_and_part(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let part = rest.rsplit('.').next()?;
    Some((layer.parse().ok()?, part.strip_suffix("_proj").unwrap_or(part)))
}

fn missing<'a>(
    run: &'a Path,
    file: &'static str,
) -> impl FnOnce(std::io::Error) -> ReportError + 'a {
    move |source| match source.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            ReportError::Missing { run: run.to_owned(), file }
        }
        _ => ReportError::Read { path: run.join(file), source },
    }
}

fn read(run: &Path, file: &'static str) -> Result<(PathBuf, String), ReportError> {
    let path = run.join(file);
    let text = fs::read_to_string(&path).map_err(missing(run, file))?;
    Ok((path, text))
}

/// Collects the values of a configuration under their dotted keys.
fn flatten(table: &toml::Table, prefix: &str, into: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let key = format!("{prefix}{key}");
        match value {
            toml::Value::Table(table) => flatten(table, &format!("{key}."), into),
            toml::Value::String(text) => {
                into.insert(key, text.clone());
            }
            other => {
                into.insert(key, other.to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_with(metrics: &str) -> Result<Run, ReportError> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.toml"), "name = 'a'\n[train]\nsteps = 9").unwrap();
        fs::write(dir.path().join("run.json"), "{\"parameters\": 5}").unwrap();
        fs::write(dir.path().join("metrics.jsonl"), metrics).unwrap();
        Run::read(dir.path())
    }

    #[test]
    fn a_half_written_last_line_is_no_damage_and_others_are_counted() {
        let run = run_with(
            "{\"step\":1,\"loss\":2.5}\nnonsense\n{\"loss\":1}\n\n\
             {\"step\":2,\"loss\":null}\n{\"step\":2,\"val_loss\":2.0}\n{\"step\":3,\"lo",
        )
        .unwrap();
        let losses: Vec<_> = run.updates.iter().map(|u| (u.step, u.loss)).collect();
        assert_eq!(losses, [(1, Some(2.5)), (2, None)]);
        assert_eq!(run.validations, [(2, 2.0)]);
        assert_eq!((run.damaged_lines, run.step(), run.steps()), (2, 2, Some(9)));
    }

    #[test]
    fn steps_that_were_made_again_count_once() {
        let run = run_with(
            "{\"step\":1,\"loss\":3}\n{\"step\":2,\"loss\":9}\n{\"step\":2,\"val_loss\":9}\n\
             {\"step\":2,\"event\":\"rewind\",\"to\":1}\n{\"step\":2,\"loss\":2}\n",
        )
        .unwrap();
        assert_eq!(run.updates.iter().map(|u| u.loss.unwrap()).collect::<Vec<_>>(), [3.0, 2.0]);
        assert!(run.validations.is_empty());
        assert_eq!(run.events, [Event { step: 2, kind: "rewind".to_owned() }]);
    }

    #[test]
    fn diagnostics_are_taken_by_layer() {
        let run = run_with(
            r#"{"step":5,"diagnostics":{"since":0,"all":{"zero":0.4,"new":1},"layers":{
            "model.layers.1.mlp.up_proj":{"flips_by_update":0.25,"zero":0.5},
            "model.layers.1.self_attn.q_proj":{"flips_by_update":0.75}}}}"#
                .replace('\n', "")
                .as_str(),
        )
        .unwrap();
        assert_eq!(run.collections[0].flips_by_layer, [None, Some(0.5)]);
        assert_eq!(run.collections[0].all["zero"], 0.4);
        assert_eq!(run.layers["model.layers.1.mlp.up_proj"]["zero"], 0.5);
        assert_eq!(layer_and_part("model.layers.1.mlp.up_proj"), Some((1, "up")));
    }

    #[test]
    fn missing_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [("config.toml", ""), ("run.json", "{}"), ("metrics.jsonl", "")] {
            let error = Run::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains(file), "{error}");
            fs::write(dir.path().join(file), text).unwrap();
        }
        assert!(Run::read(dir.path()).unwrap().updates.is_empty());
        fs::write(dir.path().join("config.toml"), "a = ").unwrap();
        let error = Run::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.toml") && error.lines().count() == 1, "{error}");
    }

    #[test]
    fn runs_of_one_name_are_called_by_their_paths() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["x", "y"].map(|name| dir.path().join(name));
        for path in &paths {
            fs::create_dir(path).unwrap();
            fs::write(path.join("config.toml"), "name = 'same'").unwrap();
            fs::write(path.join("run.json"), "{}").unwrap();
            fs::write(path.join("metrics.jsonl"), "").unwrap();
        }
        assert_eq!(Run::read_all(&paths[..1]).unwrap()[0].name, "same");
        let names: Vec<_> = Run::read_all(&paths).unwrap().into_iter().map(|r| r.name).collect();
        assert_eq!(names, paths.map(|path| path.display().to_string()));
    }
}
