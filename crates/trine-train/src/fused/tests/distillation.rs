//! Students of a teacher.

use super::*;

const OPTIONS: Options = Options { precision: Precision::F32, recompute: false };

const WEIGHTS: Distillation =
    Distillation { temperature: 2.0, cross_entropy: 0.3, divergence: 1.0, relations: None };

fn engine() -> Engine {
    Engine::new(OPTIONS, false)
}

/// In full precision, where every gradient is that of the loss.
fn student() -> Bitnet {
    model(ModelConfig { quantization: Quantization::None, ..config() })
}

/// Wider and deeper than the student.
fn teacher() -> Teacher {
    let config = ModelConfig { hidden_size: 32, head_dim: 8, num_hidden_layers: 3, ..config() };
    Teacher::new(model(ModelConfig { quantization: Quantization::None, ..config }), engine())
}

/// Two sequences, some of whose targets are not to be predicted.
fn batch() -> Batch {
    let mut batch = super::batch(2, 20, 37);
    batch.targets[5..11].fill(IGNORED);
    batch
}

/// The whole loss, and how far the student is.
fn loss(
    student: &Bitnet,
    engine: &mut Engine,
    says: Says<'_>,
    options: Distillation,
    batch: &Batch,
) -> (f64, Divergences, Gradients) {
    let weight = 1.0 / batch.learned() as f32;
    let (hard, far, gradients) =
        engine.distilled_gradients(student, says, options, batch, weight).unwrap();
    let soften = options.divergence * options.temperature.powi(2);
    let factor = options.relations.map_or(0.0, |relations| relations.factor);
    let of_relations = factor * far.relations.unwrap_or(0.0);
    let loss = options.cross_entropy * hard + soften * far.tokens + of_relations;
    (f64::from(loss), far, gradients)
}

#[test]
fn it_has_the_gradients_of_its_loss() {
    let (student, mut engine, mut teacher, mut batch) = (student(), engine(), teacher(), batch());
    let only_soft = Distillation { temperature: 1.0, cross_entropy: 0.0, ..WEIGHTS };
    for options in [WEIGHTS, only_soft] {
        check_slope(&student, || {
            let says = Says::Teacher(&mut teacher);
            let (loss, far, gradients) = loss(&student, &mut engine, says, options, &batch);
            assert!(far.tokens > 0.0 && far.relations.is_none());
            (loss, gradients)
        });
    }
    for (layer, teacher_layer, heads) in [(1, 2, 2), (0, 0, 1), (1, 1, 4)] {
        let relations = Some(Relations { factor: 30.0, layer, teacher_layer, heads });
        let few = Distillation { cross_entropy: 0.01, divergence: 0.01, relations, ..WEIGHTS };
        check_slope(&student, || {
            let says = Says::Teacher(&mut teacher);
            let (loss, far, gradients) = loss(&student, &mut engine, says, few, &batch);
            assert!(far.relations.unwrap() > 0.0);
            (loss, gradients)
        });
        batch.starts = Some((0..40).map(|i| (i % 20 - i % 20 % 7) as u32).collect());
    }
}

#[test]
fn who_learns_from_itself_is_not_far() {
    let student = student();
    let mut itself = Teacher::new(self::student(), engine());
    let relations = Some(Relations { factor: 5.0, layer: 1, teacher_layer: 1, heads: 2 });
    let options = Distillation { cross_entropy: 1.0, relations, ..WEIGHTS };
    let (says, batch) = (Says::Teacher(&mut itself), batch());
    let (_, far, found) = loss(&student, &mut engine(), says, options, &batch);
    assert!(far.tokens.abs() < 1e-5 && far.relations.unwrap().abs() < 1e-5, "{far:?}");
    let weight = 1.0 / batch.learned() as f32;
    let (_, expected) = engine().weighted_gradients(&student, &batch, weight).unwrap();
    for (name, gradient) in &found {
        let difference = difference(gradient, &expected[name]);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn the_likeliest_ids_stand_for_all() {
    let (student, mut teacher, batch) = (student(), teacher(), batch());
    let says = Says::Teacher(&mut teacher);
    let (expected_loss, expected_far, expected) =
        loss(&student, &mut engine(), says, WEIGHTS, &batch);
    let mut at_most = 0.0;
    for count in [1, 5, 37] {
        let known = teacher.likeliest(&batch, WEIGHTS.temperature, count).unwrap();
        assert_eq!((known.rows(), known.ids.len()), (batch.learned(), count * batch.learned()));
        let mut engine = engine();
        let far = loss(&student, &mut engine, Says::Likeliest(&known), WEIGHTS, &batch).1;
        assert!(
            far.tokens > at_most && far.tokens < expected_far.tokens + 1e-5,
            "{count}: {far:?}"
        );
        at_most = far.tokens;
        check_slope(&student, || {
            let says = Says::Likeliest(&known);
            let (loss, _, gradients) = loss(&student, &mut engine, says, WEIGHTS, &batch);
            (loss, gradients)
        });
        if count == 37 {
            let says = Says::Likeliest(&known);
            let (whole, _, found) = loss(&student, &mut engine, says, WEIGHTS, &batch);
            assert!((whole - expected_loss).abs() < 1e-4, "{whole}, not {expected_loss}");
            for (name, gradient) in &found {
                let difference = difference(gradient, &expected[name]);
                assert!(difference < 1e-3, "{name}: {difference}");
            }
        }
    }
}

#[test]
fn teachers_that_do_not_fit_are_refused() {
    let (student, batch) = (student(), batch());
    let error = |says: Says<'_>, options: Distillation| {
        let found = engine().distilled_gradients(&student, says, options, &batch, 0.01);
        found.unwrap_err().to_string()
    };
    let other = model(ModelConfig { vocab_size: 36, ..config() });
    let other = error(Says::Teacher(&mut Teacher::new(other, engine())), WEIGHTS);
    assert!(other.contains("a teacher of 36 ids, expected 37"), "{other}");
    let none = error(Says::Likeliest(&Likeliest::new(4)), WEIGHTS);
    assert!(none.contains("knows 0 tokens, expected 34"), "{none}");
    let known = teacher().likeliest(&batch, 2.0, 4).unwrap();
    let relations = Some(Relations { factor: 5.0, layer: 1, teacher_layer: 1, heads: 2 });
    let absent = error(Says::Likeliest(&known), Distillation { relations, ..WEIGHTS });
    assert!(absent.contains("relations are learned from the teacher itself"), "{absent}");
    assert!(teacher().likeliest(&batch, 2.0, 38).is_err());
}
