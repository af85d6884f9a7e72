"""Compiles the kernels of cases before they are measured: on disk, for all later processes.

Launches are recorded and then compiled, so that the GPU has nothing to do but to make the plans.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import nn

from benchmarks.gpu.cases import Case, Conv, Linear, Step, block, random_mask
from benchmarks.gpu.problems import TORCH_DTYPE, precision
from benchmarks.gpu.worker import take_tensors_of
from sparselottery import convert
from sparselottery.kernels.gpu.launch import Launch, recorded

THREADS = 4  # of a process: most of compiling is another program's


def prepare(cases: Iterable[Case], seconds: float, device: str, jobs: int) -> None:
    """In `jobs` processes, for at most `seconds`. What goes wrong here is told when the case is measured.

    One density and one op of each layer stand for all; nets are not prepared.
    """
    layers = [replace(case, density=0.1, op="") for case in cases if not isinstance(case, Step)]
    chosen = list(dict.fromkeys(layers))
    context, end = get_context("spawn"), time.monotonic() + seconds
    processes = [context.Process(target=_warm, args=(chosen[i::jobs], device), daemon=True) for i in range(jobs)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join(1)


def launches(case: Linear | Conv, device: str) -> list[Launch]:
    """All that a forward and a backward of the layer start, without starting it."""
    dtype, images = TORCH_DTYPE[case.dtype], (case.size, case.size) if isinstance(case, Conv) else ()
    outputs, inputs, *_ = case.weight_shape
    like = {"device": device, "dtype": dtype}
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, **like) if images else nn.Linear(inputs, outputs, **like)
    generator = torch.Generator(device).manual_seed(0)
    mask = random_mask(case.weight_shape, block(case.pattern), case.density, generator)
    masked = convert(layer, {"weight": mask})
    x = torch.zeros(case.batch, inputs, *images, **like)
    x = x.contiguous(memory_format=torch.channels_last) if images else x
    with precision(case.dtype), recorded() as found, torch.autograd.set_multithreading_enabled(False):
        with torch.no_grad():
            masked.eval()(x)
        y = masked.train()(x.requires_grad_())
        torch.autograd.grad(y, [x, *masked.parameters()], torch.zeros_like(y))
    return found


def _warm(cases: list[Linear | Conv], device: str) -> None:
    take_tensors_of(device)
    with ThreadPoolExecutor(THREADS) as pool:
        for case in cases:
            with suppress(Exception):
                list(pool.map(_compile, launches(case, device)))


def _compile(launch: Launch) -> None:
    if "TRITON_INTERPRET" not in os.environ:
        launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
