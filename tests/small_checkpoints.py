"""Small checkpoints, and changes to them that leave all their digests right."""

import hashlib
import json

import jax
import numpy as np

from flax_hmog import DifferentiableHMoG
from flax_hmog.training import CheckpointWriter

D, L, K = 6, 2, 3
HEAD = DifferentiableHMoG(L, K)
X = np.random.default_rng(0).standard_normal((16, D)).astype(np.float32)


def save(folder, steps=(1, 2), **options):
    """Checkpoints of one head, of other values in every step."""
    with CheckpointWriter(folder, head=HEAD, config={"a": [1, "b"]}, **options) as writer:
        for step in steps:
            variables = HEAD.init(jax.random.key(step), X)
            writer.save(step, variables, state={"key": jax.random.key(step)}, progress={"at": step / 3})


def sums(folder):
    """The list of the files of a step, as its writer makes it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if name != "SHA256SUMS"}
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def redescribe(folder, change):
    """A step whose description is another one from the start: `change` is given it to change."""
    path = folder / "description" / "metadata"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    (folder / "SHA256SUMS").write_text(sums(folder))


def older(folder, version=4):
    """A step as version 4 or 5 of the format has it: head and encoder; in 4 no list of the files."""

    def change(description):
        module = description.pop("module")
        parts = module["arguments"] if module["class"] == "Clusterer" else {"head": module, "encoder": None}
        description |= {"format": version} | parts
        for name in ("place", "inputs", "step")[: 3 if version == 4 else 2]:
            description.pop(name)

    redescribe(folder, change)
    if version == 4:
        (folder / "SHA256SUMS").unlink()


def contents(restored):
    """All that a checkpoint holds, by name."""
    arrays = {"variables": restored.module_variables, "state": restored.state}
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)}
    texts = ("step", "progress", "history", "metrics", "config", "versions")
    return {name: (leaf.dtype.name, leaf.shape, leaf.tobytes()) for name, leaf in named.items()} | {
        "described": json.dumps([getattr(restored, name) for name in texts]),
        "modules": repr((restored.head, restored.encoder, restored.clusters)),
    }
