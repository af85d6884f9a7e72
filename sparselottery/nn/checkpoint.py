"""What a masked layer loads: values with their indices, or the weight of a dense layer."""

from __future__ import annotations

import torch

from ..pattern import Pattern
from .weight import WeightedLayer


class CheckpointedLayer(WeightedLayer):
    """The half of a masked layer that reads state_dicts; what it writes is nn.Module's."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Loads values with their indices (which may differ from ours), or a dense `weight`, read at our mask."""
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None:
            if tuple(dense.shape) != self.shape:
                errors.append(f"size mismatch for {prefix}weight: expected {self.shape}, got {tuple(dense.shape)}")
                return
            state_dict[prefix + "values"] = self.pattern.gather(dense.flatten(1))
            state_dict |= {prefix + "crow_indices": self.crow_indices, prefix + "col_indices": self.col_indices}
        elif names := [name for name in ("values", "crow_indices", "col_indices") if prefix + name in state_dict]:
            if len(names) < 3:
                errors.append(f"{prefix}: expected values, crow_indices and col_indices together, got {names}")
                return
            try:
                if state_dict[prefix + "values"].shape != state_dict[prefix + "col_indices"].shape:
                    raise ValueError("values: expected as many as col_indices")
                indices = (state_dict[prefix + name] for name in ("crow_indices", "col_indices"))
                self._adopt(Pattern(*indices, self.pattern.shape))
            except ValueError as error:
                errors.append(f"{prefix}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._follow_values()

    def _adopt(self, pattern: Pattern) -> None:
        """Take over another pattern of the same shape; values are resized, their content is the caller's to set."""
        device = self.values.device
        pattern = Pattern(pattern.crow_indices.to(device), pattern.col_indices.to(device), pattern.shape).validate()
        before = self.crow_indices, self.col_indices
        self.crow_indices, self.col_indices = pattern.crow_indices.clone(), pattern.col_indices.clone()
        if self.nnz != pattern.nnz:
            self.values.data, self.values.grad = self.values.new_empty(pattern.nnz), None
        self._prepare_anew(changed=not all(map(torch.equal, before, (self.crow_indices, self.col_indices))))
