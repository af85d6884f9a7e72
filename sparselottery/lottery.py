"""Iterative magnitude pruning (Frankle & Carbin, arXiv 1803.03635, section 1; rewinding: arXiv 1903.01611).

With theta_k the weights at step k and m = ones, repeat:  w = train(m * theta_k);  m = prune(w, m).
The ticket is (theta_k, m).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .contents import Contents
from .convert import dense_entries, masked_weights, masks_of, prunable
from .files import json_copy
from .masks import Granularity, Masks, Score, check_blocks, pools, prune_pools
from .n_of_m import NofM
from .nn.indices import Seen
from .oriented import Views, fitted, tell_of_small
from .pruning import complete, links_for, tell_of_emptied
from .random_state import random_state_kept, seed_all
from .runs import RunFolder
from .scores import Scores, by_given, by_magnitude_of_survivors
from .storable import check_storable
from .survey import survey
from .ticket import Ticket, contents_of

Trained = TypeVar("Trained")


def find_ticket(
    model: nn.Module,
    train: Callable[..., Mapping[str, Any] | None],
    *,
    rounds: int,
    retrain: Callable[..., Mapping[str, Any] | None] | None = None,
    fraction: float = 0.2,
    scores: Callable[[nn.Module], Scores] | None = None,
    rewind_step: int = 0,
    reset: bool = True,
    scope: str = "layer",
    rates: Mapping[str, float] | None = None,
    output_fraction: float | None = None,
    ignore: Sequence[str] = (),
    granularity: Granularity = (1, 1),
    permute: bool = False,
    out: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    on_round: Callable[[dict[str, Any]], None] | None = None,
) -> Ticket:
    """Find a lottery ticket of `model`: prune it `rounds` times, training before each pruning and after the last.

    Examples:
        >>> def train(model):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     for _ in range(10):
        ...         optimizer.zero_grad()
        ...         loss = nn.functional.mse_loss(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        ...     return {"loss": loss.item()}
        >>> model, x, y = nn.Sequential(nn.Linear(8, 4)), torch.randn(16, 8), torch.randn(16, 4)
        >>> ticket = find_ticket(model, train, rounds=2, fraction=0.5, out="runs/mine")
        >>> ticket.density
        0.25
        >>> sparse = ticket.apply(model)  # at its initial weights, ready to train

    Round 0 trains the whole net; each further round r prunes `fraction` of what is left, puts the survivors back to
    their initial values and trains again, so `rounds + 1` trainings in all. `rounds=1` is one-shot pruning.

    Every training gets a new model, converted so that only the survivors are stored and multiplied, and starts from
    the same weights, biases, buffers and random state (torch, `random`, numpy), so data order repeats if it follows
    from them. `model` itself and the caller's random state are left as they are, but for one draw of torch's generator:
    the seed of all trainings.

    Args:
        model: any module with layers that can be masked. If it is converted, its pruned weights stay pruned.
        train: trains the model that it is given, in place, with an optimiser that it makes itself. It may return a
            JSON-able mapping (accuracies, curves), which goes into the round's record; NumPy's numbers and tensors
            without dimensions are taken as numbers.
            With `rewind_step=k > 0` it is called as `train(model, start=0, stop=k)` once, to reach theta_k, and as
            `train(model, start=k, stop=None)` in each round: to skip the first k steps of data and schedule.
        rounds: how often to prune. 0: train alone, which may then move the masks itself (`dynamic`); the ticket has the
            masks that it ends with.
        retrain: as `train`, in its place from round 1 on: with `reset=False` e.g. fine-tuning at a low learning rate.
        fraction, scope, rates, output_fraction, ignore, granularity, permute: how to prune, by magnitude: see `prune`.
        scores: a function of the trained model, whose result takes the place of magnitudes. It gets a new model with
            the trained weights, converted, and with them alone: gradients it takes itself. Name it in `settings`.
        rewind_step: k, the step whose weights the survivors go back to; 0 is the initialisation.
        reset: False trains on from the pruned weights instead, and goes back to theta_k only in the ticket that is
            returned ("continued training", paper App. B).
        out: a folder for the run. A run that was interrupted, even killed, goes on where it stopped when called again,
            losing at most the round in flight and ending as if it had never stopped; with more `rounds`, a finished
            one goes on too. Then the first weights are those of the folder, whatever `model` has: another model takes
            another folder. It holds settings.json, theta.safetensors (theta_k), for each round round-00.json (its
            record) and round-00.safetensors (a Ticket: its trained weights and mask), and ticket.safetensors.
        settings: JSON-able; whatever else decides the result (learning rate, data, which net of these layers). Kept in
            the folder and in the ticket's recipe; going on in the folder of a run with other settings is refused.
        on_round: called with each round's record when it is done, or found done: round, density, nnz, total, seconds
            (of the training) and what `train` returned.
    Returns the ticket: theta_k at the last mask. The trained weights are in `out`, whose files hold dense tensors only:
    a model with sparse, nested or quantised buffers or with extra state is refused there, and is fine without `out`.
    Raises ValueError or TypeError, before any training, for arguments that `prune` would refuse, `rounds < 0`,
    `rewind_step < 0`, a `train` that takes no start and stop though there is one, or an `out` of another run or with a
    damaged file in it; and after a training that altered the masks or returned something else than the above. In the
    latter case `out` keeps the training, without what was returned.
    """
    _check_count("rounds", rounds, 0)
    _check_count("rewind_step", rewind_step, 0)
    if not callable(train):
        raise TypeError(f"train: expected a function that trains a model, got {type(train).__name__}")
    for name, given in (("retrain", retrain), ("scores", scores), ("on_round", on_round)):
        if given is not None and not callable(given):
            raise TypeError(f"{name}: expected a function or None, got {type(given).__name__}")
    for name, given in (("train", train), ("retrain", retrain)):
        if rewind_step and given is not None:
            _check_takes_steps(name, given)
    found = survey(model)
    weights = prunable(model, found)
    state = dict(dense_entries(model))
    if lazy := [name for name, entry in state.items() if is_lazy(entry)]:
        raise ValueError(
            f"model: expected parameters with a shape, got the lazy {lazy[0]!r}: call the model once first"
        )
    masks = complete(weights, masks_of(model))
    how = {"scope": scope, "rates": rates, "output_fraction": output_fraction, "ignore": ignore}
    chosen = pools(list(weights), fraction, **how, granularity=granularity, permute=permute)
    views = Views(found, chosen)
    chosen = fitted(chosen, views.seen(masks))
    check_blocks(seen := views.seen(masks), chosen)
    tell_of_small(chosen, seen, stacklevel=2)
    linked = links_for(model, chosen)
    if rounds > 1 and (fixed := [pool for pool in chosen if pool.fraction and isinstance(pool.block, NofM)]):
        raise ValueError(f"rounds: expected 1, as one leaves {fixed[0].block} of {fixed[0].names[0]}, got {rounds}")
    recipe = {"fraction": fraction, **how, "rewind_step": rewind_step, "reset": reset, "settings": settings}
    recipe |= {"layers": {name: list(weight.shape) for name, weight in weights.items()}}
    blocked = [pool for pool in chosen if pool.fraction and pool.block != (1, 1)]
    if blocked:  # else left out, so that runs begun before there were blocks go on
        grains = {name: pool.block for pool in blocked for name in pool.names}
        recipe["granularity"] = {
            name: grain if isinstance(grain, tuple) else str(grain) for name, grain in grains.items()
        }
    if out is not None:
        check_storable(weights, {name: entry for name, entry in state.items() if name not in weights})
    found.tell(model, stacklevel=2)
    del weights, state, found  # of a converted model, new dense tensors
    files = RunFolder(out)
    recipe = files.settings(json_copy("settings", {**recipe, "seed": int(torch.randint(2**32, (), device="cpu"))}))

    theta = files.load("theta")
    if theta is None:
        theta = Ticket.from_model(model, recipe)
        theta.masks.update({name: mask.cpu() for name, mask in masks.items() if name not in theta.masks})
        if rewind_step:
            theta, _, fault = _train(model, theta, train, {"start": 0, "stop": rewind_step}, Ticket.from_model)
        files.save("theta", theta)
        if rewind_step and fault:
            raise fault

    steps = {"start": rewind_step, "stop": None} if rewind_step else {}
    start = theta
    for number in range(rounds + 1):
        name, masks = f"round-{number:02d}", start.masks
        done = files.load(name)
        if done is None:
            trainer = retrain if retrain and number else train
            trained, record, fault = _train(model, start, trainer, steps, contents_of, moves=rounds == 0)
            record = {"round": number, **record}
            files.save_record(name, record)
            files.save(name, trained)  # last: the round is done when this file is there
            if fault:
                raise fault
        else:
            trained, masks, record = done.contents(), done.masks, files.load_record(name)
        try:  # before anybody can change the trained weights, which are the model's own
            if number < rounds:
                weights = theta.weights if reset else Ticket.from_contents(trained).weights
                score = _score(scores, model, trained, masks, views)
                del done, trained  # a model's bytes or two
                before, masks = masks, views.restored(prune_pools(views.seen(masks), chosen, score, linked))
                tell_of_emptied(before, masks, stacklevel=2)
                # Read at the masks only: nothing need be set to zero.
                start = Ticket.of_parts(weights, masks, recipe, theta.architecture)
                del weights, score, before
            elif rounds == 0:
                masks = {name: mask.cpu() for name, mask in Ticket.from_contents(trained).masks.items()}
        finally:
            if on_round is not None:
                on_round(record)

    ticket = theta.pruned(masks, {**recipe, "rounds": rounds})
    files.save("ticket", ticket)
    files.wait()
    return ticket


def _score(scores: Callable | None, model: nn.Module, trained: Contents, masks: Masks, views: Views) -> Score:
    """What `prune_pools` takes of what it sees, of a training's weights."""
    if scores is None:
        values = {name: values for name, (_, values) in trained.layers.items()}
        return by_magnitude_of_survivors(views.of_scores(values, masks), views.seen(masks))
    with random_state_kept():
        found = scores(Ticket.from_contents(trained).apply(model))
    return by_given(views.of_scores(found, masks), views.seen(masks))


def _train(
    model: nn.Module,
    start: Ticket,
    train: Callable,
    steps: dict[str, Any],
    result: Callable[..., Trained],
    moves: bool = False,
) -> tuple[Trained, dict[str, Any], Exception | None]:
    """`result` of the model after one training from `start` and of the recipe, what to record of the training, and what
    is wrong with what `train` returned: it is then kept all the same, its record without that. moves: masks may.
    """
    with random_state_kept():
        current = start.apply(model)
        seen = {name: Seen(layer) for name, layer in masked_weights(current).items()}
        seed_all(start.recipe["seed"])
        began = perf_counter()
        returned = train(current, **steps)
        seconds = perf_counter() - began
    layers = masked_weights(current)
    doubtful = {name: layer for name, layer in layers.items() if name not in seen or not seen[name].still(layer)}
    for layer in doubtful.values():
        layer.check()
    if layers.keys() != start.masks.keys() or not (
        moves or all(torch.equal(layer.mask.cpu(), start.masks[name]) for name, layer in doubtful.items())
    ):
        raise ValueError("train: expected it to leave the masks as they are, but it altered them")
    trained = result(current, start.recipe)
    total = sum(mask.numel() for mask in start.masks.values())
    nnz = sum(layer.nnz for layer in layers.values())
    record = {"density": nnz / total if total else 1.0, "nnz": nnz, "total": total, "seconds": seconds}
    try:
        returned, taken = {} if returned is None else returned, ["round", *record]
        if not isinstance(returned, Mapping) or not returned.keys().isdisjoint(taken):
            got = type(returned).__name__ if isinstance(returned, nn.Module) else repr(returned)
            raise ValueError(f"train: expected None or a mapping without {taken}, got {got}")
        returned = json_copy("train", dict(returned))
    except (TypeError, ValueError) as fault:
        return trained, record, fault
    return trained, {**record, **returned}, None


def _check_count(what: str, value: int, least: int) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{what}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{what}: expected at least {least}, got {value}")


def _check_takes_steps(what: str, train: Callable) -> None:
    """Raise TypeError if it cannot be called as a training from one step to another."""
    try:
        inspect.signature(train).bind(object(), start=0, stop=1)
    except TypeError as error:
        raise TypeError(f"{what}: expected {what}(model, start, stop), as rewind_step is given: {error}") from None
    except ValueError:  # a built-in one has no signature
        return
