"""All that decides a run's result, and the paper's values of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any

from ..pattern import BLOCKS
from . import data as data_sets
from .methods import METHODS
from .models import MODELS

RETRAIN = ("rewind", "continue", "fine-tune")
PRUNE_LAYERS = ("all", "conv", "fc")


def setting(
    default: Any,
    text: str,
    choices: tuple[str, ...] | None = None,
    least: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """A field of a settings dataclass: its metadata are the line that explains it and, if not everything is, what is
    allowed."""
    return field(default=default, metadata={"text": text, "choices": choices, "least": least, "below": below})


@dataclass(frozen=True)
class Settings:
    """All that decides a run's result. `preset` fills it in for each net; the defaults are Lenet's.

    Raises ValueError for a value that is not among those allowed.
    """

    data: str = setting(MISSING, "what to train on", data_sets.NAMES)
    rounds: int = setting(MISSING, "prunings", least=1)
    iterations: int = setting(MISSING, "of each training", least=1)
    eval_every: int = setting(MISSING, "iterations between evaluations", least=1)
    fraction: float = setting(0.2, "of the survivors, pruned per round in layers whose share is 1", least=0, below=1)
    batch: int = setting(60, "images per iteration", least=1)
    lr: float = setting(1.2e-3, "learning rate", least=0)
    seed: int = setting(0, "of the first weights and the data order")
    rewind_step: int = setting(0, "the survivors, or the schedule, go back to this iteration", least=0)
    one_shot: bool = setting(False, "prune once, to where all rounds would lead")
    retrain: str = setting(
        "rewind",
        "how a round goes on: rewind, survivors go back to their weights of the rewind step; continue, they keep "
        "theirs and the schedule goes back; fine-tune, they keep theirs and the last learning rate",
        RETRAIN,
    )
    model: str = setting("lenet-300-100", "the net", tuple(MODELS))
    optimizer: str = setting("adam", "of the training", ("adam", "sgd"))
    momentum: float = setting(0.9, "of sgd", least=0)
    weight_decay: float = setting(0.0, "of all parameters", least=0)
    dropout: float = setting(0.0, "share of the units dropped in training (Conv nets)", least=0, below=1)
    drops: tuple[float, ...] = setting((), "after these shares of the iterations the learning rate falls to a tenth")
    warmup: int = setting(0, "iterations until the learning rate is reached", least=0)
    augment: bool = setting(False, "flip and crop the training images")
    scope: str = setting("layer", "who competes: the weights of a layer, or of all layers", ("layer", "global"))
    prune_layers: str = setting("all", "prune convolutions only, or linear layers only", PRUNE_LAYERS)
    conv_share: float = setting(1.0, "of the fraction, in convolutions; 1x1 shortcuts stay whole", least=0)
    fc_share: float = setting(1.0, "of the fraction, in linear layers", least=0)
    output_share: float = setting(0.5, "of the fraction, in the output layer (paper App. G.4)", least=0)
    granularity: tuple[int, int] | str = setting(
        (1, 1),
        "blocks of rows (filters) x columns (channels at one tap) that are pruned whole, or rows, whole units; not of "
        "the output layer; "
        f"GPUs have kernels for {', '.join(f'{rows}x{columns}' for rows, columns in BLOCKS)}",
    )
    permute: bool = setting(
        False, "put rows and columns in the order in which the blocks that are pruned hold the least"
    )
    device: str = setting("cpu", "where to train", ("cpu", "cuda"))
    method: str = setting(
        "imp",
        "imp, a training for each round; or one training whose masks move until each layer has as many weights as all "
        "rounds would leave it: gmp, gradual magnitude pruning; set and rigl, sparse from the start; topk after each "
        "step; dsd, dense-sparse-dense; iht, sparse and dense by turns; single-cycle, pruned linearly",
        ("imp", *METHODS),
    )
    execution: str = setting(
        "kernels",
        "how pruned layers run: kernels, ours; measured, each as is fastest here, chosen once a round",
        ("kernels", "measured"),
    )

    def __post_init__(self) -> None:
        check(vars(self))
        if self.rewind_step >= self.iterations:
            raise ValueError(
                f"rewind_step: expected less than the {self.iterations} iterations, got {self.rewind_step}"
            )
        if self.permute and (self.granularity == "rows" or tuple(self.granularity) == (1, 1)):
            got = "rows" if self.granularity == "rows" else "1x1"
            raise ValueError(f"permute: expected a granularity with blocks, got {got}")
        rounds = {"one_shot": False, "retrain": "rewind", "rewind_step": 0, "scope": "layer", "granularity": (1, 1)}
        if self.method != "imp" and (wrong := [name for name, only in rounds.items() if getattr(self, name) != only]):
            raise ValueError(f"{wrong[0]}: expected {rounds[wrong[0]]!r} with the method {self.method}")

    @property
    def name(self) -> str:
        """``<data>-<model>-<hash>``. Defaults are left out of the hash, so a new option renames no old run."""
        return self.named({})

    def named(self, further: dict[str, Any]) -> str:
        """The same with ``further`` in the hash."""
        defaults = {each.name: each.default for each in fields(self) if each.default is not MISSING}
        chosen = {key: value for key, value in asdict(self).items() if key not in defaults or value != defaults[key]}
        digest = hashlib.sha256(json.dumps(chosen | further, sort_keys=True).encode()).hexdigest()
        return f"{self.data}-{self.model}-{digest[:8]}"

    @property
    def prunings(self) -> int:
        """How often the ladder prunes: not at all where the training does."""
        if self.method != "imp":
            return 0
        return 1 if self.one_shot else self.rounds

    def rate(self, share: float) -> float:
        """What each pruning removes of a layer's survivors, if it removes ``share`` of `fraction` per round."""
        rate = share * self.fraction
        return 1 - (1 - rate) ** self.rounds if self.one_shot else rate

    @property
    def scale(self) -> str:
        """How much shorter or longer the trainings are than the preset's, to be said beside results; else empty."""
        full = preset(self.data, self.model).iterations
        if self.iterations == full:
            return ""
        whose = "the preset's" if self.data == "digits" else "the paper's"
        return f"scale {self.iterations / full:.3g}: {self.iterations:,} of {whose} {full:,} iterations"


