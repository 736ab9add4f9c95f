use candle_core::{Device, Tensor, Var};

use super::*;
use crate::config::MomentStorage;

/// Three steps of AdamW written down in f64, straight from PyTorch's documentation.
fn formula(mut w: f64, gradients: [f64; 3], rate: f64, decay: f64) -> f64 {
    let (mut m, mut v) = (0.0, 0.0);
    for (t, g) in (1..).zip(gradients) {
        w *= 1.0 - rate * decay;
        m = 0.9 * m + 0.1 * g;
        v = 0.95 * v + 0.05 * g * g;
        let (m_hat, v_hat): (f64, f64) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.95f64.powi(t)));
        w -= rate * m_hat / (v_hat.sqrt() + 1e-8);
    }
    w
}

fn unclipped() -> OptimizerConfig {
    OptimizerConfig { clip_grad_norm: 0.0, ..OptimizerConfig::default() }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Minimizes the mean of `(w - target)^2 / 2`, elements of very different curvature, from zero;
/// returns the mean distance at the end.
fn minimize(config: OptimizerConfig, name: &str, steps: usize, rate: f64) -> f64 {
    let (rows, columns) = (64, 128);
    let n = rows * columns;
    let target: Vec<f32> = (0..n).map(|i| ((i * 37) % 257) as f32 / 128.0 - 1.0).collect();
    let var = Var::zeros((rows, columns), candle_core::DType::F32, &Device::Cpu).unwrap();
    let params = Params::from_vars([(name.to_owned(), var.clone())]);
    let mut optimizer = Optimizer::new(config, 1, &params);
    for step in 0..steps {
        let gradient: Vec<f32> = values(&var)
            .iter()
            .zip(&target)
            .enumerate()
            .map(|(i, (w, t))| (w - t) * 10f32.powi((i % 5) as i32 - 4))
            .collect();
        let gradient = Tensor::from_vec(gradient, (rows, columns), &Device::Cpu).unwrap();
        let gradients = Gradients::from([(name.to_owned(), gradient)]);
        let norm = global_norm(&gradients).unwrap();
        let learning_rate = rate * (1.0 - step as f64 / steps as f64);
        let rates = Rates { learning_rate, weight_decay: 0.0 };
        optimizer.update(&params, &gradients, norm, rates).unwrap();
    }
    let distance = |(w, t): (&f32, &f32)| f64::from((w - t).abs());
    values(&var).iter().zip(&target).map(distance).sum::<f64>() / n as f64
}

#[test]
fn updates_are_the_formula_and_norms_do_not_decay() {
    let gradients = [0.5f64, -2.0, 0.25];
    for (shape, decays) in [(vec![1, 1], true), (vec![1], false)] {
        let var = Var::from_vec(vec![1.5f32], shape, &Device::Cpu).unwrap();
        let params = Params::from_vars([("p".to_owned(), var.clone())]);
        let mut adamw = Optimizer::new(unclipped(), 0, &params);
        for g in gradients {
            let gradient = Tensor::full(g as f32, var.shape(), &Device::Cpu).unwrap();
            let gradients = Gradients::from([("p".to_owned(), gradient)]);
            let rates = Rates { learning_rate: 0.1, weight_decay: 0.7 };
            adamw.update(&params, &gradients, g.abs(), rates).unwrap();
        }
        let expected = formula(1.5, gradients, 0.1, if decays { 0.7 } else { 0.0 });
        let found = values(&var)[0];
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found}, not {expected}");
    }
}

#[test]
fn clipping_scales_the_gradient_to_the_norm() {
    let var = Var::from_vec(vec![0f32; 2], 2, &Device::Cpu).unwrap();
    let params = Params::from_vars([("p".to_owned(), var.clone())]);
    let mut adamw = Optimizer::new(OptimizerConfig::default(), 0, &params);
    let gradient = Tensor::new(&[30f32, 40.0], &Device::Cpu).unwrap();
    let gradients = Gradients::from([("p".to_owned(), gradient)]);
    let norm = global_norm(&gradients).unwrap();
    assert_eq!(norm, 50.0);
    let rates = Rates { learning_rate: 1e-3, weight_decay: 0.0 };
    adamw.update(&params, &gradients, norm, rates).unwrap();
    let (name, m) = adamw.state().next().unwrap();
    let StateValues::F32(m) = m else { panic!("{name} in bytes") };
    let expected = [0.1 * 0.6, 0.1 * 0.8];
    assert_eq!(name, "m.p");
    assert!(m.iter().zip(expected).all(|(m, e)| (m - e).abs() < 1e-6), "{m:?}");
}

