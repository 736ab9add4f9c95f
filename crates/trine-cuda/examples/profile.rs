//! How long steps take on a card, and where the time goes:
//! `cargo run --release -p trine-cuda --example profile -- 125m 16 1024 [full] [f32] [recompute]`

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use trine_cuda::backend::{Address, BytesMap, Product};
use trine_cuda::{AdamW, Backend, CudaError, Driver, Engine, Kind, Options};
use trine_data::Batch;
use trine_format::{HiddenAct, ModelConfig, Quantization};

type Result<T> = std::result::Result<T, CudaError>;

/// A card that is waited for after everything, so that each thing has its own time.
struct Profiled {
    card: Driver,
    scratch: Address,
    found: Mutex<BTreeMap<String, (usize, f64, f64)>>,
    on: Mutex<bool>,
}

impl Profiled {
    fn timed(&self, what: String, work: f64, run: impl FnOnce() -> Result<()>) -> Result<()> {
        if !*self.on.lock().unwrap() {
            return run();
        }
        let wait = || self.card.download(self.scratch, &mut [0; 4]);
        wait()?;
        let begin = Instant::now();
        run()?;
        wait()?;
        let mut found = self.found.lock().unwrap();
        let entry = found.entry(what).or_default();
        *entry = (entry.0 + 1, entry.1 + begin.elapsed().as_secs_f64(), entry.2 + work);
        Ok(())
    }
}

impl Backend for Profiled {
    fn name(&self) -> String {
        self.card.name()
    }
    fn processors(&self) -> usize {
        self.card.processors()
    }
    fn shared_memory(&self) -> usize {
        self.card.shared_memory()
    }
    fn has_wgmma(&self) -> bool {
        self.card.has_wgmma() && !std::env::args().any(|a| a == "mma")
    }
    fn memory(&self) -> Result<(usize, usize)> {
        self.card.memory()
    }
    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.card.allocate(bytes)
    }
    fn free(&self, at: Address) {
        self.card.free(at);
    }
    fn upload(&self, to: Address, from: &[u8]) -> Result<()> {
        self.card.upload(to, from)
    }
    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.card.download(from, to)
    }
    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.timed("clear".to_owned(), 0.0, || self.card.clear(at, bytes))
    }
    fn launch(
        &self,
        kernel: &str,
        grid: [u32; 3],
        block: u32,
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        self.timed(kernel.to_owned(), 0.0, || {
            self.card.launch(kernel, grid, block, shared, arguments)
        })
    }
    fn bytes_map(
        &self,
        at: Address,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<BytesMap> {
        self.card.bytes_map(at, rows, columns, stride)
    }
    fn multiply(&self, product: &Product, a: Address, b: Address, c: Address) -> Result<()> {
        let Product { m, n, k, .. } = *product;
        let what = format!("product {m} x {n} x {k} -> {:?}", product.result);
        let work = 2.0 * m as f64 * n as f64 * k as f64;
        self.timed(what, work, || self.card.multiply(product, a, b, c))
    }
}

fn shape(name: &str) -> ModelConfig {
    let (hidden, layers, heads, kv_heads, head_dim, inner, vocab) = match name {
        "125m" => (768, 12, 12, 12, 64, 2048, 32000),
        "350m" => (1024, 24, 16, 16, 64, 2816, 32000),
        "1b" => (2048, 24, 16, 16, 128, 5632, 32000),
        "2b4t" => (2560, 30, 20, 5, 128, 6912, 128256),
        _ => panic!("125m, 350m, 1b or 2b4t"),
    };
    ModelConfig {
        hidden_size: hidden,
        intermediate_size: inner,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        vocab_size: vocab,
        max_position_embeddings: 4096,
        rope_theta: 5e5,
        rms_norm_eps: 1e-5,
        hidden_act: HiddenAct::Relu2,
        sub_norms: true,
        projection_norm_eps: None,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        quantization: Quantization::Online,
    }
}

fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut x = seed;
    move || {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        x >> 33
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| arguments.iter().any(|a| a == word);
    let number = |at: usize| arguments[at].parse::<usize>().unwrap();
    let mut config = shape(&arguments[0]);
    if has("full") {
        config.quantization = Quantization::None;
    }
    let (batch, tokens) = (number(1), number(2));
    let begin = Instant::now();
    let card = Driver::open(0).unwrap_or_else(|e| panic!("{e}"));
    println!("{}: ready after {:.1} s", card.name(), begin.elapsed().as_secs_f64());
    let scratch = card.allocate(256).unwrap();
    let profiled =
        Arc::new(Profiled { card, scratch, found: Mutex::default(), on: Mutex::new(false) });
    let kind = if has("f32") { Kind::F32 } else { Kind::Bf16 };
    let options = Options { kind, recompute: has("recompute"), narrow_masters: false };
    let mut engine = Engine::new(profiled.clone(), &config, options).unwrap();
    let mut next = random(1);
    let parameters: Vec<_> = engine.parameters().map(|(n, c)| (n.to_owned(), c)).collect();
    let table: Vec<f32> = (0..1 << 20).map(|_| (next() % 2001) as f32 / 1000.0 - 1.0).collect();
    for (name, count) in &parameters {
        let values: Vec<f32> = match name.contains("norm") {
            true => vec![1.0; *count],
            false => {
                (0..*count).map(|i| 0.035 * table[(i * 7919 + i / 4099) % table.len()]).collect()
            }
        };
        engine.set(name, &values).unwrap();
    }
    let n = batch * tokens;
    let ids: Vec<u32> = (0..=n).map(|_| (next() % config.vocab_size as u64) as u32).collect();
    let inputs = Batch {
        inputs: ids[..n].to_vec(),
        targets: ids[1..].to_vec(),
        starts: None,
        batch,
        seq_len: tokens,
    };
    let mut made = 0;
    let mut step = |engine: &mut Engine| {
        engine.begin().unwrap();
        engine.add(&inputs, 1.0 / n as f32).unwrap();
        let loss = engine.loss().unwrap() / n as f64;
        let norm = engine.squares().unwrap().iter().sum::<f64>().sqrt();
        made += 1;
        engine
            .update(
                &AdamW {
                    clip: (1.0 / norm).min(1.0) as f32,
                    betas: [0.9, 0.95],
                    eps: 1e-8,
                    keep: 1.0 - 1e-4,
                    step_size: 1e-3 / (1.0 - 0.9f32.powi(made)),
                    inverse_root_correction2: 1.0 / (1.0 - 0.95f32.powi(made)).sqrt(),
                    chance: made as u64,
                },
                None,
            )
            .unwrap();
        (loss, norm)
    };
    let mut times = Vec::new();
    for i in 0..10 {
        let begin = Instant::now();
        let (loss, norm) = step(&mut engine);
        times.push(begin.elapsed().as_secs_f64());
        if i < 3 || i == 9 {
            println!("step {i}: loss {loss:.4}, norm {norm:.3}, {:.1} ms", times[i] * 1e3);
        }
    }
    times.drain(..3);
    times.sort_by(f64::total_cmp);
    let time = times[times.len() / 2];
    // Matrices thrice twice, the head among them; causal attention.
    let matrices: usize = parameters.iter().filter(|(n, _)| !n.contains("norm")).map(|p| p.1).sum();
    let attention =
        config.num_hidden_layers * tokens * config.num_attention_heads * config.head_dim;
    let flops = 6.0 * (matrices + attention) as f64 * n as f64;
    let (free, total) = profiled.memory().unwrap();
    println!(
        "{} {batch} x {tokens} {}: {:.0} tok/s, {:.1} ms, {:.0} TFLOP/s = {:.1} % of 989, {:.1} GB",
        arguments[0],
        arguments[3..].join(" "),
        n as f64 / time,
        time * 1e3,
        flops / time / 1e12,
        flops / time / 9.89e12,
        (total - free) as f64 / 1e9,
    );
    if has("quick") {
        return;
    }
    *profiled.on.lock().unwrap() = true;
    let begin = Instant::now();
    step(&mut engine);
    println!("a step with waits: {:.1} ms", begin.elapsed().as_secs_f64() * 1e3);
    let found = profiled.found.lock().unwrap();
    let mut found: Vec<_> = found.iter().collect();
    found.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    for (what, (times, seconds, work)) in found {
        let rate = if *work > 0.0 {
            format!("{:6.0} TFLOP/s", work / seconds / 1e12)
        } else {
            String::new()
        };
        println!("{:8.2} ms {times:4} {what} {rate}", seconds * 1e3);
    }
}
