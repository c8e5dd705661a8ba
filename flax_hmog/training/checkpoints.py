"""Self-describing checkpoints: modules, variables, state, config, preprocessing and metrics, by orbax.

A checkpoint restores with none of the code that trained it, on any number of devices. Arrays lie under plain names
(`variables/params/means`) with a SHA-256 each, since orbax has no checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from flax_hmog.covariances import Array
from flax_hmog.encoders import Clusterer
from flax_hmog.inference import HMoGOutput
from flax_hmog.training.describe import CheckpointError, describe_module, rebuild_module
from flax_hmog.training.preprocessing import Preprocessing, rebuild_preprocessing

FORMAT = 2
LIBRARIES = ("flax-hmog", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds; called with raw data it gives the head's output.

    Attributes:
        step: the step it was saved at.
        head: the unbound head.
        variables: for `head.apply`.
        encoder: the unbound encoder; None if there is none, or if its code was not to be imported.
        encoder_variables: for `encoder.apply`, or None.
        preprocessing: from raw data to the inputs of encoder or head, or None.
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
    state: dict[str, np.ndarray]
    progress: dict[str, Any]
    history: list[dict[str, Any]]
    metrics: dict[str, float]
    config: dict[str, Any]
    versions: dict[str, str]

    def __call__(self, raw: Any) -> HMoGOutput:
        """The head's output for raw data (..., D), numpy or jax: preprocessing, encoder, head.

        Raises:
            ValueError: for another number of columns, or an encoder that was not imported.
        """
        return self.head.apply(self.variables, self.features(raw))

    def features(self, raw: Any) -> Array:
        """The inputs of the head for raw data (..., D)."""
        x = raw if self.preprocessing is None else self.preprocessing(raw)
        if self.encoder_variables is None:
            return jnp.asarray(x)
        if self.encoder is None:
            raise ValueError(
                "Restored: `encoder` must be imported to take raw data; got a checkpoint with a class that is not of "
                "flax_hmog. Restore with allow_import=True if you trust it."
            )
        return self.encoder.apply(self.encoder_variables, x)


class CheckpointWriter:
    """Writes the checkpoints of one run into a folder; a context manager.

    Saves run in the background, and all processes of a run take part in them. An interrupted save leaves the one before
    it whole.

    Args:
        path: the folder.
        head: the head.
        encoder: the encoder before it, or None.
        config: the run's configuration, JSON values.
        preprocessing: from raw data to inputs, or None.
        keep: how many of the latest checkpoints stay.
        best: name of the metric whose best checkpoint stays as well, or None.
        mode: whether the best is the largest ("max") or the smallest ("min").
    """

    def __init__(
        self,
        path: str | Path,
        *,
        head: nn.Module,
        encoder: nn.Module | None = None,
        config: Any = None,
        preprocessing: Preprocessing | None = None,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.manager = ocp.CheckpointManager(
            Path(path).absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=None if best is None else lambda metrics: metrics[best],
                best_mode=mode,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )
        self.preprocessing = preprocessing
        self.description = {
            "format": FORMAT,
            "head": describe_module(head),
            "encoder": None if encoder is None else describe_module(encoder),
            "config": config,
            "preprocessing": None if preprocessing is None else preprocessing.describe(),
            "best": None if best is None else [best, mode],
            "versions": {name: metadata.version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.close()

    def save(
        self,
        step: int,
        variables: Any,
        *,
        state: Any = None,
        progress: dict[str, Any] | None = None,
        history: list[dict[str, Any]] | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save one step, in the background; a step that is there already stays as it is.

        Args:
            step: number of the step.
            variables: of the head; with an encoder, of `Clusterer`.
            state: any tree of arrays and PRNG keys that the run needs to go on.
            progress: JSON values that the run needs to go on.
            history: metrics so far.
            metrics: what the best checkpoint is chosen by.

        Raises:
            CheckpointError: for values that JSON cannot hold, leaves that are no arrays, or variables that are not
                finite.
        """
        arrays = named_arrays(nn.unbox({"variables": variables, "state": state}))
        if self.preprocessing is not None:
            arrays |= named_arrays({"preprocessing": self.preprocessing.arrays()})
        arrays = {name: _storable(name, leaf) for name, leaf in arrays.items()}
        described = {"progress": progress or {}, "history": history or [], "metrics": metrics or {}}
        try:
            description = json.loads(json.dumps(self.description | described))
        except TypeError as error:
            raise CheckpointError(
                f"CheckpointWriter.save: config, progress, history and metrics must be plain JSON values; got {error}. "
                "Convert arrays and scalars to Python numbers."
            ) from None
        description["arrays"] = {name: _array_description(name, array) for name, array in arrays.items()}
        stored = {name: array for name, array in arrays.items() if array.size}
        self.manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(stored), description=ocp.args.JsonSave(description)),
            metrics=described["metrics"] or None,
        )

    def wait(self) -> None:
        """Until all saves are on disk."""
        self.manager.wait_until_finished()


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
    chosen = (steps[-1] if steps else None) if step is None else step
    if chosen == "best" and steps:
        chosen = _best_step(folder, steps)
    if chosen not in steps:
        raise CheckpointError(f"restore: `path` must hold step {step}; got steps {steps} in {folder}. Check the path.")
    arrays, description = _read_whole(folder, chosen, [other for other in steps if other != chosen])
    groups: dict[str, dict[str, Any]] = {"variables": {}, "state": {}, "preprocessing": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    head = rebuild_module(description["head"])
    encoder = description["encoder"] and rebuild_module(description["encoder"], allow_import=allow_import)
    of_head, of_encoder = _split_variables(groups["variables"], description["encoder"] is not None)
    return Restored(
        step=chosen,
        head=head,
        variables=restore_like(_abstract_variables(head, of_head), of_head, "variables"),
        encoder=encoder,
        encoder_variables=jax.tree.map(jnp.asarray, _nested(of_encoder)) if description["encoder"] else None,
        preprocessing=None
        if description["preprocessing"] is None
        else rebuild_preprocessing(description["preprocessing"], groups["preprocessing"]),
        state=groups["state"],
        **{name: description[name] for name in ("progress", "history", "metrics", "config", "versions")},
    )


def restored_variables(restored: Restored) -> dict[str, Any]:
    """The variables of the module that was trained: of the head, or of `Clusterer`."""
    if restored.encoder_variables is None:
        return restored.variables
    parts = {"head": restored.variables, "encoder": restored.encoder_variables}
    collections = sorted({name for part in parts.values() for name in part})
    return {name: {key: part[name] for key, part in parts.items() if name in part} for name in collections}


def restored_module(restored: Restored) -> nn.Module:
    """The module that was trained: the head, or `Clusterer`."""
    return restored.head if restored.encoder is None else Clusterer(restored.encoder, restored.head)


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
        array = np.asarray(arrays[name]).astype(data.dtype)
        leaves.append(_key_like(array, leaf) if is_key else _placed(array, leaf))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, as "variables/params/means"; in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _key_like(data: np.ndarray, leaf: Any) -> Array:
    return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(leaf))


