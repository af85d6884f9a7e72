"""MaskedSequential: runs of masked layers and ReLUs, each in one native call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import ops
from .conv import MaskedConv2d, run_conv
from .executions import NATIVE
from .linear import MaskedLinear, run_chain

# Between two masked layers these keep the strides of their input, so it may stay batch-minor.
_KEEPS_STRIDES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.Dropout, nn.Identity,
)  # fmt: skip


class MaskedSequential(nn.Sequential):
    """nn.Sequential in which some runs of children are one native call each, forward and backward.

    They are MaskedLinear, ReLU, MaskedLinear, ... and MaskedConv2d with the ReLU after it; on the CPU with the
    MaxPool2d, too, and in evaluation without gradients the BatchNorm2d. Where only elementwise modules stand before the
    next MaskedLinear, activations stay batch-minor. The children keep their names, so the state_dict is that of an
    nn.Sequential. Children with hooks are called as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        if nn.modules.module._has_any_global_hook():
            return super().forward(x)
        children, start = list(self._modules.values()), 0
        while start < len(children):
            stop = _run_end(children, start, x)
            if stop == start:
                x, stop = children[start](x), start + 1
            elif type(children[start]) is MaskedLinear:
                x = run_chain(x, children[start:stop:2], _stays_batch_minor(children, stop))
            else:
                x = _run_with_followers(x, children[start], children[start + 1 : stop])
            start = stop
        return x


def _run_end(children: list[nn.Module], start: int, x: Tensor) -> int:
    """One past the end of the longest run at `start` that one call on x can do; `start` if there is none."""
    if _native(children[start], MaskedConv2d):
        stop = start + 1
        pools = _tiles if x.is_cpu else lambda _: False  # only the kernels of the CPU pool
        for kind, fits in ((nn.BatchNorm2d, _normalises(x, children[start])), (nn.ReLU, bool), (nn.MaxPool2d, pools)):
            stop += stop < len(children) and _plain(children[stop], kind) and fits(children[stop])
        return stop if stop > start + 1 else start
    if not _native(children[start], MaskedLinear):
        return start
    stop = start + 1
    while stop + 1 < len(children) and _plain(children[stop], nn.ReLU) and _native(children[stop + 1], MaskedLinear):
        stop += 2
    return stop


def _stays_batch_minor(children: list[nn.Module], start: int) -> bool:
    """Is a masked layer the next reader of children[start - 1]'s output, with only elementwise modules before it?

    And is it one that reads batch-minor, or is that what children[start - 1], a masked layer, writes?
    """
    if torch.compiler.is_exporting():  # the strides would pin down the batch size
        return False
    for child in children[start:]:
        if _native(child, MaskedLinear):
            return child.batch_minor or children[start - 1].batch_minor
        if type(child) not in _KEEPS_STRIDES:
            return False
    return False


def _run_with_followers(x: Tensor, conv: MaskedConv2d, followers: list[nn.Module]) -> Tensor:
    by_kind = {type(follower): follower for follower in followers}
    pool = by_kind[nn.MaxPool2d].kernel_size if nn.MaxPool2d in by_kind else 1
    pool = pool if isinstance(pool, int) else pool[0]
    return run_conv(x, conv, nn.ReLU in by_kind, pool, by_kind.get(nn.BatchNorm2d))


def _normalises(x: Tensor, conv: MaskedConv2d) -> Callable[[nn.BatchNorm2d], bool]:
    """Is a norm but a scale and a shift of the channels, after this convolution?"""
    takes, dtype, channels = ops.takes_norm(x), conv.values.dtype, conv.out_channels
    return lambda norm: (
        takes
        and not norm.training
        and norm.running_mean is not None
        and all(t is None or t.dtype == dtype for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
        and norm.num_features == channels
    )


def _tiles(pool: nn.MaxPool2d) -> bool:
    """Is it over square windows that cover the image, and in eager mode, where the kernels may see its size?"""
    size = pool.kernel_size if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * 2
    stride = pool.stride if isinstance(pool.stride, tuple) else (pool.stride,) * 2
    simple = (
        pool.padding in (0, (0, 0)) and pool.dilation in (1, (1, 1)) and not (pool.ceil_mode or pool.return_indices)
    )
    return simple and size == stride and size[0] == size[1] <= 15 and not torch.compiler.is_compiling()


def _native(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Does it run on our kernels, with nothing that observes it?"""
    return _plain(module, kind) and module.execution in NATIVE


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
