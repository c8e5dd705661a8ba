"""Exported programs: called with rows of any dtype and number, and in files with a digest.

The digest is checked before anything of a program is deserialised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from flax_hmog.data.containers import dense
from flax_hmog.inference.padded import in_few_sizes
from flax_hmog.model.checks import check_type, door, public
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Data, Tree
from flax_hmog.training.describe import CheckpointError

MAGIC = b"flax-hmog program 1"
LIBRARIES = ("flax-hmog", "jax", "jaxlib")
WIDE = tuple(map(np.dtype, (np.float64, np.int64, np.uint64, np.complex128)))  # not in a process of 32 bits


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model for serving: a function of rows (B, ...), of any number and real dtype, that gives a dict of arrays.

    It computes in its own precision, whatever that of the process is.

    Attributes:
        exported: the program of `jax.export`, for any number of rows from 1 on, of one dtype.
        by_row: True if each answer is known to be that of its row alone: then rows are filled up to a power of two, at
            most some thousand at once, so that few sizes are compiled. Otherwise each number of rows is.
        function: the same function of rows like `rows`, for converters to other formats; None if it comes from a file.
        image_shape: (height, width) or (height, width, channels) where rows are images: then a call takes them in this
            shape, with an axis of one channel, and flat, (B, D); None where they are not known to be any.

    Example:
        >>> from flax_hmog.toy import natural
        >>> from flax_hmog.training import export
        >>> program = export(natural, platforms=["cpu"])
        >>> program(np.ones((0, 4), np.uint8))["responsibilities"].shape
        (0, 3)
    """

    exported: jax_export.Exported
    by_row: bool = False
    function: Callable[[Any], Tree] | None = None
    image_shape: tuple[int, ...] | None = None

    @property
    def rows(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of its rows, their number a symbol."""
        (rows,) = self.exported.in_avals
        return jax.ShapeDtypeStruct(rows.shape, rows.dtype)

    @public
    def __call__(self, rows: Data) -> Any:
        """The output for rows (B, ...).

        Raises:
            TypeError: for what holds no real numbers, or no whole ones where the program takes these.
            ValueError: for another shape, or whole numbers that the program's dtype does not hold.
        """
        wanted, given = self.rows, dense("rows", rows)
        shapes = shapes_of_rows(wanted.shape[1:], self.image_shape)
        if not given.ndim or given.shape[1:] not in shapes:
            shape = " or ".join("(" + ", ".join(("B", *map(str, shape))) + ")" for shape in shapes)
            raise ValueError(
                f"{door()}: `rows` must have shape {shape}; got {given.shape}. Give rows like those of training."
            )
        with self._precision():
            x = _converted(given, wanted.dtype).reshape(given.shape[0], *wanted.shape[1:])
            if not len(x):
                output = self._compiled(np.zeros((1, *x.shape[1:]), x.dtype))
                return jax.tree.map(lambda leaf: leaf[:0] if leaf.ndim else leaf, output)
            is_split = isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and len(x.sharding.device_set) > 1)
            if is_split or not self.by_row:
                return self._compiled(x)
            return jax.tree.map(jnp.asarray, in_few_sizes(self._compiled, np.asarray(x)))

    def check(self) -> None:
        """Raise what this version of jax, or this machine, has against the program."""
        with self._precision():
            self._compiled.lower(jax.ShapeDtypeStruct((1, *self.rows.shape[1:]), self.rows.dtype))

    def _precision(self) -> Any:
        """A scope of 64 bits, where it takes or gives some."""
        avals = *self.exported.in_avals, *self.exported.out_avals
        return jax.enable_x64(True) if any(aval.dtype in WIDE for aval in avals) else contextlib.nullcontext()

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.exported.call)


@public
def write_program(program: Program, path: str | Path) -> None:
    """Write a program of `export` into a file; what was there is replaced once the file is whole.

    The file is three lines, then the program: "flax-hmog program 1"; SHA-256 of all that follows this line; versions
    and platforms as JSON; `program.serialize()`.

    Args:
        program: of `export`.
        path: the file.

    Raises:
        ImportError: without the package flatbuffers.
        TypeError: for something else than a program.
        CheckpointError: for a file that cannot be written.

    Example:
        >>> import tempfile
        >>> from flax_hmog.training import export
        >>> program = export(lambda x: 2 * x, inputs=jnp.ones((1, 2)), platforms=["cpu"])
        >>> write_program(program, Path(tempfile.mkdtemp()) / "program")
    """
    check_type("program", program, Program, "Give what export(model) returns.")
    require("flatbuffers", "export")
    exported = program.exported
    about = {
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "platforms": list(exported.platforms),
        "calling_convention": exported.calling_convention_version,
        "by_row": program.by_row,
        "image_shape": program.image_shape,
    }
    body = json.dumps(about).encode() + b"\n" + bytes(exported.serialize())
    write_whole(path, MAGIC + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file; what was there is replaced once the new one is whole.

    Raises:
        CheckpointError: for a file that cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise CheckpointError(
            f"{door()}: `path` must be a file that can be written; got {path}, {type(error).__name__}: {error}. "
            "Make room, or choose another one."
        ) from None


@public
def load_program(path: str | Path) -> Program:
    """The program in a file of `write_program`; nothing of it is deserialised unless it is as it was written.

    Args:
        path: the file.

    Returns:
        `Program`.

    Raises:
        ImportError: without the package flatbuffers.
        CheckpointError: for a file that is missing, damaged, of something else, or of another jax or for another
            platform, so that it does not run here.

    Example:
        >>> import tempfile
        >>> from flax_hmog.training import export
        >>> path = Path(tempfile.mkdtemp()) / "program"
        >>> write_program(export(lambda x: 2 * x, inputs=jnp.ones((1, 2)), platforms=["cpu"]), path)
        >>> load_program(path)([[1, 2]]).tolist()
        [[2.0, 4.0]]
    """
    require("flatbuffers", "export")
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
    first, _, program = body.partition(b"\n")
    about = json.loads(first)
    try:
        loaded = Program(
            jax_export.deserialize(bytearray(program)),
            about.get("by_row", False),
            image_shape=tuple(about.get("image_shape") or ()) or None,
        )
        loaded.check()
    except Exception as error:  # it is as it was written, by another jax
        raise CheckpointError(
            f"load_program: `path` must be a program that jax {jax.__version__} runs here; got {path}, "
            f"{type(error).__name__}: {str(error)[:200].rstrip('.')}. It was written with {about}: export "
            "the model again with this jax."
        ) from error
    return loaded


def shapes_of_rows(shape: tuple[int, ...], image_shape: tuple[int, ...] | None) -> tuple[tuple[int, ...], ...]:
    """Shapes of a row: this one, and of an image all that `Preprocessing` takes."""
    images = () if image_shape is None else (image_shape, (*image_shape, 1), (math.prod(image_shape),))
    return tuple(dict.fromkeys((shape, *images)))


def _converted(given: Any, dtype: np.dtype[Any]) -> Any:
    """Rows in the dtype of a program: floats of anything real, whole numbers of those that are the same in it."""
    is_whole = jnp.issubdtype(given.dtype, np.integer) or given.dtype == bool
    if not (is_whole or jnp.issubdtype(given.dtype, np.floating)):
        raise TypeError(f"{door()}: `rows` must hold real numbers; got dtype {given.dtype}. Convert them first.")
    if not jnp.issubdtype(dtype, np.floating) and not is_whole:
        raise TypeError(f"{door()}: `rows` must hold whole numbers, {dtype}; got {given.dtype}. Round them first.")
    with np.errstate(over="ignore", invalid="ignore"):
        x = given.astype(dtype)
    if is_whole and isinstance(given, np.ndarray) and not jnp.issubdtype(dtype, np.floating) and (x != given).any():
        raise ValueError(
            f"{door()}: `rows` must hold numbers within {dtype}; got {given.min()} to {given.max()}. Export the model "
            "with `inputs` of a dtype that holds them."
        )
    return x
