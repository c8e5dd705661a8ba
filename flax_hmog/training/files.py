"""A step of a checkpoint as files: written whole or not at all, listed with digests, read as they were written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orbax.checkpoint as ocp

from flax_hmog.training.describe import FORMAT, CheckpointError, describe_array


class DamageError(CheckpointError):
    """The difference between a step and what was saved, as part of a message, without the name of the step."""


SUMS = "SHA256SUMS"  # digests of all other files of a step, as `sha256sum -c` reads them
# orbax would let processes wait for each other, those of a save that fails on one of them for minutes
ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")
DESCRIPTION = "description/metadata"
OF_ORBAX = ("_CHECKPOINT_METADATA", "orbax.checkpoint")  # files that mark a checkpoint of today's API, or of v1's
UNDIGESTED = 4  # the format before the files were listed
UNFINISHED, DELETED = ".unfinished", ".deleted"
LEFTOVERS = (
    f"*{UNFINISHED}*",
    f"*{DELETED}",
    "*.orbax-checkpoint-tmp*",
)  # of interrupted saves and deletions


def saved_steps(folder: str | Path) -> list[int]:
    """Steps in a folder, ascending; interrupted saves do not count.

    A step gets its number as a name once it is whole. So a damaged one counts, and no older one stands in for it.
    """
    folder = Path(folder)
    names = [entry.name for entry in (folder.iterdir() if folder.is_dir() else ()) if entry.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal() and name == str(int(name)))


def write_step(folder: Path, step: int, arrays: dict[str, Any], description: dict[str, Any]) -> None:
    """Write a step, on one process, and give it its name once it is whole and on the disk.

    Args:
        folder: folder of the steps.
        step: its number.
        arrays: on the host, by name.
        description: JSON values.

    Raises:
        Exception: whatever writing raises; the step then has no name, and what there is of it is removed.
    """
    final, unfinished = folder / str(step), folder / f"{step}{UNFINISHED}"
    _make_way(final, sum(array.nbytes for array in arrays.values()))
    stored = {name: array for name, array in arrays.items() if array.size}  # orbax refuses arrays without entries
    try:
        with quiet(), ocp.Checkpointer(_handler(), multiprocessing_options=ALONE) as checkpointer:
            checkpointer.save(
                unfinished,
                ocp.args.Composite(arrays=ocp.args.StandardSave(stored), description=ocp.args.JsonSave(description)),
            )
        _finish(unfinished, final)
    except BaseException:
        for path in folder.glob(f"{step}{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        raise


def _handler() -> ocp.CompositeCheckpointHandler:
    """Writes arrays and description without asking other processes."""
    return ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=ALONE),
        arrays=ocp.StandardCheckpointHandler(multiprocessing_options=ALONE),
        description=ocp.JsonCheckpointHandler(multiprocessing_options=ALONE),
    )


def _make_way(final: Path, size: int) -> None:
    """Remove what an interrupted save has left.

    Raises:
        OSError: if there is no room for so many bytes, or something in the way.
    """
    for path in final.parent.glob(f"{final.name}{UNFINISHED}*"):
        shutil.rmtree(path)
    if final.exists():
        raise FileExistsError(f"{final} is in the way")
    free = shutil.disk_usage(final.parent).free
    if free < size:
        raise OSError(f"no space left: {size:,} bytes of arrays, {free:,} bytes free")


def _finish(unfinished: Path, final: Path) -> None:
    """List the files with their digests, wait until they are on the disk, and give the step its name."""
    digests = {name: _digest(unfinished / name, sync=True) for name in _names(unfinished)}
    with (unfinished / SUMS).open("w") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in digests.items())
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(final)
    with contextlib.suppress(OSError):  # some file systems cannot do this to folders
        number = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def delete_step(folder: Path, step: int) -> None:
    """Delete a step: its name first, so that no part of a step is ever taken for one."""
    aside = folder / f"{step}{DELETED}"
    shutil.rmtree(aside, ignore_errors=True)
    (folder / str(step)).rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def delete_leftovers(folder: Path) -> None:
    """Delete what interrupted saves and deletions have left."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def read_description(folder: Path) -> dict[str, Any]:
    """The description in the folder of a step, as it was saved.

    Raises:
        DamageError: for another content, or a format that this version does not read.
        OSError, ValueError: for a file that is missing or no JSON.
    """
    listed = (folder / SUMS).exists()
    is_ours = listed or (folder / DESCRIPTION).exists()
    if not is_ours and any((folder / name).exists() for name in OF_ORBAX):
        raise DamageError(
            "a checkpoint of orbax without a description of its module. Read its arrays with orbax, and save them with "
            'CheckpointWriter (docs/checkpoints.md, "From and to orbax")'
        )
    if listed and _digest(folder / DESCRIPTION) != _sums(folder).get(DESCRIPTION):
        raise DamageError(f"another content of {DESCRIPTION} than {SUMS} says")
    description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    found: Any = description.get("format") if isinstance(description, dict) else None
    if found not in range(UNDIGESTED, FORMAT + 1):
        raise DamageError(f"format {found}, this version reads {UNDIGESTED} to {FORMAT}")
    if found == UNDIGESTED and listed:
        raise DamageError(f"format {UNDIGESTED} with {SUMS}, which it did not have")
    if found > UNDIGESTED and not listed:
        raise DamageError(f"no {SUMS}")
    if found > UNDIGESTED and str(description["step"]) != folder.name:
        raise DamageError(f"step {description['step']} under another name")
    return description


