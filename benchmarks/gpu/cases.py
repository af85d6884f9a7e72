"""What is measured: layers and training steps, over patterns, densities and dtypes, the most important first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.gpu.bars import BARS

# In the order in which cases are measured.
DENSITIES = (0.1, 0.2, 0.05, 0.5, 0.02)
PATTERNS = ("1x1", "64x64", "128x128", "64x1", "32x32", "16x16")  # R x C weights that survive together
LINEAR_ONLY = ("64x1", "128x128")
TWO_OF_FOUR = "2:4"  # weights in each group of a row: in inference, beside torch's sparse tensor cores
DTYPES = ("bf16", "fp32", "tf32")  # of fp32 tensors: strictly so, or multiplied as TF32
OPS = ("forward+backward", "forward", "step")  # step: with fused Adam
LINEARS = ((4096, 4096, 4096), (1, 4096, 11008), (16, 4096, 11008), (64, 4096, 11008), (32, 4096, 11008),
           (8192, 4096, 4096), (512, 1024, 1024))  # fmt: skip
CONVS = ((256, 256, 14), (256, 64, 56), (256, 512, 7))
NETS = (("lenet-300-100", 60), ("vit-b", 32), ("vgg-19", 128), ("conv-6", 60), ("vgg-19", 64))
SMOKE_BARS = 2
SMOKE = {"linear": ((16, 32, 64),), "conv": ((1, 64, 4),), "step": (("lenet-300-100", 60),)}
PROMISES = [bar for bar in BARS if bar.where]  # the others are about all cases
OFF = 0.2  # share by which the density of a mask may differ from its case's; else there are too few blocks for it


@dataclass(frozen=True)
class Linear:
    """One nn.Linear: x (batch, in_features)."""

    part: ClassVar[str] = "linear"
    op: str
    batch: int
    in_features: int
    out_features: int
    pattern: str
    density: float
    dtype: str

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features


@dataclass(frozen=True)
class Conv:
    """One nn.Conv2d, 3x3 with padding 1 and as many filters as channels: x (batch, channels, size, size)."""

    part: ClassVar[str] = "conv"
    op: str
    batch: int
    channels: int
    size: int
    pattern: str
    density: float
    dtype: str

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.channels, self.channels, 3, 3


@dataclass(frozen=True)
class Step:
    """A training step of a net. bf16 is autocast's."""

    part: ClassVar[str] = "step"
    net: str
    batch: int
    pattern: str
    density: float
    dtype: str


Case = Linear | Conv | Step
PARTS = {case.part: case for case in (Linear, Conv, Step)}


def label(case: Case) -> str:
    """In one line, for people."""
    return " ".join([case.part, *map(str, asdict(case).values())])


def cases(part: str, smoke: bool = False) -> list[Case]:
    """All of a part, those that a bar is about first, in the order of the bars. smoke: tiny ones, one per variant."""
    found = list(_steps(smoke) if part == "step" else _layers(part, smoke))
    return sorted(found, key=lambda case: _rank(part, case))  # stable: the order above counts among equals


FEW = 64  # samples: in inference, where reading the weights is what takes time


def planned(smoke: bool = False) -> dict[str, list[Case]]:
    """All cases, each in one part of a run."""
    every = {part: cases(part, smoke) for part in PARTS}
    promised = [case for part, found in every.items() for case in found if _rank(part, case) < len(PROMISES)]
    promised = every["linear"][:SMOKE_BARS] if smoke else promised
    others = [case for part in ("linear", "conv") for case in every[part] if case not in set(promised)]
    few = [case for case in others if isinstance(case, Linear) and case.batch <= FEW]
    rest = [case for case in others if case not in set(few)]
    return {"bars": promised, "small batches": few, "steps": every["step"], "rest": rest}


def _layers(part: str, smoke: bool) -> Iterator[Case]:
    """The ops of one problem stand together."""
    kind, shapes = (Linear, LINEARS) if part == "linear" else (Conv, CONVS)
    densities = (0.2,) if smoke else DENSITIES
    for density, shape, dtype, pattern in product(densities, SMOKE[part] if smoke else shapes, DTYPES, PATTERNS):
        these = [kind(op, *shape, pattern, density, dtype) for op in OPS]
        if (part == "linear" or pattern not in LINEAR_ONLY) and _exists(these[0]):
            yield from these
    for shape in LINEARS if part == "linear" and not smoke else ():
        yield Linear("forward", *shape, TWO_OF_FOUR, 0.5, "bf16")


def _steps(smoke: bool) -> Iterator[Step]:
    nets, densities = (SMOKE["step"], (0.1,)) if smoke else (NETS, (0.1, 0.05))
    for density, net, dtype, pattern in product(densities, nets, DTYPES[:2], PATTERNS[:2]):
        yield Step(*net, pattern, density, dtype)


def _rank(part: str, case: Case) -> int:
    columns = asdict(case)
    return next((i for i, bar in enumerate(PROMISES) if bar.matches(part, columns)), len(PROMISES))


def block(pattern: str) -> tuple[int, int]:
    """(R, C) of "RxC"; single weights of 2:4."""
    if pattern == TWO_OF_FOUR:
        return 1, 1
    rows, columns = pattern.split("x")
    return int(rows), int(columns)


def mask_of(case: Linear | Conv, generator: torch.Generator) -> Tensor:
    """A random mask of the case's pattern and density, of its weight's shape, on the generator's device."""
    if case.pattern != TWO_OF_FOUR:
        return random_mask(case.weight_shape, block(case.pattern), case.density, generator)
    rows, columns = case.weight_shape
    order = torch.rand(rows, columns // 4, 4, generator=generator, device=generator.device).argsort(2)
    return (order < 2).view(rows, columns)


def random_mask(shape: tuple[int, ...], block: tuple[int, int], density: float, generator: torch.Generator) -> Tensor:
    """A bool mask (O, C, ...) on the generator's device; exactly round(density * blocks) random blocks of it are True.

    A block is R rows x C columns, at one tap, cut off at the border.
    """
    grid = _grid(shape, block)
    blocks = math.prod(grid)
    alive = torch.zeros(blocks, dtype=torch.bool, device=generator.device)
    order = torch.randperm(blocks, generator=generator, device=generator.device)
    alive[order[: round(density * blocks)]] = True
    mask = alive.view(grid).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return mask[: shape[0], : shape[1]].contiguous()


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> list[int]:
    return [-(-size // step) for size, step in zip(shape[:2], block, strict=True)] + list(shape[2:])


def _exists(case: Linear | Conv) -> bool:
    """Are there enough blocks for this density?"""
    blocks = math.prod(_grid(case.weight_shape, block(case.pattern)))
    return abs(round(case.density * blocks) / blocks - case.density) <= OFF * case.density
