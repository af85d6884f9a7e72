import contextlib
import json
import os

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from torch import nn

from sparselottery import convert
from sparselottery.architecture import describe
from sparselottery.export import FORMATS, export, load_npz, save_npz
from sparselottery.export.job import Job
from sparselottery.ticket import Ticket

MASKS = {"fc1.weight": torch.arange(24).view(6, 4) % 3 == 0, "fc2.weight": torch.arange(18).view(3, 6) % 5 < 2}


def converted():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(4, 6))
    net.add_module("norm", nn.BatchNorm1d(6))
    net.add_module("fc2", nn.Linear(6, 3, bias=False))
    return convert(net, MASKS).eval()


@pytest.fixture
def exported(tmp_path):
    export(Ticket.from_model(converted(), {"note": 1}), tmp_path / "out")
    return tmp_path / "out"


@st.composite
def tickets(draw):
    weights, masks = {"norm.steps": torch.tensor(draw(st.integers(0, 9)))}, {}
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    for index in range(draw(st.integers(1, 3))):
        shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=4))
        weights[f"fc{index}.weight"] = torch.from_numpy(draw(hnp.arrays(dtype, shape)))
        masks[f"fc{index}.weight"] = torch.from_numpy(draw(hnp.arrays(bool, shape)))
    return Ticket(weights, masks, {"fraction": 0.2})


@settings(deadline=None)
@given(tickets())
def test_an_export_reads_back(tmp_path_factory, ticket):
    folder = tmp_path_factory.mktemp("export")
    export(ticket, folder / "npz")
    export(ticket, folder / "file", format="safetensors")
    assert load_npz(folder / "npz").same(ticket)
    assert Ticket.load(folder / "file").same(ticket)
    assert sorted(os.listdir(folder)) == ["file", "npz"]


def test_scipy_and_numpy_compute_what_the_model_computes(tmp_path):
    model, x = converted(), torch.randn(7, 4)
    export(model, tmp_path / "out")
    fc1, fc2 = (scipy.sparse.load_npz(tmp_path / "out" / f"{name}.weight.npz") for name in ("fc1", "fc2"))
    assert (fc1.format, fc1.nnz, fc1.indices.dtype) == ("csr", int(MASKS["fc1.weight"].sum()), np.int32)
    with np.load(tmp_path / "out" / "dense.npz") as rest:
        h = (fc1 @ x.numpy().T).T + rest["fc1.bias"]
        h = (h - rest["norm.running_mean"]) / np.sqrt(rest["norm.running_var"] + model.norm.eps)
        y = (fc2 @ (h * rest["norm.weight"] + rest["norm.bias"]).T).T
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=1e-4, atol=1e-6)


def test_survivors_that_are_zero_are_exported(tmp_path):
    model = converted()
    with torch.no_grad():
        model.fc1.values.zero_()
    export(model, tmp_path / "out")
    assert scipy.sparse.load_npz(tmp_path / "out" / "fc1.weight.npz").nnz == model.fc1.nnz
    assert torch.equal(load_npz(tmp_path / "out").masks["fc1.weight"], MASKS["fc1.weight"])


def test_the_files(exported):
    assert sorted(os.listdir(exported)) == ["dense.npz", "fc1.weight.npz", "fc2.weight.npz", "ticket.json"]
    assert json.loads((exported / "ticket.json").read_text()) == {
        "shapes": {"fc1.weight": [6, 4], "fc2.weight": [3, 6]},
        "recipe": {"note": 1},
        "architecture": describe(converted()),
    }


def off_by_one(job):
    ticket = job.ticket
    weights = {**ticket.weights, "fc1.bias": ticket.weights["fc1.bias"] + 1}
    return Job(Ticket(weights, ticket.masks, ticket.recipe, ticket.architecture))


@pytest.mark.parametrize("format", FORMATS)
def test_what_does_not_read_back_is_not_kept(tmp_path, monkeypatch, format):
    write, holds = FORMATS[format]
    monkeypatch.setitem(FORMATS, format, (lambda job, path: write(off_by_one(job), path), holds))
    with pytest.raises(OSError, match="does not read back"):
        export(converted(), tmp_path / "out", format=format)
    assert not os.listdir(tmp_path)


