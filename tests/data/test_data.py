"""Data sets: prepared offline, read from files, split, shuffled and batched the same way every time."""

import dataclasses
import gzip
import io
import struct
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.sparse import csr_matrix, random_array, save_npz
from sklearn.datasets import load_digits

from experiments.images import CIFAR_FILE, CIFAR_FILES, IDX_FILES, read_idx
from flax_hmog.networks.augment import distort
from flax_hmog.recipe.config import Augmentation, Data
from flax_hmog.recipe.inputs import Batches, prepare_inputs
from flax_hmog.recipe.load import data_shape, load
from flax_hmog.training import make_mesh

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 28, 28)).astype(np.uint8)
LABELS = (np.arange(30) % 10).astype(np.uint8)


def idx(array):
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def downloads(tmp_path):
    folder = tmp_path / "downloads"
    folder.mkdir()
    for split, rows in (("train", slice(0, 24)), ("test", slice(24, 30))):
        for name, array in zip(IDX_FILES[split], (IMAGES[rows], LABELS[rows]), strict=True):
            (folder / name).write_bytes(idx(array))
    return folder


def as_sets(images, labels):
    """Images with their labels, in no order: tensorflow-datasets shuffles what it prepares."""
    return sorted(zip((image.tobytes() for image in np.asarray(images)), np.asarray(labels).tolist(), strict=True))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_are_prepared_without_network_and_tensorflow(name, downloads, tmp_path):
    data = Data(name, folder=str(tmp_path), downloads=str(downloads))
    dataset = load(data, 0)
    assert as_sets(dataset.train.read(slice(None)), dataset.train.part_labels) == as_sets(IMAGES[:24], LABELS[:24])
    assert as_sets(dataset.test.read(slice(None)), dataset.test.part_labels) == as_sets(IMAGES[24:], LABELS[24:])
    assert (tmp_path / name / "3.0.1" / "dataset_info.json").exists()
    # prepared once: the downloads are no longer needed
    again = load(Data(name, folder=str(tmp_path)), 1)
    assert again.digest == dataset.digest
    assert isinstance(again.train.rows, np.memmap)


