"""Text to blocks: what is loaded, how it is divided and cut, in which order it comes, and how that resumes."""

import gzip
import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sedd.data.batches import TokenBlocks
from sedd.data.sources import stdlib_files
from sedd.data.text import DataConfig, batches, load_blocks, load_text, valid_batches
from sedd.data.tokenizer import TOKENIZERS, _named_tokenizer, get_tokenizer

datasets = pytest.importorskip("datasets")
BYTES = get_tokenizer("bytes")
TEXT8 = get_tokenizer("text8")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def config(tmp_path):
    """Makes configurations whose cache is the test's own."""
    return lambda source, **options: DataConfig(source=str(source), cache_dir=str(tmp_path / "cache"), **options)


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def documents(n, words=12):
    """Different documents; each names itself in every word."""
    return [" ".join(f"d{i}w{j}" for j in range(words)) for i in range(n)]


def split_documents(blocks):
    """Documents of a byte-level split whose blocks are one token long, so that nothing is cut off."""
    text = BYTES.decode(blocks.gather(np.sort(blocks.starts)).reshape(-1))
    return [part for part in text.split("<|endoftext|>") if part]


def random_text8(n, seed=0):
    return TEXT8.decode(np.random.default_rng(seed).integers(0, 27, n))


# Loading


def test_a_text_file_is_one_document_and_keeps_its_newlines(config, tmp_path):
    text = "First line.\n\n  Indented, naïve.\nlast\n" * 20
    (tmp_path / "a.txt").write_text(text)
    splits = load_blocks(config(tmp_path / "a.txt", valid_fraction=0.25), BYTES, 1)
    train, valid = (BYTES.decode(s.gather(np.sort(s.starts)).reshape(-1)) for s in (splits.train, splits.valid))
    assert train + valid == text + "<|endoftext|>"
    assert splits.valid.n_tokens == pytest.approx((len(text.encode()) + 1) / 4, abs=1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("line", ["one", "two", "three", "four"]), ("paragraph", ["one\ntwo", "three\nfour\n"])],
)
def test_lines_and_paragraphs(config, tmp_path, kind, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour\n")
    splits = load_blocks(config(tmp_path / "a.txt", documents=kind), BYTES, 1)
    assert sorted(split_documents(splits.train) + split_documents(splits.valid)) == sorted(expected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "folder", "strange[1].jsonl"])
def test_kinds_of_files(config, tmp_path, name):
    texts = documents(20)
    path = tmp_path / name
    if name == "a.json":
        path.write_text(json.dumps([{"text": text, "n": i} for i, text in enumerate(texts)]))
    elif name == "a.parquet":
        datasets.Dataset.from_dict({"n": list(range(20)), "text": texts}).to_parquet(str(path))
    elif name == "a.jsonl.gz":
        plain = write_jsonl(tmp_path / "plain", texts)
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif name == "folder":
        (path / "inner").mkdir(parents=True)
        write_jsonl(path / "one.jsonl", texts[:5])
        write_jsonl(path / "inner" / "two.jsonl", texts[5:])
        write_jsonl(path / ".hidden.jsonl", ["hidden"])
        (path / "notes.pdf").write_text("no text")
    else:
        write_jsonl(path, texts)
    splits = load_blocks(config(path), BYTES, 1)
    assert sorted(split_documents(splits.train) + split_documents(splits.valid)) == sorted(texts)


def test_other_text_column_and_null_rows(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [None, "", " \n", *documents(10)], column="content")
    splits = load_blocks(config(path, text_column="content"), BYTES, 1)
    assert sorted(split_documents(splits.train) + split_documents(splits.valid)) == sorted(documents(10))


def test_num_proc_does_not_change_the_blocks(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(300))
    one, two = (load_blocks(config(path, num_proc=n), BYTES, 64) for n in (1, 2))
    for a, b in ((one.train, two.train), (one.valid, two.valid)):
        assert np.array_equal(a.tokens(), b.tokens())


