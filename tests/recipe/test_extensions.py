"""A stranger's data source, score, encoder, head and optimiser, each in a file of theirs, as the recipe takes them."""

import json

import jax
import numpy as np
import pytest
from own_networks import Foreign, Inner, SphericalHMoG
from small_runs import read_metrics

from flax_hmog.cli import main
from flax_hmog.networks import MLP
from flax_hmog.recipe import EM, Gradient, Model, Rounds, Template, fit_clusterer
from flax_hmog.recipe.saved import restore_run

SOURCE = """
import numpy as np
from flax_hmog.recipe import File

def moons(data):
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=300)
    return File(rng.normal(size=(300, 4)) + 4 * labels[:, None], labels, title="Two clusters")
"""
SCORE = """
import numpy as np

def certainty(output, labels):
    assert len(labels) == 60
    return np.exp(output.log_responsibilities).max(axis=1).mean()
"""
SMALL = ["--model.lat-dim", "3", "--model.n-components", "6", "--em.max-steps", "3", "--gradient.epochs", "1"]
X = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
FEW = {"em": EM(max_steps=2), "gradient": Gradient(epochs=3, batch_size=60)}
ROUNDS = Rounds(distil_epochs=1, mixed_epochs=1)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder of a stranger, in which the command runs."""
    (tmp_path / "my_source.py").write_text(SOURCE)
    (tmp_path / "my_score.py").write_text(SCORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return tmp_path


def test_a_data_source_and_a_score_are_a_file_each(files, capsys):
    options = ["--data.name", "my_source:moons", "--scores", "my_score:certainty", "--workdir", "run"]
    assert main(["train", "synthetic", *options, *SMALL]) == 0
    for stage in ("em", "differentiable"):
        assert 0.5 < read_metrics(files / "run", stage=stage)[-1]["certainty"] <= 1
    assert main(["report", "run"]) == 0  # of what the run has noted
    (files / "run" / "report.npz").unlink()
    assert main(["report", "run"]) == 1
    assert "Add --allow-import if you trust it" in capsys.readouterr().err
    assert main(["report", "run", "--allow-import"]) == 0
    assert "certainty" in capsys.readouterr().out
    assert "certainty" in json.loads((files / "run" / "result.json").read_text())["scores"]["em"][0]


def test_a_head_and_an_optimizer_by_import_path(files):
    """Their arguments are options, and what follows from data and model is filled in."""
    names = ["--heads", "own_networks:SphericalHMoG", "--optimizer.name", "optax:sgd", "--data.name", "my_source:moons"]
    options = ["--heads.SphericalHMoG.signal-bound", "9", "--optimizer.momentum", "0.5", "--model.obs-rep", "scale"]
    more = ["--gradient.schedule", "linear", "--gradient.warmup", "0.5", "--model.projection-dtype", "bfloat16"]
    assert main(["train", "synthetic", *names, *options, *more, *SMALL, "--workdir", "run"]) == 0
    head = restore_run("run", stage="SphericalHMoG", allow_import=True).head
    assert type(head) is SphericalHMoG
    assert (head.n_components, head.obs_rep, head.signal_bound) == (6, "scale", 9)
    assert head.projection_dtype == restore_run("run", stage="em").head.projection_dtype == "bfloat16"


def test_a_head_of_others_on_an_encoder(tmp_path):
    """One that cannot be started from a model learns the clusters from where it begins."""
    head = Foreign(2, 4, 5)
    options = FEW | {"model": Model(2, 6), "rounds": ROUNDS, "workdir": tmp_path}
    found = fit_clusterer(MLP(5, (8,)), X, 4, jax.random.key(0), head=head, **options)
    assert type(found.head) is Foreign
    assert found(X).log_responsibilities.shape == (120, 4)
    assert type(restore_run(tmp_path, allow_import=True).head) is Foreign
    with pytest.raises(ValueError, match="`heads` without an encoder must start from the model of EM; got Foreign"):
        fit_clusterer(None, X, 4, jax.random.key(0), head=Foreign(2, 4, 6), **FEW)


def test_a_run_of_rows_in_memory_is_reported(tmp_path):
    fit_clusterer(None, X, 3, jax.random.key(0), model=Model(2, 4), em=EM(max_steps=2), workdir=tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "moved")
    assert main(["report", str(tmp_path / "moved")]) == 0
    scores = json.loads((tmp_path / "moved" / "result.json").read_text())["scores"]
    assert np.isfinite(scores["em"][0]["train_log_density"])
    assert "test_log_density" not in scores["em"][0]
    (tmp_path / "moved" / "rows.npz").unlink()
    assert main(["report", str(tmp_path / "moved")]) == 0
    (tmp_path / "moved" / "report.npz").unlink()
    assert main(["report", str(tmp_path / "moved")]) == 1


def test_a_template_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"Template: the name must be one of mlp, conv, .* got 'mpl'"):
        Template("mpl")
    with pytest.raises(ValueError, match="`width` must be an argument of mlp; got one that is none"):
        Template("mlp", width=3)
    with pytest.raises(ValueError, match="Inner must have a value for each of its arguments"):
        Template(Inner).make({})
    assert Template(MLP(3)).make({}) == MLP(3)
    assert Template("analytic").switched("differentiable") == Template("differentiable")
