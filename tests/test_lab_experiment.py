from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from sparselottery import Pattern, convert, prune
from sparselottery.kernels import cpu_train
from sparselottery.lab import experiment
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset, load
from sparselottery.lab.models import lenet_300_100
from sparselottery.lab.settings import preset
from sparselottery.masks import pools
from sparselottery.ticket import Ticket

QUICK = preset("digits", rounds=2, iterations=40, eval_every=20)
digits_net = partial(lenet_300_100, 64, 10)


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(experiment, "interleaved_ms", partial(experiment.interleaved_ms, bursts=1, burst_ms=0.1))


def run(settings, out, data=None):
    records = []
    return experiment.run(settings, data or load(settings.data), out, on_round=records.append), records


LAYERS = {"conv.weight": (4, 3, 3, 3), "shortcut.weight": (8, 4, 1, 1), "fc1.weight": (5, 4), "fc2.weight": (2, 5)}


def rates(monkeypatch, settings):
    """The fraction that each layer of a small net loses, and who competes with whom."""
    weights = {name: torch.ones(shape) for name, shape in LAYERS.items()}
    monkeypatch.setattr(experiment, "prunable", lambda _: weights)
    chosen = pools(list(LAYERS), **experiment.pruning(settings, nn.Module()))
    return {name: pool.fraction for pool in chosen for name in pool.names}, {pool.names for pool in chosen}


@pytest.mark.parametrize(
    ("model", "conv", "fc", "output"),
    [
        ("lenet-300-100", 0.2, 0.2, 0.1),
        ("conv-2", 0.1, 0.2, 0.1),
        ("conv-4", 0.1, 0.2, 0.1),
        ("conv-6", 0.15, 0.2, 0.1),
        ("resnet-18", 0.2, 0.0, 0.0),
        ("vgg-19", 0.2, 0.0, 0.0),
    ],
)
def test_what_is_pruned_is_the_papers(monkeypatch, model, conv, fc, output):
    found, _ = rates(monkeypatch, preset(model=model))
    assert found == pytest.approx(dict(zip(LAYERS, (conv, 0, fc, output), strict=True)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prune_layers": "conv"}, (0.1, 0, 0, 0)),
        ({"prune_layers": "fc"}, (0, 0, 0.2, 0.1)),
        ({"scope": "global"}, (0.2, 0, 0.2, 0.2)),
        ({"scope": "global", "prune_layers": "conv"}, (0.2, 0, 0, 0)),
        ({"scope": "global", "output_share": 0.0}, (0.2, 0, 0.2, 0)),
    ],
)
def test_who_is_pruned_with_whom(monkeypatch, changes, expected):
    found, together = rates(monkeypatch, preset(model="conv-2", **changes))
    assert found == pytest.approx(dict(zip(LAYERS, expected, strict=True)))
    competing = tuple(name for name in LAYERS if found[name])
    assert (competing in together) == ("scope" in changes or len(competing) == 1)


def test_nothing_to_prune(monkeypatch):
    linear = {"fc1.weight": torch.ones(5, 4), "fc2.weight": torch.ones(2, 5)}
    monkeypatch.setattr(experiment, "prunable", lambda _: linear)
    with pytest.raises(ValueError, match="prune_layers: lenet-300-100 has no conv layers"):
        experiment.pruning(preset(prune_layers="conv"), nn.Module())


def test_a_global_scope_lets_layers_compete(tmp_path):
    ticket, _ = run(replace(QUICK, scope="global"), tmp_path)
    kept = [mask.float().mean().item() for mask in ticket.masks.values()]
    assert ticket.density == pytest.approx(0.64, abs=1e-3)
    assert max(kept) - min(kept) > 0.02


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


def test_rewinds_to_a_later_step(tmp_path):
    ticket, records = run(replace(QUICK, rewind_step=10), tmp_path)
    assert records[0]["curves"]["iteration"] == [10, 20, 40]
    first = reinit(digits_net, QUICK.seed).state_dict()
    mask = ticket.masks["fc1.weight"]
    assert not torch.equal(ticket.weights["fc1.weight"], first["fc1.weight"] * mask)
    assert records[0]["curves"]["val_loss"][0] < 2.2  # ten steps in


@pytest.mark.parametrize("retrain", ["continue", "fine-tune"])
def test_survivors_keep_their_weights(tmp_path, retrain):
    ticket, records = run(replace(QUICK, retrain=retrain), tmp_path)
    assert records[1]["curves"]["val_loss"][0] < records[0]["curves"]["val_loss"][0] / 2
    before, after = (Ticket.load(tmp_path / f"round-0{number}.safetensors") for number in (0, 1))
    first = reinit(digits_net, QUICK.seed).state_dict()
    assert torch.equal(ticket.weights["fc1.weight"], first["fc1.weight"] * ticket.masks["fc1.weight"])
    moved = (after.weights["fc1.weight"] - before.weights["fc1.weight"])[after.masks["fc1.weight"]].abs().mean()
    assert 0 < moved < (after.weights["fc1.weight"] - first["fc1.weight"])[after.masks["fc1.weight"]].abs().mean()


