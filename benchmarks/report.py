"""Prints each bar of the project beside the measured rows: `python -m benchmarks.report [DIR]`.

A bar is reached when the statistic (the geometric mean or the minimum over the rows it names) is at or above it.
Without DIR, the folders of all machines are reported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from benchmarks import results

SPARSE_PEERS = ("torch_csr", "scipy_csr", "sparseprop", "sparselab", "onednn_csr")
# The other columns name the case.
MEASURED = ("impl", "ms", "speedup", "rounds", "rejected", "p99_ms", "items_per_s", "speedup_p99", "calls")


@dataclass(frozen=True)
class Bar:
    """`statistic` of the speed-up, in the cases of `file` that match `where`, over the fastest of `impls` in each."""

    what: str
    bar: float | None
    aim: float | None
    file: str
    impls: tuple[str, ...]
    where: dict[str, object]
    statistic: Callable[[Sequence[float]], float] = geometric_mean

    def speedups(self, rows: Sequence[dict]) -> list[float]:
        """Our speed-up in each case, over the fastest of `impls`."""
        cases: dict[tuple, float] = {}
        for row in rows:
            if row["impl"] in self.impls and all(row[key] == value for key, value in self.where.items()):
                case = tuple(value for key, value in row.items() if key not in MEASURED)
                cases[case] = min(row["speedup"], cases.get(case, math.inf))
        return list(cases.values())


DENSE, ONEDNN, MASKED = ("nn_linear",), ("onednn",), ("masked_dense",)
CONV, SPARSEPROP = ("nn_conv2d", "nn_conv2d_channels_last"), ("sparseprop",)
CONV_MASKED, NET = ("masked_dense", "masked_dense_channels_last"), ("dense", "dense_channels_last", "dense_compiled")
BOTH, FORWARD = {"op": "forward+backward"}, {"op": "forward"}
RUNTIMES, MNN = (*NET, "onnxruntime", "openvino", "mnn", "mnn_sparse"), ("mnn_sparse",)
MLP, LENET, CONV6 = {"net": "mlp-2048"}, {"net": "lenet-300-100"}, {"net": "conv-6"}
CONV3 = {**BOTH, "layout": "nchw", "batch": 128, "kernel": 3, "stride": 1}
BARS = [
    Bar("linear fwd+bwd vs nn.Linear, 50 % pruned", 1.7, None, "linear", DENSE, {**BOTH, "density": 0.5}),
    Bar("linear fwd+bwd vs nn.Linear, 80 %", 4, None, "linear", DENSE, {**BOTH, "density": 0.2}),
    Bar("linear fwd+bwd vs nn.Linear, 90 %", 8, 12, "linear", DENSE, {**BOTH, "density": 0.1}),
    Bar("linear fwd+bwd vs nn.Linear, 95 %", 12, None, "linear", DENSE, {**BOTH, "density": 0.05}),
    Bar("linear fwd+bwd vs nn.Linear, worst case", 0.95, None, "linear", DENSE, BOTH, min),
    Bar("linear fwd vs nn.Linear, 90 %", None, 15, "linear", DENSE, {**FORWARD, "density": 0.1}),
    Bar("linear fwd vs oneDNN packed, 90 %", 4.5, None, "linear", ONEDNN, {**FORWARD, "density": 0.1}),
    Bar("linear fwd+bwd vs best sparse peer, 80-98 %", 2, None, "linear", SPARSE_PEERS, BOTH),
    Bar("batch 1, 4096x4096 vs nn.Linear, 90 %", 9, None, "batch1", DENSE, {"density": 0.1}),
    Bar("MLP step vs w*mask, 90 %", 7, None, "mlp_step", MASKED, {**MLP, "density": 0.1}),
    Bar("MLP step vs w*mask, 95 %", 13, 18, "mlp_step", MASKED, {**MLP, "density": 0.05}),
    Bar("Lenet step vs w*mask, 90 %", 2.2, None, "mlp_step", MASKED, {**LENET, "density": 0.1}),
    Bar("Lenet step vs w*mask, 95 %", 2.8, 5, "mlp_step", MASKED, {**LENET, "density": 0.05}),
    Bar("conv 3x3 fwd+bwd vs better nn.Conv2d, 50 %", 1.3, None, "conv", CONV, {**CONV3, "density": 0.5}),
    Bar("conv 3x3 fwd+bwd vs better nn.Conv2d, 80 %", 2.5, None, "conv", CONV, {**CONV3, "density": 0.2}),
    Bar("conv 3x3 fwd+bwd vs better nn.Conv2d, 90 %", 3.5, 6, "conv", CONV, {**CONV3, "density": 0.1}),
    Bar("conv 3x3 fwd+bwd vs better nn.Conv2d, 95 %", 5, None, "conv", CONV, {**CONV3, "density": 0.05}),
    Bar("conv vs better nn.Conv2d, worst case", 0.95, None, "conv", CONV, {}, min),
    Bar("conv fwd+bwd vs SparseProp, 80-95 %", 3, None, "conv", SPARSEPROP, BOTH),
    Bar("conv-6 step vs better w*mask, 90 %", 3.5, None, "conv_step", CONV_MASKED, {**CONV6, "density": 0.1}),
    Bar("conv-6 step vs better w*mask, 95 %", 4.5, 6, "conv_step", CONV_MASKED, {**CONV6, "density": 0.05}),
    Bar("conv-6 step vs better w*mask, 98 %", 6, None, "conv_step", CONV_MASKED, {**CONV6, "density": 0.02}),
    Bar("VGG-19 forward, batch 1 vs best dense, 95 %", 4, None, "conv_net", NET, {"batch": 1}),
    Bar("VGG-19 forward, batch 128 vs best dense, 95 %", 5, None, "conv_net", NET, {"batch": 128}),
    Bar("frozen Lenet, batch 1 vs best runtime", 5, None, "inference", RUNTIMES, {**LENET, "batch": 1}),
    Bar("frozen Lenet, batch 64", 6, None, "inference", RUNTIMES, {**LENET, "batch": 64}),
    Bar("frozen MLP, batch 1", 5, None, "inference", RUNTIMES, {**MLP, "batch": 1}),
    Bar("frozen MLP, batch 64", 6, None, "inference", RUNTIMES, {**MLP, "batch": 64}),
    Bar("frozen VGG-19, batch 1", 3, None, "inference", RUNTIMES, {"net": "vgg-19", "batch": 1}),
    Bar("frozen VGG-19, batch 64", 4, None, "inference", RUNTIMES, {"net": "vgg-19", "batch": 64}),
    Bar("frozen MLP vs MNN's sparse", 2, None, "inference", MNN, MLP, min),
    Bar("frozen conv-6 vs MNN's sparse", 2, None, "inference", MNN, CONV6, min),
    Bar("frozen VGG-19 vs MNN's sparse", 2, None, "inference", MNN, {"net": "vgg-19"}, min),
    Bar("frozen BERT-base encoder, batch 1", 2.5, None, "inference", RUNTIMES, {"net": "bert-base"}),
    Bar("ViT-B/16 of 4 layers fwd vs dense, 90 %", 4, None, "vit", ("dense",), FORWARD),
    Bar("ViT-B/16 of 4 layers fwd+bwd vs dense, 90 %", 3, None, "vit", ("dense",), BOTH),
    Bar("GPT-2 small, 64 tokens, batch 1, 90 %", 3, None, "transformers", NET, {"op": "generate"}),
    Bar("GPT-2 small, convert, vs 10 s", 1, None, "transformers", ("limit",), {"op": "convert"}),
    Bar("ViT-B/16 forward, batch 8, 90 %", 3, None, "transformers", NET, {"net": "vit-b-16"}),
    Bar("Whisper-tiny encoder forward, 90 %", 2, None, "transformers", NET, {"net": "whisper-tiny-encoder"}),
]


def main(folder: Path) -> None:
    paths = [folder / f"{name}.csv" for name in dict.fromkeys(bar.file for bar in BARS)]
    files = {path.stem: results.read(path) for path in paths if path.exists()}
    print(f"{folder}\n")
    for name, (head, rows) in files.items():
        impls = dict.fromkeys(row["impl"] for row in rows)
        print(f"{name}.csv: {len(rows)} rows; {'; '.join(head.values())}\n    measured: {', '.join(impls)}")
    print(f"\n{'':46} {'bar':>6} {'aim':>6} {'here':>7}   {'lowest..highest':>17}")
    for bar in BARS:
        speedups = bar.speedups(files[bar.file][1]) if bar.file in files else []
        if not speedups:
            print(f"{bar.what:46} {_times(bar.bar):>6} {_times(bar.aim):>6}   no rows")
            continue
        here = bar.statistic(speedups)
        verdict = "aim" if bar.aim and here >= bar.aim else "bar" if bar.bar and here >= bar.bar else "short"
        spread = f"{min(speedups):.2f}..{max(speedups):.2f} of {len(speedups)}"
        print(f"{bar.what:46} {_times(bar.bar):>6} {_times(bar.aim):>6} {here:>6.2f}x   {spread:>17}  {verdict}")
    print()


def _times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:g}x"


if __name__ == "__main__":
    for each in results.folders(sys.argv[1:]):
        main(each)
