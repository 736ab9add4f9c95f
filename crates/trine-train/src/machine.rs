//! What a run was made with: processor, memory, version of the code, command line.

use std::fs;

use serde_json::{Value, json};

/// What the processor calls itself, where the system says so.
pub fn processor() -> Option<String> {
    field("/proc/cpuinfo", "model name")
}

/// Bytes of memory, where the system says so.
pub fn memory_bytes() -> Option<u64> {
    let text = field("/proc/meminfo", "MemTotal")?;
    Some(text.strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The version of this code: what `TRINE_GIT_DESCRIBE` said when it was built, e.g. the output of
/// `git describe --always --dirty`; else the version of the crate.
pub fn code_version() -> &'static str {
    option_env!("TRINE_GIT_DESCRIBE").unwrap_or(env!("CARGO_PKG_VERSION"))
}

/// All of it as JSON, for `run.json`; `null` is what the system does not say.
pub(crate) fn describe() -> Value {
    let command: Vec<_> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    json!({
        "trine_version": env!("CARGO_PKG_VERSION"),
        "code_version": code_version(),
        "command": command,
        "processor": processor(),
        "cores": std::thread::available_parallelism().map_or(1, |n| n.get()),
        "threads": rayon::current_num_threads(),
        "memory_bytes": memory_bytes(),
        "isa": trine_kernels::isa().to_string(),
        "os": std::env::consts::OS,
    })
}

/// The first `key : value` of a file of that form.
fn field(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let (_, value) = text.lines().find(|line| line.starts_with(key))?.split_once(':')?;
    Some(value.trim().to_owned())
}
