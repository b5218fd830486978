"""sedd play with a model of images: its endpoints, and its page, on which one paints."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import torch
from PIL import Image
from playing import ask, done, events, fill, in_browser, launched, opened, serving

from sedd.cli import main
from sedd.commands.play.app import _Server
from sedd.commands.play.painting import Images, painted
from sedd.diffusion import sample
from sedd.hub import LoadedModel, load_model

if TYPE_CHECKING:
    from playwright.sync_api import Page

MASK = [[2, 14], [40, 48]]  # 20 of 64 pixels


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of 8 x 8 with 10 classes."""
    folder = tmp_path_factory.mktemp("digits")
    sizes = ["--model.n_blocks=1", "--model.n_heads=2", "--model.hidden_size=32", "--model.classes=10"]
    source = ["--corpus=images", "--data.source=digits", f"--data.cache_dir={folder}", f"--run_dir={folder / 'run'}"]
    more = ["--objective=md4", "--steps=20", "--valid_every=20", "--warmup=5"]
    assert main(["train", *sizes, *source, *more]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def digits(digits_run: Path) -> Iterator[str]:
    """The address of a server with this run."""
    with serving(digits_run) as address:
        yield address


def test_images_that_wait_to_be_read(digits_run: Path) -> None:
    """As many as other requests may wait; the others are refused, and nothing is left behind."""
    server, go = _Server(load_model(digits_run), waiting=2), Event()
    server.images = SimpleNamespace(read=lambda image: go.wait(60))  # type: ignore[assignment]

    async def ask_five() -> list[Any]:
        asked = [asyncio.create_task(server._image("valid:0")) for _ in range(5)]
        await asyncio.sleep(0)  # all have begun
        go.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [getattr(found, "status", None) for found in asyncio.run(ask_five())] == [None] * 3 + [429] * 2
    assert server.reading == 0


def data_url(picture: Any, kind: str = "PNG") -> str:
    """A picture of Pillow as a file in a data URL."""
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def is_painted(mask: Any) -> list[bool]:
    """Where an image of 8 x 8 is painted."""
    return [any(first <= pixel < end for first, end in mask) for pixel in range(64)]


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
        (b'{"label": 4, "guidance": NaN}', "guidance: expected a number from -1000 to 1000, got nan"),
        ({"image": 3}, "image: expected a list, got 3"),
        ({"image": [1, "a"]}, "image: expected a whole number, got 'a'"),
        ({"image": [0] * 63, "mask": MASK}, "image: expected 64 values, 8 x 8 x 1, got 63"),
        ({"image": [256] * 64, "mask": MASK}, "image: expected values in [0, 256), got values from 256 to 256"),
        ({"image": [-1] * 64, "mask": MASK}, "image: expected values in [0, 256), got values from -1 to -1"),
        ({"image": "valid:256", "mask": MASK}, "image: expected a validation image in [0, "),
        (
            {"image": "valid:-1", "mask": MASK},
            "image: expected values, valid:N, or a PNG file as data:image/png;base64",
        ),
        ({"image": "../x.png", "mask": MASK}, "image: expected values, valid:N, or a PNG file"),
        ({"image": "data:image/png;base64,?", "mask": MASK}, "image: expected a PNG file in base64"),
        ({"image": "data:image/png;base64,AAAA", "mask": MASK}, "image: expected a PNG file, got one that cannot"),
        ({"image": "valid:0"}, "mask: expected the pixels that are sampled, 1 to 64 ranges, got 0 ranges"),
        ({"image": "valid:0", "mask": [[0, 1]] * 65}, "mask: expected the pixels that are sampled, 1 to 64 ranges"),
        ({"image": "valid:0", "mask": [[0, 65]]}, "mask: expected ranges [first, end) of the 64 pixels, got [0, 65]"),
        ({"image": "valid:0", "mask": [[-1, 5]]}, "mask: expected ranges [first, end) of the 64 pixels, got [-1, 5]"),
        ({"image": "valid:0", "mask": [[5, 5]]}, "mask: expected ranges [first, end) of the 64 pixels, got [5, 5]"),
        ({"image": "valid:0", "mask": [5]}, "mask: expected a list, got 5"),
        ({"mask": MASK}, "mask: expected none without an image, got 2 ranges"),
    ],
)
def test_bad_requests_for_images(digits: str, body: Any, message: str) -> None:
    status, answer = ask(digits, body)
    assert status == 400
    assert answer["error"]["message"].startswith(message), answer


