//! The trained model that a run begins with.

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::Device;
use trine_format::peft::{self, Lora};
use trine_format::{ModelConfig, ModelFile, Projection, Quantization, TokenizerFiles, names};
use trine_tokenizer::{ChatTemplate, Tokenizer};

use crate::adapters::{Adapters, Dropout};
use crate::config::{FinetuneConfig, Method, Objective, require};
use crate::fused::{Distillation, Engine, Precision};
use crate::quantizers::stored;
use crate::teacher_cache::{Source, TeacherCache};
use crate::teaching::Teaching;
use crate::{Bitnet, Params, RunConfig, TrainError};

/// A model on disk, and what a run makes of it.
pub struct Base {
    path: PathBuf,
    config: ModelConfig,
    has_masters: bool,
    finetune: FinetuneConfig,
    tokenizer: TokenizerFiles,
    /// BLAKE3 of its weights.
    weights: blake3::Hash,
    /// Identifies what the run begins with.
    hash: String,
    /// Where the teacher is, unless it is the model itself.
    teacher: Option<PathBuf>,
    /// The adapter to begin with.
    adapter: Option<Lora>,
}

impl Base {
    /// Opens the model at `path`, which is where `finetune.base` of the configuration is found.
    ///
    /// # Errors
    /// A model that cannot be read, or has no tokenizer; a chat template that cannot be read; a
    /// configuration without `[finetune]`, or one that does not go with the model.
    pub fn open(path: &Path, run: &RunConfig) -> Result<Self, TrainError> {
        let Some(finetune) = run.finetune.clone() else {
            let expected = "the section, for a run that begins with a model";
            return Err(TrainError::ConfigValue {
                key: "finetune".to_owned(),
                expected: expected.to_owned(),
                found: "none".to_owned(),
            });
        };
        let file = open(path, finetune.method)?;
        let mut config = file.config().clone();
        let has_masters = config.quantization != Quantization::Offline;
        let seq_len = run.data.seq_len;
        let positions = config.max_position_embeddings;
        let most = format!("at most the {positions} positions of {}", path.display());
        require(seq_len <= positions, "data.seq_len", &most, seq_len)?;
        if finetune.ternarize {
            let full = config.quantization == Quantization::None;
            let expected = "false, as the model is ternary already";
            require(full, "finetune.ternarize", expected, true)?;
        }
        if finetune.add_sub_norms {
            let expected = "false, as the model has sub-norms already";
            require(!config.sub_norms, "finetune.add_sub_norms", expected, true)?;
            config.sub_norms = true;
        }
        if finetune.method == Method::Full {
            // Trits that were stored are trained as masters.
            config.quantization = match (config.quantization, finetune.ternarize) {
                (Quantization::None, false) => Quantization::None,
                _ => Quantization::Online,
            };
        }
        let Some(mut tokenizer) = file.tokenizer().cloned() else {
            let message = "has no tokenizer: expected tokenizer.json beside the weights or tokenizer \
                           keys inside the GGUF";
            let (path, message) = (path.to_owned(), message.to_owned());
            return Err(TrainError::Checkpoint { path, message });
        };
        if !finetune.chat_template.is_empty() {
            let path = PathBuf::from(&finetune.chat_template);
            let text = std::fs::read_to_string(&path)
                .map_err(|source| TrainError::Read { path: path.clone(), source })?;
            tokenizer.set_chat_template(&text);
        }
        let weights = hash(path)?;
        let hash = weights.to_hex().to_string();
        let path = path.to_owned();
        let (teacher, adapter) = (None, None);
        Ok(Self { path, config, has_masters, finetune, tokenizer, weights, hash, teacher, adapter })
    }

    /// With the adapter that `finetune.adapter` names, which is found at `path`.
    ///
    /// # Errors
    /// One that cannot be read, belongs to a model of other shapes, or is not what `[finetune.lora]` says.
    pub fn with_adapter(mut self, path: &Path) -> Result<Self, TrainError> {
        let lora = Lora::read(path, &self.config)?;
        let config = &self.finetune.lora;
        let targets = config.projections()?;
        let names = |targets: &[Projection]| {
            targets.iter().map(|p| names::module(*p)).collect::<Vec<_>>().join(", ")
        };
        for (key, of_adapter, of_config) in [
            ("rank", lora.rank.to_string(), config.rank.to_string()),
            ("alpha", lora.alpha.to_string(), config.alpha.to_string()),
            ("targets", names(&lora.targets), names(&targets)),
        ] {
            let expected = format!("{of_adapter}, as {} has it", path.display());
            let key = format!("finetune.lora.{key}");
            require(of_adapter == of_config, &key, &expected, of_config)?;
        }
        // Another adapter is another beginning.
        let of_adapter = hash(&path.join(peft::MATRICES))?.to_hex().to_string();
        let both = [self.hash.clone(), of_adapter];
        self.hash = blake3::hash(both.concat().as_bytes()).to_hex().to_string();
        self.adapter = Some(lora);
        Ok(self)
    }

