"""How every figure looks: one colour for each control everywhere, text as text, lines labelled where they end.

Colours are written for paper; on a page they become CSS variables, which a dark scheme replaces (`dark_variables`).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from .tables import spread

TIMES, MINUS, DASH = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{EN DASH}"
INK, MUTED, GRID = "#1d2430", "#667085", "#dfe3ea"
OURS, THEIRS = "#0b5cad", "#667085"  # our kernels, and w * mask
DARK = {  # of each colour, what stands for it on a dark page
    INK: "#e8ebf0",
    MUTED: "#9aa4b5",
    GRID: "#2e3542",
    OURS: "#6cb2ff",
    "#cf4a0a": "#ff9159",
    "#b07d00": "#efc14a",
    "#007a5a": "#41d6a0",
    "#a8408a": "#f29ad2",
    "#2a93b8": "#86d6f2",
    "#8a5a44": "#d6a78f",
    "#5a4fb5": "#aaa2f7",
    "#5f7d1a": "#b4d35c",
    "#a3263f": "#ff8ea3",
    "#46327e": "#a492ea",
    "#365c8d": "#7fa9dc",
    "#277f8e": "#57b9c9",
    "#1fa187": "#4fd3b6",
    "#6cae2f": "#a5dd6b",
    "#c98f00": "#f2c94c",
}


class Style(NamedTuple):
    label: str
    color: str
    marker: str = "o"
    dashes: str = "-"


STYLES = {
    "ticket": Style("ticket", OURS),
    "reinit": Style("random reinit", "#cf4a0a", "s"),
    "rearranged": Style("rearranged mask", "#b07d00", "D"),
    "one-shot": Style("one-shot", "#007a5a", "^"),
    "signs": Style("signs alone", "#cf4a0a", "P", "--"),
    "permuted": Style("permuted mask", "#b07d00", "s", "--"),
    "survivors": Style("survivors' values", "#a8408a", "v"),
    "noise-0.5": Style("noise 0.5 sigma", "#a3263f", "P", "-"),
    "noise-1": Style("noise 1 sigma", "#a3263f", "P", "--"),
    "noise-2": Style("noise 2 sigma", "#a3263f", "P", "-."),
    "noise-3": Style("noise 3 sigma", "#a3263f", "P", ":"),
    "order": Style("other data order", "#2a93b8", "X"),
    "pruned": Style("before the reset", MUTED, "v", "--"),
    "reset": Style("after a reset", "#5f7d1a", "<"),
    "random": Style("random at init", MUTED, "s", ":"),
    "magnitude": Style("magnitude at init", "#8a5a44", "o", "--"),
    "snip": Style("SNIP", "#5a4fb5", "D", "--"),
    "grasp": Style("GraSP", "#5f7d1a", "^", "--"),
    "synflow": Style("SynFlow", "#a8408a", "X", "--"),
}
SEQUENCE = ("#46327e", "#365c8d", "#277f8e", "#1fa187", "#6cae2f", "#c98f00")  # of rounds, the dense net first
RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
}


def style(control: str) -> Style:
    """That of a control; one that is not known here has its own name and a muted line."""
    return STYLES.get(control, Style(control, MUTED, ".", "--"))


def sequence(count: int) -> list[str]:
    """Colours of ``count`` rounds in order, at most as many as there are."""
    if count == 1:
        return [SEQUENCE[0]]
    return [SEQUENCE[round(i * (len(SEQUENCE) - 1) / (count - 1))] for i in range(count)]


@contextmanager
def canvas(width: float = 5.2, height: float = 3.5) -> Iterator[Axes]:
    """Axes of a new figure in the house style; inches."""
    with rc_context(RC):
        yield Figure(figsize=(width, height), layout="constrained").subplots()


def weights_left(axes: Axes, densities: Sequence[float]) -> None:
    """The paper's x axis: percent of weights left, logarithmic, falling."""
    axes.set_xscale("log")
    falling = sorted(set(densities), reverse=True)
    ticks = [falling[i] for i in spread(range(len(falling)))]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([percent(tick) for tick in ticks])
    low, high = min(densities), max(densities)
    margin = max(high / low, 1.02) ** 0.03
    axes.set_xlim(high * margin, low / margin)
    axes.set_xlabel("weights left, %")


def percent(share: float) -> str:
    """100, 51.3, 3.6: of a share, without the sign."""
    return f"{100 * share:.1f}".removesuffix(".0") if share >= 0.01 else f"{100 * share:.2g}"


def seconds(value: float) -> str:
    """1,310 s, 46.2 s: three digits at least."""
    return f"{value:,.0f} s" if abs(value) >= 100 else f"{value:.3g} s"


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], size: float = 9.5) -> None:
    """Names lines (y of the last point, label, colour) at the right edge, moved apart where they would overlap."""
    figure = axes.figure
    figure.get_layout_engine().execute(figure)
    height = axes.get_window_extent().height * 72 / figure.dpi  # points
    (bottom, top), gap = axes.get_ylim(), size * 1.25
    places = [(min(max((y - bottom) / (top - bottom), 0), 1) * height, label, color) for y, label, color in ends]
    places.sort()
    heights = [place[0] for place in places]
    for _ in range(200):  # neighbours push each other apart
        for i in range(len(heights) - 1):
            overlap = gap - (heights[i + 1] - heights[i])
            if overlap > 1e-3:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
        last = len(heights) - 1
        heights = [
            min(max(each, gap * i + size / 2), height - gap * (last - i) - size / 2) for i, each in enumerate(heights)
        ]
    for y, (_, label, color) in zip(heights, places, strict=True):
        axes.annotate(label, (1, 0), (7, y), xycoords="axes fraction", textcoords="offset points", color=color,
                      va="center", fontsize=size, annotation_clip=False)  # fmt: skip


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element on no background, ids prefixed with ``name``; equal figures give equal text."""
    text = io.StringIO()
    with rc_context(RC | {"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # it is laid out
    element = text.getvalue()[text.getvalue().index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*"', "<g", element)


def png(figure: Figure) -> bytes:
    """The figure on white, 200 dots per inch."""
    data = io.BytesIO()
    with rc_context(RC):
        figure.savefig(data, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return data.getvalue()


def on_white(element: str) -> str:
    """An SVG file of an SVG element."""
    head, _, body = element.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>\n<rect width="100%" height="100%" fill="#ffffff"/>{body}\n'


def inline(element: str, alt: str) -> str:
    """The SVG element for a page: its colours are variables, its size the page's; ``alt`` is escaped already."""
    head, _, body = element.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub("|".join(DARK), lambda found: f"var(--{found[0][1:]})", body)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{alt}">{body.replace("xlink:href", "href")}'


def variables(colors: dict[str, str]) -> str:
    """CSS variables, one for each colour of `DARK`, with these values."""
    return ";".join(f"--{name[1:]}:{color}" for name, color in colors.items())


LIGHT_VARIABLES = variables({color: color for color in DARK})
DARK_VARIABLES = variables(DARK)
