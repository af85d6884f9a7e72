"""Every weight of a model, and why it is stored and executed as it is."""

from __future__ import annotations

import pytest
import torch
from chains import noted, spy
from newcomers import TorchAttention
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from sparselottery import (
    MaskedConv2d,
    MaskedLinear,
    MaskedSequential,
    SparseLotteryWarning,
    convert,
    explain,
    prune,
    to_dense,
)
from sparselottery.kernels import cpu, reference
from sparselottery.nn import EXECUTIONS, Measured

KEYS = [
    "layer",
    "shape",
    "density",
    "nnz",
    "bytes",
    "dense_bytes",
    "execution",
    "plan_bytes",
    "flops",
    "packs",
    "sparse_ms",
    "block_ms",
    "permuted_ms",
    "compact_ms",
    "dense_ms",
    "why",
    "prunable",
]


def rows(model):
    """The rows by layer."""
    found = explain(model)
    assert all(list(row) == KEYS for row in found)
    return {row["layer"]: row for row in found}


def whys(model):
    return {layer: row["why"] for layer, row in rows(model).items()}


def test_a_linear_layer():
    mask = torch.zeros(5, 12, dtype=torch.bool)
    mask[:, :3] = True
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    row, other = rows(convert(model, {"0.weight": mask})).values()
    assert (row["layer"], row["shape"], row["density"], row["nnz"]) == ("0", (5, 12), 0.25, 15)
    assert (row["bytes"], row["dense_bytes"]) == (15 * (8 + 4) + 6 * 4, 60 * 8)
    assert (row["execution"], row["packs"], row["why"]) == ("sparse", 2, "not measured")
    assert (other["layer"], other["shape"], other["density"], other["nnz"]) == ("2", (2, 5), 1.0, 10)
    assert (other["bytes"], other["dense_bytes"], other["execution"], other["packs"]) == (80, 80, "dense", 0)
    assert other["why"] == "kept dense: no mask was given"


def test_a_convolution():
    mask = torch.zeros(4, 6, 1, 3, dtype=torch.bool)
    mask[:, :2] = True
    (row,) = explain(convert(nn.Conv2d(6, 4, (1, 3)).double(), {"weight": mask}))
    assert (row["layer"], row["shape"], row["density"], row["nnz"]) == ("", (4, 6, 1, 3), 1 / 3, 24)
    assert (row["bytes"], row["dense_bytes"]) == (24 * (8 + 4) + 5 * 4, 72 * 8)
    assert (row["execution"], row["packs"], row["why"]) == ("sparse", 0, "not measured")


def test_why_an_execution():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    converted = convert(model, prune(model, 0.5, ignore=["0.weight"]))
    converted[2].execution = "dense"
    converted[4].set_execution("sparse", Measured({"sparse": 1.2345, "compact": 2.0, "dense": 3.4}, (128, 4), True))
    measured = "measured: sparse 1.23 ms, compact 2 ms, dense 3.4 ms for (128, 4), training"
    assert whys(converted) == {"0": "nothing is pruned", "2": "set by hand", "4": measured}
    assert [row["execution"] for row in explain(converted)] == ["dense", "dense", "sparse"]
    times = [[row[f"{name}_ms"] for name in EXECUTIONS] for row in explain(converted)]
    assert times == [[None] * 5] * 2 + [[1.2345, None, None, 2.0, 3.4]]


class Own(nn.Conv2d):
    pass


