"""One walk through a model: each weight, the layer that holds it, and whether that can be masked."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .nn import MaskedLayer, OpenedModule, as_module, masked_type_of, name_of, opened_type_of
from .nn.carried import own_buffers
from .weight_decay import SparseLotteryWarning

NOTABLE = 0.1  # share of a model's weights that cannot be pruned, above which nothing is said in silence
PARTS = ("weight", "bias")
RECURRENT = "multiplies its weights itself, all steps in one call, which masked layers in a loop of Python do not reach"
PARAMETRIZED = (
    "parametrized: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') makes it an ordinary layer"
)
TORCH_PRUNED = (
    "pruned by torch.nn.utils.prune: keep its weight_mask, as bool, then torch.nn.utils.prune.remove(layer, 'weight') "
    "makes it an ordinary layer"
)
_TOLD: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, eq=False)
class Use:
    """A place where a weight is used.

    name: of the parameter in the dense model. layer: that holds it; bias: the name of the bias that this may have.
    parent: the dense module that is opened first, if the layer comes of that: then its child of this name.
    """

    name: str
    layer: nn.Module
    parent: nn.Module | None = None
    child: str = ""
    bias: str = ""


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of two dimensions or more.

    name: in the dense model. shape: there. parameter: the tensor that holds it, of a masked layer its values.
    masked_type: what can hold it; None where why says why nothing can. uses: where it is, the first being that of its
    name; the others are tied to it.
    """

    name: str
    shape: tuple[int, ...]
    parameter: Tensor
    masked_type: type[MaskedLayer] | None
    why: str | None
    uses: tuple[Use, ...]

    @property
    def layer(self) -> nn.Module:
        return self.uses[0].layer

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Survey:
    """The weights of a model, in module order."""

    weights: tuple[Weight, ...]

    @cached_property
    def maskable(self) -> dict[str, Weight]:
        """Those that are masked or can be, by name."""
        return {weight.name: weight for weight in self.weights if weight.why is None}

    @cached_property
    def refused(self) -> dict[str, str]:
        """Why the others cannot be, by name, also of each place where a tied one is used."""
        return {use.name: weight.why for weight in self.weights if weight.why is not None for use in weight.uses}

    @cached_property
    def tied(self) -> dict[str, str]:
        """The names by which a weight that can be masked is known too, with that of its mask."""
        return {use.name: weight.name for weight in self.maskable.values() for use in weight.uses[1:]}

    @property
    def share(self) -> float:
        """Of all weights of two dimensions or more, those that can be pruned: 1 if there are none."""
        total = sum(weight.size for weight in self.weights)
        return sum(weight.size for weight in self.maskable.values()) / total if total else 1.0

    def tell(self, model: nn.Module, stacklevel: int) -> None:
        """Warn (`SparseLotteryWarning`), once for a model, if a notable share of it cannot be pruned."""
        if self.share >= 1 - NOTABLE or model in _TOLD:
            return
        _TOLD.add(model)
        sizes: dict[str, int] = defaultdict(int)
        first: dict[str, str] = {}
        for weight in self.weights:
            if weight.why is not None:
                sizes[weight.why] += weight.size
                first.setdefault(weight.why, weight.name)
        total = sum(weight.size for weight in self.weights)
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        reasons = "; ".join(f"{sizes[why] / total:.0%} as {first[why]}: {why}" for why in largest)
        warnings.warn(
            f"{self.share:.0%} of the model's weights can be pruned, the others stay dense: {reasons}. "
            "explain(model) lists all",
            SparseLotteryWarning,
            stacklevel=stacklevel + 1,
        )


