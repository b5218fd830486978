"""Requests for texts or images, and these step by step."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch
from torch import Tensor

from sedd.commands.play.painting import painted
from sedd.commands.sample import GAP, parse_template
from sedd.commands.sampler_params import choose_sampler
from sedd.diffusion.sampler import Sampler
from sedd.diffusion.samplers import find_sampler, sample
from sedd.diffusion.walk import Walk
from sedd.hub.pretrained import LoadedModel
from sedd.options import check_choice, check_options, renamed

__all__ = ["CancelledError", "Frame", "Request", "Written", "check", "write"]

MOST_TEXTS, MOST_STEPS, MOST_TOKENS = 16, 4096, 8192
MOST_CORRECTORS = 16  # work is not cancelled between those of a step
MOST_PROBABILITIES = 1 << 28  # of the distributions of a step, for entropies without MASK


class CancelledError(Exception):
    """Nobody waits for the texts any more."""


@dataclass
class Request:
    """A request for texts or images, the body of ``POST /v1/completions``.

    A model of images takes no text. It samples whole images, or the pixels ``mask`` of ``image``. Of a model of text,
    either the prompt has gaps ``{{n}}`` of n tokens, which are filled, or ``max_tokens`` new tokens stand between
    ``prompt`` and ``suffix``. An empty request is for a whole block.
    """

    prompt: str = ""
    """Text with gaps {{n}}, or the text before the new one."""
    suffix: str = ""
    """The text after the new one."""
    max_tokens: int | None = None
    """Number of new tokens, if the prompt has no gaps. Default: what is left of a block of the training."""
    n: int = 1
    """Number of texts."""
    steps: int = 64
    """Number of reverse steps."""
    sampler: str | None = None
    """Name of the sampler. Default: tweedie, or autoregressive for an autoregressive model."""
    sampler_params: dict[str, str] = field(default_factory=dict)
    """Parameters of the sampler."""
    temperature: float = 1.0
    """See sedd sample --help."""
    top_p: float = 1.0
    """See sedd sample --help."""
    seed: int | None = None
    """The same seed gives the same texts. Default: a random one, which the answer contains."""
    stream: bool = False
    """Answer with an event for each step."""
    entropy: bool = False
    """Events contain the entropy of the model's distribution at each position; takes another call of the network."""
    label: int | None = None
    """For a model of images with classes: the class. Default: none."""
    guidance: float = 1.0
    """See sedd sample --help."""
    image: str | list[int] | None = None
    """For a model of images: the image of which a part is sampled, see :meth:`Images.read`. Default: none."""
    mask: list[tuple[int, int]] = field(default_factory=list)
    """The part of the image that is sampled, see :func:`painted`."""
    model: str | None = None
    """Not used: there is one model."""

    def __post_init__(self) -> None:
        check_options(self, positive=("max_tokens", "n", "steps"))
        check_choice(self.temperature, self.top_p, self.guidance)
        for name, most in (("n", MOST_TEXTS), ("steps", MOST_STEPS), ("max_tokens", MOST_TOKENS)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name}: expected at most {most}, got {value}")
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected a number in [0, 2^63), got {self.seed}")
        if GAP.search(self.prompt) and (self.suffix or self.max_tokens is not None):
            raise ValueError("prompt: expected no gaps {{n}} together with suffix or max_tokens, got both")
        sizes = GAP.findall(self.prompt)
        if any(len(size) > 9 for size in sizes) or sum(map(int, sizes)) > MOST_TOKENS:
            raise ValueError(f"prompt: expected gaps of at most {MOST_TOKENS} tokens in all, got more")
        if self.mask and self.image is None:
            raise ValueError(f"mask: expected none without an image, got {len(self.mask)} ranges")

    def chosen(self) -> Sampler | str | None:
        """The sampler, with its parameters if there are any."""
        return choose_sampler(self.sampler, self.steps, self.sampler_params)

    def layout(self, loaded: LoadedModel, image: Tensor | None) -> tuple[Tensor, Tensor]:
        """The given tokens and where they are given, [L] each; ``image`` has the values that :attr:`image` names."""
        classes = loaded.model.config.classes
        if self.label is not None and not 0 <= self.label < classes:
            wanted = f"a class in [0, {classes})" if classes else "none for a model without classes"
            raise ValueError(f"label: expected {wanted}, got {self.label}")
        if self.guidance != 1 and self.label is None:
            raise ValueError(f"guidance: expected 1 without a label, got {self.guidance}")
        if not loaded.is_text:
            for name in ("prompt", "suffix", "max_tokens"):
                if getattr(self, name):
                    raise ValueError(f"{name}: expected none for a model of images, got {getattr(self, name)!r}")
            if image is not None:
                return image, ~painted(self.mask, loaded.model.config.shape)
            length = loaded.model.config.length
            return torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
        if GAP.search(self.prompt):
            with renamed({"template": "prompt"}):
                tokens, is_fixed = parse_template(self.prompt, loaded.tokenizer)
        else:
            before, after = (loaded.tokenizer.encode(text) for text in (self.prompt, self.suffix))
            left = loaded.model.config.length - len(before) - len(after)
            new = left if self.max_tokens is None else self.max_tokens
            if new < 1:
                raise ValueError(
                    f"max_tokens: expected a number of new tokens, as the {len(before) + len(after)} given ones leave "
                    f"no room in a block of {loaded.model.config.length}"
                )
            tokens = torch.tensor([*before, *[0] * new, *after])
            is_fixed = torch.tensor([True] * len(before) + [False] * new + [True] * len(after))
        if len(tokens) > MOST_TOKENS:
            raise ValueError(f"prompt: expected at most {MOST_TOKENS} tokens with the gaps, got {len(tokens)}")
        return tokens, is_fixed


