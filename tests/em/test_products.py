"""Products of fewer digits: which names count, where they are refused, and what a fit does with those that are too few."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW

from flax_hmog import AnalyticHMoG, fit_em, infer, mean_log_density
from flax_hmog.inference.posterior import infer_rows
from flax_hmog.model import algebra
from flax_hmog.model.algebra import SPLIT_PRODUCTS, matmul
from flax_hmog.model.prepared import prepare
from flax_hmog.toy import natural, x

EXACT = jnp.matmul
BITS = {"TF32_TF32_F32_X3": (10, 2), "BF16_BF16_F32_X6": (7, 3), "TF32_TF32_F32": (10, 1)}  # digits kept, parts


@pytest.fixture
def split(monkeypatch):
    """As if this backend had them."""
    monkeypatch.setattr(algebra, "UNSPLIT_BACKENDS", ())


def emulated(name, product):
    """`jnp.matmul` that multiplies by `product` where it is asked for `name`."""

    def parts(values, digits, count):
        unit = 23 - digits
        for _ in range(count):
            bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
            rounded = (bits + jnp.uint32(2 ** (unit - 1))) & jnp.uint32(2**32 - 2**unit)
            yield jax.lax.bitcast_convert_type(rounded, jnp.float32)
            values = values - jax.lax.bitcast_convert_type(rounded, jnp.float32)

    def multiply(left, right, *, precision, preferred_element_type=None):
        if precision != name:
            return EXACT(left, right, precision=precision, preferred_element_type=preferred_element_type)
        digits, count = BITS[product]
        lefts, rights = (list(parts(jnp.asarray(values), digits, count)) for values in (left, right))
        pairs = [(i, j) for i in range(count) for j in range(count - i)]
        return sum(EXACT(lefts[i], rights[j], precision="highest") for i, j in reversed(pairs))

    return multiply


def dots(function, *arguments):
    """Precisions of all products, in the program that a CUDA device would be given."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


@pytest.mark.parametrize("name", SPLIT_PRODUCTS)
def test_names_of_split_products_reach_every_product_and_its_derivative(split, name):
    factors = prepare(natural)
    loss = lambda x: jnp.sum(infer_rows(factors, x).log_density)  # noqa: E731
    for function in (lambda x: infer_rows(factors, x), jax.grad(loss), lambda x: mean_log_density(factors, x)):
        before = dots(function, x)
        with jax.default_matmul_precision(name):
            lines = dots(function, x)
        count = name[-1]
        assert len(lines) == len(before) > 2
        assert all(f"num_primitive_operations = {count}" in line for line in lines)
        # the same function outside of the context is compiled as it was
        assert dots(function, x) == before
        assert all("HIGHEST" in line for line in before)


def test_rows_on_several_devices_take_them_too(split):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    product = jax.shard_map(lambda rows: matmul(rows, rows.T), mesh=mesh, in_specs=spec, out_specs=spec)
    with jax.default_matmul_precision("BF16_BF16_F32_X6"):
        assert "num_primitive_operations = 6" in dots(product, jnp.asarray(x))[0]


@pytest.mark.parametrize("name", ["bfloat16", "tensorfloat32", "high", "BF16_BF16_F32", "TF32_TF32_F32"])
def test_names_of_fewer_digits_change_nothing(split, name):
    with jax.default_matmul_precision(name):
        assert all("HIGHEST" in line for line in dots(matmul, jnp.ones((2, 3)), jnp.ones((3, 2))))


def test_float64_and_lower_dtypes_stay(split, float64):
    with jax.default_matmul_precision("BF16_BF16_F32_X6"):
        for dtype in ("float64", "bfloat16"):
            ones = jnp.ones((2, 2), dtype)
            assert all("HIGHEST" in line for line in dots(matmul, ones, ones))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the backend has them")
def test_a_backend_that_lacks_them_says_so():
    message = "must name products that the backend has; got TF32_TF32_F32_X3 on cpu"
    with jax.default_matmul_precision("TF32_TF32_F32_X3"), pytest.raises(ValueError, match=message):
        infer(natural, x)


@pytest.fixture(scope="module")
def rows():
    """Rows (N, D) whose noise is a hundredth of the signal."""
    rng = np.random.default_rng(0)
    means = 3 * rng.standard_normal((3, 2))
    y = means[rng.integers(3, size=400)] + rng.standard_normal((400, 2))
    return (y @ rng.standard_normal((2, 8)) + 0.01 * rng.standard_normal((400, 8)) + 5).astype(np.float32)


def fit(rows):
    return fit_em(AnalyticHMoG(2, 3), rows, jax.random.key(0), max_steps=4, tolerance=0.0).objective_history


def fit_by(name, product, rows, monkeypatch):
    """Objectives of a fit whose products are asked for by name, and are those of `product`."""
    monkeypatch.setattr(jnp, "matmul", emulated(name, product))
    with jax.default_matmul_precision(name):
        jax.clear_caches()
        objectives = fit(rows)
    jax.clear_caches()
    return objectives


@pytest.mark.parametrize("name", ["TF32_TF32_F32_X3", "BF16_BF16_F32_X6"])
def test_fits_by_split_products_end_where_those_of_float32_do(split, name, rows, monkeypatch):
    want = fit(rows)
    np.testing.assert_allclose(fit_by(name, name, rows, monkeypatch), want, atol=1e-4)


def test_a_fit_whose_products_are_too_coarse_goes_on_in_float32(split, rows, monkeypatch):
    want = fit(rows)
    with pytest.warns(UserWarning, match="must keep the mean log-density to 1e-04 nats"):
        got = fit_by("TF32_TF32_F32_X3", "TF32_TF32_F32", rows, monkeypatch)
    # the start came from coarse products, the steps did not
    np.testing.assert_allclose(got[-1], want[-1], atol=1e-2)


def test_a_fit_without_them_checks_nothing(rows):
    with warnings.catch_warnings(), jax.default_matmul_precision("highest"):
        warnings.simplefilter("error")
        assert np.isfinite(fit(rows)).all()


@pytest.mark.parametrize("name", ["F32_F32_F32", "BF16_BF16_F32"])
def test_models_in_float64_keep_their_digits(name):
    """XLA converts operands in float64 too where a preset names the arithmetic, unless a product asks for all digits."""
    rows = np.asarray(x, np.float64)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), natural)
        start = fit_em(AnalyticHMoG(2, 3, param_dtype=np.float64), rows, jax.random.key(0), max_steps=3)
        expected, gradient = infer(wide, rows), jax.grad(mean_log_density)(wide, rows)
        with jax.default_matmul_precision(name):
            got, again = infer(wide, rows), jax.grad(mean_log_density)(wide, rows)
            fitted = fit_em(AnalyticHMoG(2, 3, param_dtype=np.float64), rows, jax.random.key(0), max_steps=3)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    jax.tree.map(close, (got, again), (expected, gradient))
    close(fitted.objective_history, start.objective_history)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_gradients_multiply_in_full_precision_on_every_device(case):
    """Derivatives of jax's own functions need not ask for it, as that of QR."""
    head, rows = case.head("float32"), jnp.asarray(case.x(), jnp.float32)
    variables = case.variables("float32")
    loss = lambda variables: -jnp.mean(head.apply(variables, rows).log_density)  # noqa: E731
    found = dots(jax.grad(loss, allow_int=True), variables)
    assert found
    assert not [line for line in found if line.count("HIGHEST") != 2]
