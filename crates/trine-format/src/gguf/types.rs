//! The types of tensors in GGUF files.
//!
//! All are known by name and size, so that any file can be inspected and an error can say what was
//! found; few are decoded. Ids 36 to 38 are those of bitnet.cpp's fork: upstream ggml has retired
//! the types that it once had there. The fork's TL2 is 39, which upstream uses for MXFP4; the file
//! does not tell them apart, and neither is decoded. TRN2 is our own, see [`trn2`](super::trn2).

use std::fmt;

use super::trn2::SCALE_BYTES;

macro_rules! ggml_types {
    ($($name:ident = $id:literal: $block:literal values in $bytes:literal,)*) => {
        /// A type of tensor data.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, non_camel_case_types)]
        #[repr(u32)]
        pub enum GgmlType { $($name = $id,)* }

        impl GgmlType {
            /// The type with this id in a file.
            pub fn from_id(id: u32) -> Option<Self> {
                match id { $($id => Some(Self::$name),)* _ => None }
            }

            /// ggml's name of the type.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// Values in a block and bytes of a block.
            pub fn block(self) -> (usize, usize) {
                match self { $(Self::$name => ($block, $bytes),)* }
            }
        }
    };
}

ggml_types! {
    F32 = 0: 1 values in 4,
    F16 = 1: 1 values in 2,
    Q4_0 = 2: 32 values in 18,
    Q4_1 = 3: 32 values in 20,
    Q5_0 = 6: 32 values in 22,
    Q5_1 = 7: 32 values in 24,
    Q8_0 = 8: 32 values in 34,
    Q8_1 = 9: 32 values in 36,
    Q2_K = 10: 256 values in 84,
    Q3_K = 11: 256 values in 110,
    Q4_K = 12: 256 values in 144,
    Q5_K = 13: 256 values in 176,
    Q6_K = 14: 256 values in 210,
    Q8_K = 15: 256 values in 292,
    IQ2_XXS = 16: 256 values in 66,
    IQ2_XS = 17: 256 values in 74,
    IQ3_XXS = 18: 256 values in 98,
    IQ1_S = 19: 256 values in 50,
    IQ4_NL = 20: 32 values in 18,
    IQ3_S = 21: 256 values in 110,
    IQ2_S = 22: 256 values in 82,
    IQ4_XS = 23: 256 values in 136,
    I8 = 24: 1 values in 1,
    I16 = 25: 1 values in 2,
    I32 = 26: 1 values in 4,
    I64 = 27: 1 values in 8,
    F64 = 28: 1 values in 8,
    IQ1_M = 29: 256 values in 56,
    BF16 = 30: 1 values in 2,
    TQ1_0 = 34: 256 values in 54,
    TQ2_0 = 35: 256 values in 66,
    I2_S = 36: 128 values in 32,
    I8_S = 37: 1 values in 1,
    TL1 = 38: 4 values in 1,
    MXFP4 = 39: 32 values in 17,
    NVFP4 = 40: 64 values in 36,
    Q1_0 = 41: 128 values in 18,
    TRN2 = 0x324E_5254: 4 values in 1,
}

/// Bytes after the trits of a whole I2_S tensor: an f32 scale and 28 unused ones.
pub(crate) const I2_S_TAIL: usize = 32;

impl GgmlType {
    /// The id in a file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// What has to fill whole blocks: blocks do not cross rows, except in I2_S.
    pub(super) fn unit(self) -> &'static str {
        if self == Self::I2_S { "the tensor" } else { "each row" }
    }

    /// Bytes of a tensor with this row-major shape, or `None` where the values do not fill whole
    /// blocks or the size overflows.
    /// TRN2 fills up the last block of a row.
    pub fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let (block, bytes) = self.block();
        let cols = *shape.last().unwrap_or(&1);
        let values = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
        match self {
            Self::TRN2 => {
                let rows = values.checked_div(cols)?;
                rows.checked_mul(cols.div_ceil(block))?.checked_add(SCALE_BYTES)
            }
            // Blocks of which order they are, the tensor itself does not say.
            Self::I2_S if values.is_multiple_of(4) => (values / 4).checked_add(I2_S_TAIL),
            Self::I2_S => None,
            _ if cols.is_multiple_of(block) => (values / block).checked_mul(bytes),
            _ => None,
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
