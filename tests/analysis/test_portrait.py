"""Portraits beside what numpy says of the same rows, and pages of large models."""

import re

import jax
import numpy as np
import pytest
from scipy.cluster import hierarchy
from small_models import random_model

from flax_hmog import infer
from flax_hmog.analysis import component_affinity, information_hierarchy, merge_clusters, write_report
from flax_hmog.analysis.page import model_sections, page_images, selection_section
from flax_hmog.analysis.pictures import as_bytes, sheet
from flax_hmog.analysis.portrait import MEMBERS, Portrait, Subject, portray
from flax_hmog.inference.posterior import sample

CLUSTERS = np.array([0, 1, 1, 0, 2])
NAMES = tuple(f"c{d}" for d in range(8))


def subject_of(natural, x, **options):
    given = {"numbers": 10 + np.arange(len(x)), "clusters": CLUSTERS} | options
    return Subject(infer=lambda raw: infer(natural, raw), read=lambda numbers: x[numbers], **given)


@pytest.fixture(scope="module")
def seen():
    """A model, its rows, their labels, and the portrait."""
    natural = random_model(8, 3, 5)
    x, _, z = (np.asarray(part) for part in sample(natural, jax.random.key(0), 5000))
    labels = np.where(z == 3, "", CLUSTERS[z].astype(str))
    subject = subject_of(natural, x, labels=labels, fitted=np.arange(5000) < 4000, column_names=NAMES,
                         identifier=("plot", np.array([f"p{n}" for n in range(5000)], object)))  # fmt: skip
    return natural, x, labels, portray(subject)


