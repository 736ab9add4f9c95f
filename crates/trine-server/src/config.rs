//! What a server is called, who may use it, and how much it takes.

use std::time::Duration;

/// Settings of a server. The default is meant for one's own machine.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Name of the model, which requests may name.
    pub model: String,
    /// Keys of which a request must have one; without any, everybody may ask.
    pub api_keys: Vec<String>,
    /// Origins whose pages may ask, `https://example.org`; one of `*` stands for all. Without any, browsers
    /// let only the server's own page ask.
    pub cors_origins: Vec<String>,
    /// Longest body in bytes.
    pub max_body: usize,
    /// Most connections at once; more wait until one ends.
    pub max_connections: usize,
    /// Most choices of a request: prompts times `n`.
    pub max_choices: usize,
    /// Most ids that a request may ask for; what asks for more gets as many.
    pub max_tokens: usize,
    /// How long the head of a request may take to arrive, and then its body.
    pub read_timeout: Duration,
    /// How long a client may take nothing of what is sent to it.
    pub write_timeout: Duration,
    /// How long a request may take.
    pub request_timeout: Duration,
    /// How long the end waits for requests that run.
    pub drain_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            model: "model".to_owned(),
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            max_body: 4 << 20,
            max_connections: 1024,
            max_choices: 64,
            max_tokens: usize::MAX,
            read_timeout: Duration::from_secs(15),
            write_timeout: Duration::from_secs(60),
            request_timeout: Duration::from_secs(600),
            drain_timeout: Duration::from_secs(30),
        }
    }
}
