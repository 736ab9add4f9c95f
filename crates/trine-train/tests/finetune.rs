//! Runs that begin with a trained model: adapters beside it, or its masters.

#![allow(clippy::unwrap_used)]

mod common;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use trine_data::Dataset;
use trine_data::chats::{ChatOptions, TooLong};
use trine_format::peft::Lora;
use trine_format::{ModelFile, Projection, Weight};
use trine_tokenizer::Tokenizer;
use trine_train::config::Objective;
use trine_train::parallel::Threads;
use trine_train::{Base, RunConfig, TrainError, Trainer};

use common::Watch;

const TEMPLATE: &str = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}";

/// A small model that was trained, with a template; and conversations.
fn base(dir: &Path) -> PathBuf {
    let text = "user: the cat sat on the mat\nassistant: and the dog ate the hat\n".repeat(40);
    let tokenizer = Tokenizer::characters(&text).unwrap();
    let config = "
        name = 'base'
        seed = 3
        [model]
        hidden_size = 64
        intermediate_size = 96
        num_hidden_layers = 2
        num_attention_heads = 2
        num_key_value_heads = 1
        max_position_embeddings = 128
        [data]
        seq_len = 32
        [optimizer]
        learning_rate = 3e-3
        [train]
        steps = 30
        batch_size = 4
        eval_every = 30
        checkpoint_every = 30
    ";
    let run = dir.join("base");
    fs::create_dir_all(run.join("data")).unwrap();
    let data = Dataset::from_text(&run.join("data"), &tokenizer, &text, 0.1).unwrap();
    let config = RunConfig::parse(config, Path::new("base.toml"), &[]).unwrap();
    let mut trainer = Trainer::create(config, data, &run).unwrap();
    let checkpoint = trainer.run(&mut Watch::default()).unwrap().checkpoint;
    fs::write(dir.join("template.jinja"), TEMPLATE).unwrap();
    checkpoint
}

fn config(dir: &Path, base: &Path, settings: &[&str]) -> RunConfig {
    let text = format!(
        "name = 'tuned'
        [finetune]
        base = {base:?}
        chat_template = {:?}
        [finetune.lora]
        rank = 4
        [data]
        seq_len = 64
        val_fraction = 0.2
        [optimizer]
        learning_rate = 5e-3
        [train]
        steps = 10
        batch_size = 4
        eval_every = 5
        checkpoint_every = 5
        ",
        dir.join("template.jinja")
    );
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::parse(&text, Path::new("tuned.toml"), &settings).unwrap()
}

/// The data of a run, made in its directory.
fn data(base: &Base, config: &RunConfig, run: &Path) -> Dataset {
    let words = ["cat", "mat", "dog", "hat", "the", "ate"];
    let preferences = config.finetune.as_ref().unwrap().objective == Objective::Dpo;
    let mut lines = String::new();
    for i in 0..40 {
        let (a, b) = (words[i % 6], words[(i / 6) % 6]);
        let answers = match preferences {
            true => format!("\"chosen\":\"{b} and {a}\",\"rejected\":\"and the {a}\""),
            false => format!("\"completion\":\"{b} and {a}\""),
        };
        writeln!(lines, "{{\"prompt\":\"the {a} the {b}\",{answers}}}").unwrap();
    }
    fs::create_dir_all(run).unwrap();
    let path = run.join("chats.jsonl");
    fs::write(&path, lines).unwrap();
    let (tokenizer, template) = (base.tokenizer().unwrap(), base.template().unwrap());
    let options = ChatOptions {
        template: template.as_ref(),
        seq_len: 64,
        val_fraction: 0.2,
        too_long: TooLong::Refuse,
        preferences,
    };
    let dir = run.join("data");
    Dataset::from_chats(&dir, &tokenizer, &[path], options, &mut |_| {}).unwrap().0
}

/// The losses of a run, which is stopped and taken up after some steps.
fn train(config: &RunConfig, base: &Path, run: &Path, stop_after: Option<usize>) -> Watch {
    let opened = || Base::open(base, config).unwrap();
    let made = data(&opened(), config, run);
    let mut trainer = Trainer::finetune(config.clone(), made, opened(), run).unwrap();
    let mut watch = Watch { stop_after, ..Watch::default() };
    let outcome = trainer.run(&mut watch).unwrap();
    if !outcome.finished {
        drop(trainer);
        let made = Dataset::open(&run.join("data")).unwrap();
        let mut trainer = Trainer::resume_finetune(config.clone(), made, opened(), run).unwrap();
        watch.stop_after = None;
        assert!(trainer.run(&mut watch).unwrap().finished);
    }
    watch
}

