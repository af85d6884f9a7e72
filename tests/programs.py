"""Programs that tests put on PATH."""

from __future__ import annotations

from pathlib import Path


def install(folder: Path, monkeypatch, name: str, script: str) -> Path:
    """A shell script of that name in `folder`, which comes first on PATH."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return path
