"""The estimator where nothing is said of factors, and where several starts are asked for."""

import numpy as np
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from flax_hmog.sklearn import HMoG


def test_of_several_starts_the_clusters_that_are_found_again_are_kept():
    x = make_blobs(200, 3, centers=3, cluster_std=4.0, random_state=2)[0]
    model = HMoG(6, n_clusters=3, n_init=4, random_state=0).fit(x)
    generator = np.random.RandomState(0)
    alone = [HMoG(6, n_clusters=3, random_state=generator).fit(x) for _ in range(4)]
    agreement = [np.mean([adjusted_rand_score(a.labels_, b.labels_) for b in alone if b is not a]) for a in alone]
    assert np.ptp(agreement) > 0.1  # they do differ
    np.testing.assert_array_equal(model.labels_, alone[int(np.argmax(agreement))].labels_)


def test_of_few_columns_none_is_left_to_the_noise():
    """Two of these clusters lie behind each other on the axis along which all of them vary most."""
    x, y = make_blobs(50, random_state=1)
    assert all(adjusted_rand_score(y, HMoG(n_clusters=3, random_state=s).fit_predict(x)) > 0.85 for s in range(3))