def test_cifar_is_prepared_from_its_archive(tmp_path):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (12, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    with tarfile.open(tmp_path / CIFAR_FILE, "w:gz") as archive:
        for name, rows in zip([*CIFAR_FILES["train"], *CIFAR_FILES["test"]], np.split(records, 6), strict=True):
            entry = tarfile.TarInfo(name)
            entry.size = rows.size
            archive.addfile(entry, io.BytesIO(rows.tobytes()))
    dataset = load(Data("cifar10", folder=str(tmp_path), downloads=str(tmp_path)), 0)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert dataset.image_shape == (32, 32, 3)
    assert as_sets(dataset.train.read(slice(None)), dataset.train.part_labels) == as_sets(images[:10], records[:10, 0])


def test_missing_and_damaged_downloads_are_named(downloads, tmp_path):
    missing = IDX_FILES["test"][1]
    content = (downloads / missing).read_bytes()
    (downloads / missing).unlink()
    data = Data("mnist", folder=str(tmp_path / "data"), downloads=str(downloads))
    with pytest.raises(ValueError, match=f"lacks {missing}"):
        load(data, 0)
    (downloads / missing).write_bytes(content[:-5])
    with pytest.raises(ValueError, match=f"{missing} must be a gzipped idx file"):
        read_idx(downloads / missing)


def test_real_idx_files():
    """The files as published, where the folder beside the checkout holds them."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
    if not folder.is_dir():
        pytest.skip(f"the MNIST files are missing: no folder {folder}")
    images, labels = (read_idx(folder / name) for name in IDX_FILES["test"])
    assert images.shape == (10_000, 28, 28)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_arrays_by_path(tmp_path):
    rows = np.arange(60.0).reshape(20, 3)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "labels.npy", np.arange(20) % 4)
    data = Data("file", path=str(tmp_path / "rows.npy"), labels=str(tmp_path / "labels.npy"), test_share=0.25)
    dataset = load(data, 0)
    assert isinstance(dataset.train.rows, np.memmap)
    assert (len(dataset.train), len(dataset.test)) == (15, 5) == data_shape(data)[:2]
    np.testing.assert_array_equal(dataset.test.read(slice(None))[:, 0] / 3 % 4, dataset.test.part_labels)
    again, other = load(data, 0), load(data, 1)
    np.testing.assert_array_equal(again.train.index, dataset.train.index)
    assert not np.array_equal(other.train.index, dataset.train.index)


def test_a_draw_of_training_rows(tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(60.0).reshape(20, 3))
    data = Data("file", path=str(tmp_path / "rows.npy"), test_share=0.25)
    whole, some = load(data, 0), load(dataclasses.replace(data, rows=6), 0)
    assert len(some.train) == data_shape(dataclasses.replace(data, rows=6))[0] == 6
    assert set(some.train.index) < set(whole.train.index)
    np.testing.assert_array_equal(some.test.index, whole.test.index)
    with pytest.raises(ValueError, match=r"`data\.rows` must be at most the 15 training rows; got 16"):
        load(dataclasses.replace(data, rows=16), 0)


def test_npz_with_images_and_its_own_split(tmp_path):
    np.savez(tmp_path / "a.npz", X=IMAGES[:10], y=LABELS[:10], n_train=7)
    dataset = load(Data("file", path="a.npz", folder=str(tmp_path)), 0)
    assert dataset.image_shape == (28, 28)
    assert (len(dataset.train), len(dataset.test), dataset.obs_dim) == (7, 3, 784)
    np.testing.assert_array_equal(dataset.test.part_labels, LABELS[7:10])


def test_sparse_matrices_are_read_row_by_row(tmp_path):
    matrix = csr_matrix(random_array((12, 5), density=0.4, rng=np.random.default_rng(0)))
    save_npz(tmp_path / "a.npz", matrix)
    dataset = load(Data("file", path=str(tmp_path / "a.npz")), 0)
    assert hasattr(dataset.train.rows, "tocsr")
    dense = matrix.toarray()
    np.testing.assert_array_equal(dataset.train.read(slice(2, 5)), dense[dataset.train.index[2:5]])
    np.testing.assert_array_equal(dataset.test.read(np.array([1, 0])), dense[dataset.test.index[[1, 0]]])


def test_h5ad(tmp_path):
    anndata = pytest.importorskip("anndata", reason="the package anndata is not installed: pip install flax-hmog[h5ad]")
    counts = csr_matrix(np.arange(24, dtype=np.float32).reshape(8, 3))
    table = anndata.AnnData(counts, obs={"kind": list("aabbccdd")})
    table.write_h5ad(tmp_path / "a.h5ad")
    dataset = load(Data("file", path=str(tmp_path / "a.h5ad"), labels="kind"), 0)
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(dataset.train.rows.toarray(), counts.toarray())
    assert (dataset.identifier[0], list(dataset.identifier[1][:2])) == ("obs_names", ["0", "1"])
    with pytest.raises(ValueError, match=r"must be a column of obs; got 'type'. Choose one of \['kind'\]"):
        load(Data("file", path=str(tmp_path / "a.h5ad"), labels="type"), 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"1,2", r"must end in one of \['.csv', '.h5ad', '.npy', '.npz', '.parquet'\]"),
        ("a.csv", b"1,2\n3,4", "the first line of .*a.csv must name the columns; got 1, 2"),
        ("a.csv", b"", "a.csv must be a readable .csv file; got .*an empty file"),
        ("a.parquet", b"PAR", "a.parquet must be a readable .parquet file"),
        ("a.npz", b"PK", "must be a readable .npz file"),
        ("a.npy", b"", "must be a readable .npy file"),
        (None, None, "must be a file; got nowhere.npy"),
    ],
)
def test_unreadable_files_are_named(name, content, message, tmp_path):
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(Data("file", path=name or "nowhere.npy", folder=str(tmp_path)), 0)


def test_arrays_without_rows_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.ones(3))
    with pytest.raises(ValueError, match="must hold one of"):
        load(Data("file", path=str(tmp_path / "a.npz")), 0)
    np.save(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"must hold rows \(N, D\); got shape \(3,\)"):
        load(Data("file", path=str(tmp_path / "a.npy")), 0)
    for n_train in (0, 3, 5):
        np.savez(tmp_path / "c.npz", X=np.ones((3, 2)), n_train=n_train)
        with pytest.raises(ValueError, match=rf"`n_train` in .*c.npz must lie in 1 \.\. 2; got {n_train}"):
            load(Data("file", path=str(tmp_path / "c.npz")), 0)
    np.save(tmp_path / "d.npy", np.array([["a"], ["b"]]))
    with pytest.raises(ValueError, match="must hold real numbers; got dtype <U1"):
        load(Data("file", path=str(tmp_path / "d.npy")), 0)
    np.savez(tmp_path / "b.npz", X=np.ones((3, 2)), y=np.ones(4))
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\); got \(4,\)"):
        load(Data("file", path=str(tmp_path / "b.npz")), 0)


def test_missing_values_are_named_before_anything_is_fitted(tmp_path):
    rows = np.ones((20, 3))
    rows[7, 2] = np.nan
    np.savez(tmp_path / "rows.npz", X=rows, n_train=18)
    data = Data("file", path=str(tmp_path / "rows.npz"), scale="standard")
    dataset, mesh = load(data, 0), make_mesh()
    with pytest.raises(ValueError, match="the data must be finite; got nan in column 2"):
        prepare_inputs(data, dataset, mesh)


def test_names_serve_as_labels(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.ones((4, 2)), y=np.array(["b", "a", "b", "c"]), n_train=2)
    dataset = load(Data("file", path=str(tmp_path / "a.npz")), 0)
    np.testing.assert_array_equal(dataset.train.labels, [1, 0, 1, 2])
    assert len(dataset.digest) == 64


@pytest.fixture(scope="module")
def inputs():
    data = Data("digits", scale="range")
    return prepare_inputs(data, load(data, 0), make_mesh())


def test_whole_parts_are_on_the_mesh(inputs):
    x, weights = inputs.rows(inputs.dataset.test)
    raw = load_digits().data / 16
    np.testing.assert_allclose(x, raw[inputs.dataset.test.index], rtol=1e-6)
    assert weights.sum() == len(inputs.dataset.test) == 360
    assert inputs.rows(inputs.dataset.train, 100)[0].shape == (100, 64)


def test_batches_follow_from_seed_and_step_alone(inputs):
    batches = Batches(inputs, seed=3, size=100, epochs=2)
    assert (len(batches), batches.per_epoch) == (28, 14)
    first = [np.asarray(batch) for batch in batches.iterate()]
    assert len(first) == 28
    for step in (27, 0, 13):
        np.testing.assert_array_equal(Batches(inputs, 3, 100, 2)[step], first[step])
    epochs = [np.concatenate(first[:14]), np.concatenate(first[14:])]
    assert not np.array_equal(*epochs)
    rows = inputs.read(inputs.dataset.train, slice(None))
    twins = len(rows) - len(np.unique(rows, axis=0))
    for epoch in epochs:  # no row twice, but for rows that are equal
        assert len(np.unique(epoch, axis=0)) >= 1400 - twins
    assert not np.array_equal(Batches(inputs, 4, 100, 2)[0], first[0])


def test_batches_go_on_from_a_position(inputs):
    batches = Batches(inputs, seed=0, size=200, epochs=3)
    iterator = batches.iterate()
    for _ in range(9):
        next(iterator)
    position = iterator.get_state()
    rest = [np.asarray(batch) for batch in iterator]
    again = [np.asarray(batch) for batch in batches.iterate(position)]
    assert len(rest) == len(again) == len(batches) - 9
    jax.tree.map(np.testing.assert_array_equal, rest, again)


def test_image_sets_need_not_be_there_for_their_shape(tmp_path):
    assert data_shape(Data("cifar10", folder=str(tmp_path))) == (50_000, 10_000, 3072, (32, 32, 3))


def test_distortions_move_images_as_they_say():
    image = np.zeros((9, 9, 1), np.float32)
    image[4, 2] = 1
    rows = np.broadcast_to(image.reshape(1, -1), (200, 81))
    key = jax.random.key(0)
    np.testing.assert_array_equal(distort(key, rows, (9, 9), Augmentation()), rows)
    shifted = np.asarray(distort(key, rows, (9, 9, 1), Augmentation(shift=2.0))).reshape(200, 9, 9)
    np.testing.assert_allclose(shifted.sum((1, 2)), 1, atol=1e-5)  # bilinear weights
    centers = np.stack([(shifted * grid).sum((1, 2)) for grid in np.mgrid[:9, :9]], axis=1) - [4, 2]
    assert 1.8 < np.abs(centers).max() <= 2 + 1e-5
    assert np.abs(centers.mean(0)).max() < 0.3
    turned = np.asarray(distort(key, rows, (9, 9), Augmentation(rotation=90.0))).reshape(200, 9, 9)
    centers = np.stack([(turned * grid).sum((1, 2)) / turned.sum((1, 2)) for grid in np.mgrid[:9, :9]], axis=1) - 4
    assert np.abs(np.linalg.norm(centers, axis=1) - 2).max() < 0.4
    assert centers[:, 1].max() < 0.2
    grown = np.asarray(distort(key, rows, (9, 9), Augmentation(scale=0.5))).reshape(200, 9, 9)
    at = (grown * np.arange(9)[None, None]).sum((1, 2)) / grown.sum((1, 2))
    assert at.min() < 1.5 < 2.5 < at.max()
