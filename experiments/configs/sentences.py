"""Sentences: a head on the frozen features of a pretrained language model.

Command: `python -m experiments.train sentences`; `--data.name sentences_standard` for docstrings of the standard library.
Data: descriptions in the docstrings of 21 subpackages of numpy, scipy and scikit-learn, embedded by all-MiniLM-L6-v2
(extra `sentences`); 20 % held out. The classes are the subpackages.
Expected on the test split: docs/features.md.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/sentences",
    data=Data("sentences"),
    model=Model(lat_dim=20, n_components=42, n_clusters=21, obs_rep="scale"),
    em=EM(max_steps=60, tolerance=0.01, regularizer=PseudoCounts(shrinkage="auto")),
    gradient=Gradient(epochs=10, batch_size=256),
    n_seeds=3,
)
