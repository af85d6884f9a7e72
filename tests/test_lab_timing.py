from __future__ import annotations

import pytest

from sparselottery.lab import timing


def test_linear_ms():
    row = timing.linear_ms(4, 8, 6, 0.5)
    assert list(row) == ["forward_sparse_ms", "forward_dense_ms", "both_sparse_ms", "both_dense_ms"]
    assert min(row.values()) > 0


def test_linear_ms_without_a_weight():
    assert min(timing.linear_ms(4, 8, 6, 0).values()) > 0


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_linear_ms_of_no_density(density):
    with pytest.raises(ValueError, match="density"):
        timing.linear_ms(4, 8, 6, density)
