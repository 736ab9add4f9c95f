//! Generation: the loop from a text to the ids that continue it, as an iterator.

use std::iter::FusedIterator;
use std::time::Instant;

use trine_kernels::Largest;

use crate::speculative::{Draft, Drafter};
use crate::{Logits, RuntimeError, Sampler, Session};

/// What chooses the next id: a [`Sampler`], or any function of logits `(V,)` and text so far.
///
/// It is called once for each id, in order, with the same logits whether or not the session works
/// ahead; so it may have a state, such as a grammar's.
pub trait Choose {
    /// The next id.
    ///
    /// # Errors
    /// Those that are to end the generation.
    fn choose(&mut self, logits: &[f32], text: &[u32]) -> Result<u32, RuntimeError>;

    /// Which logits choices depend on, if not on all: any other may then be `-inf`. It is asked before a pass
    /// and holds for all of its logits.
    fn largest(&self) -> Option<Largest> {
        None
    }
}

impl Choose for Sampler {
    fn largest(&self) -> Option<Largest> {
        Sampler::largest(self)
    }

    fn choose(&mut self, logits: &[f32], text: &[u32]) -> Result<u32, RuntimeError> {
        self.sample(logits, text)
    }
}

impl<F: FnMut(&[f32], &[u32]) -> Result<u32, RuntimeError>> Choose for F {
    fn choose(&mut self, logits: &[f32], text: &[u32]) -> Result<u32, RuntimeError> {
        self(logits, text)
    }
}

/// When a generation ends, and whether it works ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratorConfig {
    /// Most ids to generate.
    pub max_tokens: usize,
    /// Ids that end the text; they are not part of it.
    pub stop: Vec<u32>,
    /// How many ids to guess ahead: the same ids, sooner.
    pub draft: Draft,
}

impl Default for GeneratorConfig {
    /// To the end of the context.
    fn default() -> Self {
        Self { max_tokens: usize::MAX, stop: Vec::new(), draft: Draft::default() }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop id was chosen.
    Stop,
    /// As many ids as were asked for.
    Length,
    /// The model has no positions left.
    Context,
}

/// What a generation took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GeneratorStats {
    /// Passes through the model after that over the prompt.
    pub passes: usize,
    /// Ids guessed ahead and sent along.
    pub drafted: usize,
    /// Those of them that were chosen.
    pub accepted: usize,
}

impl GeneratorStats {
    /// Generated ids that went through the model, in [`Self::passes`] instead of one by one.
    pub fn tokens(&self) -> usize {
        self.passes + self.accepted
    }
}

/// The ids that continue a text. See [`Session::generate`].
///
/// Once the iterator ends, or is dropped at any earlier id, the session has seen the text up to the
/// last id given out, with or without it.
pub struct Generator<'a, 'm, C: Choose = Sampler> {
    session: &'a mut Session<'m>,
    choose: &'a mut C,
    text: Vec<u32>,
    stop: Vec<u32>,
    /// Ids that may still be generated.
    left: usize,
    drafter: Drafter,
    /// Ids that went ahead in the last pass.
    draft: Vec<u32>,
    /// The row of the last pass's logits `(1 + draft, V)` that follows the text; `None` when none does.
    row: Option<usize>,
    ended: bool,
    finish: Option<Finish>,
    stats: GeneratorStats,
}

