"""What runs on this machine, and what does not and why."""

from __future__ import annotations

import platform

import torch

from .kernels import backends


def info() -> dict[str, str]:
    """Versions, and for each backend what runs or why it is missing.

    Examples:
        >>> list(info())
        ['python', 'torch', 'threads', 'cpu', 'gpu']
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        **backends(),
    }
