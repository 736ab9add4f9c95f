//! Adapters merged into weights: what is written is the definition of the sum, and what it costs is said.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use tempfile::{TempDir, tempdir};
use trine_export::{MergeCost, Target, convert, merge};
use trine_format::gguf::{TernaryType, WriteOptions};
use trine_format::peft::Lora;
use trine_format::{
    Dtype, ModelConfig, ModelFile, Projection, Quantization, TensorSource, names, write_hf,
};
use trine_ternary::{TernaryMatrix, ternarize};

const EXACT: Target =
    Target::Gguf(WriteOptions { ternary: TernaryType::Trn2, embedding: Dtype::F32 });

fn fixture(name: &str) -> ModelFile {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures");
    ModelFile::open(&fixtures.join(name)).unwrap()
}

/// An adapter for two projections, of which the products are about `size`.
fn lora(config: &ModelConfig, size: f32) -> Lora {
    let (rank, targets) = (2, vec![Projection::K, Projection::Down]);
    let mut matrices = BTreeMap::new();
    for layer in 0..config.num_hidden_layers {
        for &p in &targets {
            let (out, inp) = config.projection_shape(p);
            let numbers = |len: usize, prime: usize, size: f32| -> Vec<f32> {
                let number = |i: usize| ((i * i * 31 + i * 7 + layer) % prime) as f32;
                (0..len).map(|i| (number(i) * 2.0 / prime as f32 - 1.0) * size).collect()
            };
            matrices.insert(
                (layer, p),
                [numbers(rank * inp, 1009, 1.0), numbers(out * rank, 997, size)],
            );
        }
    }
    Lora { rank, alpha: 4.0, targets, base: None, matrices }
}

/// `(alpha / r) B A` in f64, `(out, in)`.
fn product(lora: &Lora, [a, b]: &[Vec<f32>; 2], inp: usize) -> Vec<f64> {
    let scale = lora.alpha / lora.rank as f64;
    let element = |i: usize| {
        let (o, c) = (i / inp, i % inp);
        let terms =
            (0..lora.rank).map(|r| f64::from(b[o * lora.rank + r]) * f64::from(a[r * inp + c]));
        terms.sum::<f64>() * scale
    };
    (0..b.len() / lora.rank * inp).map(element).collect()
}

fn written(
    source: ModelFile,
    lora: &Lora,
    target: Target,
) -> (TempDir, ModelFile, Vec<(Projection, MergeCost)>) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("merged");
    let (file, costs) = merge(source, lora.clone()).unwrap();
    convert(&file, &path, target).unwrap();
    let written = ModelFile::open(&path).unwrap();
    (dir, written, costs.by_projection())
}

fn matrix(file: &ModelFile, layer: usize, p: Projection) -> TernaryMatrix {
    TensorSource::projection(file, layer, p).unwrap()
}

#[test]
fn masters_get_the_product_added_and_are_ternarized_by_the_definition() {
    let source = fixture("tied-h64/bf16");
    let lora = lora(source.config(), 0.02);
    for target in [EXACT, Target::Hf(Dtype::F32), Target::Hf(Dtype::BF16)] {
        let (_dir, merged, costs) = written(fixture("tied-h64/bf16"), &lora, target);
        assert_eq!(
            costs.iter().map(|(p, _)| *p).collect::<Vec<_>>(),
            [Projection::K, Projection::Down]
        );
        for (p, cost) in costs {
            let (mut changed, mut weights, mut sums) = (0, 0, [0.0; 4]);
            for layer in 0..source.config().num_hidden_layers {
                let masters = source.dense(&names::projection(layer, p)).unwrap().to_f32();
                let (rows, cols) = source.config().projection_shape(p);
                let product = product(&lora, &lora.matrices[&(layer, p)], cols);
                let sum: Vec<f32> =
                    masters.iter().zip(&product).map(|(w, d)| w + *d as f32).collect();
                let expected = TernaryMatrix::from_weights(&sum, rows, cols).unwrap();
                let found = matrix(&merged, layer, p);
                let pairs = expected.trits().into_iter().zip(found.trits());
                let differ = pairs.filter(|(a, b)| a != b).count();
                // Sums of two products in another order may fall to the other side of a middle.
                assert!(differ <= 1, "{differ} trits of layer {layer} {p:?}");
                assert!((expected.scale() / found.scale() - 1.0).abs() < 1e-6);
                let base = TernaryMatrix::from_weights(&masters, rows, cols).unwrap();
                changed +=
                    base.trits().iter().zip(found.trits()).filter(|(a, b)| **a != *b).count();
                weights += rows * cols;
                for ((before, after), d) in
                    base.dequantize().iter().zip(found.dequantize()).zip(product)
                {
                    let (before, after) = (f64::from(*before), f64::from(after));
                    let terms = [
                        (before + d).powi(2),
                        d * d,
                        (after - before - d).powi(2),
                        (after - before) * d,
                    ];
                    sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
                }
            }
            assert_eq!((cost.weights, cost.changed), (weights as u64, changed as u64));
            assert!(changed > 0);
            let [exact, wanted, error, along] = sums;
            for (found, expected) in [
                (cost.adapter_change(), (wanted / exact).sqrt()),
                (cost.error(), (error / exact).sqrt()),
                (cost.kept(), along / wanted),
            ] {
                assert!((found / expected - 1.0).abs() < 1e-4, "{p:?}: {found}, not {expected}");
            }
        }
        // What has no adapter is as it was.
        assert_eq!(matrix(&merged, 1, Projection::Q), matrix(&source, 1, Projection::Q));
    }
}

