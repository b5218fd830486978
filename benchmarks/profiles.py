"""Where the time goes: the fused head and whole training steps, and the released formulation beside them.

python benchmarks/profiles.py                 # prints the table, and refreshes it in docs/performance.md
python benchmarks/profiles.py --print-only
"""

from __future__ import annotations

import argparse
import functools
import os
from collections import Counter
from pathlib import Path

import bench_linear
import bench_reverse
import bench_score_entropy
import bench_train
from cases import CACHED_ROWS, HEAD_BENCH_ROWS, HEADS, LARGE, MODEL_BATCH, MODEL_LENGTH, Case, Run, fused_loss, training
from torch.profiler import ProfilerActivity, profile

DOCS = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- profiles: begin, written by benchmarks/profiles.py -->", "<!-- profiles: end -->"
ROUNDS = 3

GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn"),
    "this package": ("sedd_ext::",),
    "attention": ("attention", "aten::_softmax"),
    "AdamW": ("adam",),
    "gathers and masks": ("index", "scatter", "gather", "nonzero", "where", "masked", "argmax", "one_hot"),
    "copies and fills": ("copy", "fill", "zero", "clone", "cat", "aten::empty"),
    "random numbers": ("rand", "uniform_", "exponential"),
}
"""Kinds of operators, by what is in their names; the first that fits. All others are arithmetic over elements."""
OTHERS = "other arithmetic"


def profiles(name: str, build: functools.partial[Run], case: Case) -> str:
    """A line of the table."""
    run = build(case)
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(ROUNDS):
            run()
    milliseconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in GROUPS.items() if any(part in event.key for part in parts)), OTHERS)
        milliseconds[kind] += event.self_cpu_time_total / 1e3 / ROUNDS
    total = milliseconds.total()
    shares = [f"{milliseconds[kind] / total:.0%}" for kind in (*GROUPS, OTHERS)]
    return f"| {name}, {case.dtype} | {case.contestant} | {total:,.0f} ms | {' | '.join(shares)} |"


def table() -> str:
    """All lines."""
    lines = [
        f"| what | by | time | {' | '.join((*GROUPS, OTHERS))} |",
        f"| --- | --- | --: {'| --: ' * (len(GROUPS) + 1)}|",
    ]
    chosen = [
        ("score entropy forward + backward", functools.partial(bench_score_entropy.both), CACHED_ROWS, ("float32",)),
        ("tweedie sample", functools.partial(bench_reverse.tweedie), CACHED_ROWS, ("float32",)),
        *(
            (fused_loss(d), functools.partial(bench_linear.loss, d=d), HEAD_BENCH_ROWS, ("float32", "bfloat16"))
            for d in HEADS
        ),
        (
            training("d = 256"),
            functools.partial(bench_train.step, model="d = 256"),
            MODEL_BATCH * MODEL_LENGTH,
            ("float32", "bfloat16"),
        ),
    ]
    for name, build, rows, dtypes in chosen:
        for dtype in dtypes:
            for contestant in ("kernel", "released"):
                lines.append(profiles(name, build, Case("absorbing", LARGE, rows, dtype, contestant)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print-only", action="store_true", help="leave the page as it is")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.print_only:
        return
    page = DOCS.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"profiles.py: {DOCS} needs the lines '{BEGIN}' and '{END}', once each")
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    temporary = DOCS.with_name(f".{DOCS.name}")
    temporary.write_text(f"{head}\n\n{text}\n\n{tail}", encoding="utf-8")
    os.replace(temporary, DOCS)


if __name__ == "__main__":
    main()
