"""Reads text from local files, the Hugging Face hub or the Python installation, as rows of `datasets`."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from sedd.data.options import DataConfig
from sedd.hints import pip_install
from sedd.progress import is_interactive

Split = TypeVar("Split")

_BUILDERS = {".txt": "text", ".raw": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


def import_datasets() -> Any:
    """Imports the package `datasets` on first use; the error explains how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"loading text needs the package datasets: {pip_install('train', 'datasets')}") from error
    from rich.console import Console

    if not is_interactive(Console(stderr=True)):
        datasets.disable_progress_bars()  # they are redrawn with control characters
    return datasets


def open_source(config: DataConfig) -> tuple[Any, Any]:
    """Training rows, and validation rows or None."""
    saved = is_saved(config.source)
    files = None if config.source == "stdlib" or saved else _local_files(config.source, "source")
    if config.source == "stdlib" or files or saved:
        splits = has_splits(config.source)
        for field, value, default, there in (
            ("subset", config.subset, None, False),
            ("revision", config.revision, None, False),
            ("train_split", config.train_split, "train", splits),
            ("valid_split", config.valid_split, None, splits),
        ):
            if value != default and not there:
                raise ValueError(
                    f"{field}: expected no value for {config.source!r}, which is not a hub data set, got {value!r}"
                )
    valid_saved = config.valid_source is not None and is_saved(config.valid_source)
    valid_files: list[Path] = []
    if config.valid_source is not None and not valid_saved:
        valid_files = _local_files(config.valid_source, "valid_source")
    both = sorted(set(files or ()) & set(valid_files))
    if both:
        raise ValueError(f"valid_source: expected files that are not in source, got {both[0]}, which is in both")
    if config.source == "stdlib":
        rows, valid_rows = _stdlib(config), None
    elif files:
        rows, valid_rows = _read_files(files, config, "source"), None
    elif saved:
        found = _read_saved(config, "source")
        rows, valid_rows = chosen(found, config) if has_splits(config.source) else (found, None)
    else:
        rows, valid_rows = chosen(_hub(config), config)
    if valid_files:
        valid_rows = _read_files(valid_files, config, "valid_source")
    elif valid_saved:
        valid_rows = _read_saved(config, "valid_source")
    return rows, valid_rows


def open_splits(config: DataConfig) -> Mapping[str, Any]:
    """The rows of each split of a hub data set, or of a folder written by ``save_to_disk``."""
    if not is_saved(config.source):
        return _hub(config)
    found = _read_saved(config, "source")
    splits: Mapping[str, Any] = found if has_splits(config.source) else {config.train_split: found}
    return splits


def is_saved(source: str) -> bool:
    """Whether a source is a folder written by ``save_to_disk`` of `datasets`."""
    path = Path(source).expanduser()
    return has_splits(source) or all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def has_splits(source: str) -> bool:
    """Whether a source is a folder of several splits written by ``save_to_disk`` of `datasets`."""
    return (Path(source).expanduser() / "dataset_dict.json").is_file()


def _read_saved(config: DataConfig, field: str) -> Any:
    """The rows of a folder written by ``save_to_disk``, or of each of its splits."""
    datasets = import_datasets()
    source = str(getattr(config, field))
    if field == "valid_source" and has_splits(source):
        raise ValueError(
            f"{field}: expected one split, got {source}, which contains several; give the folder of one split"
        )
    cache = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE)
    try:
        found = datasets.load_from_disk(str(_linked(Path(source).expanduser().resolve(), cache)))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{field}: could not read {source} as a folder written by save_to_disk: {error}") from error
    if not config.streaming:
        return found
    if isinstance(found, dict):
        return {name: rows.to_iterable_dataset() for name, rows in found.items()}
    return found.to_iterable_dataset()


def _linked(folder: Path, cache: Path) -> Path:
    """A cache folder with symbolic links to the files of a saved data set.

    `datasets` writes its cache files next to the files that it reads, but the folder of the data set may be read-only.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith("cache-")]
    identity = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    links = cache / "saved" / hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()
    for file in files:
        link = links / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            link.symlink_to(file)
    return links


def is_plain_text(source: str) -> bool:
    """Whether a source consists of local text files. In JSON, Parquet and hub data sets, each row is a document."""
    if is_saved(source):
        return False
    files = _local_files(source, "source")
    return bool(files) and _builder(files[0]) == "text"


def _builder(path: Path) -> str | None:
    """Name of the `datasets` builder for a file, from its suffix; None if the suffix is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else "text"


