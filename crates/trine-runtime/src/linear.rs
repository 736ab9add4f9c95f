//! Projections, and their inputs on the way in.

use std::cell::OnceCell;

use trine_kernels::nn::{self, Gate};
use trine_kernels::{Activations, PackedMatrix, parallel};

use crate::dense::DenseMatrix;

/// A projection: its weights, and the norm of its input in a model that has projection norms.
pub(crate) struct Projected {
    pub(crate) linear: Linear,
    pub(crate) norm: Option<Norm>,
}

/// The weights of a projection: ternary, or dense in a full-precision baseline.
pub(crate) enum Linear {
    /// Trits with one scale.
    Ternary(PackedMatrix),
    /// Full precision.
    Dense(DenseMatrix),
}

/// An RMSNorm.
pub(crate) struct Norm {
    /// `(n,)`
    pub(crate) weight: Vec<f32>,
    /// What is added to the mean square.
    pub(crate) eps: f32,
}

/// Activations `(tokens, cols)` on their way into projections: each form is made at most once, for
/// all that share them, and the floats only where some projection is not ternary.
pub(crate) struct Input<'a> {
    rows: Rows<'a>,
    tokens: usize,
    floats: OnceCell<Vec<f32>>,
    quantized: OnceCell<Activations>,
}

/// What an input is made of.
#[derive(Clone, Copy)]
struct Rows<'a> {
    /// `(tokens, cols)`
    x: &'a [f32],
    cols: usize,
    /// Applied to every row.
    norm: Option<&'a Norm>,
}

impl Rows<'_> {
    fn write(self, t: usize, out: &mut [f32]) {
        let x = &self.x[t * self.cols..][..self.cols];
        match self.norm {
            Some(norm) => {
                nn::rms_norm(x, &norm.weight, norm.eps, out);
            }
            None => out.copy_from_slice(x),
        }
    }
}

impl<'a> Input<'a> {
    /// `x`, `(tokens, cols)`, after `norm` if there is one.
    pub(crate) fn new(x: &'a [f32], tokens: usize, norm: Option<&'a Norm>) -> Self {
        let rows = Rows { x, cols: x.len() / tokens, norm };
        Self { rows, tokens, floats: OnceCell::new(), quantized: OnceCell::new() }
    }

    fn floats(&self) -> &[f32] {
        let rows = self.rows;
        if rows.norm.is_none() {
            return rows.x;
        }
        self.floats.get_or_init(|| {
            let mut floats = vec![0.0; rows.x.len()];
            parallel::for_each_chunk(&mut floats, rows.cols, |t, row| rows.write(t, row));
            floats
        })
    }

    fn quantized(&self) -> &Activations {
        let rows = self.rows;
        self.quantized.get_or_init(|| {
            Activations::from_rows(self.tokens, rows.cols, |t, row| rows.write(t, row))
        })
    }
}

impl Projected {
    /// The weights, where nothing but a ternary product stands between input and output.
    fn ternary(&self) -> Option<&PackedMatrix> {
        match (&self.linear, &self.norm) {
            (Linear::Ternary(weights), None) => Some(weights),
            _ => None,
        }
    }

    /// `out` `(T, rows)`.
    pub(crate) fn forward(&self, input: &Input<'_>, out: &mut [f32]) {
        if let Some(norm) = &self.norm {
            return self.linear.forward(&Input::new(input.floats(), input.tokens, Some(norm)), out);
        }
        self.linear.forward(input, out);
    }

    /// Adds the output to `x` `(T, rows)`.
    pub(crate) fn add_to(&self, input: &Input<'_>, x: &mut [f32]) {
        if let Some(weights) = self.ternary() {
            return trine_kernels::bitlinear_add(weights, input.quantized(), x);
        }
        let mut out = vec![0.0; x.len()];
        self.forward(input, &mut out);
        x.iter_mut().zip(&out).for_each(|(x, y)| *x += y);
    }
}

/// Some projections of the same input, `(T, rows)` each.
pub(crate) fn forward_all<const N: usize>(
    projections: [&Projected; N],
    input: &Input<'_>,
    outs: [&mut [f32]; N],
) {
    if projections.iter().any(|p| p.ternary().is_none()) {
        return projections.into_iter().zip(outs).for_each(|(p, out)| p.forward(input, out));
    }
    let pairs = projections.into_iter().zip(outs);
    let mut pairs: Vec<_> = pairs.filter_map(|(p, out)| Some((p.ternary()?, out))).collect();
    trine_kernels::bitlinear_all(&mut pairs, input.quantized());
}

/// `out = activation(gate(input)) * up(input)`, `(T, rows)`.
pub(crate) fn forward_gated(
    activation: Gate,
    gate: &Projected,
    up: &Projected,
    input: &Input<'_>,
    out: &mut [f32],
) {
    if let (Some(gate), Some(up)) = (gate.ternary(), up.ternary()) {
        return trine_kernels::bitlinear_gated(activation, gate, up, input.quantized(), out);
    }
    let mut ups = vec![0.0; out.len()];
    gate.forward(input, out);
    up.forward(input, &mut ups);
    nn::gate(activation, out, &ups);
}

impl Linear {
    fn forward(&self, input: &Input<'_>, out: &mut [f32]) {
        match self {
            Self::Ternary(w) => trine_kernels::bitlinear(w, input.quantized(), out),
            Self::Dense(w) => w.matmul(input.floats(), input.tokens, out),
        }
    }
}
