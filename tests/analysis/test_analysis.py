"""The analysis package against dense numpy Gaussians, known hierarchies, and what figures and reports must contain."""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest
from scipy.cluster import hierarchy
from small_models import nested_model, random_model, random_moments

from flax_hmog import Diagonal, Moments, PositiveDefinite, Scale, moments_to_natural, natural_to_mean
from flax_hmog.analysis import (
    Picture,
    Section,
    canonical_loadings,
    cluster_differences,
    cluster_hierarchy,
    cluster_prototypes,
    clustering_metrics,
    co_assignment,
    component_distances,
    component_summary,
    contingency_table,
    discriminant_axes,
    mean_and_sd,
    merge_clusters,
    merged_responsibilities,
    plot_co_assignment,
    plot_dendrogram,
    plot_latent_space,
    plot_objective,
    plot_prototypes,
    write_report,
)
from flax_hmog.inference.posterior import posterior_soft_assignments, sample

SHAPE = (7, 3, 4)
CASES = [
    (SHAPE, Scale), (SHAPE, Diagonal), (SHAPE, PositiveDefinite),
    ((5, 1, 3), Diagonal), ((4, 4, 2), Diagonal), ((6, 2, 1), Diagonal),
]  # fmt: skip


def dense(moments):
    """Means (K, D) and covariances (K, D, D) of x given each component, and the noise (D, D), in float64."""
    noise = np.asarray(jax.tree.map(jax.numpy.asarray, moments.noise).dense(), np.float64)
    loadings = np.asarray(moments.loadings, np.float64)
    covariances = loadings @ np.asarray(moments.covariances.entries, np.float64) @ loadings.T + noise
    return np.asarray(moments.means, np.float64) @ loadings.T + moments.bias, covariances, noise


# Clusters


