//! The engine: each request gets what it would get alone, and none gets in the way of another.

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use trine_format::ModelFile;
use trine_kernels::nn::KvType;
use trine_runtime::{
    End, Engine, EngineConfig, Event, GeneratorConfig, LoadOptions, Logits, Model, Pooling,
    Request, Sampler, SamplerConfig, Sampling, Sequence, Session, Sink, Step, SubmitError, Ticket,
    Usage,
};

fn model(name: &str, kv: KvType) -> Arc<Model> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/fixtures");
    let file = ModelFile::open(&fixtures.join(name)).unwrap();
    Arc::new(Model::load_with(&file, &LoadOptions { kv, ..LoadOptions::default() }).unwrap())
}

fn tied() -> Arc<Model> {
    model("tied-h64/packed", KvType::Int8)
}

fn engine(model: &Arc<Model>, config: EngineConfig) -> Engine {
    Engine::start(model.clone(), config).unwrap()
}

/// A text of its own for every seed.
fn prompt(model: &Model, seed: usize, len: usize) -> Vec<u32> {
    let vocab = model.config().vocab_size;
    (0..len).map(|at| ((at * at * 31 + at * 7 * seed + seed * 131) % vocab) as u32).collect()
}

fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request { prompt, max_tokens, ..Request::default() }
}

/// What a session alone makes of a request.
fn alone(model: &Model, request: &Request) -> Vec<u32> {
    let mut session = Session::new(model);
    let mut sampler = Sampler::new(request.sampling.sampler).unwrap();
    let config = GeneratorConfig {
        max_tokens: request.max_tokens,
        stop: request.stop.clone(),
        ..GeneratorConfig::default()
    };
    let ids = session.generate(&request.prompt, &mut sampler, config).unwrap();
    ids.collect::<Result<_, _>>().unwrap()
}

/// Sends its events to a channel.
fn sink() -> (Sink, Receiver<Event>) {
    let (sender, events) = channel();
    // Who has gone away needs no events.
    (Box::new(move |event| drop(sender.send(event))), events)
}

fn submit(engine: &Engine, request: Request) -> (Ticket, Receiver<Event>) {
    let (sink, events) = sink();
    (engine.submit_all(vec![request], vec![sink]).unwrap().pop().unwrap(), events)
}

/// The ids of all events, and how they ended.
fn collect(events: &Receiver<Event>) -> (Vec<u32>, End, Usage) {
    let mut ids = Vec::new();
    loop {
        match events.recv_timeout(Duration::from_secs(60)).unwrap() {
            Event::Token(token) => ids.push(token.id),
            Event::Begin(_) | Event::Prompt(_) | Event::Embedding(_) => (),
            Event::End(end, usage) => return (ids, end, usage),
        }
    }
}

#[test]
fn many_requests_at_once_get_what_each_gets_alone() {
    for (name, kv) in [("tied-h64/packed", KvType::Int8), ("untied-h192/packed", KvType::F32)] {
        let model = model(name, kv);
        for config in [
            EngineConfig::default(),
            EngineConfig { max_running: 3, prompt_share: 1, ..EngineConfig::default() },
        ] {
            let engine = engine(&model, config);
            let mut all = Vec::new();
            for seed in 0..24 {
                // Some begin alike, some are greedy, some are drawn.
                let mut ids = prompt(&model, 1000 + seed % 3, [0, 80, 150][seed % 3]);
                ids.extend(prompt(&model, seed, 1 + seed * 37 % 200));
                let temperature = [0.0, 0.0, 0.9][seed % 3];
                let sampler = SamplerConfig {
                    temperature,
                    top_p: 0.9,
                    seed: seed as u64,
                    ..SamplerConfig::default()
                };
                let sampling = Sampling { sampler, ..Sampling::default() };
                all.push(Request { sampling, ..request(ids, 1 + seed * 5 % 40) });
            }
            let running: Vec<_> =
                all.iter().map(|request| submit(&engine, request.clone())).collect();
            for (seed, (request, (_ticket, events))) in all.iter().zip(&running).enumerate() {
                let (ids, end, usage) = collect(events);
                assert_eq!(ids, alone(&model, request), "{name}, request {seed}, {config:?}");
                assert_eq!(end, End::Length);
                assert_eq!((usage.prompt, usage.generated), (request.prompt.len(), ids.len()));
            }
        }
    }
}