def _placed(array: np.ndarray, leaf: Any) -> Array:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _storable(name: str, leaf: Any) -> Any:
    """A leaf as orbax takes it, keys as their data.

    Raises:
        CheckpointError: for something else than an array, or a variable that is not finite.
    """
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise CheckpointError(
            f"CheckpointWriter.save: leaf `{name}` must be an array; got {type(leaf).__name__}. Put it into `progress`."
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(jnp.asarray(leaf))
    if not isinstance(leaf, jax.Array) or (leaf.is_fully_addressable and jax.process_count() > 1):
        leaf = np.asarray(leaf)  # what lies on one process is the same on all
    is_variable = name.startswith("variables/") and jnp.issubdtype(leaf.dtype, jnp.floating)
    if is_variable and not bool(jnp.all(jnp.isfinite(leaf))):
        raise CheckpointError(
            f"CheckpointWriter.save: leaf `{name}` must be finite; got entries that are not. "
            "Go on from the last checkpoint, with a smaller learning rate."
        )
    return leaf


def _array_description(name: str, array: Any) -> dict[str, Any]:
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    host = np.ascontiguousarray(np.asarray(array))
    digest = hashlib.sha256(host.tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(host.dtype), "sha256": digest}


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
        if name not in stored or _array_description(name, stored[name]) != about:
            raise CheckpointError(
                f"restore: leaf `{name}` in {folder / str(step)} must be as it was saved, {about}; got "
                f"{_array_description(name, stored[name]) if name in stored else 'nothing'}. The files are damaged. "
                f"{remedy}"
            )
    return {name: stored[name] for name in wanted}, description


def _read(folder: Path, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "description": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        names = manager.item_metadata(step)["arrays"].tree
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        read = manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.PyTreeRestore(restore_args=as_numpy), description=ocp.args.JsonRestore()
            ),
        )
    return {name: np.asarray(array) for name, array in read["arrays"].items()}, read["description"]


def _best_step(folder: Path, steps: list[int]) -> int:
    scores = {}
    for step in steps:
        _, description = _read_whole(folder, step, [other for other in steps if other != step])
        if description["best"] and description["best"][0] in description["metrics"]:
            name, mode = description["best"]
            scores[step] = description["metrics"][name] * (1 if mode == "max" else -1)
    if not scores:
        raise CheckpointError(
            f"restore: a best step must have been saved with the metric of its writer; got none in {folder}. "
            "Restore the latest: step=None."
        )
    return max(scores, key=lambda step: scores[step])


def _split_variables(arrays: dict[str, Any], has_encoder: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Variables of the head and of the encoder, each by name "collection/..."."""
    if not has_encoder:
        return arrays, {}
    parts: dict[str, dict[str, Any]] = {"head": {}, "encoder": {}}
    for name, array in arrays.items():
        collection, part, rest = name.split("/", 2)
        parts[part][f"{collection}/{rest}"] = array
    return parts["head"], parts["encoder"]


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return tree


def _abstract_variables(head: Any, arrays: dict[str, Any]) -> Any:
    bias = next(a for name, a in arrays.items() if name in ("params/bias", "em/mean/observable_mean"))
    x = jax.ShapeDtypeStruct((1, bias.shape[0]), head.param_dtype)
    return nn.unbox(jax.eval_shape(head.init, jax.random.key(0), x))
