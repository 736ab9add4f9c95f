//! Connections, servers and answers that fail.

use std::fs;

use super::*;

#[test]
fn a_dropped_connection_is_continued() {
    let place = Place::new();
    place.fetch("hf://our/tiny/config.json").unwrap();
    place.hub.state().drops = vec![700, 1500];
    place.hub.requests();
    let mut seen = Seen::default();
    let fetched = place.watch("hf://our/tiny", &mut seen).unwrap();
    assert_eq!(fetched.received, 5000);
    assert_eq!(fs::read(fetched.path.join("model.safetensors")).unwrap(), large(5000));
    assert_eq!(ranges(&place.hub.requests()), ["", "bytes=700-", "bytes=2200-"]);
    assert_eq!(seen.notes.len(), 2);
    assert!(seen.notes[0].contains("trying again"), "{:?}", seen.notes);
}

#[test]
fn an_interrupted_download_is_continued_by_the_next() {
    let mut place = Place::new();
    place.fetch("hf://our/tiny/config.json").unwrap();
    place.settings.attempts = 1;
    place.hub.state().drops = vec![1234];
    place.refused("hf://our/tiny", &["model.safetensors", "attempts without progress: 1"]);
    let part = place.blobs().into_iter().find(|name| name.ends_with(".incomplete")).unwrap();
    assert_eq!(fs::metadata(place.repo().join("blobs").join(part)).unwrap().len(), 1234);
    assert!(!place.repo().join("snapshots").join(COMMIT).join("model.safetensors").exists());
    place.hub.requests();
    let mut seen = Seen::default();
    let fetched = place.watch("hf://our/tiny", &mut seen).unwrap();
    assert_eq!(fetched.received, 5000 - 1234);
    assert_eq!(seen.begun, [("model.safetensors".into(), Some(5000), 1234)]);
    assert_eq!(ranges(&place.hub.requests()), ["bytes=1234-"]);
    assert_eq!(fs::read(fetched.path.join("model.safetensors")).unwrap(), large(5000));
    assert!(place.blobs().iter().all(|name| !name.ends_with(".incomplete")));
}

#[test]
fn a_server_without_ranges_begins_anew() {
    let place = Place::new();
    place.fetch("hf://our/tiny/config.json").unwrap();
    place.hub.state().no_ranges = true;
    place.hub.state().drops = vec![4000, 300];
    let fetched = place.fetch("hf://our/tiny").unwrap();
    assert_eq!(fetched.received, 4000 + 300 + 5000);
    assert_eq!(fs::read(fetched.path.join("model.safetensors")).unwrap(), large(5000));
}

#[test]
fn a_server_that_never_gets_further_is_given_up() {
    let place = Place::new();
    place.fetch("hf://our/tiny/config.json").unwrap();
    place.hub.state().no_ranges = true;
    place.hub.state().drops = vec![4000; 20];
    place.refused("hf://our/tiny", &["model.safetensors", "4000", "progress: 5"]);
    assert_eq!(place.hub.state().drops.len(), 15);
}

#[test]
fn a_silent_connection_is_left() {
    let mut place = Place::new();
    place.settings.timeout = Duration::from_millis(300);
    place.fetch("hf://our/tiny/config.json").unwrap();
    place.hub.state().stall = Some(1000);
    place.hub.requests();
    let fetched = place.fetch("hf://our/tiny").unwrap();
    assert_eq!(ranges(&place.hub.requests()), ["", "bytes=1000-"]);
    assert_eq!(fs::read(fetched.path.join("model.safetensors")).unwrap(), large(5000));
}

#[test]
fn a_busy_hub_is_asked_again() {
    let place = Place::new();
    place.hub.state().refusals = vec![(503, ""), (429, "")];
    let mut seen = Seen::default();
    place.watch("hf://our/tiny", &mut seen).unwrap();
    assert_eq!(seen.notes.len(), 2);
    assert!(seen.notes[0].contains("503") && seen.notes[1].contains("429"), "{:?}", seen.notes);
    // But not for ever.
    place.hub.state().refusals = vec![(503, ""); 9];
    place.refused("hf://our/tiny@v1", &["503", "attempts without progress: 5"]);
    assert_eq!(place.hub.state().refusals.len(), 4);
}

#[test]
fn a_wrong_hash_is_told_and_deleted() {
    let place = Place::new();
    place.fetch("hf://our/tiny/config.json").unwrap();
    place.hub.state().corrupt = true;
    place.refused("hf://our/tiny", &["hf://our/tiny/model.safetensors", "SHA-256", "deleted"]);
    assert_eq!(place.blobs().len(), 1);
    place.refused("hf://our/tiny/README.md", &["hf://our/tiny/README.md", "git SHA-1", "deleted"]);
    assert_eq!(place.blobs().len(), 1);
    assert!(!place.repo().join("snapshots").join(COMMIT).join("model.safetensors").exists());
    place.hub.state().corrupt = false;
    assert_eq!(place.fetch("hf://our/tiny").unwrap().received, 5000);
}

