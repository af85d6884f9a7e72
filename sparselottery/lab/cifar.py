"""CIFAR-10 from files: the published batches, binary or pickled, in a folder or archive, or single images.

Everything is held in memory: ``train_x``, ``test_x`` uint8 (N, 3, 32, 32), ``train_y``, ``test_y`` int64 (N,).
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import imagefolder

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # label 0..9
SIZE = (32, 32)
PIXELS = 3 * 32 * 32
BATCH_IMAGES = 10_000  # in each of the published files
BINARY = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz")  # a folder, and the archive of it
PYTHON = ("cifar-10-batches-py", "cifar-10-python.tar.gz")
IMAGES = "cifar10*.tar.*"
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

Batch = tuple[np.ndarray, np.ndarray]  # uint8 (BATCH_IMAGES, PIXELS), and the labels (BATCH_IMAGES,)


def read(places: Sequence[Path], cache: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, and what has to be said beside any figure made from them ("" for the published images).

    Reads the first of these that is in one of the folders ``places``: ``cifar-10-batches-bin/``,
    ``cifar-10-binary.tar.gz``, ``cifar-10-batches-py/``, ``cifar-10-python.tar.gz``, an archive ``cifar10*.tar.*`` of
    images ``train|test/<class>/<name>.jpg|png``, and folders ``train/`` and ``test/`` of those. ``cache`` is where the
    decoded images of an archive are kept.

    Raises FileNotFoundError if there is none, ValueError if a file is not what it should be.
    """
    for place in places:
        for path in (place / name for name in (*BINARY, *PYTHON)):
            if path.exists():
                return _read_batches(path), ""
        for path in (*sorted(place.glob(IMAGES)), place):
            if path.is_file() or all((path / part).is_dir() for part in imagefolder.PARTS):
                return _read_images(path, cache)
    wanted = ", ".join((*BINARY, *PYTHON, IMAGES, "train/ and test/"))
    raise FileNotFoundError(f"cifar10: expected one of {wanted} in {' or '.join(map(str, places))}, found none")


def _read_images(path: Path, cache: Path) -> tuple[dict[str, Tensor], str]:
    tensors, jpeg = imagefolder.read(path, CLASSES, SIZE, cache)
    for part, expected in (("train", 5 * BATCH_IMAGES), ("test", BATCH_IMAGES)):
        if (found := len(tensors[f"{part}_y"])) != expected:
            raise ValueError(f"{path}: {found} {part} images, expected {expected}")
    return tensors, f"JPEG-recompressed images in {path.name}: not bit-equal to CIFAR-10" if jpeg else ""


def _read_batches(path: Path) -> dict[str, Tensor]:
    suffix, parse = (".bin", _binary_batch) if path.name in BINARY else ("", _python_batch)
    names = [name + suffix for name in (*TRAIN_BATCHES, "test_batch")]
    files = _files_in_folder(path, names) if path.is_dir() else _files_in_archive(path, names)
    batches = []
    for name in names:
        try:
            x, y = parse(files[name])
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
        if y.max() >= len(CLASSES):
            raise ValueError(f"{path}: {name}: label {y.max()}, expected 0..{len(CLASSES) - 1}")
        batches.append((x, y))
    tensors = {}
    for part, chosen in (("train", batches[:-1]), ("test", batches[-1:])):
        tensors[f"{part}_x"] = torch.from_numpy(np.concatenate([x for x, _ in chosen])).view(-1, 3, *SIZE)
        tensors[f"{part}_y"] = torch.from_numpy(np.concatenate([y for _, y in chosen]).astype(np.int64))
    return tensors


def _files_in_folder(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder}: expected {', '.join(names)}, missing {', '.join(missing)}")
    return {name: (folder / name).read_bytes() for name in names}


def _files_in_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path, mode="r|*") as tar:
            for member in tar:
                if member.isfile() and (name := Path(member.name).name) in names:
                    files[name] = tar.extractfile(member).read()
    except imagefolder.CORRUPT as error:
        raise ValueError(f"{path}: truncated or corrupt archive ({type(error).__name__}: {error})") from error
    if missing := [name for name in names if name not in files]:
        raise ValueError(f"{path}: expected {', '.join(names)} in it, missing {', '.join(missing)}")
    return files


def _binary_batch(raw: bytes) -> Batch:
    """Rows of a label and an image: PIXELS bytes, the planes R, G, B."""
    if len(raw) != BATCH_IMAGES * (1 + PIXELS):
        raise ValueError(f"{len(raw)} bytes, expected {BATCH_IMAGES} * {1 + PIXELS}")
    rows = np.frombuffer(raw, dtype=np.uint8).reshape(BATCH_IMAGES, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _python_batch(raw: bytes) -> Batch:
    """A pickled dict with ``data``, an array, and ``labels``, a list."""
    try:
        batch = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except _Forbidden:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"truncated or corrupt pickle ({type(error).__name__}: {error})") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise ValueError("expected a pickled dict with data and labels")
    labels = batch[b"labels"]
    if not isinstance(labels, list) or not all(type(label) is int and label >= 0 for label in labels):
        raise ValueError("labels: expected a list of integers from 0")
    if len(labels) != BATCH_IMAGES:
        raise ValueError(f"{len(labels)} labels, expected {BATCH_IMAGES}")
    return _array(batch[b"data"]), np.array(labels)


def _array(pickled: object) -> np.ndarray:
    """What numpy would make of a pickled uint8 array: its state is (version, shape, dtype, is_fortran, bytes)."""
    state = pickled.state if isinstance(pickled, _Inert) else None
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[4], bytes):
        raise ValueError("data: expected a pickled numpy array")
    _, shape, dtype, fortran, raw = state
    kind = dtype.arguments[:1] if isinstance(dtype, _Inert) else dtype
    if (shape, kind) != ((BATCH_IMAGES, PIXELS), (b"u1",)) or len(raw) != BATCH_IMAGES * PIXELS:
        raise ValueError(f"data: expected u1 {(BATCH_IMAGES, PIXELS)}, got {kind} {shape} in {len(raw)} bytes")
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _Forbidden(ValueError):
    """A pickle that asks for more than an array."""


class _Inert:
    """Stands for whatever a pickle names: keeps what it is given and does nothing."""

    arguments: tuple = ()
    state: object = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes dicts, lists, tuples, numbers, strings, and an _Inert of a numpy array: nothing of the file is ever run."""

    NAMES = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if (module, name) not in self.NAMES:
            raise _Forbidden(f"the pickle asks for {module}.{name}, refused; use {BINARY[1]} instead")
        return _Inert
