"""The network: names and shapes of the released models, its conventions, mixed precision, and what it refuses."""

import math
from pathlib import Path

import pytest
import released
import torch
from toy import diffusion

from sedd.diffusion.likelihood import elbo
from sedd.diffusion.schedule import LogLinear
from sedd.hub import SEDD
from sedd.network import PRESETS, DiffusionTransformer, ModelConfig
from sedd.runtime import device_of
from sedd.training.weights import load_weights
from sedd_ext import Absorbing, Hybrid, RankOne, Uniform

N_VOCAB = 11


def build(process=None, **overrides):
    """A small model whose zero-initialised layers are filled, so that every part takes part."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "n_blocks": 2, "n_heads": 2, "cond_dim": 16, "length": 8, "dropout": 0.0} | overrides
    model = SEDD(ModelConfig(**sizes), process or Absorbing(N_VOCAB))
    for name, parameter in model.named_parameters():
        if "adaLN" in name or name.startswith("output_layer.linear"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def shift_of(model, sigma, x_t):
    return model.parameterization.log_score_shift(model.process, sigma, x_t)


def inputs(model, batch=3, length=8):
    torch.manual_seed(1)
    return torch.randint(model.dim, (batch, length)), torch.rand(batch) + 0.1


def test_small_has_the_released_names_shapes_and_order():
    with torch.device("meta"):
        model = SEDD("small", Absorbing(50257))
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = released.shapes(768, 12, 12, 50258)
    assert state == expected
    assert list(state) == list(expected)  # the order of the EMA's nameless tensors in released checkpoints
    assert len(state) == 131
    assert sum(parameter.numel() for parameter in model.parameters()) == 169_627_218


def test_medium_has_the_released_names_and_shapes():
    process = Uniform(50257)
    with torch.device("meta"):
        model = SEDD("medium", process)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == released.shapes(1024, 24, 16, 50257)


def test_presets_are_usable_by_name():
    model = SEDD("tiny", Absorbing(257))
    assert model.config == PRESETS["tiny"]
    assert model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1)).shape == (1, 4, 258)


def test_a_new_model_scores_every_token_alike():
    """The head starts at zero, so the scores of a masked position are 1/(expm1(σ̄)(N-1)): they sum to the true sum."""
    model = SEDD("tiny", Absorbing(257))
    x, sigma = torch.full((2, 5), 257), torch.tensor([0.3, 4.0])
    log_score = model(x, sigma)
    scores = log_score[..., :257].exp().detach()
    torch.testing.assert_close(scores.sum(-1), (1 / torch.expm1(sigma))[:, None].expand(2, 5), rtol=1e-5, atol=0)
    assert float((scores.amax(-1) / scores.amin(-1)).max()) == pytest.approx(1.0)


def test_forward_is_hidden_head_and_shift_with_a_zero_at_x_t():
    model = build().eval()
    x, sigma = inputs(model)
    log_score = model(x, sigma)
    raw = model.head(model.hidden(x, sigma)) - shift_of(model, sigma, x)[:, None, None]
    at_x_t = torch.nn.functional.one_hot(x, model.dim).bool()
    assert log_score.shape == (3, 8, N_VOCAB + 1)
    assert bool((log_score[at_x_t] == 0).all())
    torch.testing.assert_close(log_score[~at_x_t], raw[~at_x_t], rtol=0, atol=0)


def test_shift_formula_and_its_extremes():
    model = build()
    sigma = torch.tensor([1e-12, 1e-5, 0.7, 20.0, 800.0], dtype=torch.float64)
    shift = shift_of(model, sigma, torch.full((5,), N_VOCAB))
    expected = [math.log(math.expm1(s)) if s < 500 else s for s in sigma.tolist()]
    torch.testing.assert_close(
        shift, torch.tensor(expected, dtype=torch.float64) + math.log(N_VOCAB), rtol=1e-13, atol=0
    )


def test_models_without_a_shift():
    for process, options in (
        (Uniform(N_VOCAB), {}),
        (RankOne(torch.tensor([0.1, 0.2, 0.7]), mask_id=2), {}),
        (Absorbing(N_VOCAB), {"scale_by_sigma": False}),
        (Hybrid(N_VOCAB, 0.2), {"hybrid_shift": False}),
    ):
        model = build(process, **options)
        assert shift_of(model, torch.ones(2), torch.zeros(2, dtype=torch.int64)) is None


@pytest.mark.parametrize("uniform_fraction", [0.0, 0.1, 0.5, 0.9])
def test_hybrid_shift_is_the_score_of_unknown_text(uniform_fraction):
    """At a masked position, p_t(y) / p_t(MASK) for p_0 uniform over the tokens, against exp(σQ) written out."""
    process = Hybrid(N_VOCAB, uniform_fraction)
    model = build(process)
    sigma = torch.tensor([1e-6, 1e-3, 0.7, 6.9, 20.0], dtype=torch.float64)
    x = torch.tensor([N_VOCAB, 3]).expand(5, 2)
    shift = shift_of(model, sigma[:, None], x)
    a = torch.exp(-sigma)[:, None]
    p_t = a * torch.tensor([1 / N_VOCAB] * N_VOCAB + [0.0]).double() - torch.expm1(-sigma)[:, None] * process.stationary
    torch.testing.assert_close(-shift[:, 0], (p_t[:, 0] / p_t[:, -1]).log(), rtol=1e-6, atol=1e-7)
    assert not bool(shift[:, 1].any())
    assert shift.dtype == torch.float64


@pytest.mark.parametrize("process", [Absorbing(256), Uniform(256), Hybrid(256, 0.1), Hybrid(256, 0.5)], ids=repr)
def test_every_process_starts_at_the_entropy_of_the_vocabulary(process):
    """An untrained model knows nothing: its bound is log n, plus what MASK's constant log-score costs at first."""
    model = SEDD(ModelConfig(16, 1, 2, 8, length=16), process).eval()
    text = torch.randint(256, (16, 16), generator=torch.Generator().manual_seed(0))
    result = elbo(
        diffusion(model, process, LogLinear()), text, draws=64, n_bytes=256, generator=torch.Generator().manual_seed(1)
    )
    assert math.log(256) - 0.3 < result.nats_per_token < math.log(256) + 0.5


def test_sigma_embedding_is_cosines_then_sines_of_256_inputs():
    model = build()
    seen = []
    model.sigma_map.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, _ = inputs(model, batch=2)
    model(x, torch.tensor([0.5, 7.0]))
    i = torch.arange(128, dtype=torch.float64)
    angles = torch.tensor([[0.5], [7.0]]).double() * 10_000 ** (-i / 128)
    torch.testing.assert_close(seen[0].double(), torch.cat([angles.cos(), angles.sin()], -1), rtol=0, atol=2e-6)


def test_matches_an_independent_statement_of_the_network():
    """In float64, but for the sinusoids and the rotary angles."""
    model = build().double().eval()
    x, sigma = inputs(model)
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(model.hidden(x, sigma), released.hidden(w, x, sigma), rtol=1e-5, atol=1e-5)


# Log-scores of random weights are of order 1 to 15. float32 rounds those by 1e-6, and its sums over 24 blocks are made
# in another order here than there: 1e-5 is what the two statements may differ by.
@pytest.mark.costly("python/sedd/network.py", "tests/released.py")
@pytest.mark.parametrize(
    ("preset", "process", "length"),
    [("small", Absorbing(50257), 24), ("small", Uniform(50257), 24), ("medium", Absorbing(50257), 8)],
    ids=["small-absorbing", "small-uniform", "medium-absorbing"],
)
def test_log_scores_are_those_of_the_released_model(preset, process, length):

    sizes = PRESETS[preset]
    weights = released.random_weights(sizes.hidden_size, sizes.n_blocks, sizes.n_heads, process.dim)
    with torch.device("meta"):
        model = SEDD(preset, process)
    load_weights(model, weights, Path("random weights"))
    x = torch.randint(process.dim, (2, length), generator=torch.Generator().manual_seed(1))
    if process.mask_id is not None:
        x[:, ::2] = process.mask_id
    sigma = torch.tensor([0.05, 3.0])
    with torch.no_grad():
        expected = released.log_score(weights, x, sigma, scale_by_sigma=process.family == "absorbing")
        log_score = model.eval()(x, sigma)
    assert 1 < float(log_score.std()) < 20
    torch.testing.assert_close(log_score, expected, rtol=0, atol=1e-5)


def test_order_of_tokens_matters_and_all_positions_see_each_other():
    model = build().eval()
    x, sigma = inputs(model, batch=1)
    hidden = model.hidden(x, sigma)
    other = x.clone()
    other[0, -1] = (other[0, -1] + 1) % model.dim
    assert bool(((model.hidden(other, sigma) - hidden).abs().amax(-1) > 0).all())
    flipped = model.hidden(x.flip(1), sigma).flip(1)
    assert not torch.allclose(flipped, hidden, atol=1e-3)


