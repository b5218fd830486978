"""Recipes of the papers' tables: every one is valid, one runs end to end, and figures are compared correctly."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("rich")
pytest.importorskip("yaml")

import sedd.recipes
from sedd.cli import _given_options, _parse, main
from sedd.commands import reproduce
from sedd.commands.comparison import order_table, shown
from sedd.commands.measures import MEASURES
from sedd.config import TrainConfig, flat
from sedd.hints import program
from sedd.options import build, checked
from sedd.recipes import SCALES, load_recipe, load_setting, recipe_names
from sedd.recipes.order import Figure, Order, compare, paper_pairs
from sedd.recipes.plan import Job, make_plan
from sedd.recipes.results import find_figure, mean_figure
from sedd.training.state import TrainState

RECIPE = "md4-text8"
"""Two runs with one evaluation each."""
JOBS = ["text8/md4", "text8/md4: test", "text8/genmd4", "text8/genmd4: test"]
WORDS = ["reproduce", RECIPE, "--scale", "smoke"]
PARSED: set[tuple[str, ...]] = set()
"""Commands with the names of options that were parsed already: parsing takes a tenth of a second."""
SETTINGS = sorted({load_recipe(name).setting for name in recipe_names()})


def made(tmp_path: Path, scale: Any, name: str, seeds: int = 1) -> Any:
    """The plan of a recipe, with a file for each of its inputs."""
    (tmp_path / "file.txt").write_text("a text")
    inputs = load_setting(load_recipe(name).setting, scale).inputs
    return make_plan(load_recipe(name), scale, tmp_path, dict.fromkeys(inputs, tmp_path / "file.txt"), seeds)


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Records of finished jobs by their path."""
    return {str(path.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("records/*.json")}


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_all_tables_are_there() -> None:
    places = {(load_recipe(name).paper, load_recipe(name).place) for name in recipe_names()}
    sedd_places = [*(f"table {i}" for i in range(1, 6)), "figure 1", "figure 2"]
    promises = [*(f"table {i}" for i in range(1, 7)), "figure 1"]
    assert places >= {("SEDD", place) for place in sedd_places} | {("Promises", place) for place in promises}
    assert {name for name in recipe_names() if name.startswith("md4-")} >= {
        *("md4-text8", "md4-openwebtext", "md4-zeroshot", "md4-cifar10", "md4-imagenet64", "md4-schedule", "md4-seeds")
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", recipe_names())
def test_every_option_is_one_of_its_command(name: str, scale: Any, tmp_path: Path) -> None:
    """The commands take the options; the command lines that are printed say the same."""
    recipe, plan = load_recipe(name), made(tmp_path, scale, name)
    assert list(plan.cells) == [(row, column) for row in recipe.rows for column in recipe.columns]
    assert bool(plan.jobs) == any(isinstance(jobs, list) for jobs in plan.cells.values())
    for job in plan.jobs.values():
        job.results.parent.mkdir(parents=True, exist_ok=True)
        options = reproduce.check_job(job)
        names = job.command, *flat(job.options)
        if names in PARSED:
            continue
        PARSED.add(names)
        line = reproduce.command_line(job).removeprefix(f"{program()} ")
        words = _parse(shlex.split(line))
        given = build(type(options), _given_options(words.run_command, words))
        if job.evaluation is None:
            assert given == options
            assert given.run_dir == str(job.folder)
        else:
            assert (words.measure, words.run) == (job.command, job.model)
            assert given == dataclasses.replace(options, json=str(job.results))
    order = list(plan.jobs)
    assert all(order.index(need) < order.index(name) for name, needs in plan.needs.items() for need in needs)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SETTINGS)
def test_options_that_are_out_of_reach_are_valid_too(name: str, scale: Any) -> None:
    setting = load_setting(name, scale)
    for run in setting.runs.values():
        build(TrainConfig, checked(TrainConfig, run.train))
    for evaluation in setting.evaluations.values():
        checked(MEASURES[evaluation.command].options, evaluation.options)  # type: ignore[arg-type]
    assert setting.out_of_reach or setting.minutes.evaluate > 0


@pytest.mark.parametrize("name", recipe_names())
def test_every_value_is_one_that_the_evaluation_writes(name: str) -> None:
    recipe = load_recipe(name)
    known = {
        "perplexity": {"nats_per_token", "perplexity", "perplexity_mean_of_exp", "bits_per_byte", "bits_per_dim"},
        "generative": {"perplexity", "entropy", "unique", "repetition", "mauve_prefix", "mauve_infill", "fid"}
        | {"perplexity_prefix"},
        "latency": {"seconds"},
        "harness": {"acc,none"},
    }
    picks = {"generative": {"sampler", "steps"}, "latency": {"batch", "steps"}, "harness": {"task"}}
    evaluations = load_setting(recipe.setting, "full").evaluations
    for row, of in recipe.rows.items():
        for column, within in recipe.columns.items():
            evaluation, value, pick = recipe.cell(row, column)
            if of.run is None or within.missing:
                continue
            assert evaluation is not None
            command = evaluations[evaluation].command
            assert value in known[command]
            assert set(pick) <= picks.get(command, set())


def test_figures_are_those_of_the_papers() -> None:
    """A few of every table, typed a second time."""
    for name, row, column, figure in (
        ("sedd-table1", "SEDD Absorb small", "PTB", 114.24),
        ("sedd-table1", "GPT-2 medium", "LAMBADA", 35.66),
        ("sedd-table2", "D3PM Uniform", "bits per character", 1.61),
        ("sedd-table3", "SEDD Uniform", "perplexity", 40.25),
        ("sedd-table5", "SEDD infill", "MAUVE", 0.942),
        ("promises-table1", "SEDD medium", "WikiText103", 28.54),
        ("promises-table2", "GPT-2 large", "PIQA", 70.34),
        ("promises-table3", "SEDD, 512 steps", "perplexity of the judge", 51.05),
        ("promises-table4", "GPT-2, top-p 0.95", "repeated tokens", 0.03),
        ("promises-table5", "SEDD, 256 steps", "MAUVE, texts of 100 tokens", 0.9149),
        ("promises-table6", "SEDD, 1024 steps", "perplexity of continuations", 52.192),
        ("md4-cifar10", "τLDR, masked noise", "bits per dimension", 3.52),
        ("md4-zeroshot", "MD4", "1BW", 68.10),
    ):
        assert load_recipe(name).paper_figure(row, column) == figure
    assert load_recipe("md4-zeroshot").paper_figure("GenMD4", "1BW") is None


def test_a_row_without_a_run_says_why(tmp_path: Path) -> None:
    plan = made(tmp_path, "small", "sedd-table1")
    assert plan.cells["PLAID small", "PTB"] == "continuous diffusion"
    assert "two cores" in plan.cells["SEDD Absorb medium", "PTB"]
    assert "same test text" in plan.cells["D3PM small", "WikiText103"]
    assert plan.cells["D3PM small", "PTB"][0].name == "openwebtext/d3pm-absorb: ptb"
    plan = make_plan(load_recipe("sedd-table1"), "small", tmp_path, {"wikitext": tmp_path / "a"})
    assert plan.cells["D3PM small", "PTB"] == "needs --data ptb=FILE"
    assert not plan.jobs, "no text can be evaluated, so nothing is trained"


def test_samples_of_more_steps_than_the_scale_writes(tmp_path: Path) -> None:
    plan = made(tmp_path, "small", "sedd-figure1")
    assert plan.cells["SEDD Absorb, 2048 steps", "perplexity of the judge"].startswith("samples of at most 256 steps")
    judge = str(tmp_path / "small/openwebtext/ar")
    assert plan.jobs["openwebtext/sedd-absorb: samples"].options["judge"] == judge
    assert "openwebtext/ar" in plan.needs["openwebtext/sedd-absorb: samples"]


def test_seeds_are_further_runs(tmp_path: Path) -> None:
    plan = made(tmp_path, "small", RECIPE, seeds=2)
    cell = plan.cells["MD4", "bits per character"]
    assert [job.folder.name for job in cell] == ["md4", "md4-seed1"]
    assert [plan.jobs[job.run].options.get("seed", 0) for job in cell] == [0, 1]
    latency = made(tmp_path, "full", "promises-figure1", seeds=2)
    assert list(latency.jobs) == ["latency/sedd: latency"], "a model that is not trained has no seed"


def test_a_mistake_in_a_recipe_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sedd.recipes, "FOLDER", tmp_path)
    load = load_recipe.__wrapped__
    good = {
        **{"paper": "P", "place": "table 1", "title": "T", "setting": "text8"},
        **{
            "columns": {"c": {"evaluation": "test", "value": "perplexity"}},
            "rows": {"r": {"run": "md4", "paper": [1]}},
        },
    }
    for change, message in (
        ({"colums": {}}, "names: expected one of paper, .*; got 'colums'; did you mean 'columns'"),
        ({"columns": {"c": {"evalution": "test"}}}, "columns.c.evalution: no such option; did you mean 'evaluation'"),
        ({"columns": {"c": {"better": "less"}}}, "columns.c.better: expected one of lower, higher; got 'less'"),
        ({"rows": {"r": {"paper": [1]}}}, "rows.r: expected either run or elsewhere"),
        ({"rows": {"r": {"run": "md4", "paper": [1, 2]}}}, "rows.r.paper: expected 1 values, got 2"),
        ({"order": {"c": [["r", "s"]]}}, "order.c: expected one of r; got 's'"),
    ):
        (tmp_path / "mine.yaml").write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "mine.yaml: ")) + message):
            load("mine")
    (tmp_path / "mine.yaml").write_text(json.dumps(good))
    assert load("mine").columns["c"].value == "perplexity"


