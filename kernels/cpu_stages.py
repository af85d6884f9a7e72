"""The stages of a frozen net (cpu_net), and how each reads its input: mirrored in csrc/net.h.

Raw tensors: CSR indices and values of each layer, on the CPU, fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .abi import PIXELS, ROWS, STRIP
from .reference import Geometry

Shape = tuple[int, ...]  # of one input: (features,) or (C, H, W)

_INDEX = {"dtype": torch.int64, "device": "cpu"}
_FLOAT = {"dtype": torch.float32, "device": "cpu"}


class Linear(NamedTuple):
    """relu?(x Wᵀ + bias): crow_indices (O + 1,), col_indices (nnz,), values (nnz,), bias (O,) or None."""

    in_features: int
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None
    relu: bool = False


class Conv(NamedTuple):
    """max_pool?(relu?(scale (x * W) + shift)): as Linear, W being (O, C / groups * kernel_h * kernel_w).

    scale, shift: (O,), of the bias and a batchnorm, or None. Windows of the pooling are pool x pool, without overlap.
    """

    geometry: Geometry
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    scale: Tensor | None
    shift: Tensor | None
    relu: bool = False
    pool: int = 1


class Mean(NamedTuple):
    """The mean of each channel: (C, H, W) -> (C,)."""


Stage = Linear | Conv | Mean


def output_shape(stage: Stage, shape: Shape) -> Shape:
    """Of a stage that reads `shape`. Raises ValueError if it cannot."""
    if isinstance(stage, Linear):
        if size(shape) != stage.in_features:
            raise ValueError(f"x: expected shape (*, {stage.in_features}), got (N, {size(shape)})")
        return (len(stage.crow_indices) - 1,)
    if isinstance(stage, Mean):
        if len(shape) != 3:
            raise ValueError(f"x: expected shape (N, C, H, W), got {_text('N', *shape)}")
        return (shape[0],)
    check_images(stage.geometry, stage.pool, "N", *shape)
    height, width = stage.geometry.output_size(*shape[1:])
    return len(stage.crow_indices) - 1, height // stage.pool, width // stage.pool


def check_images(geometry: Geometry, pool: int, *shape: int | str) -> None:
    """Raise ValueError unless a convolution and the pooling after it can read x of this shape: (N, C, H, W)."""
    if len(shape) != 4 or shape[1] != geometry.channels:
        expected = f"(N, {geometry.channels}, H, W) or ({geometry.channels}, H, W)"
        raise ValueError(f"x: expected shape {expected}, got {_text(*shape)}")
    if min(made := geometry.output_size(*shape[2:])) < 1:
        raise ValueError(f"x: expected an image that the kernel fits into, got {_text(*shape)} for {geometry}")
    if min(made) < pool:
        windows = f"that the windows of the pooling, {pool} x {pool}, fit into after the convolution"
        raise ValueError(f"x: expected an image {windows}, got {_text(*shape)} for {geometry}")


def _text(*shape: int | str) -> str:
    """As a tuple shows; of a batch of any size "N" stands for it."""
    return f"({', '.join(map(str, shape))})"


def input_field(stage: Stage, shape: Shape) -> list[int]:
    """The words of the Field that a stage reads."""
    if not isinstance(stage, Conv):
        return plain_field(shape)
    g = stage.geometry
    out_height, out_width = g.output_size(*shape[1:])
    rows = -(-((out_height - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1) // g.stride_h)
    rows = max(rows, -(-(g.top + shape[1]) // g.stride_h))
    columns = [out_width, g.kernel_w, g.stride_w, g.dilation_w, g.left]
    return [*shape, *columns, g.stride_h, rows, g.top]


def plain_field(shape: Shape) -> list[int]:
    """The words of the Field that is the image itself."""
    channels, height, width = shape if len(shape) == 3 else (size(shape), 1, 1)
    return [channels, height, width, width, 1, 1, 1, 0, 1, height, 0]


def field_elements(field: list[int]) -> int:
    """Elements that the words of a Field say it has."""
    channels, _, _, columns, copies, _, _, _, phases, rows, _ = field
    return channels * copies * phases * rows * columns


def scratch_elements(stage: Stage, shape: Shape) -> int:
    """Elements of scratch for the sums of a row of a convolution."""
    if not isinstance(stage, Conv):
        return 0
    width = stage.geometry.output_size(*shape[1:])[1]
    return max(PIXELS, width * stage.pool) + width


def size(shape: Shape) -> int:
    """Elements of one input."""
    return torch.Size(shape).numel()


def tap_offsets(stage: Conv, field: list[int]) -> Tensor:
    """Of each entry's tap in the field: int32 (nnz,)."""
    g = stage.geometry
    _, _, _, columns, copies, _, _, _, phases, rows, _ = field
    plane = rows * columns
    tap = torch.arange(g.kernel_h, **_INDEX)[:, None] * g.dilation_h
    tap = (torch.arange(copies, **_INDEX) * phases + tap % phases) * plane + tap // phases * columns
    channel = torch.arange(g.channels // g.groups, **_INDEX)[:, None] * copies * phases * plane
    offsets = (channel + tap.flatten()).to(torch.int32).flatten()[stage.col_indices]
    if g.groups > 1:
        group = torch.arange(g.groups, dtype=torch.int32, device="cpu") * (
            g.channels // g.groups * copies * phases * plane
        )
        filters = (len(stage.crow_indices) - 1) // g.groups
        counts = stage.crow_indices[::filters].diff()
        offsets += group.repeat_interleave(counts)
    return offsets


def pack_linear(stage: Linear) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(begin, columns, values, order, shift): `ROWS` rows of about equal length at a time, entry by entry of them all.

    Rows are filled up with zeros times a zero that follows the last feature of the input, so that what is infinite
    there stays out of other rows.
    """
    counts = stage.crow_indices.diff()
    rows = len(counts)
    groups = -(-rows // ROWS)
    order = torch.argsort(torch.arange(rows, **_INDEX) // STRIP * (stage.in_features + 1) - counts, stable=True)
    lengths = torch.zeros(groups * ROWS, **_INDEX)
    lengths[:rows] = counts[order]
    begin = torch.zeros(groups + 1, **_INDEX)
    torch.cumsum(lengths.view(groups, ROWS).amax(1), 0, out=begin[1:])
    place = torch.empty(rows, **_INDEX)  # of each row's first entry
    place[order] = begin[torch.arange(rows, **_INDEX) // ROWS] * ROWS + torch.arange(rows, **_INDEX) % ROWS
    number = torch.arange(len(stage.values), **_INDEX) - stage.crow_indices[:-1].repeat_interleave(counts)
    to = place.repeat_interleave(counts) + number * ROWS
    columns = torch.full((ROWS * int(begin[-1]),), stage.in_features, dtype=torch.int32, device="cpu")
    columns[to] = stage.col_indices.to(torch.int32)
    values = torch.zeros(columns.shape, **_FLOAT)
    values[to] = stage.values.detach()
    padded, shift = torch.full((groups * ROWS,), -1, **_INDEX), torch.zeros(groups * ROWS, **_FLOAT)
    padded[:rows] = order
    if stage.bias is not None:
        shift[:rows] = stage.bias.detach()[order]
    return begin, columns.to(torch.uint16) if stage.in_features < 2**16 else columns, values, padded, shift
