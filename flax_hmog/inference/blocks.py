"""Inference on data that are read block by block."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from flax_hmog.data.containers import is_read_by_blocks
from flax_hmog.data.samples import check_given
from flax_hmog.data.sources import RowsInBlocks
from flax_hmog.inference.posterior import HMoGOutput, infer
from flax_hmog.model.checks import public
from flax_hmog.model.conversions import with_prior
from flax_hmog.model.coordinates import Prepared, check_natural
from flax_hmog.model.prepared import prepare


@public
def infer_blocks(natural: Any, data: Any) -> HMoGOutput:
    """`infer` for data larger than memory, or sparse: rows are brought to the device block by block.

    Args:
        natural: the model.
        data: observations (N, D), as `fit_em` takes them, but for collections of batches.

    Returns:
        `HMoGOutput` of numpy arrays.

    Raises:
        TypeError, ValueError: as `infer`.

    Example:
        >>> from flax_hmog.toy import natural, x
        >>> infer_blocks(natural, x).log_density.shape  # also of a memory map, or a sparse matrix
        (12,)
    """
    prepared = prepare(natural) if isinstance(natural, Prepared) else prepare(with_prior(check_natural(natural)))
    interaction = prepared.natural.interaction
    rows = data if is_read_by_blocks(data) else np.asarray(check_given(data, None, argument="data"))
    source = RowsInBlocks(rows, interaction.shape[0], interaction.dtype, None, None)
    parts = [jax.tree.map(np.asarray, infer(prepared, x)) for x in source.given_blocks()]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: source.count], *parts)
