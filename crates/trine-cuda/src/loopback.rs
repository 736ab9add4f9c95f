//! The processes, or threads, of one machine whose emulators add up numbers among themselves.
//!
//! Sums are made when they are waited for, which is as late as a card may make them; their numbers are taken
//! when they are asked for, which is as early. In between there are NaNs in their place: who reads them too
//! early goes on with NaN, and who writes is told. All numbers go to the first process and back, over TCP; they
//! are added in the order of ranks.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use crate::backend::{Address, Meeting};
use crate::error::{CudaError, Result};

/// What is in the place of numbers that are on their way: a signalling NaN, which is another one after any
/// computation.
const AWAY: u32 = 0x7f85_a5a5;

/// A place where processes meet.
pub(crate) struct Place(TcpListener);

impl Place {
    /// A new one.
    ///
    /// # Errors
    /// A machine without a loopback interface.
    pub(crate) fn open() -> Result<Self> {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map(Self).map_err(failed)
    }

    /// What the others are told of it: its address, then zeros.
    ///
    /// # Errors
    /// When the system fails.
    pub(crate) fn meeting(&self) -> Result<Meeting> {
        let address = self.0.local_addr().map_err(failed)?.to_string();
        let mut meeting = [0; size_of::<Meeting>()];
        meeting[..address.len()].copy_from_slice(address.as_bytes());
        Ok(meeting)
    }
}

/// The other processes.
pub(crate) struct Others {
    /// To the others, by rank, or to the first one.
    streams: Vec<TcpStream>,
    leads: bool,
    /// Where numbers were, and these.
    on_their_way: Vec<(Address, Vec<f32>)>,
}

impl Others {
    /// Meets them: this is process `rank` of `size`. `own` is the place that the first one told of.
    ///
    /// # Errors
    /// A process that does not come, or is of another machine.
    pub(crate) fn meet(
        meeting: &Meeting,
        own: Option<Place>,
        rank: usize,
        size: usize,
    ) -> Result<Self> {
        let leads = rank == 0;
        let streams = match own {
            Some(place) if leads => accept(&place, size),
            _ => connect(meeting, rank).map(|stream| vec![stream]),
        };
        Ok(Self { streams: streams.map_err(failed)?, leads, on_their_way: Vec::new() })
    }

    /// Begins to add up numbers over all processes, in place.
    pub(crate) fn sum(&mut self, at: Address, count: usize) {
        let numbers = numbers_at(at, count);
        self.on_their_way.push((at, numbers.to_vec()));
        numbers.fill(f32::from_bits(AWAY));
    }

    /// Makes the sums.
    ///
    /// # Errors
    /// A process that is gone or has asked for other sums, and numbers that were written in the meantime.
    pub(crate) fn join(&mut self) -> Result<()> {
        let sums = std::mem::take(&mut self.on_their_way);
        let counts: Vec<u64> = sums.iter().map(|(_, numbers)| numbers.len() as u64).collect();
        self.agree(&counts).map_err(failed)?;
        for (at, mut numbers) in sums {
            let place = numbers_at(at, numbers.len());
            if place.iter().any(|x| x.to_bits() != AWAY) {
                return Err(failed(io::Error::other("numbers were written while they are summed")));
            }
            self.exchange(&mut numbers).map_err(failed)?;
            place.copy_from_slice(&numbers);
        }
        Ok(())
    }

    /// Makes sure that all have asked for the same sums.
    fn agree(&mut self, counts: &[u64]) -> io::Result<()> {
        if !self.leads {
            self.streams[0].write_all(&(counts.len() as u64).to_le_bytes())?;
            return self.streams[0].write_all(bytemuck::cast_slice(counts));
        }
        for (stream, rank) in self.streams.iter_mut().zip(1..) {
            let mut theirs = vec![0u64; read_u64(stream)?.min(1 << 20) as usize];
            stream.read_exact(bytemuck::cast_slice_mut(&mut theirs))?;
            if theirs != counts {
                let message = format!("of {theirs:?} numbers by process {rank}, not of {counts:?}");
                return Err(io::Error::other(message));
            }
        }
        Ok(())
    }

    /// Makes one sum.
    fn exchange(&mut self, numbers: &mut [f32]) -> io::Result<()> {
        if !self.leads {
            self.streams[0].write_all(bytemuck::cast_slice(numbers))?;
            return self.streams[0].read_exact(bytemuck::cast_slice_mut(numbers));
        }
        let mut theirs = vec![0f32; numbers.len()];
        for stream in &mut self.streams {
            stream.read_exact(bytemuck::cast_slice_mut(&mut theirs))?;
            numbers.iter_mut().zip(&theirs).for_each(|(sum, x)| *sum += x);
        }
        self.streams
            .iter_mut()
            .try_for_each(|stream| stream.write_all(bytemuck::cast_slice(numbers)))
    }
}