def test_prepared_text_is_reused_and_a_changed_file_is_noticed(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    first = load_blocks(config(path), BYTES, 16)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")}
    load_blocks(config(path), BYTES, 32)  # another block length needs no new file
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")} == files
    write_jsonl(path, documents(60))
    os.utime(path, ns=(1, 1))
    assert load_blocks(config(path), BYTES, 16).train.n_tokens > first.train.n_tokens


def test_max_documents(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(50))
    splits = load_blocks(config(path, max_documents=10), BYTES, 1)
    assert sorted(split_documents(splits.train) + split_documents(splits.valid)) == sorted(documents(10))


def test_stdlib_leaves_out_tests_packages_and_generated_files(tmp_path):
    for name in [
        "abc.py", "json/decoder.py", "test/test_abc.py", "json/tests/x.py", "idlelib/idle_test/x.py",
        "encodings/cp1250.py", "site-packages/torch.py", "dist-packages/apt.py", "__pycache__/abc.py", "LICENSE.txt",
        "_sysconfigdata_linux.py", "config-3.11/x.py", "sitecustomize.py", "pydoc_data/topics.py",
    ]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert [str(p.relative_to(tmp_path)) for p in stdlib_files(tmp_path)] == ["abc.py", "json/decoder.py"]


def test_stdlib_of_this_python(config):
    splits = load_blocks(config("stdlib"), BYTES, 512)
    assert splits.train.n_tokens > 4_000_000
    assert 0.01 < splits.valid.n_tokens / (splits.train.n_tokens + splits.valid.n_tokens) < 0.15
    files = {path.read_text(errors="ignore") for path in stdlib_files(Path(os.__file__).parent)}
    train, valid = (
        set(BYTES.decode(s.gather(np.sort(s.starts)).reshape(-1)).split("<|endoftext|>"))
        for s in (splits.train, splits.valid)
    )
    assert len(train & files) > 200
    assert len(valid & files) > 5
    assert not train & valid


def test_stdlib_without_sources(config, tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no Python source"):
        load_blocks(config("stdlib"), BYTES, 8)


# The split


@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.7])
def test_documents_are_divided_whole_and_copies_stay_together(config, tmp_path, fraction):
    texts = documents(400)
    path = write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1])
    splits = load_blocks(config(path, valid_fraction=fraction), BYTES, 1)
    train, valid = split_documents(splits.train), split_documents(splits.valid)
    assert sorted(train + valid) == sorted(texts * 2)
    assert not set(train) & set(valid)
    deviation = (fraction * (1 - fraction) / 400) ** 0.5
    assert abs(len(set(valid)) / 400 - fraction) < 4 * deviation


def test_the_side_of_a_document_does_not_depend_on_the_others(config, tmp_path):
    few, many = (
        write_jsonl(tmp_path / "few.jsonl", documents(200)),
        write_jsonl(tmp_path / "many.jsonl", documents(400)),
    )
    small, large = (set(split_documents(load_blocks(config(p), BYTES, 1).valid)) for p in (few, many))
    assert small == large & set(documents(200))


def test_two_documents_go_to_two_sides(config, tmp_path):
    splits = load_blocks(config(write_jsonl(tmp_path / "a.jsonl", documents(2)), valid_fraction=1e-9), BYTES, 1)
    assert len(split_documents(splits.train)) == len(split_documents(splits.valid)) == 1


def test_copies_of_one_document_are_one_document(config, tmp_path):
    splits = load_blocks(config(write_jsonl(tmp_path / "a.jsonl", ["abcdefghij"] * 5), valid_fraction=0.3), BYTES, 1)
    assert BYTES.decode(splits.train.tokens()) == "abcdefgh"
    assert splits.valid.n_tokens == 3


def test_valid_source(config, tmp_path):
    train, valid = (
        write_jsonl(tmp_path / f"{n}.jsonl", [f"{n} {t}" for t in documents(10)]) for n in ("train", "valid")
    )
    splits = load_blocks(config(train, valid_source=str(valid)), BYTES, 1)
    assert len(split_documents(splits.train)) == len(split_documents(splits.valid)) == 10
    assert all(document.startswith("valid") for document in split_documents(splits.valid))
    with pytest.raises(ValueError, match=r"valid_source: expected files that are not in source, got .*valid\.jsonl"):
        load_blocks(config(tmp_path, valid_source=str(valid)), BYTES, 1)


