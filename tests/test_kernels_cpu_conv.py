"""The native convolutions on every level: all shapes of their cuts against dense fp64, and no bit by threads."""

from __future__ import annotations

import pytest
import torch
from convs import FORMATS, Conv, geometry, make

from sparselottery.kernels import cpu, reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not cpu.available(), reason=cpu.status()),
]
PADDED = (1, 1, 1, 1)
DTYPES = [torch.float32, torch.float64]
# Name -> geometry, filters, batch, size, pool.
CUTS = {
    "rows of few images": (geometry(9, sides=PADDED), 20, 2, (20, 18), 1),
    "rows of many images": (geometry(5, sides=PADDED), 20, 33, (23, 9), 1),
    "groups of images": (geometry(5, sides=PADDED), 20, 150, (2, 2), 1),
    "stride": (geometry(6, stride=(2, 2), sides=PADDED), 9, 40, (17, 15), 1),
    "rows of two phases": (geometry(1, (3, 1), (2, 1), (0, 1, 0, 3)), 3, 1, (5, 3), 1),
    "pooled": (geometry(3, sides=PADDED), 20, 3, (30, 12), 3),
    "1x1, images as rows": (geometry(20, (1, 1)), 40, 9, (7, 7), 1),
    "1x1, images apart": (geometry(40, (1, 1)), 70, 2, (60, 56), 1),
    "1x1, tiny images": (geometry(20, (1, 1)), 40, 40, (2, 3), 1),
    "1x1, stride": (geometry(20, (1, 1), (2, 3)), 40, 5, (14, 13), 1),
    "1x1, padded": (geometry(6, (1, 1), sides=(1, 0, 2, 0)), 5, 20, (6, 5), 1),
    "1x1, cropped by a stride": (geometry(6, (1, 1), (1, 2)), 5, 3, (6, 9), 2),
    "1x1, groups": (geometry(8, (1, 1), groups=2), 6, 3, (5, 5), 1),
}


def problem(name: str, relu: bool, memory_format: str, **options) -> Conv:
    shape, filters, batch, size, pool = CUTS[name]
    return make(shape, filters, batch, size, 0.2, relu=relu, pool=pool, memory_format=memory_format, **options)


def run(backend, conv: Conv, need_x: bool = True) -> list[torch.Tensor]:
    """y, gx if `need_x`, gvalues and gbias, and the winners of a pooling."""
    indices, how = conv.indices(), (conv.geometry, conv.relu, conv.pool)
    y, winners = backend.conv_forward(conv.x, conv.values, conv.bias, *indices, *how)
    args = conv.gy, conv.x, y, winners, conv.values, *indices, *how
    return [y, *backend.conv_backward(*args, need_x, True, True)[not need_x :], *([winners] if conv.pool > 1 else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CUTS)
def test_levels_agree(level, name, memory_format, dtype):
    for relu, need_x in ((False, True), (True, True), (True, False)):
        conv = problem(name, relu, memory_format).to(dtype)
        for got, expected in zip(run(cpu, conv, need_x), run(reference, conv.to(torch.float64), need_x), strict=True):
            assert torch.equal(got.to(expected.dtype), expected), (relu, need_x)
            assert reference.image_format(got) == reference.image_format(expected) if got.dim() == 4 else True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CUTS)
def test_threads_change_no_bit(level, name, dtype):
    """Sums go by items of work, and what these are may not depend on who works on them."""
    conv = problem(name, True, "contiguous", entries=torch.randn).to(dtype)
    for need_x in (True, False):
        torch.set_num_threads(1)
        alone = run(cpu, conv, need_x)
        for threads in (2, 3, 5, 8):
            torch.set_num_threads(threads)
            for i, result in enumerate(run(cpu, conv, need_x)):
                assert torch.equal(result, alone[i]), (threads, need_x, i)
