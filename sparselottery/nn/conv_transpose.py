"""MaskedConvTranspose1d and 2d: transposed convolutions by the kernels for the gradients of a convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..kernels.reference import Geometry
from ..pattern import Pattern
from .base import MaskedLayer
from .conv import pair, take_arguments

WHY = "there are kernels for single weights of a transposed convolution only"


class MaskedConvTranspose(MaskedLayer):
    """A transposed convolution: y is the gradient of the image in the convolution of the same weight.

    One of a single dimension has images of height 1.

    Args:
        mask: bool (in_channels, out_channels / groups, *kernel_size), by keyword, True where a weight survives; None
            keeps all.
        all others: as in the dense layer, and refused as there.
    """

    arguments = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "dilation",
        "padding_mode",
    )  # fmt: skip
    lacks = dict.fromkeys(("block", "compact"), WHY)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        # Refuses what the dense layer does and makes tuples of single numbers.
        like = self.dense_type(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, False,
                               dilation, padding_mode, "meta")  # fmt: skip
        take_arguments(self, like, self._dimensions)
        top, left = pair(self.padding, 0)
        kernel_size, stride, dilation = (pair(each, 1) for each in (self.kernel_size, self.stride, self.dilation))
        self.geometry = Geometry(out_channels, *kernel_size, *stride, top, top, left, left, *dilation, groups)
        self._build(mask, bias, device, dtype)

    @property
    def _dimensions(self) -> int:
        return 1 if issubclass(self.dense_type, nn.ConvTranspose1d) else 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight: (in_channels, out_channels / groups, *kernel_size)."""
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    @property
    def biases(self) -> int:
        return self.out_channels

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        return ops.compile_conv_plan(pattern, self.geometry, block)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, O, OH, OW), or without H, or N; output_size: as that of the dense layer."""
        if ops.in_torch(input):
            return self._in_torch(input, output_size)
        self.check()
        ops.check_layout(input)
        if self._present == "dense":
            return self.multiply(self._dense_weight(), self.bias, input, output_size)
        images = input if input.dim() == self._dimensions + 2 else input[None]
        more = self._more(input, output_size)
        sizes = zip(images.shape[2:], self.stride, self.padding, self.dilation, self.kernel_size, more, strict=True)
        size = pair([(side - 1) * s - 2 * p + d * (k - 1) + extra + 1 for side, s, p, d, k, extra in sizes], 1)
        images = images if self._dimensions == 2 else images.unsqueeze(-2)
        if min(size) < 1 or self.geometry.output_size(*size) != tuple(images.shape[2:]):
            # Pixels that no convolution of this stride reaches are padded, or the padding cuts off all.
            return self.multiply(self.pattern.scatter(self.values).view(self.shape), self.bias, input, output_size)
        indices = self.crow_indices, self.col_indices, self.plan
        y = ops.conv_transpose2d(images, self.values, self.bias, *indices, self.geometry, size)
        y = y if self._dimensions == 2 else y.squeeze(-2)
        return y if input.dim() == y.dim() else y[0]

    def _more(self, x: Tensor, output_size: list[int] | None) -> list[int]:
        sizes = self.stride, self.padding, self.kernel_size
        return self.dense_type._output_padding(self, x, output_size, *sizes, self._dimensions, self.dilation)

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor, output_size: Any = None) -> Tensor:
        transpose, more = (F.conv_transpose1d, F.conv_transpose2d)[self._dimensions - 1], self._more(x, output_size)
        return transpose(x, weight, bias, self.stride, self.padding, more, self.groups, self.dilation)


class MaskedConvTranspose1d(MaskedConvTranspose):
    """nn.ConvTranspose1d over a fixed mask.

    Examples:
        >>> layer = MaskedConvTranspose1d(3, 4, 2, stride=2, mask=torch.rand(3, 4, 2) < 0.5)
        >>> layer(torch.randn(2, 3, 8)).shape
        torch.Size([2, 4, 16])
    """

    dense_type = nn.ConvTranspose1d


class MaskedConvTranspose2d(MaskedConvTranspose):
    """nn.ConvTranspose2d over a fixed mask.

    Examples:
        >>> layer = MaskedConvTranspose2d(3, 4, 2, stride=2, mask=torch.rand(3, 4, 2, 2) < 0.5)
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 4, 16, 16])
    """

    dense_type = nn.ConvTranspose2d
