//! Models named by `hf://`, from a hub that is played by local servers.

#[path = "../../../trine-hub/tests/hub/server.rs"]
mod server;

use std::fs;
use std::process::{Command, Stdio};

use super::{FIXTURE, Place, Ran};
use server::FakeHub;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub that has the fixture.
fn hub() -> FakeHub {
    let files: Vec<(String, Vec<u8>)> = fs::read_dir(FIXTURE)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
    FakeHub::new(COMMIT, &files)
}

/// The program with a hub and a cache below its directory.
fn command(place: &Place, hub: &FakeHub, args: &[&str]) -> Command {
    let mut command = place.command(args);
    for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", &hub.url).env("HF_HOME", place.path("hf"));
    command
}

fn run(place: &Place, hub: &FakeHub, args: &[&str], variables: &[(&str, &str)]) -> Ran {
    Ran::of(command(place, hub, args).envs(variables.iter().copied()).output().unwrap())
}

#[track_caller]
fn ok(ran: Ran) -> String {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    ran.stdout
}

#[test]
fn a_model_of_the_hub_is_a_model() {
    let (place, hub) = (Place::new(), hub());
    let inspect = |model| ["inspect", model, "--json"];
    let theirs = ok(run(&place, &hub, &inspect("hf://our/tiny"), &[]));
    let snapshot = place.path("hf/hub/models--our--tiny/snapshots").join(COMMIT);
    let snapshot = snapshot.to_str().unwrap();
    assert_eq!(theirs.replace(snapshot, FIXTURE), place.ok(&inspect(FIXTURE)));
    assert!(hub.requests().iter().any(|r| r.at_cdn));

    // Whatever takes a model takes this one, and nothing is downloaded twice.
    let run = |args: &[&str]| ok(run(&place, &hub, args, &[]));
    let prompt = ["-p", "the", "-n", "3", "--json", "--temperature", "0"];
    let text = |model| -> String {
        let answer = run(&[&["run", model][..], &prompt].concat());
        answer.split("\"finish\"").next().unwrap().to_owned()
    };
    assert_eq!(text("hf://our/tiny"), text(FIXTURE));
    let logits = |model| run(&["logits", model, "--ids", "1,2", "--json"]);
    assert_eq!(logits("hf://our/tiny@main"), logits(FIXTURE));
    run(&["convert", "hf://our/tiny", "model.gguf", "--embed", "f32"]);
    run(&["verify", "hf://our/tiny", "model.gguf"]);
    let encode = |model| run(&["tokenizer", "encode", model, "the"]);
    assert_eq!(encode("hf://our/tiny"), encode(FIXTURE));
    run(&["run", "model.gguf", "--tokenizer", "hf://our/tiny", "-n", "2"]);
    assert!(!hub.requests().iter().any(|r| r.at_cdn));
}

#[test]
fn download_prints_the_path() {
    let (place, hub) = (Place::new(), hub());
    hub.state().refs.insert("v1".into(), COMMIT.into());
    let run = |args: &[&str], variables: &[(&str, &str)]| run(&place, &hub, args, variables);
    let file = ["download", "hf://our/tiny/config.json", "--revision", "v1"];
    let path = ok(run(&file, &[]));
    assert_eq!(
        fs::read(path.trim_end()).unwrap(),
        fs::read(format!("{FIXTURE}/config.json")).unwrap()
    );
    let json = ok(run(&["download", "hf://our/tiny@v1", "--json"], &[]));
    assert!(json.contains(COMMIT) && json.contains("\"revision\":\"v1\""), "{json}");
    let path = ok(run(&["download", "hf://our/tiny@v1"], &[("HF_HUB_OFFLINE", "1")]));
    assert!(path.trim_end().ends_with(COMMIT), "{path}");
}

#[test]
fn processes_at_once_share_a_download() {
    let (place, hub) = (Place::new(), hub());
    let start = |_| {
        let mut command = command(&place, &hub, &["inspect", "hf://our/tiny"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..4).map(start).collect();
    for child in children {
        let shown = ok(Ran::of(child.wait_with_output().unwrap()));
        assert!(shown.contains("206,272 parameters"), "{shown}");
    }
    let whole = hub.requests().into_iter().filter(|r| r.at_cdn).map(|r| r.path);
    let mut whole: Vec<String> = whole.collect();
    let count = whole.len();
    whole.sort();
    whole.dedup();
    assert!(count == whole.len() && count > 0, "{count} downloads of {whole:?}");
}

#[test]
fn what_the_hub_does_not_give_is_one_line() {
    let (place, hub) = (Place::new(), hub());
    let refused = |args: &[&str], variables: &[(&str, &str)], names: &[&str]| {
        let ran = run(&place, &hub, args, variables);
        ran.check_refused(args, names);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    };
    refused(&["inspect", "hf://our/tinny"], &[], &["hf://our/tinny", "404", "spelling"]);
    refused(&["inspect", "hf://tiny"], &[], &["`hf://tiny`", "hf://owner/name"]);
    refused(&["run", "hf://our/tiny"], &[("HF_HUB_OFFLINE", "1")], &["HF_HUB_OFFLINE", "hf/hub"]);
    refused(&["chat", "hf://our/tiny"], &[("HF_ENDPOINT", "hub")], &["HF_ENDPOINT", "found hub"]);
    hub.state().token = Some("hf_secret".into());
    refused(&["inspect", "hf://our/tiny"], &[], &["401", "set HF_TOKEN"]);
    hub.state().corrupt = true;
    let token = [("HF_TOKEN", "hf_secret")];
    refused(&["inspect", "hf://our/tiny"], &token, &["config.json", "git SHA-1", "deleted"]);
    hub.state().corrupt = false;
    ok(run(&place, &hub, &["inspect", "hf://our/tiny"], &token));
}

#[test]
fn items_of_a_data_set_on_the_hub_are_evaluated() {
    let place = Place::new();
    let item = |i: usize| serde_json::json!({ "query": format!("q {i}"), "choices": ["a", "b c"], "gold": i % 2 });
    let items: String = (0..6).map(|i| item(i).to_string() + "\n").collect();
    let hub = FakeHub::new(COMMIT, &[("data/test.jsonl", items.as_bytes())]);
    let data = "hf://datasets/our/tiny/data/test.jsonl";
    let args = ["eval", FIXTURE, "-t", "arc_easy", "-d", data, "--no-keep", "--json"];
    let found = ok(run(&place, &hub, &args, &[]));
    let found: serde_json::Value = serde_json::from_str(&found).unwrap();
    assert_eq!(found["models"][0]["tasks"]["arc_easy"]["items"], 6);
    let refused = run(&place, &hub, &["eval", "none", "-t", "arc_easy", "-d", "hf://o/n"], &[]);
    assert!(refused.stderr.contains("hf://datasets/owner/name/FILE"), "{}", refused.stderr);
}
