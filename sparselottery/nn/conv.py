"""MaskedConv2d, and its native call with the ReLU and max pooling that may follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.reference import Geometry, Norm, image_format
from ..pattern import Pattern
from .base import MaskedLayer
from .compact import gather, spread
from .executions import NATIVE


class MaskedConv2d(MaskedLayer):
    """nn.Conv2d over a fixed mask: y = x * W + b, where only the surviving weights of W exist.

    `values` (nnz,) is the parameter, in CSR order of W as the matrix (O, C / groups * kernel_h * kernel_w);
    `crow_indices` (O + 1,) and `col_indices` (nnz,) are int32 buffers. Gradients and optimiser state are nnz-sized too.
    `weight` is the dense weight, made where it is used.

    Args:
        mask: bool (out_channels, in_channels / groups, *kernel_size), by keyword, True where a weight survives; None
            keeps all.
        all others: as in nn.Conv2d, and refused as there.
    Raises TypeError or ValueError also if the mask is not boolean or not of that shape, for no channels, and for a
    kernel_size, stride or dilation below 1 or a negative padding.
    """

    dense_type = nn.Conv2d
    arguments = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Refuses what nn.Conv2d does and makes pairs of single numbers.
        like = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode,
                         "meta")  # fmt: skip
        for name in self.arguments:
            setattr(self, name, getattr(like, name))
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"in_channels, out_channels: expected at least 1, got {in_channels}, {out_channels}")
        for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
            pair = getattr(self, name)
            if not isinstance(pair, str) and (len(pair) != 2 or min(pair) < least):
                raise ValueError(f"{name}: expected two numbers of at least {least}, got {pair}")
        sides = _sides(self.padding, self.kernel_size, self.dilation)
        # F.pad starts at the last dimension.
        self._pad_first = None if padding_mode == "zeros" else sides[2:] + sides[:2]
        self.geometry = geometry_of(self)
        self._build(mask, bias, device, dtype)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the dense weight: (out_channels, in_channels / groups, *kernel_size)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        return ops.compile_conv_plan(pattern, self.geometry, block)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, OH, OW), or (C, H, W) -> (O, OH, OW); channels_last if x is, else contiguous."""
        if self._present in NATIVE and (y := ops.call_conv(x, self)) is not None:
            return y
        if ops.in_torch(x):
            return self._in_torch(x)
        if self.execution not in NATIVE:
            self.check()
        if self.execution in NATIVE:
            return _conv2d(x, self)
        if self.execution == "dense":
            return self._multiply(x, self._dense_weight())
        images = _padded(_images(x, self), self)  # first, as padding may change the format
        last = image_format(images) == torch.channels_last
        bias = None if self.bias is None else self.bias.index_select(0, self._rows)
        y = self._convolve(gather(images, self._columns, -3, last), self._dense_weight(), bias)
        y = spread(y, self._rows, self.bias, self.out_channels, -3, last)
        return y if x.dim() == 4 else y[0]

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._convolve(_padded(x, self), weight, self.bias)

    def _convolve(self, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding if self._pad_first is None else 0
        return F.conv2d(padded, weight, bias, self.stride, padding, self.dilation, self.groups)


def geometry_of(conv: MaskedConv2d | nn.Conv2d) -> Geometry:
    """Of the convolution itself: where it does not pad by zeros, of the padded image."""
    sides = _sides(conv.padding, conv.kernel_size, conv.dilation) if conv.padding_mode == "zeros" else (0, 0, 0, 0)
    return Geometry(conv.in_channels, *conv.kernel_size, *conv.stride, *sides, *conv.dilation, conv.groups)


def _sides(padding: str | tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, ...]:
    """The padding (top, bottom, left, right)."""
    if padding == "same":
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    pad_h, pad_w = (0, 0) if padding == "valid" else padding
    return pad_h, pad_h, pad_w, pad_w


def run_conv(
    x: Tensor, layer: MaskedConv2d, relu: bool = False, pool: int = 1, norm: nn.BatchNorm2d | None = None
) -> Tensor:
    """max_pool?(relu?(norm?(layer(x)))) in one native call; the windows of the pooling are `pool` x `pool`.

    norm is in evaluation mode and has the dtype of the layer; x is such that `ops.takes_norm(x)`.
    """
    norm = norm and _statistics(norm)
    y = ops.call_conv(x, layer, relu, pool, norm)
    return _conv2d(x, layer, relu, pool, norm) if y is None else y


def _conv2d(x: Tensor, layer: MaskedConv2d, relu: bool = False, pool: int = 1, norm: Norm | None = None) -> Tensor:
    """The same, whatever is unusual."""
    layer.check()
    y = ops.conv2d(
        _padded(_images(x, layer), layer),
        layer.values,
        layer.bias,
        layer.crow_indices,
        layer.col_indices,
        layer.plan,
        geometry=layer.geometry,
        block=layer.block,
        relu=relu,
        pool=pool,
        norm=norm,
    )
    return y if x.dim() == 4 else y[0]


def _images(x: Tensor, layer: MaskedConv2d) -> Tensor:
    """x as (N, C, H, W)."""
    ops.check_layout(x)
    if x.dim() not in (3, 4) or x.shape[-3] != layer.in_channels:
        expected = f"(N, {layer.in_channels}, H, W) or ({layer.in_channels}, H, W)"
        raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
    return x if x.dim() == 4 else x[None]


def _padded(x: Tensor, layer: MaskedConv2d) -> Tensor:
    """x with the padding that is not by zeros."""
    return x if layer._pad_first is None else F.pad(x, layer._pad_first, layer.padding_mode)


def _statistics(norm: nn.BatchNorm2d) -> Norm:
    return Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
