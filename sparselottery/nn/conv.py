"""MaskedConv2d and MaskedConv1d, and the native call with the ReLU and max pooling that may follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.reference import Geometry, Norm, image_format
from ..pattern import Pattern
from .base import MaskedLayer
from .compact import gather, put_back, spread
from .executions import NATIVE
from .fuse import Step


class MaskedConvolution(MaskedLayer):
    """A convolution by the kernels for two dimensions; one of a single dimension has images of height 1.

    Args:
        mask: bool (out_channels, in_channels / groups, *kernel_size), by keyword, True where a weight survives; None
            keeps all.
        all others: as in the dense layer, and refused as there.
    Raises TypeError or ValueError also if the mask is not boolean or not of that shape, for no channels, and for a
    kernel_size, stride or dilation below 1 or a negative padding.
    """

    arguments = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Refuses what the dense layer does and makes tuples of single numbers.
        like = self.dense_type(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False,
                               padding_mode, "meta")  # fmt: skip
        take_arguments(self, like, 1 if issubclass(self.dense_type, nn.Conv1d) else 2)
        sides = _sides(self)
        # F.pad starts at the last dimension.
        self._pad_first = None if padding_mode == "zeros" else sides[2:] + sides[:2]
        self.geometry = geometry_of(self)
        self._build(mask, bias, device, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight: (out_channels, in_channels / groups, *kernel_size)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        return ops.compile_conv_plan(pattern, self.geometry, block)

    def _of_images(self, x: Tensor) -> Tensor:
        """forward of (N, C, H, W) or (C, H, W), whatever is unusual."""
        if self.execution not in NATIVE:
            self.check()
        if self.execution in NATIVE:
            return _conv2d(x, self)
        if self.execution == "dense":
            return self._convolve(_padded(x, self), self._dense_weight(), self.bias)
        images = _padded(_images(x, self), self)  # first, as padding may change the format
        last = image_format(images) == torch.channels_last
        if self.execution == "permuted":
            y = self._permuted(images if self._columns is None else gather(images, self._columns, -3, last))
            return y if x.dim() == 4 else y[0]
        bias = None if self.bias is None else self.bias.index_select(0, self._rows)
        y = self._convolve(gather(images, self._columns, -3, last), self._dense_weight(), bias)
        y = spread(y, self._rows, self.bias, self.out_channels, -3, last)
        return y if x.dim() == 4 else y[0]

    def _permuted(self, images: Tensor) -> Tensor:
        """Of images with their channels in the order of the blocks: multiplied by those, and put back."""
        y = ops.conv2d(images, *self._permuted_operands(), geometry=self.geometry, block=self.block)
        return put_back(y, self._rows)

    def _convolve(self, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of images, by PyTorch."""
        raise NotImplementedError


