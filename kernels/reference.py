"""Every op in plain torch: the definition, the oracle of the tests, and the fallback of every device.

Axes: N batch, I in, O out, C channels, H W pixels, nnz surviving weights. A pattern is CSR: `crow_indices (O+1,)
int32`, `col_indices (nnz,) int32`, ascending within a row. All functions are differentiable by autograd to any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def row_indices(crow_indices: Tensor, nnz: int) -> Tensor:
    """The row of each value: int64 (nnz,)."""
    rows = torch.arange(crow_indices.numel() - 1, device=crow_indices.device)
    return torch.repeat_interleave(rows, crow_indices.diff(), output_size=nnz)


def to_dense(values: Tensor, crow_indices: Tensor, col_indices: Tensor, in_features: int) -> Tensor:
    """W (O, I): `values` (nnz,) at the pattern, zeros elsewhere."""
    positions = row_indices(crow_indices, values.numel()) * in_features + col_indices
    out_features = crow_indices.numel() - 1
    flat = values.new_zeros(out_features * in_features).scatter(0, positions, values)  # far faster than index_put
    return flat.view(out_features, in_features)


def spmm(x: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """y = x Wᵀ: (N, I) -> (N, O)."""
    return x @ to_dense(values, crow_indices, col_indices, x.shape[1]).t()


def sddmm(gy: Tensor, x: Tensor, crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """(gyᵀ x) at the pattern: (N, O), (N, I) -> (nnz,)."""
    return (gy.t() @ x)[row_indices(crow_indices, col_indices.numel()), col_indices]


def rows(ids: Tensor, values: Tensor, crow_indices: Tensor, col_indices: Tensor, columns: int) -> Tensor:
    """y[n] = W[ids[n]] of W (V, columns): (*) -> (*, columns)."""
    at, index = _of_rows(ids.flatten().long(), crow_indices, col_indices, columns)
    flat = values.new_zeros(ids.numel() * columns).scatter(0, at, values[index])
    return flat.view(*ids.shape, columns)


def rows_gradient(gy: Tensor, ids: Tensor, crow_indices: Tensor, col_indices: Tensor, padding: int) -> Tensor:
    """(nnz,): the sum of gy (*, columns) over the rows that were taken, but for row `padding`."""
    ids, gy = ids.flatten().long(), gy.reshape(ids.numel(), gy.shape[-1])
    kept = ids != padding
    ids, gy = ids[kept], gy[kept]
    at, index = _of_rows(ids, crow_indices, col_indices, gy.shape[1])
    return gy.new_zeros(len(col_indices)).index_add(0, index, gy.flatten()[at])


def _of_rows(ids: Tensor, crow_indices: Tensor, col_indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Of each value of each row that is taken: its place in the rows when flattened, and its index: int64."""
    begins = crow_indices[ids].long()
    counts = crow_indices[ids + 1] - begins
    row = torch.repeat_interleave(counts)
    index = torch.arange(len(row), device=ids.device) + (begins - counts.cumsum(0) + counts)[row]
    return row * columns + col_indices[index], index


def relu_gradient(gy: Tensor, y: Tensor) -> Tensor:
    """Of x in y = relu(x), as torch's: zero where y <= 0, even if gy is infinite; else gy, where y is NaN, too."""
    return torch.where(y <= 0, 0, gy)


# Packed activations: batch-minor (features, ld), ld >= N a multiple of the widest vector, columns N.. are zero.

LANES = 16


def leading_dim(batch: int) -> int:
    """Columns of a packed activation: N rounded up to LANES, and off the powers of two that crowd cache sets."""
    groups = (batch + LANES - 1) // LANES
    return LANES * (groups + groups // 16)


def is_packed(x: Tensor) -> bool:
    """Can x (N, I) be read as a packed activation where it stands? Decided by sizes and strides alone."""
    return x.stride(0) == 1 and x.stride(1) % LANES == 0 and x.shape[0] % LANES == 0 and x.stride(1) >= x.shape[0]


def pack(x: Tensor) -> Tensor:
    """(N, I) -> packed (I, ld)."""
    packed = x.new_zeros(x.shape[1], leading_dim(x.shape[0]))
    packed[:, : x.shape[0]] = x.t()
    return packed


def unpack(packed: Tensor, batch: int) -> Tensor:
    """Packed (I, ld) -> its (N, I) view."""
    return packed[:, :batch].t()


def saved_features(x: Tensor, crow_indices: list[Tensor]) -> list[int]:
    """Features of the packed activations a chain saves: x unless it is packed itself, then each hidden layer's."""
    return ([] if is_packed(x) else [x.shape[1]]) + [crow.shape[0] - 1 for crow in crow_indices[:-1]]


def saved_input(
    saved: Tensor, batch: int, features: int, crow_indices: list[Tensor], col_indices: list[Tensor]
) -> Tensor:
    """x (N, I) of what a chain of these patterns saved of it: `saved` begins with it."""
    return unpack(saved[: features * leading_dim(batch)].view(features, -1), batch)


# A chain is the one fused op: h_l = h_{l-1} W_lᵀ + b_l, with a ReLU between layers and none after the last.


def chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save):
    """(N, I) -> y (N, O) and, if `save`, the packed inputs of all layers in one 1-D tensor (see `saved_features`).

    y is the view of a packed activation if `batch_minor`, else contiguous.
    """
    saved, h = [], x
    for layer, bias in enumerate(biases):
        if save and (layer or not is_packed(x)):
            saved.append(pack(h).flatten())
        h = spmm(h, values[layer], crow_indices[layer], col_indices[layer])
        h = h if bias is None else h + bias
        h = torch.relu(h) if layer + 1 < len(values) else h
    saved = torch.cat(saved) if saved else x.new_empty(0)
    return (unpack(pack(h), x.shape[0]) if batch_minor else h.contiguous()), saved


def chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, need_x, need_values, need_bias):
    """gx (N, I), [gvalues (nnz,)], [gbias (O,)]: the gradients of `chain_forward`; empty where not needed.

    gx is the view of a packed activation where x is one, else contiguous.
    """
    batch, ld = gy.shape[0], leading_dim(gy.shape[0])
    features = saved_features(x, crow_indices)
    inputs = [unpack(s.view(-1, ld), batch) for s in saved.split([ld * f for f in features])] if batch else []
    inputs = [x] * (len(values) - len(inputs)) + inputs
    gvalues, gbias = [gy.new_empty(0) for _ in values], [gy.new_empty(0) for _ in values]
    for layer in reversed(range(len(values))):
        h, index = inputs[layer], (crow_indices[layer], col_indices[layer])
        if need_values[layer]:
            gvalues[layer] = sddmm(gy, h, *index)
        if need_bias[layer]:
            gbias[layer] = gy.sum(0)
        if layer or need_x:
            gy = gy @ to_dense(values[layer], *index, h.shape[1])
        if layer:
            gy = relu_gradient(gy, h)
    if not need_x:
        return gy.new_empty(0), gvalues, gbias
    return (unpack(pack(gy), batch) if is_packed(x) else gy.contiguous()), gvalues, gbias


# A convolution is the same algebra: its W (O, I) has I = channels/groups * kernel_h * kernel_w, column (c, r, s).


