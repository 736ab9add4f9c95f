//! Projections and their gradients, in whichever arithmetic was asked for.

use std::sync::Arc;

use candle_core::Result;
use serde::{Deserialize, Serialize};
use trine_cuda::Kind;
use trine_kernels::bf16::{self, Left, Right, Scale, multiply};
use trine_kernels::gemm::{Matrix, Store, matmul};
use trine_kernels::int8::{self, Gradients, Inputs};
use trine_kernels::{Activations, PackedMatrix, bitlinear, bitlinear_add, bitlinear_all, parallel};
use trine_ternary::TernaryError;

use super::{Buffer, Found};
use crate::adapters::{Adapter, Mask};
use crate::ops::view;

/// In what the products of gradients are computed, and those of weights that are not ternary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// For ternary models, the forward products of whose projections stay exact, [`Self::Int8All`] where
    /// the CPU has AVX-512 with VNNI and a fast BF16 ([`bf16::is_fast`]), and [`Self::Int8F32`] where it has
    /// VNNI alone; otherwise [`Self::F32`].
    #[default]
    Auto,
    /// Single precision.
    F32,
    /// Factors rounded to bfloat16, sums in f32; in the forward pass of a step those of attention and head,
    /// and of a model in full precision all.
    Bf16,
    /// As [`Self::Bf16`], but what a ternary projection passes on to its input is multiplied as in the
    /// forward pass, by trits, after it was rounded to int8 row by row (SwitchBack, arXiv 2304.13013).
    Int8,
    /// As [`Self::Int8`], and the gradients of ternary weights are products of int8 too: of the codes of
    /// the forward pass, and of gradients rounded by blocks of tokens ([`trine_kernels::int8`]).
    Int8All,
    /// As [`Self::Int8All`], but all that is not of int8 is in single precision: for CPUs that multiply
    /// int8 fast and bfloat16 not.
    #[serde(rename = "int8-f32")]
    Int8F32,
}

impl Precision {
    /// The precision that is used on a GPU.
    #[must_use]
    pub fn on_card(self) -> Self {
        match self {
            Self::F32 => Self::F32,
            Self::Auto | Self::Bf16 | Self::Int8 | Self::Int8All | Self::Int8F32 => Self::Bf16,
        }
    }

    /// The numbers that a GPU multiplies for it.
    #[must_use]
    pub fn kind(self) -> Kind {
        match self.on_card() {
            Self::F32 => Kind::F32,
            _ => Kind::Bf16,
        }
    }

    /// Whether what ternary projections pass on to their inputs is multiplied in int8.
    pub(crate) fn has_int8_inputs(self) -> bool {
        matches!(self, Self::Int8 | Self::Int8All | Self::Int8F32)
    }

    /// Whether factors are rounded to bfloat16.
    fn is_bf16(self) -> bool {
        matches!(self, Self::Bf16 | Self::Int8 | Self::Int8All)
    }

    /// Whether gradients of ternary weights are multiplied in int8.
    pub(crate) fn has_int8_weights(self) -> bool {
        matches!(self, Self::Int8All | Self::Int8F32)
    }

    /// The precision that is used on this CPU, for a ternary model or one in full precision.
    ///
    /// Without VNNI, int8 gains little or loses: on Cascade Lake, in the bench's model of 10 million
    /// parameters, [`Self::Int8F32`] is 1.49 times as fast as [`Self::F32`] with `avx512vnni`, 1.11 times
    /// with `avx512`, 0.86 times with `avx2`.
    #[must_use]
    pub fn resolved(self, ternary: bool) -> Self {
        match self {
            Self::Auto if ternary && bf16::is_fast() => Self::Int8All,
            Self::Auto if ternary && int8::is_fast() => Self::Int8F32,
            Self::Auto => Self::F32,
            other => other,
        }
    }
}

/// What gradients are multiplied by before they become codes, whose definition takes rows below 1e-5 for
/// nothing: a power of two, which no bit is lost by.
const LARGE: f32 = (1u64 << 40) as f32;

/// The weights of a projection in a step, `(out, in)`.
pub(super) enum Weights {
    /// Trits with a scale.
    Ternary(PackedMatrix),
    /// Those of a model whose weights stay as they are.
    Frozen(Arc<PackedMatrix>),
    /// The masters themselves.
    Full,
    /// Masters with what ternarizing makes of them, `(1 - share) W + share Q(W)`.
    Mixed(Buffer),
}

