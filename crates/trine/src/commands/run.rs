//! `trine run`: continue a text.

use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use serde_json::json;
use trine_runtime::Session;

use super::generate::{Generated, SamplingArgs, generate};
use crate::model;
use crate::output::{self, note};

/// Options of `trine run`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
    model: PathBuf,
    /// Text to continue; `-` reads it from standard input
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    #[arg(allow_hyphen_values = true)]
    prompt: String,
    /// Most tokens to generate
    #[arg(short = 'n', long, default_value_t = 256, value_name = "N")]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Go on after end tokens
    #[arg(long)]
    ignore_eos: bool,
    /// tokenizer.json, or hf://owner/name with one, to use instead of the model's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Print one JSON object with text, ids and speed instead of streaming text
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let loaded = model::load(&args.model, args.tokenizer.as_deref())?;
    let mut prompt_text = args.prompt.clone();
    if prompt_text == "-" {
        prompt_text.clear();
        std::io::stdin()
            .read_to_string(&mut prompt_text)
            .context("cannot read the prompt from standard input")?;
    }
    let prompt = loaded.prompt_ids(&prompt_text)?;
    let stop = if args.ignore_eos { Vec::new() } else { loaded.stop_ids() };
    let mut sampler = args.sampling.sampler()?;
    let mut session = Session::new(&loaded.model);
    let mut ids = Vec::new();
    let mut text = String::new();
    if !args.json {
        output::print(&prompt_text)?;
    }
    let begin = Instant::now();
    let Generated { finish, prefill, decode } = generate(
        &mut session,
        &mut sampler,
        &loaded.tokenizer,
        &mut ids,
        &prompt,
        args.max_tokens,
        &stop,
        |piece| {
            if args.json {
                text.push_str(piece);
                return Ok(());
            }
            output::print(piece)
        },
    )?;
    let seconds = begin.elapsed().as_secs_f64();
    let generated = &ids[prompt.len()..];
    if args.json {
        let result = json!({
            "prompt": prompt_text,
            "text": text,
            "prompt_ids": prompt,
            "ids": generated,
            "finish": finish.name(),
            "prompt_tokens": prompt.len(),
            "prompt_tokens_per_second": prefill.per_second(),
            "generated_tokens": generated.len(),
            "generated_tokens_per_second": decode.per_second(),
            "seconds": seconds,
        });
        return output::print_line(&result.to_string());
    }
    output::print("\n")?;
    let speed = |speed: Option<f64>| speed.map_or(String::new(), |n| format!(" {n:.1} tok/s"));
    note!(
        "[prompt {} tokens{}, generated {} tokens{}, {seconds:.2} s, {} threads, {}]",
        prompt.len(),
        speed(prefill.per_second()),
        generated.len(),
        speed(decode.per_second()),
        trine_kernels::threads(),
        trine_kernels::isa()
    );
    Ok(())
}
