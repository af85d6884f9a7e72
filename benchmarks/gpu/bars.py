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


def _linear(dtype: str, pattern: str, op: str, batches: Sequence[int], least: float) -> Bar:
    what = f"linear {dtype} {pattern}, batch {' and '.join(map(str, batches))}, {op}, 90 % pruned"
    where = {"batch": batches, "pattern": (pattern,), "dtype": (dtype,), "op": (op,), "density": (0.1,)}
    return Bar(what, least, "linear", where)


BOTH = "forward+backward"
_LARGE = (4096, 8192)
_PROMISED = [
    ("fp32", "1x1", BOTH, _LARGE, 2),
    ("fp32", "64x64", BOTH, _LARGE, 6),
    ("fp32", "64x64", "forward", _LARGE, 6),
    ("bf16", "64x64", "forward", _LARGE, 2.8),
    ("bf16", "64x64", BOTH, _LARGE, 2.2),
    ("bf16", "128x128", "forward", _LARGE, 4.5),
    ("bf16", "64x1", "forward", _LARGE, 2),
    ("bf16", "1x1", "forward", (1,), 2.5),
    ("bf16", "1x1", "forward", (16,), 2.2),
    ("bf16", "1x1", "forward", (64,), 1.2),
]  # of nn.Linear with 90 % pruned
BARS = [
    *(_linear(*promise) for promise in _PROMISED),
    *(Bar(f"{part} as chosen, worst case", 0.97, part, statistic=min) for part in DENSE),
]
