"""Errors carry the name of the public function that a user called, and of no function inside of it."""

import inspect
import pickle
import threading
import timeit

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_hmog
from flax_hmog import AnalyticHMoG, EMOptions, analysis, fit_em, fit_online_em, infer, mean_to_natural, negative_entropy
from flax_hmog.em.options import EMOptions as SameOptions
from flax_hmog.model.checks import OUTSIDE, door, public
from flax_hmog.networks import Clusterer, loading_penalty
from flax_hmog.toy import head, mean, model, natural, variables, x

TOO_WIDE = np.zeros((3, 9), np.float32)
CALLS = [
    ("mean_to_natural: `mean`", lambda: mean_to_natural(natural)),
    ("negative_entropy: `mean`", lambda: negative_entropy(natural)),
    ("loading_penalty: `natural`", lambda: loading_penalty(mean)),
    ("posterior_assignments: `x`", lambda: flax_hmog.posterior_assignments(natural, TOO_WIDE)),
    ("infer_blocks: `data`", lambda: flax_hmog.infer_blocks(natural, TOO_WIDE)),
    ("fit_em: `data`", lambda: fit_em(head, [np.full((3, 4), np.nan)], jax.random.key(0))),
    ("fit_online_em: `init`", lambda: fit_online_em(AnalyticHMoG(1, 2), x, jax.random.key(0), init=natural)),
    ("fit_em: `max_steps`", lambda: fit_em(head, x, jax.random.key(0), max_steps=0)),
    ("EMOptions: `max_steps`", lambda: EMOptions(max_steps=0)),
    ("DifferentiableHMoG: `x`", lambda: model.apply(variables, TOO_WIDE)),
    ("DifferentiableHMoG.latent_mean: `x`", lambda: model.apply(variables, TOO_WIDE, method="latent_mean")),
    ("DifferentiableHMoG: `lat_dim`", lambda: model.clone(lat_dim=9).init(jax.random.key(0), x)),
    ("merge_components: `log_responsibilities`", lambda: analysis.merge_components(np.ones((3, 2)), 2)),
]
