"""Executions that are chosen once and kept, whatever a later measurement would say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from sparselottery import convert, prune
from sparselottery.lab import executions, experiment
from sparselottery.lab.data import load
from sparselottery.lab.executions import settle
from sparselottery.lab.models import lenet_300_100
from sparselottery.lab.settings import preset
from sparselottery.nn import MaskedLayer

QUICK = preset("digits", rounds=2, iterations=4, eval_every=4, execution="measured")


@pytest.fixture
def measured(monkeypatch):
    """What every measurement is made to find, and how many there were."""
    found = {"execution": "dense", "count": 0}

    def choose(model, example_input):
        assert example_input.shape == (60, 64)
        found["count"] += 1
        for layer in masked(model):
            layer.execution = found["execution"]

    monkeypatch.setattr(executions, "choose_execution", choose)
    monkeypatch.setattr(experiment, "step_ms", lambda *_: {})
    return found


def masked(model) -> list[MaskedLayer]:
    return [layer for layer in model.modules() if isinstance(layer, MaskedLayer) and layer.density < 1]


def net(seed: int = 0):
    torch.manual_seed(seed)
    model = lenet_300_100(64, 10, hidden=(20,))
    return convert(model, prune(model, 0.5))


def test_the_first_choice_stays(tmp_path, measured):
    x, first = torch.randn(60, 64), net()
    assert settle(first, x, tmp_path / "new") == {"fc1": "dense", "fc2": "dense"}
    measured["execution"] = "sparse"
    again, other = net(), net(seed=1)
    assert settle(again, x, tmp_path / "new") == {"fc1": "dense", "fc2": "dense"}
    assert [layer.execution for layer in masked(again)] == ["dense", "dense"]
    settle(other, x, tmp_path / "new")  # other masks
    assert [layer.execution for layer in masked(other)] == ["sparse", "sparse"]
    assert measured["count"] == 2


@pytest.mark.parametrize("kept", [{"fc1": "dense"}, {"fc1": "dense", "fc2": "nonsense"}])
def test_a_file_of_another_net_is_refused(tmp_path, measured, kept):
    settle(net(), torch.randn(60, 64), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="expected"):
        settle(net(), torch.randn(60, 64), tmp_path)


def test_who_goes_on_and_who_is_compared_run_as_the_first_did(tmp_path, measured, monkeypatch):
    """A ladder whose last round is lost, and a control on its masks, where a measurement now says otherwise."""
    trained, train = [], experiment.train

    def spy(model, *args, **how):
        trained.append({layer.execution for layer in masked(model)})
        return train(model, *args, **how)

    monkeypatch.setattr(experiment, "train", spy)
    experiment.run(QUICK, load("digits"), tmp_path)
    before = (tmp_path / "round-02.safetensors").read_bytes()
    for name in ("round-02.safetensors", "round-02.json", "ticket.safetensors"):
        (tmp_path / name).unlink()
    measured["execution"] = "sparse"
    experiment.run(QUICK, load("digits"), tmp_path)
    assert (tmp_path / "round-02.safetensors").read_bytes() == before
    record, _ = experiment.compare(QUICK, load("digits"), tmp_path, "reinit", 2, seed=0)
    assert trained == [set(), {"dense"}, {"dense"}, {"dense"}, {"dense"}]
    assert record["executions"] == json.loads((tmp_path / "round-02.json").read_text())["executions"]
    assert set(record["executions"].values()) == {"dense"}


def test_nothing_is_measured_unless_asked_for(tmp_path, measured):
    experiment.run(replace(QUICK, execution="kernels"), load("digits"), tmp_path)
    assert measured["count"] == 0
    assert not (tmp_path / "executions").exists()
