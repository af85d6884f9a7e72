"""The lowest of many scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .pieces import count, divisible, spans

SAMPLE = 2**16  # scores, of which it is learnt where to look for the k-th smallest


def lowest(scores: Tensor, k: int) -> Tensor:
    """Bool (n,), True at exactly the k lowest of `scores` (n,); among equal scores the first by index. O(n) time."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if divisible(scores) and scores.dtype in (torch.float32, torch.float64):  # NumPy compares and selects faster
        return torch.from_numpy(_lowest(scores.numpy(), k))
    threshold = scores.kthvalue(k).values
    chosen = scores < threshold
    chosen[(scores == threshold).nonzero().squeeze(1)[: k - count(chosen)]] = True
    return chosen


def _lowest(scores: np.ndarray, k: int) -> np.ndarray:
    """As `lowest`, in one pass: the k-th is looked for only between two scores that a sample puts around it."""
    if len(scores) <= SAMPLE:
        threshold = np.partition(scores, k - 1)[k - 1]
        chosen = scores < threshold
        chosen[np.flatnonzero(scores == threshold)[: k - np.count_nonzero(chosen)]] = True
        return chosen
    sample = np.sort(scores[:: -(-len(scores) // SAMPLE)])
    rank, margin = k / len(scores) * len(sample), 4 * len(sample) ** 0.5  # eight standard deviations or more
    low = sample[int(rank - margin)] if rank >= margin else -np.inf
    high = sample[int(rank + margin)] if rank + margin < len(sample) else np.inf
    chosen, below, between = np.empty(len(scores), dtype=bool), 0, []
    for span in spans(len(scores)):
        part, lower = scores[span], chosen[span]
        np.less(part, low, out=lower)
        below += np.count_nonzero(lower)
        between.append(np.flatnonzero((part <= high) ^ lower) + span.start)
    places = np.concatenate(between)
    if not below < k <= below + len(places):  # the sample misled, as of scores in a repeated order
        chosen[:], below, places = False, 0, np.arange(len(scores))
    near = scores[places]
    threshold = np.partition(near, k - below - 1)[k - below - 1]
    lower = places[near < threshold]
    chosen[lower] = True
    chosen[places[near == threshold][: k - below - len(lower)]] = True
    return chosen
