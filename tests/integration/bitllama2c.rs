//! Models of bitllama2.c: what is imported computes what the program computes.

use std::path::Path;

use trine_export::import::{bitllama2c, bitllama2c::BitOrder, llama2c};
use trine_export::{Target, convert};
use trine_format::gguf::i2_s::{self, Order};
use trine_format::gguf::{GgmlType, TernaryType, WriteOptions};
use trine_format::{Dtype, ModelFile};
use trine_runtime::{Model, Session};
use trine_tokenizer::Tokenizer;

use crate::fixtures::{self, relative_error};

/// A small random model: sizes, scales, trits and numbers as the program has them.
struct Plain {
    norm: Vec<f32>,
    embed: Vec<f32>,
    /// `wq`, `wk`, `wv`, `wo`, `w1`, `w2`, `w3`: `(rows, cols)`, and scale and trits of each layer.
    matrices: Vec<((usize, usize), Layers)>,
}

/// The scale and the trits of a matrix in each layer.
type Layers = Vec<(f32, Vec<i8>)>;

const DIM: usize = 32;
const HIDDEN: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const VOCAB: usize = 24;
const HEAD: usize = DIM / HEADS;

impl Plain {
    fn random(mut state: u32) -> Self {
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let kv = KV_HEADS * HEAD;
        let shapes = [
            (DIM, DIM),
            (kv, DIM),
            (kv, DIM),
            (DIM, DIM),
            (HIDDEN, DIM),
            (DIM, HIDDEN),
            (HIDDEN, DIM),
        ];
        let norm = (0..DIM).map(|_| 1.0 + next()).collect();
        // Small, so that the epsilon of the final norm can be seen.
        let embed = (0..VOCAB * DIM).map(|_| 0.1 * next()).collect();
        let mut layer = |(rows, cols): (usize, usize)| {
            let trits = (0..rows * cols).map(|_| (3.0 * next()).round() as i8).collect();
            (0.01 + 0.01 * next().abs(), trits)
        };
        let mut matrices = Vec::new();
        for shape in shapes {
            matrices.push((shape, (0..LAYERS).map(|_| layer(shape)).collect()));
        }
        Self { norm, embed, matrices }
    }

    fn file(&self, order: BitOrder) -> Vec<u8> {
        let mut out = b"24ka\x01\0\0\0".to_vec();
        for size in [DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, 16] {
            out.extend((size as u32).to_le_bytes());
        }
        out.resize(256, 0);
        out.extend(self.norm.iter().chain(&self.embed).flat_map(|v| v.to_le_bytes()));
        for (scale, trits) in self.matrices.iter().flat_map(|(_, layers)| layers) {
            out.extend(scale.to_le_bytes());
            for four in trits.chunks_exact(4) {
                let codes = four.iter().map(|&trit| trit as u8 & 3);
                out.push(match order {
                    BitOrder::Msb => codes.fold(0, |byte, code| byte << 2 | code),
                    BitOrder::Lsb => codes.rev().fold(0, |byte, code| byte << 2 | code),
                });
            }
        }
        out
    }

    fn product(&self, kind: usize, layer: usize, x: &[f32]) -> Vec<f32> {
        let ((rows, cols), layers) = &self.matrices[kind];
        let (scale, trits) = &layers[layer];
        let square: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let factor = (1.0 / (square / *cols as f64).sqrt() / *cols as f64) as f32;
        let x: Vec<f32> = x.iter().map(|v| v * factor).collect();
        let step = x.iter().fold(0f32, |max, v| max.max(v.abs())) / 127.0;
        let codes: Vec<i32> = x.iter().map(|v| (v / step).round() as i32).collect();
        let row = |r: usize| {
            let row = trits[r * cols..][..*cols].iter().zip(&codes);
            row.map(|(&t, &c)| i32::from(t) * c).sum::<i32>() as f32 * (scale * step)
        };
        (0..*rows).map(row).collect()
    }

