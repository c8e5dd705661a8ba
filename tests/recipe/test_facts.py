"""What a run keeps for its report: which model is described, what heads lost, and pages without the data."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from small_runs import SMALL, run

from flax_hmog.cli import main
from flax_hmog.recipe import facts as module
from flax_hmog.recipe.card import changed_options
from flax_hmog.recipe.config import EM, Data, Gradient, Model
from flax_hmog.recipe.facts import Facts, best_stage, collect
from flax_hmog.recipe.report import losses, restricted_heads, summary
from flax_hmog.training import CheckpointError
from flax_hmog.training.logs import Stage

NAMES = "a", "b", "c", "d", "e"
OPTIONS = {
    "model": Model(lat_dim=2, n_components=4, n_clusters=3),
    "em": EM(max_steps=2),
    "gradient": Gradient(epochs=1, batch_size=16),
    "heads": (),
    "baselines": False,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a table and a run of EM on it."""
    folder = tmp_path_factory.mktemp("facts")
    rng = np.random.default_rng(0)
    rows = (np.arange(120) % 3)[:, None] * np.array([4.0, 3, 2, 1, 0]) + rng.standard_normal((120, 5))
    np.savetxt(folder / "rows.csv", rows, delimiter=",", header=",".join(NAMES), comments="")
    data = Data("file", path=str(folder / "rows.csv"), scale="standard")
    run(folder / "run", data=data, n_seeds=1, command="hmog train file --data.path 'rows.csv'", **OPTIONS)
    return folder