@pytest.mark.parametrize("sampler", ["tweedie", "remask"])
def test_painted_pixels_are_sampled_and_the_others_stay(digits_run: Path, digits: str, sampler: str) -> None:
    loaded = load_model(digits_run)
    image = loaded.corpus().valid(4)[3]
    where = torch.tensor(is_painted(MASK))
    wanted = sample(
        loaded.diffusion,
        batch=2,
        length=64,
        steps=6,
        sampler=sampler,
        fixed=(image, ~where),
        generator=torch.Generator().manual_seed(3),
        labels=torch.tensor([4, 4]),
        autocast_dtype=loaded.autocast_dtype,
    )
    body = {"image": "valid:3", "mask": MASK, "n": 2, "steps": 6, "seed": 3, "label": 4, "sampler": sampler}
    *frames, last = events(digits, **body)
    assert [choice["image"] for choice in last["choices"]] == wanted.tolist()
    for frame in frames:
        assert frame["given"] == (~where).tolist()
        for values, masked in zip(frame["pieces"], frame["masked"], strict=True):
            assert [v for v, free in zip(values, where, strict=True) if not free] == image[~where].tolist()
            assert not torch.tensor(masked)[~where].any()
    assert any(map(any, frames[0]["masked"]))
    assert wanted[0][where].tolist() != image[where].tolist()
    assert last["usage"] == {"prompt_tokens": 44, "completion_tokens": 40, "total_tokens": 84}


def test_the_three_names_of_an_image(digits_run: Path, digits: str) -> None:
    corpus = load_model(digits_run).corpus()
    values, label = corpus.valid(3)[2].tolist(), int(corpus.labels("validation", 3)[2])
    file = Image.new("L", (8, 8))
    file.putdata(values)
    found = []
    for image, known in (
        ("valid:2", label),
        (values, None),
        (data_url(file), None),
        (data_url(file.convert("P")), None),
    ):
        status, answer = ask(digits, {"image": image}, "/v1/images")
        assert status == 200, answer
        assert answer == {"object": "image", "image": values, "shape": [8, 8, 1], "label": known}
        found.append(ask(digits, {"image": image, "mask": MASK, "steps": 2, "seed": 1})[1]["choices"])
    assert found == found[:1] * 4


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("L", (9, 8)), "image: expected an image of 8 x 8 pixels, got 8 x 9"),
        (Image.new("I;16", (8, 8)), "image: expected values of 8 bits"),
    ],
)
def test_wrong_pictures(digits: str, image: Any, message: str) -> None:
    status, answer = ask(digits, {"image": data_url(image)}, "/v1/images")
    assert status == 400
    assert answer["error"]["message"].startswith(message), answer


def test_large_and_other_pictures_are_not_decoded(digits: str) -> None:
    """A small file may hold a picture of any size, and other formats have decoders of their own."""
    large = bytearray(base64.b64decode(data_url(Image.new("L", (8, 8))).partition(",")[2]))
    large[16:24] = (9000).to_bytes(4, "big") * 2
    large[29:33] = zlib.crc32(large[12:29]).to_bytes(4, "big")
    _, answer = ask(digits, {"image": "data:image/png;base64," + base64.b64encode(large).decode()}, "/v1/images")
    assert answer["error"]["message"] == "image: expected an image of 8 x 8 pixels, got 9000 x 9000"
    gif = data_url(Image.new("L", (8, 8)), "GIF")
    for image in (gif, gif.replace("image/gif", "image/png")):
        status, answer = ask(digits, {"image": image}, "/v1/images")
        assert status == 400
        assert "PNG file" in answer["error"]["message"]
    assert ask(digits, {"image": "x" * (1 << 20)}, "/v1/images")[0] == 413


