"""Masks that follow a schedule while a net trains: which weights go, which come, and when."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ranks
from ..masks import Block, Granularity
from ..moves import optimizers_of, set_masks
from ..n_of_m import NofM
from ..nn import MaskedLayer, as_module
from ..weight_decay import SparseLotteryWarning
from .choices import at_random, by_gradient, finite, gradients_at, highest, kept, merged
from .distributions import DISTRIBUTIONS, Distribution
from .drops import DROP, Score, magnitude
from .gradients import Watch
from .groups import Groups
from .pools import Pool, grains_of, sharing
from .schedules import Schedule, constant

GROWTH = ("random", "gradient", "momentum")
PATIENCE = 20  # steps in a row without finite gradients, more than mixed precision has
DECAY = 0.9  # of the gradients that "momentum" sums up


class MaskUpdater:
    """Moves the masks of a model while it trains. `step()` goes after each `optimizer.step()`.

    Examples:
        >>> dense = nn.Sequential(nn.Linear(64, 10))
        >>> model = convert(dense, prune(dense, 0.0))  # the layers to prune; all survives as yet
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> updater = MaskUpdater(model, optimizer, density=lambda step: 0.9**step, every=1, end=10)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(5, 64)).square().mean().backward()
        ...     optimizer.step()
        ...     moved = updater.step()
        >>> round(model[0].density, 2)
        0.35

    An update drops the survivors that score lowest and grows as many weights as the density then asks for, from zero.
    Survivors keep values, gradients and optimiser state (`set_masks`). Numbers of survivors are exact, ties go by
    index, and a weight that is dropped and grown at once has only stayed.

    Args:
        model: with masked layers (`convert`); all of them take part, but for those that `ignore` names.
        optimizer: one, or all that train these layers.
        density: of all these layers together, by step, counted from 1; at step 0 what is denser is pruned at random.
        distribution: of the density over layers: "uniform", "erk", a function as those of `distributions`, or "global":
            the weights of all layers compete.
        every, end: an update follows each step that is a multiple of `every`, and the step `end`, the last with one.
        drop: the scores of survivors, (nnz,): "magnitude" |w|, "saliency" |w g|, or a function (name, layer) -> scores.
        drop_fraction: of the survivors that the density leaves, dropped at an update so that as many can grow, by step;
            None: none.
        grow: "random"; "gradient", the largest |g| of the step; or "momentum", the largest |m|, m the gradients of the
            last `window` steps summed up with a decay of 0.9. Where all that is pruned grows, nobody is asked.
        candidates: how many places are drawn for each weight that is to grow by gradient, which alone are scored. None:
            all are, a strip of rows after another. "momentum" takes 10 for None.
        granularity: (rows, columns) of blocks that go and come whole, by the means of their scores, or by layer as in
            `prune`. Densities are then shares of the blocks. With "global" all layers have the same; not "momentum".
            "N:M": weights come where others of their group of M went, and a density is that of each group, in M-ths,
            at least N of them; masks begin as `prune` leaves them, or whole. Not "global", "momentum" or `candidates`.
        ignore: names or fnmatch patterns of layers that keep their masks.
        seed: of all that is drawn, the same for all processes.

    Only steps that `step()` counts matter: gradients may be accumulated over several backwards. Gradients that are not
    finite, as mixed precision has them at times, put an update off by a step; twenty such steps in a row warn. Of
    several processes all decide from the gradients of all, and the first one's decision is everybody's. `state_dict()`
    belongs into a checkpoint beside the model's and the optimiser's: training goes on in the same bits.
    Raises ValueError or TypeError for arguments that make no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        density: Schedule,
        *,
        distribution: str | Distribution = "uniform",
        every: int = 100,
        end: int | None = None,
        drop: str | Score = "magnitude",
        drop_fraction: Schedule | None = None,
        grow: str = "random",
        candidates: float | None = None,
        window: int = 10,
        granularity: Granularity = (1, 1),
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        drop_fraction = constant(0.0) if drop_fraction is None else drop_fraction
        for name, given in (("density", density), ("drop_fraction", drop_fraction)):
            if not callable(given):
                raise TypeError(f"{name}: expected a function of the step, as constant(0.1) is, got {given!r}")
        self.model, self.density, self.drop_fraction = as_module(model), density, drop_fraction
        if optimizer is None:
            raise TypeError("optimizer: expected the one that trains the layers, or all of them, got None")
        optimizers = optimizers_of(optimizer, model, {})
        self.optimizer = optimizer if isinstance(optimizer, Optimizer) else optimizers
        self._distribution = distribution if callable(distribution) else DISTRIBUTIONS.get(distribution)
        if self._distribution is None and distribution != "global":
            expected = (*DISTRIBUTIONS, "global")
            raise ValueError(f"distribution: expected one of {expected} or a function, got {distribution!r}")
        self._score = drop if callable(drop) else DROP.get(drop)
        if self._score is None:
            raise ValueError(f"drop: expected one of {tuple(DROP)} or a function, got {drop!r}")
        if grow not in GROWTH:
            raise ValueError(f"grow: expected one of {GROWTH}, got {grow!r}")
        if not isinstance(candidates, Real | None) or not isinstance(seed, int):
            raise TypeError(f"candidates, seed: expected a number or None, and an int, got {candidates!r} and {seed!r}")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: expected one of 64 bits, got {seed}")
        if candidates is not None and not candidates >= 1:
            raise ValueError(f"candidates: expected at least 1 for each weight that is to grow, got {candidates}")
        if not isinstance(every, int) or not isinstance(end, int | None):
            raise TypeError(f"every, end: expected ints, got {every!r} and {end!r}")
        if not isinstance(window, int):
            raise TypeError(f"window: expected an int, got {window!r}")
        if min(every, window) < 1:
            raise ValueError(f"every, window: expected at least 1, got {every} and {window}")
        if end is not None and end < 1:
            raise ValueError(f"end: expected a step from 1 on, or None, got {end}")
        self.every, self.end, self.grow = every, end, grow
        self._candidates = 10.0 if candidates is None and grow == "momentum" else candidates
        self._window = {"random": 0, "gradient": 1, "momentum": min(window, every)}[grow]
        shared = sharing(model, ignore)
        layers = {name: together[0] for name, together in shared.items()}
        self._shapes = {name: layer.shape for name, layer in layers.items()}
        together = [layers] if self._distribution is None else [{name: layer} for name, layer in layers.items()]
        grains = grains_of(layers, granularity, grow, candidates is not None)
        kinds = set(grains.values())
        if self._distribution is None and (len(kinds) > 1 or any(isinstance(kind, NofM) for kind in kinds)):
            raise ValueError(f"granularity: expected the same blocks of all layers that compete, got {grains}")
        self._pools = [_pool(each, grains[next(iter(each))]) for each in together]
        self._watch = Watch(shared, {name: pool.block[0] for pool in self._pools for name in pool.layers})
        if grow != "random":
            self._watch.check()
        self._generator = torch.Generator().manual_seed(seed)
        self.steps = 0
        self._late = 0  # steps by which an update was put off
        self._watched: list[Tensor] | None = None  # of each pool the places whose gradients are summed up
        self._momentum: list[Tensor] = []
        for step in (0, self._next_update(), end):
            if step is not None:
                self._plan(step, start=step == 0)  # raises for what can be seen now
        self._update(start=True)
        self._look_ahead()

    @property
    def unwatched(self) -> int | None:
        """How many of the next steps need no gradient, up to and with the first one that moves masks; None: all.

        Somebody who takes them otherwise than by autograd counts them at once.
        """
        update = self.steps + 1 if self._late else self._next_update()
        if update is None:
            return None
        if self._score is not magnitude:  # it may ask for the gradient of the values
            return update - self.steps - 1
        return max(0, update - self.steps - (self._window if self._wants(update) else 0))

    def step(self, count: int = 1) -> bool:
        """Count a step of the optimiser, and update the masks if it is time; returns whether it was.

        count: of steps, as many as are `unwatched` at most. Raises ValueError for more.
        """
        if count != 1 and not 1 <= count <= (count if self.unwatched is None else self.unwatched):
            raise ValueError(f"count: expected 1 step, or at most {self.unwatched} that are unwatched, got {count}")
        self.steps += count
        if self._watched is not None:
            self._sum_up()
        updated = (self._late or self._due(self.steps)) and self._update()
        self._look_ahead()
        return updated

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, but for the model, the optimiser and the arguments."""
        found = {name: copy.deepcopy(getattr(self, f"_{name}")) for name in ("late", "watched", "momentum")}
        return {"steps": self.steps, **found, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. The model and its optimiser are loaded by their own `load_state_dict`, the model first.

        Raises ValueError, and changes nothing, for what is no `state_dict` of a MaskUpdater.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state: expected that of a MaskUpdater, got {type(state).__name__}")
        if missing := {"steps", "late", "watched", "momentum", "generator"} - state.keys():
            raise ValueError(f"state: expected that of a MaskUpdater, got none of {', '.join(sorted(missing))}")
        device = self._pools[0].places().device
        try:
            (generator := torch.Generator()).set_state(state["generator"].cpu())
            steps, late = operator.index(state["steps"]), operator.index(state["late"])
            of_pools = (state["watched"], state["momentum"])
            watched, momentum = (each and [part.to(device, copy=True) for part in each] for each in of_pools)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"state: expected that of a MaskUpdater, got another: {error}") from None
        self.steps, self._late, self._watched, self._momentum = steps, late, watched, momentum
        self._generator = generator
        self._look_ahead()

    def _due(self, step: int) -> bool:
        if self.end is not None and step >= self.end:
            return step == self.end
        return step % self.every == 0

    def _plan(self, step: int, start: bool = False) -> list[tuple[int, int]]:
        """Of each pool how many survivors stay and how many weights come."""
        density = _share_at(step, "density", self.density)
        fraction = 0.0 if start else _share_at(step, "drop_fraction", self.drop_fraction)
        shares = self._distribution and self._distribution(self._shapes, density)
        plan = []
        for pool in self._pools:
            share = density if shares is None else shares[next(iter(pool.layers))]
            if not 0 <= share <= 1:
                raise ValueError(f"distribution: expected densities in [0, 1], got {shares}")
            target = pool.target(share)
            stay = min(pool.count, target)
            stay -= round(fraction * stay)
            plan.append((stay, 0 if start else target - stay))
        return plan

    @torch.no_grad()
    def _update(self, start: bool = False) -> bool:
        """Move the masks to what the plan of this step asks for. start: drop at random, and grow nothing."""
        plan = self._plan(self.steps, start)
        moved = [(n, *each) for n, each in enumerate(plan) if each != (self._pools[n].count, 0)]
        chosen = [self._choose(n, stay, come, start) for n, stay, come in moved]
        self._late = self._late + 1 if any(places is None for places in chosen) else 0
        if self._late:
            if self._late == PATIENCE:
                text = f"masks wait since {PATIENCE} steps: scores of weights, or their gradients, are not finite"
                warnings.warn(text, SparseLotteryWarning, stacklevel=3)
            return False
        self._watched, self._momentum = None, []
        if not moved:
            return False
        ends = [len(places) for places in chosen]
        agreed = ranks.of_first(torch.cat(chosen)).split(ends)
        patterns = {}
        for (n, *_), places in zip(moved, agreed, strict=True):
            patterns |= self._pools[n].patterns(places)
        set_masks(self.model, patterns, self.optimizer)
        return True

    def _choose(self, number: int, stay: int, come: int, start: bool) -> Tensor | None:
        """The places that survive in a pool; None if scores are not finite."""
        pool = self._pools[number]
        places = kept(pool, stay, stay + come, self._at_random if start else self._score)
        if places is None or come == 0:
            return places
        if stay + come == pool.total:
            return torch.arange(pool.total, device=places.device)
        grown = self._grow(number, places, come)
        return grown if grown is None else merged(places, grown)

    def _grow(self, number: int, places: Tensor, come: int) -> Tensor | None:
        """`come` places of a pool that are not among those that stay."""
        pool = self._pools[number]
        if isinstance(pool, Groups):
            return pool.grown(places, len(places) + come, self._generator if self.grow == "random" else self._watch)
        if self.grow == "random":
            return at_random(pool, places, come, self._generator)
        if self.grow == "gradient":
            if self._candidates is None:
                return by_gradient(pool, places, come, self._watch)
            drawn = self._draw(pool, places, come)
            scores = gradients_at(pool, drawn, self._watch).abs()
        elif self._watched is None:  # another hand has moved the masks
            return at_random(pool, places, come, self._generator)
        else:
            free = ~torch.isin(self._watched[number], places)
            drawn, scores = self._watched[number][free], self._momentum[number][free].abs()
        if not finite(scores):
            return None
        grown = drawn[highest(scores, min(come, len(drawn)))]
        rest = come - len(grown)
        if rest:  # where too few were pruned before this update
            grown = merged(grown, at_random(pool, merged(places, grown), rest, self._generator))
        return grown

    def _draw(self, pool: Pool, places: Tensor, come: int) -> Tensor:
        free = pool.total - len(places)
        return at_random(pool, places, min(free, math.ceil(self._candidates * come)), self._generator)

    def _at_random(self, name: str, layer: MaskedLayer) -> Tensor:
        return torch.rand(layer.nnz, dtype=torch.float64, generator=self._generator, device="cpu").to(
            layer.values.device
        )

    def _look_ahead(self) -> None:
        """Catch gradients in the next step if an update wants them."""
        update = self.steps + 1 if self._late else self._next_update()
        near = update is not None and update - self.steps <= self._window
        comes = self._wants(update) if near else []
        if not comes:
            self._watch.stop()
            return
        self._watch.start()
        if self.grow == "momentum" and self._watched is None:
            pools = list(zip(self._pools, comes, strict=True))
            self._watched = [self._draw(pool, pool.places(), come) for pool, come in pools]
            self._momentum = [places.new_zeros(len(places), dtype=torch.float32) for places in self._watched]

    def _wants(self, update: int) -> list[int]:
        """Of each pool how many weights come by their gradient at this update; [] if nobody asks for one."""
        plan = zip(self._plan(update), self._pools, strict=True) if self._window else ()
        comes = [come if stay + come < pool.total else 0 for (stay, come), pool in plan]
        return comes if any(comes) else []

    def _next_update(self) -> int | None:
        update = (self.steps // self.every + 1) * self.every
        if self.end is None or update <= self.end:
            return update
        return self.end if self.steps < self.end else None

    @torch.no_grad()
    def _sum_up(self) -> None:
        for pool, places, momentum in zip(self._pools, self._watched, self._momentum, strict=True):
            gradient = gradients_at(pool, places, self._watch)
            if bool(gradient.isfinite().all()):  # else the optimiser has left out this step as well
                momentum.mul_(DECAY).add_(gradient)


def _pool(layers: dict[str, MaskedLayer], grain: Block | NofM) -> Pool:
    return Groups(layers, grain) if isinstance(grain, NofM) else Pool(layers, grain)


def _share_at(step: int, name: str, schedule: Schedule) -> float:
    """What a schedule of shares says at a step. Raises TypeError or ValueError if it is no number in [0, 1]."""
    value = schedule(step)
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a function of the step that returns numbers, got {value!r} at step {step}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected values in [0, 1], got {value} at step {step}")
    return value
