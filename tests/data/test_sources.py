"""What holds rows: read as the library that it comes from means it, by blocks where it is large, refused by name else."""

import re

import jax
import numpy as np
import pytest
import scipy.sparse as sp
from held_rows import COUNTS, HEAD, KEY, NATURAL, RNG, TRAINABLE, OnDisk, PolarsFrame, Tensor, X, Y, fit, same_fit
from jax.experimental import sparse as jax_sparse

from flax_hmog import (
    AnalyticHMoG,
    em_step,
    expected_statistics,
    fit_em,
    fit_online_em,
    infer,
    infer_blocks,
    initialize_moments,
    latent_mean,
    log_observable_density,
    mean_log_density,
    posterior_at,
    posterior_categorical,
    posterior_hard_assignment,
    posterior_soft_assignments,
    warm_start,
)
from flax_hmog.analysis import component_summary
from flax_hmog.data import sources
from flax_hmog.data.containers import INDEX_ROWS, in_memory, read_rows
from flax_hmog.training import Affine, CheckpointWriter, Preprocessing, restore

# ------------------------------------------------------------------------------------------------- masks and gaps


def test_masked_entries_are_no_data():
    missing = RNG.random(X.shape) < 0.1
    missing[:2] = False
    masked = np.ma.masked_array(np.where(missing, -999, X), missing)
    first = int(missing.any(axis=1).argmax())
    message = rf"`\w+` must hold no missing values; got {missing.sum()} masked entries, the first in row {first}\."
    for call in (
        lambda: fit(masked),
        lambda: fit([masked]),
        lambda: fit_online_em(HEAD, masked, KEY),
        lambda: infer(NATURAL, masked),
        lambda: infer_blocks(NATURAL, masked),
        lambda: em_step(NATURAL, masked),
        lambda: initialize_moments(HEAD, masked, KEY),
        lambda: HEAD.init(KEY, masked),
        lambda: component_summary(NATURAL, masked),
        lambda: Preprocessing((), 4)(masked),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="1 masked entries, the first in row 3"):
        fit(X, weights=np.ma.masked_array(np.ones(90), np.arange(90) == 3))
    whole = np.ma.masked_array(X, np.zeros(X.shape, bool))
    np.testing.assert_array_equal(infer(NATURAL, whole).log_density, infer(NATURAL, X).log_density)


def test_missing_objects_are_named():
    pd = pytest.importorskip("pandas")
    rows = X.tolist()
    rows[5][2] = None
    for given in (rows, np.array(rows, object)):
        with pytest.raises(ValueError, match=r"infer: `x` .* 1 that are \(None, NaN or NA\), the first in row 5"):
            infer(NATURAL, given)
    frame = pd.DataFrame(X).astype("Float32")
    assert in_memory("x", frame).dtype == np.float32
    same_fit(frame, X)
    frame.iloc[7, 1] = pd.NA
    with pytest.raises(ValueError, match=r"`data\['1'\]` must hold no missing values; got 1 .* first in row 7"):
        fit(frame)
    frame[1] = "text"
    with pytest.raises(TypeError, match="real numbers in every column; got object in column 1"):
        fit(frame)


# ------------------------------------------------------------------------------------------------- what is taken