def test_images_of_a_run_without_data(digits_run: Path) -> None:
    loaded = dataclasses.replace(load_model(digits_run), config=None)
    with pytest.raises(ValueError, match="image: the validation images cannot be read: run: expected a run of sedd"):
        Images(loaded).read("valid:0")


def test_data_that_cannot_be_loaded_are_tried_once(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt may wait for a network. Other images are not affected."""
    tried = []

    def fail(*_: Any) -> None:
        tried.append(1)
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(LoadedModel, "corpus", fail)
    images = Images(load_model(digits_run))
    for _ in range(3):
        with pytest.raises(ValueError, match=r"cannot be read: the hub cannot be reached; restart the server"):
            images.read("valid:0")
    assert len(tried) == 1
    assert images.read([0] * 64)[0].shape == (64,)


def test_a_slow_data_set_holds_up_no_other_image(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, go, corpus = _Server(load_model(digits_run), waiting=2), Event(), LoadedModel.corpus
    monkeypatch.setattr(LoadedModel, "corpus", lambda *given: go.wait(60) and corpus(*given))

    async def ask_both() -> None:
        named = asyncio.create_task(server._image("valid:0"))
        await asyncio.sleep(0)  # it has begun
        try:
            values, _ = await asyncio.wait_for(server._image([0] * 64), timeout=30)
            assert not named.done()
        finally:
            go.set()
        assert values.shape == (await named)[0].shape == (64,)

    asyncio.run(ask_both())


def test_all_channels_of_a_painted_pixel_are_sampled() -> None:
    assert painted([(1, 3)], (2, 2, 3)).tolist() == [False] * 3 + [True] * 6 + [False] * 3


# ---- the page ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


TALL = {"viewport": {"width": 1200, "height": 1400}}


def pixels(page: Page, canvas: str = "#paint") -> list[list[int]]:
    """Red, green and blue of each pixel of a canvas of 8 x 8."""
    found = page.locator(canvas).first.evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, 8, 8).data)"
    )
    return [found[i : i + 3] for i in range(0, len(found), 4)]


def grey(page: Page, canvas: str = "#paint") -> list[int]:
    return [pixel[0] for pixel in pixels(page, canvas)]


def is_mask(pixel: list[int]) -> bool:
    return pixel == [224, 122, 0]


def is_orange(page: Page) -> list[bool]:
    """Which pixels are painted."""
    return [is_mask(pixel) for pixel in pixels(page)]


def kept(values: list[Any], free: list[bool]) -> list[Any]:
    return [value for value, is_free in zip(values, free, strict=True) if not is_free]


def show_valid(page: Page, number: int) -> None:
    page.fill("#valid", str(number))
    page.click("#show-valid")
    page.locator("#status", has_text="Class ").wait_for()


def place(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a column and row of the image are on the page."""
    box = page.locator("#paint").bounding_box()
    assert box is not None
    return box["x"] + 1 + x * (box["width"] - 2) / 8, box["y"] + 1 + y * (box["height"] - 2) / 8


def stroke(page: Page, *places: tuple[float, float]) -> None:
    """Paints with the mouse from place to place."""
    page.mouse.move(*place(page, *places[0]))
    page.mouse.down()
    for x, y in places[1:]:
        page.mouse.move(*place(page, x, y))
    page.mouse.up()


@in_browser
def test_the_canvas_of_an_image(browser: Any, digits: str) -> None:
    with opened(browser, f"http://{digits}/?steps=6&n=2&seed=3&label=4&entropy=false") as page:
        done(page)
        assert not page.locator("#prompt").is_visible()
        assert not page.locator("#painter").is_visible()
        _, answer = ask(digits, {"steps": 6, "n": 2, "seed": 3, "label": 4})
        assert grey(page, "#texts canvas") == answer["choices"][0]["image"]


@in_browser
def test_paint_run_and_see(browser: Any, digits: str) -> None:
    with opened(browser, f"http://{digits}/", **TALL) as page:
        show_valid(page, 3)
        values = ask(digits, {"image": "valid:3"}, "/v1/images")[1]["image"]
        assert grey(page) == values
        page.fill("#brush", "1")
        stroke(page, (2.5, 0.5), (5.5, 0.5), (5.5, 6.5))
        mask = [[2, 6], *([8 * row + 5, 8 * row + 6] for row in range(1, 7))]
        free = is_painted(mask)
        assert is_orange(page) == free
        assert kept(grey(page), free) == kept(values, free)
        fill(page, steps=6, n=2, seed=3, label=4)
        with page.expect_request("**/v1/completions") as sent:
            page.click("#run")
        found = sent.value.post_data_json
        assert (found["image"], found["mask"]) == ("valid:3", mask)
        done(page)
        body = {"image": "valid:3", "mask": mask, "steps": 6, "n": 2, "seed": 3, "label": 4}
        wanted = [choice["image"] for choice in ask(digits, body)[1]["choices"]]
        assert grey(page, "#texts canvas") == wanted[0]
        assert kept(wanted[0], free) == kept(values, free)
        assert wanted[0] != values

        link = page.url
        assert len(link) < 400
        page.goto("about:blank")
        page.goto(link)
        done(page)
        assert is_orange(page) == free, "the link shows what was painted"
        assert grey(page, "#texts canvas") == wanted[0]

        page.locator("#texts button").nth(1).click()
        assert grey(page) == wanted[1], "a sample can be painted on"
        page.click("#run")
        page.locator("#status.error", has_text="mask: expected the pixels that are sampled").wait_for()
        page.click("#remove")
        assert not page.locator("#painter").is_visible()
        with page.expect_request("**/v1/completions") as sent:
            page.click("#run")
        assert "image" not in sent.value.post_data_json


@in_browser
def test_painted_pixels_are_mask_until_they_are_sampled(browser: Any, digits: str) -> None:
    """Every picture of the walk has the given pixels."""
    with opened(browser, f"http://{digits}/?entropy=false&n=1&steps=600", **TALL) as page:  # a busy browser draws late
        show_valid(page, 3)
        values = pixels(page)
        page.click("#invert")
        page.fill("#brush", "3")
        page.check("#erase")
        stroke(page, (0.5, 0.5), (7.5, 0.5))
        free = is_orange(page)
        assert 0 < sum(free) < 64
        page.evaluate(
            """() => {
              window.seen = [];
              const put = CanvasRenderingContext2D.prototype.putImageData;
              CanvasRenderingContext2D.prototype.putImageData = function (image, ...rest) {
                window.seen.push(Array.from(image.data));
                return put.call(this, image, ...rest);
              };
            }"""
        )
        page.click("#run")
        done(page)
        seen = [[data[i : i + 3] for i in range(0, 256, 4)] for data in page.evaluate("window.seen")]
        assert all(kept(shown, free) == kept(values, free) for shown in seen)
        masked = [sum(map(is_mask, shown)) for shown in seen]
        assert masked == sorted(masked, reverse=True)
        assert masked[0] > masked[-1] == 0


@in_browser
def test_the_brush(browser: Any, digits: str) -> None:
    with opened(browser, f"http://{digits}/", **TALL) as page:
        show_valid(page, 0)
        page.fill("#brush", "1")
        stroke(page, (3.5, 3.5))
        assert is_orange(page) == is_painted([(27, 28)])
        page.fill("#brush", "3")
        stroke(page, (3.5, 3.5))
        assert is_orange(page) == is_painted([(18, 21), (26, 29), (34, 37)])
        page.check("#erase")
        page.fill("#brush", "1")
        stroke(page, (3.5, 2.5), (3.5, 4.5))
        assert is_orange(page) == is_painted([(18, 19), (20, 21), (26, 27), (28, 29), (34, 35), (36, 37)])
        page.click("#invert")
        assert sum(is_orange(page)) == 58
        page.click("#clear")
        assert sum(is_orange(page)) == 0
        page.uncheck("#erase")
        stroke(page, (6.5, 4.5), (9.5, 4.5), (9.5, 7.5), (7.5, 7.5))  # over the border
        assert is_orange(page) == is_painted([(38, 40), (63, 64)])
        page.click("#clear")
        page.fill("#brush", "4")
        stroke(page, (4, 4))
        assert is_orange(page) == is_painted([(19, 21), (26, 30), (34, 38), (43, 45)]), "it is round"


@in_browser
def test_painting_with_a_finger_on_a_narrow_page(browser: Any, digits: str) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}
    with opened(browser, f"http://{digits}/", **phone) as page:
        page.fill("#valid", "3")
        page.tap("#show-valid")
        page.locator("#status", has_text="Class ").wait_for()
        page.fill("#brush", "1")
        page.locator("#paint").scroll_into_view_if_needed()
        touched = "document.getElementById('paint').dispatchEvent(new Event('touchstart', {cancelable: true}))"
        assert page.evaluate(touched) is False, "a quick stroke would scroll on, and the next tap would only stop that"
        top = page.evaluate("scrollY")
        touch = page.context.new_cdp_session(page)

        def send(kind: str, *places: tuple[float, float]) -> None:
            points = [dict(zip("xy", place(page, *one), strict=True)) for one in places]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

        send("touchStart", (2.5, 1.5))
        for row in range(2, 7):
            send("touchMove", (2.5, row + 0.5))
        send("touchEnd")
        assert is_orange(page) == is_painted([(8 * row + 2, 8 * row + 3) for row in range(1, 7)])
        assert page.evaluate("scrollY") == top, "the finger paints and does not scroll"
        fill(page, steps=4, n=2)
        page.tap("#run")
        done(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = [box for box in (one.bounding_box() for one in page.locator("body *").all()) if box]
        assert max(box["x"] + box["width"] for box in boxes) <= 390


@in_browser
def test_an_uploaded_picture(browser: Any, digits: str, tmp_path: Path) -> None:
    ramp = [4 * i for i in range(64)]
    file = Image.new("L", (8, 8))
    file.putdata(ramp)
    file.save(tmp_path / "ramp.png")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    (tmp_path / "large.png").write_bytes(bytes(1 << 20))
    with opened(browser, f"http://{digits}/") as page:
        page.set_input_files("#file", tmp_path / "ramp.png")
        page.locator("#painter").wait_for()
        assert grey(page) == ramp
        for name, message in (("wide", "expected an image of 8 x 8 pixels, got 8 x 9"), ("large", "too large")):
            page.set_input_files("#file", tmp_path / f"{name}.png")
            page.locator("#status.error", has_text=message).wait_for()
        page.click("#invert")
        fill(page, steps=2, n=1)
        page.click("#run")
        done(page)
        assert "image=%5B0%2C4%2C8" in page.url, "its values are in the link"


@in_browser
@pytest.mark.parametrize("mask", ["5", "%5B5%5D", "%7B%7D", "%5B"])
def test_links_with_a_damaged_mask(browser: Any, digits: str, mask: str) -> None:
    with opened(browser, f"http://{digits}/?image=valid:3&mask={mask}") as page:
        page.locator("#painter").wait_for()
        assert not any(is_orange(page))


@in_browser
def test_a_link_to_an_image_that_is_not_there(browser: Any, digits: str) -> None:
    with opened(browser, f"http://{digits}/?image=valid:9999&mask=%5B%5B0,3%5D%5D&seed=1") as page:
        page.locator("#status.error", has_text="image: expected a validation image").wait_for()
