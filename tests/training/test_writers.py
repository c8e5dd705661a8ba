"""Saves that fail say so and leave the save before; a folder has one writer, and what a killed one leaves is taken over."""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import pytest
from small_checkpoints import HEAD, X, contents, save

from flax_hmog.training import CheckpointError, CheckpointWriter, lock, restore
from flax_hmog.training.files import saved_steps, short
from flax_hmog.training.lock import LOCK, FolderLock

VARIABLES = HEAD.init(jax.random.key(0), X)


def test_what_is_saved_is_on_the_disk(tmp_path):
    """Whether or not the writer is ever closed."""
    writer = CheckpointWriter(tmp_path, head=HEAD)
    writer.save(1, VARIABLES)
    assert restore(tmp_path).step == 1
    del writer
    assert saved_steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*.unfinished*"))


# of a size that no file may have: as on a full disk, writing fails midway
LIMITED = """
import resource, sys, jax, numpy as np
from small_checkpoints import HEAD, X
from flax_hmog.training import CheckpointError, CheckpointWriter
variables = HEAD.init(jax.random.key(0), X)
writer = CheckpointWriter(sys.argv[1], head=HEAD)  # and never closed
writer.save(1, variables)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
large = {"large": np.random.default_rng(0).standard_normal(100_000)}
try:
    writer.save(2, variables, state=large)
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
writer.save(3, variables, state=large)
"""


