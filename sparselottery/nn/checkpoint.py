"""What a masked layer loads: values with their indices, or the weight of a dense layer."""

from __future__ import annotations

from torch import Tensor

from ..pattern import Pattern
from .weight import WeightedLayer, is_of


class CheckpointedLayer(WeightedLayer):
    """The half of a masked layer that reads state_dicts; what it writes is nn.Module's."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Loads values with their indices (which may differ from ours), or a dense `weight`, read at our mask."""
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None and dense.dim() == 1 and prefix + "crow_indices" in state_dict:  # as of `huggingface`
            state_dict[prefix + "values"], dense = dense, None
        if dense is not None:
            if tuple(dense.shape) != self.dense_shape:
                errors.append(
                    f"size mismatch for {prefix}weight: expected {self.dense_shape}, got {tuple(dense.shape)}"
                )
                return
            try:
                self.check()
                if self.crow_indices.is_meta:
                    raise ValueError("expected a layer whose mask has data, got one on the meta device")
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
                return
            state_dict[prefix + "values"] = self._values_of(dense)
            state_dict |= {prefix + "crow_indices": self.crow_indices, prefix + "col_indices": self.col_indices}
        elif names := [name for name in ("values", "crow_indices", "col_indices") if prefix + name in state_dict]:
            if len(names) < 3:
                errors.append(f"{prefix}: expected values, crow_indices and col_indices together, got {names}")
                return
            try:
                if state_dict[prefix + "values"].shape != state_dict[prefix + "col_indices"].shape:
                    raise ValueError("values: expected as many as col_indices")
                indices = [prefix + name for name in ("crow_indices", "col_indices")]
                pattern = Pattern(*(state_dict[name] for name in indices), self.pattern.shape)
                pattern = pattern if pattern.col_indices.is_meta else pattern.validate()
                state_dict |= zip(indices, (pattern.crow_indices, pattern.col_indices), strict=True)
                if self.nnz != pattern.nnz:
                    self.values.data, self.values.grad = self.values.new_empty(pattern.nnz), None
            except ValueError as error:
                errors.append(f"{prefix}: {error}")
                return
        loads = prefix + "values" in state_dict
        if loads and dense is None:  # into new buffers: the old ones show whether the pattern is another
            for name in ("crow_indices", "col_indices"):
                setattr(self, name, _renewed(getattr(self, name), state_dict[prefix + name]))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if loads:
            same = self._same_as_known() if dense is None else len(self._known) > 1
            self._settle(changed=not same)
        self._follow_values()

    def _values_of(self, dense: Tensor) -> Tensor:
        """Those of a dense weight at our mask; of our own, our values as they are."""
        if is_of(self, dense):
            return self.values
        return self.pattern.gather(self.as_matrix(dense.to(self.crow_indices.device)))


def _renewed(indices: Tensor, given: Tensor) -> Tensor:
    """A new buffer for those given, where the old one is; filled at once, as other threads may call the layer."""
    if indices.is_meta or given.is_meta:
        return indices.new_empty(given.shape)
    return given.to(indices.device, indices.dtype, copy=True)
