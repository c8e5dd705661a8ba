"""Leaves as safetensors: every array comes back as it was, however it lay in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_hmog import natural_to_moments
from flax_hmog import nnx as heads
from flax_hmog.em.online import stepwise_start
from flax_hmog.toy import natural, variables
from flax_hmog.training import CheckpointError, load_leaves, restore_like, write_leaves
from flax_hmog.training.describe import named_arrays

safetensors = pytest.importorskip("safetensors")
W = np.arange(6.0).reshape(2, 3)


def test_arrays_of_any_layout_and_dtype_come_back(tmp_path):
    """safetensors 0.8.0 saves the bytes of a transposed array as they lie."""
    tree = {
        "transposed": W.T, "fortran": np.asfortranarray(W), "strided": W[:, ::2], "big_endian": W.astype(">f4"),
        "jax": jnp.asarray(W).T, "bfloat16": jnp.asarray(W, jnp.bfloat16).T, "scalar": np.float32(3), "step": np.int64(3),
        "empty": np.zeros((0, 3)), "mask": np.array([True]), "nested": {"kernel": W[::-1]}, "none": None,
    }  # fmt: skip
    before = dict(tree)
    write_leaves(tree, tmp_path / "leaves.safetensors")
    back = load_leaves(tmp_path / "leaves.safetensors")
    want = {name: leaf for name, leaf in tree.items() if name not in ("nested", "none")} | {"nested/kernel": W[::-1]}
    assert back.keys() == want.keys()
    for name, leaf in want.items():
        assert back[name].dtype == np.asarray(leaf).dtype.newbyteorder("="), name
        np.testing.assert_array_equal(back[name], leaf, err_msg=name)
    assert all(tree[name] is leaf for name, leaf in before.items()), "the caller's tree is as it was"


def test_models_come_back(tmp_path):
    path = tmp_path / "leaves.safetensors"
    for tree in (variables, natural):
        write_leaves(tree, path)
        jax.tree.map(np.testing.assert_array_equal, restore_like(tree, load_leaves(path), "the model"), tree)
    analytic = {"em": stepwise_start(natural_to_moments(natural))}
    before = {name.replace("em/model/", "em/moments/"): leaf for name, leaf in named_arrays(analytic).items()}
    jax.tree.map(np.testing.assert_array_equal, restore_like(analytic, before, "the model"), analytic)
    modules = [heads.Clusterer(nnx.Linear(5, 4, rngs=rngs), heads.AnalyticHMoG(2, 3, 4, rngs=rngs)) for rngs in
               (nnx.Rngs(0), nnx.Rngs(1))]  # fmt: skip
    leaves = [nnx.to_pure_dict(nnx.state(module)) for module in modules]
    write_leaves(leaves[0], path)
    assert {"encoder/kernel", "head/em/model/loadings"} <= load_leaves(path).keys()
    nnx.update(modules[1], restore_like(leaves[1], load_leaves(path), "the network"))
    rows = jnp.ones((2, 5))
    np.testing.assert_array_equal(*(module(rows).log_density for module in modules))


def test_what_is_no_file_of_leaves_is_named(tmp_path):
    path = tmp_path / "leaves.safetensors"
    write_leaves({"a": W}, path)
    whole = path.read_bytes()
    for tree, error, said in [
        ({"a": np.array(["x"])}, CheckpointError, "`tree` must hold arrays that safetensors holds; got .*str"),
        ({"a": {"b/c": 1.0}, "a/b": {"c": 2.0}}, ValueError, "`tree` must have leaves of different names; got 2 .* 1"),
    ]:
        with pytest.raises(error, match=f"write_leaves: {said}"):
            write_leaves(tree, path)
    with pytest.raises(CheckpointError, match="write_leaves: `path` must be a file that can be written"):
        write_leaves({"a": W}, tmp_path / "nowhere" / "leaves")
    assert path.read_bytes() == whole
    (tmp_path / "cut").write_bytes(whole[:-1])
    for name in ("cut", "none"):
        with pytest.raises(
            CheckpointError, match=f"load_leaves: `path` must be a whole safetensors file; got .*{name}"
        ):
            load_leaves(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"leaf `a` of the encoder must have shape \(3, 2\); got \(2, 3\)"):
        restore_like({"a": W.T}, load_leaves(path), "the encoder")
