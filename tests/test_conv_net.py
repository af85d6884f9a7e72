"""A convolutional net all the way: pruned, found, saved, applied, exported."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, Ticket, export, find_ticket, prune
from sparselottery.convert import masks_of, prunable
from sparselottery.export import load_npz
from sparselottery.masks import rearrange, survivors

SIZES = {"conv1.weight": 162, "conv2.weight": 144, "fc.weight": 192}


def net(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 6, 3, padding=1))
    model.add_module("norm", nn.BatchNorm2d(6))
    model.add_module("relu1", nn.ReLU())
    model.add_module("pool", nn.MaxPool2d(2))
    model.add_module("conv2", nn.Conv2d(6, 4, (2, 3), groups=1, bias=False))
    model.add_module("relu2", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(24, 8))
    return model


def train(model, start=0, stop=None):
    """Adam with weight decay, which would revive pruned weights if it could."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(3):
        x = torch.randn(8, 3, 8, 8)
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, 0, 0].argmax(1)).backward()
        optimizer.step()


def counts(masks):
    return {name: survivors({name: mask}) for name, mask in masks.items()}


def test_prune():
    model = net()
    masks = prune(model, 0.5)
    assert counts(masks) == {name: size // 2 for name, size in SIZES.items()}
    for name, weight in prunable(model).items():
        assert masks[name].shape == weight.shape
        assert weight[masks[name]].abs().min() >= weight[~masks[name]].abs().max()
    assert counts(prune(model, 0.5, masks)) == {"conv1.weight": 41, "conv2.weight": 36, "fc.weight": 48}
    assert survivors(prune(model, 0.5, scope="global")) == 249
    assert counts(prune(model, 0.5, rates={"conv*": 0.25}, method="random"))["conv2.weight"] == 108
    assert counts(rearrange(masks)) == counts(masks)


def test_the_way_of_a_ticket(tmp_path):
    model = net().eval()
    ticket = find_ticket(model, train, rounds=2, fraction=0.4, rewind_step=1, out=tmp_path / "run")
    assert counts(ticket.masks) == {"conv1.weight": 58, "conv2.weight": 52, "fc.weight": 69}
    rounds = [Ticket.load(path) for path in sorted((tmp_path / "run").glob("round-*.safetensors"))]
    assert len(rounds) == 3
    for earlier, later in pairwise(rounds):
        assert all(not (mask & ~earlier.masks[name]).any() for name, mask in later.masks.items())
    assert Ticket.load(tmp_path / "run" / "ticket.safetensors").same(ticket)

    applied, x = ticket.apply(model), torch.randn(5, 3, 8, 8)
    assert [type(applied[i]) for i in (0, 4, 7)] == [MaskedConv2d, MaskedConv2d, MaskedLinear]
    assert all(torch.equal(mask, ticket.masks[name]) for name, mask in masks_of(applied).items())
    dense = net(1).eval()
    dense.load_state_dict(ticket.weights)
    torch.testing.assert_close(applied(x), dense(x))
    assert Ticket.from_model(applied, ticket.recipe).same(ticket)

    export(applied, tmp_path / "npz")
    export(ticket, tmp_path / "file", format="safetensors")
    assert load_npz(tmp_path / "npz").same(Ticket.from_model(applied))
    assert Ticket.load(tmp_path / "file").same(ticket)
    matrix = scipy.sparse.load_npz(tmp_path / "npz" / "conv2.weight.npz")
    assert (matrix.format, matrix.shape, matrix.nnz) == ("csr", (4, 36), 52)
    np.testing.assert_array_equal(matrix.toarray(), dense.conv2.weight.detach().flatten(1))


@pytest.mark.parametrize(
    ("shape", "message"),
    [([4, 6, 2, 4], r"conv2.weight: expected a matrix \(4, 48\), got \(4, 36\)"), ([4], "shapes"), ("4", "shapes")],
)
def test_a_shape_that_does_not_fit_the_matrix(tmp_path, shape, message):
    export(Ticket(net().state_dict(), prune(net(), 0.5), {}), tmp_path / "out")
    head = tmp_path / "out" / "ticket.json"
    text = head.read_text().replace("\n", "").replace(" ", "")
    assert '"conv2.weight":[4,6,2,3]' in text
    head.write_text(text.replace('"conv2.weight":[4,6,2,3]', f'"conv2.weight":{shape}'))
    with pytest.raises(ValueError, match=message):
        load_npz(tmp_path / "out")
