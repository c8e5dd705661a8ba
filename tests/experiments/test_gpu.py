"""The benchmark of GPUs, small and on a CPU: all parts are there, and what fails or comes too late is said."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import gpu
from experiments.benchmarks.sizes import Size
from experiments.benchmarks.torch_mixture import TorchMixture

SIZES = (Size(200, 12, 2, 3),)


def test_all_parts_are_measured_or_say_why_not(tmp_path):
    report = gpu.measure(SIZES, tmp_path, 1e9, small=True)
    assert json.loads((tmp_path / "gpu.json").read_text()) == report
    full = [row for row in report["rows"] if row["precision"] == gpu.FULL and "torch" not in row["part"]]
    assert [row["part"] for row in full] == [
        "fit of 1 step, cold", "EM step", "assignments", "EM step twice", "EM step of a fit", "gradient step",
    ]  # fmt: skip
    assert not [row for row in full if "error" in row]
    assert all(row["seconds"] > 0 for row in full if "seconds" in row)
    twice = full[3]
    assert twice["bit_for_bit"]
    assert twice["finite"]
    if jax.default_backend() == "cpu":
        split = [row for row in report["rows"] if row["precision"] in gpu.SPLIT]
        assert len(split) == 8
        assert all("must name products that the backend has" in row["error"] for row in split)
    assert [table.row_count for table in gpu.tables(report)] == [4, len(report["rows"])]


def test_parts_that_come_too_late_are_left_out(tmp_path):
    report = gpu.measure(SIZES, tmp_path, 0.0, small=True)
    assert {row["error"] for row in report["rows"] + report["rates"]} == {"not run: 0 s were over"}


def test_data_have_the_spectrum_of_images():
    x = np.asarray(gpu.images(Size(3000, 300, 10, 5)), float)
    variances = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    assert x.shape == (3000, 300)
    assert 20 < variances[0] / variances[49] < 80  # of MNIST 43
    assert np.isfinite(x).all()


def test_the_mixture_in_torch_rises():
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    y = rng.standard_normal((300, 3)) + 5 * rng.integers(0, 3, size=(300, 1))
    mixture = TorchMixture(y, 3, "cpu")
    densities = [mixture.step() for _ in range(10)]
    assert (np.diff(densities) > -1e-4).all()
