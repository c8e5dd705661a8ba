"""What figures and reports must contain."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from scipy.cluster import hierarchy
from small_models import nested_model, random_model

from flax_hmog.analysis import (
    Picture,
    Section,
    Table,
    canonical_loadings,
    cluster_hierarchy,
    cluster_prototypes,
    co_assignment,
    discriminant_axes,
    mean_and_sd,
    merge_clusters,
    plot_co_assignment,
    plot_contingency,
    plot_dendrogram,
    plot_latent_space,
    plot_loadings,
    plot_objective,
    plot_prototypes,
    write_report,
)
from flax_hmog.inference.posterior import latent_mean, posterior_soft_assignments, sample


@pytest.fixture(scope="module")
def fitted():
    """A model with observations and their components."""
    natural = random_model(8, 3, 5)
    x, _, z = sample(natural, jax.random.key(0), 300)
    return natural, np.asarray(x), np.asarray(z)


# Figures


def drawn(figure):
    """The figure, once it could be drawn."""
    figure.canvas.draw()
    return figure


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_objective_figure_labels_each_history_with_its_last_value():
    figure = drawn(plot_objective({"first": [0.0, 1.0, 2.5], "second": [0.0, 1.0, np.nan]}, step_name="Epoch"))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "Epoch"
    assert "nats" in axes.get_ylabel()
    assert texts(axes) == ["second: 1.000", "first: 2.500"]
    assert len(axes.lines) == 2


@pytest.mark.parametrize("kind", ["discriminant", "canonical"])
def test_latent_space_figure_has_one_group_per_cluster(fitted, kind):
    natural, x, z = fitted
    (axes,) = drawn(plot_latent_space(natural, x, axes=kind, groups=z)).axes
    assert len(axes.collections) == len(np.unique(z)) == len(axes.texts)
    assert kind.capitalize() in axes.get_xlabel()
    expected = (discriminant_axes(natural) if kind == "discriminant" else canonical_loadings(natural).axes).project(
        latent_mean(natural, x)
    )[:, :2]
    shown = np.concatenate([np.asarray(points.get_offsets()) for points in axes.collections])
    np.testing.assert_allclose(np.sort(shown, axis=0), np.sort(expected, axis=0), rtol=1e-4, atol=1e-5)


def test_latent_space_figure_says_when_it_leaves_samples_out(fitted):
    natural, x, _ = fitted
    (axes,) = drawn(plot_latent_space(natural, x, max_points=100)).axes
    assert "100 of 300" in axes.get_title(loc="left")
    assert sum(len(points.get_offsets()) for points in axes.collections) == 100


def test_latent_space_figure_of_one_dimension_spreads_clusters_over_rows():
    natural = random_model(5, 1, 3)
    x, _, z = sample(natural, jax.random.key(0), 50)
    (axes,) = drawn(plot_latent_space(natural, x, groups=np.asarray(z))).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]


@pytest.mark.parametrize(("image_shape", "n_axes"), [((2, 4), 6), ((2, 4, 1), 6), (None, 2)])
def test_prototype_and_loading_figures(fitted, image_shape, n_axes):
    natural, _, _ = fitted
    prototypes = cluster_prototypes(natural)
    figure = drawn(plot_prototypes(prototypes, image_shape=image_shape))
    assert len(figure.axes) == n_axes  # images or one heat map, and the colour bar
    low, high = figure.axes[0].images[0].get_clim()
    if image_shape is None:
        assert low == -high
        np.testing.assert_allclose(figure.axes[0].images[0].get_array(), prototypes - prototypes.mean(axis=0))
    else:
        assert (low, high) == (prototypes.min(), prototypes.max())
        np.testing.assert_allclose(figure.axes[1].images[0].get_array(), prototypes[1].reshape(2, 4))
    canonical = canonical_loadings(natural)
    figure = drawn(plot_loadings(canonical, image_shape=image_shape))
    first = figure.axes[0].get_title() if image_shape else figure.axes[0].get_yticklabels()[0].get_text()
    assert first == f"1 ({100 * canonical.variance_shares[0]:.2g} %)"


def test_colour_prototypes_are_shown_in_colour():
    figure = drawn(plot_prototypes(np.random.default_rng(0).normal(size=(3, 12)), image_shape=(2, 2, 3)))
    assert figure.axes[0].images[0].get_array().shape == (2, 2, 3)


def test_heat_map_names_its_features():
    figure = drawn(plot_prototypes(np.eye(3), feature_names=["height", "weight", "age"], names=["a", "b", "c"]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["height", "weight", "age"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    long = drawn(plot_prototypes(np.eye(2), feature_names=["nonflavanoid_phenols_of_the_wine", "x" * 90]))
    assert [len(label.get_text()) for label in long.axes[0].get_xticklabels()] == [32, 32]
    bar = long.axes[1].yaxis.label.get_window_extent()  # within the picture, not cut
    assert 0 <= bar.y0 < bar.y1 <= long.bbox.height


def test_dendrogram_lists_every_component_and_brackets_every_cluster():
    natural = nested_model()
    linkage = cluster_hierarchy(natural)
    labels = merge_clusters(linkage, 3)
    figure = plot_dendrogram(
        linkage, labels=labels, prototypes=cluster_prototypes(natural), image_shape=(1, 3), distance_name="[nats]"
    )
    (axes,) = drawn(figure).axes
    leaves = [int(label.get_text()) for label in axes.get_yticklabels()]
    assert leaves == list(hierarchy.leaves_list(linkage))
    assert sorted(texts(axes)) == ["cluster 0", "cluster 1", "cluster 2"]
    assert len(axes.lines) == len(linkage) + 3  # branches and brackets
    assert axes.get_xlabel() == "[nats]"


def test_dendrogram_of_one_component_is_drawn():
    assert not drawn(plot_dendrogram(np.zeros((0, 4)))).axes[0].lines


def test_dendrogram_of_two_components_begins_at_zero():
    axes = drawn(plot_dendrogram(np.array([[0, 1, 2.0, 2]]))).axes[0]
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 2


def test_many_components_are_drawn():
    rng = np.random.default_rng(0)
    r = rng.dirichlet(np.full(60, 0.05), size=600)
    linkage = cluster_hierarchy(r)
    dendrogram = drawn(plot_dendrogram(linkage, labels=merge_clusters(linkage, 12)))
    assert len(dendrogram.axes[0].get_yticks()) == 60
    matrix = drawn(plot_co_assignment(co_assignment(r), linkage=linkage)).axes[0].images[0]
    assert matrix.get_array().shape == (60, 60)
    prototypes = drawn(plot_prototypes(rng.normal(size=(60, 16)), image_shape=(4, 4)))
    assert sum(len(axes.images) for axes in prototypes.axes) >= 60
    contingency = drawn(plot_contingency(rng.integers(0, 10, 600), r.argmax(axis=1)))
    assert sum(int(text) for text in texts(contingency.axes[0]) if text.isdigit()) == 600


def test_contingency_figure_shows_the_counts():
    figure = drawn(plot_contingency(["x", "y", "y", "y"], [1, 0, 0, 1], label_names=["first", "second"]))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "second"]
    assert sorted(texts(axes)) == ["1", "1", "2"]
    assert {label.get_text() for label in axes.get_yticklabels()} == {"0  (n = 2)", "1  (n = 2)"}


def test_co_assignment_figure_follows_the_order_of_the_leaves():
    r = np.asarray(posterior_soft_assignments(nested_model(), sample(nested_model(), jax.random.key(0), 200)[0]))
    matrix, linkage = co_assignment(r), cluster_hierarchy(r)
    order = hierarchy.leaves_list(linkage)
    axes = drawn(plot_co_assignment(matrix, linkage=linkage)).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), matrix[np.ix_(order, order)])


def test_figures_leave_pyplot_alone(fitted):
    import matplotlib

    before = dict(matplotlib.rcParams)
    natural, x, _ = fitted
    drawn(plot_latent_space(natural, x))
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


# Reports


class Links(HTMLParser):
    """Every tag, every reference a browser would follow, and the text."""

    def __init__(self):
        super().__init__()
        self.tags, self.references, self.text, self.images = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.references += [attrs[name] for name in ("src", "href", "srcset", "data", "action") if name in attrs]
        if attrs.get("class") == "picture":
            self.images.append(attrs)

    def handle_data(self, data):
        self.text += data


def test_report_is_one_self_contained_file(tmp_path):
    sections = [
        Section(
            "First & foremost",
            "A paragraph.\n\nAnother <script>alert(1)</script> one.",
            [Table([{"metric": "NMI <b>", "value": mean_and_sd([0.84, 0.86, 0.85])}, {"metric": "n"}], "Scores.")],
        ),
        Section("Second", pictures=[Picture(plot_objective([0.0, 1.0]), "Rising.", 'A "line" that rises.')]),
    ]
    path = write_report(tmp_path / "new" / "report.html", "Digits <1>", sections, summary="All well.")
    html = path.read_text(encoding="utf-8")
    page = Links()
    page.feed(html)
    assert page.references
    assert all(ref.startswith(("#", "data:,")) for ref in page.references)
    assert not re.search(r"url\((?!#|data:)|@import|https?://", html)
    assert "default-src 'none'" in html
    assert page.tags.count("script") == 1  # its own
    assert "b" not in page.tags
    for text in (
        "Digits <1>",
        "First & foremost",
        "Second",
        "All well.",
        "<script>alert(1)</script>",
        "NMI <b>",
        "0.850 ± 0.010",
        "Scores.",
        "Rising.",
    ):
        assert text in page.text
    assert page.images[0]["aria-label"] == 'A "line" that rises.'
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    anchors = [ref[1:] for ref in page.references if re.match(r"#\d", ref)]
    assert len(anchors) == 2
    assert all(f'id="{anchor}"' in html for anchor in anchors)


def test_columns_of_numbers_share_their_decimals(tmp_path):
    rows = [{"share": 0.2056, "count": 1797, "tiny": 1.0}, {"share": 0.05, "count": 3, "tiny": 1e-9}]
    html = write_report(tmp_path / "r.html", "T", [Section("S", tables=[Table(rows)])]).read_text()
    cells = re.findall(r'<td class="number" data-sort=".*?">(.*?)</td>', html)
    assert cells == ["0.2056", "1,797", "1", "0.0500", "3", "1e-09"]
