//! Files and directories appear whole or not at all.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;

use tempfile::tempdir;
use trine_format::{AtomicDir, AtomicFile, flush_name, map_file, replaceable};

fn entries(dir: &std::path::Path) -> Vec<String> {
    let name = |e: fs::DirEntry| e.file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| name(e.unwrap())).collect();
    names.sort();
    names
}

#[test]
fn a_dropped_file_leaves_nothing_and_keeps_the_old_one() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"half").unwrap();
    drop(file);
    assert_eq!(entries(dir.path()), [""; 0]);

    fs::write(&path, "old").unwrap();
    let mut file = AtomicFile::create(&path).unwrap();
    file.put(b"half").unwrap();
    drop(file);
    assert_eq!(entries(dir.path()), ["model.gguf"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_committed_file_replaces_the_old_one_and_leaves_its_map_alone() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, "old").unwrap();
    let map = map_file(&path).unwrap();
    let mut file = AtomicFile::create(&path).unwrap();
    file.write_all(b"new").unwrap();
    file.commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(&map[..], b"old");
    assert_eq!(entries(dir.path()), ["model.gguf"]);
}

#[test]
fn a_missing_directory_is_named_with_the_final_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("missing/model.gguf");
    let error = AtomicFile::create(&path).unwrap_err().to_string();
    assert!(error.contains("missing/model.gguf") && error.contains("create"), "{error}");
}

#[test]
fn a_dropped_directory_leaves_nothing() {
    let dir = tempdir().unwrap();
    let staged = AtomicDir::create(&dir.path().join("step-1")).unwrap();
    fs::write(staged.path().join("config.json"), "{}").unwrap();
    drop(staged);
    assert_eq!(entries(dir.path()), [""; 0]);
}

#[test]
fn a_directory_that_is_in_use_is_only_replaced_on_request() {
    let dir = tempdir().unwrap();
    let target = dir.path().join("step-1");
    let stage = |text: &str| {
        let staged = AtomicDir::create(&target).unwrap();
        fs::write(staged.path().join("config.json"), text).unwrap();
        staged
    };
    stage("old").commit().unwrap();
    assert!(stage("new").commit().is_err());
    assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "old");
    stage("new").commit_replacing().unwrap();
    assert_eq!(fs::read_to_string(target.join("config.json")).unwrap(), "new");
    assert_eq!(entries(dir.path()), ["step-1"]);
}

#[cfg(unix)]
#[test]
fn finished_files_have_ordinary_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempdir().unwrap();
    let plain = dir.path().join("plain");
    let path = dir.path().join("atomic");
    fs::write(&plain, "").unwrap();
    AtomicFile::create(&path).unwrap().commit().unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&path), mode(&plain));
}

#[test]
fn empty_files_can_be_mapped_and_directories_cannot() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("empty");
    fs::write(&path, "").unwrap();
    assert!(map_file(&path).unwrap().is_empty());
    assert!(map_file(dir.path()).is_err());
}

/// A rename would put a file where the device is.
#[cfg(unix)]
#[test]
fn only_free_names_and_regular_files_are_replaceable() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    replaceable(&path).unwrap();
    fs::write(&path, "old").unwrap();
    replaceable(&path).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = replaceable(&socket).unwrap_err().to_string();
    assert!(error.contains("a device or pipe"), "{error}");
    let error = AtomicFile::create(dir.path()).unwrap_err().to_string();
    assert!(error.contains("a directory"), "{error}");
}

#[test]
fn an_error_names_the_file_asked_for_and_no_temporary() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("missing").join("model.gguf");
    for error in [AtomicFile::create(&path).unwrap_err(), AtomicDir::create(&path).unwrap_err()] {
        let error = error.to_string();
        assert!(error.contains("model.gguf") && !error.contains(".trine-"), "{error}");
    }
}

#[test]
fn a_name_is_flushed_with_its_directory() {
    let dir = tempdir().unwrap();
    flush_name(&dir.path().join("taken away")).unwrap();
    flush_name(std::path::Path::new("Cargo.toml")).unwrap();
    if cfg!(unix) {
        let error = flush_name(&dir.path().join("missing/m")).unwrap_err().to_string();
        assert!(error.contains("missing/m") && error.contains("flush"), "{error}");
    }
}

/// More than is flushed at once, so that flushing goes on while more is written.
#[test]
fn large_files_are_whole() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("large");
    let part: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
    let mut file = AtomicFile::create(&path).unwrap();
    for i in 0..200 {
        if i % 2 == 0 { file.put(&part).unwrap() } else { file.write_all(&part).unwrap() }
    }
    assert!(!path.exists());
    file.commit().unwrap();
    let read = fs::read(&path).unwrap();
    assert!(read.len() == 200 << 20 && read.chunks(1 << 20).all(|chunk| chunk == part));
}
