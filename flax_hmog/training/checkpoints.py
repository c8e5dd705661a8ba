"""Self-describing checkpoints: head, variables, optimiser state, config, preprocessing and metrics, by orbax.

A checkpoint restores with none of the code that trained it, on any number of devices. Arrays lie under plain names
(`variables/params/means`); a digest of them is kept, since orbax has no checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_hmog import heads
from flax_hmog.training.preprocessing import Affine

FORMAT = 1
HEADS: dict[str, Any] = {
    cls.__name__: cls for cls in (heads.DifferentiableHMoG, heads.SymmetricHMoG, heads.AnalyticHMoG)
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another structure; the message names the file or leaf."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint holds.

    Attributes:
        step: the step it was saved at.
        head: the unbound head.
        variables: for `head.apply`.
        opt_state: the optimiser's arrays by name; see `restore_like`.
        config: the run's configuration.
        preprocessing: from raw data to the head's input, or None.
        metrics: what was measured, as it was saved.
        versions: of the libraries that saved it.
    """

    step: int
    head: Any
    variables: dict[str, Any]
    opt_state: dict[str, np.ndarray]
    config: dict[str, Any]
    preprocessing: Affine | None
    metrics: dict[str, Any]
    versions: dict[str, str]


class CheckpointWriter:
    """Writes the checkpoints of one run into a folder; a context manager.

    The two latest steps are kept. An interrupted save leaves the one before it whole.
    """

    def __init__(self, path: str | Path, *, head: nn.Module, config: Any, preprocessing: Affine | None = None) -> None:
        self.manager = ocp.CheckpointManager(
            Path(path).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )
        self.preprocessing = preprocessing
        self.description = {
            "format": FORMAT,
            "head": describe_head(head),
            "config": config,
            "preprocessing": None if preprocessing is None else "Affine",
            "versions": {"jax": jax.__version__, "flax": flax.__version__, "orbax": ocp.__version__},
        }

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.close()

    def save(self, step: int, variables: Any, *, opt_state: Any = None, metrics: dict[str, Any] | None = None) -> None:
        """Save one step; a step that is there already stays as it is.

        Args:
            step: number of the step.
            variables: of the head.
            opt_state: of the optimiser, or None.
            metrics: JSON-able numbers, for example the history so far.

        Raises:
            CheckpointError: for config or metrics that JSON cannot hold.
        """
        arrays = named_arrays({"variables": nn.unbox(variables), "opt_state": opt_state})
        if self.preprocessing is not None:
            arrays |= named_arrays({"preprocessing": dataclasses.asdict(self.preprocessing)})
        description = self.description | {"metrics": metrics or {}, "digest": digest(arrays)}
        try:
            description = json.loads(json.dumps(description))
        except TypeError as error:
            raise CheckpointError(
                f"CheckpointWriter.save: `config` and `metrics` must be plain JSON values; got {error}. "
                "Convert arrays and scalars to Python numbers."
            ) from None
        self.manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), description=ocp.args.JsonSave(description)),
        )


def restore(path: str | Path, *, step: int | None = None) -> Restored:
    """Restore a checkpoint with nothing but its folder, onto the first device.

    Args:
        path: folder that `CheckpointWriter` wrote.
        step: which step; None takes the latest.

    Returns:
        `Restored`.

    Raises:
        CheckpointError: if there is no such checkpoint or it is damaged.
    """
    folder = Path(path).absolute()
    steps = saved_steps(folder)
    step = (steps[-1] if steps else None) if step is None else step
    if step not in steps:
        raise CheckpointError(f"restore: `path` must hold step {step}; got steps {steps} in {folder}. Check the path.")
    try:
        arrays, description = _read(folder, step)
    except Exception as error:  # orbax raises bare exceptions for damaged files
        raise CheckpointError(
            f"restore: checkpoint {folder / str(step)} must be readable; got {type(error).__name__}: "
            f"{str(error)[:300]}. Restore an earlier step: {steps[:-1]}."
        ) from error
    if digest(arrays) != description["digest"]:
        raise CheckpointError(
            f"restore: arrays of {folder / str(step)} must have digest {description['digest'][:12]}; got "
            f"{digest(arrays)[:12]}. The files are damaged: restore an earlier step: {steps[:-1]}."
        )
    head = rebuild_head(description["head"])
    return Restored(
        step=step,
        head=head,
        variables=restore_like(_abstract_variables(head, arrays), arrays, "variables"),
        opt_state={name: array for name, array in arrays.items() if name.startswith("opt_state/")},
        config=description["config"],
        preprocessing=None
        if description["preprocessing"] is None
        else Affine(np.asarray(arrays["preprocessing/offset"]), np.asarray(arrays["preprocessing/scale"])),
        metrics=description["metrics"],
        versions=description["versions"],
    )


