"""The formats that other programs read: torch's sparse tensors, dense, ONNX, torch.export; and npz without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparselottery import convert, prune
from sparselottery.convert import masks_of
from sparselottery.export import export, load_torch_sparse
from sparselottery.pattern import Pattern, block_of
from sparselottery.ticket import Ticket

ROOT = Path(__file__).resolve().parent.parent


def masked(model, density, block=(1, 1)):
    masks = {}
    for name, layer in model.named_modules():
        if type(layer) in (nn.Linear, nn.Conv2d):
            shape = [-(-size // side) for size, side in zip(layer.weight.shape[:2], block, strict=True)]
            grid = torch.rand(*shape, *layer.weight.shape[2:]) < density
            rows, columns = (torch.arange(size) // side for size, side in zip(layer.weight.shape, block, strict=False))
            masks[f"{name}.weight"] = grid[rows][:, columns]
    return convert(model, masks).eval()


def mlp(**kwargs):
    return masked(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5, bias=False)), 0.2, **kwargs)


def conv_net(**kwargs):
    norm = nn.BatchNorm2d(16)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    layers = nn.Conv2d(3, 16, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3), nn.Flatten()
    return masked(nn.Sequential(*layers, nn.Linear(32, 5)), 0.3, **kwargs)


def images(count):
    return torch.randn(count, 3, 8, 8)


def fresh(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("make", [mlp, conv_net])
@pytest.mark.parametrize("block", [(1, 1), (16, 1), (8, 8), (16, 16)])
@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_torch_sparse(tmp_path, make, block, layout):
    model = make(block=block)
    export(model, tmp_path / "out", format=f"torch-{layout}")
    state = load_torch_sparse(tmp_path / "out")
    assert state["0.bias"].equal(model[0].bias)
    for name, mask in masks_of(model).items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight.detach()
        assert state[name].layout == getattr(torch, f"sparse_{layout}")
        assert state[name].to_dense().equal(weight.flatten(1))
        assert state[name].values().numel() == int(mask.sum())


def test_bsr_blocks_are_those_of_the_mask(tmp_path):
    model = masked(nn.Sequential(nn.Linear(64, 36), nn.Linear(36, 32)), 0.4, block=(16, 16))
    export(model, tmp_path / "out", format="torch-bsr")
    state = load_torch_sparse(tmp_path / "out")
    assert block_of(model[1].pattern, (32, 36)) == (16, 16)
    assert state["0.weight"].values().shape[1:] == (4, 16)  # 36 rows end in a cut-off block
    assert state["1.weight"].values().shape[1:] == (16, 4)


@pytest.mark.parametrize("shape", [(64, 48), (40, 36), (32, 16, 3, 3)])
def test_bsr_of_permuted_blocks_has_the_order_beside_it(tmp_path, shape):
    torch.manual_seed(0)
    layer = nn.Linear(*shape[::-1]) if len(shape) == 2 else nn.Conv2d(*shape[1::-1], 3)
    model = nn.Sequential(layer)
    masks = prune(model, 0.6, granularity=(16, 16), permute=True)
    assert block_of(Pattern.from_mask(masks["0.weight"].flatten(1)), shape) == (1, 1)
    model = convert(model, masks)
    export(model, tmp_path / "out", format="torch-bsr")
    state = load_torch_sparse(tmp_path / "out")
    assert state["0.weight"].values()[0].numel() >= 16
    rows, columns = state["0.weight.rows"], state["0.weight.columns"]
    weight = model[0].weight.detach().flatten(1)
    assert torch.equal(state["0.weight"].to_dense(), weight[rows][:, columns])
    x, y = torch.randn(5, weight.shape[1]), torch.empty(5, len(weight))
    y[:, rows] = x[:, columns] @ state["0.weight"].to_dense().t()
    torch.testing.assert_close(y, x @ weight.t())
    tensors = load_file(tmp_path / "out")
    with safe_open(tmp_path / "out", "pt") as file:
        head = file.metadata()
    for change in ({"0.weight.rows": rows.clone().fill_(0)}, {"0.weight.columns": columns[:-1].clone()},
                   {"0.weight.rows": rows.long()}):  # fmt: skip
        save_file({**tensors, **change}, tmp_path / "bad", head)
        with pytest.raises(ValueError, match=r"0\.weight\.(rows|columns): expected an order"):
            load_torch_sparse(tmp_path / "bad")
    save_file({name: each for name, each in tensors.items() if name != "0.weight.rows"}, tmp_path / "bad", head)
    with pytest.raises(ValueError, match=r"0\.weight\.rows: expected an order"):
        load_torch_sparse(tmp_path / "bad")


def test_torch_itself_multiplies_the_tensors(tmp_path):
    model, x = mlp(), torch.randn(3, 20)
    export(model, tmp_path / "out", format="torch-csr")
    state = load_torch_sparse(tmp_path / "out")
    y = (state["2.weight"] @ torch.relu((state["0.weight"] @ x.t()).t() + state["0.bias"]).t()).t()
    torch.testing.assert_close(y, model(x).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight.col_indices": torch.tensor([0, 9], dtype=torch.int32)}, "0.weight: col_indices"),
        ({"0.weight.crow_indices": torch.tensor([0, 2, 1], dtype=torch.int32)}, "0.weight: crow_indices"),
        ({"0.weight.values": torch.ones(3)}, "0.weight"),
        ({"0.weight.values": torch.ones(2, dtype=torch.int32)}, "0.weight.values"),
        ({"0.weight": torch.ones(2, 3)}, "no dense weight"),
    ],
)
def test_torch_sparse_files_of_bad_writers(tmp_path, change, message):
    good = {"0.weight.crow_indices": torch.tensor([0, 1, 2], dtype=torch.int32), "0.weight.values": torch.ones(2)}
    good["0.weight.col_indices"] = torch.tensor([0, 2], dtype=torch.int32)
    sparse = '{"layout": "torch.sparse_csr", "shapes": {"0.weight": [2, 3]}}'
    save_file(good, tmp_path / "x", {"sparse": sparse})
    assert load_torch_sparse(tmp_path / "x")["0.weight"].to_dense().tolist() == [[1, 0, 0], [0, 0, 1]]
    save_file({**good, **change}, tmp_path / "x", {"sparse": sparse})
    with pytest.raises(ValueError, match=f"x: .*{message}"):
        load_torch_sparse(tmp_path / "x")
    save_file(good, tmp_path / "x", {"sparse": sparse.replace("csr", "coo")})
    with pytest.raises(ValueError, match="x: expected an export as torch-csr or torch-bsr"):
        load_torch_sparse(tmp_path / "x")


def test_dense(tmp_path):
    model = conv_net()
    export(model, tmp_path / "out", format="dense")
    state = load_file(tmp_path / "out")
    assert state.keys() == Ticket.from_model(model).weights.keys()
    assert state["0.weight"].equal(model[0].weight.detach())


def test_the_safetensors_file_as_documented(tmp_path):
    model = masked(nn.Sequential(nn.Linear(40000, 32), nn.Linear(32, 32)), 0.1, block=(16, 16))
    export(model, tmp_path / "out", format="safetensors")
    with safe_open(tmp_path / "out", "pt") as file:
        assert file.get_tensor("0.values").equal(model[0].values)
        assert file.get_tensor("0.col_indices").dtype == torch.int32
        assert file.get_tensor("1.col_indices").dtype == torch.int16
        assert '"blocks": {"0.weight": [16, 16], "1.weight": [16, 16]}' in file.metadata()["ticket"]


@pytest.mark.parametrize("sparse", [False, True])
def test_onnx(tmp_path, sparse):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = conv_net()
    report = export(model, tmp_path / "out", format="onnx", example_input=images(1), sparse_initializer=sparse)
    assert report.notes == ()
    written = onnx.load(tmp_path / "out")
    assert len(written.graph.sparse_initializer) == (3 if sparse else 0)
    session = onnxruntime.InferenceSession(tmp_path / "out", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x = images(count)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_pt2_in_a_fresh_process(tmp_path):
    model, x = conv_net(), images(5)
    export(model, tmp_path / "out.pt2", format="pt2", example_input=images(1))
    save_file({"x": x}, tmp_path / "x")
    code = (
        "import sys, torch, sparselottery\n"
        "from safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(2)\n"
        "y = torch.export.load(sys.argv[1]).module()(load_file(sys.argv[2])['x'])\n"
        "save_file({'y': y.detach()}, sys.argv[3])\n"
    )
    fresh(code, tmp_path / "out.pt2", tmp_path / "x", tmp_path / "y")
    assert load_file(tmp_path / "y")["y"].equal(model(x).detach())


@pytest.mark.parametrize("make", [mlp, conv_net])
def test_numpy_inference_without_torch(tmp_path, make):
    model = make()
    x = images(3) if make is conv_net else torch.randn(3, 20)
    export(model, tmp_path / "out", fold_batchnorm=True, example_input=x)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    example = ROOT / "examples" / "numpy_inference.py"
    fresh(code, example, tmp_path / "out", tmp_path / "x.npy", tmp_path / "y.npy")
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_report(tmp_path):
    report = export(mlp(), tmp_path / "out")
    assert report.path == tmp_path / "out"
    assert (report.format, report.folded, report.removed, report.notes) == ("npz", (), {}, ())
    assert report.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert scipy.sparse.load_npz(tmp_path / "out" / "0.weight.npz").shape == (30, 20)


def test_a_csr_file_at_5_percent_is_small(tmp_path):
    model = masked(nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300)), 0.05)
    sparse = export(model, tmp_path / "sparse", format="safetensors").bytes
    assert sparse < 0.12 * export(model, tmp_path / "dense", format="dense").bytes
