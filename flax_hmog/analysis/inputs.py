"""Arguments of the analysis functions as numpy arrays in float64, checked."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from flax_hmog.data.containers import in_memory
from flax_hmog.data.labels import as_vector, is_known, of_one_kind
from flax_hmog.model.checks import door
from flax_hmog.model.coordinates import check_natural
from flax_hmog.model.prior import with_prior
from flax_hmog.model.typed import Floats


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A model in standard form, in float64 on the host: nothing here is large, and close components cancel in float32.

    Attributes:
        loadings: W (D, L).
        bias: b (D,).
        noise_variances: diagonal of Psi (D,).
        whitened_loadings: A = F'W (D, L) with F F' = Psi^-1: the loadings where the noise is N(0, I).
        weights: w (K,).
        means: m (K, L).
        covariances: S (K, L, L).
    """

    loadings: Floats
    bias: Floats
    noise_variances: Floats
    whitened_loadings: Floats
    weights: Floats
    means: Floats
    covariances: Floats

    def signal_components(self) -> tuple[Floats, Floats]:
        """Means (K, R) and covariances (K, R, R) of x given each component where components can differ, R = min(D, L).

        With A = U G (thin SVD, U'U = I) and u = U'F'(x - b): u | k ~ N(G m_k, I + G S_k G'). The other D - R directions
        of F'(x - b) are standard normal whatever k, so distances between components in x are those in u, exactly.
        """
        _, scale, rotation = np.linalg.svd(self.whitened_loadings, full_matrices=False)
        signal = scale[:, None] * rotation
        covariances = signal @ self.covariances @ signal.T
        return self.means @ signal.T, covariances + np.eye(len(signal))

    def latent_moments(self) -> tuple[Floats, Floats, Floats]:
        """E[y] (L,), the average covariance within components (L, L) and the covariance between their means (L, L)."""
        center = self.weights @ self.means
        gap = self.means - center
        within = np.einsum("k,kij->ij", self.weights, self.covariances)
        return center, within, (self.weights[:, None] * gap).T @ gap


def geometry(natural: object) -> Geometry:
    """The standard form of a model, in float64.

    Raises:
        TypeError: if `natural` is of another coordinate type.
        ValueError: if a prior precision is not positive definite.
    """
    model = check_natural(natural)
    frame = model.frame
    model = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), with_prior(model))
    theta, precision = model.interaction, model.observable_precision
    noise, whitened = precision.inverse(), precision.cholesky().lower_solve(theta)
    loadings, bias = noise.times(theta), noise.times(model.observable_location[:, None])[:, 0]
    variances = np.broadcast_to(noise.diagonal(), bias.shape)
    if frame is not None:  # in float64, which holds what the dtype of the model may not
        origin, unit = frame.exact()
        loadings, bias, variances = unit[:, None] * loadings, origin + unit * bias, unit**2 * variances
    covariances = np.linalg.inv(model.prior.precision.entries)
    return Geometry(
        loadings=loadings,
        bias=bias,
        noise_variances=variances,
        whitened_loadings=whitened,
        weights=np.exp(model.prior.log_weights),
        means=np.einsum("kij,kj->ki", covariances, model.prior.location),
        covariances=(covariances + covariances.transpose(0, 2, 1)) / 2,
    )


def as_array(argument: str, value: object, ndim: int, shape: str) -> Floats:
    """`value` as finite float64 numbers of this rank.

    Raises:
        TypeError: if it holds no real numbers.
        ValueError: for another rank, no entries, or entries that are not finite.
    """
    array = np.asarray(in_memory(argument, value))
    if array.dtype.kind not in "biuf" and not jax.numpy.issubdtype(array.dtype, np.floating):
        raise TypeError(f"{door()}: `{argument}` must hold real numbers; got {array.dtype}. Convert it first.")
    if array.ndim != ndim or array.size == 0:
        raise ValueError(
            f"{door()}: `{argument}` must have shape {shape}; got {array.shape}. Reshape it; it may not be empty."
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise ValueError(f"{door()}: `{argument}` must be finite; got {count} entries that are not. Drop these rows.")
    return array


def as_responsibilities(value: object) -> Floats:
    """Responsibilities (N, K) in float64, from (..., K).

    Raises:
        TypeError: if `value` holds no real numbers.
        ValueError: unless the rows are probabilities.
    """
    array = np.asarray(in_memory("responsibilities", value))
    array = array.reshape(-1, array.shape[-1]) if array.ndim > 2 else array
    array = as_array("responsibilities", array, 2, "(..., K)")
    worst = int(np.abs(array.sum(axis=1) - 1).argmax())
    if array.min() < 0 or abs(array[worst].sum() - 1) > 1e-3:
        raise ValueError(
            f"{door()}: `responsibilities` must be probabilities that sum to 1 in each row; got smallest entry "
            f"{array.min():.3g} and sum {array[worst].sum():.6g} in row {worst}. Use posterior_soft_assignments."
        )
    return array


def as_labels(argument: str, value: object, length: int | None = None, shape: str = "(N,)") -> np.ndarray:
    """Labels of any kind that can be compared.

    Raises:
        ValueError: unless they are one non-empty vector, of `length` if that is given.
    """
    array = np.asarray(value)
    if array.ndim != 1 or array.size == 0 or length not in (None, array.size):
        wanted = shape if length is None else f"({length},)"
        raise ValueError(
            f"{door()}: `{argument}` must have shape {wanted}; got {array.shape}. Give one label for each, in order."
        )
    return array


def as_groups(argument: str, value: object, length: int) -> np.ndarray:
    """Labels (N,) of which some may be missing: these are a group of their own, "no label".

    Raises:
        ValueError: unless they are one vector of this length.
    """
    labels = as_labels(argument, as_vector(value), length)
    known = is_known(labels)
    if known.all():
        return of_one_kind(argument, labels)
    groups = np.full(length, "no label", object)
    groups[known] = of_one_kind(argument, labels[known]).astype(str)
    return groups.astype(str)


def as_names(names: object, count: int, *, argument: str = "names") -> list[str]:
    """Names as text; the numbers from 0 if none are given.

    Raises:
        ValueError: unless there are `count` of them.
    """
    return [str(name) for name in (range(count) if names is None else as_labels(argument, names, count))]


def as_images(rows: Floats, image_shape: tuple[int, ...]) -> Floats:
    """Rows (n, D) as images (n, height, width) or (n, height, width, 3).

    Raises:
        ValueError: if `image_shape` is no such shape or its product is not D.
    """
    shape = tuple(image_shape)
    if len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)) or np.prod(shape) != rows.shape[1]:
        raise ValueError(
            f"{door()}: `image_shape` must be (height, width) or (height, width, 3) with product {rows.shape[1]}; got "
            f"{image_shape}. Give the shape of one observation before it was flattened."
        )
    return rows.reshape(-1, *(shape[:2] if shape[2:] == (1,) else shape))


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{door()}: `{argument}` must be one of {choices}; got {value!r}. Choose one of them.")
