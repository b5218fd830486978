"""``sedd eval harness``: tasks of EleutherAI's lm-evaluation-harness, and the two measures that they need.

A task asks how likely a continuation is after a context, or whether greedy decoding would produce it. The context stays
clean and only the continuation is noised, as in infilling. :mod:`sedd.lm_eval_model` contains the class that the
harness calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sedd.config import check_options, resolve_device
from sedd.evaluate import Onset, prior_kl
from sedd.files import write_json
from sedd.hints import pip_install
from sedd.model import ScoreModel, device_of
from sedd.objective import noised_score_entropy
from sedd.progress import console
from sedd.schedule import Schedule
from sedd_ext import RankOne, sample_transition, tweedie_probs

__all__ = ["HarnessOptions", "continuation_bound", "greedy_continuation", "harness", "is_greedy"]


@dataclass
class HarnessOptions:
    """Evaluation"""

    tasks: list[str]
    """Names of tasks: those of the harness, such as lambada_openai, hellaswag, piqa, arc_easy, winogrande, or those in
    the folder --include_path."""
    include_path: str | None = None
    """A folder with tasks of your own, as YAML files. The harness runs Python code that such a file names
    (!function), so use only tasks that you trust."""
    limit: int | None = None
    """Use only this many questions of each task."""
    num_fewshot: int | None = None
    """Put this many solved examples before each question; default: as the task defines."""
    draws: int = 128
    """Noise levels for the likelihood of each answer."""
    steps: int = 64
    """Reverse steps for tasks that generate text."""
    seed: int = 0
    """Seed of noise levels, noise and samples."""
    batch_size: int = 32
    """Sequences in a call of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    json: str | None = None
    """Also write the results to this file."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=("limit", "draws", "steps", "batch_size"), outputs=("json",))
        if not self.tasks:
            raise ValueError("tasks: name at least one, for example --tasks lambada_openai")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise FileNotFoundError(f"include_path: there is no folder {self.include_path}")


def harness(run: str, options: HarnessOptions) -> int:
    """Runs tasks of the harness on a model and prints the harness's table."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ImportError(f"tasks need lm-eval: {pip_install('eval', 'lm_eval')}") from error
    from sedd.lm_eval_model import SEDDLM

    device = str(resolve_device(options.device))
    manager = TaskManager(include_path=options.include_path)
    if unknown := [name for name in options.tasks if not manager.match_tasks([name])]:
        raise ValueError(f"tasks: the harness knows no {', '.join(unknown)}; `lm_eval ls tasks` lists what it knows")
    model = SEDDLM(
        run,
        draws=options.draws,
        steps=options.steps,
        seed=options.seed,
        batch_size=options.batch_size,
        device=device,
    )
    results = lm_eval.simple_evaluate(
        model,
        tasks=options.tasks,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    out = console()
    for part in ("results", "groups"):
        if part in results:
            out.print(make_table(results, part))
    if options.json:
        kept = {name: results[name] for name in ("results", "configs", "versions", "n-samples") if name in results}
        # what JSON cannot say is written as text (functions of a task's configuration) or as null (NaN)
        plain = json.loads(json.dumps(kept, default=str), parse_constant=lambda _: None)
        write_json(Path(options.json), {"model": str(model.loaded.path), "draws": options.draws, **plain})
    return 0


def continuation_bound(
    model: ScoreModel,
    context: Sequence[int],
    continuation: Sequence[int],
    process: RankOne,
    schedule: Schedule,
    *,
    draws: int,
    length: int,
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """Estimates of the bound -log p(continuation | context) ≤ ∫ σ(t) Σ L dt + prior term, one for each noise level.

    Only the continuation diffuses: its tokens are noised and scored, and those of the context stay clean. For the exact
    score of this conditional process, this is theorem 3.6 unchanged. A model trained on whole noised texts approximates
    that score as well as it can infill. The k-th time lies in [k/draws, (k+1)/draws).

    Times and noise depend on the seed, the context and the position in the text, but not on the continuation. Answers
    to one question therefore see the same times and, with an absorbing process, the same masks (common random numbers),
    and their differences have much less noise than the bounds themselves.

    Args:
        model: the score model, in evaluation mode.
        context: the tokens before the continuation, possibly none.
        continuation: tokens to score, at least one.
        process: the forward process.
        schedule: the noise schedule.
        draws: number of noise levels.
        length: the most tokens that the model takes; context and continuation together must fit.
        seed: seed of the random numbers.
        batch_size: sequences in a call of the model.

    Returns:
        Nats [draws], float64, on the CPU. Their mean is the estimate.

    Raises:
        ValueError: the continuation is empty, or there are more tokens than ``length``.
    """
    n, total = len(continuation), len(context) + len(continuation)
    if not 1 <= n <= total <= length:
        raise ValueError(f"continuation: {n} tokens after {len(context)}, wanted at least 1 and {length} in all")
    device = device_of(model)
    generator = _generator(seed, context, device)
    text = torch.tensor([*context, *continuation], device=device)
    places = torch.rand(draws, generator=generator, dtype=torch.float64, device=device)
    parts = [(schedule, (torch.arange(1, draws + 1, device=device) - places) / draws)]
    start, end = (float(sigma) for sigma in schedule.total(torch.tensor([0.0, 1.0])))
    if start > 0:  # the noise before t = 0, as in elbo
        parts.append((Onset(start), 1.0 - places))
    # one row is one noise level of a text of full length, so that a place in the text always has the same noise
    padded = torch.zeros(draws, length, dtype=torch.int64, device=device)
    padded[:, :total] = text
    result = prior_kl(text[len(context) :], end, process).sum() + torch.zeros(draws, dtype=torch.float64)
    for part, times in parts:
        noised = sample_transition(padded, part.total(times).unsqueeze(-1), process, generator=generator)[:, :total]
        noised[:, : len(context)] = text[: len(context)]
        for first in range(0, draws, batch_size):
            rows = slice(first, first + batch_size)
            x_t, t = noised[rows].contiguous(), times[rows]
            with torch.no_grad():
                loss = noised_score_entropy(model, text.expand(len(x_t), -1), x_t, t, process, part, given=len(context))
            result[rows] += loss.double().cpu()
    return result


def greedy_continuation(
    model: ScoreModel, context: Sequence[int], n: int, process: RankOne, schedule: Schedule, *, seed: int = 0
) -> list[int]:
    """Greedy decoding after a context: step by step, the most probable token at the position where the model is surest.

    All n positions start as noise of the process: MASK if it is absorbing, otherwise random tokens that depend on the
    seed and the context. There are n steps, at the times 1, 1 - 1/n, ..., 1/n. Each computes the distribution of the
    clean token at every open position, and fixes the single most probable token. This suits absorbing noise. Where
    noise looks like text, a model near t = 1 takes the context for noise too.

    Args:
        model: the score model, in evaluation mode.
        context: the tokens before the continuation, possibly none.
        n: number of tokens to write, at least 1.
        process: the forward process.
        schedule: the noise schedule.
        seed: seed of the noise.

    Returns:
        n tokens.

    Source: Deschenaux & Gulcehre 2024, appendix A.2, for greedy decoding; they do not define the order, which is ours.
    """
    written = dict(_greedy(model, context, n, process, schedule, seed))
    return [written[place] for place in range(n)]


def is_greedy(
    model: ScoreModel,
    context: Sequence[int],
    continuation: Sequence[int],
    process: RankOne,
    schedule: Schedule,
    *,
    seed: int = 0,
) -> bool:
    """Whether :func:`greedy_continuation` gives exactly these tokens. Stops at the first difference."""
    steps = _greedy(model, context, len(continuation), process, schedule, seed)
    return all(continuation[place] == token for place, token in steps)


@torch.no_grad()
def _greedy(
    model: ScoreModel, context: Sequence[int], n: int, process: RankOne, schedule: Schedule, seed: int
) -> Iterator[tuple[int, int]]:
    """Positions and tokens of :func:`greedy_continuation` in the order in which they are written."""
    device = device_of(model)
    x = process.sample_limit((n,), generator=_generator(seed, context, device), device=device)
    start = torch.tensor(context, dtype=torch.int64, device=device)
    open_places = torch.ones(n, dtype=torch.bool, device=device)
    for step in range(n):
        sigma = schedule.total(torch.tensor([1 - step / n], dtype=torch.float64)).to(device)
        hidden = model.hidden(torch.cat([start, x]).unsqueeze(0), sigma)[0, len(context) :]
        shift = model.log_score_shift(sigma, x)
        probs = tweedie_probs(model.head(hidden).float(), x, float(sigma), process, log_score_shift=shift, denoise=True)
        best, token = probs.max(-1)
        place = int(torch.where(open_places, best, -1.0).argmax())
        x[place] = token[place]
        open_places[place] = False
        yield place, int(x[place])


def _generator(seed: int, context: Sequence[int], device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed_of(seed, context))


def seed_of(seed: int, tokens: Sequence[int]) -> int:
    """A seed that depends on another seed and a text."""
    word = hashlib.blake2b(f"{seed} {list(tokens)}".encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") >> 1
