"""The compiled kernels (csrc/bindings.cpp). Addresses are those of contiguous tensors; results are (fault, row).

With CUDA (csrc/cuda/bindings.cpp) there are also NAME_cuda, with the workspace's address, the stream and the device in
place of the threads, which gives back None or the runtime's error, and NAME_workspace(rows, dim, dtype) in bytes.
"""

__version__: str
cuda: str
compiler: str
least_noise: float
reverse_draw_numbers: int
score_entropy_sweep_numbers: int

_Status = tuple[int, int]

def score_entropy(
    log_score: int,
    x_t: int,
    x_0: int,
    sigma: int,
    shift: int,
    stationary: int,
    grad_loss: int,
    out: int,
    neg_entropy: float,
    rows: int,
    dim: int,
    dtype: int,
    family: int,
    threads: int,
    /,
) -> _Status: ...

score_entropy_backward = score_entropy

def score_entropy_tile(
    log_score: int,
    x_t: int,
    x_0: int,
    sigma: int,
    shift: int,
    stationary: int,
    grad_loss: int,
    sweeps: int,
    out: int,
    neg_entropy: float,
    rows: int,
    width: int,
    first: int,
    dim: int,
    dtype: int,
    family: int,
    threads: int,
    /,
) -> _Status: ...
def transition_column(
    x: int,
    sigma: int,
    stationary: int,
    cumulative: int,
    out: int,
    seed: int,  # an address too
    rows: int,
    dim: int,
    dtype: int,
    family: int,
    threads: int,
    /,
) -> _Status: ...

transition_row = transition_column
sample_transition = transition_column

def reverse_probs(
    log_score: int,
    x_t: int,
    step: int,
    shift: int,
    stationary: int,
    out: int,
    seed: int,  # an address too
    rows: int,
    dim: int,
    forbidden: int,
    dtype: int,
    family: int,
    kind: int,
    threads: int,
    /,
) -> _Status: ...

reverse_sample = reverse_probs

def reverse_tile(
    log_score: int,
    x_t: int,
    step: int,
    shift: int,
    stationary: int,
    draws: int,
    out: int,
    seed: int,  # an address too
    places: int,
    rows: int,
    width: int,
    first: int,
    dim: int,
    forbidden: int,
    dtype: int,
    family: int,
    kind: int,
    sweep: int,
    threads: int,
    /,
) -> _Status: ...
def advise_huge_pages(address: int, bytes: int, /) -> None: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa(name: str, /) -> None: ...
