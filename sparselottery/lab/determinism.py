"""Trainings on CUDA that repeat bit for bit on the same kind of GPU, with the same versions and executions.

cuDNN may sum gradients of convolutions with atomic additions, and its benchmark mode picks algorithms by timing them;
cuBLAS may split a sum otherwise with another workspace. These three are fixed here. All else that the lab's nets do
repeats as it is: our kernels have no atomic additions and split sums by shapes alone; cross-entropy, batchnorm and the
mean over all pixels sum in a fixed order; a max-pool's windows of 2x2 do not overlap, so that its gradient adds nothing
up; random images are gathered, which has no sum. torch.use_deterministic_algorithms would change no bit more, but fill
every new tensor and sort what is scattered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # read when cuBLAS is first used


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Trainings on ``device`` repeat while the block runs; afterwards cuDNN is as it was. On the CPU they always do."""
    if torch.device(device).type != "cuda":
        yield
        return
    for name, value in WORKSPACE.items():
        os.environ.setdefault(name, value)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
