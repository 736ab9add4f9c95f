//! Task files: what they make of records, what is wrong with them, and whole evaluations.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use trine_eval::{
    Data, Doc, Evaluation, Expected, LanguageModel, OneByOne, Outcome, Record, Request,
    RuntimeModel, Sandbox, Settings, Store, Summary, Task, TooLong, task_names,
};
use trine_format::ModelFile;
use trine_runtime::{Model, Session};
use trine_tokenizer::{ChatTemplate, Tokenizer};

const SETTINGS: Settings =
    Settings { shots: None, limit: None, too_long: TooLong::Skip, window: None, stride: None };

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures/tied-h64/bf16")
}

fn doc(value: serde_json::Value) -> Doc {
    value.as_object().unwrap().clone()
}

fn ask(task: &str, record: serde_json::Value) -> Request {
    Task::open(task).unwrap().request(0, &doc(record), &[], 0).unwrap()
}

fn choice(request: Request) -> (Vec<(String, String)>, Vec<usize>) {
    match request {
        Request::Choice { options, gold, .. } => (options, gold),
        other => panic!("{other:?}"),
    }
}

#[test]
fn records_become_the_texts_of_lm_evaluation_harness() {
    let (options, gold) = choice(ask(
        "arc_easy",
        json!({ "question": "Why?", "choices": { "text": ["a", "b"], "label": ["A", "B"] }, "answerKey": "B" }),
    ));
    assert_eq!(options[1], ("Question: Why?\nAnswer:".into(), " b".into()));
    assert_eq!(gold, [1]);

    let (options, gold) = choice(ask(
        "hellaswag",
        json!({ "activity_label": "Baking", "ctx_a": "[header] A cake. [title] Mix", "ctx_b": "he THEN",
            "endings": ["stirs [step] it.", " eats  it."], "label": "1" }),
    ));
    assert_eq!(options[0], ("Baking: A cake.. Mix He then".into(), " stirs it.".into()));
    assert_eq!(options[1].1, " eats it.");
    assert_eq!(gold, [1]);

    let (options, gold) = choice(ask(
        "winogrande",
        json!({ "sentence": "It fell off _ because it shook.", "option1": "the car", "option2": "the bus", "answer": "2" }),
    ));
    let shook = " because it shook.";
    assert_eq!(options[0], ("It fell off the car".into(), shook.into()));
    assert_eq!(options[1], ("It fell off the bus".into(), shook.into()));
    assert_eq!(gold, [1]);

    let (options, gold) = choice(ask(
        "boolq",
        json!({ "query": "Passage: It is.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1 }),
    ));
    assert_eq!(options[1], ("It is.\nQuestion: is it?\nAnswer:".into(), " yes".into()));
    assert_eq!(gold, [1]);

    let (options, gold) = choice(ask(
        "truthfulqa_mc2",
        json!({ "Question": "So?", "Best Answer": "x", "Correct Answers": "x; y", "Incorrect Answers": "z; w; " }),
    ));
    assert!(
        options[0].0.starts_with("Q: What is human life")
            && options[0].0.ends_with("Spain.\n\nQ: So?\nA:")
    );
    assert_eq!(options.iter().map(|o| &o.1[..]).collect::<Vec<_>>(), [" x", " y", " z", " w"]);
    assert_eq!(gold, [0, 1]);

    let lambada = ask("lambada_openai", json!({ "text": "He said so to Helen" }));
    assert_eq!(lambada, Request::Continuation("He said so to".into(), " Helen".into()));

    let trivia = ask("triviaqa", json!({ "question": "Who", "answer": { "aliases": ["A", "B"] } }));
    let Request::Generation { prompt, expected } = trivia else { panic!("{trivia:?}") };
    assert_eq!(prompt, "Question: Who?\nAnswer:");
    assert_eq!(expected, Expected::Targets(vec!["A".into(), "B".into()]));
}

#[test]
fn examples_stand_before_the_question_with_their_answers() {
    let task = Task::open("mmlu").unwrap();
    let record = |subject: &str, question: &str, answer: u32| {
        doc(
            json!({ "subject": subject, "question": question, "choices": ["1", "2", "3", "4"], "answer": answer }),
        )
    };
    let pool = [record("a_b", "x", 2), record("c", "other", 0), record("a_b", "y", 1)];
    let request = task.request(0, &record("a_b", "z", 3), &pool, 2).unwrap();
    let (options, _) = choice(request);
    let question = |q: &str| format!("{q}\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:");
    let expected = format!(
        "The following are multiple choice questions (with answers) about a b.\n\n{} C\n\n{} B\n\n{}",
        question("x"),
        question("y"),
        question("z")
    );
    assert_eq!(options[0], (expected, " A".into()));
    let error = task.request(7, &record("a_b", "z", 3), &pool, 3).unwrap_err();
    assert_eq!(
        error.to_string(),
        "task mmlu, item 7, `shots`: expected 3 examples with the same subject, found 2"
    );

    let gsm8k = Task::open("gsm8k_cot").unwrap();
    let item = doc(json!({ "question": "How many?", "answer": "So 3.\n#### 3" }));
    let request = gsm8k.request(0, &item, gsm8k.shot_examples(), 8).unwrap();
    let Request::Generation { prompt, expected } = request else { panic!("{request:?}") };
    assert!(prompt.contains("There are 15 trees originally."));
    assert!(prompt.contains("33 golf balls. The answer is 33.\n\nQ: Olivia has $23."));
    assert!(prompt.ends_with("23 - 15 is 8. The answer is 8.\n\nQ: How many?\nA:"));
    assert_eq!(expected, Expected::Targets(vec!["3".into()]));
}

#[test]
fn malformed_tasks_are_refused_by_line_and_field() {
    let good = "name = \"t\"\nversion = 1\nkind = \"multiple_choice\"\nmetrics = [\"acc\"]\nfiles = [\"t.jsonl\"]\n\
        [[form]]\nneeds = [\"q\"]\nprompt = \"{{q}}\"\nchoices = \"c\"\ngold = \"g\"\n";
    Task::parse(good, "t.toml").unwrap();
    for (from, to, expected) in [
        ("version = 1", "version = \"1\"", "line 2"),
        ("version = 1", "", "missing field `version`"),
        ("files =", "fils =", "unknown field `fils`"),
        ("\"acc\"", "\"accuracy\"", "unknown variant `accuracy`"),
        ("\"acc\"", "\"exact_match\"", "`exact_match` is no metric of the kind `multiple_choice`"),
        ("[\"acc\"]", "[]", "`metrics`: expected at least one"),
        ("{{q}}", "{{q", "`form` 1, `prompt`"),
        ("\"c\"", "\"c[\"", "`form` 1, `choices`"),
        ("gold = \"g\"", "", "`form` 1: a multiple_choice has choices, gold, prompt"),
        ("\"multiple_choice\"", "\"generation\"", "no metric of the kind `generation`"),
        ("\"multiple_choice\"", "\"document\"", "no metric of the kind `document`"),
        ("name = \"t\"", "name = \"../t\"", "`name`: expected letters"),
    ] {
        assert!(good.contains(from));
        let error = Task::parse(&good.replace(from, to), "t.toml").unwrap_err().to_string();
        assert!(error.starts_with("task t.toml: ") && error.contains(expected), "{error}");
    }
    let error = Task::open("arc").unwrap_err().to_string();
    assert!(error.contains("no task `arc`") && error.contains("arc_easy"), "{error}");
}

#[test]
fn records_that_do_not_fit_are_named() {
    let task = Task::open("arc_easy").unwrap();
    let refused =
        |record: serde_json::Value| task.request(3, &doc(record), &[], 0).unwrap_err().to_string();
    let error = refused(json!({ "query": "x", "options": [] }));
    assert!(error.contains("item 3, `form`: expected the fields question, choices, answerKey; or query, choices, gold; found query, options"), "{error}");
    let error = refused(json!({ "query": "x", "choices": ["a", "b"], "gold": 2 }));
    assert!(
        error.contains("item 3, `gold`: expected 0 to 1, or one of `a`, `b`; found 2"),
        "{error}"
    );
    let error = refused(json!({ "query": "x", "choices": ["a", 7], "gold": 0 }));
    assert!(error.contains("`choices`: expected a list of strings"), "{error}");
}

/// A task of forty items whose right answers are spread evenly, one of them far too long.
fn items(dir: &Path) -> Task {
    let record = |i: usize| {
        let query = if i == 5 { "very ".repeat(900) } else { format!("What is {i} and more?") };
        let choices: Vec<String> =
            (0..4).map(|c| format!("answer {}", (i * 7 + c * 5) % 23)).collect();
        json!({ "query": query, "choices": choices, "gold": (i / 3) % 4 }).to_string() + "\n"
    };
    fs::write(dir.join("arc_easy.jsonl"), (0..40).map(record).collect::<String>()).unwrap();
    Task::open("arc_easy").unwrap()
}

fn evaluated(
    task: &Task,
    dir: &Path,
    model: &mut dyn LanguageModel,
    settings: Settings,
    store: &mut Store,
) {
    let tokenizer = Tokenizer::from_file(&fixture().join("tokenizer.json")).unwrap();
    let data = Data::open(task, dir, 0).unwrap();
    let evaluation = Evaluation {
        task,
        data: &data,
        tokenizer: &tokenizer,
        stop_ids: &[],
        template: None,
        sandbox: None,
        settings,
    };
    evaluation.run(model, store, &mut |_| {}).unwrap();
}

#[test]
fn an_interrupted_evaluation_goes_on_to_the_same_results() {
    let dir = tempfile::tempdir().unwrap();
    let task = items(dir.path());
    let model = Model::load(&ModelFile::open(&fixture()).unwrap()).unwrap();
    let limit = model.config().max_position_embeddings;
    let mut plain = OneByOne::new(limit, |ids: &[u32]| Session::new(&model).logits_of_all(ids));
    let mut whole = Store::in_memory();
    evaluated(&task, dir.path(), &mut plain, SETTINGS, &mut whole);

    let conditions = json!({});
    let out = dir.path().join("results");
    let mut runtime = RuntimeModel::new(&model);
    let mut store = Store::open(&out, "arc_easy", &conditions).unwrap();
    evaluated(
        &task,
        dir.path(),
        &mut runtime,
        Settings { limit: Some(11), ..SETTINGS },
        &mut store,
    );
    let before = runtime.work().computed;
    let mut store = Store::open(&out, "arc_easy", &conditions).unwrap();
    assert_eq!(store.first(99).len(), 11);
    evaluated(&task, dir.path(), &mut runtime, SETTINGS, &mut store);
    assert_eq!(store.first(99), whole.first(99));
    assert!(runtime.work().computed > before);
    let known = runtime.work().computed;
    evaluated(&task, dir.path(), &mut runtime, SETTINGS, &mut store);
    assert_eq!(runtime.work().computed, known);
}

#[test]
fn what_is_too_long_is_counted_and_cut_only_where_asked() {
    let dir = tempfile::tempdir().unwrap();
    let task = items(dir.path());
    let model = Model::load(&ModelFile::open(&fixture()).unwrap()).unwrap();
    let mut store = Store::in_memory();
    evaluated(&task, dir.path(), &mut RuntimeModel::new(&model), SETTINGS, &mut store);
    let summary = Summary::of(&store.first(40));
    assert_eq!((summary.items, summary.scored, summary.cut), (40, 39, 0));
    assert_eq!(summary.skipped["longer than the context"], 1);
    let mut store = Store::in_memory();
    let cut = Settings { too_long: TooLong::Cut, ..SETTINGS };
    evaluated(&task, dir.path(), &mut RuntimeModel::new(&model), cut, &mut store);
    let summary = Summary::of(&store.first(40));
    assert_eq!((summary.scored, summary.cut), (40, 1));
}

#[test]
fn a_model_that_knows_nothing_scores_its_chance() {
    let dir = tempfile::tempdir().unwrap();
    let record = |i: usize| {
        json!({ "query": format!("q {i}"), "choices": ["a b", "c d", "e f", "g h"], "gold": i % 4 })
            .to_string()
            + "\n"
    };
    fs::write(dir.path().join("arc_easy.jsonl"), (0..800).map(record).collect::<String>()).unwrap();
    // Logits that are a hash of the text: the same text, the same logits, and nothing else.
    let mut noise = OneByOne::new(512, |ids: &[u32]| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut logits = Vec::new();
        for id in ids {
            state = (state ^ u64::from(*id)).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(29);
            for v in 0..512_u64 {
                let mixed = (state ^ (v << 32)).wrapping_mul(0x94d0_49bb_1331_11eb);
                logits.push((mixed >> 40) as f32 / (1 << 22) as f32);
            }
        }
        Ok::<_, std::io::Error>(logits)
    });
    let task = Task::open("arc_easy").unwrap();
    let mut store = Store::in_memory();
    evaluated(&task, dir.path(), &mut noise, SETTINGS, &mut store);
    let records: Vec<&Record> = store.first(800);
    let summary = Summary::of(&records);
    assert_eq!(summary.chance, Some(0.25));
    let acc = summary.scores.iter().find(|score| score.metric == "acc").unwrap();
    let error = acc.stderr.unwrap();
    assert!((acc.value - 0.25).abs() < 3.0 * error && error < 0.02, "{acc:?}");
}

#[test]
fn generated_answers_are_judged() {
    let dir = tempfile::tempdir().unwrap();
    let questions = ["2 and 3", "4 and 4"]
        .map(|q| json!({ "question": q, "answer": "#### 8" }).to_string() + "\n");
    fs::write(dir.path().join("gsm8k.jsonl"), questions.concat()).unwrap();
    let tokenizer = Tokenizer::from_file(&fixture().join("tokenizer.json")).unwrap();
    // It writes the same answer to everything, then goes on with another question.
    let answer = tokenizer
        .encode(" That is 8. The answer is 8.\n\nQ: more? The answer is 9.", false)
        .unwrap();
    let (mut length, mut written) = (0, 0);
    let mut writer = OneByOne::new(9000, |ids: &[u32]| {
        written = if ids.len() == length + 1 { written + 1 } else { 0 };
        length = ids.len();
        let next = answer[written];
        let mut logits = vec![0.0; ids.len() * 512];
        let at = logits.len() - 512 + next as usize;
        logits[at] = 1.0;
        Ok::<_, std::io::Error>(logits)
    });
    let task = Task::open("gsm8k_cot").unwrap();
    let mut store = Store::in_memory();
    evaluated(&task, dir.path(), &mut writer, SETTINGS, &mut store);
    let records = store.first(2);
    assert_eq!(records[0].text.as_deref(), Some(" That is 8. The answer is 8.\n\n"));
    assert_eq!(records[0].scores["exact_match,strict-match"], 1.0);
    assert_eq!(records[1].extracted["flexible-extract"], "8.");
    assert_eq!(Summary::of(&records).scores[0].value, 1.0);
}

/// A model that writes `answer` and then the id `stop`, whatever it is asked.
fn writer(
    answer: &[u32],
    stop: u32,
    asked: Option<&std::cell::RefCell<Vec<Vec<u32>>>>,
) -> impl LanguageModel {
    let (mut length, mut written) = (0, 0);
    OneByOne::new(9000, move |ids: &[u32]| {
        let goes_on = ids.len() == length + 1 && written < answer.len();
        written = if goes_on { written + 1 } else { 0 };
        if let Some(asked) = asked.filter(|_| written == 0) {
            asked.borrow_mut().push(ids.to_vec());
        }
        length = ids.len();
        let next = answer.get(written).copied().unwrap_or(stop);
        let mut logits = vec![0.0; ids.len() * 512];
        let at = logits.len() - 512 + next as usize;
        logits[at] = 1.0;
        Ok::<_, std::io::Error>(logits)
    })
}

#[test]
fn instructions_are_scored_by_prompt_and_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let records = [
        json!({ "prompt": "Say so.", "instruction_id_list": ["punctuation:no_comma", "startend:quotation", "length_constraints:number_words"],
            "kwargs": [{}, {}, { "num_words": 3, "relation": "at least", "keywords": null }] }),
        json!({ "prompt": "Say it.", "instruction_id_list": ["keywords:existence"], "kwargs": [{ "keywords": ["YES"] }] }),
    ];
    let lines: String = records.iter().map(|record| record.to_string() + "\n").collect();
    fs::write(dir.path().join("ifeval.jsonl"), lines).unwrap();
    let tokenizer = Tokenizer::from_file(&fixture().join("tokenizer.json")).unwrap();
    let answer = tokenizer.encode("Sure, here:\n\"yes and no\"", false).unwrap();
    let stop = tokenizer.eos_id().unwrap();
    let task = Task::open("ifeval").unwrap();
    let data = Data::open(&task, dir.path(), 0).unwrap();
    let evaluate = |template: Option<&ChatTemplate>| {
        let asked = std::cell::RefCell::new(Vec::new());
        let mut store = Store::in_memory();
        let evaluation = Evaluation {
            task: &task,
            data: &data,
            tokenizer: &tokenizer,
            stop_ids: &[stop],
            template,
            sandbox: None,
            settings: SETTINGS,
        };
        let mut model = writer(&answer, stop, Some(&asked));
        evaluation.run(&mut model, &mut store, &mut |_| {}).unwrap();
        drop(model);
        (store, asked.into_inner())
    };
    let (store, asked) = evaluate(None);
    assert_eq!(tokenizer.decode(&asked[0], true).unwrap(), "Say so.");
    let summary = Summary::of(&store.first(2));
    let scores: Vec<(&str, f64)> =
        summary.scores.iter().map(|score| (&score.metric[..], score.value)).collect();
    assert_eq!(
        scores,
        [
            ("prompt_level_loose_acc", 1.0),
            ("prompt_level_strict_acc", 0.5),
            ("inst_level_loose_acc", 1.0),
            ("inst_level_strict_acc", 0.5),
        ]
    );
    assert_eq!(store.first(2)[0].followed["inst_level_strict_acc"], [false, false, true]);
    let template = ChatTemplate::new("User: {{ messages[0].content }}\nBot:").unwrap();
    let (_, asked) = evaluate(Some(&template));
    assert_eq!(tokenizer.decode(&asked[1], true).unwrap(), "User: Say it.\nBot:");
}

