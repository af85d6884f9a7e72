from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from sparselottery import convert, prune
from sparselottery.convert import dense_state
from sparselottery.lab import determinism, experiment
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset, load
from sparselottery.lab.determinism import deterministic
from sparselottery.lab.models import build
from sparselottery.lab.settings import preset
from sparselottery.lab.training import train

CUDNN = torch.backends.cudnn


@pytest.fixture(autouse=True)
def _cublas(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def state():
    return CUDNN.deterministic, CUDNN.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_on_cuda_and_only_there(monkeypatch):
    monkeypatch.setattr(CUDNN, "benchmark", True)
    before = state()
    with deterministic("cpu"):
        assert state() == before
    with deterministic("cuda:1"):
        assert state() == (True, False, ":4096:8")
    assert state()[:2] == before[:2]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic("cuda"):
        assert state()[2] == ":16:8"  # the user's


@pytest.mark.parametrize("what", ["ladder", "control"])
def test_every_training_of_an_experiment_is_deterministic(tmp_path, monkeypatch, what):
    """On a stand-in of a GPU: the CPU by that name."""
    seen = []

    def spy(*args, **how):
        seen.append((CUDNN.deterministic, CUDNN.benchmark))
        return train(*args, **how)

    quick = preset("digits", rounds=1, iterations=2, eval_every=2)
    monkeypatch.setattr(experiment, "step_ms", lambda *_: {})
    experiment.run(quick, load("digits"), tmp_path)
    monkeypatch.setattr(experiment, "train", spy)
    monkeypatch.setattr(CUDNN, "benchmark", True)
    stand_in = vars(torch) | {"device": lambda _: SimpleNamespace(type="cuda")}
    monkeypatch.setattr(determinism, "torch", SimpleNamespace(**stand_in))
    if what == "ladder":
        experiment.run(quick, load("digits"), tmp_path / "other")
    else:
        experiment.compare(quick, load("digits"), tmp_path, "reinit", 1, seed=0)
    assert set(seen) == {(True, False)}
    assert CUDNN.benchmark


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["conv-2", "resnet-18"])
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_on_a_real_gpu_trainings_repeat(name, density):
    x, y = torch.randn(600, 3, 32, 32), torch.arange(600) % 10
    data = Dataset("noise", 10, *(part.cuda() for _ in range(3) for part in (x, y)))
    how = {"iterations": 20, "batch": 60, "lr": 1e-2, "eval_every": 10, "augment": True}
    states = []
    for _ in range(2):
        model = reinit(lambda: build(name, (3, 32, 32), 10), 0).cuda()
        with deterministic("cuda"):
            model = convert(model, prune(model, 1 - density))
            train(model, data, **how, optimizer="sgd")
        states.append(dense_state(model))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