def check(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a value of a field of `Settings` that is not allowed, whatever the others are."""
    for each in (each for each in fields(Settings) if each.name in values):
        value, allowed = values[each.name], each.metadata
        if allowed["choices"] and value not in allowed["choices"]:
            raise ValueError(f"{each.name}: expected one of {', '.join(allowed['choices'])}, got {value!r}")
        if isinstance(value, Real) and not value >= allowed["least"]:
            raise ValueError(f"{each.name}: expected at least {allowed['least']}, got {value}")
        if isinstance(value, Real) and not value < allowed["below"]:
            raise ValueError(f"{each.name}: expected less than {allowed['below']}, got {value}")


# Paper Fig. 2, which leaves the number of rounds open: these end with 1 to 4 % of the weights.
LENET = Settings("mnist", rounds=16, iterations=50_000, eval_every=100)
CONV_NET = Settings("cifar10", rounds=20, iterations=20_000, eval_every=100, model="conv-2", lr=2e-4, conv_share=0.5)
DEEP_NET = Settings(
    "cifar10",
    rounds=16,
    iterations=30_000,
    eval_every=100,
    model="resnet-18",
    batch=128,
    optimizer="sgd",
    lr=0.1,
    weight_decay=1e-4,
    drops=(2 / 3, 5 / 6),
    augment=True,
    scope="global",
    fc_share=0.0,
    output_share=0.0,
)
VGG = replace(DEEP_NET, model="vgg-19", rounds=20, iterations=112_480, batch=64, drops=(1 / 2, 3 / 4))
PRESETS = {
    "lenet-300-100": LENET,
    "conv-2": CONV_NET,
    "conv-4": replace(CONV_NET, model="conv-4", iterations=25_000, lr=3e-4),
    "conv-6": replace(CONV_NET, model="conv-6", iterations=30_000, lr=3e-4, conv_share=0.75),
    "resnet-18": DEEP_NET,
    "resnet-18-warmup": replace(DEEP_NET, lr=0.03, warmup=20_000),
    "vgg-19": VGG,
    "vgg-19-warmup": replace(VGG, warmup=10_000),
}


def preset(data: str | None = None, model: str = "lenet-300-100", **changes: object) -> Settings:
    """The paper's settings for a net, and smaller ones for Lenet on the digits.

    ``model``: a key of `PRESETS`; those that end in "-warmup" are the paper's of section 5. ``data`` None: the digits
    for Lenet, CIFAR-10 for the others. Raises ValueError for an unknown net, for unknown data and for a net that does
    not take them.
    """
    if model not in PRESETS:
        raise ValueError(f"unknown model {model!r}: expected one of {', '.join(PRESETS)}")
    settings = PRESETS[model]
    takes = [name for name in data_sets.NAMES if (name == "cifar10") == (settings.data == "cifar10")]
    data = takes[0] if data is None else data
    if data not in takes:
        raise ValueError(f"{model}: expected data among {', '.join(takes)}, got {data!r}")
    small = {"rounds": 12, "iterations": 3000, "eval_every": 20} if data == "digits" else {}
    return replace(settings, **{"data": data, **small, **changes})


def scaled(settings: Settings, scale: float) -> Settings:
    """The same experiment, shorter: iterations, warm-up and rewind step times ``scale``, rounded.

    There are fewer evaluations, not denser ones: `eval_every` stays. Raises ValueError unless ``scale`` is positive.
    """
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    counts = {name: round(scale * getattr(settings, name)) for name in ("iterations", "warmup", "rewind_step")}
    return replace(settings, **counts)
