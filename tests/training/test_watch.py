"""Clusters in use, agreement with the start and the best step, while a model is trained; and what a run makes of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score
from small_runs import SMALL, read_metrics, run

from flax_hmog import HMoGOutput
from flax_hmog.recipe import Template, restore_run
from flax_hmog.recipe.models import Trainable
from flax_hmog.training import BelowStartWarning, Watch
from flax_hmog.training.watch import normalized_information


def output(clusters, density=0.0, n_clusters=4):
    rows = jnp.log(jax.nn.one_hot(jnp.asarray(clusters), n_clusters) * 0.97 + 0.01)
    return HMoGOutput(jnp.full(len(clusters), density), jax.nn.log_softmax(rows), rows)


START = np.arange(80) % 4


def test_agreement_is_normalised_information():
    rng = np.random.default_rng(0)
    pairs = [rng.integers(0, 5, (2, 200)), (START, START), (START, np.zeros(80, int)), np.zeros((2, 9), int)]
    for first, second in pairs:
        want = normalized_mutual_info_score(first, second)
        assert normalized_information(first, second) == pytest.approx(want, abs=1e-12)


def test_a_collapse_is_warned_of_once_and_never_the_best():
    watch = Watch(START, name="seed 0:")
    first = watch.look(0, output(START), criterion=1.0)
    assert (first.is_best, first.has_fallen, first.agreement) == (True, False, 1.0)
    assert first.clusters_in_use == pytest.approx(4, rel=1e-3)
    assert watch.look(1, output((START + 1) % 4), criterion=1.2).is_best
    with pytest.warns(
        BelowStartWarning, match=r"seed 0: has lost clusters at step 2, with 1\.. clusters in use and agre"
    ):
        look = watch.look(2, output(np.zeros(80, int)), criterion=9.0)
    assert look.has_fallen
    assert not look.is_best
    resumed = Watch(START, seen=json.loads(json.dumps(watch.seen)))
    assert not resumed.look(3, output(np.zeros(80, int)), criterion=9.0).is_best  # and no second warning
    assert not resumed.look(4, output(START), criterion=float("nan")).is_best
    assert resumed.seen["best"]["step"] == 1
    assert not resumed.is_below_start()
    with pytest.raises(ValueError, match="must be of the 80 rows of the start; got 79"):
        resumed.look(5, output(START[1:]), criterion=0.0)


def test_a_head_below_its_start_says_so():
    watch = Watch(output(START, density=3.0))
    watch.look(0, output(START, density=2.0))
    assert watch.look(1, output(START, density=2.5)).is_best
    with pytest.warns(BelowStartWarning, match=r"its best step, 1, has 4\.. clusters .* 0\.5 nats per row less"):
        assert watch.is_below_start()


def test_a_run_keeps_its_best_epoch_and_reports_em_where_that_is_better(tmp_path, monkeypatch):
    """A restricted head, trained for a lower density: its start is the best epoch, and EM is better than that."""
    loss = Trainable.head_loss
    worse = lambda self, *of: jax.tree.map(lambda value: -0.01 * value, loss(self, *of))  # noqa: E731
    monkeypatch.setattr(Trainable, "head_loss", worse)
    heads = (Template("symmetric", lat_rep="scale"),)
    config = dataclasses.replace(SMALL, n_seeds=1, heads=heads, baselines=False)
    with pytest.warns(BelowStartWarning, match="seed 0, symmetric: ends below its start: its best step, 0, has"):
        run(tmp_path, config)
    records = read_metrics(tmp_path, stage="symmetric")
    assert records[0]["criterion"] > records[-1]["criterion"]
    head, reported = restore_run(tmp_path, stage="symmetric"), restore_run(tmp_path)
    assert head.progress["kept"]["epoch"] == 0
    assert head.step == 20
    assert head.progress["below_start"]
    assert head.metrics["criterion"] == pytest.approx(records[0]["test_log_density"], rel=1e-6)
    assert type(reported.head).__name__ == "AnalyticHMoG"
