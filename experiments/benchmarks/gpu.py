"""The library on one GPU, in under five minutes: `python -m experiments.benchmarks.gpu --out FOLDER [--small]`.

Needs jax, flax, optax, orbax, numpy, scikit-learn and rich. Seconds of a plain and of an accelerated step of EM, of a
gradient step and of assignments, beside those of the matrix products that each needs at the same precision, in the same
run; the most memory so far; what a precision changes in the mean log-density; and if the same step twice is the same,
bit for bit. Beside them an iteration of scikit-learn's mixture and of one in torch, where that is installed, on data
projected to L. What fails is a row of the table with its error, and what no time is left for says so. Data are drawn:
their spectrum is that of MNIST.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import experiments  # noqa: F401  sets the environment before jax is imported

try:
    import jaxtyping  # noqa: F401
except ModuleNotFoundError:  # annotations are never evaluated here, so that names suffice
    sys.modules["jaxtyping"] = types.SimpleNamespace(Float=None, Int=None, PyTree=None)  # type: ignore[assignment]

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.measure import gradient, median_time, one_time, product_times
from experiments.benchmarks.sizes import Size
from experiments.benchmarks.torch_mixture import TorchMixture
from flax_hmog import AnalyticHMoG, Natural, Regularizer, em_step, fit_em, infer
from flax_hmog.em.cycles import FEWEST_COMPONENTS
from flax_hmog.model.kinds import matmul

SIZES = tuple(Size(60_000, 784, *size) for size in ((20, 10), (50, 50), (50, 200), (50, 1000)))
SMALL = (Size(600, 40, 5, 3), Size(600, 40, 6, 40))
FULL, SPLIT = "float32", ("TF32_TF32_F32_X3", "BF16_BF16_F32_X6")
REPEATS, STEPS = 5, 3
MOST_ON_HOST = 50  # components of scikit-learn's mixture, which takes minutes with more
CLUSTERS = 2000  # of the data
SQUARE, SMALL_SQUARE = 8192, 256  # sides of the matrices of the rate


def main() -> None:
    """Measure, print the table, and write `gpu.json`."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of gpu.json")
    parser.add_argument("--small", action="store_true", help="sizes for a trial on a CPU")
    parser.add_argument("--seconds", type=float, default=270.0, help="after which no part begins any more")
    arguments = parser.parse_args()
    report = measure(SMALL if arguments.small else SIZES, arguments.out, arguments.seconds, small=arguments.small)
    Console(width=170).print(*tables(report))


