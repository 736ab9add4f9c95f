//! `trine convert`: any model in, any format out, verified.

mod merged;

use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::json;
use trine_export::import::bitllama2c::{self, BitOrder};
use trine_export::import::llama2c;
use trine_export::{Target, convert_watched, embedding_dtype, master_dtype};
use trine_format::gguf::i2_s::Order;
use trine_format::gguf::{Gguf, TernaryType, WriteOptions, is_placeholder_template};
use trine_format::{Dtype, ModelFile, TokenizerFiles};
use trine_ternary::Ambiguity;
use trine_tokenizer::{ChatTemplate, Tokenizer};

use crate::model;
use crate::output::{self, note};
use crate::progress::ConversionProgress;

/// Where a GGUF file has its chat template.
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// Options of `trine convert`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face directory, run directory, or hf://owner/name; with --from a file of
    /// another program
    from: PathBuf,
    /// What to write: a file ending in .gguf, or a directory for Hugging Face formats
    to: PathBuf,
    /// Format; for a name ending in .gguf i2_s by default, or trn2 where it cannot hold the shapes
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<Kind>,
    /// Type of the numbers of --type hf; by default that of the model's masters, bf16 for trits
    #[arg(long, value_name = "TYPE")]
    dtype: Option<MasterType>,
    /// Type of embedding and head in a GGUF; by default that of the model, but f16 for one of f32
    #[arg(long, value_name = "TYPE")]
    embed: Option<Embed>,
    /// Order of the I2_S tensors of a GGUF, which the file does not say: that of bitnet.cpp's x86
    /// builds, unless the weights show another
    #[arg(long, value_name = "ORDER")]
    i2s_order: Option<I2sOrder>,
    /// Read the model as the file of another program
    #[arg(long = "from", value_name = "PROGRAM")]
    program: Option<Program>,
    /// Where in a byte of a bitllama2c file the first weight lies; the file does not say
    #[arg(long, value_name = "ORDER", required_if_eq("program", "bitllama2c"))]
    bit_order: Option<BitOrderName>,
    /// tokenizer.json, a directory with one, or llama2.c's tokenizer.bin, to use instead of the
    /// model's
    #[arg(long, value_name = "FILE_OR_DIR")]
    tokenizer: Option<PathBuf>,
    /// Jinja file to use instead of the model's chat template
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Directory of an adapter to merge into the weights, which are rounded to trits again: what that
    /// costs is said
    #[arg(long, value_name = "DIR")]
    merge_adapter: Option<PathBuf>,
    /// Print one JSON object about what was written
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Kind {
    /// GGUF, 2 bits a weight, exact scale (bitnet.cpp)
    #[value(name = "i2_s")]
    I2S,
    /// GGUF, 1.6875 bits a weight (llama.cpp)
    #[value(name = "tq1_0")]
    Tq1_0,
    /// GGUF, 2.0625 bits a weight (llama.cpp)
    #[value(name = "tq2_0")]
    Tq2_0,
    /// GGUF, 2 bits a weight, exact scale, any shape (Trine only)
    Trn2,
    /// Hugging Face directory with master weights, for training and transformers
    Hf,
    /// Hugging Face directory with packed trits
    HfPacked,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum MasterType {
    F32,
    Bf16,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum I2sOrder {
    /// Blocks of 128: bitnet.cpp's converter and x86 builds
    X86,
    /// Blocks of 64: bitnet.cpp's ARM builds
    Arm,
    /// Four rows a byte: x86 builds without ACT_PARALLEL
    Rows4,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Program {
    /// Ternary models of bitllama2.c (header `24ka`)
    #[value(name = "bitllama2c")]
    BitLlama2c,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum BitOrderName {
    /// In the highest bits
    Msb,
    /// In the lowest bits
    Lsb,
}

/// The types of embeddings and heads.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum Embed {
    F32,
    F16,
    Bf16,
    /// 8.5 bits a number
    #[value(name = "q8_0")]
    Q8_0,
    /// 6.5625 bits a number
    #[value(name = "q6_k")]
    Q6K,
    /// 4.5 bits a number
    #[value(name = "q4_0")]
    Q4_0,
    /// 3.4375 bits a number, in memory 3.5625
    #[value(name = "q3_k")]
    Q3K,
}

impl Embed {
    /// The type that it names.
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
            Self::Q8_0 => Dtype::Q8_0,
            Self::Q6K => Dtype::Q6_K,
            Self::Q4_0 => Dtype::Q4_0,
            Self::Q3K => Dtype::Q3_K,
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut file = with_tokenizer(args, open(args)?)?;
    if let Some(order) = args.i2s_order {
        let order = match order {
            I2sOrder::X86 => Order::Blocks128,
            I2sOrder::Arm => Order::Blocks64,
            I2sOrder::Rows4 => Order::Rows4,
        };
        if file.i2_s_order().is_none() {
            bail!("--i2s-order: {} has no I2_S tensors", file.path().display());
        }
        if file.as_gguf().is_some_and(Gguf::is_ours) && order != Order::Blocks128 {
            bail!("--i2s-order: {} was written by Trine, always as x86", file.path().display());
        }
        file.set_i2_s_order(order);
    }
    if let Some(order) = file.i2_s_order().filter(|order| *order != Order::Blocks128) {
        note!("the trits of {} lie in {}", file.path().display(), order.name());
    }
    let target = target(args, &file)?;
    let i2_s_order = file.i2_s_order();
    let (file, costs) = match &args.merge_adapter {
        None => (file, None),
        Some(dir) => {
            let of = || format!("adapter {}", dir.display());
            let lora = crate::adapter::read(dir, file.config()).with_context(of)?;
            let (file, costs) = trine_export::merge(file, lora)?;
            (file, Some(costs))
        }
    };
    let progress = ConversionProgress::new();
    let report = convert_watched(&file, &args.to, target, &|at| progress.on_progress(at))?;
    drop(progress);
    let embedding = match target {
        Target::Gguf(options) => options.embedding,
        Target::HfPacked => Dtype::BF16,
        Target::Hf(dtype) => dtype,
    };
    if args.json {
        let mut summary = json!({
            "from": file.path(),
            "to": args.to,
            "bytes": report.bytes,
            "ternary_tensors": report.ternary_tensors,
            "trits": report.trits,
            "type": target_name(target),
            "i2_s_order": i2_s_order.map(Order::name),
            "ambiguous_ties": report.ambiguity.ties,
            "ambiguous_bf16_scale": report.ambiguity.bf16_scale,
            "largest_scale_change": report.largest_scale_change,
            "embedding": embedding.name(),
            "dense_tensors": report.dense_tensors,
            "largest_dense_change": report.largest_dense_change,
        });
        if let Some(costs) = &costs {
            summary["merged"] = merged::json(costs);
        }
        return output::print_line(&summary.to_string());
    }
    let verified = match report.ternary_tensors {
        0 => format!("{} tensors", report.dense_tensors),
        tensors => format!("{} trits in {tensors} tensors", output::count(report.trits)),
    };
    note!(
        "wrote {}: {}, {verified} verified against {}",
        args.to.display(),
        output::bytes(report.bytes),
        file.path().display()
    );
    if let Some(costs) = &costs {
        merged::note(costs);
    }
    let Ambiguity { ties, bf16_scale } = report.ambiguity;
    for (count, why) in [(ties, "it rounds ties"), (bf16_scale, "a scale in bf16 rounds them")] {
        if count > 0 {
            let count = output::count(count);
            note!("another implementation may get {count} of the trits otherwise, where {why}");
        }
    }
    if report.largest_scale_change > 0.0 {
        note!(
            "scales changed by up to {:.1e} of their value: the format stores them in 16 bits",
            report.largest_scale_change
        );
    }
    if report.largest_dense_change > 0.0 {
        note!(
            "numbers outside the projections changed by up to {:.1e} of the largest in their row: \
             the embedding is stored as {}{}",
            report.largest_dense_change,
            embedding.name(),
            if matches!(target, Target::Gguf(_)) { "" } else { ", and so are the norms" }
        );
    }
    Ok(())
}

fn open(args: &Args) -> anyhow::Result<ModelFile> {
    let order = match (args.program, args.bit_order) {
        (Some(Program::BitLlama2c), Some(BitOrderName::Msb)) => BitOrder::Msb,
        (Some(Program::BitLlama2c), Some(BitOrderName::Lsb)) => BitOrder::Lsb,
        (Some(Program::BitLlama2c), None) | (None, Some(_)) => {
            bail!("--from bitllama2c and --bit-order go together")
        }
        (None, None) => return model::open(&args.from),
    };
    Ok(bitllama2c::open(&model::resolve(&args.from)?, order)?)
}

/// The model with the tokenizer and the chat template that the options name.
fn with_tokenizer(args: &Args, file: ModelFile) -> anyhow::Result<ModelFile> {
    let mut files = file.tokenizer().cloned();
    let (mut bos, mut eos) = (file.config().bos_token_id, file.config().eos_token_ids.clone());
    if let Some(path) = &args.tokenizer {
        let path = &model::tokenizer_path(path)?;
        let mut given = match path.extension() {
            Some(extension) if extension == "bin" => llama2c::tokenizer(path)?,
            _ => TokenizerFiles::open(path)?,
        };
        let tokenizer = Tokenizer::from_json(&given.tokenizer_json)
            .with_context(|| path.display().to_string())?;
        model::check_vocabulary(&tokenizer, &file)
            .with_context(|| format!("{} does not fit", path.display()))?;
        // The ids that begin and end a text are those of this tokenizer, where it has some: the
        // model's own may be ordinary tokens in it.
        let begins = tokenizer.bos_id().filter(|id| bos != Some(*id));
        let ends: Vec<u32> = tokenizer.eos_id().into_iter().chain(tokenizer.eot_id()).collect();
        let ends = (!ends.is_empty() && !ends.iter().any(|id| eos.contains(id))).then_some(ends);
        if begins.is_some() || ends.is_some() {
            bos = begins.or(bos);
            eos = ends.unwrap_or(eos);
            note!("texts begin with {bos:?} and end with {eos:?}, as {} has it", path.display());
        }
        // A tokenizer.json alone has no template to offer in the place of the model's.
        if let (None, Some(template)) =
            (given.chat_template(), files.as_ref().and_then(TokenizerFiles::chat_template))
        {
            given.set_chat_template(template);
        }
        files = Some(given);
    }
    if let Some(path) = &args.chat_template {
        let template = std::fs::read_to_string(path)
            .with_context(|| format!("{}: cannot read the chat template", path.display()))?;
        ChatTemplate::new(&template).with_context(|| path.display().to_string())?;
        match &mut files {
            Some(files) => files.set_chat_template(&template),
            None => bail!(
                "{} has no tokenizer that a chat template could go with; name one with --tokenizer",
                file.path().display()
            ),
        }
    } else if let Some(stored) = file.as_gguf().and_then(|gguf| gguf.get(CHAT_TEMPLATE)?.as_str())
        && is_placeholder_template(stored)
    {
        note!(
            "{}: the chat template is a placeholder of the converter that wrote the file; \
             replaced by that of BitNet b1.58 2B4T",
            file.path().display()
        );
    }
    Ok(match files {
        Some(files) => file.with_tokenizer(files, bos, eos)?,
        None => file,
    })
}

/// The name that `--type` has for a target.
fn target_name(target: Target) -> &'static str {
    match target {
        Target::HfPacked => "hf-packed",
        Target::Hf(_) => "hf",
        Target::Gguf(options) => match options.ternary {
            TernaryType::I2S => "i2_s",
            TernaryType::Tq1_0 => "tq1_0",
            TernaryType::Tq2_0 => "tq2_0",
            TernaryType::Trn2 => "trn2",
        },
    }
}

/// The target that the options and the name of the output ask for.
fn target(args: &Args, file: &ModelFile) -> anyhow::Result<Target> {
    let is_gguf = args.to.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let is_hf = matches!(args.kind, Some(Kind::Hf | Kind::HfPacked));
    if is_hf && is_gguf {
        bail!("--type hf and hf-packed write a directory, not {}", args.to.display());
    }
    if is_hf && args.embed.is_some() {
        bail!("--embed is for GGUF files; --dtype chooses the numbers of --type hf");
    }
    if args.dtype.is_some() && !matches!(args.kind, Some(Kind::Hf)) {
        bail!("--dtype is for --type hf; --embed chooses the numbers of a GGUF file");
    }
    let ternary = match args.kind {
        Some(Kind::HfPacked) => return Ok(Target::HfPacked),
        Some(Kind::Hf) => {
            return Ok(Target::Hf(match args.dtype {
                None => master_dtype(file)?,
                Some(MasterType::F32) => Dtype::F32,
                Some(MasterType::Bf16) => Dtype::BF16,
            }));
        }
        Some(Kind::I2S) => TernaryType::I2S,
        Some(Kind::Tq1_0) => TernaryType::Tq1_0,
        Some(Kind::Tq2_0) => TernaryType::Tq2_0,
        Some(Kind::Trn2) => TernaryType::Trn2,
        None if is_gguf => {
            let chosen = TernaryType::exact_for(file.config());
            if chosen == TernaryType::Trn2 {
                note!("i2_s cannot hold the shapes of this model: writing trn2, for Trine only");
            }
            chosen
        }
        None => bail!(
            "cannot tell the format of {}: expected a name ending in .gguf, or --type",
            args.to.display()
        ),
    };
    let embedding = match args.embed {
        None => embedding_dtype(file)?,
        Some(embed) => embed.dtype(),
    };
    Ok(Target::Gguf(WriteOptions { ternary, embedding }))
}
