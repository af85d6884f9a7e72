"""Two processes on the CPU, by gloo, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist

from sparselottery import dynamic, prune, ranks
from sparselottery.cli import main
from sparselottery.convert import convert, dense_state, to_dense
from sparselottery.lab import distributed
from sparselottery.lab.controls import reinit
from sparselottery.lab.data import Dataset
from sparselottery.lab.models import lenet_300_100, resnet_18
from sparselottery.lab.training import train
from sparselottery.lottery import find_ticket
from sparselottery.ticket import Ticket

PROCESSES = 2
HOW = {"iterations": 30, "batch": 20, "lr": 1e-2, "eval_every": 10}


@pytest.fixture(autouse=True)
def _one_thread(_reproducible):
    """As in each of the processes."""
    torch.set_num_threads(1)


def clouds(shape: tuple[int, ...] = (12,)) -> Dataset:
    """Four Gaussian clouds; the last image of an odd number of them goes to the first process."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(121) % 4
    x = torch.randn(121, *shape, generator=generator)
    x.view(121, -1)[:, :4] += 6 * F.one_hot(y, 4)
    return Dataset("clouds", 4, x[:80], y[:80], x[80:101], y[80:101], x[101:], y[101:])


def masked(factory, density: float = 0.3):
    model = reinit(factory, 0)
    return convert(model, prune(model, 1 - density))


def lenet(density: float = 0.3):
    return masked(partial(lenet_300_100, 12, 4, hidden=(16, 8)), density)


def without_survivors():
    model = reinit(partial(lenet_300_100, 12, 4, hidden=(16, 8)), 0)
    masks = prune(model, 0.5)
    return convert(model, masks | {"fc2.weight": torch.zeros_like(masks["fc2.weight"])})


def resnet():
    return masked(partial(resnet_18, (2, 8, 8), 4, widths=(2, 3, 4)))


CASES = {
    "adam": (lenet, (12,), HOW),
    "sgd": (lenet, (12,), {**HOW, "optimizer": "sgd", "weight_decay": 0.01}),
    "whole": (partial(lenet, 1.0), (12,), HOW),
    "without survivors": (without_survivors, (12,), HOW),
    "batchnorm": (resnet, (2, 8, 8), {**HOW, "augment": True}),
}
MOVING = {
    "gmp": lambda m, o: dynamic.gmp(m, o, 0.3, end=20, every=4),
    "rigl": lambda m, o: dynamic.rigl(m, o, 0.3, end=20, every=4),
}
CASES |= {name: (partial(lenet, 1.0), (12,), {**HOW, "moves": moves}) for name, moves in MOVING.items()}


def on_clouds(model) -> dict:
    return train(model, clouds(), **HOW)


def never(model) -> None:
    raise AssertionError("expected every round to be found done")


