"""The main job, small: train, resume, plan, and a report from the checkpoints alone."""

import dataclasses
import importlib.machinery
import json
import math
import runpy
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import adjusted_rand_score
from small_runs import DIFFERENTIABLE, SMALL, read_metrics, run, without_times

from experiments.configs import EXPERIMENTS
from experiments.train import main
from flax_hmog.analysis.baselines import fit_baselines
from flax_hmog.em.options import NAMES, USED
from flax_hmog.recipe import em, models, train
from flax_hmog.recipe import report as analyze
from flax_hmog.recipe.config import EM, Augmentation, Checkpoints, Data, Experiment, Gradient, Model, flat_options
from flax_hmog.recipe.gradient import GradientStage
from flax_hmog.recipe.inputs import prepare_inputs
from flax_hmog.recipe.load import load
from flax_hmog.recipe.presets import PRESETS
from flax_hmog.recipe.watching import StageWatch
from flax_hmog.training import logs, make_mesh, processes, restore
from flax_hmog.training.lock import FolderLock


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "digits"
    run(path)
    return path


def test_metrics_cover_every_step_of_em_and_every_epoch_of_both_heads(folder):
    for head in ("differentiable", "symmetric"):
        records = read_metrics(folder, seed=1, stage=head)
        assert [record["epoch"] for record in records] == [0, 1, 2, 3, 4]
        assert [record["step"] for record in records] == [0, 5, 10, 15, 20]
        assert all(np.isfinite([record["test_log_density"], record["nmi"]]).all() for record in records)
    of_em = read_metrics(folder, seed=1, stage="em")
    assert [record["step"] for record in of_em] == list(range(1, 12))  # five models of two starts, and the result
    assert "test_log_density" in of_em[-1]


def test_a_finished_run_does_nothing_more(folder):
    before = read_metrics(folder)
    run(folder)
    assert read_metrics(folder) == before


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(3, id="EM"),
        pytest.param(5, id="end of a start", marks=pytest.mark.slow),
        pytest.param(14, id="first epoch", marks=pytest.mark.slow),
        pytest.param(26, id="between epochs", marks=pytest.mark.slow),
        pytest.param(-13, id="killed in the first epoch"),
        pytest.param(-25, id="killed after an epoch", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(steps, folder, tmp_path):
    """Bit for bit: every array, position, record and line. Ten steps of EM, then twenty of each head.

    Killed runs, after minus so many steps, save nothing on their way out.
    """
    with pytest.raises(processes.Stopped if steps > 0 else InterruptedError):
        run(tmp_path, n_seeds=1, heads=DIFFERENTIABLE, stop_at=abs(steps), killed=steps < 0)
    run(tmp_path, n_seeds=1, heads=DIFFERENTIABLE)
    for name in ("em", "differentiable"):
        assert without_times(read_metrics(tmp_path, stage=name)) == without_times(
            read_metrics(folder, seed=0, stage=name)
        )
        got, want = (restore(path / "checkpoints" / "seed0" / name) for path in (tmp_path, folder))
        assert (got.step, got.history, got.metrics) == (want.step, want.history, want.metrics)
        assert {k: v for k, v in got.progress.items() if k != "baselines"} == {
            k: v for k, v in want.progress.items() if k != "baselines"
        }
        assert got.state.keys() == want.state.keys()
        for leaf in want.state:
            np.testing.assert_array_equal(got.state[leaf], want.state[leaf], err_msg=leaf)
        jax.tree.map(np.testing.assert_array_equal, got.module_variables, want.module_variables)


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory):
    """The config of an accelerated fit, and what it ends in."""
    model = dataclasses.replace(SMALL.model, n_components=40, n_clusters=10)
    em = EM(n_restarts=2, max_steps=2, accelerate=True)
    config = dataclasses.replace(SMALL, model=model, em=em, n_seeds=1, heads=())
    whole = tmp_path_factory.mktemp("accelerated")
    run(whole, config)
    return config, restore(whole / "checkpoints" / "seed0" / "em")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_interrupted_accelerated_fit_ends_as_the_uninterrupted_one(steps, accelerated, tmp_path):
    """After the first step of a pair, with an extrapolated model, and in the second start."""
    config, want = accelerated
    with pytest.raises(processes.Stopped):
        run(tmp_path, config, stop_at=steps)
    run(tmp_path, config)
    got = restore(tmp_path / "checkpoints" / "seed0" / "em")
    assert got.progress["objective"] == want.progress["objective"]
    for leaf in want.state:
        np.testing.assert_array_equal(got.state[leaf], want.state[leaf], err_msg=leaf)


