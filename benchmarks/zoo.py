"""What becomes of the architectures that people bring: `python -m benchmarks.zoo [--only TEXT]` writes zoo.csv.

Each net is tiny, in float64, pruned by 60 % and converted. It is held against the dense net with zeros where it was
pruned: share of its weights that can be pruned, logits, a step of training, files. A cell is "right", or says why not.
"""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import results
from benchmarks.zoo_models import CASES
from sparselottery import convert, export, load_sparse, prune
from sparselottery.convert import masked_layers
from sparselottery.survey import survey

PRUNED, CLOSE = 0.6, 1e-10
FORMATS = ("npz", "torch-csr", "dense", "onnx", "pt2")
RIGHT = "right"


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of whatever a model returns, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if hasattr(output, "values") else output if isinstance(output, list | tuple) else ()
    return [each for value in values for each in tensors_of(value)]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest number that there is, or to 1."""
    if [each.shape for each in ours] != [each.shape for each in theirs]:
        raise ValueError(f"shapes: {[tuple(each.shape) for each in ours]}")
    pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[0].numel()]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)


class Case:
    """One architecture: the converted net and the dense one, and what they are called with."""

    def __init__(self, make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
        torch.manual_seed(0)
        model, inputs = make()
        self.model = model.double().eval()
        self.args = tuple(value for name, value in inputs.items() if name.startswith("_"))
        self.kwargs = {name: value for name, value in inputs.items() if not name.startswith("_")}
        self.masks = prune(self.model, PRUNED)
        self.dense = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.dense.get_parameter(name).mul_(mask)
        self.sparse = convert(self.model, self.masks)
        self.expected = self.outputs(self.dense)

    @property
    def example(self) -> tuple | dict[str, Any]:
        return self.args or self.kwargs

    def outputs(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(model(*self.args, **self.kwargs))

    def logits(self) -> float:
        return apart(self.outputs(self.sparse), self.expected)

    def step(self) -> float:
        """How far the outputs are apart after a step of SGD, the dense net's gradients masked."""
        for model in (self.sparse, self.dense):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            sum(each.square().mean() for each in tensors_of(model(*self.args, **self.kwargs))).backward()
            for name, mask in self.masks.items() if model is self.dense else ():
                if (gradient := model.get_parameter(name).grad) is not None:
                    gradient.mul_(mask)
            optimizer.step()
        return apart(self.outputs(self.sparse), self.outputs(self.dense))

    def loaded(self, folder: Path) -> float:
        path = folder / "net.safetensors"
        export(self.sparse, path, format="safetensors")
        return apart(self.outputs(load_sparse(path, self.model)), self.expected)

    def exported(self, form: str, folder: Path) -> float:
        """`export` itself reads the file back and compares; in float32 where a runtime knows little else."""
        example = {"example_input": self.example} if form in ("onnx", "pt2") else {}
        model = self.sparse
        if form == "onnx":
            model, example = copy.deepcopy(model).float(), tree_map(_single, example)
        export(model, folder / f"net.{form}", format=form, **example)
        return 0.0


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def told(measure: Callable[[], float]) -> str:
    try:
        difference = measure()
    except Exception as error:
        plain = re.sub(r"\x1b\[\d*m", "", str(error))  # some are coloured
        return f"{type(error).__name__}: {next(iter(plain.splitlines()), '')}"[:160]
    return RIGHT if difference <= CLOSE else f"{difference:.1e} apart"


def row(name: str, make: Callable[[], tuple[nn.Module, dict[str, Any]]], formats: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"net": name}
    try:
        case = Case(make)
    except Exception as error:
        return found | {"logits": f"{type(error).__name__}: {error}"[:160]}
    seen = survey(case.model)
    reasons = dict.fromkeys(why for why in seen.refused.values())
    found["share"] = round(seen.share, 4)
    found["layers"] = len(masked_layers(case.sparse))
    found["logits"] = told(case.logits)
    with tempfile.TemporaryDirectory() as folder:
        found["load_sparse"] = told(lambda: case.loaded(Path(folder)))
        for form in formats:
            found[form] = told(lambda form=form: case.exported(form, Path(folder)))
    found["step"] = told(case.step)
    found["kept_dense"] = "; ".join(reasons)[:300]
    return found


def rows(only: str, formats: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for name, make in CASES.items():
        if only.lower() in name.lower():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = row(name, make, formats)
            print(*found.values(), sep="  ", flush=True)
            yield found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that contain it, no matter the case; nothing is written")
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    chosen = parser.parse_args()
    table = list(rows(chosen.only, tuple(chosen.formats)))
    if not chosen.only:
        columns = ["net", "share", "layers", "logits", "step", "load_sparse", *chosen.formats, "kept_dense"]
        results.write(results.FOLDER / "zoo.csv", table, columns)
