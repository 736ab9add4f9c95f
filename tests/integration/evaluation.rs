//! The trainer's forward pass and the runtime give a model the same scores, on tasks of every kind.

use std::path::Path;

use serde_json::json;
use trine_eval::{
    Data, Evaluation, LanguageModel, OneByOne, Record, RuntimeModel, Settings, Store, Summary, Task,
};
use trine_format::ModelFile;
use trine_runtime::Model;
use trine_tokenizer::Tokenizer;
use trine_train::Trainer;

use crate::life::{trained_in, trainer_logits};

const ITEMS: usize = 60;

const CHOICE: &str = r#"
name = "choice"
version = 1
kind = "multiple_choice"
metrics = ["acc", "acc_norm"]
files = ["items.jsonl"]
[[form]]
needs = ["begin", "ends", "gold"]
prompt = "{{begin}}"
choices = "ends"
gold = "gold"
"#;

const LAST: &str = r#"
name = "last"
version = 1
kind = "continuation"
metrics = ["acc", "perplexity"]
files = ["items.jsonl"]
[[form]]
needs = ["begin", "ends", "gold"]
prompt = "{{begin}}"
target = " {{ends[gold]}}"
"#;

const WRITTEN: &str = r#"
name = "written"
version = 1
kind = "generation"
metrics = ["exact_match"]
files = ["items.jsonl"]
[generation]
max_tokens = 6
until = []
[[form]]
needs = ["begin", "ends", "gold"]
prompt = "{{begin}}"
target = "{{ends[gold]}}"
"#;

/// Beginnings of the synthetic corpus, each with its own end among those of others.
fn write_items(path: &Path) {
    let lines: Vec<String> = trine_data::synth::documents(5, 40_000)
        .filter_map(|text| Some(text.split_once(". ")?.0.to_owned()))
        .filter(|line| line.split(' ').count() > 5)
        .take(ITEMS)
        .collect();
    assert_eq!(lines.len(), ITEMS);
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

/// The largest difference of a log-likelihood, and the items whose scores or texts differ.
fn differences(a: &[&Record], b: &[&Record]) -> (f64, usize) {
    assert_eq!((a.len(), b.len()), (ITEMS, ITEMS));
    let pairs = || a.iter().zip(b);
    let logs = pairs().flat_map(|(a, b)| a.log_likelihoods.iter().zip(&b.log_likelihoods));
    let largest = logs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    // The score of a perplexity is a log-likelihood.
    let judged = |record: &Record| {
        let mut scores = record.scores.clone();
        scores.remove("perplexity");
        (scores, record.greedy.clone(), record.text.clone())
    };
    (largest, pairs().filter(|(a, b)| judged(a) != judged(b)).count())
}

#[test]
fn runtime_and_trainer_give_the_same_scores() {
    let temp = tempfile::tempdir().unwrap();
    let (trainer, checkpoint) = trained_in(&temp.path().join("run"), &[]);
    // The same tokenizer and another beginning: what would have to be noticed.
    let (other, _) = trained_in(&temp.path().join("other"), &["seed=9", "train.steps=12"]);
    write_items(&temp.path().join("items.jsonl"));
    let tokenizer = Tokenizer::from_file(&checkpoint.join("tokenizer.json")).unwrap();
    let model = Model::load(&ModelFile::open(&checkpoint).unwrap()).unwrap();
    let limit = model.config().max_position_embeddings;
    let settings = Settings::default();

    for text in [CHOICE, LAST, WRITTEN] {
        let task = Task::parse(text, "task.toml").unwrap();
        let data = Data::open(&task, temp.path(), 0).unwrap();
        let evaluate = |language: &mut dyn LanguageModel| {
            let mut store = Store::in_memory();
            let evaluation = Evaluation {
                task: &task,
                data: &data,
                tokenizer: &tokenizer,
                stop_ids: &[],
                template: None,
                sandbox: None,
                settings,
            };
            evaluation.run(language, &mut store, &mut |_| {}).unwrap();
            store
        };
        let trained = |trainer: &Trainer| {
            let logits = |ids: &[u32]| Ok::<_, std::io::Error>(trainer_logits(trainer, ids));
            evaluate(&mut OneByOne::new(limit, logits))
        };
        let (here, there, elsewhere) =
            (evaluate(&mut RuntimeModel::new(&model)), trained(&trainer), trained(&other));
        let here = here.first(ITEMS);
        let summary = Summary::of(&here);
        assert_eq!(summary.scored, ITEMS);
        let (largest, judged) = differences(&here, &there.first(ITEMS));
        assert!(largest < 1e-4 && judged == 0, "{}: {largest}, {judged}", task.name());
        // A model that is another is seen to be another. (So early, neither may know a last word.)
        let (largest, judged) = differences(&here, &elsewhere.first(ITEMS));
        let noticed = match task.name() {
            "choice" => largest > 0.1 && judged > 0,
            "last" => largest > 0.1,
            _ => judged > 0,
        };
        let texts: Vec<_> = here.iter().take(3).map(|record| &record.text).collect();
        assert!(noticed, "{}: {largest}, {judged} of another model: {texts:?}", task.name());
        // Some answers are right and some are not.
        if task.name() == "choice" {
            let acc = &summary.scores[0];
            assert!(acc.metric == "acc" && acc.value > 0.0 && acc.value < 1.0, "{summary:?}");
        }
    }
}
