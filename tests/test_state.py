"""Checkpoints of masked layers: their own, dense ones, those of other masks, and damaged ones."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparselottery import MaskedConv2d, MaskedLinear, MaskedSequential, Pattern


def layer(density=0.3, in_features=30, out_features=20):
    return MaskedLinear(in_features, out_features, mask=torch.rand(out_features, in_features) < density)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_another_mask(assign):
    """The layer takes the mask over, trains on, and shares no memory with the state unless asked to."""
    ours, other, x = layer(0.3), layer(0.6), torch.randn(5, 30)
    state = other.state_dict()
    ours.load_state_dict(state, assign=assign)
    assert same(ours.state_dict(), state)
    assert torch.equal(ours(x), other(x))
    ours(x).sum().backward()
    assert ours.values.grad.shape == (other.nnz,)
    ours.crow_indices.zero_()
    assert assign or other.crow_indices.any()


def test_a_state_of_another_mask_of_the_same_size():
    ours, x = layer(), torch.randn(5, 30)
    other = MaskedLinear(30, 20, mask=ours.mask.flip(0).flip(1))
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours(x), other(x))


def test_a_state_of_another_mask_after_training():
    """Gradients of the old mask do not meet those of the new one."""
    ours, other, x = layer(0.3), layer(0.6), torch.randn(5, 30)
    ours(x).sum().backward()
    ours.load_state_dict(other.state_dict())
    assert ours.values.grad is None or ours.values.grad.shape == ours.values.shape
    ours(x).sum().backward()


def test_a_state_of_another_dtype():
    ours, other = layer(0.3), layer(0.6).double()
    ours.load_state_dict(other.state_dict())
    assert ours.values.dtype == torch.float32
    torch.testing.assert_close(ours.weight.double(), other.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state(assign):
    linear, ours = nn.Linear(30, 20), layer()
    mask, state = ours.mask, linear.state_dict()
    ours.load_state_dict(state, assign=assign)
    assert torch.equal(ours.mask, mask)
    assert torch.equal(ours.weight, linear.weight * mask)
    assert torch.equal(ours.bias, linear.bias)
    assert set(state) == {"weight", "bias"}
    assert ours.values.is_leaf


def test_a_state_of_a_whole_model_by_safetensors(tmp_path):
    model = MaskedSequential(layer(0.2), nn.ReLU(), layer(0.5, 20, 10))
    other = MaskedSequential(layer(0.4), nn.ReLU(), layer(0.1, 20, 10))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(5, 30)
    assert torch.equal(other(x), model(x))


def test_its_own_weight_is_there_already(monkeypatch):
    """Nothing is gathered, and indices and what is made of them stay."""
    ours, bias, x = layer(), torch.randn(20), torch.randn(5, 30)
    before, plan, weight = ours.values.clone(), ours.plan, ours.weight
    monkeypatch.setattr(Pattern, "gather", None)
    ours.load_state_dict({"weight": weight, "bias": bias})
    monkeypatch.undo()
    assert torch.equal(ours.values, before)
    assert torch.equal(ours.bias, bias)
    assert ours.plan is plan
    ours(x)
    assert ours.plan is plan
    ours.load_state_dict({"weight": layer(1.0).weight, "bias": bias})
    assert not torch.equal(ours.values, before)


def test_a_dense_state_of_a_whole_model():
    dense = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    model = MaskedSequential(layer(1.0), nn.ReLU(), layer(1.0, 20, 10))
    model.load_state_dict(dense.state_dict())
    x = torch.randn(5, 30)
    torch.testing.assert_close(model(x), dense(x))


DAMAGE = {
    "a column out of range": lambda s: s["col_indices"].__setitem__(-1, 30),
    "a negative column": lambda s: s["col_indices"].__setitem__(0, -1),
    "columns not ascending": lambda s: s.update(col_indices=s["col_indices"].flip(0)),
    "rows not monotone": lambda s: s["crow_indices"].__setitem__(3, 10_000),
    "rows that wrap around int32": lambda s: s["crow_indices"][1:3].copy_(torch.tensor([2**31 - 1, -2])),
    "rows not from 0": lambda s: s["crow_indices"].__setitem__(0, 1),
    "rows not to nnz": lambda s: s["crow_indices"].__setitem__(-1, 1),
    "a row too few": lambda s: s.update(crow_indices=s["crow_indices"][:-1]),
    "no rows": lambda s: s.update(crow_indices=s["crow_indices"][:0]),
    "int64 columns": lambda s: s.update(col_indices=s["col_indices"].long()),
    "a column too few": lambda s: s.update(col_indices=s["col_indices"][:-1]),
    "a value too few": lambda s: s.update({"values": s["values"][:-1]}),
    "a matrix of values": lambda s: s.update({"values": s["values"][None]}),
    "no values": lambda s: s.pop("values"),
    "no rows at all": lambda s: s.pop("crow_indices"),
    "no columns at all": lambda s: s.pop("col_indices"),
    "a dense weight of another shape": lambda s: s.update(weight=torch.zeros(30, 20)),
    "something unknown": lambda s: s.update(scale=torch.ones(1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused(damage):
    ours, state = layer(0.3), snapshot(layer(0.6))
    DAMAGE[damage](state)
    with pytest.raises(RuntimeError, match="loading state_dict"):
        ours.load_state_dict(state)
    assert ours.values.shape == ours.col_indices.shape
    assert ours.pattern.validate()


@pytest.mark.parametrize("damage", list(DAMAGE)[:-1])
def test_a_damaged_state_changes_nothing(damage):
    """Its values and indices belong together: none is taken without the others."""
    ours, state = layer(0.3), snapshot(layer(0.6))
    before, plan = snapshot(ours), ours.plan.clone()
    DAMAGE[damage](state)
    with pytest.raises(RuntimeError, match="loading state_dict"):
        ours.load_state_dict(state)
    assert torch.equal(ours.plan, plan)
    for name in ("values", "crow_indices", "col_indices"):
        assert torch.equal(ours.state_dict()[name], before[name]), name


def test_the_error_names_the_layer():
    model = MaskedSequential(layer(), nn.ReLU(), layer(1.0, 20, 10))
    state = snapshot(model)
    state["2.col_indices"][-1] = 99
    with pytest.raises(RuntimeError, match=r"2.*col_indices: expected values in \[0, 20\), got 0 to 99"):
        model.load_state_dict(state)


def test_not_strict_takes_what_is_there():
    ours, bias = layer(), torch.ones(20)
    values = ours.values.detach().clone()
    ours.load_state_dict({"bias": bias}, strict=False)
    assert torch.equal(ours.bias, bias)
    assert torch.equal(ours.values, values)


@pytest.mark.parametrize("assign", [False, True])
def test_states_of_a_convolution(assign):
    """Of another mask, and a dense one, read at our mask."""
    ours, other = (MaskedConv2d(4, 6, 3, mask=torch.rand(6, 4, 3, 3) < density) for density in (0.3, 0.6))
    conv, mask, x = nn.Conv2d(4, 6, 3), ours.mask, torch.randn(2, 4, 9, 9)
    ours.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(ours(x), other(x))
    ours.load_state_dict(MaskedConv2d(4, 6, 3, mask=mask).state_dict())
    ours.load_state_dict(conv.state_dict(), assign=assign)
    assert torch.equal(ours.mask, mask)
    assert torch.equal(ours.weight, conv.weight * mask)
    with pytest.raises(RuntimeError, match=r"weight: expected \(6, 4, 3, 3\), got \(6, 36\)"):
        ours.load_state_dict({**conv.state_dict(), "weight": conv.weight.flatten(1)})
    state = snapshot(ours)
    state["col_indices"][-1] = 36
    with pytest.raises(RuntimeError, match=r"col_indices: expected values in \[0, 36\), got \d+ to 36"):
        ours.load_state_dict(state)
