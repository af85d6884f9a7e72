"""Subclasses whose forward calls super().forward: what they do around it they do around the masked layer."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import fx, nn

from sparselottery import Ticket, convert, explain, load_sparse, prune, to_dense
from sparselottery.architecture import describe
from sparselottery.nn import MaskedEmbedding, MaskedLinear, MaskedSequential
from sparselottery.survey import survey


class Scaled(nn.Embedding):
    """As Gemma's: with a buffer that no state_dict holds."""

    def __init__(self, size, features, scale):
        super().__init__(size, features)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Positions(nn.Embedding):
    """As BART's and RoFormer's: of another signature, decorated, with a method of its own."""

    offset = 2

    def __init__(self, size, features):
        super().__init__(size + self.offset, features)

    def moved(self, ids):
        return ids + self.offset

    @torch.no_grad()
    def forward(self, shape, *, start=0):
        return super().forward(self.moved(torch.arange(start, start + shape[1], device=self.weight.device)))


class Further(Positions):
    """Has that forward with another method, and none of its own."""

    offset = 1

    def moved(self, ids):
        return super().moved(ids) + 1


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifting(Doubling):
    """Of a subclass of a subclass."""

    def forward(self, x):
        return super().forward(x) + 1


class OfAConvolution(nn.Conv1d):
    """As causal ones."""

    @functools.cached_property
    def left(self):
        return self.kernel_size[0] - 1

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (self.left, 0)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.positions = Scaled(9, 6, 3.0), Further(6, 6)
        self.first, self.second, self.conv = Doubling(6, 6), Shifting(6, 6), OfAConvolution(6, 6, 3)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.positions(ids.shape, start=1)
        return self.head(self.conv(self.second(self.first(x)).mT).mT)


IDS = torch.tensor([[1, 5, 0, 8], [8, 2, 2, 3]])


def made():
    torch.manual_seed(0)
    model = Net().double().eval()
    return model, prune(model, 0.6)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_all_of_it_is_masked_and_computes_what_the_dense_net_does():
    model, masks = made()
    assert survey(model).share == 1
    converted = convert(model, masks)
    assert isinstance(converted.words, MaskedEmbedding)
    assert isinstance(converted.second, MaskedLinear)
    assert repr(converted.second).startswith("MaskedShifting(in_features=6")
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    x = model(IDS)
    assert_same(converted(IDS), x)
    x.square().mean().backward()
    converted(IDS).square().mean().backward()
    for name, mask in masks.items():
        if (gradient := model.get_parameter(name).grad) is not None:
            assert_same(converted.get_submodule(name.removesuffix(".weight")).values.grad, gradient[mask])
    assert converted.positions.values.grad is None
    torch.testing.assert_close(converted.float()(IDS), model.float()(IDS))


def test_it_goes_where_others_go(tmp_path):
    model, masks = made()
    converted = convert(model, masks)
    y, dense = converted(IDS), to_dense(converted)
    assert [type(each) for each in dense.children()] == [type(each) for each in model.children()]
    assert dense.words.scale == 3.0
    buffer = io.BytesIO()
    torch.save(converted, buffer)
    buffer.seek(0)
    again = convert(converted, masks)
    others = dense, again, copy.deepcopy(converted), torch.load(buffer, weights_only=False), convert(dense, masks)
    for each in others:
        assert_same(each(IDS), y)
    assert type(again.second) is type(converted.second)
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    assert_same(Ticket.load(tmp_path / "net.safetensors").apply(model)(IDS), y)
    frozen = load_sparse(tmp_path / "net.safetensors", model)
    for each in (frozen, copy.deepcopy(frozen), load_sparse(tmp_path / "net.safetensors", model, example_input=IDS)):
        assert_same(each(IDS), y)
    assert type(frozen.net.first.to_dense()) is Doubling
    assert_same(frozen.net.words.to_dense()(IDS), dense.words(IDS))
    assert_same(convert(model, masks, IDS)(IDS), y)


