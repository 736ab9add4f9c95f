//! The processes that train one run: this one alone, or those that `mpirun` or Slurm started.
//!
//! The first process says what there is to say, and writes. An error of any ends all.

use std::process::ExitCode;
use std::sync::Arc;

use trine_train::parallel::Group;

/// Lets `work` train, together with the other processes that were started with this one, if any were.
///
/// # Errors
/// What `work` returns, of a process that is alone; among several it ends them all.
pub(crate) fn together(
    work: impl FnOnce(&Arc<dyn Group>) -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    launched::together(work)
}

/// Lets the first process do what leaves something on the disk; then the others, who find it there.
///
/// # Errors
/// What `work` returns, and a process that is gone.
pub(crate) fn in_turn<T>(
    group: &dyn Group,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    if !group.leads() {
        group.barrier()?;
    }
    let made = work()?;
    if group.leads() {
        group.barrier()?;
    }
    Ok(made)
}

#[cfg(feature = "mpi")]
mod launched {
    use std::time::Duration;

    use trine_train::parallel::{Alone, Mpi};

    use super::*;
    use crate::output::{self, note};

    /// How long a process other than the first keeps an error to itself: if the first has the same one, it
    /// is told once.
    const FIRST_SPEAKS: Duration = Duration::from_secs(2);

    pub(super) fn together(
        work: impl FnOnce(&Arc<dyn Group>) -> anyhow::Result<ExitCode>,
    ) -> anyhow::Result<ExitCode> {
        if !Mpi::is_launched() {
            return work(&(Arc::new(Alone) as Arc<dyn Group>));
        }
        let mpi = Arc::new(Mpi::begin()?);
        let threads = mpi.share_of_cores();
        if mpi.size() > 1 && std::env::var_os("RAYON_NUM_THREADS").is_none() {
            // Fails where threads are there already, which is then how many there are.
            let _settled = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        }
        let group: Arc<dyn Group> = mpi.clone();
        let done = work(&group);
        let Err(error) = &done else { return done };
        if mpi.size() == 1 {
            return done;
        }
        if !mpi.leads() {
            std::thread::sleep(FIRST_SPEAKS);
        }
        let (rank, size) = (mpi.rank(), mpi.size());
        let process =
            if mpi.leads() { String::new() } else { format!("process {rank} of {size}: ") };
        note!("error: {process}{}", output::one_line(error));
        mpi.abort(1)
    }
}

#[cfg(not(feature = "mpi"))]
mod launched {
    use anyhow::bail;
    use trine_train::parallel::Alone;

    use super::*;

    /// Where launchers say how many processes they started: Open MPI's; MPICH's, Intel's and Slurm's.
    const SIZES: [&str; 2] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"];

    pub(super) fn together(
        work: impl FnOnce(&Arc<dyn Group>) -> anyhow::Result<ExitCode>,
    ) -> anyhow::Result<ExitCode> {
        let size = |name| std::env::var(name).ok()?.parse::<usize>().ok();
        if let Some(size) = SIZES.into_iter().find_map(size).filter(|size| *size > 1) {
            bail!(
                "{size} processes were started together, but this program was built without MPI: build it \
                 with --features mpi"
            );
        }
        work(&(Arc::new(Alone) as Arc<dyn Group>))
    }
}
