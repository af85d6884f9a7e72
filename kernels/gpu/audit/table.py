"""The committed tables: what the audit found of these kernels, with each Triton for which they are audited.

    # Triton 3.9.0; targets sm_80 sm_86 ...; kernels/gpu sha256 5e1f...
    problem,kernel,target,regs,...

`make audit` redoes them all; a table is stale once a source file of the kernels is another.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TextIO

from .aot import TARGETS, triton_version

VERSIONS = "3.6", "3.9"  # of Triton: the first that is supported, and the one of constraints.txt
_FOLDER = Path(__file__).resolve().parent


def path(version: str) -> Path:
    return _FOLDER / f"table-{version}.csv"


def first_line(triton: str) -> str:
    """Of a table that is made now: what its rows depend on. triton: its full version."""
    digest = sha256()
    for source in sorted(_FOLDER.parent.rglob("*.py")):
        digest.update(f"{source.relative_to(_FOLDER.parent)}\n".encode() + source.read_bytes())
    return f"# Triton {triton}; targets {' '.join(TARGETS)}; kernels/gpu sha256 {digest.hexdigest()}"


def stale(version: str) -> str | None:
    """Why the table of a Triton is not that of these kernels; None if it is."""
    if not path(version).exists():
        return f"expected {path(version).name}: make audit"
    got = path(version).read_text().splitlines()[0]
    expected = first_line(triton_of(version))
    return None if got == expected else f"{path(version).name}: expected {expected!r}, got {got!r}: make audit"


def triton_of(version: str) -> str:
    """The full version of the Triton with which a table was made."""
    return path(version).read_text().split(";")[0].split()[-1]


def rows(version: str) -> list[dict[str, str]]:
    return list(csv.DictReader(path(version).read_text().splitlines()[1:]))


@contextmanager
def replacing() -> Iterator[TextIO]:
    """A file, its first line written; at the end, if nothing was raised, it is the table of the Triton here."""
    import triton

    final = path(".".join(map(str, triton_version())))
    partial = final.with_suffix(".part")
    with partial.open("w") as file:
        print(first_line(triton.__version__), file=file)
        yield file
    os.replace(partial, final)
