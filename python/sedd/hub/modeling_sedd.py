"""A discrete diffusion model (SEDD, MD4 and others) in plain PyTorch, for ``AutoModel`` of transformers.

The package sedd_ext (MIT licence) trains such models and writes this file beside their weights. It needs only torch and
transformers::

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    tokens = model.sample(batch=4, steps=128)  # [4, length]
    output = model(tokens, t=0.5)  # output.log_score and output.logits, [4, length, N]

It is for inference: there are no losses and no dropout. sedd_ext has them, faster kernels and more samplers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput  # type: ignore[attr-defined]

SCORE_OBJECTIVES = ("score_entropy", "concrete_score", "implicit_score_entropy")
"""Objectives whose networks estimate log-scores. The networks of the others predict the clean token."""


class SEDDConfig(PretrainedConfig):
    """The content of ``config.json``.

    Args:
        tokens: size of the vocabulary, without MASK.
        tokenizer: name of the tokeniser, or "tokenizer.json" for that file.
        graph: ``type`` of the noise: absorb (tokens become MASK, the last token), uniform, or hybrid (both), where
            ``uniform_fraction`` is the fraction of noise that is uniform.
        noise: ``type`` of the schedule: loglinear, cosine, polynomial or geometric; and its parameters.
        model: sizes of the network.
        objective: the loss of the training.
        objective_params: its parameters.
        **kwargs: options of transformers.
    """

    model_type = "sedd"

    def __init__(
        self,
        tokens: int = 1,
        tokenizer: str | None = None,
        graph: dict[str, Any] | None = None,
        noise: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        objective: str = "score_entropy",
        objective_params: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens, self.tokenizer = tokens, tokenizer
        self.graph, self.noise, self.model = graph or {}, noise or {}, model or {}
        self.objective, self.objective_params = objective, objective_params or {}
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


@dataclass
class SEDDOutput(ModelOutput):
    """Output of the model for tokens x_t [B, L].

    Attributes:
        log_score: log p_t(y) / p_t(x_t) for every token y at every position, [B, L, N]; 0 for y = x_t. None for
            genmd4, which has none.
        logits: output of the head [B, L, N]. Its softmax without MASK predicts the clean token, unless the model was
            trained to estimate log-scores; it does so at masked positions of absorbing models in any case.
    """

    log_score: Tensor | None = None
    logits: Tensor | None = None


class SEDDTable(nn.Module):
    """A table of vectors."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(rows, width) * 0.02)

    def forward(self, index: Tensor) -> Tensor:
        """The rows of these indices."""
        return F.embedding(index, self.embedding)


