//! Disks that say no.

use std::fs;

use super::*;

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let mut place = Place::new();
    let file = place.dir.path().join("file");
    fs::write(&file, "").unwrap();
    place.settings.cache = file.join("hub");
    let path = file.join("hub");
    place.refused("hf://our/tiny", &[path.to_str().unwrap(), "cannot create", "HF_HOME"]);
    // A directory where a blob should be.
    let mut place = Place::new();
    place.settings.cache = place.dir.path().join("hub");
    place.fetch("hf://our/tiny").unwrap();
    let snapshot = place.repo().join("snapshots").join(COMMIT);
    let blob = snapshot.join("model.safetensors").canonicalize().unwrap();
    fs::remove_file(&blob).unwrap();
    fs::create_dir(&blob).unwrap();
    place.refused("hf://our/tiny", &[blob.to_str().unwrap(), "cannot rename"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_what_is_here_is_kept() {
    let place = Place::new();
    let fetched = place.fetch("hf://our/tiny").unwrap();
    let blob = fetched.path.join("model.safetensors").canonicalize().unwrap();
    fs::remove_file(&blob).unwrap();
    // Writing to this device is writing to a full disk.
    let part = PathBuf::from(format!("{}.incomplete", blob.display()));
    std::os::unix::fs::symlink("/dev/full", &part).unwrap();
    let names = [part.to_str().unwrap(), "cannot write", "No space left", "free some space"];
    place.refused("hf://our/tiny", &names);
    assert!(fs::symlink_metadata(&part).is_ok());
}

#[test]
fn a_link_to_nothing_is_made_new() {
    let place = Place::new();
    let fetched = place.fetch("hf://our/tiny").unwrap();
    let pointer = fetched.path.join("model.safetensors");
    fs::remove_file(pointer.canonicalize().unwrap()).unwrap();
    assert_eq!(place.fetch("hf://our/tiny").unwrap().received, 5000);
    assert_eq!(fs::read(pointer).unwrap(), large(5000));
}
