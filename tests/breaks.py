"""Mistakes put into the package and into its tests, one at a time, to see that a test notices every one.

``python tests/breaks.py [NAME]...`` prints the table; it exits with 1 if a mistake survives. Each mistake is made in a
copy of the repository, where the tests named with it are run. Those of ``csrc/cuda`` are in ``cuda_on_cpu/mutants.py``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pybind11

ROOT = Path(__file__).resolve().parents[1]


class Break(NamedTuple):
    """In ``file``, which has ``text`` once, ``replacement`` takes its place; ``tests`` are pytest's arguments."""

    name: str
    file: str
    text: str
    replacement: str
    tests: str


TRANSITION = "tests/test_transition.py -k shapes_and_dtypes"
BREAKS = [
    # ---- where tests run ----
    Break(
        "labelled tests do not get their backend",
        "tests/conftest.py",
        '        request.getfixturevalue("backend")\n',
        "        pass\n",
        TRANSITION,
    ),
    Break(
        "the emulation is never switched on",
        "tests/backends.py",
        '_emulated_launcher() if backend.kind == "emulated" else CPU_LAUNCHER',
        "CPU_LAUNCHER",
        TRANSITION,
    ),
    Break(
        "an instruction set is never selected",
        "tests/backends.py",
        "            _C.select_isa(backend.variant)\n",
        "            pass\n",
        "tests/test_score_entropy.py -k test_value_and_gradient",
    ),
    Break(
        "comparisons with the CPU run on the emulation",
        "tests/backends.py",
        '_dispatch.LAUNCHERS["cpu"] = _emulated_launcher() if backend.kind == "emulated" else CPU_LAUNCHER',
        'if backend.kind == "emulated":\n            _dispatch.LAUNCHERS["cpu"] = _emulated_launcher()',
        "tests/test_cuda_kernels.py -k a_real_vocabulary",
    ),
    Break(
        "the emulation ignores the schedule",
        "tests/cuda_on_cpu/include/cuda_on_cpu/runtime.h",
        "cuda_on_cpu::Device::set_schedule(static_cast<cuda_on_cpu::Schedule>(i), seed);",
        "cuda_on_cpu::Device::set_schedule(cuda_on_cpu::Schedule::forward, seed);",
        TRANSITION,
    ),
    Break(
        "every_variant runs one variant",
        "tests/conftest.py",
        'if "every_variant" in marks:',
        'if "every_variant" not in marks:',
        "tests/test_labels.py",
    ),
    Break(
        "a case is left out under all schedules",
        "tests/conftest.py",
        "% len(SCHEDULES) == SCHEDULES.index(label.variant)",
        "% len(SCHEDULES) == SCHEDULES.index(label.variant) + 1",
        "tests/test_labels.py",
    ),
    Break(
        "costly tests are always left out",
        "tests/conftest.py",
        "recorded.get(item.nodeid) == digest:",
        "recorded:",
        "tests/test_labels.py",
    ),
    Break(
        "every process is absorbing",
        "tests/conftest.py",
        "return PROCESSES[request.param]",
        'return PROCESSES["absorbing"]',
        "tests/test_labels.py",
    ),
    Break(
        "threads are not set",
        "tests/conftest.py",
        "    yield torch.set_num_threads\n",
        "    yield lambda count: None\n",
        "tests/test_labels.py",
    ),
    Break(
        "every log-score is float32",
        "tests/explicit.py",
        ").to(dtype)",
        ").float()",
        "tests/test_labels.py",
    ),
    # ---- sedd_ext ----
    Break(
        "split: a softmax has the largest part for its total",
        "sedd_ext/linear_mean_prediction.py",
        "others.logsumexp(0)",
        "others.amax(0)",
        "tests/test_split.py -k mean_prediction --backend cpu",
    ),
    Break(
        "split: the sums of a mean prediction are those of a process",
        "sedd_ext/linear_mean_prediction.py",
        "        sums.start(row_sums)\n",
        "",
        "tests/test_split.py -k mean_prediction --backend cpu",
    ),
    Break(
        "split: each process divides the rows of a mean prediction by its own entries",
        "sedd_ext/linear_mean_prediction.py",
        "most = most_rows(a.weight.shape[0], a.dim, a.group)",
        "most = a.weight.shape[0]",
        "tests/test_split.py -k softmax_alike --backend cpu",
    ),
    Break(
        "split: the parts of a weighted sum have units of their own",
        "sedd_ext/linear_generalized_masked.py",
        "(dot * scale).sum(0)",
        "dot.sum(0)",
        "tests/test_split.py -k generalized_masked --backend cpu",
    ),
    Break(
        "split: a process has the gradient of its own powers alone",
        "sedd_ext/linear_generalized_masked.py",
        "                sums.start(in_power)\n",
        "                pass\n",
        "tests/test_split.py -k generalized_masked --backend cpu",
    ),
    Break(
        "split: a DTensor has as many rows for each process",
        "sedd_ext/split.py",
        "        dim = weight.shape[:1].numel() if dim is None else dim\n",
        "",
        "tests/test_split.py -k dtensor",
    ),
    Break(
        "kernels run on one thread",
        "sedd_ext/_dispatch.py",
        'arguments["threads"] = torch.get_num_threads()',
        'arguments["threads"] = 1',
        "tests/test_labels.py",
    ),
    Break(
        "two addresses of a kernel call are swapped",
        "sedd_ext/score_entropy.py",
        "        x_t=x_t.contiguous(),\n        x_0=x_0.contiguous(),\n",
        "        x_t=x_0.contiguous(),\n        x_0=x_t.contiguous(),\n",
        "tests/test_score_entropy.py -k value_and_gradient",
    ),
    Break(
        "a generator is ignored",
        "sedd_ext/_dispatch.py",
        "torch.randint(2**63 - 1, (1,), generator=generator, device=device)",
        "torch.randint(2**63 - 1, (1,), device=device)",
        "tests/test_reverse.py -k same_generator_same_tokens",
    ),
    Break(
        "the row after the bad one is named",
        "sedd_ext/_dispatch.py",
        'where = f"at index {_index(row, shape)}"',
        'where = f"at index {_index(row + 1, shape)}"',
        "tests/test_bad_input.py -k the_bad_row_is_named",
    ),
    Break(
        "the upstream gradient is ignored",
        "sedd_ext/score_entropy.py",
        "grad_loss = grad_loss.to(compute_dtype(log_score.dtype)).contiguous()",
        "grad_loss = torch.ones_like(grad_loss).to(compute_dtype(log_score.dtype)).contiguous()",
        "tests/test_score_entropy.py",
    ),
    Break(
        "bad rows do not reach the kernel that reports them",
        "sedd_ext/head.py",
        "index = (moves | ~good).nonzero().squeeze(1)",
        "index = moves.nonzero().squeeze(1)",
        "tests/test_bad_input.py -k linear",
    ),
    Break(
        "refused rows are not drawn again",
        "sedd_ext/linear_reverse.py",
        "drawn[again] = sweep_over(a, rows[again], draws[again], seed, 1)",
        "drawn[again] = a.x_t.reshape(-1)[rows[again]]",
        "tests/test_linear_reverse.py -k refused",
    ),
    Break(
        "split: tiles begin with the process's own entries",
        "sedd_ext/head.py",
        "-(self.first % width) if self.on_grid else 0",
        "0",
        "tests/test_split.py -k 'test_tokens' --backend cpu",
    ),
    Break(
        "split: tokens are drawn from the next tile's log-scores",
        "sedd_ext/linear_reverse.py",
        "start = (before + part) * width - a.first",
        "start = (before + part) * width - a.first + 1",
        "tests/test_split.py -k test_tokens --backend cpu",
    ),
    Break(
        "split: the second sweep chooses with the first one's numbers",
        "sedd_ext/linear_reverse.py",
        "        dim=a.dim,\n        sweep=sweep,\n",
        "        dim=a.dim,\n        sweep=0,\n",
        "tests/test_split.py -k refused_rows --backend cpu",
    ),
    Break(
        "split: a process draws at another one's targets",
        "sedd_ext/linear_reverse_mean.py",
        "targets=targets[share.first // most]",
        "targets=targets[(share.first // most + 1) % len(targets)]",
        "tests/test_split.py -k test_mean_tokens --backend cpu",
    ),
    Break(
        "split: sums of processes keep their own scale",
        "csrc/reverse_mean.h",
        "sums(r).top == top ? 1.0 : exp(sums(r).top - top);",
        "1.0;",
        "tests/test_split.py -k large_logits --backend cpu",
    ),
    Break(
        "split: a target remains relative to the tile",
        "csrc/reverse.h",
        "            rest -= sum;\n",
        "",
        "tests/test_split.py -k 'test_tokens or test_wide' --backend cpu",
    ),
    Break(
        "temperature does nothing",
        "sedd_ext/reverse.py",
        ".pow(1.0 / temperature)",
        ".pow(1.0)",
        "tests/test_linear_reverse.py -k temperature",
    ),
    Break(
        "top_p keeps one token too many",
        "sedd_ext/reverse.py",
        "ends - jump < top_p * ends[:, -1:]",
        "ends - jump <= top_p * ends[:, -1:] + jump",
        "tests/test_linear_reverse.py -k temperature",
    ),
    Break(
        "the entropy of uniform noise has the wrong sign",
        "sedd_ext/process.py",
        "None, -math.log(n))",
        "None, math.log(n))",
        "tests/test_score_entropy.py -k value_and_gradient",
    ),
    # ---- csrc ----
    Break(
        "random numbers have 33 bits",
        "csrc/common/random.h",
        "(static_cast<uint64_t>(high) << 21) | (low >> 11)",
        "(static_cast<uint64_t>(high) << 21) | (low >> 31)",
        "tests/test_transition.py -k 53_bits",
    ),
    Break(
        "1 - exp(-σ) loses small σ",
        "csrc/common/rank_one.h",
        "-expm1(-sigma)",
        "1.0 - exp(-sigma)",
        "tests/test_transition.py -k against_reference",
    ),
    Break(
        "σ = 0 passes",
        "csrc/common/rank_one.h",
        "return sigma >= kLeastNoise &&",
        "return sigma >= 0.0 &&",
        "tests/test_bad_input.py -k sigma",
    ),
    Break(
        "no entry is refused",
        "csrc/reverse.h",
        "? d.token : kSweepAgain;",
        "? d.token : d.token;",
        "tests/test_linear_reverse.py -k 'several_tiles or refused'",
    ),
    Break(
        "an argument that a kernel does not have is ignored",
        "csrc/bindings.h",
        "if (given.size() != (kFieldCount<Structs> + ...)) {",
        "if (false) {",
        "tests/test_build.py -k by_name",
    ),
    Break(
        "the loss lacks its constant",
        "csrc/score_entropy.h",
        "scores + row.constant - row.slope * dot",
        "scores - row.slope * dot",
        "tests/test_score_entropy.py -k value_and_gradient",
    ),
    Break(
        "one instruction set runs another's kernels",
        "csrc/cpu/dispatch.cpp",
        "#isa, isa::score_entropy,",
        "#isa, baseline::score_entropy,",
        "tests/test_labels.py",
    ),
    # ---- sedd ----
    Break(
        "the rate of the log-linear schedule is too small",
        "python/sedd/diffusion/schedule.py",
        "return (1 - self.eps) * slope / (1 - (1 - self.eps) * moved)",
        "return slope * (1 - self.eps) / (1 - moved + 1)",
        "tests/test_schedule.py",
    ),
    Break(
        "the loss is not weighted by the noise rate",
        "python/sedd/diffusion/position_loss.py",
        "return [(schedule.rate(t), {",
        "return [(1.0, {",
        "tests/test_objective.py",
    ),
    Break(
        "the last step may return MASK",
        "python/sedd/diffusion/reverse_steps.py",
        "walk.step(t, step, denoise=t_next is None)",
        "walk.step(t, step)",
        "tests/test_sample.py",
    ),
    Break(
        "given tokens are drawn anew",
        "python/sedd/diffusion/samplers.py",
        "        free = ~is_fixed.to(device)\n",
        "        free = torch.ones_like(free)\n",
        "tests/test_sample.py",
    ),
    Break(
        "a token that has changed is not shown to the network again",
        "python/sedd/diffusion/walk.py",
        "stale = active & (self.tokens != self._seen).any(1)",
        "stale = active & (self.tokens != self._seen).all(1)",
        "tests/test_sample.py",
    ),
    Break(
        "the optimiser's moments are not resumed",
        "python/sedd/training/state.py",
        '"state": by_index}',
        '"state": {}}',
        "tests/test_train.py -k resum",
    ),
    Break(
        "the random numbers are not resumed",
        "python/sedd/training/state.py",
        "np.random.SeedSequence([self.config.seed, self.step]).generate_state(1",
        "np.random.SeedSequence().generate_state(1",
        "tests/test_train.py -k resum",
    ),
    Break(
        "the order of the data is not resumed",
        "python/sedd/data/batches.py",
        '        self._consumed = state["consumed"]\n',
        "        self._consumed = 0\n",
        "tests/test_data.py tests/test_train.py -k resum",
    ),
    Break(
        "the average of the weights lags a step",
        "python/sedd/training/state.py",
        "decay = min(config.ema, (1 + self.step) / (10 + self.step))",
        "decay = min(config.ema, self.step / (9 + self.step))",
        "tests/test_train.py",
    ),
    Break(
        "bits per byte are bits per token",
        "python/sedd/diffusion/likelihood.py",
        "self.bits_per_token * self.tokens / self.n_bytes",
        "self.bits_per_token",
        "tests/test_evaluate.py tests/test_perplexity.py",
    ),
    Break(
        "the noise before t = 0 counts half",
        "python/sedd/diffusion/likelihood.py",
        "return 2 * self.sigma * t.double()",
        "return self.sigma * t.double()",
        "tests/test_evaluate.py",
    ),
    Break(
        "pickles are executed",
        "python/sedd/hub/weights.py",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        "tests/test_pretrained.py",
    ),
    Break(
        "sequences at times of their own share the first one's noise",
        "python/sedd/diffusion/walk.py",
        "        rows = sigma if sigma.numel() == 1 else sigma[where.nonzero()[:, 0]]\n",
        "        rows = sigma[:1]\n",
        "tests/test_sample.py -k sequence",
    ),
    Break(
        "a file may name a class to import",
        "python/sedd/options.py",
        "    if value not in allowed:\n        hint",
        "    if value not in allowed and __import__('sedd.registry').registry.import_outside(value):\n        hint",
        "tests/test_registry.py",
    ),
    # ---- runs, files and options ----
    Break(
        "nohup is not obeyed",
        "python/sedd/training/signals.py",
        "if previous[signal.SIGHUP] == signal.SIG_IGN:  # nohup",
        "if False:",
        "tests/test_train.py -k nohup",
    ),
    Break(
        "a damaged checkpoint is resumed from",
        "python/sedd/training/checkpoint.py",
        "                verify(path)\n                last = path\n",
        "                last = path\n",
        "tests/test_train.py tests/test_checkpoint.py -k damaged",
    ),
    Break(
        "numbers of a model's configuration may be NaN",
        "python/sedd/hub/formats.py",
        "    if not math.isfinite(number):\n",
        "    if False:\n",
        "tests/test_pretrained.py -k will_not_do",
    ),
    Break(
        "a file is renamed before it is on the disk",
        "python/sedd/files.py",
        "            flush(temporary)\n            temporary.replace(path)\n",
        "            temporary.replace(path)\n",
        "tests/test_faults.py",
    ),
    Break(
        "a checkpoint is renamed before its files are on the disk",
        "python/sedd/files.py",
        "    flush_folder(temporary)\n    temporary.rename(path)\n",
        "    temporary.rename(path)\n",
        "tests/test_faults.py",
    ),
    Break(
        "the CPU quota of a container is ignored",
        "python/sedd/threads.py",
        'if quota is not None and "OMP_NUM_THREADS" not in environ:',
        "if False:",
        "tests/test_threads.py -k quota",
    ),
    # ---- networks that predict the clean token ----
    Break(
        "mean: MASK's logit is not ignored",
        "sedd_ext/mean_prediction.py",
        "-1 if process.mask_id is None else process.mask_id",
        "-1",
        "tests/test_mean_prediction.py -k logit_of_mask --backend cpu",
    ),
    Break(
        "mean: the loss is not weighted",
        "sedd_ext/mean_prediction.py",
        "loss = loss * weight.to(loss.dtype)",
        "pass",
        "tests/test_mean_prediction.py -k weights --backend cpu",
    ),
    Break(
        "mean: fused gradients are not weighted",
        "sedd_ext/linear_mean_prediction.py",
        "upstream, unit = weights[at], None",
        "upstream, unit = torch.ones_like(weights[at]), None",
        "tests/test_linear_mean_prediction.py --backend cpu",
    ),
    Break(
        "mean: a discrete step's earlier noise is not cut into chunks",
        "sedd_ext/linear_mean_prediction.py",
        "None if sigma_s is None else sigma_s[at]",
        "sigma_s",
        "tests/test_linear_mean_prediction.py -k discrete --backend cpu",
    ),
    Break(
        "mean: chunks of rows are added up in bfloat16",
        "sedd_ext/head.py",
        "dtype = self.weight.dtype if alone else self.dtype",
        "dtype = self.dtype if alone else self.weight.dtype",
        "tests/test_linear_mean_prediction.py -k losses_and_gradients --backend cpu",
    ),
    Break(
        "mean: different upstream gradients are scaled as one",
        "sedd_ext/fused_loss.py",
        "if factor is not None:",
        "factor = grad_loss.reshape(-1)[0]\n        if factor is not None:",
        "tests/test_linear_mean_prediction.py -k losses_and_gradients --backend cpu",
    ),
    Break(
        "mean: a second derivative is silent",
        "sedd_ext/_autograd.py",
        'raise RuntimeError(f"{loss}: differentiable once only, and this asks for a second derivative")',
        "return None",
        "tests/test_mean_prediction.py tests/test_generalized_masked.py -k second --backend cpu",
    ),
    Break(
        "mean: samplers read logits as log-scores",
        "python/sedd/diffusion/diffusion.py",
        'return {"parameterization": "mean", "sigma": None if self.per_token else sigma}',
        "return {}",
        "tests/test_mean_objectives.py",
    ),
    Break(
        "mean: the objective has no noise rate",
        "python/sedd/diffusion/position_loss.py",
        "total = total + weight * scale * summed",
        "total = total + scale * summed",
        "tests/test_mean_objectives.py",
    ),
    Break(
        "mean: md4 takes any process",
        "python/sedd/diffusion/position_loss.py",
        'expect_process("md4", "absorbing", process)',
        "pass",
        "tests/test_mean_objectives.py",
    ),
    Break(
        "d3pm: the first step starts at the noise of the schedule",
        "python/sedd/diffusion/d3pm.py",
        "return torch.where(step > 0, noise, 0.0)",
        "return noise",
        "tests/test_bounds.py -k discrete",
    ),
    Break(
        "d3pm: the bound has the cross-entropy of training",
        "python/sedd/diffusion/d3pm.py",
        "return [(float(self.steps), self._arguments",
        "return [(float(self.steps) + self.ce_weight, self._arguments",
        "tests/test_bounds.py -k cross_entropy",
    ),
    Break(
        "d3pm: steps are rounded down",
        "python/sedd/diffusion/d3pm.py",
        "torch.ceil(checked_time(t) * self.steps - 1e-9)",
        "torch.floor(checked_time(t) * self.steps)",
        "tests/test_bounds.py -k discrete",
    ),
    Break(
        "genmd4: no REINFORCE",
        "python/sedd/diffusion/genmd4.py",
        "nats.sum(0) + reinforce + ",
        "nats.sum(0) + ",
        "tests/test_bounds.py -k reinforce",
    ),
    Break(
        "genmd4: REINFORCE twice as large",
        "python/sedd/diffusion/genmd4.py",
        "(first - second) * score",
        "2 * (first - second) * score",
        "tests/test_bounds.py -k reinforce",
    ),
    Break(
        "genmd4: log q of unmasked positions ignores ε",
        "python/sedd/diffusion/genmd4.py",
        "torch.where(x_t == len(self.raw_power), masked, torch.log1p(-masked.exp()))",
        "torch.where(x_t == len(self.raw_power), masked, torch.log1p(-(masked - math.log1p(-eps)).exp()))",
        "tests/test_bounds.py -k reinforce",
    ),
    Break(
        "genmd4: tokens are masked as if all powers were equal",
        "python/sedd/diffusion/genmd4.py",
        "return (1 - self.base.eps) * self.time(t).unsqueeze(-1) ** self._of(x_0)",
        "return (1 - self.base.eps) * self.time(t).unsqueeze(-1) ** self._of(x_0).mean()",
        "tests/test_bounds.py -k masks_each",
    ),
    Break(
        "genmd4: the bound leaves out the noise before the first time",
        "python/sedd/diffusion/likelihood.py",
        "return nats + diffusion.objective.reconstruction(diffusion, x_0.to(diffusion.device)).double().cpu()",
        "return nats",
        "tests/test_bounds.py -k all_of_its_parts",
    ),
    Break(
        "genmd4: samplers use one schedule for all tokens",
        "python/sedd/diffusion/genmd4.py",
        "return GeneralizedMasked(s, float(self.time(t)), self.power().detach())",
        "return GeneralizedMasked(s, float(self.time(t)), torch.ones_like(self.power().detach()))",
        "tests/test_mean_objectives.py -k frequencies",
    ),
    Break(
        "genmd4: a stored model has the initial powers",
        "python/sedd/hub/model.py",
        "{**self.state_dict(), **learned}",
        "self.state_dict()",
        "tests/test_objective_commands.py -k learned",
    ),
    Break(
        "tauldr: the rate of the jumps is left out",
        "python/sedd/diffusion/ablations.py",
        "options.scale * schedule.rate(t) * rate * nats",
        "options.scale * schedule.rate(t) * nats",
        "tests/test_bounds.py -k tauldr",
    ),
    Break(
        "implicit score entropy: the jump is weighted as if it were undone at the same rate",
        "python/sedd/diffusion/ablations.py",
        "leave = 1 - stationary[x_t]",
        "leave = stationary[x_t]",
        "tests/test_bounds.py -k neighbour",
    ),
    Break(
        "implicit score entropy: the first term has no stationary distribution",
        "python/sedd/diffusion/ablations.py",
        "_by_sequence(stationary * log_score.exp().sum(1), rows, x_t)",
        "_by_sequence(log_score.exp().sum(1), rows, x_t)",
        "tests/test_bounds.py -k implicit",
    ),
    Break(
        "concrete score: the clean token has no ratio of its own",
        "python/sedd/diffusion/ablations.py",
        "ratio.scatter_add(1, clean, kept / here).scatter(1, x, 0.0)",
        "ratio.scatter(1, x, 0.0)",
        "tests/test_bounds.py -k concrete",
    ),
    Break(
        "the cosine grid has its short steps at the text",
        "python/sedd/diffusion/sampler.py",
        "lambda u: torch.sin(math.pi / 2 * u)",
        "lambda u: 1 - torch.sin(math.pi / 2 * (1 - u))",
        "tests/test_mean_objectives.py -k cosine",
    ),
    Break(
        "d3pm: the first step is never trained",
        "python/sedd/diffusion/d3pm.py",
        "earliest_time: ClassVar[float] = 1e-6",
        "earliest_time: ClassVar[float] = 1e-3",
        "tests/test_bounds.py -k every_step",
    ),
    Break(
        "judge: a run scores the first token too",
        "python/sedd/commands/judge.py",
        "device=device), given=1)",
        "device=device), given=0)",
        "tests/test_autoregressive.py -k judges",
    ),
    Break(
        "genmd4: a run that starts from another forgets its powers",
        "python/sedd/training/run.py",
        "mine.load_state_dict(theirs.state_dict())",
        "pass",
        "tests/test_objective_commands.py -k learned",
    ),
    Break(
        "first hitting: a position leaves MASK as if it were alone",
        "python/sedd/diffusion/orders.py",
        " ** (1 / masked.sum(1).clamp(min=1).double())",
        "",
        "tests/test_samplers.py -k first_hitting",
    ),
    Break(
        "first hitting: the leftmost position goes first",
        "python/sedd/diffusion/orders.py",
        "_places(masked, walk.uniform(int(masked.sum()))) == 0",
        "masked & (masked.cumsum(1) == 1)",
        "tests/test_samplers.py -k first_hitting",
    ),
    Break(
        "first hitting: the share of noise is taken for the time",
        "python/sedd/diffusion/orders.py",
        "return walk.schedule.time(share.cpu() * most)",
        "return share.cpu()",
        "tests/test_samplers.py -k first_hitting",
    ),
    Break(
        "entropy-bounded: the largest entropy counts too",
        "python/sedd/diffusion/orders.py",
        ".cumsum(1).gather(1, places) - entropy",
        ".cumsum(1).gather(1, places)",
        "tests/test_samplers.py -k entropy",
    ),
    Break(
        "entropy-bounded: the order is that of the positions",
        "python/sedd/diffusion/orders.py",
        "places = _places(masked, found.entropy)",
        "places = _places(masked, -found.max_prob * 0)",
        "tests/test_samplers.py -k entropy",
    ),
    Break(
        "confidence is that of the most probable token",
        "python/sedd/diffusion/orders.py",
        "return found.token, found.log_prob",
        "return found.token, found.max_prob.log()",
        "tests/test_samplers.py -k confidence",
    ),
    Break(
        "margin: the least certain position goes first",
        "python/sedd/diffusion/orders.py",
        "return found.token, found.margin",
        "return found.token, -found.margin",
        "tests/test_samplers.py -k order",
    ),
    Break(
        "entropy: the least certain position goes first",
        "python/sedd/diffusion/orders.py",
        "return found.token, -found.entropy",
        "return found.token, found.entropy",
        "tests/test_samplers.py -k order",
    ),
    Break(
        "greedy decoding draws its tokens",
        "python/sedd/diffusion/orders.py",
        "return found.argmax, found.max_prob",
        "return found.token, found.max_prob",
        "tests/test_samplers.py -k independent",
    ),
    Break(
        "the steps of a sequence depend on the longest one in the batch",
        "python/sedd/diffusion/orders.py",
        "steps = size.clamp(min=1, max=self.steps).double()",
        "steps = size.amax().clamp(min=1, max=self.steps).double().expand(len(size))",
        "tests/test_samplers.py -k depend",
    ),
    Break(
        "a block begins before the one to its left has ended",
        "python/sedd/diffusion/orders.py",
        "walk.free = free & (block == i)",
        "walk.free = free & (block <= i + 1)",
        "tests/test_samplers.py -k left_to_right",
    ),
    Break(
        "ancestral: the rate of unmasking is that of the noise",
        "python/sedd/diffusion/reverse_steps.py",
        "leave = (moved - moved_next + back * (1 - moved)) / moved",
        "leave = (moved - moved_next + back * (1 - moved))",
        "tests/test_samplers.py -k ancestral",
    ),
    Break(
        "remask: as many positions unmask as without it",
        "python/sedd/diffusion/reverse_steps.py",
        "moved_next + back * (1 - moved)) / moved",
        "moved_next) / moved",
        "tests/test_samplers.py -k remasking",
    ),
    Break(
        "remask: given tokens return to MASK",
        "python/sedd/diffusion/reverse_steps.py",
        "returning = walk.free & ~masked & (u < back)",
        "returning = ~masked & (u < back)",
        "tests/test_samplers.py -k infilling",
    ),
    Break(
        "remask: positions return more often than the process allows",
        "python/sedd/diffusion/reverse_steps.py",
        "return min(self.eta, (1 - kept_next) / kept)",
        "return self.eta",
        "tests/test_samplers.py -k remasking",
    ),
    Break(
        "a corrector adds no noise",
        "python/sedd/diffusion/reverse_steps.py",
        "            walk.noise(float(step.noise))\n",
        "",
        "tests/test_samplers.py -k corrector",
    ),
    Break(
        "a corrector goes back further than it came",
        "python/sedd/diffusion/reverse_steps.py",
        "            walk.step(later, step)\n",
        "            walk.step(later, Tweedie(2 * float(step.noise)))\n",
        "tests/test_samplers.py -k corrector",
    ),
    Break(
        "a corrector noises given tokens",
        "python/sedd/diffusion/walk.py",
        "torch.where(self.free, noised, self.tokens)",
        "noised",
        "tests/test_samplers.py tests/test_sample.py -k infilling",
    ),
    Break(
        "positions are drawn without the temperature",
        "csrc/unmask.h",
        "? UnmaskSums::statistics : UnmaskSums::both;",
        "? UnmaskSums::statistics : UnmaskSums::statistics;",
        "tests/test_unmask.py -k distribution --backend cpu",
    ),
    Break(
        "a drawn token is not looked up in the nucleus",
        "csrc/cpu/unmask.cpp",
        "if (p.top_p < 1.0) y = blocks.nucleus(p, i, s, y);",
        "",
        "tests/test_unmask.py -k distribution --backend cpu",
    ),
    Break(
        "the entropy forgets the change of the largest logit",
        "csrc/unmask.h",
        "s.weighted = (s.weighted + by * s.exps) * scale;",
        "s.weighted = s.weighted * scale;",
        "tests/test_linear_unmask.py -k values --backend cpu",
    ),
    Break(
        "the random numbers of a row are those of its place in a tile",
        "sedd_ext/linear_unmask.py",
        "torch.arange(rows, device=a.hidden.device) if draw.row_ids is None",
        "torch.arange(rows, device=a.hidden.device) % 64 if draw.row_ids is None",
        "tests/test_linear_unmask.py -k distribution --backend cpu",
    ),
    Break(
        "a matrix product has the rows that there are",
        "sedd_ext/linear_unmask.py",
        "(0, 0, 0, -rows % chunk)",
        "(0, 0, 0, 0)",
        "tests/test_linear_unmask.py -k depend --backend cpu",
    ),
    Break(
        "unmasking waits for the device",
        "sedd_ext/linear_unmask.py",
        "    return results.tensors(batch)\n",
        "    assert int(results.out[:1].sum()) >= -1\n    return results.tensors(batch)\n",
        "tests/test_linear_unmask.py -k waits_for",
    ),
    Break(
        "a sampler for MASK tokens takes any process",
        "python/sedd/diffusion/sampler.py",
        'if self.needs_mask and diffusion.process.family != "absorbing":',
        "if False:",
        "tests/test_samplers.py -k refused",
    ),
    Break(
        "parameters of a sampler do not reach it",
        "python/sedd/commands/sample.py",
        "sampler=options.chosen(),",
        "sampler=options.sampler,",
        "tests/test_cli.py -k test_sample",
    ),
    Break(
        "the time of a share of noise forgets ε",
        "python/sedd/diffusion/schedule.py",
        "return self._inverse((moved / (1 - self.eps)).clamp(0, 1))",
        "return self._inverse(moved.clamp(0, 1))",
        "tests/test_samplers.py -k share",
    ),
    Break(
        "ordered: a step may write nothing",
        "python/sedd/diffusion/orders.py",
        "torch.ceil(size * t_next - 1e-6)).clamp(min=1)",
        "torch.ceil(size * t_next - 1e-6))",
        "tests/test_samplers.py -k positions_in_each_step",
    ),
    Break(
        "statistics of a position read scores as predictions",
        "python/sedd/diffusion/walk.py",
        'if self.process.family != "absorbing":  # the scores',
        "if False:  # the scores",
        "tests/test_samplers.py -k statistics",
    ),
    Break(
        "a sampler that does not suit the model is not refused early",
        "python/sedd/diffusion/samplers.py",
        "    found.check(diffusion)\n",
        "",
        "tests/test_objective_commands.py -k every_command",
    ),
    Break(
        "text27: a wrong name with a seed is not noticed",
        "examples/text27.sh",
        'base=$(options "${1%-seed*}") && echo',
        'base=$(options "${1%-seed*}") || true; echo',
        "tests/test_examples.py -k wrong_name",
    ),
    Break(
        "duo: noise is absorbing",
        "python/sedd/hub/formats.py",
        '"distillation"), "uniform")',
        '"distillation"), "absorbing")',
        "tests/test_pretrained.py -k duo",
    ),
    Break(
        "mean: a stored model forgets its objective",
        "python/sedd/hub/formats.py",
        '**({} if objective == "score_entropy" else {"objective": objective}),',
        "",
        "tests/test_pretrained.py -k clean_token",
    ),
    Break(
        "mean: SUBS is read as log-scores",
        "python/sedd/hub/formats.py",
        '"subs": "mean_prediction"',
        '"subs": "score_entropy"',
        "tests/test_pretrained.py -k clean_token",
    ),
    Break(
        "mean: α ignores μ_x",
        "csrc/mean_prediction.h",
        "alpha = r.rest_x + r.mu_x * kept",
        "alpha = r.rest_x + r.mu_x",
        "tests/test_mean_prediction.py -k explicit --backend cpu",
    ),
    Break(
        "mean: the term of y = x of a discrete step is left out",
        "csrc/mean_prediction.h",
        "entropy += excess_entropy(r.stay_e, r.stay_q, r.stay_t, -INFINITY);",
        "",
        "tests/test_mean_prediction.py -k explicit_divergence --backend cpu",
    ),
    Break(
        "mean: small ratios are computed by their difference",
        "csrc/cpu/mean_prediction.cpp",
        "f[k] = exponent == 0 ? r[k] : f[k];",
        "",
        "tests/test_mean_prediction.py -k small_losses --backend cpu",
    ),
    Break(
        "mean: the normaliser is not rescaled",
        "csrc/cpu/softmax.h",
        "total *= exp(top - logit);",
        "",
        "tests/test_mean_prediction.py -k value_and_gradient --backend cpu",
    ),
    Break(
        "autoregressive: the loss is that of another noise",
        "python/sedd/diffusion/autoregressive.py",
        "EVEN = math.log(2)",
        "EVEN = 1.0",
        "tests/test_autoregressive.py -k log_softmax",
    ),
    Break(
        "parallel: gradients are not averaged",
        "python/sedd/training/state.py",
        "last=part == config.accumulate - 1",
        "last=False",
        "tests/test_parallel.py -k one_run_on_two",
    ),
    Break(
        "parallel: every process has the noise of the first",
        "python/sedd/training/state.py",
        "first = (part * world.data_size + world.data_rank) * size",
        "first = part * world.data_size * size",
        "tests/test_parallel.py -k one_run_on_two",
    ),
    Break(
        "parallel: every process has the data of the first",
        "python/sedd/training/state.py",
        "[world.data_rank * size :][:size]",
        "[:size]",
        "tests/test_parallel.py -k one_run_on_two",
    ),
    Break(
        "parallel: the mean over processes is taken twice",
        "python/sedd/training/state.py",
        "scale=world.data_size / (count",
        "scale=1 / (count",
        "tests/test_parallel.py -k one_run_on_two",
    ),
    Break(
        "parallel: the head is gathered for every batch",
        "python/sedd/training/parallel.py",
        "model.set_reshard_after_backward(last, recurse=False)",
        "model.set_reshard_after_backward(True, recurse=False)",
        "tests/test_parallel.py -k gathered_once",
    ),
    Break(
        "parallel: gradients are averaged for every batch",
        "python/sedd/training/parallel.py",
        "model.set_requires_gradient_sync(last)",
        "model.set_requires_gradient_sync(True)",
        "tests/test_parallel.py -k gathered_once",
    ),
    Break(
        "parallel: a resumed run takes any batch",
        "python/sedd/training/state.py",
        "if saved != self.sequences_per_step:",
        "if False:",
        "tests/test_parallel.py -k another_batch",
    ),
    Break(
        "parallel: a signal stops one process",
        "python/sedd/training/parallel.py",
        "agreed: list[float] = previous[0].tolist()",
        "agreed: list[float] = values",
        "tests/test_parallel.py -k a_signal",
    ),
    Break(
        "parallel: the signal that torchrun passes on kills the process",
        "python/sedd/training/signals.py",
        'if "TORCHELASTIC_RUN_ID" in os.environ:',
        "if False:",
        "tests/test_parallel.py -k comes_twice",
    ),
    Break(
        "parallel: processes that share a vocabulary have other sequences",
        "python/sedd/training/parallel.py",
        "self.data_rank, self.data_size = self.rank // vocab, self.size // vocab",
        "self.data_rank, self.data_size = self.rank % vocab, self.size // vocab",
        "tests/test_parallel.py -k divided",
    ),
    Break(
        "parallel: the gradients of a vocabulary are added up",
        "python/sedd/training/vocabulary.py",
        "            mine /= self._group.size()\n",
        "",
        "tests/test_parallel.py -k divided",
    ),
    Break(
        "parallel: the gradients of a vocabulary are averaged for every batch",
        "python/sedd/training/vocabulary.py",
        "        if not self._is_last:\n            return\n",
        "",
        "tests/test_parallel.py -k averaged_once",
    ),
    Break(
        "parallel: gradients are clipped by the norm of the blocks",
        "python/sedd/training/parallel.py",
        "torch.linalg.vector_norm(torch.stack(norms))",
        "norms[-1]",
        "tests/test_parallel.py -k divided",
    ),
    Break(
        "parallel: FSDP casts the states between the blocks",
        "python/sedd/training/parallel.py",
        "cast_forward_inputs=False",
        "cast_forward_inputs=True",
        "tests/test_parallel.py -k bfloat16",
    ),
    Break(
        "parallel: FSDP adds up gradients in bfloat16",
        "python/sedd/training/parallel.py",
        "reduce_dtype=torch.float32",
        "reduce_dtype=None",
        "tests/test_scale.py -k 2",
    ),
    Break(
        "footprint: the blocks are gathered once for each batch",
        "python/sedd/footprint.py",
        "2 * blocks * config.accumulate",
        "blocks * config.accumulate",
        "tests/test_scale.py -k 4",
    ),
    Break(
        "footprint: shares are not padded",
        "python/sedd/footprint.py",
        "math.ceil(len(p) / layout.shard)",
        "(len(p) // layout.shard)",
        "tests/test_scale.py -k 4",
    ),
    Break(
        "footprint: FSDP never has whole gradients",
        "python/sedd/footprint.py",
        "whole = (blocks * block + root + own) if many else 0",
        "whole = own if many else 0",
        "tests/test_scale.py -k 2",
    ),
    Break(
        "footprint: autocast makes no copies of weights",
        "python/sedd/footprint.py",
        "weights = w * copies if w != FLOAT32 and",
        "weights = 0 if w != FLOAT32 and",
        "tests/test_scale.py -k 2",
    ),
    Break(
        "footprint: the order of gradients is that of the parameters",
        "python/sedd/footprint.py",
        "[named[name] for name in order if",
        "[named[name] for name in named if",
        "tests/test_scale.py -k 2",
    ),
    Break(
        "footprint: a split embedding is exchanged once a step",
        "python/sedd/footprint.py",
        "layout.rows * d * FLOAT32, passes, group",
        "layout.rows * d * FLOAT32, 1, group",
        "tests/test_scale.py -k vocabulary",
    ),
    Break(
        "parallel: gradients of DDP get memory of their own",
        "python/sedd/training/parallel.py",
        "    keep = isinstance(model, DistributedDataParallel)\n",
        "    keep = False\n",
        "tests/test_scale.py -k 2",
    ),
    Break(
        "split: the gradient of the embedding has the rows of all processes",
        "python/sedd/network.py",
        "        if mesh is None:\n            return F.embedding(x, rows)\n",
        "        if True:\n            return _whole(F.embedding(_like(x, rows), rows))\n",
        "tests/test_scale.py -k vocabulary",
    ),
    Break(
        "split: the gradient waits for the loss",
        "sedd_ext/linear_score_entropy.py",
        "            sums.start(parts)\n",
        "            sums.start(parts)\n            sums.wait()\n",
        "tests/test_split.py -k table",
    ),
    Break(
        "split: moments are given to parameters in the order of their names",
        "python/sedd/training/state.py",
        "indices = {name: ordered.index(id(value)) for name, value in parameters.items()}",
        "indices = {name: i for i, name in enumerate(parameters) if ordered}",
        "tests/test_parallel.py -k continues_without",
    ),
    Break(
        "emulation: a draw that rounding leads behind the last entry takes another one",
        "csrc/cuda/draw.cuh",
        "w.lane >= 0 ? w.target : INFINITY",
        "w.target",
        "tests/test_cuda_on_cpu.py -k entries_of_a_segment",
    ),
    Break(
        "emulation: the fast exponential is exact",
        "tests/cuda_on_cpu/include/cuda_runtime.h",
        "exact + error - (error < 2 ? 2 : 1);",
        "exact;",
        "tests/test_cuda_on_cpu.py -k powers_of_two",
    ),
    Break(
        "CUDA check: loads outside of the main loops count as one",
        "benchmarks/cuda_check.py",
        "        if wide and not paths:\n",
        "        if wide:\n",
        "tests/test_cuda_check.py -k in_no_main_loop",
    ),
    Break(
        "CUDA check: the outer loop is the main one",
        "benchmarks/cuda_check.py",
        "yield from list(main_loops(loop - {head})) or [(head, loop)]",
        "yield head, loop",
        "tests/test_cuda_check.py -k in_no_main_loop",
    ),
    Break(
        "CUDA check: alternatives stay in the order of their addresses",
        "benchmarks/cuda_check.py",
        "                kernel.paths.sort(key=lambda path: path.total)\n",
        "                pass\n",
        "tests/test_cuda_check.py -k sorted_by_length",
    ),
    Break(
        "CUDA check: exponentials beside those of the elements do not count",
        "benchmarks/cuda_check.py",
        "!= each * path.elements + more:",
        "< each * path.elements:",
        "tests/test_cuda_check.py -k exponentials_beside",
    ),
    Break(
        "CUDA check: any number of double-precision instructions will do",
        "benchmarks/cuda_check.py",
        "            if path.double > bounds.double:\n",
        "            if False:\n",
        "tests/test_cuda_check.py -k numbers_of_a_row",
    ),
    Break(
        "GPU check: two processes train on the same sequences",
        "python/sedd/training/state.py",
        "next(self.batches)[world.data_rank * size :][:size]",
        "next(self.batches)[:size]",
        "tests/test_gpu_check.py -k on_two_processes",
    ),
    Break(
        "split: every process adds the constant of the loss",
        "sedd_ext/linear_score_entropy.py",
        "return parts + constant if a.first == 0 else parts",
        "return parts + constant",
        "tests/test_split.py -k score_entropy",
    ),
    Break(
        "split: the gradient of the hidden states is that of a process's own entries",
        "sedd_ext/head.py",
        "                self._sums.start(self.hidden[tile.rows])\n",
        "                pass\n",
        "tests/test_split.py -k score_entropy",
    ),
    Break(
        "split: the entries of a process are counted from its first one",
        "sedd_ext/head.py",
        "self.first + entries.start, *last)",
        "entries.start, *last)",
        "tests/test_split.py -k score_entropy",
    ),
    Break(
        "split: each process divides the rows by its own entries",
        "sedd_ext/linear_score_entropy.py",
        "most = most_rows(a.weight.shape[0], dim, a.group)",
        "most = a.weight.shape[0]",
        "tests/test_split.py -k alike",
    ),
    Break(
        "parallel: a restart does not resume",
        "python/sedd/commands/train.py",
        "TORCHELASTIC_RESTART_COUNT",
        "RESTART_COUNT",
        "tests/test_parallel.py -k dies",
    ),
    # ---- checkpoints ----
    Break(
        "saving: what is written changes while training goes on",
        "python/sedd/training/run.py",
        "staged(tensors), values))",
        "tensors, values))",
        "tests/test_saving.py -k training_goes_on",
    ),
    Break(
        "saving: training waits until a checkpoint is written",
        "python/sedd/training/run.py",
        "        if last:\n            self.saver.wait(self.world.group)\n",
        "        self.saver.wait(self.world.group)\n",
        "tests/test_saving.py -k training_goes_on",
    ),
    Break(
        "saving: the last checkpoint is not waited for",
        "python/sedd/training/run.py",
        "        if last:\n            self.saver.wait(self.world.group)\n",
        "",
        "tests/test_saving.py -k 'an_error or is_a_curve'",
    ),
    Break(
        "saving: an error of writing is not raised",
        "python/sedd/training/saving.py",
        "lambda: None if result is None else result.result())",
        "lambda: None)",
        "tests/test_saving.py -k an_error",
    ),
    Break(
        "saving: old checkpoints are deleted before the new one is there",
        "python/sedd/training/run.py",
        "        texts, writers = self.tokenizer.files(), self.world.writers\n",
        "        texts, writers = self.tokenizer.files(), self.world.writers\n"
        "        list(map(__import__('shutil').rmtree, list_checkpoints(self.run_dir)))\n",
        "tests/test_saving.py -k old_checkpoints",
    ),
    Break(
        "saving: a checkpoint in the making is left when training fails",
        "python/sedd/training/run.py",
        "            self.saver,\n",
        "",
        "tests/test_saving.py -k in_the_making",
    ),
    Break(
        "saving: a loss that is not finite does not wait for the checkpoint",
        "python/sedd/training/run.py",
        "                self.saver.finish()\n",
        "",
        "tests/test_saving.py -k not_finite",
    ),
    Break(
        "saving: a checkpoint is renamed before its last file is there",
        "python/sedd/training/saving.py",
        '                (temporary / "state.json").write_text(_json(sealed(entries)), encoding="utf-8")\n'
        "                finish_folder(temporary, final)\n",
        "                finish_folder(temporary, final)\n"
        '                (final / "state.json").write_text(_json(sealed(entries)), encoding="utf-8")\n',
        "tests/test_faults.py -k run_goes_on",
    ),
    Break(
        "shards: the digests are those of the first process alone",
        "python/sedd/training/saving.py",
        "                for name, found in part.items()\n",
        "                for name, found in part.items()\n"
        "                if '/shard-' not in name or '-00001-model' in name\n",
        "tests/test_shards.py -k named",
    ),
    Break(
        "shards: a part that is not listed is read",
        "python/sedd/training/checkpoint.py",
        "files = list(dict.fromkeys([*shards, *_shards(checkpoint, name)]))",
        "files = shards",
        "tests/test_shards.py -k named",
    ),
    Break(
        "shards: a part that is not listed is no damage",
        "python/sedd/training/checkpoint.py",
        'for name in dict.fromkeys([*state["files"], *_shards(checkpoint)]):',
        'for name in state["files"]:',
        "tests/test_shards.py -k named",
    ),
    Break(
        "shards: parts are not verified",
        "python/sedd/training/checkpoint.py",
        "    if state is not None:\n        for file in files:",
        "    if state is not None and not shards:\n        for file in files:",
        "tests/test_shards.py -k named",
    ),
    Break(
        "shards: every process reads whole tensors",
        "python/sedd/training/shards.py",
        "if isinstance(model, DTensor) and model.shape == found.size:",
        "if False:",
        "tests/test_shards.py -k parts_alone",
    ),
    Break(
        "shards: whole tensors are written",
        "python/sedd/training/state.py",
        "return {stored_name(name): value for name, value in module.state_dict().items()}",
        "return {stored_name(name): whole(value) for name, value in module.state_dict().items()}",
        "tests/test_shards.py",
    ),
    Break(
        "shards: an error of one process is not told to the others",
        "python/sedd/training/shards.py",
        "        if problem is not None:\n            raise problem\n",
        "        if problem is not None and problem is failed:\n            raise problem\n",
        "tests/test_shards.py -k full",
    ),
    Break(
        "shards: an older PyTorch is not told",
        "python/sedd/training/shards.py",
        'if torch.__version__ < "2.9":',
        "if False:",
        "tests/test_shards.py -k older",
    ),
    Break(
        "times: only the whole batch is spread",
        "python/sedd/diffusion/objectives.py",
        "places = torch.arange(batch, device=device) * step % batch",
        "places = torch.arange(batch, device=device)",
        "tests/test_parallel.py -k consecutive",
    ),
    Break(
        "noise: concrete_score ignores the place in the batch",
        "python/sedd/diffusion/ablations.py",
        "first=options.first)\n        log_score, rows",
        "first=0)\n        log_score, rows",
        "tests/test_parallel.py -k of_its_parts",
    ),
    Break(
        "noise: sampled neighbours ignore the place in the batch",
        "python/sedd/diffusion/ablations.py",
        "[first:][: len(x_t)]",
        "[: len(x_t)]",
        "tests/test_parallel.py -k of_its_parts",
    ),
    Break(
        "bound: the noise depends on the batch size",
        "python/sedd/diffusion/likelihood.py",
        "generator=generator.manual_seed(seed), first=first",
        "generator=generator.manual_seed(seed)",
        "tests/test_evaluate.py -k batch_size",
    ),
    Break(
        "transition: first_row is ignored",
        "csrc/transition.h",
        "static_cast<uint64_t>(p.first_row + row)",
        "static_cast<uint64_t>(row)",
        "tests/test_transition.py -k parts_of_a_batch --backend cpu",
    ),
]


