//! I2_S, bitnet.cpp's layout: 2 bits a weight and one f32 scale.
//!
//! A code is trit + 1, four in a byte; after `n / 4` bytes comes the scale, then 28 bytes that are
//! written as 0 and not read (bitnet.cpp leaves them as they were). Which four weights share a byte
//! depends on the build of bitnet.cpp that wrote the file, and no key says which it was; see
//! [`Order`]. Written here is [`Order::Blocks128`], that of its converter and of its x86 builds.

use trine_ternary::pack::find_code_three;
use trine_ternary::{TernaryError, TernaryMatrix};

use super::codec::{bytes, check};
use super::{CodecError, GgmlType};

/// Values in a block.
const BLOCK: usize = 128;
/// Bytes of a block.
const BLOCK_BYTES: usize = 32;
/// Where in a byte each quarter of a block lies.
const SHIFTS: [u32; 4] = [6, 4, 2, 0];

/// Which weights share a byte of an I2_S tensor; the first of them in the highest bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Byte `j` of every 32 has the values `j`, `j + 32`, `j + 64`, `j + 96` of a block of 128. Blocks
    /// run row-major over the whole tensor. Of bitnet.cpp's converter and its x86 builds.
    #[default]
    Blocks128,
    /// Byte `j` of every 16 has the values `j`, `j + 16`, `j + 32`, `j + 48` of a block of 64. Of its
    /// ARM builds.
    Blocks64,
    /// A byte has one column of four consecutive rows. Of its x86 builds without `ACT_PARALLEL`.
    Rows4,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Blocks128, Self::Blocks64, Self::Rows4];

    /// A name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blocks128 => "blocks of 128",
            Self::Blocks64 => "blocks of 64, as bitnet.cpp's ARM builds have it",
            Self::Rows4 => "four rows a byte, as some x86 builds of bitnet.cpp have it",
        }
    }

    /// Whether a matrix `(rows, cols)` fills whole blocks.
    pub(super) fn holds(self, rows: usize, cols: usize) -> bool {
        match self {
            Self::Blocks128 => (rows * cols).is_multiple_of(128),
            Self::Blocks64 => (rows * cols).is_multiple_of(64),
            Self::Rows4 => rows.is_multiple_of(4),
        }
    }

    /// Where the weight `(row, col)` of a matrix with `cols` columns lies: byte and shift.
    pub(super) fn place(self, row: usize, col: usize, cols: usize) -> (usize, u32) {
        let in_blocks = |width: usize| {
            let (block, i) = ((row * cols + col) / width, (row * cols + col) % width);
            (block * width / 4 + i % (width / 4), SHIFTS[i / (width / 4)])
        };
        match self {
            Self::Blocks128 => in_blocks(128),
            Self::Blocks64 => in_blocks(64),
            Self::Rows4 => (row / 4 * cols + col, SHIFTS[row % 4]),
        }
    }
}

/// Stores a matrix in `rows * cols / 4 + 32` bytes.
///
/// # Errors
/// [`CodecError::Blocks`] when `rows * cols` is no multiple of 128.
pub fn encode(matrix: &TernaryMatrix) -> Result<Vec<u8>, CodecError> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    check_order(Order::Blocks128, rows, cols)?;
    let mut out = vec![0; bytes(GgmlType::I2_S, rows, cols)?];
    let mut trits = vec![0; if rows > 0 { cols } else { 0 }];
    for row in 0..rows {
        matrix.unpack_row(row, &mut trits);
        pack(row, &trits, &mut out);
    }
    out[rows * cols / 4..][..4].copy_from_slice(&matrix.scale().to_le_bytes());
    Ok(out)
}

/// Adds the codes of a row to bytes that have none in their places yet.
fn pack(row: usize, trits: &[i8], out: &mut [u8]) {
    let cols = trits.len();
    if !cols.is_multiple_of(BLOCK) {
        for (col, trit) in trits.iter().enumerate() {
            let (byte, shift) = Order::Blocks128.place(row, col, cols);
            out[byte] |= ((trit + 1) as u8) << shift;
        }
        return;
    }
    let blocks = trits.as_chunks::<BLOCK>().0.iter();
    for (block, out) in blocks.zip(out[row * cols / 4..].as_chunks_mut::<BLOCK_BYTES>().0) {
        for (j, byte) in out.iter_mut().enumerate() {
            let code = |k: usize| ((block[j + k * BLOCK_BYTES] + 1) as u8) << SHIFTS[k];
            *byte = code(0) | code(1) | code(2) | code(3);
        }
    }
}

