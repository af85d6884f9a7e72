"""Where the blocks of a mask are: what the block kernels read in place of CSR indices, made once per pattern.

A row of blocks (R, C) is cut into *tiles* of 64 columns, 64 // C blocks each, the K tiles of the tensor cores. The last
tile of a row repeats the row's last block in the slots that are left, with weights of zero: no kernel masks it. The
gradient of x reads the transpose: columns of blocks, cut into tiles of 64 // R blocks. With blocks (2, 2) and, to make
it short, tiles of two blocks:

    [[a, b, 0, 0, c, d, e, f],      tile_crow = [0, 2, 3]             row of blocks i has tiles crow[i]:crow[i + 1]
     [g, h, 0, 0, i, j, k, l],      tile_row  = [0, 0, 1]             the row of blocks of each tile
     [0, 0, m, n, 0, 0, 0, 0],      word      = [0, 2, 3, 3, 1, 1]    the column of blocks of each slot
     [0, 0, o, p, 0, 0, 0, 0]]      within    = [0, 2, 4, -1, 0, -1]  where its weights start in their CSR rows

The weights of a slot are values[crow_indices[row] + within + c * step], 0 where within is -1. step is 1 for a matrix.
A block wider than a tile, for the transpose: higher, is listed as parts that are not: see `tiled`.
A convolution's W (O, channels, kernel_h, kernel_w) has blocks of R filters x C channels at one tap; step is the number
of live taps of these channels, and the word holds the tap: tap_row << 24 | tap_column << 16 | channels // C.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import Geometry, row_indices

TILE = 64  # columns of a tile
WORD_LIMITS = (128, 256, 65536)  # of a convolution: kernel_h, kernel_w, rows and columns of blocks
_ALIGN = 4  # every part starts at a multiple of 16 bytes: Triton compiles a kernel once for all


class Tiles(NamedTuple):
    """The tiles of all rows of blocks, in order: int32 views of a plan."""

    order: Tensor  # (rows,) the rows of blocks, most tiles first
    tile_crow: Tensor  # (rows + 1,)
    tile_row: Tensor  # (tiles,); -1: no tile, its slots mean nothing
    within: Tensor  # (tiles * slots,)
    step: Tensor  # (tiles * slots,)
    word: Tensor  # (tiles * slots + TILE,): kernels read ahead


class BlockPlan(NamedTuple):
    forward: Tiles
    transposed: Tiles | None  # None for single columns (R, 1)


class _Blocks(NamedTuple):
    """All blocks in CSR order: int64 (blocks,)."""

    row: Tensor
    column: Tensor  # of channels // C, for a convolution
    tap: Tensor
    within: Tensor
    step: Tensor


def build(
    crow_indices: Tensor,
    col_indices: Tensor,
    in_features: int,
    block: tuple[int, int],
    geometry: Geometry | None = None,
) -> Tensor:
    """The plan of a CSR pattern (O, in_features) of blocks (R, C), which the matrix's border may cut: int32, 1-D.

    geometry: of the convolution whose pattern it is. Waits for the device. Raises ValueError if the pattern does not
    consist of such blocks, or if the convolution is beyond WORD_LIMITS.
    """
    R, C = block
    taps = (geometry.kernel_h, geometry.kernel_w) if geometry else (1, 1)
    out_features, width = crow_indices.numel() - 1, in_features // (taps[0] * taps[1])
    rows, columns = -(-out_features // R), -(-width // C)
    blocks = _find(crow_indices, col_indices, block, taps[0] * taps[1], width)
    limited = (*taps, max(-(-size // min(side, TILE)) for size, side in ((out_features, R), (width, C))))
    if geometry and any(size > limit for size, limit in zip(limited, WORD_LIMITS, strict=True)):
        raise ValueError(f"geometry: expected kernel_h, kernel_w and blocks up to {WORD_LIMITS}, got {limited}")
    across = _cut(blocks, C, width)
    parts = [_tiles(across.row, rows, across.column, C, across, taps)]
    if C > 1:
        down = _cut(blocks, R, out_features, transposed=True)
        parts.append(_tiles(down.column, columns, down.row, R, down, taps))
    tiles = max(len(part.tile_row) for part in parts)
    sizes = _sizes(rows, columns, block, tiles)
    flat = torch.zeros(sum(sizes), dtype=torch.int32, device=crow_indices.device)
    for tensor, out in zip(chain(*parts), flat.split(sizes), strict=True):
        out[: tensor.numel()] = tensor
    for part, view in zip(parts, views(flat, out_features, width, block), strict=False):
        view.tile_row[len(part.tile_row) :] = -1
    return flat


def tiled(block: tuple[int, int], transposed: bool = False) -> tuple[int, int]:
    """Blocks (R, C) as the tiles of a direction list them."""
    R, C = block
    return (min(R, TILE), C) if transposed else (R, min(C, TILE))


def views(plan: Tensor, out_features: int, width: int, block: tuple[int, int]) -> BlockPlan:
    """The parts of a plan; width: in_features or, of a convolution, its channels. Decided by sizes alone."""
    rows, columns = -(-out_features // block[0]), -(-width // block[1])
    fixed = sum(_sizes(rows, columns, block, 0))
    tiles = (plan.numel() - fixed) // (sum(_sizes(rows, columns, block, 1)) - fixed)
    parts = plan.split(_sizes(rows, columns, block, tiles))
    forward, transposed = parts[:6], parts[6:]
    return BlockPlan(_trim(forward, rows), _trim(transposed, columns) if transposed else None)


def _trim(parts: tuple[Tensor, ...], rows: int) -> Tiles:
    order, tile_crow, *rest = parts
    return Tiles(order[:rows], tile_crow[: rows + 1], *rest)


def _sizes(rows: int, columns: int, block: tuple[int, int], tiles: int) -> list[int]:
    """Of the parts of a plan: the tensors of `forward`, then those of `transposed`."""
    R, C = block
    sizes = []
    for outer, side in ((rows, C), (columns, R))[: 2 if C > 1 else 1]:
        slots = tiles * (TILE // min(side, TILE))
        sizes += [_round_up(outer), _round_up(outer + 1), tiles, slots, slots, slots + TILE]
    return sizes


def _round_up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _find(crow_indices: Tensor, col_indices: Tensor, block: tuple[int, int], taps: int, width: int) -> _Blocks:
    """The blocks of a pattern; raises ValueError if it does not consist of them."""
    (R, C), crow, nnz = block, crow_indices.long(), col_indices.numel()
    row, (column, tap) = row_indices(crow_indices, nnz), (col_indices.long() // taps, col_indices.long() % taps)
    first = ((row % R == 0) & (column % C == 0)).nonzero()[:, 0]  # the first weight of each block
    row, column, tap = row[first] // R, column[first] // C, tap[first]
    # in CSR order the live taps of the same channels follow each other
    _, group, sizes = torch.unique_consecutive(row * -(-width // C) + column, return_inverse=True, return_counts=True)
    blocks = _Blocks(row, column, tap, first - crow[row * R], sizes[group])

    r, c = (torch.arange(side, device=crow.device) for side in block)
    rows, columns = (row[:, None] * R + r)[:, :, None], (column[:, None] * C + c)[:, None, :]
    inside = (rows < crow.numel() - 1) & (columns < width)
    rows = rows.clamp(max=crow.numel() - 2)
    position = crow[rows] + blocks.within[:, None, None] + c * blocks.step[:, None, None]
    found = position < crow[rows + 1]
    found &= col_indices[position.clamp(max=max(nnz - 1, 0))] == columns * taps + tap[:, None, None]
    if int(inside.sum()) != nnz or not bool(found[inside].all()):
        raise ValueError(f"col_indices: expected a pattern of whole blocks {tuple(block)}, got {nnz} other positions")
    return blocks


def _cut(blocks: _Blocks, side: int, size: int, transposed: bool = False) -> _Blocks:
    """Blocks `side` wide, of a W `size` wide, as parts that fit into a tile; transposed: `side` and `size` high."""
    parts = side // TILE
    if parts < 2:
        return blocks
    part = torch.arange(parts, device=blocks.row.device).repeat(blocks.row.numel())
    row, column, tap, within, step = (each.repeat_interleave(parts) for each in blocks)
    if transposed:
        row = row * parts + part
    else:
        column, within = column * parts + part, within + part * TILE * step
    inside = (row if transposed else column) * TILE < size
    return _Blocks(*(each[inside] for each in (row, column, tap, within, step)))


def _tiles(outer: Tensor, rows: int, inner: Tensor, side: int, blocks: _Blocks, taps: tuple[int, int]) -> Tiles:
    """Tiles of blocks `side` long that share their `outer`, of `rows`; the number of tiles is a multiple of _ALIGN."""
    slots = TILE // min(side, TILE)
    word = inner | blocks.tap // taps[1] << 24 | blocks.tap % taps[1] << 16
    by_row = torch.argsort(outer, stable=True)
    counts = torch.bincount(outer, minlength=rows)
    tiles = (counts + slots - 1) // slots
    tile_crow = torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
    first = counts.cumsum(0) - counts
    tile_row = torch.repeat_interleave(torch.arange(rows, device=outer.device), tiles)
    slot = torch.arange(tile_row.numel() * slots, device=outer.device)
    row = tile_row.repeat_interleave(slots)
    rank = slot - tile_crow[row] * slots
    live = rank < counts[row]
    block = by_row[first[row] + torch.minimum(rank, counts[row] - 1)]
    within = torch.where(live, blocks.within[block], -1)
    surplus = tile_row.new_full((_round_up(tile_row.numel()) - tile_row.numel(),), -1)
    order = torch.argsort(tiles, descending=True, stable=True)
    return Tiles(order, tile_crow, torch.cat([tile_row, surplus]), within, blocks.step[block], word[block])
