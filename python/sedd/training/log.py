"""The logs of a run: ``metrics.jsonl``, and curves and samples for TensorBoard or Weights & Biases."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from sedd.config import TrainConfig
from sedd.data.pictures import grid
from sedd.files import naming, whole_file
from sedd.training.curves import WRITERS, Writer

__all__ = ["Log"]


class Log:
    """The logs of a run: ``metrics.jsonl`` and the curves of ``--report_to``.

    Args:
        run_dir: folder of the run; None to write nothing.
        step: the step from which training continues. Records of later steps, which will be repeated, are dropped.
        config: options of the run.
    """

    def __init__(self, run_dir: Path | None, step: int, config: TrainConfig) -> None:
        self.writers: list[Writer] = []
        if run_dir is None:
            self._path = Path(os.devnull)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
            return
        path = self._path = run_dir / "metrics.jsonl"
        with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as kept:
            if path.exists():
                with open(path, encoding="utf-8", errors="replace") as old:
                    kept.writelines(line for line in old if _is_before(line, step))
        with naming(path):
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        options = config.to_dict()
        with naming(run_dir):
            self.writers = [WRITERS[name](run_dir, step, options) for name in config.writers() if name != "none"]

    def metrics(self, row: dict[str, Any]) -> None:
        """Adds a line to ``metrics.jsonl``."""
        with naming(self._path):
            self._file.write(json.dumps(row) + "\n")

    def curves(self, step: int, values: dict[str, float | None]) -> None:
        """Adds a point to each named curve."""
        with naming(self._path):
            self._file.flush()
        with naming(self._path.parent):
            for writer in self.writers:
                writer.scalars(step, values)

    def samples(self, step: int, name: str, samples: list[Any]) -> None:
        """Adds texts sampled from the model, or pictures [H, W, C], which become one grid."""
        with naming(self._path.parent):
            for writer in self.writers:
                if isinstance(samples[0], str):
                    writer.texts(step, name, samples)
                else:
                    writer.picture(step, name, grid(np.stack(samples)))

    def flush(self) -> None:
        """Waits until all lines are on disk: a checkpoint must not be ahead of its logs."""
        with naming(self._path):
            self._file.flush()
            if self._path.is_file():
                os.fsync(self._file.fileno())
        with naming(self._path.parent):
            for writer in self.writers:
                writer.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self._path.parent):
            for writer in self.writers:
                writer.close()
        with naming(self._path):
            self._file.close()


def _is_before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):  # an incomplete line of a killed process
        return False
