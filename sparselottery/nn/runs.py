"""What a MaskedSequential saves: native calls, and activations rewritten for the kernels."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from torch import nn

from .base import MaskedLayer
from .executions import NATIVE
from .fuse import Group, groups, is_observed
from .linear import MaskedLinear
from .sequential import MaskedSequential, native_layer, rules, stays_batch_minor


def native_runs(model: nn.Module) -> list[list[nn.Module]]:
    """The children, two or more, of each MaskedSequential that are one native call in the present gradient mode."""
    runs = []
    for parent in model.modules():
        if type(parent) is MaskedSequential:
            children = list(parent._modules.values())
            values = [child.values.detach() for child in children if isinstance(child, MaskedLayer)]
            found = groups(children, rules(values[0])) if values else []
            runs += [group.children for group in found if isinstance(group, Group) and len(group.children) > 1]
    return runs


def count_packs(model: nn.Module) -> Counter[nn.Module]:
    """Whole activations and gradients that a training step rewrites in batch-minor layout, for each MaskedLinear.

    Kernels for single weights and for blocks (R, 1) read this layout. For them a layer's input is rewritten, forward,
    and the gradient of its output, backward, at each place that the layer has in the model. Between two layers of a
    MaskedSequential with only elementwise modules between them, both stay as they are (at batches of a multiple of 16,
    unless one ReLU is what is between). What the kernels compute those of the CPU write as the next reader takes it. A
    MaskedConv2d reads and writes ordinary images: on the CPU it rewrites no more than blocks that fit a cache.
    """
    packs: Counter[nn.Module] = Counter()
    for parent in (nn.ModuleList([model]), *model.modules()):
        children = list(parent._modules.values())
        linears = [i for i, child in enumerate(children) if isinstance(child, MaskedLinear)]
        linears = [i for i in linears if children[i].execution in (*NATIVE, "permuted")]
        for i in linears:
            packs[children[i]] += 2 * children[i].batch_minor
        if type(parent) is MaskedSequential:
            for i, after in pairwise(linears):
                native = native_layer(children[i]) and not is_observed(children[i])
                if native and stays_batch_minor(children[i], children[i + 1 :]):
                    packs[children[i]] -= children[i].batch_minor
                    packs[children[after]] -= children[after].batch_minor
    return packs
