"""Models in the hands of Flax and JSON: state dicts, numbers of numpy and JAX, float64 where it is not computed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, random_moments
from flax import serialization, traverse_util

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
    PositiveDefinite,
    Prior,
    expected_statistics,
    fit_em,
    fit_online_em,
    infer,
    initialize_moments,
    moments_to_natural,
    natural_to_mean,
    posterior_at,
    prepare,
    warm_start,
)
from flax_hmog.model.kinds import pytree
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.training import CheckpointError, CheckpointWriter, restore
from flax_hmog.training.describe import current_names, named_arrays

CASE = CASES["analytic-diagonal-full-4.2.3"]
SHARED_BASE = CASES["symmetric-diagonal-diagonal-4.2.3"]
X, KEY = CASE.x(8).astype(np.float32), jax.random.key(0)
NATURAL = CASE.natural("float32")
FIT = fit_em(CASE.head("float32"), X, KEY, max_steps=1)


def same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


TREES = {
    "Natural": NATURAL,
    "Natural without its prior": dataclasses.replace(NATURAL),
    "Natural of a shared base": SHARED_BASE.natural("float32"),
    "Prepared": prepare(NATURAL, "bfloat16"),
    "Moments": random_moments(CASE),
    "Mean": natural_to_mean(NATURAL),
    "Mean of a shared base": natural_to_mean(SHARED_BASE.natural("float32")),
    "statistics": expected_statistics(NATURAL, X),
    "Regularizer": FIT.regularizer,
    "EMInfo": FIT.info,
    "HMoGOutput": infer(NATURAL, X),
    "Posterior": posterior_at(NATURAL, X),
    "WarmStartInfo": warm_start(DifferentiableHMoG(2, 3), NATURAL)[1],
    "variables of AnalyticHMoG": jax.jit(AnalyticHMoG(2, 3).init)(KEY, X),
    "a tree of them": {"best": NATURAL, "history": [FIT.info, None]},
}


@pytest.mark.parametrize("name", TREES)
def test_flax_writes_and_reads_every_class(name):
    tree = TREES[name]
    blank = jax.tree.map(np.zeros_like, tree)
    same(serialization.from_bytes(blank, serialization.to_bytes(tree)), tree)
    state = serialization.to_state_dict(tree)
    same(serialization.from_state_dict(blank, state), tree)
    flat = traverse_util.flatten_dict(state, sep="/")
    assert len([leaf for leaf in flat.values() if leaf is not None]) == len(jax.tree.leaves(tree))
    same(serialization.from_state_dict(blank, traverse_util.unflatten_dict(flat, sep="/")), tree)


def test_the_state_has_the_fields_by_name():
    state = serialization.to_state_dict(NATURAL)
    assert set(state) == {field.name for field in dataclasses.fields(NATURAL)}
    np.testing.assert_array_equal(state["prior"]["precision"]["entries"], NATURAL.prior.precision.entries)


def test_none_stays_none_and_is_filled_by_the_type_of_a_field():
    bare = TREES["Natural without its prior"]
    assert serialization.from_bytes(NATURAL, serialization.to_bytes(bare)).prior is None
    filled = serialization.from_bytes(bare, serialization.to_bytes(NATURAL))
    assert isinstance(filled.prior, Prior)
    same(filled, NATURAL)


def test_states_of_before_the_prior_was_one_field_are_read():
    state = serialization.to_state_dict(NATURAL)
    prior = state.pop("prior")
    state |= {"prior_location": prior["location"], "prior_precision": prior["precision"]}
    same(serialization.from_state_dict(NATURAL, state | {"log_weights": prior["log_weights"]}), NATURAL)
    same(serialization.from_state_dict(NATURAL, state), dataclasses.replace(NATURAL))


def test_leaves_of_before_have_their_names_of_today():
    arrays = named_arrays({"head": NATURAL, "other": {"log_weights": 0}})
    old = {name.replace("prior/log", "log").replace("prior/", "prior_"): leaf for name, leaf in arrays.items()}
    assert "head/prior_precision/entries" in old
    assert current_names(old) == arrays
    assert current_names(arrays) == arrays


def test_states_of_other_classes_are_named():
    state = serialization.to_state_dict(NATURAL)
    with pytest.raises(
        ValueError, match=r"`state` must have the fields of Moments, loadings, .*; got observable_location"
    ):
        serialization.from_state_dict(random_moments(CASE), state)
    state.pop("interaction")
    with pytest.raises(ValueError, match="must have the fields of Natural"):
        serialization.from_state_dict(NATURAL, state)
    # a field with a default may be missing: states of before it existed
    state = serialization.to_state_dict(NATURAL)
    state.pop("prior")
    assert serialization.from_state_dict(NATURAL, state).prior is None


def test_classes_made_later_are_registered_as_well():
    @pytree
    class Later:
        a: jax.Array
        b: PositiveDefinite = None
        c: str = dataclasses.field(default="static", metadata={"static": True})

    value = Later(np.ones(2), PositiveDefinite(np.eye(2)), "kept")
    assert set(serialization.to_state_dict(value)) == {"a", "b"}
    same(serialization.from_bytes(value, serialization.to_bytes(value)), value)


# ------------------------------------------------------------------------------------------------- numbers


def test_sizes_may_be_numbers_of_numpy(tmp_path):
    head = AnalyticHMoG(np.int64(2), np.int32(3), np.uint8(4))
    assert head == AnalyticHMoG(2, 3, 4)
    assert {type(size) for size in (head.lat_dim, head.n_components, head.obs_dim)} == {int}
    bounded = DifferentiableHMoG(np.int64(2), np.int64(3), noise_bounds=(np.float32(0.5), np.float64(10)))
    for module, encoder in ((head, None), (bounded, MLP(features=np.int64(5), hidden=(np.int64(6),)))):
        folder = tmp_path / type(module).__name__
        whole = module if encoder is None else Clusterer(encoder, module)
        with CheckpointWriter(folder, head=module, encoder=encoder) as writer:
            writer.save(0, jax.jit(whole.init)(KEY, X))
        restored = restore(folder)
        assert restored.head == module
        assert restored(X).log_density.shape == (8,)
    many = fit_em(head, X, KEY, n_restarts=np.int64(2), max_steps=np.int64(1))
    assert many.restart_objectives.shape == (2,)
    fit_online_em(head, X, KEY, batch_size=np.int64(4), passes=np.int64(1))


def test_numbers_of_numpy_and_jax_are_saved(tmp_path):
    variables = AnalyticHMoG(2, 3).init(KEY, X)
    config = {"rate": np.float32(0.5), "sizes": (np.int64(2), jnp.array(3)), np.int64(7): np.bool_(True)}
    with CheckpointWriter(tmp_path, head=AnalyticHMoG(2, 3), config=config, best="objective") as writer:
        for step, objective in enumerate((jnp.float32(1.5), np.float64(2.5), np.float32(0.5))):
            progress = {"done": np.bool_(False), "at": jnp.array(step)}
            history = [{"objective": objective}]
            writer.save(np.int64(step), variables, progress=progress, history=history, metrics={"objective": objective})
        with pytest.raises(CheckpointError, match="must be plain JSON values"):
            writer.save(9, variables, progress={"array": np.ones(2)})
    best = restore(tmp_path, step="best")
    assert (best.step, best.metrics, best.history) == (1, {"objective": 2.5}, [{"objective": 2.5}])
    assert best.progress == {"done": False, "at": 1}
    assert json.loads(json.dumps(best.config)) == {"rate": 0.5, "sizes": [2, 3], "7": True}


# ------------------------------------------------------------------------------------------------- float64

DOUBLE = AnalyticHMoG(2, 3, param_dtype="float64")


def test_float64_is_refused_where_jax_computes_in_float32():
    wide = DifferentiableHMoG(2, 3, param_dtype=jnp.float64)
    for call in (
        lambda: wide.init(KEY, X),
        lambda: DOUBLE.init(KEY, X),
        lambda: fit_em(DOUBLE, X, KEY),
        lambda: fit_online_em(DOUBLE, X, KEY),
        lambda: initialize_moments(DOUBLE, X, KEY),
        lambda: warm_start(wide, NATURAL),
    ):
        with pytest.raises(ValueError, match=r"`param_dtype` must be float32 while .* got float64\. .*jax_enable_x64"):
            call()
    with jax.enable_x64(True):
        assert fit_em(DOUBLE, X, KEY, max_steps=1).natural.interaction.dtype == np.float64


def test_a_checkpoint_in_float64_is_read_in_float32_with_a_warning(tmp_path):
    with jax.enable_x64(True):
        moments = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), random_moments(CASE))
        variables, _ = warm_start(DOUBLE, moments_to_natural(moments))
        with CheckpointWriter(tmp_path, head=DOUBLE) as writer:
            writer.save(0, variables)
        want = restore(tmp_path)(X)
        assert want.log_density.dtype == np.float64
    with pytest.warns(UserWarning, match="restore: AnalyticHMoG was saved in float64 and is restored in float32"):
        restored = restore(tmp_path)
    got = restored(X)
    assert got.log_density.dtype == np.float32
    np.testing.assert_allclose(got.log_density, want.log_density, rtol=1e-4)
