"""Frozen chains whose rows that are alike are put together, which only kernels see."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from chains import spy
from torch import nn

from sparselottery import Pattern, Ticket, convert, load_sparse, to_dense
from sparselottery.kernels import cpu
from sparselottery.kernels.cpu_stages import Linear
from sparselottery.runtime.alike import together

WIDTHS = (70, 64, 48, 30)


def scattered(rows: int, columns: int, block: tuple[int, int]) -> torch.Tensor:
    """A mask of blocks in another order of its rows and columns; of single weights, with empty rows and a full one."""
    grid = torch.rand(-(-rows // block[0]), -(-columns // block[1])) < 0.4
    grid[:, 0] = True  # no block of rows is empty
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
    if block == (1, 1):
        mask[5:10], mask[3] = False, True
    return mask[torch.randperm(rows)][:, torch.randperm(columns)]


def stages_of(masks: list[torch.Tensor], bias: bool = True) -> list[Linear]:
    stages = []
    for number, mask in enumerate(masks, 1):
        pattern = Pattern.from_mask(mask)
        values, of_rows = torch.randn(pattern.nnz), torch.randn(len(mask)) if bias else None
        stages.append(Linear(mask.shape[1], *pattern.indices, values, of_rows, number < len(masks)))
    return stages


def product(stages: list[Linear], x: torch.Tensor) -> torch.Tensor:
    for stage in stages:
        pattern = Pattern(stage.crow_indices, stage.col_indices, (len(stage.crow_indices) - 1, stage.in_features))
        y = x @ pattern.scatter(stage.values.double()).T
        y = y if stage.bias is None else y + stage.bias
        x = y.relu() if stage.relu else y
    return x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [(4, 1), (8, 8), (16, 1)])
def test_the_same_chain_with_alike_rows_together(block, bias):
    stages = stages_of([scattered(o, i, block) for i, o in pairwise(WIDTHS)], bias)
    placed, x = together(stages), torch.randn(9, WIDTHS[0], dtype=torch.float64)
    torch.testing.assert_close(product(placed, x), product(stages, x))
    for number, stage in enumerate(placed):
        mask = Pattern(stage.crow_indices, stage.col_indices, (WIDTHS[number + 1], WIDTHS[number])).mask()
        blocks = mask.view(-1, block[0], mask.shape[1]) if len(mask) % block[0] == 0 else mask[None]
        assert bool((blocks == blocks[:, :1]).all()) == (number < 2)  # the last layer's rows stay


def test_what_has_no_alike_rows_stays_as_it_is():
    single = stages_of([scattered(o, i, (1, 1)) for i, o in pairwise(WIDTHS)])
    whole = stages_of([torch.rand(8, 70).lt(0.3).repeat_interleave(8, 0), torch.rand(30, 64) < 0.3])
    for stages in (single, whole):
        assert all(a is b for a, b in zip(together(stages), stages, strict=True))


@pytest.mark.skipif(not cpu.available(), reason=cpu.status())
def test_frozen_nets_multiply_the_rows_of_permuted_blocks_together(monkeypatch, tmp_path):
    model = nn.Sequential(nn.Linear(70, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    net = convert(model, {"0.weight": scattered(64, 70, (16, 16)), "2.weight": torch.rand(10, 64) < 0.5})
    Ticket.from_model(net).save(tmp_path / "net.safetensors")
    frozen, found = load_sparse(tmp_path / "net.safetensors", model), []
    spy(monkeypatch, "quads", lambda call, *args: found.append(call(*args)))
    x = torch.randn(40, 70)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), to_dense(net)(x), rtol=1e-4, atol=1e-5)
    assert found == [16, 0]
