"""Does the chat page of `trine serve` work in a browser, and is what a model writes only text there?

    pip install playwright                      with a Chromium: playwright install chromium, or --browser
    cargo build --release
    python scripts/interop/chat_page.py MODEL [--trine target/release/trine] [--browser /usr/bin/chromium]

MODEL is anything that `trine serve` reads that has a chat template. In headless Chromium: type and
read an answer, regenerate, stop, reload, begin anew, answers with markup that must stay text, a
system prompt, a phone's width without sideways scrolling, and the server's death. Any error of the
page's script is a failure. With --shots DIR, pictures are kept. Exits with 1 when anything fails.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys

from playwright.sync_api import expect, sync_playwright

failures = []


def check(what, holds, detail=""):
    print(("ok      " if holds else "FAILED  ") + what, detail if not holds else "")
    if not holds:
        failures.append(what)


def start(trine, model):
    command = [trine, "serve", model, "--port", "0", "--name", "served"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TRINE_LOG": "warn"})
    for line in server.stderr:
        found = re.match(r"listening at (\S+)", line)
        if found:
            return server, found[1]
    sys.exit("the server did not start")


def events(*texts):
    """A stream that says these texts."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    usage = {"choices": [], "usage": {"completion_tokens": len(texts)}}
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, usage]]
    return "".join(lines) + "data: [DONE]\n\n"


HOSTILE = [
    "<script>document.title = 'owned'</scr", "ipt> <img src=x onerror=\"document.title='owned'\">\n\n",
    "```html\n<script>document.title = 'owned'</script>\n```\n\n[a](javascript:alert(1)) **bold** `code`\n\n",
    "<svg onload=\"document.title='owned'\"></svg><iframe src=\"/\"></iframe>",
]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--trine", default="target/release/trine")
    parser.add_argument("--browser")
    parser.add_argument("--shots")
    args = parser.parse_args()
    server, address = start(args.trine, args.model)
    try:
        look(args, server, address)
    finally:
        server.kill()
    sys.exit(1 if failures else 0)


def look(args, server, address):
    def shot(page, name):
        if args.shots:
            os.makedirs(args.shots, exist_ok=True)
            page.screenshot(path=os.path.join(args.shots, name + ".png"))

    def send(page, text):
        page.fill("#input", text)
        page.keyboard.press("Enter")

    def finished(page):
        expect(page.locator("#send")).to_have_text("Send", timeout=60_000)

    def answers(page):
        return page.locator("article.assistant .body")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        foreign = []
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or foreign.append(r.url))
        page.goto(address)
        expect(page.locator("#model")).to_have_text("served")
        shot(page, "empty")
        page.click("#open")
        page.fill("#max_tokens", "30")
        page.fill("#temperature", "0")
        page.fill("#seed", "1")
        page.fill("#system", "Be short.")
        page.click("#open")

        send(page, "Hello there")
        finished(page)
        first = answers(page).last.inner_text()
        note = page.locator(".meta").last.inner_text()
        check("an answer is written", len(first) > 0)
        check("its speed is shown", "tok/s" in note, note)
        page.get_by_role("button", name="Regenerate").click()
        finished(page)
        check("a greedy answer is regenerated", answers(page).count() == 1 and answers(page).last.inner_text() == first)

        page.reload()
        page.wait_for_selector("article.assistant")
        check("a conversation outlives a reload", answers(page).last.inner_text() == first)
        check("settings outlive a reload", page.input_value("#system") == "Be short." and page.input_value("#max_tokens") == "30")

        # Whoever stops a stream that does not end gets what has come.
        page.evaluate("""() => {
            window.ownFetch = window.fetch;
            window.fetch = (url, options) => !String(url).includes('chat/completions') ? window.ownFetch(url, options) :
              Promise.resolve(new Response(new ReadableStream({ start(controller) {
                const say = (text) => controller.enqueue(new TextEncoder().encode('data: ' + JSON.stringify({ choices: [{ delta: { content: text } }] }) + '\\n\\n'));
                say('It began.');
                options.signal.addEventListener('abort', () => controller.error(options.signal.reason));
              } })));
        }""")
        send(page, "And then?")
        expect(answers(page).last).to_have_text("It began.")
        check("a stream is shown as it comes", page.locator("#send").inner_text() == "Stop")
        page.keyboard.press("Escape")
        finished(page)
        check("a stream can be stopped", answers(page).last.inner_text() == "It began." and "stopped" in page.locator(".meta").last.inner_text())
        page.evaluate("window.fetch = window.ownFetch")

        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=events(*HOSTILE)))
        send(page, "Say something <script>document.title = 'owned'</script>")
        finished(page)
        page.wait_for_timeout(300)
        body = answers(page).last
        check("markup of a model is text", "<script>" in body.inner_text() and "<img src=x" in body.inner_text())
        check("nothing of it is an element", page.locator("main :is(script, img, svg, iframe, a)").count() == 0)
        check("nothing of it ran", "owned" not in page.title())
        check("markdown is rendered", body.locator("strong").inner_text() == "bold" and body.locator("pre code").count() == 1)
        shot(page, "markup")
        page.unroute("**/v1/chat/completions")

        phone = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        phone.on("pageerror", lambda error: wrong.append(str(error)))
        phone.goto(address)
        phone.evaluate("kept => localStorage.setItem('trine.messages', kept)", page.evaluate("localStorage.getItem('trine.messages')"))
        phone.reload()
        phone.wait_for_selector("article.assistant")
        wide = phone.evaluate("document.documentElement.scrollWidth > innerWidth || document.querySelector('main').scrollWidth > document.querySelector('main').clientWidth")
        check("a phone's width is enough", not wide)
        shot(phone, "phone")

        page.click("#new")
        check("a new conversation is empty", page.locator("article").count() == 0)
        server.send_signal(signal.SIGKILL)
        server.wait()
        send(page, "Are you there?")
        finished(page)
        check("a dead server is said", "cannot be reached" in page.locator(".wrong").inner_text())
        check("no error of the script", not wrong, wrong)
        check("nothing is asked of others", not foreign, foreign)
        browser.close()


if __name__ == "__main__":
    main()
