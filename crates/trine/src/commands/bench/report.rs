//! The result, as a table and as JSON.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use trine_format::Dtype;
use trine_kernels::limits::{Limits, Rate};
use trine_runtime::{Model, RuntimeError};

use super::kernels::Kernel;
use super::machine::Memory;
use super::runs::{Measured, Test, logits_of_sketch};
use super::traffic::{Formats, Traffic};
use crate::output;

/// The share of the processors' time from which on others are worth a line.
const DISTURBED: f64 = 0.02;

/// What was measured, and on what.
pub(crate) struct Setting {
    pub(crate) model: String,
    pub(crate) parameters: u64,
    pub(crate) formats: Formats,
    pub(crate) processor: Option<String>,
    pub(crate) threads: usize,
    /// Before the work, after each part of it.
    pub(crate) limits: Vec<Limits>,
    /// The share of all processors' time that others took meanwhile, where the system says.
    pub(crate) others: Option<f64>,
}

impl Setting {
    /// The middle and the range of a limit.
    fn limit(&self, rate: impl Fn(&Limits) -> Rate) -> Rate {
        let medians = self.limits.iter().map(|limits| rate(limits).median);
        Rate::of(medians.collect()).unwrap_or(Rate { median: f64::NAN, low: 0.0, high: 0.0 })
    }