    /// Logits `(T, V)`.
    fn logits(&self, ids: &[u32]) -> Vec<f32> {
        let mut cache = vec![(Vec::new(), Vec::new()); LAYERS];
        let mut logits = Vec::new();
        for (position, &id) in ids.iter().enumerate() {
            let mut x = self.embed[id as usize * DIM..][..DIM].to_vec();
            for (layer, (keys, values)) in cache.iter_mut().enumerate() {
                let q = rotate(self.product(0, layer, &x), position);
                keys.push(rotate(self.product(1, layer, &x), position));
                values.push(self.product(2, layer, &x));
                let mut y = vec![0f32; DIM];
                for h in 0..HEADS {
                    let at = h / (HEADS / KV_HEADS) * HEAD..;
                    let q = &q[h * HEAD..][..HEAD];
                    let score = |key: &Vec<f32>| {
                        let dot: f32 = q.iter().zip(&key[at.clone()]).map(|(a, b)| a * b).sum();
                        f64::from(dot / (HEAD as f32).sqrt()).exp()
                    };
                    let weights: Vec<f64> = keys.iter().map(score).collect();
                    let sum: f64 = weights.iter().sum();
                    for (weight, value) in weights.iter().zip(values.iter()) {
                        for (y, v) in y[h * HEAD..][..HEAD].iter_mut().zip(&value[at.clone()]) {
                            *y += (weight / sum) as f32 * v;
                        }
                    }
                }
                add(&mut x, &self.product(3, layer, &y));
                let (gate, up) = (self.product(4, layer, &x), self.product(6, layer, &x));
                let silu = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u);
                let y = self.product(5, layer, &silu.collect::<Vec<f32>>());
                add(&mut x, &y);
            }
            let square: f64 = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
            let rms = (square / DIM as f64 + 1e-5).sqrt();
            let x: Vec<f64> = x
                .iter()
                .zip(&self.norm)
                .map(|(&x, &n)| f64::from(x) / rms * f64::from(n))
                .collect();
            logits.extend(
                self.embed.chunks_exact(DIM).map(|row| {
                    row.iter().zip(&x).map(|(&e, x)| f64::from(e) * x).sum::<f64>() as f32
                }),
            );
        }
        logits
    }
}

/// Pairs are neighbours.
fn rotate(mut x: Vec<f32>, position: usize) -> Vec<f32> {
    for (i, pair) in x.chunks_exact_mut(2).enumerate() {
        let frequency = 1e4f64.powf(-((2 * i % HEAD) as f64) / HEAD as f64);
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let (a, b) = (f64::from(pair[0]), f64::from(pair[1]));
        (pair[0], pair[1]) = ((a * cos - b * sin) as f32, (a * sin + b * cos) as f32);
    }
    x
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// The logits of an imported model after it went through a GGUF file.
fn converted(path: &Path, order: BitOrder, ids: &[u32]) -> Vec<f32> {
    let source = bitllama2c::open(path, order).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let to = temp.path().join("model.gguf");
    let options = WriteOptions { ternary: TernaryType::I2S, embedding: Dtype::F32 };
    let report = convert(&source, &to, Target::Gguf(options)).unwrap();
    assert_eq!((report.largest_scale_change, report.largest_dense_change), (0.0, 0.0));
    let model = Model::load(&ModelFile::open(&to).unwrap()).unwrap();
    Session::new(&model).logits_of_all(ids).unwrap()
}

#[test]
fn an_imported_model_computes_what_its_program_does() {
    let plain = Plain::random(5);
    let ids: Vec<u32> = (0..12).map(|i| (i * 7 + 1) % VOCAB as u32).collect();
    let expected = plain.logits(&ids);
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("model.bin");
    for order in [BitOrder::Msb, BitOrder::Lsb] {
        std::fs::write(&path, plain.file(order)).unwrap();
        let error = relative_error(&converted(&path, order, &ids), &expected);
        assert!(error < 1e-6, "{order:?}: {error:.1e}");
    }
    // In the other order the file is a model too, but another one.
    let error = relative_error(&converted(&path, BitOrder::Msb, &ids), &expected);
    assert!(error > 0.1, "{error:.1e}");
}

#[test]
fn damaged_files_are_refused_by_part() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("model.bin");
    let whole = Plain::random(5).file(BitOrder::Msb);
    let refused = |bytes: &[u8], names: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        let error = bitllama2c::open(&path, BitOrder::Msb).err().unwrap().to_string();
        names.iter().for_each(|name| assert!(error.contains(name), "{name}: {error}"));
        assert!(error.contains("model.bin"), "{error}");
    };
    let with = |at: usize, value: u32| {
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    refused(&whole[..255], &["header", "255 bytes"]);
    refused(&whole[..whole.len() - 1], &["size", "bytes"]);
    refused(&with(4, 2), &["magic and version"]);
    refused(&with(8, u32::MAX), &["heads"]);
    refused(&with(12, u32::MAX), &["intermediate_size"]);
    refused(&with(20, 0), &["heads", "divisor"]);
    refused(&with(24, 3), &["num_key_value_heads"]);
    refused(&with(28, 1 << 26), &["size"]);

    // The first code of the first matrix, and its scale.
    let first = 256 + 4 * DIM * (1 + VOCAB);
    for (at, value, name) in [(first, f32::NAN.to_bits(), "scale"), (first + 4, 0x80, "code 10")] {
        std::fs::write(&path, with(at, value)).unwrap();
        let source = bitllama2c::open(&path, BitOrder::Msb).unwrap();
        let to = temp.path().join("model.gguf");
        let error = convert(&source, &to, Target::default()).unwrap_err().to_string();
        assert!(error.contains("q_proj") && error.contains(name), "{error}");
        assert!(!to.exists());
    }
}

