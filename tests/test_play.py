"""sedd play: its endpoint, its page in a browser, and what goes wrong."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("rich")

import torch
from playing import ask, done, events, fill, get, in_browser, launched, leave, opened, serving, texts

from sedd.cli import main
from sedd.commands.play.app import MOST_UNREAD, _hosts, _Job
from sedd.commands.play.writing import Frame, Request, Written, check
from sedd.commands.sample import parse_template
from sedd.data.tokenizer import get_tokenizer
from sedd.diffusion import MD4, UDLM, Diffusion, get_schedule, sample
from sedd.hub import load_model
from sedd_ext import Absorbing, Uniform

if TYPE_CHECKING:
    from playwright.sync_api import Page

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


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[str]:
    with serving(run) as address:
        yield address


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
        (
            {"sampler": "predictor_corrector", "sampler_params": {"correctors": "17"}},
            "sampler_params: expected at most 16 correctors, got 17",
        ),
        ({"guidance": 1e308}, "guidance: expected a number from -1000 to 1000"),
        ({"prompt": "{{0}}"}, "prompt: expected gaps of at least 1 token"),
        ({"prompt": "{{3}}", "max_tokens": 3}, "prompt: expected no gaps"),
        ({"prompt": "{{8192}} and more"}, "prompt: expected at most 8192 tokens"),
        ({"prompt": "{{9999}}"}, "prompt: expected gaps of at most 8192 tokens in all"),
        ({"prompt": "{{5000}} {{5000}}"}, "prompt: expected gaps of at most 8192 tokens in all"),
        ({"prompt": "{{" + "9" * 5000 + "}}"}, "prompt: expected gaps of at most 8192 tokens in all"),
        (b"[" * 200_000, "body: expected JSON"),
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


def test_names_of_the_server() -> None:
    """Browsers may ask for the page under the server's own names only, unless it listens on all addresses."""
    assert _hosts("127.0.0.1") == ["127.0.0.1", "localhost", "[::1]"]
    assert _hosts("::1")[0] == "[::1]"
    assert _hosts("localhost") == ["localhost", "127.0.0.1"]
    assert _hosts("192.168.1.5") == ["192.168.1.5"]
    assert _hosts("myhost") == ["myhost"]
    assert _hosts("0.0.0.0") == _hosts("::") == ["*"]


def test_braces_that_are_no_gap_are_a_prompt(server: str) -> None:
    status, answer = ask(server, {"prompt": "Dear {{name}}, ", "max_tokens": 5, "steps": 2})
    assert status == 200
    assert "Dear" not in answer["choices"][0]["text"]


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


def test_clients_with_the_same_request(server: str) -> None:
    """A permalink that several open at once: each has a place of its own in the queue, and leaves it."""
    body = {"prompt": PROMPT, "steps": 20, "seed": 5}
    alone = texts(server, **body)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda stream: ask(server, {**body, "stream": stream}), [True, False] * 3))
    assert [status for status, _ in answers] == [200] * 6
    for _, answer in answers:
        found = answer if isinstance(answer, dict) else json.loads(answer.split("\n\n")[-3].removeprefix("data: "))
        assert [choice["text"] for choice in found["choices"]] == alone
    time.sleep(1)
    assert "text_completion.queued" not in ask(server, {**body, "stream": True})[1], "one that is finished still waits"


LONG = {"max_tokens": 4096, "steps": 4096}  # for minutes


def test_a_client_that_leaves_in_its_request(server: str) -> None:
    """Its body is never whole. The server prints no traceback, as ``serving`` checks at the end."""
    host, port = server.split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b'Content-Length: 1000\r\n\r\n{"prompt": '
            )
            time.sleep(0.2)
    assert len(texts(server, prompt="{{4}}", steps=2)) == 1


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


def test_waiting_requests_that_leave_make_room(run: Path) -> None:
    """At once, not when the request before them is finished."""
    with serving(run, "--waiting=1") as server:
        working = leave(server, {**LONG, "stream": True})
        assert b"text_completion.step" in working.recv(1 << 16) + working.recv(1 << 16)
        for _ in range(3):
            waiting = leave(server, {**LONG, "stream": True})
            assert b"text_completion.queued" in waiting.recv(1 << 16) + waiting.recv(1 << 16)
            waiting.close()
            time.sleep(1)
        working.close()


