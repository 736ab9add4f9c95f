//! The environment, read as Python's `huggingface_hub` reads it.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `HF_TOKEN` | access token; else the first line of the file `HF_TOKEN_PATH`, by default `$HF_HOME/token` |
//! | `HF_ENDPOINT` | the hub, by default `https://huggingface.co` |
//! | `HF_HOME` | by default `$XDG_CACHE_HOME/huggingface` or `~/.cache/huggingface` |
//! | `HF_HUB_CACHE` | the cache, by default `$HF_HOME/hub` |
//! | `HF_HUB_OFFLINE` | `1`, `on`, `yes` or `true`: the cache only |
//!
//! An empty variable counts as none.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::HubError;

/// Where models come from and go to. Has no `Debug`, so that no log prints the token.
#[derive(Clone)]
pub struct Settings {
    /// URL of the hub, without a slash at the end.
    pub endpoint: String,
    /// Directory of the cache, e.g. `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// Access token; sent to the hub only, never to where it redirects.
    pub token: Option<String>,
    /// Use the cache only.
    pub offline: bool,
    /// Attempts without progress before giving up, at least 1.
    pub attempts: u32,
    /// Wait after the first failed attempt; doubles with each further one.
    pub backoff: Duration,
    /// Longest wait for a connection, an answer, or the next bytes.
    pub timeout: Duration,
}

impl Settings {
    /// Settings of a cache, for the public hub without a token.
    pub fn new(cache: PathBuf) -> Self {
        Self {
            endpoint: "https://huggingface.co".to_owned(),
            cache,
            token: None,
            offline: false,
            attempts: 5,
            backoff: Duration::from_millis(500),
            timeout: Duration::from_secs(30),
        }
    }

    /// Settings of this process's environment.
    ///
    /// # Errors
    /// When an endpoint is no URL, a token has characters that none has, or no directory is known.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_variables(|name| std::env::var_os(name), std::env::home_dir())
    }

    /// Settings of an environment given as a function, and the user's home directory.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<OsString>,
        home: Option<PathBuf>,
    ) -> Result<Self, HubError> {
        let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let text = |name: &'static str| match path(name).map(|value| value.into_os_string()) {
            None => Ok(None),
            Some(value) => {
                value.into_string().map(|value| Some(value.trim().to_owned())).map_err(|_| {
                    HubError::Setting { name, expected: "UTF-8", found: "other bytes".into() }
                })
            }
        };
        let hf_home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|dir| dir.join("huggingface")))
            .or_else(|| home.map(|dir| dir.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| Some(hf_home.as_ref()?.join("hub")));
        let no_home = || HubError::Setting {
            name: "HF_HOME",
            expected: "the directory for downloads, as there is no home directory",
            found: "nothing".into(),
        };
        let mut settings = Self::new(cache.ok_or_else(no_home)?);
        if let Some(endpoint) = text("HF_ENDPOINT")? {
            settings.endpoint = endpoint.trim_end_matches('/').to_owned();
        }
        settings.token = match text("HF_TOKEN")? {
            Some(token) => Some(token),
            // Where `hf auth login` leaves it. Without a readable file there is no token.
            None => path("HF_TOKEN_PATH")
                .or_else(|| Some(hf_home?.join("token")))
                .and_then(|file| fs::read_to_string(file).ok())
                .map(|token| token.trim().to_owned()),
        };
        settings.token = settings.token.filter(|token| !token.is_empty());
        if settings.token.iter().any(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(HubError::Setting {
                name: "HF_TOKEN",
                expected: "a token of letters, digits and signs",
                found: "spaces or other characters inside".into(),
            });
        }
        let offline = text("HF_HUB_OFFLINE")?.unwrap_or_default().to_ascii_uppercase();
        settings.offline = matches!(offline.as_str(), "1" | "ON" | "YES" | "TRUE");
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into());
        Settings::from_variables(find, Some("/home/u".into()))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let cache = |variables: &[(&str, &str)]| read(variables).unwrap().cache;
        assert_eq!(cache(&[]), PathBuf::from("/home/u/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), PathBuf::from("/x/huggingface/hub"));
        let home = ("HF_HOME", "/h");
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), PathBuf::from("/h/hub"));
        assert_eq!(cache(&[home, ("HF_HUB_CACHE", "/c")]), PathBuf::from("/c"));
        assert_eq!(cache(&[home, ("HF_HUB_CACHE", "")]), PathBuf::from("/h/hub"));
        assert!(Settings::from_variables(|_| None, None).is_err());
    }

    #[test]
    fn tokens_come_from_the_variable_or_the_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        let home = ("HF_HOME", dir.path().to_str().unwrap());
        let token = |variables: &[(&str, &str)]| read(variables).unwrap().token;
        assert_eq!(token(&[home]).as_deref(), Some("hf_file"));
        assert_eq!(token(&[home, ("HF_TOKEN", "hf_own")]).as_deref(), Some("hf_own"));
        assert_eq!(token(&[home, ("HF_TOKEN_PATH", "/none")]), None);
        let error = read(&[("HF_TOKEN", "hf_a\r\nX: y")]).err().unwrap().to_string();
        assert!(error.contains("HF_TOKEN") && !error.contains("hf_a"), "{error}");
    }

    #[test]
    fn offline_and_endpoint_are_read() {
        let offline = |value| read(&[("HF_HUB_OFFLINE", value)]).unwrap().offline;
        assert!(offline("1") && offline("yes") && offline("True"));
        assert!(!offline("0") && !offline(""));
        let settings = read(&[("HF_ENDPOINT", "http://mirror:80/hf/")]).unwrap();
        assert_eq!(settings.endpoint, "http://mirror:80/hf");
    }
}
