"""The command ``sedd play``."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from dataclasses import dataclass

from sedd.commands.command import RUN, Command
from sedd.hints import pip_install
from sedd.hub.pretrained import load_model
from sedd.options import check_options
from sedd.progress import console
from sedd.runtime import resolve_device

__all__ = ["COMMAND", "PlayOptions", "play"]

ABOUT = """Open a web page on which a model writes and fills texts, step by step.

The page and its JSON endpoint are served on this machine alone. Requests are worked on one after another. Stop the
server with Ctrl-C.

examples:
  sedd play runs/default
  sedd play runs/default --port 0
      any free port
  curl http://127.0.0.1:7860/v1/completions -H 'Content-Type: application/json' \\
      -d '{"prompt": "def {{10}}(self):", "steps": 32, "seed": 1}'
"""


@dataclass
class PlayOptions:
    """Server"""

    host: str = "127.0.0.1"
    """Address to listen on. With 0.0.0.0, everyone who reaches this machine can use the model: there is no password."""
    port: int = 7860
    """Port to listen on; 0 for any free one."""
    waiting: int = 32
    """Requests that may wait for their turn. Others are refused."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: the GPU if one is present and this build supports it, else the CPU."""

    def __post_init__(self) -> None:
        check_options(self, positive=("waiting",))
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port: expected a number in [0, 65535], got {self.port}")


def play(run: str, options: PlayOptions) -> int:
    """Serves the page until it is interrupted."""
    try:
        import uvicorn

        from sedd.commands.play.app import make_app
    except ImportError as error:
        raise ImportError(f"sedd play needs {error.name}: {pip_install('train', str(error.name))}") from error
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:  # before the model is loaded
            listener.bind((options.host, options.port))
        except OSError as error:
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise OSError(
                    f"host: expected an address of this machine, got {options.host!r} ({error.strerror})"
                ) from error
            raise OSError(
                f"port: expected a free one on {options.host}, got {options.port} ({error.strerror}); "
                "--port 0 takes any"
            ) from error
        loaded = load_model(run, resolve_device(options.device))
        if not loaded.model.config.shape:
            loaded.need_text()
        port = listener.getsockname()[1]
        host = f"[{options.host}]" if family == socket.AF_INET6 else options.host
        listener.listen()  # the address that is printed answers
        app = make_app(loaded, options.host, options.waiting)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=1)
        console().print(f"{loaded.path}: http://{host}:{port}/ (Ctrl-C stops the server)", soft_wrap=True)
        with suppress(KeyboardInterrupt):  # how one stops it
            uvicorn.Server(config).run(sockets=[listener])
    return 0


COMMAND = Command("play", ABOUT, play, PlayOptions, arguments=(RUN,))
