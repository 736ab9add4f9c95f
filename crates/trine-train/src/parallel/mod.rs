//! Several processes that train one run: data parallelism.
//!
//! Every process holds the whole model and optimizer. Of a step's batch, which stays the function of seed
//! and step that it is, each takes its [share] of the sequences; the gradients are summed over all
//! of them, and every process makes the same update. The loss is the mean over all learned tokens of all
//! processes, so a run computes what one process computes with the same batch, but for the order in which
//! floats are added.
//!
//! A [`Group`] is what the processes have in common: who they are, and sums over them. The trainer does not
//! know what is behind it:
//!
//! | group | processes |
//! | --- | --- |
//! | [`Alone`] | one, for which nothing has to be done |
//! | [`Threads`] | threads of one process |
//! | `Mpi` | those that `mpirun` or Slurm started, with the cargo feature `mpi` |
//!
//! What is done by all at once is collective: every process does it, in the same order, or the others wait.
//! The first process, of rank 0, alone writes to the run directory; all others only read there, so it must
//! be one that they see.

#[cfg(any(feature = "mpi", test))]
mod cores;
#[cfg(feature = "mpi")]
mod mpi;
mod sums;
mod threads;

use std::ops::Range;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub(crate) use sums::Sums;
pub use threads::Threads;

/// The processes that train one run, seen from one of them.
///
/// All but [`Self::rank`], [`Self::size`] and [`Self::leads`] are collective. They return the same bits to
/// every process. A method may be called by another thread than the last one, not by two at a time.
pub trait Group: Send + Sync {
    /// Which of them this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Adds up numbers over all processes, in place.
    ///
    /// # Errors
    /// When a process is gone, or has come with something else.
    fn sum(&self, numbers: &mut [f32]) -> Result<(), GroupError>;

    /// As [`Self::sum`].
    ///
    /// # Errors
    /// As [`Self::sum`].
    fn sum_f64(&self, numbers: &mut [f64]) -> Result<(), GroupError>;

    /// Gives every process the bytes of the first one, in place of its own, which are as many.
    ///
    /// # Errors
    /// As [`Self::sum`].
    fn broadcast(&self, bytes: &mut [u8]) -> Result<(), GroupError>;

    /// Waits until every process has come here.
    ///
    /// # Errors
    /// As [`Self::sum`].
    fn barrier(&self) -> Result<(), GroupError> {
        self.sum_f64(&mut [0.0])
    }

    /// Whether this is the process that writes.
    fn leads(&self) -> bool {
        self.rank() == 0
    }
}

/// Why processes cannot go on together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("process {rank} of {size}: {message}")]
pub struct GroupError {
    /// The process that noticed it, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// What is wrong.
    pub message: String,
}

/// A process that trains on its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Group for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _numbers: &mut [f32]) -> Result<(), GroupError> {
        Ok(())
    }

    fn sum_f64(&self, _numbers: &mut [f64]) -> Result<(), GroupError> {
        Ok(())
    }

    fn broadcast(&self, _bytes: &mut [u8]) -> Result<(), GroupError> {
        Ok(())
    }
}

/// Which of `n` things in a row are those of a process: as many for each as can be.
pub fn share(n: usize, rank: usize, size: usize) -> Range<usize> {
    let start = |rank: usize| (n as u128 * rank as u128 / size as u128) as usize;
    start(rank)..start(rank + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_of_it_and_as_even_as_can_be() {
        for (n, size) in [(8, 2), (7, 3), (2, 4), (0, 3), (5, 1)] {
            let shares: Vec<_> = (0..size).map(|rank| share(n, rank, size)).collect();
            let all: Vec<usize> = shares.iter().cloned().flatten().collect();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
            assert!(shares.iter().all(|s| s.len() == n / size || s.len() == n.div_ceil(size)));
        }
    }
}
