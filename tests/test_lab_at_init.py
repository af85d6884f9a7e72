from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparselottery import SparseLotteryWarning, prune
from sparselottery.convert import dense_state
from sparselottery.lab import at_init
from sparselottery.lab.controls import reinit
from sparselottery.lab.models import conv_net, lenet_300_100, resnet_18
from sparselottery.masks import pools

lenet = partial(lenet_300_100, 20, 4, hidden=(16, 12))
METHODS = {
    "snip": at_init.snip,
    "grasp": at_init.grasp,
    "synaptic_flow": lambda model, x, y: at_init.synaptic_flow(model, x.shape[1:], {}),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 20, generator=generator), torch.arange(12) % 4


def loss_without(model, weight, index, x, y, temperature=1.0):
    """The cross-entropy, and its gradient's squared norm in that weight, without one entry of the weight."""
    with torch.no_grad():
        weight.view(-1)[index] = 0
    loss = F.cross_entropy(model(x) / temperature, y)
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.item(), gradient.square().sum().item()


def test_snip_is_the_first_order_change_of_the_loss(batch):
    model = reinit(lenet, 0).double()
    x, y = batch[0].double(), batch[1]
    scores = at_init.snip(model, x, y)["fc2.weight"].flatten()
    with torch.no_grad():
        model.fc2.weight.view(-1)[7] *= 1e-4  # so small that the change is of first order
    scores = at_init.snip(model, x, y)["fc2.weight"].flatten()
    before = F.cross_entropy(model(x), y).item()
    after, _ = loss_without(model, model.fc2.weight, 7, x, y)
    assert scores[7].item() == pytest.approx(abs(after - before), rel=1e-2)


class Quadratic(nn.Module):
    """One input weight row w, and logits (w . x, 0): cross-entropy is log(1 + exp(-w . x)) for label 0."""

    def __init__(self, w):
        super().__init__()
        self.layer = nn.Linear(len(w), 1, bias=False)
        self.layer.weight.data = torch.tensor([w], dtype=torch.float64)

    def forward(self, x):
        return F.pad(self.layer(x), (0, 1))


def test_grasp_is_weight_times_hessian_times_gradient_by_hand():
    """With s = sigmoid(-w . x): g = -s x, H = s (1 - s) x x', so w * Hg = -s^2 (1 - s) |x|^2 w * x."""
    w, x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    s = torch.sigmoid(-(w @ x))
    expected = -(s**2) * (1 - s) * x.square().sum() * w * x
    scores = at_init.grasp(Quadratic(w.tolist()), x[None], torch.tensor([0]), temperature=1.0)
    torch.testing.assert_close(scores["layer.weight"][0], expected)
    assert expected[1] > 0 > expected[2]  # what lowers the margin keeps the gradient alive


def test_grasp_keeps_what_the_gradient_flow_would_lose_most(batch):
    """Its scores are half of what |g|^2 loses with the weight, to first order: the sign decides, and is often wrong."""
    model = nn.Sequential(nn.Linear(20, 4, bias=False)).double()
    x, y = batch[0].double(), batch[1]
    for index in range(0, 80, 7):
        with torch.no_grad():
            model[0].weight.normal_(generator=torch.Generator().manual_seed(index))
            model[0].weight.view(-1)[index] *= 1e-4
        score = at_init.grasp(model, x, y, temperature=1.0)["0.weight"].flatten()[index].item()
        gradient = torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)[0]
        _, after = loss_without(model, model[0].weight, index, x, y)
        assert 2 * score == pytest.approx(gradient.square().sum().item() - after, rel=1e-2)


@pytest.mark.filterwarnings("ignore:nothing is pruned")
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_synaptic_flow_is_conserved(hidden, seed):
    """All of it passes through every layer (Tanaka et al. 2020, theorem 2), and through every unit of a hidden one."""
    torch.manual_seed(seed)
    model = lenet_300_100(5, 3, hidden=tuple(hidden))
    for layer in model:
        layer.bias = None
    masks = prune(model, 0.3, method="random")
    scores = list(at_init.synaptic_flow(model, (5,), masks).values())
    for score in scores:
        torch.testing.assert_close(score.sum(), scores[0].sum())
    for before, after in pairwise(scores):
        torch.testing.assert_close(before.sum(1), after.sum(0))
    for score, mask in zip(scores, masks.values(), strict=True):
        assert (score >= 0).all()
        assert not score[~mask].any()


def test_synflow_leaves_every_layer_where_other_global_prunings_leave_none(batch):
    model = reinit(partial(lenet_300_100, 20, 4, hidden=(64, 64, 64, 64)), 0)
    with torch.no_grad():
        model.fc3.weight.mul_(0.01)
    whole = {name: torch.ones_like(mask) for name, mask in prune(model, 0).items()}
    together = pools(list(whole), 0.0, scope="global")
    with pytest.warns(SparseLotteryWarning, match=r"no weight is left of fc3\.weight: "):
        target = prune(model, 0.99, scope="global")
    masks = at_init.synflow(model, (20,), whole, together, target)
    assert sum(int(mask.sum()) for mask in masks.values()) == sum(int(mask.sum()) for mask in target.values())
    assert all(mask.any() for mask in masks.values())
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    paths = at_init.synaptic_flow(model, (20,), masks)
    assert all(score.sum() > 0 for score in paths.values())  # the input still reaches the output


def test_synflow_prunes_exponentially(monkeypatch):
    model = reinit(lenet, 0)
    whole = {name: torch.ones_like(mask) for name, mask in prune(model, 0).items()}
    total = sum(mask.numel() for mask in whole.values())
    target = prune(model, 0.9, scope="global")
    left, flow = [], at_init.synaptic_flow

    def spy(model, shape, masks):
        left.append(sum(int(mask.sum()) for mask in masks.values()))
        return flow(model, shape, masks)

    monkeypatch.setattr(at_init, "synaptic_flow", spy)
    at_init.synflow(model, (20,), whole, pools(list(whole), 0.0, scope="global"), target)
    share = sum(int(mask.sum()) for mask in target.values()) / total
    assert left == pytest.approx([total * share ** (step / 100) for step in range(100)], rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_the_net_is_left_alone_and_every_maskable_weight_is_scored(method):
    torch.manual_seed(0)
    model = resnet_18((3, 8, 8), 4, widths=(2, 3, 4)).eval()
    before = dense_state(model)
    scores = METHODS[method](model, torch.randn(6, 3, 8, 8), torch.arange(6) % 4)
    assert list(scores) == list(prune(model, 0))
    for name, score in scores.items():
        assert score.shape == model.get_parameter(name).shape
        assert score.isfinite().all()
        assert score.any()
        assert not score.requires_grad
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_convolutions_conserve_the_flow_too():
    model = reinit(partial(conv_net, (3,), (2, 4, 4), 3, (5,)), 0)
    for layer in model:
        if hasattr(layer, "bias"):
            layer.bias = None
    scores = [score.sum() for score in at_init.synaptic_flow(model, (2, 4, 4), {}).values()]
    for score in scores:
        torch.testing.assert_close(score, scores[0])
