"""`HMoG` as scikit-learn uses estimators, and as an analyst does."""

import pickle
import warnings

import jax
import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import kstest, multivariate_normal
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_blobs
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from flax_hmog import AnalyticHMoG, PseudoCounts, fit_em, infer, save
from flax_hmog.em.result import WildRowsWarning
from flax_hmog.sklearn import HMoG

CHECKS = list(estimator_checks_generator(HMoG()))
FAST = {  # one of each kind; all others are slow, as scikit-learn's sizes of data compile programs of their own
    "check_no_attributes_set_in_init", "check_get_params_invariance", "check_set_params", "check_estimator_cloneable",
    "check_estimator_tags_renamed", "check_valid_tag_types", "check_estimator_repr", "check_mixin_order",
    "check_fit2d_1sample", "check_estimators_unfitted", "check_do_not_raise_errors_in_init_or_set_params",
}  # fmt: skip
COLUMNS = ["age", "visits", "income", "revenue", "assets"]
UNITS = np.array([1.0, 10.0, 1e3, 1e5, 1e6])


def name_of(check):
    return getattr(check, "func", check).__name__


@pytest.mark.parametrize(
    ("estimator", "check"),
    [pytest.param(*c, marks=[pytest.mark.slow] * (name_of(c[1]) not in FAST), id=name_of(c[1])) for c in CHECKS],
)
def test_checks_of_scikit_learn(estimator, check):
    with jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def table(n=300, seed=0, clusters=3):
    """Rows in units from 1 to 1e6, and their clusters."""
    rng = np.random.default_rng(seed)
    z = np.arange(n) % clusters
    angles = 2 * np.pi * np.arange(clusters) / clusters
    y = 10 * np.stack([np.cos(angles), np.sin(angles)], axis=1)[z] + rng.normal(size=(n, 2))
    x = y @ np.random.default_rng(2).normal(size=(2, 5)) + rng.normal(size=(n, 5))
    return pd.DataFrame(UNITS * (x + 20), columns=COLUMNS), z


def small(**changes):
    return HMoG(**{"n_components": 3, "lat_dim": 2, "random_state": 0} | changes)


@pytest.fixture(scope="module")
def fitted():
    x, _ = table()
    return small().fit(x)


def assert_same_answers(model, other, x):
    for method in ("predict", "predict_proba", "transform", "score_samples", "outlier_scores"):
        np.testing.assert_array_equal(getattr(model, method)(x), getattr(other, method)(x))
    assert str(model) == str(other)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_fit_is_fit_em_and_infer(dtype):
    x = table()[0].to_numpy(dtype)
    model = small(random_state=7).fit(x)
    seed = int(np.random.RandomState(7).randint(np.iinfo(np.int32).max))
    with jax.enable_x64(dtype == "float64"):
        found = fit_em(AnalyticHMoG(2, 3, param_dtype=dtype), x, jax.random.key(seed))
        output = infer(found.natural, x)
    np.testing.assert_array_equal(model.objective_history_, found.objective_history)
    tolerance = 1e-9 if dtype == "float64" else 2e-3
    np.testing.assert_allclose(model.predict_proba(x), np.exp(output.log_responsibilities), atol=tolerance)
    np.testing.assert_allclose(model.transform(x), output.latent_mean, atol=tolerance)
    np.testing.assert_allclose(model.score_samples(x), output.log_density, atol=tolerance, rtol=1e-6)
    for answer in (
        model.predict_proba(x),
        model.transform(x),
        model.score_samples(x),
        model.inverse_transform(output.latent_mean),
    ):
        assert answer.dtype == dtype


def test_weights_are_repeated_rows():
    x, _ = table(120)
    counts = np.arange(120) % 3 + 1
    weighted, repeated = small().fit(x, sample_weight=counts), small().fit(x.loc[x.index.repeat(counts)])
    np.testing.assert_allclose(weighted.score_samples(x), repeated.score_samples(x), rtol=1e-6)
    np.testing.assert_allclose(weighted.cluster_sizes_, repeated.cluster_sizes_)
    assert weighted.criteria_.bic == pytest.approx(repeated.criteria_.bic)
    assert weighted.bic(x, sample_weight=counts) == pytest.approx(weighted.criteria_.bic)


