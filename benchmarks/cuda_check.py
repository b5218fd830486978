"""Checks the machine code of the CUDA kernels and computes their roofline: needs nvcc and cuobjdump, no GPU.

python benchmarks/cuda_check.py                # checks, prints the tables, refreshes docs/kernels.md
python benchmarks/cuda_check.py --check-only   # checks

Exit status: 0, 1 where a rule is violated or a file does not compile, 2 where a tool is missing.

What is counted is a path of a warp through the control-flow graph: the one with the most work (exponentials, then
128-bit accesses), and of those the shortest; inner loops without 128-bit accesses, which take single elements, are left
out. In a kernel of one segment a warp the path leads from its first instruction to its last; in those of reverse steps
and unmasking once through each loop over the segments, the one that copies them to shared memory included. What is read
to draw an entry is in no such loop and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- cuda-check -->", "<!-- /cuda-check -->"
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG"]
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
PROCESSES = ["absorbing", "uniform", "vector"]
SUMS = ["draws", "statistics", "both"]  # of unmasking
VECTORS = 4  # of 16 bytes, that a lane has in a segment
READS = ("load", "copy", "kept")  # of 128 bits: from memory, to shared memory, and from there
ROWS, N = 8192, 50_258
SHOWN = 90  # the architecture whose counts are in the table

# ------------------------------------------------------------------------------------------- what is wanted of a kernel


@dataclass(frozen=True)
class Bounds:
    threads: tuple[int, ...]  # of a block
    registers: int  # of a thread, at most
    paths: int = 0  # main loops
    writes: str = ""  # in the last one: "element", "real" (the compute type) or "only" (elements, and nothing is read)
    # Exponentials of an element, and those beside them: where a sum is relative to the largest logit so far, one for
    # each vector and one for the lane's sum. A pair for each main loop, or (1, 0) for all.
    exps: tuple[tuple[int, int], ...] = ()
    double: int = 0  # double-precision instructions, at most, of a row's numbers, which nvcc puts among the first loads
    either: bool = False  # the main loops are alternatives, of which nvcc puts any first: they are sorted by length
    shared: int = 0  # dynamic shared memory, at most, for N = 50,258, or a tile of 8,192; without a kept row
    # Whether shared memory keeps the row, which then is copied in a first main loop. None: there is no such choice.
    keeps: bool | None = None


SEGMENTS, WHOLE_ROWS, BY_ROW = (256,), (768,), (128,)
RELATIVE, COPY = ((1, VECTORS + 1),), ((0, 0),)
BOUNDS = {
    "score_entropy.sums_kernel": Bounds(SEGMENTS, 64, 1),
    "score_entropy.loss_kernel": Bounds(BY_ROW, 64),
    "score_entropy.gradient_kernel": Bounds(SEGMENTS, 64, 1, "element"),
    "score_entropy.numbers_kernel": Bounds(BY_ROW, 64),
    "score_entropy.tile_kernel<true>": Bounds(SEGMENTS, 64, 1, "element"),  # in place
    "score_entropy.tile_kernel<false>": Bounds(SEGMENTS, 64, 1),
    "score_entropy.tile_numbers_kernel": Bounds(BY_ROW, 64),
    "score_entropy.tile_loss_kernel": Bounds(BY_ROW, 64),
    "generalized_masked.sums_kernel": Bounds(SEGMENTS, 64, 1, exps=RELATIVE),
    "generalized_masked.loss_kernel": Bounds(BY_ROW, 64),
    "generalized_masked.numbers_kernel": Bounds(BY_ROW, 64),
    "generalized_masked.gradient_kernel": Bounds(SEGMENTS, 64, 1, "element"),
    "generalized_masked.columns_kernel": Bounds(BY_ROW, 64),
    "generalized_masked.power_kernel": Bounds(BY_ROW, 64),
    "reverse.sums_kernel": Bounds(SEGMENTS, 64, 1),
    "reverse.sample_kernel<absorbing>": Bounds(SEGMENTS, 80, 1, shared=1576),
    "reverse.sample_kernel": Bounds(SEGMENTS, 80, 2, shared=1576),  # scores; the second sweep: weights
    # scores, weights, probabilities; before them the copy
    "reverse.probs_kernel<true>": Bounds(
        WHOLE_ROWS, 80, 4, "real", exps=(*COPY, (1, 0), (1, 0), (1, 0)), shared=1624, keeps=True
    ),
    "reverse.probs_kernel<false>": Bounds(WHOLE_ROWS, 80, 3, "real", shared=1624, keeps=False),
    "reverse.tile_kernel": Bounds(SEGMENTS, 80, 2, shared=264, either=True),  # first sweep: scores; second: weights
    "reverse.choose_kernel": Bounds(SEGMENTS, 96),
    "mean_prediction.others_kernel": Bounds(SEGMENTS, 80, 1, exps=RELATIVE),
    "mean_prediction.row_kernel": Bounds(BY_ROW, 96),
    "mean_prediction.sums_kernel<true>": Bounds(SEGMENTS, 88, 1, double=8),  # float64; the others have at most 80
    "mean_prediction.sums_kernel<false>": Bounds(SEGMENTS, 80, 1, double=8),
    "mean_prediction.loss_kernel": Bounds(BY_ROW, 96),
    "mean_prediction.gradient_kernel": Bounds(SEGMENTS, 80, 1, "element", double=8),
    "reverse_mean.mean_sample_kernel<false>": Bounds(SEGMENTS, 80, 1, exps=RELATIVE, shared=6304),
    "reverse_mean.mean_sample_kernel<true>": Bounds(SEGMENTS, 80, 1, exps=((2, 5),), shared=6304),  # v_y is an expm1
    "reverse_mean.mean_probs_kernel<false, true>": Bounds(
        (640,), 96, 3, "real", exps=(*COPY, *RELATIVE, (1, 0)), shared=6352, keeps=True
    ),
    "reverse_mean.mean_probs_kernel<false, false>": Bounds(
        (640,), 96, 2, "real", exps=(*RELATIVE, (1, 0)), shared=6352, keeps=False
    ),
    "reverse_mean.mean_probs_kernel<true, true>": Bounds(
        (640,), 96, 3, "real", exps=(*COPY, (2, 5), (2, 0)), shared=6352, keeps=True
    ),
    "reverse_mean.mean_probs_kernel<true, false>": Bounds(
        (640,), 96, 2, "real", exps=((2, 5), (2, 0)), shared=6352, keeps=False
    ),
    "reverse_mean.mean_choose_kernel": Bounds(SEGMENTS, 80),
    # the first loop: all logits; the second: those above the drawn one
    "unmask.unmask_kernel<draws>": Bounds(SEGMENTS, 112, 2, exps=(*RELATIVE, (1, 0)), shared=11088),
    "unmask.unmask_kernel<statistics>": Bounds(SEGMENTS, 112, 2, exps=(*RELATIVE, (1, 0)), shared=11088),
    "unmask.unmask_kernel<both>": Bounds(SEGMENTS, 112, 2, exps=((2, 10), (1, 0)), shared=11088),
    "transition.entries_kernel<false>": Bounds(SEGMENTS, 64, 1, "only"),
    "transition.entries_kernel<true>": Bounds(SEGMENTS, 64, 1, "only"),
    "transition.numbers_kernel": Bounds(BY_ROW, 64),
    "transition.sample_kernel": Bounds(BY_ROW, 64),
}
# What is launched over rows × N: name, shapes of π, and which main loops run.
OPERATIONS: dict[str, list[tuple[str, list[str], tuple[int, ...]]]] = {
    "score_entropy.sums_kernel": [("score entropy, forward", PROCESSES, (0,))],
    "score_entropy.gradient_kernel": [("score entropy, backward", PROCESSES, (0,))],
    "score_entropy.tile_kernel<true>": [("linear score entropy tile, with gradient", PROCESSES, (0,))],
    "score_entropy.tile_kernel<false>": [("linear score entropy tile, loss alone", PROCESSES, (0,))],
    "generalized_masked.sums_kernel": [("generalized masked, forward", ["any other"], (0,))],
    "generalized_masked.gradient_kernel": [("generalized masked, backward", ["any other"], (0,))],
    "reverse.sample_kernel<absorbing>": [("reverse sample", PROCESSES[:1], (0,))],
    "reverse.sample_kernel": [
        ("reverse sample", PROCESSES[1:], (0,)),
        ("reverse sample, second sweep", PROCESSES[1:], (1,)),
    ],
    # Each architecture runs the kernel that its shared memory has room for.
    "reverse.probs_kernel<true>": [
        ("reverse probabilities", PROCESSES[:1], (0, 1, 3)),
        ("reverse probabilities, clamped", PROCESSES[1:], (0, 1, 2, 3)),
    ],
    "reverse.probs_kernel<false>": [
        ("reverse probabilities", PROCESSES[:1], (0, 2)),
        ("reverse probabilities, clamped", PROCESSES[1:], (0, 1, 2)),
    ],
    "reverse.tile_kernel": [
        ("linear reverse sample tile", PROCESSES, (0,)),
        ("linear reverse sample tile, second sweep", PROCESSES[1:], (1,)),
    ],
    # Where a kernel of a softmax is named for absorbing processes only, it is the same for all.
    "mean_prediction.others_kernel": [("mean prediction, forward", PROCESSES[:1], (0,))],
    "mean_prediction.sums_kernel<true>": [("mean prediction, second pass, with gradient", PROCESSES[1:], (0,))],
    "mean_prediction.sums_kernel<false>": [("mean prediction, second pass, loss alone", PROCESSES[1:], (0,))],
    "mean_prediction.gradient_kernel": [("mean prediction, backward", PROCESSES, (0,))],
    "reverse_mean.mean_sample_kernel<false>": [("reverse mean sample", PROCESSES[:1], (0,))],
    "reverse_mean.mean_sample_kernel<true>": [("reverse mean sample, with powers", PROCESSES[:1], (0,))],
    "reverse_mean.mean_probs_kernel<false, true>": [("reverse mean probabilities", PROCESSES, (0, 1, 2))],
    "reverse_mean.mean_probs_kernel<false, false>": [("reverse mean probabilities", PROCESSES, (0, 1))],
    "reverse_mean.mean_probs_kernel<true, true>": [
        ("reverse mean probabilities, with powers", PROCESSES[:1], (0, 1, 2))
    ],
    "reverse_mean.mean_probs_kernel<true, false>": [("reverse mean probabilities, with powers", PROCESSES[:1], (0, 1))],
    "unmask.unmask_kernel<draws>": [
        ("unmask", ["any other"], (0,)),
        ("unmask, second pass of a nucleus", ["any other"], (1,)),
    ],
    "unmask.unmask_kernel<statistics>": [("unmask, with statistics", ["any other"], (0,))],
    "unmask.unmask_kernel<both>": [("unmask, with statistics and temperature", ["any other"], (0,))],
    "transition.entries_kernel<false>": [("transition row or column", ["any other"], (0,))],
    "transition.entries_kernel<true>": [("transition row or column", ["vector"], (0,))],
}

# ----------------------------------------------------------------------------------------------------------- occupancy

# Warps, blocks and bytes of shared memory of a multiprocessor: "Technical Specifications per Compute Capability" in the
# CUDA C++ Programming Guide. How they are handed out is in the toolkit's cuda_occupancy.h.
LIMITS = {80: (64, 32, 164 << 10), 90: (64, 32, 228 << 10), 100: (64, 32, 228 << 10), 120: (48, 24, 100 << 10)}


def resident_warps(arch: int, threads: int, registers: int, shared: int) -> int:
    """Each quarter of a multiprocessor has 16 Ki registers for its warps, handed out by 256; a block wastes 1 KiB."""
    max_warps, max_blocks, max_shared = LIMITS[arch]
    warps = -(-threads // 32)
    by_registers = 16384 // (-(-registers * 32 // 256) * 256) * 4 // warps
    by_shared = max_shared // (-(-(shared + 1024) // 128) * 128)
    return warps * min(max_warps // warps, max_blocks, by_registers, by_shared)


# ------------------------------------------------------------------------------------------------ what the tools print


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        accesses = {"LDG": "load", "STG": "store", "LDGSTS": "copy", "LDS": "kept"}
        if self.name in accesses and (self.name != "LDS" or ".128" in self.opcode):
            return ("" if ".128" in self.opcode else "narrow ") + accesses[self.name]
        if self.name == "MUFU":
            return "exp" if self.opcode == "MUFU.EX2" else "mufu"
        kinds = {"fp32": ("FADD", "FMUL", "FFMA"), "double": ("DADD", "DMUL", "DFMA", "DSETP"), "local": ("LDL", "STL")}
        return next((kind for kind, names in kinds.items() if self.name in names), "other")

    @property
    def target(self) -> int:
        match = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name in ("BRA", "CALL") else None
        return int(match[1], 16) if match else -1


@dataclass
class Resources:
    """What ptxas -v says of a function; registers and shared memory are those of a kernel."""

    registers: int = 0
    shared: int = 0
    local: dict[str, int] = field(default_factory=dict)


def parse_ptxas(log: str) -> dict[str, Resources]:
    """By mangled name."""
    found: dict[str, Resources] = {}
    entry = function = ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entry = match[1]
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif "bytes stack frame" in line:
            sizes = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", line)
            found.setdefault(function, Resources()).local = {what: int(size) for size, what in sizes}
        elif match := re.search(r"Used (\d+) registers", line):
            found[entry].registers = int(match[1])
            found[entry].shared = sum(int(size) for size in re.findall(r"(\d+) bytes smem", line))
    return found


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """What cuobjdump -sass prints, by mangled name."""
    instruction = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := instruction.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4].strip()))
    return found


def demangle(mangled: str) -> tuple[str, list[str]] | None:
    """A kernel's name and its template arguments; None for other functions."""
    match = re.search(r"\d([a-z][a-z_]*_kernel)(?:I(.*?)EEv|E)", mangled)
    if match is None:
        return None
    names = {"4Half": "float16", "8BFloat16": "bfloat16", "f": "float32", "d": "float64"}
    tokens = re.findall(r"(Lb|LNS_6FamilyE|LNS_10UnmaskSumsE)(\d)E|NS_(4Half|8BFloat16)E|([fd])", f"{match[2] or ''}E")
    enums = {"Lb": ["false", "true"], "LNS_6FamilyE": PROCESSES, "LNS_10UnmaskSumsE": SUMS}
    return match[1], [enums[of][int(at)] if of else names[struct or letter] for of, at, struct, letter in tokens]