@dataclass(frozen=True)
class Frame:
    """The texts or images after a step.

    Attributes:
        step: steps done.
        steps: the most steps that there can be.
        given: which tokens are given.
        pieces: what each token adds to the text, for each text; for each image, its values.
        masked: which of them are MASK.
        entropy: in nats, of the distribution of each position: the present one of MASK, and for other new tokens that
            from which they were drawn; None for given tokens. None if it was not asked for.
    """

    step: int
    steps: int
    given: list[bool]
    pieces: list[list[str]] | list[list[int]]
    masked: list[list[bool]]
    entropy: list[list[float | None]] | None


@dataclass(frozen=True)
class Written:
    """Finished texts or images.

    Attributes:
        texts: the whole texts; nothing for images.
        gaps: what was written into each gap, for each text; nothing for images.
        images: the values of each image; nothing for texts.
        given: number of given tokens.
        written: number of new tokens of all texts.
        seed: the seed.
    """

    texts: list[str]
    gaps: list[list[str]]
    images: list[list[int]]
    given: int
    written: int
    seed: int


class _Entropies:
    """The entropies at the free positions while a sampler is at work."""

    def __init__(
        self, loaded: LoadedModel, tokens: Tensor, free: Tensor, labels: Tensor | None, guidance: float
    ) -> None:
        self._classes: dict[str, Any] = {"labels": labels, "guidance": guidance}
        self._diffusion, self._free = loaded.diffusion, free
        self._generator = torch.Generator(loaded.diffusion.device)  # not that of the texts, which stay the same
        self._last = torch.full(free.shape, torch.nan, device=free.device)
        mask_id = loaded.diffusion.process.mask_id
        if (
            loaded.diffusion.process.family == "absorbing" and mask_id is not None
        ):  # the texts that sampling starts from
            self.after(torch.where(free, mask_id, tokens), 1.0)

    def after(self, tokens: Tensor, share: float) -> Tensor:
        """[B, L], NaN where tokens are given, after the steps that leave this share of the time."""
        walk = Walk(self._diffusion, tokens, self._free, generator=self._generator, **self._classes)
        where = walk.open()
        if bool(where.any()):
            found = walk.unmask(where, max(share, 1e-3), statistics=("entropy",))
            assert found.entropy is not None
            self._last = self._last.masked_scatter(where, found.entropy.float())
        return self._last


