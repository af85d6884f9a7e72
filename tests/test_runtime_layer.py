"""Layers of whole models that others read: of torch's own modules, and frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparselottery import Ticket, convert, load_sparse, prune, to_dense
from sparselottery.nn import weight as weights


@pytest.fixture
def made(monkeypatch):
    """Notes every dense tensor that is made."""
    calls, make = [], weights._Base._make
    monkeypatch.setattr(weights._Base, "_make", lambda self: calls.append(self) or make(self))
    return calls


@pytest.fixture
def encoder(monkeypatch):
    """An encoder layer, dense, converted and loaded frozen, and the calls of torch's dense fast path."""
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    return calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("stack", [False, True])
def test_transformer_encoders_run_sparse(encoder, made, tmp_path, norm_first, stack):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    if stack:
        model = nn.TransformerEncoder(model, 2, enable_nested_tensor=not norm_first)
    model.eval()
    converted = convert(model, prune(model, 0.8))
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    frozen, dense = load_sparse(tmp_path / "net.safetensors", model), to_dense(converted)
    x, padding = torch.randn(2, 4, 16), torch.tensor([[False] * 4, [False, False, True, True]])
    made.clear()
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            keep = ~padding if options else torch.ones_like(padding)
            expected = dense(x, **options)
            assert encoder  # as torch runs the dense one
            encoder.clear()
            for net in (converted, frozen):
                torch.testing.assert_close(net(x, **options)[keep], expected[keep], rtol=1e-4, atol=1e-5)
            assert not encoder
    assert not made


def test_compiled_encoders_run_sparse(tmp_path):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    converted, called = convert(model, prune(model, 0.8)), []
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    frozen, x = load_sparse(tmp_path / "net.safetensors", model), torch.randn(2, 4, 16)

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        called.extend(node.target for node in graph.graph.nodes)
        return graph

    for net in (converted, frozen, copy.deepcopy(converted)):
        torch.compiler.reset()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(net, backend=backend)(x), to_dense(converted)(x))
        assert called
        assert torch._transformer_encoder_layer_fwd not in called
        called.clear()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_encoders_with_a_dense_first_layer(encoder, tmp_path):
    """torch asks the first layer alone whether nested tensors may be given to all."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    converted = convert(model, {name: mask for name, mask in prune(model, 0.8).items() if "layers.1" in name})
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    frozen, dense = load_sparse(tmp_path / "net.safetensors", model), to_dense(converted)
    x, padding = torch.randn(2, 4, 16), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        expected = dense(x, src_key_padding_mask=padding)
        assert [type(each) for each in dense.modules()] == [type(each) for each in model.modules()]
        assert len(encoder) == 2
        for net in (converted, frozen):
            encoder.clear()
            torch.testing.assert_close(net(x, src_key_padding_mask=padding)[~padding], expected[~padding])
            assert len(encoder) == 1


def test_attention_is_right(tmp_path):
    """Its out_proj stays dense: it is read, never called."""
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32))
    converted = convert(model, prune(model, 0.8)).eval()
    x = torch.randn(4, 2, 16)
    torch.testing.assert_close(converted(x), to_dense(converted)(x), rtol=1e-4, atol=1e-5)


def test_frozen_layers_have_the_attributes_of_dense_ones(tmp_path, made):
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(2, 1), groups=2, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(6 * 3 * 4, 5, bias=False),
    ).eval()
    Ticket.from_model(convert(model, prune(model, 0.8))).save(tmp_path / "net.safetensors")
    frozen = load_sparse(tmp_path / "net.safetensors").net
    dense = to_dense(convert(model, prune(model, 0.8)))
    made.clear()
    names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
    for index, attributes in ((0, names), (2, ("in_features", "out_features"))):
        for name in attributes:
            assert getattr(frozen[index], name) == getattr(dense[index], name)
        assert frozen[index].weight.dtype == torch.float32
        assert frozen[index].weight.shape == dense[index].weight.shape
        assert not frozen[index].weight.requires_grad
        assert (frozen[index].bias is None) == (dense[index].bias is None)
        assert not made
        assert torch.equal(frozen[index].weight, dense[index].weight)
        made.clear()
    layer = frozen[2]
    before = layer.values.clone()
    for write in (
        lambda: nn.init.zeros_(layer.weight),
        lambda: layer.weight.data.t().mul_(2),
        lambda: setattr(layer, "weight", torch.zeros(layer.shape)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.zeros(layer.shape))),
        lambda: layer.weight.requires_grad_(),
    ):
        with pytest.raises(RuntimeError, match="weight: expected to be read only, as its layer is frozen"):
            write()
    assert torch.equal(layer.values, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged, torch.sparse_coo])
def test_nested_and_sparse_inputs_are_refused(tmp_path, layout):
    """By layers on our kernels, compact ones and frozen ones; a dense execution takes what torch does."""
    model, conv = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Sequential(nn.Conv2d(3, 4, 3))
    converted, images = convert(model, prune(model, 0.5)), convert(conv, prune(conv, 0.5))
    compact = convert(model[0], {"weight": torch.arange(8).expand(6, 8) < 4})
    compact.execution = "compact"
    Ticket.from_model(converted).save(tmp_path / "net")
    frozen = load_sparse(tmp_path / "net")
    x, image = torch.randn(5, 8).to_sparse(), torch.randn(3, 9, 9).to_sparse()
    if layout != torch.sparse_coo:
        x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=layout)
        image = torch.nested.nested_tensor([torch.randn(3, 9, 9), torch.randn(3, 8, 9)], layout=layout)
    calls = [(net, x) for net in (converted, converted[0], compact, frozen, *frozen.children())]
    for net, given in [*calls, (images, image), (images[0], image)]:
        if isinstance(net, nn.ReLU):
            continue
        with pytest.raises(TypeError, match=r"x: expected a dense tensor, got (a nested|one of torch)"):
            net(given)
    if layout != torch.sparse_coo:
        converted[0].execution = "dense"
        for ours, theirs in zip(converted[0](x).unbind(), x.unbind(), strict=True):
            torch.testing.assert_close(ours, torch.nn.functional.linear(theirs, converted[0].weight, model[0].bias))


@pytest.mark.parametrize(
    ("density", "kinds"),
    [(0.45, ["FrozenLayer", "FrozenLayer"]), (0.6, ["FrozenLayer", "Linear"]), (0.8, ["Conv2d", "Linear"])],
)
def test_without_an_example_dense_layers_are_those_of_high_density(density, kinds, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 20)).double()
    converted = convert(model, prune(model, 1 - density, method="random"))
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    frozen, x = load_sparse(tmp_path / "net.safetensors"), torch.randn(5, 3, 8, 8).double()
    assert [type(frozen.net[at]).__name__ for at in (0, 2)] == kinds
    torch.testing.assert_close(frozen(x), to_dense(converted)(x).detach())
