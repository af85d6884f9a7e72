"""2:4 weights for sparse tensor cores: what torch packs of them, and that it reads back equal, on any device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparselottery import convert, prune
from sparselottery.export import to_semi_structured


def model(granularity="2:4", **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).half()
    return convert(net, prune(net, 0.5, granularity=granularity, ignore=["4.weight"], **kwargs)).eval()


def test_torch_packs_them_without_loss(monkeypatch):
    """Packing and unpacking are torch's own; it is but their products that take a GPU."""
    packed = []

    def pack(weight):
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        packed.append(values.shape)
        return sparse_semi_structured_to_dense_cutlass(values, meta)

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", pack)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    net = model()
    state = copy.deepcopy(net.state_dict())
    dense, x = to_semi_structured(net), torch.randn(5, 128).half()
    assert packed == [(64, 64), (96, 32)]
    assert [type(layer) for layer in dense] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert torch.equal(dense[0].weight, net[0].weight)
    assert torch.equal(dense[2].weight, net[2].weight)
    assert all(not parameter.requires_grad for parameter in dense.parameters())
    assert all(map(torch.equal, net.state_dict().values(), state.values()))
    monkeypatch.undo()
    torch.testing.assert_close(dense.float()(x.float()), net.float()(x.float()))


def test_what_is_refused():
    with pytest.raises(
        ValueError, match=r"0\.weight: expected fp16 or bf16 on a CUDA device, got torch.float16 on cpu"
    ):
        to_semi_structured(model())
    with pytest.raises(ValueError, match="at most 2 of each 4 weights of a row, got none"):
        to_semi_structured(model((1, 1)))
    with pytest.raises(ValueError, match="got none"):
        to_semi_structured(convert(net := nn.Conv2d(8, 8, 1), prune(net, 0.5, granularity="2:4")))
    narrow = nn.Linear(2, 8)
    with pytest.raises(ValueError, match="got none"):
        to_semi_structured(convert(narrow, prune(narrow, 0.5)))
