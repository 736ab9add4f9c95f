//! Where the ids of a batch occur: the order in which rows of an embedding's gradient are added.

/// Where each id of a batch occurs.
pub(super) struct Occurrences {
    pub(super) ids: Vec<u32>,
    /// Where in `rows` those of each id begin, and their end.
    pub(super) starts: Vec<u32>,
    pub(super) rows: Vec<u32>,
}

impl Occurrences {
    /// By counting: the device waits for this.
    pub(super) fn of(inputs: &[u32], vocab: usize) -> Self {
        let mut next = vec![0u32; vocab + 1];
        for id in inputs {
            next[*id as usize + 1] += 1;
        }
        let (mut ids, mut starts) = (Vec::new(), Vec::new());
        for id in 0..vocab {
            if next[id + 1] > 0 {
                ids.push(id as u32);
                starts.push(next[id]);
            }
            next[id + 1] += next[id];
        }
        starts.push(inputs.len() as u32);
        // The rows of an id stay in order.
        let mut rows = vec![0; inputs.len()];
        for (row, id) in (0u32..).zip(inputs) {
            let at = &mut next[*id as usize];
            rows[*at as usize] = row;
            *at += 1;
        }
        Self { ids, starts, rows }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_an_id_are_in_order() {
        let Occurrences { ids, starts, rows } = Occurrences::of(&[5, 2, 5, 9, 2, 5], 12);
        assert_eq!((ids, starts), (vec![2, 5, 9], vec![0, 2, 5, 6]));
        assert_eq!(rows, [1, 4, 0, 2, 5, 3]);
    }
}
