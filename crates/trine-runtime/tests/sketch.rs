//! A sketch of the head: the same texts, to the id, for every type of head and every way to choose.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use trine_format::peft::Lora;
use trine_format::{
    BoxError, DenseTensor, Dtype, HiddenAct, ModelConfig, ModelFile, Projection, Quantization,
    TensorSource, names,
};
use trine_runtime::{
    Adapter, Draft, Engine, EngineConfig, Event, GeneratorConfig, HeadSketch, Largest, LoadOptions,
    Logits, LowRankType, Model, Request, RuntimeError, Sampler, SamplerConfig, Sampling, Sequence,
    Session, Step,
};

const VOCAB: usize = 2000;

/// The types of a head, and whether a pass of five rows uses their sketch.
const HEADS: [(Dtype, bool); 5] = [
    (Dtype::F32, true),
    (Dtype::F16, true),
    (Dtype::BF16, true),
    (Dtype::Q8_0, false),
    (Dtype::Q6_K, false),
];

fn config(hidden: usize) -> ModelConfig {
    ModelConfig {
        hidden_size: hidden,
        intermediate_size: 2 * hidden,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: hidden / 4,
        vocab_size: VOCAB,
        max_position_embeddings: 256,
        rope_theta: 500_000.0,
        rms_norm_eps: 1e-5,
        hidden_act: HiddenAct::Relu2,
        sub_norms: true,
        projection_norm_eps: None,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: vec![],
        quantization: Quantization::Online,
    }
}

/// Numbers of some normal distribution; the rows of the second half of the vocabulary are those of the
/// first, so that every logit is there twice.
struct Random(ModelConfig);

impl TensorSource for Random {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let hidden = self.0.hidden_size;
        let shape = match Projection::ALL
            .iter()
            .find(|p| name == names::projection(0, **p) || name == names::projection(1, **p))
        {
            Some(p) => self.0.projection_shape(*p).into(),
            None if name == names::EMBED => (VOCAB, hidden).into(),
            None if name.contains("ffn_sub_norm") => [1, self.0.intermediate_size],
            None => [1, hidden],
        };
        let [rows, cols]: [usize; 2] = shape;
        let mut state =
            name.bytes().fold(7u64, |state, byte| state.wrapping_mul(31) + u64::from(byte));
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        let mut values: Vec<f32> =
            (0..rows * cols).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 0.3).collect();
        if name == names::EMBED {
            values.copy_within(..rows / 2 * cols, rows / 2 * cols);
        }
        if rows == 1 {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        let shape = if rows == 1 { vec![cols] } else { vec![rows, cols] };
        let tensor = DenseTensor::from_f32(name, &shape, &values);
        let data = Cow::Owned(tensor.data.into_owned());
        Ok(DenseTensor { name: name.to_owned(), data, ..tensor })
    }
}

fn file(hidden: usize) -> ModelFile {
    let config = config(hidden);
    ModelFile::imported(Path::new("random"), config.clone(), Box::new(Random(config)))
}

fn model(head: Dtype, sketch: HeadSketch) -> Model {
    let options = LoadOptions { head: Some(head), sketch, ..LoadOptions::default() };
    Model::load_with(&file(256), &options).unwrap()
}

/// With the whole head and with a sketch of it.
fn both(head: Dtype) -> [Model; 2] {
    [HeadSketch::Off, HeadSketch::On].map(|sketch| model(head, sketch))
}

const HOT: SamplerConfig = SamplerConfig {
    temperature: 0.8,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    seed: 1,
};

/// Those that need some logits only, then those that need all.
const SETTINGS: [SamplerConfig; 9] = [
    SamplerConfig { temperature: 0.0, ..HOT },
    SamplerConfig { top_k: 1, ..HOT },
    SamplerConfig { top_k: 2, seed: 2, ..HOT },
    SamplerConfig { top_k: 40, temperature: 1.5, seed: 3, ..HOT },
    SamplerConfig { top_k: 33, top_p: 0.9, min_p: 0.01, seed: 4, ..HOT },
    SamplerConfig { min_p: 0.2, seed: 5, ..HOT },
    SamplerConfig { top_p: 0.9, seed: 6, ..HOT },
    SamplerConfig { top_k: 40, repetition_penalty: 1.2, seed: 7, ..HOT },
    SamplerConfig { top_k: 3000, seed: 8, ..HOT },
];

