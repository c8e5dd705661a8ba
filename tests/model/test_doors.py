"""Errors carry the name of the public function that a user called, not of one inside of it."""

import inspect
import pickle
import threading
import timeit

import jax
import numpy as np
import pytest

import flax_hmog
from flax_hmog import AnalyticHMoG, DifferentiableHMoG, EMOptions, analysis, fit_em, fit_online_em
from flax_hmog.model.checks import OUTSIDE, door, public
from flax_hmog.toy import head, natural, variables, x

KEY = jax.random.key(0)
WIDE = np.zeros((3, 9), np.float32)
HEAD = DifferentiableHMoG(2, 3)
CALLS = [
    ("mean_to_natural: `mean`", lambda: flax_hmog.mean_to_natural(natural)),
    ("negative_entropy: `mean`", lambda: flax_hmog.negative_entropy(natural)),
    ("infer_blocks: `data`", lambda: flax_hmog.infer_blocks(natural, WIDE)),
    ("fit_em: `data`", lambda: fit_em(head, [np.full((3, 4), np.nan)], KEY)),
    ("fit_em: `max_steps`", lambda: fit_em(head, x, KEY, max_steps=0)),
    ("EMOptions: `max_steps`", lambda: EMOptions(max_steps=0)),
    ("fit_online_em: `init`", lambda: fit_online_em(AnalyticHMoG(1, 2), x, KEY, init=natural)),
    ("DifferentiableHMoG: `lat_dim`", lambda: DifferentiableHMoG(9, 3).init(KEY, x)),
    ("AnalyticHMoG: `x`", lambda: head.apply(variables, WIDE)),
    ("AnalyticHMoG.latent_mean: `x`", lambda: head.apply(variables, WIDE, method="latent_mean")),
    ("merge_components: `log_responsibilities`", lambda: analysis.merge_components(np.ones((3, 2)), 2)),
]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[name for name, _ in CALLS])
def test_an_error_names_what_was_called(name, call):
    with pytest.raises((TypeError, ValueError), match=name):
        call()
    assert door() == OUTSIDE


def test_what_a_fit_calls_back_is_a_user():
    def on_step(state):
        flax_hmog.infer(natural, WIDE)

    with pytest.raises(ValueError, match=r"^infer: `x`"):
        fit_em(head, x, KEY, on_step=on_step)


def test_threads_have_names_of_their_own():
    names, ready, done = [], threading.Barrier(2), threading.Barrier(2)

    def first():
        ready.wait()
        names.append(door())
        done.wait()

    def second():
        ready.wait()
        done.wait()

    threads = [threading.Thread(target=public(function)) for function in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == ["first"]


def test_a_marked_function_is_what_it_was():
    infer = flax_hmog.infer
    assert list(inspect.signature(infer).parameters) == ["natural", "x", "missing"]
    assert pickle.loads(pickle.dumps(infer)) is infer
    assert "def infer(" in inspect.getsource(infer)
    np.testing.assert_array_equal(jax.jit(infer)(natural, x).latent_mean, infer(natural, x).latent_mean)


def test_a_mark_costs_a_microsecond():
    marked = public(lambda: None)
    assert min(timeit.repeat(marked, number=1000, repeat=20)) / 1000 < 5e-6
