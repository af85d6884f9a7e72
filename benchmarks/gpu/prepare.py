"""Compiles the kernels of cases before they are measured: on disk, for all later processes.

Launches are recorded and then compiled, so that the GPU has nothing to do but to make the plans.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
from torch import nn

from benchmarks.gpu.cases import Case, Conv, Linear, Step, label, mask_of
from benchmarks.gpu.problems import TORCH_DTYPE, precision
from benchmarks.gpu.worker import take_tensors_of
from sparselottery import convert
from sparselottery.kernels.gpu.launch import Launch, recorded

THREADS = 4  # of a process: most of compiling is another program's


def prepare(cases: Iterable[Case], seconds: float, device: str, jobs: int) -> Iterator[tuple[str, str, str]]:
    """In `jobs` processes, for at most `seconds`. Yields what fails as it comes, once: case, kernel and reason.

    The kernel is "" where it is the case that cannot be prepared, the case "all" where a process ended in the midst.
    One density and one op of each layer stand for all; nets are not prepared.
    """
    layers = [replace(case, density=0.1, op="") for case in cases if not isinstance(case, Step)]
    chosen = list(dict.fromkeys(layers))
    context, end = get_context("spawn"), time.monotonic() + seconds
    processes, told = {}, set()
    for i in range(jobs):
        reader, writer = context.Pipe(duplex=False)
        processes[reader] = context.Process(target=_warm, args=(chosen[i::jobs], device, writer), daemon=True)
        processes[reader].start()
        writer.close()  # so that reading ends with the process
    try:
        while processes and (ready := wait(list(processes), max(0.0, end - time.monotonic()))):
            for reader in ready:
                failure = _received(reader, processes)
                if failure and failure[1:] not in told:
                    told.add(failure[1:])
                    yield failure
    finally:
        for process in processes.values():
            process.kill()
            process.join(1)


def _received(reader: Connection, processes: dict[Connection, BaseProcess]) -> tuple[str, str, str] | None:
    """A failure; of a process that has ended, whether that was in the midst of its work."""
    try:
        return reader.recv()
    except (EOFError, OSError):
        process = processes.pop(reader)
        process.join(1)
        process.kill()
        return ("all", "", f"a process ended with {process.exitcode}") if process.exitcode else None


def launches(case: Linear | Conv, device: str) -> list[Launch]:
    """All that a forward and a backward of the layer start, without starting it."""
    dtype, images = TORCH_DTYPE[case.dtype], (case.size, case.size) if isinstance(case, Conv) else ()
    outputs, inputs, *_ = case.weight_shape
    like = {"device": device, "dtype": dtype}
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, **like) if images else nn.Linear(inputs, outputs, **like)
    generator = torch.Generator(device).manual_seed(0)
    mask = mask_of(case, generator)
    masked = convert(layer, {"weight": mask})
    x = torch.zeros(case.batch, inputs, *images, **like)
    x = x.contiguous(memory_format=torch.channels_last) if images else x
    with precision(case.dtype), recorded() as found, torch.autograd.set_multithreading_enabled(False):
        with torch.no_grad():
            masked.eval()(x)
        y = masked.train()(x.requires_grad_())
        torch.autograd.grad(y, [x, *masked.parameters()], torch.zeros_like(y))
    return found


def _warm(cases: list[Linear | Conv], device: str, failures: Connection) -> None:
    take_tensors_of(device)
    for failure in compiled(cases, device):
        failures.send(failure)


def compiled(cases: Iterable[Linear | Conv], device: str) -> Iterator[tuple[str, str, str]]:
    """Compiles all kernels of the cases; yields the case, the kernel and the reason of each that fails."""
    with ThreadPoolExecutor(THREADS) as pool:
        for case in cases:
            try:
                found = launches(case, device)
            except Exception as error:  # of the memory for its plan, say
                yield label(case), "", _reason(error)
                continue
            for launch, why in zip(found, pool.map(_compile, found), strict=True):
                if why:
                    yield label(case), launch.kernel.__name__, why


def _compile(launch: Launch) -> str:
    """Why it cannot be compiled, if it cannot."""
    try:
        if "TRITON_INTERPRET" not in os.environ:
            launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    except Exception as error:  # the others are compiled
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
