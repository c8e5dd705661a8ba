"""Fits of unusual data: other scales, constant columns, wild rows, tiny samples, extreme weights.

What may come of one: a fit whose numbers are all finite, or an error that says what is wrong. `hostile.py` counts.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import signal
import time
import warnings
from typing import Any

import jax
import numpy as np
import scipy.sparse
from rich.table import Table

from flax_hmog import (
    AnalyticHMoG,
    ConvergenceWarning,
    DifferentiableHMoG,
    PseudoCounts,
    WarmStartWarning,
    WildRowsWarning,
    fit_em,
    fit_online_em,
    infer,
    warm_start,
)

SHAPES = ((4, 4, 2, 4), (60, 1, 1, 2), (200, 6, 2, 3))  # N, D, L, K: few, to compile little
OUTCOMES = ("finite", "named error", "not finite", "fall as convergence", "nonsense", "unnamed error", "too long")
BAD = OUTCOMES[2:]
LIMIT = 60  # seconds
FALL = 1e-3  # nats per sample and column below the best objective of a fit that says it has converged
NAMED = re.compile(r"^\w+: .*`.+` must .*; got .*\. .*", re.DOTALL)
OURS = (ConvergenceWarning, WarmStartWarning, WildRowsWarning)
DAMAGE = ("scale", "offset", "constant", "duplicates", "collinear", "tails", "outliers", "sparse", "units", "none")


@dataclasses.dataclass(frozen=True)
class Case:
    """One fit.

    Attributes:
        what: names of what was done to the data.
        x: the data.
        sizes: L, K.
        noise: kind.
        options: of the fit.
        online: whether by online EM.
    """

    what: tuple[str, ...]
    x: Any
    sizes: tuple[int, int]
    noise: str
    options: dict[str, Any]
    online: bool


def draw(seed: int) -> Case:
    """A hostile case."""
    rng = np.random.default_rng(seed)
    count, obs_dim, lat_dim, n_components = SHAPES[rng.integers(len(SHAPES))]
    centers = rng.choice([0, 1, 5, 50]) * rng.normal(size=(n_components, obs_dim))
    x: Any = centers[rng.integers(n_components, size=count)] + rng.normal(size=(count, obs_dim))
    what = [str(name) for name in rng.choice(DAMAGE, size=rng.integers(1, 4), replace=False)]
    if "tails" in what:
        x = x * np.abs(rng.standard_t(0.7, size=(count, 1)))
    if "collinear" in what:
        x = x[:, rng.integers(obs_dim, size=obs_dim)] * rng.normal(size=obs_dim)
    if "duplicates" in what:
        x = x[rng.integers(int(rng.integers(1, count)), size=count)]
    if "constant" in what:
        x[:, rng.random(obs_dim) < rng.choice([0.3, 1.0])] = rng.choice([0.0, 1.0, -1e3])
    if "sparse" in what:
        x = np.where(rng.random(x.shape) < 0.9, 0, x)
    if "outliers" in what:
        x[rng.integers(count, size=rng.integers(1, 4))] = 10.0 ** rng.uniform(2, 15)
    if "units" in what:
        x = x * 10.0 ** rng.uniform(-8, 8, obs_dim)
    if "offset" in what:
        x = x + 10.0 ** rng.uniform(0, 9)
    if "scale" in what:
        x = x * 10.0 ** rng.uniform(-18, 18)
    kind = rng.choice(["float32", "float64", "int", "csr"], p=[0.4, 0.4, 0.1, 0.1])
    if kind == "csr":
        x = scipy.sparse.csr_array(x)
    elif kind == "int":
        x = np.clip(np.round(x), -(2**31) + 1, 2**31 - 1).astype(np.int32)
    else:
        x = x.astype(kind)
    options: dict[str, Any] = {"max_steps": int(rng.integers(1, 40))}
    if rng.random() < 0.3:
        options["weights"] = 10.0 ** rng.uniform(-12, 12, count) * (rng.random(count) < 0.8)
    # the same program with labels, known or not; other programs for one structure only
    known = rng.random(count) < rng.choice([0.0, 0.3])
    options["labels"] = np.where(known, rng.integers(n_components, size=count), -1)
    if rng.random() < 0.2:
        options["max_distance"] = np.inf
    if rng.random() < 0.2:
        options["regularizer"] = PseudoCounts(*rng.choice([0, 1e-6, 1], 3))
    noise, online = str(rng.choice(["scale", "diagonal", "full"])), False
    if noise == "diagonal" and obs_dim == SHAPES[-1][1]:
        if rng.random() < 0.2:
            options["regularizer"] = None
        if rng.random() < 0.2:
            options["init"] = "fa"
        if rng.random() < 0.2:
            options["labels"] = None
        if rng.random() < 0.3:
            online = True
            del options["max_steps"]
    return Case((*what, str(kind)), x, (lat_dim, n_components), noise, options, online)


def outcome(case: Case) -> tuple[str, str]:
    """One of `OUTCOMES`, and what it was."""
    head = AnalyticHMoG(*case.sizes, obs_rep=case.noise)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = (fit_online_em if case.online else fit_em)(head, case.x, jax.random.key(0), **case.options)
            dense = case.x.toarray() if scipy.sparse.issparse(case.x) else case.x
            with np.errstate(over="ignore"):
                fits_dtype = np.isfinite(dense.astype(np.float32)).all()
            said = infer(result.natural, dense) if fits_dtype else None
            started = start_of(case, result, dense) if fits_dtype else None
        except (ValueError, TypeError) as error:
            named = NAMED.match(str(error)) is not None
            return ("named error" if named else "unnamed error"), f"{type(error).__name__}: {error}"[:300]
        except TimeoutError:
            return "too long", ""
        except Exception as error:
            return "unnamed error", f"{type(error).__name__}: {error}"[:300]
    warned = {warning.category for warning in caught} & set(OURS)
    for name, tree in {"result": result, "said": said, "started": started}.items():
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(parts_of(tree)) if np.asarray(leaf).dtype.kind == "f"]
        # log p(z | x) of a component that does not explain a row at all may be -inf
        if any(np.isnan(leaf).any() or np.isposinf(leaf).any() for leaf in leaves):
            return "not finite", f"{name}, {warned}"
    history = np.asarray(result.objective_history)
    if result.converged and history.max() - history[-1] > FALL * case.x.shape[1]:
        return "fall as convergence", f"{history.max() - history[-1]:.3g} nats"
    if said is not None:
        sums = np.exp(np.asarray(said.log_responsibilities)).sum(axis=-1)
        if np.abs(sums - 1).max() > 1e-3:
            return "nonsense", f"responsibilities sum to {sums.min():.4g}"
    return "finite", ", ".join(sorted(kind.__name__ for kind in warned))


def parts_of(tree: Any) -> Any:
    """The numbers of a result; those of a frame and of a regulariser, too."""
    return dataclasses.asdict(tree) if dataclasses.is_dataclass(tree) and not isinstance(tree, type) else tree


def start_of(case: Case, result: Any, x: np.ndarray) -> Any:
    """Output of a head that is started from the fit; None where it warns that it cannot hold it."""
    head = DifferentiableHMoG(*case.sizes, obs_rep=case.noise, pst_rep="full")
    with warnings.catch_warnings():
        warnings.simplefilter("error", WarmStartWarning)
        try:
            variables, info = warm_start(head, result.natural, x)
        except WarmStartWarning:
            return None
    return head.apply(variables, x), info


def table_of(count: int, seed: int) -> Table:
    """Counts of outcomes by what was done to the data; a case counts for everything that was."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    slowest, kept = 0.0, []
    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        for number in range(count):
            case, began = draw(seed * 1_000_000 + number), time.perf_counter()
            signal.alarm(LIMIT)
            found, detail = outcome(case)
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - began)
            for name in (*case.what, case.noise, "all"):
                counts[name][found] += 1
            if found in BAD:
                kept.append(
                    f"{number}: {found} ({detail}) {', '.join(case.what)}, {case.noise}, {sorted(case.options)}"
                )
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    table = Table("data", "fits", *OUTCOMES)
    for name in (*sorted(counts.keys() - {"all"}), "all"):
        table.add_row(name, *(str(n) for n in (counts[name].total(), *(counts[name][found] for found in OUTCOMES))))
    table.caption = "\n".join([f"the slowest took {slowest:.1f} s", *kept])
    return table


def _too_long(*_: Any) -> None:
    raise TimeoutError
