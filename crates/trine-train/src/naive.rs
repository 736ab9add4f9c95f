//! The network as a tutorial would write it, of Candle's own operations: the straight-through estimator
//! by the detach trick, attention with all its weights at once, Candle's AdamW. Nothing is trained
//! with it; `trine bench train` measures against it.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, ops::softmax};
use trine_data::Batch;
use trine_format::{HiddenAct, ModelConfig, Projection, names};

use crate::{Params, TrainError};

/// A model that is trained step by step.
pub struct Naive {
    config: ModelConfig,
    params: Params,
    optimizer: AdamW,
}

impl Naive {
    /// Fresh parameters of `config`, updated at `learning_rate`.
    ///
    /// # Errors
    /// When memory for the variables cannot be had.
    pub fn new(config: ModelConfig, learning_rate: f64) -> std::result::Result<Self, TrainError> {
        let params = Params::init(&config, 0.02, 0, &Device::Cpu)?;
        let vars: Vec<Var> = params.iter().map(|(_, var)| var.clone()).collect();
        let settings = ParamsAdamW { lr: learning_rate, beta2: 0.95, ..ParamsAdamW::default() };
        let optimizer = AdamW::new(vars, settings)?;
        Ok(Self { config, params, optimizer })
    }

    /// One update; returns the loss before it.
    ///
    /// # Errors
    /// What Candle finds.
    pub fn step(&mut self, batch: &Batch) -> Result<f32> {
        let shape = (batch.batch, batch.seq_len);
        let inputs = Tensor::from_slice(&batch.inputs, shape, &Device::Cpu)?;
        let targets = Tensor::from_slice(&batch.targets, batch.targets.len(), &Device::Cpu)?;
        let logits = self.logits(&inputs)?;
        let loss = candle_nn::loss::cross_entropy(&logits, &targets)?;
        self.optimizer.backward_step(&loss)?;
        loss.to_scalar()
    }

    /// `(B T, V)`
    fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let embed = self.params.get(names::EMBED)?;
        let mut x = embed.index_select(&ids.flatten_all()?, 0)?.reshape((b, t, ()))?;
        for layer in 0..self.config.num_hidden_layers {
            x = (&x + self.attention(layer, &x)?)?;
            x = (&x + self.feed_forward(layer, &x)?)?;
        }
        let x = self.norm(names::FINAL_NORM, &x)?;
        let head = if self.config.tie_word_embeddings { names::EMBED } else { names::HEAD };
        x.reshape((b * t, ()))?.matmul(&self.params.get(head)?.t()?)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = self.params.get(name)?;
        candle_nn::ops::rms_norm_slow(x, weight, self.config.rms_norm_eps)
    }

    fn projection(&self, layer: usize, p: Projection, x: &Tensor) -> Result<Tensor> {
        let weight = self.params.get(&names::projection(layer, p))?;
        let scale = 1.0 / weight.abs()?.mean_all()?.to_scalar::<f32>()?.max(1e-5);
        let scale = f64::from(scale);
        let ternary = ((weight * scale)?.round()?.clamp(-1f32, 1f32)? / scale)?;
        let weight = (weight + (ternary - weight)?.detach())?;
        let largest = x.abs()?.max_keepdim(D::Minus1)?.clamp(1e-5f32, f32::MAX)?;
        let scale = (largest.recip()? * 127.0)?;
        let codes = x.broadcast_mul(&scale)?.round()?.clamp(-128f32, 127f32)?;
        let x = (x + (codes.broadcast_div(&scale)? - x)?.detach())?;
        let (b, t, width) = x.dims3()?;
        x.reshape((b * t, width))?.matmul(&weight.t()?)?.reshape((b, t, ()))
    }

    fn attention(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let config = &self.config;
        let (b, t, _) = x.dims3()?;
        let x = self.norm(&names::input_norm(layer), x)?;
        let heads = |p, n| -> Result<Tensor> {
            let y = self.projection(layer, p, &x)?;
            y.reshape((b, t, n, config.head_dim))?.transpose(1, 2)?.contiguous()
        };
        let (n, kv) = (config.num_attention_heads, config.num_key_value_heads);
        let (cos, sin) = config.rope_tables(t);
        let table = |x| Tensor::from_vec(x, (t, config.head_dim / 2), &Device::Cpu);
        let (cos, sin) = (table(cos)?, table(sin)?);
        let q = candle_nn::rotary_emb::rope_slow(&heads(Projection::Q, n)?, &cos, &sin)?;
        let k = candle_nn::rotary_emb::rope_slow(&heads(Projection::K, kv)?, &cos, &sin)?;
        let v = heads(Projection::V, kv)?;
        let repeat = |x: &Tensor| -> Result<Tensor> {
            let shape = (b, kv, n / kv, t, config.head_dim);
            x.unsqueeze(2)?.broadcast_as(shape)?.reshape((b, n, t, ()))
        };
        let (k, v) = (repeat(&k)?, repeat(&v)?);
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
        let masked = |i: usize| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 };
        let mask = Tensor::from_vec((0..t * t).map(masked).collect(), (t, t), &Device::Cpu)?;
        let weights = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let mut y = weights.matmul(&v)?.transpose(1, 2)?.reshape((b, t, ()))?;
        if config.sub_norms {
            y = self.norm(&names::attn_sub_norm(layer), &y)?;
        }
        self.projection(layer, Projection::O, &y)
    }

    fn feed_forward(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let x = self.norm(&names::post_attention_norm(layer), x)?;
        let gate = self.projection(layer, Projection::Gate, &x)?;
        let gate = match self.config.hidden_act {
            HiddenAct::Relu2 => gate.relu()?.sqr()?,
            HiddenAct::Silu => gate.silu()?,
        };
        let mut y = (gate * self.projection(layer, Projection::Up, &x)?)?;
        if self.config.sub_norms {
            y = self.norm(&names::ffn_sub_norm(layer), &y)?;
        }
        self.projection(layer, Projection::Down, &y.to_dtype(DType::F32)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bitnet;

    #[test]
    fn the_naive_network_is_the_network() {
        let toml = "[model]\nhidden_size = 32\nintermediate_size = 48\nnum_hidden_layers = 2\n\
                    num_attention_heads = 4\nnum_key_value_heads = 2\n[data]\nseq_len = 12\n";
        let config = crate::RunConfig::parse(toml, "test".as_ref(), &[]).unwrap();
        let config = config.model_config(40, None, None).unwrap();
        let ids = |from: u32| (from..from + 24).map(|i| i * 7 % 40).collect::<Vec<u32>>();
        let batch = Batch { inputs: ids(0), targets: ids(1), starts: None, batch: 2, seq_len: 12 };
        let model =
            Bitnet::new(config.clone(), Params::init(&config, 0.02, 0, &Device::Cpu).unwrap());
        let tensor = |ids: &[u32]| Tensor::from_slice(ids, (2, 12), &Device::Cpu).unwrap();
        let loss = model.unwrap().loss(&tensor(&batch.inputs), &tensor(&batch.targets)).unwrap();
        let expected = loss.to_scalar::<f32>().unwrap();
        let mut naive = Naive::new(config, 1e-2).unwrap();
        let found = naive.step(&batch).unwrap();
        assert!((found - expected).abs() < 1e-3, "{found}, not {expected}");
        for _ in 0..5 {
            naive.step(&batch).unwrap();
        }
        assert!(naive.step(&batch).unwrap() < 0.9 * expected, "it does not learn");
    }
}
