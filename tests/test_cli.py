"""The command `hmog`, in process: train small, report, predict, export, describe, and what it says of mistakes."""

import csv
import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from flax_hmog.cli import main
from flax_hmog.recipe.saved import restore_run
from flax_hmog.training import load_program

SMALL = [
    "--model.lat-dim",
    "3",
    "--model.n-components",
    "6",
    "--model.n-clusters",
    "4",
    "--em.max-steps",
    "3",
    "--gradient.epochs",
    "1",
    "--gradient.batch-size",
    "128",
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with rows as .csv and .npy, and a run on the first."""
    folder = tmp_path_factory.mktemp("hmog")
    x, y = load_digits(return_X_y=True)
    header = ",".join([*(f"pixel{n}" for n in range(64)), "digit"])
    np.savetxt(folder / "rows.csv", np.column_stack([x, y])[:400], "%g", ",", header=header, comments="")
    np.save(folder / "rows.npy", x[400:420])
    options = ["--data.path", str(folder / "rows.csv"), "--data.labels", "digit", "--workdir", str(folder / "run")]
    assert main(["train", "file", *options, *SMALL]) == 0
    return folder


def predicted(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_gets_a_line(work, capsys):
    assert main(["predict", str(work / "run"), str(work / "rows.npy"), "--out", str(work / "out.csv")]) == 0
    rows = predicted(work / "out.csv")
    output = restore_run(work / "run")(np.load(work / "rows.npy"))
    assert [int(row["row"]) for row in rows] == list(range(20))
    assert [int(row["cluster"]) for row in rows] == np.argmax(output.log_responsibilities, axis=1).tolist()
    assert {int(row["component"]) for row in rows} <= set(range(6))
    np.testing.assert_allclose([float(row["log_density"]) for row in rows], output.log_density, rtol=1e-4)
    capsys.readouterr()
    command = ["predict", str(work / "run"), str(work / "rows.csv"), "--labels", "digit", "--probabilities"]
    assert main([*command, "--stage", "em"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "row,cluster,probability,log_density,component,p0,p1,p2,p3"
    assert len(lines) == 400
    np.testing.assert_allclose([sum(map(float, line.split(",")[5:])) for line in lines], 1, atol=1e-5)


def test_a_run_is_reported_described_and_exported(work, capsys):
    assert main(["report", str(work / "run")]) == 0
    assert "NMI" in capsys.readouterr().out
    assert json.loads((work / "run" / "result.json").read_text())["scores"].keys() == {"em", "differentiable"}
    assert main(["describe", str(work / "run")]) == 0
    said = capsys.readouterr().out
    for part in ("seed 0, em: finished", "DifferentiableHMoG(lat_dim=3, n_components=6", "merged to 4 clusters"):
        assert part in said
    assert main(["export", str(work / "run"), str(work / "program")]) == 0
    x = np.load(work / "rows.npy").astype(np.float32)
    got = load_program(work / "program").call(x)["log_density"]
    np.testing.assert_allclose(got, restore_run(work / "run")(x).log_density, rtol=1e-5)


def test_help_names_every_command(capsys):
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        said = capsys.readouterr().out
        assert all(f"hmog {name}" in said for name in ("train", "report", "predict", "export", "describe"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "`folder` must hold checkpoints of a run"),
        (["describe", "nowhere"], "`folder` must hold checkpoints of a run"),
        (["predict", "RUN", "nowhere.csv"], "`rows` must be a file; got nowhere.csv"),
        (["predict", "RUN", "ROWS", "--stage", "symmetric"], "with seed 0 em, seed 0 differentiable. Choose one"),
        (["predict", "RUN", "ROWS", "--labels", "name"], "`data.labels` must be a column"),
        (["predict", "RUN", "ROWS"], "must have"),  # the labels are a column too many
        (["predict", "RUN", "ROWS", "--labels", "digit", "--out", "RUN"], "`--out` must be a file"),
        (["train", "file"], "`data.path` must name a file"),
    ],
)
def test_mistakes_are_one_line(work, arguments, message, capsys):
    places = {"RUN": str(work / "run"), "ROWS": str(work / "rows.csv")}
    assert main([places.get(argument, argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_what_cannot_be_read_ends_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "mnist"])
    assert stop.value.code == 2


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tyro", None)
    assert main(["train", "digits"]) == 1
    assert 'Install it: pip install "flax-hmog[train]".' in capsys.readouterr().err
