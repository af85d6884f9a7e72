"""The paper's training: Adam, a fixed number of iterations, early stopping computed afterwards (section 2).

A step of Lenet-300-100 on our kernels takes about 150 us in all, so nothing here touches Python more than it must:
data are tensors in memory, a batch is one `index_select`, nothing is read back from a tensor between evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Dataset

EVALUATION_BATCH = 2000


def train(
    model: nn.Module,
    data: Dataset,
    *,
    iterations: int,
    batch: int = 60,
    lr: float = 1.2e-3,
    eval_every: int = 100,
    seed: int = 0,
    start: int = 0,
    on_eval: Callable[[int], None] | None = None,
) -> dict:
    """Train ``model`` in place from iteration ``start`` to ``iterations`` and return what happened.

    The batches are those of a run from 0: an iteration sees the same images whatever ``start`` is. The optimiser is
    new. Validation and test sets are evaluated before the first step, at every multiple of ``eval_every`` and after the
    last step; ``on_eval(iteration)`` follows each.

    Returns a JSON-able mapping: ``early_stop_iteration`` (of minimum validation loss), ``early_stop_test_accuracy``
    there, ``final_test_accuracy``, ``train_seconds`` and ``eval_seconds`` in all, ``train_step_ms`` and ``eval_ms`` of
    one step and one evaluation (medians over the evaluations, which a stalled machine does not move), and ``curves``:
    lists ``iteration``, ``val_loss``, ``val_accuracy``, ``test_accuracy``. Raises ValueError for arguments that make no
    sense, and when the validation loss is not finite.
    """
    if not 0 <= start < iterations:
        raise ValueError(f"expected 0 <= start < iterations, got start={start}, iterations={iterations}")
    if eval_every < 1:
        raise ValueError(f"expected eval_every >= 1, got {eval_every}")
    curves: dict[str, list] = {"iteration": [], "val_loss": [], "val_accuracy": [], "test_accuracy": []}
    eval_seconds, train_seconds, step_seconds = [], [], []

    def record() -> None:
        began = perf_counter()
        val_loss, val_accuracy = evaluate(model, data.val_x, data.val_y)
        _, test_accuracy = evaluate(model, data.test_x, data.test_y)
        if not math.isfinite(val_loss):
            raise ValueError(f"training diverged: validation loss {val_loss} at iteration {iteration} (lr={lr})")
        for curve, value in zip(curves.values(), (iteration, val_loss, val_accuracy, test_accuracy), strict=True):
            curve.append(value)
        eval_seconds.append(perf_counter() - began)
        if on_eval is not None:
            on_eval(iteration)

    model.train()
    step = stepper(model, lr)
    stream = batches(data.train_x, data.train_y, batch, seed, start)
    iteration = start
    record()
    while iteration < iterations:
        until = min(iterations, iteration + eval_every - iteration % eval_every)
        began = perf_counter()
        for x, y in islice(stream, until - iteration):
            step(x, y)
        train_seconds.append(perf_counter() - began)
        step_seconds.append(train_seconds[-1] / (until - iteration))
        iteration = until
        record()

    best = min(range(len(curves["iteration"])), key=curves["val_loss"].__getitem__)
    return {
        "early_stop_iteration": curves["iteration"][best],
        "early_stop_test_accuracy": curves["test_accuracy"][best],
        "final_test_accuracy": curves["test_accuracy"][-1],
        "train_seconds": sum(train_seconds),
        "eval_seconds": sum(eval_seconds),
        "train_step_ms": 1e3 * median(step_seconds),
        "eval_ms": 1e3 * median(eval_seconds),
        "curves": curves,
    }


def stepper(model: nn.Module, lr: float) -> Callable[[Tensor, Tensor], None]:
    """``step(x, y)``: one Adam step on the cross-entropy of ``model``, with a new optimiser."""
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        for parameter in parameters:  # zero_grad without its 5 us of profiling hooks
            parameter.grad = None
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def batches(x: Tensor, y: Tensor, batch: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches, a new permutation per epoch, from the ``start``-th on.

    Every batch is full: what an epoch leaves over is dropped, and drawn again in the next one.
    """
    if not 1 <= batch <= len(x):
        raise ValueError(f"expected a batch between 1 and the {len(x)} training images, got {batch}")
    for index in islice(_indices(len(x), batch, seed), start, None):
        yield x.index_select(0, index), y.index_select(0, index)


def _indices(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].view(-1, batch)


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of ``model`` on (x, y), in evaluation mode, without gradients."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in x.split(EVALUATION_BATCH)])
        loss, correct = F.cross_entropy(logits, y), (logits.argmax(1) == y).sum()
    model.train(was_training)
    return loss.item(), correct.item() / len(y)