# -- figures -----------------------------------------------------------------------------------------------------------


def test_pairs_of_a_paper() -> None:
    figures = {"a": 3.0, "b": 1.0, "c": 1.0, "d": 2.0}
    assert paper_pairs(figures, [], "lower") == [("b", "a"), ("c", "a"), ("d", "a"), ("b", "d"), ("c", "d")]
    assert paper_pairs(figures, [], "higher")[0] == ("a", "b")
    assert paper_pairs(figures, [], "lower", equal_within=1.0) == [("b", "a"), ("c", "a")]
    assert paper_pairs({}, [["x", "y", "z"], ["x", "y"]], "lower") == [("x", "y"), ("x", "z"), ("y", "z")]


def test_order_of_figures() -> None:
    pairs = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "a"), ("e", "a"), ("f", "a"), ("a", "unmeasured")]
    ours = {
        "a": Figure(1.0, 0.1),
        "b": Figure(1.2, 0.1),  # 1.4 standard errors above a
        "c": Figure(2.0, 0.1),
        "d": Figure(1.5, 0.1),  # 3.5 above a
        "e": Figure(9.0, None),
        "f": Figure(math.inf, 0.0),
    }
    found = compare(pairs, ours, "lower")
    assert found == Order(
        same=[("b", "c"), ("a", "c")], unclear=[("a", "b"), ("e", "a")], reversed=[("d", "a"), ("f", "a")]
    )
    turned = compare(pairs, ours, "higher")
    assert (turned.same, turned.unclear, turned.reversed) == (found.reversed, found.unclear, found.same)
    assert compare([("a", "b")], {"a": Figure(math.inf, 0.0), "b": Figure(math.inf, 0.0)}, "lower").unclear


