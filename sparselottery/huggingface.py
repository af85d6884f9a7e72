"""Converted models of Hugging Face's transformers and peft: saved and loaded sparse, with LoRA beside the survivors.

    import sparselottery.huggingface                        # before from_pretrained
    sparse.save_pretrained(folder)                          # a model that `convert` returned
    sparse = AutoModelForCausalLM.from_pretrained(folder)   # its layers masked again, no dense weight in the file

In the folder config.json has a "quantization_config" with `"quant_method": "sparselottery"` and the survivors of each
layer, and model.safetensors under the name of a masked weight ("fc1.weight") its values (nnz,), beside
"fc1.crow_indices" and "fc1.col_indices". Layers that share a weight have all this once. A program that
does not import this module cannot take it for a dense model: the weights' shapes are wrong, and `from_pretrained`
raises.
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

from .nn import MaskedLayer, OpenedModule, keep_from_fast_path, masked_type_of, opened_type_of
from .nn.experts import MaskedExperts
from .nn.weight import plain
from .pattern import Pattern, matrix_shape

__all__ = ["allow_lora"]

METHOD = "sparselottery"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):
    """survivors: how many weights survive, by the name of each masked layer whose tensors are in the file.

    tied: by the name of each other masked layer, that of the one whose weight it shares. opened: the names of modules
    whose weights are held by layers in them.
    """

    def __init__(
        self,
        survivors: dict[str, int] | None = None,
        tied: dict[str, str] | None = None,
        opened: list[str] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.survivors, self.tied, self.opened = dict(survivors or {}), dict(tied or {}), list(opened or ())


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
        """What is saved; the model's config, which is saved next, gets its entry."""
        if any(isinstance(module, MaskedExperts) for module in model.modules()):
            model._weight_conversions = []  # else transformers cuts all experts into one dense tensor each
        masked = {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}
        first: dict[nn.Parameter, str] = {}
        for name, layer in masked.items():
            first.setdefault(layer.values, name)
        tied = {name: first[layer.values] for name, layer in masked.items() if first[layer.values] != name}
        survivors = {name: layer.nnz for name, layer in masked.items() if name not in tied}
        opened = [name for name, module in model.named_modules() if isinstance(module, OpenedModule)]
        model.config.quantization_config = SparseConfig(survivors, tied, opened)
        shared = {f"{name}.{part}" for name in tied for part in masked[name].state_dict() if part != "bias"}
        renamed = {f"{name}.values": f"{name}.weight" for name in masked}
        state = model.state_dict().items()
        return {renamed.get(name, name): tensor for name, tensor in state if name not in shared}, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        for name in config.opened:
            if (name := _name_in(model, name)) is not None:
                dense = model.get_submodule(name)
                model.set_submodule(name, opened_type_of(dense).of(dense))
        here = {name: _name_in(model, name) for name in (*config.survivors, *config.tied)}
        for name, count in config.survivors.items():
            if (name := here[name]) is not None:
                model.set_submodule(name, _Stored(model.get_submodule(name), count))
        tied = {here[name]: here[first] for name, first in config.tied.items() if here[name] is not None}
        for weight, source in model.all_tied_weights_keys.items():  # a head that the folder of a base did not have
            name, first = weight.removesuffix(".weight"), source.removesuffix(".weight")
            if first != source and isinstance(model.get_submodule(first), _Stored):
                tied.setdefault(name, first)
        for module in model.modules():  # transformers would make weights that a model computes of their shapes
            if any(type(child) is _Stored for child in module.children()) and not (
                module._parameters or module._buffers
            ):
                module._is_hf_initialized = True
        for name, first in tied.items():
            model.set_submodule(name, _Shared(model.get_submodule(name), first))
        # transformers must not tie what is no weight of the layer's shape
        self._untied = dict(model.all_tied_weights_keys)
        model.all_tied_weights_keys = {
            name: source for name, source in self._untied.items() if name.removesuffix(".weight") not in tied
        }

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, (_Stored, _Shared)):
                _make_buffers(model, name, module)
        for name, module in list(model.named_modules()):
            if isinstance(module, _Stored):
                model.set_submodule(name, module.masked(name))
        for name, module in list(model.named_modules()):
            if isinstance(module, _Shared):
                model.set_submodule(name, module.masked(model.get_submodule(module.first)))
        model.all_tied_weights_keys = self._untied
        keep_from_fast_path(model)
        model.is_quantized = False  # else transformers refuses .half() and training
        del model.quantization_method

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        weights: dict[nn.Parameter, nn.Parameter] = {}  # by the values that layers may share
        for name, module in list(model.named_modules()):
            if isinstance(module, OpenedModule):
                model.set_submodule(name, module.closed())
        for name, module in list(model.named_modules()):
            if isinstance(module, MaskedLayer):
                dense = module.to_dense()
                dense.weight = weights.setdefault(module.values, dense.weight)
                model.set_submodule(name, dense)
        keep_from_fast_path(model)
        model._weight_conversions = None  # as of its type
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
        return _masked(dense, mask, self)


class _Shared(nn.Module):
    """In place of a layer with the weight of another, `first`, while the tensors are loaded: a bias at most."""

    def __init__(self, dense: nn.Module, first: str) -> None:
        super().__init__()
        self.first = first
        self.register_parameter("bias", getattr(dense, "bias", None))
        self._dense = [dense]  # in a list: no child

    def masked(self, first: MaskedLayer) -> MaskedLayer:
        """The masked layer with the survivors of the first."""
        (dense,) = self._dense
        dense.weight = nn.Parameter(plain(first.weight).detach())
        layer = _masked(dense, first.mask, self)
        layer.share(first)
        return layer


def _masked(dense: nn.Module, mask: Tensor, stored: _Stored | _Shared) -> MaskedLayer:
    """Of a dense layer with its weight, and the bias and the mode of what stood in its place."""
    if stored.bias is not None:
        dense.bias = stored.bias
    layer = masked_type_of(dense)[0].from_dense(dense, mask).train(stored.training)
    if stored.bias is not None:
        layer.bias = stored.bias  # which another module may share
    return layer


def _make_buffers(model: PreTrainedModel, name: str, stored: _Stored | _Shared) -> None:
    """The buffers of a dense layer that no file holds, as the model that it is in initialises them."""
    (dense,) = stored._dense
    missing = {key: each for key, each in dense._buffers.items() if each is not None and each.is_meta}
    if missing:
        device = next(each.device for each in model.parameters() if not each.is_meta)
        dense._buffers.update({key: torch.empty_like(each, device=device) for key, each in missing.items()})
        for parameter in dense.parameters():
            parameter._is_hf_initialized = True  # it is another's to fill
        within = [each for path, each in model.named_modules() if isinstance(each, PreTrainedModel)
                  and (not path or name.startswith(f"{path}."))]  # fmt: skip
        within[-1]._init_weights(dense)


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
        if masked_type_of(found)[0] is None and opened_type_of(found) is None:
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
            module._weight_conversions = None  # as of its type


def allow_lora(config: Any) -> Any:
    """The same `peft.LoraConfig`, which takes masked linear layers too: `get_peft_model(sparse, allow_lora(config))`.

    The survivors are frozen and multiplied as before; beside them are the two dense factors. These cannot be merged
    into the sparse weight: `merge_adapter` and `merge_and_unload` raise ValueError. An adapter that was saved is
    loaded by `PeftModel.from_pretrained(sparse, folder, config=allow_lora(PeftConfig.from_pretrained(folder)))`.
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