@pytest.mark.parametrize(
    ("retrain", "expected"),
    [("rewind", (0.1, (0.5,), 4)), ("continue", (0.1, (0.5,), 4)), ("fine-tune", (pytest.approx(0.01), (), 0))],
)
def test_the_schedule_of_a_round(tmp_path, monkeypatch, retrain, expected):
    schedules, train = [], experiment.train

    def spy(model, data, **how):
        schedules.append((how["lr"], how["drops"], how["warmup"]))
        assert (how["start"], how["stop"]) == ((0, 6) if len(schedules) == 1 else (6, None))
        return train(model, data, **how)

    monkeypatch.setattr(experiment, "train", spy)
    settings = replace(QUICK, retrain=retrain, optimizer="sgd", lr=0.1, drops=(0.5,), warmup=4, rewind_step=6)
    run(settings, tmp_path)
    plain = (0.1, (0.5,), 4)
    assert schedules == [plain, plain, expected, expected]


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


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A ladder and its records."""
    folder = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "step_ms", lambda *_: {})
        _, records = run(replace(QUICK, rewind_step=10), folder)
    return folder, records


def compared(ladder, control, number=2, seed=1):
    return experiment.compare(replace(QUICK, rewind_step=10), load("digits"), ladder[0], control, number, seed)


def test_the_same_weights_and_masks_train_as_in_the_ladder(ladder):
    for number in (0, 2):
        record, trained = compared(ladder, "reset", number)
        assert record["curves"] == ladder[1][number]["curves"]
        kept = Ticket.load(ladder[0] / f"round-0{number}.safetensors")
        assert all(torch.equal(weight, kept.weights[name]) for name, weight in trained.weights.items())
    ladder_only = {"sparse_bytes", "dense_bytes"}
    assert record.keys() == ladder[1][2].keys() - ladder_only
    assert all(record[key] == ladder[1][2][key] for key in ("round", "density", "nnz", "total"))


@pytest.mark.parametrize("control", ["reinit", "order", "rearranged"])
def test_what_is_drawn_follows_from_the_seed(ladder, control):
    first, again, other = (compared(ladder, control, seed=seed)[0]["curves"] for seed in (1, 1, 2))
    assert first == again != other
    assert first != ladder[1][2]["curves"]
    assert first["iteration"] == [10, 20, 40]


def test_another_order_starts_from_the_same_weights(ladder):
    record, trained = compared(ladder, "order")
    assert record["curves"]["val_loss"][0] == ladder[1][2]["curves"]["val_loss"][0]
    assert trained.recipe["control"] == "order"
    assert all(torch.equal(mask, Ticket.load(ladder[0] / "ticket.safetensors").masks[name])
               for name, mask in trained.masks.items())  # fmt: skip


def test_what_is_not_trained_is_evaluated(ladder):
    record, trained = compared(ladder, "pruned")
    before = Ticket.load(ladder[0] / "round-01.safetensors").weights
    assert all(torch.equal(weight, before[name] * trained.masks[name] if name in trained.masks else before[name])
               for name, weight in trained.weights.items())  # fmt: skip
    assert record["curves"]["iteration"] == [0]
    assert record["early_stop_test_accuracy"] == record["final_test_accuracy"] == record["curves"]["test_accuracy"][0]
    assert abs(record["final_test_accuracy"] - ladder[1][1]["final_test_accuracy"]) < 0.2
    assert record.keys() == compared(ladder, "reset")[0].keys()


def test_a_control_of_a_round_that_is_not_there(ladder):
    with pytest.raises(FileNotFoundError, match="round-08"):
        compared(ladder, "reinit", 9)


@pytest.fixture
def images() -> Dataset:
    """Random numbers in the shape of CIFAR-10, but smaller."""
    parts = []
    for count in (16, 4, 4):
        parts += [torch.randn(count, 3, 8, 8), torch.randint(10, (count,))]
    return Dataset("cifar10", 10, *parts, note="random numbers")


@pytest.mark.parametrize("model", ["conv-2", "resnet-18"])
def test_nets_with_convolutions(tmp_path, images, model):
    settings = preset(model=model, rounds=1, iterations=2, eval_every=2, batch=4, rewind_step=1)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="device: expected cpu"):
        run(preset(device="cuda"), tmp_path)
    with pytest.raises(ValueError, match="device: expected cpu"):
        experiment.compare(preset(device="cuda"), load("digits"), tmp_path, "reinit", 1, seed=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_runs_on_a_gpu(tmp_path):
    settings = preset(device="cuda", rounds=1, iterations=20, eval_every=10)
    ticket, _ = run(settings, tmp_path)
    assert 0.7 < ticket.density < 0.9


def test_steps_are_timed_as_they_are_trained(monkeypatch):
    images, trained = load("digits"), []
    net = digits_net()
    model = convert(net, prune(net, 0.5))
    before = [parameter.clone() for parameter in model.parameters()]
    call = cpu_train.Trainer.__call__

    def spy(self, x, y, order, rates):
        trained.append(len(order))
        call(self, x, y, order, rates)

    monkeypatch.setattr(cpu_train.Trainer, "__call__", spy)
    ms = experiment.step_ms(model, images, preset("digits"), at_once=3)
    assert ms.keys() == {"sparse_ms", "dense_ms"}
    assert min(ms.values()) > 0
    if cpu_train.supports(torch.float32):
        assert trained
        assert set(trained) == {3}
    assert all(map(torch.equal, before, model.parameters()))
