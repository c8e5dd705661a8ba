"""Sentences: what does a head say of the frozen features of a pretrained language model?

Command: `python -m experiments.train sentences`; for docstrings of the standard library instead
`python -m experiments.train sentences --data.name sentences_standard --model.n-clusters 20 --model.n-components 40`.
Data: descriptions in the docstrings of 21 subpackages of numpy, scipy and scikit-learn, embedded by all-MiniLM-L6-v2
(extra `sentences`); 20 % held out. The classes are the subpackages. An encoder on the features: `--encoder.name mlp`.
Expected on the test split: docs/features.md.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe import EM, Data, Experiment, Gradient, Model, Template

CONFIG = Experiment(
    workdir="runs/sentences",
    data=Data("sentences"),
    model=Model(lat_dim=20, n_components=42, n_clusters=21, obs_rep="scale"),
    heads=(Template("differentiable", pst_rep="full"),),
    em=EM(tolerance=0.01, regularizer=PseudoCounts(shrinkage="auto")),
    gradient=Gradient(epochs=10, batch_size=256),
    n_seeds=3,
)
