"""How does `trine serve` hold under load: speed, prefixes, clients that leave, memory?

    pip install aiohttp
    cargo build --release
    trine synth-model --shape 30m --tokenizer TOKENIZER MODEL      or any model that `trine serve` reads
    python scripts/interop/serve_load.py MODEL [--clients 200] [--seconds 60] [--trine target/release/trine]

Prints, for a server on this machine: tokens a second of one stream and of eight; the first token of
a prompt that is new and of the same prompt again; the first token of a short prompt alone and while a
long one goes through. Then many clients ask greedily for a while, half of them leaving in the middle,
and every answer that stays must be that of the idle server. Exits with 1 when one is not, when
anything is left running, when connections stay open, or when memory grew by more than a tenth in the
second half. It ends after the seconds it is given; `--soak` leaves the speeds out. `--overhead PAIRS`
only compares one stream with `trine bench` of the same model, in turn.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time

import aiohttp


def start(trine, model, running):
    command = [trine, "serve", model, "--port", "0", "--max-running", str(running), "--max-waiting", "1000"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TRINE_LOG": "warn"})
    for line in server.stderr:
        found = re.match(r"listening at (\S+)", line)
        if found:
            return server, found[1]
    sys.exit("the server did not start")


def resident(server):
    """Megabytes that the server has in memory."""
    with open(f"/proc/{server.pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1000


def descriptors(server):
    """Files and connections that the server has open."""
    return len(os.listdir(f"/proc/{server.pid}/fd"))


class Client:
    def __init__(self, session, address, context, vocab):
        self.session, self.address, self.context, self.vocab = session, address, context, vocab

    def prompt(self, seed, tokens):
        return random.Random(seed).choices(range(self.vocab), k=tokens)

    async def stream(self, prompt, tokens, leave=None):
        """Text, seconds to the first token, seconds from it to the last, tokens; leaves after some."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        begin, first, text, count, used = time.perf_counter(), None, "", 0, 0
        async with self.session.post(f"{self.address}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                used = chunk.get("usage", {}).get("completion_tokens", used)
                if chunk["choices"]:
                    first = first or time.perf_counter()
                    text, count = text + chunk["choices"][0]["text"], count + 1
                    if leave is not None and count >= leave:
                        return None
        return text, first - begin, time.perf_counter() - first, used


async def speed(client):
    for streams in (1, 8):
        rates = []
        for sample in range(3):
            prompts = [client.prompt(1000 * streams + 10 * sample + i, 8) for i in range(streams)]
            begin = time.perf_counter()
            found = await asyncio.gather(*(client.stream(prompt, 256) for prompt in prompts))
            rates.append(sum(one[3] for one in found) / (time.perf_counter() - begin))
        print(f"{streams} streams of 256 tokens: {statistics.median(rates):.0f} tok/s")
    long = min(client.context - 64, 2000)
    prompt = client.prompt(1, long)
    _, cold, _, _ = await client.stream(prompt, 2)
    _, warm, _, _ = await client.stream(prompt, 2)
    print(f"first token after {long} tokens: {cold:.3f} s, again {warm:.3f} s, {cold / warm:.0f} times sooner")
    _, idle, _, _ = await client.stream(client.prompt(2, 8), 2)
    other = asyncio.create_task(client.stream(client.prompt(3, long), 2))
    await asyncio.sleep(0.02)
    _, busy, _, _ = await client.stream(client.prompt(4, 8), 2)
    await other
    print(f"first token of a short prompt: alone {idle:.3f} s, beside {long} tokens {busy:.3f} s")


async def overhead(client, trine, model, pairs):
    """What HTTP, tokenizing and detokenizing cost a stream: its tokens after the first, and `trine bench`'s, in turn."""
    command = [trine, "bench", model, "-p", "0", "-n", "255", "-d", "8", "-r", "1", "--json"]

    async def decode(seed):
        """Tokens a second after the first, and the share of the whole request that was no pass of the model."""
        passes, begin = await seconds_in_passes(client), time.perf_counter()
        _, _, _, used = await client.stream(client.prompt(seed, 8), 256)
        whole = time.perf_counter() - begin
        passes = await seconds_in_passes(client) - passes
        begin = time.perf_counter()
        await client.stream(client.prompt(seed + 1, 8), 1)
        return (used - 1) / (whole - (time.perf_counter() - begin)), 1 - passes / whole

    def engine():
        found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        return found["decode_tok_s"]

    served, alone = [], [engine()]
    for pair in range(pairs):
        served.append(await decode(5000 + 2 * pair))
        alone.append(engine())
    served, others = zip(*served)
    # Each stream against the mean of the engine's speeds before and after it: machines are not steady.
    costs = sorted(1 - one / ((before + after) / 2) for one, before, after in zip(served, alone, alone[1:]))
    print(
        f"one stream, tokens after the first: {statistics.median(served):.2f} tok/s, the engine alone "
        f"{statistics.median(alone):.2f}: {statistics.median(costs):.1%} slower "
        f"(median of {pairs}, {costs[0]:.1%} to {costs[-1]:.1%})\n"
        f"outside of the model's passes: {statistics.median(others):.2%} of a request"
    )


async def seconds_in_passes(client):
    async with client.session.get(f"{client.address}/metrics") as response:
        return float(re.search(r"^trine_pass_seconds_total (\S+)", await response.text(), re.MULTILINE)[1])


async def soak(client, server, clients, seconds):
    """Many clients, half of which leave; returns what went wrong."""
    prompts = [client.prompt(7, 40) + client.prompt(100 + i, 10) for i in range(20)]
    expected = [(await client.stream(prompt, 40))[0] for prompt in prompts]
    end = time.monotonic() + seconds
    same = other = left = 0
    memory = []

    async def one(number):
        nonlocal same, other, left
        draw = random.Random(number)
        while time.monotonic() < end:
            which = draw.randrange(len(prompts))
            leave = draw.randrange(1, 30) if draw.random() < 0.5 else None
            found = await client.stream(prompts[which], 40, leave)
            if found is None:
                left += 1
            elif found[0] == expected[which]:
                same += 1
            else:
                other += 1

    async def watch():
        while time.monotonic() < end:
            memory.append(resident(server))
            await asyncio.sleep(min(5, seconds / 20))

    await asyncio.gather(watch(), *(one(number) for number in range(clients)))
    for _ in range(100):
        async with client.session.get(f"{client.address}/health") as response:
            health = await response.json()
        if health["running"] + health["waiting"] == 0:
            break
        await asyncio.sleep(0.1)
    half = memory[len(memory) // 2]
    print(f"{clients} clients, {seconds} s: {same} answers as an idle server's, {other} others, {left} left in the middle")
    print(f"memory: {half:.0f} MB at half time, {max(memory[len(memory) // 2:]):.0f} MB at most after it")
    busy = health["running"] + health["waiting"]
    wrong = [f"{other} answers differ"] * (other > 0) + [f"{busy} requests are stuck"] * (busy > 0)
    return wrong + ["memory grew"] * (max(memory[len(memory) // 2 :]) > 1.1 * half)


async def run(args, server, address):
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(f"{address}/v1/models") as response:
            model = (await response.json())["data"][0]
        client = Client(session, address, model["max_model_len"], model["meta"]["vocab_size"])
        before = descriptors(server)
        if args.overhead:
            await overhead(client, args.trine, args.model, args.overhead)
            return []
        if not args.soak:
            await speed(client)
        wrong = await soak(client, server, args.clients, args.seconds)
    for _ in range(100):
        if (still := descriptors(server)) <= before:
            break
        await asyncio.sleep(0.1)
    print(f"open files and connections: {before} before, {still} after")
    return wrong + [f"{still - before} connections stay open"] * (still > before)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--overhead", type=int, metavar="PAIRS", help="only what serving costs one stream, this often")
    parser.add_argument("--soak", action="store_true", help="only the many clients")
    args = parser.parse_args()
    server, address = start(args.trine, args.model, args.running)
    try:
        wrong = asyncio.run(run(args, server, address))
    finally:
        server.kill()
    print("\n".join(wrong) or "as it should be")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
