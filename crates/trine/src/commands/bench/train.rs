//! `trine bench train`: what a step of training costs, ternary, in full precision, and as it would be
//! written naively, in turn, beside what the machine could do at the time; and on a card.

use std::num::NonZeroUsize;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use trine_data::Batch;
use trine_format::{ModelConfig, Quantization};
use trine_kernels::limits::{Limits, Rate};
use trine_train::config::{DeviceConfig, OptimizerConfig};
use trine_train::fused::{Engine, Options, Precision};
use trine_train::naive::Naive;
use trine_train::optimizer::{self, Optimizer};
use trine_train::plan::Work;
use trine_train::schedule::Rates;
use trine_train::{Bitnet, Device, Params, RunConfig};

use super::card::{self, CardArgs};
use super::{machine, measure_limits};
use crate::output;
use crate::progress::BenchProgress;

/// Options of `trine bench train`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Parameters of the model without its embedding
    #[arg(long, value_enum, default_value_t = Size::M10)]
    size: Size,
    /// Threads; by default one for each processor
    #[arg(short, long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// How many steps of each kind are timed
    #[arg(short, long, value_name = "N", default_value = "5")]
    repetitions: NonZeroUsize,
    /// Only the ternary steps
    #[arg(long)]
    ternary_only: bool,
    /// In what gradients are multiplied
    #[arg(long, value_name = "TYPE", value_parser = precision, default_value = "auto")]
    precision: Precision,
    /// Keep only the input of every layer, and run it again in the backward pass
    #[arg(long)]
    recompute: bool,
    /// Overrides a value of [optimizer], e.g. --set optimizer.moments=int8
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    #[command(flatten)]
    card: CardArgs,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// Shapes with a vocabulary of 4096 and sequences of 256.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Size {
    /// 6 layers of 128, 16 sequences
    #[value(name = "1m")]
    M1,
    /// 6 layers of 384, 16 sequences
    #[value(name = "10m")]
    M10,
    /// 11 layers of 640, 8 sequences
    #[value(name = "50m")]
    M50,
    /// 14 layers of 896, 8 sequences
    #[value(name = "125m")]
    M125,
}

const SEQ_LEN: usize = 256;
const VOCAB: usize = 4096;

/// A sample is of as many steps as take this long, as those of a run follow each other: after something
/// else, caches are cold.
const SAMPLE_SECONDS: f64 = 1.0;

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "auto" => Ok(Precision::Auto),
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        "int8" => Ok(Precision::Int8),
        "int8-all" => Ok(Precision::Int8All),
        "int8-f32" => Ok(Precision::Int8F32),
        _ => Err("expected auto, f32, bf16, int8, int8-all or int8-f32".to_owned()),
    }
}

impl Size {
    /// The model, and how many sequences a step takes.
    fn model(self) -> anyhow::Result<(ModelConfig, usize)> {
        let (width, layers, heads, kv_heads, inner, batch) = match self {
            Self::M1 => (128, 6, 4, 2, 352, 16),
            Self::M10 => (384, 6, 6, 3, 1024, 16),
            Self::M50 => (640, 11, 10, 5, 1728, 8),
            Self::M125 => (896, 14, 14, 7, 2432, 8),
        };
        let mut config = RunConfig::default();
        config.model.hidden_size = width;
        config.model.num_hidden_layers = layers;
        config.model.num_attention_heads = heads;
        config.model.num_key_value_heads = kv_heads;
        config.model.intermediate_size = inner;
        config.model.max_position_embeddings = SEQ_LEN;
        Ok((config.model_config(VOCAB, None, None)?, batch))
    }

    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |v| v.get_name().to_owned())
    }
}

/// Numbers of 31 bits that look random.
pub(super) fn random(mut state: u64) -> impl FnMut() -> u64 {
    move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    }
}

/// Random ids.
pub(super) fn random_batch(sequences: usize, seq_len: usize, vocab: usize, turn: u64) -> Batch {
    let mut next = random(turn);
    let ids: Vec<u32> = (0..=sequences * seq_len).map(|_| (next() % vocab as u64) as u32).collect();
    let (inputs, targets) = (ids[..ids.len() - 1].to_vec(), ids[1..].to_vec());
    Batch { inputs, targets, starts: None, batch: sequences, seq_len }
}

fn batch(sequences: usize, turn: u64) -> Batch {
    random_batch(sequences, SEQ_LEN, VOCAB, turn)
}

/// A model with its optimizer, as the trainer steps it.
struct Run {
    model: Bitnet,
    engine: Engine,
    optimizer: Optimizer,
}