def test_tables_are_rows():
    pd, pa = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    names = list("abcd")
    mixed = pd.DataFrame({name: X[:, k].round() for k, name in enumerate(names)}).astype({"a": "Int64", "b": "int8"})
    np.testing.assert_array_equal(in_memory("x", mixed), X.round())
    table = pa.table(dict(zip(names, X.T, strict=True)))
    nested = pa.FixedSizeListArray.from_arrays(pa.array(X.reshape(-1)), 4)
    polars = PolarsFrame(dict(zip(names, X.T, strict=True)))
    for given in (pd.DataFrame(X), table, nested, nested[0:90], polars, pd.Series(list(X)), X.tolist()):
        np.testing.assert_array_equal(in_memory("x", given), X)
    np.testing.assert_array_equal(in_memory("x", nested[10:20]), X[10:20])
    for given in (pd.DataFrame(X), table, nested, polars):
        np.testing.assert_allclose(infer(NATURAL, given).log_density, infer(NATURAL, X).log_density)
    same_fit(table, X)
    gap = pa.table({"a": [1, None], "b": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"`x\['a'\]` must hold no missing values; got 1 .* row 1"):
        infer(NATURAL, gap)


@pytest.mark.parametrize("through", ["__array__", "dlpack"])
def test_tensors_of_other_libraries(through):
    np.testing.assert_array_equal(in_memory("x", Tensor(X, through)), X)
    same_fit(Tensor(X, through), X)


def test_a_tensor_that_gives_no_array():
    with pytest.raises(TypeError, match="infer: `x` must be an array; got Tensor, which gives none"):
        infer(NATURAL, Tensor(X, "nothing"))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 40 * 4 * 4)  # 40 rows


def on_disk(tmp_path):
    import h5py
    import zarr

    file = h5py.File(tmp_path / "rows.h5", "w")
    np.save(tmp_path / "rows.npy", X)
    zarr_array = zarr.create_array(store=str(tmp_path / "rows.zarr"), shape=X.shape, dtype=X.dtype, chunks=(7, 4))
    zarr_array[:] = X
    return {
        "h5py": file.create_dataset("x", data=X, chunks=(7, 4)),
        "zarr": zarr_array,
        "memmap": np.load(tmp_path / "rows.npy", mmap_mode="r"),
        "own": OnDisk(X),
    }


@pytest.mark.parametrize("name", ["h5py", "zarr", "memmap", "own"])
def test_what_has_slices_is_read_by_blocks(name, tmp_path, small_blocks):
    pytest.importorskip("h5py"), pytest.importorskip("zarr")
    rows = on_disk(tmp_path)[name]
    same_fit(rows, X)
    if name == "own":
        rows.read.clear()
    got, want = infer_blocks(NATURAL, rows), infer(NATURAL, X)
    np.testing.assert_allclose(got.log_density, want.log_density, rtol=1e-5)
    if name == "own":
        assert [index.stop - index.start for index in rows.read if index.stop > index.start] == [40, 40, 10]
    online = fit_online_em(HEAD, rows, KEY, batch_size=30, passes=2)
    np.testing.assert_allclose(
        online.objective_history, fit_online_em(HEAD, X, KEY, batch_size=30, passes=2).objective_history, rtol=1e-3
    )
    index = np.array([0, 3, 4, 80, 89])
    np.testing.assert_array_equal(read_rows(rows, index), X[index])
    assert read_rows(rows, index[:0]).shape == (0, 4)


def test_far_rows_of_a_file_are_read_by_few_small_slices():
    rows = OnDisk(np.arange(20_000.0).reshape(-1, 2))
    index = np.sort(np.random.default_rng(0).choice(10_000, 500, replace=False))
    np.testing.assert_array_equal(read_rows(rows, index)[:, 0], 2 * index)
    assert len(rows.read) < 300
    rows.read.clear()
    read_rows(rows, np.arange(10_000))
    assert max(index.stop - index.start for index in rows.read) == INDEX_ROWS


def test_annotated_data_in_memory_and_backed(tmp_path, small_blocks):
    anndata = pytest.importorskip("anndata")
    dense = COUNTS.toarray()
    for matrix in (COUNTS, COUNTS.tocsc(), dense):
        table = anndata.AnnData(matrix, obs={"n": np.arange(90)})
        table.write_h5ad(tmp_path / "a.h5ad")
        backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
        want = infer(NATURAL, dense).log_density
        for given in (table, backed, backed.X):
            same_fit(given, dense)
            np.testing.assert_allclose(infer_blocks(NATURAL, given).log_density, want, rtol=1e-5)
        np.testing.assert_array_equal(read_rows(backed.X, np.array([2, 50, 89])), dense[[2, 50, 89]])
        fit_online_em(HEAD, backed, KEY, batch_size=30, passes=1)
        backed.file.close()


