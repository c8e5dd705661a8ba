"""Checkpoints read again: whole models from a folder alone, and trees of arrays for a run that goes on."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_hmog.containers import dense
from flax_hmog.covariances import Array
from flax_hmog.encoders import Clusterer, train_arguments
from flax_hmog.inference import HMoGOutput
from flax_hmog.objectives import merge_output
from flax_hmog.training.describe import CheckpointError, rebuild_module
from flax_hmog.training.mesh import place
from flax_hmog.training.named import FORMAT, abstract_variables, describe_array, named_arrays, split_variables
from flax_hmog.training.preprocessing import Preprocessing, rebuild_preprocessing

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds; called with raw data it says their clusters.

    Attributes:
        step: the step it was saved at.
        head: the unbound head.
        variables: for `head.apply`.
        encoder: the unbound encoder; None if there is none, or if its code was not to be imported.
        encoder_variables: for `encoder.apply`, or None.
        preprocessing: from raw data to the inputs of encoder or head, or None.
        clusters: cluster of each component (K,) where components are merged, or None.
        state: all other arrays by name, as "opt_state/0/mu/params/means"; see `restore_like`.
        progress: where the run stood, as it was saved.
        history: metrics so far, one dict for each record.
        metrics: those by which the best checkpoint is chosen.
        config: the run's configuration.
        versions: of the libraries that saved it.
    """

    step: int
    head: Any
    variables: dict[str, Any]
    encoder: Any
    encoder_variables: dict[str, Any] | None
    preprocessing: Preprocessing | None
    clusters: np.ndarray | None
    state: dict[str, np.ndarray]
    progress: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def module(self) -> Any:
        """The unbound module that was trained: the head, or a `Clusterer` of encoder and head.

        Raises:
            ValueError: for an encoder that was not imported.
        """
        return self.head if self.encoder_variables is None else Clusterer(self._imported_encoder(), self.head)

    @property
    def module_variables(self) -> dict[str, Any]:
        """The variables of `module`."""
        if self.encoder_variables is None:
            return self.variables
        parts = {"head": self.variables, "encoder": self.encoder_variables}
        collections = sorted({name for part in parts.values() for name in part})
        return {name: {key: part[name] for key, part in parts.items() if name in part} for name in collections}

    def __call__(self, raw: Any) -> HMoGOutput:
        """The head's output for raw data (..., D), numpy or jax: preprocessing, encoder, head, merge of components.

        For components that are not merged, `dataclasses.replace(restored, clusters=None)`.

        Raises:
            ValueError: for another number of columns, or an encoder that was not imported.
        """
        return self.merged(self.head.apply(self.variables, self.features(raw)))

    def merged(self, output: HMoGOutput) -> HMoGOutput:
        """The head's output with its components merged to clusters, where they are."""
        if self.clusters is None:
            return output
        return merge_output(output, self.clusters, int(self.clusters.max()) + 1)

    def features(self, raw: Any) -> Array:
        """The inputs of the head for raw data (..., D): numpy, jax or a scipy sparse matrix."""
        x = dense("Restored", "raw", raw) if self.preprocessing is None else self.preprocessing(raw)
        if self.encoder_variables is None:
            return jnp.asarray(x)
        encoder = self._imported_encoder()
        positional, named = train_arguments(encoder, False)
        return encoder.apply(self.encoder_variables, x, *positional, **named)

    def _imported_encoder(self) -> Any:
        if self.encoder is None:
            raise ValueError(
                "Restored: `encoder` must be imported to take raw data; got a checkpoint with a class that is not of "
                "flax_hmog. Restore with allow_import=True if you trust it."
            )
        return self.encoder


