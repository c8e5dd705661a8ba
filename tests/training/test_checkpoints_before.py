"""Checkpoints that earlier versions wrote restore, and say what they said then."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from dense import Dense, assert_close
from flax.serialization import from_state_dict, msgpack_restore

from flax_hmog import ResidualMoments
from flax_hmog.training import restore, restore_like
from flax_hmog.training.describe import FORMAT
from flax_hmog.training.files import UNDIGESTED

FOLDER = Path(__file__).parent.parent / "checkpoints_before"
OUTPUTS = np.load(FOLDER / "outputs.npz")


@pytest.mark.parametrize("name", ["differentiable", "symmetric", "analytic", "encoder", "format_4", "format_6"])
@pytest.mark.filterwarnings("ignore:restore. .*format_4/7 has format 4")
def test_outputs_are_those_of_then(name):
    restored = restore(FOLDER / name, allow_import="own_networks:Inline")
    output = restored(OUTPUTS["rows"])
    for field in ("log_density", "log_responsibilities", "latent_mean"):
        assert_close(getattr(output, field), OUTPUTS[f"{name}/{field}"], 5e-5, field)
    if name == "format_6":  # a network of one's own, which has no method `features`
        return
    # and what they said is what the model says
    inputs = OUTPUTS["rows"] if restored.encoder is None else restored.features(OUTPUTS["rows"])
    assert_close(output.log_density, Dense.of_natural(restored.natural).log_density(np.asarray(inputs)), 1e-4)


def test_running_statistics_go_on_from_there():
    restored, rows = restore(FOLDER / "analytic"), OUTPUTS["rows"]
    assert isinstance(restored.variables["em"]["running"], ResidualMoments)
    _, after = restored.head.apply(restored.variables, rows, train=True, mutable=["em"])
    density = restored.head.apply(after, rows).log_density
    assert_close(density, OUTPUTS["analytic/after/log_density"], 1e-5)


@pytest.mark.parametrize(("name", "step"), [("format_4", 7), ("format_6", "best")])
@pytest.mark.filterwarnings("ignore:restore. .*format_4/7 has format 4")
def test_all_else_is_as_it_was(name, step):
    """Optimiser, key, position, history, metrics, configuration and clusters."""
    restored = restore(FOLDER / name, step=step, allow_import="own_networks:Inline")
    params = restored.module_variables["params"]
    template = {"opt_state": optax.adam(1e-3).init(params), "key": jax.random.key(0)}
    state = restore_like(template, restored.state, "the run")
    assert (jax.random.key_data(state["key"]) == jax.random.key_data(jax.random.key(3))).all()
    assert jax.tree.structure(state["opt_state"][0].mu) == jax.tree.structure(params)
    said = (restored.step, restored.progress, restored.history, restored.metrics, restored.config)
    assert said == (7, {"epoch": 2}, [{"nmi": 0.5}], {"nmi": 0.5}, {"a": 1})
    assert restored.clusters.tolist() == [0, 1, 0]


def test_the_layout_of_today_is_among_them():
    """A new format comes with a fixture of its own."""
    described = [json.loads(path.read_text()) for path in FOLDER.glob("*/*/description/metadata")]
    assert {description["format"] for description in described} == set(range(UNDIGESTED, FORMAT + 1))


def test_variables_in_bytes():
    restored = restore(FOLDER / "analytic")
    blank = jax.tree.map(np.zeros_like, restored.variables)
    saved = msgpack_restore((FOLDER / "analytic.msgpack").read_bytes())
    saved["em"]["model"] = saved["em"].pop("moments")  # its name then
    read = from_state_dict(blank, saved)
    jax.tree.map(np.testing.assert_array_equal, read, restored.variables)
