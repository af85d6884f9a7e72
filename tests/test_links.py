"""Units that layers have in common."""

from __future__ import annotations

import operator
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from branches import Branches
from torch import nn

from sparselottery import convert, prune
from sparselottery.links import Link, links

ROOT = Path(__file__).resolve().parent.parent


def chain(*between, outputs=16, inputs=16):
    return nn.Sequential(nn.Linear(8, outputs), *between, nn.Linear(inputs, 4))


def pairs(model):
    return [(*link.outputs, *link.inputs) for link in links(model)]


def test_units_pass_through_what_treats_them_alike():
    model = chain(nn.BatchNorm1d(16), nn.PReLU(16), nn.Dropout(), nn.Identity())
    assert links(model) == [Link(("0.weight",), ("5.weight",), ("1", "2", "3", "4"))]
    assert pairs(convert(model, prune(model, 0.5))) == [("0.weight", "5.weight")]


def test_channels_are_units():
    convs = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    assert pairs(convs) == [("0.weight", "4.weight"), ("4.weight", "7.weight")]
    assert pairs(nn.ModuleDict({"net": convs})) == [("net.0.weight", "net.4.weight"), ("net.4.weight", "net.7.weight")]


@pytest.mark.parametrize(
    "model",
    [
        chain(nn.Softmax(1)),
        chain(nn.LayerNorm(16)),
        chain(nn.Unflatten(1, (8, 2)), nn.Flatten()),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
        nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]),
        chain(nn.BatchNorm2d(16)),
        chain(nn.MaxPool2d(1)),
        chain(nn.Flatten(0, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(8, 4)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv2d(8, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.MaxPool2d(1), nn.Linear(8, 4)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Conv2d(8, 4, 1)),
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    ],
)
def test_others_are_left_alone(model):
    assert links(model) == []


def test_a_layer_that_is_used_twice_is_in_no_link():
    shared, norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    for others in ([shared, nn.Linear(8, 8), nn.ReLU(), shared], [shared, nn.Linear(8, 8), tied]):
        assert links(nn.Sequential(*others)) == []
    assert links(nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)) == []
    plain = nn.BatchNorm1d(8, affine=False)  # it has means
    assert links(nn.Sequential(nn.Linear(8, 8), plain, nn.Linear(8, 8), plain)) == []
    relu = nn.ReLU()
    assert len(links(nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 8)))) == 2


def test_chains_in_chains_are_one():
    assert pairs(chain(nn.Sequential(nn.ReLU(), nn.Sequential()))) == [("0.weight", "2.weight")]


class Own(nn.Sequential):
    def forward(self, x):
        return self[0](x) + super().forward(x)


def test_a_layer_that_is_called_twice_is_in_no_link():
    assert links(Own(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))) == []


def test_branches_that_are_added_share_their_units():
    net = Branches(operator.add)
    found = links(net)
    assert [sorted(link.outputs) for link in found] == [["enter.weight", "two.weight"], ["one.weight"]]
    assert [sorted(link.inputs) for link in found] == [["leave.weight", "one.weight"], ["two.weight"]]
    assert [link.between for link in found] == [("norm",), ("between",)]
    assert links(convert(net, prune(net, 0.5))) == found


@pytest.mark.parametrize(
    "join",
    [
        lambda x, y: torch.cat([x[:, :4], y[:, 4:]], 1),
        lambda x, y: x + y.flip(1),
        lambda x, y: x + y.softmax(1),
        lambda x, y: x + y * torch.arange(8).view(-1, 1, 1),
        lambda x, y: F.layer_norm(x + y, x.shape[1:]),
    ],
)
def test_units_that_something_else_reads_stay(join):
    assert pairs(Branches(join)) == [("one.weight", "two.weight")]


