//! How products that are computed in tiles of twelve rows and thirty-two columns share out their outputs.
//!
//! A tile's sums stay in registers from the first step to the last, two of sixteen for each row; the
//! columns of a task stay in the second-level cache while rows pass by.

use crate::parallel::{self, SharedMut};

/// Rows in a tile.
pub(crate) const ROWS: usize = 12;

/// Columns in a tile.
pub(crate) const COLS: usize = 32;

/// Bytes of right side that a task keeps in the second-level cache.
const CACHE: usize = 320 << 10;

/// Tasks for each thread, at least, so that a thread that is held up can leave some to others.
const TASKS_PER_THREAD: usize = 4;

/// Calls `tile` for every tile of `out` `(rows, cols)`, on the threads of the pool, with the numbers of
/// its block of rows and of its panel of columns, and with its rows; those that do not exist are empty.
/// `panel_bytes` is what the right side takes for a panel.
///
/// # Panics
/// When `out` is not `(rows, cols)`.
pub(crate) fn for_each_tile(
    [rows, cols]: [usize; 2],
    panel_bytes: usize,
    out: &mut [f32],
    tile: impl Fn(usize, usize, [&mut [f32]; ROWS]) + Sync,
) {
    assert_eq!(Some(out.len()), rows.checked_mul(cols), "output is not (rows, cols)");
    if out.is_empty() {
        return;
    }
    let (blocks, panels) = (rows.div_ceil(ROWS), cols.div_ceil(COLS));
    let group = (CACHE / panel_bytes.max(1)).clamp(1, panels);
    let groups = panels.div_ceil(group);
    // Every thread begins with rows of its own, which are those that it had in other loops over rows; of
    // these it does all before it goes on to the next columns.
    let threads = parallel::threads();
    let chunks = TASKS_PER_THREAD.div_ceil(groups);
    let chunk = blocks.div_ceil(threads * chunks).max(1);
    let out = SharedMut::new(out);
    parallel::run(threads * groups * chunks, |task| {
        let (thread, first) = (task / (groups * chunks), task / chunks % groups * group);
        let start = (thread * chunks + task % chunks) * chunk;
        for block in start..blocks.min(start + chunk) {
            for panel in first..panels.min(first + group) {
                let (row, col) = (block * ROWS, panel * COLS);
                let width = COLS.min(cols - col);
                let rows = std::array::from_fn(|r| match row + r < rows {
                    // SAFETY: a tile is in one task, and an output in one tile.
                    #[allow(unsafe_code)]
                    true => unsafe { out.slice((row + r) * cols + col, width) },
                    false => &mut [][..],
                });
                tile(block, panel, rows);
            }
        }
    });
}

/// Numbers between -3.3 and 3.7 for the tests of such products.
#[cfg(test)]
pub(crate) fn painted(n: usize, phase: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + phase * 101) % 257) as f32 / 37.0 - 3.3).collect()
}
