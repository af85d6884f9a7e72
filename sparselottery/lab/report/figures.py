"""The figures: each from the rows of the CSV files alone."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from . import draw
from .draw import INK, MUTED, OURS, THEIRS
from .folder import TICKET
from .tables import Row, grouped, mean, spread

LAYERS_SHOWN = 6
SMALL = (3.7, 2.7)  # inches, of a panel among several


class Drawing(NamedTuple):
    """A figure: ``name`` of its files, ``group`` of the section that shows it, ``alt`` for those who cannot see it."""

    name: str
    group: str
    title: str
    alt: str
    svg: str
    png: bytes


class Picture(NamedTuple):
    """An image of so many pixels across: PNG bytes."""

    name: str
    group: str
    title: str
    png: bytes
    width: int


def lines(rows: Sequence[Row], key: str, scale: float = 1.0) -> dict[str, list[tuple[float, ...]]]:
    """Of each control, (density, mean, min, max) by falling density; those without numbers are left out."""
    found = {}
    for control, group in grouped(rows, "control").items():
        measured = [row for row in group if row[key] is not None]
        if key == "early_stop_iteration":  # a control that is only evaluated does not stop
            measured = [row for row in measured if row["iterations"] != 0]
        points = [(row["density"], *(scale * row[key + end] for end in ("", "_min", "_max"))) for row in measured]
        if points:
            found[control] = sorted(points, reverse=True)
    return found


def against_weights(rows: Sequence[Row], key: str, ylabel: str, scale: float = 1.0) -> Figure | None:
    """One line for each control, bands from min to max, the dense net's level dotted."""
    found = lines(rows, key, scale)
    if TICKET not in found:
        return None
    with draw.canvas() as axes:
        dense = found[TICKET][0][1]
        axes.axhline(dense, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        for control, points in found.items():
            _, color, marker, dashes = draw.style(control)
            x, y, low, high = zip(*points, strict=True)
            order = 3 if control == TICKET else 2
            axes.fill_between(
                x, low, high, color=color, alpha=0.16 if control == TICKET else 0.1, linewidth=0, zorder=order - 1
            )
            axes.plot(x, y, color=color, marker=marker, linestyle=dashes, zorder=order)
        draw.weights_left(axes, [point[0] for point in found[TICKET]])
        axes.set_ylabel(ylabel)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        ends = [(points[-1][1], draw.style(name).label, draw.style(name).color) for name, points in found.items()]
        draw.label_ends(axes, ends)
        return axes.figure


def accuracy_curves(
    rows: Sequence[Row], densities: Mapping[int, float], control: str, limits: tuple[float, float]
) -> Figure | None:
    """Test accuracy while training, mean over trials, of a few rounds; the dense net's is dashed."""
    chosen = [row for row in rows if row["control"] == control and row["round"] in densities]
    if not chosen:
        return None
    ends = []
    with draw.canvas() as axes:
        for (number, density), color in zip(densities.items(), draw.sequence(len(densities)), strict=True):
            at = mean((row for row in chosen if row["round"] == number), "test_accuracy", lambda row: row["iteration"])
            if len(at) < 2:
                continue
            x, y = sorted(at), [100 * at[iteration] for iteration in sorted(at)]
            axes.plot(x, y, color=color, linestyle="--" if density == 1 else "-", linewidth=1.5)
            ends.append((y[-1], f"{draw.percent(density)} %", color))
        if not ends:
            return None
        axes.set(xlabel="iterations", ylabel="test accuracy, %", xlim=(0, None))
        axes.set_ylim(limits)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        draw.label_ends(axes, ends)
        return axes.figure


def accuracy_limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The y axis of `accuracy_curves`, percent: from what is reached in a tenth of the iterations to the best."""
    last = max(row["iteration"] for row in rows)
    late = [row["test_accuracy"] for row in rows if row["iteration"] >= last / 10]
    low, high = 100 * float(np.quantile(late, 0.01)), 100 * max(late)
    margin = 0.06 * (high - low) + 0.01
    return low - margin, high + margin


def step_times(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds per training step of each round: our kernels, w * mask, and dotted the whole net on our kernels."""
    ticket = [row for row in rows if row["control"] == TICKET]
    found = [(key, label, color, lines(ticket, key).get(TICKET))
             for key, label, color in (("sparse_ms", "sparse", OURS), ("dense_ms", "w * mask", THEIRS))]  # fmt: skip
    whole = ticket[0]["whole_ms"] if ticket else None
    if whole is None or not all(points for *_, points in found):
        return None
    with draw.canvas() as axes:
        for _, _, color, points in found:
            x, y, low, high = zip(*points, strict=True)
            axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)
            axes.plot(x, y, color=color, marker="o")
        draw.weights_left(axes, [point[0] for point in found[0][-1]])
        axes.set(ylabel="milliseconds per training step", ylim=(0, None))
        axes.axhline(whole, color=OURS, linestyle=":", linewidth=1)
        ends = [(points[-1][1], label, color) for _, label, color, points in found]
        draw.label_ends(axes, [*ends, (whole, "whole net", OURS)])
        return axes.figure


