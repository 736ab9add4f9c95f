//! Layer by layer against transformers, each with its given input: no error is carried along.

use trine_format::{ModelFile, Projection, Weight};
use trine_kernels::{Activations, PackedMatrix, nn};

use crate::fixtures::{self, relative_error, tensors};

#[test]
fn every_linear_layer_and_norm_matches_transformers() {
    for dir in fixtures::models() {
        let trace = tensors(&dir.join("trace_layer0_p1.safetensors"));
        let file = ModelFile::open(&dir.join("bf16")).unwrap();
        let linear = [
            ("self_attn.q_proj", Projection::Q),
            ("self_attn.k_proj", Projection::K),
            ("self_attn.v_proj", Projection::V),
            ("self_attn.o_proj", Projection::O),
            ("mlp.gate_proj", Projection::Gate),
            ("mlp.up_proj", Projection::Up),
            ("mlp.down_proj", Projection::Down),
        ];
        for (module, p) in linear {
            let (x, expected) = (&trace[&format!("{module}.in")], &trace[&format!("{module}.out")]);
            let Weight::Ternary(matrix) = file.projection(0, p).unwrap() else {
                panic!("{module} should be ternary")
            };
            let tokens = x.len() / matrix.cols();
            let mut y = vec![0.0; expected.len()];
            let x = Activations::quantize(x, tokens, matrix.cols());
            trine_kernels::bitlinear(&PackedMatrix::from(&matrix), &x, &mut y);
            let error = relative_error(&y, expected);
            assert!(error < 1e-6, "{} {module}: {error:.1e}", dir.display());
        }
        let norms = [
            "input_layernorm",
            "self_attn.attn_sub_norm",
            "post_attention_layernorm",
            "mlp.ffn_sub_norm",
        ];
        for module in norms {
            let (x, expected) = (&trace[&format!("{module}.in")], &trace[&format!("{module}.out")]);
            let weight = file.dense(&format!("model.layers.0.{module}.weight")).unwrap().to_f32();
            let mut y = vec![0.0; x.len()];
            for (x, y) in x.chunks_exact(weight.len()).zip(y.chunks_exact_mut(weight.len())) {
                nn::rms_norm(x, &weight, file.config().rms_norm_eps, y);
            }
            let error = relative_error(&y, expected);
            assert!(error < 1e-6, "{} {module}: {error:.1e}", dir.display());
        }
    }
}
