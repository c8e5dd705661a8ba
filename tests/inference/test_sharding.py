"""Passes over rows that lie on several devices: the same results, and one reduction of the size of the parameters."""

import json
import subprocess
import sys

import pytest
from devices import on_cpus

pytestmark = pytest.mark.slow

ON_EIGHT_DEVICES = """
import json, re, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec
from flax_hmog import *
from flax_hmog.data import rows, shards
from flax_hmog.em import statistics
from flax_hmog.model.prepared import prepare
from flax_hmog.training import create_state, make_mesh, make_train_step

rows.MIN_ROWS = rows.MAX_ROWS = 32
D, L, K = 12, 3, 4
head, trained = AnalyticHMoG(L, K, D), DifferentiableHMoG(L, K, D)
draws = np.random.default_rng(0).standard_normal((2048, D)).astype(np.float32) @ np.diag(np.arange(1.0, 13))
draws = draws.astype(np.float32)
natural = moments_to_natural(initialize_moments(head, draws, jax.random.key(0)))
params = warm_start(trained, natural)[0]["params"]
loss = lambda params, x, _: -trained.apply({"params": params}, x, method="mean_log_density")
collective = re.compile(r"(.*)= (\\(?.*?\\)?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)")

def results(x):
    gradient = jax.grad(lambda params, x: loss(params, x, None), argnums=(0, 1))
    trees = {
        "expected_statistics": expected_statistics(natural, x),
        "infer": infer(natural, x),
        "gradient": gradient(params, x),
        "gradient of rows": jax.grad(lambda x: jnp.mean(infer(natural, x).latent_mean ** 2))(x),
        "fit_em": fit_em(head, x, jax.random.key(0), max_steps=3).natural,
        "fit_online_em": fit_online_em(head, x, jax.random.key(0), init=natural, passes=1).natural,
    }
    return {name: [np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for name, tree in trees.items()}

def collectives(compiled):
    '''Kind and bytes of every collective of a program.'''
    found = []
    for line in compiled.as_text().splitlines():
        if match := collective.match(line):
            shapes = re.findall(r"f32\\[([\\d,]*)\\]", match[2])
            found.append((match[3], sum(4 * int(np.prod([int(n) for n in s.split(",") if n] or [1])) for s in shapes)))
    return found

report = {}
want = results(jnp.asarray(draws))
for model in (1, 2):
    mesh = make_mesh(model=model)
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    got = results(jax.device_put(draws, over_data))
    gap = {
        name: max(float(np.max(np.abs(a - b) / (1 + np.abs(b)))) for a, b in zip(got[name], want[name])) for name in want
    }
    factors = prepare(natural)
    passes = {}
    for count in (2048, 8192):
        x = jax.device_put(np.resize(draws, (count, D)), over_data)
        weights = jax.device_put(np.ones(count, np.float32), over_data)
        lowered = statistics.accumulate.lower(factors, x, weights, shards=shards.row_shards(x))
        passes[count] = collectives(lowered.compile())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(statistics.accumulate(factors, x, weights)))
    report[model] = {"gap": gap, "passes": passes, "statistics": size}

mesh = make_mesh()
step_collectives = []
for count in (2048, 8192):
    x = jax.device_put(np.resize(draws, (count, D)), NamedSharding(mesh, PartitionSpec("data")))
    state = create_state(trained, {"params": params}, optax.adam(1e-2), x, mesh)
    step = make_train_step(lambda v, x, extra: (loss(v["params"], x, extra), {}), state, mesh)
    step_collectives.append(collectives(jax.jit(step).lower(state, x).compile()))
# the caller's variables outlive a step; axes may be explicit, too
state, _ = step(state, x)
assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
explicit = jax.device_put(draws, NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data")))
report["explicit"] = float(np.max(np.abs(np.asarray(infer(natural, explicit).log_density) - want["infer"][0])))
mean_log_density(natural, explicit), em_step(natural, explicit), fit_em(head, explicit, jax.random.key(0), max_steps=1)
report["NaN"] = []
for row in (0, 1500):
    weights = jax.device_put(np.where(np.arange(2048) == row, np.nan, 1).astype(np.float32), over_data)
    try:
        report["NaN"].append(str(mean_log_density(natural, x[:2048], weights)))
    except ValueError as error:
        report["NaN"].append(str(error))
report["step"] = {"collectives": step_collectives, "statistics": size}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report():
    environment = on_cpus(8)
    run = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["1", "2"])
def test_results_are_those_of_one_device(report, model):
    """To float32 rounding, which gradients of noise and three EM steps enlarge."""
    tolerance = {"gradient": 2e-4, "fit_em": 1e-3, "fit_online_em": 1e-3}
    for name, gap in report[model]["gap"].items():
        assert gap < tolerance.get(name, 1e-5), name


@pytest.mark.parametrize("model", ["1", "2"])
def test_a_pass_reduces_its_statistics_once(report, model):
    """Nothing else crosses devices, whatever the number of rows."""
    short, long = report[model]["passes"].values()
    assert [kind for kind, _ in short] == ["all-reduce"]
    assert short == long
    assert 0 < short[0][1] <= 1.1 * report[model]["statistics"]


def test_a_gradient_step_reduces_its_statistics_once(report):
    short, long = report["step"]["collectives"]
    assert short == long
    assert {kind for kind, _ in short} == {"all-reduce"}
    assert sum(size for _, size in short) <= 1.1 * report["step"]["statistics"]


def test_axes_of_a_mesh_may_be_explicit(report):
    assert report["explicit"] < 1e-4


def test_a_weight_that_is_nan_is_noticed_on_every_device(report):
    """`jnp.max` of a sharded array on CPUs gives the largest number of the other devices."""
    assert len(report["NaN"]) == 2
    assert all("`weights` must be finite" in got for got in report["NaN"]), report["NaN"]
