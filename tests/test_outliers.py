"""Wild rows: the background of `HMoG`, its EM, and answers in the style of scikit-learn's outlier detectors."""

import pickle
import warnings

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import cauchy
from sklearn.metrics import adjusted_rand_score

from flax_hmog.analysis import n_parameters
from flax_hmog.sklearn import HMoG
from flax_hmog.sklearn.background import scattered

WILD = np.arange(0, 600, 30)


def rows(seed=0):
    """Rows of three clusters in columns of all units, twenty of them wild, and the clusters."""
    rng = np.random.default_rng(seed)
    z = np.arange(600) % 3
    y = 10 * np.array([[0, 0], [1, 0], [0.3, 1]])[z] + rng.normal(size=(600, 2))
    x = y @ np.random.default_rng(1).normal(size=(2, 5)) + rng.normal(size=(600, 5))
    x[WILD[:10]] += 60 * rng.standard_t(2, size=(10, 5))
    x[WILD[10:], np.arange(10) % 5] += 10.0 ** np.arange(2, 7, 0.5)
    x[WILD[0], 0] = 500.0
    return (x + 20) * [1, 10, 1e3, 1e5, 1e6], z


def fitted(x, **changes):
    return HMoG(**{"n_components": 4, "lat_dim": 2, "background": True, "random_state": 0} | changes).fit(x)


@pytest.fixture(scope="module")
def model():
    return fitted(rows()[0])


def test_wild_rows_take_no_component(model):
    x, z = rows()
    good = np.setdiff1d(np.arange(600), WILD)
    assert set(model.left_out_) == set(WILD)
    np.testing.assert_array_equal(model.labels_, model.predict(x))
    assert (model.labels_[WILD] == -1).all()
    assert (model.background_proba(x)[WILD] > 0.5).all()
    assert model.background_.share == pytest.approx(21 / 602, abs=2e-3)
    merged = fitted(x, n_clusters=3)
    assert adjusted_rand_score(z[good], merged.labels_[good]) == 1
    assert merged.cluster_sizes_.sum() == 580
    assert "600 rows (20 of the background)" in str(merged)
    plain = fitted(x[good], n_clusters=3, background=False)
    np.testing.assert_allclose(np.sort(merged.noise_variance_), np.sort(plain.noise_variance_), rtol=0.05)


def test_wild_rows_are_the_lowest(model):
    x, _ = rows()
    for scores in (model.outlier_scores(x), model.score_samples(x), model.decision_function(x)):
        assert set(np.argsort(scores, kind="stable")[:20]) == set(WILD)
    np.testing.assert_array_equal(np.flatnonzero(model.predict_outliers(x) == -1), WILD)


def test_the_density_is_that_of_clusters_and_background(model):
    x, _ = rows()
    background = model.background_
    cauchys = cauchy(background.center, background.unit).logpdf(x).sum(axis=1)
    clusters = [np.log(model.weights_)[k] + log_normal(x, model, k) for k in range(4)]
    expected = logsumexp([*(np.log1p(-background.share) + c for c in clusters), np.log(background.share) + cauchys], 0)
    np.testing.assert_allclose(model.score_samples(x), expected, rtol=1e-8)
    assert model.criteria_.log_likelihood == pytest.approx(expected.sum())
    assert model.criteria_.n_parameters == n_parameters(model.natural_) + 1


def log_normal(x, model, k):
    gap, covariance = x - model.means_[k], model.covariances_[k]
    scale = np.sqrt(np.diagonal(covariance))
    root = np.linalg.cholesky(covariance / np.outer(scale, scale))
    solved = np.linalg.solve(root, (gap / scale).T)
    volume = np.log(np.diagonal(root)).sum() + np.log(scale).sum() + len(scale) / 2 * np.log(2 * np.pi)
    return -0.5 * (solved**2).sum(axis=0) - volume


@pytest.mark.parametrize("weighted", [False, True])
def test_the_objective_never_decreases(weighted):
    """Rows between clusters and background, so that probabilities go on moving."""
    rng = np.random.default_rng(3)
    x = np.concatenate(
        [rng.normal(size=(200, 3)), 4 * rng.standard_t(1.5, size=(60, 3)), rng.normal([8, 8, 0], size=(80, 3))]
    )
    weights = rng.random(340) + 0.2 if weighted else None
    model = HMoG(3, lat_dim=1, background=True, tol=1e-7, random_state=0).fit(x, sample_weight=weights)
    assert len(model.objective_history_) > 3
    assert (np.diff(model.objective_history_) > -1e-10).all()


def test_copies_and_units_change_nothing(model, tmp_path):
    x, _ = rows()
    model.save(tmp_path / "model.npz")
    for copy in (HMoG.load(tmp_path / "model.npz"), pickle.loads(pickle.dumps(model))):
        for method in ("predict", "predict_proba", "score_samples", "outlier_scores", "decision_function"):
            np.testing.assert_array_equal(getattr(copy, method)(x), getattr(model, method)(x))
        assert str(copy) == str(model)
    moved = fitted(1e-3 * x + 5)
    np.testing.assert_array_equal(moved.labels_, model.labels_)
    np.testing.assert_allclose(moved.loadings_, 1e-3 * model.loadings_, rtol=1e-4)


def test_gaps_and_constant_columns():
    x, z = rows()
    gaps = np.where(np.random.default_rng(5).random(x.shape) < 0.05, np.nan, x)
    gaps[WILD] = x[WILD]
    gaps = np.column_stack([gaps, np.full((600, 3), 7.0)])
    model = fitted(gaps, n_components=3, missing="nan")
    assert set(model.left_out_) == set(WILD)
    good = model.labels_ >= 0
    assert adjusted_rand_score(z[good], model.labels_[good]) > 0.99
    assert set(np.argsort(model.outlier_scores(gaps), kind="stable")[:20]) == set(WILD)
    np.testing.assert_allclose(model.impute(gaps)[:, 5:], 7)
    np.testing.assert_allclose(model.cluster_centers_[:, 5:], 7, rtol=1e-6)


def test_contamination_is_the_share_of_outliers(model):
    x, _ = rows()
    for background in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tenth = fitted(x, background=background, contamination=0.1)
        assert (tenth.predict_outliers(x) == -1).mean() == pytest.approx(0.1, abs=0.01)
        assert set(WILD) <= set(np.flatnonzero(tenth.decision_function(x) < 0))
    np.testing.assert_array_equal(fitted(x, contamination=0.1).labels_, model.labels_)
    for wrong in (0.6, 0, "much"):
        with pytest.raises(ValueError, match="HMoG: `contamination` must be a share up to"):
            fitted(x, contamination=wrong)


def test_known_rows_are_of_no_background():
    x, z = rows()
    known = np.full(600, -1)
    known[WILD[10:12]] = z[WILD[10:12]]
    assert fitted(x, semi_supervised=True, n_components=3, max_iter=5).fit(x, known).labels_.shape == (600,)
    with pytest.raises(ValueError, match="partial_fit: `background` must be False; got True"):
        HMoG(background=True).partial_fit(x)


def test_a_far_cluster_is_not_scattered():
    x = np.random.default_rng(0).normal(size=(1000, 4))
    x[:60] += 500
    assert not scattered(x, np.ones(1000))[:60].any()
    x[100:110] *= 300
    assert set(np.flatnonzero(scattered(x, np.ones(1000)))) == set(range(100, 110))
