//! Machine code that was compiled before, in the user's folder for such things: all kernels take a quarter of a
//! minute, for a card and for the emulator.

use std::path::PathBuf;

use trine_format::AtomicFile;

/// The folder, where the system has one.
fn folder() -> Option<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty());
    let cache = named("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(named("HOME")?).join(".cache")))?;
    Some(cache.join("trine"))
}

/// The file of a key.
fn name(key: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in key {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    format!("{}.code", hasher.finalize().to_hex())
}

/// The code of this key, which `make` makes where it is not kept. What cannot be kept is made again.
pub(crate) fn of<E>(
    key: &[&[u8]],
    make: impl FnOnce() -> Result<Vec<u8>, E>,
) -> Result<Vec<u8>, E> {
    let Some(folder) = folder() else { return make() };
    let path = folder.join(name(key));
    // The hash of what is in the file stands before it.
    let kept = std::fs::read(&path).ok().and_then(|kept| {
        let (hash, code) = kept.split_at_checked(32)?;
        (blake3::hash(code).as_bytes() == hash).then(|| code.to_vec())
    });
    if let Some(kept) = kept {
        return Ok(kept);
    }
    let code = make()?;
    let contents = [blake3::hash(&code).as_bytes(), &code[..]].concat();
    // Where it cannot be kept, the next start compiles again.
    if std::fs::create_dir_all(&folder).is_ok() {
        let _ = AtomicFile::replace(&path, &contents);
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn code_is_made_once_and_damage_is_seen() {
        let key = [&b"a test of the cache"[..], &std::process::id().to_le_bytes()];
        let made = Cell::new(0);
        let get = |key: &[&[u8]]| {
            let make = || {
                made.set(made.get() + 1);
                Ok::<_, Infallible>(vec![7; 100])
            };
            let Ok(code) = of(key, make);
            assert_eq!(code, [7; 100]);
            made.get()
        };
        assert_eq!(get(&key), 1);
        let Some(folder) = folder().filter(|folder| folder.exists()) else { return };
        assert_eq!(get(&key), 1);
        let path = folder.join(name(&key));
        let mut contents = std::fs::read(&path).unwrap();
        contents[50] ^= 1;
        std::fs::write(&path, contents).unwrap();
        assert_eq!(get(&key), 2);
        assert_eq!(get(&[&key[..], &[b""]].concat()), 3);
        std::fs::remove_file(path).unwrap();
        std::fs::remove_file(folder.join(name(&[&key[..], &[b""]].concat()))).unwrap();
    }
}
