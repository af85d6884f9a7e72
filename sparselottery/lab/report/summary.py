"""What a run was and what came out of it, in words: a sentence, notes, and the headline numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from ..settings import Settings
from . import draw
from .folder import TICKET, Run
from .tables import Row
from .tickets import resets

MODELS = {"lenet-300-100": "Lenet-300-100", "resnet-18": "Resnet-18", "vgg-19": "VGG-19"}
DATA = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "digits": "the digits"}
OPTIMIZERS = {"adam": "Adam", "sgd": "SGD"}


class Tile(NamedTuple):
    """One headline number: what it is, the number, and what it is compared with."""

    what: str
    number: str
    detail: str


def title(run: Run) -> str:
    """The net and the data."""
    settings = run.settings
    model, images = (str(settings.get(key, "")) for key in ("model", "data"))
    if ":" in model:  # a net of the user's own
        return f"{model}, trained by {settings.get('train')}"
    if not model or not images:
        return f"Run {run.folder.resolve().name}"
    return f"{MODELS.get(model, model.capitalize())} on {DATA.get(images, images)}"


def sentence(run: Run) -> str:
    """What was run."""
    settings, trials = run.settings, run.grid.get("trials", 1)
    rounds = settings.get("rounds", max(each.round for each in run.trainings))
    how = "one-shot" if settings.get("one_shot") else "iterative"
    scope = {"layer": "layer by layer", "global": "globally"}.get(str(settings.get("scope", "")), "")
    words = f"{_number(trials)} trial{'s' * (trials != 1)} of {how} magnitude pruning, {_number(rounds)} rounds"
    if isinstance(settings.get("fraction"), float):
        words += f" of {100 * settings['fraction']:.3g} %{scope and ', ' + scope}"
    if "iterations" in settings:
        words += f"; each training has {_number(settings['iterations'])} iterations"
        words += f" of {_number(settings['batch'])} images" if "batch" in settings else ""
        optimizer = str(settings.get("optimizer", ""))
        words += f" with {OPTIMIZERS.get(optimizer, optimizer)}" if optimizer else ""
        words += f" at learning rate {settings['lr']:.3g}" if isinstance(settings.get("lr"), float) else ""
    words += ". " + ("Survivors are reset" if resets(run) else "Survivors keep their trained weights")
    step = settings.get("rewind_step", 0)
    if resets(run):
        words += f" to their values at iteration {_number(step)}" if step else " to their initial values"
    if run.controls:
        words += "; compared with " + ", ".join(draw.style(name).label for name in run.controls)
    return words + "."


def notes(run: Run) -> list[str]:
    """What has to be said beside every figure: shortening, altered data, what is missing."""
    settings = run.settings
    found = [run.grid.get("scale") or _scale(settings), run.grid.get("note"), settings.get("note")]
    found = [str(each) for each in found if isinstance(each, str) and each]
    if not run.finished:
        done = sum(each.control == TICKET for each in run.trainings)
        found.append(
            f"Unfinished: {done} trainings of tickets and {len(run.trainings) - done} of controls are done so far"
        )
    return [each[0].upper() + each[1:] + "." * (not each.endswith(".")) for each in dict.fromkeys(found)]


def _scale(settings: dict[str, Any]) -> str:
    """What is shortened, of a run of this library's experiment."""
    known = {each.name for each in fields(Settings)}
    try:
        return Settings(**{key: value for key, value in settings.items() if key in known}).scale
    except (TypeError, ValueError):
        return ""


def machines(run: Run) -> list[str]:
    """Where it ran, as far as its folder says."""
    threads, machine = (run.grid.get(key) for key in ("threads", "machine"))
    unknown = "The run's folder does not say on which machine it was measured."
    found = [f"Measured on {machine}." if machine else unknown]
    return found + ([f"Threads per training: {_number(threads)}."] if threads else [])


def tiles(rounds: Sequence[Row], seconds: Sequence[Row]) -> list[Tile]:
    """The headline: smallest ticket as good as dense, best accuracy, early stop, time of a step, seconds in all.

    The step is that of the smallest ticket as good as dense; without one, of the last round. Means over trials.
    Times are over the faster of the whole net on the same kernels and w * mask; both are named. Iterations, seconds per
    step and seconds in all stand apart.
    """
    ticket = {row["round"]: row for row in rounds if row["control"] == TICKET}
    dense, pruned = ticket.get(0), [row for number, row in ticket.items() if number]
    if dense is None or not pruned:
        return []
    found = []
    accuracy, looked = "early_stop_test_accuracy", pruned[-1]
    if dense[accuracy] is not None:
        level, trained = dense[accuracy], [row for row in pruned if row[accuracy] is not None]
        if good := [row for row in trained if row[accuracy] >= level]:
            least = looked = min(good, key=lambda row: row["density"])
            detail = f"of the weights are enough: {_accuracy(least)} test accuracy; dense {_accuracy(dense)}"
            found.append(Tile("Matching ticket", f"{draw.percent(least['density'])} %", detail))
        if trained:
            best = max(trained, key=lambda row: row[accuracy])
            points = 100 * (best[accuracy] - level)
            detail = f"test accuracy at early stop over dense, with {_left(best)}"
            found.append(Tile("Most accurate ticket", f"{_signed(points)} pp", detail))
    if dense["early_stop_iteration"]:
        found.append(_early_stop(rounds, dense, pruned))
    sparse, whole, dense_step = (looked[key] for key in ("sparse_ms", "whole_ms", "dense_ms"))
    if sparse and whole and dense_step:
        ratio = min(whole, dense_step) / sparse
        word = f"{ratio:.1f}{draw.TIMES} faster" if ratio >= 1 else f"{1 / ratio:.1f}{draw.TIMES} slower"
        against = f"{whole:.3g} ms of the whole net by the same steps and {dense_step:.3g} ms as w * mask"
        found.append(Tile("Time per training step", word, f"{sparse:.3g} ms against {against}, with {_left(looked)}"))
    if seconds:
        last = seconds[-1]
        ours, whole, masked = (draw.seconds(last[f"{key}_seconds"]) for key in ("sparse", "whole", "dense"))
        share = last["saved_seconds"] / min(last["whole_seconds"], last["dense_seconds"])
        detail = f"{ours} of training steps against {whole} of the whole net in each round and {masked} as w * mask"
        found.append(
            Tile("Seconds of all rounds", f"{100 * abs(share):.0f} % {'less' if share >= 0 else 'more'}", detail)
        )
    return found


def _early_stop(rounds: Sequence[Row], dense: Row, pruned: Sequence[Row]) -> Tile:
    key = "early_stop_iteration"
    stopped = [row for row in pruned if row[key] is not None]
    first = min(stopped, key=lambda row: row[key])
    change = 1 - first[key] / dense[key]
    detail = f"{first[key]:,.0f} against {dense[key]:,.0f} of the dense net, with {_left(first)}"
    reinit = next((row for row in rounds if (row["control"], row["round"]) == ("reinit", first["round"])), None)
    if reinit and reinit[key] is not None:
        detail += f"; its reinit {reinit[key]:,.0f}"
    share = f"{100 * abs(change):.0f} %"
    word = "as many" if share == "0 %" else f"{share} {'fewer' if change > 0 else 'more'}"
    return Tile("Iterations to early stop", word, detail)


def _left(row: Row) -> str:
    return f"{draw.percent(row['density'])} % left"


def _accuracy(row: Row) -> str:
    return f"{100 * row['early_stop_test_accuracy']:.2f} %"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", draw.MINUS)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int | float) else str(value)
