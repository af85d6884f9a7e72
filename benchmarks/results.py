"""Rows <-> CSV files: `# key: value` lines that name the machine, the versions and the date, then a table.

Each machine has a folder of its own, results/<machine>/. A processor with AVX-512 makes the rows of one without, in a
folder with "avx2" to its name:

    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 pytest benchmarks/ --benchmark-only
"""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import re
from pathlib import Path

import torch

import sparselottery
from sparselottery.kernels import backends

RESULTS = Path(__file__).parent / "results"
OURS = "sparselottery"
THREADS = 2  # of every measurement


def cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_model(facts: dict[str, str]) -> str:
    """The processor as the operating system names it."""
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def machine(facts: dict[str, str]) -> str:
    """A short name for a folder: epyc-zen5; of a processor whose generation is not known here, all of `cpu_model`."""
    if facts.get("vendor_id") == "AuthenticAMD":
        family, model = int(facts["cpu family"]), int(facts["model"])
        zen = "zen5" if family == 26 else "zen4" if family == 25 and 16 <= model < 32 else None
        if zen:
            return f"{facts['model name'].split()[1].lower()}-{zen}"
    return re.sub("[^a-z0-9]+", "-", cpu_model(facts).lower()).strip("-")


# What holds torch, and our kernels with it, MKL and oneDNN to lesser instructions than the processor has: so to AVX2.
LIMITS = {name: os.environ[name] for name in
          ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA") if name in os.environ}  # fmt: skip
HELD = sorted({level.lower() for level in LIMITS.values()})
FOLDER = RESULTS / "-".join([machine(cpu_facts()), *HELD])


def folders(given: list[str]) -> list[Path]:
    """The folders named on a command line; without one, those of all machines."""
    return [Path(name) for name in given] or sorted(path for path in RESULTS.iterdir() if path.is_dir())


def header() -> dict[str, str]:
    """What the rows were measured on and with, and when."""
    return {
        "machine": " held to ".join([cpu_model(cpu_facts()), *HELD])
        + f", {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "isa": f"torch {torch.backends.cpu.get_cpu_capability()}; sparselottery {backends()['cpu']}"
        + "".join(f"; {name}={level}" for name, level in LIMITS.items()),
        "versions": f"torch {torch.__version__}, sparselottery {sparselottery.__version__}, "
        f"python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, rows: list[dict], columns: list[str] | None = None, head: dict[str, str] | None = None) -> None:
    """Replace the file at `path` by `text` of the same arguments, atomically."""
    replace(path, text(rows, columns, head))


def text(rows: list[dict], columns: list[str] | None = None, head: dict[str, str] | None = None) -> str:
    """Of a file. columns None: those of the first row; head None: `header`."""
    written = io.StringIO()
    written.writelines(f"# {key}: {value}\n" for key, value in (head or header()).items())
    table = csv.DictWriter(written, columns or list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return written.getvalue()


def replace(path: Path, text: str) -> None:
    """Whoever reads the file finds all of the old text or all of the new one. A failure leaves nothing beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, str], list[dict]]:
    """`parsed` of a file."""
    return parsed(path.read_text())


def parsed(text: str) -> tuple[dict[str, str], list[dict]]:
    """The header and the rows of a file; cells that look like numbers are numbers."""
    lines = text.splitlines()
    head = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {key: value for key, _, value in head}, [{k: _number(v) for k, v in row.items()} for row in rows]


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
