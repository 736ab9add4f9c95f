//! `trine inspect`: what a model file holds.

use std::path::PathBuf;

use rayon::prelude::*;
use serde_json::{Value, json};
use trine_format::gguf::i2_s::Order;
use trine_format::names::{Part, TensorId};
use trine_format::{ModelFile, Projection, Quantization, Weight, names};
use trine_ternary::Ambiguity;
use trine_tokenizer::Tokenizer;

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

/// Trits of one projection: how many are -1, 0, +1, and their scale.
struct Ternary {
    name: String,
    shape: (usize, usize),
    counts: [usize; 3],
    scale: f32,
    /// Of masters: weights that other implementations may round the other way.
    ambiguity: Option<Ambiguity>,
}

/// What is told about a model beside its list of tensors.
struct Summary<'a> {
    file: &'a ModelFile,
    ternary: Vec<Ternary>,
    /// Bytes of the projections with their scales, of embedding and head, of everything else.
    bytes: [usize; 3],
    /// The tokenizer, or why it is none.
    tokenizer: Option<Result<Tokenizer, String>>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let file = model::open(&args.model)?;
    let summary = Summary::new(&file)?;
    output::print_line(&if args.json { summary.json().to_string() } else { summary.text() })
}

impl<'a> Summary<'a> {
    fn new(file: &'a ModelFile) -> anyhow::Result<Self> {
        let mut bytes = [0; 3];
        for tensor in file.tensors() {
            bytes[part(&tensor.name)] += tensor.bytes;
        }
        let tokenizer = file.tokenizer();
        let tokenizer = tokenizer
            .map(|files| Tokenizer::from_json(&files.tokenizer_json).map_err(|e| e.to_string()));
        Ok(Self { file, ternary: ternary_tensors(file)?, bytes, tokenizer })
    }

    /// Trits of all projections: how many are -1, 0, +1.
    fn counts(&self) -> [usize; 3] {
        let sum = |a: [usize; 3], t: &Ternary| std::array::from_fn(|i| a[i] + t.counts[i]);
        self.ternary.iter().fold([0; 3], sum)
    }

    /// Stored bits for each weight of the projections.
    fn bits_per_weight(&self) -> f64 {
        let weights: usize = Projection::ALL
            .into_iter()
            .map(|p| self.file.config().projection_shape(p))
            .map(|(rows, cols)| rows * cols * self.file.config().num_hidden_layers)
            .sum();
        self.bytes[0] as f64 * 8.0 / weights as f64
    }

    /// Smallest, median and largest scale.
    fn scales(&self) -> Option<[f32; 3]> {
        let mut scales: Vec<f32> = self.ternary.iter().map(|t| t.scale).collect();
        scales.sort_by(f32::total_cmp);
        Some([*scales.first()?, scales[scales.len() / 2], *scales.last()?])
    }

    fn ambiguity(&self) -> Option<Ambiguity> {
        let found: Vec<Ambiguity> = self.ternary.iter().filter_map(|t| t.ambiguity).collect();
        (!found.is_empty()).then(|| found.iter().copied().sum())
    }

    /// The architecture: the name that a GGUF file has for it, or that transformers has.
    fn architecture(&self) -> String {
        let key = "general.architecture";
        match self.file.as_gguf().and_then(|gguf| gguf.get(key)?.as_str()) {
            Some(name) => name.to_owned(),
            None => self.file.config().to_hf_json("")["architectures"][0]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        }
    }

