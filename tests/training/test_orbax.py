"""Checkpoints of ours read by orbax alone, in both of its APIs; those of orbax taken over; states of other libraries."""

import json

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.experimental import v1
from small_checkpoints import HEAD, X

from flax_hmog.training import CheckpointError, CheckpointWriter, restore, restore_like
from flax_hmog.training.describe import named_arrays

VARIABLES = nn.unbox(jax.jit(HEAD.init)(jax.random.key(0), X))
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-2, 0.0, 9)))


def batches():
    return iter(grain.MapDataset.source(X).seed(3).shuffle().repeat(2).batch(4).to_iter_dataset())


@jax.jit
def train(params, state, rows):
    gradients = jax.grad(lambda params: -HEAD.apply({"params": params}, rows).log_density.mean())(params)
    updates, state = OPTIMIZER.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run that was saved after three steps, and its parameters two steps later."""
    folder = tmp_path_factory.mktemp("run") / "saved"
    params, rows = jax.tree.map(jnp.copy, VARIABLES["params"]), batches()
    state = OPTIMIZER.init(params)
    with CheckpointWriter(folder, head=HEAD) as writer:
        for step in range(1, 6):
            params, state = train(params, state, next(rows))
            if step == 3:
                writer.save(3, {"params": params}, state={"opt": state}, progress={"rows": rows.get_state()})
    return folder, params


def test_optax_and_grain_go_on_where_they_were(run):
    folder, expected = run
    restored, rows = restore(folder), batches()
    params = restored.variables["params"]
    state = restore_like({"opt": OPTIMIZER.init(params)}, restored.state, "the optimiser")["opt"]
    rows.set_state(restored.progress["rows"])
    for _ in range(2):
        params, state = train(params, state, next(rows))
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_orbax_alone_reads_a_step(run):
    """Under both of its APIs, as docs/checkpoints.md says."""
    folder, restored = run[0] / "3", restore(run[0])
    want = named_arrays({"variables": restored.variables}) | {f"state/{name}": a for name, a in restored.state.items()}
    items = {"arrays": ocp.StandardCheckpointHandler(), "description": ocp.JsonCheckpointHandler()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**items)) as checkpointer:
        args = {"arrays": ocp.args.StandardRestore(), "description": ocp.args.JsonRestore()}
        of_today = dict(checkpointer.restore(folder, args=ocp.args.Composite(**args)))
    for read in (of_today, v1.load_checkpointables(folder), {"arrays": v1.load(folder)}):
        assert read["arrays"].keys() == want.keys()
        jax.tree.map(np.testing.assert_array_equal, read["arrays"], want)
        if "description" in read:
            assert read["description"] == json.loads((folder / "description" / "metadata").read_text())


@pytest.mark.parametrize("api", ["today", "v1"])
def test_a_checkpoint_of_orbax_is_named_and_taken_over(api, tmp_path):
    path = tmp_path / "orbax" / "1"
    if api == "v1":
        v1.save(path, VARIABLES)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, VARIABLES)
    with pytest.raises(CheckpointError, match=r"got a checkpoint of orbax without a description.*CheckpointWriter"):
        restore(path.parent)
    like = jax.tree.map(np.zeros_like, VARIABLES)
    if api == "v1":
        read = v1.load(path, like)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            read = checkpointer.restore(path, like)
    with CheckpointWriter(tmp_path / "ours", head=HEAD) as writer:
        writer.save(1, read)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "ours").variables, dict(VARIABLES))
