"""The index tensors that a layer's kernels follow: those that were validated, and that nobody has touched since.

Buffers change in many ways: `to_empty` leaves them unwritten, `load_state_dict(assign=True)` puts in others, programs
write to them by hand. A layer remembers each tensor and its version, and looks before every call: this takes less than
half a microsecond. Where something changed, the indices are validated and all that was made of them is made anew.
"""

from __future__ import annotations

import weakref
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from ..pattern import Pattern, matrix_shape

_UNKNOWN = (("crow_indices", None, 0),)  # no layer has None there


class IndexedLayer(nn.Module):
    """A layer with `crow_indices` and `col_indices`, and buffers that are made of them.

    A subclass says in `_indices_changed` what becomes of others, and calls `_remember` when all buffers fit together:
    the indices first.
    """

    _known: tuple[tuple[str, Tensor | None, int], ...] = _UNKNOWN  # (buffer, tensor, version)
    _digest: int | None = None  # of a copy, as an average is one: of the indices when they were remembered

    def _indices_changed(self) -> None:
        """The buffers are not those remembered: validates them and calls `_settle`, or raises ValueError."""
        raise NotImplementedError

    def _settle(self, changed: bool) -> None:
        """The indices are valid, and `changed` if they may be others than before: what is made of them must follow."""
        raise NotImplementedError

    def check(self) -> None:
        """Makes sure that the indices are valid, and that all that the layer holds is made of them.

        Raises ValueError if they are not valid. Does nothing in graphs that are compiled or exported, where the native
        calls look at the plan, on the meta device and under functorch, where PyTorch's operators run.
        """
        if torch.compiler.is_compiling():
            return
        buffers = self._buffers
        for name, tensor, version in self._known:
            if buffers[name] is not tensor or tensor._version != version:
                break
        else:
            return
        if all(map(_has_data, (self.crow_indices, self.col_indices))):
            self._indices_changed()

    def _is_known(self) -> bool:
        return all(self._buffers[name] is each and each._version == version for name, each, version in self._known)

    def _same_as_known(self) -> bool:
        """Do the indices hold what they held when they were remembered?"""
        return (
            len(self._known) > 1
            and not self.crow_indices.is_meta
            and all(
                each._version == version and torch.equal(each.to(self._buffers[name].device), self._buffers[name])
                for name, each, version in self._known[:2]
            )
        )

    def _remember(self, *names: str) -> None:
        """All buffers are valid: from here on `check` compares those of these names with what they are now."""
        buffers = self._buffers
        for name in names:
            if buffers[name].is_inference():  # has no version
                with torch.inference_mode(False):
                    buffers[name] = buffers[name].clone()
        known = tuple([(name, each := buffers[name], each._version) for name in names])
        has_data = not any(each.is_meta for _, each, _ in known)
        vars(self)["_known"] = known if has_data else _UNKNOWN  # nn.Module's way takes ten times as long
        if self._digest is not None:
            vars(self)["_digest"] = _digest_of(self.crow_indices, self.col_indices)

    def _forget(self) -> None:
        self._known = _UNKNOWN

    def _valid_pattern(self, shape: tuple[int, int], nnz: int) -> Pattern:
        """The pattern that the buffers hold; ValueError saying what to do if it is none for nnz values."""
        try:
            pattern = Pattern(self.crow_indices, self.col_indices, shape).validate()
            if pattern.nnz != nnz:
                raise ValueError(f"col_indices: expected as many as values, {nnz}, got {pattern.nnz}")
        except ValueError as error:
            raise ValueError(self._unlike(error)) from None
        return pattern

    def _unlike(self, why: ValueError | str) -> str:
        return (
            f"{why}. These indices of a {type(self).__name__} of {matrix_shape(self.shape)} were never loaded, or were "
            "changed by hand or averaged (AveragedModel: use_buffers=False): load_state_dict values and indices of a "
            "converted model first"
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows its buffers if this layer does."""
        return {**self.__dict__, "_known": self._known if self._is_known() else _UNKNOWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self)["_digest"] = 0  # wanted
        if self._known is not _UNKNOWN and all(self._buffers[name] is each for name, each, _ in self._known):
            self._remember(*(name for name, *_ in self._known))  # versions of the copies are others


class Seen:
    """The indices of a layer as they are now, to be recognised later; they are not kept alive."""

    def __init__(self, layer: IndexedLayer) -> None:
        self._marks = [(weakref.ref(each), each._version) for each in (layer.crow_indices, layer.col_indices)]

    def still(self, layer: IndexedLayer) -> bool:
        """Has the layer the same index tensors, which nobody has written to since?"""
        found = layer.crow_indices, layer.col_indices
        return all(ref() is each and each._version == v for each, (ref, v) in zip(found, self._marks, strict=True))


def _digest_of(*indices: Tensor) -> int:
    digest = 0
    for each in indices:
        if _has_data(each):
            digest = zlib.crc32((each if each.is_cpu else each.cpu()).contiguous().numpy(), digest)
    return digest


def _has_data(tensor: Tensor) -> bool:
    """Is it an ordinary tensor, neither on the meta device nor fake nor wrapped by a transform?"""
    return type(tensor) is Tensor and not tensor.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
