"""What surrounds a CUDA launch, without a GPU: the current device, the stream, and where outputs start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sedd_ext import _dispatch
from sedd_ext.reverse import _probs_fake
from sedd_ext.score_entropy import Arguments, _gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("current", [0, 1])
def test_torch_changes_the_device_where_the_tensors_are_on_another(
    monkeypatch: pytest.MonkeyPatch, current: int
) -> None:
    """torch puts it back without a context on a device that has none, which the CUDA runtime cannot."""
    devices = [current]

    @contextmanager
    def device(index: int) -> Iterator[None]:
        devices.append(index)
        yield
        devices.append(current)

    def launched(arguments: dict[str, Any]) -> None:
        assert (arguments["first"], arguments["stream"], arguments["device"]) == (7, 101, 1)
        assert devices[-1] == 1

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: devices[-1])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
    kernels = SimpleNamespace(sum_workspace=lambda arguments: 8, sum_cuda=launched)
    out = SimpleNamespace(device=torch.device("cuda", 1), new_empty=torch.empty)
    assert _dispatch.launch_cuda("sum", {"first": 7, "out": out}, kernels) == (0, -1)
    assert devices == ([1] if current == 1 else [0, 1, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_start_where_vectors_can_be_written(dtype: torch.dtype) -> None:
    """Where a vector of 16 bytes of the input starts, one of the output's starts too."""
    memory = torch.empty(32, dtype=dtype, device="meta")
    for offset in range(17):
        log_score = memory[offset : offset + 15].view(3, 5)
        first = -offset % (16 // dtype.itemsize)
        arguments = Arguments(log_score, *[memory] * 3, None, None, "uniform", 0.0)
        for out in (_gradient(arguments), _probs_fake(log_score)):
            assert out.shape == log_score.shape
            assert out.is_contiguous()
            assert (out.storage_offset() + first) * out.dtype.itemsize % 16 == 0
    strided = memory[1:31].view(3, 10)[:, :5]  # is copied, to a boundary
    assert _probs_fake(strided).storage_offset() == 0
