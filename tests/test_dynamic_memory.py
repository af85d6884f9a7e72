"""No tensor of the size of the dense weights is made in a step, whoever decides."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sparselottery import MaskedLinear, dynamic

SIDE, DENSITY = 8192, 0.001
MASK = SIDE * SIDE  # bytes of a bool mask, the smallest dense tensor
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
METHODS = {
    "set": lambda m, o: dynamic.set_training(m, o, DENSITY, end=9, every=2),
    "rigl": lambda m, o: dynamic.rigl(m, o, DENSITY, end=9, every=2),
    "rigl-sampled": lambda m, o: dynamic.rigl(m, o, DENSITY, end=9, every=2, candidates=3),
    "momentum": lambda m, o: dynamic.set_training(m, o, DENSITY, end=9, every=3, grow="momentum", window=2),
    "topk": lambda m, o: dynamic.topk(m, o, DENSITY / 2, end=9, initial=DENSITY),
}


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM the most so far."""
    lines = (line.split(":") for line in STATUS.read_text().splitlines())
    return 1024 * int(dict(lines)[key].split()[0])


def resident_at_rest() -> int:
    """Without what was freed and is kept for later: nobody would see that used again."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another libc has none
        ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    found = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    found.view(-1)[:: round(1 / DENSITY)] = True
    return found


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_peak_of_training_is_below_a_dense_mask(method, mask):
    try:
        FORGET.write_text("5")
    except OSError:
        pytest.skip("expected a system that forgets the peak of a process")
    layer = MaskedLinear(SIDE, SIDE, bias=False, mask=mask)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    updater = method(layer, optimizer)
    x, moved = torch.randn(4, SIDE), []

    def step() -> None:
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        moved.append(updater.step())

    step()
    before = resident_at_rest()
    FORGET.write_text("5")
    for _ in range(3):
        step()
    assert any(moved[1:])
    assert resident("VmHWM") - before < MASK
    assert layer.nnz <= DENSITY * MASK + 1


def test_a_dense_mask_would_be_seen(mask):
    try:
        FORGET.write_text("5")
    except OSError:
        pytest.skip("expected a system that forgets the peak of a process")
    before = resident_at_rest()
    FORGET.write_text("5")
    other = mask.clone()
    assert resident("VmHWM") - before > 0.9 * MASK
    assert other.shape == mask.shape
