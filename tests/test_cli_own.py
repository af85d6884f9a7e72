"""`find` for a net of one's own: what comes of it, how it goes on, and what is said of each way to misuse it."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from sparselottery import Ticket, cli

NET = """
import os
import torch
from torch import nn

class Net(nn.Module):  # no tree that a ticket knows by itself
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 30), nn.Linear(30, 5)

    def forward(self, x, scale=1.0):
        return {"y": self.second(torch.relu(self.first(x))) * scale}

def make():
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))

def train(model, start=0, stop=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(start, 5 if stop is None else stop):
        x = torch.randn(16, 20)
        y = model(x)
        loss = (y if torch.is_tensor(y) else y["y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if os.environ.get("FAIL_AT") == str(train.calls):
        raise RuntimeError("out of batches")
    train.calls += 1
    return {"test loss": loss.item(), "note": "a text", "iterations": 5}

train.calls = 0
x = torch.randn(4, 20)

def keywords():
    return {"x": x, "scale": 2.0}

def alone(model): pass
def two(a, b): pass
def text(): return "text"
def bad(): raise KeyError("no data here")
def plain(model): return 3
def same(model): return model
def tensors(model): return {"loss": torch.ones(2)}
def wrong(): return {"images": x}
def long(): return torch.randn(4, 30)
def whole(): return Whole()

class Whole(Net):
    def forward(self, x):
        return {"y": self.second(torch.relu(self.first(x))), "labels": 3, "loss": None}
"""


@pytest.fixture
def mynet(tmp_path, monkeypatch):
    """The name of a module in the current folder, another one for each test, as Python keeps those it knows."""
    name = f"mynet_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield name
    sys.modules.pop(name, None)


def find(mynet, *options, net="make", train="train", rounds=2):
    argv = ["find", "--model", f"{mynet}:{net}", "--rounds", str(rounds), *map(str, options)]
    return cli.main([*argv, *(["--train", f"{mynet}:{train}"] if train else [])])


def folder_of(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_find(mynet, tmp_path, capsys):
    before = torch.random.get_rng_state()
    assert find(mynet) == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    folder = folder_of(tmp_path)
    assert folder.name.startswith(f"{mynet}-make-")
    head, columns, *rounds, _, ticket, report, explain, export = capsys.readouterr().out.splitlines()
    assert head == f"{mynet}:make: 3 trainings by {mynet}:train, into runs/{folder.name}"
    assert columns.split("  ")[:2] == ["round", "weights %"]
    assert columns.endswith("   test loss  iterations")
    assert [row.split()[:2] for row in rounds] == [["0", "100.0"], ["1", "80.0"], ["2", "64.0"]]
    assert all(len(row) == len(columns) for row in rounds)
    assert f"runs/{folder.name}/ticket.safetensors (64.0% of the weights" in ticket
    assert report == f"next:   sparselottery report runs/{folder.name}"
    assert explain.strip() == f"sparselottery explain runs/{folder.name} --example MODULE:NAME"
    assert cli.main(export.split()[1:]) == 0
    assert Ticket.load("trained.safetensors").density == pytest.approx(0.64, abs=1e-3)
    record = json.loads((folder / "round-02.json").read_text())
    assert record["note"] == "a text"
    assert float(rounds[2].split()[3]) == pytest.approx(record["test loss"], rel=1e-5)


def test_every_command_takes_a_net_that_is_no_tree(mynet, tmp_path, capsys):
    names = ["--model", f"{mynet}:Net", "--example", f"{mynet}:keywords"]
    assert find(mynet, "--example", f"{mynet}:keywords", "--granularity", "2x1", net="Net") == 0
    folder = folder_of(tmp_path)
    explain, export = capsys.readouterr().out.splitlines()[-2:]
    assert len(list((folder / "executions").iterdir())) == 3
    assert cli.main(explain.split()[1:]) == 0
    assert "measured: sparse" in capsys.readouterr().out
    assert cli.main(export.split()[1:]) == 0
    assert cli.main(["export", str(folder), *names, "--format", "pt2", "--out", "net.pt2"]) == 0
    assert torch.export.load("net.pt2").module()(x=torch.ones(3, 20), scale=2.0)["y"].shape == (3, 5)
    capsys.readouterr()
    assert cli.main(["explain", str(folder), "--example", f"{mynet}:keywords"]) == 2
    assert f"--model: expected what makes the net, got none; the run was of {mynet}:Net" in capsys.readouterr().err
    assert cli.main(["explain", str(folder), "--model", f"{mynet}:Net"]) == 2
    assert "--example: expected an input of the net" in capsys.readouterr().err


def test_blocks_in_any_order_and_rows(mynet, tmp_path, capsys):
    assert find(mynet, "--granularity", "2x5") == 0
    names = {each.name for each in (tmp_path / "runs").iterdir()}
    assert find(mynet, "--granularity", "2x5", "--no-permute") == 0
    assert {each.name for each in (tmp_path / "runs").iterdir()} == names
    assert find(mynet, "--granularity", "2x5", "--permute") == 0
    assert find(mynet, "--granularity", "rows") == 0
    recipes = [Ticket.load(each / "ticket.safetensors").recipe for each in (tmp_path / "runs").iterdir()]
    blocks = sorted(str(recipe["granularity"]["0.weight"]) for recipe in recipes)
    assert blocks == ["2x5 permuted", "[2, 5]", "rows"]
    assert find(mynet, "--permute") == 2
    assert "permute: expected a granularity with blocks" in capsys.readouterr().err


def test_bench_model(mynet, tmp_path, monkeypatch, capsys):
    from sparselottery import bench_model

    monkeypatch.setattr(bench_model, "MAKERS", {"torch": bench_model.torch_dense})
    assert find(mynet, net="Net", rounds=1) == 0
    ticket = folder_of(tmp_path) / "ticket.safetensors"
    names = ["--model", f"{mynet}:Net", "--example", f"{mynet}:keywords"]
    assert cli.main(["bench-model", str(ticket), *names, "--batch", "1,3", "--seconds", "0.01"]) == 0
    assert capsys.readouterr().out.count("sparselottery  ") == 2


@pytest.mark.parametrize("command", ["explain", "export", "bench-model"])
def test_an_example_that_the_net_does_not_take(mynet, tmp_path, capsys, command):
    assert find(mynet, net="Net", rounds=1) == 0
    capsys.readouterr()
    folder = folder_of(tmp_path)
    what = {
        "explain": [folder],
        "export": [folder, "--format", "pt2", "--out", tmp_path / "net.pt2"],
        "bench-model": [folder / "ticket.safetensors"],
    }[command]
    assert cli.main([command, *map(str, what), "--model", f"{mynet}:Net", "--example", f"{mynet}:wrong"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"sparselottery: --example: expected {mynet}:wrong to be what Net takes: ")
    assert "'images'" in said or "'x'" in said


def test_a_net_that_onnx_cannot_hold(mynet, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxscript")
    from sparselottery import bench_model

    monkeypatch.setattr(bench_model, "MAKERS", {each: bench_model.MAKERS[each] for each in ("torch", "ONNX Runtime")})
    assert find(mynet, net="whole", rounds=1) == 0
    folder, names = folder_of(tmp_path), ["--model", f"{mynet}:whole", "--example", f"{mynet}:x"]
    capsys.readouterr()
    assert cli.main(["export", str(folder), *names, "--format", "onnx", "--out", str(tmp_path / "net.onnx")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("expected one that returns tensors alone, as ONNX has no others, got int too")
    argv = ["bench-model", str(folder / "ticket.safetensors"), *names, "--batch", "1", "--seconds", "0.01"]
    assert cli.main(argv) == 0
    assert "cannot run it: ONNX has tensors alone, the model returns int too" in capsys.readouterr().out


def test_report_shows_what_the_training_returned(mynet, tmp_path):
    pytest.importorskip("matplotlib")
    assert find(mynet) == 0
    folder = folder_of(tmp_path)
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report" / "report.html").read_text()
    assert f"{mynet}:make, trained by {mynet}:train" in page
    assert "<th>test loss</th>" in page
    assert "<th>w * mask</th>" not in page  # nobody measured it
    assert (folder / "report" / "figures" / "own-test-loss.svg").exists()
    assert "test loss" in (folder / "report" / "csv" / "rounds.csv").read_text().splitlines()[0]


def test_it_goes_on_where_it_stopped(mynet, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAIL_AT", "1")
    assert find(mynet) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert 'raise RuntimeError("out of batches")' in said
    assert said.endswith(f"sparselottery: {mynet}:train raised RuntimeError: out of batches\n")
    folder = folder_of(tmp_path)
    assert sorted(path.name for path in folder.glob("round-*.safetensors")) == ["round-00.safetensors"]
    monkeypatch.delenv("FAIL_AT")
    assert find(mynet) == 0
    assert sys.modules[mynet].train.calls == 3
    assert find(mynet) == 0
    assert "nothing was trained: the run was finished before" in capsys.readouterr().out
    assert find(mynet, rounds=3) == 0
    assert sys.modules[mynet].train.calls == 4
    assert folder_of(tmp_path) == folder
    straight = tmp_path / "straight"
    assert find(mynet, "--out", straight, rounds=3) == 0
    (other,) = straight.iterdir()
    assert Ticket.load(other / "ticket.safetensors").same(Ticket.load(folder / "ticket.safetensors"))


def test_other_options_are_another_run(mynet, tmp_path):
    for options in ([], ["--seed", 1], ["--rewind-step", 2], ["--retrain", "continue"], ["--scope", "global"]):
        assert find(mynet, *options, rounds=1) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 5


def test_one_shot(mynet, tmp_path):
    assert find(mynet, "--one-shot", rounds=3) == 0
    assert Ticket.load(folder_of(tmp_path) / "ticket.safetensors").density == pytest.approx(0.8**3, abs=1e-2)
    assert not (folder_of(tmp_path) / "round-02.json").exists()


LATE = ("plain", "same", "tensors")  # found out by a training
MISUSES = [
    ({"train": None}, "--train: expected the function that trains NET:make"),
    ({"net": "missing"}, "--model: expected one of .*make, .* in NET, got 'missing'"),
    ({"net": "x"}, "--model: expected a function that returns a new net, got Tensor NET:x"),
    ({"net": "text"}, "--model: expected NET:text to return an nn.Module, got str"),
    ({"net": "two"}, "--model: expected NET:two to take no arguments: missing a required argument: 'a'"),
    ({"net": "bad"}, "NET:bad raised KeyError: 'no data here'"),
    ({"net": "nn.ReLU"}, "expected at least one layer that can be masked"),
    ({"train": "two"}, "--train: expected NET:two to take the model alone: missing a required argument: 'b'"),
    ({"train": "x"}, "--train: expected a function that trains a model, got Tensor NET:x"),
    ({"train": "plain"}, "train: expected None or a mapping .*got 3"),
    ({"train": "same"}, "train: expected None or a mapping .*got MaskedSequential$"),
    ({"train": "tensors"}, "NET:tensors returned what cannot be kept: train: expected JSON-able contents"),
    ({"train": "alone", "options": ["--rewind-step", 2]}, "NET:alone to take start and stop, for --rewind-step"),
    (
        {"options": ["--batch", 3]},
        "--batch: expected with .* paper's nets only; of NET:make it is up to --train",
    ),
    ({"options": ["--weight-decay", 0.1]}, "--weight-decay: expected with one of the paper's nets only"),
    ({"options": ["--scale", 0.5]}, "--scale: expected with one of the paper's nets only"),
    ({"options": ["--retrain", "fine-tune"]}, "--retrain: expected one of rewind, continue"),
    ({"options": ["--fraction", 2]}, "fraction: expected"),
    ({"options": ["--fraction", 2, "--one-shot"]}, "fraction: expected"),
    ({"options": ["--rewind-step", -1]}, "rewind_step: expected at least 0, got -1"),
    ({"options": ["--granularity", "99x99"]}, "granularity: expected blocks smaller than '0.weight'"),
    ({"rounds": -1}, "rounds: expected at least 0, got -1"),
    ({"options": ["--example", "NET:text"]}, "--example: NET:text: example_input: expected a tensor, .*got str"),
    ({"options": ["--example", "NET:bad"]}, "NET:bad raised KeyError"),
    ({"options": ["--example", "NET:long"]}, "Sequential on NET:long raised RuntimeError"),
    ({"options": ["--example", "NET:keywords"]}, "--example: expected NET:keywords to be what Sequential takes: "),
]


@pytest.mark.parametrize(("use", "message"), MISUSES)
def test_misuse(mynet, tmp_path, capsys, use, message):
    use = {**use, "options": [str(each).replace("NET", mynet) for each in use.get("options", [])]}
    assert find(mynet, *use.pop("options"), **use) == 2
    said, error = capsys.readouterr()
    last = error.splitlines()[-1]
    assert re.search(f"^sparselottery: .*{message.replace('NET', mynet)}", last), last
    assert not said or use.get("train") in LATE
    assert not (tmp_path / "runs").exists() or use.get("train") in LATE


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:make", "--model: found no module 'no_such_module', neither in /"),
        ("torch.no_such:make", "--model: found no module 'torch.no_such'"),
        ("mynet.py:make", "--model: expected MODULE:NAME, as in mynet:make for make of mynet.py, got 'mynet.py:make'"),
        (":make", "--model: expected MODULE:NAME"),
        ("net:", "--model: expected MODULE:NAME"),
        ("wants:make", "--model: wants imports 'no_such_package', which is not installed"),
        ("broken:make", "--model: importing broken raised ZeroDivisionError"),
    ],
)
def test_modules_that_cannot_be_imported(mynet, tmp_path, capsys, model, message):
    (tmp_path / "wants.py").write_text("import no_such_package")
    (tmp_path / "broken.py").write_text("1 / 0")
    assert cli.main(["find", "--model", model, "--train", f"{mynet}:train"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--train", "--example"])
def test_functions_of_ones_own_beside_a_net_of_the_papers(mynet, capsys, option):
    assert cli.main(["find", option, f"{mynet}:train"]) == 2
    assert f"{option}: expected with --model MODULE:FUNCTION only" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["find", "--help"])
    shown = capsys.readouterr().out
    assert "sparselottery find --model mynet:make --train mynet:train" in shown
    with pytest.raises(SystemExit):
        cli.main(["find", "--model", "lenet"])
    assert "or MODULE:FUNCTION, as in mynet:make for make of mynet.py, got 'lenet'" in capsys.readouterr().err
