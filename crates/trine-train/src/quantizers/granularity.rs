//! Which weights of a matrix share a scale.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which weights of a matrix `(out, in)` share a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Granularity {
    /// All of them.
    #[default]
    Tensor,
    /// Those of a row, which make one output.
    Row,
    /// So many neighbours in a row; the last group of a row holds what is left.
    Group(usize),
}

impl Granularity {
    /// How many scales a matrix has.
    pub(crate) fn count(self, rows: usize, cols: usize) -> usize {
        match self {
            Self::Tensor => 1,
            Self::Row => rows,
            Self::Group(size) => rows * cols.div_ceil(size),
        }
    }

    /// The weights that share a scale, in the order of the scales.
    pub(crate) fn parts(self, values: &[f32], cols: usize) -> Vec<&[f32]> {
        match self {
            Self::Tensor => vec![values],
            Self::Row => values.chunks(cols).collect(),
            Self::Group(size) => values.chunks(cols).flat_map(|row| row.chunks(size)).collect(),
        }
    }

    /// As [`Self::parts`], to be written.
    pub(crate) fn parts_mut(self, values: &mut [f32], cols: usize) -> Vec<&mut [f32]> {
        match self {
            Self::Tensor => vec![values],
            Self::Row => values.chunks_mut(cols).collect(),
            Self::Group(size) => {
                values.chunks_mut(cols).flat_map(|row| row.chunks_mut(size)).collect()
            }
        }
    }
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tensor => f.write_str("tensor"),
            Self::Row => f.write_str("row"),
            Self::Group(size) => write!(f, "group:{size}"),
        }
    }
}

impl FromStr for Granularity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = |n: &str| n.parse().ok().filter(|size| *size > 0).map(Self::Group);
        match text {
            "tensor" => Some(Self::Tensor),
            "row" => Some(Self::Row),
            _ => text.strip_prefix("group:").and_then(size),
        }
        .ok_or_else(|| format!("expected `tensor`, `row` or `group:<size>`, found `{text}`"))
    }
}

impl TryFrom<String> for Granularity {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Granularity> for String {
    fn from(granularity: Granularity) -> Self {
        granularity.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_many_as_scales_and_hold_every_weight_once() {
        for (rows, cols) in [(1, 1), (3, 7), (5, 64), (2, 65)] {
            let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            for text in ["tensor", "row", "group:1", "group:32", "group:1000"] {
                let granularity: Granularity = text.parse().unwrap();
                assert_eq!(granularity.to_string(), text);
                let parts = granularity.parts(&values, cols);
                assert_eq!(parts.len(), granularity.count(rows, cols), "{text} ({rows}, {cols})");
                assert_eq!(parts.concat(), values);
                let mut written = vec![0.0; rows * cols];
                for (out, part) in granularity.parts_mut(&mut written, cols).iter_mut().zip(&parts)
                {
                    out.copy_from_slice(part);
                }
                assert_eq!(written, values);
            }
        }
    }

    #[test]
    fn other_names_are_refused() {
        for text in ["", "column", "group", "group:", "group:0", "group:-1"] {
            assert!(text.parse::<Granularity>().is_err(), "{text}");
        }
    }
}