def test_an_export_replaces_the_one_before(exported):
    other = Ticket.from_model(convert(nn.Sequential(nn.Linear(5, 5)), {"0.weight": torch.eye(5) > 0}))
    export(other, exported)
    assert load_npz(exported).same(other)
    assert os.listdir(exported.parent) == ["out"]


@pytest.mark.parametrize("without", [None, "ticket.json"])
def test_an_existing_folder_is_not_touched(exported, without):
    if without:
        (exported / without).unlink()
    else:
        (exported / "mine.txt").write_text("notes")
    before = {file.name: file.read_bytes() for file in exported.iterdir()}
    with pytest.raises(OSError, match="out"):
        export(converted(), exported)
    assert {file.name: file.read_bytes() for file in exported.iterdir()} == before
    assert os.listdir(exported.parent) == ["out"]


def test_refused_sources(tmp_path):
    with pytest.raises(ValueError, match=r"format: expected one of \['npz', 'safetensors', .*\], got 'pickle'"):
        export(converted(), tmp_path / "out", format="pickle")
    with pytest.raises(
        ValueError, match=r"format: expected that of a file with the path .*net.safetensors, .* got 'npz'"
    ):
        export(converted(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="sparse_initializer: expected the format 'onnx', got 'npz'"):
        export(converted(), tmp_path / "out", sparse_initializer=True)
    unknown = Ticket.from_model(converted())
    unknown = Ticket(unknown.weights, unknown.masks, {})
    with pytest.raises(ValueError, match="model: expected one, as the ticket does not know its architecture"):
        export(unknown, tmp_path / "out", format="pt2", example_input=torch.ones(2, 4))
    begins_with_relu = convert(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), {"1.weight": torch.eye(2) > 0})
    with pytest.raises(ValueError, match="example_input: expected one"):
        export(begins_with_relu, tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="without masked layers"):
        export(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(ValueError, match=r"fc1\.weight: expected a dtype that numpy has, got torch.bfloat16"):
        export(converted().bfloat16(), tmp_path / "out")
    slash = Ticket({"a/b.weight": torch.ones(1, 1)}, {"a/b.weight": torch.ones(1, 1) > 0}, {})
    with pytest.raises(ValueError, match=r"a/b\.weight: expected a name that can be a file name"):
        export(slash, tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["dense.npz", "fc1.weight.npz", "ticket.json"])
def test_missing_truncated_and_foreign_files(exported, name):
    file = exported / name
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            load_npz(exported)
    np.savez(file.with_suffix(".npz"), other=np.ones(3))
    with pytest.raises(ValueError, match="fc1.bias" if name == "dense.npz" else name):
        load_npz(exported)
    file.unlink()
    with pytest.raises(ValueError, match=name):
        load_npz(exported)


@pytest.mark.parametrize("name", ["dense.npz", "fc1.weight.npz"])
def test_no_altered_byte_makes_other_weights(exported, name):
    file, original = exported / name, load_npz(exported)
    whole = file.read_bytes()
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        file.write_bytes(altered)
        with contextlib.suppress(ValueError):
            loaded = load_npz(exported)
            assert all(torch.equal(loaded.weights[name], original.weights[name]) for name in MASKS)


def test_matrices_that_break_the_format(exported):
    file = exported / "fc1.weight.npz"
    matrix = scipy.sparse.load_npz(file)
    scipy.sparse.save_npz(file, matrix.tocsc())
    with pytest.raises(ValueError, match=r"fc1\.weight\.npz.*expected a CSR matrix, got .*csc"):
        load_npz(exported)
    matrix.indices[:2] = matrix.indices[1::-1].copy()
    scipy.sparse.save_npz(file, matrix)
    with pytest.raises(ValueError, match=r"fc1\.weight: col_indices"):
        load_npz(exported)


def test_save_npz_is_the_writer(tmp_path):
    ticket = Ticket.from_model(converted())
    save_npz(ticket, tmp_path / "out")
    assert load_npz(tmp_path / "out").same(ticket)
