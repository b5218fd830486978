"""Writes the curves of a run to TensorBoard or Weights & Biases, registered by name in :data:`WRITERS`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sedd.data.pictures import Pixels
from sedd.files import write_text
from sedd.hints import pip_install

__all__ = ["WRITERS", "TensorBoard", "Wandb", "Writer"]


class Writer(Protocol):
    """Records scalars, texts and pictures of a run by step."""

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds a point to each named curve."""
        ...

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds texts sampled from the model."""
        ...

    def picture(self, step: int, name: str, picture: Pixels) -> None:
        """Adds a picture [H, W, C], grey or RGB."""
        ...

    def flush(self) -> None:
        """Writes buffered data."""
        ...

    def close(self) -> None:
        """Writes buffered data and closes the writer."""
        ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``.

    Args:
        run_dir: folder of the run.
        step: the step from which training continues; points of later steps are dropped.
        config: options of the run.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"log: tensorboard is not installed: {pip_install('train', 'tensorboard')}, or --report_to none"
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:  # noqa: D102
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:  # noqa: D102
        for number, text in enumerate(texts):
            # TensorBoard renders Markdown: indent by four spaces to show the text verbatim
            code = "\n".join(f"    {line}" for line in text.splitlines())
            self._writer.add_text(f"{name}/{number}", code, step)

    def picture(self, step: int, name: str, picture: Pixels) -> None:  # noqa: D102
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:  # noqa: D102
        self._writer.flush()

    def close(self) -> None:  # noqa: D102
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, with files in ``RUN/wandb``; ``WANDB_MODE=offline`` needs no account.

    A resumed run continues as the same W&B run, whose identifier is in ``RUN/wandb/sedd_run_id``. Points cannot be
    removed from W&B: steps that are repeated after a run was killed appear twice.

    Args:
        run_dir: folder of the run.
        step: the step from which training continues.
        config: options of the run.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "report_to: wandb is not installed: pip install wandb, or remove it from --report_to"
            ) from error
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        identifier = folder / "sedd_run_id"
        if not (step and identifier.exists()):
            write_text(identifier, secrets.token_hex(8))
        self._wandb = wandb
        self._run = wandb.init(
            project="sedd",
            name=run_dir.name,
            dir=str(run_dir),
            id=identifier.read_text(encoding="utf-8"),
            resume="allow",
            config=dict(config),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:  # noqa: D102
        self._run.log({"step": step, **values})

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:  # noqa: D102
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text] for text in texts])
        self._run.log({"step": step, name: table})

    def picture(self, step: int, name: str, picture: Pixels) -> None:  # noqa: D102
        self._run.log({"step": step, name: self._wandb.Image(picture)})

    def flush(self) -> None:
        """Does nothing: wandb writes in the background."""

    def close(self) -> None:  # noqa: D102
        self._run.finish()


WRITERS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}
"""The choices of ``--report_to``. To add one, write a class like :class:`Writer` and register it here."""
