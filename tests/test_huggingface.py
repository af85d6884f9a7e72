"""Converted models of transformers: saved and loaded sparse, never taken for dense ones, trained, and with LoRA."""

from __future__ import annotations

import json
import tempfile

import pytest
import torch
from pretrained import EMBEDDING, HEADS, IDS, bert, gpt2, llama, load, neox, pruned
from safetensors.torch import load_file, save_file
from torch import nn

from sparselottery import MaskedLinear, convert, prune, set_masks, to_dense
from sparselottery.convert import masked_layers

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("make", [llama, neox, bert, gpt2])
def test_a_round_trip_is_sparse_and_exact(make, tmp_path):
    sparse = pruned(make())
    sparse.save_pretrained(tmp_path)
    loaded = load(sparse, tmp_path)
    ours, theirs = masked_layers(sparse), masked_layers(loaded)
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert all(
            a.equal(b) for a, b in zip(layer.state_dict().values(), theirs[name].state_dict().values(), strict=True)
        )
        assert theirs[name].values.requires_grad
    assert loaded(IDS).logits.equal(sparse(IDS).logits)
    dense = tmp_path / "dense"
    to_dense(sparse).save_pretrained(dense)
    assert (tmp_path / "model.safetensors").stat().st_size < (dense / "model.safetensors").stat().st_size
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert load(sparse, dense)(IDS).logits.allclose(sparse(IDS).logits, atol=1e-6)


def test_masks_that_moved_are_the_ones_saved(tmp_path):
    sparse = pruned(llama())
    sparse.save_pretrained(tmp_path)
    loaded = load(sparse, tmp_path)
    set_masks(loaded, {name: mask for name, mask in prune(loaded, 0.5).items() if name in masked_layers(loaded)})
    loaded.save_pretrained(tmp_path / "again")
    again = load(sparse, tmp_path / "again")
    assert again(IDS).logits.equal(loaded(IDS).logits)
    assert again.half().dtype == torch.float16


def test_the_base_of_a_model_and_a_model_of_a_base(tmp_path):
    sparse = pruned(bert())
    sparse.save_pretrained(tmp_path / "whole")
    sparse.bert.save_pretrained(tmp_path / "base")
    for folder in ("whole", "base"):
        base = transformers.BertModel.from_pretrained(tmp_path / folder).eval()
        assert base(IDS).last_hidden_state.equal(sparse.bert(IDS).last_hidden_state)
    whole = load(sparse, tmp_path / "base")
    assert whole.bert(IDS).last_hidden_state.equal(sparse.bert(IDS).last_hidden_state)


def test_loaded_in_another_dtype(tmp_path):
    sparse = pruned(llama())
    sparse.save_pretrained(tmp_path)
    assert {each.dtype for each in load(sparse, tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_dequantize(tmp_path):
    sparse = pruned(llama())
    sparse.save_pretrained(tmp_path)
    dense = load(sparse, tmp_path).dequantize()
    assert not masked_layers(dense)
    assert dense(IDS).logits.allclose(sparse(IDS).logits, atol=1e-6)


def test_a_program_without_this_library_gets_an_error(tmp_path, monkeypatch):
    """transformers skips what it does not know with a warning: then the shapes stop it, before any random weight."""
    sparse = pruned(llama())
    sparse.save_pretrained(tmp_path)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "sparselottery")
    with pytest.raises(RuntimeError, match="mismatch"):
        load(sparse, tmp_path)


@pytest.mark.parametrize("part", ["col_indices", "crow_indices"])
def test_damaged_indices_are_refused(tmp_path, part):
    sparse = pruned(llama())
    sparse.save_pretrained(tmp_path)
    state, name = load_file(tmp_path / "model.safetensors"), f"model.layers.0.mlp.up_proj.{part}"
    state[name][1] = 1000
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"model.layers.0.mlp.up_proj: {part}"):
        load(sparse, tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path):
    sparse = pruned(llama())
    sparse.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["survivors"]["model.layers.7.mlp.up_proj"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"without 'model.layers.7.mlp.up_proj'"):
        load(sparse, tmp_path)