impl Run {
    fn new(
        config: ModelConfig,
        options: Options,
        optimizer: OptimizerConfig,
    ) -> anyhow::Result<Self> {
        let ternary = config.quantization != Quantization::None;
        let mut params = Params::init(&config, 0.02, 0, &Device::Cpu)?;
        let optimizer = Optimizer::new(optimizer, 0, &params);
        optimizer.prepare(&mut params)?;
        Ok(Self {
            model: Bitnet::new(config, params)?,
            engine: Engine::new(options, ternary),
            optimizer,
        })
    }

    fn step(&mut self, batch: &Batch) -> anyhow::Result<()> {
        // As in the trainer, gradients are measured before they are used.
        let (_, gradients) = self.engine.gradients(&self.model, batch)?;
        let norm = optimizer::global_norm(&gradients)?;
        let rates = Rates { learning_rate: 3e-4, weight_decay: 0.1 };
        Ok(self.optimizer.update(self.model.params(), &gradients, norm, rates)?)
    }
}

/// The optimizer of the steps.
fn optimizer_config(overrides: &[String]) -> anyhow::Result<OptimizerConfig> {
    if let Some(other) = overrides.iter().find(|setting| !setting.starts_with("optimizer.")) {
        bail!("--set {other}: expected a key of [optimizer]");
    }
    Ok(RunConfig::parse("", Path::new("the default configuration"), overrides)?.optimizer)
}

/// How many steps a sample takes, found by two of them.
fn sample_steps(step: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<usize> {
    step()?;
    let begin = Instant::now();
    step()?;
    Ok((SAMPLE_SECONDS / begin.elapsed().as_secs_f64()).ceil().max(1.0) as usize)
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.card.device != DeviceConfig::Cpu {
        if let Some(setting) = args.overrides.first() {
            bail!("--set {setting}: only for steps on the CPU");
        }
        let options = trine_cuda::Options {
            kind: args.precision.kind(),
            recompute: args.recompute,
            narrow_masters: false,
        };
        let repetitions = args.repetitions.get();
        return card::run(args.card, options, repetitions, args.ternary_only, args.json);
    }
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .build_global()
            .context("cannot start the threads")?;
    }
    let threads = trine_kernels::threads();
    let ((config, sequences), optimizer) = (args.size.model()?, optimizer_config(&args.overrides)?);
    let (tokens, repetitions) = ((sequences * SEQ_LEN) as f64, args.repetitions.get());
    let kinds = if args.ternary_only { 1 } else { 3 };
    let progress = BenchProgress::new(kinds * (repetitions + 1) + 1);
    machine::forget_peak();
    let options = Options { precision: args.precision, recompute: args.recompute };
    let mut ternary = Run::new(config.clone(), options, optimizer.clone())?;
    progress.step("ternary, warm-up");
    let mut steps = [sample_steps(&mut || ternary.step(&batch(sequences, 0)))?, 0, 0];
    let peak = machine::memory().map(|memory| memory.peak);
    let mut others = None;
    if !args.ternary_only {
        let full = ModelConfig { quantization: Quantization::None, ..config.clone() };
        let options = Options { precision: Precision::F32, ..options };
        let mut full = Run::new(full, options, optimizer.clone())?;
        let mut naive = Naive::new(config.clone(), 3e-4)?;
        progress.step("f32, warm-up");
        steps[1] = sample_steps(&mut || full.step(&batch(sequences, 0)))?;
        progress.step("naive, warm-up");
        steps[2] = sample_steps(&mut || Ok(naive.step(&batch(sequences, 0)).map(|_| ())?))?;
        others = Some((full, naive));
    }
    progress.step("limits of the machine");
    let mut limits = vec![measure_limits(threads)];
    let (mut speeds, mut shares) = ([const { Vec::new() }; 3], [const { Vec::new() }; 2]);
    let works = [args.precision.resolved(true), Precision::Bf16]
        .map(|precision| Work::new(&config, SEQ_LEN, None, precision));
    for turn in 0..repetitions {
        let data = batch(sequences, 2 + turn as u64);
        let time = |steps: usize, step: &mut dyn FnMut() -> anyhow::Result<()>| {
            let begin = Instant::now();
            (0..steps).try_for_each(|_| step())?;
            anyhow::Ok(steps as f64 * tokens / begin.elapsed().as_secs_f64())
        };
        progress.step("ternary");
        let speed = time(steps[0], &mut || ternary.step(&data))?;
        limits.push(measure_limits(threads));
        // What disturbs a measurement of a limit makes it smaller: the better of the two counts.
        let around = &limits[limits.len() - 2..];
        for (shares, work) in shares.iter_mut().zip(&works) {
            let least = around.iter().map(|limits| work.seconds(limits)).fold(f64::MAX, f64::min);
            shares.push(least * speed);
        }
        speeds[0].push(speed);
        if let Some((full, naive)) = &mut others {
            progress.step("f32");
            speeds[1].push(time(steps[1], &mut || full.step(&data))?);
            progress.step("naive");
            speeds[2].push(time(steps[2], &mut || Ok(naive.step(&data).map(|_| ())?))?);
        }
    }
    drop(progress);
    let [tok_s, f32_tok_s, naive_tok_s] = speeds.map(Rate::of);
    let [share, mixed_share] = shares.map(Rate::of);
    let report = Report {
        size: args.size.name(),
        parameters: config.parameter_count() - (VOCAB * config.hidden_size) as u64,
        threads,
        precision: args.precision.resolved(true),
        recompute: args.recompute,
        optimizer,
        tok_s: tok_s.context("no step was timed")?,
        f32_tok_s,
        naive_tok_s,
        share: share.context("no step was timed")?,
        mixed_share: mixed_share.context("no step was timed")?,
        peak,
        limits,
    };
    output::print_line(&if args.json { report.json().to_string() } else { report.table() })
}

