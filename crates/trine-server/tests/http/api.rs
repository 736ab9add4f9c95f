//! Endpoints and their parameters.

use serde_json::{Value, json};
use trine_server::ServerConfig;

use super::{Server, chat, with};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect()
}

#[test]
fn a_chat_is_answered_whole_and_in_chunks_alike() {
    let server = Server::new();
    let whole = server.ok(CHAT, &chat("Hello there"));
    let choice = &whole["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["finish_reason"], "length");
    let prompt = server.tokenizer.encode("User: Hello there<|eot_id|>Assistant: ", true).unwrap();
    assert_eq!(text, server.alone(&prompt, 12));
    let usage = &whole["usage"];
    assert_eq!(usage["prompt_tokens"], prompt.len());
    assert_eq!(
        (&usage["completion_tokens"], &usage["total_tokens"]),
        (&json!(12), &json!(prompt.len() + 12))
    );

    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let chunks = server.post(CHAT, &with(chat("Hello there"), options)).chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let deltas = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str());
    assert_eq!(deltas.collect::<String>(), text);
    let [.., last, with_usage] = &chunks[..] else { panic!("{chunks:?}") };
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(with_usage["choices"], json!([]));
    assert_eq!(with_usage["usage"]["completion_tokens"], 12);
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"]));
}

#[test]
fn text_parts_are_one_text() {
    let server = Server::new();
    let parts = json!([{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]);
    let messages = json!({"messages": [{"role": "user", "content": parts}]});
    let answer = server.ok(CHAT, &with(chat(""), messages));
    assert_eq!(answer["choices"], server.ok(CHAT, &chat("Hello there"))["choices"]);
}

#[test]
fn texts_and_ids_are_continued() {
    let server = Server::new();
    let ids = server.tokenizer.encode("The cat", true).unwrap();
    let expected = server.alone(&ids, 8);
    let body = json!({"max_tokens": 8, "temperature": 0, "model": "model"});
    for prompt in [json!("The cat"), json!(ids), json!(["The cat"]), json!([ids])] {
        let answer = server.ok(COMPLETIONS, &with(body.clone(), json!({"prompt": prompt})));
        assert_eq!(texts(&answer), [&expected]);
    }
    let several = json!({"prompt": ["The cat", "A"], "n": 2});
    let answer = server.ok(COMPLETIONS, &with(body.clone(), several));
    let texts = texts(&answer);
    assert_eq!((texts.len(), texts[0], texts[1], texts[2]), (4, &*expected, &*expected, texts[3]));
    let streamed = with(body, json!({"prompt": "The cat", "stream": true, "echo": true}));
    let chunks = server.post(COMPLETIONS, &streamed).chunks();
    let text: String = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, format!("The cat{expected}"));
}

#[test]
fn the_same_seed_gives_the_same_text_and_choices_differ() {
    let server = Server::new();
    let drawn = json!({"prompt": "A", "max_tokens": 20, "temperature": 1.5, "seed": 7, "n": 3});
    let (first, second) = (server.ok(COMPLETIONS, &drawn), server.ok(COMPLETIONS, &drawn));
    assert_eq!(texts(&first), texts(&second));
    assert_ne!(texts(&first)[0], texts(&first)[1]);
    let other = server.ok(COMPLETIONS, &with(drawn, json!({"seed": 100})));
    assert_ne!(texts(&first), texts(&other));
}

#[test]
fn a_stop_string_ends_the_text_before_it_wherever_tokens_end() {
    let server = Server::new();
    let body = json!({"prompt": "The cat", "max_tokens": 40, "temperature": 0});
    let whole = server.ok(COMPLETIONS, &body);
    let whole = texts(&whole)[0];
    let characters: Vec<(usize, char)> = whole.char_indices().collect();
    let stop: String = characters[9..12].iter().map(|(_, c)| c).collect();
    let expected = &whole[..whole.find(&stop).unwrap()];
    for stop in [json!(stop), json!(["never\u{0}", stop])] {
        let answer = server.ok(COMPLETIONS, &with(body.clone(), json!({"stop": stop})));
        assert_eq!(texts(&answer), [expected]);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap();
        assert_eq!(prompt, server.tokenizer.encode("The cat", true).unwrap().len() as u64);
        assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 40);
    }
}

