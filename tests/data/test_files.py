"""Files as other programs write them: sparse formats, tables, layers, labels with gaps, and values that are missing."""

import json
import logging
import re
import sys

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import normalized_mutual_info_score
from small_runs import SMALL, read_metrics, run

from flax_hmog.data.files import read_file
from flax_hmog.recipe import report as analyze
from flax_hmog.recipe.config import EM, Data, Gradient, Model
from flax_hmog.recipe.inputs import prepare_inputs
from flax_hmog.recipe.load import load
from flax_hmog.training import make_mesh

RNG = np.random.default_rng(0)
CENTERS = 8 * RNG.normal(size=(4, 5))
Y = np.arange(200) % 4
X = (CENTERS[Y] + RNG.normal(size=(200, 5))).astype(np.float32)
GONE = np.random.default_rng(1).random(200) < 0.4
NAMES = np.array(["T cell", "B cell", "NK", "monocyte"])


def dataset_of(path, **options):
    return load(Data("file", path=str(path), **options), 0)


# ------------------------------------------------------------------------------------------------- sparse formats


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csr_array])
@pytest.mark.parametrize("shape", [(40, 40), (40, 20)])
def test_every_format_that_scipy_saves(form, kind, shape, tmp_path):
    counts = RNG.poisson(0.5, shape).astype(np.float32)
    sp.save_npz(tmp_path / "a.npz", kind(counts).asformat(form))
    rows = read_file(tmp_path / "a.npz").rows
    assert rows.format == "csr"
    np.testing.assert_array_equal(rows.toarray(), counts)
    dataset = dataset_of(tmp_path / "a.npz")
    np.testing.assert_array_equal(dataset.train.read(slice(3, 7)), counts[dataset.train.index[3:7]])


def test_a_format_of_another_name_is_no_array(tmp_path):
    parts = {"data": np.ones(2), "indices": [0, 1], "indptr": [0, 1, 2], "shape": (2, 2)}
    np.savez(tmp_path / "a.npz", **parts)  # as written by hand: rows
    np.testing.assert_array_equal(read_file(tmp_path / "a.npz").rows.toarray(), np.eye(2))
    np.savez(tmp_path / "b.npz", format=np.bytes_(b"xyz"), **parts)
    with pytest.raises(ValueError, match=r"b\.npz must be a readable \.npz file"):
        read_file(tmp_path / "b.npz")


# ------------------------------------------------------------------------------------------------- h5ad


def test_layers_and_embeddings_of_single_cells(tmp_path):
    anndata = pytest.importorskip("anndata")
    counts = sp.csr_matrix(RNG.poisson(1, (20, 6)).astype(np.float32))
    table = anndata.AnnData(counts, layers={"log": counts.log1p().tocsc()}, obsm={"X_pca": X[:20, :2]})
    table.write_h5ad(tmp_path / "a.h5ad")
    read = lambda **options: dataset_of(tmp_path / "a.h5ad", **options).train.rows  # noqa: E731
    np.testing.assert_array_equal(read().toarray(), counts.toarray())
    np.testing.assert_array_equal(read(layer="log").toarray(), np.log1p(counts.toarray()))
    np.testing.assert_array_equal(read(obsm="X_pca"), X[:20, :2])
    with pytest.raises(ValueError, match=r"`data\.layer` must be in .*a\.h5ad; got 'raw'\. Choose one of \['log'\]"):
        read(layer="raw")
    with pytest.raises(ValueError, match=r"`data\.obsm` must be in .*; got 'X_umap'\. Choose one of \['X_pca'\]"):
        read(obsm="X_umap")
    with pytest.raises(ValueError, match="Data: `layer` must be None where `obsm` is given"):
        Data("file", layer="a", obsm="b")
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(ValueError, match=r"must be None but for \.h5ad; got 'log' for a\.npy"):
        dataset_of(tmp_path / "a.npy", layer="log")
    anndata.AnnData(obsm={"X_pca": X[:20, :2]}).write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(ValueError, match=r"b\.h5ad must have X; got none\. .*--data\.obsm, one of \['X_pca'\]"):
        dataset_of(tmp_path / "b.h5ad")


# ------------------------------------------------------------------------------------------------- tables


def write_table(path, frame):
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)


