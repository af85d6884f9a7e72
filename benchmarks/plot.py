"""Draws speed-up against density from the CSV files alone, losing rows included: `python -m benchmarks.plot [DIR]`.

A small circle marks where dense overtakes. Without DIR, the folders of all machines are drawn.
"""

from __future__ import annotations

import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks import results

CONV = "{batch:g} x {channels:g} -> {filters:g}, {kernel:g}x{kernel:g}/{stride:g}, {size:g}x{size:g}"
PANELS = {  # file -> the title of a row's panel
    "linear": "{op}, {batch:g}, {in_features:g}, {out_features:g}",
    "batch1": "{in_features:g}, {out_features:g}",
    "mlp_step": "{net}, {batch:g}",
    "conv": "{op}, {layout}\n" + CONV,
    "conv_step": "{net}, {batch:g}",
}
LABELS = {
    "nn_linear": "nn.Linear (MKL)",
    "onednn": "oneDNN packed",
    "torch_csr": "torch.sparse CSR",
    "scipy_csr": "scipy CSR",
    "sparseprop": "SparseProp",
    "masked_dense": "w * mask",
    "dense": "unpruned",
    "masked_dense_channels_last": "w * mask, channels_last",
    "nn_conv2d": "nn.Conv2d NCHW",
    "nn_conv2d_channels_last": "nn.Conv2d channels_last",
}
LADDER = "imp-mnist"  # accuracy and seconds of a whole ladder
GRAINS = "granularity", "grains"  # accuracy of blocks, and milliseconds
TICKS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]


def main(folder: Path) -> None:
    for name, title in PANELS.items():
        source = folder / f"{name}.csv"
        if source.exists():
            draw(source, title, folder / f"{name}.svg")
            print(f"{source} -> {folder / name}.svg")
    if (source := folder / f"{LADDER}.csv").exists():
        draw_ladder(source, folder / "ladder.svg")
        print(f"{source} -> {folder / 'ladder.svg'}")
    sources = [folder / f"{name}.csv" for name in GRAINS]
    if all(source.exists() for source in sources):
        draw_grains(*sources, folder / "grains.svg")
        print(f"{sources[0]} -> {folder / 'grains.svg'}")


def draw(source: Path, title: str, target: Path) -> None:
    """A panel for each `title` of a row, a line for each implementation, written atomically as SVG."""
    head, rows = results.read(source)
    titles = dict.fromkeys(title.format_map(row) for row in rows)
    panels = sorted(titles, key=lambda panel: panel.partition(",")[0])  # an op's are together, in the file's order
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = max(7, 3.6 * columns), 3.2 * lines
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for impl in LABELS:
            points = sorted(
                (row["density"], row["speedup"])
                for row in rows
                if row["impl"] == impl and title.format_map(row) == panel
            )
            if points:
                draw_line(axis, LABELS[impl], points, f"C{list(LABELS).index(impl)}")
        decorate(axis, panel)
    for axis in axes[:, 0]:
        axis.set_ylabel(f"times faster with {results.OURS}")
    drawn = [line for axis in axes.flat for line in axis.get_lines()]
    handles = {line.get_label(): line for line in drawn if line.get_label() in LABELS.values()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(f"{head['machine']}, fp32\n{head['versions']}, {head['date']}", fontsize=8)
    save(figure, target)


def draw_ladder(source: Path, target: Path) -> None:
    """Beside each other: test accuracy at early stop, and milliseconds of a training step, against weights left."""
    head, rows = results.read(source)
    first = [row for row in rows if row["trial"] == rows[0]["trial"]]
    figure, (accuracy, speed) = plt.subplots(1, 2, figsize=(8.6, 3.2), layout="constrained")
    density = [row["density"] for row in first]
    for kind, label in (("sparse", results.OURS), ("dense", "w * mask, by torch")):
        accuracy.plot(
            density, [100 * row[f"{kind}_early_stop_test_accuracy"] for row in first], label=label, marker="."
        )
        speed.plot(density, [row[f"{kind}_train_step_ms"] for row in first], label=label, marker=".")
    speed.axhline(
        first[0]["sparse_train_step_ms"], color="C0", linewidth=0.8, linestyle=":", label="the whole net, by us"
    )
    accuracy.set(ylabel="test accuracy at early stop, %", title="Lenet-300-100 on MNIST")
    speed.set(ylabel="ms a training step", title="batch 60", ylim=(0, None))
    for axis in (accuracy, speed):
        axis.set(xscale="log", xlabel="weights left")
        axis.invert_xaxis()
        axis.set_xticks(TICKS[2:], [f"{tick:.0%}" for tick in TICKS[2:]], fontsize=7)
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3, linewidth=0.5)
    speed.legend(fontsize=7, loc="center right")
    iterations = f"{first[0]['iterations']:,.0f} iterations a training"
    figure.suptitle(f"{head['machine']}, fp32, {iterations}\n{head['versions']}, {head['date']}", fontsize=7)
    save(figure, target)