#[test]
fn a_common_beginning_is_computed_once() {
    let model = tied();
    let engine = engine(&model, EngineConfig::default());
    let text = prompt(&model, 1, 300);
    let requests: Vec<Request> = (0..4).map(|_| request(text.clone(), 8)).collect();
    let (sinks, events): (Vec<_>, Vec<_>) = requests.iter().map(|_| sink()).unzip();
    let _tickets = engine.submit_all(requests.clone(), sinks).unwrap();
    let expected = alone(&model, &requests[0]);
    let mut cached = Vec::new();
    for events in &events {
        let (ids, _, usage) = collect(events);
        assert_eq!(ids, expected);
        cached.push(usage.cached);
    }
    assert_eq!(cached, [0, 299, 299, 299]);
    // Later, with an end of its own, and after an answer.
    let mut longer = text.clone();
    longer.extend(&expected);
    longer.extend([5, 6, 7]);
    let (_ticket, events) = submit(&engine, request(longer.clone(), 8));
    let (ids, _, usage) = collect(&events);
    assert_eq!(ids, alone(&model, &request(longer, 8)));
    // The last id of an answer has not been seen.
    assert_eq!(usage.cached, 307);
    let stats = engine.stats();
    assert_eq!((stats.prompt_tokens, stats.cached_tokens), (300 + 3 + 4, 3 * 299 + 307));
    assert_eq!((stats.generated_tokens, stats.finished), (40, 5));
}

