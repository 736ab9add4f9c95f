//! Steps and scores on a device other than the CPU: what a GPU would do, on the CPU.

use serde_json::Value;

use super::{FIXTURE, Place, TINY};

fn json(text: &str) -> Value {
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

#[test]
fn a_checkpoint_scores_on_a_device_as_on_the_cpu() {
    let place = Place::new();
    let line = |i: usize| {
        let choices = [1, 2, 3, 4].map(|c| format!("about {}", (i + 3) * c));
        let item = serde_json::json!({ "query": format!("What is {i}?"), "choices": choices, "gold": i % 4 });
        item.to_string() + "\n"
    };
    std::fs::create_dir(place.path("sets")).unwrap();
    place.write("sets/arc_easy.jsonl", (0..6).map(line).collect::<String>());
    let args = ["eval", FIXTURE, "-t", "arc_easy", "-d", "sets", "--no-keep", "--json"];
    let on_cpu = json(&place.ok(&args));
    let on_device = json(&place.ok(&[&args[..], &["--device", "emulator"]].concat()));
    let metrics = |found: &Value| found["models"][0]["tasks"]["arc_easy"]["metrics"].clone();
    assert_eq!(metrics(&on_device), metrics(&on_cpu));
    let wrong = place.run(&[&args[..], &["--device", "gpu"]].concat());
    assert!(wrong.code == Some(2) && wrong.stderr.contains("cuda:N"), "{}", wrong.stderr);
    let both = [&args[..], &["--device", "emulator", "--one-by-one"]].concat();
    place.refused(&both, &["--one-by-one", "--device emulator"]);
}

#[test]
fn steps_are_timed_on_a_device() {
    let place = Place::new();
    let args = ["bench", "train", "--device", "emulator", "--shape", "tiny", "-r", "1"];
    let args = [&args[..], &["--batch", "1", "--seq", "32"]].concat();
    let found = json(&place.ok(&[&args[..], &["--kernels", "--json"]].concat()));
    let kernels = found["kernels"].as_array().unwrap();
    let named = |name: &str| kernels.iter().find(|kernel| kernel["name"] == name).unwrap();
    // Two layers have two each, and a norm before the head.
    assert_eq!(named("norm_f32_bf16_2")["times"], 5);
    assert_eq!(named("adamw")["times"], 1);
    assert!(found["tok_s"].as_f64().unwrap() > 0.0 && found["full_tok_s"].as_f64().unwrap() > 0.0);
    assert_eq!((&found["shape"], &found["batch"]), (&"tiny".into(), &1.into()));
    assert!(place.ok(&args).contains("full precision"));
}

#[test]
fn a_gpu_that_is_not_there_is_said_to_be_missing() {
    let place = Place::with_data();
    place.write("tiny.toml", TINY);
    let args = ["train", "tiny.toml", "--data", "data", "--out", "run"];
    // No machine has a hundred of them.
    let args = [&args[..], &["--device", "cuda:99"]].concat();
    let ran = place.run(&args);
    ran.check_refused(&args, &[]);
    assert!(!place.exists("run/config.toml"));
    let missing = ["libcuda", "libcublasLt", "libnvrtc", "no CUDA device 99"];
    assert!(missing.iter().any(|what| ran.stderr.contains(what)), "{}", ran.stderr);
}
