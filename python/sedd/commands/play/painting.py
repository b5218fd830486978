"""Images of which a part is sampled again: how a request names the image, and which of its pixels are painted."""

from __future__ import annotations

import base64
import io
import re
from functools import cached_property

import torch
from torch import Tensor

from sedd.data.pictures import read_picture, to_tokens
from sedd.hub.pretrained import LoadedModel
from sedd.options import renamed

__all__ = ["MOST_VALID", "Images", "painted"]

MOST_VALID = 256
"""Validation images that requests can name."""
_VALID = re.compile(r"valid:(\d{1,9})")
_PNG = "data:image/png;base64,"


class Images:
    """Reads the images of requests.

    Args:
        loaded: the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded

    def read(self, image: str | list[int]) -> tuple[Tensor, int | None]:
        """The values of an image [L], int64, and the class of a validation image that has one.

        Args:
            image: the values; or ``valid:N`` for validation image N of the run; or a PNG file as a data URL.

        Raises:
            ValueError: the model is not one of images, or the image is none of these or has another size.
        """
        shape = self._loaded.model.config.shape
        if len(shape) != 3:
            raise ValueError("image: expected none, as this is not a model of images")
        if isinstance(image, list):
            return self._checked(image), None
        if image.startswith(_PNG):
            try:
                content = base64.b64decode(image.removeprefix(_PNG), validate=True)
            except ValueError as error:
                raise ValueError(f"image: expected a PNG file in base64, got something else ({error})") from error
            with renamed({"picture": "image"}):
                picture = read_picture(io.BytesIO(content), (shape[1], shape[0]))
                return self._checked(to_tokens(picture, shape[2]).flatten().tolist()), None
        number = _VALID.fullmatch(image)
        if number is None:
            got = image if len(image) <= 40 else f"{image[:40]}..."
            raise ValueError(f"image: expected values, valid:N, or a PNG file as {_PNG}..., got {got!r}")
        found = self._valid
        if isinstance(found, str):
            raise ValueError(f"image: the validation images cannot be read: {found}; restart the server to try again")
        images, labels = found
        n = int(number[1])
        if n >= len(images):
            raise ValueError(f"image: expected a validation image in [0, {len(images)}), got {n}")
        return self._checked(images[n].tolist()), None if labels is None else int(labels[n])

    def _checked(self, values: list[int]) -> Tensor:
        shape, process = self._loaded.model.config.shape, self._loaded.diffusion.process
        count = self._loaded.model.config.length
        if len(values) != count:
            raise ValueError(f"image: expected {count} values, {' x '.join(map(str, shape))}, got {len(values)}")
        most = process.dim if process.mask_id is None else process.mask_id
        if not 0 <= min(values) <= max(values) < most:
            raise ValueError(f"image: expected values in [0, {most}), got values from {min(values)} to {max(values)}")
        return torch.tensor(values)

    @cached_property
    def _valid(self) -> tuple[Tensor, Tensor | None] | str:
        """The first validation images of the run [n, L], and their classes [n] if the model has classes.

        If they cannot be read, the reason. It is kept: each attempt may wait for a network.
        """
        try:
            corpus = self._loaded.corpus()
            images = corpus.valid(MOST_VALID)
            return images, corpus.labels("validation", MOST_VALID) if self._loaded.model.config.classes else None
        except (OSError, ImportError, ValueError) as error:
            return str(error)


def painted(ranges: list[tuple[int, int]], shape: tuple[int, ...]) -> Tensor:
    """Where values are sampled again [H·W·C], bool.

    Args:
        ranges: ranges [first, end) of pixels, which are counted row by row.
        shape: rows, columns and channels of the image.

    Raises:
        ValueError: there is no range, or one is not within the image.
    """
    height, width, channels = shape
    pixels = height * width
    if not 1 <= len(ranges) <= pixels:
        raise ValueError(f"mask: expected the pixels that are sampled, 1 to {pixels} ranges, got {len(ranges)} ranges")
    where = torch.zeros(pixels, dtype=torch.bool)
    for first, end in ranges:
        if not 0 <= first < end <= pixels:
            raise ValueError(f"mask: expected ranges [first, end) of the {pixels} pixels, got [{first}, {end}]")
        where[first:end] = True
    return where.repeat_interleave(channels)
