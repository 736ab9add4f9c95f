//! What a layer keeps from its forward pass for the backward pass: what its products made.
//!
//! Everything between two products is cheap and is done again from these. An output of a ternary
//! projection is a whole number times what its row has in common, and 16 bits hold that number, so a
//! gate is kept in two bytes and comes back to the bit (`trine_kernels::rescale_sums`).

use trine_format::{ModelConfig, Projection};
use trine_kernels::{bitlinear_sums, rescale_sums};

use super::products::{self, Input, Products, Weights};

/// Outputs of a projection `(M, out)`.
pub(super) enum Output<'a> {
    /// The integer sums of trits and codes.
    Sums(&'a mut [i16]),
    Floats(&'a mut [f32]),
}

impl Output<'_> {
    /// Writes row `row` `(out,)` of what `weights` made of `input`.
    pub(super) fn row(&self, (weights, input): (&Weights, &Input), row: usize, to: &mut [f32]) {
        let at = row * to.len();
        match (self, weights.trits(), input) {
            (Self::Sums(sums), Some(trits), Input::Codes(x)) => {
                rescale_sums(&sums[at..][..to.len()], trits, x, row, to);
            }
            (Self::Floats(floats), ..) => to.copy_from_slice(&floats[at..][..to.len()]),
            _ => unreachable!("sums are of trits and codes"),
        }
    }
}

/// Outputs of projections with the same input, all as sums or all as floats.
pub(super) fn project(
    products: &mut Products,
    input: &Input,
    work: &mut [(Projection, products::Projection<'_>, &mut Output<'_>)],
) {
    let (mut sums, mut floats) = (Vec::new(), Vec::new());
    for (_, p, output) in work {
        match (&mut **output, p.weights.trits()) {
            (Output::Sums(y), Some(trits)) => sums.push((trits, &mut **y)),
            (Output::Floats(y), _) => floats.push((*p, &mut **y)),
            _ => unreachable!("sums are of trits and codes"),
        }
    }
    match input {
        Input::Codes(x) if floats.is_empty() => bitlinear_sums(&mut sums, x),
        _ => products.forward(input, &mut floats),
    }
}

/// What is kept of a layer.
pub(super) struct Kept<'a> {
    /// What attention returned, `(M, H d)`.
    pub(super) y: &'a mut [f32],
    /// Of the first six of [`Projection::ALL`]: the last one's become the input of the next layer.
    pub(super) outputs: [Output<'a>; 6],
}

/// How large it is.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    rows: usize,
    heads_width: usize,
    widths: [usize; 6],
    sums: bool,
}

impl Form {
    /// Of `rows` rows; of outputs as sums, or as floats.
    pub(crate) fn new(config: &ModelConfig, rows: usize, sums: bool) -> Self {
        let heads_width = config.num_attention_heads * config.head_dim;
        let widths = std::array::from_fn(|i| config.projection_shape(Projection::ALL[i]).0);
        Self { rows, heads_width, widths, sums }
    }

    /// Floats that take as much memory.
    pub(crate) fn floats(self) -> usize {
        let outputs = self.rows * self.widths.iter().sum::<usize>();
        self.rows * self.heads_width + if self.sums { outputs.div_ceil(2) } else { outputs }
    }

    /// The places of everything in memory of at least [`Self::floats`].
    pub(super) fn within(self, memory: &mut [f32]) -> Kept<'_> {
        let (y, rest) = memory.split_at_mut(self.rows * self.heads_width);
        let sizes = self.widths.map(|width| self.rows * width);
        let outputs = match self.sums {
            true => cut(bytemuck::cast_slice_mut(rest), sizes).map(Output::Sums),
            false => cut(rest, sizes).map(Output::Floats),
        };
        Kept { y, outputs }
    }
}

fn cut<T>(mut from: &mut [T], sizes: [usize; 6]) -> [&mut [T]; 6] {
    sizes.map(|size| from.split_off_mut(..size).expect("memory of the size of its form"))
}
