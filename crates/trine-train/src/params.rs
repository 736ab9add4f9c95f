//! The trainable parameters: variables under their Hugging Face names.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use half::{bf16, f16};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trine_format::names::{Part, TensorId};
use trine_format::{Dtype, ModelConfig, ModelFile, Quantization, Weight};
use trine_ternary::Precision;

use crate::TrainError;
use crate::config::MasterPrecision;

/// Named variables, of f32 or of bf16, in the order of their names: every loop over them is deterministic.
pub struct Params {
    vars: BTreeMap<String, Var>,
}

/// Every parameter of a model: its name and shape.
fn shapes(config: &ModelConfig) -> impl Iterator<Item = (String, Vec<usize>)> {
    config.tensor_ids().into_iter().map(|id| (id.canonical(), config.tensor_shape(id)))
}

impl Params {
    /// Fresh parameters: matrices from a normal distribution of deviation `init_std`, norms 1.
    ///
    /// # Errors
    /// When memory for the variables cannot be had.
    pub fn init(
        config: &ModelConfig,
        init_std: f32,
        seed: u64,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let mut vars = BTreeMap::new();
        for (stream, (name, shape)) in shapes(config).enumerate() {
            let n = shape.iter().product();
            let values = if shape.len() == 1 {
                vec![1.0; n]
            } else {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(stream as u64);
                normal(&mut rng, n, init_std)
            };
            vars.insert(name, Var::from_vec(values, shape, device)?);
        }
        Ok(Self { vars })
    }

    /// The parameters of a model on disk, widened to f32.
    ///
    /// Masters are needed: a model whose projections are stored as trits has none.
    ///
    /// # Errors
    /// A model without masters, or one that cannot be read.
    pub fn load(file: &ModelFile, device: &Device) -> Result<Self, TrainError> {
        Self::load_as(file, device, MasterPrecision::F32)
    }

