"""The latency and throughput of a ticket or export, against what else runs the same net dense on this machine."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calls import Arguments, ExampleInput, arguments, others, outputs
from .convert import to_dense
from .files import atomic
from .runtime import load_sparse
from .ticket import Ticket

OURS = "sparselottery"
LEAST = 20  # calls that are timed
WARM_UP = 5  # calls before those
LINGER = 0.01  # seconds before those: threads of the candidate before spin for 8 ms, then sleep
TURN = 0.05  # seconds that a candidate runs before the next one's turn
TOLERANCE = 1e-3  # relative to the norm of what dense torch computes

Call = Callable[[], Any]
Maker = Callable[[nn.Module, ExampleInput], Call]  # an example is as of `calls.arguments`


def bench_model(
    path: str | os.PathLike[str],
    batches: Sequence[int] = (1, 64),
    shape: Sequence[int] | None = None,
    seconds: float = 3.0,
    *,
    model: nn.Module | None = None,
    example_input: ExampleInput | None = None,
) -> list[dict[str, Any]]:
    """A row for each batch size and way to run the file's net in fp32, with torch's number of threads.

    shape: of one input; None for that of the recipe or, of nets that begin with a linear layer, its in_features.
    model: for a file that knows no architecture, a model of it; on the meta device too.
    example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments, in place of `shape`: what
    the net is called with, its samples repeated to each batch size.
    seconds: of calls for each way and batch. A row has batch, impl, median_ms, p99_ms, items_per_s and speedup (that
    of `sparselottery` over it: above 1 where sparse is faster); of what is not installed here, a `note` and no times.
    Raises OSError or ValueError as `load_sparse`, ValueError for a shape that is not known, given twice or not one that
    the net takes, RuntimeError if ways differ in what they compute.
    """
    if shape and example_input is not None:
        raise ValueError("shape: expected none beside an example_input, got both")
    ticket = Ticket.load(path)
    dense = to_dense(ticket.apply(model)).float().eval().requires_grad_(False)
    if example_input is None:
        example_input = torch.randn(1, *(shape or _input_shape(ticket, dense)))
    example = arguments(example_input).map(lambda each: each.float() if each.is_floating_point() else each)
    try:
        _call(dense, example)()
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"shape, example_input: expected an input that the net takes; it says: {error}") from error
    sparse, rows = load_sparse(path, model), []
    for batch in batches:
        given = example.with_batch(batch)
        calls, notes = {OURS: _call(sparse, given)}, {}
        for name, make in MAKERS.items():
            made = _made(make, dense, given)
            (notes if isinstance(made, str) else calls)[name] = made
        check(calls)
        times = latencies(calls, seconds)
        ours = float(np.median(times[OURS]))
        for name in (OURS, *MAKERS):
            row = {
                "batch": batch,
                "impl": name,
                "median_ms": None,
                "p99_ms": None,
                "items_per_s": None,
                "speedup": None,
            }
            if name in times:
                median, p99 = (float(np.percentile(times[name], q)) for q in (50, 99))
                row |= {"median_ms": 1e3 * median, "p99_ms": 1e3 * p99}
                row |= {"items_per_s": batch / median, "speedup": median / ours}
            rows.append(row | {"note": notes.get(name, "")})
    return rows


def latencies(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """Seconds of single calls, about `seconds` of them each; candidates take turns, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    while any(sum(each) < seconds or len(each) < LEAST for each in times.values()):
        for name, call in calls.items():
            if sum(times[name]) >= seconds and len(times[name]) >= LEAST:
                continue
            least = WARM_UP if len(times[name]) < LEAST else 2  # calls: caches hold what the others have left
            _samples(call, LINGER, least)
            times[name] += _samples(call, TURN)
    return times


def _samples(call: Call, seconds: float, least: int = 1) -> list[float]:
    """Seconds of single calls, for so long and at least so many."""
    times: list[float] = []
    spent = 0.0
    while spent < seconds or len(times) < least:
        began = perf_counter()
        call()
        times.append(perf_counter() - began)
        spent += times[-1]
    return times


def check(calls: dict[str, Call]) -> None:
    """Raise RuntimeError unless all compute the same, to TOLERANCE of each output."""
    results = {name: [each.double() for each in _outputs(call())] for name, call in calls.items()}
    expected = results["torch"]
    for name, result in results.items():
        if len(result) != len(expected):
            raise RuntimeError(f"{name}: expected {len(expected)} outputs, as torch has, got {len(result)}")
        for ours, theirs in zip(result, expected, strict=True):
            error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)) if theirs.numel() else 0.0
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{name}: expected the result of torch, got one that differs by {error:.3g} of its norm"
                )


