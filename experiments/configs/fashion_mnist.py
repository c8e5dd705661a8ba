"""Fashion-MNIST: an over-clustered linear HMoG by exact EM, its components merged to ten clusters.

Command: `python -m experiments.train fashion_mnist`; with the files in a folder `--data.downloads FOLDER`.
Data: Fashion-MNIST through tensorflow-datasets, 60,000 training and 10,000 test images, scaled to [0, 1].
Expected on the test split: docs/results.md.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe.config import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/fashion_mnist",
    data=Data("fashion_mnist", scale="range"),
    model=Model(lat_dim=50, n_components=200, n_clusters=10),
    em=EM(max_steps=30, tolerance=0.05, regularizer=PseudoCounts(noise_share=0.01), accelerate=False),
    gradient=Gradient(epochs=5, batch_size=1024, learning_rate=1e-3),
)
