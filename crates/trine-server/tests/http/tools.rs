//! Calls of functions, by a model that would write anything.

use serde_json::{Value, json};
use trine_server::ServerConfig;

use super::{Server, chat, with};

const CHAT: &str = "/v1/chat/completions";

/// Shows tools as JSON and writes calls between tags, in the manner of Hermes and Qwen.
const TAGGED: &str = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: \
    {{ m.content }}{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% \
    if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}\
    {% if add_generation_prompt %}assistant: {% endif %}";

/// The same with a tag of two characters.
fn short() -> String {
    TAGGED.replace("<tool_call>", "<>").replace("</tool_call>", "<|>")
}

/// One call without a tag, in the manner of Llama 3.1.
const BARE: &str = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: \
    {% if m.tool_calls %}{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' + \
    m.tool_calls[0].function.arguments | tojson + '}' }}{% if m.tool_calls | length > 1 %}{{ \
    raise_exception('one call at a time') }}{% endif %}{% else %}{{ m.content }}{% endif %}<|eot_id|>\
    {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

/// A special token before a list of calls with ids, in the manner of Mistral.
const LISTED: &str = "{{ tools | tojson }}{% for m in messages %}{{ m.role }}: {{ m.content }}\
    {% if m.tool_calls %}<|end_of_text|>[{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] + ', \
    \"id\": \"' + c.id + '\"}' }}{% if c.id | length != 9 %}{{ raise_exception('nine characters') }}\
    {% endif %}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}<|eot_id|>{% endfor %}\
    {% if add_generation_prompt %}assistant: {% endif %}";

/// Two functions, whose arguments are soon whole.
fn tools() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {"at": {"enum": ["Bonn", "Köln"]}, "n": {"$ref": "#/$defs/n"}},
        "required": ["at", "n"],
        "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
    });
    json!([
        {"type": "function", "function": {"name": "rain", "description": "<|eot_id|>", "parameters": parameters}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

fn ask(other: Value) -> Value {
    let body = json!({"tools": tools(), "max_tokens": 2000, "temperature": 1});
    with(with(chat("Rain?"), body), other)
}

/// The names of the calls of a choice, all of which are well-formed.
#[track_caller]
fn check_calls(choice: &Value) -> Vec<String> {
    assert_eq!(choice["finish_reason"], "tool_calls", "{choice}");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    let mut ids: Vec<&str> = calls.iter().map(|call| call["id"].as_str().unwrap()).collect();
    assert!(ids.iter().all(|id| id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric())));
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), calls.len());
    let name = |call: &Value| {
        assert_eq!(call["type"], "function");
        let text = call["function"]["arguments"].as_str().unwrap();
        let arguments: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let name = call["function"]["name"].as_str().unwrap();
        match name {
            "rain" => {
                assert!(["Bonn", "Köln"].map(Value::from).contains(&arguments["at"]), "{text}");
                assert!(arguments["n"].as_u64().is_some_and(|n| (1..10).contains(&n)), "{text}");
                assert_eq!(arguments.as_object().unwrap().len(), 2, "{text}");
            }
            _ => assert_eq!((name, &arguments), ("now", &json!({}))),
        }
        name.to_owned()
    };
    calls.iter().map(name).collect()
}

/// The choice that the chunks of a stream add up to.
fn whole(chunks: &[Value]) -> Value {
    let (mut content, mut calls, mut reason) = (String::new(), Vec::<Value>::new(), Value::Null);
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        content += choice["delta"]["content"].as_str().unwrap_or_default();
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            match calls.get_mut(index) {
                None => {
                    assert_eq!((index, &call["function"]["arguments"]), (calls.len(), &json!("")));
                    calls.push(call.clone());
                }
                Some(known) => {
                    assert_eq!(call["id"], Value::Null);
                    let arguments = &mut known["function"]["arguments"];
                    let more = call["function"]["arguments"].as_str().unwrap();
                    *arguments = json!(arguments.as_str().unwrap().to_owned() + more);
                }
            }
        }
        reason = choice["finish_reason"].clone();
    }
    let content = if content.is_empty() { Value::Null } else { content.into() };
    json!({"message": {"content": content, "tool_calls": calls}, "finish_reason": reason})
}