def test_copies_answer_exactly_the_same(fitted, tmp_path):
    x, _ = table()
    joblib.dump(fitted, tmp_path / "model.joblib")
    fitted.save(tmp_path / "model.npz")
    for copy in (
        pickle.loads(pickle.dumps(fitted)),
        joblib.load(tmp_path / "model.joblib"),
        HMoG.load(tmp_path / "model.npz"),
    ):
        assert_same_answers(fitted, copy, x)
        assert copy.bic(x) == fitted.bic(x) == fitted.criteria_.bic
    assert not hasattr(clone(fitted), "natural_")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_file_has_all_of_a_fit(dtype, tmp_path):
    x, z = table()
    x = x.astype(dtype)
    known = np.where(np.arange(300) < 60, np.array(["a", "b", "c"])[z], None)
    changes = {"n_components": 5, "n_clusters": 3, "regularizer": PseudoCounts(noise=2.0), "semi_supervised": True}
    model = small(**changes).fit(x, known)
    model.save(tmp_path / "model.npz")
    loaded = HMoG.load(tmp_path / "model.npz")
    assert loaded.get_params() == model.get_params()
    assert_same_answers(model, loaded, x)
    for name in (
        "classes_",
        "feature_names_in_",
        "cluster_of_component_",
        "objective_history_",
        "lower_bound_",
        "n_iter_",
        "converged_",
        "n_features_in_",
        "cluster_sizes_",
        "cluster_certainties_",
        "criteria_",
    ):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(model, name))
    with pytest.raises(ValueError, match="feature names should match"):
        loaded.predict(x[COLUMNS[::-1]])
    loaded.set_params(warm_start=True).fit(x, known)  # goes on from there


def test_files_that_hold_no_estimator_are_named(fitted, tmp_path):
    with pytest.raises(NotFittedError):
        small().save(tmp_path / "model.npz")
    save(fitted.natural_, tmp_path / "plain.npz")
    with pytest.raises(
        ValueError, match=r"`path` must be a file that HMoG.save wrote; got .*plain.npz.* Use flax_hmog.load"
    ):
        HMoG.load(tmp_path / "plain.npz")
    with pytest.raises(ValueError, match=r"`path` must be a file that flax_hmog.save wrote; got .*none.npz"):
        HMoG.load(tmp_path / "none.npz")


def test_searches_and_pipelines():
    x, _ = table(200)
    grid = {"n_components": [1, 3], "lat_dim": [1, 2]}
    by_density = GridSearchCV(small(), grid, cv=3, error_score="raise").fit(x)
    by_bic = GridSearchCV(small(), grid, scoring=lambda model, rows: -model.bic(rows), cv=3, error_score="raise").fit(x)
    assert by_density.best_params_["n_components"] == by_bic.best_params_["n_components"] == 3
    assert cross_val_score(small(), x, cv=3).shape == (3,)

    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), small()).fit(x)
    assert pipeline.predict(x).shape == (200,)
    assert pipeline.transform(x).shape == (200, 2)
    mixed = x.assign(city=np.array(["Oslo", "Bern"])[np.arange(200) % 2])
    columns = ColumnTransformer([("factors", small(), COLUMNS), ("city", OneHotEncoder(), ["city"])])
    assert columns.fit_transform(mixed).shape == (200, 4)
    assert list(columns.get_feature_names_out()) == [
        "factors__hmog0",
        "factors__hmog1",
        "city__city_Bern",
        "city__city_Oslo",
    ]


def test_tables_in_and_out(fitted):
    x, _ = table()
    latent = clone(fitted).set_output(transform="pandas").fit(x).transform(x)
    assert list(latent.columns) == list(fitted.get_feature_names_out()) == ["hmog0", "hmog1"]
    assert latent.index.equals(x.index)
    assert list(fitted.feature_names_in_) == COLUMNS
    for wrong in (x[COLUMNS[::-1]], x.rename(columns={"age": "years"})):
        with pytest.raises(ValueError, match="feature names should match"):
            fitted.predict(wrong)
    with pytest.raises(ValueError, match="has 4 features, but HMoG is expecting 5"):
        fitted.predict(x.to_numpy()[:, :4])
    with pytest.raises(ValueError, match=r"`X` must have shape \(N, 2\); got"):
        fitted.inverse_transform(x)


