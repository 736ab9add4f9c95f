//! Training as a library: a text, a configuration, an observer of one's own.
//!
//! ```text
//! cargo run --release -p trine-train --example train -- runs/example [text.txt]
//! ```
//!
//! A second call with the same directory goes on where the first one was interrupted.

use std::error::Error;
use std::path::{Path, PathBuf};

use trine_data::{Dataset, synth};
use trine_tokenizer::Tokenizer;
use trine_train::optimizer::Gradients;
use trine_train::trainer::{Anomaly, Observer, StepReport};
use trine_train::{Bitnet, RunConfig, Trainer};

/// What a configuration file would say; every other key has its default.
const CONFIG: &str = r#"
name = "example"
seed = 1
[model]
depth = 2                # layers, width, heads, rates and batch follow; a key that is named wins
[data]
seq_len = 64
[optimizer]
kind = "muon"
moments = "int8"
[schedule]
kind = "wsd"
warmup_steps = 10
[train]
steps = 120
eval_every = 40
checkpoint_every = 40
"#;

/// Watches: every method has an empty default.
#[derive(Default)]
struct Printer {
    /// Norm of the gradient of the first layer's query projection.
    query_norm: f64,
}

impl Observer for Printer {
    /// Gradients and model can be looked at before every update, and the model after it.
    fn before_update(&mut self, _step: usize, _model: &Bitnet, gradients: &Gradients) {
        let gradient = &gradients["model.layers.0.self_attn.q_proj.weight"];
        self.query_norm = trine_train::optimizer::norm(gradient).unwrap_or(f64::NAN);
    }

    fn on_step(&mut self, report: &StepReport) {
        if report.step.is_multiple_of(10) {
            println!(
                "step {:4}  loss {:.4}  gradient {:.3}, of the first q_proj {:.3}  {:.0} tokens/s",
                report.step,
                report.loss,
                report.grad_norm,
                self.query_norm,
                report.tokens_per_second
            );
        }
    }

    fn on_anomaly(&mut self, anomaly: &Anomaly) {
        println!("step {:4}  {}: {:?}", anomaly.step, anomaly.what, anomaly.action);
    }

    fn on_validation(&mut self, step: usize, loss: f32) {
        println!("step {step:4}  validation loss {loss:.4}");
    }

    fn on_checkpoint(&mut self, path: &Path) {
        println!("saved {}", path.display());
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let run = args.next().ok_or("expected the directory of a run")?;
    let text = match args.next() {
        Some(path) => trine_data::read_text(&path)?,
        None => synth::documents(1, 200_000).collect::<Vec<_>>().join("\n\n"),
    };
    let config = RunConfig::parse(CONFIG, Path::new("example.toml"), &[])?;

    let mut trainer = if run.join("config.toml").exists() {
        Trainer::resume(config, Dataset::open(&run.join("data"))?, &run)?
    } else {
        let tokenizer = Tokenizer::train_bpe(std::iter::once(&text), 512)?;
        let data = Dataset::from_text(&run.join("data"), &tokenizer, &text, 0.1)?;
        Trainer::create(config, data, &run)?
    };
    println!("{} parameters", trainer.model().params().count());
    let outcome = trainer.run(&mut Printer::default())?;
    println!("finished: {}, in {}", outcome.finished, outcome.checkpoint.display());
    Ok(())
}
