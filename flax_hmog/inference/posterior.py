"""Exact inference: densities, posteriors, latent means and sampling, as pure functions of `Natural`.

Every public function checks its arguments, then runs a compiled pass over blocks of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from flax_hmog.data.containers import is_in_blocks
from flax_hmog.data.rows import block_rows, enter, map_rows
from flax_hmog.data.shards import Shards, on_shards, row_shards
from flax_hmog.data.sources import entered
from flax_hmog.inference.missing import infer_incomplete, posterior_precisions
from flax_hmog.inference.outputs import HMoGOutput as HMoGOutput
from flax_hmog.inference.outputs import Posterior as Posterior
from flax_hmog.model.checks import check_shape, check_size, door, is_concrete, may_miss, public
from flax_hmog.model.conversions import in_units_of_x, own_moments
from flax_hmog.model.coordinates import Natural, Prepared, check_natural, observable_bias
from flax_hmog.model.incomplete import Conditioner, incomplete_block_rows
from flax_hmog.model.kinds import Array, PositiveDefinite, matmul
from flax_hmog.model.prepared import (
    center_rows,
    component_logits,
    floats_per_row,
    latent_features,
    normalize_logits,
    posterior_gain,
    prepare,
    project_rows,
    shared_log_density,
)
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import Data, Samples, jit


@public
def infer(natural: Natural | Prepared, x: Data, *, missing: str = "refuse") -> HMoGOutput:
    """Log-density, log-responsibilities and latent mean of observations in one pass.

    Args:
        natural: the model.
        x: observations (..., D), of any kind that holds rows; integers and float64 are converted to the dtype of
            `natural`, and what is no array is brought to the device block by block.
        missing: "nan" takes NaN, None, NA and masked entries for missing ones, exactly,
            with scale or diagonal noise; "refuse" refuses them.

    Returns:
        `HMoGOutput`.

    Raises:
        TypeError: if `natural` is of another coordinate type or `x` holds no real numbers.
        ValueError: for a wrong last dimension, entries that are not finite, or a model that does not exist.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> output = infer(natural, x)
        >>> output.log_density.shape, output.log_responsibilities.shape, output.latent_mean.shape
        ((12,), (12, 3), (12, 2))
    """
    return cast(HMoGOutput, _each(infer_rows, natural, x))


@public
def infer_blocks(natural: Natural | Prepared, data: Data, *, missing: str = "refuse") -> HMoGOutput:
    """`infer` for data larger than memory, or sparse: rows are brought to the device block by block.

    Args:
        natural: the model.
        data: observations (N, D), as `fit_em` takes them.
        missing: as in `infer`.

    Returns:
        `HMoGOutput` of numpy arrays.

    Raises:
        TypeError, ValueError: as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> infer_blocks(natural, x).log_density.shape  # also of a memory map, or a sparse matrix
        (12,)
    """
    parts = []
    for model, rows, shards, _, count in entered(natural, data, argument="data", on_device=False):
        output = _by_blocks(infer_rows, model, rows, shards, missing=_has_missing(rows))
        parts.append((jax.tree.map(np.asarray, output), count))
    return cast(HMoGOutput, _joined(parts))


@public
def log_observable_density(natural: Natural | Prepared, x: Data, *, missing: str = "refuse") -> Float[Array, " ..."]:
    """Log p(x) = log sum_k w_k N(x; W m_k + b, W S_k W' + Psi), in nats.

    Args:
        natural: the model.
        x: observations (..., D).
        missing: as in `infer`.

    Returns:
        Log-densities (...). Raises as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> log_observable_density(natural, x).shape
        (12,)
    """
    return cast(Array, _each(infer_rows, natural, x, "log_density"))


@public
def posterior_soft_assignments(
    natural: Natural | Prepared, x: Data, *, missing: str = "refuse"
) -> Float[Array, "... K"]:
    """Responsibilities p(z = k | x). Rows sum to 1.

    Args:
        natural: the model.
        x: observations (..., D).
        missing: as in `infer`.

    Returns:
        Probabilities (..., K). Raises as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> print(posterior_soft_assignments(natural, x)[:2].round(2))
        [[1. 0. 0.] [0. 1. 0.]]
    """
    return jnp.exp(_each(infer_rows, natural, x, "log_responsibilities"))


posterior_assignments = posterior_soft_assignments


@public
def posterior_categorical(natural: Natural | Prepared, x: Data, *, missing: str = "refuse") -> Float[Array, "... K-1"]:
    """Natural parameters of p(z | x): log-odds of components 1..K-1 against component 0.

    Args:
        natural: the model.
        x: observations (..., D).
        missing: as in `infer`.

    Returns:
        Log-odds (..., K-1). Raises as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> (posterior_categorical(natural, x)[:2] > 0).tolist()
        [[False, False], [True, False]]
    """
    logits: Array = _each(infer_rows, natural, x, "log_responsibilities")
    return logits[..., 1:] - logits[..., :1]


@public
def posterior_hard_assignment(natural: Natural | Prepared, x: Data, *, missing: str = "refuse") -> Int[Array, " ..."]:
    """The most probable component of each observation.

    Args:
        natural: the model.
        x: observations (..., D).
        missing: as in `infer`.

    Returns:
        Component numbers (...), int32. Raises as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> posterior_hard_assignment(natural, x).tolist()
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    """
    logits = _each(infer_rows, natural, x, "log_responsibilities")
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@public
def latent_mean(natural: Natural | Prepared, x: Data, *, missing: str = "refuse") -> Float[Array, "... L"]:
    """E[y | x] = sum_k p(z = k | x) Q_k^-1 (eta_k + Theta' x).

    Args:
        natural: the model.
        x: observations (..., D).
        missing: as in `infer`.

    Returns:
        Latent means (..., L). Raises as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> latent_mean(natural, x).shape
        (12, 2)
    """
    return cast(Array, _each(infer_rows, natural, x, "latent_mean"))


@public
def posterior_at(natural: Natural | Prepared, x: Data, *, missing: str = "refuse") -> Posterior:
    """Natural parameters of p(y, z | x): locations eta_k + Theta' x, precisions Q_k, categorical bias.

    Args:
        natural: the model.
        x: observations (..., D).
        missing: as in `infer`.

    Returns:
        `Posterior` with locations (..., K, L). Raises as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> posterior_at(natural, x[0]).location.shape
        (3, 2)
    """
    model = with_prior(in_units_of_x(check_natural(natural)))
    eta, bias = model.posterior_location, observable_bias(model)
    parts = []
    for _, rows, _, _, count in entered(model, x):
        # W_o'Psi_o^-1 (x_o - b_o): what is missing lies at b
        shift = matmul(jnp.where(jnp.isnan(rows), bias, rows), model.interaction)[..., None, :]
        location = shift + eta.reshape(*(1,) * (rows.ndim - 1), *eta.shape)
        precision: Any = PositiveDefinite(posterior_precisions(model, rows)) if may_miss() else ()
        parts.append(((location, precision), count))
    location, precision = _joined(parts)
    return Posterior(location, precision or model.posterior_precision, model.categorical_bias)


@public
def merge_output(output: HMoGOutput, labels: Samples, n_clusters: int) -> HMoGOutput:
    """The output of a model whose components are merged to clusters: log-responsibilities summed within each.

    Args:
        output: of a head with K components, for a batch (..., D).
        labels: the cluster of each component (K,), integers from 0, as `analysis.merge_components` gives them.
        n_clusters: number of clusters.

    Returns:
        The output with log-responsibilities (..., n_clusters); gradients flow to all components.

    Raises:
        ValueError: unless there is one label for each component, below `n_clusters`.

    Example:
        >>> from flax_hmog.toy import output
        >>> merge_output(output, [0, 1, 1], 2).log_responsibilities.shape
        (12, 2)
    """
    check_shape("labels", labels, output.log_responsibilities.shape[-1:])
    if is_concrete(labels):
        host = np.asarray(labels)
        smallest, largest = host.min(), host.max()
        if host.dtype.kind not in "iu" or not 0 <= smallest <= largest < n_clusters:
            raise ValueError(
                f"{door()}: `labels` must be integers from 0 to {n_clusters - 1}; got {smallest} to {largest} in "
                f"{host.dtype}. Give the number of clusters that the labels have."
            )
    merged = _log_sums(output.log_responsibilities, jnp.asarray(labels), n_clusters)
    return dataclasses.replace(output, log_responsibilities=merged)


@public
def sample(
    natural: Natural | Prepared, key: Array, n: int
) -> tuple[Float[Array, "n D"], Float[Array, "n L"], Int[Array, " n"]]:
    """Draw from the joint: z ~ w, y | z ~ N(m_z, S_z), x | y ~ N(W y + b, Psi).

    Args:
        natural: the model.
        key: PRNG key.
        n: number of draws.

    Returns:
        x (n, D), y (n, L), z (n,) int32.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if `n` is no positive whole number.

    Example:
        >>> from flax_hmog.toy import natural
        >>> x, y, z = sample(natural, jax.random.key(0), 5)
        >>> x.shape, y.shape, z.shape
        ((5, 4), (5, 2), (5,))
    """
    natural = check_natural(natural)
    check_size("n", n)
    return _sample(with_prior(natural), key, n)


def _each(
    of_rows: Callable[[Any, Array], HMoGOutput], natural: Natural | Prepared, x: Data, field: str | None = None
) -> Any:
    """`of_rows` of rows of any kind: its whole output, or one field of it and only what that takes."""
    if type(x) is np.ndarray or isinstance(x, jax.Array) or not is_in_blocks(x):
        model, rows, shards = enter(natural, x)
        return _by_blocks(of_rows, model, rows, shards, field, missing=_has_missing(rows))
    blocks = entered(natural, x)
    parts = [
        (_by_blocks(of_rows, model, rows, shards, field, missing=_has_missing(rows)), n)
        for model, rows, shards, _, n in blocks
    ]
    return _joined(parts)


def _has_missing(rows: Array) -> bool:
    """True unless rows are seen to be complete."""
    return may_miss() and not (is_concrete(rows) and not bool(jnp.isnan(rows).any()))


def _joined(parts: list[tuple[Any, int | None]]) -> Any:
    """Arrays of blocks joined, of each so many rows as are said to count; None for rows that are no block."""
    if parts[0][1] is None:
        return parts[0][0]
    cut = [[leaf[:count] for leaf in jax.tree.leaves(part)] for part, count in parts]
    join: Any = np.concatenate if isinstance(cut[0][0], np.ndarray) else jnp.concatenate
    return jax.tree.unflatten(jax.tree.structure(parts[0][0]), [join(leaves) for leaves in zip(*cut, strict=True)])


@jit(static_argnames=("of_rows", "shards", "field", "missing"))
def _by_blocks(
    of_rows: Callable[[Any, Array], HMoGOutput],
    natural: Natural | Prepared,
    x: Array,
    shards: Shards,
    field: str | None = None,
    *,
    missing: bool = False,
) -> Any:
    """`of_rows` of an array, in blocks that fit the cache; that of incomplete rows where entries are missing."""
    factors: Any = prepare(natural)
    limit = block_rows(floats_per_row(factors))
    if missing:
        of_rows, factors, limit = infer_incomplete, Conditioner.of(factors), incomplete_block_rows(factors)
    only: Callable[[HMoGOutput], Any] = lambda output: output if field is None else getattr(output, field)  # noqa: E731
    return map_rows(lambda factors, block: only(of_rows(factors, block)), factors, x, limit, shards)


def infer_rows(factors: Prepared, x: Array) -> HMoGOutput:
    """`infer` of a block of rows (B, D) by a model that is prepared already."""
    centered = center_rows(factors, x)
    t = project_rows(factors, centered)
    logits = component_logits(factors, latent_features(t, squares_only=factors.is_diagonal))
    evidence, log_responsibilities, responsibilities = normalize_logits(logits)
    return HMoGOutput(
        shared_log_density(factors, centered, t) + evidence,
        log_responsibilities,
        matmul(t + posterior_gain(factors, responsibilities, t), factors.inverse_basis.T),
    )


@jit(static_argnames="n")
def _sample(natural: Natural, key: Array, n: int) -> tuple[Array, Array, Array]:
    moments = own_moments(natural)
    dtype = moments.bias.dtype
    obs_dim, lat_dim = moments.loadings.shape
    component_key, latent_key, noise_key = jax.random.split(key, 3)
    z = jax.random.categorical(component_key, jnp.log(moments.weights), shape=(n,))
    roots = moments.covariances.cholesky().entries
    y = jax.lax.map(
        lambda draw: moments.means[draw[0]] + matmul(roots[draw[0]], draw[1]),
        (z, jax.random.normal(latent_key, (n, lat_dim), dtype)),
        batch_size=min(n, 4096),
    )
    noise = jax.random.normal(noise_key, (n, obs_dim), dtype)
    scaled = moments.noise.cholesky().times(noise.T).T
    x = matmul(y, moments.loadings.T) + moments.bias[None] + scaled
    frame = natural.frame
    return x if frame is None else frame.outward(x), y, z.astype(jnp.int32)


@jit(static_argnames="n_clusters")
def _log_sums(log_responsibilities: Array, labels: Array, n_clusters: int) -> Array:
    """The log of the sum of exponentials within each cluster (..., n_clusters), relative to its largest term."""

    def merged(labels: Array, log_responsibilities: Array) -> Array:
        rows = jnp.moveaxis(log_responsibilities, -1, 0)  # (K, ...)
        top = jax.lax.stop_gradient(jax.ops.segment_max(rows, labels, n_clusters))
        top = jnp.where(jnp.isfinite(top), top, 0)
        totals = jax.ops.segment_sum(jnp.exp(rows - top[labels]), labels, n_clusters)
        sums = jnp.where(totals > 0, jnp.log(jnp.where(totals > 0, totals, 1)) + top, -jnp.inf)
        return jnp.moveaxis(sums, 0, -1)

    shards = row_shards(log_responsibilities)
    return on_shards(merged, labels, log_responsibilities, shards, PartitionSpec(None if shards is None else shards[1]))
