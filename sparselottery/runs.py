"""The folder of a run of `find_ticket`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import ranks
from .contents import Contents
from .files import read_json, write, write_json
from .ticket import Ticket


class RunFolder:
    """The folder of a run, each file written atomically; without a folder nothing is found and nothing kept.

    Of several processes that train together only the first writes; a round's file is there only when all have done it.
    """

    def __init__(self, out: str | os.PathLike[str] | None) -> None:
        self.folder = None if out is None else Path(out)
        self.writes = self.folder is not None and ranks.rank() == 0

    def settings(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """The recipe this folder was begun with: `recipe` itself if that is now; ValueError if another."""
        if self.folder is None:
            return recipe
        path = self.folder / "settings.json"
        if not self.writes:
            self.wait()
            if not path.exists():
                raise ValueError(f"{path}: expected a folder that all processes see, not found by rank {ranks.rank()}")
            return read_json(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            got = f"{str(self.folder)!r}: {error.strerror}"
            raise type(error)(f"out: expected a folder that can be made, got {got}") from error
        recipe = self._begun(path, recipe)
        self.wait()
        return recipe

    def _begun(self, path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
        if not path.exists():
            write_json(path, recipe)
            return recipe
        found = read_json(path)
        before, now = _flat({**found, "seed": None}), _flat({**recipe, "seed": None})
        different = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if different:
            changes = ", ".join(f"{key}: expected {before.get(key)!r}, got {now.get(key)!r}" for key in different)
            raise ValueError(f"{path} is of a run with other settings (use another folder): {changes}")
        return found

    def wait(self) -> None:
        """Until all processes are here: what the first wrote before, the others can then read."""
        if self.folder is not None:
            ranks.barrier()

    def load(self, name: str) -> Ticket | None:
        if self.folder is None or not (self.folder / f"{name}.safetensors").exists():
            return None
        return Ticket.load(self.folder / f"{name}.safetensors")

    def save(self, name: str, kept: Ticket | Contents) -> None:
        if self.writes:
            write(self.folder / f"{name}.safetensors", kept.contents() if isinstance(kept, Ticket) else kept)

    def load_record(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / f"{name}.json")

    def save_record(self, name: str, record: dict[str, Any]) -> None:
        if self.writes:
            write_json(self.folder / f"{name}.json", record)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
