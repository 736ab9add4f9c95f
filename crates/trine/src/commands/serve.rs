//! `trine serve`: a model behind OpenAI's interface, with a chat page.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tracing_subscriber::EnvFilter;
use trine_runtime::{Engine, EngineConfig, Largest, LowRankType, Model};
use trine_server::{App, ServedAdapter, ServerConfig};
use trine_tokenizer::ChatTemplate;

use crate::memory::MemoryArgs;
use crate::output::{bytes, note};
use crate::{adapter, model};

/// Options of `trine serve`.
#[derive(clap::Args)]
#[command(after_help = "\
Endpoints: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models, /tokenize,\n\
/detokenize, /health, /metrics, and a chat page at /. Options that name a variable can be set in the\n\
environment instead.\n\n\
Try it: curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\\n  \
-d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}'")]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
    #[arg(env = "TRINE_SERVE_MODEL")]
    model: PathBuf,
    /// Address to listen at; 0.0.0.0 or :: for everybody, who should then need a key
    #[arg(long, default_value = "127.0.0.1", value_name = "IP", env = "TRINE_SERVE_HOST")]
    host: IpAddr,
    /// Port to listen at; 0 for any that is free
    #[arg(long, default_value_t = 8080, value_name = "N", env = "TRINE_SERVE_PORT")]
    port: u16,
    /// What the model is called by clients; by default the name of its file or directory
    #[arg(long, value_name = "NAME", env = "TRINE_SERVE_NAME")]
    name: Option<String>,
    /// Adapter to serve beside the model, as a model of its own: `NAME=DIR`, or a directory after which it
    /// is called; several times or with commas for several adapters
    #[arg(long, value_name = "NAME=DIR", value_delimiter = ',', env = "TRINE_SERVE_ADAPTER")]
    adapter: Vec<String>,
    /// Key that requests must have; several times or with commas for several keys
    #[arg(long, value_name = "KEY", value_delimiter = ',')]
    #[arg(env = "TRINE_SERVE_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// File with keys, one a line
    #[arg(long, value_name = "FILE", env = "TRINE_SERVE_API_KEY_FILE")]
    api_key_file: Option<PathBuf>,
    /// Origin whose pages may ask, e.g. `https://example.org`, or `*` for all; several times or with commas for
    /// several
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',', env = "TRINE_SERVE_CORS_ORIGIN")]
    cors_origin: Vec<String>,
    /// Memory for keys and values of requests and of prefixes that are kept, in MB
    #[arg(long, default_value_t = 1024, value_name = "MB", env = "TRINE_SERVE_KV_MEMORY")]
    kv_memory: usize,
    /// Requests that run at once, at most
    #[arg(long, default_value_t = 32, value_name = "N", env = "TRINE_SERVE_MAX_RUNNING")]
    max_running: usize,
    /// Requests that wait, at most, and of one client three quarters of them; more are answered with 429
    #[arg(long, default_value_t = 256, value_name = "N", env = "TRINE_SERVE_MAX_WAITING")]
    max_waiting: usize,
    /// Tokens of prompts that go along with every token of those who are being answered: more make
    /// prompts quicker, fewer answers smoother
    #[arg(long, default_value_t = 64, value_name = "N", env = "TRINE_SERVE_PROMPT_SHARE")]
    prompt_share: usize,
    /// Most tokens of an answer; what asks for more gets as many
    #[arg(long, value_name = "N", env = "TRINE_SERVE_MAX_TOKENS")]
    max_tokens: Option<usize>,
    /// Longest body of a request, in MB
    #[arg(long, default_value_t = 4, value_name = "MB", env = "TRINE_SERVE_MAX_BODY")]
    max_body: usize,
    /// Connections at once, at most
    #[arg(long, default_value_t = 1024, value_name = "N", env = "TRINE_SERVE_MAX_CONNECTIONS")]
    max_connections: usize,
    /// Seconds that a request may take
    #[arg(long, default_value_t = 600, value_name = "S", env = "TRINE_SERVE_TIMEOUT")]
    timeout: u64,
    /// Seconds that the end (ctrl-C, SIGTERM) waits for requests that run
    #[arg(long, default_value_t = 30, value_name = "S", env = "TRINE_SERVE_DRAIN")]
    drain: u64,
    /// Write the log as JSON, one object a line
    #[arg(long, env = "TRINE_SERVE_LOG_JSON")]
    log_json: bool,
    #[command(flatten)]
    memory: MemoryArgs,
    /// Jinja file to use instead of the model's chat template
    #[arg(long, value_name = "FILE", env = "TRINE_SERVE_CHAT_TEMPLATE")]
    chat_template: Option<PathBuf>,
    /// tokenizer.json, or hf://owner/name with one, to use instead of the model's
    #[arg(long, value_name = "FILE", env = "TRINE_SERVE_TOKENIZER")]
    tokenizer: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let config = config(args)?;
    let adapters = adapters(args, &config.model)?;
    let engine = engine_config(args)?;
    start_log(args.log_json);
    // A port that is taken is said before a model is loaded.
    let address = SocketAddr::new(args.host, args.port);
    let listener = std::net::TcpListener::bind(address);
    let listener = listener.with_context(|| format!("cannot listen at {address}"))?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let app = Arc::new(load(args, &adapters, config, engine)?);
    // The model has the kernels' threads; what is left to do takes little.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the threads of the server")?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let shutdown = shutdown()?;
        note!("listening at http://{address}");
        Ok(trine_server::serve(listener, app, shutdown).await?)
    })
}

