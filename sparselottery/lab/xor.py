"""XOR by nets of 2 inputs, H hidden units and 1 output: do larger ones converge more often, and do their best units?

The first version of the paper (arXiv 1803.03635v1, section 2) trains thousands of them. Here all trials of a size are
trained at once: the last dimension R of every tensor is the trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import setting

INPUTS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])  # (4, 2), the whole training set
TARGETS = torch.tensor([[0.0], [1.0], [1.0], [0.0]])  # (4, 1)
BLOCK = 512  # trials at a time: their tensors fit a cache
CHECK_EVERY = 100  # iterations between looks at which trials are done
Z = 1.96  # of intervals that hold 95 %


@dataclass(frozen=True)
class Settings:
    """All that decides the table. Raises ValueError for what makes no sense."""

    hidden: tuple[int, ...] = setting((10, 8, 6, 4, 2), "hidden units, the largest first")
    trials: int = setting(1000, "nets of each size")
    iterations: int = setting(10_000, "at most, of gradient descent on all four points")
    lr: float = setting(1.0, "learning rate")
    momentum: float = setting(0.0, "of the gradient descent")
    deviation: float = setting(0.1, "of the first weights, Gaussian, redrawn beyond two deviations; biases begin at 0")
    zero_loss: float = setting(0.01, "a mean cross-entropy below it counts as zero")
    seed: int = setting(0, "of the first weights")

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1 or list(self.hidden) != sorted(set(self.hidden), reverse=True):
            raise ValueError(f"hidden: expected sizes of at least 1, the largest first, got {self.hidden}")
        for name in ("trials", "iterations", "lr", "deviation", "zero_loss"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a value in [0, 1), got {self.momentum}")


class Nets(NamedTuple):
    """R nets: relu(x @ w1 + b1) @ w2 + b2, the logit of the answer being 1."""

    w1: Tensor  # (2, H, R)
    b1: Tensor  # (1, H, R)
    w2: Tensor  # (1, H, R)
    b2: Tensor  # (1, 1, R)

    def logits(self) -> Tensor:
        """(4, R), of each point."""
        return (self._hidden().relu() * self.w2).sum(1) + self.b2[0]

    def _hidden(self) -> Tensor:
        """(4, H, R), before the ReLU."""
        return (INPUTS @ self.w1.flatten(1)).view(4, *self.w1.shape[1:]) + self.b1

    def gradients(self) -> Nets:
        """Of `losses`, each net's of its own."""
        before = self._hidden()
        hidden = before.relu()
        logits = (hidden * self.w2).sum(1) + self.b2[0]
        error = ((logits.sigmoid() - TARGETS) / len(TARGETS))[:, None]  # (4, 1, R)
        back = error * self.w2 * (before > 0)
        w1 = (INPUTS.T @ back.flatten(1)).view_as(self.w1)
        return Nets(w1, back.sum(0, keepdim=True), (hidden * error).sum(0, keepdim=True), error.sum(0, keepdim=True))

    def losses(self) -> Tensor:
        """(R,), mean cross-entropies."""
        logits = self.logits()
        return F.binary_cross_entropy_with_logits(logits, TARGETS.expand_as(logits), reduction="none").mean(0)

    def correct(self) -> Tensor:
        """(R,) bool: is every point on its side of the decision boundary?"""
        return ((self.logits() > 0) == (TARGETS > 0)).all(0)

    def trials(self, chosen: Tensor) -> Nets:
        """Those nets; chosen: int64 (n,) or bool (R,)."""
        return Nets(*(tensor[..., chosen] for tensor in self))


def initial(hidden: int, settings: Settings, generator: torch.Generator) -> Nets:
    """``settings.trials`` nets before training."""
    std = settings.deviation
    w1, w2 = (
        nn.init.trunc_normal_(torch.empty(n, hidden, settings.trials), 0, std, -2 * std, 2 * std, generator=generator)
        for n in (2, 1)
    )
    return Nets(w1, torch.zeros_like(w2), w2, torch.zeros(1, 1, settings.trials))