def frame(**columns):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    return pd.DataFrame({f"c{k}": X[:, k] for k in range(5)} | columns)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables(suffix, tmp_path, caplog):
    path = tmp_path / f"a{suffix}"
    write_table(path, frame(kind=NAMES[Y], cell=[f"cell{k}" for k in range(200)], n=Y))
    with caplog.at_level(logging.WARNING):
        file = read_file(path, "kind")
    assert file.column_names == ("c0", "c1", "c2", "c3", "c4", "n")
    np.testing.assert_allclose(file.rows, np.column_stack([X, Y]), rtol=1e-6)
    assert file.class_names == tuple(sorted(NAMES))
    np.testing.assert_array_equal(np.array(file.class_names)[file.labels], NAMES[Y])
    assert "columns without numbers are left out: 'cell'" in caplog.text
    assert read_file(path, "n").labels.tolist() == Y.tolist()
    assert read_file(path).labels is None
    with pytest.raises(
        ValueError, match=rf"`data\.labels` must be a column of .*a\{suffix}; got 'type'\. Choose one of 'c0'"
    ):
        read_file(path, "type")


def test_tables_that_hold_no_numbers_are_named(tmp_path):
    path = tmp_path / "a.csv"
    write_table(path, frame(age=["?" if k == 7 else str(k) for k in range(200)]))
    with pytest.raises(ValueError, match=r"column 'age' of .*a\.csv must hold numbers; got '\?' in row 7"):
        read_file(path)
    write_table(path, frame()[[]].assign(name="x"))
    with pytest.raises(ValueError, match="must have columns of numbers; got 'name'"):
        read_file(path)


@pytest.mark.parametrize(("suffix", "packages"), [(".csv", "pandas"), (".parquet", "pandas pyarrow")])
def test_a_package_that_is_missing_is_named(suffix, packages, tmp_path, monkeypatch):
    (tmp_path / f"a{suffix}").write_bytes(b"a,b\n1,2\n")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=rf"must be read by .*\. Install it: pip install {packages}\."):
        read_file(tmp_path / f"a{suffix}")


# ------------------------------------------------------------------------------------------------- labels with gaps


def labelled_file(kind, tmp_path):
    """A file whose labels are partly missing, and the option that names them."""
    if kind == "floats":
        np.savez(tmp_path / "a.npz", X=X, y=np.where(GONE, np.nan, Y))
    elif kind == "objects":
        labels = np.where(GONE, None, NAMES[Y])
        np.savez(tmp_path / "a.npz", X=X, y=np.where(labels == None, "", labels).astype(str))  # noqa: E711
    elif kind == "h5ad":
        anndata = pytest.importorskip("anndata")
        pd = pytest.importorskip("pandas")
        kinds = pd.Categorical(np.where(GONE, None, NAMES[Y]))
        anndata.AnnData(X, obs=pd.DataFrame({"kind": kinds}, index=map(str, range(200)))).write_h5ad(
            tmp_path / "a.h5ad"
        )
        return tmp_path / "a.h5ad", "kind"
    else:
        write_table(tmp_path / "a.csv", frame(kind=np.where(GONE, "", NAMES[Y])))
        return tmp_path / "a.csv", "kind"
    return tmp_path / "a.npz", None


@pytest.mark.parametrize("kind", ["floats", "objects", "h5ad", "csv"])
def test_labels_that_are_missing_are_no_class(kind, tmp_path):
    path, labels = labelled_file(kind, tmp_path)
    dataset = dataset_of(path, labels=labels, test_share=0.5)
    names = tuple("0123") if kind == "floats" else tuple(sorted(NAMES))
    assert dataset.train.class_names == dataset.test.class_names == names
    np.testing.assert_array_equal(dataset.train.labels == -1, GONE)
    for part in (dataset.train, dataset.test):
        np.testing.assert_array_equal(part.is_labelled, ~GONE[part.index])
        # clusters that are right wherever a label is known are right, whatever they say of the others
        found = np.where(GONE, 9, Y)[part.index]
        count = int((~GONE)[part.index].sum())
        assert part.agreement(found) == pytest.approx({"nmi": 1.0, "ari": 1.0, "accuracy": 1.0, "labelled": count})
        wrong = np.where(Y == 0, 1, Y)[part.index]
        known = part.is_labelled
        want = normalized_mutual_info_score(Y[part.index][known], wrong[known])
        assert part.agreement(wrong)["nmi"] == pytest.approx(want)
        assert part.occurring_names == list(names)


