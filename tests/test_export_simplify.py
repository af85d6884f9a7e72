"""Batchnorms folded and dead units removed: the same outputs from less."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from sparselottery import convert
from sparselottery.export import export
from sparselottery.export.dead import remove_dead
from sparselottery.export.simplify import fold_batchnorm
from sparselottery.ticket import Ticket


def norm(kind, width, **kwargs):
    layer = kind(width, **kwargs).double()
    for name, tensor in layer.state_dict().items():
        if tensor.dim():
            tensor.uniform_(0.5, 2) if name == "running_var" else tensor.normal_()
    return layer


def ticket_of(*layers, density=0.5, masks=None):
    torch.manual_seed(1)
    model = nn.Sequential(*layers).double().eval()
    weights = {f"{n}.weight": m.weight for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    made = {name: torch.rand(weight.shape) < density for name, weight in weights.items()}
    return Ticket.from_model(convert(model, made | (masks or {})))


def outputs(ticket, x):
    with torch.no_grad():
        return ticket.apply()(x.double())


def same(before, after, x):
    torch.testing.assert_close(outputs(after, x), outputs(before, x), rtol=1e-12, atol=1e-12)


def without(mask, rows=(), columns=()):
    mask = mask.clone()
    mask[list(rows)] = False
    mask[:, list(columns)] = False
    return mask


def ones(*shape):
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batchnorms_are_folded(bias, affine):
    before = ticket_of(
        nn.Conv2d(3, 6, 3, bias=bias), nn.Dropout(), norm(nn.BatchNorm2d, 6, affine=affine), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 36, 5, bias=bias), norm(nn.BatchNorm1d, 5, affine=affine),
    )  # fmt: skip
    after, folded = fold_batchnorm(before)
    assert folded == ("2", "6")
    assert type(after.apply()[2]) is nn.Identity
    assert all(after.masks[name].equal(mask) for name, mask in before.masks.items())
    same(before, after, torch.randn(4, 3, 8, 8))


def test_batchnorms_that_stay():
    before = ticket_of(
        norm(nn.BatchNorm1d, 4), nn.Linear(4, 6), nn.ReLU(), norm(nn.BatchNorm1d, 6), nn.Linear(6, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
    )  # fmt: skip
    after, folded = fold_batchnorm(before)
    assert folded == ()
    assert after.same(before)


def test_a_fold_that_would_overflow_is_left_alone():
    before = ticket_of(nn.Linear(4, 6), norm(nn.BatchNorm1d, 6))
    before.weights["1.running_var"][2] = -before.apply()[1].eps
    assert fold_batchnorm(before)[1] == ()


def test_no_way_out():
    masks = {"0.weight": ones(6, 4), "2.weight": without(ones(5, 6), columns=(1, 4))}
    before = ticket_of(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), masks=masks)
    after, removed = remove_dead(before)
    assert removed.units == {"0": 2}
    assert after.shapes == {"0.weight": (4, 4), "2.weight": (5, 4)}
    same(before, after, torch.randn(4, 4))


ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(0.3), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(),
    nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softplus(), nn.Softsign(), nn.Hardtanh(), nn.Hardsigmoid(),
    nn.Hardswish(), nn.ReLU6(inplace=True), nn.PReLU(), nn.PReLU(6), nn.Dropout(), nn.Identity(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_constants_are_carried_into_the_next_bias(activation, bias):
    masks = {"0.weight": without(ones(6, 4), rows=(0, 3)), "3.weight": ones(5, 6)}
    layers = nn.Linear(4, 6), norm(nn.BatchNorm1d, 6), activation, nn.Linear(6, 5, bias=bias)
    before = ticket_of(*layers, masks=masks)
    after, removed = remove_dead(before)
    assert removed.units == {"0": 2}
    assert removed.notes == ()
    same(before, after, torch.randn(4, 4))


def test_it_repeats_until_nothing_is_dead():
    masks = {
        "0.weight": without(ones(4, 4), rows=(0,)),
        "2.weight": torch.tensor([[True, False, False, False], *[[False, True, True, True]] * 3]),
        "4.weight": without(ones(4, 4), columns=(3,)),
        "6.weight": ones(2, 4),
    }
    linears = [nn.Linear(4, 4) for _ in range(3)]
    before = ticket_of(
        linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2], nn.Tanh(), nn.Linear(4, 2), masks=masks
    )
    after, removed = remove_dead(before)
    assert removed.units == {"0": 1, "2": 2}
    same(before, after, torch.randn(3, 4))
    assert remove_dead(after)[1].units == {}


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2),
     nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("padding", [0, "valid"])
def test_convolutions(pool, padding):
    masks = {"0.weight": without(ones(6, 3, 3, 3), rows=(1,)), "4.weight": without(ones(5, 6, 2, 2), columns=(2,))}
    layers = (
        nn.Conv2d(3, 6, 3, padding=1),
        norm(nn.BatchNorm2d, 6),
        nn.GELU(),
        pool,
        nn.Conv2d(6, 5, 2, padding=padding),
    )
    before = ticket_of(*layers, masks=masks)
    after, removed = remove_dead(before)
    assert removed.units == {"0": 2}
    same(before, after, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("mode", ["zeros", "circular", "replicate"])
def test_constants_before_a_padded_convolution(mode):
    masks = {"0.weight": without(ones(6, 3, 1, 1), rows=(1, 2)), "2.weight": ones(5, 6, 3, 3)}
    before = ticket_of(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, padding_mode=mode), masks=masks)
    before.weights["0.bias"][1], before.weights["0.bias"][2] = -1.0, 1.0
    after, removed = remove_dead(before)
    assert removed.units == {"0": 1 if mode == "zeros" else 2}
    assert len(removed.notes) == (mode == "zeros")
    same(before, after, torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2, padding=1), nn.AvgPool2d(2, divisor_override=3),
                                  nn.MaxPool2d(2, 3, 1, 3)], ids=repr)  # fmt: skip
def test_pools_that_see_the_border(pool):
    masks = {"0.weight": without(ones(3, 2, 1, 1), rows=(1,)), "2.weight": ones(2, 3, 1, 1)}
    before = ticket_of(nn.Conv2d(2, 3, 1), pool, nn.Conv2d(3, 2, 1), masks=masks)
    after, removed = remove_dead(before)
    assert removed.units == {}
    assert "1 constant units stay" in removed.notes[0]
    same(before, after, torch.randn(2, 2, 6, 6))


def test_through_flatten_with_a_norm_behind_it():
    masks = {"0.weight": without(ones(6, 3, 3, 3), rows=(1,)), "5.weight": ones(5, 54)}
    masks["5.weight"][:, 18:27] = False
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), norm(nn.BatchNorm1d, 54), nn.PReLU(54), nn.Linear(54, 5)
    before = ticket_of(*layers, masks=masks)
    after, removed = remove_dead(before)
    assert removed.units == {"0": 2}
    assert after.shapes == {"0.weight": (4, 3, 3, 3), "5.weight": (5, 36)}
    same(before, after, torch.randn(2, 3, 5, 5))


def test_one_unit_always_stays():
    masks = {"0.weight": ~ones(6, 4), "2.weight": ones(5, 6)}
    before = ticket_of(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), masks=masks)
    after, removed = remove_dead(before)
    assert removed.units == {"0": 5}
    same(before, after, torch.randn(4, 4))
    masks = {"0.weight": ones(6, 4), "2.weight": ~ones(5, 6)}
    assert remove_dead(ticket_of(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), masks=masks))[1].units == {"0": 5}


@pytest.mark.parametrize(
    "between",
    [
        [nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)],
        [nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 3)],
        [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3, groups=4)],
        [nn.Conv2d(8, 8, 3), nn.Softmax(1), nn.Conv2d(8, 4, 3)],
        [nn.Conv2d(8, 8, 3), nn.Linear(10, 4)],
        [nn.Conv2d(8, 8, 3), nn.Flatten(2), nn.Linear(100, 4)],
        [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 4, 3)],
    ],
    ids=repr,
)
def test_barriers(between):
    before = ticket_of(*between, density=0.02)
    after, removed = remove_dead(before)
    assert removed.units == {}
    assert "left alone" in removed.notes[0]
    assert after.same(before)


def test_random_nets():
    for seed in range(30):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3), norm(nn.BatchNorm2d, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU()]
        layers += [
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(72, 20),
            nn.ReLU(),
            nn.Linear(20, 10, bias=False),
            nn.Tanh(),
        ]
        before = ticket_of(*layers, nn.Linear(10, 4), density=0.04)
        after, _ = remove_dead(fold_batchnorm(before)[0])
        same(before, after, torch.randn(3, 3, 8, 8))


def test_export_simplifies_on_request(tmp_path):
    masks = {"0.weight": without(ones(6, 4), rows=(0, 3))}
    before = ticket_of(nn.Linear(4, 6), norm(nn.BatchNorm1d, 6), nn.ReLU(), nn.Linear(6, 5), masks=masks)
    path, x = tmp_path / "out", torch.randn(3, 4).double()
    report = export(before, path, "safetensors", fold_batchnorm=True, remove_dead=True, example_input=x)
    assert report.folded == ("1",)
    assert report.removed["0"] >= 2
    same(before, Ticket.load(path), x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return x + self.inner(x)


def test_other_models_are_left_alone(tmp_path):
    model = convert(Residual(), {"inner.0.weight": torch.eye(4) > 0})
    report = export(model, tmp_path / "out", "safetensors", fold_batchnorm=True, remove_dead=True)
    assert (report.folded, report.removed) == ((), {})
    assert "nothing was simplified" in report.notes[0]
    assert Ticket.load(tmp_path / "out").same(Ticket.from_model(model))


def test_a_simplification_that_is_wrong_is_not_written(tmp_path, monkeypatch):
    def wrong(ticket):
        return Ticket(
            {**ticket.weights, "0.bias": ticket.weights["0.bias"] + 1}, ticket.masks, {}, ticket.architecture
        ), ()

    monkeypatch.setattr(sys.modules["sparselottery.export"], "fold_batchnorms", wrong)
    ticket = ticket_of(nn.Linear(4, 6), nn.Linear(6, 5))
    with pytest.raises(OSError, match="does not compute what the source does"):
        export(ticket, tmp_path / "out", fold_batchnorm=True, example_input=torch.ones(2, 4).double())
    assert not list(tmp_path.iterdir())
