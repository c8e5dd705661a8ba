"""Plan of a run, without data and without training: `--dry-run`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from flax_hmog.em.options import PseudoCounts, Regularizer
from flax_hmog.em.step import em_step
from flax_hmog.model.conversions import natural_to_moments
from flax_hmog.model.coordinates import Natural
from flax_hmog.model.head import Head
from flax_hmog.model.kinds import as_rep
from flax_hmog.model.typed import Variables
from flax_hmog.recipe.config import Experiment
from flax_hmog.recipe.inputs import input_dim, input_image_shape
from flax_hmog.recipe.load import data_shape
from flax_hmog.recipe.models import Extra, Trainable, abstract_fit
from flax_hmog.recipe.train import with_batches
from flax_hmog.training import batch_sharding
from flax_hmog.training.describe import named_arrays
from flax_hmog.training.mesh import make_mesh, rows_multiple
from flax_hmog.training.processes import is_first
from flax_hmog.training.steps import TrainState, abstract_state


def print_plan(config: Experiment, console: Console) -> None:
    """Configuration, data, mesh, parameters with their shardings, and what each step takes on a device."""
    mesh = make_mesh(model=config.devices.model)
    console = console if is_first() else Console(quiet=True)
    console.print(config.options())
    train, test, raw_dim, image_shape = data_shape(config.data)
    config = with_batches(config, mesh, train)
    obs_dim = input_dim(config.data, raw_dim)
    console.print(f"\ndata: {train} training and {test} test rows; {raw_dim} columns, {obs_dim} after preprocessing")
    devices = f"{mesh.size} x {jax.devices()[0].device_kind} in {jax.process_count()} processes"
    console.print(f"mesh: {devices}; data {mesh.shape['data']} x model {mesh.shape['model']}\n")
    steps = Table("step", "rows", "GFLOP on a device", "MB held", "MB beside it", title="What a step takes")
    em_rows = min(train, config.em.rows or train)
    compiled = _compile_em(config, mesh, -(-em_rows // rows_multiple(mesh)) * rows_multiple(mesh), obs_dim)
    flops = _head_flops(config.analytic, obs_dim, em_rows)
    steps.add_row("EM", str(em_rows), *_costs(compiled, flops, mesh))
    for name in config.labels:
        image = input_image_shape(config.data, image_shape)
        model = Trainable(config, name, config.n_clusters, obs_dim, image)
        x = jax.ShapeDtypeStruct((config.gradient.batch_size, obs_dim), jnp.float32)
        min_sharded = config.devices.min_sharded
        state = abstract_state(model.module, model.optimizer(1), x, mesh, min_sharded=min_sharded)
        console.print(_parameters(name, state))
        compiled = _compile_gradient(model, state, mesh, obs_dim)
        batch = config.gradient.batch_size
        rows = 4 * batch if config.has_encoder else batch  # two views, with gradients into the encoder and without
        flops = _head_flops(model.head, model.head_dim, rows) + _encoder_flops(model, batch, obs_dim)
        steps.add_row(f"gradient, {name}", str(batch), *_costs(compiled, flops, mesh))
    console.print(steps)
    console.print(
        "FLOP: of the matrix products over rows. MB held: data, parameters and optimiser; beside it: what a step needs "
        "while it runs, as the compiler plans it. With an encoder the step of the last round, after distillation."
    )


def _parameters(name: str, state: TrainState) -> Table:
    """The leaves of a head, and of its encoder."""
    leaves = named_arrays(state.params)
    total = sum(leaf.size for leaf in leaves.values())
    table = Table("leaf", "shape", "entries", "split over", title=f"{name}: {total:,} parameters")
    for leaf_name, leaf in leaves.items():
        axes = [str(axis) for axis in leaf.sharding.spec if axis is not None]
        table.add_row(leaf_name, str(leaf.shape), f"{leaf.size:,}", ", ".join(axes) or "replicated")
    return table


def _costs(compiled: jax.stages.Compiled, flops: float, mesh: Mesh) -> list[str]:
    memory: Any = compiled.memory_analysis()
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return [f"{flops / mesh.size / 1e9:.3g}", f"{memory.argument_size_in_bytes / 1e6:.3g}", f"{beside / 1e6:.3g}"]


def _head_flops(head: Head, obs_dim: int, rows: int) -> float:
    """Floating-point operations of the products of a pass (docs/performance.md)."""
    lat_dim, n_components = head.lat_dim, head.n_components
    width = 2 * lat_dim if head.component_structure.rep.is_diagonal else lat_dim * (lat_dim + 3) // 2
    noise = 0 if as_rep(head.obs_rep).is_diagonal else obs_dim**2
    return 2.0 * rows * (3 * obs_dim * lat_dim + 3 * n_components * width + 4 * lat_dim**2 + noise)


def _encoder_flops(model: Trainable, rows: int, obs_dim: int) -> float:
    """Operations of an encoder for two views of rows: forward as the compiler counts it, and twice that backward."""
    if model.encoder is None:
        return 0.0
    x = jax.ShapeDtypeStruct((2 * rows, obs_dim), jnp.float32)
    variables = jax.eval_shape(lambda x: model.module.init(jax.random.key(0), x), x)
    features = functools.partial(model.module.apply, method="features")
    costs = jax.jit(features).lower(variables, x).compile().cost_analysis() or {}
    return cast(float, 3.0 * costs.get("flops", 0.0))


def _compile_em(config: Experiment, mesh: Mesh, rows: int, obs_dim: int) -> Any:
    def step(natural: Natural, regularizer: Regularizer, x: jax.Array, weights: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return em_step(natural, x, weights, regularizer)

    replicated = NamedSharding(mesh, PartitionSpec())
    natural, regularizer, _ = abstract_fit(config.analytic, config, obs_dim, replicated, has_frame=True)
    x, weights = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh)) for shape in ((rows, obs_dim), (rows,))
    )
    return jax.jit(step).lower(natural, regularizer, x, weights).compile()


def _compile_gradient(model: Trainable, state: TrainState, mesh: Mesh, obs_dim: int) -> Any:
    step = model.step(state, mesh)
    rows = model.config.gradient.batch_size
    x = jax.ShapeDtypeStruct((rows, obs_dim), jnp.float32, sharding=batch_sharding(mesh))

    number: Callable[..., Any] = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    if model.encoder is None:

        def example(variables: Variables) -> Regularizer:
            return PseudoCounts().regularizer(natural_to_moments(model.natural(variables)))

        regularizer = jax.eval_shape(example, state.variables)
    else:
        regularizer = None
    key_data, counts = number(jnp.uint32, 2), number(jnp.uint32, 2)
    extra = Extra(regularizer, number(jnp.float32), None, counts, key_data, number(jnp.uint32), number(jnp.float32))
    return jax.jit(step).lower(state, x, extra).compile()
