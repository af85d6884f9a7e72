from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from sparselottery.lab import experiment
from sparselottery.lab.controls import reinit
from sparselottery.lab.experiment import preset
from sparselottery.lab.models import lenet_300_100
from sparselottery.ticket import Ticket

QUICK = preset("digits", rounds=2, iterations=40, eval_every=20)
digits_net = partial(lenet_300_100, 64, 10)


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(experiment, "interleaved_ms", partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1))


def run(settings, out):
    records = []
    return experiment.run(settings, out, on_round=records.append), records


def test_presets_are_the_papers():
    mnist = preset("mnist")
    assert (mnist.rounds, mnist.iterations, mnist.eval_every, mnist.batch, mnist.lr) == (16, 50_000, 100, 60, 1.2e-3)
    assert mnist.prunings == (16, 0.2, 0.1)
    assert preset("digits", rounds=3).rounds == 3
    with pytest.raises(ValueError, match=r"'cifar'.*digits"):
        preset("cifar")


def test_one_shot_prunes_to_where_all_rounds_lead():
    rounds, fraction, output_fraction = preset("mnist", one_shot=True).prunings
    assert rounds == 1
    assert (1 - fraction, 1 - output_fraction) == pytest.approx((0.8**16, 0.9**16))


def test_names_tell_settings_apart_and_leave_defaults_out():
    assert preset("digits", seed=0).name == preset("digits").name
    assert preset("digits").name.startswith("digits-lenet-300-100-")
    changes = {"rounds": 3, "iterations": 9, "fraction": 0.5, "seed": 1, "one_shot": True, "reinit": True, "lr": 0.1}
    names = {preset("digits", **{key: value}).name for key, value in changes.items()}
    assert len(names | {preset("digits").name, preset("mnist").name}) == len(changes) + 2


def test_a_run_and_what_it_records(tmp_path):
    ticket, records = run(QUICK, tmp_path)
    assert [record["round"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["curves"]["iteration"] == [0, 20, 40]
        assert min(record["sparse_ms"], record["dense_ms"]) > 0
        assert record["dense_bytes"] == 4 * record["total"]
        indices = 4 * (record["nnz"] + 300 + 100 + 10 + 3)
        assert record["sparse_bytes"] == 4 * record["nnz"] + indices
    assert records[0]["final_test_accuracy"] > 0.5
    assert records[2]["density"] == ticket.density == pytest.approx(0.64, abs=0.01)
    first = reinit(digits_net, QUICK.seed).state_dict()
    for name, mask in ticket.masks.items():
        assert torch.equal(ticket.weights[name], first[name] * mask)


def test_measuring_leaves_the_trained_weights_alone(tmp_path, monkeypatch):
    run(QUICK, tmp_path / "measured")
    monkeypatch.setattr(experiment, "step_ms", lambda *_: {})
    run(QUICK, tmp_path / "not")
    for name in ("round-00.safetensors", "round-02.safetensors", "ticket.safetensors"):
        assert (tmp_path / "measured" / name).read_bytes() == (tmp_path / "not" / name).read_bytes()


def test_finished_rounds_are_read(tmp_path, monkeypatch):
    _, records = run(QUICK, tmp_path)
    (tmp_path / "round-02.safetensors").unlink()
    trained = []
    train = experiment.train
    monkeypatch.setattr(experiment, "train", lambda *args, **kw: trained.append(1) or train(*args, **kw))
    _, again = run(QUICK, tmp_path)
    assert len(trained) == 1
    assert again[:2] == records[:2]
    assert again[2]["curves"] == records[2]["curves"]


def test_reinit_trains_the_same_mask_from_other_weights(tmp_path):
    _, plain = run(QUICK, tmp_path / "plain")
    _, records = run(replace(QUICK, reinit=True), tmp_path / "reinit")
    for record, alone in zip(records, plain, strict=True):
        assert record["curves"] == alone["curves"]
        assert record["reinit_early_stop_iteration"] in (20, 40)
        assert 0.3 < record["reinit_early_stop_test_accuracy"] < 1


def test_rewinds_to_a_later_step(tmp_path):
    ticket, records = run(replace(QUICK, rewind_step=10), tmp_path)
    assert records[0]["curves"]["iteration"] == [10, 20, 40]
    first = reinit(digits_net, QUICK.seed).state_dict()
    mask = ticket.masks["fc1.weight"]
    assert not torch.equal(ticket.weights["fc1.weight"], first["fc1.weight"] * mask)
    assert records[0]["curves"]["val_loss"][0] < 2.2  # ten steps in


def test_continued_training_goes_on_from_the_trained_weights(tmp_path):
    _, records = run(replace(QUICK, continued=True), tmp_path)
    assert records[1]["curves"]["val_loss"][0] < records[0]["curves"]["val_loss"][0] / 2


def test_one_shot(tmp_path):
    ticket, records = run(replace(QUICK, one_shot=True), tmp_path)
    assert len(records) == 2
    assert ticket.density == pytest.approx(0.64, abs=0.01)
    assert Ticket.load(tmp_path / "round-01.safetensors").density == ticket.density