impl Weights {
    /// The trits, unless the masters themselves are multiplied.
    pub(super) fn trits(&self) -> Option<&PackedMatrix> {
        match self {
            Self::Ternary(trits) => Some(trits),
            Self::Frozen(trits) => Some(trits),
            Self::Full | Self::Mixed(_) => None,
        }
    }

    /// Mixes masters `(out, in)` with what ternarizing makes of them.
    pub(super) fn mix(
        &mut self,
        masters: &[f32],
        [out, inp]: [usize; 2],
        share: f32,
    ) -> std::result::Result<(), TernaryError> {
        if !matches!(self, Self::Mixed(_)) {
            *self = Self::Mixed(Buffer::default());
        }
        if let Self::Mixed(mixed) = self {
            mixed.resize(out * inp);
            PackedMatrix::from_weights(masters, out, inp)?.dequantize(mixed);
            mix(mixed, masters, inp, share);
        }
        Ok(())
    }

    /// Ternarizes masters `(out, in)`, if the model is ternary.
    pub(super) fn refill(
        &mut self,
        ternary: bool,
        masters: &[f32],
        [out, inp]: [usize; 2],
    ) -> std::result::Result<(), TernaryError> {
        match self {
            Self::Ternary(packed) if ternary => return packed.refill(masters, out, inp),
            _ if ternary => *self = Self::Ternary(PackedMatrix::from_weights(masters, out, inp)?),
            _ => *self = Self::Full,
        }
        Ok(())
    }
}

/// The input of projections `(M, in)`, as it is multiplied.
pub(super) enum Input {
    /// int8 with a scale for each row.
    Codes(Activations),
    /// As it is.
    Floats(Buffer),
}

impl Input {
    /// Takes `rows` rows `(cols,)` that `fill` writes, quantized where the weights are ternary.
    pub(super) fn refill(
        &mut self,
        ternary: bool,
        rows: usize,
        cols: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        match self {
            Self::Codes(codes) if ternary => codes.refill(rows, cols, fill),
            _ if ternary => *self = Self::Codes(Activations::from_rows(rows, cols, fill)),
            Self::Codes(_) => {
                *self = Self::default();
                self.refill(ternary, rows, cols, fill);
            }
            Self::Floats(floats) => {
                floats.resize(rows * cols);
                parallel::for_each_chunk(floats, cols, fill);
            }
        }
    }
}

impl Input {
    /// As [`Self::refill`], of rows with what quantizing makes of them.
    pub(super) fn mix(
        &mut self,
        rows: usize,
        cols: usize,
        share: f32,
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let mut exact = Buffer::new(rows * cols);
        parallel::for_each_chunk(&mut exact, cols, fill);
        let floats = &exact;
        let codes = Activations::from_rows(rows, cols, |row, to| {
            to.copy_from_slice(&floats[row * cols..][..cols]);
        });
        let mut mixed = match std::mem::take(self) {
            Self::Floats(buffer) => buffer,
            Self::Codes(_) => Buffer::default(),
        };
        mixed.resize(rows * cols);
        codes.dequantize(&mut mixed);
        mix(&mut mixed, &exact, cols, share);
        *self = Self::Floats(mixed);
    }
}

/// `quantized = (1 - share) exact + share quantized`, both `(n, cols)`.
fn mix(quantized: &mut [f32], exact: &[f32], cols: usize, share: f32) {
    parallel::for_each_chunk(quantized, cols, |row, quantized| {
        let exact = &exact[row * cols..][..cols];
        quantized.iter_mut().zip(exact).for_each(|(q, x)| *q = (1.0 - share) * x + share * *q);
    });
}

impl Default for Input {
    fn default() -> Self {
        Self::Floats(Buffer::default())
    }
}

/// One projection of a step.
#[derive(Clone, Copy)]
pub(super) struct Projection<'a> {
    pub(super) out: usize,
    pub(super) inp: usize,
    /// The masters, `(out, in)`, or what they are mixed with, where these are multiplied.
    pub(super) masters: &'a [f32],
    pub(super) weights: &'a Weights,
}

/// The products of a step, and the memory that their sides need.
pub(super) struct Products {
    precision: Precision,
    left: Left,
    right: Right,
    /// A side in f32.
    floats: Buffer,
    /// The sides of gradients of weights in int8.
    gradients: Gradients,
    inputs: Inputs,
    /// A gradient as codes, and the trits that it meets, on their side.
    codes: Activations,
    turned: PackedMatrix,
    /// What lies between the two matrices of an adapter, `(M, r)`, and its gradient.
    low: Buffer,
    low_gradient: Buffer,
}

