"""Rows with missing entries: their densities and posteriors, and what is missing, imputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flax_hmog.data.containers import is_in_blocks
from flax_hmog.data.rows import check_given
from flax_hmog.data.shards import on_auto_axes
from flax_hmog.data.sources import entered
from flax_hmog.em.missing import mixed_posterior
from flax_hmog.inference.outputs import HMoGOutput
from flax_hmog.model.algebra import batched_cholesky
from flax_hmog.model.checks import allowing, check_outside_transformations, check_size, door, public
from flax_hmog.model.coordinates import Natural, Prepared, check_natural
from flax_hmog.model.incomplete import Conditioner, condition, incomplete_block_rows, matrix_product, split_rows
from flax_hmog.model.kinds import Array, matmul, pytree
from flax_hmog.model.prepared import entry_index, normalize_logits, prepare
from flax_hmog.model.typed import Data, jit


@pytree
class Imputed:
    """Rows whose missing entries are filled in, in units of x; entries that are there stay as they are.

    Attributes:
        mean: E[x | x_o] (..., D).
        deviation: standard deviation of x given x_o (..., D); 0 for entries that are there.
        draws: draws of x given x_o (draws, ..., D), or None.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> rows = np.where(np.arange(4) == 2, np.nan, x)
        >>> imputed = impute(natural, rows, key=jax.random.key(0), draws=5)
        >>> imputed.mean.shape, (imputed.deviation[0] > 0).tolist(), imputed.draws.shape
        ((12, 4), [False, False, True, False], (5, 12, 4))
    """

    mean: Float[np.ndarray, "... D"]
    deviation: Float[np.ndarray, "... D"]
    draws: Float[np.ndarray, "draws ... D"] | None = None


@public
@on_auto_axes
def impute(natural: Natural | Prepared, x: Data, *, key: Array | None = None, draws: int = 0) -> Imputed:
    """The distribution of missing entries given those that are there: means, standard deviations and joint draws.

    It is exact under the model, whose noise is of kind scale or diagonal: a mixture over components, of which each
    has its posterior of y.

    Args:
        natural: the model.
        x: observations (..., D) of any kind that holds rows, NaN, None, NA or masked where they are missing.
        key: PRNG key of the draws.
        draws: number of draws; each is one whole row for every row of `x`, as multiple imputation takes them.

    Returns:
        `Imputed`, numpy arrays.

    Raises:
        TypeError: if `natural` is of another coordinate type or `x` holds no real numbers.
        ValueError: for full noise, a wrong last dimension, infinite entries, or draws without a key.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> rows = np.where(np.arange(4) == 2, np.nan, x)
        >>> bool(np.abs(impute(natural, rows).mean - x).max() < 1)
        True
    """
    frame = check_natural(natural).frame
    check_outside_transformations(natural=natural, x=x, key=key)
    check_size("draws", draws, at_least=0)
    if draws and key is None:
        raise ValueError(f"{door()}: `key` must be given for draws; got None. Give jax.random.key(0).")
    with allowing("nan"):
        x, shape = _as_table(x)
        parts = []
        for number, (model, rows, _, _, count) in enumerate(entered(natural, x, on_device=False)):
            block_key = jax.random.fold_in(jax.random.key(0) if key is None else key, number)
            found = _imputed_rows(prepare(model), rows, block_key, draws=draws)
            parts.append([np.asarray(leaf)[..., :count, :] for leaf in found])
    mean, deviation, drawn = (np.concatenate(part, axis=-2) for part in zip(*parts, strict=True))
    if frame is not None:
        origin, unit = frame.exact()
        mean, deviation, drawn = origin + unit * mean, unit * deviation, origin + unit * drawn
    if shape is not None:
        given = np.asarray(x)
        is_missing, exact = np.isnan(given), np.result_type(given, mean)
        mean, drawn = (np.where(is_missing, values, given).astype(exact) for values in (mean, drawn))
        mean, deviation, drawn = mean.reshape(shape), deviation.reshape(shape), drawn.reshape(-1, *shape)
    return Imputed(mean, deviation, drawn if draws else None)


def _as_table(x: Data) -> tuple[Any, tuple[int, ...] | None]:
    """Rows (N, D), and the shape (..., D) of those that are an array; None for others."""
    if is_in_blocks(x):
        return x, None
    given = check_given(x, None)
    return given.reshape(-1, given.shape[-1]) if given.ndim else given, given.shape


def infer_incomplete(conditioner: Conditioner, x: Array) -> HMoGOutput:
    """`infer` of a block of rows (B, D) with NaN where an entry is missing."""
    factors = conditioner.factors
    posterior = condition(conditioner, split_rows(factors, x))
    density, log_responsibilities, responsibilities = normalize_logits(posterior.log_joint.T)
    mean = posterior.point + jnp.sum(responsibilities.T[:, None] * posterior.gain, axis=0)
    return HMoGOutput(density, log_responsibilities, matmul(mean.T, factors.inverse_basis.T))


@jit
def posterior_precisions(natural: Natural, x: Array) -> Array:
    """P_k + W_o'Psi_o^-1 W_o (..., K, L, L) of rows x (..., D), for a model with its prior."""
    loadings = natural.interaction / natural.observable_precision.cholesky().diagonal()[:, None]
    i, j = np.triu_indices(loadings.shape[1])
    gram = matmul((~jnp.isnan(x)).astype(loadings.dtype), loadings[:, i] * loadings[:, j])
    gram = jnp.expand_dims(gram[..., entry_index(loadings.shape[1])], -3)
    prior = natural.prior.precision.entries
    return cast(Array, gram + prior.reshape(*(1,) * (x.ndim - 1), *prior.shape))


