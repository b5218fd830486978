"""What the benchmarks share: the shapes, their inputs, who competes, and how torch.compile is called."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from sedd.diffusion import Diffusion, ScoreEntropy, get_schedule
from sedd.hub import SEDD
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform

# GPT-2's vocabulary with MASK, and text8's 27 symbols. At the large one 512 rows of float32 are 103 MB, about what a
# last-level cache may hold a good part of, and 4,096 rows are 823 MB, which none holds.
LARGE, SMALL = 50_258, 27
CACHED_ROWS, BEYOND_ROWS = 512, 4096
SMALL_ROWS = 65_536
FEW_ROWS = ((SMALL, 1), (SMALL, 8), (SMALL, 128), (LARGE, 1))
LINEAR_ELEMENTS, LINEAR_N = 2**24, 8192
LINEAR_ROWS = (1, 16, 256, 4096, 65_536)
SEQUENCE = 256  # rows that share σ̄, as the positions of a sequence do

FORWARD, BACKWARD = "score entropy forward", "score entropy backward, existing buffer"
AUTOGRAD, BOTH = "score entropy backward, autograd", "score entropy forward + backward, autograd"
COLUMN, ROW, SAMPLE = "transition column", "transition row", "transition sample"
TWEEDIE, EULER = "tweedie sample", "euler sample"
MEAN_TWEEDIE, MEAN_EULER = "tweedie sample, mean prediction", "euler sample, mean prediction"
UNMASK, UNMASK_NUCLEUS = "unmask", "unmask, top_p = 0.9"
HEADS = (256, 768)  # widths of the hidden states before a fused head
HEAD_BENCH_ROWS = 512
HEAD_ROWS = (1024, 4096, 16_384)

PEERS = ("dense", "compiled", "released")
PROCESSES: dict[str, Callable[[int], RankOne]] = {
    "absorbing": lambda n: Absorbing(n - 1),
    "uniform": Uniform,
    "hybrid": lambda n: Hybrid(n - 1, 0.1),
}

Run = Callable[[], object]


def fused_loss(d: int) -> str:
    """The name of the operation: head and score entropy, forward and backward."""
    return f"head (d = {d}) + score entropy, forward + backward"


MODELS: dict[str, tuple[int, int, int]] = {"tiny": (128, 4, 2), "d = 256": (256, 4, 4), "small": (768, 12, 12)}
"""Width, blocks and heads of the models whose whole steps are timed, on 8 sequences of 128 tokens."""
MODEL_BATCH, MODEL_LENGTH = 8, 128


def training(model: str) -> str:
    """The name of the operation: forward, backward and AdamW."""
    return f"training step ({model})"


def sampling(model: str) -> str:
    """The name of the operation: some reverse steps and the denoising one."""
    return f"sampling ({model})"


def whole_model(name: str, case: Case) -> tuple[SEDD, Diffusion]:
    """A network for GPT-2's tokens, as it is before training, and the model around it; for a smoke run, a tiny one.

    Its hidden states come through torch.compile where the contestant is the kernel, compiled.
    """
    sizes = (16, 1, 2, SMALL) if case.smoke else (*MODELS[name], LARGE)
    network, diffusion = _whole_model(*sizes, case.device)
    vars(network).pop("hidden", None)  # the last contestant's
    if case.contestant == "kernel, compiled":
        network.hidden = compiled(network.hidden, case)  # type: ignore[method-assign]
    return network, diffusion


@functools.lru_cache(maxsize=1)
def _whole_model(width: int, blocks: int, heads: int, n: int, device: str) -> tuple[SEDD, Diffusion]:
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=width, n_blocks=blocks, n_heads=heads, length=MODEL_LENGTH, dropout=0.0)
    network = SEDD(config, Absorbing(n - 1)).to(device)
    schedule = get_schedule("loglinear")
    return network, Diffusion(network, network.process, schedule, ScoreEntropy(), network.parameterization)


def model_cases(*contestants: str) -> list[tuple[str, Case]]:
    """(model, case): all models in float32, the middle one in bfloat16 too; torch.compile for the middle one."""
    rows = MODEL_BATCH * MODEL_LENGTH
    chosen = [(name, "float32") for name in MODELS] + [("d = 256", "bfloat16")]
    return [
        (name, Case("absorbing", LARGE, rows, dtype, who, whole=True))
        for name, dtype in chosen
        for who in contestants
        if name == "d = 256" or "compiled" not in who
    ]


def fused_sample(d: int) -> str:
    """The name of the operation: head and Tweedie step."""
    return f"head (d = {d}) + tweedie sample"


@dataclass(frozen=True)
class Case:
    """One contestant on one shape: the kernel, a peer (released, dense, compiled), or the limit."""

    process: str
    n: int
    rows: int
    dtype: str
    contestant: str
    smoke: bool = False
    device: str = "cpu"
    whole: bool = False  # a program rather than an operation: no limit, and no other process or dtype, to run against
    one_thread: bool = False

    def __str__(self) -> str:
        thread = "-one_thread" if self.one_thread else ""
        return f"{self.process}-{self.rows}x{self.n}-{self.dtype}-{self.contestant}{thread}"

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the log-scores."""
        return torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()

    @property
    def inputs(self) -> Inputs:
        return _inputs(self.process, self.n, self.rows, self.dtype, self.device)