class Several(nn.Module):
    """Weights of all sorts that stay dense."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embedding = nn.Embedding(7, 4)
        self.conv1d = nn.Conv1d(4, 4, 3)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.own = Own(4, 4, 3)
        self.attention = TorchAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.lstm = nn.LSTM(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.plain = nn.Linear(4, 4)


def test_what_is_kept_dense():
    none, recurrent = "no mask was given", "nn.LSTM multiplies its weights itself, all steps in one call"
    expected = {
        "token": "token is a parameter of Several, and no layer's weight",
        "embedding": f"{none}; also head.weight",
        "conv1d": none,
        "up": none,
        "own": none,
        "attention.attn.in_proj_weight": none,
        "attention.attn.out_proj": none,
        "lstm.weight_ih_l0": recurrent,
        "lstm.weight_hh_l0": recurrent,
        "plain": none,
    }
    model = Several()
    found = whys(model)
    assert found.keys() == expected.keys()
    assert all(why.startswith(f"kept dense: {expected[layer]}") for layer, why in found.items())
    with pytest.warns(SparseLotteryWarning):
        masks = prune(model, 0.5)
    assert [f"{layer}.weight".replace("_weight.weight", "_weight") for layer in found if none in found[layer]] == [
        *masks
    ]
    assert {row["execution"] for row in explain(model)} == {"dense"}
    converted = convert(model, masks)
    assert whys(converted) == {
        layer: why.replace(f"kept dense: {none}", "not measured") for layer, why in found.items()
    }
    assert whys(to_dense(converted)) == found


def test_layers_that_others_have_a_hand_in():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    parametrizations.weight_norm(model[1])
    model[2].forward = lambda x: x
    model[3].register_buffer("scale", torch.ones(1))
    found = whys(model)
    assert "pruned by torch.nn.utils.prune" in found["0.weight_orig"]
    assert "remove_parametrizations" in found["1.parametrizations.weight.original1"]
    assert found["2"] == "kept dense: its forward was replaced"
    assert found["3"] == "kept dense: it holds more than a weight and a bias: scale"
    assert found["4"] == "kept dense: no mask was given"


def linear(in_features=8, out_features=8):
    return MaskedLinear(in_features, out_features, mask=torch.rand(out_features, in_features) < 0.5)


def dense(in_features=8, out_features=8):
    layer = linear(in_features, out_features)
    layer.execution = "dense"
    return layer


def hooked():
    layer = linear()
    layer.register_forward_hook(lambda *_: None)
    return layer


def twice():
    layer = linear()
    return [linear(), nn.ReLU(), layer, nn.ReLU(), layer]


PACKS = {
    "alone": (lambda: [linear()], [2]),
    "a chain": (lambda: [linear(), nn.ReLU(), linear(), nn.ReLU(), linear()], [1, 0, 1]),
    "other activations": (lambda: [linear(), nn.GELU(), nn.Dropout(0.0), linear(), linear()], [1, 0, 1]),
    "a norm between": (lambda: [linear(), nn.ReLU(), linear(), nn.BatchNorm1d(8), linear()], [1, 1, 2]),
    "a dense layer between": (lambda: [linear(), nn.ReLU(), dense(), nn.ReLU(), linear()], [2, 0, 2]),
    "a hooked layer between": (lambda: [linear(), nn.ReLU(), hooked(), nn.ReLU(), linear()], [2, 2, 2]),
    "a shared layer": (twice, [1, 1]),
}


@pytest.mark.parametrize("name", PACKS)
def test_packs_are_those_of_the_kernels(name, monkeypatch):
    """Of a training step, counted where row-major activations and gradients enter the kernels."""
    make, expected = PACKS[name]
    model, packed = MaskedSequential(*make()), []

    def counted(kernel):
        return lambda x, *rest: packed.append(not reference.is_packed(x)) or kernel(x, *rest)

    assert [row["packs"] for row in explain(model)] == expected
    for direction in ("chain_forward", "chain_backward"):
        for backend in (reference, cpu):
            monkeypatch.setattr(backend, direction, counted(getattr(backend, direction)))
    for name in ("chain", "chain_gradients"):
        spy(monkeypatch, name, lambda f, x, *a: noted(packed, not reference.is_packed(x), f(x, *a)))
    model(torch.randn(16, 8)).sum().backward()
    assert sum(packed) == sum(expected)


def test_packs_outside_of_a_sequential():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.conv = (
                linear(),
                linear(),
                MaskedConv2d(2, 2, 1, mask=torch.zeros(2, 2, 1, 1) > 0),
            )

    assert [row["packs"] for row in explain(Net())] == [2, 2, 0]
    assert [row["packs"] for row in explain(linear())] == [2]


def test_nothing_to_explain():
    assert explain(nn.ReLU()) == []
    assert explain(nn.BatchNorm2d(3)) == []
