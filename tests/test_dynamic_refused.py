"""What MaskUpdater and its methods refuse: at once where that can be told, else in the step."""

from __future__ import annotations

import math

import pytest
import torch
from moving import sgd, whole_net
from torch import nn

from sparselottery import SparseLotteryWarning, convert, dynamic, prune
from sparselottery.convert import masks_of


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"distribution": "er"}, ValueError, "distribution: expected one of .*'global'.* or a function, got 'er'"),
        ({"drop": "size"}, ValueError, r"drop: expected one of \('magnitude', 'saliency'\) or a function, got 'size'"),
        ({"grow": "all"}, ValueError, "grow: expected one of .*, got 'all'"),
        ({"candidates": 0.5}, ValueError, "candidates: expected at least 1 for each weight"),
        ({"every": 0}, ValueError, "every, window: expected at least 1, got 0 and 10"),
        ({"ignore": "0.*"}, TypeError, "ignore: expected a sequence of names"),
        ({"ignore": ["9.*"]}, ValueError, r"ignore: expected a name or pattern among \['0.weight', .*, got '9.\*'"),
        ({"ignore": 3}, TypeError, "ignore: expected a sequence of names, got 3"),
        ({"seed": None}, TypeError, "candidates, seed: expected a number or None, and an int, got None and None"),
        ({"seed": 2**64}, ValueError, "seed: expected one of 64 bits, got 18446744073709551616"),
        ({"candidates": "a"}, TypeError, "candidates, seed: expected a number or None, and an int, got 'a' and 0"),
        ({"ignore": [0]}, TypeError, "ignore: expected names of parameters, as '0.weight' is, got 0"),
        ({"ignore": ["*"]}, ValueError, "model: expected masked layers that may move, got none"),
        ({"end": 0}, ValueError, "end: expected a step from 1 on, or None, got 0"),
        ({"end": -1}, ValueError, "end: expected a step from 1 on, or None, got -1"),
        ({"every": "10"}, TypeError, "every, end: expected ints, got '10' and None"),
        ({"window": "x"}, TypeError, "window: expected an int, got 'x'"),
        (
            {"density": lambda step: None},
            TypeError,
            "density: expected a function .* that returns numbers, got None at",
        ),
        ({"density": 0.1}, TypeError, r"density: expected a function of the step, as constant\(0.1\) is, got 0.1"),
        ({"drop_fraction": 0.3}, TypeError, "drop_fraction: expected a function of the step, .* got 0.3"),
        ({"density": dynamic.constant(1.5)}, ValueError, "density: expected values in .*, got 1.5 at step 0"),
        (
            {"distribution": lambda shapes, density: dict.fromkeys(shapes, 2.0)},
            ValueError,
            "distribution: expected dens",
        ),
    ],
)
def test_what_is_refused(changes, error, told):
    model = whole_net()
    with pytest.raises(error, match=told):
        dynamic.MaskUpdater(model, sgd(model.parameters()), **({"density": dynamic.constant(1.0)} | changes))


def test_what_a_step_refuses():
    model = whole_net()
    optimizer = sgd(model.parameters())
    updater = dynamic.rigl(model, optimizer, 0.3, end=9, every=1)
    with pytest.raises(ValueError, match="grow: expected a backward through the layers"):
        updater.step()
    updater = dynamic.gmp(model, optimizer, 0.1, end=9, every=1, drop="saliency")
    with pytest.raises(ValueError, match=r"drop: expected 0.weight to have a gradient"):
        [updater.step() for _ in range(9)]
    updater = dynamic.gmp(model, optimizer, 0.1, end=9, every=1, drop=lambda name, layer: torch.ones(3))
    with pytest.raises(ValueError, match=r"drop: expected a score for each of \d+ weights, got \(3,\)"):
        [updater.step() for _ in range(9)]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda m, o: dynamic.gmp(m, o, 1.5, end=5), ValueError, r"density: expected values in \[0, 1\], got 1.5"),
        (lambda m, o: dynamic.gmp(m, o, math.nan, end=5), ValueError, r"density: expected values in \[0, 1\], got nan"),
        (lambda m, o: dynamic.gmp(m, o, "x", end=5), TypeError, "schedule: expected numbers, got 'x'"),
        (lambda m, o: dynamic.set_training(m, o, "x", end=5), TypeError, "schedule: expected numbers, got 'x'"),
        (lambda m, o: dynamic.rigl(m, o, 0.1, end=1.5), TypeError, "every, end: expected ints, got 100 and 1.5"),
        (
            lambda m, o: dynamic.gmp(m, None, 0.1, end=5),
            TypeError,
            "optimizer: expected the one that trains the layers",
        ),
        (lambda m, o: dynamic.gmp(m, 3, 0.1, end=5), TypeError, "optimizer: expected torch.optim.Optimizers, got int"),
        (lambda m, o: dynamic.dsd(m, o, 0.1, 9, 5), ValueError, "expected 0 < sparse_from < dense_from, got 9 and 5"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(make, error, says):
    model = whole_net()
    before = masks_of(model)
    with pytest.raises(error, match=says):
        make(model, sgd(model.parameters()))
    assert all(map(torch.equal, before.values(), masks_of(model).values()))


def test_gradients_of_other_layers_are_not_followed():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 4))
    model = convert(model, prune(model, 0.5))
    optimizer = sgd(model.parameters())
    with pytest.raises(ValueError, match=r"grow: expected linear layers .*the MaskedEmbedding of 0.weight: name it in"):
        dynamic.rigl(model, optimizer, 0.5, end=9, every=1)
    dynamic.rigl(model, optimizer, 0.5, end=9, every=1, ignore=["0.weight"])
    dynamic.gmp(model, optimizer, 0.5, end=9)


def test_an_optimizer_of_another_model_is_refused():
    other = sgd(nn.Linear(2, 2).parameters())
    for wrong in (other, [other]):
        with pytest.raises(ValueError, match="optimizer: expected one of the model, got SGD of other parameters"):
            dynamic.gmp(whole_net(), wrong, 0.5, end=9)


def test_a_state_that_is_none():
    model = whole_net()
    updater = dynamic.gmp(model, sgd(model.parameters()), 0.5, end=9)
    with pytest.raises(
        ValueError, match="state: expected that of a MaskUpdater, got none of generator, late, momentum"
    ):
        updater.load_state_dict({"steps": 4, "watched": None})
    for name, wrong in {"generator": "x", "steps": 1.5, "late": None, "watched": 3, "momentum": [1]}.items():
        with pytest.raises(ValueError, match="state: expected that of a MaskUpdater, got another"):
            updater.load_state_dict({**updater.state_dict(), "steps": 77, name: wrong})
    with pytest.raises(ValueError, match="state: expected that of a MaskUpdater, got NoneType"):
        updater.load_state_dict(None)
    assert updater.steps == 0


def test_scores_that_are_never_finite_are_told_of():
    model = whole_net()
    optimizer = sgd(model.parameters())
    never = {"drop": lambda name, layer: torch.full_like(layer.values, math.nan)}
    updater = dynamic.MaskUpdater(model, optimizer, dynamic.linear(0.5, end=1), every=1, end=1, **never)
    for _ in range(19):
        assert not updater.step()
    with pytest.warns(SparseLotteryWarning, match="masks wait since 20 steps: scores of weights"):
        updater.step()
    assert not updater.step()
