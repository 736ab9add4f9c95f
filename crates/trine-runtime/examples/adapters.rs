//! What adapters cost: time of a token, of eight sequences with the same adapter and with one each, and of
//! a prompt, beside the model without any.
//!
//! ```text
//! cargo run --release -p trine-runtime --example adapters -- model.gguf 16
//! ```
//!
//! The second argument is the rank. Adapters are beside all projections, of random numbers; without and
//! with are timed in turn, and the median of the ratios is what counts. `RAYON_NUM_THREADS` says how many
//! threads, `TRINE_ISA` which instruction set.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use trine_format::peft::Lora;
use trine_format::{Dtype, ModelConfig, ModelFile, Projection};
use trine_kernels::nn::KvType;
use trine_kernels::{isa, threads};
use trine_runtime::{Adapter, LoadOptions, Logits, LowRankType, Model, Sequence, Step};

/// How often each is timed.
const ROUNDS: usize = 21;

/// Tokens that a sequence has seen, and sequences of a batch.
const SEEN: usize = 32;
const BATCH: usize = 8;

/// Tokens of the prompt.
const PROMPT: usize = 256;

type Adapters = Vec<Option<Arc<Adapter>>>;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("a model, and a rank")?;
    let rank: usize = args.next().unwrap_or("16".to_owned()).parse()?;
    let file = ModelFile::open(Path::new(&path))?;
    let options =
        LoadOptions { kv: KvType::Int8, head: Some(Dtype::Q6_K), ..LoadOptions::default() };
    let model = Model::load_with(&file, &options)?;
    println!("{path}, rank {rank}, {} threads, {}", threads(), isa());
    for dtype in [LowRankType::F16, LowRankType::F32] {
        let mut adapters = Adapters::new();
        for seed in 0..BATCH {
            let lora = lora(model.config(), rank, seed as u64);
            adapters.push(Some(Arc::new(Adapter::new(&model, &lora, dtype)?)));
        }
        let bytes = adapters.iter().flatten().next().map_or(0, |adapter| adapter.bytes());
        println!("{dtype:?}: {:.1} MB", bytes as f64 / 1e6);
        let same = |n| vec![adapters[0].clone(); n];
        compare("one token", &model, &same(1), 1)?;
        compare("eight, the same adapter", &model, &same(BATCH), 1)?;
        compare("eight, one each", &model, &adapters, 1)?;
        compare("a prompt of 256", &model, &same(1), PROMPT)?;
    }
    Ok(())
}

/// Times a pass of `new` tokens of each sequence without adapters and with these.
fn compare(
    name: &str,
    model: &Model,
    adapters: &[Option<Arc<Adapter>>],
    new: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let vocab = model.config().vocab_size as u32;
    let ids: Vec<u32> = (0..PROMPT as u32).map(|i| (i * i * 31 + 7 * i) % vocab).collect();
    let filled = |adapter: Option<Arc<Adapter>>| {
        let mut sequence = Sequence::with_adapter(model, adapter);
        let step = Step { sequence: &mut sequence, ids: &ids[..SEEN], logits: Logits::None };
        model.step(&mut [step]).map(|_| sequence)
    };
    let mut without = adapters.iter().map(|_| filled(None)).collect::<Result<Vec<_>, _>>()?;
    let mut with = adapters.iter().map(|a| filled(a.clone())).collect::<Result<Vec<_>, _>>()?;
    let time = |sequences: &mut [Sequence]| {
        let begin = Instant::now();
        let step = |sequence| Step { sequence, ids: &ids[..new], logits: Logits::Last };
        model.step(&mut sequences.iter_mut().map(step).collect::<Vec<_>>())?;
        let seconds = begin.elapsed().as_secs_f64();
        sequences.iter_mut().for_each(|sequence| sequence.truncate(SEEN));
        Ok::<_, trine_runtime::RuntimeError>(seconds)
    };
    let (mut ratios, mut seconds) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let base = time(&mut without)?;
        ratios.push(time(&mut with)? / base);
        seconds.push(base);
    }
    let (base, ratio) = (median(seconds), median(ratios));
    println!("  {name:24} {:7.2} ms without, {:+5.1} % with", base * 1e3, (ratio - 1.0) * 100.0);
    Ok(())
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

fn lora(config: &ModelConfig, rank: usize, seed: u64) -> Lora {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut matrices = BTreeMap::new();
    for layer in 0..config.num_hidden_layers {
        for p in Projection::ALL {
            let (out, inp) = config.projection_shape(p);
            let mut numbers =
                |len: usize| (0..len).map(|_| rng.random::<f32>() * 0.02 - 0.01).collect();
            matrices.insert((layer, p), [numbers(rank * inp), numbers(out * rank)]);
        }
    }
    let targets = Projection::ALL.to_vec();
    Lora { rank, alpha: 2.0 * rank as f64, targets, base: None, matrices }
}
