"""Programs that the command line keeps: where, when not, and that they are taken up."""

import os
import subprocess
import sys

import jax
import pytest

from flax_hmog.training import programs

RUN = """
import warnings
import jax, jax.numpy as jnp
from flax_hmog.training.programs import keep_programs
found, caught = [], []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
warnings.showwarning = lambda *_, **__: caught.append(1)
folder = keep_programs()
jax.jit(lambda x: jnp.linalg.cholesky(x @ x.T + 1))(jnp.eye(3)).block_until_ready()
print(folder, found.count("/jax/compilation_cache/cache_hits"), "warned" if caught else "quiet")
"""


def run(home, **environment):
    """Folder, hits and warnings of a process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    given = inherited | {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", RUN], env=given, capture_output=True, text=True, check=True)
    folder, hits, said = done.stdout.split()
    return folder, int(hits), said, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="HOME is not read there")
def test_a_second_process_compiles_nothing_and_damage_costs_only_time(tmp_path):
    folder, hits, said, _ = run(tmp_path)
    assert folder.startswith(str(tmp_path))
    assert (hits, said) == (0, "quiet")
    same, hits, said, complaints = run(tmp_path)
    assert (same, said, complaints) == (folder, "quiet", "")
    assert hits > 0
    for path in programs.Path(folder).iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert run(tmp_path)[1:3] == (0, "quiet")


def test_the_environment_says_where_and_whether(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(elsewhere))[0] == str(elsewhere)
    assert any(elsewhere.iterdir())
    assert run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[:2] == ("None", 0)
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere"}


def test_a_home_that_cannot_be_written_to_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(programs, "_user_cache", lambda: tmp_path / "file")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        assert programs.keep_programs() is None
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
