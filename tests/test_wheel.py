"""The wheel, installed alone: it holds every file of the package, and the command works without the source at hand."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "flax_hmog")
CACHES = shutil.ignore_patterns("__pycache__")


def pip(*arguments, python=sys.executable):
    options = ["--python", python, "--disable-pip-version-check", "-q"]
    subprocess.run([sys.executable, "-m", "pip", *options, *map(str, arguments)], check=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: what lies in the folder `build` of a checkout would go into the wheel too."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name, **({"ignore": CACHES} if copy is shutil.copytree else {}))
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder / "dist", folder)
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    files = [path for path in (ROOT / "flax_hmog").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    packed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(packed) == sorted(path.relative_to(ROOT).as_posix() for path in files)


def test_the_command_works_from_the_wheel_alone(wheel, tmp_path):
    """In an environment that has the packages of this one, but for the checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh"], check=True)
    python, bin_folder = tmp_path / "fresh" / "bin" / "python", tmp_path / "fresh" / "bin"
    pip("install", "--no-deps", "--no-index", wheel, python=python)
    site = next((tmp_path / "fresh" / "lib").glob("python*/site-packages"))
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # the .pth files in them, one of which names the checkout, are not read
    (site / "packages.pth").write_text("\n".join(packages))
    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}

    def run(*command):
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def hmog(*arguments):
        return run(bin_folder / "hmog", *arguments)

    assert str(site) in run(python, "-c", "import flax_hmog; print(flax_hmog.__file__)")
    assert "hmog train" in hmog("--help")
    rng = np.random.default_rng(0)
    rows = (np.arange(120) % 3)[:, None] * 4.0 + rng.standard_normal((120, 5))
    np.savetxt(work / "rows.csv", rows, delimiter=",", header="a,b,c,d,e", comments="")
    sizes = [
        "--model.lat-dim",
        "2",
        "--model.n-components",
        "3",
        "--gradient.epochs",
        "1",
        "--gradient.batch-size",
        "16",
    ]
    hmog(
        "train", "file", "--data.path", "rows.csv", "--workdir", "run", "--em.max-steps", "3", "--n-seeds", "1", *sizes
    )
    hmog("report", "run")
    assert "</html>" in (work / "run" / "report.html").read_text()
    hmog("predict", "run", "rows.csv", "--out", "clusters.csv")
    assert len((work / "clusters.csv").read_text().splitlines()) == 121
    hmog("export", "run", "program")
    load = "import numpy as np; from flax_hmog.training import load_program; x = np.zeros((1, 5), np.float32)"
    assert run(python, "-c", f"{load}; print(load_program('program')(x)['log_density'].shape)").strip() == "(1,)"