    /// The adapters that the run begins with.
    fn adapters(&self, run: &RunConfig) -> Result<Adapters, TrainError> {
        if let Some(lora) = &self.adapter {
            return Adapters::from_lora(lora, &self.config);
        }
        let lora = &self.finetune.lora;
        Adapters::init(&self.config, lora.rank, lora.alpha, &lora.projections()?, run.seed)
    }

    /// With the teacher that `finetune.distill.teacher` names, which is found at `path`.
    ///
    /// # Errors
    /// One that cannot be read, or has another tokenizer or vocabulary.
    pub fn with_teacher(mut self, path: &Path) -> Result<Self, TrainError> {
        let file = stored::open(path)?;
        let ids = |text: &str| Tokenizer::from_json(text).map(|tokenizer| tokenizer.hash());
        let own = ids(&self.tokenizer.tokenizer_json)?;
        let same = match file.tokenizer() {
            // A GGUF keeps another spelling of the same; then the number of ids must do.
            Some(files) => {
                ids(&files.tokenizer_json)? == own || !path.is_dir() || !self.path.is_dir()
            }
            None => true,
        };
        if !same || file.config().vocab_size != self.config.vocab_size {
            let message = "a teacher has the tokenizer of its student, this one has another";
            return Err(TrainError::Checkpoint {
                path: path.to_owned(),
                message: message.to_owned(),
            });
        }
        self.teacher = Some(path.to_owned());
        Ok(self)
    }

    /// What the run learns from besides its data, if anything; the teacher computes in `precision`.
    ///
    /// # Errors
    /// A teacher that cannot be read, or is none that the engine computes; relations of layers or heads
    /// that there are not; a cache of another teacher.
    pub(crate) fn teaching(&self, precision: Precision) -> Result<Option<Teaching>, TrainError> {
        let Some(distill) = &self.finetune.distill else {
            return Ok(None);
        };
        let path = self.teacher.as_ref().unwrap_or(&self.path).clone();
        let config = stored::open(&path)?.config().clone();
        if config.projection_norm_eps.is_some() {
            let message = "has norms of projections, which no teacher may have".to_owned();
            return Err(TrainError::Checkpoint { path, message });
        }
        let relations = distill.relations.as_ref();
        let relations = relations.map(|r| r.resolved(&self.config, &config)).transpose()?;
        let options = Distillation {
            temperature: distill.temperature as f32,
            cross_entropy: distill.cross_entropy as f32,
            divergence: distill.divergence as f32,
            relations,
        };
        let mut cache = None;
        if !distill.cache.is_empty() {
            let (count, vocab) = (distill.top_k, config.vocab_size);
            let most = format!("at most the {vocab} ids of the vocabulary");
            require(count <= vocab, "finetune.distill.top_k", &most, count)?;
            let teacher = self.teacher.as_deref().map_or(Ok(self.weights), hash)?;
            let source = Source { count, vocab, temperature: options.temperature, teacher };
            cache = Some(TeacherCache::open(Path::new(&distill.cache), source)?);
        }
        Ok(Some(Teaching::new(options, path, precision, cache)))
    }

