//! The ternary models of bitllama2.c, a program after llama2.c.
//!
//! | bytes | what |
//! | --- | --- |
//! | 256 | `24ka` (u32 0x616b3432), version 1 (u32), then i32: dim, hidden, layers, heads, kv heads, vocab, sequence; zeros |
//! | 4 dim | weight of the final norm, f32 |
//! | 4 vocab dim | embedding, which is also the head, f32 |
//! | … | all `wq`, all `wk`, `wv`, `wo`, `w1` (gate), `w2` (down), `w3` (up): each a scale (f32) and its codes, four in a byte: `00` is 0, `01` is +1, `11` is -1 |
//!
//! Whether the first weight of a byte lies in its highest bits or in its lowest, the file does not
//! say, and its codes do not either: `10` stands for nothing in both orders. So it has to be told.
//!
//! What the program computes is LLaMA without norms in front of a layer's parts; instead each
//! product normalizes what goes into it, without a weight, without an epsilon, and divided by its
//! width n once more. In our terms every projection has a norm of its own with weights of 1 and an
//! epsilon that vanishes beside any input; the factor 1/n is part of the scale. The norms of the layers
//! that our models have in front then change nothing, as a norm of a norm is the norm, and the
//! epsilon of the final norm can be the program's, 1e-5. Its rotary pairs are neighbours, ours are
//! half a head apart, so the rows of `wq` and `wk` change places.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use trine_format::gguf::from_halves;
use trine_format::names::{Part, TensorId};
use trine_format::{
    BoxError, DenseTensor, Dtype, FormatError, HiddenAct, Mapped, ModelConfig, ModelFile,
    Projection, Quantization, TensorSource, map_file, names,
};
use trine_ternary::TernaryMatrix;

/// `24ka` at the start of a file, and the version of the layout.
const MAGIC: [u8; 8] = *b"24ka\x01\0\0\0";
const HEADER: usize = 256;
/// The matrices in the order of the file.
const ORDER: [Projection; 7] = [
    Projection::Q,
    Projection::K,
    Projection::V,
    Projection::O,
    Projection::Gate,
    Projection::Down,
    Projection::Up,
];

/// Where in a byte the first of its four weights lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitOrder {
    /// In the highest two bits.
    Msb,
    /// In the lowest two bits.
    Lsb,
}

struct BitLlama2c {
    map: Mapped,
    config: ModelConfig,
    order: BitOrder,
}

/// Opens a model; it has no tokenizer.
///
/// # Errors
/// Another magic, version or size than the header announces; a header that describes no model.
/// Codes and numbers are checked when they are asked for.
pub fn open(path: &Path, order: BitOrder) -> Result<ModelFile, FormatError> {
    let map = map_file(path)?;
    let refuse = |what: &str, expected: String, found: String| FormatError::Malformed {
        path: path.to_owned(),
        what: what.to_owned(),
        expected,
        found,
    };
    let header = map.get(..HEADER).ok_or_else(|| {
        refuse("header", format!("{HEADER} bytes"), format!("{} bytes", map.len()))
    })?;
    if header[..8] != MAGIC {
        let found = format!("{:02x?}", &header[..8]);
        return Err(refuse("magic and version", format!("{MAGIC:02x?}"), found));
    }
    let size =
        |i: usize| u32::from_le_bytes(std::array::from_fn(|b| header[8 + 4 * i + b])) as usize;
    let [dim, hidden, layers, heads, kv_heads, vocab, sequence] = std::array::from_fn(size);
    if heads == 0 || !dim.is_multiple_of(heads) {
        let expected = format!("a divisor of the dimension {dim}");
        return Err(refuse("number of heads", expected, heads.to_string()));
    }
    let config = ModelConfig {
        hidden_size: dim,
        intermediate_size: hidden,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim: dim / heads,
        vocab_size: vocab,
        max_position_embeddings: sequence,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        hidden_act: HiddenAct::Silu,
        sub_norms: false,
        projection_norm_eps: Some(1e-30),
        tie_word_embeddings: true,
        bos_token_id: Some(1),
        // The texts that such a model learns from stand one behind the other, each after a begin.
        eos_token_ids: vec![2, 1],
        quantization: Quantization::Offline,
    };
    config.validate().map_err(|e| e.in_file(path))?;
    for p in ORDER {
        let (rows, cols) = config.projection_shape(p);
        if !(rows * cols).is_multiple_of(4) {
            let found = format!("{rows} x {cols}");
            return Err(refuse("matrix", "a multiple of 4 weights".to_owned(), found));
        }
    }
    let source = BitLlama2c { map, config: config.clone(), order };
    let (expected, found) = (source.matrix(layers, ORDER[6]).start - 4, source.map.len());
    if expected != found {
        return Err(refuse("size", format!("{expected} bytes"), format!("{found} bytes")));
    }
    Ok(ModelFile::imported(path, config, Box::new(source)))
}

