"""An experiment from options of the command line: every argument of what is chosen is one, typed and explained."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import jax.numpy as jnp

from flax_hmog.em.options import NAMES, USED
from flax_hmog.model.optional import require
from flax_hmog.recipe.config import EM, Experiment, Rounds, with_sizes
from flax_hmog.recipe.template import FOLLOWING, REQUIRED, Template, is_dtype, parameters

PLAIN = (int, float, bool, str, types.NoneType)
HIDDEN = ("obs_dim", "image_shape", "n_components", "learning_rate")  # as data and other options have them
HELP = {
    "encoder": "`none`, `mlp`, `conv`, `autoencoder`, or the import path MODULE:CLASS of a linen module. Its arguments "
    "are options: `--encoder.name conv --help`.",
    "heads": "Heads that are trained: `differentiable`, `symmetric`, `analytic`, or import paths MODULE:CLASS; the "
    "first is the one that a report describes. None: EM on the inputs is all.",
    "optimizer": "`adam`, `adamw`, `sgd` or another function of optax, or the import path MODULE:FUNCTION of one that "
    "takes a learning rate. Its arguments are options: `--optimizer.name sgd --help`.",
}

Fields = dict[str, tuple[Any, Any]]
"""Type and default of each field."""


def parse_experiment(default: Experiment, arguments: list[str] | None, prog: str) -> Experiment:
    """The experiment as the options say; it ends the process for arguments that cannot be read, or with the help.

    Names of encoder, heads and optimiser are read first: their arguments are options then.

    Args:
        default: the experiment, which options change.
        arguments: the options; None takes those of the process.
        prog: the command, for its help.

    Raises:
        ValueError: for an experiment that cannot be.
        ImportError: without tyro.
    """
    tyro = require("tyro", "train")
    encoder, heads, optimizer = _chosen(default, arguments, prog)
    of_heads = {head.label: _flags(tyro, head, has_encoder=encoder is not None) for head in heads}
    kind, value = _group("Heads", of_heads)
    changes: Fields = {
        "encoder": _flags(tyro, encoder, HELP["encoder"]),
        "optimizer": _flags(tyro, optimizer, HELP["optimizer"]),
        "heads": (Annotated[tuple[str, ...], tyro.conf.arg(help=HELP["heads"])], tuple(head.name for head in heads)),
        "head_options": (Annotated[kind, tyro.conf.arg(name="heads")], value),
        "em": _of_fits(tyro, default.em),
        "rounds": _group("Rounds", {"em": _of_fits(tyro, default.rounds.em)}, default.rounds),
    }
    kind, value = _group("Experiment", changes, default)
    found = _values(tyro.cli(kind, default=value, prog=prog, args=arguments))
    of_heads, rounds = _values(found.pop("head_options")), _values(found["rounds"])
    given = {
        "encoder": encoder and _filled(encoder, found["encoder"]),
        "optimizer": _filled(optimizer, found["optimizer"]),
        "heads": tuple(_filled(head, of_heads[head.label]) for head in heads),
        "em": EM(**_values(found["em"])),
        "rounds": Rounds(**rounds | {"em": EM(**_values(rounds["em"]))}),
    }
    return Experiment(**found | given)


def _chosen(
    default: Experiment, arguments: list[str] | None, prog: str
) -> tuple[Template | None, tuple[Template, ...], Template]:
    """Encoder, heads and optimiser by the names among the options, with the default's arguments that they take."""
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--encoder.name", dest="encoder")
    parser.add_argument("--optimizer.name", dest="optimizer", default=default.optimizer.name)
    parser.add_argument("--heads", nargs="*", default=[head.name for head in default.heads])
    named, _ = parser.parse_known_args(arguments)
    encoder = default.encoder
    if named.encoder is not None:
        encoder = None if named.encoder == "none" else (encoder or Template("mlp")).switched(named.encoder)
    known = {head.name: head for head in default.heads}
    first = next(iter(default.heads), Template("differentiable"))
    heads = [known[name] if name in known else first.switched(name) for name in named.heads]
    return *with_sizes(encoder, heads), default.optimizer.switched(named.optimizer)


