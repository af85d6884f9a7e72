"""Plans of the native kernels: what is in them, and by how many threads they are built."""

from __future__ import annotations

import pytest
import torch

from sparselottery import Pattern
from sparselottery.kernels import cpu
from sparselottery.kernels.abi import PLAN_HEADER
from sparselottery.kernels.reference import Geometry

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.status())
ROWS = 610  # not a multiple of a strip, and enough for a team
GEOMETRIES = {
    "stride": Geometry(72, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1),
    "groups": Geometry(160, 3, 3, 1, 2, 0, 0, 1, 1, 1, 1, 2),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def mask_of(columns: int, density: float) -> torch.Tensor:
    mask = torch.rand(ROWS, columns, generator=torch.Generator().manual_seed(0)) < density
    mask[:, 5], mask[7] = False, False
    return mask


@pytest.mark.parametrize(("columns", "density"), [(500, 0.6), (500, 1), (2100, 0.15), (70_000, 0.002)])
def test_threads_change_no_bit(columns, density, threads):
    pattern = Pattern.from_mask(mask_of(columns, density))
    assert pattern.nnz > 2**16
    plans = []
    for count in (1, 2, 3):
        threads(count)
        plans.append(cpu.plan(pattern.crow_indices, pattern.col_indices, columns))
    assert all(torch.equal(plans[0], plan) for plan in plans[1:])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_threads_change_no_bit_of_a_convolution(geometry, threads):
    columns = geometry.channels // geometry.groups * geometry.kernel_h * geometry.kernel_w
    pattern = Pattern.from_mask(mask_of(columns, 0.8))
    assert pattern.nnz > 4 * 2**16  # more than a team needs, in each phase
    plans = []
    for count in (1, 2, 3):
        threads(count)
        plans.append(cpu.conv_plan(pattern.crow_indices, pattern.col_indices, geometry))
    assert all(torch.equal(plans[0], plan) for plan in plans[1:])


def entries(plan: torch.Tensor, transposed: bool) -> dict[tuple[int, int], int]:
    """Of each entry of W, or of Wᵀ, in a plan (csrc/plan.h): the index of its value by (row, column)."""
    words, at = plan.numpy(), PLAN_HEADER + 12 * transposed
    _, _, strip, block, strips, blocks, *arrays = words[at : at + 12].tolist()
    tiles, buckets, rows, values, columns, of_entries = (words[each:] for each in arrays)
    rows, columns, found = rows.view("uint16"), columns.view("uint16"), {}
    for tile in range(strips * blocks):
        bucket, segment, entry, last = tiles[3 * tile : 3 * tile + 4].tolist()
        for length, count, alike in buckets[3 * bucket : 3 * last].reshape(-1, 3).tolist():
            assert count % alike == 0
            for segment in range(segment, segment + count):  # noqa: B020
                for k in range(length):
                    place = tile // blocks * strip + int(rows[segment]), tile % blocks * block + int(columns[entry + k])
                    found[place] = int(of_entries[entry + k] if transposed else values[segment] + k)
                entry += length
            segment += 1
    return found


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("density", [0, 0.03, 0.3, 1])
@pytest.mark.parametrize("columns", [1, 15, 150, 300])
def test_a_plan_has_each_value_once_at_its_place(columns, density, backward):
    """Of few values, whose runs end where the indices do, and whose transpose is read at once."""
    pattern = Pattern.from_mask(mask_of(max(columns, 6), density)[:110, :columns])
    plan = cpu.plan(pattern.crow_indices, pattern.col_indices, columns, tile=(32, 64))
    places = zip(pattern.row_indices().tolist(), pattern.col_indices.tolist(), strict=True)
    expected = {place[::-1] if backward else place: index for index, place in enumerate(places)}
    assert entries(plan, backward) == expected


def test_tiles_of_the_transpose_are_wider():
    pattern = Pattern.from_mask(mask_of(300, 0.03))
    plan = cpu.plan(pattern.crow_indices, pattern.col_indices, 300)
    blocks = [int(plan[PLAN_HEADER + 12 * transposed + 3]) for transposed in (False, True)]
    assert blocks == list(cpu.tile_shape(*pattern.shape, pattern.nnz)[1:3]) == [256, 512]
    places = zip(pattern.row_indices().tolist(), pattern.col_indices.tolist(), strict=True)
    assert entries(plan, True) == {place[::-1]: index for index, place in enumerate(places)}


def shared(mask: torch.Tensor, **how) -> int:
    """Of how many entries of W its plan says that four rows have them in the same columns; it says so of no others."""
    pattern = Pattern.from_mask(mask)
    words = cpu.plan(pattern.crow_indices, pattern.col_indices, mask.shape[1], **how).numpy()
    _, _, strip, _, strips, blocks, *arrays = words[PLAN_HEADER : PLAN_HEADER + 12].tolist()
    tiles, buckets, rows, _, columns, _ = (words[each:] for each in arrays)
    rows, columns, found = rows.view("uint16"), columns.view("uint16"), 0
    for tile in range(strips * blocks):
        bucket, segment, entry, last = tiles[3 * tile : 3 * tile + 4].tolist()
        for length, count, alike in buckets[3 * bucket : 3 * last].reshape(-1, 3).tolist():
            for at in range(0, count, alike):
                of_rows = columns[entry : entry + alike * length].reshape(alike, length)
                assert (of_rows == of_rows[0]).all()
                row = rows[segment + at : segment + at + alike].astype(int) + tile // blocks * strip
                assert bool((mask[row] == mask[row[0]]).all())
                found += alike * length * (alike > 1)
                entry += alike * length
            segment += count
    return found


@pytest.mark.parametrize("block", [(4, 1), (8, 8), (16, 1), (16, 16)])
def test_a_plan_knows_the_rows_of_blocks(block):
    rows, columns = block
    grid = torch.rand(64 // rows, 96 // columns, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    assert shared(mask) == shared(mask, tile=(16, 24)) == int(mask.sum()) > 0


def test_a_plan_knows_alike_rows_anywhere_in_a_strip():
    mask = mask_of(96, 0.3)[:64]
    assert shared(mask) == 0
    mask[9:14], mask[30:34] = mask[9], mask[30]  # five rows, and four that two strips share
    assert shared(mask, tile=(32, 24)) == 4 * int(mask[9].sum())
    assert shared(mask, tile=(64, 24), strips=(64, 64)) == 4 * int(mask[9].sum() + mask[30].sum())
    mask[20:24] = False
    assert shared(mask, tile=(32, 24)) == 4 * int(mask[9].sum())
    mask[40:47], mask[42, 3] = mask[40], ~mask[40, 3]  # one weight apart
    assert shared(mask, tile=(32, 24)) == 4 * int(mask[9].sum() + mask[43].sum())


def test_tiles_are_wide_where_most_weights_are_of_alike_rows():
    """Single weights keep the tiles that their density asks for."""
    mask = mask_of(1000, 0.05)[:64]
    assert blocks_of(mask) > 3
    mask[:36] = mask[:36:4].repeat_interleave(4, 0)
    assert blocks_of(mask) == 2


def blocks_of(mask: torch.Tensor) -> int:
    pattern = Pattern.from_mask(mask)
    return int(cpu.plan(pattern.crow_indices, pattern.col_indices, mask.shape[1])[PLAN_HEADER + 5])
