"""A server of sedd play, clients that ask it, and a browser that shows its page."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: install Debian's chromium (CI does)")
JSON = {"Content-Type": "application/json"}


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


def leave(server: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request, and returns its connection, which nobody reads."""
    host, port = server.split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {server}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@contextmanager
def launched() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Page]:
    """The page at an address, on which nothing goes wrong but requests that are refused."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
    page = context.new_page()
    messages: list[str] = []
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("console", lambda said: messages.append(said.text) if said.type == "error" else None)
    page.goto(address)
    page.locator("option[value=tweedie]").wait_for(state="attached")
    yield page
    context.close()
    assert [message for message in messages if "status of 400" not in message] == []


def fill(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.fill(f"[name={name}]", str(value))


def done(page: Page) -> str:
    status = page.locator("#status")
    try:
        page.locator("#status", has_text="Done").wait_for(timeout=60_000)
    except Exception as error:
        raise AssertionError(f"the page says {status.text_content()!r} after a minute") from error
    return page.locator("#texts").text_content() or ""
