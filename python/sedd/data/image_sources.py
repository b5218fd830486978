"""Reads images from packages of Python and Debian, IDX files, folders of PNG files, and `datasets`.

Nothing that is read can execute code: arrays are read from their bytes, pictures by Pillow, tables by Arrow.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sedd.data.options import DataConfig
from sedd.data.pictures import Pixels, import_pillow, read_picture, to_tokens
from sedd.data.sources import import_datasets, is_saved, open_splits
from sedd.hints import pip_install
from sedd.options import renamed

__all__ = ["NAMED", "ImageSet", "open_images", "read_idx"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""
_IDX_SPLITS = {"train": "train", "test": "t10k"}
_UBYTE = 0x08


@dataclass(frozen=True)
class ImageSet:
    """The images of one split.

    Attributes:
        chunks: their values, uint8, one image after another, in chunks of any length.
        shape: rows, columns and channels of an image.
        labels: the class of each image [n], int64, -1 for an image without one; None if there are no classes.
        classes: number of classes.
    """

    chunks: list[Pixels]
    shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None = None
    classes: int = 0


def open_images(config: DataConfig) -> Mapping[str, ImageSet]:
    """The images of ``config.source`` by split.

    Raises:
        FileNotFoundError: there is no such file, folder or hub data set.
        ConnectionError: the source is not local, and the hub cannot be reached.
        ValueError: a file is damaged, or the source has no images, or images of several shapes.
        ImportError: a package is not installed.
    """
    found = _open(config)
    first = next(iter(found.values()))
    for split, images in found.items():
        if images.shape != first.shape:
            raise ValueError(
                f"source: expected images of one shape, got {list(first.shape)} and, in {split!r}, "
                f"{list(images.shape)} in {config.source}"
            )
    return found


def _open(config: DataConfig) -> Mapping[str, ImageSet]:
    source = config.source
    path = Path(source).expanduser()
    if source not in NAMED and (is_saved(source) or not path.exists()):
        return _from_datasets(config)
    for field in ("subset", "revision"):
        value = getattr(config, field)
        if value is not None:
            raise ValueError(f"{field}: expected no value for {source!r}, which is not a hub data set, got {value!r}")
    if source in NAMED:
        return NAMED[source]()
    if not path.is_dir():
        raise ValueError(f"source: expected a folder with PNG or IDX files, got {source}, which is a file")
    return _idx_folder(path) if list(path.glob("*-idx3-ubyte*")) else {"train": _png_folder(path)}


# -- arrays ------------------------------------------------------------------------------------------------------------


def _digits() -> Mapping[str, ImageSet]:
    """The digits of scikit-learn, 8 x 8. Their values 0 to 16 become 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"source: digits needs scikit-learn: {pip_install('images', 'sklearn')}") from error
    found = load_digits()
    values = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return {"train": ImageSet([values.reshape(-1)], (8, 8, 1), found.target.astype(np.int64), 10)}


def _fashion_mnist() -> Mapping[str, ImageSet]:
    if not FASHION_MNIST.is_dir():
        raise FileNotFoundError(
            f"source: expected Fashion-MNIST in {FASHION_MNIST}, got no such folder; apt-get install "
            "dataset-fashion-mnist, or give a folder with its IDX files"
        )
    return _idx_folder(FASHION_MNIST)


NAMED: dict[str, Callable[[], Mapping[str, ImageSet]]] = {"digits": _digits, "fashion-mnist": _fashion_mnist}
"""Sources with a name of their own. To add one, name here a function that returns its splits."""


def _idx_folder(folder: Path) -> Mapping[str, ImageSet]:
    """The splits of a folder with the four files of MNIST or Fashion-MNIST."""
    found = {}
    for split, prefix in _IDX_SPLITS.items():
        images, labels = (
            read_idx(_plain_or_compressed(folder, f"{prefix}-{name}-ubyte"), axes)
            for name, axes in (("images-idx3", 3), ("labels-idx1", 1))
        )
        if len(images) != len(labels):
            raise ValueError(
                f"{folder}: expected a label for each of {len(images)} images of {split}, got {len(labels)}"
            )
        shape = (images.shape[1], images.shape[2], 1)
        found[split] = ImageSet([images.reshape(-1)], shape, labels.astype(np.int64))
    classes = 1 + max(int(images.labels.max()) for images in found.values() if images.labels is not None)
    return {split: replace(images, classes=classes) for split, images in found.items()}


def _plain_or_compressed(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder}: expected the file {name} or {name}.gz, got neither")


