"""A small model and rows of it, for examples: D = 4 columns, L = 2 factors, K = 3 components, N = 12 rows.

Example:
    >>> x.shape, labels.shape, output.log_responsibilities.shape
    ((12, 4), (12,), (12, 3))
"""

import jax.numpy as jnp
import numpy as np

from flax_hmog import AnalyticHMoG, Diagonal, Moments, PositiveDefinite, infer, moments_to_natural, warm_start

head = AnalyticHMoG(lat_dim=2, n_components=3, obs_dim=4)
moments = Moments(
    loadings=jnp.array([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0], [0.5, 1.0]]),
    bias=jnp.array([1.0, 0.0, 0.0, -1.0]),
    noise=Diagonal(jnp.full(4, 0.1)),
    weights=jnp.array([0.5, 0.25, 0.25]),
    means=jnp.array([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]]),
    covariances=PositiveDefinite(jnp.stack([0.2 * jnp.eye(2)] * 3)),
)
natural = moments_to_natural(moments)
labels = np.arange(12) % 3
x = np.asarray(moments.means)[labels] @ np.asarray(moments.loadings).T + np.asarray(moments.bias)
x = (x + 0.3 * np.sin(np.arange(48.0)).reshape(12, 4)).astype(np.float32)
output = infer(natural, x)
variables, _ = warm_start(head, natural, x)
