//! What the ternary layouts of GGUF have in common.

use half::f16;
use trine_ternary::{TernaryError, TernaryMatrix};

use crate::{ModelConfig, Projection};

use super::{GgmlType, i2_s, tq1_0, tq2_0, trn2};

/// Bytes of the f16 scale of a block.
const SCALE_BYTES: usize = 2;

/// Why bytes are no trits, or trits do not fit a layout.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CodecError {
    /// The definition of a ternary matrix is violated.
    #[error(transparent)]
    Ternary(#[from] TernaryError),
    /// The matrix does not fill whole blocks.
    #[error("{kind} needs {what} in multiples of {multiple}, found {found}")]
    Blocks {
        /// The layout.
        kind: GgmlType,
        /// What is counted.
        what: &'static str,
        /// Values in a block.
        multiple: usize,
        /// Values there are.
        found: usize,
    },
    /// Blocks disagree about the scale, of which a ternary matrix has one.
    #[error("block {block} has the scale {found}, blocks before it {expected}")]
    BlockScales {
        /// Position of the block in the tensor.
        block: usize,
        /// Scale of the blocks before it.
        expected: f32,
        /// Its own scale.
        found: f32,
    },
    /// The scale is no f16.
    #[error("scale {scale} is out of the range of f16, in which {kind} stores it")]
    ScaleRange {
        /// The layout.
        kind: GgmlType,
        /// The scale.
        scale: f32,
    },
    /// The type holds no trits, or none that can be read.
    #[error("{kind} is not a ternary type that can be read")]
    Unsupported {
        /// The type.
        kind: GgmlType,
    },
}

/// The ternary layouts that a model can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TernaryType {
    /// bitnet.cpp's: 2 bits a weight, one exact f32 scale.
    I2S,
    /// llama.cpp's: 1.6875 bits a weight, an f16 scale for every 256.
    Tq1_0,
    /// llama.cpp's: 2.0625 bits a weight, an f16 scale for every 256.
    Tq2_0,
    /// Our own: 2 bits a weight, one exact f32 scale, any shape.
    Trn2,
}

impl TernaryType {
    /// The type of a tensor in this layout.
    pub fn ggml_type(self) -> GgmlType {
        match self {
            Self::I2S => GgmlType::I2_S,
            Self::Tq1_0 => GgmlType::TQ1_0,
            Self::Tq2_0 => GgmlType::TQ2_0,
            Self::Trn2 => GgmlType::TRN2,
        }
    }

    /// The value of `general.file_type` for a model in this layout.
    pub fn file_type(self) -> u32 {
        match self {
            Self::I2S => 40,
            Self::Tq1_0 => 36,
            Self::Tq2_0 => 37,
            Self::Trn2 => GgmlType::TRN2.id(),
        }
    }

    /// The layout of a tensor type.
    pub fn from_ggml(kind: GgmlType) -> Option<Self> {
        [Self::I2S, Self::Tq1_0, Self::Tq2_0, Self::Trn2]
            .into_iter()
            .find(|t| t.ggml_type() == kind)
    }

    /// Checks that the layout holds a matrix `(rows, cols)`.
    ///
    /// # Errors
    /// [`CodecError::Blocks`] with the rule.
    pub fn check_shape(self, rows: usize, cols: usize) -> Result<(), CodecError> {
        match self {
            Self::I2S => i2_s::check_order(i2_s::Order::Blocks128, rows, cols),
            _ => bytes(self.ggml_type(), rows, cols).map(drop),
        }
    }

    /// Whether the layout holds every projection of such a model.
    pub fn holds(self, config: &ModelConfig) -> bool {
        let shapes = Projection::ALL.map(|p| config.projection_shape(p));
        shapes.into_iter().all(|(rows, cols)| self.check_shape(rows, cols).is_ok())
    }

    /// The layout to choose where nothing else is asked for: I2_S, with exact scales and other
    /// programs that read it, and [`TernaryType::Trn2`] for shapes that it cannot hold.
    pub fn exact_for(config: &ModelConfig) -> Self {
        if Self::I2S.holds(config) { Self::I2S } else { Self::Trn2 }
    }

    /// Stores a matrix.
    ///
    /// # Errors
    /// A shape that does not fill whole blocks, or a scale out of range.
    pub fn encode(self, matrix: &TernaryMatrix) -> Result<Vec<u8>, CodecError> {
        match self {
            Self::I2S => i2_s::encode(matrix),
            Self::Tq1_0 => tq1_0::encode(matrix),
            Self::Tq2_0 => tq2_0::encode(matrix),
            Self::Trn2 => trn2::encode(matrix),
        }
    }

