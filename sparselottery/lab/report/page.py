"""The page: one HTML file with everything in it. Whatever comes from files is escaped; no script, no address."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..controls import CONTROLS
from . import draw
from .figures import Drawing, Picture
from .folder import TICKET, Run
from .style import CSS
from .summary import Tile
from .tables import Row, grouped

BORDERS = {"-": "solid", "--": "dashed", "-.": "dashed", ":": "dotted"}  # of matplotlib's lines
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; ``parts`` are HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{"".join(parts)}
</main>
</body>
</html>
"""


def text(value: Any) -> str:
    """Escaped, for content and quoted attributes."""
    return escape(str(value), quote=True).replace(" %", "&nbsp;%").replace("w * mask", "w&nbsp;*&nbsp;mask")


def header(title: str, sentence: str, notes: Sequence[str], tiles: Sequence[Tile]) -> str:
    listed = "".join(f"<li>{text(note)}</li>" for note in notes)
    cards = "".join(
        f'<div class="tile"><dt>{text(tile.what)}</dt><dd class="number">{text(tile.number)}</dd>'
        f"<dd>{text(tile.detail)}</dd></div>"
        for tile in tiles
    )
    return (
        f'<header><p class="eyebrow">Lottery ticket report</p><h1>{text(title)}</h1>'
        f'<p class="lead">{text(sentence)}</p>'
        + (f'<ul class="notes">{listed}</ul>' if notes else "")
        + (f'<dl class="tiles">{cards}</dl>' if tiles else "")
        + "</header>"
    )


def section(heading: str, about: str, *parts: str) -> str:
    """Nothing if there is nothing to show."""
    if not any(parts):
        return ""
    return f'<section><h2>{text(heading)}</h2><p class="about">{text(about)}</p>{"".join(parts)}</section>'


def drawings(found: Sequence[Drawing], kind: str = "figures") -> str:
    """``kind``: "figures", two in a row, or "panels", small ones."""
    return _row(
        (f"<figcaption>{text(each.title)}</figcaption>{draw.inline(each.svg, text(each.alt))}" for each in found),
        kind,
    )


def pictures(found: Sequence[Picture], kind: str = "pictures") -> str:
    return _row(
        (
            f'<img alt="{text(each.title)}" width="{each.width}" '
            f'src="data:image/png;base64,{base64.b64encode(each.png).decode()}">'
            f"<figcaption>{text(each.title)}</figcaption>"
            for each in found
        ),
        kind,
    )


def _row(figures: Iterable[str], kind: str) -> str:
    """Nothing if there is nothing to show."""
    shown = "".join(f"<figure>{figure}</figure>" for figure in figures)
    return f'<div class="{kind}">{shown}</div>' if shown else ""


def key(controls: Sequence[str]) -> str:
    """The colour of each control, and what it is."""
    items = []
    for name in (TICKET, *controls):
        label, color, _, dashes = draw.style(name)
        line = f"{BORDERS[dashes]} var(--{color[1:]})"
        about = CONTROLS[name].text if name in CONTROLS else ""
        items.append(f'<li><i style="border-top:3px {line}"></i><b>{text(label)}</b>{text(about and " " + about)}</li>')
    return f'<ul class="key">{"".join(items)}</ul>' if controls else ""


def round_key(densities: Mapping[int, float], colored: Mapping[int, float]) -> str:
    """The colours of rounds, among all that have one."""
    colors = dict(zip(colored, draw.sequence(len(colored)), strict=True))
    items = "".join(
        f'<li><i style="border-color:var(--{colors[number][1:]})"></i>{draw.percent(density)} %</li>'
        for number, density in densities.items()
    )
    return f'<ul class="key">{items}</ul>'


def round_table(rounds: Sequence[Row], own: Sequence[str]) -> str:
    """Of the ticket: accuracy, iterations, milliseconds per step, seconds and bytes of each round, where known.

    own: further numbers, which a training of the user's own returned.
    """
    further = [("returned by the training", key, lambda row, key=key: _ranged(row, key, 1, ",.6g")) for key in own]
    tickets = [row for row in rounds if row["control"] == TICKET]
    columns = [each for each in (*COLUMNS, *further) if any(each[2](row) != draw.DASH for row in tickets)]
    groups = {group: sum(each == group for each, _, _ in columns) for group, _, _ in columns}
    head = "".join(f'<th class="group" colspan="{count}">{text(group)}</th>' for group, count in groups.items())
    names = "".join(f"<th>{text(name)}</th>" for _, name, _ in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell(row)}</td>' for _, _, cell in columns)}</tr>" for row in tickets)
    return _table(f"<tr>{head}</tr><tr>{names}</tr>", body)


