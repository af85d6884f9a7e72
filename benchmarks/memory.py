"""Bytes that training VGG-19 takes, ours against dense (Linux): `python -m benchmarks.memory` writes memory.csv.

Each net trains in a process of its own, which reads it from a file: no other net, nor the conversion, is in its peak.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import results
from sparselottery import convert
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import CIFAR10, build
from sparselottery.pruning import prune

NET, BATCH, DENSITY = "vgg-19", 64, 0.05  # of every layer
STEPS = 3  # the first one allocates the optimiser's state


def measure(path: Path, shape: tuple[int, ...], batch: int) -> dict[str, int]:
    """Bytes of one training step with Adam of the net in the file at `path`, for `batch` random images of `shape`.

    parameters, gradients, optimiser; buffers (indices, plans, masks, statistics); activations: what autograd keeps for
    the backward pass, the net's own tensors and its input apart; peak_rss: of the process, over what it held before.
    """
    torch.set_num_threads(results.THREADS)
    before = resident("VmRSS")
    model = torch.load(path, weights_only=False)
    images, labels = torch.randn(batch, *shape), torch.randint(10, (batch,))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    peak = resident("VmHWM") - before
    parameters = list(model.parameters())
    return {
        "parameters": storage_bytes(parameters),
        "gradients": storage_bytes(parameter.grad for parameter in parameters),
        "optimiser": storage_bytes(t for state in optimizer.state.values() for t in state.values()),
        "buffers": storage_bytes(model.buffers()),
        "activations": saved_bytes(model, images, labels),
        "peak_rss": peak,
    }


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind `tensors`, each piece once."""
    pieces = (tensor.untyped_storage() for tensor in tensors)
    return {piece.data_ptr(): piece.nbytes() for piece in pieces}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Of what autograd keeps between the forward and the backward pass."""
    saved: list[Tensor] = []  # holds on to all of them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(images), labels)
    known = storages([images, labels, *model.parameters(), *model.buffers()])
    return sum(size for address, size in storages(saved).items() if address not in known)


def resident(key: str) -> int:
    """Bytes of physical memory of this process: VmRSS now, VmHWM the most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def rows() -> Iterator[dict]:
    """A row for each net."""
    torch.manual_seed(0)
    model = build(NET, CIFAR10, 10)
    masks = prune(model, 1 - DENSITY, method="random")
    nets = {results.OURS: convert(model, masks), "masked_dense": masked_dense(model, masks), "dense": model}
    with tempfile.TemporaryDirectory() as folder:
        for name, net in nets.items():
            path = Path(folder) / name
            torch.save(net, path)
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                measured = fresh.submit(measure, path, CIFAR10, BATCH).result()
            yield {"net": NET, "batch": BATCH, "density": 1 if net is model else DENSITY, "impl": name, **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "memory.csv")
    args = parser.parse_args()
    torch.set_num_threads(results.THREADS)
    measured = []
    for row in rows():
        measured.append(row)
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    results.write(args.out, measured)


if __name__ == "__main__":
    main()
