//! Conversations become rows in which only answers are learned.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use trine_data::chats::{ChatCounts, ChatOptions, TooLong};
use trine_data::{Batch, Batches, DataError, Dataset, IGNORED, eval_windows};
use trine_tokenizer::{ChatTemplate, Tokenizer};

const TEMPLATE: &str = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|eot_id|>' }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";

fn tokenizer() -> Tokenizer {
    Tokenizer::train_bpe(["user: question 1 assistant: answer 1"; 9].iter(), 300).unwrap()
}

/// Conversations of different lengths.
fn lines(n: usize) -> String {
    let line = |i: usize| {
        let (question, answer) = ("why ".repeat(1 + i % 5), "so ".repeat(1 + i * 7 % 11));
        format!("{{\"prompt\":\"{question}{i}\",\"completion\":\"{answer}{i}\"}}\n")
    };
    (0..n).map(line).collect()
}

fn write(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("chats.jsonl");
    std::fs::write(&path, text).unwrap();
    path
}

fn made(
    dir: &Path,
    text: &str,
    seq_len: usize,
    too_long: TooLong,
) -> Result<(Dataset, ChatCounts), DataError> {
    made_of(dir, text, seq_len, too_long, false)
}

fn made_of(
    dir: &Path,
    text: &str,
    seq_len: usize,
    too_long: TooLong,
    preferences: bool,
) -> Result<(Dataset, ChatCounts), DataError> {
    let template = ChatTemplate::new(TEMPLATE).unwrap();
    let options = ChatOptions {
        template: Some(&template),
        seq_len,
        val_fraction: 0.2,
        too_long,
        preferences,
    };
    let path = write(dir, text);
    Dataset::from_chats(&dir.join("data"), &tokenizer(), &[path], options, &mut |_| {})
}

/// The conversations of a batch as text: what is learned in brackets.
fn conversations(batch: &Batch, tokenizer: &Tokenizer) -> Vec<String> {
    let starts = batch.starts.as_ref().expect("rows tell conversations apart");
    let mut found = Vec::new();
    for row in 0..batch.batch {
        let at = row * batch.seq_len;
        let mut text: Vec<(u32, Vec<u32>, bool)> = Vec::new();
        for i in at..at + batch.seq_len {
            if text.last().is_none_or(|(start, ..)| *start != starts[i]) {
                text.push((starts[i], vec![batch.inputs[i]], false));
            }
            let last = text.last_mut().unwrap();
            if batch.targets[i] != IGNORED {
                last.2 = true;
                last.1.push(batch.targets[i]);
                if i + 1 < at + batch.seq_len && starts[i + 1] == starts[i] {
                    assert_eq!(batch.inputs[i + 1], batch.targets[i]);
                }
            } else if i + 1 < at + batch.seq_len && starts[i + 1] == starts[i] {
                last.1.push(batch.inputs[i + 1]);
            }
        }
        let texts = text.iter().filter(|(.., learned)| *learned);
        found.extend(texts.map(|(_, ids, _)| tokenizer.decode(ids, false).unwrap()));
    }
    found
}

#[test]
fn every_conversation_is_in_one_row_and_sees_no_other() {
    let dir = TempDir::new().unwrap();
    let (dataset, counts) = made(dir.path(), &lines(40), 96, TooLong::Refuse).unwrap();
    assert_eq!((counts.conversations, counts.truncated, counts.dropped), (40, 0, 0));
    let batches = Batches::new(dataset.train, 3, 96, 7).unwrap();
    assert_eq!(batches.windows(), counts.rows[0]);
    let all = batches.sequences(0, batches.windows()).unwrap();
    let mut found = conversations(&all, &dataset.tokenizer);
    let val: Vec<_> =
        eval_windows(&dataset.val, 2, 96, None).unwrap().map(Result::unwrap).collect();
    let mut learned = all.learned();
    for batch in &val {
        found.extend(conversations(batch, &dataset.tokenizer));
        learned += batch.learned();
    }
    assert_eq!(learned as u64, counts.learned);
    let mut expected: Vec<String> = lines(40)
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            let (question, answer) = (text("prompt"), text("completion"));
            format!("<|begin_of_text|>user: {question}<|eot_id|>assistant: {answer}<|eot_id|>")
        })
        .collect();
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    // Rows are filled: four in five of their places hold a token.
    let places = (counts.rows[0] + counts.rows[1]) * 97;
    assert!(counts.tokens as usize * 5 > places * 4, "{} of {places}", counts.tokens);
    // The next epoch has the same rows in another order.
    let next = batches.sequences(batches.windows() as u128, batches.windows()).unwrap();
    assert_ne!(next, all);
    assert_eq!(next.learned(), all.learned());
}

