//! `trine eval`: how good a model is, and whether another is better.

mod results;
mod table;
mod text;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::json;
use trine_eval::{
    Data, Evaluation, LanguageModel, OneByOne, RuntimeModel, Settings, Store, Task, TooLong,
};
use trine_format::peft;
use trine_kernels::nn::KvType;
use trine_runtime::{LoadOptions, LowRankType, Session};

use super::convert::Embed;
use crate::model::{self, Loaded};
use crate::output::{self, note};
use crate::progress::EvalProgress;
use results::{ModelResults, TaskResults};

/// Options of `trine eval`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
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
    /// Folder in which, or in a folder of which, the items of the tasks are; or the file of one task
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
    /// Tokens that `--text` sends through the model together; by default the context of the model, at
    /// most 2048
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Tokens by which the window of `--text` moves on; by default the whole window
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
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
    /// How keys and values lie in memory: f32, as in training, f16 or int8
    #[arg(long, value_name = "TYPE", default_value_t = KvType::F32)]
    kv: KvType,
    /// Type to hold head and embedding in; by default that of the model
    #[arg(long, value_enum, value_name = "TYPE")]
    head: Option<Embed>,
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
        Settings { shots: self.shots, limit: self.limit, too_long }
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
    let mut tasks = Vec::new();
    for name in &args.tasks {
        let task = Task::open(name)?;
        if tasks.iter().any(|(known, _): &(Task, Data)| known.name() == task.name()) {
            bail!("--tasks: {} is named twice", task.name());
        }
        let data = Data::open(&task, &args.data, args.settings().shots(&task))?;
        tasks.push((task, data));
    }
    let texts = args.text.iter().map(|path| text::read(path)).collect::<Result<Vec<_>, _>>()?;
    let mut models = Vec::new();
    for path in args.model.iter().chain(&args.other) {
        let adapter = args.adapter.as_deref().filter(|_| models.is_empty() == args.other.is_none());
        models.push(evaluate(path, adapter, &tasks, &texts, args)?);
    }
    match args.json {
        true => output::print_line(&results::json(&models, args.seed)?.to_string()),
        false => table::print(&models, args),
    }
}

/// Everything about one model.
fn evaluate(
    path: &Path,
    adapter: Option<&Path>,
    tasks: &[(Task, Data)],
    texts: &[text::Text],
    args: &Args,
) -> anyhow::Result<ModelResults> {
    let loaded = model::load(path, args.tokenizer.as_deref(), &args.options())?;
    let stop_ids = loaded.stop_ids();
    let keep = !args.no_keep && !args.one_by_one && !tasks.is_empty();
    let fingerprint = keep.then(|| fingerprint(loaded.file.path(), adapter)).transpose()?;
    let Loaded { model, tokenizer, .. } = &loaded;
    let limit = model.config().max_position_embeddings;
    let run_with =
        adapter.map(|dir| crate::adapter::load(model, dir, LowRankType::F32)).transpose()?;
    let mut shared = RuntimeModel::with_adapter(model, run_with.clone());
    let mut plain = OneByOne::new(limit, |ids: &[u32]| {
        Session::with_adapter(model, run_with.clone()).logits_of_all(ids)
    });
    let language: &mut dyn LanguageModel = if args.one_by_one { &mut plain } else { &mut shared };
    let mut results = ModelResults::new(path, adapter);
    for text in texts {
        results.texts.push(text::measure(text, tokenizer, language, (args.window, args.stride))?);
    }
    for (task, data) in tasks {
        let settings = args.settings();
        let mut store = match &fingerprint {
            None => Store::in_memory(),
            Some(weights) => {
                let head = args.head.map_or("as stored", |head| head.dtype().name());
                let (weights, adapter) = weights;
                let mut model = json!({
                    "weights_hash": weights, "kv": args.kv.to_string(), "head": head,
                    "trine": env!("CARGO_PKG_VERSION"),
                });
                // Only with one, so that results without keep their names.
                if let Some(hashes) = adapter {
                    model["adapter_hashes"] = json!(hashes);
                }
                let conditions = settings.conditions(task, data, tokenizer, model);
                Store::open(&args.out, task.name(), &conditions)?
            }
        };
        let items = settings.items(data);
        let known = store.first(items).len();
        let before = language.work();
        let begin = Instant::now();
        {
            let mut progress = EvalProgress::new(task.name(), items, "items");
            let evaluation = Evaluation { task, data, tokenizer, stop_ids: &stop_ids, settings };
            evaluation
                .run(language, &mut store, &mut |known| progress.on_known(known))
                .with_context(|| format!("{} on {}", path.display(), task.name()))?;
        }
        let result = TaskResults::new(task, data, &settings, &store, known);
        result.note(begin.elapsed(), before, language.work());
        results.tasks.push(result);
    }
    if let Some(missing) = results.tasks.iter().find(|task| task.summary.scored == 0) {
        note!("warning: {}: no item could be scored", missing.name);
    }
    Ok(results)
}

/// What says which weights were scored: of the model, and of the two files of an adapter.
fn fingerprint(
    path: &Path,
    adapter: Option<&Path>,
) -> anyhow::Result<(String, Option<[String; 2]>)> {
    let file = |dir: &Path, name: &str| trine_eval::fingerprint(&dir.join(name));
    let of = |dir: &Path| -> anyhow::Result<_> {
        let dir = &model::resolve(dir)?;
        Ok([file(dir, peft::CONFIG)?, file(dir, peft::MATRICES)?])
    };
    Ok((trine_eval::fingerprint(path)?, adapter.map(of).transpose()?))
}