# ----------------------------------------------------------------------------------------------------- paths of a warp


class Graph:
    """Basic blocks by their first address, and where each leads; a call leads to what follows it."""

    def __init__(self, code: list[Instruction]) -> None:
        self.entry = code[0].address
        leaders = {self.entry, *(i.target for i in code)}
        leaders |= {following.address for i, following in pairwise(code) if i.name in ("BRA", "EXIT", "RET")}
        self.blocks: dict[int, list[Instruction]] = {}
        for i in code:
            if i.address in leaders:
                block = self.blocks.setdefault(i.address, [])
            block.append(i)
        self.after: dict[int, list[int]] = {}
        for begin, following in pairwise([*self.blocks, -1]):
            last = self.blocks[begin][-1]
            # A branch may have a second predicate before its target. BRA.DIV is for warps whose lanes have come apart.
            leaves = last.name in ("BRA", "EXIT", "RET") and not last.guard and re.match(r"0x|R\d|$", last.operands)
            jumps = last.name == "BRA" and ".DIV" not in last.opcode
            self.after[begin] = [last.target] * jumps + ([] if leaves or following < 0 else [following])

    def postorder(self, starts: Iterable[int], nodes: Iterable[int], after: dict[int, list[int]]) -> list[int]:
        order, left = [], set(nodes)
        for start in starts:
            todo = [(start, iter(after[start]))] if start in left else []
            left.discard(start)
            while todo:
                for to in todo[-1][1]:
                    if to in left:
                        left.remove(to)
                        todo.append((to, iter(after[to])))
                        break
                else:
                    order.append(todo.pop()[0])
        return order

    def loops(self, nodes: set[int]) -> list[set[int]]:
        """Its cycles: the strongly connected parts."""
        before: dict[int, list[int]] = {node: [] for node in nodes}
        for node in nodes:
            for to in nodes.intersection(self.after[node]):
                before[to].append(node)
        found, left = [], set(nodes)
        for node in reversed(self.postorder(sorted(nodes), nodes, self.after)):
            if part := set(self.postorder([node], left, before)):
                left -= part
                if len(part) > 1 or node in self.after[node]:
                    found.append(part)
        return found

    def best(self, start: int, nodes: Iterable[int], ends: set[int]) -> list[Instruction]:
        """The path with the most exponentials, then the most 128-bit accesses, then the fewest instructions."""
        value: dict[int, tuple[tuple[int, int, int], list[Instruction]]] = {}
        for node in self.postorder([start], nodes, self.after):  # what lies ahead first; jumps back find nothing yet
            ways = [value[to] for to in self.after[node] if to in value]
            if node in ends and not ways:  # where only some lanes leave, the warp goes on
                ways = [((0, 0, 0), [])]
            if ways:
                score, ahead = max(ways, key=lambda way: way[0])
                own = [step for i in self.blocks[node] for step in (i, *self.called(i))]
                kinds = Counter(i.kind for i in own)
                accesses = sum(kinds[access] for access in (*READS, "store"))
                score = (score[0] + kinds["exp"], score[1] + accesses, score[2] - len(own))
                value[node] = score, own + ahead
        return value[start][1] if start in value else []

    def called(self, call: Instruction) -> list[Instruction]:
        known = call.name == "CALL" and call.target in self.blocks
        return self.best(call.target, self.blocks, self.ends("RET")) if known else []

    def ends(self, name: str) -> set[int]:
        return {node for node, block in self.blocks.items() if block[-1].name == name}

    def main_paths(self) -> list[list[Instruction]]:
        """Each once through a loop with 128-bit accesses, or through the kernel where they are in no loop."""
        reached = set(self.postorder([self.entry], self.blocks, self.after))
        kinds = {node: {i.kind for i in self.blocks[node]} for node in reached}
        found = set().union(*kinds.values())
        accesses = {"copy", "kept"} if "copy" in found else {"load"} if "load" in found else {"store"}
        wide = {node for node in reached if accesses & kinds[node]}

        def main_loops(nodes: set[int]) -> Iterator[tuple[int, set[int]]]:
            """The innermost loops, with the block that each begins with."""
            for loop in self.loops(nodes):
                if loop & wide:
                    head = min(to for node in reached - loop for to in loop.intersection(self.after[node]))
                    yield from list(main_loops(loop - {head})) or [(head, loop)]

        paths = []
        for head, loop in sorted(main_loops(reached), key=lambda found: min(found[1])):
            nodes = loop.difference(*(part for part in self.loops(loop - {head}) if not part & wide))
            path = self.best(head, nodes, {node for node in loop if head in self.after[node]})
            if not any(i.opcode.startswith("VOTE.ANY") for i in path):  # lanes vote where an entry is drawn
                paths.append(path)
        if wide and not paths:
            nodes = reached.difference(*self.loops(reached))
            paths.append(self.best(self.entry, nodes, self.ends("EXIT")))
        return paths


