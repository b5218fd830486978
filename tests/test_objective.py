"""Training objective: equals a dense statement of it, scores only what the process can produce, times are spread."""

import math

import pytest
import torch
from toy import TrueScore, diffusion

from sedd.diffusion.objectives import OBJECTIVES, sample_times
from sedd.diffusion.position_loss import ScoreEntropy
from sedd.diffusion.schedule import get_schedule
from sedd.hub import SEDD
from sedd.network import ModelConfig
from sedd_ext import Absorbing, Hybrid, Uniform, reference, sample_transition

N_VOCAB = 7
PROCESSES = {"absorbing": Absorbing(N_VOCAB), "uniform": Uniform(N_VOCAB), "hybrid": Hybrid(N_VOCAB, 0.3)}
SCHEDULE = get_schedule("loglinear")


def build(process):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, length=6, dropout=0.0)
    model = SEDD(config, process)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def seeded():
    return torch.Generator().manual_seed(3)


def text(batch=4, length=6):
    return torch.randint(N_VOCAB, (batch, length), generator=seeded())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_loss_and_gradient_equal_the_dense_formulation(process, fused):
    """σ(t) Σ L over every position, from the full [B, L, N] log-scores of the model's own forward()."""
    model = build(process)
    x_0, t = text(), torch.tensor([0.03, 0.4, 0.8, 1.0], dtype=torch.float64)
    loss = diffusion(model, process, SCHEDULE)(x_0, t, scale=0.5, fused=fused, generator=seeded())
    assert loss.shape == (4,)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    sigma = SCHEDULE.total(t)
    x_t = sample_transition(x_0, sigma[:, None], process, generator=seeded())
    dense = reference.score_entropy_loss(model(x_t, sigma), x_t, x_0, sigma[:, None], process).sum(-1)
    dense = 0.5 * dense * SCHEDULE.rate(t)
    torch.testing.assert_close(loss, dense.float(), rtol=2e-5, atol=1e-5)
    dense.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_head_runs_on_masked_positions_only():
    process = Absorbing(5)
    model = TrueScore(process)
    t = torch.full((64,), 0.25, dtype=torch.float64)
    diffusion(model, process, SCHEDULE)(torch.zeros(64, 10, dtype=torch.int64), t, generator=seeded())
    assert model.rows_scored[0] == pytest.approx(0.25 * 640, abs=4 * math.sqrt(640 * 0.25 * 0.75))


def test_hybrid_without_uniform_part_skips_what_absorbing_skips():
    x_0, t = text(), torch.full((4,), 0.5, dtype=torch.float64)
    rows = []
    for process in (Absorbing(N_VOCAB), Hybrid(N_VOCAB, 0.0)):
        model = TrueScore(process, torch.full((N_VOCAB,), 1 / N_VOCAB))
        diffusion(model, process, SCHEDULE)(x_0, t, generator=seeded())
        rows.append(model.rows_scored[0])
    assert 0 < rows[1] < x_0.numel()


def test_a_batch_without_noise_scores_zero_and_has_a_gradient():
    process = Absorbing(N_VOCAB)
    model = build(process)
    loss = diffusion(model, process, SCHEDULE)(text(), torch.full((4,), 1e-12, dtype=torch.float64))
    assert loss.tolist() == [0.0] * 4
    loss.sum().backward()
    assert not bool(model.output_layer.linear.weight.grad.any())


@pytest.mark.parametrize("process", [Absorbing(5), Uniform(5)], ids=["absorbing", "uniform"])
def test_model_shift_is_taken_off(process):
    t = torch.full((4,), 0.5, dtype=torch.float64)
    x_0 = torch.randint(4, (4, 6), generator=seeded())
    plain, shifted = (
        diffusion(TrueScore(process, shift=shift), process, SCHEDULE)(x_0, t, generator=seeded())
        for shift in (None, 2.5)
    )
    torch.testing.assert_close(plain, shifted, rtol=1e-6, atol=1e-6)


def test_sequences_are_scored_apart():
    process = Absorbing(N_VOCAB)
    model = build(process)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    together = torch.autograd.grad(
        diffusion(model, process, SCHEDULE)(text(3), t, generator=seeded())[1], model.output_layer.linear.bias
    )[0]
    other = text(3)
    other[0] = (other[0] + 1) % N_VOCAB
    apart = torch.autograd.grad(
        diffusion(model, process, SCHEDULE)(other, t, generator=seeded())[1], model.output_layer.linear.bias
    )[0]
    assert bool(together.any())
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-7)


def test_bfloat16_autocast_stays_near_float32():
    process = Absorbing(N_VOCAB)
    model = build(process)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    exact = diffusion(model, process, SCHEDULE)(text(), t, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = diffusion(model, process, SCHEDULE)(text(), t, generator=seeded())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.05)


def test_training_learns_a_distribution():
    """A few steps on text of one token lower the loss far below that of the untrained model."""
    process = Absorbing(3)
    model = SEDD(ModelConfig(hidden_size=16, n_blocks=1, n_heads=2, cond_dim=8, dropout=0.0), process)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = seeded()
    x_0, losses = torch.full((16, 8), 2), []
    for _ in range(60):
        loss = diffusion(model, process, SCHEDULE)(
            x_0, sample_times(16, generator=generator), generator=generator
        ).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 0.1 * losses[0]


def test_times_are_uniform_and_spread():
    times = sample_times(1000, eps=0.1, generator=seeded())
    assert times.dtype == torch.float64
    assert float(times.min()) >= 0.1
    assert float(times.max()) < 1.0
    gaps = times.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full((999,), 0.9 / 1000, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    # a single time of the batch is still uniform on [eps, 1)
    generator = seeded()
    first = torch.stack([sample_times(8, eps=0.1, generator=generator)[3] for _ in range(2000)])
    assert float(first.mean()) == pytest.approx(0.55, abs=4 * 0.9 / math.sqrt(12 * 2000))
    assert float(first.var()) == pytest.approx(0.81 / 12, rel=0.1)


def test_independent_times():
    times = sample_times(4000, antithetic=False, generator=seeded())
    assert float(times.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 4000))
    assert float(times.sort().values.diff().std()) > 0.5 / 4000  # not evenly spread


def test_registry():
    assert OBJECTIVES["score_entropy"] is ScoreEntropy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_times(0), "batch: expected a positive number of sequences, got 0"),
        (lambda: sample_times(4, eps=1.0), r"eps: expected a time in \[0, 1\), got 1.0"),
        (
            lambda: diffusion(build(PROCESSES["uniform"]), PROCESSES["uniform"], SCHEDULE)(text()[0], torch.ones(1)),
            r"x_0: .*got shape \[6\]",
        ),
        (
            lambda: diffusion(build(PROCESSES["uniform"]), PROCESSES["uniform"], SCHEDULE)(text(), torch.ones(3)),
            r"t: expected shape \[4\].*got \[3\]",
        ),
        (
            lambda: diffusion(build(PROCESSES["uniform"]), PROCESSES["uniform"], SCHEDULE)(text() + 9, torch.ones(4)),
            "x_0",
        ),
        (
            lambda: diffusion(build(PROCESSES["uniform"]), PROCESSES["uniform"], SCHEDULE)(text(), torch.zeros(4)),
            "sigma",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
