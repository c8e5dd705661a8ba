"""The command `hmog`, in process: train small, report, predict, export, describe, and what it says of mistakes."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from flax_hmog.cli import main
from flax_hmog.data.files import read_file
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
    named = pd.read_csv(folder / "rows.csv").head(20)
    named.iloc[:, :3].to_csv(folder / "narrow.csv", index=False)
    named.mask((named.index == 2)[:, None] & (named.columns == "pixel1")).to_csv(folder / "holes.csv", index=False)
    np.save(folder / "wide.npy", named.to_numpy())
    (folder / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (folder / "same.csv").write_text("a,b\n" + 20 * "1,2\n")
    (folder / "names.csv").write_text("a,b\n")
    (folder / "empty.csv").touch()
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
    named = pd.read_csv(work / "rows.csv").head(3).assign(shop=["Oslo", "Rome", "Bonn"])
    named.to_csv(work / "named.csv", index=False)
    assert main(["predict", str(work / "run"), str(work / "named.csv"), "--stage", "em", "--probabilities"]) == 0
    of_names, *named_lines = capsys.readouterr().out.splitlines()
    assert of_names == "shop" + header[3:]
    clusters = [line.split(",")[1] for line in lines[:3]]
    assert [line.split(",")[:2] for line in named_lines] == [
        list(pair) for pair in zip(named["shop"], clusters, strict=True)
    ]
    named.rename(columns={"shop": "cluster"}).to_csv(work / "named.csv", index=False)  # the name of an answer
    assert main(["predict", str(work / "run"), str(work / "named.csv"), "--stage", "em", "--probabilities"]) == 0
    assert capsys.readouterr().out.splitlines() == [header, *named_lines]
    np.testing.assert_allclose([sum(map(float, line.split(",")[5:])) for line in lines], 1, atol=1e-5)


def test_a_run_is_reported_described_and_exported(work, capsys):
    assert main(["report", str(work / "run")]) == 0
    assert "NMI" in capsys.readouterr().out
    assert json.loads((work / "run" / "result.json").read_text())["scores"].keys() == {"em", "differentiable"}
    assert main(["describe", str(work / "run")]) == 0
    said = capsys.readouterr().out
    for part in ("rows.csv: 400 rows of 64 columns, 320 of them for training", "; then differentiable", "6 components merged to 4",
                 f"command    hmog train file --data.path {work}", "changed    model.lat_dim 3,", " s of training",
                 "of the models it has the highest held-out log-density", "HMoG(lat_dim=3, n_components=6"):  # fmt: skip
        assert part in said
    heading, *lines = (line.split() for line in said.splitlines()[-3:])
    assert {"seed", "stage", "steps", "NMI", "ARI", "ACC"} <= set(heading)
    assert [line[:3] for line in lines] == [["0", name, "finished"] for name in ("em", "differentiable")]
    described = json.loads((work / "run" / "result.json").read_text())["described"]["stage"]
    assert [line[1] for line in lines if line[-1] == "described"] == [described]
    assert main(["export", str(work / "run"), str(work / "program")]) == 0
    x = np.load(work / "rows.npy").astype(np.float32)
    got = load_program(work / "program")(x)["log_density"]
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
        (["predict", "RUN", "narrow.csv"], "narrow.csv without numbers in 'pixel3', 61 of 64 missing"),
        (["predict", "RUN", "wide.npy"], "`raw` must have shape (..., 64); got (20, 65)"),
        (["predict", "RUN", "holes.csv"], "a missing or infinite value in row 2, counted from 0, and column 'pixel1'"),
        (["predict", "RUN", "ragged.csv"], "Expected 2 fields in line 3, saw 3"),
        (["predict", "RUN", "ROWS", "--id", "shop"], "`--id` must be left out for a run"),
        (["predict", "RUN", "ROWS", "--out", "RUN"], "`--out` must be a file"),
        (["predict", "RUN", "ROWS", "--out", "ROWS"], "`--out` must be another file than the rows"),
        (["train", "file"], "`data.path` must name a file"),
        (["train", "file", "--data.path", "same.csv"], "the training rows must vary; got 2 columns of same.csv"),
        (
            ["train", "file", "--data.path", "empty.csv"],
            "empty.csv must be a readable .csv file; got ValueError: an empty",
        ),
        (
            ["train", "file", "--data.path", "names.csv"],
            "names.csv must have rows below the names of its columns; got none",
        ),
        (
            ["train", "file", "--data.path", "narrow.csv", "--gradient.batch-size", "8"],
            "at most the 3 columns of the inputs",
        ),
    ],
)
def test_mistakes_are_one_line(work, arguments, message, capsys, monkeypatch):
    places = {"RUN": str(work / "run"), "ROWS": str(work / "rows.csv")}
    monkeypatch.chdir(work)
    before = set(work.iterdir())
    assert main([places.get(argument, argument) for argument in arguments]) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert set(work.iterdir()) == before


def test_rows_that_do_not_fit_leave_the_file_of_clusters_as_it_was(work):
    out = work / "kept.csv"
    out.write_text("as it was")
    for rows in ("narrow.csv", "wide.npy", "holes.csv"):
        assert main(["predict", str(work / "run"), str(work / rows), "--out", str(out)]) == 1
        assert out.read_text() == "as it was"


def test_columns_are_found_by_name(work):
    table = pd.read_csv(work / "rows.csv").head(20)
    table.iloc[:, ::-1].to_csv(work / "turned.csv")  # labels first, and row numbers without a name before them
    np.save(work / "same.npy", table.drop(columns="digit").to_numpy())
    for rows in ("turned.csv", "same.npy"):
        arguments = ["predict", str(work / "run"), str(work / rows), "--out", str(work / f"{rows}.out")]
        assert main(arguments) == 0
    assert (work / "turned.csv.out").read_text() == (work / "same.npy.out").read_text()


def test_a_first_column_without_a_name_is_no_input(tmp_path, caplog):
    (tmp_path / "numbered.csv").write_text(",a,b\n0,1,2\n1,3,4\n")
    (tmp_path / "called.csv").write_text("a,b\nfirst,1,2\nsecond,3,4\n")
    for name in ("numbered.csv", "called.csv"):
        file = read_file(tmp_path / name)
        assert file.column_names == ("a", "b")
        assert list(file.identifier[1]) == ([0, 1] if name == "numbered.csv" else ["first", "second"])
        np.testing.assert_array_equal(file.rows, [[1, 2], [3, 4]])
        assert f"{name}: the first column, which has no name, is left out" in caplog.text


def test_batches_shrink_to_the_rows(work, caplog):
    sizes = ["--model.lat-dim", "2", "--model.n-components", "2", "--em.max-steps", "2", "--gradient.epochs", "1"]
    options = ["--data.path", str(work / "narrow.csv"), "--workdir", str(work / "few")]
    assert main(["train", "file", *options, *sizes]) == 0
    assert "batches have 16 rows in place of 256, as there are 16 for training" in caplog.text


def test_what_cannot_be_read_ends_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "mnist"])
    assert stop.value.code == 2


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "tyro", None)
    assert main(["train", "digits"]) == 1
    assert 'Install it: pip install "flax-hmog[train]".' in capsys.readouterr().err
