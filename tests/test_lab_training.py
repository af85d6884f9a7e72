from __future__ import annotations

from functools import partial
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparselottery.convert import convert, dense_state, masks_of
from sparselottery.lab import graph, training
from sparselottery.lab.augment import MOVES, flip_and_crop
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset
from sparselottery.lab.models import lenet_300_100

factory = partial(lenet_300_100, 6, 3, hidden=(16, 8))


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Three Gaussian clouds."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(90, 6, generator=generator) + 6 * F.one_hot(y, 6)
    return Dataset("clouds", 3, x[:60], y[:60], x[60:75], y[60:75], x[75:], y[75:])


@given(count=st.integers(1, 40), batch=st.integers(1, 40), start=st.integers(0, 60), seed=st.integers(0, 3))
def test_batches(count, batch, start, seed):
    x = torch.arange(count)
    if batch > count:
        with pytest.raises(ValueError, match=f"the {count} training images, got {batch}"):
            next(training.batches(x, x, batch, seed))
        return
    all_of = list(islice(training.batches(x, x * 2, batch, seed), start + 5))
    assert all(torch.equal(y, 2 * x) and len(x) == batch for x, y in all_of)
    per_epoch = count // batch
    for epoch in range(0, len(all_of), per_epoch):
        seen = torch.cat([x for x, _ in all_of[epoch : epoch + per_epoch]]).tolist()
        assert len(seen) == len(set(seen))
    later = list(islice(training.batches(x, x * 2, batch, seed, start), 5))
    assert all(torch.equal(a, b) for a, b in zip((x for x, _ in later), (x for x, _ in all_of[start:]), strict=True))


def test_epochs_and_seeds_differ():
    x = torch.arange(50)
    epochs = [batch.tolist() for batch, _ in islice(training.batches(x, x, 50, seed=0), 2)]
    other = next(training.batches(x, x, 50, seed=1))[0].tolist()
    assert epochs[0] != epochs[1] != other != epochs[0]


def test_a_step_is_one_of_adam_on_the_cross_entropy(data):
    ours, plain = reinit(factory, 0), reinit(factory, 0)
    step, optimizer = training.stepper(ours, 1e-2), torch.optim.Adam(plain.parameters(), lr=1e-2)
    for x, y in islice(training.batches(data.train_x, data.train_y, 10, seed=0), 5):
        step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_step_of_sgd_has_momentum_and_weight_decay(data, momentum):
    ours, plain = reinit(factory, 0), reinit(factory, 0)
    step = training.stepper(ours, 1e-2, "sgd", weight_decay=0.1, momentum=momentum)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=momentum, weight_decay=0.1)
    for x, y in islice(training.batches(data.train_x, data.train_y, 10, seed=0), 5):
        step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_at_another_rate(data):
    ours, plain = reinit(factory, 0), reinit(factory, 0)
    step = training.stepper(ours, 1.0, "sgd")
    step(data.train_x, data.train_y, 0.25)
    F.cross_entropy(plain(data.train_x), data.train_y).backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.25 * b.grad)


def test_learning_rates():
    drops = (2 / 3, 5 / 6)  # the paper's Resnet-18: after 20K and 25K of 30K
    at = partial(training.learning_rate, iterations=30_000, lr=0.1, drops=drops)
    assert [at(i) for i in (0, 19_999, 20_000, 24_999)] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert [at(i) for i in (25_000, 29_999)] == pytest.approx([0.001, 0.001])
    assert [at(i, warmup=10) for i in (0, 4, 9, 10)] == pytest.approx([0.01, 0.05, 0.1, 0.1])
    assert training.learning_rate(7, 10, 0.5) == 0.5


