"""Convolutions over blocks of filters x channels at one tap, on tensor cores: implicit GEMM over the pixels.

    y[p, n] = act(Σ over tiles and their columns k of x[p ∘ tap(k), channel(k)] * w[tile, n, k])      gx alike: see View
    partial[split, tile, k, r] = Σ over the pixels p of the split of x[p ∘ tap(k), channel(k)] * gy[p, row(r)]

All images are channels_last, (N, H, W, C) in memory; p runs over the pixels of y. These are spmm.py and
sddmm.py, but for where x is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import Geometry
from ..launch import launch
from .plan import TILE, Tiles
from .shape import Shape, Split
from .tile import columns, load_words, multiply, store_tile, with_bias


@triton.jit
def _pixel(p, out_height, out_width):
    """The image, row and column of pixels."""
    return p // (out_height * out_width), p // out_width % out_height, p % out_width


@triton.jit
def _read_images(of_x, words, tile, RED: tl.constexpr, BK: tl.constexpr, FLAGS: tl.constexpr):
    """What pixels (image, h, w) of y, each (BM,), read of x through BK words; pixels along AXIS, words along the other.

    inside: which pixels there are. FLAGS: AXIS, then as the kernels have them.
    """
    x, image, h, w, inside, height, width, channels, step_h, step_w, start_h, start_w, tap_h, tap_w = of_x
    AXIS: tl.constexpr = FLAGS[0]
    MASKED: tl.constexpr = FLAGS[1]
    RAGGED: tl.constexpr = FLAGS[2]
    DIV_H: tl.constexpr = FLAGS[3]
    DIV_W: tl.constexpr = FLAGS[4]
    LONG: tl.constexpr = FLAGS[5]
    K: tl.constexpr = 1 - AXIS
    column = columns(words & 0xFFFF, tile, RED, BK)
    down, right = (words >> 24) * tap_h, (words >> 16 & 0xFF) * tap_w
    if BK <= RED:
        down, right = down + tl.zeros([BK], tl.int32), right + tl.zeros([BK], tl.int32)
    h, w = h * step_h + start_h, w * step_w + start_w
    image = (image.to(tl.int64) if LONG else image) * height
    above = tl.expand_dims(h, K) + tl.expand_dims(down, AXIS)
    left = tl.expand_dims(w, K) + tl.expand_dims(right, AXIS)
    mask = tl.expand_dims(inside, K)
    if DIV_H * DIV_W == 1:
        of_pixel, of_word = ((image + h) * width + w) * channels, (down * width + right) * channels + column
        at = x + tl.expand_dims(of_pixel, K) + tl.expand_dims(of_word, AXIS)
    else:
        mask = mask & (above % DIV_H == 0) & (left % DIV_W == 0)
        above, left = above // DIV_H, left // DIV_W
        at = x + ((tl.expand_dims(image, K) + above) * width + left) * channels + tl.expand_dims(column, AXIS)
    if MASKED:
        mask = mask & (above.to(tl.uint32) < height) & (left.to(tl.uint32) < width)
    if RAGGED:
        mask = mask & tl.expand_dims(column < channels, AXIS)
    return tl.load(at, mask=mask, other=0)


@triton.jit
def _block_conv_kernel(
    x, packed, bias, y, order, tile_crow, word, rows, pixels, channels, filters,
    height, width, out_height, out_width, step_h, step_w, start_h, start_w, tap_h, tap_w,
    OUT: tl.constexpr, RED: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    MASKED: tl.constexpr, RAGGED: tl.constexpr, DIV_H: tl.constexpr, DIV_W: tl.constexpr,
    LONG: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = tl.load(order + pid % rows)
    p, n = pid // rows * BM + tl.arange(0, BM), row * OUT + tl.arange(0, OUT)
    inside = p < pixels
    image, h, w = _pixel(p, out_height, out_width)
    of_x = x, image, h, w, inside, height, width, channels, step_h, step_w, start_h, start_w, tap_h, tap_w
    flags: tl.constexpr = (0, MASKED, RAGGED, DIV_H, DIV_W, LONG)
    acc = multiply(_read_images, of_x, flags, packed, tile_crow, word, row, OUT, RED, K, BM, BK, PRECISION)
    acc = with_bias(acc, bias, n, filters, RELU)
    at = p.to(tl.int64)[:, None] * filters + n[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside[:, None] & (n < filters)[None, :])


@triton.jit(do_not_specialize=["tiles", "steps"])
def _block_conv_sddmm_kernel(
    x, gy, partial, tile_row, word, tiles, pixels, channels, filters, steps,
    height, width, out_height, out_width, step_h, step_w, start_h, start_w, tap_h, tap_w,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    MASKED: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, split = pid % tiles, pid // tiles
    row = tl.load(tile_row + tile)
    if row >= 0:
        words, n = load_words(word, tile, C, K), row * R + tl.arange(0, R)
        acc = tl.zeros([K, R], tl.float32)
        p, at = split * steps * BM + tl.arange(0, BM), tl.arange(0, BM)[:, None] * filters + n[None, :]
        gy += (split * steps * BM).to(tl.int64) * filters
        image, h, w = _pixel(p, out_height, out_width)
        images = pixels // (out_height * out_width)
        on_image, on_h, on_w = _pixel(BM, out_height, out_width)
        for _ in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(pixels, BM))):
            of_x = (
                x, image, h, w, image < images, height, width, channels, step_h, step_w, start_h, start_w, tap_h, tap_w
            )  # fmt: skip
            x_tile = _read_images(of_x, words, tile, C, K, (1, MASKED, RAGGED, 1, 1, LONG))
            mask = (p < pixels)[:, None]
            if RAGGED:
                mask = mask & (n < filters)[None, :]
            gy_tile = tl.load(gy + at, mask=mask, other=0)
            acc = tl.dot(x_tile, gy_tile, acc, input_precision=PRECISION)
            gy += BM * filters
            p, w = p + BM, w + on_w  # by carrying: divisions are slow
            over = w >= out_width
            w, h = tl.where(over, w - out_width, w), tl.where(over, h + 1, h) + on_h
            over = h >= out_height
            h, image = tl.where(over, h - out_height, h), tl.where(over, image + 1, image) + on_image
        store_tile(partial, acc, pid, K, R)


class View(NamedTuple):
    """How pixels of y read x: pixel h through tap r reads row (h * step + start + r * tap) / div, if there is one."""

    step: tuple[int, int]
    start: tuple[int, int]
    tap: tuple[int, int]
    div: tuple[int, int]

    @classmethod
    def forward(cls, of: Geometry) -> View:
        return cls((of.stride_h, of.stride_w), (-of.top, -of.left), (of.dilation_h, of.dilation_w), (1, 1))

    @classmethod
    def backward(cls, of: Geometry) -> View:
        """Pixels of gx read gy."""
        return cls((1, 1), (of.top, of.left), (-of.dilation_h, -of.dilation_w), (of.stride_h, of.stride_w))

    @property
    def arguments(self) -> dict[str, int]:
        """What the kernels take of it at run time."""
        ways = {"step": self.step, "start": self.start, "tap": self.tap}
        return {f"{name}_{axis}": way[axis == "w"] for name, way in ways.items() for axis in "hw"}

    def leaves(self, of: Geometry, size: tuple[int, int], out_size: tuple[int, int]) -> bool:
        """Is anything read outside x?"""
        reach = [(kernel - 1) * tap for kernel, tap in zip((of.kernel_h, of.kernel_w), self.tap, strict=True)]
        sides = zip(self.step, self.start, reach, size, out_size, strict=True)
        return self.div != (1, 1) or any(
            start + min(far, 0) < 0 or (outs - 1) * step + start + max(far, 0) >= side
            for step, start, far, side, outs in sides
        )


def conv(x: Tensor, packed: Tensor, bias: Tensor | None, tiles: Tiles, red: int, geometry: Geometry, view: View,
         shape: Shape, precision: str, y: Tensor, relu: bool = False) -> None:  # fmt: skip
    """x (N, K, H, W) convolved with the blocks `packed` (tiles * 64 // bk, out, bk), red channels wide, into y."""
    (channels, *size), (filters, *out_size), rows = x.shape[1:], y.shape[1:], tiles.order.numel()
    pixels = len(y) * out_size[0] * out_size[1]
    launch(
        _block_conv_kernel, (rows * triton.cdiv(pixels, shape.bm),), x=x, packed=packed, bias=bias, y=y,
        order=tiles.order, tile_crow=tiles.tile_crow, word=tiles.word, rows=rows, pixels=pixels, channels=channels,
        filters=filters, **_sizes(x, y), **view.arguments,
        OUT=packed.shape[1], RED=red, K=TILE, BM=shape.bm, BK=shape.bk, MASKED=view.leaves(geometry, size, out_size),
        RAGGED=channels % red != 0, DIV_H=view.div[0], DIV_W=view.div[1], LONG=_long(x),
        RELU=relu, PRECISION=precision, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


def conv_sddmm(x: Tensor, gy: Tensor, tiles: Tiles, block: tuple[int, int], geometry: Geometry, split: Split,
               precision: str) -> Tensor:  # fmt: skip
    """partial (splits, tiles, 64, R) of x (N, C, H, W) and gy (N, O, OH, OW), for blocks as the tiles have them."""
    (channels, *size), (filters, *out_size), count = x.shape[1:], gy.shape[1:], tiles.tile_row.numel()
    (R, C), view, pixels = block, View.forward(geometry), len(gy) * out_size[0] * out_size[1]
    partial = x.new_empty(split.splits, count, TILE, R, dtype=torch.float32)
    launch(
        _block_conv_sddmm_kernel, (count * split.splits,), x=x, gy=gy, partial=partial, tile_row=tiles.tile_row,
        word=tiles.word, tiles=count, pixels=pixels, channels=channels, filters=filters,
        steps=triton.cdiv(pixels, split.bm * split.splits), **_sizes(x, gy), **view.arguments,
        R=R, C=C, K=TILE, BM=split.bm, MASKED=view.leaves(geometry, size, out_size),
        RAGGED=channels % C + filters % R != 0, LONG=_long(x), PRECISION=precision,
        num_warps=split.warps, num_stages=split.stages,
    )  # fmt: skip
    return partial


def _sizes(x: Tensor, y: Tensor) -> dict[str, int]:
    """Of the images that are read, and of those whose pixels the kernels number."""
    (height, width), (out_height, out_width) = x.shape[2:], y.shape[2:]
    return {"height": height, "width": width, "out_height": out_height, "out_width": out_width}


def _long(x: Tensor) -> bool:
    """Are there offsets beyond int32?"""
    return x.numel() >= 2**31
