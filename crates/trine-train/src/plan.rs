//! What a run will need, before it begins: parameters, memory, and the time that no step can be below.
//!
//! Memory is counted from what the trainer keeps: parameters with gradients and moments, the state of
//! layers between the forward and the backward pass, and the buffers of products and of the head. What
//! the program needs beside it is not in it.

use serde::Serialize;
use trine_format::{ModelConfig, Projection, Quantization};
use trine_kernels::limits::Limits;

use crate::batching::BatchPlan;
use crate::config::{DeviceConfig, MasterPrecision, Method, MomentStorage};
use crate::fused::{BLOCK, Form, LEAST_ROWS, LITTLE, Precision, work_bytes, works_kept};
use crate::{RunConfig, TrainError, card};

/// What of a model is trained, beside the weights that are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// Numbers that are trained.
    pub trained: u64,
    /// Trits that stay as they are.
    pub frozen_trits: u64,
    /// Other numbers that stay as they are.
    pub frozen: u64,
}

/// Bytes that a run needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Parameters: masters, or packed trits, and everything in f32 beside them.
    pub parameters: u64,
    /// A gradient for every number that is trained.
    pub gradients: u64,
    /// What the optimizer keeps from one step to the next.
    pub moments: u64,
    /// What the backward pass needs of the forward pass.
    pub activations: u64,
    /// The sides of products, and logits.
    pub buffers: u64,
    /// A model beside the one in training: a teacher, or what preferences are compared with.
    pub beside: u64,
}

impl Memory {
    /// All of it.
    pub fn total(self) -> u64 {
        let state = self.parameters + self.gradients + self.moments;
        state + self.activations + self.buffers + self.beside
    }
}

/// What a run needs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// Numbers by what becomes of them.
    pub parameters: Parameters,
    /// Bytes of the machine's memory.
    pub memory: Memory,
    /// Bytes of the memory of a device, where steps are made on one, besides what CUDA has there itself.
    pub device_memory: Option<u64>,
    /// Tokens of a step, padding included.
    pub tokens: usize,
    /// Products of a token.
    #[serde(skip)]
    pub work: Work,
}

impl Plan {
    /// Of a run with a network of `model`, and one that stays as it is `beside` it.
    ///
    /// # Errors
    /// Adapters for projections that there are not, or a model that its device does not compute.
    pub fn new(
        config: &RunConfig,
        model: &ModelConfig,
        beside: Option<&ModelConfig>,
    ) -> Result<Self, TrainError> {
        let lora = config.finetune.as_ref().filter(|f| f.method == Method::Lora);
        let targets = lora.map(|f| f.lora.projections()).transpose()?;
        let rank = lora.map_or(0, |f| f.lora.rank);
        let layers = model.num_hidden_layers;
        let shapes = Projection::ALL.map(|p| model.projection_shape(p));
        let [blocks, all] = sizes(model);
        let ternary = model.quantization != Quantization::None;
        let parameters = match &targets {
            None => Parameters { trained: all as u64, ..Parameters::default() },
            Some(targets) => {
                let shape = |p: &Projection| model.projection_shape(*p);
                let sizes = targets.iter().map(shape).map(|(out, inp)| rank * (out + inp));
                let trits = if ternary { blocks } else { 0 };
                Parameters {
                    trained: (layers * sizes.sum::<usize>()) as u64,
                    frozen_trits: trits as u64,
                    frozen: (all - trits) as u64,
                }
            }
        };
        let plan = BatchPlan::new(&config.train);
        let part = plan.parts(config.train.batch_warmup_steps).max().unwrap_or(1);
        let rows = part * config.data.seq_len;
        let moment = match config.optimizer.moments {
            MomentStorage::F32 => 8,
            MomentStorage::Int8 => 2,
        };
        let master = match config.optimizer.masters {
            MasterPrecision::F32 => 4,
            MasterPrecision::Bf16 => 2,
        };
        let at_once = match config.train.update_in_backward {
            true => all - blocks + blocks / layers,
            false => parameters.trained as usize,
        };
        // Masters in bf16 are widened a projection at a time.
        let widest = shapes.iter().map(|(out, inp)| out * inp).max().unwrap_or(0);
        let widened = if master == 2 { 4 * widest } else { 0 };
        // What a card has instead is counted apart: this is the memory of the machine.
        let here = |bytes: u64| if config.train.device == DeviceConfig::Cpu { bytes } else { 0 };
        let memory = Memory {
            // Matrices that stay as they are mostly have 16 bits.
            parameters: master * parameters.trained
                + 2 * parameters.frozen
                + parameters.frozen_trits / 4,
            gradients: here(4 * at_once as u64),
            moments: moment * parameters.trained,
            activations: here(activations(config, model, rows, targets.is_some())),
            buffers: here(buffers(model, rows) + widened as u64),
            beside: beside.map_or(0, |model| frozen(model, rows)),
        };
        let precision = config.train.precision.resolved(ternary);
        let adapters = lora.map(|_| parameters.trained);
        let work = Work::new(model, config.data.seq_len, adapters, precision);
        let again = config.train.recompute_activations;
        let work = if again { work.with_recomputation() } else { work };
        let tokens = config.train.batch_size * config.data.seq_len;
        let device_memory = match config.train.device {
            DeviceConfig::Cpu => None,
            _ => Some(card::memory(config, model, part)?),
        };
        Ok(Self { parameters, memory, device_memory, tokens, work })
    }

    /// The fewest seconds that a step can take with the limits of a machine.
    pub fn seconds(&self, limits: &Limits) -> f64 {
        self.tokens as f64 * self.work.seconds(limits)
    }
}

