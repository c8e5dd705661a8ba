"""Exported programs as files with a digest, which is checked before anything of them is deserialised."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from importlib import metadata
from pathlib import Path

from jax import export as jax_export

from flax_hmog.model.checks import check_type, public
from flax_hmog.training.describe import CheckpointError

MAGIC = b"flax-hmog program 1"
LIBRARIES = ("flax-hmog", "jax", "jaxlib")


@public
def write_program(program: jax_export.Exported, path: str | Path) -> None:
    """Write a program of `export` into a file; what was there is replaced once the file is whole.

    The file is three lines, then the program: "flax-hmog program 1"; SHA-256 of all that follows this line; versions
    and platforms as JSON; `program.serialize()`.

    Args:
        program: of `export`, or any `jax.export.Exported`.
        path: the file.

    Raises:
        TypeError: for something else than a program.
        CheckpointError: for a file that cannot be written.

    Example:
        >>> import jax, tempfile
        >>> program = jax.export.export(jax.jit(lambda x: 2 * x))(jax.ShapeDtypeStruct((2,), "float32"))
        >>> write_program(program, Path(tempfile.mkdtemp()) / "program")
    """
    check_type("program", program, jax_export.Exported, "Give what export(model) returns.")
    path = Path(path)
    about = {
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "platforms": list(program.platforms),
        "calling_convention": program.calling_convention_version,
    }
    body = json.dumps(about).encode() + b"\n" + bytes(program.serialize())
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            file.write(MAGIC + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise CheckpointError(
            f"write_program: `path` must be a file that can be written; got {path}, {type(error).__name__}: {error}. "
            "Make room, or choose another one."
        ) from None


def load_program(path: str | Path) -> jax_export.Exported:
    """The program in a file of `write_program`; nothing of it is deserialised unless it is as it was written.

    Args:
        path: the file.

    Returns:
        `jax.export.Exported`, for `call(raw)`.

    Raises:
        CheckpointError: for a file that is missing, damaged, of something else, or of a jax that this one cannot read.

    Example:
        >>> import jax, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "program"
        >>> write_program(jax.export.export(jax.jit(lambda x: 2 * x))(jax.ShapeDtypeStruct((2,), "float32")), path)
        >>> load_program(path).call(jax.numpy.ones(2)).tolist()
        [2.0, 2.0]
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"load_program: `path` must be a file of write_program; got {path}, {type(error).__name__}: {error}. "
            "Check the path."
        ) from None
    magic, _, rest = content.partition(b"\n")
    digest, _, body = rest.partition(b"\n")
    if magic != MAGIC:
        raise CheckpointError(
            f"load_program: `path` must be a file of write_program, which begins with {MAGIC.decode()!r}; got {path} "
            f"with {magic[:40]!r}. Write it with write_program."
        )
    if digest != hashlib.sha256(body).hexdigest().encode():
        raise CheckpointError(
            f"load_program: `path` must be as it was written; got {path} with another SHA-256. It is damaged: export "
            "the model again."
        )
    about, _, program = body.partition(b"\n")
    try:
        return jax_export.deserialize(bytearray(program))
    except Exception as error:  # it is as it was written, by another jax
        raise CheckpointError(
            f"load_program: `path` must be of a jax that this one can read; got {path}, {type(error).__name__}: "
            f"{str(error)[:200]}. It was written with {json.loads(about)['versions']}: export the model again."
        ) from error