def test_two_standard_errors_separate() -> None:
    for distance, unclear in ((1.9, True), (2.1, False)):
        ours = {"a": Figure(0.0, 0.6), "b": Figure(distance, 0.8)}  # the error of the difference is 1
        assert bool(compare([("a", "b")], ours, "lower").unclear) == unclear


def test_figures_of_every_evaluation() -> None:
    text = {"nats_per_token": 2.0, "standard_error": 0.1, "perplexity": 7.4, "bits_per_byte": 3.0}
    text |= {"perplexity_mean_of_exp": 8.0, "perplexity_mean_of_exp_error": 0.9}
    document = {"texts": {"unigram": {"perplexity": 9.0}, "x.txt": text}}

    def find(command: str, found: Any, value: str, scale: float = 1.0, **pick: Any) -> Figure:
        return find_figure(command, found, value, pick, scale)

    assert find("perplexity", document, "nats_per_token") == Figure(2.0, 0.1)
    assert find("perplexity", document, "bits_per_byte") == Figure(3.0, pytest.approx(0.15))
    assert find("perplexity", document, "perplexity") == Figure(7.4, pytest.approx(0.74))
    assert find("perplexity", document, "perplexity_mean_of_exp") == Figure(8.0, 0.9)
    document["texts"]["x.txt"]["perplexity_mean_of_exp"] = 1e20
    assert find("perplexity", document, "perplexity_mean_of_exp") == Figure(1e20, None), "a few blocks dominate it"
    document["texts"]["x.txt"]["bits_per_byte"] = None
    assert find("perplexity", document, "bits_per_byte") == Figure(math.inf, 0.0)

    image = {"data": {"test": {"nats_per_token": 2.0, "standard_error": 0.1, "bits_per_dim": 2.9}}}
    assert find("perplexity", image, "bits_per_dim") == Figure(2.9, pytest.approx(0.145))

    rows = [
        {"sampler": "euler", "steps": 4, "perplexity": 5.0, "perplexity_error": 0.5},
        {"sampler": "tweedie", "steps": 4, "perplexity": 6.0, "entropy": 2.0, "entropy_std": 0.4},
        {"sampler": "tweedie", "steps": 8, "perplexity": 7.0, "perplexity_error": 0.7, "mauve_prefix": 0.9},
    ]
    written = {"settings": {"num": 16}, "rows": rows, "real": {"perplexity": 1.0, "perplexity_error": 0.1}}
    assert find("generative", written, "perplexity", sampler="tweedie", steps=8) == Figure(7.0, 0.7)
    assert find("generative", written, "entropy", sampler="tweedie", steps=4) == Figure(2.0, 0.1)
    written["real"] |= {"entropy": 3.0, "entropy_std": 0.4, "num": 4}  # fewer real texts than samples
    assert find("generative", written, "entropy", sampler="real text") == Figure(3.0, 0.2)
    assert find("generative", written, "mauve_prefix", sampler="tweedie", steps=8) == Figure(0.9, None)
    assert find("generative", written, "perplexity", sampler="real text") == Figure(1.0, 0.1)
    with pytest.raises(ValueError, match="expected a result with perplexity, sampler tweedie, steps 16; got none"):
        find("generative", written, "perplexity", sampler="tweedie", steps=16)

    times = {
        "rows": [
            {"batch": 1, "steps": None, "seconds": 3.0, "fastest": 2.0, "slowest": 4.0},
            {"batch": 1, "steps": 16, "seconds": 1.0, "fastest": 1.0, "slowest": 1.0},
        ]
    }
    assert find("latency", times, "seconds", batch=1, steps=None) == Figure(3.0, 1.0)
    assert find("latency", times, "seconds", batch=1, steps=16) == Figure(1.0, None)
    tasks = {"results": {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.01}}}
    assert find("harness", tasks, "acc,none", 100.0, task="piqa") == Figure(50.0, 1.0)