def _values(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


def _group(name: str, fields: Fields, base: Any = None) -> tuple[type, Any]:
    """A dataclass with such fields, in place of or beside those of a dataclass, and an instance of it."""
    made = [(key, kind, dataclasses.field(default=None)) for key, (kind, _) in fields.items()]
    bases: tuple[type, ...] = () if base is None else (type(base),)
    namespace: dict[str, Any] = {"__post_init__": lambda _: None, "__doc__": base.__doc__ if base else ""}
    cls = dataclasses.make_dataclass(name, made, bases=bases, namespace=namespace, frozen=True, kw_only=True)
    return cls, cls(**(_values(base) if base else {}) | {key: value for key, (_, value) in fields.items()})


def _of_fits(tyro: types.ModuleType, em: EM) -> tuple[type, Any]:
    """The options of EM, without those that a whole fit does not use."""
    unused = [name for name in NAMES if name not in USED["fit_em"]]
    hidden = {
        name: (tyro.conf.Suppress[tyro.conf.Fixed[type(getattr(em, name))]], getattr(em, name)) for name in unused
    }
    return _group("EM", hidden, em)


def _flags(
    tyro: types.ModuleType, template: Template | None, name_help: str | None = None, *, has_encoder: bool = True
) -> tuple[type, Any]:
    """Options for the name and the arguments of a class or function."""
    fields: Fields = {}
    if name_help is not None:
        fields["name"] = Annotated[str, tyro.conf.arg(help=name_help)], template.name if template else "none"
    if template is not None:
        docs = require("docstring_parser", "train").parse(template.target.__doc__ or "").params
        texts = {doc.arg_name: " ".join((doc.description or "").partition(". ")[0].split()) for doc in docs}
        hidden = HIDDEN if has_encoder else (*HIDDEN, "lat_dim")
        for key, (kind, value) in _typed(template).items():
            if key not in hidden:
                text = texts.get(key, "") + (" None: as `model` has it." if value is None and key in FOLLOWING else "")
                fields[key] = Annotated[kind, tyro.conf.arg(help=text)], tyro.MISSING if value is REQUIRED else value
    return _group(template.label if template else "none", fields)


def _typed(template: Template) -> Fields:
    """The arguments that a command line can give."""
    found: Fields = {}
    taken = parameters(template.target)
    try:
        hints = typing.get_type_hints(template.target)
    except NameError:  # names that stand in a type and nowhere else
        hints = {name: parameter.annotation for name, parameter in taken.items()}
    for name, parameter in taken.items():
        value = template.arguments.get(name, None if name in FOLLOWING else parameter.default)
        value = jnp.dtype(value).name if is_dtype(value) else value
        kind = _option_type(hints.get(name, Any), value)
        if kind is not None:
            found[name] = kind | None if name in FOLLOWING else kind, value
    return found


def _option_type(hint: Any, value: object) -> Any:
    """The type of an option for an argument of a type; None where text cannot give it."""
    if hint in PLAIN or typing.get_origin(hint) in (typing.Literal, tuple):
        return hint
    if hint is Any:
        return str | None if value is None else (type(value) if isinstance(value, PLAIN) else None)
    members = typing.get_args(hint)
    plain = {member for member in members if member in PLAIN or typing.get_origin(member) is tuple}
    if float in plain:  # numbers of any kind, as JAX takes them
        plain &= {float, types.NoneType}
    if Any in members and not any(typing.get_origin(member) is Callable for member in members):
        plain.add(str)
    return typing.Union[tuple(plain)] if plain - {types.NoneType} else None  # noqa: UP007


def _filled(template: Template, flags: object) -> Template:
    """The template with the arguments that options have changed."""
    shown = {name: value for name, (_, value) in _typed(template).items()}
    return template.given(**{k: v for k, v in _values(flags).items() if k in shown and v != shown[k]})