def measure(sizes: tuple[Size, ...], out: Path, seconds: float, *, small: bool = False) -> dict[str, Any]:
    """All parts at all sizes, the most needed first; written down after each."""
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
    report: dict[str, Any] = {
        "command": " ".join(["python -m experiments.benchmarks.gpu", *sys.argv[1:]]),
        "device": device.device_kind,
        "platform": f"{device.platform} {getattr(device.client, 'platform_version', '')}".strip(),
        "versions": versions,
        "rates": [],
        "rows": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    begin, side = time.perf_counter(), SMALL_SQUARE if small else SQUARE
    parts: list[tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = [
        ("rates", {"precision": name}, partial(rate, side, name)) for name in (FULL, "default", *SPLIT)
    ]
    cases = [Case(size) for size in sizes]
    for kind in (full_parts, split_parts, fits, peers, gradients):
        for number, case in enumerate(cases):
            for part, precision, call in kind(case):
                names = {"order": number, "size": str(case.size), "part": part, "precision": precision}
                parts.append(("rows", names, call))
    for table, names, call in parts:
        start = time.perf_counter()
        row = attempt(call) if start - begin < seconds else {"error": f"not run: {seconds:.0f} s were over"}
        report[table].append(names | row | {"part_seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()})
        report["seconds"] = time.perf_counter() - begin
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part found, or its error."""
    try:
        return call()
    except Exception as error:  # the rest goes on
        return {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}


def peak_bytes() -> int | None:
    """The most bytes of the device in use so far; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def products(precision: str) -> Any:
    """The context in which products have a precision."""
    return nullcontext() if precision == FULL else jax.default_matmul_precision(precision)


def rate(side: int, precision: str) -> dict[str, Any]:
    """Operations per second of a product of square matrices; "default" is that of the device's own choice."""
    square = jax.random.normal(jax.random.key(0), (side, side))
    exact = matmul(square[:256], square)
    with products(FULL if precision == "default" else precision):
        product = jax.jit(jnp.matmul if precision == "default" else matmul)
        seconds = median_time(product, square, square, repeats=REPEATS)
        error = jnp.linalg.norm(product(square, square)[:256] - exact) / jnp.linalg.norm(exact)
    return {"seconds": seconds, "tera_per_second": 2e-12 * side**3 / seconds, "relative_error": float(error)}


@dataclasses.dataclass
class Case:
    """Data of one size and a model of them, made when they are first asked for; the failure to is kept.

    Attributes:
        size: N, D, L, K.
    """

    size: Size
    _made: Any = None

    def made(self) -> tuple[jax.Array, Natural, Regularizer, float]:
        """Rows (N, D), a model after a step, its regulariser, and the seconds until it was there."""
        if isinstance(self._made, Exception):
            raise self._made
        try:
            self._made = self._made or self._make()
        except Exception as error:
            self._made = error
            raise
        return self._made

    def _make(self) -> tuple[jax.Array, Natural, Regularizer, float]:
        x = images(self.size)
        start = time.perf_counter()
        fit = fit_em(self.head(), x, jax.random.key(0), max_steps=1, tolerance=0.0)
        jax.block_until_ready(fit.natural)
        if fit.regularizer is None:
            raise ValueError("fit_em: `regularizer` must be in the result.")
        return x, fit.natural, fit.regularizer, time.perf_counter() - start

    def head(self) -> AnalyticHMoG:
        """The head of this size."""
        return AnalyticHMoG(self.size.lat_dim, self.size.n_components)


def images(size: Size) -> jax.Array:
    """Rows (N, D) with variances that fall as those of MNIST do, of 2000 tight clusters."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.standard_normal((size.obs_dim, min(size.obs_dim, 200))))
    scale = np.sqrt(5 / (1 + np.arange(axes.shape[1]) / 5) ** 1.6)
    centres = rng.standard_normal((CLUSTERS, axes.shape[1])) * scale
    noise, drawn = 0.05, rng.integers(CLUSTERS, size=size.count)

    @jax.jit
    def rows(key: jax.Array, centre: jax.Array, spread: jax.Array, basis: jax.Array) -> jax.Array:
        latent, rest = jax.random.split(key)
        y = 0.9 * centre + 0.4 * spread[None] * jax.random.normal(latent, centre.shape)
        return 0.3 + matmul(y, basis) / 2 + noise * jax.random.normal(rest, (len(centre), size.obs_dim))

    given = (np.asarray(part, np.float32) for part in (centres[drawn], scale, axes.T))
    return jax.block_until_ready(rows(jax.random.key(0), *given))


Parts: TypeAlias = Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]
"""Name, precision and call of each."""


def full_parts(case: Case) -> Parts:
    """The passes in full float32."""
    yield "fit of 1 step, cold", FULL, lambda: {"seconds": case.made()[3]}
    yield "EM step", FULL, lambda: timed(case, "em", FULL)
    yield "assignments", FULL, lambda: timed(case, "assign", FULL)
    yield "EM step twice", FULL, lambda: repeated(case)


def split_parts(case: Case) -> Parts:
    """The passes by products of fewer digits."""
    for precision in SPLIT:
        yield "log-density", precision, partial(changed, case, precision)
        yield "EM step", precision, partial(timed, case, "em", precision)
        yield "assignments", precision, partial(timed, case, "assign", precision)


def fits(case: Case) -> Parts:
    """Steps of fits, plain and accelerated where there are enough components."""
    yield "EM step of a fit", FULL, lambda: fitted(case, accelerate=False)
    if case.size.n_components >= FEWEST_COMPONENTS:
        yield "accelerated step of a fit", FULL, lambda: fitted(case, accelerate=True)


def peers(case: Case) -> Parts:
    """An iteration of a plain mixture, on data projected to L."""
    yield "torch mixture, L columns", FULL, lambda: torch_iteration(case)
    if case.size.n_components <= MOST_ON_HOST:
        yield "scikit-learn mixture, L columns", "float64, host", lambda: host_iteration(case)


def gradients(case: Case) -> Parts:
    """A step of Adam."""
    for precision in (FULL, *SPLIT):
        yield "gradient step", precision, partial(timed, case, "gradient", precision)


def timed(case: Case, task: str, precision: str) -> dict[str, Any]:
    """Seconds of a task, and of the products that it needs, each alone at the same precision."""
    x, natural, regularizer, _ = case.made()
    with products(precision):
        call: Callable = {
            "em": lambda: lambda: em_step(natural, x, None, regularizer),
            "assign": lambda: lambda: infer(natural, x).log_responsibilities,
            "gradient": lambda: gradient(case.size, x),
        }[task]()
        first = one_time(call)
        seconds = median_time(call, repeats=REPEATS)
        needed = product_times(case.size, full=task != "gradient", repeats=REPEATS)
    needed = needed[:2] if task == "assign" else needed
    return {"seconds": seconds, "compile_seconds": first - seconds, "product_seconds": sum(needed)}


def repeated(case: Case) -> dict[str, Any]:
    """If the same step gives the same bits, and all of them are finite."""
    x, natural, regularizer, _ = case.made()
    once, again = (jax.tree.leaves(em_step(natural, x, None, regularizer)) for _ in range(2))
    return {
        "bit_for_bit": all(bool((a == b).all()) for a, b in zip(once, again, strict=True)),
        "finite": all(bool(jnp.isfinite(a).all()) for a in once),
    }


def fitted(case: Case, *, accelerate: bool) -> dict[str, Any]:
    """Seconds per step of a fit from the model, compiled before, and its last objective."""
    x, natural, regularizer, _ = case.made()
    options: dict[str, Any] = {"init": natural, "regularizer": regularizer, "max_steps": STEPS, "tolerance": -np.inf}

    def fit() -> Any:
        return fit_em(case.head(), x, jax.random.key(0), accelerate=accelerate, **options)

    start = time.perf_counter()
    fit()
    between = time.perf_counter()
    result = fit()
    seconds = time.perf_counter() - between
    found = {"seconds": seconds / (STEPS + 1), "compile_seconds": between - start - seconds}
    return found | {"objective": float(result.objective_history[-1]), "sparse": result.sparse is not None}


def changed(case: Case, precision: str) -> dict[str, Any]:
    """What a precision changes in log-densities, in nats per row: on average and at most."""
    x, natural, *_ = case.made()
    full = np.asarray(infer(natural, x).log_density, np.float64)
    with products(precision):
        gap = np.asarray(infer(natural, x).log_density, np.float64) - full
    return {"mean_change": float(gap.mean()), "largest_change": float(np.abs(gap).max())}


def projected(case: Case) -> np.ndarray:
    """Leading coordinates (N, L) of the rows."""
    x = case.made()[0]
    centered = x - x.mean(axis=0)[None]
    _, axes = jnp.linalg.eigh(matmul(centered.T, centered))
    return np.asarray(matmul(centered, axes[:, -case.size.lat_dim :]))


def torch_iteration(case: Case) -> dict[str, Any]:
    """Seconds of an iteration in torch, on its GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    mixture = TorchMixture(projected(case), case.size.n_components, device)
    mixture.step()
    seconds = float(np.median([one_time(mixture.step) for _ in range(3)]))
    return {"seconds": seconds, "versions": torch.__version__, "on": device}


def host_iteration(case: Case) -> dict[str, Any]:
    """Seconds of an iteration of scikit-learn's mixture."""
    from sklearn.mixture import GaussianMixture

    y, k = projected(case), case.size.n_components
    start = {"means_init": y[:k], "weights_init": np.full(k, 1 / k)}
    start["precisions_init"] = np.tile(np.linalg.inv(np.cov(y.T)), (k, 1, 1))
    fit = lambda steps: GaussianMixture(k, max_iter=steps, tol=0, reg_covar=1e-3, **start).fit(y)  # noqa: E731
    once, thrice = (one_time(fit, steps) for steps in (1, 3))
    return {"seconds": (thrice - once) / 2}


def tables(report: dict[str, Any]) -> list[Table]:
    """The tables of a report."""
    title = f"{report['device']}, jax {report['versions']['jax']}"
    rates = Table("precision", "10^12 operations / s", "relative error", "", title=f"{title}: products of squares")
    for row in report["rates"]:
        shown = ("", "") if "error" in row else (f"{row['tera_per_second']:.2f}", f"{row['relative_error']:.1e}")
        rates.add_row(row["precision"], *shown, row.get("error", ""))
    names = ("(N, D, L, K)", "part", "precision", "seconds", "products", "share", "compile", "peak GB", "notes")
    found = Table(*names, title=f"{title}: seconds, medians of {REPEATS}; {report['seconds']:.0f} s in all")
    for row in sorted(report["rows"], key=lambda row: row["order"]):
        seconds, needed = row.get("seconds"), row.get("product_seconds")
        found.add_row(
            row["size"], row["part"], row["precision"],
            "" if seconds is None else f"{seconds:.4f}",
            "" if needed is None else f"{needed:.4f}",
            "" if needed is None else f"{100 * needed / seconds:.0f} %",
            f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
            notes(row),
        )  # fmt: skip
    return [rates, found]


def notes(row: dict[str, Any]) -> str:
    """What else a part found."""
    names = ("error", "bit_for_bit", "finite", "objective", "sparse", "mean_change", "largest_change", "on")
    return ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in names if name in row)


if __name__ == "__main__":
    main()
