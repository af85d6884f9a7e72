"""The examples run, on fewer steps, and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # Trainers' own, of loggers, workers and deprecations


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in a folder of its own; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_plain_pytorch(run, tmp_path):
    *rounds, last = run("plain_pytorch.py", 30).splitlines()
    assert [line.split(",")[0] for line in rounds] == [
        f"round {number}: {0.6**number:.0%} of the weights" for number in range(6)
    ]
    assert last.startswith("of the first five: [")
    assert (tmp_path / "ticket.safetensors").exists()


def test_huggingface_trainer(run, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert "after 10, 11, 12, 13: [" in run("huggingface_trainer.py", 3)
    assert '"quant_method": "sparselottery"' in (tmp_path / "sparse-llama" / "config.json").read_text()


def test_lightning(run):
    pytest.importorskip("lightning")
    kept = round(0.1 * 64 * 256) + round(0.1 * 256 * 256) + round(0.1 * 256 * 2)
    assert run("lightning_pruning.py", 40).startswith(f"{kept:,} weights are left")


def test_rounds_of_lightning(run, tmp_path):
    pytest.importorskip("lightning")
    rounds = [line.split(",")[0] for line in run("lightning_ticket.py", 3).splitlines()]
    assert rounds == [f"round {number}: {0.5**number:.1%} of the weights" for number in range(4)]
    assert (tmp_path / "ticket.safetensors").exists()