impl BitLlama2c {
    /// Where the codes of a matrix lie; its scale is before them. The layer after the last one gives
    /// what follows all matrices of that kind.
    fn matrix(&self, layer: usize, p: Projection) -> Range<usize> {
        let bytes = |p: Projection| {
            let (rows, cols) = self.config.projection_shape(p);
            4 + rows * cols / 4
        };
        let dense = 4 * self.config.hidden_size * (1 + self.config.vocab_size);
        let before = ORDER.iter().take_while(|&&kind| kind != p);
        let kinds: usize = before.map(|&p| self.config.num_hidden_layers * bytes(p)).sum();
        let start = HEADER + dense + kinds + layer * bytes(p);
        start + 4..start + bytes(p)
    }
}

impl TensorSource for BitLlama2c {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let id = TensorId::from_canonical(name).ok_or("no tensor of such a model")?;
        let shape = self.config.tensor_shape(id);
        let count: usize = shape.iter().product();
        let norm = HEADER..HEADER + 4 * self.config.hidden_size;
        let data = match id {
            TensorId::FinalNorm => Cow::Borrowed(&self.map[norm]),
            TensorId::Embed => Cow::Borrowed(&self.map[norm.end..][..4 * count]),
            TensorId::Layer(
                _,
                Part::InputNorm | Part::PostAttentionNorm | Part::ProjectionNorm(_),
            ) => Cow::Owned(1f32.to_le_bytes().repeat(count)),
            _ => return Err("no tensor of plain numbers in such a model".into()),
        };
        Ok(DenseTensor { name: name.to_owned(), dtype: Dtype::F32, shape, data })
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        if layer >= self.config.num_hidden_layers {
            return Err(format!("no tensor {}", names::projection(layer, p)).into());
        }
        let (rows, cols) = self.config.projection_shape(p);
        let at = self.matrix(layer, p);
        let scale = f32::from_le_bytes(std::array::from_fn(|b| self.map[at.start - 4 + b]));
        let mut trits = Vec::with_capacity(rows * cols);
        for (n, byte) in self.map[at].iter().enumerate() {
            for i in 0..4 {
                let shift = match self.order {
                    BitOrder::Msb => 6 - 2 * i,
                    BitOrder::Lsb => 2 * i,
                };
                trits.push(match byte >> shift & 3 {
                    0b00 => 0,
                    0b01 => 1,
                    0b11 => -1,
                    _ => {
                        return Err(
                            format!("weight {}: the code 10 stands for none", 4 * n + i).into()
                        );
                    }
                });
            }
        }
        let matrix = TernaryMatrix::from_trits(&trits, rows, cols, scale / cols as f32)?;
        Ok(match p {
            Projection::Q | Projection::K => {
                matrix.select_rows(|r| from_halves(r, self.config.head_dim))
            }
            _ => matrix,
        })
    }
}
