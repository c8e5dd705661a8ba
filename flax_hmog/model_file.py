"""One file that holds a model exactly, and in a form that a few lines of numpy score."""

from __future__ import annotations

import dataclasses
import json
import os
import types
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import serialization, traverse_util

from flax_hmog.em.result import EMResult
from flax_hmog.model.checks import public
from flax_hmog.model.conversions import moments_to_natural, natural_to_moments
from flax_hmog.model.coordinates import Moments, Natural, Prepared, check_natural
from flax_hmog.model.frames import Frame
from flax_hmog.model.kinds import PositiveDefinite, as_rep
from flax_hmog.model.prior import with_prior
from flax_hmog.model.structure import Structure

FORMAT = 1
EXACT = "natural/"  # names of the arrays of `Natural`, which make the same model again


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The contents of a file of `save`.

    Attributes:
        natural: the model, of numpy arrays in the precision that it was saved in.
        clusters: cluster of each component (K,), where components are merged, or None.
        columns: names of the columns (D,), or None.
        notes: what the writer added, values of JSON.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import natural
        >>> path = Path(tempfile.mkdtemp()) / "model.npz"
        >>> save(natural, path, columns=["a", "b", "c", "d"])
        >>> load(path).columns
        ('a', 'b', 'c', 'd')
    """

    natural: Natural
    clusters: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


@public
def save(
    model: EMResult | Natural | Prepared,
    path: str | Path,
    *,
    clusters: Any = None,
    columns: Any = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Save a model to one .npz file: `load` gives exactly this model.

    Beside that the file has weights, means, covariances, loadings, bias and noise in float64 and units of x, with which
    numpy alone scores rows (docs/serving.md). Parameters of training are no part of it: `CheckpointWriter` saves runs.

    Args:
        model: of `fit_em`, or any `Natural`.
        path: of the file; a file that is there is replaced once the new one is whole.
        clusters: cluster of each component (K,), of `merge_components`.
        columns: names of the columns (D,).
        notes: anything that JSON holds.

    Raises:
        TypeError: for another model, or notes that JSON does not hold.
        ValueError: for clusters or columns of another number.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import natural, output, x
        >>> from flax_hmog import infer
        >>> path = Path(tempfile.mkdtemp()) / "model.npz"
        >>> save(natural, path)
        >>> bool((infer(load(path).natural, x).log_density == output.log_density).all())
        True
    """
    natural = with_prior(check_natural(model.natural if isinstance(model, EMResult) else model))
    write_model(natural, path, clusters=clusters, columns=columns, notes=notes, scored=_standard_form(natural))


def write_model(
    natural: Natural,
    path: str | Path,
    *,
    clusters: Any = None,
    columns: Any = None,
    notes: dict[str, Any] | None = None,
    scored: Mapping[str, np.ndarray] = types.MappingProxyType({}),
) -> None:
    """Write a file of `save`, with the arrays that numpy scores or without: they take a program for each size."""
    obs_dim, n_components = natural.interaction.shape[0], natural.posterior_location.shape[0]
    structure = Structure.of(natural.posterior_precision)
    header = {
        "format": FORMAT,
        "noise": natural.observable_precision.name,
        "components": as_rep(structure.rep).name,
        "has_base": structure.has_base,
        "has_frame": natural.frame is not None,
        "columns": None if columns is None else [str(name) for name in _of_length("columns", columns, obs_dim)],
        "notes": notes or {},
    }
    state = jax.device_get(serialization.to_state_dict(natural))
    arrays = {
        EXACT + name: leaf for name, leaf in traverse_util.flatten_dict(state, sep="/").items() if leaf is not None
    }
    if clusters is not None:
        arrays["clusters"] = np.asarray(_of_length("clusters", clusters, n_components), np.int64)
    arrays |= scored
    path = Path(path)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with part.open("wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@public
def load(path: str | Path) -> SavedModel:
    """Load a model that `save` wrote.

    Args:
        path: of the file.

    Returns:
        `SavedModel`.

    Raises:
        ValueError: for a file that is missing, damaged or no model.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import natural
        >>> path = Path(tempfile.mkdtemp()) / "model.npz"
        >>> save(natural, path, clusters=[0, 1, 1])
        >>> load(path).clusters.tolist()
        [0, 1, 1]
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(str(arrays.pop("header")))
        natural = _natural(header, arrays)
    except FileNotFoundError:
        raise ValueError(
            f"load: `path` must be a file that flax_hmog.save wrote; got {path}, which is not there. Check the path."
        ) from None
    except Exception as error:  # whatever reads a damaged archive, raises
        raise ValueError(
            f"load: `path` must be a file that flax_hmog.save wrote; got {path}, {type(error).__name__}: {error}. "
            "Save the model again."
        ) from error
    columns = header["columns"]
    return SavedModel(natural, arrays.get("clusters"), None if columns is None else tuple(columns), header["notes"])


def _of_length(argument: str, given: Any, length: int) -> list[Any]:
    values: list[Any] = list(given)
    if len(values) != length:
        raise ValueError(f"save: `{argument}` must have {length} entries; got {len(values)}. Give one for each.")
    return values


def _standard_form(natural: Natural) -> dict[str, np.ndarray]:
    """The parameters of people, in float64 and units of x."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), natural)
        moments = natural_to_moments(wide)
        return {
            "loadings": np.asarray(moments.loadings),
            "bias": np.asarray(moments.bias),
            "noise": np.asarray(moments.noise.dense() if not moments.noise.is_diagonal else moments.noise.diagonal()),
            "weights": np.asarray(moments.weights),
            "means": np.asarray(moments.means),
            "covariances": np.asarray(moments.covariances.entries),
        }


def _natural(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Natural:
    """The model of the arrays, of their dtype."""
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, and this version knows {FORMAT}")
    (obs_dim, lat_dim), n_components = arrays[EXACT + "interaction"].shape, len(arrays[EXACT + "posterior_location"])
    zeros: Any = np.zeros
    like = Moments(
        loadings=zeros((obs_dim, lat_dim)),
        bias=zeros(obs_dim),
        noise=as_rep(header["noise"]).from_diagonal(np.ones(obs_dim)),
        weights=1 / n_components + zeros(n_components),
        means=zeros((n_components, lat_dim)),
        covariances=PositiveDefinite(np.broadcast_to(np.eye(lat_dim), (n_components, lat_dim, lat_dim))),
    )
    make = partial(moments_to_natural, rep=header["components"], shared_base=header["has_base"])
    target = jax.eval_shape(make, like)  # of which only the structure counts
    if header["has_frame"]:
        target = target.in_frame(Frame.of(np.zeros(obs_dim), np.ones(obs_dim), np.float32))
    state = {name.removeprefix(EXACT): leaf for name, leaf in arrays.items() if name.startswith(EXACT)}
    state = traverse_util.unflatten_dict(state, sep="/")
    if not header["has_frame"]:
        state["frame"] = None
    return cast(Natural, serialization.from_state_dict(target, state))
