"""Layers of one's own, and what one has put on layers of torch: both are there after every conversion."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselottery import ScatteredLayer, Ticket, convert, explain, load_sparse, prune, register, to_dense
from sparselottery.nn import registry
from sparselottery.nn.scattered import MaskedBilinear


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Scaled(nn.Module):
    """Somebody's own layer."""

    def __init__(self, size, scale):
        super().__init__()
        self.size, self.scale = size, scale
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x):
        return F.linear(x, self.weight) * self.scale


class MaskedScaled(ScatteredLayer):
    dense_type = Scaled
    arguments = ("size", "scale")
    chooses_bias = False

    def multiply(self, weight, bias, x):
        return F.linear(x, weight) * self.scale


def test_a_layer_of_ones_own(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    model = nn.Sequential(Scaled(5, 3.0), nn.Linear(5, 5)).double()
    assert explain(model)[0]["why"] == "kept dense: there is no masked layer for Scaled: register(...) adds one"
    register(Scaled, MaskedScaled)
    masks = prune(model, 0.6)
    assert list(masks) == ["0.weight", "1.weight"]
    converted = convert(model, masks)
    assert type(converted[0]) is MaskedScaled
    x, dense = images(2, 5), to_dense(converted)
    assert_same(converted(x), dense(x))
    assert type(dense[0]) is Scaled
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    assert_same(load_sparse(tmp_path / "net.safetensors", model)(x), dense(x))
    assert MaskedScaled(5, 2.0).values.std() > 0.5


class Shaped(nn.Module):
    def __init__(self, shape):
        super().__init__()


class Altering(Scaled):
    """Keeps something else than it was given."""

    def __init__(self, size, scale):
        super().__init__(size, scale * 10)
        self.twice = 2 * self.scale

    def forward(self, x):
        return F.linear(x, self.weight) * self.scale


class MaskedAltering(MaskedScaled):
    dense_type = Altering


class Doubling(Scaled):
    """Computes with an attribute that is none of its arguments."""

    def __init__(self, size, scale):
        super().__init__(size, scale)
        self.twice = 2 * scale

    def forward(self, x):
        return F.linear(x, self.weight) * self.twice


class MaskedDoubling(MaskedScaled):
    dense_type = Doubling

    def multiply(self, weight, bias, x):
        return F.linear(x, weight) * self.twice


def test_a_layer_of_ones_own_that_keeps_something_else_than_it_was_given(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    model = nn.Sequential(Altering(5, 3.0), nn.Linear(5, 5))
    mask = torch.rand(5, 5) < 0.5
    register(Altering, MaskedAltering)
    with pytest.raises(ValueError, match=r"scale: expected an attribute that is what .* given, got 30.0, .* 300.0"):
        convert(model, {"0.weight": mask})
    assert "scale: expected" in explain(model)[0]["why"]
    with pytest.raises(ValueError, match="MaskedAltering: scale: expected"):
        MaskedAltering(5, 3.0)
    plain = nn.Sequential(Scaled(5, 30.0), nn.Linear(5, 5))
    register(Scaled, MaskedScaled)
    Ticket.from_model(convert(plain, {"0.weight": mask})).save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"0.weight: .* scale: expected an attribute"):
        load_sparse(tmp_path / "net.safetensors", model)


def test_a_layer_of_ones_own_has_all_that_the_dense_one_has(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_TYPES", dict(registry._TYPES))
    register(Doubling, MaskedDoubling)
    model = nn.Sequential(Doubling(5, 3.0), nn.Linear(5, 5)).double()
    model[0].twice = 7.0  # not what a new one has
    converted = convert(model, {"0.weight": torch.rand(5, 5) < 0.4})
    x = images(2, 5)
    dense = to_dense(converted)
    assert dense[0].twice == 7.0
    assert_same(converted(x), dense(x))
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    assert_same(load_sparse(tmp_path / "net.safetensors", model)(x), dense(x))
    assert MaskedDoubling(5, 2.0).twice == 4.0


class Tagged(nn.Linear):
    gain = 2.0

    def __init__(self, *args, tag):
        super().__init__(*args)
        self.tag = [tag]


class ReadsItsLayers(nn.Module):
    """Computes with what its layers have."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.embedding = Tagged(6, 6, tag=3.0), nn.Linear(6, 6), nn.Embedding(9, 6)
        self.second.SCALE = 5.0
        self.second.before = [self.first]

    def forward(self, ids):
        x = self.first(self.embedding(ids)) * self.first.tag[0] * getattr(self.first, "gain", 1.0)
        return self.second(x) * getattr(self.second, "SCALE", 1.0)


def test_attributes_come_along(tmp_path):
    model, ids = ReadsItsLayers().double().eval(), torch.arange(9)
    masks = prune(model, 0.6)
    converted = convert(model, masks)
    dense = to_dense(converted)
    assert_same(converted(ids), dense(ids))
    assert type(dense.first) is Tagged
    assert "gain" not in vars(dense.first)
    assert converted.first.tag == [3.0]
    assert converted.first.tag is not model.first.tag
    for each in (converted, dense):
        assert each.second.before[0] is each.first
    again = convert(copy.deepcopy(converted), masks)
    again.second.LATER = 1
    assert_same(again(ids), dense(ids))
    assert (to_dense(again).second.SCALE, to_dense(again).second.LATER) == (5.0, 1)
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    loaded = load_sparse(tmp_path / "net.safetensors", model)
    assert_same(loaded(ids), dense(ids))
    assert loaded.net.second.before[0] is loaded.net.first
    assert type(loaded.net.first.to_dense()) is Tagged


class Blocky(Scaled):
    def __init__(self, size, scale):
        super().__init__(size, scale)
        self.block, self.shape = 3, 4


def test_attributes_that_masked_layers_have_themselves_are_refused():
    with pytest.raises(ValueError, match=r"Blocky: expected .* themselves, got block, shape"):
        type("MaskedBlocky", (MaskedScaled,), {"dense_type": Blocky})(5, 2.0)
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].density = 0.5
    with pytest.raises(ValueError, match="density: expected an attribute that masked layers do not have themselves"):
        convert(model, prune(model, 0.5))


@pytest.mark.parametrize(
    ("dense_type", "masked_type", "message"),
    [
        (3, MaskedScaled, "dense_type: expected a subclass of nn.Module, got 3"),
        (nn.Linear, nn.Linear, "masked_type: expected a subclass of MaskedLayer"),
        (nn.Linear, MaskedScaled, "expected one whose dense_type is Linear, got one with .*Scaled"),
        (Scaled, type("Wrong", (MaskedScaled,), {"arguments": ("size", "length")}), r"of Scaled, got \['length'\]"),
        (Scaled, type("Wrong", (ScatteredLayer,), {"dense_type": Scaled}), "expected `arguments`, a tuple"),
        (Scaled, type("Wrong", (MaskedScaled,), {"arguments": ("size",)}), r"needs, got none of \['scale'\]"),
        (Scaled, type("Wrong", (MaskedScaled,), {"chooses_bias": True}), "chooses_bias = False`, as Scaled's"),
        (Scaled, type("Wrong", (MaskedScaled,), {"multiply": ScatteredLayer.multiply}), "expected a method `multiply"),
        (nn.Bilinear, type("Wrong", (MaskedBilinear,), {"chooses_bias": False}), "chooses_bias = True`, as Bilinear's"),
        (Shaped, type("Wrong", (MaskedScaled,), {"dense_type": Shaped, "arguments": ("shape",)}), r"\['shape'\]"),
    ],
)
def test_register_refuses(dense_type, masked_type, message):
    with pytest.raises(TypeError, match=message):
        register(dense_type, masked_type)
