//! `trine bench`: how fast a model runs here, and how much of what this machine can do that is.
//!
//! A speed alone says little on a shared machine, of which the memory may be twice as fast a minute
//! later. So the limits of the machine are measured right before and right after every sample: the
//! speed at which memory can be read bounds decode, the peak of int8 products bounds prefill (see
//! `trine_kernels::limits`). And tests take turns, so that what is compared was timed together. The
//! rows of the table have the names of llama-bench.

mod card;
mod kernels;
pub(crate) mod machine;
mod report;
mod runs;
mod traffic;
mod train;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::ArgGroup;
use trine_export::RandomTrits;
use trine_format::{BoxError, Dtype, ModelConfig, ModelFile, Quantization, names};
use trine_kernels::limits::{self, Limits};
use trine_runtime::{Largest, LoadOptions, Model};

use self::kernels::{Kernel, Timed};
use self::machine::{Busy, Energy};
use self::report::{Report, Setting, Sketched};
use self::runs::{Measured, Runner, Sample, Test};
use self::traffic::{Formats, Traffic};
use super::synth_model::Shape;
use crate::memory::MemoryArgs;
use crate::model;
use crate::output;
use crate::progress::BenchProgress;

/// Length of the prompt for the time to the first token.
const FIRST_PROMPT: usize = 128;

/// Options of `trine bench`.
#[derive(clap::Args)]
#[command(
    group = ArgGroup::new("what").args(["model", "shape"]).required(true),
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(crate) struct Args {
    #[command(subcommand)]
    other: Option<Other>,
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
    model: Option<PathBuf>,
    /// Random weights in the shape of a known model, made in memory, instead of a model
    #[arg(long, value_enum)]
    shape: Option<Shape>,
    /// Threads; by default one for each processor
    #[arg(short, long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Prompt lengths to time, separated by commas; 0 for none
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "512")]
    prompt: Vec<usize>,
    /// Numbers of tokens to generate, separated by commas; 0 for none
    #[arg(
        short = 'n',
        long = "gen",
        value_name = "N",
        value_delimiter = ',',
        default_value = "128"
    )]
    generate: Vec<usize>,
    /// Tokens in the context before generation is timed, separated by commas
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Numbers of sequences that generate together, separated by commas; their tokens are added up
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "1")]
    batch: Vec<NonZeroUsize>,
    /// Lengths of answers that repeat their prompt but for a token in 16, separated by commas: each
    /// without and with guesses
    #[arg(long, value_name = "N", value_delimiter = ',')]
    repeat: Vec<usize>,
    #[command(flatten)]
    memory: MemoryArgs,
    /// How often each test is timed
    #[arg(short, long, value_name = "N", default_value = "5")]
    repetitions: NonZeroUsize,
    /// Time single products at the model's shapes instead of the model
    #[arg(long, conflicts_with_all = ["prompt", "generate", "depth", "batch", "repeat", "repetitions"])]
    kernels: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What else is measured than a model that runs.
#[derive(clap::Subcommand)]
enum Other {
    /// Measure steps of training: ternary, full precision, and naive ones
    Train(train::Args),
}

impl Args {
    /// Whether steps of training are measured.
    pub(crate) fn trains(&self) -> bool {
        self.other.is_some()
    }

    /// What to time, in this order.
    fn tests(&self) -> Vec<Test> {
        let prompts = self.prompt.iter().filter(|n| **n > 0);
        let mut tests: Vec<_> = prompts.map(|&tokens| Test::Prefill { tokens }).collect();
        for &tokens in self.generate.iter().filter(|n| **n > 0) {
            for depth in &self.depth {
                let decode = |batch: &NonZeroUsize| Test::Decode {
                    tokens,
                    depth: *depth,
                    batch: batch.get(),
                    sketch: false,
                };
                tests.extend(self.batch.iter().map(decode));
            }
        }
        for &tokens in self.repeat.iter().filter(|n| **n > 0) {
            tests.extend([false, true].map(|ahead| Test::Repeat { tokens, ahead }));
        }
        tests
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(Other::Train(args)) = &args.other {
        return train::run(args);
    }
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.get())
            .build_global()
            .context("cannot start the threads")?;
    }
    let threads = trine_kernels::threads();
    let tests = args.tests();
    if tests.is_empty() {
        bail!("nothing to measure: expected a length above 0 for --prompt, --gen or --repeat");
    }
    let file = open(args)?;
    let config = file.config();
    if config.quantization == Quantization::None {
        bail!("{}: expected a ternary model, found full precision", file.path().display());
    }
    let limit = config.max_position_embeddings;
    if let Some(test) = tests.iter().find(|test| test.positions() > limit && !args.kernels) {
        let (name, positions) = (test.name(), test.positions());
        bail!("{name} needs {positions} positions, the model has {limit}");
    }
    let formats = formats(args, &file)?;
    let begin = Busy::now();
    let setting = |limits| Setting {
        model: name(args, &file),
        parameters: file.config().parameter_count(),
        formats,
        processor: machine::processor(),
        threads,
        limits,
        others: Busy::now().zip(begin).and_then(|(now, begin)| now.others_since(begin)),
    };
    let result = if args.kernels {
        let (kernels, limits) = time_kernels(config, formats, threads)?;
        setting(limits).kernels(&kernels, args.json)
    } else {
        let report = time_model(args, &file, &tests, formats, setting)?;
        if args.json { report.json().to_string() } else { report.table() }
    };
    output::print_line(&result)
}

