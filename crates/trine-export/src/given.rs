//! What a conversion hands to a writer, remembered by digest.
//!
//! To compare what was written with its source, the source's trits are needed a second time. For
//! masters they are most of the work of a conversion, and together they are as large as the file;
//! so of every matrix that a writer is given, its scale and a BLAKE3 digest of its trits are kept.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use trine_format::names::{Part, TensorId};
use trine_format::{
    BoxError, DenseTensor, ModelConfig, Projection, Quantization, TensorSource, names,
};
use trine_ternary::{Ambiguity, TernaryMatrix};

use crate::{Progress, Stage, Watch};

/// A ternary matrix, as far as another can be compared with it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Given {
    /// `(rows, cols)`
    pub(crate) shape: (usize, usize),
    /// Of the canonical packing.
    pub(crate) digest: blake3::Hash,
    pub(crate) scale: f32,
    /// Whether there is no other trit than 0.
    pub(crate) zero: bool,
    /// Of masters: the weights that other implementations may round the other way.
    pub(crate) ambiguity: Ambiguity,
}

impl Given {
    pub(crate) fn of(matrix: &TernaryMatrix) -> Self {
        let shape = (matrix.rows(), matrix.cols());
        Self {
            shape,
            digest: blake3::hash(matrix.packed()),
            scale: matrix.scale(),
            zero: matrix.counts()[1] == shape.0 * shape.1,
            ambiguity: Ambiguity::default(),
        }
    }
}

/// What was given, by layer and projection.
pub(crate) type Givens = HashMap<(usize, Projection), Given>;

/// A source that remembers the trits it gives, and reports what was written of it.
pub(crate) struct Recorder<'a> {
    source: &'a dyn TensorSource,
    config: &'a ModelConfig,
    given: Mutex<Givens>,
    counter: Counter<'a>,
}

impl<'a> Recorder<'a> {
    pub(crate) fn new(
        source: &'a dyn TensorSource,
        config: &'a ModelConfig,
        watch: &'a Watch<'a>,
    ) -> Self {
        let counter = Counter::new(Stage::Writing, config, watch);
        Self { source, config, given: Mutex::default(), counter }
    }

    pub(crate) fn into_given(self) -> Givens {
        self.given.into_inner().unwrap_or_else(|e| e.into_inner())
    }
}

impl TensorSource for Recorder<'_> {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        self.source.dense(name)
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        let masters = match self.config.quantization {
            Quantization::Online => Some(self.source.dense(&names::projection(layer, p))?),
            _ => None,
        };
        let (matrix, ambiguity) = match masters.map(|masters| masters.ternarize_counted()) {
            Some(Ok(counted)) => counted,
            // The source names its file in what it has to say.
            _ => (self.source.projection(layer, p)?, Ambiguity::default()),
        };
        let given = Given { ambiguity, ..Given::of(&matrix) };
        self.given.lock().unwrap_or_else(|e| e.into_inner()).insert((layer, p), given);
        // The masters have been read, the trits are in memory of their own.
        self.source.release(&TensorId::Layer(layer, Part::Projection(p)).canonical());
        Ok(matrix)
    }

    fn release(&self, name: &str) {
        self.source.release(name);
        if let Some(id) = TensorId::from_canonical(name) {
            self.counter.done(self.config, id);
        }
    }
}

/// Counts the parameters that one stage of the work has passed.
pub(crate) struct Counter<'a> {
    stage: Stage,
    done: AtomicU64,
    total: u64,
    watch: &'a Watch<'a>,
}

impl<'a> Counter<'a> {
    pub(crate) fn new(stage: Stage, config: &ModelConfig, watch: &'a Watch<'a>) -> Self {
        Self { stage, done: AtomicU64::new(0), total: config.parameter_count(), watch }
    }

    pub(crate) fn done(&self, config: &ModelConfig, id: TensorId) {
        let size = config.tensor_shape(id).iter().map(|&n| n as u64).product::<u64>();
        let done = self.done.fetch_add(size, Ordering::Relaxed) + size;
        (self.watch)(Progress { stage: self.stage, done, total: self.total });
    }
}
