//! `trine bench`: what it prints, and what it refuses. No number that depends on the machine is tested.

use serde_json::Value;

use super::life::json;
use super::{FIXTURE, Place};

#[test]
fn a_bench_is_one_object_with_the_numbers_that_are_compared() {
    let place = Place::new();
    let args = ["bench", "--shape", "tiny", "--threads", "1", "-r", "2", "-p", "16,8"];
    let more = ["-n", "4", "-d", "0,20", "--json"];
    let report = json(&place.ok(&[&args[..], &more].concat()));
    assert_eq!(report["threads"], 1);
    for key in ["isa", "weights_format", "head_format", "kv_format"] {
        assert!(report[key].is_string(), "{key}: {report}");
    }
    for key in [
        "prefill_tok_s",
        "decode_tok_s",
        "decode_fraction_of_bandwidth",
        "prefill_fraction_of_int8_peak",
        "bandwidth_gb_s",
        "int8_peak_gmac_s",
        "f32_peak_gflop_s",
        "load_s",
        "first_token_s",
    ] {
        assert!(report[key].as_f64().is_some_and(|n| n > 0.0), "{key}: {report}");
    }
    if cfg!(target_os = "linux") {
        assert!(report["peak_rss_bytes"].as_u64() >= Some(1 << 20), "{report}");
    }
    // Two layers with 256 * (256 + 128 + 128 + 256) + 3 * 256 * 768 weights.
    assert_eq!(report["macs_per_token"], 2 * (196_608 + 589_824));
    let tests = |sweep: &str| -> Vec<Value> {
        report[sweep].as_array().unwrap().iter().map(|row| row["test"].clone()).collect()
    };
    assert_eq!(tests("prefill"), ["pp16", "pp8"]);
    assert_eq!(tests("decode"), ["tg4", "tg4@d20"]);
    assert_eq!(report["prefill"][0]["tok_s"], report["prefill_tok_s"]);
    assert_eq!(report["decode"][0]["samples"].as_array().unwrap().len(), 2);
}

#[test]
fn formats_batches_and_depths_are_chosen() {
    let place = Place::new();
    let args = ["bench", "--shape", "tiny", "-t", "2", "-r", "1", "-p", "0", "-n", "4", "--json"];
    let chosen =
        ["--weights", "1.6bit", "--head", "q8_0", "--kv", "int8", "-b", "1,3", "-d", "0,9"];
    let report = json(&place.ok(&[&args[..], &chosen].concat()));
    assert_eq!(report["weights_format"], "1.6bit");
    assert_eq!(report["head_format"], "q8_0");
    assert_eq!(report["kv_format"], "int8");
    assert_eq!(report["head_bytes"], 1024 * 256 * 34 / 32);
    assert_eq!(report["prefill_tok_s"], Value::Null);
    let rows = report["decode"].as_array().unwrap();
    let tests: Vec<_> = rows.iter().map(|row| row["test"].clone()).collect();
    assert_eq!(tests, ["tg4", "tg4 x3", "tg4@d9", "tg4@d9 x3"]);
    assert_eq!(rows[3]["batch"], 3);
}

#[test]
fn a_sketch_of_the_head_is_measured_beside_the_whole_head() {
    let place = Place::new();
    let args = ["bench", "--shape", "tiny", "-t", "2", "-r", "1", "-p", "8", "-n", "4", "--json"];
    let more = ["--head", "f16", "-b", "1,3", "--head-sketch"];
    let bench = |sketch| json(&place.ok(&[&args[..], &more, &[sketch]].concat()));
    let report = bench("on");
    let tests: Vec<_> =
        report["decode"].as_array().unwrap().iter().map(|row| row["test"].clone()).collect();
    assert_eq!(tests, ["tg4", "tg4 sketch", "tg4 x3", "tg4 x3 sketch"]);
    let sketch = &report["head_sketch"];
    assert_eq!(sketch["bytes"], 1024 * 256 * 18 / 32);
    assert!(sketch["times_whole_head"].as_f64() > Some(0.0), "{report}");
    for (batch, read) in [1.0, 3.0].into_iter().zip(sketch["read"].as_array().unwrap()) {
        assert_eq!(read["batch"], batch as usize);
        assert!(read["logits"].as_f64().is_some_and(|n| n < 1024.0 * batch), "{read}");
        let bytes = read["bytes"].as_f64();
        assert!(bytes.is_some_and(|n| (147_456.0..524_288.0).contains(&n)), "{read}");
    }
    // So small a head goes without.
    assert_eq!(bench("auto")["head_sketch"], Value::Null);
}

