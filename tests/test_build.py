"""What was built: one OpenMP runtime, torch's threads, no torch inside, the same results on every instruction set."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sedd_ext
from sedd_ext import (
    _C,
    Absorbing,
    Euler,
    Hybrid,
    Tweedie,
    Uniform,
    _dispatch,
    reference,
    reverse_probs,
    reverse_sample,
    score_entropy_loss,
)

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and ELF files")
N = 1031


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.select_isa(request.param)
    yield request.param
    _C.select_isa(before)


@linux_only
def test_one_openmp_runtime() -> None:
    code = (
        "import sedd_ext, torch\n"
        "sedd_ext.score_entropy_loss(torch.zeros(64, 5001), torch.full((64,), 5000), torch.zeros(64).long(), 1.0,"
        " sedd_ext.Absorbing(5000))\n"
        "print(*{l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l.split()[-1].rsplit('/', 1)[-1]})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len([path for path in loaded if "gomp" in path or "iomp" in path or "libomp" in path]) == 1, loaded


@linux_only
def test_needs_no_torch_library() -> None:
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert "torch" not in needed
    assert "omp" not in needed


def cpu_threads_used(threads: int) -> int:
    """How many threads worked, as the operating system counts them."""
    process = Absorbing(50257)
    log_score = torch.randn(64, process.dim)
    x_t, x_0 = torch.full((64,), process.mask_id), torch.zeros(64, dtype=torch.int64)
    torch.set_num_threads(threads)

    def ticks() -> dict[str, int]:
        found = {}
        for task in Path("/proc/self/task").iterdir():
            fields = (task / "stat").read_text().rsplit(")", 1)[1].split()
            found[task.name] = int(fields[11])
        return found

    before = ticks()
    spent: dict[str, int] = {}
    while sum(spent.values()) < 50:  # half a second of work, however fast the machine
        for _ in range(100):
            score_entropy_loss(log_score, x_t, x_0, 1.0, process)
        spent = {task: now - before.get(task, 0) for task, now in ticks().items()}
    return sum(share >= 0.1 * sum(spent.values()) for share in spent.values())


@linux_only
@pytest.mark.parametrize("threads", [1, 2])
def test_set_num_threads_is_obeyed(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        assert cpu_threads_used(threads) == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", _C.arguments)
def test_kernels_take_their_arguments_by_name(kernel: str) -> None:
    """No rows, so that no address is read."""
    function, right = getattr(_C, kernel), dict.fromkeys(_C.arguments[kernel], 0)
    assert function(right) == (0, -1)
    for name in right:
        missing = {other: value for other, value in right.items() if other != name}
        for wrong in (missing, {**missing, f"{name}_": 0}):
            with pytest.raises(TypeError, match=f"^{kernel}: expected an argument {name}, got none"):
                function(wrong)
    with pytest.raises(TypeError, match=rf"^{kernel}: expected the arguments .*; got other too"):
        function({**right, "other": 0})
    with pytest.raises(TypeError, match=r"^out: expected a tensor, an address or None, got str"):
        function({**right, "out": "0"})
    with pytest.raises(TypeError):
        function({**right, "rows": 0.5})


def test_codes_and_names_come_from_the_compiled_module() -> None:
    assert set(_C.families) == {"absorbing", "uniform", "rank_one"}
    assert set(_C.steps) == {Tweedie.name, Euler.name}
    assert set(_C.faults) == {"x_t", "x_0", "sigma", "total", "sigma_s", "noise"}
    assert set(_dispatch.DTYPES) == {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def test_gil_is_released() -> None:
    """Another Python thread gets to run again and again while one kernel does."""
    process = Uniform(50258)
    log_score = torch.randn(2048, process.dim)
    x = torch.zeros(2048, dtype=torch.int64)
    turns = []

    def kernel() -> None:
        arguments = dict.fromkeys(_C.arguments["score_entropy"])
        arguments |= {"log_score": log_score, "x_t": x, "x_0": x, "sigma": sigma, "out": out, "rows": 2048}
        arguments |= {"dim": process.dim, "neg_entropy": process.neg_entropy, "threads": 1}
        arguments |= {"dtype": _C.dtypes["float32"], "family": _C.families["uniform"]}
        begin = time.perf_counter()
        status = _C.score_entropy(arguments)
        turns.append((begin, time.perf_counter(), status))

    sigma, out = torch.ones(2048, dtype=torch.float64), torch.empty(2048)
    worker = threading.Thread(target=kernel)
    worker.start()
    times = []
    while worker.is_alive():
        times.append(time.perf_counter())
        time.sleep(1e-4)
    worker.join()
    ((begin, end, status),) = turns
    assert status == (0, -1)
    assert sum(begin < moment < end for moment in times) >= 5  # with the GIL held: none


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("process", [Absorbing(N - 1), Uniform(N), Hybrid(N - 1, 0.3)], ids=str)
def test_instruction_sets_agree(isa: str, process, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    log_score = (1.5 * torch.randn(40, N, generator=generator)).to(dtype)  # float16 gradients stay below 65504
    x_0 = torch.randint(N - 1, (40,), generator=generator)
    x_t = torch.where(torch.arange(40) < 30, N - 1, x_0)
    sigma = torch.rand(40, generator=generator, dtype=torch.float64) + 0.05

    def run(module, values):
        values = values.clone().requires_grad_()
        loss = module.score_entropy_loss(values, x_t, x_0, sigma, process, log_score_shift=0.7)
        (gradient,) = torch.autograd.grad(loss.sum(), values)
        return (
            loss.double(),
            gradient.double(),
            module.reverse_probs(values.detach(), x_t, Tweedie(sigma / 20), process).double(),
        )

    results, exact = run(sedd_ext, log_score), run(reference, log_score.double())
    digits = 1e-13 if dtype == torch.float64 else 2e-6
    stored = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, digits)  # the gradient has the dtype's digits
    for result, true, relative in zip(results, exact, (digits, stored, digits), strict=True):
        # terms as large as the row's largest cancel in the loss and in the clamped probabilities
        size = true.abs().amax(-1, keepdim=True) if true.dim() > 1 else true.abs() + 100.0
        smallest = 2**-25 if relative == 2**-11 else 0.0  # half of float16's smallest number
        assert ((result - true).abs() <= relative * true.abs() + digits * size + smallest).all()


def test_special_values_on_every_instruction_set(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    values = [0.0, -0.0, inf, -inf, nan, 88.7, 88.8, -87.4, -103.9, -104.1, 3.4e38, -3.4e38, 1e-45]
    process = Absorbing(1)  # with the other token's loss Σ s = exp(l) at x_0 = MASK: the kernel's exp, seen alone
    log_score = torch.tensor(values)[:, None].expand(-1, 2).contiguous()
    mask = torch.ones(len(values), dtype=torch.int64)
    loss = score_entropy_loss(log_score, mask, mask, 1.0, process)
    torch.testing.assert_close(loss, torch.tensor(values).exp(), equal_nan=True, rtol=3e-7, atol=1.5e-45)


def test_sampler_agrees_on_every_instruction_set(isa: str) -> None:
    """Sums in another order move a boundary between tokens by one part in 10⁷: rarely does a token change."""
    process = Absorbing(N - 1)
    log_score = torch.randn(2000, N, generator=torch.Generator().manual_seed(5))
    x_t = torch.full((2000,), process.mask_id)
    tokens = reverse_sample(log_score, x_t, Tweedie(0.5), process, generator=torch.Generator().manual_seed(1))
    _C.select_isa("baseline")
    other = reverse_sample(log_score, x_t, Tweedie(0.5), process, generator=torch.Generator().manual_seed(1))
    assert (tokens != other).sum() <= 2
    assert reverse_probs(log_score, x_t, Tweedie(0.5), process).shape == log_score.shape


def test_a_source_folder_without_kernels_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "sedd_ext"
    shutil.copytree(Path(sedd_ext.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # an editable install finds its own folder first: without its finder, as after a plain pip install
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; import sedd_ext"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode != 0
    assert "run Python from another folder, or install with pip install -e ." in run.stderr


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="isa: 'mmx'"):
        _C.select_isa("mmx")


def test_describe() -> None:
    text = subprocess.run([sys.executable, "-m", "sedd_ext"], capture_output=True, text=True, check=True).stdout
    assert _C.__version__ in text
    assert f"{_C.isa()} (in use)" in text
    assert "CUDA kernels" in text
    assert "threads" in text