def test_polars_out(fitted):
    polars = pytest.importorskip("polars")
    x, _ = table()
    with pytest.raises(TypeError, match=r"got LazyFrame. Give what its `collect` returns"):
        fitted.predict(polars.from_pandas(x).lazy())
    assert clone(fitted).set_output(transform="polars").fit(x).transform(x).columns == ["hmog0", "hmog1"]


def test_what_is_no_number_is_named_by_its_column():
    x, _ = table(60)
    with pytest.raises(
        TypeError,
        match=r"HMoG: `X` must hold real numbers in every column; got .* in column 'city'. Leave .* or encode it",
    ):
        small().fit(x.assign(city="Oslo"))
    with pytest.raises(TypeError, match=r"got category in column 'city'"):
        small().fit(x.assign(city=pd.Categorical(["Oslo"] * 60)))
    x.loc[4, "income"] = np.nan
    with pytest.raises(ValueError, match=r"HMoG: `X` must hold no missing values \(NaN\); got 1 in column 'income'"):
        small().fit(x)


@pytest.mark.parametrize("names", [False, True])
def test_known_components(names):
    x, z = table()
    known = (np.array(["b", "c", "a"])[z] if names else z).astype(object)
    known[30:] = None if names else -1
    model = small(semi_supervised=True).fit(x, known if names else known.astype(int))
    expected = {"b": 1, "c": 2, "a": 0}
    assert (model.predict(x) == ([expected[name] for name in np.array(["b", "c", "a"])[z]] if names else z)).all()
    assert list(model.classes_) == ["a", "b", "c"] if names else model.classes_ is None
    np.testing.assert_array_equal(small().fit(x, known).labels_, small().fit(x).labels_)  # ignored without it


def test_components_are_merged_to_clusters():
    x, z = table()
    model = small(n_components=8, n_clusters=3).fit(x)
    assert sorted(set(model.cluster_of_component_)) == [0, 1, 2]
    assert adjusted_rand_score(z, model.labels_) > 0.98
    assert model.predict_proba(x).shape == (300, 3)
    np.testing.assert_allclose(model.predict_proba(x).sum(axis=1), 1)
    assert set(model.sample(50)[1]) <= {0, 1, 2}
    assert model.cluster_centers_.shape == (3, 5)
    assert small(n_components=1, n_clusters=3).fit(x).weights_.shape == (3,)


def test_columns_of_all_units_and_constant_ones():
    x, z = table()
    plain = small().fit(x / UNITS)
    model = small().fit(x.assign(constant=7.0))
    assert adjusted_rand_score(plain.labels_, model.labels_) == 1
    assert adjusted_rand_score(z, model.labels_) > 0.98
    assert np.isfinite(model.means_).all()
    np.testing.assert_allclose(model.means_[:, -1], 7.0, rtol=1e-6)
    np.testing.assert_allclose(model.means_[:, :-1], plain.means_ * UNITS, rtol=1e-2)


def test_columns_of_one_name_are_refused():
    with pytest.raises(ValueError, match="columns of different names; got 'a' 2 times"):
        small().fit(pd.DataFrame(np.ones((9, 3)), columns=["a", "a", "b"]))


def test_wild_rows_are_the_lowest(fitted):
    x, z = table()
    wild = np.arange(0, 300, 15)
    x.iloc[wild] *= 1e4 * np.random.default_rng(0).normal(size=(20, 5))
    with pytest.warns(WildRowsWarning, match="20 rows are left out"):
        model = small().fit(x)
    assert set(model.left_out_) == set(wild)
    assert model.criteria_.bic == pytest.approx(model.bic(x.drop(wild)))
    assert "280 rows (20 wild ones left out)" in str(model)
    scores = model.score_samples(x)
    assert set(np.argsort(scores)[:20]) == set(wild)
    assert (model.outlier_scores(x)[wild] < 1e-3).all()
    assert adjusted_rand_score(np.delete(z, wild), np.delete(model.labels_, wild)) > 0.98
    good = clone(model).partial_fit(x.drop(wild))
    with pytest.warns(WildRowsWarning, match="partial_fit: 20 rows are left out"):
        assert good.partial_fit(x).criteria_.n_samples == 280


