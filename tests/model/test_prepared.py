"""A model prepared once: taken wherever a model is, jittable when restored, compiled for few batch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from dense import assert_close

import flax_hmog
from flax_hmog import AnalyticHMoG, PseudoCounts, em_step, natural_to_moments, prepare, warm_start
from flax_hmog.analysis import cluster_prototypes, component_distances
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.training import Affine, CheckpointWriter, Preprocessing, restore

CASE = CASES["analytic-diagonal-full-4.2.3"]
X = CASE.x(40).astype(np.float32)
OF_DATA = (
    "infer", "infer_blocks", "log_observable_density", "posterior_at", "posterior_categorical", "latent_mean",
    "posterior_soft_assignments", "posterior_hard_assignment", "expected_statistics", "mean_log_density",
)  # fmt: skip
OF_MODEL = ("natural_to_moments", "natural_to_mean", "log_partition", "split_conjugated", "in_units_of_x")


def same(got, want, tolerance=1e-5):
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance), got, want)


@pytest.mark.parametrize("name", OF_DATA + OF_MODEL)
def test_a_prepared_model_is_taken_wherever_a_model_is(name):
    natural, arguments = CASE.natural("float32"), (X,) if name in OF_DATA else ()
    function = getattr(flax_hmog, name)
    same(function(prepare(natural), *arguments), function(natural, *arguments))


def test_other_functions_take_a_prepared_model():
    natural = CASE.natural("float32")
    prepared, moments = prepare(natural), natural_to_moments(natural)
    strength, key = PseudoCounts().regularizer(moments), jax.random.key(0)
    same(flax_hmog.sample(prepared, key, 5), flax_hmog.sample(natural, key, 5))
    same(flax_hmog.penalty(prepared, strength), flax_hmog.penalty(natural, strength))
    same(em_step(prepared, X, None, strength), em_step(natural, X, None, strength), 1e-4)
    same(flax_hmog.kl_divergence(prepared, natural), 0.0)
    same(component_distances(prepared), component_distances(natural))
    same(cluster_prototypes(prepared), cluster_prototypes(natural))
    same(warm_start(AnalyticHMoG(2, 3), prepared), warm_start(AnalyticHMoG(2, 3), natural))
    starts = (flax_hmog.fit_em(AnalyticHMoG(2, 3), X, key, init=init, max_steps=1) for init in (prepared, natural))
    same(*(fit.natural for fit in starts), 1e-4)
    assert prepare(prepared) is prepared
    assert prepare(prepared, "bfloat16").projector.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="`projection_dtype` must be a float dtype"):
        prepare(natural, "int32")
    with pytest.raises(TypeError, match="prepare: `natural` must be Natural"):
        prepare(moments)


@pytest.mark.parametrize("with_encoder", [False, True])
def test_a_restored_model_is_jittable_and_compiles_few_sizes(tmp_path, with_encoder, compilations):
    head, encoder = AnalyticHMoG(2, 3), MLP(features=4, hidden=(5,)) if with_encoder else None
    module = head if encoder is None else Clusterer(encoder, head)
    variables = jax.jit(module.init)(jax.random.key(0), X)
    steps = Preprocessing((Affine.constant(4, offset=0.5, scale=2.0),), 4)
    with CheckpointWriter(tmp_path, head=head, encoder=encoder, preprocessing=steps) as writer:
        writer.save(0, variables, clusters=[0, 1, 0])
    restored = restore(tmp_path)
    want = restored.merged(module.apply(variables, steps(X)))
    same(restored(X), want)
    same(jax.jit(restored)(X), want)
    same(restored(jnp.asarray(X)), want)
    same(restored(X[0]), jax.tree.map(lambda leaf: leaf[0], want))
    assert restored(X[:0]).log_density.shape == (0,)
    restored(X[:8])
    for rows in (5, 6, 7):
        assert compilations(restored, X[:rows]) == 0
        same(restored(X[:rows]), jax.tree.map(lambda leaf, rows=rows: leaf[:rows], want))
    wrong = X[:5].copy()
    wrong[0, 1] = np.nan
    with pytest.raises(ValueError, match=r"got 1 entries that are not" if not with_encoder else "must be finite"):
        restored(wrong)
