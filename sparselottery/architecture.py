"""Models as data: a tree of torch.nn modules described in JSON, and built again without running code from a file.

A node is {"type": "Linear", "arguments": {"in_features": 784, "out_features": 300, "bias": true}}, one of `TYPES` with
its constructor's arguments; a Sequential is {"type": "Sequential", "children": [["fc1", {...}], ...]}, in order. Masked
modules are described as their dense counterparts. Weights, dtypes, devices and the training mode are not part of it.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
from torch import nn

from .nn import MaskedLayer, MaskedSequential, fuse, has_own_forward
from .pattern import MAX_INT32

MAX_DEPTH = 50
INPLACE = ("inplace",)
CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias", "padding_mode",
)  # fmt: skip
TRANSPOSED = (*CONVOLUTION, "output_padding")
BATCHNORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
AVERAGE_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

# y = f(x) element by element, the same function everywhere; and what does nothing in evaluation.
ELEMENTWISE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: INPLACE,
    nn.ReLU6: INPLACE,
    nn.LeakyReLU: ("negative_slope", *INPLACE),
    nn.ELU: ("alpha", *INPLACE),
    nn.CELU: ("alpha", *INPLACE),
    nn.SELU: INPLACE,
    nn.GELU: ("approximate",),
    nn.SiLU: INPLACE,
    nn.Mish: INPLACE,
    nn.Tanh: (),
    nn.Sigmoid: (),
    nn.LogSigmoid: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Softsign: (),
    nn.Hardtanh: ("min_val", "max_val", *INPLACE),
    nn.Hardsigmoid: INPLACE,
    nn.Hardswish: INPLACE,
}
NOTHING: dict[type[nn.Module], tuple[str, ...]] = {
    kind: () if kind is nn.Identity else ("p", *INPLACE) for kind in fuse.NOTHING
}
# Each module that a description can hold, with the arguments that make it.
TYPES: dict[type[nn.Module], tuple[str, ...]] = {
    **ELEMENTWISE,
    **NOTHING,
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
    nn.Conv3d: CONVOLUTION,
    nn.ConvTranspose1d: TRANSPOSED,
    nn.ConvTranspose2d: TRANSPOSED,
    nn.ConvTranspose3d: TRANSPOSED,
    nn.Bilinear: ("in1_features", "in2_features", "out_features", "bias"),
    nn.Embedding: ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"),
    nn.BatchNorm1d: BATCHNORM,
    nn.EmbeddingBag: (
        "num_embeddings",
        "embedding_dim",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "include_last_offset",
        "padding_idx",
    ),
    nn.BatchNorm2d: BATCHNORM,
    nn.BatchNorm3d: BATCHNORM,
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.RMSNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.PReLU: ("num_parameters",),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.MaxPool1d: MAX_POOL,
    nn.MaxPool2d: MAX_POOL,
    nn.AvgPool1d: AVERAGE_POOL,
    nn.AvgPool2d: (*AVERAGE_POOL, "divisor_override"),
    nn.AdaptiveAvgPool1d: ("output_size",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
}
WITH_TENSORS = {kind for kind in TYPES if "device" in inspect.signature(kind).parameters}
BY_NAME = {kind.__name__: kind for kind in TYPES}
# The least that a size may be: PyTorch divides by some of them unchecked.
LEAST = dict.fromkeys(("kernel_size", "stride", "dilation", "groups", "num_groups", "output_size"), 1) | {
    "padding": 0,
    "output_padding": 0,
}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The JSON-able description of a model; None if it is not a tree of exactly these modules, unaltered.

    Altered are those with hooks, a forward or parameters of their own, and those whose arguments JSON cannot hold.
    """
    node = _describe(model, depth=0)
    if node is None:
        return None
    ours, theirs = ({name: tuple(shape) for name, shape in _shapes(each).items()} for each in (model, build(node)))
    return node if ours == theirs else None


