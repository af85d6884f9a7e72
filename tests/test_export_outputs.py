"""Exports that are checked by their outputs: a program of attention is right, and what is wrong is measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselottery import convert, export, prune, to_dense
from sparselottery.export import FORMATS


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.attend = nn.Linear(32, 32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        x = self.project(x)
        return self.attend(x, x, x, need_weights=False)[0]


class Bags(nn.Module):
    """Documents of several words to numbers."""

    def __init__(self, **arguments):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(20, 6, **arguments), nn.Linear(6, 3)

    def forward(self, words):
        return self.head(self.words(words))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_pt2_of_bags_takes_any_batch(tmp_path, padding_idx):
    model = Bags(padding_idx=padding_idx)
    sparse = convert(model, prune(model, 0.5)).eval()
    report = export(sparse, tmp_path / "net.pt2", format="pt2", example_input=torch.randint(20, (4, 5)))
    assert not report.notes
    program, words = torch.export.load(tmp_path / "net.pt2").module(), torch.arange(35).view(7, 5) % 20
    torch.testing.assert_close(program(words), sparse(words))


class OfFour(nn.Module):
    """Takes four rows, and returns what it is asked for."""

    def __init__(self, more=None):
        super().__init__()
        self.layer, self.more = nn.Linear(6, 3), more
        self.register_buffer("places", torch.randn(4, 3))

    def forward(self, x):
        if self.more == "branch" and x.sum() > 0:
            x = -x
        y = self.layer(x) + self.places
        return y if self.more is None else {"y": y, "more": self.more}


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_model_of_one_batch_size(tmp_path, format):
    pytest.importorskip("onnxruntime" if format == "onnx" else "torch")
    model = OfFour().eval()
    sparse = convert(model, prune(model, 0.5))
    report = export(sparse, tmp_path / "net", format=format, example_input=torch.randn(4, 6))
    assert report.notes == ("it takes a batch of 4 alone, as the model does not export for any other",)


@pytest.mark.parametrize(
    ("format", "more", "message"),
    [
        ("onnx", 3, "^model: expected one that returns tensors alone, as ONNX has no others, got int too$"),
        ("onnx", "branch", "^model: "),
        ("pt2", "branch", "^model: torch cannot export it: .*$"),
    ],
)
def test_a_model_that_torch_cannot_export(tmp_path, format, more, message):
    pytest.importorskip("onnxruntime" if format == "onnx" else "torch")
    model = OfFour(more).eval()
    with pytest.raises(ValueError, match=message) as raised:
        export(convert(model, prune(model, 0.5)), tmp_path / "net", format=format, example_input=torch.randn(4, 6))
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pt2_of_convolutions_with_trained_batchnorms(tmp_path, dtype):
    """In eager inference one native call is both, whose last bits differ from those of the operators of a program."""
    norm = nn.BatchNorm2d(16)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 2))
    sparse, x = convert(model.to(dtype).eval(), prune(model, 0.8)), torch.randn(2, 3, 16, 16, dtype=dtype)
    export(sparse, tmp_path / "net.pt2", format="pt2", example_input=x)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "net.pt2").module()(x), sparse(x))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_pt2_of_attention(tmp_path, depth):
    """Eager inference has a fused path for it, whose last bits differ from those of the operators of a program."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = (Attention(), layer, nn.TransformerEncoder(layer, 2))[depth].eval()
    x = torch.randn(3, 5, 32)
    masks = prune(model, 0.5)
    export(convert(model, masks).eval(), tmp_path / "net.pt2", format="pt2", example_input=x)
    assert torch.backends.mha.get_fastpath_enabled()
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), to_dense(convert(model, masks)).eval()(x))


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_outputs_that_differ_are_measured(tmp_path, monkeypatch, format):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
    write, fault = FORMATS[format]

    def changed(job, path):
        write(job, path)
        with torch.no_grad():
            job.model[2].bias[3] += 0.25

    monkeypatch.setitem(FORMATS, format, (changed, fault))
    with pytest.raises(OSError, match=r"its outputs differ from the source's by up to 0\.25, where the largest is \d"):
        export(convert(model, prune(model, 0.5)).eval(), tmp_path / "net", format=format)
