//! `trine inspect`: what a model file holds.

use std::path::PathBuf;

use serde_json::{Value, json};
use trine_format::{ModelFile, Projection, Quantization, Weight, names};

use crate::{model, output};

/// Options of `trine inspect`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Trits of one projection: shares of -1, 0, +1, and the scale.
struct Ternary {
    name: String,
    shape: (usize, usize),
    counts: [usize; 3],
    scale: f32,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let file = model::open(&args.model)?;
    let ternary = ternary_tensors(&file)?;
    if args.json {
        return output::print_line(&as_json(&file, &ternary).to_string());
    }
    let c = file.config();
    let parameters = c.parameter_count();
    let tensors = file.tensors();
    let stored: usize = tensors.iter().map(|t| t.bytes).sum();
    let mut lines = vec![
        format!("{}: {}", file.path().display(), file.format().name()),
        format!(
            "{} parameters, {} of tensors, {:.3} bits a parameter",
            output::count(parameters),
            output::bytes(stored as u64),
            stored as f64 * 8.0 / parameters as f64
        ),
        format!(
            "hidden {}, ffn {}, layers {}, heads {}/{} of {}, vocabulary {}, context {}",
            c.hidden_size,
            c.intermediate_size,
            c.num_hidden_layers,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            c.vocab_size,
            c.max_position_embeddings
        ),
        format!(
            "{} gate, {}, {} head, rope theta {}, projections {}",
            c.hidden_act.name(),
            if c.sub_norms { "sub-norms" } else { "no sub-norms" },
            if c.tie_word_embeddings { "tied" } else { "own" },
            c.rope_theta,
            quantization(c.quantization)
        ),
        match file.tokenizer() {
            Some(files) if files.chat_template().is_some() => "tokenizer and chat template".into(),
            Some(_) => "tokenizer, no chat template".into(),
            None => "no tokenizer".into(),
        },
        String::new(),
    ];
    if !ternary.is_empty() {
        lines.push(format!(
            "{:48} {:>14} {:>7} {:>7} {:>7}  scale",
            "ternary", "shape", "-1", "0", "+1"
        ));
        for t in &ternary {
            let [minus, zero, plus] = shares(t).map(|s| format!("{:.1} %", s * 100.0));
            let shape = format!("({}, {})", t.shape.0, t.shape.1);
            lines.push(format!(
                "{:48} {shape:>14} {minus:>7} {zero:>7} {plus:>7}  {:.6e}",
                t.name, t.scale
            ));
        }
        lines.push(String::new());
    }
    lines.push(format!("{:48} {:>14} {:>7} {:>12}", "tensor", "shape", "type", "bytes"));
    for t in &tensors {
        let shape = format!("{:?}", t.shape);
        lines.push(format!("{:48} {shape:>14} {:>7} {:>12}", t.name, t.dtype, t.bytes));
    }
    output::print_line(&lines.join("\n"))
}

fn ternary_tensors(file: &ModelFile) -> anyhow::Result<Vec<Ternary>> {
    let mut found = Vec::new();
    for layer in 0..file.config().num_hidden_layers {
        for p in Projection::ALL {
            if let Weight::Ternary(matrix) = file.projection(layer, p)? {
                found.push(Ternary {
                    name: names::projection(layer, p),
                    shape: (matrix.rows(), matrix.cols()),
                    counts: matrix.counts(),
                    scale: matrix.scale(),
                });
            }
        }
    }
    Ok(found)
}

fn shares(t: &Ternary) -> [f64; 3] {
    let n = (t.shape.0 * t.shape.1).max(1) as f64;
    t.counts.map(|count| count as f64 / n)
}

fn quantization(quantization: Quantization) -> &'static str {
    match quantization {
        Quantization::None => "in full precision",
        Quantization::Online => "ternarized from masters",
        Quantization::Offline => "stored as trits",
    }
}

fn as_json(file: &ModelFile, ternary: &[Ternary]) -> Value {
    let c = file.config();
    let tensors: Vec<Value> = file
        .tensors()
        .iter()
        .map(|t| json!({ "name": t.name, "shape": t.shape, "type": t.dtype, "bytes": t.bytes }))
        .collect();
    let ternary: Vec<Value> = ternary
        .iter()
        .map(|t| {
            json!({
                "name": t.name,
                "shape": [t.shape.0, t.shape.1],
                "counts": t.counts,
                "shares": shares(t),
                "scale": t.scale,
            })
        })
        .collect();
    json!({
        "path": file.path(),
        "format": file.format().name(),
        "parameters": c.parameter_count(),
        "bytes": file.tensors().iter().map(|t| t.bytes).sum::<usize>(),
        "config": {
            "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads,
            "head_dim": c.head_dim,
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.max_position_embeddings,
            "rope_theta": c.rope_theta,
            "rms_norm_eps": c.rms_norm_eps,
            "hidden_act": c.hidden_act.name(),
            "sub_norms": c.sub_norms,
            "tie_word_embeddings": c.tie_word_embeddings,
            "bos_token_id": c.bos_token_id,
            "eos_token_ids": c.eos_token_ids,
        },
        "quantization": quantization(c.quantization),
        "tokenizer": file.tokenizer().is_some(),
        "chat_template": file.tokenizer().and_then(|files| files.chat_template()),
        "ternary": ternary,
        "tensors": tensors,
    })
}
