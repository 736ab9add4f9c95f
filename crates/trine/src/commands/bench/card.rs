//! `trine bench train --device cuda`: what a step of training costs on a card, ternary and in full
//! precision, beside what its products can do at most.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use trine_cuda::backend::{Buffer, Product};
use trine_cuda::profiled::Time;
use trine_cuda::{AdamW, Backend, Engine, Kind, Options, Profiled};
use trine_data::Batch;
use trine_format::{HiddenAct, ModelConfig, Quantization};
use trine_kernels::limits::Rate;
use trine_train::card;
use trine_train::config::DeviceConfig;

use super::train::{random, random_batch};
use crate::output;
use crate::progress::BenchProgress;

/// Steps before any is timed: the first ones choose algorithms and take memory.
const WARM_UP: usize = 3;

/// What is timed.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct CardArgs {
    /// Steps on a device instead of the CPU: cuda, cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceConfig::Cpu)]
    pub(super) device: DeviceConfig,
    /// Shape of the model on a device
    #[arg(long, value_enum, default_value_t = Shape::M125)]
    shape: Shape,
    /// Sequences of a step on a device
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Tokens of a sequence on a device
    #[arg(long, value_name = "N", default_value_t = 2048)]
    seq: usize,
    /// Also time every kernel of a ternary step on a device, each by itself
    #[arg(long, requires = "device")]
    kernels: bool,
}

/// Shapes with sub-norms, squared ReLU and a tied head, of other programs' benchmarks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Shape {
    /// 2 layers of 64: for the emulator
    Tiny,
    /// 12 layers of 768, vocabulary 32000
    #[value(name = "125m")]
    M125,
    /// 24 layers of 1024, vocabulary 32000
    #[value(name = "350m")]
    M350,
    /// 24 layers of 2048, vocabulary 32000
    #[value(name = "1b")]
    B1,
    /// That of microsoft/bitnet-b1.58-2B-4T
    #[value(name = "2b4t")]
    B2T4,
}

impl Shape {
    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |v| v.get_name().to_owned())
    }

    /// The model, and how many tokens a step takes by default.
    fn model(self) -> (ModelConfig, usize) {
        let (hidden, layers, heads, kv_heads, inner, vocab, tokens) = match self {
            Self::Tiny => (64, 2, 4, 2, 96, 512, 256),
            Self::M125 => (768, 12, 12, 12, 2048, 32000, 1 << 16),
            Self::M350 => (1024, 24, 16, 16, 2816, 32000, 1 << 15),
            Self::B1 => (2048, 24, 16, 16, 5632, 32000, 1 << 14),
            Self::B2T4 => (2560, 30, 20, 5, 6912, 128_256, 1 << 14),
        };
        let config = ModelConfig {
            hidden_size: hidden,
            intermediate_size: inner,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden / heads,
            vocab_size: vocab,
            max_position_embeddings: 1 << 16,
            rope_theta: 5e5,
            rms_norm_eps: 1e-5,
            hidden_act: HiddenAct::Relu2,
            sub_norms: true,
            projection_norm_eps: None,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            quantization: Quantization::Online,
        };
        (config, tokens)
    }
}

/// Operations of a step's products per token: three times two for every element of a matrix, the head's
/// among them, and for every pair of a causal attention's.
fn operations(config: &ModelConfig, tokens: usize) -> f64 {
    let [layers, width] = [config.num_hidden_layers, config.hidden_size];
    let attention = config.attention_width();
    let projections = width * (2 * attention + 2 * config.key_value_width())
        + 3 * width * config.intermediate_size;
    let matrices = layers * projections + config.vocab_size * width;
    6.0 * (matrices + layers * tokens * attention) as f64
}

/// A model of random parameters.
fn engine(
    device: &Arc<dyn Backend>,
    config: &ModelConfig,
    options: Options,
) -> anyhow::Result<Engine> {
    let mut engine = Engine::new(device.clone(), config, options)?;
    let mut next = random(1);
    let some: Vec<f32> =
        (0..1 << 20).map(|_| ((next() % 2001) as f32 / 1000.0 - 1.0) * 0.035).collect();
    let parameters: Vec<_> = engine.parameters().map(|(n, count)| (n.to_owned(), count)).collect();
    for (name, count) in parameters {
        let values = match name.contains("norm") {
            true => vec![1.0; count],
            false => (0..count).map(|i| some[(i * 7919 + i / 4099) % some.len()]).collect(),
        };
        engine.set(&name, &values)?;
    }
    Ok(engine)
}

