"""Masks of two processes, which see different data, stay the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import torch
import torch.distributed.nn  # before there is a group: its defaults would hold it
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from sparselottery import convert, dynamic, ranks
from sparselottery.convert import dense_state, masks_of

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
for how in ({}, {"grow": "random"}, {"candidates": 3.0}, {"grow": "momentum"}, {"distribution": "global"}):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    model = convert(model, {"0.weight": torch.ones(16, 8).bool(), "2.weight": torch.ones(4, 16).bool()})
    torch.manual_seed(rank)
    x = torch.randn(6, 8, dtype=torch.float64)
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    updater = dynamic.rigl(replica, optimizer, 0.3, end=9, every=2, seed=rank, **how)
    first = masks_of(model)
    for step in range(1, 8):
        optimizer.zero_grad()
        ((replica(x) - 1).square().mean() * (float("inf") if rank and step == 4 else 1)).backward()
        if step != 4:
            optimizer.step()
        updated = updater.step()
        put_off = "grow" not in how  # by what one process has seen
        assert updated == (step in ((2, 5, 6) if put_off else (2, 4, 6))), (how, step, updated)
    everywhere = [None, None]
    distributed.all_gather_object(everywhere, (masks_of(model), dense_state(model)))
    for one, other in zip(*everywhere):
        assert all(torch.equal(one[name], other[name]) for name in one), how
    assert any(not torch.equal(mask, first[name]) for name, mask in masks_of(model).items())
del replica, updater
ranks.leave()  # of threads that would free tensors while Python ends
"""


def test_two_processes_have_the_same_masks(tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    told = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
