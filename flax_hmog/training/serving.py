"""A trained model as one portable program, from raw data to clusters, and in a file with a digest.

The digest is checked before anything of the program is deserialised.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from flax_hmog.inference.posterior import HMoGOutput, infer_rows
from flax_hmog.model.checks import check_type, public
from flax_hmog.model.kinds import Array
from flax_hmog.training.describe import CheckpointError
from flax_hmog.training.restoring import Restored

MAGIC = b"flax-hmog program 1"
LIBRARIES = ("flax-hmog", "jax", "jaxlib")
PLATFORMS = ("cpu", "cuda", "tpu")


@public
def export(model: Restored, *, obs_dim: int | None = None, platforms: Sequence[str] = PLATFORMS) -> jax_export.Exported:
    """The program from raw data to clusters, for any batch size and several platforms at once.

    Where components are merged, as the checkpoint says, K is the number of clusters.

    Preprocessing, encoder and the model's factorisation are part of it; nothing is factorised when it runs, but in
    modules and heads of one's own. A call needs memory for its whole batch.

    Args:
        model: of `restore`.
        obs_dim: columns of the raw data; needed only for an encoder without preprocessing.
        platforms: those that it can run on: "cpu", "cuda", "rocm", "tpu".

    Returns:
        `jax.export.Exported`: `call(raw)` with raw (B, D) float32 gives a dict of `log_density` (B,) in nats,
        `responsibilities` (B, K), `assignment` (B,) int32 and `latent_mean` (B, L). A module of one's own takes raw
        data like its `inputs`, and gives what its call returns, heads' outputs as such dicts. Save it with
        `write_program` (this needs the package flatbuffers), and load it with `load_program`, on the same or a newer
        jax.

    Raises:
        TypeError: for something else than a restored checkpoint.
        ValueError: for a module that was not imported, or an unknown number of columns.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import head, variables, x
        >>> from flax_hmog.training import CheckpointWriter, restore
        >>> folder = tempfile.mkdtemp()
        >>> with CheckpointWriter(folder, head=head) as writer:
        ...     writer.save(1, variables)
        >>> program = export(restore(folder), platforms=["cpu"])
        >>> sorted(program.call(x))
        ['assignment', 'latent_mean', 'log_density', 'responsibilities']
    """
    check_type("model", model, Restored, "Give flax_hmog.training.restore(path).")
    if isinstance(platforms, str):
        raise ValueError(f"export: `platforms` must be a sequence of names; got {platforms!r}. Write ({platforms!r},).")
    prepared: Any = model.prepared if model.infers else None
    raw = _raw(model, obs_dim)

    @jax.jit
    def assign(raw: Array) -> Any:
        """Output of the program."""
        output = model.merged(infer_rows(prepared, model.features(raw))) if model.infers else model(raw)
        return jax.tree.map(_named, output, is_leaf=lambda part: isinstance(part, HMoGOutput))

    (batch,) = jax_export.symbolic_shape("batch")
    rows = jax.ShapeDtypeStruct((batch, *raw.shape[1:]), raw.dtype)
    return jax_export.export(assign, platforms=tuple(platforms))(rows)


def _named(output: object) -> Any:
    """A head's output as a dict of arrays; anything else as it is."""
    if not isinstance(output, HMoGOutput):
        return output
    return {
        "log_density": output.log_density,
        "responsibilities": jnp.exp(output.log_responsibilities),
        "assignment": jnp.argmax(output.log_responsibilities, axis=-1).astype(jnp.int32),
        "latent_mean": output.latent_mean,
    }


def _raw(model: Restored, obs_dim: int | None) -> jax.ShapeDtypeStruct:
    """Shape (1, ...) and dtype of raw data.

    Raises:
        ValueError: for an unknown number of columns, or another one than the model's.
    """
    known = model.inputs
    if model.preprocessing is not None:
        known = jax.ShapeDtypeStruct((1, model.preprocessing.obs_dim), jnp.float32)
    elif not model.place:
        known = jax.ShapeDtypeStruct((1, model.natural.interaction.shape[0]), jnp.float32)
    if known is None and obs_dim is None:
        raise ValueError(
            "export: `obs_dim` must be given for an encoder without preprocessing; got None. Give the number of "
            "columns of the raw data."
        )
    if known is not None and obs_dim not in (None, known.shape[-1]):
        raise ValueError(
            f"export: `obs_dim` must be that of the model, {known.shape[-1]}; got {obs_dim}. Leave it out."
        )
    return jax.ShapeDtypeStruct((1, obs_dim), jnp.float32) if known is None else known


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
