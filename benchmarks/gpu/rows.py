"""The files of a GPU: gpu-<part>.csv as rows come, gpu-<part>-missing.csv of what has no row, and why."""

from __future__ import annotations

import datetime
import platform
import re
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path

import torch

import sparselottery
from benchmarks import results
from benchmarks.gpu.bars import MEASURED
from benchmarks.gpu.cases import PARTS


def facts(device: str) -> dict[str, str]:
    """What measures, and with which versions."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine += f", {properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    versions |= {"triton": metadata.version("triton"), "sparselottery": sparselottery.__version__}
    versions["python"] = platform.python_version()
    return {
        "machine": machine,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": datetime.date.today().isoformat(),
    }


def folder(machine: str) -> str:
    """A short name: nvidia-h200, nvidia-h100-80gb-hbm3."""
    return re.sub("[^a-z0-9]+", "-", machine.partition(",")[0].lower()).strip("-")


@dataclass
class Files:
    """Of one part. Each call replaces them, atomically, so that what was measured stays whatever happens next."""

    folder: Path
    part: str
    head: dict[str, str]
    rows: list[dict] = field(default_factory=list)
    missing: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.case = [each.name for each in fields(PARTS[self.part])]

    def add(self, rows: list[dict], missing: list[dict]) -> None:
        self.rows += rows
        self.missing += missing
        results.write(self.folder / f"gpu-{self.part}.csv", self.rows, [*self.case, *MEASURED], self.head)
        why = [*self.case, "impl", "why"]
        results.write(self.folder / f"gpu-{self.part}-missing.csv", self.missing, why, self.head)
