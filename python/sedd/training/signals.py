"""Stops a run cleanly on SIGTERM, SIGHUP or Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from rich.console import Console

__all__ = ["StopSignals"]


class StopSignals:
    """A context in which the first SIGTERM, SIGHUP or Ctrl-C is recorded instead of ending the process.

    A second SIGTERM or Ctrl-C has its usual effect, except under torchrun, which passes on signals that the
    process may have received already. A second SIGHUP is ignored: when a terminal closes, the kernel and the shell
    may both send one. If SIGHUP was ignored before (nohup), it stays ignored.

    Under torchrun, an error leaves the context's handlers in place: torchrun sends SIGTERM to the other processes as
    soon as one has died, and each of them should still print its error.

    Attributes:
        signum: the signal that arrived, None if there was none.

    Args:
        console: is silenced by SIGHUP if it is a terminal, because writing to a closed terminal is an error.
    """

    def __init__(self, console: Console) -> None:
        self.signum: int | None = None
        self._console = console
        self._on_terminal = console.is_terminal  # a closed terminal says that it is none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python allows handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
            if previous[signal.SIGHUP] == signal.SIG_IGN:  # nohup
                del previous[signal.SIGHUP]
            self._previous = {int(number): handler for number, handler in previous.items()}
            for number in previous:
                signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not _by_torchrun():
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if _by_torchrun():
            for number in self._previous:  # at no moment may the second one kill the process
                signal.signal(number, signal.SIG_IGN)
        else:
            self._restore()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if signum == signal.SIGHUP and self._on_terminal:
            self._console.quiet = True


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
