"""Models, inputs and comparisons of the tests of what a host program does to a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import sparselottery as sl


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 7))


def cnn() -> nn.Sequential:
    conv = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*conv, nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 5))


MODELS = {"mlp": (mlp, (4, 20)), "cnn": (cnn, (4, 3, 8, 8))}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def one_thread() -> Iterator[None]:
    """A frozen net measures by how many threads an image is shared, and that decides the last bits of its results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def case_of(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """(dense model in evaluation mode, masks, input)."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    return model, sl.prune(model, 0.7), torch.randn(shape)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
