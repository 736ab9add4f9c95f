//! Comparing models.

use super::{FIXTURE, Place};

/// What `verify --json` says, and its exit status.
fn verify(place: &Place, a: &str, b: &str, options: &[&str]) -> (serde_json::Value, Option<i32>) {
    let mut args = vec!["verify", a, b, "--json"];
    args.extend(options);
    let ran = place.run(&args);
    (serde_json::from_str(&ran.stdout).unwrap(), ran.code)
}

#[test]
fn a_conversion_is_equal_to_its_source() {
    let place = Place::with_gguf();
    let (found, code) = verify(&place, FIXTURE, "model.gguf", &[]);
    assert_eq!(code, Some(0), "{found}");
    assert_eq!(found["equal"], true);
    assert_eq!((&found["trits_differ"], &found["scales_differ"]), (&0.into(), &0.into()));
    assert_eq!(found["logits"]["relative_error"], 0.0);
    let text = place.ok(&["verify", FIXTURE, "model.gguf"]);
    assert!(text.ends_with("equal\n"), "{text}");
}

#[test]
fn rounded_scales_are_different_until_tolerated() {
    let place = Place::new();
    place.ok(&["convert", FIXTURE, "packed", "--type", "hf-packed"]);
    let (found, code) = verify(&place, FIXTURE, "packed", &[]);
    assert_eq!(code, Some(1), "{found}");
    assert_eq!(found["trits_differ"], 0);
    let error = found["logits"]["relative_error"].as_f64().unwrap();
    assert!(error > 1e-4 && error < 0.1, "{error}");
    let (found, code) = verify(&place, FIXTURE, "packed", &["--tolerance", "0.1"]);
    assert_eq!((code, &found["equal"]), (Some(0), &true.into()));
}

#[test]
fn one_trit_and_one_number_are_found() {
    let place = Place::with_gguf();
    let mut bytes = place.read("model.gguf");
    // The last tensor is the final norm, f32; the one before it a projection with its scale.
    let end = bytes.len();
    bytes[end - 2] ^= 0x40;
    place.write("norm.gguf", &bytes);
    let (found, code) = verify(&place, "model.gguf", "norm.gguf", &["--ids", "1,2,3"]);
    assert_eq!(code, Some(1));
    assert_eq!(found["differing_tensors"], serde_json::json!(["model.norm.weight"]));
    assert_eq!(found["logits"]["positions"], 3);
}

#[test]
fn models_of_other_shapes_are_not_compared() {
    let place = Place::with_gguf();
    let other = FIXTURE.replace("tied-h64", "untied-h192");
    place.refused(&["verify", "model.gguf", &other], &["hidden_size", "64", "192"]);
}