    /// The network of the model that will be in memory besides the one in training: a teacher, or what
    /// preferences are compared with.
    ///
    /// # Errors
    /// A teacher that cannot be read.
    pub fn beside(&self) -> Result<Option<ModelConfig>, TrainError> {
        let path = match (&self.finetune.distill, self.finetune.objective, self.finetune.method) {
            (Some(_), _, _) => self.teacher.as_ref().unwrap_or(&self.path),
            (None, Objective::Dpo, Method::Full) => &self.path,
            _ => return Ok(None),
        };
        Ok(Some(stored::open(path)?.config().clone()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The network that is trained.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether it has master weights. Those that are made of trits alone are all alike, and far from where
    /// a trit flips.
    pub fn has_masters(&self) -> bool {
        self.has_masters
    }

    /// BLAKE3 of what the run begins with, its weights and those of an adapter, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Its tokenizer's files, with the chat template of the run.
    pub fn tokenizer_files(&self) -> &TokenizerFiles {
        &self.tokenizer
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// One that cannot be used, or has ids for which the model has no embedding.
    pub fn tokenizer(&self) -> Result<Tokenizer, TrainError> {
        let tokenizer = Tokenizer::from_json(&self.tokenizer.tokenizer_json)?;
        let (ids, vocab_size) = (tokenizer.vocab_size(), self.config.vocab_size);
        if ids > vocab_size {
            let message = format!("the tokenizer has {ids} ids, the model {vocab_size} embeddings");
            return Err(TrainError::Checkpoint { path: self.path.clone(), message });
        }
        Ok(tokenizer)
    }

    /// The template that conversations are rendered with, if there is one.
    ///
    /// # Errors
    /// One that does not compile.
    pub fn template(&self) -> Result<Option<ChatTemplate>, TrainError> {
        let text = self.tokenizer.chat_template();
        let template = text.map(ChatTemplate::new).transpose();
        template.map_err(|e| {
            let origin = match self.finetune.chat_template.as_str() {
                "" => self.path.clone(),
                path => PathBuf::from(path),
            };
            TrainError::Checkpoint { path: origin, message: e.to_string() }
        })
    }

    /// The model as a run begins with it.
    ///
    /// # Errors
    /// A model that cannot be read, or that adapters cannot be trained for.
    pub(crate) fn model(&self, run: &RunConfig) -> Result<Bitnet, TrainError> {
        if self.finetune.method == Method::Full {
            let file = open(&self.path, self.finetune.method)?;
            let params = Params::load_masters(&file, &self.config, &Device::Cpu)?;
            return Bitnet::new(self.config.clone(), params);
        }
        let adapters = self.adapters(run)?;
        self.adapted(run, adapters.for_base(Some(self.finetune.base.clone())))
    }

    /// What preferences are compared with: the model as the run begins with it. None where that is `model`,
    /// the one in training, without its adapters; in its memory where only adapters are trained; otherwise
    /// beside it, packed where it is ternary.
    ///
    /// # Errors
    /// A model that cannot be read, or that cannot be computed so.
    pub(crate) fn reference(&self, model: &Bitnet) -> Result<Option<Bitnet>, TrainError> {
        if self.finetune.method == Method::Full {
            return self.packed().map(Some);
        }
        let adapter = self.adapter.as_ref();
        let adapters = adapter.map(|lora| Adapters::from_lora(lora, &self.config)).transpose()?;
        adapters.map(|adapters| model.beside(adapters)).transpose()
    }

    fn packed(&self) -> Result<Bitnet, TrainError> {
        let model = Bitnet::frozen(&open(&self.path, self.finetune.method)?)?;
        let is_ternary = |config: &ModelConfig| config.quantization != Quantization::None;
        if Engine::fits(&model) && is_ternary(model.config()) == is_ternary(&self.config) {
            return Ok(model);
        }
        let message = "cannot be compared with itself while it becomes another: preferences need a model \
                       without norms of projections that is what it will be";
        let (path, message) = (self.path.clone(), message.to_owned());
        Err(TrainError::Checkpoint { path, message })
    }

    /// The model with adapters.
    ///
    /// # Errors
    /// As [`Self::model`].
    pub(crate) fn adapted(
        &self,
        run: &RunConfig,
        adapters: Adapters,
    ) -> Result<Bitnet, TrainError> {
        let model = Bitnet::frozen(&open(&self.path, self.finetune.method)?)?;
        if !Engine::fits(&model) {
            let message = "has norms of projections, for which no adapters can be trained: \
                           train its masters with finetune.method = \"full\"";
            let (path, message) = (self.path.clone(), message.to_owned());
            return Err(TrainError::Checkpoint { path, message });
        }
        let dropout = Dropout { share: self.finetune.lora.dropout, seed: run.seed };
        Ok(model.with_adapters(adapters.with_dropout(dropout)))
    }
}

/// Opens a model: masters, to train these, of a checkpoint of any quantizer.
fn open(path: &Path, method: Method) -> Result<ModelFile, TrainError> {
    match method {
        Method::Full => stored::open_masters(path),
        Method::Lora => stored::open(path),
    }
}

/// BLAKE3 of the files that hold a model's weights.
fn hash(path: &Path) -> Result<blake3::Hash, TrainError> {
    let read = |path: &Path| {
        let path = path.to_owned();
        move |source| TrainError::Read { path, source }
    };
    let mut files = vec![path.to_owned()];
    if path.is_dir() {
        let entries = std::fs::read_dir(path).map_err(read(path))?;
        let entries: Result<Vec<_>, _> = entries.map(|entry| entry.map(|e| e.path())).collect();
        files = entries.map_err(read(path))?;
        // Of a checkpoint, without the state of its optimizer.
        let holds_weights = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("model") && name.ends_with(".safetensors")
        };
        files.retain(holds_weights);
        files.sort();
    }
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let opened = File::open(&file);
        opened.and_then(|f| hasher.update_reader(f).map(drop)).map_err(read(&file))?;
    }
    Ok(hasher.finalize())
}
