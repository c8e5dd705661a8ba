"""Every Python block of README and docs runs; every public name stands in the API pages, with an example."""

import ast
import os
import re
from pathlib import Path

import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import flax_hmog
import flax_hmog.analysis
import flax_hmog.networks
import flax_hmog.nnx
import flax_hmog.recipe
import flax_hmog.sklearn
import flax_hmog.training

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "api").glob("*.md"))]
TRAINING = {"images.md"}  # whose blocks train longer than they compile
PACKAGES = (
    flax_hmog, flax_hmog.networks, flax_hmog.nnx, flax_hmog.analysis, flax_hmog.training, flax_hmog.recipe, flax_hmog.sklearn,
)  # fmt: skip
SHOWN_ELSEWHERE = {"RULES", "Statistics", "WarmStartInfo"}  # a table, and what a function with an example returns
QUESTIONS = {"What", "Where", "Whether", "Which", "Whose", "When", "How", "Of", "Why"}
LONG = {
    "checkpoints.md", "choosing.md", "derivations.md", "encoders.md", "features.md", "images.md", "model.md", "nnx.md",
    "performance.md", "report.md", "sharp_bits.md", "serving.md", "single_cells.md", "sklearn.md", "tables.md", "training.md",
}  # fmt: skip


def pages_with_code():
    for page in PAGES:
        if "```python" in page.read_text():
            yield pytest.param(page, marks=[pytest.mark.slow] * (page.name in LONG), id=page.name)


@pytest.mark.parametrize("page", list(pages_with_code()))
def test_code_blocks_run(page, tmp_path, monkeypatch, request):
    if page.name in TRAINING:
        request.getfixturevalue("optimized")
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(page)
    examples = list(document.examples())
    assert len(examples) == page.read_text().count("```python")
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # the suite forbids it to the library, not to its users
        for example in examples:
            example.evaluate()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_every_public_name_stands_in_the_api_pages(package):
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    missing = [name for name in package.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_every_public_name_has_an_example(package):
    missing = [name for name in package.__all__ if ">>>" not in (getattr(package, name).__doc__ or "")]
    assert set(missing) <= SHOWN_ELSEWHERE


def test_docstrings_say_what_a_thing_is():
    """A noun or a verb, not a question: "True if ...", not "Whether ..."."""
    questions = []
    for path in sorted(Path(flax_hmog.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                questions += [f"{path.name}: {line}"] * (line.partition(" ")[0] in QUESTIONS)
    assert not questions


def test_rows_of_surprises_name_what_keeps_them():
    """A test that is there, by its file and name, or a script in findings, which its README lists."""
    lines = (ROOT / "docs" / "surprises.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("|---", "| from memory"))]
    listed = (ROOT / "findings" / "README.md").read_text()
    for row in rows:
        keepers = re.findall(r"`([^`]+)`", row.split(" | ")[-1])
        assert keepers, row
        for keeper in keepers:
            path, _, function = keeper.partition("::")
            assert not function or f"def {function}(" in (ROOT / path).read_text()
            assert (ROOT / path).is_file()
            assert not path.startswith("findings/") or f"({path.removeprefix('findings/')})" in listed
    assert {path.stem for path in (ROOT / "findings").glob("*.sh")} == set(re.findall(r"\| \[([\w-]+)\]\(", listed))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not os.path.exists(page.parent / target)]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_that_pages_name_exist(page):
    named = re.findall(r"`([\w./-]+\.(?:py|sh|sbatch|html))`", page.read_text())
    folders = [ROOT, ROOT / "flax_hmog", ROOT / "flax_hmog" / "model", ROOT / "experiments" / "launch"]
    assert not [name for name in named if not any((folder / name).exists() for folder in folders)]
