//! What a download leaves, what it asks for, and what it does not.

use std::fs;
use std::thread;

use super::*;

#[test]
fn a_repository_becomes_a_snapshot() {
    let place = Place::new();
    let mut seen = Seen::default();
    let fetched = place.watch("hf://our/tiny", &mut seen).unwrap();
    assert_eq!(fetched.path, place.repo().join("snapshots").join(COMMIT));
    assert_eq!((fetched.commit.as_str(), fetched.received), (COMMIT, 5002));
    assert_eq!(names(&fetched.path), ["config.json", "model.safetensors"]);
    assert_eq!(fs::read(fetched.path.join("model.safetensors")).unwrap(), large(5000));
    assert_eq!(place.blobs().len(), 2);
    let begun = [("config.json".into(), Some(2), 0), ("model.safetensors".into(), Some(5000), 0)];
    assert_eq!(seen.begun, begun);
    assert_eq!((seen.last, seen.ended, seen.notes.len()), (5000, 2, 0));
    let resolve = format!("/our/tiny/resolve/{COMMIT}");
    let small = format!("/api/resolve-cache/models/our/tiny/{COMMIT}/config.json");
    assert_eq!(
        lines(&place.hub.requests()),
        [
            "GET /api/models/our/tiny/revision/main".to_owned(),
            format!("HEAD {resolve}/config.json"),
            format!("HEAD {small}"),
            format!("GET {resolve}/config.json"),
            format!("GET {small}"),
            format!("HEAD {resolve}/model.safetensors"),
            format!("GET {resolve}/model.safetensors"),
            format!("GET /{COMMIT}/model.safetensors"),
        ]
    );

    // What is here is not asked for again.
    let again = place.fetch("hf://our/tiny").unwrap();
    assert_eq!((again.path, again.received), (fetched.path, 0));
    assert_eq!(lines(&place.hub.requests()), ["GET /api/models/our/tiny/revision/main"]);
}

#[test]
fn other_programs_find_what_was_downloaded() {
    let place = Place::new();
    place.fetch("hf://our/tiny").unwrap();
    let theirs = hf_hub::Cache::new(place.settings.cache.clone()).model("our/tiny".into());
    for file in ["config.json", "model.safetensors"] {
        let path = theirs.get(file).unwrap();
        assert!(path.starts_with(place.repo().join("snapshots").join(COMMIT)));
        assert!(
            path.canonicalize()
                .unwrap()
                .starts_with(place.repo().join("blobs").canonicalize().unwrap())
        );
    }
    assert!(theirs.get("README.md").is_none());
    // The cache may be moved.
    let moved = place.dir.path().join("moved");
    fs::rename(&place.settings.cache, &moved).unwrap();
    let theirs = hf_hub::Cache::new(moved).model("our/tiny".into());
    assert_eq!(fs::read(theirs.get("model.safetensors").unwrap()).unwrap(), large(5000));
}

#[test]
fn a_revision_is_pinned() {
    let place = Place::new();
    let other = large(3000);
    let files: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("model.safetensors", &other)];
    place.hub.commit(OTHER, &files);
    place.hub.state().refs.insert("v1".into(), COMMIT.into());
    place.hub.state().refs.insert("refs/pr/1".into(), OTHER.into());
    assert_eq!(place.fetch("hf://our/tiny").unwrap().commit, COMMIT);
    place.hub.state().refs.insert("main".into(), OTHER.into());
    // A branch moves on, and only what differs is downloaded; tag and commit stay.
    let moved = place.fetch("hf://our/tiny").unwrap();
    assert_eq!((moved.commit.as_str(), moved.received), (OTHER, 3000));
    assert_eq!(place.blobs().len(), 3);
    assert_eq!(place.fetch("hf://our/tiny@v1").unwrap().commit, COMMIT);
    assert_eq!(place.fetch("hf://our/tiny@refs/pr/1").unwrap().commit, OTHER);
    assert_eq!(place.fetch(&format!("hf://our/tiny@{COMMIT}")).unwrap().commit, COMMIT);
    let refs = place.repo().join("refs");
    assert_eq!(names(&refs), ["main", "refs", "v1"]);
    assert_eq!(fs::read_to_string(refs.join("main")).unwrap(), OTHER);
    assert_eq!(fs::read_to_string(refs.join("refs/pr/1")).unwrap(), OTHER);
}

