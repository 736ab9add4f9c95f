//! The runtime's shared passes give the likelihoods of texts scored one by one, to the bit.

use std::path::Path;

use rand::{RngExt, SeedableRng};
use trine_eval::{Continuation, Item, LanguageModel, OneByOne, RuntimeModel};
use trine_format::ModelFile;
use trine_runtime::{Model, Session};

fn model(name: &str) -> Model {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures");
    Model::load(&ModelFile::open(&fixtures.join(name)).unwrap()).unwrap()
}

/// Items of every form: one context, contexts that differ at their end, in the middle or at once, one
/// or many ids to score, long and short, with and without a common beginning of all items.
fn items(vocab: u32, limit: usize) -> Vec<Item> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let mut ids = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.random_range(0..vocab)).collect() };
    let shots = ids(100);
    let mut items = Vec::new();
    for (context, own, lengths) in [
        (1, 0, vec![1, 1, 1, 1]),
        (20, 0, vec![1, 9, 4]),
        (40, 3, vec![5, 5]),
        (0, 1, vec![2, 2]),
        (90, 0, vec![60, 3]),
        (30, 60, vec![2, 1]),
        (3, 2, vec![1]),
        (limit - 160, 0, vec![40, 2]),
    ] {
        for start in [vec![], shots.clone()] {
            let context = [start, ids(context)].concat();
            let option = |n: &usize| {
                let context = [context.clone(), ids(own)].concat();
                Continuation { context, ids: ids(*n) }
            };
            items.push(Item { options: lengths.iter().map(option).collect() });
        }
    }
    items
}

#[test]
fn shared_passes_give_the_bits_of_texts_scored_one_by_one() {
    for name in ["tied-h64/packed", "untied-h192/bf16"] {
        let model = model(name);
        let (vocab, limit) =
            (model.config().vocab_size as u32, model.config().max_position_embeddings);
        let items = items(vocab, limit.min(512));
        let mut plain = OneByOne::new(limit, |ids: &[u32]| Session::new(&model).logits_of_all(ids));
        let mut shared = RuntimeModel::new(&model);
        let expected = plain.score(&items).unwrap();
        assert_eq!(shared.score(&items).unwrap(), expected, "{name}");
        // Whatever was computed before, and however the items are cut into calls.
        for part in items.chunks(3).rev() {
            assert_eq!(shared.score(part).unwrap(), plain.score(part).unwrap(), "{name}");
        }
        let work = shared.work();
        assert_eq!(work.alone, plain.work().alone);
        assert!(work.computed * 3 < work.alone * 2, "{work:?}");
    }
}

/// Options that begin alike, a question asked twice, and an item that is another's beginning.
#[test]
fn what_texts_begin_with_is_computed_once() {
    let model = model("tied-h64/packed");
    let option = |context: &[u32], ids: &[u32]| Continuation {
        context: [&[7; 40], context].concat(),
        ids: ids.to_vec(),
    };
    let items = [
        vec![option(&[1, 2], &[5, 6, 7]), option(&[1, 2], &[5, 6, 8]), option(&[1, 2], &[9])],
        vec![option(&[1, 2], &[5, 6, 7]), option(&[1], &[2, 5, 6, 4])],
        vec![option(&[3], &[3, 3])],
    ]
    .map(|options| Item { options });
    let limit = model.config().max_position_embeddings;
    let mut plain = OneByOne::new(limit, |ids: &[u32]| Session::new(&model).logits_of_all(ids));
    let mut shared = RuntimeModel::new(&model);
    let expected = plain.score(&items).unwrap();
    assert_eq!(shared.score(&items).unwrap(), expected);
    // The common beginning; 1, 2; 5, 6; 3, 3.
    assert_eq!(shared.work().computed, 40 + 2 + 2 + 2);
    // What the last item began with is known, but for what is before a scored id.
    assert_eq!(shared.score(&items).unwrap(), expected);
    assert_eq!(shared.work().computed, 2 * (2 + 2 + 2) + 40);
}

#[test]
fn prompts_are_continued_together_as_each_alone() {
    let model = model("tied-h64/packed");
    let limit = model.config().max_position_embeddings;
    let options =
        items(model.config().vocab_size as u32, limit).into_iter().flat_map(|i| i.options);
    let mut prompts: Vec<Vec<u32>> = options.map(|option| option.context).collect();
    // One that fills the context, and one that is another's beginning.
    prompts.push(vec![5; limit - 2]);
    prompts.push(prompts[3][..1].to_vec());
    let mut plain = OneByOne::new(limit, |ids: &[u32]| Session::new(&model).logits_of_all(ids));
    let mut done =
        |_: usize, ids: &[u32]| Ok(ids.len() >= 4 && ids[ids.len() - 1].is_multiple_of(3));
    let expected = plain.generate(&prompts, 12, &mut done).unwrap();
    assert_eq!(RuntimeModel::new(&model).generate(&prompts, 12, &mut done).unwrap(), expected);
    assert!(
        expected.iter().any(|ids| ids.len() == 12) && expected.iter().any(|ids| ids.len() < 12)
    );
}

#[test]
fn what_a_model_cannot_take_is_its_error() {
    let model = model("tied-h64/packed");
    let option = Continuation { context: vec![1; 500], ids: vec![2; 99] };
    let error = RuntimeModel::new(&model).score(&[Item { options: vec![option] }]).unwrap_err();
    assert!(error.to_string().contains("context is full"), "{error}");
}
