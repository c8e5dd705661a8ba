"""The benchmark of damage tells what is guarded from what is not."""

import collections

import pytest

from experiments.benchmarks import hostile
from experiments.benchmarks.hostile import OUTCOMES, Config, damage, damages
from flax_hmog.training import files


def outcomes(folder, changes):
    """How often each outcome of damage came, over all files."""
    folder.mkdir()
    table = damage(Config(changes=changes), folder)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0][-1] == "all"
    return collections.Counter({name: int(cells[-1]) for name, cells in zip(OUTCOMES, columns[3:], strict=True)})


@pytest.mark.slow
def test_all_damage_is_named_as_long_as_it_is_looked_for(tmp_path, monkeypatch):
    counts = outcomes(tmp_path / "guarded", 90)
    assert counts["named error"] == counts.total() >= 90
    for name in ("_check_file", "_check_files"):
        monkeypatch.setattr(files, name, lambda *_: None)
    monkeypatch.setattr(hostile, "damages", of_the_description)
    unguarded = outcomes(tmp_path / "unguarded", 60)
    assert unguarded["silent wrong"] > 0  # arrays have digests of their own


def of_the_description(paths, changes, rng):
    return damages([path for path in paths if path.match("description/metadata")], changes, rng)
