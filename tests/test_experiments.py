"""The main job, small: train, resume, and a report from the checkpoints alone in a new process."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from experiments import train
from experiments.baselines import fit_baselines
from experiments.configs.digits import Digits
from experiments.data import digits

SMALL = Digits(n_seeds=2, lat_dim=3, n_components=4, n_restarts=1, em_steps=5, epochs=4, save_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "digits"
    train.run(dataclasses.replace(SMALL, workdir=str(path)), Console(quiet=True))
    return path


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_cover_every_epoch_of_both_heads(folder):
    metrics = read_metrics(folder)
    epochs = [m["epoch"] for m in metrics if m["model"] == "differentiable" and m["seed"] == 1]
    assert epochs == [0, 1, 2, 3, 4]
    assert {m["model"] for m in metrics} == {"em", "differentiable", "symmetric"}
    assert all(np.isfinite([m["test_log_density"], m["nmi"]]).all() for m in metrics)


def test_a_finished_run_does_nothing_more(folder):
    before = read_metrics(folder)
    train.run(dataclasses.replace(SMALL, workdir=str(folder)), Console(quiet=True))
    assert read_metrics(folder) == before


def test_an_interrupted_run_ends_as_the_uninterrupted_one(folder, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, workdir=str(tmp_path), n_seeds=1)
    calls, batches = [], train.Finetuning.batches

    def interrupted(self, seed, epoch, split):
        calls.append(epoch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batches(self, seed, epoch, split)

    monkeypatch.setattr(train.Finetuning, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, Console(quiet=True))
    monkeypatch.undo()
    train.run(config, Console(quiet=True))

    def final(path):
        return next(m for m in read_metrics(path) if m["model"] == "differentiable" and m.get("epoch") == 4)

    assert final(tmp_path) == final(folder)


def test_another_config_is_refused(folder):
    with pytest.raises(ValueError, match="another em_steps"):
        train.run(dataclasses.replace(SMALL, workdir=str(folder), em_steps=6), Console(quiet=True))


def test_a_new_process_reports_from_the_checkpoints_alone(folder):
    (folder / "metrics.jsonl").rename(folder / "hidden")
    command = [sys.executable, "-m", "experiments.analyze", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    (folder / "hidden").rename(folder / "metrics.jsonl")
    assert run.returncode == 0, run.stderr
    page = (folder / "report.html").read_text()
    for part in (
        "PCA + GMM",
        "DifferentiableHMoG",
        "Cluster prototypes",
        "Hierarchy of the clusters",
        "data:image/png",
    ):
        assert part in page
    scores = json.loads((folder / "result.json").read_text())["scores"]
    trained = [m for m in read_metrics(folder) if m["model"] == "symmetric" and m["epoch"] == 4]
    for seed, score in enumerate(scores["symmetric"]):
        assert score["test_log_density"] == pytest.approx(trained[seed]["test_log_density"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "the first argument must be an experiment"),
        (["digits", "--lat-dim", "0"], "`lat_dim` must be at least 1; got 0"),
        (["digits", "--obs-rep", "round"], "round"),
        (["digits", "--epoch", "3"], "--epoch"),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path):
    command = [sys.executable, "-m", "experiments.train", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode != 0
    assert message in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


def test_every_option_is_explained():
    command = [sys.executable, "-m", "experiments.train", "digits", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    for field in dataclasses.fields(Digits):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Folder of the run" in text


def test_a_folder_without_a_run_is_named(tmp_path):
    command = [sys.executable, "-m", "experiments.analyze", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 1
    assert "must hold checkpoints of a run" in run.stderr


def test_the_density_of_a_baseline_is_that_of_its_model():
    """PCA + GMM with one component is a Gaussian: scores with their covariance, isotropic noise on top in all of space."""
    x = digits(0, 0.2).train[:, 16:24] + 0.05 * np.random.default_rng(0).standard_normal((1437, 8))
    baseline = fit_baselines(x, x[:50], lat_dim=6, n_components=1, seed=0)["PCA + GMM"]
    values, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    noise = values[:2].mean() * len(x) / (len(x) - 1)
    values = np.where(np.arange(8) < 2, 0, values) + noise
    scores = (x - x.mean(0)) @ axes
    want = -0.5 * np.mean(np.sum(scores**2 / values + np.log(2 * np.pi * values), axis=1))
    assert baseline.train_log_density == pytest.approx(want, abs=1e-3)
