"""The paper's training: a fixed number of iterations, early stopping computed afterwards (section 2, App. G-I).

A step of a pruned Lenet-300-100 takes less than a tenth of a millisecond, so nothing here touches Python more than it
must: data are tensors in memory, nothing is read back from a tensor between evaluations, and where `native_trainer` can
train a model, all steps from one evaluation to the next are one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, repeat
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dynamic import MaskUpdater
from . import distributed
from .analyses import early_stop
from .augment import flip_and_crop, random_moves
from .data import Dataset
from .graph import GraphedStep
from .moving import MovingTrainer
from .native import native_trainer
from .pause import Pause, Paused, Training

Moves = Callable[[nn.Module, torch.optim.Optimizer], MaskUpdater]
# In a batch of an evaluation. Where outputs of convolutions exceed 32 MB, as Conv-2's of 128 images, their pages are
# new at every batch on the CPU, and it takes up to 1.8 times as long. A GPU waits for launches in small ones; Conv-2's
# widest output of 2500 images has 655 MB.
EVALUATED_VECTORS, EVALUATED_IMAGES, EVALUATED_ON_GPU = 2500, 64, 2500


def train(
    model: nn.Module,
    data: Dataset,
    *,
    iterations: int,
    batch: int = 60,
    lr: float = 1.2e-3,
    eval_every: int = 100,
    seed: int = 0,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    drops: Sequence[float] = (),
    warmup: int = 0,
    augment: bool = False,
    start: int = 0,
    stop: int | None = None,
    on_eval: Callable[[int], None] | None = None,
    pause: Pause | None = None,
    moves: Moves | None = None,
) -> dict:
    """Train ``model`` in place from iteration ``start`` to ``stop`` of ``iterations`` and return what happened.

    The batches and learning rates are those of a run from 0: an iteration sees the same images whatever ``start`` and
    ``stop`` (None: the last) are. The optimiser is new: `stepper` says which, `learning_rate` what ``drops`` and
    ``warmup`` do. ``augment`` flips and crops the training images at random. Validation and test sets are evaluated
    before the first step, at every multiple of ``eval_every`` and after the last step; ``on_eval(iteration)`` follows
    each. With ``pause`` a training that is due raises `Paused` after the next evaluation, its state kept; begun again,
    it goes on there and ends in the same bits. One in native steps, or whose masks move, is paused before its first
    step only. ``moves(model, optimizer)`` makes the `MaskUpdater` that follows each step.

    Returns a JSON-able mapping: ``early_stop_iteration`` (of minimum validation loss), ``early_stop_test_accuracy``
    there, ``final_test_accuracy``, ``train_seconds`` and ``eval_seconds`` in all, ``train_step_ms`` and ``eval_ms`` of
    one step and one evaluation (medians over the evaluations, which a stalled machine does not move), ``steps``, how
    those were taken ("native", "graph" or "eager"), and ``curves``: lists ``iteration``, ``val_loss``,
    ``val_accuracy``, ``test_accuracy``. Raises ValueError for arguments that make no sense, and when the validation
    loss is not finite. The data are on the device of the model. Of several processes (`distributed`) each takes its
    share of every batch; what is returned is then of all, with their `traffic`.
    """
    stop = iterations if stop is None else stop
    if not 0 <= start < stop <= iterations:
        raise ValueError(f"expected 0 <= start < stop <= iterations, got {start=}, {stop=}, {iterations=}")
    if eval_every < 1:
        raise ValueError(f"expected eval_every >= 1, got {eval_every}")
    curves: dict[str, list] = {"iteration": [], "val_loss": [], "val_accuracy": [], "test_accuracy": []}
    seconds: dict[str, list[float]] = {"eval": [], "train": [], "step": []}

    val = distributed.part(data.val_x), distributed.part(data.val_y)
    test = distributed.part(data.test_x), distributed.part(data.test_y)

    def record() -> None:
        began = perf_counter()
        distributed.average_statistics(model)
        val_loss, val_accuracy = distributed.mean(evaluate(model, *val), len(val[1]))
        _, test_accuracy = distributed.mean(evaluate(model, *test), len(test[1]))
        if not math.isfinite(val_loss):
            raise ValueError(f"training diverged: validation loss {val_loss} at iteration {iteration} (lr={lr})")
        for curve, value in zip(curves.values(), (iteration, val_loss, val_accuracy, test_accuracy), strict=True):
            curve.append(value)
        seconds["eval"].append(perf_counter() - began)
        if on_eval is not None:
            on_eval(iteration)

    model.train()
    how = lr, optimizer, weight_decay, momentum
    rates = [learning_rate(each, iterations, lr, drops, warmup) for each in range(iterations)]
    recipe = how, batch, seed, augment, rates, start, stop, eval_every
    training = None if pause is None else Training(pause.path, model, recipe)
    kept = training and training.kept()
    iteration = start
    if kept:
        iteration, curves, seconds = (kept[key] for key in ("iteration", "curves", "seconds"))
    replica = distributed.replica(model)
    drawn = batch, seed, iteration, augment, distributed.share(batch)
    run = Runner(replica, data, drawn, how, moves and partial(moves, model))
    if kept:
        training.restore(run.optimizer)
    else:
        record()
    while iteration < stop:
        if training and pause.due() and (run.optimizer or iteration == start):
            if run.optimizer:
                training.keep(run.optimizer, {"iteration": iteration, "curves": curves, "seconds": seconds})
            raise Paused(f"at iteration {iteration} of {iterations}")
        until = min(stop, iteration + eval_every - iteration % eval_every)
        began = perf_counter()
        run(rates[iteration:until])
        if data.train_x.is_cuda:  # the steps are queued
            torch.cuda.synchronize(data.train_x.device)
        seconds["train"].append(perf_counter() - began)
        seconds["step"].append(seconds["train"][-1] / (until - iteration))
        iteration = until
        record()
    if training:
        training.end()

    iteration, accuracy = early_stop(curves)
    return {
        "early_stop_iteration": iteration,
        "early_stop_test_accuracy": accuracy,
        "final_test_accuracy": curves["test_accuracy"][-1],
        "train_seconds": sum(seconds["train"]),
        "eval_seconds": sum(seconds["eval"]),
        "train_step_ms": 1e3 * median(seconds["step"]),
        "eval_ms": 1e3 * median(seconds["eval"]),
        "steps": run.kind,
        **distributed.traffic(replica, stop - start),
        "curves": curves,
    }


def learning_rate(iteration: int, iterations: int, lr: float, drops: Sequence[float] = (), warmup: int = 0) -> float:
    """Of one iteration, counted from 0: ``lr``, a tenth of it after each share of ``iterations`` in ``drops``.

    The first ``warmup`` iterations go up to it in equal steps (section 5).
    """
    lr /= 10 ** sum(iteration >= round(share * iterations) for share in drops)
    return lr * (iteration + 1) / warmup if iteration < warmup else lr


class Runner:
    """``run(rates)``: a step at each of these learning rates, on the batches that come next.

    drawn: what follows x and y in `batches`; how: what follows the model in `stepper`, with ``follows``. `optimizer` is
    None where the steps are native or masks move.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        drawn: tuple[int, int, int, bool, slice],
        how: tuple[float, str, float, float],
        follows: Callable[[torch.optim.Optimizer], MaskUpdater] | None = None,
    ) -> None:
        batch, seed, start, augment, _ = drawn
        self._data = data.train_x, data.train_y
        self._moves = follows is not None
        self._trainer = None if augment else native_trainer(model, data.train_x, *how[1:])
        if self._trainer is None or self._moves:
            self._step = stepper(model, *how, follows)
        if self._trainer is None:
            self._stream = batches(*self._data, *drawn)
        else:
            if self._moves:
                self._trainer = MovingTrainer(model, self._step, how[1:])
            self._orders = (order for order, _ in islice(_draws(len(data.train_x), batch, seed), start, None))

    @property
    def kind(self) -> str:
        """Of the steps: by the kernels alone, in a CUDA graph, or by autograd."""
        if self._trainer is not None:
            return "native"
        return "graph" if isinstance(self._step, GraphedStep) else "eager"

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        if self._trainer is not None or self._moves:
            return None
        return (self._step.eager if isinstance(self._step, GraphedStep) else self._step).optimizer

    def __call__(self, rates: Sequence[float]) -> None:
        if self._trainer is not None:
            self._trainer(*self._data, torch.stack(list(islice(self._orders, len(rates)))), rates)
            return
        for rate, (x, y) in zip(rates, self._stream, strict=False):  # the stream has no end
            self._step(x, y, rate)


