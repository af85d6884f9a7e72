"""load_sparse: from a file to a frozen model, without a dense weight on the way."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture import build
from ..files import Contents, read, refusals_name
from ..maskable import MASKED, unmaskable
from ..nn import MaskedLayer
from .layer import FrozenLayer
from .sequential import FrozenSequential, Run
from .tuning import choose_dense

DENSE_ABOVE = 0.5  # density from which on a layer is dense unless an example says otherwise


class SparseModel(nn.Module):
    """A frozen model: evaluation only, without gradients; several threads may call it at once.

    It computes in the dtypes of its file. `net` is the module tree, under the names of the file; its tensors are not to
    be changed, as kernels have packed them.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self._whole: Callable[[], Run | None] | None = net.whole if isinstance(net, FrozenSequential) else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As forward, with the hooks; where the whole net is one native call, without the microseconds of nn.Module."""
        if self._whole and len(args) == 1 and not kwargs and self._is_plain(x := args[0]):
            run = self._whole()
            call = run and run.bound(x)
            if call is not None:
                return call(x)
        return super().__call__(*args, **kwargs)

    def _is_plain(self, x: Any) -> bool:
        """Is x what a native call takes, with nobody observing the call?"""
        return (
            type(x) is Tensor
            and x.dtype is torch.float32
            and x.is_cpu
            and x.is_contiguous()
            and not self._forward_pre_hooks
            and not self._forward_hooks
            and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the dense model in evaluation mode."""
        with torch.no_grad():
            return self.net(*args, **kwargs)

    def train(self, mode: bool = True) -> SparseModel:
        """Raises ValueError for training mode."""
        if mode:
            raise ValueError("mode: expected evaluation, got training: the model is frozen")
        return super().train(False)


def load_sparse(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    example_input: Tensor | tuple | None = None,
) -> SparseModel:
    """The model of a ticket or export in safetensors, frozen for inference on a device.

    model: for a file that knows no architecture, a model of it; its weights are not read, and it may be on the meta
    device. It is left as it is; the copy that is used takes evaluation mode.
    example_input: a tensor or a tuple of positional arguments like those to come: layers that are faster dense on it
    run so. Without it those of a density above 0.5 do.
    No weight of a sparse layer is ever made dense. Kernels pack what they need at their first call, for its sizes.
    Raises OSError if the file cannot be read, ValueError naming it if it is foreign, truncated, altered or not well
    formed, knows no architecture and no model is given, or the model's names or shapes are not the file's.
    """
    contents = read(path)
    with refusals_name(Path(path)):
        if model is None and contents.architecture is None:
            raise ValueError("expected a model beside it, as the file does not know its architecture")
        net = build(contents.architecture) if model is None else _empty_copy(model)
        net = _filled(net, contents).to(device)
    _prepare(net)
    if example_input is not None:
        choose_dense(net.requires_grad_(False), example_input if isinstance(example_input, tuple) else (example_input,))
    return SparseModel(net)


def _empty_copy(model: nn.Module) -> nn.Module:
    """A copy on the meta device: no weight is copied."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(isinstance(module, MaskedLayer) for module in model.modules()):
        raise ValueError("model: expected a dense one, got one with masked layers")
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _filled(net: nn.Module, contents: Contents) -> nn.Module:
    """The net with the contents of a file: its masked layers frozen, or dense where little is pruned."""
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = contents.shapes | {name: tuple(tensor.shape) for name, tensor in contents.dense.items()}
    if expected != found:
        differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
        raise ValueError(
            f"model: expected the file's names and shapes, got {differ[0]!r}: "
            f"{expected.get(differ[0])} in the model, {found.get(differ[0])} in the file"
        )
    refused, modules, dense = unmaskable(net), dict(net.named_modules()), dict(contents.dense)
    for name, (pattern, values) in contents.layers.items():
        prefix = name.rpartition(".")[0]
        layer = modules[prefix]
        if type(layer) not in MASKED or prefix in refused:
            raise ValueError(f"{name}: expected a plain nn.Linear or nn.Conv2d, got {type(layer).__name__}")
        bias = dense.pop(f"{prefix}.bias" if prefix else "bias", None)
        frozen = FrozenLayer(layer, pattern, values, bias)
        net = _replaced(net, prefix, frozen.to_dense() if pattern.density > DENSE_ABOVE else frozen)
    given = {name: tensor for name, tensor in net.state_dict().items() if not tensor.is_meta}
    net.load_state_dict(given | dense, assign=True)
    if missing := [name for name, t in (*net.named_parameters(), *net.named_buffers()) if t.is_meta]:
        raise ValueError(f"model: expected one whose tensors are all in the file, got {missing[0]!r}, which is not")
    return net.eval()


def _replaced(net: nn.Module, prefix: str, layer: nn.Module) -> nn.Module:
    """The net with another module of that name."""
    if not prefix:
        return layer
    parent, _, name = prefix.rpartition(".")
    setattr(net.get_submodule(parent), name, layer)
    return net


def _prepare(net: nn.Module) -> None:
    """Sequentials with frozen layers become frozen ones."""
    for module in net.modules():
        if type(module) is nn.Sequential and any(isinstance(m, FrozenLayer) for m in module.modules()):
            module.__class__ = FrozenSequential
