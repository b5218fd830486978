"""sedd play: its endpoint, its page in a browser, and what goes wrong."""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("rich")

import torch

from sedd.cli import main
from sedd.commands.sample import parse_template
from sedd.diffusion import sample
from sedd.hub import load_model

if TYPE_CHECKING:
    from playwright.sync_api import Page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: install Debian's chromium (CI does)")
JSON = {"Content-Type": "application/json"}
PROMPT = "7 {{12}} öüé{{5}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "cats.txt"
    text.write_text("".join(f"{i} éàü öñéàéü öàñ\n" for i in range(600)), encoding="utf-8")
    sizes = ["--model.n_blocks=1", "--model.n_heads=2", "--model.hidden_size=32", "--model.length=24"]
    source = [f"--data.source={text}", f"--data.cache_dir={folder / 'cache'}", f"--run_dir={folder / 'cats'}"]
    assert main(["train", *sizes, *source, "--steps=30", "--valid_every=30", "--lr=1e-2", "--warmup=5"]) == 0
    return folder / "cats"


@contextmanager
def serving(run: Path, *options: str) -> Iterator[str]:
    """The address of a server that runs until the end of the block."""
    line = [sys.executable, "-m", "sedd", "play", str(run), "--port=0", *options]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "300"}
    )
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if not words:
            raise AssertionError(process.communicate()[1])
        yield next(word for word in words if word.startswith("http")).split("/")[2]
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    with serving(run) as address:
        yield address


def ask(server: str, body: Any, path: str = "/v1/completions", headers: dict[str, str] = JSON) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(server, timeout=120)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text


def get(server: str, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(server, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def texts(server: str, **body: Any) -> list[str]:
    status, answer = ask(server, body)
    assert status == 200, answer
    return [choice["text"] for choice in answer["choices"]]


def events(server: str, **body: Any) -> list[dict[str, Any]]:
    status, answer = ask(server, {**body, "stream": True})
    assert status == 200, answer
    parts = answer.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    found = [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
    # the request of another test may still be leaving the queue
    return [event for event in found if event["object"] != "text_completion.queued"]


# ---- the endpoint ----


def test_the_texts_are_those_of_sample(run: Path, server: str) -> None:
    loaded = load_model(run)
    tokens, is_fixed = parse_template(PROMPT, loaded.tokenizer)
    wanted = sample(
        loaded.diffusion,
        batch=2,
        length=len(tokens),
        steps=8,
        fixed=(tokens, is_fixed),
        generator=torch.Generator().manual_seed(3),
        autocast_dtype=loaded.autocast_dtype,
    )
    found = texts(server, prompt=PROMPT, n=2, steps=8, seed=3)
    assert found == [loaded.tokenizer.decode(row.tolist()) for row in wanted]
    assert found[0] != found[1]
    assert found != texts(server, prompt=PROMPT, n=2, steps=8, seed=4)


def test_gaps_and_counts(server: str) -> None:
    _, answer = ask(server, {"prompt": PROMPT, "steps": 4, "seed": 1})
    text, gaps = answer["choices"][0]["text"], answer["choices"][0]["gaps"]
    assert text == f"7 {gaps[0]} öüé{gaps[1]}"
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 17, "total_tokens": 26}
    assert answer["model"] == "cats"


def test_new_text_between_prompt_and_suffix(server: str) -> None:
    body = {"prompt": "12 ", "suffix": " öàñ", "max_tokens": 9, "steps": 4, "seed": 1}
    [text] = texts(server, **body)
    assert texts(server, prompt="12 {{9}} öàñ", steps=4, seed=1) == [f"12 {text} öàñ"]


def test_a_whole_block_and_a_random_seed(server: str) -> None:
    answers = [ask(server, {"steps": 4})[1] for _ in range(2)]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [24, 24]
    assert answers[0]["seed"] != answers[1]["seed"]
    assert texts(server, steps=4, seed=answers[0]["seed"]) == [answers[0]["choices"][0]["text"]]


@pytest.mark.parametrize("entropy", [False, True])
def test_events(server: str, entropy: bool) -> None:
    body = {"prompt": PROMPT, "n": 2, "steps": 6, "seed": 3, "sampler": "confidence"}
    *frames, last = events(server, **body, entropy=entropy)
    assert [frame["step"] for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert [choice["text"] for choice in last["choices"]] == texts(server, **body)
    assert ["".join(pieces) for pieces in frames[-1]["pieces"]] == texts(server, **body)
    masked = [sum(map(sum, frame["masked"])) for frame in frames]
    assert masked == sorted(masked, reverse=True)
    assert masked[0] > masked[-1] == 0
    for frame in frames:
        assert frame["given"] == [i < 2 or 14 <= i < 21 for i in range(26)]
        if not entropy:
            assert frame["entropy"] is None
            continue
        for values in frame["entropy"]:
            for value, given in zip(values, frame["given"], strict=True):
                assert (value is None) == given
                assert value is None or 0 <= value <= math.log(257)
    for before, after in pairwise(frames):  # a token keeps the entropy from which it was drawn
        for i, row in enumerate(after["masked"]):
            for k, is_masked in enumerate(row):
                assert not entropy or is_masked or after["entropy"][i][k] == before["entropy"][i][k]


def test_the_samplers_of_the_model(server: str) -> None:
    _, body = get(server, "/v1/models")
    [model] = json.loads(body)["data"]
    assert {"tweedie", "entropy_bounded", "remask"} <= set(model["samplers"])
    assert "autoregressive" not in model["samplers"]
    assert model["samplers"]["entropy_bounded"] == {"gamma": "0.1"}
    assert model["length"] == 24
    for name in model["samplers"]:
        assert len(texts(server, prompt="{{6}}", steps=2, sampler=name)) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no json", "body: expected JSON"),
        ([1], "body: expected a JSON object, got list"),
        ({"stepz": 3}, "stepz: no such option; did you mean 'steps'?"),
        ({"steps": "many"}, "steps: expected"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 10**6}, "steps: expected at most 4096"),
        ({"n": 17}, "n: expected at most 16"),
        ({"temperature": -1}, "temperature: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"sampler": "twidie"}, "sampler: expected one of"),
        ({"sampler": "autoregressive"}, "sampler: expected"),
        ({"sampler": "remask", "sampler_params": {"gamma": "1"}}, "sampler_params: sampler 'remask' has"),
        ({"sampler_params": {"gamma": "1"}}, "sampler: expected the name"),
        ({"prompt": "{{0}}"}, "template: expected gaps of at least 1 token"),
        ({"prompt": "{{3}}", "max_tokens": 3}, "prompt: expected no gaps"),
        ({"prompt": "{{9999}}"}, "prompt: expected at most 8192 tokens"),
        ({"prompt": "x" * 24}, "max_tokens: expected a number of new tokens"),
    ],
)
def test_bad_requests(server: str, body: Any, message: str) -> None:
    status, answer = ask(server, body)
    assert status == 400
    assert answer["error"]["message"].startswith(message), answer
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_sites_are_refused(server: str) -> None:
    """A page of another site can neither send a request nor point its own name to this machine."""
    assert ask(server, {}, headers={"Content-Type": "text/plain"})[0] == 415
    assert get(server, "/", Host="example.org")[0] == 400
    assert get(server, "/", Host=f"localhost:{server.split(':')[1]}")[0] == 200


def test_large_requests_and_unknown_paths(server: str) -> None:
    assert ask(server, {"prompt": "x" * (1 << 20)})[0] == 413
    assert get(server, "/../command.py")[0] == 404
    assert get(server, "/v1/completions")[0] == 405


# ---- many clients ----


def test_ten_clients_at_once(server: str) -> None:
    bodies = [{"prompt": PROMPT, "steps": 6, "seed": seed} for seed in range(10)]
    alone = [texts(server, **body) for body in bodies]
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(lambda body: texts(server, **body), bodies))
        streamed = list(pool.map(lambda body: events(server, **body)[-1]["choices"][0]["text"], bodies))
    assert together == alone
    assert streamed == [text for [text] in alone]


