"""The README's examples run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(example, names)
    assert names["ticket"].density == pytest.approx(0.8**7, abs=0.01)
    assert names["sparse"](names["x"]).shape == (600, 10)
    assert (tmp_path / "ticket.safetensors").exists()
    assert names["net"](names["x"]).shape == (600, 10)
