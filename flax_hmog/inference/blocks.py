"""Inference on data that are read block by block."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from flax_hmog.data.containers import is_read_by_blocks
from flax_hmog.data.samples import check_given
from flax_hmog.data.sources import RowsInBlocks
from flax_hmog.inference.posterior import HMoGOutput, infer
from flax_hmog.model.conversions import with_prior
from flax_hmog.model.coordinates import check_natural


def infer_blocks(natural: Any, data: Any) -> HMoGOutput:
    """`infer` for data larger than memory, or sparse: rows are brought to the device block by block.

    Args:
        natural: the model.
        data: observations (N, D), as `fit_em` takes them, but for collections of batches.

    Returns:
        `HMoGOutput` of numpy arrays.

    Raises:
        TypeError, ValueError: as `infer`.
    """
    caller = "infer_blocks"
    check_natural(caller, natural)
    rows = data if is_read_by_blocks(data) else np.asarray(check_given(caller, data, None, argument="data"))
    natural = with_prior(natural, caller)
    source = RowsInBlocks(caller, rows, natural.interaction.shape[0], natural.interaction.dtype, None, None)
    parts = [jax.tree.map(np.asarray, infer(natural, x)) for x in source.given_blocks()]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: source.count], *parts)
