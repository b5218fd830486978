"""The network: a diffusion transformer (DDiT) with adaLN-zero conditioning on the total noise σ̄.

Parameter names and shapes are those of the released SEDD models, so that their weights load unchanged. Attention is
torch's own ``scaled_dot_product_attention``; a causal network may keep keys and values between calls. The network is
written for mixed precision by autocast: matrix products run in the autocast dtype; the residual stream, layer norms and
the conditioning stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sedd.embeddings import LabelEmbedding, LearnedPositions, Rotary, SigmaEmbedding

__all__ = ["PRESETS", "DiffusionTransformer", "KeyValueCache", "ModelConfig", "Network", "compile_network"]


@dataclass
class ModelConfig:
    """The size of a :class:`DiffusionTransformer`, and how its output becomes log-scores.

    Attributes:
        hidden_size: d, the width of the residual stream.
        n_blocks: number of transformer blocks.
        n_heads: number of attention heads; d / n_heads must be even (rotary positions turn pairs).
        cond_dim: width of the conditioning vector made from σ̄.
        length: number of tokens the network is trained on and samples by default. No parameter depends on it.
        dropout: probability of dropping an output of attention or MLP before it joins the residual stream.
        scale_by_sigma: for absorbing processes, subtract ``log expm1(σ̄) + log(N-1)`` from the head's output, which
            centres the log-scores at every σ̄. Other processes ignore it.
        hybrid_shift: the same for hybrid processes, see :meth:`sedd.diffusion.Score.log_score_shift`. Other processes
            ignore it. Hybrid models that were saved before this option existed load without it.
        time_conditioning: whether the network is given σ̄. Without it, the network depends on the tokens alone (its
            conditioning is that of σ̄ = 0), and samplers call it only for sequences whose tokens have changed. Set to
            False for a causal network.
        causal: whether each position sees only itself and the positions before it, as autoregressive models need.
        shape: rows, columns and channels of an image, whose values are the tokens in this order; empty for text. Its
            product is ``length``, and the network reads no other length.
        positions: how the network knows the position of a token. ``rotary``: by turning queries and keys; for images,
            half of their pairs by the row and half by the column, and embeddings of row, column and channel are added
            to that of the token. ``learned``: an embedding of the position is added instead.
        classes: number of classes of the data, if the network is conditioned on the class. An embedding of the class,
            or of no class, is added to that of the noise.
        trunk: for a network adapted from a model of ``transformers`` (:class:`sedd.adapted.AdaptedTransformer`): the
            ``model_type`` and the entries of its configuration. Empty for a :class:`DiffusionTransformer`.
        shift: for an adapted network: the output of a position is read from the state of the position before it, which
            predicts the next token in a causal model.

    Raises:
        ValueError: a size is not positive, sizes do not fit together, or dropout is not in [0, 1).
    """

    hidden_size: int = 768
    n_blocks: int = 12
    n_heads: int = 12
    cond_dim: int = 128
    length: int = 1024
    dropout: float = 0.1
    scale_by_sigma: bool = True
    time_conditioning: bool = True
    hybrid_shift: bool = True
    causal: bool = False
    shape: tuple[int, ...] = ()
    positions: str = "rotary"
    classes: int = 0
    trunk: dict[str, Any] = field(default_factory=dict)
    shift: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes."""
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        self.time_conditioning = self.time_conditioning and not self.causal
        for name in ("hidden_size", "n_blocks", "n_heads", "cond_dim", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive int, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.n_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * n_heads = {2 * self.n_heads}, got {self.hidden_size}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")
        if self.classes < 0 or (self.causal and self.classes):
            wanted = "0 for a causal network" if self.causal else "at least 0"
            raise ValueError(f"classes: expected {wanted}, got {self.classes}")
        if self.shape:
            self._check_shape()

    def _check_shape(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape: expected rows, columns and channels, got {list(self.shape)}")
        if self.length != math.prod(self.shape):
            raise ValueError(
                f"length: expected {math.prod(self.shape)}, the tokens of a block of "
                f"{' x '.join(map(str, self.shape))}, got {self.length}"
            )
        if self.hidden_size % (4 * self.n_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 4 * n_heads = {4 * self.n_heads} for rows and columns, "
                f"got {self.hidden_size}"
            )


POSITIONS = ("rotary", "learned")
"""The choices of :attr:`ModelConfig.positions`."""

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(hidden_size=128, n_blocks=4, n_heads=2, length=128, dropout=0.0),
    "small": ModelConfig(),
    "medium": ModelConfig(hidden_size=1024, n_blocks=24, n_heads=16),
    "large": ModelConfig(hidden_size=2048, n_blocks=24, n_heads=32),
}
"""Sizes by name: ``tiny`` learns on two CPU cores in minutes, ``small`` and ``medium`` are those of Lou, Meng & Ermon
(2024), ``large`` (1.45 billion parameters) is that of Deschenaux & Gulcehre (2024), table 7."""


class Network(Protocol):
    """What :class:`sedd.diffusion.Diffusion` needs of a network: :class:`DiffusionTransformer`, or your own module.

    States and head are separate, so that the head runs only at positions that need it, and a linear head can be fused
    with the loss and the sampler.
    """

    training: bool
    time_conditioning: bool
    """Whether :meth:`hidden` depends on sigma."""

    def hidden(self, x_t: Tensor, sigma: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """States before the head, [B, L, d], of tokens x_t [B, L] (int64) at total noise sigma, [B] or [1].

        ``labels`` is the class of each sequence [B]. A network without classes is called without it.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """The network's output [*, N] for states [*, d]."""
        ...

    def head_parameters(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight [N, d] and bias ([N] or None) of a linear head; None if the head is not linear."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Switches between training and evaluation, as :meth:`torch.nn.Module.train`."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters, as :meth:`torch.nn.Module.parameters`."""
        ...


def compile_network(network: DiffusionTransformer) -> None:
    """Makes the blocks of this network run through ``torch.compile``, for any batch size."""
    for block in network.blocks:
        block.compile(dynamic=True)


class KeyValueCache:
    """Keys and values of the positions that a causal network has read, so that it need not read them again.

    Pass the same cache to successive calls of :meth:`DiffusionTransformer.hidden`, each with the next tokens of the
    same sequences.

    Attributes:
        capacity: the most positions that it can hold.
        length: positions read so far.

    Args:
        capacity: see above.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, head, L, d_head] of the next L positions of a block; returns those of all so far.

        ``length`` stays: the network adds L to it when all blocks have stored theirs.
        """
        if block not in self._blocks:
            batch, heads, _, dim = k.shape
            shape = (batch, heads, self.capacity, dim)
            self._blocks[block] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[2]
        for stored, new in zip(self._blocks[block], (k, v), strict=True):
            stored[:, :, self.length : end] = new
        keys, values = self._blocks[block]
        return keys[:, :, :end], values[:, :, :end]


class _Embedding(nn.Module):
    def __init__(self, dim: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        rows: Any = self.embedding
        mesh = getattr(rows, "device_mesh", None)
        if mesh is None:
            return F.embedding(x, rows)
        # each process has some rows (DTensor's embedding would make the gradient of all of them)
        from torch.distributed.tensor import DTensor, Partial

        x = x - mesh.get_local_rank() * -(-rows.shape[0] // mesh.size())
        mine = rows.to_local()
        is_here = (x >= 0) & (x < len(mine))
        part = F.embedding(x.where(is_here, 0), mine) * is_here.unsqueeze(-1)
        return _whole(DTensor.from_local(part, mesh, [Partial()], run_check=False))


def _like(x: Tensor, weight: Tensor) -> Tensor:
    """A tensor that all processes have, as an argument beside a weight that may be divided among them."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Replicate

    result: Tensor = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return result


def _whole(x: Tensor) -> Tensor:
    """The result in all processes."""
    result: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + d/2}) of [..., L, d_head]; float32 for a bfloat16 x."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, causal: bool, past: tuple[int, KeyValueCache] | None
) -> Tensor:
    """Attention of every position to every other, [B, head, L, d_head], in v's dtype or float32.

    Causal attention is to the positions before and the position itself; ``past`` (the number of the block, and the
    cache) adds the positions of earlier calls in front.
    """
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    # On the CPU attention is done in float32: torch's bfloat16 backward there takes twice as long as its float32 one.
    dtype = q.dtype if q.device.type == "cpu" else v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    mask = None
    if past is not None:
        block, cache = past
        k, v = cache.extend(block, k, v)
        if cache.length > 0 and q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(cache.length)
        causal = causal and cache.length == 0  # one new position sees all, several need the mask
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _modulation(linear: nn.Linear, condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The shifts, scales and gates [B, 1, d] made from the conditioning vector, in float32 under autocast too."""
    with torch.autocast(condition.device.type, enabled=False):
        modulation: Tensor = linear(condition)
    return modulation.unsqueeze(1).chunk(parts, dim=-1)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class _Linear(nn.Linear):
    """Computes in the dtype of its input. FSDP may have gathered its parameters in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _LayerNorm(nn.LayerNorm):
    """Computes in the dtype of its input. FSDP may have gathered its weight in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), eps=self.eps)


class _Block(nn.Module):
    """Attention, then MLP, each behind a modulated layer norm and gated into the residual stream (adaLN-zero)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.n_heads = config.n_heads
        self.causal = config.causal
        self.norm1 = _LayerNorm(dim, bias=False)
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.norm2 = _LayerNorm(dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(config.dropout)
        self.adaLN_modulation = _zero(_Linear(config.cond_dim, 6 * dim))

    def forward(
        self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor, past: tuple[int, KeyValueCache] | None
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(self.adaLN_modulation, condition, 6)
        qkv = self.attn_qkv(_modulate(self.norm1(x), shift1, scale1))
        # [B, L, (three, head, dim)] -> three tensors [B, head, L, dim]
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = self.attn_out(_attend(q, k, v, cos, sin, self.causal, past).transpose(1, 2).flatten(-2))
        x = torch.addcmul(x, gate1, self.dropout(attention))
        mlp = self.mlp(_modulate(self.norm2(x), shift2, scale2))
        return torch.addcmul(x, gate2, self.dropout(mlp))


class _OutputLayer(nn.Module):
    """The last modulated layer norm (``forward``), and the head ``linear``, which runs separately."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(config.hidden_size, bias=False)
        self.linear = _zero(nn.Linear(config.hidden_size, vocabulary))
        self.adaLN_modulation = _zero(nn.Linear(config.cond_dim, 2 * config.hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = _modulation(self.adaLN_modulation, condition, 2)
        return _modulate(self.norm_final(x), shift, scale)


class DiffusionTransformer(nn.Module):
    """The transformer of SEDD: tokens and total noise in, N numbers for every position out.

    Attributes:
        activation_checkpointing: compute the activations of the blocks again in the backward pass, instead of storing
            them.

    Args:
        config: the sizes, or the name of one of :data:`PRESETS`.
        dim: N, the size of the vocabulary, MASK included: rows of embedding and head.

    Raises:
        ValueError: no preset of that name.

    Source: SEDD (Lou, Meng & Ermon 2024), section 5 and appendix C.2; adaLN-zero from DiT (Peebles & Xie 2023).
    """

    def __init__(self, config: ModelConfig | str, dim: int) -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in PRESETS:
                raise ValueError(f"config: expected a ModelConfig or one of {', '.join(PRESETS)}, got {config!r}")
            config = PRESETS[config]
        self.config = config
        self.dim = dim
        self.time_conditioning = config.time_conditioning
        self.causal = config.causal
        self.activation_checkpointing = False
        self._build(config, dim)

    def _build(self, config: ModelConfig, dim: int) -> None:
        """Makes the layers."""
        if config.trunk:
            raise ValueError(
                f"trunk: expected none for a DiffusionTransformer, got {config.trunk.get('model_type')}; "
                "sedd.adapted.make_network makes the network"
            )
        self.vocab_embed = _Embedding(config.hidden_size, dim)
        self.sigma_map = SigmaEmbedding(config.cond_dim)
        self.label_embed = LabelEmbedding(config.classes, config.cond_dim) if config.classes else None
        self.rotary_emb = Rotary(config.hidden_size // config.n_heads, config.shape)
        self.position_embed: LearnedPositions | None = None
        if config.positions == "learned":
            self.rotary_emb.inv_freq.zero_()  # nothing turns
            self.position_embed = LearnedPositions((config.length,), config.hidden_size)
        elif config.shape:  # distances alone do not say where the border of the image is
            self.position_embed = LearnedPositions(config.shape, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_blocks))
        self.output_layer = _OutputLayer(config, dim)

    def hidden(
        self, x_t: Tensor, sigma: Tensor, cache: KeyValueCache | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """States before the head: everything before the vocabulary axis.

        Args:
            x_t: tokens [B, L], int64.
            sigma: total noise σ̄ of each sequence [B], floating point, > 0; or [1] if all have the same.
            cache: for a causal network: the positions before these, to which these are added.
            labels: for a network with classes: the class of each sequence [B], int64, or ``config.classes`` for no
                class. None: no class for all.

        Returns:
            States [B, L, d].

        Raises:
            TypeError: ``x_t`` is not int64 or ``sigma`` not floating point.
            ValueError: wrong shapes, a length that the positions do not have, a token outside [0, N), or a σ̄ that is
                not positive and finite (values are checked on the CPU only: on a GPU the check would wait for the
                device); a cache for a network that is not causal, or one that is full.
        """
        self._check(x_t, sigma)
        start = 0 if cache is None else self._start(cache, x_t.shape[1])
        self._check_length(x_t.shape[1], start)
        if labels is not None:
            self._check_labels(labels, x_t)
        with torch.autocast(x_t.device.type, enabled=False):
            condition = self.sigma_map(sigma if self.time_conditioning else torch.zeros_like(sigma[:1]))
            if self.label_embed is not None:
                condition = self.label_embed(condition, labels)
        x = self.vocab_embed(x_t)
        if self.position_embed is not None:
            x = self.position_embed(x, start)
        cos, sin = self.rotary_emb(x_t.shape[1], start)
        again = self.training and self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            past = None if cache is None else (i, cache)
            if again:
                x = checkpoint(block, x, condition, cos, sin, past, use_reentrant=False)
            else:
                x = block(x, condition, cos, sin, past)
        if cache is not None:
            cache.length += x_t.shape[1]
        hidden: Tensor = self.output_layer(x, condition)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """The output projection: [*, N] for states [*, d], in the autocast dtype."""
        linear = self.output_layer.linear
        return _whole(linear(_like(hidden, linear.weight)))

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [N, d] and bias [N] of :meth:`head`, for the operators that fuse the head with loss or sampler."""
        linear = self.output_layer.linear
        return linear.weight, linear.bias

    def _start(self, cache: KeyValueCache, length: int) -> int:
        """Checks that the cache takes ``length`` more positions; returns the first of them."""
        if not self.causal:
            raise ValueError("cache: expected a causal network, got one whose positions see those after them")
        if cache.length + length > cache.capacity:
            raise ValueError(
                f"cache: expected at most {cache.capacity} positions, got {length} after {cache.length}; make a larger "
                "KeyValueCache"
            )
        return cache.length

    def _check_labels(self, labels: Tensor, x_t: Tensor) -> None:
        classes = self.config.classes
        if not classes:
            raise ValueError("labels: expected none for a network without classes, got some")
        if labels.dtype != torch.int64 or labels.shape != x_t.shape[:1]:
            raise ValueError(f"labels: expected an int64 tensor [{len(x_t)}], got {labels.dtype} {list(labels.shape)}")
        if x_t.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high > classes:
            raise ValueError(f"labels: expected values in [0, {classes}], got values from {low} to {high}")

    def _check_length(self, length: int, start: int) -> None:
        config = self.config
        if config.shape and (start or length != config.length) and not self.causal:
            raise ValueError(
                f"x_t: expected sequences of {config.length} tokens, {' x '.join(map(str, config.shape))}, got {length}"
            )
        if config.positions == "learned" and start + length > config.length:
            raise ValueError(f"x_t: expected at most the {config.length} learned positions, got {start + length}")

    def _check(self, x_t: Tensor, sigma: Tensor) -> None:
        if x_t.dtype != torch.int64:
            raise TypeError(f"x_t: expected an int64 tensor [B, L], got {x_t.dtype}")
        if x_t.dim() != 2 or x_t.numel() == 0:
            raise ValueError(f"x_t: expected a non-empty tensor [B, L], got shape {list(x_t.shape)}")
        if not sigma.is_floating_point():
            raise TypeError(f"sigma: expected a floating-point tensor [B], got {sigma.dtype}")
        if sigma.shape not in (x_t.shape[:1], (1,)):
            raise ValueError(
                f"sigma: expected shape [{x_t.shape[0]}], one value for each sequence of x_t, or [1], "
                f"got {list(sigma.shape)}"
            )
        if x_t.device.type != "cpu" or torch.compiler.is_compiling():
            return
        low, high = (int(value) for value in x_t.aminmax())
        if low < 0 or high >= self.dim:
            raise ValueError(f"x_t: expected tokens in [0, {self.dim}), got values from {low} to {high}")
        if not bool(((sigma > 0) & sigma.isfinite()).all()):
            raise ValueError(f"sigma: expected positive finite values, got {sigma.tolist()}")
