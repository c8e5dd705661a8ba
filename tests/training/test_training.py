"""Mesh, shardings and the train step, on one device and on several."""

import json
import logging
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from devices import on_cpus
from jax.sharding import PartitionSpec

from flax_hmog import DifferentiableHMoG
from flax_hmog.networks.objectives import negative_log_likelihood
from flax_hmog.training import TrainState, create_state, make_mesh, make_train_step, tree_shardings

D, L, K = 6, 2, 3
HEADS = [DifferentiableHMoG(L, K, D, noise_bounds=(1e-4, 1e4))]
# steps of EM and of gradients, on meshes of 1, 2, 4, 8 and 4 x 2 devices
SHARDED_RUN = """
import json, jax, optax, numpy as np
from flax_hmog import AnalyticHMoG, DifferentiableHMoG, PseudoCounts, fit_em, warm_start
from flax_hmog.training import create_state, global_rows, make_mesh, make_train_step
rng = np.random.default_rng(0)
centers = 4 * rng.standard_normal((4, 6))
rows = (centers[rng.integers(4, size=509)] + rng.standard_normal((509, 6))).astype(np.float32)
head = DifferentiableHMoG(2, 4, 6)
for devices, model in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2)):
    mesh = make_mesh(model=model, devices=jax.devices()[:devices])
    # 509 rows are a multiple of one device alone: elsewhere they are filled up with rows of weight 0
    padded = -(-509 // devices) * devices
    filled = np.concatenate([rows, np.repeat(rows[-1:], padded - 509, axis=0)])
    weights = (np.arange(padded) < 509).astype(np.float32)
    x, w = (global_rows(mesh, a.shape, lambda share, a=a: a[share]) for a in (filled, weights))
    fit = fit_em(AnalyticHMoG(2, 4, 6), x, jax.random.key(0), weights=w, max_steps=5)
    natural = jax.tree.map(np.asarray, fit.natural)
    state = create_state(head, warm_start(head, natural)[0], optax.adam(1e-2), x, mesh, min_sharded=4)
    split = sorted(name for name, leaf in state.params.items() if "model" in str(leaf.sharding.spec))
    step = make_train_step(lambda v, x, w: (-head.apply(v, x, w, method="mean_log_density"), {}), state, mesh)
    for _ in range(5):
        state, loss = step(state, x, weights)
    sums = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(state.params)]
    print(json.dumps([split, [float(loss), float(fit.objective_history[-1]), *sums]]))
"""


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((16, D)).astype(np.float32)


def test_the_step_compiles_once(x):
    head, mesh = HEADS[0], make_mesh()
    state = create_state(head, head.init(jax.random.key(0), x), optax.adam(1e-2), x, mesh)
    traces = []

    def loss(variables, batch, extra):
        traces.append(1)
        return negative_log_likelihood(head.apply(variables, batch)) + extra, {}

    step = make_train_step(loss, state, mesh)
    losses = [0.0]
    for _ in range(4):
        state, value = step(state, x, 0.5)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[4] < losses[1]


def test_a_state_of_parameters_alone_has_no_collections(x):
    variables = nn.unbox(HEADS[0].init(jax.random.key(0), x))
    state = TrainState.create(apply_fn=HEADS[0].apply, params=variables["params"], tx=optax.adam(1e-2))
    assert state.variables == variables


def test_a_loss_that_returns_something_else_is_named(x):
    head, mesh = HEADS[0], make_mesh()
    state = create_state(head, head.init(jax.random.key(0), x), optax.adam(1e-2), x, mesh)
    for result, message in ((lambda loss: loss, r"must return \(loss, collections\)"), (lambda loss: (loss, {"em": loss}),
                            r"must return the collections \[\] as the state has them; got \['em'\]")):  # fmt: skip
        step = make_train_step(
            lambda v, x, _, result=result: result(negative_log_likelihood(head.apply(v, x))), state, mesh
        )
        with pytest.raises(ValueError, match=message):
            step(state, x)


# an encoder with running averages and a head with EM in the network, on 1, 8 and 4 x 2 devices
COLLECTIONS_RUN = """
import json, jax, optax, numpy as np, flax.linen as nn
from flax_hmog import AnalyticHMoG
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.networks.objectives import negative_joint_information
from flax_hmog.training import create_state, global_rows, make_mesh, make_train_step
rows = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
module = Clusterer(MLP(4, (8,), "batch"), AnalyticHMoG(2, 3))
variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), rows))

def loss(variables, x, extra):
    output, collections = module.apply(variables, x, train=True, mutable=["batch_stats", "em"])
    return negative_joint_information(output, output), collections

for devices, model in ((1, 1), (8, 1), (8, 2)):
    mesh = make_mesh(model=model, devices=jax.devices()[:devices])
    x = global_rows(mesh, rows.shape, lambda share: rows[share])
    state = create_state(module, variables, optax.sgd(0.1), x, mesh)
    step = make_train_step(loss, state, mesh)
    for _ in range(3):
        state, value = step(state, x)
    sums = [float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(state.variables)]
    print(json.dumps([sorted(state.variables), [float(value), *sums]]))
"""


def run_on_devices(script):
    """What a script prints line by line, on eight forced devices."""
    environment = on_cpus(8)
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_collections_are_those_of_the_whole_batch_on_any_mesh():
    """Averages and EM's statistics are of all rows, wherever these lie, and part of the state."""
    results = run_on_devices(COLLECTIONS_RUN)
    assert [names for names, _ in results] == [["batch_stats", "em", "params"]] * 3
    for _, values in results[1:]:
        np.testing.assert_allclose(values, results[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_results_agree_on_any_mesh():
    """EM and gradient steps on 1, 2, 4, 8 and 4 x 2 devices; in the last, leaves are split over the second axis."""
    results = run_on_devices(SHARDED_RUN)
    leaves = ["bias", "loadings", "logits", "means", "noise", "precisions"]
    assert [split for split, _ in results] == [[], [], [], [], leaves]
    for _, values in results[1:]:
        np.testing.assert_allclose(values[:2], results[0][1][:2], rtol=2e-6)  # loss, objective
        np.testing.assert_allclose(values, results[0][1], rtol=2e-4)  # leaves, in which steps of Adam enlarge rounding


def abstract_mesh(data, model):
    return jax.sharding.AbstractMesh((data, model), ("data", "model"))


def specs(mesh, **options):
    head = DifferentiableHMoG(2, 5, 6)
    abstract = jax.eval_shape(head.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 6), np.float32))
    return {name: s.spec for name, s in tree_shardings(abstract, mesh, **options)["params"].items()}


def test_large_leaves_are_split_and_others_replicated(caplog):
    """Five components do not fit two devices: replicated, and the log says so. Small leaves are replicated silently."""
    with caplog.at_level(logging.WARNING):
        got = specs(abstract_mesh(4, 2), min_size=6)
    assert got["loadings"] == PartitionSpec("model", None)
    assert got["means"] == PartitionSpec()
    assert "means" in caplog.text
    assert "is replicated" in caplog.text
    assert "logits" not in caplog.text
    caplog.clear()
    assert set(specs(abstract_mesh(4, 2)).values()) == {PartitionSpec()}
    assert set(specs(abstract_mesh(8, 1), min_size=1).values()) == {PartitionSpec()}
    assert not caplog.text


def test_the_mesh_must_fit_the_devices():
    with pytest.raises(ValueError, match="make_mesh: `model` must divide the number of devices"):
        make_mesh(model=7, devices=jax.devices()[:1])
