//! Scores of a model.

use std::io::BufReader;

use super::{FIXTURE, Place};

/// Thirty questions with four answers, of which one is far too long for the model.
fn with_items() -> Place {
    let place = Place::with_gguf();
    let line = |i: usize| {
        let query = if i == 9 { "so ".repeat(2000) } else { format!("What is {i} and {}?", i * i) };
        let choices = [1, 2, 3, 4].map(|c| format!("about {}", (i + 3) * c));
        serde_json::json!({ "query": query, "choices": choices, "gold": i % 4 }).to_string() + "\n"
    };
    std::fs::create_dir(place.path("sets")).unwrap();
    place.write("sets/arc_easy.jsonl", (0..30).map(line).collect::<String>());
    place
}

fn eval(place: &Place, args: &[&str]) -> serde_json::Value {
    let args = [&["eval"], args, &["--json"]].concat();
    serde_json::from_str(&place.ok(&args)).unwrap()
}

#[test]
fn scores_are_the_same_shared_and_one_by_one_and_in_every_format() {
    let place = with_items();
    let tasks = ["-t", "arc_easy", "--no-keep"];
    let found = eval(&place, &[&["model.gguf"], &tasks[..]].concat());
    let task = &found["models"][0]["tasks"]["arc_easy"];
    assert_eq!((&task["items"], &task["scored"]), (&30.into(), &29.into()));
    assert_eq!(task["skipped"]["longer than the context"], 1);
    assert_eq!((&task["chance"], &task["lm_eval_task"]), (&0.25.into(), &"arc_easy".into()));
    let stderr = task["metrics"]["acc_norm"]["stderr"].as_f64().unwrap();
    assert!(stderr > 0.01 && stderr < 0.12, "{task}");
    for other in [&[FIXTURE][..], &["model.gguf", "--one-by-one"], &["model.gguf", "--measure"]] {
        let same = eval(&place, &[other, &tasks].concat());
        assert_eq!(same["models"][0]["tasks"], found["models"][0]["tasks"]);
        let speed = &same["models"][0]["speed"];
        assert_eq!(speed.is_object(), other.contains(&"--measure"));
        if speed.is_object() {
            assert_eq!(speed["items"], 29);
            for key in ["times_one_by_one", "share_of_prefill", "one_by_one_items_per_second"] {
                assert!(speed[key].as_f64().unwrap() > 0.0, "{speed}");
            }
        }
    }
    assert!(!place.exists("evals"));
}

#[test]
fn results_are_kept_and_an_interrupted_evaluation_goes_on() {
    let place = with_items();
    let args = ["eval", "model.gguf", "-t", "arc_easy", "-d", "sets", "-o", "kept"];
    let first = place.run(&[&args[..], &["--limit", "7"]].concat());
    assert!(first.stderr.contains("7 items"), "{}", first.stderr);
    let whole = place.run(&args);
    assert!(whole.stderr.contains("23 items") && whole.stderr.contains("7 known before"));
    let again = place.run(&args);
    assert!(again.stderr.contains("0 items") && again.stderr.contains("30 known before"));
    assert_eq!(again.stdout, whole.stdout);
    assert!(whole.stdout.contains("of 30 items 1 left out (longer than the context)"));
    assert_eq!(place.ok(&[&args[..4], &["--no-keep"]].concat()), whole.stdout);
    // Another way to hold keys and values is another evaluation.
    let other = place.run(&[&args[..], &["--kv", "int8"]].concat());
    assert!(other.stderr.contains("30 items"), "{}", other.stderr);
    assert_eq!(std::fs::read_dir(place.path("kept")).unwrap().count(), 2);
}

