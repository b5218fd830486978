"""Fixtures that the tests of the operators share: the rest is in explicit.py (references) and backends.py (devices)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterator

import backends
import pytest
import torch
from backends import BACKENDS, Backend, running_on
from explicit import PROCESSES
from hypothesis import settings

from sedd_ext import RankOne

settings.register_profile("sedd_ext", deadline=None, print_blob=True)
settings.load_profile("sedd_ext")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=list(BACKENDS),
        help="where the operators' tests run; may be given more than once (default: wherever they can)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operators(*kinds): runs once on every backend, or on those kinds alone")
    config.addinivalue_line("markers", "every_variant: runs on every instruction set and schedule of every backend")


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


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Where the operators run."""
    with running_on(request.param) as backend:
        yield backend


@pytest.fixture(autouse=True)
def run_on_backend(request: pytest.FixtureRequest) -> None:
    """Runs every test that has a backend in its name there, whether or not the test asks for the fixture.

    pytest drops the name again that pytest_generate_tests adds to the fixtures, and with it the fixture, from tests that
    do not have it among their arguments.
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
def process(request: pytest.FixtureRequest) -> Callable[[int], RankOne]:
    """Every kind of process in turn: a function from N to the process."""
    return PROCESSES[request.param]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone at the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
