"""The processes: their stationary distributions, constants, limits, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from explicit import chi_square, generator_matrix

from sedd_ext import Absorbing, Hybrid, RankOne, Uniform


@pytest.mark.parametrize("n", [2, 7, 50258])
def test_stationary_is_a_probability_vector(process_of: Callable[[int], RankOne], n: int) -> None:
    process = process_of(n)
    pi = process.stationary
    assert process.dim == n
    assert pi.shape == (n,)
    assert pi.dtype == torch.float64
    assert (pi >= 0).all()
    assert float(pi.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(process.cumulative, pi.cumsum(0))
    assert process.neg_entropy == pytest.approx(float(torch.xlogy(pi, pi).sum()), rel=1e-12)


def test_generator_keeps_the_stationary_distribution(process_of: Callable[[int], RankOne]) -> None:
    process = process_of(7)
    q = generator_matrix(process)
    torch.testing.assert_close(q.sum(0), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(q @ process.stationary, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_three_named_processes() -> None:
    absorbing, uniform, hybrid = Absorbing(4), Uniform(4), Hybrid(4, 0.2)
    assert (absorbing.dim, absorbing.mask_id, absorbing.family) == (5, 4, "absorbing")
    assert (uniform.dim, uniform.mask_id, uniform.family) == (4, None, "uniform")
    assert (hybrid.dim, hybrid.mask_id, hybrid.family) == (5, 4, "rank_one")
    assert absorbing.stationary.tolist() == [0, 0, 0, 0, 1]
    assert uniform.stationary.tolist() == [0.25] * 4
    torch.testing.assert_close(hybrid.stationary, torch.tensor([0.05, 0.05, 0.05, 0.05, 0.8], dtype=torch.float64))


def test_hybrid_ends_are_absorbing_and_uniform() -> None:
    assert Hybrid(4, 0.0).stationary.tolist() == Absorbing(4).stationary.tolist()
    assert Hybrid(4, 1.0).stationary.tolist() == [0.25] * 4 + [0.0]


def test_a_float32_vector_is_normalised_and_not_aliased() -> None:
    given = torch.rand(50258).softmax(0)
    process = RankOne(given)
    before = process.stationary.clone()
    given.zero_()
    assert float(process.stationary.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(process.stationary, before, rtol=0, atol=0)


def test_sample_limit_draws_from_the_stationary_distribution(process_of: Callable[[int], RankOne]) -> None:
    process = process_of(13)
    tokens = process.sample_limit((400, 500), generator=torch.Generator().manual_seed(0))
    assert tokens.shape == (400, 500)
    assert tokens.dtype == torch.int64
    if process.family == "absorbing":
        assert (tokens == process.mask_id).all()
    else:
        assert chi_square(tokens.flatten().bincount(minlength=13), process.stationary) > 1e-3


def test_sample_limit_obeys_the_generator(process_of: Callable[[int], RankOne]) -> None:
    process = process_of(1000)
    first, second = (process.sample_limit((50,), generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Absorbing(0), ValueError, r"num_tokens: .* 0"),
        (lambda: Uniform(-3), ValueError, r"num_tokens: .* -3"),
        (lambda: Uniform(2.0), TypeError, r"num_tokens: .* float"),
        (lambda: Absorbing(True), TypeError, r"num_tokens: .* bool"),
        (lambda: Uniform(10**30), ValueError, r"num_tokens: .* 9007199254740992 tokens, got 10{30}$"),
        (lambda: Absorbing(10**30), ValueError, r"num_tokens: .* 9007199254740992 tokens, got 10{30}$"),
        (lambda: Hybrid(10**30, 0.5), ValueError, r"num_tokens: .* 9007199254740992 tokens, got 10{30}$"),
        (lambda: Hybrid(4, "0.5"), TypeError, r"uniform_fraction: .* str"),
        (lambda: Hybrid(4, 1.5), ValueError, r"uniform_fraction: .* 1\.5"),
        (lambda: Hybrid(4, NAN), ValueError, r"uniform_fraction: .* nan"),
        (lambda: RankOne([0.5, 0.5]), TypeError, r"stationary: .* list"),
        (lambda: RankOne(torch.tensor([1, 0])), TypeError, r"stationary: .* torch\.int64"),
        (lambda: RankOne(torch.ones(2, 2) / 4), ValueError, r"stationary: .* \[2, 2\]"),
        (lambda: RankOne(torch.ones(0)), ValueError, r"stationary: .* \[0\]"),
        (lambda: RankOne(torch.tensor([0.5, 0.4])), ValueError, r"stationary: .* sum 0\.9"),
        (lambda: RankOne(torch.tensor([1.5, -0.5])), ValueError, r"stationary: .* minimum -0\.5"),
        (lambda: RankOne(torch.tensor([NAN, 1.0])), ValueError, r"stationary: .* nan"),
        (lambda: RankOne(torch.tensor([INF, 0.0])), ValueError, r"stationary: .* inf"),
        (lambda: RankOne(torch.ones(2, device="meta")), ValueError, r"stationary: .* meta"),
        (lambda: RankOne(torch.tensor([1.0, 1e-40])), ValueError, r"stationary: .*1\.18e-38.*1e-40 at index 1"),
        (
            lambda: RankOne(torch.tensor([1e-50, 1.0], dtype=torch.float64)),
            ValueError,
            r"stationary: .*1e-50 at index 0",
        ),
        (lambda: RankOne(torch.ones(2) / 2, mask_id=1.5), TypeError, r"mask_id: .* float"),
        (lambda: RankOne(torch.ones(2) / 2, mask_id=True), TypeError, r"mask_id: .* bool"),
        (lambda: RankOne(torch.ones(2) / 2, mask_id=2), ValueError, r"mask_id: .* \[0, 2\), got 2"),
    ],
)
def test_bad_input(make: Callable[[], RankOne], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_no_copy_is_made_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first use there cannot work: the error says what to do. Later uses take the copy that is there."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    process, device = Hybrid(4, 0.5), torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match=r"process: .*stationary.*float32 on cuda:0.*call the operator once before"):
        process._copy("stationary", torch.float32, device)
    process._copies["stationary", torch.float32, device] = made = process.stationary.float()
    assert process._copy("stationary", torch.float32, device) is made
    process._copy("stationary", torch.float32, torch.device("cpu"))
