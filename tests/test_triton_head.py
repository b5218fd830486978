"""The prototype of the head's epilogue: accuracy under Triton's interpreter, or on a GPU; machine code without one.

The interpreter has to be chosen before triton is imported. It runs in a process of its own, so that torch.compile, in
other tests of this process, finds triton as it is.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_check import find_tool
from explicit import PROCESSES, Rows, largest_error, random_log_score, random_rows, term_scales
from test_linear_score_entropy import BOUND, Head, distance, plain, random_head, results
from torch import Tensor
from torch.utils import _pytree as pytree

import sedd_ext.linear_score_entropy as module
from sedd_ext import Absorbing, linear_score_entropy_loss, reference

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from sedd_ext import triton_head  # noqa: E402
from sedd_ext.triton_head import BLOCKS, Blocks, epilogue  # noqa: E402

SMALL = Blocks(16, 32, 16)  # so that small heads have several blocks of each kind
DTYPES = list(BLOCKS)
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def there() -> Iterator[Call]:
    """Calls a function where Triton runs: here if there is a GPU, else in a process with its interpreter."""
    if torch.cuda.is_available():

        def call(function: Call, *arguments: Any, **options: Any) -> Any:
            def to(device: str, values: Any) -> Any:
                return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)

            return to("cpu", function(*to("cuda", arguments), **to("cuda", options)))

        yield call
        return
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        assert pool.submit(begin).result()
        patch.undo()
        yield lambda function, *arguments, **options: pool.submit(function, *arguments, **options).result()


def begin() -> bool:
    """Prepares the process of the interpreter for bfloat16: products take its bits for integers, casts truncate."""
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    product, cast = builder.create_dot, builder.create_fp_trunc

    def exact_product(a: Any, b: Any, *rest: Any) -> Any:
        return product(*(builder.create_fp_ext(v, tl.float32) if v.dtype == tl.bfloat16 else v for v in (a, b)), *rest)

    def rounded(value: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16:
            return cast(value, to)
        return TensorHandle(torch.tensor(value.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    builder.create_dot, builder.create_fp_trunc = exact_product, rounded
    return not isinstance(triton_head.tile_kernel, triton.JITFunction)


def fused(head: Head, rows: Rows, process: str, blocks: Blocks | None, **options: Any) -> list[Tensor]:
    """The loss and its gradients with the epilogue."""
    dtype, n = head.hidden.dtype, len(head.weight)
    with pytest.MonkeyPatch.context() as patch, epilogue():
        patch.setitem(BLOCKS, dtype, blocks or BLOCKS[dtype])
        return results(linear_score_entropy_loss, head, *rows, PROCESSES[process](n), **options)


def check_accuracy(
    there: Call,
    head: Head,
    rows: Rows,
    name: str,
    blocks: Blocks | None,
    buffer_bytes: int | None = None,
    **options: Any,
) -> None:
    process = PROCESSES[name](len(head.weight))
    exact_head = Head(*(None if tensor is None else tensor.double() for tensor in head))
    exact = results(plain, exact_head, *rows, process, **options)
    same_dtype = results(plain, head, *rows, process, **options)
    got = there(fused, head, rows, name, blocks, buffer_bytes=buffer_bytes, **options)
    assert got[0].dtype == torch.float32
    allowed = BOUND[head.hidden.dtype] * math.ceil(process.dim / 2048)
    for value, other, true in zip(got, same_dtype, exact, strict=True):
        assert distance(value, true) <= distance(other, true) + allowed
    # the log-scores are not rounded to 16 bits
    assert distance(got[0], exact[0]) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "n"), [(1, 2), (17, 100)])
@pytest.mark.parametrize("name", PROCESSES)
def test_losses_and_gradients(there: Call, name: str, count: int, n: int, dtype: torch.dtype) -> None:
    """Rows, N and d that no block divides; with the same upstream gradient and with others."""
    rows = random_rows(PROCESSES[name](n), count)
    head = random_head(count, n, dtype, d=23)
    for upstream in (torch.full((count,), 0.25), torch.linspace(-1.0, 2.0, count)):
        check_accuracy(there, head, rows, name, SMALL, upstream=upstream)


@pytest.mark.parametrize("name", PROCESSES)
def test_two_tiles(there: Call, name: str) -> None:
    """The width of a tile is 2,048 on the CPU and 8,192 on a GPU; a buffer for some rows at a time."""
    n, width = (8300, 8192) if torch.cuda.is_available() else (2150, 2048)
    rows, head = random_rows(PROCESSES[name](n), 30), random_head(30, n, torch.float32)
    rows.x_0[:5], rows.x_0[5:15] = n - 1, torch.arange(width - 5, width + 5)
    upstream, blocks = torch.full((30,), 0.25), Blocks(16, 256, 16)
    check_accuracy(there, head, rows, name, blocks, buffer_bytes=17 * 4 * width, upstream=upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROCESSES)
def test_shift_weight_and_no_bias(there: Call, name: str, dtype: torch.dtype) -> None:
    """In the blocks that a GPU gets."""
    rows = random_rows(PROCESSES[name](150), 140)
    shift, factor = random_log_score((140,), torch.float64, seed=7), torch.linspace(0.1, 3.0, 140).double()
    head = random_head(140, 150, dtype, d=70, bias=False)
    upstream = torch.linspace(-1.0, 2.0, 140)
    check_accuracy(there, head, rows, name, None, upstream=upstream, log_score_shift=shift, loss_weight=factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROCESSES)
def test_every_entry_of_a_gradient(there: Call, name: str, dtype: torch.dtype) -> None:
    """The gradient of the bias is that of a single row's log-scores, in the units of their terms."""
    process = PROCESSES[name](100)
    head, (x_t, x_0, sigma) = random_head(4, 100, dtype, d=5), random_rows(process, 4)
    assert head.bias is not None
    x_t = torch.where(process.stationary[x_t] > 0, x_t, int(process.stationary.argmax()))
    x_0[0] = x_t[0]
    for row in range(4):
        one = Rows(x_t[row : row + 1], x_0[row : row + 1], sigma[row : row + 1])
        parts = head._replace(hidden=head.hidden[row : row + 1])
        log_score = (parts.hidden.double() @ parts.weight.double().T + head.bias.double()).requires_grad_()
        loss = reference.score_entropy_loss(log_score, *one, process)
        (exact,) = torch.autograd.grad(loss.sum(), log_score)
        scales = term_scales(log_score.detach(), one, process)
        got = there(fused, parts, one, name, SMALL, upstream=torch.ones(1))
        assert largest_error(got[0], loss.detach(), scales.loss) <= 1e-6
        # one rounding of the gradient, to the dtype of the product
        rounding = torch.finfo(dtype).eps / 2
        assert largest_error(got[3], exact[0], scales.gradient[0]) <= rounding + 2e-6


