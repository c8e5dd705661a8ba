"""Rows split over a mesh of devices: the same fit and the same training as on one device.

The mesh is JAX's default, with Explicit axes; on a machine without accelerators its devices are parts of the CPU. EM
takes rows where they lie, with one sum of the size of the model per step. The train step splits rows, and large leaves
over a second axis. Its checkpoint then restores on one device.

    python examples/sharded.py --devices 4
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, fit_em, infer, warm_start
from flax_hmog.training import CheckpointWriter, create_state, make_mesh, make_train_step, restore


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and train on all devices, and restore on one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="of the CPU, where there are no others")
    parser.add_argument("--em-steps", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="of gradients")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", options.devices)  # before anything asks for a device

    count = len(jax.devices())
    x = (load_digits().data / 16).astype(np.float32)
    x = x[: len(x) // count * count]  # rows that the devices divide

    # EM: put the rows where they belong, and call what you call on one device
    mesh = jax.make_mesh((count,), ("rows",))
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows")))
    head = AnalyticHMoG(lat_dim=8, n_components=10)
    fits = [fit_em(head, held, jax.random.key(0), max_steps=options.em_steps) for held in (x, rows)]
    print("devices:", count, [str(kind) for kind in mesh.axis_types])
    print("objective on one and on all:", *(f"{fit.objective_history[-1]:.4f}" for fit in fits))
    output = infer(fits[1].natural, rows)
    print("log-densities lie as the rows do:", output.log_density.sharding)

    # gradients: leaves of at least `min_sharded` entries are split over a second axis
    mesh = make_mesh(model=2 if count % 2 == 0 else 1)
    trained, optimizer = DifferentiableHMoG(lat_dim=8, n_components=10), optax.adam(1e-2)
    variables, _ = warm_start(trained, fits[1].natural, x)
    state = create_state(trained, variables, optimizer, x, mesh, min_sharded=100)
    print("leaves:", {name: leaf.sharding.spec for name, leaf in state.params.items()})

    def loss(variables: Any, x: jax.Array, extra: object) -> tuple[jax.Array, Any]:
        density: Any = trained.apply(variables, x, method="mean_log_density")
        return -density, {}

    step = make_train_step(loss, state, mesh)
    losses = []
    for _ in range(options.steps):
        state, value = step(state, x)
        losses.append(float(value))  # waits for the step: on CPUs, devices share their threads
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    folder = tempfile.mkdtemp()
    with CheckpointWriter(folder, trained) as writer:
        writer.save(options.steps, state.variables, state={"opt_state": state.opt_state})
    restored = restore(folder)  # on the first device; `restore_like` puts arrays where a template has them
    on_all: Any = trained.apply(state.variables, x)
    print(f"restored: log-densities differ by {np.abs(restored(x).log_density - on_all.log_density).max():.1e}")


if __name__ == "__main__":
    main()
