//! What a run learns from a teacher: see [`crate::config::DistillConfig`].
//!
//! The teacher is read when it is first asked: where everything it would say is in the cache, it never is.

use std::path::PathBuf;

use trine_data::Batch;
use trine_format::Quantization;

use crate::fused::{
    Distillation, Divergences, Engine, Likeliest, Options, Precision, Says, Teacher,
};
use crate::optimizer::Gradients;
use crate::quantizers::stored;
use crate::teacher_cache::{Key, TeacherCache};
use crate::{Bitnet, TrainError};

/// A teacher, and what counts of what it says.
pub(crate) struct Teaching {
    options: Distillation,
    /// Where the teacher is, and how it computes.
    path: PathBuf,
    precision: Precision,
    teacher: Option<Teacher>,
    cache: Option<TeacherCache>,
}

impl Teaching {
    pub(crate) fn new(
        options: Distillation,
        path: PathBuf,
        precision: Precision,
        cache: Option<TeacherCache>,
    ) -> Self {
        Self { options, path, precision, teacher: None, cache }
    }

    /// The mean cross entropy of a batch in nats, how far the student is from the teacher, and the gradients
    /// of the sum of the tokens' losses times `weight`.
    pub(crate) fn gradients(
        &mut self,
        engine: &mut Engine,
        student: &Bitnet,
        batch: &Batch,
        weight: f32,
    ) -> Result<(f32, Divergences, Gradients), TrainError> {
        let options = self.options;
        if self.cache.is_some() {
            let known = self.likeliest(batch)?;
            let says = Says::Likeliest(&known);
            return Ok(engine.distilled_gradients(student, says, options, batch, weight)?);
        }
        let says = Says::Teacher(self.teacher()?);
        Ok(engine.distilled_gradients(student, says, options, batch, weight)?)
    }

    fn teacher(&mut self) -> Result<&mut Teacher, TrainError> {
        if self.teacher.is_none() {
            let model = Bitnet::frozen(&stored::open(&self.path)?)?;
            let ternary = model.config().quantization != Quantization::None;
            let options = Options { precision: self.precision, recompute: false };
            self.teacher = Some(Teacher::new(model, Engine::new(options, ternary)));
        }
        Ok(self.teacher.as_mut().expect("opened above"))
    }

    /// What the teacher says of a batch, of the cache, into which goes what is not there.
    fn likeliest(&mut self, batch: &Batch) -> Result<Likeliest, TrainError> {
        let sequences: Vec<Batch> = (0..batch.batch).map(|i| part(batch, &[i])).collect();
        let keys: Vec<Key> = sequences.iter().map(Key::of).collect();
        let cache = self.cache.as_mut().expect("asked for where there is one");
        let count = cache.count();
        let mut known = Vec::with_capacity(keys.len());
        for (key, sequence) in keys.iter().zip(&sequences) {
            known.push(match sequence.learned() {
                0 => Some(Likeliest::new(count)),
                rows => cache.read(*key, rows)?,
            });
        }
        let missing: Vec<usize> = (0..known.len()).filter(|i| known[*i].is_none()).collect();
        if !missing.is_empty() {
            let temperature = self.options.temperature;
            let said = self.teacher()?.likeliest(&part(batch, &missing), temperature, count)?;
            let cache = self.cache.as_mut().expect("asked for where there is one");
            let mut at = 0;
            for i in missing {
                let rows = at..at + sequences[i].learned();
                at = rows.end;
                let mut of_sequence = Likeliest::new(count);
                of_sequence.extend(&said, rows);
                known[i] = Some(cache.write(keys[i], &of_sequence)?);
            }
        }
        let mut all = Likeliest::new(count);
        for known in known.iter().flatten() {
            all.extend(known, 0..known.rows());
        }
        Ok(all)
    }
}

/// Some sequences of a batch.
fn part(batch: &Batch, sequences: &[usize]) -> Batch {
    let of = |ids: &[u32]| {
        sequences.iter().flat_map(|i| &ids[i * batch.seq_len..][..batch.seq_len]).copied().collect()
    };
    Batch {
        inputs: of(&batch.inputs),
        targets: of(&batch.targets),
        starts: batch.starts.as_deref().map(of),
        batch: sequences.len(),
        seq_len: batch.seq_len,
    }
}