def test_the_default_and_the_epilogue_agree_on_extremes(there: Call) -> None:
    """Entry x may hold anything; scores of 0 and beyond float16; entries of probability 0 at -∞."""
    for name in PROCESSES:
        process = PROCESSES[name](40)
        x = int(process.stationary.argmax())
        head = random_head(3, 40, torch.float32)
        assert head.bias is not None
        head.bias[x] = torch.nan
        head.bias[(x + 1) % 40], head.bias[(x + 2) % 40] = 60.0, -90.0
        if name in ("absorbing", "vector_with_zeros"):
            head.bias[(process.stationary == 0).nonzero()[-1]] = -torch.inf
        rows = Rows(torch.full((3,), x), torch.tensor([x, (x + 1) % 40, (x + 2) % 40]), torch.tensor([0.1, 1, 9.0]))
        rows = rows._replace(sigma=rows.sigma.double())
        arguments = {"upstream": torch.full((3,), 1e-20)}
        expected = results(linear_score_entropy_loss, head, *rows, process, **arguments)
        got = there(fused, head, rows, name, SMALL, **arguments)
        assert all(bool(value.isfinite().all()) for value in expected)
        for value, other in zip(got, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-5, atol=0.0)


def test_rows_that_cannot_move(there: Call) -> None:
    x_t = torch.tensor([26, 1, 26, 2, 3])
    head = random_head(5, 27, torch.float32)
    head.hidden[[1, 3, 4]] = torch.nan
    rows = Rows(x_t, x_t.clamp(max=25), torch.full((5,), 0.5).double())
    loss, *gradients = there(fused, head, rows, "absorbing", SMALL, upstream=torch.ones(5))
    assert (loss[[1, 3, 4]] == 0).all()
    assert (loss[[0, 2]] > 0).all()
    assert (gradients[0][[1, 3, 4]] == 0).all()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def loss_alone(head: Head, rows: Rows) -> Tensor:
    with torch.no_grad(), epilogue():
        return linear_score_entropy_loss(*head, *rows, Absorbing(len(head.weight) - 1))


