"""Converted models of Hugging Face's transformers and peft: saved and loaded sparse, with LoRA beside the survivors.

    import sparselottery.huggingface                        # before from_pretrained
    sparse.save_pretrained(folder)                          # a model that `convert` returned
    sparse = AutoModelForCausalLM.from_pretrained(folder)   # its layers masked again, no dense weight in the file

In the folder config.json has a "quantization_config" with `"quant_method": "sparselottery"` and the survivors of each
layer, and model.safetensors under the name of a masked weight ("fc1.weight") its values (nnz,), beside
"fc1.crow_indices" and "fc1.col_indices". A program that does not import this module cannot take it for a dense model:
the weights' shapes are wrong, and `from_pretrained` raises.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .nn import MaskedLayer, masked_type_of
from .pattern import Pattern, matrix_shape

__all__ = ["allow_lora"]

METHOD = "sparselottery"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """survivors: how many weights survive, by the name of each masked layer."""

    def __init__(self, survivors: dict[str, int] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.survivors = dict(survivors or {})


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):
    """Through this transformers saves and loads masked layers; nothing is quantised."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What is saved; the model's config, which is saved next, gets its entry.

        Raises ValueError for masked layers that share their weight, as transformers would save it but once.
        """
        masked = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}
        first: dict[int, str] = {}
        for name, layer in masked.items():
            if (other := first.setdefault(id(layer.values), name)) != name:
                raise ValueError(
                    f"model: expected masked layers with weights of their own, got {other!r} and {name!r}, which share "
                    "one: convert without masks for them, or keep the model by Ticket.from_model(model).save"
                )
        model.config.quantization_config = SparseConfig({name: layer.nnz for name, layer in masked.items()})
        renamed = {f"{name}.values": f"{name}.weight" for name in masked}
        return {renamed.get(name, name): tensor for name, tensor in model.state_dict().items()}, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, count in self.quantization_config.survivors.items():
            if (name := _name_in(model, name)) is not None:
                model.set_submodule(name, _Stored(model.get_submodule(name), count))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, _Stored):
                model.set_submodule(name, module.masked(name))
        model.is_quantized = False  # else transformers refuses .half() and training
        del model.quantization_method

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, MaskedLayer):
                model.set_submodule(name, module.to_dense())
        return model


class _Stored(nn.Module):
    """In place of a layer while its tensors are loaded: as the file holds them."""

    def __init__(self, dense: nn.Module, count: int) -> None:
        super().__init__()
        self._kind, _ = masked_type_of(dense)
        shape = tuple(dense.weight.shape)
        self._matrix = shape[::-1] if self._kind.transposed else matrix_shape(shape)
        self.weight = nn.Parameter(dense.weight.new_empty(count))
        self.register_parameter("bias", getattr(dense, "bias", None))
        self.register_buffer(
            "crow_indices", torch.empty(self._matrix[0] + 1, dtype=torch.int32, device=dense.weight.device)
        )
        self.register_buffer("col_indices", torch.empty(count, dtype=torch.int32, device=dense.weight.device))
        self._dense = [dense]  # in a list: no child

    def masked(self, name: str) -> MaskedLayer:
        """The masked layer of these tensors; ValueError naming it if they are none."""
        (dense,) = self._dense
        try:
            pattern = Pattern(self.crow_indices, self.col_indices, self._matrix).validate()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parts = pattern.scatter(self.weight.detach()), pattern.mask()
        weight, mask = (part.t() if self._kind.transposed else part.view(dense.weight.shape) for part in parts)
        dense.weight = nn.Parameter(weight.contiguous())
        if self.bias is not None:
            dense.bias = self.bias
        return self._kind.from_dense(dense, mask).train(self.training)


def _name_in(model: PreTrainedModel, name: str) -> str | None:
    """The layer's name in a model that may be the base of the one that was saved, or hold it as its base.

    None of a head that a base does not have. Raises ValueError for other layers that the model lacks.
    """
    prefix = f"{model.base_model_prefix}."
    for each in (name, name.removeprefix(prefix), prefix + name):
        try:
            found = model.get_submodule(each)
        except AttributeError:
            continue
        if masked_type_of(found)[0] is None:
            raise ValueError(f"{each}: expected a layer that can be masked, got {type(found).__name__}")
        return each
    if model.base_model is model and not name.startswith(prefix):
        return None
    raise ValueError(f"model: expected the layers of the folder, got a {type(model).__name__} without {name!r}")


def set_quantizer(model: nn.Module) -> None:
    """Let each pretrained model in a converted one be saved by `SparseQuantizer`; or no more, of one made dense."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        if any(isinstance(layer, MaskedLayer) for layer in module.modules()):
            if getattr(module, "hf_quantizer", None) is None:
                module.hf_quantizer = SparseQuantizer(SparseConfig())
        elif isinstance(getattr(module, "hf_quantizer", None), SparseQuantizer):
            module.hf_quantizer.remove_quantization_config(module)


def allow_lora(config: Any) -> Any:
    """The same `peft.LoraConfig`, which takes masked linear layers too: `get_peft_model(sparse, allow_lora(config))`.

    The survivors are frozen and multiplied as before; beside them are the two dense factors. These cannot be merged
    into the sparse weight: `merge_adapter` and `merge_and_unload` raise ValueError.
    """
    from peft.tuners.lora.layer import Linear

    from .nn import MaskedLinear

    class MaskedLora(Linear):
        """LoRA beside a MaskedLinear."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unsupported layer type")  # peft's word for layers of others
                super().__init__(*args, **kwargs)

        def merge(self, *_: Any, **__: Any) -> None:
            raise ValueError(
                "merge: expected a dense layer, got a masked one, which has no place for LoRA's dense update"
            )

    config._register_custom_module({MaskedLinear: MaskedLora})
    return config
