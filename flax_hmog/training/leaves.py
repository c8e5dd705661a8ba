"""Leaves of models as safetensors, which other frameworks and languages read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.model.checks import door, public
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Tree
from flax_hmog.training.describe import CheckpointError, named_arrays
from flax_hmog.training.exported import write_whole


@public
def write_leaves(tree: Tree, path: str | Path) -> None:
    """Write the leaves of a tree into a safetensors file, by names like "params/encoder/Dense_0/kernel".

    What was there is replaced once the file is whole. It has no digest, and says nothing of the module: that is what
    checkpoints are for.

    Args:
        tree: of arrays: variables of a linen module, `nnx.to_pure_dict(nnx.state(module))` of an NNX module, a
            `Natural`.
        path: the file.

    Raises:
        ImportError: without the package safetensors.
        ValueError: for two leaves of one name.
        CheckpointError: for leaves that the format does not hold, or a file that cannot be written.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import variables
        >>> path = Path(tempfile.mkdtemp()) / "head.safetensors"
        >>> write_leaves(variables, path)
        >>> sorted(load_leaves(path))[:2]
        ['em/model/bias', 'em/model/covariances/entries']
    """
    save = require("safetensors.numpy", "safetensors").save
    tree = nn.unbox(tree)
    arrays = named_arrays(tree)
    if len(arrays) != len(jax.tree.leaves(tree)):
        raise ValueError(
            f"{door()}: `tree` must have leaves of different names; got {len(jax.tree.leaves(tree))} leaves of "
            f"{len(arrays)} names. Rename keys that differ in nothing but their type, or hold a '/'."
        )
    try:
        content = save({name: _plain(leaf) for name, leaf in arrays.items()})
    except Exception as error:  # whatever it does not hold
        raise CheckpointError(
            f"{door()}: `tree` must hold arrays that safetensors holds; got {type(error).__name__}: {error}. Leave "
            "others out."
        ) from error
    write_whole(path, content)


@public
def load_leaves(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, of `write_leaves` or anything else, by name; nothing in it is run.

    `restore_like(variables, load_leaves(path), "the encoder")` is a tree like `variables` with them, or an error that
    names the leaf which is missing or of another shape.

    Args:
        path: the file.

    Returns:
        Arrays in the dtypes that they were written in, bfloat16 too.

    Raises:
        ImportError: without the package safetensors.
        CheckpointError: for a file that is missing, cut off or of something else.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import head, variables, x
        >>> from flax_hmog.training import restore_like
        >>> path = Path(tempfile.mkdtemp()) / "head.safetensors"
        >>> write_leaves(variables, path)
        >>> head.apply(restore_like(variables, load_leaves(path), "the head"), x).log_density.shape
        (12,)
    """
    load_file = require("safetensors.numpy", "safetensors").load_file
    try:
        arrays: dict[str, np.ndarray] = load_file(path)
    except Exception as error:  # whatever reads a damaged file, raises
        raise CheckpointError(
            f"{door()}: `path` must be a whole safetensors file; got {path}, {type(error).__name__}: {error}. Write it "
            "again."
        ) from None
    return arrays


def _plain(leaf: Any) -> np.ndarray:
    """A leaf as safetensors saves it right: the library takes the bytes as they lie, whatever strides say."""
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf, order="C")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
