//! Adapters are models of their own to clients: listed, chosen by name, and never mixed up.

use std::sync::Arc;

use serde_json::{Value, json};
use trine_format::Projection;
use trine_format::peft::Lora;
use trine_runtime::{Adapter, EngineConfig, LowRankType, Model};
use trine_server::{ServedAdapter, ServerConfig};
use trine_tokenizer::ChatTemplate;

use super::{Server, chat, with};

const CHAT: &str = "/v1/chat/completions";

/// An adapter of numbers that depend on `seed`.
fn adapter(model: &Model, name: &str, seed: usize) -> ServedAdapter {
    let (config, rank) = (model.config(), 2);
    let mut lora = Lora {
        rank,
        alpha: 4.0,
        targets: vec![Projection::Q, Projection::Down],
        base: None,
        matrices: Default::default(),
    };
    for layer in 0..config.num_hidden_layers {
        for p in lora.targets.clone() {
            let (out, inp) = config.projection_shape(p);
            let numbers = |len: usize, salt: usize| -> Vec<f32> {
                let number = |i: usize| (i * i * 31 + i * 7 * seed + salt * 131) % 1009;
                (0..len).map(|i| number(i) as f32 / 2500.0 - 0.2).collect()
            };
            lora.matrices
                .insert((layer, p), [numbers(rank * inp, seed), numbers(out * rank, layer)]);
        }
    }
    let adapter = Arc::new(Adapter::new(model, &lora, LowRankType::F16).unwrap());
    ServedAdapter { name: name.to_owned(), root: format!("{name}-files"), adapter, template: None }
}

fn server() -> Server {
    let adapters = |model: &Model| vec![adapter(model, "law", 1), adapter(model, "team/poems", 2)];
    Server::with_adapters(ServerConfig::default(), EngineConfig::default(), adapters)
}

#[test]
fn adapters_are_listed_as_models_with_their_parent() {
    let server = server();
    let models: Value = serde_json::from_str(&server.get("/v1/models").body).unwrap();
    let found: Vec<_> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| {
            assert_eq!(model["max_model_len"], 512);
            [&model["id"], &model["root"], &model["parent"], &model["meta"]["adapter_rank"]]
        })
        .map(|fields| json!(fields))
        .collect();
    assert_eq!(
        found,
        [
            json!(["model", "model", null, null]),
            json!(["law", "law-files", "model", 2]),
            json!(["team/poems", "team/poems-files", "model", 2]),
        ]
    );
    let one: Value = serde_json::from_str(&server.get("/v1/models/team/poems").body).unwrap();
    assert_eq!(one, models["data"][2]);
    server.get("/v1/models/team").check_refused(404, None);
    let refused = server.post(CHAT, &with(chat("Hi"), json!({"model": "poems"})));
    refused.check_refused(404, None);
    for name in ["model", "law", "team/poems"] {
        assert!(refused.body.contains(&format!("\\\"{name}\\\"")), "{}", refused.body);
    }
}

#[test]
fn a_request_is_answered_by_the_model_that_it_names() {
    let server = server();
    let names = [None, Some("law"), Some("team/poems")];
    let text = "A beginning that all of these requests have in common, word for word: ";
    let prompt = server.tokenizer.prompt(text).unwrap();
    let alone = names.map(|name| server.alone_with(name, &prompt, 12));
    assert!(alone[0] != alone[1] && alone[1] != alone[2] && alone[0] != alone[2], "{alone:?}");
    let body = |name: Option<&str>| {
        let body = json!({"prompt": text, "temperature": 0, "max_tokens": 12});
        with(body, name.map_or(json!({}), |name| json!({"model": name})))
    };
    // At once, and one after another; and again, when the beginning is kept.
    for _ in 0..2 {
        let mut running: Vec<_> = names
            .iter()
            .cycle()
            .take(9)
            .map(|name| {
                let headers = "Content-Type: application/json\r\n";
                let body = body(*name).to_string();
                (*name, server.begin("POST", "/v1/completions", headers, body.as_bytes()))
            })
            .collect();
        for (i, (name, stream)) in running.drain(..).enumerate() {
            let answer: Value = serde_json::from_str(&super::Answer::read(stream).body).unwrap();
            assert_eq!(answer["choices"][0]["text"], alone[i % 3]);
            assert_eq!(answer["model"], name.unwrap_or("model"));
        }
    }
    let answer = server.ok("/v1/completions", &body(Some("model")));
    assert_eq!(
        (&answer["choices"][0]["text"], &answer["model"]),
        (&json!(alone[0]), &json!("model"))
    );
    // Streams, conversations and embeddings too.
    let law = json!({"model": "law", "stream": true});
    for chunk in server.post(CHAT, &with(chat("Hi"), law)).chunks() {
        assert_eq!(chunk["model"], "law");
    }
    let embedding = |name: &str| {
        let answer = server.ok("/v1/embeddings", &json!({"input": "A text", "model": name}));
        assert_eq!(answer["model"], name);
        answer["data"][0]["embedding"].clone()
    };
    assert_ne!(embedding("model"), embedding("law"));
    assert_ne!(embedding("team/poems"), embedding("law"));
}

#[test]
fn a_conversation_is_rendered_with_the_template_that_an_adapter_was_trained_with() {
    let template = ChatTemplate::new("Q: {{ messages[-1]['content'] }} A:").unwrap();
    let adapters = |model: &Model| {
        let own = ServedAdapter { template: Some(Arc::new(template)), ..adapter(model, "own", 1) };
        vec![own, adapter(model, "law", 1)]
    };
    let server = Server::with_adapters(ServerConfig::default(), EngineConfig::default(), adapters);
    let tokens = |name: &str| {
        let answer = server.ok(CHAT, &with(chat("Hi"), json!({"model": name, "max_tokens": 1})));
        answer["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let own = server.tokenizer.encode("Q: Hi A:", false).unwrap().len() as u64;
    assert!([own, own + 1].contains(&tokens("own")), "{}", tokens("own"));
    assert_eq!(tokens("law"), tokens("model"));
    assert_ne!(tokens("law"), tokens("own"));
}
