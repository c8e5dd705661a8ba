"""Requirements admit no two releases of which one cannot be imported beside the other."""

import importlib.metadata
import itertools
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
PYTHONS = [
    text.rpartition(" ")[2]
    for text in PROJECT["classifiers"]
    if text.startswith("Programming Language :: Python :: 3.")
]
# releases that install together, as flax has no upper bound of jax, and end at `import flax.nnx` (AttributeError of
# jax.experimental.hijax); tried one by one on Python 3.12, as were those that work
BROKEN = [({"flax": "0.12.8", "jax": jax}, ("3.12", "3.13")) for jax in ("0.11.1", "0.11.2", "0.12.0", "0.12.0.1")] + [
    ({"flax": "0.12.9", "jax": jax}, ("3.12", "3.13")) for jax in ("0.11.2", "0.12.0", "0.12.0.1")
]
YANKED = [({"flax": "0.12.11"}, ("3.12", "3.13"))]  # for a bug of `traverse_util`, which checkpoints use
WORKING = [
    ({"flax": "0.12.8", "jax": "0.10.2"}, ("3.11",)),
    *(
        ({"flax": flax, "jax": jax}, ("3.12", "3.13"))
        for flax, jax in itertools.product(("0.12.10", "0.12.12"), ("0.11.1", "0.11.2", "0.12.0", "0.12.0.1"))
    ),
]


def admits(versions, python):
    """True if the requirements take all of these versions on this Python."""
    return all(
        requirement.specifier.contains(versions[requirement.name])
        for requirement in REQUIREMENTS
        if requirement.name in versions
        and (requirement.marker is None or requirement.marker.evaluate({"python_version": python}))
    )


@pytest.mark.parametrize(("pairs", "wanted"), [(BROKEN + YANKED, False), (WORKING, True)], ids=["broken", "working"])
def test_releases_that_do_not_work_together_are_not_admitted(pairs, wanted):
    wrong = [
        (versions, python) for versions, pythons in pairs for python in pythons if admits(versions, python) != wanted
    ]
    assert not wrong


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_has_a_bound_of_each(python):
    """No marker leaves a library without one."""
    environment = {"python_version": python}
    bound = {r.name for r in REQUIREMENTS if (r.marker is None or r.marker.evaluate(environment)) and r.specifier}
    assert bound == {requirement.name for requirement in REQUIREMENTS}
    assert {"jax", "flax", "numpy", "optax", "orbax-checkpoint"} <= bound


def test_what_is_installed_here_is_admitted():
    wrong = {
        str(requirement): importlib.metadata.version(requirement.name)
        for requirement in REQUIREMENTS
        if (requirement.marker is None or requirement.marker.evaluate())
        and not requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    }
    assert not wrong
