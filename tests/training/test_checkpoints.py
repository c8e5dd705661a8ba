"""Checkpoints: everything a run needs, from the folder alone, and errors that say what is damaged."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import on_cpus

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, SymmetricHMoG
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.networks.objectives import negative_log_likelihood
from flax_hmog.training import (
    Affine,
    CheckpointError,
    CheckpointWriter,
    Preprocessing,
    create_state,
    make_mesh,
    make_train_step,
    restore,
    restore_like,
)
from flax_hmog.training.files import saved_steps

D, L, K = 6, 2, 3
HEADS = [
    DifferentiableHMoG(L, K, D, noise_bounds=(1e-4, 1e4)),
    SymmetricHMoG(L, K, obs_rep="full", lat_rep="scale"),
    AnalyticHMoG(L, K, param_dtype=jnp.float32),
    DifferentiableHMoG(L, 1),  # its log-odds have no entries
]


class Projection(nn.Module):
    """A user's own encoder."""

    features: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((16, D)).astype(np.float32)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: f"{type(head).__name__}-{head.n_components}")
def test_a_checkpoint_restores_from_its_folder_alone(head, x, tmp_path):
    variables = head.init(jax.random.key(0), x)
    preprocessing = Preprocessing((Affine.constant(D, offset=1.0, scale=2.0),), D)
    with CheckpointWriter(tmp_path, head=head, config={"a": [1, "b"]}, preprocessing=preprocessing) as writer:
        writer.save(3, variables, progress={"at": 1.5}, history=[{"nmi": 0.5}])
    restored = restore(tmp_path)
    assert (restored.step, restored.config, restored.progress) == (3, {"a": [1, "b"]}, {"at": 1.5})
    assert restored.history == [{"nmi": 0.5}]
    assert restored.versions["jax"] == jax.__version__
    assert restored.head == head
    got = restored.head.apply(restored.variables, x)
    jax.tree.map(np.testing.assert_array_equal, got, head.apply(variables, x))
    raw = 2 * x + 1
    np.testing.assert_allclose(restored(raw).log_density, got.log_density, rtol=1e-4, atol=1e-4)


def test_merged_components_come_back_as_clusters(x, tmp_path):
    head = HEADS[0]
    variables = head.init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=head) as writer:
        writer.save(1, variables, clusters=np.array([1, 0, 1]))
        wrong = [
            (r"\(2,\)", [0, 1]),
            ("float64", [0.0, 1.0, 1.0]),
            (r"\[-1  0  1\]", [0, -1, 1]),
            (r"\[0 2\]", [0, 2, 2]),
        ]
        for said, labels in wrong:
            with pytest.raises(
                CheckpointError, match=r"`clusters` must be whole numbers of shape \(3,\).*got.*" + said
            ):
                writer.save(2, variables, clusters=labels)
    restored = restore(tmp_path)
    of_components = dataclasses.replace(restored, clusters=None)(x)
    jax.tree.map(np.testing.assert_array_equal, of_components, head.apply(variables, x))
    p = np.exp(of_components.log_responsibilities)
    np.testing.assert_allclose(
        np.exp(restored(x).log_responsibilities), np.stack([p[:, 1], p[:, 0] + p[:, 2]], axis=1), rtol=1e-5
    )


def test_state_keeps_keys_empty_arrays_and_numbers(x, tmp_path):
    state = {"key": jax.random.key(7), "empty": jnp.zeros((0, 2)), "half": jnp.ones(3, jnp.bfloat16), "n": np.int32(4)}
    with CheckpointWriter(tmp_path, head=HEADS[0]) as writer:
        writer.save(1, HEADS[0].init(jax.random.key(0), x), state=state)
    template = state | {"key": jax.random.key(0), "half": jnp.zeros(3, jnp.bfloat16)}
    got = restore_like(template, restore(tmp_path).state, "the state")
    np.testing.assert_array_equal(jax.random.uniform(got["key"], (3,)), jax.random.uniform(state["key"], (3,)))
    assert got["empty"].shape == (0, 2)
    assert got["half"].dtype == jnp.bfloat16
    assert int(got["n"]) == 4


