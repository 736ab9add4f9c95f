//! Items of a task from local files: JSON lines, compressed or not, CSV, or parquet, whole or in shards.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use crate::task::Doc;
use crate::{EvalError, Task};

/// The items of a task, and the examples it may show before them.
#[derive(Debug)]
pub struct Data {
    /// Where the items came from.
    pub path: PathBuf,
    /// The items, in the order of the file.
    pub items: Vec<Doc>,
    /// Examples, in the order they are taken.
    pub shots: Vec<Doc>,
    /// BLAKE3 of all files, in hexadecimal.
    pub hash: String,
}

impl Data {
    /// The data of `task` for `count` examples: from the file `place`, or from a file with one of the
    /// task's names in the folder `place` or a folder of it.
    ///
    /// # Errors
    /// No such file (with how to get it), two of them, a line that is no record.
    pub fn open(task: &Task, place: &Path, count: usize) -> Result<Self, EvalError> {
        let path = match place.is_file() {
            true => place.to_owned(),
            false => find(task, place, task.files(), task.source())?,
        };
        let mut hasher = blake3::Hasher::new();
        let items = read(&path, &mut hasher)?;
        let mut shots = task.shot_examples().to_vec();
        if let Some((files, source)) = task.shot_files().filter(|_| count > 0) {
            let folder = if place.is_file() { place.parent().unwrap_or(place) } else { place };
            let path = find(task, folder, files, source)?;
            shots = read(&path, &mut hasher)?;
        }
        Ok(Self { path, items, shots, hash: hasher.finalize().to_hex().to_string() })
    }
}

/// The names of all shards of a file whose name says that it is one of several, as those of the hub do:
/// `test-00000-of-00003.parquet`; of any other, its own.
pub fn shards(name: &str) -> Vec<String> {
    let whole = || vec![name.to_owned()];
    let (stem, ending) = name.rsplit_once('.').unwrap_or((name, ""));
    let Some((begin, count)) = stem.rsplit_once("-of-") else { return whole() };
    let Some((begin, index)) = begin.rsplit_once('-') else { return whole() };
    let number = |digits: &str| match digits.len() {
        5 => digits.parse::<usize>().ok(),
        _ => None,
    };
    match (number(index), number(count)) {
        (Some(index), Some(count)) if index < count => {
            (0..count).map(|i| format!("{begin}-{i:05}-of-{count:05}.{ending}")).collect()
        }
        _ => whole(),
    }
}

/// The file with one of `names` in `dir` or a folder of it; earlier names win. A file of JSON lines may
/// be there as parquet.
fn find(
    task: &Task,
    dir: &Path,
    names: &[String],
    source: Option<&str>,
) -> Result<PathBuf, EvalError> {
    let mut folders = vec![dir.to_owned()];
    let entries = fs::read_dir(dir).map_err(EvalError::io(dir, "list"))?;
    let mut inner: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    inner.retain(|path| path.is_dir());
    inner.sort();
    folders.extend(inner);
    let parquet = |name: &String| Some(format!("{}.parquet", name.strip_suffix(".jsonl")?));
    let names_of = names.iter().flat_map(|name| [Some(name.clone()), parquet(name)]).flatten();
    for name in &names_of.collect::<Vec<_>>() {
        let mut found =
            folders.iter().map(|folder| folder.join(name)).filter(|path| path.is_file());
        let (first, second) = (found.next(), found.next());
        match (first, second) {
            (Some(first), Some(second)) => {
                let (task, name) = (task.name().to_owned(), name.clone());
                return Err(EvalError::Ambiguous { task, name, first, second });
            }
            (Some(path), None) => return Ok(path),
            (None, _) => {}
        }
    }
    let source_hint = match (source, names.first()) {
        (Some(source), Some(name)) => format!(
            "where there is a network, Python writes it: `from datasets import load_dataset; \
             {source}.to_json(\"{name}\")`"
        ),
        _ => "name its folder or the file itself with --data".to_owned(),
    };
    let (task, files, dir) = (task.name().to_owned(), names.to_vec(), dir.to_owned());
    Err(EvalError::NoData { task, files, dir, source_hint })
}

/// The records of a file, or of all shards where it is one.
fn read(path: &Path, hasher: &mut blake3::Hasher) -> Result<Vec<Doc>, EvalError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let shards = name.map_or_else(
        || vec![path.to_owned()],
        |name| shards(name).into_iter().map(|shard| path.with_file_name(shard)).collect(),
    );
    let mut docs = Vec::new();
    for shard in &shards {
        hasher.update(&fs::read(shard).map_err(EvalError::io(shard, "read"))?);
        docs.extend(read_one(shard)?);
    }
    match docs.is_empty() {
        true => {
            let cause = "expected at least one record, found none".to_owned();
            Err(EvalError::Data { path: path.to_owned(), line: 1, cause })
        }
        false => Ok(docs),
    }
}

/// The records of a file: CSV or parquet by its ending, else JSON lines, which may be compressed (.gz).
fn read_one(path: &Path) -> Result<Vec<Doc>, EvalError> {
    let ends = |with: &str| path.extension().is_some_and(|ending| ending == with);
    if ends("parquet") {
        return Ok(trine_data::parquet_records(path)?);
    }
    let text = match ends("gz") {
        true => {
            let file = fs::File::open(path).map_err(EvalError::io(path, "open"))?;
            let mut text = String::new();
            let read = MultiGzDecoder::new(file).read_to_string(&mut text);
            read.map_err(EvalError::io(path, "decompress"))?;
            text
        }
        false => fs::read_to_string(path).map_err(EvalError::io(path, "read"))?,
    };
    let fault = |line, cause| EvalError::Data { path: path.to_owned(), line, cause };
    if ends("csv") {
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let header = reader.headers().map_err(|error| fault(1, error.to_string()))?.clone();
        let mut docs = Vec::new();
        for record in reader.records() {
            let record = record.map_err(|error| {
                let line = error.position().map_or(1, |position| position.line() as usize);
                fault(line, error.to_string())
            })?;
            let fields = header.iter().zip(&record);
            docs.push(fields.map(|(k, v)| (k.to_owned(), Value::from(v))).collect());
        }
        return Ok(docs);
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let doc = |(index, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|error| fault(index + 1, format!("expected a JSON object: {error}")))
    };
    lines.map(doc).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_known_by_their_names() {
        let all = ["d/test-00000-of-00002.parquet", "d/test-00001-of-00002.parquet"];
        assert_eq!(shards(all[1]), all);
        assert_eq!(shards("test-00000-of-00001.parquet"), ["test-00000-of-00001.parquet"]);
        for other in ["a.jsonl", "00000-of-00002.parquet", "x-2-of-3.csv", "x-00003-of-00003.csv"] {
            assert_eq!(shards(other), [other]);
        }
    }
}
