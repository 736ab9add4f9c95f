//! What the fuzz targets share: a directory in memory, a reader of everything, small valid models.

#![allow(clippy::unwrap_used)]

mod made;
mod text;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tempfile::TempDir;
use trine_format::gguf::GgmlType;
use trine_format::gguf::i2_s::Order;
use trine_format::{Format, FormatError, ModelFile, Projection, TensorSummary, Weight};

pub use made::{MODELS, Masters, config, model, tokenizer};
pub use text::use_tokenizer;

/// Longest error message in bytes: a hostile file must not fill the screen or the log.
const LONGEST_MESSAGE: usize = 4096;

/// Directory that lasts as long as the process, in memory where the system has such a place.
pub struct Scratch(TempDir);

impl Scratch {
    /// A new one.
    #[expect(clippy::new_without_default)]
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        Self(tempfile::Builder::new().prefix("trine-fuzz-").tempdir_in(parent).unwrap())
    }

    /// Writes a file, replacing one of its name; directories on the way are made.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Removes a file where there is one.
    pub fn remove(&self, name: &str) {
        let _ = fs::remove_file(self.0.path().join(name));
    }

    /// The path of a name inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Checks that an error names the file and is one readable line.
pub fn check_message(error: &impl std::fmt::Display, path: &Path) {
    let message = error.to_string();
    assert!(message.starts_with(&path.display().to_string()), "no file: {message}");
    assert!(message.len() < LONGEST_MESSAGE, "{} bytes of message", message.len());
    assert!(!message.contains(char::is_control), "control characters: {message:?}");
}

/// Opens a model and reads everything that the public interface reaches.
///
/// Returns the model when it could be opened and every tensor could be read.
pub fn read_all(path: &Path) -> Option<ModelFile> {
    read_opened(ModelFile::open(path), path)
}

/// As [`read_all`], of what a reader of its own has opened.
pub fn read_opened(file: Result<ModelFile, FormatError>, path: &Path) -> Option<ModelFile> {
    let refused = |error: FormatError| {
        check_message(&error, path);
        None
    };
    let mut file = match file {
        Ok(file) => file,
        Err(error) => return refused(error),
    };
    let config = file.config().clone();
    config.validate().unwrap();
    let ids = config.tensor_ids();
    assert!(config.parameter_count() > 0);
    assert!(file.tensors().len() >= ids.len() || file.format() == Format::Imported);
    let in_file: usize = file.tensors().iter().map(|t: &TensorSummary| t.bytes).sum();
    if let Some(files) = file.tokenizer() {
        let _ = (files.chat_template(), files.bos_token(), files.eos_token());
    }
    if let Some(gguf) = file.as_gguf() {
        assert!(in_file as u64 <= fs::metadata(path).unwrap().len());
        assert!(gguf.tensors().iter().all(|t| gguf.bytes(t).len() == t.range.len()));
    }
    for id in ids {
        match file.dense(&id.canonical()) {
            Ok(tensor) => {
                let values = tensor.to_f32();
                assert_eq!(values.len(), config.tensor_shape(id).iter().product::<usize>());
                if let [_, columns] = tensor.shape[..] {
                    assert_eq!(tensor.rows(0..1).map(|row| row.to_f32().len()), Some(columns));
                }
            }
            // The trits of a projection are no plain tensor.
            Err(error) => drop(refused(error)),
        }
    }
    let recognized = file.i2_s_order();
    let has_i2_s = file.tensors().iter().any(|tensor| tensor.dtype == GgmlType::I2_S.name());
    assert!(has_i2_s || recognized.is_none());
    if has_i2_s {
        for order in Order::ALL {
            file.set_i2_s_order(order);
            projections(&file, path);
        }
        file.set_i2_s_order(recognized.unwrap_or_default());
    }
    projections(&file, path).then_some(file)
}

/// Reads all projections; whether each could be.
fn projections(file: &ModelFile, path: &Path) -> bool {
    let config = file.config();
    let mut whole = true;
    for layer in 0..config.num_hidden_layers {
        for p in Projection::ALL {
            let (rows, cols) = config.projection_shape(p);
            match file.projection(layer, p) {
                Ok(Weight::Ternary(matrix)) => {
                    assert_eq!((matrix.rows(), matrix.cols()), (rows, cols));
                    assert!(matrix.scale().is_finite() && matrix.scale() >= 0.0);
                    assert_eq!(matrix.counts().iter().sum::<usize>(), rows * cols);
                }
                Ok(Weight::Dense(tensor)) => assert_eq!(tensor.to_f32().len(), rows * cols),
                Err(error) => {
                    check_message(&error, path);
                    whole = false;
                }
            }
        }
    }
    whole
}

/// Lets the panics of libraries pass that `trine_tokenizer` turns into errors, and names each place once.
///
/// libFuzzer's hook ends the process at any panic, before anything can catch it. For `init:`.
pub fn catch_library_panics() {
    let fatal = std::panic::take_hook();
    let seen = Mutex::new(BTreeSet::new());
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        if !["/tokenizers-", "/minijinja-"].iter().any(|library| place.contains(library)) {
            fatal(info);
        } else if seen.lock().unwrap().insert(place) {
            eprintln!("caught: {info}");
        }
    }));
}
