"""MaskedEmbedding and MaskedEmbeddingBag: rows by CSR."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..pattern import Pattern
from .base import MaskedLayer

COPIED = "rows are copied, not multiplied"


class _Rows(MaskedLayer):
    """What takes rows of its weight (V, D)."""

    lacks = dict.fromkeys(("block", "compact"), COPIED)
    measurable = False
    chooses_bias = False
    bias: None

    def _begin(self, dense: nn.Embedding | nn.EmbeddingBag, device: Any, dtype: Any, mask: Tensor | None) -> None:
        """dense: with the arguments, on the meta device."""
        super().__init__()
        if why := self.why_not(dense):
            raise ValueError(f"{type(self).__name__}: {why}")
        for name in self.arguments:
            setattr(self, name, getattr(dense, name))
        self._build(mask, False, device, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense weight: (num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    def reset_parameters(self) -> None:
        """Initialise as the dense layer does: normal, and zeros in the row `padding_idx`."""
        nn.init.normal_(self.values)
        if self.padding_idx is not None and not self.values.is_meta:
            begin, end = self.crow_indices[self.padding_idx : self.padding_idx + 2].tolist()
            with torch.no_grad():
                self.values[begin:end] = 0

    @classmethod
    def why_not(cls, dense: nn.Module) -> str | None:
        if dense.max_norm is not None:
            return "its max_norm rewrites rows of the weight at each call"
        if dense.sparse:
            return "its gradient is a sparse tensor of the weight's shape: sparse=False has one of the survivors"
        return "its gradient is scaled by frequency" if dense.scale_grad_by_freq else None

    def _compile(self, pattern: Pattern, block: tuple[int, int]) -> Tensor:
        return self._no_plan()

    def _take(self, ids: Tensor) -> Tensor:
        indices = self.crow_indices, self.col_indices
        return ops.rows(ids, self.values, *indices, self.embedding_dim, self.padding_idx)


class MaskedEmbedding(_Rows):
    """nn.Embedding over a fixed mask: y = W[ids], where only the surviving weights of W exist.

    Examples:
        >>> layer = MaskedEmbedding(100, 16, mask=torch.rand(100, 16) < 0.5)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 16])

    Args:
        mask: bool (num_embeddings, embedding_dim), by keyword, True where a weight survives; None keeps all of them.
        all others: as in nn.Embedding; max_norm, scale_grad_by_freq and sparse are refused.
    """

    dense_type = nn.Embedding
    arguments = (
        "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
    )  # fmt: skip

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        given = num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        self._begin(nn.Embedding(*given, device="meta"), device, dtype, mask)

    def forward(self, input: Tensor) -> Tensor:
        """(*), int32 or int64 -> (*, embedding_dim)."""
        if ops.in_torch(input):
            return self._in_torch(input)
        self.check()
        return self._take(input) if self._present == "sparse" else self.multiply(self._dense_weight(), None, input)

    def multiply(self, weight: Tensor, bias: None, ids: Tensor) -> Tensor:
        return F.embedding(ids, weight, self.padding_idx)


class MaskedEmbeddingBag(_Rows):
    """nn.EmbeddingBag over a fixed mask: sums, means or maxima of rows.

    Examples:
        >>> layer = MaskedEmbeddingBag(100, 16, mode="sum", mask=torch.rand(100, 16) < 0.5)
        >>> layer(torch.tensor([[1, 2, 3], [4, 5, 6]])).shape
        torch.Size([2, 16])

    Args:
        mask: bool (num_embeddings, embedding_dim), by keyword, True where a weight survives; None keeps all of them.
        all others: as in nn.EmbeddingBag; max_norm, scale_grad_by_freq and sparse are refused.
    """

    dense_type = nn.EmbeddingBag
    arguments = (
        "num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse",
        "include_last_offset", "padding_idx",
    )  # fmt: skip

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        given = num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse
        more = {"include_last_offset": include_last_offset, "padding_idx": padding_idx}
        self._begin(nn.EmbeddingBag(*given, **more, device="meta"), device, dtype, mask)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """(B, L), or (N,) with offsets (B,) -> (B, embedding_dim)."""
        padded = self.padding_idx is not None  # of which torch fixes the number of rows, that of the batch
        if ops.in_torch(input) or (padded and torch.compiler.is_exporting()):
            return self._in_torch(input, offsets, per_sample_weights)
        self.check()
        if self._present != "sparse":
            return self.multiply(self._dense_weight(), None, input, offsets, per_sample_weights)
        rows, padding = self._take(input.flatten()), self.padding_idx
        places = torch.arange(rows.shape[0], dtype=input.dtype, device=input.device).view(input.shape)  # len() is fixed
        if padding is not None:  # a row more, for all that are padding
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            places, padding = places.masked_fill(input == padding, len(rows) - 1), len(rows) - 1
        return self._bags(rows, places, offsets, per_sample_weights, padding)

    def multiply(
        self,
        weight: Tensor,
        bias: None,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        return self._bags(weight, input, offsets, per_sample_weights, self.padding_idx)

    def _bags(self, weight, input, offsets, per_sample_weights, padding_idx):
        more = {"include_last_offset": self.include_last_offset, "padding_idx": padding_idx}
        return F.embedding_bag(input, weight, offsets, mode=self.mode, per_sample_weights=per_sample_weights, **more)
