"""Is a model one of Hugging Face's? Then saving it must keep its masks; `huggingface` says how."""

from __future__ import annotations

import sys

from torch import nn


def saved_sparse(model: nn.Module) -> None:
    """Let transformers save a converted model sparse, where that is in use: it is not imported for it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and any(isinstance(module, modeling.PreTrainedModel) for module in model.modules()):
        from .huggingface import set_quantizer

        set_quantizer(model)