#[test]
fn accumulated_parts_are_the_weighted_mean() {
    let of = |x: &[f32]| Gradients::from([("p".to_owned(), Tensor::new(x, &Device::Cpu).unwrap())]);
    let mut sum = Gradients::new();
    accumulate(&mut sum, of(&[1.0, 2.0]), 0.25).unwrap();
    accumulate(&mut sum, of(&[-1.0, 6.0]), 0.75).unwrap();
    assert_eq!(values(&sum["p"]), [-0.5, 5.0]);
}

#[test]
fn byte_moments_reach_the_minimum_of_f32_moments_in_a_quarter_of_the_memory() {
    let int8 = OptimizerConfig { moments: MomentStorage::Int8, ..unclipped() };
    for (name, kind, per_element) in [
        ("p", OptimizerKind::Adamw, 2.0 + 8.0 / 256.0),
        ("model.layers.0.mlp.up_proj.weight", OptimizerKind::Muon, 1.0 + 4.0 / 256.0),
    ] {
        let (f32, int8) =
            (OptimizerConfig { kind, ..unclipped() }, OptimizerConfig { kind, ..int8.clone() });
        let var = Var::zeros((64, 128), candle_core::DType::F32, &Device::Cpu).unwrap();
        let params = Params::from_vars([(name.to_owned(), var)]);
        let bytes = Optimizer::new(int8.clone(), 0, &params).state_bytes();
        assert_eq!(bytes as f64, per_element * 64.0 * 128.0);
        let (exact, found) = (minimize(f32, name, 300, 2e-2), minimize(int8, name, 300, 2e-2));
        assert!(found < 1.1 * exact + 2e-3, "{kind:?}: {found}, not {exact}");
    }
}

#[test]
fn bf16_masters_move_by_steps_that_rounding_to_nearest_would_undo() {
    let config = OptimizerConfig { masters: MasterPrecision::Bf16, ..unclipped() };
    let n = 4096;
    let var = Var::from_vec(vec![1.001f32; n], n, &Device::Cpu).unwrap();
    let mut params = Params::from_vars([("p".to_owned(), var.clone())]);
    let mut optimizer = Optimizer::new(config, 9, &params);
    optimizer.prepare(&mut params).unwrap();
    assert_eq!(values(&var)[0], 1.0);
    let gradient = Tensor::full(1f32, n, &Device::Cpu).unwrap();
    let gradients = Gradients::from([("p".to_owned(), gradient)]);
    // bf16 has nothing between 1 and 1 - 2^-8; fifty steps of 2^-12 are three of that.
    let rates = Rates { learning_rate: 2f64.powi(-12), weight_decay: 0.0 };
    for _ in 0..50 {
        optimizer.update(&params, &gradients, 1.0, rates).unwrap();
    }
    let values = values(&var);
    assert!(values.iter().all(|w| w.to_bits() & 0xffff == 0));
    let mean = values.iter().map(|w| f64::from(*w)).sum::<f64>() / n as f64;
    let expected = 1.0 - 50.0 * 2f64.powi(-12);
    assert!((mean - expected).abs() < 3e-4, "{mean}, not {expected}");
}

#[test]
fn muon_updates_the_matrices_of_layers_and_adamw_the_rest() {
    let names = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ];
    let var = |name: &str| {
        let shape = if name.contains("norm") { vec![8] } else { vec![4, 8] };
        Var::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap()
    };
    let params = Params::from_vars(names.map(|name| (name.to_owned(), var(name))));
    let muon = OptimizerConfig { kind: OptimizerKind::Muon, ..unclipped() };
    let optimizer = Optimizer::new(muon, 0, &params);
    let found: Vec<String> = optimizer.state().map(|(name, _)| name).collect();
    let mut expected: Vec<String> =
        names[..3].iter().flat_map(|name| [format!("m.{name}"), format!("v.{name}")]).collect();
    expected.push(format!("momentum.{}", names[3]));
    assert_eq!(found, expected);
}
