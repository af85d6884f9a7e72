"""Of a convolution over batch-minor rows: which row of x a weight meets. A linear layer is the case of one pixel."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...reference import Geometry


@triton.jit
def feature(
    column, x_height, x_width, dilation_h, dilation_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr
):  # fmt: skip
    """The row of x that column (c, r, s) of W reads for the first pixel."""
    channel, tap = column // (KERNEL_H * KERNEL_W), column % (KERNEL_H * KERNEL_W)
    return (channel * x_height + tap // KERNEL_W * dilation_h) * x_width + tap % KERNEL_W * dilation_w


_NOT_ARGUMENTS = "out_height", "kernel_h", "kernel_w"  # `pixels`, and constexprs


class Taps(NamedTuple):
    """x (x_height, x_width) a channel, its padding included; y (out_height, out_width); rows and columns per group."""

    filters_per_group: int
    columns_per_group: int
    x_height: int = 1
    x_width: int = 1
    out_height: int = 1
    out_width: int = 1
    stride_h: int = 1
    stride_w: int = 1
    dilation_h: int = 1
    dilation_w: int = 1
    kernel_h: int = 1
    kernel_w: int = 1

    @property
    def pixels(self) -> int:
        return self.out_height * self.out_width

    @property
    def arguments(self) -> dict[str, int]:
        """What the kernels take of it at run time."""
        return {name: value for name, value in self._asdict().items() if name not in _NOT_ARGUMENTS}


def linear(rows: int, columns: int) -> Taps:
    return Taps(rows, columns)


def forward(geometry: Geometry, filters: int, height: int, width: int) -> Taps:
    """Of y = W * x for images (height, width)."""
    padded = height + geometry.top + geometry.bottom, width + geometry.left + geometry.right
    steps = geometry.stride_h, geometry.stride_w, geometry.dilation_h, geometry.dilation_w
    return Taps(
        filters // geometry.groups, geometry.columns, *padded, *geometry.output_size(height, width), *steps,
        geometry.kernel_h, geometry.kernel_w,
    )  # fmt: skip


def backward(geometry: Geometry, filters: int, height: int, width: int) -> Taps:
    """Of gx = Wᵀ * gy for images (height, width): with stride 1, over a gy that is spread out and padded for it."""
    halo = (geometry.kernel_h - 1) * geometry.dilation_h, (geometry.kernel_w - 1) * geometry.dilation_w
    return Taps(
        geometry.channels, filters * geometry.kernel_h * geometry.kernel_w, height + halo[0], width + halo[1],
        height, width, 1, 1, geometry.dilation_h, geometry.dilation_w, geometry.kernel_h, geometry.kernel_w,
    )  # fmt: skip