def build(node: Any, device: torch.device | str = "meta") -> nn.Module:
    """The model of a description, with uninitialised weights (on the meta device: with none), in evaluation mode.

    Only the types above are ever called, with arguments that are numbers, strings and lists of numbers.
    Raises ValueError for anything that `describe` does not make.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
        return _build(node, device, depth=0).eval()


def _describe(module: nn.Module, depth: int) -> dict[str, Any] | None:
    if depth > MAX_DEPTH or _altered(module):
        return None
    if type(module) in (nn.Sequential, MaskedSequential):
        children = [[name, _describe(child, depth + 1)] for name, child in module._modules.items()]
        return None if any(child is None for _, child in children) else {"type": "Sequential", "children": children}
    kind = module.dense_type if isinstance(module, MaskedLayer) else type(module)
    if kind not in TYPES:
        return None
    arguments = {name: _argument(module, name) for name in TYPES[kind]}
    if not all(_is_plain(name, value) for name, value in arguments.items()):
        return None
    return {"type": kind.__name__, "arguments": arguments}


def _altered(module: nn.Module) -> bool:
    return (
        "forward" in vars(module) or has_own_forward(module) or bool(module._forward_hooks or module._forward_pre_hooks)
    )


def _argument(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    if name == "bias":
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def _is_plain(name: str, value: Any) -> bool:
    """Is it what a constructor may be given?"""
    if name in LEAST and (value is None or isinstance(value, bool)):
        return False
    if isinstance(value, list):
        return 0 < len(value) <= 8 and all(type(each) is int and _is_plain(name, each) for each in value)
    if type(value) is int:
        return LEAST.get(name, -MAX_INT32) <= value <= MAX_INT32
    if type(value) is float:
        return math.isfinite(value) and name not in LEAST
    return value is None or isinstance(value, (bool, str))


def _shapes(model: nn.Module) -> dict[str, Any]:
    """Of the dense model's state_dict, by name, in order."""
    found = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = prefix and f"{prefix}."
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if isinstance(module, MaskedLayer):
            found[f"{prefix}weight"] = module.dense_shape
            own = {} if module.bias is None else {"bias": module.bias}
        found |= {prefix + name: tensor.shape for name, tensor in own.items()}
    return found


def _build(node: Any, device: torch.device | str, depth: int) -> nn.Module:
    if depth > MAX_DEPTH:
        raise ValueError(f"architecture: expected at most {MAX_DEPTH} Sequentials in each other, got more")
    if isinstance(node, dict) and node.keys() == {"type", "children"} and node["type"] == "Sequential":
        return _build_sequential(node["children"], device, depth)
    if not isinstance(node, dict) or node.keys() != {"type", "arguments"} or node["type"] not in list(BY_NAME):
        raise ValueError(f"architecture: expected a Sequential or one of {list(BY_NAME)}, got {_short(node)}")
    kind, arguments = BY_NAME[node["type"]], node["arguments"]
    if not isinstance(arguments, dict) or arguments.keys() != set(TYPES[kind]):
        raise ValueError(f"architecture: expected for {node['type']} {list(TYPES[kind])}, got {_short(arguments)}")
    for name, value in arguments.items():
        if not _is_plain(name, value):
            raise ValueError(f"architecture: expected a plain argument {name} of {node['type']}, got {_short(value)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    try:
        return kind(**given, device=device) if kind in WITH_TENSORS else kind(**given)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"architecture: {node['type']} refuses its arguments: {error}") from error


def _build_sequential(children: Any, device: torch.device | str, depth: int) -> nn.Sequential:
    if not isinstance(children, list) or not all(isinstance(child, list) and len(child) == 2 for child in children):
        raise ValueError(f"architecture: expected the children of a Sequential as pairs, got {_short(children)}")
    sequential = nn.Sequential()
    for name, child in children:
        if not isinstance(name, str) or not name or "." in name or hasattr(sequential, name):
            raise ValueError(f"architecture: expected a new name of a child without dots, got {_short(name)}")
        sequential.add_module(name, _build(child, device, depth + 1))
    return sequential


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