def test_every_step_has_its_rate(data, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "stepper", lambda *how: seen.append(how) or (lambda x, y, lr: seen.append(lr)))
    how = {"iterations": 12, "batch": 20, "lr": 0.6, "optimizer": "sgd", "weight_decay": 0.1, "eval_every": 5}
    how |= {"momentum": 0.5, "drops": (0.5,), "warmup": 3}
    model = reinit(factory, 0)
    training.train(model, data, **how)
    assert seen[0] == (model, 0.6, "sgd", 0.1, 0.5, None)
    assert seen[1:] == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6, 0.6] + [0.06] * 6)
    seen.clear()
    training.train(model, data, **how, stop=7)
    training.train(model, data, **how, start=7)
    assert [lr for lr in seen if isinstance(lr, float)] == pytest.approx([0.2, 0.4, 0.6, 0.6, 0.6, 0.6] + [0.06] * 6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_on_a_gpu_steps_are_graphed(data, optimizer, monkeypatch):
    """With a captured step that is one in eager mode, on whatever the buffers then hold."""
    monkeypatch.setattr(graph, "on_another_stream", lambda work, device: work())
    monkeypatch.setattr(graph, "captured", lambda work, device: work)
    how = {"iterations": 12, "batch": 20, "lr": 0.1, "optimizer": optimizer, "weight_decay": 0.1, "eval_every": 5}
    how |= {"drops": (0.5,), "warmup": 3}
    ours, plain = reinit(factory, 0), reinit(factory, 0)
    training.train(plain, data, **how)
    monkeypatch.setattr(training, "_on_gpu", lambda parameters: True)
    assert isinstance(training.stepper(ours, 0.1), graph.GraphedStep)
    training.train(ours, data, **how)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_which_steps_are_graphed():
    cpu, gpu = nn.Linear(2, 2).weight, SimpleNamespace(is_cuda=True)
    assert not training._on_gpu([cpu])
    assert training._on_gpu([gpu, gpu])
    assert not training._on_gpu([gpu, cpu])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_on_a_real_gpu(data, optimizer):
    """Graphed steps do what eager ones do on the CPU, on the same batches."""
    masks = {"fc1.weight": torch.rand(16, 6, generator=torch.Generator().manual_seed(0)) < 0.5}
    how = {"iterations": 30, "batch": 20, "eval_every": 10, "lr": 1e-2, "optimizer": optimizer, "drops": (0.5,)}
    plain, ours = convert(reinit(factory, 0), masks), convert(reinit(factory, 0), masks).cuda()
    moved = Dataset("clouds", 3, *(part.cuda() for part in splits(data)))
    expected, record = training.train(plain, data, **how), training.train(ours, moved, **how)
    assert record["curves"]["val_loss"] == pytest.approx(expected["curves"]["val_loss"], rel=1e-3)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)


def test_augmented_batches_are_those_images_moved():
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12)
    all_of = list(islice(training.batches(x, y, 5, seed=3, augment=True), 6))
    again = list(islice(training.batches(x, y, 5, seed=3, augment=True), 6))
    later = list(islice(training.batches(x, y, 5, seed=3, start=3, augment=True), 3))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(all_of, again, strict=True))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(all_of[3:], later, strict=True))
    moved = 0
    for images, labels in all_of:
        for image, label in zip(images, labels.tolist(), strict=True):
            moves = flip_and_crop(x[label].expand(MOVES, -1, -1, -1), torch.arange(MOVES))
            assert (moves == image).flatten(1).all(1).any()
            moved += not torch.equal(image, x[label])
    assert moved > 20
    assert not torch.equal(all_of[0][0], next(training.batches(x, y, 5, seed=4, augment=True))[0])


@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_where_the_data_are(augment):
    x, y = torch.empty(12, 3, 8, 8, device="meta"), torch.empty(12, dtype=torch.int64, device="meta")
    for images, labels in islice(training.batches(x, y, 5, seed=3, augment=augment), 3):
        assert (images.device.type, images.shape) == ("meta", (5, 3, 8, 8))
        assert (labels.device.type, labels.shape) == ("meta", (5,))


def test_augments_the_training_images_only(data, monkeypatch):
    images = Dataset("images", 3, *(part.view(-1, 1, 2, 3) if part.dim() == 2 else part for part in splits(data)))
    model = nn.Sequential(nn.Flatten(), reinit(factory, 0))
    monkeypatch.setattr(training, "flip_and_crop", lambda x, moves: torch.zeros_like(x))
    seen = []
    model[0].register_forward_pre_hook(lambda module, x: seen.append((module.training, bool(x[0].any()))))
    training.train(model, images, iterations=3, batch=20, augment=True)
    assert set(seen) == {(True, False), (False, True)}


