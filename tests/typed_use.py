"""What a user writes, for mypy --strict (test_typed.py). Nobody runs it. Each line names the type that it expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sparselottery as sl
from sparselottery import dynamic


def train(model: nn.Module) -> dict[str, Any]:
    return {"loss": 0.0}


def use(model: nn.Module, x: Tensor) -> None:
    masks = sl.prune(model, 0.9, granularity=(16, 16), rates={"head.*": 0.5})
    assert_type(masks, dict[str, Tensor])
    assert_type(sl.convert(model, masks, x), nn.Module)
    assert_type(sl.to_dense(model), nn.Module)
    assert_type(sl.fold(model), nn.Module)
    assert_type(sl.regroup(masks, (16, 16), refill=0.5).masks, dict[str, Tensor])
    assert_type(sl.explain(model), list[dict[str, Any]])
    assert_type(sl.info(), dict[str, str])
    ticket = sl.find_ticket(model, train, rounds=3, fraction=0.2, out="runs/mine")
    assert_type(ticket, sl.Ticket)
    ticket.save("ticket.safetensors")
    assert_type(sl.Ticket.load("ticket.safetensors").apply(), nn.Module)
    assert_type(ticket.density, float)
    layer = sl.MaskedLinear(4, 3, bias=False, mask=torch.ones(3, 4, dtype=torch.bool))
    assert_type(layer.density, float)
    assert_type(layer.mask, Tensor)
    assert_type(layer.nnz, int)
    net = sl.load_sparse("net.safetensors")
    assert_type(net, sl.SparseModel)
    optimizer = torch.optim.AdamW(sl.param_groups(model, weight_decay=0.1))
    sl.set_masks(model, masks, optimizer)
    updater = dynamic.rigl(model, optimizer, 0.1, end=100)
    assert_type(updater.step(), bool)
    assert_type(sl.masks_from_zeros(model), dict[str, Tensor])