def test_an_encoder_of_the_library_comes_with_the_head(x, tmp_path):
    module = Clusterer(MLP(4, (8,)), DifferentiableHMoG(L, K))
    variables = module.init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=module.head, encoder=module.encoder) as writer:
        writer.save(1, variables)
    restored = restore(tmp_path)
    assert restored.encoder == module.encoder
    jax.tree.map(np.testing.assert_array_equal, restored(x), module.apply(variables, x))
    jax.tree.map(np.testing.assert_array_equal, restored.module_variables, nn.unbox(variables))
    assert restored.module == module


def test_training_goes_on_with_what_was_restored(x, tmp_path):
    """An encoder with running averages: both collections are there, and a state without one is named."""
    module = Clusterer(MLP(4, (8,), "batch"), DifferentiableHMoG(L, K))
    variables = module.init(jax.random.key(0), x)
    writer = CheckpointWriter(tmp_path, head=module.head, encoder=module.encoder)
    writer.save(1, variables)
    restored = restore(tmp_path)
    state = create_state(restored.module, restored.module_variables, optax.adam(1e-3), x, make_mesh())
    jax.tree.map(np.testing.assert_array_equal, state.variables, nn.unbox(variables))
    writer.save(2, state.variables)
    writer.close()
    assert saved_steps(tmp_path) == [1, 2]
    with pytest.raises(ValueError, match=r"'batch_stats/encoder/BatchNorm_0/mean' is missing\. Give what"):
        create_state(module, {"params": variables["params"]}, optax.adam(1e-3), x, make_mesh())


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (nn.remat(MLP, static_argnums=2)(4), "apply transformations as nn.remat within"),
        (nn.Dense(4, kernel_init=nn.initializers.normal(2.0)), "`kernel_init` of .*Dense must be a plain JSON value"),
        (nn.Sequential([nn.Dense(4), nn.relu]), "`layers` of .*Sequential must be a plain JSON value"),
    ],
    ids=["transformed", "initializer", "function"],
)
def test_encoders_that_could_not_be_read_again_are_refused(encoder, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        CheckpointWriter(tmp_path, head=HEADS[0], encoder=encoder)


def test_code_of_others_is_imported_only_if_allowed(x, tmp_path):
    module = Clusterer(Projection(4), DifferentiableHMoG(L, K))
    variables = module.init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=module.head, encoder=module.encoder) as writer:
        writer.save(1, variables)
    restored = restore(tmp_path)
    assert restored.encoder is None
    features = module.apply(variables, x, method="features")
    want = module.apply(variables, x)
    jax.tree.map(np.testing.assert_array_equal, restored.head.apply(restored.variables, features), want)
    assert set(restored.encoder_variables["params"]["Dense_0"]) == {"bias", "kernel"}
    with pytest.raises(ValueError, match="Restore with allow_import=True"):
        restored(x)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path, allow_import=True)(x), want)


def test_an_encoder_that_cannot_be_described_is_refused(tmp_path):
    class Local(nn.Module):
        pass

    with pytest.raises(CheckpointError, match="must be of a class at the top of a module"):
        CheckpointWriter(tmp_path, head=HEADS[0], encoder=Local())


def test_the_optimiser_goes_on_where_it_stopped(x, tmp_path):
    head, optimizer, mesh = HEADS[0], optax.adam(1e-2), make_mesh()
    state = create_state(head, head.init(jax.random.key(0), x), optimizer, x, mesh)
    step = make_train_step(lambda v, x, _: (negative_log_likelihood(head.apply(v, x)), {}), state, mesh)
    for _ in range(3):
        state, _ = step(state, x)
    with CheckpointWriter(tmp_path, head=head) as writer:
        writer.save(3, {"params": state.params}, state={"opt_state": state.opt_state})
        state = step(state, x)[0]  # while the save goes on: the step donates what is being saved
    restored = restore(tmp_path)
    fresh = create_state(head, restored.variables, optimizer, x, mesh)
    saved = restore_like({"opt_state": fresh.opt_state}, restored.state, "the optimiser")
    resumed = step(fresh.replace(step=jnp.asarray(3), opt_state=saved["opt_state"]), x)[0]
    jax.tree.map(np.testing.assert_array_equal, state.params, resumed.params)