#[test]
fn every_way_learns_and_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for (i, ways) in [
        &[][..],
        &["finetune.lora.dropout=0.2", "train.accumulate=2", "samples.every=5"],
        &["finetune.method=full", "finetune.loss=sum", "optimizer.clip_grad_norm=0"],
        &["finetune.lora.targets=['q_proj','down_proj']", "train.recompute_activations=true"],
    ]
    .into_iter()
    .enumerate()
    {
        let ways = [ways, &["samples.prompts=['user: the cat']", "samples.max_tokens=4"]].concat();
        let config = config(dir.path(), &base, &ways);
        let run = |name: &str| dir.path().join(format!("{name}-{i}"));
        let whole = train(&config, &base, &run("whole"), None);
        let parts = train(&config, &base, &run("parts"), Some(4));
        assert_eq!(whole.losses, parts.losses, "{ways:?}");
        let (first, last) = (whole.losses[0], whole.validations[1]);
        assert!(last < first - 0.05, "{ways:?}: from {first} to {last}");
    }
}

#[test]
fn adapters_are_trained_on_a_card_as_on_a_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    // Masters of bf16 are rounded by other chances there.
    for (masters, within) in [("f32", 1e-3), ("bf16", 2e-2)] {
        let on = |device: &str| {
            let settings = [
                "train.precision=f32",
                "train.accumulate=2",
                "finetune.lora.rank=3",
                "finetune.lora.dropout=0.2",
                "samples.every=5",
                "samples.prompts=['the ']",
                &format!("optimizer.masters={masters}"),
                &format!("train.device={device}"),
            ];
            config(dir.path(), &base, &settings)
        };
        let run = |name: &str| dir.path().join(format!("{name}-{masters}"));
        let of_cpu = train(&on("cpu"), &base, &run("cpu"), None);
        let whole = train(&on("emulator"), &base, &run("card"), None);
        let taken_up = train(&on("emulator"), &base, &run("again"), Some(5));
        assert_eq!(taken_up.losses, whole.losses);
        assert_eq!(taken_up.validations, whole.validations);
        close(&whole.losses, &of_cpu.losses, within);
        close(&whole.validations, &of_cpu.validations, within);
        assert!(whole.validations[1] < whole.validations[0]);
        assert_eq!(whole.samples.len(), 2);

        if masters == "bf16" {
            continue;
        }
        // The first half on a card, the second on a CPU.
        let run = run("moved");
        let opened = || Base::open(&base, &on("cpu")).unwrap();
        let made = data(&opened(), &on("cpu"), &run);
        let mut first = Watch { stop_after: Some(5), ..Watch::default() };
        let mut trainer = Trainer::finetune(on("emulator"), made, opened(), &run).unwrap();
        assert!(trainer.device().is_some());
        trainer.run(&mut first).unwrap();
        let made = Dataset::open(&run.join("data")).unwrap();
        let mut rest = Watch::default();
        let mut trainer = Trainer::resume_finetune(on("cpu"), made, opened(), &run).unwrap();
        trainer.run(&mut rest).unwrap();
        close(&[first.losses, rest.losses].concat(), &of_cpu.losses, within);
    }
}

fn close(found: &[f32], expected: &[f32], within: f32) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found / expected - 1.0).abs() < within, "{found} for {expected}");
    }
}

