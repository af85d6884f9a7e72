from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import pytest

from sparselottery.lab.models import MODELS
from sparselottery.lab.settings import PRESETS, Settings, preset, scaled

CIFAR_NETS = ("conv-2", "conv-4", "conv-6", "resnet-18", "vgg-19")


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


def test_a_net_takes_its_data_only():
    with pytest.raises(ValueError, match=r"'cifar'"):
        preset("cifar")
    with pytest.raises(ValueError, match=r"lenet-300-100: expected data among digits, .*, got 'cifar10'"):
        preset("cifar10")
    with pytest.raises(ValueError, match=r"conv-2: expected data among cifar10, got 'mnist'"):
        preset("mnist", "conv-2")
    with pytest.raises(ValueError, match=r"'lenet'.*lenet-300-100, conv-2"):
        preset(model="lenet")
    assert {settings.model for settings in PRESETS.values()} == set(MODELS) <= set(PRESETS)


def test_one_shot_prunes_to_where_all_rounds_lead():
    settings = preset("mnist", one_shot=True)
    assert settings.prunings == 1
    assert (1 - settings.rate(1), 1 - settings.rate(0.5)) == pytest.approx((0.8**16, 0.9**16))


def test_names_tell_settings_apart_and_leave_defaults_out():
    assert preset("digits", seed=0).name == preset("digits").name
    assert preset("digits").name == "digits-lenet-300-100-b23c8c75"
    assert preset(model="resnet-18").name.startswith("cifar10-resnet-18-")
    changes = {"rounds": 3, "iterations": 9, "eval_every": 5, "fraction": 0.5, "seed": 1, "one_shot": True, "lr": 0.1}
    changes |= {"granularity": (16, 16), "retrain": "continue", "optimizer": "sgd", "momentum": 0.0, "dropout": 0.5}
    changes |= {"batch": 6, "rewind_step": 1, "weight_decay": 1e-4, "drops": (0.5,), "warmup": 1, "augment": True}
    changes |= {"scope": "global", "prune_layers": "fc", "conv_share": 0.5, "fc_share": 0.5, "output_share": 1.0}
    changes |= {"device": "cuda", "execution": "measured", "method": "gmp"}
    assert changes.keys() | {"data", "model", "permute"} == {field.name for field in fields(Settings)}
    names = {preset("digits", **{key: value}).name for key, value in changes.items()}
    names |= {preset("digits", granularity=(16, 16), permute=True).name}
    assert len(names | {preset("digits").name, preset("mnist").name}) == len(changes) + 3


def test_single_weights_are_not_permuted():
    with pytest.raises(ValueError, match="permute: expected a granularity with blocks, got 1x1"):
        preset("digits", permute=True)


def test_the_device_names_a_run_only_if_it_is_not_the_cpu():
    assert preset(device="cpu").name == preset().name != preset(device="cuda").name


def test_a_name_holds_what_else_decides():
    assert preset().named({}) == preset().name != preset().named({"threads": 1}) != preset().named({"threads": 2})


def test_the_papers_warm_ups():
    resnet, vgg = preset(model="resnet-18-warmup"), preset(model="vgg-19-warmup")
    assert resnet == replace(preset(model="resnet-18"), lr=0.03, warmup=20_000)
    assert vgg == replace(preset(model="vgg-19"), warmup=10_000)


@pytest.mark.parametrize("changes", [{"retrain": "reset"}, {"prune_layers": "linear"}, {"device": "nowhere"}])
def test_values_that_are_not_allowed(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}: expected one of .*, got '{changes[name]}'"):
        preset(**changes)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("rounds", 0, "at least 1"),
        ("fraction", -0.1, "at least 0"),
        ("fraction", 1.0, "less than 1"),
        ("dropout", 1.0, "less than 1"),
        ("lr", float("inf"), "less than inf"),
        ("lr", float("nan"), "at least 0"),
        ("momentum", -1.0, "at least 0"),
        ("warmup", -1, "at least 0"),
        ("rewind_step", -1, "at least 0"),
        ("rewind_step", 3000, "less than the 3000 iterations"),
    ],
)
def test_numbers_that_make_no_sense(name, value, expected):
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}, got {value}$"):
        preset(**{name: value})


def test_every_setting_is_explained():
    assert all(field.metadata["text"] for field in fields(Settings))


def test_a_scale_shortens_all_that_is_counted_in_iterations_and_says_so():
    full = preset(model="vgg-19-warmup", rewind_step=1000)
    short = scaled(full, 0.1)
    assert (short.iterations, short.warmup, short.rewind_step) == (11_248, 1000, 100)
    assert replace(short, iterations=112_480, warmup=10_000, rewind_step=1000) == full
    assert (short.scale, full.scale) == ("scale 0.1: 11,248 of the paper's 112,480 iterations", "")
    assert scaled(preset("mnist"), 0.1).scale == "scale 0.1: 5,000 of the paper's 50,000 iterations"
    assert preset("digits", iterations=300).scale == "scale 0.1: 300 of the preset's 3,000 iterations"
    assert scaled(full, 1) == full


@pytest.mark.parametrize("scale", [0, -1, float("nan")])
def test_a_scale_that_makes_no_sense(scale):
    with pytest.raises(ValueError, match="scale: expected a positive number"):
        scaled(preset(), scale)
