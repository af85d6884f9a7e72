"""The bench-model table: who is in it, what it says of who is not, and that wrong results stop it."""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from torch import nn

from sparselottery import Ticket, bench_model, convert, prune
from sparselottery.cli import main


@pytest.fixture
def ways(monkeypatch):
    """Dense torch, and somebody who is not installed: compilers and exporters take too long here."""
    monkeypatch.setattr(bench_model, "MAKERS", {"torch": bench_model.torch_dense, "other": lambda model, x: None})
    monkeypatch.setattr(bench_model, "NEEDS", {"other": ("a_package_that_nobody_has",)})


@pytest.fixture
def ticket(tmp_path):
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    path = tmp_path / "net.safetensors"
    Ticket.from_model(convert(model, prune(model, 0.8, method="random"))).save(path)
    return path


def test_rows(ways, ticket):
    rows = bench_model.bench_model(ticket, [1, 3], seconds=0.01)
    assert [(row["batch"], row["impl"]) for row in rows] == [
        (batch, impl) for batch in (1, 3) for impl in ("sparselottery", "torch", "other")
    ]
    for row in rows:
        if row["impl"] == "other":
            assert row["median_ms"] is None
            assert row["note"] == "not installed: a_package_that_nobody_has"
        else:
            assert 0 < row["median_ms"] <= row["p99_ms"]
            assert row["items_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
    assert rows[0]["speedup"] == 1


def test_nobody_is_timed_beside_threads_of_the_last_one(monkeypatch):
    monkeypatch.setattr(bench_model, "LINGER", 0.01)
    monkeypatch.setattr(bench_model, "TURN", 0.0)
    log: list[float] = []
    timed = bench_model.latencies({"a": lambda: log.append(perf_counter())}, seconds=0.0)["a"]
    assert len(timed) == bench_model.LEAST  # one a turn
    assert log[-1] - log[0] > 0.9 * bench_model.LEAST * bench_model.LINGER


def test_wrong_results_are_not_timed(ways, ticket, monkeypatch):
    wrong = {"torch": bench_model.torch_dense, "wrong": lambda model, given: lambda: given(model) + 0.1}
    monkeypatch.setattr(bench_model, "MAKERS", wrong)
    with pytest.raises(RuntimeError, match="wrong: expected the result of torch"):
        bench_model.bench_model(ticket, [2], seconds=0.01)


def test_nan_is_wrong():
    nan = torch.tensor([float("nan")])
    with pytest.raises(RuntimeError):
        bench_model.check({"torch": lambda: torch.ones(1), "nan": lambda: nan})


def test_onnxruntime_and_openvino_agree(ticket):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    dense = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)).eval().requires_grad_(False)
    x = torch.randn(2, 20)
    assert np.allclose(bench_model.onnxruntime_dense(dense, x)()[0], dense(x), atol=1e-5)


