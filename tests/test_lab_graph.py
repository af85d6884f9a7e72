"""When a step runs eagerly, when it is captured, and what a replay reads."""

from __future__ import annotations

import pytest
import torch

from sparselottery.graphs import WARM_UP
from sparselottery.lab import graph
from sparselottery.lab.graph import GraphedStep

CPU = torch.device("cpu")


class Fake:
    """Where eager steps run, and a graph that can be captured and replayed: everything that happens, in order."""

    def __init__(self):
        self.happened, self.where = [], "here"

    def step(self, x, y, lr):
        self.happened.append((self.where, x.tolist(), y.tolist(), round(lr.item(), 3)))

    def on_another_stream(self, work, device):
        assert device == CPU
        self.where = "aside"
        work()
        self.where = "here"

    def captured(self, work, device):
        assert device == CPU
        self.happened.append("captured")

        def replay():
            self.where = "replayed"
            work()
            self.where = "here"

        return replay


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(graph, "on_another_stream", fake.on_another_stream)
    monkeypatch.setattr(graph, "captured", fake.captured)
    return fake


def batch(*numbers):
    return torch.tensor(numbers, dtype=torch.float32), torch.tensor(numbers)


def test_eager_then_captured_then_replayed(fake):
    step = GraphedStep(fake.step, CPU, 0.5)
    for number in range(WARM_UP + 2):
        step(*batch(number, 1), 0.1 * number)
    step(*batch(7, 8))
    assert fake.happened == [
        *(("aside", [number, 1], [number, 1], round(0.1 * number, 3)) for number in range(WARM_UP)),
        "captured",
        ("replayed", [WARM_UP, 1], [WARM_UP, 1], round(0.1 * WARM_UP, 3)),
        ("replayed", [WARM_UP + 1, 1], [WARM_UP + 1, 1], round(0.1 * WARM_UP + 0.1, 3)),
        ("replayed", [7, 8], [7, 8], 0.5),
    ]


def test_another_shape_is_eager(fake):
    step = GraphedStep(fake.step, CPU, 0.5)
    for _ in range(WARM_UP + 1):
        step(*batch(1, 2))
    step(*batch(3, 4, 5), 0.25)
    step(*batch(6, 7))
    assert fake.happened[-2:] == [("here", [3, 4, 5], [3, 4, 5], 0.25), ("replayed", [6, 7], [6, 7], 0.5)]


def test_the_batch_is_left_alone(fake):
    step = GraphedStep(fake.step, CPU, 0.5)
    batches = [batch(number, number) for number in range(WARM_UP + 3)]
    for x, y in batches:
        step(x, y)
    assert [x.tolist() for x, _ in batches] == [[number, number] for number in range(WARM_UP + 3)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    device = torch.device("cuda")
    total = torch.zeros(2, device=device)
    step = GraphedStep(lambda x, y, lr: total.add_(x * lr + y), device, 0.5)
    for number in range(WARM_UP + 4):
        step(*(part.to(device) for part in batch(number, 1)), float(number))
    step(*(part.to(device) for part in batch(5)), 1.0)  # another shape
    numbers = range(WARM_UP + 4)
    assert total.tolist() == [sum(n * n + n for n in numbers) + 10, sum(n + 1 for n in numbers) + 10]
