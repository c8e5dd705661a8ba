"""`hmog fit` and `hmog predict` on tables: from a file to a line for each row, with every decision said."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score
from wild_table import wild_table

from flax_hmog.cli import main
from flax_hmog.data.columns import Columns, choose_columns, rows_of
from flax_hmog.data.files import read_file
from flax_hmog.data.tables import read_frame
from flax_hmog.sklearn import HMoG
from flax_hmog.sklearn.choice import filled_rows, n_separate
from flax_hmog.sklearn.tables import described

MISTAKEN = {
    "one.csv": "a\n1\n",
    "still.csv": "a\n1\n1\n1\n",
    "wild.csv": "a,b\n1,2\n3,-inf\n",
    "latin.csv": "näme\n1\n2\n",
    "ragged.csv": "a\n1\n2,3\n",
}
COLUMNS = ["cluster", "probability", "second_cluster", "second_probability", "outlier_score", "is_outlier"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small wild table in files, a model of it, and its clusters."""
    folder = tmp_path_factory.mktemp("tables")
    table, _, _ = wild_table(400, 12, n_wild=8, apart=9.0)
    table.to_csv(folder / "rows.csv", index=False)
    table.iloc[:50, ::-1].to_parquet(folder / "new.parquet")
    np.save(folder / "rows.npy", table.filter(like="v").to_numpy())
    files = ["--out", str(folder / "model.npz"), "--assignments", str(folder / "out.csv")]
    assert main(["fit", str(folder / "rows.csv"), *files]) == 0
    return folder


def assert_found(out, z, wild):
    good = z >= 0
    assert adjusted_rand_score(z[good], out.cluster[good]) >= 0.99
    assert set(np.flatnonzero(out.is_outlier)) == set(wild)
    assert set(np.argsort(out.outlier_score, kind="stable")[: len(wild)]) == set(wild)
    assert (out.cluster[wild] == -1).all()


def test_a_table_becomes_a_line_for_each_row(work):
    table, z, wild = wild_table(400, 12, n_wild=8, apart=9.0)
    out = pd.read_csv(work / "out.csv")
    assert list(out.columns)[:7] == ["customer", *COLUMNS]
    assert list(out.customer) == list(table.customer)
    assert_found(out, z, wild)
    assert (out.probability >= out.second_probability).all()
    assert (out.probability + out.second_probability <= 1 + 1e-6).all()
    model = HMoG.load(work / "model.npz")
    assert list(model.feature_names_in_) == [f"v{i}" for i in range(8)] + ["version"]
    assert out.filter(like="factor").shape[1] == model.loadings_.shape[1]


@pytest.mark.slow
def test_the_whole_table(tmp_path):
    table, z, wild = wild_table()
    table.to_csv(tmp_path / "rows.csv", index=False)
    assert main(["fit", str(tmp_path / "rows.csv"), "--assignments", str(tmp_path / "out.csv")]) == 0
    assert_found(pd.read_csv(tmp_path / "out.csv"), z, wild)


def test_new_rows_are_found_by_the_names_of_their_columns(work, capsys):
    command = ["predict", str(work / "model.npz"), str(work / "new.parquet")]
    assert main([*command, "--out", str(work / "new.csv")]) == 0
    out, new = pd.read_csv(work / "out.csv"), pd.read_csv(work / "new.csv")
    pd.testing.assert_frame_equal(new, out.head(50), atol=1e-5, check_dtype=False)
    capsys.readouterr()
    assert main([*command, "--id", "country", "--probabilities"]) == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("country,cluster,probability")
    shares = [
        float(value) for name, value in zip(header.split(","), first.split(","), strict=True) if name[1:].isdigit()
    ]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    renamed = pd.read_parquet(work / "new.parquet").rename(columns={"customer": "cluster"})
    renamed.to_parquet(work / "renamed.parquet")
    files = [str(work / "renamed.parquet"), "--id", "cluster", "--out", str(work / "renamed.csv")]
    assert main(["predict", str(work / "model.npz"), *files]) == 0
    clusters = pd.read_csv(work / "renamed.csv")
    assert list(clusters.row) == list(renamed.cluster)
    np.testing.assert_array_equal(clusters.cluster, new.cluster)
    capsys.readouterr()
    assert main(["describe", str(work / "model.npz")]) == 0
    said = capsys.readouterr().out
    assert "identifier customer" in said
    assert "left out comment: text of 3 values" in said