def test_annotated_data_without_a_matrix():
    anndata = pytest.importorskip("anndata")
    with pytest.raises(TypeError, match=r"AnnData: `X` must hold rows; got None\. Give one of .*'X_pca'"):
        fit(anndata.AnnData(obsm={"X_pca": X}))


def test_a_bad_row_of_a_file_is_named_by_its_number(small_blocks):
    bad = X.copy()
    bad[77, 1] = np.nan
    for rows in (OnDisk(bad), sp.csr_matrix(bad), [bad[:40], bad[40:]]):
        with pytest.raises(
            ValueError, match="must be finite in float32; got 1 entries that are not, the first in row 77"
        ):
            fit(rows)
    with pytest.raises(ValueError, match=r"`data` must have shape \(..., 4\); got \(0, 5\)"):
        fit(OnDisk(np.ones((9, 5))), AnalyticHMoG(2, 3, 4))
    with pytest.raises(TypeError, match="`data` must hold real numbers; got dtype complex64"):
        fit(OnDisk(X + 1j))


# ------------------------------------------------------------------------------------------------- sparse matrices

TAKE_ALL = {
    "infer": infer,
    "log_observable_density": log_observable_density,
    "posterior_soft_assignments": posterior_soft_assignments,
    "posterior_hard_assignment": posterior_hard_assignment,
    "posterior_categorical": posterior_categorical,
    "posterior_at": posterior_at,
    "latent_mean": latent_mean,
    "mean_log_density": mean_log_density,
    "infer_blocks": infer_blocks,
    "warm_start": lambda natural, x: warm_start(TRAINABLE, natural, x)[1],
    "head.apply": lambda natural, x: HEAD.apply(HEAD.init(KEY, X), x),
}
TAKE_ARRAYS = {
    "expected_statistics": expected_statistics,
    "em_step": em_step,
    "initialize_moments": lambda natural, x: initialize_moments(HEAD, x, KEY),
    "head.init": lambda natural, x: TRAINABLE.init(KEY, x),
    "a step of a head": lambda natural, x: HEAD.apply(HEAD.init(KEY, X), x, train=True, mutable=["em"]),
    "infer in jit": lambda natural, x: jax.jit(lambda natural: infer(natural, x))(natural),
    "mean_log_density in grad": lambda natural, x: jax.grad(mean_log_density)(natural, x),
}


class Batches:
    """A collection that is no list, as a loader of batches is."""

    def __iter__(self):
        return iter([X[:40], sp.csr_matrix(X[40:80]), X[80:].tolist()])


@pytest.mark.parametrize("name", TAKE_ALL)
def test_functions_of_rows_take_all_that_fits_take(name, tmp_path, small_blocks):
    pytest.importorskip("h5py"), pytest.importorskip("zarr")
    anndata = pytest.importorskip("anndata")
    wanted = jax.tree.leaves(TAKE_ALL[name](NATURAL, X))
    for rows in (*on_disk(tmp_path).values(), sp.coo_array(X), anndata.AnnData(sp.csr_matrix(X)), Batches()):
        for got, want in zip(jax.tree.leaves(TAKE_ALL[name](NATURAL, rows)), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)
            assert got.dtype == want.dtype
    bad = X.copy()
    bad[77, 1] = np.nan
    argument = "data" if name == "infer_blocks" else "x"
    with pytest.raises(ValueError, match=f"`{argument}` must be finite in float32; .* the first in row 77"):
        TAKE_ALL[name](NATURAL, OnDisk(bad))
    with pytest.raises(ValueError, match=rf"`{argument}` must have shape \(\.\.\., 4\); got \(0, 5\)"):
        TAKE_ALL[name](NATURAL, sp.csr_matrix(np.ones((9, 5))))


def test_a_restored_model_takes_all_that_fits_take(tmp_path, small_blocks):
    head = AnalyticHMoG(2, 3, 4)
    with CheckpointWriter(
        tmp_path, head=head, preprocessing=Preprocessing((Affine.constant(4, scale=2.0),), 4)
    ) as writer:
        writer.save(0, head.init(KEY, X))
    model = restore(tmp_path)
    for rows in (OnDisk(X), sp.csr_matrix(X), Batches()):
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5), model(rows), model(X)
        )