#[test]
fn who_has_to_call_calls_whatever_the_template() {
    let mut names = Vec::new();
    // None is the fixture's, which knows nothing of tools.
    for template in [None, Some(TAGGED), Some(BARE), Some(LISTED)] {
        let server = Server::with_template(template);
        for seed in 0..4 {
            let body = ask(json!({"tool_choice": "required", "seed": seed}));
            let answer = server.ok(CHAT, &body);
            assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
            names.extend(check_calls(&answer["choices"][0]));
            let streamed = server.post(CHAT, &with(body, json!({"stream": true}))).chunks();
            let streamed = whole(&streamed);
            check_calls(&streamed);
            let calls = |choice: &Value| {
                let calls = choice["message"]["tool_calls"].as_array().unwrap().clone();
                calls.iter().map(|call| call["function"].clone()).collect::<Vec<_>>()
            };
            assert_eq!(calls(&streamed), calls(&answer["choices"][0]));
        }
        let one = json!({"type": "function", "function": {"name": "rain"}});
        let several = ask(json!({"tool_choice": one, "n": 3}));
        for choice in server.ok(CHAT, &several)["choices"].as_array().unwrap() {
            assert_eq!(check_calls(choice), ["rain"]);
        }
        let body = ask(json!({"tool_choice": "required", "parallel_tool_calls": false, "n": 4}));
        for choice in server.ok(CHAT, &body)["choices"].as_array().unwrap() {
            assert_eq!(check_calls(choice).len(), 1);
        }
    }
    // Which function is called is the model's choice.
    assert!(["rain", "now"].iter().all(|name| names.iter().any(|n| n == name)), "{names:?}");
}

#[test]
fn who_may_call_is_bound_from_where_a_call_begins() {
    let server = Server::with_template(Some(&short()));
    // A model that likes to write the tag.
    let id = |text: &str| server.tokenizer.encode_plain(text).unwrap()[0];
    let bias = json!({id("<").to_string(): 40, id(">").to_string(): 40});
    let mut with_words = 0;
    for seed in 0..6 {
        let body = ask(json!({"logit_bias": bias, "seed": seed}));
        let answer = server.ok(CHAT, &body);
        let choice = &answer["choices"][0];
        check_calls(choice);
        let words = choice["message"]["content"].as_str().unwrap_or_default();
        assert!(!words.contains("<>"), "{words}");
        with_words += usize::from(!words.is_empty());
        let streamed = whole(&server.post(CHAT, &with(body, json!({"stream": true}))).chunks());
        assert_eq!(streamed["message"]["content"], choice["message"]["content"]);
        check_calls(&streamed);
    }
    assert!(with_words > 0);
    // One that does not writes words.
    let never = json!({id("<").to_string(): -100});
    let body = json!({"logit_bias": never, "max_tokens": 20, "seed": 1, "logprobs": true});
    let answer = server.ok(CHAT, &ask(body.clone()));
    let choice = &answer["choices"][0];
    assert!(!choice["message"]["content"].as_str().unwrap().is_empty());
    assert!(choice["message"].get("tool_calls").is_none());
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["logprobs"]["content"].as_array().unwrap().len(), 20);
    let chunks = server.post(CHAT, &ask(with(body, json!({"stream": true})))).chunks();
    let tokens =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    assert_eq!(tokens.map(Vec::len).sum::<usize>(), 20);
    assert_eq!(whole(&chunks)["message"]["content"], choice["message"]["content"]);
}

#[test]
fn who_may_call_or_answer_in_a_form_does_either() {
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let server = Server::with_template(Some(&short()));
    let bias = |bias: i32| {
        let id = server.tokenizer.encode_plain("<").unwrap()[0];
        json!({"response_format": format, "logit_bias": {id.to_string(): bias}, "seed": 1})
    };
    let answer = server.ok(CHAT, &ask(bias(-100)));
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let found: Value = serde_json::from_str(text).unwrap();
    assert!(found["ok"].is_boolean(), "{text}");
    check_calls(&server.ok(CHAT, &ask(bias(100)))["choices"][0]);
    // Where calls look like JSON there is no telling.
    let server = Server::with_template(Some(BARE));
    let refused = server.post(CHAT, &ask(json!({"response_format": format})));
    refused.check_refused(400, Some("response_format.type"));
}

#[test]
fn a_call_that_is_cut_off_is_as_long_as_it_came() {
    let server = Server::with_template(None);
    let body = ask(json!({"tool_choice": "required", "seed": 1}));
    let tokens = server.ok(CHAT, &body)["usage"]["completion_tokens"].as_u64().unwrap();
    for max_tokens in 1..tokens {
        let choice = server.ok(CHAT, &with(body.clone(), json!({"max_tokens": max_tokens})));
        assert_eq!(choice["choices"][0]["finish_reason"], "length");
    }
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "rain"}}});
    let stopped = server.ok(CHAT, &with(with(body, named), json!({"stop": "\"at\""})));
    let choice = &stopped["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    let arguments = &choice["message"]["tool_calls"][0]["function"]["arguments"];
    assert_eq!(arguments.as_str().unwrap().trim(), "{");
}

