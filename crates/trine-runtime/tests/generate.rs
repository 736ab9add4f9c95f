//! Generation with and without guesses: the same ids, the same ends, the same session afterwards.

use std::collections::HashMap;
use std::path::Path;

use trine_format::ModelFile;
use trine_runtime::{
    Choose, Draft, Finish, GeneratorConfig, GeneratorStats, Model, RuntimeError, Sampler,
    SamplerConfig, Session,
};

const MODELS: [&str; 4] =
    ["tied-h64/packed", "untied-h192/bf16", "llama-h64/online", "llama-norms-h64/online"];

const DRAFTS: [Draft; 5] =
    [Draft::Off, Draft::Auto, Draft::Fixed(1), Draft::Fixed(4), Draft::Fixed(40)];

fn model(name: &str) -> Model {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures");
    Model::load(&ModelFile::open(&fixtures.join(name)).unwrap()).unwrap()
}

fn sampler(config: SamplerConfig) -> Sampler {
    Sampler::new(config).unwrap()
}

fn config(max_tokens: usize, draft: Draft) -> GeneratorConfig {
    GeneratorConfig { max_tokens, stop: Vec::new(), draft }
}

/// Ids that repeat, so that there is something to guess.
fn repeating(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 3 + (i % 11) * (1 + i % 2)).collect()
}

/// All ids, why they ended, and what they took.
fn generate<C: Choose>(
    session: &mut Session<'_>,
    text: &[u32],
    choose: &mut C,
    config: GeneratorConfig,
) -> (Vec<u32>, Option<Finish>, GeneratorStats) {
    let mut generator = session.generate(text, choose, config).unwrap();
    let ids: Vec<u32> = generator.by_ref().map(Result::unwrap).collect();
    assert!(generator.next().is_none());
    assert_eq!(generator.text(), [text, &ids].concat());
    (ids, generator.finish(), generator.stats())
}

/// One id at a time, with nothing but session and sampler.
fn one_by_one(model: &Model, prompt: &[u32], sampler: &mut Sampler, count: usize) -> Vec<u32> {
    let mut session = Session::new(model);
    let mut text = prompt.to_vec();
    let mut logits = session.prefill(prompt).unwrap();
    for n in 1..=count {
        let id = sampler.sample(&logits, &text).unwrap();
        text.push(id);
        if n < count {
            logits = session.decode(id).unwrap();
        }
    }
    text.split_off(prompt.len())
}

/// What speculation rests on: the bits of a token's logits do not depend on its company.
#[test]
fn a_pass_in_chunks_of_any_size_gives_the_bits_of_single_tokens() {
    for name in MODELS {
        let model = model(name);
        let vocab = model.config().vocab_size;
        let mut session = Session::new(&model);
        let len = session.limit().min(300);
        let ids: Vec<u32> = (0..len).map(|i| (i * 37 % vocab) as u32).collect();
        let single: Vec<f32> = ids.iter().flat_map(|&id| session.decode(id).unwrap()).collect();
        let same = |found: &[f32], at: usize, size: usize| {
            let bits = |logits: &[f32]| logits.iter().map(|l| l.to_bits()).collect::<Vec<_>>();
            let expected = &single[at * vocab..][..found.len()];
            assert_eq!(bits(found), bits(expected), "{name}: {size} ids from position {at}");
        };
        for size in (1..=20).chain([31, 33, 64, 127, 128, 255, 256, 257, 300]) {
            let size = size.min(len);
            let mut session = Session::new(&model);
            for (i, chunk) in ids.chunks(size).enumerate() {
                same(&session.logits_of_all(chunk).unwrap(), i * size, size);
            }
            let mut session = Session::new(&model);
            for (i, chunk) in ids.chunks(size).enumerate() {
                let last = i * size + chunk.len() - 1;
                same(&session.prefill(chunk).unwrap(), last, size);
            }
            // A session that goes back computes what it computed before.
            session.truncate(len - size);
            same(&session.logits_of_all(&ids[len - size..]).unwrap(), len - size, size);
        }
    }
}

