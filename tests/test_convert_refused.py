"""What convert, and others that take a model and masks, refuse: by names that say what was expected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparselottery import (
    MaskedLinear,
    Ticket,
    convert,
    dynamic,
    explain,
    export,
    load_sparse,
    param_groups,
    prune,
    set_masks,
    to_dense,
)


@pytest.mark.parametrize("masks", [None, [], "0.weight"])
def test_masks_that_are_no_mapping(masks):
    told = f"masks: expected a dict of masks by parameter name, got {type(masks).__name__}"
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=told):
        convert(model, masks)
    with pytest.raises(TypeError, match=told):
        set_masks(convert(model, prune(model, 0.5)), masks)


@pytest.mark.parametrize("name", [0, nn.ReLU()])
def test_names_that_are_none(name):
    with pytest.raises(TypeError, match=r"masks: expected names of parameters, as '0.weight' is, got "):
        convert(nn.Sequential(nn.Linear(4, 3)), {name: torch.ones(3, 4, dtype=torch.bool)})


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_masks_of_sparse_tensors(layout):
    """Some seem to have strides of zero: they were taken for one False."""
    mask = torch.rand(4, 8) > 0.5
    mask[0, 0] = False
    sparse, linear = getattr(mask, layout)(), nn.Linear(8, 4)
    model = nn.Sequential(linear)
    with pytest.raises(TypeError, match=r"masks\['0.weight'\]: expected an ordinary tensor, .* got torch.sparse_"):
        convert(model, {"0.weight": sparse})
    with pytest.raises(TypeError, match=r"masks\['0.weight'\]: expected an ordinary tensor"):
        prune(model, 0.5, {"0.weight": sparse})
    with pytest.raises(TypeError, match=r"masks\['0.weight'\]: expected an ordinary tensor"):
        set_masks(convert(model, prune(model, 0.5)), {"0.weight": sparse})
    with pytest.raises(TypeError, match="mask: expected an ordinary tensor"):
        MaskedLinear.from_dense(linear, sparse)


@pytest.mark.parametrize("model", [None, "x", nn.Linear, nn.Linear(4, 3).weight])
def test_what_is_no_model(model, tmp_path):
    dense = nn.Sequential(nn.Linear(4, 3))
    ticket = Ticket.from_model(convert(dense, prune(dense, 0.5)))
    export(ticket, tmp_path / "net.safetensors", format="safetensors")
    calls = [
        lambda: convert(model, {}),
        lambda: prune(model, 0.5),
        lambda: to_dense(model),
        lambda: explain(model),
        lambda: param_groups(model, weight_decay=0.1),
        lambda: Ticket.from_model(model),
        lambda: dynamic.gmp(model, None, 0.1, end=9),
    ]
    if model is not None:  # the ticket's own
        calls += [lambda: ticket.apply(model), lambda: load_sparse(tmp_path / "net.safetensors", model)]
    for call in calls:
        with pytest.raises(
            TypeError, match=r"model: expected an nn.Module, got (NoneType|str|the class Linear|Parameter)"
        ):
            call()
