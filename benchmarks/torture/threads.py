"""Training, inference and load_sparse from several threads at once: no data race, and the numbers of one thread."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from sparselottery import Pattern, Ticket, convert, load_sparse
from sparselottery.kernels import cpu_train

from . import sanitizers

CASES = 2_000
THREADS = 8
prepare = sanitizers.of_threads


@contextlib.contextmanager
def trial(folder: Path) -> Iterator[Callable[[random.Random], None]]:
    sanitizers.use(folder)
    kinds = trained_at_once, trained_by_torch, one_frozen_net, files_loaded, one_converted_net

    def attempt(draw: random.Random) -> None:
        torch.manual_seed(draw.randrange(2**32))
        draw.choice(kinds)(draw, folder)

    yield attempt


def trained_at_once(draw: random.Random, _: Path) -> None:
    """Steps in one native call, whose threads meet without OpenMP's barrier: the same bits whatever their number."""
    widths = [draw.randrange(1, 200) for _ in range(draw.randrange(2, 5))]
    nets, batch, steps = (masks_of(widths, draw.random()), draw.randrange(1, 70), draw.randrange(1, 6))
    images, labels = torch.randn(100, widths[0]), torch.randint(widths[-1], (100,))
    order, rule = torch.randint(100, (steps, batch)), draw.choice(["adam", "sgd"])
    constants = [0.9, 0.999, 1e-8, 0.01] if rule == "adam" else [0.9, 0.01]
    found = []
    for threads in (1, draw.randrange(2, THREADS + 1)):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        layers = [
            cpu_train.Layer(each.shape[1], *_csr(each), torch.randn(int(each.sum())), torch.randn(len(each)))
            for each in nets
        ]
        cpu_train.Trainer(layers, rule, constants)(images, labels, order, [1e-3] * steps)
        found.append([tensor for layer in layers for tensor in (layer.values, layer.bias)])
    assert all(map(torch.equal, *found)), "other weights with more threads"


def trained_by_torch(draw: random.Random, _: Path) -> None:
    """Models of their own, trained by threads that share nothing but the library."""
    torch.set_num_threads(draw.randrange(1, 4))
    model, shape = converted(draw)
    x = torch.randn(draw.randrange(1, 40), *shape)

    def gradients() -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        own(x).square().sum().backward()
        return [parameter.grad for parameter in own.parameters()]

    expected = gradients()
    for found in at_once(gradients, draw.randrange(2, THREADS + 1)):
        assert all(map(torch.equal, found, expected)), "other gradients in another thread"


def one_converted_net(draw: random.Random, _: Path) -> None:
    torch.set_num_threads(draw.randrange(1, 4))
    model, shape = converted(draw)
    x = torch.randn(draw.randrange(1, 40), *shape)
    with torch.no_grad():
        expected = model.eval()(x)

    def infer() -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    assert all(found.equal(expected) for found in at_once(infer))


def one_frozen_net(draw: random.Random, folder: Path) -> None:
    """Called by all for the first time at once, with inputs of several sizes."""
    torch.set_num_threads(draw.randrange(1, 4))
    model, shape = converted(draw)
    Ticket.from_model(model).save(folder / "net")
    sizes = [draw.choice([1, 1, 2, 5, 16, 33]) for _ in range(3)]
    inputs = [torch.randn(size, *shape) for size in sizes]
    expected = [load_sparse(folder / "net")(x) for x in inputs]
    net = load_sparse(folder / "net")
    for found in at_once(lambda: [net(x) for x in inputs]):
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted)


def files_loaded(draw: random.Random, folder: Path) -> None:
    torch.set_num_threads(draw.randrange(1, 4))
    model, shape = converted(draw)
    Ticket.from_model(model).save(folder / "net")
    x = torch.randn(draw.randrange(1, 20), *shape)
    expected = load_sparse(folder / "net")(x)
    for found in at_once(lambda: load_sparse(folder / "net")(x)):
        torch.testing.assert_close(found, expected)


def at_once(call: Callable[[], object], threads: int = THREADS) -> list:
    """What the call returns in each of so many threads, which begin together; raises what one of them raises."""
    start, found, errors = threading.Barrier(threads), [], []

    def run() -> None:
        start.wait()
        try:
            for _ in range(3):
                found.append(call())
        except Exception as error:  # raised below, in the thread that judges
            errors.append(error)

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return found


def converted(draw: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A net of our layers, and the shape of an input."""
    if draw.random() < 0.5:
        widths = [draw.randrange(1, 100) for _ in range(draw.randrange(2, 5))]
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        model, shape = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU()))), (widths[0],)
    else:
        channels, side = draw.randrange(1, 9), draw.randrange(4, 13)
        convs = nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)
        head = nn.Flatten(), nn.Linear(channels * (side // 2) ** 2, 5)
        model, shape = nn.Sequential(*convs, *head).eval(), (2, side, side)
    density = draw.random()
    masks = {
        f"{name}.weight": torch.rand(module.weight.shape) < density
        for name, module in model.named_children()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    return convert(model, masks), shape


def masks_of(widths: list[int], density: float) -> list[torch.Tensor]:
    return [torch.rand(rows, columns) < density for columns, rows in pairwise(widths)]


def _csr(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pattern = Pattern.from_mask(mask)
    return pattern.crow_indices, pattern.col_indices