def _outputs(result: Any) -> list[Tensor]:
    """The tensors of a result, of torch or of NumPy."""
    if isinstance(result, np.ndarray):
        return [torch.from_numpy(result)]
    if isinstance(result, list):
        return [each for part in result for each in _outputs(part)]
    return outputs(result)


def _call(model: nn.Module, given: Arguments) -> Call:
    return partial(model, *given.args, **given.kwargs)


def torch_dense(model: nn.Module, example: ExampleInput) -> Call:
    return torch.no_grad()(_call(model, arguments(example)))


def torch_compile(model: nn.Module, example: ExampleInput) -> Call:
    """Inductor, its weights packed as constants, max-autotune."""
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=False)
    call = torch.no_grad()(_call(compiled, arguments(example)))
    with torch._inductor.config.patch(freezing=True, max_autotune=True), _quiet():
        call()
    return call


def onnxruntime_dense(model: nn.Module, example: ExampleInput) -> Call:
    """ONNX Runtime on the dense weights, its inputs and outputs bound once."""
    import onnxruntime

    given = arguments(example)
    if wrong := others(given(model)):
        raise ValueError(f"ONNX has tensors alone, the model returns {wrong[0]} too")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with onnx_file(model, example) as file:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    results = [each.contiguous().numpy() for each in outputs(given(model))]
    for x, taken in zip(given.tensors(), session.get_inputs(), strict=True):
        binding.bind_cpu_input(taken.name, x.contiguous().numpy())
    for y, made in zip(results, session.get_outputs(), strict=True):
        binding.bind_output(made.name, "cpu", 0, y.dtype, y.shape, y.ctypes.data)

    def run() -> list[np.ndarray]:
        session.run_with_iobinding(binding)
        return results

    return run


@contextlib.contextmanager
def onnx_file(model: nn.Module, example: ExampleInput):
    """The path of the model in ONNX, for inputs of these shapes; gone afterwards."""
    given = arguments(example)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, given.args, file, kwargs=given.kwargs, dynamo=True, verbose=False)
        yield file


MAKERS: dict[str, Maker] = {
    "torch": torch_dense,
    "torch.compile": torch_compile,
    "ONNX Runtime": onnxruntime_dense,
}
NEEDS = {"ONNX Runtime": ("onnx", "onnxscript", "onnxruntime")}


def _made(make: Maker, model: nn.Module, example: ExampleInput) -> Call | str:
    """The call, or why there is none here."""
    name = next(name for name, each in MAKERS.items() if each is make)
    if missing := [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]:
        return f"not installed: {', '.join(missing)}"
    if make is torch_dense:
        return make(model, example)
    try:
        return make(model, example)
    except Exception as error:  # no C++ compiler, first of all; exporters raise whatever their parts do
        does = "does not compile here" if make is torch_compile else "cannot run it"
        return f"{does}: {' '.join(str(error.__cause__ or error).split())[:80]}"


def _input_shape(ticket: Ticket, dense: nn.Module) -> Sequence[int]:
    settings = ticket.recipe.get("settings")
    if isinstance(settings, dict) and "shape" in settings:
        return settings["shape"]
    first = next((m for m in dense.modules() if not isinstance(m, nn.Sequential)), None)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    raise ValueError(
        "shape: expected that of one input, as --shape C,H,W gives it, got none: the file does not tell it"
    )


@contextlib.contextmanager
def _quiet():
    """Without the warnings and the chatter of exporters and compilers."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


def write_bench(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """The rows as table.csv and, where matplotlib is installed, as plot.svg; what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "table.csv"]
    with atomic(files[0]) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    if importlib.util.find_spec("matplotlib"):
        files.append(folder / "plot.svg")
        _plot(rows, files[1])
    return files


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["median_ms"] is not None]
    batches = list(dict.fromkeys(row["batch"] for row in timed))
    figure = Figure(figsize=(4 * len(batches), 3), layout="constrained")
    for batch, axes in zip(batches, np.atleast_1d(figure.subplots(1, len(batches))), strict=True):
        here = [row for row in timed if row["batch"] == batch][::-1]
        names, medians = [row["impl"] for row in here], [row["median_ms"] for row in here]
        beyond = [row["p99_ms"] - row["median_ms"] for row in here]
        axes.barh(names, medians, xerr=[[0] * len(here), beyond], color=["C1" if n == OURS else "C0" for n in names])
        axes.set(title=f"batch {batch}", xlabel="ms, median and p99")
    with atomic(file) as temporary:
        figure.savefig(temporary, format="svg")
