"""Checkpoints and files of models where 64 bits are on when they are written, and off when they are read, or the reverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog import DifferentiableHMoG, infer, load, save
from flax_hmog.training import CheckpointError, CheckpointWriter, restore, restore_like

X = np.random.default_rng(0).normal(size=(16, 4)) + 3
STATE = {"rows": np.int64(2**40), "loss": np.float64(1e300), "count": np.int64(7), "rate": np.float64(0.1)}
SWITCH = r'Switch 64 bits on before restoring: jax.config.update\("jax_enable_x64", True\)'


def written(folder, dtype):
    """A head in this precision with its state, in both forms; its log-densities."""
    with jax.enable_x64(dtype == jnp.float64):
        head = DifferentiableHMoG(2, 3, param_dtype=dtype)
        variables = jax.jit(head.init)(jax.random.key(0), X)
        natural = jax.jit(lambda v: head.apply(v, method="natural"))(variables)
        save(natural, folder / "model.npz")
        with CheckpointWriter(folder / "run", head=head) as writer:
            writer.save(1, variables, state=STATE)
        return natural, np.asarray(infer(natural, X).log_density)


def test_saved_in_64_bits_and_read_in_32(tmp_path):
    natural, expected = written(tmp_path, jnp.float64)
    with pytest.warns(UserWarning, match=rf"saved in float64 and is restored in float32.*{SWITCH}"):
        restored = restore(tmp_path / "run")
    assert restored.head.param_dtype == jnp.float32
    assert restored(X).log_density.dtype == jnp.float32
    np.testing.assert_allclose(restored(X).log_density, expected, rtol=1e-5)
    # the state is as it was saved, in numpy; into arrays of jax goes what fits
    assert {name: (leaf.dtype, leaf[()]) for name, leaf in restored.state.items()} == {
        name: (leaf.dtype, leaf) for name, leaf in STATE.items()
    }
    for name, held in (("rows", "1099511627776 of int64"), ("loss", r"1e\+300 of float64")):
        with pytest.raises(
            CheckpointError, match=rf"leaf `{name}` of the state must fit into .*32; got {held}. {SWITCH}"
        ):
            restore_like({name: STATE[name]}, {name: restored.state[name]}, "the state")
    small = {name: restored.state[name] for name in ("count", "rate")}
    got = restore_like({"count": jnp.int32(0), "rate": jnp.float32(0)}, small, "the state")
    assert (int(got["count"]), got["rate"]) == (7, jnp.float32(0.1))

    loaded = load(tmp_path / "model.npz").natural  # exactly the one that was saved, and so after another save
    save(loaded, tmp_path / "again.npz")
    for model in (loaded, load(tmp_path / "again.npz").natural):
        jax.tree.map(np.testing.assert_array_equal, model, natural)
    with pytest.warns(UserWarning, match="truncated to dtype float32"):  # of jax, which computes in 32 bits
        np.testing.assert_allclose(infer(loaded, X).log_density, expected, rtol=1e-5)


def test_saved_in_32_bits_and_read_in_64(tmp_path):
    natural, expected = written(tmp_path, jnp.float32)
    with jax.enable_x64(True):
        restored = restore(tmp_path / "run")
        output = restored(X)
        assert output.log_density.dtype == jnp.float32  # the precision is the model's
        np.testing.assert_array_equal(output.log_density, expected)
        loaded = load(tmp_path / "model.npz").natural
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
        jax.tree.map(np.testing.assert_array_equal, loaded, natural)
        got = restore_like(STATE, restored.state, "the state")
        assert {name: leaf.item() for name, leaf in got.items()} == {name: leaf.item() for name, leaf in STATE.items()}
