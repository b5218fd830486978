"""Writes checkpoints, in a thread while training goes on.

A checkpoint is written to a temporary folder, flushed to disk and then renamed, so that it appears as a whole or not at
all. If the model is divided among processes, each of them writes its parts. The files are described in
:mod:`sedd.training.checkpoint`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from sedd.config import TrainConfig
from sedd.files import begin_folder, finish_folder, naming
from sedd.training.checkpoint import checkpoints_of, fingerprint, sealed
from sedd.training.shards import everywhere, write_shards

__all__ = ["Saver", "save_checkpoint"]


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: TrainConfig,
    texts: Mapping[str, str] = MappingProxyType({}),
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes a checkpoint.

    Args:
        run_dir: folder of the run.
        step: number of optimiser steps.
        tensors: tensors by name for each file or folder of shards (``"model"`` becomes ``model.safetensors`` or
            ``model/``).
        state: other data needed to resume, JSON-serialisable; ``"valid"`` is the validation bound at this step or None.
        config: options of the run.
        texts: contents of other files by file name, such as those of the tokeniser.
        group: the processes that write shards; all of them call this. None: this process alone writes whole tensors.

    Returns:
        The new folder.

    Raises:
        OSError: the checkpoint cannot be written (for example, the disk is full). The partial checkpoint is deleted;
            other files are not changed.
    """
    final = checkpoints_of(run_dir) / f"step_{step:08d}"
    first = group is None or group.rank() == 0
    temporary: Path | None = None
    with naming(final, "could not write this checkpoint; earlier ones are unchanged"):
        try:
            temporary = everywhere(group, lambda: begin_folder(final) if first else None)[0]
            assert temporary is not None
            written = _write_tensors(temporary, tensors, group)
            files = {
                name: found
                for part in everywhere(group, lambda: {_name(path, temporary): fingerprint(path) for path in written})
                for name, found in part.items()
            }
            if first:
                texts = {"config.json": _json(config.resolved().to_dict()), **texts}
                for name, text in texts.items():
                    (temporary / name).write_text(text, encoding="utf-8")
                    files[name] = fingerprint(temporary / name)
                # the form in which the entries are read
                entries = json.loads(_json({"step": step, **state, "files": dict(sorted(files.items()))}))
                (temporary / "state.json").write_text(_json(sealed(entries)), encoding="utf-8")
                finish_folder(temporary, final)
        finally:
            if first and temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_tensors(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], group: dist.ProcessGroup | None
) -> list[Path]:
    """Writes all tensor files; returns those that this process has written."""
    if group is not None:
        return [path for name, content in tensors.items() for path in write_shards(folder / name, content, group)]
    for name, content in tensors.items():
        save_file({key: value.detach().contiguous() for key, value in content.items()}, folder / f"{name}.safetensors")
    return [folder / f"{name}.safetensors" for name in tensors]


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


class Saver:
    """Writes checkpoints in a thread, one at a time. Leaving its context waits for the last one.

    Attributes:
        seconds: how long the last one took to write.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._result: Future[None] | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Calls ``write`` in the thread. The checkpoint before must have been waited for."""
        assert self._result is None

        def work() -> None:
            started = time.monotonic()
            try:
                write()
            finally:
                self.seconds = time.monotonic() - started

        self._result = self._thread.submit(work)

    def finish(self) -> None:
        """Waits until the last checkpoint is written, or writing it has failed."""
        if self._result is not None:
            wait([self._result])

    def wait(self, group: dist.ProcessGroup | None) -> None:
        """Waits as :meth:`finish` does, and raises the error of writing.

        Args:
            group: the processes of the run, all of which call this and have the error of one of them; None if this is
                the only one.
        """
        self.finish()
        result, self._result = self._result, None
        everywhere(group, lambda: None if result is None else result.result())

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
