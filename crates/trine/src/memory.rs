//! How a model lies in memory: the options of all commands that run one.

use trine_kernels::Packing;
use trine_kernels::nn::KvType;
use trine_runtime::LoadOptions;

use crate::commands::convert::Embed;

/// Options for memory and speed.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct MemoryArgs {
    /// How the ternary weights lie in memory, 2bit or 1.6bit, which changes no result; by default what
    /// this processor reads fastest
    #[arg(long, value_name = "TYPE")]
    weights: Option<Packing>,
    /// Type to hold head and embedding in; by default that of the model
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) head: Option<Embed>,
    /// How keys and values lie in memory: f32, as in training, f16 or int8
    #[arg(long, value_name = "TYPE", default_value_t = KvType::Int8)]
    kv: KvType,
}

impl MemoryArgs {
    /// What the runtime is told.
    pub(crate) fn options(self) -> LoadOptions {
        let default = LoadOptions::default();
        LoadOptions {
            packing: self.weights.unwrap_or(default.packing),
            head: self.head.map(Embed::dtype),
            kv: self.kv,
        }
    }
}
