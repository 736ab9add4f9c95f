//! The perplexity of a text file.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use trine_eval::{LanguageModel, Perplexity, Size, Windows, perplexity, prefix_id};
use trine_tokenizer::Tokenizer;

use crate::output::{self, note};
use crate::progress::EvalProgress;

/// Longest window unless told otherwise: more context than this is measured only where it is wanted.
const WINDOW: usize = 2048;

/// A file to measure.
pub(super) struct Text {
    path: PathBuf,
    text: String,
}

/// What came of it.
pub(super) struct TextResults {
    pub(super) path: PathBuf,
    pub(super) found: Perplexity,
    pub(super) windows: Windows,
}

pub(super) fn read(path: &Path) -> anyhow::Result<Text> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?;
    Ok(Text { path: path.to_owned(), text })
}

/// Measures a text, `sizes` being window and stride where they are given.
pub(super) fn measure(
    Text { path, text }: &Text,
    tokenizer: &Tokenizer,
    model: &mut dyn LanguageModel,
    (window, stride): (Option<usize>, Option<usize>),
) -> anyhow::Result<TextResults> {
    let window = window.unwrap_or(model.limit().min(WINDOW));
    let windows = Windows { window, stride: stride.unwrap_or(window) };
    // As a document of training begins; without such a token, the first is given.
    let mut ids: Vec<u32> = prefix_id(tokenizer).into_iter().collect();
    ids.extend(tokenizer.encode_plain(text).with_context(|| path.display().to_string())?);
    let begin = Instant::now();
    let found = {
        let name = path.display().to_string();
        let mut progress = EvalProgress::new(&name, ids.len() - 1, "tokens");
        perplexity(model, &ids, Size::of(text), windows, |tokens| progress.on_known(tokens))
            .with_context(|| name)?
    };
    let speed = found.tokens as f64 / begin.elapsed().as_secs_f64().max(1e-9);
    let tokens = output::count(found.tokens as u64);
    note!("[{}: {tokens} tokens, {speed:.0} tok/s]", path.display());
    Ok(TextResults { path: path.clone(), found, windows })
}
