#!/usr/bin/env bash
# jax 0.10.2 (and 0.12.0): the pytree structures of two different dataclasses registered by `register_dataclass` compare equal
# if their fields have the same names, while their hashes differ.
#
# So a check `jax.tree.structure(a) == jax.tree.structure(b)`, as of a restored tree against a template, lets hours pass for
# minutes, and unflattening makes the wrong class; a dictionary keyed by structures mostly tells the two apart, as hashes
# do. `jax.tree.map` of both raises. Classes registered by `register_pytree_node_class` are told apart by `==` too.
#
# Do instead: compare `type` as well, or add a static field (`metadata={"static": True}`) whose default names the class.
#
# Seen (Python 3.11, x86-64):
#   register_dataclass: structures equal True, hashes equal False
#   register_pytree_node_class: structures equal False
#   with a static name: structures equal False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv" || exit 2
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
"$work/venv/bin/python" - <<'EOF'
import dataclasses
import sys

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hours:
    value: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Minutes:
    value: float


@jax.tree_util.register_pytree_node_class
class Node:
    def __init__(self, value):
        self.value = value

    def tree_flatten(self):
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class OtherNode(Node):
    pass


def named(name):
    @dataclasses.dataclass(frozen=True)
    class Named:
        value: float
        kind: str = dataclasses.field(default=name, metadata={"static": True})

    return jax.tree_util.register_dataclass(Named)


a, b = (jax.tree.structure(cls(1.0)) for cls in (Hours, Minutes))
nodes = jax.tree.structure(Node(1.0)) == jax.tree.structure(OtherNode(1.0))
static = jax.tree.structure(named("hours")(1.0)) == jax.tree.structure(named("minutes")(1.0))
print(f"register_dataclass: structures equal {a == b}, hashes equal {hash(a) == hash(b)}")
print(f"register_pytree_node_class: structures equal {nodes}")
print(f"with a static name: structures equal {static}")
sys.exit(not (a == b and hash(a) != hash(b) and not nodes and not static))
EOF
