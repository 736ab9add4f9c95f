//! The network: a BitNet b1.58 decoder (arXiv 2402.17764; 2B4T report, arXiv 2504.12285).
//!
//! Per layer: RMSNorm, grouped-query attention with rotary positions, a sub-norm before the output
//! projection; RMSNorm, gated feed-forward with squared ReLU or SiLU, a sub-norm before the down
//! projection. No biases. Embedding, norms and head stay in full precision.
//! Shapes: B batch, T tokens, D hidden, H query heads, K key/value heads, d head, F feed-forward,
//! V vocabulary.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use trine_data::IGNORED;
use trine_format::{ModelConfig, ModelFile, Projection, Quantization, Weight, names};
use trine_kernels::{Activations, PackedMatrix};

use crate::adapters::Adapters;
use crate::ops::RopeTables;
use crate::quantizers::Scheme;
use crate::{Params, TrainError, ops};

/// A model over its parameters.
pub struct Bitnet {
    config: ModelConfig,
    params: Params,
    rope: RopeTables,
    /// None for the default.
    scheme: Option<Scheme>,
    /// Updates made.
    step: usize,
    /// Projections that stay as they are, by name; then the parameters hold none.
    frozen: BTreeMap<String, Arc<PackedMatrix>>,
    /// What is trained in place of the parameters.
    adapters: Option<Adapters>,
}

impl Bitnet {
    /// The network of `config` over `params`.
    ///
    /// # Errors
    /// A configuration that makes no sense.
    pub fn new(config: ModelConfig, params: Params) -> std::result::Result<Self, TrainError> {
        config.validate()?;
        let rope = Arc::new(config.rope_tables(config.max_position_embeddings));
        let frozen = BTreeMap::new();
        Ok(Self { config, params, rope, scheme: None, step: 0, frozen, adapters: None })
    }

    /// A model on disk that stays as it is: what [`Self::with_adapters`] adds is trained. Of a ternary one
    /// projections stay packed, in 2 bits; masters, where the file has them, are ternarized once. Only
    /// [`fused`](crate::fused) trains beside it.
    ///
    /// # Errors
    /// A model that cannot be read.
    pub fn frozen(file: &ModelFile) -> std::result::Result<Self, TrainError> {
        let config = file.config().clone();
        if config.quantization == Quantization::None {
            return Self::new(config, Params::load(file, &Device::Cpu)?);
        }
        let mut model = Self::new(config, Params::load_frozen(file, &Device::Cpu)?)?;
        for layer in 0..model.config.num_hidden_layers {
            for p in Projection::ALL {
                let name = names::projection(layer, p);
                let Weight::Ternary(matrix) = file.projection(layer, p)? else {
                    return Err(TrainError::Checkpoint {
                        path: file.path().to_owned(),
                        message: format!("{name}: expected trits, found full precision"),
                    });
                };
                file.release(&name);
                model.frozen.insert(name, Arc::new(PackedMatrix::from(&matrix)));
            }
        }
        Ok(model)
    }

    /// The same network with adapters, which are trained while everything else stays as it is.
    #[must_use]
    pub fn with_adapters(mut self, adapters: Adapters) -> Self {
        self.adapters = Some(adapters);
        self
    }

    /// A model of the same weights, in the same memory, with other adapters.
    ///
    /// # Errors
    /// None, but for what a configuration may be refused for.
    pub(crate) fn beside(&self, adapters: Adapters) -> std::result::Result<Self, TrainError> {
        let model = Self::new(self.config.clone(), self.params.shared())?;
        Ok(Self { frozen: self.frozen.clone(), adapters: Some(adapters), ..model })
    }

    /// The adapters, if the model has them.
    pub fn adapters(&self) -> Option<&Adapters> {
        self.adapters.as_ref()
    }

    /// The parameters that are trained.
    pub fn trained(&self) -> &Params {
        self.adapters.as_ref().map_or(&self.params, Adapters::params)
    }

    /// The parameters that are trained, to be kept otherwise.
    pub(crate) fn trained_mut(&mut self) -> &mut Params {
        match &mut self.adapters {
            Some(adapters) => adapters.params_mut(),
            None => &mut self.params,
        }
    }

    /// A projection that stays as it is.
    pub(crate) fn frozen_weights(&self, name: &str) -> Option<&Arc<PackedMatrix>> {
        self.frozen.get(name)
    }

    /// The same network with projections that are quantized otherwise. Learned scales that the
    /// parameters do not hold yet begin with what the scheme says.
    ///
    /// # Errors
    /// Masters that are not finite.
    pub fn with_scheme(mut self, scheme: Scheme) -> std::result::Result<Self, TrainError> {
        scheme.add_scales(&self.config, &mut self.params)?;
        self.scheme = Some(scheme);
        Ok(self)
    }