def test_mean_over_seeds() -> None:
    assert mean_figure([Figure(3.0, 0.5)]) == Figure(3.0, 0.5)
    mean = mean_figure([Figure(1.0, 0.6), Figure(3.0, 0.8)])
    assert mean.value == 2.0
    assert mean.error == pytest.approx(math.sqrt(2 / 2 + 0.5))  # variance of the seeds, and of an evaluation
    assert mean_figure([Figure(1.0, 0.1), Figure(2.0, None)]) == Figure(1.5, None)


def test_digits_are_those_of_the_error() -> None:
    assert shown(Figure(1.23456, 0.0123)) == "1.235 ± 0.012"
    assert shown(Figure(1234.5, 67.8)) == "1234 ± 68"
    assert shown(Figure(0.9, None)) == "0.9"
    assert shown(Figure(math.inf, 0.0)) == "inf"


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe that ran without a stop."""
    out = tmp_path_factory.mktemp("finished")
    assert main([*WORDS, "--out", str(out)]) == 0
    return out


def test_a_recipe_end_to_end(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = records(finished)
    assert len(before) == len(JOBS)
    log = (finished / "log.txt").read_text()
    assert [name for name in re.findall(r"of 4: (?:training|evaluating) (.*); about", log)] == JOBS
    assert len(re.findall(r"about \d+ (?:s|min) left", log)) == len(JOBS)
    bits = {}
    for run in ("md4", "genmd4"):
        folder = finished / "smoke" / "text8" / run
        row = json.loads((folder / "eval" / "test.json").read_text())["texts"]["text8.test.txt"]
        error = row["standard_error"] * row["bits_per_byte"] / row["nats_per_token"]
        bits[run] = shown(Figure(row["bits_per_byte"], error))
    markdown = (finished / f"{RECIPE}-smoke.md").read_text()
    pair = "0 of 1 pairs as in the paper, 1 not separated"
    assert f"| MD4 | {bits['md4']} | 1.37 | {pair} |\n| GenMD4 | {bits['genmd4']} | 1.34 | {pair} |\n" in markdown
    assert "| GenMD4, one power for all tokens | (1) | 1.37 |  |" in markdown
    assert "\n(1) learned powers are of each token in this package.\n" in markdown
    assert "1 of 2 pairs of rows are measured: 0 in the paper's order, 1 not separated" in markdown  # after 4 steps
    cells = f"[Bits per character on text8]({RECIPE}-smoke.md) | MD4, text8 | bits per character | 2 | 0 | 1 | 0 | 1 |"
    others = "SEDD, table 2"  # its rows share no run with those above
    order = (finished / "order-smoke.md").read_text()
    assert cells in order
    assert others not in order
    assert order == order_table("smoke", finished, seeds=3), "there is one seed"
    record = before["smoke/text8/md4/records/test.json"]
    assert record["seed"] == 0
    assert record["versions"]["torch"]
    assert record["hardware"]
    assert "| sedd eval perplexity smoke/text8/md4 smoke/data/text8.test.txt --draws 2 " in markdown
    assert str(finished) not in markdown + (finished / f"{RECIPE}-smoke.html").read_text(), "a folder of this machine"

    assert main([*WORDS, "--out", str(finished)]) == 0
    assert records(finished) == before, "finished jobs run again"
    assert "4 of 4 jobs are finished" in (finished / "log.txt").read_text().replace(log, "")


def test_the_page_has_it_all_and_needs_no_network(finished: Path) -> None:
    page = (finished / f"{RECIPE}-smoke.html").read_text()
    text = html.unescape(page)
    markdown = (finished / f"{RECIPE}-smoke.md").read_text()
    for cell in re.findall(r"\| ([^|]+?) (?=\|)", markdown.partition("## How")[0]):
        assert cell == "---" or f">{html.escape(cell)}</t" in page or f">{cell}</t" in text, cell
    assert "Not separated: GenMD4 before MD4." in text
    assert "(1) learned powers are of each token in this package." in text
    for run in ("md4", "genmd4"):
        assert f"<dd>sedd eval perplexity smoke/text8/{run} smoke/data/text8.test.txt --draws 2 " in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"<(script|link|img|iframe)|https?://|@import|url\(", page)
    assert "--accent: #1f77b4" in page, "the style of sedd report"


def test_a_stop_in_the_middle_of_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the second run; the same command then ends with the same figures, without doing the first run again."""
    count, step = 0, TrainState.train_step

    def interrupted(self: TrainState) -> Any:
        nonlocal count
        count += 1
        if count == 6:  # each run takes 4
            time.sleep(3)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "train_step", interrupted)
        assert main([*WORDS, "--out", str(tmp_path)]) == 128 + signal.SIGINT
    assert "stopped in text8/genmd4; the same command continues" in (tmp_path / "log.txt").read_text()
    before = records(tmp_path)
    assert sorted(before) == [f"smoke/text8/md4/records/{name}.json" for name in ("test", "train")]
    assert "| GenMD4 | not finished |" in (tmp_path / f"{RECIPE}-smoke.md").read_text()

    taken = []
    monkeypatch.setattr(TrainState, "train_step", lambda self: (taken.append(self.step), step(self))[1])
    assert main([*WORDS, "--out", str(tmp_path)]) == 0
    assert taken == [2, 3]
    after = records(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after["smoke/text8/genmd4/records/train.json"]["seconds"] > 3, "those of the first process are missing"
    for run in ("md4", "genmd4"):
        texts = [
            json.loads((out / "smoke" / "text8" / run / "eval" / "test.json").read_text())["texts"]
            for out in (finished, tmp_path)
        ]
        assert texts[0] == texts[1]


def test_a_stop_in_the_middle_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    do = reproduce._do

    def interrupted(job: Job) -> int:
        if job.name == JOBS[1]:
            raise KeyboardInterrupt
        return do(job)

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "_do", interrupted)
        assert main([*WORDS, "--out", str(tmp_path)]) == 130
    done = []
    monkeypatch.setattr(reproduce, "_do", lambda job: (done.append(job.name), do(job))[1])
    assert main([*WORDS, "--out", str(tmp_path)]) == 0
    assert done == JOBS[1:]


