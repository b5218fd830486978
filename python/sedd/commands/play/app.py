"""The web server of ``sedd play``: a page, and a JSON endpoint in the style of OpenAI's ``/v1/completions``."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from importlib.resources import files
from threading import Event
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from sedd.commands.play.painting import Images
from sedd.commands.play.writing import Frame, Request, Written, check, write
from sedd.commands.sample import GAP
from sedd.diffusion.sampler import Sampler
from sedd.diffusion.samplers import SAMPLERS, find_sampler
from sedd.hub.pretrained import LoadedModel
from sedd.options import build, checked
from sedd.progress import printable

__all__ = ["make_app"]

MOST_BYTES = 1 << 20  # of a request
MOST_UNREAD = 1 << 17  # tokens in the frames that wait for a client
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
PAGE = {"": "text/html", "play.js": "text/javascript", "painter.js": "text/javascript", "play.css": "text/css"}


Body = TypeVar("Body")


@dataclass
class ImageRequest:
    """A request for the values of an image, the body of ``POST /v1/images``."""

    image: str | list[int] = ""
    """See :meth:`Images.read`."""


@dataclass(eq=False)  # equal requests of two clients are two jobs
class _Job:
    """A request at work or in the queue. The events are frames, then the texts or an exception."""

    request: Request
    layout: tuple[Tensor, Tensor]
    events: asyncio.Queue[Frame | Written | Exception] = field(default_factory=asyncio.Queue)
    cancelled: Event = field(default_factory=Event)
    work: Future[None] | None = None

    def add(self, event: Frame | Written | Exception) -> None:
        """Adds an event. A client that reads slowly misses the oldest frames that it has not read."""
        tokens = self.request.n * len(self.layout[0])
        if self.events.qsize() >= max(2, MOST_UNREAD // tokens):  # the last frame and the texts
            self.events.get_nowait()
        self.events.put_nowait(event)


class _RefusedError(Exception):
    """A request that gets this answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Server:
    """The model, one thread that works, and the requests that wait for it."""

    def __init__(self, loaded: LoadedModel, waiting: int) -> None:
        self.loaded, self.waiting = loaded, waiting
        # of a checkpoint, the run
        self.name = (loaded.path.parent.parent if loaded.config else loaded.path).resolve().name
        self.jobs: list[_Job] = []
        self.pool = ThreadPoolExecutor(1, "sedd-play")
        self.images, self.reader = Images(loaded), ThreadPoolExecutor(1, "sedd-play-images")
        self.reading = 0  # images that are read or wait for it

    # ---- answers ----

    async def page(self, request: HttpRequest) -> Response:
        """The page, its script and its style."""
        name = request.url.path.lstrip("/")
        text = files("sedd.commands.play").joinpath(name or "play.html").read_text(encoding="utf-8")
        return Response(text, media_type=PAGE[name], headers=HEADERS)

    async def models(self, _: HttpRequest) -> Response:
        """The model, what it is, and the samplers that suit it."""
        model = self.loaded.model
        about = {
            "id": self.name,
            "object": "model",
            "owned_by": "sedd",
            "facts": model.facts() if not model.causal else "an autoregressive model",
            "length": model.config.length,
            "shape": list(model.config.shape),  # of images; nothing for texts
            "classes": model.config.classes,
            "most_bytes": MOST_BYTES,
            "most_entropy": round(min(5.0, math.log(self.loaded.diffusion.process.dim)), 1),  # the darkest shade
            "samplers": {name: _parameters(kind) for name, kind in SAMPLERS.items() if self._suits(name)},
            "entropy": not self.loaded.diffusion.objective.autoregressive,
        }
        return JSONResponse({"object": "list", "data": [about]}, headers=HEADERS)

    async def completions(self, http: HttpRequest) -> Response:
        """Texts for a request."""
        request = await self._read(http, Request)
        job = self._queue(request, None if request.image is None else (await self._image(request.image))[0])
        if job.request.stream:
            headers = {**HEADERS, "X-Accel-Buffering": "no"}
            return StreamingResponse(self._stream(job), media_type="text/event-stream", headers=headers)
        return await self._answer(job, http)

    async def image(self, http: HttpRequest) -> Response:
        """The values of an image: what is painted on."""
        values, label = await self._image((await self._read(http, ImageRequest)).image)
        shape = list(self.loaded.model.config.shape)
        answer = {"object": "image", "image": values.tolist(), "shape": shape, "label": label}
        return JSONResponse(answer, headers=HEADERS)

    async def _image(self, image: str | list[int]) -> tuple[Tensor, int | None]:
        self._check_room(self.reading)
        self.reading += 1
        named = isinstance(image, str) and image.startswith("valid:")  # the first one loads the data, which takes time
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self.reader if named else None, self.images.read, image
            )
        finally:
            self.reading -= 1

    async def _read(self, http: HttpRequest, kind: type[Body]) -> Body:
        sent = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":  # which no form of another site can send
            raise _RefusedError(415, f"Content-Type: expected application/json, got {sent or 'nothing'}")
        body = b""
        async for part in http.stream():
            body += part
            if len(body) > MOST_BYTES:
                raise _RefusedError(413, f"body: expected at most {MOST_BYTES} bytes, got more")
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"body: expected JSON, got something else ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"body: expected a JSON object, got {type(values).__name__}")
        given = {name: value for name, value in values.items() if value is not None}
        return build(kind, checked(kind, given))

    def _queue(self, request: Request, image: Tensor | None) -> _Job:
        layout = check(self.loaded, request, image)
        self._check_room(len(self.jobs))
        job = _Job(request, layout)
        self.jobs.append(job)
        job.work = self.pool.submit(self._work, job, asyncio.get_running_loop())
        return job

    def _check_room(self, count: int) -> None:
        if count > self.waiting:  # the first one is at work
            raise _RefusedError(429, f"server: expected at most {self.waiting} waiting requests; try again later")

    def _leave(self, job: _Job) -> None:
        """The client does not wait any more: the job leaves the queue, or ends after the present step."""
        job.cancelled.set()
        if job.work is not None and job.work.cancel():
            self.jobs.remove(job)

    def _work(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread that works."""

        def put(event: Frame | Written | Exception) -> None:
            loop.call_soon_threadsafe(job.add, event)

        try:
            on_frame = put if job.request.stream else None
            put(write(self.loaded, job.request, job.layout, on_frame, job.cancelled))
        except Exception as error:  # the server goes on
            put(error)
        finally:
            loop.call_soon_threadsafe(self.jobs.remove, job)

    async def _answer(self, job: _Job, http: HttpRequest) -> Response:
        result = asyncio.create_task(job.events.get())
        gone = asyncio.create_task(_disconnected(http))
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not result.done():
                self._leave(job)
                result.cancel()
        if result.cancelled() or not result.done():
            return Response(status_code=499)  # nobody reads it
        found = result.result()
        if isinstance(found, Written):
            return JSONResponse(self._completion(job, found), headers=HEADERS)
        assert isinstance(found, Exception)
        return JSONResponse(_error(found), 400 if isinstance(found, ValueError) else 500, headers=HEADERS)

    async def _stream(self, job: _Job) -> AsyncIterator[str]:
        try:
            while job.events.empty() and (ahead := self.jobs.index(job) if job in self.jobs else 0) > 0:
                yield _event({"object": "text_completion.queued", "ahead": ahead})
                await asyncio.sleep(0.2)
            while True:
                found = await job.events.get()
                if isinstance(found, Frame):
                    yield _event({"object": "text_completion.step", "seed": job.request.seed, **vars(found)})
                    continue
                yield _event(self._completion(job, found) if isinstance(found, Written) else _error(found))
                yield "data: [DONE]\n\n"
                return
        finally:
            self._leave(job)

    def _completion(self, job: _Job, written: Written) -> dict[str, Any]:
        alone = GAP.search(job.request.prompt) is None
        choices: list[dict[str, Any]] = [
            {"text": gaps[0] if alone else text, "gaps": gaps}
            for text, gaps in zip(written.texts, written.gaps, strict=True)
        ]
        choices += [{"image": image, "shape": list(self.loaded.model.config.shape)} for image in written.images]
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "seed": written.seed,
            "choices": [{"index": i, **choice, "finish_reason": "length"} for i, choice in enumerate(choices)],
            "usage": {
                "prompt_tokens": written.given,
                "completion_tokens": written.written,
                "total_tokens": written.given + written.written,
            },
        }

    def _suits(self, name: str) -> bool:
        try:
            find_sampler(self.loaded.diffusion, name, 1)
        except ValueError:
            return False
        return True


def _parameters(kind: type[Sampler]) -> dict[str, str]:
    """The parameters of a sampler with their defaults, as words; not those that are samplers."""
    found = {}
    for parameter in fields(kind):
        if parameter.name != "steps" and isinstance(parameter.default, (bool, int, float, str)):
            found[parameter.name] = str(parameter.default).lower()
    return found


def _event(values: dict[str, Any]) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def _error(error: Exception) -> dict[str, Any]:
    """The body of an error."""
    known = isinstance(error, (ValueError, _RefusedError))
    message = str(error) if known else f"{type(error).__name__}: {error}"
    return {"error": {"message": printable(message), "type": "invalid_request_error" if known else "server_error"}}


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    """The answer to a request that is wrong."""
    return JSONResponse(_error(error), error.status if isinstance(error, _RefusedError) else 400, headers=HEADERS)


async def _gone(_: HttpRequest, __: Exception) -> Response:
    """For a client that has left in the middle of its request."""
    return Response(status_code=499)  # nobody reads it


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _hosts(host: str) -> list[str]:
    """The names under which browsers may ask for the page, which no other site can point to it; for 0.0.0.0, any."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return [host, *(["127.0.0.1"] if host == "localhost" else [])]
    if address.is_unspecified:
        return ["*"]
    name = f"[{address}]" if address.version == 6 else str(address)
    return list(dict.fromkeys([name, *(["localhost", "127.0.0.1", "[::1]"] if address.is_loopback else [])]))


def make_app(loaded: LoadedModel, host: str = "127.0.0.1", waiting: int = 32) -> Starlette:
    """The web server as an ASGI application.

    Args:
        loaded: the model.
        host: the address it listens on. On a loopback address, it answers under the names of this machine alone.
        waiting: requests that may wait for their turn.
    """
    server = _Server(loaded, waiting)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for job in server.jobs:
            job.cancelled.set()
        server.pool.shutdown(cancel_futures=True)
        server.reader.shutdown(cancel_futures=True)

    return Starlette(
        routes=[
            *(Route(f"/{name}", server.page) for name in PAGE),
            Route("/v1/models", server.models),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/images", server.image, methods=["POST"]),
        ],
        exception_handlers={ValueError: _refuse, _RefusedError: _refuse, ClientDisconnect: _gone},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=_hosts(host))],
        lifespan=lifespan,
    )
