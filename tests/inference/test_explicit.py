"""Meshes whose axes are Auto, Explicit (JAX's default) or Manual, of any name: results are those of one device."""

import json
import subprocess
import sys

import pytest
from devices import on_cpus

ON_DEVICES = """
import json, sys, tempfile, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from flax import linen as nn, nnx
from flax_hmog import *
from flax_hmog import nnx as native
from flax_hmog.data import rows
from flax_hmog.networks import merge_output, negative_joint_information
from flax_hmog.training import CheckpointWriter, create_state, make_train_step, restore

rows.MIN_ROWS = rows.MAX_ROWS = 16  # so that a device has several blocks
D, L, K = 4, 2, 2
analytic, heads = AnalyticHMoG(L, K, D), [DifferentiableHMoG(L, K, D), SymmetricHMoG(L, K, D)]
draws = np.random.default_rng(0).standard_normal((128, D)).astype(np.float32) * np.arange(1, D + 1, dtype=np.float32)
natural = moments_to_natural(initialize_moments(analytic, draws, jax.random.key(0)))
analytic_variables = warm_start(analytic, natural)[0]
given = [(head, warm_start(head, natural, draws)[0]) for head in heads]
gaps_in_rows = np.where(np.arange(D) == np.arange(128)[:, None] % 9, np.nan, draws)
folder = tempfile.mkdtemp()

def results(x, mesh):
    loss = lambda head: lambda variables, x: -head.apply(variables, x, method="mean_log_density")
    trees = {
        "infer": infer(natural, x),
        "infer in jit": jax.jit(infer)(natural, x),
        "gradient": jax.grad(mean_log_density)(natural, x),
        "gradient of rows": jax.jit(jax.grad(mean_log_density, argnums=1))(natural, x),
        "em_step": em_step(natural, x)[0],
        "fit_em": fit_em(analytic, x, jax.random.key(0), max_steps=2).natural,
        "init": nn.unbox(jax.jit(analytic.init)(jax.random.key(0), x))["em"]["model"],
        "step of EM": analytic.apply(analytic_variables, x, train=True, mutable=["em"])[1],
        "nnx": native.from_linen(*given[0])(x),
    }
    for head, variables in given:
        name = type(head).__name__
        trees[name] = head.apply(variables, x)
        trees[name + ", gradient in jit"] = jax.jit(jax.grad(loss(head)))(variables, x)
    head, variables = given[0]
    state = create_state(head, variables, optax.sgd(1e-2), draws, mesh, min_sharded=1)
    step = make_train_step(lambda variables, x, _: (loss(head)(variables, x), {}), state, mesh)
    trees["train step"] = step(state, draws)[0].params
    states, key = [], jax.random.key(0)
    fit_em(analytic, x, key, max_steps=2, on_step=states.append)
    state = next(state for state in states if state.natural is not None)
    trees["fit_em, resumed"] = fit_em(analytic, x, key, max_steps=2, state=state).natural
    trees["penalty"] = penalty(state.natural, state.regularizer)
    trees["merged"] = merge_output(trees["infer"], [0, 0], 1)
    trees["joint information"] = negative_joint_information(trees["infer"], trees["infer"])
    trees["warm_start"] = warm_start(head, natural, x)[0]
    return trees

def of_the_host():
    # rows of the host, which may miss entries, and checkpoints
    trees, (head, variables) = {}, given[0]
    fitted = fit_em(analytic, draws, jax.random.key(0), max_steps=2).natural  # rows of the host
    trees["rows of the host"] = fitted, infer(fitted, draws)
    trees["missing"] = infer(fitted, gaps_in_rows, missing="nan"), impute(fitted, gaps_in_rows).mean
    trees["fit_online_em"] = fit_online_em(analytic, draws, jax.random.key(0), passes=1, batch_size=64).natural
    with CheckpointWriter(tempfile.mkdtemp(dir=folder), head=head) as writer:
        writer.save(1, variables)
    trees["restore"] = restore(writer.folder)(draws)
    return trees

def gaps(got, want):
    gap = lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)) / (1 + np.abs(np.asarray(b)))))
    leaves = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return {name: max(map(gap, leaves(got[name]), leaves(want[name]))) for name in want}

want = results(jnp.asarray(draws), jax.make_mesh((1,), ("one",), (AxisType.Auto,), devices=jax.devices()[:1]))
want |= of_the_host()
report = {}
for shape, kind in (((1,), "Explicit"), ((2, 2), "Auto"), ((2, 2), "Explicit")):
    count, names = int(np.prod(shape)), ("one", "model")[:len(shape)]
    mesh = jax.make_mesh(shape, names, (getattr(AxisType, kind),) * len(shape), devices=jax.devices()[:count])
    x = jax.device_put(draws, NamedSharding(mesh, P(names)))
    with jax.set_mesh(mesh):
        got = results(x, mesh)
        if (count, kind) == (4, "Explicit"):
            got |= of_the_host()
        if count > 1:
            sharding = got["infer"].latent_mean.sharding
            assert sharding.mesh == mesh and sharding.is_equivalent_to(NamedSharding(mesh, P(names)), 2), sharding
        infer(got["fit_em"], x)  # a fit goes with its rows
        infer(natural, x)
        once = infer.__wrapped__.__globals__["_by_blocks"]._cache_size()
        infer(natural, x)
        assert infer.__wrapped__.__globals__["_by_blocks"]._cache_size() == once
    infer(got["fit_em"], x), jax.grad(mean_log_density)(natural, x)  # out of the scope of the mesh
    report[f"{kind} {shape}"] = gaps(got, {name: want[name] for name in got})
    own = lambda f, out: jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P(), P(names)), out_specs=out))
    mean = lambda natural, x: jax.lax.pmean(mean_log_density(natural, x), names)
    manual = {
        "infer": own(infer, P(names))(natural, x),
        "gradient": own(lambda natural, x: jax.grad(mean)(natural, x), P())(natural, x),
        "nnx": own(given[0][0].apply, P(names))(given[0][1], x),
    }
    report[f"Manual, {kind} {shape}"] = gaps(manual, {name: want[name] for name in manual})
print(json.dumps(report))
"""


@pytest.mark.slow
def test_results_are_those_of_one_device():
    """On one of a process, and on four of a mesh of two axes; test_sharding.py has one axis over eight."""
    run = subprocess.run(
        [sys.executable, "-c", ON_DEVICES], env=on_cpus(4), capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert len(report) == 6
    for kind, gaps in report.items():
        for name, gap in gaps.items():
            assert gap < 2e-4, (kind, name)
