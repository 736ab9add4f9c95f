//! `trine chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use trine_runtime::{Finish, GeneratorConfig, LowRankType, Session};
use trine_tokenizer::{ChatTemplate, Message};

use super::generate::{DraftArgs, SamplingArgs, generate};
use crate::adapter::{self, AdapterArgs};
use crate::memory::MemoryArgs;
use crate::model::{self, Loaded};
use crate::output::{self, note};

/// Options of `trine chat`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
    model: PathBuf,
    /// First message, from the system
    #[arg(short, long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(short = 'n', long, default_value_t = 512, value_name = "N")]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    draft: DraftArgs,
    #[command(flatten)]
    memory: MemoryArgs,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Jinja file to use instead of the model's chat template
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// tokenizer.json, or hf://owner/name with one, to use instead of the model's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// A base model has no turns: what the user types is continued as it is.
const CONTINUE: &str = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}";

/// The template of the command line, that of the adapter, or that of the model; and where it is from.
fn template<'a>(args: &'a Args, loaded: &Loaded) -> anyhow::Result<(ChatTemplate, &'a Path)> {
    let compiled = |text: &str, origin: &'a Path| {
        let template = ChatTemplate::new(text).with_context(|| origin.display().to_string())?;
        Ok((template, origin))
    };
    if let Some(path) = &args.chat_template {
        let text = std::fs::read_to_string(path);
        return compiled(&text.with_context(|| format!("cannot read {}", path.display()))?, path);
    }
    if let Some(dir) = &args.adapter.adapter
        && let Some(template) = adapter::template(dir)?
    {
        return Ok((template, dir));
    }
    if let Some(text) = loaded.file.tokenizer().and_then(|files| files.chat_template()) {
        return compiled(text, &args.model);
    }
    note!("this model has no chat template: it continues what you type");
    Ok((ChatTemplate::new(CONTINUE)?, &args.model))
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut sampler = args.sampling.sampler()?;
    let options = args.memory.options(sampler.largest());
    let loaded = model::load(&args.model, args.tokenizer.as_deref(), &options)?;
    let adapter = args.adapter.load(&loaded.model, LowRankType::F16)?;
    let (template, origin) = template(args, &loaded)?;
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        note!("an empty line or ctrl-D ends the conversation");
    }
    let mut session = Session::with_adapter(&loaded.model, adapter);
    let mut seen: Vec<u32> = Vec::new();
    let mut messages: Vec<Message> =
        args.system.iter().map(|text| Message::new("system", text)).collect();
    let stop = loaded.stop_ids();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            std::io::stderr().write_all(b"> ")?;
        }
        let Some(line) = lines.next().transpose().context("cannot read standard input")? else {
            return Ok(());
        };
        if line.trim().is_empty() {
            return Ok(());
        }
        messages.push(Message::new("user", line));
        let mut ids =
            loaded.chat_ids(&template, &messages).with_context(|| origin.display().to_string())?;
        // Turns that the session has seen already are not computed again; at least one id is,
        // since logits follow an id.
        let known = seen.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        session.truncate(known.min(ids.len() - 1));
        let config = GeneratorConfig {
            max_tokens: args.max_tokens,
            stop: stop.clone(),
            draft: args.draft.draft,
        };
        let mut answer = String::new();
        let generated =
            generate(&mut session, &mut sampler, &loaded.tokenizer, &ids, config, |piece| {
                answer.push_str(piece);
                output::print(piece)
            })?;
        output::print("\n")?;
        if generated.finish == Finish::Context {
            note!("the context of {} positions is full", session.limit());
            return Ok(());
        }
        messages.push(Message::new("assistant", answer));
        ids.extend(generated.ids);
        seen = ids;
    }
}
