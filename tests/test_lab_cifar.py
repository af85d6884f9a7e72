from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparselottery.lab import cifar
from sparselottery.lab.data import ENVIRONMENT

IMAGES = 4  # in a batch of these tests
NAMES = (*cifar.TRAIN_BATCHES, "test_batch")
PUBLISHED = (5 * 10_000, 10_000)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cifar, "BATCH_IMAGES", IMAGES)


@pytest.fixture
def batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    generator = np.random.default_rng(0)
    return {
        name: (generator.integers(256, size=(IMAGES, 3072), dtype=np.uint8), [i, 9, 0, 1])
        for i, name in enumerate(NAMES)
    }


def binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True))


def string(value: bytes) -> bytes:
    """How Python 2 pickled a str."""
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<I", len(value)) + value


def pickled_array(pixels: np.ndarray, kind: bytes = b"u1") -> bytes:
    """How the published files hold an array: pickled by Python 2, protocol 2."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + string(kind) + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"".join(b"M" + struct.pack("<H", size) for size in pixels.shape) + b"\x86"
    fortran = not pixels.flags.c_contiguous
    content = string(pixels.tobytes("F" if fortran else "C"))
    return made + b"(K\x01" + shape + dtype + (b"\x88" if fortran else b"\x89") + content + b"tb"


def pickled(pixels: np.ndarray, labels: list[int], others: dict[str, bytes] | None = None) -> bytes:
    parts = {"batch_label": string(b"batch"), "labels": b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"}
    parts |= {"data": pickled_array(pixels), **(others or {})}
    return b"\x80\x02}(" + b"".join(string(key.encode()) + value for key, value in parts.items()) + b"u."


def batch_files(form: str, batches) -> dict[str, bytes]:
    if form == "bin":
        return {f"{name}.bin": binary(*batch) for name, batch in batches.items()}
    return {name: pickled(*batch) for name, batch in batches.items()}


def write(place: Path, form: str, files: dict[str, bytes], archived: bool = False) -> Path:
    folder = place / f"cifar-10-batches-{form}"
    if archived:
        path = place / ("cifar-10-binary.tar.gz" if form == "bin" else "cifar-10-python.tar.gz")
        with tarfile.open(path, "w:gz") as tar:
            for name, content in {"readme.html": b"", **files}.items():
                member = tarfile.TarInfo(f"{folder.name}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def read(place: Path) -> tuple[dict[str, torch.Tensor], str]:
    return cifar.read([place / "nothing", place], place / "cache")


@pytest.mark.parametrize("form", ["bin", "py"])
@pytest.mark.parametrize("archived", [False, True])
def test_the_published_batches(tmp_path, batches, form, archived):
    write(tmp_path, form, batch_files(form, batches), archived)
    tensors, note = read(tmp_path)
    assert note == ""
    assert (tensors["train_x"].dtype, tensors["train_x"].shape) == (torch.uint8, (5 * IMAGES, 3, 32, 32))
    assert tensors["train_y"].dtype == torch.int64
    assert tensors["train_y"].tolist() == [label for i in range(5) for label in (i, 9, 0, 1)]
    for i, name in enumerate(NAMES):
        part, first = ("test", 0) if name == "test_batch" else ("train", i * IMAGES)
        planes = torch.from_numpy(batches[name][0]).view(IMAGES, 3, 32, 32)
        assert torch.equal(tensors[f"{part}_x"][first : first + IMAGES], planes)
    assert tensors["test_y"].tolist() == [5, 9, 0, 1]


def test_a_pickle_in_fortran_order(tmp_path, batches):
    files = batch_files("py", batches)
    files["test_batch"] = pickled(np.asfortranarray(batches["test_batch"][0]), batches["test_batch"][1])
    write(tmp_path, "py", files)
    assert np.array_equal(read(tmp_path)[0]["test_x"].view(IMAGES, -1).numpy(), batches["test_batch"][0])


def test_the_pickles_of_these_tests_are_what_numpy_reads(batches):
    pixels = batches["test_batch"][0]
    for each in (pixels, np.asfortranarray(pixels)):
        loaded = pickle.loads(pickled(each, [0, 1, 2, 3]), encoding="bytes")
        assert np.array_equal(loaded[b"data"], pixels)
        assert loaded[b"labels"] == [0, 1, 2, 3]


def test_binary_comes_first(tmp_path, batches):
    write(tmp_path, "py", {})
    write(tmp_path, "bin", batch_files("bin", batches))
    assert len(read(tmp_path)[0]["train_y"]) == 5 * IMAGES


class Hostile:
    """Creates the file `path` when it is unpickled by the book."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile(path: Path) -> dict[str, bytes]:
    """Pickles that would make a folder at `path`, or break numpy, if their contents were believed."""
    python = f"import os; os.mkdir({str(path)!r})".encode()
    return {
        "a call": pickle.dumps(Hostile(path), protocol=2),
        "a call, protocol 5": pickle.dumps(Hostile(path), protocol=5),
        "a call within": b"\x80\x02}("
        + string(b"labels")
        + b"cposix\nmkdir\n"
        + string(str(path).encode())
        + b"\x85Ru.",
        "builtins": b"cbuiltins\nexec\n" + string(python) + b"\x85R.",
        "Python 2 builtins": b"c__builtin__\neval\n" + string(b"1") + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__reduce__.x\x93.",
        "numpy runs code": b"cnumpy.testing._private.utils\nrunstring\n" + string(python) + b"}\x86R.",
        "inst": b"(" + string(python) + b"ios\nsystem\n.",
        "build on a class": b"cnumpy\nndarray\n}" + string(b"__setstate__") + b"cnumpy\ndtype\nsb.",
        "persistent id": b"Pmkdir\n.",
        "extension": b"\x82\x01.",
        "huge memo": b"r\xff\xff\xff\xff.",
        "cut off": b"\x80\x02}(" + string(b"data"),
        "not a pickle": b"text",
        "empty": b"",
        "no dict": b"\x80\x02].",
        "a dict of nothing": b"\x80\x02}.",
    }


