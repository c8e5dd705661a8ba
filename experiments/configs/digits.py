"""Handwritten digits: does one joint model beat reduction followed by clustering?

Command: `python -m experiments.train digits`, then `python -m experiments.analyze runs/digits` (`make demo`).
Data: scikit-learn's 1,797 digits of 8 x 8 pixels, scaled to [0, 1]; 20 % held out, five seeds.
Expected on the test split: docs/results.md.
The kind of the noise and the strength of its regulariser were chosen without labels, by held-out likelihood and the
stability of assignments between halves of the training data: `python -m experiments.select_digits`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, PseudoCounts, SymmetricHMoG

Kind = Literal["scale", "diagonal", "full"]


@dataclasses.dataclass(frozen=True)
class Digits:
    """Configuration of the digits experiment."""

    workdir: str = "runs/digits"
    """Folder of the run: checkpoints, metrics and report. A run that is there is resumed."""
    head: Literal["differentiable", "symmetric"] = "differentiable"
    """Head that the report describes; both are trained and stand in the table."""
    n_seeds: int = 5
    """Seeds 0 .. n_seeds-1, each with its own split of the data, initialisation and batches."""
    test_share: float = 0.2
    """Share of the samples that is held out."""
    lat_dim: int = 10
    """Latent dimension L."""
    n_components: int = 10
    """Number of clusters K."""
    obs_rep: Kind = "full"
    """Kind of the noise covariance."""
    pst_rep: Kind = "full"
    """Kind of the posterior precisions of the differentiable head."""
    lat_rep: Kind = "full"
    """Kind of the differences between component precisions of the symmetric head."""
    noise_pseudo_share: float = 1.0
    """Regulariser: pseudo-samples of the initial noise, per training sample."""
    noise_floor: float = 0.005
    """Regulariser: smallest variance of a pseudo-sample, as a share of the average noise variance."""
    component_pseudo_count: float = 0.2
    """Regulariser: pseudo-samples of each component."""
    n_restarts: int = 3
    """EM starts per seed; the best objective wins."""
    em_steps: int = 200
    """EM steps per start at most."""
    em_tolerance: float = 1e-3
    """Gain of the EM objective, in nats per sample, below which a start has converged."""
    epochs: int = 20
    """Epochs of gradient fine-tuning of each head."""
    batch_size: int = 256
    """Samples per gradient step; a multiple of the number of devices."""
    learning_rate: float = 1e-3
    """Adam's learning rate, decayed to 0 by a cosine."""
    save_every: int = 10
    """Epochs between checkpoints."""

    def __post_init__(self) -> None:
        """Named errors for values that make no run."""
        for name in (
            "n_seeds",
            "lat_dim",
            "n_components",
            "n_restarts",
            "em_steps",
            "epochs",
            "batch_size",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Digits: `{name}` must be at least 1; got {getattr(self, name)}. Give a positive number."
                )
        if not 0 < self.test_share < 1:
            raise ValueError(f"Digits: `test_share` must lie between 0 and 1; got {self.test_share}. Hold out a part.")
        if not self.learning_rate > 0:
            raise ValueError(f"Digits: `learning_rate` must be positive; got {self.learning_rate}. Try 1e-3.")
        self.analytic, self.trainable  # noqa: B018  dimensions are checked by the heads

    @property
    def analytic(self) -> AnalyticHMoG:
        """The head that EM fits."""
        return AnalyticHMoG(self.lat_dim, self.n_components, 64, self.obs_rep)

    @property
    def trainable(self) -> dict[str, DifferentiableHMoG | SymmetricHMoG]:
        """The heads that gradients fine-tune, by name."""
        return {
            "differentiable": DifferentiableHMoG(self.lat_dim, self.n_components, 64, self.obs_rep, self.pst_rep),
            "symmetric": SymmetricHMoG(self.lat_dim, self.n_components, 64, self.obs_rep, self.lat_rep),
        }

    def pseudo_counts(self, n_samples: int) -> PseudoCounts:
        """The regulariser's strength for this many training samples."""
        return PseudoCounts(
            components=self.component_pseudo_count,
            noise=self.noise_pseudo_share * n_samples,
            noise_floor=self.noise_floor,
        )
