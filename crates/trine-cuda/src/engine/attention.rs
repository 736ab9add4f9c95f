//! Launches of attention: what the kernels of `attention*.cu` say over them.

use trine_format::ModelConfig;

use super::{Address, Kind, Pass, launch};
use crate::error::{CudaError, Result};

/// Heads that the kernels on tensor cores, and those without, take.
const WIDEST: [usize; 2] = [128, 256];

/// How attention is divided over blocks.
struct Division {
    kernel: String,
    /// Queries, or keys, of a block.
    tile: usize,
    threads: usize,
    shared: usize,
}

/// Checks that there are kernels for the model's heads.
pub(super) fn check(config: &ModelConfig) -> Result<()> {
    let (d, most) = (config.head_dim, WIDEST[0]);
    match d % 8 == 0 && d <= most {
        true => Ok(()),
        false => Err(CudaError::Unsupported {
            what: "head_dim",
            expected: format!("a multiple of 8, at most {most}"),
            found: d.to_string(),
        }),
    }
}

/// The width for which a kernel was compiled that takes heads of width `d`.
fn compiled(d: usize) -> usize {
    [32, 64, 128].into_iter().find(|width| d <= *width).expect("checked with the model")
}

/// Floats from row to row of a tile in shared memory.
fn pitch(d: usize) -> usize {
    4 * (d.div_ceil(4) | 1)
}

impl Division {
    fn forward(kind: Kind, d: usize, wgmma: bool) -> Self {
        match kind {
            Kind::F32 => Self {
                kernel: "attention_forward_f32".to_owned(),
                tile: 32,
                threads: 256,
                shared: 128 * (2 * pitch(d) + 36),
            },
            Kind::Bf16 if wgmma && d > 32 => {
                let (d, tile, shared) = if d <= 64 { (64, 64, 42240) } else { (128, 192, 116_480) };
                let kernel = format!("attention_forward_hopper_d{d}");
                Self { kernel, tile, threads: 2 * tile, shared }
            }
            Kind::Bf16 => {
                let d = compiled(d);
                Self {
                    kernel: format!("attention_forward_bf16_d{d}"),
                    tile: 128,
                    threads: 128,
                    shared: 768 * d + 512,
                }
            }
        }
    }

    /// Of the gradients of keys and values, on a card whose blocks have `most` bytes of shared memory.
    fn keys(d: usize, most: usize, wgmma: bool) -> Self {
        let (name, tile, threads, shared) = match compiled(d) {
            32 => ("bf16_d32", 128, 128, 34304),
            64 if wgmma => ("hopper_d64", 64, 128, 68864),
            _ if wgmma => ("hopper_d128", 128, 256, 167_168),
            64 => ("bf16_d64", 128, 128, 67072),
            _ if most < 165_376 => ("bf16_d128_narrow", 64, 128, 99840),
            _ => ("bf16_d128", 128, 256, 165_376),
        };
        Self { kernel: format!("attention_backward_kv_{name}"), tile, threads, shared }
    }

    /// Of the gradients of queries.
    fn queries(d: usize, wgmma: bool) -> Self {
        let (name, threads, shared) = match compiled(d) {
            32 => ("bf16_d32", 128, 26112),
            64 if wgmma => ("hopper_d64", 256, 85248),
            _ if wgmma => ("hopper_d128", 256, 167_168),
            64 => ("bf16_d64", 128, 50688),
            _ => ("bf16_d128", 128, 99840),
        };
        let kernel = format!("attention_backward_q_{name}");
        Self { kernel, tile: 128, threads, shared }
    }
}

impl Pass<'_> {
    /// Where queries, keys and values lie in `(M, (H + 2 K) d)`.
    fn heads(&self, qkv: Address) -> [Address; 3] {
        let (config, bytes) = (self.config, self.kind().bytes());
        let keys = qkv + (config.attention_width() * bytes) as u64;
        [qkv, keys, keys + (config.key_value_width() * bytes) as u64]
    }

    /// From the layer's queries, keys and values to its `y`.
    pub(super) fn attention(&self, layer: usize) -> Result<()> {
        let (config, state) = (self.config, self.memory.state(layer));
        let (heads, kv_heads, d) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let (batch, tokens) = (self.input.extent.batch, self.input.extent.tokens);
        let [q, k, v] = self.heads(state.qkv.at());
        let division = Division::forward(self.kind(), d, self.device.has_wgmma());
        let Division { kernel, tile, threads, shared } = division;
        launch!(self.device, &kernel, [tokens.div_ceil(tile), batch * heads, 1], threads, shared;
            q, k, v, state.y.at(), state.lse.at(), self.input.starts, tokens, heads, kv_heads, d,
            (heads + 2 * kv_heads) * d, heads * d, scale(d))
    }

    /// From the gradient of `y`, `dout` `(M, H d)`, to those of queries, keys and values.
    pub(super) fn attention_backward(&self, layer: usize, dout: Address) -> Result<()> {
        let (config, state) = (self.config, self.memory.state(layer));
        let (heads, kv_heads, d) =
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let (batch, tokens) = (self.input.extent.batch, self.input.extent.tokens);
        let [q, k, v] = self.heads(state.qkv.at());
        let [dq, dk, dv] = self.heads(self.memory.dqkv.at());
        let (lse, delta, starts) = (state.lse.at(), self.memory.delta.at(), self.input.starts);
        let (ld, ldo, count) = ((heads + 2 * kv_heads) * d, heads * d, batch * heads * tokens);
        let kernel = format!("attention_delta_{}", self.kind().name());
        launch!(self.device, &kernel, [count.div_ceil(16), 1, 1], 256, 0;
            state.y.at(), dout, delta, count as u64, tokens, heads, d, ldo)?;
        match self.kind() {
            Kind::F32 => {
                let shared = 128 * (4 * pitch(d) + 36);
                let grid = |heads| [tokens.div_ceil(32), batch * heads, 1];
                launch!(self.device, "attention_backward_queries_f32", grid(heads), 256, shared;
                    q, k, v, dout, lse, delta, dq, starts, tokens, heads, kv_heads, d, ld, ldo,
                    scale(d))?;
                let shared = 128 * (4 * pitch(d) + 72);
                launch!(self.device, "attention_backward_keys_f32", grid(kv_heads), 256, shared;
                    q, k, v, dout, lse, delta, dk, dv, starts, tokens, heads, kv_heads, d, ld, ldo,
                    scale(d))
            }
            Kind::Bf16 => {
                let wgmma = self.device.has_wgmma();
                let of_keys = Division::keys(d, self.device.shared_memory(), wgmma);
                let grid = [tokens.div_ceil(of_keys.tile), kv_heads, batch];
                launch!(self.device, &of_keys.kernel, grid, of_keys.threads, of_keys.shared;
                    q, k, v, dout, lse, delta, starts, dk, dv, tokens, heads, kv_heads, d, ld, ldo,
                    scale(d))?;
                let of_queries = Division::queries(d, wgmma);
                let grid = [tokens.div_ceil(of_queries.tile), heads, batch];
                launch!(self.device, &of_queries.kernel, grid, of_queries.threads, of_queries.shared;
                    q, k, v, dout, lse, delta, starts, dq, tokens, heads, kv_heads, d, ld, ldo,
                    scale(d))
            }
        }
    }
}

/// What scores are multiplied by.
fn scale(d: usize) -> f32 {
    1.0 / (d as f32).sqrt()
}