def control_table(rounds: Sequence[Row], column: str, scale: float, form: str) -> str:
    """One column of numbers for each control, one row for each round."""
    controls = grouped(rounds, "control")
    at = {(row["control"], row["round"]): row for row in rounds}
    head = "".join(f"<th>{text(draw.style(name).label)}</th>" for name in controls)
    body = ""
    for row in controls[TICKET]:
        found = [at.get((name, row["round"])) for name in controls]
        cells = "".join(f"<td>{_ranged(each, column, scale, form) if each else draw.DASH}</td>" for each in found)
        body += f"<tr><td>{100 * row['density']:.1f}</td>{cells}</tr>"
    return _table(f"<tr><th>weights left, %</th>{head}</tr>", body)


def density_table(layers: Sequence[Row], densities: Mapping[int, float]) -> str:
    """Percent of weights left of each layer in each round, mean over trials; darker is denser."""
    head = "".join(f"<th>{number}</th>" for number in densities)
    body = ""
    for name, rows in grouped(layers, "layer").items():
        cells = ""
        for group in grouped(rows, "round").values():
            share = sum(row["nnz"] for row in group) / sum(row["total"] for row in group)
            cells += f'<td style="background:rgba(var(--heat),{0.04 + 0.42 * share:.2f})">{100 * share:.1f}</td>'
        size = text(rows[0]["shape"].replace("x", draw.TIMES))
        body += f'<tr><td>{text(layer(name))} <span class="range">{size}</span></td>{cells}</tr>'
    whole = "".join(f"<td>{100 * density:.1f}</td>" for density in densities.values())
    return _table(f"<tr><th>round</th>{head}</tr>", f"{body}<tr><td><b>all layers</b></td>{whole}</tr>", "heat")


def settings(run: Run) -> str:
    """Every setting, folded."""
    shown = {"settings": run.settings, "grid": {name: value for name, value in run.grid.items() if name != "settings"}}
    shown["recipe"] = {name: value for name, value in run.recipe.items() if name != "settings"}
    body = "".join(
        f"<tr><td>{text(name)}</td><td>{text(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for part in shown.values()
        for name, value in part.items()
    )
    return details("All settings", _table("", body, "settings"))


def details(summary: str, contents: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{contents}</details>"


def footer(lines: Sequence[str]) -> str:
    return f"<footer>{''.join(f'<p>{text(line)}</p>' for line in lines)}</footer>"


def layer(name: str) -> str:
    """fc1 of fc1.weight."""
    return name.removesuffix(".weight")


def _table(head: str, body: str, kind: str = "") -> str:
    return f'<div class="scroll"><table class="{kind}"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _ranged(row: Row, column: str, scale: float, form: str) -> str:
    """The mean and, where trials differ, how far they go."""
    if row[column] is None:
        return draw.DASH
    low, high = (f"{scale * row[column + end]:{form}}" for end in ("_min", "_max"))
    mean = f"{scale * row[column]:{form}}"
    return mean if low == high else f'{mean} <span class="range">{low}{draw.DASH}{high}</span>'


def _plain(value: float | None, form: str) -> str:
    return draw.DASH if value is None else f"{value:{form}}"


def _product(*factors: float | None) -> float | None:
    product = 1.0
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product


def _percent(key: str) -> Callable[[Row], str]:
    return lambda row: _ranged(row, key, 100, ".2f")


def _times(form: str, *keys: str, scale: float = 1.0) -> Callable[[Row], str]:
    """The product of some columns and ``scale``."""
    return lambda row: _plain(_product(scale, *(row[key] for key in keys)), form)


def _seconds_to_stop(row: Row) -> str:
    if None in (row["early_stop_iteration"], row["first_iteration"], row["train_step_ms"]):
        return draw.DASH
    return f"{(row['early_stop_iteration'] - row['first_iteration']) * row['train_step_ms'] / 1e3:,.2f}"


def _speed_up(row: Row) -> str:
    ours, *others = (row[key] for key in ("sparse_ms", "whole_ms", "dense_ms"))
    return f"{min(others) / ours:.2f}{draw.TIMES}" if ours and all(others) else draw.DASH


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (  # of `round_table`: group, name, cell
    ("", "round", lambda row: str(row["round"])),
    ("", "weights left, %", lambda row: f"{100 * row['density']:.1f}"),
    ("test accuracy, %", "early stop", _percent("early_stop_test_accuracy")),
    ("test accuracy, %", "end", _percent("final_test_accuracy")),
    ("to early stop", "iterations", lambda row: _ranged(row, "early_stop_iteration", 1, ",.0f")),
    ("to early stop", "seconds", _seconds_to_stop),
    ("to the end", "iterations", _times(",.0f", "iterations")),
    ("to the end", "seconds", lambda row: _ranged(row, "train_seconds", 1, ",.2f")),
    ("ms per step", "sparse", _times(".3f", "sparse_ms")),
    ("ms per step", "whole net", _times(".3f", "whole_ms")),
    ("ms per step", "w * mask", _times(".3f", "dense_ms")),
    ("ms per step", "speed-up", _speed_up),
    ("weights", "KiB", _times(",.0f", "sparse_bytes", scale=1 / 1024)),
)