@dataclass(frozen=True)
class Counts:
    """Instructions of a path, and how many elements a lane has on it."""

    elements: int
    total: int
    core: int  # from the first 128-bit access or exponential to the last
    double: int  # double-precision arithmetic in the core
    together: bool  # the VECTORS first loads from memory are issued before anything waits for one of them
    kinds: dict[str, int]

    def count(self, *kinds: str) -> int:
        return sum(self.kinds.get(kind, 0) for kind in kinds)

    @classmethod
    def of(cls, path: list[Instruction], elements: int) -> Counts:
        work = [at for at, i in enumerate(path) if i.kind in (*READS, "store", "exp")] or [0]
        core = path[work[0] : work[-1] + 1]
        loaded: set[int] = set()
        loads, together = 0, True
        for i in core:
            registers = [int(number) for number in re.findall(r"\bR(\d+)", i.operands)]
            if loads < VECTORS:
                together &= loaded.isdisjoint(registers)
            if i.kind == "load":
                loaded.update(range(registers[0], registers[0] + 4))
                loads += 1
        double = sum(i.kind == "double" for i in core)
        return cls(elements, len(path), len(core), double, together, dict(Counter(i.kind for i in path)))


# --------------------------------------------------------------------------------------------------------------- rules


@dataclass
class Kernel:
    """One instantiation on one architecture."""

    arch: int
    name: str
    arguments: list[str]
    resources: Resources
    local_accesses: int
    paths: list[Counts]

    @property
    def label(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>" if self.arguments else self.name

    @property
    def key(self) -> str:
        """Its line in BOUNDS."""
        flags = ", ".join(a for a in self.arguments if a in ("false", "true"))
        keys = (f"{self.name}<{a}>" for a in (flags, *self.arguments))
        return next((key for key in keys if key in BOUNDS), self.name)

    @property
    def dtype(self) -> str:
        return next((a for a in self.arguments if a in SIZES), "float32")

    @property
    def process(self) -> str:
        spare = "vector" if self.key == "transition.entries_kernel<true>" else "any other"
        return next((a for a in self.arguments if a in PROCESSES), spare)


def kernels_of(stem: str, arch: int, log: str, sass: str) -> list[Kernel]:
    """From ptxas's report and the machine code of a file."""
    codes, found = parse_sass(sass), []
    for mangled, resources in parse_ptxas(log).items():
        name, arguments = demangle(mangled) or (mangled[-40:], [])
        code = codes.get(mangled, [])
        kernel = Kernel(arch, f"{stem}.{name}", arguments, resources, sum(i.kind == "local" for i in code), [])
        if code and kernel.key in BOUNDS and BOUNDS[kernel.key].paths:
            elements = VECTORS * 16 // SIZES[kernel.dtype]
            kernel.paths = [Counts.of(path, elements) for path in Graph(code).main_paths()]
            if BOUNDS[kernel.key].either:
                kernel.paths.sort(key=lambda path: path.total)
        found.append(kernel)
    return found


def violations(kernel: Kernel) -> Iterator[str]:
    local = [f"{size} bytes of {what}" for what, size in kernel.resources.local.items() if size]
    if kernel.local_accesses:
        local.append(f"{kernel.local_accesses} accesses")
    if local:
        yield f"local memory: {', '.join(local)}"
    if not kernel.resources.registers:  # a function that kernels call
        return
    bounds = BOUNDS.get(kernel.key)
    if bounds is None:
        yield "no bounds are stated for it in cuda_check.py"
        return
    if kernel.resources.registers > bounds.registers:
        yield f"{kernel.resources.registers} registers a thread, at most {bounds.registers} wanted"
    if bounds.keeps and kernel.resources.shared:
        yield f"{kernel.resources.shared} bytes of static shared memory, none wanted where a row may take all"
    if len(kernel.paths) != bounds.paths:
        yield f"{len(kernel.paths)} main loops with 128-bit accesses, {bounds.paths} wanted"
    for at, path in enumerate(kernel.paths, 1):
        reads = bounds.writes != "only"
        if reads and path.count(*READS) < VECTORS:
            yield f"main loop {at}: {path.count(*READS)} 128-bit loads, {VECTORS} wanted"
        if not path.together:
            yield f"main loop {at}: the loads wait for one another"
        if bounds.writes and at == bounds.paths:
            stores = path.elements * _written(bounds, kernel.dtype) // 16
            if path.count("store") < stores:
                yield f"main loop {at}: {path.count('store')} 128-bit stores, {stores} wanted"
        if kernel.dtype != "float64":
            each, more = bounds.exps[at - 1] if at <= len(bounds.exps) else (1, 0)
            if reads and path.count("exp") != each * path.elements + more:
                yield f"main loop {at}: {path.count('exp')} MUFU.EX2 for {path.elements} elements"
            if path.double > bounds.double:
                yield f"main loop {at}: {path.double} double-precision instructions"


def _written(bounds: Bounds, dtype: str) -> int:
    return {"": 0, "real": max(4, SIZES[dtype])}.get(bounds.writes, SIZES[dtype])


# ------------------------------------------------------------------------------------------------------------ roofline


@dataclass(frozen=True)
class Gpu:
    """Peaks of the vendor's datasheets; a clock at or below the boost clock; FP32 results a clock by the CUDA guide."""

    name: str
    arch: int
    bytes: float  # a second
    processors: int
    clock: float
    fp32: int


GPUS = [
    Gpu("A100", 80, 2.039e12, 108, 1.41e9, 64),
    Gpu("H100", 90, 3.35e12, 132, 1.755e9, 128),
    Gpu("H200", 90, 4.8e12, 132, 1.755e9, 128),
    Gpu("B200", 100, 8.0e12, 148, 1.85e9, 128),
]


@dataclass(frozen=True)
class Cost:
    """An operation's bytes and instructions an element."""

    operation: str
    kernel: Kernel
    paths: list[Counts]

    @property
    def bytes(self) -> int:
        """Of memory; what is read again comes from the cache."""
        bounds, dtype = BOUNDS[self.kernel.key], self.kernel.dtype
        return _written(bounds, dtype) + (SIZES[dtype] if bounds.writes != "only" else 0)

    def each(self, *kinds: str) -> float:
        return sum(path.count(*kinds) for path in self.paths) / self.paths[0].elements

    @property
    def total(self) -> float:
        return sum(path.total for path in self.paths) / self.paths[0].elements

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """The least time for ROWS × N elements that each limit leaves."""
        # A warp's 128-bit access is 512 bytes, four clocks of the L1 cache. π is read by the word, at a distance of a
        # vector's elements from lane to lane: as many clocks as those are.
        l1 = 4 * self.each(*READS, "store") / 32
        if self.kernel.process == "vector":
            reads_pi = sum(path.count("narrow load") >= path.elements for path in self.paths)
            l1 += reads_pi * self.paths[0].elements / VECTORS / 32
        clocks = {
            "issue": self.total / 128,
            "FP32": self.each("fp32") / gpu.fp32,
            "MUFU": self.each("exp", "mufu") / 16,
            "L1": l1,
        }
        limits = {limit: each / gpu.processors / gpu.clock for limit, each in clocks.items()}
        return {limit: ROWS * N * each for limit, each in {"memory": self.bytes / gpu.bytes, **limits}.items()}


def keeps_row(key: str, arch: int, dtype: str) -> bool:
    """Whether shared memory has room for a row of N, which may begin behind a boundary; the system has 1 KiB of it."""
    return N * SIZES[dtype] + 16 + BOUNDS[key].shared <= LIMITS[arch][2] - 1024


def costs(kernels: list[Kernel]) -> dict[tuple[str, str, str], dict[int, Cost]]:
    """By operation, π and type; then by architecture."""
    found: dict[tuple[str, str, str], dict[int, Cost]] = {}
    for key, operations in OPERATIONS.items():
        for name, processes, paths in operations:
            for process in processes:
                for dtype in ("float32", "bfloat16"):
                    for k in kernels:
                        if BOUNDS[key].keeps not in (None, keeps_row(key, k.arch, dtype)):
                            continue
                        if (k.key, k.process, k.dtype) == (key, process, dtype) and len(k.paths) > max(paths):
                            cost = Cost(name, k, [k.paths[at] for at in paths])
                            found.setdefault((name, process, dtype), {})[k.arch] = cost
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Padded: it is read on the terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(f'{c:<{w}}' for c, w in zip(line, widths, strict=True))} |" for line in lines)


