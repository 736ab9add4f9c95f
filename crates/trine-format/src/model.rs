//! An opened model, of whatever format it is.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use trine_ternary::TernaryMatrix;

use crate::error::BoxError;
use crate::gguf::i2_s::Order;
use crate::gguf::{self, Gguf};
use crate::hf::read::{self, HfDir};
use crate::{
    DenseTensor, FormatError, ModelConfig, Projection, TensorSource, TensorSummary, TokenizerFiles,
    Weight, names,
};

/// The formats a model can be opened in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A directory with `config.json` and `model.safetensors`.
    HuggingFace,
    /// A GGUF v3 file.
    Gguf,
    /// A file of another program, which another crate reads.
    Imported,
}

impl Format {
    /// A name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::HuggingFace => "Hugging Face directory",
            Self::Gguf => "GGUF v3",
            Self::Imported => "imported",
        }
    }
}

/// A model on disk, memory-mapped.
///
/// Opening checks the structure of the whole model; only the values of tensors are left to be
/// checked when they are read.
pub struct ModelFile {
    path: PathBuf,
    config: ModelConfig,
    tokenizer: Option<TokenizerFiles>,
    storage: Storage,
}

enum Storage {
    HuggingFace(HfDir),
    /// The order of the I2_S tensors is found when it is first asked for.
    Gguf(Gguf, OnceLock<Order>),
    Imported(Box<dyn TensorSource + Send>),
}

impl ModelFile {
    /// A model that somebody else reads, as if it were a file of a format known here. It has no
    /// tokenizer.
    pub fn imported(
        path: &Path,
        config: ModelConfig,
        source: Box<dyn TensorSource + Send>,
    ) -> Self {
        Self { path: path.to_owned(), config, tokenizer: None, storage: Storage::Imported(source) }
    }

