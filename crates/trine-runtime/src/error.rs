//! What can go wrong at run time.

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The file is not usable.
    #[error(transparent)]
    Format(#[from] trine_format::FormatError),
    /// A weight that is NaN or infinite: every token would be lost to it.
    #[error("tensor `{tensor}`: element {index} is {value}: a model needs finite weights")]
    NonFinite {
        /// Canonical name of the tensor.
        tensor: String,
        /// Position in the row-major tensor.
        index: usize,
        /// What is there.
        value: f32,
    },
    /// A full-precision projection in a model that says that it is ternary.
    #[error("tensor `{tensor}`: expected trits, found full precision")]
    Full {
        /// Canonical name of the tensor.
        tensor: String,
    },
    /// A head or embedding that cannot be held in the type that was asked for.
    #[error("tensor `{tensor}` cannot be held as {dtype}: {reason}")]
    HeadType {
        /// Canonical name of the tensor.
        tensor: String,
        /// Name of the type.
        dtype: &'static str,
        /// Why.
        reason: String,
    },
    /// A sketch of a head that cannot have one.
    #[error(
        "a sketch of the head: expected a hidden size that is a multiple of {multiple}, found \
         {hidden_size}"
    )]
    HeadSketch {
        /// What there is.
        hidden_size: usize,
        /// What it has to be a multiple of.
        multiple: usize,
    },
    /// A token id that the model has no embedding for.
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Number of embeddings.
        vocab_size: usize,
    },
    /// More tokens than the model has positions.
    #[error("the context is full: {requested} positions asked for, the model has {limit}")]
    ContextFull {
        /// Positions that would be needed.
        requested: usize,
        /// Positions that the model was trained for.
        limit: usize,
    },
    /// A sequence that was made for a model of another shape, or with another KV cache.
    #[error("a sequence of another model: expected one that was made for this model")]
    ForeignSequence,
    /// Adapters beside projections that have norms, where they would read the input before or after it.
    #[error(
        "a model with a norm before every projection takes no adapters: none can be trained for it"
    )]
    AdapterOfNorms,
    /// A matrix of an adapter that does not fit the model.
    #[error(
        "adapter tensor `{tensor}`: the model expects {} x {} numbers, found {found}",
        .shape[0], .shape[1]
    )]
    AdapterShape {
        /// Name of the tensor.
        tensor: String,
        /// Rows and columns that were expected.
        shape: [usize; 2],
        /// How many numbers there are.
        found: usize,
    },
    /// An adapter that was made for a model of another shape.
    #[error("an adapter of another model: expected one that was made for this model")]
    ForeignAdapter,
    /// Heads that the KV cache has no layout for.
    #[error("heads of {head_dim} features: expected 1 to {limit}")]
    HeadDim {
        /// Features of a head.
        head_dim: usize,
        /// Most that there may be.
        limit: usize,
    },
    /// A forward pass over no tokens.
    #[error("no tokens given: a prompt needs at least one")]
    Empty,
    /// A sampling setting out of range.
    #[error("sampler setting {name}: expected {expected}, found {found}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// What would have been accepted.
        expected: &'static str,
        /// What was given.
        found: f32,
    },
    /// What a text must look like leaves no id to go on with.
    #[error("the text cannot go on as it must: {0}")]
    Constraint(String),
    /// Logits that no distribution can be made of.
    #[error("the model produced a NaN logit for token {id}: its weights or input are not finite")]
    NanLogit {
        /// The first such token.
        id: usize,
    },
}
