//! How a run is begun or taken up: alone, or by several processes together.

use std::path::Path;
use std::sync::Arc;

use trine_data::Mixture;

use super::Trainer;
use crate::base::Base;
use crate::parallel::{Alone, Group};
use crate::{RunConfig, TrainError};

/// Begins or takes up a run. Several processes do it together, all with the same configuration, data and
/// directory, and the methods of their trainers are collective: see [`crate::parallel`].
#[derive(Clone)]
pub struct TrainerBuilder {
    pub(super) group: Arc<dyn Group>,
}

impl Default for TrainerBuilder {
    fn default() -> Self {
        Self { group: Arc::new(Alone) }
    }
}

impl TrainerBuilder {
    /// Trains together with the other processes of a group.
    #[must_use]
    pub fn group(self, group: Arc<dyn Group>) -> Self {
        Self { group }
    }

    /// As [`Trainer::create`].
    ///
    /// # Errors
    /// As [`Trainer::create`]; a process of the group that is gone, and what several processes do not do.
    pub fn create(
        self,
        config: RunConfig,
        data: impl Into<Mixture>,
        run_dir: &Path,
    ) -> Result<Trainer, TrainError> {
        Trainer::begin(self, config, data.into(), None, run_dir)
    }

    /// As [`Trainer::finetune`].
    ///
    /// # Errors
    /// As [`Trainer::finetune`] and [`Self::create`].
    pub fn finetune(
        self,
        config: RunConfig,
        data: impl Into<Mixture>,
        base: Base,
        run_dir: &Path,
    ) -> Result<Trainer, TrainError> {
        Trainer::begin(self, config, data.into(), Some(base), run_dir)
    }

    /// As [`Trainer::resume`]. The group may have another size than the one that began the run.
    ///
    /// # Errors
    /// As [`Trainer::resume`] and [`Self::create`].
    pub fn resume(
        self,
        config: RunConfig,
        data: impl Into<Mixture>,
        run_dir: &Path,
    ) -> Result<Trainer, TrainError> {
        Trainer::take_up_from(self, config, data.into(), None, run_dir)
    }

    /// As [`Trainer::resume_finetune`].
    ///
    /// # Errors
    /// As [`Trainer::resume_finetune`] and [`Self::create`].
    pub fn resume_finetune(
        self,
        config: RunConfig,
        data: impl Into<Mixture>,
        base: Base,
        run_dir: &Path,
    ) -> Result<Trainer, TrainError> {
        Trainer::take_up_from(self, config, data.into(), Some(base), run_dir)
    }
}