#[test]
fn better_answers_gain_on_worse_ones() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for method in ["lora", "full"] {
        let method = format!("finetune.method={method}");
        let ways = ["finetune.objective=dpo", &method, "train.accumulate=2", "train.batch_size=6"];
        let config = config(dir.path(), &base, &ways);
        let run = |name: &str| dir.path().join(format!("{name}-{method}"));
        let whole = train(&config, &base, &run("whole"), None);
        let parts = train(&config, &base, &run("parts"), Some(7));
        assert_eq!(whole.losses, parts.losses, "{method}");
        // Nothing has gained on anything before the first step.
        assert!((whole.losses[0] - 2f32.ln()).abs() < 1e-5, "{method}: {}", whole.losses[0]);
        assert!(whole.validations[1] < 0.66, "{method}: {:?}", whole.validations);
        let lines = fs::read_to_string(run("whole").join("metrics.jsonl")).unwrap();
        let last: serde_json::Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        assert!(last["val_accuracy"].as_f64().unwrap() > 0.7, "{method}: {last}");
    }
    // Preferences after answers: compared with what the adapter was in the beginning.
    let tuned = config(dir.path(), &base, &["finetune.lora.rank=2"]);
    train(&tuned, &base, &dir.path().join("tuned"), None);
    let adapter = dir.path().join("tuned/checkpoints/step-000010");
    let named = format!("finetune.adapter={}", adapter.display());
    let ways = ["finetune.objective=dpo", &named, "finetune.lora.rank=2"];
    let with_adapter = |settings: &[&str]| {
        let config = config(dir.path(), &base, settings);
        let opened = Base::open(&base, &config).unwrap().with_adapter(&adapter);
        opened.map(|opened| (config, opened))
    };
    let (tuning, opened) = with_adapter(&ways).unwrap();
    let run = dir.path().join("preferred");
    let made = data(&opened, &tuning, &run);
    let mut watch = Watch::default();
    Trainer::finetune(tuning, made, opened, &run).unwrap().run(&mut watch).unwrap();
    assert!((watch.losses[0] - 2f32.ln()).abs() < 1e-5, "{}", watch.losses[0]);
    assert!(watch.validations[1] < 0.68, "{:?}", watch.validations);
    let error = with_adapter(&[&named]).err().unwrap().to_string();
    assert!(error.contains("`finetune.lora.rank`") && error.contains("found 4"), "{error}");

    // Data of one kind is not taken for the other.
    let sft = config(dir.path(), &base, &[]);
    let opened = Base::open(&base, &sft).unwrap();
    let made = Dataset::open(&dir.path().join("whole-finetune.method=lora/data")).unwrap();
    let created = Trainer::finetune(sft, made, opened, &dir.path().join("new"));
    assert!(created.err().unwrap().to_string().contains("`finetune.objective`"));
}

#[test]
fn adapters_are_saved_and_the_base_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    let config = config(dir.path(), &base, &["finetune.lora.targets=['q_proj','up_proj']"]);
    let run = dir.path().join("run");
    train(&config, &base, &run, None);
    let model = ModelFile::open(&base).unwrap();
    let checkpoint = run.join("checkpoints/step-000010");
    let lora = Lora::read(&checkpoint, model.config()).unwrap();
    assert_eq!((lora.rank, lora.alpha), (4, 32.0));
    assert_eq!(lora.targets, [Projection::Q, Projection::Up]);
    assert_eq!(lora.base.as_deref(), base.to_str());
    assert!(lora.matrices.values().all(|[_, b]| b.iter().any(|b| *b != 0.0)));
    assert!(!checkpoint.join("model.safetensors").exists());
    let text = fs::read_to_string(checkpoint.join("tokenizer_config.json")).unwrap();
    assert!(text.contains("add_generation_prompt"), "{text}");
}

/// Trits that flipped between two models, of all.
fn flipped(a: &Path, b: &Path) -> (usize, usize) {
    let (a, b) = (ModelFile::open(a).unwrap(), ModelFile::open(b).unwrap());
    let (mut flipped, mut all) = (0, 0);
    for layer in 0..a.config().num_hidden_layers {
        for p in Projection::ALL {
            let trits = |file: &ModelFile| match file.projection(layer, p).unwrap() {
                Weight::Ternary(matrix) => matrix.trits(),
                Weight::Dense(_) => panic!("expected trits"),
            };
            let (a, b) = (trits(&a), trits(&b));
            flipped += a.iter().zip(&b).filter(|(a, b)| a != b).count();
            all += a.len();
        }
    }
    (flipped, all)
}

