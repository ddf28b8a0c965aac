"""Caches of features that are damaged, full, shared, or were left half done."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from test_feature_cache import COUNT, Pictures, batch_of, build, cache_of

from hf_visual_peft.features import filling, storage
from hf_visual_peft.features.storage import DamagedError


SHARDS = 6
PROCESSES = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _small_files(monkeypatch):
    monkeypatch.setattr(storage, "_SHARD_ROWS", 2)


class Counted(Pictures):
    """Remembers which samples were read after the first few, which are always looked at."""

    def __init__(self, pause=0.0, failing=None):
        super().__init__()
        self.pause, self.failing, self.order = pause, failing, []

    def __getitem__(self, index):
        self.order.append(index)
        if index == self.failing:
            os._exit(3)
        time.sleep(self.pause)
        return super().__getitem__(index)

    @property
    def computed(self):
        """The samples that were read for their features, not only looked at."""
        looked_at = 2 * 8
        return sorted(self.order[looked_at:])


def fill(folder, data=None, **kwargs):
    return cache_of(build("lst"), folder, **kwargs).cached(data or Pictures(), name="train", key="a")


def features(cached):
    return batch_of(cached, *range(COUNT))["cached_features"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def reference(tmp_path_factory):
    return features(fill(tmp_path_factory.mktemp("reference")))


def files_of(cached):
    return sorted(cached.shards.folder.glob("*.safetensors"))


def cut_off(path, content):
    path.write_bytes(content[: len(content) // 2])


def emptied(path, content):
    path.write_bytes(b"")


def flipped(place, other=None):
    def flip(path, content):
        index = place(content)
        path.write_bytes(content[:index] + (other or bytes([content[index] ^ 4])) + content[index + 1 :])

    return flip


def header_end(content):
    return 8 + int.from_bytes(content[:8], "little")


DAMAGES = {
    "cut off": cut_off,
    "empty": emptied,
    "a byte of the features": flipped(lambda content: header_end(content) + 1000),
    "a byte of the labels": flipped(lambda content: len(content) - 1 if content[-1] == 0 else len(content) - 8),
    "the first byte": flipped(lambda content: 0),
    "a byte of the checksum": flipped(lambda content: content.index(b'checksum\\": \\"') + 16),
    "a byte of the shape": flipped(lambda content: content.index(b'"shape":[') + 9),
    "the dtype of the labels": flipped(lambda content: content.index(b'"I64"') + 1, b"F"),
    "the dtype of the features": flipped(lambda content: content.index(b'"F32"') + 1, b"I"),
    "a byte of the offsets": flipped(lambda content: content.index(b'"data_offsets":[') + 18),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_and_computed_again(damage, tmp_path, reference):
    broken = files_of(fill(tmp_path))[1]
    content = broken.read_bytes()
    DAMAGES[damage](broken, content)
    assert broken.read_bytes() != content
    with pytest.raises(DamagedError, match=r"features-00001-of-00006.safetensors is damaged: .*Without read_only"):
        fill(tmp_path, read_only=True)
    data = Counted()
    with pytest.warns(UserWarning, match=r"features-00001-of-00006.safetensors is damaged: .*computed again"):
        cached = fill(tmp_path, data)
    assert data.computed == [2, 3]
    assert same(features(cached), reference)
    assert broken.read_bytes() == content


def test_a_file_of_other_weights_is_computed_again(tmp_path, reference):
    mine = fill(tmp_path)
    model = build("lst")
    with torch.no_grad():
        model.base_model.model.vit.layers[0].mlp.fc1.weight.add_(0.1)
    other = cache_of(model, tmp_path).cached(Pictures(), name="train", key="a")
    assert other.shards.folder != mine.shards.folder
    shutil.copy(files_of(other)[2], files_of(mine)[2])
    with pytest.warns(UserWarning, match="it belongs to another cache"):
        assert same(features(fill(tmp_path)), reference)


def test_files_that_changed_places_are_computed_again(tmp_path, reference):
    first, second, *_ = files_of(fill(tmp_path))
    content = first.read_bytes()
    second.replace(first)
    second.write_bytes(content)
    with pytest.warns(UserWarning, match="it belongs to another cache"):
        assert same(features(fill(tmp_path)), reference)


def test_a_damaged_manifest_is_written_anew(tmp_path, reference):
    manifest = fill(tmp_path).shards.folder / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content[:50])
    with pytest.raises(DamagedError, match="manifest.json is damaged"):
        fill(tmp_path, read_only=True)
    data = Counted()
    with pytest.warns(UserWarning, match="manifest.json is damaged .*written again"):
        cached = fill(tmp_path, data)
    assert (data.computed, manifest.read_text()) == ([], content)
    assert same(features(cached), reference)


def test_a_manifest_of_something_else_is_an_error(tmp_path):
    manifest = fill(tmp_path).shards.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "fingerprint": "0" * 32}))
    with pytest.raises(ValueError, match=r"describes other features: fingerprint differ. Delete the folder"):
        fill(tmp_path)


def test_the_size_of_files_is_that_of_the_first_run(tmp_path, reference, monkeypatch):
    fill(tmp_path)
    monkeypatch.setattr(storage, "_SHARD_ROWS", 100)
    data = Counted()
    assert same(features(fill(tmp_path, data)), reference)
    assert data.computed == []


def test_a_missing_file_is_computed_and_nothing_else(tmp_path, reference):
    files_of(fill(tmp_path))[4].unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 6 files of features, and read_only is set"):
        fill(tmp_path, read_only=True)
    data = Counted()
    assert same(features(fill(tmp_path, data)), reference)
    assert data.computed == [8, 9]


def test_reading_only(tmp_path, reference):
    with pytest.raises(FileNotFoundError, match="There are no such features, and read_only is set"):
        fill(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    fill(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert same(features(fill(tmp_path, read_only=True)), reference)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_complete_cache_in_a_folder_that_cannot_be_written(tmp_path, reference, monkeypatch):
    fill(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "open", refuse)
    assert same(features(fill(tmp_path)), reference)
    files_of(fill(tmp_path))[0].unlink()
    with pytest.raises(OSError, match="Cannot write features: Read-only file system"):
        fill(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    # a system folder that even root cannot write
    with pytest.raises(OSError, match="Cannot write features: .*'/proc/features/train-") as caught:
        fill(Path("/proc/features"))
    assert caught.value.errno
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="Cannot write features: Not a directory"):
        fill(file)


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 40_000))
    text = r"The disk is too small: 11 rows of 4.4 KB need 47.9 KB, and 40.0 KB are free"
    with pytest.raises(OSError, match=text) as caught:
        fill(tmp_path / "features")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "features").exists()


def test_a_disk_that_fills_while_writing(tmp_path, reference, monkeypatch):
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 1 + 3:  # the manifest, too
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"The disk is full: .* after 3 of 6 files .*the next run continues there"
    ) as caught:
        fill(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    data = Counted()
    assert same(features(fill(tmp_path, data)), reference)
    assert data.computed == [6, 7, 8, 9, 10]


def test_a_write_that_the_system_breaks_off(tmp_path, reference):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))  # the manifest fits, a file of features does not
    try:
        with pytest.raises(OSError, match="Cannot write: File too large after 0 of 6 files"):
            fill(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert same(features(fill(tmp_path)), reference)


def in_process(target, *args):
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    return process


def test_a_process_that_is_killed_while_filling(tmp_path, reference):
    process = in_process(fill, tmp_path, Counted(pause=0.02))
    while len(list(tmp_path.rglob("*.safetensors"))) < 2:
        assert process.is_alive()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder,) = tmp_path.glob("train-*")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert 2 <= len(kept) < SHARDS
    left = folder / f".features-{SHARDS - 1:05d}-of-{SHARDS:05d}.safetensors.0.tmp"
    left.write_bytes(b"half a file")  # as a kill in the middle of a write leaves it
    data = Counted()
    cached = fill(tmp_path, data)
    assert same(features(cached), reference)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(set(data.computed)) == COUNT - 2 * len(kept)
    assert not list(folder.glob(".*.tmp"))


def test_two_processes_fill_one_cache(tmp_path, reference):
    def run(index):
        data = Counted(pause=0.01)
        torch.save({"features": features(fill(tmp_path, data)), "computed": data.computed}, tmp_path / f"{index}.pt")

    processes = [in_process(run, index) for index in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{index}.pt", weights_only=True) for index in range(2)]
    assert all(same(one["features"], reference) for one in found)
    assert sorted(found[0]["computed"] + found[1]["computed"]) == list(range(COUNT))  # divided, nothing twice
    assert all(one["computed"] for one in found)


def test_the_work_of_a_process_that_dies_is_taken_over(tmp_path, reference):
    dying = in_process(fill, tmp_path, Counted(pause=0.02, failing=9))
    while not list(tmp_path.rglob("*.safetensors")):
        time.sleep(0.005)
    cached = fill(tmp_path, Counted(pause=0.02))
    dying.join()
    assert dying.exitcode == 3
    assert same(features(cached), reference)


def test_waiting_for_another_process_is_said_once(tmp_path, reference, monkeypatch, capsys):
    monkeypatch.setattr(filling, "_PATIENCE", 0.1)
    shards = fill(tmp_path).shards
    for shard in (1, 2):
        shards.path(shard).unlink()
    held = PROCESSES.Event()

    def hold():
        with shards.lock(1), shards.lock(2):
            held.set()
            time.sleep(3)

    process = in_process(hold)
    held.wait()
    assert same(features(fill(tmp_path)), reference)
    process.join()
    assert capsys.readouterr().err.count("waiting for another process that writes") == 1


def test_a_lock_that_cannot_be_made(tmp_path):
    shards = fill(tmp_path).shards
    shards.path(1).unlink()
    path = Path(shards.lock(1).lock_file)
    path.unlink(missing_ok=True)
    path.mkdir()
    with pytest.raises(OSError, match=r"Cannot write features: .*00001\.lock"):
        fill(tmp_path)


def test_a_file_that_became_shorter_while_reading(tmp_path):
    cached = fill(tmp_path)
    path = files_of(cached)[0]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match="has become shorter"):
        features(cached)


def test_a_disk_that_writes_other_bytes(tmp_path, monkeypatch):
    write = storage.Shards.write

    def spoiling(self, shard, *args):
        write(self, shard, *args)
        flipped(lambda content: len(content) - 1)(self.path(shard), self.path(shard).read_bytes())

    monkeypatch.setattr(storage.Shards, "write", spoiling)
    with (
        pytest.warns(UserWarning, match="its checksum differs"),
        pytest.raises(OSError, match="differs from what was written") as caught,
    ):
        fill(tmp_path)
    assert caught.value.errno == errno.EIO


def test_a_system_that_fails_is_no_damage(tmp_path, monkeypatch):
    fill(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(storage, "safe_open", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        fill(tmp_path)


def test_a_relative_folder_stays_where_it_is(tmp_path, reference, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = fill("features")
    monkeypatch.chdir("/")
    assert same(features(cached), reference)
    assert cached.shards.folder.parent == tmp_path / "features"


def test_more_files_than_a_process_may_have_open(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    cached = fill(tmp_path)
    assert same(features(cached), reference)
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(link.startswith(str(tmp_path)) for link in links) == 2
    rows = [0, 9, 5, 0, 7]  # there and back
    found = batch_of(cached, *rows)["cached_features"]
    assert same(found, {name: value[rows] for name, value in reference.items()})
