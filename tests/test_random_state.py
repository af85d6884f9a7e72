from __future__ import annotations

import random

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