#[test]
fn masters_move_from_where_they_were_and_packed_trits_begin_as_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    let packed = dir.path().join("packed");
    let file = ModelFile::open(&base).unwrap();
    trine_format::write_hf_packed(&packed, file.config(), &file, file.tokenizer()).unwrap();
    let settings = ["finetune.method=full", "train.steps=5", "optimizer.learning_rate=2e-3"];
    let mut first = Vec::new();
    for (name, from) in [("masters", &base), ("packed", &packed)] {
        let config = config(dir.path(), from, &settings);
        let run = dir.path().join(name);
        let watch = train(&config, from, &run, None);
        let after = run.join("checkpoints/step-000005");
        let (flips, all) = flipped(from, &after);
        // Masters that are made of trits alone begin far from where these flip.
        let learns = flips > 0 && watch.losses[4] < watch.losses[0];
        assert!(learns || name == "packed", "{flips} flips, {:?}", watch.losses);
        assert!(flips < all / 4, "{name}: {flips} of {all}");
        assert_eq!(Base::open(from, &config).unwrap().has_masters(), name == "masters");
        first.push(watch.losses[0]);
    }
    assert!((first[0] - first[1]).abs() < 0.02, "{first:?}");
}

#[test]
fn a_full_precision_model_becomes_ternary() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    // Masters that are taken for full precision.
    let json = base.join("config.json");
    let mut keys: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    keys.as_object_mut().unwrap().remove("quantization_config");
    fs::write(&json, keys.to_string()).unwrap();
    let full = ["finetune.method=full", "finetune.ternarize=true"];
    for (name, way) in [
        ("lambda", "quantizer.lambda_steps=4"),
        ("distilled", "finetune.distill={temperature=3.0}"),
        ("related", "finetune.distill={relations={teacher_layer=0}}"),
        ("warmed", "finetune.distill={} quantizer.lambda_steps=4"),
    ] {
        let ways: Vec<&str> = way.split(' ').collect();
        let config = config(dir.path(), &base, &[&full[..], &ways].concat());
        let watch = train(&config, &base, &dir.path().join(name), Some(7));
        assert!(watch.validations[1] < watch.losses[0], "{name}: {:?}", watch.validations);
        let made = dir.path().join(name).join("checkpoints/step-000010");
        let made = ModelFile::open(&made).unwrap();
        assert!(matches!(made.projection(0, Projection::Q).unwrap(), Weight::Ternary(_)));
    }
    for (run, key) in [("distilled", "\"divergence\""), ("related", "\"relations_divergence\"")] {
        let lines = fs::read_to_string(dir.path().join(run).join("metrics.jsonl")).unwrap();
        assert_eq!(lines.matches(key).count(), 10);
    }
}