def test_float32_takes_no_native_path_past_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Doubling(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), Shifting(6, 2)).eval()
    converted, x = convert(model, prune(model, 0.6)), torch.randn(3, 6)
    dense = to_dense(converted)
    assert type(converted) is MaskedSequential
    torch.testing.assert_close(converted(x), dense(x))
    assert describe(converted) is None
    Ticket.from_model(converted).save(tmp_path / "net.safetensors")
    torch.testing.assert_close(load_sparse(tmp_path / "net.safetensors", model)(x), dense(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_see_it(tmp_path):
    model, masks = made()
    converted = convert(model, masks)
    y = converted(IDS)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(converted, (IDS,))
    for each in (compiled, exported.module(), torch.jit.trace(converted, IDS)):
        assert_same(each(IDS), y)
    net = nn.Sequential(Doubling(6, 6), nn.ReLU(), Shifting(6, 6)).double()
    net, x = convert(net, prune(net, 0.5)), torch.randn(2, 6, dtype=torch.float64)
    assert_same(fx.symbolic_trace(net)(x), net(x))
    assert_same(torch.vmap(net)(x), net(x))


class ReadsItsWeight(nn.Embedding):
    """As Whisper's."""

    def forward(self, start):
        return self.weight[start:]


class NamesItsBase(nn.Linear):
    def forward(self, x):
        return nn.Linear.forward(self, x)


class Mixin:
    pass


class Mixed(Mixin, nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Checking(Doubling):
    def check(self, x):
        return x

    def forward(self, x):
        return super().forward(self.check(x))


class Plan(Doubling):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("plan", torch.zeros(1), persistent=False)


class Persistent(Doubling):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(1))


class AsksItsClass(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if isinstance(self, nn.Linear) else y


class AsksBehindAFunction(Doubling):
    def scaled(self, y):
        return y * type(self).__name__.count("A")

    def forward(self, x):
        return self.scaled(super().forward(x))


class OldSpelling(nn.Linear):
    def forward(self, x):
        return super(OldSpelling, self).forward(x)  # noqa: UP008


class Swaps(nn.Linear):
    def forward(self, x):
        old = self.weight.data
        self.weight.data = 2 * old
        y = super().forward(x)
        self.weight.data = old
        return y


class Slotted(Doubling):
    __slots__ = ("found",)


class Remembers(Doubling):
    @functools.cached_property
    def norm(self):
        return self.weight.norm().item()


class Values(Doubling):
    values = 3.0


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (AsksItsClass, "asks for its class, or for the parameters, by isinstance"),
        (AsksBehindAFunction, "asks for its class, or for the parameters, by type"),
        (OldSpelling, "asks for its class, or for the parameters, by OldSpelling"),
        (Swaps, "its code writes to data"),
        (Slotted, "it has slots"),
        (Remembers, "it keeps what it has computed of the weight"),
        (Values, "values is its own, a name that masked layers need"),
        (ReadsItsWeight, "a subclass of nn.Embedding: .* calls no super"),
        (NamesItsBase, r"a subclass of nn.Linear: .* calls no super\(\).forward"),
        (Mixed, "has several bases"),
        (Checking, "check is its own, a name that masked layers need"),
        (Plan, "more than a weight and a bias: plan"),
        (Persistent, "more than a weight and a bias: seen"),
    ],
)
def test_what_is_refused(kind, why):
    model = nn.Sequential(kind(4, 4), nn.Linear(4, 4))
    assert list(survey(model).maskable) == ["1.weight"]
    with pytest.raises(ValueError, match=why):
        convert(model, {"0.weight": torch.ones(4, 4, dtype=torch.bool)})
    assert explain(model)[0]["why"].startswith("kept dense: ")


class Holds(nn.Linear):
    """What a class holds beside functions, and functions behind descriptors that name their class by super()."""

    act, kind, power = torch.relu, nn.Identity, 2

    @classmethod
    def exponent(cls):
        return cls.power

    @staticmethod
    def halved(y):
        return y / 2

    def forward(self, x):
        return self.kind()(self.act(self.halved(super().forward(x)))) ** self.exponent()


class Wide(nn.Linear):
    @property
    def width(self):
        return super().extra_repr().count("6")

    def forward(self, x):
        return super().forward(x) * self.width


@pytest.mark.parametrize("kind", [Holds, Wide])
def test_what_the_class_holds_comes_along(kind):
    torch.manual_seed(0)
    layer, x = kind(6, 6).double(), torch.randn(3, 6).double()
    sparse = convert(nn.Sequential(layer), {"0.weight": torch.ones(6, 6, dtype=torch.bool)})
    if kind is Wide:  # a masked layer has more to say of itself
        assert_same(sparse(x) / sparse[0].width, layer(x) / layer.width)
    else:
        assert_same(sparse(x), layer(x))
    assert_same(to_dense(sparse)(x), layer(x))


def test_growth_by_gradients_is_refused():
    from sparselottery import dynamic

    model = nn.Sequential(Doubling(6, 6), nn.Linear(6, 6))
    converted = convert(model, prune(model, 0.5))
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"whose gradients can be followed, got the MaskedDoubling of 0.weight"):
        dynamic.rigl(converted, optimizer, density=0.5, every=1, end=4)
