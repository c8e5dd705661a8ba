"""Starts with many clusters: sums over sorted rows against numpy, and k-means that does not depend on what does not count."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_cpus

from flax_hmog.em import k_means as module
from flax_hmog.em.initialize import _block_sums, _sorted_sums
from flax_hmog.em.k_means import cluster_sums, is_large, k_means

CLUSTERS, ROWS = 40, 900


@pytest.fixture(autouse=True)
def few_rows_are_many(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_ROWS", 4 * CLUSTERS)
    monkeypatch.setattr(module, "SAMPLE_ROWS_PER_CLUSTER", 1)
    assert is_large(ROWS, CLUSTERS)


def problem(spread=0.05):
    """Points (N, 3) in 40 heaps on a grid, whose distances are 1, and their heaps."""
    rng = np.random.default_rng(0)
    heaps = rng.permutation(np.arange(ROWS) % CLUSTERS)
    grid = np.stack(np.unravel_index(np.arange(CLUSTERS), (4, 5, 2)), axis=1)
    return (grid[heaps] + spread * rng.standard_normal((ROWS, 3))).astype(np.float32), heaps


def clusters(points, share=None, known=None, shards=None):
    share = np.ones(len(points)) if share is None else share
    share = jnp.asarray(share / share.sum(), jnp.float32)
    known = None if known is None else jnp.asarray(known)
    return np.asarray(k_means(jnp.asarray(points), share, jax.random.key(3), CLUSTERS, known, shards))


def as_pairs(labels):
    return labels[:, None] == labels


def test_sums_over_sorted_rows_are_those_of_numpy():
    """Of clusters with no row, with some, and with more than a tile holds."""
    rng = np.random.default_rng(1)
    points = rng.standard_normal((ROWS, 3))
    labels = np.where(rng.random(ROWS) < 0.5, 7, 2 * rng.integers(20, size=ROWS))
    share, shift = rng.random(ROWS), rng.standard_normal((CLUSTERS, 3))
    assert np.bincount(labels).max() > module.TILE_ROWS
    mass, square = cluster_sums(
        lambda shift, y, share: (share.sum(), ((y + shift[None]) * share[:, None]).T @ y),
        jnp.asarray(shift, jnp.float32), *(jnp.asarray(a, jnp.float32) for a in (points, share)),
        labels=jnp.asarray(labels), n_clusters=CLUSTERS, shards=None,
    )  # fmt: skip
    for k in range(CLUSTERS):
        own, weight = points[labels == k], share[labels == k]
        np.testing.assert_allclose(mass[k], weight.sum(), rtol=1e-5)
        np.testing.assert_allclose(square[k], ((own + shift[k]) * weight[:, None]).T @ own, rtol=1e-4, atol=1e-4)


def test_moments_of_clusters_are_the_same_by_either_way():
    points, labels = problem()
    share = np.random.default_rng(2).random(ROWS)
    given = jnp.asarray(points), jnp.asarray(share / share.sum(), jnp.float32), jnp.asarray(labels), CLUSTERS, None
    for one, other in zip(_sorted_sums(*given), _block_sums(*given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_heaps_that_are_apart_are_found():
    points, heaps = problem()
    labels = clusters(points)
    assert len(np.unique(labels)) == CLUSTERS
    np.testing.assert_array_equal(as_pairs(labels), as_pairs(heaps))


@pytest.mark.parametrize("change", ["order", "weight 0", "repeated rows"])
def test_clusters_do_not_depend_on_what_does_not_count(change):
    """Where heaps overlap, so that another sample would give others."""
    points, _ = problem(spread=0.5)
    rng = np.random.default_rng(4)
    repeats = 1 + (np.arange(ROWS) % 3)
    if change == "order":
        order = rng.permutation(ROWS)
        before, after = clusters(points)[order], clusters(points[order])
    elif change == "weight 0":
        more = np.concatenate([points, 5 * rng.standard_normal((77, 3)).astype(np.float32)])
        before, after = clusters(points), clusters(more, np.arange(ROWS + 77) < ROWS)[:ROWS]
    else:
        before = np.repeat(clusters(points, repeats), repeats)
        after = clusters(np.repeat(points, repeats, axis=0))
    assert np.mean(before == after) > 0.999


def test_known_clusters_stay():
    points, heaps = problem()
    known = np.full(ROWS, -1)
    some = np.argsort(heaps)[::3]  # of all heaps
    known[some] = heaps[some]
    np.testing.assert_array_equal(clusters(points, known=known), heaps)


SHARDED = """
import json, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import test_starts as t
t.module.SAMPLE_ROWS, t.module.SAMPLE_ROWS_PER_CLUSTER = 4 * t.CLUSTERS, 1
points, _ = t.problem(spread=0.5)
found = [t.clusters(points).tolist()]
for count in (2, 4):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    place = NamedSharding(mesh, PartitionSpec("data"))
    share = t.jnp.full(t.ROWS, 1 / t.ROWS)
    rows = [jax.device_put(a, place) for a in (points, share)]
    f = jax.jit(lambda y, v: t.k_means(y, v, jax.random.key(3), t.CLUSTERS, None, (mesh, ("data",))))
    found.append(f(*rows).tolist())
print(json.dumps(found))
"""


def test_clusters_are_the_same_on_several_devices():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=on_cpus(4) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, *others = (np.array(labels) for labels in json.loads(done.stdout.splitlines()[-1]))
    for labels in others:
        assert np.mean(labels == one) > 0.999
