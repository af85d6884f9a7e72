from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from sparselottery import Pattern
from sparselottery.lab import experiment
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset, load
from sparselottery.lab.experiment import PRESETS, preset
from sparselottery.lab.models import MODELS, lenet_300_100
from sparselottery.masks import pools
from sparselottery.ticket import Ticket

QUICK = preset("digits", rounds=2, iterations=40, eval_every=20)
CIFAR_NETS = ("conv-2", "conv-4", "conv-6", "resnet-18", "vgg-19")
digits_net = partial(lenet_300_100, 64, 10)


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(experiment, "interleaved_ms", partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1))


def run(settings, out, data=None):
    records = []
    return experiment.run(settings, data or load(settings.data), out, on_round=records.append), records


def test_presets_are_the_papers():
    mnist = preset("mnist")
    assert (mnist.rounds, mnist.iterations, mnist.eval_every, mnist.batch, mnist.lr) == (16, 50_000, 100, 60, 1.2e-3)
    assert (mnist.prunings, mnist.rate(mnist.fc_share), mnist.rate(mnist.output_share)) == (16, 0.2, 0.1)
    assert preset("digits", rounds=3).rounds == 3
    assert (preset().data, preset(model="conv-4").data) == ("digits", "cifar10")
    table = [
        (s.model, s.iterations, s.batch, s.optimizer, s.lr, [s.iterations * drop for drop in s.drops])
        for s in map(partial(preset, "cifar10"), CIFAR_NETS)
    ]
    assert table == [
        ("conv-2", 20_000, 60, "adam", 2e-4, []),
        ("conv-4", 25_000, 60, "adam", 3e-4, []),
        ("conv-6", 30_000, 60, "adam", 3e-4, []),
        ("resnet-18", 30_000, 128, "sgd", 0.1, pytest.approx([20_000, 25_000])),
        ("vgg-19", 112_480, 64, "sgd", 0.1, [56_240, 84_360]),
    ]
    for model in CIFAR_NETS:
        settings = preset(model=model)
        deep = model in ("resnet-18", "vgg-19")
        assert (settings.weight_decay, settings.augment, settings.eval_every) == (1e-4 * deep, deep, 100)


@pytest.mark.parametrize(
    ("model", "conv", "fc", "output", "scope"),
    [
        ("lenet-300-100", 0.2, 0.2, 0.1, "layer"),
        ("conv-2", 0.1, 0.2, 0.1, "layer"),
        ("conv-4", 0.1, 0.2, 0.1, "layer"),
        ("conv-6", 0.15, 0.2, 0.1, "layer"),
        ("resnet-18", 0.2, 0.0, 0.0, "global"),
        ("vgg-19", 0.2, 0.0, 0.0, "global"),
    ],
)
def test_what_is_pruned_is_the_papers(monkeypatch, model, conv, fc, output, scope):
    layers = {"conv.weight": (4, 3, 3, 3), "shortcut.weight": (8, 4, 1, 1), "fc1.weight": (5, 4), "fc2.weight": (2, 5)}
    monkeypatch.setattr(experiment, "prunable", lambda _: {name: torch.ones(shape) for name, shape in layers.items()})
    how = experiment.pruning(preset(model=model), nn.Module())
    assert (how["fraction"], how["output_fraction"], how["scope"]) == (pytest.approx(conv), output, scope)
    assert how["rates"] == {"shortcut.weight": 0.0, "fc1.weight": fc, "fc2.weight": fc}
    assert set(how.pop("granularity").values()) == {(1, 1)}
    pruned = {name: pool.fraction for pool in pools(list(layers), **how) for name in pool.names}
    assert pruned == pytest.approx({"conv.weight": conv, "shortcut.weight": 0, "fc1.weight": fc, "fc2.weight": output})


def test_a_net_takes_its_data_only():
    with pytest.raises(ValueError, match=r"'cifar'"):
        preset("cifar")
    with pytest.raises(ValueError, match=r"lenet-300-100: expected data among digits, .*, got 'cifar10'"):
        preset("cifar10")
    with pytest.raises(ValueError, match=r"conv-2: expected data among cifar10, got 'mnist'"):
        preset("mnist", "conv-2")
    with pytest.raises(ValueError, match=r"'lenet'.*lenet-300-100, conv-2"):
        preset(model="lenet")
    assert set(PRESETS) == set(MODELS)


