"""Frozen copies follow the model: layers held twice, buffers of no file, hooks, memory over many sizes."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from sparselottery import Ticket, convert, prune
from sparselottery.kernels import cpu_net
from sparselottery.runtime import load_sparse
from sparselottery.runtime.layer import Cache, FrozenLayer
from sparselottery.runtime.sequential import Run


class Held(nn.Module):
    """Two layers, and their steps as `hold` keeps them."""

    def __init__(self, hold):
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(16, 4)
        self.steps = hold(self)

    def forward(self, x):
        steps = self.steps.values() if isinstance(self.steps, dict) else self.steps
        for step in steps:
            x = step(x).relu()
        return x


HOLDS = {
    "a list": lambda m: [m.a, m.b],
    "a tuple": lambda m: (m.a, m.b),
    "a dict": lambda m: {"a": m.a, "b": m.b},
    "nested": lambda m: [partial(m.a), *[(m.b,)][0]],
    "bound methods": lambda m: [m.a.forward, m.b.__call__],
    "modules too": lambda m: nn.ModuleList([m.a, m.b]),
    "a Sequential too": lambda m: [nn.Sequential(m.a), nn.Sequential(m.b)],
}


def frozen(model, path, given=None, density=0.3):
    """(the converted model, the frozen one)."""
    masked = convert(model.eval(), prune(model, 1 - density, method="random"))
    Ticket.from_model(masked).save(path)
    return masked, load_sparse(path, given or copy.deepcopy(model))


@pytest.mark.parametrize("hold", HOLDS)
def test_layers_are_frozen_wherever_they_are_held(hold, tmp_path):
    model, x = Held(HOLDS[hold]), torch.randn(4, 32)
    other = Held(HOLDS[hold])  # its weights are not read
    masked, net = frozen(model, tmp_path / "net.safetensors", other)
    truth = masked.b(masked.a(x).relu()).relu()
    torch.testing.assert_close(net(x), truth.detach())
    torch.testing.assert_close(masked(x), truth)
    assert isinstance(net.net.a, FrozenLayer)


@pytest.mark.parametrize("kind", ["closure", "default", "weak"])
def test_what_no_copy_can_follow_is_refused(kind, tmp_path):
    def hold(m):
        steps = [m.a]
        if kind == "closure":
            return [lambda x: steps[0](x), m.b]
        return [lambda x, a=m.a: a(x), m.b] if kind == "default" else [weakref.ref(m.a), m.b]

    plain, model = Held(HOLDS["a list"]), Held(hold)
    frozen(plain, tmp_path / "net.safetensors")
    for call in (lambda: load_sparse(tmp_path / "net.safetensors", model), lambda: convert(model, prune(model, 0.5))):
        with pytest.raises(ValueError, match=r"Held\.steps: expected an attribute that copies"):
            call()
    convert(model, {"b.weight": torch.ones(4, 16, dtype=torch.bool)})  # that of `a` stays right


def test_functions_of_nothing_in_the_model_are_let_be(tmp_path):
    scale = torch.tensor(2.0)
    model, x = Held(lambda m: [m.a, lambda x: x * scale, nn.ReLU(), m.b]), torch.randn(4, 32)
    masked, net = frozen(model, tmp_path / "net.safetensors")
    torch.testing.assert_close(net(x), masked(x).detach())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.embed = nn.Linear(8, 8), nn.Embedding(8, 8)
        self.again, self.head = self.first, nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, i):
        return self.head(self.again(self.first(self.embed(i))))


def test_tied_layers_and_parameters(tmp_path):
    model, i = Tied(), torch.arange(8)
    masked, net = frozen(model, tmp_path / "net.safetensors", Tied())
    torch.testing.assert_close(net(i), masked(i).detach())
    assert net.net.first is net.net.again
    assert net.net.head.values is net.net.embed.values


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(8), persistent=False)

    def forward(self, x):
        return self.l(x) * self.table


def test_buffers_that_no_file_holds_are_the_models(tmp_path):
    model, x = Rotary(), torch.randn(4, 8)
    masked, net = frozen(model, tmp_path / "net.safetensors", model)
    torch.testing.assert_close(net(x), masked(x).detach())
    assert net.net.table.data_ptr() != model.table.data_ptr()
    with torch.device("meta"):
        empty = Rotary()
    with pytest.raises(ValueError, match=r"buffers with values, got the buffer 'table', .* meta"):
        load_sparse(tmp_path / "net.safetensors", empty)


def mlp():
    return nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Dropout(), nn.Sequential(nn.Linear(9, 9), nn.ReLU()))


def test_hooks_of_frozen_nets_fire_until_removed(tmp_path):
    _, net = frozen(mlp(), tmp_path / "net.safetensors")
    x, seen = torch.randn(3, 8), []
    expected = net(x)
    assert len(net.net.grouped().parts) == 1
    for module in net.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            with register(lambda m, *_: seen.append(m)):
                torch.testing.assert_close(net(x), expected)
            assert seen == [module]
            seen.clear()
    with nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m)):
        torch.testing.assert_close(net(x), expected)
    assert set(seen) == set(net.modules())
    assert torch.equal(net(x), expected)
    assert len(net.net.grouped().parts) == 1


def test_hooks_of_the_given_model_fire(tmp_path):
    model, seen = mlp(), []
    model[0].register_forward_hook(lambda m, *_: seen.append(type(m)))
    _, net = frozen(model, tmp_path / "net.safetensors")
    net(torch.randn(3, 8))
    assert seen == [FrozenLayer]


def test_a_norm_of_a_frozen_net_that_trains(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    _, net = frozen(model, tmp_path / "net.safetensors")
    expected = x = torch.randn(5, 2, 6, 6)
    before = net(x)
    net.net[1].train()
    for child in copy.deepcopy(net.net):
        expected = child(expected)
    torch.testing.assert_close(net(x), expected)
    assert not torch.allclose(expected, before)


def test_edits_of_a_frozen_net_count(tmp_path):
    _, net = frozen(mlp(), tmp_path / "net.safetensors")
    x = torch.randn(3, 8)
    before = net(x)
    net.net[1].tag = "one attribute more, until there is another in its place"
    net(x)
    del net.net[1].tag
    net.net[1].forward = lambda x: 2 * x.relu()
    hidden = net.net[0](x)
    torch.testing.assert_close(net(x), net.net[3](2 * hidden.relu()))
    del net.net[1].forward
    assert torch.equal(net(x), before)
    net.net[3][1] = nn.Identity()
    torch.testing.assert_close(net(x).relu(), before)
    assert (net(x) < 0).any()
    net.net[2].train()
    assert not torch.equal(net(x), net(x))  # dropout, at last


def rewritten(module):
    """New values for all its floating tensors."""
    return {name: torch.rand_like(t) + 0.5 if t.is_floating_point() else t for name, t in module.state_dict().items()}


CHANGES = {
    "loaded": lambda module: module.load_state_dict(rewritten(module)),
    "assigned": lambda module: module.load_state_dict(rewritten(module), assign=True),
    "an attribute": lambda module: setattr(module, "weight", nn.Parameter(torch.rand_like(module.weight))),
    "in place": lambda module: module.bias.fill_(3),
    "eps": lambda module: setattr(module, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [1, 4])
def test_what_is_beside_frozen_layers_may_change_alone(at, change, tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).eval()
    path, x = tmp_path / "net.safetensors", torch.randn(2, 2, 6, 6)
    Ticket.from_model(convert(model, {"0.weight": torch.rand(3, 2, 3, 3) < 0.5})).save(path)
    net = load_sparse(path)
    before = net(x)
    CHANGES[change](net.net[at])
    expected = x
    for child in net.net:
        expected = child(expected)
    torch.testing.assert_close(net(x), expected)
    assert (change, at) == ("eps", 4) or not torch.equal(before, expected)


def test_linear_after_images_is_of_the_last_dimension(tmp_path):
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(7, 4)), torch.randn(2, 2, 9, 9)
    masked, net = frozen(model, tmp_path / "net.safetensors")
    torch.testing.assert_close(net(x), masked(x).detach())


def test_a_users_attribute_runs_is_theirs(tmp_path):
    class Mine(nn.Module):
        runs = property(lambda self: (_ for _ in ()).throw(RuntimeError("mine")))

        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x):
            return self.l(x)

    model = Mine()
    frozen(model, tmp_path / "net.safetensors")
    x = torch.randn(3, 8)
    torch.testing.assert_close(
        load_sparse(tmp_path / "net.safetensors", model, example_input=x)(x),
        load_sparse(tmp_path / "net.safetensors", model)(x),
    )


def test_memory_is_bounded_over_a_thousand_sizes(tmp_path, monkeypatch):
    model, nets = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), weakref.WeakSet()
    _, net = frozen(model, tmp_path / "net.safetensors")
    init = cpu_net.Net.__init__
    monkeypatch.setattr(cpu_net.Net, "__init__", lambda self, *args: nets.add(self) or init(self, *args))
    torch.set_num_threads(1)
    sizes = [(1, 1, 3 + i // 40, 3 + i % 40) for i in range(1000)]
    with ThreadPoolExecutor(4) as pool:
        shapes = list(pool.map(lambda size: net(torch.ones(size)).shape, sizes))
    assert shapes == [(1, 2, h - 2, w - 2) for _, _, h, w in sizes]
    for batch in range(1, 100):
        net(torch.ones(batch, 1, 5, 5))
    gc.collect()
    run = net.net.grouped().whole
    assert isinstance(run, Run)
    assert 0 < len(nets) <= 2 * Cache.LIMIT
    assert max(len(run._made._made), len(run._calls._made)) <= Cache.LIMIT


def test_what_is_used_again_stays_cached():
    cache, made = Cache([]), []
    for key in range(3 * Cache.LIMIT):
        for each in ("hot", key):
            cache(each, lambda each=each: made.append(each) or each)
    assert made == ["hot", *range(3 * Cache.LIMIT)]