/// Times the products of a model of this shape, each between two measurements of the limits.
fn time_kernels(
    config: &ModelConfig,
    formats: Formats,
    threads: usize,
) -> anyhow::Result<(Vec<Kernel>, Vec<Limits>)> {
    let shapes = kernels::shapes(config);
    let progress = BenchProgress::new(shapes.len() + 2);
    progress.step("limits of the machine");
    let mut limits = vec![measure_limits(threads)];
    let mut measured = Vec::new();
    let mut take = |timed: Result<Vec<Timed>, BoxError>| -> anyhow::Result<()> {
        let timed = timed.map_err(anyhow::Error::from_boxed)?;
        limits.push(measure_limits(threads));
        let around = last_two(&limits);
        measured.extend(timed.into_iter().map(|timed| Kernel { timed, limits: around }));
        Ok(())
    };
    for shape in &shapes {
        progress.step(&shape.0);
        take(kernels::ternary(config, shape, formats))?;
    }
    progress.step("head");
    take(kernels::head(config, formats))?;
    Ok((measured, limits))
}

/// Loads the model and runs the tests on it.
fn time_model(
    args: &Args,
    file: &ModelFile,
    tests: &[Test],
    formats: Formats,
    setting: impl FnOnce(Vec<Limits>) -> Setting,
) -> anyhow::Result<Report> {
    let threads = trine_kernels::threads();
    let repetitions = args.repetitions.get();
    let progress = BenchProgress::new(tests.len() * repetitions + 4);
    progress.step("load");
    machine::forget_peak();
    let begin = Instant::now();
    let options =
        LoadOptions { head: Some(formats.head), ..args.memory.options(Some(Largest::ONE)) };
    let model = Model::load_with(file, &options)?;
    let load_seconds = begin.elapsed().as_secs_f64();
    if args.model.is_none() {
        give_back();
    }
    let loaded = machine::memory();
    let from_file = args.model.is_some();
    // What it took to make random weights is no memory of the runtime.
    let mut peak = loaded.filter(|_| from_file).map(|memory| memory.peak);
    machine::forget_peak();
    let mut see_peak = || peak = peak.max(machine::memory().map(|memory| memory.peak));

    progress.step("first token");
    let prompt = FIRST_PROMPT.min(model.config().max_position_embeddings);
    let first_token = (prompt, runs::first_token(&model, prompt)?);
    let tests: Vec<_> = match model.sketch_bytes() {
        Some(_) => tests.iter().flat_map(|test| test.and_sketch()).collect(),
        None => tests.to_vec(),
    };
    progress.expect(tests.len() * repetitions + 4);
    progress.step("contexts");
    let traffic = Traffic::new(model.config(), formats);
    let sketch = Sketched::all(&model, &tests, traffic)?;
    let energy = Energy::open();
    let mut runners = Runner::all(&model, &tests)?;
    let mut measured: Vec<_> =
        tests.iter().map(|test| Measured::new(*test, energy.is_ok())).collect();
    // The limits need memory too, which is not the model's.
    see_peak();
    progress.step("limits of the machine");
    let mut limits = vec![measure_limits(threads)];
    for _ in 0..repetitions {
        for (runner, measured) in runners.iter_mut().zip(&mut measured) {
            progress.step(&measured.test.name());
            machine::forget_peak();
            let (speed, joules) = runner.sample(energy.as_ref().ok())?;
            see_peak();
            limits.push(measure_limits(threads));
            measured.push(Sample { speed, limits: last_two(&limits) }, joules);
        }
    }
    Ok(Report {
        setting: setting(limits),
        traffic,
        sketch,
        load_seconds,
        from_file,
        first_token,
        loaded,
        peak,
        measured,
        no_energy: energy.err(),
    })
}

/// The last two of at least two measurements.
fn last_two(limits: &[Limits]) -> [Limits; 2] {
    *limits.last_chunk().expect("two measurements")
}

/// Returns the memory in which random weights were drawn to the system: the allocator does so when
/// more is freed, after a second.
fn give_back() {
    std::thread::sleep(Duration::from_millis(1100));
    drop(std::hint::black_box(Vec::<u8>::with_capacity(64 << 20)));
}

/// The model, or one of random weights that is made when it is loaded.
fn open(args: &Args) -> anyhow::Result<ModelFile> {
    if let Some(path) = &args.model {
        return model::open(path);
    }
    let shape = args.shape.context("no model and no shape")?;
    let config = shape.config();
    let random = RandomTrits::new(config.clone(), 0);
    Ok(ModelFile::imported(Path::new("random weights"), config, Box::new(random)))
}

fn name(args: &Args, file: &ModelFile) -> String {
    match args.shape.and_then(|shape| clap::ValueEnum::to_possible_value(&shape)) {
        Some(shape) => format!("random weights, shape {}", shape.get_name()),
        None => file.path().display().to_string(),
    }
}

/// How the runtime holds the model that it loads from `file`.
fn formats(args: &Args, file: &ModelFile) -> anyhow::Result<Formats> {
    let tied = file.config().tie_word_embeddings;
    let head = match (args.memory.head, args.shape) {
        (Some(head), _) => head.dtype(),
        // Random weights have no type of their own.
        (None, Some(_)) => Dtype::Q6_K,
        (None, None) => file.dense(if tied { names::EMBED } else { names::HEAD })?.dtype,
    };
    let LoadOptions { packing: weights, kv, .. } = args.memory.options(None);
    Ok(Formats { weights, head, kv })
}

/// The limits, in less than half a second: it is often asked.
pub(crate) fn measure_limits(threads: usize) -> Limits {
    let mut options = limits::Options { buffer: 256 << 20, samples: 3, threads };
    // Not where it would push others out of memory.
    if let Some(available) = machine::available_memory() {
        options.buffer = options.buffer.min((available / 4) as usize);
    }
    limits::measure(trine_kernels::isa(), &options)
}