def resource_table(kernels: list[Kernel], archs: list[int]) -> str:
    rows = []
    for key, bounds in BOUNDS.items():
        mine = {arch: [k.resources for k in kernels if k.key == key and k.arch == arch] for arch in archs}
        if not all(mine.values()):
            continue
        most = {arch: max(r.registers for r in found) for arch, found in mine.items()}
        shared = max(r.shared for found in mine.values() for r in found) + bounds.shared
        for threads in bounds.threads:
            warps = [f"{resident_warps(a, threads, most[a], shared)} of {LIMITS[a][0]}" for a in archs]
            registers = " / ".join(map(str, most.values()))
            rows.append([key, registers, str(bounds.registers), str(threads), " / ".join(warps)])
    return markdown(["kernel", "registers", "bound", "threads a block", "warps resident"], rows)


def cost_table(found: dict[tuple[str, str, str], dict[int, Cost]], archs: list[int]) -> str:
    gpus = [gpu for gpu in GPUS if gpu.arch in archs]
    shown = SHOWN if SHOWN in archs else archs[-1]
    rows, ratios = [], {arch: [1.0] for arch in archs}
    for key, by_arch in found.items():
        if shown not in by_arch:
            continue
        cost = by_arch[shown]
        kinds = [READS, ("store",), ("narrow load", "narrow store"), ("exp", "mufu"), ("fp32",)]
        core = sum(path.core for path in cost.paths) / cost.paths[0].elements
        row = [*key, str(cost.bytes), *(f"{cost.each(*names):.3g}" for names in kinds)]
        row.append(f"{cost.total:.1f} = {core:.1f} + {cost.total - core:.1f}")
        for gpu in gpus:
            limits = by_arch[gpu.arch].seconds(gpu) if gpu.arch in by_arch else {"": 0.0}
            binding = max(limits, key=lambda limit: limits[limit])
            row.append(f"{limits[binding] * 1e3:.2f} {binding}")
        rows.append(row)
        for arch, other in by_arch.items():
            ratios[arch].append(other.total / cost.total)
    head = ["operation", "π", "type", "bytes", "loads", "stores", "narrow", "MUFU", "FP32", "instructions"]
    others = "; ".join(f"sm_{a} {min(r):.2f} to {max(r):.2f} times" for a, r in ratios.items() if a != shown)
    table = markdown([*head, *(f"{gpu.name}, ms" for gpu in gpus)], rows)
    return f"{table}\n\nCounts are sm_{shown}'s. Other instructions: {others or 'not compiled'}."


