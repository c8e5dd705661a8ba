"""Your own rows: `python -m experiments.train file --data.path rows.npy --model.lat-dim 10 --model.n-components 20`.

Data: .npy (memory-mapped), .npz, a CSR matrix as scipy saves it, or .h5ad; columns are taken in units of their standard
deviations unless `--data.scale none` says otherwise.
"""

from flax_hmog.recipe.config import Data, Experiment

CONFIG = Experiment(workdir="runs/file", data=Data("file", scale="standard"))
