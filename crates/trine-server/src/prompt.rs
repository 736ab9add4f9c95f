//! Text to ids, on threads that may take their time: no answer waits for a long prompt of another.

use std::sync::Arc;

use serde_json::Value;
use trine_tokenizer::{Message, TokenizerError};

use crate::App;
use crate::error::ApiError;
use crate::params::Served;
use crate::tools::described;

/// What `work` makes, on a thread that may take its time; as many at a time as there are threads.
pub(crate) async fn apart<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let closed = || ApiError::internal("the tokenizer is gone");
    let _permit = app.tokenizing.acquire().await.map_err(|_| closed())?;
    let shared = app.clone();
    tokio::task::spawn_blocking(move || work(&shared)).await.map_err(|_| closed())
}

/// Ids of what a tokenizer makes of something, for parameter `param`.
async fn ids(
    app: &Arc<App>,
    param: &str,
    encode: impl FnOnce(&App) -> Result<Vec<u32>, TokenizerError> + Send + 'static,
) -> Result<Vec<u32>, ApiError> {
    apart(app, encode).await?.map_err(|error| ApiError::text(param, &error))
}

/// Ids of a text to continue, as many as the context has at most.
pub(crate) async fn of_text(
    app: &Arc<App>,
    param: &str,
    text: String,
) -> Result<Vec<u32>, ApiError> {
    let ids = ids(app, param, move |app| app.tokenizer.prompt(&text)).await?;
    within(app, param, ids)
}

/// Ids of a conversation up to the answer, with the tools that it may call, as they were sent.
pub(crate) async fn of_messages(
    app: &Arc<App>,
    served: &Served,
    messages: Vec<Message>,
    tools: &[Value],
) -> Result<Vec<u32>, ApiError> {
    let param = "messages";
    let Some(template) = served.template.clone() else {
        let message = "the model has no chat template: use /v1/completions";
        return Err(ApiError::param(param, message));
    };
    let tools = tools.to_vec();
    let ids = ids(app, param, move |app| {
        let tokenizer = &app.tokenizer;
        let calls = |message: &Message| !message.tool_calls.is_empty();
        let about_tools = !tools.is_empty() || messages.iter().any(calls);
        if about_tools && template.call_format(tokenizer).is_none() {
            return template.prompt(tokenizer, &described(&template, messages, &tools));
        }
        template.prompt_with_tools(tokenizer, &messages, &tools)
    });
    within(app, param, ids.await?)
}

/// Ids of a text, and nothing else.
pub(crate) async fn tokens(
    app: &Arc<App>,
    param: &str,
    text: String,
    add_special: bool,
    parse_special: bool,
) -> Result<Vec<u32>, ApiError> {
    let encode = move |app: &App| match parse_special {
        true => app.tokenizer.encode(&text, add_special),
        false => app.tokenizer.encode_plain(&text),
    };
    ids(app, param, encode).await
}

/// Refuses more ids than the model has positions.
pub(crate) fn within(app: &App, param: &str, ids: Vec<u32>) -> Result<Vec<u32>, ApiError> {
    if ids.len() > app.context() {
        return Err(ApiError::too_long(param, ids.len(), app.context()));
    }
    Ok(ids)
}
