"""The dense model's state_dict in a safetensors file, zeros where pruned: for any framework, with masks lost.

Keys and shapes are the model's own, so that "model.safetensors" beside a config.json is what Hugging Face's
`from_pretrained` reads.
"""

from __future__ import annotations

from pathlib import Path

from ..files import digest, read_safetensors, write_safetensors
from .job import OTHER_TENSORS, Job


def write(job: Job, path: Path) -> None:
    write_safetensors(path, job.ticket.weights, {"format": "pt"})


def fault(job: Job, path: Path) -> str:
    """What is wrong with the file: it must read back equal, to the bit."""
    same = digest({}, read_safetensors(path.read_bytes())[1]) == digest({}, job.ticket.weights)
    return "" if same else OTHER_TENSORS
