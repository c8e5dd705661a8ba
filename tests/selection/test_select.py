"""`select`: its numbers beside those of single fits, what it keeps in a folder, and what it refuses."""

import json
import warnings

import jax
import numpy as np
import pytest

from flax_hmog import (
    AnalyticHMoG,
    Selection,
    WildRowsWarning,
    fit_em,
    infer,
    load,
    select,
)
from flax_hmog.cli import main
from flax_hmog.selection import compare, fits
from flax_hmog.selection.plot import plot_selection

KEY = jax.random.key(3)
GRID = {"n_components": (1, 2, 3), "lat_dim": 1}


def blobs(n=120):
    rng = np.random.default_rng(0)
    z = np.arange(n) % 3
    centres = np.array([[-8.0, 0, 8]]).T * [1.0, -1.0, 0.8, 0.9]
    return (centres[z] + rng.normal(size=(n, 4))).astype(np.float32), z


@pytest.fixture(scope="module")
def x():
    return blobs()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("selection")


@pytest.fixture(scope="module")
def selection(x, folder):
    return select(x, KEY, **GRID, workdir=folder)


def test_three_clusters_are_recommended(selection):
    assert selection.best.n_components == 3
    assert selection.agrees
    assert len(set(zip(selection.assignments, blobs()[1], strict=True))) == 3
    assert selection.best.generalisation > 0.99
    assert selection.best.agreement == 1


def test_criteria_are_those_of_the_formulas(selection, x):
    head = AnalyticHMoG(1, 2, obs_dim=4)
    found = [fit_em(head, x, jax.random.fold_in(KEY, seed)) for seed in (0, 1)]
    best = max(found, key=lambda fit: fit.objective_history[-1]).natural
    output, row = infer(best, x), selection.rows[1]
    log_likelihood = float(np.sum(np.asarray(output.log_density, np.float64)))
    r = np.exp(np.asarray(output.log_responsibilities, np.float64))
    # one factor: 1 weight, 2 means and 2 variances less shift and scale of y; 4 loadings, 4 biases, 4 noise variances,
    # less what noise cannot hold of the variance of y (nothing)
    assert row.n_parameters == 1 + 2 + 2 - 2 + 4 + 4 + 4
    assert row.log_likelihood == pytest.approx(log_likelihood, rel=1e-5)
    assert row.bic == pytest.approx(row.n_parameters * np.log(120) - 2 * log_likelihood, rel=1e-5)
    entropy = -np.sum(r * np.log(np.maximum(r, 1e-300)))
    assert row.icl == pytest.approx(row.bic + 2 * entropy, rel=1e-5)
    assert row.entropy == pytest.approx(entropy / 120, abs=1e-4)
    assert row.entropies[-1] == pytest.approx(row.entropy, abs=1e-4)


def test_held_out_rows_are_scored_by_models_of_the_others(selection, folder, x):
    folds = compare.folds_of(120, 2, compare.FOLD_SEED)
    density = {}
    for k in (2, 3):
        own = density[k] = np.empty(120)
        for fold in (0, 1):
            part = fit_em(AnalyticHMoG(1, k, obs_dim=4), x[folds != fold], jax.random.fold_in(KEY, fold)).natural
            own[folds == fold] = infer(part, x[folds == fold]).log_density
    row = selection.rows[1]
    assert row.held_out == pytest.approx(density[2].mean(), abs=1e-3)
    assert row.held_out_error == pytest.approx(density[2].std(ddof=1) / 120**0.5, rel=1e-3)
    gap = density[3] - density[2]
    assert row.behind == pytest.approx(gap.mean(), abs=1e-3)
    assert row.behind_error == pytest.approx(gap.std(ddof=1) / 120**0.5, rel=1e-3)


def test_the_same_call_goes_on_from_its_folder(selection, x, folder, monkeypatch):
    ran = []

    def counted(*args, **options):
        ran.append(args[0].n_components)
        return fit_em(*args, **options)

    monkeypatch.setattr(fits, "fit_em", counted)
    again = select(x, KEY, **GRID, workdir=folder)
    assert not ran
    assert again.rows == selection.rows
    (folder / "diagonal-K2-L1-without1.npz").unlink()
    more = select(x, KEY, n_components=(1, 2, 3, 4), lat_dim=1, workdir=folder)
    assert ran == [2, 4, 4, 4, 4]
    assert more.rows[2].bic == selection.rows[2].bic
    assert load(folder / "diagonal-K3-L1-seed0.npz").notes["seconds"] > 0


def test_a_folder_of_other_rows_is_refused(selection, x, folder):
    with pytest.raises(ValueError, match=r"`workdir` must be empty or hold fits of the same call; got .*other rows"):
        select(x + 1, KEY, **GRID, workdir=folder)
    with pytest.raises(ValueError, match=r"with other key and options"):
        select(x, jax.random.key(4), **GRID, workdir=folder, tolerance=0.1)


def test_a_setting_that_fails_is_kept_with_its_cause(x, tmp_path):
    found = select(x, KEY, n_components=(2, 100), lat_dim=(1, 9), workdir=tmp_path)
    assert [row.failure is None for row in found.rows] == [True, False, False, False]
    assert "training part; got 100 for 60 rows" in found.rows[1].failure
    assert "lat_dim" in found.rows[2].failure
    assert json.loads((tmp_path / "diagonal-K2-L9-failed.json").read_text())["cause"] == found.rows[2].failure
    assert found.recommended == 0
    assert "failed: ValueError" in str(found)
    assert select(x, KEY, n_components=(2, 100), lat_dim=(1, 9), workdir=tmp_path).rows == found.rows


