from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from sparselottery.lab import cifar, data

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    sizes = (0x0800 + array.ndim, *array.shape)
    return b"".join(size.to_bytes(4, "big") for size in sizes) + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """24 + 6 images of 4x4: the first pixel is the image's number, and so, modulo 10, is its label."""
    arrays = {}
    for part, count in (("train", 24), ("t10k", 6)):
        images = np.full((count, 4, 4), 255)
        images[:, 0, 0] = np.arange(count)
        arrays |= {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": np.arange(count) % 10}
    return arrays


@pytest.fixture
def folder(arrays, tmp_path, monkeypatch):
    """$SPARSELOTTERY_DATA, with gzipped MNIST-like files in it."""
    for name, array in arrays.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    return tmp_path


def numbers(x: torch.Tensor) -> list[int]:
    return (x[:, 0] * 255).round().long().tolist()


def test_digits_are_three_disjoint_parts_of_the_whole():
    digits = data.load("digits")
    assert [len(digits.train_x), len(digits.val_x), len(digits.test_x)] == [1257, 180, 360]
    assert [len(digits.train_y), len(digits.val_y), len(digits.test_y)] == [1257, 180, 360]
    assert (digits.shape, digits.features, digits.classes, digits.note) == ((64,), 64, 10, "")
    assert digits.train_x.dtype == torch.float32
    assert digits.train_y.dtype == torch.int64
    assert (digits.train_x.min().item(), digits.train_x.max().item()) == (0, 1)
    whole = torch.cat([digits.train_x, digits.val_x, digits.test_x])
    assert len(whole.unique(dim=0)) == 1797  # no image in two parts
    for labels in (digits.train_y, digits.val_y, digits.test_y):
        assert labels.unique().tolist() == list(range(10))


def test_the_split_depends_on_no_seed():
    torch.manual_seed(1)
    first = data.load("digits")
    torch.manual_seed(2)
    assert torch.equal(first.test_x, data.load("digits").test_x)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_in_a_subfolder(arrays, tmp_path, monkeypatch, name, suffix):
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    (tmp_path / name).mkdir()
    for file, array in arrays.items():
        raw = idx(array)
        (tmp_path / name / (file + suffix)).write_bytes(gzip.compress(raw) if suffix else raw)
    loaded = data.load(name)
    assert (loaded.name, loaded.features) == (name, 16)
    assert numbers(loaded.test_x) == [0, 1, 2, 3, 4, 5]
    assert sorted(numbers(loaded.train_x) + numbers(loaded.val_x)) == list(range(24))
    assert len(loaded.val_x) == 2
    assert [n % 10 for n in numbers(loaded.train_x)] == loaded.train_y.tolist()
    assert loaded.train_x[:, 1:].eq(1).all()


def test_fashion_mnist_is_not_taken_from_a_folder_of_mnist(folder):
    assert data.load("mnist").features == 16
    with pytest.raises(FileNotFoundError, match="fashion-mnist"):
        data.load("fashion-mnist")


def test_missing_file_is_named_with_the_folder(folder):
    (folder / f"{LABELS}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{LABELS}.*{folder}"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (IMAGES, b"", "magic"),
        (IMAGES, b"\0\0\x08", "magic"),
        (IMAGES, idx(np.zeros(24)), "magic 0x00000801, expected 0x00000803"),
        (IMAGES, idx(np.zeros((24, 4, 4)))[:-1], "399 bytes"),
        (IMAGES, idx(np.zeros((24, 4, 4))) + b"\0", "401 bytes"),
        (IMAGES, b"\0\0\x08\x03" + b"\xff" * 12, "16 bytes"),  # sizes whose product overflows
        (IMAGES, idx(np.zeros((23, 4, 4))), "24 labels for the 23 images"),
        (IMAGES, idx(np.zeros((24, 5, 5))), "25 pixels"),
        (LABELS, idx(np.full(24, 10)), "label 10"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(folder, file, content, message):
    (folder / f"{file}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=message):
        data.load("mnist")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: raw[:40] + b"??" + raw[42:], lambda _: b"text"])
def test_a_damaged_gzip_file_is_named(folder, damage):
    path = folder / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path}: truncated or corrupt gzip"):
        data.load("mnist")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'cifar'.*digits, mnist, fashion-mnist, cifar10"):
        data.load("cifar")


@pytest.fixture
def batches(monkeypatch) -> dict[str, bytes]:
    """CIFAR-10 of 5 * 8 + 8 images: all numbers of an image but the first are its label, times 20."""
    monkeypatch.setattr(cifar, "BATCH_IMAGES", 8)
    files = {}
    for i, name in enumerate((*cifar.TRAIN_BATCHES, "test_batch")):
        labels = [(3 * i + j) % 10 for j in range(8)]
        files[f"{name}.bin"] = b"".join(bytes([n, 8 * i + j]) + bytes([20 * n]) * 3071 for j, n in enumerate(labels))
    return files


@pytest.mark.parametrize("subfolder", [".", "cifar10"])
def test_cifar10(batches, tmp_path, monkeypatch, subfolder):
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    (tmp_path / subfolder / "cifar-10-batches-bin").mkdir(parents=True)
    for file, raw in batches.items():
        (tmp_path / subfolder / "cifar-10-batches-bin" / file).write_bytes(raw)
    loaded = data.load("cifar10")
    assert (loaded.name, loaded.classes, loaded.shape, loaded.features) == ("cifar10", 10, (3, 32, 32), 3072)
    assert [len(loaded.train_x), len(loaded.val_x), len(loaded.test_x)] == [36, 4, 8]
    assert [len(loaded.train_y), len(loaded.val_y), len(loaded.test_y)] == [36, 4, 8]
    assert loaded.train_x.dtype == torch.float32
    assert loaded.train_y.dtype == torch.int64
    std, mean = torch.std_mean(loaded.train_x, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones(3))
    labels = torch.cat([loaded.train_y, loaded.val_y, loaded.test_y])
    values = torch.cat([loaded.train_x, loaded.val_x, loaded.test_x])[:, 1, 5, 5]
    slope = (values.max() - values.min()) / 9  # one scale for all three parts
    torch.testing.assert_close(values, values.min() + slope * labels, rtol=0, atol=1e-4)
    numbers = torch.cat([loaded.train_x, loaded.val_x])[:, 0, 0, 0]
    assert len(numbers.unique()) == 40  # every image is in one part


def test_cifar10_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=rf"cifar10: .*cifar-10-batches-bin.* in {tmp_path}/cifar10 or {tmp_path}"
    ):
        data.load("cifar10")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch, tmp_path_factory):
    """The files of `folder` behind HTTP, as the place to download MNIST from into an empty cache."""
    monkeypatch.delenv(data.ENVIRONMENT)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    md5 = {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("*.gz")}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        source = data.Source(f"http://127.0.0.1:{server.server_port}/", md5)
        monkeypatch.setitem(data.SOURCES, "mnist", source)
        yield folder
        server.shutdown()
        thread.join()