    fn text(&self) -> String {
        let (file, c) = (self.file, self.file.config());
        let total: usize = self.bytes.iter().sum();
        let parameters = c.parameter_count();
        let mut lines = vec![
            format!("{}: {}, {}", file.path().display(), file.format().name(), self.architecture()),
            format!(
                "{} parameters in {}: projections {}, embedding and head {}, norms {}",
                output::count(parameters),
                output::bytes(total as u64),
                output::bytes(self.bytes[0] as u64),
                output::bytes(self.bytes[1] as u64),
                output::bytes(self.bytes[2] as u64)
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
                "{} gate, {}{}, {} head, rope theta {}, projections {}",
                c.hidden_act.name(),
                if c.sub_norms { "sub-norms" } else { "no sub-norms" },
                if c.projection_norm_eps.is_some() { ", norms of projections" } else { "" },
                if c.tie_word_embeddings { "tied" } else { "own" },
                c.rope_theta,
                quantization(c.quantization)
            ),
        ];
        let counts = self.counts();
        if let Some([smallest, median, largest]) = self.scales() {
            lines.push(format!(
                "{} trits at {:.4} bits each (their own content: {:.4}), {:.1} % are 0; scales {smallest:.3e} to \
                 {largest:.3e}, median {median:.3e}",
                output::count(counts.iter().sum::<usize>() as u64),
                self.bits_per_weight(),
                entropy(counts),
                share(counts, 1) * 100.0,
            ));
        }
        if let Some(Ambiguity { ties, bf16_scale }) = self.ambiguity() {
            lines.push(format!(
                "another implementation may round {} weights otherwise at ties, {} with bf16 scales",
                output::count(ties),
                output::count(bf16_scale)
            ));
        }
        if let Some(order) = file.i2_s_order().filter(|order| *order != Order::Blocks128) {
            lines.push(format!("I2_S in {}", order.name()));
        }
        lines.extend(self.tokenizer_text());
        lines.push(String::new());
        if !self.ternary.is_empty() {
            lines.push(format!(
                "{:48} {:>14} {:>7} {:>7} {:>7}  scale",
                "ternary", "shape", "-1", "0", "+1"
            ));
            for t in &self.ternary {
                let [minus, zero, plus] = shares(t.counts).map(|s| format!("{:.1} %", s * 100.0));
                let shape = format!("({}, {})", t.shape.0, t.shape.1);
                lines.push(format!(
                    "{:48} {shape:>14} {minus:>7} {zero:>7} {plus:>7}  {:.6e}",
                    t.name, t.scale
                ));
            }
            lines.push(String::new());
        }
        lines.push(format!("{:48} {:>14} {:>7} {:>12}", "tensor", "shape", "type", "bytes"));
        for t in file.tensors() {
            let shape = format!("{:?}", t.shape);
            lines.push(format!("{:48} {shape:>14} {:>7} {:>12}", t.name, t.dtype, t.bytes));
        }
        lines.join("\n")
    }

    fn tokenizer_text(&self) -> Vec<String> {
        let tokenizer = match &self.tokenizer {
            None => return vec!["no tokenizer".to_owned()],
            Some(Err(e)) => return vec![format!("a tokenizer that cannot be used: {e}")],
            Some(Ok(tokenizer)) => tokenizer,
        };
        let named = |id: Option<u32>| match id {
            Some(id) => format!("{} ({id})", tokenizer.token(id).unwrap_or_default()),
            None => "none".to_owned(),
        };
        let config = self.file.config();
        let ends: Vec<String> = config.eos_token_ids.iter().map(|&id| named(Some(id))).collect();
        let mut lines = vec![format!(
            "tokenizer of {} ids, begins with {}{}, ends with {}",
            tokenizer.vocab_size(),
            named(config.bos_token_id),
            if tokenizer.adds_bos() { "" } else { ", which it does not add" },
            if ends.is_empty() { "none".to_owned() } else { ends.join(", ") }
        )];
        lines.push(match self.file.tokenizer().and_then(|files| files.chat_template()) {
            Some(template) => format!("chat template: {}", template.trim()),
            None => "no chat template".to_owned(),
        });
        lines
    }