def test_weights_are_numbers_of_rows(x):
    counts = np.random.default_rng(0).integers(1, 3, 120)
    weighted = select(x, KEY, n_components=3, lat_dim=1, weights=counts).best
    repeated = select(np.repeat(x, counts, axis=0), KEY, n_components=3, lat_dim=1).best
    assert weighted.bic == pytest.approx(repeated.bic, rel=1e-3)
    assert weighted.entropy == pytest.approx(repeated.entropy, abs=1e-3)


def test_missing_values(x):
    gaps = np.where(np.random.default_rng(0).uniform(size=x.shape) < 0.1, np.nan, x)
    found = select(gaps, KEY, **GRID, missing="nan")
    assert found.best.n_components == 3
    with pytest.raises(ValueError, match=r"select: `data` must be finite"):
        select(gaps, KEY, **GRID)


def test_wild_rows_are_left_out_of_all_settings(x):
    rows = x.copy()
    rows[7, 2] = 1e6
    with pytest.warns(WildRowsWarning, match="1 rows are left out.*the first is row 7"):
        found = select(rows, KEY, **GRID, obs_rep=("scale", "diagonal"), n_seeds=1)
    assert found.best.agreement is None
    assert found.left_out == (7,)
    assert found.assignments[7] == -1
    assert found.best.n_components == 3


def test_full_noise_takes_columns_in_any_units(x):
    units = np.float32([1, 10, 1e2, 1e4])
    given = {"n_components": 3, "lat_dim": 1, "obs_rep": "full", "n_seeds": 1}
    plain, scaled = (select(rows, KEY, **given) for rows in (x, x * units))
    assert scaled.best.held_out == pytest.approx(plain.best.held_out - np.log(units).sum(), abs=0.01)
    assert (scaled.assignments == plain.assignments).all()


def test_components_are_merged_to_clusters(x):
    found = select(x, KEY, n_components=(3, 6), lat_dim=1, n_clusters=3)
    assert found.rows[1].clusters_in_use == 3
    assert found.rows[1].entropy <= found.rows[1].entropies[-1]
    assert set(found.clusters) == {0, 1, 2}


def test_a_file_has_table_and_model(selection, tmp_path, x):
    selection.save(tmp_path / "selection.npz")
    again = Selection.load(tmp_path / "selection.npz")
    assert again.rows == selection.rows
    assert (again.recommended, again.agrees, again.reasons) == (selection.recommended, True, selection.reasons)
    assert (infer(again.natural, x).log_density == infer(selection.natural, x).log_density).all()
    assert str(again) == str(selection)
    with pytest.raises(ValueError, match=r"must be a file that Selection\.save wrote"):
        Selection.load(save_alone(selection, tmp_path))


def save_alone(selection, folder):
    from flax_hmog import save

    save(selection.natural, folder / "model.npz")
    return folder / "model.npz"


def test_table_and_figure(selection):
    table = selection.table()
    assert table["n_components"] == [1, 2, 3]
    assert table["generalisation"][0] is None
    assert "*  3  1  -" in str(selection)
    assert [axes.get_title(loc="left") for axes in plot_selection(selection).axes][1] == "BIC"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_components": 0}, "`n_components` must be a whole number of at least 1; got 0"),
        ({"n_seeds": 0}, "`n_seeds` must be a whole number of at least 1"),
        ({"n_folds": 61}, "`x` must have at least 2 rows for each fold"),
        ({"n_components": 500}, "must leave a setting that can be fitted; all failed"),
        ({"obs_rep": "round"}, "obs_rep"),
        ({"n_components": ()}, "`n_components`, `lat_dim` and `obs_rep` must name at least one"),
    ],
)
def test_errors_name_the_mistake(x, changes, message):
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        select(x, KEY, **GRID | changes)


def test_the_command_prints_the_table_and_writes_model_and_figure(x, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    np.savetxt(rows, x, delimiter=",", header="a,b,c,d", comments="")
    out, figure = tmp_path / "selection.npz", tmp_path / "selection.png"
    given = ["select", str(rows), "--n-components", "2,3", "--lat-dim", "1", "--out", str(out), "--figure", str(figure)]
    assert main(given) == 0
    assert "Recommended: K = 3, L = 1, diagonal noise" in " ".join(capsys.readouterr().out.split())
    assert Selection.load(out).columns == ("a", "b", "c", "d")
    assert figure.stat().st_size > 1000


def test_constant_columns_have_no_part_in_the_table(x):
    """Nor has one that varies in a single row: outside its fold it is constant."""
    rare = np.zeros(120, np.float32)
    rare[7] = 1
    still = np.column_stack([x[:, :2], np.full(120, 7e3, np.float32), x[:, 2:], rare])
    given = {"n_components": (2, 3), "lat_dim": 1, "n_seeds": 1}
    plain, found = select(x, KEY, **given), select(still, KEY, **given)
    for one, other in zip(plain.rows, found.rows, strict=True):
        for name in ("held_out", "bic", "icl", "n_parameters", "generalisation"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6), name
    assert found.natural.interaction.shape == (6, 1)  # of all columns
    np.testing.assert_array_equal(found.assignments, infer(found.natural, still).log_responsibilities.argmax(axis=1))
    assert len(set(zip(found.assignments, plain.assignments, strict=True))) == 3
    assert "2 of 6 columns are constant outside a fold, the first is 2" in found.reasons[-1]
    assert "constant" not in plain.reasons[-1]
    with pytest.raises(ValueError, match="columns that vary outside every fold; got none"):
        select(still[:, [2, 5]], KEY, **given)