    /// How projections are quantized, where it is not the default.
    pub fn scheme(&self) -> Option<&Scheme> {
        self.scheme.as_ref()
    }

    /// Tells how many updates were made: a warm-up from full precision depends on it.
    pub fn set_step(&mut self, step: usize) {
        self.step = step;
    }

    /// How many updates were made, as [`Self::set_step`] was told.
    pub fn step(&self) -> usize {
        self.step
    }

    /// What the network looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Cosines and sines of the rotary embedding, `(positions, d/2)` each.
    pub(crate) fn rope(&self) -> &RopeTables {
        &self.rope
    }

    /// Logits `(B, T, V)` for `ids` `(B, T)` u32.
    ///
    /// # Errors
    /// More tokens than positions, ids outside the vocabulary, masters that are not finite.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        Pass { gradients: true, ..Pass::over(self) }.logits(ids)
    }

    /// Mean cross entropy in nats of `targets` `(B, T)` given `inputs` `(B, T)`, both u32. Targets of
    /// [`IGNORED`] do not count.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn loss(&self, inputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        self.loss_within(inputs, targets, None)
    }

    /// As [`Self::loss`], where no position sees anything before its start; `starts` is `(B, T)`.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn loss_within(
        &self,
        inputs: &Tensor,
        targets: &Tensor,
        starts: Option<&[u32]>,
    ) -> Result<Tensor> {
        Pass { gradients: true, starts: shared(starts), ..Pass::over(self) }.loss(inputs, targets)
    }

    /// As [`Self::loss_within`], without what a backward pass would need: activations are freed as the
    /// pass goes on.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn evaluate(
        &self,
        inputs: &Tensor,
        targets: &Tensor,
        starts: Option<&[u32]>,
    ) -> Result<Tensor> {
        Pass { starts: shared(starts), ..Pass::over(self) }.loss(inputs, targets)
    }

    /// Logits `(B, V)` after position `positions[b]` of every row of `ids` `(B, T)`, without what a
    /// backward pass would need.
    ///
    /// # Errors
    /// As [`Self::forward`], or a position that there is not.
    pub fn logits_at(&self, ids: &Tensor, positions: &[usize]) -> Result<Tensor> {
        let pass = Pass::over(self);
        let x = pass.hidden(ids)?;
        let row = |(b, &t): (usize, &usize)| x.get(b)?.narrow(0, t, 1);
        let rows = positions.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?;
        pass.head(&Tensor::stack(&rows, 0)?)?.squeeze(1)
    }

    /// Shows `visit` what every projection multiplies when the network reads `ids` `(B, T)`: the
    /// name of its weight and its input `(B, T, in)`, before it is rounded.
    ///
    /// # Errors
    /// As [`Self::forward`], or what `visit` returns.
    pub fn projection_inputs(&self, ids: &Tensor, visit: Visit<'_>) -> Result<()> {
        Pass { visit: Some(visit), ..Pass::over(self) }.hidden(ids).map(|_| ())
    }
}

/// What [`Bitnet::projection_inputs`] shows inputs to: the name of a weight, and its input.
pub type Visit<'a> = &'a dyn Fn(&str, &Tensor) -> Result<()>;

/// One forward pass.
struct Pass<'a> {
    model: &'a Bitnet,
    /// Whether Candle is to remember the pass.
    gradients: bool,
    /// The first position that each one sees, `(B, T)`.
    starts: Option<Arc<Vec<u32>>>,
    /// Shown the input of every projection.
    visit: Option<Visit<'a>>,
}

fn shared(starts: Option<&[u32]>) -> Option<Arc<Vec<u32>>> {
    starts.map(|starts| Arc::new(starts.to_vec()))
}

impl<'a> Pass<'a> {
    /// A pass that is forgotten.
    fn over(model: &'a Bitnet) -> Self {
        Self { model, gradients: false, starts: None, visit: None }
    }

    fn param(&self, name: &str) -> Result<Tensor> {
        let tensor = self.model.params.get(name)?;
        let tensor = if self.gradients { tensor.clone() } else { tensor.detach() };
        tensor.to_dtype(DType::F32)
    }

    fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        self.head(&self.hidden(ids)?)
    }

    /// What the head multiplies, `(B, T, D)`.
    fn hidden(&self, ids: &Tensor) -> Result<Tensor> {
        let config = &self.model.config;
        let (b, t) = ids.dims2()?;
        if t > config.max_position_embeddings {
            candle_core::bail!(
                "{t} tokens, but the model has {} positions",
                config.max_position_embeddings
            );
        }
        let embed = self.param(names::EMBED)?;
        let mut x = embed.index_select(&ids.flatten_all()?, 0)?.reshape((b, t, ()))?;
        for layer in 0..config.num_hidden_layers {
            x = (&x + self.attention(layer, &x)?)?;
            x = (&x + self.feed_forward(layer, &x)?)?;
        }
        self.norm(names::FINAL_NORM, &x)
    }

    fn head(&self, x: &Tensor) -> Result<Tensor> {
        let head = if self.model.config.tie_word_embeddings { names::EMBED } else { names::HEAD };
        linear(x, &self.param(head)?)
    }

    fn loss(&self, inputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let (mut hidden, mut targets) = (self.hidden(inputs)?, targets.flatten_all()?);
        let ids: Vec<u32> = targets.to_vec1()?;
        let at: Vec<u32> =
            (0..).zip(&ids).filter(|(_, id)| **id != IGNORED).map(|(at, _)| at).collect();
        if at.len() < ids.len() {
            let at = Tensor::new(at, targets.device())?;
            targets = targets.index_select(&at, 0)?;
            hidden = hidden.flatten_to(1)?.index_select(&at, 0)?.unsqueeze(0)?;
        }
        let logits = self.head(&hidden)?.reshape(((), self.model.config.vocab_size))?;
        ops::cross_entropy(&logits, &targets)
    }

    fn attention(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let config = &self.model.config;
        let x = self.norm(&names::input_norm(layer), x)?;
        let q = self.projection(layer, Projection::Q, &x)?;
        let k = self.projection(layer, Projection::K, &x)?;
        let v = self.projection(layer, Projection::V, &x)?;
        let mut y = {
            let (d, rope) = (config.head_dim, &self.model.rope);
            ops::attention(&q, &k, &v, d, rope, self.starts.as_ref())?
        };
        if config.sub_norms {
            y = self.norm(&names::attn_sub_norm(layer), &y)?;
        }
        self.projection(layer, Projection::O, &y)
    }

    fn feed_forward(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let config = &self.model.config;
        let x = self.norm(&names::post_attention_norm(layer), x)?;
        let gate = self.projection(layer, Projection::Gate, &x)?;
        let up = self.projection(layer, Projection::Up, &x)?;
        let mut y = ops::gate(&gate, &up, config.hidden_act)?;
        if config.sub_norms {
            y = self.norm(&names::ffn_sub_norm(layer), &y)?;
        }
        self.projection(layer, Projection::Down, &y)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.param(name)?, self.model.config.rms_norm_eps)
    }

    fn projection(&self, layer: usize, p: Projection, x: &Tensor) -> Result<Tensor> {
        let name = names::projection(layer, p);
        let normed = match self.model.config.projection_norm_eps {
            Some(eps) => {
                Some(ops::rms_norm(x, &self.param(&names::projection_norm(layer, p))?, eps)?)
            }
            None => None,
        };
        let x = normed.as_ref().unwrap_or(x);
        if let Some(visit) = self.visit {
            visit(&name, x)?;
        }
        let y = match self.model.frozen_weights(&name) {
            Some(weights) => self.frozen(x, weights, &name),
            None => self.product(x, &name, p),
        }?;
        let adapted = match &self.model.adapters {
            Some(adapters) => adapters.with(layer, p, |adapter| {
                let (a, b) = (adapter.a.to_dtype(DType::F32)?, adapter.b.to_dtype(DType::F32)?);
                &y + (linear(&linear(x, &a)?, &b)? * adapter.scale)?
            })?,
            None => None,
        };
        Ok(adapted.unwrap_or(y))
    }

    /// A projection whose weights stay packed, which has no gradient here.
    fn frozen(&self, x: &Tensor, weights: &PackedMatrix, name: &str) -> Result<Tensor> {
        if self.gradients {
            candle_core::bail!("{name} is packed, its gradients are those of `fused`");
        }
        let (b, t, inp) = x.dims3()?;
        let rows: Vec<f32> = x.flatten_all()?.to_vec1()?;
        let mut y = vec![0.0; b * t * weights.rows()];
        trine_kernels::bitlinear(weights, &Activations::quantize(&rows, b * t, inp), &mut y);
        Tensor::from_vec(y, (b, t, weights.rows()), x.device())
    }

    /// A projection of masters.
    fn product(&self, x: &Tensor, name: &str, p: Projection) -> Result<Tensor> {
        let weight = self.param(name)?;
        let step = self.model.step;
        match (self.model.config.quantization, &self.model.scheme) {
            (Quantization::None, _) => linear(x, &weight),
            (_, Some(scheme)) if !scheme.is_default(step) => {
                let scales = match scheme.learns() {
                    true => Some(self.param(&scheme.scales_name(name))?),
                    false => None,
                };
                scheme.linear(x, &weight, scales.as_ref(), p, name, step)
            }
            _ => ops::bitlinear(x, &weight, name),
        }
    }
}

/// `x W^T` in f32: `x` is `(B, T, in)`, `weight` `(out, in)`.
pub(crate) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (b, t, inp) = x.dims3()?;
    x.reshape((b * t, inp))?.matmul(&weight.t()?)?.reshape((b, t, ()))
}
