"""torch's encoders kept from its dense fast path, which reads the weights of their layers and never calls these.

A `Weight` alone keeps it away, but torch.compile sees plain tensors, and an nn.TransformerEncoder asks its first layer
only, then gives nested tensors to all of them.
"""

from __future__ import annotations

from torch import nn

from .weight import WeightedLayer


class MaskedEncoderLayer(nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer that always calls its layers."""

    activation_relu_or_gelu = property(lambda self: 0)  # what torch asks before it takes the fast path


class MaskedEncoder(nn.TransformerEncoder):
    """nn.TransformerEncoder that never makes nested tensors."""

    use_nested_tensor = property(lambda self: False)


MASKED = {nn.TransformerEncoderLayer: MaskedEncoderLayer, nn.TransformerEncoder: MaskedEncoder}


def keep_from_fast_path(model: nn.Module) -> None:
    """Encoders with masked or frozen layers in them become those of `MASKED`, all others torch's own."""
    for module in model.modules():
        for dense, masked in MASKED.items():
            if type(module) in (dense, masked):
                sparse = any(isinstance(each, WeightedLayer) for each in module.modules())
                module.__class__ = masked if sparse else dense