/// Takes a matrix `(rows, cols)` as it is stored.
///
/// # Errors
/// [`CodecError::Blocks`] when `rows * cols` is no multiple of 128; a wrong number of bytes, a code
/// 3, or a scale that is negative or not finite.
pub fn decode(data: &[u8], rows: usize, cols: usize) -> Result<TernaryMatrix, CodecError> {
    decode_ordered(data, rows, cols, Order::Blocks128)
}

/// As [`decode`], from any of the orders.
///
/// # Errors
/// As [`decode`]; [`CodecError::Blocks`] for a shape that does not fill the blocks of the order.
pub fn decode_ordered(
    data: &[u8],
    rows: usize,
    cols: usize,
    order: Order,
) -> Result<TernaryMatrix, CodecError> {
    let (codes, scale) = split(data, rows, cols, order)?;
    let unpack = |row, trits: &mut [i8]| unpack(codes, order, row, cols, trits);
    Ok(TernaryMatrix::from_trit_rows(rows, cols, scale, unpack)?)
}

/// Writes the first trits of a row of `cols`, as many as there is room for. A code 3 becomes 2.
pub(super) fn unpack(codes: &[u8], order: Order, row: usize, cols: usize, trits: &mut [i8]) {
    let first = row * cols / 4;
    let whole = |block: usize| cols.is_multiple_of(block) && trits.len().is_multiple_of(block);
    match order {
        Order::Blocks128 if whole(128) => {
            unpack_blocks::<128, 32>(&codes[first..], trits);
        }
        Order::Blocks64 if whole(64) => {
            unpack_blocks::<64, 16>(&codes[first..], trits);
        }
        Order::Rows4 => unpack_codes(&codes[row / 4 * cols..], SHIFTS[row % 4], trits),
        // Blocks that cross rows, or are wanted in part; few models have them.
        Order::Blocks128 | Order::Blocks64 => {
            for (col, trit) in trits.iter_mut().enumerate() {
                let (byte, shift) = order.place(row, col, cols);
                *trit = (codes[byte] >> shift & 3) as i8 - 1;
            }
        }
    }
}

/// Writes the trits of blocks of `VALUES` in `BYTES`.
fn unpack_blocks<const VALUES: usize, const BYTES: usize>(codes: &[u8], trits: &mut [i8]) {
    let blocks = trits.as_chunks_mut::<VALUES>().0.iter_mut();
    for (block, codes) in blocks.zip(codes.as_chunks::<BYTES>().0) {
        for (quarter, shift) in block.as_chunks_mut::<BYTES>().0.iter_mut().zip(SHIFTS) {
            unpack_codes(codes, shift, quarter);
        }
    }
}

/// Writes the trits whose codes lie at one place of each byte.
#[inline]
fn unpack_codes(codes: &[u8], shift: u32, trits: &mut [i8]) {
    for (trit, byte) in trits.iter_mut().zip(codes) {
        *trit = (byte >> shift & 3) as i8 - 1;
    }
}

/// The checked codes, and the scale.
fn split(data: &[u8], rows: usize, cols: usize, order: Order) -> Result<(&[u8], f32), CodecError> {
    let values = check(GgmlType::I2_S, data.len(), rows, cols)?;
    check_order(order, rows, cols)?;
    let (codes, tail) = data.split_at(values / 4);
    if let Some(index) = find_code_three(codes) {
        return Err(TernaryError::Code { index, byte: codes[index] }.into());
    }
    Ok((codes, f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]])))
}

pub(super) fn check_order(order: Order, rows: usize, cols: usize) -> Result<(), CodecError> {
    if order.holds(rows, cols) {
        return Ok(());
    }
    let (what, multiple, found) = match order {
        Order::Blocks128 => ("values", 128, rows.saturating_mul(cols)),
        Order::Blocks64 => ("values", 64, rows.saturating_mul(cols)),
        Order::Rows4 => ("rows", 4, rows),
    };
    Err(CodecError::Blocks { kind: GgmlType::I2_S, what, multiple, found })
}
