from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sparselottery.lab import imagefolder

CLASSES = ("cat", "dog")
Files = dict[str, bytes]


def encoded(value: int, kind: str = "PNG", size: tuple[int, int] = (4, 6), mode: str = "RGB") -> bytes:
    """An image of `size` (height, width), all of one grey but for a red pixel in the first row's second place."""
    pixels = np.full((*size, 3), value, np.uint8)
    pixels[0, 1] = (255, 0, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


@pytest.fixture
def files() -> Files:
    """In no order."""
    names = ["test/dog/0001", "train/dog/0001", "train/cat/0002", "train/cat/0001", "test/cat/0001"]
    return {f"{name}.png": encoded(10 * i) for i, name in enumerate(names)}


def archive(path: Path, files: Files, prefix: str = "") -> Path:
    with tarfile.open(path, f"w:{path.suffix[1:]}") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def unpacked(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(path: Path, cache: Path | None = None) -> tuple[dict[str, torch.Tensor], bool]:
    return imagefolder.read(path, CLASSES, (4, 6), cache or path.parent / "cache")


@pytest.mark.parametrize("form", ["folder", "a.tar.xz", "a.tar.gz", "a.tar.gz in a folder"])
def test_sorted_by_class_and_name_from_any_form(tmp_path, files, form):
    name, _, inner = form.partition(" in ")
    prefix = "images/" if inner else ""
    path = unpacked(tmp_path / "x", files) if form == "folder" else archive(tmp_path / name, files, prefix)
    tensors, jpeg = read(path)
    assert not jpeg
    assert (tensors["train_x"].dtype, tensors["train_x"].shape) == (torch.uint8, (3, 3, 4, 6))
    assert tensors["train_x"][:, 0, 3, 3].tolist() == [30, 20, 10]
    assert tensors["train_y"].tolist() == [0, 0, 1]
    assert tensors["test_x"][:, 0, 3, 3].tolist() == [40, 0]
    assert tensors["test_y"].tolist() == [0, 1]
    assert tensors["train_x"][0, :, 0, 1].tolist() == [255, 0, 0]  # channels first, rows before columns


def test_other_files_and_image_modes(tmp_path, files):
    files |= {"README.md": b"text", "train/cat/notes.txt": b"text", "train/cat/0003.PNG": encoded(50, mode="L")}
    tensors, _ = read(unpacked(tmp_path / "x", files))
    assert tensors["train_x"][2, :, 3, 3].tolist() == [50, 50, 50]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_jpegs_are_reported(tmp_path, files, suffix):
    files[f"train/cat/0003.{suffix}"] = encoded(50, "JPEG")
    path = archive(tmp_path / "a.tar.gz", files)
    assert read(path)[1]
    assert read(path)[1]  # from the cache


def test_an_archive_is_decoded_once(tmp_path, files, monkeypatch):
    path, cache = archive(tmp_path / "a.tar.gz", files), tmp_path / "new" / "cache"
    first, _ = read(path, cache)
    assert [kept.suffix for kept in cache.iterdir()] == [".safetensors"]
    monkeypatch.setattr(imagefolder, "_decode", None)
    again, _ = read(path, cache)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_archive_of_that_name_is_decoded_anew(tmp_path, files):
    path = archive(tmp_path / "a.tar.gz", files)
    read(path)
    files["train/cat/0001.png"] = encoded(99)
    archive(path, files)
    assert read(path)[0]["train_x"][0, 0, 3, 3] == 99


def test_a_damaged_cache_is_decoded_anew(tmp_path, files):
    path, cache = archive(tmp_path / "a.tar.gz", files), tmp_path / "cache"
    first, _ = read(path, cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])
    assert torch.equal(read(path, cache)[0]["train_x"], first["train_x"])
    assert torch.equal(read(path, cache)[0]["test_x"], first["test_x"])


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, files):
    (tmp_path / "file").touch()
    tensors, _ = read(archive(tmp_path / "a.tar.gz", files), tmp_path / "file" / "cache")
    assert len(tensors["train_x"]) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/bird/1.png", encoded(0), r"train\|test/<cat\|dog>/<name>, got 'train/bird/1.png'"),
        ("val/cat/1.png", encoded(0), "got 'val/cat/1.png'"),
        ("1.png", encoded(0), "got '1.png'"),
        ("train/cat/1.png", encoded(0, size=(6, 4)), "train/cat/1.png: expected 4 x 6 pixels, got 6 x 4"),
        ("train/cat/1.png", encoded(0)[:-30], "train/cat/1.png: "),
        ("train/cat/1.jpg", encoded(0, "JPEG")[:-30], "train/cat/1.jpg: "),
        ("train/cat/1.png", b"", "train/cat/1.png: cannot identify image"),
        ("train/cat/1.jpg", encoded(0, "GIF"), "train/cat/1.jpg: cannot identify image"),
    ],
)
def test_an_image_that_is_not_what_it_should_be(tmp_path, files, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(archive(tmp_path / "a.tar.gz", files | {name: content}))


def test_torchvision_decodes_where_pillow_is_missing(tmp_path, files, monkeypatch):
    """A stand-in of torchvision, which is not installed here: what it is given, and what is made of its answer."""

    def decode_image(data, mode):
        assert mode == "RGB"
        pixels = np.asarray(Image.open(io.BytesIO(data.numpy().tobytes())).convert(mode))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    path = archive(tmp_path / "a.tar.gz", files)
    expected, _ = read(path)
    stand_in = SimpleNamespace(decode_image=decode_image, ImageReadMode=SimpleNamespace(RGB="RGB"))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(io=stand_in))
    monkeypatch.setitem(sys.modules, "torchvision.io", stand_in)
    monkeypatch.setattr(imagefolder, "find_spec", lambda name: name == "torchvision")
    monkeypatch.setattr(imagefolder, "_by_pillow", None)
    found, _ = read(path, tmp_path / "other")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    wrong = archive(tmp_path / "b.tar.gz", files | {"train/cat/1.png": encoded(0, size=(6, 4))})
    with pytest.raises(ValueError, match="expected 4 x 6 pixels, got 6 x 4"):
        read(wrong, tmp_path / "other")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_without_images(tmp_path, files, part):
    path = unpacked(tmp_path / "x", {name: raw for name, raw in files.items() if not name.startswith(part)})
    with pytest.raises(ValueError, match=rf"{path}: expected images {part}/<class>/.*found none"):
        read(path)


@pytest.mark.parametrize("name", ["a.tar.xz", "a.tar.gz"])
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda _: b"text", lambda _: b""])
def test_a_damaged_archive(tmp_path, files, name, damage):
    path = archive(tmp_path / name, files)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: truncated or corrupt archive"):
        read(path)
    assert not (tmp_path / "cache").exists()