@pytest.mark.parametrize("attack", hostile(Path("x")))
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, batches, attack):
    made = tmp_path / "made"
    files = batch_files("py", batches)
    files["data_batch_3"] = hostile(made)[attack]
    folder = write(tmp_path, "py", files)
    with pytest.raises(ValueError, match=f"{folder}: data_batch_3: "):
        read(tmp_path)
    assert not made.exists()


def test_the_attack_works_on_pickle_itself(tmp_path):
    pickle.loads(hostile(tmp_path / "made")["a call"])
    assert (tmp_path / "made").is_dir()


def test_what_a_refused_pickle_asked_for_is_named(tmp_path, batches):
    files = batch_files("py", batches) | {"test_batch": hostile(tmp_path / "made")["a call"]}
    write(tmp_path, "py", files)
    with pytest.raises(ValueError, match=r"test_batch: the pickle asks for \w+\.mkdir, refused; use cifar-10-binary"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"data": pickled_array(np.zeros((3, 3072), np.uint8))}, r"expected u1 \(4, 3072\), got .*\(3, 3072\)"),
        ({"data": pickled_array(np.zeros((4, 3072), np.uint8), b"i1")}, r"expected u1 .*b'i1'"),
        ({"data": pickled_array(np.zeros((4, 3072), np.uint8), b"O8")}, r"expected u1 .*b'O8'"),
        ({"data": b"N"}, "expected a pickled numpy array"),
        ({"data": b"cnumpy\ndtype\n)\x81"}, "expected a pickled numpy array"),
        ({"labels": b"](K\x01K\x02e"}, "2 labels, expected 4"),
        ({"labels": b"](K\x01K\x02K\x03K\x0ae"}, r"label 10, expected 0\.\.9"),
        ({"labels": b"](K\x01K\x02K\x03J\xff\xff\xff\xffe"}, "list of integers from 0"),
        ({"labels": b"](K\x01K\x02K\x03Ne"}, "list of integers from 0"),
    ],
)
def test_a_pickle_of_something_else(tmp_path, batches, others, message):
    files = batch_files("py", batches) | {"data_batch_1": pickled(*batches["data_batch_1"], others)}
    write(tmp_path, "py", files)
    with pytest.raises(ValueError, match=f"data_batch_1: .*{message}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"0 bytes, expected 4 \* 3073"),
        (b"\0" * (4 * 3073 - 1), r"12291 bytes, expected 4 \* 3073"),
        (b"\0" * (5 * 3073), r"15365 bytes, expected 4 \* 3073"),
        (b"\x0a" + b"\0" * (4 * 3073 - 1), r"label 10, expected 0\.\.9"),
    ],
)
def test_a_binary_file_that_is_not_what_it_should_be(tmp_path, batches, content, message):
    folder = write(tmp_path, "bin", batch_files("bin", batches) | {"data_batch_2.bin": content})
    with pytest.raises(ValueError, match=f"{folder}: data_batch_2.bin: {message}"):
        read(tmp_path)


