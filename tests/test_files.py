"""Files that are whole or not there, tensors that say when they are damaged, and one trainer in a folder."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sedd.diffusion.schedule import LogLinear
from sedd.files import RunLock, load_tensors, save_tensors, whole_file, write_json, write_text
from sedd.hub import SEDD
from sedd.network import ModelConfig
from sedd.unfinished import Unfinished
from sedd_ext import Uniform

# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "change the permissions"), (errno.EIO, "")],
)
def test_an_error_names_the_file_the_reason_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    path = tmp_path / "page.html"
    write_text(path, "old")

    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match=rf"^{path}: could not be written: {os.strerror(number)}.*{remedy}"):
        write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "old")]


def test_new_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    """The one that is done last wins, whole."""
    path = tmp_path / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("first")
        if (child := os.fork()) == 0:
            write_text(path, "second")
            os._exit(0)
        os.waitpid(child, 0)
        assert path.read_text() == "second"
    assert path.read_text() == "first"


# -- damage ------------------------------------------------------------------------------------------------------------


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit of a file, each as likely as the others; every second time one of its header."""
    changed = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    changed[rng.randrange(header if rng.random() < 0.5 else len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_a_flipped_bit_of_an_exported_model_is_refused_or_harmless(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(hidden_size=8, n_blocks=1, n_heads=1, cond_dim=4, length=8)
    SEDD(sizes, Uniform(27), LogLinear(), tokenizer="text8").save_pretrained(tmp_path)
    weights = SEDD.from_pretrained(tmp_path).state_dict()
    file, rng, refused = tmp_path / "model.safetensors", random.Random(0), 0
    content = file.read_bytes()
    for _ in range(200):
        file.write_bytes(flipped(content, rng))
        try:
            found = SEDD.from_pretrained(tmp_path).state_dict()
        except ValueError as error:
            assert "model.safetensors: damaged" in str(error)  # noqa: PT017 - not all of them are refused
            refused += 1
        else:
            assert all(torch.equal(found[name], weights[name]) for name in weights)
    print(f"{refused} of 200 refused, the others harmless")
    assert refused > 190


def test_a_flipped_bit_of_an_unfinished_evaluation_is_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "bound.unfinished", random.Random(0)
    unfinished = Unfinished(path, "this")
    unfinished.update(torch.arange(50.0))
    unfinished.write()
    content = path.read_bytes()
    for _ in range(200):
        path.write_bytes(flipped(content, rng))
        with pytest.raises(ValueError, match=r"unfinished evaluation.*delete it to start again"):
            Unfinished(path, "this")


def test_tensors_of_others_have_no_digest_and_load(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors", {"format": "pt"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["a"], torch.ones(3))
    assert metadata == {"format": "pt"}


def test_the_digest_covers_names_types_shapes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(1.5), "c": torch.ones(4, dtype=torch.bfloat16)}
    save_tensors(path, tensors, {"format": "pt"})
    found, metadata = load_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    changes: list[Callable[[], None]] = [
        lambda: found.update(d=found.pop("a")),
        lambda: found.update(d=found["d"].view(torch.int32)),
        lambda: found.update(d=found["d"].T.contiguous()),
        lambda: metadata.update(format="tf"),
    ]
    for change in changes:
        change()
        save_file(found, path, metadata)
        with pytest.raises(ValueError, match=r"a\.safetensors: damaged"):
            load_tensors(path)


# -- one trainer in a folder -------------------------------------------------------------------------------------------


def test_the_second_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as lock:
        lock.check()
        with pytest.raises(
            BlockingIOError, match=rf"^run_dir: .*run is in use by process {os.getpid()} on .*--run_dir"
        ):
            RunLock(tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a start that failed leaves nothing"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    RunLock(tmp_path / "run").release()
    assert (tmp_path / "run" / "config.json").exists()


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    """Processes, each of which takes the lock, and keeps it until it is killed."""
    readable, writable = os.pipe()
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            try:
                lock = RunLock(tmp_path / "run")
                os.write(writable, b"1")
                signal.pause()
                lock.release()
            except BlockingIOError:
                os.write(writable, b"0")
            finally:
                os._exit(0)
        children.append(child)
    answers = b"".join(os.read(readable, 1) for _ in children)
    assert sorted(answers) == sorted(b"00000001")
    with pytest.raises(BlockingIOError) as refused:
        RunLock(tmp_path / "run")
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert any(f"process {child} on" in str(refused.value) for child in children)
    RunLock(tmp_path / "run").release()  # the kernel has released it
    os.close(readable)
    os.close(writable)


def test_a_worker_of_a_process_that_is_gone_does_not_hold_its_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    readable, writable = os.pipe()
    if (worker := os.fork()) == 0:
        os.write(writable, b"1")
        signal.pause()
    os.read(readable, 1)
    lock._close()  # as the kernel does at the end of a process
    RunLock(tmp_path).release()
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    os.close(readable)
    os.close(writable)


def test_a_folder_that_was_deleted_under_a_run_is_noticed(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run").rmdir()
    with RunLock(tmp_path / "run") as second:
        second.check()
        with pytest.raises(OSError, match=r"run: was deleted or replaced"):
            first.check()
        first.release()
        second.check()


def test_a_lock_that_goes_away_while_it_is_taken_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder deletes the file between our opening and locking it: what we have then excludes nobody."""
    acquire = RunLock._acquire
    deleted = threading.Event()

    def late(self: RunLock, folder: Path) -> None:
        acquire(self, folder)
        if not deleted.is_set():
            deleted.set()
            self.path.unlink()

    monkeypatch.setattr(RunLock, "_acquire", late)
    with RunLock(tmp_path), pytest.raises(BlockingIOError):
        RunLock(tmp_path)