def test_bfloat16_autocast_keeps_the_tail_in_float32():
    model = build().eval()
    x, sigma = inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, log_score = model.hidden(x, sigma), model(x, sigma)
        raw = model.head(hidden)
    assert hidden.dtype == torch.float32
    assert raw.dtype == torch.bfloat16
    assert log_score.dtype == torch.float32
    exact = model(x, sigma)
    assert float((log_score - exact).detach().abs().max()) < 0.05 * float(exact.detach().abs().max())


def test_conditioning_stays_in_float32_under_autocast():
    model = build().eval()
    outputs = []
    for layer in (
        model.sigma_map,
        *(block.adaLN_modulation for block in model.blocks),
        model.output_layer.adaLN_modulation,
    ):
        layer.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    x, sigma = inputs(model)
    model(x, sigma)
    plain, outputs[:] = list(outputs), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x, sigma)
    assert len(plain) == len(outputs) == 4
    for a, b in zip(plain, outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_dropout_drops_in_training_only():
    model = build(dropout=0.5)
    x, sigma = inputs(model)
    assert not torch.equal(model(x, sigma), model(x, sigma))
    model.eval()
    torch.testing.assert_close(model(x, sigma), model(x, sigma), rtol=0, atol=0)


def test_every_parameter_gets_a_gradient():
    model = build()
    x, sigma = inputs(model)
    model(x, sigma).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_compiles_in_one_graph():
    model = build().eval()
    x, sigma = inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, sigma), model(x, sigma), rtol=1e-5, atol=1e-5)


def test_device_of():
    assert device_of(build()) == torch.device("cpu")
    with torch.device("meta"):
        assert device_of(build()) == torch.device("meta")


GOOD = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2)


@pytest.mark.parametrize(
    ("x", "sigma", "error", "message"),
    [
        (GOOD[0].int(), GOOD[1], TypeError, r"x_t: expected an int64 tensor \[B, L\], got torch.int32"),
        (GOOD[0][0], GOOD[1], ValueError, r"x_t: .* got shape \[4\]"),
        (GOOD[0][:, :0], GOOD[1], ValueError, r"x_t: .* got shape \[2, 0\]"),
        (GOOD[0] + N_VOCAB + 1, GOOD[1], ValueError, r"x_t: expected tokens in \[0, 12\), got values from 12 to 12"),
        (GOOD[0] - 1, GOOD[1], ValueError, r"x_t: .* got values from -1 to -1"),
        (GOOD[0], GOOD[1].long(), TypeError, r"sigma: .* got torch.int64"),
        (GOOD[0], torch.ones(3), ValueError, r"sigma: expected shape \[2\].*got \[3\]"),
        (GOOD[0], torch.ones(2, 1), ValueError, r"sigma: expected shape \[2\].*got \[2, 1\]"),
        (GOOD[0], torch.tensor([1.0, 0.0]), ValueError, r"sigma: expected positive finite values, got \[1.0, 0.0\]"),
        (GOOD[0], torch.tensor([1.0, math.nan]), ValueError, r"sigma: .*nan"),
        (GOOD[0], torch.tensor([math.inf, 1.0]), ValueError, r"sigma: .*inf"),
    ],
)
def test_bad_input(x, sigma, error, message):
    with pytest.raises(error, match=message):
        build()(x, sigma)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: expected a positive int, got 0"),
        ({"n_blocks": -1}, "n_blocks: .* got -1"),
        ({"hidden_size": 30, "n_heads": 2}, "hidden_size: expected a multiple of 2 . n_heads = 4, got 30"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**sizes)


def test_unknown_preset():
    message = "config: expected a ModelConfig or one of tiny, small, medium, large, got 'huge'"
    with pytest.raises(ValueError, match=message):
        SEDD("huge", Absorbing(5))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rounded_frequencies_become_exact_again(half: torch.dtype) -> None:
    config = ModelConfig(hidden_size=32, n_blocks=1, n_heads=2, cond_dim=8, length=8)
    saved, exact = DiffusionTransformer(config, 11).to(half).state_dict(), DiffusionTransformer(config, 11)
    rounded, wanted = saved["rotary_emb.inv_freq"].float(), exact.rotary_emb.inv_freq.clone()
    assert not torch.equal(rounded, wanted)
    exact.load_state_dict(saved)
    assert torch.equal(exact.rotary_emb.inv_freq, wanted)
    for others in (2 * rounded, torch.zeros_like(rounded)):  # of another model, and of learned positions
        exact.load_state_dict({**saved, "rotary_emb.inv_freq": others})
        assert torch.equal(exact.rotary_emb.inv_freq, others)
