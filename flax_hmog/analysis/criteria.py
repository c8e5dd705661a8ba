"""Criteria by which models of several sizes are compared on the data that they were fitted to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from flax_hmog.data.rows import check_weights
from flax_hmog.inference.posterior import HMoGOutput, infer_blocks
from flax_hmog.model.checks import public
from flax_hmog.model.conversions import moments_to_natural, own_moments
from flax_hmog.model.coordinates import Natural, Prepared, check_natural
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import PositiveDefinite
from flax_hmog.model.structure import Structure
from flax_hmog.model.typed import Data, Samples


@dataclasses.dataclass(frozen=True)
class InformationCriteria:
    """Criteria of one model on one set of data; all but the log-likelihood are better the lower they are.

    Attributes:
        log_likelihood: weighted sum of log p(x), nats.
        n_parameters: of `n_parameters`.
        n_samples: sum of the weights.
        entropy: weighted sum of the entropies of p(z | x), nats.

    Example:
        >>> InformationCriteria(-100.0, 5, 20.0, 0.5).aic
        210.0
    """

    log_likelihood: float
    n_parameters: int
    n_samples: float
    entropy: float

    @property
    def aic(self) -> float:
        """-2 log-likelihood + 2 parameters (Akaike 1974)."""
        return -2 * self.log_likelihood + 2 * self.n_parameters

    @property
    def bic(self) -> float:
        """-2 log-likelihood + parameters log samples (Schwarz 1978)."""
        return -2 * self.log_likelihood + self.n_parameters * math.log(self.n_samples)

    @property
    def icl(self) -> float:
        """BIC and twice the entropy of the assignments: of clusters that lie apart (Biernacki et al. 2000)."""
        return self.bic + 2 * self.entropy


@public
def information_criteria(
    natural: Natural | Prepared, x: Data, *, weights: Samples | None = None
) -> InformationCriteria:
    """AIC, BIC and ICL of a model on the data that it was fitted to.

    They take a fit for the maximum of the likelihood. One with pseudo-samples is a little below it, which counts where
    components have few rows.

    Args:
        natural: the model.
        x: observations (N, D), as `fit_em` takes them.
        weights: sample weights (N,), as numbers of samples.

    Returns:
        `InformationCriteria`.

    Raises:
        TypeError, ValueError: as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> information_criteria(natural, x).n_parameters
        27
    """
    return criteria_of(natural, infer_blocks(natural, x), weights)


def criteria_of(natural: Natural | Prepared, output: HMoGOutput, weights: Samples | None = None) -> InformationCriteria:
    """`information_criteria` from the output of the model for the data, on the host."""
    log_density = output.log_density.astype(np.float64)
    share = np.asarray(check_weights(weights, log_density.shape, output.log_density.dtype), np.float64)
    log_r = output.log_responsibilities.astype(np.float64)
    entropies = -np.sum(np.exp(log_r) * np.where(np.isfinite(log_r), log_r, 0), axis=-1)
    return InformationCriteria(
        log_likelihood=float(share @ log_density),
        n_parameters=n_parameters(check_natural(natural)),
        n_samples=float(share.sum()),
        entropy=float(share @ entropies),
    )


def of_columns(natural: Natural, columns: np.ndarray) -> Natural:
    """The model of some of the columns (D,) alone, which True stands for: the marginal of their density.

    A column that was constant in a fit has a density that pseudo-samples alone bound, differently for every size: what
    compares sizes is the density of the others.
    """
    moments, noise, frame = own_moments(natural), natural.observable_precision, natural.frame
    if noise.is_diagonal or noise.is_isotropic:
        own = type(noise).from_diagonal(moments.noise.diagonal()[columns])
    else:
        own = type(noise).project(moments.noise.dense()[columns][:, columns])
    kept: dict[str, Any] = {"loadings": moments.loadings[columns], "bias": moments.bias[columns], "noise": own}
    marginal = moments_to_natural(dataclasses.replace(moments, **kept))
    if frame is None:
        return marginal
    origin, unit = frame.exact()
    return dataclasses.replace(marginal, frame=Frame.of(origin[columns], unit[columns], frame.unit.dtype))


@public
def n_parameters(natural: Natural | Prepared) -> int:
    """Number of parameters that the density of x depends on: the rank of the Fisher information.

    What moves the latent space and leaves the density as it is does not count: affine maps of y, and covariance of y
    that the noise can hold as well.

    Args:
        natural: the model; only its sizes and kinds count.

    Returns:
        The number.

    Example:
        >>> from flax_hmog.toy import natural  # D = 4, L = 2, K = 3, diagonal noise
        >>> n_parameters(natural)  # 2 weights, 3 x 2 means, 3 x 3 covariances, 8 loadings, 4 biases, 4 noise, less 6
        27
    """
    natural = check_natural(natural)
    (obs_dim, lat_dim), n_components = natural.interaction.shape, natural.posterior_location.shape[0]
    noise = type(natural.observable_precision).packed_size(obs_dim)
    symmetric = obs_dim * (obs_dim + 1) // 2
    structure = Structure.of(natural.posterior_precision)
    full = Structure(PositiveDefinite)
    # a restricted model has no more than the full one, and this no more than a mixture without factors
    counts = [_count(obs_dim, lat_dim, n_components, noise, kind) for kind in (structure, full)]
    return min(*counts, n_components - 1 + n_components * (obs_dim + symmetric))


def _count(obs_dim: int, lat_dim: int, n_components: int, noise: int, structure: Structure) -> int:
    """Parameters of W, b, Psi, w, m and S_k less the dimensions of what changes them alone."""
    rep, full = structure.rep, lat_dim * (lat_dim + 1) // 2
    each = rep.packed_size(lat_dim)
    covariances = full + (n_components - 1) * each if structure.has_base else n_components * each
    # maps A of y that keep the structure, and shifts of y
    of_full = lat_dim if rep.is_diagonal else lat_dim**2
    maps = lat_dim * (lat_dim - 1) // 2 + 1 if rep.is_isotropic else of_full
    # C with W C W' within the kind of the noise
    absorbed = max(0, each - (obs_dim * (obs_dim + 1) // 2 - noise))
    observed = obs_dim * lat_dim + obs_dim + noise
    return observed + n_components - 1 + n_components * lat_dim + covariances - lat_dim - maps - absorbed