def test_a_report_needs_the_data_no_more(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    before = Facts.load(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["data"]["path"] = str(tmp_path / "moved.csv")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("hmog train file --data.path &#39;rows.csv&#39;", before.data["sha256"], "distinguished by", "a\u00a0=",
                 "3 clusters of 4 components", "--seed 0 --stage em", "96 for training, 24 held out"):  # fmt: skip
        assert text in page, text
    for absent in ("Beside the labels", "Training of heads", "NMI", "Agreement", "Selection"):  # which it does not have
        assert absent not in page, absent
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scores"] == before.scores
    assert result["described"] == {"seed": 0, "stage": "em"}


def test_runs_that_kept_nothing_are_read_from_their_data(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "report.npz").write_bytes(b"no archive")
    assert main(["report", str(tmp_path / "run")]) == 0
    again, before = Facts.load(tmp_path / "run"), Facts.load(made / "run")
    assert again.scores["em"][0] == pytest.approx(before.scores["em"][0])
    np.testing.assert_array_equal(again.portrait.typical, before.portrait.typical)
    (tmp_path / "run" / "report.npz").unlink()
    (tmp_path / "run" / "checkpoints" / "seed0" / "em").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="checkpoints of a run with EM done; got none"):
        collect(tmp_path / "run")


def test_facts_are_noted_anew_where_a_run_goes_on(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    data = Data("file", path=str(made / "rows.csv"), scale="standard")
    run(tmp_path / "run", data=data, n_seeds=2, **OPTIONS)
    kept = Facts.load(tmp_path / "run")
    assert [stage.seed for stage in kept.stages] == [0, 1]
    assert len(kept.agreement["em"]) == 1
    monkeypatch.setattr(module, "collect", None)  # nothing is looked at again
    run(tmp_path / "run", data=data, n_seeds=2, **OPTIONS)


def test_a_run_ends_well_where_its_facts_cannot_be_noted(made, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr(module, "collect", fail)
    run(tmp_path / "run", data=Data("file", path=str(made / "rows.csv"), scale="standard"), n_seeds=1, **OPTIONS)
    assert "the report will have to read the data, as OSError: no room" in caplog.text
    assert not (tmp_path / "run" / "report.npz").exists()


def test_options_that_were_changed_are_listed():
    options = json.loads(json.dumps(SMALL.options()))
    assert {"model.n_components", "model.obs_rep", "data.scale", "n_seeds"} <= set(changed_options(options))
    assert not {"workdir", "model.n_clusters", "gradient.learning_rate", "checkpoints.em_steps"} & set(
        changed_options(options)
    )


# ------------------------------------------------------------------------------------------ the model that is described

EM0, EM1 = Stage(0, "em"), Stage(1, "em")
HEAD0, HEAD1 = Stage(0, "differentiable"), Stage(1, "differentiable")
SIZES = {0: (80, 20), 1: (80, 20)}


def densities(*pairs):
    return [{"train_log_density": train, "test_log_density": test} for train, test in pairs]


@pytest.mark.parametrize(
    ("em", "head", "best"),
    [
        (densities((-1.0, -2.0), (-1.0, -1.9)), densities((-2.0, -3.0), (-2.0, -2.5)), EM1),
        (densities((-1.0, -2.0), (-1.0, -1.9)), densities((-0.5, -1.5), (-0.9, -1.2)), HEAD0),  # of all rows
        (densities((-1.0, -2.0), (-1.0, -1.0)), densities((-1.0, -1.9), (-1.0, -1.2)), EM1),  # in the mean
    ],
)
def test_the_model_of_highest_held_out_density_is_described(em, head, best):
    done = {stage: {} for stage in (EM0, HEAD0, EM1, HEAD1)}
    scores = {"PCA + GMM": densities((9.0, 9.0), (9.0, 9.0)), "em": em, "differentiable": head}
    assert best_stage(done, scores, ["differentiable"], has_encoder=False, sizes=SIZES) == best


def test_without_held_out_rows_the_rows_of_the_fit_decide():
    done = {stage: {} for stage in (EM0, HEAD0)}
    scores = {"em": [{"train_log_density": -2.0}], "differentiable": [{"train_log_density": -1.0}]}
    assert best_stage(done, scores, ["differentiable"], has_encoder=False, sizes={0: (80, 0)}) == HEAD0


def test_a_head_that_some_seeds_lack_is_compared_where_it_is():
    done = {stage: {} for stage in (EM0, HEAD0, EM1)}
    scores = {"em": densities((0.0, -2.0), (0.0, 5.0)), "differentiable": densities((0.0, -1.0))}
    assert best_stage(done, scores, ["differentiable"], has_encoder=False, sizes=SIZES) == HEAD0


def test_on_an_encoder_the_objective_of_the_last_round_decides():
    last = [Stage(seed, "differentiable", 2) for seed in (0, 1)]
    first = [Stage(seed, "differentiable", 1) for seed in (0, 1)]
    about = {
        stage: {"history": [{"objective": value}]} for stage, value in zip([*first, *last], (9, 9, 1, 2), strict=True)
    }
    done = {EM0: {"history": []}} | about
    assert best_stage(done, {}, ["differentiable"], has_encoder=True, sizes=SIZES) == last[1]
    assert best_stage({EM0: {"history": []}}, {}, [], has_encoder=True, sizes=SIZES) == EM0


def test_losses_of_restricted_heads_are_said_with_numbers(made):
    scores = {
        "em": [score | {"nmi": 0.9} for score in densities((0, 100.0), (0, 104.0))],
        "differentiable": [score | {"nmi": 0.8} for score in densities((0, 80.0), (0, 82.0))],
    }
    stages = dict.fromkeys((EM0, HEAD0, EM1, HEAD1), 1)
    facts = dataclasses.replace(Facts.load(made / "run"), scores=scores, stages=stages)
    done = {stage: {"history": [{"test_log_density": 60.0 + 4 * stage.seed}]} for stage in stages}
    config = {"heads": {"differentiable": {"pst_rep": "diagonal"}, "symmetric": {"lat_rep": "full"}}}
    assert restricted_heads(config) == {"differentiable": "diagonal"}
    assert restricted_heads({"heads": ["differentiable"], "model": {"pst_rep": "diagonal"}}) == {
        "differentiable": "diagonal"
    }
    assert list(losses(facts, done, restricted_heads(config))) == [
        "DifferentiableHMoG holds diagonal matrices where exact EM holds full ones. Against EM that costs 40 nats per "
        "held-out row at its start, and 21 after training; its NMI is 0.1 lower (mean over 2 seeds)."
    ]
    better = dataclasses.replace(facts, scores=scores | {"differentiable": scores["em"]})
    assert list(losses(better, done, restricted_heads(config))) == []


def test_a_single_model_needs_no_reason(made):
    facts, folder = Facts.load(made / "run"), made / "run"
    from flax_hmog.recipe.saved import run_config
    from flax_hmog.training import restore

    restored = restore(folder / facts.described.folder)
    said = summary(run_config(folder), facts, restored, {stage: {} for stage in facts.stages})
    assert said == "120 rows of 5 columns: 3 clusters of 4 components, with 2 factors."