@jit(static_argnames="draws")
def _imputed_rows(factors: Prepared, x: Array, key: Array, *, draws: int) -> tuple[Array, Array, Array]:
    """Means and standard deviations (N, D) of rows x (N, D), and draws (draws, N, D), in the frame of the model."""
    size = min(incomplete_block_rows(factors), x.shape[0])
    blocks = -(-x.shape[0] // size)
    padded = jnp.pad(x, ((0, blocks * size - x.shape[0]), (0, 0))).reshape(blocks, size, -1)
    operands = Conditioner.of(factors), batched_cholesky(Conditioner.of(factors).prior)
    of_block = partial(_imputed_block, *operands, draws=draws)
    mean, deviation, drawn = jax.lax.map(lambda block: of_block(*block), (padded, jax.random.split(key, blocks)))
    join: Callable[[Array], Array] = lambda values: values.reshape(-1, x.shape[1])[: x.shape[0]]  # noqa: E731
    return join(mean), join(deviation), jax.vmap(join)(jnp.moveaxis(drawn, 1, 0))


def _imputed_block(
    conditioner: Conditioner, prior_roots: Array, x: Array, key: Array, *, draws: int
) -> tuple[Array, Array, Array]:
    """`_imputed_rows` of one block; prior_roots (K, L, L) are lower factors of the prior's precisions."""
    factors, loadings = conditioner.factors, conditioner.loadings
    shown = split_rows(factors, x)
    posterior = condition(conditioner, shown)
    _, log_responsibilities, responsibilities = normalize_logits(posterior.log_joint.T)
    latent, spread, _ = mixed_posterior(posterior, responsibilities.T, jnp.zeros_like(x[:, 0]))
    deviations = 1 / factors.root.diagonal()
    i, j = np.triu_indices(loadings.shape[1])
    # W_d Cov[u | x_o] W_d' + Psi_d, products off the diagonal twice
    pairs = loadings[:, i] * loadings[:, j] * jnp.where(i == j, 1, 2).astype(x.dtype)[None]
    variance = matmul(spread[i, j].T, pairs.T) + (deviations**2)[None]
    is_missing = shown.mask == 0

    def fill(centered: Array) -> Array:
        return jnp.where(is_missing, centered, shown.centered) + factors.bias[None]

    def draw(key: Array) -> Array:
        """A component, u of its posterior, and x given u."""
        keys = jax.random.split(key, 4)
        component = jax.random.categorical(keys[0], log_responsibilities)
        noise, seen = (jax.random.normal(of, x.shape, x.dtype) for of in keys[1:3])
        latent_noise = jax.random.normal(keys[3], latent.shape, x.dtype)
        # C e with e ~ N(0, Q) is N(0, C), as Q = U_o'U_o + F F'
        shared = matmul(factors.projection.T, (seen * shown.mask).T)

        def add(total: Array, of_component: tuple[Array, ...]) -> tuple[Array, None]:
            number, covariance, gain, root = of_component
            drawn = gain + matrix_product(covariance, shared + matmul(root, latent_noise))
            return total + jnp.where((component == number)[None], drawn, 0), None

        components = jnp.arange(prior_roots.shape[0]), posterior.covariance, posterior.gain, prior_roots
        u, _ = jax.lax.scan(add, posterior.point, components)
        return fill(matmul(u.T, loadings.T) + noise * deviations[None])

    drawn = jax.lax.map(draw, jax.random.split(key, draws)) if draws else jnp.zeros((0, *x.shape), x.dtype)
    return fill(matmul(latent.T, loadings.T)), jnp.where(is_missing, jnp.sqrt(variance), 0), drawn