def read_idx(path: Path, axes: int) -> Pixels:
    """Reads an array of bytes from a file in the IDX format, plain or gzip.

    The format: two zero bytes, the type of the numbers (8 for bytes), the number of axes, the length of each axis as 4
    bytes (big-endian), and the numbers.

    Args:
        path: the file. It is taken for gzip if its name ends with .gz.
        axes: the number of axes that the array must have.

    Raises:
        ValueError: the file is damaged, or has another format, type or number of axes, or no numbers.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0":
                raise ValueError(f"expected an IDX file, got one that begins with {head.hex(' ') or 'nothing'}")
            if head[2] != _UBYTE or head[3] != axes:
                raise ValueError(f"expected bytes (type 8) with {axes} axes, got type {head[2]} with {head[3]} axes")
            lengths = file.read(4 * axes)
            if len(lengths) < 4 * axes:
                raise ValueError(f"expected the lengths of {axes} axes, got the end of the file")
            shape = tuple(int.from_bytes(lengths[4 * i : 4 * i + 4], "big") for i in range(axes))
            count = math.prod(shape)
            if count == 0:
                raise ValueError(f"expected numbers, got the shape {list(shape)}")
            content = bytearray()
            # in pieces: read(count) would take memory for as many numbers as a damaged file promises
            while len(content) <= count and (piece := file.read(1 << 20)):
                content += piece
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    if len(content) != count:
        more = "more" if len(content) > count else f"{len(content):,}"
        raise ValueError(f"{path}: expected {count:,} numbers for the shape {list(shape)}, got {more}")
    return np.frombuffer(content, np.uint8).reshape(shape)


# -- pictures ----------------------------------------------------------------------------------------------------------


def _png_folder(folder: Path) -> ImageSet:
    """All PNG files below a folder, in the order of their names. If all are in subfolders, these are the classes.

    Hidden files, and those in hidden folders, are left out.
    """
    found = [path for path in folder.rglob("*.[pP][nN][gG]") if path.is_file()]
    files = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not files:
        raise FileNotFoundError(f"source: expected a folder with PNG or IDX files, got {folder}, which has none")
    values: list[Pixels] = []
    channels = 0
    for file in files:
        picture = read_picture(file)
        channels = channels or _channels(picture)
        with renamed({"picture": str(file)}):
            values.append(to_tokens(picture, channels))
        if values[-1].shape != values[0].shape:
            raise ValueError(f"{file}: expected {_size(values[0])} pixels as in {files[0]}, got {_size(values[-1])}")
    folders = [path.relative_to(folder).parts[:-1] for path in files]
    names = sorted({parts[0] for parts in folders if parts})
    labels = np.array([names.index(parts[0]) for parts in folders]) if all(folders) else None
    height, width, _ = values[0].shape
    shape = (height, width, channels)
    return ImageSet([np.stack(values).reshape(-1)], shape, labels, 0 if labels is None else len(names))


def _channels(picture: Any) -> int:
    """1 for a grey picture, 3 for another."""
    return 1 if picture.mode in ("1", "L", "LA") else 3


def _size(values: Pixels) -> str:
    return f"{values.shape[0]} x {values.shape[1]}"


def _from_datasets(config: DataConfig) -> Mapping[str, ImageSet]:
    """The splits of a hub data set or of a folder written by ``save_to_disk``."""
    import_pillow()  # datasets decodes pictures with it
    return {split: _table(rows, split, config.source) for split, rows in open_splits(config).items()}


def _table(rows: Any, split: str, source: str) -> ImageSet:
    """The first column of images of a table, and its first column of class labels, if it has one."""
    datasets = import_datasets()
    images, labels = (
        next((name for name, feature in rows.features.items() if isinstance(feature, kind)), None)
        for kind in (datasets.Image, datasets.ClassLabel)
    )
    if images is None or not len(rows):
        have = ", ".join(map(repr, rows.features)) if len(rows) else "no rows"
        raise ValueError(f"source: expected a column of images in {split!r} of {source}, got {have}")
    first, where = rows[0][images], f"{split!r} of {source}"
    if first is None:
        raise _no_image(where)
    channels = _channels(first)
    shape = (first.height, first.width, channels)
    values = rows.map(
        _encode,
        batched=True,
        batch_size=100,
        input_columns=[images],
        remove_columns=rows.column_names,
        features=datasets.Features({"values": datasets.Sequence(datasets.Value("uint8"))}),
        fn_kwargs={"shape": shape, "where": where},
        desc="Reading images",
    )
    chunks = [chunk.flatten().to_numpy() for chunk in values.with_format("arrow")[:]["values"].chunks]
    if labels is None:
        return ImageSet(chunks, shape)
    column = rows.select_columns([labels]).with_format("arrow")[:][labels].fill_null(-1).to_numpy()
    return ImageSet(chunks, shape, column, rows.features[labels].num_classes)


def _no_image(where: str) -> ValueError:
    return ValueError(f"source: expected an image in each row of {where}, got a row without one")


def _encode(pictures: list[Any], shape: tuple[int, int, int], where: str) -> dict[str, list[Pixels]]:
    if any(picture is None for picture in pictures):
        raise _no_image(where)
    values = [to_tokens(picture, shape[2]) for picture in pictures]
    for other in values:
        if other.shape != shape:
            raise ValueError(
                f"source: expected images of {shape[0]} x {shape[1]} pixels in {where}, got {_size(other)}"
            )
    return {"values": [other.reshape(-1) for other in values]}