/// As lm-evaluation-harness asks for them.
#[test]
fn echoed_log_probabilities_are_those_of_the_model() {
    let server = Server::new();
    let ids = server.tokenizer.encode("The cat sat on the mat", true).unwrap();
    let body =
        json!({"prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true});
    let answer = server.ok(COMPLETIONS, &body);
    let logprobs = &answer["choices"][0]["logprobs"];
    let chosen = logprobs["token_logprobs"].as_array().unwrap();
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert_eq!((chosen.len(), tokens.len()), (ids.len() + 1, ids.len() + 1));
    assert!(chosen[0].is_null() && logprobs["top_logprobs"][0].is_null());
    let mut session = trine_runtime::Session::new(&server.model);
    let logits = session.logits_of_all(&ids).unwrap();
    let vocab = server.model.config().vocab_size;
    let mut sum = 0.0;
    for (i, row) in logits.chunks(vocab).take(ids.len() - 1).enumerate() {
        let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        let expected = f64::from(row[ids[i + 1] as usize]) - total.ln();
        let found = chosen[i + 1].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-4, "{i}: {found}, {expected}");
        let top = logprobs["top_logprobs"][i + 1].as_object().unwrap();
        let best = top.values().map(|value| value.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert!(best >= found);
        sum += found;
    }
    // The likeliest id is the one that greedy decoding takes.
    let last = chosen.last().unwrap().as_f64().unwrap();
    assert!(logprobs["top_logprobs"][ids.len()].as_object().unwrap().values().any(|v| *v == last));
    let loss = trine_runtime::cross_entropy(&logits[..(ids.len() - 1) * vocab], vocab, &ids[1..]);
    assert!((-sum - loss).abs() < 1e-2, "{sum}, {loss}");
    // Only the prompt.
    let none = server.ok(COMPLETIONS, &with(body, json!({"max_tokens": 0})));
    assert_eq!(none["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), ids.len());
}

#[test]
fn chats_have_log_probabilities_of_every_token() {
    let server = Server::new();
    let asked = json!({"logprobs": true, "top_logprobs": 3});
    let answer = server.ok(CHAT, &with(chat("Hi"), asked.clone()));
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 12);
    for token in tokens {
        assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["bytes"], json!(token["token"].as_str().unwrap().as_bytes()));
    }
    let streamed = server.post(CHAT, &with(with(chat("Hi"), asked), json!({"stream": true})));
    let count =
        |chunk: &Value| chunk["choices"][0]["logprobs"]["content"].as_array().map_or(0, Vec::len);
    assert_eq!(streamed.chunks().iter().map(count).sum::<usize>(), 12);
}

#[test]
fn biases_and_penalties_move_the_choice() {
    let server = Server::new();
    let body = json!({"prompt": "The cat", "max_tokens": 10, "temperature": 0, "logprobs": 0});
    let tokens = |other: Value| {
        server.ok(COMPLETIONS, &with(body.clone(), other))["choices"][0]["logprobs"]["tokens"]
            .clone()
    };
    let a = server.tokenizer.id("a").unwrap();
    assert_eq!(tokens(json!({"logit_bias": {a.to_string(): 100}})), json!(vec!["a"; 10]));
    let mixed = tokens(
        json!({"logit_bias": {a.to_string(): 100}, "frequency_penalty": 2, "repetition_penalty": 1000.0}),
    );
    assert_ne!(mixed, json!(vec!["a"; 10]));
}

#[test]
fn wrong_parameters_are_named() {
    let server = Server::new();
    for (other, param) in [
        (json!({"temperature": -1}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 2}), "min_p"),
        (json!({"presence_penalty": 3}), "presence_penalty"),
        (json!({"frequency_penalty": -3}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"logit_bias": {"512": 1}}), "logit_bias[\"512\"]"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias[\"1\"]"),
        (json!({"n": 0}), "n"),
        (json!({"n": 65}), "n"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop": 5}), "stop"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"top_logprobs": 21, "logprobs": true}), "top_logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "user"}, {"content": "x"}]}), "messages[1]"),
        (json!({"messages": [{"role": "user", "content": 5}]}), "messages[0].content"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "regex"}}), "response_format.regex"),
        (json!({"response_format": {"type": "regex", "regex": "("}}), "response_format.regex"),
        (
            json!({"response_format": {"type": "grammar", "grammar": "start: nowhere"}}),
            "response_format.grammar",
        ),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}),
            "response_format.json_schema.schema",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}),
            "response_format.json_schema.schema",
        ),
    ] {
        server.post(CHAT, &with(chat("Hi"), other)).check_refused(400, Some(param));
    }
    let text = json!({"prompt": "A", "max_tokens": 1});
    for (other, param) in [
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [512]}), "prompt"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"prompt": vec!["a"; 65]}), "prompt"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"suffix": "x"}), "suffix"),
    ] {
        server.post(COMPLETIONS, &with(text.clone(), other)).check_refused(400, Some(param));
    }
    server.post(CHAT, &with(chat("Hi"), json!({"model": "other"}))).check_refused(404, None);
    server.request("GET", CHAT, "", b"").check_refused(405, None);
    server.get("/v2").check_refused(404, None);
    let form = "Content-Type: text/plain\r\n";
    server.request("POST", CHAT, form, chat("Hi").to_string().as_bytes()).check_refused(415, None);
}

