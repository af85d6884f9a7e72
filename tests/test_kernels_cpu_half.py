"""Native kernels on 16 bits (csrc/half.h): numbers as torch rounds them, and sums that are rounded once."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from chains import assert_accurate, assert_exact, make, of_masks, run, truth

from sparselottery.kernels import cpu, reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(not cpu.available(), reason=cpu.status()),
]
HALVES = [torch.bfloat16, torch.float16]


def packed(x, ld):
    """x with strides (1, ld); what lies between its columns is NaN."""
    memory = torch.full((x.shape[1], ld), math.nan, dtype=x.dtype)
    memory[:, : len(x)] = x.t()
    return memory[:, : len(x)].t()


def gaussian(*shape):
    return torch.randn(shape)


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: torch.stack([x, x * math.nan], 1)[:, 0],
    "every other column": lambda x: torch.stack([x, x * math.nan], 2)[:, :, 0],
    "batch-minor": lambda x: packed(x, reference.leading_dim(len(x)) + 48),
}
MASKS = [
    [torch.zeros(40, 33, dtype=torch.bool)],
    [torch.eye(40, 33, dtype=torch.bool), torch.zeros(7, 40, dtype=torch.bool)],
    [torch.eye(1, 33, dtype=torch.bool), torch.ones(20, 1, dtype=torch.bool)],
]


def bits(numbers):
    """For comparison: every NaN is as good as another, and so are both zeros."""
    return torch.where(numbers.isnan(), math.nan, numbers + 0).view(torch.int16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 5, 256])
def test_every_number_is_widened_and_rounded_as_by_torch(level, rows, dtype):
    """Subnormal, infinite and NaN as well: x times an identity, with a bias of random bits."""
    numbers = torch.arange(2**16).to(torch.int16).view(dtype).view(2**8, 2**8)
    indices = of_masks(1, [torch.eye(2**8, dtype=torch.bool)]).indices()
    one, bias = torch.ones(2**8, dtype=dtype), numbers.flatten()[torch.randperm(2**16)[: 2**8]]
    for x, b in itertools.product(numbers.split(rows), (None, bias)):
        y, _ = cpu.chain_forward(x, [one], [b], *indices, False, False)
        expected = x if b is None else (x.float() + b.float()).to(dtype)
        assert torch.equal(bits(y), bits(expected))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [1, 2, 16, 17, 60, 129, 300])
def test_sums_are_rounded_once(level, batch, dtype):
    """They are whole numbers, exact in fp32, that 16 bits may not hold; hidden ones are few enough to be held."""
    for widths in ([100, 60], [100, 60, 7]):
        chain = make(batch, widths).to(dtype)
        assert_exact(run(cpu, chain), chain)
        y, _ = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, False)
        assert torch.equal(y, truth(chain)["y"].to(dtype))
    noise = make(batch, [100, 60, 7], density=0.3, entries=gaussian).to(dtype)
    assert_accurate(run(cpu, noise), noise)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [1, 3, 17, 60, 144, 300])
def test_threads_change_no_bit(level, batch, dtype):
    chain = make(batch, [300, 100, 10], density=0.05, entries=gaussian).to(dtype)

    def results(threads):
        torch.set_num_threads(threads)
        y, _ = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, False)
        return run(cpu, chain) | {"y of inference": y}

    alone = results(1)
    for threads in (2, 3, 5):
        for name, result in results(threads).items():
            assert torch.equal(result, alone[name]), (threads, name)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("batch", [1, 16, 17, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_inputs(layout, batch, dtype):
    for widths in ([30, 20], [30, 20, 10]):
        plain = make(batch, widths).to(dtype)
        x, gy = LAYOUTS[layout](plain.x), LAYOUTS[layout](plain.gy)
        for chain in (replace(plain, x=x), replace(plain, gy=gy), replace(plain, x=x, gy=gy)):
            assert_exact(run(cpu, chain), plain)
        y, _ = cpu.chain_forward(x, plain.values, plain.biases, *plain.indices(), False, False)
        assert torch.equal(y, truth(plain)["y"].to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_batch_minor_results_and_masks_without_weights(dtype):
    for batch, masks in itertools.product((1, 17, 256), MASKS):
        chain = of_masks(batch, masks, bias=batch > 1).to(dtype)
        assert_exact(run(cpu, chain, batch_minor=True), chain)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("depth", [1, 2])
def test_only_the_needed_gradients(depth, dtype):
    chain = make(300, [30, 20, 10][: depth + 1]).to(dtype)
    indices, all_of_them = chain.indices(), run(cpu, chain)
    _, saved = cpu.chain_forward(chain.x, chain.values, chain.biases, *indices, False, True)
    for need_x, *needs in itertools.product([True, False], repeat=1 + 2 * depth):
        needs = needs[:depth], needs[depth:]
        gx, *grads = cpu.chain_backward(chain.gy, chain.x, saved, chain.values, *indices, need_x, *needs)
        assert torch.equal(gx, all_of_them["gx"]) if need_x else gx is None
        for name, got, need in zip(["gvalues", "gbias"], grads, needs, strict=True):
            for layer in range(depth):
                expected = all_of_them[f"{name} {layer}"]
                assert torch.equal(got[layer], expected) if need[layer] else got[layer] is None


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_saved_is_of_16_bits_and_gives_the_input_back(dtype):
    chain = make(300, [30, 20, 10]).to(dtype)
    _, saved = cpu.chain_forward(chain.x, chain.values, chain.biases, *chain.indices(), False, True)
    assert saved.dtype == dtype
    assert saved.numel() == reference.leading_dim(300) * (30 + 20)
    assert torch.equal(cpu.saved_input(saved, 300, 30, *chain.indices()[:2]), chain.x)
