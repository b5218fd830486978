"""Mistakes put into the CUDA kernels, one at a time, to see that the driver or a sanitizer notices every one.

``python tests/cuda_on_cpu/mutants.py [NAME]...`` prints the table. Nothing is kept from run to run: the kernels are
compiled without optimisation, which is faster than to look for what is still valid.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

if __package__:
    from . import build
else:
    import build

Check = Literal["values", "address", "thread"]

FAMILIES = ("generalized_masked", "mean_prediction", "reverse", "reverse_mean", "score_entropy", "transition", "unmask")
"""The sources, without .cu."""

CHECKS: dict[Check, tuple[str, ...]] = {
    "values": (),
    "address": ("-fsanitize=address,alignment", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"),
    "thread": ("-fsanitize=thread", "-g1"),
}
ARGUMENTS: dict[Check, tuple[str, ...]] = {
    "values": ("--quick",),
    "address": ("--quick", "--in-turn"),
    "thread": ("--quick", "--in-turn", "greedy", "random"),
}
# A traced process cannot look for leaks, and nothing here tests for them.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0 halt_on_error=1"}


class Mutant(NamedTuple):
    """In ``csrc/cuda/{file}``, which has ``text`` once, ``replacement`` takes its place.

    ``caught_by`` is the cheapest check that cannot but notice it, and the one that is run. ``family`` is the source
    that is compiled with it and whose launchers run.
    """

    name: str
    file: str
    text: str
    replacement: str
    caught_by: Check = "values"
    family: str = "reverse"


MEAN: list[tuple[str, str, str, Check]] = [
    (
        "no barrier before a mean step's draw",
        "    __syncthreads();  // wait for the sums of the segments\n    if (!task.exists || !task.leads()) return;",
        "    if (!task.exists || !task.leads()) return;",
        "values",
    ),
    (
        "no barrier before the masses",
        "    __syncthreads();  // wait for the sums of the segments\n    if (task.moves() && task.leads()) {",
        "    if (task.moves() && task.leads()) {",
        "values",
    ),
    (
        "a mean step's kept row is not waited for",
        "            if constexpr (kKeep) wait_for_segment();\n",
        "",
        "values",
    ),
    (
        "mean steps of a block share their copy",
        "memory + task.slot * row_bytes",
        "memory",
        "values",
    ),
    (
        "room for one kept row of a mean step",
        "block_rows * row_bytes + shared_bytes",
        "row_bytes + shared_bytes",
        "values",
    ),
    ("no barrier after the masses", "    __syncthreads();  // wait for the masses\n", "", "values"),
    ("a mean step reads MASK", "dim, segment, term.mask,", "dim, segment, -1,", "values"),
    ("a mean step's x in a vector", "y + j == x ? none : l[j]", "l[j]", "values"),
    ("a mean step's x among single entries", "            if (y == x) return;\n", "", "values"),
    ("a segment keeps its old scale", "        sums.exps *= scale;\n", "", "values"),
    ("the powers' sum keeps its old scale", "if constexpr (kPower) sums.weighted *= scale;", "", "values"),
    (
        "the entry of the first number",
        "draw_stationary_without(p, excluded_tokens(p, task.token), u.second)",
        "draw_stationary_without(p, excluded_tokens(p, task.token), u.first)",
        "values",
    ),
    ("a draw from μ by the first number", "point = u.second;", "point = u.first;", "values"),
    ("a mean step returns MASK", "if (y == forbidden) return Real(0);", "", "values"),
    ("shared memory for a mean row", "return block_rows * segments *", "return segments *", "address"),
    ("every lane writes a segment's sums", "if (lane_of() == 0) state = {", "state = {", "thread"),
    (
        "a part's x is counted from the row's start",
        "x = static_cast<int>(token - p.first);",
        "x = static_cast<int>(token);",
        "values",
    ),
    (
        "a part's MASK is counted from the row's start",
        "static_cast<int>(p.mask - p.first)",
        "static_cast<int>(p.mask)",
        "values",
    ),
    (
        "a part's powers begin with the row's",
        "static_cast<const Real*>(p.power) + p.first",
        "static_cast<const Real*>(p.power)",
        "values",
    ),
    ("a part's entry is counted from its own start", "token = p.first + pick_entry(", "token = pick_entry(", "values"),
    (
        "a part's rows are as wide as the vocabulary",
        "pi_x > 0.0 ? row * p.stride : 0",
        "pi_x > 0.0 ? row * p.dim : 0",
        "address",
    ),
    (
        "a part reads x of another",
        "is_here ? static_cast<double>(Vector<T>::read(task.logits + task.x)) : 0.0;",
        "static_cast<double>(Vector<T>::read(task.logits + task.x));",
        "address",
    ),
    (
        "the parts' sums leave out the powers",
        "{sums.top, sums.exps, sums.weighted, logit_x}",
        "{sums.top, sums.exps, sums.exps, logit_x}",
        "values",
    ),
    (
        "every process draws",
        "point = p.targets[task.row];",
        "point = p.targets[task.row] >= 0.0 ? p.targets[task.row] : 0.0;",
        "values",
    ),
    (
        "unmoved rows are added by each process",
        "p.targets != nullptr ? 0 : task.stays_at(p);",
        "task.stays_at(p);",
        "values",
    ),
    ("every lane writes a part's sums", "if (lane_of() == 0) p.sums[task.row] = {", "p.sums[task.row] = {", "thread"),
    (
        "more rows choose than there are",
        "if (row < p.rows) static_cast<int64_t*>(p.out)[row] = choose_mean",
        "static_cast<int64_t*>(p.out)[row] = choose_mean",
        "address",
    ),
]
"""Mistakes in reverse_mean.cu: name, text, replacement and the check that notices them."""

UNMASK: list[tuple[str, str, str, Check]] = [
    (
        "no barrier before the tile's state",
        "    __syncthreads();  // wait for the segments\n",
        "",
        "values",
    ),
    (
        "no barrier after a nucleus's draw",
        "        __syncthreads();  // wait for the drawn token\n",
        "",
        "values",
    ),
    (
        "no barrier before a nucleus's sums are read",
        "        __syncthreads();  // wait for the sums\n",
        "",
        "values",
    ),
    (
        "a token is drawn from the nucleus without a look",
        "if (!(sum_segments(picks, segments) >= p.top_p * total)) break;",
        "break;",
        "values",
    ),
    ("MASK is drawn from", "y != mask && l > low ?", "l > low ?", "values"),
    (
        "the second largest logit is that of one vector",
        "second = lower > rest ? lower : rest;",
        "second = rest;",
        "values",
    ),
    ("the last of equal logits is the largest", "y < argmax);", "y > argmax);", "values"),
    (
        "a segment's sums keep the lane's largest logit",
        "s.exps = warp_sum(s.exps * scale);",
        "s.exps = warp_sum(s.exps);",
        "values",
    ),
    (
        "the entropy forgets the change of the largest logit",
        "(s.weighted + by * s.exps) * scale",
        "s.weighted * scale",
        "values",
    ),
    (
        "draws are not tempered",
        "s.draws += Normaliser<T>::relative(l, s.top, factor);",
        "s.draws += Normaliser<T>::relative(l, s.top);",
        "values",
    ),
    (
        "a lane writes the state that others read",
        "                __syncwarp();  // wait until every lane has read the state\n",
        "",
        "values",
    ),
    ("every tile is the first", "p.first > 0 ? p.states[row] : unmask_start();", "unmask_start();", "values"),
    ("the token is one of the tile", "state.token = p.first + y;", "state.token = y;", "values"),
    ("the most probable token is one of the tile", "tile.argmax += tile.argmax >= 0 ? p.first : 0;", "", "values"),
    ("a row beyond the last one is read", "const bool exists = row < p.rows;", "const bool exists = true;", "address"),
]
"""Mistakes in unmask.cu: name, text, replacement and the check that notices them."""

MUTANTS = [
    # ---- Barriers, and what they are for ----
    Mutant(
        "no barrier after the sums",
        "reverse.cu",
        "    __syncthreads();  // wait for the sums of the segments\n",
        "",
    ),
    Mutant(
        "no barrier before the clamp",
        "reverse.cu",
        "        __syncthreads();  // wait for the total, and until the sums are read\n",
        "",
    ),
    Mutant(
        "no barrier after the clamp",
        "reverse.cu",
        "        __syncthreads();  // wait for the weights of the segments\n",
        "",
    ),
    Mutant(
        "no barrier before the probabilities",
        "reverse.cu",
        "    __syncthreads();  // wait for the total\n",
        "",
    ),
    Mutant(
        "no barrier before the draw", "reverse.cu", "    __syncthreads();  // wait for the sums of the scores\n", ""
    ),
    Mutant(
        "no barrier before the second draw",
        "reverse.cu",
        "        __syncthreads();  // wait for the sums of the weights\n",
        "",
    ),
    Mutant(
        "no barrier before the second sweep",
        "reverse.cu",
        "        __syncthreads();  // wait for `refused`, and until the sums are read\n",
        "",
    ),
    Mutant(
        "no __syncwarp before the state is written",
        "reverse.cu",
        "    __syncwarp();  // wait until every lane has read the state\n",
        "",
        "thread",
    ),
    Mutant(
        "warps without a row leave before the barrier",
        "reverse.cu",
        "    const bool moves = task.moves(), first_lane",
        "    if (!task.exists) return;\n    const bool moves = task.moves(), first_lane",
    ),
    Mutant(
        "warps without a row leave before the draw",
        "reverse.cu",
        "    bool moves = task.moves();\n",
        "    bool moves = task.moves();\n    if (!task.exists) return;\n",
    ),
    Mutant(
        "every lane writes the sum",
        "reverse.cu",
        "if (first_lane) sums[s] = sum;\n            }\n        }\n        __syncthreads();  // wait for the s",
        "sums[s] = sum;\n            }\n        }\n        __syncthreads();  // wait for the s",
        "thread",
    ),
    Mutant(
        "every lane writes the state",
        "reverse.cu",
        "        if (first_lane) {\n            state.others = others;",
        "        {\n            state.others = others;",
        "thread",
    ),
    Mutant(
        "rows of a block share their sums",
        "reverse.cu",
        "(states + block_rows) + task.slot * segments;",
        "(states + block_rows);",
    ),
    Mutant(
        "rows of a block share their state",
        "reverse.cu",
        "RowState& state = states[task.slot]",
        "RowState& state = states[0]",
    ),
    Mutant(
        "rows of a block share the sums drawn from",
        "reverse.cu",
        "all_sums + task.slot * segments;\n    SampleState",
        "all_sums;\n    SampleState",
    ),
    Mutant(
        "rows of a block share what was refused",
        "reverse.cu",
        "SampleState& state = states[task.slot]",
        "SampleState& state = states[0]",
    ),
    Mutant("shared memory for one row", "reverse.cu", "= block_rows * (state_bytes", "= (state_bytes", "address"),
    # ---- Rows kept in shared memory ----
    Mutant("a kept row is not waited for", "reverse.cu", "            if constexpr (kKeep) wait_for_segment();\n", ""),
    Mutant(
        "a segment too few is waited for",
        "kept.cuh",
        "__pipeline_wait_prior(kCopies - 1)",
        "__pipeline_wait_prior(kCopies)",
    ),
    Mutant(
        "fewer copies than are counted",
        "kept.cuh",
        "    for (; groups < kCopies; ++groups) __pipeline_commit();\n",
        "",
    ),
    Mutant(
        "the copies that are left are not counted",
        "kept.cuh",
        "    __pipeline_wait_prior(kCopies - 1);\n    __pipeline_commit();\n",
        "    __pipeline_wait_prior(kCopies - 1);\n",
    ),
    Mutant("a kept row starts at a boundary", "kept.cuh", "memory + reinterpret_cast<uintptr_t>(row) % 16", "memory"),
    Mutant("the partial vectors of a row are not kept", "kept.cuh", "kept[y] = row[y];", ";"),
    Mutant("vectors behind the row are copied", "kept.cuh", "begin >= 0 && begin + width <= dim", "begin >= 0"),
    Mutant(
        "a warp copies another's segments",
        "reverse.cu",
        "in_memory, dim, task.first_segment, segments",
        "in_memory, dim, (task.first_segment + 1) % row_warps, segments",
        "thread",
    ),
    Mutant("rows of a block share their copy", "reverse.cu", "memory + task.slot * row_bytes", "memory"),
    Mutant("room for one kept row", "reverse.cu", "block_rows * row_bytes + shared_bytes", "row_bytes + shared_bytes"),
    Mutant("a row is kept that does not fit", "launch.cuh", "bytes <= most", "bytes <= most + 1"),
    Mutant("a row that just fits is not kept", "launch.cuh", "bytes <= most", "bytes < most"),
    Mutant(
        "a kernel is not allowed its shared memory",
        "launch.cuh",
        "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) == cudaSuccess",
        "true",
    ),
    Mutant(
        "a kept row has no room for its head", "kept.cuh", "16 * num_vectors(dim, dtype)", "element_bytes(dtype) * dim"
    ),
    # ---- Devices ----
    Mutant(
        "launches go to the caller's device",
        "launch.cuh",
        "current != device) error = cudaSetDevice(device);",
        "current != device) error = cudaSuccess;",
    ),
    Mutant(
        "device 0 is put back",
        "launch.cuh",
        "    const cudaError_t error = cudaGetLastError();\n",
        "    const cudaError_t error = cudaGetLastError();\n    cudaSetDevice(0);\n",
        family="transition",
    ),
    # ---- Shuffles ----
    Mutant(
        "warp_sum without its first step",
        "segments.cuh",
        "offset = kWarp / 2;",
        "offset = kWarp / 4;",
        family="score_entropy",
    ),
    Mutant(
        "warp_sum without its last step",
        "segments.cuh",
        "offset > 0; offset /= 2",
        "offset > 1; offset /= 2",
        family="score_entropy",
    ),
    Mutant(
        "a lane too few in the mask", "segments.cuh", "kAll = 0xffffffffu", "kAll = 0x7fffffffu", family="score_entropy"
    ),
    Mutant("scan leaves a lane out", "draw.cuh", "if (lane_of() >= offset)", "if (lane_of() > offset)"),
    Mutant("a vote of the lanes without a hit", "draw.cuh", "value > 0.0 && target < end", "!(target < end)"),
    # ---- The ends of a row ----
    Mutant(
        "segments without the head",
        "segments.cuh",
        "(width - 1 + dim + width",
        "(dim + width",
        family="score_entropy",
    ),
    Mutant(
        "vectors without the head",
        "segments.cuh",
        "lane_of()) * width - head",
        "lane_of()) * width",
        "address",
        family="score_entropy",
    ),
    Mutant(
        "vectors before the row",
        "segments.cuh",
        "return y >= 0 && y + width",
        "return y + width",
        family="score_entropy",
    ),
    Mutant(
        "vectors past the row",
        "segments.cuh",
        "y >= 0 && y + width <= dim",
        "y >= 0 && y < dim",
        "address",
        family="score_entropy",
    ),
    Mutant(
        "vectors are loaded wherever they lie",
        "segments.cuh",
        "if (is_whole(first + i * stride)) raw[i]",
        "raw[i]",
        "address",
        family="score_entropy",
    ),
    Mutant(
        "an entry past the row",
        "segments.cuh",
        "begin + width && y < dim; ++y) {",
        "begin + width && y <= dim; ++y) {",
        "address",
        family="score_entropy",
    ),
    Mutant(
        "entries before the row",
        "segments.cuh",
        "for (int y = begin < 0 ? 0 : begin; y < begin + width && y < dim; ++y) {",
        "for (int y = begin; y < begin + width && y < dim; ++y) {",
        "address",
        family="score_entropy",
    ),
    Mutant(
        "a vector is written past the row",
        "segments.cuh",
        "if (begin >= 0 && begin + width <= dim)",
        "if (begin >= 0 && begin < dim)",
        "address",
        family="transition",
    ),
    Mutant(
        "an entry is written past the row",
        "segments.cuh",
        "begin + width && y < dim; ++y) V::write",
        "begin + width && y <= dim; ++y) V::write",
        "address",
        family="transition",
    ),
    Mutant(
        "vectors are written wherever rows start",
        "segments.cuh",
        "if (reinterpret_cast<uintptr_t>(out) % 16 == 0)",
        "if (true)",
        "address",
        family="score_entropy",
    ),
    Mutant(
        "a sum too many",
        "segments.cuh",
        "s < segments; s += kWarp",
        "s <= segments; s += kWarp",
        family="score_entropy",
    ),
    Mutant(
        "the draw looks at a sum too many", "draw.cuh", "s < segments ? static", "s <= segments ? static", "address"
    ),
    Mutant("the draw stays in the first 32 segments", "draw.cuh", "begin += kWarp", "begin += segments"),
    Mutant(
        "the draw stays in its first vectors",
        "draw.cuh",
        "if (w.lane >= 0) break;\n        target = w.target;",
        "if (w.lane >= 0) break;",
    ),
    Mutant("the draw goes on behind its vector", "draw.cuh", "        if (w.lane >= 0) break;\n", ""),
    Mutant(
        "the draw looks for its entry in the first lane's vector",
        "draw.cuh",
        "(lane - lane_of()) * width + i",
        "-lane_of() * width + i",
    ),
    Mutant("the draw looks for its entry in the first vector", "draw.cuh", "* width + i * stride;", "* width;"),
    Mutant("a vector has the weight of its last single entry", "draw.cuh", "sums[i] += value;", "sums[i] = value;"),
    Mutant("x among the entries of the drawn vector", "draw.cuh", "y < dim && y != x;", "y < dim;"),
    Mutant(
        "16-bit scores are powers of another base",
        "vectors.cuh",
        "kLog2e = 0x1.715476p0f",
        "kLog2e = 0x1.7154p0f",
        family="score_entropy",
    ),
    Mutant(
        "the shift of 16-bit scores is in powers of 2",
        "vectors.cuh",
        "-value * Real(kLog2e) : value",
        "-value : value",
        family="score_entropy",
    ),
    Mutant(
        "16-bit logits are not tempered",
        "vectors.cuh",
        "exponential2(x * (by * kLog2e))",
        "exponential2(x * kLog2e)",
        family="unmask",
    ),
    Mutant(
        "logits of -inf have a weight of NaN",
        "softmax.cuh",
        "l - (top == none().top ? Real(0) : top)",
        "l - top",
        family="mean_prediction",
    ),
    Mutant(
        "unmoved rows without their last segment", "reverse.cu", "Vector<Real>::kWidth + 2;", "Vector<Real>::kWidth;"
    ),
    Mutant(
        "segments at their neighbour's place",
        "segments.cuh",
        "(piece << bits) + (warp",
        "piece + (warp",
        family="score_entropy",
    ),
    # ---- Which entry, which number ----
    Mutant(
        "x in a vector's last place",
        "segments.cuh",
        ">= static_cast<unsigned>(width);",
        ">= static_cast<unsigned>(width - 1);",
        family="score_entropy",
    ),
    Mutant("x among single entries", "segments.cuh", "if (y != skip) one", "one", family="score_entropy"),
    Mutant("x_0 is like the others", "score_entropy.cu", " || in_vector(x_0, y)", "", family="score_entropy"),
    Mutant("the second random number", "reverse.cu", "draw(others, others, u.first)", "draw(others, others, u.second)"),
    Mutant(
        "no entry is refused",
        "reverse.cu",
        "                refused =\n                    !(u.second",
        "                refused = score < 0.0 &&\n                    !(u.second",
    ),
    Mutant(
        "a refused entry's row drains nothing",
        "reverse.cu",
        "weights.drain = reverse_drain<Real>(p, state.numbers, state.others);\n            weights.forbidden",
        "weights.forbidden",
    ),
    Mutant(
        "a refused entry's row may return MASK",
        "reverse.cu",
        "            weights.forbidden = static_cast<int>(p.forbidden);\n",
        "",
    ),
    Mutant("the second sweep draws with the first's number", "reverse.cu", "uniforms(1).first", "uniforms(0).first"),
    Mutant(
        "offsets of 32 bits",
        "reverse.cu",
        "(moves ? task.row * p.dim : 0);\n    const Real* stationary",
        "(moves ? static_cast<int>(task.row * p.dim) : 0);\n    const Real* stationary",
    ),
    # ---- Bad rows ----
    Mutant("a bad row has probabilities of 0", "reverse.cu", "Real(0) : not_a_number<Real>()", "Real(0) : Real(0)"),
    Mutant(
        "a row without distribution stays",
        "reverse.cu",
        "!valid_total(self + sum)) return -1;",
        "!valid_total(self + sum)) return x;",
    ),
    Mutant(
        "a bad row's entries are not written",
        "transition.cu",
        "        numbers[row] = {nan, nan, nan, nan};\n",
        "        static_cast<void>(nan);\n",
        family="transition",
    ),
    Mutant(
        "a bad row's gradient is not written",
        "score_entropy.cu",
        "        numbers[row] = {nan, nan, nan};\n",
        "        static_cast<void>(nan);\n",
        family="score_entropy",
    ),
    Mutant(
        "a bad row's loss is 0",
        "score_entropy.cu",
        "fault ? not_a_number<Real>() : Real(0);",
        "Real(0);",
        family="score_entropy",
    ),
    Mutant(
        "a negative token is not bad",
        "reverse.cu",
        "exists && !fault ? row_pi<Real>(p, row) : 0.0;\n",
        "exists && (!fault || p.x_t[row] == -1) ? row_pi<Real>(p, row) : 0.0;\n",
        "address",
    ),
    Mutant(
        "a token is used before it is checked",
        "score_entropy.cu",
        "return valid_token(x, p.dim) && can_move<P>(static_cast<const Real*>(p.stationary), p.dim, x);",
        "return can_move<P>(static_cast<const Real*>(p.stationary), p.dim, x) && valid_token(x, p.dim);",
        family="score_entropy",
    ),
    # ---- Workspace ----
    Mutant(
        "a workspace without the sums of the last segment",
        "reverse.cu",
        "rows * segments * real_bytes",
        "rows * (segments - 1) * real_bytes",
        "address",
    ),
    Mutant(
        "a workspace without the head's segment",
        "score_entropy.cu",
        "2 * rows * num_segments(dim, dtype)",
        "2 * rows * num_segments(dim - 16 / element_bytes(dtype), dtype)",
        "address",
        "score_entropy",
    ),
    Mutant(
        "a tile's workspace without the rows' numbers",
        "score_entropy.cu",
        " + score_entropy_backward_workspace(rows, width, dtype);",
        ";",
        "address",
        "score_entropy",
    ),
    # ---- Tiles: where they lie in the row ----
    Mutant("a tile's x is counted from the row's start", "reverse.cu", " : -1) - p.first;", " : -1);"),
    Mutant("a tile's entry is counted from its own start", "reverse.cu", "p.first + entry;", "entry;"),
    Mutant("a tile's π begins with the row's", "reverse.cu", "stationary + p.first : nullptr", "stationary : nullptr"),
    Mutant(
        "what is forbidden is counted from the row's start",
        "reverse.cu",
        "static_cast<int>(p.forbidden - p.first)",
        "static_cast<int>(p.forbidden)",
    ),
    Mutant(
        "a gradient tile's x is counted from the row's start",
        "score_entropy.cu",
        "const int x = in_tile(p, p.x_t[place.row])",
        "const int x = static_cast<int>(p.x_t[place.row])",
        "address",
        "score_entropy",
    ),
    Mutant(
        "a gradient tile's π begins with the row's",
        "score_entropy.cu",
        "static_cast<const Real*>(p.stationary) + p.first : nullptr",
        "static_cast<const Real*>(p.stationary) : nullptr",
        family="score_entropy",
    ),
    # ---- Tiles: what is kept from one to the next ----
    Mutant("every tile begins a sweep", "reverse.cu", "if (p.first == 0) draw = {", "if (true) draw = {"),
    Mutant("no tile is the last", "reverse.cu", "p.first + p.width == p.dim", "p.first + p.width > p.dim"),
    Mutant(
        "a draw at a target begins the sweep",
        "reverse.cu",
        "    if (!at_target) {\n        if (p.first == 0)",
        "    {\n        if (p.first == 0)",
    ),
    Mutant(
        "the target is a random number of the process",
        "reverse.cu",
        "at_target ? p.targets[task.row] : tile_target",
        "false ? p.targets[task.row] : tile_target",
    ),
    Mutant(
        "a target beyond the tile's sum", "reverse.cu", "if (at_target || target < sum) {", "if (target < sum / 2) {"
    ),
    Mutant(
        "sums of a tile are the first lane's", "reverse.cu", "p.sums[task.row] = sum;", "p.sums[task.row] = sums[0];"
    ),
    Mutant(
        "every lane writes the sums of its tile",
        "reverse.cu",
        "if (first_lane) p.sums[task.row] = sum;",
        "p.sums[task.row] = sum;",
        "thread",
    ),
    Mutant(
        "more rows choose a part than there are",
        "reverse.cu",
        "if (row < p.rows) choose_part(p, row);",
        "choose_part(p, row);",
        "address",
    ),
    Mutant(
        "the second sweep drains nothing",
        "reverse.cu",
        "weights.drain = converted<Real>(p.draws[task.row].drain);",
        "",
    ),
    Mutant(
        "the second sweep forgets the scores' sum",
        "reverse.cu",
        "draw = {draw.others, draw.drain",
        "draw = {0.0, draw.drain",
    ),
    Mutant(
        "the drawn entry's score is not shifted",
        "reverse.cu",
        "weights.score(Vector<T>::read(log_score + entry))",
        "exponential(Vector<T>::read(log_score + entry))",
    ),
    Mutant(
        "every tile begins the loss",
        "score_entropy.cu",
        "    if (p.first > p.begin) {\n        sweep = p",
        "    if (false) {\n        sweep = p",
        family="score_entropy",
    ),
    Mutant(
        "no tile completes the loss",
        "score_entropy.cu",
        "if (p.first + p.width < p.dim) return;",
        "if (p.first + p.width <= p.dim) return;",
        family="score_entropy",
    ),
    Mutant(
        "ℓ of x_0 is read where its gradient is",
        "score_entropy.cu",
        "    sweep.scores += score;\n",
        "    const int x_0 = in_tile(p, p.x_0[row]);\n"
        "    if (weight > 0.0 && x_0 >= 0) {\n"
        "        const double l = Vector<T>::read(static_cast<const T*>(p.log_score) + row * p.stride + x_0);\n"
        "        sweep.log_score_x_0 = p.shift != nullptr ? l - p.shift[row] : l;\n"
        "    }\n"
        "    sweep.scores += score;\n",
        family="score_entropy",
    ),
    # ---- Tiles: x, x_0 and bad rows ----
    Mutant(
        "the gradient is computed although it is there",
        "score_entropy.cu",
        "place.segment >= split.segments || is_done(p)) return;",
        "place.segment >= split.segments) return;",
        family="score_entropy",
    ),
    Mutant(
        "the gradient stays for another factor",
        "score_entropy.cu",
        "*p.unless_one == 1.0;",
        "*p.unless_one > 0.0;",
        family="score_entropy",
    ),
    Mutant("x keeps its log-score", "score_entropy.cu", " V::write(out + x, Real(0));", ";", family="score_entropy"),
    Mutant(
        "x_0 of a tile is like the others",
        "score_entropy.cu",
        "l[j] = y + j == x_0 ? n.at_x_0 : l[j];",
        "l[j] = y + j == x_0 ? l[j] : l[j];",
        family="score_entropy",
    ),
    Mutant(
        "a bad row's gradient tile is 0",
        "score_entropy.cu",
        "weight == 0.0 ? Real(0) : not_a_number<Real>();",
        "Real(0);",
        family="score_entropy",
    ),
    Mutant(
        "a bad row's loss over tiles is 0",
        "score_entropy.cu",
        "        if (fault) sweep.row.weight = not_a_number<double>();\n",
        "",
        family="score_entropy",
    ),
    # ---- Generalised masked diffusion ----
    Mutant(
        "v is among the other tokens",
        "generalized_masked.cu",
        "static_cast<int>(p.x_0[place.row] - p.first), [&]",
        "-1, [&]",
        family="generalized_masked",
    ),
    Mutant(
        "MASK has a share",
        "generalized_masked.cu",
        "static_cast<int>(generalized_masked_tokens(p)), place.segment",
        "static_cast<int>(p.width), place.segment",
        family="generalized_masked",
    ),
    Mutant(
        "a lower largest logit",
        "generalized_masked.cu",
        "        total *= scale;\n",
        "",
        family="generalized_masked",
    ),
    Mutant(
        "the weighted sum of a segment is not rescaled",
        "generalized_masked.cu",
        "        dot *= scale;\n",
        "",
        family="generalized_masked",
    ),
    Mutant(
        "every lane writes a segment's sums of masked diffusion",
        "generalized_masked.cu",
        "if (lane_of() == 0) segments[",
        "segments[",
        "thread",
        "generalized_masked",
    ),
    Mutant(
        "v has the gradient of the others",
        "generalized_masked.cu",
        "if (static_cast<unsigned>(n.v - y) < static_cast<unsigned>(width)) {",
        "if (false) {",
        family="generalized_masked",
    ),
    Mutant(
        "MASK has a gradient in masked diffusion",
        "generalized_masked.cu",
        "row_logits<T>(p, place.row), count, place.segment, -1,",
        "row_logits<T>(p, place.row), all, place.segment, -1,",
        family="generalized_masked",
    ),
    Mutant(
        "a bad row of masked diffusion has no loss",
        "generalized_masked.cu",
        "fault ? not_a_number<Real>() : Real(0);",
        "Real(0);",
        family="generalized_masked",
    ),
    Mutant(
        "a bad row of masked diffusion has no gradient",
        "generalized_masked.cu",
        "n.v == kUnmasked ? Real(0) : not_a_number<Real>();",
        "Real(0);",
        family="generalized_masked",
    ),
    Mutant(
        "a clean token is used before it is checked",
        "generalized_masked.cu",
        "    if (generalized_masked_fault(p, row) != Fault::none) {\n",
        "    if (generalized_masked_fault(p, row) == Fault::x_t) {\n",
        "address",
        "generalized_masked",
    ),
    Mutant(
        "v's power has the gradient of the others",
        "generalized_masked.cu",
        "if (n.v < 0 || n.v == column)",
        "if (n.v < 0)",
        family="generalized_masked",
    ),
    Mutant(
        "rows that are not masked move the powers",
        "generalized_masked.cu",
        "numbers[row] = {Real(0), Real(0), Real(0), Real(0), Real(0), kUnmasked};",
        "numbers[row] = {Real(0), Real(1), Real(0), Real(0), Real(1), 0};",
        family="generalized_masked",
    ),
    Mutant(
        "a column more",
        "generalized_masked.cu",
        "if (column >= p.width) return;\n    const int64_t begin",
        "if (column > p.width) return;\n    const int64_t begin",
        "address",
        "generalized_masked",
    ),
    Mutant(
        "a workspace without the sums of the last rows",
        "generalized_masked.cu",
        "column_chunks(rows) * width",
        "(column_chunks(rows) - 1) * width",
        "address",
        "generalized_masked",
    ),
    Mutant(
        "a power of MASK",
        "generalized_masked.cu",
        "if (column < generalized_masked_tokens(p)) {",
        "if (column < p.width) {",
        family="generalized_masked",
    ),
    Mutant(
        "a slice has the powers of the first",
        "generalized_masked.cu",
        "static_cast<const Real*>(p.power) + p.first;",
        "static_cast<const Real*>(p.power);",
        family="generalized_masked",
    ),
    Mutant(
        "a slice leaves out the v of another",
        "generalized_masked.cu",
        "static_cast<int>(p.x_0[place.row] - p.first), [&]",
        "static_cast<int>(p.x_0[place.row]), [&]",
        family="generalized_masked",
    ),
    Mutant(
        "a slice reads a v that it does not have",
        "generalized_masked.cu",
        "const bool has_v = v >= 0 && v < p.width;",
        "const bool has_v = true;",
        "address",
        "generalized_masked",
    ),
    Mutant(
        "rows whose v is in another slice are bad",
        "generalized_masked.cu",
        "v >= 0 && v < p.width ? static_cast<int>(v) : kElsewhere",
        "static_cast<int>(v)",
        family="generalized_masked",
    ),
    Mutant(
        "every slice has MASK",
        "generalized_masked.cu",
        "if (count < all && place.segment == 0",
        "if (place.segment == 0",
        "address",
        "generalized_masked",
    ),
    Mutant(
        "the loss of a slice",
        "generalized_masked.cu",
        "    if (p.stage == Stage::loss) {\n        all = p.row_sums[row];\n",
        "    if (p.stage == Stage::logits) {\n        all = p.row_sums[row];\n",
        family="generalized_masked",
    ),
    # ---- Tiles: barriers, and who writes ----
    Mutant(
        "no barrier after a tile's sums",
        "reverse.cu",
        "    __syncthreads();  // wait for the sums of the segments, and until the drain is read\n",
        "",
    ),
    Mutant(
        "warps without a row leave before a tile's barrier",
        "reverse.cu",
        "    const int64_t x_here",
        "    if (!task.exists) return;\n    const int64_t x_here",
    ),
    Mutant(
        "rows of a block share a tile's sums",
        "reverse.cu",
        "all_sums + task.slot * segments;\n    const int64_t x_here",
        "all_sums;\n    const int64_t x_here",
    ),
    Mutant(
        "shared memory for one row's tile",
        "reverse.cu",
        "sizeof(RealOf<T>)) * block_rows *",
        "sizeof(RealOf<T>)) *",
        "address",
    ),
    Mutant(
        "every lane writes what was drawn",
        "reverse.cu",
        "    if (!first_lane) return;\n    if (p.first",
        "    if (p.first",
        "thread",
    ),
    Mutant(
        "every lane writes a tile's sums",
        "score_entropy.cu",
        "    if (lane_of() != 0) return;\n    if constexpr (kGradient) {  // visit",
        "    if constexpr (kGradient) {  // visit",
        "thread",
        "score_entropy",
    ),
    Mutant(
        "every lane adds a tile's sums",
        "score_entropy.cu",
        "    if (lane_of() != 0) return;\n    sweep.scores",
        "    sweep.scores",
        family="score_entropy",
    ),
    # ---- Mean prediction ----
    Mutant(
        "MASK is in the softmax",
        "mean_prediction.cu",
        "return y == x || y == x_0 || y == mask; }",
        "return y == x || y == x_0; }",
        family="mean_prediction",
    ),
    Mutant(
        "x is among the others of its vector",
        "mean_prediction.cu",
        "return in(x) || in(x_0) || in(mask);",
        "return in(x_0) || in(mask);",
        family="mean_prediction",
    ),
    Mutant(
        "x_0 is among the others, as a single entry",
        "mean_prediction.cu",
        "[&](int y, Real l) { one(y, special.contains(y) ? nothing : l); });",
        "[&](int y, Real l) { one(y, y != special.x_0 && special.contains(y) ? nothing : l); });",
        family="mean_prediction",
    ),
    Mutant(
        "a segment's normaliser ignores its largest logit",
        "softmax.cuh",
        "return {top, warp_sum(n.total * Normaliser<T>::relative(n.top, top))};",
        "return {top, warp_sum(n.total)};",
        family="mean_prediction",
    ),
    Mutant(
        "the lane's sum is not rescaled",
        "softmax.cuh",
        "total = total * relative(top, higher) + sum_of(terms);",
        "total = total + sum_of(terms);",
        family="mean_prediction",
    ),
    Mutant(
        "the normaliser has one segment too few",
        "softmax.cuh",
        "for (int s = lane_of(); s < count; s += kWarp) {",
        "for (int s = lane_of(); s < count - (count > 8); s += kWarp) {",
        family="mean_prediction",
    ),
    Mutant(
        "the sums of a loss are those of the first warp's segments",
        "mean_prediction.cu",
        "for (int s = lane_of(); s < segments; s += kWarp) {",
        "for (int s = lane_of(); s < (segments < 8 ? segments : 8); s += kWarp) {",
        family="mean_prediction",
    ),
    Mutant(
        "π of special entries is in the sums",
        "mean_prediction.cu",
        "        if (special.contains(y)) pi = 0;\n",
        "",
        family="mean_prediction",
    ),
    Mutant(
        "the mean of a uniform π is its sum",
        "mean_prediction.cu",
        "sum.pi_ratio /= static_cast<double>(p.dim);",
        ";",
        family="mean_prediction",
    ),
    Mutant(
        "x_0's gradient is like the others'",
        "mean_prediction.cu",
        "y == special.x_0 ? at_x_0 : value;",
        "value;",
        family="mean_prediction",
    ),
    Mutant(
        "MASK has a gradient",
        "mean_prediction.cu",
        "return y == special.mask ? Real(0) : y == special.x ?",
        "return y == special.x ?",
        family="mean_prediction",
    ),
    Mutant(
        "a bad row's gradient is 0",
        "mean_prediction.cu",
        "return fault ? not_a_number<Real>() : Real(0); });",
        "return Real(0); });",
        family="mean_prediction",
    ),
    Mutant(
        "a bad row's loss of a mean prediction is 0",
        "mean_prediction.cu",
        "[row] = fault ? not_a_number<Real>() : Real(0);",
        "[row] = Real(0);",
        family="mean_prediction",
    ),
    Mutant(
        "the workspace has no room for the sums",
        "mean_prediction.cu",
        "5 * real_bytes(dtype);  // Normaliser and SegmentSums",
        "2 * real_bytes(dtype);",
        "address",
        "mean_prediction",
    ),
    Mutant(
        "every lane writes the numbers of its row",
        "mean_prediction.cu",
        "    if (lane_of() != 0) return;\n    const T* l",
        "    const T* l",
        "thread",
        "mean_prediction",
    ),
    Mutant(
        "a slice leaves out the x of another",
        "mean_prediction.cu",
        "x(static_cast<int>(p.x_t[row] - p.first))",
        "x(static_cast<int>(p.x_t[row]))",
        family="mean_prediction",
    ),
    Mutant(
        "a slice leaves out the MASK of another",
        "mean_prediction.cu",
        "mask(static_cast<int>(p.mask - p.first))",
        "mask(static_cast<int>(p.mask))",
        family="mean_prediction",
    ),
    Mutant(
        "a slice has the π of the first",
        "mean_prediction.cu",
        "static_cast<const Real*>(p.stationary) + p.first : nullptr",
        "static_cast<const Real*>(p.stationary) : nullptr",
        family="mean_prediction",
    ),
    Mutant(
        "a slice reads an x that it does not have",
        "mean_prediction.cu",
        "y != special.mask && y >= 0 && y < p.width;",
        "y != special.mask;",
        "address",
        "mean_prediction",
    ),
    Mutant(
        "every slice has a softmax of its own",
        "mean_prediction.cu",
        "if (p.stage == Stage::whole || p.stage == Stage::logits) {",
        "if (p.stage != Stage::loss) {",
        family="mean_prediction",
    ),
    Mutant(
        "the loss is that of no slice",
        "mean_prediction.cu",
        "        if (p.stage == Stage::loss) sum = p.row_sums[row];\n",
        "",
        family="mean_prediction",
    ),
    # ---- Reverse steps from a mean prediction ----
    *(
        Mutant(name, "reverse_mean.cu", text, replacement, caught_by, "reverse_mean")
        for name, text, replacement, caught_by in MEAN
    ),
    *(
        Mutant(name, "unmask.cu", text, replacement, caught_by, "unmask")
        for name, text, replacement, caught_by in UNMASK
    ),
    Mutant(
        "a mean step's draw does not scale its segments",
        "reverse_mean.cu",
        "sums[s].weighted : sums[s].exps) * scale;",
        "sums[s].weighted : sums[s].exps);",
        family="reverse_mean",
    ),
    # ---- Rows that do not follow each other ----
    *(
        Mutant(
            f"{what} {family} follow each other", f"{family}.cu", text, text.replace("stride", "width"), family=family
        )
        for what, family, text in (
            ("rows of", "reverse_mean", "row * p.stride"),
            ("rows of", "reverse", "task.row * p.stride"),
            ("rows of", "unmask", "row * p.stride"),
            ("rows of", "score_entropy", "(p.log_score) + place.row * p.stride"),
            ("logits of x_0 in", "score_entropy", "(p.log_score) + row * p.stride"),
            ("gradients of", "score_entropy", "(p.gradient) + place.row * p.stride"),
            ("rows of", "mean_prediction", "(p.logits) + row * p.stride"),
            ("gradients of", "mean_prediction", "place.row * p.stride"),
            ("rows of", "generalized_masked", "(p.logits) + row * p.stride"),
            ("gradients of", "generalized_masked", "place.row * p.stride"),
        )
    ),
]
if repeated := [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1]:
    raise ValueError(f"MUTANTS: expected different names, got several of {', '.join(map(repr, repeated))}")


def run(program: Path, *arguments: str, limit: float = 300) -> subprocess.CompletedProcess[str]:
    """The driver's run; subprocess.TimeoutExpired after ``limit`` seconds, as a mistake may make it go on and on."""
    command = [program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | OPTIONS, timeout=limit)