def operator_cases(peers: Sequence[str] = (), *, beyond: bool = True) -> list[Case]:
    """The shapes of an operation over [rows, N], those beyond the cache too if wanted, and who competes on each."""
    result = []
    for n, rows in ((SMALL, SMALL_ROWS), (LARGE, CACHED_ROWS)):
        for process in ("absorbing", "uniform"):
            result += [Case(process, n, rows, "float32", who) for who in ("kernel", "limit", *peers)]
        result += [Case("hybrid", n, rows, "float32", who) for who in ("kernel", "limit")]
        result += [Case("absorbing", n, rows, "bfloat16", who) for who in ("kernel", "limit")]
    processes = (
        ("absorbing", "float32"),
        ("absorbing", "bfloat16"),
        ("uniform", "float32"),
        ("uniform", "bfloat16"),
        ("hybrid", "float32"),
    )
    for process, dtype in processes if beyond else ():
        result += [Case(process, LARGE, BEYOND_ROWS, dtype, who) for who in ("kernel", "limit")]
    eager = [peer for peer in peers if peer != "compiled"]
    if eager:
        result += [Case("absorbing", n, rows, "float32", who) for n, rows in FEW_ROWS for who in ("kernel", *eager)]
    return result


def linear_cases() -> list[Case]:
    """The kernel alone, on one thread and on all: N from 27 to 2^18 at as many elements, and 1 to 65,536 rows."""
    sizes = [(n, LINEAR_ELEMENTS // n) for n in (SMALL, 128, 512, 2048, LARGE, 32_000, 128_000, 2**18)]
    sizes += [(LINEAR_N, rows) for rows in LINEAR_ROWS]
    return [
        Case("absorbing", n, rows, "float32", "kernel", one_thread=one_thread)
        for n, rows in sizes
        for one_thread in (False, True)
    ]


def memory_cases() -> list[tuple[str, Case]]:
    """(model, case) of the programs whose peak memory is measured."""
    rows = MODEL_BATCH * MODEL_LENGTH
    return [
        (name, Case("absorbing", LARGE, rows, "float32", who, whole=True))
        for name in MODELS
        for who in ("kernel", "unfused", "released")
    ]


def smaller(case: Case) -> Case:
    """For a smoke run."""
    return dataclasses.replace(case, rows=min(case.rows, 2), smoke=True)


class Race(Protocol):
    """The ``race`` fixture of conftest.py."""

    def __call__(
        self, operation: str, case: Case, build: Callable[[Case], Run], bytes_moved: int, group: str | None = None
    ) -> None: ...


@dataclass(frozen=True)
class Inputs:
    """Tokens, σ̄, log-scores [rows, N] whose entry x_t is 0, and a reverse step at which half of the rows move."""

    process: RankOne
    x_t: Tensor
    x_0: Tensor
    sigma: Tensor
    step: dict[str, Tensor]
    dtype: torch.dtype

    @functools.cached_property
    def log_score(self) -> Tensor:
        rows, n, device = len(self.x_t), self.process.dim, self.x_t.device
        # Scores that add up to about 1 beside a MASK, and to about N where all tokens are alike. A block of rows is
        # repeated: making 823 MB of random numbers takes longer than what is measured on them.
        block = torch.randn(min(rows, 16), n, generator=torch.Generator().manual_seed(1)) - 0.5
        if self.process.family != "uniform":
            block -= torch.tensor(float(n)).log()
        log_score = block.to(device, self.dtype).repeat(-(-rows // len(block)), 1)[:rows]
        log_score[torch.arange(rows, device=device), self.x_t] = 0
        return log_score.contiguous()


# Four (3.3 GB at 4,096 rows): a case, and the absorbing and float32 ones that it is compared with.
@functools.lru_cache(maxsize=4)
def _inputs(process_name: str, n: int, rows: int, dtype: str, device: str) -> Inputs:
    process, generator = PROCESSES[process_name](n), torch.Generator().manual_seed(0)
    x_0 = torch.randint(n - 1, (rows,), generator=generator)
    x_t = torch.randint(n, (rows,), generator=generator) if process_name == "uniform" else torch.full((rows,), n - 1)
    sigma = 0.1 + 2.9 * torch.rand(-(-rows // SEQUENCE), generator=generator)
    sigma = sigma.repeat_interleave(SEQUENCE)[:rows].contiguous()
    step = {"tweedie": torch.full((rows,), 2.0).log().to(device), "euler": torch.full((rows,), 0.5, device=device)}
    return Inputs(process, x_t.to(device), x_0.to(device), sigma.to(device), step, getattr(torch, dtype))


def plain_read(x: Tensor) -> Run:
    """The limit of what reads once: torch's fastest reduction. bfloat16 is summed as half as many float32."""
    flat = x.view(-1)
    if flat.element_size() == 2 and flat.numel() % 2 == 0:
        flat = flat.view(torch.float32)
    return lambda: flat.sum()


def compiled(function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """``function`` under torch.compile for this one shape; a smoke run looks only whether it can be traced."""
    torch._dynamo.reset()
    if case.smoke:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile needs a C++ compiler, and none is on PATH")
    return torch.compile(function, fullgraph=True, dynamic=False)
