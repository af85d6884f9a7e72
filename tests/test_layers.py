"""Every kind of layer: what a masked one computes, trains, stores and loads is what the dense one with zeros does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import LAYERS, images
from safetensors.torch import load_file
from torch import nn

from sparselottery import (
    ScatteredLayer,
    Ticket,
    convert,
    explain,
    export,
    load_sparse,
    prune,
    register,
    set_masks,
    to_dense,
)
from sparselottery.convert import masked_layers
from sparselottery.nn import MaskedEmbedding, MaskedLayer, registry
from sparselottery.nn.scattered import MaskedBilinear


def tensors(result):
    return [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]


def assert_same(ours, theirs):
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)


@pytest.fixture(params=LAYERS)
def case(request):
    """(model, masks, the model with zeros where pruned, inputs)"""
    torch.manual_seed(0)
    layer, args = LAYERS[request.param]()
    model = Net(layer.double())
    masks = prune(model, 0.6)
    assert masks
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            dense.get_parameter(name).mul_(mask)
    return model, masks, dense, args


def gradients(model, args):
    args = [each.clone().requires_grad_() if _is_number(each) else each for each in args]
    result = sum(each.square().sum() for each in tensors(model(*args)))
    return torch.autograd.grad(result, [*(each for each in args if _is_number(each)), *model.parameters()])


def _is_number(each):
    return isinstance(each, torch.Tensor) and each.is_floating_point()


def test_values_and_gradients(case):
    model, masks, dense, args = case
    converted = convert(model, masks)
    assert_same(converted(*args), dense(*args))
    with torch.no_grad():
        assert_same(converted(*args), dense(*args))
    layers = masked_layers(converted)
    count = sum(map(_is_number, args))
    ours, theirs = gradients(converted, args), gradients(dense, args)
    assert_same(ours[:count], theirs[:count])
    ours = {id(p): g for p, g in zip(converted.parameters(), ours[count:], strict=True)}
    theirs = {name: g for (name, _), g in zip(dense.named_parameters(), theirs[count:], strict=True)}
    for name, mask in masks.items():
        assert_same(ours[id(layers[name].values)], theirs[name][mask])
    values = {id(layer.values) for layer in layers.values()}
    others = [gradient for id_, gradient in ours.items() if id_ not in values]
    assert_same(tuple(others), tuple(gradient for name, gradient in theirs.items() if name not in masks))


def test_dense_again(case):
    model, masks, dense, args = case
    again = to_dense(convert(model, masks))
    assert type(again.layer) is type(model.layer)
    assert list(again.state_dict()) == list(model.state_dict())
    assert_same(tuple(again.state_dict().values()), tuple(dense.state_dict().values()))
    assert_same(again(*args), dense(*args))


def test_checkpoints(case):
    model, masks, dense, args = case
    converted = convert(model, masks)
    other = copy.deepcopy(converted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    twin = copy.deepcopy(other)
    other.load_state_dict(model.state_dict())
    twin.load_state_dict(converted.state_dict())
    assert_same(other(*args), dense(*args))
    assert_same(twin(*args), dense(*args))


def test_tickets_and_frozen_nets(case, tmp_path):
    model, masks, dense, args = case
    ticket = Ticket.from_model(convert(model, masks))
    ticket.save(tmp_path / "net.safetensors")
    loaded = Ticket.load(tmp_path / "net.safetensors")
    assert loaded.same(ticket)
    assert loaded.masks.keys() == masks.keys()
    assert_same(loaded.apply(model)(*args), dense(*args))
    frozen = load_sparse(tmp_path / "net.safetensors", model)
    assert_same(frozen(*args), dense(*args))
    assert not any(isinstance(each, MaskedLayer) for each in frozen.modules())


def test_masks_that_move(case):
    model, masks, dense, args = case
    converted = convert(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
    set_masks(converted, masks)
    assert_same(converted(*args), dense(*args))


def test_other_dtypes(case):
    model, masks, dense, args = case
    converted = convert(model.float(), masks)
    args = [each.float() if _is_number(each) else each for each in args]
    for ours, theirs in zip(tensors(converted(*args)), tensors(dense.float()(*args)), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled(case):
    model, masks, dense, args = case
    torch._dynamo.reset()
    compiled = torch.compile(convert(model, masks), backend="aot_eager", fullgraph=True)
    assert_same(compiled(*args), dense(*args))
    assert_same(gradients(compiled, args)[:1], gradients(convert(model, masks), args)[:1])


def test_constructors_are_those_of_the_dense_layers(case):
    """Each argument that is kept makes the same layer again, masked by keyword."""
    model, masks, _dense, _args = case
    for name, layer in masked_layers(convert(model, masks)).items():
        again = type(layer)(**layer._arguments_of(layer), dtype=torch.float64, mask=masks[name])
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.mask, masks[name])
        assert again.density == layer.density < 0.5
        assert repr(again) == repr(layer)
        whole = type(layer)(**layer._arguments_of(layer), device="meta")
        assert whole.density == 1


def test_an_embedding_refuses_numbers_of_no_row():
    layer = MaskedEmbedding(5, 3, mask=torch.eye(5, 3) > 0)
    for ids in (torch.tensor([5]), torch.tensor([0, -1])):
        with pytest.raises(IndexError, match=r"expected numbers in \[0, 5\)"):
            layer(ids)
    with pytest.raises(TypeError, match="expected int32 or int64"):
        layer(torch.tensor([1.0]))
    assert layer(torch.empty(2, 0, dtype=torch.int32)).shape == (2, 0, 3)
    assert MaskedEmbedding(4, 3, padding_idx=1).weight[1].tolist() == [0, 0, 0]
    for wrong in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match="MaskedEmbedding: its"):
            MaskedEmbedding(4, 3, **wrong)


def test_gradients_of_gradients_of_an_embedding():
    layer = MaskedEmbedding(5, 3, padding_idx=0, dtype=torch.float64, mask=torch.rand(5, 3) < 0.6)
    ids = torch.tensor([[4, 0, 1], [1, 2, 2]])
    y = layer(ids)
    (gradient,) = torch.autograd.grad((y**3).sum(), layer.values, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), layer.values)
    counts = torch.bincount(ids.flatten(), minlength=5).double() * torch.tensor([0.0, 1, 1, 1, 1])
    taken = (counts[:, None].expand(5, 3))[layer.mask]
    assert_same(second, 6 * layer.values * taken)


@pytest.mark.parametrize("kind", ["conv1d", "transposed"])
def test_gradients_of_gradients_of_a_convolution(kind):
    dense, x = nn.Conv1d(2, 3, 3), images(1, 2, 5)
    if kind == "transposed":
        dense, x = nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, 2), images(1, 2, 2, 3)
    layer = convert(nn.Sequential(dense.double()), {"0.weight": torch.rand(dense.weight.shape) < 0.5})[0]

    def call(x, values, bias):
        return torch.func.functional_call(layer, {"values": values, "bias": bias}, x)

    inputs = x.requires_grad_(), layer.values, layer.bias
    torch.autograd.gradcheck(call, inputs)
    torch.autograd.gradgradcheck(call, inputs)


def test_a_transposed_convolution_reads_channels_last():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)).double()
    converted, x = convert(model, prune(model, 0.6)), images(2, 4, 5, 3)
    y = converted(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_same(y, converted(x))
    assert converted[0].executions == ("sparse", "dense")
    convert(model, prune(model, 0.6), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert converted.float()(x.float()).dtype == torch.bfloat16
    for wrong in (images(2, 3, 5, 3), images(5, 3)):
        with pytest.raises((ValueError, RuntimeError)):
            converted.double()(wrong)


def test_scattered_layers_take_what_torch_takes():
    """No choice of an execution is offered, and a measurement leaves them alone."""
    model = nn.Sequential(nn.ConvTranspose3d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6 * 6, 3))
    converted = convert(model, prune(model, 0.5), torch.randn(2, 4, 4, 4, 4))
    assert converted[0].executions == ("dense",)
    assert explain(converted)[0]["dense_ms"] is None
    with pytest.raises(ValueError, match="there are no kernels for such a layer"):
        converted[0].execution = "sparse"
    with pytest.raises(ValueError, match="Only"):
        type(converted[0])(4, 4, 3, padding_mode="circular")


class Several(nn.Module):
    """Three uses of one weight, and attention."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(7, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.other = nn.Linear(8, 7, bias=False), nn.Linear(8, 7, bias=False)
        self.head.weight = self.other.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = self.attention(x, x, x)[0]
        return self.head(x) + self.other(x)


@pytest.mark.parametrize("format", ["safetensors", "npz", "torch-csr", "dense", "pt2"])
def test_exports(tmp_path, format):
    model, ids = Several().eval(), torch.tensor([[1, 5, 2], [0, 6, 3]])
    converted = convert(model, prune(model, 0.6))
    export(converted, tmp_path / "net", format=format, example_input=ids)
    if format == "safetensors":
        torch.testing.assert_close(load_sparse(tmp_path / "net", model)(ids), to_dense(converted)(ids))
    if format == "dense":
        other = Several().eval()
        other.load_state_dict(load_file(tmp_path / "net"))
        torch.testing.assert_close(other(ids), to_dense(converted)(ids))


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