def test_a_fit_that_an_older_version_began_goes_on(folder, tmp_path, monkeypatch):
    """Its regulariser had neither a share of the means nor a floor of components; None stands for what it did."""
    arrays_of = em._arrays_of

    def older(state):
        absent = dict.fromkeys(("mean_share", "component_floor"))
        return {
            name: dataclasses.replace(tree, **absent) if "regularizer" in name else tree
            for name, tree in arrays_of(state).items()
        }

    with monkeypatch.context() as before:
        before.setattr(em, "_arrays_of", older)
        with pytest.raises(processes.Stopped):  # within the second start, beside the best fit so far
            run(tmp_path, n_seeds=1, heads=(), stop_at=7)
    run(tmp_path, n_seeds=1, heads=())
    got, want = (restore(path / "checkpoints" / "seed0" / "em") for path in (tmp_path, folder))
    assert "regularizer/mean_share" in want.state
    assert "regularizer/mean_share" not in got.state
    np.testing.assert_allclose(got.progress["objective"], want.progress["objective"], rtol=1e-5)
    run(tmp_path, n_seeds=1, heads=DIFFERENTIABLE)


def test_another_config_is_refused(folder):
    with pytest.raises(ValueError, match=r"another em\.max_steps\. Choose another"):
        run(folder, em=EM(n_restarts=2, max_steps=6))
    run(folder, checkpoints=Checkpoints(em_steps=9))  # what changes no result may change


