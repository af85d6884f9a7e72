"""Which places are drawn."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from sparselottery.dynamic import choices


@given(st.integers(0, 60), st.data())
def test_random_places_are_free_and_different(total, data):
    taken = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, max(total - 1, 0)), max_size=total))), dtype=torch.int64
    )
    taken = taken[:total]
    k = data.draw(st.integers(0, total - len(taken)))
    pool = type("Pool", (), {"total": total})
    found = choices.at_random(pool, taken, k, torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).tolist()
    assert found == sorted(set(found))
    assert len(found) == k
    assert set(found) <= set(range(total)) - set(taken.tolist())


@pytest.mark.parametrize(("total", "k"), [(6, 2), (5, 4)])
def test_random_places_are_equally_likely(total, k):
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(total)
    for _ in range(3000):
        counts[choices.sample(total, k, generator)] += 1
    assert bool(((counts / 3000 - k / total).abs() < 0.04).all())
