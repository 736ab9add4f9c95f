//! How well a model predicts a text, in windows where the text is longer than its context.
//!
//! The first window predicts as many tokens as it holds, every further one `stride` tokens, with as
//! many before them as then fit. With a stride of the whole window these are the windows of
//! lm-evaluation-harness (`loglikelihood_rolling`); smaller strides give every token more context and
//! take as many times longer. Bits per byte is the figure that compares models with different
//! tokenizers; a perplexity per word divides the same sum by words, which no tokenizer changes either.

use crate::EvalError;
use crate::model::{Continuation, Item, LanguageModel};

/// Tokens of the windows that are scored together, about.
const TOGETHER: usize = 4096;

/// Sizes of the sliding window, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens that go through the model together, at most.
    pub window: usize,
    /// Tokens by which it moves on.
    pub stride: usize,
}

/// A text, in the units that its likelihood is divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Pieces of the text between white space.
    pub words: usize,
    /// Bytes of the text in UTF-8.
    pub bytes: usize,
}

impl Size {
    /// Counts them.
    pub fn of(text: &str) -> Self {
        Self { words: text.split_whitespace().count(), bytes: text.len() }
    }

    /// Counts them as lm-evaluation-harness does in a document: words are what lies between stretches of
    /// white space, with an empty one before white space that begins a text and after one that ends it.
    pub fn of_page(text: &str) -> Self {
        // What Python's regular expressions take for white space.
        let is_space = |c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c);
        let spaces: Vec<bool> = text.chars().map(is_space).collect();
        let stretches = spaces.chunk_by(|a, b| a == b).filter(|stretch| stretch[0]).count();
        Self { words: stretches + 1, bytes: text.len() }
    }
}

/// What a model makes of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Natural logarithm of the probability of all tokens.
    pub log_likelihood: f64,
    /// Tokens that were predicted, each once.
    pub tokens: usize,
    /// The text.
    pub size: Size,
}

impl Perplexity {
    /// `exp` of the mean loss of a token.
    pub fn token(&self) -> f64 {
        (-self.log_likelihood / self.tokens as f64).exp()
    }

    /// `exp` of the loss of a word.
    pub fn word(&self) -> f64 {
        (-self.log_likelihood / self.size.words as f64).exp()
    }

    /// `exp` of the loss of a byte.
    pub fn byte(&self) -> f64 {
        (-self.log_likelihood / self.size.bytes as f64).exp()
    }

    /// Bits that a byte of the text takes, if the model compresses it.
    pub fn bits_per_byte(&self) -> f64 {
        -self.log_likelihood / self.size.bytes as f64 / std::f64::consts::LN_2
    }
}

/// The windows over `ids`, which predict all but the first of them, each once.
///
/// # Errors
/// Fewer than two ids; a window of no tokens, or larger than `limit`; a stride that is 0 or larger
/// than the window.
pub fn windows(ids: &[u32], windows: Windows, limit: usize) -> Result<Vec<Item>, EvalError> {
    let Windows { window, stride } = windows;
    if window == 0 || window > limit {
        let expected = format!("1 to {limit}, the context of the model");
        return Err(EvalError::Setting { name: "window", expected, found: window });
    }
    if stride == 0 || stride > window {
        let expected = format!("1 to {window}, the window");
        return Err(EvalError::Setting { name: "stride", expected, found: stride });
    }
    if ids.len() < 2 {
        return Err(EvalError::Empty { what: "the text".to_owned() });
    }
    let item = |from: usize, first: usize, end: usize| {
        let (context, ids) = (ids[from..first].to_vec(), ids[first..end].to_vec());
        Item { options: vec![Continuation { context, ids }] }
    };
    let mut end = ids.len().min(window + 1);
    let mut items = vec![item(0, 1, end)];
    while end < ids.len() {
        let first = end;
        end = ids.len().min(end + stride);
        items.push(item(end - window - 1, first, end));
    }
    Ok(items)
}

