"""Fixtures that the tests of the operators share. What they compare with is in explicit.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from explicit import PROCESSES, selected_isa
from hypothesis import settings

from sedd_ext import _C, RankOne

settings.register_profile("sedd_ext", deadline=None, print_blob=True)
settings.load_profile("sedd_ext")


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


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every set of kernels that this machine runs in turn: they are compiled apart and differ in their loops."""
    with selected_isa(request.param):
        yield request.param