fn prompt(seed: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((i % 13 * 31 + i % 3 * seed + seed * 131) % VOCAB) as u32).collect()
}

fn text(
    model: &Model,
    adapter: Option<Arc<Adapter>>,
    setting: SamplerConfig,
    draft: Draft,
) -> Vec<u32> {
    let mut session = Session::with_adapter(model, adapter);
    let mut sampler = Sampler::new(setting).unwrap();
    let config = GeneratorConfig { max_tokens: 24, draft, ..GeneratorConfig::default() };
    let ids = session.generate(&prompt(3, 30), &mut sampler, config).unwrap();
    ids.collect::<Result<_, _>>().unwrap()
}

/// Random hidden states `(tokens, 256)`.
fn hidden(model: &Model, tokens: usize) -> Vec<f32> {
    let (mut sequence, ids) = (Sequence::new(model), prompt(5, tokens));
    let step = Step { sequence: &mut sequence, ids: &ids, logits: Logits::Hidden };
    model.step(&mut [step]).unwrap()[0].to_vec()
}

#[test]
fn texts_are_the_same_with_and_without_a_sketch() {
    for (head, _) in HEADS {
        let [whole, sketched] = both(head);
        for setting in SETTINGS {
            let expected = text(&whole, None, setting, Draft::Off);
            for draft in [Draft::Off, Draft::Fixed(9)] {
                let found = text(&sketched, None, setting, draft);
                assert_eq!(found, expected, "{head:?}, {setting:?}, {draft:?}");
            }
        }
    }
}

#[test]
fn every_logit_that_is_there_twice_is_taken_from_the_first_row() {
    let [whole, sketched] = both(Dtype::BF16);
    let greedy = SamplerConfig::default();
    let ids = text(&sketched, None, greedy, Draft::Off);
    assert!(ids.iter().all(|id| (*id as usize) < VOCAB / 2), "{ids:?}");
    let logits = Session::new(&whole).prefill(&prompt(3, 30)).unwrap();
    assert_eq!(logits[..VOCAB / 2], logits[VOCAB / 2..]);
}

#[test]
fn adapters_choose_the_same_with_and_without_a_sketch() {
    let [whole, sketched] = both(Dtype::F16);
    let adapter = |model: &Model| {
        let numbers = |len: usize| {
            (0..len).map(|i| ((i * i * 31 + i * 7) % 1009) as f32 / 5e3 - 0.1).collect()
        };
        let pair = |p| {
            let (out, inp) = model.config().projection_shape(p);
            [numbers(2 * inp), numbers(out * 2)]
        };
        let matrices: BTreeMap<_, _> =
            Projection::ALL.into_iter().map(|p| ((1, p), pair(p))).collect();
        let targets = Projection::ALL.to_vec();
        let lora = Lora { rank: 2, alpha: 4.0, targets, base: None, matrices };
        Some(Arc::new(Adapter::new(model, &lora, LowRankType::F16).unwrap()))
    };
    let mut texts = Vec::new();
    for setting in SETTINGS {
        let expected = text(&whole, adapter(&whole), setting, Draft::Off);
        assert_eq!(text(&sketched, adapter(&sketched), setting, Draft::Auto), expected);
        texts.push(expected);
    }
    assert_ne!(texts[0], text(&whole, None, SETTINGS[0], Draft::Off));
}

/// What each request of an engine gets, of those that share every pass.
fn served(model: &Arc<Model>, requests: &[Request]) -> Vec<Vec<u32>> {
    let engine = Engine::start(model.clone(), EngineConfig::default()).unwrap();
    let (sinks, events): (Vec<_>, Vec<_>) = requests
        .iter()
        .map(|_| {
            let (sender, events) = channel();
            let sink: trine_runtime::Sink = Box::new(move |event| drop(sender.send(event)));
            (sink, events)
        })
        .unzip();
    let _tickets = engine.submit_all(requests.to_vec(), sinks).unwrap();
    let ids = |event| match event {
        Event::Token(token) => Some(token.id),
        _ => None,
    };
    events.iter().map(|events| events.iter().filter_map(ids).collect()).collect()
}

