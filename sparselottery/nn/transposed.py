"""MaskedTransposedLinear: the linear layer of GPT-2, whose dense weight is (in, out)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import MaskedLayer
from .linear import MaskedLinear


class _Conv1D:
    """transformers' Conv1D: imported when somebody asks for it, which has one then."""

    def __get__(self, layer: nn.Module | None, owner: type[nn.Module]) -> type[nn.Module]:
        from transformers.pytorch_utils import Conv1D

        return Conv1D


class MaskedTransposedLinear(MaskedLinear):
    """transformers' Conv1D over a fixed mask: y = x W + b, where only the surviving weights of W exist.

    Examples:
        >>> layer = MaskedTransposedLinear(nf=4, nx=8, mask=torch.rand(8, 4) < 0.5)
        >>> layer(torch.randn(5, 8)).shape
        torch.Size([5, 4])

    Its pattern is that of MaskedLinear, of Wᵀ (nf, nx), and so are its kernels; mask and dense weight are (nx, nf).

    Args:
        nf: features of y; nx: of x.
        mask: bool (nx, nf), by keyword, True where a weight survives; None keeps all of them.
    """

    dense_type = _Conv1D()
    arguments = ("nf", "nx")
    chooses_bias = False
    transposed = True

    def __init__(
        self,
        nf: int,
        nx: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        MaskedLayer.__init__(self)
        self.nf, self.nx = nf, nx
        self.in_features, self.out_features = nx, nf
        self._build(mask, True, device, dtype)

    def reset_parameters(self) -> None:
        """Initialise as the dense layer does."""
        nn.init.normal_(self.values, std=0.02)
        nn.init.zeros_(self.bias)
