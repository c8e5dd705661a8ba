"""Preprocessing: scikit-learn's results, the same in shares and under jit."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from flax_hmog.training import Affine, Log1p, Preprocessing, SelectColumns, SizeFactor, Whiten
from flax_hmog.training.preprocessing import rebuild_preprocessing

ROWS = np.random.default_rng(0).gamma(2.0, np.array([1.0, 3.0, 0.2, 5.0, 2.0]), (40, 5))
ROWS[:, 2] = 7.0  # a constant column


def blocks():
    yield ROWS[:13]
    yield ROWS[13:]


def total(array):
    return array


def fitted(name):
    return {
        "standard": lambda: Affine.standard(blocks, total),
        "range": lambda: Affine.unit_range(blocks, lambda array: array[None]),
        "size factor": lambda: SizeFactor.mean(blocks, total),
        "log1p": Log1p,
        "columns": lambda: SelectColumns.most_variable(blocks, total, count=2),
        "whiten": lambda: Whiten.principal(blocks, total, count=3),
    }[name]()


def wanted(name):
    pca = PCA(3, whiten=True).fit(ROWS)
    scores = pca.transform(ROWS) * np.sqrt(len(ROWS) / (len(ROWS) - 1))  # variances over N, not N - 1
    return {
        "standard": StandardScaler().fit_transform(ROWS),
        "range": (ROWS - ROWS.min()) / (ROWS.max() - ROWS.min()),
        "size factor": ROWS / ROWS.sum(1, keepdims=True) * ROWS.sum(1).mean(),
        "log1p": np.log1p(ROWS),
        "columns": ROWS[:, [1, 3]],
        "whiten": scores * np.sign(pca.components_[np.arange(3), np.abs(pca.components_).argmax(1)]),
    }[name]


STEPS = ("standard", "range", "size factor", "log1p", "columns", "whiten")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_what_it_says_on_the_host_and_under_jit(name):
    preprocessing = Preprocessing((fitted(name),), 5)
    got = preprocessing(ROWS)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted(name), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(jax.jit(preprocessing)(ROWS.astype(np.float32)), got, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(preprocessing(ROWS[7]), got[7], rtol=1e-5, atol=1e-6)


def test_two_processes_fit_what_one_does():
    """Each sees half of the rows, and totals are added up over both."""
    halves, sent, meeting = (ROWS[:20], ROWS[20:]), [None, None], threading.Barrier(2)

    def on_both(fit):
        """`fit(blocks, gather)` on both halves at a time."""

        def run(process):
            def gather(array):
                sent[process] = array
                meeting.wait()
                both = np.stack(sent)
                meeting.wait()
                return both

            return fit(lambda: iter([halves[process]]), gather)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, (0, 1)))

    for name, fit in {
        "standard": lambda b, c: Affine.standard(b, lambda a: c(a).sum(0)),
        "range": Affine.unit_range,
        "size factor": lambda b, c: SizeFactor.mean(b, lambda a: c(a).sum(0)),
        "columns": lambda b, c: SelectColumns.most_variable(b, lambda a: c(a).sum(0), count=2),
        "whiten": lambda b, c: Whiten.principal(b, lambda a: c(a).sum(0), count=3),
    }.items():
        alone = vars(fitted(name))
        for result in on_both(fit):
            for key, value in vars(result).items():
                np.testing.assert_allclose(value, alone[key], rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}")


def test_a_sequence_is_rebuilt_from_its_description_and_arrays():
    steps = SizeFactor.mean(blocks, total), Log1p(), fitted("columns")
    preprocessing = Preprocessing((), 5)
    for step in steps:
        preprocessing = preprocessing.then(step)
    again = rebuild_preprocessing(preprocessing.describe(), preprocessing.arrays())
    np.testing.assert_array_equal(again(ROWS), preprocessing(ROWS))
    assert again(ROWS).shape == (40, 2)


def test_rows_of_zeros_and_too_few_directions_do_no_harm():
    zeros = np.zeros((2, 5))
    assert np.isfinite(Preprocessing((fitted("size factor"), Log1p()), 5)(zeros)).all()
    flat = np.outer(np.arange(10.0), np.ones(5))
    whiten = Whiten.principal(lambda: iter([flat]), total, count=4)
    assert Preprocessing((whiten,), 5)(flat).shape == (10, 1)
    constant = Affine.unit_range(lambda: iter([np.full((3, 5), 2.0)]), lambda array: array[None])
    assert np.isfinite(constant(np.full((3, 5), 2.0))).all()


def test_another_number_of_columns_is_named():
    with pytest.raises(ValueError, match=r"Preprocessing: `raw` must have shape \(\.\.\., 5\); got \(2, 4\)"):
        Preprocessing((), 5)(np.zeros((2, 4)))
