"""Where text comes from: local files, the Hugging Face hub, or the Python installation, as rows of `datasets`."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd.hints import pip_install
from sedd.progress import is_interactive

if TYPE_CHECKING:
    from sedd.data import DataConfig

_BUILDERS = {".txt": "text", ".raw": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
SAMPLE_BY = {"file": "document", "paragraph": "paragraph", "line": "line"}
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}


def import_datasets() -> Any:
    """The package `datasets`, imported when it is needed, or an error that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"loading text needs the package datasets: {pip_install('train', 'datasets')}") from error
    from rich.console import Console

    if not is_interactive(Console(stderr=True)):
        datasets.disable_progress_bars()  # they are redrawn with control characters
    return datasets


def open_source(config: DataConfig) -> tuple[Any, Any]:
    """Rows to train on, and rows to validate on or None."""
    saved = is_saved(config.source)
    files = None if config.source == "stdlib" or saved else _local_files(config.source, "source")
    if config.source == "stdlib" or files or saved:
        splits = saved and _saved_splits(config.source)
        for field, value, default, there in (
            ("subset", config.subset, None, False),
            ("revision", config.revision, None, False),
            ("train_split", config.train_split, "train", splits),
            ("valid_split", config.valid_split, None, splits),
        ):
            if value != default and not there:
                raise ValueError(f"{field}: {value!r} given, but only hub data sets have it, not {config.source!r}")
    valid_saved = config.valid_source is not None and is_saved(config.valid_source)
    valid_files: list[Path] = []
    if config.valid_source is not None and not valid_saved:
        valid_files = _local_files(config.valid_source, "valid_source")
    both = sorted(set(files or ()) & set(valid_files))
    if both:
        raise ValueError(f"valid_source: {both[0]} is in source too; validation needs text that is not trained on")
    if config.source == "stdlib":
        rows, valid_rows = _stdlib(config), None
    elif files:
        rows, valid_rows = _read_files(files, config, "source"), None
    elif saved:
        found = _read_saved(config, "source")
        rows, valid_rows = _chosen(found, config) if _saved_splits(config.source) else (found, None)
    else:
        rows, valid_rows = _hub(config)
    if valid_files:
        valid_rows = _read_files(valid_files, config, "valid_source")
    elif valid_saved:
        valid_rows = _read_saved(config, "valid_source")
    return rows, valid_rows


def is_saved(source: str) -> bool:
    """Whether a source is a folder that ``save_to_disk`` of `datasets` wrote."""
    path = Path(source).expanduser()
    return _saved_splits(source) or all((path / name).is_file() for name in ("state.json", "dataset_info.json"))


def _saved_splits(source: str) -> bool:
    return (Path(source).expanduser() / "dataset_dict.json").is_file()


def _read_saved(config: DataConfig, field: str) -> Any:
    """The rows of a folder of ``save_to_disk``, or of each of its splits."""
    datasets = import_datasets()
    source = str(getattr(config, field))
    if field == "valid_source" and _saved_splits(source):
        raise ValueError(f"{field}: {source} holds several splits; give the folder of one of them")
    cache = Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE)
    try:
        found = datasets.load_from_disk(str(_linked(Path(source).expanduser().resolve(), cache)))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{field}: {source} could not be read as a folder of save_to_disk: {error}") from error
    if not config.streaming:
        return found
    if isinstance(found, dict):
        return {name: rows.to_iterable_dataset() for name, rows in found.items()}
    return found.to_iterable_dataset()


def _linked(folder: Path, cache: Path) -> Path:
    """A folder of the cache with links to a saved data set.

    `datasets` puts what it prepares beside the files that it reads, but the data set's own folder may be read-only.
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
    """Whether a source is local files of text: of JSON and Parquet files, as of hub data sets, rows are documents."""
    if is_saved(source):
        return False
    files = _local_files(source, "source")
    return bool(files) and _builder(files[0]) == "text"


def _builder(path: Path) -> str | None:
    """The builder of `datasets` that reads a file, by its suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else "text"