def test_a_client_that_reads_slowly_misses_frames() -> None:
    """Frames that nobody reads do not fill the memory; the newest ones and the texts stay."""
    length = MOST_UNREAD // 16 // 3  # three frames of 16 texts may wait
    layout = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
    job = _Job(Request(n=16), layout)
    frames = [Frame(step, 9, [], [], [], None) for step in range(9)]
    finished = Written([], [], [], 0, 0, 1)
    for event in (*frames, finished):
        job.add(event)
    assert [job.events.get_nowait() for _ in range(job.events.qsize())] == [frames[7], frames[8], finished]


def test_the_last_frame_of_long_texts_is_not_missed() -> None:
    """The page shows what is in it."""
    layout = torch.zeros(MOST_UNREAD, dtype=torch.int64), torch.zeros(MOST_UNREAD, dtype=torch.bool)
    job = _Job(Request(n=16), layout)
    last, finished = Frame(9, 9, [], [], [], None), Written([], [], [], 0, 0, 1)
    for event in (Frame(8, 9, [], [], [], None), last, finished):
        job.add(event)
    assert [job.events.get_nowait() for _ in range(job.events.qsize())] == [last, finished]


def test_entropies_of_too_many_tokens() -> None:
    """Without MASK, the distributions of all tokens are in memory at once."""
    network = SimpleNamespace(config=SimpleNamespace(classes=0, length=8))
    for process, objective, entropy, refused in (
        (Uniform(50257), UDLM(), True, True),
        (Uniform(50257), UDLM(), False, False),
        (Absorbing(50257), MD4(), True, False),
    ):
        diffusion = Diffusion(network, process, get_schedule("loglinear"), objective)
        known = {"diffusion": diffusion, "model": network, "tokenizer": get_tokenizer("bytes")}
        loaded: Any = SimpleNamespace(is_text=True, **known)
        request = Request(n=16, max_tokens=1000, entropy=entropy)
        with pytest.raises(ValueError, match="entropy: expected at most ") if refused else nullcontext():
            check(loaded, request)


# ---- the command ----


def test_a_port_in_use(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["play", str(run), f"--port={port}"]) == 2
    assert f"port: expected a free one on 127.0.0.1, got {port}" in capsys.readouterr().err
    assert main(["play", str(run), "--host", "8.8.8.8"]) == 2
    assert "--host: expected an address of this machine, got '8.8.8.8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"label": 1}, "label: expected none for a model without classes, got 1"),
        ({"image": "valid:0", "mask": [[0, 1]]}, "image: expected none, as this is not a model of images"),
    ],
)
def test_requests_for_images_to_a_model_of_text(server: str, body: Any, message: str) -> None:
    assert ask(server, body)[1]["error"]["message"] == message
    assert ask(server, {"image": "valid:0"}, "/v1/images")[0] == 400


# ---- the page ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Page]:
    with opened(browser, f"http://{server}/") as page:
        yield page


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
def test_what_is_too_long_for_a_link(page: Page) -> None:
    fill(page, prompt="é" * 1500 + "{{3}}", steps=1, n=1)
    page.click("#run")
    done(page)
    assert "There is no link" in (page.locator("#status").text_content() or "")
    assert "?" not in page.url
    assert page.locator("#link").is_disabled()


@in_browser
def test_a_damaged_link(page: Page, server: str) -> None:
    page.goto(f"http://{server}/?sampler_params=%7B")
    page.locator("#status.error", has_text="sampler_params that cannot be read").wait_for()


@in_browser
def test_a_link_cannot_run_code(page: Page, server: str) -> None:
    attack = "%3Cimg%20src%3Dx%20onerror%3D%22document.title%3D'bad'%22%3E%7B%7B2%7D%7D"
    page.goto(f"http://{server}/?prompt={attack}&steps=2&n=1&seed=1&entropy=false")
    assert "<img src=x" in done(page)
    assert page.title() == "cats · sedd play"
    assert page.locator("#texts img").count() == 0
