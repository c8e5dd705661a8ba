"""A fitted estimator, for examples."""

from flax_hmog.sklearn.estimator import HMoG
from flax_hmog.toy import x

model = HMoG(n_components=3, lat_dim=2, random_state=0).fit(x)
