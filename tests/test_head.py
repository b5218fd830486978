"""The tiles of a fused head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from sedd_ext.head import Head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 27, 2048, 2049, 50258])
@pytest.mark.parametrize("whole_rows", [True, False])
def test_rows_of_a_tile_start_at_cache_lines(dtype: torch.dtype, n: int, whole_rows: bool) -> None:
    hidden, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 2), (n, 2), (n,)))
    for tile in Head(hidden, weight, bias, 1 << 20, whole_rows).tiles():
        log_score = tile.log_score
        assert log_score.data_ptr() % 64 == 0
        assert log_score.stride(0) * dtype.itemsize % 64 == 0
        assert tile.arguments(n)["stride"] == log_score.stride(0)
        torch.testing.assert_close(log_score, F.linear(tile.hidden, tile.weight, tile.bias))
