"""Rows with the same columns, which native kernels multiply four at a time (quads), wherever they stand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chains import assert_accurate, assert_exact, integers, of_masks, run, truth
from convs import geometry, make

from sparselottery.kernels import cpu, reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not cpu.available(), reason=cpu.status()),
]
DTYPES = [torch.float32, torch.float64]
RUNS = [1, 4, 3, 5, 2, 8, 7, 1, 1, 16, 6, 33]  # alike rows, one run after the other


def alike(rows: int, columns: int, density: float, runs: list[int]) -> torch.Tensor:
    """A mask (rows, columns) of such runs; the third has no weights, the last all."""
    kinds = torch.rand(len(runs), columns) < density
    kinds[2 % len(runs)], kinds[-1] = False, True
    mask = kinds.repeat_interleave(torch.tensor(runs), 0)
    return mask.repeat(-(-rows // len(mask)), 1)[:rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 17, 48, 80, 128, 300])
def test_runs_of_every_length(level, batch, dtype):
    for tile in (None, (32, 7)):
        masks = [alike(150, 45, 0.3, RUNS), alike(21, 150, 0.1, RUNS)]
        chain = of_masks(batch, masks).to(dtype)
        assert_exact(run(cpu, chain, tile), chain)
        y, _ = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(tile), False, False)
        assert torch.equal(y.double(), truth(chain)["y"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(4, 1), (8, 1), (8, 8), (16, 16)])
def test_accuracy_of_blocks(block, dtype):
    rows, columns = block
    grid = torch.rand(-(-300 // rows), -(-700 // columns)) < 0.2
    mask = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:300, :700]
    for batch in (17, 130):
        chain = of_masks(batch, [mask], lambda *shape: torch.randn(shape)).to(dtype)
        assert_accurate(run(cpu, chain), chain)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("batch", [64, 80, 200])
def test_a_row_has_the_same_bits_in_a_quad_and_alone(level, batch, dtype):
    chain = of_masks(batch, [alike(96, 90, 0.4, [16, 16, 16, 16])], lambda *shape: torch.randn(shape)).to(dtype)
    order = torch.arange(96).view(-1, 16).T.flatten()  # rows that follow each other are no more alike
    mask = chain.masks[0]
    weight = torch.zeros(mask.shape, dtype=dtype).masked_scatter(mask, chain.values[0])
    apart = of_masks(batch, [mask[order]])
    plans = [each.indices((48, 32)) for each in (chain, apart)]
    values, biases = weight[order][mask[order]], chain.biases[0][order]
    together, _ = cpu.chain_forward(chain.x, chain.values, chain.biases, *plans[0], False, False)
    alone, _ = cpu.chain_forward(chain.x, [values], [biases], *plans[1], False, False)
    assert torch.equal(together[:, order], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [17, 129])
def test_threads_change_no_bit(level, batch, dtype):
    masks = [alike(150, 300, 0.2, RUNS), alike(40, 150, 0.2, RUNS)]
    chain = of_masks(batch, masks, lambda *shape: torch.randn(shape)).to(dtype)
    torch.set_num_threads(1)
    alone = run(cpu, chain)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, result in run(cpu, chain).items():
            assert torch.equal(result, alone[name]), (threads, name)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("batch", [17, 128])
def test_what_is_not_finite_stays_with_who_reads_it(batch, bad):
    chain = of_masks(batch, [alike(150, 45, 0.3, RUNS)])
    chain.x[5, 7] = bad
    y, _ = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, False)
    others = torch.arange(batch) != 5
    unread = ~chain.masks[0][:, 7]
    assert y[others].isfinite().all()
    assert y[5, unread].isfinite().all()
    reference_y, _ = reference.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, False)
    assert y[5, ~unread].isfinite().equal(reference_y[5, ~unread].isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "batch", "size"),
    [
        (geometry(6, sides=(1, 1, 1, 1)), 3, (20, 18)),
        (geometry(6, sides=(1, 1, 1, 1)), 150, (2, 2)),
        (geometry(6, stride=(2, 2), groups=2), 17, (9, 8)),
        (geometry(20, (1, 1)), 9, (7, 7)),
    ],
    ids=["pixels", "images", "groups and a stride", "1x1"],
)
def test_convolutions(level, shape, batch, size, dtype):
    conv = make(shape, 22, batch, size, relu=True)
    mask = alike(22, shape.columns, 0.3, [1, 4, 9, 3, 5]).view(conv.mask.shape)
    conv = replace(conv, mask=mask, values=integers(int(mask.sum()))).to(dtype)
    how = (*conv.indices(), conv.geometry, True, 1)
    y, _ = cpu.conv_forward(conv.x, conv.values, conv.bias, *how)
    true = conv.to(torch.float64)
    expected, _ = reference.conv_forward(true.x, true.values, true.bias, *how)
    assert torch.equal(y.double(), expected)
