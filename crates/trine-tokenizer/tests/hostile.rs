//! Tokenizers and templates that mean harm end in an error, never in a panic or without end.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use trine_tokenizer::{ChatTemplate, Message, Tokenizer, TokenizerError};

/// A BPE of two letters with other parts.
fn tokenizer(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TokenizerError> {
    let mut json = json!({
        "version": "1.0", "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    });
    change(&mut json);
    Tokenizer::from_json(&json.to_string())
}

#[test]
fn merges_that_the_library_cuts_wrong_are_refused() {
    assert_eq!(tokenizer(|_| ()).unwrap().encode("ab", false).unwrap(), [2]);
    for merges in [json!([["a", "b"]]), json!(["a b"])] {
        let error = tokenizer(|json| {
            json["model"]["continuing_subword_prefix"] = "##".into();
            json["model"]["merges"] = merges;
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("does not begin with \"##\""), "{error}");
    }
}

#[test]
fn steps_that_multiply_a_text_are_refused() {
    let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"});
    let spell = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let twice = json!({
        "type": "TemplateProcessing", "single": [text, text], "pair": [], "special_tokens": {},
    });
    for (part, list, step) in [
        ("normalizer", "normalizers", &replace),
        ("decoder", "decoders", &replace),
        ("pre_tokenizer", "pretokenizers", &spell),
        ("post_processor", "processors", &twice),
    ] {
        let steps = |count| {
            tokenizer(|json| json[part] = json!({"type": "Sequence", list: vec![step; count]}))
        };
        let error = steps(40).unwrap_err().to_string();
        assert!(error.contains("expected up to 4096"), "{part}: {error}");
        assert!(steps(3).is_ok(), "{part}: {:?}", steps(3));
    }
}

#[test]
fn panics_of_the_library_are_errors() {
    // A merge that is longer than every token.
    let error = tokenizer(|json| json["model"]["vocab"] = json!({"a": 0, "b": 1})).unwrap_err();
    assert!(matches!(error, TokenizerError::Json { .. }), "{error}");
    assert!(error.to_string().contains("panicked"), "{error}");
    // Pieces of no character.
    let pieces = tokenizer(|json| {
        json["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0});
    });
    let pieces = pieces.unwrap();
    for _ in 0..2 {
        let error = pieces.encode("ab", false).unwrap_err();
        assert!(matches!(error, TokenizerError::Model { operation: "encode", .. }), "{error}");
    }
    assert_eq!(pieces.decode(&[2], false).unwrap(), "ab");
}

fn render(jinja: &str) -> Result<String, TokenizerError> {
    ChatTemplate::new(jinja)?.render(&[Message::new("user", "Hi")], true, "<s>", "</s>")
}

/// The template must be refused for this reason.
fn refused(jinja: &str, expected: &str) {
    let error = render(jinja).expect_err(jinja).to_string();
    assert!(error.contains(expected), "{jinja:.60}: {error}");
}

#[test]
fn loops_and_recursion_end() {
    refused(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "fuel",
    );
    refused("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion limit");
    refused("{% include 'chat' %}", "recursion limit");
    let messages = vec![Message::new("user", "Hi"); 1000];
    let long = ChatTemplate::new("{% for m in messages %}{{ m.role }}{% endfor %}").unwrap();
    assert_eq!(long.render(&messages, true, "", "").unwrap(), "user".repeat(1000));
}

#[test]
fn widths_do_not_allocate() {
    for jinja in [
        "{{ messages | tojson(indent=99999999999999) }}",
        "{{ 'a' | indent(99999999999999) }}",
        "{{ 'a' | indent(width=99999999999999) }}",
        "{{ '%99999999999d' | format(3) }}",
        "{{ '%.99999999999f' | format(3) }}",
        "{{ '%*d' | format(99999999999, 3) }}",
        "{{ '{:>99999999999}'.format(3) }}",
        "{{ '{:.99999999999f}'.format(3.0) }}",
    ] {
        refused(jinja, "a width of");
    }
    refused("{{ [1, 2] | batch(99999999999, 0) | list }}", "unknown filter");
    refused("{{ [1, 2] | slice(99999999999) | list }}", "unknown filter");
    refused("{% for i in range(999) %}{{ 'a' * 9999999 }}{% endfor %}", "a text of more than");
    assert_eq!(render("{{ '%5d|%s' | format(3, 'a') }}").unwrap(), "    3|a");
    assert_eq!(render("{{ '{:>5}'.format(3) }}").unwrap(), "    3");
    assert_eq!(render("{{ 'a\nb' | indent(2) }}").unwrap(), "a\n  b");
    assert_eq!(render("{{ 'a\nb' | indent(width=2, first=true) }}").unwrap(), "  a\n  b");
}

#[test]
fn calls_are_learned_of_no_template_that_hides_or_garbles_them() {
    let (each, call) = ("{% for c in messages[-1].tool_calls %}", "{{ c.function.name }}");
    let loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    for written in [
        // No arguments, arguments before names, halves of them, arguments that are no object.
        call.to_owned(),
        format!("{{{{ c.function.arguments | tojson }}}}{call}"),
        format!("{call}{{{{ (c.function.arguments | tojson)[:-1] }}}}"),
        format!("{call}{{{{ (c.function.arguments | tojson)[1:] }}}}"),
        format!("{call}[\"probe_argument\"]"),
        format!("{call}{{{{ c.function.arguments.keys() | list | tojson }}}}"),
        format!("{call}{{\"probe_argument\": \u{fdd0}"),
        format!("{call}{{{{ '{{' * 9999 }}}}\"probe_argument\""),
    ] {
        for around in ["", loops, "{% if add_generation_prompt %}ä{% endif %}", "{{ 'x' * 99999 }}"]
        {
            let jinja = format!(
                "{{{{ tools | tojson }}}}{around}{{{{ messages[-1].content }}}}{each}{written}{{% endfor %}}"
            );
            let template = ChatTemplate::new(&jinja).unwrap();
            assert_eq!(template.call_format(&Tokenizer::bytes()), None, "{jinja}");
        }
    }
}

#[test]
fn nesting_does_not_exhaust_the_stack() {
    let chain = |link: &str, end: &str, count: usize| {
        let _ = render(&format!("{{{{ {}{end} }}}}", link.repeat(count)));
    };
    chain("-", "1", 60_000);
    chain("1+", "1", 30_000);
    chain("not ", "1", 15_000);
    chain("a if b else ", "1", 5_000);
    chain("(", "1", 60_000);
    chain("[", "1", 60_000);
    refused(&"x".repeat(1 << 17), "131072 bytes");
    // Values, when they are shown and when they are freed.
    let nested = |show: &str| {
        render(&format!(
            "{{% set ns = namespace(a=1) %}}{{% for i in range(9000) %}}\
             {{% set ns.a = [ns.a] %}}{{% endfor %}}{show}"
        ))
    };
    assert!(nested("").is_ok() && nested("{{ ns.a }}").is_ok());
    assert_eq!(nested("{{ ns.a | tojson }}").unwrap(), "[".repeat(9000) + "1" + &"]".repeat(9000));
}

#[test]
fn panics_of_the_engine_are_errors() {
    refused("{{ ''[::-1] }}", "panicked");
}
