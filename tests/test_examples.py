"""The example programs run from a shell as their README says, at small settings, and do what they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
PROGRAMS = sorted(FOLDER.glob("*.py"))
NMI = r"'nmi': (0\.\d+)"
SMALL = {  # options, and what the output says
    "linen_head": (["--epochs", "2", "--em-steps", "3"], [f"linear model: .*{NMI}", f"network, restored: .*{NMI}"]),
    "nnx_head": (
        ["--pretraining", "2", "--em-steps", "3", "--epochs", "1"],
        [rf"start, DifferentiableHMoG: .*{NMI}", rf"end, AnalyticHMoG: .*{NMI}", "steps of EM: 14"],
    ),
    "frozen_features": ([], ["least certain", f"new rows: .*{NMI}", f"k-means, new: .*{NMI}"]),
    "sharded": (
        ["--devices", "2", "--em-steps", "3", "--steps", "2"],
        [
            "devices: 2 .*Explicit",
            r"objective on one and on all: (\d+\.\d)\d* \1",
            r"log-densities differ by \d\.\de-0[3-9]",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_runs(program):
    options, lines = SMALL[program.stem]
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, "-W", "error:::flax_hmog", program, *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for line in lines:
        found = re.search(line, run.stdout)
        assert found, f"{line!r} in {run.stdout}"
        if line.endswith(NMI):
            assert float(found[1]) > 0.3  # of chance it would be 0


def test_examples_are_listed_and_short():
    text = (FOLDER / "README.md").read_text()
    assert set(SMALL) == {path.stem for path in PROGRAMS}
    for path in PROGRAMS:
        assert f"[{path.name}]" in text
        assert len(path.read_text().splitlines()) < 120
    assert len(text.splitlines()) < 60
