"""Score-entropy diffusion language models: train, sample, infill and evaluate, on the operators of :mod:`sedd_ext`.

The names below are imported when they are first used: ``from sedd import SEDD`` needs torch alone, the trainer and the
command line need the packages of the ``train`` extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sedd.hints import pip_install

if TYPE_CHECKING:
    from sedd.config import TrainConfig as TrainConfig
    from sedd.data.tokenizer import get_tokenizer as get_tokenizer
    from sedd.diffusion import Diffusion as Diffusion
    from sedd.diffusion import elbo as elbo
    from sedd.diffusion import get_schedule as get_schedule
    from sedd.diffusion import sample as sample
    from sedd.hub import SEDD as SEDD
    from sedd.hub import load_model as load_model
    from sedd.network import ModelConfig as ModelConfig
    from sedd.training.run import Run as Run

_MODULES = {
    "Diffusion": "diffusion",
    "ModelConfig": "network",
    "Run": "training.run",
    "SEDD": "hub",
    "TrainConfig": "config",
    "elbo": "diffusion",
    "get_schedule": "diffusion",
    "get_tokenizer": "data.tokenizer",
    "load_model": "hub",
    "sample": "diffusion",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sedd' has no attribute {name!r}")
    try:
        return getattr(import_module(f"sedd.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"sedd.{name} needs {error.name}: {pip_install('train', str(error.name))}") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
