"""The compiled kernels (csrc/bindings.cpp), and what Python must know of them.

A kernel takes a dict of its arguments by name: contiguous tensors (or their addresses, or None), numbers and codes. It
returns (fault, row), the code of a fault and the first bad row, or (0, -1). A missing, unknown or additional name is a
TypeError.

A build with CUDA (csrc/cuda/bindings.cpp) also has NAME_cuda(arguments), which takes the workspace, the stream and the
device in place of the threads and returns None or the error of the CUDA runtime, and NAME_workspace(arguments), the
size of the workspace in bytes.
"""

from typing import Any

__version__: str
cuda: str
"""Version of nvcc, or "" without CUDA kernels."""
compiler: str

least_noise: float
"""Smaller noise is a fault."""
mean_prediction_numbers: int
"""float64 numbers per row that ``mean_prediction`` keeps for ``mean_prediction_backward``."""
step_slack: float
"""How much longer than σ̄ a Tweedie step may be, relative to σ̄."""
reverse_draw_numbers: int
"""float64 numbers per row between two tiles of ``reverse_tile``."""
unmask_state_numbers: int
"""The same for ``unmask``."""
unmask_numbers: int
"""Statistics per row that ``unmask`` writes."""
mean_sums_numbers: int
"""float64 numbers per row that ``reverse_mean_choose`` takes from each process."""
score_entropy_sweep_numbers: int
"""The same for ``score_entropy_tile``."""
generalized_masked_row_numbers: int
"""float64 numbers per row that ``generalized_masked`` writes for its backward."""
mean_prediction_logits: int
"""float64 numbers per row that processes exchange after the stage ``logits`` of ``mean_prediction``."""
mean_prediction_sums: int
"""The same for its stage ``sums``."""
generalized_masked_sums: int
"""The same for the stage ``logits`` of ``generalized_masked``."""
sweep_again: int
"""The token of a row for which ``reverse_tile`` needs a second sweep."""

dtypes: dict[str, int]
families: dict[str, int]
steps: dict[str, int]
mean_steps: dict[str, int]
stages: dict[str, int]
faults: dict[str, int]
arguments: dict[str, tuple[str, ...]]
"""The names of each kernel's arguments; ``cuda_arguments`` are those of the CUDA kernels."""
cuda_arguments: dict[str, tuple[str, ...]]

_Status = tuple[int, int]

def mean_prediction(arguments: dict[str, Any], /) -> _Status: ...
def mean_prediction_backward(arguments: dict[str, Any], /) -> _Status: ...
def score_entropy(arguments: dict[str, Any], /) -> _Status: ...
def score_entropy_backward(arguments: dict[str, Any], /) -> _Status: ...
def score_entropy_tile(arguments: dict[str, Any], /) -> _Status: ...
def unmask(arguments: dict[str, Any], /) -> _Status: ...
def transition_column(arguments: dict[str, Any], /) -> _Status: ...
def transition_row(arguments: dict[str, Any], /) -> _Status: ...
def sample_transition(arguments: dict[str, Any], /) -> _Status: ...
def reverse_probs(arguments: dict[str, Any], /) -> _Status: ...
def reverse_sample(arguments: dict[str, Any], /) -> _Status: ...
def reverse_tile(arguments: dict[str, Any], /) -> _Status: ...
def reverse_choose(arguments: dict[str, Any], /) -> _Status: ...
def reverse_mean_probs(arguments: dict[str, Any], /) -> _Status: ...
def reverse_mean_sample(arguments: dict[str, Any], /) -> _Status: ...
def reverse_mean_choose(arguments: dict[str, Any], /) -> _Status: ...
def generalized_masked(arguments: dict[str, Any], /) -> _Status: ...
def generalized_masked_backward(arguments: dict[str, Any], /) -> _Status: ...
def generalized_masked_power(arguments: dict[str, Any], /) -> _Status: ...
def advise_huge_pages(address: int, bytes: int, /) -> None: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa(name: str, /) -> None: ...