class MaskedConv2d(MaskedConvolution):
    """nn.Conv2d over a fixed mask: y = x * W + b, where only the surviving weights of W exist.

    Examples:
        >>> layer = MaskedConv2d(3, 16, 3, padding=1, mask=torch.rand(16, 3, 3, 3) < 0.2)
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])

    `values` (nnz,) is the parameter, in CSR order of W as the matrix (O, C / groups * kernel_h * kernel_w);
    `crow_indices` (O + 1,) and `col_indices` (nnz,) are int32 buffers. Gradients and optimiser state are nnz-sized too.
    `weight` is the dense weight, made where it is used. Arguments are those of nn.Conv2d, and `mask` by keyword: see
    `MaskedConvolution`.
    """

    dense_type = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, OH, OW), or (C, H, W) -> (O, OH, OW); channels_last if x is, else contiguous."""
        if self._present in NATIVE and (y := ops.call_conv(input, self)) is not None:
            return y
        return self._in_torch(input) if ops.in_torch(input) else self._of_images(input)

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return self._convolve(_padded(x, self), weight, bias)

    def _convolve(self, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding if self._pad_first is None else 0
        return F.conv2d(padded, weight, bias, self.stride, padding, self.dilation, self.groups)


class MaskedConv1d(MaskedConvolution):
    """nn.Conv1d over a fixed mask: as MaskedConv2d, of images of height 1.

    Examples:
        >>> layer = MaskedConv1d(3, 16, 3, padding=1, mask=torch.rand(16, 3, 3) < 0.2)
        >>> layer(torch.randn(2, 3, 8)).shape
        torch.Size([2, 16, 8])
    """

    dense_type = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, L) -> (N, O, OL), or (C, L) -> (O, OL)."""
        if ops.in_torch(input):
            return self._in_torch(input)
        ops.check_layout(input)
        if input.dim() not in (2, 3):
            raise ValueError(f"x: expected shape (N, {self.in_channels}, L) or ({self.in_channels}, L), "
                             f"got {tuple(input.shape)}")  # fmt: skip
        images = input.unsqueeze(-2)
        y = ops.call_conv(images, self) if self._present in NATIVE else None
        return (self._of_images(images) if y is None else y).squeeze(-2)

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return self._convolve(_padded(x.unsqueeze(-2), self), weight, bias).squeeze(-2)

    def _convolve(self, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding if self._pad_first is None else 0
        y = F.conv1d(padded.squeeze(-2), weight, bias, self.stride, padding, self.dilation, self.groups)
        return y.unsqueeze(-2)


def take_arguments(layer: MaskedLayer, like: nn.Module, dimensions: int) -> None:
    """Those of a dense convolution; ValueError for no channels and for sizes that no kernel takes."""
    for name in layer.arguments:
        setattr(layer, name, getattr(like, name))
    if min(like.in_channels, like.out_channels) < 1:
        channels = f"{like.in_channels}, {like.out_channels}"
        raise ValueError(f"in_channels, out_channels: expected at least 1, got {channels}")
    for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        sizes = getattr(layer, name)
        if not isinstance(sizes, str) and (len(sizes) != dimensions or min(sizes) < least):
            expected = "one number" if dimensions == 1 else "two numbers"
            raise ValueError(f"{name}: expected {expected} of at least {least}, got {sizes}")


def geometry_of(conv: MaskedConvolution | nn.Conv1d | nn.Conv2d) -> Geometry:
    """Of the convolution itself: where it does not pad by zeros, of the padded image."""
    sides = _sides(conv) if conv.padding_mode == "zeros" else (0, 0, 0, 0)
    kernel_size, stride, dilation = (pair(each, 1) for each in (conv.kernel_size, conv.stride, conv.dilation))
    return Geometry(conv.in_channels, *kernel_size, *stride, *sides, *dilation, conv.groups)


def pair(sizes: tuple[int, ...], of_height: int) -> tuple[int, int]:
    """Of images: a single dimension is the width."""
    return sizes if len(sizes) == 2 else (of_height, *sizes)


def _sides(conv: MaskedConvolution | nn.Conv1d | nn.Conv2d) -> tuple[int, int, int, int]:
    """The padding (top, bottom, left, right)."""
    if conv.padding == "same":
        sizes = zip(pair(conv.dilation, 1), pair(conv.kernel_size, 1), strict=True)
        total_h, total_w = (d * (k - 1) for d, k in sizes)
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    pad_h, pad_w = (0, 0) if conv.padding == "valid" else pair(conv.padding, 0)
    return pad_h, pad_h, pad_w, pad_w


def run_conv(
    x: Tensor, layer: MaskedConvolution, relu: bool = False, pool: int = 1, norm: nn.BatchNorm2d | None = None
) -> Tensor:
    """max_pool?(relu?(norm?(layer(x)))) in one native call; the windows of the pooling are `pool` x `pool`.

    norm is in evaluation mode and has the dtype of the layer; x is such that `ops.takes_norm(x)`.
    """
    norm = norm and _statistics(norm)
    y = ops.call_conv(x, layer, relu, pool, norm)
    return _conv2d(x, layer, relu, pool, norm) if y is None else y


def run_two_convs(x: Tensor, steps: tuple[Step, Step]) -> Tensor | None:
    """Two groups of one convolution each, in one native call; None where that is not possible."""
    (first, norm_first, relu_first, pool_first), (layer, norm, relu, pool) = steps
    if norm_first is not None or pool_first > 1:
        return None
    return ops.call_conv_after_conv(x, first, relu_first, layer, relu, pool, norm and _statistics(norm))


def _conv2d(x: Tensor, layer: MaskedConvolution, relu: bool = False, pool: int = 1, norm: Norm | None = None) -> Tensor:
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


def _images(x: Tensor, layer: MaskedConvolution) -> Tensor:
    """x as (N, C, H, W)."""
    ops.check_layout(x)
    if x.dim() not in (3, 4) or x.shape[-3] != layer.in_channels:
        expected = f"(N, {layer.in_channels}, H, W) or ({layer.in_channels}, H, W)"
        raise ValueError(f"x: expected shape {expected}, got {tuple(x.shape)}")
    return x if x.dim() == 4 else x[None]


def _padded(x: Tensor, layer: MaskedConvolution) -> Tensor:
    """x with the padding that is not by zeros."""
    return x if layer._pad_first is None else F.pad(x, layer._pad_first, layer.padding_mode)


def _statistics(norm: nn.BatchNorm2d) -> Norm:
    return Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
