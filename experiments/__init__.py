"""Experiments: one config each, a shared training loop, benchmarks and reports."""

import os

# XLA's CPU factorisations share OpenBLAS with scipy, whose threads fight those of XLA; read before the first import
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
