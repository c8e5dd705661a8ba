"""Rows in what holds them, and fits of them."""

import jax
import numpy as np
import scipy.sparse as sp

from flax_hmog import AnalyticHMoG, DifferentiableHMoG, fit_em

RNG = np.random.default_rng(0)
CENTERS = 6 * RNG.normal(size=(3, 4))
Y = np.arange(90) % 3
X = (CENTERS[Y] + RNG.normal(size=(90, 4))).astype(np.float32)
COUNTS = sp.csr_matrix(RNG.poisson(0.7, (90, 4)).astype(np.float32))
HEAD, TRAINABLE, KEY = AnalyticHMoG(2, 3), DifferentiableHMoG(2, 3), jax.random.key(0)
NATURAL = fit_em(HEAD, X, KEY, max_steps=1).natural


def fit(data, head=HEAD, **options):
    return fit_em(head, data, KEY, **({"max_steps": 2} | options))


def same_fit(data, array, **options):
    got, want = fit(data, **options), fit(array, **options)
    np.testing.assert_allclose(got.objective_history, want.objective_history, rtol=1e-4)
    np.testing.assert_allclose(got.natural.prior.log_weights, want.natural.prior.log_weights, rtol=1e-3, atol=1e-4)


class OnDisk:
    """Rows that can be sliced, and nothing else: what a file offers at the least."""

    def __init__(self, rows):
        self.rows, self.shape, self.dtype, self.read = rows, rows.shape, rows.dtype, []

    def __getitem__(self, index):
        assert isinstance(index, slice), "slices only"
        assert 0 <= index.start <= index.stop <= len(self.rows)
        self.read.append(index)
        return self.rows[index]


class Tensor:
    """A tensor of another library: seen through `__array__`, or through DLPack only."""

    def __init__(self, rows, through="__array__"):
        self.rows, self.shape, self.dtype, self.through = rows, rows.shape, "tensor.float32", through

    def __getitem__(self, index):
        return Tensor(self.rows[index])

    def __array__(self, dtype=None, copy=None):
        if self.through != "__array__":
            raise TypeError("can't convert device memory to numpy")
        return self.rows

    def __dlpack__(self, **options):
        if self.through == "nothing":
            raise BufferError("requires a gradient")
        return self.rows.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.rows.__dlpack_device__()


class PolarsFrame:
    """A table as polars has it: columns by `get_columns`, no `dtype`."""

    class Column:
        def __init__(self, values):
            self.values, self.dtype = values, "Int64"

        def to_numpy(self):
            return self.values

        def __array__(self, dtype=None, copy=None):
            return self.values

    def __init__(self, columns):
        self.held = columns

    @property
    def shape(self):
        return len(next(iter(self.held.values()))), len(self.held)

    @property
    def columns(self):
        return list(self.held)

    def get_columns(self):
        return [self.Column(np.asarray(values)) for values in self.held.values()]