/// Numbers of a model: those of its projections, and all.
fn sizes(model: &ModelConfig) -> [usize; 2] {
    let shapes = Projection::ALL.map(|p| model.projection_shape(p));
    let layer = shapes.iter().map(|(out, inp)| out * inp).sum::<usize>();
    let ids = model.tensor_ids().into_iter();
    let all = ids.map(|id| model.tensor_shape(id).iter().product::<usize>()).sum();
    [model.num_hidden_layers * layer, all]
}

/// Bytes of a model that is not trained: packed where it is ternary, and the layer that it runs.
fn frozen(model: &ModelConfig, rows: usize) -> u64 {
    let [blocks, all] = sizes(model);
    let parameters = match model.quantization {
        Quantization::None => 4 * all,
        _ => blocks / 4 + 2 * (all - blocks),
    };
    let layer = rows * (6 * model.hidden_size + 4 * model.intermediate_size);
    (parameters + 4 * layer) as u64
}

/// Bytes that the layers keep for the backward pass, beside the gradients, which take the place of some of
/// them; and what is at hand of the layer that is at work, or of all where that is kept.
fn activations(config: &RunConfig, model: &ModelConfig, rows: usize, adapted: bool) -> u64 {
    let (d, f) = (model.hidden_size, model.intermediate_size);
    let ternary = model.quantization != Quantization::None;
    let shapes = Projection::ALL.map(|p| model.projection_shape(p));
    let sums = ternary && !adapted && config.quantizer.lambda_steps == 0;
    let kept = 4 * Form::new(model, rows, sums).floats();
    let weights = shapes.iter().map(|(out, inp)| out * inp).sum::<usize>();
    let packed = if ternary && !adapted { weights / 4 } else { 0 };
    let layers = model.num_hidden_layers;
    let states = match config.train.recompute_activations {
        true => kept + packed,
        false => {
            // The gradients of a layer lie where the layer above has kept its things.
            let in_place = !adapted && !config.train.update_in_backward;
            let beside = if in_place { kept.saturating_sub(4 * weights) } else { kept };
            kept + layers.saturating_sub(1) * beside + layers * packed
        }
    };
    let mixed = config.quantizer.lambda_steps > 0;
    let at_hand = work_bytes(model, rows, ternary, adapted || mixed || !ternary);
    let little = if config.train.recompute_activations { 0 } else { LITTLE };
    let at_hand = works_kept(model, at_hand, little) * at_hand;
    (states + at_hand + rows * (8 * f + (layers + 1) * d * 4)) as u64
}

/// Bytes of the sides of products, and of the head.
fn buffers(model: &ModelConfig, rows: usize) -> u64 {
    let (d, f, vocab) = (model.hidden_size, model.intermediate_size, model.vocab_size);
    // Two sides in bfloat16, and the gradient of an input.
    let products = 2 * rows * f + 2 * d * f + 4 * rows * f;
    let head = rows.min(LEAST_ROWS) * (4 * vocab + 8 * d) + 4 * BLOCK;
    (products + head) as u64
}

/// Products of a token in a step, by the arithmetic that they are done in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Ternary, of the forward pass.
    forward: f64,
    /// Of the other gradients, and of the head.
    gradients: f64,
    /// Of those gradients of ternary projections that are multiplied in int8.
    in_int8: f64,
    /// Of attention: scores and weighted sums forward, five such products backward.
    attention: f64,
    /// Of attention's forward pass alone.
    attention_forward: f64,
}

impl Work {
    /// Of sequences of `seq_len` tokens; of a frozen model with so many numbers of `adapters`, or of one
    /// that is trained.
    pub fn new(
        config: &ModelConfig,
        seq_len: usize,
        adapters: Option<u64>,
        precision: Precision,
    ) -> Self {
        let layers = config.num_hidden_layers as f64;
        let shapes = Projection::ALL.map(|p| config.projection_shape(p));
        let blocks = layers * shapes.iter().map(|(out, inp)| (out * inp) as f64).sum::<f64>();
        let head = (config.vocab_size * config.hidden_size) as f64;
        // A query sees half of the sequence.
        let product =
            layers * (config.num_attention_heads * config.head_dim * seq_len) as f64 / 2.0;
        let ternary = config.quantization != Quantization::None;
        let gradients = match adapters {
            None => 2.0 * blocks + 3.0 * head,
            // The input's gradient alone, and all three products of an adapter.
            Some(adapters) => blocks + 2.0 * head + 3.0 * adapters as f64,
        };
        let inputs = if ternary && precision.has_int8_inputs() { blocks } else { 0.0 };
        let weights = match adapters {
            None if ternary && precision.has_int8_weights() => blocks,
            _ => 0.0,
        };
        Self {
            forward: blocks,
            gradients: gradients - inputs - weights,
            in_int8: inputs + weights,
            attention: 7.0 * product,
            attention_forward: 2.0 * product,
        }
    }

    /// With layers that run a second time in the backward pass.
    #[must_use]
    fn with_recomputation(self) -> Self {
        let attention = self.attention + self.attention_forward;
        Self { forward: 2.0 * self.forward, attention, ..self }
    }

    /// The fewest seconds a token can take: projections in int8, or their backward pass in what it is;
    /// head, attention and what is left of gradients in bfloat16 where that is faster than f32.
    pub fn seconds(&self, limits: &Limits) -> f64 {
        let f32 = limits.f32.median / 2.0;
        let bf16 = limits.bf16.map_or(f32, |rate| rate.median / 2.0);
        (self.forward + self.in_int8) / limits.int8.median
            + (self.gradients + self.attention) / bf16
    }
}