/// Greedy, and with the same seed under every filter and penalty.
#[test]
fn ids_are_the_same_with_and_without_guesses() {
    let hot = SamplerConfig { temperature: 0.8, seed: 5, ..SamplerConfig::default() };
    let settings = [
        SamplerConfig::default(),
        SamplerConfig { repetition_penalty: 1.3, ..SamplerConfig::default() },
        SamplerConfig { temperature: 0.05, ..hot },
        SamplerConfig { top_k: 4, repetition_penalty: 1.1, ..hot },
        SamplerConfig { top_p: 0.4, ..hot },
        SamplerConfig { min_p: 0.5, top_k: 50, ..hot },
        hot,
    ];
    let mut total = GeneratorStats::default();
    for name in MODELS {
        let model = model(name);
        for (setting, len) in settings.into_iter().zip([1, 7, 40, 3, 40, 12, 40]) {
            let prompt = repeating(len);
            let expected = one_by_one(&model, &prompt, &mut sampler(setting), 80);
            for draft in DRAFTS {
                let mut session = Session::new(&model);
                let mut choose = sampler(setting);
                let (ids, finish, stats) =
                    generate(&mut session, &prompt, &mut choose, config(80, draft));
                assert_eq!(ids, expected, "{name}, {setting:?}, {draft:?}");
                assert_eq!(finish, Some(Finish::Length));
                assert_eq!(stats.tokens(), 79);
                assert!(stats.accepted <= stats.drafted);
                if draft == Draft::Off {
                    assert_eq!(stats, GeneratorStats { passes: 79, drafted: 0, accepted: 0 });
                }
                total.drafted += stats.drafted;
                total.accepted += stats.accepted;
            }
        }
    }
    // Right and wrong guesses both came to pass.
    assert!(total.accepted > 1000 && total.drafted - total.accepted > 1000, "{total:?}");
}

#[test]
fn a_text_that_repeats_its_prompt_takes_fewer_passes() {
    let model = model("tied-h64/packed");
    let prompt: Vec<u32> = (0..100).map(|i| i * 7 % 512).collect();
    let answer = &prompt[20..90];
    let mut replay = |_: &[f32], text: &[u32]| Ok(answer[text.len() - prompt.len()]);
    let run = |draft, replay: &mut _| {
        generate(&mut Session::new(&model), &prompt, replay, config(answer.len(), draft))
    };
    let (ids, _, stats) = run(Draft::Fixed(7), &mut replay);
    assert_eq!(ids, answer);
    // The first id comes from the prompt, then 8 come from each pass.
    assert_eq!(stats, GeneratorStats { passes: 9, drafted: 60, accepted: 60 });
    let (_, _, stats) = run(Draft::Off, &mut replay);
    assert_eq!(stats.passes, 69);
}

#[test]
fn every_end_is_the_same_with_and_without_guesses() {
    let model = model("tied-h64/packed");
    let greedy = || sampler(SamplerConfig::default());
    let prompt = repeating(30);
    let all = one_by_one(&model, &prompt, &mut greedy(), 60);
    let limit = Session::new(&model).limit();
    for draft in DRAFTS {
        for count in 0..12 {
            let mut session = Session::new(&model);
            let (ids, finish, stats) =
                generate(&mut session, &prompt, &mut greedy(), config(count, draft));
            assert_eq!((&ids[..], finish), (&all[..count], Some(Finish::Length)));
            // The last id needs no pass, and none is guessed beyond it.
            assert!(stats.drafted == 0 || count > 2);
        }
        // A stop id that comes, wherever it comes first; it is not part of the session either.
        for &stop in &all {
            let first = all.iter().position(|&id| id == stop).unwrap();
            let mut session = Session::new(&model);
            let config = GeneratorConfig { stop: vec![511, stop], ..config(60, draft) };
            let (ids, finish, _) = generate(&mut session, &prompt, &mut greedy(), config);
            assert_eq!((&ids[..], finish), (&all[..first], Some(Finish::Stop)), "{draft:?}");
            assert_eq!(session.position(), prompt.len() + first);
        }
        // The last id of a full context has no position itself.
        for room in [0, 1, 2, 5, 9] {
            let mut session = Session::new(&model);
            let long = repeating(limit - room);
            let expected = one_by_one(&model, &long, &mut greedy(), room + 1);
            let (ids, finish, _) =
                generate(&mut session, &long, &mut greedy(), config(usize::MAX, draft));
            assert_eq!((ids, finish), (expected, Some(Finish::Context)));
            assert_eq!(session.position(), limit);
            let mut choose = greedy();
            let result = session.generate(&repeating(limit + 1), &mut choose, config(1, draft));
            assert!(matches!(result.err(), Some(RuntimeError::ContextFull { .. })));
        }
    }
}

/// A reader may leave at any id, also amid guesses that came true but were not read.
#[test]
fn a_generation_that_is_left_can_be_continued() {
    let model = model("untied-h192/bf16");
    let setting = SamplerConfig { temperature: 0.3, seed: 9, ..SamplerConfig::default() };
    let prompt = repeating(40);
    let all = one_by_one(&model, &prompt, &mut sampler(setting), 40);
    for draft in DRAFTS {
        for left in 0..20 {
            let mut session = Session::new(&model);
            let mut choose = sampler(setting);
            let generator = session.generate(&prompt, &mut choose, config(40, draft)).unwrap();
            let mut ids: Vec<u32> = generator.take(left).map(Result::unwrap).collect();
            let seen = session.position();
            let len = prompt.len() + left;
            assert!(seen == len || left > 0 && seen == len - 1, "{seen} of {len}");
            // Going on needs an id that the session has not seen.
            session.truncate(len - 1);
            let text = [&prompt[..], &ids].concat();
            ids.extend(generate(&mut session, &text, &mut choose, config(40 - left, draft)).0);
            assert_eq!(ids, all, "{draft:?} left after {left}");
        }
    }
}

