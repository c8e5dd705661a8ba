"""What holds rows: read as the library that it comes from means it, by blocks where it is large, refused by name else."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.experimental import sparse as jax_sparse

from flax_hmog import (
    AnalyticHMoG,
    DifferentiableHMoG,
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
from flax_hmog.analysis import clustering_metrics, component_summary, contingency_table, plot_latent_space
from flax_hmog.analysis.inputs import as_groups
from flax_hmog.data import sources
from flax_hmog.data.containers import in_memory, read_rows
from flax_hmog.data.labels import check_labels, encode_labels
from flax_hmog.data.sources import Stream
from flax_hmog.training import Affine, CheckpointWriter, Preprocessing, restore

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
    got, want = infer_blocks(NATURAL, rows), infer(NATURAL, X)
    np.testing.assert_allclose(got.log_density, want.log_density, rtol=1e-5)
    online = fit_online_em(HEAD, rows, KEY, batch_size=30, passes=2)
    np.testing.assert_allclose(
        online.objective_history, fit_online_em(HEAD, X, KEY, batch_size=30, passes=2).objective_history, rtol=1e-3
    )
    index = np.array([0, 3, 4, 80, 89])
    np.testing.assert_array_equal(read_rows(rows, index), X[index])
    assert read_rows(rows, index[:0]).shape == (0, 4)
    if name == "own":
        assert max(index.stop - index.start for index in rows.read) <= 90


def test_far_rows_of_a_file_are_read_by_few_small_slices():
    rows = OnDisk(np.arange(20_000.0).reshape(-1, 2))
    index = np.sort(np.random.default_rng(0).choice(10_000, 500, replace=False))
    np.testing.assert_array_equal(read_rows(rows, index)[:, 0], 2 * index)
    assert len(rows.read) < 300
    read_rows(rows, np.arange(0, 10_000, 1))
    assert max(index.stop - index.start for index in rows.read) <= 64 * 1000


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


# ------------------------------------------------------------------------------------------------- streams

PAIR = (X[:45], Y[:45])
STREAMS = {
    "pairs": (
        [PAIR],
        TypeError,
        r"batches \(B, D\) of rows alone; got tuple with 0: \(45, 4\), 1: \(45,\).*batch\[0\]",
    ),
    "lists of tensors": ([[X[:45], Y[:45]]], TypeError, "rows alone; got list with 0"),
    "dicts": (
        [{"image": X, "label": Y}],
        TypeError,
        r"rows alone; got dict with 'image': \(90, 4\), .*batch\['image'\]",
    ),
    "list of rows": (
        list(X),
        ValueError,
        r"batches \(B, D\); got \(4,\)\. Join single rows to one array: numpy\.stack",
    ),
    "list of lists": (X.tolist(), ValueError, r"got \(4,\)\. Join .* numpy\.asarray\(data\)"),
    "images": ([X.reshape(-1, 2, 2)], ValueError, r"got \(90, 2, 2\)\. Flatten .*reshape\(len\(batch\), -1\)"),
    "a dict": ({"image": X}, TypeError, "array or a collection of batches .*; got dict"),
    "texts": ([np.array([["a"] * 4])], TypeError, "hold real numbers; got dtype <U1"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_batches_that_are_no_rows(name):
    data, exception, message = STREAMS[name]
    with pytest.raises(exception, match=f"fit_em: `data` must .*{message}"):
        fit(data)


def test_batches_of_any_kind(tmp_path):
    pd = pytest.importorskip("pandas")
    first, second = COUNTS.toarray()[:45], COUNTS.toarray()[45:]
    for batches in (
        [pd.DataFrame(first), COUNTS[45:]],
        [Tensor(first), OnDisk(second)],
        [first.tolist(), jnp.asarray(second)],
        [first.astype(int), second.astype(np.float64)],
    ):
        if isinstance(batches[1], OnDisk):
            batches[1] = batches[1].rows
        same_fit(batches, [first, second])


def test_a_stream_is_sampled_over_the_whole_pass(monkeypatch):
    """Every row is as likely as any other to be seen by the start: batches may come class by class."""
    monkeypatch.setattr(sources, "SAMPLE_ROWS", 200)
    rows = np.arange(5000.0).reshape(-1, 1)
    stream = Stream(np.split(rows, 50), None, jnp.float32)
    x, weights, labels = stream.sample()
    numbers = np.asarray(x)[:, 0]
    assert len(set(numbers)) == 200
    assert weights.shape == (200,)
    assert labels is None
    assert (np.diff(numbers) > 0).all()
    # uniform: mean 2500 with standard deviation 5000 / sqrt(12 * 200) = 102; quarters 50 each, sd 6
    assert abs(numbers.mean() - 2500) < 4 * 102
    assert (abs(np.histogram(numbers, 4, (0, 5000))[0] - 50) < 4 * 6.2).all()
    np.testing.assert_array_equal(stream.sample()[0], x)
    other = Stream(np.split(rows, [7, 180, 333, 334, 2001]), None, jnp.float32).sample()[0]
    assert other.shape == (200, 1)
    hits = np.zeros(1000)
    monkeypatch.setattr(sources, "SAMPLE_ROWS", 100)
    for size in range(1, 41):  # other batches, other draws: 40 samples of a tenth, sd 1.9
        batches = np.split(np.arange(1000.0)[:, None], range(size * 13, 1000, size * 13))
        hits[np.asarray(Stream(batches, 1, jnp.float32).sample()[0])[:, 0].astype(int)] += 1
    assert abs(hits[:500].sum() - 2000) < 300


def test_a_short_stream_is_seen_as_it_is():
    batches = [X[:50].astype(np.float64), X[50:]]
    np.testing.assert_array_equal(Stream(batches, None, jnp.float32).sample()[0], X)
    mixed = [np.zeros((3, 2), int), np.full((3, 2), 0.5)]
    np.testing.assert_array_equal(Stream(mixed, None, jnp.float32).sample()[0], np.concatenate(mixed))


def test_batches_sorted_by_class_start_as_shuffled_ones_do(monkeypatch):
    monkeypatch.setattr(sources, "SAMPLE_ROWS", 60)
    rng = np.random.default_rng(1)
    x = (10 * np.eye(4)[np.repeat(range(4), 200)] + rng.normal(size=(800, 4))).astype(np.float32)
    head = AnalyticHMoG(3, 4)
    result = fit_em(head, np.split(x, 16), KEY, max_steps=20)
    found = posterior_hard_assignment(result.natural, x)
    assert clustering_metrics(np.repeat(range(4), 200), found)["ari"] > 0.95


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


# ------------------------------------------------------------------------------------------------- labels

NAMES = np.array(["b", "a", "c"])[Y]  # a, b, c are components 0, 1, 2
CODES = np.array([1, 0, 2])[Y]


def labels_by_name():
    pd = pytest.importorskip("pandas")
    pa = pytest.importorskip("pyarrow")
    unknown = np.arange(90) % 4 == 0
    gaps = [None if gone else name for gone, name in zip(unknown, NAMES, strict=True)]
    whole = {
        "array": NAMES,
        "objects": NAMES.astype(object),
        "bytes": NAMES.astype("S"),
        "list": NAMES.tolist(),
        "series": pd.Series(NAMES),
        "categorical": pd.Categorical(NAMES, categories=list("xcba")),
        "arrow": pa.array(NAMES.tolist()),
    }
    some = {
        "None": gaps,
        "NaN": [np.nan if name is None else name for name in gaps],
        "empty": np.where(unknown, "", NAMES),
        "series with None": pd.Series(gaps),
        "string series": pd.Series(gaps, dtype="string"),
        "categories": pd.Series(gaps, dtype="category"),
        "masked": np.ma.masked_array(NAMES, unknown),
        "arrow with null": pa.array(gaps),
    }
    return whole, some, unknown


def test_names_become_components_in_their_order():
    whole, some, unknown = labels_by_name()
    for group, want in ((whole, CODES), (some, np.where(unknown, -1, CODES))):
        for what, labels in group.items():
            codes, classes = check_labels(labels, (90,), 3)
            np.testing.assert_array_equal(codes, want, err_msg=what)
            assert (codes.dtype, classes) == (jnp.int32, ("a", "b", "c")), what


def test_integers_stay_numbers_of_components():
    pd = pytest.importorskip("pandas")
    unknown = np.arange(90) % 4 == 0
    want = np.where(unknown, -1, Y)
    gaps = [None if gone else int(k) for gone, k in zip(unknown, Y, strict=True)]
    for labels in (
        want,
        want.astype(np.int8),
        want.tolist(),
        jnp.asarray(want),
        gaps,
        pd.Series(gaps),
        pd.Series(gaps, dtype="Int64"),
        pd.Series(gaps, dtype="category"),
        np.ma.masked_array(Y, unknown),
        np.where(unknown, np.nan, Y),
    ):
        codes, classes = check_labels(labels, (90,), 3)
        np.testing.assert_array_equal(codes, want)
        assert classes is None
    assert check_labels([None] * 5, (5,), 3)[1] is None
    np.testing.assert_array_equal(check_labels([None] * 5, (5,), 3)[0], [-1] * 5)


def test_labels_that_are_no_classes_are_named():
    for labels, message in (
        (["a", "b", "c", "d"] * 22 + ["a", "b"], "must name at most 3 classes, a component each; got 4: 'a', 'b', 'c'"),
        ([0, "b"] * 45, "must be all numbers or all names; got int and str"),
        (np.full(90, 0.5), r"must be integers from -1 \(unknown\) to 2; got"),
        (Y.astype(bool), r"must be integers from -1 \(unknown\) to 2; got bool"),
        (np.where(Y == 0, np.nan, 7), r"must be integers from -1 \(unknown\) to 2; got int64 from -1 to 7"),
        (NAMES[:5], r"must have shape \(90,\); got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=f"fit_em: `labels` {message}"):
            fit(X, labels=labels)


def test_fits_say_which_component_has_which_name():
    known = np.where(np.arange(90) % 5 == 0, NAMES, "")
    for result in (fit(X, labels=known, max_steps=20), fit_online_em(HEAD, X, KEY, labels=known, batch_size=30)):
        assert result.classes == ("a", "b", "c")
    plain = fit(X, labels=np.where(known == "", -1, CODES), max_steps=20)
    assert plain.classes is None
    np.testing.assert_array_equal(plain.objective_history, fit(X, labels=known, max_steps=20).objective_history)
    named = np.array(["a", "b", "c"])[posterior_hard_assignment(fit(X, labels=NAMES, max_steps=20).natural, X)]
    assert (named == NAMES).mean() > 0.95


def test_metrics_leave_unlabelled_samples_out():
    """Clusters that are right wherever a label is known are right."""
    pd = pytest.importorskip("pandas")
    gone = np.arange(90) % 4 == 0
    found = np.where(gone, 7, Y)
    _, some, _ = labels_by_name()
    for labels in (*some.values(), np.where(gone, np.nan, Y), pd.Series(Y).astype("Int64").mask(gone)):
        metrics = clustering_metrics(labels, found)
        assert metrics == pytest.approx({"nmi": 1.0, "ari": 1.0, "accuracy": 1.0, "labelled": 67})
        counts, clusters, columns = contingency_table(labels, found)
        assert counts.shape == (3, 3)
        assert counts.sum() == 67 == np.trace(counts[np.argsort(counts.argmax(axis=1))])
        assert len(columns) == 3
        assert 7 not in clusters
    # integers are labels, -1 too
    assert clustering_metrics(np.where(gone, -1, Y), found) == pytest.approx({"nmi": 1.0, "ari": 1.0, "accuracy": 1.0})
    with pytest.raises(ValueError, match="clustering_metrics: `labels` must have one that is known; got 2"):
        clustering_metrics([None, ""], [0, 1])


def test_samples_without_a_label_are_a_group_of_their_own():
    names = as_groups("groups", ["b", None, "a", np.nan], 4)
    assert names.tolist() == ["b", "no label", "a", "no label"]
    assert as_groups("groups", [3, 1], 2).tolist() == [3, 1]
    figure = plot_latent_space(NATURAL, X, groups=np.where(Y == 0, None, NAMES))
    assert "no label" in {text.get_text() for text in figure.axes[0].texts}


def test_codes_of_labels_in_general():
    codes, known, names = encode_labels(np.array([0.5, 1.5, np.nan]))
    assert (codes.tolist(), known.tolist(), names) == ([0, 1, -1], [True, True, False], ("0.5", "1.5"))
    codes, known, names = encode_labels([10, None, -1])
    assert (codes.tolist(), known.tolist(), names) == ([10, -1, -1], [True, False, True], None)


def test_messages_keep_their_form():
    """Function: `argument` must RULE; got VALUE. REMEDY."""
    for call in (
        lambda: em_step(NATURAL, COUNTS),
        lambda: fit([PAIR]),
        lambda: fit(np.ma.masked_array(X, X > 0)),
        lambda: fit(X, labels=[0, "b"] * 45),
        lambda: jax.jit(lambda x: fit(x).natural)(X),
        lambda: infer(NATURAL, Tensor(X, "nothing")),
        lambda: fit_em(AnalyticHMoG(2, 3, param_dtype="float64"), X, KEY),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert re.fullmatch(r"[\w.]+: `.+` must .+; .+\. [A-Z].+\.", str(caught.value)), str(caught.value)
    assert json.dumps(fit(X, labels=NAMES).classes) == '["a", "b", "c"]'