def test_no_gradient(there: Call) -> None:
    head, rows = random_head(5, 27, torch.float32), random_rows(Absorbing(26), 5)
    loss = there(loss_alone, head, rows)
    assert torch.equal(loss, there(fused, head, rows, "absorbing", None, upstream=torch.ones(5))[0])
    torch.testing.assert_close(loss, linear_score_entropy_loss(*head, *rows, Absorbing(26)))
    assert loss.any()


def bad(**arguments: Any) -> str:
    head, rows = random_head(3, 27, arguments.pop("dtype", torch.float32)), random_rows(Absorbing(26), 3)
    with epilogue(), pytest.raises((TypeError, ValueError)) as error:
        linear_score_entropy_loss(*head, *rows._replace(**arguments), Absorbing(26))
    return str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA kernels raise nothing")
def test_bad_rows(there: Call) -> None:
    assert there(bad, x_t=torch.tensor([26, 27, 0])) == "x_t: expected tokens in [0, 27), got 27 at index [1]"
    sigma = torch.tensor([0.1, 0.1, -1.0]).double()
    assert there(bad, x_t=torch.full((3,), 26), sigma=sigma).startswith(
        "sigma: expected finite numbers above 0, got -1"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(there: Call, dtype: torch.dtype) -> None:
    assert there(bad, dtype=dtype) == f"hidden: expected products in float32 or bfloat16 within epilogue(), got {dtype}"


def test_the_cpu_alone() -> None:
    """Without the interpreter, in this process; and the default comes back."""
    head, rows = random_head(3, 27, torch.float32), random_rows(Absorbing(26), 3)
    expected, before = linear_score_entropy_loss(*head, *rows, Absorbing(26)), module._loss
    with epilogue(), pytest.raises(NotImplementedError, match=r"hidden: expected a CUDA tensor .* got one on cpu"):
        linear_score_entropy_loss(*head, *rows, Absorbing(26))
    assert module._loss is before
    assert torch.equal(linear_score_entropy_loss(*head, *rows, Absorbing(26)), expected)


def parts(head: Head, rows: Rows) -> list[list[Tensor]]:
    """What each of two processes that share a vocabulary contributes, and the whole."""
    process, made = PROCESSES["hybrid"](len(head.weight)), []
    stationary = process.stationary.float().to(head.hidden.device)
    shift = torch.full_like(rows.sigma, 0.7)
    assert head.bias is not None
    for share in (slice(0, 60), slice(60, None), slice(None)):
        arguments = (head.hidden, head.weight[share], head.bias[share], *rows, shift, None, stationary)
        options = (process.family, process.neg_entropy, process.dim, share.start or 0, "", torch.float32, 1 << 20, None)
        made.append(triton_head._forward(*arguments, *options, True, True, True))
    return made


def test_a_split_vocabulary(there: Call) -> None:
    rows = random_rows(PROCESSES["hybrid"](101), 20)
    rows.x_0[:4] = torch.arange(60, 64)  # in the last block of the first, but not in its part of the vocabulary
    first, second, whole = there(parts, random_head(20, 101, torch.float32), rows)
    for i in (0, 1):
        torch.testing.assert_close(first[i] + second[i], whole[i])
    for i in (2, 3):
        torch.testing.assert_close(torch.cat([first[i], second[i]]), whole[i])


# ---------------------------------------------------------------------------------------------------- without Triton


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_the_package_does_not_import_it() -> None:
    code = "import sys, torch; before = {*sys.modules}; import sedd_ext, sedd; print({*sys.modules} - before)"
    assert "'sedd_ext.linear_score_entropy'" in python(code)
    assert "triton" not in python(code)


def test_without_the_package() -> None:
    code = """
import sys
sys.modules["triton"] = None
try:
    import sedd_ext.triton_head
except ImportError as error:
    print(error)
"""
    expected = "expected the package triton, which is not installed; pip install sedd_ext[triton]"
    assert python(code) == f"sedd_ext.triton_head: {expected}\n"


# ------------------------------------------------------------------------------------------------------ machine code


def compiled(capability: int, dtype: torch.dtype, family: str, patch: pytest.MonkeyPatch) -> Any:
    """The kernel as a launch on a GPU of this capability compiles it."""
    from triton.backends.compiler import GPUTarget

    kernel, made = triton_head.tile_kernel, []
    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # triton keeps the kernels of each device
        get_current_stream=lambda device: 0,
    )
    driver = triton.runtime.driver
    patch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", gpu)

    class Compiled:
        def __getitem__(self, grid: Any) -> Call:
            return lambda *arguments, **options: made.append(kernel.warmup(*arguments, grid=grid, **options))

    patch.setattr(triton_head, "tile_kernel", Compiled())
    process = PROCESSES[family](256)
    head, rows = random_head(16, 256, dtype, d=768), random_rows(process, 16)
    with epilogue():
        linear_score_entropy_loss(head[0].requires_grad_(), *head[1:], *rows._replace(x_t=rows.x_t * 0 + 255), process)
    return made[0]


