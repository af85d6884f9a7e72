"""Modules whose weights are no layer's own, opened: linear layers hold them, each of which can be masked."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .base import MaskedLayer

_TABLES = ("_parameters", "_buffers", "_modules")


class OpenedModule(nn.Module):
    """A module of `dense_type` in which linear layers hold the weights, dense or masked.

    Masks, tickets and dense checkpoints know its weights by the names of the dense module: see `dense_names`.
    """

    dense_type: ClassVar[type[nn.Module]]

    @classmethod
    def opens(cls, module: nn.Module) -> bool:
        """Is a module one of those, and its forward what they have?"""
        return type(module) is cls.dense_type

    @property
    def dense_names(self) -> dict[str, str]:
        """Of what its layers hold, the name in the dense module: {"in_proj.weight": "in_proj_weight"}."""
        raise NotImplementedError

    @classmethod
    def of(cls, dense: nn.Module) -> OpenedModule:
        """The same module, opened: its parameters are those of the dense one."""
        opened = _with_tables_of(dense, cls)
        opened._open(dense)
        return opened.train(dense.training)

    def closed(self) -> nn.Module:
        """The dense module, with zeros where nothing survived; all else is this one's own."""
        dense = _with_tables_of(self, self.dense_type)
        layers = {
            name: layer.to_dense() if isinstance(layer, MaskedLayer) else layer for name, layer in self._modules.items()
        }
        self._close(dense, layers)
        return dense

    def _open(self, dense: nn.Module) -> None:
        """Puts layers in the place of parameters."""
        raise NotImplementedError

    def _close(self, dense: nn.Module, layers: dict[str, nn.Module]) -> None:
        """Puts the parameters of the layers, which are dense now, in their place."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for ours, name in self.dense_names.items():
            if prefix + name in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _with_tables_of(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of another type with the same attributes, parameters, buffers and children, in tables of its own."""
    twin = nn.Module.__new__(kind)
    vars(twin).update({name: dict(value) if name in _TABLES else value for name, value in vars(module).items()})
    return twin


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that holds these parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear
