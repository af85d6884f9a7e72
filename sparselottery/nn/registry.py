"""Which masked layer takes the place of which dense one."""

from __future__ import annotations

from inspect import Parameter, getattr_static, signature

from torch import nn

from .attention import MaskedMultiheadAttention
from .base import MaskedLayer
from .conv import MaskedConv1d, MaskedConv2d
from .conv_transpose import MaskedConvTranspose1d, MaskedConvTranspose2d
from .embedding import MaskedEmbedding, MaskedEmbeddingBag
from .experts import MaskedExperts, MaskedMatrices
from .linear import MaskedLinear
from .opened import OpenedModule
from .own_forward import why_not_derived
from .scattered import (
    MaskedBilinear,
    MaskedConv3d,
    MaskedConvTranspose3d,
)
from .transposed import MaskedTransposedLinear

_TYPES: dict[type[nn.Module], type[MaskedLayer]] = {
    masked.dense_type: masked
    for masked in (
        MaskedLinear,
        MaskedConv1d,
        MaskedConv2d,
        MaskedConv3d,
        MaskedConvTranspose1d,
        MaskedConvTranspose2d,
        MaskedConvTranspose3d,
        MaskedEmbedding,
        MaskedEmbeddingBag,
        MaskedBilinear,
        MaskedMatrices,
    )
}
_OPENED: tuple[type[OpenedModule], ...] = (MaskedMultiheadAttention, MaskedExperts)
_BY_NAME = {"transformers.pytorch_utils.Conv1D": MaskedTransposedLinear}  # of packages that need not be there


def as_module(model: nn.Module) -> nn.Module:
    """The model; raises TypeError if it is none, as the class of one is not."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model: expected an nn.Module, got {got}")
    return model


def register(dense_type: type[nn.Module], masked_type: type[MaskedLayer]) -> None:
    """Have layers of a dense type masked by a masked type of one's own: by `prune`, `convert` and all that follows.

    Examples:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return 3 * super().forward(x)
        >>> class MaskedScaled(ScatteredLayer):
        ...     dense_type, arguments = Scaled, ("in_features", "out_features")
        ...     def multiply(self, weight, bias, x):
        ...         return 3 * nn.functional.linear(x, weight, bias)
        >>> register(Scaled, MaskedScaled)
        >>> model = nn.Sequential(Scaled(8, 4))
        >>> type(convert(model, prune(model, 0.5))[0]).__name__
        'MaskedScaled'

    masked_type: a subclass of `ScatteredLayer`, whose docstring shows a whole one, or of `MaskedLayer`, with this dense
    type as its `dense_type`. A type that is registered again gets the new one.
    Raises TypeError for anything else, and says what is missing.
    """
    if not (isinstance(dense_type, type) and issubclass(dense_type, nn.Module)):
        raise TypeError(f"dense_type: expected a subclass of nn.Module, got {dense_type!r}")
    if not (isinstance(masked_type, type) and issubclass(masked_type, MaskedLayer)):
        raise TypeError(f"masked_type: expected a subclass of MaskedLayer, got {masked_type!r}")
    if getattr(masked_type, "dense_type", None) is not dense_type:
        got = getattr(masked_type, "dense_type", None)
        raise TypeError(f"masked_type: expected one whose dense_type is {dense_type.__name__}, got one with {got!r}")
    if wrong := _why_unfit(dense_type, masked_type):
        raise TypeError(f"masked_type: {wrong}")
    _TYPES[dense_type] = masked_type


def _why_unfit(dense_type: type[nn.Module], masked_type: type[MaskedLayer]) -> str | None:
    """What of a masked type's own does not fit the constructor of its dense type."""
    name, taken = dense_type.__name__, signature(dense_type).parameters
    arguments = getattr(masked_type, "arguments", None)
    if not (isinstance(arguments, (tuple, list)) and all(isinstance(each, str) for each in arguments)):
        return f"expected `arguments`, a tuple of the names that {name}'s constructor takes, got {arguments!r}"
    if unknown := [each for each in arguments if each not in taken]:
        return f"expected `arguments` of {name}, got {unknown}, which its constructor does not take"
    if used := [each for each in arguments if hasattr(getattr_static(masked_type, each, None), "__get__")]:
        return f"expected `arguments` with names of their own, got {used}, which each masked layer has: rename them"
    if masked_type.chooses_bias != ("bias" in taken):
        has = "has an" if "bias" in taken else "has no"
        return f"expected `chooses_bias = {'bias' in taken}`, as {name}'s constructor {has} argument `bias`"
    variadic = Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD
    needed = [n for n, each in taken.items() if each.default is Parameter.empty and each.kind not in variadic]
    if missing := [n for n in needed if n not in (*arguments, "bias", "device", "dtype")]:
        return f"expected `arguments` with all that {name}'s constructor needs, got none of {missing}"
    if masked_type.multiply is MaskedLayer.multiply:
        return f"expected a method `multiply(self, weight, bias, x)` that computes what {name}'s forward does, got none"
    return None


def masked_type_of(module: nn.Module) -> tuple[type[MaskedLayer] | None, str | None]:
    """(what takes the place of a dense layer, why nothing does): one of them is None, or for no layer both.

    A subclass that computes what its base does, or calls that and does something more, is one of the base.
    """
    for kind in type(module).__mro__[:-1]:
        masked = _TYPES.get(kind) or _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
        if masked is not None:
            why = why_not_derived(type(module), kind, masked)
            return (None, f"a subclass of {name_of(kind)}: {why}") if why else (masked, None)
    return None, None


def opened_type_of(module: nn.Module) -> type[OpenedModule] | None:
    """What a dense module is opened as, so that its weights can be masked; None for all others."""
    return next((kind for kind in _OPENED if kind.opens(module)), None)


def name_of(kind: type[nn.Module]) -> str:
    """As users write it: "nn.Conv1d"."""
    return f"nn.{kind.__name__}" if getattr(nn, kind.__name__, None) is kind else kind.__name__
