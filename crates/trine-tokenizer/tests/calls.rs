//! How calls of functions are written, learned from templates in the manner of those in use.

#![allow(clippy::unwrap_used)]

use serde_json::{Map, Value, json};
use trine_tokenizer::{Call, CallFormat, ChatTemplate, Message, Tokenizer};

/// ChatML with tools in the system message and calls in tags, as Hermes and Qwen have them.
const TAGGED: &str = include_str!("../../../tests/data/templates/tagged.jinja");
/// One call without a tag, as Llama 3.1 has it; a second one is refused.
const BARE: &str = include_str!("../../../tests/data/templates/bare.jinja");
/// A list of calls after a tag, with ids of nine characters, as Mistral has it.
const LISTED: &str = include_str!("../../../tests/data/templates/listed.jinja");
/// Names outside of JSON, arguments as text that is joined, and no content beside calls, as DeepSeek
/// has it.
const WORDS: &str = include_str!("../../../tests/data/templates/words.jinja");
/// What transformers makes of them; the folder's README names version and generator.
const RENDERED: &str = include_str!("../../../tests/data/templates/rendered.json");

/// Roles and texts, as BitNet b1.58 2B4T has it.
const PLAIN: &str = "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] | trim + \
    '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

/// Arguments that are no JSON, one element each.
const ELEMENTS: &str = "{{ tools | tojson }}{% for m in messages %}<t>{{ m.content }}{% for c in m.tool_calls \
    %}<f={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}\
    {% endfor %}</t>{% endfor %}<t>";

fn learned(jinja: &str) -> Option<CallFormat> {
    let template = ChatTemplate::new(jinja).unwrap();
    template.call_format(&tokenizer()).cloned()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::train_bpe(["what is the weather?"; 9].iter(), 300).unwrap()
}

#[track_caller]
fn check(jinja: &str, parts: [&str; 3], between: Option<&str>, tag: Option<&str>) {
    let found = learned(jinja).unwrap();
    assert_eq!([&found.open[..], &found.middle, &found.close], parts);
    assert_eq!((found.between.as_deref(), found.tag()), (between, tag));
}

#[test]
fn formats_are_what_templates_write() {
    let hermes = CallFormat::hermes();
    let parts = [&hermes.open[..], &hermes.middle, &hermes.close];
    check(TAGGED, parts, hermes.between.as_deref(), Some("<tool_call>"));
    assert_eq!(learned(TAGGED).as_ref(), Some(&hermes));
    // What stands before every answer is no part of a call.
    let thinking = "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n' }}";
    let thinking = TAGGED.replace("'<|im_start|>assistant' }}", thinking);
    assert_ne!(thinking, TAGGED);
    assert_eq!(learned(&thinking), Some(hermes));
    check(BARE, ["{\"name\": \"", "\", \"parameters\": ", "}"], None, None);
    let listed = ["[TOOL_CALLS][{\"name\": \"", "\", \"arguments\": ", "}]"];
    check(LISTED, listed, Some("}, {\"name\": \""), Some("[TOOL_CALLS]"));
    let words = ["<calls><call>function<sep>", "\n```json\n", "\n```</call></calls>"];
    check(WORDS, words, Some("\n```</call>\n<call>function<sep>"), Some("<calls>"));
}

#[test]
fn templates_that_do_not_call_or_cannot_be_read_have_no_format() {
    for jinja in [PLAIN, ELEMENTS, "{{ raise_exception('no') }}", "{{ tools }}", ""] {
        assert_eq!(learned(jinja), None, "{jinja}");
    }
}

fn conversation() -> Vec<Message> {
    let arguments = Map::from_iter([("city".to_owned(), json!("Ürgüp <|eot_id|>"))]);
    let (id, name) = ("call12345".to_owned(), "weather".to_owned());
    let call = Call { id: id.clone(), name: name.clone(), arguments };
    let said = Message::new("assistant", "");
    let result = Message::new("tool", "warm <|eot_id|>");
    vec![
        Message::new("user", "what is the weather?"),
        Message { tool_calls: vec![call], ..said },
        Message { tool_call_id: Some(id), name: Some(name), ..result },
    ]
}

