"""An ONNX model of the dense layers, for any batch size that the model takes.

Weights are dense, zeros where pruned, or with `sparse_initializer` in ONNX's sparse format (COO, int64 indices).
Neither makes it run sparse: ONNX Runtime densifies sparse initializers when it loads them, and executes densely. The
file is smaller, no more. Needs the extra "export".
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calls import Arguments, others, outputs
from ..convert import to_dense
from .job import Job, close, difference, traced


def write(job: Job, path: Path) -> tuple[str, ...]:
    """Write the file; returns what of `sparse_initializer` and of other batch sizes was not possible."""
    import onnx

    dense = to_dense(job.model)
    if wrong := others(job.example(dense)):
        raise ValueError(f"model: expected one that returns tensors alone, as ONNX has no others, got {wrong[0]} too")

    def trace(example: Arguments, shapes: dict[str, Any] | None) -> Any:
        more = {"kwargs": example.kwargs, "dynamic_shapes": shapes}
        return torch.onnx.export(dense, example.args, **more, dynamo=True, verbose=False)

    with _quiet():
        program, notes = traced(trace, job, dense)
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    left = _sparsify(model, job.ticket.masks) if job.sparse_initializer else []
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return notes + tuple(f"{name}: stored densely, as the exporter changed or renamed it" for name in left)


def fault(job: Job, path: Path) -> str:
    """What is wrong with the file: ONNX Runtime must compute what the model computes, to rounding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = dict(zip(names, job.example.tensors(), strict=True))
    theirs = session.run(None, {name: each.numpy() for name, each in given.items()})
    with torch.no_grad():
        ours = outputs(job.example(job.model))
    theirs = [torch.from_numpy(each) for each in theirs]
    return "" if close(ours, theirs) else difference(ours, theirs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own parts."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _sparsify(model: Any, masks: dict[str, Tensor]) -> list[str]:
    """Store the initializers that are masked weights by their survivors; returns the names of weights that are none."""
    import onnx

    left = list(masks)
    for dense in [each for each in model.graph.initializer if each.name in masks]:
        mask = masks[dense.name]
        if tuple(dense.dims) != tuple(mask.shape) or not mask.any():
            continue
        left.remove(dense.name)
        positions = mask.flatten().nonzero().squeeze(1).numpy()
        values = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(dense).reshape(-1)[positions], dense.name)
        indices = onnx.numpy_helper.from_array(positions, f"{dense.name}_indices")
        model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, list(dense.dims)))
        model.graph.initializer.remove(dense)
    return left
