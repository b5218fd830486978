"""Noise schedules: total noise and its rate fit together, ends are where the papers put them, bad input is told."""

import math

import pytest
import torch

from sedd.diffusion.schedule import SCHEDULES, Cosine, Geometric, LogLinear, Polynomial, get_schedule

T = torch.linspace(0.001, 0.999, 201, dtype=torch.float64)


@pytest.fixture(params=[*SCHEDULES, "polynomial-3"])
def schedule(request):
    name, _, power = request.param.partition("-")
    return get_schedule(name, **({"power": float(power)} if power else {}))


def test_rate_is_the_derivative_of_total(schedule):
    t = T.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.total(t).sum(), t)
    torch.testing.assert_close(schedule.rate(T), slope, rtol=1e-10, atol=1e-12)


def test_total_grows(schedule):
    total = schedule.total(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert bool((total.diff() > 0).all())


def test_float64_inside_any_shape_and_float_dtype(schedule):
    t = torch.rand(3, 2, 5)
    for method in (schedule.total, schedule.rate):
        assert method(t).dtype == torch.float64
        torch.testing.assert_close(method(t), method(t.double().flatten()).view(3, 2, 5), rtol=0, atol=0)
        assert method(torch.tensor(0.5, dtype=torch.bfloat16)).shape == ()


@pytest.mark.parametrize("name", ["loglinear", "cosine", "polynomial"])
def test_alpha_schedules_go_from_no_noise_to_eps(name):
    schedule = get_schedule(name, eps=1e-4)
    start, end = schedule.total(torch.tensor([0.0, 1.0]))
    assert start == 0
    assert math.exp(-end) == pytest.approx(1e-4, rel=1e-9)


def test_values_of_the_papers():
    t = torch.tensor([0.25], dtype=torch.float64)
    assert float(LogLinear(eps=1e-3).total(t)) == pytest.approx(-math.log(1 - 0.999 * 0.25), rel=1e-12)
    assert float(LogLinear(eps=1e-3).rate(torch.tensor([1.0]))) == pytest.approx(999, rel=1e-9)
    assert float(Geometric(1e-5, 20.0).total(t)) == pytest.approx(1e-5**0.75 * 20**0.25, rel=1e-12)
    assert float(Geometric(1e-5, 20.0).total(torch.tensor([1.0]))) == pytest.approx(20, rel=1e-12)
    tiny = 1e-12  # what is left of the paper's α when ε is negligible
    assert math.exp(-Cosine(eps=tiny).total(t)) == pytest.approx(1 - math.cos(math.pi / 2 * 0.75), rel=1e-9)
    assert math.exp(-Polynomial(power=3.0, eps=tiny).total(t)) == pytest.approx(1 - 0.25**3, rel=1e-9)


def test_small_times_keep_their_digits():
    """1 - (1 - x) in place of log1p would lose all of them."""
    t = torch.tensor([1e-15], dtype=torch.float64)
    assert float(LogLinear().total(t)) == pytest.approx(0.999e-15, rel=1e-12, abs=0)


def test_compiles_in_one_graph():
    schedule = LogLinear()
    compiled = torch.compile(schedule.total, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(T), schedule.total(T), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_schedule("linear"), ValueError, r"schedule: expected one of 'loglinear', .* got 'linear'"),
        (lambda: get_schedule("geometric", eps=0.1), TypeError, r"parameters sigma_min, sigma_max; got 'eps'"),
        (lambda: get_schedule("loglinear", eps=0.0), ValueError, r"eps: .* got 0.0"),
        (lambda: get_schedule("cosine", eps=1.0), ValueError, r"eps: .* got 1.0"),
        (lambda: get_schedule("polynomial", power=0.5), ValueError, r"power: .* at least 1, got 0.5"),
        (lambda: get_schedule("polynomial", power=math.nan), ValueError, r"power: .* got nan"),
        (lambda: get_schedule("geometric", sigma_min=0.0), ValueError, r"sigma_min: .* got 0.0"),
        (lambda: get_schedule("geometric", sigma_max=1e-6), ValueError, r"sigma_max: .* got 1e-06"),
        (lambda: get_schedule("geometric", sigma_max=math.inf), ValueError, r"sigma_max: .* got inf"),
        (lambda: LogLinear().total(0.5), TypeError, r"t: .* got float"),
        (lambda: LogLinear().rate(torch.tensor([1])), TypeError, r"t: .* got a torch.int64 tensor"),
        (lambda: LogLinear().total(torch.tensor([0.5, 1.5])), ValueError, r"t: .* from 0.5 to 1.5"),
        (lambda: Geometric().rate(torch.tensor([-0.1])), ValueError, r"t: .* got values from -0.1"),
        (lambda: Cosine().rate(torch.tensor([math.nan])), ValueError, r"t: "),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
