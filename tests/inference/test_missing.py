"""Rows with missing entries against brute force: marginals and conditionals of K dense Gaussians."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from dense import Dense, assert_close
from devices import on_cpus
from jax.test_util import check_grads
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import flax_hmog
from flax_hmog import (
    impute,
    infer,
    infer_blocks,
    latent_mean,
    log_observable_density,
    mean_log_density,
    moments_to_natural,
    posterior_at,
    posterior_hard_assignment,
    posterior_soft_assignments,
    warm_start,
)
from flax_hmog.model.algebra import inverses_along_last
from flax_hmog.training import CheckpointWriter, restore

DIAGONAL_KINDS = [name for name in CASES if name.split("-")[1] != "full"]
CASE = CASES["analytic-diagonal-full-4.2.3"]


def with_holes(x, share=0.4, seed=0):
    """Rows of which a share of the entries is NaN, all of the first and none of the second."""
    holes = np.random.default_rng(seed).random(x.shape) < share
    holes[0], holes[1] = True, False
    return np.where(holes, np.nan, np.asarray(x, np.float64))


class Brute:
    """Each row by itself: the Gaussians of what it shows, and all columns given that."""

    def __init__(self, natural):
        self.dense = Dense.of_natural(natural)
        self.parts = list(zip(self.dense.w, self.dense.component_means, self.dense.component_covariances, strict=True))

    def log_joint(self, row):
        o = ~np.isnan(row)
        log_w = np.log(self.dense.w)
        if not o.any():
            return log_w
        return log_w + [multivariate_normal(m[o], c[np.ix_(o, o)]).logpdf(row[o]) for _, m, c in self.parts]

    def responsibilities(self, row):
        logits = self.log_joint(row)
        return np.exp(logits - logsumexp(logits))

    def given(self, row):
        """Mean and covariance of all columns given those shown, of each component."""
        o = ~np.isnan(row)
        for _, m, c in self.parts:
            gain = c[:, o] @ np.linalg.inv(c[np.ix_(o, o)]) if o.any() else np.zeros((len(row), 0))
            yield m + gain @ (row[o] - m[o]), c - gain @ c[o]

    def imputed(self, row):
        r, (means, covariances) = self.responsibilities(row), map(np.array, zip(*self.given(row), strict=True))
        mean = r @ means
        second = covariances + means[:, :, None] * means[:, None, :]
        return mean, np.einsum("k,kij->ij", r, second) - np.outer(mean, mean)

    def latent_mean(self, row):
        d, o = self.dense, ~np.isnan(row)
        parts = []
        for (_, m, c), m_y, s in zip(self.parts, d.m, d.S, strict=True):
            cross = s @ d.W[o].T
            parts.append(m_y + (cross @ np.linalg.solve(c[np.ix_(o, o)], row[o] - m[o]) if o.any() else 0))
        return self.responsibilities(row) @ np.array(parts)


@pytest.mark.parametrize("name", DIAGONAL_KINDS)
def test_inference_equals_that_of_the_marginals(name, float64):
    natural = CASES[name].natural()
    x, brute = with_holes(CASES[name].x(9)), Brute(natural)
    output = infer(natural, x, missing="nan")
    assert_close(output.log_density, [logsumexp(brute.log_joint(row)) for row in x], 1e-11, "log-density")
    assert_close(np.exp(output.log_responsibilities), [brute.responsibilities(row) for row in x], 1e-11)
    assert_close(output.latent_mean, [brute.latent_mean(row) for row in x], 1e-11, "latent mean")
    assert_close(output.log_density[0], 0, 1e-12)


def test_kin_of_infer(float64):
    natural = CASE.natural()
    x = with_holes(CASE.x(9))
    output = infer(natural, x, missing="nan")
    told = {"missing": "nan"}
    assert_close(log_observable_density(natural, x, **told), output.log_density, 0)
    assert_close(latent_mean(natural, x.reshape(3, 3, 4), **told).reshape(9, 2), output.latent_mean, 1e-12)
    assert_close(posterior_soft_assignments(natural, x, **told), np.exp(output.log_responsibilities), 1e-15)
    assert (posterior_hard_assignment(natural, x, **told) == output.log_responsibilities.argmax(-1)).all()
    assert_close(mean_log_density(natural, x, **told), output.log_density.mean(), 1e-13)
    weights = np.arange(9.0)
    weighted = np.average(output.log_density, weights=weights)
    assert_close(mean_log_density(natural, x, weights, **told), weighted, 1e-13)
    assert_close(infer_blocks(natural, x, **told).log_density, output.log_density, 1e-13)
    batches = [x[:4], x[4:]]
    assert_close(infer(natural, (lambda: type("Batches", (), {"__iter__": lambda _: iter(batches)}))()(), **told)
                 .log_density, output.log_density, 1e-13)  # fmt: skip
    variables, _ = warm_start(CASE.head(), natural)
    assert_close(CASE.head().apply(variables, x, **told).log_density, output.log_density, 1e-9)


def test_posterior_at_has_the_precision_of_each_row(float64):
    natural, x = CASE.natural(), with_holes(CASE.x(5))
    posterior = posterior_at(natural, x, missing="nan")
    brute = Brute(natural)
    means = np.linalg.solve(posterior.precision.entries, posterior.location[..., None])[..., 0]
    got = np.einsum("nk,nkl->nl", [brute.responsibilities(row) for row in x], means)
    assert_close(got, [brute.latent_mean(row) for row in x], 1e-11)
    whole = posterior_at(natural, x[1:2])
    assert_close(posterior.location[1], whole.location[0], 1e-13)
    assert_close(posterior.precision.entries[1], whole.precision.entries, 1e-11)


def test_complete_rows_give_the_same_numbers():
    natural, x = CASE.natural("float32"), CASE.x(20)
    for whole, told in zip(infer_leaves(natural, x), infer_leaves(natural, x, missing="nan"), strict=True):
        assert np.array_equal(whole, told)


def infer_leaves(*args, **kwargs):
    return jax.tree.leaves(infer(*args, **kwargs))


@pytest.mark.parametrize("name", ["differentiable-diagonal-diagonal-4.2.3", "symmetric-scale-diagonal-4.2.3",
                                  "differentiable-diagonal-full-4.2.3"])  # fmt: skip
def test_gradients_are_finite_and_right(name, float64):
    case = CASES[name]
    head, variables, x = case.head(), case.variables(), with_holes(case.x(6))
    loss = functools.partial(head.apply, method="mean_log_density", missing="nan")
    check_grads(lambda v: loss(v, x), (variables,), 1, modes=["rev", "fwd"])
    of_rows = jax.jit(jax.grad(lambda x: loss(variables, x)))(jnp.asarray(x))
    assert np.isfinite(of_rows).all()
    assert (of_rows[np.isnan(x)] == 0).all()
    whole = jax.grad(lambda x: head.apply(variables, x, method="mean_log_density"))(jnp.asarray(case.x(6)))
    told = jax.grad(lambda x: loss(variables, x))(jnp.asarray(case.x(6)))
    assert_close(told, whole, 1e-10)


def test_imputed_values_are_those_of_the_conditionals(float64):
    natural = CASE.natural()
    x = with_holes(Dense.of_natural(natural).sample(np.random.default_rng(1), 6)[0])
    brute = Brute(natural)
    imputed = impute(natural, x, key=jax.random.key(0), draws=4000)
    again = impute(natural, x.reshape(2, 3, 4), key=jax.random.key(0), draws=2)
    assert again.mean.shape == (2, 3, 4)
    assert again.draws.shape == (2, 2, 3, 4)
    assert impute(natural, x).draws is None
    for number, row in enumerate(x):
        mean, covariance = brute.imputed(row)
        m = np.isnan(row)
        assert_close(imputed.mean[number], np.where(m, mean, row), 1e-11)
        assert_close(imputed.deviation[number], np.sqrt(np.where(m, np.diag(covariance), 0)), 1e-9)
        assert (imputed.draws[:, number, ~m] == row[~m]).all()
        assert_close(imputed.draws[:, number, m].mean(0), mean[m], 0.15)
        assert_close(np.cov(imputed.draws[:, number].T)[np.ix_(m, m)], covariance[np.ix_(m, m)], 0.2)


def test_imputed_values_are_in_units_of_x(float64):
    """Also where the model stays in a frame, and rows have more digits than it."""
    moments = flax_hmog.natural_to_moments(CASE.natural())
    x = with_holes(CASE.x(7))
    want = impute(moments_to_natural(moments), x)
    with jax.enable_x64(False):
        low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), moments)
        frame = flax_hmog.Frame.of(np.full(4, 1e6), np.array([1.0, 10, 1, 1]), np.float32)
        unit = np.array([1.0, 10, 1, 1])
        framed = moments_to_natural(low).in_frame(frame)
        moved = 1e6 + unit * x
        got = impute(framed, moved)
        assert_close(got.mean, 1e6 + unit * want.mean, 1e-5)
        assert_close(got.deviation, unit * want.deviation, 1e-4)
        plain = log_observable_density(moments_to_natural(low), x.astype(np.float32), missing="nan")
        seen = (~np.isnan(x)).astype(float)
        assert_close(log_observable_density(framed, moved, missing="nan"), plain - seen @ np.log(unit), 1e-4)
        rounded = jnp.asarray(moved - 1e6, jnp.float32)
        near = moments_to_natural(low).in_frame(flax_hmog.Frame.of(np.zeros(4), unit, np.float32))
        assert_close(log_observable_density(near, rounded, missing="nan"), plain - seen @ np.log(unit), 1e-4)


def test_kinds_of_missing_entries(float64):
    pd = pytest.importorskip("pandas")
    natural, x = CASE.natural(), with_holes(CASE.x(6))
    want = infer(natural, x, missing="nan").log_density
    frame = pd.DataFrame(x)
    nullable = frame.convert_dtypes(convert_integer=False)
    assert nullable.isna().to_numpy().any()
    objects = np.where(np.isnan(x), None, x)
    masked = np.ma.MaskedArray(np.nan_to_num(x, nan=7.0), np.isnan(x))
    for rows in (frame, nullable, objects, objects.tolist(), masked, jnp.asarray(x)):
        assert_close(infer(natural, rows, missing="nan").log_density, want, 1e-13)
        with pytest.raises(ValueError, match=r'missing="nan"'):
            infer(natural, rows)
    with pytest.raises(ValueError, match="got 1 entries that are not"):
        infer(natural, np.where(np.arange(4) == 2, np.inf, x[:1]), missing="nan")


def test_refused():
    natural, x = CASE.natural("float32"), with_holes(CASE.x(5)).astype(np.float32)
    with pytest.raises(ValueError, match=r"infer: `missing` must be one of \('refuse', 'nan'\); got 'drop'"):
        infer(natural, x, missing="drop")
    full = CASES["analytic-full-full-4.2.3"].natural("float32")
    for function in (infer, lambda natural, x, missing: impute(natural, x)):
        with pytest.raises(ValueError, match='`missing` must be "refuse" where noise is correlated'):
            function(full, x, missing="nan")
    with pytest.raises(ValueError, match="impute: `key` must be given for draws"):
        impute(natural, x, draws=1)
    variables = CASE.variables("float32")
    with pytest.raises(ValueError, match='`missing` must be "refuse" for steps of EM in a network'):
        CASE.head("float32").apply(variables, x, train=True, missing="nan", mutable=["em"])


def test_restored_models(tmp_path):
    natural = CASE.natural("float32")
    head, x = CASE.head("float32"), with_holes(CASE.x(5)).astype(np.float32)
    variables, _ = warm_start(head, natural)
    with CheckpointWriter(tmp_path, head=head) as writer:
        writer.save(1, variables)
    model = restore(tmp_path)
    want = infer(model.natural, x, missing="nan").log_density
    assert_close(model(x, missing="nan").log_density, want, 1e-5)
    with pytest.raises(ValueError, match="entries that are not"):
        model(x)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_inverses_along_the_last_axis(size, float64):
    root = np.random.default_rng(0).normal(size=(30, size, 2 * size))
    matrices = np.einsum("bij,bkj->bik", root, root) * 10.0 ** np.arange(-15, 15)[:, None, None]
    inverses, log_det = inverses_along_last(jnp.asarray(matrices.transpose(1, 2, 0)))
    identity = np.einsum("bij,jkb->bik", matrices, inverses)
    assert_close(identity, np.broadcast_to(np.eye(size), identity.shape), 1e-9)
    assert_close(log_det, np.linalg.slogdet(matrices)[1], 1e-11)
    indefinite, _ = inverses_along_last(-jnp.eye(size)[:, :, None])
    assert np.isnan(indefinite).any()


SHARDED = """
import json, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
sys.path.insert(0, "tests")
from cases import CASES
from flax_hmog import em_step, infer, mean_log_density
jax.config.update("jax_enable_x64", True)
case = CASES["analytic-diagonal-full-4.2.3"]
x = np.array(case.x(400))
x[np.random.default_rng(0).random(x.shape) < 0.3] = np.nan
natural = case.natural()

def results(count):
    mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    output, (step, _) = infer(natural, rows, missing="nan"), em_step(natural, rows, missing="nan")
    assert len(output.log_density.devices()) == count
    return [float(output.log_density.sum()), float(mean_log_density(natural, rows, missing="nan")),
            np.asarray(step.interaction).tolist(), np.asarray(step.observable_precision.entries).tolist()]

print(json.dumps([results(count) for count in (1, 2, 4)]))
"""


def test_sharded_rows_give_the_same():
    done = subprocess.run([sys.executable, "-c", SHARDED], env=on_cpus(4), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    want, *others = json.loads(done.stdout)
    for found in others:
        for got, value in zip(found, want, strict=True):
            assert_close(got, value, 1e-10)
