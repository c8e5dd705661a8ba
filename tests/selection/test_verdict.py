"""The recommended setting of tables made up by hand."""

import dataclasses

import pytest

from flax_hmog.selection.table import Scores
from flax_hmog.selection.verdict import verdict_of


def row(k, held_out, bic, icl=None, **changes):
    given = {"held_out_error": 0.1, "behind": -held_out, "agreement": 1.0, "generalisation": 0.9, "entropy": 0.2}
    icl = bic if icl is None else icl
    return Scores(k, 2, "diagonal", held_out, bic=bic, icl=icl, converged=True, **given | changes)


def test_the_lowest_bic_within_one_standard_error_of_the_best_density():
    number, agrees, told = verdict_of([row(1, -3.0, 90), row(2, -0.09, 50), row(3, 0.0, 60), row(4, -0.02, 70)])
    assert (number, agrees) == (1, True)
    assert told == (
        "Recommended: K = 2, L = 2, diagonal noise, the lowest BIC of the 3 settings whose held-out log-density is "
        "within one standard error (0.1 nats per row) of the best.",
        "The criteria agree: BIC and ICL are lowest for it, and its held-out log-density is not clearly below the best.",
    )


def test_a_density_that_only_fitted_rows_have_does_not_count():
    number, agrees, told = verdict_of([row(2, 0.0, 50), row(3, -200.0, -9000), row(4, -1, 80)])
    assert (number, agrees) == (0, False)
    assert told[1:3] == (
        "The criteria disagree.",
        "BIC prefers K = 3, L = 2, diagonal noise, whose held-out log-density is 200 nats per row below the best: it "
        "describes the rows that it was fitted to, and not others as well. Columns that hardly vary, and components of "
        "few rows, do this.",
    )


def test_overlapping_components():
    number, agrees, told = verdict_of([row(2, -0.3, 60, 65), row(3, 0.0, 50, 80), row(4, -1, 90)])
    assert (number, agrees) == (1, False)
    assert told[2].startswith("ICL prefers K = 2, L = 2, diagonal noise: components of the recommended one overlap")


def test_clusters_that_a_probe_does_not_find_again():
    rows = [row(2, 0.0, 60, generalisation=0.99), row(3, 0.0, 50, generalisation=0.6), row(4, -1, 90)]
    number, agrees, told = verdict_of(rows)
    assert (number, agrees) == (1, False)
    assert "kappa 0.99" in told[2]


@pytest.mark.parametrize(
    ("changes", "caution"),
    [
        ({"agreement": 0.5}, "Seeds lead to different clusters (adjusted Rand 0.50)"),
        ({"converged": False}, "Not all of its fits have converged"),
    ],
)
def test_cautions(changes, caution):
    best = dataclasses.replace(row(2, 0.0, 50), **changes)
    number, agrees, told = verdict_of([best, row(3, -2.0, 60), Scores(4, 2, "full", failure="ValueError: no")])
    assert (number, agrees) == (0, True)
    assert told[2].startswith(caution)
    assert told[-1] == "1 of 3 settings failed; the table has the causes."


def test_the_edge_of_the_table():
    assert "K = 3 is the largest" in verdict_of([row(2, -1.0, 50), row(3, 0.0, 40)])[2][2]


def test_settings_of_fewer_components_than_clusters_are_no_choice():
    rows = [row(2, 0.0, 50), row(4, -1.0, 60), row(6, -2, 70)]
    assert verdict_of(rows)[0] == 0
    assert verdict_of(rows, 3)[0] == 1
    assert verdict_of(rows, 9)[0] == 0


def test_pixels_are_compared_with_scale_noise():
    other = dataclasses.replace(row(5, 9.0, -900), obs_rep="scale")
    rows = [row(2, 10.0, -9000), other, dataclasses.replace(other, n_components=6, bic=-800, icl=-800)]
    assert verdict_of(rows)[0] == 0
    number, agrees, told = verdict_of(rows, shares_bounds=True)
    assert (number, agrees) == (1, False)
    assert told[0].endswith("columns share their bounds, as pixels do.")
    assert told[2] == "BIC and held-out log-density prefer K = 2, L = 2, diagonal noise."
    assert verdict_of(rows[:1], shares_bounds=True)[0] == 0
