"""A table as customers' are: units from 1 to 1e6, missing values, text, a constant column and wild rows."""

import numpy as np
import pandas as pd


def wild_table(n_rows=5000, n_columns=30, n_wild=20, missing=0.05, apart=4.0, seed=0):
    """A table of four clusters, the cluster of every row, -1 for wild ones, and the numbers of these.

    Of the columns one is an identifier, two are text, one is constant; the others follow five factors. Half of the wild
    rows are wild in all numbers, half in one, by a factor of 100 to 1e6.
    """
    rng = np.random.default_rng(seed)
    n_numbers, n_factors = n_columns - 4, min(5, (n_columns - 4) // 2)
    z = rng.choice(4, n_rows, p=[0.4, 0.3, 0.2, 0.1])
    y = apart * rng.normal(size=(4, n_factors))[z] + rng.normal(size=(n_rows, n_factors))
    x = y @ rng.normal(size=(n_factors, n_numbers)) + rng.normal(size=(n_rows, n_numbers))
    spread = x.std(axis=0)
    x[rng.random(x.shape) < missing] = np.nan
    wild = np.sort(rng.choice(n_rows, n_wild, replace=False))
    half = n_wild // 2
    x[wild[:half]] = 8 * spread * rng.standard_t(2, size=(half, n_numbers))
    x[wild[half:], rng.integers(n_numbers, size=n_wild - half)] = 10 ** rng.uniform(2, 6, size=n_wild - half)
    units = 10 ** rng.uniform(0, 6, n_numbers)
    table = pd.DataFrame(units * (x + 10 * rng.normal(size=n_numbers)), columns=[f"v{i}" for i in range(n_numbers)])
    table.insert(0, "customer", [f"C{i:05d}" for i in rng.permutation(n_rows)])
    table.insert(2, "country", rng.choice(["DE", "FR", "IT"], n_rows))
    table["comment"] = rng.choice(["", "late", "good", "bad"], n_rows)
    table["version"] = 47
    return table, np.where(np.isin(np.arange(n_rows), wild), -1, z), wild
