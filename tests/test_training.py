"""Mesh, train step and checkpoints."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG
from flax_hmog.objectives import negative_log_likelihood
from flax_hmog.training import (
    Affine,
    CheckpointError,
    CheckpointWriter,
    create_state,
    make_mesh,
    make_train_step,
    restore,
)
from flax_hmog.training.checkpoints import restore_like, saved_steps

D, L, K = 6, 2, 3
HEADS = [
    DifferentiableHMoG(L, K, D, noise_bounds=(1e-4, 1e4)),
    SymmetricHMoG(L, K, obs_rep="full", lat_rep="scale"),
    AnalyticHMoG(L, K),
]
SHARDED_RUN = """
import jax, optax, numpy as np
from flax_hmog import DifferentiableHMoG
from flax_hmog.training import create_state, make_mesh, make_train_step
head = DifferentiableHMoG(2, 4, 6)
x = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
for devices, model in ((1, 1), (8, 1), (8, 2)):
    mesh = make_mesh(model=model, devices=jax.devices()[:devices])
    state = create_state(head, head.init(jax.random.key(0), x), optax.adam(1e-2), x, mesh)
    step = make_train_step(lambda p, x, _: -head.apply({"params": p}, x).log_density.mean(), state, mesh)
    for _ in range(5):
        state, loss = step(state, x)
    print(repr([float(loss), *(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(state.params))]))
"""


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((16, D)).astype(np.float32)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_a_checkpoint_restores_from_its_folder_alone(head, x, tmp_path):
    variables = head.init(jax.random.key(0), x)
    preprocessing = Affine.constant(D, offset=1.0, scale=2.0)
    with CheckpointWriter(tmp_path, head=head, config={"a": [1, "b"]}, preprocessing=preprocessing) as writer:
        writer.save(3, variables, metrics={"history": [1.5]})
    restored = restore(tmp_path)
    assert (restored.step, restored.config, restored.metrics) == (3, {"a": [1, "b"]}, {"history": [1.5]})
    assert restored.head == head
    got = restored.head.apply(restored.variables, x)
    jax.tree.map(np.testing.assert_array_equal, got, head.apply(variables, x))
    np.testing.assert_allclose(restored.preprocessing(np.full((2, D), 5.0)), 2.0)


def test_the_optimiser_goes_on_where_it_stopped(x, tmp_path):
    head, optimizer, mesh = HEADS[0], optax.adam(1e-2), make_mesh()
    state = create_state(head, head.init(jax.random.key(0), x), optimizer, x, mesh)
    step = make_train_step(lambda p, x, _: negative_log_likelihood(head.apply({"params": p}, x)), state, mesh)
    for _ in range(3):
        state, _ = step(state, x)
    with CheckpointWriter(tmp_path, head=head, config={}) as writer:
        writer.save(3, {"params": state.params}, opt_state=state.opt_state)
    restored = restore(tmp_path)
    fresh = create_state(head, restored.variables, optimizer, x, mesh)
    fresh = fresh.replace(step=jnp.asarray(3), opt_state=restore_like(fresh.opt_state, restored.opt_state, "opt_state"))
    straight, resumed = step(state, x)[0], step(fresh, x)[0]
    jax.tree.map(np.testing.assert_array_equal, straight.params, resumed.params)


def test_only_the_latest_two_steps_stay(x, tmp_path):
    head = HEADS[0]
    variables = head.init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=head, config={}) as writer:
        for step in (1, 2, 3):
            writer.save(step, variables)
    (tmp_path / "7").mkdir()  # an interrupted save
    assert saved_steps(tmp_path) == [2, 3]
    assert restore(tmp_path).step == 3
    assert restore(tmp_path, step=2).step == 2


@pytest.fixture
def saved(x, tmp_path):
    head = HEADS[0]
    with CheckpointWriter(tmp_path, head=head, config={}) as writer:
        writer.save(1, head.init(jax.random.key(0), x))
    return tmp_path


def test_damage_is_noticed(saved):
    largest = max((path for path in (saved / "1" / "arrays").rglob("*") if path.is_file()), key=os.path.getsize)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="restore: "):
        restore(saved)


def test_unreadable_description_is_named(saved):
    description = next(path for path in (saved / "1" / "description").iterdir())
    description.write_text("{")
    with pytest.raises(CheckpointError, match="must be readable"):
        restore(saved)


def test_missing_steps_and_folders_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold step 5; got steps \[1\]"):
        restore(saved, step=5)
    with pytest.raises(CheckpointError, match=r"got steps \[\]"):
        restore(tmp_path / "nowhere")


def test_a_mismatch_names_the_leaf():
    arrays = {"opt_state/mu/bias": np.zeros(3), "opt_state/mu/means": np.zeros((2, 2))}
    with pytest.raises(CheckpointError, match="`opt_state/mu/means` must have shape"):
        restore_like({"mu": {"bias": np.zeros(3), "means": np.zeros((2, 3))}}, arrays, "opt_state")
    with pytest.raises(CheckpointError, match="`opt_state/mu/noise` must be in both"):
        restore_like(
            {"mu": {"bias": np.zeros(3), "noise": np.zeros(1)}}, {"opt_state/mu/bias": np.zeros(3)}, "opt_state"
        )


def test_values_that_json_cannot_hold_are_named(x, tmp_path):
    with (
        CheckpointWriter(tmp_path, head=HEADS[0], config={"a": jnp.ones(2)}) as writer,
        pytest.raises(CheckpointError, match="must be plain JSON"),
    ):
        writer.save(1, HEADS[0].init(jax.random.key(0), x))


def test_the_step_compiles_once(x):
    head, mesh = HEADS[0], make_mesh()
    state = create_state(head, head.init(jax.random.key(0), x), optax.adam(1e-2), x, mesh)
    traces = []

    def loss(params, batch, extra):
        traces.append(1)
        return negative_log_likelihood(head.apply({"params": params}, batch)) + extra

    step = make_train_step(loss, state, mesh)
    losses = [0.0]
    for _ in range(4):
        state, value = step(state, x, 0.5)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[4] < losses[1]


def test_results_agree_on_one_and_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", SHARDED_RUN], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    one, *others = (np.array(json.loads(line)) for line in run.stdout.splitlines())
    for other in others:
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=1e-5)


def test_the_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match="make_mesh: `model` must divide the number of devices"):
        make_mesh(model=7, devices=jax.devices()[:1])