# Blocks


def test_blocks_across_pieces():
    pieces = [np.arange(start, start + n, dtype=np.uint16) for start, n in ((0, 3), (3, 0), (3, 1), (4, 10), (14, 9))]
    blocks = TokenBlocks(pieces, 5)
    assert len(blocks) == 4
    assert torch.equal(blocks.take(range(4)), torch.arange(20).reshape(4, 5))
    assert blocks[2].tolist() == [10, 11, 12, 13, 14]
    assert blocks.gather(np.array([18, 1, 2])).tolist() == [[18, 19, 20, 21, 22], [1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]
    assert blocks.tokens().tolist() == list(range(20))
    with pytest.raises(ValueError, match="text: expected at least one block of 24 tokens, got 23 tokens"):
        TokenBlocks(pieces, 24)


def test_validation_order_is_fixed_and_shuffled(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(400))
    first, second = (load_blocks(config(path, valid_fraction=0.5), BYTES, 64).valid for _ in range(2))
    assert np.array_equal(first.starts, second.starts)
    assert not np.array_equal(first.starts, np.sort(first.starts))
    assert np.array_equal(np.sort(first.starts), np.arange(len(first)) * 64)
    got = list(valid_batches(first, 10, max_blocks=25))
    assert [len(batch) for batch in got] == [10, 10, 5]
    assert torch.equal(torch.cat(got), first.take(range(25)))
    assert sum(len(batch) for batch in valid_batches(first, 10)) == len(first)


# Batches


@pytest.fixture
def modes(config, tmp_path):
    """A training split of every mode, made anew at each call."""
    path = write_jsonl(tmp_path / "a.jsonl", documents(60))
    (tmp_path / "lines.txt").write_text("\n".join(documents(60)))
    (tmp_path / "text8").write_text(random_text8(2000))
    makers = {
        "blocks": lambda: load_blocks(config(path), BYTES, 32),
        "windows": lambda: load_blocks(config(tmp_path / "text8", windows=True), TEXT8, 32),
        "stream": lambda: load_blocks(
            config(path, streaming=True, stream_shuffle_blocks=16, stream_valid_blocks=2), BYTES, 32
        ),
        "stream of lines": lambda: load_blocks(
            config(
                tmp_path / "lines.txt",
                documents="line",
                streaming=True,
                stream_shuffle_blocks=7,
                stream_valid_blocks=2,
                max_documents=50,
            ),
            BYTES,
            32,
        ),
    }
    return lambda mode: makers[mode]().train


MODES = ["blocks", "windows", "stream", "stream of lines"]


@pytest.mark.parametrize("mode", MODES)
def test_order_follows_from_the_seed(modes, mode):
    a, b, c = (list(itertools.islice(batches(modes(mode), 8, seed=seed), 60)) for seed in (1, 1, 2))
    assert all(batch.shape == (8, 32) and batch.dtype == torch.int64 for batch in a)
    assert all(map(torch.equal, a, b))
    assert not any(map(torch.equal, a, c))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7, 20, 41, 58])
def test_resume_is_exact(modes, mode, stop):
    """480 blocks are several epochs of every mode, and no epoch is a multiple of the batch."""
    stream = batches(modes(mode), 8, seed=3)
    whole = [next(stream) for _ in range(60)]
    interrupted = batches(modes(mode), 8, seed=3)
    for _ in range(stop):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.state_dict()))
    assert torch.equal(next(interrupted), whole[stop])  # taking the state disturbs nothing
    resumed = batches(modes(mode), 8, seed=3)
    next(resumed)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, itertools.islice(resumed, 60 - stop), whole[stop:]))


