use super::*;
use crate::commands::bench::runs::Sample;
use trine_kernels::Packing;
use trine_kernels::limits::Pattern;
use trine_kernels::nn::KvType;

fn rate(median: f64) -> Rate {
    Rate { median, low: median, high: median }
}

/// 400 products, 800 bytes of weights and head, 2 bytes of cache a position; a machine of 100 kB/s
/// and 100 k products a second, at its better moment.
fn report() -> Report {
    let limits = |scale: f64| Limits {
        bandwidth: rate(1e5 * scale),
        pattern: Pattern::Linear,
        int8: rate(1e5 * scale),
        f32: rate(1e5 * scale),
        bf16: None,
        handover: Some(rate(4e7)),
    };
    let limits = [limits(0.7), limits(1.0)];
    let measured = |test, speeds: &[f64]| Measured {
        test,
        samples: speeds.iter().map(|&speed| Sample { speed, limits }).collect(),
        joules: None,
    };
    let decode = |depth, batch| Test::Decode { tokens: 1, depth, batch, sketch: false };
    let read = BTreeMap::from([(1, Read { logits: 3.0, bytes: 70.0 })]);
    Report {
        setting: Setting {
            model: "m".into(),
            parameters: 1,
            formats: Formats { weights: Packing::Bits2, head: Dtype::Q6_K, kv: KvType::F16 },
            processor: None,
            threads: 2,
            limits: limits.to_vec(),
            others: Some(0.5),
        },
        traffic: Traffic { macs: 400, weights: 600, head: 200, position: 2 },
        sketch: Some(Sketched { bytes: 60, read }),
        load_seconds: 0.5,
        from_file: true,
        first_token: (128, 0.25),
        loaded: Some(Memory { now: 5, peak: 7 }),
        peak: Some(7),
        measured: vec![
            measured(Test::Prefill { tokens: 8 }, &[190.0, 200.0, 230.0]),
            measured(decode(0, 1), &[100.0]),
            measured(decode(100, 1), &[50.0]),
            measured(decode(0, 8), &[400.0]),
            measured(decode(0, 1).and_sketch()[1], &[120.0]),
        ],
        no_energy: Some("no counters".into()),
    }
}

fn assert_near(found: &Value, expected: f64) {
    let near = |found: f64| (found - expected).abs() < 1e-12 * expected;
    assert!(found.as_f64().is_some_and(near), "{found}, expected {expected}");
}

#[test]
fn shares_are_of_the_better_limits() {
    let json = report().json();
    assert_eq!(json["prefill_tok_s"], 200.0);
    assert_near(&json["prefill_fraction_of_int8_peak"], 400.0 * 200.0 / 1e5);
    assert_eq!(json["decode_tok_s"], 100.0);
    // The token attends to itself.
    assert_near(&json["decode_fraction_of_bandwidth"], (800.0 + 2.0) * 100.0 / 1e5);
    let rows = json["decode"].as_array().unwrap();
    assert_near(&rows[1]["fraction_of_bandwidth"], (800.0 + 202.0) * 50.0 / 1e5);
    assert_near(&rows[2]["fraction_of_bandwidth"], (100.0 + 2.0) * 400.0 / 1e5);
    assert_eq!(rows[2]["batch"], 8);
    assert_eq!(json["prefill"][0]["fraction_of_bandwidth"], Value::Null);
    assert_eq!(json["start_to_first_token_s"], 0.75);
    assert_eq!(json["energy"]["not_available"], "no counters");
    assert_near(&json["limits"][0]["handover_ns"], 25.0);
}

/// A machine that is half as fast in every other turn: shares and comparisons do not notice.
#[test]
fn samples_are_compared_with_what_was_possible_at_their_time() {
    let mut report = report();
    for (m, turns) in report.measured.iter_mut().zip([[1.0, 0.5, 0.5]; 3]) {
        let sample = m.samples[0];
        let at = |scale: f64| {
            let slower = |limits: Limits| Limits {
                bandwidth: rate(limits.bandwidth.median * scale),
                int8: rate(limits.int8.median * scale),
                ..limits
            };
            Sample { speed: sample.speed * scale, limits: sample.limits.map(slower) }
        };
        m.samples = turns.map(at).to_vec();
    }
    let json = report.json();
    assert_eq!(json["decode_tok_s"], 50.0);
    assert_near(&json["decode_fraction_of_bandwidth"], (800.0 + 2.0) * 100.0 / 1e5);
    assert_near(&json["decode"][1]["fraction_slower_than_without_context"], 0.5);
}

#[test]
fn a_context_costs_the_time_beyond_that_without() {
    let json = report().json();
    assert_eq!(json["decode"][0]["context_s_per_token"], Value::Null);
    let seconds = json["decode"][1]["context_s_per_token"].as_f64().unwrap();
    assert!((seconds - 0.01).abs() < 1e-12, "{seconds}");
    let table = report().table();
    assert!(table.contains("tg1@d100 is 50.0 % slower, 10.00 ms a token: 200 B"), "{table}");
    assert!(table.contains("other programs took 50 %"), "{table}");
    assert!(table.contains("cores       25 ns apart (25 to 25)"), "{table}");
}

#[test]
fn a_sketch_counts_as_the_bytes_that_are_read() {
    let json = report().json();
    let sketch = &json["head_sketch"];
    assert_eq!((&sketch["bytes"], &sketch["decode_tok_s"]), (&json!(60), &json!(120.0)));
    assert_near(&sketch["times_whole_head"], 1.2);
    assert_near(&sketch["decode_fraction_of_bandwidth"], (670.0 + 2.0) * 120.0 / 1e5);
    let row = &json["decode"][3];
    assert_eq!((&row["test"], &row["head_sketch"]), (&json!("tg1 sketch"), &json!(true)));
    assert_eq!(sketch["read"][0]["logits"], 3.0);
    let table = report().table();
    let line = "tg1 sketch: 1.20 times as fast as with the whole head, reads 70 B of its 200 B";
    assert!(table.contains(line), "{table}");
    let without = Report { sketch: None, ..report() }.json();
    assert_eq!(without["head_sketch"], Value::Null);
}

#[test]
fn a_deviation_is_that_of_a_sample() {
    assert_eq!(stddev(&[3.0]), 0.0);
    assert_eq!(stddev(&[1.0, 3.0]), 2f64.sqrt());
}
