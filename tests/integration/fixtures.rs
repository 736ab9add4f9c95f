//! The reference models, and how two lists of numbers are compared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

/// The reference models in this repository, and more where `TRINE_FIXTURES` names a directory of
/// models of the same form (by default `../shared/fixtures/public` beside the repository).
pub(crate) fn models() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let extra = std::env::var_os("TRINE_FIXTURES")
        .map_or_else(|| root.join("../../shared/fixtures/public"), PathBuf::from);
    let mut found = below(&root.join("data/fixtures"));
    assert!(found.len() >= 2, "the repository's own fixtures are missing");
    if extra.is_dir() {
        found.extend(below(&extra));
    } else {
        eprintln!("skipped: no further fixtures in {}", extra.display());
    }
    found
}

/// A directory of other people's data, which this repository does not hold: below `TRINE_DATA`, by
/// default `../shared/data` beside the repository.
pub(crate) fn third_party(name: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let data = std::env::var_os("TRINE_DATA")
        .map_or_else(|| root.join("../../shared/data"), PathBuf::from);
    let dir = data.join(name);
    if !dir.is_dir() {
        eprintln!("skipped: no {}", dir.display());
        return None;
    }
    Some(dir)
}

fn below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut models: Vec<PathBuf> = entries.filter(|path| path.join("bf16").is_dir()).collect();
    models.sort();
    models
}

/// A reference model of this repository.
pub(crate) fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/fixtures").join(name)
}

/// All f32 and i64 tensors of a file, as f32.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = BTreeMap::new();
    for (name, t) in file.tensors() {
        let values = match t.dtype() {
            Dtype::F32 => t.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::I64 => {
                t.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect()
            }
            _ => continue,
        };
        tensors.insert(name, values);
    }
    tensors
}

/// Token ids that were read as numbers.
pub(crate) fn ids(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| *v as u32).collect()
}

/// Norm of the difference, relative to the norm of what was expected.
pub(crate) fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |a: f64| a * a;
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| square(f64::from(a - b))).sum();
    let norm: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
    (difference / norm.max(1e-30)).sqrt()
}
