"""Fixtures, markers and helpers of the tests do what their names say; ``breaks.py`` breaks them on purpose."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import breaks
import pytest
import torch
from backends import BACKENDS, SCHEDULES, Backend, running_on
from breaks import BREAKS, Break
from conftest import ROOT
from cuda_on_cpu.mutants import FAMILIES, MUTANTS, Mutant
from explicit import PROCESSES, random_log_score, random_rows
from torch import Tensor

from sedd_ext import (
    _C,
    Absorbing,
    Euler,
    RankOne,
    _dispatch,
    linear_score_entropy_loss,
    reverse_probs,
    score_entropy_loss,
)


def collected(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("everything", [False, True], ids=["by default", "--all"])
def test_every_case_runs_under_one_schedule_or_under_all(everything: bool) -> None:
    listing = collected("tests/test_transition.py", "-k", "against_reference", *["--all"] * everything)
    cases = Counter(re.findall(r"^\S+reference\[.*emulated.*\]$", re.sub("emulated-[a-z]+", "emulated", listing), re.M))
    assert len(cases) == len(PROCESSES) * 2 * 2 * 5
    assert set(cases.values()) == {len(SCHEDULES) if everything else 1}
    for schedule in SCHEDULES:
        assert listing.count(f"emulated-{schedule}") >= len(cases) // 8
    for backend in BACKENDS["cpu"]:
        assert listing.count(f"-{backend}-") == len(cases)


def test_a_costly_test_runs_where_its_sources_have_changed(pytester: pytest.Pytester) -> None:
    for name in ("conftest.py", "backends.py", "explicit.py"):
        pytester.makepyfile(
            **{f"tests/{name.removesuffix('.py')}": (ROOT / "tests" / name).read_text(encoding="utf-8")}
        )
    pytester.mkdir("source")
    (pytester.path / "source" / "file.txt").write_text("1")
    (pytester.path / "tests" / "passed.json").write_text("{}")
    (pytester.path / "tests" / "cuda_on_cpu").symlink_to(ROOT / "tests" / "cuda_on_cpu")
    pytester.makepyfile(**{"tests/test_it": "import pytest\n@pytest.mark.costly('source')\ndef test_it(): pass\n"})
    pytester.makeini("[pytest]\n")

    def outcomes(*arguments: str) -> dict[str, int]:
        return pytester.runpytest_subprocess("tests/test_it.py", *arguments).parseoutcomes()

    assert outcomes() == {"passed": 1}
    assert outcomes("--record") == {"passed": 1}
    assert list(json.loads((pytester.path / "tests" / "passed.json").read_text())) == ["tests/test_it.py::test_it"]
    assert outcomes() == {"skipped": 1}
    assert outcomes("--all") == {"passed": 1}
    (pytester.path / "source" / "file.txt").write_text("2")
    assert outcomes() == {"passed": 1}


def test_a_process_is_what_its_name_says(process_of: Callable[[int], RankOne], request: pytest.FixtureRequest) -> None:
    process = process_of(7)
    pi = process.stationary
    expected = {
        "absorbing": process.family == "absorbing" and pi[-1] == 1,
        "uniform": process.family == "uniform" and bool((pi == pi[0]).all()),
        "hybrid": process.family == "rank_one" and process.mask_id == 6 and 0 < pi[0] < pi[-1] < 1,
        "vector": process.family == "rank_one" and process.mask_id is None and len(pi.unique()) == 7,
        "vector_with_zeros": process.family == "rank_one" and bool((pi == 0).any()),
    }
    assert set(expected) == set(PROCESSES)
    assert expected[request.node.callspec.params["process_of"]]


def test_threads_reach_the_kernels(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, process_of: Callable[[int], RankOne]
) -> None:
    seen = []

    def score_entropy(arguments: dict[str, Any]) -> tuple[int, int]:
        seen.append(arguments["threads"])
        return 0, -1

    monkeypatch.setattr(
        _dispatch, "_C", SimpleNamespace(score_entropy=score_entropy, advise_huge_pages=lambda *_: None)
    )
    for count in (1, 2, 3):
        threads(count)
        score_entropy_loss(torch.zeros(3, 7), *random_rows(process_of(7), 3), process_of(7))
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_random_log_scores_have_the_dtype(dtype: torch.dtype) -> None:
    assert random_log_score((3, 7), dtype).dtype == dtype


def test_instruction_sets_have_kernels_of_their_own() -> None:
    """They add up in different orders, and so differ in some last bits of many rows."""
    process, n = Absorbing(999), 1000
    log_score, x = random_log_score((200, n), torch.float32), torch.full((200,), n - 1)
    hidden, weight = random_log_score((200, 4), torch.float32, seed=5), random_log_score((n, 4), torch.float32, seed=6)

    def results(backend: Backend) -> dict[str, Tensor]:
        with running_on(backend):
            assert _C.isa() == backend.variant
            leaf = log_score.clone().requires_grad_()
            loss = score_entropy_loss(leaf, x, x - 1, 0.5, process)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            tile = linear_score_entropy_loss(hidden, weight, None, x, x - 1, 0.5, process)
            return {
                "loss": loss.detach(),
                "gradient": gradient,
                "tile": tile,
                "probs": reverse_probs(log_score, x, Euler(0.5), process),
            }

    all_results = {backend: results(backend) for backend in BACKENDS["cpu"]}
    for one, mine in all_results.items():
        for other, theirs in all_results.items():
            for name in mine:
                if name == "gradient" and {one.variant, other.variant} == {"avx2", "avx512"}:
                    continue  # no sum, and the same operations
                same = torch.equal(mine[name], theirs[name])
                assert same == (one == other), f"{name} of {one} and {other}"


def test_every_mutant_is_tried() -> None:
    """The sanitizers' tests of the mutants go through the families."""
    assert {mutant.family for mutant in MUTANTS} == set(FAMILIES)


def test_mistakes_can_still_be_made() -> None:
    """Code that moves on leaves them behind: the text that each replaces is in its file once."""
    files: list[tuple[Break | Mutant, str]] = [(mistake, mistake.file) for mistake in BREAKS]
    files += [(mutant, f"csrc/cuda/{mutant.file}") for mutant in MUTANTS]
    counts = {mistake.name: (ROOT / file).read_text("utf-8").count(mistake.text) for mistake, file in files}
    assert {name: count for name, count in counts.items() if count != 1} == {}


def test_tests_that_fail_anyway_notice_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaks, "red", lambda tests, folder: "tests/test_it.py::test_it")
    with pytest.raises(RuntimeError, match="expected to pass before anything is broken, got a failure of tests/t"):
        breaks.main([BREAKS[0].name])
