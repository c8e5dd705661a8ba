"""Kinds of matrix: one added from outside does all that ours do, and `Scale` knows its size."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from flax_hmog import (
    AnalyticHMoG,
    Diagonal,
    DifferentiableHMoG,
    Kind,
    Moments,
    PositiveDefinite,
    PseudoCounts,
    Scale,
    SymmetricHMoG,
    expected_statistics,
    fit_em,
    fit_online_em,
    kl_divergence,
    log_observable_density,
    log_partition,
    mean_to_natural,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
    ravel_mean,
    ravel_natural,
    register_kind,
    sample,
    split_conjugated,
    unravel_mean,
    unravel_natural,
    warm_start,
    whiten_prior,
)
from flax_hmog.analysis.inputs import geometry
from flax_hmog.model import kinds
from flax_hmog.model.kind import REPS
from flax_hmog.training import CheckpointWriter, export, load_program, restore, write_program

D, L, K = 5, 2, 3
RNG = np.random.default_rng(0)
X = (RNG.standard_normal((120, D)) + 4 * RNG.integers(0, 3, (120, 1)) * RNG.standard_normal((3, D))[0]).astype("f4")


def written_elsewhere(kind):
    """A kind of the same text under another name, registered as a user does it."""
    source = inspect.getsource(kind).replace(kind.__name__, f"Twin{kind.__name__}")
    source = source.replace(f'register_kind("{kind.name}")', f'register_kind("twin-{kind.name}")')
    scope = vars(kinds) | {"__name__": __name__}
    exec("from __future__ import annotations\n" + source, scope)
    return scope[f"Twin{kind.__name__}"]


@pytest.fixture(scope="module", params=[Scale, Diagonal, PositiveDefinite], ids=lambda kind: kind.name)
def pair(request):
    """A kind of ours, and the same from outside; other tests do not see it."""
    before = dict(REPS)
    yield request.param, written_elsewhere(request.param)
    REPS.clear()
    REPS.update(before)


@pytest.fixture(scope="module")
def fits(pair):
    return [fit_em(AnalyticHMoG(L, K, obs_rep=rep.name), X, jax.random.key(0), max_steps=5) for rep in pair]


def same(ours, theirs):
    """Two trees hold the same numbers, bit for bit."""
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def of_kind(tree, kind):
    return any(isinstance(node, kind) for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind)))


def test_fits_are_the_same_bit_for_bit(pair, fits):
    same(*((fit.natural, fit.regularizer, fit.objective_history) for fit in fits))
    assert of_kind(fits[1].natural, pair[1])
    assert not of_kind(fits[1].natural, pair[0]) or pair[0] is PositiveDefinite
    online = [fit_online_em(AnalyticHMoG(L, K, obs_rep=rep), X, jax.random.key(0), batch_size=40) for rep in pair]
    same(*((fit.natural, fit.objective_history) for fit in online))


def test_functions_of_a_model_are_the_same(pair, fits):
    for function in (
        natural_to_moments,
        natural_to_mean,
        lambda natural: mean_to_natural(natural_to_mean(natural)),
        lambda natural: expected_statistics(natural, X),
        lambda natural: whiten_prior(expected_statistics(natural, X)),
        lambda natural: PseudoCounts(noise_floor=0.9).regularizer(natural_to_moments(natural)),
        lambda natural: log_observable_density(natural, X),
        lambda natural: sample(natural, jax.random.key(0), 9),
        lambda natural: vars(geometry(natural)),
        lambda natural: kl_divergence(natural, natural),
        log_partition,
        split_conjugated,
    ):
        same(*(function(fit.natural) for fit in fits))
    assert isinstance(expected_statistics(fits[1].natural, X).observable_second_moment, pair[1])
    assert isinstance(PseudoCounts().regularizer(natural_to_moments(fits[1].natural)).noise_covariance, pair[1])


@pytest.mark.parametrize("kind_of_head", [DifferentiableHMoG, SymmetricHMoG, AnalyticHMoG])
def test_heads_checkpoints_and_programs_are_the_same(pair, fits, kind_of_head, tmp_path):
    results = []
    for rep, fit in zip(pair, fits, strict=True):
        component = "full" if rep.name.endswith("full") else rep.name  # full components are PositiveDefinite
        options = {DifferentiableHMoG: {"pst_rep": component}, SymmetricHMoG: {"lat_rep": component}}
        head = kind_of_head(L, K, D, obs_rep=rep, **options.get(kind_of_head, {}))
        variables, info = warm_start(head, fit.natural, X)
        fresh = head.init(jax.random.key(0), jnp.asarray(X))
        with CheckpointWriter(tmp_path / rep.name, head=head) as writer:
            writer.save(1, variables)
        restored = restore(tmp_path / rep.name)
        same(restored.variables, variables)
        assert restored.head == head
        write_program(export(restored, platforms=("cpu",)), tmp_path / f"{rep.name}.bin")
        natural = head.apply(variables, method="natural")
        assert isinstance(natural.observable_precision, rep)
        state = serialization.to_bytes(natural)
        same(serialization.from_bytes(jax.tree.map(jnp.zeros_like, natural), state), natural)
        flat, mean = ravel_natural(natural, head), expected_statistics(natural, X)
        back = unravel_natural(flat, head), unravel_mean(ravel_mean(mean, head), head)
        assert jax.tree.structure(back[1]) == jax.tree.structure(mean)
        program = load_program(tmp_path / f"{rep.name}.bin")(X[:4])
        results.append(
            (variables, info, head.apply(variables, X), fresh, flat, mean, back, whiten_prior(mean), program)
        )
    same(*results)


def test_errors_name_it(pair):
    name = pair[1].name
    assert DifferentiableHMoG(L, K, obs_rep=pair[1]()).obs_rep == name
    with pytest.raises(ValueError, match=rf'must be one of .*"{name}" \({pair[1].__name__}\); got \'other\''):
        DifferentiableHMoG(L, K, obs_rep="other")
    moments = Moments(jnp.ones((D, L)), jnp.zeros(D), pair[1].from_diagonal(-jnp.ones(D)), jnp.ones(1), jnp.ones((1, L)),
                      PositiveDefinite(jnp.eye(L)[None]))  # fmt: skip
    with pytest.raises(ValueError, match="`noise` must be positive"):
        moments_to_natural(moments)


def test_incomplete_kinds_and_taken_names_are_refused():
    with pytest.raises(TypeError, match="register_kind: `cls` must be a subclass of Kind; got"):
        register_kind("mine")(int)
    with pytest.raises(TypeError, match=r"`Mine` must define all that its entries need; got no cholesky, .*times"):

        @register_kind("mine")
        class Mine(Kind):
            entries: Any = None

    with pytest.raises(TypeError, match=r"`Sheared` must .*; got no product, whitened, symmetrized, check, from_leaf"):

        @register_kind("sheared")
        class Sheared(Diagonal):
            is_diagonal = False

            def dense(self):
                return super().dense()

    with pytest.raises(ValueError, match="`name` must be new; got 'diagonal', which is Diagonal"):

        @register_kind("diagonal")
        class Other(Diagonal):
            pass

    assert not {"mine", "sheared"} & set(REPS)
    assert REPS["diagonal"] is Diagonal


def test_a_posterior_of_a_kind_that_is_neither_diagonal_nor_full_is_refused():
    before = dict(REPS)
    try:
        with pytest.raises(ValueError, match="`pst_rep` must be \"full\" or of a diagonal kind; got 'twin-full'"):
            DifferentiableHMoG(L, K, pst_rep=written_elsewhere(PositiveDefinite))
    finally:
        REPS.clear()
        REPS.update(before)


def test_scale_learns_its_size_from_what_lies_beside_it():
    moments = Moments(jnp.ones((D, L)), jnp.zeros(D), Scale(0.5), jnp.ones(1), jnp.ones((1, L)),
                      PositiveDefinite(jnp.eye(L)[None]))  # fmt: skip
    assert moments.noise == Scale(0.5, D)
    natural = moments_to_natural(moments)
    assert natural.observable_precision.dim == D
    assert natural_to_moments(natural).noise.dense().shape == (D, D)
    assert jax.tree.structure(natural_to_mean(natural)) == jax.tree.structure(expected_statistics(natural, X))
    np.testing.assert_allclose(Scale(jnp.asarray([0.5, 2.0]), 3).log_det(), [3 * np.log(0.5), 3 * np.log(2)], rtol=1e-6)
    with pytest.raises(ValueError, match="Scale: `dim` must be known here; got None"):
        Scale(jnp.asarray(0.5)).log_det()
    with pytest.raises(ValueError, match=r"`noise` must have shape \(5,\); got \(4,\)"):
        moments_to_natural(Moments(*(getattr(moments, name) for name in ("loadings", "bias")), Scale(0.5, 4),
                                   *(getattr(moments, name) for name in ("weights", "means", "covariances"))))  # fmt: skip


def test_structures_of_kinds_differ(pair):
    """Those of two dataclasses with the same fields do not, and then `jit` mixes up what it compiled for them."""
    ours, theirs = (rep.from_diagonal(jnp.ones(D)) for rep in pair)
    assert jax.tree.structure(ours) != jax.tree.structure(theirs)
    assert str(ours).removeprefix(pair[0].__name__) == str(theirs).removeprefix(pair[1].__name__)