def restore(path: str | Path, *, step: int | Literal["best"] | None = None, allow_import: bool = False) -> Restored:
    """Restore a checkpoint with nothing but its folder.

    Args:
        path: folder that `CheckpointWriter` wrote.
        step: which step; None takes the latest, "best" that with the best metric.
        allow_import: import an encoder that is not of this library by the path that the checkpoint names. This runs
            that code.

    Returns:
        `Restored`; its variables lie on this process's first device.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged.
    """
    folder = Path(path).absolute()
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"restore: `path` must hold a checkpoint; got {folder}, which {_where_else(folder)}.")
    chosen = steps[-1] if step is None else _best_step(folder, steps) if step == "best" else step
    if chosen not in steps:
        raise CheckpointError(
            f'restore: `step` must be None, "best" or one of {steps}; got {step!r}. Choose one that is in {folder}.'
        )
    arrays, description = _read_whole(folder, chosen, [other for other in steps if other != chosen])
    groups: dict[str, dict[str, Any]] = {"variables": {}, "state": {}, "preprocessing": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    head = rebuild_module(description["head"])
    encoder = description["encoder"] and rebuild_module(description["encoder"], allow_import=allow_import)
    of_head, of_encoder = split_variables(groups["variables"], description["encoder"] is not None)
    return Restored(
        step=chosen,
        head=head,
        variables=restore_like(abstract_variables(head, of_head), of_head, "variables"),
        encoder=encoder,
        encoder_variables=jax.tree.map(jnp.asarray, _nested(of_encoder)) if description["encoder"] else None,
        preprocessing=None
        if description["preprocessing"] is None
        else rebuild_preprocessing(description["preprocessing"], groups["preprocessing"]),
        clusters=None if description["clusters"] is None else np.asarray(description["clusters"]),
        state=groups["state"],
        **{name: description[name] for name in ("progress", "history", "metrics", "config", "versions")},
    )


def saved_steps(folder: str | Path) -> list[int]:
    """Whole steps in a folder, ascending; interrupted saves do not count."""
    folder = Path(folder)
    return sorted(
        int(entry.name)
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if entry.name.isdigit() and (entry / "_CHECKPOINT_METADATA").exists()
    )


def restore_like(template: Any, arrays: dict[str, Any], what: str) -> Any:
    """A tree like `template` with the arrays saved under its names, where the template's leaves lie.

    Args:
        template: tree of arrays, keys or abstract arrays (`jax.ShapeDtypeStruct`).
        arrays: by name, for example `Restored.state`; names beyond the template's are an error.
        what: says in messages what the tree is.

    Returns:
        The tree.

    Raises:
        CheckpointError: naming the leaf that is missing, extra, or of another shape.
    """
    template = nn.unbox(template)
    wanted = named_arrays(template)
    for name in sorted(wanted.keys() ^ arrays.keys()):
        where = "is missing in the checkpoint" if name in wanted else "is not in the model"
        raise CheckpointError(
            f"restore_like: leaf `{name}` of {what} must be in both checkpoint and model; it {where}. "
            "Restore into the model that was saved."
        )
    leaves = []
    for name, leaf in wanted.items():
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf
        if arrays[name].shape != data.shape:
            raise CheckpointError(
                f"restore_like: leaf `{name}` of {what} must have shape {data.shape}; got {arrays[name].shape}. "
                "The checkpoint is of another model."
            )
        if jnp.issubdtype(arrays[name].dtype, jnp.floating) != jnp.issubdtype(data.dtype, jnp.floating):
            raise CheckpointError(
                f"restore_like: leaf `{name}` of {what} must hold {data.dtype}; got {arrays[name].dtype}. "
                "The checkpoint is of another model."
            )
        array = np.asarray(arrays[name]).astype(data.dtype)
        leaves.append(_key_like(array, leaf) if is_key else _placed(array, leaf))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _key_like(data: np.ndarray, leaf: Any) -> Array:
    return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))


def _placed(array: np.ndarray, leaf: Any) -> Array:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(array)
    return place(array, sharding)


def _read_whole(folder: Path, step: int, others: list[int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and description of a step, each array as its digest says."""
    remedy = f"Restore another step: {others}." if others else "There is no other step."
    try:
        stored, description = _read(folder, step)
        if description.get("format") != FORMAT:
            raise CheckpointError(f"format {description.get('format')}, this version reads {FORMAT}")
        wanted = description["arrays"]
    except Exception as error:  # orbax raises bare exceptions for damaged files
        raise CheckpointError(
            f"restore: checkpoint {folder / str(step)} must be readable; got {type(error).__name__}: "
            f"{str(error)[:300]}. {remedy}"
        ) from error
    for name, about in wanted.items():
        if math.prod(about["shape"]) == 0:
            stored[name] = np.zeros(about["shape"], about["dtype"])
        if name not in stored or describe_array(stored[name]) != about:
            raise CheckpointError(
                f"restore: leaf `{name}` in {folder / str(step)} must be as it was saved, {about}; got "
                f"{describe_array(stored[name]) if name in stored else 'nothing'}. The files are damaged. "
                f"{remedy}"
            )
    return {name: stored[name] for name in wanted}, description


def _read(folder: Path, step: int, *, arrays: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays, or none, and description of a step, as orbax reads them."""
    handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "description": ocp.JsonCheckpointHandler()}
    wanted: dict[str, Any] = {"description": ocp.args.JsonRestore()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        if arrays:
            names = manager.item_metadata(step)["arrays"].tree
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            wanted["arrays"] = ocp.args.PyTreeRestore(restore_args=as_numpy)
        read = manager.restore(step, args=ocp.args.Composite(**wanted))
    stored = read["arrays"] if arrays else {}
    return {name: np.asarray(array) for name, array in stored.items()}, read["description"]


def _where_else(folder: Path) -> str:
    """What is to be said of a folder without checkpoints."""
    if not folder.is_dir():
        return "is no folder. Check the path"
    if folder.name.isdigit() and saved_steps(folder.parent):
        return f"is one step. Give {folder.parent} and step={folder.name}"
    if any(folder.glob("*.orbax-checkpoint-tmp")):
        return "holds nothing but a save that is not finished. Wait for its writer, or save again"
    found = sorted({str(entry.parent.parent) for entry in folder.glob("**/_CHECKPOINT_METADATA")} - {str(folder)})
    return f"has none itself. Choose one of {', '.join(found)}" if found else "has none. Check the path"


def _best_step(folder: Path, steps: list[int]) -> int:
    """By the descriptions alone; those that cannot be read do not count."""
    scores = {}
    for step in steps:
        try:
            description = _read(folder, step, arrays=False)[1]
            if description["best"] is None:
                continue
            name, mode = description["best"]
            scores[step] = description["metrics"][name] * (1 if mode == "max" else -1)
        except Exception as error:  # orbax raises bare exceptions for damaged files
            logger.warning("%s is not compared: %s: %s", folder / str(step), type(error).__name__, str(error)[:200])
    if not scores:
        raise CheckpointError(
            f"restore: a best step must have been saved with the metric of its writer; got none in {folder}. "
            "Restore the latest: step=None."
        )
    return max(scores, key=lambda step: (scores[step], step))


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree
