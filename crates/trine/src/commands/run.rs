//! `trine run`: continue a text.

use std::io::Read;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use serde_json::json;
use trine_runtime::{GeneratorConfig, LowRankType, Session};

use super::generate::{DraftArgs, Generated, SamplingArgs, generate, name};
use crate::adapter::AdapterArgs;
use crate::memory::MemoryArgs;
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
    #[command(flatten)]
    draft: DraftArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    #[command(flatten)]
    adapter: AdapterArgs,
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
    let mut sampler = args.sampling.sampler()?;
    let options = args.memory.options(sampler.largest());
    let loaded = model::load(&args.model, args.tokenizer.as_deref(), &options)?;
    let adapter = args.adapter.load(&loaded.model, LowRankType::F16)?;
    let mut prompt_text = args.prompt.clone();
    if prompt_text == "-" {
        prompt_text.clear();
        std::io::stdin()
            .read_to_string(&mut prompt_text)
            .context("cannot read the prompt from standard input")?;
    }
    let prompt = loaded.prompt_ids(&prompt_text)?;
    let stop = if args.ignore_eos { Vec::new() } else { loaded.stop_ids() };
    let mut session = Session::with_adapter(&loaded.model, adapter);
    let mut text = String::new();
    if !args.json {
        output::print(&prompt_text)?;
    }
    let config = GeneratorConfig { max_tokens: args.max_tokens, stop, draft: args.draft.draft };
    let begin = Instant::now();
    let Generated { ids, finish, prefill, decode, stats } =
        generate(&mut session, &mut sampler, &loaded.tokenizer, &prompt, config, |piece| {
            if args.json {
                text.push_str(piece);
                return Ok(());
            }
            output::print(piece)
        })?;
    let seconds = begin.elapsed().as_secs_f64();
    if args.json {
        let result = json!({
            "prompt": prompt_text,
            "text": text,
            "prompt_ids": prompt,
            "ids": ids,
            "finish": name(finish),
            "prompt_tokens": prompt.len(),
            "prompt_tokens_per_second": prefill.per_second(),
            "generated_tokens": ids.len(),
            "generated_tokens_per_second": decode.per_second(),
            "passes": stats.passes,
            "drafted_tokens": stats.drafted,
            "accepted_tokens": stats.accepted,
            "seconds": seconds,
        });
        return output::print_line(&result.to_string());
    }
    output::print("\n")?;
    let speed = |speed: Option<f64>| speed.map_or(String::new(), |n| format!(" {n:.1} tok/s"));
    let drafts = match stats.drafted {
        0 => String::new(),
        drafted => format!(", {} of {drafted} drafts right", stats.accepted),
    };
    note!(
        "[prompt {} tokens{}, generated {} tokens{}{drafts}, {seconds:.2} s, {} threads, {}]",
        prompt.len(),
        speed(prefill.per_second()),
        ids.len(),
        speed(decode.per_second()),
        trine_kernels::threads(),
        trine_kernels::isa()
    );
    Ok(())
}