#[test]
fn programs_are_run_only_where_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let record = |name: &str, test: &str| {
        json!({ "prompt": format!("def {name}(x):\n"), "entry_point": name, "test": test })
            .to_string()
            + "\n"
    };
    let lines = record("f", "def check(f):\n    assert f(1) == 2")
        + &record("g", "def check(f):\n    assert f(1) == 3")
        + &record("h", "def check(f):\n    f('1')");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, lines.as_bytes()).unwrap();
    fs::write(dir.path().join("HumanEval.jsonl.gz"), encoder.finish().unwrap()).unwrap();
    let tokenizer = Tokenizer::from_file(&fixture().join("tokenizer.json")).unwrap();
    // What follows the function is not part of it.
    let answer = tokenizer.encode("    return x + 1\n\nprint(f(1), oops)", false).unwrap();
    let stop = tokenizer.eos_id().unwrap();
    let task = Task::open("humaneval").unwrap();
    let data = Data::open(&task, dir.path(), 0).unwrap();
    let evaluate = |sandbox: Option<&Sandbox>| {
        let mut store = Store::in_memory();
        let evaluation = Evaluation {
            task: &task,
            data: &data,
            tokenizer: &tokenizer,
            stop_ids: &[stop],
            template: None,
            sandbox,
            settings: SETTINGS,
        };
        evaluation.run(&mut writer(&answer, stop, None), &mut store, &mut |_| {}).map(|()| store)
    };
    let error = evaluate(None).unwrap_err().to_string();
    assert!(error.contains("--allow-code-execution"), "{error}");
    let sandbox = match Sandbox::open() {
        Ok(sandbox) => sandbox,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let store = evaluate(Some(&sandbox)).unwrap();
    let records = store.first(3);
    let how: Vec<&str> =
        records.iter().map(|record| record.execution.as_deref().unwrap()).collect();
    assert_eq!(how[..2], ["passed", "AssertionError"]);
    assert!(how[2].starts_with("TypeError"), "{how:?}");
    let scores = Summary::of(&records).scores;
    assert_eq!((&scores[0].metric[..], scores[0].value), ("pass@1", 1.0 / 3.0));
}