#[test]
fn memory_is_bounded_and_everything_is_served() {
    let model = tied();
    let mut sequence = Sequence::new(&model);
    let ids = [1];
    let step = Step { sequence: &mut sequence, ids: &ids, logits: Logits::None };
    model.step(&mut [step]).unwrap();
    let page = sequence.bytes();
    // For one request of 200 and 20 positions, or some shorter ones.
    let config = EngineConfig { kv_bytes: 6 * page, ..EngineConfig::default() };
    let engine = engine(&model, config);
    let requests: Vec<Request> =
        (0..20).map(|seed| request(prompt(&model, seed, [200, 10][seed % 2]), 20)).collect();
    let running: Vec<_> = requests.iter().map(|request| submit(&engine, request.clone())).collect();
    for (request, (_ticket, events)) in requests.iter().zip(&running) {
        let mut ids = Vec::new();
        while let Ok(event) = events.recv_timeout(Duration::from_secs(60)) {
            assert!(engine.stats().kv_bytes <= config.kv_bytes as u64);
            match event {
                Event::Token(token) => ids.push(token.id),
                Event::Begin(_) | Event::Prompt(_) | Event::Embedding(_) => (),
                Event::End(end, _) => {
                    assert_eq!(end, End::Length);
                    break;
                }
            }
        }
        assert_eq!(ids, alone(&model, request));
    }
    let refused = engine.submit(request(prompt(&model, 0, 300), 100), drop);
    let Err(SubmitError::TooLarge { positions, needed, limit }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!((positions, needed, limit), (399, 8 * page, 6 * page));
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let model = tied();
    let engine = engine(&model, EngineConfig::default());
    let (sender, events) = channel();
    let both = [prompt(&model, 1, 510), prompt(&model, 2, 5)];
    let sinks = (0..2).map(|i| -> Sink {
        let sender = sender.clone();
        Box::new(move |event| drop(sender.send((i, event))))
    });
    let requests = both.map(|prompt| request(prompt, 2)).to_vec();
    let _tickets = engine.submit_all(requests, sinks.collect()).unwrap();
    let mut tokens = events.iter().filter(|(_, event)| matches!(event, Event::Token(_)));
    assert_eq!(tokens.next().unwrap().0, 1);
}

#[test]
fn whoever_goes_away_is_forgotten_and_the_others_get_the_same() {
    let model = tied();
    let config = EngineConfig { max_running: 4, ..EngineConfig::default() };
    let engine = engine(&model, config);
    let request = |seed| request(prompt(&model, seed, 40), 400);
    let mut running: Vec<_> = (0..12).map(|seed| (seed, submit(&engine, request(seed)))).collect();
    running.retain(|(seed, (_, events))| {
        if seed % 3 == 0 {
            // It runs.
            let _begin = events.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        seed % 3 != 0
    });
    for (seed, (_ticket, events)) in &running {
        let (ids, _, _) = collect(events);
        assert_eq!(ids, alone(&model, &request(*seed)), "request {seed}");
    }
    let begin = Instant::now();
    while engine.stats().running + engine.stats().waiting > 0 {
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    let stats = engine.stats();
    assert_eq!((stats.finished, stats.cancelled), (8, 4));
}

#[test]
fn what_does_not_fit_into_the_queue_is_refused_and_a_place_that_is_left_is_free() {
    let model = tied();
    let config = EngineConfig { max_running: 1, max_waiting: 3, ..EngineConfig::default() };
    let engine = engine(&model, config);
    let long = || request(prompt(&model, 1, 10), 500);
    let (first, events) = submit(&engine, long());
    // It runs.
    let _begin = events.recv_timeout(Duration::from_secs(60)).unwrap();
    let waiting: Vec<_> = (0..2).map(|_| submit(&engine, long())).collect();
    let two = || (vec![long(), long()], vec![sink().0, sink().0]);
    let (requests, sinks) = two();
    let refused = engine.submit_all(requests, sinks);
    assert!(matches!(refused, Err(SubmitError::Busy { waiting: 2 })), "{refused:?}");
    drop(waiting);
    let (requests, sinks) = two();
    drop(engine.submit_all(requests, sinks).unwrap());
    drop(first);
}

#[test]
fn clients_take_turns_however_many_requests_one_has() {
    let model = tied();
    let config = EngineConfig { max_running: 1, max_waiting: 16, ..EngineConfig::default() };
    let engine = engine(&model, config);
    let ended = Arc::new(Mutex::new(Vec::new()));
    let ask = |client: u64, seed: usize, tokens: usize| {
        let (ended, (sender, end)) = (ended.clone(), channel());
        let request = Request { client: Some(client), ..request(prompt(&model, seed, 4), tokens) };
        let ticket = engine.submit(request, move |event| {
            if let Event::End(..) = event {
                ended.lock().unwrap().push(client);
                sender.send(()).unwrap();
            }
        });
        ticket.map(|ticket| (ticket, end))
    };
    // One that runs for a while, so that the others wait.
    let mut all = vec![ask(1, 0, 400).unwrap()];
    while engine.stats().running == 0 {
        std::thread::yield_now();
    }
    all.extend((1..=12).map(|seed| ask(1, seed, 4).unwrap()));
    let refused = ask(1, 13, 4).err();
    let of_one = matches!(refused, Some(SubmitError::ClientBusy { waiting: 12, limit: 12 }));
    assert!(of_one, "{refused:?}");
    // There is a place for others, and they need not wait for all that were there before.
    all.extend([ask(2, 14, 4).unwrap(), ask(3, 15, 4).unwrap(), ask(2, 16, 4).unwrap()]);
    for (_ticket, end) in &all {
        end.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    let ended = ended.lock().unwrap();
    assert_eq!(ended.len(), 16);
    let last = |client: u64| ended.iter().rposition(|of| *of == client).unwrap();
    assert!(last(2) <= 5 && last(3) <= 5, "{ended:?}");
}

#[test]
fn deadlines_end_what_runs_and_what_waits() {
    let model = tied();
    let engine = engine(&model, EngineConfig { max_running: 1, ..EngineConfig::default() });
    let running = request(prompt(&model, 1, 10), 500);
    let late = Request { deadline: Some(Instant::now()), ..request(vec![1], 5) };
    let (_first, first) = submit(&engine, running.clone());
    let (_second, second) = submit(&engine, late);
    assert_eq!(collect(&second).1, End::Deadline);
    assert_eq!(collect(&first).0, alone(&model, &running));
    let soon = Some(Instant::now() + Duration::from_millis(5));
    let (_third, third) = submit(&engine, Request { deadline: soon, ..running });
    let (ids, end, usage) = collect(&third);
    assert_eq!(usage.generated, ids.len());
    assert!(end == End::Deadline || ids.len() == 500, "{end:?} after {}", ids.len());
}

#[test]
fn a_closed_engine_serves_what_it_has_and_an_aborted_one_ends_it() {
    let model = tied();
    let config = EngineConfig { max_running: 2, ..EngineConfig::default() };
    let request = |seed| request(prompt(&model, seed, 10), 300);
    let closed = engine(&model, config);
    let running: Vec<_> = (0..5).map(|seed| submit(&closed, request(seed))).collect();
    closed.close();
    assert!(matches!(closed.submit(request(9), drop), Err(SubmitError::Closed)));
    for (_ticket, events) in &running {
        assert_eq!(collect(events).1, End::Length);
    }
    let begin = Instant::now();
    while closed.is_alive() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the thread goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
    let aborted = engine(&model, config);
    let running: Vec<_> = (0..5).map(|seed| submit(&aborted, request(seed))).collect();
    drop(aborted);
    let ends: Vec<End> = running.iter().map(|(_, events)| collect(events).1).collect();
    assert!(ends.contains(&End::Aborted), "{ends:?}");
}

#[test]
fn stop_ids_lengths_and_the_context_end_a_text() {
    let model = tied();
    let engine = engine(&model, EngineConfig::default());
    let whole = request(prompt(&model, 1, 20), 30);
    let ids = alone(&model, &whole);
    let stop = ids[7];
    let at = ids.iter().position(|id| *id == stop).unwrap();
    let stopped = Request { stop: vec![stop], ..whole.clone() };
    let (_ticket, events) = submit(&engine, stopped);
    let (found, end, usage) = collect(&events);
    assert_eq!((&found[..], end, usage.generated), (&ids[..at], End::Stop, at));

    let (_ticket, events) = submit(&engine, Request { max_tokens: 0, ..whole });
    assert_eq!(collect(&events).1, End::Length);

    let limit = model.config().max_position_embeddings;
    let full = request(prompt(&model, 3, limit - 5), usize::MAX);
    let (_ticket, events) = submit(&engine, full.clone());
    let (found, end, _) = collect(&events);
    assert_eq!((found.len(), end), (6, End::Length));
    assert_eq!(found, alone(&model, &full));
}

#[test]
fn log_probabilities_of_a_prompt_are_those_of_its_logits() {
    let model = tied();
    let engine = engine(&model, EngineConfig::default());
    let text = prompt(&model, 1, 100);
    let wanted = Request { logprobs: Some(2), prompt_logprobs: true, ..request(text.clone(), 1) };
    // The second time, what is in the cache must not be left out.
    for _ in 0..2 {
        let (_ticket, events) = submit(&engine, wanted.clone());
        let _begin = events.recv_timeout(Duration::from_secs(60)).unwrap();
        let Event::Prompt(found) = events.recv_timeout(Duration::from_secs(60)).unwrap() else {
            panic!("expected the prompt")
        };
        let Event::Token(token) = events.recv_timeout(Duration::from_secs(60)).unwrap() else {
            panic!("expected a token")
        };
        let logits = Session::new(&model).logits_of_all(&text).unwrap();
        let vocab = model.config().vocab_size;
        let next = text[1..].iter().copied().chain([token.id]);
        let found = found.into_iter().chain(token.logprob);
        let mut count = 0;
        for ((row, id), found) in logits.chunks(vocab).zip(next).zip(found) {
            let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
            let expected = f64::from(row[id as usize]) - sum.ln();
            assert_eq!(found.id, id);
            assert!((f64::from(found.logprob) - expected).abs() < 1e-4);
            let best = (0..vocab).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            assert!(row[found.top[0].0 as usize] == row[best] && found.top[0].1 >= found.top[1].1);
            count += 1;
        }
        assert_eq!(count, 100);
        assert_eq!(collect(&events).2.cached, 0);
    }
}

#[test]
fn embeddings_are_pooled_hidden_states_in_parts_or_whole() {
    let model = tied();
    let width = model.config().hidden_size;
    let engine = engine(&model, EngineConfig { prompt_share: 7, ..EngineConfig::default() });
    let text = prompt(&model, 1, 300);
    let mut sequence = Sequence::new(&model);
    let step = Step { sequence: &mut sequence, ids: &text, logits: Logits::Hidden };
    let hidden = model.step(&mut [step]).unwrap()[0].to_vec();
    // Beside an answer, so that the prompt goes in small parts.
    let (_other, other) = submit(&engine, request(prompt(&model, 2, 5), 400));
    let _begin = other.recv_timeout(Duration::from_secs(60)).unwrap();
    for pooling in [Pooling::Mean, Pooling::Last] {
        let wanted = Request { embedding: Some(pooling), ..request(text.clone(), 9) };
        let (_ticket, events) = submit(&engine, wanted);
        let _begin = events.recv_timeout(Duration::from_secs(60)).unwrap();
        let Event::Embedding(found) = events.recv_timeout(Duration::from_secs(60)).unwrap() else {
            panic!("expected an embedding")
        };
        let expected = |i: usize| match pooling {
            Pooling::Last => hidden[299 * width + i],
            Pooling::Mean => hidden.chunks(width).map(|row| row[i]).sum::<f32>() / 300.0,
        };
        assert_eq!(found.len(), width);
        for (i, found) in found.iter().enumerate() {
            assert!((found - expected(i)).abs() < 1e-4, "{pooling:?}, {i}");
        }
        let (ids, end, usage) = collect(&events);
        assert_eq!((ids.len(), end, usage.cached), (0, End::Length, 0));
    }
}

#[test]
fn requests_that_can_only_fail_are_refused() {
    let model = tied();
    let engine = engine(&model, EngineConfig::default());
    let sampler = SamplerConfig { temperature: -1.0, ..SamplerConfig::default() };
    let valid = request(vec![1], 5);
    let sampling = |sampling| Request { sampling, ..valid.clone() };
    for (request, name) in [
        (request(vec![], 5), "no"),
        (request(vec![512], 5), "512"),
        (request(vec![1; 513], 5), "513"),
        (sampling(Sampling { sampler, ..Sampling::default() }), "temperature"),
        (sampling(Sampling { logit_bias: vec![(600, 1.0)], ..Sampling::default() }), "600"),
        (
            sampling(Sampling { logit_bias: vec![(6, f32::NAN)], ..Sampling::default() }),
            "logit_bias",
        ),
        (sampling(Sampling { presence_penalty: f32::NAN, ..Sampling::default() }), "presence"),
    ] {
        let error = engine.submit(request, drop).unwrap_err();
        assert!(matches!(error, SubmitError::Invalid(_)), "{error}");
        assert!(error.to_string().contains(name), "{name}: {error}");
    }
}
