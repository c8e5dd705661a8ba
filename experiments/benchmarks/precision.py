"""EM in float32 beside float64, and the projection in bfloat16: `python -m experiments.benchmarks.precision`.

Question: what does rounding cost where the noise is small beside the signal? 4000 samples of 20 columns, 3 factors, 4
components, 60 steps of EM at most; a minute on 2 cores.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog import AnalyticHMoG, EMResult, PseudoCounts, fit_em, infer

RATIOS = (10, 30, 100, 400, 1000, 3000)


def draw(ratio: float) -> np.ndarray:
    """Samples whose noise has the standard deviation 1 / ratio; that of the loadings is 1."""
    rng = np.random.default_rng(0)
    loadings, means = rng.standard_normal((20, 3)), 3 * rng.standard_normal((4, 3))
    y = means[rng.integers(4, size=4000)] + rng.standard_normal((4000, 3))
    return y @ loadings.T + rng.standard_normal((4000, 20)) / ratio + 5


def fit(x: np.ndarray, dtype: str, projection_dtype: Any = None) -> EMResult:
    """60 steps of EM at most, in one precision; the data are those that float32 holds."""
    with jax.enable_x64(dtype == "float64"):
        head = AnalyticHMoG(3, 4, param_dtype=dtype, projection_dtype=projection_dtype)
        data = x.astype(np.float32).astype(dtype)
        options: dict[str, Any] = {"max_steps": 60, "tolerance": 0.0, "regularizer": PseudoCounts(noise=0)}
        return fit_em(head, data, jax.random.key(0), **options)


def main() -> None:
    """Print both tables."""
    for ratio in RATIOS:
        single, double = (fit(draw(ratio), dtype) for dtype in ("float32", "float64"))
        deviations = [
            ratio * np.sqrt(np.mean(1 / np.asarray(result.natural.observable_precision.entries)))
            for result in (single, double)
        ]
        fall = -min(0, np.diff(single.objective_history).min())
        gap = single.objective_history[-1] - double.objective_history[-1]
        print(
            f"signal over noise {ratio}: largest fall {fall:.1e} nats, end {gap:+.1e} nats from float64, noise over "
            f"the truth {deviations[0]:.4f} (float64 {deviations[1]:.4f})",
            flush=True,
        )
    x, weights = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in enumerate([(6000, 784), (784, 50)]))
    exact = jnp.matmul(x, weights, precision="highest")
    low = jnp.matmul(x.astype("bfloat16"), weights.astype("bfloat16"), preferred_element_type=jnp.float32)
    print(f"bfloat16 product: relative error {jnp.linalg.norm(low - exact) / jnp.linalg.norm(exact):.4f}")
    data = draw(10).astype(np.float32)
    low_fit, full_fit = fit(data, "float32", "bfloat16"), fit(data, "float32")
    # both models by the densities of full precision
    ends = [float(jnp.mean(infer(result.natural, data).log_density)) for result in (low_fit, full_fit)]
    fall = -min(0, np.diff(low_fit.objective_history).min())
    print(
        f"EM with it at signal over noise 10: largest fall {fall:.1e}, end {ends[0] - ends[1]:+.1e} nats from float32"
    )


if __name__ == "__main__":
    main()