/// Loads the model and starts its engine.
fn load(
    args: &Args,
    adapters: &[(String, PathBuf)],
    config: ServerConfig,
    engine: EngineConfig,
) -> anyhow::Result<App> {
    // What requests will ask for is not known: some will be greedy.
    let options = args.memory.options(Some(Largest::ONE));
    let loaded = model::load(&args.model, args.tokenizer.as_deref(), &options)?;
    // A template of the command line is everybody's.
    let own = args.chat_template.is_none();
    let adapters = adapters.iter().map(|(name, dir)| served(&loaded.model, name, dir, own));
    let adapters = adapters.collect::<anyhow::Result<Vec<_>>>()?;
    let own = loaded.file.tokenizer().and_then(|files| files.chat_template().map(str::to_owned));
    let text = match &args.chat_template {
        Some(path) => Some(read(path)?),
        None => own,
    };
    let origin = args.chat_template.as_ref().unwrap_or(&args.model);
    let template = text.map(|text| ChatTemplate::new(&text)).transpose();
    let template = template.with_context(|| origin.display().to_string())?;
    let kind = if template.is_some() { "" } else { ", no chat template: /v1/completions only" };
    let context = loaded.model.config().max_position_embeddings;
    let kv = bytes(engine.kv_bytes as u64);
    note!("serving {}: context of {context} tokens, {kv} for contexts{kind}", config.model);
    for served in &adapters {
        note!("serving {}: {} with adapter {}", served.name, config.model, served.root);
    }
    let stop = loaded.stop_ids();
    let engine = Engine::start(Arc::new(loaded.model), engine);
    let engine = engine.context("cannot start the engine's thread")?;
    Ok(App::new(engine, loaded.tokenizer, template, stop, config).with_adapters(adapters))
}

fn served(model: &Model, name: &str, dir: &Path, own: bool) -> anyhow::Result<ServedAdapter> {
    let adapter = adapter::load(model, dir, LowRankType::F16)?;
    let template = if own { adapter::template(dir)?.map(Arc::new) } else { None };
    Ok(ServedAdapter { name: name.to_owned(), root: self::name(dir), adapter, template })
}

/// Names and directories of the adapters, each name for itself.
fn adapters(args: &Args, model: &str) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let all = args.adapter.iter().map(|text| adapter::named(text));
    let all = all.collect::<anyhow::Result<Vec<_>>>()?;
    for (i, (name, dir)) in all.iter().enumerate() {
        let taken = name == model || all[..i].iter().any(|(other, _)| other == name);
        if taken {
            let dir = dir.display();
            bail!("--adapter {name}={dir}: the name {name} is taken: give another before the =");
        }
    }
    Ok(all)
}

