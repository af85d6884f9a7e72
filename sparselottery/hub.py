"""Tickets in repositories of the Hugging Face Hub, or in folders like them: ticket.safetensors and a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from .contents import Contents
from .files import atomic, digest

FILE, CARD = "ticket.safetensors", "README.md"
PARTS = "crow_indices", "col_indices", "values"
TIMES = ("sparse_ms", "dense_ms")


def card(contents: Contents, measured: Sequence[Mapping[str, Any]] = ()) -> str:
    """A model card: how many weights survive, in which layers, by which recipe, and a digest over all of it.

    measured: rows of `explain`, whose milliseconds are shown where they are known.
    """
    total = sum(map(prod, contents.shapes.values()))
    nnz = sum(pattern.nnz for pattern, _ in contents.layers.values())
    ms = {row["layer"]: row for row in measured}
    timed = any(row.get(key) is not None for row in measured for key in TIMES)
    head = ["layer", "shape", "survivors", "density", *(["sparse ms", "dense ms"] if timed else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'-|' * len(head)}"]
    for name, (pattern, _) in contents.layers.items():
        shape, row = contents.shapes[name], ms.get(name.removesuffix(".weight"), {})
        cells = [f"`{name}`", "x".join(map(str, shape)), f"{pattern.nnz:,}", f"{pattern.nnz / (prod(shape) or 1):.2%}"]
        cells += ["-" if row.get(key) is None else f"{row[key]:.3g}" for key in TIMES] if timed else []
        lines.append(f"| {' | '.join(cells)} |")
    tensors = dict(contents.dense)
    for name, (pattern, values) in contents.layers.items():
        parts = (*pattern.indices, values)
        tensors |= {f"{name}.{part}": each for part, each in zip(PARTS, parts, strict=True)}
    found = digest(contents.recipe, tensors)
    return "\n".join(
        [
            "---\nlibrary_name: sparselottery\ntags: [lottery-ticket, pruning, sparse]\n---\n",
            f"# A lottery ticket: {nnz / total if total else 1:.1%} of the weights\n",
            f"{nnz:,} of the {total:,} weights of {len(contents.layers)} layers survive. `{FILE}` holds only these.\n",
            "```python\nfrom sparselottery import Ticket\n\nticket = Ticket.from_pretrained(...)  # this repository\n"
            f"sparse = ticket.apply({'' if contents.architecture else 'model'})\n```\n",
            *lines,
            f"\ndigest: `{found}`\n",
            f"recipe:\n\n```json\n{json.dumps(contents.recipe, indent=2, ensure_ascii=False)}\n```\n",
        ]
    )


def write_card(folder: Path, text: str) -> None:
    """The model card, written atomically."""
    with atomic(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def push(folder: Path, repo_id: str, **options: Any) -> str:
    """Upload a folder to the Hub, into a repository that is made if there is none; returns its address.

    options: private and token, of the repository; commit_message, revision and create_pr, of the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    where = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True)
    api.upload_folder(repo_id=where.repo_id, folder_path=folder, **options)
    return str(where)


def find(name: str | os.PathLike[str], **options: Any) -> Path:
    """The file of a ticket: of a folder, or of a repository of the Hub, downloaded once.

    options: revision, token, cache_dir and local_files_only, as of `huggingface_hub.hf_hub_download`. Raises
    FileNotFoundError for a folder without a ticket.
    """
    if Path(name).is_dir():
        return Path(name) / FILE
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(str(name), FILE, **options))