LONG = {"max_tokens": 4096, "steps": 4096}  # for minutes


def leave(server: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request, and returns its connection, which nobody reads."""
    host, port = server.split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {server}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_when_the_client_leaves(server: str, stream: bool) -> None:
    connection = leave(server, {**LONG, "stream": stream})
    if stream:
        assert b"text_completion.step" in connection.recv(1 << 16) + connection.recv(1 << 16)
    else:
        time.sleep(1)
    waiting = [leave(server, {**LONG, "stream": stream}) for _ in range(3)]
    time.sleep(0.5)
    for one in (connection, *waiting):
        one.close()
    start = time.monotonic()
    assert len(texts(server, prompt="{{4}}", steps=2)) == 1
    assert time.monotonic() - start < 60


def test_a_full_queue(run: Path) -> None:
    with serving(run, "--waiting=1") as server:
        connections = [leave(server, LONG) for _ in range(2)]
        time.sleep(1)
        status, answer = ask(server, {"steps": 1})
        assert status == 429
        assert "at most 1 waiting" in answer["error"]["message"]
        for connection in connections:
            connection.close()
        deadline = time.monotonic() + 60
        while ask(server, {"steps": 1})[0] == 429 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert ask(server, {"steps": 1})[0] == 200


# ---- the command ----


def test_a_port_in_use(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["play", str(run), f"--port={port}"]) == 2
    assert f"port: expected a free one on 127.0.0.1, got {port}" in capsys.readouterr().err


# ---- images ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a model of images that has classes."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    sizes = ["--model.n_blocks=1", "--model.n_heads=2", "--model.hidden_size=32", "--model.classes=10"]
    source = ["--corpus=images", "--data.source=digits", f"--data.cache_dir={folder}", f"--run_dir={folder / 'run'}"]
    more = ["--objective=md4", "--steps=20", "--valid_every=20", "--warmup=5"]
    assert main(["train", *sizes, *source, *more]) == 0
    with serving(folder / "run") as address:
        yield address


def test_images(digits: str) -> None:
    body = {"steps": 6, "seed": 3, "n": 2, "label": 4, "guidance": 2.0}
    *frames, last = events(digits, **body, entropy=True)
    images = [choice["image"] for choice in last["choices"]]
    assert images == frames[-1]["pieces"]
    assert last["choices"][0]["shape"] == [8, 8, 1]
    assert all(0 <= value < 256 for value in images[0])
    assert [len(image) for image in images] == [64, 64]
    other = events(digits, **body | {"label": 5})[-1]["choices"][0]["image"]
    assert other != images[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "{{3}}"}, "prompt: expected none for a model of images"),
        ({"label": 10}, "label: expected a class in [0, 10), got 10"),
        ({"guidance": 2}, "guidance: expected 1 without a label, got 2.0"),
    ],
)
def test_bad_requests_for_images(digits: str, body: Any, message: str) -> None:
    status, answer = ask(digits, body)
    assert status == 400
    assert answer["error"]["message"].startswith(message), answer


def test_a_class_for_a_model_of_text(server: str) -> None:
    _, answer = ask(server, {"label": 1})
    assert answer["error"]["message"] == "label: expected none for a model without classes, got 1"


# ---- the page ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    messages: list[str] = []
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("console", lambda said: messages.append(said.text) if said.type == "error" else None)
    page.goto(f"http://{server}/")
    page.locator("option[value=tweedie]").wait_for(state="attached")
    yield page
    page.close()
    assert [message for message in messages if "status of 400" not in message] == []


def fill(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))


def done(page: Page) -> str:
    page.locator("#status", has_text="Done").wait_for(timeout=60_000)
    return page.locator("#texts").text_content() or ""


@in_browser
def test_type_run_and_see(page: Page, server: str) -> None:
    fill(page, prompt="7 ", steps=6, n=2, seed=3)
    page.focus("#prompt")
    page.keyboard.press("End")
    fill(page, **{"seed": 3})
    page.fill("#gap-size", "12")
    page.click("#gap")
    assert page.input_value("#prompt") == "7 {{12}}"
    page.click("#run")
    assert done(page) == "".join(texts(server, prompt="7 {{12}}", steps=6, n=2, seed=3))
    assert page.locator(".text").count() == 2
    assert page.locator(".text .new").count() > 0
    assert page.locator(".text [style*=background]").count() > 0


@in_browser
def test_the_link_shows_the_same_texts(page: Page) -> None:
    fill(page, prompt="7 {{12}}", steps=6, n=1)
    page.select_option("#sampler", "entropy_bounded")
    page.fill("[data-parameter=gamma]", "0.5")
    page.click("#run")
    text = done(page)
    link = page.url
    assert "seed=" in link
    page.goto("about:blank")
    page.goto(link)
    assert done(page) == text
    assert page.input_value("[data-parameter=gamma]") == "0.5"


@in_browser
def test_a_narrow_page(page: Page) -> None:
    fill(page, prompt="7 {{40}}", steps=4, n=2)
    page.click("#run")
    done(page)
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 800})
        boxes = [box for box in (one.bounding_box() for one in page.locator("body *").all()) if box]
        assert max(box["x"] + box["width"] for box in boxes) <= width
    first, second = (page.locator(".text").nth(i).bounding_box() for i in range(2))
    assert first is not None
    assert second is not None
    assert second["y"] > first["y"]  # below each other


@in_browser
def test_mistakes_and_stopping(page: Page) -> None:
    fill(page, prompt="{{0}}")
    page.click("#run")
    page.locator("#status.error", has_text="expected gaps of at least 1 token").wait_for()
    fill(page, prompt="{{4000}}", steps=4000, n=1)
    page.click("#run")
    page.locator("#status", has_text="Step ").wait_for()
    page.click("#stop")
    page.locator("#status", has_text="Stopped.").wait_for()
    fill(page, prompt="{{4}}", steps=2)
    page.click("#run")
    done(page)


@in_browser
def test_the_canvas_of_an_image(browser: Any, digits: str) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto(f"http://{digits}/?steps=6&n=2&seed=3&label=4&entropy=false")
    page.locator("#status", has_text="Done").wait_for(timeout=60_000)
    assert not page.locator("#prompt").is_visible()
    shown = page.locator("canvas").first.evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, 8, 8).data).filter((_, i) => i % 4 === 0)"
    )
    _, answer = ask(digits, {"steps": 6, "n": 2, "seed": 3, "label": 4})
    assert shown == answer["choices"][0]["image"]
    page.close()


@in_browser
def test_a_link_cannot_run_code(page: Page, server: str) -> None:
    attack = "%3Cimg%20src%3Dx%20onerror%3D%22document.title%3D'bad'%22%3E%7B%7B2%7D%7D"
    page.goto(f"http://{server}/?prompt={attack}&steps=2&n=1&seed=1&entropy=false")
    assert "<img src=x" in done(page)
    assert page.title() == "cats · sedd play"
    assert page.locator("#texts img").count() == 0
