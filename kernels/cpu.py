"""The functions of `reference`, native: packs arguments for csrc/, in place of which the reference is used elsewhere.

The plan of a pattern (csrc/plan.h) is a flat int32 tensor; strips and tiles are sized here. Convolutions are in
`cpu_conv`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import native
from .cpu_conv import conv_backward, conv_forward, conv_plan
from .native import HALF, available, status
from .reference import is_packed, unpack

__all__ = [
    "available",
    "chain_backward",
    "chain_forward",
    "conv_backward",
    "conv_forward",
    "conv_plan",
    "plan",
    "saved_input",
    "status",
    "supports",
]


def supports(dtype: torch.dtype, plans: list[Tensor]) -> bool:
    """Can the native chain run on this dtype and on these plans?"""
    known = dtype in (torch.float32, torch.float64, *HALF)
    return known and native.LIBRARY is not None and all(plan.is_cpu and plan.numel() for plan in plans)


@lru_cache(1024)  # of layers whose masks move the numbers stay
def tile_shape(out_features: int, in_features: int, nnz: int) -> tuple[int, int, int, int]:
    """(strip, block, block_back, wide) of a plan: rows of a strip, columns of a tile of W, of Wᵀ, and of W if of quads.

    block: as many packed rows of 8 vectors as fill 32 KiB of L1, more where a segment of W has fewer than 12 entries,
    or one of Wᵀ fewer than 20: it reads two rows in place of one. Measured on Zen 4 with six layers and batches of 32
    to 788, at 30 to 2 %: within 10 % of the best block for each, mostly 3.
    wide: 32 entries a segment; x may come from L2, as four rows share each load.
    """
    in_l1 = 2**15 // (8 * native.VECTOR_BYTES)

    def columns(entries: int, most: int) -> int:
        return min(max(entries * out_features * in_features // max(nnz, 1) // 16 * 16, in_l1), most)

    return 256, columns(12, 256), columns(20, 512), columns(32, 512)


@lru_cache(1024)
def _strip(rows: int, most: int) -> int:
    return min(most, max(32, rows // 8 // 16 * 16))


def plan(
    crow_indices: Tensor,
    col_indices: Tensor,
    in_features: int,
    tile: tuple[int, int] | None = None,
    backward: bool = True,
    strips: tuple[int, int] | None = None,
) -> Tensor:
    """The plan of a valid CSR pattern as a flat int32 tensor; `tile` = (strip, block) overrides its tiling.

    backward: False leaves out what only gradients need, two thirds of it. strips: rows of a strip of W and of Wᵀ;
    None: as many as `tile` says, or fewer, so that threads find at least eight strips to share.
    """
    out_features = crow_indices.numel() - 1
    strip, *blocks = (*tile, tile[1], tile[1]) if tile else tile_shape(out_features, in_features, col_indices.numel())
    strips = strips or (_strip(out_features, strip), _strip(in_features, strip))
    crow_indices, col_indices = crow_indices.contiguous(), col_indices.contiguous()
    indices = crow_indices.data_ptr(), col_indices.data_ptr()
    sizes = *strips, *blocks, backward, torch.get_num_threads()
    return native.take(native.LIBRARY.plan, out_features, in_features, *indices, *sizes)


def chain_forward(x, values, biases, crow_indices, col_indices, plans, batch_minor, save):
    """As reference.chain_forward, but for None in place of what is not saved; None if nothing for native code."""
    threads = torch.get_num_threads()
    done = native.LIBRARY.chain_forward(x, values, biases, crow_indices, plans, batch_minor, save, threads)
    return (unpack(done[0], x.shape[0]), done[1]) if batch_minor and done else done


def saved_input(saved: Tensor, batch: int, features: int, crow_indices, col_indices) -> Tensor:
    """As reference.saved_input."""
    if saved.dtype in HALF:
        return saved_input(saved.float(), batch, features, crow_indices, col_indices).to(saved.dtype)
    x = saved.new_empty(batch, features)
    rows = [crow.numel() - 1 for crow in crow_indices]
    values, all_features = sum(col.numel() for col in col_indices), features + 2 * sum(rows) - rows[-1]
    given = saved.element_size() == 8, saved.data_ptr(), batch, features, x.data_ptr(), values, all_features
    native.LIBRARY.unpack(*given)
    return x


def chain_backward(gy, x, saved, values, crow_indices, col_indices, plans, need_x, need_values, need_bias):
    """As reference.chain_backward, but for None in place of gradients not needed; None if nothing for native code."""
    args = gy, x, saved, values, crow_indices, plans, need_x, need_values, need_bias, torch.get_num_threads()
    done = native.LIBRARY.chain_backward(*args)
    return (unpack(done[0], x.shape[0]), *done[1:]) if need_x and is_packed(x) and done else done
