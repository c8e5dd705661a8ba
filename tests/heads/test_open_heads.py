"""Heads and networks that are not ours: trained, fitted, saved, restored and exported as ours are."""

import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from own_networks import SMALL, Foreign, Inline, SphericalHMoG, Twins
from small_checkpoints import older, redescribe

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
    Head,
    HMoGOutput,
    Scale,
    SymmetricHMoG,
    fit_em,
    fit_online_em,
    initialize_moments,
    moments_to_natural,
    warm_start,
)
from flax_hmog.em.initialize import random_moments
from flax_hmog.networks import MLP, Clusterer, negative_log_likelihood
from flax_hmog.training import (
    Affine,
    CheckpointError,
    CheckpointWriter,
    Preprocessing,
    create_state,
    export,
    load_program,
    make_mesh,
    make_train_step,
    restore,
    write_program,
)

D = 6
X = np.random.default_rng(0).standard_normal((40, D)).astype(np.float32)
KEY = jax.random.key(0)


def save(folder, module, variables, **options):
    with CheckpointWriter(folder, module, **options) as writer:
        writer.save(1, variables)
    return folder


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want):
    """To rounding: what is compiled for other numbers of rows may add in another order."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.parametrize(
    "head", [DifferentiableHMoG(2, 3), SymmetricHMoG(2, 3), AnalyticHMoG(2, 3), SphericalHMoG(2, 3), Foreign(2, 3, D)]
)
def test_what_fulfils_the_protocol_is_a_head(head):
    assert isinstance(head, Head)
    for other in (MLP(4), Clusterer(MLP(4), head), Inline(), None, {}):
        assert not isinstance(other, Head)
    with pytest.raises(TypeError, match=r"fit_em: `head` must be a head, .* what flax_hmog\.HeadSizes lists; got MLP"):
        fit_em(MLP(4), X, KEY)


@pytest.mark.one_device(reason="a train state on a mesh of its own")
def test_a_subclass_of_a_head_is_saved_with_its_default(tmp_path):
    head = SphericalHMoG(2, 3)
    optimizer = optax.adam(1e-2)
    variables, _ = warm_start(head, moments_to_natural(random_moments(KEY, D, 2, 3, Scale)))
    state = create_state(head, variables, optimizer, X, make_mesh())
    step = make_train_step(lambda v, x, _: (negative_log_likelihood(head.apply(v, x)), {}), state, make_mesh())
    state, _ = step(state, X)
    with CheckpointWriter(tmp_path, head=head) as writer:
        writer.save(1, state.variables, clusters=[0, 1, 1])
    restored = restore(tmp_path, allow_import=True)
    assert type(restored.head) is SphericalHMoG
    assert restored.head == head
    equal(restored.variables, state.variables)
    assert restored(X).log_responsibilities.shape == (40, 2)
    got = export(restored, platforms=("cpu",))(X)
    np.testing.assert_allclose(got["log_density"], head.apply(state.variables, X).log_density, rtol=1e-4, atol=1e-4)
    # not imported: the arrays are there
    closed = restore(tmp_path)
    assert closed.head is closed.module is None
    equal(closed.module_variables, state.variables)
    with pytest.raises(ValueError, match=r"Restore with allow_import=True .* or with module="):
        closed(X)


def test_a_head_of_others_is_fitted_saved_and_exported(tmp_path):
    head = Foreign(2, 3, D)
    variables = head.init(KEY, X)
    save(tmp_path, head, variables)
    restored = restore(tmp_path, allow_import="own_networks:Foreign")
    assert restored.head == restored.module == head
    close(restored(X), head.apply(variables, X))
    equal(restored.natural.interaction, head.apply(variables, method="natural").interaction)
    got = export(restored, platforms=("cpu",))(X)
    np.testing.assert_allclose(got["log_density"], restored(X).log_density, rtol=1e-4, atol=1e-4)
    assert initialize_moments(head, X, KEY).loadings.shape == (D, 2)
    fit = fit_em(head, X, KEY, max_steps=2).natural
    assert fit_online_em(head, X, KEY, batch_size=20, passes=1).natural.interaction.shape == (D, 2)
    with pytest.raises(
        TypeError, match=r"warm_start: `head` must be one of ours, or have a method `start`.*got Foreign"
    ):
        warm_start(head, fit)
    module = Clusterer(MLP(D), head)
    save(tmp_path / "encoder", None, module.init(KEY, X), head=head, encoder=module.encoder)
    assert restore(tmp_path / "encoder", allow_import=True).module == module


class Started(Foreign):
    """A head of others that says how it is started."""

    def start(self, moments):
        return {"params": {"shift": jnp.asarray(moments.bias, self.param_dtype)}}


def test_a_head_of_others_says_how_it_is_started():
    fit = fit_em(AnalyticHMoG(2, 3), X, KEY, max_steps=2).natural
    with pytest.warns(UserWarning, match="warm_start: Started must hold the model"):
        variables, info = warm_start(Started(2, 3, D), fit, X)
    np.testing.assert_allclose(variables["params"]["shift"], X.mean(axis=0), atol=0.3)
    after = Started(2, 3, D).apply(variables, X).log_density.mean()
    np.testing.assert_allclose(info.log_likelihood_after, after, rtol=1e-5)


@pytest.mark.parametrize(
    ("module", "place"),
    [(Inline((8, 5)), "DifferentiableHMoG_0"), (SMALL, "hidden_clusters")],
    ids=["compact", "setup"],
)
def test_a_network_of_ones_own_comes_back_whole(module, place, tmp_path):
    preprocessing = Preprocessing((Affine.constant(D, scale=2.0),), D)
    variables = nn.unbox(module.init(KEY, X))
    save(tmp_path, module, variables, preprocessing=preprocessing, config={"a": 1})
    restored = restore(tmp_path, allow_import=True)
    assert restored.module == module
    assert restored.place == place
    equal(restored.module_variables, variables)
    want = module.apply(variables, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), restored(2 * X), want)
    write_program(export(restored), tmp_path / "program")
    got = load_program(tmp_path / "program")(2 * X)
    want, got = (want, got) if place != "hidden_clusters" else (want["output"], got["output"])
    np.testing.assert_allclose(got["log_density"], want.log_density, rtol=1e-3, atol=1e-3)
    # without its code: the head, and what it takes
    closed = restore(tmp_path)
    assert closed.module is None
    assert closed.head == restored.head
    equal(closed.head.apply(closed.variables, X[:, :4]), restored.head.apply(restored.variables, X[:, :4]))
    equal(jax.tree.leaves(closed.natural), jax.tree.leaves(restored.natural))


def test_a_network_of_ones_own_is_trained_and_goes_on(tmp_path):
    module, optimizer, mesh = Inline(), optax.adam(1e-2), make_mesh()
    state = create_state(module, module.init(KEY, X), optimizer, X, mesh)
    step = make_train_step(lambda v, x, _: (negative_log_likelihood(module.apply(v, x)), {}), state, mesh)
    state, _ = step(state, X)
    save(tmp_path, module, state.variables, inputs=X)
    restored = restore(tmp_path, allow_import="own_networks:Inline")
    assert isinstance(restored(X), HMoGOutput)
    again = create_state(restored.module, restored.module_variables, optimizer, X, mesh)
    equal(again.params, state.params)


def test_heads_in_fields_and_setup_are_found_without_inputs(tmp_path):
    variables = SMALL.init(KEY, X)
    restored = restore(save(tmp_path, SMALL, variables), allow_import=True)
    assert (restored.place, restored.inputs) == ("hidden_clusters", None)
    close(restored(X), SMALL.apply(variables, X))
    close(restored.features(X), SMALL.apply(variables, X, method="features"))
    with pytest.raises(ValueError, match="export: `inputs` must be rows"):
        export(restored)
    assert export(restored, inputs=X, platforms=("cpu",))(X)["output"]["assignment"].shape == (40,)


def test_of_several_heads_one_is_named(tmp_path):
    variables = Twins().init(KEY, X)
    with pytest.raises(CheckpointError, match=r"one of the heads in Twins, \['left', 'right'\]; got None\. Choose one"):
        save(tmp_path, Twins(), variables)
    restored = restore(save(tmp_path, Twins(), variables, head="right", inputs=X), allow_import=True)
    assert restored.head == AnalyticHMoG(2, 4)
    close(restored(X), Twins().apply(variables, X))
    assert set(export(restored, platforms=("cpu",))(X)[0]) >= {"log_density", "assignment"}


def test_what_is_wrong_with_a_network_is_named(tmp_path):
    variables = nn.unbox(Inline().init(KEY, X))
    with pytest.raises(CheckpointError, match=r"the heads in Inline, \[\]; got None.* found with inputs=x"):
        save(tmp_path, Inline(), variables)
    with pytest.raises(CheckpointError, match="`variables` must be those of `module`, and `inputs` what it takes"):
        save(tmp_path, Inline((5,)), variables, inputs=X)
    more = {"params": variables["params"] | {"Dense_9": variables["params"]["Dense_0"]}}
    with pytest.raises(CheckpointError, match=r"`variables` must be those of `module`.*leaf 'params/Dense_9/bias'"):
        save(tmp_path, Inline(), more, inputs=X)
    save(tmp_path, Inline(), variables, inputs=X)
    with pytest.raises(CheckpointError, match=r"leaf `params/Dense_0/bias` of variables must have shape \(5,\)"):
        restore(tmp_path, module=Inline((5,)))
    with pytest.raises(TypeError, match=r"restore: `module` must be Module; got .*\. Give an instance"):
        restore(tmp_path, module=Inline)
    with pytest.raises(CheckpointError, match="the module must be own_networks:Foreign, as `allow_import` says; got"):
        restore(tmp_path, allow_import="own_networks:Foreign")


def test_several_paths_may_be_allowed(tmp_path):
    module = Clusterer(MLP(4), SphericalHMoG(2, 3))
    save(tmp_path, module, module.init(KEY, X))
    allowed = ["own_networks:Foreign", "own_networks:SphericalHMoG"]
    assert restore(tmp_path, allow_import=allowed).module == module


def test_only_linen_modules_are_called(tmp_path):
    module = SMALL
    save(tmp_path, module, module.init(KEY, X))
    for path, said in (("os:system", "must be a linen module; got os:system"), ("os:nothing", "must be importable")):
        redescribe(tmp_path / "1", lambda d, path=path: d["module"]["arguments"]["parts"][0].update({"class": path}))
        assert restore(tmp_path).module is None
        with pytest.raises(CheckpointError, match=said):
            restore(tmp_path, allow_import=True)


def test_a_class_that_cannot_be_imported_is_given(tmp_path):
    class Local(nn.Module):
        @nn.compact
        def __call__(self, x):
            return DifferentiableHMoG(2, 3)(nn.Dense(4)(x))

    variables = Local().init(KEY, X)
    with pytest.raises(
        CheckpointError, match=r"got test_open_heads:.*Local\. Put the class into a module file.*describe"
    ):
        CheckpointWriter(tmp_path, Local(), inputs=X)
    save(tmp_path, Local(), variables, inputs=X, describe=False)
    closed = restore(tmp_path, allow_import=True)
    assert closed.module is None
    assert closed.head == DifferentiableHMoG(2, 3)
    restored = restore(tmp_path, module=Local())
    close(restored(X), Local().apply(variables, X))
    assert export(restored, platforms=("cpu",))(X)["assignment"].shape == (40,)


NOTEBOOK = """
import sys, jax, json, numpy as np, flax.linen as nn
from flax_hmog import DifferentiableHMoG
from flax_hmog.training import CheckpointError, CheckpointWriter, restore
class Mine(nn.Module):
    @nn.compact
    def __call__(self, x):
        return DifferentiableHMoG(2, 3)(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])(x))
