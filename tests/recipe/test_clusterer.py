"""Clusters in one call: as the command line gives them, in memory or in a folder, with any encoder."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from rich.console import Console
from sklearn.datasets import load_digits

from flax_hmog import DifferentiableHMoG, SymmetricHMoG
from flax_hmog.networks import MLP, ConvNet
from flax_hmog.recipe import (
    EM,
    Augmentation,
    Data,
    Experiment,
    Gradient,
    Model,
    Rounds,
    Template,
    fit_clusterer,
    restore_run,
)
from flax_hmog.recipe.train import run
from flax_hmog.training import BelowStartWarning, export
from flax_hmog.training.processes import StopRequest

X = load_digits().data[:300].astype(np.float32)
FEW = {"em": EM(max_steps=2), "gradient": Gradient(epochs=3, batch_size=150), "model": Model(3, 6)}

ROUNDS = Rounds(distil_epochs=1, mixed_epochs=1)


def fit(encoder, x=X, seed=0, **options):
    few = FEW if encoder is None else FEW | {"rounds": ROUNDS}
    return fit_clusterer(encoder, x, 4, jax.random.key(seed), **(few | options))


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.module_variables, want.module_variables)


class InterruptionError(Exception):
    """What a callback raises."""


def test_it_is_the_recipe_of_the_command_line(tmp_path):
    """Bit for bit, in memory and in a folder; one that was interrupted goes on."""
    np.savez(tmp_path / "rows.npz", X=X, n_train=299)
    data = Data("file", path=str(tmp_path / "rows.npz"), scale="range")
    model, encoder = dataclasses.replace(FEW["model"], n_clusters=4), Template("mlp", features=6, normalization="none")
    heads = (Template("differentiable", lat_dim=3),)
    config = Experiment("", data, model, encoder, ROUNDS, FEW["em"], FEW["gradient"], heads=heads, first_seed=2)
    stages = run(config, Console(quiet=True), StopRequest(listens=False))
    (want,) = (stages.memory[stage] for stage in stages.memory if stage.name == "differentiable-1")
    head, epochs = DifferentiableHMoG(3, 4), []
    options = {"head": head, "scale": "range"}
    mine = MLP(6, normalization="none")
    assert_same(fit(mine, X[:299], 2, **options, on_epoch=lambda *at: epochs.append(at)), want)
    assert [name for name, _ in epochs] == ["em", "differentiable-1-em", *["differentiable-1"] * 4]

    def stop(stage, step, total):
        if stage == "differentiable-1" and step == 2:
            assert total == 3
            raise InterruptionError

    with pytest.raises(InterruptionError):
        fit(mine, X[:299], 2, **options, workdir=tmp_path / "run", on_step=stop)
    assert_same(fit(mine, X[:299], 2, **options, workdir=tmp_path / "run"), want)
    again = fit(mine, X[:299], 2, **options, workdir=tmp_path / "run", on_step=stop)  # nothing is trained
    assert_same(again, want)


def test_any_encoder_will_do():
    """A Sequential, which no checkpoint holds, on images; the result takes rows and can be exported."""
    encoder = nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(5)])
    rounds = dataclasses.replace(ROUNDS, count=2, n_components=6)
    options = {"augmentation": Augmentation(shift=0.5), "head": SymmetricHMoG(2, 4), "rounds": rounds}
    found = fit(encoder, X.reshape(-1, 8, 8), **options, scale="range", test_share=0.1)
    assert isinstance(found.encoder, nn.Sequential)
    assert isinstance(found.head, SymmetricHMoG)
    assert np.isfinite(found.history[-1]["test_log_density"])
    output = found(X)
    np.testing.assert_allclose(np.exp(output.log_responsibilities).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(export(found)(X)["log_density"], output.log_density, rtol=1e-4)
    for images in (X.reshape(-1, 8, 8), X.reshape(-1, 8, 8, 1)):
        np.testing.assert_array_equal(found(images).log_density, output.log_density)
    assert found.features(X.reshape(2, -1, 8, 8)).shape == (2, 150, 5)
    with pytest.raises(ValueError, match=r"`raw` must have shape \(..., 64\) or \(..., 8, 8\); got \(300, 4, 16\)"):
        found(X.reshape(-1, 4, 16))


def test_without_an_encoder_em_is_all_or_a_head_follows(tmp_path, caplog):
    found = fit(None)
    assert found.clusters.shape == (6,)
    assert found(X).log_responsibilities.shape == (300, 4)
    assert fit_clusterer(None, X[:, 2:5], 4, jax.random.key(0), em=FEW["em"]).head.lat_dim == 3  # of ten by default
    head = DifferentiableHMoG(2, 5, signal_bound=99.0, pst_rep="full")
    trained = fit(None, head=head)
    assert trained.head == head
    assert trained.clusters.shape == (5,)
    restricted = head.copy(pst_rep="scale")
    with pytest.warns(BelowStartWarning):  # and what is returned is what the folder says
        found = fit(None, head=restricted, workdir=tmp_path)
    again = restore_run(tmp_path)
    assert_same(found, again)
    assert found.origin.startswith(str(tmp_path / "checkpoints/seed0/em"))
    assert "the head ends below EM, whose model is returned" in caplog.text
    assert restore_run(tmp_path, stage="differentiable").head == restricted


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (None, {"x": X[0]}, r"`x` must have shape \(N, D\), \(N, H, W\) or \(N, H, W, C\); got \(64,\)"),
        (None, {"x": X.reshape(-1, 1, 1, 8, 8)}, r"or \(N, H, W, C\); got \(300, 1, 1, 8, 8\)"),
        (
            ConvNet(6, (4, 16)),
            {"x": X.reshape(-1, 8, 8)},
            r"must have shape \(N, 4, 16\) or \(N, 64\), as the encoder's",
        ),
        (ConvNet(6, (8, 8)), {"x": X.reshape(-1, 1, 8, 8)}, r"got \(300, 1, 8, 8\). Give the encoder .* channels last"),
        (ConvNet(6, (7, 8)), {}, r"must have shape \(N, 7, 8\) or \(N, 56\), .*; got \(300, 64\)"),
        (None, {"x": X.astype(str)}, "`x` must hold real numbers"),
        (None, {"x": np.where(X > 15, np.nan, X)}, "the data must be finite"),
        (None, {"model": Model(3, 2)}, "`model.n_clusters` must be at most the 2 components; got 4"),
        (MLP(6), {"augmentation": Augmentation(shift=1.0)}, "`augmentation` must be of images"),
    ],
)
def test_mistakes_are_named(encoder, options, message):
    with pytest.raises(ValueError, match=message):
        fit(encoder, **options)


@pytest.mark.parametrize(("package", "encoder"), [("sklearn", None), ("grain", MLP(4, (8,)))])
def test_a_missing_package_is_named_before_em(monkeypatch, package, encoder):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    steps = []
    with pytest.raises(ImportError, match=r'fit_clusterer: .*pip install "flax-hmog\[train\]"'):
        fit_clusterer(encoder, np.zeros((20, 5)), 2, jax.random.key(0), on_step=lambda *step: steps.append(step))
    assert not steps
