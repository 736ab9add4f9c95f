//! The text of the kernels, which travels inside the program.

/// A file by its name.
macro_rules! sources {
    ($dir:literal: $($name:literal),+ $(,)?) => {
        [$(($name, include_str!(concat!("../", $dir, "/", $name)))),+]
    };
}

/// All kernels. They are one program, in this order.
pub(crate) const KERNELS: [(&str, &str); 20] = sources!("kernels":
    "device.cuh",
    "rows.cuh",
    "tiles.cuh",
    "norm.cu",
    "gate.cu",
    "rope.cu",
    "loss.cu",
    "embedding.cu",
    "weights.cu",
    "adapters.cu",
    "muon.cu",
    "attention_f32.cu",
    "attention_delta.cu",
    "attention.cuh",
    "attention.cu",
    "wgmma.cuh",
    "attention_hopper.cu",
    "attention_backward.cu",
    "attention_backward_hopper.cu",
    "product_int8.cu",
);

/// What stands in for a card's compiler and the card.
pub(crate) const EMULATOR: [(&str, &str); 3] =
    sources!("emulator": "emulate.hpp", "instructions.hpp", "emulate.cpp");

/// The kernels as a compiler for cards takes them.
pub(crate) fn program() -> String {
    KERNELS.map(|(_, text)| text).concat()
}
