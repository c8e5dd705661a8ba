"""Self-describing checkpoints: modules, variables, state, config, preprocessing and metrics, written by orbax.

A checkpoint restores with none of the code that trained it, on any number of devices (restoring.py). Arrays lie under
plain names (`variables/params/means`). Arrays and files have a SHA-256 each, as orbax has no checksum (files.py).
"""

from __future__ import annotations

import json
import logging
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils

from flax_hmog.model.checks import check_size, public
from flax_hmog.model.head import Head
from flax_hmog.model.typed import Inputs, Variables
from flax_hmog.networks.encoders import Clusterer
from flax_hmog.training.describe import (
    FORMAT,
    NAMED,
    CheckpointError,
    abstract_variables,
    describe_array,
    describe_module,
    find_heads,
    named_arrays,
    observed_dim,
    part_of,
    plain,
)
from flax_hmog.training.files import delete_leftovers, delete_step, read_description, saved_steps, short, write_step
from flax_hmog.training.lock import FolderLock
from flax_hmog.training.preprocessing import Preprocessing
from flax_hmog.training.processes import on_first_process

logger = logging.getLogger(__name__)
LIBRARIES = ("flax-hmog", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class CheckpointWriter:
    """Writes the checkpoints of one run into a folder; a context manager.

    A step is on the disk when `save` returns. All processes of a run call it, and the first one writes. An interrupted
    or failed save leaves the one before it whole. A folder has one writer at a time, until it is closed or its process
    ends.

    Args:
        path: the folder; it is made if it is not there.
        module: the trained module: any linen module with a head in it, or a head itself. It is saved by its import path
            and arguments, and those of the modules among these.
        head: in place of `module`, a head; or, for a module with several heads, the place of one in its variables, as
            "encoder/head": the one that `Restored.head` is.
        encoder: in place of `module`, the encoder before `head`, as in `Clusterer`.
        inputs: a batch of inputs of `module`, of which shape and dtype count. Needed for a head that is made in a
            compact call; None takes what `preprocessing` makes.
        describe: False for a module that cannot be named by an import path, as one of a notebook: who restores gives
            it, `restore(path, module=...)`.
        config: the run's configuration, JSON values.
        preprocessing: from raw data to inputs, or None.
        keep: number of latest checkpoints that stay.
        best: name of the metric whose best checkpoint stays as well, or None.
        mode: the best is the largest ("max") or the smallest ("min").

    Raises:
        CheckpointError: for modules that could not be restored, a folder that cannot be written to, or one that another
            writer has.
        ValueError: for another `keep` or `mode`.

    Example:
        >>> import tempfile
        >>> from flax_hmog.toy import head, variables
        >>> folder = tempfile.mkdtemp()
        >>> with CheckpointWriter(folder, head=head) as writer:
        ...     writer.save(1, variables)
        >>> sorted(path.name for path in Path(folder).iterdir())
        ['1']
    """

    @public
    def __init__(
        self,
        path: str | Path,
        module: nn.Module | None = None,
        *,
        head: Head | str | None = None,
        encoder: nn.Module | None = None,
        inputs: Inputs | None = None,
        describe: bool = True,
        config: object = None,
        preprocessing: Preprocessing | None = None,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["max", "min"] = "max",
    ) -> None:
        check_size("keep", keep)
        if mode not in ("max", "min"):
            raise ValueError(f'CheckpointWriter: `mode` must be "max" or "min"; got {mode!r}. Choose one of them.')
        self.module = _whole_module(module, head, encoder)
        self.place, self.head = head if isinstance(head, str) else None, cast(Any, None)
        self.keep, self.best, self.mode, self.preprocessing = keep, best, mode, preprocessing
        self.inputs, self.abstract = _abstract_inputs(inputs, preprocessing), cast(Any, None)
        self.description = {
            "format": FORMAT,
            "module": describe_module(self.module) if describe else None,
            "inputs": self.inputs and {"shape": list(self.inputs.shape), "dtype": str(self.inputs.dtype)},
            "config": config,
            "preprocessing": None if preprocessing is None else preprocessing.describe(),
            "best": None if best is None else [best, mode],
            "versions": {name: metadata.version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        }
        self.folder, self._scores = Path(path).absolute(), dict[int, float]()
        self.lock: FolderLock | None = on_first_process(self._open)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write into the folder; `with` does it."""
        if self.lock is not None:
            self.lock.release()

    def wait(self) -> None:
        """Do nothing: a save is on the disk when it returns. For loops written for savers in the background."""

    def _open(self) -> FolderLock:
        """Make and lock the folder, and remove what interrupted saves have left; the first process does it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"CheckpointWriter: `path` must be a folder that can be written to; got {self.folder}, "
                f"{type(error).__name__}: {error}. Free or choose another one."
            ) from None
        lock = FolderLock(self.folder, argument="CheckpointWriter: `path`")
        delete_leftovers(self.folder)
        return lock

    def save(
        self,
        step: int,
        variables: Variables,
        *,
        state: object = None,
        progress: dict[str, Any] | None = None,
        history: list[dict[str, Any]] | None = None,
        metrics: dict[str, float] | None = None,
        clusters: npt.ArrayLike | None = None,
    ) -> None:
        """Save one step.

        Args:
            step: number of the step, above those that are there.
            variables: of the module; with an encoder, of `Clusterer`.
            state: any tree of arrays and PRNG keys that the run needs to go on.
            progress: JSON values that the run needs to go on.
            history: metrics so far.
            metrics: numbers by which the best checkpoint is chosen; without them this one is not compared.
            clusters: cluster of each component (K,) as `analysis.merge_components` gives them, where components are
                merged: the restored model then returns clusters.

        Raises:
            CheckpointError: for a step that is not above the latest, variables that are not those of the
                module or are not finite, clusters that do not have a component each, leaves that are no
                arrays, or values that JSON cannot hold; and if the step cannot be written, for want of room or rights.
        """
        _check_whole(step)
        metrics = plain(metrics)
        self._check_metrics(metrics)
        variables = nn.unbox(variables)
        self._check_variables(variables)
        arrays = named_arrays(nn.unbox({"variables": variables, "state": state}))
        if self.preprocessing is not None:
            arrays |= named_arrays({"preprocessing": self.preprocessing.arrays()})
        arrays = {name: _storable(name, leaf) for name, leaf in arrays.items()}
        described = {"progress": progress or {}, "history": history or [], "metrics": metrics or {}}
        labels = None if clusters is None else self._checked_clusters(clusters)
        try:
            description = json.loads(json.dumps(plain(self.description | described | {"clusters": labels})))
        except TypeError as error:
            raise CheckpointError(
                f"CheckpointWriter.save: config, progress, history and metrics must be plain JSON values; got {error}. "
                "Convert arrays and scalars to Python numbers."
            ) from None
        description |= {"step": int(step), "arrays": {name: describe_array(array) for name, array in arrays.items()}}
        self._write(int(step), arrays, description)

    def _write(self, step: int, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> None:
        """Write a step, and delete those that are no longer to be kept.

        Raises:
            CheckpointError: if it cannot be written.
        """
        try:
            on_first_process(lambda: self._write_alone(step, arrays, description))
        except CheckpointError:
            raise
        except Exception as error:  # orbax raises bare exceptions for what it cannot write
            steps = saved_steps(self.folder)
            raise CheckpointError(
                f"CheckpointWriter.save: checkpoint {self.folder / str(step)} must be written; got "
                f"{short(error)}. Make room, or clear the way. "
                f"{f'The last whole step is {steps[-1]}.' if steps else 'There is no other step.'}"
            ) from None

    def _write_alone(self, step: int, arrays: dict[str, np.ndarray], description: dict[str, Any]) -> None:
        """Write on the first process; a failure there is raised on all processes."""
        if self.lock is not None:
            self.lock.check()
        self._check_above_latest(step)  # here alone: another process may look when this step is already there
        write_step(self.folder, step, arrays, description)
        self._prune()

    def _prune(self) -> None:
        """Delete the steps that are neither among the latest nor the best; those that cannot be read stay."""
        steps, scores = saved_steps(self.folder), dict[int, float]()
        for step in steps:
            try:
                scores[step] = -math.inf if self.best is None else self._score(step)
            except Exception as error:  # damaged: whether it is the best is unknown
                logger.warning("%s is kept: %s", self.folder / str(step), short(error))
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        if best is not None and scores[best] == -math.inf:
            best = None
        for step in steps[: -self.keep]:
            if step in scores and step != best:
                self._delete(step)

    def _delete(self, step: int) -> None:
        """Delete a step; where that fails, the next save tries again."""
        try:
            delete_step(self.folder, step)
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", self.folder / str(step), error)

    def _score(self, step: int) -> float:
        """The metric that the best step is chosen by: -inf for a step without metrics."""
        if step not in self._scores:
            value = read_description(self.folder / str(step))["metrics"].get(self.best, math.nan)
            sign = 1 if self.mode == "max" else -1
            self._scores[step] = sign * value if math.isfinite(value) else -math.inf
        return self._scores[step]

    def _check_above_latest(self, step: int) -> None:
        steps = saved_steps(self.folder)
        if steps and step <= steps[-1]:
            raise CheckpointError(
                f"CheckpointWriter.save: `step` must be above the latest, {steps[-1]}; got {step}. "
                "Go on from the latest step, or use another folder."
            )

    def _check_variables(self, variables: Variables) -> None:
        """Find the head, and raise CheckpointError unless the variables are those of the module.

        Without inputs those of an encoder, or of a module around the head, are taken as they are.
        """
        if self.head is None:
            self._find_head(variables)
        if self.inputs is not None and not isinstance(self.module, Clusterer | Head):
            part, of_what, is_known = variables, "`module`", True
            abstract = self.abstract = self.abstract or abstract_variables(self.module, self.inputs)
        else:
            part, of_what = part_of(variables, self.place or ""), "the head"
            obs_dim = observed_dim(self.head, part)
            is_known = obs_dim is not None
            abstract = {}
            if obs_dim is not None:
                abstract = abstract_variables(self.head, jax.ShapeDtypeStruct((1, obs_dim), self.head.param_dtype))
        given, wanted = named_arrays(part), named_arrays(abstract)
        wrong = sorted(given.keys() ^ wanted.keys()) or [n for n in wanted if wanted[n].shape != given[n].shape]
        if wrong or not is_known:
            raise CheckpointError(
                f"CheckpointWriter.save: `variables` must be those of {of_what}, with their collections"
                f"{f', under {self.place!r}' if self.place else ''}; leaf {(wrong or ['params'])[0]!r} is not as in "
                f"{type(self.head).__name__}. Give `state.variables`, or what `init` returned, with all collections."
            )

    def _find_head(self, variables: Variables) -> None:
        """Take note of the head in the module, and of its place.

        Raises:
            CheckpointError: for a module without a head, or with several none of which is named.
        """
        if isinstance(self.module, Clusterer | Head):
            self.place = "head" if isinstance(self.module, Clusterer) else ""
            self.head = self.module.head if isinstance(self.module, Clusterer) else self.module
        else:
            try:
                found = find_heads(self.module, variables, self.inputs)
            except Exception as error:
                raise CheckpointError(
                    "CheckpointWriter.save: `variables` must be those of `module`, and `inputs` what it takes; got "
                    f"{type(error).__name__}: {str(error)[:300]}. Give what `init` was given and returned."
                ) from error
            if self.place not in found and (self.place is not None or len(found) != 1):
                raise CheckpointError(
                    "CheckpointWriter.save: `head` must be the place of one of the heads in "
                    f"{type(self.module).__name__}, {sorted(found)}; got {self.place!r}. Choose one of them; heads "
                    "that are made in a compact call are found with inputs=x."
                )
            (self.place,) = found if self.place is None else (self.place,)
            self.head = found[self.place]
        is_named = self.description["module"] is not None or type(self.head) in NAMED.values()
        self.description |= {
            "place": self.place,
            "head": describe_module(self.head) if self.place and is_named else None,
        }

    def _checked_clusters(self, clusters: npt.ArrayLike | None) -> list[int]:
        labels = np.asarray(clusters)
        shape = (self.head.n_components,)
        is_whole = labels.shape == shape and np.issubdtype(labels.dtype, np.integer)
        if not is_whole or set(labels) != set(range(labels.max() + 1)):
            raise CheckpointError(
                f"CheckpointWriter.save: `clusters` must be whole numbers of shape {shape}, with no gap from 0 to the "
                f"largest; got {labels.dtype} of shape {labels.shape}, {np.unique(labels)}. Give what merge_components "
                "returns for this head."
            )
        return cast(list[int], labels.tolist())

    def _check_metrics(self, metrics: dict[str, float] | None) -> None:
        """CheckpointError for metrics that the best cannot be chosen by."""
        if self.best is None or metrics is None:
            return
        if not math.isfinite(metrics.get(self.best, math.nan)):
            raise CheckpointError(
                f"CheckpointWriter.save: `metrics` must hold a finite {self.best!r}, which the best is chosen by; got "
                f"{metrics}. Leave metrics out where there is none."
            )


def _check_whole(step: object) -> None:
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise CheckpointError(f"CheckpointWriter.save: `step` must be a whole number from 0; got {step!r}. Count them.")


def _storable(name: str, leaf: object) -> np.ndarray:
    """A leaf on the host, whole on each process; keys as their data.

    Raises:
        CheckpointError: for something else than an array, or a variable that is not finite.
    """
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise CheckpointError(
            f"CheckpointWriter.save: leaf `{name}` must be an array; got {type(leaf).__name__}. Put it into `progress`."
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(jnp.asarray(leaf))
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    leaf = np.asarray(leaf)
    is_variable = name.startswith("variables/") and jnp.issubdtype(leaf.dtype, jnp.floating)
    if is_variable and not bool(jnp.all(jnp.isfinite(leaf))):
        raise CheckpointError(
            f"CheckpointWriter.save: leaf `{name}` must be finite; got entries that are not. "
            "Go on from the last checkpoint, with a smaller learning rate."
        )
    return leaf


def _whole_module(module: nn.Module | None, head: Head | str | None, encoder: nn.Module | None) -> nn.Module:
    """The trained module, from the arguments of a writer."""
    if module is None and head is not None and not isinstance(head, str):
        check = encoder is None or isinstance(encoder, nn.Module)
        if check and isinstance(head, nn.Module) and isinstance(head, Head):
            return head if encoder is None else Clusterer(encoder, head)
    elif isinstance(module, nn.Module) and encoder is None and (head is None or isinstance(head, str)):
        return module
    names = ", ".join(type(given).__name__ for given in (module, head, encoder))
    raise CheckpointError(
        "CheckpointWriter: `module` must be a linen module; or `head` must be an instance of a linen class that offers "
        f"what flax_hmog.Head lists, and `encoder` a linen module or None; got {names}. Give either module or head."
    )


def _abstract_inputs(inputs: Inputs | None, preprocessing: Preprocessing | None) -> jax.ShapeDtypeStruct | None:
    """Shape (1, ...) and dtype of inputs of a module."""
    if inputs is None and preprocessing is not None:
        inputs = jax.eval_shape(preprocessing, jax.ShapeDtypeStruct((1, preprocessing.obs_dim), jnp.float32))
    return None if inputs is None else jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