#[test]
fn calls_and_results_are_part_of_the_conversation() {
    let messages = |arguments: Value| {
        json!([
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "a1b2c3d4e", "type": "function", "function": {"name": "rain", "arguments": arguments}},
            ]},
            {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "warm"},
        ])
    };
    for (template, kind) in
        [(None, "words"), (Some(TAGGED), "template"), (Some(LISTED), "template")]
    {
        let server = Server::with_template(template);
        let models: Value = serde_json::from_str(&server.get("/v1/models").body).unwrap();
        assert_eq!(models["data"][0]["meta"]["tools"], kind);
        let tokens = |messages: Value, other: Value| {
            let body = with(json!({"messages": messages, "max_tokens": 1}), other);
            server.ok(CHAT, &body)["usage"]["prompt_tokens"].as_u64().unwrap()
        };
        let text = messages(json!("{\"at\": \"Bonn\", \"n\": 2}"));
        let object = messages(json!({"at": "Bonn", "n": 2}));
        let without = tokens(text.clone(), json!({}));
        assert_eq!(tokens(object, json!({})), without);
        assert!(tokens(messages(json!("{}")), json!({})) < without);
        let with_tools = json!({"tools": tools()});
        assert!(tokens(text.clone(), with_tools.clone()) > without + 20);
        // Tools that must not be called are not shown.
        assert_eq!(tokens(text, with(with_tools, json!({"tool_choice": "none"}))), without);
        let param = "messages[1].tool_calls[0].function.arguments";
        for wrong in [json!("{"), json!("[]"), json!(7)] {
            let body = json!({"messages": messages(wrong)});
            server.post(CHAT, &body).check_refused(400, Some(param));
        }
    }
    let server = Server::with_template(Some(LISTED));
    let mut wrong = messages(json!("{}"));
    wrong[1]["tool_calls"][0]["id"] = json!("short");
    let refused = server.post(CHAT, &json!({"messages": wrong}));
    refused.check_refused(400, Some("messages"));
    assert!(refused.body.contains("nine characters"), "{}", refused.body);
}

#[test]
fn what_is_wrong_with_tools_is_named() {
    let server = Server::with(ServerConfig::default(), trine_runtime::EngineConfig::default());
    let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let named =
        |name: &str, parameters: Value| function(json!({"name": name, "parameters": parameters}));
    let twice = json!({"type": "function", "function": {"name": "f"}});
    let big = "x".repeat(300 << 10);
    for (other, param) in [
        (json!({"tools": "f"}), "tools"),
        (json!({"tools": [1]}), "tools[0].type"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
        (function(json!({"description": "no name"})), "tools[0].function.name"),
        (named("with blanks", json!({})), "tools[0].function.name"),
        (named(&"x".repeat(65), json!({})), "tools[0].function.name"),
        (function(json!({"name": "f", "description": 1})), "tools[0].function.description"),
        (function(json!({"name": "f", "strict": "yes"})), "tools[0].function.strict"),
        (named("f", json!([])), "tools[0].function.parameters"),
        (named("f", json!({"type": "string"})), "tools[0].function.parameters"),
        (
            named("f", json!({"properties": {"x": {"type": "what"}}})),
            "tools[0].function.parameters",
        ),
        (
            named("f", json!({"properties": {"x": {"$ref": "#/nowhere"}}})),
            "tools[0].function.parameters",
        ),
        (json!({"tools": [twice, twice]}), "tools[1].function.name"),
        (json!({"tools": vec![twice.clone(); 200]}), "tools"),
        (function(json!({"name": "f", "description": big})), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": tools(), "tool_choice": "any"}), "tool_choice"),
        (json!({"tools": tools(), "tool_choice": {"type": "allowed_tools"}}), "tool_choice"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "g"}}}),
            "tool_choice.function.name",
        ),
        (
            json!({"tools": tools(), "response_format": {"type": "regex", "regex": "a"}}),
            "response_format.type",
        ),
        (
            json!({"tools": tools(), "response_format": {"type": "json_object", "schema": {"type": "what"}}}),
            "response_format.schema",
        ),
        (json!({"tools": tools(), "parallel_tool_calls": "no"}), "parallel_tool_calls"),
    ] {
        server.post(CHAT, &with(chat("Hi"), other)).check_refused(400, Some(param));
    }
    let user =
        json!([{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]);
    let refused = server.post(CHAT, &json!({"messages": user}));
    refused.check_refused(400, Some("messages[0].tool_calls"));
    let text = json!({"prompt": "Hi", "tools": tools()});
    server.post("/v1/completions", &text).check_refused(400, Some("tools"));
}

#[test]
fn what_the_grammar_does_not_know_of_a_schema_matters_to_strict_tools_only() {
    let server = Server::new();
    let ask = |strict: bool| {
        let odd = json!({"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
            "if": {"required": ["x"]}});
        let function = json!({"name": "f", "parameters": odd, "strict": strict});
        let tools = json!([{"type": "function", "function": function}]);
        server.post(
            CHAT,
            &with(
                chat("Hi"),
                json!({"tools": tools, "tool_choice": "required", "max_tokens": 200}),
            ),
        )
    };
    assert_eq!(ask(false).status, 200);
    ask(true).check_refused(400, Some("tools[0].function.parameters"));
}