def test_a_save_that_fails_midway_is_named_and_the_process_goes_on(tmp_path):
    """Nor is anything lost by a process that ends without closing its writer."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    start = f"CheckpointWriter.save: checkpoint {tmp_path}/2 must be written; got "
    assert done.stdout.startswith(start), done.stdout
    assert "File too large" in done.stdout
    assert "The last whole step is 1." in done.stdout
    assert done.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3"}  # and no lock
    assert restore(tmp_path).state["large"].shape == (100_000,)


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    with CheckpointWriter(tmp_path, head=HEAD) as writer:
        writer.save(1, VARIABLES)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(
            CheckpointError, match=rf"{tmp_path}/2 must be written; got OSError: no space left: .*100 bytes"
        ):
            writer.save(2, VARIABLES)
        monkeypatch.undo()
        writer.save(2, VARIABLES)
    assert saved_steps(tmp_path) == [1, 2]


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "3").write_text("mine")
    with CheckpointWriter(tmp_path, head=HEAD) as writer:
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/3 must be written; got FileExistsError: .*in the way"):
            writer.save(3, VARIABLES)
        writer.save(4, VARIABLES)
    assert (tmp_path / "3").read_text() == "mine"
    with pytest.raises(
        CheckpointError, match=r"`path` must be a folder that can be written to; got .*/3/below, NotADir"
    ):
        CheckpointWriter(tmp_path / "3" / "below", head=HEAD)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_without_permission_are_named(tmp_path):
    save(tmp_path)
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="`path` must be a folder that can be written to; got PermissionError"):
        CheckpointWriter(tmp_path, head=HEAD)
    assert restore(tmp_path).step == 2  # reading needs no lock
    tmp_path.chmod(0o700)


def test_a_step_that_cannot_be_renamed_has_no_name(tmp_path, monkeypatch):
    """An error between the last file and the name: nothing that could be taken for a step is left."""
    with CheckpointWriter(tmp_path, head=HEAD) as writer:
        writer.save(1, VARIABLES)
        want = contents(restore(tmp_path))

        def broken(number):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/2 must be written; got OSError: .*Input/output error"):
            writer.save(2, VARIABLES)
        monkeypatch.undo()
    assert contents(restore(tmp_path)) == want
    assert {path.name for path in tmp_path.iterdir()} == {"1"}


def test_a_folder_has_one_writer(tmp_path):
    writer = CheckpointWriter(tmp_path, head=HEAD)
    with pytest.raises(
        CheckpointError, match=f"`path` must have one writer; got {tmp_path}, which another writer of this"
    ):
        CheckpointWriter(tmp_path, head=HEAD)
    writer.save(1, VARIABLES)
    writer.close()
    with pytest.raises(CheckpointError, match=r"must keep its lock; got .* which this writer has closed"):
        writer.save(2, VARIABLES)
    with CheckpointWriter(tmp_path, head=HEAD) as second:
        second.save(2, VARIABLES)
    third = CheckpointWriter(tmp_path, head=HEAD)
    del third
    gc.collect()
    with CheckpointWriter(tmp_path, head=HEAD):
        pass
    assert saved_steps(tmp_path) == [1, 2]


def test_a_writer_whose_lock_was_taken_writes_no_more(tmp_path):
    with CheckpointWriter(tmp_path, head=HEAD) as writer:
        writer.save(1, VARIABLES)
        path = tmp_path / LOCK
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 1, "host": "elsewhere", "token": "0"}))
        with pytest.raises(CheckpointError, match=r"must keep its lock; .*which process 1 on elsewhere has taken"):
            writer.save(2, VARIABLES)
    assert path.exists()  # the other's
    assert saved_steps(tmp_path) == [1]


def locked(folder, **changes):
    """The lock of a writer that is like this process, but for some changes."""
    with FolderLock(folder, argument="test: `folder`") as held:
        content = json.dumps(json.loads(held.content) | changes)
    (folder / LOCK).write_text(content)
    return folder / LOCK


def taken(folder):
    """Whether the lock can be had."""
    try:
        FolderLock(folder, argument="test: `folder`").release()
    except CheckpointError:
        return False
    return True


@pytest.fixture
def impatient(monkeypatch):
    for name, seconds in (("BEAT", 0.1), ("SILENCE", 2.0), ("DYING", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


def test_what_a_killed_process_leaves_is_taken_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for changes in (
        {"pid": ended.pid},
        {"started": "1"},
    ):  # a number that is free, or has been given to another process
        locked(tmp_path, **changes)
        started = time.monotonic()
        assert taken(tmp_path)
        assert time.monotonic() - started < 10


def test_a_process_that_runs_keeps_its_lock(tmp_path, impatient):
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    locked(tmp_path, pid=running.pid, started=lock._started(str(running.pid)))
    with pytest.raises(
        CheckpointError, match=rf"which process {running.pid} on .* writes\. Wait .*, delete {tmp_path}/"
    ):
        FolderLock(tmp_path, argument="test: `folder`")
    running.communicate(b"\n")
    assert taken(tmp_path)


def test_a_holder_elsewhere_is_watched(tmp_path, impatient, caplog):
    path = locked(tmp_path, machine="elsewhere", host="elsewhere", pid=1)
    stop = threading.Event()

    def beat():
        for number in range(1, 100):
            if stop.wait(0.1):
                return
            os.utime(path, (time.time() + number, time.time() + number))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(CheckpointError, match="which process 1 on elsewhere writes"):
        FolderLock(tmp_path, argument="test: `folder`")
    stop.set()
    thread.join()
    assert "is locked by process 1 on elsewhere: it is watched" in caplog.text
    os.utime(path)
    started = time.monotonic()
    assert taken(tmp_path)
    assert time.monotonic() - started > 0.5
    locked(tmp_path, machine="elsewhere")
    os.utime(path, (time.time() - 100, time.time() - 100))
    started = time.monotonic()
    assert taken(tmp_path)  # silent for long
    assert time.monotonic() - started < 1.5


def test_a_holder_gives_signs_of_life(tmp_path, impatient):
    with FolderLock(tmp_path, argument="test: `folder`") as held:
        os.utime(held.path, (0, 0))
        until = time.monotonic() + 10
        while held.path.stat().st_mtime < time.time() - 100 and time.monotonic() < until:
            time.sleep(0.05)
        assert held.path.stat().st_mtime > time.time() - 10


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_lock_whose_writing_was_cut_off_is_taken_over(content, tmp_path, impatient):
    (tmp_path / LOCK).write_text(content)
    assert taken(tmp_path)


def test_of_many_at_once_one_gets_a_stale_lock(tmp_path):
    locked(tmp_path, started="1")
    got, barrier = [], threading.Barrier(8)

    def take():
        barrier.wait()
        with contextlib.suppress(CheckpointError):
            got.append(FolderLock(tmp_path, argument="test: `folder`"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].check()


@pytest.mark.parametrize("place", [0, 500, 1000])
def test_the_cause_of_an_error_is_said_wherever_a_long_text_has_it(place):
    text = "x" * place + "[os_error_code='28']" + "y" * (1000 - place)
    said = short(ValueError(text))
    assert said.startswith(f"ValueError: {os.strerror(28)}: ")
    assert len(said) < 500
    assert short(ValueError("brief.")) == "ValueError: brief"
