"""MaskedMultiheadAttention: nn.MultiheadAttention over linear layers that can be masked."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .opened import OpenedModule, linear_of
from .thirds import gives_thirds, thirds

_APART = ("q_proj", "k_proj", "v_proj")  # where keys or values have other features than queries


class MaskedMultiheadAttention(OpenedModule, nn.MultiheadAttention):
    """nn.MultiheadAttention in which layers `in_proj` and `out_proj` hold the weights, each masked or dense.

    Examples:
        >>> attention = nn.MultiheadAttention(16, 2, batch_first=True)
        >>> sparse = convert(attention, prune(attention, 0.8))
        >>> x = torch.randn(3, 5, 16)
        >>> sparse(x, x, x)[0].shape
        torch.Size([3, 5, 16])

    Axes: L targets, S sources, N batch, E features, H heads, D = E / H. Where keys or values have other features,
    `q_proj`, `k_proj` and `v_proj` stand for `in_proj`. Of queries that are not the keys too, `in_proj` computes E of
    its 3 E features; but all of them where it is observed, compiled or traced, or multiplies by blocks.

    All arguments are those of nn.MultiheadAttention; `convert` makes one with masks.
    """

    dense_type = nn.MultiheadAttention

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(vars(self.of(nn.MultiheadAttention(*args, **kwargs))))

    @property
    def dense_names(self) -> dict[str, str]:
        if self._qkv_same_embed_dim:
            return {"in_proj.weight": "in_proj_weight", "in_proj.bias": "in_proj_bias"}
        return {f"{name}.weight": f"{name}_weight" for name in _APART}

    @property
    def in_proj_weight(self) -> Tensor | None:
        return self.in_proj.weight if self._qkv_same_embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        return self.in_proj.bias if self._qkv_same_embed_dim else self._parameters["in_proj_bias"]

    def _open(self, dense: nn.MultiheadAttention) -> None:
        names = ("in_proj",) if self._qkv_same_embed_dim else _APART
        for name in ("in_proj", *_APART):
            self._parameters.pop(f"{name}_weight", None)
        bias = self._parameters.pop("in_proj_bias") if self._qkv_same_embed_dim else None
        out_proj = linear_of(dense.out_proj.weight, dense.out_proj.bias)
        layers = {name: linear_of(getattr(dense, f"{name}_weight"), bias) for name in names}
        vars(self)["_modules"] = {**layers, "out_proj": out_proj}

    def _close(self, dense: nn.MultiheadAttention, layers: dict[str, nn.Module]) -> None:
        rest = dict(dense._parameters)
        dense._parameters.clear()  # so that all stand in the dense module's order
        for name in ("in_proj", *_APART):
            dense.register_parameter(f"{name}_weight", layers[name].weight if name in layers else None)
        if self._qkv_same_embed_dim:
            dense.register_parameter("in_proj_bias", layers["in_proj"].bias)
        dense._parameters.update(rest)
        given = layers["out_proj"]
        bias = given.bias is not None
        out_proj = NonDynamicallyQuantizableLinear(self.embed_dim, self.embed_dim, bias, device="meta")
        vars(out_proj)["_parameters"] = dict(given._parameters)
        vars(dense)["_modules"] = {"out_proj": out_proj.train(self.training)}

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """(*, E) each."""
        if not self._qkv_same_embed_dim:
            inputs = zip(_APART, (query, key, value), strict=True)
            projected = [self._modules[name](x) for name, x in inputs]
            bias = self.in_proj_bias
            return projected if bias is None else [x + b for x, b in zip(projected, bias.chunk(3), strict=True)]
        inputs = query, key, value
        if any(x is not query for x in inputs) and gives_thirds(self.in_proj, query):
            return thirds(self.in_proj, inputs)
        found = {id(x): self.in_proj(x).chunk(3, dim=-1) for x in {id(x): x for x in inputs}.values()}
        return [found[id(x)][part] for part, x in enumerate(inputs)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of nn.MultiheadAttention, which see: the output and, where asked for, the attention weights."""
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask: expected one beside the hint is_causal, got None")
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (each[None] for each in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        (n, targets, _), added = q.shape, 0  # q (N, L, E), k and v (N, S, E)
        if self.bias_k is not None:
            k, v = (torch.cat([x, b.expand(n, 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
            added += 1
        if self.add_zero_attn:
            k, v = (F.pad(each, (0, 0, 0, 1)) for each in (k, v))
            added += 1
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))  # (N, H, *, D)
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else self._bias(q, attn_mask, key_padding_mask, added)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint)
        y = self.out_proj(y.transpose(1, 2).reshape(n, targets, self.embed_dim))
        if not batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _bias(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, added: int) -> Tensor | None:
        """What is added to scores (N, H, L, S): both masks, none of them for sources that were added; None for none."""
        n = q.shape[0]
        mask = _additive("attn_mask", attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(n, self.num_heads, *mask.shape[1:])
        padding = _additive("key_padding_mask", key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding.view(n, 1, 1, -1)
            mask = padding if mask is None else mask + padding
        return mask if mask is None or not added else F.pad(mask, (0, added))


def _additive(name: str, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask, True where nobody looks, as what is added to scores."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool or floating-point tensor, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