#[test]
fn tokenizers_of_llama2c_are_read_or_refused_by_token() {
    let piece = |score: f32, text: &[u8]| {
        [&score.to_le_bytes(), &(text.len() as u32).to_le_bytes(), text].concat()
    };
    let mut bytes = [&9u32.to_le_bytes()[..], &piece(0.0, b"<unk>")].concat();
    bytes.extend([piece(0.0, b"\n<s>\n"), piece(0.0, b"\n</s>\n")].concat());
    bytes.extend((0..256).flat_map(|b| piece(0.0, format!("<0x{b:02X}>").as_bytes())));
    for (n, text) in [" a", "bc", " abc", " ", "a", "b", "c"].iter().enumerate() {
        bytes.extend(piece(-(n as f32), text.as_bytes()));
    }
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("tok.bin");
    std::fs::write(&path, &bytes).unwrap();
    let tokenizer =
        Tokenizer::from_json(&llama2c::tokenizer(&path).unwrap().tokenizer_json).unwrap();
    assert_eq!(tokenizer.vocab_size(), 266);
    assert_eq!(tokenizer.encode("abc ab\n", true).unwrap(), [1, 261, 259, 264, 13]);
    assert_eq!(tokenizer.decode(&[1, 261, 259, 264, 13], true).unwrap(), "abc ab\n");

    let refused = |bytes: &[u8], names: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        let error = llama2c::tokenizer(&path).unwrap_err().to_string();
        names.iter().for_each(|name| assert!(error.contains(name), "{name}: {error}"));
    };
    refused(&bytes[..3], &["tok.bin", "3 bytes"]);
    refused(&bytes[..bytes.len() - 1], &["token 265", "whole"]);
    refused(&bytes[..4 + 13], &["number of tokens", "found 1"]);
    let at = bytes.windows(6).position(|w| w == b"<0x41>").unwrap();
    let mut other = bytes.clone();
    other[at] = b'[';
    refused(&other, &["token 68", "<0x41>"]);
    other[at - 4..at].copy_from_slice(&(-1i32).to_le_bytes());
    refused(&other, &["token 68", "whole"]);
    let last = bytes.len() - 1;
    let mut other = bytes.clone();
    other[last] = 0xff;
    refused(&other, &["token 265", "UTF-8"]);
    other[last] = b'b';
    refused(&other, &["one token \"b\""]);
}

