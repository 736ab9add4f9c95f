//! Making tensors on all threads while those before them are written.
//!
//! What is in memory is a few windows of tensors, whatever the size of the model; what is written is
//! the same for every number of threads.

use std::panic::resume_unwind;
use std::sync::mpsc::sync_channel;
use std::thread;

use rayon::prelude::*;

use crate::FormatError;

/// Bytes in a window, at least, but for the last.
const WINDOW: usize = 32 << 20;
/// Windows that are made and not yet written, so that making goes on while a large tensor is
/// written; one more is being made, and one written.
const AHEAD: usize = 3;

/// Calls `put` with what `make` makes of every item, in order, on a thread of its own.
///
/// # Errors
/// The first error in the order of the items.
pub(crate) fn in_order<I: Sync, T: Send>(
    items: &[I],
    bytes: impl Fn(&I) -> usize,
    make: impl Fn(&I) -> Result<T, FormatError> + Sync,
    mut put: impl FnMut(&I, T) -> Result<(), FormatError> + Send,
) -> Result<(), FormatError> {
    let (to_writer, windows) = sync_channel::<Vec<(&I, T)>>(AHEAD);
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            windows.into_iter().flatten().try_for_each(|(item, tensor)| put(item, tensor))
        });
        let mut rest = items;
        let mut made = Ok(());
        while !rest.is_empty() && made.is_ok() {
            let (window, after) = rest.split_at(window(rest, &bytes));
            rest = after;
            let next: Vec<_> = window.par_iter().map(|item| Ok((item, make(item)?))).collect();
            made = next.into_iter().collect::<Result<_, _>>().map(|next| {
                // A writer that has ended has an error of its own to tell.
                if to_writer.send(next).is_err() {
                    rest = &[];
                }
            });
        }
        drop(to_writer);
        let written = writer.join().unwrap_or_else(|panic| resume_unwind(panic));
        written.and(made)
    })
}

/// How many items fill a window.
fn window<I>(items: &[I], bytes: impl Fn(&I) -> usize) -> usize {
    let mut sum = 0;
    let full = items.iter().position(|item| {
        sum += bytes(item);
        sum >= WINDOW
    });
    full.map_or(items.len(), |last| last + 1)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn run(items: &[usize], bad: impl Fn(usize) -> bool + Sync) -> (Vec<usize>, Option<String>) {
        let mut put = Vec::new();
        let error = |i: usize| FormatError::malformed(Path::new("m"), "item", "good", i);
        let done = in_order(
            items,
            |_| WINDOW / 3,
            |&i| if bad(i) { Err(error(i)) } else { Ok(i) },
            |_, i| {
                put.push(i);
                Ok(())
            },
        );
        (put, done.err().map(|e| e.to_string()))
    }

    #[test]
    fn everything_is_put_in_order() {
        for n in [0, 1, 2, 3, 4, 5, 100] {
            let items: Vec<_> = (0..n).collect();
            assert_eq!(run(&items, |_| false), (items, None));
        }
    }

    #[test]
    fn the_first_error_ends_it() {
        let items: Vec<_> = (0..20).collect();
        let (put, error) = run(&items, |i| i >= 10);
        assert!(error.unwrap().contains("10"));
        assert_eq!(put, items[..put.len()]);
        assert!(put.len() < 10);
    }
}