def test_the_shape_of_images_must_be_said(ways, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    path = tmp_path / "net.safetensors"
    Ticket.from_model(convert(model, prune(model, 0.8, method="random"))).save(path)
    with pytest.raises(ValueError, match="shape: expected that of one input, as --shape C,H,W gives it, got none: the"):
        bench_model.bench_model(path, [1])
    for wrong in ((4, 8, 8), (3, 8)):
        with pytest.raises(ValueError, match="shape, example_input: expected an input that the net takes; it says: "):
            bench_model.bench_model(path, [1], wrong)
    assert bench_model.bench_model(path, [1], (3, 8, 8), seconds=0.01)[0]["median_ms"] > 0


def test_command(ways, ticket, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench-model", str(ticket), "--batch", "1,2", "--seconds", "0.01", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "sparselottery" in printed
    assert "a_package_that_nobody_has" in printed
    with (out / "table.csv").open() as file:
        assert [row["impl"] for row in csv.DictReader(file)] == ["sparselottery", "torch", "other"] * 2
    assert (out / "plot.svg").stat().st_size > 1000
    assert main(["bench-model", str(tmp_path / "missing.safetensors")]) == 2


def test_the_command_alone_is_without_the_chatter_of_torch(ticket, monkeypatch, capsys, caplog):
    def chatters(model, example):
        sys.stderr.write("AUTOTUNE addmm\n")
        exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
        exporter.warning("torchvision is not installed")
        warnings.warn("of the model", UserWarning, stacklevel=1)
        return bench_model.torch_dense(model, example)

    monkeypatch.setattr(bench_model, "MAKERS", {"torch": bench_model.torch_dense, "other": chatters})
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
    with pytest.warns(UserWarning, match="of the model"):
        assert main(["bench-model", str(ticket), "--batch", "1", "--seconds", "0.01"]) == 0
    assert not capsys.readouterr().err
    assert not caplog.messages
    with pytest.warns(UserWarning, match="of the model"):
        bench_model.bench_model(ticket, [1], seconds=0.01)
    assert "AUTOTUNE" in capsys.readouterr().err
    assert caplog.messages == ["torchvision is not installed"]


def test_a_plot_that_cannot_be_written_leaves_the_one_before(ways, ticket, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    rows, out = bench_model.bench_model(ticket, [1], seconds=0.01), tmp_path / "out"
    bench_model.write_bench(rows, out)
    before = (out / "plot.svg").read_bytes()

    def half(self, file, **_):
        Path(file).write_text("<svg")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match=r"plot\.svg"):
        bench_model.write_bench(rows, out)
    assert (out / "plot.svg").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["plot.svg", "table.csv"]


class TwoInputs(nn.Module):
    """Two outputs of two inputs: of a batch, and of a vector that has none."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(20, 30)

    def forward(self, x, *, scale):
        y = self.fc(x) * scale
        return {"y": y, "sum": y.sum(1)}


@pytest.fixture
def two_inputs(tmp_path):
    model = TwoInputs()
    path = tmp_path / "net.safetensors"
    Ticket.from_model(convert(model, prune(model, 0.8, method="random"))).save(path)
    return model, path


def test_a_net_of_several_inputs_and_outputs(ways, two_inputs):
    model, path = two_inputs
    example = {"x": torch.randn(2, 20), "scale": torch.randn(30)}
    rows = bench_model.bench_model(path, [1, 3], seconds=0.01, model=model, example_input=example)
    assert [row["batch"] for row in rows if row["median_ms"]] == [1, 1, 3, 3]
    with pytest.raises(ValueError, match="shape: expected none beside an example_input"):
        bench_model.bench_model(path, [1], (20,), model=model, example_input=example)


def test_every_output_is_compared(ways, two_inputs, monkeypatch):
    def wrong(model, example):
        call = bench_model.torch_dense(model, example)
        return lambda: call() | {"sum": torch.ones(1)}

    monkeypatch.setattr(bench_model, "MAKERS", {"torch": bench_model.torch_dense, "wrong": wrong})
    model, path = two_inputs
    example = {"x": torch.randn(1, 20), "scale": torch.randn(30)}
    with pytest.raises(RuntimeError, match="wrong: expected the result of torch"):
        bench_model.bench_model(path, [1], seconds=0.01, model=model, example_input=example)
    with pytest.raises(RuntimeError, match="expected 2 outputs"):
        bench_model.check({"torch": lambda: (torch.ones(1), torch.ones(1)), "one": lambda: torch.ones(1)})


def test_onnxruntime_of_several_inputs_and_outputs(two_inputs):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = two_inputs[0].eval().requires_grad_(False)
    example = {"x": torch.randn(2, 20), "scale": torch.randn(30)}
    y, total = bench_model.onnxruntime_dense(model, example)()
    assert np.allclose(y, model(**example)["y"], atol=1e-5)
    assert np.allclose(total, model(**example)["sum"], atol=1e-5)