    /// Takes a matrix `(rows, cols)` as it is stored.
    ///
    /// # Errors
    /// Bytes that encode no trits, or not as many as the shape needs.
    pub fn decode(
        self,
        bytes: &[u8],
        rows: usize,
        cols: usize,
    ) -> Result<TernaryMatrix, CodecError> {
        match self {
            Self::I2S => i2_s::decode(bytes, rows, cols),
            Self::Tq1_0 => tq1_0::decode(bytes, rows, cols),
            Self::Tq2_0 => tq2_0::decode(bytes, rows, cols),
            Self::Trn2 => trn2::decode(bytes, rows, cols),
        }
    }
}

/// Number of values of a matrix, after checking that `len` bytes are what a layout stores it in.
pub(super) fn check(
    kind: GgmlType,
    len: usize,
    rows: usize,
    cols: usize,
) -> Result<usize, CodecError> {
    let values = rows.checked_mul(cols).ok_or(TernaryError::TooLarge { rows, cols })?;
    let expected = bytes(kind, rows, cols)?;
    if len != expected {
        let error = TernaryError::Length { what: "bytes", expected, found: len };
        return Err(error.into());
    }
    Ok(values)
}

/// Bytes that a layout stores a matrix in.
pub(super) fn bytes(kind: GgmlType, rows: usize, cols: usize) -> Result<usize, CodecError> {
    kind.tensor_bytes(&[rows, cols]).ok_or_else(|| {
        let (what, multiple, found) = match kind {
            GgmlType::I2_S => ("values", 4, rows.saturating_mul(cols)),
            _ => ("columns", kind.block().0, cols),
        };
        CodecError::Blocks { kind, what, multiple, found }
    })
}

/// Stores a matrix in blocks of `TRITS`, each in `BYTES` with the f16 scale at its end.
///
/// A block without a non-zero trit gets the scale 0, as ggml's block scale is the block's largest
/// magnitude.
pub(super) fn encode_blocks<const TRITS: usize, const BYTES: usize>(
    kind: GgmlType,
    matrix: &TernaryMatrix,
    pack: impl Fn(&[i8; TRITS], &mut [u8]),
) -> Result<Vec<u8>, CodecError> {
    let mut out = vec![0; bytes(kind, matrix.rows(), matrix.cols())?];
    let scale = f16::from_f32(matrix.scale());
    if !scale.is_finite() || (scale == f16::ZERO && matrix.scale() != 0.0) {
        return Err(CodecError::ScaleRange { kind, scale: matrix.scale() });
    }
    let mut row = vec![0; matrix.cols()];
    let mut blocks = out.as_chunks_mut::<BYTES>().0.iter_mut();
    for r in 0..matrix.rows() {
        matrix.unpack_row(r, &mut row);
        for (trits, block) in row.as_chunks::<TRITS>().0.iter().zip(&mut blocks) {
            let (codes, end) = block.split_at_mut(BYTES - SCALE_BYTES);
            pack(trits, codes);
            let zero = trits.iter().fold(0, |any, trit| any | trit) == 0;
            end.copy_from_slice(&if zero { f16::ZERO } else { scale }.to_le_bytes());
        }
    }
    Ok(out)
}

/// Takes a matrix stored by [`encode_blocks`]. `find_bad` gives the position of the first byte of
/// a block that encodes no trits; `unpack` is called only where there is none.
///
/// Block scales must agree, but for blocks with scale 0, whose values are all 0.
pub(super) fn decode_blocks<const TRITS: usize, const BYTES: usize>(
    kind: GgmlType,
    data: &[u8],
    rows: usize,
    cols: usize,
    find_bad: impl Fn(&[u8]) -> Option<usize>,
    unpack: impl Fn(&[u8], &mut [i8; TRITS]),
) -> Result<TernaryMatrix, CodecError> {
    check(kind, data.len(), rows, cols)?;
    let blocks = data.as_chunks::<BYTES>().0;
    let parts = |block: &'_ [u8; BYTES]| {
        let scale = f16::from_le_bytes([block[BYTES - 2], block[BYTES - 1]]);
        (BYTES - SCALE_BYTES, scale.to_f32())
    };
    let mut common: Option<f32> = None;
    for (index, block) in blocks.iter().enumerate() {
        let (end, scale) = parts(block);
        if let Some(at) = find_bad(&block[..end]) {
            return Err(TernaryError::Code { index: index * BYTES + at, byte: block[at] }.into());
        }
        match common {
            _ if scale == 0.0 => {}
            // The comparison is of bits, so that NaN ends in the check of the scale below.
            Some(expected) if expected.to_bits() != scale.to_bits() => {
                return Err(CodecError::BlockScales { block: index, expected, found: scale });
            }
            _ => common = Some(scale),
        }
    }
    let row_blocks = cols / TRITS;
    Ok(TernaryMatrix::from_trit_rows(rows, cols, common.unwrap_or(0.0), |r, row| {
        let blocks = &blocks[r * row_blocks..][..row_blocks];
        for (trits, block) in row.as_chunks_mut().0.iter_mut().zip(blocks) {
            match parts(block) {
                (_, 0.0) => trits.fill(0),
                (end, _) => unpack(&block[..end], trits),
            }
        }
    })?)
}