/// Scores a text that begins with a token which is given. `on_windows` is called after some windows
/// with the tokens that were predicted until then.
///
/// # Errors
/// As [`windows`], and those of the model.
pub fn perplexity(
    model: &mut dyn LanguageModel,
    ids: &[u32],
    size: Size,
    sizes: Windows,
    mut on_windows: impl FnMut(usize),
) -> Result<Perplexity, EvalError> {
    let mut found = Perplexity { log_likelihood: 0.0, tokens: 0, size };
    // Several at a time where they are short.
    for items in windows(ids, sizes, model.limit())?.chunks((TOGETHER / sizes.window).max(1)) {
        for (item, likelihoods) in items.iter().zip(model.score(items)?) {
            found.log_likelihood += likelihoods.iter().map(|l| l.log).sum::<f64>();
            found.tokens += item.options.iter().map(|option| option.ids.len()).sum::<usize>();
        }
        on_windows(found.tokens);
    }
    if !found.log_likelihood.is_finite() {
        let found = found.log_likelihood;
        return Err(EvalError::NotFinite { task: "perplexity".to_owned(), item: 0, found });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(tokens: u32, window: usize, stride: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
        let ids: Vec<u32> = (0..=tokens).collect();
        let items = windows(&ids, Windows { window, stride }, 100).unwrap();
        let option = |item: Item| item.options.into_iter().next().unwrap();
        items.into_iter().map(option).map(|o| (o.input(), o.ids)).collect()
    }

    #[test]
    fn whole_strides_are_the_windows_of_lm_evaluation_harness() {
        // The example of `loglikelihood_rolling`: id 0 is the prefix, 1 to 10 the text.
        let expected = [
            (vec![0, 1, 2, 3], vec![1, 2, 3, 4]),
            (vec![4, 5, 6, 7], vec![5, 6, 7, 8]),
            (vec![6, 7, 8, 9], vec![9, 10]),
        ];
        assert_eq!(made(10, 4, 4), expected);
    }

    #[test]
    fn every_token_is_predicted_once_with_a_full_window_before_it() {
        for (tokens, window, stride) in [(1, 4, 2), (4, 4, 1), (5, 4, 1), (23, 8, 3), (23, 8, 8)] {
            let made = made(tokens, window, stride);
            let predicted: Vec<u32> = made.iter().flat_map(|(_, ids)| ids.clone()).collect();
            assert_eq!(predicted, (1..=tokens).collect::<Vec<_>>());
            for (input, ids) in &made {
                assert!(input.len() <= window);
                assert_eq!(input.last().map(|last| last + 1), ids.last().copied());
            }
            assert!(
                made[1..].iter().all(|(input, ids)| input.len() == window && ids.len() <= stride)
            );
        }
    }

    #[test]
    fn what_is_no_window_is_refused() {
        let refused = |window, stride| {
            windows(&[1, 2], Windows { window, stride }, 8).unwrap_err().to_string()
        };
        assert_eq!(refused(9, 1), "window 9: expected 1 to 8, the context of the model");
        assert_eq!(refused(4, 5), "stride 5: expected 1 to 4, the window");
        assert_eq!(refused(4, 0), "stride 0: expected 1 to 4, the window");
        assert!(windows(&[1], Windows { window: 4, stride: 4 }, 8).is_err());
    }

    #[test]
    fn words_of_a_page_are_those_of_the_harness() {
        // `len(re.split(r"\s+", text))`
        for (text, words) in
            [("", 1), ("a", 1), (" ", 2), (" = A =\n", 5), ("a \n b", 2), ("a\u{1c}\u{a0}b", 2)]
        {
            assert_eq!(Size::of_page(text), Size { words, bytes: text.len() }, "{text:?}");
        }
    }

    #[test]
    fn units_divide_one_likelihood() {
        let size = Size::of("two words\n");
        assert_eq!(size, Size { words: 2, bytes: 10 });
        let found = Perplexity { log_likelihood: -20.0 * 2f64.ln(), tokens: 4, size };
        assert!((found.bits_per_byte() - 2.0).abs() < 1e-12);
        assert!((found.byte() - 4.0).abs() < 1e-12);
        assert!((found.token() - 32.0).abs() < 1e-9);
        assert!((found.word() - 1024.0).abs() < 1e-6);
    }
}
