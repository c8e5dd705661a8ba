"""Single cells: cell types from counts of RNA.

Command: `python -m experiments.train scrna --data.path pbmc4k.npz` (or an .h5ad with --data.labels COLUMN).
Data: a file with counts (cells, genes): size factors, log(1 + x), the 500 genes of largest variance, unit variances.
Expected: a held-out log-density above that of the warm start.
"""

from experiments.config import EM, Data, Experiment, Gradient, Model

CONFIG = Experiment(
    workdir="runs/scrna",
    data=Data("file", path="pbmc4k.npz", size_factor=True, log1p=True, columns=500, scale="standard"),
    model=Model(lat_dim=15, n_components=12),
    em=EM(n_restarts=3),
    gradient=Gradient(epochs=10, batch_size=512),
)