@pytest.mark.parametrize("stop", [40, 80])
def test_a_stream_resumes_exactly_where_an_epoch_has_just_ended(config, tmp_path, stop):
    """A text of one group: every group ends with the epoch, and the next begins with the first row."""
    (tmp_path / "a.txt").write_text("".join(f"line {i} of the text\n" for i in range(100)))
    (tmp_path / "b.txt").write_text("validation text " * 9)
    options = {"valid_source": str(tmp_path / "b.txt"), "documents": "line", "streaming": True}
    whole, resumed = (batches(load_blocks(config(tmp_path / "a.txt", **options), BYTES, 16).train, 4) for _ in range(2))
    for _ in range(stop):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["epoch"] > 0
    resumed.load_state_dict(state)
    assert all(map(torch.equal, itertools.islice(whole, 60), itertools.islice(resumed, 60)))


def test_an_epoch_has_every_block_once_in_a_new_order(modes):
    split = modes("blocks")
    n = len(split)
    assert n % 8
    taken = torch.cat(list(itertools.islice(batches(split, 8), n)))
    epochs = [taken[i * n : (i + 1) * n] for i in range(8)]
    everything = sorted(split.take(range(n)).tolist())
    assert all(sorted(epoch.tolist()) == everything for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_windows_begin_anywhere_and_stay_inside(modes):
    split = modes("windows")
    text = random_text8(2000)[: split.n_tokens]
    starts = [text.index(TEXT8.decode(row)) for batch in itertools.islice(batches(split, 50), 400) for row in batch]
    assert min(starts) == 0
    assert max(starts) == len(text) - 32
    counts = np.bincount(np.array(starts), minlength=len(text) - 31)
    expected = len(starts) / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - len(counts)) < 5 * (2 * len(counts)) ** 0.5


def test_windows_of_training_never_show_validation_text(config, tmp_path):
    text = random_text8(3000)
    (tmp_path / "text8").write_text(text)
    splits = load_blocks(config(tmp_path / "text8", windows=True, valid_fraction=0.1), TEXT8, 50)
    last = max(
        text.index(TEXT8.decode(row)) for batch in itertools.islice(batches(splits.train, 50), 200) for row in batch
    )
    first = min((text + " ").index(TEXT8.decode(row)) for row in splits.valid)
    assert last + 50 <= first
    assert len(splits.valid) == 6


def test_an_epoch_of_a_stream_is_the_training_text_of_the_map(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(200))
    prepared = load_blocks(config(path), BYTES, 1)
    streamed = load_blocks(config(path, streaming=True, stream_shuffle_blocks=10**9), BYTES, 1)
    n = prepared.train.n_tokens
    stream = batches(streamed.train, n)
    for _ in range(3):
        assert torch.equal(
            next(stream).flatten().sort().values,
            torch.from_numpy(prepared.train.tokens().astype(np.int64)).sort().values,
        )
    assert np.array_equal(np.sort(streamed.valid.tokens()), np.sort(prepared.valid.tokens()))
    assert not set(split_documents(streamed.valid)) & set(split_documents(prepared.train))


def test_a_stream_joins_documents_and_epochs_without_loss(config, tmp_path):
    """Documents shorter than a block and groups of one block: nothing is shuffled."""
    texts = [f"document {i}" for i in range(50)]
    train, valid = write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", ["held out " * 3] * 3)
    stream = load_blocks(
        config(train, valid_source=str(valid), streaming=True, stream_shuffle_blocks=1), BYTES, 16
    ).train
    n_blocks = 2 * sum(len(text) + 1 for text in texts) // 16
    got = BYTES.decode(torch.cat(list(itertools.islice(batches(stream, 1), n_blocks))).flatten())
    epoch = "".join(text + "<|endoftext|>" for text in texts)
    assert len(got) > 1.9 * len(epoch)
    assert (epoch * 2).startswith(got)


def test_streams_of_stdlib_and_valid_source(config, tmp_path):
    valid = write_jsonl(tmp_path / "valid.jsonl", documents(50))
    splits = load_blocks(config("stdlib", streaming=True, valid_source=str(valid), stream_shuffle_blocks=4), BYTES, 64)
    assert next(batches(splits.train, 4)).shape == (4, 64)
    assert "d0w0" in BYTES.decode(splits.valid[0])


