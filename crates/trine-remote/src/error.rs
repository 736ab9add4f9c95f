//! What can go wrong on the way to a model.

/// An error of this crate, with the address it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// An address that is none.
    #[error(
        "{url}: expected http:// or https:// and a host, as in http://127.0.0.1:8080/v1: {cause}"
    )]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        cause: String,
    },
    /// Nobody answers, or always that it is busy.
    #[error("{url}: no answer after {attempts} attempts: {cause}")]
    Unreachable {
        /// What was asked.
        url: String,
        /// How often.
        attempts: u32,
        /// The last reason.
        cause: String,
    },
    /// The server refuses.
    #[error("{url}: {status}: {message}")]
    Refused {
        /// What was asked.
        url: String,
        /// The status of the answer.
        status: u16,
        /// What the server says.
        message: String,
    },
    /// An answer that is not what the interface says.
    #[error("{url}: {cause}")]
    Answer {
        /// What was asked.
        url: String,
        /// What was expected and what was found.
        cause: String,
    },
    /// A server that says nothing of how likely a prompt is.
    #[error(
        "{url}: no log-probabilities of the prompt ({found}): tasks of likelihood need a server whose \
         /completions take `echo` and `logprobs`, as those of trine serve and vLLM; tasks \
         that generate need none"
    )]
    NoLogprobs {
        /// What was asked.
        url: String,
        /// What came.
        found: String,
    },
    /// It has several models, or none.
    #[error("{url}: name one of its models with --model-name: {}", names.join(", "))]
    ModelName {
        /// What was asked.
        url: String,
        /// What there is.
        names: Vec<String>,
    },
}
