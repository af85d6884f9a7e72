"""`benchmarks.gpu.lab` on tiny random images, without all that is not installed where it is to run.

In a file of its own, so that the processes that it starts have the same stand-ins.
"""

from __future__ import annotations

import sys

for name in ("rich", "pooch", "sklearn", "ray", "matplotlib", "PIL"):
    sys.modules[name] = None

import torch  # noqa: E402

from benchmarks.gpu import lab  # noqa: E402
from sparselottery.lab import data, executions  # noqa: E402
from sparselottery.nn import MaskedLayer  # noqa: E402


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


data.load, executions.choose_execution = load, choose
torch.set_num_threads(1)

if __name__ == "__main__":
    sys.exit(lab.main(sys.argv[1:]))