fn config(args: &Args) -> anyhow::Result<ServerConfig> {
    let api_keys = keys(args)?;
    if api_keys.is_empty() && !args.host.is_loopback() {
        note!("warning: everybody who reaches {} may use this server: see --api-key", args.host);
    }
    let default = ServerConfig::default();
    let max_body = args.max_body.saturating_mul(1_000_000);
    for (name, value) in [
        ("--max-body", max_body),
        ("--max-connections", args.max_connections),
        ("--timeout", args.timeout as usize),
        ("--max-tokens", args.max_tokens.unwrap_or(1)),
    ] {
        at_least_1(name, value)?;
    }
    Ok(ServerConfig {
        model: args.name.clone().unwrap_or_else(|| name(&args.model)),
        api_keys,
        cors_origins: origins(&args.cors_origin)?,
        max_body,
        max_connections: args.max_connections.min(tokio::sync::Semaphore::MAX_PERMITS),
        max_tokens: args.max_tokens.unwrap_or(default.max_tokens),
        request_timeout: Duration::from_secs(args.timeout),
        drain_timeout: Duration::from_secs(args.drain),
        ..default
    })
}

/// Origins as browsers send them: a scheme, a host and perhaps a port, and nothing after.
fn origins(origins: &[String]) -> anyhow::Result<Vec<String>> {
    for origin in origins.iter().filter(|origin| *origin != "*") {
        let plain = |c: char| c.is_ascii_graphic() && c != '/';
        let host = origin.split_once("://").map_or("", |(_, host)| host);
        if host.is_empty() || !host.chars().all(plain) {
            bail!(
                "--cors-origin {origin}: expected https://HOST, with its port if it has one, or *"
            );
        }
    }
    Ok(origins.to_vec())
}

fn engine_config(args: &Args) -> anyhow::Result<EngineConfig> {
    let kv_bytes = args.kv_memory.saturating_mul(1_000_000);
    for (name, value) in [
        ("--kv-memory", kv_bytes),
        ("--max-running", args.max_running),
        ("--max-waiting", args.max_waiting),
        ("--prompt-share", args.prompt_share),
    ] {
        at_least_1(name, value)?;
    }
    let Args { max_running, max_waiting, prompt_share, .. } = *args;
    Ok(EngineConfig { kv_bytes, max_running, max_waiting, prompt_share })
}

fn at_least_1(name: &str, value: usize) -> anyhow::Result<()> {
    if value == 0 {
        bail!("{name}: expected at least 1, found 0");
    }
    Ok(())
}

/// The keys of the command line and of the file.
fn keys(args: &Args) -> anyhow::Result<Vec<String>> {
    let mut keys = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        let before = keys.len();
        keys.extend(read(path)?.lines().map(str::trim).map(str::to_owned));
        keys.retain(|key| !key.is_empty());
        if keys.len() == before {
            bail!("{}: expected keys, one a line, found none", path.display());
        }
    }
    if keys.iter().any(String::is_empty) {
        bail!("--api-key: expected a key, found an empty one");
    }
    Ok(keys)
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What clients call a model: the last part of its path, without the ending of a file.
fn name(path: &Path) -> String {
    let last = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let last = last.filter(|name| !name.is_empty()).unwrap_or_else(|| "model".to_owned());
    last.strip_suffix(".gguf").unwrap_or(&last).to_owned()
}

/// The log goes to stderr; TRINE_LOG says how much, in the language of `tracing` (info by default).
fn start_log(json: bool) {
    let filter = EnvFilter::try_from_env("TRINE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if json { log.json().init() } else { log.with_ansi(false).init() }
}

/// Is there when somebody wants the server to end; a second time, it ends at once.
fn shutdown() -> anyhow::Result<impl Future<Output = ()>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let mut sender = Some(sender);
    ctrlc::set_handler(move || match sender.take() {
        // Whoever waits for it may have ended already.
        Some(sender) => drop(sender.send(())),
        None => std::process::exit(130),
    })
    .context("cannot catch ctrl-C")?;
    Ok(async { receiver.await.unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_after_its_file() {
        for (path, expected) in [
            ("models/bitnet.gguf", "bitnet"),
            ("runs/small/", "small"),
            ("hf://owner/model-2B", "model-2B"),
            ("/", "model"),
        ] {
            assert_eq!(name(Path::new(path)), expected);
        }
    }
}
