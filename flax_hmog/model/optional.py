"""Packages that only some functions need."""

from __future__ import annotations

import importlib
from typing import Any

from flax_hmog.model.checks import door


def require(module: str, extra: str) -> Any:
    """Import an optional dependency.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise ImportError(
            f"{door()}: `{package}` must be installed; got {type(error).__name__}. "
            f'Install it: pip install "flax-hmog[{extra}]".'
        ) from error
