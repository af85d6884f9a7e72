"""A net whose masks move, for tests of `set_masks`."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparselottery import convert
from sparselottery.convert import dense_state, masked_layers

X = torch.linspace(-1, 1, 4 * 2 * 6 * 6, dtype=torch.float64).sin().view(4, 2, 6, 6)


def dense_net():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU()
    )
    return net.double()


def random_masks(seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: each for name, each in dense_net().named_parameters() if each.dim() > 1}
    return {name: torch.rand(each.shape, generator=generator) < density for name, each in weights.items()}


def same_count(seed):
    """Masks of equally many survivors, whatever the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randperm(mask.numel(), generator=generator) < mask.numel() // 3).view(mask.shape)
        for name, mask in random_masks(0).items()
    }


def masked_net(masks):
    return convert(dense_net(), masks)


def train(model, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - X.mean()).square().mean().backward()
        optimizer.step()


def snapshot(model, optimizer):
    """All that a move could change, as copies."""
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return copy.deepcopy((model.state_dict(), grads, optimizer.state_dict(), [m.execution for m in layers(model)]))


def layers(model):
    return list(masked_layers(model).values())


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for each in zip(one, other, strict=True):
            assert_same(*each)
    else:
        assert one == other


def reference(model):
    net = dense_net()
    net.load_state_dict(dense_state(model))
    return net


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def whole_net():
    return masked_net(random_masks(0, 2.0))
