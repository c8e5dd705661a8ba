"""Parts of a training run: mesh and shardings, train step, preprocessing, checkpoints, export."""

from flax_hmog.training.checkpoints import CheckpointWriter
from flax_hmog.training.describe import CheckpointError
from flax_hmog.training.exported import Program, load_program, write_program
from flax_hmog.training.leaves import load_leaves, write_leaves
from flax_hmog.training.mesh import RULES, batch_sharding, global_rows, make_mesh, tree_shardings
from flax_hmog.training.preprocessing import Affine, Log1p, Preprocessing, SelectColumns, SizeFactor, Whiten
from flax_hmog.training.restoring import Restored, restore, restore_like
from flax_hmog.training.serving import export
from flax_hmog.training.steps import TrainState, create_state, make_train_step
from flax_hmog.training.watch import BelowStartWarning, Look, Watch

__all__ = [
    "RULES",
    "Affine",
    "BelowStartWarning",
    "CheckpointError",
    "CheckpointWriter",
    "Log1p",
    "Look",
    "Preprocessing",
    "Program",
    "Restored",
    "SelectColumns",
    "SizeFactor",
    "TrainState",
    "Watch",
    "Whiten",
    "batch_sharding",
    "create_state",
    "export",
    "global_rows",
    "load_leaves",
    "load_program",
    "make_mesh",
    "make_train_step",
    "restore",
    "restore_like",
    "tree_shardings",
    "write_leaves",
    "write_program",
]
