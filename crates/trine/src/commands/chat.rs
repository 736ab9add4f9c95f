//! `trine chat`: a conversation in the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::Context;
use trine_runtime::Session;
use trine_tokenizer::{ChatTemplate, Message};

use super::generate::{Finish, SamplingArgs, generate};
use crate::{model, output};

/// Options of `trine chat`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory or run directory
    model: PathBuf,
    /// First message, from the system
    #[arg(short, long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer
    #[arg(short = 'n', long, default_value_t = 512, value_name = "N")]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Jinja file to use instead of the model's chat template
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// tokenizer.json to use instead of the model's
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
}

/// A base model has no turns: what the user types is continued as it is.
const CONTINUE: &str = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}";

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let loaded = model::load(&args.model, args.tokenizer.as_deref())?;
    let own = loaded.file.tokenizer().and_then(|files| files.chat_template());
    let template = match (&args.chat_template, own) {
        (Some(path), _) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            ChatTemplate::new(&text).with_context(|| path.display().to_string())?
        }
        (None, Some(template)) => ChatTemplate::new(template)
            .with_context(|| format!("the chat template of {}", args.model.display()))?,
        (None, None) => {
            eprintln!("this model has no chat template: it continues what you type");
            ChatTemplate::new(CONTINUE)?
        }
    };
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("an empty line or ctrl-D ends the conversation");
    }
    let mut sampler = args.sampling.sampler()?;
    let mut session = Session::new(&loaded.model);
    let mut seen: Vec<u32> = Vec::new();
    let mut messages: Vec<Message> =
        args.system.iter().map(|text| Message::new("system", text)).collect();
    let stop = loaded.stop_ids();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            eprint!("> ");
            std::io::stderr().flush()?;
        }
        let Some(line) = lines.next().transpose().context("cannot read standard input")? else {
            return Ok(());
        };
        if line.trim().is_empty() {
            return Ok(());
        }
        messages.push(Message::new("user", line));
        let ids = loaded.chat_ids(&template, &messages)?;
        // Turns that the session has seen already are not computed again; at least one id is,
        // since logits follow an id.
        let known = seen.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        let known = known.min(session.position()).min(ids.len() - 1);
        session.truncate(known);
        seen.truncate(known);
        let mut answer = String::new();
        let finish = generate(
            &mut session,
            &mut sampler,
            &loaded.tokenizer,
            &mut seen,
            &ids[known..],
            args.max_tokens,
            &stop,
            |piece| {
                answer.push_str(piece);
                output::print(piece)
            },
        )?;
        output::print("\n")?;
        if finish == Finish::Context {
            eprintln!("the context of {} positions is full", session.limit());
            return Ok(());
        }
        messages.push(Message::new("assistant", answer));
    }
}
