"""One writer of a folder: a lock file that names the writer and shows others whether it still runs.

The file is made with O_EXCL, so that it works where file systems know no locks. On the same machine its holder is
looked up by process id and start time; of a holder elsewhere the time of the file is watched, which the holder renews.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import threading
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

from flax_hmog.training.describe import CheckpointError

logger = logging.getLogger(__name__)
LOCK = "writer.lock"
DYING = 1.0  # seconds that a process which has just been killed is given to end
SETTLE = 0.3  # seconds after which others that replace the same lock have done so
BEAT = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one, after which a holder that cannot be looked up counts as gone


class FolderLock:
    """The right to write into a folder, until `release`, the end of the process, or the end of this object.

    What a killed process leaves is taken over: at once on the same machine, after `SILENCE` seconds elsewhere.

    Args:
        folder: must exist.
        argument: where a user gave the folder, as errors name it: "function: `argument`".

    Raises:
        CheckpointError: if another writer has the folder, or the lock file cannot be written.
    """

    def __init__(self, folder: str | Path, *, argument: str) -> None:
        self.path, self.argument = Path(folder).absolute() / LOCK, argument
        holder = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _started("self")}
        self.content = json.dumps(holder | {"token": uuid.uuid4().hex})
        try:
            while not (self._is_made() or self._is_taken_over()):
                pass
        except OSError as error:
            raise CheckpointError(
                f"{argument} must be a folder that can be written to; got {type(error).__name__}: {error}. "
                "Free or choose another one."
            ) from None
        stopped = threading.Event()
        threading.Thread(target=_beat, args=(self.path, self.content, stopped), daemon=True).start()
        self._finalizer = weakref.finalize(self, _release, self.path, self.content, stopped, os.getpid())

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let others write; once is enough."""
        self._finalizer()

    def check(self) -> None:
        """CheckpointError unless the folder is still this writer's.

        Raises:
            CheckpointError: if the lock file is gone or another writer's, as after a pause of more than `SILENCE`.
        """
        if (found := _read(self.path)) != self.content:
            by = "this writer has closed or somebody deleted" if found is None else f"{_who(found)} has taken"
            raise CheckpointError(
                f"{self.argument} must keep its lock; got {self.path}, which {by}. "
                "End one of the two writers, and resume the other."
            )

    def _is_made(self) -> bool:
        """True if there was no lock file, which is then made."""
        try:
            number = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(number, "w") as file:
            file.write(self.content)
        return True

    def _is_taken_over(self) -> bool:
        """True if the lock of a holder that is gone is replaced; of several that replace it the last one has it.

        Raises:
            CheckpointError: if the holder is not gone.
        """
        content = _read(self.path)
        if content is None:
            return False
        is_gone = _is_gone(self.path, content)
        if _read(self.path) != content:
            return False
        if not is_gone:
            raise CheckpointError(
                f"{self.argument} must have one writer; got {self.path.parent}, which {_who(content)} "
                f"writes. Wait until it ends, or choose another folder; if it is gone, delete {self.path}."
            )
        new = self.path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
        new.write_text(self.content)
        new.replace(self.path)
        time.sleep(SETTLE)
        return _read(self.path) == self.content


def _is_gone(path: Path, content: str) -> bool:
    """True if the holder of a lock no longer runs."""
    holder = _parsed(content)
    if holder.get("machine") == _machine():
        until = time.monotonic() + DYING
        while (runs := _started(str(holder.get("pid"))) == holder.get("started")) and time.monotonic() < until:
            time.sleep(DYING / 20)
        return not runs
    first = _time(path)
    left = SILENCE - max(_now(path) - first, 0)
    if left > 0 and holder:
        logger.warning("%s is locked by %s: it is watched for up to %d s", path.parent, _who(content), left)
    until = time.monotonic() + left
    # network file systems answer from a cache for a while, but look again at a file that is opened, which reading does
    while (is_silent := _read(path) == content and _time(path) == first) and time.monotonic() < until:
        time.sleep(min(0.2, left))
    return is_silent


def _beat(path: Path, content: str, stopped: threading.Event) -> None:
    """Renew the time of the lock until it is another's or released."""
    while not stopped.wait(BEAT):
        with contextlib.suppress(OSError):
            if _read(path) == content:
                os.utime(path)


def _release(path: Path, content: str, stopped: threading.Event, pid: int) -> None:
    stopped.set()
    if os.getpid() == pid and _read(path) == content:  # a fork has inherited the object, and not the right
        path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    """The content of a lock; None if there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _parsed(content: str) -> dict[str, Any]:
    """The holder that a lock names; {} if its writer was killed before it had written it."""
    try:
        found = json.loads(content)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(content: str) -> str:
    holder = _parsed(content)
    if holder.get("pid") == os.getpid() and holder.get("machine") == _machine():
        return "another writer of this process"
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _time(path: Path) -> float:
    """Time at which a lock was last renewed, in seconds of the file system's clock; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _now(path: Path) -> float:
    """The clock of the file system, which another machine may have set."""
    probe = path.with_name(f"{LOCK}.{uuid.uuid4().hex}")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now


def _machine() -> str:
    """Host, boot and namespace of processes, within which process ids are unique."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _started(pid: str) -> str | None:
    """Start time of a process, in the unit of the system; None if it does not run."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            return None
        return None if state in "ZX" else fields[18]
    pid = str(os.getpid()) if pid == "self" else pid
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", pid], capture_output=True, text=True, check=False)
    return listed.stdout.strip() or None
