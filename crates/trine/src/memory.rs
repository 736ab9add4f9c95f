//! How a model lies in memory: the options of all commands that run one.

use trine_kernels::Packing;
use trine_kernels::nn::KvType;
use trine_runtime::LoadOptions;

use crate::commands::convert::Embed;

/// Options for memory and speed.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(crate) struct MemoryArgs {
    /// How the ternary weights lie in memory, which changes no result; by default what this processor
    /// reads fastest
    #[arg(long, value_enum)]
    weights: Option<Weights>,
    /// Type to hold head and embedding in; by default that of the model
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) head: Option<Embed>,
    /// How keys and values lie in memory: f32, f16 or int8; by default f32, as in training
    #[arg(long, value_name = "TYPE")]
    kv: Option<KvType>,
}

impl MemoryArgs {
    /// How to hold the ternary weights.
    pub(crate) fn weights(self) -> Weights {
        self.weights.unwrap_or(match trine_kernels::isa().packing() {
            Packing::Bits2 => Weights::Bits2,
            Packing::Trits5 => Weights::Trits5,
        })
    }

    /// What the runtime is told.
    pub(crate) fn options(self) -> LoadOptions {
        LoadOptions {
            packing: self.weights().packing(),
            head: self.head.map(Embed::dtype),
            kv: self.kv.unwrap_or(LoadOptions::default().kv),
        }
    }
}

/// How trits lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Weights {
    /// Four trits a byte
    #[value(name = "2bit")]
    Bits2,
    /// Five trits a byte
    #[value(name = "1.6bit")]
    Trits5,
}

impl Weights {
    /// The name in tables and JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bits2 => "2bit",
            Self::Trits5 => "1.6bit",
        }
    }

    /// What the kernels call it.
    pub(crate) fn packing(self) -> Packing {
        match self {
            Self::Bits2 => Packing::Bits2,
            Self::Trits5 => Packing::Trits5,
        }
    }

    /// Bytes of so many trits.
    pub(crate) fn bytes(self, trits: u64) -> u64 {
        trits.div_ceil(self.packing().digits() as u64)
    }
}
