"""Images in folders ``train|test/<class>/<name>.jpg|png``, in a tar archive or unpacked, as tensors in memory."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import atomic, write_safetensors

SUFFIXES = (".jpg", ".jpeg", ".png")
PARTS = ("train", "test")
CORRUPT = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)  # what reading a damaged archive raises


def read(path: Path, classes: Sequence[str], size: tuple[int, int], cache: Path) -> tuple[dict[str, Tensor], bool]:
    """All images of a folder or a tar archive, and whether any of them is a JPEG.

    ``train_x``, ``test_x`` uint8 (N, 3, *size), ``train_y``, ``test_y`` int64, the index in ``classes``; in the order
    of class and file name. Decoding takes a while: what an archive holds is kept in the folder ``cache``, in a file
    named after the archive's sha256. An unpacked folder is decoded every time.

    Raises ValueError, naming the file, for a damaged archive or image, another class, part or size, or no image at all.
    """
    if path.is_dir():
        return _decode(path, _in_folder(path), classes, size)
    archive = path.read_bytes()
    kept = cache / f"images-{hashlib.sha256(archive).hexdigest()[:16]}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # not there, or cut off: decode again
        tensors = load_file(kept)
        return tensors, bool(tensors.pop("jpeg"))
    tensors, jpeg = _decode(path, _in_archive(path, archive), classes, size)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        cache.mkdir(parents=True, exist_ok=True)
        with atomic(kept) as temporary:
            write_safetensors(temporary, tensors | {"jpeg": torch.tensor(jpeg)}, {})
    return tensors, jpeg


def _in_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for part in PARTS:
        for path in (folder / part).rglob("*"):
            if path.suffix.lower() in SUFFIXES:
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def _in_archive(path: Path, archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Nothing is unpacked to the disk, so no name in the archive can do harm."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r|*") as tar:
            for member in tar:
                if member.isfile() and PurePosixPath(member.name).suffix.lower() in SUFFIXES:
                    yield member.name, tar.extractfile(member).read()
    except CORRUPT as error:
        raise ValueError(f"{path}: truncated or corrupt archive ({type(error).__name__}: {error})") from error


def _decode(
    path: Path, files: Iterable[tuple[str, bytes]], classes: Sequence[str], size: tuple[int, int]
) -> tuple[dict[str, Tensor], bool]:
    jpeg = False
    found: dict[str, list[tuple[int, str, np.ndarray]]] = {part: [] for part in PARTS}
    for name, raw in files:
        part, label = _part_and_label(path, name, classes)
        found[part].append((label, name, _pixels(f"{path}: {name}", raw, size)))
        jpeg |= not name.lower().endswith(".png")
    tensors = {}
    for part, images in found.items():
        if not images:
            raise ValueError(f"{path}: expected images {part}/<class>/<name>{'|'.join(SUFFIXES)}, found none")
        images.sort(key=lambda image: image[:2])
        tensors[f"{part}_x"] = (
            torch.from_numpy(np.stack([pixels for _, _, pixels in images])).permute(0, 3, 1, 2).contiguous()
        )
        tensors[f"{part}_y"] = torch.tensor([label for label, _, _ in images])
    return tensors, jpeg


def _part_and_label(path: Path, name: str, classes: Sequence[str]) -> tuple[str, int]:
    part, label = ("", "", *PurePosixPath(name).parts)[-3:-1]
    if part not in PARTS or label not in classes:
        expected = f"{'|'.join(PARTS)}/<{'|'.join(classes)}>/<name>"
        raise ValueError(f"{path}: expected images named {expected}, got {name!r}")
    return part, classes.index(label)


def _pixels(what: str, raw: bytes, size: tuple[int, int]) -> np.ndarray:
    """uint8 (*size, 3), decoded by Pillow, or by torchvision where that is not installed."""
    decode = _by_pillow if find_spec("PIL") or not find_spec("torchvision") else _by_torchvision
    try:
        return decode(raw, size)
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{what}: {error}") from error


def _by_pillow(raw: bytes, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw), formats=("JPEG", "PNG")) as image:
            _check_size((image.height, image.width), size)
            return np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _by_torchvision(raw: bytes, size: tuple[int, int]) -> np.ndarray:
    from torchvision.io import ImageReadMode, decode_image

    image = decode_image(torch.frombuffer(bytearray(raw), dtype=torch.uint8), ImageReadMode.RGB)
    _check_size(tuple(image.shape[1:]), size)
    return image.permute(1, 2, 0).numpy()


def _check_size(found: tuple[int, int], size: tuple[int, int]) -> None:
    if found != size:
        raise ValueError(f"expected {size[0]} x {size[1]} pixels, got {found[0]} x {found[1]}")
