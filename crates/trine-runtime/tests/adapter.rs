//! Adapters: every row of a pass computes what its sequence computes alone, with its own adapter or none,
//! and nothing that was computed with one serves another.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use trine_format::peft::Lora;
use trine_format::{ModelConfig, ModelFile, Projection};
use trine_kernels::nn::KvType;
use trine_runtime::{
    Adapter, Draft, Engine, EngineConfig, Event, GeneratorConfig, LoadOptions, Logits, LowRankType,
    Model, Request, Sampler, SamplerConfig, Sequence, Session, Step,
};

type Adapters = [Option<Arc<Adapter>>; 3];

fn model(name: &str, kv: KvType) -> Model {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures");
    let file = ModelFile::open(&fixtures.join(name)).unwrap();
    Model::load_with(&file, &LoadOptions { kv, ..LoadOptions::default() }).unwrap()
}

/// An adapter of numbers that depend on `seed`.
fn lora(config: &ModelConfig, rank: usize, targets: &[Projection], seed: usize) -> Lora {
    let mut matrices = BTreeMap::new();
    for layer in 0..config.num_hidden_layers {
        for &p in targets {
            let (out, inp) = config.projection_shape(p);
            let numbers = |len: usize, salt: usize, size: f32| -> Vec<f32> {
                let number = |i: usize| (i * i * 31 + i * 7 * seed + salt * 131) % 1009;
                (0..len).map(|i| (number(i) as f32 / 504.5 - 1.0) * size).collect()
            };
            let a = numbers(rank * inp, seed + layer, 1.0 / (inp as f32).sqrt());
            let b = numbers(out * rank, seed + layer + 50 * p as usize, 0.2);
            matrices.insert((layer, p), [a, b]);
        }
    }
    Lora { rank, alpha: 2.0 * rank as f64, targets: targets.to_vec(), base: None, matrices }
}

/// None, one beside all projections, and one beside some; of other ranks and numbers.
fn adapters(model: &Model) -> Adapters {
    let some = [Projection::V, Projection::O, Projection::Gate];
    let all = lora(model.config(), 4, &Projection::ALL, 1);
    let some = lora(model.config(), 9, &some, 2);
    let new = |lora, dtype| Some(Arc::new(Adapter::new(model, lora, dtype).unwrap()));
    [None, new(&all, LowRankType::F32), new(&some, LowRankType::F16)]
}

fn ids(model: &Model, seed: usize, len: usize) -> Vec<u32> {
    let vocab = model.config().vocab_size;
    (0..len).map(|at| ((at * at * 31 + at * 7 * seed + seed * 131) % vocab) as u32).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// With sub-norms and without; of the two forms that projections have on disk.
const MODELS: [&str; 3] = ["tied-h64/packed", "untied-h192/bf16", "llama-h64/online"];

#[test]
fn rows_get_in_one_pass_what_their_sequences_get_alone() {
    for name in MODELS {
        for kv in [KvType::F32, KvType::Int8] {
            let model = model(name, kv);
            let (vocab, adapters) = (model.config().vocab_size, adapters(&model));
            // Which adapter, what was seen, and what comes: neighbours with the same one among them, single
            // ids, and together more than go through the layers at once.
            let cases = [
                (0, 0, 5),
                (1, 7, 1),
                (1, 3, 20),
                (2, 17, 1),
                (0, 64, 1),
                (2, 1, 9),
                (1, 0, 120),
                (0, 5, 115),
                (2, 0, 3),
            ];
            let texts: Vec<Vec<u32>> = (1..=cases.len()).map(|i| ids(&model, i, 120)).collect();
            let (mut sequences, mut expected) = (Vec::new(), Vec::new());
            for (text, (adapter, seen, new)) in texts.iter().zip(cases) {
                let adapter = &adapters[adapter];
                let mut sequence = Sequence::with_adapter(&model, adapter.clone());
                if seen > 0 {
                    let sequence = &mut sequence;
                    let first = Step { sequence, ids: &text[..seen], logits: Logits::None };
                    model.step(&mut [first]).unwrap();
                }
                sequences.push(sequence);
                let mut alone = Session::with_adapter(&model, adapter.clone());
                let mut all = Vec::new();
                for id in &text[..seen + new] {
                    all.extend(alone.decode(*id).unwrap());
                }
                expected.push(all[seen * vocab..].to_vec());
            }
            let mut steps = Vec::new();
            for ((sequence, text), (_, seen, new)) in sequences.iter_mut().zip(&texts).zip(cases) {
                steps.push(Step { sequence, ids: &text[seen..][..new], logits: Logits::All });
            }
            let found = model.step(&mut steps).unwrap();
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(bits(found), bits(expected), "{name}, {kv}, sequence {i}");
            }
            // They are three different models.
            let text = &texts[0][..12];
            let logits = adapters
                .clone()
                .map(|adapter| Session::with_adapter(&model, adapter).logits_of_all(text).unwrap());
            assert_eq!(bits(&logits[0]), bits(&Session::new(&model).logits_of_all(text).unwrap()));
            for (a, b) in [(0, 1), (1, 2), (0, 2)] {
                let differ = logits[a].iter().zip(&logits[b]).filter(|(a, b)| a != b).count();
                assert!(differ * 10 > logits[a].len() * 9, "{name}: {a} and {b} are alike");
            }
        }
    }
}