def test_sums_are_those_of_the_rows(seen):
    natural, x, labels, portrait = seen
    output = infer(natural, x)
    r = np.exp(np.asarray(output.log_responsibilities, np.float64))
    p = np.stack([r[:, c == CLUSTERS].sum(axis=1) for c in range(3)], axis=1)
    cluster = p.argmax(axis=1)
    np.testing.assert_array_equal(portrait.cluster_rows, np.bincount(cluster))
    np.testing.assert_array_equal(portrait.component_rows, np.bincount(r.argmax(axis=1)))
    certainty = [p[cluster == c, c].mean() for c in range(3)]
    np.testing.assert_allclose(portrait.cluster_certainty, certainty, rtol=1e-6)
    np.testing.assert_allclose(portrait.shared, p.T @ p, rtol=1e-5)
    np.testing.assert_allclose(portrait.affinity, component_affinity(output.log_responsibilities[:4000]), rtol=1e-5)
    assert portrait.certainty.sum() == 5000
    assert portrait.certainty[-1] == (p.max(axis=1) >= 0.95).sum()
    means = [x[cluster == c].mean(axis=0) for c in range(3)]
    np.testing.assert_allclose(portrait.cluster_means, means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(portrait.column_means, x.mean(axis=0), rtol=0.1, atol=0.01)
    np.testing.assert_allclose(portrait.column_sds, x.std(axis=0), rtol=0.02)
    counts = [[np.sum((cluster == c) & (labels == name)) for name in "012"] for c in range(3)]
    np.testing.assert_array_equal(portrait.counts, counts)
    assert portrait.about == {
        "rows": 5000,
        "of": 5000,
        "labels": ["0", "1", "2"],
        "columns": list(NAMES),
        "identifier": "plot",
    }
    assert portrait.names.tolist() == [f"p{number - 10}" for number in portrait.row]


def test_members_are_the_rows_that_they_are_said_to_be(seen):
    natural, x, labels, portrait = seen
    output = infer(natural, x)
    r = np.exp(np.asarray(output.log_responsibilities, np.float64))
    p = np.stack([r[:, c == CLUSTERS].sum(axis=1) for c in range(3)], axis=1)
    cluster, density = p.argmax(axis=1), np.asarray(output.log_density)
    for c in range(3):
        mine = np.flatnonzero(cluster == c)
        rows = {kind: portrait.row[getattr(portrait, kind)[c]] - 10 for kind in MEMBERS}
        np.testing.assert_array_equal(rows["atypical"], mine[np.argsort(density[mine])[:3]])
        np.testing.assert_allclose(p[rows["doubtful"], c], np.sort(p[mine, c])[:3])
        for k in np.flatnonzero(c == CLUSTERS):  # every component's row of highest density is there
            own = mine[r[mine].argmax(axis=1) == k]
            assert own[np.argmax(density[own])] in rows["typical"]
    places = portrait.row - 10
    np.testing.assert_array_equal(portrait.cluster, cluster[places])
    np.testing.assert_allclose(portrait.latent, output.latent_mean[places], rtol=1e-4, atol=1e-5)
    named = np.array(["0", "1", "2", ""])[portrait.label]
    np.testing.assert_array_equal(named, labels[places])
    assert set(np.argsort(density)[:20]) <= set(places)
    gap = np.abs(x[places] - portrait.column_means) / portrait.column_sds
    np.testing.assert_array_equal(portrait.columns[:, 0], gap.argmax(axis=1))
    np.testing.assert_allclose(portrait.values[:, 0], x[places, portrait.columns[:, 0]])
    assert portrait.even.sum() == 3000


def test_wild_rows_move_no_scale(seen):
    natural, x, _, portrait = seen
    wild = x.copy()
    wild[:20] *= 1e4
    capped = portray(subject_of(natural, wild))
    np.testing.assert_allclose(capped.column_sds, portrait.column_sds, rtol=0.15)
    assert set(range(10, 30)) <= set(capped.row.tolist())


def test_missing_entries_do_not_count(seen):
    natural, x, _, _ = seen
    gaps = x[:200].copy()
    gaps[::3, 2] = np.nan
    subject = Subject(lambda raw: infer(natural, raw, missing="nan"), lambda n: gaps[n], np.arange(200), CLUSTERS)
    portrait = portray(subject)
    mine = np.asarray(infer(natural, gaps, missing="nan").log_responsibilities)
    p = np.stack([np.exp(mine[:, c == CLUSTERS]).sum(axis=1) for c in range(3)], axis=1)
    means = [np.nanmean(gaps[p.argmax(axis=1) == c], axis=0) for c in range(3)]
    np.testing.assert_allclose(portrait.cluster_means, means, rtol=1e-4)
    assert np.isfinite(portrait.column_sds).all()


def test_a_cluster_without_rows_has_a_line(seen, tmp_path):
    natural, x, _, _ = seen
    mine = x[np.asarray(infer(natural, x).log_responsibilities).argmax(axis=1) < 3][:50]
    portrait = portray(subject_of(natural, mine, clusters=np.arange(5)))
    assert (portrait.cluster_rows == 0).any()
    page = write_report(tmp_path / "r.html", "T", list(model_sections(portrait, natural)))
    assert page.read_text().count('data-pick="4"') == 1
    one = portray(subject_of(random_model(8, 1, 1), x[:50], clusters=np.zeros(1, int)))
    write_report(tmp_path / "r.html", "T", list(model_sections(one, random_model(8, 1, 1))))


def test_portraits_are_read_as_they_were_kept(seen, tmp_path):
    portrait = seen[3]
    np.savez(tmp_path / "p.npz", **portrait.arrays())
    with np.load(tmp_path / "p.npz") as file:
        again = Portrait.from_arrays(dict(file))
    assert again.about == portrait.about
    assert again.pictures is None
    np.testing.assert_array_equal(again.typical, portrait.typical)


def test_clusters_are_branches_of_their_tree(seen):
    portrait = seen[3]
    linkage = information_hierarchy(portrait.affinity, labels=CLUSTERS)
    assert hierarchy.is_valid_linkage(linkage)
    np.testing.assert_array_equal(merge_clusters(linkage, 3), CLUSTERS)
    free = information_hierarchy(portrait.affinity)
    np.testing.assert_allclose(linkage[-1, 2], free[-1, 2])  # all is lost in the end either way


def test_sheets_hold_images_side_by_side():
    images = as_bytes(np.arange(12.0).reshape(3, 4), (2, 2), 32)
    assert images[0, 0, 0] == 0
    assert images[2, 1, 1] == 255
    found = sheet(images)
    assert (found.columns, found.rows, found.ratio) == (2, 2, 1.0)
    assert found.place(2) == (0, 1)
    assert found.data.startswith("data:image/png;base64,")
    assert as_bytes(np.zeros((1, 96 * 96)), (96, 96), 32).shape == (1, 32, 32)


def test_a_page_of_200_clusters_and_60000_images_stays_small(tmp_path):
    """Rows without structure compress worst."""
    natural = random_model(784, 3, 200)
    x = np.random.default_rng(0).random((60_000, 784), np.float32)
    r = np.random.default_rng(1).dirichlet(np.full(200, 0.05), size=4096)

    class Output:
        def __init__(self, count):
            self.log_responsibilities = np.log(np.maximum(np.resize(r, (count, 200)), 1e-30))
            self.log_density, self.latent_mean = np.arange(count) * 1.0, np.random.default_rng(2).random((count, 3))

    subject = Subject(lambda raw: Output(len(raw)), lambda n: x[n], np.arange(60_000), np.arange(200),
                      image_shape=(28, 28))  # fmt: skip
    portrait = portray(subject)
    sections = list(model_sections(portrait, natural, image_shape=(28, 28)))
    page = write_report(tmp_path / "r.html", "Large", sections, images=page_images(portrait, (28, 28)))
    assert page.stat().st_size < 5_000_000
    html = page.read_text()
    assert html.count("data-pick=") >= 200
    assert "3,000 rows are shown, at even intervals" in html


def test_a_selection_stands_on_the_page(tmp_path):
    rows = [{"n_components": k, "bic": -10.0 * k, "entropies": [1.0], "failure": None} for k in (2, 3)]
    section = selection_section(rows, 1, ["BIC and held-out density agree."])
    html = write_report(tmp_path / "r.html", "T", [section]).read_text()
    assert "BIC and held-out density agree." in html
    assert re.findall(r'<th scope="col"[^>]*>(.*?)</th>', html) == ["recommended", "n components", "bic"]


def test_an_estimator_writes_its_page(tmp_path):
    """With missing entries, labels that are partly known, and wild rows that took no part."""
    sklearn = pytest.importorskip("flax_hmog.sklearn")
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    table = (np.arange(90) % 3)[:, None] * 5.0 + rng.normal(size=(90, 4))
    table[::7, 1], table[3] = np.nan, 1e12
    frame = pandas.DataFrame(table, columns=["age", "income", "visits", "<b>"])
    with pytest.warns(UserWarning, match="row"):
        model = sklearn.HMoG(4, n_clusters=3, lat_dim=1, missing="nan", max_iter=3, random_state=0).fit(frame)
    labels = np.where(np.arange(90) % 5, np.array(["x", "y", "z"])[np.arange(90) % 3], None)
    frame.index = pandas.Index([f"<c{n}>" for n in range(90)], name="customer")
    html = model.report(tmp_path / "r.html", frame, labels, title="Customers").read_text()
    for text in ("Customers", "Wild rows, which took no part in the fit: 3.", "EM has not converged", "72 of the 90 rows have a",
                 "income\u00a0=", "&lt;b&gt;", "HMoG(", "Hierarchy of the merges", "BIC", "log p(x) [nats]",
                 "named by &#39;customer&#39;", "&lt;c3&gt;"):  # fmt: skip
        assert text in html, text
    assert "<b>" not in html
    with pytest.raises(ValueError, match=r"`y` must have shape \(90,\); got \(3,\)"):
        model.report(tmp_path / "r.html", frame, [1, 2, 3])