def stepper(
    model: nn.Module,
    lr: float,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    follows: Callable[[torch.optim.Optimizer], MaskUpdater] | None = None,
) -> Step | GraphedStep:
    """``step(x, y, lr=lr)``: one optimiser step on the cross-entropy of ``model``, with a new optimiser.

    ``optimizer`` is "adam" or "sgd", with ``momentum``, which may be 0; ``weight_decay`` is of all parameters. On a GPU
    alone the step is a CUDA graph from its fourth call on, unless masks move: ``follows(optimizer)`` makes what steps
    after it. Raises ValueError for another name.
    """
    parameters = list(model.parameters())
    graphed = _on_gpu(parameters) and follows is None and not isinstance(model, distributed.Replica)
    if optimizer == "adam":
        chosen = torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True, capturable=graphed)
    elif optimizer == "sgd":
        chosen = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    else:
        raise ValueError(f"optimizer: expected adam or sgd, got {optimizer!r}")
    step = Step(model, parameters, chosen, lr, None if follows is None else follows(chosen))
    return GraphedStep(step, parameters[0].device, lr) if graphed else step


class Step:
    """``step(x, y, lr=lr)``, eagerly."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        lr: float,
        moves: MaskUpdater | None = None,
    ) -> None:
        self._model, self._parameters, self._lr, self.optimizer = model, parameters, lr, optimizer
        self.moves = moves

    def __call__(self, x: Tensor, y: Tensor, lr: float | Tensor | None = None) -> None:
        for parameter in self._parameters:  # zero_grad without its 5 us of profiling hooks
            parameter.grad = None
        F.cross_entropy(self._model(x), y).backward()
        self.optimizer.param_groups[0]["lr"] = self._lr if lr is None else lr
        self.optimizer.step()
        if self.moves is not None:
            self.moves.step()


def _on_gpu(parameters: Sequence[nn.Parameter]) -> bool:
    return all(parameter.is_cuda for parameter in parameters)


def batches(
    x: Tensor,
    y: Tensor,
    batch: int,
    seed: int,
    start: int = 0,
    augment: bool = False,
    share: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled batches, a new permutation per epoch, from the ``start``-th on.

    Every batch is full: what an epoch leaves over is dropped, and drawn again in the next one. With ``augment`` each
    image is flipped and cropped at random, anew in each epoch. What is drawn does not depend on the device of the data
    nor on ``share``, which says what to take of each batch.
    """
    for index, moves in islice(_draws(len(x), batch, seed, augment, x.device, share), start, None):
        images = x.index_select(0, index)
        yield (images if moves is None else flip_and_crop(images, moves)), y.index_select(0, index)


def _draws(
    count: int,
    batch: int,
    seed: int,
    augment: bool = False,
    device: torch.device | None = None,
    share: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The images of each batch, and what `flip_and_crop` does to them: drawn on the CPU, an epoch at a time."""
    if not 1 <= batch <= count:
        raise ValueError(f"expected a batch between 1 and the {count} training images, got {batch}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)[: count // batch * batch].view(-1, batch)
        moves = random_moves(order.numel(), generator).view_as(order)[:, share].to(device) if augment else repeat(None)
        yield from zip(order[:, share].to(device), moves, strict=False)


def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of ``model`` on (x, y), in evaluation mode, without gradients."""
    at_once = EVALUATED_VECTORS if x.dim() == 2 else EVALUATED_ON_GPU if x.is_cuda else EVALUATED_IMAGES
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in x.split(at_once)])
        own = logits.gather(1, y.unsqueeze(1)).squeeze(1)
        loss = (logits.logsumexp(1) - own).mean()  # of few classes four times as fast as F.cross_entropy
        correct = (logits.max(1).indices == y).sum()
    model.train(was_training)
    return loss.item(), correct.item() / len(y)