#[test]
fn a_text_longer_than_the_context_is_refused() {
    let server = Server::new();
    let long = json!({"prompt": vec![5; 513], "max_tokens": 1});
    let answer = server.post(COMPLETIONS, &long);
    answer.check_refused(400, Some("prompt"));
    assert!(answer.body.contains("context_length_exceeded") && answer.body.contains("512"));
    // What asks for more than is left gets what is left.
    let full = json!({"prompt": vec![5; 510], "max_tokens": 100, "temperature": 0});
    assert_eq!(server.ok(COMPLETIONS, &full)["usage"]["completion_tokens"], 3);
}

#[test]
fn tokens_and_texts_are_turned_into_each_other() {
    let server = Server::new();
    let found =
        server.ok("/tokenize", &json!({"content": "The cat<|eot_id|>", "add_special": true}));
    let ids = server.tokenizer.encode("The cat<|eot_id|>", true).unwrap();
    assert_eq!(found["tokens"], json!(ids));
    assert_eq!(
        server.ok("/detokenize", &json!({"tokens": ids}))["content"].as_str().unwrap(),
        server.tokenizer.decode(&ids, false).unwrap()
    );
    let plain = server.ok("/tokenize", &json!({"content": "<|eot_id|>", "parse_special": false}));
    assert!(plain["count"].as_u64().unwrap() > 1);
    server.post("/detokenize", &json!({"tokens": [9999]})).check_refused(400, Some("tokens"));
}

#[test]
fn embeddings_have_length_1_and_differ() {
    let server = Server::new();
    let vectors = |other: Value| -> Vec<Vec<f64>> {
        let body = json!({"input": ["The cat sat", "Something else", "The cat sat"]});
        let answer = server.ok("/v1/embeddings", &with(body, other));
        let data = answer["data"].as_array().unwrap();
        data.iter().map(|d| serde_json::from_value(d["embedding"].clone()).unwrap()).collect()
    };
    let mean = vectors(json!({}));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert_eq!((mean.len(), mean[0].len()), (3, server.model.config().hidden_size));
    assert!(mean.iter().all(|vector| (dot(vector, vector) - 1.0).abs() < 1e-5));
    assert_eq!(mean[0], mean[2]);
    assert!(dot(&mean[0], &mean[1]) < 0.999);
    assert_ne!(vectors(json!({"pooling": "last"})), mean);
    let body = json!({"input": "The cat sat", "encoding_format": "base64"});
    let encoded = server.ok("/v1/embeddings", &body);
    let text = encoded["data"][0]["embedding"].as_str().unwrap();
    assert_eq!(text.len(), (server.model.config().hidden_size * 4).div_ceil(3) * 4);
    for (other, param) in [
        (json!({"input": []}), "input"),
        (json!({"dimensions": 5}), "dimensions"),
        (json!({"encoding_format": "x"}), "encoding_format"),
        (json!({"pooling": "max"}), "pooling"),
    ] {
        let body = with(json!({"input": "A"}), other);
        server.post("/v1/embeddings", &body).check_refused(400, Some(param));
    }
}

#[test]
fn models_health_and_metrics_say_what_is_there() {
    let server = Server::new();
    let models: Value = serde_json::from_str(&server.get("/v1/models").body).unwrap();
    assert_eq!(
        (&models["data"][0]["id"], &models["data"][0]["max_model_len"]),
        (&json!("model"), &json!(512))
    );
    assert_eq!(server.get("/v1/models/model").status, 200);
    server.get("/v1/models/other").check_refused(404, None);
    let health: Value = serde_json::from_str(&server.get("/health").body).unwrap();
    assert_eq!(health["status"], "ok");
    let prompt = server.ok(CHAT, &chat("Hi"))["usage"]["prompt_tokens"].as_f64().unwrap();
    server.wait_until_idle();
    assert_eq!(server.metric("trine_generated_tokens_total"), 12.0);
    assert_eq!(server.metric("trine_prompt_tokens_total"), prompt);
    assert_eq!(server.metric("trine_first_token_seconds_count"), 1.0);
    assert!(server.metric("trine_pass_seconds_total") > 0.0);
    let chats = "trine_http_responses_total{path=\"/v1/chat/completions\",status=\"200\"}";
    assert_eq!(server.metric(chats), 1.0);
}

