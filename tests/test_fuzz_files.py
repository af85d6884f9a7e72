"""Thousands of hostile files: each is an error that names it, or an equal ticket; never a crash."""

from __future__ import annotations

import contextlib
import json
import random
import shutil

import pytest
import torch

from benchmarks.torture import altered as fuzz
from sparselottery.export import export, load_npz, load_torch_sparse
from sparselottery.ticket import Ticket


@pytest.fixture
def whole(tmp_path):
    fuzz.ticket().save(tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


def load(path, data, reader=Ticket.load):
    """What the reader makes of the data; None if it refuses them, naming the file."""
    path.write_bytes(data)
    try:
        return reader(path)
    except ValueError as error:
        if str(path) not in str(error):
            raise
        return None


def test_altered_bytes(tmp_path, whole):
    generator, original, loaded = random.Random(0), fuzz.ticket(), 0
    for _ in range(5000):
        found = load(tmp_path / "file", fuzz.altered_bytes(whole, generator))
        loaded += found is not None
        assert found is None or found.same(original)
    assert loaded < 500


def test_altered_contents(tmp_path, whole):
    """Those that load are tickets like any other: each invariant holds, and they run (a fifth of them does)."""
    generator, original, loaded = random.Random(0), fuzz.ticket(), 0
    x = torch.randn(3, 2, 4, 4)
    for _ in range(2000):
        found = load(tmp_path / "file", fuzz.altered_contents(whole, generator))
        if found is None:
            continue
        loaded += 1
        for pattern, values in found.csr().values():
            assert pattern.validate().nnz == len(values)
        if loaded % 5 == 0 and found.architecture == original.architecture and found.shapes == original.shapes:
            with contextlib.suppress(TypeError, RuntimeError):  # tensors of other dtypes
                assert found.apply()(x).shape == (3, 5)
    assert 50 < loaded < 1500


def test_files_of_torch_sparse(tmp_path):
    generator = random.Random(0)
    export(fuzz.ticket(), tmp_path / "whole", format="torch-bsr")
    whole = (tmp_path / "whole").read_bytes()
    for _ in range(1000):
        for tensor in (load(tmp_path / "file", fuzz.altered_bytes(whole, generator), load_torch_sparse) or {}).values():
            assert tensor.layout == torch.strided or tensor.to_dense().shape == tensor.shape


def test_folders(tmp_path):
    generator, original = random.Random(0), fuzz.ticket()
    export(original, tmp_path / "whole")
    folder = tmp_path / "folder"
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    for number in range(300):
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True)
        file = folder / files[number % len(files)]
        file.write_bytes(fuzz.altered_bytes(file.read_bytes(), generator))
        try:
            found = load_npz(folder)
        except ValueError as error:
            if str(folder) not in str(error):
                raise
            continue
        if file.suffix == ".npz":
            assert all(found.weights[name].equal(original.weights[name]) for name in original.masks)


@pytest.mark.parametrize("name", ["../whole/0.weight", "/x.weight", "a\\b.weight", "\0.weight", "..weight", "x", ""])
def test_names_that_leave_the_folder(tmp_path, name):
    export(fuzz.ticket(), tmp_path / "out")
    head = json.loads((tmp_path / "out" / "ticket.json").read_text())
    head["shapes"][name] = [2, 2]
    (tmp_path / "out" / "ticket.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="out"):
        load_npz(tmp_path / "out")