#[test]
fn halves_move_logits_little() {
    for name in MODELS {
        let model = model(name, KvType::F32);
        let lora = lora(model.config(), 4, &Projection::ALL, 1);
        let text = ids(&model, 5, 40);
        let [exact, halves] = [LowRankType::F32, LowRankType::F16].map(|dtype| {
            let adapter = Arc::new(Adapter::new(&model, &lora, dtype).unwrap());
            Session::with_adapter(&model, Some(adapter)).logits_of_all(&text).unwrap()
        });
        let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let moved: Vec<f32> = exact.iter().zip(&halves).map(|(a, b)| a - b).collect();
        let relative = norm(&moved) / norm(&exact);
        println!("{name}: {relative:.1e}");
        // As much as an int8 code that falls to the other side.
        assert!(relative < 3e-2, "{name}: {relative}");
    }
}

#[test]
fn clones_and_guesses_keep_the_adapter() {
    let model = model("tied-h64/packed", KvType::Int8);
    for adapter in adapters(&model) {
        let prompt = ids(&model, 3, 30).repeat(3);
        let texts = [Draft::Off, Draft::Fixed(4)].map(|draft| {
            let mut session = Session::with_adapter(&model, adapter.clone());
            let mut sampler = Sampler::new(SamplerConfig::default()).unwrap();
            let config = GeneratorConfig { max_tokens: 40, draft, ..GeneratorConfig::default() };
            let mut generator = session.generate(&prompt, &mut sampler, config).unwrap();
            let text: Vec<u32> = generator.by_ref().collect::<Result<_, _>>().unwrap();
            if draft != Draft::Off {
                assert!(generator.stats().drafted > 0, "nothing was guessed");
            }
            text
        });
        assert_eq!(texts[0], texts[1]);
        let mut sequence = Sequence::with_adapter(&model, adapter.clone());
        let first = Step { sequence: &mut sequence, ids: &prompt, logits: Logits::None };
        model.step(&mut [first]).unwrap();
        let mut clone = sequence.clone();
        let next = Step { sequence: &mut clone, ids: &texts[0][..1], logits: Logits::Last };
        let found = model.step(&mut [next]).unwrap();
        let mut session = Session::with_adapter(&model, adapter);
        session.prefill(&prompt).unwrap();
        assert_eq!(bits(&found[0]), bits(&session.decode(texts[0][0]).unwrap()));
    }
}

/// What a session alone makes of a request.
fn alone(model: &Model, request: &Request) -> Vec<u32> {
    let mut session = Session::with_adapter(model, request.adapter.clone());
    let mut sampler = Sampler::new(request.sampling.sampler).unwrap();
    let config = GeneratorConfig { max_tokens: request.max_tokens, ..GeneratorConfig::default() };
    let ids = session.generate(&request.prompt, &mut sampler, config).unwrap();
    ids.collect::<Result<_, _>>().unwrap()
}

/// Serves requests at once; the ids of each, and how many of its prompt were not computed.
fn serve(engine: &Engine, requests: &[Request]) -> Vec<(Vec<u32>, usize)> {
    let mut running = Vec::new();
    for request in requests {
        let (sender, events) = channel();
        let ticket = engine.submit(request.clone(), move |event| drop(sender.send(event))).unwrap();
        running.push((ticket, events));
    }
    let mut found = Vec::new();
    for (_ticket, events) in &running {
        let mut ids = Vec::new();
        loop {
            match events.recv_timeout(Duration::from_secs(60)).unwrap() {
                Event::Token(token) => ids.push(token.id),
                Event::End(_, usage) => break found.push((ids, usage.cached)),
                _ => (),
            }
        }
    }
    found
}