def test_download_once(server):
    first = data.load("mnist")
    for path in server.glob("*.gz"):
        path.unlink()
    assert torch.equal(first.train_x, data.load("mnist").train_x)


def test_download_of_something_else(server):
    path = server / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="hash"):
        data.load("mnist")


def test_download_without_the_file_says_what_to_do(server):
    (server / f"{IMAGES}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"mnist: cannot download .*{IMAGES}.*set {data.ENVIRONMENT}"):
        data.load("mnist")


def test_download_cifar10(server, batches, monkeypatch):
    with tarfile.open(server / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, raw in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    md5 = hashlib.md5((server / "cifar-10-binary.tar.gz").read_bytes()).hexdigest()
    source = data.Source(data.SOURCES["mnist"].url, {"cifar-10-binary.tar": md5})
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    first = data.load("cifar10")
    (server / "cifar-10-binary.tar.gz").unlink()
    assert torch.equal(first.train_x, data.load("cifar10").train_x)


@pytest.mark.skipif(data.ENVIRONMENT not in os.environ, reason=f"{data.ENVIRONMENT} is not set")
def test_mnist_itself():
    mnist = data.load("mnist")
    assert [len(mnist.train_y), len(mnist.val_y), len(mnist.test_y)] == [55_000, 5_000, 10_000]
    assert mnist.test_y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.cat([mnist.train_x, mnist.val_x]).mean().item() == pytest.approx(0.1307, abs=1e-4)


def test_to_a_device_keeps_everything_else():
    digits = data.load("digits")
    moved = digits.to("meta")
    splits = [getattr(moved, f"{split}_{kind}") for split in ("train", "val", "test") for kind in "xy"]
    assert {part.device.type for part in splits} == {"meta"}
    assert (moved.name, moved.classes, moved.note, moved.shape) == ("digits", 10, digits.note, digits.shape)