def test_what_reads_a_weight_itself_fixes_its_units():
    class Reads(Branches):
        def forward(self, x):
            return super().forward(x) * self.one.bias.sum()

    assert links(Reads(torch.add)) == []


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_block_see_its_units(hook):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ReLU()

        def forward(self, x):
            return self.inner(x)

    model = chain(Plain())
    assert pairs(model) == [("0.weight", "2.weight")]
    getattr(model[1], hook)(lambda *_: None)
    assert links(model) == []


def test_a_forward_is_traced_on_a_copy_without_data():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = chain(nn.ReLU()), 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x, *, scale=2.0):
            self.calls += 1
            self.seen += 1
            assert next(self.parameters()).is_meta
            return self.net(x) * scale * torch.rand(()) if scale > 1 else x

    model, state = Counts(), torch.get_rng_state()
    assert pairs(model) == [("net.0.weight", "net.2.weight")]
    assert model.calls == model.seen == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_where_a_forward_cannot_be_traced_those_of_its_children_are():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleList([Branches(operator.add)])

        def forward(self, x):
            return self.body[0](x) if x.sum() > 0 else x

    assert len(links(Asks())) == 2
    assert links(Asks())[0].between == ("body.0.norm",)


@pytest.mark.parametrize("child", [0, 1, 2])
@pytest.mark.parametrize(
    "observe",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda module: setattr(module, "forward", module.forward),
    ],
)
def test_a_call_that_somebody_observes_is_in_no_link(observe, child):
    model = chain(nn.ReLU())
    assert len(links(model)) == 1
    observe(model[child])
    assert links(model) == []


def test_a_chain_with_a_forward_of_its_own_has_no_links():
    model = chain(nn.ReLU())
    model.forward = lambda x: model[0](x)
    assert links(model) == []


class Seen(nn.Module):
    """A chain of two convolutions, and what `also` does with the units between them."""

    def __init__(self, also):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.also, self.held, self.kept = also, [self.norm.weight], []

    def forward(self, x):
        units = self.norm(self.one(x))
        return self.also(self, units, self.two(F.relu(units)))


def kept(net, units, y):
    net.kept.append(units)
    return y


ALSO = {
    "only in training": lambda net, units, y: (y, units.softmax(1)) if net.training else y,
    "at random": lambda net, units, y: y + units.sum() if torch.rand(()) < 0.5 else y,
    "at Python's random": lambda net, units, y: y + units.sum() if random.random() < 0.5 else y,
    "at NumPy's random": lambda net, units, y: y + units.sum() if np.random.rand() < 0.5 else y,
    "of a buffer": lambda net, units, y: (y, net.norm.running_var.sqrt()),
    "of a parameter in a list": lambda net, units, y: (y, net.held[0].abs()),
    "of parameters by name": lambda net, units, y: (y, dict(net.named_parameters())["norm.weight"].abs()),
    "kept": kept,
}


@pytest.mark.parametrize("also", ALSO)
@pytest.mark.parametrize("training", [False, True])
def test_what_reads_units_now_and_then_or_behind_a_graph(also, training):
    assert pairs(Seen(lambda net, units, y: y)) == [("one.weight", "two.weight")]
    assert links(Seen(ALSO[also]).train(training)) == []


def test_norms_that_share_what_they_remember():
    model = nn.Sequential(
        *(part for _ in range(2) for part in (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))), nn.Conv2d(8, 4, 1)
    )
    assert len(links(model)) == 2
    model[3].running_mean = model[1].running_mean
    assert links(model) == []


def test_compiling_works_after_the_first_trace():
    """While torch.fx traces, functions of math are its own: what is imported meanwhile would keep those."""
    code = """
import math, torch
from torch import nn
from sparselottery.links import links

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.held = [self.layer.weight]

    def forward(self, x):
        return self.layer(x), self.held[0].abs()

links(Net())
compiled = torch.compile(lambda x: x * math.prod((2, 3)), backend="eager", fullgraph=True)
assert compiled(torch.ones(1)).item() == 6
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)