#[test]
fn every_solution_of_humaneval_passes() {
    let Some(data) = sets() else { return };
    let sandbox = match Sandbox::open() {
        Ok(sandbox) => sandbox,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let task = Task::open("humaneval").unwrap();
    let data = Data::open(&task, &data, 0).unwrap();
    assert_eq!(data.items.len(), 164);
    for (index, item) in data.items.iter().enumerate().step_by(8) {
        let run = |answer: &str| sandbox.run(&task.program(index, item, answer).unwrap()).unwrap();
        assert_eq!(run(item["canonical_solution"].as_str().unwrap()), Outcome::Passed, "{index}");
        assert_ne!(run("    return None\n"), Outcome::Passed, "{index}");
    }
}

/// Where the sets are, or a word that they are not.
fn sets() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let data = std::env::var_os("TRINE_DATA")
        .map_or(root.join("../shared/data"), PathBuf::from)
        .join("eval");
    if !data.is_dir() {
        eprintln!("skipped: no {}", data.display());
        return None;
    }
    Some(data)
}

#[test]
fn instructions_that_are_none_are_named_with_their_item() {
    let task = Task::open("ifeval").unwrap();
    let refused = |names: serde_json::Value, kwargs: serde_json::Value| {
        let record = json!({ "prompt": "p", "instruction_id_list": names, "kwargs": kwargs });
        task.request(4, &doc(record), &[], 0).unwrap_err().to_string()
    };
    let error = refused(json!(["keywords:existence"]), json!([{}]));
    assert_eq!(
        error,
        "task ifeval, item 4, `instructions`: keywords:existence, `keywords`: expected a list of texts, found nothing"
    );
    let error = refused(json!(["punctuation:no_comma"]), json!([]));
    assert!(error.contains("`arguments`: expected 1 objects in a list, found []"), "{error}");
    let error = refused(json!([]), json!([]));
    assert!(error.contains("`instructions`: expected at least one"), "{error}");
    let good = task.toml();
    for (from, to, expected) in [
        (
            "arguments = \"kwargs\"",
            "",
            "`form` 1: a generation has arguments, instructions, prompt; found instructions, prompt",
        ),
        ("[\"instructions\"]", "[\"exact_match\"]", "`form` 1: a generation has prompt, target;"),
        (
            "[\"instructions\"]",
            "[\"instructions\", \"exact_match\"]",
            "`instructions` stands alone",
        ),
    ] {
        assert!(good.contains(from));
        let error = Task::parse(&good.replace(from, to), "t.toml").unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn every_built_in_task_reads_the_sets_that_are_here() {
    let Some(data) = sets() else { return };
    // The articles of WikiText-2 are not among them.
    for name in task_names().filter(|name| *name != "wikitext") {
        let task = Task::open(name).unwrap();
        let shots = if task.shot_files().is_some() && name != "mmlu" { 0 } else { task.shots() };
        let data = Data::open(&task, &data, shots).unwrap();
        for (index, item) in data.items.iter().enumerate().step_by(10) {
            task.request(index, item, &data.shots, shots).unwrap();
        }
    }
}

#[test]
fn the_page_about_tasks_says_what_is_accepted() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/add-a-task.md");
    let page = fs::read_to_string(page).unwrap();
    let blocks: Vec<&str> =
        page.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    let task = Task::parse(blocks[0], "the page").unwrap();
    let record =
        json!({ "country": "Peru", "cities": ["Rome", "Lima"], "right": 1, "continent": "a" });
    let (options, gold) = choice(task.request(0, &doc(record.clone()), &[doc(record)], 1).unwrap());
    let question = "Question: What is the capital of Peru?\nAnswer:";
    assert_eq!(
        options[0],
        (format!("Geography.\n\n{question} Lima\n\n{question}"), " Rome".into())
    );
    assert_eq!(gold, [1]);
    let header = "name = \"t\"\nversion = 1\nkind = \"generation\"\nmetrics = [\"exact_match\"]\nfiles = [\"t.jsonl\"]\n";
    let form = "[[form]]\nneeds = []\nprompt = \"p\"\ntarget = \"t\"\n";
    Task::parse(&format!("{header}{}{form}", blocks[1]), "the page").unwrap();
}