#[test]
fn requests_get_the_same_with_and_without_a_sketch_whoever_is_served_beside() {
    for (head, _) in HEADS {
        let [whole, sketched] = both(head).map(Arc::new);
        let request = |(seed, sampling)| Request {
            prompt: prompt(seed, 5 + 7 * seed),
            max_tokens: 12,
            sampling,
            ..Request::default()
        };
        let settings =
            || SETTINGS.into_iter().map(|sampler| Sampling { sampler, ..Sampling::default() });
        let lowered = settings().map(|sampling| Sampling {
            presence_penalty: 2.0,
            frequency_penalty: 0.5,
            logit_bias: vec![(7, -1.0), (900, f32::NEG_INFINITY)],
            ..sampling
        });
        let raised = settings().map(|sampling| Sampling {
            presence_penalty: -1.0,
            logit_bias: vec![(7, 2.0)],
            ..sampling
        });
        // Only those that need some logits, and all together.
        let few: Vec<_> = settings().take(6).chain(lowered.clone().take(6)).collect();
        let all: Vec<_> = settings().chain(lowered).chain(raised).collect();
        for sampling in [few, all] {
            let mut requests: Vec<_> = sampling.into_iter().enumerate().map(request).collect();
            assert_eq!(served(&sketched, &requests), served(&whole, &requests), "{head:?}");
            requests[0].logprobs = Some(3);
            let one = &requests[..1];
            assert_eq!(served(&sketched, one), served(&whole, one), "{head:?}");
        }
    }
}

#[test]
fn logits_are_those_of_the_whole_head_or_none() {
    for (head, _) in HEADS {
        let [whole, sketched] = both(head);
        let ids = prompt(1, 9);
        let rows = |model: &Model, logits| {
            let mut sequence = Sequence::new(model);
            let step = Step { sequence: &mut sequence, ids: &ids, logits };
            model.step(&mut [step]).unwrap()[0].to_vec()
        };
        let largest = Largest { count: 3, within: 0.25 };
        for (asked, of) in
            [(Logits::Largest(largest), Logits::Last), (Logits::AllLargest(largest), Logits::All)]
        {
            let (found, expected) = (rows(&sketched, asked), rows(&whole, of));
            assert_eq!(rows(&whole, asked), expected);
            assert_eq!(rows(&sketched, of), expected);
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.chunks(VOCAB).zip(expected.chunks(VOCAB)) {
                let mut sorted = expected.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                for (found, logit) in found.iter().zip(expected) {
                    let spared = *found == f32::NEG_INFINITY && *logit < sorted[2] - 0.25;
                    assert!(found == logit || spared, "{head:?}: {found} {logit}");
                }
            }
        }
    }
}

#[test]
fn a_sketch_is_used_where_it_reads_less_than_the_head() {
    for (head, several) in HEADS {
        let [whole, sketched] = both(head);
        let computed = |model: &Model, tokens: usize, count| {
            let largest = Largest { count, within: 0.0 };
            let mut logits = vec![0.0; tokens * VOCAB];
            model.largest(&hidden(model, tokens), largest, &mut logits)
        };
        assert_eq!(computed(&whole, 1, 1), VOCAB);
        let few = computed(&sketched, 1, 1);
        assert!(few < VOCAB / 2, "{head:?}: {few}");
        assert_eq!(computed(&sketched, 5, 1) < 5 * VOCAB, several, "{head:?}");
        assert_eq!(computed(&sketched, 1, 65), VOCAB);
        assert_eq!(computed(&sketched, 33, 1), 33 * VOCAB);
    }
}

#[test]
fn heads_that_cannot_have_a_sketch_are_refused_or_go_without() {
    let load = |sketch| {
        let options = LoadOptions { sketch, ..LoadOptions::default() };
        Model::load_with(&file(48), &options)
    };
    let error = load(HeadSketch::On).err().unwrap();
    assert!(matches!(error, RuntimeError::HeadSketch { hidden_size: 48, multiple: 32 }), "{error}");
    let without = load(HeadSketch::Off).unwrap();
    let auto = load(HeadSketch::Auto(Largest::ONE)).unwrap();
    let greedy = SamplerConfig::default();
    assert_eq!(text(&auto, None, greedy, Draft::Off), text(&without, None, greedy, Draft::Off));
    // So small a head is read as quickly.
    let small = model(Dtype::F16, HeadSketch::Auto(Largest::ONE));
    let mut logits = vec![0.0; VOCAB];
    assert_eq!(small.largest(&hidden(&small, 1), Largest::ONE, &mut logits), VOCAB);
}
