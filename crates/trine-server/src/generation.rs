//! From the engine's events to pieces of text.
//!
//! Every choice has a task of its own, which turns ids to text and looks for stop strings. It holds
//! the engine's ticket: when the response is dropped because the client went away, the task ends, and
//! with it the request.

use std::sync::Arc;
use std::time::Instant;

use axum::http::StatusCode;
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver, channel, unbounded_channel};
use trine_runtime::{End, Event, Logprob, Request, Sink, Ticket, Usage};

use crate::App;
use crate::error::ApiError;
use crate::stop::StopStrings;

/// Pieces that may lie between a choice and its reader.
const AHEAD: usize = 32;

/// Something new of a choice.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    /// Which choice.
    pub(crate) index: usize,
    /// Text that follows.
    pub(crate) text: String,
    /// The ids behind it, if log-probabilities were asked for.
    pub(crate) logprobs: Vec<Logprob>,
    /// Those of the prompt, if they were asked for; they come first and alone.
    pub(crate) prompt: Option<Vec<Logprob>>,
    /// Hidden states, pooled, if they were asked for.
    pub(crate) embedding: Option<Vec<f32>>,
    /// Nothing follows.
    pub(crate) end: Option<Ending>,
}

/// How a choice ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    /// "stop" or "length".
    pub(crate) reason: &'static str,
    pub(crate) usage: Usage,
}

/// The choices of a request, while they are made.
pub(crate) struct Generation {
    pieces: Receiver<Result<Piece, ApiError>>,
    /// Choices that have not ended.
    open: usize,
}

impl Generation {
    /// Gives requests to the engine, all or none; `param` is what their prompts are called, and `shown`
    /// are special tokens that are part of the text.
    pub(crate) fn start(
        app: &Arc<App>,
        param: &str,
        requests: Vec<Request>,
        stops: &[String],
        shown: &[u32],
    ) -> Result<Self, ApiError> {
        let open = requests.len();
        let (sinks, events): (Vec<Sink>, Vec<_>) = requests.iter().map(|_| sink()).unzip();
        let tickets = app.engine.submit_all(requests, sinks);
        let tickets = tickets.map_err(|error| ApiError::submit(param, &error))?;
        let (sender, pieces) = channel(AHEAD);
        for (index, (events, ticket)) in events.into_iter().zip(tickets).enumerate() {
            let choice =
                Choice { index, stops: StopStrings::new(stops.to_vec()), shown: shown.to_vec() };
            tokio::spawn(follow(app.clone(), choice, events, ticket, sender.clone()));
        }
        Ok(Self { pieces, open })
    }

    /// The next piece of any choice; `None` when all have ended.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        if self.open == 0 {
            return None;
        }
        match self.pieces.recv().await {
            Some(Ok(piece)) => {
                self.open -= usize::from(piece.end.is_some());
                Some(Ok(piece))
            }
            other => {
                self.open = 0;
                Some(other.unwrap_or_else(|| Err(gone())))
            }
        }
    }
}

/// The engine's side and the choice's.
fn sink() -> (Sink, UnboundedReceiver<Event>) {
    let (sender, events) = unbounded_channel();
    // As many as ids were asked for, at most. Whoever has gone away needs none.
    (Box::new(move |event| drop(sender.send(event))), events)
}

fn gone() -> ApiError {
    ApiError::internal("the engine is gone")
}

/// A choice, and how its text is read.
struct Choice {
    index: usize,
    stops: StopStrings,
    shown: Vec<u32>,
}

/// Turns the events of a choice to pieces, until it ends or nobody listens.
async fn follow(
    app: Arc<App>,
    Choice { index, mut stops, shown }: Choice,
    mut events: UnboundedReceiver<Event>,
    ticket: Ticket,
    pieces: Sender<Result<Piece, ApiError>>,
) {
    let submitted = Instant::now();
    let mut text = app.tokenizer.detokenizer(true).showing(shown);
    let (mut usage, mut ended) = (Usage::default(), false);
    while !ended {
        let event = tokio::select! {
            event = events.recv() => event,
            () = pieces.closed() => return,
        };
        let mut piece = Piece { index, ..Piece::default() };
        match event {
            None => return drop(pieces.send(Err(gone())).await),
            Some(Event::Begin(begun)) => {
                usage = begun;
                continue;
            }
            Some(Event::Prompt(prompt)) => piece.prompt = Some(prompt),
            Some(Event::Embedding(embedding)) => piece.embedding = Some(embedding),
            Some(Event::Token(token)) => {
                if usage.generated == 0 {
                    app.metrics.first_token(submitted.elapsed());
                }
                usage.generated += 1;
                // The engine has no other ids than the vocabulary's; those of an embedding that is
                // larger than that have no text.
                let new = text.push(token.id).unwrap_or_default();
                let (new, stopped) = stops.push(&new);
                (piece.text, ended) = (new, stopped);
                piece.logprobs.extend(token.logprob);
                if stopped {
                    let reason = "stop";
                    piece.end = Some(Ending { reason, usage });
                } else if piece.text.is_empty() && piece.logprobs.is_empty() {
                    continue;
                }
            }
            Some(Event::End(end, used)) => {
                usage = used;
                let reason = match reason(end) {
                    Ok(reason) => reason,
                    Err(error) => return drop(pieces.send(Err(error)).await),
                };
                let (new, stopped) = stops.push(&text.finish());
                piece.text = new;
                if !stopped {
                    piece.text += &stops.finish();
                }
                let reason = if stopped { "stop" } else { reason };
                piece.end = Some(Ending { reason, usage });
                ended = true;
            }
        }
        if pieces.send(Ok(piece)).await.is_err() {
            return;
        }
    }
    app.metrics.done(submitted.elapsed(), usage.generated);
    drop(ticket);
}

fn reason(end: End) -> Result<&'static str, ApiError> {
    match end {
        End::Stop => Ok("stop"),
        End::Length => Ok("length"),
        End::Deadline => {
            Err(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "the request took too long"))
        }
        End::Aborted => Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is ending")),
        End::Failed => Err(ApiError::internal("the model gave logits that are not numbers")),
    }
}