@pytest.mark.parametrize("make", [llama, neox])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate(make, options):
    sparse = pruned(make())
    dense = to_dense(sparse)
    how = {"max_new_tokens": 5, "do_sample": False, **options}
    assert sparse.generate(IDS, **how).equal(dense.generate(IDS, **how))


def test_resize_token_embeddings(tmp_path):
    with pytest.raises(TypeError, match="MaskedEmbedding"):
        pruned(llama()).resize_token_embeddings(60)
    sparse = pruned(llama(), ignore=(*HEADS, EMBEDDING))
    before = sparse(IDS).logits
    sparse.resize_token_embeddings(60)
    torch.testing.assert_close(sparse(IDS).logits[..., :50], before)
    sparse.save_pretrained(tmp_path)
    assert load(sparse, tmp_path)(IDS).logits.equal(sparse(IDS).logits)


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.arange(3, 9) + index
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, **options):
    pytest.importorskip("accelerate")
    how = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(str(folder), disable_tqdm=True, learning_rate=1e-2, **how, **options)
    return transformers.Trainer(model, arguments, train_dataset=Texts())


def test_trainer_trains_saves_and_goes_on(tmp_path):
    sparse = pruned(llama()).train()
    counts = {name: layer.nnz for name, layer in masked_layers(sparse).items()}
    training = trainer(sparse, tmp_path)
    before = {name: layer.values.detach().clone() for name, layer in masked_layers(sparse).items()}
    training.train()
    assert all(not layer.values.equal(before[name]) for name, layer in masked_layers(sparse).items())
    assert {name: layer.nnz for name, layer in masked_layers(sparse).items()} == counts
    whole = load(sparse, tmp_path / "checkpoint-4")
    assert whole(IDS).logits.equal(sparse.eval()(IDS).logits)
    resumed = load(sparse, tmp_path / "checkpoint-2").train()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(resumed.eval()(IDS).logits, sparse(IDS).logits)


def test_a_checkpoint_loads_into_a_model_of_other_masks(tmp_path):
    sparse, other = pruned(llama()), pruned(llama(), 0.4)
    sparse.save_pretrained(tmp_path)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert other(IDS).logits.equal(sparse(IDS).logits)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    sparse = pruned(llama())
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(sparse, torch.optim.SGD(sparse.parameters(), lr=0.1))
    before = masked_layers(sparse)["model.layers.0.mlp.up_proj.weight"].values.detach().clone()
    accelerator.backward(model(IDS, labels=IDS).loss)
    optimizer.step()
    assert not accelerator.unwrap_model(model).model.layers[0].mlp.up_proj.values.equal(before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    from sparselottery.huggingface import allow_lora

    sparse = pruned(llama())
    before = sparse(IDS).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(pruned(llama()), config)
    model = peft.get_peft_model(sparse, allow_lora(config))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer.base_layer, MaskedLinear)
    x = torch.randn(3, 32)
    update = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update)
    model(IDS, labels=IDS).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS).logits, before)
    with pytest.raises(ValueError, match="merge: expected a dense layer, got a masked one"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert not any("values" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    adapted = model(IDS).logits
    config = allow_lora(peft.PeftConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(pruned_like(model), tmp_path, config=config).eval()
    assert again(IDS).logits.equal(adapted)


def pruned_like(adapted):
    """The sparse model that an adapter is beside, saved and loaded again without it."""
    with tempfile.TemporaryDirectory() as folder:
        base = adapted.unload()
        base.save_pretrained(folder)
        return load(base, folder)


def test_a_model_with_a_pretrained_one_in_it(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert()

    holder = Holder()
    sparse = convert(holder, prune(holder, 0.5))
    sparse.inner.save_pretrained(tmp_path)
    assert load(sparse.inner, tmp_path)(IDS).logits.equal(sparse.inner(IDS).logits)
