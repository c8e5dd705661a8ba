"""Programs as ONNX, in an environment of their own: onnxruntime answers as they do."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-onnx" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not (PYTHON.parents[1] / ".ready").exists(), reason="jax2onnx is not installed: `make onnx`")
def test_onnxruntime_answers_as_programs_do():
    command = [PYTHON, "-m", "experiments.benchmarks.onnx", "symmetric", "network", "far"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    for name, measured in json.loads(run.stdout).items():
        assert measured["difference"].pop("assignment") == 0, name
        assert max(measured["difference"].values()) < 1e-5, name