def test_outlier_scores_are_uniform_on_draws(fitted):
    drawn, _ = clone(fitted).set_params(random_state=5).fit(table()[0]).sample(2000)
    x = pd.DataFrame(drawn, columns=COLUMNS)
    assert kstest(fitted.outlier_scores(x), "uniform").pvalue > 0.01


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_batches_are_learnt(dtype):
    x, z = table(1500)
    x = x.astype(dtype)
    model = small().partial_fit(x[:300])
    np.testing.assert_array_equal(model.labels_, small().fit(x[:300]).labels_)
    before = model.score(x)
    for start in range(300, 1500, 150):
        model = pickle.loads(pickle.dumps(model)).partial_fit(x[start : start + 150])
    best = small().fit(x).score(x)
    assert abs(best - model.score(x)) < (best - before) / 2
    assert adjusted_rand_score(z, model.predict(x)) > 0.98
    assert len(model.objective_history_) == model.n_iter_ + 1
    assert not model.converged_
    assert model.labels_.shape == (150,)
    assert model.predict_proba(x).dtype == dtype
    with pytest.raises(ValueError, match="feature names should match"):
        model.partial_fit(x[COLUMNS[::-1]])
    assert model.fit(x).score(x) == best


def test_batches_with_weights_labels_and_clusters():
    x, z = table(600)
    model = small(n_components=5, n_clusters=3)
    for rows in (slice(0, 300), slice(300, 600)):
        model.partial_fit(x[rows], sample_weight=np.arange(300) % 2)
    assert adjusted_rand_score(z, model.predict(x)) > 0.98
    known = small(semi_supervised=True).partial_fit(x[:300], z[:300]).partial_fit(x[300:], z[300:])
    assert (known.predict(x) == z).mean() > 0.98
    with pytest.raises(ValueError, match="partial_fit: `y` must hold integers; got <U1"):
        known.partial_fit(x, np.array(["a", "b", "c"])[z])


def test_batches_may_miss_values():
    x, z = table(600)
    gaps = x.mask(np.random.default_rng(3).random(x.shape) < 0.2)
    model = small(missing="nan").partial_fit(gaps[:300])
    before = model.score(gaps)
    model.partial_fit(gaps[300:])
    assert model.score(gaps) > before
    assert adjusted_rand_score(z, model.predict(gaps)) > 0.9
    whole, plain = (small(missing=kind).partial_fit(x[:300]).partial_fit(x[300:]) for kind in ("nan", "refuse"))
    np.testing.assert_array_equal(whole.score_samples(x), plain.score_samples(x))
    assert model.score(x) > whole.score(x) - 0.2
    with pytest.raises(ValueError, match="`X` must hold no missing values"):
        plain.partial_fit(gaps)


def test_a_batch_that_repeats_the_first_makes_pseudo_samples_count_half():
    x, _ = table()
    twice = small(tol=1e-6).partial_fit(x).partial_fit(x)
    assert twice.score(x) == pytest.approx(small(tol=1e-6).fit(pd.concat([x, x])).score(x), abs=1e-2)
    assert twice.score(x) > small(tol=1e-6).fit(x).score(x) + 0.02


def test_the_summary_names_what_distinguishes(fitted):
    x, _ = table()
    text = str(fitted)
    assert text.startswith("HMoG(")
    assert "3 clusters of 3 components, 2 factors of 5 columns; converged after" in text
    assert f"BIC {fitted.bic(x):.7g}" in text
    rows = fitted.summary().rows()
    assert [row["rows"] for row in rows] == sorted((row["rows"] for row in rows), reverse=True)
    assert sum(row["weight"] for row in rows) == pytest.approx(1)
    assert all(0.9 < row["certainty"] <= 1 for row in rows)
    assert any(name in row["distinguished by"] for row in rows for name in COLUMNS)
    assert pd.DataFrame(rows).shape == (3, 6)
    assert str(small()) == repr(small())
    many = make_blobs(200, 3, centers=4, random_state=0)[0]
    assert "... and 2 more" in str(small(n_components=32).fit(many).summary())
    one = str(small(n_components=1, lat_dim=1).fit(many[:, :1]))
    assert "1 cluster of 1 component, 1 factor of 1 column; converged after" in one


