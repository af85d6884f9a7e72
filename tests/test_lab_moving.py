"""Masks that move under native steps: the training of autograd, and who takes which step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_lab_native import data, factory, masked  # noqa: F401  data is a fixture

from sparselottery import convert, dynamic
from sparselottery.convert import dense_state, masks_of
from sparselottery.kernels import native as library
from sparselottery.lab import moving, training
from sparselottery.lab.controls import reinit

pytestmark = pytest.mark.skipif(not library.available(), reason=library.status())
N = 60
METHODS = {
    "rigl": lambda m, o: dynamic.rigl(m, o, 0.3, end=45, every=7),
    "set": lambda m, o: dynamic.set_training(m, o, 0.3, end=45, every=7),
    "momentum": lambda m, o: dynamic.set_training(m, o, 0.3, end=45, every=7, grow="momentum", window=3),
    "gmp": lambda m, o: dynamic.gmp(m, o, 0.3, end=45, every=7),
    "saliency": lambda m, o: dynamic.gmp(m, o, 0.3, end=45, every=7, drop="saliency"),
    "dsd": lambda m, o: dynamic.dsd(m, o, 0.3, 20, 40),
    "never": lambda m, o: dynamic.gmp(m, o, 0.3, end=100, every=100),
}
LOOKED_AT = {  # steps that autograd takes: those whose gradients decide
    "rigl": {*range(7, 43, 7)},  # at 45 nothing is exchanged any more
    "momentum": {step for update in range(7, 43, 7) for step in range(update - 2, update + 1)} | {43, 44, 45},
    "saliency": {*range(7, 46, 7), 45},
}


@pytest.fixture
def taken(monkeypatch):
    """The steps that are native, appended as they are taken, in runs."""
    runs = []
    made = moving.native_trainer

    def native_trainer(*args):
        trainer = made(*args)
        return trainer and (lambda *given: runs.append(len(given[-1])) or trainer(*given))

    monkeypatch.setattr(moving, "native_trainer", native_trainer)
    return runs


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("how", [{"lr": 1e-2}, {"lr": 0.1, "optimizer": "sgd"}], ids=["adam", "sgd"])
def test_the_training_of_autograd(data, method, how, taken, monkeypatch):  # noqa: F811
    how |= {"iterations": N, "batch": 30, "eval_every": 25, "weight_decay": 1e-3, "drops": (0.5,), "moves": method}
    name = next(key for key, each in METHODS.items() if each is method)
    ours, plain = (convert(reinit(factory, 0), masks_of(masked(2.0))) for _ in range(2))
    training.train(ours, data, **how)
    assert sum(taken) == N - len(LOOKED_AT.get(name, ()))
    monkeypatch.setattr(training, "native_trainer", lambda *_: None)
    training.train(plain, data, **how)
    for one, other in zip(masks_of(ours).values(), masks_of(plain).values(), strict=True):
        assert torch.equal(one, other)
    for entry, expected in zip(dense_state(ours).values(), dense_state(plain).values(), strict=True):
        torch.testing.assert_close(entry, expected, rtol=1e-3, atol=1e-4)


def test_when_it_evaluates_changes_nothing(data):  # noqa: F811
    states = []
    for every in (5, 100):
        model = masked()
        training.train(model, data, iterations=N, eval_every=every, moves=METHODS["rigl"])
        states.append(dense_state(model))
    assert all(torch.equal(states[0][name], entry) for name, entry in states[1].items())


def test_steps_that_are_looked_at_are_not_counted_at_once():
    model = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = dynamic.rigl(model, optimizer, 0.3, end=45, every=7)
    assert updater.unwatched == 6
    for count in (0, -1, 7):
        with pytest.raises(ValueError, match="count: expected 1 step, or at most 6 that are unwatched"):
            updater.step(count)
    assert not updater.step(6)
    assert updater.unwatched == 0
    assert METHODS["gmp"](model, optimizer).unwatched == 7
    assert METHODS["saliency"](model, optimizer).unwatched == 6
    done = partial(dynamic.gmp, model, optimizer, 0.3, end=4)(every=2)
    done.step(2)
    done.step(2)
    assert done.unwatched is None
    done.step(1000)
    assert done.steps == 1004
