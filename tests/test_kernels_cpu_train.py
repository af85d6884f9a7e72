"""Native training steps against autograd and torch.optim, on dense weights in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from chains import assert_close
from torch import Tensor

from sparselottery import Pattern
from sparselottery.kernels import cpu_train, native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())
LEVELS = native.LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("base",))
RULES = {"adam": (0.9, 0.999, 1e-8, 1e-2), "sgd": (0.9, 1e-2)}


@dataclass(frozen=True)
class Problem:
    """Weights and biases of a masked net, and batches of images to train it on."""

    masks: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor | None]
    images: Tensor
    labels: Tensor
    order: Tensor

    def layers(self, dtype=torch.float32) -> list[cpu_train.Layer]:
        layers = []
        for mask, weight, bias in zip(self.masks, self.weights, self.biases, strict=True):
            p = Pattern.from_mask(mask)
            parameters = p.gather(weight).to(dtype), None if bias is None else bias.to(dtype, copy=True)
            layers.append(cpu_train.Layer(mask.shape[1], p.crow_indices, p.col_indices, *parameters))
        return layers


def make(batch: int, widths: list[int], density: float = 0.3, bias: bool = True, steps: int = 5) -> Problem:
    masks = [torch.rand(o, i) < density for i, o in pairwise(widths)]
    return of_masks(batch, masks, bias, steps)


def of_masks(batch: int, masks: list[Tensor], bias: bool = True, steps: int = 5) -> Problem:
    weights = [torch.randn(mask.shape) * mask / 2 for mask in masks]
    biases = [torch.randn(len(mask)) / 10 if bias else None for mask in masks]
    images = torch.randn(batch + 50, masks[0].shape[1])
    order = torch.stack([torch.randperm(len(images))[:batch] for _ in range(steps)])
    return Problem(masks, weights, biases, images, torch.randint(len(masks[-1]), (len(images),)), order)


def rates(problem: Problem) -> list[float]:
    return [0.01 * (step + 1) for step in range(len(problem.order))]


def trainer(layers: list[cpu_train.Layer], rule: str = "adam", constants: tuple | None = None) -> cpu_train.Trainer:
    return cpu_train.Trainer(layers, rule, RULES[rule] if constants is None else constants)


def ours(problem: Problem, rule: str = "adam", dtype=torch.float32, constants: tuple | None = None) -> list[Tensor]:
    """Values and biases after all steps."""
    layers = problem.layers(dtype)
    trainer(layers, rule, constants)(problem.images.to(dtype), problem.labels, problem.order, rates(problem))
    return [layer.values for layer in layers] + [layer.bias for layer in layers if layer.bias is not None]


def theirs(problem: Problem, rule: str = "adam", dtype=torch.float32, constants: tuple | None = None) -> list[Tensor]:
    """The same by autograd on w * mask."""
    *which, weight_decay = RULES[rule] if constants is None else constants
    weights = [weight.to(dtype, copy=True).requires_grad_() for weight in problem.weights]
    biases = [None if bias is None else bias.to(dtype, copy=True).requires_grad_() for bias in problem.biases]
    parameters = [p for p in (*weights, *biases) if p is not None]
    if rule == "adam":
        optimizer = torch.optim.Adam(parameters, betas=which[:2], eps=which[2], weight_decay=weight_decay, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, momentum=which[0], weight_decay=weight_decay, fused=True)
    for index, rate in zip(problem.order, rates(problem), strict=True):
        h = problem.images[index].to(dtype)
        for layer, (weight, bias, mask) in enumerate(zip(weights, biases, problem.masks, strict=True)):
            h = F.linear(torch.relu(h) if layer else h, weight * mask, bias)
        optimizer.zero_grad()
        F.cross_entropy(h, problem.labels[index]).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    survivors = [weight.detach()[mask] for weight, mask in zip(weights, problem.masks, strict=True)]
    return survivors + [bias.detach() for bias in biases if bias is not None]


def assert_trains(problem: Problem, rule: str = "adam", constants: tuple | None = None) -> None:
    """fp64 is torch's; fp32 is as far from it as twice what torch's is, and a few roundings."""
    truth = theirs(problem, rule, torch.float64, constants)
    torch.testing.assert_close(ours(problem, rule, torch.float64, constants), truth, rtol=1e-9, atol=1e-11)
    found, torchs = ours(problem, rule, constants=constants), theirs(problem, rule, constants=constants)
    for mine, their, true in zip(found, torchs, truth, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, their, true)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [1, 15, 16, 17, 60, 129, 300])
def test_batch_sizes(batch, rule):
    assert_trains(make(batch, [50, 33, 20, 7]), rule)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [[9, 4], [1, 1], [100, 40, 1], [5, 300, 17, 64, 3], [200, 8, 130, 101]])
def test_widths(widths, bias):
    assert_trains(make(20, widths, bias=bias))


@pytest.mark.parametrize("density", [0.0, 0.01, 0.7, 1.0])
def test_densities(density):
    assert_trains(make(33, [120, 70, 9], density))


def test_rows_and_columns_without_weights():
    first, second = torch.rand(40, 30) < 0.3, torch.rand(6, 40) < 0.3
    first[[0, 7, 39]], first[:, [0, 11, 29]], second[[0, 5]], second[:, 20:30] = False, False, False, False
    assert_trains(of_masks(17, [first, second]))


@pytest.mark.parametrize("rule", RULES)
def test_without_momentum_or_weight_decay(rule):
    assert_trains(make(20, [30, 20, 5]), rule, {"adam": (0.0, 0.9, 1e-8, 0.0), "sgd": (0.0, 0.0)}[rule])


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level, monkeypatch):
    paths = sorted(native.Path(native.__file__).parent.glob(f"_native_{level}.*"))
    if not paths:
        pytest.skip(f"{level} was not built")
    monkeypatch.setattr(native, "LIBRARY", native.load(paths[0]))
    assert_trains(make(60, [90, 35, 10]))
    assert_trains(make(150, [30, 20, 10]), "sgd")


@pytest.mark.parametrize("batch", [1, 60, 300])
def test_threads_change_no_bit(batch):
    problem, results = make(batch, [150, 230, 33, 10]), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ours(problem))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_team_and_one_thread_are_timed_and_give_the_same_bits():
    torch.set_num_threads(2)
    problem, results = make(60, [150, 33, 10], steps=40), []
    for known in ([0.0, 0.0, 0.0], [6.0, 1.0, 2.0], [6.0, 2.0, 1.0]):  # nothing, that the team is faster, that one is
        layers = problem.layers()
        training = trainer(layers)
        training._pace.copy_(torch.tensor(known))
        training(problem.images, problem.labels, problem.order, rates(problem))
        results.append([tensor for layer in layers for tensor in (layer.values, layer.bias)])
        assert training._pace[0] == known[0] + 10  # four steps a time
        assert (training._pace[1:] > 0).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("batch", [17, 60])
def test_threads_change_no_bit_of_blocks(batch):
    """Strips depend on the threads, and rows that are multiplied four at a time are of one strip."""
    masks = [(torch.rand(38, 100) < 0.3).repeat_interleave(4, 0)[:150], torch.rand(10, 150) < 0.3]
    problem, results = of_masks(batch, masks, True, 3), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(ours(problem))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_calls_change_no_bit(rule):
    problem = make(20, [60, 30, 10], steps=9)
    layers = problem.layers()
    train = trainer(layers, rule)
    for steps in (slice(0, 1), slice(1, 1), slice(1, 6), slice(6, 9)):
        train(problem.images, problem.labels, problem.order[steps], rates(problem)[steps])
    found = [layer.values for layer in layers] + [layer.bias for layer in layers]
    assert all(torch.equal(a, b) for a, b in zip(found, ours(problem, rule), strict=True))


def test_large_logits():
    """Of which the exponentials overflow, unless the largest is subtracted, and underflow."""
    problem = make(40, [30, 20, 8])
    problem.images.mul_(1000)
    assert_trains(problem, "sgd")


def test_what_an_earlier_training_left_is_not_read():
    wild = make(300, [150, 230, 64], density=1)
    wild.images.fill_(math.nan)
    assert all(value.isnan().all() for value in ours(wild))
    assert_trains(make(17, [50, 33, 7]))


def test_what_is_not_finite_spreads_as_in_torch():
    problem = make(20, [30, 20, 5], density=1, steps=1)  # what is pruned multiplies nothing, where 0 * inf is NaN
    problem.images[problem.order[0, 3], 2] = math.inf
    for mine, their in zip(ours(problem, "sgd"), theirs(problem, "sgd"), strict=True):
        assert torch.equal(mine.isfinite(), their.isfinite())
        assert not their.isfinite().all()


def test_images_that_are_not_contiguous_and_unordered_steps():
    problem = make(20, [30, 20, 5])
    layers = problem.layers()
    spaced = torch.stack([problem.images, problem.images * math.nan], 2)[:, :, 0]
    order = problem.order.t().contiguous().t()
    trainer(layers)(spaced, problem.labels, order, rates(problem))
    assert all(torch.equal(layer.values, v) for layer, v in zip(layers, ours(problem), strict=False))


WRONG = {
    "an image too many": {"order": lambda p: p.order + 50},
    "an image before the first": {"order": lambda p: p.order - 70},
    "int32 order": {"order": lambda p: p.order.int()},
    "one step's order": {"order": lambda p: p.order[0]},
    "a class too many": {"labels": lambda p: p.labels + 1},
    "a negative class": {"labels": lambda p: p.labels - 1},
    "float labels": {"labels": lambda p: p.labels.float()},
    "a label too few": {"labels": lambda p: p.labels[1:]},
    "other features": {"images": lambda p: p.images[:, 1:]},
    "double images": {"images": lambda p: p.images.double()},
    "a rate too few": {"rates": lambda p: rates(p)[1:]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    problem = make(20, [30, 5])
    problem.labels[:2] = torch.tensor([0, 4])
    problem.order[0, :2] = torch.tensor([0, 69])
    arguments = {"images": problem.images, "labels": problem.labels, "order": problem.order, "rates": rates(problem)}
    arguments |= {key: change(problem) for key, change in WRONG[name].items()}
    layers = problem.layers()
    with pytest.raises(ValueError, match="expected"):
        trainer(layers)(**arguments)
    assert torch.equal(layers[0].values, problem.layers()[0].values)


def test_supported_dtypes():
    assert cpu_train.supports(torch.float32)
    assert cpu_train.supports(torch.float64)
    assert not cpu_train.supports(torch.bfloat16)
