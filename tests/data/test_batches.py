"""Collections of batches: of any kind, sampled over the whole pass, refused by name where they are no rows."""

import jax.numpy as jnp
import numpy as np
import pytest
from held_rows import COUNTS, KEY, Tensor, X, Y, fit, same_fit

from flax_hmog import AnalyticHMoG, fit_em, posterior_hard_assignment
from flax_hmog.analysis import clustering_metrics
from flax_hmog.data import sources
from flax_hmog.data.sources import Stream

PAIR = (X[:45], Y[:45])
STREAMS = {
    "pairs": (
        [PAIR],
        TypeError,
        r"batches \(B, D\) of rows alone; got tuple with 0: \(45, 4\), 1: \(45,\).*batch\[0\]",
    ),
    "lists of tensors": ([[X[:45], Y[:45]]], TypeError, "rows alone; got list with 0"),
    "dicts": (
        [{"image": X, "label": Y}],
        TypeError,
        r"rows alone; got dict with 'image': \(90, 4\), .*batch\['image'\]",
    ),
    "list of rows": (
        list(X),
        ValueError,
        r"batches \(B, D\); got \(4,\)\. Join single rows to one array: numpy\.stack",
    ),
    "list of lists": (X.tolist(), ValueError, r"got \(4,\)\. Join .* numpy\.asarray\(data\)"),
    "images": ([X.reshape(-1, 2, 2)], ValueError, r"got \(90, 2, 2\)\. Flatten .*reshape\(len\(batch\), -1\)"),
    "a dict": ({"image": X}, TypeError, "array or a collection of batches .*; got dict"),
    "texts": ([np.array([["a"] * 4])], TypeError, "hold real numbers; got dtype <U1"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_batches_that_are_no_rows(name):
    data, exception, message = STREAMS[name]
    with pytest.raises(exception, match=f"fit_em: `data` must .*{message}"):
        fit(data)


def test_batches_of_any_kind(tmp_path):
    pd = pytest.importorskip("pandas")
    first, second = COUNTS.toarray()[:45], COUNTS.toarray()[45:]
    for batches in (
        [pd.DataFrame(first), COUNTS[45:]],
        [Tensor(first), second],
        [first.tolist(), jnp.asarray(second)],
        [first.astype(int), second.astype(np.float64)],
        {"first": first, "second": second}.values(),
    ):
        same_fit(batches, [first, second])


def test_a_stream_is_sampled_over_the_whole_pass(monkeypatch):
    """Every row is as likely as any other to be seen by the start: batches may come class by class."""
    monkeypatch.setattr(sources, "SAMPLE_ROWS", 200)
    rows = np.arange(5000.0).reshape(-1, 1)
    stream = Stream(np.split(rows, 50), None, jnp.float32)
    x, weights, labels = stream.sample()
    numbers = np.asarray(x)[:, 0]
    assert len(set(numbers)) == 200
    assert weights.shape == (200,)
    assert labels is None
    assert (np.diff(numbers) > 0).all()
    # uniform: mean 2500 with standard deviation 5000 / sqrt(12 * 200) = 102; quarters 50 each, sd 6
    assert abs(numbers.mean() - 2500) < 4 * 102
    assert (abs(np.histogram(numbers, 4, (0, 5000))[0] - 50) < 4 * 6.2).all()
    np.testing.assert_array_equal(stream.sample()[0], x)
    other = Stream(np.split(rows, [7, 180, 333, 334, 2001]), None, jnp.float32).sample()[0]
    assert other.shape == (200, 1)
    hits = np.zeros(1000)
    monkeypatch.setattr(sources, "SAMPLE_ROWS", 100)
    for size in range(1, 41):  # other batches, other draws: 40 samples of a tenth, sd 1.9
        batches = np.split(np.arange(1000.0)[:, None], range(size * 13, 1000, size * 13))
        hits[np.asarray(Stream(batches, 1, jnp.float32).sample()[0])[:, 0].astype(int)] += 1
    assert abs(hits[:500].sum() - 2000) < 300


def test_a_short_stream_is_seen_as_it_is():
    batches = [X[:50].astype(np.float64), X[50:]]
    np.testing.assert_array_equal(Stream(batches, None, jnp.float32).sample()[0], X)
    mixed = [np.zeros((3, 2), int), np.full((3, 2), 0.5)]
    np.testing.assert_array_equal(Stream(mixed, None, jnp.float32).sample()[0], np.concatenate(mixed))


def test_batches_sorted_by_class_start_as_shuffled_ones_do(monkeypatch):
    monkeypatch.setattr(sources, "SAMPLE_ROWS", 60)
    rng = np.random.default_rng(1)
    x = (10 * np.eye(4)[np.repeat(range(4), 200)] + rng.normal(size=(800, 4))).astype(np.float32)
    head = AnalyticHMoG(3, 4)
    result = fit_em(head, np.split(x, 16), KEY, max_steps=20)
    found = posterior_hard_assignment(result.natural, x)
    assert clustering_metrics(np.repeat(range(4), 200), found)["ari"] > 0.95
