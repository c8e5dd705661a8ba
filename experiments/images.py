"""Image sets by tensorflow-datasets, without tensorflow: prepared once, decoded once, memory-mapped from then on."""

from __future__ import annotations

import dataclasses
import gzip
import io
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flax_hmog.data.files import File
from flax_hmog.recipe import load
from flax_hmog.recipe.config import Data
from flax_hmog.training.processes import on_first_process

IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CIFAR_FILE = "cifar-10-binary.tar.gz"
CIFAR_FILES = {
    "train": [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)],
    "test": ["cifar-10-batches-bin/test_batch.bin"],
}


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """An image set of tensorflow-datasets.

    Attributes:
        title: what it is.
        shape: of an image.
        n_train: training images.
        n_test: test images.
        files: what is downloaded.
        examples: gives (image, label) of a split ("train" or "test") from the paths of the files by name.
    """

    title: str
    shape: tuple[int, ...]
    n_train: int
    n_test: int
    files: tuple[str, ...]
    examples: Callable[[dict[str, Path], str], Iterator[tuple[np.ndarray, int]]]


def idx_examples(paths: dict[str, Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images (28, 28) and labels of a pair of idx files."""
    images, labels = (read_idx(paths[name]) for name in IDX_FILES[split])
    if len(images) != len(labels):
        raise ValueError(f"idx_examples: images and labels must be as many; got {len(images)} and {len(labels)}.")
    return zip(images, labels.tolist(), strict=True)


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped idx file.

    Raises:
        ValueError: for a file that is damaged or of another kind.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        zeros, kind, dims = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
        if zeros or kind != 8:
            raise ValueError(f"magic number {content[:4].hex()}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise ValueError(
            f"read_idx: {path} must be a gzipped idx file of bytes; got {type(error).__name__}: {error}. "
            "Download it again."
        ) from error


def cifar_examples(paths: dict[str, Path], split: str) -> Iterator[tuple[np.ndarray, int]]:
    """Images (32, 32, 3) and labels of the binary version of CIFAR-10."""
    with tarfile.open(paths[CIFAR_FILE]) as archive:
        for name in CIFAR_FILES[split]:
            member: Any = archive.extractfile(name)
            records = np.frombuffer(member.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
            images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            yield from zip(images, records[:, 0].tolist(), strict=True)


_IDX = tuple(name for names in IDX_FILES.values() for name in names)
IMAGES = {
    "mnist": ImageSet("MNIST", (28, 28), 60_000, 10_000, _IDX, idx_examples),
    "fashion_mnist": ImageSet("Fashion-MNIST", (28, 28), 60_000, 10_000, _IDX, idx_examples),
    "cifar10": ImageSet("CIFAR-10", (32, 32, 3), 50_000, 10_000, (CIFAR_FILE,), cifar_examples),
}


def load_images(name: str, folder: Path, downloads: Path | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Images as rows, memory-mapped, their labels, and the number of training images, which come first.

    Args:
        name: one of `IMAGES`.
        folder: where tensorflow-datasets keeps its sets; a set that is prepared there already is used as it is.
        downloads: folder with the set's files as their publisher names them; None downloads them.

    Raises:
        ValueError: if files are missing or damaged.
    """
    arrays = folder / "arrays" / name
    on_first_process(lambda: None if (arrays / "n_train.npy").exists() else _decode(name, folder, downloads, arrays))
    if not (arrays / "n_train.npy").exists():
        raise ValueError(f"load_images: {arrays} must be visible to all processes. Share {folder}, or prepare it.")
    rows, labels = (np.load(arrays / f"{part}.npy", mmap_mode="r") for part in ("rows", "labels"))
    return rows, np.asarray(labels), int(np.load(arrays / "n_train.npy"))


def _decode(name: str, folder: Path, downloads: Path | None, arrays: Path) -> None:
    """Read every image of the prepared set once: an array is a hundred times faster to read from."""
    import tensorflow_datasets as tfds

    prepare(name, folder, downloads)
    sources = [tfds.data_source(name, data_dir=folder, split=split) for split in ("train", "test")]
    arrays.mkdir(parents=True, exist_ok=True)
    count = sum(map(len, sources))
    shape = (count, int(np.prod(sources[0][0]["image"].shape)))
    rows = np.lib.format.open_memmap(arrays / "rows.npy", "w+", np.uint8, shape)
    labels = np.empty(count, np.int64)
    examples = (example for source in sources for example in source)
    for number, example in enumerate(examples):
        rows[number], labels[number] = example["image"].reshape(-1), example["label"]
    rows.flush()
    np.save(arrays / "labels.npy", labels)
    np.save(arrays / "n_train.npy", len(sources[0]))  # the last file: all is there


def prepare(name: str, folder: Path, downloads: Path | None) -> None:
    """Prepare a set as tensorflow-datasets does, but without tensorflow; nothing if it is prepared.

    Raises:
        ValueError: if a file is missing in `downloads`.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    images = IMAGES[name]
    if downloads is not None:
        missing = [file for file in images.files if not (downloads / file).is_file()]
        if missing:
            raise ValueError(
                f"load_images: `data.downloads` must hold {', '.join(images.files)}; {downloads} lacks "
                f"{', '.join(missing)}. Copy them there, or leave --data.downloads out to download."
            )

    def png(image: np.ndarray) -> io.BytesIO:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "png", compress_level=1)
        stream.seek(0)
        return stream

    stock = tfds.builder_cls(name)
    with tfds.core.registered.skip_registration():

        class Builder(stock):  # type: ignore[misc, valid-type]
            """The set, its images given as PNG: tensorflow would be needed to encode arrays."""

            def _split_generators(self, manager: Any) -> dict[str, Iterator]:
                if downloads is None:
                    base = stock.URL if hasattr(stock, "URL") else self._cifar_info.url.rsplit("/", 1)[0] + "/"
                    paths = {file: Path(manager.download(base + file)) for file in images.files}
                else:
                    paths = {file: downloads / file for file in images.files}
                return {split: self._examples(paths, split) for split in ("train", "test")}

            def _examples(self, paths: dict[str, Path], split: str) -> Iterator[tuple[int, dict[str, Any]]]:
                for number, (image, label) in enumerate(images.examples(paths, split)):
                    extra = {"id": f"{split}_{number:05d}"} if "id" in self.info.features else {}
                    yield number, {"image": png(image), "label": label} | extra

    Builder.name = name
    try:
        Builder(data_dir=folder, file_format="array_record").download_and_prepare()
    except ValueError as error:
        if "File format" not in str(error):
            raise
        raise ValueError(
            f"load_images: a set that is prepared already must be in array_record; {name} in {folder} is not "
            f"({error}). Choose another --data.folder."
        ) from error


def _read_images(data: Data) -> File:
    images, downloads = IMAGES[data.name], Path(data.downloads) if data.downloads else None
    rows, labels, n_train = load_images(data.name, Path(data.folder), downloads)
    return File(rows, labels, n_train, images.shape, title=images.title)


for _name, _set in IMAGES.items():
    load.DATA_SETS[_name] = _read_images
    load.SHAPES[_name] = _set.n_train, _set.n_test, int(np.prod(_set.shape)), _set.shape