/// Lets the others come, each of which says its rank.
fn accept(place: &Place, size: usize) -> io::Result<Vec<TcpStream>> {
    let mut streams: Vec<_> = (1..size).map(|_| None).collect();
    while streams.iter().any(Option::is_none) {
        let (mut stream, _) = place.0.accept()?;
        stream.set_nodelay(true)?;
        let rank = read_u64(&mut stream)?;
        let free = streams.get_mut((rank as usize).wrapping_sub(1)).filter(|s| s.is_none());
        let free =
            free.ok_or_else(|| io::Error::other(format!("process {rank} is one too many")))?;
        *free = Some(stream);
    }
    Ok(streams.into_iter().flatten().collect())
}

fn connect(meeting: &Meeting, rank: usize) -> io::Result<TcpStream> {
    let address = String::from_utf8_lossy(meeting);
    let address: SocketAddr = address.trim_end_matches('\0').parse().map_err(io::Error::other)?;
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.write_all(&(rank as u64).to_le_bytes())?;
    Ok(stream)
}

fn read_u64(stream: &mut TcpStream) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Numbers of an emulator's memory.
fn numbers_at<'a>(at: Address, count: usize) -> &'a mut [f32] {
    // SAFETY: callers stay within memory that was allocated, which nobody else looks at meanwhile.
    unsafe { std::slice::from_raw_parts_mut(at as *mut f32, count) }
}

fn failed(e: io::Error) -> CudaError {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let message = match e.kind() {
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => {
            "another process has ended".to_owned()
        }
        _ => e.to_string(),
    };
    CudaError::Call { what: "sums over emulators".to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `size` processes meet and do something; returns what they return, by rank.
    fn all<T: Send>(size: usize, work: impl Fn(usize, Others) -> T + Sync) -> Vec<T> {
        let place = Place::open().unwrap();
        let meeting = place.meeting().unwrap();
        std::thread::scope(|scope| {
            let mut place = Some(place);
            let work = &work;
            let one = |rank| {
                let place = place.take();
                scope.spawn(move || work(rank, Others::meet(&meeting, place, rank, size).unwrap()))
            };
            let members: Vec<_> = (0..size).map(one).collect();
            members.into_iter().map(|member| member.join().unwrap()).collect()
        })
    }

    fn sum(others: &mut Others, numbers: &mut [f32]) {
        others.sum(numbers.as_mut_ptr() as Address, numbers.len());
    }

    #[test]
    fn sums_reach_everybody_and_are_nan_until_they_are_waited_for() {
        for size in [1, 2, 3] {
            let found = all(size, |rank, mut others| {
                let mut found = Vec::new();
                for round in 0..3 {
                    let mut numbers = [1e8, -1e8, 1.0].map(|x| x + (rank + round) as f32);
                    let (two, one) = numbers.split_at_mut(2);
                    sum(&mut others, one);
                    sum(&mut others, two);
                    assert!(numbers.iter().all(|x| x.is_nan()));
                    others.join().unwrap();
                    found.extend(numbers.map(f32::to_bits));
                }
                found
            });
            assert!(found.iter().all(|bits| *bits == found[0]), "{size}");
            let last = (0..size).map(|rank| 3.0 + rank as f32).sum::<f32>();
            assert_eq!(found[0].last(), Some(&last.to_bits()));
        }
    }

    #[test]
    fn whoever_writes_what_is_being_summed_is_told() {
        let errors = all(2, |rank, mut others| {
            let mut numbers = [1.0, 2.0];
            sum(&mut others, &mut numbers);
            if rank == 1 {
                numbers_at(others.on_their_way[0].0, 2)[1] = 3.0;
            }
            others.join().map_err(|e| e.to_string())
        });
        assert!(errors[0].as_ref().unwrap_err().contains("another process has ended"));
        assert!(errors[1].as_ref().unwrap_err().contains("written"));
    }

    #[test]
    fn processes_that_ask_for_other_sums_do_not_wait_for_each_other() {
        for counts in [[2, 3], [3, 2]] {
            let errors = all(2, |rank, mut others| {
                let mut numbers = [1.0; 3];
                sum(&mut others, &mut numbers[..counts[rank]]);
                others.join().map_err(|e| e.to_string())
            });
            let [first, second] = counts;
            let message = format!("of [{second}] numbers by process 1, not of [{first}]");
            assert!(errors[0].as_ref().unwrap_err().contains(&message));
            assert!(errors[1].as_ref().unwrap_err().contains("another process has ended"));
        }
    }
}
