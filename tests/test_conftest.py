"""The fixtures that other tests rely on do what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.mark.parametrize(
    "allocate",
    [
        lambda like: torch.empty(3, 2),
        lambda like: torch.empty((3, 2), dtype=torch.float64, requires_grad=True),
        lambda like: torch.empty_like(like),
        lambda like: torch.empty_strided((3, 2), (2, 1)),
        lambda like: like.new_empty(3, 2),
        lambda like: like.new_empty_strided((3, 2), (1, 3)),
        lambda like: nn.utils.skip_init(nn.Linear, 2, 3).weight,
    ],
)
def test_poison(poison, allocate):
    assert allocate(torch.zeros(3, 2)).isnan().all()


def test_poison_leaves_integers(poison):
    assert torch.empty(3, dtype=torch.int32).dtype == torch.int32


def test_convolutions_are_strict_and_can_be_asked(strict_convolutions):
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("_repeat", range(2))
def test_seeded(_repeat):
    expected = torch.rand(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(2), expected)