class SEDDNoiseLevel(nn.Module):
    """Conditioning vectors [B, cond_dim] of the total noise [B]."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))

    def forward(self, sigma: Tensor) -> Tensor:
        """See the class."""
        exponents = torch.arange(128, dtype=torch.float32, device=sigma.device) / 128
        angles = sigma.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.silu(self.mlp(waves.to(next(self.mlp.parameters()).dtype)))


class SEDDRotary(nn.Module):
    """Cosines and sines [L, d_head / 2] by which queries and keys are turned; of an image, by row and by column."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, shape: list[int], learned: bool) -> None:
        super().__init__()
        self.head_dim, self.shape, self.learned = head_dim, shape, learned
        self.register_buffer("inv_freq", self._frequencies(None))

    def _frequencies(self, device: torch.device | None) -> Tensor:
        axes = 2 if self.shape else 1
        exponents = torch.arange(0, self.head_dim, 2 * axes, dtype=torch.float32, device=device) / self.head_dim
        return (10_000.0**-exponents).repeat(axes) * (not self.learned)

    def forward(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; for positions [L]."""
        places, frequencies = places.float(), self.inv_freq
        if frequencies.dtype != torch.float32:  # too coarse for the angles
            frequencies = self._frequencies(places.device)
        if self.shape:
            pixels, half = places // self.shape[2], len(frequencies) // 2
            axes = (pixels // self.shape[1], pixels % self.shape[1])
            angles = torch.cat([torch.outer(axis, frequencies[:half]) for axis in axes], dim=1)
        else:
            angles = torch.outer(places, frequencies)
        return angles.cos(), angles.sin()


class SEDDBlock(nn.Module):
    """Attention and MLP, with shifts, scales and gates made from the conditioning vector (adaLN)."""

    def __init__(self, dim: int, heads: int, cond_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """States [B, L, d] after the block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        qkv = self.attn_qkv(torch.addcmul(shift1, self.norm1(x), 1 + scale1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [B, head, L, d_head]
        q, k = (_turned(each, cos, sin).to(v.dtype) for each in (q, k))
        attention = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = torch.addcmul(x, gate1, self.attn_out(attention))
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class SEDDOutputLayer(nn.Module):
    """The last norm, modulated (``forward``), and the head ``linear``, which is called separately."""

    def __init__(self, dim: int, cond_dim: int, vocabulary: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, bias=False)
        self.linear = nn.Linear(dim, vocabulary)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * dim)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """States before the head [B, L, d]."""
        shift, scale = self.adaLN_modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm_final(x), 1 + scale)


class SEDDSchedules(nn.Module):
    """A schedule for each token, as genmd4 learns them: token k is noised by time t with probability (1-ε) t^w_k."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.raw_power = nn.Parameter(torch.zeros(tokens))

    def forward(self) -> Tensor:
        """The powers w [N], 1 for MASK."""
        return F.pad(F.softplus(self.raw_power.float()), (0, 1), value=1.0)


class SEDDModel(PreTrainedModel):
    """A diffusion transformer with its noise process and schedule.

    Args:
        config: the content of ``config.json``.

    Raises:
        ValueError: a noise or a schedule that this file does not have.
    """

    config_class = SEDDConfig
    base_model_prefix = "model"
    _no_split_modules = ["SEDDBlock"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: SEDDConfig) -> None:
        super().__init__(config)
        for name, known in (("graph", "absorb uniform hybrid"), ("noise", "loglinear cosine polynomial geometric")):
            kind = getattr(config, name).get("type")
            if kind not in known.split():
                raise ValueError(f"{name}.type: expected one of {', '.join(known.split())}; got {kind!r}")
        sizes, shape = config.model, list(config.model.get("shape") or [])
        dim, cond_dim, length = sizes["hidden_size"], sizes["cond_dim"], sizes["length"]
        self.mask_id = None if config.graph["type"] == "uniform" else config.tokens
        self.vocabulary = config.tokens + (self.mask_id is not None)
        self.vocab_embed = SEDDTable(self.vocabulary, dim)
        self.sigma_map = SEDDNoiseLevel(cond_dim)
        self.classes = sizes.get("classes", 0)
        self.label_embed = SEDDTable(self.classes + 1, cond_dim) if self.classes else None
        learned = sizes.get("positions") == "learned"
        self.rotary_emb = SEDDRotary(dim // sizes["n_heads"], shape, learned)
        self.axes = [length] if learned else shape  # one table of positions for each axis, one after the other
        self.position_embed = SEDDTable(sum(self.axes), dim) if self.axes else None
        self.blocks = nn.ModuleList(SEDDBlock(dim, sizes["n_heads"], cond_dim) for _ in range(sizes["n_blocks"]))
        self.output_layer = SEDDOutputLayer(dim, cond_dim, self.vocabulary)
        self.schedule = SEDDSchedules(config.tokens) if config.objective == "genmd4" else None
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        sigma: Tensor | float | None = None,
        t: Tensor | float | None = None,
        labels: Tensor | None = None,
    ) -> SEDDOutput:
        """Log-scores of all tokens at all positions, and the logits that they are made from, in float32.

        Args:
            input_ids: noised tokens x_t [B, L].
            sigma: total noise of each sequence, one number or [B], positive.
            t: the time in (0, 1] instead of the total noise, one number or [B].
            labels: for a model with classes: the class of each sequence [B]; None for no class.
        """
        if (sigma is None) == (t is None):
            raise ValueError(f"sigma, t: expected one of them, got {'neither' if t is None else 'both'}")
        level = torch.as_tensor(sigma) if t is None else self.total(t)
        level = level.reshape(-1).to(input_ids.device)
        if len(level) not in (1, len(input_ids)):
            raise ValueError(f"sigma, t: expected one number or {len(input_ids)}, got {len(level)}")
        logits = self._head(self.hidden(input_ids, level, labels))
        log_score = None if self.schedule is not None else self.log_score(logits, input_ids, level[:, None])
        return SEDDOutput(log_score=log_score, logits=logits)

    def hidden(self, input_ids: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """States before the head [B, L, d], for total noise [B] or [1]; see :meth:`forward`."""
        sizes, length = self.config.model, input_ids.shape[1]
        if length != sizes["length"] and (sizes.get("shape") or (self.axes and length > sizes["length"])):
            raise ValueError(f"input_ids: expected sequences of {sizes['length']} tokens, got {length}")
        if labels is not None and self.label_embed is None:
            raise ValueError("labels: expected none for a model without classes, got some")
        condition = self.sigma_map(sigma if sizes["time_conditioning"] else torch.zeros_like(sigma[:1]))
        if self.label_embed is not None:
            condition = condition + self.label_embed(
                labels if labels is not None else input_ids.new_tensor([self.classes])
            )
        x, places = self.vocab_embed(input_ids), torch.arange(length, device=input_ids.device)
        if self.position_embed is not None:
            first, stride = 0, math.prod(self.axes)
            for count in self.axes:
                stride //= count
                x = x + self.position_embed(first + places // stride % count)
                first += count
        cos, sin = self.rotary_emb(places)
        for block in self.blocks:
            x = block(x, condition, cos, sin)
        states: Tensor = self.output_layer(x, condition)
        return states

    def _head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.output_layer.linear(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def total(self, t: Tensor | float) -> Tensor:
        """Total noise σ̄(t) in float64: a token is kept until t with probability exp(-σ̄)."""
        noise, params = self.config.noise, self.config.objective_params
        time = torch.as_tensor(t, dtype=torch.float64)
        if self.schedule is not None:
            return -torch.log1p(-(1 - noise["eps"]) * self._power_time(time))
        in_steps = self.config.objective == "d3pm"
        if in_steps:
            time = torch.ceil(time * params["steps"] - 1e-9).clamp(min=0) / params["steps"]
        if noise["type"] == "geometric":
            total = noise["sigma_min"] * torch.exp(time * math.log(noise["sigma_max"] / noise["sigma_min"]))
        else:
            moved = torch.sin(math.pi / 2 * time) if noise["type"] == "cosine" else time ** noise.get("power", 1.0)
            total = -torch.log1p(-(1 - noise["eps"]) * moved)
        return torch.where(time > 0, total, 0.0) if in_steps else total

    def _power_time(self, t: Tensor) -> Tensor:
        start: float = self.config.objective_params["start"]
        return start + (1 - start) * t

    def stationary(self, device: torch.device | None = None) -> Tensor:
        """The distribution π of fully noised tokens, float64 [N]."""
        share = {"absorb": 0.0, "uniform": 1.0}.get(
            self.config.graph["type"], self.config.graph.get("uniform_fraction")
        )
        pi = torch.full((self.vocabulary,), share / self.config.tokens, dtype=torch.float64, device=device)
        if self.mask_id is not None:
            pi[self.mask_id] = 1 - share
        return pi

    def log_score(self, logits: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Log-scores [*B, N] from the head's output [*B, N] for tokens [*B] and their total noise."""
        n, kind, sizes = self.vocabulary - 1, self.config.graph["type"], self.config.model
        share = 1 - float(self.stationary()[-1])  # of uniform noise, in a hybrid process
        log_score = logits
        if self.config.objective not in SCORE_OBJECTIVES:
            log_score = self._log_mixture(logits, x_t, sigma, sigma)
        elif kind == "absorb" and sizes["scale_by_sigma"]:
            shift = sigma + torch.log(-torch.expm1(-sigma)) + math.log(n)
            log_score = logits - shift.to(logits.dtype).unsqueeze(-1)
        elif kind == "hybrid" and sizes["hybrid_shift"] and share < 1:
            moved = -torch.expm1(-sigma)
            shift = torch.log(moved / (torch.exp(-sigma) + moved * share)) + math.log(n * (1 - share))
            log_score = logits - (shift * (x_t == n)).to(logits.dtype).unsqueeze(-1)
        return log_score.scatter(-1, x_t.unsqueeze(-1), 0.0)

    def _log_mixture(self, logits: Tensor, x_t: Tensor, sigma: Tensor, sigma_s: Tensor) -> Tensor:
        """log Σ_k μ_k q_s(y | k) / q_t(x_t | k) for all tokens y; μ = softmax(logits) is the prediction."""
        pi, dtype = self.stationary(logits.device), logits.dtype
        # kept [x = k] + at_x is q_t(x | k)
        kept, at_x = torch.exp(-sigma).to(dtype), (-torch.expm1(-sigma) * pi[x_t]).to(dtype)
        log_ratio = self._log_mean(logits) - torch.log(kept.unsqueeze(-1) * self._one_hot(x_t) + at_x.unsqueeze(-1))
        spread = torch.log(-torch.expm1(-sigma_s).unsqueeze(-1) * pi).to(dtype) + log_ratio.logsumexp(-1, keepdim=True)
        mixture = torch.logaddexp(log_ratio - sigma_s.to(dtype).unsqueeze(-1), spread)
        return mixture.masked_fill((pi == 0)[x_t].unsqueeze(-1), 0.0)  # no noise leads to such a token

    def _log_mean(self, logits: Tensor) -> Tensor:
        if self.mask_id is not None:
            logits = logits.index_fill(-1, torch.tensor([self.mask_id], device=logits.device), -math.inf)
        return logits.log_softmax(-1)

    def _one_hot(self, x: Tensor) -> Tensor:
        return torch.arange(self.vocabulary, device=x.device) == x.unsqueeze(-1)

    def reverse_probs(self, logits: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor | None = None) -> Tensor:
        """Probabilities [R, N] of tokens at the earlier time t_next, or of clean tokens (None), given x_t [R] at t.

        The R positions of an absorbing model are masked: others do not change.
        """
        here = self._one_hot(x_t)
        if self.schedule is not None:  # each token has a schedule of its own
            ratio = 0.0 if t_next is None else float(self._power_time(t_next) / self._power_time(t))
            weights = self._log_mean(logits).exp() * (1 - ratio ** self.schedule())
            weights = torch.where(here, 1 - weights.sum(-1, keepdim=True), weights)
        else:  # Tweedie's formula: SEDD, equation 19
            sigma, pi = self.total(t).to(x_t.device).expand(x_t.shape), self.stationary(x_t.device)
            sigma_s = torch.zeros_like(sigma) if t_next is None else self.total(t_next).to(sigma).expand_as(sigma)
            step = (sigma - sigma_s).unsqueeze(-1)
            if self.config.objective in SCORE_OBJECTIVES:
                score = self.log_score(logits, x_t, sigma).double().exp()
                earlier = score + torch.expm1(step) * (score - pi * score.sum(-1, keepdim=True))
            else:
                earlier = self._log_mixture(logits, x_t, sigma, sigma_s).exp()
            weights = earlier.clamp(min=0) * (torch.exp(-step) * here - torch.expm1(-step) * pi[x_t].unsqueeze(-1))
        if t_next is None and self.mask_id is not None:
            weights[..., self.mask_id] = 0.0
        probs: Tensor = weights / weights.sum(-1, keepdim=True)
        return probs

    @torch.no_grad()
    def sample(
        self,
        batch: int = 1,
        length: int | None = None,
        steps: int = 128,
        *,
        fixed: tuple[Tensor, Tensor] | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws sequences [batch, length] in a number of reverse steps (Tweedie τ-leaping) and a denoising step.

        Args:
            batch: number of sequences.
            length: their tokens; None: the length that the model was trained on.
            steps: number of reverse steps.
            fixed: for infilling: tokens and where they are given (bool), each [length] or [batch, length].
            labels: for a model with classes: the class of each sequence [batch].
            generator: random number generator, on the model's device.
        """
        shape = (batch, length or self.config.model["length"])
        pi = self.stationary(self.device).float()
        x = torch.multinomial(pi, math.prod(shape), replacement=True, generator=generator).view(shape)
        free = torch.ones_like(x, dtype=torch.bool)
        if fixed is not None:
            tokens, is_fixed = (each.to(self.device).expand(shape) for each in fixed)
            x, free = torch.where(is_fixed, tokens, x), ~is_fixed
        times = 1e-5 + (1 - 1e-5) * torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        for t, t_next in zip(times, [*times[1:], None], strict=True):
            where = free & (x == self.mask_id) if self.config.graph["type"] == "absorb" else free
            noise = self.total(t) - (0 if t_next is None else self.total(t_next))
            if where.any() and noise > 0:
                hidden = self.hidden(x, self.total(t).reshape(1).to(self.device), labels)
                probs = self.reverse_probs(self._head(hidden[where]), x[where], t, t_next)
                x[where] = torch.multinomial(probs, 1, generator=generator)[:, 0]
        return x
