//! The types of plain numbers, one by one or in blocks that share a scale.

use half::{bf16, f16};

use crate::blocks::{q3_k, q4_0, q6_k, q8_0};
use crate::error::BoxError;
use crate::gguf::GgmlType;

/// Types of numbers; files hold them little-endian, and blocks as [`blocks`](crate::blocks) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Dtype {
    F32,
    F16,
    BF16,
    Q8_0,
    Q6_K,
    Q4_0,
    Q3_K,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q6_K, Self::Q4_0, Self::Q3_K];

    /// The name for people, and in `config.json` where the type can stand there: `float32`,
    /// `float16`, `bfloat16`, `q8_0`, `q6_k`, `q4_0`, `q3_k`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::Q8_0 => "q8_0",
            Self::Q6_K => "q6_k",
            Self::Q4_0 => "q4_0",
            Self::Q3_K => "q3_k",
        }
    }

    /// The type in a GGUF file.
    pub fn ggml_type(self) -> GgmlType {
        match self {
            Self::F32 => GgmlType::F32,
            Self::F16 => GgmlType::F16,
            Self::BF16 => GgmlType::BF16,
            Self::Q8_0 => GgmlType::Q8_0,
            Self::Q6_K => GgmlType::Q6_K,
            Self::Q4_0 => GgmlType::Q4_0,
            Self::Q3_K => GgmlType::Q3_K,
        }
    }

    /// The type of a tensor in a GGUF file, where it is one of plain numbers.
    pub fn from_ggml(kind: GgmlType) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.ggml_type() == kind)
    }

    /// Checks that rows of `columns` numbers can be stored: that they are whole blocks.
    ///
    /// # Errors
    /// When they are not, with both lengths.
    pub fn check_columns(self, columns: usize) -> Result<(), BoxError> {
        let (name, block) = (self.name(), self.ggml_type().block().0);
        if columns.is_multiple_of(block) {
            return Ok(());
        }
        Err(format!("{name} needs rows of a multiple of {block}, found {columns}").into())
    }

    /// Whether numbers are stored in blocks that share a scale; such types exist in GGUF files only.
    pub fn is_block(self) -> bool {
        self.ggml_type().block().0 > 1
    }

    /// Bytes of a tensor with this row-major shape, or `None` where its rows are not whole blocks or
    /// the size overflows.
    pub fn bytes(self, shape: &[usize]) -> Option<usize> {
        self.ggml_type().tensor_bytes(shape)
    }

    /// Widens as many numbers as both sides have; whole blocks.
    pub(crate) fn decode(self, data: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => each(data, out, |b, [v]| *v = f32::from_le_bytes(*b)),
            Self::F16 => each(data, out, |b, [v]| *v = f16::from_le_bytes(*b).to_f32()),
            // The upper half of an f32; `to_f32` would also look for a NaN to make quiet.
            Self::BF16 => each(data, out, |b, [v]| {
                *v = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }),
            Self::Q8_0 => each(data, out, q8_0::decode),
            Self::Q6_K => each(data, out, q6_k::decode),
            Self::Q4_0 => each(data, out, q4_0::decode),
            Self::Q3_K => each(data, out, q3_k::decode),
        }
    }

    /// Stores as many numbers as both sides have; whole blocks.
    ///
    /// # Errors
    /// The position of the first number that the type cannot hold: a finite one that overflows, and
    /// in a block also one that is not finite, as it would take its neighbours with it.
    pub(crate) fn encode(self, values: &[f32], out: &mut [u8]) -> Result<(), usize> {
        let below = |limit: f32| find(values, |v| v.abs() < limit);
        match self {
            Self::F32 => {}
            Self::F16 => find(values, |v| f16::from_f32(v).is_finite() || !v.is_finite())?,
            Self::BF16 => find(values, |v| bf16::from_f32(v).is_finite() || !v.is_finite())?,
            Self::Q8_0 => below(q8_0::LIMIT)?,
            Self::Q6_K => below(q6_k::LIMIT)?,
            Self::Q4_0 => below(q4_0::LIMIT)?,
            Self::Q3_K => below(q3_k::LIMIT)?,
        }
        match self {
            Self::F32 => each(values, out, |[v], b| *b = v.to_le_bytes()),
            Self::F16 => each(values, out, |[v], b| *b = f16::from_f32(*v).to_le_bytes()),
            Self::BF16 => each(values, out, |[v], b| *b = bf16::from_f32(*v).to_le_bytes()),
            Self::Q8_0 => each(values, out, q8_0::encode),
            Self::Q6_K => each(values, out, q6_k::encode),
            Self::Q4_0 => each(values, out, q4_0::encode),
            Self::Q3_K => each(values, out, q3_k::encode),
        }
        Ok(())
    }
}

/// Calls `one` with every `N` elements of `from` and the `M` elements of `to` that they become.
fn each<A, B, const N: usize, const M: usize>(
    from: &[A],
    to: &mut [B],
    one: impl Fn(&[A; N], &mut [B; M]),
) {
    from.as_chunks().0.iter().zip(to.as_chunks_mut().0).for_each(|(from, to)| one(from, to));
}

/// The first position whose number does not fit.
fn find(values: &[f32], fits: impl Fn(f32) -> bool) -> Result<(), usize> {
    // Without a branch for each number, as nearly always all fit.
    if values.iter().fold(true, |all, &v| all & fits(v)) {
        return Ok(());
    }
    values.iter().position(|&v| !fits(v)).map_or(Ok(()), Err)
}
