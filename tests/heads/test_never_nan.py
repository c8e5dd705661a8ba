"""Any real leaves are a valid model in float32: outputs and gradients stay finite, and so does bad training."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import KINDS
from dense import Dense

from flax_hmog import DifferentiableHMoG, SymmetricHMoG, natural_to_moments

VARIANTS = {
    f"{family.__name__.removesuffix('HMoG').lower()}-{obs_rep}-{rep}": functools.partial(
        family, obs_rep=obs_rep, **{"pst_rep" if family is DifferentiableHMoG else "lat_rep": rep}
    )
    for family, obs_rep, rep in itertools.product((DifferentiableHMoG, SymmetricHMoG), KINDS, KINDS)
}
QUICK = ("differentiable-diagonal-diagonal", "symmetric-full-diagonal")


def extreme_leaves(shapes, seed):
    """Leaves of one scale from 0.1 to 30, and what strains them: unequal or equal columns, edges of the bounds."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-1, np.log10(30))
    leaves = {name: scale * rng.standard_normal(shape) for name, shape in shapes.items()}
    loadings = leaves["loadings"]
    kind = rng.integers(5)
    if kind in (1, 2):  # columns over four orders of magnitude
        loadings *= 10 ** rng.uniform(-4, 0, loadings.shape[1])
    if kind in (3, 4):  # and up to 100 times the rest
        loadings *= 10 ** rng.uniform(-2, 2, loadings.shape[1])
    if kind in (2, 4) and loadings.shape[1] > 1:
        loadings[:, 1] = loadings[:, 0]
    strain = rng.random(3)
    if strain[0] < 0.3:
        leaves["precisions"][:] = -20
    elif strain[0] < 0.6:
        leaves["precisions"][0] = -20
    if strain[1] < 0.3:
        leaves["logits"][1:] = -20
    if strain[2] < 0.2:
        leaves["noise"] = np.full_like(leaves["noise"], -20)
    return {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}


def check_finite(variant, sizes, draws, rows=16):
    """Outputs and their gradients at random leaves, near and far from the data."""
    D, L, K = sizes
    head = VARIANTS[variant](lat_dim=L, n_components=K)
    rng = np.random.default_rng(sizes)
    x = rng.standard_normal((rows, D)).astype(np.float32)
    x[0] = 0
    x[1] *= 100
    directions = [jnp.asarray(rng.standard_normal((rows, n)), jnp.float32) for n in (K, L)]

    def objectives(leaves, x):
        output = head.apply({"params": leaves}, x)
        responsibilities = jnp.sum(jnp.exp(output.log_responsibilities) * directions[0])
        return jnp.stack(
            [jnp.mean(output.log_density), responsibilities, jnp.sum(output.latent_mean * directions[1])]
        ), output

    @jax.jit
    def run(leaves, x):
        _, pull, output = jax.vjp(objectives, leaves, x, has_aux=True)
        return output, jax.vmap(pull)(jnp.eye(3))

    variables = nn.meta.unbox(jax.eval_shape(head.init, jax.random.key(0), x))
    shapes = {name: leaf.shape for name, leaf in variables["params"].items()}
    for seed in range(draws):
        leaves = extreme_leaves(shapes, seed)
        output, (in_leaves, in_x) = run(leaves, x)
        for name, value in {**vars(output), **in_leaves, "x": in_x}.items():
            assert np.isfinite(value).all(), f"{variant} {sizes} draw {seed}: {name}"
        assert np.max(output.log_responsibilities) <= 1e-4


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v not in QUICK)) for v in VARIANTS])
def test_any_leaves_are_finite(variant):
    check_finite(variant, (6, 3, 4), 46)  # 18 x 46 draws


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["differentiable-diagonal-scale", "differentiable-full-diagonal",
                                     "differentiable-scale-full", "symmetric-full-scale", "symmetric-diagonal-diagonal",
                                     "symmetric-scale-full"])  # fmt: skip
def test_any_leaves_are_finite_in_middle_sizes(variant):
    check_finite(variant, (64, 10, 10), 20)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["differentiable-diagonal-diagonal", "differentiable-diagonal-full",
                                     "differentiable-full-scale", "symmetric-scale-diagonal"])  # fmt: skip
def test_any_leaves_are_finite_in_large_sizes(variant):
    check_finite(variant, (784, 50, 10), 13)


@pytest.mark.parametrize("variant", QUICK)
def test_any_leaves_are_a_model_that_exists(variant):
    """Not only finite: weights sum to 1 and all covariances are positive definite, within the stated bounds."""
    bounds = {"noise_bounds": (1e-2, 1e2), "precision_bounds": (1e-2, 1e2)}
    head = VARIANTS[variant](lat_dim=3, n_components=4, obs_dim=6, **bounds)
    variables = nn.meta.unbox(jax.eval_shape(head.init, jax.random.key(0), jnp.ones((1, 6))))
    shapes = {name: leaf.shape for name, leaf in variables["params"].items()}
    build = jax.jit(lambda leaves: natural_to_moments(head.apply({"params": leaves}, method="natural")))
    for seed in range(100):
        dense = Dense.of_moments(build(extreme_leaves(shapes, seed)))
        assert abs(dense.w.sum() - 1) < 1e-5
        assert np.all(dense.w >= 0)
        assert np.all(np.linalg.eigvalsh(dense.S) > 0)
        assert np.all(np.linalg.eigvalsh(dense.Psi) > 0)
        noise = np.diag(dense.Psi)
        assert np.all((noise > 0.99e-2) & (noise < 1.01e2))


def hostile_data():
    """60 x 4 samples on which a density has no maximum."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((60, 4))
    return {
        "constant columns": spread * [1, 0, 1, 0] + [0, 5, 0, -1],
        "duplicated rows": np.repeat(spread[:20], 3, axis=0),
        "fewer points than components": spread[:5][rng.integers(0, 5, 60)],
    }


@functools.cache
def adam(variant, steps=2000):
    """`steps` of Adam on a data set at a learning rate, compiled once per variant: losses and the last leaves."""
    head = VARIANTS[variant](lat_dim=2, n_components=8, obs_dim=4)
    direction = optax.scale_by_adam()

    @jax.jit
    def run(x, rate):
        params = nn.meta.unbox(head.init(jax.random.key(0), x))["params"]

        def step(carry, _):
            params, state = carry
            loss = lambda params: -jnp.mean(head.apply({"params": params}, x).log_density)  # noqa: E731
            value, slopes = jax.value_and_grad(loss)(params)
            updates, state = direction.update(slopes, state)
            params = jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates)
            return (params, state), value

        (params, _), losses = jax.lax.scan(step, (params, direction.init(params)), None, length=steps)
        return losses, params, head.apply({"params": params}, x)

    return run


@pytest.mark.parametrize("kind", hostile_data())
@pytest.mark.parametrize(
    "variant",
    [
        "differentiable-diagonal-diagonal",
        pytest.param("differentiable-full-full", marks=pytest.mark.slow),
        pytest.param("symmetric-diagonal-diagonal", marks=pytest.mark.slow),
    ],
)
def test_training_with_far_too_large_steps_stays_finite(variant, kind):
    x = hostile_data()[kind].astype(np.float32)
    for rate in (0.1, 0.3):  # 0.01 would do
        losses, params, output = adam(variant)(x, rate)
        assert np.isfinite(losses).all(), f"rate {rate}: not finite from step {int(np.argmin(np.isfinite(losses)))}"
        for name, value in {**params, **vars(output)}.items():
            assert np.isfinite(value).all(), f"rate {rate}: {name}"
        assert losses[-100:].mean() < losses[0] - 0.5
