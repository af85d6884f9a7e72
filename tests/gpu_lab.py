"""Stand-ins for `benchmarks.gpu.lab` on tiny random images; run: the lab without what is not installed where it goes.

In a file of its own, so that the processes that it starts have the same stand-ins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

if __name__ in ("__main__", "__mp_main__"):
    for name in ("rich", "pooch", "sklearn", "ray", "matplotlib", "PIL"):
        sys.modules[name] = None

import torch

from benchmarks.gpu import lab
from sparselottery.lab import data, executions, experiment
from sparselottery.nn import MaskedLayer


def load(name: str) -> data.Dataset:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (16, 4, 4):
        parts += [torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 10]
    return data.Dataset(name, 10, *parts, note="random numbers")


def choose(model: torch.nn.Module, example_input: torch.Tensor) -> None:
    for module in model.modules():
        if isinstance(module, MaskedLayer) and module.density < 1:
            module.execution = "dense"


def once(*calls: Callable[[], None], **_: object) -> list[float]:
    """Milliseconds of each call, for rows whose times nobody reads."""
    return [call() or 1.0 for call in calls]


def stand_in(put: Callable[[object, str, object], None]) -> None:
    """By setattr, or by what takes it back."""
    put(data, "load", load)
    put(executions, "choose_execution", choose)
    put(experiment, "interleaved_ms", once)


if __name__ in ("__main__", "__mp_main__"):
    stand_in(setattr)
    torch.set_num_threads(1)

if __name__ == "__main__":
    sys.exit(lab.main(sys.argv[1:]))
