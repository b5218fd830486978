"""Samples of models of images: what is kept of an image, and the PNG file of the results."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sedd.data.pictures import grid, read_picture, to_pixels, to_tokens, write_png
from sedd.files import write_json
from sedd.hub.pretrained import LoadedModel
from sedd.progress import console

__all__ = ["kept", "paint", "read_given"]

VALID = "valid"
"""Stands for the validation images of the run."""
_RECTANGLE = re.compile(r"(\d+):(\d+),(\d+):(\d+)")


class _Options(Protocol):
    """The options of sampling that matter to pictures."""

    json: str | None
    labels: list[int]


def kept(keep: str | None, shape: tuple[int, ...]) -> Tensor:
    """Where an image is kept [H·W·C], bool.

    Args:
        keep: upper, lower, left, right (halves), or a rectangle as rows,columns: ``0:14,7:21``.
        shape: rows, columns and channels of the image.

    Raises:
        ValueError: ``keep`` has another form, or is not a part of the image.
    """
    height, width, _ = shape
    middle, centre = height // 2, width // 2
    halves = {
        "upper": f"0:{middle},0:{width}",
        "lower": f"{middle}:{height},0:{width}",
        "left": f"0:{height},0:{centre}",
        "right": f"0:{height},{centre}:{width}",
    }
    words = _RECTANGLE.fullmatch(halves.get(str(keep), str(keep)))
    top, bottom, left, right = (0, 0, 0, 0) if words is None else map(int, words.groups())
    if not (top < bottom <= height and left < right <= width):
        raise ValueError(
            f"keep: expected {', '.join(halves)}, or rows,columns within {height} x {width} such as 0:{height},0:1, "
            f"got {keep!r}"
        )
    where = torch.zeros(shape, dtype=torch.bool)
    where[top:bottom, left:right] = True
    return where.flatten()


def read_given(loaded: LoadedModel, source: str, keep: str | None, num: int) -> tuple[Tensor, Tensor]:
    """Reads the images of which a part is kept.

    Args:
        loaded: a model of images.
        source: a PNG file, or 'valid' for the first ``num`` validation images of the run.
        keep: see :func:`kept`.
        num: number of images.

    Returns:
        Tokens and where they are given, int64 and bool, both [num, L].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no PNG file or has another size, there are fewer images, or as :func:`kept`.
    """
    shape = loaded.model.config.shape
    where = kept(keep, shape)
    if source == VALID:
        tokens = loaded.corpus().valid(num)
        if len(tokens) < num:
            raise ValueError(f"num: expected at most {len(tokens)} validation images, got {num}")
    else:
        values = to_tokens(read_picture(Path(source)), shape[2])
        if values.shape != shape:
            found = " x ".join(map(str, values.shape[:2]))
            raise ValueError(f"{source}: expected an image of {shape[0]} x {shape[1]} pixels, got {found}")
        tokens = torch.from_numpy(values.astype(np.int64)).flatten().expand(num, -1)
    return tokens, where.expand(num, -1)


def paint(
    loaded: LoadedModel, options: _Options, tokens: Tensor, path: Path, given: tuple[Tensor, Tensor] | None = None
) -> None:
    """Writes images as a grid, and says where.

    Args:
        loaded: a model of images.
        options: ``json`` is a file to which the tokens are written too; each of ``labels`` has a column.
        tokens: the images [n, L].
        path: the PNG file.
        given: the result of :func:`read_given`; the kept part is shown before each image.
    """
    shape, columns = loaded.model.config.shape, len(options.labels) or None
    pictures = to_pixels(tokens, shape)
    if given is not None:
        mask = loaded.diffusion.process.dim
        before = to_pixels(given[0].masked_fill(~given[1], mask), shape)
        pictures = np.stack([before, pictures], axis=1).reshape(-1, *shape)
        columns = 2 * (columns or max(1, math.isqrt(len(tokens) // 2)))
    write_png(path, grid(pictures, columns))
    if options.json:
        rows: list[dict[str, Any]] = [{"tokens": row.tolist()} for row in tokens]
        write_json(Path(options.json), rows)
    console().print(f"{path}: {len(tokens):,} images of {' x '.join(map(str, shape))}", highlight=False)