@pytest.mark.parametrize(("shape", "rep"), CASES)
def test_component_distances_are_those_of_dense_gaussians(shape, rep):
    moments = random_moments(*shape, rep=rep)
    means, covariances, _ = dense(moments)
    n_components = shape[2]
    kl, overlap = np.zeros((n_components, n_components)), np.zeros((n_components, n_components))
    log_det = np.linalg.slogdet(covariances)[1]
    for j in range(n_components):
        for k in range(n_components):
            gap, inverse = means[j] - means[k], np.linalg.inv(covariances[k])
            directed = np.trace(inverse @ covariances[j]) - shape[0] + log_det[k] - log_det[j] + gap @ inverse @ gap
            kl[j, k] += directed / 2
            kl[k, j] += directed / 2
            middle = (covariances[j] + covariances[k]) / 2
            overlap[j, k] = (
                gap @ np.linalg.solve(middle, gap) / 8
                + (np.linalg.slogdet(middle)[1] - (log_det[j] + log_det[k]) / 2) / 2
            )
    natural = random_model(*shape, rep=rep)
    np.testing.assert_allclose(component_distances(natural, measure="kl"), kl, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(component_distances(natural), overlap, rtol=2e-4, atol=1e-5)


def test_component_distances_do_not_depend_on_the_latent_basis():
    moments = random_moments(*SHAPE)
    rng = np.random.default_rng(1)
    basis = (rng.normal(size=(3, 3)) + 2 * np.eye(3)).astype(np.float32)
    covariances = basis @ moments.covariances.entries @ basis.T
    other = Moments(
        loadings=moments.loadings @ np.linalg.inv(basis),
        bias=moments.bias,
        noise=moments.noise,
        weights=moments.weights,
        means=moments.means @ basis.T,
        covariances=PositiveDefinite((covariances + covariances.transpose(0, 2, 1)) / 2),
    )
    before, after = (component_distances(moments_to_natural(model)) for model in (moments, other))
    np.testing.assert_allclose(after, before, rtol=1e-3)


def test_identical_components_are_at_distance_zero():
    moments = random_moments(5, 2, 2)
    twin = Moments(
        moments.loadings,
        moments.bias,
        moments.noise,
        moments.weights,
        np.repeat(moments.means[:1], 2, axis=0),
        PositiveDefinite(np.repeat(moments.covariances.entries[:1], 2, axis=0)),
    )
    for measure in ("kl", "bhattacharyya"):
        np.testing.assert_allclose(component_distances(moments_to_natural(twin), measure=measure), 0, atol=1e-9)


def test_co_assignment_rows_are_probabilities_of_a_second_draw():
    rng = np.random.default_rng(0)
    r = rng.dirichlet(np.full(4, 0.5), size=(20, 10)).astype(np.float32)
    flat = r.reshape(-1, 4).astype(np.float64)
    matrix = co_assignment(r)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(matrix[1], np.average(flat, axis=0, weights=flat[:, 1]), rtol=1e-5)
    cosine = co_assignment(r, normalize="cosine")
    np.testing.assert_allclose(np.diag(cosine), 1, rtol=1e-6)
    np.testing.assert_allclose(cosine, cosine.T)
    assert cosine.max() <= 1 + 1e-12


def test_co_assignment_of_hard_assignments_and_of_an_empty_component_is_the_identity():
    r = np.eye(3)[[0, 0, 2]]
    for normalize in ("rows", "cosine"):
        np.testing.assert_allclose(co_assignment(r, normalize=normalize), np.eye(3), atol=1e-15)


@pytest.mark.parametrize("measure", ["bhattacharyya", "kl"])
@pytest.mark.parametrize("method", ["average", "complete", "single", "weighted"])
def test_hierarchy_recovers_known_nesting(method, measure):
    linkage = cluster_hierarchy(nested_model(), method=method, measure=measure)
    assert hierarchy.is_valid_linkage(linkage)
    np.testing.assert_array_equal(merge_clusters(linkage, 3), [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(merge_clusters(linkage, 2), [0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(merge_clusters(linkage, 1), np.zeros(6))
    np.testing.assert_array_equal(merge_clusters(linkage, 6), np.arange(6))


def test_hierarchy_from_responsibilities_merges_components_that_share_samples():
    natural = nested_model()
    x, _, z = sample(natural, jax.random.key(1), 400)
    r = np.asarray(posterior_soft_assignments(natural, x))
    labels = merge_clusters(cluster_hierarchy(r), 3)
    np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2])
    merged = merged_responsibilities(r, labels)
    np.testing.assert_allclose(merged.sum(axis=1), r.sum(axis=1), rtol=1e-6)
    assert clustering_metrics(labels[np.asarray(z)], merged.argmax(axis=1))["accuracy"] == 1


def test_cuts_have_exactly_the_number_of_clusters_even_with_ties():
    linkage = cluster_hierarchy(np.full((10, 6), 1 / 6))
    for n_clusters in range(1, 7):
        assert len(np.unique(merge_clusters(linkage, n_clusters))) == n_clusters


def test_one_component_is_its_own_hierarchy():
    linkage = cluster_hierarchy(random_model(6, 2, 1))
    assert linkage.shape == (0, 4)
    np.testing.assert_array_equal(merge_clusters(linkage, 1), [0])


def test_merged_responsibilities_keep_leading_dimensions():
    r = np.random.default_rng(0).dirichlet(np.ones(3), size=(2, 5))
    merged = merged_responsibilities(r, [0, 1, 0])
    np.testing.assert_allclose(merged[..., 0], r[..., 0] + r[..., 2])
    assert merged.shape == (2, 5, 2)


@pytest.mark.parametrize("rep", [Scale, Diagonal, PositiveDefinite])
def test_prototypes_are_the_dense_means(rep):
    moments = random_moments(*SHAPE, rep=rep)
    means, _, _ = dense(moments)
    natural = random_model(*SHAPE, rep=rep)
    np.testing.assert_allclose(cluster_prototypes(natural), means, rtol=1e-4, atol=1e-4)
    merged = cluster_prototypes(natural, labels=[0, 1, 0, 1])
    np.testing.assert_allclose(
        merged[0], np.average(means[[0, 2]], axis=0, weights=moments.weights[[0, 2]]), rtol=1e-4, atol=1e-4
    )
    everything = cluster_prototypes(natural, labels=np.zeros(4, int))[0]
    np.testing.assert_allclose(everything, natural_to_mean(natural).observable_mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rep", [Scale, Diagonal, PositiveDefinite])
def test_differences_are_those_of_dense_mixtures(rep):
    moments, natural = random_moments(*SHAPE, rep=rep), random_model(*SHAPE, rep=rep)
    means, covariances, _ = dense(moments)
    weights, labels = np.asarray(moments.weights, np.float64), np.array([0, 1, 0, 2])

    def mixture(chosen):
        w, m, c = weights[chosen], means[chosen], np.einsum("kdd->kd", covariances[chosen])
        mean = np.average(m, axis=0, weights=w)
        return mean, np.average(c + m**2, axis=0, weights=w) - mean**2, w.sum()

    parts = [mixture(labels == c) for c in range(3)]
    deviation = np.sqrt(sum(variance * share for _, variance, share in parts))
    expected = [(mixture(labels == c)[0] - mixture(labels != c)[0]) / deviation for c in range(3)]
    np.testing.assert_allclose(cluster_differences(natural, labels=labels), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(cluster_differences(natural), cluster_differences(natural, labels=np.arange(4)))
    with pytest.raises(ValueError, match="cluster_differences: `natural` must have two clusters or more; got 1"):
        cluster_differences(natural, labels=np.zeros(4, int))


@pytest.mark.parametrize("rep", [Scale, Diagonal, PositiveDefinite])
def test_component_summary(rep):
    moments = random_moments(*SHAPE, rep=rep)
    natural = random_model(*SHAPE, rep=rep)
    x, _, _ = sample(natural, jax.random.key(0), 200)
    summary = component_summary(natural, x)
    _, covariances, noise = dense(moments)
    volumes = (np.linalg.slogdet(covariances)[1] - np.linalg.slogdet(noise)[1]) / 2
    np.testing.assert_allclose(summary.log_volumes, volumes, rtol=1e-4)
    np.testing.assert_allclose(summary.weights, moments.weights, rtol=1e-4)
    r = np.asarray(posterior_soft_assignments(natural, x), np.float64)
    np.testing.assert_allclose(summary.expected_counts, r.sum(axis=0), rtol=1e-6)
    entropy = -(r * np.log(np.maximum(r, 1e-300))).sum(axis=1)
    np.testing.assert_allclose(summary.entropies, (r * entropy[:, None]).sum(axis=0) / r.sum(axis=0), rtol=1e-5)
    assert [row["component"] for row in summary.rows()] == [0, 1, 2, 3]


# Loadings


@pytest.mark.parametrize(("shape", "rep"), CASES)
def test_canonical_loadings_keep_the_signal_and_are_orthogonal(shape, rep):
    moments = random_moments(*shape, rep=rep)
    natural = random_model(*shape, rep=rep)
    canonical = canonical_loadings(natural)
    w, m = np.asarray(moments.weights, np.float64), np.asarray(moments.means, np.float64)
    gap = m - w @ m
    latent = np.einsum("k,kij->ij", w, moments.covariances.entries) + (w[:, None] * gap).T @ gap
    signal = moments.loadings @ latent @ moments.loadings.T
    np.testing.assert_allclose(canonical.loadings @ canonical.loadings.T, signal, rtol=1e-3, atol=1e-3)
    # axes are orthogonal where the noise is white, in order of their signal-to-noise ratio, which the shares follow
    _, _, noise = dense(moments)
    gram = canonical.loadings.T @ np.linalg.solve(noise, canonical.loadings)
    ratios = canonical.axes.scores
    np.testing.assert_allclose(gram, np.diag(ratios), atol=1e-4 * ratios[0])
    assert (np.diff(ratios) <= 0).all()
    np.testing.assert_allclose(canonical.variance_shares, ratios / (ratios.sum() + shape[0]))
    largest = np.abs(canonical.loadings).argmax(axis=0)
    assert (canonical.loadings[largest, np.arange(shape[1])] > 0).all()
    # in the canonical latents y is white, and the loadings still predict the same x
    projected = canonical.axes.directions.T @ latent @ canonical.axes.directions
    np.testing.assert_allclose(projected, np.eye(shape[1]), atol=1e-4)
    y = np.random.default_rng(2).normal(size=(5, shape[1]))
    np.testing.assert_allclose(
        canonical.axes.project(y) @ canonical.loadings.T, (y - w @ m) @ moments.loadings.T, rtol=1e-3, atol=1e-3
    )


def test_canonical_loadings_of_a_rotated_model_are_the_same():
    moments = random_moments(*SHAPE)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    rotation = rotation.astype(np.float32)
    turned = Moments(
        moments.loadings @ rotation.T,
        moments.bias,
        moments.noise,
        moments.weights,
        moments.means @ rotation.T,
        PositiveDefinite(rotation @ moments.covariances.entries @ rotation.T),
    )
    before, after = (canonical_loadings(moments_to_natural(model)).loadings for model in (moments, turned))
    np.testing.assert_allclose(after, before, atol=1e-3)


def test_more_latent_than_observed_dimensions_leave_silent_axes():
    canonical = canonical_loadings(moments_to_natural(random_moments(2, 3, 2)))
    assert canonical.loadings.shape == (2, 3)
    np.testing.assert_allclose(canonical.loadings[:, 2], 0, atol=1e-5)


def test_discriminant_axes_find_the_direction_in_which_components_differ():
    moments = random_moments(6, 3, 2)
    covariance = np.diag([9.0, 1.0, 4.0]).astype(np.float32)
    means = np.array([[0, -2, 0], [0, 2, 0]], np.float32)
    natural = moments_to_natural(
        Moments(
            moments.loadings,
            moments.bias,
            moments.noise,
            np.full(2, 0.5, np.float32),
            means,
            PositiveDefinite(np.stack([covariance, covariance])),
        )
    )
    axes = discriminant_axes(natural, 2)
    np.testing.assert_allclose(np.abs(axes.directions[:, 0]), [0, 1, 0], atol=1e-4)
    np.testing.assert_allclose(axes.scores, [4, 0], atol=1e-3)
    within = axes.directions.T @ covariance @ axes.directions
    np.testing.assert_allclose(within, np.eye(2), atol=1e-4)


# Metrics


def test_metrics_of_permuted_labels_are_perfect():
    labels = np.random.default_rng(0).integers(0, 4, 100)
    metrics = clustering_metrics(np.array(list("abcd"))[labels], np.array([7, 2, 9, 0])[labels])
    assert metrics == pytest.approx({"nmi": 1, "ari": 1, "accuracy": 1})


def test_accuracy_matches_one_to_one():
    # cluster 0 holds both labels; label 1 is split over clusters 1 and 2, of which one counts
    metrics = clustering_metrics([0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 2])
    assert metrics["accuracy"] == pytest.approx(6 / 8)
    counts, clusters, labels = contingency_table([0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 2])
    np.testing.assert_array_equal(counts, [[3, 1], [0, 3], [0, 1]])
    np.testing.assert_array_equal(clusters, [0, 1, 2])
    np.testing.assert_array_equal(labels, [0, 1])


def test_a_missing_package_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"clustering_metrics: `scikit-learn`.*pip install \"flax-hmog\[cluster\]\""):
        clustering_metrics([0, 1], [0, 1])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot_objective: `matplotlib`.*pip install \"flax-hmog\[plots\]"):
        plot_objective([0, 1])


# What users get wrong

RESPONSIBILITIES = np.full((4, 3), 1 / 3)
NATURAL = random_model(6, 2, 3)
MISTAKES = {
    "distance of moments": (lambda: component_distances(random_moments(6, 2, 3)), TypeError, "must be Natural"),
    "unknown measure": (lambda: component_distances(NATURAL, measure="l2"), ValueError, "`measure` must be one of"),
    "unknown linkage": (lambda: cluster_hierarchy(NATURAL, method="ward"), ValueError, "`method` must be one of"),
    "measure of data": (lambda: cluster_hierarchy(RESPONSIBILITIES, measure="kl"), ValueError, "must be None"),
    "unnormalised": (lambda: co_assignment(2 * RESPONSIBILITIES), ValueError, "must be probabilities.*row 0"),
    "logits": (lambda: co_assignment(np.log(RESPONSIBILITIES)), ValueError, "must be probabilities"),
    "not finite": (lambda: co_assignment(np.full((2, 2), np.nan)), ValueError, "must be finite; got 4 entries"),
    "no numbers": (lambda: co_assignment(np.array([["a", "b"]])), TypeError, "must hold real numbers"),
    "vector": (lambda: co_assignment(np.ones(3)), ValueError, "must have shape"),
    "normalisation": (lambda: co_assignment(RESPONSIBILITIES, normalize="max"), ValueError, "must be one of"),
    "no linkage": (lambda: merge_clusters(np.ones((3, 4)), 2), ValueError, "must be a hierarchy"),
    "too many": (lambda: merge_clusters(cluster_hierarchy(NATURAL), 4), ValueError, "at most 3"),
    "labels short": (lambda: merged_responsibilities(RESPONSIBILITIES, [0, 1]), ValueError, r"shape \(3,\)"),
    "labels with gap": (lambda: merged_responsibilities(RESPONSIBILITIES, [0, 2, 2]), ValueError, "number the clus"),
    "summary of wrong x": (lambda: component_summary(NATURAL, np.ones((3, 5))), ValueError, "shape"),
    "axes": (lambda: discriminant_axes(NATURAL, 3), ValueError, "at most 2"),
    "projection": (lambda: discriminant_axes(NATURAL).project(np.ones((4, 3))), ValueError, r"shape \(4, 2\)"),
    "metrics of other length": (lambda: clustering_metrics([0, 1], [0]), ValueError, r"shape \(2,\)"),
    "image shape": (lambda: plot_prototypes(np.ones((2, 6)), image_shape=(2, 2)), ValueError, "product 6"),
    "thumbnails without shape": (
        lambda: plot_dendrogram(cluster_hierarchy(NATURAL), prototypes=np.ones((3, 6))),
        ValueError,
        "product 6",
    ),
    "names": (lambda: plot_prototypes(np.ones((2, 6)), names=["a"]), ValueError, "`names` must have shape"),
    "history": (lambda: plot_objective(np.ones((2, 2))), ValueError, r"`histories` must have shape \(T,\)"),
    "latent axes": (lambda: plot_latent_space(NATURAL, np.ones((2, 6)), axes="pca"), ValueError, "must be one of"),
    "matrix": (lambda: plot_co_assignment(np.ones((2, 3))), ValueError, r"must have shape \(K, K\)"),
    "no sections": (lambda: write_report("r.html", "T", []), ValueError, "at least one Section"),
    "a dict for a section": (lambda: write_report("r.html", "T", [{}]), TypeError, "got dict"),
    "a list for a table": (lambda: write_report("r.html", "T", [Section("S", tables=[[{}]])]), TypeError, "got list"),
    "no alternative": (
        lambda: write_report("r.html", "T", [Section("S", pictures=[Picture(None, "c", " ")])]),
        ValueError,
        "`alt`",
    ),
    "one seed": (lambda: mean_and_sd([1.0]), ValueError, "Run more seeds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    call, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        call()
