//! The command line of Trine: wiring only.
//!
//! Results go to stdout, everything for people to stderr. An error is one line that names its
//! cause; the exit status is 1, 2 for a wrong command line, 130 after an interruption.

#![forbid(unsafe_code)]
#![warn(clippy::print_stderr, clippy::print_stdout)]

mod adapter;
mod commands;
mod data;
mod launch;
mod memory;
mod model;
mod output;
mod progress;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Training allocates and frees large buffers every step; the system allocator gives their pages
/// back to the kernel each time, which costs half of a step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Train, convert and run 1.58-bit (ternary, BitNet b1.58) language models.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
#[command(after_help = "New here? `trine demo` trains, exports and runs a small model in minutes.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a tiny model on the built-in corpus, export it and let it write: minutes, no network
    Demo(commands::demo::Args),
    /// Make, prepare and list training data
    #[command(subcommand)]
    Data(commands::data::Command),
    /// Train and use tokenizers
    #[command(subcommand)]
    Tokenizer(commands::tokenizer::Command),
    /// Train a model from a configuration file
    Train(commands::train::Args),
    /// Fine-tune a model on conversations or text: adapters beside it (LoRA), or all of it
    Finetune(commands::finetune::Args),
    /// Write a page with the curves, trits and samples of training runs
    Report(commands::report::Args),
    /// Convert a model to another format and prove that its trits survived
    Convert(commands::convert::Args),
    /// Compare two models: same trits, same scales, same logits?
    Verify(commands::verify::Args),
    /// Show what a model file holds
    Inspect(commands::inspect::Args),
    /// Generate text with a model
    Run(commands::run::Args),
    /// Talk to a model
    Chat(commands::chat::Args),
    /// Serve a model to OpenAI's clients and to people, with a chat page
    Serve(commands::serve::Args),
    /// Write a model's logits at every position, in f32
    Logits(commands::logits::Args),
    /// Score a model: perplexity of texts, multiple choice, generated answers; or compare two
    Eval(commands::eval::Args),
    /// Measure prefill and decode, as tokens a second and as a share of what this machine can do
    Bench(commands::bench::Args),
    /// Download a model from the Hugging Face hub and print where it is
    Download(commands::download::Args),
    /// Write a model of random weights in a given shape, to measure with
    SynthModel(commands::synth_model::Args),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let trains = match &cli.command {
        Command::Demo(_) | Command::Train(_) | Command::Finetune(_) => true,
        Command::Bench(args) => args.trains(),
        _ => false,
    };
    if trains {
        without_second_thread_pool();
    }
    match run(cli.command) {
        Ok(code) => code,
        Err(error) if output::is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::note!("error: {}", output::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Starts this program again, in place, with Candle's own thread pool turned off.
///
/// Its threads spin between operations and fight with rayon's, which do the work: on two cores
/// training is 12 to 25 % slower with both. Candle reads the variable once, and changing the
/// environment of a running process is unsafe, so the process begins anew; it keeps its id. Where
/// that fails, training is merely slower.
#[cfg(unix)]
fn without_second_thread_pool() {
    use std::os::unix::process::CommandExt;
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        let mut args = std::env::args_os();
        let mut again = std::process::Command::new(program);
        // The name it was called by stays, for the messages that quote it.
        args.next().map(|name| again.arg0(name));
        let _failed = again.args(args).env(THREADS, "1").exec();
    }
}

#[cfg(not(unix))]
fn without_second_thread_pool() {}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    // A TRINE_ISA that cannot be had is reported before any work begins.
    trine_kernels::select()?;
    match command {
        Command::Demo(args) => return commands::demo::run(&args),
        Command::Data(command) => commands::data::run(&command)?,
        Command::Tokenizer(command) => commands::tokenizer::run(&command)?,
        Command::Train(args) => return commands::train::run(&args),
        Command::Finetune(args) => return commands::finetune::run(&args),
        Command::Report(args) => commands::report::run(&args)?,
        Command::Convert(args) => commands::convert::run(&args)?,
        Command::Verify(args) => return commands::verify::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args)?,
        Command::Run(args) => commands::run::run(&args)?,
        Command::Chat(args) => commands::chat::run(&args)?,
        Command::Serve(args) => commands::serve::run(&args)?,
        Command::Logits(args) => commands::logits::run(&args)?,
        Command::Eval(args) => commands::eval::run(&args)?,
        Command::Bench(args) => commands::bench::run(&args)?,
        Command::Download(args) => commands::download::run(&args)?,
        Command::SynthModel(args) => commands::synth_model::run(&args)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "trine", &mut script);
            output::print_bytes(&script)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
