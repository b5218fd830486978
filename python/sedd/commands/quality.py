"""What ``sedd eval generative`` measures of one kind of samples, texts or images, and its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from sedd.data.detokenize import Detokenizer
from sedd.diffusion.samplers import SAMPLERS
from sedd.options import check_choice, check_one_of, check_options

__all__ = ["READING", "SETTINGS", "GenerativeOptions", "Quality", "Row", "Write", "with_error"]

SETTINGS = ("unconditional", "prefix", "infill")
"""What texts are compared by MAUVE."""

Row = dict[str, Any]
Write = Callable[["tuple[Tensor, Tensor] | None"], Tensor]
"""Samples blocks [num, L]; its argument are tokens [num, L] and a mask [L] of the given positions, or None."""

READING = {"documents": "file", "detokenizer": "none"}
"""How real text is read unless something else is given."""

_POSITIVE = ("num", "length", "given", "compared", "reference", "batch_size")


@dataclass
class GenerativeOptions:
    """Evaluation"""

    steps: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256])
    """Numbers of reverse steps, for example --steps 64,1024."""
    samplers: list[str] | None = None
    """Names of samplers, for example --samplers tweedie,greedy. Default: tweedie and, if the model has a common noise
    rate, euler; autoregressive, which takes one step for each token whatever --steps is, for an autoregressive model.
    """
    num: int | None = None
    """Number of texts or images for each sampler and number of steps. Default: 32 texts, or 1,000 images. The papers
    use about 1,000 texts and 50,000 images."""
    length: int | None = None
    """Tokens per text. Default: the length of a training block."""
    judge: str = "openai-community/gpt2-large"
    """Causal language model that evaluates the samples: any that transformers loads, by its name on the Hugging Face
    hub, its folder, or a .gguf file; or a run of sedd train --objective autoregressive. Perplexities of different
    judges cannot be compared."""
    text: str | None = None
    """File or folder of real text, which is evaluated too and is the reference of MAUVE. Default: the validation text
    of the run, if it has one."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """For `text`: unit of a text file that counts as one document, which ends with end-of-text."""
    detokenizer: Detokenizer = "none"
    """For `text`: rules that remove the spaces around punctuation in some corpora. Use those of the training text."""
    mauve: list[str] = field(default_factory=list)
    """Compare with real text by MAUVE, with the hidden states of the judge as features. Any of unconditional, prefix
    (the first `given` tokens of a real text are given) and infill (half of them are given at each end)."""
    given: int = 50
    """For prefix and infill: number of given tokens of a real text."""
    compared: int = 100
    """Number of tokens that MAUVE compares, from the start of each text."""
    temperature: float = 1.0
    """Below 1, more probable tokens are preferred; above 1, less probable ones. 1 samples the model's distribution."""
    top_p: float = 1.0
    """Sample only from the fewest, most probable tokens with this total probability."""
    guidance: float | None = None
    """For images and a model with classes: sample with the classes of randomly chosen training images. 1 samples the
    model's distribution; above 1, samples are more typical of their class, and steps take twice as long. Default:
    samples have no class."""
    classifier: str | None = None
    """For images: the file of the classifier (.safetensors) whose features are compared. If it does not exist, the
    classifier is trained and written there. Default: a file in the cache folder of the data. Results of different
    classifiers cannot be compared."""
    reference: int = 50_000
    """For images: number of training images to compare with, if there are so many."""
    seed: int = 0
    """Random seed. The same seed gives the same samples."""
    batch_size: int | None = None
    """Number of samples at a time. Default: 8 texts, or 100 images."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""
    json: str | None = None
    """Write results and texts to this file after each number of steps. If the file exists, its results are kept and
    only the missing ones are computed."""
    plot: str | None = None
    """Write a plot to this file: perplexity and entropy, or FID and Inception score, against the number of steps."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self, positive=_POSITIVE, outputs=("json", "plot"))
        check_choice(self.temperature, self.top_p, self.guidance)
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps: expected numbers of at least 1, got {self.steps}")
        for name, values, known in (("samplers", self.samplers or [], SAMPLERS), ("mauve", self.mauve, SETTINGS)):
            for value in values:
                check_one_of(name, value, known)
        if self.samplers == []:
            raise ValueError(f"samplers: expected at least one of {', '.join(SAMPLERS)}; got none")
        self.steps = list(dict.fromkeys(self.steps))
        self.samplers = None if self.samplers is None else list(dict.fromkeys(self.samplers))
        for name, default in READING.items():
            if self.text is None and (value := getattr(self, name)) != default:
                raise ValueError(f"{name}: expected only with text, got {value!r}; the run has its own")
        if set(self.mauve) - {"unconditional"} and self.given >= self.compared:
            raise ValueError(f"given: expected fewer than the {self.compared} compared tokens, got {self.given}")


class Quality(ABC):
    """The measures of one kind of samples.

    Attributes:
        unit: what a sample is called.
        real_name: what the real data are called.
        num: number of samples unless another is given.
        batch_size: number of samples at a time unless another is given.
        others: options of other kinds of samples.
        title: title of the table.
        note: what has to be said wherever results are shown; empty if there is nothing.
        settings: what results depend on, beside the options.
        labels: the class of each sample [num], int64; None to sample without classes.
        tensors: tensors on which results depend, beside the parameters of the model.
        panels: for the plot, values with their label and scale.
    """

    unit: ClassVar[str]
    real_name: ClassVar[str]
    num: ClassVar[int]
    batch_size: ClassVar[int]
    others: ClassVar[tuple[str, ...]]
    title: str
    note: str = ""
    settings: Mapping[str, Any]
    labels: Tensor | None = None
    tensors: list[Tensor]
    panels: tuple[tuple[str, str, str], ...]

    @abstractmethod
    def real(self, progress: bool) -> Row | None:
        """The measures of real data; None if there are none."""

    @abstractmethod
    def measure(self, samples: Tensor, write: Write) -> Row:
        """The measures of samples [num, L].

        Args:
            samples: the samples.
            write: makes samples around given tokens.
        """

    @abstractmethod
    def columns(self, rows: list[Row]) -> list[tuple[str, Callable[[Row], str]]]:
        """The headings of the table, and how a cell is shown. Cells of a value that a row lacks are empty."""


def with_error(name: str, digits: int = 2) -> Callable[[Row], str]:
    """Shows a value with its standard error."""

    def show(row: Row) -> str:
        error = row[f"{name}_error"]
        return f"{row[name]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    return show
