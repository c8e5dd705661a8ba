"""20 Newsgroups: clusters of documents from weighted counts of terms.

Command: `python -m experiments.train newsgroups --data.path tfidf2000.npz`.
Data: a file with a CSR matrix of 18,846 documents and 2,000 terms (tf-idf), `y` and `n_train`.
Expected: a held-out log-density above that of the warm start. Noise of single terms is heavy-tailed, which a Gaussian
does not hold; the terms are taken in units of their standard deviations.
"""

from flax_hmog.recipe.config import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/newsgroups",
    data=Data("file", path="tfidf2000.npz", title="20 Newsgroups", scale="standard"),
    model=Model(lat_dim=50, n_components=40),
    em=EM(max_steps=40, tolerance=0.05, accelerate=False),
    gradient=Gradient(epochs=5, batch_size=512),
)