def seconds_saved(rows: Sequence[Row]) -> Figure | None:
    """Seconds of all steps so far: our kernels, w * mask, and dotted the whole net in each; filled, what is saved."""
    if not rows:
        return None
    with draw.canvas() as axes:
        x = [row["round"] for row in rows]
        sparse, whole, dense = ([row[f"{key}_seconds"] for row in rows] for key in ("sparse", "whole", "dense"))
        less = whole if whole[-1] < dense[-1] else dense
        axes.fill_between(x, sparse, less, color=OURS, alpha=0.12, linewidth=0)
        axes.plot(x, dense, color=THEIRS, marker="o")
        axes.plot(x, whole, color=OURS, linestyle=":")
        axes.plot(x, sparse, color=OURS, marker="o")
        axes.set(xlabel="round", ylabel="seconds of training steps, all rounds so far", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        saved = rows[-1]["saved_seconds"]
        word = f"{draw.seconds(saved)} saved" if saved >= 0 else f"{draw.seconds(-saved)} lost"
        middle = ((sparse[-1] + less[-1]) / 2, word, INK)
        others = [(dense[-1], "w * mask", THEIRS), (whole[-1], "whole net", OURS)]
        draw.label_ends(axes, [*others, middle, (sparse[-1], "sparse", OURS)])
        return axes.figure


def shown_layers(rows: Iterable[Row]) -> list[str]:
    """A few layers, the first and the last among them."""
    names = list(dict.fromkeys(row["layer"] for row in rows))
    return [names[i] for i in spread(range(len(names)), LAYERS_SHOWN)]


def distribution(rows: Sequence[Row], densities: Mapping[int, float]) -> Figure:
    """Of one layer: densities of its initial weights (filled) and of the survivors' of each round."""
    by_round = grouped(rows, "round")
    with draw.canvas(*SMALL) as axes:
        first = next(iter(by_round.values()))
        edges = np.array([row["left"] for row in first] + [first[-1]["right"]])
        axes.stairs(_normalised(first, "initial", edges), edges, fill=True, color=MUTED, alpha=0.2)
        colors = dict(zip(densities, draw.sequence(len(densities)), strict=True))
        for number, group in by_round.items():
            if number and any(row["survivors"] for row in group):
                axes.stairs(_normalised(group, "survivors", edges), edges, color=colors[number], linewidth=1.3)
        axes.set(xlabel="initial value", yticks=[], ylabel="density", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return axes.figure


def _normalised(rows: Sequence[Row], key: str, edges: np.ndarray) -> np.ndarray:
    counts = np.array([row[key] for row in rows], float)
    return counts / counts.sum() / np.diff(edges)


def movement(rows: Sequence[Row]) -> Figure | None:
    """Of one layer: how far weights moved that the next pruning kept, and took; medians and quartiles."""
    rows = [row for row in rows if row["kept_weights"] and row["pruned_weights"]]
    if not rows:
        return None
    ends = []
    with draw.canvas(*SMALL) as axes:
        for group, label, color in (("kept", "kept", OURS), ("pruned", "pruned", draw.STYLES["reinit"].color)):
            x = [row["density"] for row in rows]
            low, middle, high = ([row[f"{group}_{share}"] for row in rows] for share in (25, 50, 75))
            axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0)
            axes.plot(x, middle, color=color)
            ends.append((middle[-1], label, color))
        draw.weights_left(axes, x)
        axes.set(ylabel="|trained - initial|", ylim=(0, None))
        draw.label_ends(axes, ends)
        return axes.figure


def degrees(rows: Sequence[Row]) -> Figure | None:
    """Of one layer in one round: connections of each unit over the mean, units in order."""
    ends = []
    with draw.canvas(*SMALL) as axes:
        for side, label, color in (("into", "into", OURS), ("out_of", "out of", draw.STYLES["rearranged"].color)):
            counts = np.sort([row["connections"] for row in rows if row["side"] == side])[::-1]
            if not counts.sum():
                return None
            relative = counts / counts.mean()
            axes.plot(np.linspace(0, 100, len(relative)), relative, color=color, drawstyle="steps-mid")
            ends.append((relative[-1], label, color))
        axes.axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set(xlabel="units, most connected first, %", ylabel="connections / mean", ylim=(0, None), xlim=(0, 100))
        draw.label_ends(axes, ends)
        return axes.figure


def overlap(rows: Sequence[Row]) -> Figure:
    """Of one layer: Jaccard index of two trials' masks, mean over pairs, against chance."""
    by_round = grouped(rows, "round")
    with draw.canvas(*SMALL) as axes:
        x = [float(np.mean([row["density"] for row in group])) for group in by_round.values()]
        chance = [float(np.mean([row["expected"] for row in group])) for group in by_round.values()]
        found = [[row["jaccard"] for row in group] for group in by_round.values()]
        axes.fill_between(x, [min(each) for each in found], [max(each) for each in found], color=OURS, alpha=0.14,
                          linewidth=0)  # fmt: skip
        middle = [float(np.mean(each)) for each in found]
        axes.plot(x, middle, color=OURS)
        axes.plot(x, chance, color=MUTED, linestyle="--")
        draw.weights_left(axes, x)
        axes.set(ylabel="Jaccard index", ylim=(0, 1.03))
        draw.label_ends(axes, [(middle[-1], "trials", OURS), (chance[-1], "chance", MUTED)])
        return axes.figure


def connectivity(rows: Sequence[Row], densities: Mapping[int, float]) -> Figure | None:
    """Test error on the line between two trainings of a ticket, mean over trials, of a few rounds."""
    ends = []
    with draw.canvas() as axes:
        for (number, density), color in zip(densities.items(), draw.sequence(len(densities)), strict=True):
            at = mean((row for row in rows if row["round"] == number), "test_error", lambda row: row["share"])
            if at:
                y = [100 * at[share] for share in sorted(at)]
                axes.plot(sorted(at), y, color=color, marker="o", markersize=3)
                ends.append((y[-1], f"{draw.percent(density)} %", color))
        if not ends:
            return None
        axes.set(xlabel="way from one net to the other", ylabel="test error, %", xlim=(0, 1))
        draw.label_ends(axes, ends)
        return axes.figure


def instability(rows: Sequence[Row]) -> Figure | None:
    """Instability against weights left: mean, min and max over trials."""
    by_round = grouped([row for row in rows if row["share"] == 0], "round")
    if not by_round:
        return None
    with draw.canvas() as axes:
        x = [float(np.mean([row["density"] for row in group])) for group in by_round.values()]
        y = [[100 * row["instability"] for row in group] for group in by_round.values()]
        color = draw.style("order").color
        axes.fill_between(x, [min(each) for each in y], [max(each) for each in y], color=color, alpha=0.14, linewidth=0)
        axes.plot(x, [float(np.mean(each)) for each in y], color=color, marker="o")
        draw.weights_left(axes, x)
        axes.set(ylabel="instability, percentage points of error", ylim=(0, None))
        return axes.figure


def pixels(counts: Sequence[int], width: int) -> bytes:
    """Counts, row by row, as a PNG image, one pixel each: nothing is black, the largest the brightest."""
    data = io.BytesIO()
    values = np.reshape(counts, (-1, width))
    imsave(data, values, format="png", cmap="magma", vmin=0, vmax=max(1, values.max()), metadata={"Software": None})
    return data.getvalue()


def bitmap(mask: np.ndarray) -> bytes:
    """A mask (H, W) as a PNG image of one bit per pixel: survivors are black."""
    data = io.BytesIO()
    Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)).convert("1").save(data, format="png", optimize=True)
    return data.getvalue()


def file_name(*parts: object) -> str:
    """Lower-case letters, digits, dots and dashes."""
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", str(part).lower()).strip("-.") for part in parts)