#[test]
fn a_damaged_beginning_is_noticed() {
    let mut place = Place::new();
    place.settings.attempts = 1;
    place.fetch("hf://our/tiny/config.json").unwrap();
    place.hub.state().drops = vec![2000];
    place.refused("hf://our/tiny", &[]);
    let part = place.blobs().into_iter().find(|name| name.ends_with(".incomplete")).unwrap();
    let part = place.repo().join("blobs").join(part);
    fs::write(&part, vec![7; 2000]).unwrap();
    place.refused("hf://our/tiny", &["SHA-256"]);
    // One that is longer than the file is none of its beginnings.
    fs::write(&part, vec![7; 6000]).unwrap();
    assert_eq!(place.fetch("hf://our/tiny").unwrap().received, 5000);
}

#[test]
fn a_file_that_is_longer_than_described_is_refused() {
    let place = Place::new();
    place.hub.state().too_long = true;
    place.refused("hf://our/tiny/model.safetensors", &["model.safetensors", "more than the 5000"]);
    place.hub.state().too_long = false;
    assert_eq!(place.fetch("hf://our/tiny/model.safetensors").unwrap().received, 5000);
}

#[test]
fn a_hash_of_another_kind_is_no_check() {
    let place = Place::new();
    place.hub.state().etag = Some("abc-123".into());
    let mut seen = Seen::default();
    place.watch("hf://our/tiny/model.safetensors", &mut seen).unwrap();
    assert!(seen.notes[0].contains("no hash"), "{:?}", seen.notes);
    assert_eq!(place.blobs(), ["abc-123"]);
}

#[test]
fn statuses_say_what_to_do() {
    let mut place = Place::new();
    let next = |status, code| place.hub.state().refusals.push((status, code));
    next(401, "");
    place.refused("hf://our/tiny", &["hf://our/tiny", "401", "spelling", "set HF_TOKEN"]);
    let gated = format!("{}/our/tiny", place.hub.url);
    for (status, code) in [(403, "GatedRepo"), (401, "GatedRepo"), (403, "")] {
        next(status, code);
        place.refused("hf://our/tiny", &["restricted", &gated, "HF_TOKEN"]);
    }
    place.refused("hf://our/tinny", &["hf://our/tinny", "404", "spelling"]);
    place.refused("hf://our/tiny@v9", &["hf://our/tiny@v9", "404", "no revision `v9`"]);
    next(418, "");
    place.refused("hf://our/tiny", &["418", "is http://127.0.0.1", "HF_ENDPOINT"]);
    place.hub.state().token = Some("hf_right".into());
    place.settings.token = Some("hf_wrong".into());
    place.refused("hf://our/tiny", &["401", "the token is not valid", "HF_TOKEN"]);
}

#[test]
fn answers_of_no_hub_are_refused() {
    let place = Place::new();
    let weights = large(5000);
    let files: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("model.safetensors", &weights)];
    for evil in ["../../../evil", "..", "a b", "short"] {
        place.hub.commit(evil, &files);
        place.hub.state().refs.insert("evil".into(), evil.into());
        place.refused("hf://our/tiny@evil", &["`sha`", evil]);
    }
    for evil in ["../../evil", "..", ".hidden", "a/b", ""] {
        place.hub.state().etag = Some(evil.into());
        place.refused("hf://our/tiny", &["hf://our/tiny/config.json", "ETag", evil]);
    }
    assert_eq!(names(place.dir.path()), [""; 0]);
}

#[test]
fn an_index_cannot_reach_out_of_the_snapshot() {
    for shard in ["../../../../evil.safetensors", "/evil.safetensors", "d\\\\evil.safetensors"] {
        let index = format!(r#"{{"weight_map": {{"x": "{shard}"}}}}"#);
        let place = Place::with(&[
            ("config.json", b"{}"),
            ("model.safetensors.index.json", index.as_bytes()),
            ("../../../../evil.safetensors", b"evil"),
        ]);
        place.refused("hf://our/tiny", &["model.safetensors.index.json", "evil.safetensors"]);
        let asked = lines(&place.hub.requests());
        assert!(!asked.iter().any(|line| line.contains("evil")), "{asked:?}");
        assert!(!place.dir.path().join("evil.safetensors").exists());
    }
    let index = br#"{"weight_map": {"x": "a.safetensors"}}"#;
    let place = Place::with(&[("config.json", b"{}"), ("model.safetensors.index.json", index)]);
    place.refused("hf://our/tiny", &["a.safetensors, which model.safetensors.index.json names"]);
}
