//! Documents that are predicted as a whole, and their perplexities.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use trine_eval::{
    Data, Evaluation, Request, RuntimeModel, Settings, Size, Store, Summary, Task, Windows,
    perplexity,
};
use trine_format::ModelFile;
use trine_runtime::Model;
use trine_tokenizer::Tokenizer;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures/tied-h64/bf16")
}

#[test]
fn articles_of_wikitext_become_what_the_harness_makes_of_them() {
    // Made by `wikitext_detokenizer` and `process_results` of lm-evaluation-harness 0.4.13.
    let page = " \n = Robert <unk> = \n \n Robert 's \" good \" ( a , b ) said it s ' end ; 5 @,@ 000 @-@ x : no ! why ? ' q ' [ z ] { w } at 5 ° C . N . \n = = Head = = \n = = = Sub = = = \n = = = = S = = = = \n x /' 5/ y  .\n";
    let text = "\n= Robert <unk> =\n\nRobert's \"good\" (a, b) said it s' end; 5,000-x: no! why? 'q' [z] {w} at 5°C. N.\n== Head ==\n=== Sub ===\n==== S ====\nx /'[0-9]/ y  .\n";
    let size = Size { words: 74, bytes: 202 };
    let record = json!({ "page": page }).as_object().unwrap().clone();
    let task = Task::open("wikitext").unwrap();
    let request = task.request(0, &record, &[], 0).unwrap();
    assert_eq!(request, Request::Document(text.into(), size));
}

#[test]
fn documents_are_one_text_for_their_perplexities() {
    let dir = tempfile::tempdir().unwrap();
    let pages = ["It was the best of times, ".repeat(60), "it was the worst".to_owned()];
    let lines = pages.each_ref().map(|page| json!({ "page": page }).to_string() + "\n");
    fs::write(dir.path().join("wikitext.jsonl"), lines.concat()).unwrap();
    let model = Model::load(&ModelFile::open(&fixture()).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_file(&fixture().join("tokenizer.json")).unwrap();
    let task = Task::open("wikitext").unwrap();
    let data = Data::open(&task, dir.path(), 0).unwrap();
    let scored = |settings: Settings| {
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
        evaluation.run(&mut RuntimeModel::new(&model), &mut store, &mut |_| {}).unwrap();
        let scores = Summary::of(&store.first(2)).scores;
        let value = |name: &str| scores.iter().find(|score| score.metric == name).unwrap().value;
        (value("word_perplexity"), value("byte_perplexity"), value("bits_per_byte"))
    };
    let whole = Settings::default();
    let windows = Settings { window: Some(100), ..whole };
    let (word, byte, bits) = scored(windows);
    let (mut log, mut words, mut bytes) = (0.0, 0, 0);
    for page in &pages {
        let mut ids = vec![tokenizer.bos_id().unwrap()];
        ids.extend(tokenizer.encode(page, true).unwrap());
        let (size, sizes) = (Size::of_page(page), Windows { window: 100, stride: 100 });
        let mut model = RuntimeModel::new(&model);
        log += perplexity(&mut model, &ids, size, sizes, |_| ()).unwrap().log_likelihood;
        (words, bytes) = (words + size.words, bytes + size.bytes);
    }
    assert!((word.ln() + log / words as f64).abs() < 1e-9);
    assert!((byte.ln() + log / bytes as f64).abs() < 1e-9);
    assert!((bits - byte.log2()).abs() < 1e-12);
    assert_ne!(scored(Settings { stride: Some(10), ..windows }).0, word);
    assert_ne!(scored(whole).0, word);
}
