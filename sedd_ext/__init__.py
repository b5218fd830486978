"""Score-entropy discrete diffusion over the vocabulary axis: compiled kernels as PyTorch operators.

Processes: :func:`Absorbing`, :func:`Uniform`, :func:`Hybrid`, :class:`RankOne`. Reverse steps: :class:`Tweedie`,
:class:`Euler`, :class:`GeneralizedMasked`. Operators: :func:`score_entropy_loss`, :func:`mean_prediction_loss`,
:func:`generalized_masked_loss`, :func:`transition_column`, :func:`transition_row`, :func:`sample_transition`,
:func:`reverse_probs`, :func:`reverse_sample`, :func:`unmask`; with the output head fused in,
:func:`linear_score_entropy_loss`, :func:`linear_mean_prediction_loss`, :func:`linear_generalized_masked_loss`,
:func:`linear_reverse_sample`, :func:`linear_unmask`. The same in plain PyTorch: :mod:`sedd_ext.reference`.
"""

import torch  # noqa: F401 - before the kernels: they use the OpenMP runtime that torch loads

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"sedd_ext: no compiled kernels beside {__file__} ({error}). In a clone of the source this folder hides the "
        "installed package: run Python from another folder, or install with pip install -e ."
    ) from error
from . import reference
from .generalized_masked import generalized_masked_loss
from .linear_generalized_masked import linear_generalized_masked_loss
from .linear_mean_prediction import linear_mean_prediction_loss
from .linear_reverse import linear_reverse_sample
from .linear_score_entropy import linear_score_entropy_loss
from .linear_unmask import linear_unmask
from .mean_prediction import mean_prediction_loss
from .process import Absorbing, Hybrid, RankOne, Uniform
from .reverse import reverse_probs, reverse_sample
from .score_entropy import score_entropy_loss
from .step import Euler, GeneralizedMasked, Tweedie
from .transition import sample_transition, transition_column, transition_row
from .unmask import Unmasked, unmask

__version__: str = _C.__version__

has_cuda_kernels: bool = bool(_C.cuda)
"""Whether this build takes CUDA tensors."""

__all__ = [
    "Absorbing",
    "Euler",
    "GeneralizedMasked",
    "Hybrid",
    "RankOne",
    "Tweedie",
    "Uniform",
    "Unmasked",
    "__version__",
    "generalized_masked_loss",
    "has_cuda_kernels",
    "linear_generalized_masked_loss",
    "linear_mean_prediction_loss",
    "linear_reverse_sample",
    "linear_score_entropy_loss",
    "linear_unmask",
    "mean_prediction_loss",
    "reference",
    "reverse_probs",
    "reverse_sample",
    "sample_transition",
    "score_entropy_loss",
    "transition_column",
    "transition_row",
    "unmask",
]
