"""What a user can get wrong: the call, the exception, part of the message; and the form of every message."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, random_moments

from flax_hmog import (
    AnalyticHMoG,
    Diagonal,
    DifferentiableHMoG,
    EMOptions,
    PositiveDefinite,
    PseudoCounts,
    SymmetricHMoG,
    em_step,
    expected_statistics,
    fit_em,
    fit_online_em,
    infer,
    initialize_moments,
    join_conjugated,
    kl_divergence,
    latent_mean,
    log_observable_density,
    log_partition,
    mean_to_natural,
    moments_to_natural,
    natural_to_mean,
    natural_to_moments,
    negative_entropy,
    posterior_at,
    posterior_hard_assignment,
    ravel_mean,
    ravel_natural,
    sample,
    split_conjugated,
    unravel_mean,
    unravel_natural,
    warm_start,
    whiten_prior,
)
from flax_hmog.heads.modules import HMoGHead
from flax_hmog.networks.encoders import MLP, Clusterer
from flax_hmog.sklearn import HMoG

CASE = CASES["analytic-diagonal-full-4.2.3"]
RESTRICTED = CASES["differentiable-diagonal-diagonal-4.2.3"]
SHARED_BASE = CASES["symmetric-diagonal-diagonal-4.2.3"]
HEAD, LAZY = CASE.head("float32"), CASE.head("float32", obs_dim=None)
NATURAL, DIAGONAL = CASE.natural("float32"), RESTRICTED.natural("float32")
MOMENTS = random_moments(CASE)
with jax.disable_jit():
    MEAN, DIAGONAL_MEAN = natural_to_mean(NATURAL), natural_to_mean(DIAGONAL)
X = CASE.x(8)
KEY = jax.random.key(0)
replace = dataclasses.replace


def changed(array, index, value):
    array = np.array(array, np.float64)
    array[index] = value
    return array


def with_covariance(index, value):
    return replace(MOMENTS, covariances=PositiveDefinite(changed(MOMENTS.covariances.entries, index, value)))


def other_size(*sizes, obs_rep="diagonal"):
    return random_moments(Case(AnalyticHMoG, obs_rep, "full", *sizes))


def fit(data=X, **options):
    return fit_em(HEAD, data, KEY, **({"max_steps": 1} | options))


OBSERVATIONS = {
    "wrong last dimension": (lambda: log_observable_density(NATURAL, X[:, :3]), ValueError, r"`x` must have shape \(..., 4\); got \(8, 3\)"),
    "no dimension": (lambda: log_observable_density(NATURAL, 3.0), ValueError, r"`x` must have shape \(..., 4\); got \(\)"),
    "missing values": (lambda: latent_mean(NATURAL, changed(X, ([3, 3, 6], [0, 1, 2]), np.nan)), ValueError, "got 3 entries that are not, the first in row 3. Give missing=\"nan\" to fits and inference"),
    "infinite": (lambda: expected_statistics(NATURAL, changed(X, (5, 1), -np.inf)), ValueError, "got 1 entries that are not, the first in row 5"),
    "overflow of float32": (lambda: infer(NATURAL, changed(X, (2, 0), 1e39)), ValueError, "finite in float32; got 1 entries that are not, the first in row 2"),
    "strings": (lambda: posterior_at(NATURAL, [["a"] * 4]), TypeError, "`x` must hold real numbers; got dtype <U1"),
    "complex": (lambda: infer(NATURAL, X + 1j), TypeError, "`x` must hold real numbers; got dtype complex128"),
    "nothing": (lambda: infer(NATURAL, None), TypeError, "`x` must hold real numbers; got dtype object"),
    "ragged": (lambda: infer(NATURAL, [[1, 2, 3, 4], [1]]), ValueError, "infer: `x` must"),
    "no samples": (lambda: expected_statistics(NATURAL, X[:0]), ValueError, r"expected_statistics: `x` must .* \(0, 4\)"),
    "no samples to step on": (lambda: em_step(NATURAL, X[:0]), ValueError, r"em_step: `x` must .* \(0, 4\)"),
    "negative weights": (lambda: expected_statistics(NATURAL, X, -np.ones(8)), ValueError, "`weights` must be finite, at least 0 and not all 0; got weights from -1 to -1"),
    "all weights zero": (lambda: em_step(NATURAL, X, np.zeros(8)), ValueError, "em_step: `weights` must be finite, at least 0 and not all 0"),
    "weights not finite": (lambda: expected_statistics(NATURAL, X, np.full(8, np.nan)), ValueError, "`weights` must be finite"),
    "weights of another shape": (lambda: expected_statistics(NATURAL, X, np.ones(7)), ValueError, r"`weights` must have shape \(8,\); got \(7,\)"),
}  # fmt: skip

COORDINATES = {
    "a fit for Natural": (lambda: infer(fit(), X), TypeError, r"`natural` must be Natural; got EMResult\. Give its `natural`"),
    "variables for Natural": (lambda: infer({"params": {}}, X), TypeError, r"`natural` must be Natural; got dict\. A head's model is head\.apply"),
    "a head for Natural": (lambda: infer(HEAD, X), TypeError, "`natural` must be Natural; got AnalyticHMoG. A head's model"),
    "Mean for Natural": (lambda: log_observable_density(MEAN, X), TypeError, "`natural` must be Natural; got Mean. Convert with"),
    "Moments for Natural": (lambda: natural_to_mean(MOMENTS), TypeError, "`natural` must be Natural; got Moments"),
    "Natural for Mean": (lambda: mean_to_natural(NATURAL), TypeError, "`mean` must be Mean; got Natural"),
    "Natural for Mean to whiten": (lambda: whiten_prior(NATURAL), TypeError, "whiten_prior: `mean` must be Mean"),
    "Natural for Moments": (lambda: moments_to_natural(NATURAL), TypeError, "`moments` must be Moments; got Natural"),
    "an array for Natural": (lambda: log_partition(np.ones(5)), TypeError, "`natural` must be Natural; got ndarray"),
    "Mean for Natural to sample": (lambda: sample(MEAN, KEY, 3), TypeError, "sample: `natural` must be Natural; got Mean"),
    "Mean for the second of kl": (lambda: kl_divergence(NATURAL, MEAN), TypeError, "`natural_q` must be Natural; got Mean"),
    "Natural for both parts": (lambda: join_conjugated(NATURAL, NATURAL), TypeError, "`likelihood` must be LinearGaussian"),
    "restricted em_step": (lambda: em_step(DIAGONAL, X), TypeError, "em_step: .*got Diagonal.*warm_start"),
    "restricted fit_em": (lambda: fit_em(RESTRICTED.head(), X, KEY), TypeError, "fit_em: `head` .*got Diagonal.*warm_start"),
    "shared base fit_em": (lambda: fit_em(SHARED_BASE.head(), X, KEY), TypeError, "fit_em: `head` .*warm_start"),
    "restricted mean_to_natural": (lambda: mean_to_natural(DIAGONAL_MEAN), TypeError, "mean_to_natural: .*warm_start"),
    "restricted negative_entropy": (lambda: negative_entropy(DIAGONAL_MEAN), TypeError, "negative_entropy: .*warm_start"),
    "restricted split": (lambda: split_conjugated(DIAGONAL), TypeError, "split_conjugated: .*got Diagonal.*warm_start"),
    "dropped entries": (lambda: moments_to_natural(MOMENTS, "diagonal"), ValueError, r"Diagonal would drop .* at entry \(\d, \d, \d\).*warm_start"),
    "dropped differences": (lambda: moments_to_natural(MOMENTS, "scale", shared_base=True), ValueError, "Scale would drop .*warm_start"),
    "other dimensions for kl": (lambda: kl_divergence(NATURAL, CASES["analytic-scale-full-3.1.2"].natural("float32")), ValueError, "`natural_q` must have the dimensions of `natural_p`"),
}  # fmt: skip

MODELS = {
    "a triangle for a covariance": (lambda: moments_to_natural(with_covariance(1, np.array([[1, 0], [0.5, 1]]))), ValueError, r"`covariances` must be symmetric; got entries that differ by 0.5 across the diagonal, at \(1, 0, 1\)"),
    "indefinite covariance": (lambda: moments_to_natural(with_covariance(1, np.diag([1, -0.5]))), ValueError, "`covariances` must be positive definite; component 1 has smallest eigenvalue -0.5"),
    "covariance not finite": (lambda: moments_to_natural(with_covariance(2, np.nan)), ValueError, "`covariances` must be .*component 2"),
    "means not finite": (lambda: moments_to_natural(replace(MOMENTS, means=np.full((3, 2), np.nan))), ValueError, "`means` must be finite"),
    "loadings not finite": (lambda: moments_to_natural(replace(MOMENTS, loadings=np.full((4, 2), np.inf))), ValueError, "`loadings` must be finite"),
    "indefinite prior": (lambda: log_observable_density(replace(NATURAL, interaction=100 * NATURAL.interaction), X), ValueError, "`prior precision Q_k - W'Psi.-1 W` must be positive definite; component 0 has smallest eigenvalue -"),
    "empty component": (lambda: moments_to_natural(replace(MOMENTS, weights=np.array([0.5, 0.5, 0]))), ValueError, "`weights` must be positive; got 0 at entry 2"),
    "weights that are counts": (lambda: moments_to_natural(replace(MOMENTS, weights=np.ones(3))), ValueError, "`weights` must sum to 1; got 3"),
    "negative noise": (lambda: moments_to_natural(replace(MOMENTS, noise=Diagonal(np.array([1, 1, -1, 1.0])))), ValueError, "`noise` must be positive; got -1 at entry 2"),
    "noise without kind": (lambda: moments_to_natural(replace(MOMENTS, noise=np.ones(4))), ValueError, "`noise` must be one of"),
    "bias of another shape": (lambda: moments_to_natural(replace(MOMENTS, bias=np.ones(3))), ValueError, r"`bias` must have shape \(4,\); got \(3,\)"),
    "loadings of another rank": (lambda: moments_to_natural(replace(MOMENTS, loadings=np.ones(4))), ValueError, "`loadings` must have shape"),
    "unknown rep": (lambda: moments_to_natural(MOMENTS, "spherical"), ValueError, r'must be one of "scale" \(Scale\), "diagonal" \(Diagonal\), "full" \(PositiveDefinite\); got .spherical'),
    "obs_dim None": (lambda: ravel_natural(NATURAL, LAZY), ValueError, "ravel_natural: `head.obs_dim` must be a number; got None"),
    "obs_dim None for mean": (lambda: ravel_mean(MEAN, LAZY), ValueError, "ravel_mean: `head.obs_dim`"),
    "obs_dim None to unravel": (lambda: unravel_mean(np.zeros(5), LAZY), ValueError, "unravel_mean: `head.obs_dim`"),
    "flat of another length": (lambda: unravel_natural(np.zeros(5), HEAD), ValueError, r"`flat` must have shape \(33,\) for this head; got \(5,\)"),
    "flat mean of another length": (lambda: unravel_mean(np.zeros((1, 33)), HEAD), ValueError, r"`flat` must have shape \(33,\)"),
    "flat not finite": (lambda: unravel_natural(np.full(33, np.nan), HEAD), ValueError, "`flat` must be finite"),
    "flat without a model": (lambda: unravel_natural(np.ones(33), HEAD), ValueError, "must be positive"),
    "flat for another head": (lambda: ravel_natural(NATURAL, RESTRICTED.head()), ValueError, "`head` must have the kinds of the coordinates"),
    "no draws": (lambda: sample(NATURAL, KEY, 0), ValueError, "`n` must be a whole number of at least 1; got 0"),
}  # fmt: skip

HEADS = {
    "unknown obs_rep": (lambda: DifferentiableHMoG(2, 3, 4, "spherical"), ValueError, 'DifferentiableHMoG: `obs_rep` must be one of "scale"'),
    "unknown pst_rep": (lambda: DifferentiableHMoG(2, 3, 4, pst_rep=None), ValueError, "DifferentiableHMoG: `pst_rep` must be one of"),
    "unknown lat_rep": (lambda: SymmetricHMoG(2, 3, 4, lat_rep=int), ValueError, "SymmetricHMoG: `lat_rep` must be one of"),
    "bounds the wrong way": (lambda: DifferentiableHMoG(2, 3, 4, noise_bounds=(1, 0.1)), ValueError, r"DifferentiableHMoG: `noise_bounds` must be a pair 0 < lower < upper; got \(1, 0.1\)"),
    "bounds that are no pair": (lambda: SymmetricHMoG(2, 3, 4, precision_bounds=3.0), ValueError, "SymmetricHMoG: `precision_bounds` must be a pair"),
    "negative bound": (lambda: DifferentiableHMoG(2, 3, 4, signal_bound=-1.0), ValueError, "DifferentiableHMoG: `signal_bound` must be positive; got -1"),
    "no components in HMoG": (lambda: HMoG(0).fit(X), ValueError, "HMoG: `n_components` must be a whole number of at least 1; got 0"),
    "components of HMoG in text": (lambda: HMoG("3").fit(X), ValueError, "HMoG: `n_components` must be a whole number"),
    "lat_dim of HMoG": (lambda: HMoG(3, lat_dim=9).fit(X), ValueError, "HMoG: `lat_dim` must be a whole number of at least 1 and at most 4; got 9"),
    "steps of HMoG": (lambda: HMoG(3, max_iter=2.5).fit(X), ValueError, "HMoG: `max_iter` must be a whole number"),
    "noise of HMoG": (lambda: HMoG(3, noise="diag").fit(X), ValueError, "HMoG: `noise` must be one of"),
    "tolerance of HMoG": (lambda: HMoG(3, tol="small").fit(X), ValueError, "HMoG: `tol` must be a number of at least 0; got 'small'"),
    "lat_dim above obs_dim": (lambda: AnalyticHMoG(5, 3, 4), ValueError, "`lat_dim` must be a whole number of at least 1 and at most 4; got 5"),
    "lat_dim above the data's": (lambda: DifferentiableHMoG(5, 3).init(KEY, X), ValueError, "`lat_dim` must .* at most 4; got 5"),
    "lat_dim above the data's, Analytic": (lambda: AnalyticHMoG(5, 3).init(KEY, X), ValueError, "`lat_dim` must .* at most 4; got 5"),
    "no components": (lambda: AnalyticHMoG(2, 0, 4), ValueError, "`n_components` must be a whole number of at least 1; got 0"),
    "half a component": (lambda: SymmetricHMoG(2, 2.5, 4), ValueError, "`n_components` must be a whole number"),
    "no delay": (lambda: AnalyticHMoG(2, 3, step_delay=0), ValueError, "`step_delay` must be at least 1; got 0"),
    "rates that grow": (lambda: AnalyticHMoG(2, 3, step_decay=-1.0), ValueError, "`step_decay` must be above 0"),
    "a rate above 1": (lambda: AnalyticHMoG(2, 3, min_rate=2.0), ValueError, "`min_rate` must be from 0 to 1; got 2"),
    "negative pseudo-samples": (lambda: AnalyticHMoG(2, 3, pseudo_share=-1), ValueError, "`pseudo_share` must be at least 0"),
    "first batch of other columns": (lambda: AnalyticHMoG(2, 3, 4).init(KEY, np.ones((5, 6))), ValueError, r"`x` must have shape \(..., 4\); got \(5, 6\)"),
    "half precision": (lambda: SymmetricHMoG(2, 3, 4, param_dtype="bfloat16"), ValueError, r"`param_dtype` must be float32 or float64, .* got bfloat16"),
    "integer leaves": (lambda: AnalyticHMoG(2, 3, 4, param_dtype=jnp.int32), ValueError, "`param_dtype` must be float32 or float64"),
    "abstract head": (lambda: HMoGHead(2, 3).init(KEY, X), TypeError, "must be DifferentiableHMoG, SymmetricHMoG or AnalyticHMoG"),
}  # fmt: skip

FITS = {
    "data for head": (lambda: fit_em(X, HEAD, KEY), TypeError, r"fit_em: `head` must be .* got ndarray\. Call fit_em\(head, data, key\)"),
    "a number for key": (lambda: fit_em(HEAD, X, 0), TypeError, r"fit_em: `key` must be a PRNG key; got int\. Use jax\.random\.key\(0\)"),
    "head and model swapped": (lambda: warm_start(NATURAL, HEAD), TypeError, r"warm_start: `head` must be .* got Natural\. Call warm_start\(head, natural, x\)"),
    "head and encoder swapped": (lambda: Clusterer(HEAD, MLP(4)), TypeError, "`encoder` must come before `head`; got AnalyticHMoG"),
    "fewer samples than components": (lambda: fit(X[:2]), ValueError, "at least as many samples as components; got 2 samples for n_components=3"),
    "fewer samples to start from": (lambda: initialize_moments(HEAD, X[:2], KEY), ValueError, "initialize_moments: .* got 2 samples"),
    "unknown method": (lambda: initialize_moments(HEAD, X, KEY, method="ica"), ValueError, r"`method` must be one of \('pca', 'fa'\); got 'ica'"),
    "one-shot iterator": (lambda: fit(iter([X])), TypeError, "can be iterated repeatedly; got list_iterator"),
    "generator": (lambda: fit(batch for batch in [X]), TypeError, "can be iterated repeatedly; got generator"),
    "no data": (lambda: fit(5), TypeError, "`data` must be an array or a collection of batches .* got int"),
    "no batches": (lambda: fit([]), ValueError, "fit_em: `data` must hold at least one batch"),
    "rows for batches": (lambda: fit(list(X)), ValueError, r"fit_em: `data` must .*\(4,\)"),
    "an empty batch": (lambda: fit([X[:0], X]), ValueError, r"fit_em: `data` must .*\(0, 4\)"),
    "batches of two widths": (lambda: fit_em(LAZY, [X, X[:, :3]], KEY, max_steps=1), ValueError, r"fit_em: `data` must have shape .*\(8, 3\)"),
    "rank 3": (lambda: fit(X[None]), ValueError, r"`data` must have shape \(N, D\); got \(1, 8, 4\)"),
    "missing values to fit": (lambda: fit(changed(X, (1, 1), np.nan)), ValueError, "fit_em: `data` must be finite .* first in row 1"),
    "labels out of range": (lambda: fit(labels=np.full(8, 3)), ValueError, r"`labels` must be integers from -1 \(unknown\) to 2; got int64 from 3 to 3"),
    "float labels": (lambda: fit(labels=np.zeros(8)), ValueError, "`labels` must be integers"),
    "labels of another shape": (lambda: fit(labels=np.zeros(7, int)), ValueError, r"`labels` must have shape \(8,\)"),
    "weights with batches": (lambda: fit([X], weights=np.ones(8)), ValueError, "`weights` and `labels` must come with an array"),
    "no restarts": (lambda: fit(n_restarts=0), ValueError, "`n_restarts` must be a whole number of at least 1; got 0"),
    "restarts of one model": (lambda: fit(n_restarts=2, init=MOMENTS), ValueError, "`n_restarts` must be 1 for a given `init`"),
    "no steps": (lambda: fit(max_steps=0), ValueError, "`max_steps` must be a whole number of at least 1"),
    "unknown option": (lambda: fit(n_restart=2), TypeError, r"fit_em: `n_restart` must be an option of fit_em; got no option\. Choose from init, "),
    "option of online EM": (lambda: fit(passes=3), TypeError, "fit_em: `passes` must .* got one of fit_online_em"),
    "option of a head": (lambda: fit_online_em(HEAD, X, KEY, pseudo_share=0.1), TypeError, "fit_online_em: `pseudo_share` must .* got one of AnalyticHMoG"),
    "option of exact EM": (lambda: fit_online_em(HEAD, X, KEY, options=EMOptions(tolerance=0.0)), TypeError, "fit_online_em: `tolerance` must .* got one of fit_em"),
    "rate of exact EM": (lambda: fit(options=EMOptions(step_delay=3.0)), TypeError, "`step_delay` must .* got one of fit_online_em and AnalyticHMoG"),
    "options that are a dict": (lambda: fit(options={"passes": 3}), TypeError, "`options` must be EMOptions; got dict"),
    "no steps in options": (lambda: EMOptions(max_steps=0), ValueError, "EMOptions: `max_steps` must be a whole number"),
    "rows that are all far": (lambda: fit(max_distance=0.5), ValueError, "fit_em: `max_distance` must be above 1; got 0.5"),
    "unknown units": (lambda: fit(column_units="rows"), ValueError, "fit_em: `column_units` must be one of"),
    "unknown start": (lambda: fit(init="kmeans"), ValueError, "`init` must be a model or one of"),
    "Mean as start": (lambda: fit(init=MEAN), TypeError, "`init` must be Natural; got Mean"),
    "start of other D": (lambda: fit(init=other_size(5, 2, 3)), ValueError, "fit_em: `init` must"),
    "start of other K": (lambda: fit(init=other_size(4, 2, 2)), ValueError, "fit_em: `init` must"),
    "start of other L": (lambda: fit(init=other_size(4, 1, 3)), ValueError, "fit_em: `init` must"),
    "start of other noise": (lambda: fit(init=other_size(4, 2, 3, obs_rep="full")), ValueError, "fit_em: `init` must"),
    "regularizer that is a number": (lambda: fit(regularizer=1.0), TypeError, "fit_em: `regularizer` must be .*; got float"),
    "regularizer of em_step": (lambda: em_step(NATURAL, X, None, PseudoCounts()), TypeError, "em_step: `regularizer` must be .*; got PseudoCounts"),
    "unbounded likelihood": (lambda: fit(np.ones((8, 4)), regularizer=None), ValueError, "`regularizer` must keep the likelihood bounded"),
    "negative pseudo-counts": (lambda: PseudoCounts(weights=-1), ValueError, "PseudoCounts: `weights` must be at least 0; got -1"),
    "infinite pseudo-counts": (lambda: PseudoCounts(noise=np.inf), ValueError, "PseudoCounts: `noise` must be at least 0"),
}  # fmt: skip

TABLE = OBSERVATIONS | COORDINATES | MODELS | HEADS | FITS


@pytest.mark.parametrize("mistake", TABLE)
def test_mistakes_are_errors_that_help(mistake, compilations):
    call, exception, message = TABLE[mistake]
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    text = str(caught.value)
    assert re.search(message, text), text
    # function: `argument` must RULE; got VALUE. REMEDY.
    assert re.fullmatch(r"[\w.]+: `.+` must .+; .+\. [A-Z].+\.|[\w.]+: a head must .+; got .+\. .+\.", text), text


def test_mistakes_in_shapes_are_found_under_jit():
    density = jax.jit(log_observable_density)
    with pytest.raises(ValueError, match=r"`x` must have shape \(..., 4\); got \(8, 3\)"):
        density(NATURAL, X[:, :3])
    with pytest.raises(TypeError, match="`natural` must be Natural; got Mean"):
        density(MEAN, X)
    with pytest.raises(ValueError, match=r"`flat` must have shape \(33,\)"):
        jax.jit(lambda flat: log_partition(unravel_natural(flat, HEAD)))(np.zeros(5))
    with pytest.raises(ValueError, match=r"`weights` must have shape \(8,\)"):
        jax.jit(expected_statistics)(NATURAL, X, np.ones(7))
    with pytest.raises(ValueError, match=r"`bias` must have shape \(4,\)"):
        jax.jit(moments_to_natural)(replace(MOMENTS, bias=np.ones(3)))
    with pytest.raises(TypeError, match=r"em_step: .*warm_start"):
        jax.jit(em_step)(DIAGONAL, X)


def test_mistakes_are_found_before_compilation(compilations):
    wrong = CASES["symmetric-full-full-4.2.3"].natural("float32")

    def call():
        with pytest.raises(ValueError, match="`x` must have shape"):
            log_observable_density(wrong, np.ones((31, 3)))
        return ()

    assert compilations(call) == 0


def test_values_are_not_looked_at_under_jit():
    """A tracer has no values to check: what is not finite comes out as NaN."""
    assert np.isnan(jax.jit(log_observable_density)(NATURAL, changed(X, (2, 1), np.nan))[2])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "int64", "bool"])
def test_real_numbers_of_any_dtype_are_converted(dtype):
    x = np.arange(8).reshape(2, 4).astype(dtype)
    for given in (x, x.tolist(), jnp.asarray(x)):
        density = log_observable_density(NATURAL, given)
        assert density.dtype == np.float32
        np.testing.assert_array_equal(density, log_observable_density(NATURAL, x.astype(np.float32)))
    assert posterior_hard_assignment(NATURAL, x).shape == (2,)


def test_no_rows_are_no_mistake_where_rows_are_mapped():
    assert log_observable_density(NATURAL, X[:0]).shape == (0,)
    assert latent_mean(NATURAL, X[:0]).shape == (0, 2)


def test_a_head_takes_what_it_is_given_as_names():
    head = DifferentiableHMoG(2, 3, 4, noise_bounds=(0.1, 10), precision_bounds=(0.5, 2.0))
    natural = head.apply(head.init(KEY, X), method="natural")
    noise = natural_to_moments(natural).noise.entries
    assert ((noise > 0.1) & (noise < 10)).all()
