"""The commands that write rows of methods and of the weight-sparse GPT, on small runs."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from benchmarks import methods, results, sparse_gpt
from benchmarks.masked_rigl import MaskedRigl
from sparselottery import convert, dynamic
from sparselottery.convert import dense_state, masked_layers, masks_of
from sparselottery.lab import experiment
from sparselottery.lab.masked_dense import masked_dense
from sparselottery.lab.models import lenet_300_100

SMALL = methods.Case(
    (0.7,), ("imp", "one-shot", "rigl"), 2, 1, {"data": "digits", "rounds": 2, "iterations": 20, "eval_every": 10}
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(methods.CASES, "lenet-300-100", SMALL)
    monkeypatch.setattr(experiment, "step_ms", lambda *_: {})


def never(*_):
    raise AssertionError("expected what is there to stay")


def in_this_process(job_of, take, place):
    while (job := take()) is not None:
        reports = []
        job_of(job, reports.append)
        yield from (methods.grid.Event(job, "progress", report) for report in reports)
        yield methods.grid.Event(job, "done")


def test_methods_have_a_row_each_and_go_on(small, monkeypatch, tmp_path):
    monkeypatch.setitem(methods.grid.EXECUTORS, "processes", in_this_process)
    net = "lenet-300-100"
    methods.train_all(net, tmp_path, time.time() - 1)
    assert methods.rows(net, tmp_path)[0] == []
    methods.train_all(net, tmp_path, time.time() + 60)
    rows, told = methods.rows(net, tmp_path)
    assert [(row["method"], row["trainings"], row["seeds"], row["seconds"]) for row in rows] == [
        ("imp", 3, 2, ""),
        ("one-shot", 2, 2, ""),
        ("rigl", 1, 2, ""),
    ]
    assert len({row["density"] for row in rows}) == 1
    assert 0.3 <= float(rows[0]["density"]) < 0.32  # the output layer keeps more
    assert "20 of" in told["length"]
    monkeypatch.setattr(experiment, "train", None)  # nothing is trained twice
    methods.train_all(net, tmp_path, time.time() + 60)
    assert methods.rows(net, tmp_path)[0] == rows
    monkeypatch.undo()


def test_seconds_are_kept_and_rigl_is_timed_on_dense_weights_too(small, monkeypatch, tmp_path):
    monkeypatch.setitem(methods.CASES, "lenet-300-100", SMALL._replace(methods=("rigl",)))
    methods.time_all("lenet-300-100", tmp_path)
    rows, _ = methods.rows("lenet-300-100", tmp_path)
    assert [row["impl"] for row in rows] == list(methods.MASKED)  # ours has no accuracy yet
    assert all(float(row["seconds"]) > 0 for row in rows)
    monkeypatch.setattr(methods, "timed", never)
    monkeypatch.setattr(methods, "timed_masked", never)
    methods.time_all("lenet-300-100", tmp_path)
    kept = methods.read_json(tmp_path / "seconds-lenet-300-100.json")
    assert kept.keys() == {"0.7 rigl", "0.7 rigl w-times-mask", "0.7 rigl masked-after-steps"}


@pytest.mark.parametrize("products", [True, False])
def test_rigl_on_dense_weights_is_ours(products):
    def net():
        torch.manual_seed(0)
        return lenet_300_100(12, 4, hidden=(16, 8)).double()

    whole = {f"fc{i}.weight": torch.ones_like(net().get_parameter(f"fc{i}.weight")).bool() for i in (1, 2, 3)}
    model = convert(net(), whole)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    ours = dynamic.rigl(model, optimizer, 0.3, end=14, every=4)
    other = masked_dense(net(), masks_of(model))
    their_optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    theirs = MaskedRigl(other, their_optimizer, ours.drop_fraction, 4, 14, products)
    moved = set()
    for step in range(1, 18):
        x = torch.randn(20, 12, dtype=torch.float64)
        for each, chosen, updater in ((model, optimizer, ours), (other, their_optimizer, theirs)):
            chosen.zero_grad()
            torch.nn.functional.cross_entropy(each(x), torch.arange(20) % 4).backward()
            chosen.step()
            if updater.step():
                moved.add((updater is ours, step))
        for name, mask in masks_of(model).items():
            assert torch.equal(mask, other.get_submodule(name.removesuffix(".weight")).mask.bool())
    assert {step for is_ours, step in moved if is_ours} == {4, 8, 12}  # at 14 nothing is exchanged
    for name, weight in dense_state(model).items():
        mask = masks_of(model).get(name, torch.ones(()).bool())
        torch.testing.assert_close(weight, other.state_dict()[name] * mask, msg=name)


def test_a_sparse_gpt_learns_as_a_masked_one():
    make = partial(sparse_gpt.Gpt, 1, 32, 4, 16)
    rows = sparse_gpt.rows(make, 0.2, 60, 3, 0.01)
    assert [row["impl"] for row in rows] == [results.OURS, "dense"]
    assert float(rows[0]["loss_difference"]) < 1e-4
    assert float(rows[0]["last_loss"]) < float(rows[0]["first_loss"])
    assert float(rows[1]["of_dense"]) == 1.0
    assert rows[0].keys() == rows[1].keys()
    ours = sparse_gpt.Sparse(make(), 0.1, end=4)
    for text in sparse_gpt.islice(sparse_gpt.batches(3, 16), 5):
        ours.step(text)
    assert {round(layer.density, 2) for layer in masked_layers(ours.model).values()} == {0.1}


def test_sums_are_right():
    (text,) = sparse_gpt.islice(sparse_gpt.batches(2, 40), 1)
    assert text.shape == (2, 41)
    lines = "".join(sparse_gpt.CHARACTERS[each] for each in text.flatten().tolist()).split("\n")[:-1]
    assert len(lines) > 3
    for line in lines:
        left, _, total = line.partition("=")
        assert sum(map(int, left.split("+"))) == int(total)


def test_trainings_with_all_threads_are_timed_as_they_are_trained(small, monkeypatch, tmp_path):
    monkeypatch.setitem(methods.grid.EXECUTORS, "processes", in_this_process)
    case = SMALL._replace(methods=("imp",), seeds=1, threads=results.THREADS)
    monkeypatch.setitem(methods.CASES, "lenet-300-100", case)
    methods.train_all("lenet-300-100", tmp_path, time.time() + 60)
    ((row,), _) = methods.rows("lenet-300-100", tmp_path)
    ((_, _, wanted),) = methods.cases("lenet-300-100")
    (records,) = methods.trained(wanted, tmp_path)
    assert len(records) == 3
    assert float(row["train_seconds"]) == pytest.approx(sum(each["train_seconds"] for each in records), rel=0.01)
    assert float(row["seconds"]) > float(row["train_seconds"]) > records[-1]["train_seconds"]