def with_gaps():
    """Rows of three clusters in columns of different units, the same with gaps, and the clusters."""
    rng = np.random.default_rng(0)
    z = np.arange(600) % 3
    y = 5 * rng.normal(size=(3, 2))[z] + rng.normal(size=(600, 2))
    x = (y @ rng.normal(size=(2, 6)) + 0.5 * rng.normal(size=(600, 6))) * [1, 10, 1e3, 1e-2, 1, 1e5] + [
        0,
        5,
        1e4,
        0,
        0,
        1e6,
    ]
    return x, np.where(rng.random(x.shape) < 0.1, np.nan, x), z


def test_missing_values_are_taken_where_that_is_said():
    x, gaps, z = with_gaps()
    model = HMoG(3, lat_dim=2, missing="nan", random_state=0).fit(pd.DataFrame(gaps))
    whole = HMoG(3, lat_dim=2, random_state=0).fit(x)
    assert adjusted_rand_score(z, model.labels_) > adjusted_rand_score(z, whole.labels_) - 0.05
    # marginals by scipy, in units that it can invert
    unit = x.std(axis=0)
    for row in (gaps[np.isnan(gaps).sum(axis=1) == 2][0], gaps[0]):
        seen = ~np.isnan(row)
        densities = [
            multivariate_normal((mean / unit)[seen], (covariance / np.outer(unit, unit))[np.ix_(seen, seen)]).pdf(
                (row / unit)[seen]
            )
            for mean, covariance in zip(model.means_, model.covariances_, strict=True)
        ]
        expected = np.log(model.weights_ @ densities) - np.log(unit[seen]).sum()
        np.testing.assert_allclose(model.score_samples(pd.DataFrame(row[None]))[0], expected, rtol=1e-9)
    filled = model.impute(pd.DataFrame(gaps))
    missing = np.isnan(gaps)
    np.testing.assert_array_equal(filled[~missing], gaps[~missing])
    error, of_means = (np.abs((rows - x) / x.std(axis=0))[missing].mean() for rows in (filled, x.mean(axis=0)[None]))
    assert error < 0.5 * of_means
    np.testing.assert_array_equal(
        HMoG(3, lat_dim=2, missing="nan", random_state=0).fit(x).score_samples(x), whole.score_samples(x)
    )
    with pytest.raises(ValueError, match="full"):
        HMoG(3, lat_dim=2, noise="full", missing="nan").fit(gaps)


def test_outlier_scores_of_rows_with_gaps_are_those_of_draws_with_the_same_gaps():
    """A row that shows fewer columns has another density, not another score."""
    _, gaps, _ = with_gaps()
    model = HMoG(3, lat_dim=2, missing="nan", random_state=0).fit(gaps)
    drawn, _ = model.set_params(random_state=7).sample(2000)
    for lacking in ([], [0, 3]):
        drawn[:, lacking] = np.nan
        assert kstest(model.outlier_scores(drawn), "uniform").pvalue > 1e-3
    far = np.where(np.isnan(drawn), np.nan, drawn + 50 * np.nanstd(gaps, axis=0))
    assert model.outlier_scores(far).max() < 1e-3


def test_what_an_estimator_returns_can_be_written_to():
    """Arrays of jax are read-only where numpy looks at them."""
    x, _, _ = with_gaps()
    for rows in (x, x.astype(np.float32)):
        model = HMoG(3, lat_dim=2, random_state=0).fit(rows)
        found = (
            model.transform(rows),
            model.predict_proba(rows),
            model.score_samples(rows),
            *model.sample(5),
            model.labels_,
        )
        assert all(array.flags.writeable for array in found)


def test_cells_are_rows():
    anndata = pytest.importorskip("anndata")
    x, _ = table()
    cells = anndata.AnnData(x.to_numpy(), var=pd.DataFrame(index=COLUMNS))
    model = small().fit(cells)
    assert list(model.feature_names_in_) == COLUMNS
    np.testing.assert_array_equal(model.predict(cells), model.predict(cells.to_df()))
    with pytest.raises(ValueError, match="feature names should match"):
        model.predict(cells[:, ::-1])