def survey(model: nn.Module) -> Survey:
    """The weights of a model, dense or converted; of modules with several names the first counts.

    Raises TypeError if it is no module.
    """
    as_module(model)
    holders: dict[Tensor, list[str]] = defaultdict(list)
    uses: dict[Tensor, list[tuple[Use, type[MaskedLayer] | None, str | None]]] = defaultdict(list)
    for prefix, module, parent, names in _modules(model):
        own = dict(module._parameters)
        for part, parameter in own.items():
            if parameter is None:
                continue
            name = names.get(part, _joined(prefix, part))
            holders[parameter].append(name)
            is_weight = part == ("values" if isinstance(module, MaskedLayer) else "weight")
            if isinstance(module, MaskedLayer) and is_weight:
                name = names.get("weight", _joined(prefix, "weight"))
            elif not is_weight if is_lazy(parameter) else parameter.dim() < 2:
                continue
            masked, reason = _kind(module, part)
            bias = names.get("bias", _joined(prefix, "bias"))
            use = Use(name, module, parent, prefix.rpartition(".")[2], bias)
            uses[parameter].append((use, masked, reason))
    return Survey(tuple(_weight(parameter, found, holders) for parameter, found in uses.items()))


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None, dict[str, str]]]:
    """Each module once: its prefix, itself, the dense module that it was opened from, and the names in the dense model
    of its parameters that are known by others."""
    names: dict[str, dict[str, str]] = defaultdict(dict)
    opened: set[nn.Module] = set()
    for prefix, module in model.named_modules():
        if module in opened:
            continue
        kind, parent = _opens(module), module
        if kind is not None:
            opened.update(module.modules())
            module = kind.of(module)  # in place of the module: it holds the same parameters
        if isinstance(module, OpenedModule):
            for ours, dense in module.dense_names.items():
                layer, _, part = ours.rpartition(".")
                names[_joined(prefix, layer)][part] = _joined(prefix, dense)
        yield prefix, module, None, names[prefix]
        if kind is not None:
            for name, layer in module._modules.items():
                path = _joined(prefix, name)
                yield path, layer, parent, names[path]


def _opens(module: nn.Module) -> type[OpenedModule] | None:
    """What a dense module is opened as; None if it is not."""
    if (kind := opened_type_of(module)) is None:
        return None
    whole = [module, *module.children()]
    altered = any("forward" in vars(each) or parametrize.is_parametrized(each) or _torch_pruned(each) for each in whole)
    return None if altered else kind


def _kind(module: nn.Module, part: str) -> tuple[type[MaskedLayer] | None, str | None]:
    """(what can hold a parameter of the module masked, None), or (None, why nothing can)."""
    if isinstance(module, MaskedLayer) and part == "values":
        return type(module), None
    if isinstance(module, parametrize.ParametrizationList) or parametrize.is_parametrized(module):
        return None, PARAMETRIZED
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return None, "nn.MultiheadAttention reads its weight and never calls it"
    if any(is_lazy(each) for each in module._parameters.values()):
        return None, f"{name_of(type(module))} has no shape before its first call: call the model once first"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None, f"{name_of(type(module))} {RECURRENT}"
    masked, why = masked_type_of(module)
    if masked is None:
        if part != "weight" and why is None:
            why = f"{part} is a parameter of {name_of(type(module))}, and no layer's weight"
        return None, why or f"there is no masked layer for {name_of(type(module))}: register(...) adds one"
    if _torch_pruned(module):
        return None, TORCH_PRUNED
    why = _why_altered(module) or masked.why_not(module)
    return (None, why) if why else (masked, None)


def _torch_pruned(module: nn.Module) -> bool:
    return any(name.endswith("_orig") and f"{name[:-5]}_mask" in module._buffers for name in module._parameters)


def _why_altered(module: nn.Module) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced"
    parts, taken = (*module._parameters, *module._buffers, *module._modules), {*PARTS, *own_buffers(module)}
    if more := [part for part in parts if part not in taken]:
        return f"it holds more than a weight and a bias: {', '.join(more)}"
    return None


def _weight(
    parameter: Tensor,
    found: list[tuple[Use, type[MaskedLayer] | None, str | None]],
    holders: Mapping[Tensor, list[str]],
) -> Weight:
    uses = tuple(use for use, _, _ in found)
    first, (_, masked, why) = uses[0], found[0]
    shape = first.layer.dense_shape if isinstance(first.layer, MaskedLayer) else ()
    shape = shape or (() if is_lazy(parameter) else tuple(parameter.shape))
    others = [other for other in holders[parameter] if other != holders[parameter][0]]
    if others:
        refusal = next((reason for _, _, reason in found if reason is not None), None)
        if refusal or len(found) != len(holders[parameter]):
            why = f"{first.name} is also {others[0]}, and masking it would untie them"
            why += f": {refusal}" if refusal else ""
        elif len({(kind.transposed, isinstance(use.layer, MaskedLayer)) for use, kind, _ in found}) > 1:
            why = f"{first.name} is also {others[0]}, which multiplies it transposed"
    return Weight(first.name, shape, parameter, masked if why is None else None, why, uses)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