def page(version: str, kernels: list[Kernel], archs: list[int], broken: int) -> str:
    peaks = (
        f"{g.name} | {g.bytes / 1e12:g} | {g.processors} | {g.clock / 1e9:g} | {g.fp32}".split(" | ") for g in GPUS
    )
    return f"""\
### Counted from the machine code

**COMPUTED FROM THE MACHINE CODE: NOTHING HERE IS MEASURED, NO GPU HAS RUN IT.** Written by `make cuda-check`
(`benchmarks/cuda_check.py`), nvcc {version}; violations of its rules: {broken}.

Registers (the most of all types and processes) and the warps that fit a multiprocessor, on {_names(archs)}:

{resource_table(kernels, archs)}

Bytes of memory and instructions per element, on the path that a warp takes through whole vectors, and the time of
{ROWS:,} rows of {N:,}:

{cost_table(costs(kernels), archs)}
Loads and stores are of 128 bits, narrow ones of fewer, those included that their predicate switches off. Where shared
memory keeps a row, the copy and each read of it count as loads; each GPU has the kernel for which it has the room.
Instructions are those from the first 128-bit access or exponential to the last, plus those around them. What is done
once a row is left out.

The time is the largest of five, which is named; each is taken at its peak, and all as overlapping. memory: bytes over
bandwidth (a row that is not kept is read again from the L2 cache, at no cost here); issue: instructions, four warps a
clock; FP32: additions, products and FMAs; MUFU: 16 a clock; L1, and shared memory: 128 bytes a clock, where π is read
word by word, by lanes that are a vector apart. Each GPU is given its own architecture's code. Integer pipes, the L2
cache, latency, launches and tails are left out. Peaks are those of the vendor's datasheets; the clocks are assumed, at
or below the boost clock:

{markdown(["GPU", "TB/s", "multiprocessors", "GHz", "FP32 a clock"], list(peaks))}"""