def test_integers_are_labels_as_they_are(tmp_path):
    np.savez(tmp_path / "a.npz", X=X, y=Y - 1)
    dataset = dataset_of(tmp_path / "a.npz")
    np.testing.assert_array_equal(dataset.test.part_labels, Y[dataset.test.index] - 1)
    assert dataset.test.class_names is None
    assert dataset.test.is_labelled.all()
    assert set(dataset.test.agreement(Y[dataset.test.index])) == {"nmi", "ari", "accuracy"}


def test_a_part_without_labels_has_no_scores(tmp_path):
    labels = np.where(np.arange(200) < 100, Y, np.nan)
    np.savez(tmp_path / "a.npz", X=X, y=labels, n_train=100)
    scores = dataset_of(tmp_path / "a.npz").test.agreement(Y[100:])
    assert scores["labelled"] == 0
    assert np.isnan(scores["nmi"])


@pytest.mark.slow
def test_a_run_with_partly_labelled_rows_says_how_many_count(tmp_path, capsys):
    path, labels = labelled_file("csv", tmp_path)
    folder = tmp_path / "run"
    run(
        folder,
        SMALL,
        data=Data("file", path=str(path), labels=labels, scale="standard"),
        model=Model(lat_dim=3, n_components=4),
        em=EM(max_steps=20),
        gradient=Gradient(epochs=1, batch_size=64),
    )
    analyze.report_run(folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["class_names"] == sorted(NAMES)
    for seed, scores in enumerate(result["scores"]["em"]):
        test = load(Data("file", path=str(path), labels=labels), seed).test
        assert scores["labelled"] == (~GONE)[test.index].sum() < 40
        assert scores["nmi"] > 0.9
    assert "labelled" in capsys.readouterr().out
    assert all(record["labelled"] < 40 for record in read_metrics(folder) if "nmi" in record)
    page = (folder / "report.html").read_text()
    assert "labelled rows" in page
    assert "monocyte" in page


# ------------------------------------------------------------------------------------------------- missing values


def prepared(path, **options):
    data = Data("file", path=str(path), **options)
    return prepare_inputs(data, load(data, 0), make_mesh())


@pytest.mark.parametrize("row", [3, 150])
@pytest.mark.parametrize("sparse", [False, True])
def test_missing_values_of_any_part_are_found_before_em(row, sparse, tmp_path):
    rows = X.copy()
    rows[row, 2] = rows[199, 4] = np.nan
    part = "training" if row < 100 else "test"
    if sparse:
        sp.save_npz(tmp_path / "a.npz", sp.csr_matrix(rows))
        part = r"\w+"
    else:
        np.savez(tmp_path / "a.npz", X=rows, n_train=100)
    message = f"the data must be finite; got nan in column 2 of row {row} of .*a.npz, counted from 0, in the {part} part, beside 1"
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path / "a.npz")


def test_missing_values_of_a_table_are_named_by_column(tmp_path):
    table = frame()
    table.loc[11, "c3"] = None
    write_table(tmp_path / "a.csv", table)
    with pytest.raises(ValueError, match=r"got nan in column 3 \('c3'\) of row 11 of .*a\.csv"):
        prepared(tmp_path / "a.csv")


def test_values_that_make_no_input_are_named(tmp_path):
    rows = X.astype(np.float64)
    rows[5, 1] = 1e39
    np.savez(tmp_path / "a.npz", X=rows)
    with pytest.raises(ValueError, match=re.escape("must be finite; got 1e+39 in column 1 of row 5")):
        prepared(tmp_path / "a.npz")
    rows[5, 1] = -2
    np.savez(tmp_path / "a.npz", X=np.maximum(rows, -2))
    with pytest.raises(ValueError, match=r"must be above -1 to take their logarithm \(log1p\); got -"):
        prepared(tmp_path / "a.npz", log1p=True)


def test_rows_that_are_not_used_are_not_looked_at(tmp_path):
    rows = X.copy()
    np.savez(tmp_path / "a.npz", X=rows)
    dropped = sorted(
        set(dataset_of(tmp_path / "a.npz").train.index) - set(dataset_of(tmp_path / "a.npz", rows=20).train.index)
    )
    rows[dropped[0]] = np.nan
    np.savez(tmp_path / "a.npz", X=rows)
    assert prepared(tmp_path / "a.npz", rows=20).obs_dim == 5
