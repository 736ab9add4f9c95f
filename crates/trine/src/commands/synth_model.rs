//! `trine synth-model`: a model of random weights in the shape of a real one.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use trine_export::RandomModel;
use trine_format::gguf::{TernaryType, WriteOptions, write_model};
use trine_format::{
    Dtype, HiddenAct, ModelConfig, Quantization, TokenizerFiles, write_hf, write_hf_packed,
};
use trine_tokenizer::Tokenizer;

use crate::model;
use crate::output::{self, note};

/// Options of `trine synth-model`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to write: a file ending in .gguf, or a directory for Hugging Face formats
    out: PathBuf,
    /// Shape to start from; the options below change it
    #[arg(long, value_enum, default_value_t = Shape::Tiny)]
    shape: Shape,
    /// Format, as `trine convert` has it; i2_s by default for a name ending in .gguf (trn2 where it
    /// cannot hold the shapes), else hf
    #[arg(long = "type", value_name = "TYPE")]
    form: Option<Form>,
    /// Another seed is another model
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// tokenizer.json, or a directory with one, to travel with the model
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// Width of the residual stream
    #[arg(long, value_name = "N")]
    hidden: Option<usize>,
    /// Width of the feed-forward part
    #[arg(long, value_name = "N")]
    ffn: Option<usize>,
    /// Layers
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Query heads; their width is hidden / heads
    #[arg(long, value_name = "N")]
    heads: Option<usize>,
    /// Key and value heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<usize>,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N")]
    vocab: Option<usize>,
    /// Longest context in tokens
    #[arg(long, value_name = "N")]
    context: Option<usize>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Form {
    /// Hugging Face directory of bf16 master weights
    Hf,
    /// Hugging Face directory with packed trits
    HfPacked,
    /// GGUF, 2 bits a weight
    #[value(name = "i2_s")]
    I2S,
}

/// The shapes that have names.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Shape {
    /// 2 layers of 256, for a test
    Tiny,
    /// 30 million parameters
    #[value(name = "30m")]
    M30,
    /// 125 million parameters
    #[value(name = "125m")]
    M125,
    /// 0.7 billion parameters, the shape of bitnet_b1_58-large
    #[value(name = "700m")]
    M700,
    /// 2.4 billion parameters, the shape of microsoft/bitnet-b1.58-2B-4T
    #[value(name = "2b4t")]
    B2,
}

impl Shape {
    /// A model of this shape.
    pub(crate) fn config(self) -> ModelConfig {
        // hidden, ffn, layers, heads, key-value heads, vocabulary, context
        let (hidden, ffn, layers, heads, kv_heads, vocab, context) = match self {
            Self::Tiny => (256, 768, 2, 4, 2, 1024, 512),
            Self::M30 => (512, 1536, 8, 8, 4, 8192, 1024),
            Self::M125 => (768, 2048, 16, 12, 4, 32_000, 2048),
            Self::M700 => (1536, 4096, 24, 16, 16, 32_002, 2048),
            Self::B2 => (2560, 6912, 30, 20, 5, 128_256, 4096),
        };
        let (bos_token_id, eos_token_ids) = match self {
            Self::B2 => (Some(128_000), vec![128_001, 128_009]),
            _ => (None, vec![]),
        };
        ModelConfig {
            hidden_size: hidden,
            intermediate_size: ffn,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: hidden / heads,
            vocab_size: vocab,
            max_position_embeddings: context,
            rope_theta: 500_000.0,
            rms_norm_eps: 1e-5,
            hidden_act: HiddenAct::Relu2,
            sub_norms: true,
            projection_norm_eps: None,
            tie_word_embeddings: true,
            bos_token_id,
            eos_token_ids,
            quantization: Quantization::Online,
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let model = RandomModel::new(config(args)?, args.seed);
    let config = model.config();
    let tokenizer = match &args.tokenizer {
        Some(path) => Some(tokenizer(path, config.vocab_size)?),
        None => None,
    };
    let (out, tokenizer) = (&args.out, tokenizer.as_ref());
    let is_gguf = out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let form = args.form.unwrap_or(if is_gguf { Form::I2S } else { Form::Hf });
    match form {
        Form::I2S if !is_gguf => bail!("--type i2_s writes a file: its name must end in .gguf"),
        Form::Hf | Form::HfPacked if is_gguf => {
            bail!("--type hf and hf-packed write a directory, not .gguf")
        }
        Form::Hf | Form::HfPacked if std::fs::read_dir(out).is_ok_and(|d| d.count() > 0) => {
            bail!("{}: expected a new name or an empty directory, found files", out.display())
        }
        Form::Hf => write_hf(out, config, Dtype::BF16, &model, tokenizer)?,
        Form::HfPacked => write_hf_packed(out, config, &model, tokenizer)?,
        Form::I2S => {
            let ternary = TernaryType::exact_for(config);
            let options = WriteOptions { ternary, embedding: Dtype::BF16 };
            write_model(out, config, &model, tokenizer, options)?;
        }
    }
    let parameters = output::count(config.parameter_count());
    note!("wrote {}: {parameters} random parameters, seed {}", out.display(), args.seed);
    Ok(())
}

/// The shape that the options ask for; sizes that fit no model are named as in `config.json`.
fn config(args: &Args) -> anyhow::Result<ModelConfig> {
    let mut config = args.shape.config();
    for (size, option) in [
        (&mut config.hidden_size, args.hidden),
        (&mut config.intermediate_size, args.ffn),
        (&mut config.num_hidden_layers, args.layers),
        (&mut config.num_attention_heads, args.heads),
        (&mut config.num_key_value_heads, args.kv_heads),
        (&mut config.vocab_size, args.vocab),
        (&mut config.max_position_embeddings, args.context),
    ] {
        *size = option.unwrap_or(*size);
    }
    let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
    if heads == 0 || !hidden.is_multiple_of(heads) {
        bail!("--heads {heads}: expected a divisor of the hidden size {hidden}");
    }
    config.head_dim = hidden / heads;
    // A vocabulary of another size is not that of the shape's special tokens.
    if args.vocab.is_some() {
        (config.bos_token_id, config.eos_token_ids) = (None, vec![]);
    }
    config.validate()?;
    Ok(config)
}

/// The files of a tokenizer, checked to fit the vocabulary.
fn tokenizer(path: &Path, vocab_size: usize) -> anyhow::Result<TokenizerFiles> {
    let files = TokenizerFiles::open(&model::tokenizer_path(path)?)?;
    let ids = Tokenizer::from_json(&files.tokenizer_json)
        .with_context(|| path.display().to_string())?
        .vocab_size();
    if ids > vocab_size {
        bail!(
            "{}: the tokenizer has {ids} ids, the model embeddings for {vocab_size}; \
             --vocab {ids} fits",
            path.display()
        );
    }
    Ok(files)
}
