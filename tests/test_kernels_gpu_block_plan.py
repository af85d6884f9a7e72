"""Plans of blocks: where the blocks of a mask are, and which blocks have kernels."""

from __future__ import annotations

import pytest
import torch
from blocks import blocky
from convs import geometry

from sparselottery import Pattern
from sparselottery.pattern import BLOCKS

triton = pytest.importorskip("triton")
from sparselottery.kernels.gpu import block  # noqa: E402
from sparselottery.kernels.gpu.block.plan import TILE, tiled, views  # noqa: E402

CPU = torch.device("cpu")


def positions(words, pattern, width, shape, transposed):
    """(row, column) of all blocks of a plan."""
    tiles = views(words, len(pattern.crow_indices) - 1, width, shape)[transposed]
    slots, found = TILE // tiled(shape, transposed)[not transposed], []
    for slot, within in enumerate(tiles.within.tolist()):
        outer, inner = int(tiles.tile_row[slot // slots]), int(tiles.word[slot])
        if outer >= 0 and within >= 0:
            found.append((inner, outer) if transposed else (outer, inner))
    return found


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_plan_lists_every_block_once(shape, transposed):
    if transposed and shape[1] == 1:
        pytest.skip("columns have no transposed plan")
    mask = blocky((200, 300), shape)
    pattern = Pattern.from_mask(mask)
    words = block.plan.build(pattern.crow_indices, pattern.col_indices, 300, shape)
    rows, columns = tiled(shape, transposed)
    expected = mask[::rows, ::columns].nonzero().tolist()
    assert sorted(positions(words, pattern, 300, shape, transposed)) == [tuple(at) for at in expected]


def test_plan_starts_with_the_heaviest_rows():
    mask = torch.zeros(48, 640, dtype=torch.bool)
    mask[16:32], mask[32:, :160] = True, True
    pattern = Pattern.from_mask(mask)
    words = block.plan.build(pattern.crow_indices, pattern.col_indices, 640, (16, 16))
    assert views(words, 48, 640, (16, 16)).forward.order.tolist() == [1, 2, 0]


@pytest.mark.parametrize("flip", [(0, 0), (17, 3), (31, 63)])
def test_plan_refuses_other_masks(flip):
    mask = blocky((32, 64), (16, 16))
    mask[flip] ^= True
    pattern = Pattern.from_mask(mask)
    with pytest.raises(ValueError, match=r"expected a pattern of whole blocks \(16, 16\)"):
        block.plan.build(pattern.crow_indices, pattern.col_indices, 64, (16, 16))


def test_plan_refuses_huge_kernels():
    of = geometry(16, (1, 257))
    pattern = Pattern.from_mask(torch.zeros(16, of.columns, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected kernel_h, kernel_w and blocks up to"):
        block.plan.build(pattern.crow_indices, pattern.col_indices, of.columns, (16, 16), of)


def test_blocks_wider_than_a_tile_are_listed_in_parts_within_the_border():
    mask = torch.zeros(190, 140, dtype=torch.bool)
    mask[:128, :128], mask[128:, 128:] = True, True
    pattern = Pattern.from_mask(mask)
    words = block.plan.build(pattern.crow_indices, pattern.col_indices, 140, (128, 128))
    assert sorted(positions(words, pattern, 140, (128, 128), False)) == [(0, 0), (0, 1), (1, 2)]
    assert sorted(positions(words, pattern, 140, (128, 128), True)) == [(0, 0), (1, 0), (2, 1)]
    assert views(words, 190, 140, (128, 128)).forward.within[:3].tolist() == [0, 64, 0]


def test_takes():
    assert all(block.takes(shape, CPU) for shape in BLOCKS)
    assert not any(block.takes(shape, CPU) for shape in [(1, 1), (4, 4), (16, 32), (8, 1), (1, 16)])
    assert block.takes((32, 32), CPU, geometry(64))
    assert not block.takes((8, 8), CPU, geometry(64))
    assert not block.takes((32, 1), CPU, geometry(64))
    assert not block.takes((32, 32), CPU, geometry(64, groups=2))
