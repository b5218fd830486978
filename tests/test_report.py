"""The report: all of a run on one page, harmless whatever a model wrote, and a film that a browser really plays."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import matplotlib.image
import torch

from sedd.cli import main
from sedd.commands.report import _cell
from sedd.diffusion.samplers import sample
from sedd.hub import load_model
from sedd.training.checkpoint import read_state

STEPS = 12
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no browser: install Debian's chromium (CI does)")


def train(folder: Path, *options: str) -> Path:
    text = folder / "cats.txt"
    text.write_text("".join(f"{i} éàü öñéàéü öàñ\n" for i in range(600)), encoding="utf-8")  # two bytes a letter
    sizes = ["--model.n_blocks=1", "--model.n_heads=2", "--model.hidden_size=32", "--model.length=24"]
    source = [f"--data.source={text}", f"--data.cache_dir={folder / 'cache'}", f"--run_dir={folder / 'cats'}"]
    assert main(["train", *sizes, *source, "--steps=60", "--valid_every=20", "--lr=1e-2", "--warmup=5", *options]) == 0
    return folder / "cats"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = train(tmp_path_factory.mktemp("runs"))
    figures = {"model": "x", "texts": {"a.txt": {"perplexity": 12.3456, "tokens": 12345, "reading": "<b>bold</b>"}}}
    (run / "eval" / "perplexity.json").write_text(json.dumps(figures))
    rows = [
        {"sampler": "euler", "steps": 16, "texts": ["not shown"]},
        {"sampler": "tweedie", "steps": 16, "mauve": 0.5},
    ]
    (run / "eval" / "generative.json").write_text(
        json.dumps({"settings": {"judge": "someone"}, "real": {"entropy": 4.5}, "rows": rows})
    )
    matplotlib.image.imsave(run / "eval" / "bound.png", torch.rand(4, 4, 3).numpy())
    return run


def make(run: Path, *options: str) -> str:
    assert main(["report", str(run), "--steps", str(STEPS), "--samples", "2", *options]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def frames(run: Path, seed: int = 0) -> list[str]:
    """The texts of all steps from the sampler itself, MASK as a block."""
    loaded = load_model(run)
    generator = torch.Generator().manual_seed(seed)
    kept = [loaded.diffusion.process.sample_limit((2, 24), generator=torch.Generator().manual_seed(seed))]
    sample(
        loaded.diffusion,
        batch=2,
        length=24,
        steps=STEPS,
        generator=generator,
        on_step=lambda step, steps, tokens: kept.append(tokens),
        autocast_dtype=loaded.autocast_dtype,
    )
    return [loaded.tokenizer.decode(frame[0].tolist()) for frame in kept]


def test_everything_of_a_run_is_on_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = make(run)
    assert "report.html: open it in a browser" in capsys.readouterr().out
    best = read_state(load_model(run).path)["step"]  # the letters are soon known by heart: it need not be the last
    facts = ("cats", "absorbing, loglinear", "bytes, 257", f"{best} steps, ", "validation bound", "<svg", "hidden_size")
    for words in facts:
        assert words in page
    for words in ("12.35", "12,345", "<dt>judge</dt><dd>someone</dd>", "0.5", ">real</td>", "data:image/png;base64,"):
        assert words in page
    assert "&lt;b&gt;bold" in page
    assert "<b>bold" not in page
    assert "not shown" not in page
    assert "<pre" not in page
    folded = re.findall("<details>.*?</details>", page, re.DOTALL)
    assert len(folded) == 3, "two evaluations and the options of the run"
    for words, where in (("reading", 1), ("someone", 0), ("valid_every", 2)):
        assert words in folded[where]
    summary = re.sub("<details>.*?</details>", "", page, flags=re.DOTALL)
    assert "<dt>model.hidden_size</dt><dd>32</dd>" in summary
    assert "data.documents" not in summary, "it is as always"
    film = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert len(film["changes"]) == STEPS + 1
    assert film["counts"][0] == 24
    assert film["counts"][-1] == 0
    ids = film["start"]
    for change, expected in zip([[], *film["changes"]], frames(run), strict=True):
        for place, piece in change:
            ids[place] = piece
        assert "".join(film["pieces"][piece] for piece in ids) == expected
    (text,) = re.findall(r'<div class="text">(.*?)</div>', page, re.DOTALL)[:1]
    assert html.unescape(text) == frames(run)[-1]
    assert re.search("[éàüöñ]", text), "a letter of several tokens"


def test_what_a_killed_evaluation_was_writing_is_no_evaluation(run: Path) -> None:
    leftovers = [run / "eval" / ".writing-perplexity.json", run / "eval" / ".writing-bound.png"]
    for path in leftovers:
        path.write_text('{"cut')
    assert "writing-" not in make(run)
    for path in leftovers:
        path.unlink()


def test_a_checkpoint_named_from_its_own_folder_is_of_its_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run / "checkpoints")
    (run / "report.html").unlink(missing_ok=True)
    assert main(["report", "step_00000060", "--steps", "2", "--samples", "1"]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h1>cats</h1>" in page
    assert "<svg xmlns" in page
    assert "12.35" in page
    assert main(["info", "step_00000060"]) == 0
    assert re.search(r"step_00000060: +\d\.\d{4} nats per token", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (999_999.0, "999,999"),
        (1.6e31, "1.6e+31"),
        (-2e7, "-2e+07"),
        (10**31, f"{10**31:,}"),
        (None, ""),
        (True, "True"),
    ],
)
def test_how_a_value_is_shown(value: Any, shown: str) -> None:
    assert _cell(value) == shown


def test_nothing_is_asked_for_and_nothing_else_may_run(run: Path) -> None:
    page = make(run)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-" in page
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"|xlink:href="#[^"]*"|rdf:resource="[^"]*"', "", page)
    outside = re.sub(r"<metadata>.*?</metadata>", "", outside, flags=re.DOTALL)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"^ *//.*$", "", outside, flags=re.MULTILINE))


EVIL = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\u2028\u202e\x1b\0 & \"'`${x}"]


def test_what_a_model_writes_is_harmless(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(run)
    monkeypatch.setattr(type(loaded.tokenizer), "pieces", lambda self, ids: [EVIL[i % 3] + EVIL[1] for i in ids])
    page = make(run)
    assert page.count("<script") == 2
    assert "<img src=x" not in page
    assert "alert(1)</script>" not in page
    assert json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def test_a_failure_leaves_the_page_that_was_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = make(run)

    def fail(self: Path, target: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    assert main(["report", str(run), "--steps", "2", "--samples", "1"]) == 2
    assert (run / "report.html").read_text(encoding="utf-8") == page
    assert not list(run.glob(".writing-*"))


def test_a_run_with_little_to_tell(tmp_path: Path) -> None:
    run = train(tmp_path, "--steps=3", "--process=uniform")
    metrics = run / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # what a killed process was writing
    page = make(run)
    assert "tokens changed" in page
    assert "None yet" in page
    metrics.unlink()
    assert "This run has no metrics.jsonl" in make(run)
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["convert", str(run), str(tmp_path / "model")]) == 0
    assert main(["report", str(tmp_path / "model")]) == 2, "a model has no losses to report"


# -- in a browser ------------------------------------------------------------------------------------------------------


def browse(page: Path, anchor: str, work: Path, *options: str) -> str:
    """Opens a page; returns the document after its scripts have run."""
    line = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={work / 'profile'}"]
    more = ["--virtual-time-budget=4000", "--enable-logging=stderr", *options, f"{page.resolve().as_uri()}{anchor}"]
    done = subprocess.run([*line, *more], capture_output=True, timeout=120)
    messages = [row for row in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in row]
    assert not messages, messages
    return done.stdout.decode("utf-8")


def shown(document: str) -> tuple[str, str]:
    """The text of the film and the words beside the slider."""
    film = re.search(r'<div id="film"[^>]*>(.*?)</div>', document, re.DOTALL)
    where = re.search(r'<output id="where"[^>]*>(.*?)</output>', document)
    assert film
    assert where
    return html.unescape(re.sub(r"<[^>]*>", "", film[1])), where[1]


@in_browser
def test_a_browser_shows_the_step_that_is_asked_for(run: Path, tmp_path: Path) -> None:
    make(run)
    texts = frames(run)
    for step in (0, 5, STEPS + 1):
        text, where = shown(browse(run / "report.html", f"#step={step}", tmp_path, "--dump-dom"))
        assert text == texts[step]
        assert where == f"step {step} of {STEPS + 1} · {texts[step].count('█')} tokens still masked"
    assert shown(browse(run / "report.html", "", tmp_path, "--dump-dom"))[0] == texts[-1]


SCRUB = """
const seen = [], text = () => document.getElementById("film").textContent;
const key = (name) => document.body.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
slider.value = 3; slider.dispatchEvent(new Event("input")); seen.push(text());
key("ArrowRight"); seen.push(text());
key("ArrowLeft"); key("ArrowLeft"); seen.push(text());
location.hash = "#step=7";
setTimeout(() => {
  seen.push(text());
  slider.value = 10; slider.dispatchEvent(new Event("input"));
  document.getElementById("play").click();
  setTimeout(() => { seen.push(text()); document.title = JSON.stringify(seen); }, 2500);
}, 100);
"""


@in_browser
def test_the_film_can_be_scrubbed_stepped_and_played(run: Path, tmp_path: Path) -> None:
    page = re.sub(r"<meta http-equiv[^>]*>", "", make(run))  # or this script would not run, as the next test shows
    probe = tmp_path / "probe.html"
    probe.write_text(page.replace("</body>", f"<script>{SCRUB}</script></body>"), encoding="utf-8")
    document = browse(probe, "", tmp_path, "--dump-dom")
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1]))  # type: ignore[index]
    texts = frames(run)
    assert seen == [texts[step] for step in (3, 4, 2, 7, STEPS + 1)]


@in_browser
def test_a_script_that_is_not_the_pages_own_does_not_run(run: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(make(run).replace("</body>", "<script>document.title = 'ran'</script></body>"), encoding="utf-8")
    with pytest.raises(AssertionError, match="inline script violates the following Content Security"):
        browse(probe, "", tmp_path, "--dump-dom")


@in_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(run: Path, tmp_path: Path, width: int) -> None:
    """Tables as wide as real ones; what scrolls sideways is cut off."""
    names = ["seconds_per_text", "perplexity", "perplexity_error", "entropy", "unique", "repetition", "mauve_prefix"]
    row = {"sampler": "tweedie", "steps": 1024, **dict.fromkeys(names, 123.456), "text": "word " * 12}
    wide = run / "eval" / "wide.json"
    wide.write_text(json.dumps({"settings": {"weights": "f" * 64}, "rows": [row, row]}))
    probe = tmp_path / "probe.html"
    script = """document.querySelectorAll("details").forEach((box) => { box.open = true; });
    const all = [...document.querySelectorAll("*")];
    const cut = all.filter((box) => box.clientWidth && box.scrollWidth > box.clientWidth + 1);
    document.title = JSON.stringify([innerWidth, ...cut.map((box) => box.outerHTML.slice(0, 80))]);"""
    page = re.sub(r"<meta http-equiv[^>]*>", "", make(run)).replace("</body>", f"<script>{script}</script></body>")
    wide.unlink()
    frame = tmp_path / "frame.html"  # a browser's own window cannot be as narrow as a telephone
    probe.write_text(page, encoding="utf-8")
    frame.write_text(
        f"<iframe src='probe.html' style='width: {width}px; height: 900px; border: 0'></iframe><script>"
        "document.querySelector('iframe').onload = (event) => "
        "{ document.title = event.target.contentDocument.title; };</script>"
    )
    options = ["--dump-dom", "--window-size=1600,1000", "--allow-file-access-from-files"]
    document = browse(frame, "", tmp_path, *options)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", document, re.DOTALL)[1]))  # type: ignore[index]
    assert found == [width]


@in_browser
@pytest.mark.parametrize("size", ["1280,1600", "390,1600"])
def test_a_screenshot_has_something_on_it(run: Path, tmp_path: Path, size: str) -> None:
    make(run)
    picture = tmp_path / "page.png"
    browse(run / "report.html", "#step=6", tmp_path, f"--window-size={size}", f"--screenshot={picture}")
    colours = torch.from_numpy(matplotlib.image.imread(picture).copy())[..., :3].mul(255).to(torch.int64)
    assert len(colours.flatten(0, 1).unique(dim=0)) > 100
    marked = (colours == torch.tensor([255, 233, 168])).all(-1).sum()
    assert int(marked) > 50, "what the step has changed is marked"