def test_state_of_other_data_or_another_seed_is_refused(modes, config, tmp_path):
    split = modes("blocks")
    state = batches(split, 4, seed=1).state_dict()
    with pytest.raises(ValueError, match="expected seed = 2, got seed = 1"):
        batches(split, 4, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected kind = 'stream', got kind = 'blocks'"):
        batches(modes("stream"), 4, seed=1).load_state_dict(state)
    other = load_blocks(config(write_jsonl(tmp_path / "b.jsonl", documents(121))), BYTES, 32)
    with pytest.raises(ValueError, match="expected data = "):
        batches(other.train, 4, seed=1).load_state_dict(state)
    batches(split, 8, seed=1).load_state_dict(state)  # another batch size is fine


def test_bad_batches(modes):
    for name, value in (("batch_size", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected at least .*, got {value}"):
            batches(modes("blocks"), **{"batch_size": 4, "seed": 0, name: value})


def test_a_stream_without_training_text(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(4))
    splits = load_blocks(config(path, streaming=True, valid_fraction=1 - 1e-12), BYTES, 8)
    with pytest.raises(ValueError, match="expected training documents in the stream, got none"):
        next(batches(splits.train, 2))


# The hub


def test_local_text_needs_no_network(config, tmp_path, monkeypatch):
    asked = []  # and not an error alone: what reports to the hub swallows errors

    def resolve(host, *args, **options):
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    for streaming in (False, True):
        load_blocks(config(path, streaming=streaming, valid_fraction=0.5), BYTES, 8)
    assert not asked


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: its data sets come from here, whatever the network does."""
    splits = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {t}" for t in documents(20)]}) for name in ("train", "test")
    }

    def make(**more):
        found = datasets.DatasetDict({**splits, **more})
        monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, **options: found)

    return make


def test_hub_splits(config, hub):
    hub(validation=datasets.Dataset.from_dict({"text": ["held out"]}))
    splits = load_blocks(config("some/set"), BYTES, 1)
    assert split_documents(splits.valid) == ["held out"]
    assert len(split_documents(splits.train)) == 20
    splits = load_blocks(config("some/set", valid_split="test"), BYTES, 1)
    assert all(document.startswith("test") for document in split_documents(splits.valid))


def test_the_validation_split_can_be_read_alone(config, hub):
    hub(validation=datasets.Dataset.from_dict({"text": ["held out"]}))
    assert load_text(config("some/set", train_split="validation"), BYTES, 1).n_tokens == len("held out") + 1


def test_hub_without_validation_split(config, hub):
    hub()
    splits = load_blocks(config("some/set", valid_fraction=0.3), BYTES, 1)
    train, valid = split_documents(splits.train), split_documents(splits.valid)
    assert len(train + valid) == 20
    assert all(document.startswith("train") for document in train + valid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "trian"}, r"train_split: expected a split of 'some/set' \('train', 'test'\), got 'trian'"),
        ({"valid_split": "dev"}, "valid_split: expected a split of 'some/set' .*, got 'dev'"),
        ({"valid_split": "train"}, "valid_split: expected another split than train_split, got 'train'"),
        ({"text_column": "content"}, r"text_column: expected a column of source \('text'\), got 'content'"),
    ],
)
def test_hub_errors(config, hub, options, message):
    hub()
    with pytest.raises(ValueError, match=message):
        load_blocks(config("some/set", **options), BYTES, 8)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionError("down"), ConnectionError, "'some/set'.*cannot be reached.*down.*'stdlib'"),
        (datasets.exceptions.DatasetNotFoundError("none"), FileNotFoundError, "source: .*, got 'some/set': none"),
        (ValueError("Config name is missing; pick one of ['a', 'b']"), ValueError, "subset: .* None .*pick one of"),
        (datasets.exceptions.DatasetGenerationError("damaged"), ValueError, "source: .*read 'some/set': damaged"),
    ],
)
def test_hub_failures(config, monkeypatch, error, kind, message):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind, match=message):
        load_blocks(config("some/set"), BYTES, 8)


def test_the_real_hub_offline():
    """In a process of its own: the libraries read HF_HUB_OFFLINE when they are imported."""
    code = "from sedd.data.text import *; load_blocks(DataConfig('a/b'), __import__('sedd').get_tokenizer('bytes'), 8)"
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ConnectionError: source: could not load 'a/b'")


# Bad input


def bad_files(folder):
    folder.mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "empty.txt.gz").write_bytes(gzip.compress(b""))
    (folder / "blank.txt").write_text("\n \n")
    (folder / "short.txt").write_text("abc")
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{')
    (folder / "broken.parquet").write_text("no parquet")
    (folder / "archive.zip").write_text("zip")
    (folder / "numbers.jsonl").write_text('{"text": 1}\n')
    (folder / "upper.txt").write_text("lower Upper " * 50)
    (folder / "none").mkdir()
    write_jsonl(folder / "good.jsonl", documents(40))


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        ("empty.txt", {}, ValueError, r"source: expected text, got an empty file or folder: .*empty\.txt"),
        ("empty.txt.gz", {}, ValueError, "source: expected text, got none"),
        ("blank.txt", {}, ValueError, "source: expected text, got none"),
        ("short.txt", {}, ValueError, r"validation text: expected at least one block of 16 tokens, got 0"),
        ("latin.txt", {}, ValueError, r"could not read .*latin\.txt as text: 'utf-8' codec"),
        ("latin.txt", {"streaming": True}, ValueError, "source: could not read the text: 'utf-8' codec"),
        ("broken.jsonl", {}, ValueError, r"could not read .*broken\.jsonl as json"),
        ("broken.parquet", {}, ValueError, r"could not read .*broken\.parquet as parquet"),
        ("archive.zip", {}, ValueError, r"expected a file of a known type, got .*archive\.zip; known types: \.txt"),
        ("numbers.jsonl", {}, ValueError, "text_column: expected text in 'text' of source, got int64"),
        (
            "good.jsonl",
            {"text_column": "content"},
            ValueError,
            r"expected a column of source \('text'\), got 'content'",
        ),
        ("good.jsonl", {"valid_fraction": 0.0}, ValueError, "valid_fraction: .* got 0.0"),
        ("good.jsonl", {"valid_fraction": 1.0}, ValueError, "valid_fraction: .* got 1.0"),
        ("good.jsonl", {"documents": "word"}, ValueError, "documents: expected one of 'file', .* got 'word'"),
        ("good.jsonl", {"max_documents": 0}, ValueError, "max_documents: expected at least 1, got 0"),
        ("good.jsonl", {"num_proc": 0}, ValueError, "num_proc: expected at least 1, got 0"),
        ("good.jsonl", {"windows": True, "streaming": True}, ValueError, "windows: .* a stream has no random access"),
        ("good.jsonl", {"subset": "en"}, ValueError, "subset: expected no value for .* got 'en'"),
        ("good.jsonl", {"valid_source": "missing.txt"}, FileNotFoundError, "valid_source: expected a file or folder"),
        ("missing.txt", {}, FileNotFoundError, "source: expected a file or folder"),
        ("none", {}, FileNotFoundError, "expected a folder with text files"),
        (".", {}, ValueError, "expected files of one type, got"),
    ],
)
def test_bad_input(config, tmp_path, source, options, kind, message):
    bad_files(tmp_path / "files")
    with pytest.raises(kind, match=message):
        load_blocks(config(tmp_path / "files" / source, **options), BYTES, 16)


def test_wrong_characters_for_text8(config, tmp_path):
    bad_files(tmp_path / "files")
    with pytest.raises(ValueError, match=r"'U' \(U\+0055\) at character 6, in 'lower Upper"):
        load_blocks(config(tmp_path / "files" / "upper.txt"), TEXT8, 16)


def test_bad_length(config):
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        load_blocks(config("stdlib"), BYTES, 0)


def test_without_datasets_the_extra_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "sedd_ext\[train\]"'):
        load_blocks(config("stdlib"), BYTES, 8)


# Folders of save_to_disk


def test_a_saved_data_set_is_read_and_left_alone(config, tmp_path):
    """One Dataset, a DatasetDict with its splits, and both read-only: nothing is written beside the data."""
    texts = documents(40)
    one, two = (datasets.Dataset.from_dict({"text": part}) for part in (texts[:30], texts[30:]))
    one.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": one, "validation": two}).save_to_disk(str(tmp_path / "both"))
    before = sorted(tmp_path.rglob("*"))
    splits = load_blocks(config(tmp_path / "one"), BYTES, 1)
    assert sorted(split_documents(splits.train) + split_documents(splits.valid)) == sorted(texts[:30])
    splits = load_blocks(config(tmp_path / "both"), BYTES, 1)
    assert sorted(split_documents(splits.train)) == sorted(texts[:30])
    assert sorted(split_documents(splits.valid)) == sorted(texts[30:])
    splits = load_blocks(config(tmp_path / "one", valid_source=str(tmp_path / "both" / "validation")), BYTES, 1)
    assert sorted(split_documents(splits.valid)) == sorted(texts[30:])
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before
    streamed = load_blocks(config(tmp_path / "both", streaming=True), BYTES, 8)
    assert len(torch.cat(list(itertools.islice(batches(streamed.train, 4), 3)))) == 12


def test_a_saved_data_set_that_has_changed_is_noticed(config, tmp_path):
    datasets.Dataset.from_dict({"text": documents(20)}).save_to_disk(str(tmp_path / "saved"))
    first = load_blocks(config(tmp_path / "saved"), BYTES, 1)
    datasets.Dataset.from_dict({"text": documents(30)}).save_to_disk(str(tmp_path / "saved"))
    assert load_blocks(config(tmp_path / "saved"), BYTES, 1).train.n_tokens > first.train.n_tokens


def test_the_first_documents_of_a_text(config, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    assert load_text(config(path, max_documents=2), BYTES, 1).n_tokens == len("one") + len("two") + 2


def test_the_code_of_a_tokeniser_has_changed(config, tmp_path, monkeypatch):
    """Its name has not; the cached tokens are those of the old code."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    code = "from sedd.data.tokenizer import Bytes\nclass Mine(Bytes):\n    name = 'other:Mine'\n"
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    found = []
    for more in (0, 1, 1):
        (tmp_path / "other.py").write_text(
            f"{code}    def encode_array(self, t): return super().encode_array(t) + {more}"
        )
        monkeypatch.delitem(sys.modules, "other", raising=False)
        importlib.invalidate_caches()
        _named_tokenizer.cache_clear()
        monkeypatch.setitem(TOKENIZERS, "other:Mine", importlib.import_module("other").Mine)
        blocks = load_text(config(path), get_tokenizer("other:Mine"), 4)
        found.append(next(iter(valid_batches(blocks, 1)))[0, :3].tolist())
    assert found == [[97, 98, 99], [98, 99, 100], [98, 99, 100]]


def test_a_saved_data_set_that_will_not_do(config, tmp_path):
    data = datasets.Dataset.from_dict({"text": documents(20)})
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "both"))
    for options, message in (
        ({"source": "saved", "train_split": "test"}, "train_split: expected no value for .* got 'test'"),
        ({"source": "both", "train_split": "test"}, r"train_split: expected a split of .* \('train'\), got 'test'"),
        ({"source": "saved", "valid_source": str(tmp_path / "both")}, "valid_source: expected one split, got .*"),
    ):
        with pytest.raises(ValueError, match=message):
            load_blocks(config(tmp_path / options.pop("source"), **options), BYTES, 8)
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"source: could not read .*saved as a folder written by save_to_disk"):
        load_blocks(config(tmp_path / "saved"), BYTES, 8)