@pytest.mark.costly("sedd_ext/triton_head.py")
@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that the CPU's tensors are on a GPU")
@pytest.mark.parametrize("family", ["absorbing", "uniform", "hybrid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(
    capability: int, dtype: torch.dtype, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores, copies that do not wait, 128-bit stores, and few spills (pytest -rP prints the figures)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    cuobjdump = find_tool("cuobjdump")
    assert cuobjdump is not None
    kernel = compiled(capability, dtype, family, monkeypatch)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def dump(option: str) -> str:
        environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}{os.pathsep}{os.environ['PATH']}"}
        command = [cuobjdump, option, str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    resources = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage"))
    assert resources is not None
    registers, stack = map(int, resources.groups())
    code = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]+)", dump("-sass"))
    counts = {name: sum(i.split(".")[0] == name for i in code) for name in ("HGMMA", "HMMA", "LDGSTS", "STL", "LDL")}
    stores = [i for i in code if i.startswith("STG") and "128" in i]
    print(f"sm_{capability} {dtype} {family}: {registers} registers, {stack} bytes of stack, {len(code)} instructions,")
    print(f"{kernel.metadata.shared} bytes of shared memory, {counts}, {len(stores)} stores of 128 bits")
    b = BLOCKS[dtype]
    assert counts["HGMMA" if capability == 90 else "HMMA"] > 0
    assert counts["LDGSTS"] > 0 or dtype == torch.float32  # which Triton 3.2 does not copy so
    assert len(stores) == b.rows * b.entries * dtype.itemsize // (16 * 32 * b.warps)
    assert registers <= (b.registers or 255)
    assert stack <= (1024 if b.registers else 0)
    assert kernel.metadata.shared * (2 if b.registers else 1) <= {80: 163, 90: 227}[capability] * 1024
