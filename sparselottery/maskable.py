"""Which layers can be masked, and why others cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .nn import MaskedConv2d, MaskedLayer, MaskedLinear

MASKED: dict[type[nn.Module], type[MaskedLayer]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
PARTS = ("weight", "bias")
PARAMETRIZED = (
    "parametrized: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') makes it an ordinary layer"
)
TORCH_PRUNED = (
    "pruned by torch.nn.utils.prune: keep its weight_mask, as bool, then torch.nn.utils.prune.remove(layer, 'weight') "
    "makes it an ordinary layer"
)


def unmaskable(model: nn.Module) -> dict[str, str]:
    """Why not, by module name: every module that has parameters of its own, or should have, but cannot be masked."""
    names = defaultdict(list)
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(name, recurse=False):
            names[parameter].append(part)
    reasons = {name: _why_not(name, module, names) for name, module in model.named_modules()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _class_name(module: nn.Module) -> str:
    """As users write it: "nn.Conv1d"."""
    name = type(module).__name__
    return f"nn.{name}" if getattr(nn, name, None) is type(module) else name


def _why_not(name: str, module: nn.Module, names: Mapping[Tensor, list[str]]) -> str | None:
    """Why a module cannot be masked; None if it can be, or has no parameters. names: of each parameter of the model."""
    own = dict(module.named_parameters(name, recurse=False))
    if isinstance(module, parametrize.ParametrizationList):
        return PARAMETRIZED
    kind = next((kind for kind in (*MASKED, MaskedLayer) if isinstance(module, kind)), None)
    if kind is None:
        return f"{_class_name(module)} is neither nn.Linear nor nn.Conv2d" if own else None
    if parametrize.is_parametrized(module):
        return PARAMETRIZED
    if any(f"{part}_orig" in module._parameters and f"{part}_mask" in module._buffers for part in PARTS):
        return TORCH_PRUNED
    if shared := next((part for part, parameter in own.items() if len(names[parameter]) > 1), None):
        other = next(other for other in names[own[shared]] if other != shared)
        return f"{shared} is also {other}, and masking it would untie them"
    if kind is MaskedLayer:
        return None
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads its weight and never calls it"
    if type(module) is not kind:
        return f"a subclass of nn.{kind.__name__}: its forward may do something else"
    if "forward" in vars(module):
        return "its forward was replaced"
    if more := [part for part in (*module._parameters, *module._buffers, *module._modules) if part not in PARTS]:
        return f"it holds more than a weight and a bias: {', '.join(more)}"
    return None