def test_a_job_that_fails_stops_only_those_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    def fail(job: Job) -> int:
        if job.name == "text8/md4":
            raise RuntimeError("the loss\nis NaN")
        if job.command == "train":
            shutil.copytree(finished / "smoke/text8/genmd4/checkpoints", job.folder / "checkpoints")
        job.results.parent.mkdir(parents=True, exist_ok=True)
        job.results.write_text((finished / "smoke/text8/genmd4/eval/test.json").read_text())
        return 0

    monkeypatch.setattr(reproduce, "_do", fail)
    assert main([*WORDS, "--out", str(tmp_path)]) == 1
    assert sorted(records(tmp_path)) == [f"smoke/text8/genmd4/records/{name}.json" for name in ("test", "train")]
    markdown = (tmp_path / f"{RECIPE}-smoke.md").read_text()
    assert "| MD4 | (1) | 1.37 |" in markdown
    assert "\n(1) failed: needs text8/md4, which failed.\n" in markdown
    assert "text8/md4 failed: the loss is NaN" in (tmp_path / "log.txt").read_text()


def test_an_error_of_a_library_stops_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    class DamagedError(Exception):
        """Is none of Python's own kinds."""

    def fail(job: Job) -> int:
        raise DamagedError("damaged")

    monkeypatch.setattr(reproduce, "_do", fail)
    assert main([*WORDS, "--out", str(tmp_path)]) == 1
    log = (tmp_path / "log.txt").read_text()
    assert "text8/md4 failed: damaged" in log
    assert "text8/genmd4 failed: damaged" in log