def test_every_decision_is_said(work, capsys):
    named = ["--one-hot", "country", "--leave-out", "v1", "--clusters", "3", "--lat-dim", "2"]
    assert main(["fit", str(work / "rows.csv"), *named, "--contamination", "0.05"]) == 0
    said = capsys.readouterr().out
    for part in (
        "rows.csv: 400 rows, 12 columns",
        "identifier   customer",
        "categories   country: DE, FR, IT",
        "rows are judged by what they show",
        "constant     version; carried along",
        "left out     v1: as asked",
        "left out     comment: text of 3 values, which --one-hot comment takes",
        "3 clusters of ",
        "2 factors of 11 columns",
        "20 of 400 rows are outliers",
    ):
        assert part in said


def test_arrays_and_single_cells(work):
    assert main(["fit", str(work / "rows.npy"), "--clusters", "4", "--assignments", str(work / "rows.parquet")]) == 0
    assert list(pd.read_parquet(work / "rows.parquet").columns[:2]) == ["row", "cluster"]
    anndata = pytest.importorskip("anndata")
    x = np.nan_to_num(np.load(work / "rows.npy"))
    cells = anndata.AnnData(x, obs=pd.DataFrame(index=[f"cell{i}" for i in range(400)]))
    cells.write_h5ad(work / "cells.h5ad")
    files = ["--assignments", str(work / "found.h5ad"), "--out", str(work / "cells.npz")]
    assert main(["fit", str(work / "cells.h5ad"), "--clusters", "4", *files]) == 0
    found = anndata.read_h5ad(work / "found.h5ad")
    assert set(found.obs) == {f"hmog_{name}" for name in COLUMNS}
    assert found.obsm["X_hmog"].shape[0] == 400
    np.testing.assert_array_equal(found.X, x)
    assert main(["predict", str(work / "cells.npz"), str(work / "cells.h5ad"), "--out", str(work / "cells.csv")]) == 0
    assert list(pd.read_csv(work / "cells.csv")["obs_names"][:2]) == ["cell0", "cell1"]