def test_the_latest_and_the_best_stay(x, tmp_path):
    variables = HEADS[0].init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=HEADS[0], best="loss", mode="min") as writer:
        for step, loss in enumerate((3.0, 1.0, 2.0, 5.0, 4.0), start=1):
            writer.save(step, variables, metrics={"loss": loss})
    assert saved_steps(tmp_path) == [2, 4, 5]
    assert restore(tmp_path).step == 5
    assert restore(tmp_path, step="best").step == 2
    # a new writer goes on from there
    with CheckpointWriter(tmp_path, head=HEADS[0], best="loss", mode="min") as writer:
        writer.save(6, variables, metrics={"loss": 9.0})
    assert saved_steps(tmp_path) == [2, 5, 6]


KILLED = """
import sys, jax, numpy as np
from flax_hmog import DifferentiableHMoG
from flax_hmog.training import CheckpointWriter
head = DifferentiableHMoG(8, 64, 512)
variables = head.init(jax.random.key(0), np.zeros((1, 512), np.float32))
with CheckpointWriter(sys.argv[1], head=head) as writer:
    for step in range(10_000):
        writer.save(step, variables, state={"step": np.int32(step)})
        print(step, flush=True)
"""


def test_a_kill_during_a_save_leaves_the_save_before(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while int(process.stdout.readline()) < 3:
        pass
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    restored = restore(tmp_path)
    assert restored.step >= 2
    assert int(restored.state["step"]) == restored.step


@pytest.fixture
def saved(x, tmp_path):
    with CheckpointWriter(tmp_path, head=HEADS[0]) as writer:
        for step in (1, 2):
            writer.save(step, HEADS[0].init(jax.random.key(step), x))
    return tmp_path


def data_files(folder, step=2):
    return sorted((p for p in (folder / str(step) / "arrays").rglob("*") if p.is_file()), key=os.path.getsize)


def test_missing_steps_and_folders_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r'`step` must be None, "best" or one of \[1, 2\]; got 5'):
        restore(saved, step=5)
    with pytest.raises(CheckpointError, match="saved with the metric"):
        restore(saved, step="best")
    with pytest.raises(CheckpointError, match=r"nowhere, which is no folder\. Check the path"):
        restore(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=rf"is one step\. Give {saved} and step=2"):
        restore(saved / "2")
    run = tmp_path / "run"
    shutil.copytree(saved / "1", run / "checkpoints" / "em" / "1")
    with pytest.raises(CheckpointError, match=rf"has none itself\. Choose one of {run}/checkpoints/em\."):
        restore(run)


def test_a_mismatch_names_the_leaf():
    arrays = {"mu/bias": np.zeros(3), "mu/means": np.zeros((2, 2))}
    with pytest.raises(CheckpointError, match=r"leaf `mu/means` of the optimiser must have shape \(2, 3\)"):
        restore_like({"mu": {"bias": np.zeros(3), "means": np.zeros((2, 3))}}, arrays, "the optimiser")
    with pytest.raises(CheckpointError, match="leaf `mu/noise` of x must be in both"):
        restore_like({"mu": {"bias": np.zeros(3), "noise": np.zeros(1)}}, {"mu/bias": np.zeros(3)}, "x")


def test_what_cannot_be_saved_is_named(x, tmp_path):
    variables = HEADS[0].init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=HEADS[0]) as writer:
        with pytest.raises(CheckpointError, match="must be plain JSON"):
            writer.save(1, variables, progress={"a": jnp.ones(2)})
        with pytest.raises(CheckpointError, match=r"leaf `state/name` must be an array; got str"):
            writer.save(1, variables, state={"name": "adam"})
        broken = jax.tree.map(lambda leaf: leaf * np.nan, nn.unbox(variables))
        with pytest.raises(CheckpointError, match=r"leaf `variables/params/bias` must be finite"):
            writer.save(1, broken)
    assert saved_steps(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "variables", "leaf"),
    [
        (HEADS[0], lambda v: v["params"], "bias"),
        (HEADS[2], lambda v: {"em": {name: v["em"][name] for name in ("model", "running")}}, "em/step"),
        (DifferentiableHMoG(L, K + 1), lambda v: v, "params/logits"),
    ],
    ids=["without their collection", "incomplete", "of another head"],
)
def test_variables_of_something_else_are_refused(module, variables, leaf, x, tmp_path):
    """What is saved can be restored."""
    made = (HEADS[0] if module.n_components != K else module).init(jax.random.key(0), x)
    with (
        CheckpointWriter(tmp_path, head=module) as writer,
        pytest.raises(CheckpointError, match=f"`variables` must be those of the head.*leaf '{leaf}'"),
    ):
        writer.save(1, variables(nn.unbox(made)))