@pytest.mark.parametrize("form", ["bin", "py"])
@pytest.mark.parametrize(("archived", "error"), [(False, FileNotFoundError), (True, ValueError)])
def test_missing_batches_are_named(tmp_path, batches, form, archived, error):
    files = batch_files(form, batches)
    removed = list(files)[2:4]
    path = write(tmp_path, form, {name: raw for name, raw in files.items() if name not in removed}, archived)
    with pytest.raises(error, match=f"{path}: expected .*missing {', '.join(removed)}$"):
        read(tmp_path)


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda _: b"text", lambda _: b""])
def test_a_damaged_archive(tmp_path, batches, damage):
    path = write(tmp_path, "bin", batch_files("bin", batches), archived=True)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: truncated or corrupt archive"):
        read(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"cifar-10-batches-bin, .*cifar10\*.*{tmp_path}, found none"):
        read(tmp_path)


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """20 + 10 PNGs, unpacked: two and one of each class, of one grey, the image's number."""
    monkeypatch.setattr(cifar, "BATCH_IMAGES", 10)
    for part, each in (("train", 5), ("test", 1)):
        for label, name in enumerate(cifar.CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (32, 32), (label, i, 0)).save(tmp_path / part / name / f"{i:04}.png")
    return tmp_path


def test_single_images(pictures):
    tensors, note = read(pictures)
    assert note == ""
    assert torch.equal(tensors["train_x"][:, 0, 0, 0].long(), tensors["train_y"])
    assert tensors["test_y"].tolist() == list(range(10))


def test_single_images_in_an_archive_are_labelled_if_jpeg(pictures):
    (pictures / "train" / "cat" / "0000.png").unlink()
    Image.new("RGB", (32, 32)).save(pictures / "train" / "cat" / "0000.jpg")
    path = pictures / "cifar10-mine.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for part in ("train", "test"):
            tar.add(pictures / part, part)
    _, note = read(pictures)
    assert note == "JPEG-recompressed images in cifar10-mine.tar.gz: not bit-equal to CIFAR-10"
    assert list((pictures / "cache").iterdir())


def test_a_missing_image_is_noticed(pictures):
    (pictures / "train" / "cat" / "0003.png").unlink()
    with pytest.raises(ValueError, match=f"{pictures}: 49 train images, expected 50"):
        read(pictures)


def cifar10_is_there() -> bool:
    place = Path(os.environ.get(ENVIRONMENT, "nowhere"))
    return any(next(each.glob("cifar*10*"), None) for each in (place, place / "cifar10"))


@pytest.mark.slow
@pytest.mark.skipif(not cifar10_is_there(), reason=f"{ENVIRONMENT} names no folder with CIFAR-10")
def test_cifar10_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "BATCH_IMAGES", 10_000)
    place = Path(os.environ[ENVIRONMENT])
    tensors, _ = cifar.read([place / "cifar10", place], tmp_path)
    assert tuple(len(tensors[f"{part}_x"]) for part in ("train", "test")) == PUBLISHED
    assert tensors["train_y"].bincount().tolist() == [5000] * 10
    assert tensors["test_y"].bincount().tolist() == [1000] * 10
    mean = tensors["train_x"].float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=5e-4)