def test_one_shot_prunes_to_where_all_rounds_lead():
    settings = preset("mnist", one_shot=True)
    assert settings.prunings == 1
    assert (1 - settings.rate(1), 1 - settings.rate(0.5)) == pytest.approx((0.8**16, 0.9**16))


def test_names_tell_settings_apart_and_leave_defaults_out():
    assert preset("digits", seed=0).name == preset("digits").name
    assert preset("digits").name == "digits-lenet-300-100-b23c8c75"
    assert preset(model="resnet-18").name.startswith("cifar10-resnet-18-")
    changes = {"rounds": 3, "iterations": 9, "fraction": 0.5, "seed": 1, "one_shot": True, "reinit": True, "lr": 0.1}
    changes |= {"granularity": (16, 16)}
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


def test_blocks_everywhere_but_in_the_output_layer(tmp_path):
    ticket, _ = run(replace(QUICK, granularity=(16, 16)), tmp_path)
    blocks = {name: Pattern.from_mask(mask.flatten(1)).block for name, mask in ticket.masks.items()}
    assert blocks == {"fc1.weight": (16, 16), "fc2.weight": (16, 16), "fc3.weight": (1, 1)}
    assert ticket.recipe["granularity"] == {"fc1.weight": [16, 16], "fc2.weight": [16, 16]}
    assert ticket.recipe["settings"]["granularity"] == [16, 16]
    assert ticket.density == pytest.approx(0.64, abs=0.02)


def test_runs_of_single_weights_are_kept_as_before_there_were_blocks(tmp_path):
    run(QUICK, tmp_path)
    assert "granularity" not in (tmp_path / "settings.json").read_text()


@pytest.fixture
def images() -> Dataset:
    """Random numbers in the shape of CIFAR-10, but smaller."""
    parts = []
    for count in (16, 4, 4):
        parts += [torch.randn(count, 3, 8, 8), torch.randint(10, (count,))]
    return Dataset("cifar10", 10, *parts, note="random numbers")


@pytest.mark.parametrize("model", ["conv-2", "resnet-18"])
def test_nets_with_convolutions(tmp_path, images, model):
    settings = preset(model=model, rounds=1, iterations=2, eval_every=2, batch=4, reinit=True, rewind_step=1)
    ticket, records = run(settings, tmp_path, images)
    assert [record["curves"]["iteration"] for record in records] == [[1, 2]] * 2
    assert all(record["sparse_ms"] > 0 for record in records)
    kept = {name: mask.float().mean().item() for name, mask in ticket.masks.items()}
    if model == "conv-2":
        linear = {name: kept[name] for name in ("fc1.weight", "fc2.weight", "fc3.weight")}
        assert linear == pytest.approx({"fc1.weight": 0.8, "fc2.weight": 0.8, "fc3.weight": 0.9}, abs=1e-3)
        assert all(kept[name] == pytest.approx(0.9, abs=1e-3) for name in kept.keys() - linear.keys())
    else:
        assert kept["fc.weight"] == 1
    assert ticket.recipe["settings"] == ticket.recipe["settings"] | {
        "model": model,
        "shape": [3, 8, 8],
        "classes": 10,
        "note": "random numbers",
    }
    norms = [name for name in ticket.weights if name.endswith("running_mean")]
    assert bool(norms) == (model == "resnet-18")


def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="device: expected cpu"):
        run(preset(device="nowhere"), tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_runs_on_a_gpu(tmp_path):
    settings = preset(device="cuda", rounds=1, iterations=20, eval_every=10)
    ticket, _ = run(settings, tmp_path)
    assert 0.7 < ticket.density < 0.9


def test_the_device_names_a_run_only_if_it_is_not_the_cpu():
    assert preset(device="cpu").name == preset().name != preset(device="cuda").name