#[test]
fn a_file_of_a_later_commit_leaves_the_model_of_an_earlier() {
    let mut place = Place::new();
    let whole = place.fetch("hf://our/tiny").unwrap();
    place.hub.commit(OTHER, &[("config.json", b"{ }"), ("model.safetensors", &large(3000))]);
    place.hub.state().refs.insert("main".into(), OTHER.into());
    let file = place.fetch("hf://our/tiny/config.json").unwrap();
    assert_eq!((file.commit.as_str(), file.received), (OTHER, 3));
    place.settings.offline = true;
    assert_eq!(place.fetch("hf://our/tiny").unwrap().path, whole.path);
    // With the other file nothing is missing in the later one any more.
    place.settings.offline = false;
    place.fetch("hf://our/tiny/model.safetensors").unwrap();
    place.settings.offline = true;
    assert_eq!(place.fetch("hf://our/tiny").unwrap().commit, OTHER);
}

#[test]
fn a_file_of_a_commit_needs_no_question() {
    let gguf = large(2000);
    let place = Place::with(&[("d/a b.gguf", &gguf), ("c.gguf", b"c")]);
    place.hub.state().commits.get_mut(COMMIT).unwrap().insert("d/a%20b.gguf".into(), gguf.clone());
    let reference = format!("hf://our/tiny@{COMMIT}/d/a b.gguf");
    let fetched = place.fetch(&reference).unwrap();
    assert!(fetched.path.ends_with("d/a b.gguf"));
    assert_eq!(fs::read(&fetched.path).unwrap(), gguf);
    place.hub.requests();
    assert_eq!(place.fetch(&reference).unwrap().path, fetched.path);
    assert_eq!(lines(&place.hub.requests()), [""; 0]);
}

#[test]
fn one_gguf_is_a_model_and_several_are_a_question() {
    let gguf = large(2000);
    let place = Place::with(&[("config.json", b"{}"), ("m.gguf", &gguf)]);
    let fetched = place.fetch("hf://our/tiny").unwrap();
    assert_eq!(fs::read(&fetched.path).unwrap(), gguf);
    assert_eq!(names(fetched.path.parent().unwrap()), ["m.gguf"]);

    let place = Place::with(&[("a.gguf", &gguf), ("b.gguf", &gguf)]);
    place.refused("hf://our/tiny", &["hf://our/tiny at 1111", "name the one", "a.gguf, b.gguf"]);
    let fetched = place.fetch("hf://our/tiny/b.gguf").unwrap();
    assert!(fetched.path.ends_with("b.gguf"));
    place.refused("hf://our/tiny/c.gguf", &["`c.gguf`", "a.gguf, b.gguf"]);
    let place = Place::with(&[("README.md", b"")]);
    place.refused("hf://our/tiny", &["model.safetensors", "found README.md"]);
}

#[test]
fn all_shards_of_an_index_come() {
    let (a, b) = (large(1500), large(2500));
    let index = br#"{"weight_map": {"x": "b.safetensors", "y": "a.safetensors"}}"#;
    let place = Place::with(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", index),
        ("a.safetensors", &a),
        ("b.safetensors", &b),
        ("c.safetensors", &b),
    ]);
    let fetched = place.fetch("hf://our/tiny").unwrap();
    let expected =
        ["a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json"];
    assert_eq!(names(&fetched.path), expected);
    // Offline, a shard that is gone is missed.
    let mut place = place;
    place.settings.offline = true;
    assert_eq!(place.fetch("hf://our/tiny").unwrap().path, fetched.path);
    fs::remove_file(fetched.path.join("b.safetensors")).unwrap();
    place.refused("hf://our/tiny", &["no b.safetensors", "HF_HUB_OFFLINE"]);
}

#[test]
fn offline_the_cache_is_enough_or_says_what_is_missing() {
    let mut place = Place::new();
    place.settings.offline = true;
    place.refused("hf://our/tiny", &["hf://our/tiny", "hub", "revision `main`", "HF_HUB_OFFLINE"]);
    place.settings.offline = false;
    let fetched = place.fetch("hf://our/tiny").unwrap();
    place.settings.offline = true;
    place.hub.requests();
    let again = place.fetch("hf://our/tiny").unwrap();
    assert_eq!((again.path, again.received), (fetched.path.clone(), 0));
    assert!(place.fetch("hf://our/tiny/config.json").is_ok());
    place.refused("hf://our/tiny/tokenizer.json", &["`tokenizer.json`"]);
    place.refused("hf://our/tiny@v2", &["revision `v2`"]);
    fs::remove_file(fetched.path.join("model.safetensors")).unwrap();
    place.refused("hf://our/tiny", &["model.safetensors", "found config.json"]);
    assert_eq!(lines(&place.hub.requests()), [""; 0]);
}