def first_line(result: subprocess.CompletedProcess[str]) -> str:
    """What a run that failed said was wrong."""
    summary = re.search(r"^SUMMARY: (.*)$|^(.*: runtime error: .*)$", result.stderr, re.MULTILINE)
    lines = [summary[0]] if summary else [line for line in (result.stdout + result.stderr).splitlines() if line]
    line = lines[0] if lines and result.returncode >= 0 else f"signal {-result.returncode}"
    return re.sub(r"\S*/(\w+\.(?:cuh?|h|cpp))\b", r"\1", line.removeprefix("SUMMARY: "))


def replace_once(path: Path, text: str, replacement: str) -> None:
    """In a file that has the text once; ValueError otherwise."""
    content = path.read_text()
    if content.count(text) != 1:
        raise ValueError(f"{path.name} has {content.count(text)} of {text!r}")
    path.write_text(content.replace(text, replacement))


class Bench:
    """Builds drivers with mutated kernels in a folder. What they have in common is compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = cache(lambda: self.compiled(build.HERE / "driver.cpp", "driver", "-O2"))
        self.originals: dict[str, Path] = {}
        self.lock = Lock()

    def original(self, family: str) -> Path:
        """The source without a mutant and without a sanitizer, as nothing of it runs; compiled when first asked for."""
        with self.lock:
            if family not in self.originals:
                self.originals[family] = self.compiled(build.ROOT / f"csrc/cuda/{family}.cu", family)
            return self.originals[family]

    def compiled(self, source: Path, name: str, *flags: str, csrc: Path = build.ROOT / "csrc") -> Path:
        includes = (f"-I{csrc}", f"-I{build.HERE / 'include'}")
        return self._made(self.folder / f"{name}.o", *build.FLAGS, *includes, *flags, "-x", "c++", "-c", str(source))

    def program(self, name: str, check: Check, objects: Iterable[Path]) -> Path:
        script = f"-Wl,-T,{build.LINKER_SCRIPT}"
        return self._made(self.folder / name, *map(str, objects), *CHECKS[check], script, "-pthread")

    def _made(self, path: Path, *command: str) -> Path:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        result = subprocess.run([*compiler, *command, "-o", str(path)], capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{shlex.join([*compiler, *command])}\n{result.stderr}")
        return path

    def catch(self, mutant: Mutant) -> str | None:
        """The first line of what its check says of the mutant; None if it notices nothing."""
        check = mutant.caught_by
        with self.mutated(mutant) as csrc:
            others = (family for family in FAMILIES if family != mutant.family)
            source = csrc / f"cuda/{mutant.family}.cu"
            changed = self.compiled(source, csrc.parent.name, *CHECKS[check], csrc=csrc)
            objects = [self.driver(), changed, *(self.original(family) for family in others)]
            program = self.program(f"{csrc.parent.name}.out", check, objects)
            result = run(program, "--only", mutant.family, *ARGUMENTS[check])
            program.unlink()
            changed.unlink()
        return first_line(result) if result.returncode != 0 else None

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[Path]:
        """A copy of csrc with the mutant in it, and without float16, which takes a quarter of the time to compile."""
        with tempfile.TemporaryDirectory(dir=self.folder) as copy:
            csrc = Path(copy) / "csrc"
            shutil.copytree(build.ROOT / "csrc", csrc)
            replace_once(csrc / "cuda/segments.cuh", "return f(static_cast<Half*>(nullptr));", 'return "float16";')
            replace_once(csrc / "cuda" / mutant.file, mutant.text, mutant.replacement)
            yield csrc


def catch_all(mutants: Iterable[Mutant]) -> dict[Mutant, str | None]:
    """What is said of each; two are worked on at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        bench = Bench(Path(folder))
        bench.driver()  # before two ask for it at once
        chosen = list(mutants)
        return dict(zip(chosen, pool.map(bench.catch, chosen), strict=True))


def table(caught: dict[Mutant, str | None]) -> str:
    """A line for each mutant."""
    width = max(len(mutant.name) for mutant in caught)
    return "\n".join(
        f"{mutant.name:{width}}  {mutant.caught_by:7}  {report or 'SURVIVES'}" for mutant, report in caught.items()
    )


def main(names: list[str]) -> int:
    """Prints the table; 1 if a mutant survives."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"NAME: expected names of mutants, got {', '.join(sorted(unknown))}")
        return 2
    caught = catch_all([mutant for mutant in MUTANTS if not names or mutant.name in names])
    print(table(caught))
    return 0 if all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