def test_other_options_need_another_folder(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished / "smoke/text8/md4/records/train.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"steps": 4', '"steps": 5'))
        assert main([*WORDS, "--out", str(finished)]) == 2
        assert "--out: expected results of the same options and files in" in capsys.readouterr().err
    finally:
        path.write_text(text)


def test_other_files_need_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text is cut into parts once, so that another text would go unnoticed."""
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, letter in zip(texts, "ab", strict=True):
        path.write_text(f"{letter} " * 2000)
    words = ["reproduce", RECIPE, "--scale", "small", "--commands", "--out", str(tmp_path / "out")]
    assert main([*words, "--data", f"text8={texts[0]}"]) == 0
    texts[0].rename(tmp_path / "moved.txt")
    assert main([*words, "--data", f"text8={tmp_path}/moved.txt"]) == 0, "the name does not matter"
    assert main([*words, "--data", f"text8={texts[1]}"]) == 2
    assert "--data: text8: expected the file of the results in" in capsys.readouterr().err
    assert set((tmp_path / "out/small/data/text8.train.txt").read_text().split()) == {"a"}


def test_results_are_those_of_the_present_training(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished / "smoke/text8/md4/records/train.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(text), "started": "2030-01-01 00:00:00"}))
        assert main([*WORDS, "--out", str(finished)]) == 2
        error = re.sub(r"\s+", " ", capsys.readouterr().err)
        assert "--out: expected results of the training of text8/md4 that began at 2030-01-01 00:00:00" in error
    finally:
        path.write_text(text)


def test_a_run_is_not_continued_with_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same recipe with the settings of another version; how a step is divided may change."""
    job = next(iter(made(tmp_path, "smoke", RECIPE).jobs.values()))
    monkeypatch.setattr(reproduce.train, "COMMAND", SimpleNamespace(run=lambda **given: given["resume"]))
    config = job.folder / "config.json"
    config.parent.mkdir(parents=True)
    for changes, refused in (
        ({}, ""),
        ({"batch_size": 2, "accumulate": 2}, ""),
        ({"batch_size": 2}, "expected a run with sequences of a step = 4 in .*, got 2"),
        ({"steps": 5}, "expected a run with steps = 4 in .*, got 5"),
        ({"lr": 0.5}, "expected a run with lr = 0.002 in .*, got 0.5"),
    ):
        config.write_text(json.dumps({**reproduce.check_job(job).to_dict(), **changes}))
        with pytest.raises(ValueError, match=refused) if refused else nullcontext():
            assert reproduce._do(job)


def test_results_without_the_value_are_no_figure(finished: Path) -> None:
    """Those of an older version: the page says so, and the other cells have their figures."""
    path = finished / "smoke/text8/md4/eval/test.json"
    text = path.read_text()
    try:
        path.write_text(text.replace('"bits_per_byte"', '"bits_per_word"'))
        table = order_table("smoke", finished, seeds=1)
    finally:
        path.write_text(text)
    assert "| bits per character | 2 | 0 | 0 | 0 | 2 |" in table


def test_a_results_file_that_is_gone(finished: Path) -> None:
    """Its job is done again, and other recipes are not stopped."""
    path = finished / "smoke/text8/md4/eval/test.json"
    text = path.read_text()
    try:
        path.unlink()
        assert "| bits per character | 2 | 0 | 0 | 0 | 2 |" in order_table("smoke", finished, seeds=1)
        assert main([*WORDS, "--out", str(finished)]) == 0
        assert json.loads(path.read_text())["texts"] == json.loads(text)["texts"]
    finally:
        path.write_text(text)


def test_each_model_is_trained_once(tmp_path: Path) -> None:
    """At the scale full, where it takes days."""
    jobs: dict[str, dict[str, Any]] = {}
    for name in recipe_names():
        for job in made(tmp_path, "full", name).jobs.values():
            if job.command == "train":
                jobs[job.name] = {key: value for key, value in job.options.items() if key != "run_dir"}
    different = [json.dumps(options, sort_keys=True) for options in jobs.values()]
    assert [name for name, options in zip(jobs, different, strict=True) if different.count(options) > 1] == []


def test_seeds_have_folders_of_their_own(tmp_path: Path) -> None:
    """Also where the recipe has a row with another seed."""
    for name in recipe_names():
        plan = made(tmp_path, "small", name, seeds=3)
        trainings = [job for job in plan.jobs.values() if job.command == "train"]
        different = [{key: value for key, value in job.options.items() if key != "run_dir"} for job in trainings]
        assert all(different.count(options) == 1 for options in different), name


def test_commands_that_a_cluster_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed commands give the results that a later call finds."""
    assert main([*WORDS, "--out", str(tmp_path), "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(JOBS)
    for line in lines:
        if "md4" in line and "genmd4" not in line:
            assert main(shlex.split(line.removeprefix(f"{program()} "))) == 0
    assert main([*WORDS, "--out", str(tmp_path)]) == 0
    steps = [json.loads(line) for line in (tmp_path / "smoke/text8/md4/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3, 4], "a run of the cluster is not trained again"


# -- data --------------------------------------------------------------------------------------------------------------


def test_parts_of_a_text(tmp_path: Path) -> None:
    """Those of the papers for text8, which has no lines; else whole lines."""
    (tmp_path / "text8").write_text("abcdefghij" * 20)
    words = ["reproduce", RECIPE, "--out", str(tmp_path / "out"), "--commands"]
    assert main([*words, "--data", f"text8={tmp_path / 'text8'}"]) == 0
    parts = [(tmp_path / "out/small/data" / f"text8.{part}.txt").read_text() for part in ("train", "valid", "test")]
    assert "".join(parts) == (tmp_path / "text8").read_text()
    assert [len(part) for part in parts] == [180, 10, 10]
    content = b"".join(b"line %d\n" % i for i in range(100))
    for share in (0.9, 0.95):
        cut = reproduce._cut(content, share)
        assert content[cut - 1 : cut] == b"\n"
        assert 0 <= cut - share * len(content) <= 8
    assert (reproduce._cut(content, 0.0), reproduce._cut(content, 1.0)) == (0, len(content))


def test_a_folder_whose_content_has_changed(tmp_path: Path) -> None:
    folder, known = tmp_path / "texts", tmp_path / "out/files.json"
    (folder / "more").mkdir(parents=True)
    (folder / "more/a.txt").write_text("a text")
    reproduce._check_same({"wikitext": folder}, known)
    reproduce._check_same({"wikitext": folder}, known)
    for change in (lambda: (folder / "b.txt").write_text(""), lambda: (folder / "more/a.txt").write_text("a test")):
        change()
        with pytest.raises(ValueError, match=r"data: wikitext: expected the file of the results in .*another content"):
            reproduce._check_same({"wikitext": folder}, known)
        known.unlink()
        reproduce._check_same({"wikitext": folder}, known)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sedd-tabel2", "recipe: expected one of list, .*; got 'sedd-tabel2'; did you mean 'sedd-table2'"),
        ("sedd-table2 --scale smal", "--scale: expected one of full, small, smoke; got 'smal'; did you mean 'small'"),
        ("sedd-table2 --data text9=x", "--data: expected one of text8; got 'text9'; did you mean 'text8'"),
        ("sedd-table2 --data text8", "--data: expected NAME=FILE, got 'text8'"),
        ("sedd-table2 --data text8=nowhere", "--data: text8: no such file: nowhere"),
        ("sedd-table2", "recipe: no row of sedd-table2 can run at scale small: .*needs --data text8=FILE"),
        ("sedd-table4 --scale full", "recipe: no row of sedd-table4 can run at scale full: .*four texts"),
        ("sedd-table2 --seeds 0", "--seeds: expected at least 1, got 0"),
    ],
)
def test_mistakes(words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *words.split(), "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, here in ((0, "small, smoke"), (8, "small, smoke")):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert main(["reproduce", "list"]) == 0
        out = capsys.readouterr().out
        for name in recipe_names():
            assert f"│ {name} " in out
        (line,) = [line for line in out.splitlines() if line.startswith("│ sedd-table2 ")]
        cells = [cell.strip() for cell in line.split("│")]
        assert cells[2:4] == ["SEDD, table 2", "Bits per character on"]
        assert cells[4:6] == ["11", here[: len(cells[5])]]
        assert cells[-2] == "text8"
    assert "text8: text of a-z and space" in out


def test_the_fields_of_a_run_are_known() -> None:
    """A typo in a setting is noticed where it is read."""
    with pytest.raises(ValueError, match=r"runs.x: expected one of train, model, minutes, out_of_reach; got 'trian'"):
        sedd.recipes._only({"trian": {}}, "runs.x", [field.name for field in dataclasses.fields(sedd.recipes.RunSpec)])
