"""Computes how much memory and communication training takes with each engine, to choose one before a run.

examples:
  python benchmarks/scale.py --model.preset medium --tokenizer gpt2 --batch_size 8 --sequences 512 --processes 8,64
      DDP, FSDP and HSDP on 8 and 64 GPUs, steps of 512 sequences
  python benchmarks/scale.py --model.preset large --tokens 262143 --processes 64 --vocab 1,8
      a large vocabulary, whole and divided among 8 GPUs

Nothing is measured here, and no GPU is needed. The sizes are those of GPUs with bfloat16 autocast, unless options say
otherwise. See docs/distributed.md for the meaning of the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from sedd.config import ModelOptions, ParallelOptions, ProcessName, TrainConfig
from sedd.data.tokenizer import get_tokenizer
from sedd.footprint import Layout, collectives, memory
from sedd.options import add_options, build, check_one_of, check_options, checked, tree

GB = 1e9
ENGINES: tuple[Literal["ddp", "fsdp", "hsdp"], ...] = ("ddp", "fsdp", "hsdp")


@dataclass
class Options:
    """What is computed."""

    model: ModelOptions = field(default_factory=lambda: ModelOptions("small"))
    """Model"""
    tokenizer: str = "gpt2"
    """Its vocabulary is used: bytes, text8, gpt2, or a tokenizer.json."""
    tokens: int | None = None
    """Size of the vocabulary, MASK not counted. Default: that of the tokenizer."""
    process: ProcessName = "absorbing"
    """Noise process."""
    objective: str = "score_entropy"
    """Training loss."""
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    """Values of --parallel.data to compare. hsdp divides the model within a machine, and needs several machines."""
    processes: list[int] = field(default_factory=lambda: [8])
    """Numbers of processes to compare, one for each GPU."""
    machine: int = 8
    """Processes of a machine."""
    vocab: list[int] = field(default_factory=lambda: [1])
    """Numbers of processes among which embedding and head are divided by tokens; 1: each has them all."""
    batch_size: int = 8
    """Sequences in one forward pass of a process, or of the processes that share a vocabulary."""
    sequences: int | None = None
    """Sequences of an optimiser step, which then takes several passes if needed. Default: one pass."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast with float32 weights, or float32."""
    activation_checkpointing: bool = False
    """Compute the activations of the transformer blocks again in the backward pass instead of storing them."""
    within: float = 400.0
    """Assumed rate in GB/s at which a process sends in a collective inside a machine."""
    between: float = 50.0
    """The same for a collective between machines. NCCL may reach more, by several network cards together."""
    memory: float = 80.0
    """Memory of a GPU in GB, to say what fits."""
    markdown: bool = False
    """Print a table in Markdown."""
    json: str | None = None
    """File for the results in bytes and seconds, with the collectives."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in self.engines:
            check_one_of("engines", name, ENGINES)
        check_options(self, ["machine", "batch_size", "sequences", "tokens"], ["json"])
        for name in ("within", "between", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("processes", "vocab"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected numbers of at least 1, got {getattr(self, name)}")


def layouts(options: Options) -> list[Layout]:
    """What is compared.

    Raises:
        ValueError: numbers do not fit together.
    """
    tokens = options.tokens or get_tokenizer(options.tokenizer).vocab_size
    found = []
    for processes in options.processes:
        for vocab in options.vocab:
            if processes % vocab:
                raise ValueError(f"vocab: expected a divisor of {processes} processes, got {vocab}")
            together = options.batch_size * (processes // vocab)
            sequences = options.sequences or together
            if sequences % together:
                raise ValueError(f"sequences: expected a multiple of {together}, got {sequences}")
            for engine in ENGINES:
                shard = options.machine // vocab if engine == "hsdp" and processes > options.machine else 1
                divides = {"ddp": True, "fsdp": processes > vocab, "hsdp": shard > 1}
                if engine not in options.engines or not divides[engine]:
                    continue
                config = TrainConfig(
                    model=options.model,
                    process=options.process,
                    objective=options.objective,
                    batch_size=options.batch_size,
                    accumulate=sequences // together,
                    parallel=ParallelOptions(data=engine, shard=shard if engine == "hsdp" else None, vocab=vocab),
                    precision=options.precision,
                    activation_checkpointing=options.activation_checkpointing,
                )  # fmt: skip
                found.append(Layout(config, tokens, processes))
    return found


def result(layout: Layout, options: Options) -> dict[str, Any]:
    """Bytes and seconds of one process in an optimiser step."""
    needed, calls = memory(layout), collectives(layout)
    rates = options.machine, options.within * GB, options.between * GB
    return {
        "processes": layout.processes,
        "engine": layout.config.parallel.data,
        "vocab": layout.vocab,
        "accumulate": layout.config.accumulate,
        "parameters": sum(parameter.numel() for parameter in layout.diffusion().parameters()),
        "kept": needed.kept,
        "phases": needed.phases,
        "fullest": needed.fullest,
        "peak": needed.peak,
        "calls": sum(call.count for call in calls),
        "sent": sum(call.sent for call in calls),
        "seconds": sum(call.seconds(*rates) for call in calls),
        "collectives": [dataclasses.asdict(call) | {"sent": call.sent} for call in calls],
    }


COLUMNS = (
    *("GPUs", "engine", "vocab", "passes", "state", "gradients", "gathered", "activations", "temporary", "peak, GB"),
    *("calls", "sent, GB", "ms"),
)


def line(row: dict[str, Any], options: Options) -> list[str]:
    """A row of the table."""
    parts = row["fullest"]
    state = sum(row["kept"].values()) - row["kept"]["gradients"]
    sizes = [state, *(parts[name] for name in ("gradients", "gathered", "activations", "temporary"))]
    peak = f"{row['peak'] / GB:.1f}" + ("" if row["peak"] <= options.memory * GB else " (!)")
    words = [str(row["processes"]), row["engine"], str(row["vocab"]), str(row["accumulate"])]
    words += [*(f"{size / GB:.1f}" for size in sizes), peak]
    return [*words, f"{row['calls']:,}", f"{row['sent'] / GB:.1f}", f"{1e3 * row['seconds']:,.0f}"]


def markdown(lines: list[list[str]]) -> str:
    """The table in Markdown."""
    rows = [list(COLUMNS), ["--:", "---", *["--:"] * (len(COLUMNS) - 2)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Prints the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Options)
    try:
        options = build(Options, checked(Options, tree(vars(parser.parse_args(argv))), "--", words=True))
        rows = [result(layout, options) for layout in layouts(options)]
    except (ValueError, OSError) as error:
        print(f"scale.py: error: {error}", file=sys.stderr)
        return 2
    if not rows:
        processes = ", ".join(map(str, options.processes))
        message = f"engines: expected several machines for hsdp, got {processes} processes"
        print(f"scale.py: error: {message}", file=sys.stderr)
        return 2
    if options.json is not None:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    lines = [line(row, options) for row in rows]
    if options.markdown:
        print(markdown(lines))
        return 0
    sizes = options.model.build()
    table = Table(
        title=f"{rows[0]['parameters'] / 1e6:,.0f}M parameters, length {sizes.length}, batch_size {options.batch_size}",
        caption=f"(!): more than {options.memory:g} GB",
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "engine" else "right")
    for words in lines:
        table.add_row(*words)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
