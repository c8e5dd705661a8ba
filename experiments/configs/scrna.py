"""Single cells: cell types from counts of RNA.

Command: `python -m experiments.train scrna --data.path pbmc4k.npz --model.n-clusters 8` (or an .h5ad with --data.labels
COLUMN; of many thousand genes keep the most variable by --data.columns 2000).
Data: a file with counts (cells, genes): size factors, log(1 + x), unit variances. Many components are
merged to cell types.
Expected on the test split: docs/results.md.
"""

from flax_hmog import PseudoCounts
from flax_hmog.recipe.config import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/scrna",
    data=Data("file", path="pbmc4k.npz", size_factor=True, log1p=True, scale="standard"),
    model=Model(lat_dim=10, n_components=40, n_clusters=8),
    em=EM(
        column_units="common", max_steps=30, tolerance=0.01, regularizer=PseudoCounts(components=10.0, noise_share=0.01)
    ),
    gradient=Gradient(epochs=10, batch_size=512),
)
