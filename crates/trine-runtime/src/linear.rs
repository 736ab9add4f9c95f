//! Projections, their inputs on the way in, and what adapters add to their outputs.

use std::cell::OnceCell;

use trine_kernels::nn::{self, Gate};
use trine_kernels::{Activations, PackedMatrix, parallel};

use crate::adapter::{Adapted, Place, adapt, adapts};
use crate::dense::DenseMatrix;

/// Tokens of which a thread adds up outputs, or multiplies gates, at a time.
const ADDED: usize = 16;

/// A projection: its weights, and the norm of its input in a model that has projection norms.
pub(crate) struct Projected {
    pub(crate) linear: Linear,
    pub(crate) norm: Option<Norm>,
    /// Where it is in its model, which says what adapters have for it.
    pub(crate) place: Place,
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
/// all that share them, and the floats only where some projection is not ternary or has an adapter.
pub(crate) struct Input<'a> {
    rows: Rows<'a>,
    tokens: usize,
    /// The rows that have adapters, in their order.
    adapted: &'a [Adapted],
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
    pub(crate) fn new(
        x: &'a [f32],
        tokens: usize,
        norm: Option<&'a Norm>,
        adapted: &'a [Adapted],
    ) -> Self {
        let rows = Rows { x, cols: x.len() / tokens, norm };
        Self { rows, tokens, adapted, floats: OnceCell::new(), quantized: OnceCell::new() }
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
        let rows = match self.floats.get() {
            Some(x) => Rows { x, norm: None, ..self.rows },
            None => self.rows,
        };
        self.quantized.get_or_init(|| {
            Activations::from_rows(self.tokens, rows.cols, |t, row| rows.write(t, row))
        })
    }

    /// Whether adapters add something to one of these projections; then their input is made first, as
    /// codes can be made of it.
    fn adapts<const N: usize>(&self, projections: [&Projected; N]) -> bool {
        let adapts = projections.into_iter().any(|p| adapts(self.adapted, p.place));
        if adapts {
            self.floats();
        }
        adapts
    }

    /// Adds to the outputs of projections what adapters make of their input.
    fn adapt<const N: usize>(&self, outs: [(&Projected, &mut [f32]); N]) {
        let outs = outs.map(|(p, out)| (p.place, out));
        adapt(self.adapted, self.floats(), self.tokens, outs);
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

    /// `out` `(T, rows)`, without what adapters add.
    fn forward(&self, input: &Input<'_>, out: &mut [f32]) {
        if let Some(norm) = &self.norm {
            let normed = Input::new(input.floats(), input.tokens, Some(norm), &[]);
            return self.linear.forward(&normed, out);
        }
        self.linear.forward(input, out);
    }

    /// Adds the output to `x` `(T, rows)`.
    pub(crate) fn add_to(&self, input: &Input<'_>, x: &mut [f32]) {
        let adapts = input.adapts([self]);
        match self.ternary() {
            Some(weights) if !adapts => {
                return trine_kernels::bitlinear_add(weights, input.quantized(), x);
            }
            _ => (),
        }
        let mut out = vec![0.0; x.len()];
        self.forward(input, &mut out);
        if adapts {
            input.adapt([(self, &mut out)]);
        }
        let width = x.len() / input.tokens;
        parallel::for_each_chunk(x, width * ADDED, |i, x| {
            x.iter_mut().zip(&out[i * width * ADDED..]).for_each(|(x, y)| *x += y);
        });
    }
}

/// Some projections of the same input, `(T, rows)` each.
pub(crate) fn forward_all<const N: usize>(
    projections: [&Projected; N],
    input: &Input<'_>,
    mut outs: [&mut [f32]; N],
) {
    let adapts = input.adapts(projections);
    let pairs = projections.into_iter().zip(&mut outs);
    if projections.iter().any(|p| p.ternary().is_none()) {
        pairs.for_each(|(p, out)| p.forward(input, out));
    } else {
        let ternary = pairs.filter_map(|(p, out)| Some((p.ternary()?, &mut **out)));
        trine_kernels::bitlinear_all(&mut ternary.collect::<Vec<_>>(), input.quantized());
    }
    if adapts {
        let mut projections = projections.into_iter();
        input.adapt(outs.map(|out| (projections.next().expect("one for each output"), out)));
    }
}

/// `out = activation(gate(input)) * up(input)`, `(T, rows)`.
pub(crate) fn forward_gated(
    activation: Gate,
    gate: &Projected,
    up: &Projected,
    input: &Input<'_>,
    out: &mut [f32],
) {
    if !input.adapts([gate, up])
        && let (Some(gate), Some(up)) = (gate.ternary(), up.ternary())
    {
        return trine_kernels::bitlinear_gated(activation, gate, up, input.quantized(), out);
    }
    let mut ups = vec![0.0; out.len()];
    forward_all([gate, up], input, [&mut *out, &mut ups]);
    let chunk = out.len() / input.tokens * ADDED;
    parallel::for_each_chunk(out, chunk, |i, out| {
        nn::gate(activation, out, &ups[i * chunk..][..out.len()]);
    });
}

impl Linear {
    fn forward(&self, input: &Input<'_>, out: &mut [f32]) {
        match self {
            Self::Ternary(w) => trine_kernels::bitlinear(w, input.quantized(), out),
            Self::Dense(w) => w.matmul(input.floats(), input.tokens, out),
        }
    }
}
