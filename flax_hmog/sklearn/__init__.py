"""The model as an estimator of scikit-learn (`pip install "flax-hmog[cluster]"`)."""

from flax_hmog.model.optional import require

require("sklearn.base", "cluster")

from flax_hmog.sklearn.estimator import HMoG  # noqa: E402  after the message on what is missing

__all__ = ["HMoG"]
