"""The table of sizes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """N samples of D dimensions, L factors, K components."""

    count: int
    obs_dim: int
    lat_dim: int
    n_components: int

    def __str__(self) -> str:
        return f"({self.count}, {self.obs_dim}, {self.lat_dim}, {self.n_components})"


SIZES = {
    "tiny": Size(2000, 64, 10, 10),
    "images-small": Size(60_000, 784, 20, 10),
    "images": Size(60_000, 784, 50, 200),
    "genes": Size(11_000, 2000, 100, 60),
    "text": Size(20_000, 20_000, 400, 80),
}
