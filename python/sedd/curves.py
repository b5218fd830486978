"""Where the curves of a run can be watched: TensorBoard and Weights & Biases, found by name in :data:`WRITERS`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sedd.files import write_text
from sedd.hints import pip_install

__all__ = ["WRITERS", "TensorBoard", "Wandb", "Writer"]


class Writer(Protocol):
    """Takes numbers and texts of a run, each at a step."""

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Adds a point to the curves of these names."""
        ...

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds texts that the model wrote."""
        ...

    def flush(self) -> None:
        """Writes what is buffered."""
        ...

    def close(self) -> None:
        """Writes what is buffered and ends."""
        ...


class TensorBoard:
    """Event files in ``RUN/tensorboard``.

    Args:
        run_dir: folder of the run.
        step: the step that training goes on from; points of later steps are dropped.
        config: options of the run.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"log: tensorboard is not installed: {pip_install('train', 'tensorboard')}, or --log none"
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:  # noqa: D102
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:  # noqa: D102
        for number, text in enumerate(texts):
            # TensorBoard renders Markdown: four spaces make it show the text as it is
            code = "\n".join(f"    {line}" for line in text.splitlines())
            self._writer.add_text(f"{name}/{number}", code, step)

    def flush(self) -> None:  # noqa: D102
        self._writer.flush()

    def close(self) -> None:  # noqa: D102
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, whose files are in ``RUN/wandb``; ``WANDB_MODE=offline`` needs no account.

    A resumed run goes on as the same one there, by the identifier in ``RUN/wandb/sedd_run_id``. Points cannot be taken
    back there: steps that are taken again after a run was killed appear twice.

    Args:
        run_dir: folder of the run.
        step: the step that training goes on from.
        config: options of the run.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("log: wandb is not installed: pip install wandb, or leave it out of --log") from error
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

    def flush(self) -> None:
        """Nothing: wandb writes by itself."""

    def close(self) -> None:  # noqa: D102
        self._run.finish()


WRITERS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}
"""What ``--log`` names. To add one: write a class with the methods of :class:`Writer` and name it here."""
