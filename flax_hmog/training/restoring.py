"""Checkpoints read again: whole models from a folder alone, and trees of arrays for a run that goes on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.data.containers import dense
from flax_hmog.inference.posterior import HMoGOutput
from flax_hmog.model.kinds import Array
from flax_hmog.networks.encoders import Clusterer, train_arguments
from flax_hmog.networks.objectives import merge_output
from flax_hmog.training.describe import CheckpointError, rebuild_encoder, rebuild_head
from flax_hmog.training.files import DESCRIPTION, LEFTOVERS, DamageError, read_description, read_step, saved_steps
from flax_hmog.training.mesh import place
from flax_hmog.training.named import abstract_variables, named_arrays, split_variables
from flax_hmog.training.preprocessing import Preprocessing, rebuild_preprocessing


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


def restore(
    path: str | Path, *, step: int | Literal["best"] | None = None, allow_import: bool | str = False
) -> Restored:
    """Restore a checkpoint with nothing but its folder.

    Args:
        path: folder that `CheckpointWriter` wrote.
        step: which step; None takes the latest, "best" that with the best metric.
        allow_import: import an encoder that is not of this library: True by the path that the checkpoint names, or
            MODULE:CLASS by this path, if it is the one. This runs the code of that module. What is not a linen module
            is never called.

    Returns:
        `Restored`; its variables lie on this process's first device.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is damaged. A damaged step is never replaced by another.
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
    with _named(folder, chosen, [other for other in steps if other != chosen]):
        arrays, description = read_step(folder / str(chosen))
    try:
        return _assembled(chosen, arrays, description, allow_import)
    except CheckpointError as error:
        raise CheckpointError(f"{error} The checkpoint is {folder / str(chosen)}.") from error.__cause__
    except Exception as error:  # it is as it was saved, by another version
        raise CheckpointError(
            f"restore: checkpoint {folder / str(chosen)} must be of a known structure; got {type(error).__name__}: "
            f"{error}. Use the flax_hmog that saved it: {description.get('versions')}."
        ) from error


def _assembled(step: int, arrays: dict[str, Any], description: dict[str, Any], allow_import: bool | str) -> Restored:
    """Modules and variables from what was read."""
    groups: dict[str, dict[str, Any]] = {"variables": {}, "state": {}, "preprocessing": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    head, has_encoder = rebuild_head(description["head"]), description["encoder"] is not None
    of_head, of_encoder = split_variables(groups["variables"], has_encoder)
    return Restored(
        step=step,
        head=head,
        variables=restore_like(abstract_variables(head, of_head), of_head, "variables"),
        encoder=rebuild_encoder(description["encoder"], allow_import=allow_import) if has_encoder else None,
        encoder_variables=jax.tree.map(jnp.asarray, _nested(of_encoder)) if has_encoder else None,
        preprocessing=None
        if description["preprocessing"] is None
        else rebuild_preprocessing(description["preprocessing"], groups["preprocessing"]),
        clusters=None if description["clusters"] is None else np.asarray(description["clusters"]),
        state=groups["state"],
        **{name: description[name] for name in ("progress", "history", "metrics", "config", "versions")},
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


@contextlib.contextmanager
def _named(folder: Path, step: int, others: list[int]) -> Iterator[None]:
    """Errors that say which checkpoint cannot be read, why, and what can be read instead.

    What libraries raise for damaged files is of many types, and its traceback says nothing more.
    """
    try:
        yield
    except Exception as error:
        cause = str(error) if isinstance(error, DamageError) else f"{type(error).__name__}: {str(error)[:300]}"
        path = folder / str(step)
        remedy = (
            f"Restore another step: {others}; a run goes on from there once {path} is deleted."
            if others
            else "There is no other step."
        )
        raise CheckpointError(
            f"restore: checkpoint {path} must be readable, and as it was saved; got {cause}. {remedy}"
        ) from None


def _where_else(folder: Path) -> str:
    """What is to be said of a folder without checkpoints."""
    if not folder.is_dir():
        return "is no folder. Check the path"
    if folder.name.isdigit() and saved_steps(folder.parent):
        return f"is one step. Give {folder.parent} and step={folder.name}"
    if any(path for pattern in LEFTOVERS for path in folder.glob(pattern)):
        return "holds nothing but a save that is not finished. Wait for its writer, or save again"
    found = sorted({str(entry.parents[2]) for entry in folder.glob(f"**/{DESCRIPTION}")} - {str(folder)})
    return f"has none itself. Choose one of {', '.join(found)}" if found else "has none. Check the path"


def _best_step(folder: Path, steps: list[int]) -> int:
    """By the descriptions alone.

    Raises:
        CheckpointError: if one of them cannot be read, as it may be the best, or none has a metric.
    """
    scores = {}
    for step in steps:
        with _named(folder, step, [other for other in steps if other != step]):
            description = read_description(folder / str(step))
            if description["best"] is not None and description["best"][0] in description["metrics"]:
                name, mode = description["best"]
                scores[step] = description["metrics"][name] * (1 if mode == "max" else -1)
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
