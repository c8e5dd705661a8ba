"""Data sets as arrays, split into training and test parts."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flax_hmog.training import Affine


@dataclasses.dataclass(frozen=True)
class Split:
    """Model inputs and labels of one split.

    Attributes:
        train: (N, D) float32.
        test: (M, D) float32.
        train_labels: (N,), for evaluation only.
        test_labels: (M,), for evaluation only.
        preprocessing: what made the inputs from the raw data.
    """

    train: np.ndarray
    test: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray
    preprocessing: Affine


def digits(seed: int, test_share: float) -> Split:
    """scikit-learn's digits, scaled from 0..16 to [0, 1]."""
    raw, labels = load_digits(return_X_y=True)
    preprocessing = Affine.constant(raw.shape[1], scale=16.0)
    train, test, train_labels, test_labels = train_test_split(
        preprocessing(raw), labels, test_size=test_share, random_state=seed
    )
    return Split(train, test, train_labels, test_labels, preprocessing)


def digits_digest() -> str:
    """SHA-256 of the raw digits and labels."""
    raw, labels = load_digits(return_X_y=True)
    return hashlib.sha256(np.ascontiguousarray(raw).tobytes() + labels.astype(np.int64).tobytes()).hexdigest()