struct Report {
    size: String,
    /// Without the embedding.
    parameters: u64,
    threads: usize,
    precision: Precision,
    recompute: bool,
    optimizer: OptimizerConfig,
    tok_s: Rate,
    f32_tok_s: Option<Rate>,
    naive_tok_s: Option<Rate>,
    /// Of what the machine could do in the arithmetic of the steps.
    share: Rate,
    /// Of what it could do with a forward pass in int8 and gradients in bfloat16 (f32 where that is no
    /// slower): the same measure for every precision, beyond which gradients in int8 may go.
    mixed_share: Rate,
    peak: Option<u64>,
    limits: Vec<Limits>,
}

impl Report {
    fn limit(&self, rate: impl Fn(&Limits) -> Option<Rate>) -> Option<f64> {
        let medians = self.limits.iter().filter_map(|limits| Some(rate(limits)?.median));
        Rate::of(medians.collect()).map(|rate| rate.median)
    }

    fn json(&self) -> Value {
        json!({
            "size": self.size,
            "parameters": self.parameters,
            "processor": machine::processor(),
            "isa": trine_kernels::isa().name(),
            "threads": self.threads,
            "precision": self.precision,
            "recompute": self.recompute,
            "optimizer": self.optimizer.kind,
            "moments": self.optimizer.moments,
            "masters": self.optimizer.masters,
            "tok_s": self.tok_s.median,
            "tok_s_low": self.tok_s.low,
            "tok_s_high": self.tok_s.high,
            "f32_tok_s": self.f32_tok_s.map(|rate| rate.median),
            "naive_tok_s": self.naive_tok_s.map(|rate| rate.median),
            "fraction_of_limit": self.share.median,
            "fraction_of_mixed_limit": self.mixed_share.median,
            "peak_rss_bytes": self.peak,
            "int8_peak_gmac_s": self.limit(|limits| Some(limits.int8)).map(|rate| rate / 1e9),
            "bf16_peak_gflop_s": self.limit(|limits| limits.bf16).map(|rate| rate / 1e9),
            "f32_peak_gflop_s": self.limit(|limits| Some(limits.f32)).map(|rate| rate / 1e9),
        })
    }

    fn table(&self) -> String {
        let rate = |rate: Option<f64>, unit| match rate {
            Some(rate) => format!("{:.0} {unit}", rate / 1e9),
            None => "none".to_owned(),
        };
        let mut text = format!(
            "{}: {} parameters without the embedding, {} threads, {}, {}\n\n\
             | step    |              tok/s | as fast as ternary |\n\
             | ------- | -----------------: | -----------------: |\n",
            self.size,
            output::count(self.parameters),
            self.threads,
            trine_kernels::isa(),
            machine::processor().unwrap_or_else(|| "unknown processor".to_owned()),
        );
        let kinds =
            [("ternary", Some(self.tok_s)), ("f32", self.f32_tok_s), ("naive", self.naive_tok_s)];
        for (kind, speed) in kinds {
            if let Some(Rate { median, low, high }) = speed {
                let range = format!("{median:.0} ({low:.0} to {high:.0})");
                let ratio = median / self.tok_s.median;
                text += &format!("| {kind:7} | {range:>18} | {ratio:>18.2} |\n");
            }
        }
        text += &format!(
            "\nlimit       {:.0} % reached (int8 {}, bf16 {}, f32 {})\n\
             mixed       {:.0} % of the limit with the forward pass in int8 and gradients in {}\n",
            self.share.median * 100.0,
            rate(self.limit(|limits| Some(limits.int8)), "GMAC/s"),
            rate(self.limit(|limits| limits.bf16), "GFLOP/s"),
            rate(self.limit(|limits| Some(limits.f32)), "GFLOP/s"),
            self.mixed_share.median * 100.0,
            self.limit(|limits| limits.bf16).map_or("f32", |_| "bf16"),
        );
        if let Some(peak) = self.peak {
            text +=
                &format!("memory      {:.2} MB at most, of the ternary run\n", peak as f64 / 1e6);
        }
        text.truncate(text.trim_end().len());
        text
    }
}
