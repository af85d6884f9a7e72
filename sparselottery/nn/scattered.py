"""Masked layers without kernels of ours: the values are scattered into a dense weight, and PyTorch multiplies it.

They store, train and save survivors alone, and take the time of the dense layer.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .base import MaskedLayer
from .carried import OF_TORCH, same

WHY = "there are no kernels for such a layer: its values are scattered into a dense weight for PyTorch"


class ScatteredLayer(MaskedLayer):
    """A masked layer of a dense type with a `weight` and perhaps a `bias`, which `multiply` makes y of.

    Examples:
        >>> class Scaled(nn.Module):
        ...     def __init__(self, size, scale):
        ...         super().__init__()
        ...         self.size, self.scale = size, scale
        ...         self.weight = nn.Parameter(torch.ones(size, size))
        ...     def forward(self, x):
        ...         return self.scale * nn.functional.linear(x, self.weight)
        >>> class MaskedScaled(ScatteredLayer):
        ...     dense_type = Scaled
        ...     arguments = ("size", "scale")
        ...     chooses_bias = False
        ...     def multiply(self, weight, bias, x):
        ...         return self.scale * nn.functional.linear(x, weight)
        >>> register(Scaled, MaskedScaled)
        >>> convert(Scaled(4, 3.0), {"weight": torch.eye(4) > 0})(torch.ones(4))
        tensor([3., 3., 3., 3.], grad_fn=<MulBackward0>)

    A subclass names its `dense_type`, the `arguments` that this is made of and that are attributes of it, as they were
    given (all but bias, device and dtype), and writes `multiply`; where the constructor has no argument `bias`,
    `chooses_bias` is False. What else the constructor sets is an attribute of the masked layer too.
    `register` then has it take the place of the dense ones.

    Args:
        mask: bool, of the weight's shape, by keyword, True where a weight survives; None keeps all.
        all others: as in the dense layer, and refused as there.
    Raises TypeError or ValueError also if the mask is not boolean or not of that shape.
    """

    lacks = dict.fromkeys(("sparse", "block", "compact"), WHY)
    measurable = False

    def __init__(self, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__()
        placed = {name: kwargs.pop(name, None) for name in ("device", "dtype")}  # which not all dense layers take
        given = signature(self.dense_type).bind(*args, **kwargs).arguments
        device, dtype = (given.pop(name, each) for name, each in placed.items())
        with torch.device("meta"):  # refuses what the dense layer does
            like = self.dense_type(**given)
        if why := self.why_not(like):
            raise ValueError(f"{type(self).__name__}: {why}")
        found = {name: value for name, value in vars(like).items() if name not in OF_TORCH}
        for name, value in found.items():
            if name in self.arguments or not hasattr(type(self), name):
                setattr(self, name, value)
        self._shape, bias = tuple(like.weight.shape), getattr(like, "bias", None)
        self._biases = 0 if bias is None else len(bias)
        self._build(mask, bias is not None, device, dtype)
        lost = [name for name, value in found.items() if not same(getattr(self, name), value)]
        if lost and not self.dense_type.__module__.startswith("torch."):
            raise ValueError(f"{self.dense_type.__name__}: expected attributes that masked layers do not have "
                             f"themselves, got {', '.join(lost)}: give them other names")  # fmt: skip

    @classmethod
    def why_not(cls, dense: nn.Module) -> str | None:
        """A constructor that makes other attributes of its arguments would make others again of these."""
        try:
            like = cls._dense_like(dense)
        except (AttributeError, TypeError, ValueError) as error:
            return f"{cls.dense_type.__name__} cannot be made again of its attributes {cls.arguments}: {error}"
        for name, value in cls._arguments_of(dense).items():
            if name in cls.arguments and not same(value, made := getattr(like, name)):
                return (
                    f"{name}: expected an attribute that is what {cls.dense_type.__name__}'s constructor was given, "
                    f"got {value!r}, of which it makes {made!r}: keep what is made of it under another name"
                )
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return self._shape

    @property
    def biases(self) -> int:
        return self._biases

    def reset_parameters(self) -> None:
        """Initialise as the dense layer does."""
        if not self.values.is_meta:
            with torch.no_grad(), torch.device(self.values.device):
                dense = self.dense_type(**self._arguments_of(self))
                self.values.copy_(self.pattern.gather(self.as_matrix(dense.weight)))
                if self.bias is not None:
                    self.bias.copy_(dense.bias)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As that of the dense layer."""
        if ops.in_torch(input):
            return self._in_torch(input, *args, **kwargs)
        self.check()
        return self.multiply(self._dense_weight(), self.bias, input, *args, **kwargs)


_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class MaskedConv3d(ScatteredLayer):
    """nn.Conv3d over a fixed mask; `mask` is bool (out_channels, in_channels / groups, *kernel_size).

    Examples:
        >>> layer = MaskedConv3d(3, 4, 3, padding=1, mask=torch.rand(4, 3, 3, 3, 3) < 0.2)
        >>> layer(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 4, 4, 4, 4])
    """

    dense_type = nn.Conv3d
    arguments = _CONVOLUTION

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, O, OD, OH, OW), or without N."""
        padding = self.padding
        if self.padding_mode != "zeros":
            sides = (0,) * 6 if padding == "valid" else _sides(self) if padding == "same" else _twice(padding)
            x, padding = F.pad(x, sides, self.padding_mode), 0
        return F.conv3d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


def _twice(padding: tuple[int, ...]) -> tuple[int, ...]:
    """Before and after, the last dimension first, as F.pad takes it."""
    return tuple(size for size in reversed(padding) for _ in range(2))


def _sides(conv: MaskedConv3d) -> tuple[int, ...]:
    """The same for the padding "same"."""
    sides: list[int] = []
    for dilation, size in zip(reversed(conv.dilation), reversed(conv.kernel_size), strict=True):
        total = dilation * (size - 1)
        sides += [total // 2, total - total // 2]
    return tuple(sides)


class MaskedConvTranspose3d(ScatteredLayer):
    """nn.ConvTranspose3d over a fixed mask, which is bool (in_channels, out_channels / groups, *kernel_size).

    Examples:
        >>> layer = MaskedConvTranspose3d(3, 4, 2, stride=2, mask=torch.rand(3, 4, 2, 2, 2) < 0.5)
        >>> layer(torch.randn(2, 3, 4, 4, 4)).shape
        torch.Size([2, 4, 8, 8, 8])
    """

    dense_type = nn.ConvTranspose3d
    arguments = (*_CONVOLUTION, "output_padding")

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, C, D, H, W) -> (N, O, OD, OH, OW), or without N; output_size: as that of the dense layer."""
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode: expected 'zeros', got {self.padding_mode!r}")
        sizes = self.stride, self.padding, self.kernel_size
        extra = nn.ConvTranspose3d._output_padding(self, x, output_size, *sizes, 3, self.dilation)
        return F.conv_transpose3d(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)


class MaskedBilinear(ScatteredLayer):
    """nn.Bilinear over a fixed mask, which is bool (out_features, in1_features, in2_features)."""

    dense_type = nn.Bilinear
    arguments = ("in1_features", "in2_features", "out_features")

    def multiply(self, weight: Tensor, bias: Tensor | None, x: Tensor, x2: Tensor) -> Tensor:
        """(*, in1_features), (*, in2_features) -> (*, out_features)."""
        return F.bilinear(x, x2, weight, bias)
