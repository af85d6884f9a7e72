"""Which trainings run as whole native steps: those of masked linear layers with a ReLU between them, on the CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ..kernels import cpu_train
from ..nn import NATIVE, MaskedLinear, MaskedSequential

ADAM = 0.9, 0.999, 1e-8  # beta1, beta2, eps: torch's defaults
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def native_trainer(
    model: nn.Module, x: Tensor, optimizer: str = "adam", weight_decay: float = 0.0, momentum: float = 0.9
) -> cpu_train.Trainer | None:
    """What trains ``model`` in place on images like ``x`` (any, I) in place of autograd; None where it cannot.

    It can if the model is a MaskedSequential of MaskedLinear, ReLU, ..., MaskedLinear, all parameters are trained, and
    there are neither hooks nor executions set to a dense one. ``optimizer``, "adam" or "sgd", is a new one.
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
    return cpu_train.Trainer([_raw(layer) for layer in layers], optimizer, constants[optimizer])


def _layers(model: nn.Module) -> list[MaskedLinear]:
    """Of a model that is a chain of masked linear layers and nothing else; [] for another."""
    children = list(model._modules.values())
    layers, between = children[::2], children[1::2]
    fits = (
        type(model) is MaskedSequential
        and not nn.modules.module._has_any_global_hook()
        and not any(getattr(module, hooks) for module in (model, *children) for hooks in HOOKS)
        and len(children) % 2
        and all(type(layer) is MaskedLinear for layer in layers)
        and all(type(relu) is nn.ReLU for relu in between)
        and len(set(layers)) == len(layers)
        and all(a.out_features == b.in_features for a, b in pairwise(layers))
        and all(all(layer.shape) and (layer.execution in NATIVE or layer.density == 1) for layer in layers)
    )
    return layers if fits else []


def _is_trained(parameter: nn.Parameter) -> bool:
    """On the CPU, by a gradient that nobody looks at."""
    hooked = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    return parameter.requires_grad and parameter.is_cpu and parameter.is_contiguous() and not hooked


def _raw(layer: MaskedLinear) -> cpu_train.Layer:
    bias = None if layer.bias is None else layer.bias.detach()
    indices = layer.crow_indices.contiguous(), layer.col_indices.contiguous()
    return cpu_train.Layer(layer.in_features, *indices, layer.values.detach(), bias)
