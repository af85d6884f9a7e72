"""What a MaskedSequential saves: native calls, and activations rewritten for the kernels."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn

from .base import MaskedLayer
from .linear import MaskedLinear
from .sequential import MaskedSequential, _run_end, _sparse, _stays_batch_minor


def native_runs(model: nn.Module) -> list[list[nn.Module]]:
    """The children, two or more, of each MaskedSequential that are one native call in the present gradient mode."""
    runs = []
    for parent in model.modules():
        if type(parent) is MaskedSequential:
            children, start = list(parent._modules.values()), 0
            while start < len(children):
                child, stop = children[start], start + 1
                if isinstance(child, MaskedLayer):
                    stop = max(stop, _run_end(children, start, child.values.detach()))
                if stop > start + 1:
                    runs.append(children[start:stop])
                start = stop
    return runs


def count_packs(model: nn.Module) -> Counter[nn.Module]:
    """Of each sparse MaskedLinear: whole activations and gradients that a training step rewrites in batch-minor layout.

    At each place that the layer has in the model they are its input, forward, and the gradient of its output, backward.
    Between two layers of a MaskedSequential with only elementwise modules between them, both stay as they are (at
    batches of a multiple of 16, unless one ReLU is what is between). What the kernels compute they write as the next
    reader takes it. A MaskedConv2d reads and writes ordinary images: it rewrites no more than blocks that fit a cache.
    """
    packs: Counter[nn.Module] = Counter()
    for parent in (nn.ModuleList([model]), *model.modules()):
        children = list(parent._modules.values())
        linears = [i for i, child in enumerate(children) if isinstance(child, MaskedLinear)]
        linears = [i for i in linears if children[i].execution == "sparse"]
        for i in linears:
            packs[children[i]] += 2
        if type(parent) is MaskedSequential:
            for i, after in pairwise(linears):
                if _sparse(children[i], MaskedLinear) and _stays_batch_minor(children, i + 1):
                    packs[children[i]] -= 1
                    packs[children[after]] -= 1
    return packs