impl<'m> Session<'m> {
    /// Continues `text`, of which the session has seen a beginning (none when it is new): sends the
    /// rest of it through the model, and returns an iterator of the ids that follow.
    ///
    /// ```no_run
    /// use trine_runtime::{GeneratorConfig, Model, Sampler, SamplerConfig, Session};
    ///
    /// let model = Model::load(&trine_format::ModelFile::open("model.gguf".as_ref())?)?;
    /// let mut session = Session::new(&model);
    /// let mut sampler = Sampler::new(SamplerConfig { temperature: 0.7, ..Default::default() })?;
    /// let config = GeneratorConfig { max_tokens: 32, stop: vec![2], ..Default::default() };
    /// for id in session.generate(&[1, 306, 4658], &mut sampler, config)? {
    ///     println!("{}", id?);
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// To go on later, `text` is the old text, what was generated, and what comes new; to go on from
    /// another text with the same beginning, the session is first [truncated](Self::truncate) to it.
    ///
    /// # Errors
    /// Nothing in `text` that the session has not seen, an id outside the vocabulary, more than the
    /// context holds; the session is then as before.
    pub fn generate<'a, C: Choose>(
        &'a mut self,
        text: &[u32],
        choose: &'a mut C,
        config: GeneratorConfig,
    ) -> Result<Generator<'a, 'm, C>, RuntimeError> {
        let GeneratorConfig { max_tokens, stop, draft } = config;
        let new = text.get(self.position()..).unwrap_or_default();
        self.append(new, choose.largest().map_or(Logits::Last, Logits::Largest))?;
        let mut drafter = Drafter::new(draft);
        drafter.extend(text);
        Ok(Generator {
            session: self,
            choose,
            text: text.to_vec(),
            stop,
            left: max_tokens,
            drafter,
            draft: Vec::new(),
            row: Some(0),
            ended: max_tokens == 0,
            finish: (max_tokens == 0).then_some(Finish::Length),
            stats: GeneratorStats::default(),
        })
    }
}

impl<C: Choose> Generator<'_, '_, C> {
    /// The whole text so far: what it began with and all ids given out.
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    /// Why the iterator ended; `None` while it has not, and after an error.
    pub fn finish(&self) -> Option<Finish> {
        self.finish
    }

    /// What it took so far.
    pub fn stats(&self) -> GeneratorStats {
        self.stats
    }

    /// The next id; `None` when it is a stop id.
    fn step(&mut self) -> Result<Option<u32>, RuntimeError> {
        let row = match self.row {
            Some(row) => row,
            None => self.pass()?,
        };
        let logits = self.session.outputs();
        let vocab = logits.len() / (1 + self.draft.len());
        let id = self.choose.choose(&logits[row * vocab..][..vocab], &self.text)?;
        if self.stop.contains(&id) {
            return Ok(None);
        }
        self.text.push(id);
        self.drafter.push(id);
        self.left -= 1;
        self.row = (self.draft.get(row) == Some(&id)).then_some(row + 1);
        match self.row {
            Some(_) => self.stats.accepted += 1,
            None => self.session.truncate(self.text.len() - 1),
        }
        Ok(Some(id))
    }

    /// Sends the last id and what may follow it through the model; returns the row of its logits.
    fn pass(&mut self) -> Result<usize, RuntimeError> {
        // The last of these ids needs no position, and nothing is guessed beyond it.
        let room = self.session.limit().saturating_sub(self.session.position() + 1);
        self.draft = self.drafter.draft(room.min(self.left - 1));
        if let Some(stop) = self.draft.iter().position(|id| self.stop.contains(id)) {
            self.draft.truncate(stop);
        }
        let ids: Vec<u32> = self.text.last().into_iter().chain(&self.draft).copied().collect();
        // In a browser there is no clock: to ask for the time would be a panic.
        let clock = !cfg!(all(target_family = "wasm", target_os = "unknown"));
        let begin = clock.then(Instant::now);
        let logits = self.choose.largest().map_or(Logits::All, Logits::AllLargest);
        self.session.append(&ids, logits)?;
        if let Some(begin) = begin {
            self.drafter.timed(ids.len(), begin.elapsed());
        }
        self.stats.passes += 1;
        self.stats.drafted += self.draft.len();
        Ok(0)
    }

    fn end(&mut self, finish: Option<Finish>) {
        (self.ended, self.finish) = (true, finish);
    }
}

impl<C: Choose> Iterator for Generator<'_, '_, C> {
    type Item = Result<u32, RuntimeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        match self.step() {
            Ok(None) => {
                self.end(Some(Finish::Stop));
                None
            }
            Ok(Some(id)) => {
                // The session sees an id when the next one is asked for, so the last has no position.
                if self.text.len() > self.session.limit() {
                    self.end(Some(Finish::Context));
                } else if self.left == 0 {
                    self.end(Some(Finish::Length));
                }
                Some(Ok(id))
            }
            Err(error) => {
                self.end(None);
                Some(Err(error))
            }
        }
    }
}

impl<C: Choose> FusedIterator for Generator<'_, '_, C> {}

impl<C: Choose> Drop for Generator<'_, '_, C> {
    /// Forgets guesses that were not reached.
    fn drop(&mut self) {
        self.session.truncate(self.text.len());
    }
}
