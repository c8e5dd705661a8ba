"""Scores of a model and of two-stage baselines on the test part."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flax_hmog.analysis.baselines import fit_baselines
from flax_hmog.inference.posterior import HMoGOutput, merge_output
from flax_hmog.recipe.config import Experiment
from flax_hmog.recipe.inputs import Inputs
from flax_hmog.recipe.parts import Part
from flax_hmog.recipe.template import imported
from flax_hmog.training import Affine
from flax_hmog.training.processes import to_host


def evaluate(
    model: Callable[[jax.Array], HMoGOutput],
    inputs: Inputs,
    clusters: np.ndarray | None = None,
    scores: Iterable[str] = (),
) -> dict[str, float]:
    """Mean log-density of the test part in nats per sample, NMI, ARI and ACC where there are labels, further scores.

    Args:
        model: gives the output for `inputs.test_rows`; it is not called where there are none.
        inputs: the data.
        clusters: cluster of each component (K,), or None where every component is one.
        scores: import paths of further scores.
    """
    part = inputs.dataset.test
    if not len(part):
        return {}
    x, weights = inputs.test_rows
    output = model(x)
    metrics = {"test_log_density": float(jnp.sum(output.log_density * weights) / len(part))}
    if part.part_labels is None and not scores:
        return metrics
    if clusters is not None:
        output = merge_output(output, clusters, int(clusters.max()) + 1)
    if part.part_labels is not None:
        assignments = to_host(jnp.argmax(output.log_responsibilities, axis=-1))[: len(part)]
        metrics |= part.agreement(assignments)
    return metrics | own_scores(scores, jax.tree.map(lambda leaf: to_host(leaf)[: len(part)], output), part)


def of_all_rows(train: float, count: int, inputs: Inputs, metrics: dict[str, float]) -> float:
    """Mean log-density of the rows of both parts, in their units before they were scaled.

    Seeds split the rows differently, and scale them by what they train on; by this number they compare.

    Args:
        train: mean log-density of the training rows.
        count: number of these.
        inputs: the data.
        metrics: of `evaluate`.
    """
    held_out = len(inputs.dataset.test)
    scales = [np.log(step.scale).sum() for step in inputs.preprocessing.steps if isinstance(step, Affine)]
    mean = (count * train + held_out * metrics.get("test_log_density", 0.0)) / (count + held_out)
    return mean - float(sum(scales))


def own_scores(paths: Iterable[str], output: HMoGOutput, part: Part) -> dict[str, float]:
    """Scores of a user's, by the names of their functions.

    Args:
        paths: import paths MODULE:FUNCTION.
        output: of clusters, for the rows of the part, in numpy.
        part: rows and labels; labels are None where there are none.

    Raises:
        ValueError: for a path that leads to no function.
    """
    found = {path.rpartition(":")[2]: imported("experiment: `scores`", path) for path in paths}
    return {name: float(score(output, part.part_labels)) for name, score in found.items()}


def baseline_scores(inputs: Inputs, config: Experiment, seed: int) -> dict[str, dict[str, float]]:
    """Scores of two-stage baselines, if the experiment asks for them."""
    train, test = inputs.dataset.train, inputs.dataset.test
    if not config.baselines or test.part_labels is None:
        return {}
    rows = (inputs.read(part, slice(None)) for part in (train, test))
    fitted = fit_baselines(*rows, lat_dim=config.model.lat_dim, n_components=config.n_clusters, seed=seed)
    return {
        name: test.agreement(baseline.assignments)
        | {"train_log_density": baseline.train_log_density, "test_log_density": baseline.test_log_density}
        for name, baseline in fitted.items()
    }
