"""Dense layers of all kinds that can be masked, each with inputs. Small, in fp64."""

from __future__ import annotations

import torch
from torch import nn


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def of_bags(**more):
    weights = None if more.get("mode") in ("mean", "max") else images(3, 5)
    return nn.EmbeddingBag(11, 6, **more), (torch.randint(11, (3, 5)), None, weights)


def attends(*features, **more):
    """Queries of 8 features, keys and values of those given, or all three the same tensor."""
    kdim, vdim = features or (8, 8)
    attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=vdim, batch_first=True, **more)
    x = images(2, 5, 8)
    return attention, (images(2, 4, 8), images(2, 5, kdim), images(2, 5, vdim)) if features else (x, x, x)


def remembers(itself):
    """Queries, and a memory that is keys and values; or keys beside queries that are the values."""
    x, memory = images(2, 4, 8), images(2, 4, 8)
    return nn.MultiheadAttention(8, 2, batch_first=True), (x, memory, x if itself else memory)


LAYERS = {
    "Conv1d": lambda: (nn.Conv1d(3, 6, 3, padding=1), (images(2, 3, 11),)),
    "Conv1d, unbatched": lambda: (nn.Conv1d(3, 6, 3), (images(3, 11),)),
    "Conv1d in groups": lambda: (nn.Conv1d(6, 4, 3, 2, 2, 2, groups=2, bias=False), (images(2, 6, 11),)),
    "Conv1d, same": lambda: (nn.Conv1d(3, 6, 3, padding="same", dilation=2), (images(2, 3, 11),)),
    "Conv1d, circular": lambda: (nn.Conv1d(3, 6, 3, padding=2, padding_mode="circular"), (images(2, 3, 11),)),
    "Conv3d": lambda: (nn.Conv3d(3, 4, (3, 2, 1), padding=1), (images(2, 3, 4, 3, 5),)),
    "Conv3d, same": lambda: (
        nn.Conv3d(3, 4, 3, padding="same", padding_mode="replicate"), (images(2, 3, 4, 3, 5),),
    ),
    "Conv3d, circular": lambda: (nn.Conv3d(4, 4, 3, 2, 1, 1, 2, True, "circular"), (images(4, 4, 3, 5),)),
    "ConvTranspose1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (images(2, 4, 7),)),
    "ConvTranspose1d, unbatched": lambda: (nn.ConvTranspose1d(4, 6, 4, 2, 1, dilation=3), (images(4, 7),)),
    "ConvTranspose1d to a size": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, 1, bias=False), (images(2, 4, 7), [14])),
    "ConvTranspose1d padded beyond": lambda: (nn.ConvTranspose1d(4, 6, 3, 1, 0, 1, dilation=2), (images(2, 4, 5),)),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False), (images(2, 4, 5, 3),)),
    "ConvTranspose2d to a size": lambda: (nn.ConvTranspose2d(4, 6, 3, 2, 1), (images(2, 4, 5, 3), [10, 6])),
    "ConvTranspose2d in groups": lambda: (
        nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), 1, 0, 2, True, 2), (images(4, 5, 3),),
    ),
    "ConvTranspose2d padded beyond": lambda: (nn.ConvTranspose2d(4, 6, 3, 1, 0, 1, dilation=2), (images(2, 4, 5, 3),)),
    "ConvTranspose2d 1x1": lambda: (nn.ConvTranspose2d(4, 6, 1, 2, 0, 1), (images(2, 4, 5, 3),)),
    "ConvTranspose3d": lambda: (nn.ConvTranspose3d(4, 6, 3, 2, 1, 0, 1, True, 2), (images(2, 4, 3, 2, 4),)),
    "Bilinear": lambda: (nn.Bilinear(3, 4, 5), (images(2, 3), images(2, 4))),
    "Embedding": lambda: (nn.Embedding(11, 6), (torch.randint(11, (3, 5)),)),
    "Embedding, padded": lambda: (nn.Embedding(11, 6, padding_idx=-9), (torch.tensor([[2, 1, 2], [7, 0, 10]]),)),
    "EmbeddingBag": lambda: of_bags(mode="sum", padding_idx=3),
    "EmbeddingBag, means": lambda: of_bags(mode="mean"),
    "EmbeddingBag, offsets": lambda: (
        nn.EmbeddingBag(11, 6, mode="max", include_last_offset=True),
        (torch.randint(11, (9,)), torch.tensor([0, 3, 3, 7, 9])),
    ),
    "MultiheadAttention": attends,
    "MultiheadAttention across": lambda: attends(8, 8, bias=False),
    "MultiheadAttention of a memory": lambda: remembers(False),
    "MultiheadAttention of itself and keys": lambda: remembers(True),
    "MultiheadAttention of others": lambda: attends(5, 6, add_bias_kv=True, add_zero_attn=True),
}  # fmt: skip
