from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from sparselottery.random_state import random_state_kept


@pytest.mark.parametrize("error", [None, KeyError])
def test_every_generator_is_as_before(error):
    def numbers():
        return random.random(), np.random.rand(), float(torch.rand(()))

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = numbers()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    try:
        with random_state_kept():
            assert numbers() == expected
            if error:
                raise error
    except KeyError:
        pass
    assert numbers() == expected


def test_threads_read_and_write_the_states_one_at_a_time(monkeypatch):
    """Two that do at once can hang: torch takes its generator's mutex with and without the GIL."""
    inside, most, fork = [], [], torch.random.fork_rng

    def step(call, *args):
        inside.append(call)
        time.sleep(0.002)  # lets other threads run
        most.append(len(inside))
        call(*args)
        inside.pop()

    @contextmanager
    def watched(**options):
        kept = fork(**options)
        step(kept.__enter__)
        yield
        step(kept.__exit__, None, None, None)

    def keep(_):
        for _ in range(5):
            with random_state_kept():
                held.append(len(held))

    held = []
    monkeypatch.setattr(torch.random, "fork_rng", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(keep, range(4)))
    assert len(held) == 20
    assert set(most) == {1}