def read_step(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and description in the folder of a step, as they were saved.

    All files are compared with their digests before anything reads them, and all arrays with theirs afterwards.

    Raises:
        DamageError: for whatever is not as it was saved.
        Exception: whatever reading raises.
    """
    description = read_description(folder)
    if description["format"] == UNDIGESTED:
        warnings.warn(
            f"restore: {folder} has format {UNDIGESTED}, which has digests of arrays only; damage of its description "
            "goes unnoticed. Save it again.",
            UserWarning,
            stacklevel=2,
        )
    else:
        listed, found = _sums(folder), _names(folder)
        for name in sorted(listed.keys() ^ set(found)):
            raise DamageError(f"no file {name}" if name in listed else f"a file {name} that is not in {SUMS}")
        for name in found:
            if _digest(folder / name) != listed[name]:
                raise DamageError(f"another content of {name} than {SUMS} says")
    about = description["arrays"]
    stored = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in about if math.prod(about[name]["shape"])}
    with quiet():
        read = ocp.PyTreeCheckpointHandler().restore(
            folder / "arrays", args=ocp.args.PyTreeRestore(item=dict.fromkeys(stored, 0), restore_args=stored)
        )
    for name in about.keys() - stored:
        read[name] = np.zeros(about[name]["shape"], np.dtype(about[name]["dtype"]))
    arrays = {name: np.asarray(read[name]) for name in about}
    for name, array in arrays.items():
        if (got := describe_array(array)) != about[name]:
            raise DamageError(f"leaf `{name}` as {got}, which was saved as {about[name]}")
    return arrays, description


def _sums(folder: Path) -> dict[str, str]:
    """Digest of each file, as listed."""
    sums = {}
    # no other character ends a line, as it does for str.splitlines
    for line in (folder / SUMS).read_bytes().decode().removesuffix("\n").split("\n"):
        digest, _, name = line.partition("  ")
        sums[name] = digest
    return sums


def _names(folder: Path) -> list[str]:
    """Files of a step but for the list, without those that are hidden, which file managers make."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [name for name in (path.relative_to(folder).as_posix() for path in paths) if name != SUMS]


def _digest(path: Path, *, sync: bool = False) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return digest


def read_chosen(folder: Path, step: int | Literal["best"] | None) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """The number of the step that is asked for, its arrays and its description.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"restore: `path` must hold a checkpoint; got {folder}, which {_where_else(folder)}.")
    chosen = steps[-1] if step is None else _best_step(folder, steps) if step == "best" else step
    if chosen not in steps:
        raise CheckpointError(
            f'restore: `step` must be None, "best" or one of {steps}; got {step!r}. Choose one that is in {folder}.'
        )
    with _named(folder, chosen, steps):
        return chosen, *read_step(folder / str(chosen))


def short(error: Exception) -> str:
    """Type, system's cause and both ends of the text of an error: those of tensorstore are long, the cause anywhere."""
    text = str(error).rstrip(".")
    number = re.search(r"os_error_code='(\d+)'", text)
    cause = f"{os.strerror(int(number[1]))}: " if number else ""
    return f"{type(error).__name__}: {cause}{text if len(text) <= 400 else f'{text[:200]} ... {text[-200:]}'}"


@contextlib.contextmanager
def _named(folder: Path, step: int, steps: list[int]) -> Iterator[None]:
    """Errors that say which checkpoint cannot be read, why, and what can be read instead.

    What libraries raise for damaged files is of many types, and its traceback says nothing more.
    """
    try:
        yield
    except Exception as error:
        cause = str(error) if isinstance(error, DamageError) else short(error)
        path, others = folder / str(step), [other for other in steps if other != step]
        remedy = (
            f"Restore another step: {others}; a run goes on from there once {path} is deleted."
            if others
            else "There is no other step."
        )
        raise CheckpointError(
            f"restore: checkpoint {path} must be readable, and as it was saved; got {cause}. {remedy}"
        ) from None


def _where_else(folder: Path) -> str:
    """Message about a folder without checkpoints."""
    if not folder.is_dir():
        return "is no folder. Check the path"
    if folder.name.isdigit() and saved_steps(folder.parent):
        return f"is one step. Give {folder.parent} and step={folder.name}"
    if any(path for pattern in LEFTOVERS for path in folder.glob(pattern)):
        return "holds nothing but a save that is not finished. Wait for its writer, or save again"
    found = sorted({str(entry.parents[2]) for entry in folder.glob(f"**/{DESCRIPTION}")} - {str(folder)})
    return f"has none itself. Choose one of {', '.join(found)}" if found else "has none. Check the path"


def _best_step(folder: Path, steps: list[int]) -> int:
    """The best step, by the descriptions alone.

    Raises:
        CheckpointError: if one of them cannot be read, as it may be the best, or none has a metric.
    """
    scores = {}
    for step in steps:
        with _named(folder, step, steps):
            description = read_description(folder / str(step))
            if description["best"] is not None and description["best"][0] in description["metrics"]:
                name, mode = description["best"]
                scores[step] = description["metrics"][name] * (1 if mode == "max" else -1)
    if not scores:
        raise CheckpointError(
            f"restore: a best step must have been saved with the metric of its writer; got none in {folder}. "
            "Restore the latest: step=None."
        )
    return max(scores, key=lambda step: (scores[step], step))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what orbax and tensorstore print about an error that is raised with a message of ours."""
    log, hook = logging.getLogger("absl"), sys.unraisablehook
    was_disabled, log.disabled = log.disabled, True

    def without_closed_loops(problem: Any) -> None:
        """Suppress reports of tensorstore's threads to an event loop that orbax has closed."""
        if not (isinstance(problem.exc_value, RuntimeError) and str(problem.exc_value) == "Event loop is closed"):
            hook(problem)

    sys.unraisablehook = without_closed_loops
    try:
        yield
    except BaseException:
        time.sleep(0.2)  # nobody waits for those threads
        raise
    finally:
        log.disabled, sys.unraisablehook = was_disabled, hook