#[test]
fn a_conversation_that_is_too_long_has_a_policy() {
    let long = "so ".repeat(200);
    let text = format!("{}{{\"prompt\":\"a\",\"completion\":\"{long}\"}}\n", lines(9));
    let dir = TempDir::new().unwrap();
    let (_, counts) = made(dir.path(), &text, 64, TooLong::Truncate).unwrap();
    assert_eq!((counts.conversations, counts.truncated, counts.dropped), (10, 1, 0));
    let (_, counts) = made(dir.path(), &text, 64, TooLong::Drop).unwrap();
    assert_eq!((counts.conversations, counts.truncated, counts.dropped), (9, 0, 1));
    let error = made(dir.path(), &text, 64, TooLong::Refuse).unwrap_err().to_string();
    assert!(error.contains("chats.jsonl: line 10: expected at most 65 tokens"), "{error}");
    // Of a question that fills a row there is nothing to learn.
    let text = format!("{}{{\"prompt\":\"{long}\",\"completion\":\"a\"}}\n", lines(9));
    let (_, counts) = made(dir.path(), &text, 64, TooLong::Truncate).unwrap();
    assert_eq!((counts.conversations, counts.dropped), (9, 1));
}

#[test]
fn bad_lines_and_bad_shares_are_named() {
    let dir = TempDir::new().unwrap();
    let error = |text: &str| made(dir.path(), text, 64, TooLong::Drop).unwrap_err().to_string();
    let text = format!("{}\n{{\"prompt\":\"a\"}}\n", lines(2));
    assert!(error(&text).contains("chats.jsonl: line 4: `response`"), "{}", error(&text));
    let unanswered = "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}\n";
    assert!(error(unanswered).contains("line 1: no message of the role"), "{}", error(unanswered));
    assert!(error("\n\n").contains("empty"), "{}", error("\n\n"));
    assert!(error(&lines(3)).contains("3 conversations"), "{}", error(&lines(3)));
}

#[test]
fn a_preference_is_a_row_of_two_sequences() {
    let dir = TempDir::new().unwrap();
    let line = |i: usize| {
        let turn =
            |role: &str, text: &str| format!("{{\"role\":\"{role}\",\"content\":\"{text}\"}}");
        let before =
            [turn("user", "hi"), turn("assistant", "so"), turn("user", &format!("why {i}"))];
        let with = |text: &str| [&before[..], &[turn("assistant", text)]].concat().join(",");
        format!("{{\"chosen\":[{}],\"rejected\":[{}]}}\n", with("so so"), with("no"))
    };
    let text: String = (0..10).map(line).collect();
    let (data, counts) = made_of(dir.path(), &text, 64, TooLong::Truncate, true).unwrap();
    assert_eq!((counts.conversations, counts.rows), (10, [8, 2]));
    let batches = Batches::new(data.train, 2, 64, 1).unwrap();
    assert_eq!(batches.windows(), 8);
    let batch = batches.batch(0).unwrap();
    assert_eq!((batch.batch, batch.inputs.len()), (4, 4 * 64));
    let found = conversations(&batch, &data.tokenizer);
    assert!(
        found[0].ends_with("so so<|eot_id|>") && found[1].ends_with("no<|eot_id|>"),
        "{found:?}"
    );
    assert_eq!(found[0].replace("so so", "no"), found[1]);
    // Of the earlier answer nothing is learned.
    let learned = |row: usize| {
        let targets = &batch.targets[row * 64..][..64];
        let ids: Vec<u32> = targets.iter().copied().filter(|id| *id != IGNORED).collect();
        data.tokenizer.decode(&ids, false).unwrap()
    };
    assert_eq!([learned(0), learned(1)], ["so so<|eot_id|>", "no<|eot_id|>"]);
}

#[test]
fn rows_are_of_one_length() {
    let dir = TempDir::new().unwrap();
    let (dataset, _) = made(dir.path(), &lines(20), 64, TooLong::Drop).unwrap();
    let error = Batches::new(dataset.train, 1, 32, 0).unwrap_err().to_string();
    assert!(
        error.contains("rows of 65 tokens, expected those of one or two sequences of 32"),
        "{error}"
    );
}