#[test]
fn two_models_are_compared_on_the_same_items() {
    let place = with_items();
    let other = FIXTURE.replace("tied-h64", "untied-h192");
    let args = ["model.gguf", &other, "-t", "arc_easy", "--reference"];
    let found = eval(&place, &args);
    let (a, b) =
        (&found["models"][0]["tasks"]["arc_easy"], &found["models"][1]["tasks"]["arc_easy"]);
    let value = |task: &serde_json::Value| task["metrics"]["acc"]["value"].as_f64().unwrap();
    let compared = &found["comparison"]["arc_easy"]["acc"];
    let items = compared["items"].as_u64().unwrap();
    assert!(items >= 28, "{compared}");
    let difference = compared["difference"].as_f64().unwrap();
    if a["scored"] == b["scored"] {
        assert!((difference - (value(b) - value(a))).abs() < 1e-9, "{found}");
    }
    let p = compared["p"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&p), "{compared}");
    let same = eval(&place, &["model.gguf", FIXTURE, "-t", "arc_easy"]);
    assert_eq!(same["comparison"]["arc_easy"]["acc"]["difference"], 0.0);
    assert_eq!(same["comparison"]["arc_easy"]["acc"]["p"], 1.0);
    let table = place.ok(&[&["eval"], &args[..]].concat());
    for part in ["± error", "BitNet 2B4T", "74.79", "95 % interval", "arXiv 2504.12285"] {
        assert!(table.contains(part), "{part}: {table}");
    }
}

#[test]
fn texts_have_a_perplexity_that_more_context_changes() {
    let place = Place::with_gguf();
    let text = "It was the best of times, it was the worst of times.\n".repeat(40);
    place.write("a.txt", &text);
    let measure = |options: &[&str]| {
        let found = eval(&place, &[&["model.gguf", "--text", "a.txt"], options].concat());
        found["models"][0]["texts"][0].clone()
    };
    let found = measure(&["--window", "64"]);
    let number = |found: &serde_json::Value, key: &str| found[key].as_f64().unwrap();
    assert_eq!((&found["bytes"], &found["words"]), (&text.len().into(), &(12 * 40).into()));
    assert_eq!((&found["window"], &found["stride"]), (&64.into(), &64.into()));
    let nats = -number(&found, "log_likelihood");
    let bits = nats / text.len() as f64 / std::f64::consts::LN_2;
    assert!((number(&found, "bits_per_byte") - bits).abs() < 1e-12);
    let tokens = number(&found, "tokens");
    assert!((number(&found, "token_perplexity").ln() - nats / tokens).abs() < 1e-9);
    let slower = measure(&["--window", "64", "--stride", "16"]);
    assert_eq!(slower["tokens"], found["tokens"]);
    assert_ne!(slower["log_likelihood"], found["log_likelihood"]);
    let plain = measure(&["--window", "64", "--one-by-one"]);
    assert_eq!(plain["log_likelihood"], found["log_likelihood"]);
    place.refused(
        &["eval", "model.gguf", "--text", "a.txt", "--window", "9999"],
        &["a.txt", "window 9999: expected 1 to 512"],
    );
}

#[test]
fn documents_are_predicted_in_windows() {
    let place = Place::with_gguf();
    let page = " = A = \\n It was the best of times . ".repeat(20);
    place.write("wikitext.jsonl", format!("{{\"page\":\"{page}\"}}\n"));
    let args = ["model.gguf", "-t", "wikitext", "-o", "kept"];
    let found = eval(&place, &args);
    let task = &found["models"][0]["tasks"]["wikitext"];
    let value = |task: &serde_json::Value, name: &str| {
        task["metrics"][name]["value"].as_f64().unwrap_or(f64::NAN)
    };
    assert!((value(task, "bits_per_byte") - value(task, "byte_perplexity").log2()).abs() < 1e-9);
    let small = eval(&place, &[&args[..], &["--window", "32"]].concat());
    let small = &small["models"][0]["tasks"]["wikitext"];
    assert_ne!(value(small, "word_perplexity"), value(task, "word_perplexity"));
    assert_eq!(std::fs::read_dir(place.path("kept")).unwrap().count(), 2);
    let table = place.ok(&[&["eval"], &args[..]].concat());
    assert!(table.contains("| bits_per_byte") && !table.contains('%'), "{table}");
    place.refused_later(
        &[&["eval"], &args[..], &["--window", "9999"]].concat(),
        &["window 9999: expected 1 to 512"],
    );
}