def test_weights_of_rows_in_a_file_count(small_blocks):
    weights = np.arange(90.0) % 3
    want = mean_log_density(NATURAL, X, weights)
    np.testing.assert_allclose(mean_log_density(NATURAL, OnDisk(X), weights), want, rtol=1e-5)
    with pytest.raises(ValueError, match=r"mean_log_density: `weights` .* got a stream of batches"):
        mean_log_density(NATURAL, Batches(), weights)


@pytest.mark.parametrize("make", [OnDisk, lambda x: [x[:40], x[40:]]])
def test_rows_are_seen_to_be_finite_once(make, small_blocks, monkeypatch):
    looked = []
    as_rows = sources.as_rows
    monkeypatch.setattr(
        sources,
        "as_rows",
        lambda x, *a, is_finite=False, **k: looked.append(is_finite) or as_rows(x, *a, is_finite=is_finite, **k),
    )
    fit_em(HEAD, make(X), KEY, max_steps=4)
    assert sum(looked) >= len(looked) - 5


@pytest.mark.parametrize("name", TAKE_ARRAYS)
def test_sparse_matrices_are_refused_with_the_way_to_take_them(name):
    for matrix in (COUNTS, COUNTS.tocoo(), sp.csc_array(COUNTS)):
        with pytest.raises(
            TypeError, match=r"must be an array in memory; got \w+ of shape \(90, 4\)\. Use infer_blocks"
        ):
            TAKE_ARRAYS[name](NATURAL, matrix)
    with pytest.raises(TypeError, match=r"must be an array, or a scipy sparse matrix .*; got BCOO of shape \(90, 4\)"):
        TAKE_ARRAYS[name](NATURAL, jax_sparse.BCOO.fromdense(COUNTS.toarray()))


def test_sparse_matrices_of_jax_are_refused_by_fits():
    for call in (fit, lambda x: fit_online_em(HEAD, x, KEY), lambda x: infer_blocks(NATURAL, x), lambda x: fit([x])):
        with pytest.raises(TypeError, match=r"got BCOO of shape .*\. Give data\.todense\(\)"):
            call(jax_sparse.BCOO.fromdense(COUNTS.toarray()))


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
def test_every_sparse_format_is_read_by_its_rows(form):
    same_fit(COUNTS.asformat(form), COUNTS.toarray())


# ------------------------------------------------------------------------------------------------- transformations


def test_fits_are_loops_on_the_host():
    message = r"fit_em: `{}` must hold values; got a tracer of jit, vmap or grad\. Call fit_em outside"
    with pytest.raises(TypeError, match=message.format("data")):
        jax.jit(lambda x: fit(x).natural)(X)
    with pytest.raises(TypeError, match=message.format("key")):
        jax.vmap(lambda key: fit_em(HEAD, X, key).natural)(jax.random.split(KEY, 2))
    with pytest.raises(TypeError, match=message.format("weights")):
        jax.jit(lambda w: fit(X, weights=w).natural)(np.ones(90))
    with pytest.raises(TypeError, match="fit_online_em: `data` must hold values"):
        jax.jit(lambda x: fit_online_em(HEAD, x, KEY).natural)(X)


def test_messages_keep_their_form():
    """Function: `argument` must RULE; got VALUE. REMEDY."""
    for call in (
        lambda: em_step(NATURAL, COUNTS),
        lambda: fit([(X[:45], Y[:45])]),
        lambda: fit(np.ma.masked_array(X, X > 0)),
        lambda: jax.jit(lambda x: fit(x).natural)(X),
        lambda: infer(NATURAL, Tensor(X, "nothing")),
        lambda: fit_em(AnalyticHMoG(2, 3, param_dtype="float64"), X, KEY),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert re.fullmatch(r"[\w.]+: `.+` must .+; .+\. [A-Z].+\.", str(caught.value)), str(caught.value)