#[test]
fn what_goes_wrong_ends_a_generation_and_spares_the_session() {
    let model = model("tied-h64/packed");
    let prompt = repeating(30);
    for draft in DRAFTS {
        let mut session = Session::new(&model);
        // An id that the model does not have: found when it is to go through the model.
        let mut wrong = |_: &[f32], text: &[u32]| Ok([7, 512][usize::from(text.len() > 33)]);
        let mut generator = session.generate(&prompt, &mut wrong, config(20, draft)).unwrap();
        let found: Vec<_> = generator.by_ref().collect();
        assert_eq!(found.len(), 6);
        assert!(matches!(found[5], Err(RuntimeError::TokenId { id: 512, .. })));
        assert!(generator.next().is_none());
        assert_eq!(generator.finish(), None);
        drop(generator);
        assert_eq!(session.position(), 34);

        let mut broken = |_: &[f32], _: &[u32]| Err(RuntimeError::NanLogit { id: 3 });
        let text = repeating(36);
        let mut generator = session.generate(&text, &mut broken, config(20, draft)).unwrap();
        assert!(matches!(generator.next(), Some(Err(RuntimeError::NanLogit { id: 3 }))));
        assert!(generator.next().is_none());
        drop(generator);
        assert_eq!(session.position(), 36);
        // Nothing new, and less than the session has seen.
        for text in [&text[..], &text[..10], &[]] {
            let result = session.generate(text, &mut broken, config(20, draft));
            assert!(matches!(result.err(), Some(RuntimeError::Empty)));
        }
        assert_eq!(session.position(), 36);
    }
}

/// Frequencies of whole continuations against the products of the sampler's probabilities, where
/// many guesses are right and many wrong.
#[test]
fn continuations_have_the_probabilities_of_the_model() {
    const PROMPT: usize = 60;
    const COUNT: usize = 3000;
    let model = model("tied-h64/packed");
    let setting = SamplerConfig { temperature: 0.5, top_k: 2, ..SamplerConfig::default() };
    // The probabilities of all continuations by three ids, from the definition.
    let mut expected: HashMap<Vec<u32>, f64> = HashMap::new();
    let mut open = vec![(Vec::new(), 1.0)];
    // Written by the model, so that it holds ids that may well come again.
    let prompt = one_by_one(&model, &[1, 2], &mut sampler(setting), PROMPT);
    while let Some((ids, probability)) = open.pop() {
        if ids.len() == 3 {
            expected.insert(ids, probability);
            continue;
        }
        let text = [&prompt[..], &ids].concat();
        let logits = Session::new(&model).prefill(&text).unwrap();
        let mut best: Vec<usize> = (0..logits.len()).collect();
        best.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let gap = f64::from(logits[best[0]] - logits[best[1]]) / 0.5;
        let first = 1.0 / (1.0 + (-gap).exp());
        for (id, share) in [(best[0], first), (best[1], 1.0 - first)] {
            open.push(([&ids[..], &[id as u32]].concat(), probability * share));
        }
    }
    assert_eq!(expected.len(), 8);

    let mut seen: HashMap<Vec<u32>, f64> = HashMap::new();
    let mut stats = GeneratorStats::default();
    let mut choose = sampler(SamplerConfig { seed: 1, ..setting });
    let mut session = Session::new(&model);
    session.prefill(&prompt[..PROMPT - 1]).unwrap();
    for _ in 0..COUNT {
        session.truncate(PROMPT - 1);
        let (ids, _, took) =
            generate(&mut session, &prompt, &mut choose, config(3, Draft::Fixed(2)));
        *seen.entry(ids).or_default() += 1.0;
        stats.drafted += took.drafted;
        stats.accepted += took.accepted;
    }
    println!("{expected:?}\n{seen:?}\n{stats:?}");
    let chi_squared: f64 = expected
        .iter()
        .map(|(ids, p)| {
            (seen.remove(ids).unwrap_or(0.0) - p * COUNT as f64).powi(2) / (p * COUNT as f64)
        })
        .sum();
    assert!(seen.is_empty(), "impossible continuations: {seen:?}");
    // 7 degrees of freedom: exceeded by chance once in a thousand seeds.
    assert!(chi_squared < 24.3, "{chi_squared}");
    assert!(
        stats.accepted > COUNT / 10 && stats.drafted - stats.accepted > COUNT / 10,
        "{stats:?}"
    );
}