x = np.ones((5, 6), np.float32)
variables = Mine().init(jax.random.key(0), x)
try:
    CheckpointWriter(sys.argv[1], Mine())
except CheckpointError as error:
    said = str(error)
with CheckpointWriter(sys.argv[1], Mine(), inputs=x, describe=False) as writer:
    writer.save(1, variables)
same = np.array_equal(restore(sys.argv[1], module=Mine())(x).log_density, Mine().apply(variables, x).log_density)
print(json.dumps([said, bool(same)]))
"""


def test_a_notebook_gives_its_module(tmp_path):
    run = subprocess.run([sys.executable, "-c", NOTEBOOK, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    said, same = json.loads(run.stdout)
    assert "got __main__:Mine. Put the class into a module file" in said
    assert "restore(path, module=...)" in said
    assert same


def test_checkpoints_of_a_head_and_an_encoder_restore(tmp_path):
    """Of the format before, which held these two."""
    for name, module in (
        ("head", AnalyticHMoG(2, 3)),
        ("encoder", Clusterer(MLP(4, (8,), "batch"), AnalyticHMoG(2, 3))),
    ):
        variables = nn.unbox(module.init(KEY, X))
        folder = save(tmp_path / name, module, variables)
        older(folder / "1", version=5)
        restored = restore(folder)
        assert restored.module == module
        equal(restored.module_variables, variables)
        close(restored(X), module.apply(variables, X))
