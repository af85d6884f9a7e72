"""Batches of 1 to 4 without gradients, on every native level that this processor runs: rows of W straight from CSR."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from chains import make, of_masks, truth

from sparselottery import MaskedLinear
from sparselottery.kernels import cpu

pytestmark = pytest.mark.usefixtures("level")
FEW = pytest.mark.parametrize("batch", [1, 2, 3, 4])


def forward(chain, save=False):
    return cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, save)[0]


@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_every_length(batch, dtype, bias):
    triangle = torch.ones(70, 70, dtype=torch.bool).tril(-1)  # rows of 0 to 69 entries
    chain = of_masks(batch, [triangle, triangle.flip(0)], bias=bias).to(dtype)
    assert torch.equal(forward(chain).double(), truth(chain)["y"])


@FEW
def test_columns_of_32_bits(batch):
    chain = make(batch, [70_000, 9], density=0.002)
    assert torch.equal(forward(chain).double(), truth(chain)["y"])


@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_bit(batch, dtype):
    chain = make(batch, [300, 100, 50], density=0.2, entries=torch.randn).to(dtype)
    torch.set_num_threads(1)
    alone = forward(chain)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(forward(chain), alone), threads


@FEW
@pytest.mark.parametrize("bad", [nan, inf])
def test_what_is_not_finite_stays_in_its_row(batch, bad):
    """Rows follow each other without a gap, and lanes that a row does not fill must not read the next one's."""
    chain = of_masks(batch, [torch.ones(40, 40, dtype=torch.bool).tril()], entries=torch.ones)
    chain.values[0][chain.patterns[0].crow_indices[20]] = bad
    y = forward(chain)
    assert not y[:, 20].isfinite().any()
    assert y[:, torch.arange(40) != 20].isfinite().all()


@FEW
def test_an_infinite_input_reaches_only_who_reads_it(batch):
    chain = of_masks(batch, [torch.ones(40, 40, dtype=torch.bool).tril()], entries=torch.ones)
    chain.x[0, 20] = inf
    y = forward(chain)
    assert y[0, :20].isfinite().all()
    assert (y[0, 20:] == inf).all()
    assert y[1:].isfinite().all()


@FEW
@pytest.mark.parametrize("nnz", range(1, 18))
def test_nothing_behind_the_values_is_used(batch, nnz):
    chain = of_masks(batch, [torch.arange(20)[None] < nnz])
    memory = torch.full((nnz + 32,), nan)
    memory[:nnz] = chain.values[0]
    expected = truth(chain)["y"]
    chain.values[0] = memory[:nnz]
    assert torch.equal(forward(chain).double(), expected)


@FEW
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_values_are_never_stale(batch, context):
    """However they are written to: nothing is kept of them."""
    layer = MaskedLinear(40, 30, mask=torch.rand(30, 40) < 0.3).eval()
    x = torch.randn(batch, 40)

    def by_optimiser():
        layer(x).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()

    writes = [
        by_optimiser,
        lambda: layer.values.data.mul_(2),
        lambda: layer.values.detach().numpy().__imul__(2),
        lambda: setattr(layer.values, "data", layer.values.data.clone() * 2),
    ]
    with context():
        before = layer(x)
    for write in writes:
        write()
        with context():
            y = layer(x)
        expected = torch.nn.functional.linear(x.double(), layer.weight.detach().double(), layer.bias.detach().double())
        assert not torch.equal(y, before)
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        before = y