def train(nets: Nets, settings: Settings) -> Nets:
    """The nets after gradient descent on their mean cross-entropies; `nets` are left as they are.

    A net whose loss is found below ``settings.zero_loss``, every CHECK_EVERY iterations, is trained no further.
    """
    with _one_thread():
        blocks = [_train(nets.trials(each), settings) for each in torch.arange(nets.b2.shape[-1]).split(BLOCK)]
    return Nets(*(torch.cat(tensors, dim=-1) for tensors in zip(*blocks, strict=True)))


def _train(current: Nets, settings: Settings) -> Nets:
    done, active = Nets(*(tensor.clone() for tensor in current)), torch.arange(current.b2.shape[-1])
    velocity = Nets(*map(torch.zeros_like, current))
    for iteration in range(1, settings.iterations + 1):
        for parameter, speed, gradient in zip(current, velocity, current.gradients(), strict=True):
            speed.mul_(settings.momentum).add_(gradient)
            parameter.sub_(speed, alpha=settings.lr)
        if iteration % CHECK_EVERY and iteration < settings.iterations:
            continue
        for kept, parameter in zip(done, current, strict=True):
            kept[..., active] = parameter
        going = current.losses() >= settings.zero_loss
        if not going.any():
            break
        active, current, velocity = active[going], current.trials(going), velocity.trials(going)
    return done


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads would wait for each other longer than these small tensors take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prune_units(start: Nets, trained: Nets, units: int) -> Nets:
    """`start` with only its best `units` hidden units: of each net those with the largest products when trained.

    The product is that of the norms of a unit's weights, its incoming ones and its outgoing one.
    """
    importance = trained.w1.norm(dim=0) * trained.w2[0].abs()  # (H, R)
    best = importance.topk(units, dim=0).indices.sort(0).values[None]
    w1, b1, w2 = (tensor.gather(1, best.expand(len(tensor), -1, -1)) for tensor in start[:3])
    return Nets(w1, b1, w2, start.b2.clone())


def run(settings: Settings, on_progress: Callable[[int, int], None] | None = None) -> list[dict]:
    """The table, a row for each size: how often its nets, and those pruned to it, learn XOR.

    A row has ``hidden``, ``trials`` and, as shares of the trials, ``boundary`` (all four points on their side of the
    decision boundary) and ``zero_loss``, both for random nets and, with the prefix ``ticket_``, for the largest nets
    pruned in one shot to that size by `prune_units` and reset (None in the first row). ``<share>_low`` and
    ``<share>_high`` bound each at 95 %. ``on_progress(done, total)`` follows each training of a size. The same settings
    give the same table.
    """
    rows, largest = [], settings.hidden[0]
    total = 2 * len(settings.hidden) - 1
    done = 0

    def shares(prefix: str, nets: Nets) -> tuple[Nets, dict]:
        nonlocal done
        trained = train(nets, settings)
        done += 1
        if on_progress is not None:
            on_progress(done, total)
        reached = {"boundary": trained.correct(), "zero_loss": trained.losses() < settings.zero_loss}
        return trained, _columns(prefix, {name: int(each.sum()) for name, each in reached.items()}, settings.trials)

    for hidden in settings.hidden:
        generator = torch.Generator().manual_seed(settings.seed * 1000 + hidden)
        start = initial(hidden, settings, generator)
        trained, row = shares("", start)
        if hidden == largest:
            first, first_trained = start, trained
            ticket = _columns("ticket_", {"boundary": None, "zero_loss": None}, settings.trials)
        else:
            _, ticket = shares("ticket_", prune_units(first, first_trained, hidden))
        rows.append({"hidden": hidden, "trials": settings.trials, **row, **ticket})
    return rows


def _columns(prefix: str, counts: dict[str, int | None], trials: int) -> dict[str, float | None]:
    columns: dict[str, float | None] = {}
    for name, count in counts.items():
        low, high = (None, None) if count is None else interval(count, trials)
        share = None if count is None else count / trials
        columns |= {prefix + name: share, f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
    return columns


def interval(count: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `count` of `trials` were seen (Wilson's score)."""
    share = count / trials
    middle = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    return middle - half, middle + half
