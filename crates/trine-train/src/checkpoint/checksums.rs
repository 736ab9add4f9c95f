//! Checksums of the files of a checkpoint.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use serde::{Deserialize, Serialize};
use trine_format::AtomicFile;

use super::corrupt;
use crate::TrainError;

const CHECKSUMS: &str = "checksums.json";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Checksums {
    /// BLAKE3 in hexadecimal by file name.
    blake3: BTreeMap<String, String>,
}

/// Writes the checksums of all files that lie in a directory.
pub(super) fn write(dir: &Path) -> Result<(), TrainError> {
    let read = |source| TrainError::Read { path: dir.to_owned(), source };
    let mut blake3 = BTreeMap::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        blake3.insert(name, hash(&entry.path())?);
    }
    let text = serde_json::to_vec_pretty(&Checksums { blake3 }).expect("plain data serializes");
    Ok(AtomicFile::replace(&dir.join(CHECKSUMS), &text)?)
}

/// Compares the files of a checkpoint with the checksums that were written with them. Files that
/// somebody put beside them do not matter.
///
/// # Errors
/// [`TrainError::Checkpoint`] naming the first file that is missing or differs.
pub fn verify(dir: &Path) -> Result<(), TrainError> {
    let path = dir.join(CHECKSUMS);
    let text = fs::read(&path).map_err(|e| corrupt(dir, format!("{CHECKSUMS}: {e}")))?;
    let expected: Checksums =
        serde_json::from_slice(&text).map_err(|e| corrupt(dir, format!("{CHECKSUMS}: {e}")))?;
    for (name, expected) in &expected.blake3 {
        // A name that leads elsewhere would read what is no part of the checkpoint.
        if Path::new(name).file_name().is_none_or(|file| file != name.as_str()) {
            return Err(corrupt(dir, format!("{CHECKSUMS}: {name:?} is not the name of a file")));
        }
        let found = match hash(&dir.join(name)) {
            Ok(found) => found,
            Err(TrainError::Read { source, .. }) => {
                return Err(corrupt(dir, format!("{name}: {source}")));
            }
            Err(other) => return Err(other),
        };
        if found != *expected {
            let message = format!("{name}: damaged: expected BLAKE3 {expected}, found {found}");
            return Err(corrupt(dir, message));
        }
    }
    Ok(())
}

fn hash(path: &Path) -> Result<String, TrainError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).and_then(|file| hasher.update_reader(file).map(|_| ()));
    file.map_err(|source| TrainError::Read { path: path.to_owned(), source })?;
    Ok(hasher.finalize().to_hex().to_string())
}