def test_a_run_that_could_not_start_is_no_run(tmp_path, monkeypatch):
    """A mistake that shows once EM begins: the corrected command runs, and nothing of the first is left."""

    def fail(stage):
        stage.run.log.write(stage.stage, 1, objective=float("nan"))
        raise ValueError("found out late")

    monkeypatch.setattr(train.EMStage, "result", fail)
    with pytest.raises(ValueError, match="found out late"):
        run(tmp_path, first_seed=7)
    assert [record["seed"] for record in read_metrics(tmp_path)] == [7]
    with pytest.raises(ValueError, match="found out late"):
        run(tmp_path, em=EM(n_restarts=2, max_steps=6))
    assert [record["seed"] for record in read_metrics(tmp_path)] == [0]
    (tmp_path / "checkpoints" / "seed0" / "em" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another em\.max_steps\. Choose another"):
        run(tmp_path)


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    with (
        FolderLock(tmp_path, argument="run: `workdir`"),
        pytest.raises(
            ValueError, match=f"run: `workdir` must have one writer; got {tmp_path}, which another writer of"
        ),
    ):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`workdir` must be a folder that can be written to; got .*file/run, NotADir"):
        run(tmp_path / "file" / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"`workdir` must be a folder that can be written to; got .*run, IsADir|metrics"
    ):
        run(tmp_path / "run")


def test_a_run_of_before_an_option_had_what_is_its_default(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["result_options"]["augmentation"]["mirror"]
    # and options have the names that they had then
    counts = config["result_options"]["em"].pop("regularizer")
    names = {
        "weights": "weight_pseudo_count",
        "components": "component_pseudo_count",
        "noise_share": "noise_pseudo_share",
    }
    config["result_options"]["em"] |= {names.get(name, name): counts[name] for name in (*names, "noise_floor")}
    path.write_text(json.dumps(config))
    run(tmp_path / "run")
    config["result_options"]["em"]["component_pseudo_count"] = 7.0
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another em\.regularizer\.components, augmentation\.mirror"):
        run(tmp_path / "run", augmentation=Augmentation(mirror=True))


def test_a_diverging_run_says_what_happened_and_where_to_go_on(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, n_seeds=1, heads=DIFFERENTIABLE, baselines=False)
    broken = lambda self, variables, x, extra: (jax.numpy.nan * variables["params"]["bias"].sum(), {})  # noqa: E731
    monkeypatch.setattr(models.Trainable, "head_loss", broken)
    with pytest.raises(
        ValueError, match=r"got nan, and leaves that are not finite: params/bias.*checkpoint is .*differentiable/0\."
    ):
        run(tmp_path, config)
    assert restore(tmp_path / "checkpoints/seed0/differentiable").step == 0  # the start
    monkeypatch.undo()
    ruined = dataclasses.replace(config, gradient=Gradient(epochs=2, batch_size=256, learning_rate=10.0))
    with pytest.raises(ValueError, match=r"nats per sample, which was .* at best.*, after 5 steps.*Lower --gradient"):
        run(tmp_path / "ruined", ruined)


@pytest.mark.slow
def test_the_best_epoch_is_saved_before_a_run_fails(tmp_path, monkeypatch):
    """Although no checkpoint was due; it is one to go on from, bit for bit."""
    config = dataclasses.replace(SMALL, n_seeds=1, heads=DIFFERENTIABLE, baselines=False)
    check = GradientStage._check

    def stops_late(self, at, *others, worst):
        check(self, at, *others, worst=-math.inf if at.done == 15 else worst)

    def rising(self, step, variables):
        return self.watch.look(step, self._on_host(self.output(variables, self.x), self.clusters), float(step))

    late = dataclasses.replace(config, checkpoints=Checkpoints(gradient_steps=100))
    monkeypatch.setattr(StageWatch, "look", rising)
    monkeypatch.setattr(GradientStage, "_check", stops_late)
    with pytest.raises(ValueError, match=r"after 15 steps.*The last good checkpoint is .*/differentiable/10\."):
        run(tmp_path / "late", late)
    monkeypatch.setattr(GradientStage, "_check", check)
    run(tmp_path / "late", late)
    run(tmp_path / "whole", late)
    got, want = (restore(tmp_path / name / "checkpoints/seed0/differentiable") for name in ("late", "whole"))
    assert got.progress == want.progress
    jax.tree.map(np.testing.assert_array_equal, got.module_variables, want.module_variables)


@pytest.mark.slow
def test_a_stop_after_the_last_step_of_a_head_stops_the_run(tmp_path):
    """Ten models of EM, then twenty steps of the first head: the second one is not begun."""
    with pytest.raises(processes.Stopped):
        run(tmp_path, n_seeds=1, stop_at=30)
    assert {path.name for path in (tmp_path / "checkpoints" / "seed0").iterdir()} == {"em", "differentiable"}
    assert restore(tmp_path / "checkpoints" / "seed0" / "differentiable").step == 20


def test_other_data_are_refused(tmp_path):
    rows = np.random.default_rng(0).standard_normal((300, 5)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    config = Experiment("", Data("file", path=str(tmp_path / "rows.npy")), Model(2, 3), em=EM(max_steps=2))
    config = dataclasses.replace(config, gradient=Gradient(epochs=1, batch_size=64))
    with pytest.raises(processes.Stopped):
        run(tmp_path / "run", config, stop_at=1)
    np.save(tmp_path / "rows.npy", rows + 1)
    with pytest.raises(ValueError, match="another contents of the data"):
        run(tmp_path / "run", config)


@pytest.mark.slow
def test_the_plan_names_what_a_step_takes():
    command = [sys.executable, "-m", "experiments.train", "mnist", "--dry-run", "--em.rows", "1024"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    D, L, K = 784, 50, 200
    for part in (
        "60000 training and 10000 test rows",
        f"{2 * D + D * L + K + 2 * K * L:,} parameters",  # bias and noise, loadings, weights, means and precisions
        "(784, 50)",
        "replicated",
        "data 1 x model 1",
    ):
        assert part in text
    assert "GFLOP on a device" in " ".join(text.split())


def test_events_for_tensorboard_are_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="the package tensorboardX is not installed: pip install flax-hmog[logs]")
    config = dataclasses.replace(SMALL, n_seeds=1, heads=DIFFERENTIABLE)
    with pytest.raises(processes.Stopped):
        run(tmp_path, config, logs=dataclasses.replace(config.logs, tensorboard=True), stop_at=3)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_metrics_go_to_weights_and_biases(tmp_path, monkeypatch):
    """A stand-in for the package, which needs an account: one run for a folder, resumed with it."""
    calls = []

    class Run:
        def log(self, metrics):
            calls.append(metrics)

        def finish(self):
            calls.append("finished")

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **options: calls.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    with logs.Log(tmp_path, Console(quiet=True), wandb="p") as log:
        log.write(logs.Stage(0, "em"), 3, objective=-1.5, note="text")
    assert calls[0]["project"] == "p"
    assert calls[0]["resume"] == "allow"
    assert calls[1:] == [{"seed0/em/objective": -1.5, "step": 3}, "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="`logs` must have the package wandb; it is not installed"):
        logs.Log(tmp_path, Console(quiet=True), wandb="p")


def test_a_report_is_made_of_the_checkpoints_alone(folder, monkeypatch):
    (folder / "metrics.jsonl").rename(folder / "hidden")
    monkeypatch.setattr(sys, "argv", ["analyze", str(folder)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("experiments.analyze", run_name="__main__")
    (folder / "hidden").rename(folder / "metrics.jsonl")
    assert stop.value.code == 0
    page = (folder / "report.html").read_text()
    parts = "PCA + GMM", "DifferentiableHMoG", "Prototypes", "Hierarchy of the clusters", "data:image/png"
    for part in parts:
        assert part in page
    result = json.loads((folder / "result.json").read_text())
    scores = result["scores"]
    assert {name: len(pairs) for name, pairs in result["agreement"].items()} == dict.fromkeys(
        ("em", "differentiable", "symmetric"), 1
    )
    rows = load(SMALL.data, 0).train.read(slice(None))
    models = [restore(folder / f"checkpoints/seed{seed}/symmetric") for seed in (0, 1)]
    clusters = [np.argmax(model(rows).log_responsibilities, axis=1) for model in models]
    assert result["agreement"]["symmetric"] == [pytest.approx(adjusted_rand_score(*clusters))]
    for seed, score in enumerate(scores["symmetric"]):
        trained = max(read_metrics(folder, seed=seed, stage="symmetric"), key=lambda record: record["criterion"])
        assert score["test_log_density"] == pytest.approx(trained["test_log_density"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "the first argument must be an experiment"),
        (["digits", "--model.lat-dim", "0"], "`lat_dim` must be a whole number of at least 1; got 0"),
        (["digits", "--model.obs-rep", "round"], "round"),
        (["digits", "--gradient.epoch", "3"], "--gradient.epoch"),
        (["digits", "--gradient.epochs", "0"], "Gradient: `epochs` must be at least 1; got 0"),
        (["digits", "--processes.count", "2"], "`processes.coordinator` must be given"),
        (["digits", "--processes.coordinator", "here:1"], "`processes.count` and `processes.index` must be given"),
        (["digits", "--encoder.name", "cnn"], "Template: the name must be one of mlp, conv"),
        (["synthetic", "--encoder.name", "conv"], "`encoder.name` conv must have images"),
        (["digits", "--encoder.name", "nowhere:Net"], "got 'nowhere:Net' (ModuleNotFoundError"),
        (["digits", "--heads", "analytic"], "`heads` must hold analytic only with an encoder"),
        (["digits", "--model.n-clusters", "41"], "`model.n_clusters` must be at most the 40 components; got 41"),
        (
            ["digits_encoder", "--rounds.count", "2", "--rounds.early-clusters", "9"],
            "`rounds.early_clusters` must be at least the 10 clusters",
        ),
        (["usps_encoder", "--rounds.count", "1"], "`early_clusters` must be None for one round"),
        (
            ["digits_encoder", "--rounds.count", "2", "--rounds.n-components", "9"],
            "`rounds.n_components` must be at least the 10 clusters",
        ),
        (["digits", "--rounds.count", "3"], "`rounds` must be left out without an encoder; got count"),
        (["digits_encoder", "--rounds.reconstruction-weight", "1"], "must have a method `decode`"),
        (["digits_encoder", "--rounds.marginal-weight", "0.5"], "`marginal_weight` must be above 1/2"),
        (
            ["digits", "--encoder.name", "mlp", "--encoder.features", "8"],
            "`heads.differentiable.lat_dim` must be at most the 8 features",
        ),
        (["digits", "--encoder.name", "mlp", "--gradient.epochs", "3"], "`gradient.epochs` must be above"),
        (["digits", "--model.n-clusters", "0"], "Model: `n_clusters` must be at least 1; got 0"),
        (["digits", "--first-seed", "-1"], "Experiment: `first_seed` must be at least 0; got -1"),
        (["file"], "`data.path` must name a file"),
        (["synthetic", "--augmentation.shift", "2"], "`augmentation` must be of images"),
        (["digits", "--heads", "differentiable", "differentiable"], "`heads` must have different names, none em"),
        (["digits", "--optimizer.name", "adamm"], "the name must be one of"),
        (["digits", "--encoder.name", "flax_hmog.recipe:Gradient"], "`encoder.name` must name a linen class"),
        (
            ["digits", "--heads", "flax.linen:BatchNorm"],
            "`heads` must name classes that offer what flax_hmog.Head lists",
        ),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--workdir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code not in (None, 0)
    shown = capsys.readouterr()
    text = f"{shown.out} {shown.err} {stop.value.code}"
    assert message in " ".join(text.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_every_option_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "digits", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    unused = [f"{group}.{name}" for group in ("em", "rounds.em") for name in NAMES if name not in USED["fit_em"]]
    for name in flat_options({"heads": ()} | SMALL.options()).keys() - {
        "heads.differentiable.name",
        "heads.symmetric.name",
        *unused,
    }:
        assert f"--{name.replace('_', '-')}" in text, name
    assert "Folder of the run" in text


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - PRESETS.keys()))
def test_every_experiment_says_its_question_and_command(name):
    module = sys.modules[f"experiments.configs.{name}"]
    assert f"python -m experiments.train {name}" in module.__doc__
    assert "Data: " in module.__doc__


@pytest.mark.slow
def test_what_is_not_finished_is_left_out_of_the_report(tmp_path, capsys):
    with pytest.raises(processes.Stopped):
        run(tmp_path, n_seeds=1, stop_at=14)
    analyze.report_run(tmp_path)
    assert "left out: seed 0, differentiable" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["scores"].keys() >= {"em", "PCA + GMM"}


def test_the_density_of_a_baseline_is_that_of_its_model():
    """PCA + GMM with one component is a Gaussian: scores with their covariance, isotropic noise on top in all of space."""
    dataset = load(SMALL.data, 0)
    rows = prepare_inputs(SMALL.data, dataset, make_mesh()).read(dataset.train, slice(None))
    x = rows[:, 16:24] + 0.05 * np.random.default_rng(0).standard_normal((1437, 8))
    baseline = fit_baselines(x, x[:50], lat_dim=6, n_components=1, seed=0)["PCA + GMM"]
    values, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    noise = values[:2].mean() * len(x) / (len(x) - 1)
    values = np.where(np.arange(8) < 2, 0, values) + noise
    scores = (x - x.mean(0)) @ axes
    want = -0.5 * np.mean(np.sum(scores**2 / values + np.log(2 * np.pi * values), axis=1))
    assert baseline.train_log_density == pytest.approx(want, abs=1e-3)
