"""Files of tickets, frozen for inference, against dense ones (Linux): `python -m benchmarks.loading` writes
loading.csv.

file_bytes: of the safetensors file. load_ms: from the file to a module; first_ms: to its first result, packing included
(medians of fresh processes, files in the page cache). peak_rss: bytes of the process over what it held before loading,
after some calls at batch 1. "dense" builds the net and loads the state_dict into it, as is usual; "dense_built" has
built it before and only loads.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks import results
from benchmarks.inference_peers import NETS
from benchmarks.memory import resident
from sparselottery import Ticket, convert, load_sparse, prune, to_dense

Loader = Callable[[Path], nn.Module]
CASES = ("lenet-300-100", "mlp-2048", "conv-6", "vgg-19")
PROCESSES, CALLS = 5, 5


def dense(net: str) -> Loader:
    def load(path: Path) -> nn.Module:
        return dense_built(net)(path)

    return load


def dense_built(net: str) -> Loader:
    model = NETS[net].make().eval()

    def load(path: Path) -> nn.Module:
        model.load_state_dict(load_file(path))
        return model

    return load


# What makes a loader of a net: before the clock starts.
LOADERS: dict[str, Callable[[str], Loader]] = {
    results.OURS: lambda net: load_sparse,
    "dense": dense,
    "dense_built": dense_built,
}


def measure(impl: str, net: str, path: Path) -> dict[str, float]:
    """In this process: load_ms, first_ms and peak_rss."""
    torch.set_num_threads(results.THREADS)
    x = torch.randn(1, *NETS[net].shape)
    torch.nn.functional.linear(x.flatten(1), torch.randn(8, x.numel()))  # what torch sets up at its first product
    before = resident("VmRSS")
    load = LOADERS[impl](net)
    began = perf_counter()
    model = load(path)
    loaded = perf_counter() - began
    with torch.no_grad():
        model(x)
        first = perf_counter() - began
        for _ in range(CALLS):
            model(x)
    return {"load_ms": 1e3 * loaded, "first_ms": 1e3 * first, "peak_rss": resident("VmHWM") - before}


def rows(net: str) -> Iterator[dict]:
    """A row for each way to load the net."""
    torch.manual_seed(0)
    model, density = NETS[net].make().eval(), NETS[net].density
    pruned = convert(model, prune(model, 1 - density, method="random"))
    with tempfile.TemporaryDirectory() as folder:
        files = {impl: Path(folder) / ("sparse" if impl == results.OURS else "dense") for impl in LOADERS}
        Ticket.from_model(pruned).save(files[results.OURS])
        save_file(to_dense(pruned).state_dict(), files["dense"])
        for impl, path in files.items():
            each = []
            for _ in range(PROCESSES):
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    each.append(fresh.submit(partial(measure, impl, net, path)).result())
            row = {"net": net, "batch": 1, "density": density, "impl": impl, "file_bytes": path.stat().st_size}
            row |= {key: f"{median(one[key] for one in each):.4g}" for key in ("load_ms", "first_ms")}
            yield row | {"peak_rss": int(median(one["peak_rss"] for one in each))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "loading.csv")
    args = parser.parse_args()
    torch.set_num_threads(results.THREADS)
    measured = []
    for net in CASES:
        for row in rows(net):
            measured.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    results.write(args.out, measured)


if __name__ == "__main__":
    main()
