"""Descriptions in the docstrings of modules, as texts; the classes are the modules.

They are read in a process of its own, `read`, since libraries change the classes of others as they are imported
(transformers gives `logging.Logger` methods). So this file imports nothing but the standard library.
"""

from __future__ import annotations

import collections
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

FEWEST_WORDS, MOST_WORDS = 6, 100  # of a text
# where a description ends: a heading that is underlined, an example, a directive
END = re.compile(r"\n[^\n]+\n\s*[-=~]{3,}|\n\s*>>>|\n\s*\.\. ")


def read(modules: Iterable[str]) -> dict[str, list[str]]:
    """`descriptions` of modules, found in a process that has imported nothing else.

    Raises:
        ImportError: for a module that is not there.
    """
    command = [sys.executable, "-W", "ignore", __file__, *modules]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise ImportError(f"docstrings: `modules` must be installed; got {found.stderr.strip().splitlines()[-1]}.")
    texts: dict[str, list[str]] = json.loads(found.stdout)
    return texts


def descriptions(modules: Iterable[str]) -> dict[str, list[str]]:
    """Descriptions of what modules offer, in the order of the alphabet; none that two modules have.

    Parameters, examples and what else follows the description are left out, and so are very short ones.
    """
    every = {name: set(_described(importlib.import_module(name))) for name in modules}
    count = collections.Counter(text for texts in every.values() for text in texts)
    return {name: sorted(text for text in texts if count[text] == 1) for name, texts in every.items()}


def _described(module: Any) -> Iterator[str]:
    """Texts of public classes, their public methods, and functions."""
    for name, value in vars(module).items():
        if name.startswith("_") or not callable(value):
            continue
        methods = vars(value) if inspect.isclass(value) else {}
        public = [getattr(method, "__func__", method) for key, method in methods.items() if not key.startswith("_")]
        for documented in (value, *public):
            if isinstance(doc := getattr(documented, "__doc__", None), str):
                words = END.split("\n" + inspect.cleandoc(doc), maxsplit=1)[0].split()[:MOST_WORDS]
                if len(words) >= FEWEST_WORDS:
                    yield " ".join(words)


if __name__ == "__main__":
    print(json.dumps(descriptions(sys.argv[1:])))
