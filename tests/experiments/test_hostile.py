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
    monkeypatch.setattr(files, "_digest", as_listed)
    monkeypatch.setattr(hostile, "damages", of_the_description)
    unguarded = outcomes(tmp_path / "unguarded", 60)
    assert unguarded["silent wrong"] > 0  # arrays have digests of their own


def of_the_description(paths, changes, rng):
    return damages([path for path in paths if path.match("description/metadata")], changes, rng)


def as_listed(path, digest=files._digest, **options):
    """The digest that a step lists for a file, whatever is in it."""
    for folder in path.parents:
        if (folder / files.SUMS).exists():
            return files._sums(folder)[path.relative_to(folder).as_posix()]
    return digest(path, **options)