def test_roles_of_columns():
    table = pd.DataFrame(
        {
            "order": np.arange(50) + 7,
            "name": [f"n{i}" for i in range(50)],
            "age": [*range(48), None, None],
            "price": ["1.5", "unknown", *map(str, range(48))],
            "is_new": np.arange(50) % 2 == 0,
            "day": pd.date_range("2020-01-01", periods=50),
            "town": ["Bern", "Oslo"] * 25,
            "note": [f"n{i % 40}" for i in range(50)],
            "none": [None] * 50,
            "index": range(50),
            "same": ["x"] * 50,
        }
    )
    columns = choose_columns(table)
    assert columns.identifier == "order"
    assert columns.numbers == ("age", "price", "is_new")
    assert columns.words == {"price": ("unknown",)}
    assert columns.left_out == {
        "name": "text of 50 values",
        "day": "dates",
        "town": "text of 2 values, which --one-hot town takes",
        "note": "text of 40 values",
        "index": "a count of the rows",
        "same": "text, always 'x'",
        "none": "empty",
    }
    rows = rows_of(table, columns)
    assert np.isnan(rows).sum(axis=0).tolist() == [2, 1, 0]
    hot = choose_columns(table, "name", one_hot=["all"], leave_out=["price"])
    assert (hot.identifier, hot.numbers, hot.categories) == (
        "name",
        ("age", "is_new"),
        {"town": ("Bern", "Oslo"), "same": ("x",)},
    )
    np.testing.assert_array_equal(rows_of(table, hot)[:2, 2:4], [[1, 0], [0, 1]])
    assert "  two values   is_new; may be" in "\n".join(described(Path("rows.csv"), table, columns, rows))
    assert Columns(None, ("a",)).features == ("a",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "nowhere.csv"], "`rows` must be a file; got nowhere.csv"),
        (["fit", "rows.csv", "--id", "name"], "`id` must name a column; got 'name'. Choose one of customer"),
        (["fit", "rows.csv", "--assignments", "out.txt"], "must end in .csv, .parquet or"),
        (["fit", "rows.csv", "--assignments", "rows.csv"], "`--out` must be another file than the rows"),
        (["fit", "."], "`rows` must be a file; got ., which is a folder"),
        (["predict", "model.npz", "nowhere.csv"], "predict: `rows` must be a file; got nowhere.csv"),
        (
            ["fit", "text.csv"],
            "the table must have columns of numbers; got name. Encode them as numbers, or take --one",
        ),
        (["fit", "ragged.csv"], "Expected 1 fields in line 3, saw 2. Correct it"),
        (["fit", "rows.csv", "--out", "model.txt"], "`--out` must end in .npz; got model.txt"),
        (
            ["fit", "rows.csv", "--out", "nowhere/model.npz"],
            "must lie in a folder that is there; got nowhere/model.npz",
        ),
        (["fit", "rows.csv", "--clusters", "500"], "`--clusters` must be at most the 400 rows; got 500"),
        (["fit", "one.csv"], "the table must have at least 2 rows; got 1"),
        (["select", "still.csv", "--n-components", "2", "--lat-dim", "1"], "a column of numbers that vary; got 1"),
        (["fit", "wild.csv"], "column 'b' must hold finite numbers; got -inf in row 1, counted from 0"),
        (["fit", "latin.csv"], "Save it as UTF-8"),
        (["report", "model.npz"], "`rows` must be a file of rows for a model of hmog fit; got none"),
        (["report", "rows.csv"], "must be the folder of a run; got the file rows.csv"),
        (["describe", "nowhere.npz"], "got nowhere.npz, which is not there. Check the path"),
        (
            ["predict", "model.npz", "rows.csv", "--id", "name"],
            "`id` must name a column; got 'name'. Choose one of cust",
        ),
        (["predict", "model.npz", "narrow.csv"], "the columns of the model; got none named 'v1', 8 of 9 missing"),
        (["predict", "rows.npz", "rows.csv"], "`path` must be a file that flax_hmog.save wrote"),
    ],
)
def test_mistakes_are_one_line(work, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(work)
    pd.DataFrame({"name": ["a", "b"]}).to_csv("text.csv", index=False)
    pd.DataFrame({"v0": [1.0]}).to_csv("narrow.csv", index=False)
    np.savez("rows.npz", X=np.ones((2, 2)))
    for name, text in MISTAKEN.items():
        Path(name).write_bytes(text.encode("latin1"))
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1


def test_tables_as_others_write_them(tmp_path, caplog):
    """Semicolons and decimal commas, tabs, codes with leading zeros, lists, one category, numbers with signs."""
    table = pd.DataFrame({"id": ["007", "012", "100"], "zip": ["0100"] * 3, "a": [1.5, 2.25, -3], "gone": [None] * 3})
    table["rate"] = ["1.5%", "2%", "13.5%"]
    table.to_csv(tmp_path / "semicolon.csv", index=False, sep=";", decimal=",")
    table.to_csv(tmp_path / "tab.csv", index=False, sep="\t")
    table.to_csv(tmp_path / "comma.csv", index=False)
    table.assign(nested=[[1], [2], []], held=[{"x": 1}] * 3).to_parquet(tmp_path / "nested.parquet")
    for name in ("semicolon.csv", "tab.csv", "comma.csv", "nested.parquet"):
        found = read_frame(tmp_path / name)
        columns = choose_columns(found)
        assert (columns.identifier, columns.numbers) == ("id", ("a",))
        assert list(found.id) == ["007", "012", "100"]
        np.testing.assert_array_equal(rows_of(found, columns)[:, 0], [1.5, 2.25, -3])
        assert columns.left_out["zip"] == "text, always '0100'"
        assert columns.left_out["rate"] == "text of 3 values as '1.5%'; write plain numbers to have it take part"
        assert columns.left_out.get("nested", "lists or records") == "lists or records"
        file = read_file(tmp_path / name)  # as hmog train does
        assert (file.column_names, file.identifier[0], list(file.identifier[1])) == (("a",), "id", list(table.id))
    assert "semicolon.csv: columns are separated by ';' and decimals by ','" in caplog.text
    assert choose_columns(table, one_hot=["gone"]).left_out["gone"] == "empty"


def test_a_model_of_a_table_has_a_page(work):
    assert main(["report", str(work / "model.npz"), str(work / "rows.csv")]) == 0
    page, found = (work / "model.html").read_text(), pd.read_csv(work / "out.csv")
    assert "named by &#39;customer&#39; of the source" in page
    assert all(str(name) in page for name in found.customer[found.is_outlier])


def test_components_that_overlap_are_one_cluster():
    rng = np.random.default_rng(0)
    apart = np.eye(4)[rng.integers(4, size=400)]
    assert n_separate(apart) == 4
    halves = np.column_stack([apart[:, :3], apart[:, 3:] * 0.5, apart[:, 3:] * 0.5])
    assert n_separate(halves) == 4


def test_rows_are_filled_near_their_plane():
    rng = np.random.default_rng(0)
    x = 1e3 * rng.normal(size=(500, 1)) @ rng.normal(size=(1, 6)) + rng.normal(size=(500, 6))
    gaps = np.where(rng.random(x.shape) < 0.1, np.nan, x)
    filled = filled_rows(gaps, 0)
    np.testing.assert_array_equal(filled[~np.isnan(gaps)], x[~np.isnan(gaps)])
    assert np.abs(filled - x)[np.isnan(gaps)].mean() < 0.15 * np.abs(x).mean()
