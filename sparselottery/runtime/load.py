"""load_sparse: from a file to a frozen model, without a dense weight on the way."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..architecture import build
from ..calls import ExampleInput, arguments
from ..contents import Contents
from ..copying import copied
from ..files import read, refusals_name
from ..kernels import native
from ..nn import MaskedLayer, OpenedModule, as_module, keep_from_fast_path, opened_type_of
from ..survey import Survey, survey
from .layer import FrozenLayer, runs_native
from .sequential import FrozenSequential
from .tuning import choose_dense

# Densities from which on a layer is dense unless an example says otherwise. Convolutions stay faster for longer, as the
# ReLU and the pooling that follow are part of their call: at 0.55 mostly 1.1 to 2 times on Zen 4, but held to AVX2 one
# image of a 3x3 or 5x5 convolution 0.75 to 0.94 times (November 2026; no rows were kept).
DENSE_ABOVE, DENSE_CONV_ABOVE = 0.5, 0.7


class _Bound(tuple):
    """A whole net as one native call, for inputs like the last. torch.export goes through a module's plain tuples, and
    facts hold the module's own table."""


class SparseModel(nn.Module):
    """A frozen model: evaluation only, without gradients; several threads may call it at once.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4)).eval()
        >>> report = export(convert(model, prune(model, 0.5)), "net.safetensors", format="safetensors")
        >>> net = load_sparse("net.safetensors")
        >>> isinstance(net, SparseModel), net.training
        (True, False)

    It computes in the dtypes of its file. `net` is the module tree, under the names of the file; its tensors are not to
    be changed, as kernels have packed them. torch.fx and torch.export, which read signatures, take `net`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.eval()
        self._bound: _Bound | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As forward, with the hooks; where the whole net is one native call, without the microseconds of nn.Module."""
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling():
            y = native.call(args[0], self._bound)
            if y is None and (bound := self._bind(args[0])):
                self._bound = bound
                y = native.call(args[0], bound)
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    def _bind(self, x: Any) -> _Bound | None:
        """The one native call that an input like x takes, with nobody observing it."""
        observed = self._forward_pre_hooks or self._forward_hooks
        if observed or not isinstance(self.net, FrozenSequential) or not (runs_native(x) and x.is_contiguous()):
            return None
        grouped = self.net.grouped()
        bound = grouped.whole and grouped.whole.bound(x)
        if bound is None:
            return None
        own = [(each, None, 0) for each in (self._forward_pre_hooks, self._forward_hooks)]
        own += [(vars(self), "_modules", self._modules), (self._modules, "net", self.net)]
        return _Bound(((*own, *grouped.facts, *bound[0]), *bound[1:]))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bound": None}  # which holds addresses

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the dense model in evaluation mode."""
        if isinstance(args, fx.Proxy):
            raise TypeError(
                "torch.fx: expected a model whose forward has a signature, got a SparseModel: trace its `net`"
            )
        with nullcontext() if ops.in_torch(None) else torch.no_grad():
            return self.net(*args, **kwargs)

    def train(self, mode: bool = True) -> SparseModel:
        """Raises ValueError for training mode."""
        if mode:
            raise ValueError("mode: expected evaluation, got training: the model is frozen")
        return super().train(False)

    def __prepare_scriptable__(self) -> None:
        raise TypeError(
            "torch.jit.script: expected a dense model, got a frozen sparse one: use torch.jit.trace or torch.export"
        )


def load_sparse(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    example_input: ExampleInput | None = None,
) -> SparseModel:
    """The model of a ticket or export in safetensors, frozen for inference on a device.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4)).eval()
        >>> report = export(convert(model, prune(model, 0.5)), "net.safetensors", format="safetensors")
        >>> net = load_sparse("net.safetensors")
        >>> net(torch.zeros(1, 8)).shape
        torch.Size([1, 4])

    model: for a file that knows no architecture, a model of it. It is left as it is. The copy that is used takes
    evaluation mode, the file's tensors, and the model's own values only of buffers that no file holds (those that are
    not persistent); otherwise the model may be on the meta device. Wherever the model refers to a layer, in a list
    or by a bound method too, the copy refers to the frozen one; what cannot follow is refused (`copying.copied`).
    example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments, like those to come: layers
    that are faster dense on it run so. Without it those of a density above 0.5 do, 2-D convolutions above 0.7.
    No weight of a sparse layer is ever made dense. Kernels pack what they need at their first call, for its sizes.
    Raises OSError if the file cannot be read, ValueError naming it if it is foreign, truncated, altered or not well
    formed, knows no architecture and no model is given, the model's names or shapes are not the file's, or it has
    a buffer that is neither in the file nor has values.
    """
    if model is not None:
        as_module(model)
    contents = read(path)
    with refusals_name(Path(path)):
        if model is None and contents.architecture is None:
            raise ValueError("expected a model beside it, as the file does not know its architecture")
        net = _filled(build(contents.architecture) if model is None else model, contents).to(device)
    _prepare(net)
    if example_input is not None:
        net = choose_dense(net.requires_grad_(False), arguments(example_input))
    return SparseModel(net)


def _filled(model: nn.Module, contents: Contents) -> nn.Module:
    """A copy with the contents of a file: its masked layers frozen, or dense where little is pruned.

    No weight of the model is copied; buffers that no file holds are.
    """
    if any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError("model: expected a dense one, got one with masked layers")
    state = {name: each for name, each in model.state_dict(keep_vars=True).items() if isinstance(each, Tensor)}
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = contents.shapes | {name: tuple(tensor.shape) for name, tensor in contents.dense.items()}
    found |= {name: contents.shapes[first] for name, first in contents.tied.items()}
    if expected != found:
        differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ValueError(
            f"model: expected the file's names and shapes, got {differ[0]!r}: "
            f"{expected.get(differ[0])} in the model, {found.get(differ[0])} in the file"
        )
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    given = {name: tensor for name, tensor in contents.dense.items() if id(state[name]) in registered}
    tensors = {id(state[name]): _like(state[name], tensor) for name, tensor in given.items()}
    weights = survey(model)
    layers, opened, made = _frozen_layers(weights, contents)
    for name in contents.shapes.keys() | contents.tied.keys():
        if name in weights.maskable:
            old = weights.maskable[name].parameter
            tensors[id(old)] = _like(old, old.detach().to("meta"))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in tensors and (tensor.is_meta or isinstance(tensor, nn.Parameter)):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise ValueError(f"model: expected one whose tensors are all in the file, or buffers with values, got the "
                             f"{kind} {name!r}, which is not, on {tensor.device}")  # fmt: skip
    for dense, module in opened.items():
        memo = tensors | {id(each): each for each in module.children() if id(each) in made}
        layers[dense] = copy.deepcopy(module, memo)
    net = copied(model, layers, tensors)
    if rest := {name: tensor for name, tensor in contents.dense.items() if name not in given}:
        net.load_state_dict(rest, strict=False, assign=True)
    return net.eval()


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _frozen_layers(
    found: Survey, contents: Contents
) -> tuple[dict[nn.Module, nn.Module], dict[nn.Module, OpenedModule], set[int]]:
    """What takes the place of each layer that the file holds masked, and of the modules that are opened for one; the
    ids of the layers that were made."""
    layers: dict[nn.Module, nn.Module] = {}
    opened: dict[nn.Module, OpenedModule] = {}
    made: set[int] = set()
    others = {name: first for name, first in contents.tied.items() if name in found.maskable}  # not tied in the model
    for name in (*contents.layers, *others):
        if name not in found.maskable:
            why = found.refused.get(name, "no layer holds such a weight")
            raise ValueError(f"{name}: expected a layer that can be masked, got none: {why}")
        pattern, values = contents.layers[others.get(name, name)]
        for use in found.maskable[name].uses:
            bias = contents.dense.get(use.bias)
            frozen = FrozenLayer(use.layer, pattern, values, bias)
            most = DENSE_ABOVE if frozen.geometry is None else DENSE_CONV_ABOVE
            frozen = frozen.to_dense() if pattern.density > most else frozen
            if use.parent is None:
                layers[use.layer] = frozen
            else:
                if use.parent not in opened:
                    opened[use.parent] = opened_type_of(use.parent).of(use.parent)
                opened[use.parent]._modules[use.child] = frozen
                made.add(id(frozen))
    return layers, opened, made


def _prepare(net: nn.Module) -> None:
    """Sequentials with frozen layers become frozen ones, and encoders of torch call them."""
    for module in net.modules():
        if type(module) is nn.Sequential and any(isinstance(m, FrozenLayer) for m in module.modules()):
            module.__class__ = FrozenSequential
    keep_from_fast_path(net)
