//! Watching runs: what training logs beside its losses, and the page about it.

use std::fs::{self, OpenOptions};
use std::io::Write;

use super::Place;
use super::life::json;

const WATCHED: [&str; 15] = [
    "train",
    "tiny.toml",
    "--data",
    "data",
    "--set",
    "diagnostics.every=5",
    "--set",
    "diagnostics.tensorboard=true",
    "--set",
    "samples.every=10",
    "--set",
    "samples.prompts=[\"The \", \"\"]",
    "--set",
    "samples.max_tokens=8",
    "--out",
];

#[test]
fn a_watched_run_makes_a_page() {
    let place = Place::with_data();
    place.ok(&[&WATCHED[..], &["a"]].concat());
    assert_eq!(fs::read_dir(place.path("a/tensorboard")).unwrap().count(), 1);
    assert_eq!(place.ok(&["report", "a"]), "");
    let page = String::from_utf8(place.read("a/report.html")).unwrap();
    let parts = ["Training loss", "Flips over time", "\u{201c}The \u{201d}", "From nothing"];
    for part in parts {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("http:") && !page.contains("https:"));

    // As a run that is going on leaves it.
    let mut metrics = OpenOptions::new().append(true).open(place.path("a/metrics.jsonl")).unwrap();
    metrics.write_all(b"{\"step\":21,\"lo").unwrap();
    let one = json(&place.ok(&["report", "a", "--json"]));
    assert_eq!((&one[0]["step"], &one[0]["damaged_lines"]), (&20.into(), &0.into()));
    assert!(one[0]["val_loss"].as_f64().unwrap() > 0.0 && one[0]["zero"].as_f64().is_some());
    assert_eq!(place.leftovers(), [] as [String; 0]);
}

#[test]
fn runs_are_compared() {
    let place = Place::with_data();
    let train = ["train", "tiny.toml", "--data", "data", "--out"];
    place.ok(&[&train[..], &["a"]].concat());
    place.ok(&[&train[..], &["b", "--set", "seed=5", "--set", "diagnostics.every=0"]].concat());
    place.ok(&["report", "a", "b", "-o", "both.html"]);
    assert!(String::from_utf8(place.read("both.html")).unwrap().contains("2 runs"));
    let both = json(&place.ok(&["report", "a", "b", "--json"]));
    assert_eq!(both[1]["differing"]["seed"], "5");
    assert_eq!((&both[0]["name"], &both[1]["name"]), (&"a".into(), &"b".into()));
}

#[test]
fn what_is_no_run_is_refused() {
    let place = Place::new();
    place.refused(&["report", "nowhere"], &["nowhere", "config.toml"]);
    place.write("config.toml", "[model]");
    place.refused(&["report", "."], &[".: expected a run directory", "run.json"]);
    place.write("run.json", "{");
    place.refused(&["report", "."], &["run.json", "expected JSON"]);
    assert_eq!(place.run(&["report"]).code, Some(2));
}

#[test]
fn evaluations_of_a_run_stand_beside_its_curves() {
    let place = Place::with_data();
    place.ok(&["train", "tiny.toml", "--data", "data", "--out", "a"]);
    let item = |i: usize| {
        let choices = [format!("a{i}"), format!("b {i}"), "c".to_owned()];
        serde_json::json!({ "query": format!("q {i}"), "choices": choices, "gold": i % 3 })
    };
    let items: String = (0..12).map(|i| item(i).to_string() + "\n").collect();
    place.write("arc_easy.jsonl", items);
    place.ok(&["eval", "a", "-t", "arc_easy", "--no-keep"]);
    assert!(!place.exists("a/evaluations.jsonl"));
    let found = json(&place.ok(&["eval", "a", "-t", "arc_easy", "--json"]));
    place.ok(&["eval", "a", "-t", "arc_easy"]);
    let one = json(&place.ok(&["report", "a", "--json"]));
    let all = one[0]["evaluations"].as_array().unwrap();
    assert_eq!(all.len(), 1);
    let task = &found["models"][0]["tasks"]["arc_easy"];
    assert_eq!((&all[0]["step"], &all[0]["scored"]), (&20.into(), &12.into()));
    assert_eq!(all[0]["metrics"], task["metrics"]);
    place.ok(&["report", "a"]);
    let page = String::from_utf8(place.read("a/report.html")).unwrap();
    assert!(page.contains("<h2>Evaluations</h2>") && page.contains("step 20, 12 items"));
}
