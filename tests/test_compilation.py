"""One result however a function is run, and no program compiled twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, FEW, SOME
from dense import assert_close

import flax_hmog
from flax_hmog import (
    fit_em,
    infer,
    initialize_moments,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
    posterior_at,
    split_conjugated,
)


@SOME
def test_eager_jit_vmap_and_a_loop_agree(case, float64):
    x, natural = case.x(), case.natural()
    for function in (infer, posterior_at):
        compiled = function(natural, x)
        with jax.disable_jit():
            others = {"eager": function(natural, x)}
            rows = [function(natural, row) for row in x]
            others["loop"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        others["jit"] = jax.jit(function)(natural, x)
        others["vmap"] = jax.vmap(function, in_axes=(None, 0))(natural, x)
        for how, other in others.items():
            for field in vars(compiled):
                got, want = getattr(other, field), getattr(compiled, field)
                if function is posterior_at and field != "location":
                    if how in ("eager", "jit"):
                        jax.tree.map(np.testing.assert_array_equal, got, want)
                    continue
                assert_close(got, want, 1e-12, f"{how} {field}")


def test_vmap_over_models_agrees_with_a_loop(float64):
    case = FEW[0]
    models = [case.natural(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.vmap(infer, in_axes=(0, None))(stacked, case.x())
    for index, model in enumerate(models):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], together)
        jax.tree.map(lambda got, want: assert_close(got, want, 1e-12), one, infer(model, case.x()))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, list], ids=["numpy", "jax", "list"])
@pytest.mark.parametrize("name", ["em_step", "expected_statistics", "mean_log_density"])
def test_a_compiled_function_may_close_over_rows_and_weights(name, kind):
    """The values of weights are known while it is traced, and are checked."""
    function, natural, x = getattr(flax_hmog, name), CASE.natural("float32"), jnp.asarray(CASE.x(), jnp.float32)
    weights, negative = kind(np.ones(len(x))), kind(-np.ones(len(x)))
    got = jax.jit(lambda natural: function(natural, x, weights=weights))(natural)
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-5), got, function(natural, x))
    with pytest.raises(ValueError, match="`weights` must be finite, at least 0"):
        jax.jit(lambda natural: function(natural, x, weights=negative))(natural)


CASE = CASES["analytic-diagonal-full-4.2.3"]
OF_DATA = (
    "infer", "log_observable_density", "posterior_at", "posterior_categorical", "posterior_soft_assignments",
    "posterior_hard_assignment", "latent_mean", "expected_statistics", "em_step",
)  # fmt: skip
OF_NATURAL = ("natural_to_moments", "natural_to_mean", "log_partition", "split_conjugated")
OF_MEAN = ("mean_to_natural", "negative_entropy", "whiten_prior")


def calls():
    """Every public function of values, as a function of the seed of a model and the data."""
    head, natural = CASE.head("float32"), lambda seed: CASE.natural("float32", seed)
    moments, mean = (lambda seed: natural_to_moments(natural(seed))), (lambda seed: natural_to_mean(natural(seed)))
    table = {name: lambda seed, x, name=name: getattr(flax_hmog, name)(natural(seed), x) for name in OF_DATA}
    table |= {name: lambda seed, x, name=name: getattr(flax_hmog, name)(natural(seed)) for name in OF_NATURAL}
    table |= {name: lambda seed, x, name=name: getattr(flax_hmog, name)(mean(seed)) for name in OF_MEAN}
    flat = lambda seed: flax_hmog.ravel_natural(natural(seed), head)  # noqa: E731
    return table | {
        "moments_to_natural": lambda seed, x: moments_to_natural(moments(seed)),
        "join_conjugated": lambda seed, x: flax_hmog.join_conjugated(*split_conjugated(natural(seed))),
        "kl_divergence": lambda seed, x: flax_hmog.kl_divergence(natural(seed), natural(0)),
        "sample": lambda seed, x: flax_hmog.sample(natural(seed), jax.random.key(seed), 7),
        "ravel_natural": lambda seed, x: flat(seed),
        "unravel_natural": lambda seed, x: flax_hmog.unravel_natural(flat(seed), head),
        "ravel_mean": lambda seed, x: flax_hmog.ravel_mean(mean(seed), head),
        "unravel_mean": lambda seed, x: flax_hmog.unravel_mean(flax_hmog.ravel_mean(mean(seed), head), head),
        "initialize_moments": lambda seed, x: initialize_moments(head, x, jax.random.key(seed)),
        "fit_em": lambda seed, x: fit_em(head, x, jax.random.key(seed), max_steps=2).info,
        "apply": lambda seed, x: head.apply(CASE.variables("float32", seed), x),
    }


@pytest.mark.parametrize("name", calls())
def test_a_second_call_compiles_nothing(name, compilations):
    """Also with other values, which is another epoch or another model of the same size."""
    call, x = calls()[name], CASE.x().astype(np.float32)
    call(0, x)
    CASE.natural("float32", 1), CASE.variables("float32", 1)
    assert compilations(call, 0, x) == 0
    assert compilations(call, 1, x + 1) == 0


def test_another_shape_is_another_program(compilations):
    """What shows that compilations are counted."""
    x = CASE.x().astype(np.float32)
    infer(CASE.natural("float32"), x)
    another = CASE.x(37).astype(np.float32)  # as no other test has
    assert compilations(infer, CASE.natural("float32"), another) > 0
