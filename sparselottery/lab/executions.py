"""How masked layers run in an experiment: chosen by timing once for each set of masks, and kept with the run.

Another execution sums in another order. So whoever trains these masks again, after a kill or beside the ladder, must
run them as the first did, whatever a new measurement would say.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..calls import ExampleInput
from ..convert import masks_of
from ..execution import choose_execution
from ..files import digest, read_json, write_json
from ..nn import MaskedLayer


def settle(model: nn.Module, example_input: ExampleInput, folder: Path) -> dict[str, str]:
    """Set the execution of every masked layer of ``model``, and return them by the layers' names.

    They are those that a file of ``folder`` has for these masks; if none does, those that `choose_execution` finds, and
    the file is written. Raises ValueError for a damaged file and for an execution that is not possible on this device.
    """
    masks = {name: mask.cpu() for name, mask in masks_of(model).items()}
    path = folder / f"{digest({}, masks)[:16]}.json"
    layers = {name: each for name, each in model.named_modules() if isinstance(each, MaskedLayer) and each.density < 1}
    if path.exists():
        kept = read_json(path)
        if kept.keys() != layers.keys():
            raise ValueError(f"{path}: expected the executions of {list(layers)}, got those of {list(kept)}")
        for name, layer in layers.items():
            layer.execution = kept[name]
        return kept
    choose_execution(model, example_input)
    chosen = {name: layer.execution for name, layer in layers.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, chosen)
    return chosen
