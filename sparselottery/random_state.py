"""The state of every global random generator."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# Threads that read or write the state of torch's generator at once can wait for each other for ever: one has its mutex
# and needs the GIL, another has the GIL and needs the mutex.
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Every global generator (torch, `random`, numpy) is afterwards as it was before."""
    torch_kept = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with _ONE_AT_A_TIME:
        python, numpy = random.getstate(), np.random.get_state()
        torch_kept.__enter__()
    try:
        yield
    finally:
        with _ONE_AT_A_TIME:
            torch_kept.__exit__(None, None, None)
            random.setstate(python)
            np.random.set_state(numpy)


def random_states() -> tuple[Any, ...]:
    """Of every global generator on the CPU: equal if nothing was drawn between."""
    with _ONE_AT_A_TIME:
        kind, words, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), random.getstate(), (kind, words.tolist(), *rest)


def seed_all(seed: int) -> None:
    """Seed every global generator."""
    for seed_one in (random.seed, np.random.seed, torch.manual_seed):
        seed_one(seed)
