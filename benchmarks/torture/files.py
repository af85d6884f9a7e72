"""Altered files: each is refused by an error that names it, or is what it was, or another that is well formed."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sparselottery import load_sparse
from sparselottery.export import export, load_npz, load_torch_sparse
from sparselottery.ticket import Ticket

from . import altered, sanitizers

CASES = 10_000
prepare = sanitizers.of_addresses


@contextlib.contextmanager
def trial(folder: Path) -> Iterator[Callable[[random.Random], None]]:
    sanitizers.use(folder)
    original = altered.ticket()
    path, x = folder / "file", torch.randn(5, 2, 4, 4)
    original.save(folder / "whole")
    whole = (folder / "whole").read_bytes()
    for format in ("npz", "torch-csr", "torch-bsr"):
        if not (folder / format).exists():
            export(original, folder / format, format=format)
    expected = original.apply()(x)

    def ticket(draw: random.Random, alter: Callable[[bytes, random.Random], bytes]) -> None:
        path.write_bytes(alter(whole, draw))
        found = _read(Ticket.load, path)
        frozen = _read(load_sparse, path)
        if found is None:
            assert frozen is None, "load_sparse reads what Ticket.load refuses"
            return
        same = found.same(original)
        assert same or alter is altered.altered_contents, "another ticket from altered bytes"
        if found.architecture != original.architecture or found.shapes != original.shapes or frozen is None:
            return
        try:
            y, z = found.apply()(x), frozen(x)
        except (RuntimeError, TypeError):  # tensors of other dtypes
            return
        assert y.dtype == z.dtype
        assert not same or y.equal(expected)

    def npz(draw: random.Random) -> None:
        target = folder / "folder"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "npz", target)
        file = draw.choice(sorted(target.iterdir()))
        file.write_bytes(altered.altered_bytes(file.read_bytes(), draw))
        found = _read(load_npz, target)
        if found is not None and file.suffix == ".npz":
            assert all(found.weights[name].equal(original.weights[name]) for name in original.masks)

    def sparse(draw: random.Random) -> None:
        data = (folder / draw.choice(["torch-csr", "torch-bsr"])).read_bytes()
        path.write_bytes(altered.altered_bytes(data, draw))
        for tensor in (_read(load_torch_sparse, path) or {}).values():
            assert tensor.layout == torch.strided or tensor.to_dense().shape == tensor.shape

    def attempt(draw: random.Random) -> None:
        with torch.no_grad():
            kind = draw.choice(["bytes", "contents", "contents", "npz", "sparse"])
            if kind in ("npz", "sparse"):
                (npz if kind == "npz" else sparse)(draw)
            else:
                ticket(draw, getattr(altered, f"altered_{kind}"))

    yield attempt


def _read(reader: Callable, path: Path):
    """What it reads; None if it refuses it, by an error that names the file."""
    try:
        return reader(path)
    except (OSError, ValueError) as error:
        if str(path) not in str(error):
            raise AssertionError(f"{reader.__name__}: the error does not name the file: {error}") from error
        return None
