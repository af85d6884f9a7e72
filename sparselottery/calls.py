"""What a model is called with, and what it returns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

ExampleInput = Tensor | tuple | Mapping[str, Any]


class Arguments(NamedTuple):
    """Of one call, `model(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: Any) -> Any:
        """What the model returns of them."""
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """All tensors in them, in order."""
        return [leaf for leaf in tree_leaves(tuple(self)) if isinstance(leaf, Tensor)]

    def map(self, function: Any) -> Arguments:
        """The same with `function` of each tensor in its place; whatever else is copied."""

        def mapped(leaf: Any) -> Any:
            return function(leaf) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

        return Arguments(*tree_map(mapped, tuple(self)))

    @property
    def batch(self) -> int | None:
        """The first dimension of the first tensor that has one; None without."""
        return next((len(each) for each in self.tensors() if each.dim()), None)

    def is_batched(self, tensor: Tensor) -> bool:
        """Is its first dimension the batch? Then it is as long as the first tensor's."""
        return tensor.dim() > 0 and len(tensor) == self.batch

    def with_batch(self, size: int) -> Arguments:
        """The same for a batch of another size: its samples over and over."""

        def repeated(tensor: Tensor) -> Tensor:
            if not self.is_batched(tensor) or len(tensor) == size:
                return tensor
            times = -(-size // len(tensor))
            return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:size]

        return self.map(repeated)


def arguments(example_input: ExampleInput) -> Arguments:
    """The arguments that an example stands for.

    example_input: a tensor is the only argument; a tuple holds the positional ones, a mapping the keyword ones, as
    Hugging Face's tokenizers give. Raises TypeError for anything else.
    """
    if isinstance(example_input, Arguments):
        return example_input
    if isinstance(example_input, Tensor):
        return Arguments((example_input,), {})
    if isinstance(example_input, tuple):
        return Arguments(tuple(example_input), {})
    if isinstance(example_input, Mapping):
        if wrong := [name for name in example_input if not isinstance(name, str)]:
            raise TypeError(f"example_input: expected the names of keyword arguments, got {wrong[0]!r}")
        return Arguments((), dict(example_input))
    raise TypeError(
        "example_input: expected a tensor, a tuple of positional arguments or a dict of keyword arguments, "
        f"got {type(example_input).__name__}"
    )


def outputs(result: Any) -> list[Tensor]:
    """The tensors in what a model returned, in order: of a tensor, of containers, of dataclasses and ModelOutputs.

    Raises TypeError if there is none: nothing could be compared.
    """
    if not (found := _tensors(result)):
        raise TypeError(f"model: expected one that returns tensors, got one that returns {type(result).__name__}")
    return found


def others(result: Any) -> list[str]:
    """The types of what a model returned beside tensors and None."""
    return [type(leaf).__name__ for leaf in tree_leaves(result) if not (leaf is None or isinstance(leaf, Tensor))]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (tuple, list)):
        parts = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        parts = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return [tensor for part in parts for tensor in _tensors(part)]
