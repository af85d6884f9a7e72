"""The files of a run on a GPU, at most eight: rows as they come, what has none and why, the log, tests and summary."""

from __future__ import annotations

import datetime
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import torch

import sparselottery
from benchmarks import results
from benchmarks.gpu.bars import MEASURED
from benchmarks.gpu.cases import PARTS


def facts(device: str) -> dict[str, str]:
    """What measures, and with which versions. Opens the GPU; what it raises is told in place of its name."""
    try:
        machine = _gpu() if device == "cuda" else platform.machine()
    except Exception as error:  # the tests may say more
        machine = f"unknown, {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    versions |= {"triton": metadata.version("triton"), "sparselottery": sparselottery.__version__}
    versions["python"] = platform.python_version()
    return {"machine": machine, "versions": ", ".join(f"{name} {version}" for name, version in versions.items())}


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    counts = f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {counts}"


def folder_name(machine: str) -> str:
    """A short name: nvidia-h200, nvidia-h100-80gb-hbm3."""
    return re.sub("[^a-z0-9]+", "-", machine.partition(",")[0].lower()).strip("-")


PARTS_OF_KERNELS = ("tune", "profile", "probe")
KERNEL_COLUMNS = ("part", "kernel", "case", "config", "us", "detail")
MISSING_COLUMNS = ("part", "case", "impl", "why")
TABLES = {
    **{part: (*(each.name for each in fields(kind)), *MEASURED) for part, kind in PARTS.items()},
    "kernels": KERNEL_COLUMNS,
    "missing": MISSING_COLUMNS,
}


_NOTHING: Mapping[str, str] = MappingProxyType({})


class Folder:
    """What a run leaves, from its first second on: log.txt, summary.txt, junit.xml and gpu-<table>.csv of TABLES.

    Each call replaces a file, atomically, so that what was measured stays whatever happens next. A disk that refuses is
    told and stops nothing: texts has all files but the log, by name, for the end of the output.

    Of an older run in the same folder log.txt, summary.txt and gpu-missing.csv end here. Other files stay until this
    run begins a part that writes them; then they are this run's alone.
    """

    def __init__(self, path: Path, head: Mapping[str, str]) -> None:
        self.path, self.head = path, {"date": datetime.date.today().isoformat(), **head}
        self.rows: dict[str, list[dict]] = {name: [] for name in TABLES}
        self.texts: dict[str, str] = {}
        self._told: set[str] = set()
        with self._forgiving("log.txt"):
            results.replace(path / "log.txt", "")
        self.begin("missing")

    def begin(self, *tables: str) -> None:
        """A part runs whose rows are for these tables."""
        for name in tables:
            self._write(name)

    def describe(self, facts: dict[str, str]) -> None:
        """More for the head of every table that has begun and of all that will."""
        self.head |= facts
        self.begin(*(name for name in TABLES if f"gpu-{name}.csv" in self.texts))

    def tell(self, text: str, aloud: bool = True) -> None:
        """Into the log and, if aloud, to the terminal."""
        if aloud:
            with suppress(OSError):  # nobody reads it any more
                print(text, flush=True)
        with self._forgiving("log.txt"), (self.path / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def add(self, name: str, rows: list[dict]) -> None:
        """Rows of one of TABLES."""
        if rows:
            self.rows[name] += rows
            self._write(name)

    def miss(self, part: str, case: str, impl: str, why: str) -> None:
        self.add("missing", [dict(zip(MISSING_COLUMNS, (part, case, impl, why), strict=True))])

    def save(self, name: str, text: str) -> None:
        """Another file."""
        self.texts[name] = text
        with self._forgiving(name):
            results.replace(self.path / name, text)

    def _write(self, name: str) -> None:
        self.save(f"gpu-{name}.csv", results.text(self.rows[name], list(TABLES[name]), self.head))

    @contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if name not in self._told:  # once: it will not be the last
                self._told.add(name)
                print(f"{self.path / name} cannot be written: {error}", flush=True)


def opened(wanted: Path, head: Mapping[str, str] = _NOTHING) -> Folder:
    """The folder `wanted`, or a new one where nothing can be written there: a GPU's minutes are not to be lost."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return Folder(wanted, head)
    except OSError as error:
        folder = Folder(Path(tempfile.mkdtemp(prefix="gpu-")), head)
        folder.tell(f"{wanted}: cannot be written ({error}); results go to {folder.path}")
        return folder
