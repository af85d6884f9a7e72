"""Which layers of a model have units in common: an output of one is an input of others, and nothing else reads it.

Units may then change places without a trace: what permutes the outputs of all that write them, and the inputs of all
that read them, computes the same.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .copying import attributes, copied
from .nn import MaskedConv2d, MaskedLayer, MaskedLinear, MaskedSequential, OpenedModule
from .nn.fuse import ELEMENTWISE, NOTHING, is_observed
from .random_state import random_state_kept, random_states

LINEAR, CONV = (nn.Linear, MaskedLinear), (nn.Conv2d, MaskedConv2d)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# What treats units alike, or has parameters of each: of a linear layer's outputs, of images, of flattened images.
BETWEEN = {
    "features": {*ELEMENTWISE, *NOTHING, nn.BatchNorm1d},
    "images": {*ELEMENTWISE, *NOTHING, *POOLS, nn.BatchNorm2d},
    "flat": {*ELEMENTWISE, *NOTHING, nn.BatchNorm1d},
}
# Flattened images come from each unit's pixels: only where it has one are they as many as the units.
TAKES = {"features": LINEAR, "images": CONV, "flat": LINEAR}
# The same as functions, and as methods by name.
ALIKE = {
    torch.relu, torch.tanh, torch.sigmoid, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.hardswish,
    F.hardtanh, F.tanh, F.sigmoid, F.dropout, F.dropout2d, "relu", "relu_", "tanh", "sigmoid", "contiguous", "clone",
}  # fmt: skip
ALIKE_IMAGES = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
JOINING = {
    operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.sub, torch.mul, "add", "add_", "mul",
}  # fmt: skip
FLATTENING = {torch.flatten, "flatten"}
CHAINS = (nn.Sequential, MaskedSequential)


class Link(NamedTuple):
    """Weights by name whose layers write and read the same units, and the names of the modules between them.

    ("fc1.weight",), ("fc2.weight",), ("relu",) in a chain; several of each where branches are added.
    """

    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    between: tuple[str, ...]


def links(model: nn.Module) -> list[Link]:
    """Those that torch.fx finds in the model's forward, or, where it cannot trace that, in those of its children.

    A forward is traced in training and in evaluation mode, on copies without data, and the links of both count. A
    module is presumed to be called as a whole, on batches, with its arguments' defaults, and not to ask what kind of
    object a tensor is. No layer that is used twice is in any link, and none whose call somebody observes, by a hook or
    a forward of its own, nor is such a module between two. A norm after a linear layer is of its units only if these
    are dimension 1, which depends on the input.
    """
    uses = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    uses.update(each for module in model.modules() for each in _tensors(module))
    found, waiting = [], [("", model)]
    while waiting:
        path, module = waiting.pop(0)
        try:
            one, other = (_links_in(module, path, uses, training) for training in (False, True))
        except Exception:  # whatever a user's code does with what stands for a tensor
            waiting += [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        else:
            found += [link for link in one if link in other]
    return found


def _links_in(module: nn.Module, path: str, uses: Counter, training: bool) -> list[Link]:
    tracer = _Tracer()
    return _Walk(module, path, uses, tracer.observed).links(tracer.graph_of(module, training))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [each for each in (*module._parameters.values(), *module._buffers.values()) if each is not None]


class _Tracer(fx.Tracer):
    """Goes through modules of the user's own and through chains. observed: nodes that hooks of such a module see."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.observed: set[fx.Node] = set()

    def graph_of(self, module: nn.Module, training: bool) -> fx.Graph:
        """Raises whatever the module does, and TypeError for one of which a graph does not show all."""
        if not any(module.children()) or "forward" in vars(module):
            raise TypeError("expected a module whose class calls its children")
        import torch._dynamo  # noqa: F401  # tensors on meta import it, which must not see the math that tracing patches

        tensors = {id(each): nn.Parameter(each.detach().to("meta"), False) for each in module.parameters()}
        tensors |= {id(each): each.to("meta") for each in module.buffers()}
        with random_state_kept():
            root = copied(module, {}, tensors).train(training)
            if type(root) in CHAINS:
                root = nn.Sequential(OrderedDict(root._modules))
            given, drawn = inspect.signature(root.forward).parameters.values(), random_states()
            graph = self.trace(root, {each.name: each.default for each in given if each.default is not each.empty})
            if random_states() != drawn:
                raise TypeError("expected a forward that does the same each time")
        if any(isinstance(each, fx.Proxy) for part in root.modules() for _, each in attributes(part)):
            raise TypeError("expected a forward that keeps no tensors")
        made = [getattr(root, name) for name in vars(root) if name.startswith("_tensor_constant")]
        if any(each.is_meta for each in made):
            raise TypeError("expected a forward that computes nothing of parameters alone")  # whose, nobody knows
        return graph

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        own = not isinstance(module, (MaskedLayer, OpenedModule)) and not type(module).__module__.startswith("torch.nn")
        return not any(module.children()) or not (own or type(module) in CHAINS)

    def call_module(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        chain = type(module) in CHAINS and len(args) == 1 and not kwargs and not is_observed(module)
        if not chain:
            found = super().call_module(module, forward, args, kwargs)
        else:
            (found,) = args
            for child in module:
                found = child(found)
        if is_observed(module):
            fx.node.map_aggregate((args, kwargs, found), self._observe)
        return found

    def _observe(self, value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            self.observed.add(value.node)
        return value


class _Units:
    """Of one or more tensors: who writes and reads them. fixed: somebody does who cannot follow a permutation."""

    def __init__(self, size: int, outputs: list[str], fixed: bool) -> None:
        self.size, self.outputs, self.fixed = size, outputs, fixed
        self.inputs: list[str] = []
        self.between: list[str] = []

    def take(self, other: _Units) -> None:
        self.fixed |= other.fixed
        for mine, theirs in zip(self._names(), other._names(), strict=True):
            mine += theirs

    def _names(self) -> tuple[list[str], ...]:
        return self.outputs, self.inputs, self.between


class _Walk:
    """Through a graph, in order. at: of each node the units along one of its dimensions, and its form (`BETWEEN`)."""

    def __init__(self, module: nn.Module, path: str, uses: Counter, observed: set[fx.Node]) -> None:
        self.module, self.path, self.uses, self.observed = module, path, uses, observed
        self.at: dict[fx.Node, tuple[_Units, str]] = {}

    def links(self, graph: fx.Graph) -> list[Link]:
        calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        self.calls = {name: 2 if name in read else count for name, count in calls.items()}
        for node in graph.nodes:
            if (found := self._visited(node)) is not None:
                self.at[node] = found
            else:
                for each in node.all_input_nodes:
                    self._fix(each)
            if node in self.observed:
                self._fix(node)
        units = {id(each): each for each, _ in self.at.values()}.values()
        return [Link(*map(tuple, each._names())) for each in units if each.inputs and not each.fixed]

    def _fix(self, node: fx.Node) -> None:
        if node in self.at:
            self.at[node][0].fixed = True

    def _visited(self, node: fx.Node) -> tuple[_Units, str] | None:
        """The units of a node, if it is one that treats those of its inputs alike, or writes its own."""
        if node.op == "call_module":
            return self._module(node)
        before = [self.at.get(each) for each in node.all_input_nodes]
        if not before or None in before or node.op not in ("call_function", "call_method"):
            return None
        (units, form), what = before[0], node.target
        if len(before) == 2 and what in JOINING and before[1][1] == form and before[1][0].size == units.size:
            return self._joined(units, before[1][0]), form
        if len(before) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        if what in FLATTENING and form == "images" and node.args[1:] in ((1,), (1, -1)) and not node.kwargs:
            return units, "flat"
        same = what in ALIKE or what in JOINING or (what in ALIKE_IMAGES and form == "images")
        return before[0] if same else None

    def _joined(self, units: _Units, others: _Units) -> _Units:
        if units is not others:
            units.take(others)
            self.at = {node: (units if its is others else its, form) for node, (its, form) in self.at.items()}
        return units

    def _module(self, node: fx.Node) -> tuple[_Units, str] | None:
        child, name = self.module.get_submodule(node.target), f"{self.path}.{node.target}".lstrip(".")
        once = self.calls[node.target] == 1 and all(self.uses[each] == 1 for each in (child, *_tensors(child)))
        alone = len(node.args) == 1 and not node.kwargs and not is_observed(child)
        units, form = self.at.get(node.args[0], (None, "")) if alone else (None, "")
        if type(child) in LINEAR + CONV and getattr(child, "groups", 1) == 1:
            outputs, inputs = _sizes(child)
            if once and units and type(child) in TAKES[form] and units.size == inputs:
                units.inputs.append(f"{name}.weight")
            else:
                for each in node.all_input_nodes:
                    self._fix(each)
            return _Units(outputs, [f"{name}.weight"], not (once and alone)), _form(child)
        if form == "images" and _flattens(child):
            units.between.append(name)
            return units, "flat"
        if units and type(child) in BETWEEN[form] and (once or not child.state_dict()):
            units.between.append(name)
            return units, form
        return None


def _flattens(child: nn.Module) -> bool:
    return type(child) is nn.Flatten and (child.start_dim, child.end_dim) == (1, -1)


def _form(layer: nn.Module) -> str:
    return "images" if isinstance(layer, CONV) else "features"


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """How many outputs and inputs."""
    if isinstance(layer, CONV):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features