    /// Opens a directory as Hugging Face's, anything else as a GGUF file.
    ///
    /// # Errors
    /// A [`FormatError`] naming the file and the part of it that is missing, damaged or not
    /// supported.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let (config, tokenizer, storage) = if path.is_dir() {
            let (config, tokenizer, dir) = read::open(path)?;
            (config, tokenizer, Storage::HuggingFace(dir))
        } else {
            let file = Gguf::open(path)?;
            let config = gguf::model::config(&file)?;
            (config, gguf::decode_tokenizer(&file)?, Storage::Gguf(file, OnceLock::new()))
        };
        Ok(Self { path: path.to_owned(), config, tokenizer, storage })
    }

    /// Opens a Hugging Face directory with `config_json` in the place of its `config.json`: of a
    /// model that is stored like one of those that are known here, by somebody who knows what it is.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_as(dir: &Path, config_json: &str) -> Result<Self, FormatError> {
        let (config, tokenizer, files) = read::open_as(dir, config_json)?;
        let storage = Storage::HuggingFace(files);
        Ok(Self { path: dir.to_owned(), config, tokenizer, storage })
    }

    /// The file or directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the model looks like.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The tokenizer's files, when the model has some.
    pub fn tokenizer(&self) -> Option<&TokenizerFiles> {
        self.tokenizer.as_ref()
    }

    /// The same model with another tokenizer, and the ids that begin and end a text with it.
    ///
    /// # Errors
    /// [`FormatError::Key`] for an id that the model has no embedding for.
    pub fn with_tokenizer(
        self,
        tokenizer: TokenizerFiles,
        bos_token_id: Option<u32>,
        eos_token_ids: Vec<u32>,
    ) -> Result<Self, FormatError> {
        let config = ModelConfig { bos_token_id, eos_token_ids, ..self.config };
        config.validate().map_err(|e| e.in_file(&self.path))?;
        Ok(Self { tokenizer: Some(tokenizer), config, ..self })
    }

    /// The format it is in.
    pub fn format(&self) -> Format {
        match self.storage {
            Storage::HuggingFace(_) => Format::HuggingFace,
            Storage::Gguf(..) => Format::Gguf,
            Storage::Imported(_) => Format::Imported,
        }
    }

    /// The GGUF container, for its metadata, when it is one.
    pub fn as_gguf(&self) -> Option<&Gguf> {
        match &self.storage {
            Storage::Gguf(gguf, _) => Some(gguf),
            Storage::HuggingFace(_) | Storage::Imported(_) => None,
        }
    }

    /// The order of the I2_S tensors of a GGUF file that has some. It is not in the file: that of
    /// x86 is taken, unless the shapes or the weights, of which this reads a sample, show that it is
    /// another.
    pub fn i2_s_order(&self) -> Option<Order> {
        match &self.storage {
            Storage::Gguf(file, order) => {
                let order = || self.recognized(file, order);
                gguf::model::has_i2_s(file).then(order)
            }
            Storage::HuggingFace(_) | Storage::Imported(_) => None,
        }
    }

    fn recognized(&self, file: &Gguf, order: &OnceLock<Order>) -> Order {
        *order.get_or_init(|| gguf::model::i2_s_order(file, &self.config))
    }

    /// Reads I2_S tensors in the order that the caller knows them to have.
    pub fn set_i2_s_order(&mut self, to: Order) {
        if let Storage::Gguf(_, order) = &mut self.storage {
            *order = to.into();
        }
    }

    /// A tensor of plain numbers by its canonical name; also the master weights of a projection.
    ///
    /// # Errors
    /// [`FormatError::Tensor`] when there is none, or it is not of the configuration's shape.
    pub fn dense(&self, name: &str) -> Result<DenseTensor<'_>, FormatError> {
        match &self.storage {
            Storage::HuggingFace(dir) => dir.dense(&self.config, name),
            Storage::Gguf(file, _) => gguf::model::dense(file, &self.config, name),
            Storage::Imported(source) => {
                source.dense(name).map_err(FormatError::source(&self.path, name))
            }
        }
    }

    /// A projection as it is computed with: trits as stored, or the trits that the definition gives
    /// for the masters as stored, or plain numbers where nothing is quantized.
    ///
    /// # Errors
    /// [`FormatError::Tensor`] when there is none, [`FormatError::Codec`] when its bytes are no
    /// trits or its masters are not finite.
    pub fn projection(&self, layer: usize, p: Projection) -> Result<Weight<'_>, FormatError> {
        match &self.storage {
            Storage::HuggingFace(dir) => dir.projection(&self.config, layer, p),
            Storage::Gguf(file, order) => {
                let order = || self.recognized(file, order);
                gguf::model::projection(file, order, &self.config, layer, p)
            }
            Storage::Imported(source) => {
                let name = names::projection(layer, p);
                let matrix = source.projection(layer, p);
                matrix.map(Weight::Ternary).map_err(FormatError::source(&self.path, &name))
            }
        }
    }

    /// Gives the memory of a tensor back, by its canonical name: it is read from the file again when
    /// asked for. Whoever passes once over a large model keeps one tensor in memory so.
    pub fn release(&self, name: &str) {
        match &self.storage {
            Storage::Imported(source) => source.release(name),
            Storage::HuggingFace(_) | Storage::Gguf(..) => self.release_part(name, 0..usize::MAX),
        }
    }

    /// As [`Self::release`], of some bytes of a tensor: whoever copies a large one need not have all of it
    /// in memory beside the copy.
    pub fn release_part(&self, name: &str, bytes: Range<usize>) {
        match &self.storage {
            Storage::HuggingFace(dir) => dir.release(name, bytes),
            Storage::Gguf(file, _) => {
                if let Some(info) = names::to_gguf(name).and_then(|name| file.tensor(&name)) {
                    file.release(info, bytes);
                }
            }
            Storage::Imported(_) => {}
        }
    }

    /// Gives the memory of everything back, as [`Self::release`] does. The system maps pages around
    /// those that are read, also of tensors that were released before, so this is worth something even
    /// where each was.
    pub fn release_all(&self) {
        match &self.storage {
            Storage::HuggingFace(dir) => dir.release_all(),
            Storage::Gguf(file, _) => file.release_all(),
            Storage::Imported(_) => {}
        }
    }

    /// Every tensor as the file holds it, in the file's order; of an imported model what its reader
    /// tells.
    pub fn tensors(&self) -> Vec<TensorSummary> {
        match &self.storage {
            Storage::HuggingFace(dir) => dir.tensors(),
            Storage::Gguf(file, _) => gguf::model::summaries(file),
            Storage::Imported(source) => source.tensors(),
        }
    }
}

impl TensorSource for ModelFile {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        Ok(self.dense(name)?)
    }

    fn projection(&self, layer: usize, p: Projection) -> Result<TernaryMatrix, BoxError> {
        match self.projection(layer, p)? {
            Weight::Ternary(matrix) => Ok(matrix),
            Weight::Dense(_) => Err("the model is not quantized, so it has no trits".into()),
        }
    }

    fn tensors(&self) -> Vec<TensorSummary> {
        self.tensors()
    }

    fn release(&self, name: &str) {
        self.release(name);
    }
}
