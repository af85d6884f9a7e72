"""Activations between batch-major, as torch has them, and batch-minor, as the CSR kernels read them.

    images (N, C, H, W), any strides     <->     rows (C * PH * PW, ld), contiguous; pixel (h, w) of channel c in row
                                                 (c * PH + top + h * up_h) * PW + left + w * up_w

A linear layer's (N, I) is the case H = W = 1. In `rows` the batch is what lies side by side, so that one weight
multiplies contiguous numbers. Columns N to the next multiple of 16 are zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import LANES, leading_dim
from .launch import launch, tuned


@triton.jit
def _layout_kernel(
    images, rows, batch, columns, channels, height, width, stride_n, stride_c, stride_h, stride_w, ld,
    rows_height, rows_width, top, left, up_h, up_w,
    PACK: tl.constexpr, CHANNELS_LAST: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    pixels = height * width
    tiles, program = tl.cdiv(channels * pixels, BF), tl.program_id(0)  # one dimension: the others end at 65,535
    f = program % tiles * BF + tl.arange(0, BF)  # a feature, in the order in which the images hold them
    n = program // tiles * BN + tl.arange(0, BN)
    if CHANNELS_LAST:
        c, pixel = f % channels, f // channels
    else:
        c, pixel = f // pixels, f % pixels
    h, w = pixel // width, pixel % width
    row_h, row_w = top + h * up_h, left + w * up_w
    inside = (f < channels * pixels) & (row_h >= 0) & (row_h < rows_height) & (row_w >= 0) & (row_w < rows_width)
    offset = c.to(tl.int64) * stride_c + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w
    image = n.to(tl.int64)[:, None] * stride_n + offset[None, :]
    row = ((c * rows_height + row_h) * rows_width + row_w).to(tl.int64)
    row = row[:, None] * ld + n[None, :]
    mask = (n < batch)[:, None] & inside[None, :]
    if PACK:
        tile = tl.load(images + image, mask=mask, other=0)
        tl.store(rows + row, tl.trans(tile), mask=inside[:, None] & (n < columns)[None, :])
    else:
        tile = tl.load(rows + row, mask=inside[:, None] & (n < columns)[None, :], other=0)
        tl.store(images + image, tl.trans(tile), mask=mask)


class Shape(NamedTuple):
    """A program's features and samples, and its warps."""

    bf: int
    bn: int
    warps: int


SHAPE = Shape(64, 64, 4)
_STRIDES = "stride_n", "stride_c", "stride_h", "stride_w"


class Placing(NamedTuple):
    """Where the pixels of images go within `rows`: the height and width there, the offset and the distance."""

    height: int
    width: int
    top: int = 0
    left: int = 0
    up_h: int = 1
    up_w: int = 1

    def fills(self, height: int, width: int) -> bool:
        """Do images of this size leave no row unwritten?"""
        return self == (height, width, 0, 0, 1, 1)


def whole_lanes(batch: int) -> int:
    """How many columns of `rows` are read and written."""
    return (batch + LANES - 1) // LANES * LANES


def pack(images: Tensor, placing: Placing, out: Tensor | None = None) -> Tensor:
    """(N, C, H, W) -> rows (C * PH * PW, ld), zeros where no pixel comes to lie; into `out` if given."""
    shape = images.shape[1] * placing.height * placing.width, leading_dim(images.shape[0])
    rows = images.new_empty(shape) if out is None else out.view(shape)
    if not placing.fills(*images.shape[2:]):
        rows.zero_()
    _move(images, rows, placing, pack=True)
    return rows


def unpack(rows: Tensor, out: Tensor) -> None:
    """rows (C * H * W, ld) -> out (N, C, H, W), of any strides."""
    _move(out, rows, Placing(*out.shape[2:]), pack=False)


def is_minor(x: Tensor) -> bool:
    """Is x (N, I) batch-minor: a view of rows (I, ld)? If not it is row-major."""
    return x.stride(0) == 1 and x.stride(1) >= LANES


def minor(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The (N, I) view of rows (I, ld) with what x (N, I) holds; into `out` (I * ld,) if given."""
    return pack(x[:, :, None, None], Placing(1, 1), out)[:, : x.shape[0]].t()


def major(x: Tensor, out: Tensor | None = None) -> Tensor:
    """A contiguous (N, I) of the view (N, I) of rows; into `out` if given."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    unpack(x.t(), out[:, :, None, None])
    return out


def _move(images: Tensor, rows: Tensor, placing: Placing, pack: bool) -> None:
    batch, channels, height, width = images.shape
    of, columns = tuned("layout", SHAPE), whole_lanes(batch)
    programs = triton.cdiv(channels * height * width, of.bf) * triton.cdiv(columns, of.bn)
    last = channels > 1 and images.stride(1) == 1
    launch(
        _layout_kernel, (programs,), images=images, rows=rows, batch=batch, columns=columns, channels=channels,
        height=height, width=width, **dict(zip(_STRIDES, images.stride(), strict=True)), ld=rows.stride(0),
        rows_height=placing.height, rows_width=placing.width, top=placing.top, left=placing.left,
        up_h=placing.up_h, up_w=placing.up_w, PACK=pack, CHANNELS_LAST=last, BF=of.bf, BN=of.bn, num_warps=of.warps,
    )  # fmt: skip
