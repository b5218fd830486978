"""Score-entropy discrete diffusion over the vocabulary axis: compiled kernels as PyTorch operators.

Processes: :func:`Absorbing`, :func:`Uniform`, :func:`Hybrid`, :class:`RankOne`. Operators: :func:`score_entropy_loss`,
:func:`transition_column`, :func:`transition_row`, :func:`sample_transition`, :func:`tweedie_probs`,
:func:`tweedie_sample`, :func:`euler_probs`, :func:`euler_sample`. The same in plain PyTorch: :mod:`sedd_ext.reference`.
"""

import torch  # noqa: F401 - before the kernels: they use the OpenMP runtime that torch loads

try:
    from sedd_ext import _C
except ImportError as error:
    raise ImportError(
        f"sedd_ext: no compiled kernels beside {__file__} ({error}). In a clone of the source this folder hides the "
        "installed package: run Python from another folder, or install with pip install -e ."
    ) from error
from sedd_ext import reference
from sedd_ext.linear_reverse import linear_euler_sample, linear_tweedie_sample
from sedd_ext.linear_score_entropy import linear_score_entropy_loss
from sedd_ext.process import Absorbing, Hybrid, RankOne, Uniform
from sedd_ext.reverse import euler_probs, euler_sample, tweedie_probs, tweedie_sample
from sedd_ext.score_entropy import score_entropy_loss
from sedd_ext.transition import sample_transition, transition_column, transition_row

__version__: str = _C.__version__

has_cuda_kernels: bool = bool(_C.cuda)
"""Whether this build takes CUDA tensors."""

__all__ = [
    "Absorbing",
    "Hybrid",
    "RankOne",
    "Uniform",
    "__version__",
    "euler_probs",
    "euler_sample",
    "has_cuda_kernels",
    "linear_euler_sample",
    "linear_score_entropy_loss",
    "linear_tweedie_sample",
    "reference",
    "sample_transition",
    "score_entropy_loss",
    "transition_column",
    "transition_row",
    "tweedie_probs",
    "tweedie_sample",
]