impl Products {
    pub(super) fn new(precision: Precision) -> Self {
        Self {
            precision,
            left: Left::default(),
            right: Right::default(),
            floats: Buffer::default(),
            gradients: Gradients::default(),
            inputs: Inputs::default(),
            codes: Activations::from_codes(&[], &[], 0),
            turned: PackedMatrix::default(),
            low: Buffer::default(),
            low_gradient: Buffer::default(),
        }
    }

    pub(super) fn is_bf16(&self) -> bool {
        self.precision.is_bf16()
    }

    /// Outputs `(M, out)` of projections with the same input.
    pub(super) fn forward<'a>(&mut self, input: &Input, work: &mut [(Projection<'a>, &mut [f32])]) {
        match input {
            Input::Codes(x) => {
                let trits = |p: &Projection<'a>| p.weights.trits().expect("codes meet trits");
                let pairs = work.iter_mut().map(|(p, y)| (trits(p), &mut **y));
                bitlinear_all(&mut pairs.collect::<Vec<_>>(), x);
            }
            Input::Floats(x) => {
                for (p, y) in work {
                    let rows = x.len() / p.inp;
                    let (x, masters) = (Matrix::plain(x), Matrix::turned(p.masters));
                    self.product([rows, p.inp, p.out], x, masters, Store::Set, y);
                }
            }
        }
    }

    /// `out = a b`, or that much more: `a` is `(m, k)`, `b` `(k, n)`.
    pub(super) fn product(
        &mut self,
        [m, k, n]: [usize; 3],
        a: Matrix<'_>,
        b: Matrix<'_>,
        store: Store,
        out: &mut [f32],
    ) {
        if !self.is_bf16() {
            return matmul([m, k, n], a, b, store, out);
        }
        match a.transposed {
            true => self.left.fill_columns(a.data, k, m),
            false => self.left.fill_rows(a.data, m, k),
        }
        match b.transposed {
            true => self.right.fill_columns(b.data, n, k),
            false => self.right.fill_rows(b.data, k, n),
        }
        multiply(&self.left, self.right.all(), Scale::One, store, out);
    }

    /// The gradient of a projection's input, `dX = dY W`: `dy` is `(M, out)`, `dx` `(M, in)`.
    pub(super) fn input_gradient(
        &mut self,
        dy: &[f32],
        p: &Projection<'_>,
        store: Store,
        dx: &mut [f32],
    ) {
        let rows = dy.len() / p.out;
        if let (true, Some(weights)) = (self.precision.has_int8_inputs(), p.weights.trits()) {
            self.codes.refill_scaled(dy, rows, p.out, LARGE);
            self.turned.transpose(weights, 1.0 / LARGE);
            return match store {
                Store::Set => bitlinear(&self.turned, &self.codes, dx),
                Store::Add => bitlinear_add(&self.turned, &self.codes, dx),
            };
        }
        if self.is_bf16() {
            let mut scale = 1.0;
            match p.weights.trits() {
                Some(weights) => {
                    scale = weights.scale();
                    self.right.fill_trits(weights);
                }
                None => self.right.fill_rows(p.masters, p.out, p.inp),
            }
            self.left.fill_rows(dy, rows, p.out);
            return multiply(&self.left, self.right.all(), Scale::All(scale), store, dx);
        }
        let weights = match p.weights.trits() {
            Some(weights) => {
                self.floats.resize(p.out * p.inp);
                weights.dequantize(&mut self.floats);
                &self.floats
            }
            None => p.masters,
        };
        matmul([rows, p.out, p.inp], Matrix::plain(dy), Matrix::plain(weights), store, dx);
    }

    /// Takes the input `(M, in)` of projections whose weights' gradients follow.
    pub(super) fn take_input(&mut self, input: &Input, inp: usize) {
        let bf16 = self.is_bf16();
        match input {
            Input::Codes(x) if self.precision.has_int8_weights() => self.inputs.fill(x),
            Input::Codes(x) if bf16 => self.right.fill_codes(x),
            Input::Codes(x) => {
                self.floats.resize(x.tokens() * inp);
                x.dequantize(&mut self.floats);
            }
            Input::Floats(x) if bf16 => self.right.fill_rows(x, x.len() / inp, inp),
            Input::Floats(_) => {}
        }
    }

    /// The gradient of a projection's weights, `dW = dY^T X`, `(out, in)`, of that of its output
    /// `(M, out)`; the input is that of [`Self::take_input`].
    pub(super) fn weight_gradient(
        &mut self,
        dy: &[f32],
        [rows, out, inp]: [usize; 3],
        input: &Input,
        dw: &mut [f32],
    ) {
        if let (true, Input::Codes(x)) = (self.precision.has_int8_weights(), input) {
            self.gradients.fill(dy, x.scales(), out);
            return int8::multiply(&self.gradients, &self.inputs, dw);
        }
        if self.is_bf16() {
            match input {
                Input::Codes(x) => {
                    let scales = x.scales();
                    self.left.fill_scaled_columns(dy, rows, out, |row| 1.0 / scales[row]);
                }
                Input::Floats(_) => self.left.fill_columns(dy, rows, out),
            }
            return multiply(&self.left, self.right.all(), Scale::One, Store::Set, dw);
        }
        let x = match input {
            Input::Codes(_) => &self.floats,
            Input::Floats(x) => x,
        };
        matmul([out, rows, inp], Matrix::turned(dy), Matrix::plain(x), Store::Set, dw);
    }

    /// Adds what an adapter makes of `x` `(M, in)` to `y` `(M, out)`.
    pub(super) fn adapt(
        &mut self,
        x: &[f32],
        adapter: Adapter<'_>,
        rows: usize,
        y: &mut [f32],
    ) -> Result<()> {
        let ([out, inp, rank], b) = (adapter.shape()?, adapter.scaled_b()?);
        let mut low = std::mem::take(&mut self.low);
        low.resize(rows * rank);
        let (x, a) = (Matrix::plain(x), view(adapter.a)?);
        self.product([rows, inp, rank], x, Matrix::turned(&a), Store::Set, &mut low);
        self.product([rows, rank, out], Matrix::plain(&low), Matrix::turned(&b), Store::Add, y);
        self.low = low;
        Ok(())
    }

    /// The gradients of an adapter, and what it adds to that of its input: of `dy` `(M, out)` and the
    /// input `x`, to `dx`, both `(M, in)`; what `mask` leaves out of the one gets nothing in the other.
    #[expect(clippy::too_many_arguments, reason = "a product has many sides")]
    pub(super) fn adapter_gradients(
        &mut self,
        x: &[f32],
        mask: Option<Mask>,
        adapter: Adapter<'_>,
        rows: usize,
        dy: &[f32],
        dx: &mut [f32],
        found: &mut Found<'_>,
    ) -> Result<()> {
        let ([out, inp, rank], b) = (adapter.shape()?, adapter.scaled_b()?);
        let (a, x) = (view(adapter.a)?, Matrix::plain(x));
        let (mut low, mut low_gradient) =
            (std::mem::take(&mut self.low), std::mem::take(&mut self.low_gradient));
        low.resize(rows * rank);
        low_gradient.resize(rows * rank);
        self.product([rows, inp, rank], x, Matrix::turned(&a), Store::Set, &mut low);
        let [a_name, b_name] = adapter.names;
        found.write(b_name, |db| {
            let (dy, low) = (Matrix::turned(dy), Matrix::plain(&low));
            self.product([out, rows, rank], dy, low, Store::Set, db);
            db.iter_mut().for_each(|db| *db *= adapter.scale as f32);
        })?;
        let (dy, b) = (Matrix::plain(dy), Matrix::plain(&b));
        self.product([rows, out, rank], dy, b, Store::Set, &mut low_gradient);
        found.write(a_name, |da| {
            self.product([rank, rows, inp], Matrix::turned(&low_gradient), x, Store::Set, da);
        })?;
        let (low_side, a) = (Matrix::plain(&low_gradient), Matrix::plain(&a));
        match mask {
            None => self.product([rows, rank, inp], low_side, a, Store::Add, dx),
            Some(mask) => {
                let mut all = std::mem::take(&mut self.floats);
                all.resize(rows * inp);
                self.product([rows, rank, inp], low_side, a, Store::Set, &mut all);
                parallel::for_each_chunk(dx, inp, |row, dx| {
                    for (at, dx) in (row * inp..).zip(dx) {
                        *dx += mask.factor(at) * all[at];
                    }
                });
                self.floats = all;
            }
        }
        (self.low, self.low_gradient) = (low, low_gradient);
        Ok(())
    }
}
