//! `trine eval`: how good a model is, and whether another is better.

mod beside;
mod card;
mod chat;
mod local;
mod measure;
mod remote;
mod results;
mod subject;
mod table;
mod text;

use std::path::PathBuf;

use anyhow::bail;
use clap::ValueEnum;
use trine_eval::{Data, EvalError, Sandbox, Settings, Task, TooLong};
use trine_kernels::nn::KvType;
use trine_runtime::LoadOptions;
use trine_train::config::DeviceConfig;

use super::convert::Embed;
use crate::model::data_path;
use crate::output::{self, note};
use chat::Chat;

/// Options of `trine eval`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, hf://owner/name, or the address of a model
    /// behind OpenAI's interface, as http://127.0.0.1:8080/v1, which takes --tokenizer
    #[arg(required_unless_present = "list")]
    model: Option<PathBuf>,
    /// Another model, to compare with the first on the same items
    other: Option<PathBuf>,
    /// Directory of an adapter, to run the model with, or the other where two are compared
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Built-in tasks (`--list`) or paths of task files (.toml), separated by commas
    #[arg(short, long, value_delimiter = ',', value_name = "TASK,TASK")]
    tasks: Vec<String>,
    /// Text file to measure the perplexity of; may be given several times
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Folder in which, or in a folder of which, the items of the tasks are; or the file of one task,
    /// here or on the hub (hf://datasets/owner/name/FILE)
    #[arg(short, long, value_name = "PATH", default_value = ".")]
    data: PathBuf,
    /// Only the first N items of each task
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Answered examples before each question; by default as many as the task says
    #[arg(long, value_name = "N")]
    shots: Option<usize>,
    /// Items that are longer than the context: leave them out, or cut off their beginning. Either is
    /// counted
    #[arg(long, value_enum, default_value_t = Policy::Skip, value_name = "POLICY")]
    too_long: Policy,
    /// Prompts that go through the chat template of the model, as what a user says: those of tasks
    /// that are made for it (ifeval), those of every task that generates, or none
    #[arg(long, value_enum, default_value_t = Chat::Auto, value_name = "WHEN")]
    chat: Chat,
    /// Tokens that a text or document sends through the model together; by default the context of the
    /// model, of `--text` at most 2048
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens by which that window moves on; by default the whole window
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Run the programs that the model writes (humaneval). They get little room, but it is your
    /// machine: best in a container
    #[arg(long)]
    allow_code_execution: bool,
    /// Folder in which the result of every item is kept; an evaluation that was interrupted goes on
    /// from there
    #[arg(short, long, value_name = "DIR", default_value = "evals")]
    out: PathBuf,
    /// Neither use nor keep results of items
    #[arg(long)]
    no_keep: bool,
    /// Show the figures of the report on BitNet b1.58 2B4T beside
    #[arg(long)]
    reference: bool,
    /// Score every option by itself, sharing nothing: slow, with the same results
    #[arg(long)]
    one_by_one: bool,
    /// Say how much faster sharing is: items are scored both ways in turns, between prompts whose speed is
    /// the most there is
    #[arg(long, conflicts_with = "one_by_one")]
    measure: bool,
    /// Score a checkpoint on a GPU: cuda, cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceConfig::Cpu)]
    device: DeviceConfig,
    /// How keys and values lie in memory: f32, as in training, f16 or int8
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F32)]
    kv: KvType,
    /// Type to hold head and embedding in; by default that of the model
    #[arg(long, value_enum, value_name = "TYPE")]
    head: Option<Embed>,
    /// Of an address: which of its models; by default the only one
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Of an address: tokens that a text may have; by default what the server says, or 2048
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Of an address: requests at a time
    #[arg(long, value_name = "N", default_value_t = 8)]
    concurrency: usize,
    /// tokenizer.json, or hf://owner/name with one, to use instead of the models'
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Of the bootstrap that compares two models
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// List the built-in tasks
    #[arg(long)]
    list: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// What to do with an item that is longer than the context.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Policy {
    Skip,
    Cut,
}

impl Args {
    fn settings(&self) -> Settings {
        let too_long = match self.too_long {
            Policy::Skip => TooLong::Skip,
            Policy::Cut => TooLong::Cut,
        };
        let Self { shots, limit, window, stride, .. } = *self;
        Settings { shots, limit, too_long, window, stride }
    }

    fn options(&self) -> LoadOptions {
        LoadOptions { head: self.head.map(Embed::dtype), kv: self.kv, ..LoadOptions::default() }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.list {
        return table::list(args.json);
    }
    if args.tasks.is_empty() && args.text.is_empty() {
        bail!(
            "nothing to evaluate: name tasks with --tasks (--list shows them) or a file with --text"
        );
    }
    if args.limit == Some(0) {
        bail!("--limit 0: expected at least one item");
    }
    // What can be wrong is, before a model is loaded.
    let place = if args.tasks.is_empty() { args.data.clone() } else { data_path(&args.data)? };
    let mut tasks = Vec::new();
    for name in &args.tasks {
        let task = Task::open(name)?;
        if tasks.iter().any(|(known, _): &(Task, Data)| known.name() == task.name()) {
            bail!("--tasks: {} is named twice", task.name());
        }
        let data = Data::open(&task, &place, args.settings().shots(&task))?;
        tasks.push((task, data));
    }
    let sandbox = sandbox(&tasks, args.allow_code_execution)?;
    let texts = args.text.iter().map(|path| text::read(path)).collect::<Result<Vec<_>, _>>()?;
    let questions = Questions { tasks: &tasks, texts: &texts, sandbox: sandbox.as_ref(), args };
    let mut models = Vec::new();
    for path in args.model.iter().chain(&args.other) {
        let adapter = args.adapter.as_deref().filter(|_| models.is_empty() == args.other.is_none());
        models.push(match remote::address(path) {
            Some(address) => remote::evaluate(address, adapter, &questions)?,
            None => local::evaluate(path, adapter, &questions)?,
        });
    }
    match args.json {
        true => output::print_line(&results::json(&models, args.seed)?.to_string()),
        false => table::print(&models, args),
    }
}

/// What every model is asked.
struct Questions<'a> {
    tasks: &'a [(Task, Data)],
    texts: &'a [text::Text],
    sandbox: Option<&'a Sandbox>,
    args: &'a Args,
}

/// Where programs of models run, if a task needs it and they may.
fn sandbox(tasks: &[(Task, Data)], allowed: bool) -> anyhow::Result<Option<Sandbox>> {
    let Some((task, _)) = tasks.iter().find(|(task, _)| task.runs_programs()) else {
        return Ok(None);
    };
    if !allowed {
        return Err(EvalError::CodeExecution { task: task.name().to_owned() }.into());
    }
    let sandbox = Sandbox::open()?;
    for missing in sandbox.missing() {
        note!("warning: {}: programs that the model writes can {missing}", task.name());
    }
    Ok(Some(sandbox))
}