#[test]
fn without_a_key_there_is_only_the_page_and_health() {
    let config = ServerConfig {
        api_keys: vec!["one-key".to_owned(), "other-key".to_owned()],
        ..ServerConfig::default()
    };
    let server = Server::with(config, Default::default());
    let body = chat("Hi").to_string();
    let ask = |key: &str| {
        let headers = format!("Content-Type: application/json\r\n{key}");
        server.request("POST", CHAT, &headers, body.as_bytes())
    };
    for wrong in ["", "Authorization: Bearer one-ke\r\n", "Authorization: Basic one-key\r\n"] {
        ask(wrong).check_refused(401, None);
    }
    for key in ["one-key", "other-key"] {
        assert_eq!(ask(&format!("Authorization: Bearer {key}\r\n")).status, 200);
    }
    for path in ["/v1/models", "/metrics"] {
        server.get(path).check_refused(401, None);
    }
    assert_eq!((server.get("/").status, server.get("/health").status), (200, 200));
}

#[test]
fn the_page_loads_nothing_from_elsewhere_and_runs_nothing_in_the_document() {
    let server = Server::new();
    let page = server.get("/");
    assert!(page.head.contains("content-security-policy: default-src 'none'; script-src 'self'"));
    assert!(page.body.contains("<title>Trine</title>") && !page.body.contains("<script>"));
    for path in ["/", "/chat.css", "/chat.js", "/markdown.js"] {
        let file = server.get(path);
        assert_eq!(file.status, 200);
        assert!(file.head.contains("x-content-type-options: nosniff"));
        // No address of another host, and no way for text to become markup.
        for forbidden in
            ["http://", "https://", "innerHTML =", "insertAdjacentHTML", "document.write", "eval("]
        {
            assert!(!file.body.contains(forbidden), "{path}: {forbidden}");
        }
    }
}

#[test]
fn a_request_keeps_its_id() {
    let server = Server::new();
    let given = server.request("GET", "/health", "X-Request-Id: abc-1\r\n", b"");
    assert!(given.head.contains("x-request-id: abc-1"), "{}", given.head);
    let odd = server.request("GET", "/health", "X-Request-Id: a b\r\n", b"");
    assert!(odd.head.contains("x-request-id: ") && !odd.head.contains("a b"), "{}", odd.head);
}

/// Every path of the document is there, and takes what the document calls its parameters' types.
#[test]
fn the_openapi_document_describes_what_is_there() {
    let server = Server::new();
    let document: Value = serde_json::from_str(&server.get("/openapi.json").body).unwrap();
    let paths = document["paths"].as_object().unwrap();
    assert_eq!(paths.len(), 8);
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let Some(content) = operation["requestBody"]["content"].as_object() else {
                assert_eq!((&method[..], server.get(path).status), ("get", 200), "{path}");
                continue;
            };
            assert_eq!(server.post(path, &json!({})).status, 400, "{path}");
            let reference = content["application/json"]["schema"]["$ref"].as_str().unwrap();
            let schema = document.pointer(&reference[1..]).unwrap();
            for name in schema["required"].as_array().unwrap() {
                // What is required is missed by name.
                let missed = server.post(path, &json!({})).body;
                assert!(missed.contains(name.as_str().unwrap()), "{path}: {missed}");
            }
            for (name, property) in schema["properties"].as_object().unwrap() {
                // A list of lists of objects is the type of no parameter.
                let wrong = with(sample(path), json!({name: [[{}]]}));
                let answer = server.post(path, &wrong);
                assert_eq!(answer.status, 400, "{path}, {name}, {property}: {}", answer.body);
                assert!(answer.body.contains(&**name), "{path}: {}", answer.body);
            }
            assert_eq!(server.post(path, &sample(path)).status, 200, "{path}");
        }
    }
}

/// The least that a path can be asked.
fn sample(path: &str) -> Value {
    match path {
        CHAT => json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}),
        COMPLETIONS => json!({"prompt": "Hi", "max_tokens": 1}),
        "/v1/embeddings" => json!({"input": "Hi"}),
        "/tokenize" => json!({"content": "Hi"}),
        _ => json!({"tokens": [1, 2]}),
    }
}

#[test]
fn only_pages_of_origins_that_were_named_may_ask() {
    let named = "https://example.org".to_owned();
    let config = ServerConfig { cors_origins: vec![named], ..ServerConfig::default() };
    let allowed = |server: &Server, origin: &str| {
        let headers = format!(
            "Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n\
             Access-Control-Request-Headers: authorization,content-type\r\n"
        );
        let answer = server.request("OPTIONS", CHAT, &headers, b"");
        answer.head.to_lowercase().contains("access-control-allow-origin")
    };
    let server = Server::with(config, trine_runtime::EngineConfig::default());
    assert!(allowed(&server, "https://example.org"));
    assert!(!allowed(&server, "https://example.com"));
    assert!(!allowed(&Server::new(), "https://example.org"));
}
