//! Threads of one process as a [`Group`].

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::{Group, GroupError};

/// A member of a group of threads. A member that is dropped is gone: whoever waits for it is told so.
pub struct Threads {
    rank: usize,
    size: usize,
    shared: Arc<(Mutex<Rounds>, Condvar)>,
}

/// In a round every member brings a message, and takes those of all.
struct Rounds {
    /// Rounds that are over.
    over: u64,
    brought: Vec<Option<Message>>,
    /// The messages of the round that was over last, by rank.
    last: Arc<Vec<Message>>,
    /// The first member that was dropped.
    gone: Option<usize>,
}

#[derive(Clone)]
enum Message {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bytes(Vec<u8>),
}

impl Threads {
    /// A group of `size` members, by rank: one for each thread.
    pub fn group(size: usize) -> Vec<Self> {
        let brought = (0..size).map(|_| None).collect();
        let rounds = Rounds { over: 0, brought, last: Arc::default(), gone: None };
        let shared = Arc::new((Mutex::new(rounds), Condvar::new()));
        (0..size).map(|rank| Self { rank, size, shared: shared.clone() }).collect()
    }

    /// Brings a message and takes those of all members, by rank.
    fn exchange(&self, message: Message) -> Result<Arc<Vec<Message>>, GroupError> {
        let (rounds, changed) = &*self.shared;
        let mut rounds = rounds.lock().unwrap_or_else(PoisonError::into_inner);
        let round = rounds.over;
        rounds.brought[self.rank] = Some(message);
        if rounds.brought.iter().all(Option::is_some) {
            rounds.last = Arc::new(rounds.brought.iter_mut().filter_map(Option::take).collect());
            rounds.over += 1;
            changed.notify_all();
        }
        // The next round is not over before this member has brought its message to it.
        while rounds.over == round {
            if let Some(gone) = rounds.gone {
                return Err(self.error(format!("process {gone} has ended")));
            }
            rounds = changed.wait(rounds).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(rounds.last.clone())
    }

    fn error(&self, message: String) -> GroupError {
        GroupError { rank: self.rank, size: self.size, message }
    }

    /// Adds up, in the order of ranks, the numbers that `of` finds in messages.
    fn add<T: Copy + std::ops::AddAssign>(
        &self,
        numbers: &mut [T],
        messages: &[Message],
        of: impl Fn(&Message) -> Option<&[T]>,
    ) -> Result<(), GroupError> {
        for (rank, message) in messages.iter().enumerate() {
            let Some(theirs) = of(message).filter(|theirs| theirs.len() == numbers.len()) else {
                let message = format!("process {rank} came with something else to add up");
                return Err(self.error(message));
            };
            match rank {
                0 => numbers.copy_from_slice(theirs),
                _ => numbers.iter_mut().zip(theirs).for_each(|(sum, x)| *sum += *x),
            }
        }
        Ok(())
    }
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, numbers: &mut [f32]) -> Result<(), GroupError> {
        let messages = self.exchange(Message::F32(numbers.to_vec()))?;
        self.add(numbers, &messages, |message| match message {
            Message::F32(numbers) => Some(numbers),
            _ => None,
        })
    }

    fn sum_f64(&self, numbers: &mut [f64]) -> Result<(), GroupError> {
        let messages = self.exchange(Message::F64(numbers.to_vec()))?;
        self.add(numbers, &messages, |message| match message {
            Message::F64(numbers) => Some(numbers),
            _ => None,
        })
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<(), GroupError> {
        let messages = self.exchange(Message::Bytes(bytes.to_vec()))?;
        match messages.first() {
            Some(Message::Bytes(first)) if first.len() == bytes.len() => {
                bytes.copy_from_slice(first);
                Ok(())
            }
            _ => Err(self.error("process 0 came with something else to tell".to_owned())),
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let (rounds, changed) = &*self.shared;
        rounds.lock().unwrap_or_else(PoisonError::into_inner).gone.get_or_insert(self.rank);
        changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Runs `work` in every member of a group, and returns what it returned, by rank.
    fn all<T: Send>(size: usize, work: impl Fn(Threads) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let work = &work;
            let members = Threads::group(size);
            let members: Vec<_> =
                members.into_iter().map(|member| scope.spawn(move || work(member))).collect();
            members.into_iter().map(|member| member.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_and_broadcasts_reach_everybody_round_after_round() {
        let found = all(3, |group| {
            let mut found = Vec::new();
            for round in 0..50u8 {
                let mine = f32::from(round) + group.rank() as f32 / 3.0;
                let (mut single, mut double) = ([mine, -mine], [f64::from(mine)]);
                let mut bytes = [group.rank() as u8 + round; 2];
                group.sum(&mut single).unwrap();
                group.sum_f64(&mut double).unwrap();
                group.broadcast(&mut bytes).unwrap();
                group.barrier().unwrap();
                assert_eq!(bytes, [round; 2]);
                assert!((single[0] - (3.0 * f32::from(round) + 1.0)).abs() < 1e-4);
                found.push((single.map(f32::to_bits), double.map(f64::to_bits)));
            }
            found
        });
        assert!(found.iter().all(|bits| *bits == found[0]));
    }

    #[test]
    fn who_waits_for_a_member_that_is_gone_is_told() {
        let found = all(3, |group| {
            group.barrier().unwrap();
            if group.rank() == 1 { None } else { group.barrier().err() }
        });
        for rank in [0, 2] {
            let error = found[rank].as_ref().unwrap().to_string();
            assert_eq!(error, format!("process {rank} of 3: process 1 has ended"));
        }
    }

    #[test]
    fn numbers_that_do_not_fit_together_are_an_error() {
        let found = all(2, |group| group.sum(&mut vec![1.0; 1 + group.rank()]));
        assert!(found.iter().any(Result::is_err));
    }
}
