"""What is promised of the GPU kernels, as conditions on the rows of results/<gpu>/gpu-<part>.csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean

OURS = "sparselottery"  # as convert chooses for an example; with _sparse, _block, ... that execution by force
_FORMATS = ("", "_channels_last")
DENSE = {
    "linear": ("nn_linear", "masked_dense"),
    "conv": tuple(f"{impl}{last}" for impl in ("nn_conv2d", "masked_dense") for last in _FORMATS),
    "step": tuple(f"{impl}{last}" for impl in ("dense", "masked_dense") for last in _FORMATS),
}
MEASURED = ("impl", "chosen", "ms", "speedup", "roofline", "graph", "rounds", "rejected")  # the others name the case


@dataclass(frozen=True)
class Bar:
    """In the cases of `part` that match `where`, the `statistic` of our speed-ups over the best dense is >= `least`."""

    what: str
    least: float
    part: str
    where: dict[str, Sequence] = field(default_factory=dict)
    statistic: Callable[[Sequence[float]], float] = geometric_mean

    def matches(self, part: str, case: Mapping) -> bool:
        return part == self.part and all(case[key] in values for key, values in self.where.items())


def _layers(what: str, part: str, least: Mapping[float, float], where: dict) -> list[Bar]:
    """A bar for each density."""
    return [
        Bar(f"{what}, {100 * (1 - density):.0f} % pruned", bar, part, {**where, "density": (density,)})
        for density, bar in least.items()
    ]


_LARGE = {"batch": (4096, 8192)}
_BLOCKS = {**_LARGE, "pattern": ("32x32", "64x1"), "dtype": ("bf16",)}
BARS = [
    *_layers("linear fp32, weights, forward + backward", "linear", {0.1: 2, 0.05: 4},
             {**_LARGE, "pattern": ("1x1",), "dtype": ("fp32",), "op": ("forward+backward",)}),
    *_layers("linear bf16, 32x32 and 64x1, forward", "linear", {0.1: 4, 0.2: 2}, {**_BLOCKS, "op": ("forward",)}),
    *_layers("linear bf16, 32x32 and 64x1, forward + backward", "linear", {0.1: 3, 0.2: 2},
             {**_BLOCKS, "op": ("forward+backward",)}),
    *_layers("linear bf16, weights, batch <= 16, forward", "linear", {0.1: 2.5},
             {"batch": (1, 16), "pattern": ("1x1",), "dtype": ("bf16",), "op": ("forward",)}),
    *(Bar(f"{part} as chosen, worst case", 0.97, part, statistic=min) for part in DENSE),
]  # fmt: skip
