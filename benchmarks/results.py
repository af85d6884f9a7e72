"""Rows <-> CSV files: `# key: value` lines that name the machine, the versions and the date, then a table."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
from pathlib import Path

import torch

import sparselottery
from sparselottery.kernels import backends

FOLDER = Path(__file__).parent / "results"
OURS = "sparselottery"


def header() -> dict[str, str]:
    """What the rows were measured on and with, and when."""
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "isa": f"torch {torch.backends.cpu.get_cpu_capability()}; sparselottery {backends()['cpu']}",
        "versions": f"torch {torch.__version__}, sparselottery {sparselottery.__version__}, "
        f"python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }


def cpu_model() -> str:
    """The processor as the operating system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def write(path: Path, rows: list[dict]) -> None:
    """Replace the file at `path`, atomically; every row has the columns of the first one."""
    text = io.StringIO()
    text.writelines(f"# {key}: {value}\n" for key, value in header().items())
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text.getvalue())
    os.replace(part, path)


def read(path: Path) -> tuple[dict[str, str], list[dict]]:
    """The header and the rows of a file; cells that look like numbers are numbers."""
    lines = path.read_text().splitlines()
    head = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {key: value for key, _, value in head}, [{k: _number(v) for k, v in row.items()} for row in rows]


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
