"""What a training run is made of: mesh and shardings, train step, preprocessing, checkpoints."""

from flax_hmog.training.checkpoints import CheckpointError, CheckpointWriter, Restored, restore
from flax_hmog.training.mesh import RULES, batch_sharding, make_mesh, tree_shardings
from flax_hmog.training.preprocessing import Affine
from flax_hmog.training.steps import create_state, make_train_step

__all__ = [
    "RULES",
    "Affine",
    "CheckpointError",
    "CheckpointWriter",
    "Restored",
    "batch_sharding",
    "create_state",
    "make_mesh",
    "make_train_step",
    "restore",
    "tree_shardings",
]