def saved_steps(folder: str | Path) -> list[int]:
    """Whole steps in a folder, ascending; interrupted saves do not count."""
    folder = Path(folder)
    return sorted(
        int(entry.name)
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if entry.name.isdigit() and (entry / "_CHECKPOINT_METADATA").exists()
    )


def restore_like(template: Any, arrays: dict[str, Any], prefix: str) -> Any:
    """A tree like `template` with the arrays saved under `prefix`, on the template's devices if it has them.

    Raises:
        CheckpointError: naming the leaf that is missing, extra, or of another shape.
    """
    wanted = named_arrays({prefix: template})
    saved = {name: array for name, array in arrays.items() if name.startswith(f"{prefix}/")}
    for name in sorted(wanted.keys() ^ saved.keys()):
        where = "is missing" if name in wanted else "is not in the model"
        raise CheckpointError(f"restore_like: leaf `{name}` must be in both checkpoint and model; it {where}.")
    for name, leaf in wanted.items():
        if saved[name].shape != leaf.shape:
            raise CheckpointError(
                f"restore_like: leaf `{name}` must have shape {leaf.shape}; got {saved[name].shape}. "
                "The checkpoint is of another model."
            )
    leaves = [
        jax.device_put(saved[name].astype(leaf.dtype), leaf.sharding if isinstance(leaf, jax.Array) else None)
        for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, as "variables/params/means"; in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def digest(arrays: dict[str, Any]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        total.update(f"{name}{array.shape}{array.dtype}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def describe_head(head: nn.Module) -> dict[str, Any]:
    """Class name and constructor arguments of a head, as JSON values."""
    arguments = {
        field.name: getattr(head, field.name)
        for field in dataclasses.fields(head)
        if field.init and field.name not in ("parent", "name")
    }
    return {"class": type(head).__name__, "arguments": arguments | {"param_dtype": jnp.dtype(head.param_dtype).name}}


def rebuild_head(description: dict[str, Any]) -> Any:
    """The head that `describe_head` described."""
    name = description["class"]
    if name not in HEADS:
        raise CheckpointError(f"restore: `head` must be one of {sorted(HEADS)}; got {name!r}. Update flax_hmog.")
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description["arguments"].items()
    }
    return HEADS[name](**(arguments | {"param_dtype": jnp.dtype(arguments["param_dtype"])}))


def _abstract_variables(head: Any, arrays: dict[str, Any]) -> Any:
    bias = next(a for name, a in arrays.items() if name.endswith(("params/bias", "mean/observable_mean")))
    x = jax.ShapeDtypeStruct((1, bias.shape[0]), head.param_dtype)
    return nn.unbox(jax.eval_shape(head.init, jax.random.key(0), x))


def _read(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    handlers = {"arrays": ocp.StandardCheckpointHandler(), "description": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one_device)
            for name, leaf in manager.item_metadata(step)["arrays"].tree.items()
        }
        read = manager.restore(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardRestore(template), description=ocp.args.JsonRestore()),
        )
    return dict(read["arrays"]), read["description"]