#[test]
fn stored_trits_keep_their_scale_and_turn_only_past_the_middle() {
    let source = fixture("untied-h192/packed");
    let config = source.config();
    let scale = matrix(&source, 0, Projection::K).scale();
    // Products of at most 4 times the size: less than half a scale turns nothing, and all is lost.
    for (size, turns) in [(0.0, false), (scale / 17.0, false), (scale, true)] {
        let lora = lora(config, size);
        let (_dir, merged, costs) = written(fixture("untied-h192/packed"), &lora, EXACT);
        for layer in 0..config.num_hidden_layers {
            let p = Projection::K;
            let (base, found) = (matrix(&source, layer, p), matrix(&merged, layer, p));
            assert_eq!(found.scale(), base.scale());
            let product = product(&lora, &lora.matrices[&(layer, p)], base.cols());
            let sum: Vec<f32> =
                base.dequantize().iter().zip(&product).map(|(w, d)| w + *d as f32).collect();
            let mut expected = vec![0; sum.len()];
            ternarize(&sum, base.scale(), &mut expected).unwrap();
            let differ = expected.iter().zip(found.trits()).filter(|(a, b)| **a != *b).count();
            assert!(differ <= 1, "{differ} trits of layer {layer}");
        }
        let (_, cost) = costs.into_iter().find(|(p, _)| *p == Projection::K).unwrap();
        assert_eq!(cost.changed > 0, turns, "{size}");
        if turns {
            assert!(cost.kept() > 0.2 && cost.error() < cost.adapter_change(), "{cost:?}");
        } else {
            assert_eq!(cost.kept(), 0.0);
            assert_eq!(cost.error(), cost.adapter_change());
        }
    }
}

#[test]
fn full_precision_weights_are_merged_exactly() {
    let source = fixture("tied-h64/bf16");
    let dir = tempdir().unwrap();
    let path = dir.path().join("full");
    let config = ModelConfig { quantization: Quantization::None, ..source.config().clone() };
    write_hf(&path, &config, Dtype::F32, &source, source.tokenizer()).unwrap();
    let full = || ModelFile::open(&path).unwrap();
    let lora = lora(&config, 0.02);
    let (_dir, merged, costs) = written(full(), &lora, Target::Hf(Dtype::F32));
    assert_eq!((merged.config(), costs.len()), (&config, 0));
    assert_eq!(merged.tokenizer(), source.tokenizer());
    for p in [Projection::Down, Projection::Up] {
        let name = names::projection(1, p);
        let (base, found) = (source.dense(&name).unwrap(), merged.dense(&name).unwrap().to_f32());
        let product = match lora.matrices.get(&(1, p)) {
            Some(pair) => product(&lora, pair, config.projection_shape(p).1),
            None => vec![0.0; found.len()],
        };
        for ((w, d), found) in base.to_f32().iter().zip(product).zip(found) {
            assert!((f64::from(*w) + d - f64::from(found)).abs() < 1e-6);
        }
    }
    let error = convert(&full(), &dir.path().join("packed"), EXACT).unwrap_err().to_string();
    assert!(error.contains("full-precision"), "{error}");
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let lora = lora(fixture("untied-h192/bf16").config(), 1.0);
    let refused = |name: &str| {
        let error = merge(fixture(name), lora.clone()).err().unwrap().to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    let error = refused("tied-h64/bf16");
    assert!(error.contains("layers.0.self_attn.k_proj") && error.contains("(32, 64)"), "{error}");
    assert!(refused("llama-norms-h64/online").contains("norms"));
}
