//! The trainer's forward pass and the runtime give a model the same scores.

use std::path::Path;

use serde_json::json;
use trine_eval::{
    Data, Evaluation, LanguageModel, OneByOne, RuntimeModel, Settings, Store, Summary, Task,
    TooLong,
};
use trine_format::ModelFile;
use trine_runtime::Model;
use trine_tokenizer::Tokenizer;

use crate::life::{trained_in, trainer_logits};

const TASK: &str = r#"
name = "next"
version = 1
kind = "multiple_choice"
metrics = ["acc", "acc_norm"]
files = ["next.jsonl"]
[[form]]
needs = ["begin", "ends", "gold"]
prompt = "{{begin}}"
choices = "ends"
gold = "gold"
"#;

/// Beginnings of the synthetic corpus, with their own end among those of others.
fn write_items(path: &Path) {
    let lines: Vec<String> = trine_data::synth::documents(5, 20_000)
        .filter_map(|text| Some(text.split_once(". ")?.0.to_owned()))
        .filter(|line| line.split(' ').count() > 5)
        .take(60)
        .collect();
    let end = |line: &str| line.rsplit(' ').next().unwrap_or_default().to_owned();
    let item = |(i, line): (usize, &String)| {
        let begin: Vec<&str> = line.split(' ').collect();
        let begin = begin[begin.len().saturating_sub(6)..begin.len() - 1].join(" ");
        let mut ends: Vec<_> = (0..4).map(|k| end(&lines[(i + 7 * k) % lines.len()])).collect();
        ends.rotate_right(i % 4);
        json!({ "begin": begin, "ends": ends, "gold": i % 4 }).to_string() + "\n"
    };
    let items: String = lines.iter().enumerate().map(item).collect();
    std::fs::write(path, items).unwrap();
}

#[test]
fn runtime_and_trainer_give_the_same_scores() {
    let temp = tempfile::tempdir().unwrap();
    let (trainer, checkpoint) = trained_in(&temp.path().join("run"), &[]);
    let path = temp.path().join("next.jsonl");
    write_items(&path);
    let task = Task::parse(TASK, "next.toml").unwrap();
    let data = Data::open(&task, &path, 0).unwrap();
    let file = ModelFile::open(&checkpoint).unwrap();
    let tokenizer = Tokenizer::from_file(&checkpoint.join("tokenizer.json")).unwrap();
    let settings = Settings { shots: None, limit: None, too_long: TooLong::Skip };
    let evaluate = |language: &mut dyn LanguageModel| {
        let mut store = Store::in_memory();
        let evaluation =
            Evaluation { task: &task, data: &data, tokenizer: &tokenizer, stop_ids: &[], settings };
        evaluation.run(language, &mut store, &mut |_| {}).unwrap();
        store
    };
    let model = Model::load(&file).unwrap();
    let runtime = evaluate(&mut RuntimeModel::new(&model));
    let logits = |ids: &[u32]| Ok::<_, std::io::Error>(trainer_logits(&trainer, ids));
    let limit = model.config().max_position_embeddings;
    let trainer = evaluate(&mut OneByOne::new(limit, logits));

    let (runtime, trainer) = (runtime.first(60), trainer.first(60));
    assert_eq!(Summary::of(&runtime).scored, 60);
    for (a, b) in runtime.iter().zip(&trainer) {
        for (x, y) in a.log_likelihoods.iter().zip(&b.log_likelihoods) {
            assert!((x - y).abs() < 1e-4, "item {}: {x} and {y}", a.item);
        }
        assert_eq!(a.scores, b.scores);
    }
    // It has learned something, so that equal scores say something.
    let summary = Summary::of(&runtime);
    assert!(summary.scores[0].value > 0.3, "{summary:?}");
}