/// A step as the trainer makes it.
fn step(engine: &mut Engine, data: &Batch, made: usize) -> anyhow::Result<f64> {
    let tokens = data.inputs.len();
    engine.begin()?;
    engine.add(data, 1.0 / tokens as f32)?;
    let loss = engine.loss()? / tokens as f64;
    let norm = engine.squares()?.iter().sum::<f64>().sqrt();
    engine.update(
        &AdamW {
            clip: (1.0 / norm).min(1.0) as f32,
            betas: [0.9, 0.95],
            eps: 1e-8,
            keep: 1.0 - 3e-5,
            step_size: 3e-4 / (1.0 - 0.9f32.powi(made as i32)),
            inverse_root_correction2: 1.0 / (1.0 - 0.95f32.powi(made as i32)).sqrt(),
            chance: made as u64,
        },
        None,
    )?;
    Ok(loss)
}

/// Operations per second of a large product of bf16.
fn limit(device: &Arc<dyn Backend>) -> anyhow::Result<f64> {
    let n = 8192;
    let product = Product {
        m: n,
        n,
        k: n,
        factors: Kind::Bf16,
        a_transposed: false,
        b_transposed: true,
        a_stride: n,
        b_stride: n,
        result: Kind::Bf16,
        c_stride: n,
        add: false,
    };
    let mut next = random(3);
    // Numbers of bf16 between 1 and 2, of either sign.
    let bytes: Vec<u8> = (0..n * n)
        .flat_map(|_| {
            let bits = next() as u16;
            (bits & 0x807f | 0x3f80).to_le_bytes()
        })
        .collect();
    let [a, b, c] = [(); 3].map(|()| Buffer::with(device, bytes.len()));
    let (a, b, c) = (a?, b?, c?);
    device.upload(a.at(), &bytes)?;
    device.upload(b.at(), &bytes)?;
    let mut best = f64::MAX;
    for _ in 0..4 {
        let begin = Instant::now();
        for _ in 0..10 {
            device.multiply(&product, a.at(), b.at(), c.at())?;
        }
        device.download(c.at(), &mut [0; 4])?;
        best = best.min(begin.elapsed().as_secs_f64() / 10.0);
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}

/// Times steps.
pub(super) fn run(
    args: CardArgs,
    options: Options,
    repetitions: usize,
    ternary_only: bool,
    json: bool,
) -> anyhow::Result<()> {
    let device = card::open(args.device)?.context("--device: expected another one than the CPU")?;
    let profiled = Arc::new(Profiled::new(device)?);
    let device: Arc<dyn Backend> = profiled.clone();
    let (config, tokens) = args.shape.model();
    let sequences = args.batch.unwrap_or((tokens / args.seq).max(1));
    if args.seq == 0 || sequences == 0 {
        bail!("--seq and --batch: expected at least 1, found 0");
    }
    let data = random_batch(sequences, args.seq, config.vocab_size, 2);
    let tokens = data.inputs.len() as f64;
    let full = ModelConfig { quantization: Quantization::None, ..config.clone() };
    let kinds = if ternary_only { vec![&config] } else { vec![&config, &full] };
    let progress = BenchProgress::new(kinds.len() * (repetitions + 1) + 1);
    progress.step("limits of the device");
    let limit = match options.kind {
        Kind::Bf16 if args.device != DeviceConfig::Emulator => Some(limit(&device)?),
        _ => None,
    };
    let (mut rates, mut kernels, mut memory) = (Vec::new(), Vec::new(), 0);
    for config in kinds {
        let free = device.memory()?.0;
        let mut engine = engine(&device, config, options)?;
        progress.step("warm-up");
        for made in 1..=WARM_UP {
            step(&mut engine, &data, made)?;
        }
        let mut speeds = Vec::new();
        for turn in 0..repetitions {
            progress.step("steps");
            let begin = Instant::now();
            let loss = step(&mut engine, &data, WARM_UP + turn + 1)?;
            speeds.push(tokens / begin.elapsed().as_secs_f64());
            if !loss.is_finite() {
                bail!("the loss became {loss}");
            }
        }
        if args.kernels && kernels.is_empty() {
            let made = WARM_UP + repetitions + 1;
            kernels = profiled.watch(|| step(&mut engine, &data, made).map(|_| ()))?;
        }
        memory = memory.max(free.saturating_sub(device.memory()?.0));
        rates.push(Rate::of(speeds).context("no step was timed")?);
    }
    drop(progress);
    let work = operations(&config, args.seq);
    let name = device.name();
    let report = Report { args, name, options, sequences, rates, kernels, memory, work, limit };
    output::print_line(&if json { report.json().to_string() } else { report.table() })
}

struct Report {
    args: CardArgs,
    name: String,
    options: Options,
    sequences: usize,
    /// Tokens per second, ternary and perhaps in full precision.
    rates: Vec<Rate>,
    /// What the kernels of a ternary step took.
    kernels: Vec<Time>,
    /// Bytes of the device.
    memory: usize,
    /// Operations of a token.
    work: f64,
    /// Operations per second.
    limit: Option<f64>,
}

impl Report {
    fn json(&self) -> Value {
        let full = self.rates.get(1).map(|rate| rate.median);
        let speed = self.rates[0];
        json!({
            "device": self.name,
            "shape": self.args.shape.name(),
            "batch": self.sequences,
            "seq": self.args.seq,
            "precision": match self.options.kind { Kind::Bf16 => "bf16", Kind::F32 => "f32" },
            "recompute": self.options.recompute,
            "tok_s": speed.median,
            "tok_s_low": speed.low,
            "tok_s_high": speed.high,
            "full_tok_s": full,
            "ternary_over_full_time": full.map(|full| full / speed.median),
            "tflop_s": speed.median * self.work / 1e12,
            "product_limit_tflop_s": self.limit.map(|limit| limit / 1e12),
            "fraction_of_limit": self.limit.map(|limit| speed.median * self.work / limit),
            "device_memory_bytes": self.memory,
            "kernels": self.kernels.iter().map(|time| json!({
                "name": time.name,
                "times": time.times,
                "milliseconds": time.seconds * 1e3,
                "tflop_s": (time.operations > 0.0).then(|| time.operations / time.seconds / 1e12),
            })).collect::<Vec<_>>(),
        })
    }

    fn table(&self) -> String {
        let mut text = format!(
            "{}: {} sequences of {} tokens, {:?}\n\n\
             | step           |                 tok/s | TFLOP/s |\n\
             | -------------- | --------------------: | ------: |\n",
            self.name, self.sequences, self.args.seq, self.options.kind,
        );
        for (kind, Rate { median, low, high }) in
            ["ternary", "full precision"].into_iter().zip(&self.rates)
        {
            let range = format!("{median:.0} ({low:.0} to {high:.0})");
            let rate = median * self.work / 1e12;
            text += &format!("| {kind:14} | {range:>21} | {rate:>7.0} |\n");
        }
        if let Some(limit) = self.limit {
            let share = self.rates[0].median * self.work / limit;
            text += &format!(
                "\nlimit       {:.0} % of {:.0} TFLOP/s, which a product of 8192 reaches\n",
                share * 100.0,
                limit / 1e12
            );
        }
        text += &format!("memory      {:.1} GB of the device", self.memory as f64 / 1e9);
        for (i, time) in self.kernels.iter().enumerate() {
            if i == 0 {
                text += "\n\n|       ms | times | TFLOP/s | kernel of a ternary step, waited for |\n\
                         | -------: | ----: | ------: | ------------------------------------ |";
            }
            let rate = match time.operations {
                0.0 => String::new(),
                operations => format!("{:.0}", operations / time.seconds / 1e12),
            };
            let Time { name, times, seconds, .. } = time;
            text += &format!("\n| {:8.2} | {times:5} | {rate:>7} | {name} |", seconds * 1e3);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_those_of_matrices_and_of_attention() {
        let (config, _) = Shape::M125.model();
        let matrices = 12 * (4 * 768 * 768 + 3 * 768 * 2048) + 32000 * 768;
        let expected = 6.0 * (matrices + 12 * 1024 * 768) as f64;
        assert_eq!(operations(&config, 1024), expected);
    }
}
