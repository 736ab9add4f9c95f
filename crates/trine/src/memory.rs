//! How a model lies in memory: the options of all commands that run one.

use trine_kernels::Packing;
use trine_kernels::nn::KvType;
use trine_runtime::{HeadSketch, Largest, LoadOptions};

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
    /// A sketch of the head beside it, by which greedy decoding and sampling from the K likeliest (or those
    /// above a MIN_P) read less, which changes no text: it takes 4.5 bits a weight, 184 MB for the 2B4T
    /// model. `auto` makes it where it pays
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Sketch::Auto)]
    head_sketch: Sketch,
}

/// When a head has a sketch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Sketch {
    /// Where the head is large and stored in 8 bits or more, and tokens are chosen by few logits
    Auto,
    /// Always
    On,
    /// Never
    Off,
}

impl MemoryArgs {
    /// What the runtime is told, where tokens are chosen by the `largest` logits, or by all.
    pub(crate) fn options(self, largest: Option<Largest>) -> LoadOptions {
        let default = LoadOptions::default();
        LoadOptions {
            packing: self.weights.unwrap_or(default.packing),
            head: self.head.map(Embed::dtype),
            kv: self.kv,
            sketch: match self.head_sketch {
                Sketch::Auto => largest.map_or(HeadSketch::Off, HeadSketch::Auto),
                Sketch::On => HeadSketch::On,
                Sketch::Off => HeadSketch::Off,
            },
        }
    }
}
