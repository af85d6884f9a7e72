"""What is one native call: the grammar of groups, the same for masked layers in training and for frozen nets.

    separate:  linear (ReLU linear)*    or    conv [BatchNorm2d] [ReLU] [MaxPool2d]
    joined:    any number of (linear [ReLU]) and (conv [BatchNorm2d] [ReLU] [MaxPool2d]); between images and rows
               stands Flatten, or AdaptiveAvgPool2d(1) and Flatten

No group holds a child whose call somebody observes, by a hook of any kind or a forward of the child's own, nor one of a
subclass, as parametrized modules are: such a child is called as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from ..kernels.native import Fact

# Modules that compute y from x element by element, and give y the strides of x.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink,
    nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
# Modules that do nothing in evaluation.
NOTHING = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]


class Step(NamedTuple):
    """A layer and what the same call does with its output; without a layer, the mean over all pixels."""

    layer: nn.Module | None
    norm: nn.BatchNorm2d | None = None
    relu: bool = False
    pool: int = 1  # the windows of the pooling are pool x pool


class Group(NamedTuple):
    """Steps that are one native call, and the children whose calls it replaces."""

    steps: list[Step]
    children: list[nn.Module]


class Rules(NamedTuple):
    """What the kernels take.

    layer: the masked or frozen layer that stands for a module in its step; None if our kernels do not run it.
    norms, pools: may the call of a convolution hold a norm and a pooling? joined: may any steps be one call?
    """

    layer: Callable[[nn.Module], nn.Module | None]
    norms: bool = True
    pools: bool = True
    joined: bool = False


def facts_of(parents: Sequence[nn.Module], modules: Sequence[nn.Module]) -> tuple[Fact, ...]:
    """What decides the groups of the parents' children, for `native.unchanged`: these, and of all modules (the children
    among them) the types, hooks, forwards and what `attributes_of` names.
    """
    hooks = [*_GLOBAL_HOOKS, *(getattr(module, name) for module in modules for name in _HOOKS)]
    facts: list[Fact] = [(each, None, len(each)) for each in hooks]
    for parent in parents:
        facts += [(vars(parent), "_modules", parent._modules), (parent._modules, None, (*parent._modules.values(),))]
    for module in modules:
        facts.append((module, None, type(module)))
        facts += [(vars(module), name, vars(module).get(name, ...)) for name in ("forward", *attributes_of(module))]
    return tuple(facts)


def groups(children: Sequence[nn.Module], rules: Rules) -> list[Group | nn.Module]:
    """The children in order: each longest run of them that is one native call as a group, the others as they are."""
    found, at = [], 0
    while at < len(children):
        steps, end = _steps(children, at, rules)
        found.append(Group(steps, children[at:end]) if steps else children[at])
        at = end if steps else at + 1
    return found


def attributes_of(module: nn.Module) -> tuple[str, ...]:
    """The names of what decides, besides its type, what a call can do with a module in a group."""
    if isinstance(module, nn.MaxPool2d):
        return "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    if type(module) is nn.BatchNorm2d:
        return "training", "eps"
    if type(module) in NOTHING:
        return ("training",)
    return ("_present",) if hasattr(type(module), "execution") else ()


def is_observed(module: nn.Module) -> bool:
    """Is its call more than its class's forward, by hooks or a forward of its own?"""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _steps(children: Sequence[nn.Module], at: int, rules: Rules) -> tuple[list[Step], int]:
    """The longest group's steps that begin at `at`, and where they end."""
    steps, end = [], at
    while end < len(children):
        step, after = _step(children, end, rules, steps[-1] if steps else None)
        if step is None:
            break
        steps.append(step)
        end = after
    if steps and not rules.joined and steps[-1].relu and not _has_images(steps[-1]):
        steps[-1], end = Step(steps[-1].layer), end - 1  # a chain ends with a layer
    return steps, end


def _step(children: Sequence[nn.Module], at: int, rules: Rules, last: Step | None) -> tuple[Step | None, int]:
    """The step that begins at `at` and can follow `last`, or None, and where it ends."""
    images = last is not None and _has_images(last)
    if last is not None and rules.joined:
        flattens = _flattens(children, at)
        if images and not flattens and _averages(children[at]) and _flattens(children, at + 1):
            return Step(None), at + 2
        if flattens:
            at, images = at + 1, False
            if at == len(children):
                return None, at
    layer = None if is_observed(children[at]) else rules.layer(children[at])
    if layer is None:
        return None, at
    is_conv, end = layer.geometry is not None, at + 1
    if last is not None and not (is_conv == images if rules.joined else last.relu and not images and not is_conv):
        return None, at
    norm, relu, pool = None, False, 1
    if is_conv and rules.norms and _is(children, end, nn.BatchNorm2d) and _fits(children[end], layer):
        norm, end = children[end], end + 1
    if _is(children, end, nn.ReLU):
        relu, end = True, end + 1
    if is_conv and rules.pools and _is(children, end, nn.MaxPool2d) and (side := _windows(children[end])):
        pool, end = side, end + 1
    return Step(layer, norm, relu, pool), end


def _has_images(step: Step) -> bool:
    return step.layer is not None and step.layer.geometry is not None


def _is(children: Sequence[nn.Module], at: int, kind: type[nn.Module]) -> bool:
    """Is there a child of exactly that type, which nobody observes?"""
    return at < len(children) and type(children[at]) is kind and not is_observed(children[at])


def _flattens(children: Sequence[nn.Module], at: int) -> bool:
    return _is(children, at, nn.Flatten) and (children[at].start_dim, children[at].end_dim) == (1, -1)


def _averages(child: nn.Module) -> bool:
    """Is it the mean over all pixels?"""
    return type(child) is nn.AdaptiveAvgPool2d and not is_observed(child) and child.output_size in (1, (1, 1))


def _fits(norm: nn.BatchNorm2d, conv: nn.Module) -> bool:
    """Is a norm but a scale and a shift of the channels, after this convolution?"""
    tensors, dtype = (norm.running_mean, norm.running_var, norm.weight, norm.bias), conv.values.dtype
    known = not norm.training and norm.running_mean is not None and len(norm.running_mean) == len(conv.crow_indices) - 1
    return known and all(tensor is None or tensor.dtype == dtype for tensor in tensors)


def _windows(pool: nn.MaxPool2d) -> int:
    """The side of its windows, if these are squares that cover the image, of a size that the kernels take; else 0."""
    size, stride, padding, dilation = (
        value if isinstance(value, tuple) else (value, value)
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    covers = size == stride and padding == (0, 0) and dilation == (1, 1) and not (pool.ceil_mode or pool.return_indices)
    return size[0] if covers and size[0] == size[1] <= 15 else 0
