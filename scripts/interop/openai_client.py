"""Does the openai package talk to `trine serve` as it talks to OpenAI?

    pip install openai
    cargo build --release
    trine synth-model --shape 30m --tokenizer DIR MODEL.gguf        or another model
    python scripts/interop/openai_client.py MODEL [--trine target/release/trine]

MODEL is anything that `trine serve` reads that has a chat template and a context of 1,024 tokens. A server is started at a free
port with a key, and the package, whose clients check types and parse streams, is used as its users
use it: models, chats whole and streamed, completions with log-probabilities and echo, several
choices, stop strings, seeds, errors, functions that have to be called and whose results are sent back,
many asynchronous requests at once, and a stream that is left. Greedy answers must be the same however
they are asked for. Exits with 1 when anything differs.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import openai

KEY = "a-key-for-this-run"
failures = []


def check(what, holds, detail=""):
    print(("ok      " if holds else "FAILED  ") + what, detail if not holds else "")
    if not holds:
        failures.append(what)


def start(trine, model):
    """A server and its address."""
    command = [trine, "serve", model, "--port", "0", "--name", "served"]
    environment = {**os.environ, "TRINE_SERVE_API_KEY": KEY, "TRINE_LOG": "warn"}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in server.stderr:
        found = re.match(r"listening at (\S+)", line)
        if found:
            return server, found[1]
    sys.exit("the server did not start")


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    return None


def blocking(client):
    models = client.models.list().data
    check("models", [model.id for model in models] == ["served"])

    asked = dict(
        model="served", messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=24
    )
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    check("chat", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens)

    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    check("a streamed chat is the whole one", streamed == text, (streamed, text))
    check("usage of a stream", chunks[-1].usage.completion_tokens == whole.usage.completion_tokens)
    again = client.chat.completions.create(**asked)
    check("a prompt that was seen is not computed again", again.usage.prompt_tokens_details.cached_tokens > 0 or again.usage.prompt_tokens < 17)

    with_logprobs = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    tokens = with_logprobs.choices[0].logprobs.content
    check("log-probabilities of a chat", all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in tokens))

    drawn = dict(model="served", prompt="Once", max_tokens=16, temperature=1.2, seed=5, n=3)
    first, second = client.completions.create(**drawn), client.completions.create(**drawn)
    check("a seed repeats", [c.text for c in first.choices] == [c.text for c in second.choices])
    check("choices differ", len({choice.text for choice in first.choices}) > 1)

    echoed = client.completions.create(
        model="served", prompt="Once upon a time", max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    logprobs = echoed.choices[0].logprobs
    check("echo", echoed.choices[0].text.startswith("Once upon a time"))
    check("echoed log-probabilities", logprobs.token_logprobs[0] is None and len(logprobs.tokens) == len(logprobs.token_logprobs) == echoed.usage.total_tokens)

    texts = ["The sun rises.", "Something else.", "The sun rises."]
    vectors = [item.embedding for item in client.embeddings.create(model="served", input=texts).data]
    length = sum(x * x for x in vectors[0])
    check("embeddings", abs(length - 1) < 1e-4 and vectors[0] == vectors[2] != vectors[1], length)

    if len(text) > 8:
        stop = text[5:8]
        stopped = client.chat.completions.create(**asked, stop=[stop])
        check("stop", stopped.choices[0].message.content == text[: text.index(stop)] and stopped.choices[0].finish_reason == "stop")

    error = refused(openai.BadRequestError, lambda: client.chat.completions.create(**{**asked, "temperature": -1}))
    check("a wrong parameter is named", error is not None and error.param == "temperature", error)
    error = refused(openai.NotFoundError, lambda: client.chat.completions.create(**{**asked, "model": "other"}))
    check("another model", error is not None and error.code == "model_not_found", error)
    other = client.with_options(api_key="another-key")
    check("a wrong key", refused(openai.AuthenticationError, other.models.list) is not None)
    return text


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Berlin", "Paris"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]


def well_formed(calls):
    """Whether all calls are of a tool, with arguments of its schema."""
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            if set(arguments) != {"city", "days"} or arguments["city"] not in ("Berlin", "Paris") or not 1 <= arguments["days"] <= 9:
                return False
        elif call.function.name != "get_time" or arguments:
            return False
    return True


def tools(client):
    messages = [{"role": "user", "content": "What is the weather in Berlin?"}]
    asked = dict(model="served", messages=messages, tools=TOOLS, max_tokens=1500, temperature=1)
    for seed in range(4):
        answer = client.chat.completions.create(**asked, tool_choice="required", seed=seed).choices[0]
        calls = answer.message.tool_calls
        check("a call that is required", answer.finish_reason == "tool_calls" and answer.message.content is None and len(calls) > 0 and well_formed(calls), answer)

    named = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(**asked, tool_choice=named, seed=1).choices[0]
    check("a call of a certain function", [call.function.name for call in answer.message.tool_calls] == ["get_weather"] and well_formed(answer.message.tool_calls), answer)

    # The package puts the deltas of a stream together itself.
    with client.chat.completions.stream(**asked, tool_choice=named, seed=1) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0]
    whole, parts = answer.message.tool_calls[0].function, streamed.message.tool_calls[0].function
    check("a streamed call is the whole one", (parts.name, parts.arguments) == (whole.name, whole.arguments) and streamed.finish_reason == "tool_calls", streamed)
    check("arguments as the package parsed them", parts.parsed_arguments == json.loads(whole.arguments), parts)
    check("events of a streamed call", "tool_calls.function.arguments.delta" in events and "tool_calls.function.arguments.done" in events, events)

    result = {"role": "tool", "tool_call_id": answer.message.tool_calls[0].id, "content": "rain"}
    further = {**asked, "messages": [*messages, answer.message, result], "max_tokens": 16}
    after = client.chat.completions.create(**further)
    check("a result is sent back", after.choices[0].finish_reason in ("length", "stop", "tool_calls"), after)
    free = client.chat.completions.create(**further, tool_choice="none").choices[0]
    check("no call where none may be", free.message.tool_calls is None and free.finish_reason != "tool_calls", free)
    nameless = [{"type": "function", "function": {"parameters": {}}}]
    error = refused(openai.BadRequestError, lambda: client.chat.completions.create(**{**asked, "tools": nameless}))
    check("a tool without a name", error is not None and error.param == "tools[0].function.name", error)


async def concurrent(client, expected):
    asked = dict(
        model="served", messages=[{"role": "user", "content": "Hello"}], temperature=0, max_tokens=24
    )

    async def one(i):
        stream = await client.chat.completions.create(**asked, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if i % 2:
                await stream.close()
                return None
        return text

    texts = await asyncio.gather(*(one(i) for i in range(64)))
    check("32 of 64 streams that stay", all(text in (None, expected) for text in texts), texts)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--trine", default="target/release/trine")
    args = parser.parse_args()
    server, address = start(args.trine, args.model)
    try:
        request = urllib.request.Request(f"{address}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        if (context := json.load(urllib.request.urlopen(request))["data"][0]["max_model_len"]) < 1024:
            sys.exit(f"{args.model}: a context of {context} tokens, expected 1024 for calls of functions to end in")
        options = dict(base_url=f"{address}/v1", api_key=KEY, max_retries=0)
        text = blocking(openai.OpenAI(**options))
        tools(openai.OpenAI(**options))
        asyncio.run(concurrent(openai.AsyncOpenAI(**options), text))
        for _ in range(100):
            state = json.load(urllib.request.urlopen(f"{address}/health"))
            if state["running"] + state["waiting"] == 0:
                break
            time.sleep(0.1)
        check("nothing is left running", state["running"] + state["waiting"] == 0, state)
    finally:
        server.send_signal(signal.SIGTERM)
        check("the end", server.wait(timeout=60) == 0)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
