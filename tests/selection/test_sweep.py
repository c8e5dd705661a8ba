"""`sweep`: what a trial is worth, which are given up, a file that several processes share."""

import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from flax_hmog import AnalyticHMoG, PseudoCounts, fit_em, log_observable_density, sweep
from flax_hmog.cli import main
from flax_hmog.selection.compare import FOLD_SEED
from flax_hmog.selection.measures import folds_of

optuna = pytest.importorskip("optuna")


def clusters(n=90):
    """Three clusters on one factor of four columns."""
    rng = np.random.default_rng(0)
    y = 6.0 * (np.arange(n) % 3) + rng.normal(size=n)
    return (y[:, None] * [1.0, -1.0, 0.5, 2.0] + rng.normal(size=(n, 4))).astype(np.float32)


def swept(path, **changes):
    given = {"n_trials": 4, "n_components": (1, 3), "lat_dim": (1, 1), "n_folds": 2} | changes
    return sweep(clusters(), jax.random.key(0), storage=path / "study.log", **given)


def test_a_trial_is_worth_its_held_out_density(tmp_path):
    study = swept(tmp_path, n_trials=1, n_components=(3, 3), pseudo_samples=(2.0, 2.0))
    x, total = clusters(), 0.0
    for fold in range(2):
        own, key = folds_of(len(x), 2, FOLD_SEED) == fold, jax.random.fold_in(jax.random.key(0), fold)
        head, weights = AnalyticHMoG(1, 3), np.where(own, 0, 1).astype(np.float32)
        found = fit_em(head, x, key, weights=weights, regularizer=PseudoCounts(components=2.0))
        total += float(log_observable_density(found.natural, x[own]).sum())
    assert study.best_value == pytest.approx(total / len(x), abs=1e-4)


def test_a_study_goes_on_and_is_of_its_rows(tmp_path):
    params = [trial.params for trial in swept(tmp_path).trials]
    assert [trial.number for trial in swept(tmp_path).trials] == [0, 1, 2, 3]  # nothing is left to do
    study = swept(tmp_path, n_trials=6, worker=1)
    assert len(study.trials) == 6
    assert [trial.params for trial in study.trials[:4]] == params
    with pytest.raises(ValueError, match="sweep: `storage` must be a new file or hold a study of the same rows"):
        sweep(clusters(80), jax.random.key(0), storage=tmp_path / "study.log")


def test_trials_that_fail_are_kept(tmp_path):
    study = swept(tmp_path, n_components=(80, 80), n_trials=2)  # more than the rows of a training part
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL"]
    assert "`n_components` must be at most the rows" in study.trials[0].user_attrs["failure"]


def test_trials_below_the_median_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("flax_hmog.selection.study.FIRST_TRIALS", 1)
    study = swept(tmp_path, n_trials=10)
    assert {"COMPLETE", "PRUNED"} == {trial.state.name for trial in study.trials}
    for trial in study.trials:
        if trial.state.name == "PRUNED":
            fold, value = max(trial.intermediate_values.items())
            before = [other for other in study.trials[: trial.number] if other.state.name == "COMPLETE"]
            assert value < np.median([other.intermediate_values[fold] for other in before])


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path):
    rows, file = tmp_path / "rows.npy", tmp_path / "study.log"
    np.save(rows, clusters())
    given = ["--storage", str(file), "--n-trials", "6", "--n-components", "1:3", "--lat-dim", "1"]
    command = [sys.executable, "-m", "flax_hmog.cli", "sweep", str(rows), *given]
    running = [subprocess.Popen([*command, "--worker", str(number)]) for number in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    backend = optuna.storages.journal.JournalFileBackend(str(file))
    trials = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend)).trials
    assert len(trials) in (6, 7)  # one may have been under way when the other ended
    assert len({str(trial.params) for trial in trials}) == len(trials)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_trials": 0}, "`n_trials` must be a whole number of at least 1"),
        ({"n_folds": 1}, "`n_folds` must be a whole number of at least 2"),
        ({"lat_dim": (3, 1)}, r"`lat_dim` must be \(least, largest\), above 0; got \(3, 1\)"),
        ({"obs_rep": "round"}, "`head.obs_rep`|obs_rep"),
    ],
)
def test_what_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        swept(tmp_path, **changes)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    np.savetxt(path, clusters(), delimiter=",", header="a,b,c,d", comments="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = ["--n-trials", "3", "--n-components", "1:3", "--lat-dim", "1"]
        assert main(["sweep", str(path), "--storage", str(tmp_path / "study.log"), *given]) == 0
    said = capsys.readouterr().out
    assert "trials: 3 complete" in said
    assert "compare these by hmog select --n-components" in said
