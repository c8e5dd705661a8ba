"""The registry of cases that property tests run over: head class x kinds x (D, L, K), with the edges of each size."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog import (
    AnalyticHMoG,
    Diagonal,
    DifferentiableHMoG,
    Moments,
    PositiveDefinite,
    Scale,
    SymmetricHMoG,
)
from flax_hmog.em.online import stepwise_start
from flax_hmog.heads.leaves import leaf_specs
from flax_hmog.model.kinds import as_rep

KINDS = ("scale", "diagonal", "full")
EDGES = ((2, 2, 1), (3, 1, 2), (1, 1, 3))  # (D, L, K) with K = 1, L = 1, D = 1; the first and last with L = D


@dataclasses.dataclass(frozen=True)
class Case:
    """One model structure. `rep` is `pst_rep` or `lat_rep`; Analytic heads have none."""

    family: type
    obs_rep: str
    rep: str
    obs_dim: int = 4
    lat_dim: int = 2
    n_components: int = 3

    @property
    def name(self):
        family = self.family.__name__.removesuffix("HMoG").lower()
        return f"{family}-{self.obs_rep}-{self.rep}-{self.obs_dim}.{self.lat_dim}.{self.n_components}"

    @property
    def is_full(self):
        return self.rep == "full"

    @property
    def is_shared_base(self):
        return self.family is SymmetricHMoG and not self.is_full

    def head(self, dtype="float64", **options):
        kinds = {DifferentiableHMoG: {"pst_rep": self.rep}, SymmetricHMoG: {"lat_rep": self.rep}, AnalyticHMoG: {}}
        sizes = {"lat_dim": self.lat_dim, "n_components": self.n_components, "obs_dim": self.obs_dim}
        given = {"obs_rep": self.obs_rep, "param_dtype": jnp.dtype(dtype), **kinds[self.family]}
        return self.family(**(sizes | given | options))

    def variables(self, dtype="float64", seed=0):
        """Random variables of a head, the same in every dtype; of an Analytic head but for rounding."""
        with jax.enable_x64(True):
            if self.family is AnalyticHMoG:
                tree = {"em": stepwise_start(random_moments(self, seed))}
            else:
                rng = np.random.default_rng(seed)
                sizes = (self.obs_dim, self.lat_dim, self.n_components)
                specs = leaf_specs(*sizes, as_rep(self.obs_rep), self.head().component_structure)
                draws = {name: 0.7 * rng.standard_normal(spec.shape) for name, spec in specs.items()}
                tree = {"params": {name: _in_float32(draw) for name, draw in draws.items()}}
        with jax.enable_x64(dtype == "float64"):
            convert = lambda leaf: jnp.asarray(leaf, leaf.dtype if leaf.dtype == np.int32 else dtype)  # noqa: E731
            return jax.tree.map(convert, tree)

    def natural(self, dtype="float64", seed=0):
        """The head's model at random variables."""
        return _natural(self, dtype, seed)

    def x(self, count=7, seed=0):
        """Observations around the model, in float64 but exact in float32."""
        rng = np.random.default_rng(seed + 1)
        return _in_float32(2 * rng.standard_normal((count, self.obs_dim)))


def _in_float32(values):
    """Values rounded to float32, held in float64: what is left exact by either dtype."""
    return np.asarray(np.asarray(values, np.float32), np.float64)


@functools.cache
def _natural(case, dtype, seed):
    with jax.enable_x64(dtype == "float64"):
        return _natural_of(case.head(dtype), case.variables(dtype, seed))


@functools.partial(jax.jit, static_argnums=0)
def _natural_of(head, variables):
    return head.apply(variables, method="natural")


def random_spd(rng, *batch, dim):
    """Positive definite matrices (*batch, dim, dim) of moderate condition."""
    root = rng.standard_normal((*batch, dim, dim))
    return root @ np.swapaxes(root, -1, -2) / dim + 0.3 * np.eye(dim)


def random_noise(rng, obs_rep, obs_dim):
    noises = {
        "scale": Scale(np.asarray(rng.uniform(0.3, 2))),
        "diagonal": Diagonal(rng.uniform(0.3, 2, obs_dim)),
        "full": PositiveDefinite(random_spd(rng, dim=obs_dim)),
    }
    return noises[obs_rep]


def random_moments(case, seed=0):
    """A random model in standard form, float64."""
    rng = np.random.default_rng(seed)
    D, L, K = case.obs_dim, case.lat_dim, case.n_components
    return Moments(
        loadings=rng.standard_normal((D, L)),
        bias=rng.standard_normal(D),
        noise=random_noise(rng, case.obs_rep, D),
        weights=rng.dirichlet(np.full(K, 5.0)),
        means=1.5 * rng.standard_normal((K, L)),
        covariances=PositiveDefinite(random_spd(rng, K, dim=L)),
    )


def _registry():
    grid = [
        Case(family, obs_rep, rep)
        for family in (DifferentiableHMoG, SymmetricHMoG)
        for obs_rep in KINDS
        for rep in KINDS
    ]
    grid += [Case(AnalyticHMoG, obs_rep, "full") for obs_rep in KINDS]
    structures = [
        (DifferentiableHMoG, "diagonal", "scale"),
        (DifferentiableHMoG, "full", "diagonal"),
        (SymmetricHMoG, "diagonal", "diagonal"),
        (SymmetricHMoG, "full", "scale"),
        (AnalyticHMoG, "scale", "full"),
    ]
    return grid + [Case(*structure, *sizes) for sizes in EDGES for structure in structures]


CASES = {case.name: case for case in _registry()}

# one case of every family and of every kind, where a test compiles; the first runs in the fast suite
FEW = [
    CASES[name]
    for name in (
        "differentiable-diagonal-diagonal-4.2.3",
        "symmetric-full-diagonal-4.2.3",
        "differentiable-full-scale-4.2.3",
        "analytic-scale-full-4.2.3",
    )
]


def over(cases, is_slow):
    """Parametrises over cases; those that are slow still run in CI."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name, marks=[slow] * is_slow(case)) for case in cases]
    )


def is_slow(case):
    """All but one case of every family with every kind, and of every edge: each structure and size compiles anew."""
    return case.name not in FAST


FAST = {
    *(case.name for case in FEW),
    "differentiable-scale-scale-4.2.3",
    "differentiable-full-full-4.2.3",
    "symmetric-diagonal-scale-4.2.3",
    "symmetric-scale-full-4.2.3",
    "analytic-diagonal-full-4.2.3",
    "differentiable-full-diagonal-1.1.3",
    "symmetric-diagonal-diagonal-1.1.3",
    "analytic-scale-full-1.1.3",
    "differentiable-diagonal-scale-2.2.1",
    "symmetric-full-scale-2.2.1",
}
assert CASES.keys() >= FAST

SOME = over(FEW, lambda case: case != FEW[0])
ALL = over(CASES.values(), is_slow)
# gradients take three times as many operations: every kind of each family, and every edge
GRADIENTS = over(
    [CASES[name] for name in sorted(FAST | {"analytic-full-full-4.2.3", "differentiable-full-diagonal-3.1.2"})],
    lambda case: case not in FEW[:2],
)