#[test]
fn what_a_teacher_said_is_not_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let (base, said) = (base(dir.path()), dir.path().join("said"));
    let cache = format!("finetune.distill={{cache={said:?},top_k=4}}");
    let config = |more: &[&str]| {
        config(dir.path(), &base, &[&["finetune.method=full", cache.as_str()], more].concat())
    };
    let first = train(&config(&[]), &base, &dir.path().join("first"), Some(7));
    let written = fs::read(&said).unwrap();
    let second = train(&config(&[]), &base, &dir.path().join("second"), None);
    assert_eq!((&first.losses, &first.validations), (&second.losses, &second.validations));
    assert_eq!(fs::read(&said).unwrap(), written);
    // A run of other sequences adds to it.
    train(&config(&["train.steps=20"]), &base, &dir.path().join("third"), None);
    assert!(fs::read(&said).unwrap().starts_with(&written));

    let refused = |setting: &str| {
        let config = config(&[setting]);
        let opened = || Base::open(&base, &config).unwrap();
        let data = data(&opened(), &config, &dir.path().join("refused"));
        let run = dir.path().join("refused");
        Trainer::finetune(config.clone(), data, opened(), &run).err().unwrap().to_string()
    };
    let other = refused("finetune.distill.temperature=1.5");
    assert!(other.contains("finetune.distill.temperature: expected 1.5, found 2"), "{other}");
    assert!(refused("finetune.distill.top_k=4000").contains("finetune.distill.top_k"));
    let relations = "finetune.distill={relations={layer=2}}";
    assert!(refused(relations).contains("a layer from -2 to 1, found 2"));
    let relations = "finetune.distill={relations={heads=7}}";
    assert!(refused(relations).contains("finetune.distill.relations.heads"));
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    let open = |settings: &[&str]| Base::open(&base, &config(dir.path(), &base, settings));
    let refused = |settings: &[&str]| open(settings).err().unwrap().to_string();
    assert!(refused(&["data.seq_len=129"]).contains("128 positions"));
    let full = "finetune.method=full";
    assert!(refused(&[full, "finetune.ternarize=true"]).contains("ternary already"));
    assert!(refused(&[full, "finetune.add_sub_norms=true"]).contains("sub-norms already"));
    assert!(refused(&["finetune.chat_template=nowhere.jinja"]).contains("nowhere.jinja"));

    // Another base than the run began with, or another tokenizer than the model's.
    let (run, config) = (dir.path().join("run"), config(dir.path(), &base, &["train.steps=5"]));
    train(&config, &base, &run, None);
    let text = fs::read_to_string(run.join("run.json")).unwrap();
    let hash = open(&[]).unwrap().hash().to_owned();
    fs::write(run.join("run.json"), text.replace(&hash, "0123")).unwrap();
    let error = |data: Dataset, config: &RunConfig| -> TrainError {
        let base = Base::open(&base, config).unwrap();
        Trainer::resume_finetune(config.clone(), data, base, &run).err().unwrap()
    };
    let data = || Dataset::open(&run.join("data")).unwrap();
    let message = error(data(), &config).to_string();
    assert!(message.contains("the model it began with") && message.contains("0123"), "{message}");
    let other = Tokenizer::characters("abc").unwrap();
    let other = Dataset::from_text(&dir.path().join("other"), &other, &"abc".repeat(99), 0.5);
    let created = Trainer::finetune(
        config.clone(),
        other.unwrap(),
        Base::open(&base, &config).unwrap(),
        &dir.path().join("new"),
    );
    let message = created.err().unwrap().to_string();
    assert!(message.contains("another tokenizer"), "{message}");
    // A section without a model.
    let created = Trainer::create(config.clone(), data(), &dir.path().join("new"));
    assert!(created.err().unwrap().to_string().contains("`finetune`"));
}

/// The losses of a run of two processes, each a thread, or why there is none.
fn train_by_two(config: &RunConfig, base: &Path, run: &Path) -> Vec<Result<Vec<f32>, TrainError>> {
    data(&Base::open(base, config).unwrap(), config, run);
    let one = |group: Threads| {
        let (base, made) = (Base::open(base, config)?, Dataset::open(&run.join("data"))?);
        let builder = Trainer::builder().group(Arc::new(group));
        let mut trainer = builder.finetune(config.clone(), made, base, run)?;
        let mut watch = Watch::default();
        trainer.run(&mut watch)?;
        Ok(watch.losses)
    };
    thread::scope(|scope| {
        let (members, one) = (Threads::group(2), &one);
        let members: Vec<_> =
            members.into_iter().map(|member| scope.spawn(move || one(member))).collect();
        members.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

#[test]
fn two_processes_tune_what_one_tunes() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for (i, ways) in [
        &["train.precision=f32"][..],
        &["train.precision=f32", "finetune.method=full", "optimizer.learning_rate=1e-3"],
        &["train.precision=f32", "finetune.loss=sum", "train.accumulate=4"],
        &["train.precision=f32", "train.device=emulator"],
    ]
    .into_iter()
    .enumerate()
    {
        let config = config(dir.path(), &base, ways);
        let expected = train(&config, &base, &dir.path().join(format!("one-{i}")), None).losses;
        for found in train_by_two(&config, &base, &dir.path().join(format!("two-{i}"))) {
            let found = found.unwrap();
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                // A code or a trit may flip over float noise.
                assert!((found - expected).abs() < 1e-2, "{ways:?}: {found}, not {expected}");
            }
        }
    }
}

#[test]
fn what_is_not_learned_by_several_processes_is_refused_by_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let base = base(dir.path());
    for (i, (ways, key)) in [
        (&["finetune.objective=dpo"][..], "`finetune.objective`"),
        (&["finetune.method=full", "finetune.distill.temperature=2.0"], "`finetune.distill`"),
    ]
    .into_iter()
    .enumerate()
    {
        let config = config(dir.path(), &base, ways);
        for refused in train_by_two(&config, &base, &dir.path().join(format!("run-{i}"))) {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("2 processes"), "{error}");
        }
    }
}