def test_steps_only_go_up(x, tmp_path):
    variables = HEADS[0].init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=HEADS[0]) as writer:
        writer.save(0, variables)
        with pytest.raises(CheckpointError, match="above the latest, 0; got 0"):
            writer.save(0, variables)
        writer.save(5, variables)
        for step in (5, 3):
            with pytest.raises(CheckpointError, match=f"`step` must be above the latest, 5; got {step}"):
                writer.save(step, variables)
        for step in (-1, 6.5):
            with pytest.raises(CheckpointError, match=f"`step` must be a whole number from 0; got {step}"):
                writer.save(step, variables)


def test_what_the_best_is_chosen_by_must_be_a_number(x, tmp_path):
    variables = HEADS[0].init(jax.random.key(0), x)
    with CheckpointWriter(tmp_path, head=HEADS[0], best="nmi", keep=1) as writer:
        writer.save(1, variables, metrics={"nmi": 1.0})
        for metrics in ({"nmi": float("nan")}, {"ari": 1.0}):
            with pytest.raises(CheckpointError, match="`metrics` must hold a finite 'nmi'"):
                writer.save(2, variables, metrics=metrics)
        writer.save(2, variables)
        writer.save(3, variables)
    assert saved_steps(tmp_path) == [1, 3]
    for path in data_files(tmp_path, 3):
        path.unlink()
    assert restore(tmp_path, step="best").step == 1


def test_a_writer_takes_what_can_be_restored(tmp_path):
    for modules in ({"head": DifferentiableHMoG}, {"head": MLP(4)}, {}, {"module": HEADS[0], "head": HEADS[0]}):
        with pytest.raises(CheckpointError, match=r"`head` must be an instance of .*flax_hmog\.Head lists"):
            CheckpointWriter(tmp_path, **modules)
    with pytest.raises(ValueError, match='`mode` must be "max" or "min"'):
        CheckpointWriter(tmp_path, head=HEADS[0], mode="maximum")
    with pytest.raises(ValueError, match="`keep` must be"):
        CheckpointWriter(tmp_path, head=HEADS[0], keep=0)
    with pytest.raises(TypeError, match="`steps` must be of Affine"):
        Preprocessing((np.sqrt,), D)


ON_ANOTHER_MESH = """
import sys, jax, numpy as np, optax
from flax_hmog import DifferentiableHMoG
from flax_hmog.training import CheckpointWriter, create_state, make_mesh, restore, restore_like
head, x = DifferentiableHMoG(2, 4, 6), np.ones((8, 6), np.float32)
what, folder, model = sys.argv[1], sys.argv[2], int(sys.argv[3])
state = create_state(head, head.init(jax.random.key(0), x), optax.adam(1e-2), x, make_mesh(model=model), min_sharded=1)
if what == "save":
    with CheckpointWriter(folder, head=head) as writer:
        writer.save(1, {"params": state.params}, state={"opt_state": state.opt_state})
restored = restore(folder)
opt_state = restore_like({"opt_state": state.opt_state}, restored.state, "the optimiser")["opt_state"]
leaves = jax.tree.leaves(restored.variables) + jax.tree.leaves(opt_state)
spread = max(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(opt_state))
print(repr([float(np.abs(np.asarray(leaf)).sum()) for leaf in leaves]), spread)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [((8, 2), (1, 1)), ((1, 1), (8, 2)), ((8, 1), (4, 2))])
def test_a_checkpoint_restores_on_other_devices(first, then, tmp_path):
    lines = []
    for what, (devices, model) in (("save", first), ("restore", then)):
        run = subprocess.run(
            [sys.executable, "-c", ON_ANOTHER_MESH, what, str(tmp_path), str(model)],
            env=on_cpus(devices),
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-3000:]
        lines.append(run.stdout.splitlines()[-1].rsplit(" ", 1))
        assert int(lines[-1][1]) == devices
    assert lines[0][0] == lines[1][0]