#[test]
fn an_unreachable_hub_leaves_the_cache() {
    let mut place = Place::new();
    let fetched = place.fetch("hf://our/tiny").unwrap();
    // A port that was free a moment ago answers nobody.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    place.settings.endpoint = format!("http://{free}");
    let mut seen = Seen::default();
    assert_eq!(place.watch("hf://our/tiny", &mut seen).unwrap().path, fetched.path);
    assert_eq!(seen.notes.len(), 1);
    assert!(seen.notes[0].contains("using commit 1111"), "{:?}", seen.notes);
    place.refused("hf://our/other", &["127.0.0.1", "attempts without progress: 5"]);
}

#[test]
fn the_token_stays_with_the_hub() {
    let mut place = Place::new();
    place.hub.state().token = Some("hf_secret".into());
    place.settings.token = Some("hf_secret".into());
    place.fetch("hf://our/tiny").unwrap();
    let requests = place.hub.requests();
    assert!(requests.iter().any(|r| r.at_cdn));
    for request in requests {
        let token = request.headers.get("authorization").map(String::as_str);
        let expected = if request.at_cdn { None } else { Some("Bearer hf_secret") };
        assert_eq!(token, expected, "{request:?}");
    }
}

#[test]
fn downloads_at_once_share_the_work() {
    let weights = large(1 << 20);
    let files: [(&str, &[u8]); 2] = [("config.json", b"{}"), ("model.safetensors", &weights)];
    let place = Place::with(&files);
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let fetched = place.fetch("hf://our/tiny").unwrap();
                assert_eq!(fs::read(fetched.path.join("model.safetensors")).unwrap(), weights);
            });
        }
    });
    assert_eq!(ranges(&place.hub.requests()), [""]);
    assert_eq!(place.blobs().len(), 2);
}

#[test]
fn a_download_waits_for_another() {
    let place = Place::new();
    let first = place.fetch("hf://our/tiny").unwrap();
    let pointer = first.path.join("model.safetensors");
    let blob = pointer.canonicalize().unwrap();
    let etag = blob.file_name().unwrap().to_str().unwrap().to_owned();
    let (kept, lock) = (blob.with_extension("kept"), place.settings.cache.join(".locks"));
    fs::rename(&blob, &kept).unwrap();
    // Another process has the lock, and is about to finish.
    let lock = lock.join("models--our--tiny").join(format!("{etag}.lock"));
    let lock = fs::File::open(lock).unwrap();
    lock.lock().unwrap();
    place.hub.requests();
    struct Finish<'a>(&'a dyn Fn(), Vec<String>);
    impl Observer for Finish<'_> {
        fn note(&mut self, text: &str) {
            self.1.push(text.to_owned());
            (self.0)();
        }
    }
    let finish = || {
        fs::rename(&kept, &blob).unwrap();
        lock.unlock().unwrap();
    };
    let mut observer = Finish(&finish, Vec::new());
    let hub = Hub::new(place.settings.clone()).unwrap();
    let fetched = hub.fetch(&"hf://our/tiny".parse().unwrap(), &mut observer).unwrap();
    assert_eq!(observer.1.len(), 1);
    assert!(observer.1[0].starts_with("model.safetensors: another process"), "{:?}", observer.1);
    assert_eq!(fetched.received, 0);
    assert_eq!(ranges(&place.hub.requests()), [""; 0]);
    assert_eq!(fs::read(pointer).unwrap(), large(5000));
}

#[test]
fn a_hub_may_have_a_path() {
    let mut place = Place::new();
    // Nothing is there, but it is asked for below the path.
    place.settings.endpoint.push_str("/mirror");
    place.refused("hf://our/tiny", &["404"]);
    assert_eq!(lines(&place.hub.requests()), ["GET /mirror/api/models/our/tiny/revision/main"]);
    place.settings.endpoint = "huggingface".into();
    place.refused("hf://our/tiny", &["HF_ENDPOINT", "found huggingface"]);
}

#[test]
fn a_file_of_a_data_set_is_fetched() {
    let place = Place::with(&[("test.jsonl", b"{}\n"), ("README.md", b"read me")]);
    let fetched = place.fetch("hf://datasets/our/tiny/test.jsonl").unwrap();
    let repo = place.settings.cache.join("datasets--our--tiny");
    assert_eq!(fetched.path, repo.join("snapshots").join(COMMIT).join("test.jsonl"));
    assert_eq!(fs::read(&fetched.path).unwrap(), b"{}\n");
    assert_eq!(lines(&place.hub.requests())[0], "GET /api/datasets/our/tiny/revision/main");
    let theirs = hf_hub::Cache::new(place.settings.cache.clone()).dataset("our/tiny".into());
    assert!(theirs.get("test.jsonl").is_some());
    assert!(!place.repo().exists());
    place.refused("hf://datasets/our/tiny", &["hf://datasets/our/tiny/FILE", "test.jsonl"]);
    place.refused("hf://datasets/our/tiny/train.jsonl", &["train.jsonl"]);
}
