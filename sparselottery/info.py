"""What runs on this machine, and what does not and why."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from .kernels import backends


def info() -> dict[str, str]:
    """Versions, and for each backend what runs or why it is missing."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        **backends(),
    }


def machine() -> str:
    """What a measurement was made on: processor, cores, torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
