"""One training by several processes: each takes its share of a batch, gradients of the survivors alone are averaged.

    torchrun --nproc-per-node 2 -m sparselottery find --data mnist

All processes run the same program; where there is only one, everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed.nn  # imported while there is a group, its defaults would hold that group for ever
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..convert import to_dense
from ..ranks import leave, rank, size

TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@contextmanager
def from_environment() -> Iterator[int]:
    """Join the processes that torchrun started, for as long as the block runs; yields the rank, 0 without torchrun.

    Tensors of the CPU go by gloo, those of a GPU by nccl, each process having the GPU of its local rank.
    """
    if not os.environ.keys() >= TORCHRUN:
        yield 0
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield rank()
        dist.barrier()  # none leaves while another still waits for what it sent
    finally:
        leave()


class Average:
    """Averages gradients over all processes, by a hook of DistributedDataParallel, and counts the bytes sent.

    The replica holds it, through C++ where no cycle is seen, so it must not hold the replica.
    """

    def __init__(self) -> None:
        self.sent = 0

    def hook(self, _, bucket):  # torch refuses annotations that are strings
        gradients = bucket.buffer().div_(size())
        self.sent += gradients.nbytes
        return dist.all_reduce(gradients, async_op=True).get_future().then(lambda done: done.value()[0])


class Replica(DistributedDataParallel):
    """DistributedDataParallel that counts the bytes of gradients that this process has given to be averaged."""

    def __init__(self, model: nn.Module) -> None:
        for tensor in (*model.parameters(), *_statistics(model)):
            dist.broadcast(tensor.detach(), 0)
        super().__init__(model, init_sync=False)
        self.broadcast_buffers = False  # it would send the indices of the survivors in every step
        self.average = Average()
        self.register_comm_hook(None, self.average.hook)


def replica(model: nn.Module) -> nn.Module:
    """What to call in a training step in place of ``model``, whose parameters it shares: itself, if alone."""
    return Replica(model) if size() > 1 else model


def share(batch: int) -> slice:
    """Which of the images of a batch are this process's. Raises ValueError if they cannot be shared out evenly."""
    if batch % size():
        raise ValueError(f"batch: expected a multiple of the {size()} processes, got {batch}")
    return slice(rank(), None, size())


def part(x: Tensor) -> Tensor:
    """This process's of the images or labels of a set that is evaluated."""
    return x if size() == 1 else x[rank() :: size()].contiguous()


def mean(values: Sequence[float], count: int) -> Sequence[float]:
    """The means over all processes of what each has found on its ``count`` images."""
    if size() == 1:
        return values
    total = torch.tensor([*(count * value for value in values), count], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[:-1] / total[-1]).tolist()


def average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their batchnorm statistics, each having seen its share of the images."""
    if size() > 1:
        for tensor in _statistics(model):
            dist.all_reduce(tensor)
            tensor /= size()


def traffic(trained: nn.Module, steps: int) -> dict[str, int]:
    """For the record of a training by several processes: the bytes of gradients averaged in a step, and of dense ones.

    ``allreduce_bytes`` is what each process gave, ``dense_allreduce_bytes`` what it would be of the dense net.
    """
    if not isinstance(trained, Replica):
        return {}
    dense = sum(parameter.nbytes for parameter in to_dense(trained.module).parameters())
    return {"allreduce_bytes": trained.average.sent // steps, "dense_allreduce_bytes": dense}


def _statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]
