"""The model as an estimator of scikit-learn (`pip install "flax-hmog[cluster]"`)."""

from flax_hmog.sklearn.estimator import HMoG

__all__ = ["HMoG"]
