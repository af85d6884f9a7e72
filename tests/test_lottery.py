"""`find_ticket` (`prune`: test_prune.py). Run as a program, this file is `kill_everywhere`, for its last test."""

import json
import os
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparselottery
from sparselottery import convert
from sparselottery.convert import dense_state, masks_of
from sparselottery.lottery import find_ticket
from sparselottery.pruning import prune
from sparselottery.ticket import Ticket

STEPS, ROUNDS = 4, 3


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 3))


def train(model, start=0, stop=None, on_step=lambda: None):
    """Adam with weight decay on data from the global generators; whatever could revive a pruned weight is on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(STEPS if stop is None else stop):
        x = torch.randn(16, 8) + random.random() + np.random.rand()
        if step < start:
            continue
        on_step()
        optimizer.zero_grad()
        F.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
    return {"loss": 0.5}


def no_training(model, start=0, stop=None):
    return None


def run(out=None, **changes):
    return find_ticket(net(), **{"train": train, "rounds": ROUNDS, "fraction": 0.3, "out": out, **changes})


def rounds_of(folder):
    return [Ticket.load(path) for path in sorted(Path(folder).glob("round-*.safetensors"))]


def off_mask(ticket):
    return sum(int(ticket.weights[name][~mask].count_nonzero()) for name, mask in ticket.masks.items())


def test_the_ticket_is_the_initial_weights_at_a_mask_that_training_chose(tmp_path):
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ticket = find_ticket(model, train, rounds=ROUNDS, fraction=0.3, out=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, tensor in before.items():
        expected = tensor.masked_fill(~ticket.masks[name], 0) if name in ticket.masks else tensor
        assert torch.equal(ticket.weights[name], expected)
    rounds = rounds_of(tmp_path)
    assert len(rounds) == ROUNDS + 1
    for earlier, later in pairwise(rounds):
        expected = prune(earlier.apply(model), 0.3)
        assert all(torch.equal(later.masks[name], mask) for name, mask in expected.items())
    assert all(torch.equal(ticket.masks[name], mask) for name, mask in rounds[-1].masks.items())
    assert Ticket.load(tmp_path / "ticket.safetensors").same(ticket)
    assert not torch.equal(ticket.masks["0.weight"], prune(model, 1 - ticket.density)["0.weight"])


def test_pruned_weights_stay_pruned_under_momentum_and_weight_decay(tmp_path):
    run(tmp_path)
    rounds = rounds_of(tmp_path)
    assert [ticket.nnz for ticket in rounds] == [132, 92, 64, 45]  # round(0.3 * n) of each layer at a time
    assert [off_mask(ticket) for ticket in rounds] == [0] * 4
    for earlier, later in pairwise(rounds):
        assert all(not (mask & ~earlier.masks[name]).any() for name, mask in later.masks.items())


def test_every_round_starts_from_the_same_state_and_random_state():
    starts, draws, models = [], [], []

    def spy(model):
        starts.append(dense_state(model))
        models.append(model)
        draws.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
        masks = masks_of(model)
        for name, tensor in starts[-1].items():
            expected = starts[0][name].masked_fill(~masks[name], 0) if name in masks else starts[0][name]
            assert torch.equal(tensor, expected)
        assert not any(parameter.grad is not None for parameter in model.parameters())
        train(model)
        assert not torch.equal(dense_state(model)["1.running_mean"], starts[0]["1.running_mean"])

    run(train=spy)
    assert len(starts) == ROUNDS + 1
    assert len({id(model) for model in models}) == ROUNDS + 1
    assert draws == [draws[0]] * len(draws)


def test_the_callers_random_state_is_left_alone_but_for_one_draw():
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    model = net()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    find_ticket(model, train, rounds=1)
    after = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    torch.randint(2**32, ())
    assert draw() == after


def test_the_callers_seed_decides_the_run():
    def seeded(seed):
        model = net()
        torch.manual_seed(seed)
        return find_ticket(model, train, rounds=1)

    assert seeded(1).same(seeded(1))
    assert not seeded(1).same(seeded(2))


def test_rewinding_goes_back_to_step_k(tmp_path):
    calls, starts = [], []

    def spy(model, start, stop):
        calls.append((start, stop))
        starts.append(dense_state(model))
        return train(model, start, stop)

    ticket = run(tmp_path, train=spy, rewind_step=2)
    assert calls == [(0, 2)] + [(2, None)] * (ROUNDS + 1)
    theta = Ticket.load(tmp_path / "theta.safetensors")
    torch.manual_seed(0)
    early = rounds_of(tmp_path)[0].apply(net())
    early.load_state_dict(starts[0])
    random.seed(ticket.recipe["seed"])
    np.random.seed(ticket.recipe["seed"])
    torch.manual_seed(ticket.recipe["seed"])
    train(early, 0, 2)
    assert Ticket.from_model(early, theta.recipe).same(theta)
    assert Ticket(theta.weights, ticket.masks, ticket.recipe).same(ticket)
    assert torch.equal(starts[1]["0.weight"], theta.weights["0.weight"])
    assert torch.equal(starts[-1]["1.running_var"], theta.weights["1.running_var"])


def test_continued_training_resets_only_at_the_end(tmp_path):
    starts = []

    def spy(model):
        starts.append(dense_state(model))
        return train(model)

    ticket = run(tmp_path, train=spy, reset=False)
    rounds = rounds_of(tmp_path)
    for before, after, start in zip(rounds, rounds[1:], starts[1:], strict=False):
        expected = Ticket(before.weights, after.masks, {})
        assert Ticket(start, after.masks, {}).same(expected)
    theta = Ticket.load(tmp_path / "theta.safetensors")
    assert Ticket(theta.weights, ticket.masks, ticket.recipe).same(ticket)


def test_one_shot_is_one_round():
    ticket = run(rounds=1, fraction=0.9)
    assert ticket.nnz == 132 - round(0.9 * 96) - round(0.9 * 36)


def test_a_converted_model_is_pruned_further():
    model = net()
    half = prune(model, 0.5)
    ticket = find_ticket(convert(model, half), train, rounds=1, fraction=0.5)
    assert ticket.nnz == 24 + 9
    assert all(not (mask & ~half[name]).any() for name, mask in ticket.masks.items())


def test_how_to_prune_is_passed_on():
    ticket = run(rounds=1, rates={"0.weight": 0.25}, output_fraction=0.5)
    assert ticket.nnz == 72 + 18
    assert run(rounds=1, ignore=["0.weight"]).masks["0.weight"].all()
    scaled = net()
    with torch.no_grad():
        scaled[4].weight.mul_(1e-3)
    ticket = find_ticket(scaled, no_training, rounds=1, fraction=35 / 132, scope="global")
    assert int(ticket.masks["4.weight"].sum()) == 1


def test_records(tmp_path):
    records = []
    run(tmp_path, rounds=2, on_round=records.append)
    assert [record["round"] for record in records] == [0, 1, 2]
    assert [record["nnz"] for record in records] == [132, 92, 64]
    for record in records:
        assert record["density"] == record["nnz"] / 132
        assert record["total"] == 132
        assert record["loss"] == 0.5
        assert record["seconds"] > 0
        assert json.loads((tmp_path / f"round-0{record['round']}.json").read_text()) == record
    found = []
    run(tmp_path, rounds=2, on_round=found.append, train=pytest.fail)
    assert found == records


def test_the_recipe_says_how(tmp_path):
    recipe = run(tmp_path, rounds=1, output_fraction=0.1, settings={"lr": 0.05}).recipe
    assert recipe["settings"] == {"lr": 0.05}
    assert recipe["output_fraction"] == 0.1
    assert recipe["rounds"] == 1
    assert recipe["layers"] == {"0.weight": [12, 8], "4.weight": [3, 12]}


# resume


def test_a_folder_changes_nothing_and_is_only_trained_once(tmp_path):
    ticket = run(tmp_path / "run")
    assert run().same(ticket)
    torch.manual_seed(99)  # theta_0, the masks and the seed come from the folder, not from what is given now
    again = find_ticket(net(seed=5), pytest.fail, rounds=ROUNDS, fraction=0.3, out=tmp_path / "run")
    assert again.same(ticket)


def test_more_rounds_go_on_from_a_finished_run(tmp_path):
    run(tmp_path, rounds=1)
    assert run(tmp_path, rounds=ROUNDS).same(run())
    assert run(tmp_path, rounds=1, train=pytest.fail).same(run(rounds=1))


def test_interrupted_between_the_weights_and_the_record(tmp_path):
    ticket = run(tmp_path)
    (tmp_path / "round-03.safetensors").unlink()
    assert run(tmp_path).same(ticket)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.2}, r"settings.json .*fraction: expected 0\.3, got 0\.2"),
        ({"settings": {"lr": 0.1, "data": "x"}}, r"settings\.lr: expected 0\.05, got 0\.1$"),
        ({"rates": {"0.*": 0.1}}, "rates"),
        ({"ignore": ["0.*"]}, r"ignore: expected \[\], got \['0\.\*'\]"),
        ({"rewind_step": 1}, "rewind_step: expected 0, got 1"),
        ({"reset": False}, "reset: expected True, got False"),
        ({"model": nn.Linear(8, 3)}, r"layers\.0\.weight: expected \[12, 8\], got None"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    arguments = {"settings": {"lr": 0.05, "data": "x"}, "train": no_training, "rounds": 1, "fraction": 0.3}
    find_ticket(net(), **arguments, out=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=message):
        find_ticket(**{"model": net(), **arguments, **changes}, out=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["settings.json", "theta.safetensors", "round-01.safetensors", "round-01.json"])
def test_damaged_files_are_named(tmp_path, name):
    run(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    with pytest.raises(ValueError, match=name):
        run(tmp_path, train=pytest.fail)


def test_settings_of_something_else(tmp_path):
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rounds": -1}, ValueError, "rounds: expected at least 0, got -1"),
        ({"rounds": 1.5}, TypeError, r"rounds: expected an int, got 1\.5"),
        ({"rewind_step": -1}, ValueError, "rewind_step: expected at least 0"),
        ({"fraction": 1}, ValueError, "fraction: expected"),
        ({"rates": {"typo": 0.1}}, ValueError, "'typo', which matches none"),
        ({"settings": {"lr": torch.ones(1)}}, TypeError, "settings: expected JSON-able"),
        ({"model": nn.ReLU()}, ValueError, "expected at least one layer that can be masked"),
        ({"train": None}, TypeError, "train: expected a function that trains a model, got NoneType"),
        ({"retrain": "x"}, TypeError, "retrain: expected a function or None, got str"),
        ({"on_round": "x"}, TypeError, "on_round: expected a function or None, got str"),
        ({"out": f"{__file__}/run"}, OSError, "out: expected a folder that can be made, got .*: Not a directory"),
    ],
)
def test_arguments_are_refused_before_any_training(tmp_path, changes, error, message):
    arguments = {"model": net(), "train": pytest.fail, "rounds": 1, "out": tmp_path / "run", **changes}
    with pytest.raises(error, match=message):
        find_ticket(**arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([1], ValueError, r"train: expected None or a mapping .*got \[1\]"),
        ({"density": 1}, ValueError, "train: expected None or a mapping without .*'density'"),
        ({"loss": torch.ones(1)}, TypeError, "train: expected JSON-able"),
    ],
)
@pytest.mark.parametrize("rewind_step", [0, 2])
def test_what_train_may_not_return_loses_no_training(tmp_path, result, error, message, rewind_step):
    calls = []

    def training(model, **steps):
        calls.append(steps)
        train(model, **steps)
        return result if len(calls) == 1 else None

    with pytest.raises(error, match=message):
        run(tmp_path, train=training, rewind_step=rewind_step)
    trainings = ROUNDS + 1 + bool(rewind_step)
    ticket = run(tmp_path, train=training, rewind_step=rewind_step)
    assert len(calls) == trainings
    assert ticket.same(run(rewind_step=rewind_step))


def test_numbers_of_other_libraries_are_recorded(tmp_path):
    numbers = {"a": np.float32(0.5), "b": torch.tensor(2), "c": [np.int64(3), np.bool_(True)], "d": np.array(0.25)}
    records = []
    run(tmp_path, train=lambda model: numbers, rounds=1, on_round=records.append)
    for record in records:
        assert [record[key] for key in "abcd"] == [0.5, 2, [3, True], 0.25]
    assert json.loads((tmp_path / "round-00.json").read_text())["c"] == [3, True]


def test_training_may_not_alter_the_masks():
    def revive(model):
        whole = convert(model, {name: torch.ones_like(mask) for name, mask in masks_of(model).items()})
        model.load_state_dict(whole.state_dict())

    with pytest.raises(ValueError, match="altered them"):
        run(train=revive)


def kill_everywhere(folder):
    """Run once for each step of training and each file that is written, dead by SIGKILL at that point."""
    torch.optim.AdamW([torch.zeros(1)])  # imports a lot, once here instead of in every child
    events, real_replace = [0], os.replace
    last = -1

    def event():
        if events[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)
        events[0] += 1

    def replace(source, target):
        event()
        real_replace(source, target)

    os.replace = replace
    for last in range(10_000):
        child = os.fork()
        if child == 0:
            run(folder / str(last), train=lambda model, start, stop: train(model, start, stop, event), rewind_step=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_anywhere_a_run_goes_on_as_if_nothing_had_happened(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(sparselottery.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, tmp_path / "killed"], check=True, env=env, timeout=200)
    torch.set_num_threads(1)
    expected = run(tmp_path / "whole", rewind_step=2)
    runs = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    writes, steps = 2 + 2 * (ROUNDS + 1) + 1, 2 + 2 * (ROUNDS + 1)
    assert len(runs) == writes + steps + 1  # the last was not killed
    for index, folder in enumerate(runs):
        done, trainings = len(rounds_of(folder)), []

        def spy(model, start, stop, trainings=trainings):
            trainings.append(start)
            return train(model, start, stop)

        assert run(folder, train=spy, rewind_step=2).same(expected), index
        assert trainings.count(2) == ROUNDS + 1 - done, index  # nothing done is done again
        for resumed, whole in zip(rounds_of(folder), rounds_of(tmp_path / "whole"), strict=True):
            assert resumed.same(whole), index


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_everywhere(Path(sys.argv[1]))
