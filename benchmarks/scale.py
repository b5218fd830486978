"""How much memory a process needs to train a model, and how much it sends: computed from the configuration.

python benchmarks/scale.py --model medium --processes 64 --batch_size 8
python benchmarks/scale.py --model 1.4B --processes 8 64 --markdown     # the tables of docs/distributed.md
python benchmarks/scale.py --model small --vocabulary 262144 --vocab 8 --processes 8

Nothing is trained: the model is made without memory, and its activations are those that autograd would store on a CPU,
where attention is computed in float32 (a GPU stores less). Sent bytes are those of ring algorithms: 2 (P - 1) / P of
the tensor for an all-reduce among P processes, (P - 1) / P for a gather or a reduction with a scatter.
tests/test_scale.py compares with what processes allocate and send.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from sedd.diffusion import Diffusion, get_schedule
from sedd.diffusion.objectives import get_objective
from sedd.network import PRESETS, DiffusionTransformer, ModelConfig
from sedd_ext import Absorbing
from sedd_ext.head import BUFFER_BYTES

MODELS: dict[str, ModelConfig] = {
    **PRESETS,
    "1.4B": ModelConfig(hidden_size=2048, n_blocks=24, n_heads=32, length=2048),
}
"""Sizes by name. 1.4B is the SEDD of Promises, Outlooks and Challenges (Deschenaux & Gulcehre 2024), table 7."""
ENGINES = ("ddp", "fsdp", "hsdp")
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What is trained, and how.

    Attributes:
        model: the sizes of the network.
        vocabulary: N, MASK included.
        engine: ddp, fsdp or hsdp.
        processes: number of processes.
        shard: for hsdp: processes of a group.
        vocab: processes that share a vocabulary.
        batch_size: sequences of a process in a forward pass.
        accumulate: forward passes of an optimiser step.
        dtype: of the matrix products; weights are float32.
        checkpointing: whether activations of blocks are computed again.
    """

    model: ModelConfig
    vocabulary: int = 50_258
    engine: str = "ddp"
    processes: int = 8
    shard: int = 8
    vocab: int = 1
    batch_size: int = 8
    accumulate: int = 1
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = False

    @property
    def data(self) -> int:
        """Processes that work on different sequences."""
        return self.processes // self.vocab

    @property
    def parts(self) -> int:
        """Processes among which FSDP divides a parameter; 1 for DDP."""
        return {"ddp": 1, "fsdp": self.data, "hsdp": min(self.shard, self.data)}[self.engine]

    @property
    def positions(self) -> int:
        """Tokens of a process in a forward pass."""
        return self.batch_size * self.model.length


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model by how they are divided: those of each block, of the vocabulary, and others."""

    blocks: list[list[Tensor]]
    vocabulary: list[Tensor]
    others: list[Tensor]

    @staticmethod
    def of(network: Any) -> Parameters:
        """Those of a network."""
        linear = network.output_layer.linear
        vocabulary = [network.vocab_embed.embedding, linear.weight, linear.bias]
        blocks = [list(block.parameters()) for block in network.blocks]
        known = {id(value) for value in (*vocabulary, *(value for block in blocks for value in block))}
        return Parameters(blocks, vocabulary, [value for value in network.parameters() if id(value) not in known])


def nbytes(tensors: Iterable[Tensor], parts: int = 1) -> int:
    """Bytes of a process's share of tensors that are divided along their first axis, as FSDP pads it."""
    return sum(math.ceil(t.shape[0] / parts) * (t.numel() // t.shape[0]) * t.element_size() for t in tensors)


def build(plan: Plan) -> Any:
    """The model without memory; to be called, and used, under a FakeTensorMode."""

    def as_it_is(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    with patch("torch.nn.init.kaiming_uniform_", as_it_is), patch("torch.nn.init.uniform_", as_it_is):
        network = DiffusionTransformer(plan.model, plan.vocabulary)
    objective = get_objective("score_entropy")
    return Diffusion(network, Absorbing(plan.vocabulary - 1), get_schedule("loglinear"), objective)


def stored(plan: Plan, diffusion: Diffusion) -> int:
    """Bytes that autograd stores for the backward pass of the network, parameters left out."""
    own = {value.untyped_storage()._cdata for value in diffusion.parameters()}
    found: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage()._cdata not in own:
            found[value.untyped_storage()._cdata] = value  # which keeps it alive, so that no other gets its address
        return value

    x = torch.empty(plan.batch_size, plan.model.length, dtype=torch.int64)
    sigma = torch.empty(plan.batch_size)
    network: Any = diffusion.network.train()
    network._check = lambda *_: None  # looks at the numbers
    with saved_tensors_hooks(keep, lambda value: value), torch.autocast("cpu", plan.dtype, enabled=_mixed(plan)):
        hidden = network.hidden(x, sigma)
    return sum(value.untyped_storage().nbytes() for value in found.values()) + hidden.nbytes


def _mixed(plan: Plan) -> bool:
    return plan.dtype != torch.float32


def memory(plan: Plan) -> dict[str, int]:
    """Bytes of a process by what they are for. The sum is the peak of a step, up to what a single operator needs."""
    with FakeTensorMode():
        diffusion = build(plan)
        activations, again = stored(plan, diffusion), 0
        if plan.checkpointing:  # the inputs of all blocks, and one block at a time in the backward pass
            activations = 4 * plan.positions * plan.model.hidden_size * plan.model.n_blocks
            one = replace(plan, model=replace(plan.model, n_blocks=1))
            again = stored(one, build(one))
    found = Parameters.of(diffusion.network)
    every_block = [value for block in found.blocks for value in block]
    # without a split, FSDP divides the vocabulary's parameters with the others; with one, it leaves them alone
    split = plan.vocab > 1
    of_vocabulary = nbytes(found.vocabulary, plan.vocab if split else plan.parts)
    share = nbytes([*every_block, *found.others], plan.parts) + of_vocabulary
    gathered = 0
    if plan.engine != "ddp":
        gathered = 2 * max(nbytes(block) for block in found.blocks)  # the next one is gathered meanwhile
        gathered += nbytes([*found.others, *([] if split else found.vocabulary)])
    head = nbytes(found.vocabulary[1:], plan.vocab)
    width = math.ceil(plan.vocabulary / plan.vocab)
    tile = min(BUFFER_BYTES, plan.positions * width * plan.dtype.itemsize)
    states = plan.positions * plan.model.hidden_size
    return {
        "weights": share,
        "gradients": share,
        "AdamW": 2 * share,
        "average": share,
        "gathered": gathered + (gathered if plan.engine != "ddp" else 0),  # and their gradients
        "activations": activations + again,
        # a tile (gone when a block is computed again), the gradients that the loss computes, and the states
        "head": max(0, tile - again) + head + states * (2 * 4 + plan.dtype.itemsize),
    }


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in an optimiser step.

    Attributes:
        name: all_reduce, all_gather or reduce_scatter.
        count: how many.
        bytes: of the whole tensors, all of them together.
        processes: among how many.
    """

    name: str
    count: int
    bytes: int
    processes: int

    @property
    def sent(self) -> float:
        """Bytes that a process sends."""
        passes = 2 if self.name == "all_reduce" else 1
        return passes * (self.processes - 1) / self.processes * self.bytes


def traffic(plan: Plan) -> dict[str, Traffic]:
    """What a process exchanges in an optimiser step, by what it is for; norms and votes are left out.

    All positions go through the head, as for uniform processes. For absorbing ones, about half of them do.
    """
    with FakeTensorMode():
        found = Parameters.of(build(plan).network)
    split = plan.vocab > 1
    root = [*found.others, *([] if split else found.vocabulary)]
    every = [*root, *(value for block in found.blocks for value in block)]
    result: dict[str, Traffic] = {}
    if plan.engine == "ddp":
        result["gradients"] = Traffic("all_reduce", 1, nbytes(every), plan.data)
    else:
        parts = plan.parts
        per_block = sum(parts * nbytes(block, parts) for block in found.blocks)
        passes = 2 * plan.accumulate
        units = len(found.blocks)
        padded = parts * nbytes(root, parts)
        result["weights"] = Traffic("all_gather", 1 + passes * units, padded + passes * per_block, parts)
        result["gradients"] = Traffic("reduce_scatter", 1 + units, padded + per_block, parts)
        if plan.engine == "hsdp":
            groups = plan.data // parts
            result["between groups"] = Traffic("all_reduce", 1 + units, (padded + per_block) // parts, groups)
    if split:
        rows, states = plan.accumulate * plan.positions, plan.accumulate * plan.positions * plan.model.hidden_size
        own = nbytes(found.vocabulary, plan.vocab)
        result["embedding"] = Traffic("all_reduce", plan.accumulate, 4 * states, plan.vocab)
        result["loss"] = Traffic("all_reduce", plan.accumulate, 8 * rows, plan.vocab)
        result["hidden states"] = Traffic("all_reduce", plan.accumulate, 4 * states, plan.vocab)
        result["vocabulary's gradients"] = Traffic("all_reduce", 3, own, plan.data)
    return {name: part for name, part in result.items() if part.processes > 1}


# ---- the table ----


def row(name: str, plan: Plan, bandwidth: float) -> list[str]:
    """A line of the table."""
    parts, sent = memory(plan), sum(part.sent for part in traffic(plan).values())
    engine = plan.engine + (f", vocab {plan.vocab}" if plan.vocab > 1 else "")
    numbers = [sum(parts[key] for key in ("weights", "gradients", "AdamW", "average")), parts["gathered"]]
    numbers += [parts["activations"], parts["head"], sum(parts.values()), sent]
    cells = [f"{number / GIB:.1f}" for number in numbers]
    return [name, str(plan.processes), engine, *cells, f"{1e3 * sent / bandwidth:.0f}"]


HEAD = ("model", "processes", "engine", "state", "gathered", "activations", "head", "in all", "sent", "ms")


def show(rows: list[list[str]], markdown: bool) -> str:
    """The table as text."""
    if markdown:
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (list(HEAD), ["---"] * len(HEAD), *rows))
    widths = [max(len(cells[i]) for cells in (HEAD, *rows)) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(cells, widths, strict=True)) for cells in (HEAD, *rows))


def main(arguments: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["small", "medium", "1.4B"])
    parser.add_argument("--processes", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--vocabulary", type=int, default=50_258, help="N, MASK included (default: GPT-2's, 50,258)")
    parser.add_argument("--vocab", type=int, default=1, help="processes that share a vocabulary")
    parser.add_argument("--shard", type=int, default=8, help="processes of a group of hsdp")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a process in a forward pass")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--gigabytes_per_second", type=float, default=50.0, help="of a GPU to others, for the time")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    for processes in options.processes:
        if processes % options.vocab:
            parser.error(f"--vocab: expected a divisor of the number of processes, {processes}, got {options.vocab}")
    base = Plan(
        MODELS["small"],
        vocabulary=options.vocabulary,
        shard=options.shard,
        vocab=options.vocab,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        checkpointing=options.activation_checkpointing,
    )
    rows = [
        row(
            name,
            replace(base, model=MODELS[name], engine=engine, processes=processes),
            1e9 * options.gigabytes_per_second,
        )
        for name in options.model
        for processes in options.processes
        for engine in options.engine
        if not (engine == "hsdp" and processes // options.vocab <= options.shard)
    ]
    print("GiB for each process; ms at", f"{options.gigabytes_per_second:g} GB/s\n")
    print(show(rows, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
