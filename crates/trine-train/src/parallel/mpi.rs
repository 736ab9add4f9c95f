//! Processes that `mpirun` or Slurm started as a [`Group`], by the MPI of the system.
//!
//! An error of MPI itself ends all processes, as is MPI's default; so does a panic of one of them. Another
//! error of one process is for whoever runs it to tell, and to end the others with [`Mpi::abort`]: they wait
//! for it otherwise.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use super::cores::allowed_cores;
use super::{Group, GroupError};

/// How often a sum is asked for that is soon there, and how long it is left alone between later questions. MPI
/// gets on while it is asked only, but whoever asks all the time takes a core from those who compute.
const ASKS_AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_micros(50);

/// Most numbers that are summed at once: MPI counts them in 32 bits.
const AT_ONCE: usize = 1 << 26;

/// Environment variables of which a launcher sets at least one: Open MPI's, PMIx (Slurm's, Open MPI's), PMI
/// (Slurm's, MPICH's, Intel's).
const LAUNCHED: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE"];

/// All processes that were started together.
pub struct Mpi {
    rank: usize,
    size: usize,
    /// MPI is called by one thread at a time. Sums come out here.
    buffer: Mutex<Vec<f32>>,
    /// MPI's end: at last, after all else.
    _universe: Universe,
}

impl Mpi {
    /// Whether this process was started by a launcher of MPI programs.
    pub fn is_launched() -> bool {
        LAUNCHED.iter().any(|name| std::env::var_os(name).is_some())
    }

    /// Begins MPI; once in a process.
    ///
    /// # Errors
    /// An MPI without threads, and a second beginning.
    pub fn begin() -> Result<Self, GroupError> {
        let error = |message: &str| GroupError { rank: 0, size: 1, message: message.to_owned() };
        let (universe, threading) = mpi::initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| error("MPI has begun already"))?;
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        if threading < Threading::Serialized {
            let message = "the MPI library does not let several threads call it in turn".to_owned();
            return Err(GroupError { rank, size, message });
        }
        Ok(Self { rank, size, buffer: Mutex::default(), _universe: universe })
    }

    /// Ends all processes, because this one cannot go on.
    pub fn abort(&self, status: i32) -> ! {
        SimpleCommunicator::world().abort(status)
    }

    /// How many threads this process should have for every core to have one: its share of the cores that it
    /// may run on, which it may have to itself or not. Collective.
    pub fn share_of_cores(&self) -> usize {
        let usable = thread::available_parallelism().map_or(1, |n| n.get());
        let here = SimpleCommunicator::world().split_shared(0);
        let cores = allowed_cores().unwrap_or_else(|| (0..usable).collect());
        // As many numbers as the highest core of any process here needs.
        let mut sharing = vec![0.0; cores.iter().max().map_or(1, |highest| highest + 1)];
        let mut length = 0u64;
        here.all_reduce_into(&(sharing.len() as u64), &mut length, SystemOperation::max());
        sharing.resize(length as usize, 0.0);
        cores.iter().for_each(|core| sharing[*core] = 1.0);
        let mut sum = vec![0f64; sharing.len()];
        here.all_reduce_into(&sharing, &mut sum, SystemOperation::sum());
        let share: f64 = cores.iter().map(|core| 1.0 / sum[*core]).sum();
        // A limit of a container's may be lower than the number of cores.
        let limit = usable as f64 / cores.len().max(1) as f64;
        ((share * limit.min(1.0) + 1e-6) as usize).max(1)
    }
}

impl Group for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, numbers: &mut [f32]) -> Result<(), GroupError> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        for part in numbers.chunks_mut(AT_ONCE) {
            buffer.clear();
            buffer.extend_from_slice(part);
            let (world, sum) = (SimpleCommunicator::world(), SystemOperation::sum());
            mpi::request::scope(|scope| {
                let mut request = world.immediate_all_reduce_into(scope, &buffer[..], part, sum);
                let mut asked = 0;
                while let Err(open) = request.test() {
                    request = open;
                    asked += 1;
                    if asked < ASKS_AT_ONCE { thread::yield_now() } else { thread::sleep(PAUSE) }
                }
            });
        }
        Ok(())
    }

    fn sum_f64(&self, numbers: &mut [f64]) -> Result<(), GroupError> {
        let _turn = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let own = numbers.to_vec();
        SimpleCommunicator::world().all_reduce_into(&own[..], numbers, SystemOperation::sum());
        Ok(())
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<(), GroupError> {
        let _turn = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        SimpleCommunicator::world().process_at_rank(0).broadcast_into(bytes);
        Ok(())
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        // The others wait for this process, and MPI's end would wait for them.
        if thread::panicking() && self.size > 1 {
            self.abort(101);
        }
    }
}