def check(loaded: LoadedModel, request: Request, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Checks a request against a model, and returns its layout.

    Args:
        loaded: the model.
        request: the request.
        image: the values [L] of the image that the request names.

    Raises:
        ValueError: the sampler does not suit the model, the text cannot be encoded, or the mask does not fit.
    """
    sampler = find_sampler(loaded.diffusion, request.chosen(), request.steps)
    if (correctors := getattr(sampler, "correctors", 0)) > MOST_CORRECTORS:
        raise ValueError(f"sampler_params: expected at most {MOST_CORRECTORS} correctors, got {correctors}")
    layout, process = request.layout(loaded, image), loaded.diffusion.process
    most = MOST_PROBABILITIES // process.dim
    if request.entropy and process.family != "absorbing" and request.n * len(layout[0]) > most:
        raise ValueError(
            f"entropy: expected at most {most} tokens of all texts, got {request.n * len(layout[0])}; write fewer, or "
            "leave the entropy out"
        )
    return layout


def write(
    loaded: LoadedModel,
    request: Request,
    layout: tuple[Tensor, Tensor],
    on_frame: Callable[[Frame], None] | None = None,
    cancelled: Event | None = None,
) -> Written:
    """Writes the texts of a request.

    Args:
        loaded: the model.
        request: the request.
        layout: the result of :func:`check`.
        on_frame: called after each step.
        cancelled: if it is set, the work stops after the current step.

    Raises:
        CancelledError: the event was set.
    """
    tokens, is_fixed = layout
    device, tokenizer = loaded.diffusion.device, loaded.tokenizer
    free = (~is_fixed).expand(request.n, -1).to(device)
    mask_id = loaded.diffusion.process.mask_id
    given = is_fixed.tolist()
    wants_entropy = request.entropy and not loaded.diffusion.objective.autoregressive
    labels = None if request.label is None else torch.full((request.n,), request.label, device=device)
    entropies = _Entropies(loaded, tokens.to(device), free, labels, request.guidance) if wants_entropy else None

    def show(step: int, steps: int, x: Tensor) -> None:
        if cancelled is not None and cancelled.is_set():
            raise CancelledError
        if on_frame is None:
            return
        found = None
        if entropies is not None:
            rows = entropies.after(x, 1 - step / steps).tolist()
            found = [[None if value != value else round(value, 3) for value in row] for row in rows]
        pieces: Any = x.tolist()
        if loaded.is_text:
            pieces = [tokenizer.pieces(row) for row in pieces]
        masked = (free & (x == mask_id)).tolist() if mask_id is not None else [[False] * x.shape[1]] * len(x)
        on_frame(Frame(step, steps, given, pieces, masked, found))

    assert request.seed is not None
    with renamed({"fixed": "prompt" if loaded.is_text else "mask"}):
        written = sample(
            loaded.diffusion,
            batch=request.n,
            length=len(tokens),
            steps=request.steps,
            sampler=request.chosen(),
            temperature=request.temperature,
            top_p=request.top_p,
            generator=torch.Generator(device).manual_seed(request.seed),
            fixed=(tokens, is_fixed) if bool(is_fixed.any()) else None,
            on_step=show,
            autocast_dtype=loaded.autocast_dtype,
            labels=labels,
            guidance=request.guidance,
        ).cpu()
    texts = list(written) if loaded.is_text else []
    return Written(
        texts=[tokenizer.decode(row.tolist()) for row in texts],
        gaps=[_gaps(row, is_fixed, tokenizer) for row in texts],
        images=[] if loaded.is_text else written.tolist(),
        given=int(is_fixed.sum()),
        written=request.n * int((~is_fixed).sum()),
        seed=request.seed,
    )


def _gaps(tokens: Tensor, is_fixed: Tensor, tokenizer: Any) -> list[str]:
    """The text of each gap."""
    flags, counts = torch.unique_consecutive(is_fixed, return_counts=True)
    parts = zip(flags.tolist(), tokens.split(counts.tolist()), strict=True)
    return [tokenizer.decode(part.tolist()) for known, part in parts if not known]