    fn json(&self) -> Value {
        let (file, c) = (self.file, self.file.config());
        let tensor = |t: trine_format::TensorSummary| json!({ "name": t.name, "shape": t.shape, "type": t.dtype, "bytes": t.bytes });
        let ternary = |t: &Ternary| {
            json!({
                "name": t.name,
                "shape": [t.shape.0, t.shape.1],
                "counts": t.counts,
                "shares": shares(t.counts),
                "scale": t.scale,
                "ambiguous_ties": t.ambiguity.map(|a| a.ties),
                "ambiguous_bf16_scale": t.ambiguity.map(|a| a.bf16_scale),
            })
        };
        let counts = self.counts();
        json!({
            "path": file.path(),
            "format": file.format().name(),
            "architecture": self.architecture(),
            "parameters": c.parameter_count(),
            "bytes": self.bytes.iter().sum::<usize>(),
            "bytes_of": {
                "projections": self.bytes[0],
                "embedding_and_head": self.bytes[1],
                "norms": self.bytes[2],
            },
            "bits_per_weight": self.bits_per_weight(),
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
                "projection_norm_eps": c.projection_norm_eps,
                "tie_word_embeddings": c.tie_word_embeddings,
                "bos_token_id": c.bos_token_id,
                "eos_token_ids": c.eos_token_ids,
            },
            "quantization": quantization(c.quantization),
            "trits": {
                "counts": counts,
                "shares": shares(counts),
                "entropy_bits": entropy(counts),
            },
            "scales": self.scales().map(|[smallest, median, largest]| {
                json!({ "smallest": smallest, "median": median, "largest": largest })
            }),
            "i2_s_order": file.i2_s_order().map(Order::name),
            "tokenizer": match &self.tokenizer {
                None => Value::Null,
                Some(Err(e)) => json!({ "error": e }),
                Some(Ok(tokenizer)) => json!({
                    "ids": tokenizer.vocab_size(),
                    "adds_bos": tokenizer.adds_bos(),
                    "special_tokens": tokenizer.special_tokens(),
                }),
            },
            "chat_template": file.tokenizer().and_then(|files| files.chat_template()),
            "ternary": self.ternary.iter().map(ternary).collect::<Vec<_>>(),
            "tensors": file.tensors().into_iter().map(tensor).collect::<Vec<_>>(),
        })
    }
}

/// Which of [`Summary::bytes`] a tensor of a file counts to: a scale counts to its projection.
fn part(name: &str) -> usize {
    let weight = match name.strip_suffix("_scale") {
        Some(weight) => weight.to_owned(),
        None => name.strip_suffix(".scale").map_or(name.to_owned(), |n| format!("{n}.weight")),
    };
    match TensorId::from_canonical(&weight).or_else(|| TensorId::from_gguf(&weight)) {
        Some(TensorId::Layer(_, Part::Projection(_))) => 0,
        Some(TensorId::Embed | TensorId::Head) => 1,
        _ => 2,
    }
}

fn ternary_tensors(file: &ModelFile) -> anyhow::Result<Vec<Ternary>> {
    let config = file.config();
    if config.quantization == Quantization::None {
        return Ok(Vec::new());
    }
    let all = (0..config.num_hidden_layers).flat_map(|l| Projection::ALL.map(|p| (l, p)));
    let read = |(layer, p)| -> anyhow::Result<Option<Ternary>> {
        let name = names::projection(layer, p);
        let counted = match config.quantization {
            Quantization::Online => file.dense(&name)?.ternarize_counted().ok(),
            _ => None,
        };
        let (matrix, ambiguity) = match counted {
            Some((matrix, ambiguity)) => (matrix, Some(ambiguity)),
            // Trits as stored; or what is wrong with masters, with the name of the file.
            None => match file.projection(layer, p)? {
                Weight::Ternary(matrix) => (matrix, None),
                Weight::Dense(_) => return Ok(None),
            },
        };
        file.release(&name);
        let shape = (matrix.rows(), matrix.cols());
        Ok(Some(Ternary { name, shape, counts: matrix.counts(), scale: matrix.scale(), ambiguity }))
    };
    let read: Result<Vec<_>, _> = all.collect::<Vec<_>>().into_par_iter().map(read).collect();
    Ok(read?.into_iter().flatten().collect())
}

fn share(counts: [usize; 3], of: usize) -> f64 {
    counts[of] as f64 / counts.iter().sum::<usize>().max(1) as f64
}

fn shares(counts: [usize; 3]) -> [f64; 3] {
    [0, 1, 2].map(|i| share(counts, i))
}

/// Bits of information in a trit that is drawn with these shares.
fn entropy(counts: [usize; 3]) -> f64 {
    let term = |p: f64| if p > 0.0 { -p * p.log2() } else { 0.0 };
    shares(counts).map(term).iter().sum()
}

fn quantization(quantization: Quantization) -> &'static str {
    match quantization {
        Quantization::None => "in full precision",
        Quantization::Online => "ternarized from masters",
        Quantization::Offline => "stored as trits",
    }
}
