"""USPS digits: an over-clustered linear HMoG on scanned postal codes.

Command: `python -m experiments.train usps --data.path usps_9298.npz`.
Data: a file with `X` (9298, 16, 16) in [0, 1], `y` and `n_train`.
Expected: a held-out log-density above that of the warm start; the clusters are not merged to the ten digits here.
"""

from experiments.config import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/usps",
    data=Data("file", path="usps_9298.npz", title="USPS digits", scale="range"),
    model=Model(lat_dim=30, n_components=60),
    em=EM(max_steps=60, tolerance=0.01),
    gradient=Gradient(epochs=5, batch_size=512),
)
