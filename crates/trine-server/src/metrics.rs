//! Counters and histograms, in the text format of Prometheus.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use crate::App;

/// Upper bounds of the histograms in seconds.
const BOUNDS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// What the server counts; the engine counts for itself.
#[derive(Default)]
pub(crate) struct Metrics {
    /// Responses by path and status; paths are those of routes, so there are few.
    responses: Mutex<BTreeMap<(String, u16), u64>>,
    connections: AtomicI64,
    first_token: Histogram,
    done: Histogram,
    /// Seconds for each token of whole answers.
    per_token: Histogram,
}

#[derive(Default)]
struct Histogram {
    /// Values up to each bound, and above the last.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    /// In microseconds.
    sum: AtomicU64,
}

impl Histogram {
    fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(time.as_micros() as u64, Ordering::Relaxed);
    }

    fn write(&self, out: &mut String, name: &str, help: &str) {
        head(out, name, "histogram", help);
        let mut count = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bucket, bound) in self.buckets.iter().zip(bounds) {
            count += bucket.load(Ordering::Relaxed);
            line(out, &format!("{name}_bucket{{le=\"{bound}\"}}"), count);
        }
        let sum = self.sum.load(Ordering::Relaxed) as f64 / 1e6;
        line(out, &format!("{name}_sum"), sum);
        line(out, &format!("{name}_count"), count);
    }
}

impl Metrics {
    pub(crate) fn response(&self, path: &str, status: u16) {
        let mut responses = self.responses.lock().unwrap_or_else(PoisonError::into_inner);
        *responses.entry((path.to_owned(), status)).or_default() += 1;
    }

    pub(crate) fn connection(&self, change: i64) {
        self.connections.fetch_add(change, Ordering::Relaxed);
    }

    /// From the request to the first token of its answer.
    pub(crate) fn first_token(&self, time: Duration) {
        self.first_token.observe(time);
    }

    /// An answer of so many tokens is whole.
    pub(crate) fn done(&self, time: Duration, tokens: usize) {
        self.done.observe(time);
        if let Some(tokens) = u32::try_from(tokens).ok().filter(|tokens| *tokens > 0) {
            self.per_token.observe(time / tokens);
        }
    }
}

/// All of them.
pub(crate) fn text(app: &App) -> String {
    let mut out = String::new();
    let name = "trine_http_responses_total";
    head(&mut out, name, "counter", "Responses by path and status.");
    let responses = app.metrics.responses.lock().unwrap_or_else(PoisonError::into_inner);
    for ((path, status), count) in &*responses {
        line(&mut out, &format!("{name}{{path=\"{path}\",status=\"{status}\"}}"), count);
    }
    drop(responses);
    let stats = app.engine.stats();
    let connections = app.metrics.connections.load(Ordering::Relaxed).max(0) as u64;
    let limit = app.engine.config().kv_bytes as u64;
    for (name, value, help) in [
        ("trine_connections", connections, "Connections that are open."),
        ("trine_requests_running", stats.running, "Requests that run."),
        ("trine_requests_waiting", stats.waiting, "Requests that wait."),
        ("trine_kv_bytes", stats.kv_bytes, "Keys and values, of requests and the prefix cache."),
        ("trine_kv_bytes_limit", limit, "Most that they may take."),
    ] {
        head(&mut out, name, "gauge", help);
        line(&mut out, name, value);
    }
    for (name, value, help) in [
        ("trine_prompt_tokens_total", stats.prompt_tokens, "Prompt tokens computed."),
        ("trine_cached_tokens_total", stats.cached_tokens, "Prompt tokens of the prefix cache."),
        ("trine_generated_tokens_total", stats.generated_tokens, "Tokens generated."),
        ("trine_passes_total", stats.passes, "Passes through the model."),
        ("trine_requests_finished_total", stats.finished, "Requests that ended by themselves."),
        ("trine_requests_cancelled_total", stats.cancelled, "Requests that were given up."),
    ] {
        head(&mut out, name, "counter", help);
        line(&mut out, name, value);
    }
    let name = "trine_pass_seconds_total";
    head(&mut out, name, "counter", "Seconds that these passes took.");
    line(&mut out, name, stats.pass_time.as_secs_f64());
    let Metrics { first_token, done, per_token, .. } = &app.metrics;
    first_token.write(&mut out, "trine_first_token_seconds", "From request to first token.");
    done.write(&mut out, "trine_answer_seconds", "From request to the whole answer.");
    per_token.write(&mut out, "trine_token_seconds", "Seconds for each token of an answer.");
    out
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string cannot fail.
    let _infallible = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

fn line(out: &mut String, name: &str, value: impl std::fmt::Display) {
    let _infallible = writeln!(out, "{name} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative() {
        let histogram = Histogram::default();
        for ms in [5, 10, 11, 100_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut out = String::new();
        histogram.write(&mut out, "x", "X.");
        for expected in [
            "# TYPE x histogram",
            "x_bucket{le=\"0.01\"} 2",
            "x_bucket{le=\"0.025\"} 3",
            "x_bucket{le=\"60\"} 3",
            "x_bucket{le=\"+Inf\"} 4",
            "x_sum 100.026",
            "x_count 4",
        ] {
            assert!(out.lines().any(|line| line == expected), "{expected}: {out}");
        }
    }
}
