"""Tickets in folders like the Hub's repositories, and what is asked of huggingface_hub."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparselottery import Ticket, convert, explain, prune


@pytest.fixture
def sparse():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    return convert(model, prune(model, 0.8), torch.randn(4, 20))


@pytest.fixture
def ticket(sparse):
    return Ticket.from_model(sparse, {"fraction": 0.8, "settings": {"data": "none"}})


def test_a_folder(ticket, tmp_path):
    ticket.save_pretrained(tmp_path / "a" / "ticket")
    assert sorted(path.name for path in (tmp_path / "a" / "ticket").iterdir()) == ["README.md", "ticket.safetensors"]
    assert Ticket.from_pretrained(tmp_path / "a" / "ticket").same(ticket)
    with pytest.raises(FileNotFoundError):
        Ticket.from_pretrained(tmp_path)


def test_the_card(ticket, sparse, tmp_path):
    ticket.save_pretrained(tmp_path)
    plain = (tmp_path / "README.md").read_text()
    ticket.save_pretrained(tmp_path, measured=explain(sparse))
    measured = (tmp_path / "README.md").read_text()
    assert plain.startswith("---\nlibrary_name: sparselottery\n")
    assert "# A lottery ticket: 20.0% of the weights" in plain
    assert "150 of the 750 weights of 2 layers survive" in plain
    assert "| `0.weight` | 30x20 | 120 | 20.00% |\n" in plain
    assert '"fraction": 0.8' in plain
    assert "sparse = ticket.apply()" in plain
    ms = sparse[0].measured.ms
    assert f"| `0.weight` | 30x20 | 120 | 20.00% | {ms['sparse']:.3g} | {ms['dense']:.3g} |\n" in measured
    (digest,) = (line for line in plain.splitlines() if line.startswith("digest: "))
    assert digest in measured
    changed = dict(ticket.weights)
    changed["0.bias"] = changed["0.bias"] + 1
    Ticket(changed, ticket.masks, ticket.recipe).save_pretrained(tmp_path)
    assert digest not in (tmp_path / "README.md").read_text()
    assert "sparse = ticket.apply(model)" in (tmp_path / "README.md").read_text()


def test_push_and_from_pretrained(ticket, tmp_path, monkeypatch):
    """Against a folder that stands for the Hub."""
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    class Api:
        def __init__(self, token=None):
            asked["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            asked.update(private=private, exist_ok=exist_ok)
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, commit_message=None):
            asked["commit_message"] = commit_message
            shutil.copytree(folder_path, tmp_path / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, revision=None):
        asked["revision"] = revision
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    ticket.push_to_hub("me/ticket", private=True, token="secret", commit_message="first")
    assert Ticket.from_pretrained("me/ticket", revision="v1").same(ticket)
    assert asked == {
        "token": "secret",
        "private": True,
        "exist_ok": True,
        "commit_message": "first",
        "revision": "v1",
    }
    assert (tmp_path / "me" / "ticket" / "README.md").exists()
