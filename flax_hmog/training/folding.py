"""A function of rows in which all that does not depend on the rows is computed beforehand, once.

What is left for a server is matrix products and entrywise operations: no factorisation of parameters, and nothing that
platforms do in different ways. Other compilers and converters take that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal

from flax_hmog.model.typed import Tree

# primitives that call a function, which is run in their place, and the parameter that holds it
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "checkpoint": "jaxpr",
    "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


def folded(function: Callable[[Any], Tree], rows: jax.ShapeDtypeStruct) -> Callable[[Any], Tree]:
    """The function of rows of this shape and dtype, with constants in place of what does not depend on the rows.

    Derivative rules of one's own are not kept.

    Args:
        function: of rows (B, ...); arrays that it holds are constants.
        rows: B may be symbolic.

    Returns:
        A function that gives the same.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix = jnp.diag(jnp.arange(1.0, 3.0))
        >>> solve = folded(lambda x: x @ jnp.linalg.inv(matrix), jax.ShapeDtypeStruct((5, 2), "float32"))
        >>> [equation.primitive.name for equation in jax.make_jaxpr(solve)(jnp.ones((5, 2))).eqns]
        ['dot_general']
    """
    traced, shape = jax.make_jaxpr(function, return_shape=True)(rows)
    steps = _Steps()
    given = steps.place()
    out = steps.add(traced.jaxpr, traced.consts, [given])
    late = _depending(steps, given)
    constants = _computed(steps, late, out)

    def run(x: Any) -> Tree:
        values = constants | {given: x}
        for step, is_late in zip(steps.steps, late, strict=True):
            if is_late:
                step.run(values)
        return jax.tree.unflatten(jax.tree.structure(shape), [values[place] for place in out])

    return run


@dataclasses.dataclass
class _Step:
    """One operation: the places of its arguments and results among all values."""

    equation: Any
    inputs: list[int]
    outputs: list[int]

    def run(self, values: dict[int, Any]) -> None:
        primitive = self.equation.primitive
        options = primitive.get_bind_params(self.equation.params)
        with self.equation.ctx.manager:
            result = primitive.bind(*(values[place] for place in self.inputs), **options)
        values.update(zip(self.outputs, result if primitive.multiple_results else [result], strict=True))


class _Steps:
    """The operations of a function in order, those of functions that it calls in their place."""

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.constants: dict[int, Any] = {}
        self.count = 0

    def place(self) -> int:
        """A place for one more value."""
        self.count += 1
        return self.count

    def add(self, jaxpr: Any, constants: list[Any], arguments: list[int]) -> list[int]:
        """Add the operations of a jaxpr on values at these places; the places of its results."""
        places = dict(zip(jaxpr.invars, arguments, strict=True))
        places |= {name: self._constant(value) for name, value in zip(jaxpr.constvars, constants, strict=True)}

        def of(atom: Any) -> int:
            return self._constant(atom.val) if isinstance(atom, Literal) else places[atom]

        for equation in jaxpr.eqns:
            inputs = [of(atom) for atom in equation.invars]
            inner = equation.params.get(CALLS.get(equation.primitive.name, ""))
            if inner is None:
                outputs = [self.place() for _ in equation.outvars]
                self.steps.append(_Step(equation, inputs, outputs))
            elif hasattr(inner, "consts"):
                outputs = self.add(inner.jaxpr, inner.consts, inputs)
            else:
                outputs = self.add(inner, [], inputs)
            places |= dict(zip(equation.outvars, outputs, strict=True))
        return [of(atom) for atom in jaxpr.outvars]

    def _constant(self, value: Any) -> int:
        place = self.place()
        self.constants[place] = value
        return place


def _depending(steps: _Steps, given: int) -> list[bool]:
    """True for steps that depend on the value at a place, the number of rows, or have effects.

    Choices of a platform, and whole numbers that follow from them, are repeated where such a step needs them.
    """
    late_places: set[int] = {given}
    choices: set[int] = set()
    late = []
    for step in steps.steps:
        is_late = not late_places.isdisjoint(step.inputs) or bool(step.equation.effects) or _is_open(step.equation)
        late.append(is_late)
        if is_late:
            late_places.update(step.outputs)
        elif step.equation.primitive.name == "platform_index" or not choices.isdisjoint(step.inputs):
            is_number = [atom.aval.shape == () and atom.aval.dtype.kind in "iub" for atom in step.equation.outvars]
            choices.update(step.outputs if all(is_number) else ())
    needed = {place for step, is_late in zip(steps.steps, late, strict=True) if is_late for place in step.inputs}
    for number, step in reversed(list(enumerate(steps.steps))):
        if not late[number] and not choices.isdisjoint(step.outputs) and not needed.isdisjoint(step.outputs):
            late[number] = True
            needed.update(step.inputs)
    return late


def _computed(steps: _Steps, late: list[bool], out: list[int]) -> dict[int, Any]:
    """The values that late steps and the result need, of all steps before; one program computes them."""
    used = set(out).union(*(step.inputs for step, is_late in zip(steps.steps, late, strict=True) if is_late))
    early = [step for step, is_late in zip(steps.steps, late, strict=True) if not is_late]
    made = {place for step in early for place in step.outputs}

    @jax.jit
    def compute(values: dict[int, Any]) -> dict[int, Any]:
        values = dict(values)
        for step in early:
            step.run(values)
        return {place: values[place] for place in sorted(used & made)}

    with jax.ensure_compile_time_eval():
        return steps.constants | (compute(steps.constants) if early else {})


def _is_open(equation: Any) -> bool:
    """True if an operation depends on the number of rows, other than by its arguments."""
    if equation.primitive.name == "dim_as_value":
        return True
    shapes = (atom.aval.shape for atom in equation.outvars if hasattr(atom.aval, "shape"))
    if any(not isinstance(size, int) for shape in shapes for size in shape):
        return True
    return any(_is_open(inner) for jaxpr in _inner(equation) for inner in jaxpr.eqns)


def _inner(equation: Any) -> Iterator[Any]:
    """The functions that an operation holds."""
    for value in equation.params.values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if hasattr(part, "eqns"):
                yield part.jaxpr if hasattr(part, "jaxpr") else part
