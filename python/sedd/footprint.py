"""Memory and communication of a training run, computed from its options before it starts.

The sizes of parameters come from the model itself, made without memory on the meta device. All sizes are bytes of one
process. What the optimiser works on and what a process sends are exact. Activations and other memory of the passes are
approximate: they leave out small tensors, temporary memory inside operators, the allocator's gaps, and the libraries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size

from sedd.config import TrainConfig
from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.objectives import get_objective
from sedd.diffusion.schedule import get_schedule
from sedd.network import DiffusionTransformer, ModelConfig
from sedd_ext.head import buffer_size, tile_shape

__all__ = ["Collective", "Layout", "Memory", "activations", "collectives", "memory"]

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
FLOAT32, FLOAT64 = 4, 8
SUMS = 3
"""Numbers of a row that the loss of a softmax adds up over a divided vocabulary, unless the process is absorbing."""
BUCKETS = [1 << 20, 25 << 20]
"""DDP's default size of the first bucket of gradients, and of the others."""


@dataclass(frozen=True)
class Layout:
    """How a number of processes trains a model.

    Attributes:
        config: options of the run. The head must be fused, ``precision`` bf16 or fp32. For hsdp, ``parallel.shard`` is
            all processes if it is not given.
        tokens: vocabulary of the tokeniser, MASK not counted.
        processes: number of processes.
        device: what the activations are counted for: cuda or cpu.

    Raises:
        ValueError: numbers do not fit together.
    """

    config: TrainConfig
    tokens: int
    processes: int = 1
    device: str = "cuda"

    def __post_init__(self) -> None:
        """Checks the values."""
        if not self.config.fused_head or self.config.precision == "auto":
            raise ValueError("config: expected a fused head, and precision bf16 or fp32")
        for name in ("tokens", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.processes % self.vocab:
            raise ValueError(f"parallel.vocab: expected a divisor of {self.processes} processes, got {self.vocab}")
        shard = self.config.parallel.shard or self.replicas
        if self.replicas % shard:
            raise ValueError(f"parallel.shard: expected a divisor of {self.replicas}, got {shard}")

    @property
    def vocab(self) -> int:
        """Processes that share a vocabulary, and work on the same sequences."""
        return self.config.parallel.vocab

    @property
    def replicas(self) -> int:
        """Processes that work on different sequences."""
        return self.processes // self.vocab

    @property
    def shard(self) -> int:
        """Processes among which parameters, gradients, moments and moving average are divided."""
        parallel = self.config.parallel
        return 1 if parallel.data == "ddp" else (parallel.shard or self.replicas)

    @property
    def softmax(self) -> bool:
        """Whether the loss needs the log-normaliser of a row before its gradient."""
        return self.config.objective not in ("score_entropy", "concrete_score", "implicit_score_entropy")

    @property
    def compute(self) -> int:
        """Bytes of a number in matrix products: 2 under bfloat16 autocast, else 4."""
        return 2 if self.config.precision == "bf16" else FLOAT32

    @property
    def rows(self) -> int:
        """Tokens of a forward pass."""
        return self.config.batch_size * self.config.model.build().length

    @property
    def network(self) -> ModelConfig:
        """Sizes of the network."""
        return self.config.model.build()

    @property
    def dim(self) -> int:
        """Rows of embedding and head, in all processes."""
        return self.config.make_process(self.tokens).dim

    def diffusion(self) -> Diffusion:
        """The model with this process's rows of embedding and head, on the meta device."""
        return _build(self.config, self.network, math.ceil(self.dim / self.vocab))


def _build(config: TrainConfig, sizes: ModelConfig, dim: int, device: str = "meta") -> Diffusion:
    """A model whose vocabulary has ``dim`` entries."""
    process = config.make_process(dim if config.process == "uniform" else dim - 1)
    objective = get_objective(config.objective, **config.objective_params)
    with torch.device(device):
        schedule = objective.schedule(get_schedule(config.schedule, **config.schedule_params), process)
        network = DiffusionTransformer(sizes, process.dim)
        return Diffusion(network, process, schedule, objective, objective.parameterization(sizes))


@dataclass(frozen=True)
class _Units:
    """Bytes of float32 parameters: of each transformer block and of the rest, whole and as a process's share.

    FSDP divides the first axis of a parameter, and pads it to equal shares.

    Attributes:
        block: a block.
        root: the rest; without embedding and head if these are divided by tokens.
        block_share: a process's share of a block.
        root_share: its share of the rest.
        vocabulary: its rows of embedding and head, if these are divided by tokens: each parameter.
        tensors: number of parameters.
    """

    block: int
    root: int
    block_share: int
    root_share: int
    vocabulary: tuple[int, ...]
    tensors: int

    @staticmethod
    def of(layout: Layout, diffusion: Diffusion) -> _Units:
        def share(parameters: Iterable[nn.Parameter]) -> int:
            return FLOAT32 * sum(math.ceil(len(p) / layout.shard) * p[0].numel() for p in parameters)

        named = dict(diffusion.named_parameters())
        split = [named[name] for name in _VOCABULARY] if layout.vocab > 1 else []
        first = [p for name, p in named.items() if name.startswith("network.blocks.0.")]
        ours = {id(p) for p in split}
        rest = [p for name, p in named.items() if not name.startswith("network.blocks.") and id(p) not in ours]
        whole = [FLOAT32 * sum(p.numel() for p in part) for part in (first, rest)]
        own = tuple(FLOAT32 * p.numel() for p in split)
        return _Units(whole[0], whole[1], share(first), share(rest), own, len(named))


_VOCABULARY = [
    f"network.{name}" for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias")
]
"""The parameters that are divided by tokens."""


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        kept: what the optimiser works on, by name: parameters, gradients, moments, moving average. Exact.
        phases: what there is beside parameters, moments and moving average at the three moments of a step that may need
            most, by name: gradients, gathered parameters, activations, and temporary memory. Approximate.
    """

    kept: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def fullest(self) -> dict[str, int]:
        """The phase that needs most."""
        return max(self.phases.values(), key=lambda parts: sum(parts.values()))

    @property
    def peak(self) -> int:
        """The most memory in use at one time."""
        return sum(self.kept.values()) - self.kept["gradients"] + sum(self.fullest.values())


def activations(layout: Layout) -> tuple[int, int, int]:
    """Bytes that the forward pass keeps for the backward pass, up to small tensors.

    Returns:
        For one transformer block; for each block under activation checkpointing; and for what follows the blocks.
        Under autocast a block also keeps a bfloat16 copy of its weights, because the products need it; with FSDP the
        gathered block is that copy.
    """
    sizes, cuda, w = layout.network, layout.device == "cuda", layout.compute
    d, rows = sizes.hidden_size, layout.rows
    norm = 2 * FLOAT32 * d + 2 * FLOAT32  # its input and output, mean and deviation
    dropout = (1 if cuda else w) * d if sizes.dropout else 0
    branch = (FLOAT32 if cuda else w) * d  # its output, for the gradient of the gate; CUDA's autocast makes it float32
    precise = FLOAT32 if not cuda else w  # of attention
    # q and k after rotation; v, which is a view of all three if it needs no other dtype; the output
    attention = 2 * precise * d + (3 * w * d if precise == w else precise * d) + precise * d + FLOAT32 * sizes.n_heads
    attention += w * d if cuda or precise != w else 0  # the output, with heads side by side
    mlp = 2 * w * 4 * d
    token = 2 * (norm + w * d + dropout + branch) + attention + mlp
    block = _build(layout.config, dataclasses.replace(sizes, n_blocks=1), 2).network.blocks[0]  # type: ignore[attr-defined]
    linears = {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}
    copies = sum(part.weight.numel() for name, part in linears.items() if name != "adaLN_modulation")
    weights = w * copies if w != FLOAT32 and layout.config.parallel.data == "ddp" else 0
    return rows * token + weights, rows * FLOAT32 * d, rows * (norm + FLOAT32 * d)


def _head(layout: Layout, diffusion: Diffusion) -> tuple[int, int, int]:
    """Bytes of the fused head: gradients of weight and bias, gradient of the states, and what it needs while it runs.

    The bound is that of a batch in which each token goes through the head; for absorbing noise half of them do.
    """
    weight, bias = diffusion.network.head_parameters() or (torch.empty(0, 0), None)
    (dim, d), rows, w = weight.shape, layout.rows, layout.compute
    dtype = torch.bfloat16 if w == 2 else torch.float32
    device = torch.device(layout.device)
    buffer = buffer_size(None, device, layout.softmax)
    chunk, width = tile_shape(rows, dim, dtype, device, buffer, layout.softmax)
    temporary = rows * d * ((w if w != FLOAT32 else 0) + FLOAT32) + chunk * width * w  # states, their gradient, tile
    if w != FLOAT32:  # the tile's weight, the gradient of it and its products
        temporary += width * d * (2 * w + FLOAT32) + chunk * d * w
    return FLOAT32 * (weight.numel() + (0 if bias is None else bias.numel())), FLOAT32 * rows * d, temporary


def memory(layout: Layout) -> Memory:
    """What one process needs; the first one, whose share is never smaller than that of another."""
    config, diffusion, sizes, w = layout.config, layout.diffusion(), layout.network, layout.compute
    divides, many = config.parallel.data != "ddp", config.accumulate > 1
    units, blocks = _Units.of(layout, diffusion), sizes.n_blocks
    own = sum(units.vocabulary)
    share = blocks * units.block_share + units.root_share + own
    kept = {"parameters": share, "gradients": share, "moments": 2 * share + FLOAT32 * units.tensors, "average": share}
    full, again, last = activations(layout)
    checkpointed = config.activation_checkpointing
    stored = blocks * (again if checkpointed else full) + last
    weight, states, temporary = _head(layout, diffusion)
    block, root = (units.block, units.root) if divides else (0, 0)
    # DDP's buckets last; FSDP has whole gradients until the last pass of a step divides them
    buckets = 0 if divides else share - own
    whole = (blocks * block + root + own) if many else 0
    embedding = FLOAT32 * diffusion.get_parameter(_VOCABULARY[0]).numel()
    rows, d = layout.rows, sizes.hidden_size
    reduced = block + (block * w // FLOAT32 if w != FLOAT32 else 0)  # gradients of a block; those of 16 bits are copied
    passing = rows * d * (FLOAT32 + w + 4 * w) + 4 * d * d * (FLOAT32 + (w if w != FLOAT32 else 0))
    phases = {
        "loss": {
            "gradients": buckets + whole,
            "gathered": root,
            "activations": stored,
            # CUDA multiplies the gradients by the upstream one, into new memory
            "temporary": weight + states + max(temporary, weight + states if layout.device == "cuda" else 0),
        },
        "blocks": {
            "gradients": buckets + (whole if many else weight if divides or own else 0),
            "gathered": root + 2 * block * w // FLOAT32,
            "activations": stored,
            "temporary": passing + (full - again if checkpointed else 0) + reduced,
        },
        "end": {
            "gradients": buckets + root + own + blocks * units.block_share * divides,
            "gathered": 0,
            "activations": 0,
            "temporary": root + units.root_share if divides else embedding,
        },
    }
    return Memory(kept, phases)


# -- communication -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in an optimiser step.

    Attributes:
        kind: what the processes do.
        what: the tensors, in words.
        size: bytes of the whole tensor: before a reduce-scatter, after an all-gather.
        count: number of calls.
        group: number of processes that take part.
        stride: distance between them, in the numbering of the processes.
    """

    kind: Kind
    what: str
    size: int
    count: int
    group: int
    stride: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a process sends in all calls, in a ring: the least possible for these collectives."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.count * self.size * (self.group - 1) / self.group

    def seconds(self, machine: int, within: float, between: float) -> float:
        """Time of these calls one after another, without latency, at a rate in bytes per second and process.

        Args:
            machine: processes of a machine.
            within: the rate if all processes of the group are in one machine.
            between: the rate if not.
        """
        return self.sent / (within if self.group * self.stride <= machine else between)


def collectives(layout: Layout) -> list[Collective]:
    """The collectives of an optimiser step, apart from a few numbers for logs and for stopping together."""
    return [*_data(layout), *_vocabulary(layout)]


def _data(layout: Layout) -> list[Collective]:
    """Those of DDP, FSDP or HSDP. With a divided vocabulary, they run among processes with the same tokens."""
    config, diffusion, shard, stride = layout.config, layout.diffusion(), layout.shard, layout.vocab
    if layout.replicas == 1:
        return []
    if config.parallel.data == "ddp":
        return [
            Collective("all_reduce", "bucket of gradients", size, 1, layout.replicas, stride)
            for size in _buckets(layout, diffusion)
        ]
    units, blocks, w = _Units.of(layout, diffusion), layout.network.n_blocks, layout.compute
    block, root, others = shard * units.block_share, shard * units.root_share, layout.replicas // shard
    rest, split = ("the rest", len(_VOCABULARY)) if layout.vocab > 1 else ("embedding, head and the rest", 0)
    found = []
    if shard > 1:
        found = [
            Collective("all_gather", rest, root, 1, shard, stride),
            Collective("all_gather", "block", block * w // FLOAT32, 2 * blocks * config.accumulate, shard, stride),
            Collective("reduce_scatter", "block's gradient", block, blocks, shard, stride),
            Collective("reduce_scatter", f"gradient of {rest}", root, 1, shard, stride),
            Collective("all_reduce", "norms of gradients", FLOAT32 * (units.tensors - split), 1, shard, stride),
        ]
    if config.parallel.data == "hsdp":
        found += [
            Collective("all_reduce", "share of a block's gradient", units.block_share, blocks, others, stride * shard),
            Collective("all_reduce", f"share of the gradient of {rest}", units.root_share, 1, others, stride * shard),
        ]
    return found


def _buckets(layout: Layout, diffusion: Diffusion) -> list[int]:
    """Bytes of DDP's buckets, which it fills in the order in which the gradients come.

    The order is that of a model of the same structure and the smallest size, which computes its gradients here.
    """
    sizes = dataclasses.replace(diffusion.network.config, hidden_size=2, n_heads=1, cond_dim=1, length=2)  # type: ignore[attr-defined]
    config, small = layout.config, _build(layout.config, sizes, 3, "cpu")
    order: list[str] = []
    for name, parameter in small.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
    with torch.random.fork_rng(devices=[]), autocast:
        small(torch.zeros(1, 2, dtype=torch.int64), torch.full((1,), 0.5, dtype=torch.float64)).sum().backward()
    named = dict(diffusion.named_parameters())
    tensors: list[Tensor] = [named[name] for name in order if layout.vocab == 1 or name not in _VOCABULARY]
    buckets, _ = _compute_bucket_assignment_by_size(tensors, BUCKETS)
    return [sum(tensors[i].nbytes for i in bucket) for bucket in buckets]


def _vocabulary(layout: Layout) -> list[Collective]:
    """Those of a divided vocabulary: among the processes that share it, and among those that have the same rows.

    The bound is that of a batch in which each token goes through the head; for absorbing noise half of them do.
    """
    config, group = layout.config, layout.vocab
    if group == 1:
        return []
    d, passes, n = layout.network.hidden_size, config.accumulate, math.ceil(layout.dim / group)
    dtype = torch.bfloat16 if layout.compute == 2 else torch.float32
    device = torch.device(layout.device)
    buffer = buffer_size(None, device, layout.softmax)
    chunk, _ = tile_shape(layout.rows, n, dtype, device, buffer, layout.softmax)
    found = [
        Collective("all_reduce", "embedded tokens", layout.rows * d * FLOAT32, passes, group),
        Collective("all_reduce", "norms of gradients", FLOAT32 * len(_VOCABULARY), 1, group),
    ]
    for first in range(0, layout.rows, chunk):  # of the rows of a tile
        rows = min(chunk, layout.rows - first)
        found.append(Collective("all_reduce", "gradient of the states", rows * d * FLOAT32, passes, group))
        if layout.softmax:
            found.append(Collective("all_gather", "logits of rows", group * rows * 4 * FLOAT64, passes, group))
            if config.process != "absorbing":
                found.append(Collective("all_reduce", "sums of rows", rows * SUMS * FLOAT64, passes, group))
    if not layout.softmax:
        found.append(Collective("all_reduce", "loss", layout.rows * FLOAT64, passes, group))
    if layout.replicas > 1:
        for size in _Units.of(layout, layout.diffusion()).vocabulary:
            found.append(Collective("all_reduce", "gradient of rows", size, 1, layout.replicas, group))
    return found