    /// As [`Self::load`]; with masters of bf16, matrices become these one after the other, so that never all of
    /// them are f32.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub(crate) fn load_as(
        file: &ModelFile,
        device: &Device,
        masters: MasterPrecision,
    ) -> Result<Self, TrainError> {
        let config = file.config();
        if config.quantization == Quantization::Offline {
            return Err(TrainError::Checkpoint {
                path: file.path().to_owned(),
                message: "expected master weights, found packed trits".to_owned(),
            });
        }
        let mut vars = BTreeMap::new();
        for (name, shape) in shapes(config) {
            let values = file.dense(&name)?.to_f32();
            file.release(&name);
            let is_narrow = masters == MasterPrecision::Bf16 && shape.len() > 1;
            let var = if is_narrow {
                let values = values.into_iter().map(bf16::from_f32).collect();
                Var::from_vec::<_, bf16>(values, shape, device)
            } else {
                Var::from_vec(values, shape, device)
            };
            vars.insert(name, var?);
        }
        Ok(Self { vars })
    }

    /// The parameters of a network of `config`, of a model on disk: masters, or where it has trits, masters
    /// that quantize back to these. Sub-norms that it does not have are 1.
    ///
    /// # Errors
    /// A model that cannot be read, or scales that no masters have.
    pub(crate) fn load_masters(
        file: &ModelFile,
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let stored = file.config();
        let mut vars = BTreeMap::new();
        for id in config.tensor_ids() {
            let (name, shape) = (id.canonical(), config.tensor_shape(id));
            let values = match id {
                TensorId::Layer(layer, Part::Projection(p))
                    if stored.quantization == Quantization::Offline =>
                {
                    match file.projection(layer, p)? {
                        Weight::Dense(tensor) => tensor.to_f32(),
                        Weight::Ternary(matrix) => {
                            matrix.to_masters(None, Precision::F32).map_err(|e| {
                                let message = format!("{name}: {e}");
                                TrainError::Checkpoint { path: file.path().to_owned(), message }
                            })?
                        }
                    }
                }
                TensorId::Layer(_, Part::AttnSubNorm | Part::FfnSubNorm) if !stored.sub_norms => {
                    vec![1.0; shape.iter().product()]
                }
                _ => file.dense(&name)?.to_f32(),
            };
            file.release(&name);
            vars.insert(name, Var::from_vec(values, shape, device)?);
        }
        Ok(Self { vars })
    }

    /// Those of the parameters of a model on disk that are not projections, to stay as they are: matrices
    /// of 16 bits keep these, all others are widened to f32.
    ///
    /// # Errors
    /// A model that cannot be read.
    pub fn load_frozen(file: &ModelFile, device: &Device) -> Result<Self, TrainError> {
        let is_projection = |name: &str| {
            matches!(TensorId::from_canonical(name), Some(TensorId::Layer(_, Part::Projection(_))))
        };
        let mut vars = BTreeMap::new();
        for (name, shape) in shapes(file.config()).filter(|(name, _)| !is_projection(name)) {
            let tensor = file.dense(&name)?;
            let bits = tensor.data.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
            let var = match tensor.dtype {
                Dtype::BF16 if shape.len() > 1 => {
                    Var::from_vec(bits.map(bf16::from_bits).collect(), shape, device)
                }
                Dtype::F16 if shape.len() > 1 => {
                    Var::from_vec(bits.map(f16::from_bits).collect(), shape, device)
                }
                _ => Var::from_vec(tensor.to_f32(), shape, device),
            };
            file.release(&name);
            vars.insert(name, var?);
        }
        Ok(Self { vars })
    }

    /// Parameters that are made already.
    pub(crate) fn from_vars(vars: impl IntoIterator<Item = (String, Var)>) -> Self {
        Self { vars: vars.into_iter().collect() }
    }

    /// The variable of that name.
    ///
    /// # Errors
    /// When the model has no such parameter.
    pub fn get(&self, name: &str) -> candle_core::Result<&Tensor> {
        match self.vars.get(name) {
            Some(var) => Ok(var.as_tensor()),
            None => candle_core::bail!("the model has no parameter {name}"),
        }
    }

    /// Adds a variable that is not a tensor of the model's configuration, such as a learned scale.
    pub(crate) fn insert(&mut self, name: String, var: Var) {
        self.vars.insert(name, var);
    }

    /// The same variables, in the same memory.
    pub(crate) fn shared(&self) -> Self {
        Self { vars: self.vars.clone() }
    }

    /// Gives a parameter other values, of which bf16 has those of one that is kept in bf16.
    ///
    /// # Errors
    /// No such parameter, or one of another size.
    pub(crate) fn fill(&mut self, name: &str, values: Vec<f32>) -> candle_core::Result<()> {
        let Some(var) = self.vars.get(name) else {
            candle_core::bail!("the model has no parameter {name}");
        };
        var.set(&Tensor::from_vec(values, var.shape(), var.device())?.to_dtype(var.dtype())?)
    }

    /// Keeps matrices in bf16, rounded to the nearest; norms stay in f32.
    pub(crate) fn narrow(&mut self) -> candle_core::Result<()> {
        for var in self.vars.values_mut().filter(|var| var.rank() >= 2) {
            if var.dtype() == DType::F32 {
                *var = Var::from_tensor(&var.to_dtype(DType::BF16)?)?;
            }
        }
        Ok(())
    }

    /// All variables by name, in name order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.vars.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// Number of scalar parameters.
    pub fn count(&self) -> usize {
        self.vars.values().map(|var| var.elem_count()).sum()
    }
}

/// `n` samples of a normal distribution of mean 0 by the Box-Muller transform.
fn normal(rng: &mut ChaCha8Rng, n: usize, std: f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        // 1 - u is in (0, 1], so the logarithm is finite.
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let (sin, cos) = (rng.random::<f64>() * std::f64::consts::TAU).sin_cos();
        values.extend([(radius * cos) as f32 * std, (radius * sin) as f32 * std]);
    }
    values.truncate(n);
    values
}
