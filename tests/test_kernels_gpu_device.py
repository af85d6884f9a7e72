"""What a GPU can do: asked once, or assumed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparselottery.kernels.gpu import device as gpus

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch):
    """A GPU of sm_86 that torch would find; the devices of which it was asked."""
    asked = []

    def properties(device):
        asked.append(device)
        limits = {"shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 99 << 10}
        return SimpleNamespace(major=8, minor=6, **limits)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    gpus._of_gpu.cache_clear()
    yield asked
    gpus._of_gpu.cache_clear()


def test_a_gpu_is_asked_once(asked):
    device = torch.device("cuda", 0)
    assert gpus.capability(device) == (8, 6)
    assert gpus.shared_memory(device) == 99 << 10
    assert asked == [device]


def test_the_interpreter_runs_what_an_h100_would():
    assert (gpus.capability(CPU), gpus.shared_memory(CPU)) == ((9, 0), 227 << 10)


def test_assumed(asked):
    with gpus.assumed((12, 0), 99 << 10):
        for device in (CPU, torch.device("cuda", 0)):
            assert (gpus.capability(device), gpus.shared_memory(device)) == ((12, 0), 99 << 10)
        with gpus.assumed((8, 0), 163 << 10):
            assert gpus.capability(CPU) == (8, 0)
        assert gpus.capability(CPU) == (12, 0)
    assert gpus.capability(CPU) == (9, 0)
    assert asked == []
