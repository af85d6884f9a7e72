"""Of a convolution over batch-minor rows: which row of x a weight meets, `feature` + `first_feature`.

A linear layer is the case of one pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ...reference import Geometry


@triton.jit
def feature(
    column, x_height, x_width, dilation_h, dilation_w, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr
):  # fmt: skip
    """The row of x that column (c, r, s) of W reads for the first pixel of the first group."""
    channel, tap = column // (KERNEL_H * KERNEL_W), column % (KERNEL_H * KERNEL_W)
    return (channel * x_height + tap // KERNEL_W * dilation_h) * x_width + tap % KERNEL_W * dilation_w


@triton.jit
def first_feature(row, pixel, filters_per_group, x_features, x_width, out_width, stride_h, stride_w):
    """The row of x that tap (0, 0) of the first channel of filter `row` reads for a pixel of y."""
    return (
        row // filters_per_group * x_features + pixel // out_width * stride_h * x_width + pixel % out_width * stride_w
    )


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
    def x_features(self) -> int:
        """Rows of x that a group has."""
        return self.columns_per_group // (self.kernel_h * self.kernel_w) * self.x_height * self.x_width

    @property
    def of_column(self) -> dict[str, int]:
        """Of the arguments of `feature`, those of run time."""
        return {name: getattr(self, name) for name in ("x_height", "x_width", "dilation_h", "dilation_w")}

    @property
    def of_pixel(self) -> dict[str, int]:
        """Of the arguments of `first_feature`, those of run time."""
        names = "filters_per_group", "x_features", "x_width", "out_width", "stride_h", "stride_w"
        return {name: getattr(self, name) for name in names}


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
