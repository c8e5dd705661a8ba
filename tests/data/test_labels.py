"""Labels of rows, names or numbers with gaps, as the library that they come from means them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_hmog import AnalyticHMoG, fit_em, fit_online_em, posterior_hard_assignment
from flax_hmog.analysis import clustering_metrics, contingency_table, plot_latent_space
from flax_hmog.analysis.inputs import as_groups
from flax_hmog.data.labels import check_labels, encode_labels

RNG = np.random.default_rng(0)
Y = np.arange(90) % 3
X = (6 * RNG.normal(size=(3, 4))[Y] + RNG.normal(size=(90, 4))).astype(np.float32)
HEAD, KEY = AnalyticHMoG(2, 3), jax.random.key(0)
NAMES = np.array(["b", "a", "c"])[Y]  # a, b, c are components 0, 1, 2
CODES = np.array([1, 0, 2])[Y]


def fit(data, **options):
    return fit_em(HEAD, data, KEY, **({"max_steps": 2} | options))


def labels_by_name():
    pd = pytest.importorskip("pandas")
    pa = pytest.importorskip("pyarrow")
    unknown = np.arange(90) % 4 == 0
    gaps = [None if gone else name for gone, name in zip(unknown, NAMES, strict=True)]
    whole = {
        "array": NAMES,
        "objects": NAMES.astype(object),
        "bytes": NAMES.astype("S"),
        "list": NAMES.tolist(),
        "series": pd.Series(NAMES),
        "categorical": pd.Categorical(NAMES, categories=list("xcba")),
        "arrow": pa.array(NAMES.tolist()),
    }
    some = {
        "None": gaps,
        "NaN": [np.nan if name is None else name for name in gaps],
        "empty": np.where(unknown, "", NAMES),
        "series with None": pd.Series(gaps),
        "string series": pd.Series(gaps, dtype="string"),
        "categories": pd.Series(gaps, dtype="category"),
        "masked": np.ma.masked_array(NAMES, unknown),
        "arrow with null": pa.array(gaps),
    }
    return whole, some, unknown


def test_names_become_components_in_their_order():
    whole, some, unknown = labels_by_name()
    for group, want in ((whole, CODES), (some, np.where(unknown, -1, CODES))):
        for what, labels in group.items():
            codes, classes = check_labels(labels, (90,), 3)
            np.testing.assert_array_equal(codes, want, err_msg=what)
            assert (codes.dtype, classes) == (jnp.int32, ("a", "b", "c")), what


def test_integers_stay_numbers_of_components():
    pd = pytest.importorskip("pandas")
    unknown = np.arange(90) % 4 == 0
    want = np.where(unknown, -1, Y)
    gaps = [None if gone else int(k) for gone, k in zip(unknown, Y, strict=True)]
    for labels in (
        want,
        want.astype(np.int8),
        want.tolist(),
        jnp.asarray(want),
        gaps,
        pd.Series(gaps),
        pd.Series(gaps, dtype="Int64"),
        pd.Series(gaps, dtype="category"),
        np.ma.masked_array(Y, unknown),
        np.where(unknown, np.nan, Y),
    ):
        codes, classes = check_labels(labels, (90,), 3)
        np.testing.assert_array_equal(codes, want)
        assert classes is None
    few_bits = check_labels(jnp.array([5, 200], jnp.uint8), (2,), 300)[0]  # in which 300 would be 44
    assert few_bits.dtype == jnp.int32
    np.testing.assert_array_equal(few_bits, [5, 200])
    assert check_labels([None] * 5, (5,), 3)[1] is None
    np.testing.assert_array_equal(check_labels([None] * 5, (5,), 3)[0], [-1] * 5)


def test_labels_that_are_no_classes_are_named():
    for labels, message in (
        (["a", "b", "c", "d"] * 22 + ["a", "b"], "must name at most 3 classes, a component each; got 4: 'a', 'b', 'c'"),
        ([0, "b"] * 45, "must be all numbers or all names; got int and str"),
        (np.full(90, 0.5), r"must be integers from -1 \(unknown\) to 2; got"),
        (Y.astype(bool), r"must be integers from -1 \(unknown\) to 2; got bool"),
        (np.where(Y == 0, np.nan, 7), r"must be integers from -1 \(unknown\) to 2; got int64 from -1 to 7"),
        (NAMES[:5], r"must have shape \(90,\); got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=f"fit_em: `labels` {message}") as caught:
            fit(X, labels=labels)
        assert re.fullmatch(r"fit_em: `labels` must .+; .+\. [A-Z].+\.", str(caught.value)), str(caught.value)


def test_fits_say_which_component_has_which_name():
    known = np.where(np.arange(90) % 5 == 0, NAMES, "")
    for result in (fit(X, labels=known, max_steps=20), fit_online_em(HEAD, X, KEY, labels=known, batch_size=30)):
        assert json.loads(json.dumps(result.classes)) == ["a", "b", "c"]
    plain = fit(X, labels=np.where(known == "", -1, CODES), max_steps=20)
    assert plain.classes is None
    np.testing.assert_array_equal(plain.objective_history, fit(X, labels=known, max_steps=20).objective_history)
    named = np.array(["a", "b", "c"])[posterior_hard_assignment(fit(X, labels=NAMES, max_steps=20).natural, X)]
    assert (named == NAMES).mean() > 0.95


def test_metrics_leave_unlabelled_samples_out():
    """Clusters that are right wherever a label is known are right."""
    pd = pytest.importorskip("pandas")
    gone = np.arange(90) % 4 == 0
    found = np.where(gone, 7, Y)
    _, some, _ = labels_by_name()
    for labels in (*some.values(), np.where(gone, np.nan, Y), pd.Series(Y).astype("Int64").mask(gone)):
        metrics = clustering_metrics(labels, found)
        assert metrics == pytest.approx({"nmi": 1.0, "ari": 1.0, "accuracy": 1.0, "labelled": 67})
        counts, clusters, columns = contingency_table(labels, found)
        assert counts.shape == (3, 3)
        assert counts.sum() == 67 == np.trace(counts[np.argsort(counts.argmax(axis=1))])
        assert len(columns) == 3
        assert 7 not in clusters
    # integers are labels, -1 too
    assert clustering_metrics(np.where(gone, -1, Y), found) == pytest.approx({"nmi": 1.0, "ari": 1.0, "accuracy": 1.0})
    with pytest.raises(ValueError, match="clustering_metrics: `labels` must have one that is known; got 2"):
        clustering_metrics([None, ""], [0, 1])


def test_samples_without_a_label_are_a_group_of_their_own():
    names = as_groups("groups", ["b", None, "a", np.nan], 4)
    assert names.tolist() == ["b", "no label", "a", "no label"]
    assert as_groups("groups", [3, 1], 2).tolist() == [3, 1]
    figure = plot_latent_space(fit(X).natural, X, groups=np.where(Y == 0, None, NAMES))
    assert "no label" in {text.get_text() for text in figure.axes[0].texts}


def test_codes_of_labels_in_general():
    codes, known, names = encode_labels(np.array([0.5, 1.5, np.nan]))
    assert (codes.tolist(), known.tolist(), names) == ([0, 1, -1], [True, True, False], ("0.5", "1.5"))
    codes, known, names = encode_labels([10, None, -1])
    assert (codes.tolist(), known.tolist(), names) == ([10, -1, -1], [True, False, True], None)
