"""Every kind of layer: what a masked one computes, trains, stores and loads is what the dense one with zeros does."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from layers import LAYERS, images
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparselottery import (
    Ticket,
    convert,
    explain,
    export,
    load_sparse,
    prune,
    set_masks,
    to_dense,
)
from sparselottery.convert import masked_layers
from sparselottery.nn import MaskedEmbedding, MaskedLayer


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


def test_attention_computes_no_more_features_than_it_reads():
    model = Net(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    converted = convert(model, prune(model, 0.6))
    (x, memory), layer = images(2, 2, 4, 8), converted.layer.in_proj
    counts = [int(layer.mask[rows].sum()) for rows in (slice(8), slice(8, 24))]
    for _ in range(2):
        with FlopCounterMode(display=False) as counted:
            y = converted.layer(x, memory, memory, need_weights=False)[0]
        flops = counted.get_flop_counts()["Global"]
        assert flops[torch.ops.sparselottery.chain] == 2 * 8 * (sum(counts) + converted.layer.out_proj.nnz)
        set_masks(converted, prune(converted, 0.5))
        counts = [int(layer.mask[rows].sum()) for rows in (slice(8), slice(8, 24))]
    seen = []
    layer.register_forward_hook(lambda layer, args, y: seen.append(y.shape[-1]))
    assert_same(converted.layer(x, memory, memory)[0], to_dense(converted).layer(x, memory, memory)[0])
    assert seen == [24, 24]
    layer._forward_hooks.clear()
    layer.execution = "dense"
    assert_same(converted.layer(x, memory, memory)[0], to_dense(converted).layer(x, memory, memory)[0])
    alone = convert(model, {"layer.out_proj.weight": torch.eye(8) > 0})
    y = to_dense(alone).layer(x, memory, memory)[0]
    assert_same(alone.layer(x, memory, memory)[0], y)


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


def test_the_first_argument_has_the_name_of_torch(case, tmp_path):
    model, masks, dense, args = case
    name = next(iter(inspect.signature(dense.layer.forward).parameters))
    sparse = convert(model, masks).eval()
    frozen = Ticket.from_model(sparse)
    frozen.save(tmp_path / "net.safetensors")
    frozen = load_sparse(tmp_path / "net.safetensors", copy.deepcopy(dense))
    expected = dense.eval()(*args)
    assert_same(sparse.layer(*args[1:], **{name: args[0]}) if len(args) == 1 else sparse(*args), expected)
    assert_same(frozen.net.layer(**{name: args[0]}) if len(args) == 1 else frozen(*args), expected)
