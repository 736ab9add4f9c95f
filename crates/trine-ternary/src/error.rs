//! What can be wrong with ternary data.

use std::fmt;

/// Why weights, trits or packed bytes were refused.
#[derive(Clone, Debug, PartialEq)]
pub enum TernaryError {
    /// A weight is NaN or infinite.
    NonFinite {
        /// Position in the row-major weights.
        index: usize,
        /// The offending value.
        value: f32,
    },
    /// A slice does not have the length that the shape asks for.
    Length {
        /// What was measured, e.g. `"weights"`.
        what: &'static str,
        /// Elements the shape asks for.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// Rows times columns does not fit in memory's address range.
    TooLarge {
        /// Number of rows.
        rows: usize,
        /// Number of columns.
        cols: usize,
    },
    /// A scale that cannot be used: stored trits take any finite scale from 0 on, rounding needs one
    /// with a finite reciprocal.
    Scale {
        /// What would have been accepted.
        expected: &'static str,
        /// The offending scale.
        scale: f32,
    },
    /// No master weights of the wanted precision have this scale and these trits.
    Masters {
        /// The scale.
        scale: f32,
    },
    /// A value given as a trit is not -1, 0 or 1.
    Trit {
        /// Position in the row-major trits.
        index: usize,
        /// The offending value.
        value: i8,
    },
    /// A packed byte does not encode trits.
    Code {
        /// Position of the byte.
        index: usize,
        /// The offending byte.
        byte: u8,
    },
}

impl fmt::Display for TernaryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NonFinite { index, value } => {
                write!(f, "weight {index} is {value}: a ternary scale needs finite weights")
            }
            Self::Length { what, expected, found } => {
                write!(f, "{what}: expected {expected} elements, found {found}")
            }
            Self::TooLarge { rows, cols } => write!(f, "shape ({rows}, {cols}) is too large"),
            Self::Scale { expected, scale } => write!(f, "scale {scale}: expected {expected}"),
            Self::Masters { scale } => write!(
                f,
                "no master weights of this precision have the scale {scale}; f32 has finer ones"
            ),
            Self::Trit { index, value } => {
                write!(f, "trit {index} is {value}: expected -1, 0 or 1")
            }
            Self::Code { index, byte } => {
                write!(f, "packed byte {index} is {byte:#04x}, which encodes no trits")
            }
        }
    }
}

impl std::error::Error for TernaryError {}

impl TernaryError {
    /// An error about a row as one about its matrix, whose rows have `cols` elements.
    pub(crate) fn in_row(self, row: usize, cols: usize) -> Self {
        match self {
            Self::NonFinite { index, value } => {
                Self::NonFinite { index: row * cols + index, value }
            }
            Self::Trit { index, value } => Self::Trit { index: row * cols + index, value },
            other => other,
        }
    }
}

/// Checks that `found` elements were given where `expected` were asked for.
pub(crate) fn check_len(
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), TernaryError> {
    if expected == found { Ok(()) } else { Err(TernaryError::Length { what, expected, found }) }
}
