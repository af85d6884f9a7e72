from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparselottery.lab.augment import MOVES, OFFSETS, PAD, flip_and_crop, random_moves


def test_every_move_is_a_flip_and_a_crop_of_the_padded_image():
    images = torch.rand(MOVES, 3, 5, 7)
    moved = flip_and_crop(images, torch.arange(MOVES))
    expected = []
    for move, image in enumerate(images):
        flip, top, left = move // OFFSETS**2, move // OFFSETS % OFFSETS, move % OFFSETS
        crop = F.pad(image, (PAD,) * 4)[:, top : top + 5, left : left + 7]
        expected.append(crop.flip(2) if flip else crop)
    assert moved.is_contiguous()
    assert torch.equal(moved, torch.stack(expected))


def test_the_middle_crop_is_the_image():
    images = torch.rand(2, 3, 32, 32)
    middle = PAD * OFFSETS + PAD
    assert torch.equal(flip_and_crop(images, torch.tensor([middle, middle])), images)


def test_moves_follow_from_the_generator_and_all_of_them_come():
    first, same, other = (random_moves(5000, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.unique().tolist() == list(range(MOVES))
    assert MOVES == 162


def test_vectors_cannot_be_cropped():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\).*\(2, 784\)"):
        flip_and_crop(torch.zeros(2, 784), torch.zeros(2, dtype=torch.long))
