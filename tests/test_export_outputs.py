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
