"""Models for `flax.serialization`: every pytree class of this library as a state dict of its fields.

As with flax's own dataclasses, static fields are no part of the state: they come from the target. A field that is None
stays None.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from flax import serialization

from flax_hmog.model.coordinates import Natural
from flax_hmog.model.kinds import for_each_pytree


def _state_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if not field.metadata.get("static")]


def _to_state(value: object) -> dict[str, Any]:
    """The fields by name, each as its own state."""
    fields = _state_fields(type(value))
    return {field.name: serialization.to_state_dict(getattr(value, field.name)) for field in fields}


def _from_state(target: Any, state: Any) -> Any:
    """A value like `target` with the fields of a state.

    Raises:
        ValueError: for fields that the class does not have, or that are missing and have no default.
    """
    cls, state = type(target), _of_today(type(target), state)
    fields = {field.name: field for field in _state_fields(cls)}
    missing = [name for name in fields if name not in state and fields[name].default is dataclasses.MISSING]
    extra = [name for name in state if name not in fields and state[name] is not None]
    if missing or extra:
        raise ValueError(
            f"from_state_dict: `state` must have the fields of {cls.__name__}, {', '.join(fields)}; got "
            f"{', '.join(map(str, state))}. Give the state of a {cls.__name__}."
        )
    values = {name: _field(cls, name, getattr(target, name), state[name]) for name in fields if name in state}
    absent = {name: fields[name].default for name in fields if name not in state}
    blank: Any = object.__new__(cls)
    blank.__dict__.update(target.__dict__ | values | absent)
    return blank


def _of_today(cls: type, state: Any) -> Any:
    """A state of `Natural` from before its three prior fields were one, as one of today; all others as they are."""
    if cls is not Natural or "prior_location" not in state:
        return state
    old = {"location": "prior_location", "precision": "prior_precision", "log_weights": "log_weights"}
    prior = {name: state.get(before) for name, before in old.items()}
    rest = {name: value for name, value in state.items() if name not in old.values()}
    return rest | {"prior": None if None in prior.values() else prior}


def _field(cls: type, name: str, target: Any, state: Any) -> Any:
    """One field: None if the state has none, whatever the target; and the other way round by the field's type."""
    if state is None:
        return None
    if target is None and isinstance(state, dict):
        target = _empty(cls, name)
    return state if target is None else serialization.from_state_dict(target, state, name=name)


def _empty(cls: type, name: str) -> Any:
    """An instance without values of the pytree class that a field may hold."""
    hint = _hints(cls)[name]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if isinstance(kind, type) and kind in _REGISTERED]
    if len(kinds) != 1:
        raise ValueError(
            f"from_state_dict: `{name}` of the target must not be None where the state has one; got None. "
            f"Give a {cls.__name__} with this field."
        )
    blank: Any = object.__new__(kinds[0])
    for field in dataclasses.fields(kinds[0]):
        object.__setattr__(blank, field.name, field.default if field.metadata.get("static") else None)
    return blank


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


_REGISTERED: set[type] = set()


def _register(cls: type) -> None:
    _REGISTERED.add(cls)
    serialization.register_serialization_state(cls, _to_state, _from_state, override=True)


for_each_pytree(_register)