def draw_grains(accuracies: Path, times: Path, target: Path) -> None:
    """Test accuracy against milliseconds of a step, and of a frozen net: a line for each granularity, by density."""
    (_, trained), (head, timed) = results.read(accuracies), results.read(times)
    accuracy = _by_grain(trained, sorted({row["density"] for row in timed}))
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4), layout="constrained")
    for axis, (op, what) in zip(
        axes, (("step", "a step of 60 samples"), ("frozen", "frozen, 64 samples")), strict=True
    ):
        ours = [row for row in timed if (row["op"], row["impl"]) == (op, results.OURS)]
        for at, grain in enumerate(dict.fromkeys(row["granularity"] for row in ours)):
            found = {row["density"]: row["ms"] for row in ours if row["granularity"] == grain}
            points = [(ms, accuracy[grain, density]) for density, ms in found.items() if (grain, density) in accuracy]
            style = {"linestyle": "--" if grain.endswith("-permuted") else "-", "color": f"C{(at + 1) // 2}"}
            axis.plot(*zip(*points, strict=True), marker=".", linewidth=1.2, label=grain, **style)
        axis.axhline(accuracy["1x1", 1.0], color="black", linewidth=0.8, linestyle=":", label="the whole net")
        axis.set(xscale="log", xlabel=f"ms, {what}", ylim=(accuracy["1x1", 1.0] - 8, None))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, linewidth=0.5)
    axes[0].set_ylabel("test accuracy at early stop, %")
    axes[0].legend(fontsize=7)
    title = f"Lenet-300-100 on MNIST, 25, 14, 7 and 3.6 % of the weights left; {head['machine']}"
    figure.suptitle(f"{title}\n{head['versions']}, {head['date']}", fontsize=7)
    save(figure, target)


def _by_grain(rows: list[dict], densities: list[float]) -> dict[tuple[str, float], float]:
    """The mean accuracy of the trials, by granularity and the nearest of the densities, or 1.0."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        nearest = min([*densities, 1.0], key=lambda density: abs(density - row["density"]))
        found.setdefault((row["granularity"], nearest), []).append(row["accuracy"])
    return {key: fmean(each) for key, each in found.items()}


def save(figure: Figure, target: Path) -> None:
    """Atomically, and the same bytes from the same rows."""
    part = target.with_name(target.name + ".tmp")
    with plt.rc_context({"svg.hashsalt": results.OURS}):
        figure.savefig(part, format="svg", metadata={"Date": None})
    plt.close(figure)
    os.replace(part, target)


def draw_line(axis: Axes, label: str, points: list[tuple[float, float]], color: str) -> None:
    axis.plot(*zip(*points, strict=True), marker=".", markersize=5, linewidth=1.2, label=label, color=color)
    density = crossover(points)
    if density is not None:
        axis.plot(density, 1, marker="o", markersize=6, color=color, markerfacecolor="none")
        axis.annotate(f"{density:.0%}", (density, 1), xytext=(0, -11), textcoords="offset points", color=color,
                      fontsize=7, ha="center")  # fmt: skip


def crossover(points: list[tuple[float, float]]) -> float | None:
    """The lowest density where the speed-up falls through 1, on straight lines of the log-log plot; None if nowhere."""
    for (left, fast), (right, slow) in pairwise(points):
        if fast >= 1 > slow:
            share = math.log(fast) / math.log(fast / slow)
            return left * (right / left) ** share
    return None


def decorate(axis: Axes, title: str) -> None:
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", title=title, xlabel="density")
    axis.title.set_fontsize(9)
    axis.set_xticks(TICKS, [f"{tick:.0%}" for tick in TICKS], fontsize=7)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    for formatted in (axis.xaxis, axis.yaxis):
        formatted.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3, linewidth=0.5)


if __name__ == "__main__":
    for each in results.folders(sys.argv[1:]):
        main(each)
