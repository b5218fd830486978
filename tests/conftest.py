"""Fixtures that the tests of the operators share: the rest is in explicit.py (references) and backends.py (devices)."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import backends
import pytest
import torch
from backends import BACKENDS, SCHEDULES, Backend, running_on
from explicit import PROCESSES
from hypothesis import settings

from sedd_ext import RankOne

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # for peers.py
RECORD = ROOT / "tests" / "passed.json"
"""The sources for which each costly test has passed, as a hash."""
MADE = re.compile(r"__pycache__|\.so$")
"""Files among the sources that are made from them."""

settings.register_profile("sedd_ext", deadline=None, print_blob=True)
settings.load_profile("sedd_ext")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=list(BACKENDS),
        help="where the operators' tests run; may be given more than once (default: wherever they can)",
    )
    parser.addoption(
        "--all",
        action="store_true",
        help="run every case under every schedule of the emulation, and costly tests whose sources have not changed",
    )
    parser.addoption(
        "--record", action="store_true", help=f"note in {RECORD.name} for which sources the costly tests passed"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operators(*kinds): runs once on every backend, or on those kinds alone")
    config.addinivalue_line("markers", "every_variant: runs on every instruction set and schedule of every backend")
    config.addinivalue_line(
        "markers", "costly(*paths): runs where the files of these paths have changed since it passed"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # the test's own before its class's and module's
    marks = {mark.name: mark for mark in reversed(list(metafunc.definition.iter_markers()))}
    if "operators" not in marks:
        return
    wanted = [kind for kind in metafunc.config.getoption("--backend") or BACKENDS if BACKENDS[kind]]
    kinds = [BACKENDS[kind] for kind in wanted if kind in (marks["operators"].args or BACKENDS)]
    if "every_variant" in marks:
        chosen = [backend for variants in kinds for backend in variants]
    else:
        # the CPU's best; of the emulation's schedules one or the other, as the test's name has it
        spread = zlib.crc32(metafunc.definition.name.encode())
        chosen = [variants[0] if variants[0].kind == "cpu" else variants[spread % len(variants)] for variants in kinds]
    metafunc.fixturenames.insert(0, "backend")  # parametrize() wants to see it; see run_on_backend
    metafunc.parametrize("backend", chosen, ids=str, indirect=True, scope="module")


# ---------------------------------------------------------------------------------------------- what need not run today


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what adds little: three of four schedules of a case, and costly tests of what has not changed."""
    everything, recorded = config.getoption("--all"), json.loads(RECORD.read_text())
    kept, left_out = [], []
    for item in items:
        if costly := item.get_closest_marker("costly"):
            digest = source_digest(
                [*costly.args, str(item.path.relative_to(ROOT)), "tests/backends.py", "tests/explicit.py"]
            )
            item.user_properties.append(("costly", digest))
            if not everything and not config.getoption("--record") and recorded.get(item.nodeid) == digest:
                reason = f"unchanged since it passed: {', '.join(costly.args)} (pytest --all runs it)"
                item.add_marker(pytest.mark.skip(reason=reason))
        (kept if everything or _is_its_turn(item) else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def _is_its_turn(item: pytest.Item) -> bool:
    """Whether a case runs under its schedule today: each case under one of the four, and each schedule on a quarter."""
    label = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if not isinstance(label, Backend) or label.kind != "emulated" or item.get_closest_marker("every_variant") is None:
        return True
    case = item.nodeid.replace(str(label), "")
    return zlib.crc32(case.encode()) % len(SCHEDULES) == SCHEDULES.index(label.variant)


def source_digest(paths: Sequence[str]) -> str:
    """A hash of the files of these paths, which are relative to the repository and may be folders or patterns."""
    files = {
        file
        for path in paths
        for found in ROOT.glob(path)
        for file in ([found] if found.is_file() else found.rglob("*"))
    }
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and not MADE.search(str(file))):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:20]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--record"):
        return
    recorded = json.loads(RECORD.read_text())
    for report in terminalreporter.stats.get("passed", []):
        for name, digest in report.user_properties:
            if name == "costly":
                recorded[report.nodeid] = digest
    RECORD.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")


# ----------------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Where the operators run."""
    with running_on(request.param) as backend:
        yield backend


@pytest.fixture(autouse=True)
def run_on_backend(request: pytest.FixtureRequest) -> None:
    """Runs every test that has a backend in its name there, whether or not the test asks for the fixture.

    pytest forgets the fixture that pytest_generate_tests adds to a test that does not have it among its arguments.
    """
    if "backend" in getattr(getattr(request.node, "callspec", None), "params", {}):
        request.getfixturevalue("backend")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Fails a test that has a backend in its name and did not run there."""
    label = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    told = backends.current
    backends.launches.clear()
    result = yield
    if label is not None:
        backends.check_launches(label, told)
    return result


@pytest.fixture(params=PROCESSES)
def process_of(request: pytest.FixtureRequest) -> Callable[[int], RankOne]:
    """Every kind of process in turn: a function from N to the process."""
    return PROCESSES[request.param]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone at the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
