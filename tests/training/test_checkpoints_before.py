"""Checkpoints that earlier versions wrote restore, and say what they said then."""

from pathlib import Path

import jax
import numpy as np
import pytest
from dense import Dense, assert_close
from flax.serialization import from_bytes

from flax_hmog import ResidualMoments
from flax_hmog.training import restore

FOLDER = Path(__file__).parent.parent / "checkpoints_before"
OUTPUTS = np.load(FOLDER / "outputs.npz")


@pytest.mark.parametrize("name", ["differentiable", "symmetric", "analytic", "encoder"])
def test_outputs_are_those_of_then(name):
    restored = restore(FOLDER / name)
    output = restored(OUTPUTS["rows"])
    for field in ("log_density", "log_responsibilities", "latent_mean"):
        assert_close(getattr(output, field), OUTPUTS[f"{name}/{field}"], 1e-5, field)
    # and what they said is what the model says
    inputs = OUTPUTS["rows"] if restored.encoder is None else restored.features(OUTPUTS["rows"])
    assert_close(output.log_density, Dense.of_natural(restored.natural).log_density(np.asarray(inputs)), 1e-4)


def test_running_statistics_go_on_from_there():
    restored, rows = restore(FOLDER / "analytic"), OUTPUTS["rows"]
    assert isinstance(restored.variables["em"]["running"], ResidualMoments)
    _, after = restored.head.apply(restored.variables, rows, train=True, mutable=["em"])
    density = restored.head.apply(after, rows).log_density
    assert_close(density, OUTPUTS["analytic/after/log_density"], 1e-5)


def test_variables_in_bytes():
    restored = restore(FOLDER / "analytic")
    blank = jax.tree.map(np.zeros_like, restored.variables)
    read = from_bytes(blank, (FOLDER / "analytic.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, read, restored.variables)
