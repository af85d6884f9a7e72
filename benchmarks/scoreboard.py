"""The project's score, out of the committed rows of all machines: `python -m benchmarks.scoreboard`.

It writes docs/scoreboard.md: seconds and milliseconds that a user waits for, each beside what torch takes for the same,
with the date of the rows, the commit in which they came, and the command that takes them again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scoreboard.md"
PYTEST = "pytest benchmarks/test_bench_{}.py --benchmark-only"
HEAD = """# Scoreboard

What a user waits for, by machine. "Times faster" is over the fastest of those beside ours. Each row is of a committed
file, and its command takes it again. `python -m benchmarks.scoreboard` writes this page.
"""
WHOLE = "the whole net, same steps"
Measured = tuple[float, ...]  # ours, then the baselines'


@dataclass(frozen=True)
class Score:
    """One figure, over the fastest of its baselines. measured: None where the file does not have it."""

    what: str
    unit: str
    baselines: tuple[str, ...]
    file: str
    command: str
    measured: Callable[[Sequence[dict]], Measured | None]


def ladder(iterations: int) -> Callable[[Sequence[dict]], Measured | None]:
    """Seconds of all rounds of the first trial, evaluations included, if its trainings have so many iterations.

    Ours; as many trainings of the whole net as round 0's, which is by our steps; and w * mask.
    """

    def measured(rows: Sequence[dict]) -> Measured | None:
        parts = ("train_seconds", "eval_seconds")
        first = [row for row in rows if row["trial"] == rows[0]["trial"] and row["iterations"] == iterations]
        ours, masked = ([sum(row[f"{kind}_{part}"] for part in parts) for row in first] for kind in ("sparse", "dense"))
        return (sum(ours), len(ours) * ours[0], sum(masked)) if first else None

    return measured


def case(*baselines: str | Sequence[str], **where: object) -> Callable[[Sequence[dict]], Measured | None]:
    """Milliseconds of one case, and those of each of `baselines`: of the fastest, where it is several."""

    def measured(rows: Sequence[dict]) -> Measured | None:
        ms = {row["impl"]: row["ms"] for row in rows if all(row[key] == value for key, value in where.items())}
        named = [[each] if isinstance(each, str) else each for each in baselines]
        found = [[ms[name] for name in names if name in ms] for names in named]
        return (ms[results.OURS], *map(min, found)) if all(found) else None

    return measured


BOTH = {"op": "forward+backward"}
RUNTIMES = ("dense", "dense_channels_last", "dense_compiled", "onnxruntime", "openvino", "mnn", "mnn_sparse")
SCORES = [
    Score(
        "Lenet-300-100 on MNIST: 17 trainings of 1,500 iterations, with evaluations",
        "seconds",
        (WHOLE, "w * mask"),
        "imp-mnist",
        "python -m benchmarks.imp_mnist --rounds 16 --iterations 1500 --no-reinit",
        ladder(1500),
    ),
    Score(
        "Conv-2 on CIFAR-10 (JPEG-recompressed): 17 trainings of 10 iterations, with evaluations in proportion",
        "seconds",
        (WHOLE, "w * mask"),
        "imp-cifar10",
        "python -m benchmarks.imp_mnist --model conv-2 --rounds 16 --iterations 10 --eval-every 5 --evaluated 750 "
        "--no-reinit",
        ladder(10),
    ),
    Score(
        "A training step of VGG-19 at 5 %, batch 64",
        "ms",
        ("the better w * mask",),
        "conv_step",
        PYTEST.format("conv_step"),
        case(("masked_dense", "masked_dense_channels_last"), net="vgg-19", density=0.05),
    ),
    Score(
        "A training step of 784-2048-2048-10 at 5 %, batch 256",
        "ms",
        ("the unpruned net", "w * mask"),
        "mlp_step",
        PYTEST.format("mlp_step"),
        case("dense", "masked_dense", net="mlp-2048", density=0.05),
    ),
    Score(
        "A layer of 512 x 1024 -> 1024 at 10 %, forward + backward",
        "ms",
        ("nn.Linear",),
        "linear",
        PYTEST.format("linear"),
        case("nn_linear", **BOTH, batch=512, in_features=1024, density=0.1),
    ),
    Score(
        "A 3x3 convolution at 10 %, 128 images of 128 channels, 16x16, forward + backward",
        "ms",
        ("the better nn.Conv2d",),
        "conv",
        PYTEST.format("conv"),
        case(
            ("nn_conv2d", "nn_conv2d_channels_last"), **BOTH,
            layout="nchw", batch=128, channels=128, kernel=3, stride=1, density=0.1,
        ),
    ),
    Score(
        "ViT-B/16 of four layers at 10 %, batch 4, forward + backward",
        "ms",
        ("dense",),
        "vit",
        PYTEST.format("vit"),
        case("dense", **BOTH),
    ),
    Score(
        "784-2048-2048-10 at 5 %, frozen, batch 1",
        "ms",
        ("the best runtime",),
        "inference",
        PYTEST.format("inference"),
        case(RUNTIMES, net="mlp-2048", batch=1),
    ),
    Score(
        "Lenet-300-100 at 3.6 %, frozen, batch 1",
        "ms",
        ("the best runtime",),
        "inference",
        PYTEST.format("inference"),
        case(RUNTIMES, net="lenet-300-100", batch=1),
    ),
]  # fmt: skip


def commit_of(path: Path) -> str:
    """The commit in which the file changed last, shortened."""
    command = ["git", "-C", str(path.parent), "log", "-1", "--format=%h", "--", path.name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def page(folders: Sequence[Path], commit: Callable[[Path], str]) -> str:
    return HEAD + "".join(_section(score, folders, commit) for score in SCORES)


def _section(score: Score, folders: Sequence[Path], commit: Callable[[Path], str]) -> str:
    lines = "".join(_lines(score, folders, commit))
    titles = ("machine", score.unit, *score.baselines, "times faster", "measured", "commit")
    head = f"| {' | '.join(titles)} |\n|{'-|' * len(titles)}\n"
    return f"\n## {score.what}\n\n`{score.command}`\n\n{head}{lines}"


def _lines(score: Score, folders: Sequence[Path], commit: Callable[[Path], str]) -> Iterator[str]:
    for folder in folders:
        path = folder / f"{score.file}.csv"
        if not path.exists():
            continue
        head, rows = results.read(path)
        if found := score.measured(rows):
            ours, *theirs = found
            link = f"../benchmarks/results/{folder.name}/{path.name}"
            machine = head["machine"].partition(" cores")[0].rpartition(",")[0]
            numbers = f"{' | '.join(map(_short, found))} | {min(theirs) / ours:.1f}"
            yield f"| [{machine}]({link}) | {numbers} | {head['date']} | {commit(path)} |\n"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    results.replace(PAGE, page(results.folders([]), commit_of))
    print(PAGE)