#[test]
fn a_task_of_ones_own_is_a_file() {
    let place = Place::with_gguf();
    let task = r#"
        name = "capitals"
        version = 3
        kind = "continuation"
        metrics = ["perplexity", "acc"]
        files = ["capitals.jsonl"]
        [[form]]
        needs = ["country", "city"]
        prompt = "The capital of {{country}} is"
        target = " {{city}}"
    "#;
    place.write("capitals.toml", task);
    place.write(
        "capitals.jsonl",
        "{\"country\":\"France\",\"city\":\"Paris\"}\n{\"country\":\"Peru\",\"city\":\"Lima\"}\n",
    );
    let found = eval(&place, &["model.gguf", "-t", "capitals.toml"]);
    let task = &found["models"][0]["tasks"]["capitals"];
    assert_eq!((&task["version"], &task["scored"]), (&3.into(), &2.into()));
    assert!(task["metrics"]["perplexity"]["value"].as_f64().unwrap() > 1.0);
    place.edit("capitals.toml", "{{city}}", "{{town}}");
    place.refused_later(
        &["eval", "model.gguf", "-t", "capitals.toml"],
        &["capitals, item 0, `target`", "undefined"],
    );
    place.edit("capitals.toml", "version = 3", "version = 3\ncolour = 1");
    place.refused(&["eval", "model.gguf", "-t", "capitals.toml"], &["capitals.toml", "colour"]);
}

#[test]
fn what_cannot_be_evaluated_is_refused_before_a_model_is_loaded() {
    let place = Place::new();
    place.refused(&["eval", "none.gguf"], &["--tasks", "--text"]);
    place.refused(&["eval", "none.gguf", "-t", "arc"], &["no task `arc`", "arc_easy"]);
    place.refused(
        &["eval", "none.gguf", "-t", "piqa"],
        &["no piqa.jsonl in .", "load_dataset(\"baber/piqa\""],
    );
    place.refused(&["eval", "none.gguf", "--text", "none.txt"], &["none.txt"]);
    let list = place.ok(&["eval", "--list"]);
    assert!(list.contains("| hellaswag ") && list.contains("minerva_math500"), "{list}");
}

#[test]
fn a_model_is_compared_with_itself_and_an_adapter() {
    let place = with_items();
    super::adapters::write_adapter(&place.path("law"), FIXTURE, 1);
    let tasks = ["-t", "arc_easy", "-d", "sets", "-o", "kept"];
    let both =
        eval(&place, &[&["model.gguf", "model.gguf", "--adapter", "law"], &tasks[..]].concat());
    let without = eval(&place, &[&["model.gguf"], &tasks[..]].concat());
    let with = eval(&place, &[&["model.gguf", "--adapter", "law"], &tasks[..]].concat());
    // Results are kept apart: one file for each, which are found again.
    assert_eq!(std::fs::read_dir(place.path("kept")).unwrap().count(), 2);
    let tasks_of = |found: &serde_json::Value, i: usize| found["models"][i]["tasks"].clone();
    assert_eq!(
        tasks_of(&both, 0)["arc_easy"]["metrics"],
        tasks_of(&without, 0)["arc_easy"]["metrics"]
    );
    assert_eq!(
        tasks_of(&both, 1)["arc_easy"]["metrics"],
        tasks_of(&with, 0)["arc_easy"]["metrics"]
    );
    assert_eq!(
        (&both["models"][0]["adapter"], &both["models"][1]["adapter"]),
        (&serde_json::Value::Null, &"law".into())
    );
    let one = ["model.gguf", "--adapter", "law", "--one-by-one", "--no-keep"];
    let one = eval(&place, &[&one[..], &["-t", "arc_easy", "-d", "sets"]].concat());
    assert_eq!(tasks_of(&one, 0)["arc_easy"]["metrics"], tasks_of(&with, 0)["arc_easy"]["metrics"]);
    // Likelihoods differ, even where both choose the same answers.
    let kept = std::fs::read_dir(place.path("kept")).unwrap();
    let texts: Vec<String> =
        kept.map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap()).collect();
    let first = |text: &str| text.lines().nth(1).unwrap().to_owned();
    assert_ne!(first(&texts[0]), first(&texts[1]));
}

