"""Compiled programs that are kept between processes, for the command line."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import jax

NAME = "flax_hmog"
OPTIONS = ("persistent_cache_min_compile_time_secs", 0.0), ("persistent_cache_min_entry_size_bytes", 0)


def keep_programs() -> Path | None:
    """Let JAX keep what it compiles in a folder of the user's, from which later processes take it.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` keeps none; other options of
    JAX hold as well. A folder that cannot be written to is no error: nothing is kept.

    Returns:
        The folder, or None.
    """
    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return None
    if given := config.jax_compilation_cache_dir:
        folder = Path(given)
    else:
        try:
            folder = _user_cache() / NAME / _machine()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # `Path.home` raises the second where there is none
            return None
        if not os.access(folder, os.W_OK):
            return None
        config.update("jax_compilation_cache_dir", str(folder))
    for option, value in OPTIONS:
        if f"JAX_{option.upper()}" not in os.environ:
            config.update(f"jax_{option}", value)
    # an entry that another process is writing, or that the disk has no room for, costs a compilation and nothing else
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    return folder


def _user_cache() -> Path:
    """The folder that the system gives a user for what can be made again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _machine() -> str:
    """A name for the kind of processor: programs of one may not run on another that shares the folder."""
    about = [platform.machine(), platform.processor()]
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        lines = cpus.read_text(errors="replace").splitlines()
        about += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
