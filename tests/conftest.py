"""Fixtures of all tests."""

from __future__ import annotations

import math
import os

import pytest
import torch

THREADS = 2

if not torch.cuda.is_available():  # GPU kernels then run in Triton's interpreter, which is chosen by its first import
    os.environ["TRITON_INTERPRET"] = "1"

from sparselottery.kernels import native  # noqa: E402


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers and threads for every test."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=torch.cuda.is_available())
def strict_convolutions(monkeypatch):
    """cuDNN multiplies fp32 as fp32, as products do: torch's default is TF32, for our blocks as well."""
    # by the old name: under the new one, whoever reads or sets the old one raises
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=native.LEVELS.get(torch.backends.cpu.get_cpu_capability(), ("base",)))
def level(request, monkeypatch):
    """Each instruction-set level that was built and that this processor runs, in turn."""
    paths = sorted(native.Path(native.__file__).parent.glob(f"_native_{request.param}.*"))
    if not paths:
        pytest.skip(f"{request.param} was not built")
    monkeypatch.setattr(native, "LIBRARY", native.load(paths[0]))


@pytest.fixture
def poison(monkeypatch):
    """Memory that nobody writes reads as NaN: the floats that torch.empty and its relatives return from Python."""
    with torch.device("cpu"):
        torch.empty(0)  # now torch remembers what takes a default device, for good
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(math.nan)
        return tensor

    return allocate_poisoned