#[test]
fn requests_with_different_adapters_get_at_once_what_each_gets_alone() {
    for (name, kv) in [("tied-h64/packed", KvType::Int8), ("untied-h192/packed", KvType::F32)] {
        let model = Arc::new(model(name, kv));
        let adapters = adapters(&model);
        let engine = Engine::start(model.clone(), EngineConfig::default()).unwrap();
        // Of every three with the same prompt each has another adapter.
        let mut requests = Vec::new();
        for i in 0..18 {
            let mut prompt = ids(&model, 1000, [0, 90][i % 2]);
            prompt.extend(ids(&model, i / 3, 1 + i / 3 * 37 % 200));
            let (adapter, max_tokens) = (adapters[i % 3].clone(), 5 + i);
            requests.push(Request { prompt, adapter, max_tokens, ..Request::default() });
        }
        for round in 0..2 {
            let found = serve(&engine, &requests);
            for (i, (request, (ids, _))) in requests.iter().zip(&found).enumerate() {
                assert_eq!(*ids, alone(&model, request), "{name}, round {round}, request {i}");
            }
        }
    }
}

#[test]
fn keys_and_values_serve_only_the_adapter_they_were_computed_with() {
    let model = Arc::new(model("tied-h64/packed", KvType::Int8));
    let adapters = adapters(&model);
    // Another adapter of the same numbers is another adapter too.
    let twin = lora(model.config(), 4, &Projection::ALL, 1);
    let twin = Some(Arc::new(Adapter::new(&model, &twin, LowRankType::F32).unwrap()));
    let adapters = [adapters.to_vec(), vec![twin]].concat();
    let engine = Engine::start(model.clone(), EngineConfig::default()).unwrap();
    let prompt = ids(&model, 1, 200);
    let requests = adapters.into_iter().map(|adapter| Request {
        prompt: prompt.clone(),
        adapter,
        max_tokens: 8,
        ..Request::default()
    });
    let requests: Vec<_> = requests.collect();
    // One after another: nobody has anything from one with another adapter, but from his own.
    for expected in [0, 199] {
        for request in &requests {
            let found = serve(&engine, std::slice::from_ref(request));
            assert_eq!(found, [(alone(&model, request), expected)]);
        }
    }
    // At once, as long as nothing is kept: nobody waits for one with another adapter.
    let engine = Engine::start(model.clone(), EngineConfig::default()).unwrap();
    for (request, found) in requests.iter().zip(serve(&engine, &requests)) {
        assert_eq!(found, (alone(&model, request), 0));
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let (small, large) =
        (model("tied-h64/packed", KvType::F32), model("untied-h192/packed", KvType::F32));
    let fits = lora(small.config(), 4, &Projection::ALL, 1);
    let error = |model: &Model, lora: &Lora| {
        Adapter::new(model, lora, LowRankType::F32).unwrap_err().to_string()
    };
    let found = error(&large, &fits);
    assert!(
        found.contains("layers.0.self_attn.q_proj.lora_A") && found.contains("4 x 192"),
        "{found}"
    );
    assert!(found.contains("256"), "{found}");
    let mut bad = fits.clone();
    bad.matrices.get_mut(&(1, Projection::Up)).unwrap()[1][7] = f32::NAN;
    let found = error(&small, &bad);
    assert!(
        found.contains("layers.1.mlp.up_proj.lora_B") && found.contains("element 7"),
        "{found}"
    );
    let mut deep = fits.clone();
    let last = deep.matrices[&(0, Projection::Q)].clone();
    deep.matrices.insert((99, Projection::Q), last);
    assert!(error(&small, &deep).contains("layers.99."));
    let norms = model("llama-norms-h64/online", KvType::F32);
    let found = error(&norms, &lora(norms.config(), 4, &[Projection::Q], 1));
    assert!(found.contains("norm"), "{found}");

    // One that was made for another model, which therefore says nothing of this one's layers.
    let foreign = Arc::new(Adapter::new(&small, &fits, LowRankType::F32).unwrap());
    let mut session = Session::with_adapter(&large, Some(foreign.clone()));
    let found = session.prefill(&[1, 2]).unwrap_err().to_string();
    assert!(found.contains("adapter"), "{found}");
    let engine = Engine::start(Arc::new(large), EngineConfig::default()).unwrap();
    let request = Request { prompt: vec![1], adapter: Some(foreign), ..Request::default() };
    assert!(engine.check(&request).unwrap_err().to_string().contains("adapter"));
}
