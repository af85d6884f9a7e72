"""Training steps as candidates: forward, cross-entropy, backward, fused Adam."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.timing import Candidate
from sparselottery.lab.training import stepper

LEARNING_RATE = 1e-6  # the nets hardly move, so that loss and gradients stay alike (and normal numbers) for all steps


def step(model: nn.Module, x: Tensor, labels: Tensor, masks: dict[str, Tensor]) -> Candidate:
    """A step of `model`, which leaves its `gradients`."""
    return Candidate(partial(stepper(model, LEARNING_RATE), x, labels), partial(gradients, model, masks))


def gradients(model: nn.Module, masks: dict[str, Tensor]) -> list[Tensor]:
    """The gradients of all parameters in order, the dense ones at the mask."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return [grad[masks[name]] if name in masks else grad for name, grad in grads.items()]


def true_gradients(dense: nn.Module, x: Tensor, labels: Tensor, masks: dict[str, Tensor]) -> list[Tensor]:
    """The `gradients` in fp64, of the net with zeros where pruned."""
    truth = deepcopy(dense).double()
    F.cross_entropy(truth(x.double()), labels).backward()
    return gradients(truth, masks)
