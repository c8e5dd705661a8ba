"""A trained model as one portable program, from raw data to clusters, for serving without this library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export as jax_export

from flax_hmog.inference.posterior import HMoGOutput, infer_rows
from flax_hmog.model.checks import check_type, public
from flax_hmog.model.kinds import Array
from flax_hmog.training.restoring import Restored

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


def _named(output: Any) -> Any:
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
