"""Self-describing checkpoints: modules, variables, state, config, preprocessing and metrics, written by orbax.

A checkpoint restores with none of the code that trained it, on any number of devices (restoring.py). Arrays lie under
plain names (`variables/params/means`) with a SHA-256 each, since orbax has no checksum.
"""

from __future__ import annotations

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
from orbax.checkpoint import checkpoint_managers

from flax_hmog.checks import check_size
from flax_hmog.training.describe import CheckpointError, describe_head, describe_module
from flax_hmog.training.named import FORMAT, abstract_variables, describe_array, named_arrays, split_variables
from flax_hmog.training.plain import plain
from flax_hmog.training.preprocessing import Preprocessing

LIBRARIES = ("flax-hmog", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointWriter:
    """Writes the checkpoints of one run into a folder; a context manager.

    Files are written in the background, once arrays are on the host with their digests; all processes of a run take
    part. An interrupted save leaves the one before it whole.

    Args:
        path: the folder.
        head: the head.
        encoder: the encoder before it, or None.
        config: the run's configuration, JSON values.
        preprocessing: from raw data to inputs, or None.
        keep: how many of the latest checkpoints stay.
        best: name of the metric whose best checkpoint stays as well, or None.
        mode: whether the best is the largest ("max") or the smallest ("min").

    Raises:
        CheckpointError: for modules that could not be restored.
        ValueError: for another `keep` or `mode`.
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
        check_size("CheckpointWriter", "keep", keep)
        if mode not in ("max", "min"):
            raise ValueError(f'CheckpointWriter: `mode` must be "max" or "min"; got {mode!r}. Choose one of them.')
        self.head, self.has_encoder, self.best, self.mode = head, encoder is not None, best, mode
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
            "head": describe_head(head),
            "encoder": None if encoder is None else describe_module(encoder),
            "config": config,
            "preprocessing": None if preprocessing is None else preprocessing.describe(),
            "best": None if best is None else [best, mode],
            "versions": {name: metadata.version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait until all is written, and end; `with` does it."""
        self.manager.close()

    def wait(self) -> None:
        """Wait until what has been saved so far is written."""
        self.manager.wait_until_finished()

    def save(
        self,
        step: int,
        variables: Any,
        *,
        state: Any = None,
        progress: dict[str, Any] | None = None,
        history: list[dict[str, Any]] | None = None,
        metrics: dict[str, float] | None = None,
        clusters: Any = None,
    ) -> None:
        """Save one step.

        Args:
            step: number of the step, above those that are there.
            variables: of the head; with an encoder, of `Clusterer`.
            state: any tree of arrays and PRNG keys that the run needs to go on.
            progress: JSON values that the run needs to go on.
            history: metrics so far.
            metrics: what the best checkpoint is chosen by; without them this one is not compared.
            clusters: cluster of each component (K,) as `analysis.merge_components` gives them, where components are
                merged: what is restored then speaks of clusters.

        Raises:
            CheckpointError: for a step that is not above the latest, variables that are not those of head and encoder
                or are not finite, clusters that do not have a component each, leaves that are no
                arrays, or values that JSON cannot hold.
        """
        self._check_step(step)
        metrics = plain(metrics)
        tracked = self._tracked(metrics)
        arrays = named_arrays(nn.unbox({"variables": variables, "state": state}))
        if self.preprocessing is not None:
            arrays |= named_arrays({"preprocessing": self.preprocessing.arrays()})
        arrays = {name: _storable(name, leaf) for name, leaf in arrays.items()}
        _check_variables(self.head, self.has_encoder, arrays)
        described = {"progress": progress or {}, "history": history or [], "metrics": metrics or {}}
        labels = None if clusters is None else self._checked_clusters(clusters)
        try:
            description = json.loads(json.dumps(plain(self.description | described | {"clusters": labels})))
        except TypeError as error:
            raise CheckpointError(
                f"CheckpointWriter.save: config, progress, history and metrics must be plain JSON values; got {error}. "
                "Convert arrays and scalars to Python numbers."
            ) from None
        description["arrays"] = {name: describe_array(array) for name, array in arrays.items()}
        stored = {name: array for name, array in arrays.items() if array.size}
        self.manager.save(
            step,
            args=ocp.args.Composite(arrays=ocp.args.StandardSave(stored), description=ocp.args.JsonSave(description)),
            metrics=tracked,
        )

    def _check_step(self, step: int) -> None:
        latest = self.manager.latest_step()
        lowest = 0 if latest is None else latest + 1
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < lowest:
            raise CheckpointError(
                f"CheckpointWriter.save: `step` must be a whole number above the latest, {latest}; got {step!r}. "
                "Go on from the latest step, or use another folder."
            )

    def _checked_clusters(self, clusters: Any) -> list[int]:
        labels = np.asarray(clusters)
        shape = (self.head.n_components,)
        is_whole = labels.shape == shape and np.issubdtype(labels.dtype, np.integer)
        if not is_whole or set(labels) != set(range(labels.max() + 1)):
            raise CheckpointError(
                f"CheckpointWriter.save: `clusters` must be whole numbers of shape {shape}, with no gap from 0 to the "
                f"largest; got {labels.dtype} of shape {labels.shape}, {np.unique(labels)}. Give what merge_components "
                "returns for this head."
            )
        return labels.tolist()

    def _tracked(self, metrics: dict[str, float] | None) -> dict[str, float] | None:
        """What orbax compares checkpoints by."""
        if self.best is None:
            return None
        if metrics is None:
            return {self.best: -math.inf if self.mode == "max" else math.inf}
        if not math.isfinite(metrics.get(self.best, math.nan)):
            raise CheckpointError(
                f"CheckpointWriter.save: `metrics` must hold a finite {self.best!r}, which the best is chosen by; got "
                f"{metrics}. Leave metrics out where there is none."
            )
        return {self.best: metrics[self.best]}


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


def _check_variables(head: Any, has_encoder: bool, arrays: dict[str, Any]) -> None:
    """CheckpointError unless the variables are those of the head, or of `Clusterer` with it."""
    named = {name.removeprefix("variables/"): leaf for name, leaf in arrays.items() if name.startswith("variables/")}
    wanted = "of the head" if not has_encoder else "of a `Clusterer`, under `encoder` and `head`"
    try:
        of_head, _ = split_variables(named, has_encoder)
        abstract = named_arrays(abstract_variables(head, of_head))
    except (KeyError, ValueError, StopIteration):
        abstract, of_head = {}, named
    wrong = sorted(set(abstract) ^ set(of_head)) or [
        name for name in abstract if abstract[name].shape != of_head[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"CheckpointWriter.save: `variables` must be those {wanted}, with their collections; leaf {wrong[0]!r} is "
            f"not as in {type(head).__name__}. Give `state.variables`, or what `init` returned, with all collections."
        )