def _local_files(source: str, field: str) -> list[Path]:
    """The files that `source` means; none if it may be the name of a hub data set."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower() in {*_BUILDERS, *_COMPRESSED}
    known = f"{', '.join(_BUILDERS)}, plain or compressed ({', '.join(sorted(_COMPRESSED))})"
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix and _builder(p) and p.is_file())
        files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise FileNotFoundError(f"{field}: the folder {source} holds no text file; known are {known}")
    elif path.is_file():
        files = [path]
    elif field == "source" and not source.startswith(("/", ".", "~")) and source.count("/") < 2 and not suffix:
        return []
    else:
        raise FileNotFoundError(f"{field}: there is no file or folder {source!r} (from {Path.cwd()})")
    kinds = {_builder(file): file.name for file in files}
    if None in kinds:
        raise ValueError(f"{field}: {source} is not a kind of file that can be read; known are {known}")
    if len(kinds) > 1:
        raise ValueError(
            f"{field}: {source} mixes kinds of files ({', '.join(kinds.values())}); give a folder of one kind"
        )
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{field}: {source} is empty")
    return [file.resolve() for file in files]


def _read_files(files: list[Path], config: DataConfig, field: str) -> Any:
    datasets = import_datasets()
    builder = _builder(files[0])
    options = {"sample_by": SAMPLE_BY[config.documents]} if builder == "text" else {}
    try:
        # Not load_dataset, which reports to the hub that a builder was used, and waits for it, even for a local file.
        read = getattr(datasets.Dataset, f"from_{builder}")
        paths = [glob.escape(str(file)) for file in files]
        return read(paths, streaming=config.streaming, cache_dir=config.cache_dir, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        source = getattr(config, field)
        raise ValueError(f"{field}: {source} could not be read as {builder}: {error.__cause__ or error}") from error


def _hub(config: DataConfig) -> tuple[Any, Any]:
    datasets = import_datasets()
    source = config.source
    try:
        found = datasets.load_dataset(
            source, config.subset, revision=config.revision, streaming=config.streaming, cache_dir=config.cache_dir
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"source: {source!r} is no file or folder here, and no data set of the Hugging Face hub that can be read: "
            f"{error}"
        ) from error
    except OSError as error:
        raise ConnectionError(
            f"source: {source!r} is no file or folder here, and the Hugging Face hub could not be reached "
            f"({type(error).__name__}: {error}). Connect to the network (HF_HUB_OFFLINE must not be set), or use a "
            "file, a folder or 'stdlib'"
        ) from error
    except ValueError as error:  # an unknown subset, or several and none chosen: the message lists them
        raise ValueError(f"subset: {config.subset!r} of {source!r}: {error}") from error
    return _chosen(found, config)


def _chosen(found: Any, config: DataConfig) -> tuple[Any, Any]:
    """The split to train on and the one to validate on, or None."""
    source, valid_split = config.source, config.valid_split
    if valid_split is None and config.valid_source is None and "validation" in found:
        valid_split = "validation"
    for field, split in (("train_split", config.train_split), ("valid_split", valid_split)):
        if split is not None and split not in found:
            raise ValueError(f"{field}: {source!r} has no split {split!r}; it has {', '.join(map(repr, found))}")
    if valid_split == config.train_split:
        raise ValueError(f"valid_split: {valid_split!r} is train_split too; leave it out to validate on a part of it")
    return found[config.train_split], None if valid_split is None else found[valid_split]


def _stdlib(config: DataConfig) -> Any:
    """The Python installation's own text: modules of the standard library and the language's help topics."""
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files(root)
    if not files:
        raise FileNotFoundError(
            f"source: no Python source under {root}; this Python came without its sources. Install them, or give a file"
        )
    sizes = [(str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    version = hashlib.blake2b(repr((sys.version, sizes)).encode(), digest_size=16).hexdigest()
    rows = import_datasets().Dataset.from_generator(
        _stdlib_documents, gen_kwargs={"root": str(root), "version": version}, cache_dir=config.cache_dir
    )
    return rows.to_iterable_dataset() if config.streaming else rows


def stdlib_files(root: Path) -> list[Path]:
    """Source files of a standard library, sorted: written by people for people, and each of them once.

    Left out are installed packages, tests, the codecs' tables (near copies of one another), and what a build or an
    administrator generated. The help topics are data inside a module, and are read as text of their own.
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
    """Texts without copies. `version` only makes the cache notice another Python."""
    texts = []
    for file in stdlib_files(Path(root)):
        try:
            with tokenize.open(file) as opened:  # obeys the file's declared encoding
                texts.append(opened.read())
        except (SyntaxError, UnicodeDecodeError):
            continue  # not readable as Python source: a template or a deliberately broken sample
    try:
        from pydoc_data.topics import topics

        texts += [topics[topic] for topic in sorted(topics)]
    except ImportError:
        pass  # some distributions package the topics apart
    for text in dict.fromkeys(texts):
        yield {"text": text}
