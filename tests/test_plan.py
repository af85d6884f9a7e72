"""Plans of the native kernels, built by several threads."""

from __future__ import annotations

import pytest
import torch

from sparselottery import Pattern
from sparselottery.kernels import cpu
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
