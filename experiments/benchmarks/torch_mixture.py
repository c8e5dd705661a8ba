"""An iteration of EM for a plain mixture of Gaussians in torch, with full covariances, as the peer on GPUs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

CHUNK_FLOATS = 2**28  # of the whitened rows of a few components at a time


class TorchMixture:
    """Weights (K,), means (K, L) and Cholesky factors of covariances (K, L, L) on rows (N, L), in float32.

    Args:
        y: rows, already projected to L dimensions.
        n_components: K; means are rows drawn at random, covariances those of all rows.
        device: a torch device, as "cuda".
    """

    def __init__(self, y: np.ndarray, n_components: int, device: str) -> None:
        import torch

        self.torch: Any = torch
        self.y = torch.as_tensor(y, dtype=torch.float32, device=device)
        chosen = np.random.default_rng(0).choice(len(y), n_components, replace=False)
        self.means = self.y[torch.as_tensor(chosen, device=device)].clone()
        covariance = torch.cov(self.y.T) + 1e-3 * torch.eye(self.y.shape[1], device=device)
        self.factors = torch.linalg.cholesky(covariance).repeat(n_components, 1, 1)
        self.log_weights = torch.full((n_components,), -math.log(n_components), device=device)

    def step(self) -> float:
        """One iteration; the mean log-density of the rows before it, once the device has finished."""
        torch, (count, dim) = self.torch, self.y.shape
        logits = torch.empty((count, len(self.means)), device=self.y.device)
        size = max(1, CHUNK_FLOATS // (count * dim))
        for start in range(0, len(self.means), size):
            factors, means = self.factors[start : start + size], self.means[start : start + size]
            identity = torch.eye(dim, device=self.y.device).expand_as(factors)
            roots = torch.linalg.solve_triangular(factors, identity, upper=False)
            # |F^-1 (y - m)|^2, a product with all rows for each component
            white = self.y @ roots.mT - (means[:, None] @ roots.mT)
            log_det = torch.diagonal(factors, dim1=-2, dim2=-1).log().sum(-1)
            logits[:, start : start + size] = -(white.square().sum(-1) / 2 + log_det[:, None]).T
        logits += self.log_weights - dim * math.log(2 * math.pi) / 2
        evidence = torch.logsumexp(logits, dim=1, keepdim=True)
        gamma = torch.exp(logits - evidence)
        mass = gamma.sum(0) + 1e-6
        self.log_weights, self.means = (mass / count).log(), (gamma.T @ self.y) / mass[:, None]
        for start in range(0, len(self.means), size):
            here = slice(start, start + size)
            # sum of gamma y y', then less the mean's
            second = (gamma[:, here].T[:, :, None] * self.y).mT @ self.y / mass[here, None, None]
            second = second - self.means[here, :, None] * self.means[here, None]
            self.factors[here] = torch.linalg.cholesky(second + 1e-3 * torch.eye(dim, device=self.y.device))
        return float(evidence.mean())