#[test]
fn conversations_with_calls_and_tools_are_rendered_as_the_template_wants_them() {
    let tokenizer = tokenizer();
    let tool =
        json!({"type": "function", "function": {"name": "weather", "description": "é <|eot_id|>"}});
    let text = |jinja: &str, tools: &[Value]| {
        let template = ChatTemplate::new(jinja).unwrap();
        let ids = template.prompt_with_tools(&tokenizer, &conversation(), tools).unwrap();
        let eot = tokenizer.eot_id();
        let ends = ids.iter().filter(|id| Some(**id) == eot).count();
        (tokenizer.decode(&ids, false).unwrap(), ends)
    };
    let (tagged, ends) = text(TAGGED, std::slice::from_ref(&tool));
    assert_eq!(
        tagged,
        "<|begin_of_text|><|im_start|>system\nFunctions:\n<tools>\n{\"type\": \"function\", \"function\": {\"name\": \
         \"weather\", \"description\": \"é <|eot_id|>\"}}\n</tools><|im_end|>\n<|im_start|>user\nwhat is the \
         weather?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{\"name\": \"weather\", \"arguments\": \
         {\"city\": \"Ürgüp <|eot_id|>\"}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nwarm \
         <|eot_id|>\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    );
    // Neither arguments, nor results, nor descriptions can end a turn: only the template does.
    assert_eq!(ends, 0);
    let (bare, ends) = text(BARE, &[tool]);
    let result = "<|start|>ipython<|end|>\n\n\"warm <|eot_id|>\"<|eot_id|>";
    assert!(bare.contains(result) && bare.contains("    \"type\": \"function\","), "{bare}");
    assert_eq!(ends, 3);
    let (words, _) = text(WORDS, &[]);
    assert!(words.contains("weather\n```json\n{\"city\":\"Ürgüp"), "{words}");
    // Without tools a template is told that there are none.
    let (none, _) = text("{{ tools is none and documents is none }}", &[]);
    assert!(none.ends_with("True"), "{none}");
}

#[test]
fn conversations_with_calls_match_transformers() {
    let tokenizer = Tokenizer::bytes();
    let rendered: Value = serde_json::from_str(RENDERED).unwrap();
    let (id, name) = ("call12345".to_owned(), "weather".to_owned());
    let arguments = rendered["arguments"].as_object().unwrap().clone();
    let call = Call { id: id.clone(), name: name.clone(), arguments };
    let called = Message { tool_calls: vec![call], ..Message::new("assistant", "") };
    let result = Message::new("tool", "warm");
    let messages = [
        Message::new("user", "What is the weather?"),
        called,
        Message { tool_call_id: Some(id), name: Some(name), ..result },
        Message::new("assistant", "It is warm."),
        Message::new("user", "And now?"),
    ];
    for (name, jinja) in [("tagged", TAGGED), ("bare", BARE), ("listed", LISTED), ("words", WORDS)]
    {
        let template = ChatTemplate::new(jinja).unwrap();
        for (key, tools) in [("with_tools", &rendered["tools"]), ("without", &json!([]))] {
            let tools = tools.as_array().unwrap();
            let ids = template.prompt_with_tools(&tokenizer, &messages, tools).unwrap();
            let expected = rendered[name][key].as_str().unwrap();
            let expected = tokenizer.encode(expected, false).unwrap();
            assert!(ids.ends_with(&expected) && ids.len() <= expected.len() + 1, "{name} {key}");
        }
    }
}

#[test]
fn special_tokens_of_calls_are_found() {
    let tokenizer = tokenizer();
    let jinja = TAGGED.replace("<tool_call>", "<|eot_id|>");
    let template = ChatTemplate::new(&jinja).unwrap();
    let format = template.call_format(&tokenizer).unwrap();
    assert_eq!(format.tag(), Some("<|eot_id|>"));
    let eot = (tokenizer.eot_id().unwrap(), "<|eot_id|>".to_owned());
    assert_eq!(format.special_tokens(&tokenizer), std::slice::from_ref(&eot));
    // And shown, where they are to be.
    let mut text = tokenizer.detokenizer(true).showing(vec![eot.0]);
    assert_eq!(text.push(eot.0).unwrap(), eot.1);
    assert_eq!(tokenizer.detokenizer(true).push(eot.0).unwrap(), "");
}