def run(mistake: Break, folder: Path) -> str | None:
    """The first test that notices the mistake in a copy of the repository; None if all pass."""
    file = folder / mistake.file
    text = file.read_text(encoding="utf-8")
    if text.count(mistake.text) != 1:
        raise ValueError(f"{mistake.name}: {mistake.file} has the text {text.count(mistake.text)} times, expected once")
    file.write_text(text.replace(mistake.text, mistake.replacement), encoding="utf-8")
    try:
        if mistake.file.startswith("csrc/"):
            build(folder)
        return red(mistake.tests, folder)
    finally:
        file.write_text(text, encoding="utf-8")


def red(tests: str, folder: Path) -> str | None:
    """The first failing test; None if all pass."""
    command = f"{sys.executable} -m pytest -q -x --tb=no -p no:cacheprovider --all {tests}"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{folder / 'python'}"}
    result = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if failed is None or not re.search(r"\d+ passed|\d+ failed", result.stdout):
        raise RuntimeError(f"{command}\n{result.stdout}{result.stderr}")
    return failed[1]


def build(folder: Path) -> None:
    """Compiles the CPU's kernels in place."""
    binary = folder / "build" / "breaks"
    if not binary.exists():
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder / "sedd_ext",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "SEDD_CUDA": "off",
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-G", "Ninja", "-S", folder, "-B", binary, *defines], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", binary, "--target", "_C"], check=True, capture_output=True)


def main(names: list[str]) -> int:
    """Prints what notices each mistake; returns how the command ends."""
    chosen = [mistake for mistake in BREAKS if not names or any(name in mistake.name for name in names)]
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    survivors = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in [*filter(None, files), *(str(path.relative_to(ROOT)) for path in ROOT.glob("sedd_ext/_C*.so"))]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        (folder / "build").mkdir()
        if (ROOT / "build" / "cuda_on_cpu").exists():
            shutil.copytree(ROOT / "build" / "cuda_on_cpu", folder / "build" / "cuda_on_cpu")
        # those that need no compiler first: a broken _C would stay
        for mistake in sorted(chosen, key=lambda mistake: mistake.file.startswith("csrc/")):
            noticed = run(mistake, folder)
            survivors += noticed is None
            print(f"{mistake.name:60}  {noticed or 'SURVIVES'}", flush=True)
    print(f"{len(chosen)} mistakes, {survivors} survive")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