def work(rank: int, folder: Path) -> None:
    """What each of the processes does: every case, its record and weights kept."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    for name, (make, shape, how) in CASES.items():
        model = make()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(rank)  # what the first process begins with counts
        record = train(model, clouds(shape), **how)
        torch.save(dense_state(model), folder / f"{name}-{rank}.pt")
        (folder / f"{name}-{rank}.json").write_text(json.dumps(record))
    found = find_ticket(lenet(), on_clouds, rounds=2, out=folder / "run", settings={})
    again = find_ticket(lenet(), never, rounds=2, out=folder / "run", settings={})
    found.save(folder / f"found-{rank}.safetensors")
    assert again.same(found)
    with pytest.raises(ValueError, match="batch: expected a multiple of the 2 processes, got 21"):
        train(lenet(), clouds(), **{**HOW, "batch": 21})
    dist.barrier()
    ranks.leave()
    assert not [name for name in threads() if "gloo" in name], "threads that free tensors while Python ends"


def threads() -> list[str]:
    """The names of this process's threads, where Linux tells them."""
    return [(task / "comm").read_text() for task in Path("/proc/self/task").glob("*")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder with what two processes have made of the cases."""
    folder = tmp_path_factory.mktemp("trained")
    torch.multiprocessing.spawn(work, (folder,), nprocs=PROCESSES)
    return folder


def outcome(folder: Path, name: str, rank: int = 0) -> tuple[dict, dict]:
    record = json.loads((folder / f"{name}-{rank}.json").read_text())
    return record, torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_all_processes_end_with_the_same_net(trained, name):
    (first, weights), (second, others) = (outcome(trained, name, rank) for rank in range(PROCESSES))
    assert first["curves"] == second["curves"]
    assert first["early_stop_iteration"] == second["early_stop_iteration"]
    for key, tensor in weights.items():
        assert torch.equal(tensor, others[key]), key


@pytest.mark.parametrize("name", ["adam", "sgd", "whole", *MOVING])
def test_it_is_the_net_of_one_process(trained, name):
    make, shape, how = CASES[name]
    model = make()
    before = dense_state(model)
    alone = train(model, clouds(shape), **how)
    together, weights = outcome(trained, name)
    for key, tensor in dense_state(model).items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(tensor, before[key])
    for curve, values in alone["curves"].items():
        assert together["curves"][curve] == pytest.approx(values, rel=1e-3, abs=1e-4), curve
    assert alone["final_test_accuracy"] > alone["curves"]["test_accuracy"][0]
    assert "allreduce_bytes" not in alone


@pytest.mark.parametrize("name", [name for name in CASES if name not in MOVING])
def test_the_bytes_of_a_step_are_those_of_the_survivors_and_biases(trained, name):
    torch.manual_seed(0)
    model, (record, _) = CASES[name][0](), outcome(trained, name)
    assert record["allreduce_bytes"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    dense = 4 * sum(parameter.numel() for parameter in to_dense(model).parameters())
    assert record["dense_allreduce_bytes"] == dense
    assert (record["allreduce_bytes"] < dense) == (name != "whole")


def test_fewer_bytes_are_sent_as_masks_are_pruned(trained):
    _, weights = outcome(trained, "gmp")
    whole = 4 * sum(tensor.numel() for tensor in weights.values())
    for name in MOVING:
        assert outcome(trained, name)[0]["allreduce_bytes"] < 0.8 * whole
        assert outcome(trained, name)[0]["dense_allreduce_bytes"] == whole
        matrices = [tensor for tensor in outcome(trained, name)[1].values() if tensor.dim() > 1]
        survivors = sum(int(tensor.count_nonzero()) for tensor in matrices)
        assert survivors <= 0.3 * sum(tensor.numel() for tensor in matrices) + 1


def test_batchnorm_statistics_are_learnt_from_all_images(trained):
    _, weights = outcome(trained, "batchnorm")
    make, shape, how = CASES["batchnorm"]
    model = make()
    before = dense_state(model)
    train(model, clouds(shape), **how)
    alone = dense_state(model)
    moved = (alone["norm.running_mean"] - before["norm.running_mean"]).abs().max().item()
    torch.testing.assert_close(weights["norm.running_mean"], alone["norm.running_mean"], rtol=0, atol=0.2 * moved)


def test_one_process_is_left_alone(monkeypatch):
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    model = lenet()
    with distributed.from_environment() as rank:
        assert (rank, ranks.size()) == (0, 1)
        assert distributed.replica(model) is model
        assert distributed.share(7) == slice(0, None, 1)
        assert distributed.mean((0.5, 2.0), 3) == (0.5, 2.0)


def test_the_folder_of_a_run_has_one_writer_and_serves_all(trained):
    tickets = [Ticket.load(trained / f"found-{rank}.safetensors") for rank in range(PROCESSES)]
    assert tickets[0].same(tickets[1])
    assert tickets[0].same(Ticket.load(trained / "run" / "ticket.safetensors"))
    assert find_ticket(lenet(), never, rounds=2, out=trained / "run", settings={}).same(tickets[0])


def test_torchrun_finds_the_ticket_that_one_process_finds(tmp_path, capsys):
    options = {"data": "digits", "rounds": 1, "iterations": 60, "eval-every": 20, "batch": 32, "lr": 0.005}
    options["seed"] = 2  # no weight is so near to being pruned that another rounding decides
    arguments = ["find", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "sparselottery", *arguments, "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert done.stdout.count("ticket:") == capsys.readouterr().out.count("ticket:") == 1
    (two,) = (tmp_path / "two").iterdir()
    one = tmp_path / "one" / two.name  # the same settings
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    dense = 4 * (300 * 64 + 300 * 100 + 1000 + 410)
    for number in range(2):
        ours, alone = (json.loads((each / f"round-{number:02d}.json").read_text()) for each in (two, one))
        assert ours["curves"]["val_loss"] == pytest.approx(alone["curves"]["val_loss"], rel=1e-3)
        assert ours["final_test_accuracy"] == pytest.approx(alone["final_test_accuracy"], abs=0.01)
        assert 4 * (ours["nnz"] + 410) == ours["allreduce_bytes"] <= ours["dense_allreduce_bytes"] == dense
    tickets = [Ticket.load(each / "ticket.safetensors") for each in (two, one)]
    for name, mask in tickets[0].masks.items():
        assert (mask == tickets[1].masks[name]).float().mean() > 0.99
