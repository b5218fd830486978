"""Pictures in files: reads PNG, writes PNG, and arranges the samples of a model in a grid."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sedd.files import whole_file
from sedd.hints import pip_install

__all__ = [
    "VALUES",
    "Pixels",
    "grid",
    "import_pillow",
    "png",
    "read_picture",
    "to_pixels",
    "to_tokens",
    "write_png",
]

Pixels = NDArray[np.uint8]
VALUES = 256
"""Values of a pixel. MASK is the token after them."""
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Kinds of pictures that can be read, as Pillow calls them."""
_MASKED = 128
_LEAST = 64  # pixels of a side of a picture in a grid


def import_pillow() -> Any:
    """Imports Pillow on first use; the error explains how to install it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"images need Pillow: {pip_install('images', 'PIL')}") from error
    return Image


def to_pixels(tokens: Tensor, shape: tuple[int, ...]) -> Pixels:
    """Pixels [..., H, W, C] of tokens [..., H·W·C]; MASK is a medium grey."""
    values = tokens.cpu().numpy()
    return np.where(values < VALUES, values, _MASKED).astype(np.uint8).reshape(*values.shape[:-1], *shape)


def to_tokens(picture: Any, channels: int) -> Pixels:
    """Values [H, W, C] of a picture of Pillow, converted to grey (one channel) or RGB (three).

    Raises:
        ValueError: its values do not have 8 bits.
    """
    if picture.mode not in MODES:
        raise ValueError(f"picture: expected values of 8 bits ({', '.join(MODES)}), got {picture.mode}")
    values = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.uint8)
    return values.reshape(*values.shape[:2], channels)


def read_picture(file: Path | BinaryIO, size: tuple[int, int] | None = None) -> Any:
    """Reads a PNG file as a picture of Pillow.

    Args:
        file: its path, or an open file, which messages call ``picture``.
        size: columns and rows that it must have. They are compared before any pixel is decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG file, or damaged, or has another size or 16 bits.
        ImportError: Pillow is not installed.
    """
    name = file if isinstance(file, Path) else "picture"
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError(f"{name}: expected a PNG file, got no such file")
    image = import_pillow()
    try:
        with image.open(file, formats=["PNG"]) as picture:
            wrong = _wrong(picture, size)
            if wrong is None:
                picture.load()
                return picture.copy()
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, image.DecompressionBombError) as error:
        raise ValueError(f"{name}: expected a PNG file, got one that cannot be read: {error}") from error
    raise ValueError(f"{name}: {wrong}")


def _wrong(picture: Any, size: tuple[int, int] | None) -> str | None:
    """What is wrong with a PNG file that is open but not decoded."""
    columns, rows = picture.size
    if size is not None and size != (columns, rows):
        return f"expected an image of {size[1]} x {size[0]} pixels, got {rows} x {columns}"
    mode = str(picture.tile[0][3]) if picture.tile else picture.mode  # in the file; Pillow reads 16 bits in colour as 8
    return f"expected values of 8 bits ({', '.join(MODES)}), got {mode}" if ";16" in mode else None


def grid(pictures: Pixels, columns: int | None = None) -> Pixels:
    """Pictures in rows, with a white line between them.

    Args:
        pictures: [n, H, W, C].
        columns: pictures in a row; None for a square.

    Returns:
        One picture. Small ones are enlarged by a whole factor; missing ones at the end are white.
    """
    n, height, width, channels = pictures.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    rows, factor = math.ceil(n / columns), max(1, _LEAST // max(height, width))
    large = pictures.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = factor * height + 1, factor * width + 1
    whole = np.full((rows * height + 1, columns * width + 1, channels), 255, np.uint8)
    for number, picture in enumerate(large):
        row, column = divmod(number, columns)
        whole[row * height + 1 : (row + 1) * height, column * width + 1 : (column + 1) * width] = picture
    return whole


def png(picture: Pixels) -> bytes:
    """The bytes of a PNG file of a picture [H, W, C], grey (C = 1) or RGB (C = 3).

    Raises:
        ImportError: Pillow is not installed.
    """
    content = io.BytesIO()
    import_pillow().fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(content, format="PNG")
    return content.getvalue()


def write_png(path: Path, picture: Pixels) -> None:
    """Writes the PNG file of a picture, see :func:`png`: the whole file or nothing.

    Raises:
        OSError: the file cannot be written.
        ImportError: Pillow is not installed.
    """
    content = png(picture)
    with whole_file(path) as temporary:
        temporary.write_bytes(content)
