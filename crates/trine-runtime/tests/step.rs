//! Steps of several sequences in one pass: each gets what it would get alone.

use std::path::Path;

use trine_format::ModelFile;
use trine_kernels::nn::KvType;
use trine_runtime::{LoadOptions, Logits, Model, Outputs, Sequence, Session, Step};

fn model(name: &str, kv: KvType) -> Model {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures");
    let file = ModelFile::open(&fixtures.join(name)).unwrap();
    Model::load_with(&file, &LoadOptions { kv, ..LoadOptions::default() }).unwrap()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn sequences_of_any_lengths_get_in_one_pass_what_each_gets_alone() {
    for name in ["tied-h64/packed", "untied-h192/bf16", "llama-norms-h64/online"] {
        for kv in KvType::ALL {
            let model = model(name, kv);
            let (vocab, mut found) = (model.config().vocab_size, Outputs::default());
            // What was seen, what comes, and the logits that are wanted.
            let cases = [
                (0, 5, Logits::All),
                (70, 1, Logits::Last),
                (3, 20, Logits::None),
                (64, 1, Logits::Last),
                (17, 3, Logits::All),
                (1, 9, Logits::Last),
                // From here on there are more than go through the layers at once.
                (0, 91, Logits::Last),
                (5, 86, Logits::All),
                (9, 82, Logits::None),
                (2, 70, Logits::Last),
                (3, 1, Logits::Last),
            ];
            let ids: Vec<Vec<u32>> = (1..=cases.len())
                .map(|i| (0..91).map(|at| ((at * 31 + 7) * i % vocab) as u32).collect())
                .collect();
            let mut sequences = vec![Sequence::new(&model); cases.len()];
            let mut expected = Vec::new();
            for ((sequence, ids), (seen, new, logits)) in sequences.iter_mut().zip(&ids).zip(cases)
            {
                if seen > 0 {
                    let first = Step { sequence, ids: &ids[..seen], logits: Logits::None };
                    model.step_into(&mut [first], &mut found).unwrap();
                    assert!(found.iter().eq([&[] as &[f32]]));
                }
                let mut session = Session::new(&model);
                let all = session.logits_of_all(&ids[..seen + new]).unwrap();
                let wanted = match logits {
                    Logits::None => 0,
                    Logits::Last => 1,
                    _ => new,
                };
                expected.push(bits(&all[(seen + new - wanted) * vocab..]));
            }
            let mut steps = Vec::new();
            for ((sequence, ids), (seen, new, logits)) in sequences.iter_mut().zip(&ids).zip(cases)
            {
                steps.push(Step { sequence, ids: &ids[seen..][..new], logits });
            }
            // Whatever pass was before it.
            model.step_into(&mut steps, &mut found).unwrap();
            assert_eq!(found.len(), cases.len());
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(bits(found), *expected, "{name}, {kv}, sequence {i}");
            }
        }
    }
}

/// The head makes the logits of hidden states: so they are those of the model, in one pass with others.
#[test]
fn hidden_states_are_what_the_head_is_given() {
    for name in ["tied-h64/packed", "untied-h192/bf16"] {
        let model = model(name, KvType::F32);
        let config = model.config();
        let (vocab, width) = (config.vocab_size, config.hidden_size);
        let file =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures").join(name);
        let file = ModelFile::open(&file).unwrap();
        let tied = config.tie_word_embeddings;
        let head = if tied { trine_format::names::EMBED } else { trine_format::names::HEAD };
        let head = file.dense(head).unwrap().to_f32();
        let ids: Vec<u32> = (0..300).map(|at| (at * 31 + 7) % vocab as u32).collect();
        let (mut first, mut second) = (Sequence::new(&model), Sequence::new(&model));
        let steps = &mut [
            Step { sequence: &mut first, ids: &ids[..5], logits: Logits::Last },
            Step { sequence: &mut second, ids: &ids, logits: Logits::Hidden },
        ];
        let found = model.step(steps).unwrap();
        assert_eq!((found[0].len(), found[1].len()), (vocab, 300 * width));
        let logits = Session::new(&model).logits_of_all(&ids).unwrap();
        assert_eq!(bits(&found[0]), bits(&logits[4 * vocab..5 * vocab]));
        let mut made = vec![0.0; logits.len()];
        model.head(&found[1], &mut made);
        assert_eq!(bits(&made), bits(&logits));
        // Of the last ones, wherever they begin in the passes that the ids go through in.
        for last in [0, 1, 40, 44, 45, 200, 301] {
            let mut sequence = Sequence::new(&model);
            let logits = Logits::LastHidden(last);
            let some =
                model.step(&mut [Step { sequence: &mut sequence, ids: &ids, logits }]).unwrap();
            let from = 300 - last.min(300);
            assert_eq!(bits(&some[0]), bits(&found[1][from * width..]));
        }
        for t in [0, 4, 255, 256, 299] {
            let hidden = &found[1][t * width..][..width];
            for id in (0..vocab).step_by(97) {
                let row = &head[id * width..][..width];
                let expected: f32 = row.iter().zip(hidden).map(|(a, b)| a * b).sum();
                let logit = logits[t * vocab + id];
                assert!((logit - expected).abs() < 1e-3, "{name}, {t}, {id}: {logit}, {expected}");
            }
        }
    }
}

#[test]
fn no_steps_are_no_logits() {
    let model = model("tied-h64/packed", KvType::F32);
    assert!(model.step(&mut []).unwrap().is_empty());
}
