//! What tells one model from another, whatever their files are called.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::EvalError;

/// BLAKE3 of a model file, or of the configuration and weights of a directory, in hexadecimal.
///
/// # Errors
/// A file that cannot be read.
pub fn fingerprint(model: &Path) -> Result<String, EvalError> {
    let mut files: Vec<PathBuf> = match model.is_dir() {
        true => {
            let entries = fs::read_dir(model).map_err(EvalError::io(model, "list"))?;
            entries.flatten().map(|entry| entry.path()).filter(|path| is_part(path)).collect()
        }
        false => vec![model.to_owned()],
    };
    files.sort();
    let mut hasher = blake3::Hasher::new();
    for path in files {
        let file = File::open(&path).map_err(EvalError::io(&path, "open"))?;
        hasher.update_reader(file).map_err(EvalError::io(&path, "read"))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Of a directory, what says how the model computes.
fn is_part(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name == "config.json" || name.ends_with(".safetensors")
}
