"""Options of commands: types of their values, and one for every field of a settings dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(size) for size in text.split(","))


def three_sizes(text: str) -> tuple[int, ...]:
    found = sizes(text)
    if len(found) != 3:
        raise argparse.ArgumentTypeError(f"expected batch,in,out, got {text!r}")
    return found


def names(choices: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Of a list of these, separated by commas; none for an empty one."""

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(name for name in text.split(",") if name))
        if unknown := [name for name in found if name not in choices]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {unknown[0]!r}")
        return found

    return parse


def add_settings(
    parser: argparse.ArgumentParser, settings: type, defaults: Mapping[str, Any], leave_out: Collection[str] = ()
) -> None:
    """An option for each field of a dataclass, None if not given; its help shows the default, "the net's" if unknown.

    The field's metadata hold its ``text`` and ``choices``.
    """
    hints = get_type_hints(settings)
    for field in fields(settings):
        if field.name in leave_out:
            continue
        kind, metavar = TYPES.get(hints[field.name], (hints[field.name], None))
        shown = _shown(defaults[field.name], metavar) if field.name in defaults else "the net's"
        choices = field.metadata["choices"]
        text = f"{field.metadata['text']}; default: {shown}".replace("%", "%%")
        option = f"--{field.name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(option, type=kind, metavar=None if choices else metavar, choices=choices, help=text)


def given(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The fields of a dataclass that the user gave options for."""
    values = {field.name: getattr(args, field.name, None) for field in fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs"), help="parent of the run folder; default: %(default)s")


def _shown(value: object, metavar: str | None) -> str:
    """As the option takes it."""
    if isinstance(value, tuple):
        return metavar[1:-1].join(f"{each:g}" for each in value) or "none"
    return str(value)


def _granularity(text: str) -> tuple[int, ...] | str:
    if text == "rows":
        return text
    found = tuple(positive(size) for size in text.split("x"))
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS or rows, got {text!r}")
    return found


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(Fraction(share)) for share in text.split(",") if share)


TYPES: dict[Any, tuple[Callable, str]] = {
    int: (int, "N"),
    float: (float, "X"),
    tuple[int, int] | str: (_granularity, "RxC"),
    tuple[float, ...]: (_shares, "X,X"),
    tuple[int, ...]: (sizes, "N,N"),
}