    /// The keys that every result begins with.
    fn json(&self) -> Map<String, Value> {
        let value = json!({
            "model": self.model,
            "parameters": self.parameters,
            "processor": self.processor,
            "threads": self.threads,
            "isa": trine_kernels::isa().name(),
            "weights_format": self.formats.weights.name(),
            "head_format": short(self.formats.head),
            "kv_format": self.formats.kv.name(),
            "bandwidth_gb_s": self.limit(|limits| limits.bandwidth).median / 1e9,
            "int8_peak_gmac_s": self.limit(|limits| limits.int8).median / 1e9,
            "f32_peak_gflop_s": self.limit(|limits| limits.f32).median / 1e9,
            "processors_used_by_others": self.others,
            "limits": self.limits.iter().map(limits_json).collect::<Vec<_>>(),
        });
        match value {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    /// The lines above a table.
    fn head(&self) -> String {
        format!(
            "{}, {} parameters, weights {}, head {}, cache {}\n{} threads, {}, {}\n\n",
            self.model,
            output::count(self.parameters),
            self.formats.weights.name(),
            short(self.formats.head),
            self.formats.kv.name(),
            self.threads,
            trine_kernels::isa(),
            self.processor.as_deref().unwrap_or("unknown processor"),
        )
    }

    /// The line below a table that says what shares are of.
    fn limits_line(&self) -> String {
        let of = |rate: fn(&Limits) -> Rate, unit: &str| {
            let Rate { median, low, high } = self.limit(rate);
            format!("{:.1} {unit} ({:.1} to {:.1})", median / 1e9, low / 1e9, high / 1e9)
        };
        let mut out = format!(
            "\nlimits      read {}, int8 {}, f32 {}\n",
            of(|limits| limits.bandwidth, "GB/s"),
            of(|limits| limits.int8, "GMAC/s"),
            of(|limits| limits.f32, "GFLOP/s"),
        );
        let apart =
            self.limits.iter().filter_map(|limits| Some(nanoseconds(limits.handover?).median));
        if let Some(Rate { median, low, high }) = Rate::of(apart.collect()) {
            out += &format!("cores       {median:.0} ns apart ({low:.0} to {high:.0})\n");
        }
        if let Some(others) = self.others.filter(|others| *others > DISTURBED) {
            let percent = 100.0 * others;
            out += &format!(
                "disturbed   other programs took {percent:.0} % of the processors' time meanwhile\n"
            );
        }
        out
    }

    /// The result of timing single products: one object, or a table.
    pub(crate) fn kernels(&self, kernels: &[Kernel], as_json: bool) -> String {
        if as_json {
            let mut map = self.json();
            let rows = kernels.iter().map(Kernel::json).collect();
            map.insert("kernels".into(), rows);
            return Value::Object(map).to_string();
        }
        let mut out = self.head();
        out += "| kernel         |   rows |  cols | tokens |       ms |  GB/s | of bandwidth | GMAC/s | of int8 peak | x scalar |\n";
        out += "| -------------- | -----: | ----: | -----: | -------: | ----: | -----------: | -----: | -----------: | -------: |\n";
        for kernel in kernels {
            let timed = &kernel.timed;
            out += &format!(
                "| {:<14} | {:>6} | {:>5} | {:>6} | {:>8.3} | {:>5.1} | {:>12} | {:>6.1} | {:>12} | {:>8} |\n",
                timed.name,
                timed.rows,
                timed.cols,
                timed.tokens,
                1e3 / timed.calls.median,
                timed.bandwidth() / 1e9,
                percent(Some(kernel.share_of_bandwidth())),
                timed.macs_per_second() / 1e9,
                percent(kernel.share_of_int8_peak()),
                timed.speedup.map_or("-".to_owned(), |speedup| format!("{speedup:.1}")),
            );
        }
        out + self.limits_line().trim_end()
    }
}

/// A sketch of the head, and what it spares.
pub(crate) struct Sketched {
    /// Bytes of it.
    bytes: usize,
    /// What a step reads instead of the head, by the number of its sequences.
    read: BTreeMap<usize, Read>,
}

/// What a step reads of a head and its sketch where it looks for the largest logit of every sequence.
#[derive(Clone, Copy, Debug)]
struct Read {
    /// Logits that are computed from rows of the head.
    logits: f64,
    /// Bytes of the sketch and of these rows, or of the head, where that is read whole.
    bytes: f64,
}

impl Sketched {
    /// What the steps of `tests` read, if the model has a sketch.
    pub(crate) fn all(
        model: &Model,
        tests: &[Test],
        traffic: Traffic,
    ) -> Result<Option<Self>, RuntimeError> {
        let Some(bytes) = model.sketch_bytes() else { return Ok(None) };
        let vocab = model.config().vocab_size as f64;
        let mut read = BTreeMap::new();
        for test in tests {
            if let Test::Decode { batch, sketch: true, .. } = *test
                && !read.contains_key(&batch)
            {
                let (logits, head) = (logits_of_sketch(model, batch)?, traffic.head as f64);
                let rows = bytes as f64 + logits / vocab * head;
                let bytes = if logits < vocab * batch as f64 { rows } else { head };
                read.insert(batch, Read { logits, bytes });
            }
        }
        Ok(Some(Self { bytes, read }))
    }
}

/// What was found out about a model.
pub(crate) struct Report {
    pub(crate) setting: Setting,
    pub(crate) traffic: Traffic,
    pub(crate) sketch: Option<Sketched>,
    pub(crate) load_seconds: f64,
    /// Whether the model came from a file: else its making is part of the load.
    pub(crate) from_file: bool,
    /// Length of a prompt, and seconds from it to the first token, right after the load.
    pub(crate) first_token: (usize, f64),
    pub(crate) loaded: Option<Memory>,
    /// The most memory while the model was loaded and while it ran, without that of the limits.
    pub(crate) peak: Option<u64>,
    pub(crate) measured: Vec<Measured>,
    /// Why there is no energy.
    pub(crate) no_energy: Option<String>,
}

impl Report {
    /// The share of the bandwidth that the bytes of a test's tokens are; of decode only, as a
    /// prompt reads the weights as often as it likes.
    fn share_of_bandwidth(&self, measured: &Measured) -> Option<f64> {
        match measured.test {
            Test::Prefill { .. } | Test::Repeat { .. } => None,
            Test::Decode { tokens, depth, batch, sketch } => {
                let head = match sketch {
                    true => self.read(measured)?.bytes,
                    false => self.traffic.head as f64,
                };
                // A token attends to those before it and itself.
                let positions = depth as f64 + (tokens as f64 + 1.0) / 2.0;
                let bytes = self.traffic.bytes_per_token(batch, positions, head);
                Some(bytes * share(measured, |limits| limits.bandwidth))
            }
        }
    }

    /// What the steps of a test read of head and sketch, where they use one.
    fn read(&self, measured: &Measured) -> Option<Read> {
        match measured.test {
            Test::Decode { batch, sketch: true, .. } => {
                self.sketch.as_ref()?.read.get(&batch).copied()
            }
            _ => None,
        }
    }

    fn share_of_int8_peak(&self, measured: &Measured) -> f64 {
        self.traffic.macs as f64 * share(measured, |limits| limits.int8)
    }

    /// What the context costs: seconds by which a token takes longer than without, and bytes of keys
    /// and values that are read for it. `None` where that was not measured, or is not longer.
    fn context(&self, measured: &Measured) -> Option<(f64, f64)> {
        let Test::Decode { tokens, depth: depth @ 1.., batch, sketch } = measured.test else {
            return None;
        };
        let without = Test::Decode { tokens, depth: 0, batch, sketch };
        let seconds = self.beside(measured, without, |with, without| 1.0 / with - 1.0 / without)?;
        (seconds > 0.0).then_some((seconds, self.traffic.position as f64 * depth as f64))
    }

    /// How much slower a token is behind a context than without, as a share of its speed.
    fn slower(&self, measured: &Measured) -> Option<f64> {
        let Test::Decode { tokens, depth: 1.., batch, sketch } = measured.test else {
            return None;
        };
        let without = Test::Decode { tokens, depth: 0, batch, sketch };
        self.beside(measured, without, |with, without| 1.0 - with / without)
    }

    /// How many times faster a repeated text comes with guesses, where that was measured.
    fn speedup(&self, measured: &Measured) -> Option<f64> {
        let Test::Repeat { tokens, ahead: true } = measured.test else {
            return None;
        };
        let without = Test::Repeat { tokens, ahead: false };
        self.beside(measured, without, |with, without| with / without)
    }

    /// How many times faster tokens come with a sketch of the head, where that was measured.
    fn by_sketch(&self, measured: &Measured) -> Option<f64> {
        let Test::Decode { tokens, depth, batch, sketch: true } = measured.test else {
            return None;
        };
        let without = Test::Decode { tokens, depth, batch, sketch: false };
        self.beside(measured, without, |with, without| with / without)
    }

    /// The middle of a comparison of the samples of a test with those of `other` that were taken in the
    /// same turn, where it was measured.
    fn beside(
        &self,
        measured: &Measured,
        other: Test,
        compare: impl Fn(f64, f64) -> f64,
    ) -> Option<f64> {
        let other = self.measured.iter().find(|m| m.test == other)?;
        let pairs = measured.samples.iter().zip(&other.samples);
        Some(median(pairs.map(|(a, b)| compare(a.speed, b.speed)).collect()))
    }

    /// The first measured prompt.
    fn prefill(&self) -> Option<&Measured> {
        self.measured.iter().find(|m| matches!(m.test, Test::Prefill { .. }))
    }

    /// The first measured generation.
    fn decode(&self) -> Option<&Measured> {
        self.measured.iter().find(|m| matches!(m.test, Test::Decode { .. }))
    }

    /// One object: the numbers that are compared first, then everything.
    pub(crate) fn json(&self) -> Value {
        let speed = |m: Option<&Measured>| m.map(|m| median(speeds(m)));
        let sweep = |of_kind: fn(&Test) -> bool| -> Vec<Value> {
            let rows = self.measured.iter().filter(|m| of_kind(&m.test));
            rows.map(|m| self.row_json(m)).collect()
        };
        let value = json!({
            "prefill_tok_s": speed(self.prefill()),
            "decode_tok_s": speed(self.decode()),
            "decode_fraction_of_bandwidth": self.decode().and_then(|m| self.share_of_bandwidth(m)),
            "prefill_fraction_of_int8_peak": self.prefill().map(|m| self.share_of_int8_peak(m)),
            "peak_rss_bytes": self.peak,
            "loaded_rss_bytes": self.loaded.map(|memory| memory.now),
            "load_s": self.load_seconds,
            "load_is_from_file": self.from_file,
            "first_token_prompt": self.first_token.0,
            "first_token_s": self.first_token.1,
            "start_to_first_token_s": self.from_file.then_some(self.load_seconds + self.first_token.1),
            "weights_bytes": self.traffic.weights,
            "head_bytes": self.traffic.head,
            "head_sketch": self.sketch_json(),
            "kv_bytes_per_position": self.traffic.position,
            "macs_per_token": self.traffic.macs,
            "prefill": sweep(|test| matches!(test, Test::Prefill { .. })),
            "decode": sweep(|test| matches!(test, Test::Decode { .. })),
            "repeat": sweep(|test| matches!(test, Test::Repeat { .. })),
            "energy": self.no_energy.as_ref().map(|reason| json!({ "not_available": reason })),
        });
        let mut map = self.setting.json();
        if let Value::Object(own) = value {
            map.extend(own);
        }
        Value::Object(map)
    }

    /// What a sketch of the head takes and gives; the first generation by it.
    fn sketch_json(&self) -> Option<Value> {
        let sketch = self.sketch.as_ref()?;
        let first = self.measured.iter().find(|m| self.by_sketch(m).is_some());
        let read = |(batch, read): (&usize, &Read)| json!({ "batch": batch, "logits": read.logits, "bytes": read.bytes });
        Some(json!({
            "bytes": sketch.bytes,
            "read": sketch.read.iter().map(read).collect::<Vec<_>>(),
            "decode_tok_s": first.map(|m| median(speeds(m))),
            "decode_fraction_of_bandwidth": first.and_then(|m| self.share_of_bandwidth(m)),
            "times_whole_head": first.and_then(|m| self.by_sketch(m)),
        }))
    }

    fn row_json(&self, m: &Measured) -> Value {
        let (tokens, depth, batch, sketch) = match m.test {
            Test::Prefill { tokens } => (tokens, 0, 1, false),
            Test::Decode { tokens, depth, batch, sketch } => (tokens, depth, batch, sketch),
            Test::Repeat { tokens, .. } => (tokens, tokens, 1, false),
        };
        let context = self.context(m);
        json!({
            "test": m.test.name(),
            "tokens": tokens,
            "depth": depth,
            "batch": batch,
            "head_sketch": sketch,
            "times_whole_head": self.by_sketch(m),
            "tok_s": median(speeds(m)),
            "tok_s_stddev": stddev(&speeds(m)),
            "samples": speeds(m),
            "fraction_of_bandwidth": self.share_of_bandwidth(m),
            "fraction_of_int8_peak": self.share_of_int8_peak(m),
            "context_s_per_token": context.map(|(seconds, _)| seconds),
            "fraction_slower_than_without_context": self.slower(m),
            "context_gb_s": context.map(|(seconds, bytes)| bytes / seconds / 1e9),
            "times_without_guesses": self.speedup(m),
            "joules_per_token": m.joules,
        })
    }

    /// The table and what it rests on.
    pub(crate) fn table(&self) -> String {
        let mut out = self.setting.head();
        out += "| test           |          tok/s    | of bandwidth | of int8 peak | J/tok |\n";
        out += "| -------------- | ----------------: | -----------: | -----------: | ----: |\n";
        for m in &self.measured {
            out += &format!(
                "| {:<14} | {:>8.2} ± {:>6.2} | {:>12} | {:>12} | {:>5} |\n",
                m.test.name(),
                median(speeds(m)),
                stddev(&speeds(m)),
                percent(self.share_of_bandwidth(m)),
                percent(Some(self.share_of_int8_peak(m))),
                m.joules.map_or("-".to_owned(), |joules| format!("{joules:.3}")),
            );
        }
        out += &self.setting.limits_line();
        for m in &self.measured {
            if let Some((seconds, bytes)) = self.context(m) {
                out += &format!(
                    "context     {} is {} slower, {:.2} ms a token: {} at {:.1} GB/s\n",
                    m.test.name(),
                    percent(self.slower(m)),
                    1e3 * seconds,
                    output::bytes(bytes as u64),
                    bytes / seconds / 1e9,
                );
            }
        }
        for m in &self.measured {
            if let Some((times, read)) = self.by_sketch(m).zip(self.read(m)) {
                out += &format!(
                    "head        {}: {times:.2} times as fast as with the whole head, reads {} of its {}\n",
                    m.test.name(),
                    output::bytes(read.bytes as u64),
                    output::bytes(self.traffic.head),
                );
            }
            if let Some(times) = self.speedup(m) {
                let name = m.test.name();
                out +=
                    &format!("ahead       {name}: {times:.2} times as fast as without guesses\n");
            }
        }
        let bytes = |n: Option<u64>| n.map_or("not available".to_owned(), output::bytes);
        out += &format!(
            "memory      {} loaded, {} at most\n",
            bytes(self.loaded.map(|memory| memory.now)),
            bytes(self.peak),
        );
        let load = if self.from_file { "loaded" } else { "made" };
        let (prompt, seconds) = self.first_token;
        out += &format!(
            "start       {load} in {:.2} s, first token {seconds:.3} s after a prompt of {prompt}",
            self.load_seconds,
        );
        if let Some(reason) = &self.no_energy {
            out += &format!("\nenergy      not available: {reason}");
        }
        out
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

/// The name of a type as GGUF and llama-bench users write it: bf16, q6_k.
fn short(dtype: Dtype) -> String {
    dtype.ggml_type().name().to_lowercase()
}

fn limits_json(limits: &Limits) -> Value {
    let rate =
        |r: Rate| json!({ "median": r.median / 1e9, "low": r.low / 1e9, "high": r.high / 1e9 });
    json!({
        "bandwidth_gb_s": rate(limits.bandwidth),
        "bandwidth_pattern": limits.pattern.name(),
        "int8_gmac_s": rate(limits.int8),
        "f32_gflop_s": rate(limits.f32),
        "handover_ns": limits.handover.map(|rate| nanoseconds(rate).median),
    })
}

/// How long what happens so often takes.
fn nanoseconds(rate: Rate) -> Rate {
    Rate { median: 1e9 / rate.median, low: 1e9 / rate.high, high: 1e9 / rate.low }
}

/// The better of two measurements of a limit, as what disturbs one makes it smaller than it is.
pub(super) fn better(limits: &[Limits; 2], rate: impl Fn(&Limits) -> Rate) -> f64 {
    limits.iter().map(|limits| rate(limits).median).fold(0.0, f64::max)
}

/// The middle of what the tokens a second are of a limit, each sample of what was possible beside it.
fn share(measured: &Measured, rate: impl Fn(&Limits) -> Rate) -> f64 {
    let samples = measured.samples.iter();
    median(samples.map(|sample| sample.speed / better(&sample.limits, &rate)).collect())
}

/// Tokens a second of all samples.
fn speeds(measured: &Measured) -> Vec<f64> {
    measured.samples.iter().map(|sample| sample.speed).collect()
}

fn median(samples: Vec<f64>) -> f64 {
    Rate::of(samples).map_or(f64::NAN, |rate| rate.median)
}

/// The standard deviation of the samples; 0 of one.
fn stddev(samples: &[f64]) -> f64 {
    let n = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / n;
    let squares: f64 = samples.iter().map(|s| (s - mean) * (s - mean)).sum();
    if samples.len() < 2 { 0.0 } else { (squares / (n - 1.0)).sqrt() }
}

#[cfg(test)]
mod tests;
