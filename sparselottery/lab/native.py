"""Which trainings run as whole native steps: those of masked linear layers with a ReLU between them, on the CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..kernels import cpu_train
from ..nn import NATIVE, MaskedLinear, MaskedSequential
from ..nn.fuse import Group, Rules, groups, is_observed

ADAM = 0.9, 0.999, 1e-8  # beta1, beta2, eps: torch's defaults
MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}  # torch's names of what both kinds keep


def native_trainer(
    model: nn.Module,
    x: Tensor,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    begun: Optimizer | None = None,
) -> cpu_train.Trainer | None:
    """What trains ``model`` in place on images like ``x`` (any, I) in place of autograd; None where it cannot.

    It can if the model is a MaskedSequential of MaskedLinear, ReLU, ..., MaskedLinear, all parameters are trained, and
    there are neither hooks nor executions set to a dense one. ``optimizer``, "adam" or "sgd", is a new one, or shares
    the state of one that has ``begun``, torch's of that kind: `count_steps` tells it of the steps.
    """
    layers = _layers(model)
    constants = {"adam": (*ADAM, weight_decay), "sgd": (momentum, weight_decay)}
    parameters = [parameter for layer in layers for parameter in (layer.values, layer.bias) if parameter is not None]
    runs = (
        layers
        and optimizer in constants
        and x.is_cpu
        and x.dim() == 2
        and x.shape[1] == layers[0].in_features
        and cpu_train.supports(x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and all(map(_is_trained, parameters))
        and all(parameter.dtype == x.dtype for parameter in parameters)
    )
    if not runs:
        return None
    chain, rule = [_raw(layer) for layer in layers], (optimizer, constants[optimizer])
    if begun is None:
        return cpu_train.Trainer(chain, *rule)
    moments = [_moments(begun, layer.values, optimizer) + _moments(begun, layer.bias, optimizer) for layer in layers]
    return cpu_train.Trainer(chain, *rule, moments, int(begun.state[layers[0].values].get("step", 0)))


def count_steps(optimizer: Optimizer, steps: int) -> None:
    """After native steps that share the state of an optimiser."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] += steps


def _moments(optimizer: Optimizer, parameter: nn.Parameter | None, kind: str) -> list[Tensor | None]:
    """Two, those of a step to come if there was none."""
    if parameter is None:
        return [None, None]
    state = optimizer.state[parameter]
    if kind == "adam" and "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    for name in MOMENTS[kind]:
        if state.get(name) is None:
            state[name] = torch.zeros_like(parameter)
    return [*(state[name] for name in MOMENTS[kind]), None][:2]


def _layers(model: nn.Module) -> list[MaskedLinear]:
    """Of a model that is a chain of masked linear layers and nothing else; [] for another."""
    whole = type(model) is MaskedSequential and not is_observed(model) and not nn.modules.module._has_any_global_hook()
    found = groups(list(model._modules.values()), Rules(_linear)) if whole else []
    if len(found) != 1 or not isinstance(found[0], Group):
        return []
    layers = [step.layer for step in found[0].steps]
    fits = (
        len(set(layers)) == len(layers)
        and all(a.out_features == b.in_features for a, b in pairwise(layers))
        and all(all(layer.shape) for layer in layers)
    )
    return layers if fits else []


def _linear(module: nn.Module) -> MaskedLinear | None:
    """The module, if it is a masked linear layer that is not set to a dense execution."""
    fits = type(module) is MaskedLinear and (module.execution in NATIVE or module.density == 1)
    return module if fits else None


def _is_trained(parameter: nn.Parameter) -> bool:
    """On the CPU, by a gradient that nobody looks at."""
    hooked = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    return parameter.requires_grad and parameter.is_cpu and parameter.is_contiguous() and not hooked


def _raw(layer: MaskedLinear) -> cpu_train.Layer:
    layer.check()
    bias = None if layer.bias is None else layer.bias.detach()
    indices = layer.crow_indices.contiguous(), layer.col_indices.contiguous()
    return cpu_train.Layer(layer.in_features, *indices, layer.values.detach(), bias)
