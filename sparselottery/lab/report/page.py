"""The page: one HTML file with everything in it. Whatever comes from files is escaped; no script, no address."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..controls import CONTROLS
from . import draw
from .figures import Drawing, Picture
from .read import TICKET, Run
from .style import CSS
from .summary import Tile
from .tables import Row, grouped

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
    return escape(str(value), quote=True)


def header(title: str, sentence: str, notes: Sequence[str], tiles: Sequence[Tile]) -> str:
    listed = "".join(f"<li>{text(note)}</li>" for note in notes)
    cards = "".join(
        f'<div class="tile"><dt>{text(tile.what)}</dt><dd class="number" style="margin-left:0">{text(tile.number)}</dd>'
        f'<dd class="detail">{text(tile.detail)}</dd></div>'
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
    if not found:
        return ""
    shown = "".join(
        f"<figure><figcaption>{text(each.title)}</figcaption>{draw.inline(each.svg, text(each.alt))}</figure>"
        for each in found
    )
    return f'<div class="{kind}">{shown}</div>'


def pictures(found: Sequence[Picture], kind: str = "pictures") -> str:
    if not found:
        return ""
    shown = "".join(
        f'<figure><img alt="{text(each.title)}" width="{each.width}" '
        f'src="data:image/png;base64,{base64.b64encode(each.png).decode()}">'
        f"<figcaption>{text(each.title)}</figcaption></figure>"
        for each in found
    )
    return f'<div class="{kind}">{shown}</div>'


def key(controls: Sequence[str]) -> str:
    """The colour of each control, and what it is."""
    items = []
    for name in (TICKET, *controls):
        label, color, _, _ = draw.style(name)
        about = CONTROLS[name].text if name in CONTROLS else ""
        items.append(
            f'<li><i style="border-color:var(--{color[1:]})"></i><b>{text(label)}</b>{text(about and " " + about)}</li>'
        )
    return f'<ul class="key">{"".join(items)}</ul>' if controls else ""


def round_table(rounds: Sequence[Row]) -> str:
    """Of the ticket: accuracy, iterations, milliseconds per step, seconds and bytes of each round."""
    groups = (("", 2), ("test accuracy, %", 2), ("to early stop", 2), ("ms per step", 3), ("whole training", 2),
              ("weights, KiB", 2))  # fmt: skip
    names = ("round", "weights left, %", "early stop", "end", "iterations", "seconds", "sparse", "w * mask", "speed-up",
             "iterations", "seconds", "sparse", "dense")  # fmt: skip
    head = "".join(f'<th class="group" colspan="{count}">{text(name)}</th>' for name, count in groups)
    head = f"<tr>{head}</tr><tr>{''.join(f'<th>{text(name)}</th>' for name in names)}</tr>"
    body = ""
    for row in (row for row in rounds if row["control"] == TICKET):
        speed = _ratio(row["dense_ms"], row["sparse_ms"])
        reached = _product(row["early_stop_iteration"], row["train_step_ms"], 1e-3)
        cells = (
            str(row["round"]),
            draw.percent(row["density"]),
            _ranged(row, "early_stop_test_accuracy", 100, ".2f"),
            _ranged(row, "final_test_accuracy", 100, ".2f"),
            _ranged(row, "early_stop_iteration", 1, ",.0f"),
            _plain(reached, ",.1f"),
            _plain(row["sparse_ms"], ".3f"),
            _plain(row["dense_ms"], ".3f"),
            _plain(speed, ".2f") + ("×" if speed else ""),
            _plain(row["iterations"], ",.0f"),
            _ranged(row, "train_seconds", 1, ",.1f"),
            _plain(_product(row["sparse_bytes"], 1 / 1024), ",.0f"),
            _plain(_product(row["dense_bytes"], 1 / 1024), ",.0f"),
        )
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def control_table(rounds: Sequence[Row], column: str, scale: float, form: str) -> str:
    """One column of numbers for each control, one row for each round."""
    controls = grouped(rounds, "control")
    at = {(row["control"], row["round"]): row for row in rounds}
    head = "".join(f"<th>{text(draw.style(name).label)}</th>" for name in controls)
    body = ""
    for row in controls[TICKET]:
        cells = "".join(
            f"<td>{_ranged(at[name, row['round']], column, scale, form) if (name, row['round']) in at else '–'}</td>"
            for name in controls
        )
        body += f"<tr><td>{draw.percent(row['density'])}</td>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr><th>weights left, %</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def density_table(layers: Sequence[Row], densities: Mapping[int, float]) -> str:
    """Percent of weights left of each layer in each round, mean over trials; darker is denser."""
    head = "".join(f"<th>{number}</th>" for number in densities)
    body = ""
    for name, rows in grouped(layers, "layer").items():
        cells = ""
        for group in grouped(rows, "round").values():
            share = sum(row["nnz"] for row in group) / sum(row["total"] for row in group)
            cells += f'<td style="background:rgba(var(--heat),{0.04 + 0.42 * share:.2f})">{draw.percent(share)}</td>'
        size = f"{text(rows[0]['shape'].replace('x', '×'))}"
        body += f'<tr><td>{text(layer(name))} <span class="range">{size}</span></td>{cells}</tr>'
    whole = "".join(f"<td>{draw.percent(density)}</td>" for density in densities.values())
    return (
        f'<div class="scroll"><table class="heat"><thead><tr><th>round</th>{head}</tr></thead>'
        f"<tbody>{body}<tr><td><b>all layers</b></td>{whole}</tr></tbody></table></div>"
    )


def settings(run: Run) -> str:
    """Every setting, folded."""
    shown = {"settings": run.settings, "grid": {name: value for name, value in run.grid.items() if name != "settings"}}
    shown["recipe"] = {name: value for name, value in run.recipe.items() if name != "settings"}
    body = "".join(
        f"<tr><td>{text(name)}</td><td>{text(json.dumps(value, ensure_ascii=False))}</td></tr>"
        for part in shown.values()
        for name, value in part.items()
    )
    return f'<details><summary>All settings</summary><div class="scroll settings"><table><tbody>{body}</tbody></table></div></details>'


def details(summary: str, contents: str) -> str:
    return f"<details><summary>{text(summary)}</summary>{contents}</details>"


def footer(lines: Sequence[str]) -> str:
    return f"<footer>{''.join(f'<p>{text(line)}</p>' for line in lines)}</footer>"


def layer(name: str) -> str:
    """fc1 of fc1.weight."""
    return name.removesuffix(".weight")


def _ranged(row: Row, column: str, scale: float, form: str) -> str:
    """The mean and, where trials differ, how far they go."""
    if row[column] is None:
        return "–"
    low, high = (f"{scale * row[column + end]:{form}}" for end in ("_min", "_max"))
    mean = f"{scale * row[column]:{form}}"
    return mean if low == high else f'{mean} <span class="range">{low}–{high}</span>'


def _plain(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _product(*factors: float | None) -> float | None:
    product = 1.0
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product
