"""A trained model as one portable program, from raw data to clusters, for serving without this library."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import export as jax_export

from flax_hmog.em.step import compute_factors
from flax_hmog.inference.posterior import infer_rows
from flax_hmog.model.checks import check_type
from flax_hmog.model.kinds import Array
from flax_hmog.training.restoring import Restored

PLATFORMS = ("cpu", "cuda", "tpu")


def export(model: Restored, *, obs_dim: int | None = None, platforms: Sequence[str] = PLATFORMS) -> jax_export.Exported:
    """The program from raw data to clusters, for any batch size and several platforms at once.

    Where components are merged, as the checkpoint says, K is the number of clusters.

    Preprocessing, encoder and the model's factorisation are part of it; nothing is factorised when it runs, and a call
    needs memory for its whole batch.

    Args:
        model: of `restore`.
        obs_dim: columns of the raw data; needed only for an encoder without preprocessing.
        platforms: those that it can run on: "cpu", "cuda", "rocm", "tpu".

    Returns:
        `jax.export.Exported`: `call(raw)` with raw (B, D) float32 gives a dict of `log_density` (B,) in nats,
        `responsibilities` (B, K), `assignment` (B,) int32 and `latent_mean` (B, L). Save it with `write_program` (this
        needs the package flatbuffers), and load it with `load_program`, on the same or a newer jax.

    Raises:
        TypeError: for something else than a restored checkpoint.
        ValueError: for an encoder that was not imported, or an unknown number of columns.
    """
    check_type("export", "model", model, Restored, "Give flax_hmog.training.restore(path).")
    if isinstance(platforms, str):
        raise ValueError(f"export: `platforms` must be a sequence of names; got {platforms!r}. Write ({platforms!r},).")
    natural = model.head.apply(model.variables, method="natural")
    factors = compute_factors(natural)
    known = natural.interaction.shape[0] if model.encoder_variables is None else obs_dim
    known = known if model.preprocessing is None else model.preprocessing.obs_dim
    if known is None:
        raise ValueError(
            "export: `obs_dim` must be given for an encoder without preprocessing; got None. Give the number of "
            "columns of the raw data."
        )
    if obs_dim not in (None, known):
        raise ValueError(f"export: `obs_dim` must be that of the model, {known}; got {obs_dim}. Leave it out.")

    @jax.jit
    def assign(raw: Array) -> dict[str, Array]:
        """What the program returns."""
        output = model.merged(infer_rows(factors, model.features(raw)))
        return {
            "log_density": output.log_density,
            "responsibilities": jnp.exp(output.log_responsibilities),
            "assignment": jnp.argmax(output.log_responsibilities, axis=-1).astype(jnp.int32),
            "latent_mean": output.latent_mean,
        }

    (batch,) = jax_export.symbolic_shape("batch")
    return jax_export.export(assign, platforms=tuple(platforms))(jax.ShapeDtypeStruct((batch, known), jnp.float32))
