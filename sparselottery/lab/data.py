"""Image classification data held in memory as tensors: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import cifar

ENVIRONMENT = "SPARSELOTTERY_DATA"


@dataclass(frozen=True)
class Dataset:
    """Three splits. ``*_x`` (N, *shape) float32; ``*_y`` (N,) int64 in [0, classes).

    Images are vectors of numbers in [0, 1], shape (features,), but for CIFAR-10: shape (3, 32, 32), and a channel has
    mean 0 and deviation 1 in the training images. ``note``: what to say beside figures made from these data.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.train_x.shape[1:])

    def to(self, device: str | torch.device) -> Dataset:
        """The same, all tensors on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    @property
    def features(self) -> int:
        """How many numbers an image has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Source:
    """Where gzipped files are published, with the MD5 sums of them; the names are without ".gz"."""

    url: str
    md5: dict[str, str]


SOURCES = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": Source(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
}
NAMES = ("digits", *SOURCES)


def load(name: str) -> Dataset:
    """The data set called ``name``, one of `NAMES`. The split never changes: seeds belong to the training.

    ``digits`` comes with scikit-learn. The others are read from the folder ``$SPARSELOTTERY_DATA`` (its subfolder
    ``name`` or, but for Fashion-MNIST, itself) when that is set, and otherwise downloaded once, checked against their
    MD5 sums. `cifar.read` says in which forms CIFAR-10 may come.

    Raises FileNotFoundError for what is not there and cannot be downloaded, ValueError for an unknown name or a file
    that is not what it should be.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data {name!r}: expected one of {', '.join(NAMES)}")
    if name == "digits":
        return _digits()
    return _cifar10() if name == "cifar10" else _idx_data(name)


def _digits() -> Dataset:
    """1797 8x8 images: 1257 to train on, 180 for validation, 360 for the test."""
    from sklearn.datasets import load_digits  # takes a second to import

    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x / 16).float(), torch.from_numpy(y).long()
    test, val, train = _shuffled(len(x)).split([360, 180, len(x) - 540])
    return Dataset("digits", 10, x[train], y[train], x[val], y[val], x[test], y[test])


def _idx_data(name: str) -> Dataset:
    """A twelfth of the training images is kept for validation: 55k / 5k / 10k, as in the paper."""
    files = {file: _locate(name, file) for file in SOURCES[name].md5}
    train_x, train_y = _images_and_labels(files["train-images-idx3-ubyte"], files["train-labels-idx1-ubyte"])
    test_x, test_y = _images_and_labels(files["t10k-images-idx3-ubyte"], files["t10k-labels-idx1-ubyte"])
    if test_x.shape[1] != train_x.shape[1]:
        raise ValueError(f"{name}: training images have {train_x.shape[1]} pixels, test images {test_x.shape[1]}")
    held_out = len(train_x) // 12
    val, train = _shuffled(len(train_x)).split([held_out, len(train_x) - held_out])
    return Dataset(name, 10, train_x[train], train_y[train], train_x[val], train_y[val], test_x, test_y)


def _cifar10() -> Dataset:
    """A tenth of the training images is kept for validation: 45k / 5k / 10k, as in the paper."""
    name = "cifar10"
    places = _places(name) or [_download(name, file).parent for file in SOURCES[name].md5]
    images, note = cifar.read(places, _cache(name))
    x, y = images["train_x"], images["train_y"]
    held_out = len(y) // 10
    val, train = _shuffled(len(y)).split([held_out, len(y) - held_out])
    train_x, val_x, test_x = x[train].float(), x[val].float(), images["test_x"].float()
    std, mean = torch.std_mean(train_x, dim=(0, 2, 3), keepdim=True)
    for part in (train_x, val_x, test_x):
        part.sub_(mean).div_(std)
    return Dataset(name, 10, train_x, y[train], val_x, y[val], test_x, images["test_y"], note)


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _places(name: str) -> list[Path]:
    """Where the user keeps data, most special first; empty if no folder is named."""
    if ENVIRONMENT not in os.environ:
        return []
    folder = Path(os.environ[ENVIRONMENT])
    # Fashion-MNIST's files are named as MNIST's are: only its own subfolder can tell them apart.
    return [folder / name] if name == "fashion-mnist" else [folder / name, folder]


def _locate(name: str, file: str) -> Path:
    """The path of an idx file, gzipped or not, downloaded first if no folder is named."""
    places = _places(name)
    if not places:
        return _download(name, file)
    for path in (place / (file + suffix) for place in places for suffix in (".gz", "")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name}: no {file}[.gz] in {' or '.join(map(str, places))} (of {ENVIRONMENT})")


def _cache(name: str) -> Path:
    """Where downloads and decoded images are kept: beside the other caches of the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparselottery" / name


def _download(name: str, file: str) -> Path:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    source = SOURCES[name]
    try:
        return Path(pooch.retrieve(f"{source.url}{file}.gz", f"md5:{source.md5[file]}", f"{file}.gz", _cache(name)))
    except OSError as error:
        files = ", ".join(f"{each}.gz" for each in source.md5)
        raise FileNotFoundError(
            f"{name}: cannot download {source.url}{file}.gz ({type(error).__name__}); "
            f"put {files} into a folder {name}/ and set {ENVIRONMENT} to its parent"
        ) from error


def _images_and_labels(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    x, y = _read_idx(images, dimensions=3), _read_idx(labels, dimensions=1)
    if len(x) != len(y):
        raise ValueError(f"{labels}: {len(y)} labels for the {len(x)} images of {images.name}")
    if len(y) and y.max() > 9:
        raise ValueError(f"{labels}: label {y.max()}, expected 0..9")
    return torch.from_numpy(x.reshape(len(x), -1).astype(np.float32) / 255), torch.from_numpy(y.astype(np.int64))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes: big-endian int32 magic (0x0800 + dimensions), sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated or corrupt gzip file ({error})") from error
    start = 4 * (1 + dimensions)
    header = np.frombuffer(raw[:start].ljust(start, b"\0"), dtype=">u4")
    if header[0] != 0x0800 + dimensions:
        raise ValueError(f"{path}: idx magic 0x{header[0]:08x}, expected 0x{0x0800 + dimensions:08x}")
    shape = tuple(int(size) for size in header[1:])
    if len(raw) != start + np.prod(shape, dtype=object):
        raise ValueError(f"{path}: {len(raw)} bytes, expected {start} + {' * '.join(map(str, shape))}")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)