#[test]
fn kernels_are_timed_at_the_shapes_of_the_model() {
    let place = Place::new();
    let report = json(&place.ok(&["bench", "--shape", "tiny", "--kernels", "--json"]));
    let kernels = report["kernels"].as_array().unwrap();
    // Four shapes of projections with three numbers of tokens, and the head with two.
    assert_eq!(kernels.len(), 14, "{report}");
    for kernel in kernels {
        assert!(kernel["gb_s"].as_f64() > Some(0.0), "{kernel}");
        assert!(kernel["fraction_of_bandwidth"].as_f64() > Some(0.0), "{kernel}");
    }
    assert_eq!(kernels[0]["kernel"], "q, o");
    assert!(kernels[0]["times_scalar_reference"].as_f64() > Some(0.0));
    assert_eq!(kernels[12]["kernel"], "head");
}

#[test]
fn a_bench_of_a_file_is_a_table() {
    let place = Place::new();
    let table = place.ok(&["bench", FIXTURE, "-p", "8", "-n", "2", "-r", "1", "--repeat", "4"]);
    for expected in [
        "| pp8 ",
        "| tg2 ",
        "| rp4 ",
        "| rp4 ahead ",
        "of bandwidth",
        "limits ",
        "times as fast",
        "memory ",
        "start ",
        "loaded in",
    ] {
        assert!(table.contains(expected), "no {expected:?} in {table}");
    }
}

#[test]
fn steps_are_timed_with_the_optimizer_that_is_asked_for() {
    let place = Place::new();
    let steps = ["bench", "train", "--size", "1m", "--ternary-only", "-r", "1", "--json"];
    let set = ["--set", "optimizer.moments=int8", "--set", "optimizer.masters=bf16"];
    let found = json(&place.ok(&[&steps[..], &set].concat()));
    let of = |key: &str| found[key].as_str().unwrap().to_owned();
    assert_eq!(["optimizer", "moments", "masters"].map(of), ["adamw", "int8", "bf16"]);
    assert!(found["tok_s"].as_f64() > Some(0.0));
    let refused = |set: &str, names: &[&str]| {
        place.refused(&[&steps[..], &["--set", set]].concat(), names);
    };
    refused("model.depth=3", &["model.depth=3", "[optimizer]"]);
    refused("optimizer.moments=int7", &["optimizer.moments=int7", "int8"]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = Place::new();
    let shape = ["bench", "--shape", "tiny"];
    let refused = |more: &[&str], names: &[&str]| place.refused(&[&shape, more].concat(), names);
    refused(&["-p", "0", "-n", "0"], &["--prompt", "--gen"]);
    refused(&["-p", "513"], &["pp513", "513 positions", "has 512"]);
    refused(&["-n", "100", "-d", "0,500"], &["tg100@d500", "600 positions", "has 512"]);
    place.refused(&["bench", "missing.gguf"], &["missing.gguf"]);
    // 64 columns are no whole block.
    place.refused_later(
        &["bench", FIXTURE, "--head", "q6_k"],
        &["q6_k", "multiple of 256", "found 64"],
    );
    for args in [
        &["bench"][..],
        &["bench", "m.gguf", "--shape", "tiny"],
        &["bench", "--shape", "nonsense"],
        &["bench", "--shape", "tiny", "--threads", "0"],
        &["bench", "--shape", "tiny", "-r", "0"],
        &["bench", "--shape", "tiny", "-b", "0"],
        &["bench", "--shape", "tiny", "--weights", "3bit"],
        &["bench", "--shape", "tiny", "--kv", "int4"],
        &["bench", "--shape", "tiny", "--kernels", "-n", "3"],
        &["bench", "--shape", "tiny", "-p", "many"],
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, Some(2), "{args:?}: {}", ran.stderr);
    }
}
