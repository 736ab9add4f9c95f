//! Texts that begin alike, as a tree, of which every node need be computed only once.

use std::ops::Range;

/// Ids that some texts have in common, after all that they have in common with others.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// Positions in its texts.
    pub(crate) ids: Range<usize>,
    /// The texts, which follow each other when they are sorted. Each goes through the whole node.
    pub(crate) texts: Range<usize>,
    /// What stands before it.
    pub(crate) parent: Option<usize>,
    /// What follows it.
    pub(crate) children: Vec<usize>,
}

/// The tree of texts that are sorted; a node comes after its parent. Empty texts are in no node.
pub(crate) fn tree<T: AsRef<[u32]>>(texts: &[T]) -> Vec<Node> {
    let ids = |text: usize| texts[text].as_ref();
    let mut nodes = Vec::<Node>::new();
    let mut open: Vec<(Option<usize>, usize, Range<usize>)> = vec![(None, 0, 0..texts.len())];
    while let Some((parent, start, Range { start: mut from, end })) = open.pop() {
        while from < end {
            let Some(id) = ids(from).get(start) else {
                from += 1;
                continue;
            };
            let alike = (from..end).take_while(|text| ids(*text).get(start) == Some(id)).count();
            let (texts, node) = (from..from + alike, nodes.len());
            // What the first and the last of sorted texts begin with, those between do too.
            let length = common(&ids(from)[start..], &ids(texts.end - 1)[start..]);
            from = texts.end;
            let ids = start..start + length;
            if let Some(parent) = parent {
                nodes[parent].children.push(node);
            }
            open.push((Some(node), ids.end, texts.clone()));
            nodes.push(Node { ids, texts, parent, children: Vec::new() });
        }
    }
    nodes
}

/// Number of ids with which both begin.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_texts_begin_with_is_one_node() {
        let texts: [&[u32]; 6] = [&[1, 2], &[1, 2, 3], &[1, 2, 3], &[1, 2, 4, 5], &[1, 3], &[2]];
        let nodes = tree(&texts);
        let mut found: Vec<_> =
            nodes.iter().map(|node| (&texts[node.texts.start][node.ids.clone()], node)).collect();
        found.sort_by_key(|(_, node)| (node.texts.start, node.ids.start));
        let shape: Vec<(&[u32], usize, usize)> =
            found.iter().map(|(ids, node)| (*ids, node.texts.len(), node.children.len())).collect();
        let expected: [(&[u32], usize, usize); 6] =
            [(&[1], 5, 2), (&[2], 4, 2), (&[3], 2, 0), (&[4, 5], 1, 0), (&[3], 1, 0), (&[2], 1, 0)];
        assert_eq!(shape, expected);
        for (index, node) in nodes.iter().enumerate() {
            assert!(node.parent.is_none_or(|parent| parent < index));
            for child in &node.children {
                let child = &nodes[*child];
                assert_eq!((child.parent, child.ids.start), (Some(index), node.ids.end));
            }
        }
    }

    #[test]
    fn every_text_is_the_ids_of_its_nodes() {
        let mut texts: Vec<Vec<u32>> = (0..200u32)
            .map(|i| (0..i % 7).map(|at| ((i * 31) >> (2 * at)) % 3).collect())
            .collect();
        texts.sort();
        let nodes = tree(&texts);
        for (index, text) in texts.iter().enumerate() {
            let mut own: Vec<_> = nodes.iter().filter(|n| n.texts.contains(&index)).collect();
            own.sort_by_key(|node| node.ids.start);
            let ids: Vec<u32> = own
                .iter()
                .flat_map(|node| &texts[node.texts.start][node.ids.clone()])
                .copied()
                .collect();
            assert_eq!(ids, *text);
        }
        let distinct: std::collections::BTreeSet<&[u32]> =
            texts.iter().flat_map(|text| (1..=text.len()).map(|end| &text[..end])).collect();
        assert_eq!(nodes.iter().map(|node| node.ids.len()).sum::<usize>(), distinct.len());
    }
}