#[test]
fn a_model_behind_an_address_scores_as_it_does_here() {
    let place = with_items();
    let mut child = super::serve::start(&place, &["--kv", "f32"]);
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let address = format!("http://{}/v1", super::serve::address(&mut stderr));
    let tokenizer = format!("{FIXTURE}/tokenizer.json");
    let tasks = ["-t", "arc_easy", "-d", "sets", "-o", "kept"];
    let there = eval(&place, &[&[&address[..], "--tokenizer", &tokenizer], &tasks[..]].concat());
    let here = eval(&place, &[&[FIXTURE], &tasks[..]].concat());
    let task = |found: &serde_json::Value| found["models"][0]["tasks"]["arc_easy"].clone();
    assert_eq!(task(&there)["metrics"], task(&here)["metrics"]);
    assert_eq!(task(&there)["skipped"], task(&here)["skipped"]);
    assert_eq!(there["models"][0]["model"], address);
    assert_ne!(task(&there)["results"], task(&here)["results"]);
    place.refused(&["eval", &address, "-t", "arc_easy"], &["--tokenizer"]);
    let options = ["--tokenizer", &tokenizer, "--adapter", "law"];
    place.refused(&[&["eval", &address, "-t", "arc_easy"], &options[..]].concat(), &["--adapter"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn instructions_are_given_in_the_chat_template() {
    let place = Place::with_gguf();
    let lines = [
        serde_json::json!({ "prompt": "Go.", "names": ["punctuation:no_comma"], "with": [{}] }),
        serde_json::json!({ "prompt": "Be.", "names": ["startend:quotation", "language:response_language"], "with": [{}, { "language": "de" }] }),
    ];
    place.write("obey.jsonl", lines.map(|line| line.to_string() + "\n").concat());
    place.write(
        "obey.toml",
        "name = \"obey\"\nversion = 1\nkind = \"generation\"\nmetrics = [\"instructions\"]\nfiles = [\"obey.jsonl\"]\n\
         [generation]\nmax_tokens = 12\nuntil = []\nchat = true\n\
         [[form]]\nneeds = [\"prompt\"]\nprompt = \"{{prompt}}\"\ninstructions = \"names\"\narguments = \"with\"\n",
    );
    let args = ["model.gguf", "-t", "obey.toml", "-o", "kept"];
    let chat = eval(&place, &args);
    let task = &chat["models"][0]["tasks"]["obey"];
    assert_eq!(task["chat_template"], true);
    let metrics = task["metrics"].as_object().unwrap();
    let names: Vec<&String> = metrics.keys().collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(metrics["inst_level_strict_acc"]["stderr"].is_number());
    // Without the template the model is asked, and writes, something else.
    let plain = eval(&place, &[&args[..], &["--chat", "never"]].concat());
    assert_eq!(plain["models"][0]["tasks"]["obey"]["chat_template"], false);
    let text = |found: &serde_json::Value| {
        let path = found["models"][0]["tasks"]["obey"]["results"].as_str().unwrap().to_owned();
        let text = std::fs::read_to_string(place.path(&path)).unwrap();
        let record = text.lines().nth(1).unwrap().to_owned();
        serde_json::from_str::<serde_json::Value>(&record).unwrap()["text"].clone()
    };
    assert_ne!(text(&chat), text(&plain));
    let both = eval(&place, &[&["model.gguf"], &args[..]].concat());
    let difference = &both["comparison"]["obey"]["inst_level_strict_acc"]["difference"];
    assert_eq!(*difference, 0.0);
}

#[test]
fn programs_of_a_model_run_only_where_that_is_allowed() {
    let place = Place::with_gguf();
    let line = |test: &str| serde_json::json!({ "prompt": "x = 1 #", "test": test }).to_string();
    place.write("code.jsonl", line("assert x == 1") + "\n" + &line("assert x == 2") + "\n");
    place.write(
        "code.toml",
        "name = \"code\"\nversion = 1\nkind = \"generation\"\nmetrics = [\"pass@1\"]\nfiles = [\"code.jsonl\"]\n\
         [generation]\nmax_tokens = 4\nuntil = [\"\\n\"]\n\
         [[form]]\nneeds = [\"prompt\", \"test\"]\nprompt = \"{{prompt}}\"\nprogram = \"{{prompt}}{{completion | length}}\\n{{test}}\"\n",
    );
    let refusal = ["code", "--allow-code-execution", "container"];
    place.refused(&["eval", "none.gguf", "-t", "code.toml"], &refusal);
    if std::process::Command::new("python3").arg("-V").output().is_err() {
        return eprintln!("skipped: no python3");
    }
    let args = ["model.gguf", "-t", "code.toml", "--allow-code-execution"];
    let found = eval(&place, &args);
    assert_eq!(found["models"][0]["tasks"]["code"]["metrics"]["pass@1"]["value"], 0.5);
}
