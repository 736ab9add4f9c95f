//! The sketch of a head: whether it is made, and for which passes it is used.
//!
//! Greedy and top-k decoding need the largest logits only, and where a sketch says which rows they are
//! in (`trine_kernels::TwoStageHead`), the others are not read. The bits are the same.

use trine_kernels::{Largest, TwoStageHead};

use crate::RuntimeError;
use crate::dense::DenseMatrix;

/// Whether a sketch of the head lies beside it, with which passes that need only the largest logits
/// read less. It changes no result and takes 4.5 bits a weight of the head.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum HeadSketch {
    /// None.
    #[default]
    Off,
    /// Where it pays to find these logits with it.
    Auto(Largest),
    /// Whatever the head.
    On,
}

/// For what a sketch is used; beyond, reading the head is as quick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Use {
    /// Most rows of logits in a pass.
    pub(crate) rows: usize,
    /// Most of the largest logits.
    pub(crate) count: usize,
    /// Fewest weights of a head that it is made for without being asked for.
    pub(crate) weights: usize,
}

/// Farthest below the largest logit that others are looked for: of a flat distribution, these are many.
const WITHIN: f32 = 4.0;

impl Use {
    /// Whether these logits are found sooner with it.
    fn finds(self, largest: Largest) -> bool {
        largest.count <= self.count && largest.within <= WITHIN
    }

    /// Whether those of so many rows are.
    pub(crate) fn pays(self, rows: usize, largest: Largest) -> bool {
        rows <= self.rows && self.finds(largest)
    }
}

/// Columns of a head come in so many.
const COLUMNS: usize = 32;

/// Makes the sketch of a head `(V, D)`, if it is wanted.
pub(crate) fn make(
    head: &DenseMatrix,
    wanted: HeadSketch,
) -> Result<Option<TwoStageHead>, RuntimeError> {
    let (rows, cols) = head.shape();
    let made = match wanted {
        HeadSketch::Off => false,
        HeadSketch::On if !cols.is_multiple_of(COLUMNS) => {
            return Err(RuntimeError::HeadSketch { hidden_size: cols, multiple: COLUMNS });
        }
        HeadSketch::On => true,
        HeadSketch::Auto(largest) => {
            let of_head = head.sketch_use();
            let large = rows * cols >= of_head.weights;
            cols.is_multiple_of(COLUMNS) && large && of_head.finds(largest)
        }
    };
    Ok(made.then(|| TwoStageHead::new(head.head_rows(), rows, cols)))
}