def _names(archs: list[int]) -> str:
    return " / ".join(f"sm_{arch}" for arch in archs)


def refresh(docs: Path, text: str) -> None:
    before = docs.read_text(encoding="utf-8") if docs.is_file() else ""
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise SystemExit(f"cuda-check: {docs} needs the lines '{BEGIN}' and '{END}' around its tables, once each")
    head, tail = before[: before.index(BEGIN) + len(BEGIN)], before[before.index(END) :]
    temporary = docs.with_name(f".{docs.name}")
    temporary.write_text(f"{head}\n\n{text}\n\n{tail}", encoding="utf-8")
    os.replace(temporary, docs)


# ----------------------------------------------------------------------------------------------------------- the tools


def find_tool(name: str, beside: str | None = None) -> str | None:
    """As CUDACXX says (nvcc), on PATH, beside another tool, in CUDA_HOME or /usr/local/cuda, or in a PyPI package."""
    chosen = shutil.which(os.environ.get("CUDACXX", "")) if name == "nvcc" else None
    folders = [Path(beside).resolve().parent] if beside else []
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders += [Path(home, "bin") for home in homes if home]
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"), reverse=True)
    return chosen or shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def run(*command: str | Path) -> str:
    """Both streams. A failure ends the check, with what the tool said."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"cuda-check: {' '.join(map(str, command))} failed\n{done.stdout}")
    return done.stdout


def compile_kernels(nvcc: str, cuobjdump: str, sources: list[Path], archs: list[int]) -> list[Kernel]:
    """Two compilers at once. PTX of the newest architecture has to compile, and that is all."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def job(source: Path, arch: int, ptx: bool) -> list[Kernel]:
            out = Path(folder, f"{source.stem}.{arch}.{'ptx' if ptx else 'cubin'}")
            kind = ["-ptx", f"-arch=compute_{arch}"] if ptx else ["-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
            log = run(nvcc, *FLAGS, *kind, "-I", source.resolve().parent.parent, source, "-o", out)
            return [] if ptx else kernels_of(source.stem, arch, log, run(cuobjdump, "-sass", out))

        jobs = [pool.submit(job, source, arch, False) for arch in archs for source in sources]
        jobs += [pool.submit(job, source, archs[-1], True) for source in sources]
        return [kernel for done in jobs for kernel in done.result()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="*", help="files to check (all of csrc/cuda)")
    parser.add_argument("--archs", default=",".join(map(str, LIMITS)), help="architectures (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for everything that was counted")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/kernels.md", help="page to refresh (%(default)s)")
    parser.add_argument("--check-only", action="store_true", help="no tables, and the page is left alone")
    options = parser.parse_args(arguments)
    if not set(options.archs.split(",")) <= set(map(str, LIMITS)):
        parser.error(f"--archs: expected some of {','.join(map(str, LIMITS))}, got {options.archs}")

    nvcc = find_tool("nvcc")
    cuobjdump = find_tool("cuobjdump", beside=nvcc)
    if nvcc is None or cuobjdump is None:
        missing = "cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)" if nvcc else "nvcc"
        print(f"cuda-check: {missing} not found on PATH, in CUDA_HOME or among Python's packages", file=sys.stderr)
        return 2
    version = re.findall(r"release ([\d.]+)", run(nvcc, "--version"))[0]
    known = run(nvcc, "--list-gpu-code").split()
    archs = sorted(int(arch) for arch in options.archs.split(",") if f"sm_{arch}" in known)
    if skipped := [f"sm_{arch}" for arch in options.archs.split(",") if int(arch) not in archs]:
        print(f"cuda-check: nvcc {version} does not know {', '.join(skipped)}: skipped", file=sys.stderr)
    if not archs:
        return 2

    sources = options.sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    kernels = compile_kernels(nvcc, cuobjdump, sources, archs)
    broken = [f"sm_{k.arch} {k.label}: {what}" for k in kernels for what in violations(k)]
    stems, there = {source.stem for source in sources}, {kernel.key for kernel in kernels}
    broken += [f"{key}: not found" for key in BOUNDS if key.split(".")[0] in stems and key not in there]
    if not options.check_only:
        text = page(version, kernels, archs, len(broken))
        print(text, end="\n\n")
        if options.sources or archs != list(LIMITS):
            print(f"cuda-check: {options.docs} left alone: not everything was compiled", file=sys.stderr)
        else:
            refresh(options.docs, text)
    if options.json is not None:
        times = [
            {"operation": key, "arch": arch, "seconds": {g.name: cost.seconds(g) for g in GPUS if g.arch == arch}}
            for key, by_arch in costs(kernels).items()
            for arch, cost in by_arch.items()
        ]
        report = {"nvcc": version, "violations": broken, "kernels": [asdict(k) for k in kernels], "times": times}
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    count = sum(kernel.resources.registers > 0 for kernel in kernels)
    print(f"cuda-check: {count} kernels on {_names(archs)} by nvcc {version}; violations: {len(broken)}")
    print("".join(f"  {line}\n" for line in broken), end="")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
