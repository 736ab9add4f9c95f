//! The corpus keeps its own rules, and breaking one is noticed.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use trine_data::synth::{Score, Synth, Tally, prompts, score};

const STORY: &str = "Once upon a time, there was a brave rabbit named Lily. One day, Lily went to \
    the forest. But soon she was very thirsty. Then a fox named Tom came by. \"You should drink \
    some water,\" said Tom. So Lily drank some water. After that, she was not thirsty any more. \
    Lily hopped back home with a smile.";

#[test]
fn every_document_keeps_all_rules() {
    let mut whole = Score::default();
    for document in Synth::new(1).take(4000) {
        let score = score(&document);
        assert!(score.is_perfect(), "{document}\n{score}");
        let lines = score.sentences.total + score.arithmetic.total;
        assert!((4..=10).contains(&lines), "{document}");
        whole += score;
    }
    assert!(whole.arithmetic.total > 4000 && whole.sentences.total > 20_000, "{whole}");
}

#[test]
fn documents_of_a_seed_are_pinned() {
    let text = Synth::new(0).text(1 << 20);
    assert_eq!(
        blake3::hash(text.as_bytes()).to_hex().as_str(),
        "ce440fa71de2acabc8a8ccbba78e898528bed4af78f5c74cfd63e75e7d9080e3",
        "the corpus changed: every result obtained with it is another result now"
    );
    assert!(Synth::new(0).take(50).eq(Synth::new(0).take(50)));
    assert!(!Synth::new(0).take(50).eq(Synth::new(1).take(50)));
    assert!(score(&text).is_perfect());
}

#[test]
fn the_vocabulary_is_a_few_thousand_words() {
    let text = Synth::new(2).text(4 << 20);
    let words = text.split(|c: char| !c.is_alphabetic() && c != '-').map(str::to_lowercase);
    let distinct = words.collect::<HashSet<_>>().len();
    assert!((1800..4000).contains(&distinct), "{distinct}");
}

fn check(from: &str, to: &str, sentences: usize, consistent: usize) {
    assert!(STORY.contains(from), "{from}");
    let score = score(&STORY.replace(from, to));
    assert_eq!(score.sentences, Tally { right: sentences, total: 8 }, "{from} -> {to}");
    assert_eq!(score.consistency, Tally { right: consistent, total: sentences }, "{from} -> {to}");
}

#[test]
fn breaking_a_rule_is_noticed() {
    check("Lily", "Lily", 8, 8);
    check("But soon she", "But soon he", 8, 7);
    check("said Tom", "said Anna", 8, 7);
    check("One day, Lily", "One day, Anna", 8, 7);
    check("Lily hopped", "Lily flew", 8, 7);
    check("some water", "some bread", 8, 6);
    check("So Lily drank", "So Lily ate", 8, 7);
    check("not thirsty", "not hungry", 8, 7);
    check("a fox named Tom", "a fox named Lily", 8, 7);
    check("a brave", "an brave", 7, 5);
    check("the forest", "the happy", 7, 7);
    check("So Lily drank some water. ", "So drank Lily water some. ", 7, 5);
    check("After that, she was", "After that, she were", 7, 7);
}

#[test]
fn order_matters() {
    let mut sentences: Vec<&str> = STORY.split_inclusive(". ").collect();
    sentences.swap(2, 5);
    let score = score(&sentences.concat());
    assert_eq!(score.sentences.right, 8);
    assert!(score.consistency.right < 7, "{score}");
}

#[test]
fn shuffled_words_are_known_words_and_no_sentences() {
    let mut words: Vec<&str> = STORY.split(' ').collect();
    words.sort_by_key(|word| blake3::hash(word.as_bytes()).to_hex().to_string());
    let score = score(&words.join(" "));
    assert_eq!(score.words.share(), 1.0);
    assert_eq!(score.sentences.right, 0);
}

#[test]
fn unknown_words_are_counted() {
    let score = score("Lily was a brave quokka. Blorp!");
    assert_eq!(score.words, Tally { right: 4, total: 6 });
    assert_eq!(score.sentences, Tally { right: 0, total: 2 });
}

#[test]
fn sums_are_computed_again() {
    let text = "17 + 25 = 42\n17 + 25 = 43\n9 - 4 = 5\n3 < 2\n7 > 2\n4 = 4\n5 * 2 = 10\n\n2 + 2 =";
    assert_eq!(score(text).arithmetic, Tally { right: 4, total: 7 });
    let counted = "Leo was a bold boy. He had two figs in his pocket. Then a fox named Amy came by. \
        Amy gave him three more. Now Leo had five figs.";
    assert!(score(counted).is_perfect());
    assert_eq!(score(&counted.replace("five", "six")).consistency, Tally { right: 4, total: 5 });
}

#[test]
fn a_text_may_break_off() {
    for end in (0..STORY.len()).filter(|end| STORY.is_char_boundary(*end)) {
        let score = score(&STORY[..end]);
        assert_eq!(score.consistency.right, score.sentences.total, "{}", &STORY[..end]);
    }
}

#[test]
fn prompts_are_of_the_corpus() {
    for prompt in prompts() {
        let score = score(prompt);
        assert_eq!(score.words.share(), 1.0, "{prompt}");
        assert_eq!(score.sentences.share() * score.consistency.share(), 1.0, "{prompt}");
    }
}

#[test]
fn any_text_is_judged_without_panic() {
    for text in
        ["", "\n\n\n", "\"\"\"", "é. É! \"ü\"? a", "9", "99999999999999999999 + 1 = 2", ". . ."]
    {
        assert!(!score(text).is_perfect(), "{text}");
    }
}
