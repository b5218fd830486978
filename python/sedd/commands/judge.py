"""A judge: a causal language model that evaluates the samples of a diffusion model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sedd.data.tokenizer import EOT_TEXT
from sedd.hints import pip_install
from sedd.hub.pretrained import LoadedModel, load_model
from sedd.progress import track

__all__ = ["Judge", "RunJudge", "TransformersJudge", "load_judge"]


class Judge(ABC):
    """A causal language model that evaluates texts.

    Attributes:
        name: the label of its results.
    """

    name: str

    @abstractmethod
    def read(self, texts: Sequence[str], batch_size: int, progress: bool = False) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and number of scored tokens of each text.

        The first token of a text is not scored, because it has no context. Texts that are too long for the judge are
        truncated.

        Returns:
            Nats [n], float64, and tokens [n], int64, on the CPU.
        """

    @abstractmethod
    def parameters(self) -> Iterable[Tensor]:
        """The weights of the model."""

    @property
    @abstractmethod
    def knows_end(self) -> bool:
        """Whether it reads :data:`sedd.data.tokenizer.EOT_TEXT` as end-of-text."""

    @abstractmethod
    def features(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """The last hidden state of the last token of each text [n, d], float32, on the CPU, which MAUVE compares."""


@dataclass(frozen=True)
class TransformersJudge(Judge):
    """A model of ``transformers``.

    Attributes:
        name: the label of its results.
        model: the model.
        tokenizer: its tokeniser.
    """

    name: str
    model: Any
    tokenizer: Any

    def parameters(self) -> Iterable[Tensor]:
        """See :meth:`Judge.parameters`."""
        parameters: Iterable[Tensor] = self.model.parameters()
        return parameters

    @property
    def knows_end(self) -> bool:
        """See :attr:`Judge.knows_end`."""
        return EOT_TEXT in self.tokenizer.get_vocab()

    def read(self, texts: Sequence[str], batch_size: int, progress: bool = False) -> tuple[Tensor, Tensor]:
        """See :meth:`Judge.read`."""
        nats, counts = [], []
        for first in track(range(0, len(texts), batch_size), "judging", progress):
            ids, mask = self._encode(texts[first : first + batch_size])
            with torch.inference_mode():
                log_p = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
            scored = mask[:, 1:].bool()
            chosen = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1).double()
            nats.append(-torch.where(scored, chosen, 0.0).sum(1).cpu())
            counts.append(scored.sum(1).cpu())
        return torch.cat(nats), torch.cat(counts)

    def features(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """See :meth:`Judge.features`."""
        states = []
        for first in range(0, len(texts), batch_size):
            ids, mask = self._encode(texts[first : first + batch_size])
            with torch.inference_mode():
                found = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
            states.append(found[torch.arange(len(ids)), mask.sum(1) - 1].float().cpu())
        return torch.cat(states)

    def _encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        longest = min(getattr(self.model.config, "max_position_embeddings", 1024), 1 << 20)
        # an empty text has no token to score, but the input must have one
        encoded = self.tokenizer(
            [text or " " for text in texts], return_tensors="pt", padding=True, truncation=True, max_length=longest
        )
        device = self.model.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)