def splits(data: Dataset) -> list[torch.Tensor]:
    return [data.train_x, data.train_y, data.val_x, data.val_y, data.test_x, data.test_y]


def test_learns_in_place_and_keeps_the_mask(data):
    dense = reinit(factory, 0)
    masks = {"fc1.weight": torch.rand(16, 6, generator=torch.Generator().manual_seed(0)) < 0.5}
    model = convert(dense, masks)
    record = training.train(model, data, iterations=200, batch=20, eval_every=50)
    assert record["curves"]["val_loss"][0] > 0.5 > record["curves"]["val_loss"][-1]
    assert record["final_test_accuracy"] > 0.9
    assert torch.equal(masks_of(model)["fc1.weight"], masks["fc1.weight"])
    assert training.evaluate(model, data.test_x, data.test_y)[1] == record["final_test_accuracy"]
    assert model.training


def test_the_same_twice(data):
    states, curves = [], []
    for _ in range(2):
        model = reinit(factory, 0)
        curves.append(training.train(model, data, iterations=30, batch=20, eval_every=10)["curves"])
        states.append(dense_state(model))
    assert curves[0] == curves[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("start", "stop", "evaluated"),
    [(0, None, [0, 20, 40, 50]), (0, 40, [0, 20, 40]), (13, None, [13, 20, 40, 50]), (0, 7, [0, 7])],
)
def test_when_it_evaluates(data, start, stop, evaluated):
    seen = []
    record = training.train(
        reinit(factory, 0), data, iterations=50, batch=20, eval_every=20, start=start, stop=stop, on_eval=seen.append
    )
    assert record["curves"]["iteration"] == seen == evaluated
    assert {len(curve) for curve in record["curves"].values()} == {len(evaluated)}


def test_early_stop_is_the_first_minimum_of_the_validation_loss(data, monkeypatch):
    values = iter([(9, 0), (0, 0.1), (3, 0), (0, 0.2), (1, 0), (0, 0.3), (1, 0), (0, 0.4)])  # val, test, val, ...
    monkeypatch.setattr(training, "evaluate", lambda *_: next(values))
    record = training.train(reinit(factory, 0), data, iterations=30, batch=20, eval_every=10)
    assert (record["early_stop_iteration"], record["early_stop_test_accuracy"]) == (20, 0.3)
    assert record["final_test_accuracy"] == 0.4
    assert record["curves"]["iteration"] == [0, 10, 20, 30]  # it trained to the end


def test_seconds_and_medians(data, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(training, "perf_counter", lambda: next(clock))  # a second from one look to the next
    record = training.train(reinit(factory, 0), data, iterations=32, batch=20, eval_every=10)
    assert (record["train_seconds"], record["eval_seconds"]) == (4, 5)
    assert (record["train_step_ms"], record["eval_ms"]) == (100, 1000)
    assert record["steps"] == "eager"


def test_evaluate_in_parts_in_evaluation_mode(data, monkeypatch):
    model = nn.Sequential(reinit(factory, 0), nn.Dropout(0.9))
    logits = model[0](data.val_x)
    expected = F.cross_entropy(logits, data.val_y).item(), (logits.argmax(1) == data.val_y).float().mean().item()
    monkeypatch.setattr(training, "EVALUATED_VECTORS", 6)
    assert training.evaluate(model, data.val_x, data.val_y) == pytest.approx(expected)
    assert model.training
    assert model[1].training


def test_divergence_is_an_error(data):
    with pytest.raises(ValueError, match="diverged"):
        training.train(reinit(factory, 0), data, iterations=20, batch=20, lr=1e30, eval_every=10)


WRONG = [
    {"iterations": 0},
    {"start": 5},
    {"start": -1},
    {"stop": 6},
    {"stop": 0},
    {"eval_every": 0},
    {"batch": 0},
    {"optimizer": "lion"},
    {"augment": True},  # of vectors
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(data, wrong):
    with pytest.raises(ValueError, match="expected"):
        training.train(reinit(factory, 0), data, **{"iterations": 5, "batch": 20, **wrong})