def _local_files(source: str, field: str) -> list[Path]:
    """Files that `source` refers to; empty if it may be the name of a hub data set."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower() in {*_BUILDERS, *_COMPRESSED}
    known = f"{', '.join(_BUILDERS)}, plain or compressed ({', '.join(sorted(_COMPRESSED))})"
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix and _builder(p) and p.is_file())
        files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise FileNotFoundError(
                f"{field}: expected a folder with text files, got {source}, which has none; known types: {known}"
            )
    elif path.is_file():
        files = [path]
    elif field == "source" and not source.startswith(("/", ".", "~")) and source.count("/") < 2 and not suffix:
        return []
    else:
        raise FileNotFoundError(
            f"{field}: expected a file or folder, got {source!r}, which does not exist (in {Path.cwd()})"
        )
    kinds = {_builder(file): file.name for file in files}
    if None in kinds:
        raise ValueError(f"{field}: expected a file of a known type, got {source}; known types: {known}")
    if len(kinds) > 1:
        raise ValueError(
            f"{field}: expected files of one type, got {', '.join(kinds.values())} in {source}; give a folder with one "
            "type of file"
        )
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{field}: expected text, got an empty file or folder: {source}")
    return [file.resolve() for file in files]


def _read_files(files: list[Path], config: DataConfig, field: str) -> Any:
    datasets = import_datasets()
    builder = _builder(files[0])
    options = {"sample_by": SAMPLE_BY[config.documents]} if builder == "text" else {}
    try:
        # Not load_dataset: even for a local file it reports the use of a builder to the hub, and waits for the reply.
        read = getattr(datasets.Dataset, f"from_{builder}")
        paths = [glob.escape(str(file)) for file in files]
        return read(paths, streaming=config.streaming, cache_dir=config.cache_dir, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        source = getattr(config, field)
        raise ValueError(f"{field}: could not read {source} as {builder}: {error.__cause__ or error}") from error


def _hub(config: DataConfig) -> Mapping[str, Any]:
    """The rows of each split of a hub data set."""
    datasets = import_datasets()
    source = config.source
    try:
        found: Mapping[str, Any] = datasets.load_dataset(
            source, config.subset, revision=config.revision, streaming=config.streaming, cache_dir=config.cache_dir
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"source: expected a file, a folder or a readable data set on the Hugging Face hub, got {source!r}: {error}"
        ) from error
    except OSError as error:
        raise ConnectionError(
            f"source: could not load {source!r}: there is no such file or folder, and the Hugging Face hub cannot be "
            f"reached ({type(error).__name__}: {error}). Connect to the network and unset HF_HUB_OFFLINE, or use a "
            "file, a folder or 'stdlib'"
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"source: could not read {source!r}: {error.__cause__ or error}") from error
    except ValueError as error:  # an unknown subset, or several without a choice: the message lists them
        raise ValueError(f"subset: could not load subset {config.subset!r} of {source!r}: {error}") from error
    return found


def chosen(found: Mapping[str, Split], config: DataConfig) -> tuple[Split, Split | None]:
    """The training split, and the validation split or None.

    Raises:
        ValueError: there is no split of that name, or both are the same.
    """
    source, valid_split = config.source, config.valid_split
    default = "validation"
    if valid_split is None and config.valid_source is None and default in found and config.train_split != default:
        valid_split = default
    for field, split in (("train_split", config.train_split), ("valid_split", valid_split)):
        if split is not None and split not in found:
            raise ValueError(f"{field}: expected a split of {source!r} ({', '.join(map(repr, found))}), got {split!r}")
    if valid_split == config.train_split:
        raise ValueError(
            f"valid_split: expected another split than train_split, got {valid_split!r}; omit it to hold out a part"
        )
    return found[config.train_split], None if valid_split is None else found[valid_split]


def _stdlib(config: DataConfig) -> Any:
    """Text of the Python installation: the modules of the standard library and the help topics."""
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root)
    if not files:
        raise FileNotFoundError(
            f"source: no Python source in {root}: this Python has no source files. Install them, or give a file"
        )
    sizes = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = hashlib.blake2b(repr((sys.version, sizes)).encode(), digest_size=16).hexdigest()
    rows = import_datasets().Dataset.from_generator(
        _stdlib_documents, gen_kwargs={"root": str(root), "version": version}, cache_dir=config.cache_dir
    )
    return rows.to_iterable_dataset() if config.streaming else rows


def stdlib_files(root: Path) -> list[Path]:
    """Source files of a standard library, sorted; hand-written ones only.

    Excludes installed packages, tests, the tables of the codecs (which are nearly identical), and files that a build or
    an administrator generated. The help topics are data in a module and are read separately, as text.
    """
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if name not in _STDLIB_SKIPPED and not name.startswith("config-"))
        for name in sorted(names):
            generated = name.startswith("_sysconfig") or name in ("sitecustomize.py", "usercustomize.py", "topics.py")
            if name.endswith(".py") and not generated:
                files.append(Path(folder, name))
    return files


def _stdlib_documents(root: str, version: str) -> Iterator[dict[str, str]]:
    """Texts without duplicates. `version` is unused; it changes the cache key for another Python."""
    texts = []
    for file in stdlib_files(Path(root)):
        try:
            with tokenize.open(file) as opened:  # uses the encoding that the file declares
                texts.append(opened.read())
        except (SyntaxError, UnicodeDecodeError):
            continue  # not valid Python source: a template or an intentionally invalid sample
    try:
        from pydoc_data.topics import topics

        texts += [topics[topic] for topic in sorted(topics)]
    except ImportError:
        pass  # some distributions have the topics in a separate package
    for text in dict.fromkeys(texts):
        yield {"text": text}