/// The published model of three million trits against the program's own numbers.
///
/// Its codes are rounded half away from zero after a true division, ours half to even after a
/// product with the reciprocal; a code that flips moves the logits from there on, by up to a percent.
#[test]
fn a_published_model_tells_its_story() {
    let Some(dir) = fixtures::third_party("bitllama2c") else { return };
    let text = std::fs::read_to_string(dir.join("bitllama2c_3M_msbfirst_greedy.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens: Vec<u32> = serde_json::from_value(json["greedy_tokens"].clone()).unwrap();
    let numbers = std::fs::read(dir.join("bitllama2c_3M_msbfirst_greedy_logits_f32.npy")).unwrap();
    // A .npy file of f32: a header whose length is in bytes 8 and 9.
    let start = 10 + usize::from(u16::from_le_bytes([numbers[8], numbers[9]]));
    let expected: Vec<f32> =
        numbers[start..].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();

    let input = &tokens[..tokens.len() - 1];
    let msb = converted(&dir.join("bitllama2c_3M_msbfirst.bin"), BitOrder::Msb, input);
    let lsb = converted(&dir.join("bitllama2c_3M_lsbfirst.bin"), BitOrder::Lsb, input);
    assert!(msb == lsb);
    let vocab = expected.len() / 32;
    let errors: Vec<f64> = expected
        .chunks_exact(vocab)
        .zip(msb.chunks_exact(vocab))
        .map(|(expected, found)| relative_error(found, expected))
        .collect();
    let exact = errors.iter().take_while(|error| **error < 1e-5).count();
    println!("{exact} positions before the first flipped code: {errors:?}");
    assert!(exact >= 3 && errors.iter().all(|error| *error < 3e-2), "{errors:?}");

    let likeliest = |row: &[f32]| (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
    let found: Vec<u32> = msb.chunks_exact(vocab).map(|row| likeliest(row) as u32).collect();
    // At this step the program's best two logits are 0.007 apart, less than a flipped code moves
    // them; with its own way of rounding the other token wins too, if sums are taken otherwise.
    let close = 166;
    assert_eq!(found[..close], tokens[1..=close]);
    assert_eq!(found[close + 1..], tokens[close + 2..]);

    let files = llama2c::tokenizer(&dir.join("tok512.bin")).unwrap();
    let tokenizer = Tokenizer::from_json(&files.tokenizer_json).unwrap();
    let story = std::fs::read_to_string(dir.join("bitllama2c_3M_greedy256.txt")).unwrap();
    let told = tokenizer.decode(&tokens, true).unwrap();
    assert!(told.len() > 400 && story.contains(&told), "{told}");
    assert_eq!(tokenizer.encode(&told, true).unwrap(), tokens);
}

/// What recognizes I2_S of other builds of bitnet.cpp relies on structure that training leaves: here
/// are weights that were trained.
#[test]
fn trained_weights_show_the_order_of_i2_s() {
    let Some(dir) = fixtures::third_party("bitllama2c") else { return };
    let source = bitllama2c::open(&dir.join("bitllama2c_3M_msbfirst.bin"), BitOrder::Msb).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("model.gguf");
    convert(&source, &path, Target::default()).unwrap();
    let original = std::fs::read(&path).unwrap();
    let file = ModelFile::open(&path).unwrap();
    let tensors = file.as_gguf().unwrap().tensors().to_vec();
    for order in Order::ALL {
        let mut bytes = original.clone();
        // Another program writes none of our keys.
        while let Some(at) = bytes.windows(6).position(|w| w == b"trine.") {
            bytes[at] = b'x';
        }
        for info in tensors.iter().filter(|info| info.kind == GgmlType::I2_S) {
            let (rows, cols) = (info.shape[0], info.shape[1]);
            let matrix = i2_s::decode(&original[info.range.clone()], rows, cols).unwrap();
            let data = &mut bytes[info.range.clone()];
            data[..rows * cols / 4].fill(0);
            for (i, trit) in matrix.trits().into_iter().enumerate() {
                let (byte, quarter) = match order {
                    Order::Blocks128 => (i / 128 * 32 + i % 32, i % 128 / 32),
                    Order::Blocks64 => (i / 64 * 16 + i % 16, i % 64 / 16),
                    Order::Rows4 => (i / cols / 4 * cols + i % cols, i / cols % 4),
                };
                data[byte] |= ((trit + 1) as u8) << (6 - 2 * quarter);
            }
        }
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(ModelFile::open(&path).unwrap().i2_s_order(), Some(order));
    }
}