@dataclass(frozen=True)
class RunJudge(Judge):
    """An autoregressive model of ``sedd train``.

    Attributes:
        name: the label of its results.
        loaded: the model.
    """

    name: str
    loaded: LoadedModel

    def parameters(self) -> Iterable[Tensor]:
        """See :meth:`Judge.parameters`."""
        return self.loaded.diffusion.parameters()

    @property
    def knows_end(self) -> bool:
        """False: no text is encoded as its end-of-text token."""
        return False

    def read(self, texts: Sequence[str], batch_size: int, progress: bool = False) -> tuple[Tensor, Tensor]:
        """See :meth:`Judge.read`."""
        return self.read_tokens([self.loaded.tokenizer.encode(text) for text in texts], batch_size, progress)

    @torch.no_grad()
    def read_tokens(
        self, texts: Sequence[Sequence[int]], batch_size: int, progress: bool = False
    ) -> tuple[Tensor, Tensor]:
        """:meth:`read` for texts of a model with the same tokeniser, so that end-of-text remains one token."""
        nats = torch.zeros(len(texts), dtype=torch.float64)
        counts = torch.zeros(len(texts), dtype=torch.int64)
        for places, x_0 in track(self._batches(texts, batch_size, 2), "judging", progress):
            with self._autocast():
                loss = self.loaded.diffusion.loss(x_0, x_0, torch.ones(len(x_0), device=x_0.device), given=1)
            nats[places] = loss.double().cpu()
            counts[places] = x_0.shape[1] - 1
        return nats, counts

    @torch.no_grad()
    def features(self, texts: Sequence[str], batch_size: int) -> Tensor:
        """See :meth:`Judge.features`."""
        encoded = [self.loaded.tokenizer.encode(text or " ") for text in texts]
        states = torch.zeros(len(texts), self.loaded.model.config.hidden_size)
        for places, tokens in self._batches(encoded, batch_size, 1):
            with self._autocast():
                found = self.loaded.model.hidden(tokens, torch.ones(1, device=tokens.device))
            states[places] = found[:, -1].float().cpu()
        return states

    def _batches(
        self, texts: Sequence[Sequence[int]], batch_size: int, at_least: int
    ) -> list[tuple[list[int], Tensor]]:
        """The texts of at least so many tokens: their places, and their tokens [n, L] on the device."""
        by_length = defaultdict(list)  # texts of one length need no padding
        for place, tokens in enumerate(texts):
            by_length[min(len(tokens), self.loaded.model.config.length)].append(place)
        device = self.loaded.diffusion.device
        return [
            (places, torch.tensor([texts[place][:length] for place in places], device=device))
            for length, group in by_length.items()
            if length >= at_least
            for first in range(0, len(group), batch_size)
            for places in [group[first : first + batch_size]]
        ]

    def _autocast(self) -> torch.autocast:
        dtype = self.loaded.autocast_dtype
        return torch.autocast(self.loaded.diffusion.device.type, dtype=dtype, enabled=dtype is not None)


def load_judge(name: str, device: torch.device | str = "cpu") -> Judge:
    """Loads a causal language model.

    Args:
        name: a name on the Hugging Face hub, a folder, a .gguf file, or a run of ``sedd train --objective
            autoregressive``.
        device: the device of the model.

    Raises:
        ImportError: transformers is not installed, or the file needs gguf and it is not installed.
        FileNotFoundError: there is no such file or folder.
        ConnectionError: there is no such folder, and the model cannot be loaded from the hub.
        ValueError: the folder or file does not contain a complete causal language model.
    """
    path = Path(name).expanduser()
    if (path / "checkpoints").is_dir() or (path / "state.json").is_file():
        loaded = load_model(path, device)
        if not loaded.diffusion.objective.autoregressive:
            raise ValueError(
                f"judge: expected a causal language model, got {path}, a run with another objective; give a run of "
                "sedd train --objective autoregressive"
            )
        return RunJudge(path.resolve().name, loaded)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"a judge needs transformers: {pip_install('eval', 'transformers')}") from error
    # otherwise transformers asks the user whether to run code of the folder
    options: dict[str, Any] = {"trust_remote_code": False}
    source = str(path) if path.exists() else name
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"judge: no such file: {path}")
        source, options["gguf_file"] = str(path.parent), path.name
    elif not path.exists() and name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"judge: no such folder: {name}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:  # damaged files raise errors of many libraries
        if path.exists():
            raise ValueError(
                f"judge: expected a causal language model, got {path}, which cannot be loaded: {error}"
            ) from error
        if not isinstance(error, OSError):  # the model exists on the hub, but is damaged or of another kind
            raise ValueError(f"judge: expected a causal language model, got {name}: {error}") from error
        raise ConnectionError(
            f"judge: no such folder: {name!r}, and it cannot be loaded from the Hugging Face hub ({error}). Give the "
            "folder or the .gguf file of a causal language model"
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TransformersJudge(
        path.stem if path.suffix == ".gguf" else name.rstrip("/").split("/")[-1], model.to(device).eval(), tokenizer
    )