class Geometry(NamedTuple):
    """Of a 2-D convolution, but for its O filters. Padding is by zeros, each side its own."""

    channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    top: int
    bottom: int
    left: int
    right: int
    dilation_h: int
    dilation_w: int
    groups: int

    @property
    def columns(self) -> int:
        """I: the weights of one filter."""
        return self.channels // self.groups * self.kernel_h * self.kernel_w

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(OH, OW) for images of (H, W); below 1 where the kernel does not fit."""
        height += self.top + self.bottom - self.dilation_h * (self.kernel_h - 1) - 1
        width += self.left + self.right - self.dilation_w * (self.kernel_w - 1) - 1
        return height // self.stride_h + 1, width // self.stride_w + 1


def image_format(x: Tensor) -> torch.memory_format:
    """Of x (N, C, H, W) and so of what a convolution makes of it: channels_last where x is that and not contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def conv_weight(values: Tensor, crow_indices: Tensor, col_indices: Tensor, geometry: Geometry) -> Tensor:
    """(nnz,) -> (O, C / groups, kernel_h, kernel_w)."""
    dense = to_dense(values, crow_indices, col_indices, geometry.columns)
    return dense.view(len(dense), geometry.channels // geometry.groups, geometry.kernel_h, geometry.kernel_w)


def conv(x, values, bias, crow_indices, col_indices, geometry, relu, pool):
    """`conv_forward` in whatever memory format comes out, without the winners."""
    weight = conv_weight(values, crow_indices, col_indices, geometry)
    y = F.conv2d(_padded(x, geometry), weight, bias, *_steps(geometry), geometry.groups)
    y = torch.relu(y) if relu else y
    return F.max_pool2d(y, pool) if pool > 1 else y


def lanes(images: int, geometry: Geometry, out_size: tuple[int, int]) -> int:
    """How many images a vector of the native kernels holds, pixel by pixel: LANES, or 1, pixels then being the lanes.

    Pixels run on through the padding of their rows, and are a third slower for being unaligned; lanes of missing images
    are lost as well.
    """
    height, width = out_size
    halo = (geometry.kernel_w - 1) * geometry.dilation_w // geometry.stride_w
    pixels = ((height - 1) * (width + halo) + width + LANES - 1) // LANES
    return 1 if 4 * images * pixels < 3 * height * width * ((images + LANES - 1) // LANES) else LANES


def winners_shape(images: int, channels: int, geometry: Geometry, out_size: tuple[int, int], pool: int) -> list[int]:
    """Of what is kept for the gradient of a pooling; out_size is before that."""
    per_group = lanes(images, geometry, out_size)
    return [(images + per_group - 1) // per_group, channels, out_size[0] // pool, out_size[1] // pool, per_group]


class Norm(NamedTuple):
    """A batchnorm by running statistics: tensors (O,); weight and bias may be None."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    epsilon: float


def conv_forward(x, values, bias, crow_indices, col_indices, plan, geometry, relu, pool, norm=None):
    """(N, C, H, W) of any strides -> y (N, O, PH, PW) in the `image_format` of x, and the winners of the pooling.

    After the convolution comes the `Norm`, if any, for which there is no gradient here, then a ReLU if `relu`, then max
    pooling by windows of `pool` x `pool`; pool = 1 is none.
    winners, uint8 of `winners_shape`, is which pixel of its window won, row-major, or 255 where the ReLU let nothing
    through: (group of images, channel, row, column, image of the group). It is empty without pooling.
    """
    y = conv(x, values, bias, crow_indices, col_indices, geometry, relu and norm is None, 1)
    if norm is not None:
        y = F.batch_norm(y, *norm[:4], training=False, eps=norm.epsilon)
        y = torch.relu(y) if relu else y
    if pool == 1:
        return y.contiguous(memory_format=image_format(x)), x.new_empty(0, dtype=torch.uint8)
    windows = y[:, :, : y.shape[2] // pool * pool, : y.shape[3] // pool * pool]
    windows = windows.unflatten(3, (-1, pool)).unflatten(2, (-1, pool)).transpose(3, 4).flatten(4)
    best, which = windows.max(-1)
    if relu:
        which = torch.where(best <= 0, 255, which)
    shape = winners_shape(*y.shape[:2], geometry, (y.shape[2], y.shape[3]), pool)
    winners = which.new_zeros((shape[0] * shape[-1], *best.shape[1:]), dtype=torch.uint8)
    winners[: len(x)] = which
    winners = winners.unflatten(0, (shape[0], shape[-1])).movedim(1, -1).contiguous()
    return best.contiguous(memory_format=image_format(x)), winners


def conv_backward(
    gy, x, y, winners, values, crow_indices, col_indices, plan, geometry, relu, pool, need_x, need_values, need_bias
):
    """gx (N, C, H, W), gvalues (nnz,), gbias (O,): the gradients of `conv_forward`; empty where not needed.

    gy has any strides, gx the `image_format` of x. y is read only if `relu` and nothing is pooled.
    """
    if pool > 1:
        gy = _unpooled(gy, winners, geometry.output_size(*x.shape[2:]), pool)
    elif relu:
        gy = relu_gradient(gy, y)
    weight = conv_weight(values, crow_indices, col_indices, geometry)
    stride, padding, dilation = _steps(geometry)
    gx, gweight, gbias = torch.ops.aten.convolution_backward(
        gy, _padded(x, geometry), weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], geometry.groups,
        [need_x, need_values, need_bias],
    )  # fmt: skip
    if need_x:
        inner = gx[:, :, geometry.top : geometry.top + x.shape[2], geometry.left : geometry.left + x.shape[3]]
        gx = inner.contiguous(memory_format=image_format(x))
    if need_values:
        gweight = gweight.flatten(1)[row_indices(crow_indices, col_indices.numel()), col_indices]
    grads = zip((gx, gweight, gbias), (need_x, need_values, need_bias), strict=True)
    return tuple(grad if need else gy.new_empty(0) for grad, need in grads)


def _unpooled(gy: Tensor, winners: Tensor, out_size: tuple[int, int], pool: int) -> Tensor:
    """The gradient before the pooling, zero where another pixel won."""
    won = winners.movedim(-1, 1).flatten(0, 1)[: len(gy), ..., None] == torch.arange(pool * pool, device=gy.device)
    windows = torch.where(won, gy[..., None], 0)
    pixels = windows.unflatten(4, (pool, pool)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return F.pad(pixels, (0, out_size[1] - pixels.shape[3], 0, out_size[0] - pixels.shape[2]))


def _padded(x: Tensor, geometry: Geometry) -> Tensor:
    return F.pad(x, (geometry.left, geometry.right, geometry.top, geometry.bottom))


def _steps(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    """The stride, padding and dilation of a convolution over `_padded` images."""
    return [geometry.stride_h, geometry.stride_w], [0, 0], [geometry.dilation_h, geometry.dilation_w]
