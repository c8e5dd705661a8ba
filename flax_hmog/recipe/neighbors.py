"""Clusters of rows for which no distortion is known: the neighbours of a row are its other views."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_hmog.analysis.clusters import merged_responsibilities
from flax_hmog.analysis.flow import merge_by_flow
from flax_hmog.em.fit import fit_em
from flax_hmog.em.options import PseudoCounts
from flax_hmog.heads.modules import AnalyticHMoG, DifferentiableHMoG
from flax_hmog.inference.posterior import infer
from flax_hmog.model.checks import check_size, check_type, named
from flax_hmog.model.head import Head
from flax_hmog.model.kinds import Array
from flax_hmog.model.optional import require
from flax_hmog.model.typed import Floats, Samples, Variables
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.networks.neighbors import nearest_neighbors, neighbor_embedding, neighbor_weights
from flax_hmog.networks.objectives import distillation, negative_log_likelihood
from flax_hmog.recipe.config import FEATURE_LAT_DIM
from flax_hmog.recipe.encoders import features_shape
from flax_hmog.training import Restored, create_state, make_mesh, make_train_step

AXES = 50  # principal axes in which neighbours are sought
SAME_LENGTH = 1e-3  # of how far rows are apart: differences in length below which rows differ by their angles only
PLACES = 10  # columns of the embedding, and features of the encoder where none is given
PER_CLUSTER, LEAST_COMPONENTS, ROWS_PER_COMPONENT = 4, 20, 20
WALK = 6  # steps over neighbours that say which components belong together
COUNTS = PseudoCounts(mean_share=0.01)  # at the centre they would widen components towards each other
HIDDEN = (256, 256)
STEPS, BATCH, RATE, LIKELIHOOD_WEIGHT = 1000, 256, 1e-3, 0.05


def fit_neighbors(
    x: Samples, n_clusters: int, key: Array, *, encoder: nn.Module | None = None, head: Head | None = None,
    n_neighbors: int = 15, n_components: int | None = None, steps: int = STEPS,
) -> Restored:  # fmt: skip
    """Clusters of rows without labels or distortions, bent ones too, and an encoder that puts new rows into them.

    Every row is placed near its nearest neighbours, by the first 50 principal axes of x (`neighbor_embedding`). EM
    fits a mixture of many components to the places; they are merged to clusters that a walk from neighbour to
    neighbour seldom leaves (`merge_by_flow`), of any size. Encoder and head learn these clusters from x. All rows are
    compared with each other: time grows with the square of the rows, memory with their number.

    Args:
        x: rows (N, D), with columns in units that compare; those of one length, as tf-idf and embeddings, are compared
            by their angles.
        n_clusters: number of clusters.
        key: PRNG key.
        encoder: any linen module from rows (B, D) to features (B, F); None takes `MLP(10, (256, 256), "batch")`.
        head: on its features, with `n_clusters` components; None takes a `DifferentiableHMoG`.
        n_neighbors: of each row.
        n_components: K of the mixture of places; None takes four for each cluster and 20 at least, but no more than
            one for every 20 rows.
        steps: of training encoder and head, by 256 rows each.

    Returns:
        `Restored`: called with rows it gives `HMoGOutput` of the clusters, by one forward pass. Its `state` holds the
        places of the rows of the fit, `embedding` (N, 10), and the probabilities that were taught, `taught`
        (N, n_clusters); `history` says for which share of the rows the encoder agrees with them.

    Raises:
        ValueError: for rows that are no matrix or not finite, or sizes that do not fit them.
        ImportError: without the packages of the extra `train`.

    Example:
        >>> from flax_hmog.toy import x
        >>> found = fit_neighbors(x, 3, jax.random.key(0), n_neighbors=3, steps=20)
        >>> found(x).log_responsibilities.shape, found.state["embedding"].shape
        ((12, 3), (12, 4))
    """
    with named("fit_neighbors"):
        rows = _checked(x)
        count = len(rows)
        if n_components is None:
            wanted = max(PER_CLUSTER * n_clusters, LEAST_COMPONENTS)
            n_components = max(n_clusters, min(wanted, count // ROWS_PER_COMPONENT))
        check_size("n_clusters", n_clusters, at_most=count)
        check_size("n_components", n_components, at_least=n_clusters, at_most=count)
        check_size("n_neighbors", n_neighbors, at_most=count - 1)
        check_size("steps", steps)
        module = _module(encoder, head, n_clusters, rows.shape[1])
        keys = jax.random.split(key, 3)
        axes = _principal_components(rows)
        numbers, distances = nearest_neighbors(axes, n_neighbors)
        weights = neighbor_weights(distances)
        places = neighbor_embedding(axes[:, :PLACES], numbers, weights, keys[0])
        taught = _clusters(places, np.asarray(numbers), np.asarray(weights), n_clusters, n_components, keys[1])
        variables = _learn(module, rows, taught, keys[2], steps)
        found = Restored(
            step=steps, module=module, module_variables=variables, head=module.head, place="head",
            inputs=jax.ShapeDtypeStruct((1, rows.shape[1]), jnp.float32), preprocessing=None, clusters=None,
            state={"embedding": np.asarray(places), "taught": taught}, progress={}, history=[], metrics={}, config={},
            versions={},
        )  # fmt: skip
        agrees = np.asarray(found(rows).log_responsibilities).argmax(axis=1) == taught.argmax(axis=1)
        found.history.append({"agreement": float(agrees.mean())})
        return found


def _checked(x: object) -> Floats:
    """Rows (N, D), finite, in float32."""
    given = np.asarray(x.toarray() if hasattr(x, "toarray") else x)
    if given.dtype.kind not in "biuf":
        raise ValueError(f"fit_neighbors: `x` must hold real numbers; got dtype {given.dtype}. Convert it first.")
    rows = given.astype(np.float32)
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"fit_neighbors: `x` must have shape (N, D); got {rows.shape}. Give one row for each sample.")
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).argmax())
        raise ValueError(f"fit_neighbors: `x` must be finite; got row {bad} with {rows[bad].min()}. Impute or drop it.")
    if not np.ptp(rows, axis=0).any():
        raise ValueError("fit_neighbors: `x` must have rows that differ; got copies of one. Give more rows.")
    return cast(Floats, rows)


def _module(encoder: nn.Module | None, head: Head | None, n_clusters: int, obs_dim: int) -> Clusterer:
    if encoder is None:
        encoder = MLP(PLACES, HIDDEN, normalization="batch")
    check_type("encoder", encoder, nn.Module, "Give a linen module from rows to features.")
    if head is None:
        head = DifferentiableHMoG(min(FEATURE_LAT_DIM, features_shape(encoder, obs_dim)[1]), n_clusters)
    if head.n_components != n_clusters:
        raise ValueError(
            f"fit_neighbors: `head` must have one component for each of the {n_clusters} clusters; got "
            f"{head.n_components}. Change its n_components."
        )
    return Clusterer(encoder, head)


def _principal_components(rows: Floats) -> Floats:
    """Coordinates of rows along their first principal axes (N, at most 50); of equal length where the rows are."""
    decomposition = require("sklearn.decomposition", "train")
    centred = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)  # PCA squares rows first: no digits far out
    axes = decomposition.PCA(min(AXES, *rows.shape), random_state=0).fit_transform(centred)
    lengths = np.linalg.norm(rows, axis=1)
    # far from the origin all lengths are much the same
    if np.ptp(lengths) < SAME_LENGTH * np.sqrt(np.mean(np.sum(np.square(centred), axis=1))):
        axes = axes / np.maximum(np.linalg.norm(axes, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return cast(Floats, axes)


def _clusters(
    places: Array, numbers: np.ndarray, weights: np.ndarray, n_clusters: int, n_components: int, key: Array
) -> Floats:
    """Probabilities of clusters (N, C): components of places, merged by the walk from neighbour to neighbour."""
    head = AnalyticHMoG(places.shape[1], n_components, obs_rep="scale")  # all axes of places have one unit
    natural = fit_em(head, places, key, regularizer=COUNTS, tolerance=1e-2, max_distance=np.inf).natural
    responsibilities = np.exp(np.asarray(infer(natural, places).log_responsibilities))
    component = np.eye(n_components)[responsibilities.argmax(axis=1)]
    clusters = merge_by_flow(_flow(component, numbers, weights), n_clusters)
    return cast(Floats, np.asarray(merged_responsibilities(responsibilities, clusters), np.float32))


def _flow(component: Floats, numbers: np.ndarray, weights: np.ndarray) -> Floats:
    """Number of walks over neighbours from one component to another in so many steps (K, K)."""
    sparse = require("scipy.sparse", "train")
    count = len(numbers)
    rows = np.repeat(np.arange(count), numbers.shape[1])
    graph = sparse.csr_matrix((weights.ravel().astype(np.float64), (rows, numbers.ravel())), (count, count))
    graph = graph + graph.T
    degree = np.asarray(graph.sum(axis=1))
    reached = component
    for _ in range(WALK):
        reached = (graph @ reached) / degree
    flow = (component * degree).T @ reached
    return cast(Floats, flow + flow.T)


def _learn(module: Clusterer, rows: Floats, taught: Floats, key: Array, steps: int) -> dict[str, Any]:
    """Variables with which the module gives rows the clusters that are taught."""
    init_key, rows_key, dropout_key = jax.random.split(key, 3)
    size = min(BATCH, len(rows))

    def loss(variables: Variables, x: Array, extra: tuple[Array, Array]) -> tuple[Array, Any]:
        key, targets = extra
        mutable = [name for name in variables if name != "params"]
        (output, head_only), collections = module.apply(
            variables, x, train=True, method="joint_and_head_outputs", mutable=mutable, rngs={"dropout": key}
        )
        density = negative_log_likelihood(head_only) / module.head.lat_dim
        return distillation(output, targets) + LIKELIHOOD_WEIGHT * density, collections

    mesh = make_mesh(devices=jax.local_devices()[:1])
    variables = nn.unbox(jax.jit(module.init)(init_key, rows[:size]))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    state = create_state(module, variables, optimizer, rows[:size], mesh)
    step = make_train_step(loss, state, mesh)
    draws = np.random.default_rng(np.asarray(jax.random.key_data(rows_key)))
    order = draws.permutation(len(rows))
    for number in range(steps):
        if len(order) < size:
            order = draws.permutation(len(rows))
        chosen, order = order[:size], order[size:]
        state, _ = step(state, rows[chosen], (jax.random.fold_in(dropout_key, number), taught[chosen]))
    return cast(dict[str, Any], jax.tree.map(jnp.asarray, state.variables))
